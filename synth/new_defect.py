"""One new defect on a roll: drawn from (seed, its number) and the steel around its place alone."""

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.augment import RING
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.rolls import Roll
from rollsight.synth.backgrounds import check_one_mode, groups_of, roll_label
from rollsight.synth.compose import (
    ATTEMPTS,
    Order,
    Rejected,
    Starts,
    check_order,
    counted,
    draw,
    edit,
    key_of,
    lay,
    made_by,
    sized,
    starts_degraded,
    tell,
)
from rollsight.synth.gan import GATE_DILATE_PX, GATE_REACH_PX, RING_PX
from rollsight.synth.generator import Generator
from rollsight.synth.ground import Ground, read_ground
from rollsight.synth.mask_bank import Bools, Deformation, MaskBank, narrow
from rollsight.synth.patches import mm_of, refuse_held
from scipy import ndimage

CLEAR_PX = RING_PX[1]  # around a defect: nothing else lies there, and what it changes does not go so far
REACH_PX = max(RING, GATE_DILATE_PX + GATE_REACH_PX)  # beyond a defect's px that paste and editor change
SEEN_PX = 32  # of the steel around a mark that the editor sees
MOST_DEFECTS = 1_000_000  # on a roll: their boxes are held in memory
WHOLE_TRIES = 200  # draws of a mark that no border of its scene cut off, before any is taken


@dataclass(frozen=True, slots=True)
class NewDefect:
    """One new defect: what it changes within a box of the roll."""

    y: int  # first line and column of the box
    x: int
    change: NDArray[np.int32]  # (h, w) added to the raw gray
    inside: Bools  # (h, w) its px
    left: int  # px where the strip begins on its middle line
    provenance: dict[str, Any]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """y0, x0, y1, x1 on the roll, half-open; no other new defect's box overlaps it."""
        height, width = self.inside.shape
        return self.y, self.x, self.y + height, self.x + width


