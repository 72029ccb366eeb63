"""The command as a user runs it: real processes, one clear line and an exit code for each mistake."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from rollsight.inspect.rolls import RollWriter, Strip

BENCH = Path(__file__).parent.parent / "bench"

SCAN_KEYS = {
    "roll_id", "run_id", "engine", "executor", "length_m", "width_mm", "coverage", "defects", "by_class",
    "seconds", "mpix_s", "peak_rss_mb", "verdict", "reasons", "table", "page",
}  # fmt: skip


def inspect(home: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `inspect ARGUMENTS --home HOME`."""
    command = [sys.executable, "-m", "rollsight.jobs", *arguments, "--home", str(home)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plant with one short simulated roll."""
    folder = tmp_path_factory.mktemp("plant")
    assert (
        inspect(folder, "simulate", "R1", "--length-m", "1.5", "--seed", "4", "--width-px", "400").returncode
        == 0
    )
    return folder


def test_scan_prints_one_json_line_with_the_agreed_keys_and_nothing_else(home: Path) -> None:
    done = inspect(home, "scan", "R1", "--json")
    assert done.returncode == 0
    assert done.stderr == ""
    [line] = done.stdout.splitlines()
    result = json.loads(line)
    assert set(result) == SCAN_KEYS
    assert result["engine"] == "onnx"
    assert result["executor"] == "threads"
    assert result["length_m"] == pytest.approx(1.5)
    assert result["coverage"] == pytest.approx(1.0, abs=0.01)
    assert sum(result["by_class"].values()) == result["defects"]
    assert result["verdict"] in ("HOLD", "UNGRADED")
    assert Path(result["table"]).is_file()
    assert Path(result["page"]).read_text().startswith("<!doctype html>")


def test_scan_tells_a_person_size_coverage_verdict_and_page(home: Path) -> None:
    done = inspect(home, "scan", "R1")
    assert done.returncode == 0
    assert "1.5 m" in done.stdout
    assert "coverage" in done.stdout
    assert "VERDICT" in done.stdout
    assert "report.html" in done.stdout


def test_the_torch_engine_finds_the_same_defects(home: Path) -> None:
    onnx, torch = (
        json.loads(inspect(home, "scan", "R1", "--json", "--engine", e).stdout) for e in ("onnx", "torch")
    )
    assert torch["engine"] == "torch"
    assert torch["run_id"] != onnx["run_id"]
    assert torch["by_class"] == onnx["by_class"]


def test_a_dry_run_with_along_strip_plans_that_scan(home: Path) -> None:
    """It is another run than the one without, which may be done already."""
    inspect(home, "scan", "R1")
    along = ("scan", "R1", "--along-strip", "scratches", "--json")

    plan = json.loads(inspect(home, *along, "--dry-run").stdout)
    unknown = inspect(home, "scan", "R1", "--along-strip", "rust", "--dry-run")
    run = json.loads(inspect(home, *along).stdout)

    assert (plan["run_id"], plan["bands_done"]) == (run["run_id"], 0)
    assert (unknown.returncode, unknown.stderr.count("\n")) == (2, 1)
    assert "--along-strip rust: model " in unknown.stderr


def test_rolls_lists_the_roll_and_its_runs(home: Path) -> None:
    run_id = json.loads(inspect(home, "scan", "R1", "--json").stdout)["run_id"]
    [line] = inspect(home, "rolls", "--json").stdout.splitlines()
    row = json.loads(line)
    assert (row["roll_id"], row["lines"], row["width_px"]) == ("R1", 1500, 400)
    assert run_id in row["runs"] and not row["growing"]


def test_rolls_lists_what_grows_and_ends_with_3_where_one_cannot_be_read(home: Path, tmp_path: Path) -> None:
    rolls = tmp_path / "rolls"
    writer = RollWriter(rolls / "R2.zarr", Strip("R2", "top", ("bright",), 1.0, 1.0), 64, np.uint8, live=True)
    writer.append(np.zeros((1, 4096, 64), dtype=np.uint8))
    (rolls / "R3.zarr").mkdir()
    for age, name in enumerate(("b", "c", "a")):
        (page := tmp_path / "runs" / "R2" / name / "report.html").parent.mkdir(parents=True)
        page.touch()
        os.utime(page, (age, age))

    told = inspect(tmp_path, "rolls", "--json")

    assert (told.returncode, told.stderr.count("\n")) == (3, 1) and "R3" in told.stderr
    [row] = [json.loads(line) for line in told.stdout.splitlines()]
    assert (row["roll_id"], row["growing"], row["runs"]) == ("R2", True, ["b", "c", "a"])
    assert "R2 (growing)" in inspect(tmp_path, "rolls").stdout


def test_models_lists_the_shipped_models_with_their_cards(home: Path) -> None:
    rows = [json.loads(line) for line in inspect(home, "models", "--json").stdout.splitlines()]
    assert [row["name"] for row in rows] == ["default", "fast"]
    for row in rows:
        assert {"inclusion", "patches", "scratches"} <= set(row["card"]["classes"])


def test_the_demonstration_takes_a_model_and_refuses_an_unknown_one_first(
    tmp_path: Path,
) -> None:
    done = inspect(tmp_path / "demo", "demo", "--length-m", "1", "--model", "fast")
    assert done.returncode == 0, done.stderr
    assert "--model fast" in done.stdout + done.stderr
    [summary] = (tmp_path / "demo").glob("runs/*/*/summary.json")
    assert json.loads(summary.read_text())["model"] == "fast-strip-2"

    refused = inspect(tmp_path / "none", "demo", "--model", "no-such")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "there are default, fast" in refused.stderr
    assert not list((tmp_path / "none").glob("rolls/*.zarr"))


def test_evaluate_prints_the_agreed_keys(home: Path, tmp_path: Path) -> None:
    """On the simulated roll itself, whose truth is known."""
    done = inspect(
        home, "evaluate", "default", "--data", str(home / "rolls" / "R1.zarr"), "--split", "test", "--json"
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["n_images"] > 0
    assert set(figures["pixel"]["iou"]) >= {"inclusion", "patches", "scratches"}
    assert {"recall_h", "precision_h", "f1_h"} <= set(figures["instance"])
    for size in ("tiny", "small", "tiny_small", "medium", "large"):
        assert {"recall", "n", "low", "high"} <= set(figures["instance"]["recall_by_size"][size])
    assert {"per_mpx", "clean_images"} <= set(figures["false_alarms"])
    assert figures["thresholds"]["scratches"] > 0


@pytest.fixture
def bad_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCH))  # a script imports its neighbours by their plain names
    import bad_input

    yield bad_input
    for name in ("bad_input", "report"):
        sys.modules.pop(name, None)


def test_each_mistake_is_one_line_and_its_exit_code(
    home: Path, tmp_path: Path, bad_input: ModuleType
) -> None:
    for name, (arguments, code, named) in bad_input.mistakes(home, tmp_path).items():
        done = inspect(home, *arguments)
        lines = done.stderr.splitlines()
        assert (name, done.returncode) == (name, code), done.stderr
        assert len(lines) == 1, (name, done.stderr)
        assert named in lines[0], (name, lines[0])
        assert "Traceback" not in done.stderr
    assert not (home / "rolls" / "X.zarr").exists()


def test_corrupt_zarr_metadata_is_one_line_that_names_the_roll(home: Path, tmp_path: Path) -> None:
    inspect(tmp_path, "simulate", "R2", "--length-m", "0.2", "--width-px", "200")
    (tmp_path / "rolls" / "R2.zarr" / "0" / "zarr.json").write_text(
        '{"zarr_format": 3, "shape": [1, 9e99, 4]}'
    )
    done = inspect(tmp_path, "scan", "R2")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "R2.zarr" in done.stderr


def test_one_bad_roll_does_not_stop_the_others_and_the_exit_code_says_partial(home: Path) -> None:
    done = inspect(home, "scan", "nope", "R1", "--json")
    assert done.returncode == 3
    assert json.loads(done.stdout)["roll_id"] == "R1"
    assert "nope" in done.stderr


def _interruptible() -> None:
    """A test run that a script put into the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_in_one_line_and_the_same_command_goes_on(tmp_path: Path) -> None:
    inspect(tmp_path, "simulate", "R", "--length-m", "12", "--width-px", "640")
    command = [sys.executable, "-m", "rollsight.jobs", "scan", "R", "--band-lines", "1024", "--threads", "1"]
    command += ["--home", str(tmp_path)]
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=_interruptible,
    )
    receipts: list[Path] = []
    limit = time.monotonic() + 60
    while not receipts and time.monotonic() < limit:
        receipts = list((tmp_path / "runs").glob("R/*/bands/*.json"))
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.splitlines() == [
        "inspect: interrupted; the same command goes on where it scans, ingests, learns or proves, "
        "else it starts over"
    ]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("R/*/bands/*.json")}
    assert 0 < len(kept) < 12
    assert inspect(tmp_path, "scan", "R").returncode == 0
    assert {path: path.stat().st_mtime_ns for path in kept} == kept  # committed once


def test_home_comes_from_the_environment(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    environment = {**os.environ, "ROLLSIGHT_HOME": str(tmp_path / "site")}
    command = [sys.executable, "-m", "rollsight.jobs", "rolls", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert (tmp_path / "site" / "rolls").is_dir()
