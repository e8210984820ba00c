"""A host that answers what it likes never breaks a verb: each ends with a line and a code."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from invoke.exceptions import Exit

from corra.main import program
from hostile import SOME_ID, Answer, HostileHost, answers
from properties import PROPERTY

# A command line, and what it asks the host.
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
# The terminal's and the fixtures' state lasts for all examples, and none of them depends on it.
MANY = settings(
    PROPERTY, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


class Hosts:
    """Every host of these tests; what the next one answers is set before each verb."""

    answer: Answer

    def __call__(self, host: Any, **how: Any) -> HostileHost:
        return HostileHost(host, self.answer)


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch, home: Path) -> Hosts:
    found = Hosts()
    monkeypatch.setattr("corra.remote.targets.choose_runner", found)
    return found


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
        # All at once: a verb may ask from another thread, where nothing can be drawn.
        said = {verb: data.draw(answers(verb, journal=journal), label=verb) for verb in asks}
        hosts.answer = lambda verb, request: said[verb]
        line = [words[0], "--journal" if journal else "--host", "evil", *words[1:]]
        monkeypatch.setattr("sys.argv", ["corra", *line])
        with contextlib.suppress(Exit, SystemExit):
            program.run(["corra", *line], exit=False)
        assert "Traceback" not in capfd.readouterr().err

    tried()
