"""What is said of a whole roll: size, coverage, verdict, counts. From the receipts of its bands alone."""

from collections import Counter
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from rollsight.inspect.coverage import in_percent
from rollsight.inspect.defects import Components
from rollsight.inspect.linescan import CellRow, NotInspected
from rollsight.inspect.models import Model
from rollsight.inspect.rolls import Roll
from rollsight.inspect.scan import Plan, Receipt
from rollsight.inspect.tiles import CELL

COVERAGE_NEEDED = 0.99  # below it the verdict is HOLD; a rules file may ask for more
EDGE_STEP = 16  # every 16th row of cells (1024 lines) gives the page its strip edges
MAX_LISTED = 2000  # parts not inspected in the summary: more are joined along the strip, none is left out


def summarise(
    roll: Roll, model: Model, plan: Plan, receipts: list[Receipt], table: pa.Table
) -> dict[str, Any]:
    """The keys of summary.json, but for how long the scan took and by what."""
    rows = [row for receipt in receipts for row in receipt.rows]
    left, right = strip_edges(rows, roll.width)
    coverage, parts = inspected(rows, left, right)
    strip = roll.strip
    reasons = []
    if coverage < COVERAGE_NEEDED:
        why = ", ".join(sorted({part.reason for part in parts})) or "no strip seen"
        reasons.append(
            f"coverage {in_percent(coverage)}% is under {COVERAGE_NEEDED:.0%}: "
            f"parts were not inspected ({why})"
        )
        if roll.dtype == np.uint16 and strip.scale is None:
            reasons.append("no white level is known for 16 bit: if the camera has fewer, ingest with --white")
    counts = Counter(table["class"].to_pylist())
    width_px = float(np.median(right - left))
    listed = joined(parts)
    return {
        "roll_id": roll.roll_id,
        "run_id": plan.run_id,
        "model": model.card.name,
        "model_hash": model.hash,
        "engine": plan.engine,
        "engine_version": plan.engine_version,
        "units": strip.units,
        "lines": roll.lines,
        "width_px": roll.width,
        "length_m": None if strip.mm_per_line is None else roll.lines * strip.mm_per_line / 1000,
        "width_mm": None if strip.mm_per_px_x is None else round(width_px * strip.mm_per_px_x, 3),
        "coverage": coverage,
        "verdict": "HOLD" if reasons else "UNGRADED",
        "reasons": reasons or ["no rules file was asked for, so the roll is not graded"],
        "defects": table.num_rows,
        "by_class": {name: counts.get(name, 0) for name in plan.classes},
        "classes": list(plan.classes),
        "thresholds": dict(zip(plan.classes, plan.thresholds, strict=True)),
        "not_inspected": [asdict(part) for part in listed],
        "not_inspected_parts": len(parts),
        "edges": [
            [row.y0, int(left[i]), int(right[i])]
            for i, row in enumerate(rows)
            if i % EDGE_STEP == 0 or i == len(rows) - 1
        ],
        "mm_per_px_x": strip.mm_per_px_x,
        "mm_per_line": strip.mm_per_line,
        "side": strip.side,
        "line_id": strip.line_id,
        "lighting": list(strip.lighting),
        "stage_seconds": {
            stage: round(sum(receipt.seconds[stage] for receipt in receipts), 3)
            for stage in ("read", "net", "mask", "write")
        },
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "code_version": plan.code,
        "notes": list(model.card.notes),
    }


def strip_edges(rows: list[CellRow], width: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Drive-side and operator-side edge of each row of cells, in px.

    Where no strip was seen they lie between the neighbours'. Where an edge lies more than a cell inside the
    roll's median edge, the strip did not get narrower: a lamp failed there, and the edge is the median's.
    """
    seen = [i for i, row in enumerate(rows) if row.left is not None]
    if not seen:
        return np.zeros(len(rows), dtype=np.int64), np.full(len(rows), width, dtype=np.int64)
    at = np.arange(len(rows))
    left = np.round(np.interp(at, seen, [rows[i].left or 0 for i in seen])).astype(np.int64)
    right = np.round(np.interp(at, seen, [rows[i].right or 0 for i in seen])).astype(np.int64)
    usual_left, usual_right = int(np.median(left[seen])), int(np.median(right[seen]))
    left = np.where(left > usual_left + CELL, usual_left, left)
    return left, np.where(right < usual_right - CELL, usual_right, right)


def from_strip_edge(components: Components, rows: list[CellRow], width: int) -> Components:
    """The components with their place across counted from the strip's edge where a band saw only the light's.

    A band knows the edge of each row of cells from that row alone; where a lamp failed at the drive side,
    `strip_edges` knows better. A component in such a row is placed by the edge at its middle line, to within
    the strip's wander over its length.
    """
    left, _ = strip_edges(rows, width)
    moved = np.array([row.left is not None and row.left != x for row, x in zip(rows, left, strict=True)])
    before = np.concatenate(([0], np.cumsum(moved)))  # rows moved above row i
    first, last = components.facts["y0"] // CELL, (components.facts["y1"] - 1) // CELL
    touched = before[last + 1] > before[first]
    at = left[(first + last) // 2]
    facts = components.facts | {
        name: np.where(touched, components.facts[px] - at, components.facts[name])
        for name, px in (("strip_x0", "x0"), ("strip_x1", "x1"))
    }
    return replace(components, facts=facts)


def inspected(
    rows: list[CellRow], left: NDArray[np.int64], right: NDArray[np.int64]
) -> tuple[float, list[NotInspected]]:
    """Share of the strip that was inspected, 0 to 1, and the parts that were not."""
    strip_px = lost_px = 0
    parts: list[NotInspected] = []
    for row, x0, x1 in zip(rows, left.tolist(), right.tolist(), strict=True):
        height = row.y1 - row.y0
        strip_px += (x1 - x0) * height
        parts += row.not_inspected
        if row.left is None or row.right is None:
            lost_px += (x1 - x0) * height
            continue
        lost_px += row.not_inspected_px
        for a, b in ((x0, row.left), (row.right, x1)):  # strip beside what the light showed
            if b - a > CELL:
                lost_px += (b - a) * height
                parts.append(NotInspected(a, row.y0, b, row.y1, "dark"))
    return (1 - lost_px / strip_px if strip_px else 0.0), sorted(parts, key=lambda part: (part.y0, part.x0))


def joined(parts: list[NotInspected]) -> list[NotInspected]:
    """Parts that go on below one another made one, in order; over `MAX_LISTED`, joined over gaps too.

    A joined part is the box of its parts, so it may say more than was lost, never less.
    """
    gap = 0
    while True:
        boxes: dict[tuple[int, int, str], NotInspected] = {}
        done: list[NotInspected] = []
        for part in parts:
            # By the cells of its sides, since the strip's edges wander by some px from row to row.
            key = (part.x0 // CELL, part.x1 // CELL, part.reason) if gap == 0 else (0, 0, part.reason)
            above = boxes.get(key)
            if above is not None and part.y0 <= above.y1 + gap:
                x0, x1 = min(above.x0, part.x0), max(above.x1, part.x1)
                boxes[key] = NotInspected(x0, above.y0, x1, max(above.y1, part.y1), part.reason)
                continue
            if above is not None:
                done.append(above)
            boxes[key] = part
        done += boxes.values()
        if len(done) <= MAX_LISTED:
            return sorted(done, key=lambda part: (part.y0, part.x0))
        gap = max(CELL, gap * 2)
