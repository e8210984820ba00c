"""A line behind a host's name looks as it would on a terminal of its own."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from corra.terminal.looks import settled


@pytest.mark.parametrize(
    ("line", "looks"),
    [
        (b"plain", b"plain"),
        (b"10%\r50%\r100%", b"100%"),
        (b"abcdef\rxy", b"xycdef"),
        (b"abcdef\rxy\x1b[K", b"xy"),
        (b"100%\r", b"100%"),
        (b"ab\b\bxy", b"xy"),
        (b"abc\x1b[2Kz", b"   z"),
        (b"a\x1b[3Cb\x1b[1Gz", b"z   b"),
        (b"\x1b[31mred\x1b[0m", b"\x1b[31mred\x1b[0m"),
        (b"\x1b[31mred", b"\x1b[31mred\x1b[0m"),
        (b"x\x1b[2J\x1b[Hy", b"xy"),
        (b"\xff\r\xfe", b"\xfe"),
    ],
)
def test_a_line_is_shown_as_it_looks_in_the_end(line: bytes, looks: bytes) -> None:
    assert settled(line).replace(b"\x1b[0m", b"") == looks.replace(b"\x1b[0m", b"")


_PARTS = st.sampled_from(
    [
        b"a",
        b"bc",
        b"\r",
        b"\b",
        b"\x1b[K",
        b"\x1b[1K",
        b"\x1b[3C",
        b"\x1b[2D",
        b"\x1b[G",
        b"\x1b[2P",
    ]
)


@settings(deadline=None)
@given(st.lists(_PARTS, max_size=30))
def test_it_is_what_a_terminal_shows(parts: list[bytes]) -> None:
    pyte = pytest.importorskip("pyte")
    screen = pyte.Screen(200, 1)
    pyte.ByteStream(screen).feed(b"".join(parts))
    assert settled(b"".join(parts)).decode().rstrip() == screen.display[0].rstrip()
