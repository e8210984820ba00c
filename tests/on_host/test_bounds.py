"""Bounded output (keep_output) and the limits of a program (limits): real files, real processes,
real file systems.

A bounded stream loses its beginning while a follower reads it. The follower still gets exact data:
bytes at their true offsets, or a gap.
"""

from __future__ import annotations

import errno
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import corra
import machine
from agent_door import Door, Mount, Refused, eventually, fresh, guards, kill
from corra import agent
from corra.model.frames import Gap, Output, Parser
from corra.terminal.screen import Screen
from corra.terminal.watch import Watch
from properties import PROPERTY

COUNT = 400_000
NUMBERS = b"".join(b"%d\n" % number for number in range(1, COUNT + 1))  # 2.7 MB
KEEP = 256 * 1024
SPARE = agent.BOUND_MIN + agent.PAGE  # bytes that the file may hold beyond the bound
MS = 10**6
NOBODY = 65534
PREAD = os.pread


def disk(path: Path) -> int:
    return path.stat().st_blocks * 512


def exact(whole: bytes, follow: Any, stream: str = "stdout") -> int:
    """Check that each byte came at its own offset, with gaps only in between; return how many bytes
    are in gaps.
    """
    at = gone = 0
    for frame in follow.frames:
        if isinstance(frame, Output) and frame.stream == stream:
            assert frame.offset == at
            assert frame.data == whole[at : at + len(frame.data)]
            at = frame.end
        elif isinstance(frame, Gap) and frame.stream == stream:
            assert frame.start == at < frame.end
            gone += frame.end - frame.start
            at = frame.end
    assert at == len(whole)
    return gone


