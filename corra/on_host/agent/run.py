"""A run as a reader sees it: its files, its lock, and the State that follows from both."""

import errno
import fcntl
import posix as os
import time

from .bounds import first_data, read_heads
from .contract import FINAL, GRACE_S, KEEP_BAD_S, KEEP_GOOD_S, LAYOUT, PAGE, SIGNAL_NAMES
from .files import read_file
from .hindrance import LATE_NS, due_work, hindrance
from .kernel import mono_ns
from .paths import join
from .processes import boot_id, children, process, process_tree
from .records import Record, from_json, unpack
from .spool import abandoned, read_launched, stdin_facts, stream_names, takes_more


class Run:
    """A run's directory, open for reading. It never changes anything."""

    def __init__(self, root, prog_id):
        self.path = join(root, "runs/" + prog_id)
        self.directory = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        # Anybody may have made this user's root in /var/tmp, and runs in it.
        ours = os.fstat(self.directory).st_uid == os.geteuid()
        text = read_file(self.directory, "program.json") if ours else None
        if text is None:
            os.close(self.directory)
            raise FileNotFoundError(errno.ENOENT, "no program.json", self.path)
        try:
            self.request = sound_request(text, prog_id)
        except (ValueError, RecursionError) as error:
            os.close(self.directory)
            raise self.damaged("program.json", error) from None
        self.prog_id = prog_id
        self.streams = stream_names(self.request)
        self.bounded = bool((self.request.get("run") or {}).get("keep_output"))
        self.rebooted = None

    def damaged(self, name, error):
        """Return the error of a run whose files say what no agent has written."""
        return OSError(errno.EBADMSG, "%s is damaged (%s)" % (name, error), self.path)

    def heads(self):
        """Return {stream or "index": offset of its first byte}; {} for unbounded output."""
        if not self.bounded:
            return {}
        found = read_heads(self.directory, self.streams)
        if self.rebooted is None:
            launched = read_launched(read_file(self.directory, "launched"))
            self.rebooted = launched and launched[2] != boot_id()
        if self.rebooted:
            # A power cut may have taken back the last write to `heads`, and not the holes.
            found = {
                name: max(head, first_data(self.directory, name)) for name, head in found.items()
            }
        return found

    def close(self):
        os.close(self.directory)

    def alive(self):
        """Return whether any guard lives, by trying a shared lock for a moment.

        Probers don't disturb each other, and a starter that meets one tries again.
        """
        fd = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=self.directory)
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
        except BlockingIOError:
            return True
        finally:
            os.close(fd)

    def sizes(self):
        found = {}
        for name in self.streams:
            try:
                found[name] = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                pass
        return found

    def pages(self):
        """Return the slot's two pages, or None where the spool was deleted."""
        slot = read_file(self.directory, "exit", PAGE * 2)
        return (slot[:PAGE], slot[PAGE:]) if slot is not None else None

    def facts(self):
        """Return all that the State is computed from.

        The guards hold the lock from before `launched` exists until their end. So a free lock means
        that they are dead only if `launched` was there before the lock was tried. What is read
        after that is final.
        """
        before = read_launched(read_file(self.directory, "launched"))
        alive = self.alive()
        pages = self.pages()
        record = Record.read(pages[0]) if pages else None
        for _ in range(20):
            if record is not None or not pages or not pages[0].strip():
                break
            pages = self.pages()  # torn: read during a write
            record = Record.read(pages[0]) if pages else None
        launched = read_launched(read_file(self.directory, "launched"))
        failure = unpack(pages[1]) if pages else None
        if not (alive or launched or failure) and abandoned(self.directory):
            failure = self.abandonment()
        stats = self.sizes()
        return {
            "alive": alive or (launched is not None and before is None),
            "launched": launched,
            "record": record,
            "failure": failure,
            "sizes": {name: stat.st_size for name, stat in stats.items()},
            "heads": self.heads(),
            "last_ns": max([stat.st_mtime_ns for stat in stats.values() if stat.st_size] or [0]),
            "gone": pages is None,
            "boot_id": boot_id(),
            "mono_ns": mono_ns(),
            "spool": self.path,
            "courier": read_file(self.directory, "courier.json", PAGE),
            "stdin": stdin_facts(self.directory) if takes_more(self.request) else None,
        }

    def abandonment(self):
        """Return why nothing was started, as the slot's second page would say it."""
        said = (read_file(self.directory, "keeper", PAGE) or b"").decode("utf-8", "replace")
        message = "; ".join(["its guards died before they started it"] + said.splitlines()[-1:])
        return [
            ["stage", "setup"],
            ["type", "ChildProcessError"],
            ["errno", "0"],
            ["message", message],
        ]

    def state(self, details=False, sure=False):
        """Return the run's State; with `details` also the processes that outlive the program.

        With `sure` it waits a moment where the program has ended just now. Only then can it say
        that the keeper is hindered, and not just about to record that.

        Raises OSError: EBADMSG where the run's files are damaged.
        """
        try:
            return self.state_now(details, sure)
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise self.damaged("a file of this run", repr(error)) from None

    def state_now(self, details, sure):
        facts = self.guarded_facts()
        deadline = mono_ns() + LATE_NS
        while ending(facts) and sure and mono_ns() < deadline:
            time.sleep(0.005)
            facts = self.guarded_facts()
        if ending(facts) and not sure:
            facts["hindered"] = None
        record = facts["record"]
        if facts["alive"] and record:
            keeper = record.agent
            facts["standbys"] = [pid for pid in facts["guards"] if pid != keeper]
            # A zombie's children are the keeper's by now.
            ours = {facts["launched"] and facts["launched"][0], record.courier}
            if details and record.outcome and set(children(keeper)) - ours:
                facts["stragglers"] = [
                    {"pid": pid, "name": found[3]}
                    for pid, found in process_tree([keeper], [record.courier]).items()
                ]
        return state_of(self.request, facts)

    def guarded_facts(self):
        """Return the facts with the living `guards`, and with what has `hindered` the keeper."""
        facts = self.facts()
        if facts["alive"] and facts["record"]:
            facts["guards"] = living_guards(facts["record"])
            # The innermost living guard keeps the run, or is about to.
            for keeper in facts["guards"][-1:]:
                facts["due"] = due_work(self.request, facts)
                facts["hindered"] = hindrance(keeper, facts["due"])
        return facts

    def hindered(self):
        """Return the State's `hindered`, as it may be: `state` is sure."""
        return self.guarded_facts().get("hindered")


