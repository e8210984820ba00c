"""The parts that stand as text at the end of the made file: only some verbs need them.

What a start has loaded, its guards keep for weeks: 5 bytes for each byte of source. So what no
start needs before its guards are forked is compiled when it is asked for.
"""

import marshal
import posix as os
import sys

from ..files import fill
from ..paths import CODE, absolute, base, parent, slurp

LATE_BEGIN, LATE_END = "\nr'''\n", "\n'''\n"


def late(name):
    """Return a function or class of any part, and load the late ones for it. Raises OSError."""
    if name not in globals():
        exec(late_code(), globals())  # noqa: S102 - it is of this very file
    return globals()[name]


def late_code():
    """Return the late parts, compiled; as with a .pyc, that is kept where Python keeps such."""
    if "AGENT_SOURCE" in globals():  # it came without a file
        return compiled_late(globals()["AGENT_SOURCE"])
    path = absolute(CODE.co_filename)
    kept = getattr(globals().get("__spec__"), "cached", None)
    kept = kept and kept.rpartition(".")[0] + ".late"
    found = os.stat(path)
    sign = b"%x %d %d\n" % (sys.hexversion, found.st_mtime_ns, found.st_size)
    try:
        data = slurp(kept, os.stat(kept).st_size) if kept else b""
        if data.startswith(sign):
            return marshal.loads(data[len(sign) :])  # noqa: S302 - as a .pyc is
    except (OSError, ValueError, EOFError, TypeError):
        pass  # there is none, or it is torn
    code = compiled_late(slurp(path, found.st_size).decode())
    if kept:
        try:
            keep_late(kept, sign + marshal.dumps(code))
        except OSError:
            pass  # no room, or only for reading: it is compiled each time
    return code


def compiled_late(source):
    begin, end = source.index(LATE_BEGIN) + len(LATE_BEGIN), source.rindex(LATE_END)
    # With the lines before it, so that tracebacks name those of the made file.
    text = "\n" * source.count("\n", 0, begin) + source[begin:end] + "\n"
    return compile(text, CODE.co_filename, "exec")


def keep_late(path, data):
    """Write the file in one step. Raises OSError."""
    above = os.open(parent(path), os.O_RDONLY | os.O_DIRECTORY)
    new = ".late.%s" % os.urandom(4).hex()
    try:
        fill(above, new, data, 0o644)
        os.rename(new, base(path), src_dir_fd=above, dst_dir_fd=above)
    finally:
        os.close(above)


def __getattr__(name):  # Python 3.7
    """Return a name of the late parts for whoever imports the made file."""
    if name.startswith("__") or "verb_list" in globals():
        raise AttributeError(name)
    return late(name)
