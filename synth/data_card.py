"""What is told of a synthetic set as a whole, and the provenance of each of its samples."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rollsight.inspect.errors import USAGE, UserError
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
    masks: Mapping[str, str | None],
    licence: str = "",
    failures: Sequence[str] = (),
) -> dict[str, Any]:
    """What the samples are made of, how many attempts were rejected and why, what is known to be wrong.

    masks: of each roll that the steel is of, by its id, the class mask that told what of it is clean.
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
        "attempts": attempts,
        "rejected": dict(rejected),
        "reject_rate": round(sum(rejected.values()) / attempts, 4),
        **counts(lines),
        "fitted_on": generator.card.fitted_on["source"],
        "masks": dict(masks),
        "licence": licence or NO_LICENCE,
        "sizes": told_sizes(len(marks), in_px, labels_in_mm=generator.bank.in_mm),
        "known_failures": [*KNOWN_FAILURES, *failures],
    }


def counts(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What a set's provenance says of all its samples together."""
    marks = [mark for line in lines for mark in line["marks"]]
    kept = [mark["contrast_kept"] for mark in marks]
    return {
        "samples": len(lines),
        "marks": len(marks),
        "backgrounds": len({line["background"]["name"] for line in lines}),
        "sources": sorted({mark["source"] for mark in marks}),
        "source_groups": sorted({mark["group"] for mark in marks}),
        "outlines": {
            "made": sum(mark["outline_net"] is not None for mark in marks),
            "refused": sum(mark["deformation"]["refused"] for mark in marks),
        },
        "contrast_kept": {"median": float(np.median(kept)), "smallest": float(min(kept))},
    }


def made_by_masks(folder: Path) -> dict[str, str | None]:
    """The `masks` of the card of a synthetic folder or roll; {} of one made before these were told."""
    return dict(_open_card(folder).get("masks", {}))


def checked_card(folder: Path, lines: list[dict[str, Any]], dropped: dict[str, int]) -> dict[str, Any]:
    """The card of what a check kept of a folder, `lines`; dropped: how many samples for which reason."""
    return {
        **_open_card(folder, "licence", "sizes", "rejected", "known_failures"),
        **counts(lines),
        "dropped_by_check": dropped,
    }


def _open_card(folder: Path, *needed: str) -> dict[str, Any]:
    path = folder / DATASET
    try:
        card: dict[str, Any] = json.loads(path.read_text("utf-8"))
        if missing := set(needed) - card.keys():
            raise KeyError(*sorted(missing))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: not the card of a set ({error!r}): make the data again"[:200]) from None
    return card


def groups_in(lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """The groups that the steel and the defects of these lines of provenance are of."""
    steel = {line["background"]["group"] for line in lines}
    return steel | {mark["group"] for line in lines for mark in line["marks"]}


def told_sizes(marks: int, in_px: int, *, labels_in_mm: bool) -> str:
    """In which unit the sizes of a set's marks went from the labels to the steel; in_px: how many in px."""
    if not in_px:
        return "mm: length and width are those of the labelled defects"
    why = "the steel does" if labels_in_mm else "the labels do"
    share = "" if in_px == marks else f"{in_px} of {marks} in "
    return f"{share}px: {why} not say how large a px is"


def open_provenance(folder: Path, of: str = "image") -> list[dict[str, Any]]:
    """The provenance of a synthetic folder, or of a synthetic roll where `of` is "roll".

    UserError where there is none, it is damaged, or of the other kind.
    """
    path = folder / PROVENANCE
    if not path.is_file():
        raise UserError(f"{path}: not found: this is no folder made by `inspect synth make`")
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        if not lines:
            raise ValueError("empty")
        other = {"image": "roll", "roll": "image"}[of]
        if other in lines[0]:
            raise UserError(f"{path}: its samples are of {other}s: needed those of {of}s", USAGE)
        for line in lines:
            for key in (of, "index", "attempt", "marks", "order", "background", "sha256"):
                line[key]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}): make the data again"[:200]) from None
    return lines
