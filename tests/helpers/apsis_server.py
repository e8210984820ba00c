"""A scheduler with Apsis's ways: `python apsis_server.py DIR`, killed and started again at will.

DIR/jobs/JOB.json                  {"program": {"type": .., ..}}
DIR/runs/ID.json                   a run: {"job", "args", "state", "program", "run_state", ..}

As Apsis does it: a run that is new is bound and started; after a restart one that was `running` is
connected to, and one that was `starting` or `stopping` is an error. Outputs are in memory until the
end, then in DIR/outputs/ID.NAME. stdin takes `stop ID` and `signal ID NAME`; stdout says each
change as `ID STATE` and each update as `ID output LENGTH`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "standins"))

from apsis.program import base

ENDS = {
    base.ProgramSuccess: "success",
    base.ProgramFailure: "failure",
    base.ProgramError: "error",
}


class Server:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.runs: dict[str, dict[str, Any]] = {}
        self.running: dict[str, base.RunningProgram] = {}
        self.cfg: dict[str, Any] = {}
        if (file := directory / "config.json").exists():
            self.cfg = json.loads(file.read_text())

    def save(self, run_id: str, run: dict[str, Any], state: str = "") -> None:
        run["state"] = state or run["state"]
        file = self.directory / "runs" / f"{run_id}.json"
        new = file.with_suffix(".new")
        new.write_text(json.dumps(run))
        os.replace(new, file)
        if state:
            print(run_id, state, flush=True)

    def program(self, run: dict[str, Any]) -> Any:
        if "program" not in run:
            job = json.loads((self.directory / "jobs" / f"{run['job']}.json").read_text())
            run["program"] = base.Program.from_jso(job["program"]).bind(run["args"]).to_jso()
        return base.Program.from_jso(run["program"])

    async def drive(self, run_id: str, run: dict[str, Any]) -> None:
        """Take a run through its states, as Apsis's `_process_updates` does."""
        try:
            program = self.program(run)
            if run["state"] == "running":
                program = program.connect(run_id, run["run_state"], self.cfg)
            else:
                self.save(run_id, run, "starting")
                program = program.run(run_id, self.cfg)
            self.running[run_id] = program
            updates = aiter(program.updates)
            while run["state"] in ("starting", "running", "stopping"):
                self.take(run_id, run, await anext(updates))
            async for more in updates:
                raise AssertionError(f"after the end: {more!r}")
        except asyncio.CancelledError:
            raise
        except Exception:  # noqa: BLE001 - as Apsis does
            run["error"] = traceback.format_exc()
            self.save(run_id, run, "error")

    def take(self, run_id: str, run: dict[str, Any], update: Any) -> None:
        match update:
            case base.ProgramRunning():
                assert run["state"] == "starting", run["state"]
                run["run_state"], run["meta"] = update.run_state, update.meta
                self.save(run_id, run, "running")
            case base.ProgramUpdate():
                run.setdefault("meta", {}).update(update.meta)
                for name, output in update.outputs.items():
                    assert output.metadata.length == len(output.data)
                    print(run_id, name, output.metadata.length, flush=True)
            case _:
                assert type(update) is base.ProgramError or run["state"] != "starting"
                for name, output in update.outputs.items():
                    (self.directory / "outputs" / f"{run_id}.{name}").write_bytes(output.data)
                run["meta"], run["message"] = update.meta, update.message
                self.save(run_id, run, ENDS[type(update)])

    async def order(self, words: list[str]) -> None:
        try:
            if words[0] == "stop":
                self.save(words[1], self.runs[words[1]], "stopping")
                await self.running[words[1]].stop()
            else:
                await self.running[words[1]].signal(words[2])
        except Exception:  # noqa: BLE001 - as Apsis does
            traceback.print_exc()

    async def serve(self) -> None:
        self.runs = {
            file.stem: json.loads(file.read_text())
            for file in sorted((self.directory / "runs").glob("*.json"))
        }
        tasks = set()
        for run_id, run in self.runs.items():
            if run["state"] in ("starting", "stopping"):
                self.save(run_id, run, "error")
            elif run["state"] in ("new", "running"):
                tasks.add(asyncio.create_task(self.drive(run_id, run)))
        print("serving", flush=True)
        reader = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), sys.stdin
        )
        while line := await reader.readline():
            tasks.add(asyncio.create_task(self.order(line.decode().split())))
        for each in tasks:  # Apsis shuts down: the programs go on
            each.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(Server(Path(sys.argv[1])).serve())
