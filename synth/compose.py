"""Generated defects on clean steel: labelled data in which every sample tells how it was made.

Sample i is drawn from SHA-256 of (dataset seed, i) alone, so any of them can be made again by itself, with
the same bits on the same build.
"""

import hashlib
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labelled_folder import Incoming, LabelledImage, Written, write_labels
from rollsight.synth.backgrounds import Backgrounds, Steel
from rollsight.synth.generator import METHODS, Generator, kept_contrast
from rollsight.synth.mask_bank import OUTLINES, Bools, Mark, Plane, narrow
from rollsight.synth.mask_gan import FEWEST
from rollsight.synth.placing import Density, find_place, pasted

PROVENANCE = "provenance.jsonl"
DATASET = "dataset.json"
ATTEMPTS = 40  # at a sample before it is given up
MOST_MARKS = 2  # on a sample
STEEL_CHOICE = 3  # canvases looked at for one whose gray is near that around the mark
PASTE_KEEP = 0.5  # of its contrast at home that a mark must have on the new steel
VISIBLE = 0.5  # of the steel's own spread: less contrast is no label, unless the mark has no more at home
EDIT_KEEP = 0.5  # of the paste's contrast: less is rejected


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be made: all that decides a sample, but its index."""

    seed: int = 0
    method: str = "gan"
    most_marks: int = MOST_MARKS
    density: Density = field(default_factory=Density)
    outlines: str = "both"  # of the bank, of the mask GAN where there is one, or both

    def __post_init__(self) -> None:
        if self.outlines not in OUTLINES:
            raise UserError(f"outlines {self.outlines!r}: it must be one of {', '.join(OUTLINES)}", USAGE)
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r}: it must be one of {', '.join(METHODS)}", USAGE)
        if self.most_marks < 1 or self.seed < 0:
            raise UserError(
                f"{self.most_marks} marks on a sample, seed {self.seed}: at least one, and 0 or more", USAGE
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "method": self.method,
            "most_marks": self.most_marks,
            "density": self.density.to_json(),
            "outlines": self.outlines,
        }


@dataclass(frozen=True, slots=True)
class Made:
    """One sample."""

    image: NDArray[np.uint8]  # (H, W)
    mask: NDArray[np.uint8]  # (H, W) in the data's classes, 255 nobody knows
    group: str
    provenance: dict[str, Any]
    marks: list[Bools]  # (H, W) the px of each new mark
    start: Plane  # (H, W) the paste before the editor


class Rejected(Exception):  # noqa: N818 (a way out of an attempt, no error)
    """Why an attempt at a sample came to nothing."""


def make_sample(generator: Generator, backgrounds: Backgrounds, order: Order, index: int) -> Made:
    """Sample `index` of an order; UserError where no attempt at it succeeds."""
    if order.outlines == "gan" and generator.bank.outlines is None:
        raise UserError(
            f"outlines of the mask GAN: {generator.card.name} has none, {len(generator.bank.marks)} marks "
            f"(they are learned from {FEWEST} on): give --outlines bank or both",
            USAGE,
        )
    digest = hashlib.sha256(f"{order.seed}/{index}".encode()).digest()
    key = [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]
    rejected: Counter[str] = Counter()
    for attempt in range(ATTEMPTS):
        try:
            made = _attempt(generator, backgrounds, order, np.random.default_rng([*key, attempt]))
        except Rejected as reason:
            rejected[str(reason)] += 1
            continue
        made.provenance.update(index=index, attempt=attempt, rejected=dict(rejected))
        return made
    why = ", ".join(f"{reason} {n}" for reason, n in rejected.most_common())
    raise UserError(
        f"sample {index}: {ATTEMPTS} attempts without one to keep ({why}): give other or more backgrounds"
    )


def _attempt(generator: Generator, backgrounds: Backgrounds, order: Order, rng: np.random.Generator) -> Made:
    bank = generator.bank
    drawn = [bank.draw(rng, order.outlines) for _ in range(int(rng.integers(1, order.most_marks + 1)))]
    if order.outlines == "gan" and any(how.outline < 0 for _, how in drawn):
        raise Rejected("no outline")
    marks = [bank.deformed(number, how) for number, how in drawn]
    steel = _near_in_gray(backgrounds, marks[0], rng)
    value = generator.card.data_classes.index(generator.card.defect_class) + 1
    image, mask = steel.image, steel.mask.copy()
    start, placed, told = image, [], []
    for (number, how), mark in zip(drawn, marks, strict=True):
        if narrow(mark.inside):
            continue
        place = find_place(mark, mask > 0, rng, order.density, (steel.y, steel.x, steel.width))
        if place is None:
            continue
        on_steel, inside = pasted(start, mark, place, poisson=order.method == "poisson")
        if narrow(inside):
            continue
        at_home = contrast_at(mark.image, mark.inside)
        here = contrast_at(on_steel, inside)
        spread = float(image[_around(inside)].std())
        if here * np.sign(at_home) < min(VISIBLE * spread, abs(at_home)) or (
            here * np.sign(at_home) < PASTE_KEEP * abs(at_home)
        ):
            raise Rejected("faint")
        start, mask[inside] = on_steel, value
        placed.append(inside)
        ys, xs = np.nonzero(inside)
        origin = bank.marks[number]
        told.append(
            {
                "source": origin.source,
                "group": origin.group,
                "origin": list(origin.origin),
                "deformation": how.to_json(),
                "outline_of": bank.marks[how.partner].source if how.partner >= 0 else None,
                "outline_net": generator.card.outlines["weights"] if how.outline >= 0 else None,
                "place": list(place),
                "box": [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1],
                "area_px": int(inside.sum()),
                "contrast_at_home": round(at_home, 4),
                "contrast_pasted": round(here, 4),
            }
        )
    if not placed:
        raise Rejected("no place")
    edited = generator.edit(start, placed, rng) if order.method == "gan" else start
    for inside, one in zip(placed, told, strict=True):
        kept = kept_contrast(start, edited, inside)
        if order.method == "gan" and not generator.card.recipe["whole"] and kept < EDIT_KEEP:
            raise Rejected("erased")
        one["contrast_kept"] = round(kept, 4)
    pixels = np.round(edited * 255).clip(0, 255).astype(np.uint8)
    provenance = {
        "order": order.to_json(),
        "generator": generator.hash,
        "config": hashlib.sha256(json.dumps(generator.card.recipe, sort_keys=True).encode()).hexdigest(),
        "class": generator.card.defect_class,
        "background": {"name": steel.name, "group": steel.group, "y": steel.y, "x": steel.x},
        "marks": told,
        "sha256": hashlib.sha256(pixels.tobytes() + mask.tobytes()).hexdigest(),
    }
    return Made(pixels, mask, steel.group, provenance, placed, start)


def _near_in_gray(backgrounds: Backgrounds, mark: Mark, rng: np.random.Generator) -> Steel:
    """Of some canvases the one whose gray is nearest to that around the mark: steel of one line is alike."""
    around = mark.own & ~mark.inside
    home = float(np.median(mark.image[around])) if around.any() else 0.5
    canvases = [backgrounds.draw(rng) for _ in range(STEEL_CHOICE)]
    return min(canvases, key=lambda steel: abs(_gray(steel) - home))


def _gray(steel: Steel) -> float:
    clean = steel.image[steel.mask == 0]
    return float(np.median(clean)) if clean.size else 2.0  # no clean px: farther than any


def _around(inside: Bools) -> Bools:
    """The ring that a contrast is measured against."""
    from rollsight.synth.gan import RING_PX
    from scipy import ndimage

    near, far = (ndimage.binary_dilation(inside, np.ones((2 * r + 1, 2 * r + 1))) for r in RING_PX)
    ring: Bools = far & ~near
    return ring


def contrast_at(image: Plane, inside: Bools) -> float:
    """Mean gray of a mark's px less that of its ring, 0 without a ring: both (H, W)."""
    around = _around(inside)
    if not around.any():
        return 0.0
    return float(image[inside].mean() - image[around].mean())


