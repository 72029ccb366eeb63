"""One band and whole rolls: the result does not depend on how the work is cut, stopped or killed."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from rollsight.inspect.defects import label_mask
from rollsight.inspect.engines import onnx_engine, torch_engine
from rollsight.inspect.errors import LOCKED, UserError
from rollsight.inspect.models import Model, open_model, save_model
from rollsight.inspect.nets import NETS
from rollsight.inspect.plant import Plant
from rollsight.inspect.rolls import Roll, RollWriter, Strip
from rollsight.inspect.scan import A_MIN_PX, decide, facts_here, plan_scan
from rollsight.jobs.scan_job import Run, scan_roll

CLASSES = ("scratches", "pit", "scale")
ONNX = facts_here("onnx")
LINES, WIDTH = 700, 190  # neither is a multiple of the cell


@pytest.fixture(scope="session")
def speckle_model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A net with random weights, sure of itself: its mask is full of components of three classes."""
    torch.manual_seed(3)
    net = NETS["unet_lite"](len(CLASSES))
    with torch.no_grad():
        for up, skip in ((net.up_4, 24), (net.up_2, 16)):
            up.fuse[0].weight[:, -skip:] = 0  # without the fine skips the mask has blobs, not dust
        net.head.weight.copy_(net.head.weight[::4].repeat_interleave(4, dim=0))
        for module in net.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = None  # the plain mean over the batches below
                module.reset_running_stats()
        for seed in range(4):  # the norms see what they will meet, so that no class drowns the others
            logits = net.train()(torch.from_numpy(texture(256, 256, seed=seed)[None] / np.float32(255)))
        spread, mean = logits.std(dim=(0, 2, 3)), logits.mean(dim=(0, 2, 3))
        net.head.bias.sub_(mean.repeat_interleave(4))
        scale = (3 / spread).repeat_interleave(4)
        net.head.weight.mul_(scale[:, None, None, None])
        net.head.bias.mul_(scale)
    card = {
        "name": "speckle",
        "net": "unet_lite",
        "classes": CLASSES,
        "thresholds": dict.fromkeys(CLASSES, 0.5),
        "thresholds_basis": "none: random weights",
    }
    return save_model(tmp_path_factory.mktemp("models") / "speckle", net, card)


def make_roll(plant: Plant, roll_id: str, gray: NDArray[np.uint8], **strip: object) -> Roll:
    """A closed roll with the image (C, H, W)."""
    known = {"side": "top", "mm_per_px_x": 0.5, "mm_per_line": 2.0, **strip}
    about = Strip(roll_id=roll_id, lighting=tuple(f"mode{i}" for i in range(gray.shape[0])), **known)  # type: ignore[arg-type]
    with RollWriter(plant.roll_path(roll_id), about, gray.shape[2], gray.dtype) as writer:
        writer.append(gray)
        return writer.close()


