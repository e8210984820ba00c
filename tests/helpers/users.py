"""Users that a test makes as root, and removes afterwards with all their files."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class User:
    """One user with a home."""

    name: str
    uid: int
    gid: int
    home: Path

    def give(self, path: Path) -> Path:
        """Make the user the only owner of `path` and everything below it."""
        for each in [path, *path.rglob("*")]:
            os.chown(each, self.uid, self.gid)
            each.chmod(0o700 if each.is_dir() else 0o600)
        return path


@contextlib.contextmanager
def made(name: str, password: str = "") -> Iterator[User]:
    """Make a user. An empty `password` matches nothing. Skip the test where no user can be made."""
    if os.getuid() != 0:
        pytest.skip("needs root: it makes users")
    if not (shutil.which("useradd") and shutil.which("userdel")):
        pytest.skip("no useradd on this machine")
    # A test beside this one may have the same user.
    with (Path(tempfile.gettempdir()) / f"corra-tests-user-{name}").open("w") as alone:
        fcntl.flock(alone, fcntl.LOCK_EX)
        with _made(name, password) as user:
            yield user


@contextlib.contextmanager
def _made(name: str, password: str) -> Iterator[User]:
    subprocess.run(
        ["useradd", "-m", "-s", "/bin/sh", "-p", "*", name],
        check=True,
        capture_output=True,
        timeout=60,
    )
    entry = pwd.getpwnam(name)
    user = User(name, entry.pw_uid, entry.pw_gid, Path(entry.pw_dir))
    try:
        if password:
            subprocess.run(
                ["chpasswd"],
                input=f"{name}:{password}\n",
                text=True,
                check=True,
                capture_output=True,
                timeout=60,
            )
        yield user
    finally:
        for process in Path("/proc").iterdir():  # userdel refuses while a process of the user lives
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                if process.name.isdecimal() and process.stat().st_uid == user.uid:
                    os.kill(int(process.name), signal.SIGKILL)
        subprocess.run(["userdel", "-r", "-f", name], check=False, capture_output=True, timeout=60)
        for leftover in Path("/var/tmp").glob(f"corra-{user.uid}*"):
            shutil.rmtree(leftover, ignore_errors=True)


@contextlib.contextmanager
def sudoers(name: str, *lines: str) -> Iterator[None]:
    """Add `lines` to the machine's sudoers."""
    path = Path("/etc/sudoers.d") / name
    path.write_text("".join(line + "\n" for line in lines))
    path.chmod(0o440)
    try:
        subprocess.run(["visudo", "-cf", path], check=True, capture_output=True, timeout=20)
        yield
    finally:
        path.unlink()
