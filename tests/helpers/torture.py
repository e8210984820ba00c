"""Torture: programs that write known bytes or pass on what they are sent, and faults at random
moments.

A case follows from its seed alone: what the program writes, what it is sent over which kind of
stdin, how it ends, which fault hits when. Afterwards the case checks the invariants: every byte
once and in order, the program executed once, the right status, and no process, lock or file left
over. A seed repeats the schedule, not always the race.

Bytes that a killed client hadn't sent are lost with it. The next client sends what the host hasn't
accepted, once no process on the host can accept more of the dead client's bytes.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import errno
import fcntl
import itertools
import json
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from corra import agent as host_agent
from corra.model.frames import Cursor, Gap, Output, Parser, Status, Taken
from properties import contradictions
from sshd import QUICKLY, Sshd
from warm import Warm

AGENT = Path(host_agent.__file__)
DEADLINE_S = 30.0
# Like the loader on a host, with a .pyc beside the file. Placed, the guards are forked; by hand,
# they are a fresh interpreter.
PLACED = (
    "import sys; sys.path.insert(0, sys.argv[1]); import agent; "
    "sys.exit(agent.main(sys.argv[2:], agent.Input(0), sys.stdout.buffer))"
)


def agent_argv(python: str, agent: Path, *, by_hand: bool) -> list[str]:
    """Return the words that run this agent."""
    return (
        [python, "-ISE", str(agent)]
        if by_hand
        else [python, "-ISE", "-c", PLACED, str(agent.parent)]
    )


def place(agent: Path, root: Path, python: str) -> Path:
    """Copy the agent into `root` and write its .pyc, as on a host. With a copy, a run of an hour
    uses one agent throughout.
    """
    copy = Path(shutil.copy(agent, root))
    subprocess.run(
        [python, "-ISE", "-c", "import sys; sys.path.insert(0, sys.argv[1]); import agent", root],
        check=True,
    )
    return copy


# The program writes its chunks, each to its stream after its pause, and ends as its arguments say.
# Standard library only, Python 3.6 or later.
PROGRAM = """
import os, signal, sys, time
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), b"x")
seed, chunks, end = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
import random
r = random.Random(seed)
for _ in range(chunks):
    fd, size = r.choice((1, 1, 2)), int(r.paretovariate(0.7) * 20) % 60000
    pause = r.random() ** 4 * 0.03
    data = bytes(r.randrange(256) for _ in range(64)) * (size // 64 + 1)
    data = data[:size]
    while data:
        data = data[os.write(fd, data):]
    time.sleep(pause)
if end < 0:
    os.kill(os.getpid(), -end)
os._exit(end)
"""


# The program prints "R" once it is ready (on a terminal: raw), passes on its stdin to the end in
# pieces of its own, and ends as its arguments say.
ECHO = """
import os, signal, sys, time
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), b"x")
seed, size, end = int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
import random, tty
r = random.Random(seed)
if os.isatty(0):
    tty.setraw(0)
os.write(1, b"R")
while size or not os.isatty(0):
    most = int(r.paretovariate(0.7) * 20) % 60000 + 1
    # The end of a terminal's input is a byte, too, and not part of what is passed on.
    data = os.read(0, min(most, size) if os.isatty(0) else most)
    if not data:
        break
    size -= len(data)
    time.sleep(r.random() ** 6 * 0.02)
    while data:
        data = data[os.write(1, data):]
if end < 0:
    os.kill(os.getpid(), -end)
