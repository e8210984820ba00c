"""The constant command that finds a Python on a host, and the files that are sent to it."""

from __future__ import annotations

import functools
import re
import sys
from pathlib import Path

PYTHONS = (
    "python3",
    "/usr/libexec/platform-python",
    *(f"python3.{minor}" for minor in range(14, 5, -1)),
)

_ON_HOST = Path(__file__).parents[1] / "on_host"


def _sent(name: str) -> str:
    """Return the code of a file that the host executes, without the comment at its top."""
    text = (_ON_HOST / name).read_text()
    return text[text.index("\nimport ") :].lstrip()


_LOADER, _VISITOR = _sent("loader.py"), _sent("visitor.py")

# run() stands outside: while exec runs a text it keeps the text's syntax tree, 300 kB that would be
# forked into a run's guards. (compile() makes a class for each kind of syntax, 200 kB.)
FIRST = b"exec(%s);run()\n" % repr(_LOADER).encode("ascii")
VISIT = b"exec(%s)\n" % repr(_VISITOR).encode("ascii").ljust(len(FIRST) - len("exec()\n"))
# By length: a line would be read byte by byte, which takes 7 ms of each verb.
READ_FIRST = f'stdin=open(0,"rb",{len(FIRST)},closefd=0);exec(stdin.read({len(FIRST)}))'


def loader_command(*first: str) -> str:
    """Return the constant command; it tries the Pythons in `first` before the usual ones."""
    find = with_python('"$0"', *first)
    return f"""exec /bin/sh -c '{find}echo corra 1 no-python; exit 127' '{READ_FIRST}'"""


def with_python(words: str, *first: str) -> str:
    """Return shell text that execs a Python with `-c words`.

    Text behind it runs on a host without Python.
    """
    names = " ".join(
        [*(path for path in first if re.fullmatch(r"[A-Za-z0-9/._+-]+", path)), *PYTHONS]
    )
    # Without `!`, backslash, newline and nested quotes, sh, bash, zsh, fish and tcsh read it alike.
    return (
        f"""for p in {names}; do case $("$p" -V 2>/dev/null) in """
        """"Python 3."[6-9]*|"Python 3."[1-9][0-9]*) """
        f"""exec "$p" -ISE -OO -c {words};; esac; done; """
    )


COMMAND = loader_command()


@functools.cache
def agent_source() -> bytes:
    """Return this version's agent.py."""
    return (_ON_HOST.parent / "agent.py").read_bytes()


@functools.cache
def agent_digest() -> str:
    """Return the SHA-256 of this version's agent.py, in hex."""
    return sha256_of(agent_source())


def sha256_of(source: bytes) -> str:
    """Return the SHA-256 of a source, in hex.

    hashlib loads OpenSSL, which takes a verb 3 ms where paramiko hasn't loaded it already.
    """
    if "hashlib" in sys.modules:
        from hashlib import sha256
    else:
        try:
            from _sha256 import sha256  # type: ignore[import-not-found, no-redef, unused-ignore]
        except ImportError:
            try:
                # Its name from Python 3.12 on.
                from _sha2 import sha256  # type: ignore[import-not-found, no-redef, unused-ignore]
            except ImportError:
                from hashlib import sha256
    return str(sha256(source).hexdigest())


@functools.cache
def courier_source() -> str:
    """Return courier.py, which a start with a callback carries along."""
    return (_ON_HOST / "courier.py").read_text(encoding="utf-8")


@functools.cache
def visitor_modules() -> tuple[tuple[str, bytes], ...]:
    """Return the modules of a visit, packed: the agent, and doctor.py, which imports it."""
    import zlib

    doctor = (_ON_HOST / "doctor.py").read_bytes()
    return (("agent", zlib.compress(agent_source())), ("doctor", zlib.compress(doctor)))
