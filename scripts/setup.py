"""Make this checkout's environment, or bring it up to date: `scripts/setup run|dev|invoke3`, or
`relock`.

`run` is what `inv` needs, `dev` adds the tests' tools, and `invoke3` is a second environment,
.venv-invoke3: the first one behind the major version of Invoke that Fabric's own metadata doesn't
allow yet. Nothing is done when the environment's stamp says so; of two calls at once one waits;
what was interrupted is made anew. An environment that somebody else made is installed into and
never deleted.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
KINDS = {"run": (".venv", "."), "dev": (".venv", ".[dev]"), "invoke3": (".venv-invoke3", ".")}
# Some of the pinned versions have left 3.10 behind.
OLDER, NEWER = 'python_version < "3.11"', 'python_version >= "3.11"'
INVOKE3 = "invoke==3.0.3"
MAKING = "making"
UPDATING = "updating"


def say(text: str, *, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


def quiet(*argv: str | Path, **env: str) -> None:
    """Run `argv`; what it says is shown only where it fails."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        cwd=ROOT,
        env={**os.environ, **env},
        check=False,
    )
    if done.returncode:
        said = (done.stdout + done.stderr).decode(errors="replace").strip().splitlines()
        say(f"\ncorra: set-up FAILED: {' '.join(map(str, argv))}")
        errors = [line for line in said if line.startswith(("ERROR", "E:"))]
        say("\n".join(f"       {line}" for line in errors or said[-12:]))
        sys.exit(125)


