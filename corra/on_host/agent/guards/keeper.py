"""The keeper: the program's parent."""

import _signal
import posix as os
import select
import sys
import time

from ..contract import AFTER_GRACE, CARRIER_DEADLINE_NS, GRACE_S, PAGE, SIGNAL_NAMES, SIGNALS
from ..files import exists, read_file
from ..kernel import mono_ns, now_ns
from ..processes import boot_id, ended, kill_tree, oom_kills, process, signal_process, tree, usage
from ..records import Record, to_json, unpack
from ..run import living_guards, state_of
from ..spool import launched_by, read_launched, stdin_facts
from .decide import kill_deadline_ns, step
from .output import Pump
from .program import become_program, note_failure
from .stdin import Intake
from .terminal import Terminal

STAND_IN = 33  # what is added to a signal that a carrier is to pass on: 1 to 31 become the real-time signals 34 to 64
COURIER_S = 86400


class Keeper:
    """The program's parent: moves its output, obeys orders, keeps time, records the end."""

    def __init__(self, directory, files, request, inherited):
        self.directory, self.files, self.request, self.inherited = (
            directory,
            files,
            request,
            inherited,
        )
        self.options = request.get("run") or {}
        self.carrier = bool(self.options.get("carrier"))
        self.record = Record.read(os.pread(files["exit"], PAGE, 0)) or Record()
        if self.record.ooms is None:
            self.record.ooms = oom_kills()
        self.report = self.pids = None
        self.pid = None
        self.status = None
        self.told = self.reaped = False
        self.dirty = self.end_known = True
        self.timeout_at = None
        self.retry_at = self.again_at = 0
        self.courier_at, self.courier_born, self.courier_deaths = None, 0, 0
        self.pipe = None
        self.poll = select.poll()
        self.pump = Pump(files, request, self.poll)
        self.intake = None
        if "senders" in files:
            self.intake = Intake(
                directory, files, self.poll, self.options.get("forget_stdin") or "terminal" in files
            )
        self.ended_stdin = False
        self.terminal = Terminal(files, self.pump, self.poll) if "terminal" in files else None

    def take_over(self):
        """Become the program's parent after another keeper's death."""
        launched = launched_by(self.directory, self.files)
        if launched is None:
            self.nothing_to_keep()  # and the slot says why
            return
        self.pid = launched[0]
        self.record.phase = "live" if self.record.phase == "carrying" else self.record.phase
        self.set_timeout(launched)
        if "courier" in self.files and (process(self.record.courier) or "Z")[0] in "ZX":
            self.courier_at = 0
        while True:
            try:
                self.status = ended(self.pid)
                return
            except ChildProcessError:
                # The lock falls before the children are handed over: a process that is still there will be ours.
                found = process(self.pid)
                if found is None or found[2] != launched[1]:
                    self.reaped = True
                    if self.record.outcome is None:
                        self.nothing_to_keep()  # no guard left a status: the readers will say lost
                    return
                time.sleep(0.001)

    def launch(self):
        """Fork the program. The pipe closes at its exec or its death and wakes us; a carrier keeps it until the program runs at its other end.

        The first record is written by the forked child, too: what it takes to make one would be 280 kB of ours, for weeks.
        """
        self.record.phase = "carrying" if self.carrier else "live"
        self.pipe, theirs = os.pipe()
        saved, saving = os.pipe()
        _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGTERM, _signal.SIGCHLD})
        try:
            self.pid = os.fork()
            if not self.pid:
                save = lambda: (self.save(), os.close(saving))  # noqa: E731
                become_program(
                    self.directory,
                    self.files,
                    self.request,
                    self.inherited,
                    theirs,
                    save,
                    self.tell,
                )
        except OSError as error:
            note_failure(
                self.files["exit"],
                "setup",
                error,
                "there is no process to be had for it: " + error.strerror,
            )
            self.nothing_to_keep()
        finally:
            _signal.pthread_sigmask(_signal.SIG_UNBLOCK, {_signal.SIGTERM, _signal.SIGCHLD})
        os.close(theirs)
        os.close(saving)
        os.read(saved, 1)  # its end: from here on our own record is the newer one
        os.close(saved)
        self.dirty = not self.pid
        self.poll.register(self.pipe, select.POLLIN)

    def set_timeout(self, launched):
        if self.options.get("timeout"):
            self.timeout_at = launched[4] + int(self.options["timeout"] * 1e9)

    def launch_over(self):
        """Exec was done or refused: whoever waits for the start may look now."""
        said = os.read(self.pipe, PAGE).decode("utf-8", "surrogateescape").split(" ", 2)
        if len(said) == 3 and said[1].isdigit():
            note_failure(self.files["exit"], said[0], OSError(int(said[1]), said[2]), said[2])
        self.record.phase = "live"
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
        if exists(
            self.directory, "launched"
        ):  # else it died before its claim, and whoever tries again needs the file
            try:
                os.unlink("launched.tmp", dir_fd=self.directory)
            except OSError:
                pass
        # The program runs: its secrets and environment need no memory of ours any more.
        self.inherited = {}
        self.request["secret_env"] = {}
        self.courier_at = 0 if "courier" in self.files else None
        if self.carrier:
            self.save()
            self.tell()
        if self.report is not None:
            os.close(self.report)
            self.report = None

    # ======================================================== the keeper: its record

    def save(self):
        """Write the record; a full disk doesn't matter, since the page is there already."""
        self.name_guards()
        try:
            os.pwrite(self.files["exit"], self.record.page(), 0)
            self.dirty = False
            if self.record.outcome:
                os.fsync(self.files["exit"])
            return True
        except OSError:
            return False

    def name_guards(self):
        """Have the guards in the record; looked up when first needed, which for a run that only waits is never."""
        if not self.record.guards:
            self.record.guards = [
                (pid, found[2])
                for pid, found in [(pid, process(pid)) for pid in self.pids]
                if found
            ]

    def tell(self):
        """Write state.json, a copy for people: nothing depends on it. Where it can't be written the old one goes, as it would be untrue."""
        try:
            fd = os.open(
                "state.json.tmp",
                os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW,
                0o600,
                dir_fd=self.directory,
            )
            try:
                os.write(fd, (to_json(state_of(self.request, self.facts())) + "\n").encode())
            finally:
                os.close(fd)
            os.rename(
                "state.json.tmp", "state.json", src_dir_fd=self.directory, dst_dir_fd=self.directory
            )
        except OSError:
            for name in ("state.json.tmp", "state.json"):
                try:
                    os.unlink(name, dir_fd=self.directory)
                except OSError:
                    pass

    def facts(self):
        return {
            "alive": True,
            "launched": launched_by(self.directory, self.files),
            "record": self.record,
            "failure": unpack(os.pread(self.files["exit"], PAGE, PAGE)),
            "sizes": {stream.name: stream.length() for stream in self.pump.streams},
            "heads": {
                stream.name: stream.bound.head for stream in self.pump.streams if stream.bound
            },
            "last_ns": max(os.fstat(stream.file).st_mtime_ns for stream in self.pump.streams),
            "gone": False,
            "boot_id": boot_id(),
            "mono_ns": mono_ns(),
            "spool": self.request["path"],
            "courier": read_file(self.directory, "courier.json", PAGE),
            "stdin": stdin_facts(self.directory) if self.intake else None,
            "standbys": [pid for pid in living_guards(self.record) if pid != self.record.agent],
        }

    def peek(self):
        """Take note of the program's end, if it has come."""
        if self.status is None and self.pid and not self.reaped:
            self.status = ended(self.pid)

    def view(self):
        stop = self.record.stop
        self.peek()
        busy = stop is not None and stop[3] != "done"
        waits = (
            bool(self.options.get("wait_children"))
            and self.status is not None
            and self.record.phase != "final"
        )
        return {
            "stop": stop,
            "ended": self.status is not None or self.reaped,
            "recorded": self.record.outcome is not None or self.reaped,
            "final": self.record.phase == "final",
            # A walk over /proc: only when the answer matters, and never while the program itself lives.
            "alone": (busy or waits) and self.status is not None and not self.descendants(),
            "wait_children": waits,
            "timed": (self.status is None and not self.reaped)
            or (waits and self.record.outcome is not None),
            "timeout_at": self.timeout_at,
            "kill_ns": kill_deadline_ns(self.options),
            "again_at": self.again_at,
            "retry_at": self.retry_at,
            "blocked": self.pump.blocked is not None,
            "room_at": self.pump.again_at,
            "due": self.record.outcome is not None and self.pump.short_of(self.record.lengths),
            "told": self.told,
            "reaped": self.reaped,
            "open": self.pump.open(),
            "courier": self.end_known and (self.record.courier or self.courier_at is not None),
            "courier_at": self.courier_at,
            "heed_at": self.heed_at(),
        }

    def descendants(self):
        """Return the program's living descendants; the courier is ours, and no signal to them is for it."""
        return tree([os.getpid()], [self.record.courier])

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

    def heed_at(self):
        times = [self.terminal and self.terminal.heed_at, self.intake and self.intake.look_at]
        return min([each for each in times if each] or [None])

    def do_timeout(self, now):
        name, grace_s = self.options.get("stop_signal") or "TERM", self.options.get("grace")
        self.begin_stop(
            "timeout", "timeout", name, GRACE_S if grace_s is None else grace_s, "its own timeout"
        )

    def begin_stop(self, number, reason, name, grace_s, by):
        """Ask the program's group to end, and remember when to stop asking."""
        self.peek()
        if self.status is not None and not self.status & 0x7F and self.record.outcome is None:
            self.do_record(mono_ns())  # it ended by itself, before it was asked to
        kill_at = mono_ns() + int(grace_s * 1e9)
        pending = self.record.stop if self.record.stop and self.record.stop[3] != "done" else None
        if pending:
            kill_at = min(kill_at, pending[2])
        self.record.stop = [number, pending[1] if pending else reason, kill_at, "grace"]
        self.record.survivors = []
        if grace_s > 0:
            self.send(name, number, by)
            if self.status is None:
                self.to_group(_signal.SIGCONT)
        else:
            self.log("KILL", number, "tree", by)
        self.save()

    def send(self, name, number, by):
        """Signal the program's group; after its end, whatever of its descendants lives on."""
        if self.status is None:
            self.to_group(SIGNALS[name])
        else:
            for pid, found in self.descendants().items():
                signal_process(pid, found[2], SIGNALS[name])
        self.log(name, number, "group" if self.status is None else "tree", by)

    def to_group(self, number):
        if self.reaped:
            return  # from then on the pid and the group can come to mean somebody else
        number += STAND_IN if self.carrier and number <= _signal.SIGSYS else 0
        try:
            os.killpg(self.pid, number)
        except (ProcessLookupError, PermissionError):
            # Between fork and setsid the group is still ours.
            signal_process(self.pid, 0, number)

    def log(self, name, number, to, by):
        self.record.sent.append((now_ns(), "SIG" + name, number, to, by))
        self.dirty = True

    def do_kill(self, now):
        if self.record.stop[3] == "grace":
            if self.record.sent[-1:] and self.record.sent[-1][2:4] != (self.record.stop[0], "tree"):
                self.log("KILL", self.record.stop[0], "tree", AFTER_GRACE)
            self.record.stop[2:] = [now, "killing"]
            self.dirty = True
            if self.carrier and self.status is None:
                self.to_group(_signal.SIGKILL)
        if (
            not self.carrier
            or self.status is not None
            or now > self.record.stop[2] + CARRIER_DEADLINE_NS
        ):
            kill_tree([os.getpid()], [self.record.courier])
        self.again_at = now + 50 * 10**6
        self.save()

    def do_stopped(self, now):
        self.record.stop[3] = "done"
        self.record.survivors = [(pid, found[2]) for pid, found in self.descendants().items()]
        self.save()

    def do_record(self, now):
        """The end: peeked at, not yet reaped, so that a guard's death loses no status."""
        if self.pipe is not None:
            self.launch_over()  # why nothing was started may stand there, and the status be no program's
        launched = launched_by(self.directory, self.files)
        if (
            launched is None
            or launched[0] != self.pid
            or unpack(os.pread(self.files["exit"], PAGE, PAGE)) is not None
        ):
            # exec was refused, and the child has said why; or it was killed before its claim, and the next start tries again.
            self.reap()
            self.tell()
            self.nothing_to_keep()
            return
        if self.terminal:
            self.terminal.hear()  # what it said last still stands in the kernel's buffers, where nobody can count it
        self.record.lengths = self.pump.written()
        self.record.usage = usage(self.pid)
        self.record.outcome = (self.status, now_ns(), mono_ns() - launched[4], self.reason())
        self.record.phase = "ended" if self.options.get("wait_children") else "final"
        if not self.save():
            self.record.outcome = None
            self.retry_at = now + 200 * 10**6

    def nothing_to_keep(self):
        """No program came of it: nobody will ever hold the FIFOs. Without a State that is final nobody waits for the courier either."""
        self.end_known = unpack(os.pread(self.files["exit"], PAGE, PAGE)) is not None
        self.record.phase, self.told, self.reaped = "final", True, True
        self.pump.close()

    def reason(self):
        number = self.status & 0x7F
        if self.record.stop:
            return self.record.stop[1]
        if not number:
            return "exited"
        name = SIGNAL_NAMES.get(number)
        if (
            number == _signal.SIGKILL
            and not any(each[1] == name for each in self.record.sent)
            and oom_kills() > self.record.ooms
        ):
            return "oom"
        return "killed" if any(each[1] == name for each in self.record.sent) else "signaled"

    def do_finish(self, now):
        """With wait_children the run ends when the last descendant has; the program's own status stands."""
        self.record.lengths = self.pump.written()
        self.record.phase = "final"
        status, _, _, reason = self.record.outcome
        if self.record.stop and self.record.stop[1] == "timeout":
            reason = "timeout"
        launched = read_launched(os.pread(self.files["launched"], 256, 0))
        self.record.outcome = (status, now_ns(), mono_ns() - launched[4], reason)
        if not self.save():
            self.record.phase = "ended"
            self.retry_at = now + 200 * 10**6

    def do_tell(self, now):
        self.tell()
        self.told = True

    def do_reap(self, now):
        self.reap()
        self.reaped = True
        self.reap_orphans()
        self.heed()

    def reap(self):
        try:
            os.waitpid(self.pid, 0)
        except ChildProcessError:
            pass

    # ======================================================== the keeper: its loop

    def obey(self):
        """Read orders: `ID signal NAME BY LAPSES`, `ID stop NAME GRACE-MS BY`, `- window ROWS COLUMNS`; `- stdin` only wakes us."""
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
                or any(each[2] == words[0] for each in self.record.sent)
            ):
                continue
            if self.pid is None:
                continue  # unanswered: whoever ordered it finds out
            if words[1] == "signal" and words[4].isdigit() and mono_ns() < int(words[4]):
                self.send(words[2], words[0], words[3])
            elif words[1] == "stop" and words[3].isdigit():
                self.begin_stop(words[0], "killed", words[2], int(words[3]) / 1000, words[4])

    # ======================================================== the keeper: the program's stdin and terminal

    def heed(self, event=0):
        """Move what was said on the terminal and what is to be read, whatever woke us."""
        if self.terminal and self.launched:
            heard = self.terminal.stream.blocked or self.terminal.hear()
            if not heard or (event & select.POLLHUP and not event & select.POLLIN):
                self.peek()
                self.terminal.hung_up(self.status is not None or self.reaped)
        if self.intake and self.launched:
            self.intake.move()
            if not self.ended_stdin and self.intake.all_moved():
                self.ended_stdin = True
                self.intake.close()
                self.name_guards()
                for pid, start in self.record.guards:
                    if pid != os.getpid():
                        signal_process(
                            pid, start, _signal.SIGURG
                        )  # the end comes when nobody holds it open any more
        if self.terminal:
            self.terminal.watch(self.intake.waits)

    @property
    def launched(self):
        """Whether the program has its ends open: until then nobody reads them, which means nothing."""
        return self.pipe is None and self.pid is not None

    def waits(self):
        """Return whether this is a run of which something may be due though nothing has happened."""
        return (
            self.carrier
            or self.intake is not None
            or "courier" in self.files
            or bool(self.options.get("timeout"))
        )

    def relay(self):
        """SIGTERM to the keeper is SIGTERM to the program."""
        if self.status is None and self.pid:
            signal_process(self.pid, 0, _signal.SIGTERM)  # not reaped, so it is nobody else
            self.log("TERM", "-", "program", "SIGTERM to the agent")

    def reap_orphans(self):
        """Reap the program's orphans, never the program: its status must be in the record first."""
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None or not info.si_pid or (info.si_pid == self.pid and not self.reaped):
                return
            _, status = os.waitpid(info.si_pid, 0)
            if info.si_pid == self.record.courier:
                self.courier_left(status)

    # ======================================================== the keeper: its courier

    def do_courier(self, now):
        """Start the courier: a fresh interpreter of its own, which anything may kill. It gets two files of code, and no lock of ours."""
        self.courier_at, self.courier_born = None, now
        script, agent = self.files["courier"], self.files["agent"]
        try:
            child = os.fork()
        except OSError:
            self.courier_at = now + 10**10
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
        self.record.courier, self.dirty = child, True

    def courier_left(self, status):
        """It has done what it could, or died: then another goes on from what was acknowledged."""
        now, self.record.courier, self.dirty = mono_ns(), 0, True
        if not status:
            return
        config = self.request.get("config") or {}
        over_ns = self.record.outcome and self.record.outcome[1] + int(
            ((config.get("timeout") or COURIER_S) + COURIER_S) * 1e9
        )
        if over_ns and now_ns() > over_ns:
            return  # it can't even say that it gave up
        self.courier_deaths = 1 if now - self.courier_born > 10**10 else self.courier_deaths + 1
        # Whoever kills it may do so often; a defect of its own would come back at once.
        most = 10**9 if status & 0x7F else 60 * 10**9
        self.courier_at = now + min(10**8 << min(self.courier_deaths - 1, 12), most)

    # ======================================================== the keeper: running

    def run(self, pids, report, launches):
        """Keep the run until nothing of it is left to keep, and launch it first where nobody has.

        `pids` are the guards, ourselves the last, `report` is closed when it has begun.
        """
        self.report, self.pids, self.record.agent = report, pids, pids[-1]
        ours, theirs = os.pipe()
        os.set_blocking(ours, False)
        os.set_blocking(theirs, False)
        _signal.set_wakeup_fd(theirs)
        _signal.signal(_signal.SIGCHLD, _nothing)
        _signal.signal(_signal.SIGTERM, _nothing)
        self.poll.register(ours, select.POLLIN)
        self.poll.register(self.files["control"], select.POLLIN)
        if launches:
            self.record.guards = []  # of those who failed to
            self.launch()
        else:
            self.save()
            self.take_over()
            self.heed()
        # Of a program that has just been forked, or executed without a timeout, nothing is due; to find that out would cost 120 kB.
        due, now, wake = not self.pid or not launches, 0, None
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
                if self.dirty or self.record.blocked != self.pump.blocked:
                    self.record.blocked = self.pump.blocked
                    self.save()
            # +1: poll's milliseconds are cut, and an early wake-up would only come back here.
            events = self.poll.poll(None if wake is None else max(0, (wake - now) // 10**6 + 1))
            due = len(events) != 1 or events[0][0] != self.pipe or self.waits()
            for fd, event in events:
                if fd == ours:
                    if _signal.SIGTERM in os.read(ours, 4096):
                        self.relay()
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
