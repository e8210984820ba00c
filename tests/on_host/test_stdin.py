"""A program's stdin that is held open: each byte once and in order, whichever client sends and
whichever guard is killed, until one lasting end.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, strategies as st

from agent_door import LATE, Door, Refused, Stream, alive, eventually, fresh, guards, kill
from corra import agent
from corra.model.frames import Taken
from properties import PROPERTY

OPEN = {"open": True}


def taken(stream: Stream) -> Taken:
    return next((frame for frame in reversed(stream.frames) if isinstance(frame, Taken)), Taken(-1))


def cat(door: Door, prog_id: str = "cat", **how: Any) -> dict[str, Any]:
    return door.start(["sh", "-c", "cat; echo end"], prog_id=prog_id, stdin=OPEN, **how)


def sender(door: Door, prog_id: str = "cat", number: int = 7) -> Stream:
    return door.follow(prog_id, sender=number)


# ---------------------------------------------------------------- the bytes that are sent


def test_what_is_sent_is_read_and_the_end_is_an_end(door):
    assert cat(door)["stdin"] == {"length": 0, "moved": 0, "ended": False}
    with sender(door) as stream:
        stream.send(b"I 0 6\nhello\n")
        stream.until_output(b"hello\n")
        stream.send(b"I 6 5\nthereE 11\n")
        stream.drain()
    assert stream.stdout() == b"hello\nthereend\n" and taken(stream) == Taken(11, ended=True)
    assert stream.states[-1]["stdin"] == {"length": 11, "moved": 11, "ended": True}
    assert door.file("cat", "stdin") == b"hello\nthere"


def test_what_is_sent_again_is_trimmed_and_a_hole_ends_the_link(door):
    cat(door)
    with sender(door) as stream:
        stream.send(b"I 0 4\nabcdI 2 4\ncdefI 0 3\nabc")
        stream.until_output(b"abcdef")
        stream.send(b"I 7 1\nx")
        stream.drain()
    assert door.status("cat")["stdin"]["length"] == 6
    door.stop("cat", grace=0)


def test_two_senders_lose_nothing_to_each_other_and_each_is_told_what_it_has_sent(door):
    cat(door)
    with sender(door, number=1) as one, sender(door, number=2) as two:
        one.send(b"I 0 2\na\n")
        one.until_output(b"a\n")
        two.send(b"I 0 2\nb\n")
        one.until_output(b"b\n")
        one.send(b"I 2 2\nc\n")
        one.until_output(b"c\n")
    with sender(door, number=1) as one, sender(door, number=2) as two:
        assert (
            taken(one.until(lambda each: taken(each).offset >= 0)).offset,
            taken(two.until(lambda each: taken(each).offset >= 0)).offset,
        ) == (4, 2)
        two.send(b"I 0 4\nb\nd\nE 4\n")
        two.drain()
    assert door.file("cat") == b"a\nb\nc\nd\nend\n"


def test_nothing_is_accepted_behind_the_end(door):
    cat(door)
    with sender(door, number=1) as one, sender(door, number=2) as two:
        one.send(b"I 0 2\na\nE 2\n")
        one.until(lambda each: taken(each).ended)
        two.send(b"I 0 1\nx")
        two.drain()
    # The end of stdin ends the program, so the link may end before it has answered.
    assert taken(two).offset <= 0 and (taken(two).ended or two.states[-1]["state"] == "exited")
    assert door.file("cat", "stdin") == b"a\n"


def test_who_has_closed_its_stdin_is_sent_nothing(door):
    door.start(["sh", "-c", "exec < /dev/null; echo ready; sleep 60"], prog_id="deaf", stdin=OPEN)
    with sender(door, "deaf") as stream:
        stream.until_output(b"ready")
        stream.send(b"I 0 1\nx")
        stream.until(lambda each: taken(each).closed)
    assert door.status("deaf")["state"] == "running"
    door.stop("deaf", grace=0)


def test_who_was_started_without_takes_none(door):
    for number, source in enumerate((None, "text")):
        door.start(["sleep", "60"], prog_id=f"n{number}", **({"stdin": source} if source else {}))
        with pytest.raises(Refused, match="its stdin is"):
            door.call("follow", {"prog_id": f"n{number}", "sender": 1})
        door.stop(f"n{number}", grace=0)


def test_what_comes_faster_than_it_is_read_waits_in_the_spool(door):
    size = 3 << 20
    gate = door.base / "gate"
    os.mkfifo(gate)
    door.start(["sh", "-c", f"read x < {gate}; exec md5sum"], prog_id="slow", stdin=OPEN)
    data = os.urandom(size)
    with sender(door, "slow") as stream:
        for at in range(0, size, 1 << 16):
            stream.send(b"I %d %d\n" % (at, 1 << 16) + data[at : at + (1 << 16)])
        stream.send(b"E %d\n" % size)
        stream.until(lambda each: taken(each) == Taken(size, ended=True))
        assert door.status("slow")["stdin"]["moved"] < size
        gate.write_text("go\n")
        stream.drain()
    assert stream.stdout().split()[0].decode() == hashlib.md5(data).hexdigest()


def test_a_sender_is_held_back_where_it_is_too_far_ahead_and_goes_on(tmp_path):
    for door in fresh(tmp_path, constants=LATE + "agent.AHEAD_MAX = 100000; "):
        gate = door.base / "gate"
        os.mkfifo(gate)
        door.start(["sh", "-c", f"read x < {gate}; exec wc -c"], prog_id="slow", stdin=OPEN)
        with sender(door, "slow") as stream:
            for at in range(0, 1 << 20, 1 << 16):
                stream.send(b"I %d %d\n" % (at, 1 << 16) + bytes(1 << 16))
            stream.send(b"P\nE %d\n" % (1 << 20))
            stream.until(lambda each: each.beats() > 0)
            assert door.status("slow")["stdin"]["length"] < 1 << 19
            gate.write_text("go\n")
            stream.drain()
        assert stream.stdout() == b"1048576\n"


# ---------------------------------------------------------------- guards that die


def fewer(door: Door, before: list[int]) -> None:
    """Wait until the agent knows that one of the guards is gone."""
    eventually(lambda: len(guards(door.status("cat"))) < len(before))


@pytest.mark.parametrize("victims", [[2], [1], [0], [2, 1], [1, 2], [0, 2]])
def test_no_guard_that_is_killed_is_an_end_and_no_byte_is_lost(door, victims):
    cat(door)
    with sender(door) as stream:
        stream.send(b"I 0 2\na\n")
        stream.until_output(b"a\n")
        at = 2
        for victim in victims:
            before = guards(door.status("cat"))
            kill(door.record("cat").guards[victim][0])
            fewer(door, before)
            stream.send(b"I %d 2\nb\n" % at)
            at += 2
            stream.until_output(b"a\n" + b"b\n" * (at // 2 - 1))
        stream.send(b"E %d\n" % at)
        stream.drain()
    assert (
        stream.stdout() == b"a\n" + b"b\n" * len(victims) + b"end\n"
        and stream.states[-1]["return_code"] == 0
    )


def test_an_end_holds_though_the_keeper_is_killed_before_all_is_read(door):
    gate = door.base / "gate"
    os.mkfifo(gate)
    door.start(["sh", "-c", f"read x < {gate}; cat; echo end"], prog_id="cat", stdin=OPEN)
    data = bytes(200_000)
    with sender(door) as stream:
        stream.send(b"I 0 %d\n" % len(data) + data + b"E %d\n" % len(data))
        stream.until(lambda each: taken(each).ended)
        kill(door.status("cat")["agent_pid"])
        gate.write_text("go\n")
        stream.drain()
    assert stream.stdout() == data + b"end\n"


def test_a_sender_that_is_killed_is_told_what_came_of_its_bytes(door):
    cat(door)
    data = bytes(range(256)) * 4096
    at = 0
    for _ in range(4):
        with door.popen("follow") as process:
            process.stdin.write(
                door.encode({"prog_id": "cat", "sender": 9})
                + b"I %d %d\n" % (at, len(data) - at)
                + data[at : at + 150_000]
            )
            process.stdout.readline()
            process.kill()
        with sender(door, number=9) as stream:
            at = taken(stream.until(lambda each: taken(each).offset >= 0)).offset
    with sender(door, number=9) as stream:
        stream.until(lambda each: taken(each).offset >= 0)
        while at < len(data):
            part = data[at : at + 65536]
            stream.send(b"I %d %d\n" % (at, len(part)) + part)
            at += len(part)
        stream.send(b"E %d\n" % at)
        stream.drain()
    assert door.file("cat") == data + b"end\n"


# ---------------------------------------------------------------- any senders, any order


def close(each: agent.Sender) -> None:
    os.close(each.file)
    os.close(each.senders)


sends = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 40), st.integers(0, 40), st.booleans()), max_size=30
)


@PROPERTY
@given(sends)
def test_whatever_is_sent_again_torn_or_at_once_each_senders_bytes_are_there_once_and_in_order(
    steps,
):
    """In each step a sender sends `size` bytes, from `back` bytes before the offset that it
    believes to have sent. Sometimes the sender is a new process.
    """
    with tempfile.TemporaryDirectory() as at:
        for name, data in (("stdin", b""), ("senders", agent.SENDER_RECORD.pack(0, 0, 0))):
            Path(at, name).write_bytes(data)
        run = SimpleNamespace(directory=os.open(at, os.O_RDONLY), request={"program": {}})
        try:
            theirs = {who: bytes((who * 80 + n) % 256 for n in range(4000)) for who in (1, 2, 3)}
            senders = {who: agent.Sender(run, who) for who in theirs}
            believed = dict.fromkeys(theirs, 0)
            expected = b""
            for index, back, size, anew in steps:
                who = index + 1
                if anew:
                    close(senders[who])
                    senders[who] = agent.Sender(run, who)
                    assert senders[who].accepted == believed[who]
                begin = max(0, believed[who] - back)
                senders[who].take(begin, theirs[who][begin : begin + size])
                if begin + size > believed[who]:
                    expected += theirs[who][believed[who] : begin + size]
                    believed[who] = begin + size
                with pytest.raises(ValueError, match="hole"):
                    senders[who].take(believed[who] + 1, b"x")
            assert Path(at, "stdin").read_bytes() == expected
            senders[1].take(believed[1], None)
            for who, each in senders.items():
                with pytest.raises(EOFError):
                    each.take(believed[who], b"x")
                close(each)
            assert agent.end_of_stdin(os.open(Path(at, "senders"), os.O_RDONLY)) == len(expected)
        finally:
            os.close(run.directory)


# ---------------------------------------------------------------- bytes that are dropped


def test_what_was_read_is_kept_unless_it_is_to_be_forgotten(door):
    for prog_id, forget in (("kept", False), ("gone", True)):
        cat(door, prog_id, run={"forget_stdin": True} if forget else None)
        with sender(door, prog_id) as stream:
            stream.send(b"I 0 7\nsecret\n")
            stream.until_output(b"secret\n")
            if forget:
                eventually(lambda: b"secret" not in door.file("gone", "stdin"))
            stream.send(b"I 7 5\nmore\nE 12\n")
            stream.drain()
        assert stream.stdout() == b"secret\nmore\nend\n"
    assert door.file("kept", "stdin") == b"secret\nmore\n"
    eventually(lambda: door.file("gone", "stdin") == bytes(12))


def test_its_stdin_is_closed_by_nobody_but_its_end(door):
    """The guards hold stdin open, so a client that leaves neither ends nor wakes the program."""
    state = cat(door)
    with sender(door) as stream:
        stream.send(b"I 0 2\na\n")
        stream.until_output(b"a\n")
    assert door.status("cat")["state"] == "running" and alive(state["pid"])
    os.kill(
        state["standby_pids"][0], signal.SIGURG
    )  # any process may send this signal: it means nothing before the end
    with sender(door) as stream:
        stream.send(b"I 2 2\nb\nE 4\n")
        stream.drain()
    assert stream.stdout() == b"a\nb\nend\n"


def test_what_comes_over_a_socket_is_read_where_a_pipe_s_is_spliced(door):
    """Some servers give a command a socket for stdin, and a person may give a file."""
    payload = os.urandom(300_000)
    ours, theirs = socket.socketpair()
    request = door.program(["md5sum"], prog_id="x", stdin={"bytes": len(payload)})
    with (
        theirs,
        subprocess.Popen(
            door.argv("start"), stdin=theirs.fileno(), stdout=subprocess.PIPE, env=door.env, cwd="/"
        ) as starter,
    ):
        with ours:
            ours.sendall(door.encode(request, payload))
        out, _ = starter.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1])["state"] in ("running", "exited")
    door.wait("x")
    assert door.file("x").split()[0].decode() == hashlib.md5(payload).hexdigest()
