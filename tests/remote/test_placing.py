"""One exec places the agent, only on a host without it, and only the announced bytes run."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import machine
from corra.errors import Auth, CorraError, NoPython, NoRoom, NotStarted
from corra.model.host import Host
from corra.model.refusals import refusal_error
from corra.remote import bootstrap, exchange
from corra.remote.agent_client import Agent, place
from corra.remote.bootstrap import COMMAND
from corra.remote.exchange import NOISE_MAX, BadReply, Refused
from corra.transport.channel import Channel, LinkLost, NoAnswer, Runner
from corra.transport.choose import choose_runner
from corra.transport.command import build_program, shell
from corra.transport.pipes import Process
from sshd import Sshd

pytestmark = pytest.mark.bare

# The stand-in speaks the wire and does nothing: these tests are about the way it reaches the host.
STAND_IN = b"""
import json, os, sys

class Input:
    def __init__(self, fd, ahead=b""):
        self.fd, self.ahead = fd, ahead
    def exactly(self, size):
        while len(self.ahead) < size:
            self.ahead += os.read(self.fd, 65536) or sys.exit(2)
        data, self.ahead = self.ahead[:size], self.ahead[size:]
        return data
    def line(self):
        text = b""
        while not text.endswith(b"\\n"):
            text += self.exactly(1)
        return text

def main(argv, stdin, stdout):
    request = json.loads(stdin.exactly(int(stdin.line())).decode())
    head = b"corra 1 " + request["nonce"].encode()
    if argv[0] == "crash":
        raise RuntimeError("on purpose")
    if argv[0] == "garbage":
        stdout.write(head + b"\\n" + request["text"].encode() + b"\\n")
        return 0
    got = b""
    if request.get("stdin"):
        stdout.write(head + b" send\\n")
        stdout.flush()
        got = stdin.exactly(request["stdin"]["bytes"])
    reply = {"verb": argv[0], "echo": request.get("words"), "python": sys.version.split()[0],
             "umask": os.umask(0o22), "file": __file__, "got": len(got),
             "flags": [sys.flags.isolated, sys.flags.no_site], "user": os.geteuid()}
    if argv[0] == "refuse":
        reply = {"error": "not_found", "message": "no such run", "count": 3}
    stdout.write(head + b"\\n" + json.dumps(reply).encode() + b"\\n")
    if argv[0] == "follow":
        stdout.flush()
        stdout.write(stdin.line())
    return 1 if argv[0] == "refuse" else 0
"""
DIGEST = hashlib.sha256(STAND_IN).hexdigest()
NASTY = ["", " ", "it's", "--x", "$HOME", "a\nb", "\udcff", "!!", "\\"]

New = Callable[..., Agent]


@pytest.fixture
def agent(home: Path) -> Iterator[New]:
    """An Agent with the stand-in as its source; the fixture closes it."""
    made: list[Agent] = []

    def make(target: Runner | None = None, source: bytes = STAND_IN) -> Agent:
        made.append(place(target or choose_runner(Host("local")), source=source))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def placed(home: Path) -> Path:
    """The path where the stand-in belongs."""
    return home / ".cache" / "corra" / DIGEST / "agent.py"


@pytest.fixture
def spare(last_resort: Path) -> Iterator[Path]:
    """The path of the stand-in when the home can't hold it."""
    leftover = last_resort / "cache" / DIGEST
    shutil.rmtree(leftover, ignore_errors=True)
    yield leftover / "agent.py"
    shutil.rmtree(leftover, ignore_errors=True)


class Wrapped:
    """A host that runs each command through a program of the test: a login shell, a noisy one, or
    none.
    """

    login = "me"
    remark = ""

    def __init__(self, *argv: str, env: dict[str, str] | None = None) -> None:
        self.host = Host("h")
        self._argv = argv
        self._env = [f"{name}={value}" for name, value in (env or {}).items()]

    def begin(self) -> None:
        pass

    def open(self, command: str) -> Channel:
        return Process(["env", *self._env, *self._argv, command])

    def close(self) -> None:
        pass


def version(python: str) -> str:
    return subprocess.run(
        [python, "-V"], capture_output=True, text=True, check=True, timeout=20
    ).stdout.split()[1]


def placed_bytes(agent: Agent, verb: str = "status", **request: Any) -> int:
    link = agent.stream(verb, request)
    link.close()
    return link.placed


# ---- the way there


