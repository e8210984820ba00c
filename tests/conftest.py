"""The fixtures of every test: a home of its own, a private sshd, and corra's command line as a
process.

No test touches the real home, the real ~/.ssh or a port that is not on 127.0.0.1.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).resolve().parent.parent
# The helpers are no tests, and all rooms share them.
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

import agent_door  # noqa: E402
import machine as machine_here  # noqa: E402 - `machine` is a fixture
import placed  # noqa: E402
import rig  # noqa: E402
import users  # noqa: E402
import warm  # noqa: E402
from agent_door import door, gate  # noqa: E402, F401 - fixtures that several rooms ask for
from corra.remote.agent_client import Agent  # noqa: E402
from corra.remote.targets import agent_for  # noqa: E402
from fleet_hosts import latch, ran, web_hosts  # noqa: E402, F401 - fixtures
from sshd import QUICKLY, Sshd, program  # noqa: E402
from terminal import KIND, Terminal  # noqa: E402
from warm import Warm  # noqa: E402

COLD = [sys.executable, "-m", "corra"]

# The settings of the person who runs the tests must not decide how the tests end.
_FOREIGN = (
    "CORRA_",
    "INVOKE_",
    "FABRIC_",
    "SSH_",
    "XDG_",
    "PYTHON",
    "LC_",
    "NO_COLOR",
    "FORCE_COLOR",
    "COLUMNS",
    "LINES",
)


# Python ignores these signals itself; subprocess restores them in the programs that it starts.
_PYTHONS_OWN = {signal.SIGPIPE, signal.SIGXFSZ}
# Where an agent and its runs go when a home can't hold them.
_LAST_RESORT = Path(f"/var/tmp/corra-{os.getuid()}")
_CLONE_NEWNS = 0x20000


def pytest_sessionstart(session: pytest.Session) -> None:
    """Show the tests an empty /var/tmp. The machine's own corra may have left runs there, and an
    agent under test would find them and leave more.
    """
    if os.getuid() == 0 and ctypes.CDLL(None).unshare(_CLONE_NEWNS) == 0:
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=1777", "none", "/var/tmp"], check=True)
    elif _LAST_RESORT.exists():
        raise pytest.UsageError(
            f"each test would find what corra has left in {_LAST_RESORT}, and only root can "
            f"hide it: remove it, or be another user"
        )


# A test that uses one of these fixtures starts a server.
_SERVERS = {"new_sshd", "new_machine", "machine", "world"}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--quick", action="store_true", help="leave out servers, storms and what must run alone"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.option.quick:
        # One Python runs the agent, the oldest.
        os.environ.setdefault("CORRA_AGENT_PYTHON", machine_here.for_faults()[0])
        # This fixture starts a server only with one of its parameters, so look at the parameter
        # here.
        patch = pytest.MonkeyPatch()
        patch.setattr(Sshd, "start", _left_out)
        patch.setattr(rig, "booted", _left_out)


def _left_out(*_: object, **__: object) -> NoReturn:
    pytest.skip("starts a server, which --quick leaves out")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.option.quick:
        kept = _sampled([each for each in items if _quick(each)])
        left = {id(each) for each in kept}
        config.hook.pytest_deselected(items=[each for each in items if id(each) not in left])
        items[:] = kept


# Of a test that holds one rule over many cases, --quick takes the first and each eighth after it.
_SAMPLED_EACH = 8


def _sampled(items: list[pytest.Item]) -> list[pytest.Item]:
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        if item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] % _SAMPLED_EACH != 1:
                continue
        kept.append(item)
    return kept


def _quick(item: pytest.Item) -> bool:
    serves = isinstance(item, pytest.Function) and not _SERVERS.isdisjoint(item.fixturenames)
    return not (serves or item.get_closest_marker("alone") or item.get_closest_marker("storm"))


@pytest.fixture
def last_resort() -> Path:
    """The directory of an agent whose home can't hold it. Skips the test where /var/tmp isn't the
    tests' own.
    """
    if os.getuid() != 0:
        pytest.skip("needs root: it would leave something in this machine's /var/tmp")
    return _LAST_RESORT


@pytest.fixture(scope="session", autouse=True)
def signals_as_from_a_shell() -> None:
    """Stop ignoring the signals that nohup or a shell's `&` set to be ignored: the programs under
    test would ignore them as well.

    The fixture sets a handler, which no program inherits, and only in the process that runs tests.
    The tests themselves survive a hang-up, as nohup promises.
    """
    for number in signal.valid_signals() - _PYTHONS_OWN:
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(
                number,
                signal.default_int_handler if number == signal.SIGINT else lambda *_: None,
            )


@pytest.fixture(autouse=True)
def same_umask() -> Iterator[None]:
    """Check that no test leaves another umask in its process. With another umask, later tests fail
    far from the cause: users can't log in and machines don't boot.
    """
    before = _umask()
    yield
    after = _umask()
    os.umask(before)
    assert after == before


def _umask() -> int:
    # The system call that reads the umask also sets it, for every thread.
    return next(
        int(line[6:], 8)
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("Umask:")
    )


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory that is $HOME and holds every XDG directory, for this process, for `cli` and for
    the programs that `sshd` starts. An agent has been placed in it; with the marker `bare` it is
    empty.

    Its path is short, since the path of a unix socket must be. The fixture ends what a test has
    left running.
    """
    for name in list(os.environ):
        if name.startswith(_FOREIGN):
            monkeypatch.delenv(name)
    path = Path(tempfile.mkdtemp(prefix="corra-", dir="/tmp"))
    for name, value in home_environment(path).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CORRA_SSH_CONFIG", str(path / ".ssh" / "config"))
    (path / ".ssh").mkdir(mode=0o700)
    (path / ".ssh" / "config").touch(mode=0o600)
    if request.node.get_closest_marker("bare") is None:
        placed.give(path)
    with agent_door.nothing_left():
        yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def python() -> str:
    """The Python that runs the agent. `machine.EVERYWHERE` and `machine.DEAR` run a test with
    several.
    """
    return agent_door.PYTHON


