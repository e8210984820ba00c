"""One attempt to reach a host and be answered, bounded as a whole.

Each step has a bound of its own: the name service, the connection, the greeting, the keys, the
login, sudo, the answer. All together may take many times the time that a caller has, and the name
service can't be interrupted. So an attempt with a limit runs in a thread, which is left behind.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from corra.transport.channel import LinkLost


class Closable(Protocol):
    def close(self) -> None: ...


L = TypeVar("L", bound=Closable)


class Attempt(Generic[L]):
    """A call of `make` in a thread of its own.

    `make` gets a function that it calls before it sends a first byte. That function raises LinkLost
    once the caller has left, and else calls `sending`.
    """

    def __init__(
        self, make: Callable[[Callable[[], None]], L], sending: Callable[[], None]
    ) -> None:
        self._make = make
        self._sending = sending
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._left = False
        self._link: L | None = None
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name="attempt", daemon=True).start()

    def link(self, limit_s: float, works: Callable[[], bool] = lambda: False) -> L:
        """Return what `make` returns, or raise its error. Raises TimeoutError after `limit_s`.

        A link that is made later is closed at once, and nothing is sent over it. An attempt that
        `works` by then is waited for.
        """
        if not self._done.wait(limit_s) and works():
            self._done.wait()
        with self._lock:
            self._left = True
            if self._error is not None:
                raise self._error
            if self._link is None:
                raise TimeoutError(f"no answer in {limit_s:.2g} s")
            return self._link

    def _run(self) -> None:
        link, error = None, None
        try:
            link = self._make(self._before_sending)
        except BaseException as raised:  # noqa: BLE001 - `link` raises it
            error = raised
        with self._lock:
            late = self._left
            self._link, self._error = link, error
        self._done.set()
        if late and link is not None:
            link.close()

    def _before_sending(self) -> None:
        with self._lock:
            if self._left:
                raise LinkLost("left behind")
            self._sending()
