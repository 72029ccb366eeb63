"""Dask as an executor: processes on this machine, or an existing scheduler and its workers.

Workers hold one model each, loaded by a plugin when they start and again when a nanny restarts them. Bands
are committed by files: a cluster that loses everything it knows loses no work that is done.
"""

import contextlib
import hashlib
import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import dask
import distributed
from distributed import Client, KilledWorker, LocalCluster, Security, Worker, WorkerPlugin
from rollsight.inspect.engines import choose
from rollsight.inspect.errors import CONFIG, LOCKED, USAGE, UserError
from rollsight.inspect.scan import Facts, facts_here
from rollsight.jobs.cluster import Tls, free_memory
from rollsight.jobs.workers import BandJob, Setup, facts_report, ready

Task = TypeVar("Task")
Result = TypeVar("Result")

# How often a band's worker may die before the band is taken aside: Dask's own default, which an existing
# scheduler has too. More would cost more restarts per poison band; neighbours that were only blamed get the
# same number of deaths again, alone (cluster.scan_bands).
ALLOWED_FAILURES = 3
RETRIES = 2  # of a task that raised: a file system that did not answer, memory that another took
CONNECT_S = 10
WORKERS_S = 60  # for the first worker to come
ANSWER_S = 120  # for what a worker is, its libraries imported
ASKED, RESTART_S = 3, 3  # times, and seconds between them, where a worker died meanwhile
RESTART_LIMIT_S = 15  # for the workers of this machine to be back before they are closed
PATIENCE_S = 900.0  # for the first band
PROCESS_BYTES = 500_000_000  # of a worker with libraries and model: 0.3 GB with torch, and Dask
THREADS_PER_GPU = 2  # one reads while the other computes; the engine has a lock

GONE = "the Dask scheduler is gone: the bands done are kept, the same command goes on when it is back"

CONFIG_LOCAL = {
    "distributed.worker.multiprocessing-method": "spawn",  # zarr's event loop does not survive a fork
    "distributed.nanny.pre-spawn-environ": {
        # Dask's own MALLOC_TRIM_THRESHOLD_=65536 makes each large array a fresh map: reads at half the speed
        # (139 against 259 MB/s, measured). One thread per library: parallelism is bands side by side.
        "MALLOC_TRIM_THRESHOLD_": 2**32,
        "MALLOC_MMAP_THRESHOLD_": 2**30,
        "OMP_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        "OPENBLAS_NUM_THREADS": 1,
        "DASK_LOGGING__DISTRIBUTED": "critical",
    },
    # Results are a line each: nothing to spill. A band's memory is counted before the scan (scan.slot_bytes),
    # so near its share a worker goes on; at 95 % the nanny ends it before the system ends us.
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    # A worker that is restarting so long after an earlier death is given up for good, with its nanny: with
    # 15 s, the default, a band that kills its worker five times left no worker at all.
    "distributed.deploy.lost-worker-timeout": "7 days",
}


class ModelPlugin(WorkerPlugin):
    """Makes a worker ready at its start, also one that joins or is restarted in mid-scan.

    Where that fails the scheduler does not care: the first task on that worker then fails in the same words.
    """

    idempotent = True

    def __init__(self, setup: Setup) -> None:
        self.needs = setup
        # By the model's hash; and by what else is needed, or a client of another version would find it done.
        needs = hashlib.blake2b(repr(setup).encode(), digest_size=6).hexdigest()
        self.name = f"rollsight-{setup.model_hash[:12]}-{needs}"

    def setup(self, worker: Worker) -> None:
        ready(self.needs, worker.address)


