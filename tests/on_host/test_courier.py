"""The courier: how it reads answers, and that a collector gets every byte once, whatever the
collector answers and whichever process is killed.

The collector here misbehaves on purpose, over real sockets; the program, its guards and the courier
are real.
"""

from __future__ import annotations

import contextlib
import email.utils
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st

import machine
from agent_door import (
    SOURCE,
    Gate,
    eventually,
    nothing_left,
    reap,
)
from corra import agent
from corra.on_host import courier
from courier_home import FAST, TOKEN, Home
from listener import Authority, Listener, drip, drop, flood, garbage, keep_and_drop, listening
from properties import PROPERTY
from tracing import Signalled, signalled

POINTS = int(os.environ.get("CORRA_SWEEP_POINTS") or 3)
SEED = int(os.environ.get("CORRA_SEED") or int.from_bytes(os.urandom(3), "big"))
TEXT = "".join(f"{number}\n" for number in range(20_000))


@pytest.fixture
def new_home(tmp_path: Path) -> Iterator[Callable[..., Home]]:
    """Return a function that makes a Home: `new_home(python, REFUSED_S=600.0)`. The fixture ends
    what a test leaves running.
    """
    with nothing_left():
        yield lambda *args, **constants: Home(tmp_path, *args, **constants)


@pytest.fixture
def home(new_home: Callable[..., Home]) -> Home:
    return new_home()


@pytest.fixture
def gate(home: Home) -> Iterator[Gate]:
    """A Gate on which a program waits with `read a < $HOME/gate`."""
    made = Gate(home.base / "gate")
    yield made
    made.close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    with listening() as found:
        yield found


def completed(listener: Listener) -> Any:
    return listener.wait(lambda each: each.held.completed)[0]


def delivered_exactly(listener: Listener, expected: bytes) -> None:
    assert completed(listener)["state"] == "exited"
    assert listener.output() == expected
    assert len(listener.held.completed) == 1
    assert listener.held.gaps == []


# ---------------------------------------------------------------- what an answer means


@pytest.mark.parametrize(
    "status, headers, do, slow",
    [
        (200, {}, "ok", False),
        (204, {}, "ok", False),
        (301, {"Location": "https://elsewhere/"}, "later", True),
        (307, {"Location": "https://elsewhere/"}, "later", True),
        (400, {}, "never", False),
        (401, {}, "later", True),
        (403, {}, "later", True),
        (404, {}, "later", True),
        (405, {}, "never", False),
        (410, {}, "never", False),
        (408, {}, "later", False),
        (409, {"Upload-Offset": "5"}, "seek", False),
        (413, {}, "smaller", False),
        (422, {}, "never", False),
        (429, {"Retry-After": "7"}, "later", False),
        (500, {}, "later", False),
        (502, {}, "later", False),
        (503, {"Retry-After": "7"}, "later", False),
        (507, {}, "later", False),
    ],
)
def test_each_status_means_one_thing(status, headers, do, slow):
    answer = courier.read_answer(status, headers, b"", 0.0)
    assert (answer.do, answer.slow) == (do, slow)
    assert answer.pause_s == (7.0 if "Retry-After" in headers else None)
    assert answer.offset == (5 if status == 409 else None)


