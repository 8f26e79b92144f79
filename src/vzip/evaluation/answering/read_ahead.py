"""Work done ahead by threads, while the model is busy with what is ready."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def prepare_ahead(
    items: Iterable[Item], prepare: Callable[[Item], Result], num_workers: int
) -> Generator[Result, None, None]:
    """``prepare`` of every item, in their order, made by threads ahead of whoever takes the results.

    Threads and not processes: reading and resizing images leave Python's lock, a task's functions need not be
    pickled, and nothing is copied. At most twice as many results as there are threads wait to be taken.

    Args:
        items: anything.
        prepare: called once for each item, by any thread.
        num_workers: threads; 0 prepares each item only when it is asked for.

    Raises:
        whatever ``prepare`` raises, when the result of that item is taken. Closing the generator drops what waits.
    """
    if num_workers == 0:
        for item in items:
            yield prepare(item)
        return
    with ThreadPoolExecutor(num_workers, thread_name_prefix="prepare") as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(prepare, item))
                if len(waiting) > 2 * num_workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
