"""Makes words of facts: a run's fate, times and sizes, the table of runs, the screen of one run.

Pure: no clock, no I/O. Foreign text (a name, a host's message, a command) goes through `visible`,
so that no line of corra's holds a control character.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from types import SimpleNamespace
from typing import Any

from corra.errors import is_seen
from corra.model import ids
from corra.model.ends import end_error
from corra.model.program import command_text
from corra.model.state import State, exit_code
from corra.model.units import decimal_size, duration
from corra.model.words import local_time

DONE = "done"
STARTED = "started"
STILL_RUNNING = "STILL RUNNING"
NOT_RECORDED = "NOT RECORDED"
# The fates of a good end. Only a terminal shows them.
QUIET = frozenset({DONE, STARTED})

_MADE = r"(\d{4})(\d\d)(\d\d)t(\d\d)(\d\d)(\d\d)z-"
_FIELD = r"\{(\w+)\}"
_INDENT = " " * len("corra: ")
# What hints have one type; a line end within it would end it.
_COMMAND = r"(?:^|[\s/])(?:corra|inv|invoke|ssh|ssh-keygen|sudo|loginctl|pip|python\S*) "
# Begins what a line had no room for; a hint is indented by two less.
_FOLDED = " " * 9
# Stands for a blank at which no line is broken; `visible` lets none through.
_GLUE = "\0"
# The blank between a number and its unit.
_AMOUNT = r"(?<=\d) (?=(?:ms|s|min|h|d|B|kB|MB|GB|TB)\b)"
HELD_BACK = "HELD BACK: no room on the disk there"


def visible(text: str) -> str:
    """Return `text` on one line, with each character visible that is not: fit for any terminal.

    Among these are control characters, line ends, changes of direction, and letters without a
    shape.
    """
    if text.isascii() and text.isprintable():
        return text
    with contextlib.suppress(UnicodeEncodeError):  # half a character, which is escaped below
        text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(char if is_seen(char) else _caret(char) for char in text)


def _caret(char: str) -> str:
    code = ord(char)
    if code < 0x20 or code == 0x7F:
        return "^" + chr(code ^ 0x40)
    return f"\\x{code:02x}" if code < 0x100 else char.encode("unicode_escape").decode()


# -- How long, how much, when


def running_time(seconds: float) -> str:
    """Return `0:02` or `0:41:07`, for a figure that moves."""
    whole = int(max(0.0, seconds))
    hours, minutes = divmod(whole // 60, 60)
    return (
        f"{hours}:{minutes:02}:{whole % 60:02}"
        if whole >= 600
        else f"{whole // 60}:{whole % 60:02}"
    )


def past_moment(text: str | None, now: datetime) -> str:
    """Return `04:02` for today, `Sat 03:10` for this week, `9 Nov` before that."""
    then = local_time(text)
    if then is None:
        return "an unknown time"
    if then.date() == now.astimezone().date():
        return f"{then:%H:%M}"
    return (
        f"{then:%a %H:%M}"
        if timedelta() <= now - then < timedelta(days=7)
        else f"{then.day} {then:%b}"
    )


def since(text: str | None, now: datetime) -> float | None:
    """Return the seconds between a State's time and `now`, 0 for a time to come."""
    then = local_time(text)
    return None if then is None else max(0.0, (now - then).total_seconds())


def ended_at(state: State) -> str | None:
    """Return the time when a run ended, or when the id of a run that never started was made."""
    if state.end_time or state.state != "not_started":
        return state.end_time
    made = re.match(_MADE, state.prog_id)
    return "{}-{}-{}T{}:{}:{}+00:00".format(*made.groups()) if made else None


def host_now(state: State, now: datetime) -> datetime:
    """Return the time on the host's clock when it sent the `state` of an open run.

    The host's clock may differ from ours; ages are computed on one clock.
    """
    started = local_time(state.start_time)
    return (
        now
        if started is None or state.elapsed is None or state.ended
        else started + timedelta(seconds=state.elapsed)
    )


# -- What became of it


