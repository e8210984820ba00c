"""The flags of each verb: a class a verb, and a class for the flags that several verbs share."""

from __future__ import annotations

from collections.abc import Sequence

from .readers import (
    is_signal,
    read_batch,
    read_byte_range,
    read_count,
    read_detach_keys,
    read_host_limit,
    read_limit,
    read_lines,
    read_moment,
    read_offset,
    read_output_kept,
    read_patience,
    read_pattern,
    read_seconds,
    read_share,
    read_signal,
    read_size,
    read_state,
    read_token_limits,
    read_transport,
)
from .words import Flag, Given, listing, one_of, option, switch

# As in model.host.Mode, which `inv --list` does without.
AS_MODES = ("ssh-then-sudo", "ssh-as", "sudo-then-ssh", "sudo-then-ssh-then-sudo")
# `attach` without --tail: 200 lines on a terminal, else all.
TAIL_BY_TERMINAL = -1

_REPEATABLE = "; repeatable."


# -- Shared by several verbs


class ReachFlags(Given):
    """Which hosts are meant, and how they are reached."""

    # What `-` has read of stdin, which can be read once, and what has been said of the choice.
    stdin_hosts: Sequence[str] | None = None
    host_notes: frozenset[str] = frozenset()

    host = listing(
        "host",
        "H",
        "hosts",
        takes="HOST",
        help="HOST, user@host:port or local; db1,web[1-3], @GROUP, !web2, - for stdin "
        "(docs/hosts.md). Default: the history's hosts.",
    )
    limit = listing(
        "limit",
        takes="SET",
        read=read_host_limit,
        help="Of these hosts only those in SET" + _REPEATABLE,
    )
    inventory = option(
        "inventory",
        takes="FILE",
        help="FILE or directory of Ansible's: its names, groups and addresses; "
        "without --host all of it.",
    )
    user = option("user", "u", takes="USER", help="Log in as this user.")
    as_user = option("as", takes="USER", help="Run as this user on the host, by sudo.")
    mode = option(
        "mode",
        takes="MODE",
        read=one_of(*AS_MODES),
        help="What --as means: ssh-then-sudo, ssh-as, sudo-then-ssh .. (docs/sudo.md).",
    )
    via = option(
        "via",
        takes="LINK",
        read=read_transport,
        help="fabric, openssh (the ssh program), chaperone (this machine keeps the run), "
        "chaperone@HOST (HOST keeps it).",
    )
    connect_timeout = option(
        "connect-timeout",
        takes="TIME",
        read=read_seconds,
        help="How long a host may take to answer (15s; 5s for ps).",
    )


class HostFlags(ReachFlags):
    """Where a run is."""

    spool = option("spool", takes="DIR", help="Directory on the host instead of the usual one.")


class RawFlag(Given):
    raw = switch("raw", help="Let the program's escape sequences through to this terminal.")


class NewKeyFlag(Given):
    accept_new_key = switch("accept-new-key", help="Remember the key of a host never seen before.")


class LinkFlags(Given):
    """How patient a watch is with its link."""

    reconnect_timeout = option(
        "reconnect-timeout",
        takes="TIME",
        read=read_seconds,
        help="Give up a lost link after this long (never).",
    )
    dead_after = option(
        "dead-after",
        takes="TIME",
        read=read_patience,
        help="Call a link dead that is silent for this long (15s).",
    )


class WatchFlags(LinkFlags):
    timeout = option(
        "timeout",
        "T",
        takes="TIME",
        read=read_seconds,
        help="Stop watching after this long; the program goes on (none).",
    )


class ShowFlags(RawFlag):
    """How output is shown."""

    timestamps = switch("timestamps", "t", help="Put the time of arrival before each line.")
    stream = option(
        "stream",
        takes="NAME",
        read=one_of("stdout", "stderr", "both"),
        help="Only stdout or stderr (both).",
    )


