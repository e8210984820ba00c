"""A program's stdin that somebody may write to later, and its terminal. Standard library only, Python 3.6 and later.

It stands on the host at both ends of what is sent to a program:

- As the beginning of the program itself (`main(["run", COMMAND])`, `main(["pty", COMMAND, ROWS, COLUMNS])`). `run` leaves a helper behind,
  which holds the program's stdin, and becomes the program: its pid, its signals and its exit status are the program's own. `pty` stays, as
  the parent of a program that has a terminal, hands its output on, passes signals down, and ends as the program does.
- As a verb of its own (`feed {dir}`), which joins a link to the socket of the former: bytes in both directions, until one side ends.

What travels over it: `I <offset> <length>` and the bytes, `E <offset>` the end, `W <rows> <columns>`; back comes `A <offset>` (with ` E` once
the end is known), when somebody has joined and whenever something was taken. Offsets count from the first byte, so what is sent again after a broken link never comes twice.

The socket lies in the run's spool, which nobody else can enter; nothing that is sent is ever written to a disk. The helper leaves when nobody
has the program's stdin open any more. If it is killed the program reads the end of its stdin.
"""

import errno
import fcntl
import json
import os
import select
import signal
import socket
import struct
import sys
import termios

SOCKET = "in"
# What may wait for a program that doesn't read; beyond it the sender waits.
HELD_MAX = 256 * 1024
STEP = 64 * 1024
PASSED_ON = ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGCONT")


class Input:
    """stdin without a buffer. `ahead` was read before."""

    def __init__(self, fd=0, ahead=b""):
        self.fd, self.ahead = fd, ahead

    def some(self, size):
        if self.ahead:
            data, self.ahead = self.ahead[:size], self.ahead[size:]
            return data
        return os.read(self.fd, size)

    def request(self):
        size = b""
        while not size.endswith(b"\n"):
            more = self.some(1)
            if not more or len(size) > 16:
                raise ValueError("not a request")
            size += more
        data = b""
        while len(data) < int(size):
            more = self.some(int(size) - len(data))
            if not more:
                raise ValueError("not a request")
            data += more
        return json.loads(data.decode())


# The program's end


def spool():
    """Return the directory of the run whose program we are: our stdout is a FIFO in it."""
    return os.path.dirname(os.path.dirname(os.readlink("/proc/self/fd/1")))


def listening(directory):
    """Return a socket in `directory`, however long its path is."""
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind("/proc/self/fd/%d/%s" % (at, SOCKET))
    server.listen(4)
    server.setblocking(False)
    os.close(at)
    return server


def become(command):
    """Turn into the program: the user's own shell with `command`, as sshd would start it."""
    for name in ("SIGPIPE", "SIGXFSZ"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)
    os.environ.pop("CORRA_RELAY", None)
    shell = os.environ.get("SHELL") or "/bin/sh"
    try:
        os.execv(shell, [os.path.basename(shell), "-c", command])
    except OSError as error:
        os.write(2, ("%s: %s\n" % (shell, error.strerror)).encode())
        os._exit(127 if error.errno == errno.ENOENT else 126)


class Feeder:
    """Takes what is sent over the socket and writes it to `target`, the program's stdin or its terminal."""

    def __init__(self, server, target, resize=None):
        self.server, self.target, self.resize = server, target, resize
        self.peers = {}
        self.offset = 0
        self.held = bytearray()
        self.end_at = None
        os.set_blocking(target, False)

    def watch(self, poll):
        """Say what there is to wait for."""
        poll.register(self.server, select.POLLIN)
        for fd in self.peers:
            if len(self.held) < HELD_MAX:
                poll.register(fd, select.POLLIN)
        if self.target >= 0:
            # POLLERR comes unasked: nobody has the other end open any more.
            poll.register(self.target, select.POLLOUT if self.held else 0)

    def act(self, events):
        """Do what can be done; return False when the program's stdin is gone."""
        for fd, event in events:
            if fd == self.server.fileno():
                peer, _ = self.server.accept()
                peer.setblocking(True)
                self.peers[peer.fileno()] = (peer, bytearray())
                self.say(peer.fileno())
            elif fd in self.peers:
                self.hear(fd)
            elif fd == self.target and event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) and not event & select.POLLIN:
                return False
        return self.write()

    def say(self, fd):
        try:
            self.peers[fd][0].sendall(b"A %d%s\n" % (self.offset, b"" if self.end_at is None else b" E"))
        except OSError:
            self.drop(fd)

    def drop(self, fd):
        self.peers.pop(fd)[0].close()

    def hear(self, fd):
        peer, ahead = self.peers[fd]
        try:
            data = peer.recv(STEP)
        except OSError:
            data = b""
        if not data:
            self.drop(fd)
            return
        ahead += data
        while self.frame(ahead):
            pass
        self.say(fd)

    def frame(self, ahead):
        """Take one whole frame from what has come; return whether there was one."""
        line_end = ahead.find(b"\n", 0, 64)
        if line_end < 0:
            return False
        words = bytes(ahead[:line_end]).split()
        kind, numbers = words[0], [int(word) for word in words[1:]]
        size = numbers[1] if kind == b"I" else 0
        if len(ahead) < line_end + 1 + size:
            return False
        data = bytes(ahead[line_end + 1 : line_end + 1 + size])
        del ahead[: line_end + 1 + size]
        if kind == b"I" and numbers[0] <= self.offset:
            new = data[self.offset - numbers[0] :]
            self.held += new
            self.offset += len(new)
        elif kind == b"E":
            self.end_at = numbers[0]
        elif kind == b"W" and self.resize:
            self.resize(numbers[0], numbers[1])
        return True

    def write(self):
        try:
            while self.held and self.target >= 0:
                del self.held[: os.write(self.target, self.held[:4096])]
        except BlockingIOError:
            return True
        except OSError:
            return False
        if self.end_at is not None and self.end_at <= self.offset and not self.held and self.target >= 0:
            if self.resize:
                self.held += b"\x04"  # what a terminal calls the end of file
                self.end_at = None
                return self.write()
            os.close(self.target)
            self.target = -1
            return False
        return True