def ruled(begin: int, end: int) -> bytes:
    """Return a part of endless lines that contain their own offsets (`seq -f %07.0f 0 9999999`).
    They have no NUL, as a hole has.
    """
    return b"".join(b"%07d\n" % number for number in range(begin // 8, end // 8 + 1))[begin % 8 :][
        : end - begin
    ]


# ---------------------------------------------------------------- keep_output


def test_only_the_last_of_an_output_is_kept_and_its_offsets_stay_true(door):
    state = door.start(["seq", "1", str(COUNT)], run={"keep_output": KEEP})
    final = door.wait(state["prog_id"])
    file = door.directory(state["prog_id"]) / "stdout"
    assert (final["return_code"], file.stat().st_size) == (0, len(NUMBERS))
    assert disk(file) <= KEEP + SPARE + agent.PIPE_MAX
    dropped = final["streams"]["stdout"]["dropped"]
    assert final["streams"]["stdout"] == {"length": len(NUMBERS), "dropped": dropped, "late": 0}
    assert KEEP <= len(NUMBERS) - dropped <= KEEP + SPARE + agent.PIPE_MAX
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert exact(NUMBERS, follow) == dropped
    assert follow.gaps == [Gap("stdout", 0, dropped)]
    assert door.read(state["prog_id"]) == NUMBERS[dropped:]
    assert (
        door.read(state["prog_id"], start=dropped + 5, end=dropped + 9)
        == NUMBERS[dropped + 5 : dropped + 9]
    )
    assert door.read(state["prog_id"], start=5, end=9) == b""


def test_a_tail_and_what_came_since_a_time_begin_where_there_is_something(door):
    state = door.start(["seq", "1", str(COUNT)], run={"keep_output": KEEP})
    dropped = door.wait(state["prog_id"])["streams"]["stdout"]["dropped"]
    for ask, begin in (
        ({"tail": 2}, NUMBERS.index(b"399999\n")),
        ({"tail": COUNT}, dropped),
        ({"since": 1}, dropped),
    ):
        with door.follow(state["prog_id"], **ask) as follow:
            follow.drain()
        assert follow.reply["cursor"]["stdout"] == begin
        assert follow.stdout() == NUMBERS[begin:] and not follow.gaps


def dropped(door: Door, prog_id: str) -> int:
    return int(door.status(prog_id)["streams"]["stdout"]["dropped"])


@pytest.mark.storm
def test_a_follower_that_lags_is_told_of_each_gap_and_never_shown_a_hole(door):
    """The follower reads a little, and each time the keeper cuts more than that; the program never
    waits for the follower.
    """
    prog_id = door.start(
        ["seq", "-f", "%07.0f", "0", "9999999"], run={"keep_output": agent.BOUND_MIN}
    )["prog_id"]
    with door.follow(prog_id) as follow:
        for size in (1, 100, 5000, 70_000):
            follow._take(os.read(follow.process.stdout.fileno(), size))
            seen = dropped(door, prog_id)
            eventually(lambda: dropped(door, prog_id) > seen)  # noqa: B023
        length = door.stop(prog_id, 5)["state"]["streams"]["stdout"]["length"]
        follow.drain()
    assert exact(ruled(0, length), follow) > 0 and len(follow.gaps) > 1


def test_a_writer_that_never_ends_costs_constant_disk_while_it_is_watched(door):
    """CORRA_BOUND_BYTES sets the size; benchmarks/RESULTS.md has 10 GB through 64 MB."""
    size = int(os.environ.get("CORRA_BOUND_BYTES", str(200 << 20)))
    keep = int(os.environ.get("CORRA_BOUND_KEEP", str(1 << 20)))
    state = door.start(["head", "-c", str(size), "/dev/zero"], run={"keep_output": keep})
    at, most = door.directory(state["prog_id"]), 0
    with door.follow(state["prog_id"], streams=[]) as follow:
        data, ping_at = None, 0.0
        while data != b"":
            if time.monotonic() > ping_at:
                ping_at = time.monotonic() + 5
                follow.send(b"P\n")
            most = max(most, sum(disk(at / name) for name in ("stdout", "stderr", "index")))
            if select.select([follow.process.stdout], [], [], 0.01)[0]:
                data = follow._some(0)
                follow._take(data)
    final = follow.states[-1]
    assert (final["return_code"], final["streams"]["stdout"]["length"]) == (0, size)
    print(f"{size} bytes, at most {most} on the disk, {final['elapsed']:.2f} s")
    assert most <= keep + max(keep // 16, agent.BOUND_MIN) + 4 * agent.PIPE_MAX


@pytest.mark.storm
def test_keepers_killed_while_a_stream_is_cut_lose_nothing_that_is_kept(door):
    prog_id = door.start(["seq", "-f", "%07.0f", "0", "9999999"], run={"keep_output": KEEP})[
        "prog_id"
    ]
    for _ in range(2):
        keeper = door.status(prog_id)["agent_pid"]
        eventually(lambda: dropped(door, prog_id))
        kill(keeper)
        eventually(lambda: door.status(prog_id)["agent_pid"] not in (keeper, None))  # noqa: B023
        seen = dropped(door, prog_id)
        eventually(lambda: dropped(door, prog_id) > seen)  # noqa: B023
    final = door.stop(prog_id, 5)["state"]
    length, gone = (final["streams"]["stdout"][name] for name in ("length", "dropped"))
    assert final["signal"] == "SIGTERM"
    with door.follow(prog_id) as follow:
        follow.drain()
    assert follow.gaps == [Gap("stdout", 0, gone)]
    assert follow.stdout() == ruled(gone, length)
    assert disk(door.directory(prog_id) / "stdout") <= KEEP + SPARE + agent.PIPE_MAX


@pytest.mark.parametrize("kind", ["merge", "pty"])
def test_one_stream_of_both_is_bounded_as_well(door, kind):
    state = door.start(
        ["sh", "-c", "seq -f %06.0f 0 99999; echo end >&2"],
        run={"keep_output": KEEP},
        **{kind: True},
    )
    final = door.wait(state["prog_id"])
    end = b"\r\n" if kind == "pty" else b"\n"
    whole = b"".join(b"%06d%s" % (number, end) for number in range(100_000)) + b"end" + end
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert exact(whole, follow, "output") == final["streams"]["output"]["dropped"] > 0
    assert disk(door.directory(state["prog_id"]) / "output") <= KEEP + SPARE + agent.PIPE_MAX


def test_what_gc_has_removed_of_a_bounded_run_is_one_gap(door):
    state = door.start(["seq", "1", str(COUNT)], run={"keep_output": KEEP})
    door.wait(state["prog_id"])
    eventually(lambda: door.status(state["prog_id"])["supervisor"] == "gone")
    door.call("gc", {"ids": [state["prog_id"]]})
    with door.follow(state["prog_id"]) as follow:
        follow.drain()
    assert follow.gaps == [Gap("stdout", 0, len(NUMBERS))]
    assert door.status(state["prog_id"])["streams"]["stdout"]["dropped"] == len(NUMBERS)


def test_after_a_power_cut_that_kept_the_holes_and_lost_their_note_no_hole_is_shown(door):
    state = door.start(["seq", "1", str(COUNT)], run={"keep_output": KEEP})
    dropped = door.wait(state["prog_id"])["streams"]["stdout"]["dropped"]
    eventually(lambda: door.status(state["prog_id"])["supervisor"] == "gone")
    at = door.directory(state["prog_id"])
    for damage in (agent.HEAD.pack(0, agent.HEAD_MASK) * 3, b"\x55" * 48, b""):
        (at / "heads").write_bytes(damage)
        words = (at / "launched").read_text().split()
        words[2] = "00000000-0000-0000-0000-000000000000"
        (at / "launched").write_text(" ".join(words).ljust(255))
        with door.follow(state["prog_id"]) as follow:
            follow.drain()
        assert exact(NUMBERS, follow) == dropped


def test_a_disk_that_is_full_holds_no_stream_back_that_has_reached_its_bound(door, tmp_path, gate):
    if os.getuid() != 0:
        pytest.skip("needs root: it mounts a tmpfs")
    small = Mount(tmp_path / "small", "size=4m,mode=0700")
    try:
        door.spool = small.at / "spool"
        script = f'seq 1 {COUNT}; echo ready; read a < "$0"; exec seq 1 {COUNT}'
        state = door.start(["sh", "-c", script, gate.path], run={"keep_output": 1 << 20})
        eventually(lambda: door.read(state["prog_id"], start=len(NUMBERS)) == b"ready\n")
        with (
            (small.at / "filler").open("wb", 0) as filler,
            pytest.raises(OSError, match="No space"),
        ):
            while True:
                filler.write(b"x" * 4096)
        gate.open()
        final = door.wait(state["prog_id"])
        assert (final["return_code"], final["streams"]["stdout"]["length"]) == (
            0,
            2 * len(NUMBERS) + 6,
        )
        with door.follow(state["prog_id"]) as follow:
            follow.drain()
        exact(NUMBERS + b"ready\n" + NUMBERS, follow)
    finally:
        small.close()


def test_a_file_system_without_holes_is_a_clear_no_before_anything_is_started(door, tmp_path):
    if os.getuid() != 0:
        pytest.skip("needs root: it mounts a ramfs")
    at = tmp_path / "ram"
    at.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(at)], check=True)
    try:
        door.spool = at / "spool"
        with pytest.raises(Refused) as refused:
            door.start(["touch", str(tmp_path / "mark")], run={"keep_output": KEEP})
        assert refused.value.kind == "unsupported"
        assert str(door.spool) in refused.value.reply["message"]
        assert list((door.spool / "runs").iterdir()) == [] and not (tmp_path / "mark").exists()
        assert door.wait(door.start(["true"])["prog_id"])["return_code"] == 0
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True)


