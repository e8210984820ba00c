"""What the client gives a program: standard input, environment, secrets.

All of it is read before any host is asked, so that a missing file or variable is a misuse and
nothing has been started.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
import sys
import termios
import threading
from typing import TYPE_CHECKING, Any, cast

from invoke.context import Context

from corra.errors import Misuse
from corra.settings import SETTINGS, setting

from .flags import AttachFlags, KeyboardFlags, LaunchFlags, RunFlags, SendFlags
from .words import refuse_without_id

if TYPE_CHECKING:
    from corra.runs.request import StartOptions
    from corra.runs.stdin_feed import StdinFeed
    from corra.terminal.keyboard import Keyboard

_READ = 256 * 1024
# `export A` isn't one. A shell's exported function is: BASH_FUNC_x%%.
_NAME = r"[^\s=0-9][^\s=]*"


def given_stdin(given: RunFlags) -> tuple[Any, contextlib.AbstractContextManager[Any]]:
    """Return what the program reads, and what the caller closes afterwards.

    Raises Misuse for a file on stdin that the program would not read.
    """
    if given.stdin is not None and (given.interactive or given.pty):
        raise Misuse(
            f"{'-i' if given.interactive else '--pty'} and --stdin exclude each other: "
            "with -i my stdin is read all along"
        )
    if given.interactive:
        from corra.model.program import OPEN

        return OPEN, contextlib.nullcontext()
    if given.stdin == "-":
        return sys.stdin.buffer, contextlib.nullcontext()
    if given.stdin not in (None, "none"):
        try:
            file = open(given.stdin, "rb")  # noqa: SIM115 - the caller closes it, by what we return
        except OSError as error:
            raise Misuse(f"--stdin {given.stdin}: {error.strerror}") from error
        return file, file
    if given.stdin is None and _unread_file(0):
        raise Misuse(
            "stdin is a file, but the program would read /dev/null",
            hint=["send it: --stdin -            don't: --stdin none  (or < /dev/null)"],
        )
    return None, contextlib.nullcontext()


def given_options(c: Context, given: RunFlags, stdin: Any) -> StartOptions:
    """Return the options of a start: from the flags, and under them from the configuration."""
    from corra.model.options import OPTIONS

    options: dict[str, Any] = {
        name: getattr(given, name, None) for name in (*OPTIONS, "id", "name", "spool")
    }
    for name in OPTIONS.keys() & SETTINGS.keys():
        if options[name] is None:
            options[name] = setting(c.config, name)
    options |= {
        "stdin": stdin,
        "env": given_environment(given),
        "secrets": given_secrets(given),
        "limits": dict(each.split("=", 1) for each in given.ulimit),
    }
    return cast("StartOptions", {k: v for k, v in options.items() if v is not None})


def given_keyboard(given: KeyboardFlags) -> Keyboard:
    """Return what reads our own stdin for the program while it runs."""
    from corra.runs.stdin_feed import StdinFeed
    from corra.terminal.keyboard import Keyboard

    return Keyboard(StdinFeed(), given.screen, keys=given.detach_keys)


def given_to_send(given: SendFlags) -> tuple[StdinFeed, threading.Thread | None]:
    """Return what `send` sends, and where there is no TEXT the thread that reads our own stdin.

    Raises Misuse.
    """
    from corra.runs.stdin_feed import StdinFeed

    refuse_without_id(given)
    if len(given.ids) > 2:
        raise Misuse(
            f"one TEXT at a time; in quotes, if that is one: {' '.join(given.ids[1:])!r}",
            fate="NOT SENT",
        )
    feed = StdinFeed()
    piped = len(given.ids) == 1 and not given.line and _is_piped(0)
    if len(given.ids) == 1 and not (given.eof or given.line or piped):
        raise Misuse("nothing to send: say TEXT or --eof, or pipe it in", fate="NOT SENT")
    if piped:
        return feed, threading.Thread(
            target=_pour, args=(feed, given.eof), name="stdin", daemon=True
        )
    feed.write(b"".join(os.fsencode(text) for text in given.ids[1:]) + b"\n" * given.line)
    _finish(feed, eof=given.eof)
    return feed, None


def _pour(feed: StdinFeed, eof: bool) -> None:
    while data := os.read(0, _READ):
        feed.write(data)
        if not feed.wait(2 * _READ):
            return
    _finish(feed, eof=eof)


def _finish(feed: StdinFeed, *, eof: bool) -> None:
    if eof:
        feed.end()
    feed.finish()


def _is_piped(fd: int) -> bool:
    """Return whether something feeds `fd`. A terminal is a person whom nobody has asked."""
    try:
        mode = os.fstat(fd).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _unread_file(fd: int) -> bool:
    """Return whether `fd` is a regular file at its beginning, with bytes to read.

    The stdin of `while read h; do inv run ..; done < hosts` stands behind its beginning.
    """
    try:
        facts = os.fstat(fd)
        return (
            stat.S_ISREG(facts.st_mode) and facts.st_size > 0 and os.lseek(fd, 0, os.SEEK_CUR) == 0
        )
    except OSError:
        return False


def unread_pipe() -> bool:
    """Return whether bytes wait in a pipe that is our stdin."""
    try:
        if not stat.S_ISFIFO(os.fstat(0).st_mode):
            return False
        waiting = fcntl.ioctl(0, termios.FIONREAD, b"\0" * 4)
    except OSError:
        return False
    return any(waiting)


def given_environment(given: RunFlags) -> dict[str, str]:
    """Return what --env-file says, and over it -E."""
    env: dict[str, str] = {}
    if given.env_file:
        try:
            with open(given.env_file, encoding="utf-8", errors="surrogateescape") as lines:
                text = [line.rstrip("\r\n") for line in lines]
        except OSError as error:
            raise Misuse(f"--env-file {given.env_file}: {error.strerror}") from error
        for number, line in enumerate(text, 1):
            name, equals, value = line.lstrip().partition("=")
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            where = f"--env-file {given.env_file}: line {number}:"
            if not re.fullmatch(_NAME, name):
                raise Misuse(f"{where} {name!r} can't be a name")
            if not equals and name not in os.environ:
                raise Misuse(f"{where} {name} is not set here; say {name}=..")
            env[name] = value if equals else os.environ[name]
    for each in given.env:
        name, equals, value = each.partition("=")
        if not re.fullmatch(_NAME, name):
            raise Misuse(f"-E: {name!r} can't be a name")
        env[name] = value if equals else _mine(name, "-E")
    return env


def given_secrets(given: LaunchFlags | AttachFlags) -> dict[str, str]:
    """Return the values of --secret."""
    found: dict[str, str] = {}
    for each in given.secret:
        name, equals, path = each.partition("=")
        if not equals:
            found[name] = _mine(name, "--secret")
            continue
        try:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                found[name] = file.read().removesuffix("\n")
        except OSError as error:
            raise Misuse(f"--secret {name}: {path}: {error.strerror}") from error
    return found


def _mine(name: str, flag: str) -> str:
    if name not in os.environ:
        raise Misuse(f"{flag} {name}: not set here; say {flag} {name}=..")
    return os.environ[name]
