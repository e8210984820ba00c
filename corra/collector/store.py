"""The tables' only user: one writer, many readers.

All writes go through one thread that takes what is waiting, does it in one transaction, and answers only when the commit is on the disk: many
appends share an fsync, and none is acknowledged before its own. Whatever is refused has changed nothing, so a batch fails only when the
database does; then each of its jobs is tried alone, and those that fail are told why.

That thread remembers how long the streams are which grow. Bytes that go on where a stream ends by what it remembers are written without a
look, and the statement that lengthens streams counts those that were as remembered: if another process has written too, the batch is undone
and done again by what the database says. Whatever isn't plainly next is never answered from memory.

What SQLite has committed lies in its log. A second thread moves it from there to the tables' file: the writer would stand still for a quarter of
its time if it did all of that itself. The last part is its own, in SQLite's checkpoint, so that the log begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, make_url

from corra.errors import Misuse
from corra.model import ids
from corra.model.state import State
from corra.on_host.agent.contract import FINAL

from . import tokens as keys
from .limits import Limits, RequestRefusal
from .notices import Hook
from .schema import chunks, notices, runs, streams, tokens

BATCH_JOBS = 512
BATCH_BYTES = 32 << 20
READ_BYTES = 1 << 20
# After so much output what is committed is moved out of the log, which has its own bound in `_engine`.
MOVE_BYTES = 4 << 20
STREAMS_MAX = 8
DOC_MAX = 1 << 20
# A run's own token lives as long as a host keeps the record of a run.
RUN_TOKEN_S = 400 * 86400.0
# Three signs of life that didn't come.
SILENT_S = 900.0
# How old a run's last sign of life may be where output says that there is one: a row less to write with each append.
HEARD_S = 10.0
# Of so many runs it is remembered how far they are; and for so long how much of an allowance is used up.
KNOWN_RUNS, ALLOWANCE_S = 10_000, 1.0
# So many rows go into one statement at most. The driver lets go of the interpreter at each statement, and gets it back when the event loop
# pauses: 30 statements of a row each waited longer for it than for the disk. SQLite before 3.32 takes 999 values.
STATEMENT_ROWS = 64
# What is left on the disk for everybody else; less counts as full.
FLOOR_BYTES, FLOOR_SHARE = 1 << 30, 20

# The newest migration; a test holds that it is.
HEAD = "0001"
MIGRATIONS = Path(__file__).with_name("migrations")

RunRow = Mapping[str, Any]

_log = logging.getLogger("corra.collector")


@dataclass
class _Stream:
    """One stream of a run."""

    id: int
    length: int


@dataclass
class _Run:
    """One run. `row` has its `doc` only where something asked for it: that may be a megabyte, and an append needs none."""

    row: dict[str, Any]
    streams: dict[str, _Stream] = field(default_factory=dict)


@dataclass
class _Memory:
    """What the writer remembers from one transaction to the next: never more than the last commit."""

    runs: dict[str, _Run] = field(default_factory=dict)
    # By owner: bytes that are kept for it, and until when that counts.
    allowance: dict[int, tuple[int, float]] = field(default_factory=dict)

    def clear(self) -> None:
        self.runs.clear()
        self.allowance.clear()


class _Stale(Exception):
    """Another process has written what was remembered otherwise."""


def _tell(answers: Iterable[tuple[Any, Any]]) -> None:
    """Answer each (Future, result or exception); those of an event loop all at once, since waking it costs more than the answer."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Any, Any]]] = {}
    for future, answer in answers:
        if isinstance(future, Future):
            _settle([(future, answer)])
        else:
            by_loop.setdefault(future.get_loop(), []).append((future, answer))
    for loop, found in by_loop.items():
        with contextlib.suppress(RuntimeError):  # it is closed: nobody is left to be told
            loop.call_soon_threadsafe(_settle, found)


def _settle(answers: Iterable[tuple[Any, Any]]) -> None:
    for future, answer in answers:
        if future.done():
            continue  # whoever asked has gone
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


@dataclass(slots=True)
class _Job:
    """Something to be done in the next batch, and whose answer it is."""

    do: Callable[[Batch], Any]
    prog_id: str
    size: int
    answer: Any


