"""Sending bytes to a program's stdin."""

import errno
import fcntl
import posix as os

from ..contract import END_OF_STDIN, FULL, SENDER_RECORD
from ..files import exists
from ..kernel import free_room

AHEAD_MAX = 64 << 20  # accepted bytes that the program hasn't read


class Sender:
    """Appends one client's bytes to `stdin`, behind those of all others, each byte once.

    A client names itself by a number of its own making and counts its bytes from 0. A record in
    `senders` says from which offset of `stdin` on the bytes are a client's, and which of that
    client's bytes they are. The record is written before the bytes. So after any kill, the lengths
    of both files tell how much was accepted from each client.
    """

    def __init__(self, run, number):
        self.run, self.number = run, number
        self.file = os.open("stdin", os.O_WRONLY | os.O_NOFOLLOW, dir_fd=run.directory)
        self.senders = os.open("senders", os.O_RDWR | os.O_NOFOLLOW, dir_fd=run.directory)
        self.terminal = bool(run.request["program"].get("pty"))
        self.at = SENDER_RECORD.size  # in `senders`; the first record is the keeper's
        self.last = (0, 0, 0)
        self.accepted = 0
        self.ended = False
        fcntl.flock(self.senders, fcntl.LOCK_EX)
        self.look()
        fcntl.flock(self.senders, fcntl.LOCK_UN)

    def look(self):
        """Read the new records of all senders; return the length of stdin. Needs the lock."""
        more = os.fstat(self.senders).st_size - self.at
        data = (
            os.pread(self.senders, more // SENDER_RECORD.size * SENDER_RECORD.size, self.at)
            if more > 0
            else b""
        )
        self.at += len(data)
        for record in SENDER_RECORD.iter_unpack(data):
            self.count(record[1])
            self.last = record
        length = os.fstat(self.file).st_size
        self.count(length)
        self.ended = self.last[0] == END_OF_STDIN
        return length

    def count(self, end):
        who, begin, offset = self.last
        if who == self.number:
            self.accepted = offset + end - begin

    def note(self, who, length):
        record = (who, length, self.accepted)
        # At a multiple of the record's size, so that one torn by a full disk is overwritten.
        if os.pwrite(self.senders, SENDER_RECORD.pack(*record), self.at) < SENDER_RECORD.size:
            raise OSError(errno.ENOSPC, "no room")
        self.at, self.last = self.at + SENDER_RECORD.size, record

    def take(self, offset, data):
        """Accept what is new of `data`, the client's bytes from `offset` on; None is the end.

        Raises BlockingIOError while there is no room, EOFError where stdin has ended or nobody has
        it open, ValueError where bytes before `offset` are missing.
        """
        fcntl.flock(self.senders, fcntl.LOCK_EX)
        try:
            length = self.look()
            if data is None and self.terminal:
                data = b"\x04"  # typed, it means the end; a terminal goes on after it
            if self.ended or self.unheard():
                raise EOFError
            if offset > self.accepted:
                raise ValueError("a hole: from %d, where %d are accepted" % (offset, self.accepted))
            if data is None:
                self.note(END_OF_STDIN, length)
                self.ended = True
                return
            data = data[self.accepted - offset :]
            if not data:
                return
            moved = SENDER_RECORD.unpack(os.pread(self.senders, SENDER_RECORD.size, 0))[0]
            if length - moved > AHEAD_MAX or free_room(self.file) < len(data):
                raise BlockingIOError
            if self.last[0] != self.number:
                self.note(self.number, length)
            while data:
                sent = os.pwrite(self.file, data, length)
                data, length, self.accepted = data[sent:], length + sent, self.accepted + sent
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise BlockingIOError from None
        finally:
            fcntl.flock(self.senders, fcntl.LOCK_UN)

    def unheard(self):
        """Return whether the program was launched and no process has its stdin open for reading."""
        if self.terminal or not exists(self.run.directory, "launched"):
            return False
        try:
            os.close(
                os.open(
                    "fifo/stdin",
                    os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW,
                    dir_fd=self.run.directory,
                )
            )
            return False
        except OSError as error:
            return error.errno == errno.ENXIO


class ClosedStdin:
    """Stands for the Sender of a run whose files were removed: nobody reads what is sent."""

    accepted, ended = 0, False

    def take(self, offset, data):
        """Raises EOFError."""
        raise EOFError


def sender_of(run, number):
    return Sender(run, number) if exists(run.directory, "senders") else ClosedStdin()
