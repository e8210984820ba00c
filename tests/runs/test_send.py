"""`inv send`, `run -i` into pipes, and the same in Python: sent bytes arrive once, and corra
reports the bytes that weren't sent.
"""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from conftest import Cli

import corra
from proxy import Proxy
from sshd import Sshd

pytestmark = pytest.mark.usefixtures("home")


def begun(cli: Cli, *command: str, name: str = "it", flags: tuple[str, ...] = ("-i",)) -> None:
    done = cli("run", "-d", *flags, "--name", name, "--host", "local", "--", *command)
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------- inv send


def test_text_lines_a_pipe_and_the_end_arrive_in_order(cli: Cli) -> None:
    begun(cli, "cat")
    for words, stdin in (
        (["it", "a b"], None),
        (["it", "--line"], None),
        (["it", "--line", "c"], None),
        (["it"], b"\0\xff\n"),
        (["it", "--eof"], None),
    ):
        done = cli("send", *words, stdin=stdin)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr
    assert cli("attach", "it").stdout == b"a b\nc\n\0\xff\n"


def test_a_pipe_goes_at_full_speed_and_eof_behind_it(cli: Cli) -> None:
    begun(cli, "md5sum")
    data = os.urandom(20 << 20)
    done = cli("send", "--json", "--eof", "it", stdin=data)
    assert done.returncode == 0 and f'"bytes": {len(data)}'.encode() in done.stdout
    assert cli("attach", "it").stdout.split()[0].decode() == hashlib.md5(data).hexdigest()


def test_what_is_typed_to_a_terminal_is_sent_there(cli: Cli) -> None:
    begun(cli, "sh", "-c", "read x; echo got $x; cat; echo over", flags=("--pty",))
    assert cli("send", "it", "--line", "yes").returncode == 0
    assert cli("send", "it", "--eof").returncode == 0
    assert cli("attach", "it").stdout.replace(b"\r", b"") == b"yes\ngot yes\nover\n"


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ((), b"its stdin is /dev/null (run had no -i)"),
        (("--stdin", "f"), b"its stdin is what it was given at its start (run had no -i)"),
    ],
)
def test_who_takes_nothing_is_sent_nothing(
    cli: Cli, home: Path, flags: tuple[str, ...], why: bytes
) -> None:
    (home / "f").write_text("x")
    begun(cli, "sleep", "60", flags=flags)
    done = cli("send", "it", "yes")
    assert (
        done.returncode == 125
        and done.stderr.startswith(b"corra: it (")
        and done.stderr.endswith(b") on local: NOT SENT: " + why + b"\n")
    )


def test_who_has_ended_or_closed_its_stdin_is_sent_nothing_and_it_is_said(
    cli: Cli, home: Path
) -> None:
    begun(cli, "sh", "-c", "exec < /dev/null; echo ready; sleep 60", name="deaf")
    while not cli("logs", "deaf").stdout:
        pass
    begun(cli, "true", name="over")
    assert cli("wait", "over").returncode == 0
    begun(cli, "sleep", "60", name="full")
    assert cli("send", "full", "--eof").returncode == 0
    for name, why in (
        ("deaf", b"the program has closed its stdin"),
        ("over", b"it has ended"),
        ("full", b"its stdin was ended before"),
    ):
        done = cli("send", name, "yes")
        assert done.returncode == 125 and b"on local: NOT SENT: " + why in done.stderr


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], b"send needs an id"), (["a"], b"nothing to send: say TEXT or --eof, or pipe it in"),
        (["a", "b", "c"], b"one TEXT at a time"), (["a", "--merge"], b"send has no --merge"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(cli: Cli, words: list[str], why: bytes) -> None:
    done = cli("send", *words)
    assert done.returncode == 2 and done.stderr.startswith(b"corra: NOT SENT: " + why)


@pytest.mark.parametrize(
    "flags", [("-i", "--stdin", "-"), ("--pty", "--stdin", "-"), ("--pty", "--merge")]
)
def test_two_kinds_of_stdin_are_a_misuse(cli: Cli, flags: tuple[str, ...]) -> None:
    assert cli("run", *flags, "--host", "local", "--", "cat").returncode == 2


# ---------------------------------------------------------------- run -i


def test_run_i_reads_a_pipe_all_along_and_ends_where_it_ends(cli: Cli) -> None:
    with cli.popen("run", "-i", "--host", "local", "--", "cat", stdin=-1) as process:
        assert process.stdin and process.stdout
        for line in (b"one\n", b"two\n"):
            process.stdin.write(line)
            process.stdin.flush()
            assert process.stdout.readline() == line
        out, err = process.communicate(timeout=60)
    assert (out, err, process.returncode) == (b"", b"", 0)


def test_run_i_ends_with_its_program_whatever_is_still_to_be_read_here(cli: Cli) -> None:
    with cli.popen("run", "-i", "--host", "local", "--", "head", "-1", stdin=-1) as process:
        assert process.stdin and process.stdout
        process.stdin.write(b"one\ntwo\n")
        process.stdin.flush()
        assert process.stdout.read() == b"one\n" and process.wait(60) == 0


def test_each_byte_of_a_pipe_arrives_once_over_links_that_break(sshd: Sshd, cli: Cli) -> None:
    data = os.urandom(12 << 20)
    with Proxy(sshd.port) as proxy:
        sshd.add_host("far", Port=proxy.port, HostKeyAlias=f"[127.0.0.1]:{sshd.port}")
        with cli.popen("run", "-q", "-i", "--host", "far", "--", "cat", stdin=-1) as process:
            got = bytearray()
            source = process.stdin
            assert source and process.stdout

            def fill() -> None:
                with source:
                    source.write(data)

            threading.Thread(target=fill).start()
            due = [1 << 20, 5 << 20, 9 << 20]
            while part := os.read(process.stdout.fileno(), 1 << 16):
                got += part
                if due and len(got) > due[0]:
                    due.pop(0)
                    proxy.reset()
            process.stdin = None
            assert process.wait(60) == 0
    assert bytes(got) == data and proxy.accepted >= 2


# ---------------------------------------------------------------- in Python


def test_python_sends_and_ends_too() -> None:
    run = corra.start("local", ["cat"], stdin=corra.OPEN)
    run.send("one\n")
    run.send(b"two\n", eof=True)
    assert run.wait(20).stdout == "one\ntwo\n"
    with pytest.raises(corra.NotSent, match="it has ended"):
        run.send("three")


def test_a_run_with_a_terminal_has_one_stream_and_takes_what_is_typed() -> None:
    run = corra.start("local", ["sh", "-c", "tty -s && read x && echo got $x"], pty=True)
    run.send("yes\n")
    assert run.wait(20).stdout == "yes\r\ngot yes\r\n"
    with pytest.raises(corra.Misuse):
        corra.start("local", ["cat"], pty=True, stdin="text")


def test_a_terminal_has_the_size_that_was_asked_for() -> None:
    assert corra.run("local", ["stty", "size"], pty=(50, 200), hide=True).stdout == "50 200\r\n"
    for wrong in ((0, 80), (24, 1 << 16), (24,), ("24", "80")):
        with pytest.raises(corra.Misuse, match="is no size"):
            corra.start("local", ["true"], pty=wrong)  # type: ignore[arg-type]