def make_data(
    generator: Generator,
    backgrounds: Backgrounds,
    order: Order,
    n: int,
    out: Path,
    *,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[Written, dict[str, Any]]:
    """Write `n` samples as the new folder of labelled data `out`; what was written, and the data's card.

    All samples are of the train split; the group of each is that of its background. Beside them stand
    `provenance.jsonl`, one line a sample, and the card `dataset.json`. All of it or nothing.
    """
    if n < 1:
        raise UserError(f"{n} samples: at least one", USAGE)
    lines: list[dict[str, Any]] = []

    def images() -> Iterator[LabelledImage | UserError]:
        for index in range(n):
            made = make_sample(generator, backgrounds, order, index)
            name = PurePosixPath(f"{order.method}-{order.seed}-{index:05d}.png")
            lines.append({"image": f"train/images/{name}", **made.provenance})
            source = f"synthetic {order.method} {generator.card.name}"
            yield LabelledImage(name, png(made.image), made.mask, "train", made.group, source)

    def beside(folder: Path) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / PROVENANCE).write_text(text, encoding="utf-8")
        card.update(data_card(generator, order, lines))
        (folder / DATASET).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")

    card: dict[str, Any] = {}
    incoming = Incoming(generator.card.data_classes, n, images())
    return write_labels(out, incoming, on_image=on_image, beside=beside), card


def png(image: NDArray[np.uint8]) -> bytes:
    """A gray image (H, W) as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def data_card(generator: Generator, order: Order, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the samples are made of, how many attempts were rejected and why, what is known to be wrong."""
    rejected: Counter[str] = Counter()
    for line in lines:
        rejected.update(line["rejected"])
    marks = [mark for line in lines for mark in line["marks"]]
    attempts = len(lines) + sum(rejected.values())
    return {
        "name": f"synthetic {generator.card.defect_class}",
        "order": order.to_json(),
        "generator": {"name": generator.card.name, "hash": generator.hash, "method": order.method},
        "samples": len(lines),
        "marks": len(marks),
        "attempts": attempts,
        "rejected": dict(rejected),
        "reject_rate": round(sum(rejected.values()) / attempts, 4),
        "outlines": {
            "made": sum(mark["outline_net"] is not None for mark in marks),
            "refused": sum(mark["deformation"]["refused"] for mark in marks),
        },
        "backgrounds": len({line["background"]["name"] for line in lines}),
        "sources": sorted({mark["source"] for mark in marks}),
        "source_groups": sorted({mark["group"] for mark in marks}),
        "fitted_on": generator.card.fitted_on["source"],
        "contrast_kept": {
            "median": float(np.median([mark["contrast_kept"] for mark in marks])),
            "smallest": float(min(mark["contrast_kept"] for mark in marks)),
        },
        "known_failures": [
            "Every defect is derived from a labelled one, named in provenance.jsonl: nothing is a new kind.",
            "Real defects that nobody labelled stay on the backgrounds, and are then called clean.",
        ],
    }


def open_provenance(folder: Path) -> list[dict[str, Any]]:
    """The lines of a synthetic folder's provenance; UserError where there is none or it is damaged."""
    path = folder / PROVENANCE
    if not path.is_file():
        raise UserError(f"{path}: not found: this is no folder made by `inspect synth make`")
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for line in lines:
            line["image"], line["index"], line["marks"], line["order"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: damaged ({error!r}): make the data again"[:200]) from None
    return lines
