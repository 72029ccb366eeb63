"""Generated defects on clean steel: labelled data in which every sample tells how it was made.

Sample i is drawn from SHA-256 of (dataset seed, i) alone, so any of them can be made again by itself, with
the same bits on the same build.
"""

import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labelled_folder import Incoming, LabelledImage, Written, write_labels
from rollsight.synth.backgrounds import WINDOW_PX, Backgrounds, Steel
from rollsight.synth.croissant import folder_card, write_card
from rollsight.synth.data_card import DATASET, PROVENANCE, data_card
from rollsight.synth.degraded import VISIBLE, contrast_at, degraded, surroundings
from rollsight.synth.gan import SEEN_PX
from rollsight.synth.generator import METHODS, Generator, kept_contrast
from rollsight.synth.mask_bank import OUTLINES, VARIETY, Bools, Deformation, Mark, MaskBank, Plane, narrow
from rollsight.synth.mask_gan import FEWEST
from rollsight.synth.patches import PixelMm
from rollsight.synth.placing import STEEL_CHOICE, Density, find_place, gray_around, pasted
from scipy import ndimage

ATTEMPTS = 40  # at a sample before it is given up; of periodic ones more
MOST_MARKS = 2  # on a sample
MANY_MARKS = 50  # nobody finds room for more on 256 px: each attempt would be in vain
PASTE_KEEP = 0.5  # of its contrast at home that a mark must have on the new steel
EDIT_KEEP = 0.5  # of the paste's contrast: less is rejected
MOST_ZOOM = 8.0  # from the px of the labels to those of the steel, either way


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be made: all that decides a sample, but its index."""

    seed: int = 0
    method: str = "gan"
    most_marks: int = MOST_MARKS
    density: Density = field(default_factory=Density)
    outlines: str = "both"  # of the bank, of the mask GAN where there is one, or both
    variety: float = 1.0  # how far marks are varied, of what is usual (`MaskBank.draw`)

    def __post_init__(self) -> None:
        if self.outlines not in OUTLINES:
            raise UserError(f"outlines {self.outlines!r}: it must be one of {', '.join(OUTLINES)}", USAGE)
        if self.method not in METHODS:
            raise UserError(f"method {self.method!r}: it must be one of {', '.join(METHODS)}", USAGE)
        if not VARIETY[0] <= self.variety <= VARIETY[1]:
            raise UserError(
                f"variety {self.variety:g}: it must be {VARIETY[0]:g} to {VARIETY[1]:g}, 1 is usual", USAGE
            )
        if not 1 <= self.most_marks <= MANY_MARKS or self.seed < 0:
            raise UserError(
                f"{self.most_marks} marks on a sample, seed {self.seed}: 1 to {MANY_MARKS}, and 0 or more",
                USAGE,
            )

    def to_json(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "method": self.method,
            "most_marks": self.most_marks,
            "density": self.density.to_json(),
            "outlines": self.outlines,
            "variety": self.variety,
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


def key_of(seed: int, number: int | str) -> list[int]:
    """What the random numbers of one sample of a set begin from."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return [int.from_bytes(digest[i : i + 4], "big") for i in range(0, 32, 4)]


def check_order(generator: Generator, order: Order) -> None:
    """Refuse, as UserError, an order of made outlines or degraded starts for a generator without them."""
    if order.method == "degraded" and not starts_degraded(generator, order):
        raise UserError(
            f"degraded starts: {generator.card.name} was fitted without them: fit it with --free", USAGE
        )
    if order.outlines == "gan" and generator.bank.outlines is None:
        raise UserError(
            f"outlines of the mask GAN: {generator.card.name} has none, {len(generator.bank.marks)} marks "
            f"(they are learned from {FEWEST} on): give --outlines bank or both",
            USAGE,
        )


def starts_degraded(generator: Generator, order: Order) -> float:
    """The share of the marks that the editor is given degraded: at `make` as in the fit."""
    degrading = order.method in ("gan", "degraded")
    return float(generator.card.recipe.get("degraded", 0.0)) if degrading else 0.0  # older cards have none