class KeyboardFlags(Given):
    interactive = switch(
        "interactive",
        "i",
        help="Send the program what is typed or piped in here; "
        "the program's terminal becomes this one.",
    )
    detach_keys = option(
        "detach-keys",
        takes="KEYS",
        read=read_detach_keys,
        default=b"\x1d",
        help="Keys that leave the program's terminal: ctrl-p,ctrl-q and the like, or none "
        "(ctrl-]).",
    )


class CollectorFlag(Given):
    collector = option(
        "collector",
        takes="NAME",
        help="Ask this collector of the configuration instead of the host.",
    )


class TunnelFlags(CollectorFlag):
    callback_through_ssh = switch(
        "callback-through-ssh",
        help="While you watch, lead the run's reports to --collector through this connection.",
    )


class FoldFlags(Given):
    """How the output of many hosts becomes few."""

    fold = switch(
        "fold", help="At the end show hosts with the same output and exit as one, and none live."
    )
    diff = switch(
        "diff", help="As --fold, and of the smaller groups what differs from the largest."
    )


class FleetViewFlags(FoldFlags):
    """How a fleet is shown, and who rolls it."""

    prefix = option(
        "prefix",
        takes="WHAT",
        read=one_of("host", "time", "none"),
        default="host",
        help="What stands before a line of a fleet's output: host, time, none (host).",
    )
    output_dir = option(
        "output-dir",
        takes="DIR",
        help="Also write HOST.out, HOST.err and HOST.json of a fleet there.",
    )
    take_over = switch("take-over", help="Roll a fleet here that another operator rolls.")


class FleetFlags(FleetViewFlags):
    """How a program is rolled out over several hosts (docs/fleets.md)."""

    batch: Flag[list[int | str]] = option(
        "batch",
        takes="N[%],..",
        read=read_batch,
        default=[],
        help="Waves of N hosts or N% of all; 1,10%,100% grow. A wave begins when the one before "
        "is over.",
    )
    at_once = option(
        "at-once", takes="N", read=read_count, help="How many hosts may run at once (32)."
    )
    max_fail = option(
        "max-fail",
        takes="N[%]",
        read=read_share,
        help="Stop beyond N failures, or N% of all hosts (with waves 0, else no limit).",
    )
    max_unreached = option(
        "max-unreached",
        takes="N[%]",
        read=read_share,
        help="Stop beyond N hosts that can't be reached, which then are no failures.",
    )
    pause = option(
        "pause", takes="TIME", read=read_seconds, help="How long to wait between two waves."
    )
    confirm = switch("confirm", help="Ask before each wave but the first.")
    kill_on_fail = switch("kill-on-fail", help="When it stops, also kill what still runs.")
    start_timeout = option(
        "start-timeout",
        takes="TIME",
        read=read_seconds,
        help="Give a host up that hasn't started after (60s).",
    )


class LaunchFlags(HostFlags, NewKeyFlag, LinkFlags, RawFlag, KeyboardFlags, TunnelFlags):
    """What `run` and `again` share."""

    detach = switch("detach", "d", help="Print the id and leave as soon as the program is started.")
    id = option(
        "id", takes="ID", help="The run's id: the same id with the same command is the same run."
    )
    secret = listing(
        "secret",
        takes="K[=FILE]",
        help="K=FILE, or K for my own value: in the program's environment, never on disk"
        + _REPEATABLE,
    )
    collector = option(
        "collector",
        takes="NAME",
        help="Have the run report its output and its end to this collector of the configuration.",
    )


# -- One verb each


