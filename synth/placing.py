"""Where on clean steel a mark goes, and how it is drawn there: pasted, or by its gradients (Poisson)."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.augment import RING
from rollsight.inspect.copy_paste import blended
from rollsight.inspect.errors import USAGE, UserError
from rollsight.synth.mask_bank import Bools, Mark, Plane
from scipy import ndimage, sparse
from scipy.sparse.linalg import spsolve

MIDDLE = 0.5  # of the strip's width: where a lane is by default
STEEL_CHOICE = 8  # canvases looked at for one whose gray is near that around the mark
TRIES = 12  # places looked at before a mark is given up
EDGE_SHARE = 0.08  # of the width: how fast the density of `edges` falls off
LANE_SHARE = 0.03  # of the width: spread of a lane
KINDS = ("anywhere", "edges", "lane", "periodic")


@dataclass(frozen=True, slots=True)
class Density:
    """Where on the strip marks lie: over its width, and for `periodic` over its length as well."""

    kind: str = "anywhere"
    lane: float = MIDDLE  # middle of the lane, 0 drive side to 1
    pitch_px: int = 0  # lines from one mark of a damaged roll to the next

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"placement {self.kind!r}: it must be one of {', '.join(KINDS)}", USAGE)
        if self.kind not in ("lane", "periodic") and self.lane != MIDDLE:
            raise UserError(
                f"placement {self.kind}, a lane at {self.lane:g}: lane and periodic have one, others none",
                USAGE,
            )
        if not 0 <= self.lane <= 1:
            raise UserError(f"lane {self.lane:g}: it is a share of the width, 0 to 1", USAGE)
        if (self.kind == "periodic") != (self.pitch_px > 0):
            raise UserError(
                f"placement {self.kind} with a pitch of {self.pitch_px} px: periodic needs one, others none",
                USAGE,
            )

    def weights(self, across: NDArray[np.float64]) -> NDArray[np.float64]:
        """Density at shares of the strip's width, up to a factor: (n,)."""
        if self.kind == "edges":
            return np.exp(-np.minimum(across, 1 - across).clip(0) / EDGE_SHARE)
        if self.kind in ("lane", "periodic"):
            return np.exp(-0.5 * ((across - self.lane) / LANE_SHARE) ** 2)
        return np.ones_like(across)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def gray_around(mark: Mark) -> float:
    """The median gray of what a mark carries of its surroundings: steel of one line is alike."""
    around = mark.own & ~mark.inside
    return float(np.median(mark.image[around])) if around.any() else 0.5


def find_place(
    mark: Mark,
    taken: Bools,
    rng: np.random.Generator,
    density: Density | None = None,
    at: tuple[int, int, int] | None = None,
) -> tuple[int, int] | None:
    """First line and column of a free place on a canvas whose px (H, W) are partly `taken`; None without one.

    No px of the mark or of its ring lies on what is taken. A mark that the border of its scene had cut off
    goes to that border again, and may then be longer than the canvas. at: line and column of the canvas on
    the strip and the strip's width, px; by default the canvas is the strip.
    """
    density = density or Density()
    spans = []
    for axis, (size, room) in enumerate(zip(mark.inside.shape, taken.shape, strict=True)):
        first, last = mark.cut[2 * axis], mark.cut[2 * axis + 1]
        free = room - size
        if first and last:
            spans.append((min(0, free), max(0, free)))
        elif first or last:
            spans.append((0, 0) if first else (free, free))
        elif free < 0:
            return None
        else:
            spans.append((0, free))
    y0, x0, strip_width = at or (0, 0, taken.shape[1])
    ys = rng.integers(spans[0][0], spans[0][1] + 1, size=TRIES)
    xs = rng.integers(spans[1][0], spans[1][1] + 1, size=TRIES)
    if density.kind == "periodic":  # the first line of the strip that is a whole pitch below
        ys = ys - (y0 + ys) % density.pitch_px
        inside = ys >= spans[0][0]
        ys, xs = ys[inside], xs[inside]
    if not len(ys):
        return None
    weights = density.weights((x0 + xs + mark.inside.shape[1] / 2) / strip_width)
    near = ndimage.distance_transform_edt(~mark.inside) <= RING
    # The largest u ** (1 / w) first: a draw without replacement by weight (Efraimidis & Spirakis 2006).
    for number in np.argsort(np.log(rng.random(len(ys)).clip(1e-300)) / weights.clip(1e-12))[::-1]:
        y, x = int(ys[number]), int(xs[number])
        canvas, own = _overlap((y, x), mark.inside.shape, taken.shape)
        if (taken[canvas] & near[own]).any() or not mark.inside[own].any():
            continue
        return y, x
    return None


