"""What is cut out of a run's output before it leaves: by rules, one regular expression each.

A rule sees whole lines, so a secret that came in two pieces is found all the same. Each piece keeps
its time and its place in the order of arrival.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from corra.errors import Misuse
from corra.model.frames import Gap, Output

REPLACEMENT = b"[REDACTED]"
# A line beyond this is cut, and its last OVERLAP bytes are looked at together with what follows.
LINE_MAX = 256 << 10
OVERLAP = 4 << 10
# A private key that has begun is waited for; RSA's largest keys take 13 KiB.
KEY_MAX = 64 << 10
# While a line of one stream isn't whole, so much of the other one is held back, and no more.
HELD_MAX = 8 << 20

_NAMED = (
    r"(?:pass(?:word|wd|phrase)|secret|token|api[_-]?key|access[_-]?key|private[_-]?key|credential)"
)
_KEY = rb"[A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----"


class Rule(NamedTuple):
    """What a pattern matches is a secret; where the pattern has groups, the first that matched."""

    name: str
    pattern: re.Pattern[bytes]


def _rule(name: str, pattern: str, flags: int = 0) -> Rule:
    return Rule(name, re.compile(pattern.encode(), flags))


# Each begins with a literal or repeats within bounds: a rule's time grows with the output alone.
DEFAULTS = (
    Rule(
        "private key",
        re.compile(rb"-----BEGIN " + _KEY + rb".*?(?:-----END " + _KEY + rb"|\Z)", re.DOTALL),
    ),
    _rule("AWS key", r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    _rule("GitHub token", r"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{22,255})"),
    _rule("GitLab token", r"\bglpat-[\w-]{20,255}"),
    _rule("Slack token", r"\bxox[abeoprs]-[A-Za-z0-9-]{10,255}"),
    _rule("JSON web token", r"\beyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]+"),
    _rule("password in a URL", r"://[^\s/:@]{0,100}:([^\s/@]{1,200})@"),
    _rule("authorization", r"\b(?:bearer|basic)[ \t]+([A-Za-z0-9._~+/=-]{12,})", re.IGNORECASE),
    _rule(
        "named secret",
        _NAMED + r"""s?[\w-]{0,20}["']?[ \t]{0,4}[=:][ \t]{0,4}"""
        r"""(?:"([^"\n]{1,4000})"|'([^'\n]{1,4000})'|([^\s"',;&]{1,4000}))""",
        re.IGNORECASE,
    ),
    _rule("secret flag", r"--?[a-z0-9-]{0,40}" + _NAMED + r"[ \t]+([^\s-]\S*)", re.IGNORECASE),
)
_SECRET_FLAG = re.compile(r"--?[a-z0-9-]*" + _NAMED, re.IGNORECASE)
_KEY_BEGINS = re.compile(rb"-----BEGIN " + _KEY)


def read_rules(path: str) -> tuple[Rule, ...]:
    """Read a file of rules: a regular expression a line; empty lines and `#` lines count nothing.

    Raises Misuse that names the file and the line.
    """
    try:
        with open(path, "rb") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise Misuse(f"{path} can't be read: {error.strerror}", fate="NOT DONE") from error
    rules = []
    for number, text in enumerate(lines, 1):
        if not text.strip() or text.startswith(b"#"):
            continue
        try:
            pattern = re.compile(text, re.MULTILINE)
        except re.error as error:
            why = f"{path}:{number}: not a regular expression: {error}"
            raise Misuse(why, fate="NOT DONE") from None
        if pattern.match(b""):
            why = f"{path}:{number}: it matches everywhere, also where nothing is"
            raise Misuse(why, fate="NOT DONE")
        rules.append(Rule(f"{path}:{number}", pattern))
    return tuple(rules)