def ending(facts):
    """Return whether the program has ended and its keeper may be about to record that."""
    halted = (facts.get("hindered") or {}).get("why") in ("stopped", "traced")
    return facts.get("due") == "end" and not halted


def sound_request(text, prog_id):
    """Return the request in program.json. Raises ValueError: a part of it isn't of its type."""
    request = from_json(text)
    if not isinstance(request, dict) or not isinstance(request.get("program"), dict):
        raise ValueError("it has no program")
    if request.get("prog_id") != prog_id:
        raise ValueError("it is not that of this run")
    argv = request["program"].get("argv")
    if not isinstance(argv, list) or not argv or not all(isinstance(each, str) for each in argv):
        raise ValueError("its program has no argv")
    wrong = [
        name
        for parts, kind in (
            (("name", "user"), str),
            (("run", "origin", "callback", "config"), dict),
            (("created", "layout"), (int, float)),
        )
        for name in parts
        if request.get(name) is not None and not isinstance(request[name], kind)
    ]
    if wrong:
        raise ValueError("%s has the wrong type" % " and ".join(wrong))
    return request


def living_guards(record):
    """Return the pids of the living guards. Start times tell them from later processes."""
    found = [(pid, start, process(pid)) for pid, start in record.guards]
    return [pid for pid, start, each in found if each and each[2] == start and each[0] not in "ZX"]


def iso(ns):
    """Return a time as UTC with its offset, to the millisecond; None for 0."""
    if not ns:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(ns // 10**9)) + ".%03d+00:00" % (
        ns // 10**6 % 1000
    )


