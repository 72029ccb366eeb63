"""Semi-automatic labelling: what a model proposes for images, as Labelme files, the most doubtful first."""

import csv
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.defects import EIGHT, label_mask
from rollsight.inspect.engines import Engine
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.evaluate import data_logits, padded_logits, probabilities
from rollsight.inspect.labelled_folder import (
    Grouping,
    name_within,
    size_of,
    split_said,
    values_of,
    whole_folder,
)
from rollsight.inspect.labelme import REVIEWED, Proposal, digest_of, document_of, write_label_names
from rollsight.inspect.labels import IMAGE_SUFFIXES, OnFault, check_classes, read_gray, refuse
from rollsight.inspect.models import Model
from rollsight.inspect.scan import A_MIN_PX, code_version, decide
from scipy import ndimage

RANKING = "ranking.csv"
MAX_PX = 2**24  # of one image: up to 330 bytes per px in one call of the net


@dataclass(frozen=True, slots=True)
class Ranked:
    """One image with a proposal."""

    file: str  # the Labelme file, beside its image; its number is the rank
    image: str  # the path of the image in the folder it was in
    group: str
    uncertainty: float  # bits: see `uncertainty_of`
    components: int


def propose(
    model: Model,
    engine: tuple[str, Engine],
    images: Path,
    out: Path,
    *,
    classes: Sequence[str] = (),
    refine: str = "none",
    group_by: str = "",
    on_fault: OnFault = refuse,
    on_image: Callable[[int, int], None] | None = None,
) -> list[Ranked]:
    """Write the new folder `out` with a Labelme file and a copy of each image under `images`.

    Files are numbered by doubt, so that Labelme shows the most doubtful first; ranking.csv lists them, and
    labels.txt the classes: those that are given, else all of the model's. A file says the split that a folder
    above its image is named after. engine is its name and what `open_engine` gives under it; refine "none" or
    a method of `refine.REFINERS`. A broken image is told to `on_fault` and left out. UserError for a folder
    without images, and where `out` is there already.
    """
    paths = sorted(path for path in images.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise UserError(f"{images}: no image there: needed {', '.join(IMAGE_SUFFIXES)}")
    if any(path.parent.name == "masks" for path in paths):
        raise UserError(f"{images}: it holds masks: give the folder of the images alone")
    if refine != "none":
        from rollsight.inspect.refine import REFINERS

        if refine not in REFINERS:
            raise UserError(f"no refinement {refine!r}: there are none, {', '.join(REFINERS)}", USAGE)
    grouping, made_at = Grouping(group_by), datetime.now(UTC).isoformat(timespec="seconds")
    classes = tuple(classes) or model.card.classes
    if unknown := [name for name in classes if name not in model.card.classes]:
        raise UserError(
            f"class {unknown[0]!r}: model {model.card.name} knows {', '.join(model.card.classes)}", USAGE
        )
    values = values_of(check_classes(out, list(classes)))
    found: list[tuple[Ranked, Path]] = []
    with whole_folder(out) as staging:
        for number, path in enumerate(paths, start=1):
            name = PurePosixPath(path.relative_to(images).as_posix())
            split = split_said(name.parts[:-1])
            try:
                _, group = grouping.place(name_within(name), split)
                gray = _read(path)
                mask, score, doubt = proposed(model, engine[1], gray, classes, refine)
            except UserError as fault:
                on_fault("broken", str(fault))
                continue
            document = document_of(mask, classes, score)
            document["flags"] = {REVIEWED: False}
            document["group"], document["split"] = group, split
            document["proposal"] = Proposal(
                model=model.card.name,
                model_hash=model.hash,
                engine=engine[0],
                refine=refine,
                code_version=code_version(),
                made_at=made_at,
                image=str(name),
                uncertainty=doubt,
                mask_digest=digest_of(mask, values),
            ).model_dump()
            draft = staging / f"{number}.draft"
            draft.write_text(json.dumps(document), encoding="utf-8")
            found.append((Ranked(draft.name, str(name), group, doubt, len(document["shapes"])), path))
            if on_image is not None:
                on_image(number, len(paths))
        if not found:
            raise UserError(f"{images}: none of its {len(paths)} images could be read")
        found.sort(key=lambda entry: (-entry[0].uncertainty, entry[0].image))
        digits = max(4, len(str(len(found))))  # Labelme sorts by name
        ranked = [
            _put_in_rank(staging, f"{rank:0{digits}}", *entry) for rank, entry in enumerate(found, start=1)
        ]
        with (staging / RANKING).open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, lineterminator="\n")
            table.writerow(("rank", "file", "image", "group", "uncertainty_bits", "components"))
            table.writerows(
                (rank, r.file, r.image, r.group, f"{r.uncertainty:.3f}", r.components)
                for rank, r in enumerate(ranked, start=1)
            )
        write_label_names(staging, classes)
    return ranked