def home_environment(path: Path) -> dict[str, str]:
    """Return the variables that make `path` a process's home."""
    return {
        "HOME": str(path),
        "XDG_STATE_HOME": str(path / ".local" / "state"),
        "XDG_CACHE_HOME": str(path / ".cache"),
        "XDG_CONFIG_HOME": str(path / ".config"),
    }


@pytest.fixture
def new_sshd(home: Path) -> Iterator[Callable[..., Sshd]]:
    """Return a function that starts one more server: `new_sshd(alias="jump",
    options={"MaxSessions": 2}, environment={"PATH": "/none"})`.

    All servers share one user key, the client's ssh_config (`$CORRA_SSH_CONFIG`) and its
    known_hosts.
    """
    if program() is None:
        pytest.skip("no sshd on this machine (apt-get install openssh-server)")
    started: list[Sshd] = []

    def start(
        alias: str = "h",
        *,
        environment: Mapping[str, str] | None = None,
        options: Mapping[str, str | int] | None = None,
        **how: Any,
    ) -> Sshd:
        # PATH: sshd's default has no ~/.pyenv in it, and a test's Python must not depend on the
        # user who runs it.
        given = {
            **home_environment(home),
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            **(environment or {}),
        }
        server = Sshd(
            home / f"sshd{len(started)}",
            alias=alias,
            environment=given,
            ssh_config=home / ".ssh" / "config",
            known_hosts=home / ".ssh" / "known_hosts",
            user_key=started[0].user_key if started else None,
            options={**QUICKLY, **(options or {})},
            **how,
        )
        started.append(server)
        return server.start()

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def sshd(new_sshd: Callable[..., Sshd]) -> Sshd:
    """A running server; `h` in the client's ssh_config leads to it."""
    return new_sshd()


@pytest.fixture(params=["local", "fabric", "openssh"])
def target(request: pytest.FixtureRequest, home: Path) -> Iterator[Agent]:
    """This machine, and the same machine through sshd by either transport."""
    yield from reached(request)


def reached(request: pytest.FixtureRequest) -> Iterator[Agent]:
    """Yield this machine's agent, reached in the way that the fixture's parameter names: directly
    or through sshd.
    """
    if request.param != "local":
        request.getfixturevalue("sshd")
    agent = agent_for("local" if request.param == "local" else "h", via=request.param)
    yield agent
    agent.close()