def state_of(request, facts):
    """Return the State as JSON, by the request, the files and the lock. Unknown is `lost`."""
    record, launched, failure = facts["record"] or Record(), facts["launched"], facts["failure"]
    program, options = request["program"], request.get("run") or {}
    state, reason, exception, outcome = "starting", None, None, None
    if facts["gone"]:
        state, reason = "lost", "spool-gone"
    elif failure:
        found = {words[0]: " ".join(words[1:]) for words in failure}
        exception = {
            "type": found.get("type"),
            "errno": int(found.get("errno", 0)) or None,
            "stage": found.get("stage"),
            "message": found.get("message"),
            "path": found.get("path"),
        }
        state, reason = "not_started", "exec" if found.get("stage") == "exec" else "setup"
    elif record.outcome and options.get("carrier") and record.outcome[0] & 0x7F:
        # A carrier exits as the program did. A signal that ends it says nothing of the program.
        state, reason = "lost", "link"
    elif record.outcome and (record.phase == "final" or not facts["alive"]):
        state, outcome = "exited", record.outcome
        reason = outcome[3]
    elif launched:
        state = "starting" if record.phase == "carrying" else "running"
        if launched[2] != facts["boot_id"]:
            state, reason = "lost", "reboot"
        elif not facts["alive"]:
            state, reason = "lost", "agent-gone"
    status = outcome[0] if outcome else None
    number = status & 0x7F if outcome else 0
    elapsed = None
    if outcome:
        elapsed = outcome[2] / 1e9
    elif launched and state == "running":
        elapsed = (facts["mono_ns"] - launched[4]) / 1e9
    sizes, heads = facts["sizes"], facts.get("heads") or {}
    lengths = {name: record.lengths.get(name, size) for name, size in sizes.items()}
    end_ns = record.outcome[1] if record.outcome and state in FINAL else 0
    keep_s = options.get("keep") or (KEEP_GOOD_S if outcome and status == 0 else KEEP_BAD_S)
    open_run, hindered = state not in FINAL, facts.get("hindered")
    return {
        "prog_id": request["prog_id"],
        "proc_id": request["prog_id"],
        "state": state,
        "reason": reason,
        "name": request.get("name"),
        "host": os.uname().nodename,
        "link": program.get("host"),
        "user": request.get("user"),
        "origin": request.get("origin") or {},
        "program": {key: value for key, value in program.items() if key != "env"},
        "argv": program["argv"],
        "cwd": program.get("cwd"),
        "env": sorted(program.get("env") or {}),
        "boot_id": launched[2] if launched else facts["boot_id"],
        "agent_pid": record.agent if facts["alive"] and record.agent else None,
        "standby_pids": facts.get("standbys", []),
        "supervisor": "gone"
        if not facts["alive"]
        else "stopped"
        if hindered and hindered["why"] in ("stopped", "traced")
        else "ok",
        # An end is final, but the keeper may have output to move.
        "hindered": hindered if open_run or (hindered and hindered["due"] == "output") else None,
        "pid": launched[0] if launched else None,
        "pid_start": launched[1] if launched else None,
        "exception": exception,
        "status": status,
        "return_code": status >> 8 if outcome and not number else None,
        "signal": SIGNAL_NAMES.get(number, "SIG%d" % number) if number else None,
        "core_dumped": bool(status & 0x80) if outcome else None,
        "rusage": rusage_of(record.usage) if outcome else None,
        "start_time": iso(launched[3]) if launched else None,
        "end_time": iso(end_ns),
        "elapsed": elapsed,
        "timeout": options.get("timeout"),
        "stop_signal": options.get("stop_signal") or "TERM",
        "grace": GRACE_S if options.get("grace") is None else options["grace"],
        "signals_sent": [
            dict(zip(("time", "signal", "id", "to", "by"), (iso(each[0]),) + each[1:]))
            for each in record.sent
        ],
        "stragglers": facts.get("stragglers", []),
        "streams": {
            name: {
                "length": lengths[name],
                # keep_output gives back a beginning; an end goes with all guards, or by gc.
                "dropped": min(
                    lengths[name],
                    heads.get(name, 0)
                    + (max(0, lengths[name] - size) if not facts["alive"] else 0),
                ),
                "late": max(0, size - lengths[name]),
            }
            for name, size in sizes.items()
        },
        "blocked": {"since": iso(record.blocked[0]), "errno": record.blocked[1]}
        if record.blocked and facts["alive"] and open_run
        else None,
        "last_output_time": iso(facts["last_ns"]),
        "callback": delivered(facts.get("courier")) if request.get("callback") else None,
        "stdin": facts.get("stdin"),
        "pty": bool(program.get("pty")),
        "spool": facts["spool"],
        "keep_until": None if open_run or not end_ns else iso(end_ns + int(keep_s * 1e9)),
        "layout": request.get("layout", LAYOUT),
    }


def delivered(page):
    """Return the State's `callback`, which the courier has written: what is acknowledged."""
    try:
        found = from_json(page or b"{}")
    except (ValueError, RecursionError):
        found = {}  # torn: the collector has the facts
    return {key: found.get(key) for key in ("acked", "completed", "error", "since", "over")}


def rusage_of(used):
    if not used:
        return None
    names = ("maxrss_kb", "minflt", "majflt", "inblock", "oublock", "nvcsw", "nivcsw")
    return dict(zip(names, used[2:]), utime=used[0] / 1e6, stime=used[1] / 1e6)