def proposed(
    model: Model,
    engine: Engine,
    image: NDArray[np.float32],
    classes: Sequence[str],
    refine: str = "none",
) -> tuple[NDArray[np.uint8], NDArray[np.float32], float]:
    """Of an image (1, H, W): mask (H, W) of `classes`, probability of each pixel's class, doubt in bits.

    The model's other classes count as background. Components under A_MIN_PX are left out, as in the table of
    a scan.
    """
    logits = padded_logits(engine, image)
    p = probabilities(data_logits(logits, model.card.classes, classes, model.card.temperature))
    thresholds = tuple(model.card.thresholds[name] for name in classes)
    doubt = uncertainty_of(p, min(thresholds) / 2)
    if refine != "none":
        from rollsight.inspect.refine import refine as refined  # torch: a second

        p = refined(image, p, refine)
    mask, score = decide(np.log(np.maximum(p, 1e-12)), thresholds)
    ids, count = label_mask(mask)
    mask[np.bincount(ids.ravel(), minlength=count + 1)[ids] < A_MIN_PX] = 0
    return mask, score, doubt


def uncertainty_of(p: NDArray[np.float32], floor: float) -> float:
    """How much a person's word on each possible defect would tell, in bits: the sum over regions.

    p (K + 1, H, W), probabilities, background first. A region hangs together (8-connected) where the
    probability of any defect is `floor` or more; it counts with the entropy of its mean class probabilities
    (uncertainty sampling, Settles 2009, Active Learning Literature Survey, section 3.1). Over pixels, the
    borders of large defects drown the doubtful small ones: on the val scenes of neu_clean this ranks by the
    number of missed and false components with Spearman's rho 0.71, the mean entropy of the pixels with 0.34
    (default model, floor 0.25, 169 scenes, 2026-11-22).
    """
    regions, count = ndimage.label(1 - p[0] >= floor, structure=EIGHT)
    if not count:
        return 0.0
    numbers = np.arange(1, count + 1)
    mean = np.stack([ndimage.mean(plane, regions, numbers) for plane in p])  # (K + 1, regions)
    return float(-(mean * np.log2(np.maximum(mean, 1e-12))).sum())


def _read(path: Path) -> NDArray[np.float32]:
    """The image (1, H, W) in [0, 1]; UserError where it is broken or too large for one call of the net."""
    content = path.read_bytes()
    height, width = size_of(path, content, (None, None))
    if height * width > MAX_PX:
        raise UserError(f"{path}: {width} x {height} px is over {MAX_PX} px: cut it, or scan it as a roll")
    return read_gray(path, content)[None]


def _put_in_rank(staging: Path, rank: str, draft: Ranked, path: Path) -> Ranked:
    """Give a draft and a copy of its image their names."""
    image = staging / f"{rank}-{path.name}"
    shutil.copyfile(path, image)
    file = image.with_suffix(".json")
    document = json.loads((staging / draft.file).read_text(encoding="utf-8"))
    file.write_text(json.dumps(document | {"imagePath": image.name}), encoding="utf-8")
    (staging / draft.file).unlink()
    return Ranked(file.name, draft.image, draft.group, draft.uncertainty, draft.components)
