#!/usr/bin/env python3
"""corra's courier: posts a run's spool to a collector, until the collector has acknowledged it.

    courier.py RUN-DIRECTORY [AGENT]       deliver; end when all is delivered or nothing can be done
    courier.py now RUN-DIRECTORY [AGENT]   for `corra deliver`: once more, with the options
                                           {"from", "callback", "seconds"} on stdin; print a report

It needs Linux, Python 3.6 and its standard library. AGENT is agent.py, by default the file beside
this one; the courier asks it for the State.

Requests           POST (or `callback.method`) to callback.url, with `Authorization: Bearer TOKEN`
    /output/NAME   `Upload-Offset: N` and raw bytes, when `output_buffer` bytes have gathered or the
                   oldest is `output_latency` s old. With `Upload-Gap: M` instead of bytes: those
                   from M to N are gone from the host, too
    /completed     the final State, as JSON, once all output is acknowledged
    /state         only with `callback.state`: the State at the start and every 5 minutes
Answers            2xx with `Upload-Offset`: so much is kept (without: all that was sent)
                   409 with `Upload-Offset`: go on from there
Files, in RUN      program.json (callback, config), token, stdout, stderr, output, exit; its own:
    courier.json   4 KiB, overwritten in place, which works on a full disk. If it is lost, the
                   courier offers all output again, and nothing is doubled
    route          HOST:PORT to connect to instead of the URL's, while a client forwards a port;
                   names and certificates stay the URL's
Exit code          0: nothing left to do (courier.json says how it went). 3: another courier is at
                   it. 75: a name server that never answers. After 3 and 75 the keeper starts the
                   courier again

Rules              It may be killed at any time. A request has a deadline as a whole. It follows no
                   redirect and asks no proxy, so the token goes to the URL's host only. It verifies
                   TLS. The collector alone says what the collector holds.
SIGUSR1            try now
"""

import calendar
import ctypes
import email.utils
import fcntl
import http.client
import json
import os
import random
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from urllib.parse import urlsplit

# ============================================================ constants

VERSION = "0.1.0"
NAME = "corra-courier"
PAGE = 4096
CHUNK_MAX, CHUNK_MIN = 1 << 20, 4096
REPLY_MAX = 65536
# Of a whole request, from the name's look-up to the last byte of the answer.
REQUEST_S = 60.0
CONNECT_S = 15.0
STATE_S = 60.0  # for the agent's answer
BACKOFF_MAX_S = 300.0
REFUSED_S = 60.0  # after 401, 403, 404 and redirects, which an operator has to mend
RETRY_AFTER_MAX_S = 3600.0
BEAT_S = 300.0
LOOK_S = 60.0  # how often to look whether the guards of a silent run are dead
GATHER_S = 0.05  # while bytes gather: inotify would wake the courier at each write
# The request itself is wrong, so asking again changes nothing.
HOPELESS = (400, 405, 406, 410, 411, 412, 414, 415, 417, 422, 431, 451, 501, 505)
DEFAULTS = {"retry_frequency": 10, "timeout": 86400, "output_buffer": 65536, "output_latency": 1}


class Hopeless(Exception):
    """The callback can't work, now or later."""


# ============================================================ answers


class Answer:
    """What to do after an answer.

    `do` is "ok", "seek" (go on from `offset`), "smaller", "later" or "never". People read `error`.
    """

    def __init__(self, do, offset=None, pause_s=None, slow=False, error=None, body=b""):
        self.do, self.offset, self.pause_s, self.slow, self.error, self.body = (
            do,
            offset,
            pause_s,
            slow,
            error,
            body,
        )