@pytest.mark.parametrize("value", [0, 65535, 1.5e6, -1, "64M", True])
def test_a_bound_that_cant_be_kept_is_refused(door, value):
    with pytest.raises(Refused) as refused:
        door.start(["true"], run={"keep_output": value})
    assert refused.value.kind == "bad_request" and "keep_output" in str(refused.value)


# ---------------------------------------------------------------- keep_output: every order of
# writing, cutting and reading


class Small:
    """A bounded run within this process: the keeper's Pump and a Follow with real files and pipes,
    moved by steps instead of time.
    """

    def __init__(self, base: Path, keep: int) -> None:
        self.root = base
        self.request = {"prog_id": "x", "program": {"argv": ["x"]}, "run": {"keep_output": keep}}
        (base / "runs").mkdir()
        runs = os.open(base / "runs", os.O_RDONLY)
        agent.claim(runs, "x", self.request, None, None)
        os.close(runs)
        at = base / "runs" / "x"
        self.files = {
            name: os.open(at / name, os.O_RDWR) for name in ("stdout", "stderr", "index", "heads")
        }
        self.ends = {}
        for name in ("stdout", "stderr"):
            self.files["fifo/" + name], self.ends[name] = os.pipe()
            os.set_blocking(self.files["fifo/" + name], False)
        self.pump = agent.Pump(self.files, self.request, select.poll())
        for bound in (*(stream.bound for stream in self.pump.streams), self.pump.index_bound):
            assert bound is not None
            bound.spare = agent.PAGE
        self.came: dict[str, list[tuple[int, int]]] = {
            "stdout": [],
            "stderr": [],
        }  # (offset, time) of each write
        self.written: dict[str, bytes] = {"stdout": b"", "stderr": b""}
        self.out, theirs = os.pipe()
        os.set_blocking(theirs, False)
        self.run = agent.Run(str(base), "x")
        self.theirs = open(theirs, "wb", 0)  # noqa: SIM115 - closed below
        self.follow = agent.Follower(self.run, {"times": True}, None, self.theirs)
        self.meanwhile: list[int] = []
        self.follow.look()
        self.parser = Parser()
        self.frames: list[Any] = []

    def write(self, number: int, size: int) -> None:
        stream = self.pump.streams[number]
        begin = len(self.written[stream.name])
        self.came[stream.name].append((begin, agent.now_ns()))
        data = ruled(begin, begin + size)
        os.write(self.ends[stream.name], data)
        self.written[stream.name] += data
        self.pump.drain(stream)

    def read(self, size: int) -> None:
        """Let the follower write, and read `size` bytes of its output."""
        self.follow.write()
        if select.select([self.out], [], [], 0)[0]:
            self.frames += self.parser.feed(os.read(self.out, size))

    def pread(self, fd: int, size: int, offset: int) -> bytes:
        """Read as os.pread does, but let the keeper work just before and just after the read."""
        stream = next(
            (
                number
                for number, name in enumerate(("stdout", "stderr"))
                if self.follow.files[name] == fd
            ),
            None,
        )
        if stream is None or not self.meanwhile:
            return PREAD(fd, size, offset)
        self.write(stream, self.meanwhile.pop())
        data = PREAD(fd, size, offset)
        if self.meanwhile:
            self.write(stream, self.meanwhile.pop())
        return data

    def rest(self) -> None:
        while self.follow.write() or select.select([self.out], [], [], 0)[0]:
            self.frames += self.parser.feed(os.read(self.out, 1 << 20))

    def close(self) -> None:
        files = (*self.files.values(), *self.ends.values(), *self.follow.files.values())
        for fd in (
            *files,
            self.out,
            self.follow.times.file,
            self.follow.watch.fd,
            self.run.directory,
        ):
            os.close(fd)
        self.theirs.close()