@pytest.mark.parametrize(
    "text, expected",
    [
        (None, None), ("", None), ("0", 0.0), ("120", 120.0), ("999999999", 3600.0), ("-5", None),
        ("soon", None),
        (email.utils.formatdate(1_000_030.0, usegmt=True), 30.0),
        (email.utils.formatdate(999_000.0, usegmt=True), 0.0),
    ],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date_and_at_most_an_hour(text, expected):
    assert courier.retry_after(text, 1_000_000.0) == expected


def test_the_pause_grows_from_retry_frequency_to_five_minutes_and_is_never_below_what_was_asked():
    pauses = [courier.backoff(tries, 10, 0.0) for tries in range(1, 9)]
    assert pauses == [10, 20, 40, 80, 160, 300, 300, 300]
    assert courier.backoff(1, 900, 0.0) == 900
    assert courier.backoff(3, 10, 1.0) == 60


@PROPERTY
@given(st.binary(max_size=80), st.text(max_size=20))
def test_no_answer_upsets_it(body, offset):
    answer = courier.read_answer(409, {"Upload-Offset": offset}, body, 0.0)
    assert answer.offset is None or answer.offset >= 0
    assert courier.lacking(answer, {"stdout": 3}).keys() <= {"stdout"}
    assert answer.error.isprintable()


# ---------------------------------------------------------------- what to do next

VIEW: dict[str, Any] = {
    "streams": {}, "final": None, "retry_at": 0.0, "give_up_at": None, "state_at": None,
    "buffer": 100, "latency": 1.0, "done": False,
}  # fmt: skip


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({"streams": {"stdout": (0, 0, None)}}, (None, None, None)),
        ({"streams": {"stdout": (0, 99, 9.5)}}, (None, None, 10.0 + courier.GATHER_S)),
        ({"streams": {"stdout": (0, 100, 9.5)}}, ("send", "stdout", None)),
        ({"streams": {"stdout": (0, 1, 9.0)}}, ("send", "stdout", None)),
        ({"streams": {"stderr": (0, 1, 8.0), "stdout": (0, 1, 9.0)}}, ("send", "stderr", None)),
        ({"streams": {"stdout": (0, 100, 9.0)}, "retry_at": 11.0}, (None, None, 11.0)),
        (
            {"streams": {"stdout": (0, 100, 9.0)}, "retry_at": 11.0, "give_up_at": 10.0},
            ("give up", None, None),
        ),
        ({"streams": {"stdout": (4, 5, 10.0)}, "final": {"stdout": 5}}, ("send", "stdout", None)),
        ({"streams": {"stdout": (4, 4, None)}, "final": {"stdout": 5}}, ("gap", "stdout", None)),
        ({"streams": {"stdout": (5, 5, None)}, "final": {"stdout": 5}}, ("completed", None, None)),
        (
            {"streams": {"stdout": (5, 5, None)}, "final": {"stdout": 5}, "done": True},
            ("leave", None, None),
        ),
        ({"state_at": 10.0}, ("state", None, None)),
        ({"state_at": 12.0}, (None, None, 12.0)),
        ({"state_at": 10.0, "final": {}}, ("completed", None, None)),
    ],
)
def test_it_decides_by_what_it_sees(facts, expected):
    assert courier.step({**VIEW, **facts}, 10.0) == expected


# ---------------------------------------------------------------- the way of the bytes


@machine.EVERYWHERE
def test_a_run_by_hand_reports_its_output_and_its_end(new_home, listener, python):
    home = new_home(python, by_hand=True)
    prog_id = home.start(listener, "seq 20000; echo oops >&2; exit 3")
    final = completed(listener)
    assert listener.output() == "".join(f"{n}\n" for n in range(1, 20001)).encode()
    assert listener.output("stderr") == b"oops\n"
    assert (final["prog_id"], final["return_code"]) == (prog_id, 3)
    found = eventually(lambda: (found := home.callback(prog_id))["completed"] and found)
    assert found["acked"] == {"stdout": len(listener.output()), "stderr": 5}
    assert found["error"] is None


def test_the_callback_in_the_documentation_works_with_the_agent_and_nothing_else(home, listener):
    page = (SOURCE.parent.parent / "docs" / "callbacks.md").read_text()
    program = next(block for block in page.split("```") if block.startswith('\n{"program"')).strip()
    program = program.replace("./migrate", "/bin/hostname").replace(
        "https://collect.example:8050/api/v1/agent/PROG-ID", listener.url
    )
    program = program.replace('"token": "..."', f'"token": "{TOKEN}"')
    argv = [home.python, str(home.base / "agent.py")]
    done = subprocess.run(
        argv,
        input=program.encode(),
        capture_output=True,
        env=home.env,
        cwd=home.base,
        check=True,
        timeout=60,
    )
    assert completed(listener)["prog_id"] == json.loads(done.stdout)["prog_id"]
    assert listener.output() == subprocess.run(["hostname"], capture_output=True, check=True).stdout
    assert TOKEN.encode() not in done.stdout


def test_the_seeds_get_with_a_body_works_and_merged_output_is_one_stream(home, listener):
    home.start(listener, "echo a; echo b >&2; echo c", method="GET", merge=True)
    completed(listener)
    assert listener.output("output") == b"a\nb\nc\n"
    assert {each.method for each in listener.seen} == {"GET"}


