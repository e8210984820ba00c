"""The signals that reach this process while it watches a run."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import signal as signals
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import Any, NoReturn

from invoke.exceptions import Exit

from corra.transport.questions import give_terminal_back


def die_of(name: str) -> NoReturn:
    """End this process by the signal `name`."""
    import signal

    number = getattr(signal, name)
    give_terminal_back()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    raise Exit(code=128 + number)  # the signal is blocked


class Interrupted(BaseException):
    """Ctrl-C at a moment when nothing else takes it. Invoke would end with 1 at KeyboardInterrupt.

    An exception, as a question for a password must give the terminal its echo back.
    """


@contextlib.contextmanager
def dying_of_interrupts() -> Iterator[None]:
    """End this process by SIGINT at a Ctrl-C, without a word, wherever nothing else takes it."""

    def leave(*_: object) -> NoReturn:
        raise Interrupted

    if signals.getsignal(signals.SIGINT) != signals.SIG_IGN:
        signals.signal(signals.SIGINT, leave)
    try:
        yield
    except Interrupted:
        die_of("SIGINT")
    finally:
        if signals.getsignal(signals.SIGINT) == leave:
            signals.signal(signals.SIGINT, signals.SIG_DFL)


_CAUGHT = (signals.SIGINT, signals.SIGTERM, signals.SIGHUP)
# How long a signal that comes at the end waits for the verb's last word.
LAST_WORD_S = 1.0


class Desk:
    """Where the main thread waits for items of other threads, and for signals by their numbers.

    A signal that was ignored when this process started (`nohup`, `cmd &`) stays ignored. Only the
    main thread may have handlers; in another thread the desk is only a queue.
    """

    def __init__(self, *more: int, last: contextlib.ExitStack | None = None) -> None:
        """`more`: signals to catch beside those that end this process. `last`: is closed when the
        verb has said its last word; a signal that comes after the desk ends this process then.
        """
        self._caught = (*_CAUGHT, *more)
        self._last = last
        self._items: deque[Any] = deque()
        self._ready: deque[Any] = deque()
        self._before: dict[int, Any] = {}
        self._late: list[int] = []
        self._wakeup = -1
        self._read = self._write = -1

    def __enter__(self) -> Desk:  # noqa: PYI034 - typing has no Self in 3.10
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        if threading.current_thread() is threading.main_thread():
            # The kernel may hand a signal to any thread, or to this one just before it blocks. Then
            # no Python handler runs until something else happens (a hang in 1 of 5 tries with a
            # queue.SimpleQueue). The byte in the pipe always wakes us.
            self._wakeup = signals.set_wakeup_fd(self._write, warn_on_full_buffer=False)
            for number in self._caught:
                if signals.getsignal(number) != signals.SIG_IGN:
                    self._before[number] = signals.signal(number, lambda *_: None)
        return self

    def __exit__(self, *_: object) -> None:
        # The handlers go before the pipe, as they came after it: one without the pipe would swallow
        # a signal.
        for number in self._before:
            signals.signal(number, self._come_late if number in _CAUGHT else self._before[number])
        if threading.current_thread() is threading.main_thread():
            signals.set_wakeup_fd(self._wakeup)
        while select.select([self._read], [], [], 0)[0]:
            self._take()
        self._late += [each for each in self._ready if each in _CAUGHT and each in self._before]
        write, self._write = self._write, -1
        os.close(write)
        os.close(self._read)
        if self._last is None:
            self._settle()
        else:
            self._last.callback(self._settle)

    def _come_late(self, number: int, frame: object) -> None:
        """Have a signal wait for the last word, which may be one that nobody reads."""
        if not self._late:
            signals.signal(signals.SIGALRM, lambda *_: self._settle())
            signals.setitimer(signals.ITIMER_REAL, LAST_WORD_S)
        self._late.append(number)

    def _settle(self) -> None:
        """Give the signals their handlers back, and one that came late its effect."""
        if self._late:
            die_of(signals.Signals(self._late[0]).name)
        for number, handler in self._before.items():
            signals.signal(number, handler)

    def put(self, item: Any) -> None:
        """Lay `item` down; harmless when the main thread has left the desk."""
        self._items.append(item)
        with contextlib.suppress(OSError):
            os.write(self._write, b"\0")

    def get(self, timeout_s: float | None = None) -> Any:
        """Return the first item. Raises queue.Empty after `timeout_s`."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        while not self._ready:
            left = None if until is None else max(0.0, until - time.monotonic())
            if not select.select([self._read], [], [], left)[0]:
                raise queue.Empty
            self._take()
        return self._ready.popleft()

    def _take(self) -> None:
        """Read the pipe, in which a byte stands for an item or a signal."""
        for number in os.read(self._read, 512):
            if number == 0:
                self._ready.append(self._items.popleft())
            elif number in self._before:
                self._ready.append(number)

    def put_back(self, item: Any) -> None:
        self._ready.appendleft(item)


def shutting_down() -> bool:
    """Return whether logind says that this machine is going down."""
    where = (
        "org.freedesktop.login1",
        "/org/freedesktop/login1",
        "org.freedesktop.login1.Manager",
        "PreparingForShutdown",
    )
    if not os.path.exists("/run/systemd/system"):
        return False
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        said = subprocess.run(
            ["busctl", "get-property", *where],
            capture_output=True,
            text=True,
            timeout=1,
            check=False,
        )
        return said.stdout.strip() == "b true"
    return False