def read_answer(status, headers, body, now):
    """Return the Answer for an HTTP answer: a pure function.

    `headers` has a .get, and `now` is the time for a Retry-After that is a date.
    """
    offset = whole(headers.get("Upload-Offset"))
    said = words_of(body)
    error = "%d %s%s" % (
        status,
        http.client.responses.get(status, "?"),
        ": " + said if said else "",
    )
    if 200 <= status < 300:
        return Answer("ok", offset=offset, body=body)
    if status == 409:
        # The collector sees a hole: it was restored from a backup, or has other bytes.
        return Answer("seek", offset=offset, error=error, body=body)
    if status == 413:
        return Answer("smaller", error=error)
    if 300 <= status < 400:
        return Answer(
            "later",
            slow=True,
            error="%d: a redirect, not followed: the token is for this address alone" % status,
        )
    if status in HOPELESS:
        return Answer("never", error=error)
    if status in (429, 503, 507):
        return Answer("later", pause_s=retry_after(headers.get("Retry-After"), now), error=error)
    if 400 <= status < 500 and status not in (408, 425):
        return Answer("later", slow=True, error=error)
    return Answer("later", error=error)


def whole(text):
    """Return the number in a header, or None."""
    return int(text) if text and text.isdecimal() and len(text) <= 18 else None


def words_of(body):
    """Return the first line of an answer's body, or its message, for people."""
    try:
        value = json.loads(body.decode("utf-8"))
        body = value.get("message", "").encode() if isinstance(value, dict) else body
    except (ValueError, AttributeError, RecursionError):
        pass
    lines = body.decode("utf-8", "replace").split("\n")
    return "".join(each if each.isprintable() else " " for each in lines[0])[:120].strip()


def retry_after(text, now):
    """Return the seconds of a Retry-After, at most an hour, or None."""
    if not text:
        return None
    if text.strip().isdecimal():
        return min(float(text), RETRY_AFTER_MAX_S)
    try:
        date = email.utils.parsedate_tz(text)
        return min(max(0.0, email.utils.mktime_tz(date) - now), RETRY_AFTER_MAX_S) if date else None
    except (ValueError, OverflowError, TypeError):
        return None


def backoff(tries, first_s, chance):
    """Return the pause after `tries` failures in a row.

    `chance` (0 to 1) adds up to half of it, so that a fleet doesn't come back at once.
    """
    return min(first_s * 2 ** min(tries - 1, 20), max(BACKOFF_MAX_S, first_s)) * (1 + chance / 2)


# ============================================================ what to do next


def step(view, now):
    """Return (act, stream, when to look again). This decides, `Courier` acts.

    Times are monotonic seconds. `view`: streams {name: (acknowledged, available, since)}, final
    (None, or {name: length}), retry_at, give_up_at, state_at, and the config's buffer and latency.
    """
    streams, final = view["streams"], view["final"]
    if view["done"]:
        return "leave", None, None
    if view["give_up_at"] is not None and now >= view["give_up_at"]:
        return "give up", None, None
    if now < view["retry_at"]:
        return None, None, view["retry_at"]
    if view["state_at"] is not None and final is None and now >= view["state_at"]:
        return "state", None, None
    waiting = []
    for name, (acked, available, since) in sorted(
        streams.items(), key=lambda each: each[1][2] or 0
    ):
        if available > acked:
            due = since + view["latency"]
            if final is not None or available - acked >= view["buffer"] or now >= due:
                return "send", name, None
            waiting.append(min(due, now + GATHER_S))
        elif final is not None and acked < final.get(name, 0):
            return "gap", name, None
    if final is not None:
        return "completed", None, None
    if view["state_at"] is not None:
        waiting.append(view["state_at"])
    return None, None, min(waiting) if waiting else None


# ============================================================ the collector


