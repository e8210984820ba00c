"""Fabric's `Connection.run`, made durable: `runners = {"remote": corra.runners.Durable}`.

To its callers it is an Invoke Runner: hide, warn, timeout, asynchronous, disown, watchers, pty,
env, cd, prefix, sudo and the streams. Below that the command is a run: started once, followed over
as many links as it takes, its exit status told by the host. So an existing fabfile survives a
broken link; `timeout` stops the program and not only the watching; Ctrl-C leaves at once, with the
program running; and output costs no more than its bytes cost.

The command's stdin is one of three: /dev/null; all there is to read at once (a file, a StringIO),
sent with the start; or bytes over the followed link, where a terminal, a pipe or a watcher may
write later.
"""

from __future__ import annotations

import codecs
import io
import os
import re
import select
import stat
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import IO, Any

import fabric.runners
from invoke.exceptions import UnexpectedExit
from invoke.terminals import pty_size
from invoke.watchers import FailingResponder, Responder

from corra.model import ids
from corra.model.ends import end_error, start_error
from corra.model.frames import Gap, Output, Status
from corra.model.host import Host
from corra.model.program import OPEN, USERS_SHELL
from corra.model.state import State, exit_code
from corra.model.units import duration
from corra.runs import request
from corra.runs.events import LinkDown, LinkUp
from corra.runs.follow import Follow
from corra.runs.patience import Patience
from corra.runs.result import Result as CorraResult
from corra.runs.run import Run
from corra.runs.stdin_feed import StdinFeed

from .errors import CorraError, StillRunning, line, typed
from .settings import setting

READ_STEP = 64 * 1024
# The most that waits for a reader here. The host's spool has the rest.
HELD_MAX = 4 << 20
# Between two looks at whether a thread of Invoke's has died.
LOOK_S = 0.1
# For a thread that has been told to leave.
LEAVE_S = 5.0
# How far back a Responder looks for its pattern. It reads prompts, and a search through gigabytes
# at every chunk is quadratic.
PROMPT_MAX = 64 * 1024


class DurableResult(CorraResult):
    """A Result as Invoke and Fabric make it, with `prog_id` and the State.

    `state` is None after a dry run.
    """

    def __init__(
        self,
        *,
        state: State | None,
        host: Host,
        prog_id: str,
        truncated: bool = False,
        **kwargs: Any,
    ) -> None:
        fabric.runners.Result.__init__(self, **kwargs)
        self.prog_id = prog_id
        self.host = host
        self.state = state  # type: ignore[assignment] # None only where nothing was run
        self.truncated = truncated
        self.skipped = False

    @property
    def reason(self) -> str | None:
        return self.state.reason if self.prog_id else None

    @property
    def signal(self) -> str | None:
        return self.state.signal if self.prog_id else None

    @property
    def elapsed(self) -> float | None:
        return self.state.elapsed if self.prog_id else None

    def __repr__(self) -> str:
        return str(fabric.runners.Result.__repr__(self))


