"""How many examples a property is tried on, and the material all properties draw from."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import settings, strategies as st

# No deadline: another test may be using the other core.
PROPERTY = settings(max_examples=int(os.environ.get("CORRA_EXAMPLES", "50")), deadline=None)
# What an operator sees is what the program wrote: the promise with the most ways to break it.
EXACTLY_ONCE = settings(PROPERTY, max_examples=20 * PROPERTY.max_examples)

# What a program can be given: any bytes but NUL, as Python's sys.argv has them.
words = st.binary(max_size=40).map(lambda data: os.fsdecode(data.replace(b"\0", b"")))

# Whatever a JSON parser may hand out.
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)
