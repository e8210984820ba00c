"""The three transports behind one seam, against a real sshd: the bytes they carry, and the message
for each failure.
"""

import contextlib
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from corra.errors import Auth, CorraError, HostKey, Misuse, NotStarted, Unreachable
from corra.model.host import Host
from corra.transport.channel import LinkLost, NoAnswer, Runner
from corra.transport.choose import choose_runner
from corra.transport.command import build_program
from corra.transport.openssh import failure
from corra.transport.ssh_config import ssh_settings
from sshd import Sshd, free_port, new_key, public

VIAS = ["fabric", "openssh"]
ALL = [*VIAS, "local"]

Open = Callable[..., Runner]


@pytest.fixture
def open_runner(home: Path) -> Iterator[Open]:
    """`runner` for a host name; the fixture closes it."""
    opened: list[Runner] = []

    def make(name: Any = "h", **how: Any) -> Runner:
        opened.append(choose_runner(Host.parse(name) if isinstance(name, str) else name, **how))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture(params=ALL)
def any_runner(request: pytest.FixtureRequest, open_runner: Open) -> Runner:
    if request.param == "local":
        return open_runner("local")
    request.getfixturevalue("sshd")
    return open_runner("h", via=request.param)


def everything(target: Runner, command: str, stdin: bytes = b"") -> tuple[bytes, bytes, int | None]:
    channel = target.open(command)
    try:
        channel.write(stdin)
        channel.close_write()
        out = bytearray()
        while data := channel.read(30):
            out += data
        return bytes(out), channel.stderr(), channel.exit_status()
    finally:
        channel.close()


def fails(target: Runner, command: str = "true") -> CorraError:
    with pytest.raises(CorraError) as caught:
        everything(target, command)
    return caught.value


# ---- bytes


def test_stdout_stderr_and_the_exit_status_come_back(any_runner: Runner) -> None:
    assert everything(any_runner, "cat; echo no >&2; exit 7", b"yes\0\xff") == (
        b"yes\0\xff",
        b"no\n",
        7,
    )


def test_ten_megabytes_pass_unchanged_both_ways(any_runner: Runner) -> None:
    sent = os.urandom(1 << 20) * 10
    channel = any_runner.open("cat")

    def write() -> None:
        channel.write(sent)
        channel.close_write()

    writer = threading.Thread(target=write)
    writer.start()
    came = bytearray()
    while data := channel.read(30):
        came += data
    writer.join(30)
    channel.close()
    assert came == sent


def test_a_silent_command_times_out_and_may_be_read_on(any_runner: Runner) -> None:
    channel = any_runner.open("echo ready; read line; echo $line")
    assert channel.read(30) == b"ready\n"
    with pytest.raises(TimeoutError):
        channel.read(0.05)
    channel.write(b"on\n")
    assert channel.read(30) == b"on\n"
    assert channel.read(30) == b""
    channel.close()


def test_a_close_in_another_thread_ends_a_read(any_runner: Runner) -> None:
    channel = any_runner.open("echo ready; exec sleep 1000")
    assert channel.read(30) == b"ready\n"
    ended: list[BaseException] = []

    def read() -> None:
        try:
            channel.read(None)
        except LinkLost as error:
            ended.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    channel.close()
    reader.join(20)
    assert ended


def test_writing_to_a_command_that_has_gone_is_a_lost_link(any_runner: Runner) -> None:
    channel = any_runner.open("exec <&-; echo gone")
    while channel.read(30):
        pass
    with pytest.raises(LinkLost):
        for _ in range(64):
            channel.write(b"x" * (1 << 20))
    channel.close()


def test_a_ctrl_c_of_the_terminal_does_not_reach_a_local_command(open_runner: Open) -> None:
    out, _, _ = everything(
        open_runner("local"),
        build_program([sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid())"]),
    )
    assert out == b"True\n"


@pytest.mark.parametrize("via", ALL)
def test_a_read_without_end_is_left_at_once_by_a_ctrl_c(sshd: Sshd, via: str, home: Path) -> None:
    code = f"""
import sys
from corra.model.host import Host
from corra.transport.choose import choose_runner
host = Host({"local" if via == "local" else "h"!r})
runner = choose_runner(host, via={"fabric" if via == "local" else via!r})
channel = runner.open("echo ready; exec sleep 60")
try:
    print(channel.read(30), flush=True)
    channel.read(None)
except KeyboardInterrupt:
    channel.close()
    print("left", flush=True)
"""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": root}
    )
    assert process.stdout is not None
    with process.stdout as out:
        assert out.readline() == b"b'ready\\n'\n"
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert out.readline() == b"left\n"
        assert time.monotonic() - began < 2
    assert process.wait(20) == 0


