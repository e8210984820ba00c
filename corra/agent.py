#!/usr/bin/env python3
# Made by scripts/join from corra/on_host/agent/: change the parts, not this file.
r"""corra's agent: it starts a program on this host so that the program outlives the connection.

    agent.py < program.json        start the program, print its State as JSON, leave; guards stay
    agent.py VERB < request        run start follow status signal stop wait read list gc deliver

Needs Linux 3.10, Python 3.6, and nothing but its standard library. Importing it does nothing.

Request, on stdin    "<bytes>\n" and that much JSON; or, by hand, JSON alone up to the end of file.
Reply, on stdout     the line "corra 1 NONCE" where the request has a nonce, then one line of JSON;
                     run, follow, wait and stop add frames. A refusal is a reply as well:
                     {"error": KIND, "message": ...}.
Exit code            0 answered, 1 refused, 2 the request could not be read.

A run is a directory, ROOT/runs/PROG-ID. ROOT is ${XDG_STATE_HOME:-~/.local/state}/corra, or
/var/tmp/corra-UID where that one can't be made.
    program.json    the request, without its secrets
    stdout stderr   the program's output; with merge or a pty it is "output" alone. The length of
                    the file is the only truth about the output.
    stdin           the bytes for the program to read. While it is held open, its length is how
                    much was accepted.
    senders         only where stdin is held open: 24 bytes a record, which sender's bytes begin
                    at which offset of stdin
    index           16 bytes a record: time (ns), stream and its offset. A torn record loses a
                    time, never a byte.
    heads           only with keep_output: how much of each stream, and of the index, was given
                    back to the disk
    fifo/           the program's ends
    control         orders to the keeper
    launched        which process was launched. The file exists exactly when exec was tried.
    keeper          the lock of the process that may touch the FIFOs
    exit            the slot, two pages that are overwritten in place: the keeper's record, and
                    why exec failed
    state.json      a copy of the State, for people
    courier.json    only with a callback: what the collector has acknowledged
    token           only with a callback: opens the collector
The guards hold a flock on the directory itself, which shows that one of them lives.

Three guards keep a run: two standbys and the keeper. Each guard is the parent of the next, and the
keeper is the parent of the program. Where a guard dies, its nearest living ancestor becomes the
program's parent and goes on. Guards import nothing after their start, hold no timer while nothing
happens, and are forked from a process that has done little else. With a callback the keeper has
one more child, courier.py beside this file, which the keeper starts again when it dies.
"""

import _ctypes
import _json
import _signal
import errno
import fcntl
import gc
import marshal
import posix as os
import select
import struct
import sys
import time
import zlib


# ============================================================ contract

VERSION = "0.1.0"
PROTOCOL = 1
LAYOUT = 1
TRANSITIONS = {
    "starting": ("running", "exited", "not_started", "lost"),
    "running": ("exited", "lost"),
    "exited": (),
    "not_started": (),
    "lost": (),
}
FINAL = tuple(sorted(state for state, after in TRANSITIONS.items() if not after))
REASONS = (
    "exited",
    "signaled",
    "killed",
    "timeout",
    "oom",
    "exec",
    "setup",
    "reboot",
    "agent-gone",
    "spool-gone",
    "link",
)
PAGE = 4096
INDEX_RECORD = struct.Struct("<QQ")
STREAM_SHIFT = 56
SENDER_RECORD = struct.Struct("<QQQ")
END_OF_STDIN = (1 << 64) - 1  # the sender that a record of the end names
REQUEST_MAX = 64 << 20
SPLICE = 1 << 20
# The least keep_output, and the least that is punched out at once: as much as a pipe holds.
BOUND_MIN = 65536
BOUND_STEP = 16 << 20
START_DEADLINE_S = 10.0
LOOK_S = 0.1
ORDER_DEADLINE_S = 2.0
KEEP_GOOD_S, KEEP_BAD_S = 14 * 86400, 30 * 86400
KILL_DEADLINE_NS = 2 * 10**9
# A shell on a loaded host took 2 s to find all of a tree.
CARRIER_DEADLINE_NS = 5 * 10**9
GRACE_S = 10.0
AFTER_GRACE = "corra, after the grace"  # the sender of a stop's KILL
PATH = b"/usr/local/bin:/usr/bin:/bin"  # for a program without PATH
SIGNALS = {
    name[3:]: getattr(_signal, name)
    for name in dir(_signal)
    if name.startswith("SIG") and "_" not in name and name not in ("SIGCLD", "SIGPOLL", "SIGIOT")
}
SIGNAL_NAMES = {number: "SIG" + name for name, number in SIGNALS.items()}
# The numbers are the same on every machine that Python's wheels are built for.
RLIMITS = {"cpu": 0, "core": 4, "files": 7, "memory": 9}
# A write failed for want of room, or of a disk that works.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class Refusal(Exception):
    """A reply that says no. `kind` is for programs, the message for people."""

    def __init__(self, kind, message, **facts):
        Exception.__init__(self, message)
        self.reply = dict(facts, error=kind, message=message)


# ============================================================ paths
# Paths, and reading a file by its path.
#
# os.path is Python code, of which a run's guards would keep 150 to 440 kB.

# The made file, compiled. Guards in a fresh interpreter get it over a pipe and trust no file.
CODE = sys._getframe().f_code


def join(above, name):
    """Return the path of `name` in the directory `above`; an absolute `name` stays as it is."""
    slash = "/" if isinstance(above, str) else b"/"
    return name if name.startswith(slash) else above.rstrip(slash) + slash + name


def absolute(path):
    parts = []
    for part in join(os.getcwd(), path).split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/" + "/".join(parts)


def parent(path):
    return path.rpartition("/")[0] or "/"


def base(path):
    return path.rpartition("/")[2]


def present(path):
    """Return whether there is anything at `path` that this user may see."""
    try:
        os.stat(path)
        return True
    except OSError:
        return False


def text_of(path):
    """Return `path` (bytes) as the text by which this Python opens the file."""
    return path.decode(sys.getfilesystemencoding(), "surrogateescape")


def octets(text):
    """Return the bytes that `text` stands for. JSON is UTF-8, whatever the locale."""
    return text.encode("utf-8", "surrogateescape")


def make_directories(path, mode):
    if not present(path):
        make_directories(parent(path), mode)
        try:
            os.mkdir(path, mode)
        except FileExistsError:
            pass  # another start has just made the directory


def slurp(path, limit=1 << 16):
    """Return the first bytes of a file, as one read gives them. Raises OSError.

    The read takes `limit` bytes of memory first, and a login's limits may leave little of it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.read(fd, limit)
    finally:
        os.close(fd)


def beside(name):
    """Return the path of a file in the made file's directory."""
    return join(parent(absolute(CODE.co_filename)), name)


# ============================================================ kernel
# Pipes, disks and clocks of the kernel, by the C library's own functions.

SEEK_CUR, SEEK_END = 1, 2  # os has these names, posix doesn't
PIPE_MAX = 256 * 1024
# How much of a disk corra leaves free: FLOOR, or on a small disk its last twentieth.
FLOOR = 1 << 30
FLOOR_SHARE = 20


def now_ns():
    return int(time.time() * 1e9)


def mono_ns():
    return int(time.monotonic() * 1e9)


