"""ssh and sudo in every order, with the agent on the host and with the chaperone on the client: a
real sudo, a real sshd, two users made for the tests.

The product of modes and events is large, and most of it runs the same code; `CORRA_MODES=all` runs
all of it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli
from invoke.config import Config

import users
from agent_door import Gate, alive, gone
from corra.errors import Auth, Unreachable, typed_with
from corra.model.frames import Output
from corra.model.host import Host
from corra.model.state import State, exit_code
from corra.runs import starting
from corra.runs.run import Run
from corra.transport.sudo import refusal
from proxy import wait_for
from sshd import QUICKLY, Sshd, program, user

WAIT_S = 60
NASTY = [
    "",
    " ",
    "it's",
    "--x",
    "-n",
    "$HOME",
    "`id`",
    "a\nb",
    "\udcff\udcfe",
    "!!",
    "!1",
    "\\\\'\\",
    "\\0101",
    "=ls",
    "%1",
    "~",
    "*",
    "é",
    "\n",
    "\t",
]
SHOW = 'for word; do printf "%s:%s" "$(printf %s "$word" | wc -c)" "$word"; done'


@dataclass(frozen=True)
class Mode:
    """One way to a host: `target` and `as_user` as the operator types them. OPS and DEPLOY stand
    for the users.
    """

    name: str
    target: str
    as_user: str | None = None
    via: str | None = None

    @property
    def by_ssh(self) -> bool:
        return self.target != "local"

    @property
    def kept_here(self) -> bool:
        return (self.via or "").startswith("chaperone")

    def __str__(self) -> str:
        return (f"{self.via}-" if self.kept_here else "") + self.name


AGENT = [
    Mode("local", "local"),
    Mode("local-sudo", "local", "OPS"),
    Mode("ssh-as", "ops"),
    Mode("ssh-then-sudo", "ops", "DEPLOY"),
    Mode("sudo-then-ssh", "far", "OPS,"),
    Mode("sudo-then-ssh-then-sudo", "far", "OPS,DEPLOY"),
]
# In the last two another machine keeps the run, as ops on its server. Only that machine's
# ssh_config knows the name "far".
CHAPERONE = [
    *(Mode(mode.name, mode.target, mode.as_user, "chaperone") for mode in AGENT if mode.by_ssh),
    Mode("ssh-as", "far", None, "chaperone@ops"),
    Mode("ssh-then-sudo", "far", "DEPLOY", "chaperone@ops"),
]
ALL = os.environ.get("CORRA_MODES") == "all"
SOME = {"chaperone-ssh-then-sudo", "local-sudo", "sudo-then-ssh"}


def each(modes: list[Mode], *more: str) -> Any:
    """Parametrize a test by `modes`, or by the few that stand for all, and by `more`."""
    return pytest.mark.parametrize(
        "mode", [mode for mode in modes if ALL or str(mode) in SOME | set(more)], ids=str
    )


@dataclass
class World:
    """Two users, and a server where one of them may log in."""

    base: Path
    ops: users.User
    deploy: users.User
    server: Sshd
    password: str
    runs: list[Run] = field(default_factory=list)

    def start(self, mode: Mode, argv: list[str], **how: Any) -> Run:
        as_user = mode.as_user and mode.as_user.replace("OPS", self.ops.name).replace(
            "DEPLOY", self.deploy.name
        )
        self.runs.append(starting.start(mode.target, argv, as_user=as_user, via=mode.via, **how))
        return self.runs[-1]

    def who(self, mode: Mode) -> str:
        """Return the user that a program runs as."""
        asked = (mode.as_user or "").rpartition(",")[2] or ("OPS" if mode.by_ssh else "")
        return {"OPS": self.ops.name, "DEPLOY": self.deploy.name, "": user()}[asked]

    def gate(self) -> Gate:
        gate = Gate(self.base / f"gate{len(os.listdir(self.base))}")
        os.chmod(gate.path, 0o666)
        return gate


@pytest.fixture(scope="session")
def built() -> Iterator[World]:
    if program() is None or not shutil.which("sudo"):
        pytest.skip("no sshd or no sudo on this machine")
    me = os.getpid()
    base = Path(f"/tmp/corra-modes-{me}")
    password = "correct horse 'battery'"
    with contextlib.ExitStack() as stack:
        ops = stack.enter_context(users.made(f"corraops{me}"))
        deploy = stack.enter_context(users.made(f"corradep{me}", password))
        base.mkdir(mode=0o755)
        stack.callback(shutil.rmtree, base)
        rules = [
            f"{ops.name} ALL=({deploy.name}) NOPASSWD: ALL",
            f"{deploy.name} ALL=({ops.name}) PASSWD: ALL",
        ]
        stack.enter_context(users.sudoers(f"corra-modes-{me}", *rules))
        path = "/usr/local/bin:/usr/bin:/bin"
        server = Sshd(
            base / "sshd",
            alias="ops",
            environment={"PATH": path},
            options=QUICKLY,
            ssh_config=base / "ssh_config",
        )
        for directory in (base, server.directory):  # sshd reads the keys as the user who logs in
            directory.chmod(0o755)
        server.start()
        stack.callback(server.stop)
        server.ssh_config.write_text("")
        server.add_host("ops", User=ops.name)
        server.add_host("deploy", User=deploy.name)
        # The ssh files of ops, for a program that calls ssh as ops.
        own = ops.home / ".ssh"
        own.mkdir()
        shutil.copy(server.user_key, own / "key")
        shutil.copy(server.known_hosts, own / "known_hosts")
        text = server.ssh_config.read_text().replace("Host ops", "Host far")
        (own / "config").write_text(
            text.replace(str(server.user_key), "~/.ssh/key").replace(
                str(server.known_hosts), "~/.ssh/known_hosts"
            )
        )
        ops.give(own)
        yield World(base, ops, deploy, server, password)


@pytest.fixture
def world(built: World, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.setenv("CORRA_SSH_CONFIG", str(built.server.ssh_config))
    yield built
    for run in built.runs:
        with contextlib.suppress(Exception):
            run.kill(grace=0)
    built.runs.clear()


def ended(run: Run) -> State:
    run.wait(WAIT_S, output=False)
    return run.state()


def says(run: Run, text: bytes) -> bytes:
    """Return stdout once it contains `text`."""
    found: bytes = wait_for(lambda: out if text in (out := run.read()) else b"", deadline_s=WAIT_S)
    return found


# ---- everywhere


@each(AGENT + CHAPERONE, *map(str, AGENT + CHAPERONE))
def test_every_word_arrives_as_it_is_and_as_the_right_user(world: World, mode: Mode) -> None:
    run = world.start(mode, ["sh", "-c", f"id -un; {SHOW}", "sh", *NASTY])
    assert ended(run).return_code == 0
    expected = b"".join(b"%d:%s" % (len(os.fsencode(word)), os.fsencode(word)) for word in NASTY)
    assert run.read() == world.who(mode).encode() + b"\n" + expected


@each(AGENT + CHAPERONE)
@pytest.mark.parametrize("code", [0, 1, 255])
def test_the_exit_code_is_the_programs_also_sshs_own(world: World, mode: Mode, code: int) -> None:
    state = ended(world.start(mode, ["sh", "-c", f"echo err >&2; exit {code}"]))
    assert (state.state, state.reason, state.return_code) == ("exited", "exited", code)


@each(AGENT + CHAPERONE)
def test_a_death_by_signal_is_told(world: World, mode: Mode) -> None:
    state = ended(world.start(mode, ["sh", "-c", "kill -9 $$"]))
    assert exit_code(state) == 137
    # A POSIX shell can't tell this end from `exit 137`.
    assert (state.signal, state.return_code) == (
        (None, 137) if mode.kept_here else ("SIGKILL", None)
    )


@each(
    AGENT + CHAPERONE,
    "chaperone-sudo-then-ssh-then-sudo",
    "chaperone@ops-ssh-then-sudo",
    "ssh-then-sudo",
)
def test_term_reaches_the_program(world: World, mode: Mode) -> None:
    run = world.start(
        mode, ["sh", "-c", "trap 'echo bye; exit 3' TERM; echo ready; while :; do sleep 0.05; done"]
    )
    says(run, b"ready")
    run.signal("TERM")
    assert ended(run).return_code == 3
    assert run.read() == b"ready\nbye\n"


@each(AGENT + CHAPERONE, "chaperone-sudo-then-ssh-then-sudo")
def test_a_kill_leaves_nothing_of_the_tree(world: World, mode: Mode) -> None:
    script = (
        "trap '' TERM; echo $$; (trap '' HUP; sleep 1000; :) & echo $!; setsid sh -c 'echo $$; "
        "sleep 1000; :' & wait"
    )
    run = world.start(mode, ["sh", "-c", script])
    said = wait_for(lambda: out if (out := run.read()).count(b"\n") == 3 else b"")
    pids = [int(pid) for pid in said.split()]
    assert all(map(alive, pids))
    killed = run.kill(grace=0.2)
    assert killed.ended
    assert (killed.state.state, killed.state.reason, exit_code(killed.state)) == (
        "exited",
        "killed",
        137,
    )
    gone(*pids)


@each(AGENT + CHAPERONE)
def test_ten_megabytes_arrive_unchanged(world: World, mode: Mode) -> None:
    data = os.urandom(10 << 20)
    file = world.base / "data"
    file.write_bytes(data)
    file.chmod(0o644)
    run = world.start(mode, ["sh", "-c", 'cat "$0"; cat "$0" >&2; exit 4', str(file)])
    assert ended(run).return_code == 4
    assert run.read() == data
    assert run.read("stderr") == data


# ---- links that break


@each([mode for mode in AGENT if mode.by_ssh])
def test_a_cut_link_is_made_again_and_nothing_is_missed(world: World, mode: Mode) -> None:
    gate = world.gate()
    run = world.start(mode, ["sh", "-c", 'echo ready; read a <"$0"; echo on; exit 6', gate.path])
    came = bytearray()
    follow = run.follow()

    def watch() -> None:
        for event in follow:
            came.extend(event.data if isinstance(event, Output) else b"")

    watcher = threading.Thread(target=watch)
    watcher.start()
    wait_for(lambda: b"ready" in came)
    world.server.cut()
    gate.open()
    watcher.join(WAIT_S)
    gate.close()
    assert bytes(came) == b"ready\non\n"
    assert follow.state is not None
    assert follow.state.return_code == 6


@each(CHAPERONE)
def test_a_cut_link_leaves_the_chaperones_run_lost_and_the_program_be(
    world: World, mode: Mode
) -> None:
    run = world.start(mode, ["sh", "-c", "echo $$; exec sleep 1000"])
    pid = int(says(run, b"\n"))
    world.server.cut()
    state = wait_for(lambda: found if (found := run.state()).ended else None)
    assert (state.state, state.reason, state.status, state.end_time is None) == (
        "lost",
        "link",
        None,
        False,
    )
    assert run.read() == b"%d\n" % pid
    assert alive(pid)
    os.kill(pid, 9)


# ---- the client is killed


@each(CHAPERONE)
def test_two_of_the_guards_may_die_and_the_run_goes_on(world: World, mode: Mode) -> None:
    gate = world.gate()
    run = world.start(mode, ["sh", "-c", 'echo ready; read a <"$0"; echo on; exit 6', gate.path])
    says(run, b"ready")
    for _ in range(2):
        keeper = run.state().agent_pid
        assert keeper
        os.kill(keeper, 9)
        wait_for(lambda keeper=keeper: run.state().agent_pid not in (keeper, None))
    gate.open()
    state = ended(run)
    gate.close()
    assert (state.return_code, run.read()) == (6, b"ready\non\n")


@each(CHAPERONE)
def test_the_carrier_killed_is_a_link_lost(world: World, mode: Mode) -> None:
    run = world.start(mode, ["sh", "-c", "echo $$; exec sleep 1000"])
    pid = int(says(run, b"\n"))
    state = run.state()
    assert state.pid
    os.kill(state.pid, 9)
    assert (ended_badly := wait_for(lambda: found if (found := run.state()).ended else None))
    assert (ended_badly.state, ended_badly.reason) == ("lost", "link")
    assert alive(pid)
    os.kill(pid, 9)


# ---- another machine keeps the run


def test_a_run_that_another_machine_keeps_is_found_and_stopped_from_anywhere(
    world: World, cli: Cli, home: Path
) -> None:
    via = ("--via", "chaperone@ops", "--host", "far")
    begun = cli("run", "-d", "--name", "fw", *via, "--", "sleep", "1000")
    assert begun.returncode == 0, begun.stderr
    first, *hints = begun.stderr.splitlines()
    assert re.fullmatch(rb"corra: fw \(\w{6}\) on far: started, kept by ops", first)
    assert hints[0] == b"       watch: corra attach fw"
    prog_id = begun.stdout.decode().strip()
    assert (world.ops.home / ".local/state/corra/runs" / prog_id).is_dir()
    assert (
        prog_id in cli("ps", "-q", *via).stdout.decode().split()
    )  # beside the runs of other tests
    assert b"running" in cli("status", "fw").stdout  # found by this machine's history
    shutil.rmtree(home / ".local")
    killed = cli("kill", "-9", *via, "fw")
    assert killed.returncode == 0, killed.stderr
    assert cli("attach", *via, "fw").returncode == 137


def test_what_the_keepers_ssh_has_to_say_is_said_as_the_keepers(world: World) -> None:
    with pytest.raises(Unreachable, match="host name not found") as caught:
        world.start(Mode("ssh-as", "nowhere.invalid", None, "chaperone@ops"), ["true"])
    assert caught.value.host == "nowhere.invalid"
    assert all(line.startswith("on ops:  ") for line in caught.value.hint)


def test_a_keeper_that_isnt_reached_is_named(world: World, cli: Cli) -> None:
    done = cli("run", "--via", "chaperone@nowhere.invalid", "--host", "far", "--", "true")
    assert done.returncode == 125
    assert done.stderr.decode().startswith(
        "corra: nowhere.invalid: NOT STARTED: host name not found\n"
    )


# ---- passwords


def with_password(password: str) -> Config:
    """Return what --prompt-for-sudo-password leaves behind, as a configuration file may also say
    it.
    """
    return Config(overrides={"sudo": {"password": password}})


def words_and_variables_of_all() -> Iterator[bytes]:
    """Return what ps shows of every process on this machine, including what only root may see."""
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            with contextlib.suppress(OSError):
                yield (process / name).read_bytes()


@pytest.mark.parametrize("via", ["fabric", "openssh", "chaperone"])
def test_a_password_is_given_to_the_sudo_that_asks_and_to_nobody_else(
    world: World, via: str, home: Path
) -> None:
    mode = Mode("ssh-then-sudo", "deploy", "OPS", via)
    seen: list[bytes] = []
    looking = threading.Event()

    def look() -> None:
        while not looking.wait(0.01):
            seen.extend(words_and_variables_of_all())

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        gate = world.gate()
        run = world.start(
            mode,
            ["sh", "-c", 'id -un; env; read a <"$0"', gate.path],
            config=with_password(world.password),
        )
        says(run, b"PATH=")
        seen.extend(words_and_variables_of_all())  # with all files that stay in place
        gate.open()
        assert ended(run).return_code == 0
        gate.close()
    finally:
        looking.set()
        watcher.join()
    out = run.read()
    assert out.startswith(world.ops.name.encode() + b"\n")
    secret = world.password.encode()
    assert secret not in out
    assert seen
    assert not any(secret in each_ for each_ in seen)
    assert not any(
        secret in path.read_bytes()
        for base in (home, world.ops.home)
        for path in base.rglob("*")
        if path.is_file()
    )
    assert not any(world.password in line for line in world.server.log)


@pytest.mark.parametrize("via", ["fabric", "openssh", "chaperone"])
def test_a_wrong_password_is_said_and_nothing_is_started(world: World, via: str) -> None:
    with pytest.raises(Auth, match="sudo doesn't take that password"):
        world.start(
            Mode("ssh-then-sudo", "deploy", "OPS", via), ["true"], config=with_password("wrong")
        )


@pytest.mark.parametrize("via", ["fabric", "chaperone"])
def test_a_password_that_nobody_asks_for_is_no_harm(world: World, via: str) -> None:
    run = world.start(
        Mode("ssh-then-sudo", "ops", "DEPLOY", via),
        ["id", "-un"],
        config=with_password(world.password),
    )
    assert ended(run).return_code == 0
    assert run.read() == world.deploy.name.encode() + b"\n"


def test_a_sudo_that_would_ask_says_the_line_to_type(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = ["run", "--host", "db1", "--as", "root", "--", "echo", "a b"]
    for name in ("inv", "/no/bin/corra"):
        monkeypatch.setattr("sys.argv", [name, *words])
        error = refusal("sudo: a password is required", Host("db1", user="root"), lambda: "ops")
        assert error is not None
        assert error.hint[0] == (
            f"once:  {name} --prompt-for-sudo-password run --host db1 --as root -- echo 'a b'"
        )
    monkeypatch.setattr("sys.argv", ["inv", "run", *["word"] * 100])
    assert len(typed_with("--prompt-for-sudo-password")) <= 160
    assert typed_with("--prompt-for-sudo-password").endswith(" word ..")


@pytest.mark.parametrize("via", ["fabric", "openssh", "chaperone"])
def test_a_sudo_that_would_ask_says_what_to_do(world: World, via: str) -> None:
    with pytest.raises(Auth) as caught:
        world.start(Mode("ssh-then-sudo", "deploy", "OPS", via), ["true"])
    assert caught.value.why == f"sudo asks for {world.deploy.name}'s password"
    hints = "\n".join(caught.value.hint)
    assert hints.startswith("give it: sudo.password in the configuration\n")
    assert f"{world.deploy.name} ALL=({world.ops.name}) NOPASSWD: ALL" in hints
    assert "its path is its own hash" in hints
