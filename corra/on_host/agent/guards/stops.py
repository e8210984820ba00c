"""Stops: the signal that asks the program to end, its grace, and KILL for what is left after that."""

import _signal
import posix as os

from ..contract import AFTER_GRACE, CARRIER_DEADLINE_NS
from ..kernel import mono_ns
from ..processes import kill_tree

KILL_AGAIN_NS = 50 * 10**6


class Stops:
    """The stop that is going on, if there is one. It stands in the record, so that the next keeper goes on with it."""

    def __init__(self, slot, child):
        self.slot, self.child = slot, child
        self.again_at = 0  # when to KILL what is still there once more

    def begin(self, number, reason, name, grace_s, by):
        """Ask the program's group to end, and remember when to stop asking."""
        record = self.slot.record
        kill_at = mono_ns() + int(grace_s * 1e9)
        pending = record.stop if record.stop and record.stop[3] != "done" else None
        if pending:
            kill_at = min(kill_at, pending[2])
        record.stop = [number, pending[1] if pending else reason, kill_at, "grace"]
        record.survivors = []
        if grace_s > 0:
            self.child.send(name, number, by)
            if self.child.status is None:
                self.child.to_group(_signal.SIGCONT)
        else:
            self.slot.log("KILL", number, "tree", by)
        self.slot.save()

    def kill(self, now):
        """KILL the whole tree. A carrier is asked first: the program is on the other machine."""
        record, child = self.slot.record, self.child
        if record.stop[3] == "grace":
            if record.sent[-1:] and record.sent[-1][2:4] != (record.stop[0], "tree"):
                self.slot.log("KILL", record.stop[0], "tree", AFTER_GRACE)
            record.stop[2:] = [now, "killing"]
            self.slot.dirty = True
            if child.carrier and child.status is None:
                child.to_group(_signal.SIGKILL)
        waited = now > record.stop[2] + CARRIER_DEADLINE_NS
        if not child.carrier or child.status is not None or waited:
            kill_tree([os.getpid()], [record.courier])
        self.again_at = now + KILL_AGAIN_NS
        self.slot.save()

    def end(self):
        """The stop is over; what is left of the tree is the record's survivors."""
        record = self.slot.record
        record.stop[3] = "done"
        record.survivors = [(pid, found[2]) for pid, found in self.child.descendants().items()]
        self.slot.save()
