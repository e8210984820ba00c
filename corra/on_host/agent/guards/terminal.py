"""The program's terminal."""

import errno
import fcntl
import posix as os
import select
import struct

from ..contract import LOOK_S, SPLICE
from ..kernel import mono_ns, splice, unread


class Terminal:
    """The master of the program's terminal: what it says goes into a pipe of the guards and from there into the file, like any other output."""

    def __init__(self, files, pump, poll):
        self.master, self.pipe, self.pump, self.poll = files["terminal"], files["said"], pump, poll
        self.stream = pump.streams[0]
        self.heed_at = None  # when to look again whether somebody has opened it anew

    def watch(self, writing):
        """Say what to wake up for. A hang-up comes unasked and for ever, so who hears of one looks again later."""
        wanted = (0 if self.stream.blocked else select.POLLIN) | (select.POLLOUT if writing else 0)
        if self.heed_at is None and self.stream.open:
            self.poll.register(self.master, wanted)

    def hear(self):
        """Move what was said, at most as much as a terminal holds; return False when nobody has it open and all is moved."""
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
        # Linux 5.10 has no splice for terminals: here a kill between the two costs what was read.
        if unread(self.stream.fifo) > 32768:
            raise BlockingIOError
        return os.write(self.pipe, os.read(self.master, 4096))

    def hung_up(self, ended):
        """Nobody has it open: that is the end of it if the program is at its end, else it may be opened again (login does so)."""
        try:
            self.poll.unregister(self.master)
        except KeyError:
            pass
        if ended and not unread(self.stream.fifo):
            self.stream.open, self.heed_at = False, None
        else:
            self.heed_at = mono_ns() + int(LOOK_S * 1e9)

    def resize(self, rows, columns):
        """Give it a size. Whoever is in the foreground hears of it also where it is the old one: who has just come wants all drawn anew."""
        import termios  # in memory already: open_terminal has needed it

        size = struct.pack("HHHH", rows, columns, 0, 0)
        if fcntl.ioctl(self.master, termios.TIOCGWINSZ, b"\0" * 8)[:4] == size[:4]:
            # The kernel sends the signal, to root's programs too, and only where the size has changed.
            fcntl.ioctl(
                self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns + 1, 0, 0)
            )
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)


def open_terminal(request, files):
    """Make the terminal and the pipes beside it, before there is any other guard: all hold them. Raises OSError where there is none to be had."""
    import termios

    wanted = (request.get("run") or {}).get("terminal") or {}
    files["terminal"], slave = os.openpty()
    fcntl.ioctl(
        slave,
        termios.TIOCSWINSZ,
        struct.pack("HHHH", wanted.get("rows") or 24, wanted.get("columns") or 80, 0, 0),
    )
    modes = termios.tcgetattr(slave)
    modes[0] |= 0x4000  # IUTF8: the rubout of a line takes a character and not a byte
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    request["terminal"] = os.ttyname(slave)
    os.close(slave)
    files["fifo/output"], files["said"] = os.pipe()
    files["feeding"], files["fed"] = os.pipe()
    for name in ("terminal", "fifo/output", "said", "feeding", "fed"):
        os.set_blocking(files[name], False)
