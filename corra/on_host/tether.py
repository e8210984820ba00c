#!/usr/bin/env python3
r"""Carries a program over ssh to a host where nothing can be placed. Both ends are in this file.

The agent on this machine runs the tether in the place of the program (`run.carrier`). The tether
keeps to what the agent expects of a carrier:

    $CORRA_REPORT    a descriptor: closed when the program runs on the host; or
                     "STAGE ERRNO WORDS": why it never will
    signal 33 + N    give signal N to the program;
                     a real TERM, INT, HUP, QUIT, USR1 or USR2 means the same
    CORRA_FAR_NAME   the variable NAME of the program
    $CORRA_SECRETS   a descriptor: more variables, as NAME=VALUE NUL, which /proc doesn't show
    exit             as the program's. If the tether ends by a signal, the link is lost, and what
                     became of the program is unknown; or the program never started: then the
                     tether has reported it, but the guard may have been killed before it read that

FAR is the text that the host's sh runs. It is constant, so that no login shell ever reads what a
user wrote. FAR says hello on stderr. Then it takes three lines from stdin, and maybe a file: a
nonce, the size of the file or "-", and the program as shell text in octal. After that stdin carries
orders ("TERM PID"). The end of stdin means that the link is gone; the program goes on. FAR speaks
in marks, lines that begin with "corra-NONCE ": on stdout `begin` and `end`, on stderr `pid N`,
`exit N` or `refused STAGE ERRNO WORDS`. The tether cuts them off. Both streams have marks, since
sshd may forward one stream before the other.

A sudo on the way that wants a password asks by a prompt of ours. It gets the password that came
with the secrets, once.

Needs Python 3.6 and its standard library here, and a POSIX sh on the host.
"""

import ctypes
import os
import select
import shlex
import signal
import stat
import subprocess
import sys
import time

HELLO = b"corra-far hello\n"
PROMPTS = (b"corra-sudo-here:", b"corra-sudo-there:")
PASSWORD = "CORRA_SUDO_PASSWORD"  # noqa: S105 - the name of a variable
PREFIX = "CORRA_FAR_"
# Signals 34 to 64 stand for 1 to 31. Else KILL and STOP could not be passed on.
STAND_IN = 33
REAL = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
PIECE = 1 << 16
SAID_MAX = 1 << 14
# The longest mark is a PATH in a refusal. A line that begins as a mark and never ends isn't held.
MARK_MAX = 1 << 15
# How long ssh may take to end by itself. A child that the program left on the host holds ssh up.
LEAVE_S = 0.5