class Link:
    """A connection to the collector, kept open between requests."""

    def __init__(self, callback, route, hung):
        self.hung = hung  # called before this process must end
        url = urlsplit(callback.get("url") or "")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise Hopeless("callback.url: not http:// or https:// and a host")
        try:
            port = url.port
        except ValueError:
            raise Hopeless("callback.url: not a port") from None
        self.tls = url.scheme == "https"
        self.address = (url.hostname, port or (443 if self.tls else 80))
        self.path, self.query = url.path.rstrip("/"), "?" + url.query if url.query else ""
        if any(char <= " " or char > "~" for char in self.path + self.query):
            raise Hopeless("callback.url: has a space, or a letter that isn't ASCII")
        self.route, self.context = route, None
        self.connection = self.socket = None
        self.ca = callback.get("ca")

    def request(self, method, path, headers, body):
        """Return (status, headers, body) of one exchange within its deadline.

        Raises OSError, HTTPException, ValueError. The server may have closed a kept connection
        meanwhile; then the courier makes a new one, once.
        """
        for kept in (True, False):
            reuse = kept and self.connection is not None
            watchdog = Watchdog(self)
            try:
                if not reuse:
                    self.close()
                    self.connect()
                return self.exchange(method, path, headers, body)
            except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
                self.close()
                if watchdog.bit:
                    raise OSError("not over in %g s" % REQUEST_S) from None
                if reuse and isinstance(error, (http.client.BadStatusLine, OSError)):
                    continue
                raise
            finally:
                watchdog.stop()
        raise OSError("unreachable")

    def exchange(self, method, path, headers, body):
        try:
            self.connection.request(method, self.path + path + self.query, body, headers)
        except (BrokenPipeError, ConnectionResetError):
            pass  # a server that refuses before the last byte may have said why
        answer = self.connection.getresponse()
        text = answer.read(REPLY_MAX)
        if answer.will_close or answer.read(1):
            self.close()
        return answer.status, answer.headers, text

    def connect(self):
        made = None
        for where in self.addresses():
            try:
                made = socket.create_connection(where, CONNECT_S)
                break
            except OSError as error:
                refused = error
        if made is None:
            raise refused
        self.socket = made
        made.settimeout(REQUEST_S)
        made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self.tls:
            context = self.context = self.context or trust(self.ca)
            made = self.socket = context.wrap_socket(
                made, server_hostname=self.address[0], do_handshake_on_connect=False
            )
            made.do_handshake()
        self.connection = http.client.HTTPConnection(self.address[0], self.address[1])
        self.connection.sock = made
        self.connection.auto_open = 0

    def addresses(self):
        """Return the addresses to try, a forwarded port first.

        That only with TLS: any user of the host may take the port over.
        """
        if self.route and self.tls:
            host, _, port = self.route.rpartition(":")
            if port.isdecimal():
                return [(host, int(port)), self.address]
        return [self.address]

    def close(self):
        for each in (self.connection, self.socket):
            if each is not None:
                each.close()
        self.connection = self.socket = None


def trust(ca):
    """Return the TLS context: the system's authorities, or only `ca`, a path or PEM text."""
    try:
        pem = ca if ca and "-----BEGIN" in ca else None
        context = ssl.create_default_context(cafile=None if pem else ca or None, cadata=pem)
    except (OSError, ValueError) as error:
        raise OSError("callback.ca can't be used: %s" % error) from None
    context.options |= ssl.OP_NO_TLSv1 | ssl.OP_NO_TLSv1_1
    return context


class Watchdog:
    """The deadline of a whole request.

    It ends a server that sends a byte a minute, and a name server that never answers.
    """

    def __init__(self, link):
        self.link, self.bit = link, False
        self.timer = threading.Timer(REQUEST_S, self.bite)
        self.timer.daemon = True
        self.timer.start()

    def bite(self):
        self.bit = True
        if self.link.socket is None:
            # Nothing in this process can interrupt getaddrinfo; the keeper starts another courier.
            self.link.hung("no address for %s in %g s" % (self.link.address[0], REQUEST_S))
            os._exit(75)
        try:
            # SSLSocket's own shutdown would take the TLS state from the thread that reads.
            socket.socket.shutdown(self.link.socket, socket.SHUT_RDWR)
        except OSError:
            pass

    def stop(self):
        self.timer.cancel()


