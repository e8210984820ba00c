"""corra's command line, `inv`, `fab` and the collector in processes forked from a server that has
imported corra.

`python -m corra` takes 0.2 s of imports, and the tests start a thousand of them. A forked process
is as much a process of its own: it has its own words, environment, directory, descriptors, session
and signals, runs the program's `main`, ends as Python ends, and is the child of the test. Only the
tests of corra's start pay for a cold start.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import gc
import importlib
import inspect
import json
import operator
import os
import platform
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
_HEAD = struct.Struct("!I")
# With this flag the server makes its child a child of the server's parent, so that the test waits
# for it as for any other process.
_CLONE_PARENT = 0x8000
_CLONE = {"x86_64": 56, "aarch64": 220}.get(platform.machine())
# Variables that an interpreter reads before it runs any code.
_STARTS_DIFFERENTLY = ("PYTHON", "LC_", "LANG")
_CLIENT = (
    "corra.main",
    "corra.terminal.watch",
    "corra.terminal.filters",
    "corra.collector.client",
    "corra.cli.collectors",
    "corra.cli.journals",
    "corra.runbooks.runbook",
    "corra.remote.checkup",
    *("fabric", "rich.console", "rich.live", "rich.table"),
)
# For each program: its argv[0], its `main`, and the modules that its server imports.
_PROGRAMS = {
    "corra": (str(ROOT / "corra" / "__main__.py"), "corra.__main__:main", _CLIENT),
    "inv": ("inv", "invoke.main:program.run", _CLIENT),
    "fab": ("fab", "fabric.main:program.run", _CLIENT),
    "collector": (
        str(ROOT / "corra" / "__main__.py"),
        "corra.__main__:main",
        (
            "corra.main",
            "corra.collector.serve",
            "alembic.command",
            "uvicorn.protocols.http.httptools_impl",
            "uvloop",
        ),
    ),
}


def differs(env: Mapping[str, str]) -> bool:
    """Return whether this environment would change the interpreter itself, so that the server that
    imported corra can't stand in for it.
    """
    return _CLONE is None or any(name.startswith(_STARTS_DIFFERENTLY) for name in env)


class Warm(subprocess.Popen[bytes]):
    """A Popen of one of the programs; `args` are its words without the program's name. With
    `terminal`, the process leads a session whose terminal is its stdin.
    """

    def __init__(
        self,
        words: Sequence[str | bytes],
        *,
        program: str = "corra",
        terminal: bool = False,
        **how: Any,
    ) -> None:
        self._program, self._terminal = program, terminal
        super().__init__(words, **how)

    def _execute_child(self, *given: Any) -> None:
        how = inspect.signature(super()._execute_child).bind(*given).arguments  # type: ignore[misc]
        fds = [how["p2cread"], how["c2pwrite"], how["errwrite"]]
        order = {
            "program": self._program,
            "words": [os.fsdecode(each) for each in how["args"]],
            "env": {
                os.fsdecode(name): os.fsdecode(value)
                for name, value in (how["env"] or os.environ).items()
            },
            "cwd": os.fspath(how["cwd"] or os.getcwd()),
            "session": how["start_new_session"] or self._terminal,
            "terminal": self._terminal,
        }
        self.pid = _forked(order, [own if fd == -1 else fd for own, fd in enumerate(fds)])
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(how[each] for each in ends))  # type: ignore[attr-defined]


def run(
    *words: str, program: str, cwd: Path, env: Mapping[str, str] | None = None, timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, without stdin. `env` is added to this process's environment."""
    pipe = subprocess.PIPE
    whole = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    with Warm(
        words,
        program=program,
        cwd=cwd,
        env=whole,
        stdin=subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(words, process.returncode, out.decode(), err.decode())


# ---- asking

# By the modules that they have imported.
_servers: dict[tuple[str, ...], tuple[subprocess.Popen[bytes], socket.socket]] = {}
_asking = threading.Lock()


@atexit.register
def _end() -> None:
    while _servers:
        _left(*_servers.popitem()[1])


def _left(process: subprocess.Popen[bytes], door: socket.socket) -> None:
    door.close()
    process.kill()
    process.wait()


def servers() -> set[int]:
    """Return the pids of the servers, which stay for every test."""
    return {process.pid for process, _ in _servers.values()}


def _forked(order: Mapping[str, Any], fds: list[int]) -> int:
    """Return the pid of a new process. A server that a test has killed is replaced."""
    text = json.dumps(order).encode()
    imported = _PROGRAMS[order["program"]][2]
    with _asking:
        for _ in range(3):
            if imported not in _servers:
                _servers[imported] = _opened(imported)
            _, door = _servers[imported]
            with contextlib.suppress(OSError):
                socket.send_fds(door, [_HEAD.pack(len(text))], fds)
                door.sendall(text)
                if answer := door.recv(_HEAD.size, socket.MSG_WAITALL):
                    pid: int = _HEAD.unpack(answer)[0]
                    return pid
            _left(*_servers.pop(imported))
    raise RuntimeError("no server that forks")


def _opened(imported: Sequence[str]) -> tuple[subprocess.Popen[bytes], socket.socket]:
    ours, theirs = socket.socketpair()
    with theirs:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        argv = [sys.executable, __file__, str(theirs.fileno()), *imported]
        process = subprocess.Popen(
            argv,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**env, "PYTHONPATH": str(ROOT)},
            cwd="/",
        )
    return process, ours


