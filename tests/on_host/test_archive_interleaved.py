"""Starts, ends, folding away, crashes and look-ups of the same ids, in any order and one within the
other: no id is started twice, and each run is found as it is.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

import long_ago
from corra import agent
from long_ago import DAY_NS
from properties import PROPERTY
from tracing import killed_at

NOW = time.time_ns()
IDS = ("own", long_ago.id_at(NOW - 40 * DAY_NS, 2))
ids = st.sampled_from(IDS)
# Stops at system calls after which gc is killed; a gc of a few runs makes up to 700.
points = st.none() | st.integers(1, 700)
steps = st.recursive(
    st.tuples(st.sampled_from(["live", "fold", "age", "finish", "harm"]), ids, points),
    lambda inner: st.tuples(st.just("start"), ids, st.lists(inner, max_size=3)),
    max_leaves=4,
)


class Stdin:
    """The bytes for a program's stdin: they come once `meanwhile` has happened."""

    def __init__(self, meanwhile: Callable[[], None]) -> None:
        self.fd, self.theirs = os.pipe()
        self.meanwhile = meanwhile

    def pour(self, file: int, size: int, digest: Any) -> None:
        self.meanwhile()
        os.write(file, b"x" * size)

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.theirs)


class Spool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="corra-interleaved-"))
        self.launched: dict[str, int] = dict.fromkeys(IDS, 0)
        self.codes: dict[str, int] = {}
        self.open: dict[str, int] = {}  # {id: the descriptor by which its guards hold the lock}
        agent.UNCOVERED_MAX = 0

    def teardown(self) -> None:
        for file in self.open.values():
            os.close(file)
        shutil.rmtree(self.root)

    # ---- what happens

    def act(self, step: Any) -> None:
        kind, prog_id, more = step
        if kind == "start":
            self.start(prog_id, more, more)
        elif kind == "live":
            self.start(prog_id, [], [])
            self.finish(prog_id, 1)
            self.fold(more)
        elif kind == "fold":
            self.fold(more)
        elif kind == "age":
            self.age(prog_id)
        elif kind == "finish":
            self.finish(prog_id, len(prog_id))
        else:
            self.harm(more or 0)

    def act_all(self, given: list[Any]) -> None:
        for each in given:
            self.act(each)

    @rule(prog_id=ids, before=st.lists(steps, max_size=3), after=st.lists(steps, max_size=3))
    def start(self, prog_id: str, before: Any, after: Any) -> None:
        """A start: others act before it has its claim, and before its guard has the run's lock."""
        request = {
            "spool": str(self.root),
            "prog_id": prog_id,
            "program": {"argv": ["true"], "cwd": "/", "stdin": {"bytes": 1}},
        }
        stdin = Stdin(functools.partial(self.act_all, before))
        try:
            run = agent.new_run(request, stdin, agent.Reply(io.BytesIO(), None))
        finally:
            stdin.close()
        try:
            over = isinstance(run, agent.ArchivedRun) or agent.exists(run.directory, "launched")
            directory = -1 if over else os.open(run.path, os.O_RDONLY)
        finally:
            run.close()
        if over:
            return
        self.act_all(after)
        self.guard(prog_id, directory)

    def guard(self, prog_id: str, directory: int) -> None:
        """Do what a guard does until it has launched the program."""
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            slot = agent.read_file(directory, "exit")
            free = not agent.exists(directory, "launched") and not agent.abandoned(directory)
            if free and slot and agent.unpack(slot[agent.PAGE :]) is None:
                text = b"%d %d %s %d %d" % (4711, 4711, agent.boot_id().encode(), NOW, NOW // 7)
                agent.fill(directory, "launched", text.ljust(255))
                self.launched[prog_id] += 1
                self.open[prog_id] = directory
                return
        except OSError:
            pass  # another guard has it
        os.close(directory)

    @rule(prog_id=ids, code=st.integers(0, 3))
    def finish(self, prog_id: str, code: int) -> None:
        directory = self.open.pop(prog_id, None)
        if directory is None:
            return
        record = agent.Record()
        record.phase, record.agent, record.ooms = "final", 4710, 0
        record.outcome = (code << 8, NOW, 1, "exited")
        file = os.open("exit", os.O_WRONLY, dir_fd=directory)
        os.pwrite(file, record.page(), 0)
        os.close(file)
        os.close(directory)
        self.codes[prog_id] = code

    @rule(point=points)
    def fold(self, point: int | None) -> None:
        """Fold away what has ended; with a point, be killed there."""

        def work() -> None:
            request = {"spool": str(self.root), "older": 0, "records": 0}
            agent.collect(request, time.time_ns(), lambda: False)

        if point is None:
            work()
        else:
            killed_at(point, work)

    @rule(prog_id=ids)
    def age(self, prog_id: str) -> None:
        """Time goes by: a claim that nobody has launched is abandoned."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / "runs" / prog_id / "launched.tmp", (1, 1))

    @rule(what=st.integers(0, 700))
    def harm(self, what: int) -> None:
        """Damage a cache."""
        caches = sorted([*self.root.glob("archive/*.index"), *self.root.glob("ended")])
        if caches:
            victim = caches[what % len(caches)]
            data = victim.read_bytes()
            victim.write_bytes(data[: what * len(data) // 700])

    # ---- what is true

    @invariant()
    def no_id_is_started_twice(self) -> None:
        assert max(self.launched.values()) <= 1

    @invariant()
    def each_run_is_found_as_it_is(self) -> None:
        out = io.BytesIO()
        agent.verb_list({"spool": str(self.root)}, None, agent.Reply(out, None), False)
        listed = {each["prog_id"] for each in agent.from_json(out.getvalue())["runs"]}
        for prog_id in (each for each in IDS if self.launched[each]):
            assert prog_id in listed
            run = agent.find_exact({"spool": str(self.root)}, prog_id)
            state = run.state()
            run.close()
            if prog_id in self.open:
                assert state["state"] == "running"
            else:
                assert (state["state"], state["return_code"]) == ("exited", self.codes[prog_id])


Spool.TestCase.settings = settings(PROPERTY, stateful_step_count=12)
TestSpool = Spool.TestCase