def fate(state: State, host: str = "", *, now: datetime | None = None) -> tuple[str, str]:
    """Return (FATE, why) of a run. With `now`, for a run that had ended before, why says when."""
    took = "" if state.elapsed is None else duration(state.elapsed)
    if state.overdue == "end":
        return NOT_RECORDED, f"its program has ended, but {hindrance(state)}"
    if not state.ended and state.overdue:
        due = "past its timeout" if state.overdue == "timeout" else "its KILL is overdue"
        return STILL_RUNNING, f"{due}: {hindrance(state)}"
    if not state.ended:
        return STILL_RUNNING, f"for {took}" if took else ""
    at = f" at {past_moment(state.end_time, now)}" if now is not None and state.end_time else ""
    bad = end_error(state, host or state.host, SimpleNamespace())  # for its words, without a Result
    if bad is None:
        return DONE, f"exit 0{at}" + (f" after {took}" if took else "")
    return bad.fate, bad.why + ("," + at if at and state.state == "exited" else "")


def hindrance(state: State) -> str:
    """Return what keeps a run's keeper from its work, "" where nothing does."""
    told = state.hindered or {}
    return {
        "": "",
        "stopped": "its guards are STOPPED",
        "traced": "a debugger holds its keeper",
        "kernel": "its keeper hangs in the kernel",
        "room": "no room on the disk there",
    }.get(str(told.get("why") or ""), "its keeper can't work")


def remedy(state: State, host: str = "") -> list[str]:
    """Return what to do about that on the host, as a hint."""
    told = state.hindered or {}
    guards = dict.fromkeys([*state.standby_pids, *([told["pid"]] if told.get("pid") else [])])
    pids = " ".join(map(str, guards))
    what = {
        "stopped": f"kill -CONT {pids}",
        "traced": f"end the debugger, process {told.get('by') or '?'}",
        "kernel": f"see what process {told.get('pid') or '?'} waits for: a disk?",
        "room": f"make room:  df {state.spool}",
    }.get(str(told.get("why") or ""))
    return [f"on {host or state.host} as {state.user}:  {what}"] if what else []


def trouble(state: State) -> str:
    """Return what an operator who watches a run has to know of it, "" where all is well."""
    if state.ended:
        return f"{': '.join(fate(state))}; {_unmoved(state)}" if state.overdue else ""
    if state.overdue == "end":
        return ": ".join(fate(state))
    if state.hindered:
        return fate(state)[1] if state.overdue else hindrance(state)
    return HELD_BACK if state.blocked else ""


def _unmoved(state: State) -> str:
    """Return why output of an ended run isn't there yet."""
    return f"the rest of its output waits: {hindrance(state)}"


def left_over(state: State) -> str:
    """Return `2 processes are left: 8177 sleep, 8178 tee`, "" where the run left none."""
    left = state.stragglers
    if not left:
        return ""
    named = ", ".join(f"{each.get('pid')} {each.get('name', '')}".strip() for each in left[:3])
    more = f" and {len(left) - 3} more" if len(left) > 3 else ""
    return f"{len(left)} process{' is' if len(left) == 1 else 'es are'} left: {named}{more}"


def word(state: State) -> str:
    """Return the state in the table: `running`, `done`, `FAILED 2`, `KILLED`."""
    if not state.ended:
        return state.state
    told = fate(state)[0]
    return (
        f"{told} {state.return_code}"
        if told == "FAILED" and state.return_code is not None
        else told
    )


def _standing(state: State) -> str:
    """Return `word`, or what keeps an open run from going on."""
    if state.ended or not state.overdue:
        return "HELD BACK" if state.blocked and not state.ended else word(state)
    return NOT_RECORDED if state.overdue == "end" else "OVERDUE"


def went_well(state: State) -> bool:
    return state.state == "exited" and exit_code(state) == 0


# -- The table of runs

RUNS_HEAD = ("ID", "NAME", "HOST", "STATE", "FOR", "OUTPUT", "BY", "COMMAND")


def order(states: Sequence[State]) -> list[State]:
    """Return the States in the table's order: open runs first, each group from the newest."""
    return sorted(
        states,
        key=lambda state: (
            not state.ended,
            state.start_time or ended_at(state) or "",
            state.prog_id,
        ),
        reverse=True,
    )


def row(state: State, now: datetime, host: str = "") -> tuple[str, ...]:
    """Return one run's cells of the table."""
    there = host_now(state, now)
    silent = since(state.last_output_time, there)
    over = since(ended_at(state), now)
    age = "-" if over is None else _ago(over)
    return (
        visible(ids.short(state.prog_id)),
        visible(state.name or "-"),
        visible(host or state.host or "-"),
        visible(_standing(state)),
        age if state.ended else _short(state.elapsed or 0.0),
        "-" if state.ended or silent is None else _ago(silent),
        visible(str((state.origin or {}).get("user") or "-")),
        visible(command_text(state.argv)),
    )