# ---- being asked


def _serve(door: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork for each order until the test process leaves. Return in each child, with its order and
    its descriptors.
    """
    while True:
        head, fds, _, _ = socket.recv_fds(door, _HEAD.size, 3)
        if not head:
            os._exit(0)
        order: dict[str, Any] = json.loads(door.recv(_HEAD.unpack(head)[0], socket.MSG_WAITALL))
        pid = _fork()
        if pid == 0:
            door.close()
            return order, fds
        for fd in fds:
            os.close(fd)
        door.sendall(_HEAD.pack(pid))


def _fork() -> int:
    """Fork as os.fork does, but make the child a child of this process's parent."""
    ctypes.pythonapi.PyOS_BeforeFork()
    pid = int(_syscall(_CLONE, _CLONE_PARENT | signal.SIGCHLD, 0, 0, 0, 0))
    if pid == 0:
        ctypes.pythonapi.PyOS_AfterFork_Child()
    else:
        ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid


# PyDLL keeps the GIL: no other thread may run in between.
_syscall = ctypes.PyDLL(None).syscall


def _become(order: Mapping[str, Any], fds: list[int]) -> None:
    """Turn this process into what an exec would have made of it."""
    if order["session"]:
        os.setsid()
    for own, fd in enumerate(fds):
        os.dup2(fd, own)
    for fd in set(fds) - {0, 1, 2}:
        os.close(fd)
    if order["terminal"]:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.path[0] = order["cwd"]
    sys.argv = [_PROGRAMS[order["program"]][0], *order["words"]]
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    sys.stdin = sys.__stdin__ = open(  # type: ignore[misc] # noqa: SIM115
        0, encoding=encoding, errors=errors, closefd=False
    )
    sys.stdout = sys.__stdout__ = open(  # type: ignore[misc] # noqa: SIM115
        1, "w", encoding=encoding, errors=errors, closefd=False
    )
    sys.stderr = sys.__stderr__ = open(  # type: ignore[misc] # noqa: SIM115
        2, "w", 1, encoding, "backslashreplace", closefd=False
    )


def _leave(end: SystemExit) -> None:
    """Do what Python does at its end, but for the freeing of all that was imported, which takes
    20 ms in a forked process. Return where Python would have something to say.
    """
    code = 0 if end.code is None else end.code
    if not isinstance(code, int):
        return
    threading._shutdown()  # type: ignore[attr-defined] # joins threads
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except (OSError, ValueError):
        return
    os._exit(code & 0xFF)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        importlib.import_module(each)
    gc.freeze()
    given, ends = _serve(socket.socket(fileno=int(sys.argv[1])))
    _become(given, ends)
    module, _, name = _PROGRAMS[given["program"]][1].partition(":")
    end = SystemExit()
    try:
        operator.attrgetter(name)(importlib.import_module(module))()
    except SystemExit as raised:
        end = raised
    _leave(end)
    raise end
