"""The verbs follow and wait: a run's output and States as frames, its stdin and orders back."""

import _ctypes
import errno
import posix as os
import select
import time

from ..contract import FINAL, LOOK_S, ORDER_DEADLINE_S, PAGE, SIGNALS, Refusal
from ..kernel import c_function, widen
from ..processes import pidfd
from ..records import Record, to_json
from ..spool import takes_more
from .finding import find
from .orders import give_order, signal_directly, signal_order, wake_guards
from .sender import sender_of
from .times import Times, open_file, since_cursor, switched, tail_cursor

# Sent bytes that aren't accepted yet: twice what corra's own client sends.
HELD_MAX = 8 << 20
INPUT_MAX = 1 << 20
FRAME_MAX = 256 * 1024
PING_DEADLINE_S = 60.0
# Where the keeper's death can't be waited for, whatever frames the client sends meanwhile.
LOOK_ALONE_S = 1.0


class FileWatch:
    """inotify on the output, the slot and the directory's end.

    On most hosts a user has 128 of these. A follower that gets none is blind, and looks by itself
    LOOK_S after its last look.
    """

    def __init__(self, directory, names):
        self.fd = c_function("inotify_init1")(os.O_NONBLOCK | os.O_CLOEXEC)
        self.blind = self.fd < 0
        for name in names if not self.blind else ():
            # IN_MODIFY. For the directory IN_DELETE | IN_CREATE: its own end is reported only after
            # every process has closed it.
            path = b"/proc/self/fd/%d/%s" % (directory, name.encode())
            if (
                c_function("inotify_add_watch")(self.fd, path, 0x300 if name == "." else 0x2) < 0
                and _ctypes.get_errno() != errno.ENOENT
            ):
                self.blind = True

    def clear(self):
        if self.fd < 0:
            return
        try:
            while os.read(self.fd, 65536):
                pass
        except BlockingIOError:
            pass