# The program is in the foreground, as a POSIX sh makes a process that it starts with & ignore INT
# and QUIT. The reader of the orders is in the background. sh's own words ("Killed") go to
# /dev/null. KILL means the whole tree: FAR stops each process before the next walk, so that none
# forks away. The program is killed last: once it ends, the reader of the orders ends, and no other
# process may get the program's pid before that.
FAR = r"""exec 3<&0 4>&2 2>/dev/null
printf 'corra-far hello\n' >&4
IFS= read -r corra_nonce <&3 &&
    IFS= read -r corra_size <&3 &&
    IFS= read -r corra_text <&3 || exit 125
corra_text=$(printf %b "$corra_text")
corra_session=$(command -v setsid)
mark() { printf 'corra-%s %s\n' "$corra_nonce" "$*" >&4; }
refuse() { mark refused "$*"; exit 125; }
enter() {
    cd "$1" && return
    [ -e "$1" ] || refuse cwd 2 "$1"
    [ -d "$1" ] || refuse cwd 20 "$1"
    refuse cwd 13 "$1"
}
find() {
    case $1 in
    */*) [ -e "$1" ] || refuse exec 2
        [ -x "$1" ] && [ ! -d "$1" ] || refuse exec 13;;
    *) command -v "$1" >/dev/null || refuse exec 2 "PATH there: $PATH";;
    esac
}
add() {
    case $found in *" $1 "*) return;; esac
    case $found in *" $2 "* | *" $3 "*) found="$found$1 "; more=1; kill -s STOP "$1";; esac
}
walk() {
    set -- $(sed -n 's/^\([0-9]*\) (.*) [A-Za-z] \([0-9]*\) \([0-9]*\) .*/\1 \2 \3/p' \
        /proc/[0-9]*/stat)
    [ $# -gt 2 ] || set -- $(ps -A -o pid= -o ppid= -o pgid=)
    while [ $# -gt 2 ]; do
        add "$1" "$2" "$3"
        shift 3
    done
}
slay() {
    found=" $1 " more=1 rounds=
    kill -s STOP "$1"
    while [ "$more" ] && [ ${#rounds} -lt 100 ]; do
        more= rounds=x$rounds
        walk
    done
    for each in ${found#" $1"}; do kill -s KILL "$each"; done
    kill -s KILL -- "-$1"
    kill -s KILL "$1"
}
exec 5</dev/null
if [ "$corra_size" != - ]; then
    corra_mask=$(umask)
    umask 077
    set -C
    for corra_at in "${TMPDIR:-/tmp}" /var/tmp /tmp /dev/shm "$HOME"; do
        corra_file=$corra_at/.corra-$corra_nonce
        (: >"$corra_file") && break
        corra_file=
    done
    set +C
    [ "$corra_file" ] || refuse setup 13 \
        "no directory there takes its stdin (tried ${TMPDIR:-/tmp} /var/tmp /dev/shm $HOME)"
    head -c "$corra_size" <&3 >"$corra_file" || dd bs=1 count="$corra_size" <&3 >"$corra_file"
    exec 5<"$corra_file"
    corra_came=$(wc -c <"$corra_file")
    rm -f "$corra_file"
    [ "$corra_came" -eq "$corra_size" ] || refuse setup 28 "no room for its stdin in $corra_at"
    umask "$corra_mask"
fi
printf 'corra-%s begin\n' "$corra_nonce"
while IFS=' ' read -r order corra_pid; do
    case $order in
    KILL) slay "$corra_pid";;
    *) kill -s "$order" -- "-$corra_pid" || kill -s "$order" "$corra_pid";;
    esac
done <&3 >/dev/null 4>&- 5<&- &
corra_orders=$!
(
    corra_pid=$(exec /bin/sh -c 'echo $PPID')
    exec 3<&-
    eval "$corra_text"
)
corra_status=$?
kill -s KILL "$corra_orders"
printf 'corra-%s end\n' "$corra_nonce"
mark "exit $corra_status"
exit "$corra_status"
"""


def program_text(argv, variables, before, merge):
    """Return the shell text for FAR that becomes `argv`.

    It does what `before` says, sets the variables, and refuses what can be refused before exec.
    """
    lines = ['cd "$HOME" || cd /', before]
    lines += [
        "export %s=%s" % (name, shlex.quote(value)) for name, value in sorted(variables.items())
    ]
    lines.append("find " + shlex.quote(argv[0]))
    # From here on sh's words (why exec failed) go to the program's stderr.
    lines.append(
        'mark pid "$corra_pid"; exec 2>&4 4>&- 0<&5 5<&-' + ("; exec 2>&1" if merge else "")
    )
    words = " ".join(shlex.quote(word) for word in argv)
    # A first word with a dash would be an option of exec, or of setsid.
    lines.append("exec $corra_session " + ("env -- " if argv[0].startswith("-") else "") + words)
    return "\n".join(line for line in lines if line)


def octal(text):
    """Return `text` as one line of ASCII that `printf %b` turns back into `text`."""
    plain = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 +,-./:=@_"
    return "".join(
        chr(byte) if byte in plain else "\\0%03o" % byte for byte in os.fsencode(text)
    ).encode()