def _overlap(
    place: tuple[int, int], size: tuple[int, ...], canvas: tuple[int, ...]
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """What of a mark lies on the canvas: the window on the canvas, and on the mark."""
    windows = []
    for start, side, room in zip(place, size, canvas, strict=True):
        a, b = max(0, start), min(room, start + side)
        windows.append((slice(a, max(a, b)), slice(a - start, max(a, b) - start)))
    (ys, own_ys), (xs, own_xs) = windows
    return (ys, xs), (own_ys, own_xs)


def pasted(image: Plane, mark: Mark, place: tuple[int, int], *, poisson: bool = False) -> tuple[Plane, Bools]:
    """The mark on a canvas (H, W) at line and column `place`: the new canvas, and the mark's px on it."""
    canvas, own = _overlap(place, mark.inside.shape, image.shape)
    inside: Bools = np.zeros(image.shape, dtype=np.bool_)
    out = image.copy()
    if mark.inside[own].any():
        under, inside_here = image[canvas], mark.inside[own]
        if poisson:
            drawn = by_gradients(under, mark.image[own], mark.own[own], inside_here)
        else:
            drawn = blended(under[None], mark.image[own][None], mark.own[own], inside_here)[0][0]
        out[canvas] = drawn.clip(0, 1)
        inside[canvas] = inside_here
    return out, inside


def by_gradients(under: Plane, image: Plane, own: Bools, inside: Bools) -> Plane:
    """The mark by its gradients, with the steel's gray at the outline: (h, w).

    Perez et al. 2003, doi:10.1145/882262.882269, eq. 7: the Laplacian of the result is that of `image` on the
    mark and half of its ring, beyond which the result is `under`. Solved exactly as a sparse system.
    """
    region = (ndimage.distance_transform_edt(~inside) <= RING / 2) & own
    ids = np.full(region.shape, -1)
    ids[region] = np.arange(region.sum())
    rows, columns, known = [], [], np.zeros(int(region.sum()))
    degree = np.zeros(len(known))
    for axis, step in ((0, 1), (0, -1), (1, 1), (1, -1)):
        moved = [np.roll(plane, step, axis=axis) for plane in (ids, image, under)]
        edge = np.ones(region.shape, dtype=bool)  # no neighbour beyond the border
        border: list[slice | int] = [slice(None), slice(None)]
        border[axis] = 0 if step == 1 else -1
        edge[tuple(border)] = False
        at = region & edge
        here = ids[at]
        np.add.at(degree, here, 1.0)
        np.add.at(known, here, image[at] - moved[1][at])
        inner = moved[0][at] >= 0
        rows.append(here[inner])
        columns.append(moved[0][at][inner])
        np.add.at(known, here[~inner], moved[2][at][~inner])
    out = under.copy()
    if (region.all() and len(known)) or not len(known):
        return np.where(inside, image, under).astype(np.float32)  # no steel around it that could hold it
    across, down = np.concatenate(rows), np.concatenate(columns)
    laplacian = sparse.csr_matrix((-np.ones(len(across)), (across, down)), shape=(len(known),) * 2)
    out[region] = spsolve(laplacian + sparse.diags(degree), known)
    return out
