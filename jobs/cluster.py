"""Executors: where bands run. Threads of this process, for now; the loop over them is one."""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT = 2  # tasks per slot: one runs, one waits


def slots() -> int:
    """How many bands this process may work on at once: the cores it was given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_threads(work: Callable[[Task], Result], tasks: Iterable[Task], count: int) -> Iterator[Result]:
    """Results of `work` as they come, on `count` threads, with at most twice as many tasks begun.

    Native code (zarr's codecs, ONNX Runtime, numpy) releases the GIL, so threads use the cores. The first
    error ends the loop: tasks that run are waited for, those that wait are dropped.
    """
    waiting = iter(tasks)
    with ThreadPoolExecutor(count, thread_name_prefix="band") as pool:
        running: set[Future[Result]] = set()
        try:
            while True:
                while len(running) < count * IN_FLIGHT and (task := next(waiting, None)) is not None:
                    running.add(pool.submit(work, task))
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        finally:
            for future in running:
                future.cancel()
