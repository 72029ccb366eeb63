"""Claim: evidence carried along the strip finds scratches that no pixel shows, at no more false alarms.

Simulated strip with its usual defects, its long scratches replaced by faint ones of known contrast, scanned
by the shipped model. With: the mask at the model's thresholds, and the lines that their lines' evidence
gives away. Without: the mask alone, at the lowest threshold for scratches whose false alarms are no more
than those of the first. A scratch is found where a tenth of its length is; a false alarm touches none.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from report import write_result
from rollsight.inspect.along_strip import ALARM, cell_evidence, faint_lines, hide
from rollsight.inspect.defects import label_mask
from rollsight.inspect.engines import Engine, open_engine
from rollsight.inspect.linescan import read_row
from rollsight.inspect.metrics import garwood, wilson
from rollsight.inspect.models import Model, open_model
from rollsight.inspect.scan import A_MIN_PX, decide
from rollsight.inspect.tiles import CELL
from rollsight.synth.plan import LongScratch
from rollsight.synth.strip import SimulatedStrip

LINES, WIDTH, CORE = 6144, 640, 1024
GRAY = (3.0, 5.0, 8.0, 12.0, 18.0)  # of 255, brighter or darker by: the usual ones are 24 to 80
THRESHOLDS = (0.5, 0.4, 0.3, 0.2, 0.1, 0.05, 0.02, 0.01, 0.003, 0.001)
REACH = 8  # px around a scratch that count as on it
FOUND = 0.1  # of its lines
NAME = "scratches"


def planted(seed: int, gray: tuple[float, float]) -> tuple[SimulatedStrip, list[LongScratch]]:
    """A strip with two faint scratches instead of its own long ones."""
    strip = SimulatedStrip(LINES / 1000, seed, width_px=WIDTH)
    rng = np.random.default_rng(seed)
    inner = strip._plan.outline.width_px - 2 * strip._plan.outline.margin
    scratches = []
    for index, contrast in enumerate(gray):
        length = int(rng.uniform(1500, 4000))
        y0 = int(rng.integers(4, LINES - length - 4))
        scratches.append(
            LongScratch(
                index,
                y0,
                y0 + length,
                inner * (rng.uniform(0.1, 0.4) + 0.5 * index),
                float(np.clip(rng.normal(0.0, 10.0), -18.0, 18.0)),
                rng.uniform(0.5, 2.0),
                contrast,
            )
        )
    strip._plan._scratches = scratches
    return strip, scratches


def scanned(
    strip: SimulatedStrip, model: Model, engine: Engine
) -> tuple[dict[float, np.ndarray], np.ndarray]:
    """The mask of scratches at each threshold, and the evidence along the strip, as a scan makes them."""
    blocks = [strip.block(y, y + CORE) for y in range(0, LINES, CORE)]
    gray = np.concatenate([image for image, _ in blocks], axis=1).astype(np.float32) / 255
    halo = model.card.halo_px
    padded = np.pad(gray, ((0, 0), (halo, halo), (0, 0)), mode="edge")
    kind = model.card.classes.index(NAME) + 1
    masks: dict[float, list[np.ndarray]] = {t: [] for t in THRESHOLDS}
    evidence = []
    for y in range(0, LINES, CORE):
        logits = engine(np.ascontiguousarray(padded[:, y : y + CORE + 2 * halo]))[:, halo : halo + CORE]
        for t, parts in masks.items():
            thresholds = {**model.card.thresholds, NAME: t}
            mask, _ = decide(logits, tuple(thresholds[c] for c in model.card.classes), model.card.temperature)
            parts.append(mask == kind)
        evidence.append(cell_evidence(logits, kind))
    joined = np.concatenate(evidence)
    for row, y in enumerate(range(0, LINES, CELL)):
        hide(joined[row], read_row(gray[:, y : y + CELL], np.ones(CELL, np.bool_), y))
    return {t: np.concatenate(parts) for t, parts in masks.items()}, joined


def near(strip: SimulatedStrip, scratch: LongScratch) -> np.ndarray:
    """The px within REACH of a scratch: (LINES, WIDTH)."""
    on = np.zeros((LINES, WIDTH), dtype=np.bool_)
    path = strip._plan._path(scratch, scratch.y0, scratch.y1)
    on[scratch.y0 : scratch.y1] = np.abs(np.arange(WIDTH) + 0.5 - path[:, None]) <= REACH
    return on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strips", type=int, default=20)
    parser.add_argument("--model", default="default")
    options = parser.parse_args()
    model = open_model(options.model, Path("plant/models"))
    engine = open_engine(model, "onnx")[1]
    found: dict[str, dict[float, list[bool]]] = {"with": {g: [] for g in GRAY}}
    alarms = {"lines": 0}
    found |= {f"{t:g}": {g: [] for g in GRAY} for t in THRESHOLDS}
    alarms |= {f"{t:g}": 0 for t in THRESHOLDS}
    highest = []
    for number in range(options.strips):
        gray = [GRAY[(2 * number + i) % len(GRAY)] * (-1) ** (number + i) for i in (0, 1)]
        strip, scratches = planted(3000 + number, (gray[0], gray[1]))
        masks, evidence = scanned(strip, model, engine)
        zones = [near(strip, scratch) for scratch in scratches]
        # Short scratches are planted too: a hit on one is no false alarm.
        truth = strip.classes.index(NAME) + 1
        planted_mask = np.concatenate([strip.block(y, y + CORE)[1] == truth for y in range(0, LINES, CORE)])
        allowed = planted_mask | np.logical_or.reduce(zones)
        lines = faint_lines(evidence)
        drawn = np.zeros((len(lines), LINES, WIDTH), dtype=np.bool_)
        for line, on in zip(lines, drawn, strict=True):
            on[line.y0 : line.y1, line.x0 : line.x1] = True
            if (on & allowed).any(axis=1).sum() < FOUND * (line.y1 - line.y0):
                alarms["lines"] += 1
                highest.append(line.evidence)
        for t, mask in masks.items():
            ids, count = label_mask(mask.astype(np.uint8))
            area = np.bincount(ids.ravel(), minlength=count + 1)
            true = np.bincount(ids[allowed], minlength=count + 1) >= FOUND * area
            alarms[f"{t:g}"] += int(((area >= A_MIN_PX) & ~true)[1:].sum())
        for scratch, zone in zip(scratches, zones, strict=True):
            size = scratch.y1 - scratch.y0

            def share(on: np.ndarray, zone: np.ndarray = zone, size: int = size) -> float:
                return float((on & zone).any(axis=1).sum() / size)

            for t, mask in masks.items():
                found[f"{t:g}"][abs(scratch.gray)].append(share(mask) >= FOUND)
            both = masks[THRESHOLDS[0]] | np.logical_or.reduce(drawn, axis=0)
            found["with"][abs(scratch.gray)].append(share(both) >= FOUND)
        print(number, gray, {name: sum(map(sum, hits.values())) for name, hits in found.items()}, flush=True)
    alarms["with"] = alarms[f"{THRESHOLDS[0]:g}"] + alarms["lines"]
    equal = min(t for t in THRESHOLDS if alarms[f"{t:g}"] <= max(alarms["with"], alarms["0.5"]))
    mpx = options.strips * LINES * WIDTH / 1e6
    result: dict[str, Any] = {
        "strips": options.strips,
        "mpx": mpx,
        "alarm_nats": ALARM,
        "threshold_at_equal_alarms": equal,
        "false_lines": alarms["lines"],
        "false_lines_per_mpx_95": [bound / mpx for bound in garwood(alarms["lines"])],
        "strongest_false_line": max(highest, default=0.0),
        "false_alarms_per_mpx": {name: n / mpx for name, n in alarms.items()},
        "recall": {
            arm: {f"{g:g}": told(found[name][g]) for g in GRAY} | {"all": told(pooled(found[name]))}
            for arm, name in (("with", "with"), ("without", f"{equal:g}"), ("threshold_0.5", "0.5"))
        },
        "recall_of_all_by_threshold": {f"{t:g}": told(pooled(found[f"{t:g}"]))["recall"] for t in THRESHOLDS},
    }
    write_result("along_strip", result, seed=3000)
    print(json.dumps(result, indent=1))


def pooled(hits: dict[float, list[bool]]) -> list[bool]:
    return [hit for of_gray in hits.values() for hit in of_gray]


def told(hits: list[bool]) -> dict[str, float]:
    low, high = wilson(sum(hits), len(hits)) if hits else (0.0, 1.0)
    return {"recall": sum(hits) / max(len(hits), 1), "n": len(hits), "low": low, "high": high}


if __name__ == "__main__":
    main()