# ============================================================ the spool


class Spool:
    """A run's directory, read by offset."""

    def __init__(self, path, agent):
        self.path, self.agent = path, agent
        self.directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        request = json.loads(self.text("program.json"))
        self.prog_id = request["prog_id"]
        self.callback = request.get("callback") or {}
        self.config = {
            key: DEFAULTS[key]
            if (request.get("config") or {}).get(key) is None
            else request["config"][key]
            for key in DEFAULTS
        }
        self.streams = (
            ["output"]
            if request["program"].get("merge") or request["program"].get("pty")
            else ["stdout", "stderr"]
        )
        self.files = {
            name: os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.directory)
            for name in self.streams
        }

    def text(self, name):
        """Return a file's text, "" where there is none."""
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.directory)
        except FileNotFoundError:
            return ""
        with open(fd, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()

    def head(self, name):
        """Return how much of a stream's beginning `keep_output` has given back to the disk.

        The agent's file `heads` says so.
        """
        for _ in range(100):
            try:
                fd = os.open("heads", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.directory)
            except FileNotFoundError:
                return 0
            with open(fd, "rb") as file:
                head, check = struct.unpack_from(
                    "<QQ", file.read(PAGE), 16 * self.streams.index(name)
                )
            if head ^ check == (1 << 64) - 1:
                return head
        return 0

    def sizes(self):
        return {name: os.fstat(file).st_size for name, file in self.files.items()}

    def there(self):
        """Return whether the run's directory is still the one that was opened."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.directory))
        except FileNotFoundError:
            return False

    def slot(self):
        try:
            fd = os.open("exit", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.directory)
        except FileNotFoundError:
            return None
        with open(fd, "rb") as file:
            return file.read(2 * PAGE)

    def guarded(self):
        """Return whether any guard lives. The shared lock is held for a moment only."""
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(fd)

    def state(self):
        """Ask the agent for the run's State. Raises OSError, ValueError."""
        root = os.path.dirname(os.path.dirname(os.path.abspath(self.path)))
        request = json.dumps({"prog_id": self.prog_id, "spool": root}).encode()
        kept = (
            [int(self.agent.rpartition("/")[2])] if self.agent.startswith("/proc/self/fd/") else []
        )
        try:
            done = subprocess.run(
                [sys.executable, "-ISE", self.agent, "status"],
                input=request,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                pass_fds=kept,
                timeout=STATE_S,
            )
        except subprocess.SubprocessError as error:
            raise OSError(str(error)) from None
        state = json.loads(done.stdout.decode("utf-8", "surrogateescape"))
        if "state" not in state:
            raise ValueError("the agent doesn't know this run: %s" % state.get("message"))
        return state


class Inotify:
    """A descriptor that becomes readable when one of these paths changes."""

    def __init__(self, *watched):
        libc = ctypes.CDLL(None, use_errno=True)
        self.fd = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "no inotify to be had")
        for path, events in watched:
            libc.inotify_add_watch(self.fd, os.fsencode(path), events)

    def clear(self):
        try:
            while os.read(self.fd, 65536):
                pass
        except BlockingIOError:
            pass


class Memory:
    """courier.json: what the collector has acknowledged, one page, overwritten in place.

    It is a cache: the collector knows better.
    """

    def __init__(self, spool):
        self.file = os.open(
            "courier.json",
            os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC,
            0o600,
            dir_fd=spool.directory,
        )
        self.acked = dict.fromkeys(spool.streams, 0)
        self.completed = self.error = self.failing_since = None
        self.over, self.pid = False, 0
        self.load()

    def lock(self):
        """Return whether this is the run's only courier."""
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False

    def load(self):
        try:
            found = json.loads(os.pread(self.file, PAGE, 0).decode("ascii"))
            self.acked.update(
                {name: int(found["acked"][name]) for name in self.acked if name in found["acked"]}
            )
            self.completed, self.over, self.error = (
                found.get("completed"),
                bool(found.get("over")),
                found.get("error"),
            )
            self.failing_since, self.pid = found.get("since"), int(found["pid"])
        except (ValueError, KeyError, TypeError, AttributeError):
            pass  # empty, torn or foreign: the collector says where to go on

    def save(self):
        found = {
            "pid": os.getpid(),
            "acked": self.acked,
            "completed": self.completed,
            "over": self.over,
            "error": self.error,
            "since": self.failing_since,
        }
        try:
            os.pwrite(self.file, json.dumps(found).encode("ascii")[:PAGE].ljust(PAGE), 0)
        except OSError:
            pass


