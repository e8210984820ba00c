"""What a login asks for, asked on a real terminal by the default link, and told where there is
none.
"""

import contextlib
import fcntl
import functools
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import home_environment
from test_transports import another_server, everything, fails

import users
from corra.errors import Auth
from corra.model.host import Host
from corra.transport.choose import choose_runner
from sshd import Sshd
from terminal import Terminal

pytestmark = pytest.mark.timeout(180)

SAY = """
import sys
from corra.errors import CorraError
from corra.model.host import Host
from corra.transport.choose import choose_runner
target = choose_runner(Host.parse(sys.argv[1]))
try:
    target.begin()
    for _ in range(int(sys.argv[2])):
        channel = target.open("echo in")
        print("got", channel.read(30), flush=True)
        channel.close()
except CorraError as error:
    print(error, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
finally:
    target.close()
"""


def at_a_terminal(host: str, times: int = 1) -> Terminal:
    return typed_at_a_terminal("-c", SAY, host, str(times))


def typed_at_a_terminal(*words: str) -> Terminal:
    return Terminal(
        functools.partial(
            subprocess.Popen,
            [sys.executable, *words],
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        )
    )


@pytest.fixture
def guarded(new_sshd: Callable[..., Sshd]) -> Iterator[tuple[Sshd, str]]:
    """A server that takes passwords, and the name of a host where one user has \"right\"."""
    with users.made("corra-asked", password="right") as user:
        server = new_sshd(options={"PasswordAuthentication": "yes"})
        yield server, server.add_host("guarded", User=user.name)


def test_a_password_is_asked_for_and_never_shown(guarded: tuple[Sshd, str]) -> None:
    server, host = guarded
    with at_a_terminal(host) as terminal:
        terminal.expect("corra-asked@guarded's password: ")
        assert not terminal.modes()[3] & termios.ECHO
        terminal.type("wrong\n")
        terminal.expect("corra-asked@guarded's password: ")
        terminal.type("rihx\x7f\x7fght\n")
        terminal.expect(r"got b'in\\n'")
        assert terminal.end() == 0
        assert terminal.modes() == terminal.before
        assert b"wrong" not in terminal.seen and b"ght" not in terminal.seen
    assert sum("Accepted password" in line for line in server.log) == 1


@pytest.fixture
def reached(new_sshd: Callable[..., Sshd]) -> Iterator[str]:
    """A host where runs are one user's, who has the password \"right\"."""
    with users.made("corra-asked", password="right") as user:
        new_sshd(
            options={"PasswordAuthentication": "yes"}, environment=home_environment(user.home)
        ).add_host("reached", User=user.name)
        yield "reached"


def test_a_verb_asks_too_and_before_it_shows_anything(reached: str) -> None:
    with typed_at_a_terminal("-m", "corra", "run", "--host", reached, "--", "echo", "it ran") as at:
        at.expect("password: ")
        at.type("right\n")
        at.expect("it ran")
        assert at.end() == 0
        assert at.modes() == at.before


def test_a_password_may_be_asked_for_before_anything_else(reached: str) -> None:
    words = ("--prompt-for-login-password", "run", "--host", reached, "--", "echo", "it ran")
    with typed_at_a_terminal("-m", "corra", *words) as at:
        at.expect("Enter login password for use with SSH auth: ")
        at.type("right\n")
        at.expect("it ran")
        assert at.end() == 0
        assert b"corra-asked@" not in at.seen


def test_a_ctrl_c_at_a_question_leaves_and_gives_the_echo_back(guarded: tuple[Sshd, str]) -> None:
    _, host = guarded
    with at_a_terminal(host) as terminal:
        terminal.expect("password: ")
        terminal.type("\x03")
        terminal.end()
        assert terminal.modes() == terminal.before
        assert b"interrupted" in terminal.seen or b"may not log in" in terminal.seen


def test_a_timeout_at_a_question_gives_the_echo_back(guarded: tuple[Sshd, str]) -> None:
    _, host = guarded
    words = ("-m", "corra", "wait", "--timeout", "5s", "--host", host, "nothing")
    with typed_at_a_terminal(*words) as terminal:
        terminal.expect("password: ")
        terminal.end()
        assert terminal.modes() == terminal.before


@pytest.mark.parametrize("words", [("wait", "nothing"), ("ps",), ("run", "--", "true")])
def test_a_term_at_a_question_gives_the_echo_back(
    guarded: tuple[Sshd, str], words: tuple[str, ...]
) -> None:
    _, host = guarded
    verb, *rest = words
    with typed_at_a_terminal("-m", "corra", verb, "--host", host, *rest) as terminal:
        terminal.expect("password: ")
        terminal.process.terminate()
        assert terminal.end() == -signal.SIGTERM
        assert terminal.modes() == terminal.before


