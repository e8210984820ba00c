"""The sweep: for every N, send one guard a signal at its N-th system call. KILL loses nothing, STOP
delays nothing for good, TERM is swallowed nowhere.

A tracer follows the start of a run through its forks with ptrace and counts the system calls of one
guard. At the N-th call it sends the signal. A random moment would miss the window of one
instruction; the sweep finds it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from corra import agent as host_agent
from torture import agent_argv
from tracing import (
    CLONE,
    EXEC,
    FORK,
    OPTIONS,
    PTRACE_CONT,
    PTRACE_DETACH,
    PTRACE_GETEVENTMSG,
    PTRACE_SETOPTIONS,
    PTRACE_SYSCALL,
    PTRACE_TRACEME,
    VFORK,
    WALL,
    ptrace,
)

ROLES = ("standby", "middle", "keeper")
SIGNALS = ("KILL", "STOP", "TERM")
OVER_S = 20.0
SLEEPS_S = 1.0


class Tracer:
    """A tracer that runs one start and sends the guard `role` a signal at its `point`-th stop.
    Entry and exit of a system call are two stops.

    The tracer tells guards by their forks: the starter's grandchild is the standby (by hand: once
    it calls exec), the standby's child is the middle, and so on. The count begins at the fork, so
    the sweep reaches every instruction of a guard's life.
    """

    def __init__(
        self,
        argv: list[str],
        request: bytes,
        role: str | None,
        point: int,
        *,
        by_hand: bool,
        number: int = signal.SIGKILL,
    ) -> None:
        self.argv, self.request, self.role, self.point, self.by_hand = (
            argv,
            request,
            role,
            point,
            by_hand,
        )
        self.number = number
        self.parent: dict[int, int] = {}
        self.roles: dict[int, str] = {}
        self.calls: dict[str, int] = dict.fromkeys(ROLES, 0)
        self.hit = 0
        self.died_of_it = False
        # When it came: how many stops the guard had made since it forked the next one, None before
        # that; and whether the program had ended, or was about to.
        self.since_fork: int | None = None
        self.program_over = self.over_at_hit = False
        self.program_at = 0.0
        self.forked_at: dict[str, int] = {}
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
                self.program_over |= self.roles.get(self.parent.get(pid, 0)) == "keeper"
                self.died_of_it |= pid == self.hit and os.WIFSIGNALED(status)
                continue
            living.add(pid)
            self.step(pid, status)
            if pid == self.hit and self.number == signal.SIGSTOP:
                living.discard(pid)
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
            if self.count(pid):
                return
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
        if role == "keeper":
            self.program_at = time.monotonic()
        if role in ROLES[:-1]:
            following = ROLES[ROLES.index(role) + 1]
            # A guard whose inner guards died forks new ones; the sweep counts the first of each
            # role.
            if following not in self.roles.values():
                self.roles[child] = following
                self.forked_at[role] = self.calls[role]

    def executed(self, pid: int) -> None:
        if self.by_hand:
            self.outermost(pid)

    def outermost(self, pid: int) -> None:
        if not self.roles and self.parent.get(self.parent.get(pid, 0)) == self.starter:
            self.roles[pid] = "standby"

    def count(self, pid: int) -> bool:
        """Count a stop of the guard; return whether this tracer has let go of it."""
        role = self.roles.get(pid)
        if role is None:
            return False
        self.calls[role] += 1
        if role != self.role or self.calls[role] != self.point or self.hit:
            return False
        lived_s = time.monotonic() - self.program_at if self.program_at else 0.0
        self.hit, self.over_at_hit = pid, self.program_over or lived_s > SLEEPS_S * 0.9
        if role in self.forked_at:
            self.since_fork = self.point - self.forked_at[role]
        if self.number == signal.SIGSTOP:
            # A traced process would go on with its tracer's next word.
            ptrace(PTRACE_DETACH, pid, signal.SIGSTOP)
            return True
        os.kill(pid, self.number)
        return False


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


# It lives until TERM ends it, or for SLEEPS_S.
SLEEPER = f"""
import os, sys, time
os.write(os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), b"x")
time.sleep({SLEEPS_S})
os._exit(42)
"""
# A guard that has forked the next one hands on within so many stops what had come to it before.
HANDED_ON = 8


def one(
    agent: Path,
    root: Path,
    role: str | None,
    point: int,
    python: str = sys.executable,
    by_hand: bool = False,
    number: int = signal.SIGKILL,
) -> tuple[dict[str, int], bool, list[str]]:
    """Start one run and send `role` the signal `number` at `point`. Return how many stops each
    guard made, whether the guard got the signal, and the violations.
    """
    prog_id, violations = f"sweep-{role or 'none'}-{point}", []
    executed = root / f"x-{prog_id}"
    asks_to_end = number == signal.SIGTERM
    words = [str(executed)] if asks_to_end else [str(executed), str(agent), str(root), prog_id]
    program = {
        "argv": [python, "-ISE", "-c", SLEEPER if asks_to_end else PROGRAM, *words],
        "cwd": "/",
        **({} if asks_to_end else {"stdin": {"open": True}}),
    }
    request = json.dumps({"prog_id": prog_id, "spool": str(root), "program": program}).encode()
    (root / "gc").touch()  # otherwise the first start's clean-up is a grandchild too
    tracer = Tracer(
        [*agent_argv(python, agent, by_hand=by_hand), "start"],
        request,
        role,
        point,
        by_hand=by_hand,
        number=number,
    )
    first = json.loads(tracer.run())
    run = host_agent.Run(str(root), prog_id)
    if number == signal.SIGSTOP:
        deadline = time.monotonic() + OVER_S
        while run.alive() and time.monotonic() < deadline:
            time.sleep(0.005)  # untraced processes tell nobody of their end
    state = run.state()
    times = executed.stat().st_size if executed.exists() else 0
    if state["state"] == "starting":
        violations.append(f"never launched: {first}")
    elif asks_to_end:
        violations += unheard(tracer, state, times)
    elif (state["state"], state["return_code"]) != ("exited", 42) or times != 1:
        said = f"{state['state']} {state['reason']} {state['status']}"
        violations.append(f"{said}, executed {times} times")
    for name, data in EXPECTED.items() if not asks_to_end else ():
        if (root / "runs" / prog_id / name).read_bytes() != data:
            violations.append(f"{name} differs")
    if run.alive():
        violations.append("the lock is held")
    if said := (root / "runs" / prog_id / "keeper").read_text():
        violations.append(said)
    run.close()
    return tracer.calls, bool(tracer.hit), violations


def unheard(tracer: Tracer, state: dict[str, Any], times: int) -> list[str]:
    """Return what is wrong with the end of a run of which one guard got a TERM."""
    told = [each["signal"] for each in state["signals_sent"]]
    ended = state["state"] == "not_started" and times == 0
    ended |= (state["signal"], told, times <= 1) == ("SIGTERM", ["SIGTERM"], True)
    went_on = (state["return_code"], times) == (42, 1)
    went_on &= told == [] or (told == ["SIGTERM"] and tracer.over_at_hit)
    since = tracer.since_fork
    if not tracer.hit or tracer.died_of_it or tracer.over_at_hit:
        right = went_on  # of a guard that died, the start has made another
    elif since is None:
        right = ended
    else:
        right = went_on or (ended and since <= HANDED_ON)
    if right:
        return []
    said = f"{state['state']} {state['reason']} {state['status']}, told {told}, executed {times}"
    return [f"{said}; {since} stops since its fork"]
