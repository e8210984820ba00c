"""The only user of the tables: one writer, many readers.

All writes go through one thread. It takes the jobs that wait, does them in one transaction, and
answers when the commit is on the disk. So many appends share an fsync, and none is acknowledged
before its own. A refused job has changed nothing, so a batch fails only when the database does.
Then each of its jobs is tried alone, and those that fail are refused with the reason.

The writer remembers how long the growing streams are. It appends to a stream without a query where
the bytes begin at the length that it remembers. The statement that lengthens the streams counts
those that were as remembered. Where another process has written, too, the batch is rolled back and
done again from the database. Any other request is never answered from memory.

SQLite commits into its log. A second thread moves the commits from there to the tables' file: the
writer would stand still for a quarter of its time if it did all of that. SQLite's own checkpoint
moves the last part, so that the log begins anew.
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
from corra.on_host.agent.contract import FINAL

from . import tokens as keys
from .documents import (
    essence,
    has_identity,
    id_tail,
    identity_columns,
    merged,
    read_registration,
    read_state,
    shown,
    state_columns,
)
from .limits import Limits, RequestRefusal
from .notices import Hook, notice_body
from .schema import chunks, notices, runs, streams, tokens

BATCH_JOBS = 512
BATCH_BYTES = 32 << 20
READ_BYTES = 1 << 20
# After so much output the commits are moved out of the log, which `_engine` bounds as well.
MOVE_BYTES = 4 << 20
# Of documents in one page of a list. A reader takes 16 MiB.
PAGE_BYTES = 4 << 20
# Of a run's gaps, so many are listed.
GAPS_SHOWN = 100
# What a gap costs of the allowance.
GAP_BYTES = 128
STREAMS_MAX = 8
# A run's own token lives as long as a host keeps the record of a run.
RUN_TOKEN_S = 400 * 86400.0
# Output is a sign of life, too, but written down only so often: a row less with each append.
HEARD_S = 10.0
# The writer remembers the lengths of so many runs, and an allowance for so long.
KNOWN_RUNS, ALLOWANCE_S = 10_000, 1.0
# The most rows of one statement. The driver releases the GIL at each statement and gets it back
# when the event loop pauses: 30 statements of a row each waited longer for it than for the disk.
# SQLite before 3.32 takes 999 values.
STATEMENT_ROWS = 64
# With less room than this the disk counts as full.
FLOOR_BYTES, FLOOR_SHARE = 1 << 30, 20

# The newest migration; a test holds that it is.
HEAD = "0003"
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
    """One run. `row` has its `doc` only where a job asked for it: an append needs none."""

    row: dict[str, Any]
    streams: dict[str, _Stream] = field(default_factory=dict)


@dataclass
class _Memory:
    """What the writer remembers between transactions: never more than the last commit."""

    runs: dict[str, _Run] = field(default_factory=dict)
    # By owner: the bytes that are kept for it, and until when to believe that.
    allowance: dict[int, tuple[int, float]] = field(default_factory=dict)

    def clear(self) -> None:
        self.runs.clear()
        self.allowance.clear()


class _Stale(Exception):
    """Another process has written, so what the writer remembers is wrong."""


def _tell(answers: Iterable[tuple[Any, Any]]) -> None:
    """Answer each (Future, result or exception).

    All Futures of an event loop are answered at once: waking the loop costs more than an answer.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Any, Any]]] = {}
    for future, answer in answers:
        if isinstance(future, Future):
            _settle([(future, answer)])
        else:
            by_loop.setdefault(future.get_loop(), []).append((future, answer))
    for loop, found in by_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits any more
            loop.call_soon_threadsafe(_settle, found)


def _settle(answers: Iterable[tuple[Any, Any]]) -> None:
    for future, answer in answers:
        if future.done():
            continue  # the request has been cancelled
        if isinstance(answer, Exception):
            future.set_exception(answer)
        else:
            future.set_result(answer)


