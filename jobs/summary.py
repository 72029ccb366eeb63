"""What is said of a whole roll: size, coverage, verdict, counts. From the receipts of its bands alone."""

from collections import Counter, defaultdict
from dataclasses import asdict, replace
from datetime import UTC, datetime
from itertools import pairwise
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
    listed, exact = joined(parts)
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
        "reasons": reasons or ["grading rules do not exist yet, so the roll is not graded"],
        "defects": table.num_rows,
        "by_class": {name: counts.get(name, 0) for name in plan.classes},
        "classes": list(plan.classes),
        "thresholds": dict(zip(plan.classes, plan.thresholds, strict=True)),
        "not_inspected": [asdict(part) for part in listed],
        "not_inspected_parts": len(parts),
        "not_inspected_exact": exact,
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

    Where no strip was seen they lie between the neighbours'. Where the strip seems more than a cell narrower
    than its median width it did not get so: a lamp failed, and an edge that lies more than a cell inside of
    that between the neighbours of full width is theirs. A strip that wanders keeps its width, and its edges.
    """
    seen = [i for i, row in enumerate(rows) if row.left is not None]
    if not seen:
        return np.zeros(len(rows), dtype=np.int64), np.full(len(rows), width, dtype=np.int64)
    at = np.arange(len(rows))
    edges = np.array([(rows[i].left or 0, rows[i].right or 0) for i in seen])
    widths = edges[:, 1] - edges[:, 0]
    full = widths >= np.median(widths) - CELL
    whole = [_between(at, np.array(seen)[full], edges[full, side]) for side in (0, 1)]
    left, right = (_between(at, np.array(seen), edges[:, side]) for side in (0, 1))
    narrow = np.isin(at, np.array(seen)[~full])
    left = np.where(narrow & (left > whole[0] + CELL), whole[0], left)
    return left, np.where(narrow & (right < whole[1] - CELL), whole[1], right)


def _between(at: NDArray[np.int64], seen: NDArray[np.int64], edge: NDArray[np.int64]) -> NDArray[np.int64]:
    """An edge, in px, of all rows, from those where it was seen."""
    return np.round(np.interp(at, seen, edge)).astype(np.int64)


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


def joined(parts: list[NotInspected]) -> tuple[list[NotInspected], bool]:
    """Parts that go on below one another made one, in order; and whether each says just what was lost.

    Over `MAX_LISTED` those with the least between them are joined, too, over gaps: such a part is the box of
    its parts, so it says more than was lost, never less.
    """
    cell = CELL
    while True:
        chains: dict[tuple[int, int, str], list[NotInspected]] = defaultdict(list)
        for part in parts:
            # By the cells of its sides, since the strip's edges wander by some px from row to row.
            chains[part.x0 // cell, part.x1 // cell, part.reason].append(part)
        if len(chains) <= MAX_LISTED:
            break
        cell *= 2
    gaps = sorted(b.y0 - a.y1 for chain in chains.values() for a, b in pairwise(_over_gaps(chain, 0)))
    over = len(gaps) + len(chains) - MAX_LISTED
    gap = gaps[over - 1] if over > 0 else 0
    found = [part for chain in chains.values() for part in _over_gaps(chain, gap)]
    return sorted(found, key=lambda part: (part.y0, part.x0)), gap == 0 and cell == CELL


def _over_gaps(chain: list[NotInspected], gap: int) -> list[NotInspected]:
    """Parts in order, those of which up to `gap` lines lie between made one."""
    found = chain[:1]
    for part in chain[1:]:
        above = found[-1]
        if part.y0 <= above.y1 + gap:
            x0, x1 = min(above.x0, part.x0), max(above.x1, part.x1)
            found[-1] = NotInspected(x0, above.y0, x1, max(above.y1, part.y1), part.reason)
        else:
            found.append(part)
    return found
