"""A short version of bench/faults.py: scans that are killed, refused and poisoned end with the same result.

The whole table, both executors each, is bench/results/faults.json.
"""

import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def faults() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))  # a script imports its neighbours by their plain names
        import faults

        patch.setattr(faults, "KILL_SEED", 8)  # three deaths, two of them between shard and receipt
        yield faults
    for name in ("faults", "report"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def sites(faults, tmp_path_factory):
    """The undisturbed run, and a plant with the same roll that nobody has scanned."""
    folder = tmp_path_factory.mktemp("faults")
    calm = faults.Site.make(folder / "calm")
    fresh = calm.copy(folder / "fresh")
    assert calm.scan("--threads", "1") == 0, calm.told
    fresh.calm = calm
    return calm, fresh


@pytest.mark.parametrize(
    ("scenario", "executor"),
    [
        ("killed_between_shard_and_receipt", "threads"),
        ("write_refused", "threads"),
        ("workers_killed", "dask"),
        ("poison_band", "dask"),
    ],
)
def test_the_result_is_that_of_an_undisturbed_scan(faults, sites, tmp_path, scenario, executor):
    calm, fresh = sites
    site = fresh.copy(tmp_path / "site")

    getattr(faults, scenario)(site, *faults.EXECUTORS[executor])

    told = faults.figures(site, calm)
    assert told["identical"], told
    assert (told["lost"], told["doubled"], told["committed"]) == (0, 0, faults.BANDS)
    assert told["executions"] >= faults.BANDS
    assert calm.result()[1].num_rows > 20  # there is something to compare
