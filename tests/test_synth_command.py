"""`inspect synth` as a user types it: fit, make, remake, check; one line for what cannot be done."""

import json
import shutil
import subprocess
import sys
import time
from inspect import signature

import numpy as np
import pytest
import zarr
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.rolls import LabelWriter
from rollsight.jobs.cli import app
from rollsight.jobs.commands.synth import prove
from rollsight.synth.proof import Plan


def inspect(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def fitted(few_scenes, tmp_path, capsys):
    """A plant with a generator of scratches after one step."""
    home = tmp_path / "plant"
    inspect("synth", "fit", "scratch", "--labels", few_scenes, "--steps", 1, "--threads", 1, "--home", home)
    said = capsys.readouterr().err
    assert "3 components, 30 are needed from scratch: begins from the generic generator" in said
    assert "3 marks, a mask GAN is fitted from 50 on: outlines of the bank only" in said
    return home


def test_fit_make_remake_and_check(few_scenes, fitted, tmp_path, capsys, monkeypatch):
    made = tmp_path / "made"
    options = ("--backgrounds", few_scenes, "--home", fitted, "--out", made, "--seed", 4, "--json")

    inspect("synth", "make", "scratch", "-n", 3, *options)
    assert json.loads(capsys.readouterr().out)["card"]["samples"] == 3
    inspect("synth", "make", "scratch", "--only", 2, *options)
    assert json.loads(capsys.readouterr().out)["same"] is True
    with pytest.raises(
        UserError, match=r"sample 2 is another one: .*: give the options, generator and steel"
    ):
        inspect("synth", "make", "scratch", "--only", 2, *options, "--marks", 5)
    with pytest.raises(UserError, match=r"--only 9: .* has 0 to 2"):
        inspect("synth", "make", "scratch", "--only", 9, *options)

    with pytest.raises(UserError, match=r"scratch has none, 3 marks .*: give --outlines bank or both"):
        inspect("synth", "make", "scratch", "--only", 2, *options, "--outlines", "gan")

    monkeypatch.chdir(made)
    inspect("synth", "check", ".", "--labels", few_scenes, "--steps", 0, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 3 and (tmp_path / "made.check.html").is_file()

    [image] = (made / "train" / "images").glob("*-00002.png")
    with Image.open(image) as found:
        Image.new("L", found.size, 110).save(image)
    with pytest.raises(UserError, match="sample 2 was changed since it was made"):
        inspect("synth", "make", "scratch", "--only", 2, *options)


def test_a_set_that_is_told_to_stop_leaves_nothing_behind(few_scenes, fitted, tmp_path):
    out = tmp_path / "sets" / "made"
    options = ("-n", "99999", "--backgrounds", few_scenes, "--home", fitted, "--out", out)
    command = [sys.executable, "-m", "rollsight.jobs", "synth", "make", "scratch", *map(str, options)]
    making = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    give_up = time.monotonic() + 60
    while not list(tmp_path.glob("sets/.made-*/train/images/*.png")):
        assert making.poll() is None and time.monotonic() < give_up, making.communicate()
        time.sleep(0.1)

    making.terminate()

    assert making.communicate()[1].splitlines()[-1].startswith("inspect: interrupted")
    assert (making.returncode, list(out.parent.iterdir())) == (130, [])


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("fit", "dent"), "class 'dent' is not known: .* labels pit, scratch"),
        (("fit", "scratch", "--preset", "tpu"), "--preset tpu: it must be one of cpu-64, gpu-128, gpu-256"),
        (("fit", "scratch", "--whole", "--free"), "whole patches have no start that could be degraded"),
        (("fit", "scratch", "--init", "none"), "no generator: make one with `inspect synth fit`"),
        (
            ("fit", "scratch", "--init", "x", "--from-scratch"),
            "--from-scratch and --init contradict each other",
        ),
        (("generic", "many", "--preset", "tpu"), "--preset tpu: it must be one of cpu-64, gpu-128, gpu-256"),
        (
            ("prove", "scratch", "--k", "9", "--out", "proof"),
            "3 train images hold scratch alone, 9",
        ),
        (("prove", "scratch", "--out", "proof"), "3 train images hold scratch alone, 10 were asked for"),
        (
            ("prove", "scratch", "--k", "0", "--draws", "2", "--out", "proof"),
            "all scenes of scratch are one draw, 2 were asked for: give a k, or one draw",
        ),
        (
            ("prove", "scratch", "--k", "2", "--out", "proof"),
            "no val image holds scratch: nothing to judge by",
        ),
        (("prove", "pit", "--k", "2", "--out", "proof"), "no test image holds pit: nothing to judge by"),
        (("prove", "scratch", "--ratio", "3", "--out", "proof"), "ratio 3: .* above 0 and up to 2"),
        (
            ("prove", "scratch", "--ratio", "0.1", "--out", "proof"),
            "1 synthetic crops beside 10 real ones, from 2 sets: give 0.2 or more",
        ),
        (("fit", "scratch", "--name", "a/b"), "generator name 'a/b' is not usable"),
        (
            ("fit", "roll mark"),
            "generator name 'roll mark' is not usable: .*: give the generator another --name",
        ),
        (("fit", "scratch", "--contrast-weight", "inf"), "contrast_weight is inf: a weight is a number"),
        (("prove", "scratch", "--arms", "real,magic", "--out", "proof"), "arm 'magic': it must be one of"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=line):
        inspect("synth", *arguments, "--labels", few_scenes)
    assert not (tmp_path / "plant" / "generators" / "scratch").exists()


def test_a_proof_takes_the_steps_of_its_plan_by_default():
    asked = signature(prove).parameters

    for name in ("k", "ratio", "steps", "base_steps", "fit_steps", "generic_steps", "samples"):
        assert asked[name].default in (getattr(Plan(), name), None)
    assert tuple(asked["arms"].default.split(",")) == Plan().arms


def test_a_proof_fits_the_generator_of_a_draw_as_often_as_asked(few_scenes, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rollsight.synth.arms.SETTLING", 1)  # 30 batches for each net take a minute
    short = [f"--{name}" for name in ("steps", "base-steps", "fit-steps", "generic-steps", "samples")]
    asked = ("--k", 2, "--draws", 1, "--fits", 2, "--arms", "real,gan", "--ratio", 0.5)

    inspect(
        *("synth", "prove", "scratch", "--labels", few_scenes, "--out", tmp_path / "proof", "--json"),
        *asked,
        *(word for name in short for word in (name, 1)),
    )

    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = json.loads((tmp_path / "proof" / "summary.json").read_text())["rows"]
    assert [(row["arm"], row["gan_seed"]) for row in rows] == [("real", None), ("gan", 0), ("gan", 1)]
    fitted = list((tmp_path / "proof" / "work").glob("*-gan-d0-s[01]-????????"))
    assert (told["runs"], len(fitted)) == (3, 2)
    assert told["summary"][0]["complete"] and [row["arm"] for row in told["over_real"]] == ["gan"]


def test_a_proof_without_val_asks_for_the_ratio(few_scenes, tmp_path):
    labels = shutil.copytree(few_scenes, tmp_path / "labels")
    table = (labels / "manifest.csv").read_text()
    (labels / "manifest.csv").write_text(table.replace(",val,", ",train,"))

    with pytest.raises(UserError, match="no val split to choose the ratio on: give --ratio"):
        inspect("synth", "prove", "scratch", "--labels", labels, "--k", 2, "--out", tmp_path / "proof")


def test_where_nothing_can_be_written_is_said_before_hours_of_work(few_scenes, tmp_path):
    (tmp_path / "file").touch()
    check = ("synth", "check", tmp_path / "made", "--labels", few_scenes)
    with pytest.raises(UserError, match=f"--page {tmp_path}: it cannot be written there"):
        inspect(*check, "--page", tmp_path)
    with pytest.raises(UserError, match=r"--page .*page.html: it cannot be written there"):
        inspect(*check, "--page", tmp_path / "file" / "page.html")
    with pytest.raises(UserError, match=r"--keep .*kept: it cannot be written there"):
        inspect(*check, "--keep", tmp_path / "file" / "kept")
    with pytest.raises(UserError, match="this is no folder made by `inspect synth make`"):
        inspect(*check, "--page", tmp_path / "pages" / "page.html")
    assert not (tmp_path / "pages").exists()
    with pytest.raises(NotADirectoryError):
        asked = ("--labels", few_scenes, "--k", 2, "--ratio", 0.5)
        inspect("synth", "prove", "scratch", *asked, "--out", tmp_path / "file")


def test_in_the_wrong_folder_no_plant_is_made(few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no plant folder at plant") as refused:
        inspect("synth", "make", "scratch", "--backgrounds", few_scenes, "--out", tmp_path / "made")
    assert refused.value.exit_code == 78 and not list(tmp_path.iterdir())


def test_a_set_is_made_again_though_its_roll_was_scanned_since(fitted, tmp_path, capsys):
    inspect("simulate", "S-1", "--length-m", 1, "--width-px", 256, "--seed", 6, "--home", fitted)
    roll = fitted / "rolls" / "S-1.zarr"
    shutil.rmtree(roll / "labels")
    sets = (("--backgrounds", roll, "--out", tmp_path / "made"), ("--into", "S-1", "--as", "S-2"))
    for options in sets:
        inspect("synth", "make", "scratch", "-n", 2, *options, "--home", fitted)

    found = LabelWriter.create(roll, "run-1", ("x",), lines=1000, width=256, shard_lines=4096)
    found.write(0, np.ones((1000, 256), dtype=np.uint8))
    found.close()

    for options in sets:
        capsys.readouterr()
        inspect("synth", "make", "scratch", "--only", 1, *options, "--home", fitted, "--json")
        assert json.loads(capsys.readouterr().out)["same"] is True
    card = tmp_path / "made" / "dataset.json"
    card.write_text(json.dumps({**json.loads(card.read_text()), "masks": {"S-1": "run-0"}}))
    with pytest.raises(UserError, match="roll S-1: its mask run-0, by which its steel was chosen, is gone"):
        inspect("synth", "make", "scratch", "--only", 1, *sets[0], "--home", fitted)


def test_without_backgrounds_nothing_is_made(fitted, tmp_path):
    with pytest.raises(UserError, match=r"no backgrounds \(none given\): give --backgrounds"):
        inspect("synth", "make", "scratch", "--out", tmp_path / "made", "--home", fitted)
    assert not (tmp_path / "made").exists()


def test_a_generic_generator_is_fitted_begun_from_and_makes_nothing_itself(few_scenes, tmp_path, capsys):
    home = tmp_path / "plant"
    shared = ("--labels", few_scenes, "--home", home, "--threads", 1, "--steps", 1, "--json")

    inspect("synth", "generic", "many", *shared, "--note", "No licence.")
    told = json.loads(capsys.readouterr().out)
    assert told["card"]["classes"] == ["pit", "scratch"] and told["card"]["notes"] == ["No licence."]
    with pytest.raises(UserError, match="many is there already: choose another NAME"):
        inspect("synth", "generic", "many", *shared)
    inspect("synth", "fit", "scratch", *shared, "--init", "many")
    assert json.loads(capsys.readouterr().out)["card"]["begun_from"] == told["hash"]
    with pytest.raises(UserError, match="many: a generic generator has no marks"):
        inspect("synth", "make", "many", "--out", tmp_path / "made", "--home", home)


def test_a_pitch_that_no_image_is_high_enough_for_is_refused(few_scenes, fitted_once, tmp_path):
    options = ("--out", tmp_path / "made", "--home", fitted_once, "--place", "periodic", "--pitch-px", 5000)
    with pytest.raises(UserError, match=r"a pitch of 5000 px: the highest of the images has only \d+ lines"):
        inspect("synth", "make", "scratch", "--backgrounds", few_scenes, *options)


def test_defects_into_a_roll_as_a_new_one_and_one_of_them_again(fitted, capsys):
    inspect("simulate", "S-1", "--length-m", 3, "--width-px", 300, "--seed", 6, "--home", fitted)
    options = ("--into", "S-1", "--as", "S-2", "--home", fitted, "--json", "--place", "lane", "--seed", 2)
    capsys.readouterr()

    inspect("synth", "make", "scratch", "--per-m", 1.4, *options)
    told = json.loads(capsys.readouterr().out)
    assert told["roll_id"] == "S-2" and told["card"]["samples"] == 4
    inspect("synth", "make", "scratch", "--only", 3, *options)
    assert json.loads(capsys.readouterr().out)["same"] is True
    with pytest.raises(UserError, match=r"--only 4: .*S-2.zarr has 0 to 3"):
        inspect("synth", "make", "scratch", "--only", 4, *options)
    with pytest.raises(UserError, match=r"defect 1 is another one: .*: give the options"):
        inspect("synth", "make", "scratch", "--only", 1, *options, "--method", "paste")
    with pytest.raises(UserError, match=r"defect 0 is another one: none \(end of the roll\) instead of"):
        periodic = (*options[:-4], "--place", "periodic", "--pitch-px", 2990)
        inspect("synth", "make", "scratch", "--only", 0, *periodic)
    with pytest.raises(UserError, match=r"S-2.zarr exists: choose another id, or say --overwrite"):
        inspect("synth", "make", "scratch", "-n", 1, *options)
    roll = zarr.open_array(fitted / "rolls" / "S-2.zarr" / "0")
    roll[:] = 7
    with pytest.raises(UserError, match="defect 3 was changed since it was made"):
        inspect("synth", "make", "scratch", "--only", 3, *options)
    inspect("synth", "make", "scratch", "-n", 1, *options, "--overwrite")
    assert json.loads(capsys.readouterr().out)["card"]["samples"] == 1


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "give --out DIR for a folder, or --into ROLL --as NEW-ROLL for a whole roll"),
        (("--out", "made"), r"no backgrounds \(none given\): give --backgrounds"),
        (("--out", "made", "--backgrounds", "nowhere"), "nowhere: no such folder of backgrounds"),
        (("--into", "S-1"), "--into ROLL and --as NEW-ROLL: the one needs the other"),
        (("--as", "S-2"), "--into ROLL and --as NEW-ROLL: the one needs the other"),
        (("--into", "S-1", "--as", "S-2", "--out", "made"), "give --out DIR for a folder, or --into"),
        (("--into", "S-1", "--as", "S-2", "--marks", 2), "--marks goes with --out only"),
        (("--into", "S-1", "--as", "S-2", "--backgrounds", "x"), "--backgrounds goes with --out only"),
        (("--out", "made", "--per-m", 2), "--per-m goes with --into only"),
        (("--out", "made", "--overwrite"), "--overwrite goes with --into only"),
        (("--into", "S-1", "--as", "S-2", "-n", 5, "--per-m", 2), "-n with --per-m: take one of them"),
        (("--into", "S-9", "--as", "S-2"), "no roll 'S-9' in .*: there are S-1, dark"),
        (("--into", "S-1", "--as", "../S-2"), "roll id '../S-2' is not usable"),
        (("--into", "S-1", "--as", "S-2", "--per-m", "nan"), "--per-m nan: that is no defect on 1 m"),
        (("--into", "dark", "--as", "S-2"), "roll dark has 2 lighting modes"),
        (("--into", "S-1", "--as", "S-2", "--place", "periodic"), "periodic with a pitch of 0 px"),
        (
            ("--into", "S-1", "--as", "S-2", "--place", "periodic", "--pitch-px", 1000),
            "a pitch of 1000 px: roll S-1 has only 1000 lines",
        ),
        (("--into", "S-1", "--as", "S-2", "-n", 10**12), "1000000000000 defects: give 1 to 1,000,000"),
        (("--into", "S-1", "--as", "S-2", "--per-m", 1e300), "--per-m 1e\\+300: 1 m would hold more than"),
        (("--out", "made", "--marks", 1000), "1000 marks on a sample, seed 0: 1 to 50"),
        (("--out", "made", "--variety", 9), "variety 9: it must be 0.5 to 4, 1 is usual"),
        (("--out", "made", "--lane", 0.3), "placement anywhere, a lane at 0.3: lane and periodic have one"),
        (("--out", "made", "--mm-per-px-x", 0.8), "--mm-per-px-x and --mm-per-line: give both, or neither"),
        (("--out", "made", "--mm-per-px-x", 0.8, "--mm-per-line", 0), "--mm-per-line 0: it must be a number"),
    ],
)
def test_what_does_not_go_together_is_one_line(arguments, line, fitted_once, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=line) as refused:
        inspect("synth", "make", "scratch", *arguments, "--home", fitted_once)
    assert refused.value.exit_code in (1, 2)
    assert not (fitted_once / "rolls" / "S-2.zarr").exists() and not (tmp_path / "made").exists()


