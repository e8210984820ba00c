"""Pipes, disks and clocks of the kernel, by the C library's own functions."""

import _ctypes
import _signal
import errno
import fcntl
import posix as os
import struct
import sys
import time

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
