"""The keys of a request, and what may be wrong with their values."""

from ..contract import BOUND_MIN, RLIMITS, SIGNALS, STREAM_SHIFT
from ..paths import octets
from .ids import valid_id

TEXT, NUMBER, FLAG, OBJECT, LIST = (str,), (int, float), (bool,), (dict,), (list, tuple)
KEYS = {
    "": {
        "prog_id": TEXT, "nonce": TEXT, "name": TEXT, "origin": OBJECT, "program": OBJECT,
        "run": OBJECT, "secrets": OBJECT, "callback": OBJECT, "config": OBJECT, "spool": TEXT,
        "cursor": OBJECT, "tail": NUMBER, "streams": LIST, "live": FLAG, "since": NUMBER,
        "late": FLAG, "times": FLAG, "signal": TEXT, "grace": NUMBER, "by": TEXT, "stream": TEXT,
        "start": NUMBER, "end": NUMBER, "match": TEXT, "courier": TEXT, "from": NUMBER,
        "seconds": NUMBER, "route": TEXT, "sender": NUMBER, "ids": LIST, "older": NUMBER,
        "max_size": NUMBER, "dry": FLAG, "states": LIST, "mine": OBJECT, "link": TEXT,
        "limit": NUMBER, "before": TEXT, "fleet": TEXT, "count": FLAG, "records": NUMBER,
    },
    "program": {
        "argv": LIST, "cwd": TEXT, "env": OBJECT, "env_inherit": FLAG + LIST,
        "stdin": TEXT + OBJECT, "umask": NUMBER, "merge": FLAG, "pty": FLAG, "limits": OBJECT,
        "host": TEXT,
    },
    "run": {
        "timeout": NUMBER, "grace": NUMBER, "stop_signal": TEXT, "keep_output": NUMBER,
        "keep": NUMBER, "wait_children": FLAG, "force": FLAG, "carrier": LIST, "terminal": OBJECT,
        "forget_stdin": FLAG,
    },
    "secrets": {"env": OBJECT, "token": TEXT},
    "callback": {"url": TEXT, "method": TEXT, "token": TEXT, "ca": TEXT, "state": FLAG},
    "config": {
        "retry_frequency": NUMBER, "timeout": NUMBER, "output_buffer": NUMBER,
        "output_latency": NUMBER,
    },
}  # fmt: skip


def complaints(request):
    """Return all that is wrong with a request, as sentences."""
    if not isinstance(request, dict):
        return ["a request is an object"]
    found = []
    mine = request.get("mine")
    if isinstance(mine, dict) and not all(
        key in ("user", "host") and isinstance(each, str) for key, each in mine.items()
    ):
        found.append("mine must have a user, a host or both")
    for key in ("streams", "cursor", "states"):
        values = request.get(key)
        if isinstance(values, list) and not all(isinstance(each, str) for each in values):
            found.append(key + " must be a list of names")
        if isinstance(values, dict) and not all(
            isinstance(each, int) and 0 <= each < 1 << STREAM_SHIFT for each in values.values()
        ):
            found.append(key + " must have offsets")
    for part, keys in KEYS.items():
        value = request if not part else request.get(part)
        if not isinstance(value, dict):
            continue
        for key, each in value.items():
            name = (part + "." if part else "") + key
            if key not in keys:
                found.append("unknown key: " + name)
            elif each is not None and (
                not isinstance(each, keys[key])
                or (isinstance(each, bool) and bool not in keys[key])
            ):
                found.append(
                    "%s must be %s" % (name, " or ".join(kind.__name__ for kind in keys[key]))
                )
            elif isinstance(each, str) and not sound(each):
                found.append("%s has a NUL or half a character in it" % name)
            elif keys[key] is NUMBER and each is not None and not 0 <= each <= 1 << 53:
                found.append("%s must be a number from 0 up" % name)
    return found


def sound(text):
    """Return whether the kernel can take `text`: no NUL, no surrogate that stands for no byte."""
    try:
        return b"\0" not in octets(text)
    except UnicodeEncodeError:
        return False


