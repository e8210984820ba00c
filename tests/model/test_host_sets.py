"""Sets of hosts: read as operators write them, kept in the written order, printed folded."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings, strategies as st

import corra
from corra.model.host_sets import (
    Chosen,
    Hosts,
    choose,
    fold,
    fold_in_order,
    no_groups,
    unfold,
)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("db1", ["db1"]),
        ("web[1-3],db1", ["web1", "web2", "web3", "db1"]),
        ("db1, web[1-2]", ["db1", "web1", "web2"]),
        ("web[1-4,9]", ["web1", "web2", "web3", "web4", "web9"]),
        ("rack[1-2]n[01-02]", ["rack1n01", "rack1n02", "rack2n01", "rack2n02"]),
        ("web[1-4]!web3", ["web1", "web2", "web4"]),
        ("ops@web[1-2]", ["ops@web1", "ops@web2"]),
        ("ops@web[1-2]:2222", ["ops@web1:2222", "ops@web2:2222"]),
        ("[::1]:22,web1", ["[::1]:22", "web1"]),
        ("[fe80::1%eth0]:22", ["[fe80::1%eth0]:22"]),
        ("web1,web1", ["web1"]),
        ("10.0.0.[8-11]", ["10.0.0.8", "10.0.0.9", "10.0.0.10", "10.0.0.11"]),
    ],
)
def test_a_set_is_read_in_the_order_it_was_written(text, names):
    assert list(corra.hosts(text)) == names


@pytest.mark.parametrize(
    "text", ["", ",", "web[1-", "web[1-3]!web[1-3]", "-oProxyCommand=x", "web[1-3] x"]
)
def test_what_is_no_set_of_hosts_is_misuse(text):
    with pytest.raises(corra.Misuse):
        corra.hosts(text)


def test_several_texts_are_one_set():
    assert list(corra.hosts(["db1", "web[1-2]"])) == ["db1", "web1", "web2"]


def test_a_set_is_told_folded_and_is_a_sequence_of_names():
    fleet = corra.hosts("web[1-6]")
    assert f"{fleet}" == "web[1-6]" and fleet[0] == "web1" and fleet[1:3] == corra.hosts("web[2-3]")
    assert ["drain", *fleet] == ["drain", "web1", "web2", "web3", "web4", "web5", "web6"]
    assert corra.fold(["web3", corra.Host("web1"), "db1"]) == "db1,web[1,3]"
    assert corra.fold([]) == "" and corra.fold(["[::1]:22", "web1"]) == "[::1]:22,web1"
    assert {fleet: 1}[Hosts(f"web{n}" for n in range(1, 7))] == 1


@pytest.mark.parametrize(
    ("sizes", "folded"),
    [
        ((1, 2, "100%"), ["web1", "web[2-3]", "web[4-6]"]),
        ((2,), ["web[1-2]", "web[3-4]", "web[5-6]"]),
        (("50%",), ["web[1-3]", "web[4-6]"]),
        (("1%",), ["web1", "web2", "web3", "web4", "web5", "web6"]),
        ((1, 99), ["web1", "web[2-6]"]),
    ],
)
def test_the_last_size_goes_on_until_all_had_their_turn(sizes, folded):
    assert [str(wave) for wave in corra.waves(corra.hosts("web[1-6]"), *sizes)] == folded


@pytest.mark.parametrize("size", [0, -1, "0", "x%", 1.5, True])
def test_a_wave_of_no_size_is_misuse(size):
    with pytest.raises(corra.Misuse):
        corra.waves(["a"], size)
    with pytest.raises(corra.Misuse):
        corra.waves(["a"])


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["web[1-4]", "!web3"], ["web1", "web2", "web4"]),
        (["!web3", "web[1-4]"], ["web1", "web2", "web4"]),
        (["web[1-4],!web3,web3"], ["web1", "web2", "web4"]),
        (["db1,web[1-4]!web[2-3]"], ["db1", "web1", "web4"]),
        (["web[1-4]&web[3-9]"], ["web3", "web4"]),
        (["web[1-3]^web[2-4]"], ["web1", "web4"]),
        (["web[1-9/4]"], ["web1", "web5", "web9"]),
        (["web[08-10]"], ["web08", "web09", "web10"]),
        (["@even,@odd,!@down"], ["web2", "web1"]),
        (["@pair[1-2]"], ["web2", "web4", "web1", "web3"]),
    ],
)
def test_what_is_excluded_stays_out_wherever_that_is_said(texts, names):
    groups = {
        "even": ["web2", "web4"],
        "odd": ["web[1,3]"],
        "down": ["web[3-4]"],
        "pair1": ["@even"],
        "pair2": ["@odd"],
    }
    assert list(choose(texts, groups.__getitem__).names) == names


@pytest.mark.parametrize(
    ("texts", "limit", "why"),
    [
        (["web[5-1]"], [], "not a range: [5-1] in 'web[5-1]': 5-1 ends before it begins"),
        (["web[a-c]"], [], "not a range: [a-c] in 'web[a-c]' (say [1-20], [01-20] or [1,3,5])"),
        (["db1,web[1-"], [], "not a set of hosts: 'web[1-': its brackets don't match, in 'db1,web"),
        (["web[01-1]"], [], "not a range: [01-1] in 'web[01-1]': 01-1 is padded in two ways"),
        (["web[1-99999999]"], [], "99999999 hosts in 'web[1-99999999]': at most 100000"),
        (["a[1-999]b[1-999]"], [], "998001 hosts in 'a[1-999]b[1-999]': at most 100000"),
        (["web[1-3]!"], [], "not a set of hosts: 'web[1-3]!': nothing behind the !"),
        (["&web1"], [], "not a set of hosts: '&web1': nothing before the &"),
        (["web[1-3]", "!web[1-9]"], [], "no host left: web[1-3] !web[1-9]"),
        (["web[1-3]"], ["db1"], "no host left: --limit db1 has none of web[1-3]"),
        (["@me"], [], "group @me contains itself: me"),
    ],
)
def test_a_bad_set_is_refused_with_what_is_wrong(texts, limit, why):
    with pytest.raises(corra.Misuse) as told:
        choose(texts, lambda name: [f"web1,@{name}"], limit=limit)
    assert told.value.why.startswith(why)


def test_a_limit_keeps_the_order_and_the_repetitions_of_what_it_limits():
    found = choose(["web[1-4],web2"], no_groups, limit=["web[2-3]"])
    assert found.names == ("web2", "web3", "web2")
    assert choose(["web[1-4]"], no_groups, limit=["!web2"]).names == ("web1", "web3", "web4")


def test_a_single_name_that_excludes_or_limits_nothing_is_told():
    found = choose(["web[1-4],!wbe3,!web[8-9]"], no_groups, limit=["web[1-2],db1"])
    assert found == Chosen(("web1", "web2"), ("wbe3", "db1"))


# Names with numbers in several places, padded or not, as sites have them.
_NUMBER = st.one_of(st.integers(0, 120).map(str), st.integers(0, 120).map("{:03}".format))
_NAME = st.builds(
    lambda parts, tail: "".join(parts) + tail,
    st.lists(
        st.tuples(st.sampled_from(["web", "r", "n-", "dc."]), _NUMBER).map("".join), max_size=3
    ),
    st.sampled_from(["x", "x.example.com", "db", "x:22"]),
)
_NAMES = st.lists(_NAME, min_size=1, max_size=40)


@settings(deadline=None)
@given(_NAMES)
def test_what_is_folded_unfolds_to_the_same_hosts(names):
    assert sorted(unfold(fold(names))) == sorted(set(names))
    assert unfold(fold_in_order(names)) == names


@settings(deadline=None)
@given(_NAMES, _NAMES, _NAMES)
def test_sets_obey_the_laws_of_sets(a, b, c):
    """Exclusion is a difference, a limit an intersection, and the order of exclusions is free."""

    def left(*texts, limit=()):
        try:
            return set(choose(list(texts), no_groups, limit=limit).names)
        except corra.Misuse:
            return set()

    def out(names):
        return ",".join(f"!{part}" for part in re.split(r",(?![^\[]*\])", fold(names)))

    assert left(fold(a), out(b)) == set(a) - set(b)
    assert left(out(b), fold(a), out(c)) == left(fold(a), out(c), out(b))
    assert left(fold(a), limit=[fold(b)]) == set(a) & set(b)
    assert left(fold(a), out(c), limit=[fold(b)]) == (set(a) - set(c)) & set(b)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["db1", "web1", "web2", "web3"], "db1,web[1-3]"),
        (["web9", "web10", "web11", "web2"], "web[9-11],web2"),
        (["web08", "web09", "web10", "web100"], "web[08-10,100]"),
        (["r1n1", "r1n2", "r1n3", "r2n1"], "r1n[1-3],r2n1"),
        (["web1", "web1"], "web1,web1"),
        (["[::1]:22", "[::2]:22", "[::3]:22"], "[::1]:22,[::2]:22,[::3]:22"),
    ],
)
def test_names_fold_in_their_order_where_one_number_grows(names, text):
    assert fold_in_order(names) == text
    assert unfold(text) == names


def test_hosts_with_several_numbers_fold_along_one_of_them():
    names = [f"r{rack}n{node:02}" for rack in (1, 2) for node in range(1, 11)]
    assert fold(names) == "r1n[01-10],r2n[01-10]"
    assert fold(f"web{n}.dc{dc}" for dc in range(1, 5) for n in (1, 2)) == (
        "web1.dc[1-4],web2.dc[1-4]"
    )
