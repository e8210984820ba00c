"""A program type for the scheduler Apsis: its jobs' programs run on any host and survive Apsis.

    program:
        type: corra.apsis.CorraProgram
        host: db1
        argv: [./backup, "{{ date }}"]
        timeout: 2h

The host keeps the program and its output, so a restart of Apsis loses nothing: the next Apsis takes
hold of the run by its id. docs/apsis.md has every field.

Apsis names this module in its job files and in its database, and imports it from there. Nothing
else of corra imports it, and it needs an installed Apsis (2.4).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from apsis.exc import SchemaError
from apsis.program.base import (
    Output as ApsisOutput,
    OutputMetadata,
    Program,
    ProgramError,
    ProgramFailure,
    ProgramRunning,
    ProgramSuccess,
    ProgramUpdate,
    RunningProgram,
)
from apsis.runs import template_expand

from corra.errors import CorraError, MaybeStarted, Misuse, NotFound, NotStarted
from corra.model import ids
from corra.model.ends import end_error
from corra.model.frames import Gap, Output, Status
from corra.model.host import Host, reach_flags
from corra.model.options import OPTIONS
from corra.model.state import State
from corra.model.units import parse_size
from corra.remote.agent_client import Agent
from corra.remote.targets import agent_for
from corra.runs.clock import Clock
from corra.runs.kept import EndsKept
from corra.runs.patience import pause_s
from corra.runs.request import launch
from corra.runs.run import Run

# Apsis keeps each output in its memory until the run has ended, and then in its database.
MAX_OUTPUT = 16 << 20
# What is kept of the beginning of a longer output; the rest is its end.
HEAD = 1 << 20
# Each update hands over the whole output so far, and Apsis sends what is new to its watchers. Small
# outputs are shown each second. Large ones wait for growth, and ten seconds at most.
UPDATE_S, SLOW_UPDATE_S = 1.0, 10.0
SMALL, GROWTH, GROWTH_SHARE = 1 << 20, 64 << 10, 0.05
# A run id that the host knows from so long before belongs to another Apsis or to an older database.
OURS_S = 86400.0
# So long a start is repeated whose host may have it and doesn't answer any more.
MAYBE_STARTED_S = 600.0

_T = TypeVar("_T")


# -- The job's fields


def _text(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Misuse("must be text")
    return str(value)


def _texts(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise Misuse("must be a list")
    return [_text(each) for each in value]


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise Misuse("must be a mapping")
    return {str(name): each for name, each in value.items()}


def _argv(value: Any) -> list[str]:
    words = _texts(value)
    if not words or not words[0]:
        raise Misuse("must be a list of words, the first of them the program")
    return words


def _env(value: Any) -> dict[str, str | None]:
    return {name: None if each is None else _text(each) for name, each in _mapping(value).items()}


def _env_inherit(value: Any) -> bool | list[str]:
    return value if isinstance(value, bool) else _texts(value)


def _secrets(value: Any) -> list[str]:
    names = _texts(value)
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*(=.+)?", name):
            raise Misuse(f"not NAME or NAME=FILE: {name!r}")
    return names


def _host(value: Any) -> str:
    return str(Host.parse(_text(value)))


def _umask(value: Any) -> int:
    text = _text(value)
    if not re.fullmatch(r"[0-7]{1,4}", text):
        raise Misuse(f'not a umask: {text!r} (say "022")')
    return int(text, 8)


def _max_output(value: Any) -> int:
    most = value if type(value) is int else parse_size(_text(value))
    if not 1 << 12 <= most <= 1 << 30:
        raise Misuse("must be from 4K to 1G")
    return int(most)


def _stderr(value: Any) -> str:
    if value not in ("output", "stderr"):
        raise Misuse('must be "output" or "stderr"')
    return str(value)


def _duration(name: str) -> Callable[[Any], Any]:
    return lambda value: OPTIONS[name].read(_text(value))


# What each field of a job becomes. A reader raises Misuse.
FIELDS: Mapping[str, Callable[[Any], Any]] = {
    "host": _host,
    "argv": _argv,
    "cwd": _text,
    "env": _env,
    "env_inherit": _env_inherit,
    "secrets": _secrets,
    "stdin": _text,
    "umask": _umask,
    "timeout": _duration("timeout"),
    "grace": _duration("grace"),
    "keep": _duration("keep"),
    "stop_signal": lambda value: OPTIONS["stop_signal"].read(_text(value)),
    "user": _text,
    "as_user": _text,
    "via": _text,
    "spool": _text,
    "limits": lambda value: OPTIONS["limits"].read(_mapping(value)),
    "max_output": _max_output,
    "stderr": _stderr,
}
NEEDED = ("host", "argv")
_OF_LAUNCH = (
    *("cwd", "env", "env_inherit", "stdin", "umask", "timeout", "grace", "keep", "stop_signal"),
    *("limits", "spool"),
)
_OF_REACH = ("user", "as_user", "via")


def _is_template(value: Any) -> bool:
    """Return whether any text in `value` is still to be expanded."""
    if isinstance(value, Mapping):
        return any(_is_template(each) for pair in value.items() for each in pair)
    if isinstance(value, list):
        return any(map(_is_template, value))
    return isinstance(value, str) and ("{{" in value or "{%" in value or "{#" in value)


def _expanded(value: Any, args: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {_expanded(name, args): _expanded(each, args) for name, each in value.items()}
    if isinstance(value, list):
        return [_expanded(each, args) for each in value]
    return template_expand(value, args) if isinstance(value, str) else value


def _checked(given: Mapping[str, Any], *, bound: bool) -> dict[str, Any]:
    """Return the fields of a program as they were given. Raises SchemaError with a field's name.

    A field that is a template is read once its arguments are known.
    """
    found = dict(given)
    for name in NEEDED:
        if found.get(name) is None:
            raise SchemaError(f"missing field: {name}")
    for name, value in found.items():
        if name not in FIELDS:
            raise SchemaError(f"unknown field: {name} (there are {', '.join(FIELDS)})")
        if value is None or (not bound and _is_template(value)):
            continue
        try:
            FIELDS[name](value)
        except (Misuse, ValueError, TypeError) as error:
            why = error.why if isinstance(error, Misuse) else str(error)
            raise SchemaError(f"field {name}: {why}") from error
    return {name: value for name, value in found.items() if value is not None}


class _ProgramFields(Program):
    """A program's fields as its job has them."""

    _bound = False

    def __init__(self, given: Mapping[str, Any]) -> None:
        super().__init__()
        self.given = _checked(given, bound=self._bound)

    def __str__(self) -> str:
        words = self.given["argv"]
        line = " ".join(map(str, words)) if isinstance(words, list) else str(words)
        return f"{self.given['host']}: {line}"

    @classmethod
    def from_jso(cls, jso: Mapping[str, Any]) -> _ProgramFields:
        """Read a job's `program`, without its `type`. Raises SchemaError with a field's name."""
        return cls(jso)

    def to_jso(self) -> dict[str, Any]:
        return {**super().to_jso(), **self.given}


