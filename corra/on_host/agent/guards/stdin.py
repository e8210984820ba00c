"""The program's stdin: from the spool into the program's own end."""

import errno
import posix as os
import select

from ..contract import SENDER_RECORD, SPLICE
from ..kernel import SEEK_CUR, mono_ns, splice, unread, widen, wipe
from ..spool import end_of_stdin


class Intake:
    """Moves what is sent to the program from the file `stdin` into the program's own end.

    splice moves the file's position along with the bytes, in one step of the kernel, and all guards share that position, since they inherit
    one open file: whichever of them is killed when, the next goes on at the very byte. (A position that the mover writes down is behind the
    truth or ahead of it when he is killed between the two.) To a terminal the way leads through a pipe, which all of them hold as well.
    """

    def __init__(self, directory, files, poll, forgets):
        """`forgets`: what the program has read isn't kept in the file."""
        self.directory, self.files, self.poll = directory, files, poll
        self.wiped = os.open("stdin", os.O_WRONLY, dir_fd=directory) if forgets else None
        self.read = 0  # and wiped
        self.look_at, self.pause_ns = None, 0  # when to look how far the program has read
        self.file, self.terminal, self.target = (
            files["stdin"],
            files.get("terminal"),
            files.get("fifo/stdin", -1),
        )
        self.waits = False  # for room in the program's end
        self.open = self.terminal is not None or self.target >= 0
        self.through = False  # the pipe
        self.noted = -1
        if self.terminal is not None:
            self.target = self.terminal
            try:
                splice(files["feeding"], self.terminal, SPLICE)
                self.through = True
            except OSError as error:
                self.through = error.errno != errno.EINVAL

    def move(self):
        """Move what there is, as far as it goes."""
        if self.open:
            self.move_on()
        if self.wiped is not None:
            self.forget()

    def move_on(self):
        try:
            self.waits = self.fill()
        except BrokenPipeError:
            self.open = self.waits = False  # nobody reads it any more
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.waits = False  # nobody has the terminal open: it waits for whoever does
        at = os.lseek(self.file, 0, SEEK_CUR)
        if at != self.noted:
            self.noted = at
            os.pwrite(
                self.files["senders"], SENDER_RECORD.pack(at, 0, 0), 0
            )  # for whoever sends: the truth is the position
        if self.terminal is None and self.waits:
            self.poll.register(self.target, select.POLLOUT)
        elif self.terminal is None:
            self.unregister()

    def forget(self):
        """Wipe what has been read: a password that was typed isn't to lie about. Never before that, as a pipe only refers to the file's pages."""
        at, left = os.lseek(self.file, 0, SEEK_CUR), self.left()
        if at - left > self.read:
            wipe(self.wiped, self.read, at - left)
            self.read, self.pause_ns = at - left, 0
        self.pause_ns = min(max(self.pause_ns * 2, 10 * 10**6), 5 * 10**9)
        self.look_at = mono_ns() + self.pause_ns if left else None

    def left(self):
        """Return how much has been moved that the program hasn't read."""
        if self.terminal is not None:
            return unread(self.files["feeding"])
        # Opened for a moment: our own end may be closed by now.
        reader = os.open("fifo/stdin", os.O_RDONLY | os.O_NONBLOCK, dir_fd=self.directory)
        try:
            return unread(reader)
        finally:
            os.close(reader)

    def forget_all(self):
        """Nobody is left who could read any of it."""
        if self.wiped is not None:
            wipe(self.wiped, self.read, os.fstat(self.file).st_size)

    def fill(self):
        """Move until nothing is left, or until there is no room: then return True."""
        for _ in range(64):
            try:
                moved = pass_on(self.file, self.files["fed"] if self.through else self.target)
            except BlockingIOError:
                moved = None
            if self.through and unread(self.files["feeding"]):
                try:
                    splice(self.files["feeding"], self.terminal, SPLICE)
                    continue
                except BlockingIOError:
                    return True
            if not moved:
                return moved is None
            if moved >= 65536 and self.terminal is None:
                widen(self.target)
        return True

    def all_moved(self):
        """Return whether it has been ended and all of it been moved. A terminal has no end."""
        return self.terminal is None and all_moved(self.files)

    def unregister(self):
        try:
            self.poll.unregister(self.target)
        except (KeyError, ValueError):
            pass

    def close(self):
        """Close this guard's end of it."""
        held = self.files.pop("fifo/stdin", None)
        if held is not None:
            self.unregister()
            os.close(held)
        self.open = self.waits = False


def all_moved(files):
    end = end_of_stdin(files["senders"])
    return end is not None and os.lseek(files["stdin"], 0, SEEK_CUR) >= end


def pass_on(file, target):
    """Move bytes from a file's position onwards in one step; return how many. Raises BlockingIOError when there is no room."""
    try:
        return splice(file, target, SPLICE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # A file system without splice, or a terminal before Linux 5.12: here a kill between write and lseek has these bytes come twice.
    data = os.pread(file, 2048, os.lseek(file, 0, SEEK_CUR))
    sent = os.write(target, data) if data else 0
    os.lseek(file, sent, SEEK_CUR)
    return sent
