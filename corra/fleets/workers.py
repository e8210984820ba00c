"""Who performs a fleet's jobs: threads, or from some tens of members on processes with threads.

A member is a thread that mostly waits. But its handshake is some 12 ms of Python, and the threads
of one Python share a core.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import signal
import socket
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, Protocol

from corra.errors import CorraError, MaybeStarted, StillRunning
from corra.model.state import State
from corra.runs.digest import Digests
from corra.runs.events import LinkDown, LinkUp
from corra.terminal.screen import Gone

from .member import Hands, Job, Orders, Sink
from .plan import host_of

# Computed of what was measured (benchmarks/RESULTS.md): two processes cost 0.1 s of CPU more than
# threads, and share 12 ms a member. That is even at 17 members; at 48 it saves 0.2 s. Where hosts
# run on the client's cores no core is free, and nothing is saved.
MEMBERS_A_PROCESS = 24
# A member that is over leaves a connection of 0.3 MB, held by cycles of 240 objects. A verb's own
# process collects each 100,000 objects, so 500 members took 130 MB.
COLLECTED_EACH = 32


class Workers(Protocol):
    """Takes jobs. What becomes of them, the Sink is told."""

    def begin(self, job: Job) -> None: ...
    def give_up(self, at: int, after_s: float) -> None: ...
    def leave(self) -> None: ...


class Threads:
    """A thread for each job. They are daemons: what a thread waits for is no reason to stay."""

    def __init__(self, orders: Orders, sink: Sink) -> None:
        self._hands = Hands(orders, sink)

    def begin(self, job: Job) -> None:
        threading.Thread(target=self._hands.perform, args=(job,), daemon=True).start()

    def give_up(self, at: int, after_s: float) -> None:
        self._hands.give_up(at, after_s)

    def leave(self) -> None:
        self._hands.leave()


class Processes:
    """Threads in several processes, which are forked before there is any thread here."""

    def __init__(self, orders: Orders, sink: Sink, count: int) -> None:
        self._orders, self._sink = orders, sink
        self._links: list[Connection] = []
        self._locks: list[threading.Lock] = []
        # For each process the members that it has, and whether they are known to have started.
        # None for a process that has ended.
        self._has: list[dict[int, bool] | None] = [{} for _ in range(count)]
        self._which: dict[int, int] = {}
        self._knows = threading.Lock()
        self._spare = Threads(orders, sink)
        self._left = False
        pids = []
        for _ in range(count):
            ours, theirs = socket.socketpair()
            pid = os.fork()
            if pid == 0:
                ours.close()
                for each in self._links:
                    each.close()
                _serve(orders, Connection(theirs.detach()))
            theirs.close()
            pids.append(pid)
            self._links.append(Connection(ours.detach()))
            self._locks.append(threading.Lock())
        for which, pid in enumerate(pids):
            threading.Thread(target=self._hear, args=(which, pid), daemon=True).start()

    def _tell(self, which: int, *words: Any) -> None:
        with self._locks[which], contextlib.suppress(OSError):
            self._links[which].send(words)

    def begin(self, job: Job) -> None:
        count = len(self._links)
        with self._knows:
            for which in ((job.at + turn) % count for turn in range(count)):
                if (has := self._has[which]) is not None:
                    has[job.at] = job.confirmed
                    self._which[job.at] = which
                    break
            else:
                self._spare.begin(job)
                return
        self._tell(which, "begin", job)

    def give_up(self, at: int, after_s: float) -> None:
        if (which := self._which.get(at)) is None:
            self._spare.give_up(at, after_s)
        else:
            self._tell(which, "give_up", at, after_s)

    def leave(self) -> None:
        self._left = True
        self._spare.leave()
        for which in range(len(self._links)):
            self._tell(which, "leave")

    def _hear(self, which: int, pid: int) -> None:
        """Pass on what one process tells, until it has ended."""
        link, has = self._links[which], self._has[which]
        assert has is not None
        with contextlib.suppress(EOFError, OSError):
            while True:
                name, *words = link.recv()
                with self._knows:
                    if name == "state":
                        has[words[0]] = True
                    elif name in ("over", "halted"):
                        has.pop(words[0], None)
                try:
                    getattr(self._sink, name)(*words)
                except Gone as gone:
                    self._sink.gone(gone)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, 0)
        if not self._left:
            self._tell_of_death(which)

    def _tell_of_death(self, which: int) -> None:
        """Say of each member of a process that was killed that nobody watches it any more."""
        with self._knows:
            left, self._has[which] = self._has[which], None
        why = "the process here that watched it was killed (no memory?)"
        for at, started in (left or {}).items():
            member = self._orders.plan.members[at]
            kind = StillRunning if started else MaybeStarted
            facts: Any = {"host": host_of(member), "prog_id": self._orders.plan.run_id(member)}
            self._sink.over(at, None, kind(why, **facts))


class _Pipe:
    """The sink of a process that helps: it tells the first process.

    A write waits while the first process shows what it has, so output never gathers anywhere.
    """

    def __init__(self, link: Connection) -> None:
        self._link = link
        self._lock = threading.Lock()
        self._over = 0

    def _tell(self, *words: Any) -> None:
        with self._lock:
            try:
                self._link.send(words)
            except OSError:
                os._exit(0)

    def state(self, at: int, state: State) -> None:
        self._tell("state", at, state)

    def link(self, at: int, event: LinkDown | LinkUp) -> None:
        self._tell("link", at, event)

    def output(self, at: int, stream: str, data: bytes, offset: int) -> None:
        self._tell("output", at, stream, bytes(data), offset)

    def troubled(self, at: int, why: str) -> None:
        self._tell("troubled", at, why)

    def note(self, at: int, text: str) -> None:
        self._tell("note", at, text)

    def digested(self, at: int, digests: Digests | CorraError) -> None:
        self._tell("digested", at, digests)

    def over(self, at: int, state: State | None, error: CorraError | None) -> None:
        self._tell("over", at, state, error)
        self._over += 1
        if self._over % COLLECTED_EACH == 0:
            gc.collect()

    def halted(self, at: int, why: str) -> None:
        self._tell("halted", at, why)

    def gone(self, error: Gone) -> None:
        self._tell("gone", error)


def _serve(orders: Orders, link: Connection) -> None:
    """Perform jobs until the first process has gone; never returns."""
    try:
        # A key on the terminal reaches all processes; the first one decides what it means.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)
        random.seed()
        gc.freeze()  # what the first process has imported is never garbage
        workers = Threads(orders, _Pipe(link))
        while True:
            name, *words = link.recv()
            getattr(workers, name)(*words)
    except (EOFError, OSError):
        pass
    finally:
        os._exit(0)


def hire(orders: Orders, sink: Sink, jobs: int, *, cores: int | None = None) -> Workers:
    """Return who performs `jobs` jobs. It forks only where this process has no other thread."""
    cores = cores if cores is not None else len(os.sched_getaffinity(0))
    count = min(cores, jobs // MEMBERS_A_PROCESS)
    if count < 2 or threading.active_count() > 1:
        return Threads(orders, sink)
    from corra.transport.fabric.connection import load

    load()  # once, and not in each process
    return Processes(orders, sink, count)


# How a Roller finds its workers, for a caller who needs others.
Hire = Callable[[Orders, Sink, int], Workers]
