"""The marks of a class that synthetic defects are made of, and how they are varied.

A deformation keeps the rolling direction: no turns, scales along and across, and one gentle bend. Elastic
displacement is under a pixel, since stronger ones turned straight cracks into snakes.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.augment import RING
from rollsight.inspect.defects import label_mask
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE
from rollsight.synth.mask_gan import GRID, Ends, Outlines, in_box, on_grid
from rollsight.synth.patches import PixelMm, Scene
from scipy import ndimage

Plane = NDArray[np.float32]
Bools = NDArray[np.bool_]

MIN_PX = 2  # a mark is never narrower
MARGIN = RING + 1  # px of its surroundings that a mark carries
SCALES = (0.6, 1.6)  # limits of what a size drawn from the class's own distribution may ask of one mark
STRETCH = 0.15  # spread of the logarithm of length over width
TILT = 0.06  # rad: limit of the turn
BEND = 0.02  # of the length: how far the middle of a mark is moved sideways, at most
WOBBLE_PX = 0.35  # of elastic displacement, correlated over 16 px
BLEND_SHARE = 0.25  # of the marks that take up to half of their outline from another
OWN_SIZE = 0.5  # how much of its own size a mark keeps, or its texture would be magnified too far
GAIN = 0.35  # spread of the logarithm of what a contrast is multiplied with, for each doubling of the variety
VARIETY = (0.5, 4.0)  # limits of it: 1 is as measured, at 4 nothing of the mark's own size is left
ALIKE = 0.35  # largest difference of the logarithms of `_shape` for that, and of a box's sides for the next
OUTLINES = ("both", "bank", "gan")  # where outlines come from
MADE_SHARE = 0.5  # of the marks that are drawn with a made outline, beside the bank's own
MADE_TRIES = 8  # outlines looked at before a mark is drawn without
WORN = 0.5  # IoU in its box that a made outline must have with that of the mark whose gray fills it


@dataclass(frozen=True, slots=True)
class Mark:
    """One component of a class with its surroundings."""

    image: Plane  # (h, w) in [0, 1]
    inside: Bools  # (h, w) the component
    own: Bools  # (h, w) the component and plain background around it
    defect_class: str
    source: str  # image it was cut from
    group: str
    origin: tuple[int, int]  # first line and column in that image
    cut: Ends  # whether the image's top, bottom, left, right border cut it off
    mm: PixelMm | None = None  # of a px along and across, where the labels say it

    @property
    def box(self) -> tuple[slice, slice]:
        """Where in the window its px lie."""
        ys, xs = np.nonzero(self.inside)
        return slice(int(ys.min()), int(ys.max()) + 1), slice(int(xs.min()), int(xs.max()) + 1)


@dataclass(frozen=True, slots=True)
class Deformation:
    """How a mark is varied; all of it stands in a sample's provenance."""

    flip_x: bool
    flip_y: bool
    scale_y: float  # along the strip
    scale_x: float  # across
    tilt: float  # rad
    bend: float  # of the length, signed
    wobble: int  # seed of the elastic displacement
    partner: int = -1  # mark of the bank whose outline is blended in, -1: none
    share: float = 0.0  # of that outline
    outline: int = -1  # seed of an outline of the mask GAN that takes the place of the mark's own, -1: none
    boxed_as: int = -1  # mark of the bank for whose box and ends that outline was made
    refused: int = 0  # outlines refused before this one
    gain: float = 1.0  # what its contrast is multiplied with

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def marks_of(scenes: Sequence[Scene], classes: Sequence[str]) -> list[Mark]:
    """Every component of the classes (names by mask value) that is 2 px wide or more somewhere."""
    marks = []
    for scene in scenes:
        ids, _ = label_mask(np.where(scene.mask == IGNORE, 0, scene.mask).astype(np.uint8))
        for number, box in enumerate(ndimage.find_objects(ids), start=1):
            if narrow(ids[box] == number):
                continue
            (ys, xs), (height, width) = box, scene.mask.shape
            window = (
                slice(max(0, ys.start - MARGIN), min(height, ys.stop + MARGIN)),
                slice(max(0, xs.start - MARGIN), min(width, xs.stop + MARGIN)),
            )
            inside = ids[window] == number
            marks.append(
                Mark(
                    scene.image[window],
                    inside,
                    inside | (scene.mask[window] == 0),
                    classes[scene.mask[box][ids[box] == number][0] - 1],
                    scene.name,
                    scene.group,
                    (window[0].start, window[1].start),
                    (
                        ys.start == scene.seen[0],
                        ys.stop == height,
                        xs.start == scene.seen[1],
                        xs.stop == width,
                    ),
                    scene.mm,
                )
            )
    return marks


