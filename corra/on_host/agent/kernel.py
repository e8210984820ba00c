"""The kernel, by the C library's own functions: pipes, disks and clocks."""

import _ctypes
import errno
import fcntl
import posix as os
import struct
import sys
import time

SEEK_CUR, SEEK_END = 1, 2  # os has names for them, posix has not
PIPE_MAX = 256 * 1024
FLOOR = 1 << 30
FLOOR_SHARE = 20  # the last twentieth of a small disk isn't ours either


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
    _restype_ = _Int  # not long: the upper half of a register with an int in it is anything, and -1 wouldn't be below 0


class _LongFunction(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO
    _restype_ = _Long


def c_function(name, kind=_Function):
    """Return a function of the C library. ctypes itself is a package of Python code: 3 ms and 250 kB that each guard would carry."""
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
    """Move up to `size` bytes from a pipe into a file in one step; 0 at the end, BlockingIOError when there are none."""
    while True:
        result = _splice(
            source, None, target, None, _Long(size), 3
        )  # SPLICE_F_MOVE | SPLICE_F_NONBLOCK
        if result >= 0 or _ctypes.get_errno() != errno.EINTR:
            return checked(result)


def widen(pipe, factor=2):
    """Have a pipe hold `factor` times as much, up to PIPE_MAX.

    256 KiB are as fast as 1 MiB, and as an ordinary user 64 pipes of 1 MiB use up pipe-user-pages-soft, after which every new one is 8 KiB.
    """
    try:
        size = fcntl.fcntl(pipe, _F_GETPIPE_SZ)
        if size < PIPE_MAX:
            fcntl.fcntl(pipe, F_SETPIPE_SZ, min(size * factor, PIPE_MAX))
    except OSError:
        pass  # not a pipe, or no more of them for this user


def unread(fifo):
    """Return how many bytes stand in a FIFO."""
    return struct.unpack("i", fcntl.ioctl(fifo, _FIONREAD, b"\0" * 4))[0]


def give_back():
    """Give the C library's free memory back to the kernel: three guards would keep it for weeks."""
    try:
        c_function("malloc_trim")(0)
    except OSError:
        pass  # musl has none, and keeps little


def wide(name):
    """Return the C library's function whose offsets have 64 bits: where off_t always has, as in musl, it has the plain name."""
    try:
        return c_function(name + "64")
    except OSError:
        return c_function(name)


def punch(file, end, begin=0):
    """Give a file's disk below `end` back; its length stays, and with it every offset. Raises OSError: EOPNOTSUPP where there are no holes."""
    while True:
        result = wide("fallocate")(
            file, 3, _Offset(begin), _Offset(end - begin)
        )  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
        if result >= 0 or _ctypes.get_errno() != errno.EINTR:
            return checked(result)


def wipe(file, begin, end):
    """Give a part of a file back to the disk; where that can't be done, at least nobody can read it any more."""
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
    """Return how many bytes the disk under `file` has above its floor; what is below that isn't ours to fill."""
    disk = os.fstatvfs(file)
    return disk.f_bavail * disk.f_frsize - min(FLOOR, disk.f_blocks * disk.f_frsize // FLOOR_SHARE)
