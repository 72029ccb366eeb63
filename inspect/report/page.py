"""The page of a roll, opened by a quality engineer in the morning: one HTML file that needs nothing else."""

import base64
import hashlib
import io
import json
import math
import os
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pyarrow.parquet as pq
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.coverage import in_percent
from rollsight.inspect.errors import UserError
from rollsight.inspect.report import crops, strip_map
from rollsight.inspect.report.strip_map import Defects, Frame, Plot, Sizes, is_exact
from rollsight.inspect.rolls import Roll
from rollsight.inspect.tiles import CELL

# Okabe & Ito 2008, "Color Universal Design": told apart with any colour vision. Yellow last: faint on paper.
# Then four of Tol's "muted" scheme (2021, SRON/EPS/TN/09-002), for catalogues of more than eight classes.
COLOURS = (
    *("#D55E00", "#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#000000", "#F0E442"),
    *("#882255", "#999933", "#332288", "#AAAAAA"),
)
# From few to many; ColorBrewer "Blues" (Harrower & Brewer 2003), dark last, so it prints.
SHADES = ("#DEEBF7", "#C6DBEF", "#9ECAE1", "#6BAED6", "#3182BD", "#08519C")
# A shape per class as well, for black-and-white print; unit radius, SVG path.
SHAPES = (
    "M-1 0A1 1 0 1 0 1 0A1 1 0 1 0 -1 0Z",
    "M-.9 -.9H.9V.9H-.9Z",
    "M0 -1.3L1.3 0L0 1.3L-1.3 0Z",
    "M0 -1.2L1.15 .9H-1.15Z",
    "M-1.15 -.9H1.15L0 1.2Z",
    "M-.4 -1.15H.4V-.4H1.15V.4H.4V1.15H-.4V.4H-1.15V-.4H-.4Z",
    "M-.8 -1.15L0 -.4L.8 -1.15L1.15 -.8L.4 0L1.15 .8L.8 1.15L0 .4L-.8 1.15L-1.15 .8L-.4 0L-1.15 -.8Z",
    "M-1.1 -1H1.1L-1.1 1H1.1Z",
)
MAX_SVG_MARKS = 2000  # above, marks are drawn on a canvas from data: a browser is slow with more elements
MAX_MARKS = 200_000  # drawn at all, largest first, at 18.7 bytes each: keeps the page under 8 MB
LOG_STEPS = 2048  # of a doubling: sizes are kept to 0.03 % in 16 bits
MAX_PARTS = 30  # rows of the not-inspected table
MAX_FAINT = 30  # rows of the table of faint lines
OVERVIEW_PX = (1400, 320)  # of the picture behind the stretched map: along, across
OVERVIEW_BYTES = 110_000  # of its JPEG: 150 kB as a data URI
OVERVIEW_READ_BYTES = 2**25  # of the pyramid level it is made from

FOLDER = Path(__file__).parent
DOWNLOADS = (
    ("defects.csv", "defect table for a spreadsheet"),
    ("defects.parquet", "defect table for programs"),
    ("summary.json", "verdict, coverage, counts and provenance"),
)
FAINT_DOWNLOAD = ("faint_lines.csv", "faint lines for a spreadsheet")  # of a scan that looked for them
_NEEDED = (
    *("roll_id", "run_id", "model", "model_hash", "engine", "executor", "code_version", "created_at"),
    *("units", "lines", "width_px", "length_m", "width_mm", "mm_per_px_x", "mm_per_line", "side", "lighting"),
    *("coverage", "verdict", "reasons", "notes", "classes", "defects", "not_inspected", "edges"),
    *("seconds", "mpix_s"),
)


def write_page(run: Path, roll: Roll, read_mask: Callable[[int, int], NDArray[np.uint8]]) -> Path:
    """Write report.html into the folder of a finished run, whole or not at all; returns its path.

    run holds summary.json and defects.parquet. read_mask(y0, y1) gives the class mask of those lines, uint8
    (y1 - y0, W): 0 background, i + 1 the i-th of the summary's classes, 255 not inspected. UserError where
    the run's files are missing, damaged or of another roll.
    """
    summary = _summary(run, roll)
    frame = strip_map.frame_of(summary)
    classes = tuple(summary["classes"])
    try:
        table = pq.read_table(run / "defects.parquet")
        defects = strip_map.defects_of(table, frame, classes, mm=summary["units"] == "mm")
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"{run / 'defects.parquet'} is not the defect table of this run ({error}): scan again"
        ) from error
    html = _render(_content(summary, frame, defects, roll, read_mask))

    page = run / "report.html"
    draft = run / f".report.{os.getpid()}.html"
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(html)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(page)
    finally:
        draft.unlink(missing_ok=True)
    return page


