"""Processes: fork thinly, look at a process or a tree, signal it."""

import _signal
import errno
import posix as os
import struct
import sys

from .kernel import Byte, c_fork, checked, prctl, stop_tracing, syscall
from .paths import slurp

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
