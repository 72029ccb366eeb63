"""Where bands run: threads of this process, local Dask processes, or an existing Dask scheduler.

One loop over three executors. An executor takes a task and answers with a future of the standard library; the
loop keeps twice as many tasks under way as there are slots. So a roll of a million lines queues no million
bands, and a worker that dies takes few with it. Results lie on disk: nothing but the window is held here.
"""

import os
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol, TypeVar

import psutil
from rollsight.inspect.engines import choose
from rollsight.inspect.errors import LOCKED, UserError
from rollsight.inspect.scan import Facts, facts_here
from rollsight.jobs.workers import Band, BandJob, Fault, ready, scan_one

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT = 2  # tasks per slot: one runs, one waits
HANGS = 20  # times as long as the slowest task so far, and nothing came back: something hangs
HANGS_AT_LEAST_S = 60.0
MEMORY_SHARE = 0.9  # of the free memory
CGROUP = Path("/sys/fs/cgroup")


class Executor(Protocol):
    """Where tasks run: ask for the `facts`, `begin` a job, `submit` its tasks."""

    name: str  # in the summary
    in_process: bool  # a task that kills its worker kills the scan
    deaths: tuple[type[BaseException], ...]  # what a future raises when its task's workers died
    patience_s: float  # how long nothing may come back before `revive`

    def facts(self, engine: str, device: str) -> tuple[Facts, str]:
        """What all workers have in common, and the device each takes; UserError names one that differs."""

    def slots(self) -> int:
        """How many tasks run at once."""

    def room(self) -> int | None:
        """How many bytes one slot may take; None where that is not known."""

    def begin(self, job: BandJob, slot_bytes: int) -> None:
        """Make the workers ready for a job; UserError names one that cannot take part."""

    def submit(self, work: Callable[[Task], Result], task: Task) -> Future[Result]:
        """Have a task done."""

    def wait(self, futures: Collection[Future[Result]], timeout: float) -> set[Future[Result]]:
        """Those that are done, as soon as one is; none after `timeout` seconds."""

    def drop(self, futures: Collection[Future[Result]]) -> None:
        """Forget tasks that wait; those that run in this process are waited for."""

    def revive(self) -> None:
        """Start afresh because nothing comes back; what was submitted is forgotten."""

    def close(self) -> None:
        """Let go of the workers."""


class Threads:
    """Threads of this process: native code (zarr's codecs, the nets, numpy) releases the GIL.

    count defaults to the cores that this process was given, or fewer where memory is short.
    """

    name = "threads"
    in_process = True
    deaths: tuple[type[BaseException], ...] = ()
    patience_s = float("inf")  # a thread that hangs in native code cannot be ended

    def __init__(self, count: int | None = None) -> None:
        self._asked = count
        self._open(count or slots())

    def _open(self, count: int) -> None:
        self._count = count
        self._pool = ThreadPoolExecutor(count, thread_name_prefix="band")

    def facts(self, engine: str, device: str) -> tuple[Facts, str]:
        engine, device = choose(engine, device)
        return facts_here(engine, device), device

    def slots(self) -> int:
        return self._count

    def room(self) -> int | None:
        return free_memory() // (self._asked or 1)

    def begin(self, job: BandJob, slot_bytes: int) -> None:
        if self._asked is None:
            self.close()
            self._open(max(1, min(slots(), free_memory() // slot_bytes)))
        ready(job.setup)

    def submit(self, work: Callable[[Task], Result], task: Task) -> Future[Result]:
        return self._pool.submit(work, task)

    def wait(self, futures: Collection[Future[Result]], timeout: float) -> set[Future[Result]]:
        return wait(futures, None if timeout == float("inf") else timeout, FIRST_COMPLETED).done

    def drop(self, futures: Collection[Future[Result]]) -> None:
        for future in futures:
            future.cancel()
        wait(future for future in futures if not future.cancelled())

    def revive(self) -> None:
        raise AssertionError("threads have no end of patience")

    def close(self) -> None:
        self._pool.shutdown()


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files for a scheduler under tls://: the authority, this client's certificate and its key."""

    ca: Path
    cert: Path
    key: Path


def scan_bands(
    executor: Executor, job: BandJob, bands: Iterable[Band]
) -> Generator[tuple[Band, Fault | None]]:
    """Each band as it is done, and what is wrong with it, if anything is."""
    for band, future in window(executor, partial(scan_one, job), bands):
        died = isinstance(future.exception(), executor.deaths)
        yield band, Fault("it kills its worker, also when run alone") if died else future.result()


def window(
    executor: Executor, work: Callable[[Task], Result], tasks: Iterable[Task]
) -> Generator[tuple[Task, Future[Result]]]:
    """The tasks with their finished futures as they come, at most twice as many begun as there are slots.

    A worker's death puts all that it held under suspicion. So tasks whose workers died too often run once
    more at the end, each alone: what then kills its worker is that task and no neighbour. Where nothing comes
    back for the executor's patience (distributed#3196: a scheduler may stall after many deaths) it is revived
    once; UserError (exit 75) where that does not help. Closed early, it drops the tasks that wait and waits
    for those that run in this process.
    """
    waiting, blamed, alone = iter(tasks), deque[Task](), False
    running: dict[Future[Result], tuple[Task, float]] = {}
    slowest, patience, revived = HANGS_AT_LEAST_S / HANGS, executor.patience_s, False

    def begin(task: Task) -> None:
        running[executor.submit(work, task)] = (task, time.monotonic())

    try:
        while True:
            while len(running) < executor.slots() * IN_FLIGHT and (task := next(waiting, None)) is not None:
                begin(task)
            if not running and blamed:
                alone = True
                begin(blamed.popleft())
            if not running:
                return
            done = executor.wait(running, patience)
            if not done:
                if revived:
                    raise UserError(
                        f"no band came back for {patience:.0f} s, twice: the workers hang or there are none; "
                        "the bands done are kept, scan again later",
                        LOCKED,
                    )
                executor.revive()
                revived, lost = True, [task for task, _ in running.values()]
                running.clear()
                for task in lost:
                    begin(task)
            for future in done:
                task, begun = running.pop(future)
                slowest = max(slowest, time.monotonic() - begun)
                patience, revived = min(executor.patience_s, HANGS * slowest), False
                if not alone and isinstance(future.exception(), executor.deaths):
                    blamed.append(task)
                else:
                    yield task, future
    finally:
        executor.drop(running)


def slots() -> int:
    """How many bands this process may work on at once: the cores it was given."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def free_memory() -> int:
    """Bytes that may still be taken: of the machine, and of the container (cgroup 2) where it has a limit."""
    free = psutil.virtual_memory().available
    limit = CGROUP / "memory.max"
    if limit.is_file() and (most := limit.read_text().strip()) != "max":
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, int(most) - used + int(stat["file"]))  # files in the cache are given back
    return int(free * MEMORY_SHARE)
