"""What is wrong with a configuration file: asked only after Invoke has stumbled over one.

Invoke's own answer is a traceback, which names neither the file nor, for some faults, the line.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from corra.model.words import one_line

KINDS = (".yaml", ".yml", ".json", ".py")
# What Invoke and corra look up a name in.
_SECTIONS = ("corra", "run", "runners", "sudo", "tasks", "timeouts")


def wrong_file(directory: str | None, runtime: str | None) -> str:
    """Return what is wrong with the first configuration file that is, or nothing.

    `directory` has the project's file, `runtime` is that of -f.
    """
    for path in _files(directory, runtime):
        if why := _wrong(path):
            return why
    return ""


def _files(directory: str | None, runtime: str | None) -> Iterator[Path]:
    """Yield the files that Invoke reads: of each place the first that is there."""
    places = ["/etc/invoke", os.path.expanduser("~/.invoke")]
    places += [os.path.join(directory, "invoke")] if directory else []
    for place in places:
        found = [Path(place + kind) for kind in KINDS if os.path.lexists(place + kind)]
        yield from found[:1]
    if runtime:
        yield Path(runtime)


def _wrong(path: Path) -> str:
    from invoke.util import yaml  # type: ignore[attr-defined]

    if path.suffix == ".py":
        return ""
    try:
        text = path.read_text()
        told = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{path}: {error.strerror}"
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark or error.context_mark
        return f"{path}{f' line {at.line + 1}' if at else ''}: {error.problem}"
    except json.JSONDecodeError as error:
        return f"{path} line {error.lineno}: {error.msg}"
    except (yaml.YAMLError, ValueError) as error:  # a character that it can't hold
        why = one_line(error).partition(' in "')[0]
        return f"{path}: {why}"
    return _wrong_shape(path, told)


def _wrong_shape(path: Path, told: Any) -> str:
    if told is None:
        return ""
    if not isinstance(told, Mapping):
        return f"{path}: not names with values, such as  corra: {{host: db1}}"
    for name in _SECTIONS:
        if told.get(name) is not None and not isinstance(told[name], Mapping):
            return f"{path}: {name} is {told[name]!r}, not names with values"
    return ""
