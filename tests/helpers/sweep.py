"""The kill-point sweep: for every N, kill one guard at its N-th system call. Nothing may be lost.

A tracer follows the start of a run through its forks with ptrace and counts the system calls of one
guard. At the N-th call it sends SIGKILL. A random moment would miss the window of one instruction;
the sweep finds it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path

from corra import agent as host_agent
from torture import agent_argv
from tracing import (
    CLONE,
    EXEC,
    FORK,
    OPTIONS,
    PTRACE_CONT,
    PTRACE_GETEVENTMSG,
    PTRACE_SETOPTIONS,
    PTRACE_SYSCALL,
    PTRACE_TRACEME,
    VFORK,
    WALL,
    ptrace,
)

ROLES = ("standby", "middle", "keeper")


class Tracer:
    """A tracer that runs one start and kills the guard `role` at its `point`-th stop. Entry and
    exit of a system call are two stops.

    The tracer tells guards by their forks: the starter's grandchild is the standby (by hand: once
    it calls exec), the standby's child is the middle, and so on. The count begins at the fork, so
    the sweep reaches every instruction of a guard's life.
    """

    def __init__(
        self, argv: list[str], request: bytes, role: str | None, point: int, *, by_hand: bool
    ) -> None:
        self.argv, self.request, self.role, self.point, self.by_hand = (
            argv,
            request,
            role,
            point,
            by_hand,
        )
        self.parent: dict[int, int] = {}
        self.roles: dict[int, str] = {}
        self.calls: dict[str, int] = dict.fromkeys(ROLES, 0)
        self.killed = 0
        # A new process may stop before its parent's fork is reported. Its role is unknown until
        # then, so it waits.
        self.unknown: set[int] = set()

    def run(self) -> bytes:
        """Return what the starter printed. By then the tracer has let go of every guard, or the
        guard is dead.
        """
        request_read, request_write = os.pipe()
        reply_read, reply_write = os.pipe()
        starter = os.fork()
        if not starter:
            os.dup2(request_read, 0)
            os.dup2(reply_write, 1)
            ptrace(PTRACE_TRACEME, 0)
            os.kill(os.getpid(), signal.SIGSTOP)
            os.execv(self.argv[0], self.argv)
        os.close(request_read)
        os.close(reply_write)
        os.write(request_write, self.request)
        os.close(request_write)
        os.waitpid(starter, WALL)
        ptrace(PTRACE_SETOPTIONS, starter, OPTIONS)
        ptrace(PTRACE_CONT, starter)
        self.starter = starter
        self.parent[starter] = os.getpid()
        living = {starter}
        while living:
            try:
                pid, status = os.waitpid(-1, WALL)
            except ChildProcessError:
                break
            if os.WIFEXITED(status) or os.WIFSIGNALED(status):
                living.discard(pid)
                continue
            living.add(pid)
            self.step(pid, status)
        with open(reply_read, "rb") as reply:
            return reply.read()

    def step(self, pid: int, status: int) -> None:
        event, number = status >> 16, os.WSTOPSIG(status)
        deliver = 0
        if event in (FORK, VFORK, CLONE):
            message = ctypes.c_ulong()
            ptrace(PTRACE_GETEVENTMSG, pid, message)
            self.born(pid, message.value)
            if message.value in self.unknown:
                self.unknown.remove(message.value)
                self.resume(message.value)
        elif event == EXEC:
            self.executed(pid)
        elif pid not in self.parent:
            self.unknown.add(pid)
            return
        elif number == signal.SIGTRAP | 0x80:
            self.count(pid)
        elif number not in (signal.SIGTRAP, signal.SIGSTOP):
            deliver = number
        self.resume(pid, deliver)

    def resume(self, pid: int, deliver: int = 0) -> None:
        # Only guards stop at system calls; the starter and the program run at full speed.
        ptrace(PTRACE_SYSCALL if pid in self.roles else PTRACE_CONT, pid, deliver)

    def born(self, parent: int, child: int) -> None:
        self.parent[child] = parent
        if not self.by_hand:
            self.outermost(child)
        role = self.roles.get(parent)
        if role in ROLES[:-1]:
            following = ROLES[ROLES.index(role) + 1]
            # A guard whose inner guards died forks new ones; the sweep counts the first of each
            # role.
            if following not in self.roles.values():
                self.roles[child] = following

    def executed(self, pid: int) -> None:
        if self.by_hand:
            self.outermost(pid)

    def outermost(self, pid: int) -> None:
        if not self.roles and self.parent.get(self.parent.get(pid, 0)) == self.starter:
            self.roles[pid] = "standby"

    def count(self, pid: int) -> None:
        role = self.roles.get(pid)
        if role is None:
            return
        self.calls[role] += 1
        if role == self.role and self.calls[role] == self.point and not self.killed:
            self.killed = pid
            os.kill(pid, signal.SIGKILL)


# The program sends stdin to its own run. What it reads went through the spool and the guards, and
# the guards must agree on the end of stdin.
PROGRAM = """
import os, sys, time
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), b"x")
sys.path.insert(0, os.path.dirname(sys.argv[2]))
import agent
run = agent.Run(sys.argv[3], sys.argv[4])
sender = agent.Sender(run, 7)
came = b""
for n in range(3):
    os.write(1, b"out%d" % n * 3000)
    os.write(2, b"err%d" % n * 10)
    sender.take(9000 * n, b"in%d" % n * 3000)
    agent.give_order(run, "- stdin")
    time.sleep(0.002)
    came += os.read(0, 2000)
