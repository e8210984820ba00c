"""How many examples each property gets, and the strategies that all properties share."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from hypothesis import settings, strategies as st

from corra import agent

# No deadline: another test may use the other core.
PROPERTY = settings(max_examples=int(os.environ.get("CORRA_EXAMPLES", "50")), deadline=None)
# The promise with the most ways to break it: the operator sees what the program wrote.
EXACTLY_ONCE = settings(PROPERTY, max_examples=20 * PROPERTY.max_examples)

# The arguments of a program: any bytes but NUL, as Python's sys.argv holds them.
words = st.binary(max_size=40).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))

# Any value that a JSON parser can return.
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


def contradictions(state: Mapping[str, Any]) -> list[str]:
    """Return which of a State's fields can't be true together."""
    kind, final = state["state"], state["state"] in agent.FINAL
    ended = kind == "exited"
    rules = {
        "a reason belongs to a final state": (state["reason"] in agent.REASONS) == final,
        "what has ended is never blocked": not (final and state["blocked"]),
        "only an exited run has a status": (state["status"] is not None) == ended,
        "an exited run has an exit code or a signal": (state["return_code"] is not None)
        + (state["signal"] is not None)
        == ended,
        "only an exited run has a usage or a core": ended
        or (state["rusage"], state["core_dumped"]) == (None, None),
        "a run was not started for its exception": (state["exception"] is not None)
        == (kind == "not_started"),
        "what is open has neither an end nor a date to go": final
        or (state["end_time"], state["keep_until"]) == (None, None),
        "no guard is named where none lives": state["supervisor"] != "gone"
        or (state["agent_pid"], state["standby_pids"]) == (None, []),
        "no more is dropped than there was": all(
            0 <= each["dropped"] <= each["length"] and each["late"] >= 0
            for each in state["streams"].values()
        ),
    }
    return [rule for rule, holds in rules.items() if not holds]
