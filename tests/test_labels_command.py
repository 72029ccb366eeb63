"""`inspect labels` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image


def inspect(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rollsight.jobs", "labels", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_check_names_a_turned_twin_in_another_split_and_fails(labelled_folder: Path) -> None:
    twin = Image.open(labelled_folder / "0.png").transpose(Image.Transpose.ROTATE_180)
    twin.save(labelled_folder / "5.png")
    done = inspect("check", str(labelled_folder))

    assert done.returncode == 1
    assert "0.png" in done.stdout
    assert "5.png" in done.stdout
    assert "turned by 180" in done.stdout
    assert len(done.stderr.splitlines()) == 1


def test_check_of_sound_data_ends_well(labelled_folder: Path) -> None:
    done = inspect("check", str(labelled_folder), "--json")

    assert done.returncode == 0
    assert json.loads(done.stdout)["images"] == 6


def test_split_writes_a_manifest_and_keeps_the_one_that_is_there(labelled_folder: Path) -> None:
    refused = inspect("split", str(labelled_folder))
    done = inspect("split", str(labelled_folder), "--shares", "0.5,0.25,0.25", "--force", "--json")
    wrong = inspect("split", str(labelled_folder), "--shares", "a,b")

    assert refused.returncode == 2
    assert done.returncode == 0
    counts = json.loads(done.stdout)["counts"]
    assert sum(of_split["images"] for of_split in counts.values()) == 6
    assert all(of_split["images"] for of_split in counts.values())
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