class Store:
    """The database. Reading methods may be called from any thread; writing ones return a Future, an event loop's own to who calls from one."""

    def __init__(
        self, database: str, limits: Limits | None = None, hooks: Sequence[Hook] = ()
    ) -> None:
        self.url = _url(database)
        self.file = Path(self.url.database or "")
        self.limits, self.hooks = limits or Limits(), tuple(hooks)
        self.engine = _engine(self.url)
        with self.engine.connect() as connection:
            migrate(connection)
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        # By event loop: what its present turn has asked for.
        self._turns: dict[asyncio.AbstractEventLoop, list[_Job]] = {}
        self._memory = _Memory()
        self._room_at = 0.0
        self._room = True
        self._moves: queue.SimpleQueue[bool] = queue.SimpleQueue()
        self._unmoved = 0
        self._moving = False
        self.committed: Callable[[set[str], int, float], None] = lambda prog_ids, jobs, seconds: (
            None
        )
        self._thread = threading.Thread(target=self._write, name="writer", daemon=True)
        self._mover = threading.Thread(target=self._move, name="mover", daemon=True)
        self._thread.start()
        self._mover.start()

    def close(self) -> None:
        """Finish what has been taken, and let go of the database."""
        self._jobs.put(None)
        self._thread.join()
        self._moves.put(False)
        self._mover.join()
        self.engine.dispose()

    # -- Writing

    def submit(self, do: Callable[[Batch], Any], *, prog_id: str = "", size: int = 0) -> Any:
        """Have `do` done in the next batch. The Future has its result when that is on the disk, or a Refusal."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            answer: Any = Future()
            self._jobs.put(_Job(do, prog_id, size, answer))
            return answer
        answer = loop.create_future()
        turn = self._turns.get(loop)
        if turn is None:
            # The writer is woken once for all that comes in one turn of the loop: woken by the first, it would commit that alone.
            turn = self._turns[loop] = []
            loop.call_soon(self._hand_over, loop)
        turn.append(_Job(do, prog_id, size, answer))
        return answer

    def _hand_over(self, loop: asyncio.AbstractEventLoop) -> None:
        for job in self._turns.pop(loop):
            self._jobs.put(job)

    def append(
        self,
        token: keys.Token,
        prog_id: str,
        stream: str,
        offset: int,
        data: bytes,
        gap: int | None = None,
    ) -> Any:
        """Append; the result is how long the stream is now. Raises Refusal (409 with `expected` for a hole)."""
        return self.submit(
            lambda batch: batch.append(token, prog_id, stream, offset, data, gap),
            prog_id=prog_id,
            size=len(data),
        )

    def report(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> Any:
        """Keep a State of a run that goes on."""
        return self.submit(lambda batch: batch.report(token, prog_id, value), prog_id=prog_id)

    def complete(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> Any:
        """Keep the final State; the result is whether it was new. Raises Refusal (409 while output is missing)."""
        return self.submit(lambda batch: batch.complete(token, prog_id, value), prog_id=prog_id)

    def register(self, token: keys.Token, prog_id: str, about: Mapping[str, Any]) -> Any:
        """Make a run known before it starts; the result has the run's own token, told this once."""
        return self.submit(lambda batch: batch.register(token, prog_id, about), prog_id=prog_id)

    def new_token(self, name: str, scopes: Sequence[str]) -> str:
        """Make a token for a person or a service, and return it."""
        return self.submit(lambda batch: batch.new_token(name, scopes)).result()[0]  # type: ignore[no-any-return]

    def revoke(self, name: str) -> int:
        """Take back every token of that name and those made with them; return how many."""
        return self.submit(lambda batch: batch.revoke(name)).result()  # type: ignore[no-any-return]

    def _write(self) -> None:
        with self.engine.connect().execution_options(writes=True) as connection:
            while jobs := self._gather():
                self._carry_out(connection, jobs)

    def _gather(self) -> list[_Job]:
        job = self._jobs.get()
        jobs, size = [], 0
        while job is not None:
            jobs.append(job)
            size += job.size
            if len(jobs) >= BATCH_JOBS or size >= BATCH_BYTES:
                break
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
        if job is None and jobs:
            self._jobs.put(None)  # the end, again, after these
        return jobs

    def _carry_out(self, connection: Connection, jobs: Sequence[_Job]) -> None:
        began = time.monotonic()
        try:
            answers = self._transact(connection, jobs)
        except Exception as error:  # noqa: BLE001 - one job's defect must not cost the others their answers
            if len(jobs) > 1:
                for job in jobs:
                    self._carry_out(connection, [job])
                return
            if not isinstance(error, (sa.exc.SQLAlchemyError, sqlite3.Error)):
                _log.exception("a write failed")
            _tell([(jobs[0].answer, _explained(error))])
            return
        self._move_on(sum(job.size for job in jobs))
        self.committed(
            {job.prog_id for job in jobs if job.prog_id}, len(jobs), time.monotonic() - began
        )
        _tell((job.answer, answer) for job, answer in zip(jobs, answers, strict=True))

    def _transact(self, connection: Connection, jobs: Sequence[_Job]) -> list[Any]:
        try:
            return self._attempt(connection, jobs)
        except _Stale:
            return self._attempt(connection, jobs)

    def _attempt(self, connection: Connection, jobs: Sequence[_Job]) -> list[Any]:
        answers: list[Any] = []
        try:
            with connection.begin():
                batch = Batch(
                    self, connection, {job.prog_id for job in jobs if job.prog_id}, self._memory
                )
                for job in jobs:
                    try:
                        answers.append(job.do(batch))
                    except RequestRefusal as refusal:
                        answers.append(refusal)
                batch.flush()
        except BaseException:
            self._memory.clear()  # it has what was not committed
            raise
        batch.forget_documents()
        return answers

    def _move_on(self, size: int) -> None:
        """Have what is committed moved once there is enough of it, unless that is under way: then SQLite's own checkpoint does nothing."""
        self._unmoved += size
        if self._unmoved >= MOVE_BYTES and not self._moving:
            self._unmoved, self._moving = 0, True
            self._moves.put(True)

    def _move(self) -> None:
        while self._moves.get():
            try:
                # Not one of SQLAlchemy's, which would begin a transaction.
                with contextlib.closing(self.engine.raw_connection()) as connection:
                    connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
            except (sa.exc.SQLAlchemyError, sqlite3.Error):
                _log.exception("what is committed stays in the log")
            self._moving = False

    def has_room(self) -> bool:
        """Return whether the disk is above its floor; asked of the file system at most once a second."""
        if (now := time.monotonic()) >= self._room_at:
            disk = os.statvfs(self.file.parent)
            floor = min(FLOOR_BYTES, disk.f_blocks * disk.f_frsize // FLOOR_SHARE)
            self._room, self._room_at = disk.f_bavail * disk.f_frsize > floor, now + 1
        return self._room

    # -- Reading

    def token(self, key: str) -> RunRow | None:
        """Return the token's row."""
        return self._one(sa.select(tokens).where(tokens.c.key == key))

    def run(
        self, prog_id: str, sight: Sequence[Mapping[str, str]] = ({},)
    ) -> dict[str, Any] | None:
        """Return one run as readers get it, None when there is none in sight."""
        found = self.runs({"id": prog_id}, sight, limit=1)
        return found[0] if found else None

    def runs(
        self,
        wanted: Mapping[str, Any],
        sight: Sequence[Mapping[str, str]],
        *,
        limit: int,
        before: tuple[float, int] | None = None,
    ) -> list[dict[str, Any]]:
        """Return the newest runs that are as `wanted`, among those in sight; `before` is where the last page ended."""
        query = sa.select(runs).where(
            *_conditions(wanted), sa.or_(*(sa.and_(True, *_conditions(each)) for each in sight))
        )
        if before is not None:
            query = query.where(
                sa.tuple_(runs.c.made, runs.c.id) < sa.tuple_(*map(sa.literal, before))
            )
        with self.engine.connect() as connection:
            rows = [
                dict(row)
                for row in connection.execute(
                    query.order_by(runs.c.made.desc(), runs.c.id.desc()).limit(limit)
                ).mappings()
            ]
            lengths = _lengths(connection, [row["id"] for row in rows])
            gaps = _gaps(connection, [row["id"] for row in rows])
        return [_shown(row, lengths.get(row["id"], {}), gaps.get(row["id"], [])) for row in rows]

    def output(self, prog_id: str, stream: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`; those of a gap are NUL, so that offsets stay true."""
        at = start
        while at < stop:
            query = (
                sa.select(chunks.c.start, chunks.c.stop, chunks.c.data)
                .join(streams, streams.c.id == chunks.c.stream)
                .join(runs, runs.c.id == streams.c.run)
                .where(
                    runs.c.prog_id == prog_id,
                    streams.c.name == stream,
                    chunks.c.stop > at,
                    chunks.c.start < min(stop, at + READ_BYTES),
                )
                .order_by(chunks.c.start)
            )
            with self.engine.connect() as connection:
                parts = connection.execute(query).all()
            if not parts:
                return  # retention has been here meanwhile
            for begin, end, data in parts:
                low, high = max(at, begin), min(stop, end)
                if data is None:  # it may be longer than all memory
                    high = min(high, low + READ_BYTES)
                yield bytes(high - low) if data is None else data[low - begin : high - begin]
                at = high
                if high < min(stop, end):
                    break

    def news(
        self, prog_id: str, cursor: Mapping[str, int]
    ) -> tuple[list[tuple[str, int, bytes | None, int, float]], dict[str, Any] | None]:
        """Return ([(stream, offset, data or None for a gap, end, time)] in the order of arrival, the run) from `cursor` on, about 1 MiB."""
        run = self.run(prog_id)
        if run is None:
            return [], None
        query = (
            sa.select(streams.c.name, chunks.c.start, chunks.c.data, chunks.c.stop, chunks.c.at)
            .join(streams, streams.c.id == chunks.c.stream)
            .join(runs, runs.c.id == streams.c.run)
            .where(
                runs.c.prog_id == prog_id,
                sa.or_(
                    *(
                        sa.and_(streams.c.name == name, chunks.c.stop > at)
                        for name, at in cursor.items()
                    ),
                    streams.c.name.not_in(cursor),
                ),
            )
            .order_by(chunks.c.id)
            .limit(64)
        )
        found, size = [], 0
        with self.engine.connect() as connection:
            for name, start, data, stop, at in connection.execute(query):
                skip = max(0, cursor.get(name, 0) - start)
                found.append((name, start + skip, None if data is None else data[skip:], stop, at))
                size += len(data or b"")
                if size >= READ_BYTES:
                    break
        return found, run

    def tail(self, prog_id: str, lines: int) -> dict[str, int]:
        """Return the cursor at the last `lines` lines of each stream, looked for in its last MiB."""
        run = self.run(prog_id)
        found = {}
        for name, length in (run["collector"]["received"] if run else {}).items():
            begin = max(0, length - READ_BYTES)
            data = b"".join(self.output(prog_id, name, begin, length))
            at = len(data) - data.endswith(b"\n") if lines else len(data)
            for _ in range(lines):
                at = data.rfind(b"\n", 0, at)
                if at < 0:
                    break
            found[name] = begin + at + 1 if at >= 0 and lines else length if not lines else begin
        return found

    def counts(self) -> dict[str, int]:
        """Return how many runs are in each state."""
        with self.engine.connect() as connection:
            rows = connection.execute(
                sa.select(runs.c.state, sa.func.count()).group_by(runs.c.state)
            )
            return {str(row[0]): int(row[1]) for row in rows}

    def size(self) -> int:
        """Return how many bytes of output are kept."""
        with self.engine.connect() as connection:
            return int(
                connection.execute(
                    sa.select(sa.func.coalesce(sa.func.sum(tokens.c.bytes), 0))
                ).scalar_one()
            )

    def _one(self, query: sa.Select[Any]) -> RunRow | None:
        with self.engine.connect() as connection:
            found = connection.execute(query).mappings().first()
        return None if found is None else dict(found)

    # -- Forgetting

    def prune(self, keep_s: float, max_bytes: int | None) -> int:
        """Forget ended runs by age, then the oldest beyond the size, and silent ones by age too; return how many."""
        old = time.time() - keep_s
        with self.engine.connect() as connection:
            over = sa.or_(runs.c.ended < old, sa.and_(runs.c.ended.is_(None), runs.c.heard < old))
            doomed = list(connection.execute(sa.select(runs.c.prog_id).where(over)).scalars())
            if max_bytes is not None and (surplus := self.size() - max_bytes) > 0:
                query = (
                    sa.select(runs.c.prog_id, sa.func.coalesce(sa.func.sum(streams.c.length), 0))
                    .join_from(runs, streams, isouter=True)
                    .where(runs.c.ended.is_not(None))
                    .group_by(runs.c.id)
                    .order_by(runs.c.ended)
                )
                for prog_id, size in connection.execute(query):
                    if surplus <= 0:
                        break
                    doomed.append(prog_id)
                    surplus -= size
        for prog_id in dict.fromkeys(doomed):
            self.submit(partial(Batch.forget, prog_id=prog_id), prog_id=prog_id).result()
        if doomed and self.url.get_backend_name() == "sqlite":
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA incremental_vacuum")
                connection.commit()
        return len(doomed)

    # -- Notices

    def due(self, now: float) -> list[RunRow]:
        """Return the notices that are to be sent by `now`."""
        with self.engine.connect() as connection:
            query = sa.select(notices).where(notices.c.due <= now).order_by(notices.c.due).limit(20)
            return [dict(row) for row in connection.execute(query).mappings()]

    def settle(self, notice: int, due: float | None) -> None:
        """Put a notice off until `due`; None: it is done with."""

        def do(batch: Batch) -> None:
            if due is None:
                batch.connection.execute(sa.delete(notices).where(notices.c.id == notice))
            else:
                batch.connection.execute(
                    sa.update(notices)
                    .where(notices.c.id == notice)
                    .values(due=due, tries=notices.c.tries + 1)
                )

        self.submit(do).result()


class Batch:
    """One transaction: what is known of its runs is read once, what its appends add up to is written once."""

    def __init__(
        self, store: Store, connection: Connection, prog_ids: set[str], memory: _Memory
    ) -> None:
        self.store, self.connection = store, connection
        if len(memory.runs) > KNOWN_RUNS:
            memory.clear()
        self._runs, self._allowance = memory.runs, memory.allowance
        self._read: set[str] = set()
        self._documents: set[str] = set()
        self._chunks: list[tuple[Any, ...]] = []
        # By stream: its run, how long it was, and is.
        self._grown: dict[int, tuple[str, int, int]] = {}
        self._heard: dict[int, float] = {}
        self._used: dict[int, int] = {}
        if unknown := prog_ids - self._runs.keys():
            self._load(unknown)

    def _load(self, prog_ids: Iterable[str]) -> None:
        for prog_id in prog_ids:
            self._read.add(prog_id)
            self._runs.pop(prog_id, None)
        for *values, number, name, length in self.connection.execute(
            _KNOWN, {"prog_ids": list(prog_ids)}
        ):
            row = dict(zip(_ROW, values, strict=True))
            found = self._runs.setdefault(row["prog_id"], _Run(row))
            if name is not None:
                found.streams[name] = _Stream(number, length)

    def _fresh(self, prog_id: str) -> _Run | None:
        """Return the run as this transaction has it, and not as it is remembered."""
        if prog_id not in self._read:
            self.flush()
            self._load([prog_id])
        return self._runs.get(prog_id)

    def forget_documents(self) -> None:
        """Remember no run whose `doc` was read or made: it may be a megabyte."""
        for prog_id in self._documents:
            self._runs.pop(prog_id, None)

    # -- Runs

    def _run(self, token: keys.Token, prog_id: str) -> _Run:
        """Return the run that `token` reports; one that nobody registered begins with its first bytes."""
        found = self._fresh(prog_id)
        if found is None:
            if token.run is not None:
                raise RequestRefusal(410, "forgotten", "this run has been forgotten here")
            return self._begin(token, prog_id, {"prog_id": prog_id, "state": "running"})
        if found.row["owner"] != token.owner:
            raise RequestRefusal(403, "other_run", "this run was begun with another token")
        return found

    def _begin(self, token: keys.Token, prog_id: str, doc: Mapping[str, Any]) -> _Run:
        open_runs = (
            sa.select(sa.func.count())
            .select_from(runs)
            .where(runs.c.owner == token.owner, runs.c.ended.is_(None))
        )
        if self.connection.execute(open_runs).scalar_one() >= self.store.limits.runs:
            raise RequestRefusal(
                403,
                "too_many_runs",
                f"{self.store.limits.runs} runs of this token are open already",
            )
        now = time.time()
        row = {
            "prog_id": prog_id,
            "owner": token.owner,
            "made": now,
            "heard": now,
            "ended": None,
            "version": 0,
            "tail": _tail(prog_id),
        }
        row.update(_columns(doc))
        row["id"] = self.connection.execute(sa.insert(runs).values(row)).inserted_primary_key[0]  # type: ignore[index]
        self._runs[prog_id] = made = _Run(row)
        self._documents.add(prog_id)
        return made

    def _doc(self, run: _Run) -> dict[str, Any]:
        """Return the last State that was told."""
        self._documents.add(run.row["prog_id"])
        if "doc" not in run.row:
            run.row["doc"] = self.connection.execute(
                sa.select(runs.c.doc).where(runs.c.id == run.row["id"])
            ).scalar_one()
        return json.loads(run.row["doc"])  # type: ignore[no-any-return]

    def _change(self, run: _Run, doc: Mapping[str, Any], **more: Any) -> None:
        self._documents.add(run.row["prog_id"])
        values = {**_columns(doc), **more, "heard": time.time(), "version": run.row["version"] + 1}
        run.row.update(values)
        self.connection.execute(sa.update(runs).where(runs.c.id == run.row["id"]).values(values))

    def register(
        self, token: keys.Token, prog_id: str, about: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        known = self._fresh(prog_id)
        if known is None:
            self._begin(token, prog_id, {**about, "prog_id": prog_id, "state": "starting"})
        elif known.row["owner"] != token.owner:
            raise RequestRefusal(409, "other_run", "this id names another's run")
        text, expires = self.new_token(
            f"{token.name}/{prog_id}", [keys.RUN], run=prog_id, owner=token.owner
        )
        return {"prog_id": prog_id, "token": text, "expires": expires, "new": known is None}

    def report(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> None:
        state = _state(value, prog_id)
        if state.state in FINAL:
            raise RequestRefusal(422, "bad_state", "a final State is for .../completed")
        run = self._run(token, prog_id)
        if run.row["ended"] is None:
            self._change(run, {**self._doc(run), **value})

    def complete(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> bool:
        state = _state(value, prog_id)
        if state.state not in FINAL:
            raise RequestRefusal(422, "bad_state", f"{state.state} is not the end of a run")
        run = self._run(token, prog_id)
        if run.row["ended"] is not None:
            if _essence(self._doc(run)) == _essence(value):
                return False
            raise RequestRefusal(409, "ended", "this run has ended already, and otherwise")
        have = {
            name: run.streams[name].length if name in run.streams else 0
            for name in state.streams or {}
        }
        lacking = {
            name: have[name]
            for name, facts in (state.streams or {}).items()
            if facts.get("length", 0) > have[name]
        }
        if lacking:
            raise RequestRefusal(409, "incomplete", "output is missing", expected=lacking)
        self.flush()  # streams grow only before the end
        now = time.time()
        self._change(run, {**self._doc(run), **value}, ended=now)
        shown = _shown(run.row, {name: each.length for name, each in run.streams.items()}, [])
        for hook in self.store.hooks:
            from .notices import body

            values = {
                "run": prog_id,
                "hook": hook.url,
                "body": body(hook, shown),
                "due": now,
                "tries": 0,
                "made": now,
            }
            self.connection.execute(sa.insert(notices).values(values))
        return True

    def forget(self, prog_id: str) -> None:
        run = self._fresh(prog_id)
        if run is None:
            return
        self.flush()
        del self._runs[prog_id]
        self._allowance.pop(run.row["owner"], None)
        numbers = [each.id for each in run.streams.values()]
        held = sa.select(sa.func.coalesce(sa.func.sum(sa.func.length(chunks.c.data)), 0)).where(
            chunks.c.stream.in_(numbers)
        )
        freed = self.connection.execute(held).scalar_one()
        self.connection.execute(sa.delete(chunks).where(chunks.c.stream.in_(numbers)))
        self.connection.execute(sa.delete(streams).where(streams.c.run == run.row["id"]))
        self.connection.execute(sa.delete(runs).where(runs.c.id == run.row["id"]))
        self.connection.execute(sa.delete(tokens).where(tokens.c.run == prog_id))
        self.connection.execute(
            sa.update(tokens)
            .where(tokens.c.id == run.row["owner"])
            .values(bytes=tokens.c.bytes - freed)
        )

    # -- Output

    def append(
        self,
        token: keys.Token,
        prog_id: str,
        name: str,
        offset: int,
        data: bytes,
        gap: int | None,
    ) -> int:
        run = self._runs.get(prog_id)
        stream = run.streams.get(name) if run else None
        if not (
            run
            and stream
            and data
            and offset == stream.length
            and run.row["ended"] is None
            and run.row["owner"] == token.owner
        ):
            if self._fresh(prog_id) is None and offset and gap is None and token.run is None:
                raise _hole(0, "hole", "no run begins with a hole")
            run = self._run(token, prog_id)
            stream = run.streams.get(name)
        at = stream.length if stream else 0
        reach = offset + len(data)
        if run.row["ended"] is not None and reach > at:
            raise _hole(at, "ended", "this run has ended, and this is beyond its output")
        if offset > at and not (gap is not None and gap <= at):
            raise _hole(at, "hole", f"bytes {at} to {offset} have not come yet")
        now = time.time()
        if now - run.row["heard"] > HEARD_S:
            self._heard[run.row["id"]] = run.row["heard"] = now
        if reach <= at:
            return at
        if stream is None and len(run.streams) >= STREAMS_MAX:
            raise RequestRefusal(
                422, "too_many_streams", f"a run has at most {STREAMS_MAX} streams"
            )
        fresh = data[at - offset :] if offset < at else data
        self._allow(token.owner, len(fresh))
        if stream is None:
            stream = run.streams[name] = self._new_stream(run, name)
        if offset > at:
            self._chunks.append((stream.id, at, offset, now, None))
        if fresh:
            self._chunks.append((stream.id, reach - len(fresh), reach, now, fresh))
        was = self._grown[stream.id][1] if stream.id in self._grown else at
        self._grown[stream.id] = prog_id, was, reach
        stream.length = reach
        return reach

    def _new_stream(self, run: _Run, name: str) -> _Stream:
        made = self.connection.execute(
            sa.insert(streams).values(run=run.row["id"], name=name, length=0)
        )
        if run.row["state"] == "starting":
            self._change(run, {**self._doc(run), "state": "running"})
        return _Stream(made.inserted_primary_key[0], 0)  # type: ignore[index]

    def _allow(self, owner: int, size: int) -> None:
        """Count `size` bytes against the owner's allowance. Raises Refusal when it, or the disk, is used up."""
        if not self.store.has_room():
            raise RequestRefusal(507, "disk_full", "the collector's disk is full")
        used, until = self._allowance.get(owner, (0, 0.0))
        if (now := time.monotonic()) >= until:
            kept = (
                self.connection.execute(
                    sa.select(tokens.c.bytes).where(tokens.c.id == owner)
                ).scalar()
                or 0
            )
            used, until = kept + self._used.get(owner, 0), now + ALLOWANCE_S
        if used + size > self.store.limits.disk:
            raise RequestRefusal(507, "allowance", "the allowance of this token is used up")
        self._allowance[owner] = used + size, until
        self._used[owner] = self._used.get(owner, 0) + size

    def flush(self) -> None:
        """Write what the appends add up to so far. Raises _Stale where a stream or its run isn't as it was remembered."""
        grown = [(stream, *how) for stream, how in self._grown.items()]
        if _GROW.execute(self.connection, grown) != len(grown):
            raise _Stale
        _ADD.execute(self.connection, self._chunks)
        _HEAR.execute(self.connection, list(self._heard.items()))
        _USE.execute(self.connection, list(self._used.items()))
        for each in (self._chunks, self._grown, self._heard, self._used):
            each.clear()

    # -- Tokens

    def new_token(
        self, name: str, scopes: Sequence[str], *, run: str | None = None, owner: int | None = None
    ) -> tuple[str, float | None]:
        text, key, digest = keys.new()
        now = time.time()
        expires = None if run is None else now + RUN_TOKEN_S
        self.connection.execute(
            sa.insert(tokens).values(
                key=key,
                hash=digest,
                name=name,
                scopes=json.dumps(list(scopes)),
                run=run,
                owner=owner,
                made=now,
                expires=expires,
                bytes=0,
            )
        )
        return text, expires

    def revoke(self, name: str) -> int:
        own = list(
            self.connection.execute(
                sa.select(tokens.c.id).where(tokens.c.name == name, tokens.c.revoked.is_(None))
            ).scalars()
        )
        every = sa.or_(tokens.c.id.in_(own), tokens.c.owner.in_(own))
        self.connection.execute(
            sa.update(tokens).where(every, tokens.c.revoked.is_(None)).values(revoked=time.time())
        )
        return len(own)


# What an append needs to know, in one statement.
_ROW = ("id", "prog_id", "owner", "state", "made", "heard", "ended", "version")
_KNOWN = (
    sa.select(*(runs.c[name] for name in _ROW), streams.c.id, streams.c.name, streams.c.length)
    .join_from(runs, streams, streams.c.run == runs.c.id, isouter=True)
    .where(runs.c.prog_id.in_(sa.bindparam("prog_ids", expanding=True)))
)
_KNOWN_STREAMS = sa.select(streams).where(streams.c.run.in_(sa.bindparam("ids", expanding=True)))


class _Statement:
    """A statement over many rows at once, which is the driver's own SQL after its first use: the way there costs more than what SQLite does.

    `make` gets the bind parameters of each row, and returns the statement over all of them.
    """

    def __init__(self, make: Callable[[Sequence[Mapping[str, Any]]], Any], *names: str) -> None:
        self._make, self._names = make, names
        self._sql: dict[tuple[str, int], tuple[str, Sequence[int] | None, Sequence[str]]] = {}

    def execute(self, connection: Connection, rows: Sequence[Sequence[Any]]) -> int:
        """Return how many rows it met."""
        at = met = 0
        while at < len(rows):
            # By powers of two, so that there are few statements to prepare.
            count = min(STATEMENT_ROWS, 1 << (len(rows) - at).bit_length() - 1)
            values = [value for row in rows[at : at + count] for value in row]
            sql, order, names = self._compiled(connection, count)
            how = (
                dict(zip(names, values, strict=True))
                if order is None
                else tuple([values[each] for each in order])
            )
            met += connection.exec_driver_sql(sql, how).rowcount
            at += count
        return met

    def _compiled(
        self, connection: Connection, count: int
    ) -> tuple[str, Sequence[int] | None, Sequence[str]]:
        """Return the SQL, which value stands at each of its places, and what they are called where places have names instead."""
        key = connection.dialect.name, count
        if key not in self._sql:
            names = [f"{name}_{number}" for number in range(count) for name in self._names]
            rows: list[Mapping[str, Any]] = [
                {name: sa.bindparam(f"{name}_{number}") for name in self._names}
                for number in range(count)
            ]
            compiled = self._make(rows).compile(dialect=connection.dialect)
            order = (
                None
                if compiled.positiontup is None
                else [names.index(name) for name in compiled.positiontup]
            )
            self._sql[key] = str(compiled), order, names
        return self._sql[key]


def _grow(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Return the statement that lengthens those streams which are as long as is thought and whose run hasn't ended."""
    was = sa.case({row["of"]: row["was"] for row in rows}, value=streams.c.id)
    reach = sa.case({row["of"]: row["to"] for row in rows}, value=streams.c.id)
    # Numbers of what was forgotten are given again.
    prog_id = sa.case({row["of"]: row["run"] for row in rows}, value=streams.c.id)
    going_on = sa.exists().where(
        runs.c.id == streams.c.run, runs.c.prog_id == prog_id, runs.c.ended.is_(None)
    )
    return (
        sa.update(streams)
        .where(streams.c.id.in_([row["of"] for row in rows]), streams.c.length == was, going_on)
        .values(length=reach)
    )


def _hear(rows: Sequence[Mapping[str, Any]]) -> Any:
    heard = sa.case({row["of"]: row["at"] for row in rows}, value=runs.c.id)
    return sa.update(runs).where(runs.c.id.in_([row["of"] for row in rows])).values(heard=heard)


def _use(rows: Sequence[Mapping[str, Any]]) -> Any:
    more = sa.case({row["of"]: row["more"] for row in rows}, value=tokens.c.id)
    return (
        sa.update(tokens)
        .where(tokens.c.id.in_([row["of"] for row in rows]))
        .values(bytes=tokens.c.bytes + more)
    )


_ADD = _Statement(
    lambda rows: sa.insert(chunks).values([dict(row) for row in rows]),
    "stream",
    "start",
    "stop",
    "at",
    "data",
)
_GROW = _Statement(_grow, "of", "run", "was", "to")
_HEAR = _Statement(_hear, "of", "at")
_USE = _Statement(_use, "of", "more")


def _hole(at: int, kind: str, message: str) -> RequestRefusal:
    return RequestRefusal(409, kind, message, headers={"Upload-Offset": str(at)}, offset=at)


def _explained(error: Exception) -> RequestRefusal:
    """Return the answer to a job that the database could not do. The bytes may be sent again: nothing of it was kept."""
    if "full" in str(error) or "disk I/O" in str(error):
        return RequestRefusal(507, "disk_full", "the collector's disk is full")
    return RequestRefusal(
        503,
        "database",
        f"the collector's database failed: {type(error).__name__}",
        headers={"Retry-After": "5"},
    )


# -- States and rows


def _state(value: Mapping[str, Any], prog_id: str) -> State:
    try:
        state = State.from_json(value)
    except (ValueError, TypeError, KeyError) as error:
        raise RequestRefusal(422, "bad_state", str(error)[:200]) from None
    if state.prog_id != prog_id:
        raise RequestRefusal(422, "bad_state", "this is the State of another run")
    return state


def _essence(doc: Mapping[str, Any]) -> list[Any]:
    """Return what never changes in a final State; how its delivery goes and what came late may."""
    return [doc.get(key) for key in ("state", "reason", "status", "end_time", "exception")]


def _columns(doc: Mapping[str, Any]) -> dict[str, Any]:
    """Return what can be asked for of a run."""
    origin = doc.get("origin") or {}
    text = json.dumps(doc, ensure_ascii=True)
    if len(text) > DOC_MAX:
        text = json.dumps(
            {key: each for key, each in doc.items() if key not in ("argv", "program", "env")}
            | {"argv": ["..."]}
        )
    return {
        "name": None if doc.get("name") is None else _text(doc["name"]),
        "host": _text(doc.get("target") or doc.get("host")),
        "user": _text(doc.get("user")),
        "by": "@".join(filter(None, (_text(origin.get("user")), _text(origin.get("host"))))),
        "fleet": None if origin.get("fleet") is None else _text(origin["fleet"]),
        "command": " ".join(map(_text, doc.get("argv") or ()))[:65536],
        "state": doc["state"],
        "doc": text,
    }


def _text(value: Any) -> str:
    # What isn't UTF-8 came as surrogates, which no database takes; PostgreSQL takes no NUL either.
    return str(value or "").replace("\0", "\\0").encode("utf-8", "backslashreplace").decode()


def _tail(prog_id: str) -> str:
    return prog_id[-8:] if ids.short(prog_id) != prog_id else prog_id


def _shown(
    row: RunRow, lengths: Mapping[str, int], gaps: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return a run as readers get it: its State as it was last told, and what the collector itself knows."""
    doc = json.loads(row["doc"])
    if row["ended"] is None:
        doc["streams"] = {
            name: {"length": length, "dropped": 0, "late": 0} for name, length in lengths.items()
        }
    if row["host"]:
        doc["host"] = row["host"]
    doc.pop("target", None)
    silent = row["ended"] is None and time.time() - row["heard"] > SILENT_S
    doc["collector"] = {
        "made": row["made"], "heard": row["heard"], "ended": row["ended"], "silent": silent, "received": dict(lengths), "gaps": list(gaps),
        "version": row["version"], "page": [row["made"], row["id"]],
    }  # fmt: skip
    return doc  # type: ignore[no-any-return]


def _lengths(connection: Connection, numbers: Sequence[int]) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for row in connection.execute(_KNOWN_STREAMS, {"ids": list(numbers)}).mappings():
        found.setdefault(row["run"], {})[row["name"]] = row["length"]
    return found


def _gaps(connection: Connection, numbers: Sequence[int]) -> dict[int, list[dict[str, Any]]]:
    query = (
        sa.select(streams.c.run, streams.c.name, chunks.c.start, chunks.c.stop)
        .join(chunks, chunks.c.stream == streams.c.id)
        .where(streams.c.run.in_(list(numbers)), chunks.c.data.is_(None))
        .order_by(chunks.c.id)
    )
    found: dict[int, list[dict[str, Any]]] = {}
    for run, name, start, stop in connection.execute(query):
        found.setdefault(run, []).append({"stream": name, "from": start, "to": stop})
    return found


def _conditions(wanted: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
    """Return what a run must be like. A text that ends with * is a beginning."""
    found: list[sa.ColumnElement[bool]] = []
    for key, value in wanted.items():
        match key:
            case "id":
                found.append(runs.c.prog_id == value)
            case "tail":
                found.append(runs.c.tail.startswith(value, autoescape=True))
            case "since":
                found.append(sa.or_(runs.c.ended.is_(None), runs.c.ended >= value))
            case "until":
                found.append(runs.c.made <= value)
            case "text":
                found.append(runs.c.command.contains(value, autoescape=True))
            case "user":
                found.append(
                    sa.or_(
                        runs.c.user == value,
                        runs.c.by == value,
                        runs.c.by.startswith(f"{value}@", autoescape=True),
                    )
                )
            case "open":
                found.append(runs.c.ended.is_(None) if value else runs.c.ended.is_not(None))
            case _:
                column = runs.c[key]
                found.append(
                    column.startswith(value[:-1], autoescape=True)
                    if str(value).endswith("*")
                    else column == value
                )
    return found


# -- The database


def _url(database: str) -> sa.URL:
    """Return where the data is. Raises Misuse for what isn't SQLite."""
    url = (
        make_url(database)
        if "://" in database
        else sa.URL.create("sqlite", database=str(Path(database).absolute()))
    )
    if url.get_backend_name() != "sqlite" or not url.database:
        raise Misuse(
            f"not a database that the collector can use: {database!r} (a path, or sqlite:////path)",
            fate="NOT SERVED",
        )
    return url


def _engine(url: sa.URL) -> Engine:
    file = Path(url.database or "")
    file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Output may hold what others shouldn't read.
    os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    engine = sa.create_engine(
        url,
        pool_size=8,
        max_overflow=24,
        connect_args={"timeout": 10.0, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        # page_size and auto_vacuum count only before the first table is made. Chunks are many pages long, each of which is two system calls
        # into the log and two out of it: half as many of 16 KiB. SQLite's own checkpoint holds up the writer: it comes after 64 MiB, not after 4,
        # when most is moved. What undoes half a statement of many rows is a file unless temp_store says otherwise.
        connection.isolation_level = (
            None  # the driver would begin a transaction only at its first write
        )
        for pragma in (
            "page_size = 16384", "auto_vacuum = INCREMENTAL", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON",
            "cache_size = -16000", "wal_autocheckpoint = 4096", "temp_store = MEMORY",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail where another process has written meanwhile.
        writes = connection.get_execution_options().get("writes")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def migrate(connection: Connection) -> None:
    """Bring the tables up to this version."""
    if sa.inspect(connection).has_table("alembic_version"):
        found = (
            connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalars().all()
        )
        if found == [HEAD]:
            return  # alembic takes 150 ms to import
    connection.rollback()
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except sa.exc.OperationalError as error:
        if "already exists" not in str(error):  # another process was just as new here
            raise
        connection.rollback()
    connection.commit()