class Dask:
    """A Dask cluster; `connect` makes a client, and what it opens is closed with the stack."""

    name = "dask"
    in_process = False
    deaths: tuple[type[BaseException], ...] = (KilledWorker,)

    def __init__(self, connect: Callable[[ExitStack], Client], device: str | None, patience_s: float) -> None:
        self.patience_s = patience_s
        self._connect = connect
        self._device = device  # that of local processes; None: the workers are asked
        self._job: BandJob | None = None
        self._under_way: dict[Future[Any], Any] = {}  # Dask's futures by ours
        self._open()

    def _open(self) -> None:
        self._stack = ExitStack()
        try:
            self._client = self._connect(self._stack)
            self._client.wait_for_workers(1, timeout=WORKERS_S)
        except TimeoutError:
            self._stack.close()
            raise UserError(
                "the Dask scheduler has no workers: start some, then scan again", LOCKED
            ) from None
        except BaseException:
            self._stack.close()
            raise

    def facts(self, engine: str, device: str) -> tuple[Facts, str]:
        if device.startswith("cuda:"):
            raise UserError(f"--device {device}: Dask gives each worker a GPU of its own, say cuda", USAGE)
        needed = None
        for worker, theirs in self._ask(facts_report, engine, self._device or device).items():
            found = Facts(**{field.name: theirs.get(field.name, "unknown") for field in fields(Facts)})
            if needed is None:
                ours = facts_here(found.engine, "cpu")
                # A client needs no GPU of its own: there the first worker says what the others must be.
                needed = ours if found.device == "cpu" else replace(found, code=ours.code, python=ours.python)
            if differences := found.differences(needed):
                raise UserError(
                    f"worker {worker}: {differences}: install the same there, or scan without it", CONFIG
                )
        assert needed is not None  # _open waited for a worker
        return needed, "cpu" if needed.device == "cpu" else "cuda:0"

    def slots(self) -> int:
        with _reached():
            return max(1, sum(int(threads) for threads in self._client.nthreads().values()))

    def room(self) -> int | None:
        with _reached():
            workers = self._client.scheduler_info(n_workers=-1)["workers"].values()
        limits = [
            max(0, worker["memory_limit"] - PROCESS_BYTES) // worker["nthreads"]
            for worker in workers
            if worker["memory_limit"]
        ]
        return min(limits, default=None)

    def begin(self, job: BandJob, slot_bytes: int) -> None:
        for worker, sees in self._ask(Path.is_dir, job.receipts).items():
            if not sees:
                raise UserError(
                    f"worker {worker} does not see {job.receipts}: client and workers need the plant folder "
                    "under the same path",
                    CONFIG,
                )
        self._job = job
        plugin = ModelPlugin(job.setup)
        with _reached():
            self._client.register_plugin(plugin)
        if self._device is None:  # the workers outlive us
            self._stack.callback(self._forget, plugin.name)

    def _forget(self, plugin: str) -> None:
        if self._client.status != "running":  # the scheduler is gone
            return
        # Another client with the same model may have ended first; a worker that hangs must not hold us.
        with contextlib.suppress(ValueError, OSError, RuntimeError):
            self._client.run(os.getpid, callback_timeout=CONNECT_S)
            self._client.unregister_worker_plugin(plugin)

    def submit(self, work: Callable[[Task], Result], task: Task) -> Future[Result]:
        # Not by Client.get_executor(): its futures stay open for ever where a result was lost with its
        # worker, the task runs again, and then fails (distributed 2026.8, found by bench/faults.py).
        future: Future[Result] = Future()
        self._under_way[future] = self._client.submit(work, task, pure=False, retries=RETRIES)
        return future

    def wait(self, futures: Collection[Future[Result]], timeout: float) -> set[Future[Result]]:
        ours = {self._under_way[future]: future for future in futures}
        try:
            with self._client.as_current():
                done, _ = distributed.wait([*ours], timeout, return_when="FIRST_COMPLETED")
        except TimeoutError:
            return set()
        except CancelledError:
            raise UserError(GONE, LOCKED) from None
        for theirs in done:
            try:
                ours[theirs].set_result(theirs.result(timeout=min(timeout, ANSWER_S)))
            except TimeoutError:  # lost with its worker, and not yet there again
                continue
            except Exception as fault:
                ours[theirs].set_exception(fault)
            del self._under_way[ours[theirs]]
        return {future for future in futures if future.done()}

    def drop(self, futures: Collection[Future[Result]]) -> None:
        for future in futures:
            # With its last reference Dask forgets a task; a `revive` that failed has forgotten all of them.
            self._under_way.pop(future, None)

    def revive(self) -> None:
        self._under_way.clear()
        self.close()
        self._open()
        if self._job is not None:
            self.begin(self._job, 0)

    def close(self) -> None:
        self._stack.close()

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
        """What each worker answers, in the order of their addresses."""
        answers: dict[str, Any] = {}
        for _ in range(ASKED):
            with _reached():
                answers = self._client.run(question, *arguments, on_error="return", callback_timeout=ANSWER_S)
            if not any(isinstance(answer, OSError) for answer in answers.values()):
                break
            time.sleep(RESTART_S)  # one has just died; its nanny starts it again
        for worker, answer in sorted(answers.items()):
            if isinstance(answer, UserError):
                raise UserError(f"worker {worker}: {answer}", answer.exit_code)
            if isinstance(answer, BaseException):  # no rollsight there, or one without this question
                raise UserError(
                    f"worker {worker} cannot take part ({type(answer).__name__}: {answer}): "
                    "install the same version of rollsight there",
                    CONFIG,
                )
        return dict(sorted(answers.items()))