class RunFlags(LaunchFlags, FleetFlags):
    host = listing(
        "host",
        "H",
        "hosts",
        takes="HOST",
        help="HOST, user@host:port, or local for this machine; web[1-3], @GROUP, !web2, "
        "- for stdin (docs/hosts.md). Default: $CORRA_HOST.",
    )
    plan = switch("plan", help="Print the waves, and start nothing.")
    order = option(
        "order",
        takes="ORDER",
        read=one_of("given", "sorted", "reversed", "shuffle"),
        help="In which order hosts start: given, sorted, reversed, shuffle (given).",
    )
    canary = listing(
        "canary", takes="HOST", help="A host that is a wave before all others" + _REPEATABLE
    )
    each = switch("each", help="A host that is named twice is started twice.")
    journal = option(
        "journal", takes="HOST", help="The host that keeps a fleet's journal (this machine)."
    )
    name = option("name", takes="NAME", help="A name to find the run by.")
    cwd = option(
        "cwd", "C", takes="DIR", help="Directory on the host (the home; on local: this one)."
    )
    env = listing("env", "E", takes="K[=V]", help="K=V, or K for my own value of it" + _REPEATABLE)
    env_file = option("env-file", takes="FILE", help="A file of lines K=V, or K for my own value.")
    stdin = option(
        "stdin", takes="FILE", help="FILE, - for my own stdin, or none (none): all of it is sent."
    )
    interactive = switch(
        "interactive",
        "i",
        help="Hold the program's stdin open and send mine, or later inv send's.",
    )
    pty = switch(
        "pty",
        "p",
        help="Give the program a terminal; with -i it is this one (docs/interactive.md).",
    )
    merge = switch("merge", help="stdout and stderr as one stream, in order.")
    timeout = option(
        "timeout",
        "T",
        takes="TIME",
        read=read_seconds,
        help="End the program after this long, on the host's own clock (never).",
    )
    grace = option(
        "grace", takes="TIME", read=read_seconds, help="From the stop signal to KILL (10s)."
    )
    stop_signal = option(
        "stop-signal", takes="SIG", read=read_signal, help="The signal that asks it to stop (TERM)."
    )
    keep = option(
        "keep", takes="TIME", read=read_seconds, help="How long the host keeps its output (14d)."
    )
    keep_output = option(
        "keep-output",
        takes="SIZE",
        read=read_output_kept,
        help="Keep only the last SIZE of each stream, however much is written (all).",
    )
    ulimit = listing(
        "ulimit",
        takes="NAME=VALUE",
        read=read_limit,
        help="NAME=VALUE: files, core, cpu, memory, nice, oom_score_adj, memory_max, cpu_quota "
        "(docs/run.md)" + _REPEATABLE,
    )
    wait_children = switch(
        "wait-children", help="The run ends when the last of the program's descendants has ended."
    )
    force = switch("force", help="Start the program though a logout there will end it.")


class AgainFlags(LaunchFlags, FleetFlags):
    only = option(
        "only",
        takes="WHICH",
        read=one_of("failed", "unreached", "not-started"),
        help="Of a fleet only these (all three).",
    )
    redo = listing(
        "redo",
        takes="HOST",
        help="Of a fleet also these LOST hosts; you have looked there" + _REPEATABLE,
    )
    detach = switch("detach", "d", help="Print the new id and leave as soon as it is started.")
    id = option(
        "id",
        takes="ID",
        help="The new run's id: the same id with the same command is the same run.",
    )
    interactive = switch(
        "interactive",
        "i",
        help="Send the program what is typed or piped in here, if the run had -i or --pty.",
    )
    secret = listing(
        "secret",
        takes="K[=FILE]",
        help="K=FILE, or K for my own value: the host keeps no secret, so give it again"
        + _REPEATABLE,
    )


class AttachFlags(HostFlags, ShowFlags, WatchFlags, KeyboardFlags, TunnelFlags, FleetViewFlags):
    tail: Flag[int | None] = option(
        "tail",
        "n",
        takes="N",
        read=read_lines,
        default=TAIL_BY_TERMINAL,
        help="Begin with the last N lines, or all (200 on a terminal, else all; 0: from now).",
    )
    sig_proxy = switch("sig-proxy", help="Pass INT and TERM on to the program.")
    watch_only = switch("watch-only", help="Start nothing of a fleet that isn't started yet.")
    yes = switch("yes", "y", help="Say yes to a fleet's next wave.")
    secret = listing(
        "secret",
        takes="K[=FILE]",
        help="K=FILE, or K for my own value: what a fleet still starts needs it again.",
    )