class _Int(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "i"


class _Long(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "l"


class _Offset(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "q"


class Byte(_ctypes._SimpleCData):  # type: ignore[type-arg]
    _type_ = "c"


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    # Not long: the upper half of a register that holds an int is undefined, so -1 could be above 0.
    _restype_ = _Int


class _LongFunction(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


def c_function(name, kind=_Function):
    """Return a function of the C library.

    ctypes itself is Python code: 3 ms of a start, and 250 kB of each guard.
    """
    return kind(_ctypes.dlsym(_ctypes.dlopen(None, os.RTLD_NOW), name))


_splice, syscall = c_function("splice", _LongFunction), c_function("syscall", _LongFunction)
prctl, _statfs, c_fork = c_function("prctl"), c_function("statfs"), c_function("fork")
F_SETPIPE_SZ, _F_GETPIPE_SZ = 1031, 1032
_FIONREAD = 0x541B


def checked(result):
    if result < 0:
        number = _ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def splice(source, target, size):
    """Move up to `size` bytes from a pipe into a file in one step; return how many, 0 at the end.

    Raises OSError; BlockingIOError where the pipe is empty, or where the target is full.
    """
    while True:
        # 3: SPLICE_F_MOVE | SPLICE_F_NONBLOCK
        result = _splice(source, None, target, None, _Long(size), 3)
        if result >= 0 or _ctypes.get_errno() != errno.EINTR:
            return checked(result)


def widen(pipe, factor=2):
    """Enlarge a pipe by `factor`, up to PIPE_MAX.

    256 KiB are as fast as 1 MiB. 64 pipes of 1 MiB would use up an ordinary user's
    pipe-user-pages-soft, after which each new pipe holds 8 KiB.
    """
    try:
        size = fcntl.fcntl(pipe, _F_GETPIPE_SZ)
        if size < PIPE_MAX:
            fcntl.fcntl(pipe, F_SETPIPE_SZ, min(size * factor, PIPE_MAX))
    except OSError:
        pass  # not a pipe, or this user has no pages for pipes left


def stop_tracing(pid, number):
    """Let a child go on that made this process its tracer, with the signal that it had stopped for.

    The TRAP is the kernel's own: a traced process gets it at each exec.
    """
    number = 0 if number == _signal.SIGTRAP else number
    c_function("ptrace")(17, pid, None, _Long(number))  # PTRACE_DETACH


def unread(fifo):
    """Return how many bytes a FIFO holds."""
    return struct.unpack("i", fcntl.ioctl(fifo, _FIONREAD, b"\0" * 4))[0]


def give_back():
    """Give the C library's free memory back to the kernel. Three guards would keep it for weeks."""
    try:
        c_function("malloc_trim")(0)
    except OSError:
        pass  # musl has no malloc_trim, and keeps little


def wide(name):
    """Return the C library's function with 64-bit offsets; in musl it has the plain name."""
    try:
        return c_function(name + "64")
    except OSError:
        return c_function(name)


def punch(file, end, begin=0):
    """Give a file's disk from `begin` to `end` back; its length and every offset stay.

    Raises OSError: EOPNOTSUPP where the file system has no holes.
    """
    while True:
        # 3: FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        result = wide("fallocate")(file, 3, _Offset(begin), _Offset(end - begin))
        if result >= 0 or _ctypes.get_errno() != errno.EINTR:
            return checked(result)


def wipe(file, begin, end):
    """Give a part of a file back to the disk; overwrite it where there are no holes."""
    try:
        if begin < end:
            punch(file, end, begin)
    except OSError:
        while begin < end:
            begin += os.pwrite(file, b"\0" * min(end - begin, 65536), begin)


def file_system(path):
    """Return the statfs type of `path`."""
    buffer = (Byte * 512)()
    checked(_statfs(path.encode(sys.getfilesystemencoding(), "surrogateescape"), buffer))
    return struct.unpack_from("@l", buffer.raw)[0] & 0xFFFFFFFF


def free_room(file):
    """Return how many bytes the disk under `file` has above its floor."""
    disk = os.fstatvfs(file)
    return disk.f_bavail * disk.f_frsize - min(FLOOR, disk.f_blocks * disk.f_frsize // FLOOR_SHARE)


# ============================================================ processes
# Processes: fork thinly, look at a process or a tree, signal it.

# The numbers of system calls for which the C library has no function.
_WAITID = {
    "x86_64": 247,
    "aarch64": 95,
    "riscv64": 95,
    "ppc64le": 272,
    "s390x": 281,
    "i686": 284,
    "armv7l": 280,
}
_PIDFD_SEND_SIGNAL, _PIDFD_OPEN = 424, 434
ENDS = (1, 2, 3)  # CLD_EXITED, CLD_KILLED, CLD_DUMPED: the si_code of a process that is dead


def become(title):
    """Name this process and make it the subreaper of its descendants (a flag that fork drops)."""
    prctl(15, title, 0, 0, 0)
    prctl(36, 1, 0, 0, 0)


def fork_thin():
    """Fork by the C library alone; this process has one thread. Raises OSError.

    Python's own fork writes to 15 pages that parent and child would share. Before Python 3.8 the
    child needs it, or would hear no signals.
    """
    return checked(c_fork()) if sys.version_info >= (3, 8) else os.fork()


def usage(pid):
    """Return the resource usage of a dead child that isn't reaped; None on an unknown machine.

    os.waitid drops the usage; the raw system call returns it.
    """
    number = _WAITID.get(os.uname().machine)
    if number is None:
        return None
    info, spent = (Byte * 128)(), (Byte * 256)()
    if syscall(number, os.P_PID, pid, info, os.WEXITED | os.WNOHANG | os.WNOWAIT, spent) < 0:
        return None
    (
        u_s,
        u_us,
        s_s,
        s_us,
        rss,
        _,
        _,
        _,
        minor,
        major,
        _,
        inblock,
        oublock,
        _,
        _,
        _,
        voluntary,
        forced,
    ) = struct.unpack_from("@18l", spent.raw)
    return (
        u_s * 10**6 + u_us,
        s_s * 10**6 + s_us,
        rss,
        minor,
        major,
        inblock,
        oublock,
        voluntary,
        forced,
    )


def pidfd(pid):
    """Return a descriptor that never means another process. Raises OSError, as before Linux 5.3."""
    return checked(syscall(_PIDFD_OPEN, pid, 0))


def signal_process(pid, start, number):
    """Signal the process `pid` that began at `start`; return whether that process was there.

    The start time is read after the pidfd is open, which can't come to mean a stranger.
    """
    if pid <= 1:
        return False
    try:
        handle = pidfd(pid)
    except OSError as error:
        if error.errno != errno.ENOSYS:
            return False
        handle = -1
    try:
        seen = process(pid)
        if seen is None or (start and seen[2] != start):
            return False
        if handle < 0:
            os.kill(pid, number)
        else:
            checked(syscall(_PIDFD_SEND_SIGNAL, handle, number, None, 0))
        return True
    except (ProcessLookupError, PermissionError):
        return False  # gone, or another user's by now: a count of survivors will show it
    finally:
        if handle >= 0:
            os.close(handle)


def peek_end(kind, pid, wait=0):
    """Return waitid's facts about a dead child without reaping it, or None.

    A program that asks to be traced (PTRACE_TRACEME) makes its parent its tracer. Then waitid
    reports each of its stops as well, asked for or not, and only the tracer can let it go on.
    Raises ChildProcessError.
    """
    while True:
        info = os.waitid(kind, pid, os.WEXITED | os.WNOWAIT | wait)
        if info is None or not info.si_pid or info.si_code in ENDS:
            return info if info and info.si_pid else None
        os.waitid(os.P_PID, info.si_pid, os.WSTOPPED | os.WNOHANG)
        stop_tracing(info.si_pid, info.si_status & 0x7F)


def ended(pid):
    """Return the raw wait status of the child `pid`, or None while it lives, without reaping it.

    Raises ChildProcessError.
    """
    info = peek_end(os.P_PID, pid, os.WNOHANG)
    if info is None:
        return None
    return (
        info.si_status << 8
        if info.si_code == 1
        else info.si_status | (0x80 if info.si_code == 3 else 0)
    )


def boot_id():
    return slurp("/proc/sys/kernel/random/boot_id").decode().strip()


def process(pid):
    """Return (state letter, parent, start time in ticks, name) of a process, or None.

    Raises OSError where that can't be found out, as without a descriptor left.
    """
    try:
        text = slurp("/proc/%d/stat" % pid).decode("ascii", "replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    # Split at the last ")": a program may call itself "a) Z 1 1 (".
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    # A process whose first thread has ended is shown as a zombie, and its other threads go on.
    state = "S" if fields[0] == "Z" and int(fields[17]) > 1 else fields[0]
    return state, int(fields[1]), int(fields[19]), head.partition("(")[2]


def status_word(pid, name):
    """Return the first word behind `name` in /proc/PID/status, "0" where there is none."""
    try:
        lines = slurp("/proc/%d/status" % pid).decode("ascii", "replace").splitlines()
    except OSError:
        return "0"
    return next((line.split()[1] for line in lines if line.startswith(name + ":")), "0")


def is_waiting(pid, number):
    """Return whether the blocked signal `number` has come to a process."""
    return bool(int(status_word(pid, "ShdPnd"), 16) >> (number - 1) & 1)


def process_tree(roots, spared=()):
    """Return {pid: (state, parent, start, name)} of all living descendants of `roots`.

    The processes `spared` and their descendants are left out.
    """
    seen, children = {}, {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            found = process(int(entry))
            if found is not None:
                seen[int(entry)] = found
                children.setdefault(found[1], []).append(int(entry))
    below, queue = {}, list(roots)
    while queue:
        for pid in children.get(queue.pop(), ()):
            if pid not in below and pid not in spared:
                below[pid] = seen[pid]
                queue.append(pid)
    return {pid: found for pid, found in below.items() if found[0] not in "ZX"}


def children(pid):
    """Return the pids of a single-threaded process's children, zombies included.

    This reads one small file; `process_tree` looks at every process of the machine.
    """
    try:
        return [
            int(each) for each in slurp("/proc/%d/task/%d/children" % (pid, pid), 1 << 20).split()
        ]
    except OSError:
        return list(process_tree([pid]))  # a kernel without CONFIG_PROC_CHILDREN


def kill_tree(roots, spared=()):
    """KILL all descendants of `roots`; return how many.

    Every process is stopped first, until a walk finds no new one. So none can fork and get away.
    """
    stopped = {}
    for _ in range(200):
        fresh = {
            pid: found for pid, found in process_tree(roots, spared).items() if pid not in stopped
        }
        if not fresh:
            break
        for pid, found in fresh.items():
            signal_process(pid, found[2], _signal.SIGSTOP)
            stopped[pid] = found[2]
    for pid, start in stopped.items():
        signal_process(pid, start, _signal.SIGKILL)
    return len(stopped)


def oom_kills():
    """Return how many processes the kernel has ever killed for want of memory.

    The count is that of this process's memory cgroup, or of the machine where there is none.
    """
    places = []
    for line in slurp("/proc/self/cgroup").decode("utf-8", "surrogateescape").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            places.append("/sys/fs/cgroup" + path + "/memory.events")
        elif "memory" in controllers.split(","):
            places.append("/sys/fs/cgroup/memory" + path + "/memory.oom_control")
    for place in places + ["/proc/vmstat"]:
        try:
            for line in slurp(place).splitlines():
                if line.startswith(b"oom_kill "):
                    return int(line.split()[1])
        except OSError:
            continue
    return 0


# ============================================================ records
# JSON, and the keeper's record: one page that is read and written as a whole.

def to_json(value):
    """Return `value` as ASCII JSON.

    The json package would cost 25 ms and 1.2 MB, for its regular expressions.
    """
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if isinstance(value, dict):
        return (
            "{"
            + ", ".join(to_json(str(key)) + ": " + to_json(each) for key, each in value.items())
            + "}"
        )
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(to_json, value)) + "]"
    return _json.encode_basestring_ascii(value)


class _Scanner:
    """The settings for json's own scanner, which is written in C."""

    strict, object_hook, object_pairs_hook, parse_float, parse_int = True, None, None, float, int
    parse_constant = float  # NaN and Infinity: `complaints` refuses them by the name of their key


def from_json(data):
    """Return the value of JSON `data` (bytes, UTF-8). Raises ValueError, RecursionError."""
    text = data.decode().strip(" \t\r\n")
    try:
        value, end = _json.make_scanner(_Scanner)(text, 0)
    except (StopIteration, SystemError):
        # SystemError: the scanner's own exception is in json.decoder, which isn't imported.
        raise ValueError("not JSON") from None
    if end != len(text):
        raise ValueError("not JSON: more after its end")
    return value


def pack(lines):
    """Return a page of `lines` and their checksum; a full one loses its oldest "sent" lines."""
    lines = [" ".join(str(word) for word in line).replace("\n", " ") for line in lines]
    while True:
        body = ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")
        page = b"corra %d %08x %d\n" % (LAYOUT, zlib.crc32(body), len(body)) + body
        if len(page) <= PAGE:
            return page.ljust(PAGE, b"\n")
        oldest = next(
            (at for at, line in enumerate(lines) if line.startswith("sent ")), len(lines) - 1
        )
        if lines[oldest].startswith("sent "):
            del lines[oldest]
        else:
            lines[oldest] = lines[oldest][: len(lines[oldest]) // 2]


def unpack(page):
    """Return the lines of a page as lists of words; None for a page that is empty or torn."""
    head, _, rest = page.partition(b"\n")
    words = head.split()
    try:
        size, expected = int(words[3]), int(words[2], 16)
    except (IndexError, ValueError):
        return None
    body = rest[:size]
    if words[0] != b"corra" or zlib.crc32(body) != expected:
        return None
    return [line.split(" ") for line in body.decode("utf-8", "surrogateescape").split("\n")[:-1]]


class Record:
    """What the keeper knows and others need: the first page of the slot."""

    def __init__(self):
        self.phase = "live"
        self.agent = 0
        self.guards = []  # (pid, start), the outermost first
        self.sent = []  # (time ns, signal name, request id, to, by)
        # [request id, reason, monotonic ns of the KILL, "grace" | "killing" | "done"]
        self.stop = None
        self.survivors = []  # (pid, start)
        self.blocked = None  # (since ns, errno)
        self.outcome = None  # (status, end ns, elapsed ns, reason)
        self.usage = None
        self.lengths = {}
        self.ooms = None  # the count of oom kills at the launch
        self.courier = 0  # the courier's pid, while it lives

    def page(self):
        lines = [
            ("phase", self.phase),
            ("agent", self.agent),
            ["guards"] + ["%d/%d" % each for each in self.guards],
        ]
        lines += [("length", name, length) for name, length in sorted(self.lengths.items())]
        lines += [("outcome",) + self.outcome] if self.outcome else []
        lines += [("usage",) + tuple(self.usage)] if self.usage else []
        lines += [["stop"] + self.stop] if self.stop else []
        lines += [("blocked",) + self.blocked] if self.blocked else []
        lines += [("ooms", self.ooms)] if self.ooms is not None else []
        lines += [("courier", self.courier)] if self.courier else []
        lines += [("survivor",) + each for each in self.survivors[:32]]
        lines += [("sent",) + each for each in self.sent]
        return pack(lines)

    @classmethod
    def read(cls, page):
        """Return the record in `page`; None for a page that is empty or torn."""
        lines = unpack(page)
        if lines is None:
            return None
        record = cls()
        for key, *words in lines:
            if key == "phase":
                record.phase = words[0]
            elif key == "agent":
                record.agent = int(words[0])
            elif key == "guards":
                record.guards = [tuple(map(int, word.split("/"))) for word in words]
            elif key == "length":
                record.lengths[words[0]] = int(words[1])
            elif key == "outcome":
                record.outcome = (int(words[0]), int(words[1]), int(words[2]), words[3])
            elif key == "usage":
                record.usage = tuple(int(word) for word in words)
            elif key == "stop":
                record.stop = [words[0], words[1], int(words[2]), words[3]]
            elif key == "blocked":
                record.blocked = (int(words[0]), int(words[1]))
            elif key == "ooms":
                record.ooms = int(words[0])
            elif key == "courier":
                record.courier = int(words[0])
            elif key == "survivor":
                record.survivors.append((int(words[0]), int(words[1])))
            elif key == "sent":
                record.sent.append(
                    (int(words[0]), words[1], words[2], words[3], " ".join(words[4:]))
                )
        return record


# ============================================================ files
# Files of an open directory: make, read, replace and remove them by name.

def fill(directory, name, data, mode=0o600):
    fd = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode, dir_fd=directory)
    try:
        while data:
            data = data[os.write(fd, data) :]
    finally:
        os.close(fd)


def fill_in_place(directory, name, data):
    """Make a file that will be overwritten in place, which works on a full disk."""
    file = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
    try:
        # btrfs needs room to overwrite in place, unless NOCOW was set while the file was empty.
        fcntl.ioctl(file, 0x40086602, struct.pack("l", 0x00800000))
    except OSError:
        pass
    os.write(file, data)
    os.close(file)


def replace(directory, name, data):
    """Replace the content of a file in one step. Raises OSError; the old content is there then."""
    new = "%s.%s" % (name, os.urandom(4).hex())
    try:
        fill(directory, new, data)
        os.rename(new, name, src_dir_fd=directory, dst_dir_fd=directory)
    except OSError:
        if exists(directory, new):
            os.unlink(new, dir_fd=directory)
        raise


def discard(above, name):
    """Remove a directory such as a run's, and all that is in it."""
    directory = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)
    try:
        for entry in os.listdir(directory):
            try:
                os.unlink(entry, dir_fd=directory)
            except IsADirectoryError:
                discard(directory, entry)
    finally:
        os.close(directory)
    os.rmdir(name, dir_fd=above)


def read_file(directory, name, limit=REQUEST_MAX):
    """Return a file's bytes; None where there is no file."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    with open(fd, "rb", 0) as file:
        # No more than there is: read(limit) would take that much memory first.
        return file.read(min(limit, os.fstat(fd).st_size + 1))


def exists(directory, name):
    try:
        os.stat(name, dir_fd=directory, follow_symlinks=False)
        return True
    except FileNotFoundError:
        return False


# ============================================================ bounds
# Bounded streams: `keep_output` gives a stream's beginning back to the disk.

HEAD = struct.Struct("<QQ")  # an offset and its complement, so that a torn record shows
HEAD_MASK = (1 << 64) - 1


def prepare_bound(directory, names):
    """Make the file `heads`. Raises OSError: EOPNOTSUPP where the file system has no holes."""
    fill_in_place(directory, "heads", HEAD.pack(0, HEAD_MASK) * (len(names) + 1))
    file = os.open("index", os.O_WRONLY, dir_fd=directory)
    try:
        punch(file, PAGE)
    except OSError as error:
        raise OSError(
            error.errno, "its file system can't give back the beginning of a file"
        ) from None
    finally:
        os.close(file)


def read_heads(directory, names):
    """Return {name: offset of its first byte} for the streams `names` and the index.

    It is {} where no stream is bounded.
    """
    names = list(names) + ["index"]
    for _ in range(100):
        data = read_file(directory, "heads", HEAD.size * len(names))
        if data is None:
            return {}
        found = [head for head, check in HEAD.iter_unpack(data) if head ^ check == HEAD_MASK]
        if len(found) == len(names):
            return dict(zip(names, found))
    # The machine went down during a write. Run.heads asks the files themselves then.
    return dict.fromkeys(names, 0)


def first_data(directory, name):
    """Return where a file's first data begins, as the file system says.

    This is true after a power cut; `heads` may not be.
    """
    try:
        file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return 0
    try:
        return os.lseek(file, 0, os.SEEK_DATA)
    except OSError as error:
        # ENXIO: the file has nothing but holes.
        return os.fstat(file).st_size if error.errno == errno.ENXIO else 0
    finally:
        os.close(file)


class Bound:
    """Keeps the last `keep` bytes of a growing file, and up to a sixteenth more.

    What is before them is punched out. The file's new beginning is written to `heads` before the
    hole is made: a reader that reads bytes first and `heads` afterwards knows whether those bytes
    may have been a hole. After a keeper's death the next keeper punches from the beginning anew.
    """

    def __init__(self, number, file, heads, keep):
        self.number, self.file, self.heads, self.keep = number, file, heads, keep
        self.spare = min(max(keep // 16, BOUND_MIN), BOUND_STEP)
        head, check = HEAD.unpack(os.pread(heads, HEAD.size, number * HEAD.size))
        self.head = head if head ^ check == HEAD_MASK else 0

    def trim(self):
        """Punch out what is more than `keep`, once it is more by `spare`."""
        self.cut(self.keep, self.spare)

    def give_way(self):
        """Punch out a sixteenth of `keep` as well, for a full disk; return how many bytes.

        Else a stream at its bound could never write again on that disk.
        """
        return self.cut(max(0, self.keep - max(self.keep // 16, PAGE)), 0)

    def cut(self, keep, spare):
        end = (os.fstat(self.file).st_size - keep) // PAGE * PAGE
        if end - self.head <= spare:
            return 0
        try:
            os.pwrite(self.heads, HEAD.pack(end, end ^ HEAD_MASK), self.number * HEAD.size)
            punch(self.file, end)
        except OSError as error:
            if error.errno not in FULL:
                raise
            return 0  # to make room takes room, and there is none: try the next time
        freed, self.head = end - self.head, end
        return freed


# ============================================================ spool
# The spool: the roots that hold runs, and the making of a run's directory.

# By statfs type: a stalled server would hold the keeper in splice, and so the program.
REMOTE_TYPES = {
    0x6969: "NFS",
    0xFF534D42: "CIFS",
    0xFE534D42: "SMB",
    0x517B: "SMB",
    0x65735546: "FUSE",
    0x5346414F: "AFS",
    0x01021997: "9P",
    0x00C36400: "Ceph",
    0x0BD00BD0: "Lustre",
    0x47504653: "GPFS",
}


def user_name(uid=None):
    import pwd

    uid = os.geteuid() if uid is None else uid
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def home():
    """Return this user's home directory, or None.

    A $HOME that belongs to another user isn't taken: sudo without -H leaves one.
    """
    import pwd

    path = text_of(os.environ.get(b"HOME", b""))
    try:
        if path.startswith("/") and os.stat(path).st_uid == os.geteuid():
            return path
    except OSError:
        pass
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir or None
    except KeyError:
        return None


def roots(request):
    """Return the directories that may hold runs, the best one first."""
    if request.get("spool"):
        return [absolute(text_of(octets(request["spool"])))]
    found = []
    state = text_of(os.environ.get(b"XDG_STATE_HOME", b""))
    if not state.startswith("/"):
        at = home()
        state = join(at, ".local/state") if at else ""
    if state:
        found.append(join(state, "corra"))
    return found + ["/var/tmp/corra-%d" % os.geteuid()]


def secure(path):
    """Open a directory that is this user's and that nobody else can write to.

    Raises OSError: EPERM where another user owns it or can write to it.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        os.close(fd)
        raise PermissionError(errno.EPERM, "others can write to it or own it", path)
    return fd


def prepare_root(root):
    """Make ROOT/runs and return its descriptor. Raises OSError, which says what is in the way."""
    above = root
    while not present(above):
        above = parent(above)
    kind = REMOTE_TYPES.get(file_system(above))
    if kind:
        raise OSError(errno.EREMOTE, "is on a remote file system (%s)" % kind, root)
    make_directories(join(root, "runs"), 0o700)
    os.close(secure(root))
    return secure(join(root, "runs"))


def claim(runs, prog_id, request, feed, token):
    """Make the run's directory; return whether this start was the first to do so.

    It is made under another name and renamed, so that it is there as a whole or not at all.
    Raises OSError where there is no room. Nothing is left behind then.
    """
    temporary = ".new-%s-%d-%s" % (prog_id, os.getpid(), os.urandom(4).hex())
    os.mkdir(temporary, 0o700, dir_fd=runs)
    directory = os.open(temporary, os.O_RDONLY | os.O_DIRECTORY, dir_fd=runs)
    try:
        fill_in_place(directory, "exit", b"\n" * PAGE * 2)
        fill(directory, "program.json", to_json(request).encode() + b"\n")
        os.mkdir("fifo", 0o700, dir_fd=directory)
        for name in stream_names(request):
            fill(directory, name, b"")
        for name in fifo_names(request):
            os.mkfifo("fifo/" + name, 0o600, dir_fd=directory)
        if takes_more(request):
            fill(directory, "stdin", b"")
            fill(directory, "senders", SENDER_RECORD.pack(0, 0, 0))
        fill(directory, "index", b"")
        if (request.get("run") or {}).get("keep_output"):
            prepare_bound(directory, stream_names(request))
        fill(directory, "keeper", b"")
        os.mkfifo("control", 0o600, dir_fd=directory)
        if request.get("callback"):
            fill(directory, "courier.json", b" " * PAGE)
            fill(directory, "token", octets(token or ""))
        if feed:
            feed(directory)
        fill(directory, "launched.tmp", b" " * 255 + b"\n")  # the last: `abandoned` asks its age
        try:
            os.rename(temporary, prog_id, src_dir_fd=runs, dst_dir_fd=runs)
            return True
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise
        discard(runs, temporary)
        return False
    except BaseException:
        discard(runs, temporary)
        raise
    finally:
        os.close(directory)


def stream_names(request):
    return (
        ["output"]
        if request["program"].get("merge") or request["program"].get("pty")
        else ["stdout", "stderr"]
    )


def fifo_names(request):
    """Return the names of the program's ends that are FIFOs. A program on a terminal has none."""
    if request["program"].get("pty"):
        return []
    return stream_names(request) + (["stdin"] if takes_more(request) else [])


def takes_more(request):
    """Return whether the program's stdin is held open, so that bytes may be sent while it runs."""
    source = request["program"].get("stdin")
    return bool(request["program"].get("pty")) or (
        isinstance(source, dict) and bool(source.get("open"))
    )


def read_launched(text):
    """Return (pid, start, boot id, time ns, monotonic ns) of the launched program, or None."""
    words = (text or b"").split()
    return (
        (int(words[0]), int(words[1]), words[2].decode(), int(words[3]), int(words[4]))
        if len(words) == 5
        else None
    )


def launched_by(directory, files):
    """Return the launched process as `read_launched` does, or None before the program's claim.

    The claim is the name `launched`; where the whole spool was deleted, it is the open file.
    """
    launched = read_launched(os.pread(files["launched"], 256, 0))
    if launched and os.fstat(files["launched"]).st_nlink == 1 and not exists(directory, "launched"):
        return None
    return launched


def abandoned(directory):
    """Return whether nobody may launch the run any more: its claim is older than a start may take.

    It says nothing of a run that has guards or was launched. A guard asks this before it launches,
    and a reader once it has seen the lock free, so both give the same answer.
    """
    try:
        claimed_s = os.stat("launched.tmp", dir_fd=directory, follow_symlinks=False).st_mtime
    except FileNotFoundError:
        return not exists(directory, "launched")
    return abs(time.time() - claimed_s) > START_DEADLINE_S


def stdin_facts(directory):
    """Return the State's `stdin`: bytes accepted, bytes moved, and whether it has ended.

    It is None where stdin isn't held open.
    """
    try:
        fd = os.open("senders", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    except FileNotFoundError:
        return None
    try:
        length = os.stat("stdin", dir_fd=directory, follow_symlinks=False).st_size
        return {
            "length": length,
            "moved": min(length, SENDER_RECORD.unpack(os.pread(fd, 24, 0))[0]),
            "ended": end_of_stdin(fd) is not None,
        }
    except (OSError, struct.error):
        return None
    finally:
        os.close(fd)


def end_of_stdin(senders):
    """Return where a stdin that was held open ends, or None while more may come.

    No sender is accepted after the record of the end.
    """
    last = os.fstat(senders).st_size // SENDER_RECORD.size - 1
    if last < 1:
        return None
    who, offset, _ = SENDER_RECORD.unpack(
        os.pread(senders, SENDER_RECORD.size, last * SENDER_RECORD.size)
    )
    return offset if who == END_OF_STDIN else None


# ============================================================ hindrance
# What keeps a run's keeper from its work, and what is due meanwhile.
#
# Readers find it out by themselves, in /proc: a guard that can't work can't say so either.

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


# ============================================================ run
# A run as a reader sees it: its files, its lock, and the State that follows from both.

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


# ============================================================ guards/limits
# The program's limits: rlimits, nice and its score when memory runs out.

RLIM_INFINITY = (1 << 64) - 1
CPU_GRACE_S = 5  # from SIGXCPU, which names the reason, to SIGKILL


def set_limit(name, value):
    """Set one limit of this process. Raises OSError, whose message names the limit."""
    try:
        if name in RLIMITS:
            set_resource_limit(name, value)
        elif name == "nice":
            os.setpriority(os.PRIO_PROCESS, 0, value)
        elif name == "oom_score_adj":
            fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
            try:
                os.write(fd, b"%d" % value)
            finally:
                os.close(fd)
    except OSError as error:
        raise OSError(
            error.errno, "limit %s=%s: %s" % (name, spelled(value), error.strerror)
        ) from None


def spelled(value):
    """Return a limit as the operator types it."""
    return ":".join(
        "unlimited" if each == -1 else str(each)
        for each in (value if isinstance(value, (list, tuple)) else [value])
    )


def set_resource_limit(name, value):
    """Set a soft and a hard limit; one number sets both. Raises OSError.

    The hard limit of CPU time is CPU_GRACE_S above that number, so that SIGXCPU comes first.
    """
    now, new = (Byte * 16)(), (Byte * 16)()
    prlimit = wide("prlimit")
    checked(prlimit(0, RLIMITS[name], None, now))
    most = struct.unpack("=QQ", now.raw)[1]
    if isinstance(value, (list, tuple)):
        soft, hard = (value[0], value[-1])
    else:
        soft, hard = value, value + CPU_GRACE_S if name == "cpu" and value >= 0 else value
        hard = min(hard % (1 << 64), max(most, soft % (1 << 64)))
    new.raw = struct.pack("=QQ", soft % (1 << 64), hard % (1 << 64))
    try:
        checked(prlimit(0, RLIMITS[name], new, None))
    except OSError as error:
        raise OSError(
            error.errno,
            "%s (at most %s here)"
            % (error.strerror, "unlimited" if most == RLIM_INFINITY else most),
        ) from None


# ============================================================ guards/program
# The forked child before it becomes the program: environment, ends, limits, exec.

def own_environment():
    """Return the environment that this process was started with.

    posix.environ may have an LC_CTYPE that Python has added to the C locale.
    """
    pairs = (each.partition(b"=") for each in slurp("/proc/self/environ", 8 << 20).split(b"\0"))
    return {name: value for name, _, value in pairs if name}


def environment(request, inherited):
    """Return the program's environment as bytes: inherited, set by the request, and its PROG-ID.

    corra's own variables are removed. A carrier gets the request's as CORRA_FAR_NAME, and no
    secrets.
    """
    program = request["program"]
    keep = True if program.get("env_inherit") is None else program["env_inherit"]
    wanted = None if keep is True else {octets(name) for name in keep or ()}
    made = {key: value for key, value in inherited.items() if wanted is None or key in wanted}
    made = {key: value for key, value in made.items() if not key.startswith(b"CORRA_")}
    prefix = b"CORRA_FAR_" if (request.get("run") or {}).get("carrier") else b""
    secrets = () if prefix else request.get("secret_env", {}).items()
    for name, value in list((program.get("env") or {}).items()) + list(secrets):
        if value is not None:
            made[prefix + octets(name)] = octets(value)
        elif not prefix:
            made.pop(octets(name), None)
    if program.get("pty"):
        made.setdefault(
            b"TERM",
            octets(((request.get("run") or {}).get("terminal") or {}).get("term") or "dumb"),
        )
    made[b"CORRA_PROG_ID"] = octets(request["prog_id"])
    return made


def secrets_pipe(secrets):
    """Return the read end of a pipe that holds `secrets` in the form of an environment.

    /proc shows nobody what is in a pipe. Raises OSError: E2BIG where they are more than a pipe
    takes.
    """
    data = b"".join(b"%s=%s\0" % (octets(name), octets(value)) for name, value in secrets.items())
    ours, theirs = os.pipe()
    try:
        fcntl.fcntl(theirs, F_SETPIPE_SZ, max(len(data), PAGE))
    except OSError:
        pass  # this user has no pages for pipes left: the pipe keeps its size
    os.set_blocking(theirs, False)
    if os.write(theirs, data) < len(data):
        raise OSError(errno.E2BIG, "%d bytes are more than a pipe takes" % len(data))
    os.close(theirs)
    os.set_inheritable(ours, True)
    return ours


def explain(number, path, argv, variables):
    """Return what exec's errno means for this file, or "" where strerror says enough."""
    if number == errno.E2BIG:
        longest = max(map(len, argv))
        return (
            "the longest word has %d bytes, all words and the environment %d; one may have 131071"
            % (
                longest,
                sum(map(len, argv)) + sum(len(k) + len(v) + 2 for k, v in variables.items()),
            )
        )
    try:
        head = slurp(path, 256)
    except OSError:
        head = b""
    if number == errno.ENOENT and head.startswith(b"#!"):
        line = head[2:].split(b"\n")[0]
        if line.endswith(b"\r"):
            return "its first line ends in CR LF: convert it with  sed -i 's/\\r$//' FILE"
        return "its interpreter doesn't exist: " + text_of(line.split()[0] if line.split() else b"")
    if number == errno.ENOENT and head:
        return "the file is there, but its loader (ELF interpreter) isn't"
    if number == errno.ENOEXEC:
        return "no #! line and no program of this machine's kind: run it as  sh FILE"
    if number == errno.EACCES and os.stat(path).st_mode & 0o170000 == 0o040000:
        return "is a directory"
    return ""


def candidates(argv, variables):
    """Return the files that exec tries, in the order of PATH."""
    name = octets(argv[0])
    if b"/" in name:
        return [name]
    return [join(each or b".", name) for each in variables.get(b"PATH", PATH).split(b":")]


def note_failure(slot, stage, error, message, path=None):
    """Write to the slot's second page why the program was not started.

    Bytes in a pipe would be lost with the guard that reads them.
    """
    number = getattr(error, "errno", 0) or 0
    text = message or (os.strerror(number) if number else str(error))
    lines = [
        ("stage", stage),
        ("type", errno.errorcode.get(number, type(error).__name__)),
        ("errno", number),
        ("message", text),
    ]
    os.pwrite(slot, pack(lines + ([("path", path)] if path is not None else [])), PAGE)
    os.fsync(slot)


def prefer_for_oom():
    """Have the kernel kill the program, and not a guard, when memory runs out."""
    try:
        score = int(slurp("/proc/self/oom_score_adj"))
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        os.write(fd, b"%d" % min(1000, score + 100))
        os.close(fd)
    except (OSError, ValueError):
        pass  # some containers forbid it; then program and guards are equal


def become_program(directory, files, request, inherited, guards, report, save, tell):
    """Prepare the forked child, claim `launched` and exec. Never returns.

    Nothing is started where one of the `guards` got a SIGTERM before.

    The child also writes the keeper's first record (`save`) and state.json (`tell`): the memory
    that takes ends with the exec here, while the keeper would hold it for weeks.

    A carrier (`run.carrier`) takes the program to another machine. It is executed with argv behind
    its own words. It closes $CORRA_REPORT once the program runs there, or writes "STAGE ERRNO
    WORDS" into it. Signal 33 + N asks it to send the program signal N. It exits as the program
    did. Where a signal ends a carrier, the run is lost, or not started if the carrier has reported
    that. It finds the program's variables as CORRA_FAR_NAME and the secret ones in a pipe,
    $CORRA_SECRETS; the program's cwd is left to it.
    """
    program, carrier = request["program"], (request.get("run") or {}).get("carrier")
    words = list(carrier or ()) + list(program["argv"])
    stage, where, argv = "setup", b"", [octets(word) for word in words]
    try:
        os.setsid()
        save()
        for number in range(1, _signal.NSIG):
            try:
                _signal.signal(number, _signal.SIG_DFL)
            except (OSError, ValueError):
                pass
        prefer_for_oom()
        if program.get("pty"):
            # The first terminal that a session's leader opens becomes the session's own.
            ends = [os.open(request["terminal"], os.O_RDWR)] * 3
        else:
            outputs = [
                os.open("fifo/" + name, os.O_WRONLY, dir_fd=directory)
                for name in stream_names(request)
            ]
            if program.get("stdin") is None:
                source = os.open("/dev/null", os.O_RDONLY)
            else:
                source = os.open(
                    "fifo/stdin" if takes_more(request) else "stdin", os.O_RDONLY, dir_fd=directory
                )
            ends = [source, outputs[0], outputs[-1]]
        for target, fd in enumerate(ends):
            os.dup2(fd, target)
        if program.get("umask") is not None:
            os.umask(program["umask"])
        else:
            os.umask(request["umask"])
        variables = environment(request, inherited)
        if carrier:
            os.set_inheritable(report, True)
            variables[b"CORRA_REPORT"] = b"%d" % report
            if request.get("secret_env"):
                where = b"its secrets"
                variables[b"CORRA_SECRETS"] = b"%d" % secrets_pipe(request["secret_env"])
        stage = "cwd"
        at = variables.get(b"HOME", b"/")
        if program.get("cwd") and not carrier:
            where = octets(program["cwd"])
            # `~` is the program's home, where a relative path begins as well.
            where = join(at, where[1:].lstrip(b"/") if where[:2] in (b"~", b"~/") else where)
            os.chdir(where)
        else:
            try:
                os.chdir(at)
            except OSError:
                os.chdir("/")
        stage, where = "setup", b""
        if any(is_waiting(each, _signal.SIGTERM) for each in guards):
            raise InterruptedError(errno.EINTR, "SIGTERM came to its guards before it was started")
        pid = os.getpid()
        text = "%d %d %s %d %d" % (pid, process(pid)[2], boot_id(), now_ns(), mono_ns())
        os.pwrite(files["launched"], text.encode().ljust(255), 0)
        os.fsync(files["launched"])
        # Limits come last, since they hold for this code too; memory after the other limits.
        for name, value in sorted(
            (program.get("limits") or {}).items(), key=lambda each: each[0] == "memory"
        ):
            if value is not None:
                set_limit(name, value)
        try:
            os.link("launched.tmp", "launched", src_dir_fd=directory, dst_dir_fd=directory)
        except FileExistsError:
            os._exit(127)  # launched before, by a guard that has the status
        # After a crash from here on the host must know that exec was tried: a repeated start would
        # run the program again.
        os.fsync(directory)
        tell()
        stage, worst, where = "exec", None, argv[0]
        # The mask goes last: a TERM since the fork must end the program and not this code.
        _signal.pthread_sigmask(_signal.SIG_SETMASK, [])
        for path in candidates(words, variables):
            try:
                os.execve(path, argv, variables)
            except OSError as error:
                # As execvp: a file that isn't there doesn't hide one that may not be run.
                if worst is None or error.errno not in (errno.ENOENT, errno.ENOTDIR):
                    worst, where = error, path
                if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.EACCES):
                    break
        message, path = explain(worst.errno, where, argv, variables), None
        if b"/" not in argv[0] and worst.errno == errno.ENOENT and not message:
            path = text_of(variables.get(b"PATH", PATH))
        note_failure(files["exit"], stage, worst, message, path)
    except Exception as error:
        try:
            words = getattr(error, "strerror", None) or ""
            note_failure(
                files["exit"], stage, error, "%s: %s" % (text_of(where), words) if where else words
            )
        except OSError:
            pass
    finally:
        os._exit(127)


# ============================================================ guards/output
# The program's output, on its way from the FIFOs into the spool.

INDEX_EVERY_NS = 10 * 10**6
ROOM_STEP = 16 << 20


class Stream:
    """One of the program's outputs: a FIFO, and the file that its bytes are moved to."""

    def __init__(self, number, name, fifo, file, bound):
        self.number, self.name, self.fifo, self.file, self.bound = number, name, fifo, file, bound
        self.open = True
        self.blocked = False
        self.full = 0
        self.room = 0
        self.stamp = 0
        self.held = b""  # read but not yet written, only where splice isn't possible

    def length(self):
        return os.fstat(self.file).st_size

    def coming(self):
        """Return how many bytes the program has written that aren't in the file yet."""
        return len(self.held) + unread(self.fifo)

    def has_room(self):
        """Return whether the disk is above its floor.

        The disk is asked again after half as many bytes as were free, at most ROOM_STEP.
        """
        if self.room <= 0:
            if not os.fstat(self.file).st_nlink:
                os.ftruncate(self.file, 0)  # deleted: it mustn't fill the disk for no reader
            self.room = min(free_room(self.file) // 2, ROOM_STEP)
            if self.room <= 0:
                self.room = self.give_way()
        return self.room > 0

    def give_way(self):
        """Make room by the beginning of a bounded stream; return how many bytes."""
        return self.bound.give_way() if self.bound else 0

    def move(self):
        """Move bytes from the FIFO into the file; return how many, 0 at the end, None if empty."""
        if self.held:
            self.write_held()
        try:
            moved = splice(self.fifo, self.file, SPLICE)
        except BlockingIOError:
            return None
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            try:
                self.held = os.read(self.fifo, 65536)
            except BlockingIOError:
                return None
            moved = len(self.held)
            self.write_held()
        self.room -= moved
        if self.bound:
            self.bound.trim()
        # 4 full splices in a row: the program is faster than the keeper.
        self.full = self.full + 1 if moved >= 65536 else 0
        if self.full >= 4:
            self.full = 0
            widen(self.fifo)
        return moved

    def write_held(self):
        while self.held:
            self.held = self.held[os.write(self.file, self.held) :]


class Pump:
    """Moves the program's output into the spool, notes its times, and pauses on a full disk."""

    def __init__(self, files, request, poll):
        self.index, self.poll = files["index"], poll
        names, keep = stream_names(request), (request.get("run") or {}).get("keep_output")
        bounds = [
            Bound(number, files[name], files["heads"], int(keep)) if keep else None
            for number, name in enumerate(names + ["index"])
        ]
        self.streams = [
            Stream(number, name, files["fifo/" + name], files[name], bounds[number])
            for number, name in enumerate(names)
        ]
        self.index_bound = bounds[-1]
        for stream in self.streams:
            os.lseek(stream.file, 0, SEEK_END)
            poll.register(stream.fifo, select.POLLIN)
        self.by_fifo = {stream.fifo: stream for stream in self.streams}
        self.latest = None
        self.blocked = None  # (since ns, errno)
        self.pause_ns = self.again_at = 0

    def on(self, fifo, event):
        stream = self.by_fifo[fifo]
        if event & select.POLLIN:
            self.drain(stream)
        elif event & (select.POLLHUP | select.POLLERR):
            # Nobody holds the other end. To poll it would be a busy loop.
            stream.open = False
            self.poll.unregister(fifo)

    def drain(self, stream):
        """Move what the FIFO holds; at most 16 splices, so that other streams get a turn."""
        for _ in range(16):
            try:
                if not stream.has_room() and unread(stream.fifo):
                    self.block(stream, errno.ENOSPC)
                    return
                self.note_time(stream)
                moved = stream.move()
            except OSError as error:
                if error.errno not in FULL:
                    raise
                if stream.give_way():
                    continue
                self.block(stream, error.errno)
                return
            if not moved:
                break
        if stream.open:
            self.poll.register(stream.fifo, select.POLLIN)

    def note_time(self, stream):
        """Add a record to the index when the stream changes, or 10 ms after its last record."""
        now = now_ns()
        if (self.latest is stream and 0 <= now - stream.stamp < INDEX_EVERY_NS) or not unread(
            stream.fifo
        ):
            return
        self.latest, stream.stamp = stream, now
        try:
            size = os.fstat(self.index).st_size
            record = INDEX_RECORD.pack(now, stream.number << STREAM_SHIFT | stream.length())
            # At a multiple of the record's size, so that a torn record is overwritten.
            os.pwrite(self.index, record, size - size % INDEX_RECORD.size)
            if self.index_bound:
                self.index_bound.trim()
        except OSError:
            pass

    def block(self, stream, number):
        """Leave the bytes in the FIFO, where they hold the program back, and try again later."""
        if stream.open and not stream.blocked:
            self.poll.unregister(stream.fifo)
        stream.blocked = True
        self.blocked = self.blocked or (now_ns(), number)
        self.pause_ns = min(max(self.pause_ns * 2, 50 * 10**6), 10**9)
        self.again_at = mono_ns() + self.pause_ns

    def unblock(self):
        for stream in self.streams:
            if stream.blocked:
                stream.blocked, stream.room = False, 0
                if stream.open:
                    self.poll.register(stream.fifo, select.POLLIN)
                self.drain(stream)
        if not any(stream.blocked for stream in self.streams):
            self.pause_ns, self.blocked = 0, None

    def close(self):
        """Expect no output: no program was started, so nobody will ever hang up."""
        for stream in self.streams:
            stream.open = False

    def open(self):
        return any(stream.open for stream in self.streams)

    def written(self):
        """Return how many bytes the program has written to each stream, moved or not."""
        return {stream.name: stream.length() + stream.coming() for stream in self.streams}

    def short_of(self, lengths):
        """Return whether a file is shorter than `lengths` says and more bytes are to come."""
        return any(
            stream.length() < lengths.get(stream.name, 0) and stream.coming()
            for stream in self.streams
        )


# ============================================================ guards/stdin
# The program's stdin, on its way from the spool to the program.

class Intake:
    """Moves bytes from the file `stdin` into the program's own end.

    splice moves bytes and the file's position in one step of the kernel, and all guards share that
    position, since they inherit one open file. So after any kill the next guard goes on at the very
    byte. If the keeper saved the position itself, a kill between the write and the save would leave
    it wrong. To a terminal the bytes go through a pipe, which all guards hold as well.
    """

    def __init__(self, directory, files, poll, forgets):
        """Go on at the position that the guards share. `forgets`: wipe what was read."""
        self.directory, self.files, self.poll = directory, files, poll
        self.wiped = os.open("stdin", os.O_WRONLY, dir_fd=directory) if forgets else None
        self.read = 0  # by the program, and wiped
        self.look_at, self.pause_ns = None, 0  # when to see how far the program has read
        self.file, self.terminal, self.target = (
            files["stdin"],
            files.get("terminal"),
            files.get("fifo/stdin", -1),
        )
        self.waits = False  # until the program's end has room
        self.open = self.terminal is not None or self.target >= 0
        self.through = False  # a terminal is reached through the pipe
        self.noted = -1
        if self.terminal is not None:
            self.target = self.terminal
            try:
                splice(files["feeding"], self.terminal, SPLICE)
                self.through = True
            except OSError as error:
                self.through = error.errno != errno.EINVAL

    def move(self):
        """Move bytes as long as there are bytes and room."""
        if self.open:
            self.move_on()
        if self.wiped is not None:
            self.forget()

    def move_on(self):
        try:
            self.waits = self.fill()
        except BrokenPipeError:
            self.open = self.waits = False  # the program has closed it
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            self.waits = False  # no process has the terminal open: it waits for the next one
        at = os.lseek(self.file, 0, SEEK_CUR)
        if at != self.noted:
            self.noted = at
            # For the senders. The truth is the file's position.
            os.pwrite(self.files["senders"], SENDER_RECORD.pack(at, 0, 0), 0)
        if self.terminal is None and self.waits:
            self.poll.register(self.target, select.POLLOUT)
        elif self.terminal is None:
            self.unregister()

    def forget(self):
        """Wipe what the program has read, such as a password.

        Bytes in the pipe can't be wiped before: a pipe refers to the file's own pages.
        """
        at, left = os.lseek(self.file, 0, SEEK_CUR), self.left()
        if at - left > self.read:
            wipe(self.wiped, self.read, at - left)
            self.read, self.pause_ns = at - left, 0
        self.pause_ns = min(max(self.pause_ns * 2, 10 * 10**6), 5 * 10**9)
        self.look_at = mono_ns() + self.pause_ns if left else None

    def left(self):
        """Return how many bytes were moved that the program hasn't read."""
        if self.terminal is not None:
            return unread(self.files["feeding"])
        # Opened for a moment, since this guard's own end may be closed by now.
        reader = os.open("fifo/stdin", os.O_RDONLY | os.O_NONBLOCK, dir_fd=self.directory)
        try:
            return unread(reader)
        finally:
            os.close(reader)

    def forget_all(self):
        """Wipe the rest: no process is left to read it."""
        if self.wiped is not None:
            wipe(self.wiped, self.read, os.fstat(self.file).st_size)

    def fill(self):
        """Move bytes until there are none, or no room; return whether room is what is missing."""
        for _ in range(64):
            try:
                moved = pass_on(self.file, self.files["fed"] if self.through else self.target)
            except BlockingIOError:
                moved = None
            if self.through and unread(self.files["feeding"]):
                try:
                    splice(self.files["feeding"], self.terminal, SPLICE)
                    continue
                except BlockingIOError:
                    return True
            if not moved:
                return moved is None
            if moved >= 65536 and self.terminal is None:
                widen(self.target)
        return True

    def all_moved(self):
        """Return whether stdin has ended and all of it was moved. A terminal has no end."""
        return self.terminal is None and all_moved(self.files)

    def unregister(self):
        try:
            self.poll.unregister(self.target)
        except (KeyError, ValueError):
            pass

    def close(self):
        """Close this guard's end of the FIFO."""
        held = self.files.pop("fifo/stdin", None)
        if held is not None:
            self.unregister()
            os.close(held)
        self.open = self.waits = False


def all_moved(files):
    end = end_of_stdin(files["senders"])
    return end is not None and os.lseek(files["stdin"], 0, SEEK_CUR) >= end


def pass_on(file, target):
    """Move bytes from a file's position onwards in one step; return how many.

    Raises BlockingIOError where there is no room.
    """
    try:
        return splice(file, target, SPLICE)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    # A file system without splice, or a terminal before Linux 5.12. A kill between write and lseek
    # makes these bytes come twice.
    data = os.pread(file, 2048, os.lseek(file, 0, SEEK_CUR))
    sent = os.write(target, data) if data else 0
    os.lseek(file, sent, SEEK_CUR)
    return sent


# ============================================================ guards/terminal
# The program's terminal, and the pipes through which it is read and fed.

class Terminal:
    """The master of the program's terminal.

    Its output goes into a pipe of the guards and from there into the file, as any output does.
    """

    def __init__(self, files, pump, poll):
        self.master, self.pipe, self.pump, self.poll = files["terminal"], files["said"], pump, poll
        self.stream = pump.streams[0]
        self.heed_at = None  # when to see whether a process has opened it again

    def watch(self, writing):
        """Register what to wake up for: nothing after a hang-up, which poll reports for ever."""
        wanted = (0 if self.stream.blocked else select.POLLIN) | (select.POLLOUT if writing else 0)
        if self.heed_at is None and self.stream.open:
            self.poll.register(self.master, wanted)

    def hear(self):
        """Move what was written to the terminal; return False after a hang-up and the last byte."""
        for _ in range(64):
            try:
                moved = self.take()
            except BlockingIOError:
                moved = None
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                moved = 0
            if unread(self.stream.fifo):
                self.pump.drain(self.stream)
                if self.stream.blocked:
                    return True
            if not moved:
                return moved is None
        return True

    def take(self):
        try:
            return splice(self.master, self.pipe, SPLICE)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        # Linux 5.10 has no splice for terminals. A kill between read and write loses what was read.
        if unread(self.stream.fifo) > 32768:
            raise BlockingIOError
        return os.write(self.pipe, os.read(self.master, 4096))

    def hung_up(self, ended):
        """No process has it open. After the program's end that is the end of the output.

        Before that a process may open it again, as login does.
        """
        try:
            self.poll.unregister(self.master)
        except KeyError:
            pass
        if ended and not unread(self.stream.fifo):
            self.stream.open, self.heed_at = False, None
        else:
            self.heed_at = mono_ns() + int(LOOK_S * 1e9)

    def resize(self, rows, columns):
        """Set the terminal's size. The foreground gets SIGWINCH even for the same size.

        An operator who has just attached wants the screen drawn anew.
        """
        import termios  # in memory already, by open_terminal

        size = struct.pack("HHHH", rows, columns, 0, 0)
        if fcntl.ioctl(self.master, termios.TIOCGWINSZ, b"\0" * 8)[:4] == size[:4]:
            # The kernel sends the signal only where the size changes, but then to root's programs
            # too.
            fcntl.ioctl(
                self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns + 1, 0, 0)
            )
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, size)


def open_terminal(request, files):
    """Open the terminal and its pipes, for all guards to inherit. Raises OSError."""
    import termios

    wanted = (request.get("run") or {}).get("terminal") or {}
    files["terminal"], slave = os.openpty()
    fcntl.ioctl(
        slave,
        termios.TIOCSWINSZ,
        struct.pack("HHHH", wanted.get("rows") or 24, wanted.get("columns") or 80, 0, 0),
    )
    modes = termios.tcgetattr(slave)
    modes[0] |= 0x4000  # IUTF8: a rubout takes a character and not a byte
    termios.tcsetattr(slave, termios.TCSANOW, modes)
    request["terminal"] = os.ttyname(slave)
    os.close(slave)
    files["fifo/output"], files["said"] = os.pipe()
    files["feeding"], files["fed"] = os.pipe()
    for name in ("terminal", "fifo/output", "said", "feeding", "fed"):
        os.set_blocking(files[name], False)


# ============================================================ guards/decide
# The keeper's decisions, as functions of what it sees.

def kill_deadline_ns(options):
    """Return how long after the first KILL the keeper gives up on survivors."""
    return KILL_DEADLINE_NS + (CARRIER_DEADLINE_NS if options.get("carrier") else 0)


def step(view, now):
    """Return (action, when to look again) for what the keeper sees. Times are monotonic ns.

    `Keeper.do_ACTION` carries an action out. The end comes in this order: the record, which has
    the exit status; the drain of the output; state.json; reap; leave, when no process holds the
    FIFOs any more. The next keeper can repeat each of them.
    """
    stop, wake = view["stop"], None
    if stop and stop[3] == "done":
        stop = None
    if view["timed"] and view["timeout_at"] and not view["stop"]:
        if now >= view["timeout_at"]:
            return "timeout", None
        wake = view["timeout_at"]
    if stop:
        if stop[3] == "grace" and view["alone"]:
            return "stopped", None
        if stop[3] == "grace" and now >= stop[2]:
            return "kill", None
        if stop[3] == "killing" and (view["alone"] or now >= stop[2] + view["kill_ns"]):
            return "stopped", None
        if stop[3] == "killing" and now >= view["again_at"]:
            return "kill", None
        due = stop[2] if stop[3] == "grace" else view["again_at"]
        wake = min(wake or due, due)
    if view["ended"]:
        if not view["recorded"]:
            if now >= view["retry_at"]:
                return "record", None
            wake = min(wake or view["retry_at"], view["retry_at"])
        elif not view["final"]:
            if view["alone"] or not view["wait_children"]:
                return "finish", None
        elif not view["due"] and not view["told"]:
            return "tell", None
        elif not view["due"] and not view["reaped"]:
            return "reap", None
        elif not view["due"] and not view["open"] and not stop and not view["courier"]:
            return "leave", None
    if view["courier_at"] is not None:
        if now >= view["courier_at"]:
            return "courier", None
        wake = min(wake or view["courier_at"], view["courier_at"])
    if view["blocked"]:
        if now >= view["room_at"]:
            return "unblock", None
        wake = min(wake or view["room_at"], view["room_at"])
    if view["heed_at"] is not None:
        if now >= view["heed_at"]:
            return "heed", None
        wake = min(wake or view["heed_at"], view["heed_at"])
    return None, wake


# ============================================================ guards/slot
# The slot: the keeper's record, in memory and in the file `exit`; and state.json.

class Slot:
    """The keeper's Record, and the first page of the file `exit` that it is saved to."""

    def __init__(self, directory, files, request, streams):
        self.directory, self.files, self.request = directory, files, request
        self.streams = streams  # of the Pump
        self.record = Record.read(os.pread(files["exit"], PAGE, 0)) or Record()
        if self.record.ooms is None:
            self.record.ooms = oom_kills()
        self.pids = None  # of the guards, the outermost first
        self.dirty = True  # the record has changed since the page was written

    def save(self):
        """Write the record to its page, as a full disk allows; return whether it is written."""
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
        """Put the guards into the record; a run that only waits never has to look them up."""
        if not self.record.guards:
            self.record.guards = [
                (pid, found[2])
                for pid, found in [(pid, process(pid)) for pid in self.pids]
                if found
            ]

    def log(self, name, number, to, by):
        """Add a signal to the record's sent ones."""
        self.record.sent.append((now_ns(), "SIG" + name, number, to, by))
        self.dirty = True

    def launched(self):
        """Return the launched process, or None before the program's claim."""
        return launched_by(self.directory, self.files)

    def failure(self):
        """Return why the program was not started, from the second page, or None."""
        return unpack(os.pread(self.files["exit"], PAGE, PAGE))

    def tell(self):
        """Write state.json, a copy for people; where that fails, remove the old copy."""
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
        """Return the facts for state_of, as Run.facts does."""
        return {
            "alive": True,
            "launched": self.launched(),
            "record": self.record,
            "failure": self.failure(),
            "sizes": {stream.name: stream.length() for stream in self.streams},
            "heads": {stream.name: stream.bound.head for stream in self.streams if stream.bound},
            "last_ns": max(os.fstat(stream.file).st_mtime_ns for stream in self.streams),
            "gone": False,
            "boot_id": boot_id(),
            "mono_ns": mono_ns(),
            "spool": self.request["path"],
            "courier": read_file(self.directory, "courier.json", PAGE),
            "stdin": stdin_facts(self.directory) if "senders" in self.files else None,
            "standbys": [pid for pid in living_guards(self.record) if pid != self.record.agent],
        }


# ============================================================ guards/child
# The program as its parent sees it: a process to signal, to look at and to reap.

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


# ============================================================ guards/stops
# A stop: the signal that asks the program to end, its grace, then KILL for what is left.

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


# ============================================================ guards/courier
# The courier's process, which the keeper starts, and starts again when it dies.

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


# ============================================================ guards/keeper
# The keeper: the program's parent, and the loop that keeps a run.

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


# ============================================================ guards/guards
# The guards of one run: two standbys and the keeper.

# How many descriptors a guard, or the program before its exec, opens beyond those that all guards
# hold: two pipes, the program's ends, a walk over /proc.
SPARE_FILES = 12
# How often a guard replaces one that dies before it has launched the program, and its first pause,
# which doubles: 1.3 s in all.
REPLACED_MOST = 7
REPLACE_PAUSE_S = 0.02


def standby(child):
    """Wait for the guard below this one; return when it died unfinished.

    A guard that a signal has stopped goes on at once. It can't ignore SIGSTOP, and nobody needs it
    stopped: it would keep no time, obey no order, move no output and record no end.
    """
    while True:
        info = os.waitid(os.P_PID, child, os.WEXITED | os.WSTOPPED)
        if info.si_code in ENDS:
            break
        os.kill(child, _signal.SIGCONT)  # its pid is its own: it hasn't been waited for
    if info.si_code == 1 and info.si_status == 0:
        os._exit(0)


def letting_go(files):
    """Return a standby's handler of SIGURG, by which the keeper says that all of stdin was moved.

    The standby then closes its end, if that is true.
    """

    def let_go(number, frame):
        # A handler may interrupt itself: the one that takes the end out of the table closes it.
        held = files.pop("fifo/stdin", None) if all_moved(files) else None
        if held is not None:
            os.close(held)

    return let_go


def ignore_signals():
    """Ignore every signal but KILL, STOP, TERM and those that mean a defect of the guard itself.

    CHLD stays at its default, else no guard could wait for a child.
    """
    kept = {
        SIGNALS[name]
        for name in (
            "KILL",
            "STOP",
            "TERM",
            "CHLD",
            "CONT",
            "SEGV",
            "BUS",
            "FPE",
            "ILL",
            "ABRT",
            "TRAP",
            "SYS",
        )
    }
    for number in set(range(1, _signal.NSIG)) - kept:
        try:
            _signal.signal(number, _signal.SIG_IGN)
        except (OSError, ValueError):
            pass  # the C library keeps two real-time signals for itself


def lock_run(directory):
    """Take the lock that shows a guarded run; return whether this guard got it.

    A prober holds the lock for a moment only, so it is tried again.
    """
    deadline = time.monotonic() + START_DEADLINE_S
    while True:
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if exists(directory, "launched") or time.monotonic() > deadline:
                return False
        time.sleep(0.002)


def guard(request, report):
    """Guard one run: fork twice, and keep the run as the innermost guard. Never returns."""
    try:
        guard_run(request, report)
        os._exit(0)
    except BaseException as error:
        complain(error)
        os._exit(1)


class Complaints:
    """The descriptors for defects of ours: stderr, then the keeper file.

    `slot` is the file `exit` as long as the only guard may say that nothing was started.
    """

    file, slot = 2, -1


def complain(error):
    """Write a defect of a guard into the file `keeper`, for whoever looks for it."""
    where, at = [], error.__traceback__
    while at:
        where.append("%s:%d" % (at.tb_frame.f_code.co_name, at.tb_lineno))
        at = at.tb_next
    try:
        os.write(
            Complaints.file,
            ("agent %s: %r at %s\n" % (VERSION, error, " < ".join(reversed(where)))).encode(
                "utf-8", "replace"
            ),
        )
    except OSError:
        pass
    if Complaints.slot >= 0:
        words = getattr(error, "strerror", None) or repr(error)
        note_failure(Complaints.slot, "setup", error, "its guards can't work here: " + words)


def replace_guard(directory, files, number):
    """Pause before the next guard is forked in place of one that has died; return whether to.

    It isn't where the program was launched, or where too many guards died before that: then the
    slot says so. No process that they forked can be about to launch it: it would hold the lock of
    the file `keeper`, which this guard holds.
    """
    if launched_by(directory, files) or unpack(os.pread(files["exit"], PAGE, PAGE)) is not None:
        return False
    if number < REPLACED_MOST:
        time.sleep(REPLACE_PAUSE_S * 2 ** (number - 1))
        return True
    said = os.pread(files["keeper"], PAGE, 0).decode("utf-8", "replace").splitlines()[-1:]
    message = "; ".join(["%d guards died before they started it" % number] + said)
    note_failure(files["exit"], "setup", ChildProcessError(), message)
    return False


def guard_run(request, report):
    os.set_inheritable(report, False)
    # All guards block SIGTERM: one that comes before the launch is seen then. Only the keeper takes
    # it after that.
    _signal.pthread_sigmask(_signal.SIG_BLOCK, {_signal.SIGTERM})
    become(b"corra-standby")
    ignore_signals()
    inherited = own_environment()
    directory = os.open(request["path"], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    # Opened anew for a lock of its own: descriptors that a fork shares also share the lock.
    alive = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=directory)
    if (
        not lock_run(alive)
        or exists(directory, "launched")
        or abandoned(directory)
        or unpack(read_file(directory, "exit")[PAGE:]) is not None
    ):
        return
    files = {"exit": os.open("exit", os.O_RDWR, dir_fd=directory)}
    Complaints.slot = files["exit"]
    Complaints.file = os.open("keeper", os.O_WRONLY | os.O_APPEND, dir_fd=directory)
    files["keeper"] = os.open("keeper", os.O_RDWR, dir_fd=directory)
    fcntl.flock(files["keeper"], fcntl.LOCK_EX)
    for name in ["index"] + ["heads"] * exists(directory, "heads"):
        files[name] = os.open(name, os.O_RDWR, dir_fd=directory)
    files["launched"] = os.open("launched.tmp", os.O_RDWR, dir_fd=directory)
    # O_RDWR: with a writer of its own it never reports a hang-up, and orders wait in it for the
    # next keeper.
    files["control"] = os.open("control", os.O_RDWR | os.O_NONBLOCK, dir_fd=directory)
    for name in stream_names(request):
        files[name] = os.open(name, os.O_WRONLY, dir_fd=directory)
    if takes_more(request):
        files["stdin"] = os.open("stdin", os.O_RDONLY, dir_fd=directory)
        files["senders"] = os.open("senders", os.O_RDWR, dir_fd=directory)
        if request["program"].get("pty"):
            try:
                open_terminal(request, files)
            except OSError as error:
                note_failure(
                    files["exit"],
                    "setup",
                    error,
                    "no terminal could be opened for the program: " + error.strerror,
                )
                return
        else:
            os.chmod("fifo/stdin", 0o600, dir_fd=directory)
            reader = os.open("fifo/stdin", os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory)
            files["fifo/stdin"] = os.open(
                "fifo/stdin", os.O_WRONLY | os.O_NONBLOCK, dir_fd=directory
            )
            os.close(
                reader
            )  # the program is the only reader, so that the keeper sees it close its end
            # The program may have become another user's when it opens its stdin anew.
            os.chmod("fifo/stdin", 0o644, dir_fd=directory)
            _signal.signal(_signal.SIGURG, letting_go(files))
    for name in stream_names(request) if not request["program"].get("pty") else ():
        # Guards of an earlier start may have died after they took the right to read away.
        os.chmod("fifo/" + name, 0o600, dir_fd=directory)
        # Not blocking: nobody writes yet. A guard never holds a writing end, else the end would
        # never come.
        files["fifo/" + name] = os.open(
            "fifo/" + name, os.O_RDONLY | os.O_NONBLOCK, dir_fd=directory
        )
        os.chmod("fifo/" + name, 0o222, dir_fd=directory)
    if request.get("callback"):
        # Open as long as the run is kept, since gc or an upgrade may remove the files.
        for name in ("courier", "agent"):
            files[name] = os.open(beside(name + ".py"), os.O_RDONLY)
    for spare in [os.dup(directory) for _ in range(SPARE_FILES)]:
        os.close(spare)
    keeper, pids, launches = Keeper(directory, files, request, inherited), [os.getpid()], True
    replaced = 0
    give_back()
    # As little as possible from here to the keeper: a page that a guard writes to is its own from
    # then on. What exists now never becomes garbage; frozen, the garbage collector doesn't write
    # into it.
    if hasattr(gc, "freeze"):  # Python 3.7
        gc.freeze()
    Complaints.slot = -1
    while len(pids) < 3:
        try:
            child = fork_thin()
        except OSError:
            break  # no process can be made: there are fewer guards, and the State counts them
        if not child:
            prctl(36, 1, 0, 0, 0)
            pids.append(os.getpid())
            replaced = 0
            continue
        os.close(files["keeper"])
        if report is not None:
            os.close(report)
            report = None
        standby(child)
        # flock waits until the guard that may touch the FIFOs is dead and its child is past exec.
        files["keeper"] = os.open("/proc/self/fd/%d" % Complaints.file, os.O_RDWR)
        fcntl.flock(files["keeper"], fcntl.LOCK_EX)
        keeper, replaced = Keeper(directory, files, request, inherited), replaced + 1
        launches = replace_guard(directory, files, replaced)
        if not launches:
            break
        # Nothing was launched, so there are three guards again for the program.
    become(b"corra-keeper")
    _signal.signal(_signal.SIGURG, _signal.SIG_IGN)
    keeper.run(pids, report, launches)


# ============================================================ verbs/starter
# The start of the guards and of other programs.

# This part is the first in verbs/, so all that verbs/ defines is below this line of the made file.
GUARDS_END = sys._getframe().f_lineno
# More than a process has that got the made file from its .pyc, less than one that compiled it.
FORK_KB = 5000


def thin(code):
    """Return the made file's code without verbs/; guards hold their code in memory for weeks."""
    if not hasattr(code, "replace"):  # Python 3.7
        return code
    nothing = (lambda: None).__code__
    below = lambda each: hasattr(each, "co_code") and each.co_firstlineno > GUARDS_END  # noqa: E731
    return code.replace(
        co_consts=tuple(nothing if below(each) else each for each in code.co_consts)
    )


def spawn_guards(request, path):
    """Start the guards of the run at `path`; return when the launch is over or has failed.

    Raises OSError where the first guard's process can't be made.

    They are forked from this process where it is small, as each guard keeps its memory for weeks.
    A process that has compiled the made file or read a large request is too large. Then, and where
    the guards belong elsewhere (`before`), a fresh interpreter gets the made file's code over a
    pipe: no file has to be found or trusted, and an upgrade in the middle changes nothing.
    """
    request = dict(request, path=path)
    fresh = request["before"] or resident_kb() > FORK_KB
    report, reporting = os.pipe()
    ours, theirs = os.pipe() if fresh else (None, None)
    child = os.fork()
    if not child:
        try:
            os.setsid()
            if os.fork():
                os._exit(0)
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            for name in os.listdir("/proc/self/fd"):
                if int(name) > 2 and int(name) not in (ours, reporting):
                    try:
                        os.close(int(name))
                    except OSError:
                        pass
            os.chdir("/")
            if not fresh:
                guard(request, reporting)
            os.set_inheritable(ours, True)
            os.set_inheritable(reporting, True)
            script = (
                # Read as a whole: marshal.load reads a file in small pieces, which takes 5 ms
                # longer.
                "import marshal,sys;h=open(int(sys.argv[1]),'rb');"
                "c,r=marshal.loads(h.read());h.close();n={'__name__':'corra_agent'};"
                "exec(c,n);del c,h;n['guard'](r,int(sys.argv[2]))"
            )
            argv = request["before"] + [
                sys.executable,
                "-ISE",
                "-c",
                script,
                str(ours),
                str(reporting),
            ]
            variables = own_environment()
            if request["before"]:
                # sudo removes this variable.
                variables.setdefault(b"XDG_RUNTIME_DIR", b"/run/user/%d" % os.geteuid())
            execute(argv, variables)
        except OSError as error:
            os.write(reporting, b"%d" % (error.errno or 0))
        finally:
            os._exit(1)
    os.close(reporting)
    os.waitpid(child, 0)
    if fresh:
        os.close(ours)
        try:
            with open(theirs, "wb", 0) as pipe:
                data = marshal.dumps((thin(CODE), request))
                while data:
                    data = data[pipe.write(data) :]
        except BrokenPipeError:
            pass
    poll = select.poll()
    poll.register(report, select.POLLIN)
    said = os.read(report, 16) if poll.poll(START_DEADLINE_S * 1000) else b""
    os.close(report)
    if said:
        raise OSError(int(said), os.strerror(int(said)))


def give_up(run, error, message):
    """Note that the run was not started and never will be, unless a guard has launched it."""
    alive = os.open(".", os.O_RDONLY | os.O_DIRECTORY, dir_fd=run.directory)
    slot = os.open("exit", os.O_RDWR | os.O_NOFOLLOW, dir_fd=run.directory)
    try:
        # As a guard does it: whoever has this lock is alone in deciding what becomes of the run.
        if (
            lock_run(alive)
            and not exists(run.directory, "launched")
            and unpack(os.pread(slot, PAGE, PAGE)) is None
        ):
            note_failure(slot, "setup", error, message)
    finally:
        os.close(slot)
        os.close(alive)


def resident_kb():
    """Return how much memory this process shares with no file, in kB."""
    _, resident, shared = slurp("/proc/self/statm").split()[:3]
    return (int(resident) - int(shared)) * 4096 // 1024


def execute(words, variables):
    """Become another program, found by PATH. Raises the OSError of the last try."""
    worst = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), words[0])
    for path in candidates(words, variables):
        try:
            os.execve(path, [octets(word) for word in words], variables)
        except OSError as error:
            worst = error
    raise worst


def answer_of(words, text, patience_s):
    """Return what a process prints that reads `text`; b"" where it fails or takes too long.

    The subprocess module and its imports would be the largest part of a start.
    """
    asks, ours = os.pipe()
    theirs, answers = os.pipe()
    child = os.fork()
    if not child:
        try:
            null = os.open("/dev/null", os.O_RDWR)
            for target, fd in enumerate((asks, answers, null)):
                os.dup2(fd, target)
            execute(words, own_environment())
        finally:
            os._exit(127)
    os.close(asks)
    os.close(answers)
    try:
        with open(ours, "wb", 0) as pipe:
            pipe.write(text.encode())
    except BrokenPipeError:
        pass
    poll, said = select.poll(), []
    deadline = None if patience_s is None else time.monotonic() + patience_s
    poll.register(theirs, select.POLLIN)
    while poll.poll(deadline and max(0, deadline - time.monotonic()) * 1000):
        data = os.read(theirs, 65536)
        if not data:
            break
        said.append(data)
    else:
        os.kill(child, _signal.SIGKILL)
        said = []
    os.close(theirs)
    return b"".join(said) if os.waitpid(child, 0)[1] == 0 else b""


# ============================================================ verbs/outliving
# Outliving the login session: whether logind ends it, and the scope that spares the guards.

SCOPED = {"memory_max": ("memory", "MemoryMax=%d"), "cpu_quota": ("cpu", "CPUQuota=%d%%")}


def outliving(request):
    """Return the words before the guards' command with which they outlive this login session.

    There are none where nothing ends the guards. Where logind's KillUserProcesses is on, the end of
    a session ends all its processes, daemons too. A scope of the user's own manager is spared while
    the user lingers; for root the system's manager makes one. A scope also holds the limits of a
    whole tree. Raises Refusal where nothing would help.
    """
    words = [
        "systemd-run",
        "--scope",
        "--quiet",
        "--collect",
        "--description=corra " + request["prog_id"],
        "-p",
        "Delegate=yes",
    ]
    user = user_name()
    # The doctor asks without a program.
    limits = (request.get("program") or {}).get("limits") or {}
    scoped = [name for name in sorted(SCOPED) if limits.get(name) is not None]
    for name in scoped:
        words += ["-p", SCOPED[name][1] % limits[name]]
    if not scoped and not ends_with_session(request):
        return []
    there = present("/run/user/%d/systemd" % os.geteuid()) and present(
        "/var/lib/systemd/linger/" + user
    )
    if scoped:
        check_scope(scoped, user, there)
    elif os.geteuid() and not there:
        raise Refusal(
            "no_linger",
            "logind here kills programs at logout, and linger is off for %s" % user,
            user=user,
        )
    return words + ["--user"] * bool(os.geteuid())


def check_scope(scoped, user, there):
    """Raise Refusal where no scope would hold the limits `scoped`; systemd reports no failure."""
    what, at = " and ".join(scoped), "/sys/fs/cgroup/"
    if not present("/run/systemd/system"):
        raise Refusal(
            "no_scope", "%s: only systemd can set that, and it isn't what runs this machine" % what
        )
    if os.geteuid():
        if not there:
            raise Refusal(
                "no_scope",
                "%s: only a systemd of %s's own can set that, and linger is off" % (what, user),
                user=user,
            )
        at += "user.slice/user-%d.slice/user@%d.service/" % (os.geteuid(), os.geteuid())
    try:
        given = slurp(at + "cgroup.controllers").decode().split()
    except FileNotFoundError:
        given = []  # cgroup v1
    lacking = [SCOPED[name][0] for name in scoped if SCOPED[name][0] not in given]
    if lacking:
        raise Refusal(
            "no_scope",
            "%s: the systemd of %s has no cgroup v2 controller: %s"
            % (what, user, " ".join(lacking)),
        )


def ends_with_session(request):
    """Return whether logind ends this session's processes with it, unless `force` is asked for."""
    scopes = [
        part
        for part in slurp("/proc/self/cgroup").decode("ascii", "replace").split("/")
        if part.startswith("session-")
    ]
    owners = [
        part
        for part in slurp("/proc/self/cgroup").decode("ascii", "replace").split("/")
        if part.startswith("user-")
    ]
    if not scopes or not owners or (request.get("run") or {}).get("force"):
        return False
    return logind_kills(user_name(int(owners[0].partition("-")[2].partition(".")[0])))


def logind_kills(user):
    """Return whether logind ends the processes of this user's sessions, by its own answer."""
    manager = [
        "org.freedesktop.login1",
        "/org/freedesktop/login1",
        "org.freedesktop.login1.Manager",
    ]
    asked = (
        ["busctl", "get-property"]
        + manager
        + ["KillUserProcesses", "KillOnlyUsers", "KillExcludeUsers"]
    )
    # Without a logind the answer is empty.
    said = answer_of(asked, "", START_DEADLINE_S).decode("utf-8", "replace")
    kills, only, excluded = (said.splitlines() + ["b false"] * 3)[:3]
    named = '"%s"' % user
    return (
        kills == "b true"
        and named not in excluded.split()
        and (only == "as 0" or named in only.split())
    )


# ============================================================ verbs/exchange
# The exchange with the client: the request on stdin, the reply on stdout.

class Input:
    """stdin without a buffer, since frames may follow the request. `ahead` was read before."""

    def __init__(self, fd=0, ahead=b""):
        self.fd, self.ahead = fd, ahead

    def some(self, size):
        if self.ahead:
            data, self.ahead = self.ahead[:size], self.ahead[size:]
            return data
        return os.read(self.fd, size)

    def exactly(self, size):
        parts = []
        while size:
            data = self.some(min(size, 1 << 20))
            if not data:
                raise EOFError("stdin ended %d bytes too early" % size)
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def pour(self, file, size, digest=None):
        """Move the next `size` bytes into a file, and through a digest. Raises EOFError."""
        while size:
            moved = None
            if not self.ahead and digest is None:
                try:
                    moved = splice(self.fd, file, min(size, SPLICE))
                except BlockingIOError:
                    select.select([self.fd], [], [])
                    continue
                except OSError as error:
                    if error.errno != errno.EINVAL:
                        raise
            if moved is None:
                # A larger read takes memory of its own each time.
                data = self.some(min(size, 65536))
                moved = len(data)
                if digest is not None:
                    digest.update(data)
                while data:
                    data = data[os.write(file, data) :]
            if not moved:
                raise EOFError("stdin ended %d bytes too early" % size)
            size -= moved

    def line(self, limit=32):
        text = b""
        while not text.endswith(b"\n"):
            data = self.some(1)
            if not data or len(text) >= limit:
                raise EOFError("not a request: %r" % text)
            text += data
        return text

    def request(self):
        """Return (the request, whether frames may follow on stdin). Raises ValueError, EOFError."""
        first = self.some(1)
        if first == b"{":
            parts = [first]
            while parts[-1]:
                parts.append(self.some(1 << 16))
            return from_json(b"".join(parts)), False
        size = int(first + self.line())
        if not 0 <= size <= REQUEST_MAX:
            raise ValueError("a request of %d bytes" % size)
        return from_json(self.exactly(size)), True


class Reply:
    """stdout: the line with the nonce, one JSON value, then the verb's frames or bytes."""

    def __init__(self, out, nonce):
        self.out, self.nonce = out, nonce

    def first_line(self, more=""):
        if self.nonce:
            self.write(("corra %d %s%s\n" % (PROTOCOL, self.nonce, more)).encode())

    def send(self, value):
        self.send_text(to_json(value))

    def send_text(self, text):
        """Send one value that is JSON already."""
        self.first_line()
        self.write(text.encode() + b"\n")

    def frame(self, value):
        data = to_json(value).encode()
        self.write(b"S %d\n" % len(data) + data)

    def write(self, data):
        self.out.write(data)
        self.out.flush()


# ============================================================ verbs/ids
# Ids: which texts are ids, what people type of them, and new ones.

ID_ALPHABET = "23456789bcdfghjkmnpqrstvwxz"


def valid_id(text):
    first, rest = "abcdefghijklmnopqrstuvwxyz0123456789", "._-"
    return (
        0 < len(text) <= 64
        and text[0] in first
        and all(char in first or char in rest for char in text)
    )


def tail_of(prog_id):
    """Return what people type of an id: its last 8 characters, or all of an id of their own."""
    stamp, dash, tail = prog_id.rpartition("-")
    made = (
        dash
        and len(stamp) == 16
        and stamp[8] == "t"
        and stamp[15] == "z"
        and (stamp[:8] + stamp[9:15]).isdigit()
    )
    return (
        tail if made and len(tail) == 8 and all(char in ID_ALPHABET for char in tail) else prog_id
    )


def new_id():
    letters = "".join(ID_ALPHABET[byte % len(ID_ALPHABET)] for byte in os.urandom(8))
    return time.strftime("%Y%m%dt%H%M%Sz-", time.gmtime()) + letters


# ============================================================ verbs/held
# A run that gc leaves alone while it is read.

class HeldRun(Run):
    """A run in ROOT/runs that isn't folded away until it is closed, or this process has ended.

    gc folds away a run only while it alone has the lock of the run's `index`.
    """

    def __init__(self, root, prog_id):
        """Raises OSError: FileNotFoundError for a run that is not there, or not any more."""
        Run.__init__(self, root, prog_id)
        self.hold = -1
        try:
            self.hold = os.open("index", os.O_RDONLY | os.O_NOFOLLOW, dir_fd=self.directory)
            fcntl.flock(self.hold, fcntl.LOCK_SH)
        except OSError:
            pass  # somebody has removed the file: gc leaves such a run alone
        try:
            there = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            there = None
        found = os.fstat(self.directory)
        if there is None or (there.st_dev, there.st_ino) != (found.st_dev, found.st_ino):
            self.close()
            raise FileNotFoundError(errno.ENOENT, "it was folded away just now", self.path)

    def close(self):
        if self.hold >= 0:
            os.close(self.hold)
        Run.close(self)


# ============================================================ verbs/known
# What is known of a run without its State, and which runs a list asks for.

# How much of a command the cache of ended runs has; for more, the run is read.
COMMAND_KEPT = 300
SAFE = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789@%_-+=:,./")


def word_of(state):
    """Return what a State comes to in one word, such as `running`, `done`, `failed_3`, `lost`."""
    if state["state"] != "exited":
        return state["state"]
    if state["reason"] == "timeout":
        return "timeout"
    if state["signal"]:
        return "killed"
    return "failed_%d" % state["return_code"] if state["return_code"] else "done"


def kind_of(word):
    """Return `failed` for `failed_3`, and any other word as it is."""
    return "failed" if word.startswith("failed") else word


def state_word(word):
    """Return the state of which `word` was made."""
    return word if word in ("starting", "running", "not_started", "lost") else "exited"


def command_line(argv):
    """Return a command as it would be typed into a shell."""
    return " ".join(
        each if each and SAFE.issuperset(each) else "'" + each.replace("'", "'\"'\"'") + "'"
        for each in argv
    )


class About:
    """What a request says of its run that a list may ask for. `command` is None if it is long."""

    __slots__ = ("command", "host", "link", "name", "user")

    def __init__(self, name, user, host, link, command):
        self.name, self.user, self.host = name, user, host  # user and host of the starter
        self.link, self.command = link, command

    @classmethod
    def of(cls, request):
        origin = request.get("origin") or {}
        return cls(
            request.get("name"),
            origin.get("user"),
            origin.get("host"),
            request["program"].get("host"),
            command_line(request["program"]["argv"]),
        )

    def fields(self):
        long = len(self.command) > COMMAND_KEPT
        return [self.name, self.user, self.host, self.link, None if long else self.command]


class Known:
    """A run as lists and look-ups find it: it was read, or a line of a file has this of it."""

    __slots__ = ("created", "end", "held", "keep_s", "noted", "prog_id", "root", "said", "text",
                 "word")  # fmt: skip

    def __init__(self, root, prog_id, created, end, word, said):
        self.root, self.prog_id, self.word = root, prog_id, word
        self.created, self.end = created, end  # ns; end is 0 while it is open or isn't known
        self.said = said  # an About, or a function that reads one
        self.text = None  # the State as JSON, where it was read
        # Of one that has ended: when that was noted (ns), what its files take of the disk (bytes),
        # and `run.keep`.
        self.noted = self.held = self.keep_s = 0

    def key(self):
        return self.created, self.prog_id

    def ended_ns(self):
        """Return when it ended; where nobody knows that, when it was first seen to have ended."""
        return self.end or self.noted or self.created

    def open(self):
        """Return the run. Raises OSError."""
        return HeldRun(self.root, self.prog_id)

    def about(self):
        """Return its About. Raises OSError where the run that it must be read from is gone."""
        if not isinstance(self.said, About):
            self.said = self.said()
        return self.said


class Wanted:
    """Which runs a request to list asks for."""

    def __init__(self, request):
        self.words = [each.lower().replace(" ", "_") for each in request.get("states") or ()]
        self.since_ns = None if request.get("since") is None else int(request["since"]) * 1000
        mine = request.get("mine") or {}
        self.user, self.host = mine.get("user"), mine.get("host")
        self.name, self.match = request.get("name"), request.get("match")
        self.link = request.get("link")
        self.asks_person = self.user is not None or self.host is not None
        self.asks_more = any(each is not None for each in (self.name, self.match, self.link))
        self.asks_about = self.asks_person or self.asks_more
        self.counted = request.get("count") is not False
        # What each run that fits has in its line of the archive, the request as JSON. `match` may
        # stand there in pieces, with what quotes it between.
        exact = (self.user, self.host, self.name, self.link)
        self.having = [to_json(each).encode() for each in exact if each is not None]
        pieces = "".join(each if each in SAFE else " " for each in self.match or "").split()
        self.having += [each.encode() for each in pieces]

    def within(self, known):
        """Return whether the run is one of those whose States are counted."""
        if self.since_ns is not None and known.end and known.end < self.since_ns:
            return False
        try:
            return not self.asks_about or self.fits(known)
        except OSError:
            return False  # removed since it was listed

    def is_of(self, known):
        """Return whether the person who is asked for started the run."""
        about = known.about() if self.asks_person else None
        return about is None or (
            self.user in (None, about.user) and self.host in (None, about.host)
        )

    def fits(self, known):
        about = known.about()
        return (
            (self.name is None or about.name == self.name)
            and self.is_of(known)
            and (self.link is None or about.link == self.link)
            and (
                self.match is None
                or self.match in known.prog_id
                or self.match in (about.name or "")
                or self.match in about.command
            )
        )

    def has_word(self, word):
        """Return whether a run of this word is listed, and not only counted."""
        return not self.words or any(
            word.startswith(each) or state_word(word) == each for each in self.words
        )


def read_cursor(text):
    """Return the (created ns, id) before which a page begins. Raises Refusal."""
    created, _, prog_id = text.partition(":")
    if not (created.isdigit() and valid_id(prog_id)):
        raise Refusal("bad_request", "before must be what a list gave as next")
    return int(created), prog_id


class Page:
    """The newest runs that were asked for, below a cursor, and how many there are of what kind."""

    def __init__(self, wanted, limit, before):
        self.wanted, self.limit, self.before = wanted, limit, before
        self.total = self.matching = 0  # all runs; those for this page and for later ones
        self.counts = {}  # {kind: how many}, whatever states are asked for
        self.found = []

    def offer(self, known):
        """Count a run, and take it where it is asked for."""
        self.total += 1
        self.consider(known)

    def consider(self, known):
        """Do as `offer` with a run that `total` has already."""
        if self.wanted.within(known):
            self.count(known.word, 1)
            if self.wanted.has_word(known.word):
                self.take(known)

    def count(self, word, number):
        """Count so many runs that are asked for but for their word."""
        kind = kind_of(word)
        self.counts[kind] = self.counts.get(kind, 0) + number
        if self.wanted.has_word(word):
            self.matching += number

    def take(self, known):
        """Take a run that is asked for; return whether it is below the cursor."""
        if self.before is not None and known.key() >= self.before:
            self.matching -= 1  # it was on an earlier page
            return False
        self.found.append(known)
        if len(self.found) > 2 * self.limit + 100:
            self.newest()
        return True

    def newest(self):
        """Return the runs of the page, the newest first; the others are let go."""
        # A run that is being folded away may be in both places.
        found = {known.key(): known for known in reversed(self.found)}
        self.found = [found[key] for key in sorted(found, reverse=True)[: self.limit]]
        return self.found


# ============================================================ verbs/ended
# The runs of a spool, without reading those that have ended: the cache ROOT/ended.
#
# A final State never changes. So whoever reads a run for a list, a look-up or gc, and finds it final,
# unguarded and owed to no collector, appends what they ask of it to ROOT/ended. A line has a
# checksum, and the time of change of the run's directory: a torn line is no line, and a directory
# that was made anew or written to is read again. What is lost of the file costs a reading of the
# runs.

CHUNK = 1 << 18
FLUSHED = 256  # lines


def unreadable(root, error):
    return Refusal(
        "unreadable", "%s can't be read: %s" % (root, error.strerror), dir=root, errno=error.errno
    )


def spools(request):
    """Yield the Spool of each root that has runs. Raises Refusal: a root is unreadable."""
    for root in roots(request):
        try:
            yield Spool(root)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(root, error) from None


def sealed(text):
    """Return `text` (bytes) as a line that begins with its checksum."""
    return b"%08x %s\n" % (zlib.crc32(text), text)


def unsealed(line):
    """Return the text of a line, or None for one that is torn or was written by somebody else."""
    text = line[9:]
    return text if line[:9] == b"%08x " % zlib.crc32(text) else None


def lines_between(file, begin, end):
    """Yield (offset, line without its end) of the whole lines of a file from `begin` to `end`."""
    kept = b""
    while begin < end:
        data = os.pread(file, min(CHUNK, end - begin), begin)
        if not data:
            return
        lines = (kept + data).split(b"\n")
        at, begin, kept = begin - len(kept), begin + len(data), lines.pop()
        for line in lines:
            yield at, line
            at += len(line) + 1


def open_own(directory, name, flags):
    """Open a file of this user's that nobody else can write to. Raises OSError."""
    fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600, dir_fd=directory)
    found = os.fstat(fd)
    if found.st_uid != os.geteuid() or found.st_mode & 0o170022 != 0o100000:
        os.close(fd)
        raise PermissionError(1, "others can write to it or own it", name)
    return fd


