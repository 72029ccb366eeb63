"""The loop over an executor, and which executor is taken."""

import threading
from collections.abc import Iterator

import psutil
import pytest
from rollsight.inspect.errors import LOCKED, USAGE, UserError
from rollsight.jobs.cluster import IN_FLIGHT, Threads, Tls, free_memory, slots, window
from rollsight.jobs.executors import open_executor


@pytest.fixture
def two_threads() -> Iterator[Threads]:
    executor = Threads(2)
    yield executor
    executor.close()


def test_every_task_gives_its_result_once(two_threads: Threads) -> None:
    results = {task: future.result() for task, future in window(two_threads, lambda n: n * n, range(50))}
    assert results == {n: n * n for n in range(50)}


def test_no_more_tasks_are_begun_than_twice_the_slots(two_threads: Threads) -> None:
    """A roll of a million lines must not queue a million bands."""
    begun = 0

    def tasks() -> Iterator[int]:
        nonlocal begun
        for n in range(100):
            begun += 1
            yield n

    results = window(two_threads, lambda n: n, tasks())
    next(results)
    assert begun <= 2 * IN_FLIGHT + 1
    results.close()


def test_an_error_ends_the_loop_and_waiting_tasks_are_dropped(two_threads: Threads) -> None:
    done: list[int] = []
    gate = threading.Event()

    def work(n: int) -> int:
        if n == 0:
            raise RuntimeError("band 0")
        gate.wait(0.2)
        done.append(n)
        return n

    results = window(two_threads, work, range(100))
    with pytest.raises(RuntimeError, match="band 0"):
        for _, future in results:
            future.result()
    results.close()
    finished = len(done)
    assert finished <= 2 * IN_FLIGHT
    gate.wait(0.3)
    assert len(done) == finished  # what ran was waited for


class Stalls(Threads):
    """Threads that answer nothing until they are revived `needed` times."""

    patience_s = 0.05

    def __init__(self, needed: int) -> None:
        super().__init__(2)
        self.needed, self.revived, self.released = needed, 0, threading.Event()

    def submit(self, work, task):
        if self.revived < self.needed:
            return self._pool.submit(self.released.wait)
        return super().submit(work, task)

    def revive(self) -> None:
        self.revived += 1
        self.released.set()  # threads cannot be left behind as processes can
        self.close()
        self.released.clear()
        self._open(2)


def test_an_executor_from_which_nothing_comes_back_is_revived_once_and_no_task_is_lost() -> None:
    executor = Stalls(needed=1)
    results = {task: future.result() for task, future in window(executor, lambda n: -n, range(9))}
    assert results == {n: -n for n in range(9)}
    assert executor.revived == 1
    executor.close()


def test_where_reviving_does_not_help_the_scan_ends_with_try_later() -> None:
    executor = Stalls(needed=2)
    results = window(executor, lambda n: -n, range(9))
    threading.Timer(0.5, executor.released.set).start()
    with pytest.raises(UserError, match="no band came back") as fault:
        next(results)
    assert fault.value.exit_code == LOCKED
    executor.close()


class Mortal(Threads):
    """Threads in which a task that raises ZeroDivisionError counts as one whose workers died."""

    deaths = (ZeroDivisionError,)


def test_a_task_whose_workers_died_runs_once_more_alone_after_all_others() -> None:
    began: list[int] = []

    def work(n: int) -> float:
        began.append(n)
        return 1 / n if n != 2 or began.count(2) == 2 else 1 / 0

    executor = Mortal(2)
    ends = {task: future.exception() is None for task, future in window(executor, work, range(6))}
    assert ends == {0: False, 1: True, 2: True, 3: True, 4: True, 5: True}
    assert sorted(began[-2:]) == [0, 2]
    assert sorted(began) == [0, 0, 1, 2, 2, 3, 4, 5]
    executor.close()


def test_threads_are_the_default_and_as_many_as_there_are_cores() -> None:
    with open_executor() as executor:
        assert (executor.name, executor.in_process, executor.slots()) == ("threads", True, slots())


def test_the_free_memory_is_what_the_system_says_less_a_margin() -> None:
    assert 0 < free_memory() < psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"workers": 2, "scheduler": "tcp://127.0.0.1:1"}, "one of them"),
        ({"workers": 2, "threads": 2}, "one of them"),
        ({"scheduler": "http://127.0.0.1:1"}, "tcp://HOST:PORT"),
        ({"scheduler": "127.0.0.1:8786"}, "tcp://HOST:PORT"),
        ({"scheduler": "tls://127.0.0.1:1"}, "--tls-ca"),
        ({"tls": True}, "--scheduler"),
        ({"tls": True, "scheduler": "tcp://127.0.0.1:1"}, "tls://HOST:PORT"),
        ({"tls": True, "scheduler": "tls://127.0.0.1:1"}, "no such file"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_starts(tmp_path, asked, told) -> None:
    if "tls" in asked:
        asked = {**asked, "tls": Tls(*(tmp_path / name for name in ("ca.pem", "cert.pem", "key.pem")))}
    with pytest.raises(UserError, match=told) as fault, open_executor(**asked):
        pass
    assert fault.value.exit_code == USAGE
