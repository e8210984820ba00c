"""What a webhook is sent when a run ends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from corra.errors import Misuse, plain
from corra.model import ids


@dataclass
class Hook:
    """A URL that is told of each end; `shape` is "plain" or "slack"."""

    url: str
    shape: str = "plain"


def parse_hook(text: str) -> Hook:
    """Read `https://...` or `slack=https://...`. Raises Misuse."""
    shape, url = ("slack", text[6:]) if text.startswith("slack=") else ("plain", text)
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise Misuse(f"not a webhook: {text!r} (URL, or slack=URL)", fate="NOT SERVED")
    return Hook(url, shape)


def notice_body(hook: Hook, run: Mapping[str, Any]) -> str:
    """Return the JSON that `hook` is sent for the end of `run`."""
    text = _sentence(run)
    if hook.shape == "slack":
        return json.dumps({"text": text})
    state = {key: run[key] for key in run if key != "collector"}
    return json.dumps({"v": 1, "type": "end", "text": text, "state": state})


def _sentence(run: Mapping[str, Any]) -> str:
    """Return one line about the end of a run, for people."""
    label = ids.label(run["prog_id"], run.get("name"))
    if run["state"] != "exited":
        fate = run["state"].replace("_", " ").upper()
    elif run.get("reason") == "timeout":
        fate = "TIMEOUT"
    elif run.get("signal"):
        fate = f"KILLED by {run['signal']}"
    else:
        fate = f"{'FAILED' if run.get('return_code') else 'done'}: exit {run.get('return_code')}"
    after = "" if run.get("elapsed") is None else f" after {run['elapsed']:.1f} s"
    command = shlex.join(map(str, run.get("argv") or ()))[:200]
    return plain(f"{label} on {run.get('host') or '?'}: {fate}{after}: {command}")
