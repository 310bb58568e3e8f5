"""Parallel processes that work on a stream of pieces, in order, with few of them in memory."""

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
    """The number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(items: Iterable[Piece], size: int, length: Callable[[Piece], int] = len) -> Iterator[list[Piece]]:  # type: ignore[assignment]
    """Lists of items. Each list ends as soon as the lengths of its items add up to `size`."""
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
    """function(piece) of each piece, in order, from parallel processes; at most two pieces per worker are in memory.

    A single piece, or workers=1, is done in this process, because a new process takes half a second to start.
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
    context = multiprocessing.get_context("spawn")  # available on every system, and safe with threads
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
            raise UserError("a worker process died. If memory ran out, use fewer of them: --workers=1") from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _start(initializer: Callable[..., None] | None, initargs: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    parent = multiprocessing.parent_process()
    assert parent

    def exit_with_parent() -> None:  # a killed parent stops no worker, and they would wait forever
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
    if initializer:
        initializer(*initargs)