def test_what_a_program_writes_on_its_terminal_is_one_stream_too(home, listener):
    home.start(listener, "echo a; echo b >&2", pty=True)
    assert completed(listener)["state"] == "exited"
    assert listener.output("output") == b"a\r\nb\r\n"


def test_output_goes_when_it_is_old_enough_or_enough(home, listener, gate):
    home.start(
        listener,
        "echo one; read a < $HOME/gate; seq 1 20000; read a < $HOME/gate",
        config={"output_buffer": 50_000},
    )
    listener.wait(lambda each: each.output() == b"one\n")
    assert not listener.held.completed
    gate.open()
    listener.wait(lambda each: len(each.output()) > 50_000)
    gate.open()
    completed(listener)
    sizes = [len(each.body) for each in listener.seen if each.path.endswith("stdout")]
    assert sizes[0] == 4
    assert len(sizes) < 40  # the courier gathers lines into a request


def test_a_program_that_could_not_be_started_is_reported_too(home, listener):
    state = home.ask(
        "start",
        program={"argv": ["/proc/nonexistent"]},
        callback={"url": listener.url, "token": TOKEN},
        config=FAST,
    )
    assert state["state"] == "not_started"
    assert completed(listener)["exception"]["errno"] == 2


def test_without_a_callback_there_is_no_courier_and_none_is_needed(home):
    (home.base / "courier.py").unlink()
    state = home.ask("start", program={"argv": ["sleep", "60"]})
    assert (state["state"], state["callback"]) == ("running", None)
    assert [each[3] for each in agent.process_tree([state["agent_pid"]]).values()] == ["sleep"]
    refused = home.ask("start", program={"argv": ["true"]}, callback={"url": "http://127.0.0.1:1/"})
    assert refused["error"] == "no_courier"


# ---------------------------------------------------------------- collectors that misbehave


ODD = [
    (500, {}, b""),
    (502, {}, b"<html>"),
    (503, {}, b""),
    (507, {}, b"disk full"),
    (408, {}, b""),
    drop,
    keep_and_drop,
    garbage,
    flood,
]


@pytest.mark.parametrize("first", [0, 5], ids=["answers", "what is no answer"])
def test_what_may_heal_is_tried_again_and_nothing_comes_twice(new_home, listener, first):
    home = new_home(BACKOFF_MAX_S=0.05)
    # Each odd answer comes three times. At the end the listener once keeps the bytes without an
    # answer.
    listener.odd = [
        *(odd for odd in ODD[first : 5 if first == 0 else None] for _ in range(3)),
        keep_and_drop,
    ]
    home.start(listener, "seq 0 19999")
    delivered_exactly(listener, TEXT.encode())
    assert listener.odd == []


def test_the_tries_of_a_collector_that_fails_are_further_and_further_apart(home, listener):
    listener.odd = [(500, {}, b"")] * 5
    home.start(listener, "echo x", config={"retry_frequency": 0.1})
    completed(listener)
    times = [each.at for each in listener.seen if each.status == 500]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    for gap, least in zip(gaps, (0.1, 0.2, 0.4, 0.4), strict=True):
        assert gap >= least


def test_retry_after_is_obeyed(home, listener):
    listener.odd = [(429, {"Retry-After": "1"}, b"")]
    home.start(listener, "echo x")
    delivered_exactly(listener, b"x\n")
    assert listener.seen[1].at - listener.seen[0].at >= 1.0


def test_a_wrong_token_isnt_hammered_with_and_is_said_and_another_one_helps_at_once(new_home):
    home = new_home(REFUSED_S=600.0)
    with listening(token="the-right-one") as listener:
        prog_id = home.start(listener, "echo x")
        listener.wait(lambda each: each.seen)
        error = eventually(lambda: home.callback(prog_id)["error"])
        assert error.startswith("401")
        assert TOKEN not in json.dumps(home.status(prog_id))
        assert listener.statuses() == [401]
        new = home.directory(prog_id) / "token.new"
        new.write_text("the-right-one\n")
        new.rename(home.directory(prog_id) / "token")
        delivered_exactly(listener, b"x\n")
        eventually(lambda: home.callback(prog_id)["error"] is None)


