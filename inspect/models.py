"""The model file: a folder with weights, the ONNX graph made from them, and a card that says what it is."""

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from rollsight.inspect.errors import CONFIG, UserError
from rollsight.inspect.golden import GOLDEN, write_golden
from rollsight.inspect.promoted import Step, read_pointer
from rollsight.inspect.tensor_errors import tensor_errors
from rollsight.inspect.tiles import CELL

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

DEFAULT = Path(__file__).parent / "default_model"
SHIPPED = {"default": DEFAULT, "fast": Path(__file__).parent / "fast_model"}  # what the package brings
WEIGHTS, GRAPH, CARD, README = "weights.safetensors", "model.onnx", "card.json", "README.md"
MAX_CARD_BYTES = 4 << 20
MAX_WEIGHT_BYTES = 1 << 30


class Card(BaseModel):
    """What a model file says of itself; read from untrusted JSON, so every field is checked."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    net: str
    net_options: dict[str, str] = {}
    classes: tuple[str, ...] = Field(min_length=1, max_length=254)
    thresholds: dict[str, float]  # probability per class, in (0, 1)
    thresholds_basis: str  # on what they were fitted, or that they were not
    temperature: float = Field(1.0, gt=0, le=100)  # probabilities are the softmax of logits / temperature
    budget: float | None = Field(None, gt=0)  # false alarms per Mpx that the thresholds were fitted to
    calibrated_on: dict[str, Any] = {}  # as an entry of trained_on, and the figures of the fit
    halo_px: int = Field(ge=0, le=4096)
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    graph_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    golden_sha256: str = Field("", pattern=r"^([0-9a-f]{64})?$")  # empty: the model has no golden windows
    precision: Literal["fp32", "int8"] = "fp32"  # of the graph; the weights are always fp32
    compressed: dict[str, Any] = {}  # from what, how, sizes, and what the gate found; empty: it was not
    trained_on: list[dict[str, Any]] = []  # source, split, images, groups, digest
    recipe: dict[str, Any] = {}
    metrics: list[dict[str, Any]] = []  # data, split, figures with intervals
    code_version: str = ""
    created_at: str = ""
    notes: list[str] = []

    @model_validator(mode="after")
    def _consistent(self) -> "Card":
        if len(set(self.classes)) != len(self.classes):
            raise ValueError("classes: a name stands twice")
        if set(self.thresholds) != set(self.classes):
            raise ValueError("thresholds: needs one per class")
        if not all(0 < t < 1 for t in self.thresholds.values()):
            raise ValueError("thresholds: each is a probability between 0 and 1")
        if self.halo_px % CELL:
            raise ValueError(f"halo_px is {self.halo_px}: it must be a multiple of the {CELL} px cell")
        return self

    def groups(self) -> set[str]:
        """The groups that the model was trained on: figures on them say nothing."""
        return {group for source in self.trained_on for group in source.get("group_names", ())}


@dataclass(frozen=True, slots=True)
class Model:
    """A model file that was opened and found whole."""

    folder: Path
    card: Card

    @property
    def hash(self) -> str:
        """What identifies the model in a plan: its weights, net, classes; hex."""
        parts = [
            self.card.weights_sha256,
            self.card.graph_sha256,
            self.card.net,
            json.dumps(self.card.net_options, sort_keys=True),
        ]
        return hashlib.sha256("\n".join([*parts, *self.card.classes]).encode()).hexdigest()

    @property
    def thresholds(self) -> tuple[float, ...]:
        """The threshold of each class, in the order of `card.classes`."""
        return tuple(self.card.thresholds[name] for name in self.card.classes)

    @property
    def graph(self) -> Path:
        return self.folder / GRAPH

    def net(self) -> "nn.Module":
        """The net in torch with its weights, in eval mode.

        Raises UserError where the halo on the card is not the one the net's graph asks for.
        """
        from rollsight.inspect.nets.reach import halo_px
        from rollsight.inspect.nets.widths import take_widths
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        net = _build(self.card)
        try:
            weights = load_file(self.folder / WEIGHTS)
            take_widths(net, weights)
            net.load_state_dict(weights)
        except (RuntimeError, SafetensorError) as error:
            reason = str(error)[:300]  # torch names every tensor that does not fit
            raise UserError(
                f"{self.folder / WEIGHTS}: not the weights of {self.card.net}: {reason}"
            ) from None
        halo, needed = self.card.halo_px, halo_px(net)
        if halo < needed:
            raise UserError(
                f"{self.folder / CARD}: halo_px is {halo}, the net sees {needed} px: it must be that"
            )
        return net.eval()


def open_model(name: str, models: Path) -> Model:
    """The model `name`: `default` is the promoted or shipped one, else a folder under `models`, a shipped
    model, or a path.

    Raises UserError where there is none, or where weights or card are damaged; 78 where the promoted model is
    gone or no longer the one that was promoted.
    """
    if name == "default" and (step := read_pointer(models).now) is not None and step.model is not None:
        return _promoted(step, models)
    places = [DEFAULT] if name == "default" else [models / name, SHIPPED.get(name, Path(name))]
    folder = next((place for place in places if (place / CARD).is_file()), None)
    if folder is None:
        raise UserError(
            f"no model {name!r}: there are {', '.join(model_names(models))}, or give a model's folder"
        )
    card = _read_card(folder / CARD)
    for file, expected in (
        (WEIGHTS, card.weights_sha256),
        (GRAPH, card.graph_sha256),
        (GOLDEN, card.golden_sha256),
    ):
        if file == GOLDEN and not expected:
            continue
        path = folder / file
        if not path.is_file() or path.stat().st_size > MAX_WEIGHT_BYTES or sha256_of(path) != expected:
            raise UserError(
                f"{path}: missing or not the file that {CARD} names: fetch or train the model again"
            )
    return Model(folder, card)


def model_names(models: Path) -> list[str]:
    """Every model that can be named: those shipped first, then those of the plant by name."""
    own = {path.parent.name for path in models.glob(f"[!.]*/{CARD}")}
    return [*SHIPPED, *sorted(own - set(SHIPPED))]


def is_shipped(model: Model) -> bool:
    """Whether the model is the package's own, by whatever name or path it was opened."""
    return model.folder.resolve() in {folder.resolve() for folder in SHIPPED.values()}


