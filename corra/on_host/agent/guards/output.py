"""The program's output, on its way from the FIFOs into the spool."""

import errno
import posix as os
import select

from ..bounds import Bound
from ..contract import FULL, INDEX_RECORD, SPLICE, STREAM_SHIFT
from ..kernel import SEEK_END, free_room, mono_ns, now_ns, splice, unread, widen
from ..spool import stream_names

INDEX_EVERY_NS = 10 * 10**6
ROOM_STEP = 16 << 20


class Stream:
    """One of the program's outputs: a FIFO, and the file that its bytes are moved to."""

    def __init__(self, number, name, fifo, file, bound):
        self.number, self.name, self.fifo, self.file, self.bound = number, name, fifo, file, bound
        self.open = True
        self.blocked = False
        self.full = 0
        self.room = 0
        self.stamp = 0
        self.held = b""  # read but not yet written, only where splice isn't possible

    def length(self):
        return os.fstat(self.file).st_size

    def coming(self):
        """Return how many bytes the program has written that aren't in the file yet."""
        return len(self.held) + unread(self.fifo)

    def has_room(self):
        """Return whether the disk is above its floor.

        The disk is asked again after half as many bytes as were free, at most ROOM_STEP.
        """
        if self.room <= 0:
            if not os.fstat(self.file).st_nlink:
                os.ftruncate(self.file, 0)  # deleted: it mustn't fill the disk for no reader
            self.room = min(free_room(self.file) // 2, ROOM_STEP)
            if self.room <= 0:
                self.room = self.give_way()
        return self.room > 0

    def give_way(self):
        """Make room by the beginning of a bounded stream; return how many bytes."""
        return self.bound.give_way() if self.bound else 0

    def move(self):
        """Move bytes from the FIFO into the file; return how many, 0 at the end, None if empty."""
        if self.held:
            self.write_held()
        try:
            moved = splice(self.fifo, self.file, SPLICE)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            try:
                self.held = os.read(self.fifo, 65536)
            except BlockingIOError:
                return None
            moved = len(self.held)
            self.write_held()
        self.room -= moved
        if self.bound:
            self.bound.trim()
        # 4 full splices in a row: the program is faster than the keeper.
        self.full = self.full + 1 if moved >= 65536 else 0
        if self.full >= 4:
            self.full = 0
            widen(self.fifo)
        return moved

    def write_held(self):
        while self.held:
            self.held = self.held[os.write(self.file, self.held) :]


class Pump:
    """Moves the program's output into the spool, notes its times, and pauses on a full disk."""

    def __init__(self, files, request, poll):
        self.index, self.poll = files["index"], poll
        names, keep = stream_names(request), (request.get("run") or {}).get("keep_output")
        bounds = [
            Bound(number, files[name], files["heads"], int(keep)) if keep else None
            for number, name in enumerate(names + ["index"])
        ]
        self.streams = [
            Stream(number, name, files["fifo/" + name], files[name], bounds[number])
            for number, name in enumerate(names)
        ]
        self.index_bound = bounds[-1]
        for stream in self.streams:
            os.lseek(stream.file, 0, SEEK_END)
            poll.register(stream.fifo, select.POLLIN)
        self.by_fifo = {stream.fifo: stream for stream in self.streams}
        self.latest = None
        self.blocked = None  # (since ns, errno)
        self.pause_ns = self.again_at = 0

    def on(self, fifo, event):
        stream = self.by_fifo[fifo]
        if event & select.POLLIN:
            self.drain(stream)
        elif event & (select.POLLHUP | select.POLLERR):
            # Nobody holds the other end. To poll it would be a busy loop.
            stream.open = False
            self.poll.unregister(fifo)

    def drain(self, stream):
        """Move what the FIFO holds; at most 16 splices, so that other streams get a turn."""
        for _ in range(16):
            try:
                if not stream.has_room() and unread(stream.fifo):
                    self.block(stream, errno.ENOSPC)
                    return
                self.note_time(stream)
                moved = stream.move()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if stream.give_way():
                    continue
                self.block(stream, error.errno)
                return
            if not moved:
                break
        if stream.open:
            self.poll.register(stream.fifo, select.POLLIN)

    def note_time(self, stream):
        """Add a record to the index when the stream changes, or 10 ms after its last record."""
        now = now_ns()
        if (self.latest is stream and 0 <= now - stream.stamp < INDEX_EVERY_NS) or not unread(
            stream.fifo
        ):
            return
        self.latest, stream.stamp = stream, now
        try:
            size = os.fstat(self.index).st_size
            record = INDEX_RECORD.pack(now, stream.number << STREAM_SHIFT | stream.length())
            # At a multiple of the record's size, so that a torn record is overwritten.
            os.pwrite(self.index, record, size - size % INDEX_RECORD.size)
            if self.index_bound:
                self.index_bound.trim()
        except OSError:
            pass

    def block(self, stream, number):
        """Leave the bytes in the FIFO, where they hold the program back, and try again later."""
        if stream.open and not stream.blocked:
            self.poll.unregister(stream.fifo)
        stream.blocked = True
        self.blocked = self.blocked or (now_ns(), number)
        self.pause_ns = min(max(self.pause_ns * 2, 50 * 10**6), 10**9)
        self.again_at = mono_ns() + self.pause_ns

    def unblock(self):
        for stream in self.streams:
            if stream.blocked:
                stream.blocked, stream.room = False, 0
                if stream.open:
                    self.poll.register(stream.fifo, select.POLLIN)
                self.drain(stream)
        if not any(stream.blocked for stream in self.streams):
            self.pause_ns, self.blocked = 0, None

    def close(self):
        """Expect no output: no program was started, so nobody will ever hang up."""
        for stream in self.streams:
            stream.open = False

    def open(self):
        return any(stream.open for stream in self.streams)

    def written(self):
        """Return how many bytes the program has written to each stream, moved or not."""
        return {stream.name: stream.length() + stream.coming() for stream in self.streams}

    def short_of(self, lengths):
        """Return whether a file is shorter than `lengths` says and more bytes are to come."""
        return any(
            stream.length() < lengths.get(stream.name, 0) and stream.coming()
            for stream in self.streams
        )
