"""The program as its parent sees it: a process to signal, to look at and to reap."""

import _signal
import posix as os

from ..contract import SIGNAL_NAMES, SIGNALS
from ..processes import ended, oom_kills, process_tree, signal_process

# Added to a signal for a carrier to pass on: 1 to 31 become the real-time signals 34 to 64.
STAND_IN = 33


class Child:
    """The program. Until it is reaped its pid can't come to mean another process."""

    def __init__(self, slot, carrier):
        self.slot, self.carrier = slot, carrier
        self.pid = None
        self.status = None  # the raw wait status, after its end
        self.reaped = False

    @property
    def over(self):
        return self.status is not None or self.reaped

    def peek(self):
        """Return the program's raw wait status, or None where no end is known; reap nothing."""
        if self.status is None and self.pid and not self.reaped:
            self.status = ended(self.pid)
        return self.status

    def descendants(self):
        """Return the program's living descendants, without the courier."""
        return process_tree([os.getpid()], [self.slot.record.courier])

    def send(self, name, number, by):
        """Signal the program's group; after the program's end, its descendants."""
        if self.peek() is None:
            self.to_group(SIGNALS[name])
        else:
            for pid, found in self.descendants().items():
                signal_process(pid, found[2], SIGNALS[name])
        self.slot.log(name, number, "group" if self.status is None else "tree", by)

    def to_group(self, number):
        if self.reaped:
            return  # the pid and the group may mean other processes by now
        number += STAND_IN if self.carrier and number <= _signal.SIGSYS else 0
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            # Between fork and setsid the program is still in the keeper's group.
            signal_process(self.pid, 0, number)

    def relay(self):
        """Pass a SIGTERM to the keeper on to the program."""
        if self.pid and not self.reaped and self.peek() is None:
            signal_process(self.pid, 0, _signal.SIGTERM)  # not reaped, so the pid is its own
            self.slot.log("TERM", "-", "program", "SIGTERM to the agent")

    def reason(self):
        """Return the reason of the program's end, for the State."""
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
