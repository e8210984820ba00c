"""Whatever a network does, an operator sees what the program wrote, through the command line and a
real sshd.

The environment sets how long the slow tests run; the full proof is CORRA_CATCH_UP_MB=100
CORRA_LINE_MB=1000 CORRA_FROZEN_S=60.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Cli

import corra
from corra.model.frames import Gap, Output
from corra.runs.events import LinkDown, LinkUp
from corra.runs.patience import Patience
from proxy import Proxy, wait_for
from sshd import Sshd, public

CATCH_UP_MB = int(os.environ.get("CORRA_CATCH_UP_MB", "12"))
LINE_MB = int(os.environ.get("CORRA_LINE_MB", "100"))
FROZEN_S = float(os.environ.get("CORRA_FROZEN_S", "1"))
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def through(sshd: Sshd) -> Iterator[Callable[..., Proxy]]:
    """Put a proxy in front of the sshd: `through(delay_s=0.05, rate=7000)`; host `p` leads through
    the proxy.
    """
    with Proxy(sshd.port) as proxy:
        sshd.add_host("p", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")

        def tune(delay_s: float = 0.0, rate: float | None = None) -> Proxy:
            proxy.delay_s, proxy.rate = delay_s, rate
            return proxy

        yield tune


def lines_of(count: int) -> bytes:
    return b"".join(b"%d\n" % n for n in range(1, count + 1))


def collect(run: corra.Run, **how: Any) -> tuple[bytes, list[Any]]:
    """Return a run's stdout, and what else happened on the way."""
    out, rest = bytearray(), []
    for event in run.follow(**how):
        if isinstance(event, Output):
            out += event.data
        else:
            rest.append(event)
    return bytes(out), rest


def test_a_narrow_line_of_long_delay_that_breaks_carries_every_byte_once(
    through: Callable[..., Proxy],
) -> None:
    """The line has 56 kbit/s and 100 ms of round trip. It is cut before one whole frame has come,
    and the part that came isn't sent again.
    """
    corra.run("p", ["true"], hide=True)
    proxy = through(delay_s=0.05, rate=7000)
    run = corra.start("p", ["seq", "1", "8000"], connect_timeout=30)
    run.agent.close()
    proxy.limit(20_000)
    got, rest = b"", []
    for event in run.follow():
        if isinstance(event, Output):
            got += event.data
        else:
            rest.append(event)
        if isinstance(event, LinkDown):
            proxy.limit(None)
            proxy.rate = None  # the client had shown that part by then, so a part of a frame counts
    assert got == lines_of(8000)
    assert sum(isinstance(event, LinkUp) for event in rest) == 1 and not any(
        isinstance(event, Gap) for event in rest
    )


