"""sudo on the way: the password that sudo asks for, and what its refusals mean.

The password goes to sudo's stdin only when sudo asks for it. Where sudo doesn't ask (NOPASSWD, or a
ticket that is still good), the command would read the password. So a `gated` command says that sudo
has let it in, and waits for a line before it goes on.
"""

from __future__ import annotations

import getpass
import re
import subprocess
import time
from collections.abc import Callable

from corra.errors import Auth, typed_with
from corra.model.host import Host

from .channel import Channel, LinkLost
from .command import ASK_HERE, ASK_THERE

_PASSED = b"corra-sudo-passed\n"
# PAM takes 2 s for each wrong password, and more where it asks a directory server.
_PATIENCE_S = 30.0
# A channel wakes its reader for stdout only, so stderr is looked at this often.
_LOOK_EVERY_S = 0.05


_SAID_BY_SUDO = (
    r"sudoers|is not allowed to|may not run sudo|password|a terminal is required|must have a tty"
    r"|no tty present|unknown user|Sorry, try again"
)


def gated(command: str) -> str:
    """Return `command` with a gate before it: it says that sudo let it in and waits for a line."""
    return f"printf '{_PASSED.decode().rstrip()}\\n'; read -r corra_go; {command}"


def enter(channel: Channel, password: str, host: Host, login: Callable[[], str]) -> Channel:
    """Return `channel`, a `gated` command, once every sudo on the way has let it in.

    Raises Auth, CorraError, LinkLost.
    """
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


def refusal(
    said: str, host: Host, login: Callable[[], str], *, calls_here: bool = True
) -> Auth | None:
    """Return the error that sudo's words mean, with a remedy, or None if sudo didn't speak.

    If not `calls_here`, the first sudo on the way is another machine's.
    """
    if host.as_user is None:
        return None
    # The words don't say whether the sudo here spoke or the one on the host. The mode does, unless
    # there are two.
    here = host.user is None
    both = host.caller is not None and host.user is not None
    if both and calls_here and re.search(_SAID_BY_SUDO, said) and not _may_become(host, said):
        here = True
    user = (host.caller if here else host.user) or ""
    where = "here" if here or host.is_local else "there"
    who = getpass.getuser() if here and both else login()
    line = f"a line that is enough:  {who} ALL=({user}) NOPASSWD: ALL"
    again = typed_with("--prompt-for-sudo-password")
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
                f"once:  {again}" if again else "give it: sudo.password in the configuration",
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
            found = Auth(why, host=host.name, hint=hint)
            found.here = here
            return found
    return None


def _may_become(host: Host, said: str) -> bool:
    """Whether the sudo on this machine lets us become `host.caller`."""
    if ASK_HERE in said or ASK_THERE in said:
        return ASK_THERE in said
    try:
        tried = subprocess.run(
            ["sudo", "-n", "-H", "-u", str(host.caller), "--", "true"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
            timeout=_PATIENCE_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return tried.returncode == 0
