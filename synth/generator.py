"""The generator file: the editor's weights, the marks it works on, a card that says where they come from."""

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from rollsight.inspect.checkpoints import CURVE, save_tensors
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labelled_folder import whole_folder
from rollsight.synth.adversarial import read_state
from rollsight.synth.fit_recipe import FitRecipe, check_fit_recipe
from rollsight.synth.gan import LATENT, Editor, Widths, contrast, limited, one_thread
from rollsight.synth.mask_bank import Mark, MaskBank
from rollsight.synth.mask_gan import OutlineNet, Outlines
from torch import Tensor

WEIGHTS = "generator.safetensors"  # editor and discriminator: the latter is needed to fine-tune
MARKS = "marks.safetensors"
OUTLINES = "outlines.safetensors"  # the mask GAN's generator, where one was fitted
CARD = "card.json"
FITTING = "fitting"  # folder of a generator with what its fit was
KEEP = 0.6  # of a paste's contrast that an edit keeps at least
METHODS = ("gan", "paste", "poisson", "degraded")  # the last: the starts of a *free* fit as they are


class GeneratorCard(BaseModel):
    """What a generator is and what it was made of."""

    model_config = ConfigDict(extra="forbid")

    name: str
    defect_class: str
    classes: tuple[str, ...]  # learned, in the order of the nets
    data_classes: tuple[str, ...]  # of the labelled data, by mask value
    recipe: dict[str, Any]
    weights: str  # SHA-256
    marks: str  # SHA-256
    outlines: dict[str, Any] = {}  # of the mask GAN: `weights` SHA-256 and figures, or `why` there is none
    fitted_on: dict[str, Any]  # `labels.describe` of the data, without its val and test
    held_groups: tuple[str, ...]  # of val and test: nothing may be made of them
    scenes: int  # that hold the class
    components: int  # of the class
    fit: dict[str, float]  # the last figures of the controller
    begun_from: str = ""  # hash of the generator it was fine-tuned from
    code_version: str
    created_at: str


@dataclass(frozen=True, slots=True)
class Generator:
    """A generator as it is used."""

    folder: Path
    card: GeneratorCard
    editor: Editor
    bank: MaskBank

    @property
    def hash(self) -> str:
        """What decides its samples: weights, marks, recipe and, where there is one, the mask GAN."""
        told = [self.card.weights, self.card.marks, self.card.recipe]
        if self.bank.outlines is not None:
            told.append(self.card.outlines["weights"])
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()

    def edit(
        self, start: NDArray[np.float32], masks: Sequence[NDArray[np.bool_]], rng: np.random.Generator
    ) -> NDArray[np.float32]:
        """The paste (H, W) as the editor makes it; nothing outside the gates of its marks changes.

        masks: the px of each mark. An edit that would take more than 40 % of a mark's contrast is drawn back.
        One sample at a time on one thread, so it is the same bits whatever else is made with it.
        """
        recipe = self.card.recipe
        image = torch.from_numpy(np.ascontiguousarray(start, dtype=np.float32))[None, None]
        height, width = start.shape
        stride = self.editor.stride
        pad = (0, -width % stride, 0, -height % stride)
        every = torch.from_numpy(np.logical_or.reduce(list(masks)).astype(np.float32))[None, None]
        size = (height + pad[3], width + pad[1])
        noise = torch.from_numpy(rng.standard_normal(size, dtype=np.float32))[None, None]
        latent = torch.from_numpy(rng.standard_normal((1, LATENT), dtype=np.float32))
        index = torch.tensor([self.card.classes.index(self.card.defect_class)])
        with torch.inference_mode(), one_thread():
            padded = torch.nn.functional.pad(image, pad, mode="replicate")
            mask = torch.nn.functional.pad(every, pad)
            edited = self.editor(padded, mask, noise, latent, index)[..., :height, :width]
            if not recipe["whole"] and recipe["contrast_weight"] > 0:
                edited = _each_limited(image, edited, masks)
        out: NDArray[np.float32] = edited[0, 0].numpy()
        return out


def _each_limited(start: Tensor, edited: Tensor, masks: Sequence[NDArray[np.bool_]]) -> Tensor:
    """The edit, drawn back mark by mark where one loses too much contrast; marks do not touch each other."""
    out = edited
    for inside in masks:
        mask = torch.from_numpy(inside.astype(np.float32))[None, None]
        held = limited(start, edited, mask, KEEP)
        reach = torch.nn.functional.max_pool2d(mask, 13, stride=1, padding=6) > 0
        out = torch.where(reach, held, out)
    return out


def kept_contrast(start: NDArray[np.float32], made: NDArray[np.float32], inside: NDArray[np.bool_]) -> float:
    """Contrast of a mark after over before, 1 where it had none; 0 or below where it is gone or inverted."""
    planes = [
        torch.from_numpy(np.ascontiguousarray(plane, dtype=np.float32))[None, None] for plane in (start, made)
    ]
    mask = torch.from_numpy(inside.astype(np.float32))[None, None]
    before, after = (float(contrast(plane, mask)) for plane in planes)
    return after / before if abs(before) > 1e-6 else 1.0


