"""Do the same on several hosts at once; Ctrl-C and the first failures are answered meanwhile.

The threads are daemons and hold nothing that must be released. An operator who leaves in the middle
leaves programs running on hosts, and no threads here.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

# A wait without a limit may sleep through a signal that another thread took.
_LOOK_S = 1.0


class Crew(Generic[T, R]):
    """Calls `do` for each of `whom`, at most `at_once` at a time, until `enough(results)`."""

    def __init__(
        self,
        do: Callable[[T], R],
        whom: Sequence[T],
        *,
        at_once: int,
        enough: Callable[[Sequence[R]], bool],
    ) -> None:
        self._do = do
        self._waiting = list(enumerate(whom))
        self._at_once = max(1, at_once)
        self._enough = enough
        self._ended: queue.Queue[tuple[int, R | None, BaseException | None]] = queue.Queue()
        self._running = 0
        self.results: dict[int, R] = {}

    def go(self) -> dict[int, R]:
        """Return the result of each call that was begun, by its place in `whom`.

        An error of `do` is raised here, once all calls have ended.
        """
        failure: BaseException | None = None
        while True:
            while (
                self._waiting
                and self._running < self._at_once
                and failure is None
                and not self._enough(list(self.results.values()))
            ):
                at, each = self._waiting.pop(0)
                self._running += 1
                threading.Thread(target=self._one, args=(at, each), daemon=True).start()
            if not self._running:
                break
            try:
                at, result, error = self._ended.get(timeout=_LOOK_S)
            except queue.Empty:
                continue
            self._running -= 1
            if error is not None:
                failure = failure or error
            elif result is not None:
                self.results[at] = result
        if failure is not None:
            raise failure
        return dict(sorted(self.results.items()))

    def _one(self, at: int, each: T) -> None:
        try:
            self._ended.put((at, self._do(each), None))
        except BaseException as error:  # noqa: BLE001 - raised again by `go`
            self._ended.put((at, None, error))
