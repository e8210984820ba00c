"""Processes: to be one, to look at them, to signal them."""

import _signal
import errno
import posix as os
import struct
import sys

from .kernel import (
    Byte,
    c_fork,
    checked,
    prctl,
    syscall,
)
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


def become(title):
    """Name this process, and take in the orphans of its descendants (the subreaper flag isn't inherited by fork)."""
    prctl(15, title, 0, 0, 0)
    prctl(36, 1, 0, 0, 0)


def fork_thin():
    """Fork by the C library alone, where there is one thread: what Python does besides writes to 15 pages that were shared till then.

    Before 3.8 that is also what makes signals heard. Raises OSError.
    """
    return checked(c_fork()) if sys.version_info >= (3, 8) else os.fork()


def usage(pid):
    """Return the resource usage of a dead but unreaped child; os.waitid has it thrown away, the raw call hasn't."""
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
    """Return a descriptor that means this process for ever. Raises OSError (ENOSYS before Linux 5.3)."""
    return checked(syscall(_PIDFD_OPEN, pid, 0))


def signal_process(pid, start, number):
    """Send a signal to the process `pid` that began at `start`; return whether it was there to be signalled.

    The start time is looked at again after the pidfd is open: from then on the pid can't come to mean a stranger.
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
        return False  # gone, or it has become another user's: who counts survivors will see it
    finally:
        if handle >= 0:
            os.close(handle)


def ended(pid):
    """Return the raw wait status of the child `pid` without reaping it, or None while it lives. Raises ChildProcessError."""
    info = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if info is None or not info.si_pid:
        return None
    return (
        info.si_status << 8
        if info.si_code == 1
        else info.si_status | (0x80 if info.si_code == 3 else 0)
    )


def boot_id():
    return slurp("/proc/sys/kernel/random/boot_id").decode().strip()


def process(pid):
    """Return (state letter, parent, start time in ticks, name) of a process, or None when there is none."""
    try:
        text = slurp("/proc/%d/stat" % pid).decode("ascii", "replace")
    except OSError:
        return None
    # After the last ")": a program may call itself "a) Z 1 1 (".
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return fields[0], int(fields[1]), int(fields[19]), head.partition("(")[2]


def process_tree(roots, spared=()):
    """Return {pid: (state, parent, start, name)} of all living descendants of the processes `roots`, without `spared` and theirs."""
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
    """Return the pids of a single-threaded process's children, zombies too: one small file, where `tree` looks at all processes there are."""
    try:
        return [int(each) for each in slurp("/proc/%d/task/%d/children" % (pid, pid)).split()]
    except OSError:
        return list(process_tree([pid]))  # a kernel without CONFIG_PROC_CHILDREN


def kill_tree(roots, spared=()):
    """KILL all descendants of `roots`: stop every one first, until a walk finds no new one, so that nobody forks away."""
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
    """Return how many processes of our memory cgroup (else of the machine) the kernel has killed for want of memory, ever."""
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
