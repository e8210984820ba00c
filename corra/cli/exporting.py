"""`export` and `diff`: a run's output in a file for others, and against another run's."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from corra import render
from corra.errors import CorraError, Misuse
from corra.exports import redaction
from corra.exports.private_file import FATE, private_file, refuse_present
from corra.model import ids
from corra.model.frames import Gap, Output
from corra.model.units import decimal_size
from corra.model.words import local_time, now

if TYPE_CHECKING:
    from collections.abc import Callable

    from corra.runs.run import Run

    from .flags import DiffFlags, ExportFlags

ENDINGS = {"cast": ".cast", "html": ".html", "tar": ".tar.gz"}
_FORMS = {".cast": "cast", ".html": "html", ".htm": "html", ".gz": "tar", ".tgz": "tar"}
DIFFERS = 1


def form_of(given: ExportFlags) -> str:
    """Return the format: what was asked for, else what the file's name ends with. Raises Misuse."""
    named = _FORMS.get(os.path.splitext(given.output or "")[1].lower())
    form = given.format or named or "cast"
    if given.v2 and form != "cast":
        raise Misuse(f"--v2 is of an asciicast, and this is {form}", fate="NOT DONE")
    return form


def rules_of(given: ExportFlags) -> tuple[redaction.Rule, ...]:
    """Read the rules of redaction, once, as a file may be a pipe. Raises Misuse for one that can't
    be used.
    """
    own = () if given.no_redact else redaction.DEFAULTS
    return (*own, *(rule for path in given.redact for rule in redaction.read_rules(path)))


class Export:
    """One run on its way into one file."""

    def __init__(
        self, given: ExportFlags, found: Run, *, form: str, rules: Sequence[redaction.Rule]
    ) -> None:
        self._given = given
        self._run = found
        self._form = form
        self._redactor = redaction.Redactor(rules)
        self._untimed: Callable[[], int] = int
        self._gone = 0
        self._state = state = found.state()
        self._path = given.output or self._file_name()
        if self._path != "-":
            refuse_present(self._path, force=given.force)
        size = sum(int(each.get("length", 0)) for each in (state.streams or {}).values())
        if form == "html" and given.tail is None:
            from corra.exports.html_page import PAGE_MAX

            if size > PAGE_MAX:
                raise CorraError(
                    f"{decimal_size(size)} are no page that a browser shows",
                    hint=["the last lines of it: -n 20000      all of it: --format cast, or tar"],
                    fate=FATE,
                    host=str(found.host),
                    prog_id=found.id,
                    label=found.label,
                )

    def _file_name(self) -> str:
        stem = "-".join(each for each in (self._run.name, ids.short(self._run.id)) if each)
        return re.sub(r"[^\w.-]+", "_", stem).lstrip(".-") + ENDINGS[self._form]

    def perform(self) -> int:
        """Write it, and say where to and what was cut out."""
        given, run = self._given, self._run
        if given.dry:
            given.screen.note(run.label, str(run.host), f"would be exported to {self._path}")
            return 0
        if self._path == "-":
            self._fill(partial(given.screen.output, 1))
            self._say("stdout", {})
            return 0
        with private_file(self._path, force=given.force) as file:
            self._fill(file.write)
        self._say(self._path, {"bytes": file.size, "sha256": file.sha256})
        return 0

    def _fill(self, write: Callable[[bytes], Any]) -> None:
        if self._form == "tar":
            self._fill_tar(write)
            return
        lines = self._cast() if self._form == "cast" else self._page()
        for line in lines:
            write(line)

    def _events(self) -> Iterator[Output | Gap]:
        follow = self._run.follow(tail=self._given.tail, live=False, times=True)
        for event in redaction.RedactedOutput(self._redactor).of(follow):
            if isinstance(event, Gap):
                self._gone += event.end - event.start
            yield event

    @property
    def _command(self) -> str:
        return shlex.join(self._redactor.argv(self._state.argv))

    @property
    def _title(self) -> str:
        return self._redactor.text(f"{self._state.label} on {self._run.host}")

    def _cast(self) -> Iterator[bytes]:
        from corra.exports.asciicast import Asciicast, Terminal

        terminal = Terminal()
        if self._state.pty:
            wanted = self._run.record()[0].get("run", {}).get("terminal") or {}
            size = wanted.get("columns") or 80, wanted.get("rows") or 24
            terminal = Terminal(*size, wanted.get("term") or terminal.kind)
        cast = Asciicast(
            self._state,
            command=self._command,
            title=self._title,
            terminal=terminal,
            version=2 if self._given.v2 else 3,
        )
        self._untimed = lambda: cast.untimed
        yield from cast.lines(self._events())

    def _page(self) -> Iterator[bytes]:
        from corra.exports.html_page import html_page

        facts = render.status(self._state, now(), None, None)
        yield from html_page(
            self._events(), title=self._title, facts=[self._redactor.text(each) for each in facts]
        )

    def _fill_tar(self, write: Callable[[bytes], Any]) -> None:
        from corra.exports.tarball import write_tar

        def facts() -> dict[str, Any]:
            return {
                "v": 1,
                "host": str(self._run.host),
                "exported_at": now().isoformat(),
                "redacted": dict(self._redactor.hits),
            }

        moment = local_time(self._state.end_time or self._state.start_time)
        write_tar(
            write,
            self._events(),
            folder=self._file_name().removesuffix(ENDINGS["tar"]),
            state=self._redactor.values(self._state.to_json()),
            facts=facts,
            time_s=moment.timestamp() if moment else 0.0,
        )

    def _say(self, path: str, facts: dict[str, Any]) -> None:
        given, run, hits = self._given, self._run, self._redactor.hits
        untimed = self._untimed()
        if given.json:
            if path != "stdout":
                told = {"format": self._form, "redacted": dict(hits), "untimed": untimed, **facts}
                given.screen.event(
                    "exported",
                    host=str(run.host),
                    prog_id=run.id,
                    file=path,
                    gone=self._gone,
                    **told,
                )
            return
        size = f" ({decimal_size(facts['bytes'])})" if facts else ""
        where = f"exported to {path}{size}"
        given.screen.note(run.label, str(run.host), f"{where}; {redacted_words(hits)}")
        notes = []
        if not self._state.ended:
            notes.append("it goes on; this is its output so far")
        if self._gone:
            notes.append(f"{decimal_size(self._gone)} of its output are gone")
        if untimed:
            notes.append(f"{decimal_size(untimed)} have no time there and play at once")
        for note in notes:
            given.screen.note(run.label, str(run.host), note)


