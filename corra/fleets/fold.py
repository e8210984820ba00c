"""Members with identical output and exit as one group, of which one member's bytes are fetched.

Each host hashes its own output after the end. So 500 hosts with the same 10 MB send 10 MB, where
others send 5 GB. What a host no longer has is said, and never taken for alike.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from corra import render
from corra.errors import CorraError
from corra.model.host_sets import fold
from corra.model.units import decimal_size
from corra.runs.digest import Digest, Digests

from .board import Member
from .gather import in_parallel

# What of each output is compared line by line: Python's difflib takes a second for so many lines.
DIFF_BYTES = 1 << 20
DIFF_LINES = 20_000


@dataclass(frozen=True)
class Group:
    """Members alike. `word` is their exit; `streams` their digests, None where nobody has asked.

    `error` says why nothing is known of their output.
    """

    members: tuple[Member, ...]
    word: str
    streams: Mapping[str, Digest] | None = None
    error: str = ""

    @property
    def hosts(self) -> str:
        return fold(each.name for each in self.members)

    @property
    def has_output(self) -> bool:
        """Whether there is any output to be fetched."""
        return any(each.end > each.start for each in (self.streams or {}).values())

    @property
    def title(self) -> str:
        """`web[1-18,20]: 19 hosts: exit 0`, and what is missing of the output."""
        count = f"{len(self.members)} hosts: " if len(self.members) > 1 else ""
        words = [f"{self.hosts}: {count}{self.word}"]
        words += [
            said for name, each in (self.streams or {}).items() if (said := _missing(name, each))
        ]
        words += [f"output unknown: {self.error}"] if self.error else []
        return "; ".join(words)


def _missing(name: str, digest: Digest) -> str:
    size = decimal_size(digest.length)
    if digest.whole:
        return ""
    if digest.start >= digest.length:
        return f"{name}: all {size} were removed on the host"
    if digest.end < digest.length:
        return f"{name}: {decimal_size(digest.end - digest.start)} of {size} are on the host"
    return f"{name}: only the last {decimal_size(digest.end - digest.start)} of {size} are kept"


def grouped(members: Iterable[Member]) -> list[Group]:
    """Return groups of members with the same exit and the same output, the largest first."""
    found: dict[tuple[object, ...], list[Member]] = {}
    for member in members:
        digests = member.digests
        if isinstance(digests, Digests):
            key: tuple[object, ...] = (exit_word(member), tuple(sorted(digests.streams.items())))
        elif isinstance(digests, CorraError):
            key = (exit_word(member), "?", digests.why)
        else:
            key = (exit_word(member), "?", "")
        found.setdefault(key, []).append(member)
    groups = []
    for alike in found.values():
        digests = alike[0].digests
        groups.append(
            Group(
                tuple(alike),
                exit_word(alike[0]),
                digests.streams if isinstance(digests, Digests) else None,
                digests.why if isinstance(digests, CorraError) else "",
            )
        )
    # A sort is stable: among equals the plan's order counts.
    return sorted(groups, key=lambda group: (group.streams is None, -len(group.members)))


def exit_word(member: Member) -> str:
    """Return `exit 0`, `exit 1`, `KILLED by SIGKILL`, `running`, `UNREACHED: no answer`."""
    state = member.state
    if member.over and state is not None and state.return_code is not None:
        return f"exit {state.return_code}"
    if member.over and state is not None and state.signal:
        return f"{member.word} by {state.signal}"
    why = render.visible(member.error.why) if member.error is not None and member.over else ""
    return f"{member.word}: {why}" if why else member.word


# Asks a member's host: for its digests, or for that of a stream from an offset on.
Ask = Callable[[Member, str | None, int | None], Digests]


def complete(members: Sequence[Member], ask: Ask) -> None:
    """Ask the hosts of those that have ended for the digests that nobody has told yet."""

    def told(member: Member) -> Digests | CorraError:
        try:
            return ask(member, None, None)
        except CorraError as error:
            return error

    asked = [
        each
        for each in members
        if each.digests is None and each.state is not None and each.state.ended
    ]
    for member, digests in zip(asked, in_parallel(told, asked), strict=True):
        member.digests = digests
    _align(members, ask)


def _align(members: Sequence[Member], ask: Ask) -> None:
    """Have outputs of one length, of which some kept more than others, hashed from one byte on.

    Of a bounded output a host keeps what was asked for and up to as much again.
    """
    alike: dict[tuple[str, str, int], list[tuple[Member, Digest]]] = {}
    for member in members:
        if isinstance(member.digests, Digests):
            for stream, digest in member.digests.streams.items():
                if digest.end == digest.length:
                    key = (exit_word(member), stream, digest.length)
                    alike.setdefault(key, []).append((member, digest))
    late = []
    for (_, stream, length), found in alike.items():
        # Those that kept nothing stay apart, and take nothing from the others.
        starts = {digest.start for _, digest in found if digest.start < length}
        if len(starts) > 1:
            late += [
                (member, stream, max(starts))
                for member, digest in found
                if digest.start < max(starts)
            ]

    def told(asked: tuple[Member, str, int]) -> Digests | None:
        try:
            return ask(*asked)
        except CorraError:
            return None  # it stays a group of its own

    for (member, stream, _), answer in zip(late, in_parallel(told, late), strict=True):
        if answer is not None and isinstance(member.digests, Digests):
            streams = {**member.digests.streams, stream: answer.streams[stream]}
            member.digests = member.digests._replace(streams=streams)


def differences(
    one: Mapping[str, bytes], other: Mapping[str, bytes], hosts: tuple[str, str]
) -> Iterator[str]:
    """Yield the lines of a unified diff of two outputs, each by stream as far as it is known."""
    for stream in dict.fromkeys([*one, *other]):
        mine, theirs = one.get(stream, b""), other.get(stream, b"")
        if mine == theirs:
            continue
        first, second = _lines(mine), _lines(theirs)
        names = [f"{host} {stream}" for host in hosts]
        yield from difflib.unified_diff(first, second, names[0], names[1], lineterm="", n=2)
        if max(len(first), len(second)) >= DIFF_LINES:
            yield f"(compared are the first {DIFF_LINES} lines)"


def _lines(data: bytes) -> list[str]:
    # Not splitlines: a carriage return, or the lack of the last newline, may be the difference.
    return data.decode("utf-8", "backslashreplace").split("\n")[:DIFF_LINES]