class NoMemory(Memory):
    """The memory of `now` to another collector or from another offset: none."""

    def load(self):
        pass

    def save(self):
        pass


# ============================================================ the courier


class Courier:
    """Delivers one run.

    `seconds`, with `now`, is how long that may take; else it is `timeout` after the program's end.
    """

    def __init__(self, spool, memory, *, callback=None, start=None, seconds=None):
        self.spool, self.memory = spool, memory
        self.callback = dict(spool.callback, **(callback or {}))
        self.config = spool.config
        self.memory.acked.update(dict.fromkeys(spool.streams, start) if start is not None else {})
        self.by_hand = seconds is not None
        self.give_up_at = time.monotonic() + seconds if self.by_hand else None
        self.retry_at = 0.0
        self.tries = self.seeks = 0
        self.chunk = CHUNK_MAX
        self.since = dict.fromkeys(spool.streams)
        self.final = None  # the final State
        self.seen = b""
        self.looked_at = 0.0
        self.state_at = time.monotonic() if self.callback.get("state") else None
        self.link = None
        self.keys = None
        self.done = False

    # ======================================================== the courier: its loop

    def run(self):
        """Deliver until there is nothing left to do."""
        base = "/proc/self/fd/%d/" % self.spool.directory
        changes = Inotify(
            *((base + name, 0x2) for name in [*self.spool.streams, "exit"])
        )  # IN_MODIFY
        orders = Inotify((base + ".", 0x8 | 0x80))  # IN_CLOSE_WRITE | IN_MOVED_TO: a token, a route
        wake, poke = os.pipe()
        os.set_blocking(poke, False)
        os.set_blocking(wake, False)
        signal.set_wakeup_fd(poke)
        signal.signal(signal.SIGUSR1, lambda *_: None)
        while self.spool.there():
            now = time.monotonic()
            view = self.view(now)
            act, stream, look_at = step(view, now)
            if act == "leave":
                return
            if act:
                self.act(act, stream)
                continue
            until = min(
                [now + LOOK_S] + [at for at in (look_at, self.give_up_at) if at is not None]
            )
            waiting = [wake, orders.fd] if now < self.retry_at else [wake, orders.fd, changes.fd]
            if look_at is not None and now >= self.retry_at and look_at - now <= GATHER_S:
                waiting = [wake]  # bytes gather, and all else waits as long
            ready = select.select(waiting, [], [], max(0.0, until - now))[0]
            changes.clear()
            if wake in ready:
                os.read(wake, 4096)
                self.retry_at = 0.0
            if orders.fd in ready:
                orders.clear()
                self.new_orders()

    def view(self, now):
        self.look(now)
        sizes = self.spool.sizes()
        streams = {}
        for name, size in sizes.items():
            acked = self.memory.acked[name]
            if size <= acked:
                self.since[name] = None
            elif self.since[name] is None:
                self.since[name] = now
            streams[name] = (acked, size, self.since[name])
        final = self.final and {
            name: facts["length"] for name, facts in (self.final.get("streams") or {}).items()
        }
        if final is not None:
            # Output after the end is no part of the run.
            streams = {
                name: (acked, min(size, max(final.get(name, size), acked)), since)
                for name, (acked, size, since) in streams.items()
            }
        delivered = all(size <= acked for acked, size, _ in streams.values())
        return {
            "streams": streams,
            "final": final,
            "retry_at": self.retry_at,
            "give_up_at": self.give_up_at,
            "state_at": self.state_at,
            "buffer": self.config["output_buffer"],
            "latency": 0 if self.by_hand else self.config["output_latency"],
            "done": self.done or (self.by_hand and final is None and delivered),
        }

    def look(self, now):
        """Look for the run's end: the slot says it, or all guards are dead."""
        if self.final is not None or now < self.retry_at:
            return
        slot = self.spool.slot()
        if (
            slot == self.seen
            and now - self.looked_at < LOOK_S
            and not (self.by_hand and not self.looked_at)
        ):
            return
        self.seen, self.looked_at = slot, now
        if (
            slot is not None
            and b"\nphase final\n" not in slot[:PAGE]
            and not slot[PAGE:].strip()
            and self.spool.guarded()
        ):
            return
        try:
            state = self.spool.state()
        except (OSError, ValueError) as error:
            self.fail(Answer("later", error="the agent gives no State: %s" % error))
            self.seen = b""
            return
        if state["state"] in ("exited", "not_started", "lost"):
            self.final, self.state_at = state, None
            if not self.by_hand:
                left_s = (
                    seconds_of(state.get("end_time") or state.get("last_output_time"))
                    + self.config["timeout"]
                    - time.time()
                )
                self.give_up_at = now + min(left_s, self.config["timeout"])

    def new_orders(self):
        """Try at once if the token or the route has changed."""
        keys = self.read_keys()
        if keys != self.keys:
            self.retry_at, self.tries = 0.0, 0
            self.forget_link()

    def read_keys(self):
        return (
            self.callback.get("token") or self.spool.text("token").strip(),
            self.spool.text("route").strip(),
        )

    def forget_link(self):
        if self.link is not None:
            self.link.close()
        self.link = None

    # ======================================================== the courier: its acts

    def act(self, act, stream):
        if act == "give up":
            last = self.memory.error or "no answer in time"
            self.stop(
                last
                if self.by_hand
                else "given up %g s after the end: %s" % (self.config["timeout"], last)
            )
        elif act == "send":
            self.send(stream)
        elif act == "gap":
            self.post_gap(stream, self.final["streams"][stream]["length"])
        elif act == "state":
            self.post_state()
        else:
            self.post_completed()

    def send(self, name):
        acked = self.memory.acked[name]
        data = os.pread(self.spool.files[name], self.chunk, acked)
        head = self.spool.head(name)  # after the read, which may have met a hole
        if head > acked:
            self.post_gap(name, head)
            return
        answer = self.post("/output/" + name, data, {"Upload-Offset": str(acked)})
        if self.took(name, answer, acked, acked + len(data)):
            self.chunk = min(self.chunk * 2, CHUNK_MAX)

    def post_gap(self, name, end):
        """Tell the collector that the bytes before `end` are gone, so that it doesn't wait."""
        acked = self.memory.acked[name]
        end = end if self.final is None else min(end, self.final["streams"][name]["length"])
        answer = self.post(
            "/output/" + name, b"", {"Upload-Offset": str(end), "Upload-Gap": str(acked)}
        )
        self.took(name, answer, acked, end)

    def took(self, name, answer, begin, end):
        """Note how far the collector has the stream; return whether it took what was sent.

        The collector's word counts, also when it goes back: it may have been restored from an older
        backup. A collector that never gets further has failed.
        """
        offset = end if answer.offset is None else answer.offset
        if answer.do == "ok" and offset > begin:
            self.seeks = 0
        elif (
            answer.do == "seek" and answer.offset is not None and offset != begin and self.seeks < 3
        ):
            self.seeks += 1
        elif answer.do in ("ok", "seek"):
            self.fail(
                Answer(
                    "later",
                    error=answer.error or "it acknowledged nothing of %d bytes" % (end - begin),
                )
            )
            return False
        else:
            self.fail(answer)
            return False
        self.memory.acked[name] = offset
        self.since[name] = None
        self.well()
        return answer.do == "ok"

    def post_state(self):
        try:
            state = self.spool.state()
        except (OSError, ValueError):
            self.state_at = time.monotonic() + LOOK_S
            return
        answer = self.post(
            "/state", json.dumps(state).encode(), {"Content-Type": "application/json"}
        )
        self.state_at = time.monotonic() + BEAT_S
        if answer.do in ("ok", "seek"):
            self.well()
        elif answer.do == "never" or (answer.slow and answer.error.startswith("404")):
            self.state_at = None  # a server without /state: the other requests count
        else:
            self.state_at = time.monotonic()
            self.fail(answer)

    def post_completed(self):
        answer = self.post(
            "/completed", json.dumps(self.final).encode(), {"Content-Type": "application/json"}
        )
        if answer.do == "ok":
            self.memory.completed = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
            self.memory.over = self.done = True
            self.well()
            if self.memory.completed and not isinstance(self.memory, NoMemory):
                try:
                    os.unlink("token", dir_fd=self.spool.directory)
                except FileNotFoundError:
                    pass
            return
        lacks = lacking(answer, self.memory.acked) if answer.do == "seek" else {}
        if lacks and self.seeks < 3:
            self.seeks += 1
            self.memory.acked.update(lacks)
            self.well()
        elif answer.do == "seek":
            self.fail(Answer("never", error=answer.error))
        else:
            self.fail(answer)

    def post(self, path, body, headers):
        """Return the Answer to one request; an error of the link makes one, too."""
        self.keys = keys = self.read_keys()
        if self.link is not None and self.link.route != keys[1]:
            self.forget_link()
        headers = dict(
            headers, **{"Content-Length": str(len(body)), "User-Agent": "corra-courier/" + VERSION}
        )
        headers.setdefault("Content-Type", "application/octet-stream")
        if keys[0]:
            headers["Authorization"] = "Bearer " + keys[0]
        try:
            if self.link is None:
                url = (self.callback.get("url") or "").replace("PROG-ID", self.spool.prog_id)
                self.link = Link(dict(self.callback, url=url), keys[1], self.hung)
            method = (self.callback.get("method") or "POST").upper()
            return read_answer(*self.link.request(method, path, headers, body), now=time.time())
        except Hopeless as error:
            return Answer("never", error=str(error))
        except (ssl.SSLError, ssl.CertificateError) as error:
            return Answer(
                "later",
                slow=True,
                error="TLS: %s"
                % (getattr(error, "verify_message", "") or getattr(error, "reason", "") or error),
            )
        except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
            # On a slow line a smaller chunk may make the deadline.
            self.chunk = max(self.chunk // 2, CHUNK_MIN)
            return Answer("later", error=str(error) or type(error).__name__)

    # ======================================================== the courier: how it goes

    def well(self):
        self.tries, self.retry_at = 0, 0.0
        self.memory.error = self.memory.failing_since = None
        self.memory.save()

    def fail(self, answer):
        """Note the error and decide when to try again, if ever."""
        if answer.do == "smaller" and self.chunk > CHUNK_MIN:
            self.chunk = max(self.chunk // 2, CHUNK_MIN)
            return
        self.tries += 1
        self.memory.error = answer.error
        self.memory.failing_since = self.memory.failing_since or time.strftime(
            "%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()
        )
        if answer.do in ("never", "smaller") or (self.by_hand and answer.slow):
            self.stop(answer.error)
            return
        pause = backoff(self.tries, self.config["retry_frequency"], random.random())
        pause = max(pause, answer.pause_s or 0.0, REFUSED_S if answer.slow else 0.0)
        self.retry_at = time.monotonic() + pause
        self.memory.save()

    def hung(self, error):
        self.memory.error = error
        self.memory.save()

    def stop(self, error):
        """Try no more. By hand, the run's own courier goes on."""
        self.memory.error, self.memory.over, self.done = error, not self.by_hand, True
        self.memory.save()


def lacking(answer, acked):
    """Return {stream: offset} of the output that the collector needs before the end."""
    try:
        expected = json.loads(answer.body.decode("utf-8")).get("expected") or {}
        return {
            name: offset
            for name, offset in expected.items()
            if name in acked and type(offset) is int and 0 <= offset != acked[name]
        }
    except (ValueError, AttributeError):
        return {}


def seconds_of(text):
    """Return a State's time as seconds since the epoch; without one, now."""
    try:
        return float(calendar.timegm(time.strptime(text[:19], "%Y-%m-%dT%H:%M:%S")))
    except (ValueError, TypeError):
        return time.time()


# ============================================================ main


def deliver(path, agent):
    """Deliver the run at `path`, unless another courier does or all is delivered."""
    spool = Spool(path, agent)
    memory = Memory(spool)
    if not memory.lock():
        return 3
    memory.load()
    memory.save()  # with this process's pid
    if not memory.over:
        Courier(spool, memory).run()
    return 0


def deliver_now(path, agent, order):
    """Deliver the run at `path` once more and report: {"acked", "completed", "error"}."""
    spool = Spool(path, agent)
    callback, start = order.get("callback"), order.get("from")
    elsewhere = callback is not None and callback.get("url") not in (
        None,
        spool.callback.get("url"),
    )
    memory = (NoMemory if elsewhere or start is not None else Memory)(spool)
    seconds = order.get("seconds") or REQUEST_S
    if not isinstance(memory, NoMemory):
        if not memory.lock():
            return wait_for_other(memory, seconds)
        memory.load()
        if memory.completed:
            return report(memory)
    courier = Courier(spool, memory, callback=callback, start=start, seconds=seconds)
    courier.look(time.monotonic())
    courier.run()
    return report(memory)


def report(memory):
    return {"acked": memory.acked, "completed": memory.completed, "error": memory.error}


def wait_for_other(memory, seconds):
    """Have the run's own courier try now, and report the outcome."""
    until = time.monotonic() + seconds
    pid = 0
    while time.monotonic() < until:
        memory.load()
        if memory.pid != pid and name_of(memory.pid) == NAME:
            pid = memory.pid
            try:
                os.kill(pid, signal.SIGUSR1)
            except ProcessLookupError:
                pass  # it has ended just now
        if memory.over or memory.lock():
            break
        time.sleep(0.05)
    memory.error = memory.error or (None if memory.over else "not done yet")
    return report(memory)


def name_of(pid):
    try:
        with open("/proc/%d/comm" % pid) as file:
            return file.read().strip()
    except OSError:
        return None


def open_standard():
    """Give /dev/null to each of the descriptors 0, 1 and 2 that is closed.

    Else the next file or socket that is opened has that number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - open as long as the process lives
    sys.stderr = sys.stderr or open(2, "w")  # noqa: SIM115


def main(argv):
    now = argv[:1] == ["now"]
    words = argv[1:] if now else argv
    if not 1 <= len(words) <= 2:
        sys.stderr.write("usage: courier.py [now] RUN-DIRECTORY [AGENT]\n")
        return 2
    agent = (
        words[1]
        if len(words) == 2
        else os.path.join(os.path.dirname(os.path.abspath(__file__)), "agent.py")
    )
    os.umask(0o077)
    try:
        with open("/proc/self/comm", "w") as file:
            file.write(NAME)
    except OSError:
        pass
    if now:
        print(json.dumps(deliver_now(words[0], agent, json.loads(sys.stdin.read() or "{}"))))
        return 0
    return deliver(words[0], agent)


if __name__ == "__main__":
    open_standard()
    sys.exit(main(sys.argv[1:]))
