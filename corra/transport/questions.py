"""Asks the operator for a password, a passphrase or a one-time code, on the terminal."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import termios
from collections.abc import Callable

# Takes a prompt, and whether the answer may be seen. Raises EOFError where no answer comes.
Ask = Callable[[str, bool], str]


# What gives the terminal back, for each question that is being asked.
_asked: list[Callable[[], None]] = []


def give_terminal_back() -> None:
    """Undo what the open questions did to the terminal, as this process is about to end.

    A --timeout or a signal may end it while a thread still asks.
    """
    for give_back in _asked.copy():
        with contextlib.suppress(OSError, termios.error):
            give_back()


atexit.register(give_terminal_back)


def terminal_to_ask() -> Ask | None:
    """Return the function that asks on this process's terminal, or None where there is none."""
    if not (sys.stderr is not None and sys.stderr.isatty()):
        return None
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return None
    return ask_on_terminal


def ask_on_terminal(prompt: str, echo: bool) -> str:
    """Ask on the terminal and return the answer. Raises EOFError at Ctrl-C and Ctrl-D.

    The terminal sends no signal meanwhile: a SIGINT could end the process with the echo still off.
    Ctrl-C is read as a key, and the process gets its SIGINT once the echo is on again.
    """
    fd = os.open("/dev/tty", os.O_RDWR | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        before = termios.tcgetattr(fd)
        quiet = termios.tcgetattr(fd)
        quiet[3] &= ~(termios.ECHO | termios.ICANON | termios.ISIG)

        def give_back() -> None:
            termios.tcsetattr(fd, termios.TCSAFLUSH, before)
            os.write(fd, b"\n")

        _asked.append(give_back)
        termios.tcsetattr(fd, termios.TCSAFLUSH, quiet)
        try:
            os.write(fd, _printable(prompt).encode())
            answer = _line(fd, echo)
        finally:
            _asked.remove(give_back)
            give_back()
    except OSError as error:
        raise EOFError from error
    finally:
        os.close(fd)
    if answer is None:
        raise EOFError
    return answer


def _line(fd: int, echo: bool) -> str | None:
    typed = bytearray()
    while True:
        key = os.read(fd, 1)
        if key in (b"\r", b"\n"):
            return os.fsdecode(bytes(typed))
        if key == b"\x03":
            os.kill(os.getpid(), signal.SIGINT)
            return None
        if key in (b"", b"\x04"):
            return None
        if key in (b"\x7f", b"\b"):
            with contextlib.suppress(IndexError):
                typed.pop()
                os.write(fd, b"\b \b" if echo else b"")
        elif key == b"\x15":
            os.write(fd, b"\b \b" * len(typed) if echo else b"")
            typed.clear()
        else:
            typed += key
            os.write(fd, key if echo else b"")


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
