"""Do the same on several hosts at once, as a roll-out's Rules allow; Ctrl-C is answered meanwhile.

What starts next is decided where a fleet's is (`model/rollout.py`). The threads are daemons and
hold nothing that must be released. An operator who leaves in the middle leaves programs running on
hosts, and no threads here.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from corra.model.rollout import Done, Fact, Rules, Starts, Stop, Tally, Wait, What

T = TypeVar("T")
R = TypeVar("R")

# A wait without a limit may sleep through a signal that another thread took.
_LOOK_S = 1.0


class Crew(Generic[T, R]):
    """Calls `do` for each of `whom`, wave by wave. `judge` says what a result means."""

    def __init__(
        self,
        do: Callable[[T], R],
        whom: Sequence[T],
        *,
        rules: Rules,
        judge: Callable[[R], What],
    ) -> None:
        self._do = do
        self._whom = whom
        self._judge = judge
        self._tally = Tally(rules)
        self._ended: queue.Queue[tuple[int, R | None, BaseException | None]] = queue.Queue()
        self._running = 0
        self.results: dict[int, R] = {}

    def go(self) -> dict[int, R]:
        """Return the result of each call that was begun, by its place in `whom`.

        An error of `do` is raised here, once all calls have ended.
        """
        failure: BaseException | None = None
        while True:
            self._tally.add(Fact(What.NOW, at=time.time()))
            wait_s = _LOOK_S
            match self._tally.decide() if failure is None else Stop("an error"):
                case Starts(members):
                    for at in members:
                        self._begin(at)
                case Stop() | Done() if not self._running:
                    break
                case Wait(until=float(until)):
                    wait_s = min(wait_s, max(0.0, until - self._tally.now))
            try:
                at, result, error = self._ended.get(timeout=wait_s)
            except queue.Empty:
                continue
            self._running -= 1
            what = What.FAILED
            if error is not None:
                failure = failure or error
            elif result is not None:
                self.results[at] = result
                what = self._judge(result)
            self._tally.add(Fact(what, at, time.time()))
        if failure is not None:
            raise failure
        return dict(sorted(self.results.items()))

    def _begin(self, at: int) -> None:
        self._running += 1
        self._tally.add(Fact(What.BEGUN, at, time.time()))
        threading.Thread(target=self._one, args=(at,), daemon=True).start()

    def _one(self, at: int) -> None:
        try:
            self._ended.put((at, self._do(self._whom[at]), None))
        except BaseException as error:  # noqa: BLE001 - raised again by `go`
            self._ended.put((at, None, error))