def test_without_a_terminal_a_password_is_told_of_and_not_asked_for(
    guarded: tuple[Sshd, str],
) -> None:
    _, host = guarded
    for via, hint in (
        (
            "fabric",
            "it would ask (password), and there is no terminal",
        ),
        ("openssh", "a key must let you in, or a master:  ssh -fNM guarded"),
    ):
        target = choose_runner(Host.parse(host), via=via)
        error = fails(target)
        target.close()
        assert isinstance(error, Auth)
        assert error.why == "corra-asked may not log in (publickey, password)"
        assert error.hint[-1].startswith(hint)
        assert len(error.hint) <= 3


@pytest.mark.parametrize(
    ("directive", "value"),
    [
        ("BatchMode", "yes"),
        ("PasswordAuthentication", "no"),
        ("PreferredAuthentications", "publickey"),
    ],
)
def test_nothing_is_asked_where_ssh_config_forbids_it(
    guarded: tuple[Sshd, str], directive: str, value: str
) -> None:
    server, _ = guarded
    server.add_host("quiet", User="corra-asked", **{directive: value})
    with at_a_terminal("quiet") as terminal:
        terminal.expect("may not log in")
        assert terminal.end() == 0
        assert b"password: " not in terminal.seen


def test_a_passphrase_is_asked_for(sshd: Sshd, home: Path) -> None:
    subprocess.run(
        ["ssh-keygen", "-q", "-p", "-P", "", "-N", "open it", "-f", sshd.user_key],
        check=True,
        capture_output=True,
        timeout=20,
    )
    with at_a_terminal("h") as terminal:
        terminal.expect("Enter passphrase for key '.*user_key': ")
        terminal.type("open it\n")
        terminal.expect(r"got b'in\\n'")
        assert terminal.end() == 0


@contextlib.contextmanager
def asking_server(sshd: Sshd, asked: list[str]) -> Iterator[None]:
    """`other` takes a one-time code that it asks for, after a key."""
    import paramiko

    class Asks(paramiko.ServerInterface):  # type: ignore[misc] # paramiko has no hints
        keyed = False

        def get_allowed_auths(self, username: str) -> str:
            return "keyboard-interactive" if self.keyed else "publickey"

        def check_auth_publickey(self, username: str, key: Any) -> int:
            self.keyed = True
            return int(paramiko.AUTH_PARTIALLY_SUCCESSFUL)

        def check_auth_interactive(self, username: str, submethods: str) -> Any:
            return paramiko.InteractiveQuery("", "", ("Code: ", True))

        def check_auth_interactive_response(self, responses: list[str]) -> int:
            asked.extend(responses)
            return int(
                paramiko.AUTH_SUCCESSFUL if responses == ["123456"] else paramiko.AUTH_FAILED
            )

        def check_channel_request(self, kind: str, chanid: int) -> int:
            return int(paramiko.OPEN_SUCCEEDED)

        def check_channel_exec_request(self, channel: Any, command: bytes) -> bool:
            def answer() -> None:
                with contextlib.suppress(OSError, EOFError):  # a client may have gone
                    channel.sendall(b"in\n")
                    channel.send_exit_status(0)
                    channel.close()

            threading.Thread(target=answer, daemon=True).start()
            return True

    with another_server(sshd, lambda _: Asks()):
        yield


def test_a_code_is_asked_for_after_a_key(sshd: Sshd, home: Path) -> None:
    asked: list[str] = []
    with asking_server(sshd, asked):
        with at_a_terminal("other", 2) as terminal:
            terminal.expect(r"\(other\) Code: ")
            terminal.type("123456\n")
            terminal.expect(r"got b'in\\n'.*got b'in\\n'")
            assert terminal.end() == 0
        assert asked == ["123456"]
        target = choose_runner(Host("other"))
        error = fails(target)
        target.close()
        assert error.why.endswith("may not log in (keyboard-interactive)")
        assert "there is no terminal" in error.hint[-1]


def test_a_password_that_was_given_answers_what_is_asked(guarded: tuple[Sshd, str]) -> None:
    from fabric import Connection

    server, _ = guarded
    with Connection(
        "127.0.0.1",
        port=server.port,
        user="corra-asked",
        connect_kwargs={"password": "right", "look_for_keys": False, "allow_agent": False},
    ) as connection:
        server.ssh_config.write_text(f"Host *\n  UserKnownHostsFile {server.known_hosts}\n")
        target = choose_runner(connection)
        assert everything(target, "echo in")[0] == b"in\n"
        target.close()
