"""A fleet in Python: what happens are values, and nothing of the process is touched."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Cli, home_environment

import corra
from corra.fleets.told import HELD_MAX, Line
from fleet_hosts import lines, mark, waiting
from proxy import wait_for

Many = Callable[[int], str]
Latch = Callable[[int], None]


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch, home: Path) -> Callable[[], None]:
    """Return a function that makes this process another machine: with a home that knows nothing."""
    made = iter(range(1000))

    def move() -> None:
        new = home / f"elsewhere{next(made)}"
        new.mkdir()
        for name, value in home_environment(new).items():
            monkeypatch.setenv(name, value)

    return move


def broken_off(fleet: corra.Fleet, ran: Path, count: int) -> None:
    """Roll until so many programs run, and leave."""
    running = 0
    for event in fleet.follow():
        running += isinstance(event, corra.Standing) and event.what == "running"
        if running == count:
            wait_for(lambda: lines(ran) == count)
            break


def test_what_happens_comes_as_values_and_nothing_is_printed(
    web_hosts: Many, ran: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with corra.fleet(web_hosts(3), mark(ran, "echo hi; exit 3"), name="up") as fleet:
        assert lines(ran) == 0  # nothing before the roll
        rolling = fleet.follow()
        events = []
        for event in rolling:
            events.append(event)
            assert {n: signal.getsignal(n) for n in handlers} == handlers
    written = {each.member: each.data for each in events if isinstance(each, corra.Wrote)}
    assert written == dict.fromkeys(("web1", "web2", "web3"), b"hi\n")
    seen = [each.what for each in events if isinstance(each, corra.Standing)]
    assert (seen.count("connecting"), seen.count("failed")) == (3, 3)
    result = rolling.result
    assert (result.ok, result.code, result.fate, result.why) == (
        False,
        3,
        "FAILED",
        "3 of 3 failed: web[1-3]",
    )
    assert result.failed == ("web1", "web2", "web3") == tuple(result.members)
    last = result.members["web2"]
    assert (last.host, last.over, last.fate, last.code) == ("web2", True, "FAILED 3", 3)
    assert last.state is not None and last.state.return_code == 3
    assert lines(ran) == 3
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_the_threshold_stops_it_and_again_goes_on(web_hosts: Many, ran: Path, home: Path) -> None:
    bad = home / "bad"
    bad.touch()
    command = mark(ran, f"test ! -e {bad}")
    with corra.fleet(web_hosts(4), command, batch=1, max_fail=1) as fleet:
        stopped = fleet.roll()
        assert (stopped.fate, stopped.code) == ("STOPPED in wave 2 of 4", 1)
        assert (stopped.failed, stopped.not_started) == (("web1", "web2"), ("web3", "web4"))
        bad.unlink()
        plan = fleet.again(only="failed")
        assert plan is not None and (plan.attempt, plan.members) == (2, ("web1", "web2"))
        assert lines(ran) == 2
        assert fleet.roll().done == ("web1", "web2")
        assert fleet.again() is not None
        assert fleet.roll().ok
        assert fleet.again() is None
        assert fleet.state().done == ("web1", "web2", "web3", "web4")
    assert lines(ran) == 6


def test_one_host_is_enough_to_go_on_where_nobody_heard_of_it(
    web_hosts: Many, ran: Path, latch: Latch, moved: Callable[[], None]
) -> None:
    with corra.fleet(web_hosts(4), waiting(ran), id="up-1", at_once=2) as fleet:
        broken_off(fleet, ran, 2)
    moved()
    with pytest.raises(corra.NotFound):
        corra.attach_fleet("up-1")
    latch(4)
    with corra.attach_fleet("up-1", "web2") as found:
        assert found.roll().ok
    assert lines(ran) == 4
    # From then on its id is enough.
    assert corra.attach_fleet("up-1").state().done == ("web1", "web2", "web3", "web4")


def test_a_look_at_a_fleet_from_elsewhere_is_enough_to_go_on_by_its_id(
    web_hosts: Many, ran: Path, latch: Latch, moved: Callable[[], None]
) -> None:
    with corra.fleet(web_hosts(4), waiting(ran), id="up-1", at_once=2) as fleet:
        broken_off(fleet, ran, 2)
    latch(4)
    moved()
    corra.attach_fleet("up-1", "web1").close()
    with corra.attach_fleet("up-1") as found:
        looked = found.wait()
        assert (len(looked.done), len(looked.not_started)) == (2, 2)
        assert looked.fate == "STOPPED"
        assert found.roll().ok
    assert lines(ran) == 4


def test_wait_starts_nothing_and_says_what_still_runs(
    web_hosts: Many, ran: Path, latch: Latch
) -> None:
    with corra.fleet(web_hosts(3), waiting(ran), at_once=2) as fleet:
        broken_off(fleet, ran, 2)
        with pytest.raises(corra.StillRunning, match=r"2 of 3 hosts running, 1 not started$"):
            fleet.wait(timeout=0.5)
        assert lines(ran) == 2
        latch(2)
        result = fleet.wait()
        assert (len(result.done), result.not_started) == (2, ("web3",))
        assert result.code == 125
    assert lines(ran) == 2


def test_a_fleet_is_killed_while_it_rolls(web_hosts: Many, ran: Path, latch: Latch) -> None:
    with corra.fleet(web_hosts(3), waiting(ran), batch=1) as fleet:
        killed = None
        rolling = fleet.follow()
        for event in rolling:
            if isinstance(event, corra.Standing) and event.what == "running":
                killed = fleet.kill(grace=0)
        assert killed is not None
        assert (killed.ended, killed.never_started) == (("web1",), ("web2", "web3"))
        assert not killed.unknown
        assert rolling.result.fate.startswith("STOPPED")
    latch(3)
    assert lines(ran) == 1


def test_a_kill_reaches_runs_of_earlier_attempts(
    web_hosts: Many, ran: Path, latch: Latch, home: Path
) -> None:
    web_hosts(2)
    command = ["sh", "-c", f"echo once >> {ran}; mkdir {home}/first || exit 1; exec sleep 1000"]
    with corra.fleet("web[1-2]", command) as fleet:
        for event in fleet.follow():
            if isinstance(event, corra.Standing) and event.what == "failed":
                break
        plan = fleet.again()
        assert plan is not None and len(plan.members) == 1
        fleet.roll()
        killed = fleet.kill(grace=0)
        assert set(killed.ended) == {"web1", "web2"} - set(plan.members)
        assert not fleet.state().running


def test_a_kill_reaches_an_attempt_that_another_machine_has_begun(
    web_hosts: Many, ran: Path, latch: Latch, moved: Callable[[], None]
) -> None:
    with corra.fleet(web_hosts(4), waiting(ran), id="up-1", at_once=1) as fleet:
        broken_off(fleet, ran, 1)
        moved()
        with corra.attach_fleet("up-1", "web1") as found:
            assert found.again(only="not-started") is not None
            for event in found.follow():
                if isinstance(event, corra.Standing) and event.what == "running":
                    break
            wait_for(lambda: lines(ran) == 2)
            killed = fleet.kill(grace=0)
            assert fleet.plan.attempt == 2
            assert (len(killed.ended), len(killed.never_started)) == (2, 2)
            latch(4)
            assert "stopped by" in found.roll().why
            assert len(found.state().failed) == 2
    assert lines(ran) == 2


def test_what_was_written_is_read_from_the_last_attempt_of_each_host(
    web_hosts: Many, home: Path
) -> None:
    first_fails = f"mkdir {home}/tried 2>/dev/null && code=1 || code=0; echo $$; exit $code"
    command = ["sh", "-c", first_fails]
    with corra.fleet(web_hosts(3), command, at_once=1) as fleet:
        first = fleet.roll()
        assert first.failed
        fleet.again()
        fleet.roll()
        read = list(fleet.logs())
        wrote = {each.member: each.data for each in read if isinstance(each, corra.Wrote)}
        assert set(wrote) == {"web1", "web2", "web3"} and len(read) == 3
        state = fleet.state()
        assert {state.members[name].attempt for name in first.failed} == {2}
        assert {state.members[name].attempt for name in first.done} == {1}


def test_without_a_yes_it_ends_between_waves_and_the_next_roll_goes_on(
    web_hosts: Many, ran: Path
) -> None:
    asked: list[str] = []

    def yes(question: str) -> bool:
        asked.append(question)
        return True

    with corra.fleet(web_hosts(2), mark(ran), batch=1, confirm=True) as fleet:
        paused = fleet.roll()
        assert (paused.fate, lines(ran)) == ("PAUSED before wave 2 of 2", 1)
        assert fleet.roll(confirm=yes).ok
    assert len(asked) == 1 and lines(ran) == 2


def test_a_host_that_doesnt_answer_is_asked_again_before_it_would_run_twice(
    web_hosts: Many, home: Path, ran: Path, latch: Latch, moved: Callable[[], None]
) -> None:
    web_hosts(3)
    with corra.fleet("web[1-3]", waiting(ran), id="up-1") as fleet:
        broken_off(fleet, ran, 3)
    config = home / ".ssh" / "config"
    whole = config.read_text()
    config.write_text("Host web2 web3\n  ProxyCommand false\n" + whole)
    moved()
    with corra.attach_fleet("up-1", "web1") as found:
        state = found.state()
        assert (state.unknown, state.fate, state.unreached) == (("web2", "web3"), "UNKNOWN", ())
        plan = found.again()
        assert plan is not None and plan.members == ("web2", "web3")
        assert found.roll().unreached == ("web2", "web3")
        config.write_text(whole)
        plan = found.again(only="unreached")
        assert plan is None  # now they answer: both still run
        config.write_text("Host web2 web3\n  ProxyCommand false\n" + whole)
        assert found.again() is not None
        config.write_text(whole)
        rolling = found.follow()
        for event in rolling:
            if isinstance(event, corra.Standing) and event.what == "running":
                latch(3)  # what runs there is watched, and nothing else is started
        assert rolling.result.done == ("web2", "web3")
        wait_for(lambda: found.state().ok)
    assert lines(ran) == 3


def test_a_roller_that_knows_an_earlier_attempt_only_starts_nothing_a_second_time(
    web_hosts: Many, ran: Path, home: Path, latch: Latch, moved: Callable[[], None]
) -> None:
    with corra.fleet(web_hosts(4), waiting(ran), id="up-1", at_once=1) as fleet:
        broken_off(fleet, ran, 1)
        latch(4)
        moved()
        with corra.attach_fleet("up-1", "web1") as found:
            assert found.again(only="not-started") is not None
            assert found.roll().ok
        assert lines(ran) == 4
        stale = fleet.roll()
        assert "begun once more by" in stale.why
    assert lines(ran) == 4


def test_what_a_stale_roller_has_started_meanwhile_is_not_started_again(
    web_hosts: Many, ran: Path, latch: Latch, moved: Callable[[], None]
) -> None:
    with corra.fleet(web_hosts(3), waiting(ran), id="up-1", at_once=1) as fleet:
        broken_off(fleet, ran, 1)
        latch(3)
        moved()
        with corra.attach_fleet("up-1", "web1") as found:
            plan = found.again()
            assert plan is not None and len(plan.members) == 2
            assert fleet.roll().ok  # between the plan and its roll
            result = found.roll()
            assert result.ok and {each.attempt for each in result.members.values()} == {1}
    assert lines(ran) == 3


def test_the_way_to_the_hosts_is_remembered(web_hosts: Many) -> None:
    with corra.fleet(web_hosts(2), ["true"], id="up-1", via="openssh") as fleet:
        assert fleet.roll().ok
    with corra.attach_fleet("up-1") as found:
        assert found.way_to("web2") == "--host web2 --via openssh"
        assert found.state().ok


def test_another_corras_agent_is_said(web_hosts: Many, ran: Path, cli: Cli, latch: Latch) -> None:
    from dataclasses import replace

    with corra.fleet(web_hosts(2), waiting(ran), batch=1) as fleet:
        fleet.plans[0] = replace(fleet.plan, agent="0" * 64)
        broken_off(fleet, ran, 1)
        latch(2)
        said = [each.text for each in fleet.follow() if isinstance(each, corra.Said)]
    assert any("begun by another corra, whose agent is 00000000;" in each for each in said)
    assert lines(ran) == 2


def test_a_secret_and_a_stdin_go_to_all(web_hosts: Many, home: Path) -> None:
    command = ["sh", "-c", 'test "$TOKEN" = s3cret && cat']
    with corra.fleet(
        web_hosts(2), command, secrets={"TOKEN": "s3cret"}, stdin=b"given once\n"
    ) as fleet:
        heard: list[corra.FleetEvent] = []
        assert fleet.roll(watch=heard.append).ok
    wrote = {each.member: each.data for each in heard if isinstance(each, corra.Wrote)}
    assert wrote == {"web1": b"given once\n", "web2": b"given once\n"}


def test_closing_ends_the_events_and_leaves_the_programs(
    web_hosts: Many, ran: Path, latch: Latch
) -> None:
    with corra.fleet(web_hosts(2), waiting(ran)) as fleet:
        rolling = fleet.follow()
        taker = threading.Thread(target=lambda: list(rolling), daemon=True)
        taker.start()
        wait_for(lambda: lines(ran) == 2)
        rolling.close()
        taker.join(30)
        assert not taker.is_alive()
        with pytest.raises(RuntimeError):
            next(iter(rolling))
        latch(2)
        assert fleet.wait().ok


def test_a_lease_is_given_back_though_the_process_lives_on(
    web_hosts: Many, cli: Cli, ran: Path, latch: Latch
) -> None:
    with corra.fleet(web_hosts(2), waiting(ran), id="up-1", batch=1) as fleet:
        broken_off(fleet, ran, 1)
        latch(2)
        done = cli("attach", "up-1")
        assert (done.returncode, lines(ran)) == (0, 2)
        assert b"watching" not in done.stderr


def test_output_waits_for_a_slow_taker_and_isnt_gathered() -> None:
    line: Line[int] = Line()
    laid: list[int] = []

    def lay() -> None:
        for number in range(4):
            line.put(number, HELD_MAX // 2)
            laid.append(number)
        line.finish()

    thread = threading.Thread(target=lay, daemon=True)
    thread.start()
    wait_for(lambda: len(laid) == 2)
    thread.join(0.2)
    assert thread.is_alive() and laid == [0, 1]
    assert [line.take() for _ in range(5)] == [0, 1, 2, 3, None]


def test_what_makes_no_sense_is_refused_before_anything_is_asked() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'bach'"):
        corra.fleet("web[1-2]", ["true"], bach=1)  # type: ignore[call-arg]
    with pytest.raises(corra.Misuse, match="not the size of a wave"):
        corra.fleet("web[1-2]", ["true"], batch="x%")
    with pytest.raises(corra.Misuse, match="can't be held open"):
        corra.fleet("web[1-2]", ["cat"], stdin=corra.OPEN)
    with pytest.raises(corra.Misuse, match="waves need somebody to stay"):
        corra.fleet("web[1-2]", ["true"], batch=1).follow(stay=False)
    assert not os.path.exists(os.path.expanduser("~/.local/state/corra/books/fleet"))