def redacted_words(hits: Any) -> str:
    """Return `3 secrets cut out: 2 named secret, 1 AWS key`, or that there was none."""
    total = sum(hits.values())
    if not total:
        return "no secret found by the rules"
    kinds = ", ".join(f"{count} {name}" for name, count in hits.most_common())
    return f"{total} secret{'s' * (total != 1)} cut out: {kinds}"


# -- diff


def show_diff(given: DiffFlags, runs: tuple[Run, Run]) -> int:
    """Show what differs between the outputs of two runs; return 1 if anything does, else 0."""
    from corra.exports.comparison import Binary, unified

    states = [run.state() for run in runs]
    for run, state in zip(runs, states, strict=True):
        if not state.ended:
            given.screen.note(run.label, str(run.host), "it goes on; this is its output so far")
    streams = [given.stream] if given.stream in ("stdout", "stderr") else ["stdout", "stderr"]
    different: dict[str, dict[str, Any]] = {}
    for stream in streams:
        names = _names(runs, stream)
        changed = {"removed": 0, "added": 0}
        try:
            for line in unified(
                *(_pieces(given, run, stream) for run in runs), names=names, ignored=given.ignore
            ):
                if not line.startswith((b"--- ", b"+++ ")):
                    changed["removed"] += line.startswith(b"-")
                    changed["added"] += line.startswith(b"+")
                different[stream] = changed
                if not given.json:
                    given.screen.output(1, line)
        except Binary:
            if _same_bytes(*(_pieces(given, run, stream) for run in runs)):
                continue
            different[stream] = {"binary": True}
            if not given.json:
                given.screen.lines([f"Binary outputs {names[0]} and {names[1]} differ"])
    if given.json:
        compared = {"a": runs[0].id, "b": runs[1].id, "equal": not different, "streams": different}
        given.screen.event("diff", **compared)
    return DIFFERS if different else 0


def _names(runs: tuple[Run, Run], stream: str) -> tuple[str, str]:
    def named(run: Run) -> str:
        return render.visible(f"{ids.typable(run.id)} ({run.host}) {stream}")

    return named(runs[0]), named(runs[1])


def _pieces(given: DiffFlags, run: Run, stream: str) -> Iterator[bytes]:
    # A merged run's output, or a terminal's, stands for stdout.
    wanted = [stream, "output"] if stream == "stdout" else [stream]
    for event in run.follow(streams=wanted, live=False):
        if isinstance(event, Output):
            yield event.data
        elif isinstance(event, Gap):
            gone = decimal_size(event.end - event.start)
            given.screen.note(run.label, str(run.host), f"{gone} of its {event.stream} are gone")


def _same_bytes(one: Iterator[bytes], other: Iterator[bytes]) -> bool:
    left, right = b"", b""
    while True:
        left = left or next(one, b"")
        right = right or next(other, b"")
        size = min(len(left), len(right))
        if not size:
            return left == right
        if left[:size] != right[:size]:
            return False
        left, right = left[size:], right[size:]
