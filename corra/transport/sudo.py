"""sudo on the way: the password it asks for, and what it means when it says no.

The password goes to sudo's stdin, when it asks and only then: where it doesn't ask (NOPASSWD, or a ticket that is still good) the line would
be read by the command instead. So the command waits behind sudo, says that it is there, and is let go by a line of ours.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from corra.errors import Auth
from corra.model.host import Host

from .channel import Channel, LinkLost
from .command import ASK_HERE, ASK_THERE

_PASSED = b"corra-sudo-passed\n"
# PAM takes its time: 2 s for each wrong password, and more where a directory server is asked.
_PATIENCE_S = 30.0
# stderr isn't waited for, only looked at: a channel wakes us for stdout.
_LOOK_EVERY_S = 0.05


def gated(command: str) -> str:
    """Return `command` so that it says when sudo has let it in, and then waits for a line."""
    return f"printf '{_PASSED.decode().rstrip()}\\n'; read -r corra_go; {command}"


def enter(channel: Channel, password: str, host: Host, login: Callable[[], str]) -> Channel:
    """Return `channel`, a `gated` command, once every sudo on the way has let it in. Raises Auth, CorraError, LinkLost."""
    try:
        _answer(channel, password, host, login)
    except BaseException:
        channel.close()
        raise
    channel.write(b"\n")
    return channel


def _answer(channel: Channel, password: str, host: Host, login: Callable[[], str]) -> None:
    asked: set[str] = set()
    came = b""
    deadline = time.monotonic() + _PATIENCE_S
    while _PASSED not in came:
        try:
            data = channel.read(_LOOK_EVERY_S)
        except TimeoutError:
            if time.monotonic() > deadline:
                raise LinkLost(f"sudo gave no answer in {_PATIENCE_S:g} s") from None
        else:
            if not data:
                raise _refused(channel, host, login)
            came += data
        said = channel.stderr().decode(errors="replace")
        for prompt in (ASK_HERE, ASK_THERE):
            if said.count(prompt) > 1:
                raise Auth(f"sudo doesn't take that password for {host.as_user}", host=host.name)
            if prompt in said and prompt not in asked:
                asked.add(prompt)
                channel.write(password.encode("utf-8", "surrogateescape") + b"\n")


def _refused(channel: Channel, host: Host, login: Callable[[], str]) -> Auth:
    channel.exit_status()
    said = channel.stderr().decode(errors="replace")
    found = refusal(said, host, login)
    if found is not None:
        return found
    last = said.replace(ASK_HERE, "").replace(ASK_THERE, "").strip().splitlines()
    return Auth(f"sudo let nobody in: {last[-1] if last else 'it said nothing'}", host=host.name)


def refusal(said: str, host: Host, login: Callable[[], str]) -> Auth | None:
    """Return what sudo's words mean and what would help, or None when it wasn't sudo that spoke."""
    if host.as_user is None:
        return None
    # ssh's own words don't begin with "sudo:", so whether it was the sudo here or the one there only the way tells.
    here = host.user is None
    user = (host.caller if here else host.user) or ""
    where = "here" if here or host.is_local else "there"
    who = login()
    line = f"a line that is enough:  {who} ALL=({user}) NOPASSWD: ALL"
    narrow = "a narrower one can't name the agent: its path is its own hash"
    for pattern, why, hint in (
        (
            r"is not in the sudoers|is not allowed to|may not run sudo",
            f"{who} is not in sudoers {where} (sudo -n said so)",
            [line, narrow],
        ),
        (
            r"a password is required|a terminal is required|no password was provided",
            f"sudo asks for {who}'s password",
            [
                "give it once:  inv --prompt-for-sudo-password ..  (or set sudo.password)",
                line,
                narrow,
            ],
        ),
        (
            r"incorrect password attempt|Sorry, try again",
            f"sudo doesn't take that password of {who}",
            [],
        ),
        (
            r"must have a tty|no tty present",
            f"sudo {where} wants a terminal",
            [f"in sudoers:  Defaults:{who} !requiretty"],
        ),
        (r"unknown user", f"no user {user} {where}", []),
        (
            r"sudo: .*not found|not found: sudo|sudo: unknown command|Unknown command: sudo",
            f"no sudo {where}",
            [],
        ),
    ):
        if re.search(pattern, said):
            return Auth(why, host=host.name, hint=hint)
    return None
