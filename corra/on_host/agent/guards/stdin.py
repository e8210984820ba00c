"""The program's stdin, on its way from the spool to the program."""

import errno
import posix as os
import select

from ..contract import SENDER_RECORD, SPLICE
from ..kernel import SEEK_CUR, mono_ns, splice, unread, widen, wipe
from ..spool import end_of_stdin


class Intake:
    """Moves bytes from the file `stdin` into the program's own end.

    splice moves bytes and the file's position in one step of the kernel, and all guards share that
    position, since they inherit one open file. So after any kill the next guard goes on at the very
    byte. If the keeper saved the position itself, a kill between the write and the save would leave
    it wrong. To a terminal the bytes go through a pipe, which all guards hold as well.
    """

    def __init__(self, directory, files, poll, forgets):
        """Go on at the position that the guards share. `forgets`: wipe what was read."""
        self.directory, self.files, self.poll = directory, files, poll
        self.wiped = os.open("stdin", os.O_WRONLY, dir_fd=directory) if forgets else None
        self.read = 0  # by the program, and wiped
        self.look_at, self.pause_ns = None, 0  # when to see how far the program has read
        self.file, self.terminal, self.target = (
            files["stdin"],
            files.get("terminal"),
            files.get("fifo/stdin", -1),
        )
        self.waits = False  # until the program's end has room
        self.open = self.terminal is not None or self.target >= 0
        self.through = False  # a terminal is reached through the pipe
        self.noted = -1
        if self.terminal is not None:
            self.target = self.terminal
            try:
                splice(files["feeding"], self.terminal, SPLICE)
                self.through = True
            except OSError as error:
                self.through = error.errno != errno.EINVAL

    def move(self):
        """Move bytes as long as there are bytes and room."""
        if self.open:
            self.move_on()
        if self.wiped is not None:
            self.forget()

    def move_on(self):
        try:
            self.waits = self.fill()
        except BrokenPipeError:
            self.open = self.waits = False  # the program has closed it
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.waits = False  # no process has the terminal open: it waits for the next one
        at = os.lseek(self.file, 0, SEEK_CUR)
        if at != self.noted:
            self.noted = at
            # For the senders. The truth is the file's position.
            os.pwrite(self.files["senders"], SENDER_RECORD.pack(at, 0, 0), 0)
        if self.terminal is None and self.waits:
            self.poll.register(self.target, select.POLLOUT)
        elif self.terminal is None:
            self.unregister()

    def forget(self):
        """Wipe what the program has read, such as a password.

        Bytes in the pipe can't be wiped before: a pipe refers to the file's own pages.
        """
        at, left = os.lseek(self.file, 0, SEEK_CUR), self.left()
        if at - left > self.read:
            wipe(self.wiped, self.read, at - left)
            self.read, self.pause_ns = at - left, 0
        self.pause_ns = min(max(self.pause_ns * 2, 10 * 10**6), 5 * 10**9)
        self.look_at = mono_ns() + self.pause_ns if left else None

    def left(self):
        """Return how many bytes were moved that the program hasn't read."""
        if self.terminal is not None:
            return unread(self.files["feeding"])
        # Opened for a moment, since this guard's own end may be closed by now.
        reader = os.open("fifo/stdin", os.O_RDONLY | os.O_NONBLOCK, dir_fd=self.directory)
        try:
            return unread(reader)
        finally:
            os.close(reader)

    def forget_all(self):
        """Wipe the rest: no process is left to read it."""
        if self.wiped is not None:
            wipe(self.wiped, self.read, os.fstat(self.file).st_size)

    def fill(self):
        """Move bytes until there are none, or no room; return whether room is what is missing."""
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
        """Return whether stdin has ended and all of it was moved. A terminal has no end."""
        return self.terminal is None and all_moved(self.files)

    def unregister(self):
        try:
            self.poll.unregister(self.target)
        except (KeyError, ValueError):
            pass

    def close(self):
        """Close this guard's end of the FIFO."""
        held = self.files.pop("fifo/stdin", None)
        if held is not None:
            self.unregister()
            os.close(held)
        self.open = self.waits = False


def all_moved(files):
    end = end_of_stdin(files["senders"])
    return end is not None and os.lseek(files["stdin"], 0, SEEK_CUR) >= end


def pass_on(file, target):
    """Move bytes from a file's position onwards in one step; return how many.

    Raises BlockingIOError where there is no room.
    """
    try:
        return splice(file, target, SPLICE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # A file system without splice, or a terminal before Linux 5.12. A kill between write and lseek
    # makes these bytes come twice.
    data = os.pread(file, 2048, os.lseek(file, 0, SEEK_CUR))
    sent = os.write(target, data) if data else 0
    os.lseek(file, sent, SEEK_CUR)
    return sent