sender.take(27000, None)
agent.give_order(run, "- stdin")
while True:
    data = os.read(0, 65536)
    if not data:
        break
    came += data
os.write(1, came)
os._exit(42)
"""
EXPECTED = {
    "stdout": b"".join(b"out%d" % n * 3000 for n in range(3))
    + b"".join(b"in%d" % n * 3000 for n in range(3)),
    "stderr": b"".join(b"err%d" % n * 10 for n in range(3)),
}


def one(
    agent: Path,
    root: Path,
    role: str | None,
    point: int,
    python: str = sys.executable,
    by_hand: bool = False,
) -> tuple[dict[str, int], bool, list[str]]:
    """Start one run and kill `role` at `point`. Return how many stops each guard made, whether the
    guard was killed, and the violations.
    """
    prog_id, violations = f"sweep-{role or 'none'}-{point}", []
    executed = root / f"x-{prog_id}"
    program = {
        "argv": [python, "-ISE", "-c", PROGRAM, str(executed), str(agent), str(root), prog_id],
        "cwd": "/",
        "stdin": {"open": True},
    }
    request = json.dumps({"prog_id": prog_id, "spool": str(root), "program": program}).encode()
    (root / "gc").touch()  # otherwise the first start's clean-up is a grandchild too
    tracer = Tracer(
        [*agent_argv(python, agent, by_hand=by_hand), "start"],
        request,
        role,
        point,
        by_hand=by_hand,
    )
    first = json.loads(tracer.run())
    run = host_agent.Run(str(root), prog_id)
    state = run.state()
    if state["state"] == "starting":
        violations.append(f"never launched: {first}")
    elif (state["state"], state["return_code"]) != ("exited", 42):
        violations.append(f"{state['state']} {state['reason']} {state['status']}")
    if not executed.exists() or executed.read_bytes() != b"x":
        violations.append(f"executed {executed.stat().st_size if executed.exists() else 0} times")
    for name, data in EXPECTED.items():
        if (root / "runs" / prog_id / name).read_bytes() != data:
            violations.append(f"{name} differs")
    if run.alive():
        violations.append("the lock is held")
    if said := (root / "runs" / prog_id / "keeper").read_text():
        violations.append(said)
    run.close()
    return tracer.calls, bool(tracer.killed), violations