def sync(directory, name):
    """Have a file or a directory on the disk. Raises OSError."""
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=directory)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def held_by(run):
    """Return how many bytes of the disk the files take that grow."""
    found = 0
    for name in run.streams + ["index", "stdin"]:
        if exists(run.directory, name):
            found += os.stat(name, dir_fd=run.directory, follow_symlinks=False).st_blocks * 512
    return found


class Spool:
    """ROOT/runs as a reader sees it."""

    def __init__(self, root):
        """Raises OSError."""
        self.root, self.path = root, join(root, "runs")
        self.runs = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        self.fresh = []  # lines for the cache

    def close(self):
        self.flush()
        os.close(self.runs)

    def each(self):
        """Yield (prog_id, its Known by the cache, else None) of each run."""
        seen = set()
        for known in self.cached():
            if known.prog_id not in seen:
                seen.add(known.prog_id)
                yield known.prog_id, known
        with os.scandir(self.path) as entries:
            for entry in entries:
                if entry.name not in seen and valid_id(entry.name):
                    yield entry.name, None

    def cached(self):
        """Yield the Known of each line of the cache that still holds."""
        try:
            root = secure(self.root)
        except OSError:
            return
        try:
            file = open_own(root, "ended", os.O_RDONLY)
        except OSError:
            return
        finally:
            os.close(root)
        try:
            for known, _ in self.lines_that_hold(file):
                yield known
        finally:
            os.close(file)

    def lines_that_hold(self, file):
        """Yield (Known, line) of each line of the cache whose run is there as it was noted."""
        me = os.geteuid()
        for _, line in lines_between(file, 0, os.fstat(file).st_size):
            text = unsealed(line)
            words = text.split(b" ", 8) if text is not None else ()
            if len(words) < 9:
                continue
            prog_id = words[0].decode()
            try:
                found = os.stat(prog_id, dir_fd=self.runs, follow_symlinks=False)
            except OSError:
                continue
            if b"%d" % found.st_ctime_ns == words[1] and found.st_uid == me:
                yield self.of_line(prog_id, words), line + b"\n"

    def of_line(self, prog_id, words):
        known = Known(
            self.root,
            prog_id,
            int(words[2]),
            int(words[3]),
            words[5].decode(),
            lambda: self.about(prog_id, words[8]),
        )
        known.noted, known.held, known.keep_s = int(words[4]), int(words[6]), float(words[7])
        return known

    def about(self, prog_id, data):
        about = About(*from_json(data))
        if about.command is not None:
            return about
        run = HeldRun(self.root, prog_id)
        run.close()
        return About.of(run.request)

    def read_if(self, prog_id, name):
        """Return the Known of a run that isn't in the cache; None for an open one of another name.

        Raises OSError.
        """
        run = HeldRun(self.root, prog_id)
        try:
            if run.request.get("name") != name and run.alive():
                return None
        finally:
            run.close()
        return self.read(prog_id)

    def read(self, prog_id):
        """Return the Known of a run by reading it. Raises OSError: EBADMSG where it is damaged."""
        run = HeldRun(self.root, prog_id)
        try:
            # Before the run is read: what changes later makes the line void.
            changed = os.fstat(run.directory).st_ctime_ns
            state = run.state(sure=True)
            about, word = About.of(run.request), word_of(state)
            pages = run.pages() or (b"", b"")
            record = Record.read(pages[0]) or Record()
            created = int(run.request.get("created") or 0)
            end = (
                0
                if state["state"] not in FINAL
                else record.outcome[1]
                if record.outcome
                else created * (state["state"] == "not_started")
            )
            known = Known(self.root, prog_id, created, end, word, about)
            known.text = to_json(state)
            # That nobody has launched a claim in time is said by the clock, which may be set.
            proved = exists(run.directory, "launched") or unpack(pages[1]) is not None
            owed = state["callback"] and not state["callback"]["completed"]
            if proved and not owed and state["state"] in FINAL and state["supervisor"] == "gone":
                known.noted, known.held = now_ns(), held_by(run)
                known.keep_s = (run.request.get("run") or {}).get("keep") or 0
                self.note(known, changed)
            return known
        finally:
            run.close()

    def note(self, known, changed):
        words = (known.prog_id, changed, known.created, known.end, known.noted, known.word)
        more = (known.held, known.keep_s, to_json(known.about().fields()))
        self.fresh.append(sealed(" ".join(map(str, words + more)).encode()))
        if len(self.fresh) == FLUSHED:
            self.flush()

    def flush(self):
        """Append to the cache what was read. Where that fails it is read again."""
        data, self.fresh = b"".join(self.fresh), []
        if not data:
            return
        try:
            root = secure(self.root)
            try:
                file = open_own(root, "ended", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
                os.write(file, data)
                os.close(file)
            finally:
                os.close(root)
        except OSError:
            pass  # no room, or only for reading

    def compact(self):
        """Write the cache anew where much of it doesn't hold any more. Raises OSError.

        What others append meanwhile is lost, and read again.
        """
        root = secure(self.root)
        new = ".ended.%s" % os.urandom(4).hex()
        try:
            file = open_own(root, "ended", os.O_RDONLY)
            size, kept, parts = os.fstat(file).st_size, 0, {}
            for known, line in self.lines_that_hold(file):
                parts[known.prog_id] = line
                kept += len(line)
            os.close(file)
            if kept * 2 < size:
                fill(root, new, b"".join(parts.values()))
                os.rename(new, "ended", src_dir_fd=root, dst_dir_fd=root)
        except OSError:
            if exists(root, new):
                os.unlink(new, dir_fd=root)
            raise
        finally:
            os.close(root)


# ============================================================ verbs/archived
# A run that was folded away: the line that is left of it, and the Run that a verb makes of it.
#
# A line is its checksum, then "ID CREATED END FOLDED WORD JSON", the times in ns. JSON has the
# request, and the facts that the State is computed from, so it is the State of before.

# The lines of the keeper's record that the State of an ended run needs.
RECORD_KEPT = ("outcome", "usage", "length", "sent")


class Line(Known):
    """A line of the archive. It stands in its file from `offset` to `after`."""

    __slots__ = ("after", "data", "folded", "offset")

    def __init__(self, root, offset, after, words):
        prog_id, created, end, folded, word, self.data = words
        Known.__init__(self, root, prog_id.decode(), int(created), int(end), word.decode(), None)
        self.folded, self.offset, self.after = int(folded), offset, after

    def open(self):
        return ArchivedRun(self)

    def request(self):
        return from_json(self.data)["request"]

    def about(self):
        if self.said is None:
            self.said = About.of(self.request())
        return self.said


def read_line(root, offset, data):
    """Return the Line that the bytes `data` are, or None."""
    text = unsealed(data)
    words = text.split(b" ", 5) if text is not None else ()
    return Line(root, offset, offset + len(data) + 1, words) if len(words) == 6 else None


class ArchivedRun:
    """What Run is for a run's directory, for its line in the archive: all that only reads works."""

    bounded = False

    def __init__(self, line):
        self.line, self.prog_id = line, line.prog_id
        self.path = join(line.root, "runs/" + line.prog_id)
        self.record = from_json(line.data)
        self.request = dict(self.record["request"], prog_id=line.prog_id, created=line.created)
        self.streams = stream_names(self.request)
        # It has none of a run's files, so whoever opens one is told that there is none.
        self.directory = os.open(join(line.root, "archive"), os.O_RDONLY | os.O_DIRECTORY)

    def close(self):
        os.close(self.directory)

    def alive(self):
        return False

    def heads(self):
        return {}

    def sizes(self):
        return dict.fromkeys(self.streams, os.stat("/dev/null"))

    def pages(self):
        return None

    def hindered(self):
        return None

    def state(self, details=False, sure=False):
        """Return the State that the run had before it was folded away, and when that was."""
        found = self.record
        launched, boot = found.get("launched"), found.get("boot_id")
        page = pack([each.split(" ") for each in found["record"]])
        facts = {
            "alive": False,
            "launched": launched,
            "record": Record.read(page),
            "failure": [each.split(" ") for each in found.get("failure") or ()],
            "sizes": dict.fromkeys(self.streams, 0),
            "last_ns": found.get("last_ns") or 0,
            "gone": bool(found.get("gone")),
            "boot_id": boot or launched[2],
            "mono_ns": 0,
            "spool": self.path,
            "courier": to_json(found.get("callback") or {}).encode(),
            "stdin": found.get("stdin"),
        }
        return dict(state_of(self.request, facts), archived_time=iso(self.line.folded))


def of_runbook(request):
    return bool((request.get("origin") or {}).get("runbook"))


def line_of(run, end_ns):
    """Return the line of a run that has ended, as bytes; `end_ns` is for one of unknown end.

    None for a run that hasn't ended, that is guarded, or whose collector lacks some of it.
    """
    facts = run.facts()
    state = state_of(run.request, facts)
    owed = state["callback"] and not state["callback"].get("completed")
    if state["state"] not in FINAL or facts["alive"] or owed:
        return None
    request = {
        key: value for key, value in run.request.items() if key not in ("prog_id", "created")
    }
    record, created = facts["record"] or Record(), int(run.request.get("created") or 0)
    # The length of what was written until the guards died is that of the file.
    record.lengths = {**facts["sizes"], **record.lengths}
    kept = {
        "request": request,
        "record": [
            " ".join(words) for words in unpack(record.page()) or () if words[0] in RECORD_KEPT
        ],
        "launched": facts["launched"],
        "failure": [" ".join(words) for words in facts["failure"] or ()],
        "gone": facts["gone"],
        "last_ns": facts["last_ns"],
        "stdin": facts["stdin"],
        "callback": delivered(facts["courier"]) if request.get("callback") else None,
        "boot_id": facts["boot_id"]
        if not facts["launched"] or facts["launched"][2] != facts["boot_id"]
        else None,
    }
    if record.outcome:
        end_ns = record.outcome[1]
    words = (run.prog_id, created, end_ns, now_ns(), word_of(state))
    body = to_json({key: value for key, value in kept.items() if value})
    return sealed(("%s %d %d %d %s " % words + body).encode())


# ============================================================ verbs/month
# A month of ROOT/archive: a file of lines that only grows, and the index beside it, a cache.
#
# An index is blocks of BLOCK bytes, each with a checksum: a first one about the file, then sorted
# keys with the places of their lines. Each block that a look-up reads is checked, and what the file
# has behind the part that the index covers is read from the file. So an index that is missing,
# damaged, cut off or of another file costs a reading of the file, and misses no line.
#
#     c CREATED ID OFFSET   the runs by their age: all of an archive, the newest first
#     n CRC CREATED OFFSET  those that have a name, by its checksum: the newest of a name
#     t TAIL OFFSET         all by what people type of an id, which leads to ids as well

BLOCK = 4096
# What stands behind the index is read by each look-up. 64 KiB are read in 1 ms.
UNCOVERED_MAX = 1 << 16
# So many fit into the first block; there are few more exit codes.
WORDS_MAX = 100
# So many bytes of it may be the counts of people.
PEOPLE_MAX = 1500


def age_key(line):
    return b"c %019d %s " % (line.created, line.prog_id.encode())


def name_key(name):
    return b"n %08x " % zlib.crc32(to_json(name).encode())


def tail_key(prog_id):
    return b"t %s " % tail_of(prog_id).encode()


class Index:
    """The sorted keys of a month, for a part of its file from the beginning on.

    Its methods raise ValueError where what they read is damaged.
    """

    def __init__(self, directory, name, month):
        """Raises OSError; ValueError for an index that is damaged or of another file."""
        self.file = open_own(directory, name + ".index", os.O_RDONLY)
        self.last = (-1, ())
        try:
            found = from_json(self.block(0)[0])
            self.covered, self.blocks = found["covered"], found["blocks"]
            # Of the lines that it covers: {word: how many}, the same for each person, the first and
            # last end, and how many are of runbooks.
            self.words, self.people = found["words"], found["people"]
            self.books = found["books"]
            self.oldest, self.newest = found["oldest"], found["newest"]
            if (
                self.covered > month.size
                or os.pread(month.file, 8, found["last"]) != found["sign"].encode()
                or os.pread(month.file, 1, self.covered - 1) != b"\n"
            ):
                raise ValueError("of another file")
        except (KeyError, TypeError, ValueError, RecursionError):
            self.close()
            raise ValueError("damaged, or of another file") from None

    def close(self):
        os.close(self.file)

    def block(self, number):
        """Return the entries of a block."""
        if self.last[0] != number:
            data = os.pread(self.file, BLOCK, number * BLOCK)
            if len(data) != BLOCK or data[:9] != b"%08x\n" % zlib.crc32(data[9:]):
                raise ValueError("a damaged block")
            self.last = (number, data[9:].rstrip(b"\n").split(b"\n"))
        return self.last[1]

    def place(self, key):
        """Return the number of the last block that begins below `key`, else of the first one."""
        low, high = 1, self.blocks
        while low < high:
            middle = (low + high + 1) // 2
            if self.block(middle)[0] < key:
                low = middle
            else:
                high = middle - 1
        return low

    def upwards(self, prefix):
        """Yield the entries that begin with `prefix`, in their order."""
        for number in range(self.place(prefix), self.blocks + 1):
            for entry in self.block(number):
                if entry.startswith(prefix):
                    yield entry
                elif entry > prefix:
                    return

    def downwards(self, prefix):
        """Yield the entries that begin with `prefix`, the last one first."""
        for number in range(self.place(prefix + b"\xff"), 0, -1):
            for entry in reversed(self.block(number)):
                if entry.startswith(prefix):
                    yield entry
                elif entry < prefix:
                    return


def offset_in(entry):
    return int(entry.rpartition(b" ")[2])


class Month:
    """The lines of one file. Its methods raise OSError where the file can't be read."""

    def __init__(self, root, directory, name):
        self.root, self.directory, self.name = root, directory, name
        self.file = open_own(directory, name, os.O_RDONLY)
        self.index = self.behind = None
        self.look()

    def look(self):
        """Take note of what others have appended since."""
        self.forget_index()
        self.size = os.fstat(self.file).st_size
        try:
            self.index = Index(self.directory, self.name, self)
        except (OSError, ValueError):
            pass  # the file itself is read

    def forget_index(self):
        if self.index:
            self.index.close()
        self.index = self.behind = None

    def close(self):
        self.forget_index()
        os.close(self.file)

    def lines(self, begin=0, having=()):
        """Yield the Lines of the file from the offset `begin` on, in the order of folding.

        Only those in whose bytes each of `having` is: the others aren't taken apart.
        """
        for offset, data in lines_between(self.file, begin, self.size):
            for each in having:
                if each not in data:
                    break
            else:
                line = read_line(self.root, offset, data)
                if line is not None:
                    yield line

    def uncovered(self):
        """Return the Lines behind what the index covers."""
        if self.behind is None:
            self.behind = list(self.lines(self.index.covered if self.index else 0))
        return self.behind

    def line_at(self, offset):
        """Return the Line at `offset`. Raises ValueError where none is: the index is wrong."""
        data = os.pread(self.file, 2048, offset)
        while b"\n" not in data:
            more = os.pread(self.file, 1 << 16, offset + len(data))
            if not more:
                break
            data += more
        line = read_line(self.root, offset, data.partition(b"\n")[0])
        if line is None:
            raise ValueError("no line there")
        return line

    def ask(self, by_index, fits):
        """Return the Lines that `by_index` finds in the index, and those behind it that fit."""
        found = []
        if self.index:
            try:
                found = [self.line_at(offset_in(entry)) for entry in by_index(self.index)]
            except ValueError:
                self.forget_index()
                found = []
        return found + [line for line in self.uncovered() if fits(line)]

    def with_id(self, prog_id):
        """Return the Line of exactly this id, or None."""
        key = tail_key(prog_id)
        found = self.ask(lambda index: index.upwards(key), lambda line: line.prog_id == prog_id)
        return next((line for line in reversed(found) if line.prog_id == prog_id), None)

    def with_tail(self, text, most):
        """Return the Lines whose tail begins with `text`, of more than `most` only so many."""

        def first(index):
            found = []
            for entry in index.upwards(b"t %s" % text.encode()):
                found.append(entry)
                if len(found) > most:
                    break
            return found

        return self.ask(first, lambda line: tail_of(line.prog_id).startswith(text))

    def with_name(self, name):
        """Return the newest Line of this name, or None."""
        quoted = to_json(name).encode()

        def fits(line):
            return quoted in line.data and line.about().name == name

        def newest(index):
            for entry in index.downwards(name_key(name)):
                if fits(self.line_at(offset_in(entry))):
                    return [entry]
            return []

        return max(self.ask(newest, fits), key=Known.key, default=None)

    def newest_first(self):
        """Yield all Lines, the newest first."""
        last, whole = None, False
        while not whole:
            behind = sorted(self.uncovered(), key=Known.key)
            try:
                for line in self.merged(behind):
                    if last is None or line.key() < last:
                        last = line.key()
                        yield line
                whole = True
            except ValueError:
                self.forget_index()  # and go on with what the file itself has

    def merged(self, behind):
        """Yield the Lines of the index and those `behind` it, which are the oldest first."""
        for entry in self.index.downwards(b"c ") if self.index else ():
            line = self.line_at(offset_in(entry))
            while behind and behind[-1].key() > line.key():
                yield behind.pop()
            yield line
        while behind:
            yield behind.pop()

    def ends(self):
        """Return the first and the last end of a run in it, in ns; (0, 0) where it is empty."""
        ends = [line.end for line in self.uncovered()]
        if self.index:
            ends += [self.index.oldest, self.index.newest]
        return (min(ends), max(ends)) if ends else (0, 0)

    def words(self):
        """Return {word: how many}."""
        if self.index and self.index.words is None:
            found, lines = {}, self.lines()
        else:
            found, lines = dict(self.index.words if self.index else {}), self.uncovered()
        for line in lines:
            found[line.word] = found.get(line.word, 0) + 1
        return found

    def people(self):
        """Return {(user, host) of who started them: {word: how many}}; None: it takes a reading."""
        if self.index and self.index.people is None:
            return None
        found = {}
        for user, host, words in self.index.people if self.index else ():
            found[user, host] = dict(words)
        for line in self.uncovered():
            about = line.about()
            words = found.setdefault((about.user, about.host), {})
            words[line.word] = words.get(line.word, 0) + 1
        return found

    def books(self):
        """Return how many of the Lines are of runbooks."""
        covered = self.index.books if self.index else 0
        return covered + sum(of_runbook(line.request()) for line in self.uncovered())

    def write_index(self):
        """Make the index cover all Lines; whoever has the archive's lock may. Raises OSError."""
        entries = []
        try:
            for number in range(1, self.index.blocks + 1 if self.index else 1):
                entries += self.index.block(number)
        except ValueError:
            self.forget_index()
            entries = []
        behind = self.uncovered()
        if not behind:
            return
        for line in behind:
            place = b"%d" % line.offset
            entries.append(age_key(line) + place)
            entries.append(tail_key(line.prog_id) + place)
            if line.about().name is not None:
                entries.append(name_key(line.about().name) + b"%019d %s" % (line.created, place))
        blocks = in_blocks(sorted(entries))
        oldest, newest = self.ends()
        words, people = self.words(), self.people()
        counts = people and [[*person, people[person]] for person in people]
        facts = {
            "covered": behind[-1].after,
            "last": behind[-1].offset,
            "sign": os.pread(self.file, 8, behind[-1].offset).decode(),
            "blocks": len(blocks),
            "words": words if len(words) <= WORDS_MAX else None,
            "people": counts if len(to_json(counts)) <= PEOPLE_MAX else None,
            "oldest": oldest,
            "newest": newest,
            "books": self.books(),
        }
        new = ".%s.%s" % (self.name, os.urandom(4).hex())
        try:
            fill(self.directory, new, b"".join([sealed_block(to_json(facts).encode())] + blocks))
            sync(self.directory, new)
            os.rename(
                new, self.name + ".index", src_dir_fd=self.directory, dst_dir_fd=self.directory
            )
        except OSError:
            if exists(self.directory, new):
                os.unlink(new, dir_fd=self.directory)
            raise
        self.look()


def sealed_block(body):
    """Return a block of `body`. Raises ValueError where that is too long."""
    if len(body) > BLOCK - 9:
        raise ValueError("too long for a block")
    body = body.ljust(BLOCK - 9, b"\n")
    return b"%08x\n" % zlib.crc32(body) + body


def in_blocks(entries):
    """Return blocks of the entries, in their order."""
    blocks, body, size = [], [], 0
    for entry in entries:
        if size + len(entry) + 1 > BLOCK - 9:
            blocks.append(sealed_block(b"\n".join(body)))
            body, size = [], 0
        body.append(entry)
        size += len(entry) + 1
    return blocks + [sealed_block(b"\n".join(body))]


# ============================================================ verbs/archive
# ROOT/archive: the runs that were folded away, a file a month.
#
# Whoever folds a run away appends its line, has it on the disk and reads it back, and only then takes
# the run's directory out of ROOT/runs. So a run is always in one of the two or in both, and whoever
# looks into ROOT/runs first, and then here, finds it.

FIRST_LINE = (
    b"# corra: CHECKSUM ID CREATED END FOLDED WORD RECORD, a line for each run; times in ns\n"
)


def told_month(prog_id):
    """Return the month that an id tells, None for one that tells none.

    Ids of fleets and runbooks follow from names. They look like others, and their year is 0000.
    """
    told = tail_of(prog_id) != prog_id and prog_id[:4] != "0000"
    return prog_id[:4] + "-" + prog_id[4:6] if told and "01" <= prog_id[4:6] <= "12" else None


def month_of(prog_id, created_ns):
    """Return the name of the month's file that a run's line is in: what its id tells, else the
    month in which the run was made.
    """
    return told_month(prog_id) or time.strftime("%Y-%m", time.gmtime(created_ns // 10**9))


def is_month(name):
    return len(name) == 7 and name[4] == "-" and (name[:4] + name[5:]).isdigit()


def archives(request):
    """Yield the Archive of each root that has one. Raises Refusal: one can't be read."""
    for root in roots(request):
        try:
            yield Archive(root)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(join(root, "archive"), error) from None


def in_archives(request, ask):
    """Yield what `ask` returns for the Archive of each root. Raises Refusal."""
    for archive in archives(request):
        try:
            yield ask(archive)
        except OSError as error:
            raise unreadable(join(archive.root, "archive"), error) from None
        finally:
            archive.close()


class Archive:
    """The archive of one root. Its methods raise OSError where it can't be read."""

    def __init__(self, root):
        """Raises OSError: FileNotFoundError where this user has none there."""
        self.root, self.kept = root, {}
        self.directory = os.open(
            join(root, "archive"), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
        )
        found = os.fstat(self.directory)
        if found.st_uid != os.geteuid() or found.st_mode & 0o022:
            os.close(self.directory)
            if found.st_uid != os.geteuid():
                raise FileNotFoundError(errno.ENOENT, "it is another user's", root)
            raise PermissionError(errno.EPERM, "others can write to it", root)

    def close(self):
        for month in self.kept.values():
            month.close()
        os.close(self.directory)

    def months(self):
        """Return the Months, the newest first."""
        names = sorted(filter(is_month, os.listdir(self.directory)), reverse=True)
        return [month for month in map(self.month, names) if month]

    def month(self, name):
        """Return the Month of this name, or None."""
        if name not in self.kept:
            try:
                self.kept[name] = Month(self.root, self.directory, name)
            except FileNotFoundError:
                return None
        return self.kept[name]

    def lock(self):
        """Wait until nobody else writes to the archive, and see what others wrote until then.

        The lock ends with `unlock`, or with the descriptor.
        """
        fcntl.flock(self.directory, fcntl.LOCK_EX)
        for name, kept in list(self.kept.items()):
            try:
                found = os.stat(name, dir_fd=self.directory, follow_symlinks=False)
            except FileNotFoundError:
                found = None
            same = os.fstat(kept.file)
            if found is None or (found.st_ino, found.st_dev) != (same.st_ino, same.st_dev):
                self.kept.pop(name).close()
            elif found.st_size != kept.size:
                kept.look()

    def unlock(self):
        fcntl.flock(self.directory, fcntl.LOCK_UN)

    def with_id(self, prog_id):
        """Return the Line of exactly this id, or None."""
        told = told_month(prog_id)
        if told:
            month = self.month(told)
            return month and month.with_id(prog_id)
        found = (month.with_id(prog_id) for month in self.months())
        return next(filter(None, found), None)

    def with_name(self, name):
        """Return the newest Line of this name, or None."""
        found = filter(None, (month.with_name(name) for month in self.months()))
        return max(found, key=Known.key, default=None)

    def with_tail(self, text, most):
        """Return Lines whose tail begins with `text`; where there are more than `most`, some."""
        found = []
        for month in self.months():
            found += month.with_tail(text, most)
        return found

    def count(self):
        return sum(sum(month.words().values()) for month in self.months())


def make_archive(root):
    """Return the Archive of `root`, made if there is none yet. Raises OSError."""
    above = secure(root)
    try:
        os.mkdir("archive", 0o700, dir_fd=above)
    except FileExistsError:
        pass
    try:
        os.fsync(above)
    finally:
        os.close(above)
    return Archive(root)


def append(archive, name, lines):
    """Append lines to a month, and have them on the disk. Raises OSError, and adds nothing then."""
    file = open_own(archive.directory, name, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    try:
        size = os.fstat(file).st_size
        data = b"".join(([FIRST_LINE] if not size else []) + lines)
        if size and os.pread(file, 1, size - 1) != b"\n":
            data = b"\n" + data  # somebody was killed in the middle of a line
        try:
            left = data
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
            os.fsync(archive.directory)  # always: who made the file may have died before this
            if os.pread(file, len(data) + 1, size) != data:
                raise OSError(errno.EIO, "what was written isn't what is read")
        except OSError:
            os.ftruncate(file, size)  # which takes no room
            raise
    finally:
        os.close(file)
    archive.month(name).look()


def forget_month(archive, month, dry):
    """Remove what isn't a runbook's of a month; return the ids. The archive is locked."""
    ids, kept = [], [FIRST_LINE]
    if month.books() == sum(month.words().values()):
        return ids
    for line in month.lines():
        if of_runbook(line.request()):
            kept.append(os.pread(month.file, line.after - line.offset, line.offset))
        else:
            ids.append(line.prog_id)
    if dry or not ids:
        return ids
    if len(kept) > 1:
        new = ".%s.%s" % (month.name, os.urandom(4).hex())
        try:
            fill(archive.directory, new, b"".join(kept))
            sync(archive.directory, new)
            os.rename(new, month.name, src_dir_fd=archive.directory, dst_dir_fd=archive.directory)
        except OSError:
            if exists(archive.directory, new):
                os.unlink(new, dir_fd=archive.directory)
            raise
    else:
        os.unlink(month.name, dir_fd=archive.directory)
    os.fsync(archive.directory)
    if exists(archive.directory, month.name + ".index"):
        os.unlink(month.name + ".index", dir_fd=archive.directory)
    return ids


# ============================================================ verbs/finding
# Finding the run that a request names: in ROOT/runs, then in the archive.
#
# A run is taken out of ROOT/runs only once it is in the archive. So whoever looks in this order, and
# finds it in neither, knows that it was nowhere.

SHOWN_MOST = 20


def archived_line(request, prog_id):
    """Return the Line of exactly this id in an archive, or None. Raises Refusal."""
    found = in_archives(request, lambda archive: archive.with_id(prog_id))
    return next(filter(None, found), None)


def find_exact(request, prog_id):
    """Return the run with exactly this id, or None. Raises Refusal where a root can't be read.

    A claim that nobody has launched stands behind the archive: who made it may have been stopped
    while another start of this id ran, ended and was folded away.
    """
    run = find_claimed(request, prog_id)
    if run and exists(run.directory, "launched"):
        return run
    line = archived_line(request, prog_id)
    if line and run:
        run.close()
    return line.open() if line else run


def find_claimed(request, prog_id):
    """Return the run of this id in ROOT/runs, or None. Raises Refusal."""
    for root in roots(request):
        try:
            return HeldRun(root, prog_id)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise unreadable(error.filename or root, error) from None
    return None


def ambiguous(message, found):
    """Return the refusal of a text that means each of the Known in `found`."""
    states = []
    for known in found[:SHOWN_MOST]:
        try:
            run = known.open()
            states.append(run.state())
            run.close()
        except OSError:
            pass  # removed just now
    return Refusal("ambiguous", message, runs=states)


def readable(known):
    """Return whether the run can be read: another user's and a damaged one can't."""
    try:
        known.open().close()
    except OSError:
        return False
    return True


def find(request):
    """Return the run that the request names.

    Tried in this order: the full id; the name, of which an open run or else the newest is taken;
    the beginning of an id's tail. Raises Refusal, also for a name that several open runs have: the
    newest of them would be a guess.
    """
    text = request.get("prog_id") or ""
    exact = find_exact(request, text) if valid_id(text) else None
    if exact:
        return exact
    total, named, begun = 0, [], {}
    for spool in spools(request):
        for prog_id, cached in spool.each():
            total += 1
            if len(text) >= 2 and text in prog_id and tail_of(prog_id).startswith(text):
                begun[prog_id] = Known(spool.root, prog_id, 0, 0, "", None)
            try:
                known = cached or spool.read_if(prog_id, text)
                if known and known.about().name == text:
                    named.append(known)
            except OSError:
                pass  # removed since it was listed, another user's, or damaged
        spool.close()
    tails = valid_id(text) and len(text) >= 2
    for newest, lines, count in in_archives(
        request,
        lambda archive: (
            archive.with_name(text),
            archive.with_tail(text, SHOWN_MOST) if tails else (),
            archive.count(),
        ),
    ):
        total += count
        named += [newest] if newest else []
        for line in lines:
            begun[line.prog_id] = line
    open_ = [known for known in named if known.word and state_word(known.word) not in FINAL]
    if len(open_) > 1:
        open_.sort(key=Known.key, reverse=True)
        raise ambiguous("%d open runs are called %s" % (len(open_), text), open_)
    if named:
        return opened(request, open_[0] if open_ else max(named, key=Known.key))
    begun = {prog_id: known for prog_id, known in begun.items() if readable(known)}
    if len(begun) == 1:
        return opened(request, *begun.values())
    if begun:
        found = [begun[prog_id] for prog_id in sorted(begun)]
        raise ambiguous("%d runs begin with %s" % (len(begun), text), found)
    raise Refusal("not_found", "no run %s among %d" % (text, total), count=total, user=user_name())


def opened(request, known):
    """Return the run of a Known, which may have been folded away since. Raises Refusal."""
    run = find_exact(request, known.prog_id)
    if run is None:
        raise Refusal("not_found", "the run was removed just now", user=user_name())
    return run


# ============================================================ verbs/requests
# The keys of a request, and what may be wrong with their values.

TEXT, NUMBER, FLAG, OBJECT, LIST = (str,), (int, float), (bool,), (dict,), (list, tuple)
KEYS = {
    "": {
        "prog_id": TEXT, "nonce": TEXT, "name": TEXT, "origin": OBJECT, "program": OBJECT,
        "run": OBJECT, "secrets": OBJECT, "callback": OBJECT, "config": OBJECT, "spool": TEXT,
        "cursor": OBJECT, "tail": NUMBER, "streams": LIST, "live": FLAG, "since": NUMBER,
        "late": FLAG, "times": FLAG, "signal": TEXT, "grace": NUMBER, "by": TEXT, "stream": TEXT,
        "start": NUMBER, "end": NUMBER, "match": TEXT, "courier": TEXT, "from": NUMBER,
        "seconds": NUMBER, "route": TEXT, "sender": NUMBER, "ids": LIST, "older": NUMBER,
        "max_size": NUMBER, "dry": FLAG, "states": LIST, "mine": OBJECT, "link": TEXT,
        "limit": NUMBER, "before": TEXT, "fleet": TEXT, "count": FLAG, "records": NUMBER,
    },
    "program": {
        "argv": LIST, "cwd": TEXT, "env": OBJECT, "env_inherit": FLAG + LIST,
        "stdin": TEXT + OBJECT, "umask": NUMBER, "merge": FLAG, "pty": FLAG, "limits": OBJECT,
        "host": TEXT,
    },
    "run": {
        "timeout": NUMBER, "grace": NUMBER, "stop_signal": TEXT, "keep_output": NUMBER,
        "keep": NUMBER, "wait_children": FLAG, "force": FLAG, "carrier": LIST, "terminal": OBJECT,
        "forget_stdin": FLAG,
    },
    "secrets": {"env": OBJECT, "token": TEXT},
    "callback": {"url": TEXT, "method": TEXT, "token": TEXT, "ca": TEXT, "state": FLAG},
    "config": {
        "retry_frequency": NUMBER, "timeout": NUMBER, "output_buffer": NUMBER,
        "output_latency": NUMBER,
    },
}  # fmt: skip


def complaints(request):
    """Return all that is wrong with a request, as sentences."""
    if not isinstance(request, dict):
        return ["a request is an object"]
    found = []
    mine = request.get("mine")
    if isinstance(mine, dict) and not all(
        key in ("user", "host") and isinstance(each, str) for key, each in mine.items()
    ):
        found.append("mine must have a user, a host or both")
    for key in ("streams", "cursor", "states"):
        values = request.get(key)
        if isinstance(values, list) and not all(isinstance(each, str) for each in values):
            found.append(key + " must be a list of names")
        if isinstance(values, dict) and not all(
            isinstance(each, int) and 0 <= each < 1 << STREAM_SHIFT for each in values.values()
        ):
            found.append(key + " must have offsets")
    for part, keys in KEYS.items():
        value = request if not part else request.get(part)
        if not isinstance(value, dict):
            continue
        for key, each in value.items():
            name = (part + "." if part else "") + key
            if key not in keys:
                found.append("unknown key: " + name)
            elif each is not None and (
                not isinstance(each, keys[key])
                or (isinstance(each, bool) and bool not in keys[key])
            ):
                found.append(
                    "%s must be %s" % (name, " or ".join(kind.__name__ for kind in keys[key]))
                )
            elif isinstance(each, str) and not sound(each):
                found.append("%s has a NUL or half a character in it" % name)
            elif keys[key] is NUMBER and each is not None and not 0 <= each <= 1 << 53:
                found.append("%s must be a number from 0 up" % name)
    return found


def sound(text):
    """Return whether the kernel can take `text`: no NUL, no surrogate that stands for no byte."""
    try:
        return b"\0" not in octets(text)
    except UnicodeEncodeError:
        return False


def start_complaints(request):
    """Return all that is wrong with a request to start a program."""
    found = complaints(request)
    if found:
        return found
    program, options = request.get("program"), request.get("run") or {}
    if not program:
        return ["no program"]
    argv = program.get("argv")
    if not argv or not all(isinstance(word, str) for word in argv) or not argv[0]:
        found.append("program.argv must be a list of words, the first not empty")
    elif any("\0" in word for word in argv):
        found.append("a word of program.argv has a NUL byte in it")
    elif not all(map(sound, argv)):
        found.append("a word of program.argv has half a character in it")
    for source, variables in (
        ("program.env", program.get("env")),
        ("secrets.env", (request.get("secrets") or {}).get("env")),
    ):
        for name, value in (variables or {}).items():
            if (
                not name
                or "=" in name
                or not sound(name)
                or not (value is None or (isinstance(value, str) and sound(value)))
            ):
                found.append("%s: not a variable: %r" % (source, name))
    source, umask = program.get("stdin"), program.get("umask")
    counted = (
        isinstance(source, dict)
        and type(source.get("bytes")) is int
        and source["bytes"] >= 0
        and set(source) <= {"bytes", "sha256"}
    )
    if isinstance(source, dict) and not counted and source != {"open": True}:
        found.append(
            'program.stdin must be {"bytes": N}, {"bytes": N, "sha256": "HEX"} or {"open": true}'
        )
    if program.get("pty") and (source is not None or program.get("merge")):
        found.append(
            "program.pty: its terminal is its stdin, and its output is one stream as it is"
        )
    terminal = options.get("terminal") or {}
    sizes = [terminal.get(key) for key in ("rows", "columns") if terminal.get(key) is not None]
    if not all(type(each) is int and 0 < each < 10000 for each in sizes) or not isinstance(
        terminal.get("term", ""), str
    ):
        found.append('run.terminal must be {"rows": N, "columns": N, "term": NAME}')
    elif not sound(terminal.get("term", "")):
        found.append("run.terminal: not a name")
    if umask is not None and not (isinstance(umask, int) and umask <= 0o777):
        found.append("program.umask must be from 0 to 511 (0o777)")
    if isinstance(program.get("env_inherit"), list) and not all(
        isinstance(name, str) and sound(name) for name in program["env_inherit"]
    ):
        found.append("program.env_inherit must be a list of names")
    if not all(isinstance(word, str) and sound(word) for word in options.get("carrier") or ()):
        found.append("run.carrier must be a list of words")
    if options.get("stop_signal") and options["stop_signal"] not in SIGNALS:
        found.append("run.stop_signal: no such signal: " + options["stop_signal"])
    if request.get("callback") and not request["callback"].get("url"):
        found.append("callback.url is missing")
    found += limit_complaints(program.get("limits") or {})
    if options.get("keep_output") is not None and not (
        isinstance(options["keep_output"], int) and options["keep_output"] >= BOUND_MIN
    ):
        found.append("run.keep_output must be a whole number of bytes, %d or more" % BOUND_MIN)
    if request.get("prog_id") is not None and not valid_id(request["prog_id"]):
        found.append("prog_id must match [a-z0-9][a-z0-9._-]{0,63}")
    return found


def limit_complaints(limits):
    """Return all that is wrong with program.limits: {name: number or [soft, hard]}."""
    ranges = {
        "nice": (-20, 19),
        "oom_score_adj": (-1000, 1000),
        "memory_max": (1, 1 << 62),
        "cpu_quota": (1, 10**6),
    }
    ranges.update(dict.fromkeys(RLIMITS, (-1, 1 << 62)))
    found = []
    for name, value in limits.items():
        values = value if isinstance(value, (list, tuple)) and name in RLIMITS else [value]
        if name not in ranges:
            found.append(
                "program.limits: no limit %s: there are %s" % (name, " ".join(sorted(ranges)))
            )
        elif value is not None and not (
            1 <= len(values) <= 2
            and all(
                type(each) is int and ranges[name][0] <= each <= ranges[name][1] for each in values
            )
        ):
            found.append("program.limits: %s must be from %d to %d" % ((name,) + ranges[name]))
        elif len(values) == 2 and values[0] % (1 << 64) > values[1] % (1 << 64):
            found.append("program.limits: %s: its soft limit is above its hard one" % name)
    return found


# ============================================================ verbs/late
# The parts that stand as text at the end of the made file: only some verbs need them.
#
# What a start has loaded, its guards keep for weeks: 5 bytes for each byte of source. So what no
# start needs before its guards are forked is compiled when it is asked for.

LATE_BEGIN, LATE_END = "\nr'''\n", "\n'''\n"


def late(name):
    """Return a function or class of any part, and load the late ones for it. Raises OSError."""
    if name not in globals():
        exec(late_code(), globals())  # noqa: S102 - it is of this very file
    return globals()[name]


def late_code():
    """Return the late parts, compiled; as with a .pyc, that is kept where Python keeps such."""
    if "AGENT_SOURCE" in globals():  # it came without a file
        return compiled_late(globals()["AGENT_SOURCE"])
    path = absolute(CODE.co_filename)
    kept = getattr(globals().get("__spec__"), "cached", None)
    kept = kept and kept.rpartition(".")[0] + ".late"
    found = os.stat(path)
    sign = b"%x %d %d\n" % (sys.hexversion, found.st_mtime_ns, found.st_size)
    try:
        data = slurp(kept, os.stat(kept).st_size) if kept else b""
        if data.startswith(sign):
            return marshal.loads(data[len(sign) :])  # noqa: S302 - as a .pyc is
    except (OSError, ValueError, EOFError, TypeError):
        pass  # there is none, or it is torn
    code = compiled_late(slurp(path, found.st_size).decode())
    if kept:
        try:
            keep_late(kept, sign + marshal.dumps(code))
        except OSError:
            pass  # no room, or only for reading: it is compiled each time
    return code


def compiled_late(source):
    begin, end = source.index(LATE_BEGIN) + len(LATE_BEGIN), source.rindex(LATE_END)
    # With the lines before it, so that tracebacks name those of the made file.
    text = "\n" * source.count("\n", 0, begin) + source[begin:end] + "\n"
    return compile(text, CODE.co_filename, "exec")


def keep_late(path, data):
    """Write the file in one step. Raises OSError."""
    above = os.open(parent(path), os.O_RDONLY | os.O_DIRECTORY)
    new = ".late.%s" % os.urandom(4).hex()
    try:
        fill(above, new, data, 0o644)
        os.rename(new, base(path), src_dir_fd=above, dst_dir_fd=above)
    finally:
        os.close(above)


def __getattr__(name):  # Python 3.7
    """Return a name of the late parts for whoever imports the made file."""
    if name.startswith("__") or "verb_list" in globals():
        raise AttributeError(name)
    return late(name)


# ============================================================ verbs/courier_file
# The courier's file beside the agent.

def place_courier(source):
    """Put the courier that came with the request beside the agent. Raises Refusal.

    By hand none comes, and it must be there.
    """
    path = beside("courier.py")
    there = slurp(path, 1 << 20) if present(path) else None
    if source is None and there is None:
        raise Refusal(
            "no_courier", "a callback needs courier.py beside agent.py: %s isn't there" % path
        )
    if source is None or there == octets(source):
        return
    try:
        above = os.open(parent(path), os.O_RDONLY | os.O_DIRECTORY)
        replace(above, "courier.py", octets(source))
        os.close(above)
    except OSError as error:
        tried = [{"dir": parent(path), "errno": error.errno, "message": error.strerror}]
        raise Refusal(
            "no_room", "no room for the courier: " + error.strerror, tried=tried
        ) from None


# ============================================================ verbs/daily
# The daily cleaning by a start.

DAY_S, RETRY_S = 86400, 600


def daily_gc(request, root):
    """Clean up once a day, in a process of its own that no start waits for.

    One that dies is followed by that of a start RETRY_S later, which goes on where it was.
    """
    stamp = join(root, "gc")
    try:
        # One of the future is of a clock that was set back since.
        if abs(time.time() - os.stat(stamp).st_mtime) < DAY_S:
            return
    except FileNotFoundError:
        pass
    file = os.open(stamp, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.utime(file, (time.time() - DAY_S + RETRY_S,) * 2)
        child = os.fork()
    except BlockingIOError:
        child = None  # it is being done
    if child != 0:
        os.close(file)
        return
    try:
        os.setsid()
        if not os.fork():
            os.nice(19)
            null = os.open("/dev/null", os.O_RDWR)
            for number in range(3):
                os.dup2(null, number)
            late("clean_up")(request)
            os.utime(file, None)
    finally:
        os._exit(0)


# ============================================================ verbs/start
# The verbs start and run.

def new_run(request, stdin, reply):
    """Return the run, and make it unless it exists. Raises Refusal."""
    prog_id = request["prog_id"]
    there = find_exact(request, prog_id)
    if there:
        drop_claim(request, there)
        return same_program(there, request)
    request["before"] = outliving(request)  # its refusal must come before anything is made
    stored = {
        key: request[key]
        for key in (
            *("prog_id", "name", "origin", "fleet"),
            *("program", "run", "callback", "config"),
        )
        if request.get(key)
    }
    token = (request.get("secrets") or {}).get("token")
    if stored.get("callback"):
        token = stored["callback"].get("token") or token
        stored["callback"] = {
            key: value for key, value in stored["callback"].items() if key != "token"
        }
        place_courier(request.get("courier"))
    stored.update(user=user_name(), created=now_ns(), layout=LAYOUT, agent=VERSION)
    source = request["program"].get("stdin")

    def feed(directory):
        """Fill the file `stdin`."""
        if isinstance(source, str):
            fill(directory, "stdin", octets(source))
            return
        digest = None
        if source.get("sha256"):
            import hashlib  # only here, as it takes 5 ms

            digest = hashlib.sha256()
        reply.first_line(" send")
        fd = os.open("stdin", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=directory)
        try:
            widen(stdin.fd, 4)
            stdin.pour(fd, source["bytes"], digest)
        except EOFError as error:
            raise Refusal("bad_request", str(error)) from None
        finally:
            os.close(fd)
        if digest and digest.hexdigest() != source["sha256"]:
            raise Refusal(
                "bad_request",
                "the bytes for stdin are not those announced: they changed while they were read",
            )

    tried = []
    for root in roots(request):
        try:
            runs = prepare_root(root)
            try:
                claim(
                    runs,
                    prog_id,
                    stored,
                    feed if source is not None and source != {"open": True} else None,
                    token,
                )
            finally:
                os.close(runs)
            # Whose claim it is, and whether the archive has it by now: this start may have been
            # stopped since it looked.
            there = find_exact(request, prog_id)
            if there:
                drop_claim(request, there)
                return same_program(there, request)
            raise Refusal("unreadable", "%s was removed just now" % prog_id, dir=root)
        except OSError as error:
            tried.append(
                {"dir": root, "errno": error.errno, "message": error.strerror or str(error)}
            )
            if isinstance(source, dict) and error.errno in FULL:
                break  # half of stdin was read, and the next root would need it all
    if tried[0]["errno"] == errno.EOPNOTSUPP:
        raise Refusal(
            "unsupported",
            "keep_output can't be used in %(dir)s: %(message)s" % tried[0],
            tried=tried,
        )
    raise Refusal("no_room", "no room for the spool: %s" % tried[0]["message"], tried=tried)


def drop_claim(request, run):
    """Remove the claims of a run that the archive has, which nobody has launched or will."""
    if isinstance(run, ArchivedRun):
        for root in roots(request):
            try:
                late("remove_claim")(root, run.prog_id)
            except OSError:
                pass  # there is none; or gc does it later


def same_program(run, request):
    """Return the run. Raises Refusal where it is another program's."""
    if run.request["program"] != request["program"]:
        raise Refusal("conflict", "this id already names another command", there=run.state())
    return run


def start_run(request, stdin, reply):
    """Start the program unless it was started; return its Run and State.

    It is safe to repeat with the same id. Raises Refusal.
    """
    if not sys.platform.startswith("linux"):
        raise Refusal(
            "unsupported", "the agent is for Linux, this is %s: use the chaperone" % sys.platform
        )
    wrong = start_complaints(request)
    if wrong:
        raise Refusal("bad_request", "; ".join(wrong), complaints=wrong)
    request["prog_id"] = request.get("prog_id") or new_id()
    umask = os.umask(0o077)
    run = new_run(request, stdin, reply)
    try:
        daily_gc(request, parent(parent(run.path)))
    except OSError:
        pass  # no room or no process for it: a later start cleans up
    secret = (request.get("secrets") or {}).get("env") or {}
    # Before `abandoned` would say so, since this start knows the reason.
    deadline, pause_s = time.monotonic() + START_DEADLINE_S * 0.8, 0
    wrong = OSError(0, "each died at once")
    while True:
        state = run.state()
        late = time.monotonic() > deadline
        if state["state"] != "starting" or (state["supervisor"] != "gone" and late):
            return run, state
        # It is new, or the guards that began it died before they launched anything.
        if state["supervisor"] == "gone" and late:
            give_up(run, wrong, "no guard could be started here: " + wrong.strerror)
        elif state["supervisor"] == "gone":
            before = outliving(run.request) if request.get("before") is None else request["before"]
            if pause_s:
                time.sleep(max(0.001, min(pause_s, deadline - time.monotonic())))
            pause_s = min(pause_s * 2 or 0.01, 1)
            try:
                spawn_guards(
                    dict(run.request, secret_env=secret, umask=umask, before=before), run.path
                )
            except OSError as error:
                wrong = error
        else:
            time.sleep(0.01)


def verb_start(request, stdin, reply, framed):
    reply.send(start_run(request, stdin, reply)[1])


def verb_run(request, stdin, reply, framed):
    run, state = start_run(request, stdin, reply)
    reply.send(state)
    if state["state"] != "not_started":
        late("Follower")(run, request, stdin if framed else None, reply.out).go()


# ============================================================ verbs/main
# All verbs by name, and main.

VERBS = ("start", "run", "follow", "wait", "status", "signal", "stop", "read", "gc", "deliver",
         "digest", "list")  # fmt: skip


def open_standard():
    """Give /dev/null to each of the descriptors 0, 1 and 2 that is closed.

    Else the next file that is opened has that number, and replies go into it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)
    sys.stdout = sys.stdout or open(1, "w")  # noqa: SIM115 - open as long as the process lives


def main(argv, stdin, stdout):
    """Carry out one verb; return the exit code. `stdin` is an Input, `stdout` a binary file."""
    verb = argv[0] if argv else "start"
    reply = Reply(stdout, None)
    try:
        request, framed = stdin.request()
        if not isinstance(request, dict):
            raise ValueError("not an object")
        reply.nonce = request.get("nonce") if isinstance(request.get("nonce"), str) else None
    except (ValueError, EOFError, RecursionError) as error:
        reply.send({"error": "bad_request", "message": "the request can't be read: %s" % error})
        return 2
    try:
        if verb not in VERBS:
            raise Refusal("bad_request", "no verb %s: there are %s" % (verb, " ".join(VERBS)))
        wrong = complaints(request)
        if wrong:
            raise Refusal("bad_request", "; ".join(wrong), complaints=wrong)
        late("verb_" + verb)(request, stdin, reply, framed)
        return 0
    except Refusal as refusal:
        reply.send(refusal.reply)
        return 1
    except OSError as error:
        if error.errno == errno.EBADMSG:
            reply.send(unreadable(error.filename, error).reply)
            return 1
        if error.errno != errno.EPIPE:
            raise
        os.dup2(os.open("/dev/null", os.O_WRONLY), 1)
        return 0


if __name__ == "__main__":
    open_standard()
    # Replies are flushed as they are sent, so Python's finalisation, 2 ms, would close nothing.
    os._exit(main(sys.argv[1:], Input(0), sys.stdout.buffer))


r'''


# ============================================================ verbs/orders
# Orders to the keeper; the verb signal, which does without a keeper that doesn't answer.

def by_of(request):
    """Return the sender of the request, as one printable word."""
    return "".join(char if "!" <= char <= "~" else "_" for char in request.get("by") or "somebody")[
        :64
    ]


def give_order(run, text):
    """Write one line into the keeper's FIFO; return whether a guard holds its other end."""
    try:
        fd = os.open("control", os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW, dir_fd=run.directory)
    except OSError:
        return False  # ENXIO: no guard is left; ENOENT: the spool was deleted
    try:
        os.write(fd, text.encode("ascii") + b"\n")
        return True
    except BlockingIOError:
        return False  # the FIFO is full: the keeper has been stopped for long
    finally:
        os.close(fd)


def wake_guards(run):
    """Let guards go on that a signal has stopped: a guard does that for the one below it alone."""
    pages = run.pages()
    for pid, start in ((pages and Record.read(pages[0])) or Record()).guards:
        found = process(pid)
        if found and found[0] == "T" and found[2] == start:
            signal_process(pid, start, SIGNALS["CONT"])


def signal_order(number, name, request):
    """Return the order for one signal.

    It lapses before the verb would signal the program itself, so that a keeper that wakes up late
    doesn't send the signal again.
    """
    lapses = mono_ns() + int(ORDER_DEADLINE_S * 0.9e9)
    return "%s signal %s %s %d" % (number, name, by_of(request), lapses)


def ordered(run, number, text):
    """Give an order; return whether the keeper has carried it out within ORDER_DEADLINE_S."""
    if not give_order(run, text):
        return False
    deadline, pause = time.monotonic() + ORDER_DEADLINE_S, 0.001
    while time.monotonic() < deadline:
        pages = run.pages()
        record = Record.read(pages[0]) if pages else None
        if record and any(each[2] == number for each in record.sent):
            return True
        if not run.alive():
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.02)
    return False


def target(run):
    """Return (pid, start) of the program if it still runs, else None."""
    launched = read_launched(read_file(run.directory, "launched"))
    if launched is None or launched[2] != boot_id():
        return None
    found = process(launched[0])
    return launched[:2] if found and found[2] == launched[1] and found[0] not in "ZX" else None


def signal_directly(run, name):
    """Signal the program without its keeper; return whether the program was there."""
    found = target(run)
    return bool(found) and signal_process(found[0], found[1], SIGNALS[name])


def checked_signal(request, default):
    name = (request.get("signal") or default).upper()
    name = name[3:] if name.startswith("SIG") else name
    name = {str(number): each for each, number in SIGNALS.items()}.get(name, name)
    if name not in SIGNALS:
        raise Refusal("bad_request", "no such signal: %s" % request["signal"])
    return name


def verb_signal(request, stdin, reply, framed):
    name = checked_signal(request, "TERM")
    run = find(request)
    wake_guards(run)
    state, how = run.state(), "ended"
    if state["state"] == "running" or target(run):
        number = os.urandom(4).hex()
        if ordered(run, number, signal_order(number, name, request)):
            how = "keeper"
        elif signal_directly(run, name):
            how = "direct"
    reply.send({"state": run.state(), "how": how})


# ============================================================ verbs/stop
# The verb stop, by the keeper's order or, without a keeper that answers, directly.

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


# ============================================================ verbs/sender
# Sending bytes to a program's stdin.

AHEAD_MAX = 64 << 20  # accepted bytes that the program hasn't read


class Sender:
    """Appends one client's bytes to `stdin`, behind those of all others, each byte once.

    A client names itself by a number of its own making and counts its bytes from 0. A record in
    `senders` says from which offset of `stdin` on the bytes are a client's, and which of that
    client's bytes they are. The record is written before the bytes. So after any kill, the lengths
    of both files tell how much was accepted from each client.
    """

    def __init__(self, run, number):
        self.run, self.number = run, number
        self.file = os.open("stdin", os.O_WRONLY | os.O_NOFOLLOW, dir_fd=run.directory)
        self.senders = os.open("senders", os.O_RDWR | os.O_NOFOLLOW, dir_fd=run.directory)
        self.terminal = bool(run.request["program"].get("pty"))
        self.at = SENDER_RECORD.size  # in `senders`; the first record is the keeper's
        self.last = (0, 0, 0)
        self.accepted = 0
        self.ended = False
        fcntl.flock(self.senders, fcntl.LOCK_EX)
        self.look()
        fcntl.flock(self.senders, fcntl.LOCK_UN)

    def look(self):
        """Read the new records of all senders; return the length of stdin. Needs the lock."""
        more = os.fstat(self.senders).st_size - self.at
        data = (
            os.pread(self.senders, more // SENDER_RECORD.size * SENDER_RECORD.size, self.at)
            if more > 0
            else b""
        )
        self.at += len(data)
        for record in SENDER_RECORD.iter_unpack(data):
            self.count(record[1])
            self.last = record
        length = os.fstat(self.file).st_size
        self.count(length)
        self.ended = self.last[0] == END_OF_STDIN
        return length

    def count(self, end):
        who, begin, offset = self.last
        if who == self.number:
            self.accepted = offset + end - begin

    def note(self, who, length):
        record = (who, length, self.accepted)
        # At a multiple of the record's size, so that one torn by a full disk is overwritten.
        if os.pwrite(self.senders, SENDER_RECORD.pack(*record), self.at) < SENDER_RECORD.size:
            raise OSError(errno.ENOSPC, "no room")
        self.at, self.last = self.at + SENDER_RECORD.size, record

    def take(self, offset, data):
        """Accept what is new of `data`, the client's bytes from `offset` on; None is the end.

        Raises BlockingIOError while there is no room, EOFError where stdin has ended or nobody has
        it open, ValueError where bytes before `offset` are missing.
        """
        fcntl.flock(self.senders, fcntl.LOCK_EX)
        try:
            length = self.look()
            if data is None and self.terminal:
                data = b"\x04"  # typed, it means the end; a terminal goes on after it
            if self.ended or self.unheard():
                raise EOFError
            if offset > self.accepted:
                raise ValueError("a hole: from %d, where %d are accepted" % (offset, self.accepted))
            if data is None:
                self.note(END_OF_STDIN, length)
                self.ended = True
                return
            data = data[self.accepted - offset :]
            if not data:
                return
            moved = SENDER_RECORD.unpack(os.pread(self.senders, SENDER_RECORD.size, 0))[0]
            if length - moved > AHEAD_MAX or free_room(self.file) < len(data):
                raise BlockingIOError
            if self.last[0] != self.number:
                self.note(self.number, length)
            while data:
                sent = os.pwrite(self.file, data, length)
                data, length, self.accepted = data[sent:], length + sent, self.accepted + sent
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise BlockingIOError from None
        finally:
            fcntl.flock(self.senders, fcntl.LOCK_UN)

    def unheard(self):
        """Return whether the program was launched and no process has its stdin open for reading."""
        if self.terminal or not exists(self.run.directory, "launched"):
            return False
        try:
            os.close(
                os.open(
                    "fifo/stdin",
                    os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW,
                    dir_fd=self.run.directory,
                )
            )
            return False
        except OSError as error:
            return error.errno == errno.ENXIO


class ClosedStdin:
    """Stands for the Sender of a run whose files were removed: nobody reads what is sent."""

    accepted, ended = 0, False

    def take(self, offset, data):
        """Raises EOFError."""
        raise EOFError


def sender_of(run, number):
    return Sender(run, number) if exists(run.directory, "senders") else ClosedStdin()


# ============================================================ verbs/times
# A run's past output: when it came, where its last lines begin, which modes it switched.

SWITCHED_FIRST, SWITCHED_LATELY, SWITCHED_MAX = (
    1 << 20,
    4 << 20,
    256,
)  # of a terminal's output, bytes looked at; sequences told


def open_file(run, name):
    """Open a file of the run for reading; an empty one where it was removed."""
    try:
        return os.open(name, os.O_RDONLY, dir_fd=run.directory)
    except FileNotFoundError:
        return os.open("/dev/null", os.O_RDONLY)


class Times:
    """The index, read as it grows: the time of each byte, in order of arrival."""

    def __init__(self, run):
        self.file = open_file(run, "index")  # without it times are lost, bytes are not
        self.run, self.streams = run, run.streams
        self.at = run.heads().get("index", 0)
        self.last = {}  # stream: (time, start) of its latest record
        self.behind = True

    def spans(self, sizes):
        """Return [(stream, start, end, time)] of the bytes below `sizes`, in order of arrival.

        It reads at most 1 MiB of new records, since an index of years doesn't fit into memory; call
        again while `behind`.
        """
        while True:
            data = os.pread(self.file, 1 << 20, self.at)
            head = self.run.heads().get("index", 0)
            if head <= self.at:
                break
            self.at, self.last = head, {}  # the data may have been a hole
        data = data[: len(data) // INDEX_RECORD.size * INDEX_RECORD.size]
        self.at += len(data)
        self.behind = self.at + INDEX_RECORD.size <= os.fstat(self.file).st_size
        records = sorted((time_ns, name, begin) for name, (time_ns, begin) in self.last.items())
        for time_ns, packed in INDEX_RECORD.iter_unpack(data):
            if packed >> STREAM_SHIFT < len(self.streams):
                records.append(
                    (
                        time_ns,
                        self.streams[packed >> STREAM_SHIFT],
                        packed & (1 << STREAM_SHIFT) - 1,
                    )
                )
        # Backwards: a span ends where the stream's next one begins. A stream's last span ends with
        # the file, unless more records follow.
        ends, spans = {} if self.behind else dict(sizes), []
        for time_ns, name, begin in reversed(records):
            if name not in ends:
                self.last[name] = (time_ns, begin)
                ends[name] = min(begin, sizes.get(name, 0))
            elif begin < ends[name]:
                spans.append((name, begin, ends[name], time_ns))
                ends[name] = begin
        if not self.behind:
            for time_ns, name, begin in records:
                self.last[name] = (time_ns, begin)
        # Bytes without a record, where the index is torn or missing, come first and have no time.
        spans += [(name, 0, end, 0) for name, end in ends.items() if end]
        return spans[::-1]


def tail_cursor(run, files, index, lines):
    """Return the offset in each stream at which the run's last `lines` lines begin."""
    sizes = {name: os.fstat(file).st_size for name, file in files.items()}
    if lines <= 0:
        return sizes
    size = os.fstat(index).st_size
    whole, heads = Times(run), run.heads()
    # Only the last 1 MiB of the index, 65,536 records. Lines before those count in file order.
    whole.at = max(whole.at, size - (1 << 20)) // INDEX_RECORD.size * INDEX_RECORD.size
    cursor = dict(sizes)
    left, first = lines, True
    for name, start, end, _ in reversed(whole.spans(sizes)):
        begin, at = max(start, heads.get(name, 0)), end
        while at > begin:
            data = os.pread(files[name], min(65536, at - begin), max(begin, at - 65536))
            if not data:
                break
            stop = len(data)
            if first:
                first = False
                stop -= data.endswith(b"\n")
            while left:
                stop = data.rfind(b"\n", 0, stop)
                if stop < 0:
                    break
                left -= 1
                if not left:
                    cursor[name] = at - len(data) + stop + 1
                    return cursor
            at -= len(data)
            cursor[name] = at
    return cursor


def since_cursor(run, files, since_us):
    """Return the offset in each stream of what came since then (us), or at an unknown time."""
    sizes = {name: os.fstat(file).st_size for name, file in files.items()}
    cursor, times = dict(sizes), Times(run)
    while times.behind:
        for name, begin, _, time_ns in times.spans(sizes):
            if name in cursor and (time_ns >= since_us * 1000 or not time_ns):
                cursor[name] = min(cursor[name], begin)
    heads = run.heads()
    return {name: max(offset, heads.get(name, 0)) for name, offset in cursor.items()}


def switched(file):
    """Return the sequences in a terminal's output that switch its modes, each at its last place.

    Of a long output only the beginning is read, where most programs switch modes, and the end.
    """
    import re

    size = os.fstat(file).st_size
    begin = max(0, size - SWITCHED_LATELY)
    text = os.pread(file, min(begin, SWITCHED_FIRST), 0) + os.pread(file, size - begin, begin)
    found = {}
    for each in re.findall(rb"\x1b(?:\[(?:[?<>=][0-9;]{1,80}[hlmu]|[0-9]{0,2} q)|[=>c])", text):
        found.pop(each, None)
        found[each] = None
    return b"".join(list(found)[-SWITCHED_MAX:]).decode("ascii")


# ============================================================ verbs/follow
# The verbs follow and wait: a run's output and States as frames, its stdin and orders back.

# Sent bytes that aren't accepted yet: twice what corra's own client sends.
HELD_MAX = 8 << 20
INPUT_MAX = 1 << 20
FRAME_MAX = 256 * 1024
PING_DEADLINE_S = 60.0
# Where the keeper's death can't be waited for, whatever frames the client sends meanwhile.
LOOK_ALONE_S = 1.0


class FileWatch:
    """inotify on the output, the slot and the directory's end.

    On most hosts a user has 128 of these. A follower that gets none is blind, and looks by itself
    LOOK_S after its last look.
    """

    def __init__(self, directory, names):
        self.fd = c_function("inotify_init1")(os.O_NONBLOCK | os.O_CLOEXEC)
        self.blind = self.fd < 0
        for name in names if not self.blind else ():
            # IN_MODIFY. For the directory IN_DELETE | IN_CREATE: its own end is reported only after
            # every process has closed it.
            path = b"/proc/self/fd/%d/%s" % (directory, name.encode())
            if (
                c_function("inotify_add_watch")(self.fd, path, 0x300 if name == "." else 0x2) < 0
                and _ctypes.get_errno() != errno.ENOENT
            ):
                self.blind = True

    def clear(self):
        if self.fd < 0:
            return
        try:
            while os.read(self.fd, 65536):
                pass
        except BlockingIOError:
            pass


class Follower:
    """Sends a run's output and States as frames, from a cursor on; takes the client's frames."""

    def __init__(self, run, request, stdin, out):
        self.run, self.request, self.stdin, self.out = run, request, stdin, out.fileno()
        wanted = request.get("streams")
        self.streams = [name for name in run.streams if wanted is None or name in wanted]
        self.live = request.get("live", True) is not False
        self.files = {name: open_file(run, name) for name in self.streams}
        self.watch = FileWatch(run.directory, self.streams + ["exit", "."])
        self.times = Times(run)
        self.cursor = dict.fromkeys(self.streams, 0)
        if request.get("tail") is not None:
            self.cursor.update(tail_cursor(run, self.files, self.times.file, int(request["tail"])))
        if request.get("since") is not None:
            later = since_cursor(run, self.files, int(request["since"]))
            self.cursor.update(
                {name: max(self.cursor[name], offset) for name, offset in later.items()}
            )
        for name, offset in (request.get("cursor") or {}).items():
            if name in self.cursor:
                self.cursor[name] = int(offset)
        self.queue = []  # frames that go out before any more output
        self.spans = []
        self.sending = None  # [file, offset, bytes left]
        self.partial = b""
        self.orders = {}  # request id: (number, signal name, deadline)
        self.page = self.state = None
        self.coming = self.sure = self.done = False
        self.sender = None
        if request.get("sender") and takes_more(run.request):
            self.sender = sender_of(run, int(request["sender"]))
        self.came = b""  # the piece of a header
        self.body = None  # (offset, bytes left) of the frame for stdin that is being read
        self.given = []  # (offset, bytes) for stdin, not accepted yet
        self.window = None
        self.heard = self.looked = time.monotonic()
        self.keeper = None  # a pidfd, which tells of its death

    def go(self):
        os.set_blocking(self.out, False)
        if self.stdin:
            os.set_blocking(self.stdin.fd, False)
        poll = select.poll()
        for fd in ([] if self.watch.fd < 0 else [self.watch.fd]) + (
            [self.stdin.fd] if self.stdin else []
        ):
            poll.register(fd, select.POLLIN)
        self.look()
        if self.sender:
            widen(self.stdin.fd, 4)
            self.acknowledge()
        while True:
            blocked = self.write()
            if not blocked and self.over():
                return
            if not blocked and self.queue:
                continue  # the last State is still to go out
            poll.register(self.out, select.POLLOUT if blocked else 0)
            if self.keeper is not None:
                poll.register(self.keeper, select.POLLIN)
            events = dict(poll.poll(self.patience_ms()))
            if events.get(self.out, 0) & (select.POLLERR | select.POLLHUP):
                return
            if self.stdin and self.stdin.fd in events and not self.listen():
                return
            if self.stdin and time.monotonic() - self.heard > PING_DEADLINE_S:
                return
            if self.given:
                self.accept()
            if self.keeper in events:
                poll.unregister(self.keeper)
                os.close(self.keeper)
                self.keeper = self.page = None
                self.resize()  # the order may have died with the keeper
            if (
                self.keeper in events
                or self.page is None
                or self.watch.fd in events
                or self.watch.blind
                or self.orders
            ):
                self.watch.clear()
                self.look()
            elif self.keeper is None and time.monotonic() - self.looked >= LOOK_ALONE_S:
                self.page = None
                self.look()

    def patience_ms(self):
        """Return how long to wait for events: to the ping's deadline, or to the next look."""
        waits = [self.heard + PING_DEADLINE_S - time.monotonic() + 0.1] if self.stdin else []
        waits += [LOOK_ALONE_S] if self.keeper is None else []
        waits += [LOOK_S] if self.watch.blind else []
        waits += [0.02] if self.orders or self.given or self.coming else []
        return max(0, int(min(waits) * 1000) + 1) if waits else None

    # ======================================================== follow: what goes out

    def look(self):
        """Read the State where the slot has changed, and queue it if it differs."""
        self.looked = time.monotonic()
        pages = self.run.pages()
        page = pages and b"".join(pages)
        if page != self.page or page is None:
            self.page = page if page is not None else b""
            state, self.sure = self.run.state(sure=self.sure), False
            if state["agent_pid"] and self.keeper is None and state["state"] not in FINAL:
                try:
                    self.keeper = pidfd(state["agent_pid"])
                except OSError:
                    self.keeper = None
            if state != self.state:
                self.state = state
                if state["state"] not in FINAL or state["hindered"]:
                    self.tell()
        self.answer()

    def tell(self):
        data = to_json(self.state).encode()
        self.queue.append(b"S %d\n" % len(data) + data)

    def limits(self):
        """Return how far each stream may be sent: up to a final State's length, unless `late`."""
        found = {}
        for name, file in self.files.items():
            size = os.fstat(file).st_size
            final = (
                self.state["streams"].get(name, {}).get("length")
                if self.state["state"] in FINAL
                else None
            )
            found[name] = size if final is None or self.request.get("late") else min(size, final)
        return found

    def plan(self):
        """Queue the next spans of output that were not sent; return whether there are any."""
        limits = self.limits()
        while not self.spans and (
            self.times.behind or any(self.cursor[name] < limits[name] for name in limits)
        ):
            planned = dict(self.cursor)
            for name, begin, end, time_ns in self.times.spans(limits):
                if name not in planned or end <= planned[name]:
                    continue
                fresh = max(begin, planned[name])
                planned[name] = end
                last = self.spans[-1] if self.spans else None
                if last and last[0] == name and last[2] == fresh and not self.request.get("times"):
                    self.spans[-1] = (name, last[1], end, last[3])
                else:
                    self.spans.append((name, fresh, end, time_ns))
            if not self.times.behind:
                break
        return bool(self.spans)

    def over(self):
        """Return whether all was sent, the last State included."""
        if self.done or self.spans or self.sending:
            return self.done
        if self.live and self.state["state"] not in FINAL:
            return False
        before, self.state = self.state, self.run.state(details=True)
        final, hindered = self.state["state"] in FINAL, self.state["hindered"]
        sizes = {name: stat.st_size for name, stat in self.run.sizes().items()}
        lengths = {name: each["length"] for name, each in self.state["streams"].items() if final}
        short = [name for name, length in lengths.items() if sizes.get(name, length) < length]
        unsent = [name for name in self.streams if self.cursor[name] < lengths.get(name, 0)]
        # The keeper moves the last bytes right after the end, unless the disk is full.
        moving = short and self.state["supervisor"] != "gone"
        self.coming = bool(moving and not hindered) or bool(set(unsent) - set(short))
        if self.coming or (moving and unsent and self.live):
            if hindered != before["hindered"]:
                self.tell()
            return False
        for name in unsent if not moving else ():
            self.queue.append(b"G %s %d %d\n" % (name.encode(), self.cursor[name], lengths[name]))
        self.tell()
        self.done = True
        return False

    def write(self):
        """Write until nothing is left or the client is slow; return whether it is slow."""
        try:
            while True:
                while self.partial:
                    self.partial = self.partial[os.write(self.out, self.partial) :]
                if self.sending:
                    file, offset, left = self.sending
                    sent = self.send(file, offset, left)
                    self.sending = [file, offset + sent, left - sent] if sent < left else None
                elif self.queue:
                    self.partial, self.queue = b"".join(self.queue), []
                elif self.spans:
                    self.next_frame()
                elif not self.plan():
                    return False
        except BlockingIOError:
            if self.sending:
                widen(self.out)
            return True

    def next_frame(self):
        """Begin to send the first span."""
        name, begin, end, time_ns = self.spans[0]
        size, data = min(end - begin, FRAME_MAX), b""
        if self.run.bounded:
            begin = max(begin, self.cursor[name])
            size = max(0, min(end - begin, FRAME_MAX))
            data = os.pread(self.files[name], size, begin)
            head = self.run.heads().get(name, 0)
            if size and head > begin:
                # The data may have been a hole. All that is gone makes one gap, whatever its spans.
                self.cursor[name] = min(head, max(end, self.limits()[name]))
                self.partial = b"G %s %d %d\n" % (name.encode(), begin, self.cursor[name])
                return
        if size:
            self.partial = b"O %s %d %d %d\n" % (name.encode(), begin, size, time_ns) + data
            self.sending = [self.files[name], begin, size] if not self.run.bounded else None
            self.cursor[name] = begin + size
        self.spans[0] = (name, begin + size, end, time_ns)
        if begin + size >= end:
            del self.spans[0]

    def send(self, file, offset, size):
        try:
            return os.sendfile(self.out, file, offset, size)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return os.write(self.out, os.pread(file, min(size, 65536), offset))

    # ======================================================== follow: what comes in

    def listen(self):
        """Read the client's frames; return False where it has gone or a frame makes no sense."""
        try:
            data = os.read(self.stdin.fd, FRAME_MAX)
        except BlockingIOError:
            return True
        if not data:
            return False
        self.heard = time.monotonic()
        data, self.stdin.ahead, self.came = self.came + self.stdin.ahead + data, b"", b""
        at = 0
        while at < len(data):
            if self.body:
                offset, left = self.body
                part = data[at : at + left]
                self.given.append((offset, part))
                at += len(part)
                self.body = (offset + len(part), left - len(part)) if left > len(part) else None
                continue
            end = data.find(b"\n", at, at + 64)
            if end < 0:
                self.came = data[at:]
                break
            if not self.heed(data[at:end].decode("ascii", "replace").split(" ")):
                return False
            at = end + 1
        return (
            len(self.came) <= 64
            and self.accept()
            and sum(len(part or b"") for _, part in self.given) <= HELD_MAX
        )

    def heed(self, words):
        """Carry out a frame's header; return whether it is one."""
        numbers = [int(word) for word in words[1:] if word.isdigit()]
        if words[0] == "P":
            self.queue.append(b"H\n")
            if self.state and self.run.hindered() != self.state["hindered"]:
                # No file of the run tells that its keeper is stopped.
                self.page, self.sure = None, True
        elif words[0] == "K" and len(words) == 3 and words[2].isdigit():
            # Another machine may have more signals. No answer tells the client that none was sent.
            if words[1] in SIGNALS:
                number = os.urandom(4).hex()
                wake_guards(self.run)
                give_order(self.run, signal_order(number, words[1], self.request))
                self.orders[number] = (int(words[2]), words[1], time.monotonic() + ORDER_DEADLINE_S)
        elif words[0] == "I" and self.sender and len(numbers) == 2 and numbers[1] <= INPUT_MAX:
            self.body = tuple(numbers) if numbers[1] else None
        elif words[0] == "E" and self.sender and len(numbers) == 1:
            self.given.append((numbers[0], None))
        elif words[0] == "W" and len(numbers) == 2:
            self.window = numbers
            self.resize()
        else:
            return False
        return True

    # ======================================================== follow: the program's stdin

    def resize(self):
        if self.window:
            give_order(self.run, "- window %d %d" % tuple(self.window))

    def accept(self):
        """Accept bytes for stdin and acknowledge them; return False where bytes are missing."""
        if not self.given:
            return True
        ended, accepted, closed = self.sender.ended, self.sender.accepted, False
        try:
            while self.given:
                self.sender.take(*self.given[0])
                ended = ended or self.given[0][1] is None
                del self.given[0]
        except BlockingIOError:
            pass
        except EOFError:
            self.given, closed = [], not self.sender.ended
        except ValueError:
            return False
        if self.sender.accepted != accepted or self.sender.ended:
            give_order(self.run, "- stdin")
        self.acknowledge(ended=ended, closed=closed)
        return True

    def acknowledge(self, ended=False, closed=False):
        kind = b"C" if closed else b"E" if ended or self.sender.ended else b"I"
        self.queue.append(b"A %s %d\n" % (kind, self.sender.accepted))

    def answer(self):
        """Acknowledge the orders that the keeper has carried out; signal directly if it is late."""
        if not self.orders:
            return
        record = Record.read(self.page[:PAGE]) or Record()
        done = {each[2] for each in record.sent}
        for number, (serial, name, deadline) in list(self.orders.items()):
            late = time.monotonic() > deadline
            heard = number in done
            if late and not heard:
                # No answer tells the client that the signal has reached nobody, as of a program
                # that is dead.
                heard = signal_directly(self.run, name)
            if heard:
                self.queue.append(b"A %d\n" % serial)
            if heard or late:
                del self.orders[number]


def verb_follow(request, stdin, reply, framed):
    """Reply with the State, then with frames.

    For a tail or a time the State has the `cursor` where it begins, so that a link cut at once
    loses no line. For a client whose terminal becomes the program's, it has the modes `switched`
    on there.
    """
    run = find(request)
    state = run.state()
    if request.get("sender") and not takes_more(run.request):
        file = run.request["program"].get("stdin") is not None
        how = "what it was given at its start" if file else "/dev/null"
        raise Refusal("no_stdin", "its stdin is %s (run had no -i)" % how, state=state)
    follow = Follower(run, request, stdin if framed else None, reply.out)
    more = {"cursor": follow.cursor} if {"tail", "since"} & set(request) else {}
    if more and follow.sender and state["pty"] and "output" in follow.files:
        more["switched"] = switched(follow.files["output"])
    reply.send(dict(state, **more))
    follow.go()


def verb_wait(request, stdin, reply, framed):
    verb_follow(dict(request, streams=[]), stdin, reply, framed)


# ============================================================ verbs/fold
# Folding away: a run that has ended becomes a line of the archive, and its directory goes.

# Folded away with one sync. Whoever wants to read one of them waits for that.
BATCH = 32
# What was taken out of ROOT/runs and is being removed.
GONE = ".gone-"


class Ended:
    """A run that has ended, locked against watchers until it is let go."""

    def __init__(self, known):
        """Raises OSError: BlockingIOError where somebody watches it."""
        self.known, self.run = known, Run(known.root, known.prog_id)
        # O_CREAT: without the file nobody could hold the run.
        self.index = os.open(
            "index", os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600, dir_fd=self.run.directory
        )
        try:
            fcntl.flock(self.index, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.line = line_of(self.run, known.ended_ns())
            known.held = held_by(self.run)
        except BaseException:
            self.let_go()
            raise

    def settle(self):
        """Make sure that nobody launches it any more; return whether it may be folded away.

        A guard that was stopped for long could take the claim after the clock was set.
        """
        directory = self.run.directory
        if not exists(directory, "launched") and exists(directory, "exit"):
            give_up(self.run, ChildProcessError(), "its guards died before they started it")
            self.line = line_of(self.run, self.known.ended_ns())
        self.launched = exists(directory, "launched")
        return self.line is not None

    def let_go(self):
        os.close(self.index)
        self.run.close()

    def drop_output(self):
        """Empty the files that grow. Readers find their lengths in the record."""
        for name in self.run.streams + ["index", "stdin"]:
            if exists(self.run.directory, name):
                file = os.open(name, os.O_WRONLY | os.O_NOFOLLOW, dir_fd=self.run.directory)
                os.ftruncate(file, 0)
                os.close(file)


def lockable(due):
    """Yield an Ended for each Known in `due` that nothing keeps from being folded away."""
    for known in due:
        try:
            found = Ended(known)
        except OSError:
            continue  # watched, removed since, or damaged: its output is all that is left of it
        if found.line is None:
            found.let_go()
        else:
            yield found


def settled(due):
    """Yield those that are lockable and that nobody launches any more."""
    for each in lockable(due):
        try:
            sure = each.settle()
        except OSError:
            sure = False
        if sure:
            yield each
        else:
            each.let_go()


def fold(root, due, over):
    """Fold away the Known in `due`, which are all of `root`, until `over()`.

    Return (those that were, those whose output is removed and whose record has no place in the
    archive, those that are left).
    """
    folded, emptied = [], []
    if not due:
        return folded, emptied, due
    try:
        archive = make_archive(root)
    except OSError:
        archive = None
    runs = os.open(join(root, "runs"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        for at in range(0, len(due), BATCH):
            if over():
                return folded, emptied, due[at:]
            # Others fold as well, or forget, between two batches.
            if archive:
                archive.lock()
            batch = list(settled(due[at : at + BATCH]))
            try:
                moved = fold_batch(archive, runs, batch)
            except OSError:
                moved = None
            finally:
                for each in batch:
                    each.let_go()
            (emptied if moved is None else folded).extend(each.known for each in batch)
            for name in moved or ():
                try:
                    discard(runs, name)
                except OSError:
                    pass  # the next gc removes it
            if archive:
                archive.unlock()
        return folded, emptied, []
    finally:
        os.close(runs)
        if archive:
            archive.close()


def fold_batch(archive, runs, batch):
    """Take runs out of ROOT/runs, and return the names under which they are to be removed.

    The archive is locked; None stands for one that can't be written. Raises OSError: a line has no
    room; output was removed then, and the records stay where they are.
    """
    try:
        months = archive_lines(archive, batch)
    except OSError:
        # On a full disk, what is to be freed must be freed first.
        for each in batch:
            each.drop_output()
        months = archive_lines(archive, batch)
    moved = []
    for each in batch:
        try:
            moved.append(move_away(runs, each.run.prog_id))
        except FileNotFoundError:
            pass  # somebody has removed it by hand
    # What isn't in ROOT/runs any more must not be back after a power cut, half removed.
    os.fsync(runs)
    for name in months:
        month = archive.month(name)
        # Each look-up reads what stands behind an index; to write it for each batch is dear.
        cover(month, month.size // 8)
    return moved


def archive_lines(archive, batch):
    """Have a line in the archive for each run; return the months that were written to.

    Raises OSError: some may have none.
    """
    if archive is None:
        raise OSError(errno.EACCES, "there is no archive")
    lines = {}
    for each in batch:
        created = int(each.run.request.get("created") or 0)
        # It may be there: somebody was killed before the directory was removed.
        there = archive.with_id(each.run.prog_id)
        # A claim that nobody launched adds nothing to an id that is there; what an older agent has
        # run once more does.
        if there is None or (each.launched and there.created != created):
            lines.setdefault(month_of(each.run.prog_id, created), []).append(each.line)
    for name, several in lines.items():
        append(archive, name, several)
    return list(lines)


def cover(month, bearable=0):
    """Write the month's index anew where much stands behind it: more than `bearable` bytes."""
    behind = month.size - (month.index.covered if month.index else 0)
    if behind > max(UNCOVERED_MAX, bearable):
        try:
            month.write_index()
        except OSError:
            pass  # no room: what is behind it is read


def move_away(runs, prog_id):
    """Take a run out of ROOT/runs in one step; return the name under which it is removed."""
    name = "%s%s-%s" % (GONE, prog_id, os.urandom(4).hex())
    os.rename(prog_id, name, src_dir_fd=runs, dst_dir_fd=runs)
    return name


def remove_claim(root, prog_id):
    """Remove a claim that nobody has launched, of an id that the archive has.

    Raises OSError: FileNotFoundError where there is none; EBUSY where it has guards, as those of an
    older agent, which knows of no archive.
    """
    archive = Archive(root)
    try:
        archive.lock()
        remove_unlaunched(root, prog_id)
    finally:
        archive.close()


def remove_unlaunched(root, prog_id):
    runs = os.open(join(root, "runs"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        claim = os.open(prog_id, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=runs)
        try:
            # As a guard does it: who has this lock decides what becomes of the run.
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if exists(claim, "launched"):
                raise OSError(errno.EBUSY, "it was launched", prog_id)
            name = move_away(runs, prog_id)
        finally:
            os.close(claim)
        discard(runs, name)
    finally:
        os.close(runs)


# ============================================================ verbs/gc
# The verb gc, and what a start cleans up once a day.

KEEP_RECORD_S, KEEP_YOUNG_S, KEEP_AGENT_S = 400 * 86400, 3 * 86400, 30 * 86400
KEEP_BYTES = 2 << 30
# A client waits 15 s for an answer, and may ask again for what is left.
PATIENCE_S = 5.0


def due_runs(request, found, now):
    """Return those of the Known in `found` that are to be folded away, the oldest end first.

    Output goes by its age, then the oldest beyond `max_size`. A run that has none goes KEEP_YOUNG_S
    after its end.
    """
    ids, older = request.get("ids"), request.get("older")
    most = KEEP_BYTES if request.get("max_size") is None else request["max_size"]
    bare_s = KEEP_YOUNG_S if request.get("records") is None else request["records"]
    total, due = sum(known.held for known in found), []
    for known in sorted(found, key=lambda known: (known.ended_ns(), known.prog_id)):
        age_s = (now - known.ended_ns()) / 1e9
        keep_s = known.keep_s or (KEEP_GOOD_S if known.word == "done" else KEEP_BAD_S)
        surplus = total > most and age_s > KEEP_YOUNG_S
        if surplus:
            total -= known.held
        if ids is not None:
            wanted = known.prog_id in ids and known.held
        elif known.held:
            wanted = surplus or age_s > (keep_s if older is None else older)
        else:
            wanted = age_s > bare_s
        if wanted:
            due.append(known)
    return due


def ended_runs(spool, over):
    """Return (the Known of each run that has ended, how many runs were not looked at)."""
    found, left = [], 0
    for prog_id, cached in spool.each():
        if cached is None and over():
            left += 1
            continue
        try:
            known = cached or spool.read(prog_id)
        except OSError:
            continue  # removed since it was listed, another user's, or damaged
        known.text = None
        if state_word(known.word) in FINAL:
            found.append(known)
    return found, left


def collect(request, now, over):
    """Return what gc removes, and remove it unless `dry`, until `over()`; `left` is the rest."""
    dry, left = request.get("dry"), 0
    by_root, found = {}, []
    for spool in spools(request):
        ended, unread = ended_runs(spool, over)
        by_root[spool.root] = spool
        found += ended
        left += unread
    # By how much there is of all of them, the oldest are told; so all must be known first.
    # Their age is that of now: a lost run may have been noted while they were looked at.
    due = due_runs(request, found, now_ns()) if not left else []
    removed, freed, folded, forgotten = [], 0, 0, []
    for root, spool in by_root.items():
        spool.flush()
        of_root = [known for known in due if known.root == root]
        done, emptied, rest = would_go(of_root) if dry else fold(root, of_root, over)
        removed += [known.prog_id for known in done + emptied if known.held]
        freed += sum(known.held for known in done + emptied)
        folded += len(done)
        left += len(rest)
        if request.get("ids") is None and not left:
            try:
                forgotten += forget(root, now, dry)
            except OSError as error:
                raise unreadable(join(root, "archive"), error) from None
        if not dry:
            tidy(spool, now)
        spool.close()
    return {
        "removed": sorted(set(removed) - set(forgotten)),
        "forgotten": sorted(forgotten),
        "folded": folded,
        "freed": freed,
        "left": left,
        "dry": bool(dry),
    }


def would_go(due):
    """Return what `fold` would: those of the Known in `due` that nothing keeps from going."""
    found = []
    for each in lockable(due):
        found.append(each.known)
        each.let_go()
    return found, [], []


def forget(root, now, dry):
    """Remove the months whose runs all ended KEEP_RECORD_S ago; return the ids of those.

    Not before: a start that is repeated after its record is gone would run again. A runbook's
    record stays.
    """
    try:
        archive = Archive(root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        if not dry:
            archive.lock()
        forgotten = []
        for month in archive.months():
            if month.ends()[1] < now - KEEP_RECORD_S * 10**9:
                forgotten += forget_month(archive, month, dry)
        return forgotten
    finally:
        archive.close()


def tidy(spool, now):
    """Remove what starters and gc left behind when they died; write the cache anew if it pays."""
    try:
        archive = make_archive(spool.root)
    except OSError:
        return
    try:
        archive.lock()  # whoever removes a directory has it
        for month in archive.months():
            cover(month)
        for name in os.listdir(spool.runs):
            try:
                if name.startswith(GONE) or (
                    name.startswith(".new-")
                    and os.stat(name, dir_fd=spool.runs).st_mtime < now / 1e9 - 3600
                ):
                    discard(spool.runs, name)
            except OSError:
                pass  # the next gc does it
        spool.compact()
    except OSError:
        pass
    finally:
        archive.close()


def sweep_agents(now_s):
    """Remove agents that nobody has started for KEEP_AGENT_S."""
    own = parent(absolute(CODE.co_filename))
    cache = parent(own)
    if len(base(own)) != 64:
        return  # run by hand and not from a cache
    for name in os.listdir(cache):
        path = join(cache, name + "/agent.py")
        if len(name) != 64 or name == base(own) or not present(path):
            continue
        # Every start reads the file to check its hash, which moves atime at least once a day.
        if max(os.stat(path).st_atime, os.stat(path).st_mtime) < now_s - KEEP_AGENT_S:
            above = os.open(cache, os.O_RDONLY | os.O_DIRECTORY)
            discard(above, name)
            os.close(above)


def verb_gc(request, stdin, reply, framed):
    """Reply with what was removed in PATIENCE_S at most, and how many runs are `left`."""
    if request.get("ids") is not None:
        found = [find({"prog_id": each, "spool": request.get("spool")}) for each in request["ids"]]
        request["ids"] = [run.prog_id for run in found]
        for run in found:
            run.close()  # nobody holds it, then
    deadline = time.monotonic() + PATIENCE_S
    found = collect(request, now_ns(), lambda: time.monotonic() > deadline)
    if not request.get("dry"):
        sweep_agents(time.time())
    reply.send(found)


def clean_up(request):
    """Do what a start does once a day."""
    collect({"spool": request.get("spool")}, now_ns(), lambda: False)
    sweep_agents(time.time())


# ============================================================ verbs/deliver
# The verb deliver.

def verb_deliver(request, stdin, reply, framed):
    """Deliver the run's output and end once more, or give its courier another token or route."""
    run = find(request)
    callback = request.get("callback") or {}
    if not run.request.get("callback") and not callback.get("url"):
        raise Refusal("no_callback", "it was started without a callback", state=run.state())
    if isinstance(run, ArchivedRun):
        state = run.state()
        when = "its output was removed on %s" % state["archived_time"][:10]
        raise Refusal("removed", when, state=state)
    place_courier(request.get("courier"))
    if callback.get("token") and not callback.get("url"):
        replace(run.directory, "token", octets(callback["token"]))
    if request.get("route") is not None:
        replace(run.directory, "route", octets(request["route"]))
    found = None
    if request.get("seconds") != 0:
        asked = to_json(
            {"callback": callback, "from": request.get("from"), "seconds": request.get("seconds")}
        )
        words = [sys.executable, "-ISE", beside("courier.py"), "now", run.path, beside("agent.py")]
        found = from_json(answer_of(words, asked, None) or b"null")
    reply.send({"state": run.state(), "delivered": found})


# ============================================================ verbs/look
# The verbs status and read.

def verb_status(request, stdin, reply, framed):
    reply.send(find(request).state(details=True, sure=True))


def verb_read(request, stdin, reply, framed):
    """Reply with a range of a stream's bytes, as far as the stream goes."""
    run = find(request)
    name = request.get("stream") or run.streams[0]
    if name not in run.streams:
        raise Refusal(
            "bad_request", "no stream %s: this run has %s" % (name, " and ".join(run.streams))
        )
    file = open_file(run, name)
    size = os.fstat(file).st_size
    begin = min(max(0, int(request.get("start") or 0)), size)
    end = size if request.get("end") is None else min(max(begin, int(request["end"])), size)
    if run.bounded:
        read_bounded(run, reply, name, file, begin, end, size)
        return
    reply.send({"stream": name, "start": begin, "end": end, "length": size})
    while begin < end:
        data = os.pread(file, min(end - begin, 1 << 18), begin)
        reply.write(data)
        begin += len(data)


def read_bounded(run, reply, name, file, begin, end, size):
    """Reply with at most BOUND_STEP of a range whose beginning may be gone, or go meanwhile.

    It is read before its place is named.
    """
    while True:
        begin = min(max(begin, run.heads().get(name, 0)), end)
        data = os.pread(file, min(end - begin, BOUND_STEP), begin)
        if run.heads().get(name, 0) <= begin or begin == end:
            break
    reply.send({"stream": name, "start": begin, "end": begin + len(data), "length": size})
    reply.write(data)


# ============================================================ verbs/digest
# The verb digest: whether outputs are alike is told by their hashes, and no output travels.

# Enough for a read to cost little, and a digest of 20 MB takes no more memory than that.
HASHED_AT_ONCE = 1 << 18


def verb_digest(request, stdin, reply, framed):
    """Reply with the length and the BLAKE2b of each stream of a run that has ended.

    With `stream`, `start` and `end` it is the digest of that range, which must be there, and the
    run may go on.
    """
    run = find(request)
    state = run.state()
    ranged = request.get("start") is not None or request.get("end") is not None
    if ranged and request.get("stream") is None:
        raise Refusal("bad_request", "a range is one of a stream: say which")
    if state["state"] not in FINAL and not ranged:
        raise Refusal("running", "it has not ended, and its output grows", state=state)
    names = run.streams if request.get("stream") is None else [request["stream"]]
    digests = {}
    for name in names:
        if name not in run.streams:
            raise Refusal(
                "bad_request", "no stream %s: this run has %s" % (name, " and ".join(run.streams))
            )
        facts = state["streams"].get(name) or {"length": 0, "dropped": 0}
        end, dropped = facts["length"], facts["dropped"]
        if ranged:
            begin = int(request.get("start") or 0)
            end = end if request.get("end") is None else int(request["end"])
            if not dropped <= begin <= end <= facts["length"]:
                raise Refusal(
                    "no_range",
                    "%s has the bytes %d to %d, not %d to %d"
                    % (name, dropped, facts["length"], begin, end),
                )
        digests[name] = digest_of(run, name, dropped if not ranged else begin, end)
    reply.send({"state": state, "digests": digests})


def digest_of(run, name, begin, end):
    """Return the digest of a stream's bytes from `begin` to `end`, as far as they are there.

    Whoever removes a beginning says so before the bytes are gone (see bounds). So the digest is of
    nothing but output if what was removed is still before `begin` when all is hashed.
    """
    import _blake2  # only here, and hashlib would take 5 ms

    while True:
        found, at = _blake2.blake2b(digest_size=32), begin
        try:
            file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=run.directory)
        except FileNotFoundError:
            file = None
        while file is not None and at < end:
            data = os.pread(file, min(end - at, HASHED_AT_ONCE), at)
            if not data:
                break
            found.update(data)
            at += len(data)
        if file is not None:
            os.close(file)
        gone = run.heads().get(name, 0)
        if gone <= begin or begin == end:
            return {"start": begin, "end": at, "length": end, "blake2b": found.hexdigest()}
        begin = min(gone, end)


# ============================================================ verbs/listing
# The verb list: the runs of a host, page by page, the newest first.

# A page: 1,000 States have some 1.5 MB.
LIST_MAX, LIST_BYTES = 1000, 4 << 20
UNREADABLE_MAX = 100


def verb_list(request, stdin, reply, framed):
    """Reply with a page of States, how many more there are, and with what can't be read."""
    most = LIST_MAX if request.get("limit") is None else min(LIST_MAX, int(request["limit"]))
    before = None if request.get("before") is None else read_cursor(request["before"])
    page, damaged = Page(Wanted(request), most, before), []
    for spool in spools(request):
        for known in known_runs(spool, damaged):
            page.offer(known)
        spool.close()
    # After ROOT/runs: a run goes from there to the archive.
    for _ in in_archives(request, lambda archive: offer_archive(page, archive)):
        pass
    texts, shown, last = states_of(request, page.newest(), damaged)
    facts = {"host": os.uname().nodename, "user": user_name(), "total": page.total}
    if page.wanted.counted:
        facts.update(more=page.matching - shown, counts=page.counts)
    more = facts["more"] if page.wanted.counted else shown == most
    facts["next"] = "%d:%s" % last if more and last else None
    if damaged:
        facts["unreadable"] = damaged
    # The States are JSON already.
    reply.send_text(to_json(facts)[:-1] + ', "runs": [' + ", ".join(texts) + "]}")


def known_runs(spool, damaged):
    """Yield the Known of each run in ROOT/runs; add to `damaged` what can't be read."""
    for prog_id, known in spool.each():
        try:
            yield known or spool.read(prog_id)
        except OSError as error:
            note_damage(damaged, prog_id, error)


def note_damage(damaged, prog_id, error):
    """Add a run to `damaged` whose files say what no agent has written.

    Else it was removed since it was listed, or is another user's.
    """
    if error.errno == errno.EBADMSG and len(damaged) < UNREADABLE_MAX:
        damaged.append({"prog_id": prog_id, "dir": error.filename, "message": error.strerror})


def offer_archive(page, archive):
    """Offer the runs of an archive to the page, and read no more of it than that takes."""
    wanted, sources = page.wanted, []
    for month in archive.months():
        words, (oldest, newest) = month.words(), month.ends()
        page.total += sum(words.values())
        if wanted.since_ns is not None and newest < wanted.since_ns:
            continue  # all of it ended before that
        partly = wanted.since_ns is not None and oldest < wanted.since_ns
        fitting = words_of(month, wanted, words)
        if fitting is None or (wanted.counted and partly):
            for line in month.lines(having=wanted.having):
                page.consider(line)
            continue
        for word, number in fitting.items() if wanted.counted else ():
            page.count(word, number)
        sources.append(of_words(month, wanted, fitting, sum(words.values())))
    taken = 0
    for line in merged(sources) if page.limit else ():
        if wanted.within(line) and page.take(line):
            taken += 1
            if taken == page.limit:
                return


def words_of(month, wanted, words):
    """Return {word: how many} of what fits but for its word and its age; None: it takes a reading.

    `words` are those of all.
    """
    if wanted.asks_more:
        return None
    if not wanted.asks_person:
        return words
    people = month.people()
    if people is None:
        return None
    found = {}
    for (user, host), counts in people.items():
        if wanted.user in (None, user) and wanted.host in (None, host):
            for word, number in counts.items():
                found[word] = found.get(word, 0) + number
    return found


def of_words(month, wanted, words, total):
    """Yield the newest first of the Lines that `words` counts and that are asked for.

    `total` is how many the month has. It reads no more than it yields, or the whole file once.
    """
    left = sum(number for word, number in words.items() if wanted.has_word(word))
    if not left:
        return
    if left * 8 < total and wanted.having:
        lines = sorted(month.lines(having=wanted.having), key=Known.key, reverse=True)
    else:
        lines = month.newest_first()
    for line in lines:
        if wanted.has_word(line.word) and wanted.is_of(line):
            yield line
            left -= 1
            if not left:
                return


def merged(sources):
    """Yield the Known of several iterators, each the newest first, in one such order."""
    heads = [(next(source, None), source) for source in sources]
    while True:
        heads = [head for head in heads if head[0] is not None]
        if not heads:
            return
        place = max(range(len(heads)), key=lambda at: Known.key(heads[at][0]))
        known, source = heads[place]
        yield known
        heads[place] = (next(source, None), source)


def states_of(request, found, damaged):
    """Return the States of the runs as JSON, as many as a page has room for.

    Also return how many of the runs those are, and the key of the last.
    """
    texts, shown, size, last = [], 0, 0, None
    for known in found:
        text = known.text or state_text(request, known, damaged)
        size += len(text)
        if size > LIST_BYTES and texts:
            break
        texts += [text] if text else []
        shown, last = shown + 1, known.key()
    return texts, shown, last


def state_text(request, known, damaged):
    """Return the State of a run as JSON; "" for one that was removed since it was found.

    Also for one that was damaged since it was noted as ended; that is added to `damaged`.
    """
    try:
        try:
            run = known.open()
        except FileNotFoundError:
            run = find_exact(request, known.prog_id)  # it may have been folded away meanwhile
            if run is None:
                return ""
        try:
            return to_json(run.state(sure=True))
        finally:
            run.close()
    except OSError as error:
        note_damage(damaged, known.prog_id, error)
        return ""
    except Refusal:
        return ""
'''
