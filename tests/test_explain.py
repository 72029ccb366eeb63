"""Grad-CAM of a defect: the evidence lies on it, in a roll as in an image, and the picture shows it."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.explain import MAX_VIEW_PX, explain_defect, grad_cam, layer_for, picture
from rollsight.inspect.nets import NETS
from rollsight.inspect.plant import open_plant
from rollsight.inspect.rolls import RollWriter, Strip
from rollsight.jobs.commands.explain import explain
from rollsight.jobs.scan_job import scan_roll
from torch import nn


class SeesDark(nn.Module):
    """Two channels: a background of 0, and how dark the surroundings of a place are, at stride 4."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(1, 2, 8, stride=4, padding=2)
        self.head = nn.Conv2d(2, 2, 1)
        self.up = nn.Upsample(scale_factor=4.0)
        with torch.no_grad():
            self.features.weight[0], self.features.weight[1] = -1 / 64, 1 / 64
            self.features.bias.copy_(torch.tensor([0.6, 0.0]))
            self.head.weight[:, :, 0, 0] = torch.tensor([[0.0, 0.0], [10.0, 0.0]])
            self.head.bias.zero_()

    def forward(self, x):
        return self.up(self.head(torch.relu(self.features(x))))


def strip_with_spots() -> tuple[np.ndarray, np.ndarray]:
    """Light strip with two dark spots, and the mask of both."""
    mask = np.zeros((256, 256), np.uint8)
    mask[40:60, 50:70] = mask[180:200, 200:220] = 1
    return np.where(mask, 0.1, 0.6).astype(np.float32)[None], mask


def test_the_evidence_for_a_defect_lies_on_the_defect_and_on_no_other():
    image, mask = strip_with_spots()
    one = mask == 1
    one[100:] = False

    heat = grad_cam(SeesDark(), image, one, kind=1)

    assert heat.shape == mask.shape and heat.min() >= 0
    assert heat[one].min() > 0 and heat[100:].max() == 0


def explained(image, mask, box):
    """What is explained of the defect in `box`, of a strip (1, H, W) with the mask (H, W)."""
    return explain_defect(
        SeesDark(), 64, mask.shape, lambda a, b: image[:, a:b], lambda a, b: mask[a:b], box, 1, ""
    )


def test_a_crop_shows_one_defect_and_its_surroundings():
    image, mask = strip_with_spots()

    told = explained(image, mask, (50, 40, 70, 60))

    assert told.gray.shape == told.mask.shape == told.heat.shape
    assert told.mask.sum() == 400 and told.heat.max() == 1
    np.testing.assert_array_equal(
        told.gray, image[0, told.y0 :, told.x0 :][: told.mask.shape[0], : told.mask.shape[1]]
    )


def test_of_a_long_scratch_the_middle_is_shown():
    mask = np.zeros((3000, 200), np.uint8)
    for y in range(100, 2900):
        mask[y, 20 + y // 20 : 24 + y // 20] = 1
    image = np.where(mask, 0.1, 0.6).astype(np.float32)[None]

    told = explained(image, mask, (25, 100, 169, 2900))

    assert told.mask.shape[0] <= MAX_VIEW_PX + 2 * 64 and told.mask.any(axis=1).all()
    assert told.y0 < 1500 < told.y0 + told.mask.shape[0]


def test_a_larger_spot_in_the_box_of_a_scratch_is_not_taken_for_it():
    image, mask = strip_with_spots()
    mask[180:200, 200:220] = 0
    scratch = np.eye(100, 256, k=40, dtype=bool)
    mask[:100][scratch] = 1

    told = explained(image, mask, (40, 0, 140, 100))

    assert mask.sum() == 500 and told.mask.sum() == 100


@pytest.mark.parametrize("name", NETS)
def test_in_every_net_a_large_defect_is_explained_by_coarser_features_than_a_pit(name):
    torch.manual_seed(0)
    net = NETS[name](2).eval()
    x = torch.rand(1, 1, 128, 128)
    lines = []
    for size_px in (300.0, 3.0):
        layer_for(net, x, size_px).register_forward_hook(
            lambda module, given, out: lines.append(out.shape[2])
        )

    net(x)

    assert min(lines) in (128 // 8, 128 // 16, 128 // 32) and max(lines) == 128 // 4


def test_a_picture_has_a_row_for_each_defect():
    image, mask = strip_with_spots()
    rows = [
        explain_defect(
            SeesDark(), 64, (256, 256), lambda a, b: image[:, a:b], lambda a, b: mask[a:b], box, 1, "spot"
        )
        for box in ((50, 40, 70, 60), (200, 180, 220, 200))
    ]

    shown = Image.open(io.BytesIO(picture(rows)))

    assert shown.format == "PNG" and shown.size[0] == 1100 and shown.size[1] > 900


@pytest.fixture(scope="module")
def scanned(small_model, tmp_path_factory):
    """A roll scanned by an untrained net, which finds defects in noise: the plant, the run."""
    plant = open_plant(tmp_path_factory.mktemp("plant"))
    gray = np.random.default_rng(0).integers(60, 180, (1, 256, 128)).astype(np.uint8)
    strip = Strip(roll_id="r1", side="top", lighting=("bright",), mm_per_px_x=0.8, mm_per_line=1.0)
    with RollWriter(plant.roll_path("r1"), strip, 128, np.uint8, total_lines=256) as writer:
        writer.append(gray)
        roll = writer.close()
    return plant, scan_roll(plant, roll, small_model, threads=1)


def test_a_defect_of_a_run_is_explained_in_the_folder_of_the_run(scanned, small_model, capsys):
    plant, run = scanned
    row = max(run.table.to_pylist(), key=lambda row: row["area_px"])

    explain(
        "r1",
        run.summary["run_id"],
        [row["defect_id"]],
        model=str(small_model.folder),
        home=plant.home,
        as_json=True,
    )

    path = run.folder / "explained" / f"{row['defect_id']}.png"
    assert json.loads(capsys.readouterr().out) == {"picture": str(path)}
    assert Image.open(path).size[0] > 800


def test_another_model_than_that_of_the_run_is_refused(scanned):
    plant, run = scanned

    with pytest.raises(UserError, match="the run was made by model small"):
        explain("r1", run.summary["run_id"], [1], home=plant.home)


def test_an_image_file_is_explained_beside_no_roll(small_model, tmp_path, capsys):
    image, out = tmp_path / "strip.png", tmp_path / "told.png"
    Image.fromarray(np.random.default_rng(0).integers(60, 180, (100, 90)).astype(np.uint8)).save(image)

    explain(image=image, out=out, model=str(small_model.folder), home=tmp_path)

    assert capsys.readouterr().out.strip() == str(out)
    assert Image.open(out).size[1] > 400


def test_what_cannot_be_explained_is_one_line(scanned, small_model, tmp_path):
    plant, run = scanned
    run_id, model = run.summary["run_id"], str(small_model.folder)
    blank = tmp_path / "blank.png"
    Image.fromarray(np.full((64, 64), 120, np.uint8)).save(blank)

    with pytest.raises(UserError, match="no finished run 'other' of roll r1: there are " + run_id):
        explain("r1", "other", [1], home=plant.home)
    with pytest.raises(UserError, match=f"run {run_id} has no defect 999999999"):
        explain("r1", run_id, [999999999], model=model, home=plant.home)
    with pytest.raises(UserError, match="finds no defect in it"):
        explain(image=blank, home=plant.home)
    with pytest.raises(UserError, match="needed: a roll, a run and defects"):
        explain(home=plant.home)