def _summary(run: Path, roll: Roll) -> dict[str, Any]:
    """summary.json, checked to be one of this roll."""
    path = run / "summary.json"
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): scan the roll again") from error
    missing = [key for key in _NEEDED if key not in summary] if isinstance(summary, dict) else list(_NEEDED)
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: scan the roll again with this version")
    found = (summary["roll_id"], summary["lines"], summary["width_px"])
    if found != (roll.roll_id, roll.lines, roll.width):
        raise UserError(
            f"{path} is of roll {found[0]} ({found[1]} x {found[2]} px),"
            f" not of {roll.roll_id} ({roll.lines} x {roll.width} px)"
        )
    return dict(summary)


def environment() -> jinja2.Environment:
    """What the pages' templates are read with."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(number=number, measure=measure, percent=lambda value: f"{value:.3f}%")
    return made


def _render(content: dict[str, Any]) -> str:
    """The template filled in. All values are escaped; only our own style and script are not."""
    style, script = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    script_hash = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    ours = {"style": style, "script": script, "script_hash": script_hash}
    trusted = {name: Markup(text) for name, text in ours.items()}  # noqa: S704 # files of this package
    return environment().get_template("page.html").render(content, **trusted)


def number(value: float | None, digits: int = 0) -> str:
    """1234.5 -> "1,234"; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # + 0.0: never "-0"


def measure(value: float | None) -> str:
    """A size with about three digits that count: "1,234", "45.6", "0.82"."""
    if value is None or not math.isfinite(value):
        return "–"
    return number(value, 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2)


def _size(value: float | None, *, mm: bool) -> str:
    """A size of a defect: about three digits in mm or mm2, whole px."""
    return measure(value) if mm else number(value)


def _axis_number(value: float) -> str:
    """A tick label: no more digits than the tick needs."""
    return f"{value:,.6f}".rstrip("0").rstrip(".")


def _content(
    summary: dict[str, Any], frame: Frame, defects: Defects, roll: Roll, read_mask: crops.ReadMask
) -> dict[str, Any]:
    """All that the template shows."""
    mm = summary["units"] == "mm"
    crowded = len(defects) > MAX_SVG_MARKS
    sizes = strip_map.sizes_of(defects, crowded=crowded)
    chosen = crops.pick(defects, roll.modes)
    shown = {int(row) for row in chosen}
    parts = _parts(summary, frame)
    faint = summary.get("faint_lines")  # None where none were looked for
    drawn = defects.take(slice(MAX_MARKS))
    main, rows = strip_map.stretched(frame), strip_map.to_scale(frame)
    # On a crowded map only what has a picture is an element of the page, at its full size and on top.
    linked = [int(row) for row in chosen] if crowded else list(range(len(defects)))
    marks = partial(
        _drawing,
        defects=defects,
        sizes=strip_map.sizes_of(defects),
        rows=linked,
        parts=parts,
        faint=[frame.rect(line) for line in faint or ()],
    )
    profile = strip_map.profile(frame, defects, len(summary["classes"]))
    return {
        "s": summary,
        "strip": roll.strip,
        "mm": mm,
        "unit": "mm" if mm else "px",
        "area_unit": "mm²" if mm else "px",
        "strip_px": float(np.median(frame.right_px - frame.left_px)),
        "coverage": in_percent(float(summary["coverage"])),
        "date": _date(str(summary["created_at"])),
        "classes": _classes(summary["classes"]),
        "titles": {row: _title(defects, row, summary["classes"], mm=mm) for row in linked},
        "ids": defects.ids.tolist(),
        "kinds": defects.kind.tolist(),
        "shown": shown,
        "crowded": crowded,
        "drawn": len(drawn),
        "stretched": marks(main),
        "to_scale": [marks(row) for row in rows],
        "label_every": math.ceil(strip_map.LABEL_PX / rows[0].height_px),
        "row_width_px": rows[0].width_px if rows[0].width_px < strip_map.PLOT_PX else None,
        "row_span": rows[0].span / 1000 if mm else rows[0].span,
        "stretched_px": strip_map.STRETCHED_PX,
        "exaggeration": strip_map.STRETCHED_PX / main.across_span / (strip_map.PLOT_PX / main.span),
        "marks_data": _marks_data(drawn, sizes, summary["classes"], mm=mm) if crowded else None,
        "density": _density(frame, defects, summary["classes"], main, mm=mm) if crowded else None,
        "overview": _overview(roll, frame, main),
        "along_ticks": _along_ticks(main, mm=mm, count=12),
        "across_ticks": _across_ticks(main, 5),
        "legend_sizes": _legend_sizes(sizes) if len(defects) else [],
        "profile": _profile(profile, frame, mm=mm),
        "rows": _class_rows(summary, defects, frame),
        "gallery": [_tile(defects, row, summary["classes"], roll, read_mask, frame, mm=mm) for row in chosen],
        "per_class": crops.per_class(len(np.unique(defects.kind))),
        "tile": crops.TILE,
        "modes": roll.modes,
        "side_by_side": min(roll.modes, crops.MODES),
        "parts": parts,
        "part_rows": _part_rows(summary, parts, mm=mm),
        "max_parts": MAX_PARTS,
        "max_rects": strip_map.MAX_RECTS,
        "exact": is_exact(summary),
        "all_parts": summary.get("not_inspected_parts", len(parts)),
        "cell": CELL,
        "faint": None if faint is None else len(faint),
        "faint_rows": _faint_rows(faint or (), frame, mm=mm),
        "downloads": DOWNLOADS if faint is None else (*DOWNLOADS, FAINT_DOWNLOAD),
        "shapes": SHAPES,
        "shades": SHADES,
    }


