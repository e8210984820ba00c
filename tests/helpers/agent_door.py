"""The agent as a process of its own: a test speaks to it over pipes, with real files, processes and
signals.

Each `Door` has its own home and spool. The test process adopts every orphan; `sweep` ends what a
test left behind.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

import warm
from corra import agent
from corra.model.frames import Ack, Beat, ErrorFrame, Frame, Gap, Output, Parser, Status

if TYPE_CHECKING:
    from typing_extensions import Self

SOURCE = Path(agent.__file__)
DEADLINE_S = 20.0
# $CORRA_AGENT_PYTHON names another Python for all tests of the agent.
PYTHON = os.environ.get("CORRA_AGENT_PYTHON") or sys.executable
# Like place.py's loader, import the agent, so that Python uses its .pyc.
LOADER = (
    "import sys; sys.path.insert(0, {!r}); import agent; {}sys.exit(agent.main(sys.argv[1:], "
    "agent.Input(0), sys.stdout.buffer))"
)

# Code that comes before a late part's constant is changed: else the part would set it again.
LATE = "agent.late('verb_list'); "

_copies: dict[int, str] = {}
_compiled: set[tuple[int, str]] = set()


def copy_of_the_agent() -> str:
    """Return a directory with this process's copy of agent.py, so that an edit during a run of the
    tests changes nothing.
    """
    if os.getpid() not in _copies:
        at = tempfile.mkdtemp(prefix="corra-agent-", dir="/tmp")
        os.chmod(at, 0o755)
        shutil.copy(SOURCE, at)
        shutil.copy(SOURCE.parent / "on_host" / "courier.py", at)
        atexit.register(shutil.rmtree, at, ignore_errors=True)
        _copies[os.getpid()] = at
    return _copies[os.getpid()]


def compile_the_agent(python: str) -> None:
    """Write the copy's .pyc for `python`, as the first start on a host does, and that of the late
    parts. A user other than root couldn't write them later.
    """
    if (os.getpid(), python) not in _compiled:
        subprocess.run(
            [python, "-ISE", "-c", LOADER.format(copy_of_the_agent(), LATE + "sys.exit(); ")],
            check=True,
        )
        _compiled.add((os.getpid(), python))


class Refused(Exception):
    """The agent refused a request; `reply` says why."""

    def __init__(self, reply: Mapping[str, Any]) -> None:
        super().__init__(reply.get("message"))
        self.reply = reply
        self.kind = reply["error"]


class Door:
    """The agent on this machine: one Python, one user, one set of directories."""

    def __init__(
        self,
        base: Path,
        *,
        python: str = PYTHON,
        spool: Path | None = None,
        prefix: Sequence[str] = (),
        user: int | None = None,
        env: Mapping[str, str | None] | None = None,
        constants: str = "",
    ) -> None:
        self.base, self.python, self.prefix, self.user = base, python, list(prefix), user
        self.constants = (
            # Code that runs after the import, such as "agent.PING_DEADLINE_S = 1; ": a test can't
            # wait for a minute.
            constants
        )
        self.home = base / "home"
        self.home.mkdir(exist_ok=True, parents=True)
        compile_the_agent(python)
        self.spool = spool or base / "spool"
        given: dict[str, str | None] = {
            "HOME": str(self.home),
            "XDG_STATE_HOME": str(self.home / "state"),
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
        }
        given.update(env or {})
        self.env = {key: value for key, value in given.items() if value is not None}

    # ---- the process

    def argv(self, verb: str) -> list[str]:
        return [
            *self.prefix,
            self.python,
            "-ISE",
            "-c",
            LOADER.format(copy_of_the_agent(), self.constants),
            verb,
        ]

    def popen(self, verb: str, **how: Any) -> subprocess.Popen[bytes]:
        who = (
            {} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}
        )
        pipe = subprocess.PIPE
        return subprocess.Popen(
            self.argv(verb),
            bufsize=0,
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            env=self.env,
            cwd="/",
            **{**who, **how},
        )

    def encode(self, request: Mapping[str, Any], payload: bytes = b"") -> bytes:
        """Return a request as it goes over the wire. `"spool": None` asks for the default
        directories.
        """
        full = {"spool": str(self.spool), **request}
        data = json.dumps(
            {key: value for key, value in full.items() if not (key == "spool" and value is None)}
        ).encode()
        return b"%d\n" % len(data) + data + payload

    def raw(self, verb: str, stdin: bytes) -> tuple[int, bytes, bytes]:
        """Return (exit code, stdout, stderr)."""
        with self.popen(verb) as process:
            out, err = process.communicate(stdin, timeout=DEADLINE_S)
        return process.returncode, out, err

    def call(self, verb: str, request: Mapping[str, Any], payload: bytes = b"") -> dict[str, Any]:
        """Return the reply; of a verb with frames, its first reply. Raises Refused."""
        code, out, err = self.raw(verb, self.encode(request, payload))
        assert err == b"", err.decode()
        reply: dict[str, Any] = json.loads(out.splitlines()[0])
        if "error" in reply:
            assert code == 1
            raise Refused(reply)
        assert code == 0
        return reply

    # ---- the verbs

    def start(
        self,
        argv: Sequence[str],
        *,
        run: Mapping[str, Any] | None = None,
        prog_id: str | None = None,
        **program: Any,
    ) -> dict[str, Any]:
        return self.call("start", self.program(argv, run=run, prog_id=prog_id, **program))

    def ready(self, script: str, *words: str, **how: Any) -> dict[str, Any]:
        """Start `sh -c script` and wait until the script has printed "ready"."""
        state = self.start(["sh", "-c", script, *words], **how)
        with self.follow(state["prog_id"]) as follow:
            follow.until_output(b"ready")
        return state

    def program(
        self, argv: Sequence[str], *, run: Any = None, prog_id: str | None = None, **program: Any
    ) -> dict[str, Any]:
        whole = {"prog_id": prog_id, "program": {"argv": list(argv), **program}, "run": run}
        return {key: value for key, value in whole.items() if value is not None}

    def status(self, prog_id: str) -> dict[str, Any]:
        return self.call("status", {"prog_id": prog_id})

    def stop(self, prog_id: str, grace: float | None = None, **more: Any) -> dict[str, Any]:
        """Return the last frame of `stop` (state, ended, survivors); `first` is its first reply."""
        with self.open(
            "stop", {"prog_id": prog_id, "grace": grace, "by": "a@test", **more}
        ) as stream:
            stream.drain()
        return {**stream.states[-1], "first": stream.reply}

    def wait(self, prog_id: str) -> dict[str, Any]:
        """Return the final State."""
        with self.open("wait", {"prog_id": prog_id}) as stream:
            stream.drain()
        return stream.states[-1]

    def read(
        self, prog_id: str, stream: str = "stdout", start: int = 0, end: int | None = None
    ) -> bytes:
        code, out, err = self.raw(
            "read", self.encode({"prog_id": prog_id, "stream": stream, "start": start, "end": end})
        )
        assert (code, err) == (0, b""), (out, err)
        head, _, rest = out.partition(b"\n")
        reply = json.loads(head)
        assert len(rest) == reply["end"] - reply["start"]
        return rest

    def open(self, verb: str, request: Mapping[str, Any]) -> Stream:
        return Stream(self, verb, request)

    def follow(self, prog_id: str, **how: Any) -> Stream:
        return Stream(self, "follow", {"prog_id": prog_id, **how})

    # ---- the files

    def directory(self, prog_id: str) -> Path:
        return self.spool / "runs" / prog_id

    def file(self, prog_id: str, name: str = "stdout") -> bytes:
        return (self.directory(prog_id) / name).read_bytes()

    def record(self, prog_id: str) -> Any:
        return agent.Record.read(self.file(prog_id, "exit")[: agent.PAGE])


class Stream:
    """A verb that sends frames. The class checks that each stream's offsets have no hole and no
    overlap.
    """

    def __init__(self, door: Door, verb: str, request: Mapping[str, Any]) -> None:
        self.process = door.popen(verb)
        self.parser = Parser()
        self.reply: dict[str, Any] = {}
        self.frames: list[Frame] = []
        self.out: dict[str, bytearray] = {}
        self.at: dict[str, int] = {}
        self.states: list[dict[str, Any]] = []
        self.gaps: list[Gap] = []
        self.ended = False
        self.send(door.encode(request))
        head = b""
        while b"\n" not in head:
            data = self._some(DEADLINE_S)
            if not data:
                said = self.process.stderr.read()  # type: ignore[union-attr]
                raise AssertionError(f"no reply: {said!r}")
            head += data
        line, _, rest = head.partition(b"\n")
        self.reply = json.loads(line)
        self._take(rest)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, data: bytes) -> None:
        assert self.process.stdin
        while data:
            data = data[self.process.stdin.write(data) :]

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe
            pipe.close()
        self.process.wait(DEADLINE_S)
        assert self.process.stderr
        complaint = self.process.stderr.read()
        self.process.stderr.close()
        assert complaint == b"", complaint.decode()

    def _some(self, timeout_s: float) -> bytes:
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], max(0.0, timeout_s))[0]:
            raise TimeoutError("the agent was silent")
        return os.read(self.process.stdout.fileno(), 1 << 18)

    def _take(self, data: bytes) -> None:
        for frame in self.parser.feed(data):
            self.frames.append(frame)
            if isinstance(frame, Output):
                expected = self.at.get(frame.stream)
                assert expected in {None, frame.offset}, (
                    f"{frame.stream}: {frame.offset} after {expected}"
                )
                self.out.setdefault(frame.stream, bytearray()).extend(frame.data)
                self.at[frame.stream] = frame.end
            elif isinstance(frame, Status):
                self.states.append(dict(frame.state))
            elif isinstance(frame, Gap):
                self.gaps.append(frame)
                self.at[frame.stream] = frame.end
            elif isinstance(frame, ErrorFrame):
                raise Refused(frame.error)

    def until(self, seen: Callable[[Stream], bool], timeout_s: float = DEADLINE_S) -> Stream:
        """Read until `seen` returns true. Raises TimeoutError, EOFError."""
        deadline = time.monotonic() + timeout_s
        while not seen(self):
            data = self._some(deadline - time.monotonic())
            if not data:
                raise EOFError(f"the agent left: {self.frames[-3:]}")
            self._take(data)
        return self

    def drain(self, timeout_s: float = DEADLINE_S) -> Stream:
        """Read to the end of the stream."""
        deadline = time.monotonic() + timeout_s
        while True:
            data = self._some(deadline - time.monotonic())
            if not data:
                assert not self.parser.pending
                self.ended = True
                return self
            self._take(data)

    def stdout(self) -> bytes:
        return bytes(self.out.get("stdout", b""))

    def until_output(self, part: bytes, stream: str = "stdout") -> Stream:
        return self.until(lambda each: part in each.out.get(stream, b""))

    def acked(self, number: int) -> bool:
        return Ack(number) in self.frames

    def beats(self) -> int:
        return sum(isinstance(frame, Beat) for frame in self.frames)


# ---- processes


def adopt() -> None:
    """Become the parent of every orphan that this process's descendants leave behind."""
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


