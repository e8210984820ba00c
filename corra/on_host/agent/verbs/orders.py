"""Orders to the keeper; the verb signal, which does without a keeper that doesn't answer."""

import posix as os
import time

from ..contract import ORDER_DEADLINE_S, SIGNALS, Refusal
from ..files import read_file
from ..kernel import mono_ns
from ..processes import boot_id, process, signal_process
from ..records import Record
from ..spool import read_launched
from .finding import find


def by_of(request):
    """Return the sender of the request, as one printable word."""
    return "".join(char if "!" <= char <= "~" else "_" for char in request.get("by") or "somebody")[
        :64
    ]


def give_order(run, text):
    """Write one line into the keeper's FIFO; return whether a guard holds its other end."""
    try:
        fd = os.open("control", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=run.directory)
    except OSError:
        return False  # ENXIO: no guard is left; ENOENT: the spool was deleted
    try:
        os.write(fd, text.encode("ascii") + b"\n")
        return True
    except BlockingIOError:
        return False  # the FIFO is full: the keeper has been stopped for long
    finally:
        os.close(fd)


def wake_guards(run):
    """Let guards go on that a signal has stopped: a guard does that for the one below it alone."""
    pages = run.pages()
    for pid, start in ((pages and Record.read(pages[0])) or Record()).guards:
        found = process(pid)
        if found and found[0] == "T" and found[2] == start:
            signal_process(pid, start, SIGNALS["CONT"])


def signal_order(number, name, request):
    """Return the order for one signal.

    It lapses before the verb would signal the program itself, so that a keeper that wakes up late
    doesn't send the signal again.
    """
    lapses = mono_ns() + int(ORDER_DEADLINE_S * 0.9e9)
    return "%s signal %s %s %d" % (number, name, by_of(request), lapses)


def ordered(run, number, text):
    """Give an order; return whether the keeper has carried it out within ORDER_DEADLINE_S."""
    if not give_order(run, text):
        return False
    deadline, pause = time.monotonic() + ORDER_DEADLINE_S, 0.001
    while time.monotonic() < deadline:
        pages = run.pages()
        record = Record.read(pages[0]) if pages else None
        if record and any(each[2] == number for each in record.sent):
            return True
        if not run.alive():
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    return False


def target(run):
    """Return (pid, start) of the program if it still runs, else None."""
    launched = read_launched(read_file(run.directory, "launched"))
    if launched is None or launched[2] != boot_id():
        return None
    found = process(launched[0])
    return launched[:2] if found and found[2] == launched[1] and found[0] not in "ZX" else None


def signal_directly(run, name):
    """Signal the program without its keeper; return whether the program was there."""
    found = target(run)
    return bool(found) and signal_process(found[0], found[1], SIGNALS[name])


def checked_signal(request, default):
    name = (request.get("signal") or default).upper()
    name = name[3:] if name.startswith("SIG") else name
    name = {str(number): each for each, number in SIGNALS.items()}.get(name, name)
    if name not in SIGNALS:
        raise Refusal("bad_request", "no such signal: %s" % request["signal"])
    return name


def verb_signal(request, stdin, reply, framed):
    name = checked_signal(request, "TERM")
    run = find(request)
    wake_guards(run)
    state, how = run.state(), "ended"
    if state["state"] == "running" or target(run):
        number = os.urandom(4).hex()
        if ordered(run, number, signal_order(number, name, request)):
            how = "keeper"
        elif signal_directly(run, name):
            how = "direct"
    reply.send({"state": run.state(), "how": how})