class Cli:
    """corra's command line as a process of its own, in the test's home. It is forked from a server
    that has imported corra, unless `program` is changed.

    With variables that change the interpreter (`env={"LC_ALL": ..}`), it is a new interpreter.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self.program = list(COLD)

    def __call__(
        self,
        *words: str | bytes,
        stdin: bytes | None = None,
        timeout: float = 60,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.CompletedProcess[bytes]:
        """Run it to its end. Without `stdin`, its stdin is /dev/null."""
        feed = subprocess.DEVNULL if stdin is None else subprocess.PIPE
        with self.popen(*words, env=env, stdin=feed, start_new_session=False) as process:
            try:
                out, err = process.communicate(stdin, timeout)
            except BaseException:
                process.kill()
                raise
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def popen(
        self,
        *words: str | bytes,
        env: Mapping[str, str] | None = None,
        terminal: bool = False,
        **how: Any,
    ) -> subprocess.Popen[bytes]:
        """Start it with pipes for stdout and stderr, in a session of its own; the test must wait
        for it.

        With `terminal`, the given stdin is the terminal of that session.
        """
        pipes: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": subprocess.PIPE,
            "stderr": subprocess.PIPE,
            "start_new_session": True,
        }
        how = {**pipes, **how}
        if self.program == COLD and how.keys() == pipes.keys() and not warm.differs(env or {}):
            return Warm(words, env=self.environment(env), cwd=self.home, terminal=terminal, **how)
        if terminal:
            how["preexec_fn"] = lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        return subprocess.Popen(
            [*self.program, *words], env=self.environment(env), cwd=self.home, **how
        )

    def environment(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        return {**os.environ, "PYTHONPATH": str(ROOT), **(more or {})}


@pytest.fixture
def cli(home: Path) -> Cli:
    """`cli("run", "--host", "h", "--", "true")` gives a CompletedProcess with returncode, stdout
    and stderr in bytes.
    """
    return Cli(home)


@pytest.fixture
def terminal(cli: Cli) -> Iterator[Callable[..., Terminal]]:
    """`terminal("run", "-i", ..)` is corra's command line on a terminal."""
    made: list[Terminal] = []

    def start(*words: str, **size: int) -> Terminal:
        popen = functools.partial(cli.popen, *words, terminal=True, env=KIND)
        made.append(Terminal(popen, **size))
        return made[-1]

    yield start
    for each in made:
        each.close()


@pytest.fixture(scope="session")
def as_root() -> None:
    """Skip the test unless it runs as root."""
    if os.getuid() != 0:
        pytest.skip("needs root: it makes users, mounts or networks")


@pytest.fixture
def test_user(as_root: None) -> Iterator[str]:
    """A user made for this test, with a home, a shell and a password that nothing matches; removed
    afterwards.
    """
    with users.made(f"corra{os.getpid()}") as user:
        yield user.name


NEXT_BOOT = "22222222-2222-2222-2222-222222222222"


@pytest.fixture
def new_machine(home: Path, as_root: None) -> Iterator[Callable[..., Path]]:
    """Return a function that starts a host whose boot id is a file of the test: its sshd runs in a
    mount namespace that shows the file in /proc.

    `new_machine(alias="m", environment={..})` returns that file, which lies in a directory of the
    host's own.
    """
    if program() is None or shutil.which("unshare") is None:
        pytest.skip("no sshd or no unshare on this machine")
    started: list[Sshd] = []

    def start(alias: str = "m", *, environment: Mapping[str, str] | None = None) -> Path:
        directory = home / "machines" / alias
        directory.mkdir(parents=True)
        boot = directory / "boot_id"
        boot.write_text("11111111-1111-1111-1111-111111111111\n")
        script = f'mount --bind {boot} /proc/sys/kernel/random/boot_id && exec "$@"'
        given = {
            **home_environment(home),
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
            **(environment or {}),
        }
        server = Sshd(
            directory / "server",
            alias=alias,
            environment=given,
            ssh_config=home / ".ssh/config",
            known_hosts=home / ".ssh/known_hosts",
            user_key=started[0].user_key if started else None,
            options=QUICKLY,
            inside=["unshare", "-m", "sh", "-c", script, "sshd"],
        )
        started.append(server)
        server.start()
        return boot

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def machine(new_machine: Callable[..., Path]) -> Path:
    """A host `m` whose boot id is the returned file."""
    return new_machine()


def reboot_order(boot: Path, marks: Path) -> list[str]:
    """The host `m`'s stand-in for `systemctl reboot`: a little later `m` has another boot id."""
    return ["sh", "-c", f"echo ran >> {marks}; (sleep 0.3; echo {NEXT_BOOT} > {boot}) &"]