class CorraProgram(_ProgramFields):
    """A job's program, whose text may hold the job's arguments: `{{ date }}`."""

    def bind(self, args: Mapping[str, Any]) -> BoundCorraProgram:
        """Return the program of one run. Raises SchemaError, NameError for a missing argument."""
        return BoundCorraProgram(_expanded(self.given, args))


class BoundCorraProgram(_ProgramFields):
    """The program of one run of a job: its arguments are in its text."""

    _bound = True

    def read(self, name: str, default: Any = None) -> Any:
        """Return a field as its reader makes it."""
        return FIELDS[name](self.given[name]) if name in self.given else default

    def run(self, run_id: str, cfg: Mapping[str, Any]) -> RunningCorraProgram:
        return RunningCorraProgram(run_id, self, cfg)

    def connect(
        self, run_id: str, run_state: Mapping[str, Any], cfg: Mapping[str, Any]
    ) -> RunningCorraProgram:
        return RunningCorraProgram(run_id, self, cfg, run_state)


# -- One run


def prog_id_of(run_id: str, cfg: Mapping[str, Any]) -> str:
    """Return corra's id of an Apsis run. A start that is repeated with it starts nothing twice.

    `corra: {instance: NAME}` in Apsis's configuration tells several Apsis apart, whose run ids are
    the same. Raises Misuse.
    """
    instance = (cfg.get("corra") or {}).get("instance")
    prog_id = "-".join(["apsis", *([str(instance)] if instance else []), str(run_id)]).lower()
    if not ids.is_valid(prog_id):
        raise Misuse(f"not an id: {prog_id!r}: see `instance` in the configuration's `corra`")
    return prog_id