def said(home: Home, prog_id: str, end: str) -> str:
    """Return the courier's reported error once it ends with `end`."""
    found: str = eventually(
        lambda: (error := home.callback(prog_id)["error"] or "").endswith(end) and error
    )
    return found


def test_who_is_turned_away_asks_again_after_a_minute_at_the_earliest_and_says_why(
    new_home, listener
):
    assert courier.REFUSED_S >= 60
    home = new_home(REFUSED_S=0.5)
    refusals = (401, 403, 404)
    listener.odd = [(status, {}, b'{"message": "not you, %d"}' % status) for status in refusals]
    prog_id = home.start(listener, "echo x")
    for status in refusals:
        error = said(home, prog_id, f": not you, {status}")
        assert error.startswith(f"{status} ")
    delivered_exactly(listener, b"x\n")
    assert all(
        later.at - earlier.at >= 0.5 for earlier, later in itertools.pairwise(listener.seen[:4])
    )


def test_a_body_that_is_too_large_is_halved_down_to_4_kib(home, listener):
    listener.body_max = 5000
    home.start(listener, "seq 0 19999")
    delivered_exactly(listener, TEXT.encode())
    sizes = [
        len(each.body)
        for each in listener.seen
        if each.path.endswith("stdout") and each.status == 200
    ]
    assert max(sizes) <= 5000


def test_where_4_kib_are_too_much_it_stops_and_says_so_and_the_output_stays(home, listener):
    listener.body_max = 100
    prog_id = home.start(listener, "seq 0 19999")
    found = eventually(lambda: (found := home.callback(prog_id))["over"] and found)
    assert found["error"].startswith("413")
    assert found["completed"] is None
    eventually(lambda: home.status(prog_id)["supervisor"] == "gone")
    assert (home.directory(prog_id) / "stdout").read_text() == TEXT


def test_what_cant_heal_is_recorded_and_not_tried_for_ever(home, listener):
    status = 422
    listener.always = (status, {}, b'{"message": "no such thing"}')
    prog_id = home.start(listener, "echo x")
    found = eventually(lambda: (found := home.callback(prog_id))["over"] and found)
    assert found["error"].startswith(f"{status} ") and found["error"].endswith(": no such thing")
    eventually(lambda: home.status(prog_id)["supervisor"] == "gone")
    assert listener.statuses() == [status]


def test_a_redirect_is_not_followed_and_the_token_goes_nowhere(home, listener):
    with listening() as elsewhere:
        listener.always = (307, {"Location": elsewhere.url}, b"")
        prog_id = home.start(listener, "echo x")
        eventually(lambda: "redirect" in (home.callback(prog_id)["error"] or ""))
        listener.always = None
        delivered_exactly(listener, b"x\n")
        assert elsewhere.seen == []


def test_a_proxy_in_the_environment_is_not_asked(home, listener):
    with listening() as proxy:
        home.env.update(
            http_proxy=f"http://127.0.0.1:{proxy.port}",
            https_proxy=f"http://127.0.0.1:{proxy.port}",
        )
        home.start(listener, "echo x")
        delivered_exactly(listener, b"x\n")
        assert proxy.seen == []


def test_an_answer_that_drips_in_ends_with_the_deadline_of_the_whole_request(new_home, listener):
    home = new_home(REQUEST_S=0.5)
    listener.odd = [drip]
    home.start(listener, "echo x")
    delivered_exactly(listener, b"x\n")
    assert 0.5 <= listener.seen[1].at - listener.seen[0].at < 10


def test_a_name_server_that_never_answers_costs_a_courier_and_the_next_one_tries_again(
    new_home, listener
):
    home = new_home(REQUEST_S=0.3)
    # The library's call hangs here as in a resolver; no Python code can interrupt that.
    hang = (
        'import os as _os\nif not _os.path.exists("%s"):\n'
        "    socket.create_connection = lambda *_: time.sleep(60)\n" % (home.base / "dns")
    )
    text = (home.base / "courier.py").read_text()
    (home.base / "courier.py").write_text(text.replace("# ==", hang + "\n# ==", 1))
    prog_id = home.start(listener, "echo x")
    assert "no address for 127.0.0.1" in eventually(lambda: home.callback(prog_id)["error"])
    (home.base / "dns").touch()
    delivered_exactly(listener, b"x\n")