def formatted(layout: str, state: State, cells: Sequence[str]) -> str:
    """Return `layout` with each {name} replaced, a column of the table or a key of the State.

    Raises KeyError with a name that is neither.
    """
    values = {
        **state.to_json(),
        "command": command_text(state.argv),
        **dict(zip(map(str.lower, RUNS_HEAD), cells, strict=False)),
    }
    values.update(name=state.name or "", command=visible(command_text(state.argv)))
    text = layout.replace("\\t", "\t").replace("\\n", "\n")
    return re.sub(_FIELD, lambda match: _field(values[match.group(1)]), text)


def _field(value: Any) -> str:
    return "" if value is None else visible(value if isinstance(value, str) else json.dumps(value))


def _short(seconds: float) -> str:
    """Return a duration for a narrow column: `4 s`, `2 h 11 m`."""
    return f"{int(seconds)} s" if seconds < 60 else duration(seconds).replace("min", "m")


def _ago(seconds: float) -> str:
    """Return an age by its largest unit alone: `5 h ago`."""
    return " ".join(_short(seconds).split()[:2]) + " ago"


class Table:
    """A table whose rows come in parts: a part's columns are at least as wide as those before."""

    def __init__(self, width: int | None = None, head: Sequence[str] = RUNS_HEAD) -> None:
        """The last column is cut with `..` where it passes `width`."""
        self._width, self._head = width, head
        self._widths = [0] * (len(head) - 1)
        self._begun = False

    def lines(self, rows: Sequence[Sequence[str]]) -> list[str]:
        """Return the lines of some more rows, the first time below the head."""
        everything = rows if self._begun else [self._head, *rows]
        self._begun = True
        for line in everything:
            self._widths = [
                max(most, _width(cell)) for most, cell in zip(self._widths, line, strict=False)
            ]
        return [self._line(line) for line in everything]

    def _line(self, line: Sequence[str]) -> str:
        start = "".join(
            cell + " " * (most - _width(cell) + 2)
            for cell, most in zip(line, self._widths, strict=False)
        )
        return cut(start + line[-1], self._width)


def table(
    rows: Sequence[Sequence[str]], width: int | None = None, head: Sequence[str] = RUNS_HEAD
) -> list[str]:
    """Return the lines of a whole table."""
    return Table(width, head).lines(rows)


def _width(text: str) -> int:
    """Return the width of `text` on a terminal, in columns."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def cut(text: str, width: int | None) -> str:
    """Return `text` in at most `width` columns, with `..` in place of what doesn't fit."""
    if width is None or _width(text) <= width:
        return text
    while text and _width(text) > width - 2:
        text = text[:-1]
    return text + ".."


def folded(text: str, width: int, fate: str = "") -> str:
    """Return a line of corra's in lines of at most `width` columns, each further one indented.

    What stands between two double spaces is a command to type; it is never broken, nor is `fate`.
    """
    if _width(text) <= width:
        return text
    bare = text.lstrip()
    lines, gap = [text[: len(text) - len(bare)]], ""
    text = re.sub(_AMOUNT, _GLUE, bare)
    parts = re.split(r"(  +)", text.replace(fate, fate.replace(" ", _GLUE)) if fate else text)
    parts[2::4] = [command.replace(" ", _GLUE) for command in parts[2::4]]
    for word, then in re.findall(r"(\S+)(\s*)", "".join(parts)):
        if gap and _width(lines[-1] + gap + word) > width:
            lines.append(_FOLDED + word)
        else:
            lines[-1] += gap + word
        gap = then
    return "\n".join(lines).replace(_GLUE, " ")


def folded_hint(hint: str, width: int) -> str:
    """Return a hint in lines of at most `width` columns, unless it has a command to type in it."""
    if re.search(_COMMAND, hint):
        return hint
    return _INDENT + folded(hint.strip(), width - len(_INDENT))


# -- The screen of one run


