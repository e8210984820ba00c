"""Whether a host has all that corra needs: a Check for each thing, in the order a start needs it.

The host tells facts (doctor.py); the pure function `judge` decides what they mean. A PROBLEM keeps
programs from being started or loses their output. A note is worth knowing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from corra.errors import Auth, CorraError, HostKey, NoPython, typed
from corra.model.refusals import refusal_error
from corra.model.units import decimal_size, duration
from corra.on_host.agent.contract import VERSION
from corra.transport import host_keys
from corra.transport.default import DefaultLink
from corra.transport.openssh import OpenSSH

from .agent_client import Agent
from .chaperone import Chaperone
from .exchange import ANSWER_S, LOGIN_ENDED, Refused
from .login_files import LOGIN_FILE
from .targets import agent_to_ask

OK: Final = "ok"
NOTE: Final = "note"
PROBLEM: Final = "PROBLEM"
# What a start needs: three guards, the program, and some for what that starts.
PROCESSES = 8
INODES = 1000
# More than an answer takes to arrive, and less than would confuse a reader of logs.
CLOCK_S = 5.0
FILES = 64


@dataclass(frozen=True)
class Check:
    """One thing that was looked at; `hint` says what to do about it."""

    name: str
    verdict: Literal["ok", "note", "PROBLEM"]
    what: str
    hint: Sequence[str] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "what": self.what,
            "hint": list(self.hint),
        }


def examine_host(
    target: Any, *, place: bool = False, spool: str | None = None, **reach: Any
) -> list[Check]:
    """Return the Checks of a host, as far as it can be reached; `place` brings the agent there too.

    Raises Misuse.
    """
    agent = agent_to_ask(target, **reach)
    there = {"spool": spool} if spool else {}
    try:
        if isinstance(agent, Chaperone):
            agent.probe()
        link = agent.visit("examine", {**there, "digest": agent.digest}, timeout_s=ANSWER_S)
        heard = time.time()
        link.close()
    except Refused as refusal:
        return _stopped(agent, refusal)
    except (CorraError, ConnectionError, TimeoutError) as error:
        return _stopped(agent, error)
    kept = (
        [Check("chaperone", OK, "lets us in; the rest is this machine, which keeps runs")]
        if isinstance(agent, Chaperone)
        else []
    )
    found = [*_way(agent), *kept, *judge(link.reply, heard)]
    return [*found, _placed(agent, there)] if place else found


def _way(agent: Agent) -> list[Check]:
    """Return the Checks of the way to a host that has answered."""
    runner = agent.far if isinstance(agent, Chaperone) else agent.runner
    sudo = [Check("sudo", OK, f"runs as {runner.host.user}")] if runner.host.user else []
    if not isinstance(runner, (DefaultLink, OpenSSH)):
        return [Check("ssh", OK, "not needed: this is the machine itself"), *sudo]
    known = runner.settings
    way = (
        f" by way of {known.proxy_jump}"
        if known.proxy_jump
        else " by a ProxyCommand"
        if known.proxy_command
        else ""
    )
    remark = f", {agent.remark}" if agent.remark else ""
    lines = [] if known.proxy_jump or known.proxy_command else host_keys.lines_about(known)
    key = Check(
        "host key",
        OK,
        f"as in {_short(lines[0].file)} line {lines[0].line}" if lines else "accepted",
    )
    if known.strict == "no":
        key = Check(
            "host key",
            NOTE,
            "unchecked where it is new: StrictHostKeyChecking no",
            ["accept-new is as easy, and refuses a changed one"],
        )
    return [
        Check("ssh", OK, f"{known.hostname} port {known.port}{way}{remark}"),
        key,
        Check("login", OK, f"as {runner.login}"),
        *sudo,
    ]


def _short(path: str) -> str:
    return path.rpartition("/")[2]


def _stopped(agent: Agent, error: Exception) -> list[Check]:
    """Return the Checks up to the one that failed with `error`."""
    try:
        way = _way(agent)
    except CorraError:  # ssh_config can't be read, which is what `error` says
        way = []
    if isinstance(error, HostKey):
        at = "host key"
    elif isinstance(error, Auth):
        at = "sudo" if "sudo" in error.why or error.why.startswith("no user ") else "login"
    elif isinstance(error, (NoPython, Refused)):
        at = "python"
    elif isinstance(error, CorraError) and (
        error.kind == LOGIN_FILE or error.why.startswith(LOGIN_ENDED)
    ):
        at = "shell"
    else:
        at = "ssh"
    before = [check.name for check in way]
    # Behind a sudo here that refuses, nothing was tried.
    untried = at == "ssh" or (isinstance(error, Auth) and error.here)
    passed = [] if untried else way[: before.index(at)] if at in before else way
    why, hint = (
        (error.why, error.hint)
        if isinstance(error, CorraError)
        else (str(error) or "no answer", ())
    )
    return [*passed, Check(at, PROBLEM, why, hint)]


def _placed(agent: Agent, there: Mapping[str, Any]) -> Check:
    try:
        link = agent.stream("list", there, timeout_s=ANSWER_S)
    except Refused as refusal:
        error = refusal_error(refusal.kind, refusal.facts, host=agent.host, verb="list")
        return Check("placed", PROBLEM, error.why, error.hint)
    except (CorraError, ConnectionError, TimeoutError) as error:
        return Check("placed", PROBLEM, error.why if isinstance(error, CorraError) else str(error))
    link.close()
    return Check(
        "placed",
        OK,
        f"agent {VERSION}, {decimal_size(link.placed)}"
        if link.placed
        else f"agent {VERSION} had come before",
    )


def judge(facts: Mapping[str, Any], heard: float) -> list[Check]:
    """Return the Checks that the host's facts make; `heard` is our own time when they came."""
    return [
        Check("python", OK, f"{facts['python']}, {facts['executable']}"),
        _cache(facts["cache"]),
        *_spool(facts["spool"]),
        _logout(facts["logout"]),
        _clock(float(facts["time"]) - heard),
        *_limits(facts),
    ]


