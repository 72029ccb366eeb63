"""`inspect synth` as a user types it: fit, make, remake, check; one line for what cannot be done."""

import json

import pytest
from rollsight.inspect.errors import UserError
from rollsight.jobs.cli import app


def inspect(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


@pytest.fixture
def fitted(few_scenes, tmp_path, capsys):
    """A plant with a generator of scratches after one step."""
    home = tmp_path / "plant"
    inspect("synth", "fit", "scratch", "--labels", few_scenes, "--steps", 1, "--threads", 1, "--home", home)
    said = capsys.readouterr().err
    assert "3 components, 30 are needed from scratch: learned with the help of 1 other classes" in said
    assert "3 marks, a mask GAN is fitted from 50 on: outlines of the bank only" in said
    return home


def test_fit_make_remake_and_check(few_scenes, fitted, tmp_path, capsys):
    made = tmp_path / "made"
    options = ("--backgrounds", few_scenes, "--home", fitted, "--out", made, "--seed", 4, "--json")

    inspect("synth", "make", "scratch", "-n", 3, *options)
    assert json.loads(capsys.readouterr().out)["card"]["samples"] == 3
    inspect("synth", "make", "scratch", "--only", 2, *options)
    assert json.loads(capsys.readouterr().out)["same"] is True
    with pytest.raises(UserError, match=r"sample 2 is another one: .*: give the options, generator and"):
        inspect("synth", "make", "scratch", "--only", 2, *options, "--marks", 5)
    with pytest.raises(UserError, match=r"--only 9: .* has samples 0 to 2"):
        inspect("synth", "make", "scratch", "--only", 9, *options)

    with pytest.raises(UserError, match=r"scratch has none, 3 marks .*: give --outlines bank or both"):
        inspect("synth", "make", "scratch", "--only", 2, *options, "--outlines", "gan")

    inspect("synth", "check", made, "--labels", few_scenes, "--steps", 0, "--json")
    told = json.loads(capsys.readouterr().out)
    assert told["samples"] == 3 and (tmp_path / "made.check.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("fit", "dent"), "class 'dent' is not known: .* labels pit, scratch"),
        (("fit", "scratch", "--preset", "tpu"), "--preset tpu: it must be one of cpu-64, gpu-128, gpu-256"),
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
        (("prove", "scratch", "--arms", "real,magic", "--out", "proof"), "arm 'magic': it must be one of"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, few_scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError, match=line):
        inspect("synth", *arguments, "--labels", few_scenes)
    assert not (tmp_path / "plant" / "generators" / "scratch").exists()


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