def narrow(inside: Bools) -> bool:
    """Whether a mark is under 2 px wide: less than half of it lies in squares of 2 x 2 px."""
    if not inside.any():
        return True
    whole = ndimage.binary_opening(np.pad(inside, 2), np.ones((MIN_PX, MIN_PX), dtype=bool))
    return bool(2 * whole.sum() < inside.sum())


class MaskBank:
    """The marks of one class, the distribution of their sizes, and a mask GAN where one was fitted."""

    def __init__(self, marks: Sequence[Mark], defect_class: str, outlines: Outlines | None = None) -> None:
        """UserError where none of the marks is of that class."""
        self.marks = [mark for mark in marks if mark.defect_class == defect_class]
        self.defect_class = defect_class
        if not self.marks:
            raise UserError(
                f"class {defect_class!r}: no component of 2 px or wider in the train split: label some", USAGE
            )
        self._shapes = [_shape(mark.inside) for mark in self.marks]
        # Log-normal in the side of a square of the same area: mm where all marks know their px, else px.
        self.in_mm = all(mark.mm is not None for mark in self.marks)
        sides = [self._log_side(mark) for mark in self.marks]
        self.log_side = (float(np.mean(sides)), float(np.std(sides)))
        self.outlines = outlines
        insides = [mark.inside[mark.box] for mark in self.marks]
        self._boxes = np.array([inside.shape for inside in insides])
        self._grids = np.stack([on_grid(inside) >= 0.5 for inside in insides]) if outlines else None

    def _log_side(self, mark: Mark) -> float:
        along, across = mark.mm if self.in_mm and mark.mm is not None else (1.0, 1.0)
        return float(np.log(np.sqrt(mark.inside.sum() * along * across)))

    def draw(
        self, rng: np.random.Generator, outlines: str = "both", variety: float = 1.0
    ) -> tuple[int, Deformation]:
        """A mark by number, and a deformation that brings it to a size of the class's own distribution.

        variety: how much farther than at 1 a mark may go from itself: in size, proportions, outline, and, at
        1 not at all, in contrast; never in direction.
        outlines: `bank` those of the marks, `gan` made ones, `both` some of each. A made one is drawn for the
        box of one mark and worn by that one whose outline is most like it. Where none is, or MADE_TRIES were
        refused, the deformation has none.
        """
        number = int(rng.integers(len(self.marks)))
        made: tuple[int, int, int] | None = None
        if self.outlines and outlines != "bank" and (outlines == "gan" or rng.random() < MADE_SHARE):
            boxed_as = number
            for refused, seed in enumerate(rng.integers(2**31, size=MADE_TRIES).tolist()):
                if (wearer := self._wearer(seed, boxed_as)) is not None:
                    number, made = wearer, (seed, boxed_as, refused)
                    break
        own = self._log_side(self.marks[number])
        wanted = rng.normal(*self.log_side)
        scales = np.power(SCALES, variety)
        scale = float(np.clip(np.exp(OWN_SIZE ** (1 / variety) * (wanted - own)), *scales))
        stretch = float(np.exp(variety * np.clip(rng.normal(0, STRETCH), -2 * STRETCH, 2 * STRETCH)))
        sizes = np.clip([scale * stretch, scale / stretch], *scales)
        # What both borders cut off went on beyond them: shorter it would end where no mark of its kind does.
        cut = self.marks[number].cut
        sizes[[cut[0] and cut[1], cut[2] and cut[3]]] = 1.0
        how = Deformation(
            bool(rng.integers(2)),
            bool(rng.integers(2)),
            float(sizes[0]),
            float(sizes[1]),
            float(rng.uniform(-TILT, TILT)),
            float(rng.uniform(-BEND, BEND)),
            int(rng.integers(2**31)),
        )
        if made:
            how = replace(how, outline=made[0], boxed_as=made[1], refused=made[2])
        elif rng.random() < BLEND_SHARE * variety and (alike := self._alike(number)):
            partner = alike[int(rng.integers(len(alike)))]
            how = replace(how, partner=partner, share=float(rng.uniform(0.2, 0.5)))
        if (spread := GAIN * float(np.log2(variety))) > 0:
            how = replace(how, gain=float(np.exp(np.clip(rng.normal(0, spread), -2 * spread, 2 * spread))))
        return number, how

    def _alike(self, number: int) -> list[int]:
        """The other marks with much the same proportions, fill of their box and ends at borders.

        Outlines of others made diamonds that no defect is (looked at).
        """
        return [
            other
            for other, mark in enumerate(self.marks)
            if other != number
            and mark.cut == self.marks[number].cut
            and (np.abs(self._shapes[other] - self._shapes[number]) < ALIKE).all()
        ]

    def deformed(self, number: int, how: Deformation) -> Mark:
        """The mark as the deformation makes it; its sizes are those of the new image."""
        mark = self.marks[number]
        if how.outline >= 0:
            drawn = self._drawn(how.outline, how.boxed_as)
            if (dressing := self._made(number, drawn)) is None:
                raise ValueError(f"outline {how.outline} does not fit mark {number}")
            mark = dressing
        elif how.partner >= 0:
            mark = _with_outline(mark, self.marks[how.partner], how.share)
        return _amplified(deform(mark, how), how.gain)

    def _wearer(self, seed: int, boxed_as: int) -> int | None:
        """The mark of the same ends and much the same box whose outline is most like a made one.

        None where the made one is refused: empty, in pieces, under 2 px wide, or like that of no such mark.
        """
        assert self._grids is not None
        cut = self.marks[boxed_as].cut
        near = (np.abs(np.log(self._boxes / self._boxes[boxed_as])) < ALIKE).all(axis=1)
        near &= [mark.cut == cut for mark in self.marks]
        drawn = self._drawn(seed, boxed_as)
        whole = in_box(drawn, (GRID, GRID))
        if whole is None:
            return None
        both, either = (op(self._grids, whole).sum(axis=(1, 2)) for op in (np.logical_and, np.logical_or))
        likeness = np.where(near, both / either, -1.0)
        wearer = int(likeness.argmax())
        if likeness[wearer] < WORN or self._made(wearer, drawn) is None:
            return None
        return wearer

    def _drawn(self, seed: int, boxed_as: int) -> Plane:
        """The outline of a seed for the box and the ends of a mark, on the grid."""
        assert self.outlines is not None
        height, width = self._boxes[boxed_as]
        return self.outlines(seed, (int(height), int(width)), self.marks[boxed_as].cut)

    def _made(self, number: int, drawn: Plane) -> Mark | None:
        """The mark in an outline of the grid; None where its window has no whole and wide place for it."""
        mark = self.marks[number]
        height, width = self._boxes[number]
        shape = in_box(drawn, (int(height), int(width)))
        if shape is None:
            return None
        outline = np.zeros_like(mark.inside)
        outline[mark.box] = shape
        outline &= mark.own
        if narrow(outline) or ndimage.label(outline, np.ones((3, 3)))[1] != 1:
            return None
        return dressed(mark, outline)


