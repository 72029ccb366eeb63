"""A class made rare: which scenes of the train split teach it, draw by draw."""

import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, LabelledData, Sample
from rollsight.synth.patches import class_value


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


def rarity(
    data: LabelledData, defect_class: str, on_image: Callable[[int, int], None] | None = None
) -> Rarity:
    """Look at every mask of the train split; UserError for an unknown class, or one that no scene holds."""
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
