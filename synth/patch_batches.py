"""Batches that an editor is fitted on: real patches, and pastes on clean steel of the same scenes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.synth.degraded import degraded
from rollsight.synth.mask_bank import TILT, Deformation, Mark, deform, marks_of, narrow
from rollsight.synth.patches import CleanPlaces, Scene, clean_places, patch_around
from rollsight.synth.placing import STEEL_CHOICE, gray_around, pasted
from torch import Tensor

HELD_SHARE = 0.2  # of a class's scenes whose real patches only measure overfitting
HELD_MOST = 8  # scenes
SPARE = 16  # px of a paste's patch beyond the patch, for its deformation
MOST_NARROW = 1000  # pastes in a row that are under 2 px wide, before a fit is given up
SCALING = 0.12  # of a paste, either way: SPARE covers it


@dataclass(frozen=True, slots=True)
class Batch:
    """What one step sees; sample i of all is of one class."""

    real: Tensor  # (N, 1, P, P) in [0, 1]
    real_mask: Tensor  # (N, 1, P, P) in {0, 1}
    start: Tensor  # (N, 1, P, P) the paste
    mask: Tensor  # (N, 1, P, P) of the paste
    classes: Tensor  # (N,) int64

    def to(self, device: torch.device) -> "Batch":
        return Batch(
            *(t.to(device) for t in (self.real, self.real_mask, self.start, self.mask, self.classes))
        )


@dataclass(frozen=True, slots=True)
class _Pool:
    """What one class has."""

    train: list[tuple[Scene, NDArray[np.int64]]]  # with the px (n, 2) of the class
    held: list[tuple[Scene, NDArray[np.int64]]]
    places: list[CleanPlaces]
    elsewhere: list[CleanPlaces]  # clean steel of scenes without it, where pastes shall lie on such
    value: int


class PatchSampler:
    """The batches of a fit, each drawn from (seed, step)."""

    def __init__(
        self,
        scenes: Sequence[Scene],
        data_classes: Sequence[str],
        classes: Sequence[str],
        *,
        rare: str,
        rare_share: float,
        size_px: int,
        batch: int,
        seed: int,
        elsewhere: float = 0.0,
        degraded: float = 0.0,
        backgrounds: Sequence[Scene] = (),
    ) -> None:
        """classes: those learned, names of `data_classes`; backgrounds: more clean steel.

        A paste lies on clean steel of scenes that hold its class, so that the discriminator cannot tell it
        by its light; where these have none, on that of other scenes, then of `backgrounds`. Of the class
        `rare` the share `elsewhere` lies on other scenes and `backgrounds`, whose gray is near. The share
        `degraded` of all pastes keeps outline and mean gray only. UserError where there is no clean steel.
        """
        self.classes, self.size, self.n, self.seed = tuple(classes), size_px, batch, seed
        self._elsewhere, self._degraded = elsewhere, degraded
        others = [name for name in classes if name != rare]
        share = rare_share if others else 1.0
        self._shares = np.array([share if name == rare else (1 - share) / len(others) for name in classes])
        everywhere = clean_places(scenes, size_px)
        spare = everywhere or clean_places(backgrounds, size_px)
        self._pools = []
        for name in classes:
            value = list(data_classes).index(name) + 1
            mine = [scene for scene in scenes if (scene.mask == value).any()]
            train, held = _hold_back(mine, seed)
            marks = (mark for scene in train for mark in marks_of([scene], data_classes))
            if not any(mark.defect_class == name for mark in marks):  # as a rule the first scene has one
                train = held = mine  # the only marks wide enough for a paste would have been held back
            names = {scene.name for scene in mine}
            places = [place for place in everywhere if place.scene.name in names] or spare
            if not places:
                raise UserError(
                    f"no clean window of {size_px} px in the labelled scenes or the backgrounds: give "
                    "--backgrounds, a folder of clean images or a roll",
                    USAGE,
                )
            beyond: list[CleanPlaces] = []
            if elsewhere and name == rare:
                beyond = [place for place in everywhere if place.scene.name not in names]
                beyond += clean_places(backgrounds, size_px)
            pixels = (_with_pixels(train, value), _with_pixels(held, value))
            self._pools.append(_Pool(*pixels, places, beyond, value))

    def batch(self, step: int) -> Batch:
        """The batch of a step, from 0."""
        rng = np.random.default_rng([self.seed, step])
        classes = rng.choice(len(self.classes), size=self.n, p=self._shares)
        parts = []
        for index in classes:
            pool = self._pools[index]
            scene, pixels = pool.train[rng.integers(len(pool.train))]
            parts.append((*self._real(scene, pixels, pool, rng), *self._paste(pool, rng)))
        return _stacked(parts, classes)

    def held(self, step: int) -> Batch:
        """Real patches held back from training, of the same classes as the step's batch; no pastes."""
        classes = np.random.default_rng([self.seed, step]).choice(
            len(self.classes), size=self.n, p=self._shares
        )
        rng = np.random.default_rng([self.seed, step, 1])
        parts = []
        for index in classes:
            pool = self._pools[index]
            scene, pixels = pool.held[rng.integers(len(pool.held))]
            patch = self._real(scene, pixels, pool, rng)
            parts.append((*patch, *patch))
        return _stacked(parts, classes)

    def _real(
        self, scene: Scene, pixels: NDArray[np.int64], pool: _Pool, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        image, mask = patch_around(scene, pixels, self.size, rng)
        return image, (mask == pool.value).astype(np.float32)

    def _paste(
        self, pool: _Pool, rng: np.random.Generator
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A real patch's defects, a little deformed, on clean steel; and their mask.

        All of a patch at once: where pastes had one mark and real patches several, the discriminator told
        them apart by the mask alone, and the editor learned nothing (looked at).
        """
        for _ in range(MOST_NARROW):
            scene, pixels = pool.train[rng.integers(len(pool.train))]
            image, mask = patch_around(scene, pixels, self.size + SPARE, rng)
            inside = mask == pool.value
            mark = Mark(image, inside, inside | (mask == 0), "", scene.name, scene.group, (0, 0), (True,) * 4)
            how = Deformation(
                bool(rng.integers(2)),
                bool(rng.integers(2)),
                float(rng.uniform(1 - SCALING, 1 + SCALING)),
                float(rng.uniform(1 - SCALING, 1 + SCALING)),
                float(rng.uniform(-TILT, TILT)),
                0.0,
                int(rng.integers(2**31)),
            )
            mark = deform(mark, how)
            place = self._place(pool, mark, rng)
            y, x = place.origins[rng.integers(len(place.origins))].tolist()
            steel = place.scene.image[y : y + self.size, x : x + self.size]
            corner = [(self.size - side) // 2 for side in mark.inside.shape]
            start, on_steel = pasted(steel, mark, (corner[0], corner[1]))
            if narrow(on_steel):
                continue
            if self._degraded and rng.random() < self._degraded:
                less = degraded(steel, start, on_steel, rng)
                start = start if less is None else less[0]
            return start, on_steel.astype(np.float32)
        raise UserError(
            f"{MOST_NARROW} pastes of mask value {pool.value}, none 2 px wide on a patch of {self.size} px: "
            "label its defects at least 2 px wide"
        )

    def _place(self, pool: _Pool, mark: Mark, rng: np.random.Generator) -> CleanPlaces:
        """The scene that a mark is pasted on."""
        if pool.elsewhere and rng.random() < self._elsewhere:
            home = gray_around(mark)
            looked_at = [pool.elsewhere[i] for i in rng.integers(len(pool.elsewhere), size=STEEL_CHOICE)]
            nearest: CleanPlaces = min(looked_at, key=lambda place: abs(place.gray - home))
            return nearest
        return pool.places[rng.integers(len(pool.places))]


def _hold_back(scenes: Sequence[Scene], seed: int) -> tuple[list[Scene], list[Scene]]:
    """Scenes that train and scenes that are held back, by group; a single group does both."""
    groups = sorted({scene.group for scene in scenes})
    order = np.random.default_rng([seed, 2]).permutation(len(groups)).tolist()
    count = min(HELD_MOST, max(1, round(HELD_SHARE * len(groups)))) if len(groups) > 1 else 0
    back = {groups[i] for i in order[:count]}
    train = [scene for scene in scenes if scene.group not in back]
    return train, [scene for scene in scenes if scene.group in back] or train


def _with_pixels(scenes: Sequence[Scene], value: int) -> list[tuple[Scene, NDArray[np.int64]]]:
    return [(scene, np.argwhere(scene.mask == value)) for scene in scenes]


def _stacked(parts: Sequence[Sequence[NDArray[np.float32]]], classes: NDArray[np.int64]) -> Batch:
    real, real_mask, start, mask = (
        torch.from_numpy(np.stack(plane))[:, None] for plane in zip(*parts, strict=True)
    )
    return Batch(real, real_mask, start, mask, torch.from_numpy(classes.astype(np.int64)))