class Redactor:
    """Applies rules and counts their hits by name, in `hits`."""

    def __init__(self, rules: Sequence[Rule] = DEFAULTS) -> None:
        self._rules = rules
        self.hits: Counter[str] = Counter()

    def spans(self, text: bytes) -> list[tuple[int, int, str]]:
        """Return (begin, end, rule) of each secret in `text`, in order and without overlaps."""
        found = []
        for rule in self._rules:
            for match in rule.pattern.finditer(text):
                begin, end = match.span(match.lastindex or 0)
                if end > begin:
                    found.append((begin, end, rule.name))
        found.sort()
        merged: list[tuple[int, int, str]] = []
        for begin, end, name in found:
            if merged and begin < merged[-1][1]:
                before = merged[-1]
                merged[-1] = (before[0], max(before[1], end), before[2])
            else:
                merged.append((begin, end, name))
        return merged

    def count(self, spans: Iterable[tuple[int, int, str]]) -> None:
        self.hits.update(name for _, _, name in spans)

    def text(self, text: str) -> str:
        """Return `text` without its secrets."""
        data = text.encode("utf-8", "surrogateescape")
        spans = self.spans(data)
        self.count(spans)
        for begin, end, _ in reversed(spans):
            data = data[:begin] + REPLACEMENT + data[end:]
        return data.decode("utf-8", "surrogateescape") if spans else text

    def argv(self, argv: Sequence[str]) -> list[str]:
        """Return the words of a command; what stands behind `--password` is a secret, too."""
        words, secret = [], False
        for word in argv:
            if secret and not word.startswith("-") and self._rules:
                self.hits["secret flag"] += 1
                words.append(REPLACEMENT.decode())
            else:
                words.append(self.text(word))
            secret = bool(_SECRET_FLAG.fullmatch(word))
        return words

    def values(self, value: Any) -> Any:
        """Return a JSON value whose strings have no secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {
                key: self.argv(each)
                if key == "argv" and isinstance(each, (list, tuple))
                else self.values(each)
                for key, each in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.values(each) for each in value]
        return value


class _Piece:
    """A piece of output in its place; `settled` once its secrets are gone."""

    __slots__ = ("data", "output", "settled")

    def __init__(self, output: Output) -> None:
        self.output = output
        self.data = output.data
        self.settled = False


class RedactedOutput:
    """The events of a run without secrets: as they came, each line when it is whole."""

    def __init__(self, redactor: Redactor) -> None:
        self._redactor = redactor
        self._queue: deque[_Piece | Gap] = deque()
        # The pieces of each stream's lines that aren't whole, and their bytes.
        self._open: dict[str, list[_Piece]] = {}
        self._sizes: dict[str, int] = {}
        self._held = 0

    def of(self, events: Iterable[Any]) -> Iterator[Output | Gap]:
        """Yield the Outputs and Gaps of `events` without their secrets."""
        for event in events:
            if isinstance(event, Output):
                self._take(event)
            elif isinstance(event, Gap):
                self._settle(event.stream, final=True)  # what follows is another line
                self._queue.append(event)
            yield from self._ready()
        for stream in list(self._open):
            self._settle(stream, final=True)
        yield from self._ready()

    def _take(self, output: Output) -> None:
        end = output.data.rfind(b"\n") + 1
        if end:
            self._append(output._replace(data=output.data[:end]))
            self._settle(output.stream)
        if end < len(output.data):
            rest = output._replace(offset=output.offset + end, data=output.data[end:])
            self._append(rest)
            if self._sizes[output.stream] > LINE_MAX:
                self._settle(output.stream)
        if self._held > HELD_MAX:
            for stream in list(self._open):
                self._settle(stream, final=True)

    def _append(self, output: Output) -> None:
        piece = _Piece(output)
        self._queue.append(piece)
        self._held += len(output.data)
        self._keep_open(piece)

    def _keep_open(self, piece: _Piece) -> None:
        stream = piece.output.stream
        self._open.setdefault(stream, []).append(piece)
        self._sizes[stream] = self._sizes.get(stream, 0) + len(piece.data)

    def _ready(self) -> Iterator[Output | Gap]:
        while self._queue and (isinstance(first := self._queue[0], Gap) or first.settled):
            self._queue.popleft()
            if isinstance(first, Gap):
                yield first
                continue
            self._held -= len(first.output.data)
            if first.data:
                yield first.output._replace(data=first.data)

    def _settle(self, stream: str, *, final: bool = False) -> None:
        """Take the secrets out of the whole lines of `stream`, `final` also of its last one."""
        pieces = self._open.pop(stream, [])
        self._sizes.pop(stream, None)
        text = b"".join(each.data for each in pieces)
        spans = self._redactor.spans(text)
        cut = len(text) if final else _whole_lines(text, spans)
        spans = [each for each in spans if each[0] < cut]
        self._redactor.count(spans)
        at = 0
        for piece in pieces:
            begin, at = at, at + len(piece.data)
            if begin >= cut:
                self._keep_open(piece)
                continue
            if at > cut:
                rest = _Piece(piece.output._replace(data=piece.data[cut - begin :]))
                piece.output = piece.output._replace(data=piece.data[: cut - begin])
                piece.data = piece.output.data
                self._queue.insert(self._queue.index(piece) + 1, rest)
                self._keep_open(rest)
            piece.data = _without(piece.data, begin, spans)
            piece.settled = True


def _whole_lines(text: bytes, spans: Sequence[tuple[int, int, str]]) -> int:
    """Return where the part of `text` ends that can be judged now."""
    cut = text.rfind(b"\n") + 1
    if len(text) - cut > LINE_MAX:
        cut = len(text) - OVERLAP
    for begins in _KEY_BEGINS.finditer(text, max(0, len(text) - KEY_MAX), cut):
        if text.find(b"-----END ", begins.end()) < 0:
            cut = begins.start()
            break
    for begin, end, _ in spans:
        if begin < cut < end:
            # The end of what is longer than any key is not waited for.
            cut = begin if len(text) - begin <= KEY_MAX else end
    return cut


def _without(data: bytes, begin: int, spans: Sequence[tuple[int, int, str]]) -> bytes:
    """Return `data`, which begins at `begin`, without `spans`.

    The replacement stands where a secret begins.
    """
    parts, at, end = [], begin, begin + len(data)
    for first, last, _ in spans:
        if last <= at or first >= end:
            continue
        parts.append(data[at - begin : max(first, at) - begin])
        if first >= begin:
            parts.append(REPLACEMENT)
        at = min(last, end)
    return b"".join([*parts, data[at - begin :]])
