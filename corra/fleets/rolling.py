"""A roll as an iterator of its events. The roller has a thread of its own.

Nothing of the process is touched: no signal handler is set, nothing is printed, and no process is
forked, since a caller's own threads and locks would be copied in whatever state they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

from .result import FleetResult, result_of
from .roll import Rolled, Roller, Way
from .standing import FleetEvent
from .told import Told
from .view import View

# Who leaves waits no longer for the roller: it may be writing to a journal that is far away.
_LEAVE_S = 5.0


class Rolling:
    """The events of one roll of a fleet. Iterate it once, in one thread; any may call `close`.

    An error of the roll, such as that of a journal that can't be reached, is raised by the
    iteration. What becomes of a single host is a Standing and no error.
    """

    def __init__(self, roller_of: Callable[[View], Roller]) -> None:
        self._told = Told()
        self._roller = roller_of(self._told)
        self._rolled: Rolled | None = None
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._roll, name="fleet", daemon=True)

    @property
    def way(self) -> Way | None:
        """How the roll ended, None before its end."""
        return self._rolled.way if self._rolled is not None else None

    @property
    def result(self) -> FleetResult:
        """How the fleet stands now, and after the last event how it stood then."""
        return result_of(self._roller.board, self._rolled or Rolled(Way.LEFT, started=False))

    def __iter__(self) -> Iterator[FleetEvent]:
        if self._thread.ident is not None:
            raise RuntimeError("a roll is iterated once; Fleet.follow() goes on with the fleet")
        self._thread.start()
        try:
            while (event := self._told.take()) is not None:
                yield event
        finally:
            self.close()
            self._thread.join(_LEAVE_S)
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Leave: the programs go on, and nothing more is started from here."""
        self._roller.leave()
        self._told.close()

    def _roll(self) -> None:
        try:
            self._rolled = self._roller.roll()
        except BaseException as error:  # noqa: BLE001 - raised again by the iteration
            self._failure = error
        finally:
            self._told.finish()
