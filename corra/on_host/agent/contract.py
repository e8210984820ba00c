r"""corra's agent: starts one program on this host so that it outlives whoever asked, and answers for it.

    agent.py < program.json        start it, print its State as JSON, leave; the guards stay
    agent.py VERB < request        VERB is one of run start follow status signal stop wait read list gc deliver

Needs Linux 3.10 and Python 3.6, and nothing but its standard library. Silent on import.

Request, on stdin    "<bytes>\n" and that much JSON; a first byte "{" means JSON up to the end of file, as by hand.
Reply, on stdout     the line "corra 1 NONCE" (when the request has a nonce), one line of JSON, and for run, follow, wait and stop frames.
                     A refusal is a reply too: {"error": KIND, "message": ...}.
Exit code            0 answered, 1 refused, 2 the request could not be read.

A run is a directory, ROOT/runs/PROG-ID; ROOT is ${XDG_STATE_HOME:-~/.local/state}/corra, or /var/tmp/corra-UID where that can't be.
    program.json       the request, without its secrets
    stdout stderr      what the program wrote ("output" alone with merge or a pty); the length of the file is the only truth about it
    stdin              what it is given to read; while that is held open, its length is what was accepted
    senders            24 bytes a record: whose bytes stand in stdin from which offset on (only where that is held open)
    index              16 bytes a record: time (ns), stream and its offset; a torn one loses a time, never a byte
    heads              only with keep_output: how much of each stream, and of the index, has been given back to the disk
    fifo/              the program's ends          control    orders to the keeper
    launched           who was launched: it exists exactly when exec was tried    keeper    the lock of whoever may touch the FIFOs
    exit               two pages, overwritten in place: the keeper's record, and why exec failed
    state.json         a copy of the State, for people
    courier.json       what the collector has acknowledged    token    opens the collector    (both only with a callback)
A flock on the directory itself is the guards' sign of life.

Three guards keep a run: two standbys and the keeper, each the parent of the next and the keeper the parent of the program. Whichever
dies, the nearest living ancestor becomes the parent of the program and goes on. They import nothing after their start, hold no timer
while nothing happens, and are forked by a fresh interpreter that has seen little else. With a callback the keeper has one more child,
courier.py beside this file: a process of its own, started again when it dies.
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
END_OF_STDIN = (1 << 64) - 1  # who "sends" the end
REQUEST_MAX = 64 << 20
SPLICE = 1 << 20
BOUND_MIN = 65536  # what keep_output is at least, as much as a pipe holds; also the least that is punched out at once
BOUND_STEP = 16 << 20
START_DEADLINE_S = 10.0
LOOK_S = 0.1
ORDER_DEADLINE_S = 2.0
KEEP_GOOD_S, KEEP_BAD_S = 14 * 86400, 30 * 86400
KILL_DEADLINE_NS = 2 * 10**9
CARRIER_DEADLINE_NS = 5 * 10**9  # a shell on a loaded host took 2 s to find all of a tree
GRACE_S = 10.0
AFTER_GRACE = "corra, after the grace"  # who sends a stop's KILL
PATH = b"/usr/local/bin:/usr/bin:/bin"  # where there is none
SIGNALS = {
    name[3:]: getattr(_signal, name)
    for name in dir(_signal)
    if name.startswith("SIG") and "_" not in name and name not in ("SIGCLD", "SIGPOLL", "SIGIOT")
}
SIGNAL_NAMES = {number: "SIG" + name for name, number in SIGNALS.items()}
RLIMITS = {
    "cpu": 0,
    "core": 4,
    "files": 7,
    "memory": 9,
}  # the same numbers on every machine that Python's wheels are built for
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


class Refusal(Exception):
    """A reply that says no: `kind` is for programs, the message for people."""

    def __init__(self, kind, message, **facts):
        Exception.__init__(self, message)
        self.reply = dict(facts, error=kind, message=message)
