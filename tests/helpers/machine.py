"""What the machine that runs the tests can offer."""

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
# The oldest Python that the agent supports, those of old and present Debians, Ubuntus and Red Hats,
# and the newest on this machine.
_FAULTS = ((3, 6), (3, 8), (3, 11), (3, 13))


@functools.cache
def versions() -> dict[tuple[int, ...], str]:
    """Return one executable for every Python from 3.6 on that is on PATH or in ~/.pyenv, the oldest
    first.
    """
    # Use the home of the passwd entry: the tests set $HOME to another directory.
    own = Path(pwd.getpwuid(os.getuid()).pw_dir)
    candidates = [str(path) for path in own.glob(".pyenv/versions/*/bin/python3")]
    named = [
        shutil.which(name) or ""
        for name in ("python3", *(f"python3.{minor}" for minor in range(6, 20)))
    ]
    # Leave out pyenv's shims: they are shell scripts that take 0.1 s each, and lead to a Python
    # that is found anyway.
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
    """Return the executables of all supported Pythons on this machine."""
    return list(versions().values())


def name(python: str) -> str:
    """Return the version as a test's parameter shows it: `3.6`."""
    return next(
        (".".join(map(str, version)) for version, path in versions().items() if path == python),
        python,
    )


def for_faults() -> list[str]:
    """Return the Pythons for the tests of a host's faults. If $CORRA_AGENT_PYTHON is set, return
    that one only.
    """
    if only := os.environ.get("CORRA_AGENT_PYTHON"):
        return [only]
    return [versions()[each] for each in _FAULTS if each in versions()] or [
        os.path.realpath(sys.executable)
    ]


def for_dear_faults() -> list[str]:
    """Return the Pythons for tests that take more than a second: the oldest and the newest.
    CORRA_PYTHONS=all asks for each.
    """
    found = for_faults()
    return (
        found
        if os.environ.get("CORRA_PYTHONS") == "all"
        else list(dict.fromkeys([found[0], found[-1]]))
    )


# For tests whose `python` would otherwise be the one that runs them.
EVERYWHERE = pytest.mark.parametrize("python", for_faults(), ids=name)
DEAR = pytest.mark.parametrize("python", for_dear_faults(), ids=name)
