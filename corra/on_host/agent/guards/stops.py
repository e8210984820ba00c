"""A stop: the signal that asks the program to end, its grace, then KILL for what is left."""

import _signal
import posix as os

from ..contract import AFTER_GRACE, CARRIER_DEADLINE_NS
from ..kernel import mono_ns
from ..processes import kill_tree

KILL_AGAIN_NS = 50 * 10**6


class Stops:
    """The stop in progress, if any. The record has it, so that the next keeper goes on."""

    def __init__(self, slot, child):
        self.slot, self.child = slot, child
        self.again_at = 0  # when to send the next KILL

    def begin(self, number, reason, name, grace_s, by):
        """Signal the program's group, and set the time of the KILL."""
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
        """KILL the whole tree. A carrier first gets time to kill its program elsewhere."""
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
        """End the stop; what is left of the tree becomes the record's survivors."""
        record = self.slot.record
        record.stop[3] = "done"
        record.survivors = [(pid, found[2]) for pid, found in self.child.descendants().items()]
        self.slot.save()
