"""The lines that pass a filter, however the network cut them, and the filters' flags."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from conftest import Cli
from hypothesis import given, strategies as st

from corra.cli.readers import read_moment, read_patience, read_pattern
from corra.errors import Misuse
from corra.model.frames import Output
from corra.terminal.filters import FILTERED_LINE_MAX, Sieve
from properties import PROPERTY


def sift(sieve: Sieve, *outputs: Output) -> list[Output]:
    return [line for output in outputs for line in sieve.take(output)] + list(sieve.rest())


@PROPERTY
@given(
    st.lists(st.sampled_from([b"a", b"b", b"\n"]), max_size=60),
    st.lists(st.integers(0, 60), max_size=8),
)
def test_wherever_the_output_is_cut_the_same_lines_match(letters, cuts):
    data = b"".join(letters)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [Output("stdout", a, data[a:b], 5) for a, b in itertools.pairwise(edges)]
    got = sift(Sieve(re.compile(b"ab")), *pieces)
    assert [line.data for line in got] == [
        line for line in data.splitlines(keepends=True) if b"ab" in line
    ]
    assert all(data[line.offset : line.end] == line.data for line in got)


def test_a_line_is_as_old_as_its_first_byte():
    came = [
        Output("stdout", 0, b"on", 10),
        Output("stdout", 2, b"e\ntwo\n", 20),
        Output("stdout", 8, b"three\n", 30),
    ]
    assert [line.data for line in sift(Sieve(since_ns=20), *came)] == [b"two\n", b"three\n"]
    assert [line.data for line in sift(Sieve(until_ns=20), *came)] == [b"one\n", b"two\n"]


def test_streams_keep_their_lines_apart_and_output_without_a_time_is_shown():
    came = [
        Output("stdout", 0, b"ou", 0),
        Output("stderr", 0, b"err\n", 0),
        Output("stdout", 2, b"t\n", 0),
    ]
    assert [(line.stream, line.data) for line in sift(Sieve(since_ns=5, until_ns=6), *came)] == [
        ("stderr", b"err\n"),
        ("stdout", b"out\n"),
    ]


def test_once_something_came_later_than_asked_for_it_is_over():
    sieve = Sieve(until_ns=20)
    list(sieve.take(Output("stdout", 0, b"a\n", 20)))
    assert not sieve.over
    list(sieve.take(Output("stderr", 0, b"b\n", 21)))
    assert sieve.over


def test_a_line_without_end_is_judged_in_pieces():
    lines = sift(
        Sieve(re.compile(b"x")),
        *(Output("stdout", n << 16, b"x" * (1 << 16), 1) for n in range(40)),
    )
    assert [len(line.data) for line in lines] == [
        FILTERED_LINE_MAX,
        FILTERED_LINE_MAX,
        (40 << 16) - 2 * FILTERED_LINE_MAX,
    ]


def test_a_moment_is_read_in_every_way_that_the_help_names():
    now = time.time()
    assert abs(read_moment("10m") / 1e9 - (now - 600)) < 5
    assert (
        read_moment("2026-11-24T03:00:00Z")
        == read_moment("2026-11-24T04:00+01:00")
        == 1795489200 * 10**9
    )
    noon = datetime.now().astimezone().replace(hour=12, minute=30, second=0, microsecond=0)
    assert abs(read_moment("12:30") / 1e9 - noon.timestamp()) < timedelta(minutes=1).total_seconds()
    for bad in ("", "soon", "25:00", "2026-13-01"):
        with pytest.raises(Misuse, match="not a time"):
            read_moment(bad)


def test_what_is_no_expression_or_no_patience_is_misuse():
    with pytest.raises(Misuse, match="not a regular expression"):
        read_pattern("(")
    with pytest.raises(Misuse, match="too short"):
        read_patience("0.2s")


@pytest.fixture
def spoken(cli: Cli) -> Callable[..., list[bytes]]:
    """Make a run that wrote three lines, each at its own time; return a function that gives the
    lines that `logs` shows with these flags.
    """
    script = "echo one; sleep 0.1; echo two >&2; sleep 0.1; echo three"
    assert cli("run", "--host", "local", "--", "sh", "-c", script).returncode == 0

    def logs(*flags: str) -> list[bytes]:
        done = cli("logs", *flags)
        assert done.returncode == 0
        return sorted((done.stdout + done.stderr).splitlines())

    return logs


def test_logs_shows_what_matches_and_what_came_when(spoken: Callable[..., list[bytes]]) -> None:
    assert spoken("--grep", "^t") == [b"three", b"two"]
    stamped = {line.split()[1]: line.split()[0].decode() for line in spoken("-t")}
    assert spoken("--since", stamped[b"two"]) == [b"three", b"two"]
    assert spoken("--until", stamped[b"two"]) == [b"one", b"two"]
    assert spoken("--since", stamped[b"two"], "--until", stamped[b"two"]) == [b"two"]
    assert spoken("--since", "1h", "--grep", "o", "-f") == [b"one", b"two"]
    assert spoken("--until", "1h") == []
