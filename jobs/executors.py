"""The choice of where bands run: threads, local Dask processes, or an existing scheduler."""

import contextlib
from collections.abc import Iterator

from rollsight.inspect.errors import USAGE, UserError
from rollsight.jobs.cluster import Executor, Threads, Tls


@contextlib.contextmanager
def open_executor(
    *,
    workers: int = 0,
    scheduler: str | None = None,
    tls: Tls | None = None,
    threads: int | None = None,
    device: str = "auto",
) -> Iterator[Executor]:
    """The executor that was asked for; by default threads of this process.

    workers > 0: as many Dask processes on this machine, one per GPU where `device` is one. scheduler: the
    address of an existing Dask scheduler, tcp:// or tls://. UserError where two of them are asked for, and
    with exit code 75 where the scheduler does not answer or has no workers.
    """
    if sum((bool(workers), scheduler is not None, threads is not None)) > 1:
        raise UserError("--workers, --scheduler and --threads: take one of them", USAGE)
    if tls is not None and scheduler is None:
        raise UserError("TLS files are for a scheduler: say --scheduler tls://HOST:PORT", USAGE)
    executor: Executor
    if scheduler is not None:
        from rollsight.jobs.dask_cluster import remote

        executor = remote(scheduler, tls)
    elif workers:
        from rollsight.jobs.dask_cluster import local

        executor = local(workers, device)
    else:
        executor = Threads(threads)
    try:
        yield executor
    finally:
        executor.close()
