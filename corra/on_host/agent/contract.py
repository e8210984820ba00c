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

import _signal
import errno
import struct

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
