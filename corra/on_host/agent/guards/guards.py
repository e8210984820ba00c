"""The guards of one run: two standbys and the keeper."""

import _signal
import fcntl
import gc
import posix as os
import time

from ..contract import PAGE, SIGNALS, START_DEADLINE_S, VERSION
from ..files import exists, read_file
from ..kernel import give_back, prctl
from ..paths import beside
from ..processes import ENDS, become, fork_thin
from ..records import unpack
from ..spool import abandoned, launched_by, stream_names, takes_more
from .keeper import Keeper
from .program import note_failure, own_environment
from .stdin import all_moved
from .terminal import open_terminal

# How many descriptors a guard, or the program before its exec, opens beyond those that all guards
# hold: two pipes, the program's ends, a walk over /proc.
SPARE_FILES = 12
# How often a guard replaces one that dies before it has launched the program, and its first pause,
# which doubles: 1.3 s in all.
REPLACED_MOST = 7
REPLACE_PAUSE_S = 0.02


def standby(child):
    """Wait for the guard below this one; return when it died unfinished.

    A guard that a signal has stopped goes on at once. It can't ignore SIGSTOP, and nobody needs it
    stopped: it would keep no time, obey no order, move no output and record no end.
    """
    while True:
        info = os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED)
        if info.si_code in ENDS:
            break
        os.kill(child, _signal.SIGCONT)  # its pid is its own: it hasn't been waited for
    if info.si_code == 1 and info.si_status == 0:
        os._exit(0)


def letting_go(files):
    """Return a standby's handler of SIGURG, by which the keeper says that all of stdin was moved.

    The standby then closes its end, if that is true.
    """

    def let_go(number, frame):
        # A handler may interrupt itself: the one that takes the end out of the table closes it.
        held = files.pop("fifo/stdin", None) if all_moved(files) else None
        if held is not None:
            os.close(held)

    return let_go


def ignore_signals():
    """Ignore every signal but KILL, STOP, TERM and those that mean a defect of the guard itself.

    CHLD stays at its default, else no guard could wait for a child.
    """
    kept = {
        SIGNALS[name]
        for name in (
            "KILL",
            "STOP",
            "TERM",
            "CHLD",
            "CONT",
            "SEGV",
            "BUS",
            "FPE",
            "ILL",
            "ABRT",
            "TRAP",
            "SYS",
        )
    }
    for number in set(range(1, _signal.NSIG)) - kept:
        try:
            _signal.signal(number, _signal.SIG_IGN)
        except (OSError, ValueError):
            pass  # the C library keeps two real-time signals for itself


