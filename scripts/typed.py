"""`inv` or `corra` of this checkout, for scripts/inv. The first word is how it was typed."""

import os
import sys

# The verbs look at sys.argv, as in any other program of theirs.
del sys.argv[0]
root = os.path.dirname(sys.path.pop(0))

from corra.cli.process import die_of_interrupts, own_process  # noqa: E402

die_of_interrupts()
own_process()

from corra import main  # noqa: E402

if os.path.basename(sys.argv[0]) == "corra":
    main.main()
else:
    main.inv(root)