def descendants() -> dict[int, Any]:
    """Return {pid: what the agent reads of the process} for all live processes below this one,
    except the servers that fork.

    agent.process_tree does the same on a host, but it must look at every process of the machine.
    """
    found: dict[int, Any] = {}
    todo = [os.getpid()]
    while todo:
        for pid in _children(todo.pop()):
            each = agent.process(pid)
            if each and each[0] not in "ZX" and pid not in found and pid not in warm.servers():
                found[pid] = each
                todo.append(pid)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, Path(f"/proc/{pid}/task/{thread}/children").read_text().split())
    return found


def children() -> set[int]:
    """Return the pids of all live processes below this one."""
    return set(descendants())


def sweep(spared: set[int]) -> list[str]:
    """Kill and reap what a test left, except the `spared`; return the names of those processes."""
    found = {pid: each for pid, each in descendants().items() if pid not in spared}
    for _ in range(100):
        left = {pid: each for pid, each in descendants().items() if pid not in spared}
        for pid, each in left.items():
            agent.signal_process(pid, each[2], signal.SIGKILL)
        reap(spared)
        if not left:
            break
        time.sleep(0.002)
    return [each[3] for each in found.values()]


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """On leaving, end every process that was started inside the block and still runs."""
    adopt()
    before = children()
    try:
        yield
    finally:
        sweep(before)