def status(
    state: State,
    now: datetime,
    looked: Mapping[str, Any] | None = None,
    width: int | None = None,
) -> list[str]:
    """Return the lines of `status`. `looked` is the answer of `Run.processes`.

    With `width`, the first line is folded into as many columns. The others are single facts.
    """
    there = host_now(state, now)
    who = f" as {state.user}" if state.user else ""
    told, why = (
        ("running", f"for {duration(state.elapsed or 0.0)}")
        if not state.ended and not state.overdue
        else fate(state, now=now)
    )
    joint = " " if told == "running" else ": "
    head = visible(f"{state.label} on {state.host}{who}: ") + f"{told}{joint}{why}"
    lines = [head] if width is None else folded(head, width, told).split("\n")
    facts: list[tuple[str, str]] = [
        ("command", command_text(state.argv) + (f"   in {state.cwd}" if state.cwd else ""))
    ]
    if started := local_time(state.start_time):
        facts.append(
            (
                "asked" if state.state == "not_started" else "started",
                f"{started:%Y-%m-%d %H:%M:%S} {_offset(started)}{_by(state.origin)}",
            )
        )
    if over := local_time(state.end_time):
        facts.append(("ended", f"{over:%Y-%m-%d %H:%M:%S} {_offset(over)}"))
    waits = f"; {_unmoved(state)}" if state.overdue == "output" else ""
    facts.append(("output", _output(state, there) + waits))
    if state.stdin is not None:
        facts.append(("input", _input(state)))
    if state.blocked:
        facts.append(
            (
                "blocked",
                str(
                    state.blocked.get("reason")
                    or state.blocked.get("message")
                    or "held back: no room on the disk"
                ),
            )
        )
    if looked and looked["processes"]:
        facts += _together(looked["processes"], looked["spool"])
    if not state.ended:
        facts.append(("process", _process(state)))
    facts += [("mend", each) for each in remedy(state)]
    if state.stragglers:
        facts.append(("leftover", left_over(state)))
    for sent in state.signals_sent[-3:]:
        sender = f" by {sent['by']}" if sent.get("by") else ""
        at = past_moment(sent.get("time"), now)
        facts.append(
            (
                "signal",
                f"{_plain(str(sent.get('signal')))} at {at}{sender}",
            )
        )
    if state.ended and (usage := state.rusage):
        facts.append(("used", _used(usage)))
    facts.append(("id", state.prog_id))
    if state.spool and not state.archived_time:
        facts.append(("spool", state.spool))
    return [*lines, *(f"  {name:<9}{visible(text)}" for name, text in facts)]


def _input(state: State) -> str:
    """Return the bytes sent to a stdin that is held open, and those the program hasn't read."""
    told = state.stdin or {}
    sent, moved = (
        number if type(number := told.get(name)) is int else 0 for name in ("length", "moved")
    )
    waiting = f", {decimal_size(sent - moved)} wait for the program" if sent > moved else ""
    how = "terminal" if state.pty else "stdin"
    return f"{how} {decimal_size(sent)} sent{waiting}" + (
        ", ended" if told.get("ended") else ", open" if not state.ended else ""
    )


