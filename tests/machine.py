"""What the machine that runs the tests has to offer."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from pathlib import Path

_OLDEST = (3, 6)
_WHO = "import sys; print('%d %d' % sys.version_info[:2]); print(sys.executable)"


def pythons() -> list[str]:
    """Return one executable for every Python 3.6 or later found on PATH and in ~/.pyenv, oldest first."""
    # The passwd entry's home, not $HOME: the tests give $HOME another meaning.
    own = Path(pwd.getpwuid(os.getuid()).pw_dir)
    candidates = [str(path) for path in own.glob(".pyenv/versions/*/bin/python3")]
    candidates += [shutil.which(name) or "" for name in ("python3", *(f"python3.{minor}" for minor in range(6, 20)))]
    found: dict[tuple[int, ...], str] = {}
    for candidate in filter(None, candidates):
        said = subprocess.run([candidate, "-ISEc", _WHO], check=False, capture_output=True, text=True, timeout=20)
        if said.returncode == 0:
            version, executable = said.stdout.splitlines()
            found.setdefault(tuple(map(int, version.split())), executable)
    return [found[version] for version in sorted(found) if version >= _OLDEST]