@dataclass(slots=True)
class _Job:
    """A write for the next batch, and the Future for its answer."""

    do: Callable[[Batch], Any]
    prog_id: str
    size: int
    answer: Any


class Store:
    """The database. Any thread may call its methods.

    A writing method returns a Future, which is asyncio's own where the caller is in an event loop.
    """

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
        # By event loop: the jobs of its present turn.
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
        """Finish the jobs that have been taken, and close the database."""
        self._jobs.put(None)
        self._thread.join()
        self._moves.put(False)
        self._mover.join()
        self.engine.dispose()

    # -- Writing

    def submit(self, do: Callable[[Batch], Any], *, prog_id: str = "", size: int = 0) -> Any:
        """Have `do` done in the next batch.

        The Future gets the result once that is on the disk, or a RequestRefusal.
        """
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            answer: Any = Future()
            self._jobs.put(_Job(do, prog_id, size, answer))
            return answer
        answer = loop.create_future()
        turn = self._turns.get(loop)
        if turn is None:
            # The writer is woken once for all jobs of a turn. Woken by the first job, it would
            # commit that one alone.
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
        """Append; the result is the stream's new length. Raises RequestRefusal: 409 for a hole."""
        return self.submit(
            lambda batch: batch.append(token, prog_id, stream, offset, data, gap),
            prog_id=prog_id,
            size=len(data),
        )

    def report(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> Any:
        """Keep a State of a run that goes on."""
        return self.submit(lambda batch: batch.report(token, prog_id, value), prog_id=prog_id)

    def complete(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> Any:
        """Keep the final State; the result is whether it was new.

        Raises RequestRefusal: 409 while output is missing.
        """
        return self.submit(lambda batch: batch.complete(token, prog_id, value), prog_id=prog_id)

    def register(self, token: keys.Token, prog_id: str, about: Mapping[str, Any]) -> Any:
        """Make a run known before it starts; the result has the run's own token, shown once."""
        return self.submit(lambda batch: batch.register(token, prog_id, about), prog_id=prog_id)

    def new_token(self, name: str, scopes: Sequence[str]) -> str:
        """Make a token for a person or a service, and return it."""
        return self.submit(lambda batch: batch.new_token(name, scopes)).result()[0]  # type: ignore[no-any-return]

    def revoke(self, name: str) -> int:
        """Revoke the tokens of that name and those made with them; return how many had the name."""
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
            self._jobs.put(None)  # the end comes after these jobs
        return jobs

    def _carry_out(self, connection: Connection, jobs: Sequence[_Job]) -> None:
        began = time.monotonic()
        try:
            answers = self._transact(connection, jobs)
        except Exception as error:  # noqa: BLE001 - the other jobs must get their answers
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
            self._memory.clear()  # it has changes that were not committed
            raise
        batch.forget_documents()
        return answers

    def _move_on(self, size: int) -> None:
        """Have the commits moved out of the log once there are enough of them.

        While that is under way, SQLite's own checkpoint would do nothing.
        """
        self._unmoved += size
        if self._unmoved >= MOVE_BYTES and not self._moving:
            self._unmoved, self._moving = 0, True
            self._moves.put(True)

    def _move(self) -> None:
        while self._moves.get():
            try:
                # SQLAlchemy's connection would begin a transaction.
                with contextlib.closing(self.engine.raw_connection()) as connection:
                    connection.cursor().execute("PRAGMA wal_checkpoint(PASSIVE)")
            except (sa.exc.SQLAlchemyError, sqlite3.Error):
                _log.exception("commits stay in the log")
            self._moving = False

    def has_room(self) -> bool:
        """Return whether the disk is above its floor, as of a second ago at most."""
        if (now := time.monotonic()) >= self._room_at:
            disk = os.statvfs(self.file.parent)
            floor = min(FLOOR_BYTES, disk.f_blocks * disk.f_frsize // FLOOR_SHARE)
            self._room, self._room_at = disk.f_bavail * disk.f_frsize > floor, now + 1
        return self._room

    # -- Reading

    def token(self, key: str) -> RunRow | None:
        """Return the token's row."""
        return self._one(sa.select(tokens).where(tokens.c.key == key))

    def revoked(self, token_ids: Sequence[int]) -> list[int]:
        """Return those of the tokens that are revoked, have expired or are gone."""
        good: set[int] = set()
        now = time.time()
        with self.engine.connect() as connection:
            for at in range(0, len(token_ids), 500):
                query = sa.select(tokens.c.id).where(
                    tokens.c.id.in_(token_ids[at : at + 500]),
                    tokens.c.revoked.is_(None),
                    sa.or_(tokens.c.expires.is_(None), tokens.c.expires >= now),
                )
                good.update(connection.execute(query).scalars())
        return [each for each in token_ids if each not in good]

    def run(
        self, prog_id: str, sight: Sequence[Mapping[str, str]] = ({},)
    ) -> dict[str, Any] | None:
        """Return one run as readers get it, None when there is none in sight."""
        found, _ = self.runs({"id": prog_id}, sight, limit=1)
        return found[0] if found else None

    def runs(
        self,
        wanted: Mapping[str, Any],
        sight: Sequence[Mapping[str, str]],
        *,
        limit: int,
        before: tuple[float, int] | None = None,
    ) -> tuple[list[dict[str, Any]], bool]:
        """Return (a page of the newest runs, whether there may be more).

        The runs match `wanted` and are in sight. `before` is where the last page ended.
        """
        query = sa.select(runs).where(
            *_conditions(wanted), sa.or_(*(sa.and_(True, *_conditions(each)) for each in sight))
        )
        if before is not None:
            query = query.where(
                sa.tuple_(runs.c.made, runs.c.id) < sa.tuple_(*map(sa.literal, before))
            )
        query = query.order_by(runs.c.made.desc(), runs.c.id.desc()).limit(limit)
        rows: list[RunRow] = []
        size = 0
        with self.engine.connect() as connection:
            for row in connection.execute(query).mappings():
                rows.append(dict(row))
                size += len(row["doc"])
                if size >= PAGE_BYTES:
                    break
            numbers = [row["id"] for row in rows]
            lengths = _lengths(connection, numbers)
            gaps = _gaps(connection, numbers)
        found = [
            shown(row, lengths.get(row["id"], {}), *gaps.get(row["id"], ([], 0))) for row in rows
        ]
        return found, len(rows) == limit or size >= PAGE_BYTES

    def output(self, prog_id: str, stream: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield the bytes from `start` to `stop`. A gap is NULs, so that offsets stay true."""
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
                return  # the run has been forgotten meanwhile
            for begin, end, data in parts:
                low, high = max(at, begin), min(stop, end)
                if data is None:  # a gap may be longer than all memory
                    high = min(high, low + READ_BYTES)
                yield bytes(high - low) if data is None else data[low - begin : high - begin]
                at = high
                if high < min(stop, end):
                    break

    def news(
        self, prog_id: str, cursor: Mapping[str, int]
    ) -> tuple[list[tuple[str, int, bytes | None, int, float]], dict[str, Any] | None]:
        """Return about 1 MiB of output from `cursor` on, and the run.

        Each piece is (stream, offset, data or None for a gap, end, time), in the order of arrival.
        """
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
        """Return the cursor at the last `lines` lines of each stream, within its last MiB."""
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
        """Return the number of runs by fate: `running`, `done`, `failed`, `not_started`.."""
        query = sa.select(runs.c.word, sa.func.count()).group_by(runs.c.word)
        found: dict[str, int] = {}
        with self.engine.connect() as connection:
            for word, count in connection.execute(query):
                fate = word.rstrip(" 0123456789").replace(" ", "_")
                found[fate] = found.get(fate, 0) + count
        return found

    def size(self) -> int:
        """Return how many bytes are kept: output, documents and gaps."""
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
        """Forget old runs; return how many.

        Ended runs go by age, then the oldest of them beyond `max_bytes`. A run that goes on is old
        when it hasn't been heard of for so long.
        """
        old = time.time() - keep_s
        over = sa.or_(runs.c.ended < old, sa.and_(runs.c.ended.is_(None), runs.c.heard < old))
        with self.engine.connect() as connection:
            doomed = list(connection.execute(sa.select(runs.c.prog_id).where(over)).scalars())
        for prog_id in doomed:
            self._forget(prog_id)
        count = len(doomed)
        if max_bytes is not None and (surplus := self.size() - max_bytes) > 0:
            query = sa.select(runs.c.prog_id).where(runs.c.ended.is_not(None))
            with self.engine.connect() as connection:
                ended = connection.execute(query.order_by(runs.c.ended)).scalars().all()
            for prog_id in ended:
                if surplus <= 0:
                    break
                surplus -= self._forget(prog_id)
                count += 1
        if count and self.url.get_backend_name() == "sqlite":
            with self.engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA incremental_vacuum")
                connection.commit()
        return count

    def _forget(self, prog_id: str) -> int:
        """Forget one run; return how many bytes that freed."""
        job = partial(Batch.forget, prog_id=prog_id)
        return self.submit(job, prog_id=prog_id).result()  # type: ignore[no-any-return]

    # -- Notices

    def due(self, now: float) -> list[RunRow]:
        """Return the notices that are due by `now`."""
        with self.engine.connect() as connection:
            query = sa.select(notices).where(notices.c.due <= now).order_by(notices.c.due).limit(20)
            return [dict(row) for row in connection.execute(query).mappings()]

    def settle(self, notice: int, due: float | None) -> None:
        """Put a notice off until `due`, or remove it if `due` is None."""

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
    """One transaction. It reads its runs once, and writes the sum of its appends once."""

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
        # By stream: its run, its length before and now.
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
        """Return the run as this transaction sees it, and not as the writer remembers it."""
        if prog_id not in self._read:
            self.flush()
            self._load([prog_id])
        return self._runs.get(prog_id)

    def forget_documents(self) -> None:
        """Remember no run whose `doc` was read or made: documents are long."""
        for prog_id in self._documents:
            self._runs.pop(prog_id, None)

    # -- Runs

    def _run(self, token: keys.Token, prog_id: str) -> _Run:
        """Return the run that `token` reports. A run that nobody registered begins here."""
        found = self._fresh(prog_id)
        if found is None:
            if token.run is not None:
                raise RequestRefusal(410, "forgotten", "this run has been forgotten here")
            return self._begin(token, {"prog_id": prog_id, "state": "running"})
        if found.row["owner"] != token.owner:
            raise RequestRefusal(403, "other_run", "this run was begun with another token")
        return found

    def _begin(self, token: keys.Token, doc: Mapping[str, Any]) -> _Run:
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
        prog_id = doc["prog_id"]
        row = {
            "prog_id": prog_id,
            "owner": token.owner,
            "made": now,
            "heard": now,
            "ended": None,
            "version": 0,
            "tail": id_tail(prog_id),
            **identity_columns(doc),
            **state_columns(doc),
        }
        self._allow(token.owner, row["doc_bytes"])
        row["id"] = self.connection.execute(sa.insert(runs).values(row)).inserted_primary_key[0]  # type: ignore[index]
        self._runs[prog_id] = made = _Run(row)
        self._documents.add(prog_id)
        return made

    def _doc(self, run: _Run) -> dict[str, Any]:
        """Return the last State that was reported."""
        self._documents.add(run.row["prog_id"])
        if "doc" not in run.row:
            run.row["doc"] = self.connection.execute(
                sa.select(runs.c.doc).where(runs.c.id == run.row["id"])
            ).scalar_one()
        return json.loads(run.row["doc"])  # type: ignore[no-any-return]

    def _change(self, run: _Run, doc: Mapping[str, Any], **more: Any) -> None:
        self._documents.add(run.row["prog_id"])
        values = {**state_columns(doc), **more}
        growth = values["doc_bytes"] - run.row["doc_bytes"]
        # An end is kept even where the allowance is used up. Its run was counted before.
        if growth > 0 and "ended" not in more:
            self._allow(run.row["owner"], growth)
        else:
            self._use(run.row["owner"], growth)
        values.update(heard=time.time(), version=run.row["version"] + 1)
        run.row.update(values)
        self.connection.execute(sa.update(runs).where(runs.c.id == run.row["id"]).values(values))

    def _told(self, token: keys.Token, run: _Run, told: Mapping[str, Any], **more: Any) -> None:
        """Keep a State of `run`; the first one says who a run is that nobody registered."""
        doc = self._doc(run)
        after = merged(doc, told)
        if token.run is None and not has_identity(doc):
            more.update(identity_columns(after))
        self._change(run, after, **more)

    def register(
        self, token: keys.Token, prog_id: str, about: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        doc = read_registration(about, prog_id)
        known = self._fresh(prog_id)
        if known is None:
            self._begin(token, doc)
        elif known.row["owner"] != token.owner:
            raise RequestRefusal(409, "other_run", "this id is the run of another token")
        elif not has_identity(self._doc(known)):
            after = {**doc, **self._doc(known)}
            self._change(known, after, **identity_columns(after))
        text, expires = self.new_token(
            f"{token.name}/{prog_id}", [keys.RUN], run=prog_id, owner=token.owner
        )
        return {"prog_id": prog_id, "token": text, "expires": expires, "new": known is None}

    def report(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> None:
        told = read_state(value, prog_id)
        if told["state"] in FINAL:
            raise RequestRefusal(422, "bad_state", "a final State is for .../completed")
        run = self._run(token, prog_id)
        if run.row["ended"] is None:
            self._told(token, run, told)

    def complete(self, token: keys.Token, prog_id: str, value: Mapping[str, Any]) -> bool:
        told = read_state(value, prog_id)
        if told["state"] not in FINAL:
            raise RequestRefusal(422, "bad_state", f"{told['state']} is not the end of a run")
        run = self._run(token, prog_id)
        if run.row["ended"] is not None:
            if essence(self._doc(run)) == essence(told):
                return False
            raise RequestRefusal(409, "ended", "this run has ended already, and otherwise")
        reported: Mapping[str, Any] = told.get("streams") or {}
        have = {name: run.streams[name].length if name in run.streams else 0 for name in reported}
        lacking = {
            name: have[name]
            for name, facts in reported.items()
            if facts.get("length", 0) > have[name]
        }
        if lacking:
            raise RequestRefusal(409, "incomplete", "output is missing", expected=lacking)
        self.flush()  # streams grow only before the end
        now = time.time()
        self._told(token, run, told, ended=now)
        for hook in self.store.hooks:
            final = shown(run.row, {}, [], 0)
            values = {
                "run": prog_id,
                "hook": hook.url,
                "body": notice_body(hook, final),
                "due": now,
                "tries": 0,
                "made": now,
            }
            self.connection.execute(sa.insert(notices).values(values))
        return True

    def forget(self, prog_id: str) -> int:
        """Forget a run; return how many bytes that freed."""
        run = self._fresh(prog_id)
        if run is None:
            return 0
        self.flush()
        del self._runs[prog_id]
        self._allowance.pop(run.row["owner"], None)
        numbers = [each.id for each in run.streams.values()]
        held = sa.func.sum(sa.func.coalesce(sa.func.length(chunks.c.data), GAP_BYTES))
        freed = (
            self.connection.execute(sa.select(held).where(chunks.c.stream.in_(numbers))).scalar()
            or 0
        ) + run.row["doc_bytes"]
        self.connection.execute(sa.delete(chunks).where(chunks.c.stream.in_(numbers)))
        self.connection.execute(sa.delete(streams).where(streams.c.run == run.row["id"]))
        self.connection.execute(sa.delete(runs).where(runs.c.id == run.row["id"]))
        self.connection.execute(sa.delete(tokens).where(tokens.c.run == prog_id))
        # Gaps of before 0002 weren't counted.
        left = sa.case((tokens.c.bytes > freed, tokens.c.bytes - freed), else_=0)
        owner = sa.update(tokens).where(tokens.c.id == run.row["owner"])
        self.connection.execute(owner.values(bytes=left))
        return int(freed)

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
            raise _hole(at, "ended", "this run has ended, and these bytes are beyond its output")
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
        # Below the floor there is still room for documents, so that runs can begin and end.
        if not self.store.has_room():
            raise RequestRefusal(507, "disk_full", "the collector's disk is full")
        fresh = data[at - offset :] if offset < at else data
        self._allow(token.owner, len(fresh) + (GAP_BYTES if offset > at else 0))
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
        """Count `size` bytes against the owner's allowance.

        Raises RequestRefusal: 507 when the allowance is used up.
        """
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
        self._allowance[owner] = used, until
        self._use(owner, size)

    def _use(self, owner: int, size: int) -> None:
        """Count `size` bytes, or give some back, whatever the allowance says."""
        if owner in self._allowance:
            used, until = self._allowance[owner]
            self._allowance[owner] = used + size, until
        self._used[owner] = self._used.get(owner, 0) + size

    def flush(self) -> None:
        """Write the sum of the appends so far.

        Raises _Stale where a stream or its run isn't as the writer remembered it.
        """
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
        text, key, digest = keys.made_token()
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
_ROW = ("id", "prog_id", "owner", "state", "made", "heard", "ended", "version", "doc_bytes")
_KNOWN = (
    sa.select(*(runs.c[name] for name in _ROW), streams.c.id, streams.c.name, streams.c.length)
    .join_from(runs, streams, streams.c.run == runs.c.id, isouter=True)
    .where(runs.c.prog_id.in_(sa.bindparam("prog_ids", expanding=True)))
)
_KNOWN_STREAMS = sa.select(streams).where(streams.c.run.in_(sa.bindparam("ids", expanding=True)))


class _Statement:
    """A statement over many rows at once, compiled at its first use.

    Compiling costs more than SQLite's own work. `make` gets the bind parameters of each row and
    returns the statement over all of them.
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
        """Return the SQL, the value at each place, and the names of the places if they have any."""
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
    """Return the statement that lengthens the streams.

    It meets those that are as long as remembered and whose run hasn't ended.
    """
    was = sa.case({row["of"]: row["was"] for row in rows}, value=streams.c.id)
    reach = sa.case({row["of"]: row["to"] for row in rows}, value=streams.c.id)
    # SQLite gives the number of a forgotten stream to a new one.
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
    """Return the answer to a job that failed. Nothing of it was kept, so it may be sent again."""
    if not isinstance(error, (sa.exc.SQLAlchemyError, sqlite3.Error)):
        return RequestRefusal(500, "defect", "the collector failed at this")
    if "full" in str(error) or "disk I/O" in str(error):
        return RequestRefusal(507, "disk_full", "the collector's disk is full")
    return RequestRefusal(
        503,
        "database",
        f"the collector's database failed: {type(error).__name__}",
        headers={"Retry-After": "5"},
    )


# -- What readers get beside the rows


def _lengths(connection: Connection, numbers: Sequence[int]) -> dict[int, dict[str, int]]:
    found: dict[int, dict[str, int]] = {}
    for row in connection.execute(_KNOWN_STREAMS, {"ids": list(numbers)}).mappings():
        found.setdefault(row["run"], {})[row["name"]] = row["length"]
    return found


def _gaps(
    connection: Connection, numbers: Sequence[int]
) -> dict[int, tuple[list[dict[str, Any]], int]]:
    """Return (the first gaps, how many there are) of each run that has any."""
    by_run: Any = {"partition_by": streams.c.run}
    gaps = (
        sa.select(
            streams.c.run,
            streams.c.name,
            chunks.c.start,
            chunks.c.stop,
            sa.func.row_number().over(order_by=chunks.c.id, **by_run).label("place"),
            sa.func.count().over(**by_run).label("count"),
        )
        .join(chunks, chunks.c.stream == streams.c.id)
        .where(streams.c.run.in_(list(numbers)), chunks.c.data.is_(None))
        .subquery()
    )
    query = sa.select(gaps).where(gaps.c.place <= GAPS_SHOWN).order_by(gaps.c.run, gaps.c.place)
    found: dict[int, tuple[list[dict[str, Any]], int]] = {}
    for run, name, start, stop, _, count in connection.execute(query):
        listed, _ = found.setdefault(run, ([], count))
        listed.append({"stream": name, "from": start, "to": stop})
    return found


def _begins(column: Any, text: str) -> sa.ColumnElement[bool]:
    # LIKE takes A for a in SQLite, and a scope must not. The bounds let an index be used.
    within = sa.and_(column >= text, column <= text + "\U0010ffff")
    return sa.and_(within, sa.func.substr(column, 1, len(text)) == text)


def _conditions(wanted: Mapping[str, Any]) -> list[sa.ColumnElement[bool]]:
    """Return the conditions on a run, all case-sensitive. A `*` at the end is any ending."""
    found: list[sa.ColumnElement[bool]] = []
    for key, value in wanted.items():
        match key:
            case "id":
                found.append(runs.c.prog_id == value)
            case "tail":
                found.append(_begins(runs.c.tail, value))
            case "since":
                found.append(sa.or_(runs.c.ended.is_(None), runs.c.ended >= value))
            case "until":
                found.append(runs.c.made <= value)
            case "text":
                found.append(sa.func.instr(runs.c.command, value) > 0)
            case "state":
                # `exited`, or what ps calls it: `failed` and `FAILED 3` as well.
                found.append(
                    sa.or_(runs.c.state == value, _begins(runs.c.word, str(value).lower()))
                )
            case "user":
                by_user = _begins(runs.c.by, f"{value}@")
                found.append(sa.or_(runs.c.user == value, runs.c.by == value, by_user))
            case "open":
                found.append(runs.c.ended.is_(None) if value else runs.c.ended.is_not(None))
            case _:
                column = runs.c[key]
                text = str(value)
                found.append(_begins(column, text[:-1]) if text.endswith("*") else column == value)
    return found


# -- The database


def _url(database: str) -> sa.URL:
    """Return the URL of the database. Raises Misuse unless it is SQLite."""
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
    # Output may hold secrets.
    os.close(os.open(file, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    engine = sa.create_engine(
        url,
        pool_size=8,
        max_overflow=24,
        connect_args={"timeout": 10.0, "check_same_thread": False},
    )

    @sa.event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        # page_size and auto_vacuum count only before the first table is made. A chunk is many
        # pages long, and each page is two system calls into the log and two out of it: with 16 KiB
        # there are half as many. SQLite's own checkpoint holds the writer up, so it comes after
        # 64 MiB and not after 4, when most is moved. Without temp_store, the data that undoes half
        # a statement of many rows goes to a file.
        # The driver would begin a transaction only at its first write.
        connection.isolation_level = None
        for pragma in (
            "page_size = 16384",
            "auto_vacuum = INCREMENTAL",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "cache_size = -16000",
            "wal_autocheckpoint = 4096",
            "temp_store = MEMORY",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A transaction that reads first and writes later fails if another process writes between.
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
            return  # importing alembic takes 150 ms
    connection.rollback()
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except sa.exc.OperationalError as error:
        if "already exists" not in str(error):  # another process makes them, too
            raise
        connection.rollback()
    connection.commit()
