"""The bytes sent to a program: each once and in order, however much the host has accepted when a
link breaks.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given, strategies as st

from corra.model.frames import Taken
from corra.runs.stdin_feed import StdinFeed
from properties import PROPERTY


class Far:
    """The host: it accepts bytes that continue its own, and skips bytes that it has."""

    def __init__(self) -> None:
        self.has = bytearray()
        self.ended = False

    def take(self, frames: bytes) -> None:
        while frames:
            header, _, frames = frames.partition(b"\n")
            if end := re.fullmatch(rb"E (\d+)", header):
                assert int(end[1]) == len(self.has)
                self.ended = True
                continue
            found = re.fullmatch(rb"I (\d+) (\d+)", header)
            assert found
            offset, size = int(found[1]), int(found[2])
            assert offset <= len(self.has), "a hole"
            self.has += frames[len(self.has) - offset : size]
            frames = frames[size:]


class Nowhere:
    def send(self, data: bytes) -> None: ...


pieces = st.binary(max_size=9) | st.integers(1, 3000).map(
    lambda size: bytes(number % 251 for number in range(size))
)
steps = st.one_of(
    st.tuples(st.just("write"), pieces),
    st.tuples(st.just("send"), st.booleans()),
    st.tuples(st.just("told"), st.floats(0, 1)),
    st.tuples(st.just("cut"), st.none()),
)


@pytest.fixture(scope="module")
def small_frames() -> Iterator[None]:
    """Use frames of 1,000 bytes, so that a few thousand bytes are many frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("corra.runs.stdin_feed._STEP", 1000)
        patch.setattr("corra.runs.stdin_feed._SMALL", 64)
        yield


@PROPERTY
@given(st.lists(steps, max_size=30))
@pytest.mark.usefixtures("small_frames")
def test_each_byte_reaches_the_host_once(script):
    feed, far, written = StdinFeed(), Far(), bytearray()
    feed._thread = threading.current_thread()  # the client sends, step by step
    feed.linked(Nowhere())
    feed.told(Taken(0))
    acknowledged = 0
    for step, value in script:
        if step == "write":
            feed.write(value)
            written += value
        elif step == "send" and feed._is_due:
            frames = feed._next()
            # otherwise the acknowledgement is lost with the link, and the client doesn't have it
            # yet
            if value:
                far.take(frames)
            else:
                feed.unlinked()
                feed.linked(Nowhere())
                feed.told(Taken(len(far.has)))
        elif step == "told":
            acknowledged = max(acknowledged, int(len(far.has) * value))
            feed.told(Taken(acknowledged))
        elif step == "cut":
            feed.unlinked()
            feed.linked(Nowhere())
            acknowledged = len(far.has)
            feed.told(Taken(acknowledged))
        assert feed.given == len(written)
        assert feed.taken <= len(far.has) <= len(written)
    feed.end()
    feed.finish()
    while not feed.done:
        if feed._is_due:
            far.take(feed._next())
        feed.told(Taken(len(far.has), ended=far.ended))
    assert (far.has, far.ended, feed.waiting) == (written, True, 0)


def test_what_is_typed_byte_by_byte_is_kept_together():
    feed = StdinFeed()
    for _ in range(10_000):
        feed.write(b"x")
    assert feed.waiting == 10_000
    assert len(feed._pieces) < 200
