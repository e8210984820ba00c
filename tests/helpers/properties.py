"""How many examples each property gets, and the strategies that all properties share."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings, strategies as st

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
