"""A diff in windows is a true diff, whatever the size of the window and of the pieces."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from corra.exports import comparison


def pieces(data: bytes, chance: random.Random) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        size = chance.choice([1, 7, 100, 5000])
        yield data[at : at + size]
        at += size


def lines_of(text: bytes) -> list[bytes]:
    return [each for each in re.split(rb"(?<=\n)", text) if each]


def patched(old: bytes, diff: bytes) -> bytes:
    """Apply a unified diff, as patch does."""
    source, made, at, sign = lines_of(old), [], 0, b""
    for line in diff.split(b"\n")[2:-1]:
        if hunk := re.fullmatch(rb"@@ -(\d+)(?:,(\d+))? \+\d+(?:,\d+)? @@", line):
            begin = int(hunk[1]) - (hunk[2] != b"0")
            made += source[at:begin]
            at = begin
        elif line.startswith(b"\\"):
            if sign != b"-":
                made[-1] = made[-1].removesuffix(b"\n")
        else:
            sign = line[:1]
            if sign == b"+":
                made.append(line[1:] + b"\n")
            else:
                assert source[at].removesuffix(b"\n") == line[1:]
                made += [source[at]] if sign == b" " else []
                at += 1
    return b"".join(made + source[at:])


@pytest.mark.parametrize("seed", [1809, *range(40)])
def test_a_diff_makes_the_second_output_of_the_first(seed, monkeypatch):
    chance = random.Random(seed)
    sizes = {"WINDOW_FIRST": (5, 30, 1000), "WINDOW_MAX": (100, 50_000)}
    sizes |= {"HUNK_MAX": (7, 10_000), "CHANGES_MAX": (0, 3, 300)}
    for name, choices in sizes.items():
        monkeypatch.setattr(comparison, name, chance.choice(choices))
    words = [b"a", b"b", b"", b"-x", b"+y", b"- z"][: chance.randint(1, 6)]
    words += [b"%d" % number for number in range(50)] if seed % 2 else []
    old = [chance.choice(words) for _ in range(chance.randint(0, 200))]
    new = list(old)
    for _ in range(chance.randint(0, 20)):
        at = chance.randint(0, len(new))
        if chance.random() < 0.5:
            new[at:at] = [chance.choice(words) for _ in range(chance.randint(1, 40))]
        else:
            del new[at : at + chance.randint(1, 30)]
    one, other = (b"\n".join(each) + b"\n" * chance.randint(0, 1) for each in (old, new))
    diff = b"".join(
        comparison.unified(pieces(one, chance), pieces(other, chance), names=("a", "b"))
    )
    assert bool(diff) == (one != other)
    assert patched(one, diff) == other


def test_a_long_piece_put_before_equal_lines_is_found_and_the_rest_is_equal():
    """With what was ignored all lines are alike, which difflib takes for junk."""
    one = b"line 1\n" * 20_000
    other = b"x\n" * 5000 + one
    ignored = [re.compile(rb"\d+")]
    diff = list(comparison.unified([one], [other], names=("a", "b"), ignored=ignored))
    assert sum(line.startswith(b"+x") for line in diff) == 5000
    assert not [line for line in diff if line.startswith(b"-") and not line.startswith(b"---")]


def test_an_output_with_a_zero_byte_is_binary():
    with pytest.raises(comparison.Binary):
        list(comparison.unified([b"a\n"], [b"\0\n"], names=("a", "b")))
