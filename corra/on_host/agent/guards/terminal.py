"""The program's terminal, and the pipes through which it is read and fed."""

import errno
import fcntl
import posix as os
import select
import struct

from ..contract import LOOK_S, SPLICE
from ..kernel import mono_ns, splice, unread


class Terminal:
    """The master of the program's terminal.

    Its output goes into a pipe of the guards and from there into the file, as any output does.
    """

    def __init__(self, files, pump, poll):
        self.master, self.pipe, self.pump, self.poll = files["terminal"], files["said"], pump, poll
        self.stream = pump.streams[0]
        self.heed_at = None  # when to see whether a process has opened it again

    def watch(self, writing):
        """Register what to wake up for: nothing after a hang-up, which poll reports for ever."""
        wanted = (0 if self.stream.blocked else select.POLLIN) | (select.POLLOUT if writing else 0)
        if self.heed_at is None and self.stream.open:
            self.poll.register(self.master, wanted)

    def hear(self):
        """Move what was written to the terminal; return False after a hang-up and the last byte."""
        for _ in range(64):
            try:
                moved = self.take()
            except BlockingIOError:
                moved = None
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                moved = 0
            if unread(self.stream.fifo):
                self.pump.drain(self.stream)
                if self.stream.blocked:
                    return True
            if not moved:
                return moved is None
        return True

    def take(self):
        try:
            return splice(self.master, self.pipe, SPLICE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # Linux 5.10 has no splice for terminals. A kill between read and write loses what was read.
        if unread(self.stream.fifo) > 32768:
            raise BlockingIOError
        return os.write(self.pipe, os.read(self.master, 4096))

    def hung_up(self, ended):
        """No process has it open. After the program's end that is the end of the output.

        Before that a process may open it again, as login does.
        """
        try:
            self.poll.unregister(self.master)
        except KeyError:
            pass
        if ended and not unread(self.stream.fifo):
            self.stream.open, self.heed_at = False, None
        else:
            self.heed_at = mono_ns() + int(LOOK_S * 1e9)

    def resize(self, rows, columns):
        """Set the terminal's size. The foreground gets SIGWINCH even for the same size.

        An operator who has just attached wants the screen drawn anew.
        """
        import termios  # in memory already, by open_terminal

        size = struct.pack("HHHH", rows, columns, 0, 0)
        if fcntl.ioctl(self.master, termios.TIOCGWINSZ, b"\0" * 8)[:4] == size[:4]:
            # The kernel sends the signal only where the size changes, but then to root's programs
            # too.
            fcntl.ioctl(
                self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns + 1, 0, 0)
            )
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)


def open_terminal(request, files):
    """Open the terminal and its pipes, for all guards to inherit. Raises OSError."""
    import termios

    wanted = (request.get("run") or {}).get("terminal") or {}
    files["terminal"], slave = os.openpty()
    fcntl.ioctl(
        slave,
        termios.TIOCSWINSZ,
        struct.pack("HHHH", wanted.get("rows") or 24, wanted.get("columns") or 80, 0, 0),
    )
    modes = termios.tcgetattr(slave)
    modes[0] |= 0x4000  # IUTF8: a rubout takes a character and not a byte
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    request["terminal"] = os.ttyname(slave)
    os.close(slave)
    files["fifo/output"], files["said"] = os.pipe()
    files["feeding"], files["fed"] = os.pipe()
    for name in ("terminal", "fifo/output", "said", "feeding", "fed"):
        os.set_blocking(files[name], False)
