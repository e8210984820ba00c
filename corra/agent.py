"""corra's agent (constants only for the moment; the rest is being written)."""

VERSION = "0.1.0"
PROTOCOL = 1
TRANSITIONS = {
    "starting": ("running", "not_started", "lost", "exited"),
    "running": ("exited", "lost"),
    "exited": (),
    "not_started": (),
    "lost": (),
}
FINAL = tuple(sorted(state for state, after in TRANSITIONS.items() if not after))
REASONS = ("exited", "signaled", "killed", "timeout", "oom", "exec", "setup", "reboot", "agent-gone", "spool-gone", "link")
