"""Rows measured side by side, each on cores of its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from queue import SimpleQueue
from typing import TypeVar

import torch

Item = TypeVar("Item")
INTERRUPTED = 130
"""What a shell says of a command that Ctrl-C has ended."""


def side_by_side(work: Callable[[Item], None], items: Iterable[Item], jobs: int) -> None:
    """Do the work for all items, `jobs` at a time. What one raises is raised when those that run beside it are done; no
    other is started.

    Each job has an equal share of the cores: a thread's affinity is that of the threads and processes that it starts,
    so that neither PyTorch nor ONNX Runtime of one job waits for the other's.
    """
    shares: SimpleQueue[list[int]] = SimpleQueue()
    cores = sorted(os.sched_getaffinity(0))
    for job in range(jobs):
        shares.put(cores[job % len(cores) :: jobs])
    pool = ThreadPoolExecutor(jobs, initializer=lambda: _take(shares.get()))
    try:
        started = [pool.submit(work, item) for item in items]  # the first may run before the last is here
        wait(started, return_when=FIRST_EXCEPTION)
    except KeyboardInterrupt:
        # Commands that were running have had it too; what runs in here would go on to its end. Of a scratch folder that
        # is left the next run frees the disk.
        os._exit(INTERRUPTED)
    finally:
        pool.shutdown(cancel_futures=True)
    for done in started:
        if not done.cancelled():
            done.result()


def _take(cores: list[int]) -> None:
    os.sched_setaffinity(0, cores)
    torch.set_num_threads(len(cores))
