"""Real shells that run the commands of `build_program` and `build_command` get argv exactly."""

import os
import shutil
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given, settings, strategies as st

from corra.errors import Misuse
from corra.model.host import Host, Mode
from corra.on_host import tether
from corra.transport.command import (
    ASK_HERE,
    ASK_THERE,
    Options,
    build_command,
    build_program,
    by_ssh,
    login_command,
    portable,
    shell,
    sudo,
)
from corra.transport.sudo import refusal

LOGIN_SHELLS = ["sh", "bash", "dash", "zsh", "fish", "tcsh"]

# The program prints its arguments with their lengths, so that a separator can't pass for a part of
# an argument.
SHOW = (
    "import os, sys; [os.write(1, b'%d:%s' % (len(w), w)) for w in map(os.fsencode, sys.argv[1:])]"
)

words = st.binary(max_size=40).map(lambda b: os.fsdecode(b.replace(b"\0", b"")))
nasty = st.text("ab01 '\"\\$`!*?~#&|;<>()[]{}=%^,-\t\r\n\x07é", max_size=12)
argvs = st.lists(words | nasty, max_size=5)


def shown(argv: list[str]) -> bytes:
    return b"".join(b"%d:%s" % (len(word), word) for word in map(os.fsencode, argv))


def show(argv: list[str]) -> str:
    return build_program([sys.executable, "-ISc", SHOW, *argv])


def output(argv: list[str]) -> bytes:
    return subprocess.run(argv, stdout=subprocess.PIPE, check=True, timeout=60).stdout


@settings(max_examples=60, deadline=None)
@example(argv=["", " ", "it's", "--x", "$HOME", "a\nb", "\udcff", "!!", "\\\\'\\", "\n"])
@given(argv=argvs)
def test_a_real_sh_gives_every_argv_back(argv: list[str]) -> None:
    assert output(build_command(show(argv), Host("local"))) == shown(argv)


@pytest.mark.sampled
@pytest.mark.parametrize(
    "login_shell",
    [
        pytest.param(s, marks=pytest.mark.skipif(not shutil.which(s), reason=f"no {s}"))
        for s in LOGIN_SHELLS
    ],
)
@settings(max_examples=25, deadline=None)
@example(
    argv=[
        "",
        " ",
        "it's",
        "--x",
        "$HOME",
        "a\nb",
        "\udcff",
        "!!",
        "!1",
        "\\\\'\\",
        "\\0101",
        "=ls",
        "%1",
        "~",
        "\n",
    ]
)
@given(argv=argvs)
def test_every_login_shell_gives_every_argv_back(login_shell: str, argv: list[str]) -> None:
    assert output([login_shell, "-c", login_command(show(argv), Host("h"))]) == shown(argv)


@pytest.mark.parametrize("login_shell", LOGIN_SHELLS)
@pytest.mark.parametrize("argv", [["it's", "a b"], ["!!", "\\", "a\nb", "\udcff"]])
def test_sudo_behind_any_login_shell_gets_argv_exactly(
    login_shell: str, argv: list[str], as_root: None
) -> None:
    if not (shutil.which(login_shell) and shutil.which("sudo")):
        pytest.skip(f"no {login_shell} or no sudo on this machine")
    assert output([login_shell, "-c", login_command(show(argv), Host("h", user="root"))]) == shown(
        argv
    )


@given(text=st.text(max_size=60))
def test_what_a_login_shell_gets_is_one_line_of_printable_ascii(text: str) -> None:
    assert all(" " <= c <= "~" and c != "!" for c in portable(text))


def test_a_command_made_of_plain_words_is_left_as_it_is() -> None:
    script = """for p in a b; do case $("$p" -V) in "x"[6-9]*) exec "$p";; esac; done"""
    command = f"""exec /bin/sh -c '{script}' 'f(0,"rb")'"""
    assert portable(command) == command


def test_sudo_asks_with_what_the_tether_answers() -> None:
    assert (ASK_HERE.encode(), ASK_THERE.encode()) == tether.PROMPTS


def test_each_mode_is_a_composition() -> None:
    how = Options(config="/c")
    there = "exec sudo -n -H -u u -- /bin/sh -c true"
    assert build_command("true") == shell("true")
    assert build_command("true", "local", "u") == sudo("u", shell("true"))
    assert build_command("true", "ops@h:2222", None, how) == by_ssh(
        Host("h", 2222, "ops"), portable("true"), how
    )
    assert build_command("true", "h", "u", how) == by_ssh(Host("h"), there, how)
    assert build_command("true", "h", "c,", how) == sudo(
        "c", by_ssh(Host("h"), "exec /bin/sh -c 'true'", how)
    )
    assert build_command("true", "h", "c,u", how) == sudo("c", by_ssh(Host("h"), there, how))


@pytest.mark.parametrize(
    ("mode", "user", "plain"),
    [
        (Mode.LOCAL, None, Host("local")),
        (Mode.LOCAL_SUDO, "u", Host("local", user="u")),
        (Mode.SSH_AS, "u", Host("h", 22, "u")),
        (Mode.SSH_THEN_SUDO, "u", Host("h", 22, user="u")),
        (Mode.SUDO_THEN_SSH, "u", Host("h", 22, caller="u")),
        (Mode.SUDO_THEN_SSH_THEN_SUDO, "c,u", Host("h", 22, user="u", caller="c")),
        (Mode.SUDO_THEN_SSH_THEN_SUDO, "u", Host("h", 22, user="u", caller="u")),
    ],
)
def test_the_mode_says_what_the_user_means(mode: Mode, user: str | None, plain: Host) -> None:
    how = Options(mode=mode, port=None if plain.is_local else 22)
    assert build_command("true", plain.name, user, how) == build_command("true", plain)


