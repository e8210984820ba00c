"""What a host tells of an output without sending it: the length and the hash of each stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from corra.model.state import State

from .asking import ask_agent

if TYPE_CHECKING:
    from .run import Run

# How long a slow host may take for each byte, one whose disk gives 20 MB/s.
_BYTE_S = 1 / 20e6


class Digest(NamedTuple):
    """The BLAKE2b of a stream's bytes from `start` to `end`.

    The program has written `length` bytes. `start` is larger than 0 where the first ones were given
    back (keep_output) or removed (gc); `end` is smaller than `length` where the last are missing.
    """

    start: int
    end: int
    length: int
    blake2b: str

    @property
    def whole(self) -> bool:
        return self.start == 0 and self.end == self.length


class Digests(NamedTuple):
    """The State of a run that has ended, and the Digest of each of its streams by name."""

    state: State
    streams: Mapping[str, Digest]


def digests_of(
    run: Run, state: State, stream: str | None = None, start: int | None = None
) -> Digests:
    """Return the digests of a run's output, or the one of `stream` from `start` on.

    `state` is what is known of it, for the patience. Raises CorraError, also where the run goes on.
    """
    wanted = {"stream": stream, "start": start}
    size = sum(int(facts.get("length", 0)) for facts in (state.streams or {}).values())
    answer = ask_agent(
        run.agent,
        "digest",
        {"prog_id": run.id, **{key: each for key, each in wanted.items() if each is not None}},
        text=run.id,
        label=run.label,
        spool=run.spool,
        extra_s=size * _BYTE_S,
    )
    return Digests(
        State.from_json(answer["state"]),
        {
            name: Digest(*(facts[field] for field in Digest._fields))
            for name, facts in answer["digests"].items()
        },
    )
