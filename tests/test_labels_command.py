"""`inspect labels` as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

from PIL import Image
from rollsight.inspect.labelme import write_labelme
from rollsight.inspect.labels import open_labels


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
    below = inspect("split", str(labelled_folder), "--force", "--seed", "-1")

    assert refused.returncode == 2
    assert done.returncode == 0
    counts = json.loads(done.stdout)["counts"]
    assert sum(of_split["images"] for of_split in counts.values()) == 6
    assert all(of_split["images"] for of_split in counts.values())
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert (below.returncode, len(below.stderr.splitlines())) == (2, 1)
    assert "--seed" in below.stderr


def test_labels_go_out_and_come_back(labelled_folder: Path, tmp_path: Path) -> None:
    out, back = str(tmp_path / "out"), str(tmp_path / "back")
    sent = inspect("export", str(labelled_folder), "--format", "coco", "--out", out, "--json")
    got = inspect("import", out, "--format", "coco", "--out", back, "--json")

    assert (sent.returncode, json.loads(sent.stdout)["images"]) == (0, 6)
    assert (got.returncode, json.loads(got.stdout)["classes"]) == (0, ["pit", "scratch"])
    assert json.loads(got.stdout)["counts"]["train"] == {"images": 4, "pit": 2, "scratch": 2}


def test_import_names_every_broken_file_and_writes_nothing(labelled_folder: Path, tmp_path: Path) -> None:
    write_labelme(open_labels(labelled_folder), tmp_path / "out")
    (tmp_path / "out" / "val" / "4.png").unlink()
    (tmp_path / "out" / "test" / "5.json").write_text("{")
    done = inspect("import", str(tmp_path / "out"), "--format", "labelme", "--out", str(tmp_path / "back"))

    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 3
    assert "4.png: no such image" in done.stderr
    assert "5.json: not a Labelme file" in done.stderr
    assert not (tmp_path / "back").exists()


def test_what_the_shipped_model_proposed_and_a_person_reviewed_comes_back(tmp_path: Path) -> None:
    (tmp_path / "images" / "coil-7").mkdir(parents=True)
    Image.effect_noise((80, 72), 20).save(tmp_path / "images" / "coil-7" / "a.png")
    out, back = tmp_path / "out", tmp_path / "back"
    given = ("--images", str(tmp_path / "images"), "--out", str(out), "--home", str(tmp_path / "plant"))
    done = inspect("propose", "default", *given, "--json")
    [file] = out.glob("*.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"flags": {"reviewed": True}}))
    taken = inspect("import", str(out), "--format", "labelme", "--out", str(back))

    assert (done.returncode, json.loads(done.stdout)["images"]) == (0, 1)
    assert taken.returncode == 0
    assert b",coil-7," in (back / "manifest.csv").read_bytes()
    assert b":reviewed" in (back / "manifest.csv").read_bytes()
