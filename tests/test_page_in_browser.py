"""The page in a real browser: 200,000 defects open in under 2 s, and what should be seen and linked is."""

import importlib.util
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from rollsight.inspect.report.page import write_page
from rollsight.inspect.rolls import Roll, RollWriter, Strip

SPEC = importlib.util.spec_from_file_location(
    "bench_browser", Path(__file__).parent.parent / "bench" / "_browser.py"
)
assert SPEC is not None and SPEC.loader is not None
BROWSER = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(BROWSER)
pytestmark = pytest.mark.skipif(BROWSER.CHROMIUM is None, reason="no Chromium on the PATH")

LINES, WIDTH, EDGE = 60_000, 512, 20
CLASSES = ("pit", "scratches", "inclusion", "scale", "roll_mark")
PAGE_MB = 8
OPEN_S = 2.0
WRITE_S = 60.0

# Opens the page in a frame of the same origin, waits until it has drawn, and tells the server what it found.
WRAPPER = """<!doctype html><link rel="icon" href="data:,"><body style="margin:0">
<iframe style="border:0;width:1350px;height:3000px"></iframe>
<img src="wait"><script>
const frame = document.querySelector("iframe"), begun = performance.now(), found = {};
const drawn = () => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
// Share of the map's pixels that are marked, and of those that are blue: the colour of scratches.
function ink(canvas) {
  const pen = canvas.getContext("2d", { willReadFrequently: true });
  const px = pen.getImageData(0, 0, canvas.width, canvas.height).data;
  let marked = 0, blue = 0;
  for (let i = 0; i < px.length; i += 4) {
    if (px[i + 3] > 0) marked += 1;
    if (px[i] === 0 && px[i + 1] === 114 && px[i + 2] === 178 && px[i + 3] === 255) blue += 1;
  }
  return [marked / (px.length / 4), blue / (px.length / 4)];
}
frame.onload = async () => {
  const page = frame.contentDocument;
  await drawn();
  found.ms = performance.now() - begun;
  const canvases = [...page.querySelectorAll("canvas")];
  if (canvases.length) {
    found.ink = canvases.map(ink);
    page.querySelector("button[data-kind='1']").click();
    found.hidden = ink(canvases[0]);
    page.querySelector("button[data-kind='1']").click();
    found.again = ink(canvases[0]);
    const box = canvases[0].getBoundingClientRect(), tip = page.getElementById("tip");
    for (let x = 300; x < 700 && tip.hidden; x += 3) {
      const at = { clientX: box.left + x, clientY: box.top + 150 };
      canvases[0].dispatchEvent(new frame.contentWindow.PointerEvent("pointermove", at));
    }
    found.tip = tip.textContent;
  }
  const marks = [...page.querySelectorAll("a[href^='#d']")], tile = page.querySelector(".tile");
  found.links = marks.length;
  if (tile !== null) {
    const mark = marks.find((a) => a.getAttribute("href") === "#" + tile.id);
    const box = mark.getBoundingClientRect();
    found.onTop = mark.contains(page.elementFromPoint(box.x + box.width / 2, box.y + box.height / 2));
    mark.dispatchEvent(new frame.contentWindow.MouseEvent("click", { bubbles: true, cancelable: true }));
    await drawn();
    found.target = page.querySelector(":target")?.id === tile.id;
    const [first, second] = [...tile.querySelectorAll("img")].map((img) => img.getBoundingClientRect());
    found.pictures = [first.width, second.left - first.right, second.top - first.top];
  }
  found.wide = page.documentElement.scrollWidth - page.documentElement.clientWidth;
  found.headings = [...page.querySelectorAll("h3")].slice(0, 3).map((h) => h.firstChild.textContent.trim());
  await fetch("found", { method: "POST", body: JSON.stringify(found) });
};
frame.src = "report.html";
</script>"""


def opened(run: Path, folder: Path) -> dict[str, Any]:
    """What the wrapper finds in the page of `run`, once it has opened."""
    found: dict[str, Any] = BROWSER.loaded(run, WRAPPER, folder / "profile")
    return found


def busy() -> bool:
    """Whether others have so much to do here that a second is none."""
    return os.getloadavg()[0] > 1.5 * (os.cpu_count() or 1)