acts = st.lists(
    st.one_of(
        st.tuples(st.just("write"), st.integers(0, 1), st.integers(1, 30_000)),
        st.tuples(st.just("read"), st.sampled_from([1, 40, 4096, 70_000]), st.just(0)),
        st.tuples(st.just("pause"), st.sampled_from([1, 10, 30]), st.just(0)),
    ),
    max_size=60,
)


# An example makes a run's whole directory, which takes 30 ms. So there are fewer examples with more
# steps in each.
@settings(
    PROPERTY,
    max_examples=PROPERTY.max_examples // 5,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    acts=acts,
    meanwhile=st.lists(st.integers(1, 30_000), max_size=20),
    keep=st.sampled_from([1, 4096, 8192, 30_000, 1 << 20]),
)
def test_whatever_is_written_cut_and_read_in_whatever_order_a_reader_has_bytes_or_a_gap(
    tmp_path_factory, monkeypatch, acts, meanwhile, keep
):
    clock = [10**18]
    monkeypatch.setattr(agent, "now_ns", lambda: clock[0])
    small = Small(tmp_path_factory.mktemp("bounded"), keep)
    small.meanwhile = meanwhile
    monkeypatch.setattr(os, "pread", small.pread)
    try:
        for act, first, size in acts:
            if act == "write":
                small.write(first, size)
            elif act == "read":
                small.read(first)
            else:
                clock[0] += first * MS
            clock[0] += MS
        small.rest()
        at = {"stdout": 0, "stderr": 0}
        for frame in small.frames:
            if isinstance(frame, Output):
                assert frame.offset == at[frame.stream]
                assert frame.data == small.written[frame.stream][frame.offset : frame.end]
                # A byte's reported time is never later than its write, and earlier by no more than
                # the index's 10 ms.
                latest = max(
                    when for offset, when in small.came[frame.stream] if offset <= frame.offset
                )
                assert not frame.time_ns or latest - 20 * MS <= frame.time_ns <= latest
                at[frame.stream] = frame.end
            elif isinstance(frame, Gap):
                assert frame.start == at[frame.stream] < frame.end
                at[frame.stream] = frame.end
        assert at == {name: len(data) for name, data in small.written.items()}
        for stream in small.pump.streams:
            assert stream.bound is not None
            kept = stream.length() - stream.bound.head
            assert min(stream.length(), keep) <= kept <= max(keep, 1) + 3 * agent.PAGE + 30_000
            assert os.fstat(stream.file).st_blocks * 512 <= kept + 2 * agent.PAGE
        assert small.run.heads() == {
            **{each.name: each.bound.head for each in small.pump.streams if each.bound},
            "index": small.run.heads()["index"],
        }
    finally:
        monkeypatch.setattr(os, "pread", PREAD)
        small.close()
        shutil.rmtree(small.root)


