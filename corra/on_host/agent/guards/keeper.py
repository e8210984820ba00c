"""The keeper: the program's parent, and the loop that keeps a run."""

import _signal
import errno
import posix as os
import select
import time

from ..contract import GRACE_S, PAGE, SIGNALS
from ..files import exists
from ..kernel import mono_ns, now_ns
from ..processes import ended, peek_end, process, signal_process, usage
from ..spool import read_launched
from .child import Child
from .courier import Couriers
from .decide import kill_deadline_ns, step
from .output import Pump
from .program import become_program, note_failure
from .slot import Slot
from .stdin import Intake
from .stops import Stops
from .terminal import Terminal

RECORD_AGAIN_NS = 200 * 10**6


class Keeper:
    """The program's parent: moves its output, obeys orders, keeps time, records the end."""

    def __init__(self, directory, files, request, inherited):
        self.directory, self.files, self.request = directory, files, request
        self.inherited = inherited
        self.options = request.get("run") or {}
        self.poll = select.poll()
        self.pump = Pump(files, request, self.poll)
        self.slot = Slot(directory, files, request, self.pump.streams)
        self.child = Child(self.slot, bool(self.options.get("carrier")))
        self.stops = Stops(self.slot, self.child)
        self.couriers = Couriers(self.slot, files, request) if "courier" in files else None
        self.intake = None
        if "senders" in files:
            self.intake = Intake(
                directory, files, self.poll, self.options.get("forget_stdin") or "terminal" in files
            )
        self.ended_stdin = False
        self.terminal = Terminal(files, self.pump, self.poll) if "terminal" in files else None
        self.report = None  # closed when the launch is over
        self.pipe = None  # closes at the program's exec
        self.timeout_at = None
        self.retry_at = 0  # when to try again to record the end
        self.told = False  # state.json has the end
        self.end_known = True

    def take_over(self):
        """Become the program's parent after another keeper's death."""
        # A SIGTERM that came to a standby meant nothing; to ignore it is to discard it.
        _signal.signal(_signal.SIGTERM, _signal.SIG_IGN)
        _signal.signal(_signal.SIGTERM, _nothing)
        _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGTERM})
        launched, child, record = self.slot.launched(), self.child, self.slot.record
        if launched is None:
            self.nothing_to_keep()  # the slot says why
            return
        child.pid = launched[0]
        record.phase = "live" if record.phase == "carrying" else record.phase
        self.set_timeout(launched)
        if self.couriers and (process(record.courier) or "Z")[0] in "ZX":
            self.couriers.at = 0
        while True:
            try:
                child.status = ended(child.pid)
                return
            except ChildProcessError:
                # The lock falls before the children are handed over. A program that still lives
                # becomes this keeper's child in a moment.
                found = process(child.pid)
                if found is None or found[2] != launched[1]:
                    child.reaped = True
                    if record.outcome is None:
                        self.nothing_to_keep()  # no guard left a status: readers will say lost
                    return
                time.sleep(0.001)

    def launch(self):
        """Fork the program. The pipe closes at its exec or its death, which wakes the keeper.

        A carrier keeps the pipe open until the program runs on the other machine. The forked child
        also writes the first record: to make one takes 280 kB, which the keeper would hold for
        weeks.
        """
        slot = self.slot
        slot.record.phase = "carrying" if self.child.carrier else "live"
        self.pipe, theirs = os.pipe()
        saved, saving = os.pipe()
        _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGTERM, _signal.SIGCHLD})
        try:
            self.child.pid = os.fork()
            if not self.child.pid:
                save = lambda: (slot.save(), os.close(saving))  # noqa: E731
                become_program(
                    self.directory,
                    self.files,
                    self.request,
                    self.inherited,
                    slot.pids,
                    theirs,
                    save,
                    slot.tell,
                )
        except OSError as error:
            note_failure(
                self.files["exit"],
                "setup",
                error,
                "no process could be forked for the program: " + error.strerror,
            )
            self.nothing_to_keep()
        finally:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGTERM, _signal.SIGCHLD})
        os.close(theirs)
        os.close(saving)
        os.read(saved, 1)  # the pipe's end: from here on the keeper's record is the newer one
        os.close(saved)
        slot.dirty = not self.child.pid
        self.poll.register(self.pipe, select.POLLIN)

    def set_timeout(self, launched):
        if self.options.get("timeout"):
            self.timeout_at = launched[4] + int(self.options["timeout"] * 1e9)

    def launch_over(self):
        """Note that exec was done or refused, and let the starter look."""
        said = os.read(self.pipe, PAGE).decode("utf-8", "surrogateescape").split(" ", 2)
        if len(said) == 3 and said[1].isdigit():
            note_failure(self.files["exit"], said[0], OSError(int(said[1]), said[2]), said[2])
        self.slot.record.phase = "live"
        self.poll.unregister(self.pipe)
        os.close(self.pipe)
        self.pipe = None
        launched = (
            read_launched(os.pread(self.files["launched"], 256, 0))
            if self.options.get("timeout")
            else None
        )
        if launched:
            self.set_timeout(launched)
        # Else the child died before its claim, and the next start needs the file.
        if exists(self.directory, "launched"):
            try:
                os.unlink("launched.tmp", dir_fd=self.directory)
            except OSError:
                pass
        # The program runs, so the keeper needs its secrets and environment no more.
        self.inherited = {}
        self.request["secret_env"] = {}
        if self.couriers:
            self.couriers.at = 0
        if self.child.carrier:
            self.slot.save()
            self.slot.tell()
        if self.report is not None:
            os.close(self.report)
            self.report = None

    # ======================================================== the keeper: what it sees

    def view(self):
        """Return what `step` decides by."""
        record, child, couriers = self.slot.record, self.child, self.couriers
        child.peek()
        stop = record.stop
        busy = stop is not None and stop[3] != "done"
        waits = (
            bool(self.options.get("wait_children"))
            and child.status is not None
            and record.phase != "final"
        )
        return {
            "stop": stop,
            "ended": child.over,
            "recorded": record.outcome is not None or child.reaped,
            "final": record.phase == "final",
            # A walk over /proc, only when it matters, and never while the program lives.
            "alone": (busy or waits) and child.status is not None and not child.descendants(),
            "wait_children": waits,
            "timed": not child.over or (waits and record.outcome is not None),
            "timeout_at": self.timeout_at,
            "kill_ns": kill_deadline_ns(self.options),
            "again_at": self.stops.again_at,
            "retry_at": self.retry_at,
            "blocked": self.pump.blocked is not None,
            "room_at": self.pump.again_at,
            "due": record.outcome is not None and self.pump.short_of(record.lengths),
            "told": self.told,
            "reaped": child.reaped,
            "open": self.pump.open(),
            "courier": couriers is not None
            and self.end_known
            and (record.courier or couriers.at is not None),
            "courier_at": couriers and couriers.at,
            "heed_at": self.heed_at(),
        }

    def heed_at(self):
        times = [self.terminal and self.terminal.heed_at, self.intake and self.intake.look_at]
        return min([each for each in times if each] or [None])

    @property
    def launched(self):
        """Whether the program has its ends open. Before that an end has no reader."""
        return self.pipe is None and self.child.pid is not None

    def waits(self):
        """Return whether something may be due in this run though nothing has happened."""
        return (
            self.child.carrier
            or self.intake is not None
            or self.couriers is not None
            or bool(self.options.get("timeout"))
        )

    # ======================================================== the keeper: its acts

    def do_unblock(self, now):
        self.pump.unblock()
        self.heed()

    def do_heed(self, now):
        if self.terminal:
            self.terminal.heed_at = None
        if self.intake:
            self.intake.look_at = None
        self.heed()

    def do_timeout(self, now):
        name, grace_s = self.options.get("stop_signal") or "TERM", self.options.get("grace")
        grace_s = GRACE_S if grace_s is None else grace_s
        self.begin_stop("timeout", "timeout", name, grace_s, "its own timeout")

    def begin_stop(self, number, reason, name, grace_s, by):
        """Begin a stop. A program that has ended by itself is recorded as such first."""
        status = self.child.peek()
        if status is not None and not status & 0x7F and self.slot.record.outcome is None:
            self.do_record(mono_ns())
        self.stops.begin(number, reason, name, grace_s, by)

    def do_kill(self, now):
        self.stops.kill(now)

    def do_stopped(self, now):
        self.stops.end()

    def do_courier(self, now):
        self.couriers.start(now)

    def do_record(self, now):
        """Record the program's end before it is reaped, so that a guard's death loses no status."""
        if self.pipe is not None:
            self.launch_over()  # the pipe may hold why a carrier started nothing
        slot, child = self.slot, self.child
        launched, record = slot.launched(), slot.record
        if launched is None or launched[0] != child.pid or slot.failure() is not None:
            # Exec was refused, and the child has noted why. Or the child was killed before its
            # claim: by a stop, or else the next start tries again.
            child.reap()
            if launched is None and record.stop and slot.failure() is None:
                wrong = InterruptedError(errno.EINTR, "")
                note_failure(
                    self.files["exit"], "setup", wrong, "it was stopped before it was started"
                )
            slot.tell()
            self.nothing_to_keep()
            return
        if self.terminal:
            # The last output is in the kernel's buffers, where it can't be counted.
            self.terminal.hear()
        record.lengths, record.blocked = self.pump.written(), self.pump.blocked
        record.usage = usage(child.pid)
        record.outcome = (child.status, now_ns(), mono_ns() - launched[4], child.reason())
        record.phase = "ended" if self.options.get("wait_children") else "final"
        if not slot.save():
            record.outcome = None
            self.retry_at = now + RECORD_AGAIN_NS

    def nothing_to_keep(self):
        """Expect nothing: no program was started, or no guard has its status.

        Where the State isn't final, the keeper doesn't wait for the courier either.
        """
        self.end_known = self.slot.failure() is not None
        self.slot.record.phase, self.told, self.child.reaped = "final", True, True
        self.pump.close()

    def do_finish(self, now):
        """End a run with wait_children, as its last descendant has ended; the status stays."""
        record = self.slot.record
        record.lengths = self.pump.written()
        record.phase = "final"
        status, _, _, reason = record.outcome
        if record.stop and record.stop[1] == "timeout":
            reason = "timeout"
        launched = read_launched(os.pread(self.files["launched"], 256, 0))
        record.outcome = (status, now_ns(), mono_ns() - launched[4], reason)
        if not self.slot.save():
            record.phase = "ended"
            self.retry_at = now + RECORD_AGAIN_NS

    def do_tell(self, now):
        self.slot.tell()
        self.told = True

    def do_reap(self, now):
        self.child.reap()
        self.child.reaped = True
        self.reap_orphans()
        self.heed()

    def reap_orphans(self):
        """Reap the program's orphans; the program itself only once its status is in the record."""
        child = self.child
        while True:
            try:
                info = peek_end(os.P_ALL, 0, os.WNOHANG)
            except ChildProcessError:
                return
            if info is None or (info.si_pid == child.pid and not child.reaped):
                return
            _, status = os.waitpid(info.si_pid, 0)
            if self.couriers and info.si_pid == self.slot.record.courier:
                self.couriers.left(status)

    # ======================================================== the keeper: its loop

    def obey(self):
        """Carry out the orders in `control`.

        These are `ID signal NAME BY LAPSES`, `ID stop NAME GRACE-MS BY`, `- window ROWS COLUMNS`,
        and `- stdin`, which only wakes the keeper.
        """
        try:
            text = os.read(self.files["control"], 65536).decode("ascii", "replace")
        except BlockingIOError:
            return
        for line in text.splitlines():
            words = line.split(" ")
            if (
                words[1:2] == ["window"]
                and self.terminal
                and len(words) == 4
                and words[2].isdigit()
                and words[3].isdigit()
            ):
                self.terminal.resize(min(int(words[2]), 9999), min(int(words[3]), 9999))
            if (
                len(words) != 5
                or words[2] not in SIGNALS
                or any(each[2] == words[0] for each in self.slot.record.sent)
            ):
                continue
            if self.child.pid is None:
                continue  # unanswered, which the sender of the order finds out
            if words[1] == "signal" and words[4].isdigit() and mono_ns() < int(words[4]):
                self.child.send(words[2], words[0], words[3])
            elif words[1] == "stop" and words[3].isdigit():
                self.begin_stop(words[0], "killed", words[2], int(words[3]) / 1000, words[4])

    def heed(self, event=0):
        """Move the terminal's output and the program's input, whatever woke the keeper."""
        if self.terminal and self.launched:
            heard = self.terminal.stream.blocked or self.terminal.hear()
            if not heard or (event & select.POLLHUP and not event & select.POLLIN):
                self.child.peek()
                self.terminal.hung_up(self.child.over)
        if self.intake and self.launched:
            self.intake.move()
            if not self.ended_stdin and self.intake.all_moved():
                self.end_stdin()
        if self.terminal:
            self.terminal.watch(self.intake.waits)

    def end_stdin(self):
        """Close stdin in all guards: all of it was moved, and then the program reads its end."""
        self.ended_stdin = True
        self.intake.close()
        self.slot.name_guards()
        for pid, start in self.slot.record.guards:
            if pid != os.getpid():
                signal_process(pid, start, _signal.SIGURG)

    def run(self, pids, report, launches):
        """Keep the run until nothing of it is left to keep, and launch it first where nobody has.

        `pids` are the guards', the keeper's own the last. `report` is closed after the launch.
        """
        slot = self.slot
        self.report, slot.pids, slot.record.agent = report, pids, pids[-1]
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        os.set_blocking(theirs, False)
        # The pipe first, then the handlers. Only `launch` or `take_over` lets a SIGTERM in, so that
        # none is swallowed.
        _signal.set_wakeup_fd(theirs)
        _signal.signal(_signal.SIGCHLD, _nothing)
        _signal.signal(_signal.SIGTERM, _nothing)
        self.poll.register(ours, select.POLLIN)
        self.poll.register(self.files["control"], select.POLLIN)
        if launches:
            slot.record.guards = []  # those of guards that launched nothing
            self.launch()
        else:
            slot.save()
            self.take_over()
            self.heed()
        # Nothing is due after a fork, or after an exec without a timeout. To find that out by
        # `step` would cost 120 kB.
        due, now, wake = not self.child.pid or not launches, 0, None
        while True:
            if due:
                now = mono_ns()
                action, wake = step(self.view(), now)
                if action == "leave":
                    if self.intake:
                        self.intake.forget_all()
                    return
                if action:
                    getattr(self, "do_" + action)(now)
                    continue
                if slot.dirty or slot.record.blocked != self.pump.blocked:
                    slot.record.blocked = self.pump.blocked
                    slot.save()
            # +1: poll's milliseconds are cut, and an early wake-up would only come back here.
            events = self.poll.poll(None if wake is None else max(0, (wake - now) // 10**6 + 1))
            due = len(events) != 1 or events[0][0] != self.pipe or self.waits()
            for fd, event in events:
                if fd == ours:
                    if _signal.SIGTERM in os.read(ours, 4096):
                        self.child.relay()
                    self.reap_orphans()
                elif fd == self.pipe:
                    self.launch_over()
                    self.heed()
                elif fd == self.files["control"]:
                    self.obey()
                    self.heed()
                elif fd in self.pump.by_fifo:
                    self.pump.on(fd, event)
                else:
                    self.heed(event)


def _nothing(number, frame):
    pass
