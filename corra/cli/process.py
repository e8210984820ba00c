"""The process that a verb runs in: its settings, and its descriptors 0, 1 and 2."""

from __future__ import annotations

import atexit
import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator

# Python's own is 700 new objects; what a verb imports is 15,000, and nearly all of it stays.
# Collecting as often as Python does took a tenth of a short run.
_THRESHOLDS = (100_000, 20, 20)
# A thread that reads the network would wait 5 ms, three times over, for a thread that imports.
_SWITCH_S = 0.0005


def own_process() -> None:
    """Set the collector and the switch interval of this process as a short run needs them.

    For `corra` and the checkout's tasks.py, before they import a verb. Somebody else's tasks.py
    keeps its settings.
    """
    gc.set_threshold(*_THRESHOLDS)
    sys.setswitchinterval(_SWITCH_S)
    # Python collects three times more before it ends, which took 70 ms.
    atexit.register(gc.freeze)


def die_of_interrupts() -> None:
    """Have Ctrl-C end this process without a traceback while it imports the rest."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def open_standard() -> None:
    """Give /dev/null to each of the descriptors 0, 1 and 2 that is closed.

    Else the next thing that is opened has that number: corra's words, and the program's output,
    would go into the socket of ssh.
    """
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(fd, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


@contextlib.contextmanager
def printed() -> Iterator[None]:
    """End the process with the verbs' code where something that Invoke prints can't be written."""
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except OSError as error:
        from corra.errors import line
        from corra.terminal.screen import Gone

        gone = Gone(error)
        # What is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not isinstance(error, BrokenPipeError):
            sys.stderr.write(line("", "", "", gone.why("the answer")) + "\n")
        sys.exit(gone.code)
