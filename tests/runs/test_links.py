"""Links that end, break, freeze and are refused, through every transport and a real sshd: each byte
once, each start once.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shlex
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

import corra
from console import screen
from corra.errors import StillRunning
from corra.model.frames import Gap, Output, Status
from corra.remote.agent_client import Agent
from corra.remote.targets import agent_for
from corra.runs import asking, follow
from corra.runs.clock import Clock
from corra.runs.events import LinkDown, LinkUp
from corra.runs.patience import Patience
from proxy import Dripping, Proxy, wait_for
from sshd import Sshd
from terminal import Terminal

BURST = int(os.environ.get("CORRA_BURST", "24"))

# 8 MB that differ everywhere, from a program that needs only sh and seq.
COUNT = ["sh", "-c", "seq 1 1100000"]


def counted(last: int = 1100000) -> bytes:
    return b"".join(b"%d\n" % n for n in range(1, last + 1))


@pytest.fixture(params=["fabric", "openssh"])
def via(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def proxied(sshd: Sshd) -> Iterator[Proxy]:
    """A proxy in front of the sshd; host `p` leads through it."""
    with Proxy(sshd.port) as proxy:
        sshd.add_host("p", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
        yield proxy


@pytest.fixture
def agent(via: str) -> Iterator[Callable[[str], Agent]]:
    """The agent of a host name, by the test's transport."""
    with contextlib.ExitStack() as stack:

        def make(name: str) -> Agent:
            made = agent_for(name, via=via)
            stack.callback(made.close)
            return made

        yield make


def append(path: Path) -> list[str]:
    """Return a program that writes one line each time it is executed."""
    return ["sh", "-c", f"echo ran >> {path}"]


def waiting(gate: Path, rest: str) -> list[str]:
    """Return a program that prints `a`, and goes on once the gate exists."""
    return ["sh", "-c", f"echo a; while [ ! -e {gate} ]; do sleep 0.02; done; {rest}"]


def agents(home: Path) -> set[int]:
    """Return the pids of the agents on the host: guards of runs, and what follows them."""
    found = set()
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            ours = f"HOME={home}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if (
                ours
                and b"-ISE" in words
                and any(b"closefd=0" in word for word in words)
                and b"-c" in words[1:4]
            ):
                found.add(pid)
    return found


# -- In the middle of the output


@pytest.mark.parametrize(
    ("via", "how"),
    [("fabric", "cut"), ("fabric", "reset"), ("fabric", "freeze"), ("openssh", "freeze")],
)
def test_megabytes_come_exactly_once_over_links_that_break(
    proxied: Proxy, via: str, how: str
) -> None:
    run = corra.start("p", COUNT, via=via)
    # A handshake of the ssh program takes four times as many bytes.
    size, times = (1_700_000, 4) if via == "fabric" else (3_500_000, 2)
    proxied.limit(size, how)
    # The first link has used its own share of the limit.
    run.agent.close()
    got = hashlib.sha256()
    downs = ups = 0
    for event in run.follow(patience=Patience(dead_after_s=1.0)):
        match event:
            case Output(stream="stdout", data=data):
                got.update(data)
            case LinkDown(attempt=1):
                downs += 1
            case LinkUp():
                ups += 1
            case Gap():
                raise AssertionError(event)
    assert got.hexdigest() == hashlib.sha256(counted()).hexdigest()
    assert downs == ups >= times


def test_links_that_break_as_soon_as_the_host_has_answered_are_given_up_in_time(
    proxied: Proxy, via: str, home: Path
) -> None:
    """The host accepts the login and answers each time, and no link brings anything new."""
    run = corra.start("p", waiting(home / "go", "true"), via=via)
    wait_for(lambda: run.read("stdout") == b"a\n")
    events: list[Any] = []
    begun = Clock().now()
    with pytest.raises(StillRunning, match="ago, given up: "):
        for event in run.follow({"stdout": 2}, patience=Patience(reconnect_timeout_s=1.0)):
            events.append(event)
            if isinstance(event, Status):
                proxied.cut()
    assert Clock().now() - begun < 12
    assert sum(isinstance(event, Status) for event in events) > 1, events
    assert not any(isinstance(event, (LinkUp, Output)) for event in events)
    run.kill(grace=0)


