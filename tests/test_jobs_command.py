"""`inspect jobs …` and `inspect rolls hold` as a user runs them; each mistake is one line."""

import json
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.errors import CONFIG, FAILED, LOCKED, PARTIAL, USAGE
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.jobs import cli
from rollsight.jobs.ledger.database import open_ledger
from rollsight.jobs.ledger.events import add_event
from sqlalchemy import text

LINE = "jobs: [{name: nightly, cron: '30 1 * * *', model: %s}]"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path):
    """Run `inspect ARGUMENTS --home HOME` in this process: exit code, lines on stdout, lines on stderr."""

    def inspect(*arguments: str, home: Path = tmp_path) -> tuple[int, list[str], list[str]]:
        monkeypatch.setattr(sys, "argv", ["inspect", *arguments, "--home", str(home)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        told = capsys.readouterr()
        code = end.value.code
        assert isinstance(code, int)
        return code, told.out.splitlines(), told.err.splitlines()

    return inspect


def make_roll(home: Path, roll_id: str) -> None:
    pixels = np.random.default_rng(0).integers(100, 140, (1, 100, 128), dtype=np.uint8)
    with RollWriter(
        Plant(home).roll_path(roll_id), Strip(roll_id, "top", ("bright",), 1.0, 1.0), 128, np.uint8
    ) as writer:
        writer.append(pixels)


def test_a_night_by_hand_then_a_look_by_the_doctor(run, tmp_path: Path) -> None:
    make_roll(tmp_path, "R1")
    code, out, err = run("jobs", "nightly")
    assert (code, err) == (0, [])
    assert any("R1" in line and "done" in line for line in out)
    assert out[-1].startswith("1 done: ") and out[-1].endswith("night.json")
    code, [line], _ = run("jobs", "nightly", "--json")
    assert (code, json.loads(line)["counts"]) == (0, {"done": 1})
    assert run("jobs", "doctor")[:2] == (0, ["receipts and ledger agree"])
    (tmp_path / "ledger.db").unlink()
    code, [line], _ = run("jobs", "doctor", "--look", "--json")
    assert (code, json.loads(line)["kind"]) == (PARTIAL, "adopted")
    assert run("jobs", "doctor")[0] == 0
    assert run("jobs", "doctor")[1] == ["receipts and ledger agree"]


def test_a_bad_roll_makes_a_night_partial(run, tmp_path: Path) -> None:
    make_roll(tmp_path, "R1")
    (tmp_path / "rolls/R2.zarr").mkdir()
    code, out, err = run("jobs", "nightly")
    assert code == PARTIAL
    assert any("R2" in line and "retry" in line for line in out)
    assert len(err) == 1 and "1 done, 1 retry" in err[0]
    assert run("jobs", "retry", "R2")[:2] == (0, ["due again: R2"])
    assert run("jobs", "retry", "--all")[:2] == (0, ["nothing to try again"])


def test_a_tick_and_a_slot_that_is_named(run, tmp_path: Path) -> None:
    (tmp_path / "line.yaml").write_text(LINE % "default")
    assert run("jobs", "tick")[:2] == (0, ["nothing was due"])
    at = ("--at", datetime.now(UTC).replace(microsecond=0).isoformat())
    code, out, _ = run("jobs", "run-slot", "nightly", *at)
    assert code == 0 and out[-1].startswith("nothing was due: ")
    code, [line], _ = run("jobs", "run-slot", "nightly", *at)
    assert code == 0 and line.endswith("has ended before: done")


def test_a_slot_that_is_named_begins_no_roll_after_its_deadline(run, tmp_path: Path) -> None:
    make_roll(tmp_path, "R1")
    (tmp_path / "line.yaml").write_text("jobs: [{name: nightly, cron: '30 1 * * *', deadline_h: 1}]")
    now = datetime.now(UTC)
    for hours, exit_code in ((2, PARTIAL), (0.5, 0)):
        at = (now - timedelta(hours=hours)).isoformat()
        code, out, err = run("jobs", "run-slot", "nightly", "--at", at)
        assert code == exit_code, err
    assert out[-1].startswith("1 done")


def test_a_roll_is_put_on_hold_and_released_and_rolls_still_lists(run, tmp_path: Path) -> None:
    make_roll(tmp_path, "R1")
    assert run("rolls", "hold", "R1", "--reason", "claim 7")[:2] == (
        0, ["roll R1 is on hold: nothing of it is deleted"],
    )  # fmt: skip
    code, [line], _ = run("rolls", "hold", "--json")
    held = json.loads(line)
    assert (code, held["roll_id"], held["reason"]) == (0, "R1", "claim 7")
    assert "on hold since" in run("rolls", "hold", "R1")[2][0]
    assert run("rolls", "hold", "R1", "--release")[:2] == (0, ["roll R1 is released"])
    assert "is not on hold" in run("rolls", "hold", "R1", "--release")[2][0]
    code, [line], _ = run("rolls", "--json")
    assert (code, json.loads(line)["roll_id"]) == (0, "R1")


def test_scan_takes_a_batch_of_rolls(run, tmp_path: Path) -> None:
    for roll_id in ("A1", "A2"):
        make_roll(tmp_path, roll_id)
    (tmp_path / "batch.csv").write_text("roll_id,priority\nA1,1\nA2,2\nA3,0\n")
    code, out, err = run("scan", "--batch", str(tmp_path / "batch.csv"), "--json")
    assert code == PARTIAL
    assert [json.loads(line)["roll_id"] for line in out] == ["A2", "A1"]
    assert err[-1] == "inspect: 1 of 3 rolls were not scanned"


def test_what_is_dropped_is_ingested(run, tmp_path: Path) -> None:
    entry = tmp_path / "drop" / "R1"
    entry.mkdir(parents=True)
    (entry / ".done").touch()
    code, out, err = run("jobs", "watch", str(tmp_path / "drop"), "--once", "--no-scan")
    assert (code, out) == (PARTIAL, [])
    assert err[0].startswith("inspect: R1: ") and len(err) == 2


def test_a_watch_goes_on_where_its_folder_was_away_and_follows_its_rules(tmp_path: Path) -> None:
    drop, rules = tmp_path / "drop", tmp_path / "rules.yaml"
    drop.mkdir()
    rules.write_text("limits: []")

    def put(roll_id: str) -> None:
        entry = drop / roll_id
        entry.mkdir()
        Image.fromarray(np.full((80, 128), 120, dtype=np.uint8)).save(entry / "0.png")
        (entry / "strip.json").write_text(json.dumps({"mm_per_px_x": 1, "mm_per_line": 1, "side": "top"}))
        (entry / ".done").touch()

    command = [sys.executable, "-m", "rollsight.jobs", "jobs", "watch", str(drop), "--rules", "rules.yaml"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    options = ("--every-s", "0.1", "--home", str(tmp_path))
    process = subprocess.Popen([*command, *options], text=True, **pipes)
    assert process.stdout is not None and process.stderr is not None
    put("R1")
    assert process.stdout.readline() == "ingested R1\n"
    assert process.stdout.readline().startswith("1 done")
    drop.rename(tmp_path / "away")
    assert str(drop) in process.stderr.readline()
    (tmp_path / "away").rename(drop)
    rules.write_text("limits: []  # edited")
    assert process.stdout.readline().startswith("1 done")
    process.terminate()
    assert process.wait(15) == LOCKED
    process.communicate()


def newer(home: Path) -> None:
    nothing(home)
    opened = open_ledger(None, Plant(home))
    with opened.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'v9999'"))
    opened.close()


def nothing(home: Path) -> None:
    """The plant has a folder for rolls, and none in it."""
    (home / "rolls").mkdir()


def not_mounted(home: Path) -> None:
    """The plant's disk is away: its mount point is an empty folder."""


def with_line(said: str):
    return lambda home: (home / "line.yaml").write_text(said)


def with_ledger(home: Path) -> None:
    nothing(home)
    open_ledger(None, Plant(home)).close()


READ_ONLY = ("--ledger", "sqlite:///file:HOME/ledger.db?mode=ro&uri=true")
TO_COME = ("run-slot", "nightly", "--at", "2999-01-01T00:00+00:00")
AWAY = ("--ledger", "postgresql+psycopg://u@127.0.0.1:1/x")
MISTAKES = {
    "bad cron": (with_line("jobs: [{name: n, cron: daily}]"), ("tick",), CONFIG, "cron 'daily' is no cron"),
    "unknown zone": (with_line("zone: Mars/Base"), ("tick",), CONFIG, "zone 'Mars/Base' is not known"),
    "no jobs": (nothing, ("run",), CONFIG, "line.yaml has no jobs: write one under `jobs:`"),
    "no jobs to tick": (nothing, ("tick",), CONFIG, "line.yaml has no jobs: write one under `jobs:`"),
    "tick, not mounted": (not_mounted, ("tick",), CONFIG, "neither rolls nor line.yaml: check whether its"),
    "night, not mounted": (not_mounted, ("nightly",), CONFIG, "neither rolls nor line.yaml: check whether"),
    "missing model": (nothing, ("nightly", "--model", "x9"), CONFIG, "no model 'x9': there are default"),
    "missing rules": (nothing, ("nightly", "--rules", "r.yaml"), CONFIG, "name one that is there"),
    "newer schema": (newer, ("nightly",), CONFIG, "has the schema v9999 of a newer version"),
    "read-only": (with_ledger, ("nightly", *READ_ONLY), CONFIG, "may not be written"),
    "server away": (nothing, ("doctor", *AWAY), LOCKED, "does not answer"),
    "other database": (nothing, ("tick", "--ledger", "mysql://h/x"), CONFIG, "is none that is known"),
    "unknown job": (nothing, ("run-slot", "n", "--at", "2026-11-24T01:30+01:00"), USAGE, "no job 'n'"),
    "no zone": (nothing, ("run-slot", "n", "--at", "2026-11-24T01:30"), USAGE, "it has no zone: write it"),
    "no moment": (nothing, ("run-slot", "n", "--at", "noon"), USAGE, "--at 'noon': it is a moment like"),
    "slot to come": (
        with_line(LINE % "default"),
        TO_COME,
        USAGE,
        "2999-01-01T00:00:00+00:00 is still to come",
    ),
    "endless night": (
        nothing,
        ("nightly", "--deadline-h", "1e9"),
        USAGE,
        "'--deadline-h': Input should be less than or equal to 8760",
    ),
    "endless page": (
        nothing,
        ("page", "--since-h", "1e9"),
        USAGE,
        "'--since-h': Input should be less than or equal to 8760",
    ),
    "retry of what": (nothing, ("retry",), USAGE, "name rolls, or say --all"),
    "retry of nothing": (nothing, ("retry", "R7"), FAILED, "roll 'R7' has nothing that was given up"),
    "no drop folder": (nothing, ("watch", "HOME/none", "--once"), USAGE, "name the folder that rolls are"),
    "live, no scan": (nothing, ("watch", "HOME", "--live", "--no-scan"), USAGE, "take one of them"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_line_and_its_exit_code(name: str, run, tmp_path: Path) -> None:
    prepare, arguments, exit_code, told = MISTAKES[name]
    prepare(tmp_path)
    code, out, err = run("jobs", *(argument.replace("HOME", str(tmp_path)) for argument in arguments))
    assert code == exit_code
    assert out == []
    assert len(err) == 1 and told in err[0], err
    if prepare is not_mounted:
        assert list(tmp_path.iterdir()) == [], "no ledger is made there"


@pytest.mark.parametrize(
    "command",
    (
        "scan R1", "scan R* --dry-run", "scan --since 36h", "rolls", "rolls hold", "models promote m",
        "models rollback", "jobs nightly", "jobs tick", "jobs run", "jobs status", "jobs doctor",
        "jobs retry R1", "jobs page", "jobs alerts", "jobs retention", "jobs metrics", "jobs export cron",
    ),
)  # fmt: skip
def test_a_plant_folder_that_is_misspelt_is_told_and_not_made(command: str, run, tmp_path: Path) -> None:
    home = tmp_path / "plnat"
    code, out, [err] = run(*command.split(), home=home)
    assert (code, out) == (CONFIG, [])
    assert err.startswith(f"inspect: no plant folder at {home}: name one with --home")
    assert not home.exists()


def test_a_missing_model_of_the_schedule_is_told_by_the_tick(run, tmp_path: Path) -> None:
    (tmp_path / "line.yaml").write_text(LINE % "x9")
    at = ("--at", "2026-11-24T01:30+01:00")
    code, _, [err] = run("jobs", "run-slot", "nightly", *at)
    assert (code, "no model 'x9'" in err) == (CONFIG, True)
    code, out, [err] = run("jobs", "run-slot", "nightly", *at)
    assert (code, out, err.endswith("has ended before: failed")) == (CONFIG, [], True)
    code, [line], _ = run("jobs", "run-slot", "nightly", *at, "--json")
    assert (code, json.loads(line)["state"]) == (CONFIG, "failed")


def test_a_tick_tells_of_moments_that_it_left_out(run, tmp_path: Path) -> None:
    (tmp_path / "line.yaml").write_text(LINE.replace("}]", ", catch_up: none}]") % "default")
    opened = open_ledger(None, Plant(tmp_path))
    with opened.write() as session:
        add_event(session, datetime.now(UTC) - timedelta(hours=50), "job.seen", detail="nightly")
    opened.close()
    code, [line], _ = run("jobs", "tick")
    assert (code, line.split(": ")[0]) == (0, "left out, as catch_up, max_age_h or deadline_h say")
    assert run("jobs", "tick")[1] == ["nothing was due"]


def test_a_reference_strip_is_made_and_not_replaced_unasked(run, tmp_path: Path) -> None:
    make = ("jobs", "reference", "--length-m", "0.5", "--width-px", "128")
    assert run(*make)[0] == 0
    assert (tmp_path / "reference.zarr/zarr.json").is_file()
    code, _, [err] = run(*make)
    assert (code, "exists" in err) == (USAGE, True)
    assert run(*make, "--overwrite")[0] == 0