def _cache(places: Sequence[Mapping[str, Any]]) -> Check:
    there = next((each for each in places if each["agent"]), None)
    if there:
        return Check("agent", OK, f"{VERSION} is there, in {there['dir']}")
    usable = next((each for each in places if not each.get("problem") and _has_room(each)), None)
    if usable:
        return Check("agent", OK, f"will come with the first run, to {usable['dir']}")
    tried = [f"{each['dir']}: {each.get('problem') or 'disk full'}" for each in places]
    return Check(
        "agent",
        PROBLEM,
        "no directory can hold it",
        [*tried, "free 1 MB there, or make one of them yours and writable"],
    )


def _has_room(place: Mapping[str, Any]) -> bool:
    return place["free"] > 1 << 20 and place.get("inodes") not in range(8)


def _spool(places: Sequence[Mapping[str, Any]]) -> list[Check]:
    usable = next((each for each in places if not each.get("problem")), None)
    if usable is None:
        tried = [f"{each['dir']}: {each.get('problem')}" for each in places]
        return [
            Check(
                "spool",
                PROBLEM,
                "no directory can hold a run's output",
                [*tried, "--spool DIR names another one"],
            )
        ]
    passed_over = [
        f"{each['dir']}: {each.get('problem')}" for each in places[: places.index(usable)]
    ]
    spool = Check(
        "spool", NOTE if passed_over else OK, usable["dir"], [f"not {each}" for each in passed_over]
    )
    free, floor = usable["free"], usable["floor"]
    if free <= floor:
        what = f"{decimal_size(free)} free, and the last {decimal_size(floor)} are left to others"
        return [
            spool,
            Check(
                "disk",
                PROBLEM,
                what,
                [f"programs are held back: {typed()} gc, free some, or --spool DIR"],
            ),
        ]
    if (inodes := usable.get("inodes")) is not None and inodes < INODES:
        return [
            spool,
            Check(
                "disk",
                PROBLEM,
                f"{usable.get('inodes')} files more, then it is full",
                ["a run takes 12; remove some, or --spool DIR"],
            ),
        ]
    low = free < 2 * floor
    hint = (
        [f"below {decimal_size(floor)} programs are held back: {typed()} gc, or free some"]
        if low
        else []
    )
    return [
        spool,
        Check(
            "disk",
            NOTE if low else OK,
            f"{decimal_size(free)} free of {decimal_size(usable['size'])}",
            hint,
        ),
    ]


def _logout(facts: Mapping[str, Any]) -> Check:
    if not facts["ends"]:
        return Check(
            "logout",
            OK,
            "ends nothing: each run gets a scope of its own"
            if facts.get("scope")
            else "ends nothing",
        )
    user = facts.get("user") or "USER"
    return Check(
        "logout",
        PROBLEM,
        f"logind ends programs, linger is off for {user}",
        [f"once, as root there:  loginctl enable-linger {user}"],
    )


def _clock(ahead_s: float) -> Check:
    if abs(ahead_s) < CLOCK_S:
        return Check("clock", OK, "as here")
    way = "ahead of" if ahead_s > 0 else "behind"
    return Check(
        "clock",
        NOTE,
        f"{duration(abs(ahead_s))} {way} ours",
        ["durations stay right, times of day and --since don't: timedatectl there"],
    )


def _limits(facts: Mapping[str, Any]) -> list[Check]:
    found = []
    for each in facts["processes"]:
        if each["most"] - each["now"] < PROCESSES:
            what = f"{each['now']} of {each['most']} processes ({each['of']})"
            found.append(
                Check(
                    "limits",
                    PROBLEM,
                    what,
                    ["a run needs four besides what it starts: raise it, or end some"],
                )
            )
    if facts.get("file_size") is not None:
        what = f"files of at most {decimal_size(facts['file_size'])} (ulimit -f)"
        found.append(
            Check(
                "limits", PROBLEM, what, ["output beyond that has no room: raise it in limits.conf"]
            )
        )
    if (files := facts.get("files")) is not None and files < FILES:
        found.append(
            Check(
                "limits",
                PROBLEM,
                f"{facts.get('files')} open files (ulimit -n)",
                [f"at least {FILES} are needed"],
            )
        )
    if found:
        return found
    counts = ", ".join(
        f"{each['now']} of {each['most']} processes" for each in facts["processes"][:1]
    )
    return [Check("limits", OK, counts or "none that matter")]


def check_lines(host: str, checks: Sequence[Check], *, bad_only: bool = False) -> list[str]:
    """Return the lines for one host: one for each Check, with its hints below it."""
    problems = sum(check.verdict == PROBLEM for check in checks)
    count = f"{problems} problem" + "s" * (problems > 1)
    shown = [f"{host}: {f'NOT READY: {count}' if problems else 'ready'}"]
    for check in checks:
        if not bad_only or check.verdict == PROBLEM:
            shown.append(f"  {check.verdict:<8} {check.name:<9} {check.what}")
            shown += [f"    {each}" for each in check.hint]
    return shown


def all_passed(checks: Sequence[Check]) -> bool:
    return all(check.verdict != PROBLEM for check in checks)