def run(command):
    """Become the program, leaving behind who feeds its stdin."""
    server = listening(spool())
    ours, theirs = os.pipe()[::-1]
    program = os.getpid()
    if os.fork() == 0:
        try:
            os.close(theirs)
            null = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(null, fd)
            # A signal for the program's group isn't for us: its stdin must last as long as it does.
            for name in ("SIGTERM", "SIGHUP", "SIGINT", "SIGQUIT"):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
            feed_until_gone(Feeder(server, ours))
        finally:
            os._exit(0)
    assert program == os.getpid()
    server.close()
    os.close(ours)
    os.dup2(theirs, 0)
    os.close(theirs)
    become(command)


def feed_until_gone(feeder):
    while True:
        poll = select.poll()
        feeder.watch(poll)
        if not feeder.act(poll.poll()):
            return


def pty(command, rows, columns):
    """Run the program on a terminal of its own, and end as it does."""
    server = listening(spool())
    master, slave = os.openpty()

    def resize(rows, columns):
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    resize(rows, columns)
    child = os.fork()
    if child == 0:
        os.setsid()
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        for fd in (0, 1, 2):
            os.dup2(slave, fd)
        os.closerange(3, 64)
        become(command)
    os.close(slave)
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(wake)
    for name in PASSED_ON:
        signal.signal(getattr(signal, name), lambda number, frame: pass_on(child, number))
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    status = hand_on(master, Feeder(server, os.dup(master), resize), child, woken)
    if os.WIFSIGNALED(status):
        signal.signal(os.WTERMSIG(status), signal.SIG_DFL)
        os.kill(os.getpid(), os.WTERMSIG(status))
    os._exit(os.WEXITSTATUS(status) if os.WIFEXITED(status) else 1)


def pass_on(child, number):
    try:
        os.killpg(child, number)
    except OSError:
        pass


def hand_on(master, feeder, child, woken):
    """Move the terminal's output to our stdout until the program has ended and said all; return its wait status."""
    status = None
    while True:
        poll = select.poll()
        feeder.watch(poll)
        poll.register(master, select.POLLIN)
        poll.register(woken, select.POLLIN)
        # After the end, whatever stands in the terminal still is its output; a left-over child that holds it open has no say.
        events = poll.poll(0 if status is not None else None)
        said = any(fd == master and event & select.POLLIN for fd, event in events)
        if said:
            try:
                out(os.read(master, STEP))
            except OSError:
                said = False
        if status is not None and not said:
            return status
        for fd, _ in events:
            if fd == woken:
                os.read(woken, 512)
        feeder.act([(fd, event) for fd, event in events if fd not in (master, woken)])
        if status is None:
            pid, ended = os.waitpid(child, os.WNOHANG)
            if pid:
                status = ended
            elif not said and any(fd == master and event & select.POLLHUP for fd, event in events):
                # All have closed the terminal and the program lives on.
                status = os.waitpid(child, 0)[1]


def out(data):
    while data:
        data = data[os.write(1, data) :]


# The link's end


def feed(request, stdin, stdout):
    """Join the link to the program's socket."""
    at = os.open(request["dir"], os.O_RDONLY | os.O_DIRECTORY)
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        peer.connect("/proc/self/fd/%d/%s" % (at, SOCKET))
    except OSError as error:
        return {"error": "not_ready", "message": "nobody takes its stdin: %s" % error.strerror, "errno": error.errno}
    answer(request, stdout, {})
    if stdin.ahead:
        peer.sendall(stdin.ahead)
    sides = {stdin.fd: peer.fileno(), peer.fileno(): 1}
    poll = select.poll()
    for fd in sides:
        poll.register(fd, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            data = os.read(fd, STEP)
            if not data:
                return None
            target = sides[fd]
            while data:
                data = data[os.write(target, data) :]


def answer(request, stdout, reply):
    stdout.write(b"corra 1 %s\n%s\n" % (str(request.get("nonce", "")).encode(), json.dumps(reply).encode()))
    stdout.flush()


def main(argv, stdin=None, stdout=None):
    """As a program: become it. As a verb: answer, and return the exit code."""
    if argv[0] == "run":
        run(argv[1])
    if argv[0] == "pty":
        pty(argv[1], int(argv[2]), int(argv[3]))
    try:
        request = stdin.request()
    except ValueError:
        return 2
    try:
        refusal = feed(request, stdin, stdout)
    except (OSError, KeyError, TypeError) as error:
        refusal = {"error": "not_ready", "message": "%s: %s" % (type(error).__name__, error)}
    if refusal:
        answer(request, stdout, refusal)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