def start_complaints(request):
    """Return all that is wrong with a request to start a program."""
    found = complaints(request)
    if found:
        return found
    program, options = request.get("program"), request.get("run") or {}
    if not program:
        return ["no program"]
    argv = program.get("argv")
    if not argv or not all(isinstance(word, str) for word in argv) or not argv[0]:
        found.append("program.argv must be a list of words, the first not empty")
    elif any("\0" in word for word in argv):
        found.append("a word of program.argv has a NUL byte in it")
    elif not all(map(sound, argv)):
        found.append("a word of program.argv has half a character in it")
    for source, variables in (
        ("program.env", program.get("env")),
        ("secrets.env", (request.get("secrets") or {}).get("env")),
    ):
        for name, value in (variables or {}).items():
            if (
                not name
                or "=" in name
                or not sound(name)
                or not (value is None or (isinstance(value, str) and sound(value)))
            ):
                found.append("%s: not a variable: %r" % (source, name))
    source, umask = program.get("stdin"), program.get("umask")
    counted = (
        isinstance(source, dict)
        and type(source.get("bytes")) is int
        and source["bytes"] >= 0
        and set(source) <= {"bytes", "sha256"}
    )
    if isinstance(source, dict) and not counted and source != {"open": True}:
        found.append(
            'program.stdin must be {"bytes": N}, {"bytes": N, "sha256": "HEX"} or {"open": true}'
        )
    if program.get("pty") and (source is not None or program.get("merge")):
        found.append(
            "program.pty: its terminal is its stdin, and its output is one stream as it is"
        )
    terminal = options.get("terminal") or {}
    sizes = [terminal.get(key) for key in ("rows", "columns") if terminal.get(key) is not None]
    if not all(type(each) is int and 0 < each < 10000 for each in sizes) or not isinstance(
        terminal.get("term", ""), str
    ):
        found.append('run.terminal must be {"rows": N, "columns": N, "term": NAME}')
    elif not sound(terminal.get("term", "")):
        found.append("run.terminal: not a name")
    if umask is not None and not (isinstance(umask, int) and umask <= 0o777):
        found.append("program.umask must be from 0 to 511 (0o777)")
    if isinstance(program.get("env_inherit"), list) and not all(
        isinstance(name, str) and sound(name) for name in program["env_inherit"]
    ):
        found.append("program.env_inherit must be a list of names")
    if not all(isinstance(word, str) and sound(word) for word in options.get("carrier") or ()):
        found.append("run.carrier must be a list of words")
    if options.get("stop_signal") and options["stop_signal"] not in SIGNALS:
        found.append("run.stop_signal: no such signal: " + options["stop_signal"])
    if request.get("callback") and not request["callback"].get("url"):
        found.append("callback.url is missing")
    found += limit_complaints(program.get("limits") or {})
    if options.get("keep_output") is not None and not (
        isinstance(options["keep_output"], int) and options["keep_output"] >= BOUND_MIN
    ):
        found.append("run.keep_output must be a whole number of bytes, %d or more" % BOUND_MIN)
    if request.get("prog_id") is not None and not valid_id(request["prog_id"]):
        found.append("prog_id must match [a-z0-9][a-z0-9._-]{0,63}")
    return found


def limit_complaints(limits):
    """Return all that is wrong with program.limits: {name: number or [soft, hard]}."""
    ranges = {
        "nice": (-20, 19),
        "oom_score_adj": (-1000, 1000),
        "memory_max": (1, 1 << 62),
        "cpu_quota": (1, 10**6),
    }
    ranges.update(dict.fromkeys(RLIMITS, (-1, 1 << 62)))
    found = []
    for name, value in limits.items():
        values = value if isinstance(value, (list, tuple)) and name in RLIMITS else [value]
        if name not in ranges:
            found.append(
                "program.limits: no limit %s: there are %s" % (name, " ".join(sorted(ranges)))
            )
        elif value is not None and not (
            1 <= len(values) <= 2
            and all(
                type(each) is int and ranges[name][0] <= each <= ranges[name][1] for each in values
            )
        ):
            found.append("program.limits: %s must be from %d to %d" % ((name,) + ranges[name]))
        elif len(values) == 2 and values[0] % (1 << 64) > values[1] % (1 << 64):
            found.append("program.limits: %s: its soft limit is above its hard one" % name)
    return found
