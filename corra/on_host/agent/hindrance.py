"""What keeps a run's keeper from its work, and what is due meanwhile.

Readers find it out by themselves, in /proc: a guard that can't work can't say so either.
"""

from .contract import CARRIER_DEADLINE_NS, KILL_DEADLINE_NS
from .processes import process, status_word

# A keeper acts within some ms, and tries every 0.2 s again to write what it couldn't.
LATE_NS = 300 * 10**6


def hindrance(keeper, due):
    """Return the State's `hindered`, None where nothing keeps the keeper from its work.

    `keeper` is its pid, and `due` what `due_work` has found; `by` is the pid that traces it.
    """
    found = process(keeper)
    state = found and found[0]
    why = {"T": "stopped", "t": "traced"}.get(state)
    if due and not why:
        # Asleep with such work to do: it has tried, and what it tried was a write.
        why = {"D": "kernel", "S": "room" if due in ("end", "output") else None}.get(state)
    if not why:
        return None
    return {
        "why": why,
        "due": due,
        "pid": keeper,
        "by": (int(status_word(keeper, "TracerPid")) or None) if why == "traced" else None,
    }


def due_work(request, facts):
    """Return what the keeper should have done by now: end, output, timeout, kill; or None."""
    record, launched, now = facts["record"], facts["launched"], facts["mono_ns"]
    if record is None or launched is None or launched[2] != facts["boot_id"]:
        return None
    if record.outcome:
        short = any(size < record.lengths.get(name, size) for name, size in facts["sizes"].items())
        late = now > launched[4] + record.outcome[2] + LATE_NS
        return "output" if short and late else None
    program = process(launched[0])
    if program and program[2] == launched[1] and program[0] == "Z":
        return "end"
    if record.stop:
        allowed = KILL_DEADLINE_NS + CARRIER_DEADLINE_NS if record.stop[3] == "killing" else LATE_NS
        late = record.stop[3] != "done" and now > record.stop[2] + allowed
        return "kill" if late else None
    timeout = (request.get("run") or {}).get("timeout")
    late = timeout and now > launched[4] + int(timeout * 1e9) + LATE_NS
    return "timeout" if late else None