class SendFlags(HostFlags, WatchFlags):
    line = switch("line", help="End TEXT with a newline.")
    eof = switch("eof", help="Then end the program's stdin; on a terminal, type Ctrl-D.")


class LogsFlags(HostFlags, ShowFlags, FoldFlags):
    follow = switch("follow", "f", help="Go on as more comes, to the end.")
    tail = option(
        "tail",
        "n",
        takes="N",
        read=read_lines,
        default=None,
        help="Only the last N lines, or all (all).",
    )
    grep = option(
        "grep",
        "g",
        takes="WORD",
        read=read_pattern,
        help="Only lines in which this regular expression is found.",
    )
    since = option(
        "since",
        takes="TIME",
        read=read_moment,
        help="Only what came since: 10m (ago), 14:30, 2026-11-24T14:30.",
    )
    until = option("until", takes="TIME", read=read_moment, help="Only what came until then.")
    bytes = option(
        "bytes",
        takes="A:B",
        read=read_byte_range,
        help="Only the bytes A:B of a stream (stdout's), B not included: 0:4096, 1M:, :64K.",
    )
    late = switch("late", help="Also what processes wrote that the program left behind.")


class ExportFlags(HostFlags):
    output = option(
        "output", "o", takes="FILE", help="FILE, or - for stdout (NAME-ID.cast, .html, .tar.gz)."
    )
    format = option(
        "format",
        takes="FORM",
        read=one_of("cast", "html", "tar"),
        help="cast (asciinema's), html, or tar (what FILE ends with, else cast).",
    )
    v2 = switch("v2", help="An asciicast of version 2, for players older than asciinema 3.")
    tail = option(
        "tail", "n", takes="N", read=read_lines, default=None, help="Only the last N lines (all)."
    )
    redact = listing(
        "redact",
        takes="FILE",
        help="Also cut out what matches FILE's regular expressions, one a line" + _REPEATABLE,
    )
    no_redact = switch("no-redact", help="Leave corra's own rules out (docs/export.md).")
    force = switch("force", help="Replace a FILE that is there.")


class DiffFlags(HostFlags):
    ignore = listing(
        "ignore",
        takes="REGEX",
        read=read_pattern,
        help="Don't compare what matches, such as times and ids" + _REPEATABLE,
    )
    stream = option(
        "stream",
        takes="NAME",
        read=one_of("stdout", "stderr", "both"),
        help="Only stdout or stderr (both).",
    )


class KillFlags(HostFlags):
    signal = option(
        "signal",
        "s",
        takes="SIG",
        read=read_signal,
        help="Send only this signal, and no KILL after it; -HUP and -15 are signals too "
        "(the stop signal, the grace, then KILL to the whole tree).",
    )
    kill_now = switch("kill-now", "9", help="KILL to the whole tree now.")
    grace = option(
        "grace",
        takes="TIME",
        read=read_seconds,
        help="From the signal to KILL (what run was given, 10s).",
    )
    all = switch("all", "a", help="All that run on --host.")
    yes = switch("yes", "y", help="Don't ask, though a run is another's or on several hosts.")
    no_wait = switch("no-wait", help="Don't wait for the end.")

    @classmethod
    def spelled_out(cls, word: str) -> tuple[str, ...]:
        """Take `-15` and `-HUP` for a signal, as kill(1) does; `-9` is a flag of ours."""
        name = word[1:]
        numbered = name.isdecimal() and name != "9"
        return ("-s", name) if word[:1] == "-" and (numbered or is_signal(name)) else (word,)


class PsFlags(HostFlags, CollectorFlag):
    all = switch("all", "a", help="Also those that ended well or long ago.")
    quiet = switch("quiet", "q", help="Full ids only.")
    state = option(
        "state",
        takes="STATE",
        read=read_state,
        help="Only these, by the word in the table: "
        "running, done, FAILED, KILLED, TIMEOUT, LOST ..",
    )
    grep = option("grep", takes="WORD", help="Only those with this in their name, id or command.")
    since = option(
        "since",
        takes="TIME",
        read=read_seconds,
        help="How far back an end counts (24h; with -a or --state for ever).",
    )
    mine = switch("mine", help="Only those I started.")
    format = option(
        "format",
        takes="FORM",
        help="A line of my own: '{id} {state} {command}', any column or key of --json.",
    )
    no_trunc = switch("no-trunc", help="Don't cut commands off.")