@contextlib.contextmanager
def _reached() -> Iterator[None]:
    """What is told of a worker that hangs, and of a scheduler that ended."""
    try:
        yield
    except TimeoutError:
        raise UserError("a worker does not answer: end it or wait, then scan again", LOCKED) from None
    except OSError:
        raise UserError(GONE, LOCKED) from None


def local(workers: int, device: str = "auto", patience_s: float = PATIENCE_S) -> Dask:
    """As many worker processes on this machine, each with one thread; one per GPU where device is one.

    With `auto` GPUs are taken where there are some and dask-cuda is installed. UserError where it is not.
    """
    on_gpu = choose("auto", device)[1] != "cpu" and (device != "auto" or find_spec("dask_cuda") is not None)
    if on_gpu:
        cuda_cluster()
    return Dask(lambda stack: _local_client(workers, on_gpu, stack), device if on_gpu else "cpu", patience_s)


def cuda_cluster() -> Any:
    """dask-cuda's cluster, one process per GPU; UserError where it is not installed. Not run on a GPU yet."""
    try:
        return import_module("dask_cuda").LocalCUDACluster
    except ImportError:
        raise UserError("--workers on GPUs needs dask-cuda: pip install 'rollsight[gpu]'", CONFIG) from None


def remote(address: str, tls: Tls | None = None, patience_s: float = PATIENCE_S) -> Dask:
    """The scheduler at the address, tcp:// or tls://, and its workers."""
    scheme = address.partition("://")[0]
    if scheme not in ("tcp", "tls") or (scheme == "tls") != (tls is not None):
        raise UserError(
            f"--scheduler {address}: it is tcp://HOST:PORT, or tls://HOST:PORT with --tls-ca, --tls-cert and "
            "--tls-key",
            USAGE,
        )
    if tls is not None:
        for file in (tls.ca, tls.cert, tls.key):
            if not file.is_file():
                raise UserError(f"{file}: no such file; TLS needs authority, certificate and key", USAGE)
    return Dask(lambda stack: _remote_client(address, tls, stack), None, patience_s)


def _local_client(workers: int, on_gpu: bool, stack: ExitStack) -> Client:
    """Nothing listens beyond 127.0.0.1: who reaches a scheduler runs code."""
    options: dict[str, Any] = {
        "n_workers": workers,
        "threads_per_worker": THREADS_PER_GPU if on_gpu else 1,
        "memory_limit": free_memory() // workers,
        "host": "127.0.0.1",
        "dashboard_address": None,
        "silence_logs": logging.CRITICAL,
        # No dashboard; the scheduler's health page still wants a port, and 8787 may be another's.
        "scheduler_kwargs": {"allowed_failures": ALLOWED_FAILURES, "dashboard_address": "127.0.0.1:0"},
    }
    cluster_class: Any = LocalCluster
    if on_gpu:
        cluster_class = cuda_cluster()
    stack.enter_context(dask.config.set(CONFIG_LOCAL))
    cluster = cluster_class(**options)
    stack.callback(_end, cluster)
    client: Client = stack.enter_context(Client(cluster, set_as_default=False))
    stack.callback(_settle, client, workers)
    return client


def _settle(client: Client, workers: int) -> None:
    """Wait until dead workers are back: the closing of one in the midst of its restart fails.

    One time in 20 right after a death (distributed 2026.8: `Process.join` of what has no pid yet).
    """
    with contextlib.suppress(TimeoutError, OSError, ValueError):  # not back in time; the scheduler is gone
        client.wait_for_workers(workers, timeout=RESTART_LIMIT_S)


def _end(cluster: Any) -> None:
    """Close the cluster; what a scan came to is not changed by a worker that dies at this very moment."""
    with contextlib.suppress(AssertionError):
        cluster.close()


def _remote_client(address: str, tls: Tls | None, stack: ExitStack) -> Client:
    logging.getLogger("distributed").setLevel(logging.CRITICAL)  # it tells at length what we tell in a line
    security = None
    if tls is not None:
        security = Security(
            tls_ca_file=str(tls.ca),
            tls_client_cert=str(tls.cert),
            tls_client_key=str(tls.key),
            require_encryption=True,
        )
    try:
        client: Client = stack.enter_context(
            Client(address, security=security, timeout=CONNECT_S, set_as_default=False)
        )
    except (OSError, TimeoutError, ValueError) as fault:
        raise UserError(
            f"no Dask scheduler answers at {address} ({' '.join(str(fault).split())[:200]}): "
            "start it, or scan with --workers",
            LOCKED,
        ) from None
    return client
