"""The page of a roll, made from small real rolls and run folders."""

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.errors import UserError
from rollsight.inspect.report import crops, strip_map
from rollsight.inspect.report.page import write_page
from rollsight.inspect.rolls import Roll, RollWriter, Strip

CLASSES = ("inclusion", "pit", "scratches")
LINES, WIDTH = 3000, 200
LEFT, RIGHT = 10, 190  # the strip's edges, px
DISC = {
    "kind": 0,
    "x0": 90,
    "y0": 500,
    "x1": 130,
    "y1": 520,
}  # 40 px x 20 lines: round at 0.5 mm/px, 1 mm/line
PIT = {"kind": 1, "x0": 30, "y0": 1000, "x1": 33, "y1": 1003}
SCRATCH = {"kind": 2, "x0": 60, "y0": 1200, "x1": 62, "y1": 2900}
BOXES = (DISC, PIT, SCRATCH)

Mask = NDArray[np.uint8]
ReadMask = Callable[[int, int], Mask]


class Elements(HTMLParser):
    """All start tags with their attributes, and the text of the page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.last = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.last = tag

    def handle_endtag(self, tag: str) -> None:
        self.last = ""

    def handle_data(self, data: str) -> None:
        if self.last not in ("script", "style"):
            self.texts.append(data)

    def all(self, tag: str, css: str = "") -> list[dict[str, str | None]]:
        return [a for name, a in self.tags if name == tag and css in [*(a.get("class") or "").split(), ""]]

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def small_mask() -> Mask:
    mask = np.zeros((LINES, WIDTH), np.uint8)
    y, x = np.mgrid[0:LINES, 0:WIDTH]
    mask[((x - 109.5) / 20) ** 2 + ((y - 509.5) / 10) ** 2 <= 1] = 1
    mask[1000:1003, 30:33] = 2
    mask[1200:2900, 60:62] = 3
    mask[2000:2100] = 255
    return mask


def make_roll(
    folder: Path, *, mm: bool = True, lighting: tuple[str, ...] = ("bright",), dtype: str = "uint8"
) -> Roll:
    white = np.iinfo(dtype).max
    gray = np.random.default_rng(3).normal(0.5, 0.02, (len(lighting), LINES, WIDTH))
    gray[:, small_mask() % 255 > 0] = 0.2
    gray[:, :, :LEFT] = gray[:, :, RIGHT:] = 0.0
    strip = Strip("C1", "top", lighting, 0.5 if mm else None, 1.0 if mm else None, line_id="CGL2")
    with RollWriter(folder / "C1.zarr", strip, WIDTH, np.dtype(dtype)) as writer:
        writer.append((gray.clip(0, 1) * white).astype(dtype))
        return writer.close()


def table_row(number: int, box: dict[str, int], *, mm: bool = True) -> dict[str, Any]:
    width, length = box["x1"] - box["x0"], box["y1"] - box["y0"]
    return {
        "defect_id": number,
        "class": CLASSES[box["kind"]],
        "x_mm": (box["x0"] - LEFT) * 0.5 if mm else None,
        "y_m": box["y0"] / 1000 if mm else None,
        "width_mm": width * 0.5 if mm else None,
        "length_mm": float(length) if mm else None,
        "area_mm2": width * length * 0.5 if mm else None,
        "area_px": width * length,
        "score": 0.91,
        **{name: box[name] for name in ("x0", "y0", "x1", "y1")},
    }


def crowd(count: int) -> list[dict[str, Any]]:
    """Rows of defects of 5 px x 9 lines all over the roll, of three classes in turn."""
    rng = np.random.default_rng(0)
    places = zip(rng.integers(LEFT, 180, count).tolist(), rng.integers(0, 2990, count).tolist(), strict=True)
    return [
        table_row(number, {"kind": number % 3, "x0": x, "y0": y, "x1": x + 5, "y1": y + 9})
        for number, (x, y) in enumerate(places)
    ]


SCHEMA = pa.schema(
    [("defect_id", pa.int64()), ("class", pa.string())]
    + [(name, pa.float64()) for name in ("x_mm", "y_m", "width_mm", "length_mm", "area_mm2")]
    + [("area_px", pa.int64()), ("score", pa.float32())]
    + [(name, pa.int64()) for name in ("x0", "y0", "x1", "y1")]
)


def make_run(
    folder: Path, *, mm: bool = True, rows: list[dict[str, Any]] | None = None, **changes: Any
) -> Path:
    run = folder / "run"
    run.mkdir(exist_ok=True)
    if rows is None:
        rows = [table_row(7 + i, box, mm=mm) for i, box in enumerate(BOXES)]
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), run / "defects.parquet")
    summary = {
        "roll_id": "C1",
        "run_id": "8f31",
        "model": "default",
        "model_hash": "3c1f77",
        "engine": "onnxruntime",
        "executor": "threads",
        "units": "mm" if mm else "px",
        "lines": LINES,
        "width_px": WIDTH,
        "length_m": 3.0 if mm else None,
        "width_mm": 90.0 if mm else None,
        "coverage": 0.96669,
        "verdict": "HOLD",
        "reasons": ["coverage 96.66 % is under 99 %"],
        "defects": len(rows),
        "by_class": {name: sum(row["class"] == name for row in rows) for name in CLASSES},
        "not_inspected": [{"x0": 0, "y0": 2000, "x1": WIDTH, "y1": 2100, "reason": "dark"}],
        "edges": [[y, LEFT, RIGHT] for y in range(0, LINES, 64)],
        "mm_per_px_x": 0.5 if mm else None,
        "mm_per_line": 1.0 if mm else None,
        "side": "top",
        "lighting": ["bright"],
        "classes": list(CLASSES),
        "seconds": 1.5,
        "mpix_s": 2.5,
        "created_at": "2026-11-22T02:14:09+00:00",
        "code_version": "0.1.0+abc",
        "notes": [],
    } | changes
    (run / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return run


def read_small_mask(y0: int, y1: int) -> Mask:
    return small_mask()[y0:y1]


@pytest.fixture(scope="module")
def roll(tmp_path_factory: pytest.TempPathFactory) -> Roll:
    return make_roll(tmp_path_factory.mktemp("rolls"))


def written(run: Path, roll: Roll, read_mask: ReadMask = read_small_mask) -> str:
    return write_page(run, roll, read_mask).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def html(roll: Roll, tmp_path_factory: pytest.TempPathFactory) -> str:
    return written(make_run(tmp_path_factory.mktemp("plain")), roll)


def picture(uri: str | None) -> NDArray[np.uint8]:
    assert uri is not None
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))


def test_the_page_asks_for_nothing_outside(html: str) -> None:
    """Every reference is data, a place on the page or a file beside it; the page forbids itself all else."""
    page = Elements(html)
    references = [
        value
        for _, attributes in page.tags
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href")
        if (value := attributes.get(name))
    ]
    outside = {value for value in references if not value.startswith(("data:", "#"))}

    assert outside == {"defects.csv", "defects.parquet", "summary.json"}
    assert "://" not in html
    assert "@import" not in html
    assert set(re.findall(r"url\(([^)]*)\)", html)) == {"#hatching"}
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")


def test_the_first_lines_say_what_was_inspected_and_why_it_is_held(html: str) -> None:
    page = Elements(html)

    head, facts = page.text.split("Strip map")[0], page.text
    for words in (
        "C1 HOLD",
        "coverage 96.66 % is under 99 %",
        "96.66 % of the strip inspected",
        "3 defects found",
    ):
        assert words in head
    for words in (
        "Line CGL2",
        "Side top",
        "90 mm × 3.00 m",
        "Model default",
        "Run 8f31",
        "2026-11-22 02:14 UTC",
    ):
        assert words in facts
    for words in ("3c1f77", "onnxruntime", "0.1.0+abc", "1.5 s", "2.50 MPix/s"):
        assert words in facts.split("How this was made")[1]
    assert page.all("header", "hold")


def test_an_ungraded_roll_is_neutral(roll: Roll, tmp_path: Path) -> None:
    page = Elements(written(make_run(tmp_path, verdict="UNGRADED"), roll))

    assert page.all("header", "neutral")
    assert not page.all("header", "hold")


def test_coverage_is_never_rounded_up(roll: Roll, tmp_path: Path) -> None:
    text = Elements(written(make_run(tmp_path, coverage=0.99999), roll)).text

    assert "99.99 % of the strip" in text


def test_what_comes_from_files_is_shown_and_never_run(roll: Roll, tmp_path: Path) -> None:
    """Notes, reasons, class names and the rest are text, in the page and in the data for the canvas."""
    evil = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    changes = {
        "notes": [evil],
        "reasons": [evil],
        "model": evil,
        "run_id": evil,
        "classes": [evil, "pit", "</script><script>alert(3)"],
        "not_inspected": [{"x0": 0, "y0": 0, "x1": 9, "y1": 9, "reason": evil}],
    }
    rows = [table_row(n, DISC) | {"class": evil if n else "</script><script>alert(3)"} for n in range(2001)]
    page = Elements(written(make_run(tmp_path, rows=rows, defects=2001, **changes), roll))

    assert [a.get("type") for a in page.all("script")] == ["application/json", None]
    assert not [a for _, a in page.tags if "onerror" in a or a.get("src") == "x"]
    assert evil in page.text


def test_every_defect_is_a_mark_on_both_maps(html: str) -> None:
    """A small one is a symbol at its place; a scratch of 1.7 m on 3 m of strip has its real extent."""
    page = Elements(html)
    marks, long = page.all("use", "mark"), page.all("rect", "long")

    assert len(marks) == 4
    assert len(long) == 2
    stretched = long[0]
    assert stretched["x"] == "40.000%"  # from 1.2 m of 3 m
    assert stretched["width"] == "56.667%"
    assert float(str(stretched["y"])[:-1]) == pytest.approx((25 / 90 + 0.04) / 1.08 * 100, abs=0.01)
    assert (
        "scratches #9 y 1.200 m · x 25 mm 1,700 × 1.00 mm (along × across), 1,700 mm² score 0.91" in page.text
    )


def test_a_mark_leads_to_its_crop_and_back(html: str) -> None:
    page = Elements(html)
    places = {a["id"] for _, a in page.tags if a.get("id")}
    links = {a["href"] for a in page.all("a") if str(a["href"]).startswith("#")}

    assert {"d7", "d8", "d9", "m7", "m8", "m9"} <= places
    assert {"#d7", "#m7", "#d9", "#m9"} <= links
    assert {str(link)[1:] for link in links} <= places


def test_not_inspected_strip_is_hatched_on_maps_and_profile_and_listed(html: str) -> None:
    page = Elements(html)
    hatched = [a for a in page.all("rect", "hatch") if str(a.get("x", "")).startswith("66.667")]

    assert len(hatched) == 3
    assert all(a["width"] == "3.333%" for a in hatched)
    assert "dark 2.00 2.10 0.10 0 90" in page.text
    assert "they are not clean strip" in page.text


def test_parts_joined_over_inspected_strip_say_so_and_hide_no_edge(tmp_path: Path, roll: Roll) -> None:
    joined = [{"x0": 0, "y0": 0, "x1": WIDTH, "y1": LINES, "reason": "dropped"}]
    told = {"not_inspected": joined, "not_inspected_parts": 3000}
    run = make_run(tmp_path, **told, not_inspected_exact=False)
    page = Elements(written(run, roll))

    assert "There are 3,000 of them in all" in page.text and "more is hatched than was lost" in page.text
    summary = json.loads((run / "summary.json").read_text())
    assert len(strip_map.frame_of(summary).edge_lines) == len(summary["edges"])
    assert len(strip_map.frame_of(summary | {"not_inspected_exact": True}).edge_lines) == 1


def test_parts_are_counted_as_they_are_listed_and_other_counts_are_told(tmp_path: Path, roll: Roll) -> None:
    """A part of 100 lines lies in three rows of 64: summary.json counts three, the page one."""
    text = Elements(written(make_run(tmp_path, not_inspected_parts=3), roll)).text

    assert "inspected 1 part not inspected" in text
    assert "summary.json counts 3, each row by itself" in text
    joined = {"not_inspected_parts": 3000, "not_inspected_exact": False}
    assert "inspected 3,000 parts not inspected" in Elements(written(make_run(tmp_path, **joined), roll)).text


def test_all_parts_of_a_summary_are_hatched_and_more_are_told(tmp_path: Path, roll: Roll) -> None:
    """A summary lists up to 2,000."""
    rows = [
        {"x0": x, "x1": x + 3, "y0": 5 * y, "y1": 5 * y + 2} for y in range(515) for x in (20, 60, 99, 140)
    ]
    parts = [row | {"reason": "dark"} for row in rows]
    all_of_them, more = (
        Elements(written(make_run(tmp_path, not_inspected=some), roll)) for some in (parts[:2000], parts)
    )

    assert len(all_of_them.all("rect", "flag")) == 2000
    assert "hatched, largest first" not in all_of_them.text
    assert "2,000 of 2,060 parts not inspected hatched, largest first; the coverage counts all." in more.text


def faint_line(y0: int, y1: int, *, mm: bool = True) -> dict[str, Any]:
    """A faint line at 30 px from the drive-side edge, as a summary has it."""
    return {
        **{"class": "scratches", "evidence": 91.5, "in_table": 0.25},
        **{"x_mm": 15.0 if mm else None, "y_m": y0 / 1000 if mm else None},
        **{"length_mm": float(y1 - y0) if mm else None, "x0": 40, "y0": y0, "x1": 48, "y1": y1},
    }


@pytest.mark.parametrize(("mm", "row"), [(True, "15 0.640 1,920 25"), (False, "30 640 1,920 25")])
def test_faint_lines_are_told_drawn_and_listed_longest_first(
    roll: Roll, tmp_path: Path, *, mm: bool, row: str
) -> None:
    lines = [faint_line(64, 704, mm=mm), faint_line(640, 2560, mm=mm)]
    page = Elements(written(make_run(tmp_path, rows=[], mm=mm, faint_lines=lines), roll))

    assert "0 defects found 2 faint lines" in page.text
    assert "of the strip that was inspected, but 2 faint lines along it" in page.text
    assert f"scratches {row} scratches" in page.text
    assert [a.get("x") for a in page.all("rect", "faint")][:3] == [None, "21.333%", "2.133%"]
    assert "faint_lines.csv" in {a["href"] for a in page.all("a")}


def test_of_many_faint_lines_the_longest_are_listed_and_none_are_told_where_looked_for(
    roll: Roll, tmp_path: Path
) -> None:
    many, none = (
        Elements(written(make_run(tmp_path, rows=[], faint_lines=lines), roll))
        for lines in ([faint_line(0, 64 * n) for n in range(1, 41)], [])
    )

    assert "The 30 longest; all are in faint_lines.csv." in many.text
    assert "15 0.000 704 25" in many.text and "15 0.000 640 25" not in many.text
    assert "None was found by the evidence summed along the strip." in none.text
    assert "No defect was found in the 96.66 % of the strip that was inspected." in none.text
    assert "faint_lines.csv" in {a["href"] for a in none.all("a")}


def test_the_class_table_counts_measures_and_rates_by_inspected_length(html: str) -> None:
    text = Elements(html).text

    assert "pit 1 34.5 3.00 4.50 0.91" in text  # 1 in 3 m x 0.96669
    assert "scratches 1 34.5 1,700 1,700 0.91" in text
    assert "All 3 103 1,700 2,104 0.91" in text


def test_the_bars_count_a_defect_once_where_it_begins(html: str) -> None:
    page = Elements(html)
    bars = page.all("rect", "bar")

    assert len(bars) == 3
    assert "1 × scratches, 1.2 to 1.3 m" in page.text


def test_in_px_units_nothing_says_mm(tmp_path: Path) -> None:
    page = Elements(written(make_run(tmp_path, mm=False), make_roll(tmp_path, mm=False)))

    assert "this roll has no mm per pixel" in page.text
    assert not re.search(r"\d mm|mm²|\d m\b", page.text)
    assert "y 1,000 px · x 20 px" in page.text  # 30 px less the edge at 10 px
    assert "Longest, px" in page.text
    assert "Area, px" in page.text


def test_a_roll_without_defects_is_not_called_clean(roll: Roll, tmp_path: Path) -> None:
    page = Elements(written(make_run(tmp_path, rows=[]), roll))

    assert "No defect was found in the 96.66 % of the strip that was inspected." in page.text
    assert not page.all("li", "tile")


def test_many_defects_go_to_a_canvas_and_the_page_stays_small(roll: Roll, tmp_path: Path) -> None:
    rows = crowd(20_000)
    html = written(make_run(tmp_path, rows=rows), roll)
    page = Elements(html)

    assert len(html.encode()) < 3_000_000
    assert len(page.all("canvas")) == 2
    data = json.loads(html.split('id="marks">')[1].split("</script>")[0])
    assert data["n"] == 20_000
    assert {len(base64.b64decode(data[name])) for name in ("kind", "score")} == {20_000}
    by_size = sorted(rows, key=lambda row: (-row["area_mm2"], row["defect_id"]))
    along = np.frombuffer(base64.b64decode(data["along"]), "<u4")
    assert along.tolist() == [row["y0"] for row in by_size]
    length = np.frombuffer(base64.b64decode(data["length"]), "<u2")
    assert 2 ** (length / data["logSteps"]) - 1 == pytest.approx(9.0, rel=4e-4)
    assert "60 of 20,000 shown, largest first, at least 3 per class" in page.text


def test_on_a_crowded_map_what_has_a_picture_is_a_link_to_it_and_back(roll: Roll, tmp_path: Path) -> None:
    page = Elements(written(make_run(tmp_path, rows=crowd(2001)), roll))
    tiles = {str(a["id"])[1:] for a in page.all("li", "tile")}

    assert len(tiles) == 60
    assert {str(a["id"])[1:] for _, a in page.tags if str(a.get("id", "")).startswith("m")} - {
        "arks"
    } == tiles
    assert {a["href"] for a in page.all("a")} >= {f"#{side}{number}" for side in "dm" for number in tiles}
    assert {a["data-kind"] for a in page.all("button")} == {"0", "1", "2"}  # classes are shown and hidden


def test_on_a_crowded_page_the_density_comes_first_and_counts_all(roll: Roll, tmp_path: Path) -> None:
    """90 mm x 3 m: cells of 0.1 m x 7.5 mm."""
    text = Elements(written(make_run(tmp_path, rows=crowd(3000)), roll)).text

    counted = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) defects, [\d.,]+ per m² y", text)]
    assert sum(counted) == 3000
    assert text.index("Density") < text.index("Counts along the length") < text.index("Stretched")
    first = re.search(r"(\d+) defects, ([\d,]+) per m² y 0 to 0.1 m, x 0 to 8 mm", text)
    assert first is not None
    assert float(first[2].replace(",", "")) == pytest.approx(int(first[1]) / (0.1 * 0.0075), rel=0.01)


def test_a_page_with_few_defects_has_no_density_map(html: str) -> None:
    assert "Density" not in Elements(html).text


def test_with_three_lighting_modes_the_gallery_holds_fewer_defects(tmp_path: Path) -> None:
    """120 pictures in all, whatever the modes; those of a defect stand side by side."""
    roll = make_roll(tmp_path, lighting=("bright", "dark", "low", "back"))
    html = written(make_run(tmp_path, rows=crowd(100), lighting=["bright", "dark", "low", "back"]), roll)
    page = Elements(html)

    assert len(page.all("li", "tile")) == 40
    assert len(page.all("img")) == 120
    assert "Lighting modes side by side, the first 3 of 4." in page.text
    assert "--modes:3" in html


def test_the_gallery_holds_the_largest_and_some_of_each_class() -> None:
    kind = np.array([0] * 100 + [1] * 5, np.int64)
    floats = np.arange(105, 0, -1).astype(np.float64)
    boxes = np.zeros((105, 4), np.int64)
    chosen = crops.pick(strip_map.Defects(np.arange(105), kind, *(floats,) * 6, boxes))

    assert len(chosen) == 60
    assert (kind[chosen] == 1).sum() == 3
    assert chosen.tolist() == [*range(57), 100, 101, 102]


def test_a_round_dent_is_round_in_its_crop(html: str) -> None:
    """40 px x 20 lines at 0.5 mm and 1 mm: 20 mm both ways. Turned so that the length runs to the right."""
    image = picture(next(a["src"] for a in Elements(html).all("img") if "#7" in str(a["alt"])))
    dark = image < (int(image.min()) + int(image.max())) // 2
    columns, rows = np.flatnonzero(dark.any(axis=0)), np.flatnonzero(dark.any(axis=1))

    assert image.shape == crops.TILE[::-1]
    assert np.ptp(columns) == pytest.approx(np.ptp(rows), rel=0.08)
    assert columns.mean() == pytest.approx(crops.TILE[0] / 2, abs=3)
    assert rows.mean() == pytest.approx(crops.TILE[1] / 2, abs=3)


def test_a_scratch_of_metres_is_shrunk_and_says_so(html: str) -> None:
    page = Elements(html)
    scratch = next(a["src"] for a in page.all("img") if "#9" in str(a["alt"]))

    assert "length shrunk" in page.text
    assert page.text.count("length shrunk") == 1
    image = picture(scratch).astype(float)
    assert image[:, 60:120].mean(axis=1).argmin() == pytest.approx(
        crops.TILE[1] / 2, abs=4
    )  # still to be seen


def test_the_outline_lies_on_the_border_of_the_mask(roll: Roll) -> None:
    frame = strip_map.frame_of(json.loads((make_run(roll.path.parent) / "summary.json").read_text()))
    crop = crops.crop(roll, read_small_mask, frame, np.array([30, 1000, 33, 1003]), 1)
    left, top, width, height = (float(v) for v in crop.view.split())

    points = [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)", crop.outline)]
    assert (left + width / 2, top + height / 2) == (
        pytest.approx(np.mean([min(x for x, _ in points), max(x for x, _ in points)])),
        pytest.approx(np.mean([min(y for _, y in points), max(y for _, y in points)])),
    )
    assert len(points) == 4  # a square pit has four straight borders
    assert crop.others == ""
    assert crop.along.size / crop.along.share * 100 == pytest.approx(48.0)  # mm: 32 px of 1 mm across, 3 : 2


@pytest.mark.parametrize("long", [1, 40])  # 40: in blocks of several lines, read in several goes
def test_another_defect_of_its_class_in_its_box_is_drawn_as_another(roll: Roll, long: int) -> None:
    """A thin slanted scratch, and in a corner of its box a blob of many more px."""
    mask = np.zeros((LINES, WIDTH), np.uint8)
    for y in range(60 * long):
        mask[200 + y, 50 + y // long : 52 + y // long] = 3
    alone = mask.copy()
    mask[200 : 200 + 24 * long, 86:110] = 3
    frame = strip_map.frame_of(json.loads((make_run(roll.path.parent) / "summary.json").read_text()))
    box = np.array([50, 200, 111, 200 + 60 * long])
    drawn, expected = (
        crops.crop(roll, lambda y0, y1, mask=mask: mask[y0:y1], frame, box, 2) for mask in (mask, alone)
    )

    assert drawn.outline == expected.outline
    assert drawn.others and not expected.others


@given(arrays(np.bool_, st.tuples(st.integers(1, 9), st.integers(1, 9))))
def test_an_outline_has_the_perimeter_of_the_mask(mask: NDArray[np.bool_]) -> None:
    padded = np.pad(mask, 1).astype(int)
    perimeter = int(abs(np.diff(padded, axis=0)).sum() + abs(np.diff(padded, axis=1)).sum())
    drawn = 0
    for x, y, along, end in re.findall(r"M(\d+) (\d+)([HV])(\d+)", crops.outline(mask)):
        drawn += int(end) - int(x if along == "H" else y)

    assert drawn == perimeter


@given(st.floats(1e-6, 1e9))
def test_a_nice_number_is_1_2_or_5_and_hardly_larger(value: float) -> None:
    found = strip_map.nice(value)

    assert value * (1 - 1e-8) <= found <= 2.5 * value * (1 + 1e-8)
    assert f"{found:.0e}"[0] in "125"


@given(st.integers(1, 20_000_000), st.integers(64, 8000), st.floats(0.05, 2.0), st.floats(0.05, 2.0))
def test_the_map_to_scale_has_true_proportions_and_covers_the_roll(
    lines: int, width: int, per_line: float, per_px: float
) -> None:
    one = np.zeros(1)
    frame = strip_map.Frame(lines, width, per_line, per_px, one, one, one + width)
    rows = strip_map.to_scale(frame)

    assert 1 <= len(rows) <= strip_map.MAX_ROWS
    assert rows[0].start == 0
    assert rows[-1].start < frame.length <= (rows[-1].start + rows[-1].span) * (1 + 1e-9)
    for row in rows:
        assert row.width_px / row.span == pytest.approx(row.height_px / row.across_span)


def test_edges_traced_in_the_dark_are_not_believed(tmp_path: Path) -> None:
    edges = [[y, 60.0 if 2000 <= y < 2100 else LEFT, RIGHT] for y in range(0, LINES, 64)]
    frame = strip_map.frame_of(json.loads((make_run(tmp_path, edges=edges) / "summary.json").read_text()))

    assert frame.left(2050.0) == LEFT


def test_both_lighting_modes_of_a_16_bit_roll_are_shown(tmp_path: Path) -> None:
    roll = make_roll(tmp_path, lighting=("bright", "dark"), dtype="uint16")
    page = Elements(written(make_run(tmp_path, lighting=["bright", "dark"]), roll))

    assert len(page.all("img")) == 6
    assert "Lighting bright, dark" in page.text


def test_the_picture_behind_the_map_is_bounded(html: str) -> None:
    [overview] = Elements(html).all("image")

    assert len(str(overview["href"])) < 150_000
    assert picture(overview["href"]).shape[0] == 320


def test_a_page_is_replaced_as_a_whole_and_leaves_no_draft(roll: Roll, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / "report.html").write_text("old")

    def fails(y0: int, y1: int) -> Mask:
        raise UserError("the mask cannot be read")

    with pytest.raises(UserError, match="the mask"):
        write_page(run, roll, fails)
    assert (run / "report.html").read_text() == "old"
    assert write_page(run, roll, read_small_mask) == run / "report.html"
    assert "C1" in (run / "report.html").read_text()
    assert sorted(path.name for path in run.iterdir()) == ["defects.parquet", "report.html", "summary.json"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda run: (run / "summary.json").unlink(), "summary.json cannot be read"),
        (lambda run: (run / "summary.json").write_text("{}"), "summary.json lacks roll_id"),
        (
            lambda run: (run / "defects.parquet").write_bytes(b"no table"),
            "defects.parquet is not the defect table",
        ),
    ],
)
def test_a_damaged_run_is_one_clear_line(
    roll: Roll, tmp_path: Path, damage: Callable[[Path], object], words: str
) -> None:
    run = make_run(tmp_path)
    damage(run)

    with pytest.raises(UserError, match=words) as error:
        write_page(run, roll, read_small_mask)
    assert "\n" not in str(error.value)


def test_a_run_of_another_roll_is_refused(roll: Roll, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is of roll C2"):
        write_page(make_run(tmp_path, roll_id="C2"), roll, read_small_mask)


def test_tables_have_headers_and_pictures_have_words(html: str) -> None:
    page = Elements(html)

    assert all(a.get("scope") in ("col", "row") for a in page.all("th"))
    assert all(a.get("alt") for a in page.all("img"))
    assert all(a.get("role") == "img" and a.get("aria-label") for a in page.all("svg", "axes"))