class Follower:
    """Sends a run's output and States as frames, from a cursor on; takes the client's frames."""

    def __init__(self, run, request, stdin, out):
        self.run, self.request, self.stdin, self.out = run, request, stdin, out.fileno()
        wanted = request.get("streams")
        self.streams = [name for name in run.streams if wanted is None or name in wanted]
        self.live = request.get("live", True) is not False
        self.files = {name: open_file(run, name) for name in self.streams}
        self.watch = FileWatch(run.directory, self.streams + ["exit", "."])
        self.times = Times(run)
        self.cursor = dict.fromkeys(self.streams, 0)
        if request.get("tail") is not None:
            self.cursor.update(tail_cursor(run, self.files, self.times.file, int(request["tail"])))
        if request.get("since") is not None:
            later = since_cursor(run, self.files, int(request["since"]))
            self.cursor.update(
                {name: max(self.cursor[name], offset) for name, offset in later.items()}
            )
        for name, offset in (request.get("cursor") or {}).items():
            if name in self.cursor:
                self.cursor[name] = int(offset)
        self.queue = []  # frames that go out before any more output
        self.spans = []
        self.sending = None  # [file, offset, bytes left]
        self.partial = b""
        self.orders = {}  # request id: (number, signal name, deadline)
        self.page = self.state = None
        self.coming = self.sure = self.done = False
        self.sender = None
        if request.get("sender") and takes_more(run.request):
            self.sender = sender_of(run, int(request["sender"]))
        self.came = b""  # the piece of a header
        self.body = None  # (offset, bytes left) of the frame for stdin that is being read
        self.given = []  # (offset, bytes) for stdin, not accepted yet
        self.window = None
        self.heard = self.looked = time.monotonic()
        self.keeper = None  # a pidfd, which tells of its death

    def go(self):
        os.set_blocking(self.out, False)
        if self.stdin:
            os.set_blocking(self.stdin.fd, False)
        poll = select.poll()
        for fd in ([] if self.watch.fd < 0 else [self.watch.fd]) + (
            [self.stdin.fd] if self.stdin else []
        ):
            poll.register(fd, select.POLLIN)
        self.look()
        if self.sender:
            widen(self.stdin.fd, 4)
            self.acknowledge()
        while True:
            blocked = self.write()
            if not blocked and self.over():
                return
            if not blocked and self.queue:
                continue  # the last State is still to go out
            poll.register(self.out, select.POLLOUT if blocked else 0)
            if self.keeper is not None:
                poll.register(self.keeper, select.POLLIN)
            events = dict(poll.poll(self.patience_ms()))
            if events.get(self.out, 0) & (select.POLLERR | select.POLLHUP):
                return
            if self.stdin and self.stdin.fd in events and not self.listen():
                return
            if self.stdin and time.monotonic() - self.heard > PING_DEADLINE_S:
                return
            if self.given:
                self.accept()
            if self.keeper in events:
                poll.unregister(self.keeper)
                os.close(self.keeper)
                self.keeper = self.page = None
                self.resize()  # the order may have died with the keeper
            if (
                self.keeper in events
                or self.page is None
                or self.watch.fd in events
                or self.watch.blind
                or self.orders
            ):
                self.watch.clear()
                self.look()
            elif self.keeper is None and time.monotonic() - self.looked >= LOOK_ALONE_S:
                self.page = None
                self.look()

    def patience_ms(self):
        """Return how long to wait for events: to the ping's deadline, or to the next look."""
        waits = [self.heard + PING_DEADLINE_S - time.monotonic() + 0.1] if self.stdin else []
        waits += [LOOK_ALONE_S] if self.keeper is None else []
        waits += [LOOK_S] if self.watch.blind else []
        waits += [0.02] if self.orders or self.given or self.coming else []
        return max(0, int(min(waits) * 1000) + 1) if waits else None

    # ======================================================== follow: what goes out

    def look(self):
        """Read the State where the slot has changed, and queue it if it differs."""
        self.looked = time.monotonic()
        pages = self.run.pages()
        page = pages and b"".join(pages)
        if page != self.page or page is None:
            self.page = page if page is not None else b""
            state, self.sure = self.run.state(sure=self.sure), False
            if state["agent_pid"] and self.keeper is None and state["state"] not in FINAL:
                try:
                    self.keeper = pidfd(state["agent_pid"])
                except OSError:
                    self.keeper = None
            if state != self.state:
                self.state = state
                if state["state"] not in FINAL or state["hindered"]:
                    self.tell()
        self.answer()

    def tell(self):
        data = to_json(self.state).encode()
        self.queue.append(b"S %d\n" % len(data) + data)

    def limits(self):
        """Return how far each stream may be sent: up to a final State's length, unless `late`."""
        found = {}
        for name, file in self.files.items():
            size = os.fstat(file).st_size
            final = (
                self.state["streams"].get(name, {}).get("length")
                if self.state["state"] in FINAL
                else None
            )
            found[name] = size if final is None or self.request.get("late") else min(size, final)
        return found

    def plan(self):
        """Queue the next spans of output that were not sent; return whether there are any."""
        limits = self.limits()
        while not self.spans and (
            self.times.behind or any(self.cursor[name] < limits[name] for name in limits)
        ):
            planned = dict(self.cursor)
            for name, begin, end, time_ns in self.times.spans(limits):
                if name not in planned or end <= planned[name]:
                    continue
                fresh = max(begin, planned[name])
                planned[name] = end
                last = self.spans[-1] if self.spans else None
                if last and last[0] == name and last[2] == fresh and not self.request.get("times"):
                    self.spans[-1] = (name, last[1], end, last[3])
                else:
                    self.spans.append((name, fresh, end, time_ns))
            if not self.times.behind:
                break
        return bool(self.spans)

    def over(self):
        """Return whether all was sent, the last State included."""
        if self.done or self.spans or self.sending:
            return self.done
        if self.live and self.state["state"] not in FINAL:
            return False
        before, self.state = self.state, self.run.state(details=True)
        final, hindered = self.state["state"] in FINAL, self.state["hindered"]
        sizes = {name: stat.st_size for name, stat in self.run.sizes().items()}
        lengths = {name: each["length"] for name, each in self.state["streams"].items() if final}
        short = [name for name, length in lengths.items() if sizes.get(name, length) < length]
        unsent = [name for name in self.streams if self.cursor[name] < lengths.get(name, 0)]
        # The keeper moves the last bytes right after the end, unless the disk is full.
        moving = short and self.state["supervisor"] != "gone"
        self.coming = bool(moving and not hindered) or bool(set(unsent) - set(short))
        if self.coming or (moving and unsent and self.live):
            if hindered != before["hindered"]:
                self.tell()
            return False
        for name in unsent if not moving else ():
            self.queue.append(b"G %s %d %d\n" % (name.encode(), self.cursor[name], lengths[name]))
        self.tell()
        self.done = True
        return False

    def write(self):
        """Write until nothing is left or the client is slow; return whether it is slow."""
        try:
            while True:
                while self.partial:
                    self.partial = self.partial[os.write(self.out, self.partial) :]
                if self.sending:
                    file, offset, left = self.sending
                    sent = self.send(file, offset, left)
                    self.sending = [file, offset + sent, left - sent] if sent < left else None
                elif self.queue:
                    self.partial, self.queue = b"".join(self.queue), []
                elif self.spans:
                    self.next_frame()
                elif not self.plan():
                    return False
        except BlockingIOError:
            if self.sending:
                widen(self.out)
            return True

    def next_frame(self):
        """Begin to send the first span."""
        name, begin, end, time_ns = self.spans[0]
        size, data = min(end - begin, FRAME_MAX), b""
        if self.run.bounded:
            begin = max(begin, self.cursor[name])
            size = max(0, min(end - begin, FRAME_MAX))
            data = os.pread(self.files[name], size, begin)
            head = self.run.heads().get(name, 0)
            if size and head > begin:
                # The data may have been a hole. All that is gone makes one gap, whatever its spans.
                self.cursor[name] = min(head, max(end, self.limits()[name]))
                self.partial = b"G %s %d %d\n" % (name.encode(), begin, self.cursor[name])
                return
        if size:
            self.partial = b"O %s %d %d %d\n" % (name.encode(), begin, size, time_ns) + data
            self.sending = [self.files[name], begin, size] if not self.run.bounded else None
            self.cursor[name] = begin + size
        self.spans[0] = (name, begin + size, end, time_ns)
        if begin + size >= end:
            del self.spans[0]

    def send(self, file, offset, size):
        try:
            return os.sendfile(self.out, file, offset, size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.write(self.out, os.pread(file, min(size, 65536), offset))

    # ======================================================== follow: what comes in

    def listen(self):
        """Read the client's frames; return False where it has gone or a frame makes no sense."""
        try:
            data = os.read(self.stdin.fd, FRAME_MAX)
        except BlockingIOError:
            return True
        if not data:
            return False
        self.heard = time.monotonic()
        data, self.stdin.ahead, self.came = self.came + self.stdin.ahead + data, b"", b""
        at = 0
        while at < len(data):
            if self.body:
                offset, left = self.body
                part = data[at : at + left]
                self.given.append((offset, part))
                at += len(part)
                self.body = (offset + len(part), left - len(part)) if left > len(part) else None
                continue
            end = data.find(b"\n", at, at + 64)
            if end < 0:
                self.came = data[at:]
                break
            if not self.heed(data[at:end].decode("ascii", "replace").split(" ")):
                return False
            at = end + 1
        return (
            len(self.came) <= 64
            and self.accept()
            and sum(len(part or b"") for _, part in self.given) <= HELD_MAX
        )

    def heed(self, words):
        """Carry out a frame's header; return whether it is one."""
        numbers = [int(word) for word in words[1:] if word.isdigit()]
        if words[0] == "P":
            self.queue.append(b"H\n")
            if self.state and self.run.hindered() != self.state["hindered"]:
                # No file of the run tells that its keeper is stopped.
                self.page, self.sure = None, True
        elif words[0] == "K" and len(words) == 3 and words[2].isdigit():
            # Another machine may have more signals. No answer tells the client that none was sent.
            if words[1] in SIGNALS:
                number = os.urandom(4).hex()
                wake_guards(self.run)
                give_order(self.run, signal_order(number, words[1], self.request))
                self.orders[number] = (int(words[2]), words[1], time.monotonic() + ORDER_DEADLINE_S)
        elif words[0] == "I" and self.sender and len(numbers) == 2 and numbers[1] <= INPUT_MAX:
            self.body = tuple(numbers) if numbers[1] else None
        elif words[0] == "E" and self.sender and len(numbers) == 1:
            self.given.append((numbers[0], None))
        elif words[0] == "W" and len(numbers) == 2:
            self.window = numbers
            self.resize()
        else:
            return False
        return True

    # ======================================================== follow: the program's stdin

    def resize(self):
        if self.window:
            give_order(self.run, "- window %d %d" % tuple(self.window))

    def accept(self):
        """Accept bytes for stdin and acknowledge them; return False where bytes are missing."""
        if not self.given:
            return True
        ended, accepted, closed = self.sender.ended, self.sender.accepted, False
        try:
            while self.given:
                self.sender.take(*self.given[0])
                ended = ended or self.given[0][1] is None
                del self.given[0]
        except BlockingIOError:
            pass
        except EOFError:
            self.given, closed = [], not self.sender.ended
        except ValueError:
            return False
        if self.sender.accepted != accepted or self.sender.ended:
            give_order(self.run, "- stdin")
        self.acknowledge(ended=ended, closed=closed)
        return True

    def acknowledge(self, ended=False, closed=False):
        kind = b"C" if closed else b"E" if ended or self.sender.ended else b"I"
        self.queue.append(b"A %s %d\n" % (kind, self.sender.accepted))

    def answer(self):
        """Acknowledge the orders that the keeper has carried out; signal directly if it is late."""
        if not self.orders:
            return
        record = Record.read(self.page[:PAGE]) or Record()
        done = {each[2] for each in record.sent}
        for number, (serial, name, deadline) in list(self.orders.items()):
            late = time.monotonic() > deadline
            heard = number in done
            if late and not heard:
                # No answer tells the client that the signal has reached nobody, as of a program
                # that is dead.
                heard = signal_directly(self.run, name)
            if heard:
                self.queue.append(b"A %d\n" % serial)
            if heard or late:
                del self.orders[number]


def verb_follow(request, stdin, reply, framed):
    """Reply with the State, then with frames.

    For a tail or a time the State has the `cursor` where it begins, so that a link cut at once
    loses no line. For a client whose terminal becomes the program's, it has the modes `switched`
    on there.
    """
    run = find(request)
    state = run.state()
    if request.get("sender") and not takes_more(run.request):
        file = run.request["program"].get("stdin") is not None
        how = "what it was given at its start" if file else "/dev/null"
        raise Refusal("no_stdin", "its stdin is %s (run had no -i)" % how, state=state)
    follow = Follower(run, request, stdin if framed else None, reply.out)
    more = {"cursor": follow.cursor} if {"tail", "since"} & set(request) else {}
    if more and follow.sender and state["pty"] and "output" in follow.files:
        more["switched"] = switched(follow.files["output"])
    reply.send(dict(state, **more))
    follow.go()


def verb_wait(request, stdin, reply, framed):
    verb_follow(dict(request, streams=[]), stdin, reply, framed)
