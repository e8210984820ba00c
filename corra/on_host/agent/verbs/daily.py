"""The daily cleaning by a start."""

import fcntl
import posix as os
import time

from ..paths import join
from .late import late

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