@dataclass(frozen=True, slots=True)
class Field:
    """A roll that defects go into, and their order."""

    generator: Generator
    roll: Roll
    order: Order
    label: str | None  # the class mask that tells what is on the roll already

    @property
    def pitches(self) -> int:
        """Places along the strip for periodic marks: one on each multiple of the pitch."""
        return max(0, (self.roll.lines - 1) // self.order.density.pitch_px)


def open_field(
    generator: Generator, roll: Roll, order: Order, masks: Mapping[str, str | None] | None = None
) -> Field:
    """UserError where defects of this generator cannot go into this roll; masks: as `roll_label` has them."""
    check_one_mode(roll)
    check_order(generator, order)
    if order.method == "gan" and generator.card.recipe["whole"]:
        raise UserError(
            f"generator {generator.card.name} makes whole patches: into a roll go those of an editor, or "
            "--method paste or poisson",
            USAGE,
        )
    if order.density.kind == "periodic" and roll.lines <= order.density.pitch_px:
        raise UserError(
            f"a pitch of {order.density.pitch_px} px: roll {roll.roll_id} has only {roll.lines} lines",
            USAGE,
        )
    refuse_held(groups_of(roll), generator.card.held_groups, f"roll {roll.roll_id}")
    return Field(generator, roll, replace(order, most_marks=1), roll_label(roll, masks))


def defects_per_m(roll: Roll, per_m: float) -> int:
    """How many defects so many per metre are on a roll; UserError where it is in px, or it is none."""
    if roll.strip.mm_per_line is None:
        raise UserError(f"--per-m: roll {roll.roll_id} is in px: say how many with -n", USAGE)
    metres = roll.lines * roll.strip.mm_per_line / 1000
    if per_m * metres > MOST_DEFECTS:
        raise UserError(
            f"--per-m {per_m:g}: {metres:g} m would hold more than {MOST_DEFECTS:,}: give fewer", USAGE
        )
    if not (math.isfinite(per_m) and round(per_m * metres) >= 1):
        raise UserError(f"--per-m {per_m:g}: that is no defect on {metres:g} m: give more", USAGE)
    return round(per_m * metres)


def make_defect(field: Field, number: int, taken: Callable[[int, int, int, int], bool]) -> NewDefect:
    """Defect `number` of an order, at its first attempt that comes to something; UserError without one.

    taken: whether a box y0, x0, y1, x1 overlaps that of a defect with a lower number.
    """
    attempts, rejected = ATTEMPTS, Counter[str]()
    if field.order.density.kind == "periodic":
        attempts = max(attempts, field.pitches)  # on each of its places
    for attempt in range(attempts):
        try:
            made = remake_defect(field, number, attempt, taken)
        except Rejected as reason:
            rejected[str(reason)] += 1
            continue
        made.provenance.update(rejected=dict(rejected))
        return made
    raise UserError(
        f"defect {number}: {attempts} attempts without one to keep ({counted(rejected)}): ask for fewer, "
        "another placement, or give another roll"
    )


def remake_defect(
    field: Field, number: int, attempt: int, taken: Callable[[int, int, int, int], bool] | None = None
) -> NewDefect:
    """Defect `number` at this attempt, the same bits whatever else is on the new roll.

    Rejected where it comes to nothing, with `taken` also where another defect lies.
    """
    generator, roll, density = field.generator, field.roll, field.order.density
    rng = np.random.default_rng([*key_of(field.order.seed, number), attempt])
    # A damaged mill roll leaves one mark again and again, on one lane.
    periodic = density.kind == "periodic"
    key = key_of(field.order.seed, "periodic") if periodic else [*key_of(field.order.seed, number), attempt]
    same = np.random.default_rng(key) if periodic else rng
    starts = Starts(starts_degraded(generator, field.order), np.random.default_rng([*key, 1]))
    which, how = draw_whole(generator.bank, field.order, same)
    across = float(same.random())
    mm = mm_of(roll)
    mark, zoom = sized(generator.bank, which, how, mm)
    if narrow(mark.inside):
        raise Rejected("narrow")
    ys, xs = np.nonzero(mark.inside)
    (top, bottom), (first, last) = (ys.min(), ys.max() + 1), (xs.min(), xs.max() + 1)
    height, width = int(bottom - top), int(last - first)
    room = roll.lines - height - 2 * CLEAR_PX
    if room < 0:
        raise Rejected("longer than the roll")
    if periodic:
        places = pitch_order(field.order.seed, field.pitches)
        y = density.pitch_px * (1 + int(places[(number + attempt) % len(places)]))
        if y < CLEAR_PX or y + height + CLEAR_PX > roll.lines:
            raise Rejected("end of the roll")
        if taken is not None and taken(y, 0, y + 1, roll.width):
            raise Rejected("overlap")  # told before anything is read
    else:
        y = CLEAR_PX + int(rng.integers(room + 1))
    seen = (max(0, y - int(top) - SEEN_PX), min(roll.lines, y + height + SEEN_PX))
    ground = read_ground(roll, field.label, *seen)
    x = draw_column(ground, density.weights, y - CLEAR_PX, y + height + CLEAR_PX, width, across)
    y0, x0, y1, x1 = box = (y - CLEAR_PX, x - CLEAR_PX, y + height + CLEAR_PX, x + width + CLEAR_PX)
    if not ground.free[y0 - ground.y0 : y1 - ground.y0, x0:x1].all():
        raise Rejected("no free steel")
    if taken is not None and taken(*box):
        raise Rejected("overlap")
    columns = slice(max(0, x - int(first) - SEEN_PX), min(roll.width, x + width + SEEN_PX))
    lines = slice(seen[0] - ground.y0, seen[1] - ground.y0)
    steel = ground.image[lines, columns]
    place = (y - int(top) - seen[0], x - int(first) - columns.start)
    laid = lay(steel, steel, mark, place, starts, poisson=field.order.method == "poisson")
    if laid is None:
        raise Rejected("narrow")
    start, inside, contrasts = laid
    edited, [kept] = edit(generator, field.order, start, [inside], rng)
    # As whole steps of the raw gray, and only where paste and editor can reach: else the copy is the source.
    reach = ndimage.binary_dilation(inside, np.ones((2 * REACH_PX + 1,) * 2, dtype=bool))
    change = np.where(reach, np.round((edited - steel) * roll.white[0]), 0).astype(np.int32)
    if not ground.same_with(lines, columns, change / roll.white[0]):
        raise Rejected("not inspected")  # so dark, bright or wide that the line scan would give the place up
    crop = (slice(y0 - seen[0], y1 - seen[0]), slice(x0 - columns.start, x1 - columns.start))
    told = tell(generator, which, how, zoom, mm, place, inside) | contrasts
    told["place"] = [place[0] + seen[0], place[1] + columns.start]
    told["box"] = [x, y, x + width, y + height]
    told["contrast_kept"] = round(kept, 4)
    change, inside = change[crop], inside[crop]
    provenance = {
        **made_by(generator, field.order),
        "background": {"name": roll.roll_id, "group": roll.roll_id, "y": seen[0], "x": columns.start},
        "marks": [told],
        "sha256": hashlib.sha256(change.tobytes() + inside.tobytes()).hexdigest(),
        "index": number,
        "attempt": attempt,
        "rejected": {},
    }
    middle = int(ground.left[y + height // 2 - ground.y0])
    return NewDefect(y0, x0, change, inside, middle, provenance)


def draw_whole(bank: MaskBank, order: Order, rng: np.random.Generator) -> tuple[int, Deformation]:
    """A mark and its deformation; one that no border of its scene cut off, where the class has such ones.

    What a border had cut would end on a roll where no border is.
    """
    drawn = draw(bank, order, rng)
    if any(not any(mark.cut) for mark in bank.marks):
        for _ in range(WHOLE_TRIES):
            if not any(bank.marks[drawn[0]].cut):
                break
            drawn = draw(bank, order, rng)
    return drawn


@lru_cache(maxsize=4)
def pitch_order(seed: int, places: int) -> NDArray[np.int64]:
    """The places of periodic marks in the order in which they are taken."""
    return np.random.default_rng(key_of(seed, "pitch")).permutation(places)


def draw_column(
    ground: Ground,
    weights: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    y0: int,
    y1: int,
    width: int,
    quantile: float,
) -> int:
    """The first column of a defect on lines y0 to y1, at a quantile of the density over the width."""
    rows = slice(y0 - ground.y0, y1 - ground.y0)
    left, right = int(ground.left[rows].max()), int(ground.right[rows].min())
    xs = np.arange(left + CLEAR_PX, right - CLEAR_PX - width + 1)
    if not len(xs):
        raise Rejected("no strip there" if right <= left else "wider than the strip")
    density = weights((xs + width / 2 - left) / (right - left)).clip(1e-12)
    return int(xs[np.searchsorted(np.cumsum(density) / density.sum(), quantile).clip(0, len(xs) - 1)])
