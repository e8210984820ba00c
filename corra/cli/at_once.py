"""The same thing done with several runs or hosts at once."""

from __future__ import annotations

import signal as signals
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from corra import render
from corra.terminal.screen import Screen
from corra.terminal.signals import Desk, die_of

T = TypeVar("T")
R = TypeVar("R")

_THREADS = 32
# Most hosts answer sooner; then the terminal shows for whom it waits.
_SHOWN_AFTER_S = 2.0


def at_once(
    screen: Screen,
    do: Callable[[T], R],
    whom: Sequence[T],
    left: Callable[[], None] = lambda: None,
    *,
    named: Callable[[T], str],
) -> list[R]:
    """Return what `do` returns for each, in their order. Raises what a `do` raises.

    `named` says what the live line calls each.
    """
    found = dict(as_they_end(screen, do, whom, left, named=named))
    return [found[at] for at in range(len(whom))]


def as_they_end(
    screen: Screen,
    do: Callable[[T], R],
    whom: Sequence[T],
    left: Callable[[], None] = lambda: None,
    *,
    named: Callable[[T], str] | None = None,
) -> Iterator[tuple[int, R]]:
    """Yield (place in `whom`, what `do` returns for it), each as it comes.

    With `named` a terminal shows for whom it waits.

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

    open_ = {} if named is None else {at: named(each) for at, each in enumerate(whom)}
    shown_at = time.monotonic() + _SHOWN_AFTER_S

    def waiting(width: int) -> str:
        names = ", ".join(dict.fromkeys(open_.copy().values()))
        return render.cut(render.visible(f"waiting for {names}"), width)

    def ended() -> Any:
        if open_ and not screen.live_line:
            try:
                return desk.get(max(0.0, shown_at - time.monotonic()))
            except Empty:
                screen.live(waiting)
        return desk.get()

    with Desk(last=screen.last) as desk:
        for _ in range(min(_THREADS, len(whom))):
            threading.Thread(target=work, daemon=True).start()
        for _ in whom:
            item = ended()
            if isinstance(item, int):
                screen.live(None)
                screen.echoed()
                left()
                screen.close()
                die_of(signals.Signals(item).name)
            at, value, error = item
            open_.pop(at, None)
            if named is not None and not open_:
                screen.live(None)
            if error is not None:
                raise error
            yield at, value
