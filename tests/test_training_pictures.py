"""The pictures of a training: which images are the worst, and what is drawn of them."""

import numpy as np
import pytest
from PIL import Image
from rollsight.inspect.engines import open_engine
from rollsight.inspect.labels import IGNORE, open_labels
from rollsight.inspect.training_pictures import (
    FOUND,
    TRUTH,
    Judged,
    defect_iou,
    draw_curves,
    draw_worst,
    worst_images,
)


def colours(path):
    with Image.open(path) as picture:
        return {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}


def rgb(colour):
    return tuple(int(colour[i : i + 2], 16) for i in (1, 3, 5))


@pytest.mark.parametrize(
    ("truth", "found", "iou"),
    [
        ([1, 1, 0, 0], [1, 0, 1, 0], 1 / 3),
        ([1, 2, 0, 0], [2, 2, 0, 0], 1 / 2),  # the wrong class is no hit
        ([0, 0, 0, 0], [0, 0, 0, 0], 1.0),
        ([0, 0, 0, 0], [0, 1, 0, 0], 0.0),
        ([1, IGNORE, 0, 0], [1, 1, 0, 0], 1.0),
    ],
)
def test_the_iou_of_an_image_is_over_the_px_with_a_defect_on_either_side(truth, found, iou):
    assert defect_iou(np.array(truth, np.uint8), np.array(found, np.uint8)) == pytest.approx(iou)


def test_the_worst_images_come_first_and_no_more_than_asked(small_model, labelled_folder):
    data = open_labels(labelled_folder).of_split("train")
    engine = open_engine(small_model)[1]

    every = worst_images(small_model, engine, data)
    two = worst_images(small_model, engine, data, most=2)

    assert [one.iou for one in every] == sorted(one.iou for one in every)
    assert {one.name for one in every} == {"0", "1", "2", "3"}
    assert [one.name for one in two] == [one.name for one in every[:2]]
    assert all(one.iou == defect_iou(one.truth, one.found) for one in every)


def test_a_sheet_has_both_outlines_even_of_a_single_px(tmp_path):
    truth, found = np.zeros((2, 40, 40), dtype=np.uint8)
    truth[3, 3], found[39, 39] = 1, 2

    draw_worst(
        [Judged("a", np.full((40, 40), 0.5, np.float32), truth, found, 0.0)],
        ("pit", "dent"),
        tmp_path / "w.png",
    )
    with_both = colours(tmp_path / "w.png")

    assert {rgb(TRUTH), rgb(FOUND)} <= with_both
    assert [path.name for path in tmp_path.iterdir()] == ["w.png"]


def test_curves_have_a_second_panel_where_val_was_judged(tmp_path):
    plain, judged = tmp_path / "plain.csv", tmp_path / "judged.csv"
    plain.write_text("step,loss,dice\n100,1.5,0.9\n200,1.0,0.7\n")
    judged.write_text("step,loss,dice,val_miou\n100,1.5,0.9,0.3\n150,1.2,0.8,nan\n200,1.0,0.7,0.5\n")

    for curve in (plain, judged):
        draw_curves(curve, curve.with_suffix(".png"))

    narrow, wide = (Image.open(curve.with_suffix(".png")).width for curve in (plain, judged))
    assert wide > 1.5 * narrow
