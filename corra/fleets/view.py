"""How a fleet is shown while it runs: the Protocol of all views, and the view of whole lines.

A view is told what changes and draws from the Board. It keeps of the output only what it shows, so
that the client's memory doesn't grow with it.
"""

from __future__ import annotations

import base64
import contextlib
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol
from urllib.parse import quote

from corra.model.host_sets import fold
from corra.model.rollout import What
from corra.model.words import now
from corra.terminal.looks import settled
from corra.terminal.screen import ERR, OUT, Screen, descriptor_for, hidden_descriptors

from .board import Board, Member
from .standing import standing_of

# A prompt has no line end, and its reader waits: it is shown after this time.
PROMPT_S = 0.1
# A longer line is shown in parts, so that a line without end takes no more memory than this.
PART_MAX = 8 << 10
_MORE = "…".encode()


class View(Protocol):
    """What shows a fleet. `output` is called by many threads, all else by one."""

    def begins(self, board: Board) -> None:
        """Show `board` from now on."""

    def changed(self, member: Member) -> None:
        """Note that a member was begun, has started or is over."""

    def output(self, member: Member, stream: str, data: bytes, offset: int) -> None:
        """Show what a member has written. Raises Gone when nobody reads it any more."""

    def note(self, text: str, host: str = "") -> None:
        """Say a line, such as who is waited for."""

    def ends(self) -> None:
        """Show all that was held back, and nothing more after that."""


class Lines:
    """Whole lines, each behind its host's name (or its time, or nothing), never mixed."""

    def __init__(self, screen: Screen, *, prefix: str = "host", hide: str | None = None) -> None:
        """`prefix`: host, time or none. `hide`: stdout, stderr or both aren't shown."""
        self._screen = screen
        self._prefix = prefix
        self._hidden = hidden_descriptors(hide)
        self._rest: dict[tuple[int, int], bytearray] = {}
        self._since: dict[tuple[int, int], float] = {}
        self._heads: dict[int, bytes] = {}
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._pending = threading.Event()
        self._board: Board | None = None

    def begins(self, board: Board) -> None:
        self._board = board
        width = max((len(each.name) for each in board.members), default=0)
        width = min(width, 20) if self._screen.out_is_terminal else 0
        self._heads = {
            each.at: f"{each.name + ':':<{width + 1}} ".encode() for each in board.members
        }
        if self._screen.out_is_terminal and not self._screen.json:
            threading.Thread(target=self._flush_prompts, name="prompts", daemon=True).start()

    def changed(self, member: Member) -> None:
        if member.over:
            self._let_go(member)
        if self._screen.json:
            self._event(member)

    def _event(self, member: Member) -> None:
        facts: dict[str, Any] = {"host": member.name, "prog_id": member.prog_id}
        if member.what is What.STARTED and member.state is not None:
            self._screen.event("start", **facts, state=member.state.to_json())
        elif member.over:
            self._screen.event("end", **standing_of(member).to_json())
        else:
            self._screen.event("begin", **facts, wave=member.wave + 1)

    def output(self, member: Member, stream: str, data: bytes, offset: int) -> None:
        fd = descriptor_for(stream)
        if fd in self._hidden:
            return
        if self._screen.json:
            self._screen.event(
                "output",
                host=member.name,
                prog_id=member.prog_id,
                stream=stream,
                offset=offset,
                data=base64.b64encode(data).decode(),
            )
            return
        key = (member.at, fd)
        with self._lock:
            rest = self._rest.setdefault(key, bytearray())
            rest += data
            cut = rest.rfind(b"\n") + 1
            whole, left = bytes(rest[:cut]), bytes(rest[cut:])
            if whole:
                lines = whole[:-1].split(b"\n")
                self._show(fd, member.at, lines, more=False)
            while len(left) >= PART_MAX:
                self._show(fd, member.at, [left[:PART_MAX]], more=True)
                left = left[PART_MAX:]
            rest[:] = left
            if left:
                self._since.setdefault(key, _clock())
                self._pending.set()
            else:
                self._since.pop(key, None)

    def _show(self, fd: int, at: int, lines: Sequence[bytes], *, more: bool) -> None:
        match self._prefix:
            case "none":
                head = b""
            case "time":
                head = f"{now():%H:%M:%S} ".encode() + self._heads.get(at, b"")
            case _:
                head = self._heads.get(at, b"")
        if self._screen.out_is_terminal:
            lines = [settled(line) for line in lines]
        end = _MORE + b"\n" if more else b"\n"
        self._screen.output(fd, b"".join(head + line + end for line in lines))

    def _flush_prompts(self) -> None:
        """Show each unfinished line that has waited for PROMPT_S."""
        from corra.terminal.screen import Gone

        while not self._ended.is_set():
            self._pending.wait()
            self._ended.wait(PROMPT_S)
            with self._lock, contextlib.suppress(Gone):
                due = _clock() - PROMPT_S
                for key, since in list(self._since.items()):
                    if since <= due:
                        self._show(key[1], key[0], [bytes(self._rest.pop(key))], more=True)
                        del self._since[key]
                if not self._since:
                    self._pending.clear()

    def _let_go(self, member: Member) -> None:
        """Show what a member that is over has left without a line end."""
        with self._lock:
            for fd in (OUT, ERR):
                key = (member.at, fd)
                self._since.pop(key, None)
                if rest := self._rest.pop(key, None):
                    self._show(fd, member.at, [bytes(rest)], more=False)

    def note(self, text: str, host: str = "") -> None:
        if self._screen.json:
            self._screen.event("note", host=host or None, text=text)
        else:
            self._screen.note("", host, text)

    def ends(self) -> None:
        self._ended.set()
        self._pending.set()
        for member in self._board.members if self._board is not None else ():
            self._let_go(member)


class ToFiles:
    """Another view, and beside it the files of --output-dir: HOST.out, HOST.err and HOST.json."""

    def __init__(self, view: View, directory: str) -> None:
        """The directory must be there."""
        self._view = view
        self._directory = Path(directory)

    def begins(self, board: Board) -> None:
        self._view.begins(board)

    def path(self, member: Member, ending: str) -> Path:
        return self._directory / f"{quote(member.name, safe='@:[]#')}.{ending}"

    def changed(self, member: Member) -> None:
        if member.over:
            import json

            facts = standing_of(member).to_json()
            self.path(member, "json").write_text(json.dumps(facts, indent=1) + "\n")
            for ending in ("out", "err"):
                self.path(member, ending).touch()
        self._view.changed(member)

    def output(self, member: Member, stream: str, data: bytes, offset: int) -> None:
        ending = "err" if stream == "stderr" else "out"
        with self._opened(self.path(member, ending)) as file:
            # By offset: a second watch of the same run writes the same bytes to the same place.
            file.seek(offset)
            file.write(data)
        self._view.output(member, stream, data, offset)

    @staticmethod
    def _opened(path: Path) -> BinaryIO:
        return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600), "wb")

    def note(self, text: str, host: str = "") -> None:
        self._view.note(text, host)

    def ends(self) -> None:
        self._view.ends()


def waited_for(members: Sequence[Member], seconds: float) -> str:
    """Return the line that says who is waited for."""
    from corra.model.units import chosen_time

    word = "it has" if len(members) == 1 else "they have"
    who = fold(each.name for each in members)
    return f"waiting for {who}: {word} not started in {chosen_time(seconds)}"


def _clock() -> float:
    import time

    return time.monotonic()
