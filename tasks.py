"""The verbs, for `inv` in this checkout."""

import sys

# Invoke switches it off, and then everything beside this file is compiled anew at each call: 3 ms per 1,000 lines.
sys.dont_write_bytecode = False

from corra.tasks import again, attach, book, doctor, gc, kill, logs, ps, run, send, status, wait  # noqa: E402