def texture(lines: int, width: int, modes: int = 1, seed: int = 0) -> NDArray[np.uint8]:
    """Rough gray strip that fills the image: (modes, lines, width)."""
    rng = np.random.default_rng(seed)
    coarse = rng.normal(120, 40, (modes, -(-lines // 8), -(-width // 8))).repeat(8, 1).repeat(8, 2)
    return np.clip(coarse[:, :lines, :width] + rng.normal(0, 12, (modes, lines, width)), 30, 240).astype(
        np.uint8
    )


def same_result(one: Run, roll_one: Roll, other: Run, roll_other: Roll) -> None:
    """Equal mask bytes and equal defect tables, the roll's and run's names aside."""
    mask = roll_one.read_label(one.summary["run_id"], 0, roll_one.lines)
    np.testing.assert_array_equal(mask, roll_other.read_label(other.summary["run_id"], 0, roll_other.lines))
    names = ["roll_id", "run_id"]
    assert one.table.drop_columns(names).equals(other.table.drop_columns(names))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, speckle_model: Model) -> tuple[Roll, Run]:
    """A roll scanned undisturbed in one band."""
    plant = Plant(tmp_path_factory.mktemp("whole"))
    roll = make_roll(plant, "R", texture(LINES, WIDTH))
    return roll, scan_roll(plant, roll, speckle_model, core_lines=64, band_lines=1024, threads=1)


def test_the_speckle_roll_has_defects_of_all_classes_across_many_seams(whole: tuple[Roll, Run]) -> None:
    """So that the comparisons below compare something."""
    roll, run = whole
    assert set(run.table["class"].to_pylist()) == set(CLASSES)
    mask = roll.read_label(run.summary["run_id"], 0, LINES)
    across = [y for y in range(64, LINES, 64) if ((mask[y] == mask[y - 1]) & (mask[y] > 0)).any()]
    assert len(across) > 5


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    band=st.sampled_from([64, 128, 192, 448]),
    stops=st.lists(st.integers(1, 4), max_size=2),
    threads=st.integers(1, 2),
)
def test_band_size_threads_and_interruptions_do_not_change_the_result(
    whole: tuple[Roll, Run],
    speckle_model: Model,
    tmp_path_factory: pytest.TempPathFactory,
    band: int,
    stops: list[int],
    threads: int,
) -> None:
    roll_whole, run_whole = whole
    plant = Plant(tmp_path_factory.mktemp("cut"))
    roll = make_roll(plant, "R", texture(LINES, WIDTH))

    class StopError(Exception):
        pass

    for bands in stops:
        seen = 0

        def stop(done: int, total: int, limit: int = bands) -> None:
            nonlocal seen
            seen += 1
            if seen > limit and done < total:
                raise StopError

        try:
            scan_roll(
                plant, roll, speckle_model, core_lines=64, band_lines=band, threads=threads, on_band=stop
            )
        except StopError:
            continue
    run = scan_roll(plant, roll, speckle_model, core_lines=64, band_lines=band, threads=threads)

    same_result(run_whole, roll_whole, run, roll)
    assert run.summary["run_id"] == run_whole.summary["run_id"]


def test_tiled_across_and_along_gives_the_mask_of_the_whole_image(
    whole: tuple[Roll, Run], speckle_model: Model
) -> None:
    """Torch, fp32: the argmax of windows with their halo is that of the whole canvas in one call."""
    roll, run = whole
    canvas = np.pad(roll.read_unit(0, LINES), ((0, 0), (0, 704 - LINES), (0, 192 - WIDTH)), mode="edge")
    logits = torch_engine(speckle_model)(canvas)[:, :LINES, :WIDTH]
    mask, _ = decide(logits, speckle_model.thresholds)

    found = roll.read_label(run.summary["run_id"], 0, LINES)
    margin = np.sort(logits, axis=0)[-1] - np.sort(logits, axis=0)[-2]
    sure = margin > 1e-3  # ONNX Runtime made the scan, torch this
    assert (found[sure] == mask[sure]).mean() > 0.999  # within 1e-3 of a threshold they may differ
    assert sure.mean() > 0.99


def test_a_wide_roll_in_windows_across_equals_one_window_over_the_full_width(
    tmp_path: Path, speckle_model: Model
) -> None:
    """Windows that shift inward at the edges answer for their cores as the full width does."""
    from rollsight.inspect.scan import read_canvas

    plant = Plant(tmp_path)
    roll = make_roll(plant, "wide", texture(200, 900))
    engine = onnx_engine(speckle_model)
    masks = []
    for core_px in (960, 128):
        plan = plan_scan(roll, speckle_model, ONNX, core_lines=64, core_px=core_px)
        grid = plan.grid(roll.lines)
        mask = np.zeros((200, 960), dtype=np.uint8)
        for row in range(grid.rows):
            gray, top = read_canvas(roll, grid, row)
            for w in grid.windows(row):
                logits = engine(
                    gray[:, w.y - top : w.y - top + grid.window_lines, w.x : w.x + grid.window_px]
                )
                core = logits[:, w.core_y0 - w.y : w.core_y1 - w.y, w.core_x0 - w.x : w.core_x1 - w.x]
                y0, y1 = grid.row_lines(row)
                mask[y0:y1, w.core_x0 : w.core_x1] = core.argmax(axis=0)[: y1 - y0]
        masks.append(mask[:, :900])
    assert (masks[0] != masks[1]).mean() < 1e-4
    assert len(np.unique(masks[0])) > 2


@pytest.mark.parametrize(("halo", "core"), [(192, 64), (300, 64), (256, 100)])
def test_a_halo_or_core_off_the_grid_or_too_small_is_refused(
    tmp_path: Path, speckle_model: Model, halo: int, core: int
) -> None:
    roll = make_roll(Plant(tmp_path), "R", texture(100, 100))
    with pytest.raises(ValueError, match="must be"):
        plan_scan(roll, speckle_model, ONNX, core_lines=core, halo=halo)


def test_a_band_that_cuts_a_core_is_refused_in_one_line(tmp_path: Path, speckle_model: Model) -> None:
    plant = Plant(tmp_path)
    with pytest.raises(UserError, match="multiple of 64"):
        scan_roll(
            plant, make_roll(plant, "R", texture(100, 100)), speckle_model, core_lines=64, band_lines=100
        )


def test_the_run_id_names_what_decides_the_result_and_nothing_else(
    tmp_path: Path, speckle_model: Model
) -> None:
    short = make_roll(Plant(tmp_path / "a"), "R", texture(100, 100))
    long = make_roll(Plant(tmp_path / "b"), "R", texture(300, 100))
    plan = plan_scan(short, speckle_model, ONNX)
    assert plan.run_id == plan_scan(long, speckle_model, ONNX).run_id
    assert plan.run_id != plan_scan(short, speckle_model, facts_here("torch")).run_id
    assert plan.run_id != plan_scan(short, speckle_model, ONNX, core_lines=512).run_id


def test_a_truncated_shard_or_receipt_is_done_again(
    whole: tuple[Roll, Run], speckle_model: Model, tmp_path: Path
) -> None:
    plant = Plant(tmp_path)
    roll = make_roll(plant, "R", texture(LINES, WIDTH))
    first = scan_roll(plant, roll, speckle_model, core_lines=64, band_lines=128, threads=1)
    shards = sorted((roll.path / "labels" / first.summary["run_id"] / "0" / "c").rglob("*/0"))
    shards[1].write_bytes(shards[1].read_bytes()[:-20])
    receipts = sorted((first.folder / "bands").glob("*.json"))
    receipts[3].write_bytes(receipts[3].read_bytes()[:100])
    counted: list[int] = []
    again = scan_roll(
        plant, roll, speckle_model, core_lines=64, threads=1, on_band=lambda done, _: counted.append(done)
    )

    same_result(*reversed(whole), again, roll)
    assert counted == [LINES - 256, LINES - 128, LINES]  # two bands were done again, of the size they had


def test_a_second_client_on_the_same_run_is_told_to_try_later(tmp_path: Path, speckle_model: Model) -> None:
    plant = Plant(tmp_path)
    roll = make_roll(plant, "R", texture(200, 100))
    codes = []

    def second(done: int, total: int) -> None:
        with pytest.raises(UserError) as fault:
            scan_roll(plant, roll, speckle_model, core_lines=64)
        codes.append(fault.value.exit_code)

    scan_roll(plant, roll, speckle_model, core_lines=64, on_band=second)
    assert set(codes) == {LOCKED}


def test_killed_at_random_moments_the_same_command_ends_with_the_same_table(
    tmp_path: Path, speckle_model: Model
) -> None:
    """kill -9 of the real command, up to six times; each band has one receipt and one shard at the end."""
    gray = texture(6 * 1024 - 100, 128)
    calm, stormy = Plant(tmp_path / "calm"), Plant(tmp_path / "stormy")
    roll_calm, roll_stormy = make_roll(calm, "R", gray), make_roll(stormy, "R", gray)
    command = [sys.executable, "-m", "rollsight.jobs", "scan", "R", "--model", str(speckle_model.folder)]
    command += ["--band-lines", "1024", "--threads", "2", "--json", "--home"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(calm.home)], env=env, capture_output=True, text=True, check=True)
    undisturbed = json.loads(done.stdout)
    moments, killed = random.Random(5), 0
    for _ in range(6):
        process = subprocess.Popen(
            [*command, str(stormy.home)], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(moments.uniform(0.8, 1.0 + undisturbed["seconds"]))
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
    last = subprocess.run([*command, str(stormy.home)], env=env, capture_output=True, text=True, check=True)
    result = json.loads(last.stdout)

    assert killed > 0
    assert result["defects"] == undisturbed["defects"] > 0
    mask = roll_calm.read_label(undisturbed["run_id"], 0, roll_calm.lines)
    np.testing.assert_array_equal(mask, roll_stormy.read_label(result["run_id"], 0, roll_stormy.lines))
    assert pq.read_table(result["table"]).equals(pq.read_table(undisturbed["table"]))
    bands = Path(result["table"]).parent / "bands"
    assert [p.name for p in sorted(bands.glob("*.json"))] == [
        f"{y0:010d}.json" for y0 in range(0, 6 * 1024, 1024)
    ]


def test_the_defect_table_counts_the_components_of_the_mask_in_mm(whole: tuple[Roll, Run]) -> None:
    """Against scipy on the stitched mask: number, areas, boxes; 0.5 mm per px, 2 mm per line."""
    roll, run = whole
    mask = roll.read_label(run.summary["run_id"], 0, LINES)
    ids, _ = label_mask(mask)
    areas = np.bincount(ids.ravel())[1:]
    assert sorted(run.table["area_px"].to_pylist()) == sorted(areas[areas >= A_MIN_PX].tolist())
    for row in run.table.slice(0, 50).to_pylist():
        assert row["length_mm"] == pytest.approx((row["y1"] - row["y0"]) * 2.0)
        assert row["width_mm"] == pytest.approx((row["x1"] - row["x0"]) * 0.5)
        assert row["area_mm2"] == pytest.approx(row["area_px"] * 1.0)
        assert row["y_m"] == pytest.approx(row["y0"] * 0.002)
        assert row["x_mm"] == pytest.approx(row["x0"] * 0.5)
        assert mask[row["defect_id"] // WIDTH, row["defect_id"] % WIDTH] == CLASSES.index(row["class"]) + 1
        assert 0.5 <= row["score"] <= 1


def test_without_pixel_sizes_the_mm_columns_are_null_and_units_say_px(
    tmp_path: Path, speckle_model: Model
) -> None:
    plant = Plant(tmp_path)
    roll = make_roll(plant, "R", texture(200, 120), mm_per_px_x=None, mm_per_line=None)
    run = scan_roll(plant, roll, speckle_model, core_lines=64)
    assert run.summary["units"] == "px"
    assert run.summary["length_m"] is None
    assert run.table.num_rows > 0
    for column in ("x_mm", "y_m", "width_mm", "length_mm", "area_mm2"):
        assert run.table[column].null_count == run.table.num_rows


def test_a_dark_stretch_is_not_inspected_and_holds_the_roll(tmp_path: Path, speckle_model: Model) -> None:
    """A failed lamp is never clean strip: 128 of 640 lines are dark, so 80 % is inspected."""
    gray = texture(640, 128)
    gray[:, 256:384] = 3
    plant = Plant(tmp_path)
    roll = make_roll(plant, "R", gray)
    run = scan_roll(plant, roll, speckle_model, core_lines=64)
    assert run.summary["coverage"] == pytest.approx(0.8)
    assert run.summary["verdict"] == "HOLD"
    assert "coverage" in run.summary["reasons"][0]
    assert (roll.read_label(run.summary["run_id"], 256, 384) == 255).all()
    assert not (roll.read_label(run.summary["run_id"], 0, 256) == 255).any()
    assert run.summary["not_inspected"] == [{"x0": 0, "y0": 256, "x1": 128, "y1": 384, "reason": "dark"}]


def test_a_card_with_too_small_a_halo_is_refused_by_the_default_engine(
    tmp_path: Path, speckle_model: Model
) -> None:
    """The ONNX graph knows what its net needs, so a card cannot make tiles that do not fit together."""
    shutil.copytree(speckle_model.folder, tmp_path / "m")
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    (tmp_path / "m" / "card.json").write_text(json.dumps({**card, "halo_px": 128}))
    with pytest.raises(UserError, match="halo_px is 128"):
        onnx_engine(open_model("m", tmp_path))


def test_a_roll_replaced_under_its_id_leaves_nothing_old_that_reads_as_finished(
    tmp_path: Path, speckle_model: Model
) -> None:
    """The run id is the same, the image is not: until it is scanned no old table or page stands there."""
    plant = Plant(tmp_path)
    first = scan_roll(
        plant, make_roll(plant, "R", texture(300, 100)), speckle_model, core_lines=64, band_lines=64
    )
    shutil.rmtree(plant.roll_path("R"))
    roll = make_roll(plant, "R", texture(200, 100, seed=9))

    class KilledError(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done:
            raise KilledError

    with pytest.raises(KilledError):
        scan_roll(plant, roll, speckle_model, core_lines=64, band_lines=64, on_band=kill)
    assert sorted(path.name for path in first.folder.iterdir() if path.is_file()) == [".lock", "plan.json"]
    again = scan_roll(plant, roll, speckle_model, core_lines=64, band_lines=64)
    assert again.folder == first.folder
    assert again.summary["lines"] == 200


def test_a_damaged_part_of_a_roll_leaves_the_other_bands_scanned(
    tmp_path: Path, speckle_model: Model
) -> None:
    plant = Plant(tmp_path)
    roll = make_roll(plant, "R", texture(9000, 64))
    shards = sorted((roll.path / "0" / "c").rglob("0"), key=str)
    damaged = next(path for path in shards if path.is_file() and path.parent.name == "2")
    damaged.write_bytes(b"not a shard")
    with pytest.raises(UserError, match=r"2 of 3 bands|1 of 3 bands") as fault:
        scan_roll(plant, roll, speckle_model, core_lines=1024, band_lines=4096)
    assert fault.value.exit_code == 3
    assert len(list((tmp_path / "runs").glob("R/*/bands/*.json"))) >= 1


def test_decide_is_the_argmax_over_thresholds_of_metrics_md() -> None:
    """Hand-made: two classes, thresholds 0.5 and 0.2; four pixels with known probabilities."""
    p = np.array([[0.3, 0.6, 0.1], [0.7, 0.05, 0.25], [0.9, 0.05, 0.05], [0.2, 0.5, 0.3]])
    logits = np.log(p).T.reshape(3, 2, 2).astype(np.float32)
    mask, score = decide(logits, (0.5, 0.2))
    # Fourth pixel: class 1 leads its threshold by 0, class 2 by logit 0.3 - logit 0.2 = 0.54.
    assert mask.tolist() == [[1, 2], [0, 2]]
    np.testing.assert_allclose(score, [[0.6, 0.25], [0, 0.3]], rtol=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_the_cheap_test_before_the_softmax_drops_no_pixel(seed: int) -> None:
    """Against the rule written out for every pixel."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 3, (4, 5, 7)).astype(np.float32)
    thresholds = tuple(rng.uniform(0.05, 0.95, 3))
    p = np.exp(logits.astype(np.float64) - logits.max(axis=0))
    p = p / p.sum(axis=0)
    t = np.array(thresholds)[:, None, None]
    lead = np.log(p[1:] / (1 - p[1:])) - np.log(t / (1 - t))
    expected = np.where(lead.max(axis=0) >= 0, lead.argmax(axis=0) + 1, 0)
    clear = np.abs(lead).min(axis=0) > 1e-4
    mask, _ = decide(logits, thresholds)
    np.testing.assert_array_equal(mask[clear], expected[clear])


def test_thresholds_and_scores_are_calibrated_probabilities() -> None:
    """At temperature 2 what decides is the softmax of half the logits; at 1 the bits stay the same."""
    logits = np.random.default_rng(0).normal(0, 3, (4, 9, 11)).astype(np.float32)
    for temperature, other in ((2.0, logits / 2), (1.0, logits)):
        for found, expected in zip(
            decide(logits, (0.3, 0.5, 0.6), temperature), decide(other, (0.3, 0.5, 0.6)), strict=True
        ):
            np.testing.assert_array_equal(found, expected)


def test_tables_have_the_versioned_schema(whole: tuple[Roll, Run]) -> None:
    _, run = whole
    table = pq.read_table(run.folder / "defects.parquet")
    assert table.schema.metadata[b"rollsight_defects"] == b"1"
    assert table.schema.field("severity").type == pa.string()
    header = (run.folder / "defects.csv").read_text().splitlines()[0]
    assert header.replace('"', "").split(",") == table.column_names
