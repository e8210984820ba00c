"""The program's limits: rlimits, nice and its score when memory runs out."""

import posix as os
import struct

from ..contract import RLIMITS
from ..kernel import Byte, checked, wide

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
