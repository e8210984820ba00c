"""Frames and the cursor: each byte once and in order, and no frame can harm the client."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings, strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from corra.model.frames import (
    HEADER_MAX,
    PAYLOAD_MAX,
    STATE_MAX,
    Ack,
    BadFrame,
    Beat,
    Cursor,
    ErrorFrame,
    Frame,
    Gap,
    Output,
    Parser,
    Status,
    Taken,
)
from properties import PROPERTY, json_values

NAMES = ("stdout", "stderr")
numbers = st.integers(0, 10**18)
not_nan = json_values.filter(lambda value: value == value)  # noqa: PLR0124
objects = st.dictionaries(st.text(max_size=5), not_nan, max_size=3)
frames = st.one_of(
    st.builds(Output, st.sampled_from(NAMES), numbers, st.binary(max_size=60), numbers),
    st.builds(
        lambda name, a, b: Gap(name, min(a, b), max(a, b)), st.sampled_from(NAMES), numbers, numbers
    ),
    st.builds(Status, objects),
    st.builds(Ack, numbers),
    st.builds(
        lambda at, kind: Taken(at, ended=kind == "E", closed=kind == "C"),
        numbers,
        st.sampled_from("IEC"),
    ),
    st.builds(ErrorFrame, objects),
    st.just(Beat()),
)


def encode(frame: Frame) -> bytes:
    match frame:
        case Output(stream, offset, data, time_ns):
            return f"O {stream} {offset} {len(data)} {time_ns}\n".encode() + data
        case Gap(stream, start, end):
            return f"G {stream} {start} {end}\n".encode()
        case Ack(number):
            return f"A {number}\n".encode()
        case Taken(offset, ended, closed):
            return f"A {'E' if ended else 'C' if closed else 'I'} {offset}\n".encode()
        case Beat():
            return b"H\n"
        case Status(value) | ErrorFrame(value):
            payload = json.dumps(value).encode()
            return (
                f"{'S' if isinstance(frame, Status) else 'X'} {len(payload)}\n".encode() + payload
            )


def parse(*pieces: bytes) -> list[Frame]:
    parser = Parser()
    return whole([frame for piece in pieces for frame in parser.feed(piece)])


def whole(frames: list[Frame]) -> list[Frame]:
    """Join output that came in pieces: two adjoining frames equal one."""
    joined: list[Frame] = []
    for frame in frames:
        last = joined[-1] if joined else None
        if (
            isinstance(frame, Output)
            and isinstance(last, Output)
            and (last.stream, last.end, last.time_ns) == (frame.stream, frame.offset, frame.time_ns)
        ):
            joined[-1] = Output(last.stream, last.offset, last.data + frame.data, last.time_ns)
        else:
            joined.append(frame)
    return joined


@PROPERTY
@given(st.lists(frames, max_size=5), st.data())
def test_wherever_the_network_cuts_the_frames_are_the_same(sent, data):
    wire = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=6)))
    pieces = [wire[a:b] for a, b in zip([0, *cuts], [*cuts, len(wire)], strict=True)]
    assert repr(parse(*pieces)) == repr(whole(sent))


def test_cut_at_every_byte_the_frames_are_the_same():
    sent: list[Frame] = [
        Output("stdout", 0, b"O stderr 0 1 0\nx", 7),
        Beat(),
        Status({"a": "\n"}),
        Gap("stderr", 3, 9),
        Ack(2),
        ErrorFrame({}),
    ]
    wire = b"".join(map(encode, sent))
    assert parse(*(wire[i : i + 1] for i in range(len(wire)))) == sent
    for cut in range(len(wire)):
        assert parse(wire[:cut], wire[cut:]) == sent


@PROPERTY
@given(st.lists(st.binary(max_size=300), max_size=12))
def test_random_bytes_give_frames_or_bad_frame_and_nothing_else(pieces):
    parser = Parser()
    try:
        for piece in pieces:
            for frame in parser.feed(piece):
                assert encode(frame)
    except BadFrame:
        return
    assert parser.pending < HEADER_MAX + PAYLOAD_MAX


@PROPERTY
@given(
    st.sampled_from("OGSAXH"),
    st.lists(st.text(st.characters(blacklist_characters="\n"), max_size=24), max_size=6),
)
def test_any_header_is_a_frame_a_wait_for_its_payload_or_a_bad_frame(kind, fields):
    parser = Parser()
    try:
        list(parser.feed(" ".join([kind, *fields]).encode(errors="replace") + b"\n"))
    except BadFrame:
        return
    assert parser.pending <= HEADER_MAX


@pytest.mark.parametrize(
    "wire",
    [
        b"\n",
        b"Z\n",
        b"O\n",
        b"O stdout 0 0\n",
        b"O stdout 0 0 0 0\n",
        b"O stdout -1 0 0\n",
        b"O stdout +1 0 0\n",
        b"O stdout 1_0 0 0\n",
        b"O stdout 0x1 0 0\n",
        b"O stdout  0 0\n",
        b"O  0 0 0\n",
        b"O ../x 0 0 0\n",
        b"O STDOUT 0 0 0\n",
        b"O \xc3\xa9 0 0 0\n",
        b"O stdout \xd9\xa3 0 0\n",
        b"O stdout 0 1048577 0\n",
        b"O stdout 0 99999999999999999999 0\n",
        b"O stdout " + b"9" * 20 + b" 0 0\n",
        b"O aaaaaaaaaaaaaaaaa 0 0 0\n",
        b"G stdout 5 4\n",
        b"G stdout 5\n",
        b"S %d\n" % (STATE_MAX + 1),
        b"S 2\n[]",
        b"S 1\n{",
        b"S 0\n",
        b"S 3\n\xff\xff\xff",
        b"X 4\nnull",
        b"H 1\n",
        b"A\n",
        b"A x\n",
        b"h\n",
        b"O stdout 0 0 0\r\n",
        b"x" * HEADER_MAX,
    ],
)
def test_what_is_no_frame_ends_the_stream(wire):
    with pytest.raises(BadFrame):
        parse(wire)


def test_json_as_deep_as_a_payload_can_hold_is_a_bad_frame_and_no_crash():
    payload = b'{"a":' + b"[" * (PAYLOAD_MAX - 10)
    with pytest.raises(BadFrame):
        parse(b"S %d\n" % len(payload) + payload)


def test_a_header_that_never_ends_is_refused_before_it_costs_memory():
    parser = Parser()
    with pytest.raises(BadFrame):
        for _ in range(HEADER_MAX + 1):
            list(parser.feed(b"O"))
    assert parser.pending <= HEADER_MAX + 1


def test_the_largest_payload_passes_in_pieces_and_nothing_of_it_is_kept():
    parser = Parser()
    data = bytes(PAYLOAD_MAX)
    wire = b"O stdout 0 %d 0\n" % len(data) + data
    got: list[Frame] = []
    for at in range(0, len(wire), 65536):
        got += parser.feed(wire[at : at + 65536])
        assert parser.pending == 0
        assert (
            sum(len(frame.data) for frame in got if isinstance(frame, Output))
            == min(at + 65536, len(wire)) - wire.index(b"\n") - 1
        )
    assert whole(got) == [Output("stdout", 0, data)]


def test_output_is_shown_before_its_frame_is_complete():
    parser = Parser()
    assert list(parser.feed(b"O stdout 7 10 3\nab")) == [Output("stdout", 7, b"ab", 3)]
    assert list(parser.feed(b"c")) == [Output("stdout", 9, b"c", 3)]
    assert list(parser.feed(b"defghijH\n")) == [Output("stdout", 10, b"defghij", 3), Beat()]


def test_a_state_in_many_pieces_costs_no_second_look():
    """The parser reads 32 MiB in pieces of 64 KiB once, not 512 times."""
    value = {"argv": ["x" * 1000] * 16000}
    payload = json.dumps(value).encode()
    wire = b"S %d\n" % len(payload) + payload
    parser = Parser()
    began = time.process_time()
    got = [frame for at in range(0, len(wire), 4096) for frame in parser.feed(wire[at : at + 4096])]
    assert got == [Status(value)]
    assert time.process_time() - began < 2


def take(cursor: Cursor, *given: Output | Gap) -> list[Output | Gap]:
    return [new for frame in given for new in cursor.take(frame)]


def test_an_overlap_is_trimmed():
    cursor = Cursor()
    assert take(cursor, Output("stdout", 0, b"abcd", 1), Output("stdout", 2, b"cdef", 2)) == [
        Output("stdout", 0, b"abcd", 1),
        Output("stdout", 4, b"ef", 2),
    ]


def test_what_was_there_already_is_left_out_whole():
    cursor = Cursor({"stdout": 9})
    assert (
        take(cursor, Output("stdout", 0, b"abc"), Output("stdout", 6, b"abc"), Gap("stdout", 0, 9))
        == []
    )
    assert cursor.offsets == {"stdout": 9}


def test_a_hole_is_a_gap_and_never_silence():
    cursor = Cursor()
    assert take(cursor, Output("stdout", 3, b"d")) == [
        Gap("stdout", 0, 3),
        Output("stdout", 3, b"d"),
    ]
    assert take(cursor, Gap("stdout", 2, 9)) == [Gap("stdout", 4, 9)]
    assert take(cursor, Gap("stdout", 20, 30)) == [Gap("stdout", 9, 30)]


def test_streams_have_cursors_of_their_own():
    cursor = Cursor()
    assert take(cursor, Output("stdout", 0, b"a"), Output("stderr", 0, b"b")) == [
        Output("stdout", 0, b"a"),
        Output("stderr", 0, b"b"),
    ]


def test_a_cursor_is_not_the_dict_it_was_made_from():
    offsets = {"stdout": 1}
    take(Cursor(offsets), Output("stdout", 1, b"x"))
    assert offsets == {"stdout": 1}


class Resume(RuleBasedStateMachine):
    """A host repeats, skips and cuts; the client shows each byte of `TRUTH` at most once."""

    TRUTH = bytes(range(256))

    def __init__(self) -> None:
        super().__init__()
        self.cursor = Cursor()
        self.shown: list[int | None] = []

    @rule(start=st.integers(0, 256), length=st.integers(0, 80), cut=st.integers(0, 100))
    def a_host_sends_output(self, start: int, length: int, cut: int) -> None:
        data = self.TRUTH[start : start + length]
        wire = encode(Output("stdout", start, data))
        for frame in Parser().feed(wire[: len(wire) - cut] if cut < len(wire) else b""):
            assert isinstance(frame, Output)
            self.show(frame)

    @rule(start=st.integers(0, 256), length=st.integers(0, 80))
    def a_host_has_lost_some(self, start: int, length: int) -> None:
        self.show(Gap("stdout", start, min(256, start + length)))

    @rule()
    def the_link_breaks_and_the_cursor_is_sent_again(self) -> None:
        self.cursor = Cursor(self.cursor.offsets)

    def show(self, frame: Output | Gap) -> None:
        for new in self.cursor.take(frame):
            self.shown += (
                list(new.data) if isinstance(new, Output) else [None] * (new.end - new.start)
            )

    @invariant()
    def every_byte_stands_at_its_offset(self) -> None:
        assert len(self.shown) == self.cursor.offsets.get("stdout", 0)
        assert all(byte is None or byte == at for at, byte in enumerate(self.shown))


TestResume = Resume.TestCase
# test_follow tests the promise itself on 2,000 examples; this test covers the trimming alone.
TestResume.settings = settings(PROPERTY, stateful_step_count=20)