def test_much_that_was_written_while_the_link_was_down_is_caught_up(
    through: Callable[..., Proxy], home: Path
) -> None:
    proxy = through()
    size = CATCH_UP_MB << 20
    go = home / "go"
    script = (
        f"echo begin; while [ ! -e {go} ]; do sleep 0.05; done; yes 0123456789abcdef | head -c "
        f"{size}; touch {home}/written"
    )
    run = corra.start("p", ["sh", "-c", script])
    seen, at, ups = hashlib.sha256(), 0, 0
    for event in run.follow():
        if isinstance(event, Output):
            seen.update(event.data)
            at += len(event.data)
            if at == len("begin\n"):
                proxy.refuse()
                proxy.cut()
                go.touch()
        elif isinstance(event, LinkDown):
            wait_for((home / "written").exists, deadline_s=60)
            proxy.refuse(False)
        ups += isinstance(event, LinkUp)
    whole = b"begin\n" + (b"0123456789abcdef\n" * (size // 17 + 1))[:size]
    assert (at, seen.hexdigest(), ups) == (len(whole), hashlib.sha256(whole).hexdigest(), 1)


def test_a_client_that_stood_still_goes_on_where_it_was(cli: Cli, sshd: Sshd, home: Path) -> None:
    """The client is stopped in the middle (Ctrl-Z, a frozen laptop) while the program goes on and
    ends.
    """
    script = (
        f"seq 1 1000; while [ ! -e {home}/go ]; do sleep 0.05; done; seq 1001 200000; touch "
        f"{home}/written"
    )
    watcher = cli.popen("run", "--host", "h", "--", "sh", "-c", script)
    assert watcher.stdout is not None
    with watcher:
        head = watcher.stdout.read(len(lines_of(1000)))
        os.kill(watcher.pid, signal.SIGSTOP)
        (home / "go").touch()
        wait_for((home / "written").exists, deadline_s=60)
        threading.Event().wait(FROZEN_S)
        os.kill(watcher.pid, signal.SIGCONT)
        out, err = watcher.communicate(timeout=80)
    assert head + out == lines_of(200000)
    assert (watcher.returncode, err) == (0, b"")


def test_ten_watchers_see_the_same_and_one_that_stands_still_holds_nobody_up(
    cli: Cli, sshd: Sshd, home: Path
) -> None:
    script = f"while [ ! -e {home}/go ]; do sleep 0.05; done; seq 1 300000; seq 1 1000 >&2"
    prog_id = cli("run", "-d", "--host", "h", "--", "sh", "-c", script).stdout.decode().strip()
    stuck = cli.popen("attach", "--host", "h", prog_id)
    watchers = [
        cli.popen("attach", "--host", "h", "--via", via, prog_id)
        for via in (*["fabric"] * 6, *["openssh"] * 3)
    ]
    # Each watcher has an open follow on the host before the program begins to write.
    wait_for(lambda: len(sshd.sessions()) >= 10, deadline_s=60)
    (home / "go").touch()
    seen = [watcher.communicate(timeout=80) for watcher in watchers]
    assert {hashlib.sha256(out).hexdigest() for out, _ in seen} == {
        hashlib.sha256(lines_of(300000)).hexdigest()
    }
    assert {err for _, err in seen} == {lines_of(1000)}
    # The test hasn't read a byte of the tenth watcher's pipe so far; that watcher still gets all of
    # them.
    assert stuck.communicate(timeout=80)[0] == lines_of(300000)
    assert {watcher.returncode for watcher in [stuck, *watchers]} == {0}


def test_looking_changes_nothing(cli: Cli, home: Path) -> None:
    cli("run", "--host", "local", "--name", "still", "--", "sh", "-c", "echo out; echo err >&2")
    spool = home / ".local" / "state" / "corra" / "runs"

    def facts() -> dict[str, tuple[int, int, bytes]]:
        files = [path for path in spool.rglob("*") if path.is_file()]
        return {
            str(path): (path.stat().st_mtime_ns, path.stat().st_mode, path.read_bytes())
            for path in files
        }

    before = facts()
    assert len(before) > 4
    for words in (
        ["attach", "still"],
        ["logs", "-t", "still"],
        ["status", "still"],
        ["ps", "--host", "local"],
        ["wait", "still"],
    ):
        assert cli(*words).returncode == 0
    assert facts() == before


@pytest.mark.parametrize("where", ["h", "local"])
def test_a_line_without_end_costs_the_client_little_memory(
    cli: Cli, sshd: Sshd, where: str
) -> None:
    code = """
import os, resource, subprocess, sys
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    size = str(LINE_MB * 1_000_000)
    argv = [*cli.program, "run", "--host", where, "--", "head", "-c", size, "/dev/zero"]
    said = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        check=True,
        env=cli.environment(),
        cwd=cli.home,
        timeout=85,
    )
    code_, kilobytes = map(int, said.stdout.split())
    assert code_ == 0
    assert kilobytes < 64_000


# -- Root only: the test's own interfaces and login shells


@contextlib.contextmanager
def island(server: Sshd, number: int) -> Iterator[tuple[str, list[str]]]:
    """A network namespace with a second listener of `server`, and a function that runs a command in
    it.
    """
    name, net = f"corra{os.getpid()}", f"10.213.{number}"
    inside = ["ip", "netns", "exec", name]

    def do(*argv: str) -> None:
        subprocess.run(argv, check=True, capture_output=True, timeout=20)

    do("ip", "netns", "add", name)
    try:
        do(
            "ip",
            "link",
            "add",
            f"cv{number}",
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            name,
        )
        do("ip", "addr", "add", f"{net}.1/30", "dev", f"cv{number}")
        do("ip", "link", "set", f"cv{number}", "up")
        do(*inside, "ip", "addr", "add", f"{net}.2/30", "dev", "eth0")
        do(*inside, "ip", "link", "set", "eth0", "up")
        do(*inside, "ip", "link", "set", "lo", "up")
        yield f"{net}.2", inside
    finally:
        # Delete the interface by name and first: the end of the namespace would delete it too, but
        # later.
        subprocess.run(
            ["ip", "link", "del", f"cv{number}"], check=False, capture_output=True, timeout=20
        )
        do("ip", "netns", "del", name)


@pytest.mark.parametrize("via", ["fabric", "openssh"])
def test_a_black_hole_is_noticed_and_left_in_time(
    as_root: None, sshd: Sshd, home: Path, via: str
) -> None:
    """Packets vanish in silence: no FIN, no RST."""
    try:
        subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, timeout=20)
        subprocess.run(["iptables", "-V"], check=True, capture_output=True, timeout=20)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no network namespaces or no iptables on this machine")
    with island(sshd, os.getpid() % 250) as (address, inside):
        config = (sshd.directory / "sshd_config").read_text()
        config = re.sub(r"ListenAddress .*", f"ListenAddress {address}", config).replace(
            "sshd.pid", "island.pid"
        )
        (sshd.directory / "island_config").write_text(config)
        server = subprocess.Popen(
            [*inside, "/usr/sbin/sshd", "-D", "-e", "-f", sshd.directory / "island_config"],
            stderr=subprocess.DEVNULL,
        )
        try:
            wait_for((sshd.directory / "island.pid").exists)
            sshd.add_host("far", HostName=address, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
            script = f"echo a; while [ ! -e {home}/go ]; do sleep 0.05; done; seq 1 50000"
            run = corra.start("far", ["sh", "-c", script], connect_timeout=3, via=via)
            drop = [*inside, "iptables", "-w", "-I", "INPUT", "-i", "eth0", "-j", "DROP"]
            got, noticed, silent_from = b"", 0.0, 0.0
            for event in run.follow(patience=Patience(dead_after_s=3)):
                if isinstance(event, Output):
                    got += event.data
                    if got == b"a\n":
                        subprocess.run(drop, check=True, timeout=20)
                        silent_from = time.monotonic()
                        (home / "go").touch()
                elif isinstance(event, LinkDown) and not noticed:
                    noticed = time.monotonic()
                    subprocess.run(
                        ["-D" if word == "-I" else word for word in drop], check=True, timeout=20
                    )
            assert got == b"a\n" + lines_of(50000)
            assert 1 < noticed - silent_from < 8  # 3 s, and the delay of a busy machine
        finally:
            server.kill()
            server.wait(20)


@pytest.mark.parametrize("shell", ["fish", "tcsh"])
def test_login_shells_of_other_kinds_and_a_slow_profile_disturb_nothing(
    new_sshd: Callable[..., Sshd], cli: Cli, test_user: str, shell: str
) -> None:
    import pwd
    import shutil

    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"no {shell} on this machine")
    subprocess.run(["usermod", "-s", path, test_user], check=True, capture_output=True, timeout=20)
    entry = pwd.getpwnam(test_user)
    their = Path(entry.pw_dir)
    noise = "echo 'corra 1 no reply'; sleep 1; echo -n welcome\n"
    for name in (".tcshrc", ".config/fish/config.fish", ".profile"):
        (their / name).parent.mkdir(parents=True, exist_ok=True)
        (their / name).write_text(noise)
    subprocess.run(["chown", "-R", test_user, their], check=True, timeout=20)
    server = new_sshd(
        environment={"PATH": "/usr/local/bin:/usr/bin:/bin"},
        options={"SetEnv": 'PATH="/usr/local/bin:/usr/bin:/bin"'},
    )
    server.directory.parent.chmod(0o755)
    server.directory.chmod(0o755)
    server.authorized_keys.write_text(public(server.user_key) + "\n")
    server.authorized_keys.chmod(0o644)
    server.add_host("theirs", User=test_user)
    done = cli(
        "run", "--host", "theirs", "--", "sh", "-c", 'echo "$0 $1"; exit 3', "it's", "$HOME !!"
    )
    assert (done.returncode, done.stdout) == (3, b"it's $HOME !!\n")
