"""Tiles of a labelled roll: seen as a scan sees them, judged by whole marks, each once."""

import numpy as np
import pytest
from rollsight.inspect.engines import open_engine
from rollsight.inspect.evaluate import evaluate, examine, look, scanned
from rollsight.inspect.labels import IGNORE, ROLL_TILE, open_labels
from rollsight.inspect.metrics import Tally
from rollsight.inspect.models import Card, Model
from rollsight.inspect.recipe import Recipe
from rollsight.inspect.roll_tiles import REACH_PX, judged_truth
from rollsight.inspect.rolls import LabelWriter, RollWriter, Strip, open_roll, roll_path
from rollsight.inspect.tiles import up_to_cell
from rollsight.inspect.training_data import read_sources

CLASSES = ("pit", "scratch")


def write_roll(folder, mask, image=None, roll_id="coil-1"):
    """A roll with the mask (lines, W) as its truth; pits are bright and scratches dark unless told."""
    lines, width = mask.shape
    gray = np.choose(np.where(mask == IGNORE, 0, mask), [128, 230, 20]) if image is None else image
    path = roll_path(folder, roll_id)
    strip = Strip(roll_id, "top", ("bright",), mm_per_px_x=1.0, mm_per_line=1.0)
    with RollWriter(path, strip, width, np.uint8) as writer:
        writer.append(gray[None].astype(np.uint8))
    labels = LabelWriter.create(path, "truth", CLASSES, lines=lines, width=width, shard_lines=4096)
    labels.write(0, mask)
    labels.close()
    return path


def gray_engine(window):
    """Bright px are pits, dark ones scratches."""
    bright = (window[0] - 0.5) * 12
    return np.stack([np.zeros_like(bright), bright - 2, -bright - 2]).astype(np.float32)


@pytest.fixture
def gray_model(tmp_path):
    """The card of an engine that reads the gray: no net is opened."""
    card = Card(
        name="gray",
        net="unet_lite",
        classes=CLASSES,
        thresholds=dict.fromkeys(CLASSES, 0.5),
        thresholds_basis="by hand",
        halo_px=64,
        weights_sha256="0" * 64,
        graph_sha256="0" * 64,
    )
    return Model(tmp_path, card)


def marks(shape, *boxes):
    """A mask with boxes (value, lines, columns)."""
    mask = np.zeros(shape, dtype=np.uint8)
    for value, lines, columns in boxes:
        mask[slice(*lines), slice(*columns)] = value
    return mask


ON_BORDERS = marks(
    (700, 600),
    (1, (250, 262), (250, 262)),  # a pit on the corner of four tiles
    (2, (20, 640), (100, 103)),  # a scratch through three
    (1, (30, 36), (300, 306)),
    (1, (690, 700), (596, 600)),  # an edge crack in the last px
)


def test_marks_on_the_borders_of_tiles_are_judged_whole_and_once(gray_model, tmp_path):
    """Cut by the tiles there were 4 + 3 + 1 + 1, some of them slivers."""
    tally = evaluate(gray_model, gray_engine, open_labels(write_roll(tmp_path, ON_BORDERS)))

    stitched = Tally(CLASSES)
    stitched.add(ON_BORDERS, ON_BORDERS, ON_BORDERS, "coil-1")
    for name in ("truth", "found", "predicted", "true"):
        assert np.array_equal(tally.statistics()[name], stitched.statistics()[name]), name
    pixels = tally.statistics()["pixels"][0]
    assert pixels[1, 1] == 144 + 36 + 40 and pixels[2, 2] == 620 * 3
    assert pixels.sum() <= ON_BORDERS.size


def test_a_mark_on_a_border_that_is_found_too_wide_is_no_false_alarm_beside_it(gray_model, tmp_path):
    mask = marks((300, 600), (1, (100, 140), (254, 257)))
    image = np.where(marks(mask.shape, (1, (96, 144), (248, 266))) > 0, 230, 128)

    report = evaluate(gray_model, gray_engine, open_labels(write_roll(tmp_path, mask, image))).report()

    assert (report["false_alarms"]["alarms"], report["instance"]["recall_by_size"]["small"]["n"]) == (0, 1)