def _date(created_at: str) -> str:
    """An ISO 8601 time as a person writes it; anything else as it is."""
    try:
        time = datetime.fromisoformat(created_at)
    except ValueError:
        return created_at
    return f"{time:%Y-%m-%d %H:%M} {time.tzname() or ''}".strip()


def _classes(names: Sequence[str]) -> list[dict[str, Any]]:
    """Colour and shape per class; beyond eight classes the pairs differ."""
    return [
        {
            "name": name,
            "colour": COLOURS[i % len(COLOURS)],
            "shape": (i + i // len(COLOURS)) % len(SHAPES),
            "halo": "#fff" if COLOURS[i % len(COLOURS)] == "#000000" else "#000",
        }
        for i, name in enumerate(names)
    ]


def _where(defects: Defects, row: int, *, mm: bool) -> dict[str, str]:
    """Position, size, area and score of a defect in words."""
    along, across = float(defects.along[row]), float(defects.across[row])
    length, width, area = (
        _size(float(values[row]), mm=mm) for values in (defects.length, defects.width, defects.area)
    )
    unit = "mm" if mm else "px"
    y = f"{number(along / 1000, 3)} m" if mm else f"{number(along)} px"
    return {
        "position": f"y {y} · x {number(across)} {unit}",
        "size": f"{length} × {width} {unit}",
        "area": f"{area} {unit}{'²' if mm else ''}",
        "score": number(float(defects.score[row]), 2),
    }


def _title(defects: Defects, row: int, classes: Sequence[str], *, mm: bool) -> str:
    """What a mark says under the pointer."""
    where = _where(defects, row, mm=mm)
    return (
        f"{classes[defects.kind[row]]} #{defects.ids[row]}\n{where['position']}\n"
        f"{where['size']} (along × across), {where['area']}\nscore {where['score']}"
    )


def _drawing(
    plot: Plot,
    *,
    defects: Defects,
    sizes: Sizes,
    rows: Sequence[int],
    parts: Sequence[tuple[float, float, float, float]],
    faint: Sequence[tuple[float, float, float, float]],
) -> dict[str, Any]:
    """One drawing of the strip, in per cent of its box, with marks for these rows of the defects."""
    mm_to_m = 1000
    return {
        "plot": plot,
        "end": plot.x(plot.end),
        "drive": plot.y(0.0),
        "operator": plot.y(plot.frame.width),
        "edge": plot.edge(),
        "parts": plot.rects(parts),
        "faint": plot.rects(faint),
        "marks": plot.marks(defects, sizes, rows),
        "aspect": plot.span / plot.across_span,
        "from_m": plot.start / mm_to_m,
        "to_m": plot.end / mm_to_m,
    }


def _marks_data(defects: Defects, sizes: Sizes, classes: Sequence[str], *, mm: bool) -> dict[str, Any]:
    """The marks as columns for the canvas: little-endian numbers in base64, as exact as can be told apart.

    along, mm or px, uint32; across, a tenth of a mm or px, uint16; length, width and area, mm and mm2 or px,
    as uint16 of LOG_STEPS * log2(1 + value); score, per cent, uint8; kind, uint8.
    """
    tenth = 10 if mm else 1

    def packed(values: NDArray[Any], dtype: str) -> str:
        limit = np.iinfo(dtype).max
        return base64.b64encode(np.clip(np.round(values), 0, limit).astype(dtype).tobytes()).decode("ascii")

    return {
        "mm": mm,
        "n": len(defects),
        "tenth": tenth,
        "logSteps": LOG_STEPS,
        "largest": sizes.largest,
        "radius": [sizes.small, sizes.large],
        "classes": list(classes),
        "colours": [entry["colour"] for entry in _classes(classes)],
        "shapes": [SHAPES[entry["shape"]] for entry in _classes(classes)],
        "kind": packed(defects.kind, "u1"),
        "along": packed(defects.along, "<u4"),
        "across": packed(defects.across * tenth, "<u2"),
        "length": packed(np.log2(1 + defects.length) * LOG_STEPS, "<u2"),
        "width": packed(np.log2(1 + defects.width) * LOG_STEPS, "<u2"),
        "area": packed(np.log2(1 + defects.area) * LOG_STEPS, "<u2"),
        "score": packed(defects.score * 100, "u1"),
    }


def _density(
    frame: Frame, defects: Defects, classes: Sequence[str], plot: Plot, *, mm: bool
) -> dict[str, Any]:
    """The density map: cells in per cent of the drawing, each with a shade and its figures, and a legend."""
    counts = strip_map.density(frame, defects, len(classes))
    size = strip_map.nice(frame.length / strip_map.MAX_BINS)
    starts = np.arange(len(counts)) * size
    ends = np.minimum(starts + size, frame.length)
    across = np.linspace(0, frame.width, strip_map.DENSITY_ROWS + 1)
    unit_area = 1e6  # mm2 of a m2, px of a Mpx
    per_area = counts.sum(axis=2) / ((ends - starts)[:, None] * np.diff(across)[None, :]) * unit_area
    top = strip_map.nice(float(per_area.max()))
    bounds = [top / 2**k for k in reversed(range(len(SHADES)))]
    unit, area_unit, scale = ("mm", "m²", 1000.0) if mm else ("px", "Mpx", 1.0)
    cells = []
    for i, j in np.argwhere(per_area > 0).tolist():
        held = counts[i, j].tolist()
        most = sorted((kind for kind, count in enumerate(held) if count), key=lambda kind: -held[kind])
        words = (
            f"{number(sum(held))} defects, {measure(float(per_area[i, j]))} per {area_unit}",
            f"y {_axis_number(starts[i] / scale)} to {_axis_number(ends[i] / scale)} {'m' if mm else 'px'},"
            f" x {number(across[j])} to {number(across[j + 1])} {unit}",
            *(f"{number(held[kind])} × {classes[kind]}" for kind in most),
        )
        cells.append(
            {
                "x": plot.x(float(starts[i])),
                "w": plot.x(float(ends[i])) - plot.x(float(starts[i])),
                "y": plot.y(float(across[j])),
                "h": plot.y(float(across[j + 1])) - plot.y(float(across[j])),
                "shade": min(int(np.searchsorted(bounds, per_area[i, j])), len(SHADES) - 1),
                "title": "\n".join(words),
            }
        )
    return {
        "cells": cells,
        "area_unit": area_unit,
        "legend": [{"shade": k, "text": measure(bound)} for k, bound in enumerate(bounds)],
    }


def _along_ticks(plot: Plot, *, mm: bool, count: int) -> list[dict[str, Any]]:
    """Positions from the head, m or px."""
    scale = 1000.0 if mm else 1.0
    return [
        {"at": plot.x(value * scale), "text": _axis_number(value)}
        for value in strip_map.ticks(plot.span / scale, count)
    ]


def _across_ticks(plot: Plot, count: int) -> list[dict[str, Any]]:
    """Positions from the drive-side edge, mm or px."""
    return [
        {"at": plot.y(value), "text": _axis_number(value)}
        for value in strip_map.ticks(plot.frame.width, count)
    ]


def _legend_sizes(sizes: Sizes) -> list[dict[str, Any]]:
    """Three marks and the areas they stand for."""
    middle = sizes.largest / 4
    return [
        {"r": sizes.radius(0.0), "text": f"up to {measure(sizes.smallest)}"},
        {"r": sizes.radius(middle), "text": measure(middle)},
        {"r": sizes.radius(sizes.largest), "text": f"{measure(sizes.largest)} and more"},
    ]


def _overview(roll: Roll, frame: Frame, plot: Plot) -> str:
    """The strip behind the stretched map: a JPEG data URI, its drive-side edge straight, white outside."""
    level = next(
        (
            level
            for level in range(roll.levels)
            if math.prod((roll.modes, *(-(-n // 4**level) for n in (roll.lines, roll.width))))
            * roll.dtype.itemsize
            <= OVERVIEW_READ_BYTES
        ),
        roll.levels - 1,
    )
    image = roll.overview(level)[0].astype(np.float32)
    count = min(OVERVIEW_PX[0], image.shape[0])
    starts = np.linspace(0, image.shape[0], count, endpoint=False).astype(np.int64)
    image = np.add.reduceat(image, starts, axis=0) / np.diff(np.append(starts, image.shape[0]))[:, None]

    lines = (np.arange(count) + 0.5) * roll.lines / count
    across = plot.across_min + (np.arange(OVERVIEW_PX[1]) + 0.5) / OVERVIEW_PX[1] * plot.across_span
    left, right = frame.left(lines)[:, None], frame.right(lines)[:, None]
    px = left + across[None, :] / frame.per_px
    column = np.clip((px / 4**level - 0.5).round().astype(np.int64), 0, image.shape[1] - 1)
    picture = np.take_along_axis(image, column, axis=1)
    on_strip = (px >= left) & (px < right)
    low, high = np.percentile(picture[on_strip], (1, 99))
    picture = np.clip(
        (picture - low) / max(float(high - low), crops.MIN_CONTRAST * roll.white[0]) * 255, 0, 255
    )
    picture[~on_strip] = 255

    gray = Image.fromarray(picture.T.astype(np.uint8))
    for quality in (70, 55, 40, 25, 10):
        out = io.BytesIO()
        gray.save(out, "JPEG", quality=quality, optimize=True)
        if out.tell() <= OVERVIEW_BYTES:
            break
    return crops.data_uri(out.getvalue())


def _profile(profile: strip_map.Profile, frame: Frame, *, mm: bool) -> dict[str, Any]:
    """The stacked bars, in per cent of the drawing."""
    tallest = int(profile.counts.sum(axis=1).max())
    marks = [tick for tick in strip_map.ticks(max(tallest, 1) * 1.08, 4) if tick == int(tick)]
    top = max(tallest, 1) * 1.08
    bars = []
    for row, counts in enumerate(profile.counts):
        below = 0
        for kind in np.flatnonzero(counts):
            size = int(counts[kind])
            start, end = row * profile.bin, min((row + 1) * profile.bin, frame.length)
            bars.append(
                {
                    "x": start / frame.length * 100,
                    "w": (end - start) / frame.length * 100,
                    "y": (1 - (below + size) / top) * 100,
                    "h": size / top * 100,
                    "kind": int(kind),
                    "count": size,
                    "start": _axis_number(start / (1000 if mm else 1)),
                    "end": _axis_number(end / (1000 if mm else 1)),
                }
            )
            below += size
    return {
        "bin": _axis_number(profile.bin / (1000 if mm else 1)),
        "bars": bars,
        "ticks": [{"at": (1 - tick / top) * 100, "text": _axis_number(tick)} for tick in marks],
    }


def _class_rows(summary: dict[str, Any], defects: Defects, frame: Frame) -> list[dict[str, Any]]:
    """The per-class table with a total; rates are per inspected length: what was not seen is not clean."""
    mm = summary["units"] == "mm"
    per = 100_000.0 if mm else 10_000.0  # 100 m, or 10,000 px
    inspected = frame.length * float(summary["coverage"])
    rows = []
    for kind in (*range(len(summary["classes"])), None):
        mine = np.ones(len(defects), np.bool_) if kind is None else defects.kind == kind
        count = int(mine.sum())
        rows.append(
            {
                "kind": kind,
                "count": count,
                "rate": count / inspected * per if inspected > 0 else None,
                "longest": _size(float(defects.length[mine].max()) if count else None, mm=mm),
                "area": _size(float(defects.area[mine].sum()) if count else None, mm=mm),
                "score": float(defects.score[mine].max()) if count else None,
            }
        )
    return rows


def _tile(
    defects: Defects,
    row: int,
    classes: Sequence[str],
    roll: Roll,
    read_mask: crops.ReadMask,
    frame: Frame,
    *,
    mm: bool,
) -> dict[str, Any]:
    """One picture of the gallery and its words."""
    kind = int(defects.kind[row])
    crop = crops.crop(roll, read_mask, frame, defects.boxes[row], kind)
    where = _where(defects, row, mm=mm)
    bars = [{"share": bar.share, "text": _length(bar.size, mm=mm)} for bar in (crop.along, crop.across)]
    return {
        "id": int(defects.ids[row]),
        "kind": kind,
        "images": [
            (mode, crops.data_uri(image))
            for mode, image in zip(roll.strip.lighting, crop.images, strict=False)
        ],
        "view": crop.view,
        "outline": crop.outline,
        "others": crop.others,
        "along_bar": bars[0],
        "across_bar": bars[1],
        "shrunk": f"{crop.shrunk} shrunk {number(crop.ratio, 0 if crop.ratio >= 10 else 1)} times"
        if crop.shrunk
        else None,
        "alt": f"{classes[kind]} #{defects.ids[row]} at {where['position']}, {where['size']}",
        **where,
    }


def _length(size: float, *, mm: bool) -> str:
    """The label of a scale bar."""
    if not mm:
        return f"{_axis_number(size)} px"
    return f"{_axis_number(size)} mm" if size < 1000 else f"{_axis_number(size / 1000)} m"


def _parts(summary: dict[str, Any], frame: Frame) -> list[tuple[float, float, float, float]]:
    """Not-inspected parts on the strip, in the order of the summary."""
    return [frame.rect(part) for part in summary["not_inspected"]]


def _part_rows(
    summary: dict[str, Any], parts: Sequence[tuple[float, float, float, float]], *, mm: bool
) -> list[dict[str, Any]]:
    """The not-inspected table: the largest MAX_PARTS parts, in the order they pass the camera."""
    scale, digits = (1000.0, 2) if mm else (1.0, 0)
    order = sorted(range(len(parts)), key=lambda i: -_area(parts[i]))[:MAX_PARTS]
    return [
        {
            "from": number(parts[i][0] / scale, digits),
            "to": number(parts[i][2] / scale, digits),
            "length": number((parts[i][2] - parts[i][0]) / scale, digits),
            "near": number(parts[i][1]),
            "far": number(parts[i][3]),
            "reason": summary["not_inspected"][i]["reason"],
        }
        for i in sorted(order, key=lambda i: parts[i][0])
    ]


def _faint_rows(lines: Sequence[dict[str, Any]], frame: Frame, *, mm: bool) -> list[dict[str, Any]]:
    """The table of faint lines: the MAX_FAINT longest, in mm and m as in their CSV, or else in px."""
    rows = []
    for line in sorted(lines, key=lambda line: line["y0"] - line["y1"])[:MAX_FAINT]:
        along, across, *_ = frame.rect(line)
        rows.append(
            {
                "class": line["class"],
                "x": number(line["x_mm"] if mm else across),
                "y": number(line["y_m"], 3) if mm else number(along),
                "length": _size(line["length_mm"] if mm else line["y1"] - line["y0"], mm=mm),
                "in_table": number(line["in_table"] * 100),
            }
        )
    return rows


def _area(rect: tuple[float, float, float, float]) -> float:
    return (rect[2] - rect[0]) * (rect[3] - rect[1])
