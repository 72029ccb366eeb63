"""Small real things that several tests need."""

import csv
import importlib.util
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

# Before torch is read in. The nets of the tests are small: on a busy machine threads that wait for each other
# at every layer made the suite four times slower (measured 2026-11-22).
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from PIL import Image
from rollsight.inspect.labels import open_labels
from rollsight.inspect.models import Model, save_model
from rollsight.inspect.nets import NETS
from rollsight.inspect.plant import Plant
from rollsight.jobs.ledger.database import Ledger, open_ledger
from rollsight.synth.backgrounds import Backgrounds, open_backgrounds
from rollsight.synth.fit_recipe import FitRecipe
from rollsight.synth.fitting import fit_data, fit_generator
from rollsight.synth.generator import Generator
from torch import nn

if TYPE_CHECKING:
    from _postgres import Server

BENCH = Path(__file__).parent.parent / "bench"

CARD = {
    "name": "small",
    "net": "unet_lite",
    "net_options": {"attention": "cbam"},
    "classes": ("pit", "scratch"),
    "thresholds": {"pit": 0.5, "scratch": 0.25},
    "thresholds_basis": "none: the net is untrained",
}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A command that a test called may have set more: its sums are other bits than those of a new process."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def untrained_net() -> nn.Module:
    """The default net for two classes: pretrained encoder, seeded decoder, norms that have seen something."""
    torch.manual_seed(0)
    net = NETS["unet_lite"](2, pretrained=True)
    for name, module in net.named_modules():
        if isinstance(module, nn.BatchNorm2d) and name.startswith("up_"):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return net.eval()


@pytest.fixture(scope="session")
def small_model(untrained_net, tmp_path_factory) -> Model:
    """The untrained net as a model file; read it, do not change it."""
    return save_model(tmp_path_factory.mktemp("models") / "small", untrained_net, CARD)


@pytest.fixture
def labelled_folder(tmp_path) -> Path:
    """Six noisy gray images of 80 x 72 px with a bright pit or a dark scratch, as a manifest folder."""
    root = tmp_path / "labelled"
    root.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i, split in enumerate(("train", "train", "train", "train", "val", "test")):
        image = rng.normal(128, 4, (72, 80))
        mask = np.zeros((72, 80), dtype=np.uint8)
        y, x = rng.integers(8, 40, 2)
        where, value, gray = ((slice(y, y + 20), slice(x, x + 20)), 1, 230)
        if i % 2:
            where, value, gray = ((slice(4, 68), slice(x, x + 6)), 2, 20)
        mask[where], image[where] = value, gray
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_mask.png")
        rows.append((f"{i}.png", f"{i}_mask.png", split, f"piece-{i}"))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "split", "group"), *rows])
    (root / "classes.json").write_text(json.dumps(["pit", "scratch"]))
    return root


@pytest.fixture(scope="session")
def postgresql() -> Iterator["Server"]:
    """A real PostgreSQL server; tests that need one are skipped where none is installed."""
    spec = importlib.util.spec_from_file_location("bench_postgres", BENCH / "_postgres.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if module.binaries() is None:
        pytest.skip("no PostgreSQL server is installed (apt-get install postgresql)")
    server = module.Server(durable=False)
    yield server
    server.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def ledger_address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """What --ledger is given: an empty place on each of the two databases."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'ledger.db'}"
    return request.getfixturevalue("postgresql").schema(f"t{uuid.uuid4().hex}")


@pytest.fixture
def ledger(ledger_address: str, tmp_path: Path) -> Iterator[Ledger]:
    """An empty ledger; each test that asks for it runs on SQLite and on PostgreSQL."""
    opened = open_ledger(ledger_address, Plant(tmp_path))
    yield opened
    opened.close()


@pytest.fixture(scope="session")
def few_scenes(tmp_path_factory) -> Path:
    """Eight noisy scenes of 96 x 90 px: dark scratches from the top, bright pits; two are val and test.

    Read them, do not change them.
    """
    root = tmp_path_factory.mktemp("data") / "scenes"
    root.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for i in range(8):
        image, mask = rng.normal(110, 4, (96, 90)), np.zeros((96, 90), dtype=np.uint8)
        x = int(rng.integers(60, 80))
        if i % 2:
            mask[: 40 + i, x : x + 3], image[: 40 + i, x : x + 3] = 2, 50
        else:
            mask[70:78, x : x + 7], image[70:78, x : x + 7] = 1, 210
        Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(root / f"{i}.png")
        Image.fromarray(mask).save(root / f"{i}_mask.png")
        rows.append((f"{i}.png", f"{i}_mask.png", ("val", "test")[i - 6] if i > 5 else "train", f"piece-{i}"))
    with (root / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "mask", "split", "group"), *rows])
    (root / "classes.json").write_text(json.dumps(["pit", "scratch"]))
    return root


@pytest.fixture(scope="session")
def small_fit() -> FitRecipe:
    """A fit of seconds."""
    return FitRecipe(
        steps=6, size_px=32, editor=(8, 12), judge=(8, 12, 16), batch=2, checkpoint_every=2, penalty_every=2
    )


@pytest.fixture(scope="module")
def generator(few_scenes, small_fit, tmp_path_factory) -> Generator:
    """A generator of scratches after a few steps, whose editor changes as much as it may."""
    folder = tmp_path_factory.mktemp("generators") / "scratch"
    made = fit_generator(fit_data(open_labels(few_scenes), "scratch"), folder, small_fit)
    made.editor.last.weight.data.mul_(30)
    return made


@pytest.fixture(scope="module")
def steel(few_scenes, generator) -> Backgrounds:
    """The clean steel of those scenes."""
    return open_backgrounds([few_scenes], generator.card.data_classes, generator.card.held_groups)