def test_no_px_of_a_roll_is_judged_twice(tmp_path):
    rng = np.random.default_rng(0)
    mask = np.zeros((800, 700), dtype=np.uint8)
    for y, x in zip(rng.integers(0, 760, 60), rng.integers(0, 660, 60), strict=True):
        mask[y : y + rng.integers(2, 40), x : x + rng.integers(2, 40)] = rng.integers(1, 3)
    counted = np.zeros(mask.shape, dtype=np.int64)

    for tile in open_labels(write_roll(tmp_path, mask)).samples:
        truth, place = judged_truth(tile)
        counted[place] += truth != IGNORE
        assert (truth == mask[place])[truth != IGNORE].all()

    assert counted.max() == 1
    assert (counted[mask > 0] == 1).all()


def test_a_mark_longer_than_the_reach_is_judged_by_its_beginning(tmp_path):
    """What is held of a tile does not grow with the mark."""
    mask = marks((3 * REACH_PX, 300), (2, (10, 3 * REACH_PX), (40, 43)))

    judged = [judged_truth(tile)[0] for tile in open_labels(write_roll(tmp_path, mask)).samples]

    assert [int((truth == 2).sum()) for truth in judged if (truth == 2).any()] == [
        3 * (ROLL_TILE + REACH_PX - 10)
    ]
    assert max(len(truth) for truth in judged) <= ROLL_TILE + REACH_PX


def test_a_mark_is_learned_by_its_area_on_the_roll_whatever_a_tile_shows_of_it(tmp_path):
    """A sliver that the border of a tile cuts off a large mark is no small defect."""
    mask = marks((256, 600), (1, (20, 60), (200, 260)), (1, (100, 105), (20, 25)), (2, (0, 256), (510, 514)))
    data = open_labels(write_roll(tmp_path, mask))

    [source] = read_sources([data], CLASSES, Recipe(crop_px=64), [], [])

    assert [sample.x for sample in data.samples] == [0, 256, 344]
    assert [image.areas[1:].tolist() for image in source.images] == [[2400, 25], [2400, 1024], [1024]]
    found = [(c.image, source.images[c.image].areas[c.id], c.is_whole) for c in source.components]
    assert found[:2] == [(0, 2400, False), (0, 25, True)]
    assert found[2:] == [(1, 2400, False), (1, 1024, False), (2, 1024, False)]


def test_a_tile_has_the_logits_that_a_scan_has_there(small_model, tmp_path):
    """A net that sees zeros on all four sides of a tile of 256 px sees no strip."""
    rng = np.random.default_rng(0)
    mask = marks((1152, 400), (1, (600, 610), (300, 310)))
    path = write_roll(tmp_path, mask, rng.normal(128, 30, mask.shape).clip(0, 255))
    roll, engine = open_roll(path), open_engine(small_model, "onnx")[1]
    across = up_to_cell(roll.width) - roll.width
    below = 1024 + 2 * small_model.card.halo_px - roll.lines  # a canvas is a window of a scan at least
    canvas = np.pad(roll.read_unit(0, roll.lines), ((0, 0), (0, below), (0, across)), mode="edge")
    whole = engine(canvas)

    seen = next(look(small_model, engine, open_labels(path)))

    lines, columns = (slice(a, a + n) for a, n in zip((seen.y, seen.x), seen.truth.shape, strict=True))
    assert (lines, columns) == (slice(512, 512 + ROLL_TILE), slice(256, 400))
    assert abs(seen.logits - whole[:, lines, columns]).max() < 1e-3
    assert np.array_equal(seen.image, roll.read_unit(0, roll.lines)[:, lines, columns])
    last = scanned(engine, roll, slice(1100, 1152), slice(0, 400), small_model.card.halo_px)[1]
    assert abs(last - whole[:, 1100:1152, :400]).max() < 1e-3


def test_a_finding_says_where_in_the_roll_it_lies(gray_model, tmp_path):
    mask = marks((300, 600), (1, (100, 110), (250, 270)), (1, (290, 300), (590, 600)))
    image = np.full(mask.shape, 128)
    image[40:50, 500:510] = 240

    told = examine(gray_model, gray_engine, open_labels(write_roll(tmp_path, mask, image)))

    assert [(miss.where, miss.area_px) for miss in told.misses] == [
        ("coil-1, line 100, px 250", 200),
        ("coil-1, line 290, px 590", 100),
    ]
