"""Sets of hosts as people write them, `web[1-6,9],db1,!web3`, in the order written, and in waves.

The language is that of clush, Slurm and pdsh, with two differences. The host named first stays
first, since it is the canary. And what `!` excludes stays out, wherever the `!` stands.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import overload

from corra.errors import Misuse

from .host import Host
from .light_dataclass import light_dataclass
from .rollout import wave_sizes

# A set must not fill the memory of whoever mistyped it: `web[1-99999999]`.
HOSTS_MOST = 100_000

# What stands between two parts of a set, outside brackets.
_OPERATOR = re.compile(r"([,!&^])(?![^\[\]]*\])")
_IPV6 = r"(?:[^@]+@)?\[[0-9A-Fa-f:.]*:[0-9A-Fa-f:.]*(?:%[\w.-]+)?\](?::\d+)?"
_RANGE = r"([0-9]+)(?:-([0-9]+)(?:/([1-9][0-9]*))?)?"
_DIGITS = r"([0-9]+)"

# Finds the hosts of a group by its name without the @, as texts of sets. Raises Misuse.
Groups = Callable[[str], Iterable[str]]


class Hosts(Sequence[str]):
    """Names of hosts in order, each once. Its text is folded: `web[1-6]`."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = tuple(dict.fromkeys(names))

    @overload
    def __getitem__(self, at: int) -> str: ...
    @overload
    def __getitem__(self, at: slice) -> Hosts: ...
    def __getitem__(self, at: int | slice) -> str | Hosts:
        return Hosts(self._names[at]) if isinstance(at, slice) else self._names[at]

    def __len__(self) -> int:
        return len(self._names)

    def __eq__(self, other: object) -> bool:
        return self._names == other._names if isinstance(other, Hosts) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._names)

    def __str__(self) -> str:
        return fold(self._names)

    def __repr__(self) -> str:
        return f"<Hosts {self}>"


# Reading


@light_dataclass(frozen=True)
class Chosen:
    """The hosts that texts name, one as often as it is named.

    `unmatched`: single hosts that were excluded, or named by the limit, and weren't among them.
    """

    names: tuple[str, ...]
    unmatched: tuple[str, ...] = ()


def choose(
    texts: Iterable[str],
    groups: Groups,
    *,
    limit: Sequence[str] = (),
    base: Sequence[str] | None = None,
) -> Chosen:
    """Return the hosts of all `texts` together, less those excluded, within `limit`.

    `base`: the hosts that are meant where the texts only exclude, or there are none. Raises Misuse,
    also where no host is left.
    """
    given = [text for text in texts if text.strip(" ,")]
    found = _Set(groups)
    for text in given:
        found.read(text)
    if base is not None and not found.includes:
        found.names = list(base)
    names, unmatched = found.left()
    if not names:
        which = "left" if found.excluded else "in"
        raise Misuse(f"no host {which}: {' '.join(given) or 'nothing'}")
    if limit:
        wanted = _Set(groups)
        for text in limit:
            wanted.read(text)
        if not wanted.includes:
            wanted.names = list(names)
        within, more = wanted.left()
        kept = set(within)
        there = set(names)
        unmatched += [each for each in (*more, *wanted.named) if each not in there]
        if not kept.intersection(names):
            raise Misuse(f"no host left: --limit {' '.join(limit)} has none of {fold(names)}")
        names = [each for each in names if each in kept]
    for name in dict.fromkeys(names):
        Host.parse(name)
    return Chosen(tuple(names), tuple(dict.fromkeys(unmatched)))


class _Set:
    """The hosts named so far, and the excluded ones. `named`: those that no range or group gave."""

    def __init__(self, groups: Groups, inside: tuple[str, ...] = ()) -> None:
        self._groups = groups
        self._inside = inside
        self.names: list[str] = []
        self.includes = False  # whether anything but exclusions was said
        self.excluded: dict[str, bool] = {}  # by name: whether it was named alone
        self.named: list[str] = []

    def read(self, text: str) -> None:
        """Take in one text, from left to right. Raises Misuse."""
        first, *rest = _OPERATOR.split(text)
        self._take(",", first.strip(), text)
        before = first.strip()
        for operator, behind in zip(rest[::2], rest[1::2], strict=True):
            part = behind.strip()
            if operator != "," and not part:
                raise Misuse(f"not a set of hosts: {text!r}: nothing behind the {operator}")
            if operator in "&^" and not before:
                raise Misuse(f"not a set of hosts: {text!r}: nothing before the {operator}")
            self._take(operator, part, text)
            before = part
        if len(self.names) > HOSTS_MOST:
            raise _too_many(text, len(self.names))

    def _take(self, operator: str, part: str, text: str) -> None:
        if not part:
            return
        alone = not re.search(r"[\[@]", part) or bool(re.fullmatch(_IPV6, part))
        found = self._expanded(part, text)
        self.includes |= operator != "!"
        match operator:
            case ",":
                self.names += found
                self.named += found if alone else ()
            case "!":
                for name in found:
                    self.excluded[name] = self.excluded.get(name, False) or alone
            case "&":
                kept = set(found)
                self.names = [name for name in self.names if name in kept]
            case "^":
                here, there = set(self.names), set(found)
                self.names = [name for name in self.names if name not in there]
                self.names += [name for name in found if name not in here]

    def _expanded(self, part: str, text: str) -> list[str]:
        try:
            names = expand(part)
        except Misuse as error:
            if part == text:
                raise
            raise error.but(why=f"{error.why}, in {text!r}") from error
        if not part.startswith("@"):
            return names
        found: list[str] = []
        for name in names:
            group = name[1:]
            if group in self._inside:
                raise Misuse(f"group @{group} contains itself: {' '.join(self._inside)}")
            inner = _Set(self._groups, (*self._inside, group))
            for each in self._groups(group):
                inner.read(each)
            found += dict.fromkeys(inner.left()[0])
        return found

    def left(self) -> tuple[list[str], list[str]]:
        """Return the hosts that aren't excluded, and the exclusions that excluded nothing."""
        there = set(self.names)
        unmatched = [name for name, alone in self.excluded.items() if alone and name not in there]
        return [name for name in self.names if name not in self.excluded], unmatched