class StatusFlags(HostFlags):
    tree = switch("tree", help="Also the run's processes, and what each uses.")
    exit_code = switch("exit-code", help="Exit as the program did, 122 while it runs (else 0).")


class WaitFlags(HostFlags, WatchFlags):
    any = switch("any", help="Until the first of them has ended; print its id.")


class GcFlags(HostFlags):
    older = option(
        "older",
        takes="TIME",
        read=read_seconds,
        help="What ended longer ago than this (14d after a good end, else 30d).",
    )
    max_size = option(
        "max-size",
        takes="SIZE",
        read=read_size,
        help="Then the oldest, until a host has no more than this (2G).",
    )
    yes = switch("yes", "y", help="Don't ask.")


class DoctorFlags(HostFlags, NewKeyFlag):
    place = switch("place", help="Also bring the agent there.")


class BookFlags(ReachFlags):
    host = listing(
        "host",
        "H",
        "hosts",
        takes="HOST",
        help="The host that keeps the journal. "
        "Default: where the runbook of this machine keeps it, or here.",
    )
    redo = listing(
        "redo",
        takes="STEP",
        help="Have the next pass do STEP or STEP@HOST anew; the only way for a LOST one"
        + _REPEATABLE,
    )
    skip = listing(
        "skip",
        takes="STEP",
        help="Leave STEP or STEP@HOST out; for a question it is a yes" + _REPEATABLE,
    )
    markdown = switch("markdown", help="The audit trail as Markdown.")


class DeliverFlags(HostFlags):
    to = option(
        "to",
        takes="NAME",
        help="Another collector: its name in the configuration, "
        "or its URL with $CORRA_COLLECTOR_TOKEN.",
    )
    start = option(
        "from",
        takes="N",
        read=read_offset,
        help="Send again from this byte of each stream (what is acknowledged).",
    )
    timeout = option(
        "timeout",
        "T",
        takes="TIME",
        read=read_seconds,
        default=60.0,
        help="How long it may take (60s).",
    )


class ServeFlags(Given):
    listen = option(
        "listen", takes="HOST:PORT", default="127.0.0.1:8050", help="HOST:PORT (127.0.0.1:8050)."
    )
    database = option(
        "database",
        takes="FILE",
        help="Where the data is: a path (collector.sqlite3 beside this machine's history).",
    )
    tls_cert = option(
        "tls-cert",
        takes="FILE",
        help="The certificate, in PEM, with those between it and its authority.",
    )
    tls_key = option("tls-key", takes="FILE", help="The certificate's key.")
    insecure = switch(
        "insecure",
        help="Listen to other machines without TLS, where a proxy in front of it does that.",
    )
    keep = option(
        "keep", takes="TIME", read=read_seconds, help="How long an ended run is kept (90d)."
    )
    max_size = option(
        "max-size",
        takes="SIZE",
        read=read_size,
        help="Beyond this size the oldest ended runs go, too (no limit).",
    )
    limits = option(
        "limits",
        takes="LIMITS",
        read=read_token_limits,
        help="What one token may cost: body=4M,rate=1000,runs=10000,disk=64G.",
    )
    webhook = listing(
        "webhook", takes="URL", help="URL, or slack=URL, that is told of each end" + _REPEATABLE
    )
    log_requests = switch("log-requests", help="Log a line for each request.")
    new_token = option(
        "new-token",
        takes="NAME=..",
        help="Make a token and leave: NAME=read,write, or NAME=read:host=db* to see only those.",
    )
    revoke_token = option(
        "revoke-token",
        takes="NAME",
        help="Revoke the tokens of this NAME, and those of the runs registered with them.",
    )