class Marks:
    """Tells FAR's marks from a stream's own bytes, however the bytes are cut."""

    def __init__(self, nonce):
        self.head = b"corra-%s " % nonce
        self.held = b""

    def feed(self, data):
        """Yield (bytes of the stream, the mark that follows them or None)."""
        self.held += data
        while True:
            at = self.held.find(self.head)
            end = self.held.find(b"\n", at) if at >= 0 else -1
            if end < 0:
                if at >= 0 and len(self.held) - at > MARK_MAX:
                    raise ValueError("a mark without an end")
                break
            before, mark = self.held[:at], self.held[at + len(self.head) : end]
            self.held = self.held[end + 1 :]
            yield before, mark
        if at < 0:
            # The beginning of a mark may be the end of what has come so far.
            at = next(
                (
                    len(self.held) - size
                    for size in range(len(self.head) - 1, 0, -1)
                    if self.held.endswith(self.head[:size])
                ),
                len(self.held),
            )
        before, self.held = self.held[:at], self.held[at:]
        if before:
            yield before, None

    def rest(self):
        """Return the bytes held back at the end of the stream, unless they are half a mark."""
        return b"" if self.held.startswith(self.head) else self.held


class Stream:
    """One of ssh's outputs and its target. The program's bytes lie between two marks."""

    def __init__(self, source, target, nonce, first, last):
        self.source, self.target, self.marks = source, target, Marks(nonce)
        self.first, self.last = first, last
        self.open, self.begun, self.ended = True, False, False
        self.pending = b""
        os.set_blocking(target, False)

    def take(self, data):
        """Take bytes from ssh; return the marks among them."""
        found = []
        for before, mark in self.marks.feed(data):
            if self.begun and not self.ended:
                self.pending += before
            if mark is not None:
                word = mark.split(b" ")[0]
                self.begun = self.begun or word == self.first
                self.ended = self.ended or word == self.last
                found.append(mark)
        return found

    def close(self):
        self.open = False
        if self.begun and not self.ended:
            self.pending += self.marks.rest()

    def flush(self):
        """Write what can be written now."""
        try:
            while self.pending:
                self.pending = self.pending[os.write(self.target, self.pending[:PIECE]) :]
        except BlockingIOError:
            pass


class Failed(Exception):
    """The program was certainly not started."""

    def __init__(self, stage, number, words):
        Exception.__init__(self, words)
        self.stage, self.number = stage, number


