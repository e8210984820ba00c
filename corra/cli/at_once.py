"""The same thing done with several runs or hosts at once."""

from __future__ import annotations

import signal as signals
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

from corra.terminal.screen import Screen
from corra.terminal.signals import Desk, die_of

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 32


def at_once(
    screen: Screen,
    do: Callable[[T], R],
    whom: Sequence[T],
    left: Callable[[], None] = lambda: None,
) -> list[R]:
    """Return what `do` returns for each, in their order. Raises what a `do` raises."""
    found = dict(as_they_end(screen, do, whom, left))
    return [found[at] for at in range(len(whom))]


def as_they_end(
    screen: Screen,
    do: Callable[[T], R],
    whom: Sequence[T],
    left: Callable[[], None] = lambda: None,
) -> Iterator[tuple[int, R]]:
    """Yield (place in `whom`, what `do` returns for it), each as it comes.

    A signal ends this process at once, and `left` is called before. The threads are daemons, as a
    thread that waits for a host can't be stopped; a pool would be joined at the end.
    """
    todo: SimpleQueue[tuple[int, T]] = SimpleQueue()
    for pair in enumerate(whom):
        todo.put(pair)

    def work() -> None:
        while True:
            try:
                at, each = todo.get_nowait()
            except Empty:
                return
            try:
                desk.put((at, do(each), None))
            except BaseException as error:  # noqa: BLE001 - the main thread raises it
                desk.put((at, None, error))

    with Desk() as desk:
        for _ in range(min(_THREADS, len(whom))):
            threading.Thread(target=work, daemon=True).start()
        for _ in whom:
            item = desk.get()
            if isinstance(item, int):
                screen.live(None)
                screen.echoed()
                left()
                screen.close()
                die_of(signals.Signals(item).name)
            at, value, error = item
            if error is not None:
                raise error
            yield at, value
