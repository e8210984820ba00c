"""What the machine that runs the tests has to offer."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

_OLDEST = (3, 6)
_WHO = "import sys; print('%d %d' % sys.version_info[:2]); print(sys.executable)"
# The oldest that the agent promises, what old and present Debians, Ubuntus and Red Hats have, and
# the newest here.
_FAULTS = ((3, 6), (3, 8), (3, 11), (3, 13))


@functools.cache
def versions() -> dict[tuple[int, ...], str]:
    """Return an executable for every Python 3.6 or later found on PATH and in ~/.pyenv, oldest
    first.
    """
    # The passwd entry's home, not $HOME: the tests give $HOME another meaning.
    own = Path(pwd.getpwuid(os.getuid()).pw_dir)
    candidates = [str(path) for path in own.glob(".pyenv/versions/*/bin/python3")]
    named = [
        shutil.which(name) or ""
        for name in ("python3", *(f"python3.{minor}" for minor in range(6, 20)))
    ]
    # pyenv's shims are shell scripts that take 0.1 s each and lead to what was found already.
    candidates += [path for path in named if path and "/shims/" not in path]
    found: dict[tuple[int, ...], str] = {}
    for candidate in dict.fromkeys(map(os.path.realpath, candidates)):
        said = subprocess.run(
            [candidate, "-ISEc", _WHO], check=False, capture_output=True, text=True, timeout=20
        )
        if said.returncode == 0:
            version, executable = said.stdout.splitlines()
            found.setdefault(tuple(map(int, version.split())), executable)
    return {version: found[version] for version in sorted(found) if version >= _OLDEST}


def pythons() -> list[str]:
    """Return them all."""
    return list(versions().values())


def name(python: str) -> str:
    """Return what a test that is run with it is called after: `3.6`."""
    return next(
        (".".join(map(str, version)) for version, path in versions().items() if path == python),
        python,
    )


def for_faults() -> list[str]:
    """Return the Pythons that each fault of a host is tried with. $CORRA_AGENT_PYTHON is then the
    only one.
    """
    if only := os.environ.get("CORRA_AGENT_PYTHON"):
        return [only]
    return [versions()[each] for each in _FAULTS if each in versions()] or [
        os.path.realpath(sys.executable)
    ]


def for_dear_faults() -> list[str]:
    """Return those for what takes more than a second: the oldest and the newest; with
    CORRA_PYTHONS=all, each.
    """
    found = for_faults()
    return (
        found
        if os.environ.get("CORRA_PYTHONS") == "all"
        else list(dict.fromkeys([found[0], found[-1]]))
    )


# For tests whose `python` is else this one's own.
EVERYWHERE = pytest.mark.parametrize("python", for_faults(), ids=name)
DEAR = pytest.mark.parametrize("python", for_dear_faults(), ids=name)