class Tether:
    """One ssh and the program at its far end."""

    def __init__(self, ssh, text, password, patience_s, report, wakeup):
        """`wakeup` is where signals can be read, each as a byte."""
        self.wakeup = wakeup
        self.text, self.password, self.report = text, password, report
        self.deadline = time.monotonic() + patience_s
        self.patience_s = patience_s
        self.nonce = os.urandom(16).hex().encode()
        self.process = subprocess.Popen(
            ssh,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
            preexec_fn=leave_with_parent,
        )
        self.up = self.process.stdin.fileno()
        os.set_blocking(self.up, False)
        self.out = Stream(self.process.stdout.fileno(), 1, self.nonce, b"begin", b"end")
        self.err = Stream(self.process.stderr.fileno(), 2, self.nonce, b"pid", b"exit")
        self.said = b""  # by ssh, sudo and the login shell, before hello
        self.asked = set()  # the prompts that have been answered
        self.greeted = False
        self.source = None  # the program's stdin, as long as it is being sent
        self.rising = b""
        self.orders = []
        self.pid = None
        self.status = None

    # ---- the loop

    def run(self):
        """Carry bytes until the end; return the exit status, or None if the link was lost.

        Raises Failed.
        """
        while True:
            for stream in (self.out, self.err):
                stream.flush()
            self.rise()
            flushed = not (self.out.pending or self.err.pending)
            if self.out.ended and self.err.ended and flushed:
                return self.status
            if not (self.out.open or self.err.open) and flushed:
                self.lost()
                return None
            self.wait()

    def wait(self):
        poll = select.poll()
        poll.register(self.wakeup, select.POLLIN)
        for stream in (self.out, self.err):
            if stream.pending:
                poll.register(stream.target, select.POLLOUT)
            elif stream.open:
                poll.register(stream.source, select.POLLIN)
        if self.rising or self.source is not None:
            poll.register(self.up, select.POLLOUT)
        left = None if self.greeted else max(0.0, self.deadline - time.monotonic()) * 1000 + 1
        ready = {fd for fd, _ in poll.poll(left)}
        if not ready and not self.greeted:
            raise Failed(
                "link",
                110,
                said(self.said) or "no shell there said hello in %g s" % self.patience_s,
            )
        if self.wakeup in ready:
            for number in os.read(self.wakeup, 512):
                self.order(number)
        for stream in (self.out, self.err):
            if stream.source in ready and not stream.pending:
                data = os.read(stream.source, PIECE)
                if not data:
                    stream.close()
                elif stream is self.err and not self.greeted:
                    self.greet(data)
                else:
                    self.heard(stream.take(data))

    def rise(self):
        """Send up what can be sent now."""
        try:
            while self.rising or self.source is not None:
                if not self.rising:
                    self.rising = os.read(self.source, PIECE)
                    if not self.rising:
                        self.source = None
                        continue
                self.rising = self.rising[os.write(self.up, self.rising) :]
        except BlockingIOError:
            pass
        except BrokenPipeError:
            self.rising, self.source = b"", None  # ssh says why by its other ends

    # ---- the beginning

    def greet(self, data):
        """Answer sudo, and wait for hello. All other bytes are kept in case hello never comes."""
        self.said = (self.said + data)[-SAID_MAX:]
        if HELLO in self.said:
            self.greeted = True
            rest = self.said[self.said.index(HELLO) + len(HELLO) :]
            self.said = b""
            found = os.fstat(0)
            size = (
                b"%d" % (found.st_size - os.lseek(0, 0, os.SEEK_CUR))
                if stat.S_ISREG(found.st_mode)
                else b"-"
            )
            self.rising = b"%s\n%s\n%s\n" % (self.nonce, size, octal(self.text))
            self.source = None if size == b"-" else 0
            self.heard(self.err.take(rest))
            return
        for prompt in PROMPTS:
            if prompt in self.said:
                self.said = self.said.replace(prompt, b"")
                # sudo asks again: the password was wrong. A third try would be logged as an attack.
                if prompt in self.asked or self.password is None:
                    raise Failed("link", 13, "sudo: incorrect password attempt")
                self.asked.add(prompt)
                self.rising += os.fsencode(self.password) + b"\n"

    def heard(self, marks):
        for mark in marks:
            word, _, rest = mark.partition(b" ")
            if word == b"pid":
                self.pid = rest
                for name in self.orders:
                    self.tell(name)
                self.text = ""
                self.report(b"")
            elif word == b"refused":
                stage, number, words = (rest.decode("utf-8", "surrogateescape") + "  ").split(
                    " ", 2
                )
                raise Failed(stage, int(number), words.strip())
            elif word == b"exit":
                self.status = int(rest)
                if not 0 <= self.status < 256:
                    raise ValueError("an exit status of %d" % self.status)

    # ---- orders

    def order(self, number):
        """Do what a signal to the tether means."""
        number = number - STAND_IN if number > STAND_IN else number
        name = signal.Signals(number).name[3:]
        if self.pid is not None:
            self.tell(name)
        elif self.greeted:
            self.orders.append(name)
        elif name in ("TERM", "KILL", "INT", "QUIT", "HUP"):
            raise Failed("link", 4, "stopped before the host was reached")

    def tell(self, name):
        self.rising += name.encode() + b" " + self.pid + b"\n"

    # ---- the end

    def lost(self):
        """Find out why ssh ended early. Raises Failed if the program was never started."""
        code = self.process.wait()
        if not self.greeted:
            words = said(self.said)
            raise Failed("link", 0, words or "ssh ended with exit %d and no word" % code)

    def leave(self):
        """Let ssh end. Only children that the program left behind hold its streams now."""
        self.process.stdin.close()
        try:
            self.process.wait(LEAVE_S)
        except subprocess.TimeoutExpired:
            try:
                self.process.terminate()
            except PermissionError:
                pass  # it is sudo's, and ends with its ssh