os._exit(end)
"""

KINDS = ("written", "written", "sent", "typed")


def sent(seed: int, chunks: int) -> list[bytes]:
    """Return the pieces that ECHO is sent."""
    r = random.Random(seed + 1)
    sizes = [int(r.paretovariate(0.7) * 20) % 60000 + 1 for _ in range(chunks)]
    return [
        (bytes(r.randrange(256) for _ in range(64)) * (size // 64 + 1))[:size] for size in sizes
    ]


def written(seed: int, chunks: int) -> dict[str, bytes]:
    """Return what PROGRAM writes, by stream."""
    r = random.Random(seed)
    out = {"stdout": bytearray(), "stderr": bytearray()}
    for _ in range(chunks):
        fd, size, _ = (
            r.choice((1, 1, 2)),
            int(r.paretovariate(0.7) * 20) % 60000,
            r.random() ** 4 * 0.03,
        )
        data = bytes(r.randrange(256) for _ in range(64)) * (size // 64 + 1)
        out["stdout" if fd == 1 else "stderr"] += data[:size]
    return {name: bytes(data) for name, data in out.items()}


# `together`: at most two of the three guards, the link and the client. `kept`: two guards and the
# client, with the chaperone. `link`: the chaperone's link is cut.
FAULTS = (
    "none",
    "one",
    "one",
    "two",
    "two",
    "three",
    "follow",
    "stop",
    "starter",
    "full",
    "session",
    "inv",
    "together",
    "kept",
    "link",
)
OVER_SSH = ("session", "inv", "together", "kept", "link")
KEPT_HERE = ("kept", "link")


class Place:
    """The place for faults of a link: a private sshd, and a home from which `corra` runs."""

    def __init__(self, root: Path) -> None:
        home = root / "home"
        home.mkdir()
        names = {
            "XDG_STATE_HOME": home / "state",
            "XDG_CACHE_HOME": home / "cache",
            "XDG_CONFIG_HOME": home / "config",
            "HOME": home,
        }
        own = {name: str(path) for name, path in names.items()}
        self.sshd = Sshd(
            root / "sshd", environment={**own, "PATH": os.environ["PATH"]}, options=QUICKLY
        ).start()
        here = str(Path(host_agent.__file__).parent.parent)
        self.environment = {
            **os.environ,
            **own,
            "CORRA_SSH_CONFIG": str(self.sshd.ssh_config),
            "PYTHONPATH": here,
        }

    def client(self, case: Case) -> subprocess.Popen[bytes]:
        """Start `corra run` for the case's program. Every call names the same run."""
        told = [
            "run",
            "-q",
            "--host",
            "h",
            "--id",
            case.prog_id,
            "--spool",
            str(case.spool),
            "--cwd",
            "/",
        ]
        told += (
            ["--via", "chaperone"]
            if case.kept_here
            else {"written": [], "sent": ["-i"], "typed": ["-i", "--pty"]}[case.kind]
        )
        return started(
            [*told, "--", *case.argv()],
            Warm,
            stdin=subprocess.DEVNULL if case.kind == "written" else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # With a buffer, closing the pipe would write once more what a dead client didn't take.
            bufsize=0,
            env=self.environment,
        )

    def session(self, case: Case) -> int:
        """Return the sshd process that carries the case's link, or 0.

        It is the ancestor of the host's side of the link: the process that has the spool open, or
        with the chaperone the program itself.
        """
        listener = self.sshd.pid
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                pid = int(entry.name)
                if case.kept_here:
                    if str(case.executed).encode() not in (entry / "cmdline").read_bytes().split(
                        b"\0"
                    ):
                        continue
                elif not any(
                    os.readlink(fd).startswith(f"{case.spool}/") for fd in (entry / "fd").iterdir()
                ):
                    continue
                while pid > 1:
                    found = host_agent.process(pid)
                    if found is None:
                        break
                    if found[1] == listener:
                        return pid
                    pid = found[1]
        return 0


