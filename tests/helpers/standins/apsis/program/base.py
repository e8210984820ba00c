from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Mapping
from typing import Any

from apsis.exc import SchemaError


class OutputMetadata:
    def __init__(self, name: str, length: int, *, content_type: str = "text/plain") -> None:
        self.name, self.length, self.content_type = name, length, content_type


class Output:
    def __init__(
        self, metadata: OutputMetadata, data: bytes, compression: str | None = None
    ) -> None:
        assert isinstance(data, bytes)
        self.metadata, self.data, self.compression = metadata, data, compression


class _Message:
    """What a program's `updates` yields."""

    def __init__(
        self,
        message: str = "",
        *,
        meta: Mapping[str, Any] | None = None,
        times: Mapping[str, Any] | None = None,
        outputs: Mapping[str, Output] | None = None,
    ) -> None:
        # Apsis takes its own moments in `times`, and asserts that.
        assert not times
        self.message, self.meta, self.outputs = message, dict(meta or {}), dict(outputs or {})


class ProgramRunning(_Message):
    def __init__(self, run_state: Mapping[str, Any], **facts: Any) -> None:
        super().__init__(**facts)
        self.run_state = run_state


class ProgramUpdate(_Message):
    pass


class ProgramSuccess(_Message):
    pass


class ProgramFailure(_Message):
    pass


class ProgramError(_Message):
    pass


class RunningProgram:
    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    @property
    def updates(self) -> AsyncIterator[Any]:
        raise NotImplementedError

    async def stop(self) -> None:
        raise NotImplementedError

    async def signal(self, signal: Any) -> None:
        raise NotImplementedError


class Program:
    @classmethod
    def from_jso(cls, jso: Mapping[str, Any]) -> Any:
        """Return the program of a job: its `type` names the class that reads the rest."""
        rest = dict(jso)
        try:
            module, _, name = rest.pop("type").rpartition(".")
            kind = getattr(importlib.import_module(module), name)
        except (KeyError, ImportError, AttributeError, ValueError) as error:
            raise SchemaError(f"bad type: {error}") from error
        return kind.from_jso(rest)

    def to_jso(self) -> dict[str, Any]:
        return {"type": f"{type(self).__module__}.{type(self).__qualname__}"}

    def bind(self, args: Mapping[str, Any]) -> Any:
        raise NotImplementedError

    def run(self, run_id: str, cfg: Mapping[str, Any]) -> RunningProgram:
        raise NotImplementedError

    def connect(
        self, run_id: str, run_state: Mapping[str, Any], cfg: Mapping[str, Any]
    ) -> RunningProgram:
        raise NotImplementedError
