"""An agent that has been placed already, for the homes of tests.

The first start in a new home sends the agent and compiles it, a tenth of a second of a core, and a
thousand tests have a home of their own. What is copied into them was made by corra itself.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# The Pythons that `local` finds and that the login shells of the tests' servers find.
_PATHS = (os.environ.get("PATH", os.defpath), "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin")


def give(home: Path) -> None:
    """Put the agent into `home` as a start would."""
    if (made := _made()) is not None:
        shutil.copytree(made / ".cache", home / ".cache", dirs_exist_ok=True)


@functools.cache
def _made() -> Path | None:
    """Return a home where an agent was placed, or None if nothing runs on this machine."""
    home = Path(tempfile.mkdtemp(prefix="corra-placed-"))
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    for path in _PATHS:
        done = subprocess.run(
            [sys.executable, "-m", "corra", "run", "--host", "local", "--", "true"],
            env={"HOME": str(home), "PATH": path, "PYTHONPATH": str(ROOT), "LANG": "C.UTF-8"},
            cwd="/",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
            check=False,
        )
        if done.returncode:
            return None
    return home
