"""The Screen: alone it writes to stdout and stderr while a verb runs.

The program's bytes go to the descriptors unchanged. Only for a terminal they are sanitised: a
program on a host must not move the operator's cursor, set the title or fill the clipboard. corra's
own words go to stderr. Only a terminal has a live line, or a live block of lines; it stands below
everything else and is erased before any other byte is written. While a block is shown, output is
held back for as long as it stands, half a second: a block that each line redraws would flicker.
"""

from __future__ import annotations

import contextlib
import json as json_
import logging
import os
import re
import select
import stat
import sys
import termios
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from corra import render
from corra.errors import EPIPE_CODE, NOT_WRITTEN, CorraError, line
from corra.model.hidden import hidden_streams
from corra.model.words import errno_words

from .own_lines import OwnLines

if TYPE_CHECKING:
    from .program_modes import ProgramModes
    from .sanitiser import Sanitiser

OUT = 1
ERR = 2
_INDENT = " " * len("corra: ")
_REDRAW_S = 0.1
_TICK_S = 1.0
_BLOCK_S = 0.5
# So much output is held back for a block, and no more.
_HELD_MAX = 64 << 10
_COLOURS = {
    "done": "green",
    "started": "green",
    "STILL RUNNING": "yellow",
    "MAYBE STARTED": "yellow",
}


def descriptor_for(stream: str) -> int:
    """Return where a program's stream is written: a terminal's one stream is stdout."""
    return ERR if stream == "stderr" else OUT


def hidden_descriptors(hide: bool | str | None) -> frozenset[int]:
    """Return the descriptors that get nothing of a program, by Invoke's `hide`. Raises Misuse."""
    return frozenset(descriptor_for(stream) for stream in hidden_streams(hide))


class Gone(Exception):
    """What is written here reaches nobody: the reader has gone, or the disk is full.

    `code` is the verb's exit code; `said` tells that a line on stderr has told it.
    """

    def __init__(self, error: OSError) -> None:
        super().__init__(str(error))
        self._error = error
        self.code = EPIPE_CODE if isinstance(error, BrokenPipeError) else NOT_WRITTEN
        self.said = False

    def why(self, what: str) -> str:
        """Return `whoever read WHAT has gone`, or `WHAT can't be written here: disk full`."""
        if self.code == EPIPE_CODE:
            return f"whoever read {what} has gone"
        return f"{what} can't be written here: {errno_words(self._error.errno)}"