def deform(mark: Mark, how: Deformation) -> Mark:
    """The mark warped, with its margin: cubic in gray, the mask where half of a px is covered."""
    height, width = mark.inside.shape
    out_h, out_w = max(3, round(height * how.scale_y)), max(3, round(width * how.scale_x))
    tall = out_h + 2 * round(abs(how.tilt) * out_w / 2)
    side = round(abs(how.tilt) * out_h / 2 + abs(how.bend) * out_h)
    wide = out_w + 2 * side
    v, u = np.mgrid[0:tall, 0:wide].astype(np.float32)
    v, u = v - (tall - 1) / 2, u - (wide - 1) / 2
    u = u - how.tilt * v - how.bend * out_h * (1 - (2 * v / out_h) ** 2)
    v = v + how.tilt * u
    noise = np.random.default_rng(how.wobble).standard_normal((2, tall, wide)).astype(np.float32)
    smooth = ndimage.gaussian_filter(noise, (0, 8, 8))
    smooth *= WOBBLE_PX / max(float(smooth.std()), 1e-6)
    y = (v + smooth[0]) / how.scale_y + (height - 1) / 2
    x = (u + smooth[1]) / how.scale_x + (width - 1) / 2
    if how.flip_y:
        y = height - 1 - y
    if how.flip_x:
        x = width - 1 - x
    at = np.stack([y, x])
    # Cubic: bilinear took the grain off the steel, which the discriminator saw at once (looked at).
    image = ndimage.map_coordinates(mark.image, at, order=3, mode="nearest").clip(0, 1)
    # Where a border of the scene cut the mark it goes on, elsewhere nothing is beyond the margin.
    cut_y, cut_x = mark.cut[0] or mark.cut[1], mark.cut[2] or mark.cut[3]
    inside = ndimage.map_coordinates(mark.inside.astype(np.float32), at, order=1, mode="nearest") >= 0.5
    beyond = np.zeros_like(inside)
    if not cut_y:
        beyond |= (y < 0) | (y > height - 1)
    if not cut_x:
        beyond |= (x < 0) | (x > width - 1)
    own = ndimage.map_coordinates(mark.own.astype(np.float32), at, order=0, mode="constant") > 0.5
    top, bottom, left, right = mark.cut
    if how.flip_y:
        top, bottom = bottom, top
    if how.flip_x:
        left, right = right, left
    inside &= ~beyond
    return replace(
        mark,
        image=image.astype(np.float32),
        inside=inside,
        own=own | inside,
        cut=(top, bottom, left, right),
    )


