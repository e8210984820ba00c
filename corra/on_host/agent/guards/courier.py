"""The courier's process, which the keeper starts, and starts again when it dies."""

import _signal
import posix as os
import sys

from ..kernel import mono_ns, now_ns

COURIER_S = 86400
RESTING_NS = 10**10  # a courier that lived for longer has no defect that comes back at once


class Couriers:
    """The couriers of a run, of which one lives at a time."""

    def __init__(self, slot, files, request):
        self.slot, self.files, self.request = slot, files, request
        self.at = None  # when to start the next one
        self.born = self.deaths = 0

    def start(self, now):
        """Start a courier in a fresh interpreter, which anything may kill.

        It gets two files of code and none of the guards' locks.
        """
        self.at, self.born = None, now
        script, agent = self.files["courier"], self.files["agent"]
        try:
            child = os.fork()
        except OSError:
            self.at = now + RESTING_NS
            return
        if not child:
            try:
                os.setsid()
                for number in range(1, _signal.NSIG):
                    try:
                        _signal.signal(number, _signal.SIG_DFL)
                    except (OSError, ValueError):
                        pass
                os.set_inheritable(script, True)
                os.set_inheritable(agent, True)
                words = [
                    "-ISE",
                    "/proc/self/fd/%d" % script,
                    self.request["path"],
                    "/proc/self/fd/%d" % agent,
                ]
                os.execv(sys.executable, [sys.executable] + words)
            finally:
                os._exit(1)
        self.slot.record.courier, self.slot.dirty = child, True

    def left(self, status):
        """Note a courier's end, and when the next one starts if it died."""
        record, now = self.slot.record, mono_ns()
        record.courier, self.slot.dirty = 0, True
        if not status:
            return
        config = self.request.get("config") or {}
        over_ns = record.outcome and record.outcome[1] + int(
            ((config.get("timeout") or COURIER_S) + COURIER_S) * 1e9
        )
        if over_ns and now_ns() > over_ns:
            return  # too late even to report that it gave up
        self.deaths = 1 if now - self.born > RESTING_NS else self.deaths + 1
        # A courier may be killed often. A defect of its own would come back at once.
        most = 10**9 if status & 0x7F else 60 * 10**9
        self.at = now + min(10**8 << min(self.deaths - 1, 12), most)
