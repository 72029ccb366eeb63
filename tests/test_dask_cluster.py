"""Dask as an executor: the same result, in local processes and on a scheduler that is already there."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from distributed import Future, Security
from rollsight.inspect.errors import CONFIG, LOCKED, USAGE, UserError
from rollsight.inspect.models import Model, open_model
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import Roll, open_roll
from rollsight.jobs import dask_cluster, workers
from rollsight.jobs.cluster import Tls
from rollsight.jobs.dask_cluster import CONFIG_LOCAL, Dask, cuda_cluster, local, remote
from rollsight.jobs.executors import open_executor
from rollsight.jobs.scan_job import Run, _job, plan_roll, scan_roll
from rollsight.synth.strip import SimulatedStrip, simulate_roll

ROOT = Path(__file__).parent.parent
BANDS, BAND = 10, 64
SMALL = {"core_lines": BAND, "band_lines": BAND, "engine": "onnx", "device": "cpu"}
DASK = str(Path(sys.executable).parent / "dask")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A simulated roll full of defects: ten bands of 64 lines, the last one short."""
    path = Plant(tmp_path_factory.mktemp("drawn")).roll_path("R")
    metres = (BANDS * BAND - 10) / 1000
    simulate_roll(path, SimulatedStrip(metres, 5, width_px=320, density=8, blackouts=()))
    return path


@pytest.fixture
def plant(tmp_path: Path, drawn: Path) -> Plant:
    """A plant with that roll, which nobody has scanned."""
    plant = Plant(tmp_path / "plant")
    shutil.copytree(drawn, plant.roll_path("R"))
    return plant


@pytest.fixture(scope="module")
def model() -> Model:
    return open_model("default", ROOT)


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, drawn: Path, model: Model) -> tuple[Roll, Run]:
    """The roll scanned on threads."""
    plant = Plant(tmp_path_factory.mktemp("calm"))
    roll = open_roll(shutil.copytree(drawn, plant.roll_path("R")))
    return roll, scan_roll(plant, roll, model, threads=1, **SMALL)


def same(run: Run, roll: Roll, calm: tuple[Roll, Run]) -> bool:
    """Equal run id, mask and defect table, of which there is something to compare."""
    roll_calm, run_calm = calm
    run_id = run_calm.summary["run_id"]
    assert run_calm.table.num_rows > 5
    mask, mask_calm = (r.read_label(run_id, 0, r.lines) for r in (roll, roll_calm))
    return run.table.equals(run_calm.table) and np.array_equal(mask, mask_calm)


@pytest.fixture(scope="module")
def two_processes() -> Iterator[Dask]:
    executor = local(2)
    yield executor
    executor.close()


def test_local_processes_give_the_mask_and_table_of_threads(plant, model, two_processes, calm):
    roll = plant.roll("R")
    run = scan_roll(plant, roll, model, two_processes, **SMALL)

    assert run.summary["executor"] == "dask"
    assert same(run, roll, calm)


def test_a_model_is_loaded_once_per_process_and_again_by_one_that_is_restarted(plant, model, two_processes):
    roll = plant.roll("R")
    client = two_processes._client

    def ask(question: Callable[[], int]) -> list[int]:
        return sorted(client.run(question, on_error="ignore").values())

    def loads() -> list[int]:
        return ask(lambda: workers._engine.cache_info().misses)

    scan_roll(plant, roll, model, two_processes, **SMALL)
    assert loads() == [1, 1]
    killed = ask(os.getpid)[0]
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(ask(os.getpid)) == 2 and killed not in ask(os.getpid))
    wait_until(lambda: loads() == [1, 1])  # by the plugin: no band was asked for


def test_workers_are_spawned_with_one_thread_per_library_and_their_memory_is_not_trimmed(two_processes):
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_")
    for environment in two_processes._client.run(lambda: dict(os.environ)).values():
        assert [environment[name] for name in names] == ["1", "1", "1", str(2**32)]
    assert set(two_processes._client.nthreads().values()) == {1}
    assert CONFIG_LOCAL["distributed.worker.multiprocessing-method"] == "spawn"


def test_processes_are_closed_once_dead_ones_are_back(monkeypatch, capfd):
    """Dask fails at the closing of a worker in the midst of its restart, one time in 20 after a death."""
    executor = local(2)
    client, there = executor._client, []
    closing = client.close

    def close(*arguments: Any, **options: Any) -> Any:
        there.append(len(client.nthreads()))
        return closing(*arguments, **options)

    monkeypatch.setattr(client, "close", close)
    killed = min(client.run(os.getpid).values())
    os.kill(killed, signal.SIGKILL)
    wait_until(lambda: len(client.nthreads()) < 2)
    executor.close()

    assert there[0] == 2
    assert capfd.readouterr().err == ""


