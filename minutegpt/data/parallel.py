"""Work on many pieces at once, in the order they came, with only a few of them in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, TypeVar

from minutegpt.errors import UserError

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def cpu_count() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(items: Iterable[Piece], size: int, length: Callable[[Piece], int] = len) -> Iterator[list[Piece]]:  # type: ignore[assignment]
    """Lists of items, each list as short as it can be with a length of `size` or more in all."""
    batch: list[Piece] = []
    total = 0
    for item in items:
        batch.append(item)
        total += length(item)
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch


def ordered_map(
    function: Callable[[Piece], Result],
    pieces: Iterable[Piece],
    workers: int | None = None,
    initializer: Callable[..., None] | None = None,
    initargs: tuple[Any, ...] = (),
) -> Iterator[Result]:
    """function(piece) of each piece, in order, from parallel processes; at most two pieces a worker are held.

    A single piece, or workers=1, is done in this process: a new one takes half a second to start.
    Raises UserError where a process died, as it does when the memory is full.
    """
    pieces = iter(pieces)
    workers = workers or cpu_count()
    first = list(islice(pieces, 2))
    if workers == 1 or len(first) < 2:
        if initializer:
            initializer(*initargs)
        yield from map(function, chain(first, pieces))
        return
    context = multiprocessing.get_context("spawn")  # the one way that every system has, and safe beside threads
    with ProcessPoolExecutor(workers, context, _start, (initializer, initargs)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for piece in chain(first, pieces):
                waiting.append(pool.submit(function, piece))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process died, perhaps for want of memory: try --workers=1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    parent = multiprocessing.parent_process()
    assert parent

    def follow() -> None:  # a killed parent says goodbye to nobody, and its workers would wait for ever
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if initializer:
        initializer(*initargs)