@pytest.mark.parametrize("part", [1.0, 0.5])
def test_links_that_break_after_the_same_bytes_are_given_up_in_time(
    proxied: Proxy, via: str, home: Path, part: float
) -> None:
    """Behind the host's answer, or in the login. `--reconnect-timeout` counts from the output."""
    run = corra.start("p", waiting(home / "go", "true"), via=via)
    wait_for(lambda: run.read("stdout") == b"a\n")
    run.agent.close()  # the follow's first link has a connection of its own, as the next ones
    events: list[Any] = []
    begun = None
    with pytest.raises(StillRunning, match=r"ago, given up"):
        for event in run.follow({"stdout": 2}, patience=Patience(reconnect_timeout_s=1.0)):
            events.append(event)
            if isinstance(event, Status) and begun is None:
                proxied.limit(int(proxied.carried() * part), "cut")
                proxied.cut()
                begun = Clock().now()
            elif isinstance(event, LinkUp):
                # A later link may need fewer bytes, and answer pings with those that are left.
                proxied.cut()
    assert begun is not None and Clock().now() - begun < 8
    assert not any(isinstance(event, Output) for event in events)
    (home / "go").touch()


GREETING = b"SSH-2.0-OpenSSH_9.9\r\n"
HANGS = {
    "at the connection": (b"", b""),
    "before the greeting, byte by byte": (b"", b"x"),
    "before the greeting, line by line": (b"", b"noise\r\n"),
    "behind the greeting": (GREETING, b""),
    "behind the greeting, byte by byte": (GREETING, b"\0"),
}


