"""The clock that the follow loop reads and waits by; a test hands in its own."""

from __future__ import annotations

import threading
import time


class Clock:
    """Time and chance. A test hands in its own."""

    def now(self) -> float:
        return time.monotonic()

    def with_sleep(self) -> float:
        """Return a clock that runs on while the machine is suspended, which `now` doesn't."""
        return (
            time.clock_gettime(time.CLOCK_BOOTTIME)
            if hasattr(time, "CLOCK_BOOTTIME")
            else time.time()
        )

    def slept_s(self) -> float:
        """Return a number that grows by the time this machine sleeps."""
        return self.with_sleep() - self.now()

    def wait(self, event: threading.Event, timeout_s: float) -> None:
        event.wait(timeout_s)

    def random(self) -> float:
        import random

        return random.random()  # noqa: S311 - spreads retries, guards nothing
