"""The verbs, for `inv` in this checkout."""

import sys

# Invoke switches it off; then each call compiles the modules beside this file again: 3 ms per
# 1,000 lines.
sys.dont_write_bytecode = False

from corra.cli.process import own_process  # noqa: E402
from corra.tasks import again, attach, book, doctor, gc, kill, logs, ps, run, send, status, wait  # noqa: E402

# The process is corra's own: this file has no tasks but the verbs.
own_process()
