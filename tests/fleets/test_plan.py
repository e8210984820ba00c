"""The Plan of a fleet: a value that travels whole, keeps its order, and is read with suspicion."""

from __future__ import annotations

import base64
import json
import zlib
from collections import Counter

import pytest
from hypothesis import given, strategies as st

from corra.errors import Misuse
from corra.fleets.plan import (
    MOST,
    ORDERS,
    Plan,
    members_of,
    new_plan,
    plan_lines,
    plan_words,
    unfolded,
)
from corra.model import ids
from corra.model.host_sets import fold_in_order
from properties import PROPERTY

ID = "20261201t120000z-k7m2qxwp"
names = st.builds(
    lambda head, number, tail: f"{head}{number}{tail}",
    st.sampled_from(["web", "db-", "n", "10.0.0."]),
    st.sampled_from(["1", "2", "3", "5", "9", "10", "11", "07", "08"]),
    st.sampled_from(["", ".dc1", ":2201"]),
)


def plan(count: int = 50, **how: object) -> Plan:
    members = [f"web{number}" for number in range(1, count + 1)]
    return new_plan(members, id=ID, program="0" * 32, **how)  # type: ignore[arg-type]


@PROPERTY
@given(st.lists(names, max_size=12, unique=True), st.sampled_from(ORDERS))
def test_a_plan_that_has_travelled_is_the_same_plan(members: list[str], order: str) -> None:
    if not members:
        return
    canary = members[-1:]
    made = new_plan(members, id=ID, program="0", order=order, canary=canary, batch=["10%"])
    assert Plan.from_text(made.to_text()) == made
    assert sorted(made.members) == sorted(members)
    assert made.members[0] == canary[0]


@PROPERTY
@given(st.lists(names, max_size=12))
def test_folded_members_keep_their_order(found: list[str]) -> None:
    members = members_of(found)
    assert unfolded(fold_in_order(members)) == members


@pytest.mark.parametrize(
    ("members", "text"),
    [
        (["web1", "web2", "web3", "web9"], "web[1-3,9]"),
        (["web3", "web2", "web1"], "web3,web2,web1"),
        (["db1", "web1", "web2", "web3"], "db1,web[1-3]"),
        (["n08", "n09", "n10"], "n[08-10]"),
        (["n8", "n9", "n10", "n11"], "n[8-11]"),
        (["h1.dc1", "h2.dc1", "h3.dc1", "h3.dc2"], "h[1-3].dc1,h3.dc2"),
    ],
)
def test_members_fold_in_the_order_of_their_starts(members: list[str], text: str) -> None:
    assert fold_in_order(members) == text
    assert unfolded(text) == tuple(members)


@pytest.mark.parametrize("order", ORDERS)
def test_the_plan_of_five_hundred_hosts_takes_little(order: str) -> None:
    made = plan(500, order=order, batch=[1, "10%", "50%"], name="restart", by="ops@laptop")
    assert len(base64.urlsafe_b64decode(made.to_text())) < 400


def test_a_plan_that_would_not_travel_is_refused_at_once() -> None:
    members = [ids.new_id() for _ in range(2000)]
    with pytest.raises(Misuse, match="bytes, and at most 4096"):
        new_plan(members, id=ID, program="0").to_text()


@pytest.mark.parametrize(
    "spoiled",
    [
        {"members": "web[1-999999999]"},
        {"members": "a[1-2][1-2]"},
        {"members": "a b"},
        {"members": ""},
        {"waves": [[1, 49]]},
        {"waves": [[1 << 19, 1], [1, 50]]},
        {"id": "../x"},
        {"at_once": 0},
        {"at_once": "x"},
        {"program": None},
    ],
)
def test_what_is_no_plan_is_refused(spoiled: dict[str, object]) -> None:
    value = {**plan().to_json(), **spoiled}
    text = base64.urlsafe_b64encode(zlib.compress(json.dumps(value).encode())).decode()
    with pytest.raises(ValueError):
        Plan.from_text(text)


@pytest.mark.parametrize("text", ["", "x", "AAAA", "é"])
def test_foreign_bytes_are_no_plan(text: str) -> None:
    with pytest.raises(ValueError):
        Plan.from_text(text)


def test_a_plan_that_inflates_without_end_is_refused() -> None:
    bomb = zlib.compress(b" " * (64 << 20), 9)
    assert len(bomb) < MOST * 20
    with pytest.raises(ValueError):
        Plan.from_text(base64.urlsafe_b64encode(bomb).decode())


def test_the_ids_of_runs_follow_from_the_fleet_the_member_and_the_attempt() -> None:
    made = plan(3)
    found = Counter(made.run_id(m, attempt) for m in made.members for attempt in (1, 2))
    assert len(found) == 6
    assert made.run_id("web1") == Plan.from_text(made.to_text()).run_id("web1", 1)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({}, "50 hosts, 32 at once"),
        ({"at_once": 50}, "50 hosts"),
        ({"batch": ["10%"]}, "50 hosts in 10 waves of 5; stops at the 1st failure"),
        (
            {"batch": ["10%"], "max_fail": 2},
            "50 hosts in 10 waves of 5; stops at the 3rd failure",
        ),
        (
            {"batch": [1, "10%", "50%"], "max_fail": "10%", "pause_s": 30.0},
            "50 hosts in 4 waves (1, 5, 25, 19); stops at the 6th failure; 30 s between waves",
        ),
        (
            {"canary": ["web7"], "max_fail": 0, "max_unreached": 3, "confirm": True},
            (
                "50 hosts in 2 waves (1, 49), 32 at once; stops at the 1st failure;"
                " stops at the 4th unreached host; asks before each wave but the first"
            ),
        ),
    ],
)
def test_a_plan_says_its_numbers(how: dict[str, object], words: str) -> None:
    assert plan_words(plan(**how)) == words  # type: ignore[arg-type]


def test_a_share_is_one_of_the_plan_also_behind_the_canary() -> None:
    made = plan(canary=["web7"], batch=["50%"])
    assert made.waves == (1, 25, 24)
    assert made.members[:3] == ("web7", "web1", "web2")
    assert plan_lines(made)[:2] == [
        "  wave 1      1  web7",
        "  wave 2     25  web[1-6,8-26]",
    ]


@pytest.mark.parametrize("how", [{"max_fail": "x"}, {"max_fail": -1}, {"canary": ["db1"]}])
def test_what_makes_no_plan_is_a_misuse(how: dict[str, object]) -> None:
    with pytest.raises(Misuse):
        plan(**how)  # type: ignore[arg-type]


def test_a_host_has_one_member_for_each_time_that_it_is_given() -> None:
    assert members_of(["web1", "db1", "web1"]) == ("web1", "db1", "web1#2")