def test_a_collector_that_acknowledges_nothing_is_not_hammered(home, listener):
    listener.odd = [(200, {"Upload-Offset": "0"}, b"")] * 4 + [
        (409, {"Upload-Offset": "0"}, b"")
    ] * 4
    home.start(listener, "echo x")
    delivered_exactly(listener, b"x\n")
    assert listener.seen[8].at - listener.seen[0].at >= 0.05 + 0.1 + 0.2


def test_a_collector_restored_from_an_older_backup_gets_again_what_it_lost(home, listener, gate):
    home.start(listener, "seq 0 19999; read a < $HOME/gate; echo end")
    listener.wait(lambda each: len(each.output()) == len(TEXT))
    with listener.changed:
        del listener.held.streams["stdout"][1000:]
    gate.open()
    delivered_exactly(listener, TEXT.encode() + b"end\n")


def test_one_restored_after_the_last_byte_says_so_when_it_is_told_of_the_end(home, listener, gate):
    def restored(each: Listener, connection: Any) -> None:
        del each.held.streams["stdout"][7:]

    home.start(listener, "seq 0 19999; read a < $HOME/gate")
    listener.wait(lambda each: len(each.output()) == len(TEXT))
    listener.odd = [restored]
    gate.open()
    delivered_exactly(listener, TEXT.encode())


# ---------------------------------------------------------------- down, late, never


def test_a_collector_that_is_down_for_the_whole_run_gets_all_of_it_afterwards(home):
    with listening() as gone:
        port, url = gone.port, gone.url
    prog_id = home.start(url, "seq 0 19999")
    eventually(lambda: home.status(prog_id)["state"] == "exited")
    assert "refused" in eventually(lambda: home.callback(prog_id)["error"])
    with listening(port=port) as listener:
        delivered_exactly(listener, TEXT.encode())


def test_it_gives_up_some_time_after_the_end_and_says_so(home):
    with listening() as gone:
        url = gone.url
    prog_id = home.start(url, "echo x", config={"timeout": 1})
    found = eventually(lambda: (found := home.callback(prog_id))["over"] and found)
    assert "given up 1 s after the end" in found["error"]
    eventually(lambda: home.status(prog_id)["supervisor"] == "gone")


def test_gc_leaves_a_run_alone_until_its_end_is_acknowledged(home):
    with listening() as gone:
        port, url = gone.port, gone.url
    prog_id = home.start(url, "echo x", config={"timeout": 0})
    eventually(lambda: home.status(prog_id)["supervisor"] == "gone")
    assert home.ask("gc", older=0)["removed"] == []
    with listening(port=port) as listener:
        assert home.ask("deliver", prog_id=prog_id)["delivered"]["completed"]
        delivered_exactly(listener, b"x\n")
    assert home.ask("gc", older=0)["removed"] == [prog_id]


def test_a_run_whose_guards_are_all_killed_is_reported_lost(new_home, listener):
    home = new_home(LOOK_S=0.2)
    prog_id = home.start(listener, "echo x; sleep 60")
    listener.wait(lambda each: each.output() == b"x\n")
    state = home.status(prog_id)
    for pid in [*state["standby_pids"], state["agent_pid"]]:
        os.kill(pid, signal.SIGKILL)
    assert completed(listener)["state"] == "lost"


# ---------------------------------------------------------------- by hand


def test_deliver_sends_all_of_it_again_to_another_collector(home, listener):
    prog_id = home.start(listener, "seq 0 19999")
    delivered_exactly(listener, TEXT.encode())
    with listening(token="other") as other:
        found = home.ask(
            "deliver", prog_id=prog_id, callback={"url": other.url, "token": "other"}, **{"from": 0}
        )
        assert found["delivered"]["error"] is None
        delivered_exactly(other, TEXT.encode())


def test_deliver_has_a_courier_that_waits_try_now(new_home):
    home = new_home(BACKOFF_MAX_S=3600.0)
    with listening() as gone:
        port, url = gone.port, gone.url
    prog_id = home.start(url, "echo x", config={"retry_frequency": 3600})
    eventually(lambda: home.callback(prog_id)["error"])
    with listening(port=port) as listener:
        assert home.ask("deliver", prog_id=prog_id)["delivered"]["completed"]
        delivered_exactly(listener, b"x\n")