@pytest.mark.parametrize("via", ["fabric", "openssh", "local"])
def test_the_agent_is_sent_once_and_found_ever_after(
    request: pytest.FixtureRequest, agent: New, placed: Path, via: str
) -> None:
    if via != "local":
        request.getfixturevalue("sshd")
    there = agent(
        choose_runner(
            Host("local" if via == "local" else "h"), via="fabric" if via == "local" else via
        )
    )
    assert [placed_bytes(there) for _ in range(3)] == [len(STAND_IN), 0, 0]
    assert placed.read_bytes() == STAND_IN
    assert placed.stat().st_mode & 0o777 == 0o600
    assert placed.parent.stat().st_mode & 0o777 == 0o700
    assert list(placed.parent.glob("__pycache__/agent.*.pyc"))
    assert sorted(path.name for path in placed.parent.iterdir()) == ["__pycache__", "agent.py"]


def test_a_request_arrives_exactly_and_the_mask_is_the_login_s_own(agent: New) -> None:
    mask = os.umask(0o27)
    try:
        for _ in range(2):  # the first call places it, the second finds it
            reply = agent().call("status", {"words": NASTY})
            assert (reply["verb"], reply["echo"], reply["umask"], reply["flags"]) == (
                "status",
                NASTY,
                0o27,
                [1, 1],
            )
    finally:
        os.umask(mask)


def test_a_large_request_and_a_payload_pass_through_a_placement(agent: New, placed: Path) -> None:
    for there in (True, False):
        if there:
            shutil.rmtree(placed.parent.parent, ignore_errors=True)
        words = ["x" * 1000] * 2000
        link = agent().stream(
            "start",
            {"words": words, "stdin": {"bytes": 3_000_000}},
            payload=io.BytesIO(b"\0\n" * 1_500_000),
        )
        link.close()
        assert link.reply["echo"] == words
        assert link.reply["got"] == 3_000_000


def test_a_refusal_is_raised_with_its_facts(agent: New) -> None:
    with pytest.raises(Refused, match="no such run") as caught:
        agent().call("refuse", {})
    assert caught.value.kind == "not_found"
    assert caught.value.facts["count"] == 3


def test_a_link_goes_on_in_both_directions_after_the_reply(agent: New) -> None:
    link = agent().stream("follow", {})
    link.send(b"P\n")
    assert link.read(30) == b"P\n"
    assert link.read(30) == b""
    link.close()


@pytest.mark.parametrize("python", machine.pythons(), ids=machine.name)
def test_every_python_from_3_6_on_will_do(agent: New, tmp_path: Path, python: str) -> None:
    (tmp_path / "python3").symlink_to(python)
    there = agent(Wrapped("/bin/sh", "-c", env={"PATH": f"{tmp_path}:/usr/bin:/bin"}))
    assert [placed_bytes(there) for _ in range(2)] == [len(STAND_IN), 0]
    assert there.call("status", {})["python"] == version(python)


@pytest.mark.sampled
@pytest.mark.parametrize("login_shell", ["sh", "bash", "dash", "zsh", "fish", "tcsh"])
def test_any_login_shell_will_do_however_noisy(agent: New, home: Path, login_shell: str) -> None:
    path = shutil.which(login_shell)
    if path is None:
        pytest.skip(f"no {login_shell} on this machine")
    (home / ".config" / "fish").mkdir(parents=True)
    (home / ".config" / "fish" / "config.fish").write_text("echo welcome; echo -n 'no newline'\n")
    (home / ".tcshrc").write_text("echo welcome\necho -n 'no newline'\n")
    there = agent(Wrapped(path, "-c"))
    assert [placed_bytes(there) for _ in range(2)] == [len(STAND_IN), 0]
    assert there.call("status", {"words": NASTY})["echo"] == NASTY


def test_a_login_that_prints_all_sorts_of_things_through_sshd(
    sshd: Sshd, agent: New, home: Path
) -> None:
    # bash reads ~/.bashrc when sshd runs it; other login shells have their own files.
    (home / ".bashrc").write_text(
        "echo 'corra 1 no'; printf 'motd\\0\\377 no newline'; echo err >&2\n"
    )
    there = agent(choose_runner(Host("h")))
    assert placed_bytes(there) == len(STAND_IN)
    assert there.call("status", {"words": NASTY})["echo"] == NASTY


def test_noise_without_end_is_given_up(agent: New) -> None:
    with pytest.raises(BadReply, match=str(NOISE_MAX)):
        agent(Wrapped("/bin/sh", "-c", "yes", "sh")).call("status", {})


def test_a_host_that_says_nothing_is_a_lost_link(agent: New) -> None:
    with pytest.raises(LinkLost, match=r"no answer in 0.2 s"):
        agent(Wrapped("/bin/sh", "-c", "exec sleep 60", "sh")).call("status", {}, timeout_s=0.2)


