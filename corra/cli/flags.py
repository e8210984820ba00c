"""The flags that several verbs have, and how the text behind a flag becomes its value.

What a reader raises for a text it can't read is said as a misuse of its flag: ValueError, or Misuse with a reason of its own.
"""

from __future__ import annotations

from .readers import (
    one_of,
    read_byte_range,
    read_detach_keys,
    read_moment,
    read_patience,
    read_pattern,
    read_seconds,
    read_transport,
)
from .words import listing, option, switch

# As in program.Mode, which `inv --list` has no need of.
AS_MODES = ("ssh-then-sudo", "ssh-as", "sudo-then-ssh", "sudo-then-ssh-then-sudo")

HOST_FLAG = listing(
    "host",
    "H",
    "hosts",
    help="Where: HOST, user@host:port or local; db1,web[1-3] are several. Default: what history says.",
)
TARGET_FLAG = listing(
    "host",
    "H",
    "hosts",
    help="Where: HOST, user@host:port, or local for this machine. Default: $CORRA_HOST.",
)
REACH_FLAGS = (
    option("user", "u", help="Log in as this user."),
    option("as", help="Run as this user there, by sudo."),
    option(
        "mode",
        read=one_of(*AS_MODES),
        help="What --as means: ssh-then-sudo, ssh-as, sudo-then-ssh .. (docs/sudo.md).",
    ),
    option(
        "via",
        read=read_transport,
        help="fabric, openssh (the ssh program), chaperone (kept by this machine), chaperone@HOST (by HOST).",
    ),
    option(
        "connect-timeout",
        read=read_seconds,
        help="How long a host may take to answer (15s; 5s for ps).",
    ),
    option("spool", help="Directory on the host instead of the usual one."),
)
SHOW_FLAGS = (
    switch("timestamps", "t", help="Put the time of arrival before each line."),
    option("stream", read=one_of("stdout", "stderr", "both"), help="Only stdout or stderr (both)."),
    switch("raw", help="Let escape sequences through to this terminal."),
)
COLLECTOR_FLAGS = (
    option("collector", help="Ask this collector of the configuration, not the host."),
)
FILTER_FLAGS = (
    option(
        "grep", "g", read=read_pattern, help="Only lines in which this regular expression is found."
    ),
    option(
        "since", read=read_moment, help="Only what came since: 10m (ago), 14:30, 2026-11-24T14:30."
    ),
    option("until", read=read_moment, help="Only what came until then."),
    option(
        "bytes",
        read=read_byte_range,
        help="Only the bytes A:B of a stream (stdout's), B not included: 0:4096, 1M:, :64K.",
    ),
    switch("late", help="Also what was written after its end by processes that it left behind."),
)
LINK_FLAGS = (
    option(
        "reconnect-timeout", read=read_seconds, help="Give a lost link up after this long (never)."
    ),
    option(
        "dead-after",
        read=read_patience,
        help="Call a link dead that is silent for this long (15s).",
    ),
)
KEYBOARD_FLAGS = (
    option(
        "detach-keys",
        read=read_detach_keys,
        default=b"\x1d",
        help="What leaves its terminal: ctrl-p,ctrl-q and the like, or none (ctrl-]).",
    ),
)
WATCH_FLAGS = (
    option(
        "timeout",
        "T",
        read=read_seconds,
        help="Stop watching after this long; the program goes on (none).",
    ),
    *LINK_FLAGS,
)
