"""Steel that synthetic defects are put on: scenes of labelled data, clean images, or windows of rolls."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, IMAGE_SUFFIXES, open_labels, read_gray
from rollsight.inspect.rolls import Roll, open_roll
from rollsight.synth.data_card import PROVENANCE, groups_in, open_provenance
from rollsight.synth.ground import read_ground
from rollsight.synth.patches import PixelMm, Scene, mm_of, read_scenes, refuse_held

WINDOW_PX = 256  # side of a window of a roll, and of a larger image
DARK = 0.05  # of white: darker px are no steel
LEAST_WHITE = 0.1  # of white: where no px is brighter, 8 bits have too few gray levels for it
MOST_LOST = 0.5  # of a window: dark, beside the strip, or not inspected
ROLL_WINDOWS = 40  # of each roll that a fit sees
TRIES = 50  # windows of a roll looked at before it is given up


@dataclass(frozen=True, slots=True)
class Steel:
    """One canvas for a sample."""

    image: NDArray[np.float32]  # (H, W) in [0, 1]
    mask: NDArray[np.uint8]  # (H, W) what is on it already, in the data's classes; 255 nobody knows
    name: str
    group: str
    y: int  # first line and column of the canvas in the image or roll
    x: int
    width: int  # of the whole image or roll, px
    mm: PixelMm | None = None  # of a px, where it is known


@dataclass(frozen=True, slots=True)
class Backgrounds:
    """All the steel there is; which canvas a sample gets is drawn from its own generator."""

    scenes: list[Scene] = field(default_factory=list)
    rolls: list[Roll] = field(default_factory=list)
    classes: tuple[str, ...] = ()  # of the masks
    own: list[Scene] = field(default_factory=list)  # that the marks are of: the same steel
    own_share: float = 0.0  # of the samples that are made on these
    masks: Mapping[str, str | None] = field(default_factory=dict)  # roll id -> what tells its clean steel

    def __len__(self) -> int:
        return len(self.scenes) + len(self.rolls)

    def clean_scenes(self) -> list[Scene]:
        """The scenes, and of each roll some windows drawn with a fixed seed: for a fit."""
        windows = []
        for roll in self.rolls:
            rng = np.random.default_rng(0)
            for number in range(ROLL_WINDOWS):
                steel = self._window(roll, rng)
                name = f"{roll.roll_id}/{number}"
                windows.append(Scene(steel.image, steel.mask, name, roll.roll_id, steel.mm))
        return [*self.scenes, *windows]

    def for_sample(self, rng: np.random.Generator) -> "Backgrounds":
        """The steel that one sample is made on: the marks' own, or all other."""
        if not self.own:
            return self
        if rng.random() < self.own_share:
            return Backgrounds(self.own, [], self.classes)
        return replace(self, own=[], own_share=0.0)

    def draw(self, rng: np.random.Generator) -> Steel:
        """A canvas: a whole image up to 256 px, else a window; every image and roll is as likely."""
        number = int(rng.integers(len(self)))
        if number < len(self.scenes):
            scene = self.scenes[number]
            height, width = scene.mask.shape
            y = int(rng.integers(max(0, height - WINDOW_PX) + 1))
            x = int(rng.integers(max(0, width - WINDOW_PX) + 1))
            window = (slice(y, y + WINDOW_PX), slice(x, x + WINDOW_PX))
            return Steel(
                scene.image[window], scene.mask[window], scene.name, scene.group, y, x, width, scene.mm
            )
        return self._window(self.rolls[number - len(self.scenes)], rng)

    def _window(self, roll: Roll, rng: np.random.Generator) -> Steel:
        label = roll_label(roll, self.masks)
        for _ in range(TRIES):
            y = int(rng.integers(max(0, roll.lines - WINDOW_PX) + 1))
            x = int(rng.integers(max(0, roll.width - WINDOW_PX) + 1))
            ground = read_ground(roll, None, y, min(y + WINDOW_PX, roll.lines))
            window = (slice(y - ground.y0, y - ground.y0 + WINDOW_PX), slice(x, x + WINDOW_PX))
            image = ground.image[window]
            mask = np.where(ground.free[window] & (image >= DARK), 0, IGNORE).astype(np.uint8)
            if label is not None:
                truth = roll.read_label(label, y, y + len(image))[:, x : x + WINDOW_PX]
                if ((truth > 0) & (truth != IGNORE)).any():
                    continue  # its classes may be others: only its clean steel is taken
                mask[truth == IGNORE] = IGNORE
            if (mask == IGNORE).mean() <= MOST_LOST:
                return Steel(image, mask, roll.roll_id, roll.roll_id, y, x, roll.width, mm_of(roll))
        raise UserError(
            f"roll {roll.roll_id}: no clean window of {WINDOW_PX} px in {TRIES}: give another one"
        )