def reap(spared: set[int]) -> None:
    for pid in _children(os.getpid()):
        if pid not in spared:
            found = agent.process(pid)
            if found and found[:2] == ("Z", os.getpid()):
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, os.WNOHANG)


def alive(pid: int) -> bool:
    found = agent.process(pid)
    return found is not None and found[0] not in "ZX"


def kill(*pids: int, number: int = signal.SIGKILL) -> None:
    for pid in pids:
        os.kill(pid, number)


def gone(*pids: int, timeout_s: float = DEADLINE_S) -> None:
    """Wait until none of the processes lives."""
    eventually(lambda: not any(alive(pid) for pid in pids), f"{pids} to be gone", timeout_s)


def guards(state: Mapping[str, Any]) -> list[int]:
    """Return the run's guards, the outermost first."""
    return [*state["standby_pids"], state["agent_pid"]]


def eventually(check: Callable[[], Any], what: str = "", timeout_s: float = DEADLINE_S) -> Any:
    """Return the first true answer of `check`. Use it for a change that sends no event."""
    deadline = time.monotonic() + timeout_s
    while True:
        answer = check()
        if answer:
            return answer
        if time.monotonic() > deadline:
            _timed_out(what or getattr(check, "__name__", "it"))
        time.sleep(0.004)


def _timed_out(what: str) -> NoReturn:
    raise TimeoutError(f"waited in vain for {what}")


def lines_of(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


class Gate:
    """A FIFO on which a program waits for the test: `read a < "$0"`."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(path)
        # The test keeps a writer open: opening the FIFO then never blocks, and the program sees no
        # early end of file.
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def open(self, times: int = 1) -> None:
        os.write(self._fd, b"\n" * times)

    def close(self) -> None:
        os.close(self._fd)


class Mount:
    """A small tmpfs."""

    def __init__(self, at: Path, options: str) -> None:
        self.at = at
        at.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "none", str(at)],
            check=True,
            capture_output=True,
        )

    def free(self) -> int:
        disk = os.statvfs(self.at)
        return disk.f_bavail * disk.f_frsize

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.at)], check=True, capture_output=True)


def fresh(tmp: Path, **how: Any) -> Iterator[Door]:
    """Yield a Door; afterwards end whatever it started."""
    with nothing_left():
        yield Door(tmp, **how)


@pytest.fixture
def door(tmp_path: Path, python: str) -> Iterator[Door]:
    yield from fresh(tmp_path, python=python)


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    """A Gate beside the door's home."""
    made = Gate(tmp_path / "gate")
    yield made
    made.close()
