"""A class made rare: which scenes of the train split teach it, draw by draw."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import ANY_SPLIT, IGNORE, LabelledData, Sample
from rollsight.synth.patches import class_value


class Draws(Protocol):
    """What a proof learns from and is judged on, draw by draw."""

    @property
    def data(self) -> LabelledData:
        """All of it."""

    @property
    def defect_class(self) -> str:
        """The rare one."""

    def drawn(self, k: int | None, draw: int) -> tuple[LabelledData, LabelledData]:
        """Scenes without the class, and `k` scenes of it, None for all there are: of the train split."""

    def held(self, split: str, draw: int) -> LabelledData:
        """What the draw is judged on, of val or test."""


@dataclass(frozen=True, slots=True)
class Rarity:
    """The scenes of a train split by what they say of one class."""

    data: LabelledData  # all splits
    defect_class: str
    without: tuple[Sample, ...]  # train scenes without the class: they teach the others
    single: tuple[Sample, ...]  # train scenes with no other class
    several: tuple[Sample, ...]  # train scenes with the class and others

    def drawn(self, k: int | None, draw: int) -> tuple[LabelledData, LabelledData]:
        """The base data without the class, and `k` scenes of it: those of that draw, None for all there are.

        All but the k scenes that hold the class are left out: where scenes of several classes stayed, the
        class would be less rare than k says. UserError where there are fewer than k.
        """
        root, classes = self.data.root, self.data.classes
        base = LabelledData(root, classes, self.without)
        if k is None:
            return base, LabelledData(root, classes, (*self.single, *self.several))
        if not 0 < k <= len(self.single):
            raise UserError(
                f"{root}: {len(self.single)} train images hold {self.defect_class} alone, {k} were asked for",
                USAGE,
            )
        # zlib's, since Python's own hash of a text is another in each process
        rng = np.random.default_rng([zlib.crc32(self.defect_class.encode()), draw])
        chosen = rng.permutation(len(self.single))[:k]  # the first 5 of a draw are among its first 10
        return base, LabelledData(root, classes, tuple(self.single[i] for i in chosen))

    def held(self, split: str, draw: int) -> LabelledData:
        """The whole split, the same for all draws."""
        return self.data.of_split(split)


@dataclass(frozen=True, slots=True)
class PieceOut:
    """A class of few pieces (groups): draw i learns from all of them but the i-th, and is judged on that.

    Pieces are of all splits: that of the one left out is then "test", that of the others "train". With it
    stand the other pieces of the test split, for false alarms; those of train teach the other classes.
    """

    data: LabelledData  # all splits
    defect_class: str
    without: tuple[Sample, ...]  # train images of pieces without the class
    clean: tuple[Sample, ...]  # test images of such pieces
    pieces: tuple[tuple[Sample, ...], ...]  # images of each piece with the class

    def drawn(self, k: int | None, draw: int) -> tuple[LabelledData, LabelledData]:
        """UserError where a number of scenes is asked for: a draw has all of the other pieces."""
        if k is not None:
            raise UserError(f"{k} scenes with a piece left out: a draw has all of the others", USAGE)
        root, classes = self.data.root, self.data.classes
        others = [sample for i, piece in enumerate(self.pieces) if i != draw for sample in piece]
        rare = tuple(replace(sample, split="train") for sample in others)
        return LabelledData(root, classes, self.without), LabelledData(root, classes, rare)

    def held(self, split: str, draw: int) -> LabelledData:
        """UserError for another split than test: nothing is chosen on the piece."""
        if split != "test":
            raise UserError(f"split {split}: a piece that is left out is for the test alone", USAGE)
        piece = tuple(replace(sample, split="test") for sample in self.pieces[draw])
        return LabelledData(self.data.root, self.data.classes, (*piece, *self.clean))


def piece_out(data: LabelledData, defect_class: str) -> PieceOut:
    """Look at every mask; UserError for rolls, an unknown class, or one of fewer than two pieces."""
    _refuse_rolls(data)
    value = class_value(data.classes, defect_class, data.root)
    holding = {sample.group for sample in data.samples if (sample.read()[1] == value).any()}
    if len(holding) < 2:
        raise UserError(
            f"{data.root}: pieces that hold {defect_class}: {len(holding)}; to leave one out takes two", USAGE
        )
    others = [sample for sample in data.samples if sample.group not in holding]
    return PieceOut(
        data,
        defect_class,
        tuple(sample for sample in others if sample.split == "train"),
        tuple(sample for sample in others if sample.split == "test"),
        tuple(tuple(sample for sample in data.samples if sample.group == group) for group in sorted(holding)),
    )


def rarity(
    data: LabelledData, defect_class: str, on_image: Callable[[int, int], None] | None = None
) -> Rarity:
    """Look at every mask of the train split; UserError for rolls, an unknown class, or one no scene holds."""
    _refuse_rolls(data)
    value = class_value(data.classes, defect_class, data.root)
    parts: dict[str, list[Sample]] = {"without": [], "single": [], "several": []}
    samples = data.of_split("train").samples
    for number, sample in enumerate(samples, start=1):
        mask = sample.read()[1]
        held = set(np.unique(mask).tolist()) - {0, IGNORE}
        kind = "without" if value not in held else "single" if held == {value} else "several"
        parts[kind].append(sample)
        if on_image is not None:
            on_image(number, len(samples))
    if not parts["single"] and not parts["several"]:
        raise UserError(f"{data.root}: no train image holds {defect_class}: nothing to learn it from")
    if not parts["without"]:
        raise UserError(f"{data.root}: every train image holds {defect_class}: it is not rare", USAGE)
    return Rarity(data, defect_class, *(tuple(parts[kind]) for kind in ("without", "single", "several")))


def _refuse_rolls(data: LabelledData) -> None:
    """A tile of a roll is of any split: a net would be tested on what it learned from."""
    if any(sample.split == ANY_SPLIT for sample in data.samples):
        raise UserError(
            f"{data.root}: rolls have no test split: a proof needs labelled images with one (manifest.csv)",
            USAGE,
        )
