"""The page of an evaluation, and the figures beyond the tally's that it shows."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.engines import open_engine
from rollsight.inspect.evaluate import FOREIGN, WORST, data_logits, evaluate, examine, examined, probabilities
from rollsight.inspect.labels import open_labels
from rollsight.inspect.models import update_card
from rollsight.inspect.report.evaluation import write_evaluation

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def gray_engine(window):
    """Bright px are pits, dark ones scratches."""
    bright = (window[0] - 0.5) * 12
    return np.stack([np.zeros_like(bright), bright - 2, -bright - 2]).astype(np.float32)


@pytest.fixture
def data(labelled_folder):
    """All six images as one split; one of them has its defect painted over, and a false one beside."""
    image = np.full((72, 80), 128, np.uint8)
    image[40:50, 60:70] = 240
    Image.fromarray(image).save(labelled_folder / "0.png")
    text = (labelled_folder / "manifest.csv").read_text()
    (labelled_folder / "manifest.csv").write_text(re.sub("train|val", "test", text))
    return open_labels(labelled_folder).of_split("test")


@pytest.fixture
def page(small_model, data, tmp_path):
    told = examine(small_model, gray_engine, data)
    figures = examined(small_model, data, told)
    path = tmp_path / "runs" / "page.html"
    write_evaluation(path, small_model, "line <3>", "test", figures, told)
    return path


def test_an_examination_counts_what_an_evaluation_counts(small_model, data):
    seen = []
    told = examine(small_model, gray_engine, data, on_image=lambda done, total: seen.append((done, total)))
    assert told.tally.report() == evaluate(small_model, gray_engine, data).report()
    assert seen == [(i, 6) for i in range(1, 7)]


def test_the_net_of_a_model_file_is_examined_too(small_model, data):
    told = examine(small_model, open_engine(small_model, "onnx")[1], data)
    figures = examined(small_model, data, told)
    json.dumps(figures, allow_nan=False)
    assert 0 <= figures["aupro"]["value"] <= 1
    assert 0 <= figures["calibration"]["ece"] <= 1


def test_no_key_of_before_is_missing_or_changed(small_model, data):
    told = examine(small_model, gray_engine, data)
    figures, report = examined(small_model, data, told), told.tally.report()
    assert figures["false_alarms"].pop("per_m2") is None
    assert {key: figures[key] for key in report} == report
    assert figures["thresholds"] == {"pit": 0.5, "scratch": 0.25}
    assert {"intervals", "unknown_classes", "groups_trained_on"} <= figures.keys()


def test_the_worst_miss_and_the_surest_false_alarm_are_kept_with_their_picture(small_model, data):
    told = examine(small_model, gray_engine, data)
    [miss], [alarm] = told.misses, told.alarms

    assert (miss.defect_class, miss.area_px, miss.taken_for) == ("pit", 400, None)
    assert (alarm.defect_class, alarm.area_px) == ("pit", 100)
    assert miss.where.startswith("0.png, line ")
    assert alarm.where == "0.png, line 40, px 60"
    assert (miss.own.sum(), alarm.own.sum()) == (400, 100)
    assert miss.image.shape == miss.truth.shape == miss.predicted.shape == (64, 64)
    assert alarm.score > 0.9 and miss.score < 0.2
    assert len(told.misses) <= WORST


def test_a_class_that_the_data_does_not_label_counts_as_its_background():
    """p: background 0.2, pit 0.5, scratch 0.3; the data labels pit, and stain, unknown to the model."""
    logits = np.log([[0.2], [0.5], [0.3]]).astype(np.float32)
    p = probabilities(data_logits(logits, ("pit", "scratch"), ("stain", "pit"), 1.0))
    np.testing.assert_allclose(p[:, 0], [0.5, 0, 0.5], rtol=1e-6)
    # at temperature 2 the square roots, in each class before any are put together
    root = np.sqrt([0.2, 0.5, 0.3])
    p = probabilities(data_logits(logits, ("pit", "scratch"), ("pit",), 2.0))
    np.testing.assert_allclose(p[1, 0], root[1] / root.sum(), rtol=1e-6)
    assert FOREIGN > 2


def test_the_temperature_changes_no_class_but_the_calibration(small_model, data, tmp_path):
    folder = shutil.copytree(small_model.folder, tmp_path / "warm")
    warm = update_card(type(small_model)(folder, small_model.card), temperature=2.5)
    cold, hot = (examined(m, data, examine(m, gray_engine, data)) for m in (small_model, warm))

    assert cold["pixel"] == hot["pixel"]
    assert cold["calibration"]["ece"] != hot["calibration"]["ece"]
    assert hot["calibration"]["temperature"] == 2.5


def test_the_page_is_one_file_without_a_script_that_needs_nothing_else(page):
    html = page.read_text()
    assert [file.name for file in page.parent.iterdir()] == ["page.html"]
    assert "<script" not in html
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', html) == []
    assert "default-src 'none'" in html


def test_the_page_shows_each_part_and_escapes_names(page):
    html = page.read_text()
    assert "line &lt;3&gt;" in html and "line <3>" not in html
    for heading in ("Recall by size", "Figures", "Confusion", "FROC", "Precision and recall", "Reliability"):
        assert heading in html
    assert "Worst misses" in html and "taken for" not in html
    assert html.count('<li class="tile">') == 2
    assert "nan" not in re.sub(r"data:image/jpeg;base64,[^\"]*", "", html).lower()


def test_a_page_without_any_fault_says_so(small_model, data, tmp_path):
    whole = type(data)(data.root, data.classes, data.samples[1:])
    told = examine(small_model, gray_engine, whole)
    path = tmp_path / "page.html"
    write_evaluation(path, small_model, "line", "test", examined(small_model, whole, told), told)
    assert "None: every defect was found in its class." in path.read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH")
def test_a_browser_draws_the_page_without_complaint_and_not_wider_than_its_window(page, tmp_path):
    done = subprocess.run(
        [
            CHROMIUM,
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--enable-logging=stderr", f"--user-data-dir={tmp_path / 'profile'}", "--hide-scrollbars"),
            *("--window-size=900,2400", f"--screenshot={tmp_path / 'page.png'}", page.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert [line for line in done.stderr.splitlines() if "CONSOLE" in line] == []
    with Image.open(tmp_path / "page.png") as image:
        colours = {tuple(px) for px in np.asarray(image.convert("RGB")).reshape(-1, 3)[::7].tolist()}
    for hue in ((0x00, 0x72, 0xB2), (0x56, 0xB4, 0xE9), (0xE6, 0x9F, 0x00)):  # a curve, truth, prediction
        assert hue in colours