def roll_label(roll: Roll, masks: Mapping[str, str | None] | None = None) -> str | None:
    """The class mask beside a roll that tells what of it is clean: `truth`, else the last; None without.

    masks: of a set that was made before, by roll id: the same again, though scans have left others since.
    """
    names = roll.label_names()
    if masks is not None and roll.roll_id in masks:
        known = masks[roll.roll_id]
        if known is not None and known not in names:
            raise UserError(
                f"roll {roll.roll_id}: its mask {known}, by which its steel was chosen, is gone: what was "
                "made on it can't be made again"
            )
        return known
    return ("truth" if "truth" in names else names[-1]) if names else None


def check_one_mode(roll: Roll) -> None:
    """UserError where a roll has several lighting modes."""
    if roll.modes != 1:
        raise UserError(
            f"roll {roll.roll_id} has {roll.modes} lighting modes ({', '.join(roll.strip.lighting)}): "
            "synthetic defects are made in one",
            USAGE,
        )


def groups_of(roll: Roll) -> set[str]:
    """The groups that a roll's steel and defects are of: its own, and those a synthetic one is made of."""
    return {roll.roll_id} | groups_in(made_lines(roll))


def made_lines(roll: Roll) -> list[dict[str, Any]]:
    """The provenance of the synthetic defects on a roll; [] where it has none."""
    if not isinstance(roll.location, Path) or not (roll.location / PROVENANCE).is_file():
        return []
    return open_provenance(roll.location, "roll")


def open_backgrounds(
    paths: Sequence[Path],
    classes: tuple[str, ...],
    held: Sequence[str],
    mm: PixelMm | None = None,
    masks: Mapping[str, str | None] | None = None,
) -> Backgrounds:
    """What lies at the paths: labelled data (its train split), a folder of clean images, rolls.

    classes: the data's, which labelled backgrounds must have as well. held: groups of val and test, of which
    nothing may be used. A folder of images without `classes.json` is clean by the word of who gives it; the
    group of an image is its sub-folder, else the image itself. A folder within labelled data, with such data
    in it, or with Labelme files beside its images, is not clean: it is refused.
    mm: the size of a px of image files, where it is known. masks: as `roll_label` has them. UserError where
    there is no background at all.
    """
    scenes: list[Scene] = []
    rolls: list[Roll] = []
    for path in paths:
        if path.suffix == ".zarr":
            rolls.append(open_roll(path))
        elif found := sorted(path.glob("[!.]*.zarr")):
            rolls += [open_roll(one) for one in found]
        elif (path / "classes.json").is_file():
            data = open_labels(path).of_split("train")
            if data.classes != classes:
                raise UserError(
                    f"{path}: labels {', '.join(data.classes)}, the generator's data {', '.join(classes)}: "
                    "backgrounds with labels need the same classes in the same order"
                )
            scenes += read_scenes(data, mm)
        else:
            scenes += _clean_images(path, mm)
    if mm is not None and rolls and not scenes:
        raise UserError(
            "--mm-per-px-x and --mm-per-line are for images: a roll says itself how large its px are", USAGE
        )
    if scenes and (white := max(float(scene.image.max()) for scene in scenes)) < LEAST_WHITE:
        raise UserError(
            f"backgrounds: the brightest px is {white:.1%} of white, as of 12 bits in files of 16: made "
            "images have 8 bits, of which few would be left: stretch the images, and the labels' alike",
            USAGE,
        )
    groups = {scene.group for scene in scenes}
    for roll in rolls:
        check_one_mode(roll)
        groups |= groups_of(roll)
    refuse_held(groups, held, "backgrounds")
    if not scenes and not rolls:
        where = ", ".join(str(path) for path in paths) or "none given"
        raise UserError(
            f"no backgrounds ({where}): give --backgrounds: a folder of clean images, labelled data, a roll",
            USAGE,
        )
    return Backgrounds(
        scenes, rolls, classes, masks={roll.roll_id: roll_label(roll, masks) for roll in rolls}
    )


def _clean_images(root: Path, mm: PixelMm | None) -> list[Scene]:
    if not root.is_dir():
        raise UserError(
            f"{root}: no such folder of backgrounds: give a folder of clean images, labelled data, or the "
            "path of a roll, such as plant/rolls/coil-1.zarr"
        )
    for above in root.resolve().parents:
        if (above / "classes.json").is_file():
            raise UserError(
                f"{root} lies in the labelled data {above}, whose defects are on its images: give that "
                "folder, of which the train split is taken",
                USAGE,
            )
    paths = sorted(root.rglob("*"))
    for path in paths:
        if path.name == "classes.json" or (path.name == "masks" and path.is_dir()):
            raise UserError(
                f"{root} holds labelled data ({path.parent}), whose defects are on its images: give that "
                "folder, of which the train split is taken",
                USAGE,
            )
    scenes = []
    for path in (path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES):
        if path.with_suffix(".json").is_file():
            raise UserError(
                f"{path} has a label file beside it: backgrounds are clean images, or labelled data, which "
                "`inspect labels import` makes of such a folder",
                USAGE,
            )
        image = read_gray(path)
        name = path.relative_to(root)
        group = name.parent.as_posix() if len(name.parts) > 1 else name.stem
        scenes.append(Scene(image, np.zeros(image.shape, dtype=np.uint8), name.as_posix(), group, mm))
    return scenes
