"""The options of a run that its host's record holds: one line each says its type and its reader.

A reader makes the value that the record holds of what a caller or a flag gave, and raises Misuse
for what it can't read. An option of `PROGRAM` is a field of Program and stands in the record under
`program`; each other one stands under `run`. The annotations are read at run time, so this module
has no `from __future__ import annotations`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypedDict, get_args

from .limits import parse_limits
from .signal_names import signal_name
from .units import in_seconds, output_kept


class Option(NamedTuple):
    """Where the host's record has an option, and the reader of its value."""

    place: str
    read: Callable[[Any], Any]


def _of_program(read: Callable[[Any], Any]) -> Option:
    return Option("program", read)


def _of_run(read: Callable[[Any], Any]) -> Option:
    return Option("run", read)


def _as_given(value: Any) -> Any:
    return value


def _inherited(value: bool | Sequence[str]) -> bool | tuple[str, ...]:
    return value if isinstance(value, bool) else tuple(value)


class RecordedOptions(TypedDict, total=False):
    """What a host is told of a run beside its command. A duration is seconds, or text: `5m`."""

    cwd: Annotated[str | None, _of_program(_as_given)]
    env: Annotated[Mapping[str, str | None] | None, _of_program(dict)]
    env_inherit: Annotated[bool | Sequence[str], _of_program(_inherited)]
    umask: Annotated[int | None, _of_program(_as_given)]
    merge: Annotated[bool, _of_program(bool)]
    limits: Annotated[Mapping[str, int | str | Sequence[int]] | None, _of_program(parse_limits)]
    pty: Annotated[bool | tuple[int, int], _of_program(bool)]
    forget_stdin: Annotated[bool, _of_run(bool)]
    timeout: Annotated[float | str | None, _of_run(in_seconds)]
    grace: Annotated[float | str | None, _of_run(in_seconds)]
    stop_signal: Annotated[str | int | None, _of_run(signal_name)]
    keep: Annotated[float | str | None, _of_run(in_seconds)]
    keep_output: Annotated[int | str | None, _of_run(output_kept)]
    wait_children: Annotated[bool, _of_run(bool)]
    force: Annotated[bool, _of_run(bool)]


OPTIONS: dict[str, Option] = {
    name: get_args(kind)[1] for name, kind in RecordedOptions.__annotations__.items()
}
# A program's terminal: rows, columns, term. It follows from `pty` and from the caller's own
# terminal.
RUN_KEYS = {"terminal", *(name for name, option in OPTIONS.items() if option.place == "run")}


def read_options(given: Mapping[str, Any], place: str) -> dict[str, Any]:
    """Return the options of `given` that the record has at `place`, read. What is None is left out.
    Raises Misuse.
    """
    return {
        name: option.read(given[name])
        for name, option in OPTIONS.items()
        if option.place == place and given.get(name) is not None
    }