# ---- links that break


@pytest.mark.parametrize("via", VIAS)
def test_a_killed_session_is_a_lost_link_and_no_end_of_output(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    channel = open_runner("h", via=via).open("echo ready; exec sleep 1000")
    assert channel.read(30) == b"ready\n"
    sshd.cut()
    with pytest.raises(LinkLost):
        channel.read(30)
    channel.close()


@pytest.mark.parametrize("via", VIAS)
def test_the_next_open_after_a_broken_link_connects_anew(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    target = open_runner("h", via=via)
    assert everything(target, "echo 1")[0] == b"1\n"
    sshd.stop()
    sshd.start()
    assert everything(target, "echo 2")[0] == b"2\n"


def test_a_connection_that_dies_between_a_session_and_its_command_is_made_anew(
    sshd: Sshd, open_runner: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramiko import Transport

    target = open_runner("h")
    assert everything(target, "echo 1")[0] == b"1\n"
    whole = Transport.open_session

    def breaks(transport: Any, **how: Any) -> Any:
        monkeypatch.undo()
        session = whole(transport, **how)
        transport.sock.shutdown(socket.SHUT_WR)
        return session

    monkeypatch.setattr(Transport, "open_session", breaks)
    assert everything(target, "echo 2")[0] == b"2\n"
    assert Transport.open_session is whole


def test_more_sessions_than_the_host_allows_on_one_connection_take_a_second_one(
    new_sshd: Callable[..., Sshd], open_runner: Open
) -> None:
    server = new_sshd(options={"MaxSessions": 2})
    target = open_runner("h")
    channels = [target.open("echo ready; cat") for _ in range(5)]
    assert [channel.read(30) for channel in channels] == [b"ready\n"] * 5
    assert len(server.sessions()) == 3
    for channel in channels:
        channel.close()


def test_a_host_that_lets_us_in_but_allows_no_session_is_given_up(
    new_sshd: Callable[..., Sshd], open_runner: Open
) -> None:
    server = new_sshd(options={"MaxSessions": 0})
    error = fails(open_runner("h"))
    assert isinstance(error, Unreachable)
    assert "starts nothing" in error.why
    assert sum("Accepted publickey" in line for line in server.log) == 3


@contextlib.contextmanager
def another_server(sshd: Sshd, made: Callable[[list[Any]], Any]) -> Iterator[list[Any]]:
    """Run a paramiko server `other` that accepts every login; yield its transports, each prepared
    by `made`.
    """
    import paramiko

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connections.append(paramiko.Transport(listener.accept()[0]))
                connections[-1].add_server_key(key)
                # With an event it doesn't wait for the login; a client may hang up before that.
                connections[-1].start_server(threading.Event(), made(connections))

    connections: list[Any] = []
    key = paramiko.RSAKey.generate(2048)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        sshd.add_host("other", Port=listener.getsockname()[1], StrictHostKeyChecking="accept-new")
        yield connections
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(30)


def test_a_host_that_lets_us_in_and_hangs_up_each_time_is_given_up(
    sshd: Sshd, open_runner: Open
) -> None:
    import paramiko

    class HangsUp(paramiko.ServerInterface):  # type: ignore[misc] # paramiko has no hints
        def get_allowed_auths(self, username: str) -> str:
            return "publickey"

        def check_auth_publickey(self, username: str, key: Any) -> int:
            return int(paramiko.AUTH_SUCCESSFUL)

        def check_channel_request(self, kind: str, chanid: int) -> int:
            connections[-1].close()
            return int(paramiko.OPEN_FAILED_ADMINISTRATIVELY_PROHIBITED)

    with another_server(sshd, lambda _: HangsUp()) as connections:
        error = fails(open_runner("other"))
        assert isinstance(error, Unreachable) and "starts nothing" in error.why
        assert len(connections) == 3


def test_a_host_that_says_openssh_and_counts_its_channels_otherwise_is_asked_again_slowly(
    sshd: Sshd, open_runner: Open
) -> None:
    import paramiko

    class Echoes(paramiko.ServerInterface):  # type: ignore[misc]
        def get_allowed_auths(self, username: str) -> str:
            return "publickey"

        def check_auth_publickey(self, username: str, key: Any) -> int:
            return int(paramiko.AUTH_SUCCESSFUL)

        def check_channel_request(self, kind: str, chanid: int) -> int:
            return int(paramiko.OPEN_SUCCEEDED)

        def check_channel_exec_request(self, channel: Any, command: bytes) -> bool:
            asked.append(command)
            channel.sendall(b"in\n")
            channel.send_exit_status(0)
            channel.close()
            return True

    def made(connections: list[Any]) -> Any:
        connections[-1].local_version = "SSH-2.0-OpenSSH_99.9"
        connections[-1]._channel_counter = 7
        return Echoes()

    asked: list[bytes] = []
    with another_server(sshd, made) as connections:
        target = open_runner("other")
        assert everything(target, "first")[0] == b"in\n"
        assert everything(target, "second")[0] == b"in\n"
        assert len(connections) == 2  # a request for channel 0 ended the first connection
    assert [command.decode().split()[-1].strip("'") for command in asked] == ["first", "second"]


@pytest.mark.parametrize("via", VIAS)
def test_threads_share_one_runner(sshd: Sshd, open_runner: Open, via: str) -> None:
    target = open_runner("h", via=via)
    came: list[bytes] = []
    threads = [
        threading.Thread(target=lambda n=n: came.append(everything(target, f"echo {n}")[0]))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(came) == [b"%d\n" % n for n in range(8)]
    if via == "fabric":
        assert sum("Accepted publickey" in line for line in sshd.log) == 1


@pytest.mark.parametrize("via", VIAS)
def test_a_burst_that_sshd_turns_away_gets_through_in_the_end(
    new_sshd: Callable[..., Sshd], open_runner: Open, via: str
) -> None:
    # sshd allows one unauthenticated connection, and refuses every other one meanwhile.
    server = new_sshd(options={"MaxStartups": "1:100:1"})
    with socket.create_connection(("127.0.0.1", server.port)) as idle:
        idle.recv(100)
        done: list[tuple[bytes, bytes, int | None]] = []
        thread = threading.Thread(
            target=lambda: done.append(
                everything(open_runner("h", via=via, connect_timeout_s=30), "echo in")
            )
        )
        thread.start()
        wait_for(
            lambda: any("MaxStartups" in line or "drop connection" in line for line in server.log)
        )
    thread.join(60)
    assert done
    assert done[0][0] == b"in\n"


def wait_for(true: Callable[[], bool], deadline_s: float = 30) -> None:
    end = time.monotonic() + deadline_s
    pause = threading.Event()
    while not true():
        assert time.monotonic() < end, "nothing happened"
        pause.wait(0.01)


# ---- host keys


@pytest.mark.parametrize("via", VIAS)
def test_an_unknown_host_key_is_refused_with_its_fingerprint(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    sshd.known_hosts.write_text("")
    error = fails(open_runner("h", via=via))
    assert isinstance(error, HostKey)
    begin, end = sshd.fingerprint[:13], sshd.fingerprint[-3:]
    assert error.line == f"corra: h: NOT STARTED: host key unknown: ED25519 {begin}..{end}"
    assert error.hint[0] == f"whole: ED25519 {sshd.fingerprint}"
    assert "--accept-new-key" in error.hint[1]
    assert "Accepted publickey" not in " ".join(sshd.log)


@pytest.mark.parametrize("via", VIAS)
def test_a_changed_host_key_is_refused_with_both_fingerprints_and_the_line(
    sshd: Sshd, open_runner: Open, via: str, tmp_path: Path
) -> None:
    other = new_key(tmp_path / "other")
    sshd.known_hosts.write_text("# mine\n")
    sshd.trust(public(other))
    error = fails(open_runner("h", via=via))
    known = subprocess.run(
        ["ssh-keygen", "-lf", other], capture_output=True, text=True, check=True, timeout=20
    ).stdout.split()[1]
    assert isinstance(error, HostKey)
    assert error.why == "HOST KEY CHANGED: not the one in known_hosts line 2"
    assert error.hint[:2] == (f"known ED25519 {known}", f"offered ED25519 {sshd.fingerprint}")
    assert f"ssh-keygen -R '[127.0.0.1]:{sshd.port}'" in error.hint[2]


@pytest.mark.parametrize("via", VIAS)
def test_accept_new_key_remembers_a_new_host_but_never_a_changed_one(
    sshd: Sshd, open_runner: Open, via: str, tmp_path: Path
) -> None:
    sshd.known_hosts.write_text("")
    assert everything(open_runner("h", via=via, accept_new_key=True), "echo in")[0] == b"in\n"
    assert sshd.host_public in sshd.known_hosts.read_text()
    assert everything(open_runner("h", via=via), "echo in")[0] == b"in\n"
    sshd.known_hosts.write_text("")
    sshd.trust(public(new_key(tmp_path / "other")))
    assert isinstance(fails(open_runner("h", via=via, accept_new_key=True)), HostKey)


@pytest.mark.parametrize("via", VIAS)
def test_ssh_config_may_accept_new_hosts_and_have_them_hashed(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    # ssh itself appends its line to a last line without a newline.
    sshd.known_hosts.write_text("no newline at the end" + ("" if via == "fabric" else "\n"))
    sshd.add_host("new", StrictHostKeyChecking="accept-new", HashKnownHosts="yes")
    assert everything(open_runner("new", via=via), "echo in")[0] == b"in\n"
    assert "\n|1|" in sshd.known_hosts.read_text()
    assert everything(open_runner("h", via="fabric"), "echo in")[0] == b"in\n"
    assert everything(open_runner("h", via="openssh"), "echo in")[0] == b"in\n"


@pytest.mark.parametrize("via", VIAS)
def test_a_revoked_key_and_a_host_key_alias_are_honoured(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    sshd.known_hosts.write_text("")
    sshd.trust(sshd.host_public, "thehost")
    sshd.add_host("alias", HostKeyAlias="thehost")
    assert everything(open_runner("alias", via=via), "echo in")[0] == b"in\n"
    sshd.trust("@revoked thehost " + sshd.host_public, "# ")
    sshd.known_hosts.write_text(
        f"@revoked thehost {sshd.host_public}\n" + sshd.known_hosts.read_text()
    )
    assert isinstance(fails(open_runner("alias", via=via)), HostKey)


def test_a_host_known_by_an_older_key_is_asked_for_that_one(
    new_sshd: Callable[..., Sshd], open_runner: Open, home: Path
) -> None:
    rsa = new_key(home / "rsa", "rsa")
    server = new_sshd(options={"HostKey": str(rsa)})
    server.known_hosts.write_text("")
    server.trust(public(rsa))
    # sshd has both host keys: the one in the test's options, and the ed25519 key that Sshd gives
    # it.
    server.stop()
    with (server.directory / "sshd_config").open("a") as config:
        config.write(f"HostKey {server.host_key}\n")
    server.options["HostKey"] = f"{rsa}\nHostKey {server.host_key}"
    server.start()
    assert everything(open_runner("h"), "echo in")[0] == b"in\n"


# ---- ssh_config


@pytest.mark.parametrize("via", VIAS)
def test_include_match_and_what_the_host_itself_says(
    sshd: Sshd, open_runner: Open, via: str, home: Path
) -> None:
    main = sshd.ssh_config.read_text()
    (home / ".ssh" / "part").write_text(
        "Match originalhost inc*\n  Port 1\n  User nobody-at-all\n"
        + main.replace("Host h\n", "Host inc\n")
    )
    sshd.ssh_config.write_text(f"Include {home}/.ssh/part\n" + main)
    user = main.split("User ")[1].split()[0]
    assert everything(open_runner(f"{user}@inc:{sshd.port}", via=via), "echo in")[0] == b"in\n"
    assert isinstance(fails(open_runner("inc", via=via)), Unreachable)


@pytest.mark.parametrize("via", VIAS)
def test_a_missing_identity_file_is_no_error(sshd: Sshd, open_runner: Open, via: str) -> None:
    sshd.add_host("two", IdentityFile=f"/proc/nonexistent/key\n  IdentityFile {sshd.user_key}")
    assert everything(open_runner("two", via=via), "echo in")[0] == b"in\n"


@pytest.mark.parametrize("via", VIAS)
def test_proxy_jump_goes_through_another_host_and_checks_its_key_too(
    new_sshd: Callable[..., Sshd], open_runner: Open, via: str
) -> None:
    jump, target = new_sshd("jump"), new_sshd("target")
    target.add_host("behind", ProxyJump="jump")
    target.add_host("far", ProxyJump="jump,behind")
    for name in ("behind", "far"):
        assert everything(open_runner(name, via=via), "echo in")[0] == b"in\n"
    assert sum("Accepted publickey" in line for line in jump.log) == 2
    target.known_hosts.write_text("")
    target.trust(target.host_public)
    error = fails(open_runner("behind", via=via))
    assert isinstance(error, HostKey)
    assert error.host == "behind"


@pytest.mark.parametrize("via", VIAS)
def test_proxy_command_carries_the_connection(sshd: Sshd, open_runner: Open, via: str) -> None:
    connect = f"""{sys.executable} -c "import os, socket, sys, threading
s = socket.create_connection(('127.0.0.1', int(sys.argv[1])))
def up():
    while data := os.read(0, 65536): s.sendall(data)
    s.shutdown(1)
threading.Thread(target=up, daemon=True).start()
while data := s.recv(65536): os.write(1, data)" %p"""
    script = sshd.directory / "proxy"
    script.write_text("#!/bin/sh\nport=$1\n" + connect.replace("%p", '"$port"') + "\n")
    script.chmod(0o755)
    sshd.add_host("piped", ProxyCommand=f"{script} %p")
    assert everything(open_runner("piped", via=via), "echo in")[0] == b"in\n"


@pytest.mark.parametrize("via", VIAS)
def test_a_proxy_command_that_fails_is_quoted(sshd: Sshd, open_runner: Open, via: str) -> None:
    script = sshd.directory / "gate"
    script.write_text("#!/bin/sh\necho 'gate is shut' >&2\nexit 9\n")
    script.chmod(0o755)
    sshd.add_host("vpn9", HostName="192.0.2.1", ProxyCommand=str(script))
    began = time.monotonic()
    error = fails(open_runner("vpn9", via=via))
    assert isinstance(error, Unreachable)
    how = " with exit 9" if via == "fabric" else ""
    assert error.line == f'corra: vpn9: NOT STARTED: its ProxyCommand ended{how}: "gate is shut"'
    assert "192.0.2.1" not in str(error)
    assert time.monotonic() - began < 14


@pytest.mark.parametrize("via", VIAS)
def test_a_proxy_command_that_says_nothing_and_goes_nowhere_is_no_address(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    sshd.add_host("dumb", HostName="192.0.2.1", ProxyCommand="false")
    assert "its ProxyCommand ended" in fails(open_runner("dumb", via=via)).why
    sshd.add_host("deaf", HostName="192.0.2.1", ProxyCommand="sleep 60")
    error = fails(open_runner("deaf", via=via, connect_timeout_s=1))
    assert error.why == "no answer from its ProxyCommand in 1 s"


def test_a_broken_ssh_config_is_said_in_one_line_each_time(sshd: Sshd, open_runner: Open) -> None:
    with sshd.ssh_config.open("a") as config:
        config.write("NoSuchOption yes\n")
    target = open_runner("h")
    target.begin()
    for _ in range(2):
        error = fails(target)
        assert isinstance(error, NotStarted)
        assert "nosuchoption" in error.why.lower()


# ---- hosts that don't answer, hosts that refuse the login


@pytest.mark.parametrize("via", VIAS)
def test_a_refused_connection_names_address_and_port(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    port = free_port()
    error = fails(open_runner(f"h:{port}", via=via))
    assert isinstance(error, Unreachable)
    assert error.line == f"corra: h: NOT STARTED: connection refused by 127.0.0.1 port {port}"


@pytest.mark.parametrize("via", VIAS)
def test_a_name_that_does_not_resolve_is_said_so(sshd: Sshd, open_runner: Open, via: str) -> None:
    error = fails(open_runner("no-such-host.invalid", via=via))
    assert isinstance(error, Unreachable)
    assert error.why == "host name not found"


@pytest.mark.parametrize("via", VIAS)
def test_a_host_that_says_nothing_is_given_up_in_time(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        port = silent.getsockname()[1]
        error = fails(open_runner(f"h:{port}", via=via, connect_timeout_s=1))
    assert isinstance(error, Unreachable)
    assert error.why == f"no answer from 127.0.0.1 port {port} in 1 s"
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("via", VIAS)
def test_a_key_that_is_not_authorized_is_said_with_who_and_how(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    sshd.authorized_keys.write_text("")
    error = fails(open_runner("h", via=via))
    assert isinstance(error, Auth)
    assert "may not log in (publickey)" in error.why
    if via == "fabric":
        assert str(sshd.user_key).replace(str(Path.home()), "~") in error.hint[0]


def test_a_locked_key_says_that_its_passphrase_is_in_the_way(
    sshd: Sshd, open_runner: Open, home: Path
) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", sshd.user_key],
        check=True,
        capture_output=True,
        timeout=20,
    )
    error = fails(open_runner("h"))
    assert isinstance(error, Auth)
    assert any("ssh-add" in line for line in error.hint)


def test_an_agent_serves_a_locked_key_also_where_only_named_ones_may(
    sshd: Sshd, open_runner: Open, home: Path
) -> None:
    with ssh_agent(home) as path:
        for n in range(8):  # more keys than MaxAuthTries: the right one must come first
            add_key(path, new_key(home / f"other{n}"))
        add_key(path, sshd.user_key)
        subprocess.run(
            ["ssh-keygen", "-q", "-p", "-P", "", "-N", "secret", "-f", sshd.user_key],
            check=True,
            capture_output=True,
            timeout=20,
        )
        sshd.add_host("agent", IdentityAgent=path)
        assert everything(open_runner("agent"), "echo in")[0] == b"in\n"


def test_a_key_that_signs_slowly_is_asked_once(sshd: Sshd, open_runner: Open, home: Path) -> None:
    asked = 0

    def somebody_has_to_touch_it(near: socket.socket) -> bool:
        nonlocal asked
        asked += 1
        # The host has accepted the service by then, and a second request for it is refused.
        asked += bool(select.select([near], [], [], 0.5)[0])
        return asked == 1

    with relayed_agent(sshd, home, somebody_has_to_touch_it):
        assert everything(open_runner("relayed"), "echo in")[0] == b"in\n"
    assert asked == 1


def test_an_agent_that_never_signs_is_given_up(
    sshd: Sshd, open_runner: Open, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("corra.transport.fabric.login.SIGN_S", 0.5)
    answered = threading.Event()
    with relayed_agent(sshd, home, lambda _: answered.wait(20) and False):
        error = fails(open_runner("relayed"))
        answered.set()
    assert isinstance(error, Auth)
    assert "ssh-agent" in error.why


@contextlib.contextmanager
def relayed_agent(
    sshd: Sshd, home: Path, may_sign: Callable[[socket.socket], bool]
) -> Iterator[None]:
    """`relayed` has its key in an ssh-agent that signs if `may_sign` allows it; `may_sign` sees the
    connection to the client.
    """

    def relay() -> None:
        near = listener.accept()[0]
        with near:
            while (request := near.recv(1 << 16)) and (
                request[4] != SIGN_REQUEST or may_sign(near)
            ):
                far.sendall(request)
                near.sendall(far.recv(1 << 16))

    with (
        ssh_agent(home) as path,
        socket.socket(socket.AF_UNIX) as far,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        add_key(path, sshd.user_key)
        far.connect(path)
        listener.bind(str(home / "relay"))
        listener.listen()
        sshd.add_host("relayed", IdentityAgent=str(home / "relay"))
        relaying = threading.Thread(target=relay, daemon=True)
        relaying.start()
        yield
        relaying.join(20)


SIGN_REQUEST = 13  # SSH_AGENTC_SIGN_REQUEST


@contextlib.contextmanager
def ssh_agent(home: Path) -> Iterator[str]:
    path = str(home / "agent")
    process = subprocess.Popen(["ssh-agent", "-D", "-a", path], stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: os.path.exists(path))
        yield path
    finally:
        process.terminate()
        process.wait(20)


def add_key(path: str, key: Path) -> None:
    subprocess.run(
        ["ssh-add", "-q", key],
        env={**os.environ, "SSH_AUTH_SOCK": path},
        check=True,
        capture_output=True,
        timeout=20,
    )


@pytest.mark.parametrize("name", ["-oProxyCommand=touch x", "h -x", "h;id"])
def test_a_host_that_looks_like_an_option_is_misuse(name: str) -> None:
    with pytest.raises(Misuse):
        Host.parse(name)


def test_a_transport_that_does_not_exist_is_misuse() -> None:
    with pytest.raises(Misuse, match="fabric and openssh"):
        choose_runner(Host("h"), via="telnet")


# ---- Fabric's own objects


def test_an_open_connection_is_used_as_it_is_and_left_open(
    sshd: Sshd, open_runner: Open, home: Path
) -> None:
    import fabric

    config = fabric.Config(overrides={"ssh_config_path": str(sshd.ssh_config)})
    config.load_ssh_config()
    with fabric.Connection("h", config=config) as connection:
        connection.open()
        target = open_runner(connection)
        assert everything(target, "echo in")[0] == b"in\n"
        target.close()
        assert connection.is_connected
    assert sum("Accepted publickey" in line for line in sshd.log) == 1


def test_a_connection_that_is_not_open_yet_is_opened_with_its_own_arguments_and_checked(
    sshd: Sshd, open_runner: Open, home: Path
) -> None:
    import fabric

    key = new_key(home / "second")
    sshd.authorized_keys.write_text(public(key) + "\n")
    with fabric.Connection(
        "127.0.0.1",
        port=sshd.port,
        connect_kwargs={"key_filename": str(key), "look_for_keys": False},
    ) as connection:
        sshd.ssh_config.write_text(f"Host *\n  UserKnownHostsFile {sshd.known_hosts}\n")
        assert everything(open_runner(connection), "echo in")[0] == b"in\n"
    sshd.known_hosts.write_text("")
    with fabric.Connection(
        "127.0.0.1", port=sshd.port, connect_kwargs={"key_filename": str(key)}
    ) as connection:
        assert isinstance(fails(open_runner(connection)), HostKey)


def test_an_invoke_config_serves_two_hosts_without_mixing_their_keys(
    new_sshd: Callable[..., Sshd], open_runner: Open
) -> None:
    from invoke.config import Config

    server = new_sshd()
    config = Config(
        overrides={
            "ssh_config_path": str(server.ssh_config),
            "connect_kwargs": {"allow_agent": False},
        }
    )
    for name in (server.alias, server.add_host("again")):
        assert everything(open_runner(name, config=config), "echo in")[0] == b"in\n"
    assert "key_filename" not in config["connect_kwargs"]


@pytest.mark.parametrize("via", ALL)
def test_a_connection_may_be_begun_before_there_is_a_command(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    target = open_runner(
        "local" if via == "local" else "h", via="fabric" if via == "local" else via
    )
    target.begin()
    target.begin()
    assert everything(target, "echo in")[0] == b"in\n"
    assert sum("Accepted publickey" in line for line in sshd.log) == (via != "local")


@pytest.mark.parametrize("via", VIAS)
def test_what_goes_wrong_with_a_connection_begun_early_is_said_by_the_first_open(
    sshd: Sshd, open_runner: Open, via: str
) -> None:
    port = free_port()
    target = open_runner(f"h:{port}", via=via)
    target.begin()
    error = fails(target)
    assert isinstance(error, Unreachable)
    assert error.why == f"connection refused by 127.0.0.1 port {port}"


def test_an_rsa_key_waits_for_the_hashes_the_host_takes(
    sshd: Sshd, open_runner: Open, home: Path
) -> None:
    key = new_key(home / "rsa", "rsa")
    sshd.authorized_keys.write_text(public(key) + "\n")
    sshd.add_host("byrsa", IdentityFile=str(key))
    assert everything(open_runner("byrsa"), "echo in")[0] == b"in\n"


def test_a_key_refused_is_followed_by_the_next_one(
    sshd: Sshd, open_runner: Open, home: Path
) -> None:
    wrong, also_wrong = new_key(home / "wrong"), new_key(home / "wrong_rsa", "rsa")
    sshd.add_host(
        "third",
        IdentityFile=f"{wrong}\n  IdentityFile {also_wrong}\n  IdentityFile {sshd.user_key}",
    )
    assert everything(open_runner("third"), "echo in")[0] == b"in\n"


def test_the_cipher_is_gcm_and_nagle_is_off(sshd: Sshd, open_runner: Open) -> None:
    target: Any = open_runner("h")
    everything(target, "true")
    transport = target._fabric._open[0].transport
    assert "gcm" in transport.local_cipher
    assert "gcm" in transport.remote_cipher
    assert transport.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_stream_may_end_while_the_keys_are_exchanged_anew(
    sshd: Sshd, open_runner: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramiko.packet import Packetizer

    # New keys every MiB instead of every 512 MiB: among lengths around a MiB, some end in the
    # middle of the exchange, and paramiko alone stands still for 30 s.
    monkeypatch.setattr(Packetizer, "REKEY_BYTES", 1 << 20)
    target = open_runner("h")
    for n in range(60):
        size = 1_000_000 + n * 1500
        out, _, status = everything(target, f"head -c {size} /dev/zero")
        assert (len(out), status) == (size, 0)
    assert sum("Accepted publickey" in line for line in sshd.log) == 1


def test_the_keys_are_exchanged_anew_while_we_send(
    sshd: Sshd, open_runner: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paramiko.packet import Packetizer

    monkeypatch.setattr(Packetizer, "REKEY_BYTES", 1 << 20)
    data = os.urandom(6 << 20)
    out, _, status = everything(open_runner("h"), "md5sum", data)
    assert (out.split()[0].decode(), status) == (hashlib.md5(data).hexdigest(), 0)
    assert sum("Accepted publickey" in line for line in sshd.log) == 1


def test_importing_the_transport_imports_neither_fabric_nor_paramiko() -> None:
    code = (
        "import sys, corra.transport.choose, corra.remote.agent_client; print([m for m in "
        "('fabric', 'paramiko', 'rich') if m in sys.modules])"
    )
    said = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert said.stdout == "[]\n"


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("client_loop: send disconnect: Broken pipe", LinkLost),
        ("Timeout, server h not responding.", LinkLost),
        ("Read from remote host h: Connection reset by peer", LinkLost),
        ("Connection to h closed by remote host.", LinkLost),
        ("a word that nobody knows", NoAnswer),
        ("kex_exchange_identification: read: Connection reset by peer", Unreachable),
        ("banner exchange: Connection to UNKNOWN port -1: Broken pipe", Unreachable),
        ("Connection timed out during banner exchange", Unreachable),
        ("ssh: connect to host h port 22: Connection timed out", Unreachable),
        (
            "Unable to negotiate with 10.0.0.1 port 22: no matching host key type found.",
            Unreachable,
        ),
    ],
)
def test_only_what_ssh_says_before_a_session_means_that_nothing_was_asked(
    said: str, kind: type[Exception]
) -> None:
    host = Host("h")
    assert isinstance(
        failure(said, host, ssh_settings(host), 15, None, ["ssh", "--", "h", "x"]), kind
    )


def test_what_paramiko_wants_its_version_from_is_spared_and_works_for_others() -> None:
    code = """
import sys
from corra.lean_imports import load_fabric, spared_module
load_fabric()
print([name for name in ("importlib.metadata", "email") if name in sys.modules])
with spared_module("importlib.metadata", version=lambda name: "none"):
    from importlib.metadata import entry_points, version
import importlib.metadata, paramiko
print(
    version("paramiko"),
    entry_points is importlib.metadata.entry_points,
    paramiko.__version__ == importlib.metadata.version("paramiko"),
)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == ["[]", "none True True"]


def test_an_ssh_program_that_cannot_be_executed_is_said(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = home / "ssh"
    broken.write_bytes(b"\x7fELF of another machine")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(home))
    target = choose_runner(Host("h"))
    target.begin()
    with pytest.raises(NotStarted, match="ssh -G h: Exec format error"):
        target.open("true")
    broken.chmod(0o644)  # without an ssh program to run, corra reads ssh_config itself
    (home / ".ssh" / "config").write_text("Host h\n  Port 2222\n")
    assert ssh_settings(Host("h"), str(home / ".ssh" / "config")).port == 2222
