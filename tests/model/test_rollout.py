"""What starts next: no order of facts starts anything beyond what a roll-out allows."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, strategies as st

from corra.errors import Misuse
from corra.model.rollout import (
    Done,
    Fact,
    Rules,
    Starts,
    Stop,
    Tally,
    Wait,
    What,
    next_starts,
    share_of,
    wave_sizes,
)
from properties import PROPERTY

OVER = (What.WELL, What.FAILED, What.LOST, What.UNREACHED, What.MAYBE)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
limits = st.none() | st.integers(0, 4)


@st.composite
def rolled(draw: st.DrawFn) -> tuple[Rules, list[Fact]]:
    """Rules, and facts in any order, doubled or missing."""
    rules = Rules(
        draw(sizes),
        draw(st.integers(1, 6)),
        max_fail=draw(limits),
        max_unreached=draw(limits),
        pause_s=draw(st.sampled_from([0.0, 5.0])),
        confirm=draw(st.booleans()),
        lost_stops=draw(st.booleans()),
    )
    kinds = st.sampled_from([each for each in What if each is not What.STOPPED])
    members = st.integers(0, rules.members - 1)
    facts = st.builds(Fact, kinds, members, st.integers(0, 30).map(float))
    return rules, draw(st.lists(facts, max_size=25))


def bad(rules: Rules, facts: list[Fact]) -> tuple[int, int]:
    """Return (failures, unreached), counted anew."""
    order = list(What)
    last: dict[int, What] = {}
    for fact in facts:
        if fact.what not in (What.NOW, What.CONFIRMED):
            last[fact.member] = max(last.get(fact.member, What.BEGUN), fact.what, key=order.index)
    unreached = sum(what is What.UNREACHED for what in last.values())
    failed = sum(what in (What.FAILED, What.LOST, What.MAYBE) for what in last.values())
    return failed + (unreached if rules.max_unreached is None else 0), unreached


@PROPERTY
@given(rolled())
def test_no_order_of_facts_starts_anything_beyond_a_threshold(
    given_: tuple[Rules, list[Fact]],
) -> None:
    rules, facts = given_
    decision = next_starts(rules, facts)
    failures, unreached = bad(rules, facts)
    if rules.max_fail is not None and failures > rules.max_fail:
        assert isinstance(decision, Stop)
    if rules.max_unreached is not None and unreached > rules.max_unreached:
        assert isinstance(decision, Stop)


@PROPERTY
@given(rolled())
def test_only_members_of_which_nothing_is_known_are_started_and_no_more_than_the_window(
    given_: tuple[Rules, list[Fact]],
) -> None:
    rules, facts = given_
    decision = next_starts(rules, facts)
    if isinstance(decision, Starts):
        known = {f.member for f in facts if f.what not in (What.NOW, What.CONFIRMED)}
        tally = Tally(rules)
        for fact in facts:
            tally.add(fact)
        assert decision.members
        assert not known & set(decision.members)
        assert tally.open + len(decision.members) <= rules.at_once
        assert len({rules.wave_of(member) for member in decision.members}) == 1


@PROPERTY
@given(rolled())
def test_a_wave_begins_when_all_of_the_wave_before_it_is_over(
    given_: tuple[Rules, list[Fact]],
) -> None:
    rules, facts = given_
    decision = next_starts(rules, facts)
    if isinstance(decision, Starts):
        tally = Tally(rules)
        for fact in facts:
            tally.add(fact)
        wave = rules.wave_of(decision.members[0])
        before = range(sum(rules.waves[:wave]))
        assert all(tally.of(member) in OVER for member in before)


@PROPERTY
@given(rolled(), st.randoms(use_true_random=False))
def test_the_order_and_the_number_of_facts_change_no_decision(
    given_: tuple[Rules, list[Fact]], random: object
) -> None:
    rules, facts = given_
    other = [*facts, *facts[::2]]
    random.shuffle(other)  # type: ignore[attr-defined]
    assert next_starts(rules, other) == next_starts(rules, facts)


@PROPERTY
@given(rolled(), st.integers(0, 25))
def test_after_a_stop_no_later_fact_starts_anything(
    given_: tuple[Rules, list[Fact]], at: int
) -> None:
    rules, facts = given_
    some = [*facts[:at], Fact(What.STOPPED, at=1.0, why="ops said so"), *facts[at:]]
    assert next_starts(rules, some) == Stop("ops said so")


@PROPERTY
@given(rolled(), st.data())
def test_a_roll_out_that_hears_of_every_end_comes_to_an_end(
    given_: tuple[Rules, list[Fact]], data: st.DataObject
) -> None:
    """Every member is started once, or the roll-out stops for a reason."""
    rules, _ = given_
    facts: list[Fact] = []
    started: list[int] = []
    for at in itertools.count():
        match next_starts(rules, facts):
            case Starts(members):
                started += members
                ends = data.draw(st.lists(st.sampled_from(OVER), min_size=len(members)))
                facts += [Fact(What.BEGUN, each, at) for each in members]
                facts += [Fact(e, m, at) for m, e in zip(members, ends, strict=False)]
            case Wait(until=until, confirm=wave):
                assert until is not None or wave is not None
                facts += [Fact(What.NOW, at=until)] if until is not None else []
                facts += [Fact(What.CONFIRMED, wave)] if wave is not None else []
            case Done():
                assert sorted(started) == list(range(rules.members))
                break
            case Stop():
                assert len(set(started)) == len(started)
                break


def test_a_failure_counts_while_its_wave_runs() -> None:
    rules = Rules((10,), at_once=2, max_fail=1)
    facts = [Fact(What.BEGUN, 0), Fact(What.BEGUN, 1), Fact(What.FAILED, 0)]
    assert next_starts(rules, facts) == Starts((2,))
    assert next_starts(rules, [*facts, Fact(What.FAILED, 1)]) == Stop("2 of 10 failed")


def test_a_wave_that_fails_wholly_is_nothing_special() -> None:
    rules = Rules((1, 1, 1), at_once=5, max_fail=2)
    assert next_starts(rules, [Fact(What.FAILED, 0), Fact(What.FAILED, 1)]) == Starts((2,))


def test_the_pause_is_counted_from_the_last_end_of_a_wave() -> None:
    rules = Rules((2, 1), at_once=5, pause_s=30.0)
    facts = [Fact(What.WELL, 0, 100.0), Fact(What.WELL, 1, 90.0), Fact(What.NOW, at=120.0)]
    assert next_starts(rules, facts) == Wait(until=130.0)
    assert next_starts(rules, [*facts, Fact(What.NOW, at=130.0)]) == Starts((2,))


def test_a_wave_that_has_begun_waits_for_no_second_yes() -> None:
    rules = Rules((1, 2), at_once=5, confirm=True)
    assert next_starts(rules, [Fact(What.WELL, 0)]) == Wait(confirm=1)
    assert next_starts(rules, [Fact(What.WELL, 0), Fact(What.BEGUN, 2)]) == Starts((1,))


def test_one_lost_member_stops_what_says_so() -> None:
    rules = Rules((3,), at_once=1, max_fail=5, lost_stops=True)
    assert next_starts(rules, [Fact(What.LOST, 0)]) == Stop("1 of 3 lost")


@pytest.mark.parametrize(
    ("sizes", "found"),
    [
        ([5], (5,) * 10),
        (["10%"], (5,) * 10),
        ([1, "10%", "50%", "100%"], (1, 5, 25, 19)),
        (["1%"], (1,) * 50),
        (["100%"], (50,)),
        (["20"], (20, 20, 10)),
    ],
)
def test_a_size_is_a_number_or_a_share_of_all_members(
    sizes: list[int | str], found: tuple[int, ...]
) -> None:
    assert wave_sizes(50, sizes) == found


@pytest.mark.parametrize("size", [0, "0", "x", "10 %", "-1", 1.5, True])
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with pytest.raises(Misuse):
        wave_sizes(5, [size])


def test_a_share_is_rounded_down_and_is_at_least_one() -> None:
    assert [share_of("10%", total) for total in (1, 9, 10, 19, 20)] == [1, 1, 1, 1, 2]