@dataclass
class Case:
    """One run under one fault, all made from `seed`."""

    seed: int
    root: Path
    python: str = sys.executable
    only: str | None = None
    place: Place | None = None
    violations: list[str] = field(default_factory=list)
    lost: bool = False
    kills: int = 0  # guards killed
    cuts: int = 0  # links cut
    clients: int = 0  # clients killed
    resumed: int = 0  # clients that went on in the middle of stdin

    def __post_init__(self) -> None:
        r = random.Random(self.seed)
        self.fault = self.only or r.choice(FAULTS)
        self.over_ssh, self.kept_here = self.fault in OVER_SSH, self.fault in KEPT_HERE
        self.chunks = r.randint(1, 40) + (
            40 if self.fault == "together" else 0
        )  # `together` needs time for all its faults
        self.end = r.choice((0, 0, 1, 7, 255, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGSEGV))
        self.moments = [r.random() ** r.choice((2, 6)) * 0.1 for _ in range(3)]
        self.victims = r.sample(range(3), 3)
        self.by_hand = r.random() < 0.25
        self.prog_id = f"torture-{self.seed}"
        self.spool = self.root / f"s{self.seed}"
        self.mark = f"{self.root.name}-{self.seed}"
        self.executed = self.root / f"x{self.seed}"
        self.path = self.spool / "runs" / self.prog_id
        self.kind = r.choice(KINDS)
        if self.kept_here:
            self.kind = "written"  # the chaperone holds no stdin open
        self.strikes = ["link", "client", *["guard"] * r.choice((1, 2, 2))]
        r.shuffle(self.strikes)
        self.pauses = [r.random() ** r.choice((2, 6)) * 0.1 for _ in self.strikes]
        self.amid = (
            r.random() < 0.7
        )  # The client is killed once bytes flow, and not at any moment of its start.
        self.ahead = r.choice((1, 1, 2, 40))  # how many pieces are sent before they come back
        pieces = sent(self.seed, self.chunks) if self.kind != "written" else []
        self.to_send, self.ends = b"".join(pieces), [0, *itertools.accumulate(map(len, pieces))]
        self.accepted = 0
        self.ended_there = False
        self.bytes: dict[str, bytearray] = {name: bytearray() for name in self.expected()}
        self.cursor = Cursor()
        self.state: dict[str, object] = {}
        self.heard: subprocess.Popen[bytes] | None = None  # the last client that showed a byte
        self.over = threading.Event()

    # -------------------------------------------------------- driving

    def argv(self) -> list[str]:
        program, amount = (
            (PROGRAM, self.chunks) if self.kind == "written" else (ECHO, len(self.to_send))
        )
        return [
            sys.executable,
            "-ISE",
            "-c",
            program,
            str(self.executed),
            str(self.seed),
            str(amount),
            str(self.end),
        ]

    def expected(self) -> dict[str, bytes]:
        """Return the whole output that the program's streams must hold."""
        match self.kind:
            case "written":
                return written(self.seed, self.chunks)
            case "sent":
                return {"stdout": b"R" + self.to_send, "stderr": b""}
        return {"output": b"R" + self.to_send}

    def request(self, **more: object) -> bytes:
        kinds: dict[str, dict[str, object]] = {
            "written": {},
            "sent": {"stdin": {"open": True}},
            "typed": {"pty": True},
        }
        how = kinds[self.kind]
        program = {"argv": self.argv(), "cwd": "/", **how}
        sender = {"sender": 1 + self.seed} if how else {}
        core = {
            "prog_id": self.prog_id,
            "nonce": "n",
            "spool": str(self.spool),
            "program": program,
            **sender,
            **more,
        }
        text = json.dumps(core).encode()
        return b"%d\n" % len(text) + text

    def open(self, verb: str) -> subprocess.Popen[bytes]:
        process = started(
            [*agent_argv(self.python, AGENT, by_hand=self.by_hand), verb],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "TORTURE": self.mark},
        )
        assert process.stdin
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self.request(cursor=self.cursor.offsets))
            process.stdin.flush()
        return process

    def watch(self) -> None:
        """Start and follow, again and again, until the last State, as a client does."""
        if self.over_ssh:
            self.watch_over_ssh()
            return
        deadline = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline:
            process = self.process = self.open("run")
            try:
                if self.read(process, deadline):
                    return
            finally:
                process.kill()
                process.wait()
                for pipe in (process.stdin, process.stdout):
                    with contextlib.suppress(BrokenPipeError):
                        pipe and pipe.close()
        self.violations.append("no final State in time")

    def watch_over_ssh(self) -> None:
        """Let `corra run` start and follow. After a kill, run the same command again and send the
        bytes that the host hasn't accepted.
        """
        assert self.place
        for _ in range(1 + len(self.moments)):
            with self.place.client(self) as self.process:
                out, err = self.talk(self.process, self.accepted)
                code = self.process.wait(4 * DEADLINE_S)
            if code != -signal.SIGKILL or self.violations:
                break
            shown = self.expected()["output" if self.kind == "typed" else "stdout"]
            if not shown.startswith(out):
                self.violations.append(
                    f"a client showed {len(out)} bytes, which the output doesn't begin with: "
                    f"..{out[-200:]!r}"
                )
            self.accepted = self.accepted_there()
            self.resumed += 0 < self.accepted < len(self.to_send)
        if self.path.exists():
            run = host_agent.Run(str(self.spool), self.prog_id)
            self.see(run.state())
            run.close()
        expected = 128 - self.end if self.end < 0 else self.end
        if code != (123 if self.state.get("state") == "lost" else expected):
            self.violations.append(
                f"corra exited with {code}, not {expected}: {err[-300:].decode(errors='replace')}"
            )
        self.bytes["output" if self.kind == "typed" else "stdout"] += out
        # Behind the program's own stderr, corra says how a run ended that didn't end well, on lines
        # of its own.
        own = re.sub(rb"corra: torture-\d+ on h: [A-Z][^\n]*\n( {7}[^\n]*\n)*\Z", b"", err)
        if own != err and not self.expected().get("stderr", b"\n").endswith(b"\n"):
            own = own.removesuffix(b"\n")  # the program's last line had no newline
        if "stderr" in self.bytes:
            self.bytes["stderr"] += own

    def talk(self, client: subprocess.Popen[bytes], at: int) -> tuple[bytes, bytes]:
        """Send the client stdin from `at` on, piece by piece as the echo comes back, and then its
        end; return what the client shows.
        """
        assert client.stdout and client.stderr
        shown: dict[Any, bytearray] = {client.stdout: bytearray(), client.stderr: bytearray()}
        pipes = list(shown)
        while pipes:
            ready = select.select(pipes, [], [], 4 * DEADLINE_S)[0]
            if not ready:
                self.violations.append("a client that shows nothing and doesn't end")
                client.kill()
            for pipe in ready:
                data = os.read(pipe.fileno(), 1 << 16)
                shown[pipe] += data
                if not data:
                    pipes.remove(pipe)
            # Send nothing before the first byte comes: until then the terminal isn't raw and would
            # echo it.
            if back := len(shown[client.stdout]):
                self.heard = client
                at = self.pass_on(client, at, back - 1)
        return bytes(shown[client.stdout]), bytes(shown[client.stderr])

    def pass_on(self, client: subprocess.Popen[bytes], at: int, back: int) -> int:
        """Send the pieces from `at` on that may be ahead of the `back` bytes that came back; behind
        the last piece, close stdin.
        """
        if client.stdin is None or client.stdin.closed:
            return at
        most = self.ends[
            min(len(self.ends) - 1, bisect.bisect_right(self.ends, back) - 1 + self.ahead)
        ]
        with contextlib.suppress(BrokenPipeError):
            if most > at:
                client.stdin.write(self.to_send[at:most])
            if most == len(self.to_send):
                client.stdin.close()
        return max(at, most)

    def accepted_there(self) -> int:
        """Return how much of stdin the host has accepted, once no process there can accept more of
        a dead client's bytes.
        """
        deadline = time.monotonic() + DEADLINE_S
        while self.locked("index"):  # the dead client's follow holds this lock
            if time.monotonic() > deadline:
                self.violations.append("a dead client's follow is still there")
                break
            time.sleep(0.002)
        if self.kind == "written" or not self.path.exists():
            return 0
        run = host_agent.Run(str(self.spool), self.prog_id)
        accepted = int(run.state()["stdin"]["length"])
        run.close()
        return min(accepted, len(self.to_send))  # on a terminal the end of stdin is a byte, too

    def read(self, process: subprocess.Popen[bytes], deadline: float) -> bool:
        """Read one follow's frames; return whether the last one was a final State."""
        assert process.stdout
        head, parser = b"", Parser()
        self.ended_there = False
        fd = process.stdout.fileno()
        while True:
            if not select.select([fd], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return False
            data = os.read(fd, 1 << 16)
            if not data:
                break
            if head.count(b"\n") < 2:
                head += data
                if head.count(b"\n") < 2:
                    continue
                nonce, first, data = head.split(b"\n", 2)
                head = b"\n\n"
                assert nonce == b"corra 1 n", nonce
                self.see(json.loads(first))
            for frame in parser.feed(data):
                if isinstance(frame, Output):
                    for part in self.cursor.take(frame):
                        if isinstance(part, Gap):
                            self.violations.append(f"a hole: {part}")
                        else:
                            begins = not any(self.bytes.values())
                            self.bytes[part.stream] += part.data
                            if begins and self.kind != "written":
                                self.send(process)
                elif isinstance(frame, Taken):
                    self.accepted = frame.offset
                    self.ended_there = frame.ended
                    self.send(process)
                elif isinstance(frame, Gap):
                    self.cursor.offsets[frame.stream] = frame.end
                    self.violations.append(f"a gap: {frame}") if self.fault != "three" else None
                elif isinstance(frame, Status):
                    self.see(dict(frame.state))
        return self.state.get("state") in host_agent.FINAL

    def send(self, process: subprocess.Popen[bytes]) -> None:
        """Send the next piece behind what the host has accepted, and a part of that again; behind
        the last piece, send the end.
        """
        assert process.stdin
        if self.ended_there or not self.bytes["output" if self.kind == "typed" else "stdout"]:
            return
        at = max(0, self.accepted - self.seed % 100)
        end = next((each for each in self.ends if each > self.accepted), len(self.to_send))
        data = self.to_send[at:end]
        frames = b"I %d %d\n%s" % (at, len(data), data) if data else b""
        if end == len(self.to_send) and self.kind == "sent":
            frames += b"E %d\n" % len(self.to_send)
        if self.accepted == len(self.to_send) and self.kind == "typed":
            return
        with contextlib.suppress(OSError):
            process.stdin.write(frames)
            process.stdin.flush()

    def see(self, state: dict[str, object]) -> None:
        before, now = self.state.get("state"), state.get("state")
        if before in host_agent.FINAL and now != before:
            self.violations.append(f"a final state changed: {before} -> {now}")
        if before and now != before and now not in host_agent.TRANSITIONS[str(before)]:
            self.violations.append(f"not a transition: {before} -> {now}")
        self.state = state

    # -------------------------------------------------------- faults

    def guards(self) -> list[int]:
        """Return this run's guards, outermost first. They come from the record, or from the
        processes' environment while there is no record.
        """
        with contextlib.suppress(OSError):
            record = host_agent.Record.read((self.path / "exit").read_bytes()[: host_agent.PAGE])
            if record and record.guards:
                return [pid for pid, _ in record.guards if self.is_guard(pid)]
        if self.over_ssh:
            return []
        return sorted(
            int(p.name)
            for p in Path("/proc").iterdir()
            if p.name.isdigit() and self.is_guard(int(p.name))
        )

    def is_guard(self, pid: int) -> bool:
        try:
            ours = (
                self.over_ssh
                or f"TORTURE={self.mark}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
            )
            found = host_agent.process(pid)
            # Until its exec the program is called corra-keeper too. Only the program and the
            # outermost guard lead a session.
            leads = os.getsid(pid) == pid and found is not None and found[3] == "corra-keeper"
            return (
                ours
                and found is not None
                and found[0] != "Z"
                and found[3].startswith("corra-")
                and not leads
            )
        except OSError:
            return False

    def strike(self) -> None:
        """Do the fault at its moments, counted from the guards' start; if the starter is the
        victim, from now.
        """
        if self.fault not in ("starter", "full", "follow", "inv"):
            self.await_(self.guards)
        began = time.monotonic()
        wait = lambda moment: self.over.wait(  # noqa: E731
            max(0.0, began + moment - time.monotonic())
        )
        match self.fault:
            case "one" | "two" | "three":
                for moment in sorted(self.moments[: {"one": 1, "two": 2, "three": 3}[self.fault]]):
                    wait(moment)
                    self.kill(self.guards())
            case "follow":
                for moment in sorted(self.moments):
                    wait(moment)
                    self.process.kill()
            case "starter":
                wait(self.moments[0])
                self.process.kill()
            case "kept":
                wait(self.moments[0])
                self.kill_client()
                for moment in sorted(self.moments[1:]):
                    wait(moment * 4)
                    self.kill(self.guards())
            case "link":
                self.await_(self.executed.exists)
                began = time.monotonic()
                wait(self.moments[0])
                self.cut()
            case "inv":
                for moment in sorted(self.moments):
                    if self.amid:
                        self.await_(self.flows)
                        self.over.wait(moment)
                    else:
                        wait(moment * 10)  # a whole client takes longer to reach its point
                    self.kill_client()
            case "together":
                for strike, pause in zip(self.strikes, self.pauses, strict=True):
                    if self.amid or strike == "link":
                        self.await_(self.flows)
                    self.over.wait(pause)
                    {
                        "guard": lambda: self.kill(self.guards()),
                        "link": self.cut,
                        "client": self.kill_client,
                    }[strike]()
            case "session":
                for moment in sorted(self.moments):
                    wait(moment)
                    self.cut()
            case "stop":
                wait(self.moments[0])
                for pid in self.guards()[:2]:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGSTOP)
                        self.over.wait(self.moments[1])
                        os.kill(pid, signal.SIGCONT)
            case "full":
                wait(self.moments[0])
                self.fill_disk()

    def await_(self, happens: Callable[[], object]) -> None:
        """Wait until `happens` returns true, or until the case is over."""
        while not happens() and not self.over.wait(0.001):
            pass

    def flows(self) -> bool:
        """Return whether the current client has shown a byte."""
        return self.heard is self.process and self.process.poll() is None

    def kill_client(self) -> None:
        """Kill the current client and wait until it is dead."""
        client = self.process
        self.clients += client.poll() is None
        client.kill()
        client.wait()

    def cut(self) -> None:
        """Kill the sshd process that carries the link."""
        assert self.place
        if victim := self.place.session(self):
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                self.cuts += 1

    def kill(self, guards: list[int]) -> None:
        if guards:
            victim = guards[self.victims[self.kills] % len(guards)]
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                self.kills += 1

    def fill_disk(self) -> None:
        """Fill the spool's own small disk to the last byte, for a while."""
        hog = self.spool / "hog"
        with contextlib.suppress(FileNotFoundError), open(hog, "wb", 0) as file:
            with contextlib.suppress(OSError):
                while file.write(b"\0" * 65536):
                    pass
            with contextlib.suppress(OSError):
                while file.write(b"\0" * 512):
                    pass
            self.over.wait(0.3 + self.moments[1])
            os.unlink(hog)

    # -------------------------------------------------------- judging

    def go(self) -> Case:
        with self.disk():
            striker = threading.Thread(target=self.strike)
            parser = threading.Thread(target=self.keep_reading)
            self.spool.mkdir(exist_ok=True)
            watcher = threading.Thread(target=self.watch)
            self.process = started(["true"])
            watcher.start()
            striker.start()
            parser.start()
            watcher.join()
            self.over.set()
            striker.join()
            parser.join()
            self.judge()
        return self

    @contextlib.contextmanager
    def disk(self) -> Iterator[None]:
        """Give the runs whose disk fills a small disk of their own."""
        if self.fault != "full":
            yield
            return
        self.spool.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "corra-torture", str(self.spool)],
            check=True,
        )
        try:
            yield
        finally:
            subprocess.run(["umount", "-l", str(self.spool)], check=True)

    def keep_reading(self) -> None:
        """Check that every state file parses at every moment."""
        while not self.over.wait(0.003):
            for name in ("state.json", "program.json"):
                with contextlib.suppress(FileNotFoundError):
                    json.loads((self.path / name).read_text())
            with contextlib.suppress(FileNotFoundError):
                page = (self.path / "exit").read_bytes()[: host_agent.PAGE]
                if page.strip() and host_agent.unpack(page) is None:
                    again = (self.path / "exit").read_bytes()[: host_agent.PAGE]
                    if host_agent.unpack(again) is None:
                        self.violations.append(f"a torn record, twice: {page[:200]!r}")

    def judge(self) -> None:
        say = self.violations.append
        expected = self.expected()
        state = self.state.get("state")
        executions = self.executed.stat().st_size if self.executed.exists() else 0
        if executions != 1 and not (self.fault == "three" and executions == 0):
            say(f"executed {executions} times")
        self.violations += contradictions(self.state) if self.state else []
        self.lost = state == "lost"
        if self.lost:
            if self.kills < 3 and not (
                self.fault == "link" and self.cuts and self.state.get("reason") == "link"
            ):
                say(f"lost after {self.kills} kills: {self.state.get('reason')}")
            for name, seen in self.bytes.items():
                # The last line of stderr may be a message of ssh.
                own = (
                    re.sub(
                        rb"(client_loop: |Connection (to|closed)|Read from remote)[^\n]*\n?\Z",
                        b"",
                        bytes(seen),
                    )
                    if self.kept_here
                    else seen
                )
                if not any(
                    expected[name].startswith(each)
                    for each in (bytes(own), own.removesuffix(b"\n"))
                ):
                    say(f"{name} isn't a prefix of what was written: ..{bytes(own[-200:])!r}")
        elif state == "exited":
            status = self.state.get("status")
            right = -self.end if self.end < 0 else self.end << 8
            if self.kept_here and self.end < 0:
                right = 128 - self.end << 8  # a POSIX sh can't tell a signal from such a code
            dumped = status == right | 0x80 if self.end < 0 else False
            sigpipe = self.kills == 3 and status in (signal.SIGPIPE, signal.SIGHUP)
            if status != right and not dumped and not sigpipe:
                say(f"status {status}, not {right}")
            for name, whole in expected.items():
                came, spooled = bytes(self.bytes[name]), (self.path / name).read_bytes()
                if came != whole and not (self.kills == 3 and whole.startswith(came)):
                    say(f"{name}: {len(came)} bytes came, {len(whole)} written")
                if spooled != whole and self.kills < 3:
                    say(f"{name}: {len(spooled)} bytes spooled, {len(whole)} written")
            if (
                self.kind == "sent"
                and (accepted := (self.path / "stdin").read_bytes()) != self.to_send
                and self.kills < 3
            ):
                say(f"stdin: {len(accepted)} bytes accepted, {len(self.to_send)} sent")
        elif not (state in {"starting", "not_started"} and self.fault == "three"):
            say(f"ended as {state}")
        self.judge_leftovers()

    def judge_leftovers(self) -> None:
        if not self.path.exists():
            self.violations.append("there is no run")
            return
        deadline = time.monotonic() + 5
        while (left := self.guards()) and time.monotonic() < deadline:
            time.sleep(0.005)
        if left:
            self.violations.append(f"guards left: {left}")
        # An exiting process loses its environment a moment before its locks.
        while (held := self.locked()) and time.monotonic() < deadline:
            time.sleep(0.005)
        if held:
            self.violations.append("the lock is still held")
        known = {
            "program.json",
            "state.json",
            "index",
            "fifo",
            "control",
            "keeper",
            "launched",
            "exit",
            *self.bytes,
        }
        known |= {"stdin", "senders"} if self.kind != "written" else set()
        if self.kills:
            known |= {"launched.tmp", "state.json.tmp"}
        if unknown := set(os.listdir(self.path)) - known:
            self.violations.append(f"files left: {unknown}")
        if said := (self.path / "keeper").read_text():
            self.violations.append(f"the agent complained: {said}")
        if extra := [
            name
            for name in os.listdir(self.path.parent)
            if name != self.prog_id and self.fault not in ("starter", "follow")
        ]:
            self.violations.append(f"directories left: {extra}")

    def locked(self, name: str = ".") -> bool:
        """Return whether a process holds the lock of the run, or that of one of its files. A file
        that doesn't exist yet is not locked.
        """
        try:
            fd = os.open(self.path / name, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return False
        except OSError as error:
            return error.errno == errno.EWOULDBLOCK
        finally:
            os.close(fd)


def become_subreaper() -> None:
    """Make this process the parent of every orphan below it, so that the test sees what a run
    leaves behind.
    """
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)


_ours: set[int] = set()
_birth = threading.Lock()


def started(
    argv: list[str], kind: Callable[..., subprocess.Popen[bytes]] = subprocess.Popen, **how: Any
) -> subprocess.Popen[bytes]:
    """Start a process that its starter waits for: the reaper leaves it alone."""
    with _birth:
        process = kind(argv, **how)
        _ours.add(process.pid)
    return process


def reap() -> None:
    """Reap the orphans that have ended. Leave the children of other threads: reaping one would make
    its status read as 0.
    """
    with _birth:
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) not in _ours:
                found = host_agent.process(int(entry))
                if found and found[:2] == ("Z", os.getpid()):
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(int(entry), os.WNOHANG)