@pytest.mark.parametrize("text", ["not json", "[1]", "[" * 100_000])
def test_a_reply_that_is_no_object_is_not_trusted(agent: New, text: str) -> None:
    with pytest.raises(BadReply):
        agent().call("garbage", {"text": text})


def test_an_agent_that_breaks_down_leaves_it_open_what_it_did(agent: New) -> None:
    with pytest.raises(LinkLost, match="broke down: RuntimeError: on purpose"):
        agent().call("crash", {})


def test_nothing_a_user_says_is_in_the_command(home: Path) -> None:
    seen: list[str] = []

    class Spy(Wrapped):
        def open(self, command: str) -> Channel:
            seen.append(command)
            return super().open(command)

    for words in (["a"], NASTY):
        place(Spy("/bin/sh", "-c"), source=STAND_IN).call("status", {"words": words})
    assert seen == [COMMAND] * 2
    assert not set(COMMAND) & set("!\\\n")


@pytest.mark.parametrize("status", [129, 137, 255])
def test_a_command_that_was_killed_before_it_answered_may_have_acted(
    agent: New, status: int
) -> None:
    with pytest.raises(NoAnswer, match=f"ended with exit {status}"):
        agent(Wrapped("/bin/sh", "-c", f"read line; exit {status}", "sh")).call("start", {})


def test_once_the_host_has_answered_its_end_says_nothing_of_what_it_did(agent: New) -> None:
    script = "import os, sys\nline = b''\nwhile line.count(b'\\n') < 2: line += os.read(0, 1)\n"
    script += (
        "os.write(1, b'corra 1 ' + line.split(b'\\n')[1].split()[0] + b' need\\n'); sys.exit(2)"
    )
    with pytest.raises(NoAnswer, match="ended with exit 2"):
        agent(Wrapped(sys.executable, "-c", script)).call("start", {})


# ---- the files in the cache


def test_a_pyc_cut_short_by_a_full_disk_is_thrown_away(agent: New, placed: Path) -> None:
    placed_bytes(agent())
    (compiled,) = (placed.parent / "__pycache__").iterdir()
    compiled.write_bytes(compiled.read_bytes()[:200])
    assert agent().call("status", {"words": ["x"]})["echo"] == ["x"]
    assert agent().call("status", {"words": ["y"]})["echo"] == ["y"]


def test_an_agent_with_another_byte_is_never_run_and_is_replaced(agent: New, placed: Path) -> None:
    placed_bytes(agent())
    evil = STAND_IN.replace(b"import json", b"open('/tmp/evil', 'w')\nimport json")
    placed.write_bytes(evil)
    assert placed_bytes(agent()) == len(STAND_IN)
    assert placed.read_bytes() == STAND_IN
    assert not Path("/tmp/evil").exists()


def test_half_an_agent_is_replaced(agent: New, placed: Path) -> None:
    placed_bytes(agent())
    placed.write_bytes(STAND_IN[:100])
    assert placed_bytes(agent()) == len(STAND_IN)
    assert placed.read_bytes() == STAND_IN


def test_a_link_in_the_agent_s_place_is_replaced_and_its_target_untouched(
    agent: New, placed: Path, home: Path
) -> None:
    placed_bytes(agent())
    (home / "elsewhere").write_bytes(STAND_IN)
    placed.unlink()
    placed.symlink_to(home / "elsewhere")
    assert placed_bytes(agent()) == len(STAND_IN)
    assert not placed.is_symlink()


def test_a_directory_that_others_may_write_is_not_used(
    agent: New, placed: Path, spare: Path
) -> None:
    placed_bytes(agent())
    placed.parent.chmod(0o777)
    assert placed_bytes(agent()) == len(STAND_IN)
    assert spare.read_bytes() == STAND_IN
    assert placed_bytes(agent()) == 0


def test_a_link_in_the_directory_s_place_is_not_followed(
    agent: New, placed: Path, home: Path, spare: Path
) -> None:
    (home / "elsewhere").mkdir()
    placed.parent.parent.mkdir(parents=True)
    placed.parent.symlink_to(home / "elsewhere")
    assert placed_bytes(agent()) == len(STAND_IN)
    assert not list((home / "elsewhere").iterdir())
    assert spare.exists()


def test_an_agent_of_somebody_else_is_not_run(
    agent: New, placed: Path, spare: Path, as_root: None
) -> None:
    placed_bytes(agent())
    os.chown(placed, 65534, 65534)
    assert placed_bytes(agent()) == len(STAND_IN)
    os.chown(placed.parent, 65534, 65534)
    assert placed_bytes(agent()) == len(STAND_IN)
    assert spare.exists()