class Environment:
    """One virtual environment and its stamp, a line that says what it was made from."""

    def __init__(self, kind: str) -> None:
        name, self.packages = KINDS[kind]
        self.kind = kind
        self.path = ROOT / name
        self.python = self.path / "bin" / "python"
        self.stamp = self.path / "corra-stamp"

    def read(self) -> str:
        return self.stamp.read_text().strip() if self.stamp.exists() else ""

    def write(self, text: str) -> None:
        new = self.stamp.with_suffix(".new")
        new.write_text(text + "\n")
        new.replace(self.stamp)

    def expected(self) -> str:
        """What the stamp says when all is well. scripts/inv composes the same words, since starting
        a Python costs more than `cksum`.
        """
        files = b"".join(
            (ROOT / name).read_bytes() for name in ("pyproject.toml", "constraints.txt")
        )
        check = (
            subprocess.run(["cksum"], input=files, stdout=subprocess.PIPE, check=True)
            .stdout.decode()
            .strip()
        )
        return f"{check} {ROOT} {self.python.resolve() if self.python.exists() else ''}"

    def up_to_date(self) -> bool:
        enough = ("run", "dev") if self.kind == "run" else (self.kind,)
        return self.python.exists() and self.read() in [
            f"{kind} {self.expected()}" for kind in enough
        ]

    def make(self) -> None:
        """Create the directory with its mark in it, so that it is ours to delete from the first
        moment on.
        """
        new = self.path.with_name(self.path.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        (new / self.stamp.name).write_text(MAKING + "\n")
        new.rename(self.path)
        if self.kind == "invoke3":
            quiet(Environment("dev").python, "-m", "venv", "--without-pip", self.path)
        elif importlib.util.find_spec("ensurepip"):
            quiet(sys.executable, "-m", "venv", self.path)
        else:
            self.make_without_ensurepip()

    def make_without_ensurepip(self) -> None:
        """Do without python3-venv, which a plain Debian lacks: the pip beside that Python installs
        another into the environment.
        """
        pip = importlib.util.find_spec("pip")
        if pip and pip.origin:
            quiet(sys.executable, "-m", "venv", "--without-pip", self.path)
            installed = str(Path(pip.origin).parent.parent)
            quiet(
                self.python,
                "-m",
                "pip",
                "install",
                "-q",
                "--ignore-installed",
                "pip",
                PYTHONPATH=installed,
            )
        elif (
            os.geteuid() == 0 and shutil.which("apt-get") and sys.executable.startswith("/usr/bin/")
        ):
            quiet("apt-get", "-qq", "update")
            quiet(
                "apt-get",
                "-qq",
                "install",
                "-y",
                "--no-install-recommends",
                "python3-venv",
                DEBIAN_FRONTEND="noninteractive",
            )
            quiet(sys.executable, "-m", "venv", self.path)
        else:
            say(
                f"\ncorra: {sys.executable} has neither ensurepip nor pip: nothing can be installed"
            )
            say("       Debian, Ubuntu: apt-get install python3-venv      elsewhere: its pip")
            sys.exit(125)

    def install(self) -> None:
        how = ["install", "-q", "--disable-pip-version-check", "--no-input"]
        if self.kind == "invoke3":
            dev = Environment("dev")
            # What is found here first is ours; all else is the first environment's.
            behind = self.library() / "behind.pth"
            behind.unlink(missing_ok=True)
            quiet(
                dev.python,
                "-m",
                "pip",
                "--python",
                self.python,
                *how,
                "--no-deps",
                INVOKE3,
                "-e",
                self.packages,
            )
            behind.write_text(f"import site; site.addsitedir({str(dev.library())!r})\n")
        else:
            # pip compiles one file after the other.
            quiet(
                self.python,
                "-m",
                "pip",
                *how,
                "--no-compile",
                "-c",
                CONSTRAINTS,
                "-e",
                self.packages,
            )
            compiled: list[str | Path] = [
                self.python,
                "-m",
                "compileall",
                "-q",
                "-j",
                "0",
                self.library(),
            ]
            subprocess.run(compiled, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        # Invoke turns the writing of .pyc files off, so each call would compile the package anew.
        quiet(self.python, "-m", "compileall", "-q", ROOT / "corra")

    def library(self) -> Path:
        """Return the directory where its packages are."""
        ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
        return Path(
            subprocess.run(
                [self.python, "-c", ask], stdout=subprocess.PIPE, check=True, text=True
            ).stdout.strip()
        )

    def bring_up(self) -> None:
        was = self.read()
        ours, moved = (
            bool(was),
            was not in (MAKING, UPDATING) and not was.endswith(f" {self.python.resolve()}"),
        )
        if ours and (was == MAKING or moved):
            shutil.rmtree(self.path)
        if self.path.exists():
            say(f"corra: bringing {self.path.name} up to date .. ", end="")
            self.write(UPDATING)
        else:
            version = f"{sys.version_info.major}.{sys.version_info.minor}"
            say(
                f"corra: first use: making {self.path.name} with Python {version} (once, 20 s) .. ",
                end="",
            )
            self.make()
        self.install()
        self.write(f"{self.kind} {self.expected()}")
        say("ready")


def ensure(kind: str) -> None:
    environment = Environment(kind)
    if environment.up_to_date():
        return
    if kind == "invoke3":
        ensure("dev")
    if kind == "run" and environment.read().startswith("dev "):
        environment = Environment("dev")
    with open(f"{environment.path}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"corra: another call is making {environment.path.name}; waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        if not environment.up_to_date():
            environment.bring_up()


def relock() -> None:
    """Write what is installed in .venv (made with Python 3.11 or later) into constraints.txt; the
    lines for 3.10 are kept as they are.
    """
    kept = [
        line
        for line in CONSTRAINTS.read_text().splitlines()
        if line.startswith("#") or OLDER in line
    ]
    differ = {line.partition("==")[0] for line in kept}
    freeze = [str(Environment("dev").python), "-m", "pip", "freeze", "--exclude-editable"]
    pins = [
        pin
        for pin in subprocess.run(
            freeze, stdout=subprocess.PIPE, check=True, text=True
        ).stdout.splitlines()
        if "==" in pin
    ]
    lines = [f"{pin} ; {NEWER}" if pin.partition("==")[0] in differ else pin for pin in pins]
    head = [line for line in kept if line.startswith("#")]
    lines += [line for line in kept if OLDER in line]
    CONSTRAINTS.write_text(
        "\n".join([*head, *sorted(lines, key=lambda line: line.lower().partition("==")[::2])])
        + "\n"
    )


def main(argv: list[str]) -> None:
    kind = argv[1] if len(argv) == 2 else "run"
    if kind == "relock":
        relock()
    elif kind in KINDS:
        ensure(kind)
    else:
        sys.exit("usage: scripts/setup run|dev|invoke3|relock")


if __name__ == "__main__":
    # Ctrl-C ends it at once and without a traceback: the stamp tells the next call what to do.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main(sys.argv)