def expand(text: str) -> list[str]:
    """Return the names of `web[1-3,7]n[01-02]`, a part of a set. Raises Misuse."""
    if not re.search(r"[\[\]]", text) or re.fullmatch(_IPV6, text):
        return [text]
    if not re.fullmatch(r"(?:[^\[\]]*\[[^\[\]]*\])*[^\[\]]*", text):
        raise Misuse(f"not a set of hosts: {text!r}: its brackets don't match")
    pieces = re.split(r"\[([^\[\]]*)\]", text)
    ranges = [_numbers(inner, text) for inner in pieces[1::2]]
    total = 1
    for count, _ in ranges:
        total *= count
    if total > HOSTS_MOST:
        raise _too_many(text, total)
    choices = [list(ranges[at // 2][1]) if at % 2 else [piece] for at, piece in enumerate(pieces)]
    return ["".join(each) for each in itertools.product(*choices)]


def _numbers(inner: str, text: str) -> tuple[int, Iterator[str]]:
    """Return how many numbers `1-3,07-09,2-10/2` are, and the numbers."""
    spans: list[tuple[range, int]] = []
    for part in inner.split(","):
        match = re.fullmatch(_RANGE, part.strip())
        if match is None:
            raise Misuse(f"not a range: [{inner}] in {text!r} (say [1-20], [01-20] or [1,3,5])")
        low, high, step = match.group(1), match.group(2) or match.group(1), match.group(3) or "1"
        if int(high) < int(low):
            raise Misuse(f"not a range: [{inner}] in {text!r}: {part} ends before it begins")
        padded = len(low) > 1 and low.startswith("0")
        if padded and len(high) < len(low):
            raise Misuse(f"not a range: [{inner}] in {text!r}: {part} is padded in two ways")
        spans.append((range(int(low), int(high) + 1, int(step)), len(low) if padded else 0))
    numbers = (f"{number:0{width}}" for span, width in spans for number in span)
    return sum(len(span) for span, _ in spans), numbers


def _too_many(text: str, count: int) -> Misuse:
    shown = text if len(text) <= 60 else text[:58] + ".."
    return Misuse(f"{count} hosts in {shown!r}: at most {HOSTS_MOST}")


def one_plain_host(text: str) -> bool:
    """Return whether `text` is one host's name, and no set. Raises Misuse for a bad name."""
    if re.search(r"[\[\],!&^]|^@|^-$", text):
        return False
    Host.parse(text)
    return True


def no_groups(name: str) -> Iterable[str]:
    """Know no group. Raises Misuse."""
    raise Misuse(f"no group @{name}")


# Waves


def waves(hosts: Iterable[str], *sizes: int | str) -> list[Hosts]:
    """Return `hosts` in waves of these sizes; the last size is repeated to the end.

    A size is a number, or a share of all hosts such as "25%", which is at least one host.
    `waves(fleet, 1, 2, "100%")` is a canary, two more, and the rest. Raises Misuse.
    """
    left = Hosts(hosts)
    found: list[Hosts] = []
    for size in wave_sizes(len(left), sizes):
        found.append(left[:size])
        left = left[size:]
    return found


# Folding


def fold(hosts: Iterable[str | Host]) -> str:
    """Return names of hosts as a set is written, each once and sorted: `db1,web[1-3]`.

    Of the numbers in alike names only one is folded, the one that gives the shortest text: 1,200
    names with three numbers take 3 ms. ClusterShell folds all three, in 1.8 s.
    """
    names = dict.fromkeys(map(str, hosts))
    if len(names) < 2:
        return "".join(names)
    alike: dict[tuple[str, ...], list[list[str]]] = {}
    parts: list[tuple[list[tuple[int, str]], str]] = []
    for name in names:
        pieces = re.split(_DIGITS, name)
        if len(pieces) == 1 or "[" in name:
            parts.append((_natural(pieces), name))
        else:
            alike.setdefault(tuple(pieces[::2]), []).append(pieces)
    for members in alike.values():
        parts += _folded_alike(members)
    return ",".join(text for _, text in sorted(parts))


def fold_in_order(hosts: Iterable[str]) -> str:
    """Return names as text that `unfold` reads back, in their order and as often: `web[1-5,9],db1`.

    Names fold where they stand beside each other and one number grows.
    """
    return ",".join(each if isinstance(each, str) else _bracketed(*each) for each in _runs(hosts))


def unfold(text: str) -> list[str]:
    """Return the names of a text that was folded. Raises Misuse."""
    parts = [part for part in _OPERATOR.split(text)[::2] if part]
    found: list[str] = []
    for part in parts:
        found += expand(part)
        if len(found) > HOSTS_MOST:
            raise _too_many(text, len(found))
    return found


# Names that differ in one number: how a name begins and ends, and the numbers.
_Run = tuple[str, list[str], str]


def _bracketed(before: str, numbers: Sequence[str], after: str) -> str:
    return f"{before}[{_spans(numbers)}]{after}"


def _runs(names: Iterable[str]) -> Iterator[str | _Run]:
    """Yield names, and runs of three or more that differ in one number, which grows."""
    run: list[list[str]] = []
    axis: int | None = None
    for name in (*names, ""):
        pieces = re.split(_DIGITS, name)
        at = _grown(run[-1], pieces) if run and "[" not in name else None
        if at is not None and axis in (None, at):
            axis = at
            run.append(pieces)
            continue
        if axis is not None and len(run) > 2:
            numbers = [each[axis] for each in run]
            yield "".join(run[0][:axis]), numbers, "".join(run[0][axis + 1 :])
        else:
            yield from ("".join(each) for each in run)
        run, axis = [pieces], None


def _grown(before: Sequence[str], pieces: Sequence[str]) -> int | None:
    """Return which number alone differs, if it grows and is padded alike."""
    differ = [
        at for at, (one, other) in enumerate(zip(before, pieces, strict=False)) if one != other
    ]
    if len(before) != len(pieces) or len(differ) != 1 or differ[0] % 2 == 0:
        return None
    low, high = before[differ[0]], pieces[differ[0]]
    padded = any(len(each) > 1 and each.startswith("0") for each in (low, high))
    if int(high) <= int(low) or (padded and len(low) != len(high)):
        return None
    return differ[0]


def fold_within(hosts: Iterable[str], most: int) -> str:
    """Return the fold in at most `most` characters or so: the first hosts, and how many more."""
    names = list(dict.fromkeys(hosts))
    text = fold(names)
    if len(text) <= most:
        return text
    parts = _OPERATOR.split(text[:most])[:-1:2] or [text[:most]]
    shown = [name for part in parts if part.count("[") == part.count("]") for name in expand(part)]
    return f"{fold(shown)} and {len(names) - len(shown)} more"


def _natural(pieces: Sequence[str]) -> list[tuple[int, str]]:
    """Return a key that sorts web9 before web10."""
    return [(int(piece) if at % 2 else -1, piece) for at, piece in enumerate(pieces)]


def _folded_alike(members: Sequence[list[str]]) -> Iterator[tuple[list[tuple[int, str]], str]]:
    """Yield (sort key, text) of names that differ in their numbers only."""
    axes = range(1, len(members[0]), 2)
    grouped: Mapping[tuple[str, ...], list[str]] = {}
    best = 0
    for axis in reversed(axes):
        groups: dict[tuple[str, ...], list[str]] = {}
        for pieces in members:
            rest = (*pieces[:axis], "", *pieces[axis + 1 :])
            groups.setdefault(rest, []).append(pieces[axis])
        if not best or len(groups) < len(grouped):
            grouped, best = groups, axis
    for rest, numbers in grouped.items():
        numbers.sort(key=lambda each: (int(each), len(each)))
        text = _spans(numbers)
        inner = text if text == numbers[0] else f"[{text}]"
        before, after = "".join(rest[:best]), "".join(rest[best + 1 :])
        yield _natural([*rest[:best], numbers[0], *rest[best + 1 :]]), before + inner + after


def _spans(numbers: Sequence[str]) -> str:
    """Return `1-3,07-09` of sorted numbers."""
    spans: list[list[str]] = []
    for number in numbers:
        if spans and _follows(spans[-1], number):
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return ",".join("-".join(span) for span in spans)


def _follows(span: Sequence[str], number: str) -> bool:
    first, last = span[0], span[-1]
    padded = len(first) > 1 and first.startswith("0")
    alike = len(number) == len(first) if padded else str(int(number)) == number
    return alike and int(number) == int(last) + 1
