"""The page of a check: figures, real and synthetic defects side by side, a blind test; one offline file."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image
from rollsight.inspect.roll_places import write_durably
from rollsight.synth.features import Crop
from rollsight.synth.realism import SEEN, Check

TEMPLATE = "check.html"
SHOWN = 48  # crops of each kind
BLIND = 12  # of each kind in the blind test


def write_page(path: Path, check: Check, title: str, seed: int = 0) -> None:
    """Write the page, whole or not at all."""
    rng = np.random.default_rng(seed)
    n = min(BLIND, len(check.made), len(check.real))
    both = [(crop, "synthetic") for crop in check.made[:n]] + [(crop, "real") for crop in check.real[:n]]
    blind = [both[int(i)] for i in rng.permutation(len(both))]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    html = (
        jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined)
        .get_template(TEMPLATE)
        .render(
            title=title,
            rows=told(check.figures),
            blind=[(_uri(crop), answer) for crop, answer in blind],
            made=_uris(check.made[n:]),
            real=_uris(check.real[n:]),
            held_out=check.held_out,
            dropped=[(_uri(crop), why) for crop, why in check.dropped[:SHOWN]],
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, html.encode())


def told(figures: dict[str, Any]) -> list[tuple[str, str]]:
    """The figures of a check as rows of words; "-" where a set was too small for one."""
    rows = [("samples", str(figures["samples"])), ("kept", str(figures["kept"]))]
    rows += [(f"dropped: {why}", str(n)) for why, n in figures["dropped"].items()]
    rows.append(("least contrast kept, of what was pasted or drawn", _number(figures["least_contrast_kept"])))
    if figures["segmenters"] is not None:
        of = figures["segmenters"]
        rows.append(("cross-fitted segmenters, steps", str(of["steps"])))
        where = {"val": "of val", "sources": "of the sources, by the one that never saw them"}[of["of"]]
        rows.append((f"their IoU of the class on real images {where}", _number(of["iou"])))
        rows.append(("share of the defects there that they see", _number(of["seen"])))
        if not of["heard"]:
            rows.append(
                ("segmenters", f"not heard: they see under {SEEN:.0%} of real defects; give more --steps")
            )
    crops = ", ".join(f"{name} {n}" for name, n in figures["crops"].items())
    rows.append(("crops that distances are of", crops))
    if not figures["crops"]["held"]:
        rows.append(("held-out defects", "none: the labels have no val image of the class"))
    for name, of in figures["kid"].items():
        what = f"distance to held-out defects (KID of Lite0 features): {name}"
        rows.append((what, f"{_number(of['mean'])} ± {_number(of['spread'])}"))
    rows.append(
        (
            f"distance to the nearest training defect, over that of held-out ones (alarm below "
            f"{figures['nearest_alarm']})",
            _number(figures["nearest_ratio"]),
        )
    )
    if figures["copies"] is not None:
        share = f"{figures['copies']['share']:.1%}"
        rows.append(("defects that correlate 0.95 or more with one of training, steel apart", share))
    for name, value in figures["diversity"].items():
        rows.append((f"diversity, mean distance within: {name}", _number(value)))
    return rows


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _uris(crops: Sequence[Crop]) -> list[str]:
    return [_uri(crop) for crop in crops[:SHOWN]]


def _uri(crop: Crop) -> str:
    file = io.BytesIO()
    Image.fromarray(np.round(crop * 255).astype(np.uint8)).save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