class Screen:
    """Owns descriptors 1 and 2. All methods may be called from any thread."""

    def __init__(
        self,
        *,
        json: bool = False,
        quiet: bool = False,
        raw: bool = False,
        out: int = OUT,
        err: int = ERR,
    ) -> None:
        self.json = json
        self.quiet = quiet
        # What is done when the verb has said its last word.
        self.last = contextlib.ExitStack()
        self._fds = {OUT: out, ERR: err}
        self._terminal = {OUT: _isatty(out), ERR: _isatty(err)}
        self._lock = threading.RLock()
        # Both streams go to one terminal.
        self._own = OwnLines()
        shown = [fd for fd in (OUT, ERR) if self._terminal[fd] and not raw]
        self._sanitisers = _sanitisers(shown, self._own) if shown else {}
        # Whether the cursor stands behind an unfinished line of the program's, whose bytes pass
        # unchanged.
        self._unfinished = False
        self._ours = True  # corra wrote last, so the program's colour must be set again
        self._live: Callable[[int], str] | None = None
        self._block: Callable[[int, int], Sequence[str]] | None = None
        self._held: list[tuple[int, bytes]] = []
        self._held_size = 0
        self._drawn = False
        self._drawn_below = 0  # how many rows below the cursor, where the program's line goes on
        self._asking = False  # a question stands where the live line would be drawn
        self._dirty = threading.Event()
        self._closed = threading.Event()
        self._muted = False
        self._lent: ProgramModes | None = None

    @property
    def out_is_terminal(self) -> bool:
        return self._terminal[OUT]

    @property
    def err_is_terminal(self) -> bool:
        return self._terminal[ERR]

    @property
    def can_ask(self) -> bool:
        """Whether a person is there to be asked."""
        return os.isatty(0) and self.err_is_terminal

    @property
    def can_be_lent(self) -> bool:
        """Whether this terminal can stand for the program's."""
        return self.out_is_terminal and not self.json

    def lend(self, switched: bytes = b"") -> None:
        """Lend the terminal to the program: its bytes pass unchanged, and corra writes only notes.

        `switched`: what it has switched on before now, in a terminal that wasn't this one.
        """
        with self._lock:
            from .program_modes import ProgramModes

            self._live = None
            self._erase()
            self._lent = ProgramModes()
            self._lent.see(switched)

    def switch_on(self) -> None:
        """Set the program's modes: at the beginning, and after another program had the terminal."""
        with self._lock:
            if self._lent is not None:
                self._write(OUT, self._lent.redo())

    def take_back(self) -> None:
        """Undo the modes that the program has set."""
        # A write that nobody reads may hold the lock.
        held = self._lock.acquire(timeout=0.5)
        try:
            if self._lent is not None:
                undo, self._lent = self._lent.undo(), None
                with contextlib.suppress(OSError, Gone):
                    self._write(OUT, undo)
        finally:
            if held:
                self._lock.release()

    @property
    def live_line(self) -> bool:
        """Whether a live line is shown."""
        return self._live is not None

    @property
    def width(self) -> int:
        """Columns of the terminal that corra's words go to, else 80."""
        for fd in (self._fds[ERR], self._fds[OUT]):
            with contextlib.suppress(OSError):
                return os.get_terminal_size(fd).columns or 80
        return 80

    @property
    def height(self) -> int:
        """Lines of the terminal that the program's output goes to, else 24."""
        with contextlib.suppress(OSError):
            return os.get_terminal_size(self._fds[OUT]).lines or 24
        return 24

    # -- The program's bytes
    def output(self, fd: int, data: bytes) -> None:
        """Write the program's bytes. Raises Gone when nobody reads them any more."""
        with self._lock:
            if self._muted:
                return
            if not self._terminal[fd]:
                self._write(fd, data)
                return
            if self._block is not None:
                self._held.append((fd, data))
                self._held_size += len(data)
                if self._held_size >= _HELD_MAX:
                    self._release()
                return
            self._output(fd, data)

    def _output(self, fd: int, data: bytes) -> None:
        """Write the program's bytes to a terminal. The lock is held."""
        sanitiser = self._sanitisers.get(fd)
        if self._lent is not None:
            self._lent.see(data)
            self._unfinished = not data.endswith(b"\n")
            self._write(fd, data)
            return
        self._wipe()
        text = data
        if sanitiser is not None:
            self._own.resize(self._columns, self.height)
            shown = sanitiser.feed(data)
            if shown and self._ours:
                shown = sanitiser.colour + shown if sanitiser.colour else shown
            text = shown.encode("utf-8", "backslashreplace")
        if text:
            self._ours = False
            self._unfinished = not text.endswith(b"\n")
            self._write(fd, text)
        self._dirty.set()

    def _release(self) -> None:
        """Write what was held back for the block. The lock is held."""
        held, self._held, self._held_size = self._held, [], 0
        for fd, data in held:
            self._output(fd, data)

    @property
    def _mid_line(self) -> bool:
        """Whether corra's next line must begin a line of its own."""
        if self._lent is None and self._sanitisers:
            return not self._own.fresh
        return self._unfinished

    @property
    def _columns(self) -> int:
        with contextlib.suppress(OSError):
            return os.get_terminal_size(self._fds[OUT if self._terminal[OUT] else ERR]).columns
        return 80

    def echoed(self) -> None:
        """Note that the terminal has echoed a key (^C); our next line erases it first."""
        with self._lock:
            self._drawn, self._drawn_below = self.err_is_terminal and not self._mid_line, 0

    def mute(self) -> None:
        """Show no more of the program's output."""
        self._muted = True

    def _write(self, fd: int, data: bytes) -> None:
        left = memoryview(data)
        while left:
            try:
                left = left[os.write(self._fds[fd], left) :]
            except BlockingIOError:  # another program on this terminal made it non-blocking
                select.select([], [self._fds[fd]], [])
            except OSError as error:
                raise Gone(error) from error

    # -- corra's words
    def event(self, kind: str, **facts: Any) -> None:
        """Write one object of `--json`: of kind `state` or `error`, or an event by its name."""
        named = {"type": kind} if kind in ("state", "error") else {"type": "event", "event": kind}
        self._json({"v": 1, **named, **facts})

    def _json(self, value: Mapping[str, Any]) -> None:
        with self._lock:
            self._erase()
            self._write(OUT, json_.dumps(value, ensure_ascii=True).encode() + b"\n")

    def lines(self, lines: Sequence[str]) -> None:
        """Write the answer of a looking verb to stdout."""
        with self._lock:
            self._erase()
            self._write(
                OUT, "".join(each + "\n" for each in lines).encode("utf-8", "backslashreplace")
            )

    def say_unread(
        self, label: str, host: str, fate: str, why: str, hint: Sequence[str] = ()
    ) -> None:
        """Write a line and its hints on stderr, also under --json: stdout has failed."""
        hints = [_INDENT + render.visible(each) for each in hint]
        self._words(render.visible(line(label, host, fate, why)), fate, hints)

    def say(
        self, label: str, host: str, fate: str, why: str = "", hint: Sequence[str] = ()
    ) -> None:
        """Write a line of corra's grammar, and below it its hints: a log has no other remedy."""
        if fate in render.QUIET and not self.err_is_terminal:
            return
        if self.json or (self.quiet and (not fate or fate in render.QUIET)):
            return
        text = render.visible(line(render.visible(label), render.visible(host), fate, why))
        hints = [_INDENT + render.visible(each) for each in hint]
        if self.err_is_terminal:
            hints = [render.folded_hint(each, self.width) for each in hints]
        self._words(text, fate, hints)

    def row(self, text: str) -> None:
        """Write a row of a table on stderr, beside the grammar."""
        if not (self.json or self.quiet):
            self._words(render.visible(text), "", ())

    def note(self, label: str, host: str, text: str) -> None:
        """Write a line without a fate, such as a fact about the link."""
        self.say(label, host, "", text)

    def error(self, error: CorraError) -> None:
        """Write an error, as a line or as JSON."""
        if self.json:
            try:
                self._json(error.to_json())
            except Gone:
                self.say_unread(error.label, error.host, error.fate, error.why)
            return
        self.say(error.label, error.host, error.fate, error.why, error.hint)

    def ask(self, label: str, host: str, question: str) -> bool:
        """Ask the operator. Only y or yes, typed after the question, is a yes."""
        text = (
            render.visible(line(render.visible(label), render.visible(host), "", question.strip()))
            + " "
        )
        with self._lock:
            self._erase()
            with contextlib.suppress(termios.error):  # stdin is no terminal
                termios.tcflush(0, termios.TCIFLUSH)
            self._write(ERR, text.encode("utf-8", "backslashreplace"))
            self._own.begin()
            self._asking = True
        try:
            return sys.stdin.readline().strip().lower() in ("y", "yes")
        finally:
            self._asking = False

    def _words(self, text: str, fate: str, hints: Sequence[str]) -> None:
        # A write that nobody reads may hold the lock; our line can't wait for it.
        held = self._lock.acquire(timeout=0.5)
        try:
            self._erase()
            if self.err_is_terminal:
                text = render.folded(text, self.width, fate)
            if self._mid_line and self.err_is_terminal:
                down = self._own.below if self._lent is None else 0
                text = (f"\x1b[{down}B" if down else "") + "\n" + text
            self._unfinished = False
            self._own.begin()
            whole = "\n".join([self._coloured(text, fate), *hints]) + "\n"
            if self.err_is_terminal and any(each.colour for each in self._sanitisers.values()):
                whole = "\x1b[0m" + whole
            self._ours = True
            whole = whole.replace("\n", "\r\n") if self._lent is not None else whole
            with contextlib.suppress(OSError, Gone):  # the terminal may be gone
                self._write(ERR, whole.encode("utf-8", "backslashreplace"))
            self._dirty.set()
        finally:
            if held:
                self._lock.release()

    def _coloured(self, text: str, fate: str) -> str:
        if not fate or not self.colours:
            return text
        from rich.console import Console
        from rich.text import Text

        console = Console(
            force_terminal=True, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        found = re.search(rf":\s+({re.escape(fate)})", text)
        if found is None:
            return text
        at, end = found.span(1)
        shown = Text(text)
        shown.stylize(f"bold {_COLOURS.get(fate, 'red')}", at, end)
        with console.capture() as captured:
            console.print(shown, end="")
        return captured.get()

    @contextlib.contextmanager
    def warnings(self) -> Iterator[None]:
        """Write the warnings of the modules below, each once; logging would break the live line."""
        said: set[str] = set()

        class Words(logging.Handler):
            def emit(handler, record: logging.LogRecord) -> None:  # noqa: N805
                if (text := record.getMessage().removeprefix("corra: ")) not in said:
                    said.add(text)
                    self.note("", "", text)

        handler, log = Words(logging.WARNING), logging.getLogger("corra")
        log.addHandler(handler)
        try:
            yield
        finally:
            log.removeHandler(handler)

    # -- The live line
    def live(self, words: Callable[[int], str] | None) -> None:
        """Show `words(width)` below everything, redrawn each second, until `words` is None.

        Only a terminal that no other program writes to has a live line.
        """
        if not self._can_be_live():
            return
        with self._lock:
            if self._live is None and words is not None:
                threading.Thread(target=self._tick, name="live", daemon=True).start()
            self._live = words
            if words is None:
                self._erase()
        self._dirty.set()

    def live_block(self, lines: Callable[[int, int], Sequence[str]] | None) -> None:
        """Show `lines(width, height)` below everything, twice a second, until `lines` is None."""
        if not self._can_be_live():
            return
        with self._lock:
            if self._block is None and lines is not None:
                threading.Thread(target=self._tick_block, name="block", daemon=True).start()
            if lines is None:
                self._erase()
            self._block = lines

    def _can_be_live(self) -> bool:
        return not (
            self.quiet
            or self.json
            or not self.err_is_terminal
            or _passes_on(self._fds[OUT])
            or self._lent is not None
        )

    @property
    def colours(self) -> bool:
        """Whether corra's own words may have colours."""
        plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        return self.err_is_terminal and not plain

    def _tick_block(self) -> None:
        """Draw the block again and again. Lines are made outside of the lock: output goes on."""
        while not self._closed.wait(_BLOCK_S):
            made = self._block
            if made is None:
                return
            lines = made(self.width - 1, self.height)
            with self._lock:
                if self._block is None or self._closed.is_set():
                    return
                with contextlib.suppress(OSError, Gone):  # the next output says so
                    self._release()
                self._draw_lines(lines)

    def _draw_lines(self, lines: Sequence[str]) -> None:
        if self._asking or self._mid_line or self._muted or not _in_foreground(self._fds[ERR]):
            return
        self._drawn = True
        self._ours = True
        # The cursor goes back to the block's first column: there a resized terminal leaves it,
        # whatever it has made of the lines below.
        up = f"\x1b[{len(lines) - 1}A" if len(lines) > 1 else ""
        text = "\x1b[K\n".join(lines)
        with contextlib.suppress(OSError, Gone):
            self._write(ERR, f"\r\x1b[0m{text}\x1b[0m\x1b[J\r{up}".encode())

    def _tick(self) -> None:
        while not self._closed.is_set():
            if self._dirty.wait(_TICK_S):
                # It is drawn after a moment of quiet, or a fast program would make it flicker.
                self._closed.wait(_REDRAW_S)
                self._dirty.clear()
            with self._lock:
                if self._live is None or self._closed.is_set():
                    continue
                self._draw(self._live(self.width - 1))

    def _draw(self, text: str) -> None:
        if self._asking or self._muted or not _in_foreground(self._fds[ERR]):
            return
        text = f"\x1b[0m\x1b[2m{text}\x1b[0m\x1b[K"
        if not self._mid_line:
            # The cursor goes back to the first column: behind a full line, the echo of ^C would
            # begin another line.
            text, below = f"\r{text}\r", 0
        elif not self._sanitisers or self._own.column >= self._own.columns:
            return  # nobody knows where the cursor would have to go back to
        else:
            below = self._own.below + 1
            down = f"\x1b[{below - 1}B" if below > 1 else ""
            text = f"{down}\r\n{text}{self._back(below)}"
        self._drawn, self._drawn_below = True, below
        self._ours = True
        with contextlib.suppress(OSError, Gone):
            self._write(ERR, text.encode())

    def _back(self, below: int) -> str:
        """Return what leads from the live line back to the program's place."""
        column = self._own.column
        return f"\x1b[{below}A\r" + (f"\x1b[{column}C" if column else "")

    def _erase(self) -> None:
        """Write what was held back, and remove the live line or block."""
        self._wipe()
        if self._held:
            with contextlib.suppress(OSError, Gone):
                self._release()

    def _wipe(self) -> None:
        if not self._drawn:
            return
        self._drawn, below = False, self._drawn_below
        self._drawn_below = 0
        text = f"\x1b[{below}B\r\x1b[K{self._back(below)}" if below else "\r\x1b[K"
        if self._block is not None:
            text = "\r\x1b[J"
        with contextlib.suppress(OSError, Gone):
            self._write(ERR, text.encode())

    def close(self) -> None:
        """Write all that was held back, and remove the live line and the program's colour.

        Safe to call twice.
        """
        held = self._lock.acquire(timeout=0.5)
        try:
            if self._closed.is_set():
                return
            self._closed.set()
            self._dirty.set()
            self._erase()
            for fd, sanitiser in self._sanitisers.items():
                rest = "" if self._muted else sanitiser.feed(b"", final=True)
                rest += "\x1b[0m" if sanitiser.colour else ""
                with contextlib.suppress(OSError, Gone):
                    self._write(fd, rest.encode("utf-8", "backslashreplace"))
        finally:
            if held:
                self._lock.release()


def _sanitisers(fds: Sequence[int], own: OwnLines) -> dict[int, Sanitiser]:
    from .sanitiser import Sanitiser

    return {fd: Sanitiser(own) for fd in fds}


def _isatty(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _passes_on(fd: int) -> bool:
    """Return whether another program reads our output; it may write to the same terminal."""
    with contextlib.suppress(OSError):
        mode = os.fstat(fd).st_mode
        return stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
    return False


def _in_foreground(fd: int) -> bool:
    try:
        return os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
