"""The verbs, for `inv` in this checkout."""

import sys

# Invoke switches it off; then each call compiles the modules beside this file again: 3 ms per
# 1,000 lines.
sys.dont_write_bytecode = False

from corra.cli.process import own_process  # noqa: E402

# The process is corra's own: this file has no tasks but the verbs.
own_process()

from corra.cli.core_words import own_words  # noqa: E402
from corra.cli.deliver import deliver  # noqa: E402
from corra.cli.serve import serve  # noqa: E402
from corra.tasks import (  # noqa: E402
    again,
    attach,
    book,
    diff,
    doctor,
    export,
    gc,
    history,
    kill,
    logs,
    ps,
    run,
    send,
    status,
    wait,
)

# Invoke's own `inv` answers a wrong word its own way. This is the last line, behind all tasks.
own_words(globals())