def test_the_index_is_cut_as_well_and_what_is_left_of_it_is_true(tmp_path, monkeypatch):
    clock = [10**18]
    monkeypatch.setattr(agent, "now_ns", lambda: clock[0])
    small = Small(tmp_path, 8192)
    for number in range(4000):  # 64 kB of index records for 8 kB of bytes
        small.write(number % 2, 2)
        clock[0] += MS
    index = tmp_path / "runs" / "x" / "index"
    assert (
        index.stat().st_size == 4000 * agent.INDEX_RECORD.size
        and disk(index) <= 8192 + 3 * agent.PAGE
    )
    small.rest()
    outputs = [frame for frame in small.frames if isinstance(frame, Output)]
    timed = [frame for frame in outputs if frame.time_ns]
    assert 400 < len(timed) < 1000 and [frame.time_ns for frame in timed] == sorted(
        frame.time_ns for frame in timed
    )
    assert (
        b"".join(frame.data for frame in outputs if frame.stream == "stdout")
        == small.written["stdout"]
    )
    small.close()


# ---------------------------------------------------------------- limits


def limited(door: Door, script: str, limits: Mapping[str, Any]) -> dict[str, Any]:
    state = door.start(["sh", "-c", script], limits=limits)
    final = door.wait(state["prog_id"])
    return {**final, "said": door.file(state["prog_id"]).decode().split()}


@machine.EVERYWHERE
def test_each_limit_holds_in_the_program_and_not_for_its_guards(door):
    given = {
        "files": 100,
        "core": [0, 4096],
        "cpu": 90,
        "memory": 1 << 30,
        "nice": 19,
        "oom_score_adj": 500,
    }
    script = (
        "ulimit -Sn; ulimit -Sc; ulimit -Hc; ulimit -St; ulimit -Ht; ulimit -Sv; nice; cat "
        "/proc/self/oom_score_adj; cat /proc/$PPID/limits"
    )
    final = limited(door, script, given)
    assert final["said"][:8] == [
        "100",
        "0",
        "8",
        "90",
        str(90 + agent.CPU_GRACE_S),
        str(1 << 20),
        "19",
        "500",
    ]
    assert "100" not in final["said"][8:]
    assert final["program"]["limits"] == given


def test_unlimited_and_what_is_left_out_change_nothing(door):
    here = subprocess.check_output(["sh", "-c", "ulimit -Sn; ulimit -Hn"]).decode().split()
    assert limited(door, "ulimit -Sn; ulimit -Hn; ulimit -Sc", {"core": -1, "files": None})[
        "said"
    ] == [*here, "unlimited"]


@pytest.mark.parametrize(
    "limits, number, words",
    [
        ({"files": 1 << 40}, errno.EPERM, "limit files=1099511627776: "),
        ({"files": [1, 1 << 40], "nice": 3}, errno.EPERM, "limit files=1:1099511627776: "),
    ],
)
def test_a_limit_that_cant_be_set_is_why_nothing_was_started_and_is_named(
    door, limits, number, words
):
    state = door.start(["true"], limits=limits)
    assert (state["state"], state["reason"], state["pid"]) == ("not_started", "setup", None)
    assert (state["exception"]["stage"], state["exception"]["errno"]) == ("setup", number)
    assert state["exception"]["message"].startswith(words)


def test_an_ordinary_user_is_told_what_is_the_most_there_is():
    python = "/usr/bin/python3"
    if os.getuid() != 0 or not os.access(python, os.X_OK):
        pytest.skip(
            "needs root, which becomes another user, and a Python that every user may execute"
        )
    base = Path(tempfile.mkdtemp(prefix="corra-", dir="/tmp"))
    base.chmod(0o755)
    try:
        for door in fresh(
            base,
            user=NOBODY,
            python=python,
            prefix=["sh", "-c", 'ulimit -Sn 400; ulimit -Hn 500; exec "$@"', "sh"],
        ):
            os.chown(door.home, NOBODY, NOBODY)
            door.spool = door.home / "spool"
            state = door.start(["true"], limits={"files": 501})
            assert (
                state["exception"]["message"]
                == "limit files=501: Operation not permitted (at most 500 here)"
            )
            state = door.start(["true"], limits={"nice": -5})
            assert state["exception"]["message"].startswith("limit nice=-5: ")
            state = door.start(["sh", "-c", "ulimit -n"], limits={"files": 500})
            door.wait(state["prog_id"])
            assert door.file(state["prog_id"]) == b"500\n"
    finally:
        shutil.rmtree(base)


