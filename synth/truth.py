"""The truth table of a roll that new defects were put into, in the form of a simulated roll's."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rollsight.inspect.defects import Components, band_components, join, label_mask
from rollsight.inspect.errors import UserError
from rollsight.inspect.rolls import SHARD_LINES, Roll, Strip
from rollsight.synth.ground import read_ground
from rollsight.synth.mask_bank import Bools
from rollsight.synth.strip import TRUTH_FILE, TRUTH_LABEL, TRUTH_SCHEMA
from scipy import ndimage

MOST_ROWS = 10**7  # of a truth table that is read


def row_of(
    name: str, box: tuple[int, int, int, int], area: int, left: float, strip: Strip, group: int | None = None
) -> dict[str, Any]:
    """One row, its number aside: box y0, x0, y1, x1 and area in px; left: where the strip begins, px.

    Of a roll in px the columns in mm are null.
    """
    (y0, x0, y1, x1), along, across = box, strip.mm_per_line, strip.mm_per_px_x
    row: dict[str, Any] = dict.fromkeys(TRUTH_SCHEMA.names)
    row |= {"class": name, "area_px": area, "periodic_group": group, "x0": x0, "y0": y0, "x1": x1, "y1": y1}
    if along is not None and across is not None:
        row |= {
            "x_mm": (x0 - left) * across,
            "y_m": y0 * along / 1000.0,
            "width_mm": (x1 - x0) * across,
            "length_mm": (y1 - y0) * along,
            "area_mm2": area * across * along,
        }
    return row


def parts_of(
    inside: Bools, y: int, x: int, name: str, group: int | None, left: int, strip: Strip
) -> list[dict[str, Any]]:
    """The rows of a new defect's px (h, w), whose first is at line y and column x: one per connected part."""
    ids, n = label_mask(inside.astype(np.uint8))
    areas = np.bincount(ids.ravel(), minlength=n + 1)[1:].tolist()
    boxes = [(y + ys.start, x + xs.start, y + ys.stop, x + xs.stop) for ys, xs in ndimage.find_objects(ids)]
    return [row_of(name, box, area, left, strip, group) for box, area in zip(boxes, areas, strict=True)]


def kept_rows(roll: Roll, classes: Sequence[str]) -> list[dict[str, Any]] | None:
    """The rows of a roll's own truth table; None where it has the mask alone. UserError where damaged."""
    if not isinstance(roll.location, Path) or not (roll.location / TRUTH_FILE).is_file():
        return None
    path = roll.location / TRUTH_FILE
    try:
        if pq.read_metadata(path).num_rows > MOST_ROWS:
            raise UserError(f"{path}: over {MOST_ROWS} rows: it is no truth table")
        rows: list[dict[str, Any]] = (
            pq.read_table(path).select(TRUTH_SCHEMA.names).cast(TRUTH_SCHEMA).to_pylist()
        )
    except (pa.ArrowException, OSError, KeyError) as error:
        raise UserError(f"{path}: not a truth table ({error}): make the roll again"[:300]) from None
    if unknown := {row["class"] for row in rows} - set(classes):
        raise UserError(f"{path}: class {min(map(str, unknown))!r} is not in the mask {TRUTH_LABEL}")
    return rows


def found_rows(roll: Roll, classes: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a roll whose truth is a mask alone, by its connected parts."""
    bands: list[Components] = []
    for y0 in range(0, roll.lines, SHARD_LINES):
        mask = roll.read_label(TRUTH_LABEL, y0, min(y0 + SHARD_LINES, roll.lines))
        none = np.zeros(len(mask), dtype=np.int64)
        bands.append(band_components(mask, np.zeros(mask.shape, dtype=np.float32), none, y0))
    parts = join(bands)
    rows = []
    for number, value in enumerate(parts.classes.tolist()):
        fact = {name: int(values[number]) for name, values in parts.facts.items()}
        middle = (fact["y0"] + fact["y1"]) // 2
        ground = read_ground(roll, None, middle, middle + 1)
        left = int(ground.left[middle - ground.y0])
        box = (fact["y0"], fact["x0"], fact["y1"], fact["x1"])
        rows.append(row_of(classes[value - 1], box, fact["area_px"], left, roll.strip))
    return rows


def truth_table(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """The table, in the order of first lines, numbered from 1."""
    ordered = sorted(rows, key=lambda row: (row["y0"], row["x0"]))
    numbered = [row | {"defect_id": number} for number, row in enumerate(ordered, start=1)]
    return pa.Table.from_pylist(numbered, schema=TRUTH_SCHEMA)