@pytest.mark.parametrize(
    ("mode", "host", "user"),
    [(Mode.SSH_AS, "h", "c,u"), (Mode.SUDO_THEN_SSH, "h", None), (Mode.LOCAL, "h", None)],
)
def test_a_mode_that_it_cant_be_is_refused(mode: Mode, host: str, user: str | None) -> None:
    with pytest.raises(Misuse):
        build_command("true", host, user, Options(mode=mode))


def test_options_may_be_a_mapping_that_names_the_host_too() -> None:
    said = {"mode": "ssh-then-sudo", "host": "h", "port": 2222, "ssh": "-v -o 'User=a b'"}
    how = Options(mode=Mode.SSH_THEN_SUDO, port=2222, ssh=("-v", "-o", "User=a b"))
    assert build_command("true", user="u", options=said) == build_command("true", "h", "u", how)
    assert build_command("true", "h", "u", said) == build_command("true", "h", "u", how)
    assert build_command("true", "h", "u", {**said, "ssh": ["-v"]})[-4] == "-v"
    named = build_command("true", "h", "u", {**said, "ssh": {"User": "a b", "Port": 1}})
    assert named[-5:-3] == ["-oUser=a b", "-oPort=1"]
    assert build_program(["true"], said) == build_program(["true"])


@pytest.mark.parametrize(
    "said", [{"mode": "ssh-sideways"}, {"prot": 22}, {"host": "other"}], ids=str
)
def test_options_that_mean_nothing_or_contradict_are_misuse(said: dict[str, str]) -> None:
    with pytest.raises(Misuse):
        build_command("true", "h", "u", said)


@pytest.mark.parametrize("host", ["joe@h", Host("h", login="joe")], ids=str)
def test_two_logins_are_misuse(host: Any) -> None:
    with pytest.raises(Misuse, match="two logins: joe@h, and ops by --mode ssh-as"):
        build_command("true", host, "ops", {"mode": "ssh-as"})
    assert build_command("true", host, "joe", {"mode": "ssh-as"}) == build_command("true", host)


def test_with_a_password_every_sudo_asks_by_a_prompt_of_its_own() -> None:
    argv = build_command("true", "h", "c,u", Options(password=True))
    assert argv[:6] == ["sudo", "-S", "-p", ASK_HERE, "-H", "-u"]
    assert f"sudo -S -p {ASK_THERE} -H -u u --" in argv[-1]
    assert "-n" not in argv


def test_a_terminal_and_questions_are_there_for_who_asks_for_them() -> None:
    assert {"-T", "-oBatchMode=yes"} <= set(build_command("true", "h"))
    asked = build_command("true", "h", None, Options(tty=True, batch=False))
    assert "-tt" in asked
    assert not {"-T", "-oBatchMode=yes"} & set(asked)


@pytest.mark.parametrize(
    ("text", "caller", "user"),
    [("u", None, "u"), ("c,", "c", None), ("c,u", "c", "u"), (",u", None, "u"), ("", None, None)],
)
def test_who_runs_it_is_read_from_a_text_and_written_back(
    text: str, caller: str | None, user: str | None
) -> None:
    host = Host("h").run_as(text)
    assert (host.caller, host.user) == (caller, user)
    assert Host("h").run_as(host.as_user) == host


def test_the_host_stands_behind_a_double_dash_with_the_command_as_one_word() -> None:
    argv = build_command("id -u", "h", None, Options(ssh=("-v",)))
    assert argv.index("-v") < argv.index("--")
    assert argv[argv.index("--") :] == ["--", "h", "exec /bin/sh -c 'id -u'"]


@pytest.mark.parametrize(
    "name", ["-oProxyCommand=touch /tmp/x", "h\nProxyCommand x", "h;id", "$(id)", "", "h h"]
)
def test_a_host_that_ssh_or_a_shell_could_misread_is_refused(name: str) -> None:
    with pytest.raises(Misuse):
        Host(name)


@pytest.mark.parametrize("user", ["-x", "u;id", "", "u u", "#0"])
def test_a_user_that_sudo_or_a_shell_could_misread_is_refused(user: str) -> None:
    with pytest.raises(Misuse):
        Host("h", user=user)
    with pytest.raises(Misuse):
        Host("h", login=user)


def test_a_program_whose_name_begins_with_a_dash_is_no_option_of_exec() -> None:
    said = subprocess.run(
        shell(build_program(["-a", "x"])), capture_output=True, text=True, check=False, timeout=20
    )
    assert said.returncode == 127
    assert "-a" in said.stderr


def test_of_two_sudos_the_one_that_refused_is_blamed() -> None:
    if not shutil.which("sudo"):
        pytest.skip("no sudo on this machine")
    # The words are real: this machine's sudo prints them for a user whom neither machine has.
    both = Host("h", user="root", caller="no-such-user")
    done = subprocess.run(
        build_command("true", both), capture_output=True, text=True, check=False, timeout=20
    )
    found = refusal(done.stderr, both, lambda: "no-such-user")
    assert found is not None
    assert "there" not in found.why
    if os.getuid() == 0:  # a user who may become every other one here
        assert found.why == "no user no-such-user here"
        other = Host("h", user="no-such-user", caller="root")
        found = refusal(done.stderr, other, lambda: "root")
        assert found is not None
        assert found.why == "no user no-such-user there"