def said(text):
    """Return foreign text as one line, with " | " between its lines."""
    return " | ".join(
        line.strip() for line in text.decode("utf-8", "replace").splitlines() if line.strip()
    )


def leave_with_parent():
    """In the forked child: have ssh end if the tether is killed, so that the host notices."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


class Report:
    """Tells the agent, once, that the program runs (b"") or why it never will."""

    def __init__(self, descriptor):
        self.descriptor = descriptor
        if descriptor is not None:
            os.set_inheritable(descriptor, False)

    def __call__(self, words):
        if self.descriptor is None:
            return
        try:
            os.write(self.descriptor, words[:2048])
        except BrokenPipeError:
            pass  # the keeper is dead; the next one takes the program for started
        os.close(self.descriptor)
        self.descriptor = None


def hear_signals():
    """Have signals come as bytes from the descriptor that is returned.

    The pipe comes before the handlers: a handler without the pipe would swallow a signal.
    """
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs)
    for number in list(REAL) + list(range(STAND_IN + 1, signal.NSIG)):
        try:
            signal.signal(number, lambda *_: None)
        except (OSError, ValueError):
            pass  # the C library keeps some real-time signals for itself
    return ours


def open_standard():
    """Give /dev/null to each of the descriptors 0, 1 and 2 that is closed.

    Else the next file or socket that is opened has that number.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)


def main(words):
    """Run the tether. `words` are flags, then `N`, the N words of ssh, and the program's words.

    The flags are --before TEXT, --patience SECONDS and --merge.
    """
    wakeup = hear_signals()
    before, patience_s, merge = "", 60.0, False
    while words[0].startswith("--"):
        flag = words.pop(0)
        if flag == "--merge":
            merge = True
        elif flag == "--before":
            before = words.pop(0)
        elif flag == "--patience":
            patience_s = float(words.pop(0))
    count = int(words.pop(0))
    ssh, argv = words[:count], words[count:]
    given = {
        name[len(PREFIX) :]: value for name, value in os.environ.items() if name.startswith(PREFIX)
    }
    if "CORRA_SECRETS" in os.environ:
        with open(int(os.environ["CORRA_SECRETS"]), "rb") as pipe:
            pairs = (os.fsdecode(each).partition("=") for each in pipe.read().split(b"\0")[:-1])
            given.update((name, value) for name, _, value in pairs)
    password = given.pop(PASSWORD, None)
    report = Report(int(os.environ["CORRA_REPORT"]) if "CORRA_REPORT" in os.environ else None)
    given["CORRA_PROG_ID"] = os.environ.get("CORRA_PROG_ID", "")
    for name in [name for name in os.environ if name.startswith("CORRA_")]:
        del os.environ[name]
    text = program_text(argv, given, before, merge)
    tied = Tether(ssh, text, password, patience_s, report, wakeup)
    try:
        status = tied.run()
    except Failed as failure:
        report(
            ("%s %d %s" % (failure.stage, failure.number, failure)).encode(
                "utf-8", "surrogateescape"
            )
        )
        tied.leave()
        return None
    if status is not None:
        tied.leave()
    return status


if __name__ == "__main__":
    open_standard()
    code = None
    try:
        code = main(sys.argv[1:])
    except BaseException as error:
        os.write(2, ("corra tether: %r\n" % error).encode("utf-8", "replace"))
    if code is None:
        os.kill(
            os.getpid(), signal.SIGKILL
        )  # the program's exit status is unknown, and none is invented
    os._exit(code or 0)