def lock_run(directory):
    """Take the lock that shows a guarded run; return whether this guard got it.

    A prober holds the lock for a moment only, so it is tried again.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if exists(directory, "launched") or time.monotonic() > deadline:
                return False
        time.sleep(0.002)


def guard(request, report):
    """Guard one run: fork twice, and keep the run as the innermost guard. Never returns."""
    try:
        guard_run(request, report)
        os._exit(0)
    except BaseException as error:
        complain(error)
        os._exit(1)


class Complaints:
    """The descriptors for defects of ours: stderr, then the keeper file.

    `slot` is the file `exit` as long as the only guard may say that nothing was started.
    """

    file, slot = 2, -1


def complain(error):
    """Write a defect of a guard into the file `keeper`, for whoever looks for it."""
    where, at = [], error.__traceback__
    while at:
        where.append("%s:%d" % (at.tb_frame.f_code.co_name, at.tb_lineno))
        at = at.tb_next
    try:
        os.write(
            Complaints.file,
            ("agent %s: %r at %s\n" % (VERSION, error, " < ".join(reversed(where)))).encode(
                "utf-8", "replace"
            ),
        )
    except OSError:
        pass
    if Complaints.slot >= 0:
        words = getattr(error, "strerror", None) or repr(error)
        note_failure(Complaints.slot, "setup", error, "its guards can't work here: " + words)


def replace_guard(directory, files, number):
    """Pause before the next guard is forked in place of one that has died; return whether to.

    It isn't where the program was launched, or where too many guards died before that: then the
    slot says so. No process that they forked can be about to launch it: it would hold the lock of
    the file `keeper`, which this guard holds.
    """
    if launched_by(directory, files) or unpack(os.pread(files["exit"], PAGE, PAGE)) is not None:
        return False
    if number < REPLACED_MOST:
        time.sleep(REPLACE_PAUSE_S * 2 ** (number - 1))
        return True
    said = os.pread(files["keeper"], PAGE, 0).decode("utf-8", "replace").splitlines()[-1:]
    message = "; ".join(["%d guards died before they started it" % number] + said)
    note_failure(files["exit"], "setup", ChildProcessError(), message)
    return False


def guard_run(request, report):
    os.set_inheritable(report, False)
    # All guards block SIGTERM: one that comes before the launch is seen then. Only the keeper takes
    # it after that.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGTERM})
    become(b"corra-standby")
    ignore_signals()
    inherited = own_environment()
    directory = os.open(request["path"], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    # Opened anew for a lock of its own: descriptors that a fork shares also share the lock.
    alive = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    if (
        not lock_run(alive)
        or exists(directory, "launched")
        or abandoned(directory)
        or unpack(read_file(directory, "exit")[PAGE:]) is not None
    ):
        return
    files = {"exit": os.open("exit", os.O_RDWR, dir_fd=directory)}
    Complaints.slot = files["exit"]
    Complaints.file = os.open("keeper", os.O_WRONLY | os.O_APPEND, dir_fd=directory)
    files["keeper"] = os.open("keeper", os.O_RDWR, dir_fd=directory)
    fcntl.flock(files["keeper"], fcntl.LOCK_EX)
    for name in ["index"] + ["heads"] * exists(directory, "heads"):
        files[name] = os.open(name, os.O_RDWR, dir_fd=directory)
    files["launched"] = os.open("launched.tmp", os.O_RDWR, dir_fd=directory)
    # O_RDWR: with a writer of its own it never reports a hang-up, and orders wait in it for the
    # next keeper.
    files["control"] = os.open("control", os.O_RDWR | os.O_NONBLOCK, dir_fd=directory)
    for name in stream_names(request):
        files[name] = os.open(name, os.O_WRONLY, dir_fd=directory)
    if takes_more(request):
        files["stdin"] = os.open("stdin", os.O_RDONLY, dir_fd=directory)
        files["senders"] = os.open("senders", os.O_RDWR, dir_fd=directory)
        if request["program"].get("pty"):
            try:
                open_terminal(request, files)
            except OSError as error:
                note_failure(
                    files["exit"],
                    "setup",
                    error,
                    "no terminal could be opened for the program: " + error.strerror,
                )
                return
        else:
            os.chmod("fifo/stdin", 0o600, dir_fd=directory)
            reader = os.open("fifo/stdin", os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)
            files["fifo/stdin"] = os.open(
                "fifo/stdin", os.O_WRONLY | os.O_NONBLOCK, dir_fd=directory
            )
            os.close(
                reader
            )  # the program is the only reader, so that the keeper sees it close its end
            # The program may have become another user's when it opens its stdin anew.
            os.chmod("fifo/stdin", 0o644, dir_fd=directory)
            _signal.signal(_signal.SIGURG, letting_go(files))
    for name in stream_names(request) if not request["program"].get("pty") else ():
        # Guards of an earlier start may have died after they took the right to read away.
        os.chmod("fifo/" + name, 0o600, dir_fd=directory)
        # Not blocking: nobody writes yet. A guard never holds a writing end, else the end would
        # never come.
        files["fifo/" + name] = os.open(
            "fifo/" + name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory
        )
        os.chmod("fifo/" + name, 0o222, dir_fd=directory)
    if request.get("callback"):
        # Open as long as the run is kept, since gc or an upgrade may remove the files.
        for name in ("courier", "agent"):
            files[name] = os.open(beside(name + ".py"), os.O_RDONLY)
    for spare in [os.dup(directory) for _ in range(SPARE_FILES)]:
        os.close(spare)
    keeper, pids, launches = Keeper(directory, files, request, inherited), [os.getpid()], True
    replaced = 0
    give_back()
    # As little as possible from here to the keeper: a page that a guard writes to is its own from
    # then on. What exists now never becomes garbage; frozen, the garbage collector doesn't write
    # into it.
    if hasattr(gc, "freeze"):  # Python 3.7
        gc.freeze()
    Complaints.slot = -1
    while len(pids) < 3:
        try:
            child = fork_thin()
        except OSError:
            break  # no process can be made: there are fewer guards, and the State counts them
        if not child:
            prctl(36, 1, 0, 0, 0)
            pids.append(os.getpid())
            replaced = 0
            continue
        os.close(files["keeper"])
        if report is not None:
            os.close(report)
            report = None
        standby(child)
        # flock waits until the guard that may touch the FIFOs is dead and its child is past exec.
        files["keeper"] = os.open("/proc/self/fd/%d" % Complaints.file, os.O_RDWR)
        fcntl.flock(files["keeper"], fcntl.LOCK_EX)
        keeper, replaced = Keeper(directory, files, request, inherited), replaced + 1
        launches = replace_guard(directory, files, replaced)
        if not launches:
            break
        # Nothing was launched, so there are three guards again for the program.
    become(b"corra-keeper")
    _signal.signal(_signal.SIGURG, _signal.SIG_IGN)
    keeper.run(pids, report, launches)
