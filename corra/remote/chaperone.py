"""The chaperone: a program on a host where nothing can be placed, kept by the agent of this machine, or of another one that stays up.

For whoever asks it is the agent of that host. In truth each request goes to the agent of the keeper, whose program is a carrier (tether.py):
an ssh that stays for as long as the program runs. Id, spool, state, signals and time limits are those of any run of the keeper; what is
different is said once, when a run is started. If the keeper's link breaks, the run is lost, and the program there may well go on.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from corra.errors import CorraError, Misuse, NotStarted, Unreachable
from corra.model import ids
from corra.model.frames import Parser, Status
from corra.model.host import LOCAL, Host
from corra.model.shapes import Object
from corra.on_host import tether
from corra.on_host.agent.contract import FINAL
from corra.transport import sudo
from corra.transport.channel import LinkLost, first_line
from corra.transport.choose import choose_runner
from corra.transport.command import shell
from corra.transport.local import Local
from corra.transport.openssh import SSH_FAILED, Elsewhere, OpenSSH

from .agent_client import Agent
from .bootstrap import with_python
from .exchange import Link, Refused

# On another machine nothing is placed for it: its source is a word. What isn't carried has no exit status.
_THERE = with_python('"$0" "$@"') + "kill -9 $$"
_READY = b"corra-far ready\n"
# A login that is slow to begin, beyond the time for the connection.
_LOGIN_S = 30.0
# A ControlMaster would outlive the run, or end it; and a chaperone's ssh must notice by itself that its host is gone.
_SSH = ("-oControlMaster=no", "-oControlPath=none", "-oServerAliveCountMax=3")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What only a start says; the rest of its request is about following.
_STARTING = frozenset({"program", "name", "origin", "run", "secrets", "callback", "config"})


class Chaperone(Agent):
    """The agent of the keeper, as if it were the one of `host`."""

    def __init__(self, host: Host, keeper: str = LOCAL, **how: Any) -> None:
        """`how` is what OpenSSH takes. Raises Misuse."""
        if host.is_local:
            raise Misuse("the chaperone is for other hosts: local needs none", host=host.name)
        at = Host.parse(keeper)
        if at.is_local:
            super().__init__(Local(at))
            self._far, self._python = (
                OpenSSH(host, **how),
                [sys.executable, "-ISE", tether.__file__],
            )
        else:
            # The password is for the sudo on the way from there on.
            super().__init__(
                choose_runner(
                    at, **{name: value for name, value in how.items() if name != "password"}
                )
            )
            self._far, self._python = (
                Elsewhere(host, self._runner, **how),
                [*shell(_THERE), Path(tether.__file__).read_text(encoding="utf-8")],
            )
        self._link = str(host) + (f" as {host.as_user}" if host.as_user else "")
        self._mine: set[str] = set()

    @property
    def host(self) -> Host:
        return self._far.host

    @property
    def far(self) -> OpenSSH:
        """What leads to the host itself."""
        return self._far

    @property
    def user(self) -> str:
        return self.host.user or self._far.login

    def beside(self, source: bytes, replies: Mapping[str, Object]) -> Agent:
        """Return another file for the host itself: what is asked of it by its own Python can't be asked here."""
        return Agent(self._far, source, replies)

    def stream(
        self,
        verb: str,
        request: Mapping[str, Any],
        *,
        payload: BinaryIO | None = None,
        timeout_s: float = 15.0,
        sending: Callable[[], None] | None = None,
    ) -> Link:
        if verb in ("start", "run"):
            return self._start(verb, request, payload, timeout_s, sending)
        whole = dict(request)
        if "prog_id" in whole:
            whole["prog_id"] = self._meant(whole, timeout_s)
        link = super().stream(verb, whole, timeout_s=timeout_s, sending=sending)
        if verb == "list":
            link.reply["runs"] = [
                self._told(run)
                for run in link.reply.get("runs", ())
                if run.get("link") == self._link
            ]
        if verb == "status":
            link.reply = self._told(link.reply)
        if verb == "stop":
            link.reply["processes"] = 0  # those here are ours, and those there nobody has counted
        return link

    def _told(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a State with the user there: the one who keeps it is the keeper's."""
        return {**state, "user": self.user}

    def _meant(self, request: Mapping[str, Any], timeout_s: float) -> str:
        """Return the full id of the run on this host that is asked for: the agent here also knows other hosts' runs by that name.

        Raises Refused, as the agent would.
        """
        text = request["prog_id"]
        if text in self._mine:
            return str(text)
        listed = self.call(
            "list", {k: v for k, v in request.items() if k == "spool" and v}, timeout_s=timeout_s
        )
        runs: list[dict[str, Any]] = listed["runs"]
        exact = [run for run in runs if run["prog_id"] == text]
        named = [run for run in runs if run.get("name") == text]
        begun = [
            run for run in runs if len(text) >= 2 and ids.tail(run["prog_id"]).startswith(text)
        ]
        # The list is oldest first, and a name means the run that is open, else the newest.
        found = exact or sorted(named, key=lambda run: run["state"] not in FINAL)[-1:] or begun
        if not found:
            raise Refused(
                {
                    "error": "not_found",
                    "message": f"no run {text}",
                    "count": len(runs),
                    "user": listed.get("user"),
                }
            )
        if len(found) > 1:
            raise Refused(
                {
                    "error": "ambiguous",
                    "message": f"{len(found)} runs begin with {text}",
                    "runs": found,
                }
            )
        self._mine.add(found[0]["prog_id"])
        return str(found[0]["prog_id"])

    # Starting

    def _start(
        self,
        verb: str,
        request: Mapping[str, Any],
        payload: BinaryIO | None,
        timeout_s: float,
        sending: Callable[[], None] | None,
    ) -> Link:
        whole = self._carried(request)
        where = {
            "prog_id": request["prog_id"],
            **({"spool": request["spool"]} if request.get("spool") else {}),
        }
        if not self._known(where, timeout_s):
            # A run that could not be started is a run all the same, and its id used up: a host that lets nobody in is found out before.
            self.probe()
        link = super().stream("start", whole, payload=payload, timeout_s=timeout_s, sending=sending)
        link.placed = 0  # on the keeper, which is nobody's concern
        self._mine.add(request["prog_id"])
        if link.reply.get("state") == "starting":
            link.reply.update(self._begun(where, timeout_s))
        failed = link.reply.get("exception") or {}
        if failed.get("stage") == "link":
            link.close()
            raise self._why(str(failed.get("message", "")))
        if verb == "start" or link.reply.get("state") == "not_started":
            return link
        link.close()
        following = super().stream(
            "follow", {k: v for k, v in request.items() if k not in _STARTING}, timeout_s=timeout_s
        )
        # What it has become meanwhile is told by the stream; to whoever started it, it was running.
        following.reply, following.placed = link.reply, 0
        return following

    def _known(self, where: Mapping[str, Any], timeout_s: float) -> bool:
        """Return whether there is a run of exactly this id; whether it is this program's, the start will tell."""
        try:
            link = super().stream("status", where, timeout_s=timeout_s)
        except Refused as refusal:
            if refusal.kind in ("not_found", "ambiguous"):
                return False
            raise
        link.close()
        return bool(link.reply.get("prog_id") == where["prog_id"])

    def probe(self) -> None:
        """Log in, through every sudo, and see that there is a shell. Raises CorraError with what is in the way."""
        channel = self._far.open(f"echo {_READY.decode().rstrip()}")
        came = b""
        until = time.monotonic() + self._far.connect_timeout_s + _LOGIN_S
        try:
            while _READY not in came:
                data = channel.read(max(0.0, until - time.monotonic()))
                if not data:
                    status, said = channel.exit_status(), channel.stderr()
                    if status == SSH_FAILED:
                        raise self._why(said.decode(errors="replace"))
                    refusal = self._refusal(said.decode(errors="replace"))
                    raise refusal or self._no_shell(
                        first_line(said) or first_line(came) or "it said nothing"
                    )
                came += data
        except TimeoutError:
            raise self._no_shell(first_line(came) or "the login said nothing") from None
        except LinkLost as error:
            raise Unreachable(
                f"link lost while logging in: {error}", host=self.host.name
            ) from error
        finally:
            channel.close()

    def _no_shell(self, said: str) -> CorraError:
        return NotStarted(f"no POSIX shell there that would start it: {said}", host=self.host.name)

    def _begun(self, where: Mapping[str, Any], timeout_s: float) -> Mapping[str, Any]:
        """Return the first State that says what came of the start: a slow connection takes longer than the agent waits."""
        link, parser = super().stream("wait", where, timeout_s=timeout_s), Parser()
        state: Mapping[str, Any] = link.reply
        until = time.monotonic() + self._far.connect_timeout_s + _LOGIN_S
        try:
            while state["state"] == "starting" and (
                data := link.read(max(0.0, until - time.monotonic()))
            ):
                for frame in parser.feed(data):
                    if isinstance(frame, Status):
                        state = frame.state
        finally:
            link.close()
        return state

    def _refusal(self, said: str) -> CorraError | None:
        """Return what sudo's words mean, if sudo spoke."""
        here = not isinstance(self._far, Elsewhere)
        return sudo.refusal(said, self.host, lambda: self._far.login, calls_here=here)

    def _why(self, said: str) -> CorraError:
        """Return why ssh or sudo failed, in the words that every other transport has for it."""
        said = said.replace(" | ", "\n")
        refusal = self._refusal(said)
        error = refusal or self._far.failure(said)
        # Other transports can't know whether the host acted before the link broke. The carrier does: it has sent nothing.
        return (
            error if isinstance(error, CorraError) else Unreachable(str(error), host=self.host.name)
        )

    def _carried(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request that the agent here gets. Raises Misuse for what the chaperone can't do."""
        program, run, secrets = (
            dict(request["program"]),
            dict(request.get("run") or {}),
            dict(request.get("secrets") or {}),
        )
        stdin = program.get("stdin")
        held = isinstance(stdin, Mapping) and "bytes" not in stdin
        for unable, why in (
            (
                program.get("env_inherit", True) is not True,
                "env_inherit: the environment there is the login shell's",
            ),
            (program.get("pty"), "--pty: a terminal's ends can't be told apart from the status"),
            (program.get("limits"), "limits: they would hold for the ssh here"),
            (run.get("wait_children"), "wait_children: only the program itself is seen from here"),
            (held, "-i: it needs ssh's stdin for signals; a file is sent first, with --stdin"),
        ):
            if unable:
                raise Misuse(f"the chaperone can't do {why}", host=self.host.name)
        variables = {**(program.get("env") or {}), **(secrets.get("env") or {})}
        if strange := [name for name in variables if not _VARIABLE.fullmatch(name)]:
            raise Misuse(
                f"the chaperone can't set {strange[0]!r}: a shell takes letters, digits and _ in a variable's name",
                host=self.host.name,
            )
        password = {tether.PASSWORD: self._far.password} if self._far.password is not None else {}
        # The agent hands the program's own variables on by that prefix, secrets among them.
        env = {**(secrets.get("env") or {}), **password}
        ssh = self._far.argv(tether.FAR, *_SSH)
        flags = [
            "--patience",
            f"{self._far.connect_timeout_s + _LOGIN_S:g}",
            "--before",
            _before(program),
        ]
        flags += ["--merge"] if program.get("merge") else []
        program["host"] = self._link
        run["carrier"] = [*self._python, *flags, str(len(ssh)), *ssh]
        return {
            **request,
            "program": program,
            "run": run,
            **({"secrets": {**secrets, "env": env}} if env else {}),
        }


def _before(program: Mapping[str, Any]) -> str:
    """Return what the shell there does before it becomes the program."""
    lines = [f"unset {name}" for name, value in (program.get("env") or {}).items() if value is None]
    if (cwd := program.get("cwd")) is not None:
        # From the home directory, as everywhere; and a leading dash is no option of cd.
        lines.append("enter " + shlex.quote(cwd if cwd.startswith("/") else f"./{cwd}"))
    if (umask := program.get("umask")) is not None:
        lines.append(f"umask {umask:04o}")
    return "\n".join(lines)
