"""Rows measured side by side, each on cores of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

Item = TypeVar("Item")


def side_by_side(work: Callable[[Item], None], items: Iterable[Item], jobs: int) -> None:
    """Do the work for all items, `jobs` at a time; what one raises ends all.

    Each job has an equal share of the cores: a thread's affinity is that of the threads and processes that it starts,
    so that neither PyTorch nor ONNX Runtime of one job waits for the other's.
    """
    shares: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))
    for job in range(jobs):
        shares.put(cores[job % len(cores) :: jobs])
    with ThreadPoolExecutor(jobs, initializer=lambda: os.sched_setaffinity(0, shares.get())) as pool:
        for _ in pool.map(work, items):
            pass
