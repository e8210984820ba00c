"""PROG-IDs."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, strategies as st

from corra.model import ids
from properties import PROPERTY

YEAR_9999 = 253402300799


@PROPERTY
@given(st.integers(0, YEAR_9999))
def test_a_made_id_is_valid_and_shows_the_first_six_of_its_tail(now_s):
    made = ids.new_id(now_s)
    assert ids.is_valid(made)
    assert len(made) == 25
    assert ids.short(made) == made[17:23]
    assert set(made[17:]) <= set(ids.ALPHABET)


@PROPERTY
@given(st.integers(0, YEAR_9999 - 1), st.integers(1, 10**6))
def test_ids_sort_by_the_second_they_were_made_in(now_s, later_s):
    assert ids.new_id(now_s) < ids.new_id(min(now_s + later_s, YEAR_9999))


def test_the_id_says_when_it_was_made_in_utc():
    assert ids.new_id(1795398249).startswith("20261123t014409z-")


def test_ten_thousand_ids_of_one_second_differ():
    assert len({ids.new_id(0) for _ in range(10_000)}) == 10_000


@PROPERTY
@given(st.text(max_size=70))
def test_a_valid_id_is_one_plain_file_name(text):
    if ids.is_valid(text):
        assert os.path.basename(text) == text
        assert text not in (".", "..")
        assert text.isascii() and text.isprintable() and len(text) <= 64
        assert not text.startswith(("-", "."))


@pytest.mark.parametrize(
    "text",
    ["", ".", "..", "-x", "_x", "a/b", "../a", "A", "a b", "a\n", "a\0", "é", "a" * 65, "a$b", "٣"],
)
def test_what_could_be_a_path_an_option_or_shell_syntax_is_no_id(text):
    assert not ids.is_valid(text)


@pytest.mark.parametrize("text", ["a", "0", "pay-20261123", "a..b", "a" * 64])
def test_an_id_given_by_a_person_is_shown_whole(text):
    assert ids.is_valid(text)
    assert ids.short(text) == text


def test_a_name_comes_before_the_id():
    made = "20261123t014409z-k7m2qxwp"
    assert ids.label(made) == "k7m2qx"
    assert ids.label(made, "migrate") == "migrate (k7m2qx)"
    assert ids.label("pay-1", "pay") == "pay (pay-1)"
