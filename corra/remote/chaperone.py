"""The chaperone: for a host where nothing can be placed, the agent of another machine keeps the
run.

That machine, the keeper, is this one or one that stays up. The Chaperone answers as the agent of
the host would, and sends each request to the keeper's agent, whose program is a carrier
(tether.py): an ssh that lives as long as the program. The run has its id, spool, state, signals and
time limits on the keeper. A start says once how such a run differs. If the keeper's link breaks,
the run is lost, and the program on the host may go on.
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

# Another keeper gets the tether's source as a word of the command, so nothing is placed there.
# Where no Python is found, the shell kills itself: a program that wasn't carried has no exit
# status.
_THERE = with_python('"$0" "$@"') + "kill -9 $$"
_READY = b"corra-far ready\n"
# How long a login may take, beyond the time for the connection.
_LOGIN_S = 30.0
# Among so many runs of one host a text is looked for; a keeper may answer with pages for ever.
_RUNS_MAX = 100_000
# A ControlMaster would outlive the run, or end it. The ssh itself must notice that its host is
# gone.
_SSH = ("-oControlMaster=no", "-oControlPath=none", "-oServerAliveCountMax=3")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# These keys belong to a start; the others of its request are about following.
_STARTING = frozenset({"program", "name", "origin", "run", "secrets", "callback", "config"})


class Chaperone(Agent):
    """The keeper's agent, with the face of the agent of `host`."""

    def __init__(self, host: Host, keeper: str = LOCAL, **how: Any) -> None:
        """`how`: the keywords of OpenSSH. Raises Misuse."""
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
            if host.ssh_key:
                raise Misuse(
                    f"{keeper} can't use the key of the inventory, {host.ssh_key}: it is here",
                    host=host.name,
                )
            # The password is for the sudo between the keeper and the host.
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
        """The transport from the keeper to the host."""
        return self._far

    @property
    def user(self) -> str:
        return self.host.user or self._far.login

    def beside(self, source: bytes, replies: Mapping[str, Object]) -> Agent:
        """Return the agent of the host itself: the keeper can't answer for the host's Python."""
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
        if verb == "list":
            whole["link"] = self._link
        link = super().stream(verb, whole, timeout_s=timeout_s, sending=sending)
        if verb == "list":
            link.reply["runs"] = [self._told(run) for run in link.reply.get("runs", ())]
        if verb == "status":
            link.reply = self._told(link.reply)
        if verb == "stop":
            link.reply["processes"] = 0  # those here are ours, and those there nobody has counted
        return link

    def _told(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Return a State that names the user on the host, not the keeper's user."""
        return {**state, "user": self.user}

    def _meant(self, request: Mapping[str, Any], timeout_s: float) -> str:
        """Return the full id of the run that is asked for.

        The keeper also has runs of other hosts, some by the same name.

        Raises Refused, as the agent would.
        """
        text = request["prog_id"]
        if text in self._mine:
            return str(text)
        asked = {k: v for k, v in request.items() if k == "spool" and v}
        listed = self.call("list", asked, timeout_s=timeout_s)
        runs: list[dict[str, Any]] = listed["runs"]
        while listed["runs"] and (after := listed.get("next")) and len(runs) < _RUNS_MAX:
            listed = self.call("list", {**asked, "before": after}, timeout_s=timeout_s)
            runs += listed["runs"]
        exact = [run for run in runs if run["prog_id"] == text]
        named = [run for run in runs if run.get("name") == text]
        begun = [
            run for run in runs if len(text) >= 2 and ids.tail(run["prog_id"]).startswith(text)
        ]
        # The list is newest first. A name means the open run, else the newest.
        found = exact or sorted(named, key=lambda run: run["state"] in FINAL)[:1] or begun
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
            # A failed start uses its id up, so a host that lets nobody in is found out before.
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
        # The reply says `running`; the stream tells what the run has become meanwhile.
        following.reply, following.placed = link.reply, 0
        return following

    def _known(self, where: Mapping[str, Any], timeout_s: float) -> bool:
        """Return whether the keeper has a run of this very id. The start compares the programs."""
        try:
            link = super().stream("status", where, timeout_s=timeout_s)
        except Refused as refusal:
            if refusal.kind in ("not_found", "ambiguous"):
                return False
            raise
        link.close()
        return bool(link.reply.get("prog_id") == where["prog_id"])

    def probe(self) -> None:
        """Log in, through every sudo, and find a shell. Raises the CorraError of what is in the
        way.
        """
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
        """Return the first State after `starting`: a slow login outlasts the agent's own wait."""
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
        """Return the error that sudo's words mean, None where sudo said nothing."""
        here = not isinstance(self._far, Elsewhere)
        return sudo.refusal(said, self.host, lambda: self._far.login, calls_here=here)

    def _why(self, said: str) -> CorraError:
        """Return why ssh or sudo failed, in the words of the other transports."""
        said = said.replace(" | ", "\n")
        refusal = self._refusal(said)
        error = refusal or self._far.failure(said)
        # Other transports can't know whether the host acted before the link broke. The carrier
        # knows: it has sent nothing.
        return (
            error if isinstance(error, CorraError) else Unreachable(str(error), host=self.host.name)
        )

    def _carried(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the request for the keeper's agent. Raises Misuse for what it can't do."""
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
                f"the chaperone can't set {strange[0]!r}:"
                " a shell takes letters, digits and _ in a variable's name",
                host=self.host.name,
            )
        password = {tether.PASSWORD: self._far.password} if self._far.password is not None else {}
        # The agent hands the program's own variables on by that prefix, also its secrets.
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
    """Return what the host's shell does before it becomes the program."""
    lines = [f"unset {name}" for name, value in (program.get("env") or {}).items() if value is None]
    if (cwd := program.get("cwd")) is not None:
        # A relative cwd begins at the home, as everywhere. A leading dash is no option of cd.
        below = cwd[1:].lstrip("/") if cwd[:2] in ("~", "~/") else cwd
        lines.append("enter " + shlex.quote(below if below.startswith("/") else f"./{below}"))
    if (umask := program.get("umask")) is not None:
        lines.append(f"umask {umask:04o}")
    return "\n".join(lines)