def test_who_uses_up_the_cpu_time_is_told_why(door):
    final = limited(door, "while :; do :; done", {"cpu": 1})
    assert (final["state"], final["signal"], final["reason"]) == ("exited", "SIGXCPU", "signaled")


def test_a_limit_of_memory_is_each_processs_address_space(door):
    script = (
        "python3 -c 'x = bytearray(600 << 20)' 2> /dev/null || echo no; python3 -c 'x = "
        "bytearray(60 << 20)' && echo yes"
    )
    assert limited(door, script, {"memory": 500 << 20})["said"] == ["no", "yes"]


@pytest.mark.parametrize(
    "limits, words",
    [
        ({"file": 1}, "no limit file: there are core cpu"),
        ({"files": "many"}, "files must be from -1"),
        ({"files": -2}, "files must be"),
        ({"files": []}, "files must be"),
        ({"files": [1, 2, 3]}, "files must be"),
        ({"files": [2, 1]}, "soft limit is above"),
        ({"files": [-1, 1]}, "soft limit is above"),
        ({"files": True}, "files must be"),
        ({"nice": 20}, "nice must be from -20 to 19"),
        ({"nice": [1, 2]}, "nice must be"),
        ({"oom_score_adj": 1001}, "oom_score_adj must be"),
        ({"memory_max": 0}, "memory_max must be"),
        ({"cpu_quota": -1}, "cpu_quota must be"),
    ],
)
def test_limits_that_mean_nothing_are_refused(door, limits, words):
    with pytest.raises(Refused) as refused:
        door.start(["true"], limits=limits)
    assert refused.value.kind == "bad_request" and words in str(refused.value)


def test_the_same_id_with_other_limits_is_another_program(door):
    door.start(["true"], prog_id="one", limits={"nice": 1})
    assert door.start(["true"], prog_id="one", limits={"nice": 1})["prog_id"] == "one"
    with pytest.raises(Refused) as refused:
        door.start(["true"], prog_id="one", limits={"nice": 2})
    assert refused.value.kind == "conflict"


def test_without_a_systemd_a_limit_on_the_whole_tree_is_a_clear_no(door):
    if os.path.isdir("/run/systemd/system"):
        pytest.skip("systemd runs this machine")
    for limits in ({"memory_max": 1 << 30}, {"cpu_quota": 50, "memory_max": 1 << 30}):
        with pytest.raises(Refused) as refused:
            door.start(["true"], limits=limits)
        assert refused.value.kind == "no_scope" and str(refused.value).startswith(
            " and ".join(sorted(limits))
        )
    assert not door.spool.exists()


def test_the_guards_of_a_limited_program_survive_what_it_may_not(door):
    state = door.start(["sh", "-c", "sleep 1000"], limits={"memory": 1 << 30, "files": 64})
    first = guards(state)
    kill(state["agent_pid"])
    eventually(lambda: door.status(state["prog_id"])["agent_pid"] in first[:2])
    assert door.stop(state["prog_id"], 5)["ended"]


# ---------------------------------------------------------------- what the operator sees


def test_many_gaps_are_said_once_and_summed_up_at_the_end(home: Path, tmp_path: Path) -> None:
    run = corra.start("local", ["true"], name="busy")
    run.wait()
    with (tmp_path / "said").open("w+b", 0) as said:
        watch = Watch(run.follow(), run, Screen(out=said.fileno(), err=said.fileno()))
        for at in range(0, 1000, 10):
            watch.show(Gap("stdout", at, at + 5))
        watch.show(Gap("stderr", 0, 2_000_000))
        watch.stay(live=False)
        said.seek(0)
        first, second, third = (
            line.partition("local: ")[2] for line in said.read().decode().splitlines()
        )
    assert first == "stdout from byte 0 to 5 is gone: 5 B"
    assert second == "stderr from byte 0 to 2000000 is gone: 2.0 MB"
    assert third == "stdout has 99 more gaps: 495 B"