@pytest.fixture(scope="module")
def fitted_once(few_scenes, tmp_path_factory):
    """A plant with a generator of scratches and two short rolls; what is refused leaves it as it is."""
    home = tmp_path_factory.mktemp("plant")
    inspect("synth", "fit", "scratch", "--labels", few_scenes, "--steps", 1, "--threads", 1, "--home", home)
    for name, *more in (("S-1",), ("dark", "--lighting", "bright,dark")):
        inspect("simulate", name, "--length-m", 1, "--width-px", 256, *more, "--home", home)
    return home


@pytest.mark.parametrize("name", ["generator.safetensors", "marks.safetensors", "card.json"])
def test_a_damaged_or_unknown_generator_is_one_line(name, fitted, few_scenes, tmp_path):
    options = ("--backgrounds", few_scenes, "--home", fitted, "--out", tmp_path / "made")
    with pytest.raises(UserError, match="dent: no generator: make one with `inspect synth fit`"):
        inspect("synth", "make", "dent", *options)
    path = fitted / "generators" / "scratch" / name
    path.write_bytes(path.read_bytes()[:-9])

    with pytest.raises(UserError, match=f"{name}: (missing or not the file|not the card of a generator)"):
        inspect("synth", "make", "scratch", *options)
    assert not (tmp_path / "made").exists()