@pytest.mark.parametrize("where", [*HANGS, "in the login", "behind the answer"])
def test_no_attempt_to_reconnect_takes_longer_than_what_is_left_of_the_reconnect_timeout(
    proxied: Proxy, via: str, home: Path, where: str
) -> None:
    """Each step of an attempt has 15 s or more for itself. This bounds all of them together."""
    run = corra.start("p", waiting(home / "go", "true"), via=via)
    wait_for(lambda: run.read("stdout") == b"a\n")
    run.agent.close()  # the follow's first link has a connection of its own, as the next ones
    begun = None
    with Dripping(*HANGS.get(where, ())) as dripping, pytest.raises(StillRunning) as caught:
        for event in run.follow({"stdout": 2}, patience=Patience(reconnect_timeout_s=1.0)):
            if isinstance(event, Status) and begun is None:
                if where in HANGS:
                    proxied.divert(dripping.port)
                else:
                    size = proxied.carried()
                    proxied.limit(size if where == "behind the answer" else size // 2, "freeze")
                proxied.reset()
                begun = Clock().now()
    assert begun is not None and Clock().now() - begun < 8, caught.value.why
    assert caught.value.why.startswith("link lost ")
    (home / "go").touch()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_a_follow_that_is_killed_or_stands_still_on_its_host_is_replaced(
    target: Agent, home: Path, sent: signal.Signals
) -> None:
    run = corra.start(target, waiting(home / "go", "seq 1 50000"))
    guards = agents(home)
    got, downs, hurt = b"", 0, set[int]()
    for event in run.follow(patience=Patience(dead_after_s=1.0)):
        if isinstance(event, Output):
            got += event.data
            if got == b"a\n":
                hurt = agents(home) - guards
                for pid in hurt:
                    os.kill(pid, sent)
        if isinstance(event, LinkDown):
            downs += 1
            (home / "go").touch()
    for pid in hurt:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert len(hurt) == 1 and downs >= 1
    assert got == b"a\n" + counted(50000)


def test_a_server_whose_sessions_are_killed_is_followed_all_the_same(sshd: Sshd, via: str) -> None:
    run = corra.start(
        "h", ["sh", "-c", "for i in $(seq 1 200); do echo $i; sleep 0.01; done"], via=via
    )
    seen = b""
    for event in run.follow():
        if isinstance(event, Output):
            seen += event.data
            if seen.count(b"\n") in (20, 80, 140):
                sshd.cut()
    assert seen == counted(200)


def test_a_run_goes_on_where_the_link_comes_back_late(proxied: Proxy, via: str, home: Path) -> None:
    run = corra.start("p", waiting(home / "go", "echo b"), via=via, connect_timeout=1)
    seen, downs = b"", 0
    for event in run.follow():
        if isinstance(event, Output):
            seen += event.data
            if event.data == b"a\n":
                proxied.refuse()
                proxied.reset()
        if isinstance(event, LinkDown):
            downs += 1
            proxied.refuse(downs < 2)
            (home / "go").touch()
    assert seen == b"a\nb\n" and downs >= 2


def test_a_link_given_up_leaves_the_program_running(proxied: Proxy, via: str) -> None:
    out = io.StringIO()

    def gone(event: Any) -> None:
        if isinstance(event, Status) and event.state["state"] == "running":
            proxied.refuse()
            proxied.reset()

    with pytest.raises(corra.StillRunning) as caught:
        corra.run(
            "p",
            ["sleep", "60"],
            via=via,
            reconnect_timeout=0.5,
            connect_timeout=0.5,
            watch=gone,
            out_stream=out,
            id="given-up",
        )
    assert caught.value.code == 122
    proxied.refuse(False)
    assert corra.attach("given-up", "p").kill(grace=0).ended


def test_a_lost_link_is_one_quiet_line_on_a_terminal_and_two_in_a_pipe(
    proxied: Proxy, cli: Cli, terminal: Callable[..., Terminal], home: Path
) -> None:
    corra.run("p", ["true"])
    words = ["run", "--connect-timeout", "1s", "--host", "p", "--", *waiting(home / "go", "echo b")]
    seen = terminal(*words)
    into_pipe = cli.popen(*words)
    assert into_pipe.stdout is not None and into_pipe.stdout.readline() == b"a\n"
    seen.until("a\r\n")
    proxied.refuse()
    proxied.reset()
    seen.until("LINK LOST", "program unaffected; connecting (try 2)")
    proxied.refuse(False)
    (home / "go").touch()
    out, err = into_pipe.communicate(timeout=60)
    assert seen.end() == 0 and (into_pipe.returncode, out) == (0, b"b\n")
    lost, back = err.decode().splitlines()
    assert lost == "corra: p: link lost, program unaffected as far as known; trying on"
    assert back.startswith("corra: p: link back after ") and back.endswith(", nothing missed")
    lasting = [line for line in screen(seen.text) if line]
    assert [line.split(": ")[0] for line in lasting] == ["a", "corra", "b", "corra"]
    assert "link back after" in lasting[1] and ": done: " in lasting[3]


def test_the_command_line_gives_a_lost_link_up_when_it_was_told_to(
    proxied: Proxy, cli: Cli, home: Path
) -> None:
    corra.run("p", ["true"])
    watcher = cli.popen(
        "run",
        "--reconnect-timeout",
        "1s",
        "--connect-timeout",
        "1s",
        "--name",
        "it",
        "--host",
        "p",
        "--",
        *waiting(home / "go", ":"),
    )
    assert watcher.stdout is not None and watcher.stdout.readline() == b"a\n"
    proxied.refuse()
    proxied.reset()
    _, err = watcher.communicate(timeout=60)
    proxied.refuse(False)
    (home / "go").touch()
    assert watcher.returncode == 122
    assert b"STILL RUNNING: link lost " in err and b"given up: " in err


# -- Starts


def test_a_start_whose_answer_is_lost_is_repeated_and_runs_once(
    proxied: Proxy, via: str, agent: Callable[[str], Agent], home: Path
) -> None:
    """The connection ends after so many bytes, anywhere in the start."""
    corra.run(
        "p", ["true"], via=via
    )  # this places the agent, so that every later start sends the same bytes
    with contextlib.closing(agent("p").runner.open("true")) as channel:
        assert channel.read(20) == b""
    logged_in = proxied.carried()
    corra.start(agent("p"), append(home / "marks"))
    whole = proxied.carried()
    assert whole > logged_in
    tries = 6 if via == "fabric" else 3
    for n in range(tries):  # from the end of the login to just behind the answer
        marks = home / f"marks{n}"
        proxied.limit(logged_in - 100 + (whole - logged_in + 150) * n // tries, "reset")

        def heal(event: Any) -> None:
            if isinstance(event, LinkDown):
                proxied.limit(None)

        with contextlib.suppress(corra.Unreachable):  # cut during the login: no request was sent
            corra.start(
                "p", append(marks), id=f"once-{n}", connect_timeout=0.5, via=via, watch=heal
            )
        proxied.limit(None)
        corra.start("p", append(marks), id=f"once-{n}", via=via)
        assert corra.attach(f"once-{n}", "p").wait(20).ok
        assert marks.read_text() == "ran\n"


def test_a_start_nobody_confirms_may_have_started(proxied: Proxy) -> None:
    agent = agent_for("p", connect_timeout=0.5)
    corra.run(agent, ["true"])
    # The open connection carries the request and breaks in the middle of the answer, and every new
    # connection is refused.
    proxied.limit(proxied.carried() + 600, "reset")
    proxied.refuse()
    with pytest.raises(corra.MaybeStarted) as caught:
        corra.start(agent, ["true"], reconnect_timeout=0.1)
    assert caught.value.code == 123 and caught.value.started == "unknown"


def test_a_burst_of_starts_that_sshd_refuses_in_part_executes_each_once(
    new_sshd: Callable[..., Sshd], via: str, home: Path
) -> None:
    """sshd's default is 10:30:100. CORRA_BURST=60 takes more time than the suite has."""
    begin = BURST // 6
    server = new_sshd(options={"MaxStartups": f"{begin}:30:{begin * 10}"})
    corra.run("h", ["true"], via=via)
    marks = home / "marks"
    marks.mkdir()
    together = threading.Barrier(BURST)

    def one(n: int) -> corra.Run:
        together.wait(60)
        return corra.start(
            "h", append(marks / str(n)), id=f"burst-{n}", via=via, connect_timeout=60
        )

    with ThreadPoolExecutor(BURST) as pool:
        runs = list(pool.map(one, range(BURST)))
    agent = agent_for("h")
    wait_for(
        lambda: all(state.ended for state in corra.ps(agent) if isinstance(state, corra.State))
    )
    agent.close()
    assert len(runs) == BURST
    assert {path.read_text() for path in marks.iterdir()} == {"ran\n"} and len(
        list(marks.iterdir())
    ) == BURST
    assert any("drop connection" in line or "MaxStartups" in line for line in server.log)


# -- Silent connections


def test_status_and_kill_survive_one_broken_link(proxied: Proxy, via: str) -> None:
    run = corra.start("p", ["sleep", "60"], via=via)
    proxied.reset()
    assert run.state().state == "running"
    proxied.cut()
    assert run.kill(grace=0).ended


def test_status_and_kill_over_a_connection_that_has_gone_silent_are_asked_once_more(
    proxied: Proxy, via: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ANSWER_S", 1.0)
    run = corra.start("p", ["sleep", "60"], via=via)
    for ask in (lambda: run.state().state == "running", lambda: run.kill(grace=0).ended):
        # With a new connection, the host goes silent after the login; with an open one, at once.
        stands = via == "fabric"
        proxied.limit(proxied.carried() if stands else proxied.carried() - 400, "freeze")
        before = proxied.accepted
        threading.Thread(
            target=_heal_after, args=(proxied, before + (0 if stands else 1)), daemon=True
        ).start()
        assert ask()
        assert proxied.accepted >= before + (1 if stands else 2)


def _heal_after(proxy: Proxy, accepted: int) -> None:
    wait_for(lambda: proxy.accepted > accepted)
    proxy.limit(None)


def test_a_status_that_stays_silent_has_an_end(
    proxied: Proxy, via: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "ANSWER_S", 0.3)
    run = corra.start("p", ["true"], via=via, connect_timeout=1)
    proxied.freeze()
    with pytest.raises(corra.CorraError) as caught:
        run.state()
    assert "no answer" in caught.value.why
    proxied.thaw()


def test_on_wake_the_link_is_made_again_at_once_though_the_old_one_says_nothing(
    proxied: Proxy, via: str, home: Path
) -> None:
    class Laptop(Clock):
        asleep_s = 0.0

        def with_sleep(self) -> float:
            return super().with_sleep() + self.asleep_s

    clock = Laptop()
    run = corra.start("p", waiting(home / "go", "echo b"), via=via)
    seen, downs, ups = b"", [], []
    for event in run.follow(clock=clock, patience=Patience(dead_after_s=60.0)):
        if isinstance(event, Output):
            seen += event.data
            if seen == b"a\n":
                proxied.strand()
                clock.asleep_s = 1800.0
                slept_at = clock.now()
        elif isinstance(event, LinkDown):
            downs.append(event.error)
        elif isinstance(event, LinkUp):
            ups.append(clock.now() - slept_at)
            (home / "go").touch()
    assert (seen, downs) == (b"a\nb\n", ["this machine slept"])
    assert (
        len(ups) == 1 and ups[0] < 8
    )  # a second to notice, a handshake, and the delay of a busy machine


def test_a_login_that_takes_longer_than_an_answer_may_is_given_more_time(
    sshd: Sshd, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corra.run("h", ["true"])
    monkeypatch.setattr(follow, "ANSWER_S", 0.3)
    (home / ".bashrc").write_text("echo welcome; sleep 0.8\n")
    marks = home / "marks"
    assert corra.start("h", append(marks)).wait(20, output=False).ok
    assert marks.read_text() == "ran\n"


# -- Through another host


@pytest.mark.parametrize(
    ("via", "way"), [("fabric", "ProxyJump"), ("fabric", "ProxyCommand"), ("openssh", "ProxyJump")]
)
def test_a_run_behind_a_second_host_outlives_the_way_there(
    new_sshd: Callable[..., Sshd], via: str, way: str, home: Path
) -> None:
    jump, behind = new_sshd("jump"), new_sshd("target")
    command = f"ssh -F {shlex.quote(str(jump.ssh_config))} -W %h:%p jump"
    behind.add_host("behind", **{way: "jump" if way == "ProxyJump" else command})
    run = corra.start("behind", waiting(home / "go", "seq 1 20000"), via=via)
    got = b""
    for event in run.follow():
        if isinstance(event, Output):
            got += event.data
            if got == b"a\n":
                (jump if way == "ProxyJump" else behind).cut()
        if isinstance(event, LinkDown):
            (home / "go").touch()
    assert got == b"a\n" + counted(20000)
    assert run.wait(20).ok
    assert sum("Accepted publickey" in line for line in jump.log) >= 2


# -- A ControlMaster of the operator's


class Master:
    """A ControlMaster of ssh for the host `m`, behind a proxy where a test wants one."""

    def __init__(self, server: Sshd, home: Path, proxy: Proxy | None, *, persist: str) -> None:
        self.server = server
        self.proxy = proxy
        self.path = home / "cm"
        port = server.port if proxy is None else proxy.port
        options = {
            "ControlMaster": "auto",
            "ControlPath": str(self.path),
            "ControlPersist": persist,
        }
        server.add_host("m", Port=port, HostKeyAlias=f"[127.0.0.1]:{server.port}", **options)

    def ssh(self, *words: str) -> int:
        argv = ["ssh", "-F", str(self.server.ssh_config), *words]
        return subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=30
        ).returncode

    def is_up(self) -> bool:
        return self.ssh("-O", "check", "m") == 0

    @property
    def logins(self) -> int:
        return sum("Accepted publickey" in line for line in self.server.log)


@pytest.fixture
def master(new_sshd: Callable[..., Sshd], home: Path) -> Iterator[Callable[..., Master]]:
    """Return a function that makes a Master: `master(persist="30", MaxSessions=3)`."""
    made: list[Master] = []

    def make(
        persist: str = "60", through: Callable[[int], Proxy] | None = None, **options: Any
    ) -> Master:
        server = new_sshd(options=options)
        made.append(
            Master(server, home, None if through is None else through(server.port), persist=persist)
        )
        return made[0]

    yield make
    for each in made:
        each.ssh("-O", "exit", "m")


def test_runs_go_through_a_control_master_and_there_may_be_more_of_them_than_it_takes(
    master: Callable[..., Master],
) -> None:
    it = master(MaxSessions=3)
    assert corra.run("m", ["echo", "in"], via="openssh", hide=True).stdout == "in\n"
    assert it.is_up()
    assert corra.run("m", ["echo", "in"], via="openssh", hide=True).stdout == "in\n"
    assert it.logins == 1
    gate = it.path.with_name("go")
    agent = agent_for("m", via="openssh")

    def one(n: int) -> bytes:
        return b"".join(
            event.data
            for event in corra.start(agent, waiting(gate, f"echo {n}")).follow()
            if isinstance(event, Output)
        )

    with ThreadPoolExecutor(6) as pool:
        done = [pool.submit(one, n) for n in range(6)]
        # Three runs share the one connection; three have connections of their own.
        wait_for(lambda: len(it.server.sessions()) >= 4)
        gate.touch()
        assert [each.result(60) for each in done] == [b"a\n%d\n" % n for n in range(6)]
    assert it.is_up()


def test_a_control_master_that_has_gone_silent_is_left_aside(
    master: Callable[..., Master], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master is the operator's, without ServerAlive: it would take a quarter of an hour to
    notice.
    """
    monkeypatch.setattr(asking, "ANSWER_S", 1.0)
    with contextlib.ExitStack() as stack:
        it = master(through=lambda port: stack.enter_context(Proxy(port)))
        proxy = it.proxy
        assert proxy is not None and it.ssh("m", "true") == 0
        run = corra.start("m", waiting(home / "go", "seq 1 5000"), via="openssh")
        assert proxy.accepted == 1
        got, downs = b"", 0
        for event in run.follow(patience=Patience(dead_after_s=1.0)):
            if isinstance(event, Output):
                got += event.data
                if got == b"a\n":
                    proxy.strand()
            if isinstance(event, LinkDown):
                downs += 1
                (home / "go").touch()
        assert (got, downs) == (b"a\n" + counted(5000), 1)
        again = corra.attach(run.id, "m", via="openssh")
        assert again.state().ended
        assert it.is_up()


def test_a_command_of_ours_is_never_a_control_master_that_others_depend_on(
    master: Callable[..., Master], home: Path
) -> None:
    it = master(persist="no")
    agent = agent_for("m", via="openssh")
    run = corra.start(agent, waiting(home / "go", ":"))
    watching = iter(run.follow())
    assert isinstance(next(watching), Status)
    assert not it.is_up() and not it.path.exists()
    (home / "go").touch()
    assert all(True for _ in watching)
    # corra uses a master that is up.
    with subprocess.Popen(
        ["ssh", "-F", str(it.server.ssh_config), "-N", "m"], stdin=subprocess.DEVNULL
    ) as theirs:
        wait_for(it.is_up)
        before = it.logins
        assert corra.run("m", ["echo", "in"], via="openssh", hide=True).stdout == "in\n"
        assert it.logins == before and theirs.poll() is None
        theirs.terminate()
