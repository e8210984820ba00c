"""Both ends of the chaperone's link, with a shell of this machine instead of ssh: each end gets
what the other sent.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import assume, example, given, settings, strategies as st

import tracing
from agent_door import alive, gone
from corra.on_host import tether
from corra.transport.command import portable
from properties import PROPERTY, words
from proxy import wait_for

SHELLS = [
    pytest.param(
        shell,
        marks=pytest.mark.skipif(not shutil.which(shell[0]), reason=f"no {shell[0]}"),
        id=" ".join(shell),
    )
    for shell in (["sh"], ["dash"], ["bash"], ["bash", "--posix"], ["busybox", "sh"], ["mksh"])
]
LOGIN_SHELLS = [
    pytest.param(shell, marks=pytest.mark.skipif(not shutil.which(shell), reason=f"no {shell}"))
    for shell in ("bash", "zsh", "fish", "tcsh")
]
NONCE = b"0123456789abcdef"
POINTS = int(os.environ.get("CORRA_SWEEP_POINTS") or 30)
# The program prints its arguments with their lengths, so that a separator can't pass for a part of
# an argument.
SHOW = 'for word; do printf "%s:%s" "$(printf %s "$word" | wc -c)" "$word"; done'


def far(
    argv: Sequence[str],
    *,
    shell: Sequence[str] = ("sh",),
    variables: Mapping[str, str] | None = None,
    before: str = "",
) -> Any:
    """Run `argv` as FAR does, with a pipe as the link; return (exit status by mark, stdout, stderr,
    other marks).
    """
    text = tether.program_text(list(argv), dict(variables or {}), before, merge=False)
    header = b"%s\n-\n%s\n" % (NONCE, tether.octal(text))
    done = subprocess.run(
        [*shell, "-c", tether.FAR], input=header, capture_output=True, timeout=60, check=False
    )
    hello, rest = done.stderr.split(tether.HELLO, 1)
    assert hello == b""
    out, err, marks = b"", b"", []
    for stream, data in (("out", done.stdout), ("err", rest)):
        for before_mark, mark in tether.Marks(NONCE).feed(data):
            out, err = (out + before_mark, err) if stream == "out" else (out, err + before_mark)
            if mark is not None:
                marks.append(mark.decode())
    exits = [int(mark.split()[1]) for mark in marks if mark.startswith("exit ")]
    return (
        (exits[0] if exits else None),
        out,
        err,
        [mark for mark in marks if not mark.startswith(("exit ", "pid ", "begin", "end"))],
    )


@pytest.fixture
def carry() -> Iterator[Any]:
    """Return a function that starts the tether with a shell as its ssh; `report` holds what the
    tether told the agent.
    """
    started: list[subprocess.Popen[bytes]] = []

    def start(
        *argv: str,
        shell: Sequence[str] = ("sh",),
        flags: Sequence[str] = (),
        text: str = tether.FAR,
        **how: Any,
    ) -> Any:
        ours, theirs = os.pipe()
        secret, given = os.pipe()
        os.write(
            given,
            b"".join(
                b"%s=%s\0" % (name.encode(), value.encode())
                for name, value in how.pop("secrets", {}).items()
            ),
        )
        os.close(given)
        link = [*shell, "-c", text]
        process = subprocess.Popen(
            [sys.executable, "-ISE", tether.__file__, *flags, str(len(link)), *link, *argv],
            stdin=how.pop("stdin", subprocess.DEVNULL),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=[theirs, secret],
            env={
                **os.environ,
                "CORRA_REPORT": str(theirs),
                "CORRA_SECRETS": str(secret),
                "CORRA_PROG_ID": "x",
                **how.pop("env", {}),
            },
            start_new_session=True,
            bufsize=0,  # communicate() wouldn't find bytes that a line reader has buffered
        )
        os.close(theirs)
        os.close(secret)
        started.append(process)
        process.report = os.fdopen(ours, "rb")  # type: ignore[attr-defined]
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()
        process.report.close()  # type: ignore[attr-defined]


def line_of(process: subprocess.Popen[bytes]) -> bytes:
    assert process.stdout
    return process.stdout.readline()


# ---- marks


@PROPERTY
@given(
    parts=st.lists(
        st.binary(max_size=12)
        | st.sampled_from([b"corra-", b"corra-0123", b"corra-%s" % NONCE, b"\n"]),
        max_size=8,
    ),
    data=st.data(),
)
def test_whatever_the_pieces_marks_are_cut_out_and_nothing_else_is_touched(parts, data):
    body = b"".join(parts)
    assume(b"corra-%s " % NONCE not in body)
    whole = body + b"corra-%s exit 7\n" % NONCE + b"after"
    cuts = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=6)))
    marks, came, found = tether.Marks(NONCE), b"", []
    for begin, end in zip([0, *cuts], [*cuts, len(whole)], strict=True):
        for before, mark in marks.feed(whole[begin:end]):
            came += before
            found += [mark] if mark is not None else []
    came += marks.rest()
    assert found == [b"exit 7"]
    assert came == body + b"after"


def test_a_stream_that_ends_in_the_middle_of_a_mark_keeps_only_its_own():
    for held, own in ((b"corra-", b"corra-"), (b"corra-%s ex" % NONCE, b"")):
        marks = tether.Marks(NONCE)
        assert b"".join(before for before, _ in marks.feed(b"abc" + held)) == b"abc"
        assert marks.rest() == own


@PROPERTY
@given(text=words)
def test_the_octal_line_is_one_line_of_plain_ascii(text):
    assert all(0x20 <= byte < 0x7F and byte not in b"'\"!$`" for byte in tether.octal(text))


# ---- FAR in each shell


@pytest.mark.parametrize("shell", SHELLS)
@settings(max_examples=int(os.environ.get("CORRA_EXAMPLES", "100")) // 10, deadline=None)
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
        "%s",
        "~",
        "\n",
    ]
)
@given(argv=st.lists(words, max_size=5))
def test_every_shell_gives_every_argv_back(shell, argv):
    status, out, err, _ = far(["sh", "-c", SHOW, "sh", *argv], shell=shell)
    assert (status, err) == (0, b"")
    assert out == b"".join(b"%d:%s" % (len(os.fsencode(word)), os.fsencode(word)) for word in argv)


@pytest.mark.parametrize("login_shell", LOGIN_SHELLS)
def test_far_comes_through_any_login_shell(carry, login_shell):
    process = carry(
        "sh",
        "-c",
        'printf "%s|" "$@"; exit 3',
        "sh",
        "it's",
        "!!",
        "a\nb",
        "\\'",
        shell=[login_shell],
        text=portable(tether.FAR),
    )
    assert process.communicate(timeout=30) == (b"it's|!!|a\nb|\\'|", b"")
    assert process.returncode == 3


@pytest.mark.parametrize("shell", SHELLS)
def test_variables_arrive_exactly_also_those_that_far_itself_uses(shell):
    values = {
        "A": "it's $x\n!",
        "text": "t",
        "corra": "c",
        "pid": "p",
        "nonce": "n",
        "IFS": ":",
        "PATH": os.environ["PATH"],
    }
    status, out, _, _ = far(
        ["sh", "-c", 'printf "%s|" "$A" "$text" "$corra" "$pid" "$nonce"'],
        shell=shell,
        variables=values,
    )
    assert (status, out) == (0, b"it's $x\n!|t|c|p|n|")


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("exit 0", 0),
        ("exit 255", 255),
        ("kill -9 $$", 137),
        ("kill -TERM $$", 143),
        ("kill -INT $$", 130),
    ],
)
def test_the_status_comes_back_and_the_shell_adds_no_word(shell, script, expected):
    assert far(["sh", "-c", f"echo out; echo err >&2; {script}"], shell=shell) == (
        expected,
        b"out\n",
        b"err\n",
        [],
    )


@pytest.mark.parametrize("shell", SHELLS)
def test_the_program_has_three_descriptors_and_no_signal_ignored(shell):
    # The shell that lists the processes has one process more for the listing.
    status, out, _, _ = far(
        ["sh", "-c", "grep -E 'SigIgn|SigBlk' /proc/self/status; exec ls /proc/self/fd"],
        shell=shell,
    )
    lines = out.decode().split()
    assert status == 0
    assert lines[1] == "0000000000000000", out
    # Bit 12 is SIGPIPE. The Python that runs the tests ignores it, and so do its children unless
    # told otherwise.
    assert int(lines[3], 16) & ~(1 << 12) == 0, out
    assert lines[4:] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize(
    ("argv", "before", "refused"),
    [
        (["corra-no-such-program"], "", "refused exec 2"),
        (["/corra/none"], "", "refused exec 2"),
        (["/etc/passwd"], "", "refused exec 13"),
        (["/tmp"], "", "refused exec 13"),
        (["true"], "enter /corra/none", "refused cwd 2"),
        (["true"], "enter /etc/passwd", "refused cwd 20"),
    ],
)
def test_what_cant_be_started_is_refused_before_it_is(shell, argv, before, refused):
    _, out, err, marks = far(argv, shell=shell, before=before)
    assert (out, err) == (b"", b"")
    assert [mark.startswith(refused) for mark in marks] == [True]


# ---- the tether


@pytest.mark.parametrize("shell", SHELLS)
def test_output_and_status_are_the_programs_and_the_report_is_empty(carry, shell):
    process = carry("sh", "-c", "printf a; printf b >&2; exit 255", shell=shell)
    assert process.communicate(timeout=30) == (b"a", b"b")
    assert (process.returncode, process.report.read()) == (255, b"")


def test_noise_before_the_program_is_dropped(carry):
    process = carry("echo", "in", text="echo motd; echo banner >&2\n" + tether.FAR)
    assert process.communicate(timeout=30) == (b"in\n", b"")


@pytest.mark.sampled
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("name", ["HUP", "INT", "QUIT", "TERM", "USR1", "KILL"])
def test_a_stand_in_is_the_signal_there_and_so_is_a_real_one(carry, shell, name):
    number, trapped = signal.Signals["SIG" + name], "USR2" if name == "KILL" else name
    for sent in {tether.STAND_IN + number, number} - {signal.SIGKILL}:
        process = carry(
            "sh",
            "-c",
            f"exec 2>/dev/null; trap 'echo {name}; exit 3' {trapped}; echo ready; while :; "
            f"do sleep 0.05; done",
            shell=shell,
        )
        assert line_of(process) == b"ready\n"
        process.send_signal(sent)
        out, err = process.communicate(timeout=30)
        expected = (b"", 137) if name == "KILL" else (name.encode() + b"\n", 3)
        assert ((out, process.returncode), err) == (expected, b"")


@pytest.mark.sampled
@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("where", ["proc", "ps", "no setsid"])
def test_kill_there_is_for_the_whole_tree(carry, shell, where, tmp_path):
    text = tether.FAR.replace("/proc/[0-9]*/stat", "/proc/none") if where == "ps" else tether.FAR
    text = (
        text.replace("command -v setsid", "command -v corra-none") if where == "no setsid" else text
    )
    # One child in its own session, one that ignores TERM and HUP, and one grandchild; each writes
    # its pid.
    script = """trap '' TERM HUP; echo $$ >>"$0"
    setsid sh -c 'echo $$ >>"$0"; sleep 1000; :' "$0" &
    (sh -c 'echo $$ >>"$0"; sleep 1000; :' "$0"; :) &
    sleep 1000 & echo $! >>"$0"
    echo ready; wait"""
    pids = tmp_path / "pids"
    process = carry("sh", "-c", script, str(pids), shell=shell, text=text)
    assert line_of(process) == b"ready\n"
    wait_for(lambda: pids.exists() and len(pids.read_text().split()) == 4)
    process.send_signal(tether.STAND_IN + signal.SIGKILL)
    process.communicate(timeout=30)
    assert process.returncode == 137
    gone(*map(int, pids.read_text().split()))


@pytest.mark.parametrize("shell", SHELLS)
def test_a_file_is_sent_first_and_is_all_of_stdin(carry, shell, tmp_path):
    sent = tmp_path / "sent"
    sent.write_bytes(os.urandom(1_000_003))
    with sent.open("rb") as file:
        process = carry("cat", shell=shell, stdin=file, env={"TMPDIR": str(tmp_path)})
        out, _ = process.communicate(timeout=60)
    assert out == sent.read_bytes()
    assert list(tmp_path.glob(".corra-*")) == []


def test_a_program_that_doesnt_read_its_stdin_hears_signals_all_the_same(carry, tmp_path):
    sent = tmp_path / "sent"
    sent.write_bytes(bytes(1 << 20))
    with sent.open("rb") as file:
        process = carry(
            "sh", "-c", "trap 'exit 4' TERM; echo ready; while :; do sleep 0.05; done", stdin=file
        )
    assert line_of(process) == b"ready\n"
    process.terminate()
    assert process.wait(30) == 4


def test_the_end_of_the_link_is_not_the_end_of_the_program(carry, tmp_path):
    pid = tmp_path / "pid"
    # Close stdout and stderr: otherwise the program would hold the pipes that an ssh in the middle
    # would close.
    process = carry("sh", "-c", 'echo $$ >"$0"; exec sleep 1000 >/dev/null 2>&1', str(pid))
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
    assert process.report.read() == b""
    program = int(pid.read_text())
    for each in _descendants(process.pid):
        if each != program:
            os.kill(each, signal.SIGKILL)
    # the run is lost: its exit code must not be invented
    assert process.wait(30) == -signal.SIGKILL
    assert alive(program)
    os.kill(program, signal.SIGKILL)


def _descendants(pid: int) -> list[int]:
    from corra import agent

    return list(agent.process_tree([pid]))


def test_the_tether_killed_takes_its_ssh_along_and_leaves_the_program(carry, tmp_path):
    pid = tmp_path / "pid"
    # Like ssh, this stand-in stays alive and passes bytes on.
    text = f"exec 9<&0; ( exec sh -c {shlex.quote(tether.FAR)} ) <&9"
    process = carry("sh", "-c", 'echo $$ >"$0"; exec sleep 1000', str(pid), text=text)
    wait_for(lambda: pid.exists() and pid.read_text().endswith("\n"))
    ssh = next(each for each in _descendants(process.pid) if _parent(each) == process.pid)
    process.kill()
    gone(ssh)
    program = int(pid.read_text())
    assert alive(program)
    os.kill(program, signal.SIGKILL)


def _parent(pid: int) -> int:
    from corra import agent

    found = agent.process(pid)
    return found[1] if found else 0


@pytest.mark.parametrize("lie", ["exit 256", "exit -1", "exit none", "%099999d"])
def test_a_host_that_lies_in_its_marks_ends_in_a_lost_link_and_holds_no_memory(carry, lie):
    begin = (
        "IFS= read -r n; printf 'corra-%s pid 1\\n' $n >&2; printf 'corra-%s begin\\ncorra-%s "
        "end\\n' $n $n; "
    )
    process = carry(
        "true",
        text=(
            f"echo corra-far hello >&2; {begin} printf 'corra-%s {lie}\\n' $n >&2; exec sleep 1000"
        ),
    )
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL


def test_who_isnt_let_in_is_told_and_nothing_was_started(carry):
    process = carry("true", text="echo 'Permission denied (publickey).' >&2; exit 255")
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert process.report.read() == b"link 0 Permission denied (publickey)."


def test_a_login_that_never_says_hello_is_given_up(carry):
    process = carry(
        "true", flags=["--patience", "0.2"], text="echo 'switch1> ' >&2; exec sleep 1000"
    )
    process.communicate(timeout=30)
    assert process.returncode == -signal.SIGKILL
    assert process.report.read() == b"link 110 switch1>"


def test_a_stop_before_the_host_was_reached_starts_nothing(carry):
    process = carry("true", text="echo in >&2; exec sleep 1000")
    wait_for(lambda: _descendants(process.pid))
    process.send_signal(tether.STAND_IN + signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.report.read() == b"link 4 stopped before the host was reached"


@pytest.mark.storm
def test_no_signal_is_swallowed_however_early_it_comes():
    # A program that nobody stops says so. One that is stopped has no time for that.
    program = ["sh", "-c", "sleep 3; echo went on; exit 42"]
    link = ["sh", "-c", tether.FAR]
    argv = [sys.executable, "-ISE", tether.__file__, str(len(link)), *link, *program]
    number = tether.STAND_IN + signal.SIGTERM
    untouched = tracing.signalled(argv, number, 1 << 30)
    assert (untouched.code, untouched.out) == (42, b"went on\n")
    whole = untouched.stops
    assert whole > 200
    wrong = []
    # The last half is the tether itself, behind the start of Python.
    for point in range(whole // 2, whole, max(1, whole // 2 // POINTS)):
        found = tracing.signalled(argv, number, point)
        # The program may have ended by then, or this time there were fewer calls.
        if found.sent_s > 3 or not found.was_sent:
            break
        if b"went on" in found.out or found.code == 42:
            wrong.append((point, found))
    assert wrong == []


def test_a_child_left_behind_with_the_output_open_keeps_nobody_waiting(carry, tmp_path):
    pid = tmp_path / "pid"
    process = carry("sh", "-c", 'sleep 1000 & echo $! >"$0"; echo done; exit 6', str(pid))
    out, _ = process.communicate(timeout=30)
    assert (out, process.returncode) == (b"done\n", 6)
    os.kill(int(pid.read_text()), signal.SIGKILL)


def test_a_reader_that_stands_still_holds_the_program_back_and_signals_go_through(carry, tmp_path):
    heard = tmp_path / "heard"
    script = """trap '' TERM; dd if=/dev/zero bs=65536 count=64 2>/dev/null &
    trap 'echo it >"$0"; wait; exit 5' TERM; echo ready; wait"""
    process = carry("sh", "-c", script, str(heard))
    assert line_of(process) == b"ready\n"
    process.terminate()
    wait_for(heard.exists)
    assert process.poll() is None
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 5
    assert len(out) == 64 * 65536


def test_a_sudo_that_asks_is_answered_once(carry):
    asks = (
        f"printf '%s' {tether.PROMPTS[1].decode()} >&2; read -r got; [ \"$got\" = 'pass word' ] || "
    )
    secrets = {tether.PASSWORD: "pass word", "TOKEN": "it's"}
    good = carry(
        "sh",
        "-c",
        'echo "in $CORRA_SUDO_PASSWORD $TOKEN"',
        text=asks + "exit 9\n" + tether.FAR,
        secrets=secrets,
    )
    assert good.communicate(timeout=30) == (b"in  it's\n", b"")
    bad = carry(
        "true",
        text=asks + f"printf '%s' {tether.PROMPTS[1].decode()} >&2\nexec sleep 1000",
        secrets={tether.PASSWORD: "no"},
    )
    bad.communicate(timeout=30)
    assert bad.report.read() == b"link 13 sudo: incorrect password attempt"
