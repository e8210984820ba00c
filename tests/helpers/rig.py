"""A machine with its own init: systemd, logind and sshd, booted in namespaces over a throw-away
layer on this machine's files.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

BOOT_S = 60.0
USER = "corra-ops"
NEEDED = (
    "systemd-nspawn",
    "/lib/systemd/systemd",
    "/lib/systemd/systemd-logind",
    "dbus-daemon",
    "ssh",
    "/usr/sbin/sshd",
    "/usr/bin/python3",
)
TARGET = """[Unit]
Requires=basic.target
Wants=dbus.service systemd-logind.service ssh.service systemd-user-sessions.service
After=basic.target dbus.service systemd-logind.service ssh.service systemd-user-sessions.service
AllowIsolate=yes
"""


def missing() -> str:
    """Return why this machine can't boot a rig, or nothing."""
    if os.geteuid():
        return "not root: no machine can be booted in namespaces"
    lacking = [each for each in NEEDED if not shutil.which(each)]
    return f"no {', '.join(lacking)} here" if lacking else ""


class Rig:
    """The booted machine. It has one ordinary user, who may log in over ssh."""

    def __init__(self, leader: int) -> None:
        self.leader = leader

    def root(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the rig as root, outside any session."""
        return subprocess.run(
            ["nsenter", f"--target={self.leader}", "--all", "--", *argv],
            capture_output=True,
            text=True,
            check=False,
            timeout=BOOT_S,
        )

    def user_argv(self, *argv: str) -> list[str]:
        """Return the words that run a command in the rig as the user, outside any session."""
        who = [
            "setpriv",
            f"--reuid={USER}",
            f"--regid={USER}",
            "--clear-groups",
            "env",
            "-i",
            f"HOME=/home/{USER}",
            "PATH=/usr/bin:/bin",
        ]
        return ["nsenter", f"--target={self.leader}", "--all", "--", *who, *argv]

    def ssh_argv(self, command: str) -> list[str]:
        """Return the words that log in over ssh, run a command, and log out."""
        settings = (
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            "LogLevel=ERROR",
            "BatchMode=yes",
        )
        options = [word for each in settings for word in ("-o", each)]
        key = f"/home/{USER}/.ssh/id"
        return self.user_argv("ssh", "-i", key, *options, f"{USER}@127.0.0.1", command)

    def user(self, *argv: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a command in the rig as the user, outside any session."""
        return _done(self.user_argv(*argv), stdin)

    def ssh(self, command: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Log in over ssh, run a command, log out."""
        return _done(self.ssh_argv(command), stdin)

    def sessions(self) -> list[str]:
        """Return the user's sessions that aren't logged out."""
        listed = self.root("loginctl", "--no-legend", "list-sessions").stdout.splitlines()
        states = {
            line.split()[0]: self.root("loginctl", "show-session", "-P", "State", line.split()[0])
            for line in listed
            if USER in line
        }
        # A session with processes left stays in state "closing" after the logout.
        return [
            each for each, shown in states.items() if shown.stdout.strip() not in ("closing", "")
        ]


def _done(argv: Sequence[str], stdin: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        argv, input=stdin, capture_output=True, text=True, check=False, timeout=BOOT_S
    )


def _ready(told: socket.socket, nspawn: subprocess.Popen[bytes]) -> bool:
    """Wait until the machine reports that it is up; return False if it ends or is late."""
    told.settimeout(0.2)
    deadline = time.monotonic() + BOOT_S
    while time.monotonic() < deadline and nspawn.poll() is None:
        with contextlib.suppress(TimeoutError):
            if b"READY=1" in told.recv(4096).splitlines():
                return True
    return False


@contextlib.contextmanager
def booted(files: Sequence[tuple[str, str]] = ()) -> Iterator[Rig]:
    """Boot a rig with `files` in its layer, and take it down afterwards."""
    base = Path(tempfile.mkdtemp(prefix="corra-rig-", dir="/dev/shm"))
    root = base / "root"
    root.mkdir()
    for each in ("up", "work"):
        (base / each).mkdir()
    subprocess.run(
        [
            "mount",
            "-t",
            "overlay",
            "corra-rig",
            "-o",
            f"lowerdir=/,upperdir={base}/up,workdir={base}/work",
            str(root),
        ],
        check=True,
    )
    ready = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    log = (base / "log").open("wb")
    nspawn = None
    try:
        for path, text in [("/etc/systemd/system/corra-rig.target", TARGET), *files]:
            at = root / path.lstrip("/")
            at.parent.mkdir(parents=True, exist_ok=True)
            at.write_text(text)
        ready.bind(str(base / "ready"))
        # Don't use the directory's name: it may contain a "_", and a host name may not.
        machine = f"corra-rig-{os.getpid()}"
        boot = [
            "--boot",
            "--private-network",
            "--notify-ready=yes",
            "--register=no",
            "--keep-unit",
            f"--machine={machine}",
        ]
        nspawn = subprocess.Popen(
            [
                "systemd-nspawn",
                "--quiet",
                f"--directory={root}",
                *boot,
                "systemd.unit=corra-rig.target",
            ],
            env={**os.environ, "NOTIFY_SOCKET": str(base / "ready")},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        if not _ready(ready, nspawn):
            pytest.fail(
                f"the machine didn't come up, and said:\n"
                f"{(base / 'log').read_text(errors='replace')}"
            )
        leader = int(Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()[0])
        rig = Rig(leader)
        made = rig.root("useradd", "--create-home", "--shell", "/bin/sh", USER)
        assert made.returncode == 0, made.stderr
        keys = rig.user(
            "sh",
            "-c",
            "cd; mkdir -m 700 .ssh; ssh-keygen -q -t ed25519 -N '' -f .ssh/id; cp "
            ".ssh/id.pub .ssh/authorized_keys",
        )
        assert keys.returncode == 0, keys.stderr
        yield rig
    finally:
        if nspawn is not None:
            nspawn.terminate()  # this stops the machine at once
            nspawn.wait(BOOT_S)
        ready.close()
        log.close()
        subprocess.run(["umount", "-l", str(root)], check=False)
        shutil.rmtree(base, ignore_errors=True)