@pytest.mark.storm
def test_no_order_to_try_now_is_swallowed_however_early_it_comes(new_home, listener):
    """USR1 at each system call: the courier tries after it; or it dies, and the keeper starts it
    again.
    """
    home = new_home(BACKOFF_MAX_S=3600.0)
    prog_id = home.start(listener, "echo x")
    delivered_exactly(listener, b"x\n")
    eventually(lambda: home.status(prog_id)["supervisor"] == "gone")
    (home.directory(prog_id) / "token").write_text(TOKEN)
    listener.always = (503, {"Retry-After": "3600"}, b"")
    argv = [home.python, "-ISE", str(home.base / "courier.py"), str(home.directory(prog_id))]

    def poked(point: int) -> Signalled:
        # A courier that has forgotten what it has delivered, and waits for an hour after one try.
        (home.directory(prog_id) / "courier.json").write_bytes(b" " * agent.PAGE)
        listener.seen.clear()
        return signalled(argv, signal.SIGUSR1, point, deadline_s=2.5)

    untouched = poked(1 << 30)
    assert listener.statuses() == [503] and untouched.code == -signal.SIGKILL
    stride = max(1, untouched.stops // 2 // POINTS)
    wrong = []
    # The second half is the courier itself, behind the start of Python.
    for point in range(untouched.stops // 2 + SEED % stride, untouched.stops, stride):
        found = poked(point)
        tried = any(each.at > found.sent_at for each in listener.seen)
        if found.was_sent and not tried and found.code != -signal.SIGUSR1:
            wrong.append((point, found, listener.seen))
    assert wrong == [], SEED


def test_deliver_says_why_it_could_not(home):
    with listening(token="another") as listener:
        prog_id = home.start(listener, "echo x", config={"timeout": 0})
        eventually(lambda: home.status(prog_id)["supervisor"] == "gone")
        assert home.ask("deliver", prog_id=prog_id)["delivered"]["error"].startswith("401")


def test_what_gc_has_removed_is_sent_to_nobody_and_deliver_says_so(home, listener):
    prog_id = home.start(listener, "seq 0 19999")
    delivered_exactly(listener, TEXT.encode())
    eventually(lambda: home.status(prog_id)["supervisor"] == "gone")
    assert home.ask("gc", older=0)["removed"] == [prog_id]
    with listening() as other:
        callback = {"url": other.url, "token": TOKEN}
        refused = home.ask("deliver", prog_id=prog_id, callback=callback, **{"from": 0})
        assert (refused["error"], refused["message"]) == (
            "removed",
            f"its output was removed on {time.strftime('%Y-%m-%d', time.gmtime())}",
        )
        assert not other.held.completed and not other.held.gaps


@pytest.mark.parametrize("gone", ["before a byte was sent", "while it was being sent"])
def test_what_a_bound_has_taken_before_it_was_acknowledged_is_a_gap_and_holds_nobody_up(
    home, gate, gone
):
    with listening() as listener:
        port, url = listener.port, listener.url
        sent = gone != "before a byte was sent"
        prog_id = home.start(
            url,
            "echo 0; read a < $HOME/gate; seq 1 99999; read a < $HOME/gate; echo end",
            run={"keep_output": 65536},
        )
        if sent:
            listener.wait(lambda each: each.output() == b"0\n")
    gate.open()
    eventually(lambda: home.status(prog_id)["streams"]["stdout"]["dropped"])
    with listening(port=port) as listener:
        gate.open()
        listener.wait(lambda each: each.held.completed)
        whole = b"".join(b"%d\n" % number for number in range(100_000)) + b"end\n"
        (name, begin, end), *more = listener.held.gaps
        assert (name, begin, more) == ("stdout", 0, [])
        assert listener.output()[end:] == whole[end:] and len(whole) - end >= 65536
        assert listener.held.completed[0]["streams"]["stdout"]["length"] == len(whole)
        assert home.callback(prog_id)["error"] is None


# ---------------------------------------------------------------- TLS and secrets


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.mark.parametrize("how", ["file", "text"])
@pytest.mark.parametrize("python", [machine.pythons()[0], sys.executable], ids=machine.name)
def test_a_private_authority_is_trusted_where_it_is_named(new_home, authority, how, python):
    home = new_home(python)
    with listening(tls=authority.context()) as listener:
        home.start(
            listener, "seq 0 19999", ca=str(authority.file) if how == "file" else authority.pem
        )
        delivered_exactly(listener, TEXT.encode())


@pytest.mark.parametrize(
    "wrong", ["unknown authority", "another authority", "another name", "expired"]
)
def test_a_certificate_that_proves_nothing_gets_neither_output_nor_token(
    home, authority, tmp_path, wrong
):
    other = Authority(tmp_path, "another authority")
    host, days = (
        ("elsewhere.example", 9)
        if wrong == "another name"
        else ("127.0.0.1", -1 if wrong == "expired" else 9)
    )
    ca = {"unknown authority": None, "another authority": other.pem}.get(wrong, authority.pem)
    with listening(tls=authority.context(host, days=days)) as listener:
        prog_id = home.start(listener, "echo x", **({"ca": ca} if ca else {}))
        error = eventually(lambda: home.callback(prog_id)["error"])
        assert error.startswith("TLS: ") or "match" in error
        assert listener.seen == []


def test_the_token_is_in_no_argv_no_environment_no_state_and_goes_when_all_is_delivered(
    home, listener, gate
):
    prog_id = home.start(listener, "env; read a < $HOME/gate")
    listener.wait(lambda each: each.output())
    pid = eventually(lambda: home.courier(prog_id))
    for each in [pid, *agent.process_tree([os.getpid()])]:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            assert TOKEN.encode() not in Path(f"/proc/{each}/cmdline").read_bytes()
            assert TOKEN.encode() not in Path(f"/proc/{each}/environ").read_bytes()
    holders = [
        path.name
        for path in home.directory(prog_id).iterdir()
        if path.is_file() and TOKEN in path.read_text(errors="replace")
    ]
    assert holders == ["token"]
    assert (home.directory(prog_id) / "token").stat().st_mode & 0o777 == 0o600
    gate.open()
    assert TOKEN not in json.dumps(completed(listener))
    assert TOKEN.encode() not in listener.output()
    eventually(lambda: not (home.directory(prog_id) / "token").exists())


# ---------------------------------------------------------------- kills


def test_a_killed_courier_is_followed_by_another_that_goes_on_where_it_was(home, listener, gate):
    prog_id = home.start(
        listener, "seq 0 9999; read a < $HOME/gate; seq 10000 19999; read a < $HOME/gate"
    )
    killed = set()
    for expected in (48_890, len(TEXT)):
        listener.wait(lambda each, expected=expected: len(each.output()) == expected)
        pid = eventually(lambda: home.courier(prog_id))
        assert pid not in killed
        killed.add(pid)
        os.kill(pid, signal.SIGKILL)
        reap(set())
        gate.open()
    delivered_exactly(listener, TEXT.encode())


def test_a_new_keeper_takes_the_courier_over(home, listener, gate):
    prog_id = home.start(
        listener, "echo one; read a < $HOME/gate; echo two; read a < $HOME/gate; echo three"
    )
    listener.wait(lambda each: each.output() == b"one\n")
    first = home.courier(prog_id)
    os.kill(home.status(prog_id)["agent_pid"], signal.SIGKILL)
    gate.open()
    listener.wait(lambda each: each.output() == b"one\ntwo\n")
    assert home.courier(prog_id) == first
    os.kill(first, signal.SIGKILL)
    eventually(lambda: home.courier(prog_id) not in (0, first))
    gate.open()
    delivered_exactly(listener, b"one\ntwo\nthree\n")


def test_kill_spares_the_courier(home, listener):
    prog_id = home.start(listener, "echo x; sleep 600 & sleep 600")
    listener.wait(lambda each: each.output() == b"x\n")
    first = home.courier(prog_id)
    done = home.ask("stop", prog_id=prog_id, grace=0)
    assert done["processes"] == 3  # the shell and its two children
    assert completed(listener)["reason"] == "killed"
    assert home.status(prog_id)["stragglers"] == []
    assert first
