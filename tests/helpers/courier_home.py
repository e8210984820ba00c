"""A host with a courier: the agent, the courier with short pauses, a spool, in one directory."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from agent_door import LOADER, SOURCE, alive, compile_the_agent, copy_of_the_agent
from corra import agent
from listener import Listener

COURIER = SOURCE.parent / "on_host" / "courier.py"
TOKEN = "secret-token"
FAST = {"retry_frequency": 0.05, "output_latency": 0.05, "output_buffer": 65536, "timeout": 86400}


class Home:
    """A directory with the agent, the courier and a spool. The agent is imported, as on a host, or
    run `by_hand`.
    """

    def __init__(
        self, base: Path, python: str = sys.executable, *, by_hand: bool = False, **constants: float
    ) -> None:
        self.base, self.python = base, python
        if by_hand:
            shutil.copy(SOURCE, base)
        else:
            compile_the_agent(python)
            shutil.copytree(copy_of_the_agent(), base, dirs_exist_ok=True)
        self.argv = [str(base / "agent.py")] if by_hand else ["-c", LOADER.format(str(base), "")]
        # A test can't wait for a minute, so these values follow the courier's own constants in its
        # first chapter.
        quick = {"REFUSED_S": 0.3, "BACKOFF_MAX_S": 0.4, "GATHER_S": 0.02, **constants}
        head, own, code = COURIER.read_text().split("\n# ==", 2)
        for name, value in quick.items():
            assert re.search(rf"(?m)^(\w+, )*{name}\b.* = ", own), name
            own += f"{name} = {value!r}\n"
        (base / "courier.py").write_text(f"{head}\n# =={own}\n# =={code}")
        self.spool = base / "spool"
        self.env = {"HOME": str(base), "PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}

    def ask(self, verb: str, **request: Any) -> dict[str, Any]:
        text = json.dumps({"spool": str(self.spool), **request}).encode()
        argv = [self.python, "-ISE", *self.argv, verb]
        done = subprocess.run(
            argv, input=text, stdout=subprocess.PIPE, env=self.env, cwd="/", check=False, timeout=90
        )
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[0])
        return found

    def start(
        self,
        listener: Listener | str,
        script: str,
        *,
        config: Any = None,
        merge: bool = False,
        pty: bool = False,
        run: Any = None,
        **callback: Any,
    ) -> str:
        url = listener if isinstance(listener, str) else listener.url
        state = self.ask(
            "start",
            program={
                "argv": ["sh", "-c", script],
                **{key: True for key, on in (("merge", merge), ("pty", pty)) if on},
            },
            callback={"url": url, "method": "POST", "token": TOKEN, **callback},
            config={**FAST, **(config or {})},
            run=run,
        )
        assert state.get("state") in ("running", "exited"), state
        return str(state["prog_id"])

    def status(self, prog_id: str) -> dict[str, Any]:
        """Return the State without starting a process, since a test asks again and again."""
        run = agent.Run(str(self.spool), prog_id)
        with contextlib.closing(run):
            state: dict[str, Any] = run.state(details=True)
        return state

    def callback(self, prog_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.status(prog_id)["callback"]
        return found

    def directory(self, prog_id: str) -> Path:
        return self.spool / "runs" / prog_id

    def courier(self, prog_id: str) -> int:
        """Return the pid of the run's live courier, or 0."""
        record = agent.Record.read((self.directory(prog_id) / "exit").read_bytes()[: agent.PAGE])
        return record.courier if record and record.courier and alive(record.courier) else 0