class Durable(fabric.runners.Remote):  # type: ignore[misc] # fabric has no hints
    """The runner behind `Connection.run` and `.sudo`. Settings under `corra` in the configuration:

    `reconnect_timeout` (none), `output_limit` (how much of each stream the Result keeps: all),
    `grace` (10s).
    """

    read_chunk_size = READ_STEP

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.prog_id = ""
        self.run_: Run | None = None
        self._follow: Follow | None = None
        self._feed: StdinFeed | None = None
        self._pipes = {"stdout": Pipe(), "stderr": Pipe()}
        self._confirmed = threading.Event()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._left = False
        self._truncated = False
        self._payload: bytes | None = None

    def _setting(self, name: str) -> Any:
        return setting(self.context.config, name)

    # -- Starting
    def run(self, command: str, **kwargs: Any) -> Any:
        try:
            result = super().run(command, **kwargs)
        except UnexpectedExit as error:
            # Invoke prints the error of a hidden command, with its output, and nothing for another.
            if error.result.hide:
                raise
            raise self._failed(error.result) from error
        except KeyboardInterrupt:
            # Invoke calls send_interrupt only while it waits, not while it starts its threads,
            # which show output already.
            if not self._left:
                self._leave()
            raise
        if result is None and self._disowned:  # Invoke 2; from 3 on there is one
            result = self.generate_result(**self.result_kwargs, stdout="", stderr="", exited=None)
        return result

    def _failed(self, result: Any) -> CorraError:
        assert self._state is not None
        assert self.run_ is not None
        host, reached = str(self.run_.host), self.run_.reached
        error = end_error(self._state, host, result, reached=reached)
        assert error is not None
        return error

    def start(
        self, command: str, shell: str, env: dict[str, Any], timeout: float | None = None
    ) -> None:
        """Start `command` and return when the host has confirmed it.

        Raises NotStarted, Unreachable, MaybeStarted.
        """
        interactive = self._choose_stdin()
        launch = request.launch(
            self.context,
            [*USERS_SHELL, command],
            name=_name(command),
            env={name: str(value) for name, value in (env or {}).items()},
            stdin=OPEN if interactive else self._payload,
            forget_stdin=True,  # a watcher's answers are passwords more often than not
            pty=self.using_pty,
            timeout=self.opts["timeout"],
            grace=self._setting("grace"),
        )
        self.run_, self.prog_id = launch.run, launch.run.id
        self._feed = StdinFeed() if (interactive or self.using_pty) and not self._disowned else None
        self._follow = launch.follow(
            Patience(reconnect_timeout_s=self._setting("reconnect_timeout")),
            stay=not self._disowned,
            feed=self._feed,
        )
        if self.using_pty and self._feed is not None:
            self._resize()
            self._watch_window()
        self._thread = threading.Thread(
            target=self._pump, args=(launch,), name="durable", daemon=True
        )
        self._thread.start()
        _wait(self._confirmed)
        if not self._confirmed_well and self._error is not None:
            raise self._error
        if self._state is not None and self._state.state == "not_started":
            raise start_error(self._state, str(self._follow.host))
        if self._disowned:
            _wait(self._over)

    @property
    def _confirmed_well(self) -> bool:
        return self._follow is not None and self._follow.confirmed

    @property
    def _state(self) -> State | None:
        return self._follow.state if self._follow is not None else None

    def _choose_stdin(self) -> bool:
        """Return whether something may be written to the command later.

        What can be read at once becomes its stdin.
        """
        source = self.streams["in"]
        later = bool(self.watchers)
        if self._disowned or not source:
            return later
        kind = _kind(source)
        if kind == "later" or (kind == "now" and (later or self.using_pty)):
            return True
        self.streams["in"] = False  # no thread of Invoke's is to read it
        if kind == "now":
            self._payload = _rest(source)
        return later

    # -- Following
    def _pump(self, launch: request.Launch) -> None:
        assert self._follow is not None
        try:
            for event in self._follow:
                match event:
                    case Output(stream=stream, data=data):
                        self._pipes["stderr" if stream == "stderr" else "stdout"].put(data)
                    case Gap():
                        self._truncated = True
                    case Status():
                        self._confirmed.set()
                    case LinkDown(attempt=1, error=error):
                        self._say(
                            "link lost, program unaffected as far as known; trying on"
                            if self._confirmed_well
                            else f"no answer yet: {error}; trying again"
                        )
                    case LinkUp(down_s=down_s):
                        self._say(f"link back after {duration(down_s)}, nothing missed")
        except BaseException as error:  # noqa: BLE001 - raised where Invoke waits for us
            self._error = error
        finally:
            launch.close()
            if self._feed is not None:
                self._feed.close()
            for pipe in self._pipes.values():
                pipe.end()
            self._over.set()
            self._confirmed.set()

    def _say(self, text: str) -> None:
        assert self._follow is not None
        print(line("", str(self._follow.host), "", text), file=sys.stderr, flush=True)

    def read_proc_stdout(self, num_bytes: int) -> bytes:
        return self._pipes["stdout"].read(num_bytes)

    def read_proc_stderr(self, num_bytes: int) -> bytes:
        return self._pipes["stderr"].read(num_bytes)

    def read_proc_output(self, reader: Callable[[int], bytes]) -> Iterator[str]:
        """Decode the output; a character may be cut in two by a chunk's end."""
        decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        while data := reader(self.read_chunk_size):
            if text := decoder.decode(data):
                yield text
        if text := decoder.decode(b"", True):
            yield text

    def _handle_output(
        self, buffer_: list[str], hide: bool, output: IO[str], reader: Callable[[int], bytes]
    ) -> None:
        """Show and keep the output and answer it, as Invoke does, at a cost that stays the same."""
        limit = self._setting("output_limit")
        kept, window = 0, _Window(self.watchers)
        for text in self.read_proc_output(reader):
            if not hide:
                self.write_our_output(stream=output, string=text)
            buffer_.append(text)
            kept += len(text)
            while limit is not None and len(buffer_) > 1 and kept - len(buffer_[0]) >= limit:
                kept -= len(buffer_.pop(0))
                self._truncated = True
            if self.watchers:
                for response in window.submit(text, buffer_):
                    self.write_proc_stdin(response)
        if limit is not None and kept > limit:
            buffer_[:] = ["".join(buffer_)[-limit:]]
            self._truncated = True

    @property
    def process_is_finished(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        while not (self._over.wait(LOOK_S) or self.has_dead_threads):
            pass

    # -- What is sent to the program
    def _write_proc_stdin(self, data: bytes) -> None:
        if self._feed is not None:
            self._feed.write(data)

    def close_proc_stdin(self) -> None:
        if self._feed is not None:
            self._feed.end()

    def read_our_stdin(self, input_: IO[Any]) -> str | None:
        """Read all there is; from a pipe Invoke reads one byte each hundredth of a second."""
        if self._feed is not None and self._feed.waiting > HELD_MAX:
            return None
        descriptor = _descriptor(input_)
        if descriptor is None or os.isatty(descriptor):
            text: str | None = super().read_our_stdin(input_)
            return text
        if not select.select([descriptor], [], [], 0)[0]:
            return None
        return os.read(descriptor, READ_STEP).decode(self.encoding, "surrogateescape")

    def write_proc_stdin(self, data: str) -> None:
        self._write_proc_stdin(data.encode(self.encoding, "surrogateescape"))

    def _watch_window(self) -> None:
        if fabric.runners.cares_about_SIGWINCH():
            import signal

            signal.signal(signal.SIGWINCH, lambda *_: self._resize())

    def _resize(self) -> None:
        columns, rows = pty_size()
        if self._feed is not None:
            # Not here: a handler must not wait for the lock that the code it interrupted may hold.
            threading.Thread(target=self._feed.resize, args=(rows, columns), daemon=True).start()

    # -- Leaving
    def send_interrupt(self, interrupt: KeyboardInterrupt) -> None:
        """Pass Ctrl-C to a program on a terminal; else leave at once, with the program running."""
        if self.using_pty and self._feed is not None and not self._over.is_set():
            self._feed.write(b"\x03")
            return
        self._leave()
        raise interrupt

    def _leave(self) -> None:
        self._left = True
        if self._follow is not None:
            self._follow.close()
        for pipe in self._pipes.values():
            pipe.end()
        if self.run_ is not None and not (self._state is not None and self._state.ended):
            host = str(self.run_.host)
            told = line(self.run_.label, host, StillRunning.fate, "you have detached")
            print(
                f"{told}\n       watch: {typed()} attach {ids.short(self.run_.id)}",
                file=sys.stderr,
                flush=True,
            )

    def start_timer(self, timeout: float | None) -> None:
        """Do nothing: the host keeps the time, and needs no link to end the program."""

    @property
    def timed_out(self) -> bool:
        return self._state is not None and self._state.reason == "timeout"

    def kill(self) -> None:
        """Stop the program: TERM, after the grace KILL to all its processes."""
        if self.run_ is not None:
            self.run_.kill()

    def stop(self) -> None:
        if self._follow is not None:
            self._follow.close()
        if self._feed is not None:
            self._feed.close()
        if self._thread is not None:  # it may still use the connection, which ends next
            self._thread.join(LEAVE_S)
        super().stop()

    def get_pid(self) -> int | None:
        return self._state.pid if self._state is not None else None

    def returncode(self) -> int:
        """Return the program's code, 128+N for signal N, 124 for its timeout.

        Raises the error that kept it from being known.
        """
        _wait(self._over)
        if self._error is not None:
            raise self._error
        state = self._state
        assert state is not None
        if not state.ended:
            assert self.run_ is not None
            raise StillRunning(
                "corra stopped watching",
                host=str(self.run_.host),
                prog_id=self.prog_id,
                label=self.run_.label,
            )
        if state.state == "lost" and not self.opts["warn"]:
            # Lost is no UnexpectedExit: a caller that goes on after a bad end has not agreed to go
            # on after an unknown one.
            error = end_error(
                state,
                str(self._follow.host) if self._follow else state.host,
                reached=self.run_.reached if self.run_ else "",
            )
            assert isinstance(error, CorraError)
            raise error
        return exit_code(state)

    def generate_result(self, **kwargs: Any) -> DurableResult:
        kwargs["connection"] = self.context
        host = self.run_.host if self.run_ is not None else Host.parse("local")
        return DurableResult(
            state=self._state, host=host, prog_id=self.prog_id, truncated=self._truncated, **kwargs
        )


class Pipe:
    """Bytes on their way from the link to a thread of Invoke's."""

    def __init__(self) -> None:
        self._parts: deque[bytes] = deque()
        self._size = 0
        self._ended = False
        self._changed = threading.Condition()

    def put(self, data: bytes) -> None:
        """Add `data`; wait while nobody takes it."""
        with self._changed:
            self._changed.wait_for(lambda: self._size < HELD_MAX or self._ended)
            self._parts.append(data)
            self._size += len(data)
            self._changed.notify_all()

    def read(self, most: int) -> bytes:
        """Return what is there, b"" at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._parts or self._ended)
            if not self._parts:
                return b""
            data = self._parts.popleft()
            if len(data) > most:
                self._parts.appendleft(data[most:])
                data = data[:most]
            self._size -= len(data)
            self._changed.notify_all()
            return data

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._changed.notify_all()


class _Window:
    """The output that watchers see: Invoke's own see the last of it, all others the whole."""

    def __init__(self, watchers: Any) -> None:
        self._watchers = list(watchers)
        self._bounded = all(type(each) in (Responder, FailingResponder) for each in self._watchers)
        self._text = ""

    def submit(self, text: str, buffer_: list[str]) -> Iterator[str]:
        if not self._bounded:
            self._text = "".join(buffer_)
        else:
            self._text += text
            if (gone := len(self._text) - 2 * PROMPT_MAX) > 0:
                gone += PROMPT_MAX
                self._text = self._text[gone:]
                for watcher in self._watchers:
                    for name in ("index", "failure_index"):
                        if hasattr(watcher, name):
                            setattr(watcher, name, max(0, getattr(watcher, name) - gone))
        for watcher in self._watchers:
            yield from watcher.submit(self._text)


def _wait(event: threading.Event) -> None:
    """Wait so that Ctrl-C is answered."""
    while not event.wait(1.0):
        pass


def _descriptor(stream: Any) -> int | None:
    try:
        return int(stream.fileno())
    except (AttributeError, io.UnsupportedOperation, ValueError, TypeError, OSError):
        return None


def _kind(stream: Any) -> str:
    """Return "nothing" for a stream without bytes, "now" for one that is complete, else "later"."""
    descriptor = _descriptor(stream)
    if descriptor is None:
        return "now" if hasattr(stream, "read") and not _is_captured(stream) else "nothing"
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return "nothing"
    if stat.S_ISREG(mode):
        return "now"
    return "later" if os.isatty(descriptor) or not stat.S_ISCHR(mode) else "nothing"


def _is_captured(stream: Any) -> bool:
    """Return whether a test runner has replaced stdin by something that must not be read."""
    return type(stream).__module__.startswith("_pytest")


def _rest(stream: Any) -> bytes:
    data = stream.read()
    return data.encode() if isinstance(data, str) else bytes(data)


def _name(command: str) -> str | None:
    """Return a name for a command: its first word that is a program's name."""
    words = [
        word
        for word in re.split(r"[\s;&|()]+", command)
        if word and "=" not in word and word not in ("sudo", "cd", "exec", "export")
    ]
    name = os.path.basename(words[0]) if words else ""
    return name if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,40}", name) else None