def decides(card: Card) -> str:
    """SHA-256 of what decides classes beside weights and graph: thresholds and temperature."""
    told = [sorted(card.thresholds.items()), card.temperature]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _promoted(step: Step, models: Path) -> Model:
    """The model of a promotion, still the one that passed the gates."""
    way_out = "`inspect models rollback` returns to the one before"
    if not (models / str(step.model) / CARD).is_file():
        raise UserError(f"the promoted model {step.model!r} is not in {models}: {way_out}", CONFIG)
    model = open_model(str(step.model), models)
    if (model.hash, decides(model.card)) != (step.model_hash, step.decides):
        raise UserError(f"model {step.model!r} was changed after it was promoted: {way_out}", CONFIG)
    return model


def save_model(
    folder: Path, net: "nn.Module", card: dict[str, Any], golden: "NDArray[np.float32] | None" = None
) -> Model:
    """Write a model file whole or not at all; `card` lacks the hashes and the halo, which are made here.

    The ONNX graph is checked against the net on random windows before anything is put in place. `golden`,
    real windows (N, M, H, W), are kept with what the net says of them, so that every engine that opens the
    model can be held against it. A model already there is replaced. Raises UserError where `folder` holds
    something else, ValueError where the card is inconsistent or the net cannot be scanned in tiles.
    """
    from rollsight.inspect.export import export_onnx
    from rollsight.inspect.nets.reach import halo_px
    from safetensors.torch import save_file

    if folder.exists() and not (folder / CARD).is_file():
        raise UserError(f"{folder}: exists and is not a model: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    net = net.cpu().eval()
    halo = halo_px(net)
    staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with tensor_errors(staging / WEIGHTS):
            save_file({name: t.contiguous() for name, t in net.state_dict().items()}, staging / WEIGHTS)
        export_onnx(net, staging / GRAPH)
        if golden is not None:
            write_golden(staging, golden, lambda window: _logits(net, window))
        made_here = {
            "halo_px": halo,
            "weights_sha256": sha256_of(staging / WEIGHTS),
            "graph_sha256": sha256_of(staging / GRAPH),
            "golden_sha256": "" if golden is None else sha256_of(staging / GOLDEN),
        }
        whole = Card(**{**card, **made_here})
        _write_card(staging, whole)
        staging.chmod(0o755)
        for file in staging.iterdir():
            file.chmod(0o644)  # safetensors makes its files private
        _put_in_place(staging, folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return Model(folder, whole)


def _logits(net: "nn.Module", window: "NDArray[np.float32]") -> "NDArray[np.float32]":
    """What the net says of one window (M, H, W): (K + 1, H, W)."""
    import torch

    with torch.inference_mode():
        return net(torch.from_numpy(window)[None])[0].numpy()  # type: ignore[no-any-return]


def _put_in_place(staging: Path, folder: Path) -> None:
    """Rename `staging` to `folder`; a model there is moved aside first and removed last."""
    aside = staging.with_name(f"{staging.name}.old")
    replaced = folder.exists()
    if replaced:
        folder.rename(aside)
    try:
        staging.rename(folder)
    except BaseException:
        if replaced:
            aside.rename(folder)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def update_card(model: Model, **changes: Any) -> Model:
    """The model with fields of its card changed (metrics, thresholds); weights and graph stay."""
    card = Card(**{**model.card.model_dump(), **changes})
    _write_card(model.folder, card)
    return Model(model.folder, card)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _build(card: Card) -> "nn.Module":
    from rollsight.inspect.nets import NETS

    if card.net not in NETS:
        raise UserError(f"model {card.name!r} needs the net {card.net!r}: this version has {', '.join(NETS)}")
    try:
        return NETS[card.net](len(card.classes), **card.net_options)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"model {card.name!r}: net_options {card.net_options} do not fit {card.net}: {error}"
        ) from None


def _read_card(path: Path) -> Card:
    if path.stat().st_size > MAX_CARD_BYTES:
        raise UserError(f"{path}: {path.stat().st_size} bytes: a model card has at most {MAX_CARD_BYTES}")
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "card"
        raise UserError(f"{path}: not a model card: {where}: {first['msg']}") from None


def _write_card(folder: Path, card: Card) -> None:
    for name, text in ((README, _readme(card)), (CARD, card.model_dump_json(indent=1) + "\n")):
        temporary = folder / f".{name}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / name)


def _readme(card: Card) -> str:
    """The card for a reader: made from it, never edited."""
    lines = [f"# Model {card.name}", "", f"Net `{card.net}`, classes: {', '.join(card.classes)}.", ""]
    lines += [f"- {note}" for note in card.notes]
    lines += ["", "## Trained on", ""]
    for entry in card.trained_on:
        # A card that was written by hand may lack some, and a model that began from it inherits the entry.
        source, split, images, groups = (
            entry.get(key, "?") for key in ("source", "split", "images", "groups")
        )
        lines.append(f"- {source} ({split}): {images} images, {groups} groups")
    lines += ["", "## How it did", ""]
    for metric in card.metrics:
        lines += [f"### {metric['data']}, {metric['split']} ({metric['n_images']} images)", ""]
        lines += ["| figure | value | 95 % interval over groups |", "|---|---|---|"]
        for name, (value, low, high) in metric["figures"].items():
            lines.append(f"| {name} | {value:.3f} | {low:.3f} to {high:.3f} |")
        lines.append("")
    lines += ["## Thresholds", "", card.thresholds_basis, ""]
    lines += [f"- {name}: {t:g}" for name, t in card.thresholds.items()]
    if card.calibrated_on:
        source = card.calibrated_on
        lines += [
            "",
            f"Temperature of the probabilities: {card.temperature:.3g}. Data: {source['source']} "
            f"({source['split']}), {source['images']} images, {source['groups']} groups, "
            f"digest {source['digest'][:16]}.",
        ]
    lines += ["", "## Recipe", "", "```json", json.dumps(card.recipe, indent=1), "```", ""]
    lines += [f"Made {card.created_at}, code {card.code_version}, weights {card.weights_sha256[:16]}.", ""]
    return "\n".join(lines)
