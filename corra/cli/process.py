"""What corra sets for the whole process: only where the process is corra's own.

`corra` and the checkout's tasks.py call `own_process`. Somebody else's tasks.py keeps its settings.
"""

from __future__ import annotations

import atexit
import gc
import sys

# Python's own is 700 new objects; what a verb imports is 15,000, and nearly all of it stays.
# Collecting as often as Python does took a tenth of a short run.
_THRESHOLDS = (100_000, 20, 20)
# A thread that reads the network would wait 5 ms, three times over, for a thread that imports.
_SWITCH_S = 0.0005


def own_process() -> None:
    """Set the collector and the switch interval of this process as a short run needs them."""
    gc.set_threshold(*_THRESHOLDS)
    sys.setswitchinterval(_SWITCH_S)
    # Python collects three times more before it ends, which took 70 ms.
    atexit.register(gc.freeze)