class _Shared:
    """The agents of hosts with running programs, one a host: the runs share its connection."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._agents: dict[tuple[Any, ...], tuple[Agent, int]] = {}

    @contextlib.contextmanager
    def agent(self, host: str, reach: Mapping[str, Any]) -> Iterator[Agent]:
        """Lend the host's agent. The last user's return closes its connection. Raises Misuse."""
        key = (host, *(reach.get(name) for name in _OF_REACH))
        with self._lock:
            agent, users = self._agents.get(key) or (agent_for(host, **reach), 0)
            self._agents[key] = (agent, users + 1)
        try:
            yield agent
        finally:
            with self._lock:
                agent, users = self._agents.pop(key)
                if users > 1:
                    self._agents[key] = (agent, users - 1)
            if users == 1:
                agent.close()


_SHARED = _Shared()


class _End(NamedTuple):
    """How a run ended: its final State, or the error that hides it."""

    state: State | None = None
    error: str = ""


class _Watcher:
    """One run, started or found again and followed to its end in a thread of its own.

    Apsis has one event loop, which must never wait, and asyncio's threads are few: fifty runs would
    take them all.
    """

    def __init__(
        self,
        program: BoundCorraProgram,
        prog_id: str,
        *,
        run_id: str,
        known: bool,
        told: Callable[[], None],
    ) -> None:
        """`known`: the run was started before. `told` is called from the thread at each news."""
        self.prog_id = prog_id
        self.host = program.read("host")
        self.state: State | None = None
        self.end: _End | None = None
        # Why the run can't be watched now.
        self.trouble = ""
        self._program, self._run_id, self._known, self._told = program, run_id, known, told
        self._reach = {name: program.read(name) for name in _OF_REACH if name in program.given}
        most = program.read("max_output", MAX_OUTPUT)
        self._apart = program.read("stderr", "output") == "stderr"
        names = ("output", "stderr") if self._apart else ("output",)
        self._kept = {name: EndsKept(HEAD, most) for name in names}
        self._missing = dict.fromkeys(names, 0)
        self._lock = threading.Lock()
        # Set once this side has left the run to itself.
        self.left = threading.Event()
        self._follow: Any = None

    @property
    def attach(self) -> str:
        """The line by which a person watches the run from a shell."""
        return f"corra attach {self._flags} {self.prog_id}"

    @property
    def _flags(self) -> str:
        host = Host.parse(self.host, login=self._reach.get("user"), user=self._reach.get("as_user"))
        spool = self._program.read("spool")
        return reach_flags(host, via=self._reach.get("via"), spool=spool)

    def start(self) -> None:
        threading.Thread(target=self._work, name=self.prog_id, daemon=True).start()

    def close(self) -> None:
        """Leave the run to itself."""
        self.left.set()
        with self._lock:
            if self._follow is not None:
                self._follow.close()

    def size(self) -> int:
        """Return how many bytes of output have come so far."""
        with self._lock:
            return sum(kept.total for kept in self._kept.values())

    def outputs(self) -> dict[str, ApsisOutput]:
        """Return what Apsis is to show: all of each stream, or its two ends with a line between."""
        with self._lock:
            found = {
                name: (*kept.ends(), kept.left_out, self._missing[name])
                for name, kept in self._kept.items()
            }
        titles = {"output": "output" if self._apart else "combined stdout & stderr"}
        outputs = {}
        for name, (head, tail, left_out, missing) in found.items():
            between = self._line(f"{left_out:,} bytes are left out here", name) if left_out else b""
            gone = self._line(f"{missing:,} bytes are gone from the host", name) if missing else b""
            data = head + between + tail + gone
            outputs[name] = ApsisOutput(
                OutputMetadata(titles.get(name, name), length=len(data)), data
            )
        return outputs

    def _line(self, what: str, name: str) -> bytes:
        stream = " --stderr" if name == "stderr" else ""
        return f"\n[corra: {what}: corra logs {self._flags}{stream} {self.prog_id}]\n".encode()

    # In the thread

    def _work(self) -> None:
        try:
            with _SHARED.agent(self.host, self._reach) as agent:
                self.end = self._to_end(agent)
        except CorraError as error:
            self.end = _End(error=error.line)
        except Exception as error:  # noqa: BLE001 - Apsis would wait for an end for ever
            self.end = _End(error=f"corra failed: {type(error).__name__}: {error}")
        self._told()

    def _to_end(self, agent: Agent) -> _End | None:
        """Return the run's end, whatever becomes of the link; None where this side leaves it."""
        clock = Clock()
        tries, until = 0, clock.now() + MAYBE_STARTED_S
        while not self.left.is_set():
            try:
                return self._once(agent)
            except NotFound as error:
                if not self._known:
                    raise
                return _End(error=f"LOST: its host has no record of it any more: {error.why}")
            except CorraError as error:
                # Another start with the id of this one starts nothing twice.
                unsure = isinstance(error, MaybeStarted) and clock.now() < until
                if not self._known and not unsure:
                    raise
                self.trouble = error.line
            self._told()
            tries += 1
            self.left.wait(pause_s(tries, clock))
        return None

    def _once(self, agent: Agent) -> _End | None:
        """Follow the run until it has ended, or until this side leaves it: None."""
        if self._known:
            run = Run(agent, self.prog_id, spool=self._program.read("spool"))
            run.begun = True
            follow, starting = run.follow(cursor=self._cursor()), None
        else:
            starting = launch(agent, self._program.read("argv"), **self._options())
            follow = starting.follow()
        with self._lock:
            self._follow = follow
        if self.left.is_set():
            follow.close()
        try:
            for event in follow:
                self._take(event, follow.state)
        finally:
            if starting is not None:
                starting.close()
        state = follow.state
        if state is None or not state.ended:
            return None
        self.state = state
        return _End(state)

    def _take(self, event: Any, state: State | None) -> None:
        match event:
            case Output(stream=stream, data=data):
                with self._lock:
                    self._kept[self._named(stream)].add(data)
            case Gap(stream=stream, start=begin, end=end):
                with self._lock:
                    self._missing[self._named(stream)] += end - begin
            case Status() if state is not None:
                self.trouble = ""
                if self.state is None and not self._known:
                    self._refuse_a_stranger(state)
                self._known = True
                self.state = state
            case _:
                return  # A link that is lost and back is no event for Apsis.
        self._told()

    def _refuse_a_stranger(self, state: State) -> None:
        """Raise NotStarted where the host knows this id from long ago.

        The id is made of Apsis's run id, and a new database counts from 1 again. To take the old
        run for ours would be to invent a success.
        """
        began = _seconds(state.start_time)
        if began is not None and time.time() - began > OURS_S:
            raise NotStarted(
                f"{self.prog_id} is a run of {state.start_time}: set `corra: instance: NAME` in"
                " Apsis's configuration after its database was made anew",
                host=self.host,
                prog_id=self.prog_id,
            )

    def _named(self, stream: str) -> str:
        return "stderr" if stream == "stderr" and self._apart else "output"

    def _cursor(self) -> dict[str, int] | None:
        """Return where a second follow of this thread goes on."""
        with self._lock:
            return dict(self._follow.cursor) if self._follow is not None else None

    def _options(self) -> dict[str, Any]:
        given = {
            name: self._program.read(name) for name in _OF_LAUNCH if name in self._program.given
        }
        env = {**(given.pop("env", None) or {}), "APSIS_RUN_ID": self._run_id}
        return {
            **given,
            "env": env,
            "merge": not self._apart,
            "secrets": given_secrets(self._program.read("secrets") or []),
            "id": self.prog_id,
            "via": self._reach.get("via"),
            "origin": {"apsis": self._run_id},
        }