def test_nothing_listens_beyond_this_machine(two_processes):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = [
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 2
    assert set(listening) == {"127.0.0.1"}


def test_tasks_and_results_are_small(plant, model, two_processes):
    roll = plant.roll("R")
    job = _job(plan_roll(plant, roll, model, two_processes, engine="onnx"), two_processes)

    assert len(pickle.dumps(job)) < 4000
    assert len(pickle.dumps(workers.Fault("x" * workers.MAX_FAULT, True))) < 1000


def test_a_device_of_a_number_is_refused_where_workers_have_one_each(plant, model, two_processes):
    roll = plant.roll("R")
    with pytest.raises(UserError, match="a GPU of its own") as fault:
        plan_roll(plant, roll, model, two_processes, device="cuda:1")
    assert fault.value.exit_code == USAGE


def test_a_missing_gpu_is_named_before_any_process_starts():
    with pytest.raises(UserError, match="CUDA") as fault, open_executor(workers=2, device="cuda"):
        pass
    assert fault.value.exit_code == CONFIG


@pytest.mark.skipif(find_spec("dask_cuda") is not None, reason="dask-cuda is installed here")
def test_gpu_workers_without_dask_cuda_are_told_what_to_install():
    with pytest.raises(UserError, match=r"pip install 'rollsight\[gpu\]'") as fault:
        cuda_cluster()
    assert fault.value.exit_code == CONFIG


def wait_until(true: Callable[[], bool], seconds: float = 120) -> None:
    limit = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.fixture(scope="module")
def tls(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    """An authority, a certificate and its key."""
    folder, made = tmp_path_factory.mktemp("tls"), Security.temporary()
    files = Tls(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    files.ca.write_text(made.tls_ca_file)
    files.cert.write_text(made.tls_client_cert)
    files.key.write_text(made.tls_client_key)
    return files


class Cluster:
    """A scheduler and workers, each a process that this test started."""

    def __init__(self, folder: Path, tls: Tls | None = None) -> None:
        self._file = folder / "scheduler.json"
        self._log = (folder / "log").open("w")
        self._options: list[str] = []
        if tls is not None:
            self._options = ["--tls-ca-file", tls.ca, "--tls-cert", tls.cert, "--tls-key", tls.key]
        self.processes: list[subprocess.Popen[bytes]] = []
        place = ["--protocol", "tls" if tls else "tcp", "--host", "127.0.0.1", "--port", "0"]
        self.scheduler = self._start("scheduler", *place, "--no-dashboard")
        wait_until(lambda: self._file.is_file() and self._file.read_text().endswith("}"))
        self.address = json.loads(self._file.read_text())["address"]

    def _start(self, *arguments: object, **env: str) -> subprocess.Popen[bytes]:
        command = [DASK, *map(str, arguments), "--scheduler-file", str(self._file), *map(str, self._options)]
        process = subprocess.Popen(command, env=os.environ | env, stdout=self._log, stderr=self._log)
        self.processes.append(process)
        return process

    def add_worker(self, name: str, **env: str) -> None:
        place = ["--host", "127.0.0.1", "--nthreads", 1, "--no-dashboard", "--no-nanny"]
        self._start("worker", "--name", name, *place, **env)

    def end(self) -> None:
        for process in self.processes:  # each is one process: --no-nanny
            process.kill()
            process.wait(60)
        self._log.close()


@pytest.fixture
def start_cluster(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    with contextlib.ExitStack() as stack:

        def start(**options: Any) -> Cluster:
            cluster = Cluster(tmp_path, **options)
            stack.callback(cluster.end)
            return cluster

        yield start


@pytest.fixture(scope="module")
def other_version(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds another rollsight: other code, which sees another CPU."""
    folder = tmp_path_factory.mktemp("other")
    for floor in ("inspect", "synth", "jobs"):
        shutil.copytree(ROOT / floor, folder / "rollsight" / floor)
    engines = folder / "rollsight" / "inspect" / "engines.py"
    text = engines.read_text()
    changed = text.replace('return f"{platform.machine()} {widest}"', 'return "riscv64 rvv"')
    assert changed != text
    engines.write_text(changed)
    return {"PYTHONPATH": str(folder)}


def test_an_existing_scheduler_under_tls_gives_the_same_result(plant, model, calm, tls, start_cluster):
    cluster = start_cluster(tls=tls)
    cluster.add_worker("a")
    cluster.add_worker("b")
    roll = plant.roll("R")
    with open_executor(scheduler=cluster.address, tls=tls) as executor:
        run = scan_roll(plant, roll, model, executor, **SMALL)
        client = executor._client
        [plugins] = {
            tuple(found) for found in client.run(lambda dask_worker: [*dask_worker.plugins]).values()
        }
    assert cluster.address.startswith("tls://")
    assert any(name.startswith(f"rollsight-{model.hash[:12]}") for name in plugins)
    assert same(run, roll, calm)


def test_a_worker_of_another_version_or_cpu_is_refused_by_name_before_any_band(
    plant, model, calm, start_cluster, other_version
):
    cluster = start_cluster()
    cluster.add_worker("good")
    cluster.add_worker("other", **other_version)
    roll = plant.roll("R")
    executor = remote(cluster.address)
    with contextlib.closing(executor):
        wait_until(lambda: len(executor._client.nthreads()) == 2)
        addresses = {worker["name"]: a for a, worker in executor._client.scheduler_info()["workers"].items()}
        with pytest.raises(UserError) as fault:
            scan_roll(plant, roll, model, executor, **SMALL)
    _, run = calm
    plan = json.loads((run.folder / "plan.json").read_text())
    assert fault.value.exit_code == CONFIG
    assert str(fault.value).startswith(f"worker {addresses['other']}: code is ")
    assert f"needed {plan['code']}" in str(fault.value)
    assert f"isa is riscv64 rvv, needed {plan['isa']}" in str(fault.value)
    assert not list(plant.home.glob("runs/*/*/bands/*"))


def test_a_worker_of_another_version_that_joins_in_mid_scan_ends_it_by_name(
    plant, model, calm, start_cluster, other_version
):
    cluster = start_cluster()
    cluster.add_worker("good")
    roll = plant.roll("R")
    executor = remote(cluster.address)
    joined = threading.Event()

    def join(done: int, lines: int) -> None:
        if done and not joined.is_set():
            joined.set()
            cluster.add_worker("late", **other_version)
            wait_until(lambda: len(executor._client.nthreads()) == 2)
            client = executor._client
            addresses = {worker["name"]: a for a, worker in client.scheduler_info()["workers"].items()}
            # Busy, so that the late one gets a band before all are done.
            busy.append(client.submit(time.sleep, 3, workers=[addresses["good"]], priority=9, pure=False))

    busy: list[Future] = []
    told = r"worker tcp://.*: code is .*isa is riscv64 rvv, needed"
    with contextlib.closing(executor), pytest.raises(UserError, match=told) as fault:
        scan_roll(plant, roll, model, executor, on_band=join, **SMALL)
    assert fault.value.exit_code == CONFIG
    kept = len(list(plant.home.glob("runs/*/*/bands/*.json")))
    assert 0 < kept < BANDS
    assert same(scan_roll(plant, roll, model, threads=1, **SMALL), roll, calm)


def test_a_scheduler_that_ends_in_mid_scan_loses_nothing(plant, model, calm, start_cluster):
    cluster = start_cluster()
    cluster.add_worker("a")
    roll = plant.roll("R")

    def end(done: int, lines: int) -> None:
        if done:
            cluster.scheduler.kill()

    with (
        pytest.raises(UserError, match="scheduler is gone") as fault,
        open_executor(scheduler=cluster.address) as executor,
    ):
        scan_roll(plant, roll, model, executor, on_band=end, **SMALL)
    assert fault.value.exit_code == LOCKED
    assert same(scan_roll(plant, roll, model, threads=1, **SMALL), roll, calm)


def test_workers_that_are_all_gone_in_mid_scan_are_one_line_and_try_later(
    plant, model, calm, start_cluster, monkeypatch
):
    """A new connection does not help either: nothing comes to the scheduler that works."""
    cluster = start_cluster()
    cluster.add_worker("a")
    roll = plant.roll("R")

    def end(done: int, lines: int) -> None:
        if done:
            monkeypatch.setattr(dask_cluster, "WORKERS_S", 1)
            cluster.processes[-1].kill()

    executor = remote(cluster.address, patience_s=5)
    with contextlib.closing(executor), pytest.raises(UserError, match="has no workers") as fault:
        scan_roll(plant, roll, model, executor, on_band=end, **SMALL)
    assert fault.value.exit_code == LOCKED
    assert same(scan_roll(plant, roll, model, threads=1, **SMALL), roll, calm)


def test_a_scheduler_that_does_not_answer_is_one_line_and_try_later():
    with pytest.raises(UserError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 ") as fault:
        remote("tcp://127.0.0.1:1")
    assert fault.value.exit_code == LOCKED
