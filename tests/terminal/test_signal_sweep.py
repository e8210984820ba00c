"""TERM at each system call of a client, of any of its threads: no moment swallows it.

The program gets the signal, or the client is gone and has told what it knows of the program.
CORRA_SWEEP_POINTS says at how many calls; the seed, at which.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from conftest import COLD, ROOT, Cli

from tracing import Signalled, signalled

POINTS = int(os.environ.get("CORRA_SWEEP_POINTS") or 3)
SEED = int(os.environ.get("CORRA_SEED") or int.from_bytes(os.urandom(3), "big"))
# It ends by itself long after any client that has heard the signal has left.
SLEEPS_S = 4
SLEEPER = ["sh", "-c", f"sleep {SLEEPS_S}; exit 42"]
PROMPT_S = 2.0
LOCAL = ("--host", "local")
FATES = ("STILL RUNNING", "MAYBE STARTED", "FAILED", "KILLED")

pytestmark = [pytest.mark.storm, pytest.mark.timeout(600)]


def points(whole: int, share: float) -> range:
    """Return the stops to try, in the last `share` of all: before those the client imports."""
    begin = int(whole * (1 - share))
    stride = max(1, (whole - begin) // POINTS)
    print(f"CORRA_SEED={SEED}: {whole} stops, from {begin + SEED % stride} on each {stride}th")
    return range(begin + SEED % stride, whole, stride)


def swept(cli: Cli, *words: str, point: int = 1 << 30, deadline_s: float = 60.0) -> Signalled:
    """Run corra and send it a TERM at a stop, or none."""
    return signalled(
        [*COLD, *words],
        signal.SIGTERM,
        point,
        threads=True,
        deadline_s=deadline_s,
        PYTHONPATH=str(ROOT),
    )


def state_of(cli: Cli, prog_id: str, *where: str) -> dict[str, Any] | None:
    """Return the State, None where no run of that id exists."""
    told = json.loads(cli("status", "--json", *where, prog_id).stdout)
    return told if told["type"] == "state" else None


def wrong_with(found: Signalled, state: dict[str, Any] | None, *, detached: bool) -> str:
    """Return what is wrong with a `run` that got a TERM, or nothing."""
    told = [each["signal"] for each in (state or {}).get("signals_sent", ())]
    said = found.err.decode() + (found.out.decode() if detached else "")
    if found.code == 128 + signal.SIGTERM:
        return "" if "SIGTERM" in told else "it says KILLED, and the program got no TERM"
    if state is None:
        return "" if found.code == -signal.SIGTERM else "nothing was started"
    if "NOT STARTED" in said:
        return "it says NOT STARTED, and it was"
    if not (any(fate in said for fate in FATES) or (detached and state["prog_id"] in said)):
        return "it has left without a word of the program"
    if found.took_s > PROMPT_S and "SIGTERM" not in told:
        return "the signal was swallowed"
    return "" if found.code in (-signal.SIGTERM, 42, 0) else "another code"


@pytest.mark.parametrize("kind", ["run", "run -d", "run over ssh", "run by the chaperone"])
def test_a_term_to_run_reaches_the_program_or_ends_us_with_its_fate_told(
    cli: Cli, request: pytest.FixtureRequest, kind: str
) -> None:
    where: tuple[str, ...] = LOCAL
    if kind in ("run over ssh", "run by the chaperone"):
        request.getfixturevalue("sshd")
        where = ("--host", "h", *(["--via", "chaperone"] if "chaperone" in kind else []))
    run = ["run", *(["-d"] if kind == "run -d" else []), *where]
    untouched = swept(cli, *run, "--", "true")
    assert untouched.code == 0
    wrong = []
    for point in points(untouched.stops, 0.2):
        prog_id = f"at-{point}"
        found = swept(cli, *run, "--id", prog_id, "--", *SLEEPER, point=point)
        state = state_of(cli, prog_id, *where)
        said = wrong_with(found, state, detached=kind == "run -d")
        if found.was_sent and said:  # no run makes the same calls as the one that was counted
            wrong.append((point, said, found, state and state["signals_sent"]))
    assert wrong == []


@pytest.fixture
def sleeper(cli: Cli) -> Iterator[str]:
    """A run that sleeps for longer than the test takes."""
    yield cli("run", "-d", *LOCAL, "--", "sleep", "1000").stdout.decode().strip()
    cli("kill", "-9", "-y", "-a", *LOCAL)


@pytest.mark.parametrize("verb", ["attach", "wait", "logs -f"])
def test_a_term_to_a_verb_that_watches_ends_it_and_leaves_the_program_alone(
    cli: Cli, sleeper: str, verb: str
) -> None:
    words = [*verb.split(), sleeper]
    untouched = swept(cli, *words, deadline_s=5)
    wrong = []
    for point in points(untouched.stops, 0.2):
        found = swept(cli, *words, point=point, deadline_s=10)
        if found.was_sent and (found.code != -signal.SIGTERM or found.took_s > PROMPT_S):
            wrong.append((point, found))
    state = state_of(cli, sleeper)
    assert wrong == []
    assert state is not None and (state["state"], state["signals_sent"]) == ("running", [])


def test_a_term_to_kill_ends_it_with_a_word_of_an_order_that_was_given(cli: Cli) -> None:
    def started() -> str:
        return cli("run", "-d", *LOCAL, "--", "sleep", "1000").stdout.decode().strip()

    untouched = swept(cli, "kill", started())
    assert untouched.code == 0
    wrong = []
    for point in points(untouched.stops, 0.2):
        prog_id = started()
        found = swept(cli, "kill", prog_id, point=point)
        state = state_of(cli, prog_id)
        assert state is not None
        if not found.was_sent:
            continue
        given = bool(state["signals_sent"])
        if found.code not in (0, -signal.SIGTERM) or found.took_s > PROMPT_S:
            wrong.append((point, "not gone", found))
        if given and not found.err:
            wrong.append((point, "no word of the order", found))
    cli("kill", "-9", "-y", "-a", *LOCAL)
    assert wrong == []


def test_a_term_to_a_fleet_ends_us_at_once_and_tells_what_was_begun(cli: Cli) -> None:
    fleet = ("run", "--name", "fleet", "--each", "--host", "local,local")
    untouched = swept(cli, *fleet, "--", "true")
    assert untouched.code == 0
    wrong = []
    for point in points(untouched.stops, 0.2):
        found = swept(cli, *fleet, "--", *SLEEPER, point=point)
        shown = cli("ps", "--json", "--state", "running", *LOCAL).stdout
        begun = [line for line in shown.splitlines() if json.loads(line)["type"] == "state"]
        left = found.code == -signal.SIGTERM and found.took_s < PROMPT_S
        if found.was_sent and not left:
            wrong.append((point, "not gone", found))
        if found.was_sent and begun and b"fleet" not in found.err:
            wrong.append((point, "no word of what was begun", found))
        cli("kill", "-9", "-y", "-a", *LOCAL)
    assert wrong == []
