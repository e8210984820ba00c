"""Whatever a host answers, no verb breaks: each ends with a line and an exit code."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from invoke.exceptions import Exit

from corra.errors import CorraError
from corra.main import program
from corra.model.host import Host
from corra.model.state import State
from corra.remote.agent_client import Agent
from corra.remote.bootstrap import FIRST
from corra.remote.exchange import BadReply
from corra.runs import history
from corra.runs.digest import digests_of
from corra.runs.finding import attach
from corra.runs.run import Run
from corra.transport.pipes import Process
from hostile import SOME_ID, Answer, HostileHost, answers
from properties import PROPERTY

# A command line, and the verbs of the agent that it asks for.
VERBS = [
    ("ps", ["list"]),
    (f"status {SOME_ID}", ["status", "tree"]),
    (f"status --tree {SOME_ID}", ["status", "tree"]),
    (f"status --json {SOME_ID}", ["status", "tree"]),
    (f"logs {SOME_ID}", ["follow", "read", "status"]),
    (f"attach {SOME_ID}", ["follow", "status"]),
    (f"wait {SOME_ID}", ["follow", "status"]),
    (f"kill {SOME_ID}", ["stop", "status"]),
    (f"kill -s HUP {SOME_ID}", ["signal", "status"]),
    (f"send {SOME_ID} hi", ["follow"]),
    (f"again {SOME_ID}", ["status", "record", "run"]),
    (f"run --id {SOME_ID} -- true", ["run", "follow"]),
    (f"run -d --id {SOME_ID} -- true", ["start", "follow"]),
    ("gc -y", ["gc"]),
    ("doctor --place", ["examine", "list"]),
    (f"deliver {SOME_ID}", ["status", "deliver"]),
    ("book", ["list"]),
    ("book kernel OPS-1", ["read"]),
]
# The terminal and the fixtures keep their state over all examples, and no example depends on it.
MANY = settings(
    PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Hosts:
    """The host of every test here. The test sets the host's next answers before each verb."""

    answer: Answer

    def __call__(self, host: Any, **how: Any) -> HostileHost:
        return HostileHost(host, self.answer)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch, home: Path) -> Hosts:
    found = Hosts()
    monkeypatch.setattr("corra.remote.targets.choose_runner", found)
    return found


@pytest.mark.sampled
@pytest.mark.parametrize(("typed", "asks"), VERBS, ids=[typed for typed, _ in VERBS])
def test_no_answer_of_a_host_breaks_a_verb(
    hosts: Hosts,
    typed: str,
    asks: list[str],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @MANY
    @given(st.data())
    def tried(data: st.DataObject) -> None:
        words = typed.split()
        journal = words[0] == "book"
        # Draw all answers first: a verb may ask from another thread, where hypothesis can't draw.
        said = {verb: data.draw(answers(verb, journal=journal), label=verb) for verb in asks}
        hosts.answer = lambda verb, request: said[verb]
        line = [words[0], "--journal" if journal else "--host", "evil", *words[1:]]
        monkeypatch.setattr("sys.argv", ["corra", *line])
        with contextlib.suppress(Exit, SystemExit):
            program.run(["corra", *line], exit=False)
        assert "Traceback" not in capfd.readouterr().err

    tried()


@MANY
@given(answers("digest"), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))
def test_no_answer_of_a_host_breaks_a_fold(home: Path, said: bytes, more: dict[str, int]) -> None:
    """`more` is what a newer agent says."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
        reply = json.loads(said)
        for facts in reply["digests"].values():
            facts.update(more)
        said = json.dumps(reply).encode() + b"\n"
    run = Run(Agent(HostileHost(Host("evil"), lambda verb, request: said)), SOME_ID)
    with contextlib.suppress(CorraError):
        digests_of(run, State(prog_id=SOME_ID, state="exited"))


ID_OF_GOOD = "20261123t014409z-k7m2qxwp"
# A host as a program: it reads the first bytes of the exchange, and answers as the test says.
SPEAK = """
import json, os, sys, time
stdin, out = sys.stdin.buffer, sys.stdout.buffer
stdin.read({size})
out.write(b"corra 1 " + stdin.readline().split()[0] + b"\\n")
out.flush()
{then}
"""
DRIPS = "for _ in range(1000): out.write(b'{'); out.flush(); time.sleep(0.05)"
BRACES = "out.write(b'{\"runs\": [' + b'{},' * (79 * (1 << 20) // 3) + b'{}]}\\n')"
LIES = f"""out.write(b'{{"prog_id": "{ID_OF_GOOD}", "state": "exited", "name": "other"}}\\n')"""


class Speaking:
    """A host that is a program of this machine."""

    login = "me"
    remark = ""

    def __init__(self, then: str, host: str = "evil") -> None:
        self.host = Host(host)
        self._words = [sys.executable, "-c", SPEAK.format(size=len(FIRST), then=then)]

    def begin(self) -> None:
        pass

    def open(self, command: str) -> Process:
        return Process(self._words)

    def close(self) -> None:
        pass


def test_a_host_that_sends_a_byte_now_and_then_holds_a_verb_no_longer_than_one_that_is_silent(
    home: Path,
) -> None:
    began = time.monotonic()
    with pytest.raises(BadReply, match=r"protocol: [0-9]+ bytes in"):
        Agent(Speaking(DRIPS)).call("list", {}, timeout_s=2.0)
    assert time.monotonic() - began < 30  # the drip itself takes 50 s


def test_a_reply_of_many_small_values_is_refused_before_it_takes_memory(home: Path) -> None:
    script = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
from test_hostile_hosts import BRACES, Agent, Speaking
from corra.runs.finding import ps
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
(error,) = ps(Agent(Speaking(BRACES)))
assert "doesn't speak corra's protocol: more than" in error.line, error
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 400, "MB; 2,061 if each `{}` becomes a dictionary"


def test_an_answer_about_another_run_is_no_answer_and_history_keeps_the_host(home: Path) -> None:
    history.remember_run(history.Entry(ID_OF_GOOD, "good", "pay", state="running"))
    for ask in (
        lambda: attach("x", Agent(Speaking(LIES))),
        lambda: attach("pay", Agent(Speaking(LIES))),
    ):
        with pytest.raises(CorraError, match=r"asked for .*, it answers for"):
            ask()
    # Even if the command named the id itself, the run stays with the host that history knows.
    attach(ID_OF_GOOD, Agent(Speaking(LIES)))
    (entry,) = history.find_entries("pay")
    assert (entry.host, entry.state) == ("good", "running")


def test_one_bad_host_is_one_line_of_the_table(
    monkeypatch: pytest.MonkeyPatch, home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    said = {
        "evil": b"no protocol\n",
        "good": json.dumps(
            {"runs": [{"prog_id": ID_OF_GOOD, "state": "running", "name": "a\u202eb\u3164c"}]}
        ).encode()
        + b"\n",
    }
    monkeypatch.setattr(
        "corra.remote.targets.choose_runner",
        lambda host, **_: HostileHost(host, lambda verb, request: said[host.name]),
    )
    monkeypatch.setattr("sys.argv", ["corra", "ps", "--host", "evil,good"])
    with contextlib.suppress(Exit, SystemExit):
        program.run(["corra", "ps", "--host", "evil,good"], exit=False)
    shown = capfd.readouterr()
    assert "k7m2qx" in shown.out and "a\\u202eb\\u3164c" in shown.out
    assert [line for line in shown.err.splitlines() if "evil" in line] == [
        "corra: evil: doesn't speak corra's protocol: no JSON: b'no protocol'"
    ]
