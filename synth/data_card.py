"""What is told of a synthetic set as a whole, and the provenance of each of its samples."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rollsight.inspect.errors import UserError
from rollsight.synth.generator import Generator

PROVENANCE = "provenance.jsonl"
DATASET = "dataset.json"
NO_LICENCE = "not stated: ask whom labels and steel are from"
KNOWN_FAILURES = (
    "Every defect is derived from a labelled one, named in provenance.jsonl: nothing is a new kind.",
    "Real defects that nobody labelled stay on the backgrounds, and are then called clean.",
)


def data_card(
    generator: Generator,
    order: dict[str, Any],
    lines: list[dict[str, Any]],
    licence: str = "",
    failures: Sequence[str] = (),
) -> dict[str, Any]:
    """What the samples are made of, how many attempts were rejected and why, what is known to be wrong.

    licence: of labels and steel, as far as anybody said. failures: known ones beside those of every set.
    """
    rejected: Counter[str] = Counter()
    for line in lines:
        rejected.update(line["rejected"])
    marks = [mark for line in lines for mark in line["marks"]]
    attempts = len(lines) + sum(rejected.values())
    in_px = sum(mark["zoom"] is None for mark in marks)
    return {
        "name": f"synthetic {generator.card.defect_class}",
        "order": order,
        "generator": {"name": generator.card.name, "hash": generator.hash, "method": order["method"]},
        "samples": len(lines),
        "marks": len(marks),
        "attempts": attempts,
        "rejected": dict(rejected),
        "reject_rate": round(sum(rejected.values()) / attempts, 4),
        "backgrounds": len({line["background"]["name"] for line in lines}),
        "sources": sorted({mark["source"] for mark in marks}),
        "source_groups": sorted({mark["group"] for mark in marks}),
        "fitted_on": generator.card.fitted_on["source"],
        "licence": licence or NO_LICENCE,
        "sizes": told_sizes(len(marks), in_px, labels_in_mm=generator.bank.in_mm),
        "contrast_kept": {
            "median": float(np.median([mark["contrast_kept"] for mark in marks])),
            "smallest": float(min(mark["contrast_kept"] for mark in marks)),
        },
        "known_failures": [*KNOWN_FAILURES, *failures],
    }


def told_sizes(marks: int, in_px: int, *, labels_in_mm: bool) -> str:
    """In which unit the sizes of a set's marks went from the labels to the steel; in_px: how many in px."""
    if not in_px:
        return "mm: length and width are those of the labelled defects"
    why = "the steel does" if labels_in_mm else "the labels do"
    share = "" if in_px == marks else f"{in_px} of {marks} in "
    return f"{share}px: {why} not say how large a px is"


def open_provenance(folder: Path) -> list[dict[str, Any]]:
    """The provenance of a synthetic folder or roll; UserError where there is none or it is damaged."""
    path = folder / PROVENANCE
    if not path.is_file():
        raise UserError(f"{path}: not found: this is no folder made by `inspect synth make`")
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for line in lines:
            line["roll" if "roll" in line else "image"], line["index"], line["marks"], line["order"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}): make the data again"[:200]) from None
    return lines
