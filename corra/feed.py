"""What is sent to a program while it runs: kept here until the host has taken it, sent again after a broken link, taken once.

The other end is relay.py. A link is made when there is something to send, so a program that is never written to costs none.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable
from pathlib import Path

from . import relay
from .channel import LinkLost
from .errors import CorraError
from .follow import ANSWER_S
from .place import PYTHONS, Agent, Link, Refused

_PAUSE_S = 0.2
# One frame at most, so that what is acknowledged moves on.
_STEP = 32 * 1024

# Finds a Python as the agent's own command does, and gives it relay.py and the words after it.
_FIND = (
    f"""for p in {" ".join(PYTHONS)}; do case $("$p" -V 2>/dev/null) in "Python 3."[6-9]*|"Python 3."[1-9][0-9]*) """
    """exec "$p" -ISE -c "$CORRA_RELAY" "$@";; esac; done; echo "no Python 3.6 or later" >&2; exit 127"""
)


@functools.cache
def source() -> bytes:
    return Path(relay.__file__).read_bytes()


def command(text: str, *, size: tuple[int, int] | None = None) -> tuple[list[str], dict[str, str]]:
    """Return (argv, what must be in its environment) of a shell command whose stdin is fed; with `size` (rows, columns) on a terminal."""
    mode = ["run", text] if size is None else ["pty", text, str(size[0]), str(size[1])]
    return ["sh", "-c", _FIND, "sh", *mode], {"CORRA_RELAY": source().decode()}


class Feed:
    """The sending side. All methods may be called from any thread; none waits for the host."""

    def __init__(self, agent: Agent, spool: Callable[[], str | None]) -> None:
        """`spool` returns where the run's spool is, None as long as that isn't known."""
        self._agent = agent.beside(source())
        self._spool = spool
        self._kept = bytearray()
        self._taken = 0
        self._end: int | None = None
        self._end_taken = False
        self._sent: int | None = None  # over the link that is open
        self._end_sent = False
        self._sizes: deque[tuple[int, int]] = deque(maxlen=1)
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None
        self._link: Link | None = None

    @property
    def given(self) -> int:
        """The offset behind the last byte given to us."""
        return self._taken + len(self._kept)

    @property
    def waiting(self) -> int:
        """How many bytes the host hasn't taken yet."""
        return len(self._kept)

    def write(self, data: bytes) -> None:
        with self._changed:
            self._kept += data
            self._run()

    def end(self) -> None:
        with self._changed:
            self._end = self.given
            self._run()

    def resize(self, rows: int, columns: int) -> None:
        with self._changed:
            self._sizes.append((rows, columns))
            self._run()

    def close(self) -> None:
        """Send no more."""
        with self._changed:
            self._closed = True
            link, self._link = self._link, None
            self._changed.notify_all()
        if link is not None:
            link.close()

    def _run(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._send_all, name="feed", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._is_work)
                if self._closed:
                    return
            try:
                self._over_one_link()
            except (LinkLost, TimeoutError, CorraError, Refused, OSError, ValueError):
                # Not there yet, gone already, or a link that broke: the run's own watcher says what has become of it.
                with self._changed:
                    self._changed.wait_for(lambda: self._closed, _PAUSE_S)

    @property
    def _is_work(self) -> bool:
        return bool(self._kept or self._sizes) or (self._end is not None and not self._end_taken)

    def _over_one_link(self) -> None:
        spool = self._spool()
        if spool is None:
            raise LinkLost("not started yet")
        link = self._agent.stream("feed", {"dir": spool}, timeout_s=ANSWER_S)
        with self._changed:
            self._link, self._sent, self._end_sent = link, None, False
        threading.Thread(target=self._hear, args=(link,), daemon=True).start()
        try:
            while (frames := self._next(link)) is not None:
                link.send(frames)
        finally:
            link.close()

    def _next(self, link: Link) -> bytes | None:
        """Wait until there is something to send over `link`, and return it; None when that link is no more."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._link is not link or self._is_due)
            if self._closed or self._link is not link:
                return None
            assert self._sent is not None
            at = max(self._sent, self._taken)
            data = bytes(self._kept[at - self._taken : at - self._taken + _STEP])
            self._sent = at + len(data)
            frames = b"I %d %d\n%s" % (at, len(data), data) if data else b""
            while self._sizes:
                frames += b"W %d %d\n" % self._sizes.popleft()
            if self._end == self._sent:
                frames += b"E %d\n" % self._end
                self._end_sent = True
            return frames

    @property
    def _is_due(self) -> bool:
        # The first acknowledgement tells where to begin.
        if self._sent is None:
            return False
        return self._sent < self.given or bool(self._sizes) or (self._end is not None and not self._end_sent)

    def _hear(self, link: Link) -> None:
        """Take note of what the host has taken."""
        ahead = b""
        try:
            while data := link.read(None):
                *lines, ahead = (ahead + data).split(b"\n")
                for line in lines:
                    _, offset, *end = line.split()
                    self._acknowledged(int(offset), end=bool(end))
        except (LinkLost, TimeoutError, ValueError, IndexError):
            pass
        with self._changed:
            if self._link is link:
                self._link = None
            self._changed.notify_all()

    def _acknowledged(self, offset: int, *, end: bool) -> None:
        with self._changed:
            self._end_taken = self._end_taken or end
            del self._kept[: max(0, offset - self._taken)]
            self._taken = max(self._taken, offset)
            self._sent = offset if self._sent is None else self._sent
            self._changed.notify_all()