def save_generator(
    folder: Path,
    state: Path,
    marks: Sequence[Mark],
    card: dict[str, Any],
    run: Path | None = None,
    outlines: Outlines | None = None,
) -> Generator:
    """Write the generator `folder` from a fit's state: all of it or nothing; UserError where it exists.

    card: all that the files themselves do not decide.
    Of the fit's folder `run` the curve and the sheets of samples are kept as `fitting/`; it is then removed.
    """
    parts, _ = read_state(state)
    with whole_folder(folder) as staging:
        weights = {f"{part}/{key}": t for part in ("average", "judge") for key, t in parts[part].items()}
        save_tensors(staging / WEIGHTS, weights, {})
        _save_marks(staging / MARKS, marks)
        if outlines is not None:
            sides = json.dumps(outlines.sides)
            net = {f"net/{key}": t for key, t in outlines.net.state_dict().items()}
            save_tensors(staging / OUTLINES, net, {"sides": sides})
            card = {**card, "outlines": {**card["outlines"], "weights": sha(staging / OUTLINES)}}
        told = GeneratorCard(**card, weights=sha(staging / WEIGHTS), marks=sha(staging / MARKS))
        (staging / CARD).write_text(told.model_dump_json(indent=1) + "\n", encoding="utf-8")
        if run is not None:
            keep_fitting(run, staging)
    if run is not None:
        shutil.rmtree(run)
    return open_generator(folder)


def keep_fitting(run: Path, folder: Path) -> None:
    """Put the curve and the sheets of samples of a fit's folder into `fitting/` of another."""
    (folder / FITTING).mkdir()
    for path in (*run.glob("*.png"), run / CURVE):
        shutil.copyfile(path, folder / FITTING / path.name)


def unfinished(folder: Path) -> Path:
    """Where the fit of a generator lies until it is complete."""
    return folder.with_name(f".{folder.name}.fit")


def open_generator(folder: Path) -> Generator:
    """The generator in a folder; UserError where it is none, damaged, or its files do not belong together."""
    if not (folder / CARD).is_file():
        if unfinished(folder).is_dir():
            raise UserError(
                f"{folder}: its fit was interrupted: the same `inspect synth fit` goes on with it"
            )
        raise UserError(f"{folder}: no generator: make one with `inspect synth fit`")
    text = (folder / CARD).read_text(encoding="utf-8")
    try:
        if "trained_on" in json.loads(text):
            raise UserError(
                f"{folder}: a generic generator has no marks to make samples of: fit a class from it, "
                f"`inspect synth fit CLASS --init {folder.name}`",
                USAGE,
            )
        card = GeneratorCard.model_validate_json(text)
        recipe = recipe_of(card.recipe)
        check_fit_recipe(recipe)
    except (ValidationError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{folder / CARD}: not the card of a generator: {str(error).splitlines()[0]}"
        ) from None
    files = [(WEIGHTS, card.weights), (MARKS, card.marks)]
    if "weights" in card.outlines:
        files.append((OUTLINES, str(card.outlines["weights"])))
    for name, known in files:
        if not (folder / name).is_file() or sha(folder / name) != known:
            raise UserError(
                f"{folder / name}: missing or not the file its card names: fit the generator again"
            )
    editor = read_editor(folder / WEIGHTS, len(card.classes), recipe)
    outlines = _read_outlines(folder / OUTLINES) if "weights" in card.outlines else None
    bank = MaskBank(_read_marks(folder / MARKS), card.defect_class, outlines)
    return Generator(folder, card, editor, bank)


def read_editor(path: Path, classes: int, recipe: FitRecipe) -> Editor:
    """The averaged editor in a file of weights; UserError where it is damaged or not of that recipe."""
    parts, _ = read_state(path)
    editor = Editor(classes, Widths(recipe.editor, recipe.judge), recipe.whole)
    try:
        editor.load_state_dict(parts["average"])
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path}: not the weights of its card ({error})"[:200]) from None
    return editor.eval()


def recipe_of(told: dict[str, Any]) -> FitRecipe:
    """The recipe as a card has it, with tuples where JSON has lists."""
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in told.items()
    }
    return FitRecipe(**fields)


def recipe_json(recipe: FitRecipe) -> dict[str, Any]:
    """The recipe as it stands on a card."""
    told: dict[str, Any] = json.loads(json.dumps(asdict(recipe)))
    return told


def _save_marks(path: Path, marks: Sequence[Mark]) -> None:
    tensors, told = {}, []
    for number, mark in enumerate(marks):
        tensors[f"{number}/image"] = torch.from_numpy(np.ascontiguousarray(mark.image))
        tensors[f"{number}/inside"] = torch.from_numpy(np.ascontiguousarray(mark.inside))
        tensors[f"{number}/own"] = torch.from_numpy(np.ascontiguousarray(mark.own))
        told.append(
            {
                "defect_class": mark.defect_class,
                "source": mark.source,
                "group": mark.group,
                "origin": mark.origin,
                "cut": mark.cut,
                "mm": mark.mm,
            }
        )
    save_tensors(path, tensors, {"marks": json.dumps(told)})


def _read_marks(path: Path) -> list[Mark]:
    parts, told = read_state(path)
    try:
        return [
            Mark(
                parts[str(number)]["image"].numpy(),
                parts[str(number)]["inside"].numpy(),
                parts[str(number)]["own"].numpy(),
                one["defect_class"],
                one["source"],
                one["group"],
                (int(one["origin"][0]), int(one["origin"][1])),
                (bool(one["cut"][0]), bool(one["cut"][1]), bool(one["cut"][2]), bool(one["cut"][3])),
                None if one.get("mm") is None else (float(one["mm"][0]), float(one["mm"][1])),
            )
            for number, one in enumerate(json.loads(told["marks"]))
        ]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not the marks of a generator ({error!r})"[:200]) from None


def _read_outlines(path: Path) -> Outlines:
    parts, told = read_state(path)
    net = OutlineNet()
    try:
        net.load_state_dict(parts["net"])
        height, width = json.loads(told["sides"])
        sides = ((float(height[0]), float(height[1])), (float(width[0]), float(width[1])))
    except (RuntimeError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"{path}: not the outlines of a generator ({error})"[:200]) from None
    return Outlines(net, sides)


def sha(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