def _amplified(mark: Mark, gain: float) -> Mark:
    """The mark with its contrast to the steel around it multiplied, fading as a paste's ring does."""
    around = mark.own & ~mark.inside
    if gain == 1 or not around.any():
        return mark
    fade = (1 - ndimage.distance_transform_edt(~mark.inside) / RING).clip(0, 1)
    change = (gain - 1) * fade * (mark.image - mark.image[around].mean())
    return replace(mark, image=(mark.image + change).clip(0, 1).astype(np.float32))


def _with_outline(mark: Mark, other: Mark, share: float) -> Mark:
    """The mark with an outline between its own and that of `other`, brought to its size.

    Signed distances are mixed. Where the new outline is wider the gray is that of the nearest px of the mark,
    where it is narrower that of the nearest px of its surroundings.
    """
    height, width = mark.inside.shape
    zoom = np.divide(mark.inside.shape, other.inside.shape)
    rows = np.minimum((np.arange(height) / zoom[0]).astype(int), other.inside.shape[0] - 1)
    columns = np.minimum((np.arange(width) / zoom[1]).astype(int), other.inside.shape[1] - 1)
    mixed = (1 - share) * _signed(mark.inside) + share * _signed(other.inside[np.ix_(rows, columns)])
    return dressed(mark, mixed > 0)


def dressed(mark: Mark, outline: Bools) -> Mark:
    """The mark in another outline (h, w); as it is where the outline is empty or too narrow."""
    outline = outline & mark.own
    if narrow(outline):
        return mark
    image = mark.image.copy()
    for missing, known in (
        (outline & ~mark.inside, mark.inside),
        (mark.inside & ~outline, mark.own & ~mark.inside),
    ):
        if missing.any() and known.any():
            nearest = ndimage.distance_transform_edt(~known, return_distances=False, return_indices=True)
            image[missing] = mark.image[tuple(nearest[:, missing])]
    return replace(mark, image=image, inside=outline, own=mark.own)


def _shape(inside: Bools) -> NDArray[np.float64]:
    """Logarithms of a mark's height over width, and of the share of its box that it fills: (2,)."""
    ys, xs = np.nonzero(inside)
    height, width = np.ptp(ys) + 1, np.ptp(xs) + 1
    return np.log([height / width, len(ys) / (height * width)])


def _signed(inside: Bools) -> Plane:
    """Distance to the outline in px, positive inside: (h, w)."""
    out: Plane = (ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)).astype(
        np.float32
    )
    return out