@pytest.fixture(scope="module")
def roll(tmp_path_factory: pytest.TempPathFactory) -> Roll:
    """60,000 lines of noise in two lighting modes."""
    strip = Strip("C1", "top", ("bright", "dark"), 0.5, 1.0, line_id="CGL2")
    block = np.random.default_rng(1).integers(110, 140, (2, 4096, WIDTH)).astype(np.uint8)
    block[:, :, :EDGE] = block[:, :, -EDGE:] = 0
    with RollWriter(tmp_path_factory.mktemp("rolls") / "C1.zarr", strip, WIDTH, np.dtype("uint8")) as writer:
        for y in range(0, LINES, 4096):
            writer.append(block[:, : min(4096, LINES - y)])
        return writer.close()


def write_run(folder: Path, roll: Roll, count: int) -> tuple[Path, float]:
    """The folder of a run with `count` defects and its page, and the processor time that the page took, s."""
    rng = np.random.default_rng(5)
    kind = rng.choice(len(CLASSES), count, p=(0.35, 0.05, 0.2, 0.35, 0.05))
    length, width = (
        np.maximum(2, rng.lognormal(m, s, count)).astype(np.int64) for m, s in ((2, 1), (1, 0.6))
    )
    length[kind == 1] *= 20
    length, width = np.minimum(length, 2000), np.minimum(width, 60)
    y, x = (rng.random(count) * (LINES - length)).astype(int), rng.integers(EDGE, WIDTH - EDGE - 60, count)
    columns: dict[str, Any] = {
        "defect_id": y * WIDTH + x,
        "class": np.array(CLASSES)[kind],
        "x_mm": (x - EDGE) * 0.5,
        "y_m": y / 1000,
        "width_mm": width * 0.5,
        "length_mm": length * 1.0,
        "area_mm2": length * width * 0.4,
        "area_px": length * width,
        "score": rng.uniform(0.4, 1, count).astype(np.float32),
        **{"x0": x, "y0": y, "x1": x + width, "y1": y + length},
    }
    run = folder / f"run-{count}"
    run.mkdir()
    pq.write_table(pa.table(columns), run / "defects.parquet")
    summary = {
        **{"roll_id": "C1", "run_id": "8f31", "model": "default", "model_hash": "3c1f", "code_version": "0"},
        **{"engine": "onnxruntime", "executor": "threads", "created_at": "2026-11-22T02:14:09+00:00"},
        **{"units": "mm", "lines": LINES, "width_px": WIDTH, "length_m": 60.0, "width_mm": 236.0},
        **{"mm_per_px_x": 0.5, "mm_per_line": 1.0, "side": "top", "lighting": ["bright", "dark"]},
        **{"coverage": 0.99, "verdict": "UNGRADED", "reasons": [], "notes": [], "classes": list(CLASSES)},
        **{"defects": count, "seconds": 1.0, "mpix_s": 1.0, "edges": [[0, EDGE, WIDTH - EDGE]]},
        "not_inspected": [{"x0": 0, "y0": 2000, "x1": WIDTH, "y1": 2600, "reason": "dark"}],
    }
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    mask = np.zeros((LINES, WIDTH), np.uint8)
    for top, left, long, wide, value in zip(y, x, length, width, kind + 1, strict=True):
        mask[top : top + long, left : left + wide] = value

    begun = time.process_time()  # not by the clock: a machine at work writes no slower page
    write_page(run, roll, lambda y0, y1: mask[y0:y1])
    return run, time.process_time() - begun


