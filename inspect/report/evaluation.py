"""The page of an evaluation: what a model finds and misses on labelled data; one HTML file, nothing else."""

import io
import math
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from rollsight.inspect.evaluate import Examination, Finding
from rollsight.inspect.metrics import BUCKET_EDGES_PX, BUCKETS, MIN_N
from rollsight.inspect.models import Model
from rollsight.inspect.report.crops import JPEG_QUALITY, MIN_CONTRAST, data_uri, outline
from rollsight.inspect.report.page import COLOURS, FOLDER, SHADES, environment
from rollsight.inspect.roll_places import write_durably

PLOT = (46, 12, 400, 250)  # px of a chart: left, top, width, height of what lies within its axes
PICTURE_PX = 300  # longer side of a picture
SIZES = dict(
    zip(
        (*BUCKETS, "tiny_small"),
        (
            f"under {BUCKET_EDGES_PX[0]} px",
            *(f"{a} to {b - 1} px" for a, b in pairwise(BUCKET_EDGES_PX)),
            f"{BUCKET_EDGES_PX[-1]} px and more",
            f"under {BUCKET_EDGES_PX[1]} px",
        ),
        strict=True,
    )
)
UNITS = {"per_mpx": "Mpx", "per_m2": "m²"}


def write_evaluation(
    path: Path, model: Model, data: str, split: str, figures: dict[str, Any], told: Examination
) -> None:
    """Write the page of an examination, whole or not at all; `figures` are `evaluate.examined`."""
    style = "".join((FOLDER / name).read_text(encoding="utf-8") for name in ("page.css", "evaluation.css"))
    html = (
        environment()
        .get_template("evaluation.html")
        .render(
            _content(model, data, split, figures, told),
            style=Markup(style),  # noqa: S704 # files of this package
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, html.encode())


def _content(
    model: Model, data: str, split: str, figures: dict[str, Any], told: Examination
) -> dict[str, Any]:
    """All that the template shows."""
    instance = figures["instance"]
    return {
        "card": model.card,
        "hash": model.hash,
        "data": data,
        "split": split,
        "f": figures,
        "min_n": MIN_N,
        "headline": _headline(figures),
        "sizes": [
            {"name": name.replace("_", " + "), "px": SIZES[name], **instance["recall_by_size"][name]}
            for name in (*BUCKETS, "tiny_small")
        ],
        "classes": _classes(figures),
        "confusion": _confusion(figures, instance["class_agnostic"]["confusion"]),
        "froc": _froc(figures),
        "froc_unit": UNITS[figures["froc"]["unit"]],
        "precision_recall": _precision_recall(figures["precision_recall"]),
        "calibration": _calibration(figures["calibration"]),
        "misses": [_tile(finding) for finding in told.misses],
        "alarms": [_tile(finding) for finding in told.alarms],
        "missed": instance["n_truth"] - round((instance["recall_h"] or 0) * instance["n_truth"]),
        "plot": PLOT,
    }


def _headline(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that get an interval over the groups."""
    pixel, instance, spans = figures["pixel"], figures["instance"], figures["intervals"]
    small = "recall_by_size", "tiny_small"
    rows = [
        ("mIoU", pixel["miou"], spans["pixel"]["miou"]),
        ("Recall (hit)", instance["recall_h"], spans["instance"]["recall_h"]),
        ("Precision (hit)", instance["precision_h"], spans["instance"]["precision_h"]),
        ("F1 (hit)", instance["f1_h"], spans["instance"]["f1_h"]),
        (
            "Recall of tiny + small",
            instance[small[0]][small[1]]["recall"],
            spans["instance"][small[0]][small[1]]["recall"],
        ),
    ]
    return [{"name": name, "value": value, **span} for name, value, span in rows]


def _classes(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per class of the data."""
    pixel = figures["pixel"]
    return [
        {
            "name": name,
            "iou": iou,
            "dice": pixel["dice"][name],
            "boundary": pixel["boundary_f1"][name],
            "threshold": figures["thresholds"].get(name),
            **figures["instance"]["by_class"][name],
        }
        for name, iou in pixel["iou"].items()
    ]


def _confusion(figures: dict[str, Any], table: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Matched components, truth by prediction, and the truth that none matched; shaded by share of row."""
    rows = []
    for name, counts in table.items():
        n = figures["instance"]["by_class"][name]["n"]
        cells = [*counts.values(), n - sum(counts.values())]
        shades = [
            SHADES[min(int(count / n * len(SHADES)), len(SHADES) - 1)] if count else None for count in cells
        ]
        rows.append({"name": name, "n": n, "cells": list(zip(cells, shades, strict=True))})
    return {"columns": [*table, "class unknown to the data", "none"], "rows": rows}


def _froc(figures: dict[str, Any]) -> dict[str, Any] | None:
    """Recall against false alarms on a log axis, from the decade of the smallest rate above 0 on."""
    told = figures["froc"]
    rates = [point["rate"] for point in told["curve"] if point["rate"] > 0]
    if not rates:
        return None
    low, high = math.floor(math.log10(min(rates))), math.ceil(math.log10(max(rates)) + 1e-9)
    lines = []
    for key, colour, label in (
        ("curve", COLOURS[1], "all defects"),
        ("curve_tiny_small", COLOURS[0], "tiny + small"),
    ):
        at = [
            ((max(math.log10(max(p["rate"], 10.0**low)), low) - low) / (high - low), p["recall"])
            for p in told[key]
        ]
        if at:
            lines.append(_line(at, colour, label))
    return {
        "lines": lines,
        "dots": [],
        "x_ticks": [(_x((d - low) / (high - low)), f"{10.0**d:g}") for d in range(low, high + 1)],
        "x_label": f"false alarms per {UNITS[told['unit']]}, {told['alarms_on']}",
        "y_label": "recall (hit)",
    }


def _precision_recall(curves: dict[str, list[dict[str, float]]]) -> dict[str, Any] | None:
    if not curves:
        return None
    lines = [
        _line(((point["recall"], point["precision"]) for point in points), COLOURS[i % len(COLOURS)], name)
        for i, (name, points) in enumerate(curves.items())
        if points
    ]
    return {
        "lines": lines,
        "dots": [],
        "x_ticks": _fifths(),
        "x_label": "recall (hit)",
        "y_label": "precision (hit)",
    }


def _calibration(told: dict[str, Any]) -> dict[str, Any] | None:
    """How often a pixel is right against how sure it was; a dot's area is its share of the pixels."""
    if not told["bins"]:
        return None
    n = sum(row["n"] for row in told["bins"])
    points = [(row["confidence"], row["right"]) for row in told["bins"]]
    return {
        "lines": [
            {**_line(((0.0, 0.0), (1.0, 1.0)), "#888", "as it should be"), "dash": "4 4"},
            _line(points, COLOURS[1], "the model"),
        ],
        "dots": [
            {
                "x": _x(row["confidence"]),
                "y": _y(row["right"]),
                "r": max(3.0, 14 * math.sqrt(row["n"] / n)),
                "title": f"sure {row['confidence']:.3f}, right {row['right']:.3f}, {row['n']:,} px",
            }
            for row in told["bins"]
        ],
        "x_ticks": _fifths(),
        "x_label": "probability of the class that was taken",
        "y_label": "share that is right",
    }


def _x(share: float) -> float:
    return PLOT[0] + share * PLOT[2]


def _y(share: float) -> float:
    return PLOT[1] + (1 - share) * PLOT[3]


def _fifths() -> list[tuple[float, str]]:
    return [(_x(i / 5), f"{i / 5:g}") for i in range(6)]


def _line(points: Iterable[tuple[float, float]], colour: str, label: str) -> dict[str, Any]:
    """A line through points in [0, 1] x [0, 1]."""
    d = "L".join(f"{_x(x):.1f} {_y(y):.1f}" for x, y in points)
    return {"d": f"M{d}", "colour": colour, "label": label, "dash": None}


def _tile(finding: Finding) -> dict[str, Any]:
    """A picture with the outlines of truth and prediction."""
    low, high = np.percentile(finding.image, (0.5, 99.5))
    spread = max(float(high - low), MIN_CONTRAST)
    gray = (finding.image - ((low + high) - spread) / 2) / spread
    height, width = gray.shape
    scale = PICTURE_PX / max(height, width)
    out = io.BytesIO()
    Image.fromarray((np.clip(gray, 0, 1) * 255).astype(np.uint8)).resize(
        (max(1, round(width * scale)), max(1, round(height * scale))), Image.Resampling.BICUBIC
    ).save(out, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return {
        "class": finding.defect_class,
        "taken_for": finding.taken_for,
        "where": finding.where,
        "area": finding.area_px,
        "score": finding.score,
        "image": data_uri(out.getvalue()),
        "size": (width, height),
        "own": outline(finding.own),
        "truth": outline(finding.truth),
        "predicted": outline(finding.predicted),
    }