def _together(
    processes: Sequence[Mapping[str, Any]], disk: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """Return the use of all processes together, the stuck ones, and the room on the disk."""
    count = len(processes)
    cpus, memory = (sum(each[name] for each in processes) for name in ("cpus", "memory"))
    used = f"{count} process{'es' * (count != 1)}, {cpus:.1f} CPUs, {decimal_size(memory)}"
    stuck = [
        f"{each['pid']} {each['name']} waits for {_awaited(each)}"
        for each in processes
        if each["state"] == "D"
    ]
    more = f" and {len(stuck) - 2} more" if len(stuck) > 2 else ""
    low = ", LOW" if disk["free"] < 2 * disk["floor"] else ""
    return [
        ("disk", f"{decimal_size(disk['free'])} left{low}"),
        ("tree", "; ".join([used, *([", ".join(stuck[:2]) + more] if stuck else [])])),
    ]


def tree(processes: Sequence[Mapping[str, Any]], width: int | None = None) -> list[str]:
    """Return the lines that `status --tree` adds: each process below its parent, with its use."""
    lines: list[str] = []
    pids = {each["pid"] for each in processes}
    below: dict[int, list[Mapping[str, Any]]] = {}
    for each in processes:
        below.setdefault(each["parent"] if each["parent"] in pids else 0, []).append(each)
    todo = [(each, 0) for each in reversed(below.get(0, []))]
    while todo:
        each, depth = todo.pop()
        command = shlex.join(each["argv"]) if each["argv"] else f"[{each['name']}]"
        used = f"{each['cpus']:4.1f} CPUs  {decimal_size(each['memory']):>6}"
        lines.append(
            cut(
                visible(f"  {each['pid']:>9}  {each['state']}  {used}  {'  ' * depth}{command}"),
                width,
            )
        )
        # Taken out: a host may name a process its own parent.
        todo += [(child, depth + 1) for child in reversed(below.pop(each["pid"], []))]
    return lines


def _awaited(process: Mapping[str, Any]) -> str:
    where = str(process.get("wchan") or "the kernel")
    return "nfs" if "nfs" in where else where


def _plain(signal: str) -> str:
    return signal.removeprefix("SIG")


def _offset(then: datetime) -> str:
    text = f"{then:%z}"
    return f"{text[:3]}:{text[3:]}"


def _by(origin: Mapping[str, Any] | None) -> str:
    if not origin or not origin.get("user"):
        return ""
    ticket = origin.get("ticket") or origin.get("runbook")
    return (
        f" by {origin['user']}"
        + (f"@{origin['host']}" if origin.get("host") else "")
        + (f", {ticket}" if ticket else "")
    )


def removal_day(state: State) -> str:
    """Return the day on which the host removed the run's output and kept its record, else ""."""
    then = local_time(state.archived_time)
    return f"{then:%Y-%m-%d}" if then else ""


def _output(state: State, there: datetime) -> str:
    amounts = [
        f"{name} {decimal_size(facts.get('length', 0))}"
        for name, facts in sorted((state.streams or {}).items(), reverse=True)
    ]
    dropped = sum(facts.get("dropped", 0) for facts in (state.streams or {}).values())
    if dropped and (day := removal_day(state)):
        amounts.append(f"removed on {day}")
    elif dropped:
        amounts.append(f"{decimal_size(dropped)} dropped")
    silent = since(state.last_output_time, there)
    if silent is not None:
        amounts.append(f"last {_short(silent)} ago")
    return ", ".join(amounts) or "none yet"


def _process(state: State) -> str:
    guards = hindrance(state) or {
        "ok": "guards ok",
        "stopped": "its guards are STOPPED",
        "gone": "its guards are GONE",
    }.get(state.supervisor, state.supervisor)
    return (f"pid {state.pid}, " if state.pid else "") + guards


def _used(usage: Mapping[str, Any]) -> str:
    seconds = float(usage.get("utime") or 0) + float(usage.get("stime") or 0)
    memory = usage.get("maxrss_kb")
    return f"{duration(seconds)} of CPU" + (
        f", {decimal_size(int(memory) * 1024)} at most" if memory else ""
    )


# -- The live line


def live(
    label: str,
    host: str,
    *,
    elapsed: float,
    amount: int,
    silent: float | None,
    width: int,
    trouble: str = "",
    ended: bool = False,
) -> str:
    """Return the line that is redrawn while a run is watched.

    `ended`: only what comes after the program's end is still awaited.
    """
    said = trouble or ("no output yet" if silent is None else f"output {_short(silent)} ago")
    goes = "" if ended else f"running  {running_time(elapsed)}  "
    return _spread(
        f"{label} {host}  {goes}{decimal_size(amount)}  {said}",
        "Ctrl-C: detach",
        width,
    )


def live_waiting(
    label: str, host: str, *, elapsed: float, trouble: str, width: int, ended: bool = False
) -> str:
    """Return the live line of `wait`, which shows no output."""
    goes = [] if ended else [f"running  {running_time(elapsed)}"]
    said = "  ".join([f"{label} {host}", *goes, *([trouble] if trouble else [])])
    return _spread(said, "Ctrl-C: stop waiting", width)


def live_without_link(label: str, host: str, *, since_s: float, tries: int, width: int) -> str:
    """Return the live line while the link is down."""
    return _spread(
        f"{label} {host}  LINK LOST {duration(since_s)} ago, program unaffected;"
        f" connecting (try {tries})",
        "",
        width,
    )


def _spread(left: str, right: str, width: int) -> str:
    left = visible(left)
    room = width - _width(left) - len(right)
    return left + " " * room + right if right and room >= 2 else cut(left, width)