def test_a_home_that_can_t_be_written_gives_way_to_var_tmp(agent: New, spare: Path) -> None:
    nowhere = agent(Wrapped("/bin/sh", "-c", env={"HOME": "/proc/nowhere", "XDG_CACHE_HOME": ""}))
    assert [placed_bytes(nowhere) for _ in range(2)] == [len(STAND_IN), 0]
    assert nowhere.call("status", {})["file"] == str(spare)


def test_nowhere_to_write_is_said_with_all_that_was_tried(
    agent: New, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A file stands where the directory should be. The loader's text loses its spare root but keeps
    # its length.
    blocked = next(
        path
        for path in (Path(f"/tmp/{number:03}") for number in range(1000))
        if not os.path.lexists(path)
    )
    blocked.touch(exist_ok=False)
    there = agent(Wrapped("/bin/sh", "-c", env={"HOME": str(blocked), "XDG_CACHE_HOME": ""}))
    shorter = bootstrap.FIRST.replace(b"/var/tmp", os.fsencode(blocked))
    monkeypatch.setattr(exchange, "FIRST", shorter)
    try:
        with pytest.raises(Refused) as caught:
            there.call("status", {})
    finally:
        blocked.unlink()
    assert caught.value.kind == "no_room"
    assert [each["dir"] for each in caught.value.facts["tried"]] == [
        f"{blocked}/.cache/corra",
        f"{blocked}/corra-{os.getuid()}/cache",
    ]
    assert all(each["message"] for each in caught.value.facts["tried"])
    error = refusal_error(caught.value.kind, caught.value.facts, host=Host("h"), verb="run")
    assert isinstance(error, NoRoom) and error.line.startswith(
        "corra: h: NOT STARTED: no room for the agent: not a directory (ENOTDIR)"
    )
    looking = refusal_error(caught.value.kind, caught.value.facts, host=Host("h"), verb="list")
    assert looking.line.startswith("corra: h: no room for the agent")


def test_a_source_that_is_not_the_one_announced_is_not_run(home: Path, placed: Path) -> None:
    there = place(choose_runner(Host("local")), source=STAND_IN)
    assert there.digest
    there._source = b"raise SystemExit(99)"
    with pytest.raises(Refused, match="not the one announced"):
        there.call("status", {})
    assert not placed.exists()


def test_twenty_at_once_all_work(agent: New, placed: Path) -> None:
    replies: list[dict[str, Any]] = []
    threads = [
        threading.Thread(target=lambda: replies.append(agent().call("status", {})))
        for _ in range(20)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(replies) == 20
    assert [path.name for path in placed.parent.iterdir() if path.name != "__pycache__"] == [
        "agent.py"
    ]


# ---- hosts that can't hold an agent


@pytest.mark.parametrize("via", ["fabric", "openssh"])
def test_a_host_without_python_says_what_was_looked_for(
    new_sshd: Callable[..., Sshd], agent: New, via: str
) -> None:
    new_sshd(environment={"PATH": "/proc/nonexistent"})
    with pytest.raises(NoPython) as caught:
        agent(choose_runner(Host("h"), via=via)).call("status", {})
    assert (
        caught.value.line
        == "corra: h: NOT STARTED: no Python 3.6 or later (tried python3, python3.14 ..)"
    )


@pytest.mark.parametrize("python", machine.for_dear_faults(), ids=machine.name)
def test_where_only_the_platforms_own_python_is_it_will_do(
    as_root: None, agent: New, home: Path, python: str
) -> None:
    """In a mount namespace where /usr/libexec has the platform's Python alone, and PATH none."""
    if not shutil.which("unshare") or not os.path.isdir("/usr/libexec"):
        pytest.skip("no unshare, or nowhere to show it")
    (home / "bin").mkdir()
    (home / "bin" / "env").symlink_to("/usr/bin/env")
    show = (
        f"mount -t tmpfs none /usr/libexec && ln -s {python} /usr/libexec/platform-python"
        f' && PATH={home}/bin exec /bin/sh -c "$1"'
    )
    there = agent(Wrapped("/usr/bin/unshare", "-m", "/bin/sh", "-c", show, "sh"))
    assert there.call("status", {})["python"] == version(python)


def test_python_2_is_no_python(agent: New, tmp_path: Path) -> None:
    (tmp_path / "python3").write_text("#!/bin/sh\necho Python 2.7.18 >&2\n")
    (tmp_path / "python3.9").write_text("#!/bin/sh\necho Python 3.5.9\n")
    for path in tmp_path.iterdir():
        path.chmod(0o755)
    with pytest.raises(NoPython):
        agent(Wrapped("/bin/sh", "-c", env={"PATH": str(tmp_path)})).call("status", {})


def test_a_login_that_ends_before_it_begins_is_quoted(agent: New) -> None:
    with pytest.raises(NotStarted) as caught:
        agent(
            Wrapped(
                "/bin/sh", "-c", "echo 'This account is currently not available.'; exit 1", "sh"
            )
        ).call("status", {})
    assert (
        caught.value.why
        == "the login there ended with exit 1: This account is currently not available."
    )


# ---- sudo


def sudoers(name: str, line: str) -> Path:
    path = Path("/etc/sudoers.d") / name
    path.write_text(line + "\n")
    path.chmod(0o440)
    return path


@pytest.mark.skipif(not shutil.which("sudo"), reason="no sudo on this machine")
def test_the_agent_runs_as_another_user_with_that_user_s_home(test_user: str, agent: New) -> None:
    import pwd

    there = agent(choose_runner(Host("local", user=test_user)))
    assert [placed_bytes(there) for _ in range(2)] == [len(STAND_IN), 0]
    reply = there.call("status", {"words": NASTY})
    entry = pwd.getpwnam(test_user)
    assert (reply["user"], reply["echo"]) == (entry.pw_uid, NASTY)
    assert reply["file"].startswith(entry.pw_dir)


@pytest.mark.skipif(not shutil.which("sudo"), reason="no sudo on this machine")
def test_sudo_behind_ssh_lets_in_whom_sudoers_names_and_says_why_not_else(
    new_sshd: Callable[..., Sshd], test_user: str, agent: New
) -> None:
    import pwd

    server = new_sshd(
        environment={
            "HOME": pwd.getpwnam(test_user).pw_dir,
            "XDG_CACHE_HOME": "",
            "XDG_STATE_HOME": "",
        }
    )
    server.directory.parent.chmod(0o755)
    server.directory.chmod(0o755)
    server.add_host("them", User=test_user)
    there = agent(choose_runner(Host("them", user="root")))
    with pytest.raises(Auth) as caught:
        there.call("status", {})
    assert caught.value.why in {
        f"sudo asks for {test_user}'s password",
        f"{test_user} is not in sudoers there (sudo -n said so)",
    }
    assert f"{test_user} ALL=(root) NOPASSWD: ALL" in "\n".join(caught.value.hint)
    line = sudoers(test_user, f"{test_user} ALL=(root) NOPASSWD: ALL")
    try:
        assert there.call("status", {"words": NASTY})["user"] == 0
    finally:
        line.unlink()
    shutil.rmtree(Path(pwd.getpwuid(0).pw_dir) / ".cache" / "corra" / DIGEST, ignore_errors=True)


def test_an_unknown_sudo_user_is_said_so(agent: New, as_root: None) -> None:
    if not shutil.which("sudo"):
        pytest.skip("no sudo on this machine")
    with pytest.raises(Auth, match="no user no-such-user here"):
        agent(choose_runner(Host("local", user="no-such-user"))).call("status", {})


# ---- the real one


@pytest.mark.parametrize("via", ["fabric", "openssh", "local"])
def test_the_agent_of_this_version_answers(
    request: pytest.FixtureRequest, home: Path, via: str
) -> None:
    if via != "local":
        request.getfixturevalue("sshd")
    there = place(
        choose_runner(
            Host("local" if via == "local" else "h"), via="fabric" if via == "local" else via
        )
    )
    assert there.call("list", {})["runs"] == []
    link = there.stream("run", {"prog_id": "one", "program": {"argv": ["echo", "hi"]}})
    came = bytearray()
    while data := link.read(30):
        came += data
    link.close()
    there.close()
    assert b"hi\n" in came
    assert json.loads(came[came.rindex(b"\n{") :])["state"] == "exited"


def test_the_loader_is_python_3_6_and_one_line() -> None:
    assert bootstrap.FIRST.count(b"\n") == 1
    assert bootstrap.FIRST.isascii()


def test_the_errors_of_a_link_that_never_came_are_corra_s(agent: New, home: Path) -> None:
    with pytest.raises(CorraError):
        agent(choose_runner(Host("no-such-host.invalid"))).call("status", {})


def test_a_path_with_a_space_is_left_out_of_the_constant_command() -> None:
    assert bootstrap.loader_command("/opt/my python") == COMMAND
    assert bootstrap.loader_command(sys.executable).startswith(
        f"exec /bin/sh -c 'for p in {sys.executable} python3 "
    )
    assert shell(build_program(["x"]))[0] == "/bin/sh"
