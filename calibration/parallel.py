# SPDX-License-Identifier: Apache-2.0
"""Independent pieces of work on several threads: many small tensor operations fill one core better than they fill two.

Results come in the order of the items and every piece is computed alone, so they do not depend on how many run at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import torch

MAX_PARALLEL = 4  # each piece holds its own activations
Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device | str) -> Iterator[Result]:
    """work(item) of every item, several at once on a CPU, each on its share of torch's threads; one after another on
    other devices."""
    threads = torch.get_num_threads() if torch.device(device).type == "cpu" else 1
    parallel = min(threads, MAX_PARALLEL, len(items))
    if parallel < 2:
        yield from map(work, items)
        return
    share = threads // parallel
    pool = ThreadPoolExecutor(parallel, initializer=torch.set_num_threads, initargs=(share,))
    running: deque[Future[Result]] = deque()
    try:
        torch.set_num_threads(share)
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > parallel:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)
