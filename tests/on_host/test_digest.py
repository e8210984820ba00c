"""The verb digest: outputs are compared by their hashes, and nothing but output is hashed."""

from __future__ import annotations

import hashlib
import os
import subprocess

import pytest

import machine
from agent_door import Refused, eventually


def blake2b(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def ended(door, script: str, **how) -> str:
    prog_id = str(door.start(["sh", "-c", script], **how)["prog_id"])
    assert door.wait(prog_id)["state"] == "exited"
    return prog_id


@machine.EVERYWHERE
def test_the_digest_of_an_ended_run_is_that_of_each_stream_with_its_length(door):
    prog_id = ended(door, "printf hello; printf oh >&2; exit 3")
    found = door.call("digest", {"prog_id": prog_id})
    assert found["state"]["return_code"] == 3
    assert found["digests"] == {
        "stdout": {"start": 0, "end": 5, "length": 5, "blake2b": blake2b(b"hello")},
        "stderr": {"start": 0, "end": 2, "length": 2, "blake2b": blake2b(b"oh")},
    }


def test_a_run_that_goes_on_has_a_digest_of_a_range_only(door):
    state = door.ready("echo ready; cat /dev/zero >/dev/null")
    asked = {"prog_id": state["prog_id"]}
    with pytest.raises(Refused) as refused:
        door.call("digest", asked)
    assert refused.value.reply["error"] == "running"
    found = door.call("digest", {**asked, "stream": "stdout", "start": 1, "end": 5})
    assert found["digests"]["stdout"] == {
        "start": 1,
        "end": 5,
        "length": 5,
        "blake2b": blake2b(b"eady"),
    }
    for more in ({"stream": "stdout", "start": 0, "end": 7}, {"stream": "stdout", "start": 9}):
        with pytest.raises(Refused) as refused:
            door.call("digest", {**asked, **more})
        assert refused.value.reply["error"] == "no_range"
    for wrong in ({"start": 0, "end": 1}, {"stream": "output"}):
        with pytest.raises(Refused) as refused:
            door.call("digest", {**asked, **wrong})
        assert refused.value.reply["error"] in ("bad_request", "running")
    door.stop(state["prog_id"], grace=0)


def test_a_bounded_output_says_from_where_on_it_was_hashed(door):
    prog_id = ended(door, "seq 1 200000", run={"keep_output": 1 << 16})
    found = door.call("digest", {"prog_id": prog_id})["digests"]["stdout"]
    whole = b"".join(b"%d\n" % n for n in range(1, 200001))
    assert 0 < found["start"] < found["end"] == found["length"] == len(whole)
    assert found["blake2b"] == blake2b(whole[found["start"] :])


def test_a_removed_output_is_said_to_be_gone(door):
    prog_id = ended(door, "seq 1 1000")
    door.call("gc", {"ids": [prog_id]})
    found = door.call("digest", {"prog_id": prog_id})["digests"]["stdout"]
    assert found == {"start": 3893, "end": 3893, "length": 3893, "blake2b": blake2b(b"")}


def test_what_stragglers_write_after_the_end_is_not_hashed(door):
    go = door.base / "go"
    os.mkfifo(go)
    prog_id = ended(door, f"printf hello; (read x < {go}; printf late) & exit 0")
    go.write_text("\n")
    eventually(lambda: door.status(prog_id)["streams"]["stdout"]["late"] == 4)
    found = door.call("digest", {"prog_id": prog_id})["digests"]["stdout"]
    assert found == {"start": 0, "end": 5, "length": 5, "blake2b": blake2b(b"hello")}


def test_a_large_output_is_hashed_in_little_memory(door):
    size = 300 << 20
    prog_id = ended(door, f"head -c {size} /dev/zero")
    with subprocess.Popen(
        ["sh", "-c", 'ulimit -v 200000; exec "$@"', "sh", *door.argv("digest")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=door.env,
    ) as process:
        out, _ = process.communicate(door.encode({"prog_id": prog_id}))
    assert process.returncode == 0, out
    assert f'"length": {size}'.encode() in out
