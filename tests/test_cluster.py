"""The loop over an executor."""

import threading

import pytest
from rollsight.jobs.cluster import IN_FLIGHT, run_threads


def test_every_task_gives_its_result_once() -> None:
    assert sorted(run_threads(lambda n: n * n, range(50), 3)) == [n * n for n in range(50)]


def test_no_more_tasks_are_begun_than_twice_the_slots() -> None:
    """A roll of a million lines must not queue a million bands."""
    begun = 0

    def tasks() -> object:
        nonlocal begun
        for n in range(100):
            begun += 1
            yield n

    results = run_threads(lambda n: n, tasks(), 2)  # type: ignore[arg-type,var-annotated]
    next(results)
    assert begun <= 2 * IN_FLIGHT + 1
    results.close()  # type: ignore[attr-defined]


def test_an_error_ends_the_loop_and_waiting_tasks_are_dropped() -> None:
    done: list[int] = []
    gate = threading.Event()

    def work(n: int) -> int:
        if n == 0:
            raise RuntimeError("band 0")
        gate.wait(0.2)
        done.append(n)
        return n

    with pytest.raises(RuntimeError, match="band 0"):
        list(run_threads(work, range(100), 2))
    assert len(done) <= 2 * IN_FLIGHT
