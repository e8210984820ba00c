"""A lent terminal: the keys that leave it, the modes that corra switches off in it, and the old
questions that it isn't asked again.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies as st

from corra.agent import switched
from corra.errors import Misuse
from corra.terminal.leave_keys import Keys, detach_keys, shown
from corra.terminal.program_modes import ProgramModes, Replay
from properties import EXACTLY_ONCE, PROPERTY

CANCEL = b"\x18\x1b\\"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    """Return `data` in pieces, cut at the `places` that lie within it."""
    at = [0, *sorted({place for place in places if 0 < place < len(data)}), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(at)]


# ---------------------------------------------------------------- the keys


@pytest.mark.parametrize(
    ("text", "keys", "said"),
    [
        ("ctrl-]", b"\x1d", "Ctrl-]"),
        ("ctrl-p,ctrl-q", b"\x10\x11", "Ctrl-P Ctrl-Q"),
        ("ctrl-a,d", b"\x01d", "Ctrl-A d"),
        ("none", b"", ""),
    ],
)
def test_keys_are_read_as_people_write_them_and_said_so_again(
    text: str, keys: bytes, said: str
) -> None:
    assert detach_keys(text) == keys and shown(keys) == said


@pytest.mark.parametrize("text", ["", "ctrl", "ctrl-ä", "ctrl-]]", "a,,b"])
def test_what_is_no_key_is_a_misuse(text: str) -> None:
    with pytest.raises(Misuse, match="not keys"):
        detach_keys(text)


def test_the_keys_are_found_where_they_come_one_by_one_and_half_of_them_is_the_programs() -> None:
    keys = Keys(b"\x10\x11")
    assert keys.take(b"a\x10") == (b"a", False)
    assert keys.take(b"b\x10") == (b"\x10b", False)
    assert keys.take(b"\x11c") == (b"", True)
    assert Keys(b"").take(b"\x1d") == (b"\x1d", False)


@pytest.mark.parametrize(
    ("keys", "typed"),
    [
        (b"\x1d", b"\x1b[27;5;93~"),  # modifyOtherKeys 2, as vim asks for it
        (b"\x1d", b"\x1b[93;5u"),  # kitty's encoding, as neovim and fish ask for it
        (b"\x1d", b"\x1b[93;133u"),  # with Num Lock
        (b"\x1d", b"\x1b[93;5:1u"),  # with the kind of event
        (b"\x1d", b"\x1b[43:93;5u"),  # on a keyboard where the key has another sign without Shift
        (b"\x1e", b"\x1b[54:94;6u"),
        (b"\x1e", b"\x1b[27;6;94~"),
        (b"\x10\x11", b"\x1b[112;5u\x1b[113;5u"),
        (
            b"\x10\x11",
            b"\x1b[57442;5u\x1b[112;5:1u\x1b[112;5:3u\x1b[113;5u",
        ),  # with the release of keys and the Ctrl key itself
        (b"\x01d", b"\x1b[27;5;97~d"),
        (b"\x01d", b"\x1b[97;5u\x1b[100u"),
        (b"\x01d", b"\x1b[97;5u\x1b[100;1:1;100u"),
    ],
)
def test_the_keys_are_found_however_a_program_has_the_terminal_send_them(
    keys: bytes, typed: bytes
) -> None:
    before, left = Keys(keys).take(b"abc" + typed + b"def")
    assert left and before in (b"abc", b"abc\x1b[57442;5u")
    one_by_one = Keys(keys)
    pieces = (
        [b"\x1b" + each for each in typed.split(b"\x1b") if each]
        if typed.startswith(b"\x1b")
        else [typed]
    )
    assert any(one_by_one.take(piece)[1] for piece in pieces)


@pytest.mark.parametrize(
    "typed",
    [
        b"\x1b[27;7;93~",
        b"\x1b[93;7u",
        b"\x1b[93;5:3u",
        b"\x1b[93u",
        b"]",
        b"\x1b]",
        b"\x1b[125;5u",
        b"\x1b[193;5u",
        b"\x1b[27;5;193~",
    ],
)
def test_another_key_or_this_one_let_go_is_the_programs(typed: bytes) -> None:
    assert Keys(b"\x1d").take(b"a" + typed + b"b") == (b"a" + typed + b"b", False)


def test_escape_never_waits_for_the_next_key() -> None:
    keys = Keys(b"\x1d")
    assert keys.take(b"\x1b") == (b"\x1b", False)
    assert keys.take(b"\x1b[") == (b"\x1b[", False)
    assert keys.take(b"\x1b[93;") == (b"", False)  # no person types so fast
    assert keys.take(b"5u") == (b"", True)


_KEYS = st.sampled_from([b"\x1d", b"\x10\x11", b"\x01d", b"\x10\x10\x11", b""])
_TYPED = st.lists(
    st.sampled_from(
        [
            b"\x10",
            b"\x11",
            b"\x1d",
            b"d",
            b"\x01",
            b"]",
            b"\x1b",
            b"\x1b[A",
            b"\x1b[112;5u",
            b"\x1b[112;5:3u",
            b"\x1b[27;5;113~",
            b"x",
        ]
    ),
    max_size=12,
)


@given(keys=_KEYS, pieces=_TYPED)
@settings(EXACTLY_ONCE)
def test_nothing_that_is_typed_is_lost_or_doubled_on_its_way_to_the_program(
    keys: bytes, pieces: list[bytes]
) -> None:
    """Until the leaving keys come, each byte goes on in order. The keys are found at the same place
    however the input is cut.
    """
    whole = b"".join(pieces)
    before, left = Keys(keys).take(
        whole + (b"" if keys == b"" else b"~")
    )  # with this byte no input is held back
    taker, came = Keys(keys), b""
    for piece in [*pieces, b"~"] if keys else pieces:
        passed, found = taker.take(piece)
        came += passed
        if found:
            assert left
            break
    else:
        assert not left
    assert came == before


# ---------------------------------------------------------------- the modes that a program sets


def test_what_a_program_has_switched_on_is_switched_off_and_nothing_else() -> None:
    modes = ProgramModes()
    for data in (b"\x1b[?1049h\x1b[?25l\x1b[?20", b"04h\x1b[?1000;1006h", b"\x1b=text\x1b[?1000l"):
        modes.see(data)
    assert modes.redo() == b"\x1b[?1049h\x1b[?25l\x1b[?2004h\x1b[?1006h\x1b="
    assert modes.undo() == CANCEL + b"\x1b[?25h\x1b[?1006l\x1b[?2004l\x1b>\x1b[?1049l\x1b[0m"
    assert ProgramModes().undo() == CANCEL + b"\x1b[0m" and ProgramModes().redo() == b""


@pytest.mark.parametrize(
    ("done", "undone", "redone"),
    [
        (b"\x1b[1;24r", b"\x1b7\x1b[r\x1b8", b""),
        (b"\x1b[4h", b"\x1b[4l", b""),
        (b"\x1b[2 q", b"\x1b[0 q", b"\x1b[2 q"),
        (b"\x1b[>4;2m", b"\x1b[>4m", b"\x1b[>4;2m"),
        (b"\x1b[>1u\x1b[>3u", b"\x1b[<2u", b"\x1b[>3u"),
        (b"\x1b[>1u\x1b[<u", b"", b""),
        (b"\x1b[?1049h\x1b[>1u", b"\x1b[<1u\x1b[?1049l", b"\x1b[?1049h\x1b[>1u"),
        (b"\x1b[=5;1u", b"\x1b[=0u", b"\x1b[=5;1u"),
        (b"\x1b(0\x0e", b"\x1b(B\x0f", b""),
        (b"\x1b[?7l", b"\x1b[?7h", b"\x1b[?7l"),
        (b"\x1b[?6h", b"\x1b[?6l", b""),
        (b"\x1b[?1h\x1b=\x1b[?1000h\x1bc", b"", b""),
        (b"\x1b[?1049h\x1b[?1000h\x1bc", b"\x1b[?1049l", b"\x1b[?1049h"),
    ],
)
def test_each_is_undone_and_done_again_in_its_own_way(
    done: bytes, undone: bytes, redone: bytes
) -> None:
    modes = ProgramModes()
    modes.see(done)
    assert modes.undo() == CANCEL + undone + b"\x1b[0m" and modes.redo() == redone


SEQUENCES = [
    *(
        b"\x1b[?%d%b" % (mode, switch)
        for mode in (1, 7, 25, 47, 1000, 1006, 1049, 2004, 2026, 12, 9999)
        for switch in (b"h", b"l")
    ),
    *(
        b"\x1b[4h",
        b"\x1b[4l",
        b"\x1b[2;5r",
        b"\x1b[r",
        b"\x1b[3 q",
        b"\x1b[ q",
        b"\x1b=",
        b"\x1b>",
        b"\x1b(0",
        b"\x1b(B",
        b"\x0e",
        b"\x0f",
    ),
    *(
        b"\x1b[>4;2m",
        b"\x1b[>4m",
        b"\x1b[>5u",
        b"\x1b[<u",
        b"\x1b[<9u",
        b"\x1b[=1u",
        b"\x1b[!p",
        b"\x1bc",
        b"\x1b[?25;1000h",
    ),
    *(b"text", b"\r\n", b"\x1b[1;31m", b"\x1b[2J", b"\x1b[5;5H", "ä".encode()),
]


@given(
    sequences=st.lists(st.sampled_from(SEQUENCES), max_size=20),
    places=st.lists(st.integers(0, 120), max_size=5),
)
@settings(PROPERTY)
def test_what_is_switched_is_seen_however_the_output_is_cut(
    sequences: list[bytes], places: list[int]
) -> None:
    data = b"".join(sequences)
    whole, pieces = ProgramModes(), ProgramModes()
    whole.see(data)
    for piece in cut(data, places):
        pieces.see(piece)
    assert pieces.undo() == whole.undo() and pieces.redo() == whole.redo()
    after = ProgramModes()
    after.see(data + whole.undo())
    assert after.undo() == CANCEL + b"\x1b[0m"
    again = ProgramModes()
    again.see(whole.redo())
    assert again.redo() == whole.redo()


@given(
    sequences=st.lists(
        st.sampled_from([each for each in SEQUENCES if not each.endswith(b"u")]), max_size=20
    )
)
@settings(PROPERTY)
def test_who_comes_later_hears_from_the_host_what_is_switched(sequences: list[bytes]) -> None:
    """The host reports every mode but the number of pushed keyboard flags: it reports the last
    ones.
    """
    there, late = ProgramModes(), ProgramModes()
    there.see(b"".join(sequences))
    with open(os.memfd_create("output"), "w+b", 0) as file:
        file.write(b"".join(sequences) + b"\x1b[>1u\x1b[>3u")
        late.see(switched(file.fileno()).encode())
    assert late.redo() == there.redo() + b"\x1b[>3u"


def test_the_host_looks_at_the_beginning_of_a_long_output_and_at_what_was_lately(
    tmp_path: Path,
) -> None:
    file = tmp_path / "output"
    with file.open("wb") as output:
        output.write(b"\x1b[?1049h\x1b[?1h")
        output.truncate(1 << 30)
        output.seek(1 << 30)
        output.write(b"\x1b[?1l\x1b[?25l" + b"." * (1 << 20))
    with file.open("rb") as output:
        assert switched(output.fileno()) == "\x1b[?1049h\x1b[?1h\x1b[?1l\x1b[?25l"


# ---------------------------------------------------------------- the output that is shown again

QUESTIONS = [
    b"\x1b[c",
    b"\x1b[>c",
    b"\x1b[6n",
    b"\x1b[?6n",
    b"\x1b[>q",
    b"\x1b[?2026$p",
    b"\x1b[18t",
    b"\x1b[?u",
    b"\x1b[?4m",
    b"\x1b[?1;1S",
    b"\x05",
    b"\x1bZ",
]
STRINGS = [
    b"\x1b]11;?\x07",
    b"\x1b]10;?\x1b\\",
    b"\x1b]52;c;?\x07",
    b"\x1bP+q544e\x1b\\",
    b"\x1bP$qm\x1b\\",
    b"\x1b_Gi=1,a=q;\x1b\\",
]
HARMLESS = [
    b"text",
    b"\x1b[1;31m",
    b"\x1b[2J",
    b"\x1b[?1049h",
    b"\x1b[2 q",
    b"\x1b[>1u",
    b"\x1b[5;5H",
    b"\x1b(0",
    b"\x1b=",
    b"\x1b[u",
    b"\x1b[3S",
    b"\r\n",
    "ü".encode(),
]


@pytest.mark.parametrize("question", [*QUESTIONS, *STRINGS])
def test_a_terminal_isnt_asked_again_what_it_was_asked_before_and_is_asked_what_is_new(
    question: bytes,
) -> None:
    old = b"a" + question + b"b"
    assert Replay(100 + len(old)).take(100, old + question) == b"ab" + question


def test_the_lines_that_scrolled_in_a_terminal_of_another_size_arent_taken_over() -> None:
    """For a larger terminal vim draws as if the whole of it scrolled; in the operator's, half of it
    did.
    """
    assert Replay(20).take(0, b"a\x1b[1;24rb\x1b[rc") == b"abc"


def test_what_only_shows_or_switches_is_shown_as_it_was() -> None:
    old = b"".join(HARMLESS)
    assert Replay(len(old)).take(0, old) == old


def test_a_question_that_was_being_asked_as_somebody_came_is_asked_whole() -> None:
    replay = Replay(4)
    assert replay.take(0, b"ab\x1b[") == b"ab"
    assert replay.take(4, b"6nc") == b"\x1b[6nc"


@given(
    old=st.lists(st.sampled_from(QUESTIONS + STRINGS + HARMLESS), max_size=12),
    new=st.binary(max_size=20),
    places=st.lists(st.integers(0, 150), max_size=6),
)
@settings(PROPERTY)
def test_old_output_is_the_same_however_it_is_cut_and_new_output_as_it_is(
    old: list[bytes], new: bytes, places: list[int]
) -> None:
    data = b"".join(old)
    replay, shown_, at = Replay(len(data)), b"", 0
    for piece in cut(data + new, places):
        shown_ += replay.take(at, piece)
        at += len(piece)
    assert shown_ == b"".join(each for each in old if each in HARMLESS) + new
