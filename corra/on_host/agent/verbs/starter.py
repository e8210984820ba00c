"""The start of the guards and of other programs."""

import _signal
import errno
import marshal
import posix as os
import select
import sys
import time

from ..contract import PAGE, START_DEADLINE_S
from ..files import exists
from ..guards.guards import guard, lock_run
from ..guards.program import candidates, note_failure, own_environment
from ..paths import CODE, octets, slurp
from ..records import unpack

# This part is the first in verbs/, so all that verbs/ defines is below this line of the made file.
GUARDS_END = sys._getframe().f_lineno
# More than a process has that got the made file from its .pyc, less than one that compiled it.
FORK_KB = 5000


def thin(code):
    """Return the made file's code without verbs/; guards hold their code in memory for weeks."""
    if not hasattr(code, "replace"):  # Python 3.7
        return code
    nothing = (lambda: None).__code__
    below = lambda each: hasattr(each, "co_code") and each.co_firstlineno > GUARDS_END  # noqa: E731
    return code.replace(
        co_consts=tuple(nothing if below(each) else each for each in code.co_consts)
    )


def spawn_guards(request, path):
    """Start the guards of the run at `path`; return when the launch is over or has failed.

    Raises OSError where the first guard's process can't be made.

    They are forked from this process where it is small, as each guard keeps its memory for weeks.
    A process that has compiled the made file or read a large request is too large. Then, and where
    the guards belong elsewhere (`before`), a fresh interpreter gets the made file's code over a
    pipe: no file has to be found or trusted, and an upgrade in the middle changes nothing.
    """
    request = dict(request, path=path)
    fresh = request["before"] or resident_kb() > FORK_KB
    report, reporting = os.pipe()
    ours, theirs = os.pipe() if fresh else (None, None)
    child = os.fork()
    if not child:
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) not in (ours, reporting):
                    try:
                        os.close(int(name))
                    except OSError:
                        pass
            os.chdir("/")
            if not fresh:
                guard(request, reporting)
            os.set_inheritable(ours, True)
            os.set_inheritable(reporting, True)
            script = (
                # Read as a whole: marshal.load reads a file in small pieces, which takes 5 ms
                # longer.
                "import marshal,sys;h=open(int(sys.argv[1]),'rb');"
                "c,r=marshal.loads(h.read());h.close();n={'__name__':'corra_agent'};"
                "exec(c,n);del c,h;n['guard'](r,int(sys.argv[2]))"
            )
            argv = request["before"] + [
                sys.executable,
                "-ISE",
                "-c",
                script,
                str(ours),
                str(reporting),
            ]
            variables = own_environment()
            if request["before"]:
                # sudo removes this variable.
                variables.setdefault(b"XDG_RUNTIME_DIR", b"/run/user/%d" % os.geteuid())
            execute(argv, variables)
        except OSError as error:
            os.write(reporting, b"%d" % (error.errno or 0))
        finally:
            os._exit(1)
    os.close(reporting)
    os.waitpid(child, 0)
    if fresh:
        os.close(ours)
        try:
            with open(theirs, "wb", 0) as pipe:
                data = marshal.dumps((thin(CODE), request))
                while data:
                    data = data[pipe.write(data) :]
        except BrokenPipeError:
            pass
    poll = select.poll()
    poll.register(report, select.POLLIN)
    said = os.read(report, 16) if poll.poll(START_DEADLINE_S * 1000) else b""
    os.close(report)
    if said:
        raise OSError(int(said), os.strerror(int(said)))


def give_up(run, error, message):
    """Note that the run was not started and never will be, unless a guard has launched it."""
    alive = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=run.directory)
    slot = os.open("exit", os.O_RDWR | os.O_NOFOLLOW, dir_fd=run.directory)
    try:
        # As a guard does it: whoever has this lock is alone in deciding what becomes of the run.
        if (
            lock_run(alive)
            and not exists(run.directory, "launched")
            and unpack(os.pread(slot, PAGE, PAGE)) is None
        ):
            note_failure(slot, "setup", error, message)
    finally:
        os.close(slot)
        os.close(alive)


def resident_kb():
    """Return how much memory this process shares with no file, in kB."""
    _, resident, shared = slurp("/proc/self/statm").split()[:3]
    return (int(resident) - int(shared)) * 4096 // 1024


def execute(words, variables):
    """Become another program, found by PATH. Raises the OSError of the last try."""
    worst = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), words[0])
    for path in candidates(words, variables):
        try:
            os.execve(path, [octets(word) for word in words], variables)
        except OSError as error:
            worst = error
    raise worst


def answer_of(words, text, patience_s):
    """Return what a process prints that reads `text`; b"" where it fails or takes too long.

    The subprocess module and its imports would be the largest part of a start.
    """
    asks, ours = os.pipe()
    theirs, answers = os.pipe()
    child = os.fork()
    if not child:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for target, fd in enumerate((asks, answers, null)):
                os.dup2(fd, target)
            execute(words, own_environment())
        finally:
            os._exit(127)
    os.close(asks)
    os.close(answers)
    try:
        with open(ours, "wb", 0) as pipe:
            pipe.write(text.encode())
    except BrokenPipeError:
        pass
    poll, said = select.poll(), []
    deadline = None if patience_s is None else time.monotonic() + patience_s
    poll.register(theirs, select.POLLIN)
    while poll.poll(deadline and max(0, deadline - time.monotonic()) * 1000):
        data = os.read(theirs, 65536)
        if not data:
            break
        said.append(data)
    else:
        os.kill(child, _signal.SIGKILL)
        said = []
    os.close(theirs)
    return b"".join(said) if os.waitpid(child, 0)[1] == 0 else b""