def draw(bank: MaskBank, order: Order, rng: np.random.Generator) -> tuple[int, Deformation]:
    """A mark and its deformation; Rejected where the order asks for a made outline and none is good."""
    number, how = bank.draw(rng, order.outlines, order.variety)
    if order.outlines == "gan" and how.outline < 0:
        raise Rejected("no outline")
    return number, how


def make_sample(
    generator: Generator, backgrounds: Backgrounds, order: Order, index: int, candidate: int = 0
) -> Made:
    """Sample `index` of an order; UserError where no attempt at it succeeds.

    Other candidates have the same marks on the same steel: edited with other latents, or pasted elsewhere.
    """
    check_order(generator, order)
    key = key_of(order.seed, index)
    rejected: Counter[str] = Counter()
    attempts = ATTEMPTS
    if order.density.kind == "periodic":  # most windows show no line of the pitch
        attempts *= math.ceil(order.density.pitch_px / WINDOW_PX)
    for attempt in range(attempts):
        try:
            made = _attempt(generator, backgrounds, order, [*key, attempt], candidate)
        except Rejected as reason:
            rejected[str(reason)] += 1
            continue
        made.provenance.update(index=index, attempt=attempt, rejected=dict(rejected))
        return made
    raise UserError(
        f"sample {index}: {attempts} attempts without one to keep ({counted(rejected)}): "
        "give other or more backgrounds"
    )


def counted(rejected: Counter[str]) -> str:
    """Why attempts came to nothing, the most frequent reason first."""
    return ", ".join(f"{reason} {n}" for reason, n in rejected.most_common())


def _attempt(
    generator: Generator, backgrounds: Backgrounds, order: Order, key: list[int], candidate: int
) -> Made:
    bank, rng = generator.bank, np.random.default_rng(key)
    starts = Starts(starts_degraded(generator, order), np.random.default_rng([*key, 1]))
    drawn = [draw(bank, order, rng) for _ in range(int(rng.integers(1, order.most_marks + 1)))]
    first = bank.deformed(*drawn[0])
    steel = _near_in_gray(backgrounds, first, rng)
    image, mask = steel.image, steel.mask.copy()
    other = np.random.default_rng([*key, 2, candidate]) if candidate else rng
    where = rng if order.method == "gan" else other
    at = (steel.y, steel.x, steel.width)
    start, placed, told, narrow_ones = image, [], [], 0
    for number, how in drawn:
        mark, zoom = sized(bank, number, how, steel.mm)
        if narrow(mark.inside):
            narrow_ones += 1
            continue
        place = find_place(mark, _taken(generator, order, mask), where, order.density, at)
        if place is None:
            continue
        laid = lay(image, start, mark, place, starts, poisson=order.method == "poisson")
        if laid is None:
            narrow_ones += 1
            continue
        start, inside, contrasts = laid
        mask[inside] = value_of(generator)
        placed.append(inside)
        told.append(tell(generator, number, how, zoom, steel.mm, place, inside) | contrasts)
    if not placed:
        raise Rejected("narrow" if narrow_ones == len(drawn) else "no place")
    edited, kept = edit(generator, order, start, placed, other)
    for one, share in zip(told, kept, strict=True):
        one["contrast_kept"] = round(share, 4)
    pixels = np.round(edited * 255).clip(0, 255).astype(np.uint8)
    provenance = {
        **made_by(generator, order),
        "background": {"name": steel.name, "group": steel.group, "y": steel.y, "x": steel.x},
        "marks": told,
        "sha256": digest_of(pixels, mask),
    }
    return Made(pixels, mask, steel.group, provenance, placed, start)


def _taken(generator: Generator, order: Order, mask: NDArray[np.uint8]) -> Bools:
    """Where no mark may lie: (H, W). What a generator of whole patches paints anew covers no other label."""
    taken: Bools = mask > 0
    if order.method == "gan" and generator.card.recipe["whole"]:
        taken = ndimage.binary_dilation(taken, np.ones((2 * SEEN_PX + 1,) * 2, dtype=bool))
    return taken


