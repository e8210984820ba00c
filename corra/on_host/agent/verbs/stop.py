"""The verb stop, by the keeper's order or, without a keeper that answers, directly."""

import _signal
import errno
import posix as os
import time

from ..contract import FINAL, GRACE_S, KILL_DEADLINE_NS, ORDER_DEADLINE_S
from ..guards.decide import kill_deadline_ns
from ..paths import slurp
from ..processes import process, process_tree, signal_process
from ..records import Record
from ..run import living_guards
from .finding import find
from .orders import by_of, checked_signal, ordered, signal_directly, target, wake_guards
from .starter import give_up


def family(run):
    """Return {pid: (state, parent, start, name)} of the program's living tree, as far as known."""
    pages = run.pages()
    record = (Record.read(pages[0]) if pages else None) or Record()
    guards = living_guards(record) if run.alive() else []
    found = target(run)
    below = process_tree(guards + ([found[0]] if found else []), [record.courier])
    if found:
        below[found[0]] = process(found[0]) or ("?", 0, found[1], "?")
    return {pid: each for pid, each in below.items() if pid not in guards}


def verb_stop(request, stdin, reply, framed):
    checked_signal(request, "TERM")
    run = find(request)
    options = run.request.get("run") or {}
    name = checked_signal(request, options.get("stop_signal") or "TERM")
    grace = next(
        each for each in (request.get("grace"), options.get("grace"), GRACE_S) if each is not None
    )
    wake_guards(run)
    before = run.state()
    if before["state"] == "starting" and before["supervisor"] == "gone":
        give_up(run, OSError(errno.ECANCELED, ""), "it was stopped before it was started")
    there = family(run)
    number, how = os.urandom(4).hex(), "ended"
    if there:
        ok = ordered(
            run, number, "%s stop %s %d %s" % (number, name, int(grace * 1000), by_of(request))
        )
        how = "keeper" if ok else "direct"
    reply.send(
        {
            "state": run.state(sure=True),
            "how": how,
            "processes": len(there),
            "signal": name,
            "grace": grace,
        }
    )
    if how == "keeper":
        await_stop(run, grace)
    elif how == "direct":
        stop_directly(run, name, grace)
    left = family(run)
    survivors = [
        {"pid": pid, "name": found[3], "state": found[0], "wchan": wchan(pid)}
        for pid, found in sorted(left.items())
    ]
    reply.frame({"state": run.state(sure=True), "ended": not left, "survivors": survivors})


def wchan(pid):
    try:
        return slurp("/proc/%d/wchan" % pid).decode("ascii", "replace").strip("0") or None
    except OSError:
        return None


def await_stop(run, grace):
    """Wait until the record says that the stop is over, the keeper has gone, or time is up."""
    allowed_s = kill_deadline_ns(run.request.get("run") or {}) / 1e9
    deadline, pause = time.monotonic() + grace + allowed_s + ORDER_DEADLINE_S, 0.001
    while time.monotonic() < deadline and run.alive():
        pages = run.pages()
        record = Record.read(pages[0]) if pages else None
        if record and record.stop and record.stop[3] == "done":
            break
        time.sleep(pause)
        pause = min(pause * 1.5, 0.05)
    # The record of the end follows the last process within a moment.
    ending = time.monotonic() + 1
    while (
        run.state()["state"] not in FINAL
        and target(run) is None
        and run.alive()
        and time.monotonic() < ending
    ):
        time.sleep(0.005)


def stop_directly(run, name, grace):
    """Stop the program in place of a keeper that is stopped, stuck or gone."""
    if grace > 0:
        signal_directly(run, name)
    deadline = time.monotonic() + grace
    while family(run) and time.monotonic() < deadline:
        time.sleep(0.02)
    deadline = time.monotonic() + KILL_DEADLINE_NS / 1e9
    while time.monotonic() < deadline:
        left = family(run)
        if not left:
            return
        for pid, found in left.items():
            signal_process(pid, found[2], _signal.SIGSTOP)
        for pid, found in family(run).items():
            signal_process(pid, found[2], _signal.SIGKILL)
        time.sleep(0.02)