@pytest.fixture(scope="module")
def crowded(roll: Roll, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    return write_run(tmp_path_factory.mktemp("crowded"), roll, 200_000)


@pytest.fixture(scope="module")
def crowded_open(crowded: tuple[Path, float], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The best of up to three openings: a machine at work may delay one."""
    found: dict[str, Any] = {}
    for attempt in range(3):
        again = opened(crowded[0], tmp_path_factory.mktemp(f"profile{attempt}"))
        found = min(found or again, again, key=lambda each: each["ms"])
        if found["ms"] < OPEN_S * 1000 or busy():
            break
    return found


def test_a_page_of_200_000_defects_is_small_and_soon_written(crowded: tuple[Path, float]) -> None:
    run, seconds = crowded

    assert (run / "report.html").stat().st_size < PAGE_MB * 1e6
    assert seconds < WRITE_S


def test_a_page_of_200_000_defects_opens_in_under_2_s(crowded_open: dict[str, Any]) -> None:
    """From its address to its maps drawn."""
    if crowded_open["ms"] >= OPEN_S * 1000 and busy():
        pytest.skip(f"the machine is busy: load {os.getloadavg()[0]:.1f}")
    assert crowded_open["ms"] < OPEN_S * 1000


def test_its_aggregates_come_first_and_its_maps_are_drawn(crowded_open: dict[str, Any]) -> None:
    assert crowded_open["headings"] == ["Density", "Counts along the length", "Stretched"]
    assert all(marked > 0.3 for marked, _ in crowded_open["ink"])
    assert BROWSER.complaints(crowded_open["log"]) == []


def test_a_class_is_hidden_and_shown_again_at_its_button(crowded_open: dict[str, Any]) -> None:
    assert crowded_open["ink"][0][1] > 0.005
    assert crowded_open["hidden"][1] == 0
    assert crowded_open["hidden"][0] > 0.3
    assert crowded_open["again"] == crowded_open["ink"][0]


def test_a_mark_tells_its_figures(crowded_open: dict[str, Any]) -> None:
    lines = crowded_open["tip"].split("\n")

    assert lines[0] in CLASSES
    assert lines[1].startswith("y ")
    assert "mm (along × across)" in lines[2]
    assert lines[3].startswith("score 0.")


def test_a_mark_of_a_crowded_page_tells_its_figures_as_the_gallery_does(roll: Roll, tmp_path: Path) -> None:
    """Whole numbers from 100 on, on a strip of 2.5 m."""
    run, _ = write_run(tmp_path, roll, 2001)
    summary = json.loads((run / "summary.json").read_text()) | {"mm_per_px_x": 5.3}
    (run / "summary.json").write_text(json.dumps(summary))
    table = pq.read_table(run / "defects.parquet")
    figures = {"x_mm": 1237.6, "length_mm": 1234.0, "width_mm": 45.62, "area_mm2": 345.6}
    for name, value in figures.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array([value] * len(table)))
    pq.write_table(table, run / "defects.parquet")
    page = write_page(run, roll, lambda y0, y1: np.zeros((y1 - y0, WIDTH), np.uint8))
    lines = opened(run, tmp_path)["tip"].split("\n")

    assert lines[1].endswith(" m · x 1,238 mm")
    assert lines[2] == "1,234 × 45.6 mm (along × across), 346 mm²"
    assert "x 1,238 mm</b>" in page.read_text() and "1,234 × 45.6 mm · 346 mm²" in page.read_text()


def test_marks_with_a_picture_lie_on_top_and_lead_to_it(crowded_open: dict[str, Any]) -> None:
    assert crowded_open["links"] >= 60
    assert crowded_open["onTop"]
    assert crowded_open["target"]


@pytest.mark.parametrize("count", [0, 300])
def test_a_page_with_few_defects_or_none_opens_without_a_complaint(
    count: int, roll: Roll, tmp_path: Path
) -> None:
    run, _ = write_run(tmp_path, roll, count)
    found = opened(run, tmp_path)

    assert BROWSER.complaints(found["log"]) == []
    assert found["headings"][0] == "Stretched"
    assert found["links"] == (2 * 60 if count else 0)  # on both maps
    assert count == 0 or found["target"]


def test_two_lighting_modes_stand_side_by_side_and_nothing_is_wider_than_the_window(
    crowded_open: dict[str, Any],
) -> None:
    width, gap, below = crowded_open["pictures"]

    assert width > 200
    assert 0 <= gap < 10
    assert below == 0
    assert crowded_open["wide"] <= 0


def test_the_page_opens_from_its_folder_as_a_user_opens_it(
    crowded: tuple[Path, float], tmp_path: Path
) -> None:
    """As a file, without any server: the maps are there in colour, and nothing is complained of."""
    shot = tmp_path / "page.png"
    log = BROWSER.chromium(
        tmp_path / "profile",
        "--window-size=1360,1600",
        f"--screenshot={shot}",
        (crowded[0] / "report.html").as_uri(),
    )
    gray = np.asarray(Image.open(shot).convert("RGB"), np.int16)
    colourful: Callable[[slice], float] = lambda rows: float((np.ptp(gray[rows], axis=2) > 60).mean())  # noqa: E731

    assert BROWSER.complaints(log) == []
    assert colourful(slice(380, 1500)) > 0.2