def value_of(generator: Generator) -> int:
    """The mask value of the generator's class in its labelled data."""
    return generator.card.data_classes.index(generator.card.defect_class) + 1


def made_by(generator: Generator, order: Order) -> dict[str, Any]:
    """What a sample's provenance says of its maker."""
    return {
        "order": order.to_json(),
        "generator": generator.hash,
        "config": hashlib.sha256(json.dumps(generator.card.recipe, sort_keys=True).encode()).hexdigest(),
        "class": generator.card.defect_class,
    }


def sized(
    bank: MaskBank, number: int, how: Deformation, mm: PixelMm | None
) -> tuple[Mark, tuple[float, float] | None]:
    """A mark, deformed, at its size in mm on steel with a px of `mm`, and by what its px were scaled.

    Where the labels or the steel do not say how large a px is, px stay px: None.
    """
    home = bank.marks[number].mm
    if home is None or mm is None:
        return bank.deformed(number, how), None
    zoom = (home[0] / mm[0], home[1] / mm[1])
    if not all(1 / MOST_ZOOM <= one <= MOST_ZOOM for one in zoom):
        raise UserError(
            f"labels of {home[1]:g} x {home[0]:g} mm per px on steel of {mm[1]:g} x {mm[0]:g}: a defect "
            f"would be scaled by {zoom[1]:g} x {zoom[0]:g}, at most {MOST_ZOOM:g} is sound: give other steel"
        )
    if zoom != (1.0, 1.0):
        how = replace(how, scale_y=how.scale_y * zoom[0], scale_x=how.scale_x * zoom[1])
    return bank.deformed(number, how), zoom


@dataclass(frozen=True, slots=True)
class Starts:
    """How often a mark is degraded, by random numbers of its own: marks and places stay those of others."""

    share: float
    rng: np.random.Generator


def lay(
    image: Plane, start: Plane, mark: Mark, place: tuple[int, int], starts: Starts, *, poisson: bool
) -> tuple[Plane, Bools, dict[str, Any]] | None:
    """The mark laid on `start` (H, W): the new canvas, the mark's px on it, its contrasts.

    image: the steel without any mark. A degraded one is told as such. None where the mark is under 2 px wide
    there; Rejected where too little of it would show.
    """
    on_steel, inside = pasted(start, mark, place, poisson=poisson)
    if narrow(inside):
        return None
    at_home = contrast_at(mark.image, mark.inside)
    here = contrast_at(on_steel, inside)
    spread = float(image[surroundings(inside)].std())
    if here * np.sign(at_home) < min(VISIBLE * spread, abs(at_home)) or (
        here * np.sign(at_home) < PASTE_KEEP * abs(at_home)
    ):
        raise Rejected("faint")
    told: dict[str, Any] = {"contrast_at_home": round(at_home, 4), "contrast_pasted": round(here, 4)}
    if starts.share and starts.rng.random() < starts.share:
        less = degraded(start, on_steel, inside, starts.rng)
        if less is not None:
            on_steel, told["degraded"] = less
    return on_steel, inside, told


def tell(
    generator: Generator,
    number: int,
    how: Deformation,
    zoom: tuple[float, float] | None,
    mm: PixelMm | None,
    place: tuple[int, int],
    inside: Bools,
) -> dict[str, Any]:
    """What provenance says of a mark: `inside` its px (H, W) on a canvas, `place` where its plane begins."""
    ys, xs = np.nonzero(inside)
    box = [int(xs.min()), int(ys.min()), int(xs.max()) + 1, int(ys.max()) + 1]
    bank = generator.bank
    origin = bank.marks[number]
    return {
        "source": origin.source,
        "group": origin.group,
        "origin": list(origin.origin),
        "deformation": how.to_json(),
        "outline_of": bank.marks[how.partner].source if how.partner >= 0 else None,
        "outline_net": generator.card.outlines["weights"] if how.outline >= 0 else None,
        "zoom": None if zoom is None else [round(one, 6) for one in zoom],
        "place": list(place),
        "box": box,
        "area_px": int(inside.sum()),
        "length_mm": None if mm is None else round((box[3] - box[1]) * mm[0], 3),
        "width_mm": None if mm is None else round((box[2] - box[0]) * mm[1], 3),
    }


