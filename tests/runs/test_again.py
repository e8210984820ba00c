"""`again`: the same program once more, as its host has recorded it, in a run of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli, reached

import corra
from corra.errors import Misuse, NotStarted
from corra.model import ids
from corra.model.program import Program, Request
from corra.remote.agent_client import Agent
from corra.runs import starting

LOCAL = ("--host", "local")


@pytest.fixture(params=["local", "fabric", "chaperone"])
def target(request: pytest.FixtureRequest, home: Path) -> Iterator[Agent]:
    """This machine, the same machine through sshd, and through sshd by the chaperone with nothing
    on the host.
    """
    yield from reached(request)


def again(run: corra.Run, **how: Any) -> corra.Result:
    launch, _ = starting.again(run, **how)
    try:
        for _ in launch.follow():
            pass
    finally:
        launch.close()
    return launch.run.wait()


def test_words_directory_variables_stdin_limits_and_name_are_those_of_the_first(
    target: Agent, home: Path
) -> None:
    script = 'cat; echo "$PWD" "$ONE" "[$2]"; umask; exit 7'
    words = ["sh", "-c", script, "-", "--x", "two  words\n\udcff"]
    how: dict[str, Any] = {
        "cwd": str(home),
        "env": {"ONE": "ü 1"},
        "stdin": b"\0in\xff\n",
        "umask": 0o027,
        "name": "nightly",
    }
    first = corra.start(target, words, timeout=60, grace=3, stop_signal="INT", **how)
    before = first.wait()
    after = again(first)
    assert (after.stdout, after.exited) == (before.stdout, 7)
    assert "ü 1" in after.stdout
    assert after.prog_id != before.prog_id
    old, new = first.state(), corra.attach(after.prog_id).state()
    assert (new.name, new.argv, new.timeout, new.grace, new.stop_signal) == (
        "nightly",
        old.argv,
        60,
        3,
        old.stop_signal,
    )


def test_what_still_runs_is_not_started_again(home: Path) -> None:
    run = corra.start("local", ["sleep", "60"])
    try:
        with pytest.raises(NotStarted, match="it is still running"):
            starting.again(run)
    finally:
        run.kill(grace=0)
    assert len(corra.ps("local")) == 1


def test_a_secret_that_nobody_has_kept_must_be_given_again(target: Agent, home: Path) -> None:
    run = corra.start(target, ["sh", "-c", "echo $TOKEN"], secrets={"TOKEN": "s3cr3t-word"})
    run.wait()
    with pytest.raises(NotStarted) as caught:
        starting.again(run)
    assert caught.value.why == "nobody has kept its secret TOKEN"
    assert "--secret TOKEN" in caught.value.hint[0]
    assert again(run, secrets={"TOKEN": "another"}).stdout == "another\n"
    spools = [path for path in home.rglob("program.json") if b"s3cr3t-word" in path.read_bytes()]
    assert spools == []


def test_again_with_an_id_of_ones_own_happens_once(home: Path) -> None:
    mark = home / "ran"
    run = corra.start("local", ["sh", "-c", f"echo ran >> {mark}"])
    run.wait()
    assert [again(run, id="second").prog_id for _ in range(2)] == ["second", "second"]
    assert mark.read_text() == "ran\n" * 2


def test_bytes_for_stdin_that_are_gone_are_no_reason_to_start_without_them(home: Path) -> None:
    run = corra.start("local", ["cat"], stdin=b"dump")
    run.wait()
    (Path(run.state().spool or "") / "stdin").unlink()
    with pytest.raises(NotStarted, match="what it read is gone from the host"):
        starting.again(run)


def test_what_a_newer_corra_has_asked_for_is_not_left_out_in_silence() -> None:
    with pytest.raises(Misuse, match="its record says hologram"):
        Request.from_record({"program": {"argv": ["true"], "hologram": True}}, "x", origin={})
    with pytest.raises(Misuse, match="its record says hologram"):
        Request.from_record({"program": {"argv": ["true"]}, "run": {"hologram": 1}}, "x", origin={})


def test_a_record_means_the_request_it_was_written_from() -> None:
    program = Program(
        ("a", "\udcff"),
        "/x",
        {"A": "1", "B": None},
        ("PATH",),
        {"bytes": 3, "sha256": "x"},
        0o77,
        merge=True,
        limits={"core": 0},
    )
    asked = Request(
        "one",
        program,
        name="n",
        run={
            "timeout": 1.5,
            "grace": 2,
            "stop_signal": "HUP",
            "keep": 3,
            "keep_output": 1 << 20,
            "wait_children": True,
            "force": True,
        },
    )
    record = json.loads(json.dumps(asked.to_json()))
    assert Request.from_record(record, "one", origin={}) == asked


def test_the_verb_shows_it_as_run_does_and_takes_nothing_for_granted(cli: Cli) -> None:
    assert cli("run", *LOCAL, "--name", "job", "--", "sh", "-c", "echo out; exit 3").returncode == 3
    done = cli("again", "job")
    assert (done.returncode, done.stdout) == (3, b"out\n")
    detached = cli("again", "-d", "job")
    assert detached.returncode == 0 and ids.is_valid(detached.stdout.decode().strip())
    assert len(cli("ps", *LOCAL, "-a", "-q").stdout.split()) == 3
    dry = cli("again", "-R", "job")
    assert (dry.returncode, dry.stdout) == (0, b"") and b"would start: sh -c" in dry.stderr
    none = cli("again")
    assert (none.returncode, none.stderr) == (
        2,
        b"corra: NOT STARTED: again needs an id;  look: corra ps\n",
    )


def test_whoever_reported_to_a_collector_is_told_that_the_new_run_does_not(cli: Cli) -> None:
    run = cli.home / "program.json"
    callback = {"url": "http://127.0.0.1:9/", "token": "t0ken"}
    run.write_text(
        json.dumps(
            {
                "prog_id": "reported",
                "program": {"argv": ["true"]},
                "callback": callback,
                "config": {"timeout": 1},
            }
        )
    )
    control_ = corra.start(
        "local", ["true"], id="reported", callback=callback, callback_config={"timeout": 1}
    )
    control_.wait()
    done = cli("again", *LOCAL, "reported")
    assert done.returncode == 0
    assert (
        b"reported to http://127.0.0.1:9/, the new run won't: add --collector NAME" in done.stderr
    )
