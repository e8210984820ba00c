"""The program as its parent sees it: a process to signal, to look at and to reap."""

import _signal
import posix as os

from ..contract import SIGNAL_NAMES, SIGNALS
from ..processes import ended, oom_kills, process_tree, signal_process

STAND_IN = 33  # what is added to a signal that a carrier is to pass on: 1 to 31 become the real-time signals 34 to 64


class Child:
    """The program. Until it is reaped its pid can't come to mean another process."""

    def __init__(self, slot, carrier):
        self.slot, self.carrier = slot, carrier
        self.pid = None
        self.status = None  # raw, once it has ended
        self.reaped = False

    @property
    def over(self):
        return self.status is not None or self.reaped

    def peek(self):
        """Return the program's raw status, or None where no end of it is known; it isn't reaped by this."""
        if self.status is None and self.pid and not self.reaped:
            self.status = ended(self.pid)
        return self.status

    def descendants(self):
        """Return the program's living descendants; the courier is ours, and no signal to them is for it."""
        return process_tree([os.getpid()], [self.slot.record.courier])

    def send(self, name, number, by):
        """Signal the program's group; after its end, whatever of its descendants lives on."""
        if self.status is None:
            self.to_group(SIGNALS[name])
        else:
            for pid, found in self.descendants().items():
                signal_process(pid, found[2], SIGNALS[name])
        self.slot.log(name, number, "group" if self.status is None else "tree", by)

    def to_group(self, number):
        if self.reaped:
            return  # from then on the pid and the group can come to mean somebody else
        number += STAND_IN if self.carrier and number <= _signal.SIGSYS else 0
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            # Between fork and setsid the group is still ours.
            signal_process(self.pid, 0, number)

    def relay(self):
        """SIGTERM to the keeper is SIGTERM to the program."""
        if self.status is None and self.pid:
            signal_process(self.pid, 0, _signal.SIGTERM)  # not reaped, so it is nobody else
            self.slot.log("TERM", "-", "program", "SIGTERM to the agent")

    def reason(self):
        """Return the State's reason for the program's end."""
        record, number = self.slot.record, self.status & 0x7F
        if record.stop:
            return record.stop[1]
        if not number:
            return "exited"
        name = SIGNAL_NAMES.get(number)
        told = any(each[1] == name for each in record.sent)
        if number == _signal.SIGKILL and not told and oom_kills() > record.ooms:
            return "oom"
        return "killed" if told else "signaled"

    def reap(self):
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass
