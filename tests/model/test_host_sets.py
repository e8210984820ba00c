"""Sets of hosts: read as operators write them, kept in the written order, printed folded."""

from __future__ import annotations

import pytest

import corra
from corra.model.host_sets import Hosts


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