def given_secrets(names: Sequence[str]) -> dict[str, str]:
    """Return the values of a job's secrets: NAME is Apsis's own variable, NAME=FILE a file's line.

    Raises NotStarted.
    """
    found = {}
    for each in names:
        name, equals, file = each.partition("=")
        try:
            value = Path(file).expanduser().read_text() if equals else os.environ[name]
        except KeyError:
            raise NotStarted(f"secret {name}: Apsis has no such variable") from None
        except (OSError, UnicodeDecodeError) as error:
            raise NotStarted(f"secret {name}: {file}: {error}") from error
        found[name] = value.removesuffix("\n") if equals else value
    return found


class RunningCorraProgram(RunningProgram):
    """A run while Apsis watches it. Apsis calls all methods from its event loop."""

    def __init__(
        self,
        run_id: str,
        program: BoundCorraProgram,
        cfg: Mapping[str, Any],
        run_state: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(run_id)
        self.program, self.cfg, self.run_state = program, cfg, run_state
        self._updates: AsyncIterator[Any] | None = None
        self._watcher: _Watcher | None = None

    @property
    def updates(self) -> AsyncIterator[Any]:
        """The one iterator over what becomes of the run."""
        if self._updates is None:
            self._updates = self._watch()
        return self._updates

    async def stop(self) -> None:
        """Stop the program: its stop signal, its grace and KILL, all of it by its host.

        While the host can't be reached this tries on until the run has ended.
        """
        await _in_thread(lambda: self._insist(lambda run: run.kill()))

    async def signal(self, signal: Any) -> None:
        """Send one signal. Raises CorraError where the host didn't take it."""
        name = getattr(signal, "name", None) or str(signal)
        await _in_thread(lambda: self._asked(lambda run: run.signal(name)))

    def _asked(self, ask: Callable[[Run], _T]) -> _T:
        watcher = self._watching()
        reach = {name: self.program.read(name) for name in _OF_REACH if name in self.program.given}
        with _SHARED.agent(watcher.host, reach) as agent:
            return ask(Run(agent, watcher.prog_id, spool=self.program.read("spool")))

    def _insist(self, ask: Callable[[Run], object]) -> None:
        watcher, clock, tries = self._watching(), Clock(), 0
        while watcher.end is None:
            try:
                self._asked(ask)
            except NotFound:
                raise
            except CorraError as error:
                watcher.trouble = error.line
                tries += 1
                watcher.left.wait(pause_s(tries, clock))
                if watcher.left.is_set():
                    raise
            else:
                return

    def _watching(self) -> _Watcher:
        if self._watcher is None:
            raise CorraError("the run isn't watched yet")
        return self._watcher

    async def _watch(self) -> AsyncIterator[Any]:
        loop, news = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # Apsis's loop has ended
                loop.call_soon_threadsafe(news.set)

        known = self.run_state is not None
        try:
            prog_id = (
                str(self.run_state["prog_id"])
                if self.run_state is not None
                else prog_id_of(self.run_id, self.cfg)
            )
            watcher = self._watcher = _Watcher(
                self.program, prog_id, run_id=self.run_id, known=known, told=tell
            )
        except CorraError as error:
            yield ProgramError(error.line)
            return
        watcher.start()
        try:
            while not known and watcher.end is None and watcher.state is None:
                await _until(news)
            started = watcher.state is not None and watcher.state.state != "not_started"
            if not known and started:
                self.run_state = {"host": watcher.host, "prog_id": prog_id}
                yield ProgramRunning(self.run_state, meta=self._meta(watcher))
            async for trouble in self._growth(watcher, news):
                meta = self._meta(watcher) if trouble else None
                yield ProgramUpdate(meta=meta, outputs=watcher.outputs())
            yield self._final(watcher)
        finally:
            watcher.close()

    async def _growth(self, watcher: _Watcher, news: asyncio.Event) -> AsyncIterator[bool]:
        """Yield when so much output has come that Apsis should have it; end with the run.

        What is yielded is whether the trouble with watching the run has changed.
        """
        shown, shown_at, trouble = 0, time.monotonic() - UPDATE_S, ""
        while watcher.end is None:
            size, changed = watcher.size(), watcher.trouble != trouble
            slow = size > SMALL and size - shown < max(GROWTH, GROWTH_SHARE * size)
            due_s = shown_at + (SLOW_UPDATE_S if slow else UPDATE_S) - time.monotonic()
            if size == shown and not changed:
                await _until(news)
            elif due_s > 0 and not changed:
                # News come with each chunk, and nothing is to be done about them until then.
                await asyncio.sleep(min(due_s, UPDATE_S))
            else:
                shown, shown_at, trouble = size, time.monotonic(), watcher.trouble
                yield changed

    def _meta(self, watcher: _Watcher) -> dict[str, Any]:
        state = watcher.state
        facts: dict[str, Any] = {
            "prog_id": watcher.prog_id,
            "host": watcher.host,
            "attach": watcher.attach,
        }
        if state is not None:
            facts["state"] = state.state
            facts["trouble"] = watcher.trouble or None
            facts["pid"] = state.pid
            facts["start_time"] = state.start_time
            if state.ended:
                facts["reason"] = state.reason
                facts["return_code"], facts["signal"] = state.return_code, state.signal
                facts["rusage"] = dict(state.rusage) if state.rusage else None
                facts["end_time"] = state.end_time
                # In `times` Apsis takes nothing but moments.
                facts["elapsed"] = state.elapsed
        return {name: value for name, value in facts.items() if value is not None}

    def _final(self, watcher: _Watcher) -> Any:
        end = watcher.end or _End(error="LOST: corra stopped watching the run")
        facts: dict[str, Any] = {"meta": self._meta(watcher), "outputs": watcher.outputs()}
        if end.state is None:
            return ProgramError(end.error, **facts)
        wrong = end_error(end.state, watcher.host)
        if wrong is None:
            return ProgramSuccess(**facts)
        message = f"{wrong.fate}: {wrong.why}"
        if end.state.state in ("lost", "not_started"):
            return ProgramError(message, **facts)
        return ProgramFailure(message, **facts)


async def _until(news: asyncio.Event, timeout_s: float | None = None) -> None:
    """Wait for news, or that long."""
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(news.wait(), timeout_s)
    news.clear()


async def _in_thread(work: Callable[[], _T]) -> _T:
    """Return what `work` returns in a thread of its own. If the caller leaves, the thread ends by
    itself.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if not future.done():
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type] # it is there without an error

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except BaseException as wrong:  # noqa: BLE001 - it is raised where it is awaited
            error = wrong
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=run, name="corra-order", daemon=True).start()
    return await future


def _seconds(iso: str | None) -> float | None:
    from datetime import datetime

    return None if iso is None else datetime.fromisoformat(iso).timestamp()