def edit(
    generator: Generator, order: Order, start: Plane, placed: list[Bools], rng: np.random.Generator
) -> tuple[Plane, list[float]]:
    """The canvas (H, W) as the order's method leaves it, and the share of its contrast that each mark kept.

    Rejected where the editor took too much of one.
    """
    edited = generator.edit(start, placed, rng) if order.method == "gan" else start
    kept = [kept_contrast(start, edited, inside) for inside in placed]
    if order.method == "gan" and not generator.card.recipe["whole"] and min(kept) < EDIT_KEEP:
        raise Rejected("erased")
    return edited, kept


def _near_in_gray(backgrounds: Backgrounds, mark: Mark, rng: np.random.Generator) -> Steel:
    """Of some canvases the one whose gray is nearest to that around the mark."""
    home, steel = gray_around(mark), backgrounds.for_sample(rng)
    canvases = [steel.draw(rng) for _ in range(STEEL_CHOICE)]
    return min(canvases, key=lambda canvas: abs(_gray(canvas) - home))


def _gray(steel: Steel) -> float:
    clean = steel.image[steel.mask == 0]
    return float(np.median(clean)) if clean.size else 2.0  # no clean px: farther than any


def make_data(
    generator: Generator,
    backgrounds: Backgrounds,
    order: Order,
    n: int,
    out: Path,
    *,
    licence: str = "",
    make: Callable[[int], Made] | None = None,
    on_image: Callable[[int, int], None] | None = None,
) -> tuple[Written, dict[str, Any]]:
    """Write `n` samples as the new folder of labelled data `out`; what was written, and the data's card.

    make: what makes a sample of its index, by default its first candidate.

    All samples are of the train split; the group of each is that of its background. Beside them stand
    `provenance.jsonl`, one line a sample, and the card, `dataset.json` and `croissant.json`. All or nothing.
    """
    if n < 1:
        raise UserError(f"{n} samples: at least one", USAGE)
    highest = max((len(scene.mask) for scene in backgrounds.scenes), default=0)
    if order.density.kind == "periodic" and not backgrounds.rolls and highest <= order.density.pitch_px:
        raise UserError(
            f"a pitch of {order.density.pitch_px} px: the highest of the images has only {highest} lines",
            USAGE,
        )
    lines: list[dict[str, Any]] = []

    def images() -> Iterator[LabelledImage | UserError]:
        for index in range(n):
            made = make(index) if make else make_sample(generator, backgrounds, order, index)
            name = PurePosixPath(f"{order.method}-{order.seed}-{index:05d}.png")
            lines.append({"image": f"train/images/{name}", **made.provenance})
            source = f"synthetic {order.method} {generator.card.name}"
            yield LabelledImage(name, png(made.image), made.mask, "train", made.group, source)

    def beside(folder: Path) -> None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / PROVENANCE).write_text(text, encoding="utf-8")
        card.update(data_card(generator, order.to_json(), lines, backgrounds.masks, licence))
        (folder / DATASET).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
        write_card(folder, folder_card(folder, card, generator.card.data_classes))

    card: dict[str, Any] = {}
    incoming = Incoming(generator.card.data_classes, n, images())
    return write_labels(out, incoming, on_image=on_image, beside=beside), card


def digest_of(image: NDArray[np.uint8], mask: NDArray[np.uint8]) -> str:
    """SHA-256 of a sample as its provenance has it: of the px of image and mask (H, W)."""
    return hashlib.sha256(image.tobytes() + mask.tobytes()).hexdigest()


def png(image: NDArray[np.uint8]) -> bytes:
    """A gray image (H, W) as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()
