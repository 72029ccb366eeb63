"""Labelled data in, a model file out: AdamW, warm-up and cosine, EMA, checkpoints that resume bit by bit.

Every random choice of step n is drawn from (seed, n), so a run that was killed goes on as if it had
not been, without storing any generator's state.
"""

import contextlib
import csv
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rollsight.inspect import augment, losses
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import IGNORE, ImageFile, LabelledData
from rollsight.inspect.nets import NETS
from rollsight.inspect.tiles import CELL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

CHECKPOINT = "checkpoint.safetensors"
CURVE = "curve.csv"


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a model is trained; every field is on its card."""

    net: str = "unet_lite"
    attention: str = "cbam"
    steps: int = 2000
    batch: int = 16
    crop_px: int = 192  # a multiple of the cell
    mosaic: int = 2  # crops along each side of a training canvas (`_mosaics`)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    warmup: float = 0.05  # share of the steps
    ema_half_life: int = 100  # steps
    focal_gamma: float = losses.FOCAL_GAMMA  # 0: plain cross-entropy
    small_weight: float = 0.1  # of the small-object term, when fully ramped in
    small_ramp: float = 0.3  # share of the steps until it is
    frozen_norms: bool = False  # keep the statistics of the norms: for fine-tuning on mixed sources
    seed: int = 0
    init: str = ""  # hash of the model that the training began from, if it did from one


@dataclass(frozen=True, slots=True)
class _Source:
    """Samples of one source in memory, with its share of each batch."""

    images: list[NDArray[np.float16]]
    masks: list[NDArray[np.uint8]]  # in model classes
    weights: list[NDArray[np.float16]]
    labelled: NDArray[np.bool_]  # (K + 1,)
    share: float


def model_classes(data: Sequence[LabelledData]) -> tuple[str, ...]:
    """The classes of a model trained on several sources: their union, in order of appearance."""
    return tuple(dict.fromkeys(name for source in data for name in source.classes))


def train(
    data: Sequence[LabelledData],
    run: Path,
    recipe: Recipe,
    *,
    shares: Sequence[float] = (),
    exhaustive: Sequence[bool] = (),
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop_after: int | None = None,
    autocast: bool | None = None,
    init: tuple[nn.Module, Sequence[str]] | None = None,
) -> nn.Module:
    """Train on `data` (each already of one split) and return the averaged net.

    `run` is the folder of checkpoints and the curve: a run found there with the same recipe and data goes
    on where it stopped, another is refused. `shares` weighs the sources in each batch, equal by default.
    `exhaustive` says for each source whether its background is free of the classes that it does not label
    too; by default it is not, and they count as background there (`losses.merge_unlabelled`).
    `stop_after` ends the run at a step, as a kill would, with its checkpoint. `autocast` None means where it
    was found faster: CUDA, and CPUs with AMX. `init` is a net to begin from, with its classes. Raises
    UserError for data that cannot be trained on.
    """
    if recipe.crop_px % CELL or recipe.net not in NETS:
        raise UserError(
            f"recipe: crop {recipe.crop_px} must be a multiple of {CELL}, net one of {list(NETS)}", USAGE
        )
    if recipe.mosaic < 1 or recipe.batch % recipe.mosaic**2 or recipe.batch < recipe.mosaic**2 * len(data):
        raise UserError(
            f"recipe: a batch of {recipe.batch} crops must be whole mosaics of {recipe.mosaic**2}, "
            f"and one for each of {len(data)} sources",
            USAGE,
        )
    classes = model_classes(data)
    sources = _read_sources(data, classes, recipe, shares, exhaustive)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(recipe.seed)
    build: Any = NETS[recipe.net]
    net = build(len(classes), attention=recipe.attention, pretrained=True)
    if init is not None:
        begin_from(net, classes, *init)
    net = net.to(device, memory_format=torch.channels_last)
    average = AveragedModel(
        net,
        multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (1 / recipe.ema_half_life)),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    optimiser = torch.optim.AdamW(_parameter_groups(net, recipe.weight_decay), lr=recipe.learning_rate)
    identity = json.dumps(
        {
            "recipe": asdict(recipe),
            "data": [source.digest() for source in data],
            "shares": list(shares),
            "exhaustive": list(exhaustive),
        }
    )
    run.mkdir(parents=True, exist_ok=True)
    first = _resume(run / CHECKPOINT, identity, net, average, optimiser)
    bounds = [0, *_share_bounds([source.share for source in sources], recipe).tolist()]
    parts = list(pairwise(bounds))  # the canvases of each source in a batch
    pipeline = augment.augmentations()
    mixed = _autocast(device, autocast)
    last = recipe.steps if stop_after is None else min(stop_after, recipe.steps)
    figures: dict[str, float] = {}
    for step in range(first, last):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, recipe)
        image, labels, weight, labelled = _batch(sources, recipe, step, pipeline)
        image = image.to(device, memory_format=torch.channels_last)
        labels, weight, labelled = labels.to(device), weight.to(device), labelled.to(device)
        net.train()
        if recipe.frozen_norms:
            for module in net.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        with mixed():
            raw = net(image)
        logits = losses.merge_unlabelled(raw, labelled)
        # Dice is a mean over classes: source by source, lest one with many classes drowns the others.
        by_source = [losses.dice(logits[a:b], labels[a:b]) * ((b - a) / bounds[-1]) for a, b in parts]
        dice = torch.stack(by_source).sum()
        focal = losses.focal(logits, labels, recipe.focal_gamma)
        small = losses.small_object(logits, labels, weight, recipe.focal_gamma)
        ramp = min(1.0, step / max(1.0, recipe.small_ramp * recipe.steps))
        loss = dice + focal + recipe.small_weight * ramp * small
        if not loss.isfinite():
            raise UserError(
                f"step {step + 1}: the loss is {loss.item()}: try a lower learning rate; "
                f"the last checkpoint is in {run}"
            )
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 5.0)
        optimiser.step()
        average.update_parameters(net)
        figures = {"loss": loss.item(), "dice": dice.item(), "focal": focal.item(), "small": small.item()}
        if on_step is not None:
            on_step(step + 1, figures)
        if (step + 1) % 100 == 0 or step + 1 == last:
            _save(run / CHECKPOINT, identity, step + 1, net, average, optimiser)
            _add_to_curve(run / CURVE, step + 1, figures)
    return average.module.cpu().eval()


def begin_from(
    net: nn.Module, classes: Sequence[str], known: nn.Module, known_classes: Sequence[str]
) -> None:
    """Give `net` the weights of `known`, a net of the same build.

    Of the head, which has as many channels for each class, the background and the classes that both know
    are taken over; classes that are new begin as they are.
    """
    weights = known.state_dict()
    for name in ("head.weight", "head.bias"):
        rows = net.state_dict()[name].unflatten(0, (len(classes) + 1, -1)).clone()
        known_rows = weights[name].unflatten(0, (len(known_classes) + 1, -1))
        rows[0] = known_rows[0]
        for index, defect_class in enumerate(classes, start=1):
            if defect_class in known_classes:
                rows[index] = known_rows[known_classes.index(defect_class) + 1]
        weights[name] = rows.flatten(0, 1)
    net.load_state_dict(weights)


def _read_sources(
    data: Sequence[LabelledData],
    classes: tuple[str, ...],
    recipe: Recipe,
    shares: Sequence[float],
    exhaustive: Sequence[bool],
) -> list[_Source]:
    if shares and (len(shares) != len(data) or min(shares) <= 0):
        raise UserError(
            f"{len(shares)} shares for {len(data)} sources: give one positive share for each", USAGE
        )
    _share_bounds(shares or [1.0] * len(data), recipe)  # refuse before the data is read
    read = [[sample.read() for sample in source.samples] for source in data]
    area_ref = augment.reference_area(mask for samples in read for _, mask in samples)
    sources = []
    equal, none = [1.0] * len(data), [False] * len(data)
    for source, samples, share, whole in zip(data, read, shares or equal, exhaustive or none, strict=True):
        to_model = np.zeros(256, dtype=np.uint8)
        to_model[IGNORE] = IGNORE
        labelled = np.full(len(classes) + 1, whole, dtype=np.bool_)
        labelled[0] = True
        for index, name in enumerate(source.classes, start=1):
            to_model[index] = classes.index(name) + 1
            labelled[to_model[index]] = True
        images, masks, weights = [], [], []
        for (image, mask), sample in zip(samples, source.samples, strict=True):
            if (found := int(mask[mask != IGNORE].max(initial=0))) > len(source.classes):
                where = sample.mask if isinstance(sample, ImageFile) else sample.roll.path
                raise UserError(
                    f"{where}: mask value {found}, but {source.root} has {len(source.classes)} classes"
                )
            mask = to_model[mask]
            weight = augment.component_weight(mask, area_ref)
            # Images smaller than the crop are padded right and bottom by reflection, the padding ignored.
            pad = [(0, max(0, recipe.crop_px - size)) for size in mask.shape]
            images.append(np.pad(image.astype(np.float16), [(0, 0), *pad], mode="reflect"))
            masks.append(np.pad(mask, pad, constant_values=IGNORE))
            weights.append(np.pad(weight, pad))
        sources.append(_Source(images, masks, weights, labelled, share))
    if len({image.shape[0] for source in sources for image in source.images}) > 1:
        raise UserError("the sources differ in their number of lighting modes: train on one number of modes")
    return sources


def _batch(
    sources: list[_Source], recipe: Recipe, step: int, pipeline: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image (N, M, H, W), labels (N, H, W), weight (N, H, W), labelled (N, K + 1) of one step.

    N is the number of mosaics; each holds crops of one source.
    """
    rng = np.random.default_rng([recipe.seed, step])
    bounds = _share_bounds([source.share for source in sources], recipe)
    chosen = [sources[int(np.searchsorted(bounds, i, side="right"))] for i in range(int(bounds[-1]))]
    crops: list[tuple[Any, Any, Any]] = []
    for source in (source for source in chosen for _ in range(recipe.mosaic**2)):
        index = int(rng.integers(len(source.images)))
        mask = source.masks[index]
        y = int(rng.integers(mask.shape[0] - recipe.crop_px + 1))
        x = int(rng.integers(mask.shape[1] - recipe.crop_px + 1))
        window = (slice(y, y + recipe.crop_px), slice(x, x + recipe.crop_px))
        planes = source.images[index][:, *window], source.weights[index][window]
        crops.append((planes[0].astype(np.float32), mask[window], planes[1].astype(np.float32)))
    images, labels = augment.to_batch([crop[0] for crop in crops], [crop[1] for crop in crops])
    weights = torch.from_numpy(np.stack([crop[2] for crop in crops]))
    torch.manual_seed(recipe.seed * 1_000_003 + step)
    images, labels, weights = augment.augment(pipeline, images, labels, weights)
    images = _mosaics(images, recipe.mosaic)
    labels, weights = (_mosaics(plane[:, None], recipe.mosaic)[:, 0] for plane in (labels, weights))
    return images, labels, weights, torch.from_numpy(np.stack([source.labelled for source in chosen]))


def _share_bounds(shares: Sequence[float], recipe: Recipe) -> NDArray[np.int64]:
    """The first mosaic after those of each source, the same in every batch as far as whole numbers allow."""
    canvases = recipe.batch // recipe.mosaic**2
    bounds: NDArray[np.int64] = np.round(np.cumsum(shares) / np.sum(shares) * canvases).astype(np.int64)
    if (np.diff(bounds, prepend=0) == 0).any():
        raise UserError(
            f"shares {', '.join(f'{share:g}' for share in shares)}: a batch of {canvases} mosaics leaves a "
            "source without one: choose a larger batch or more even shares",
            USAGE,
        )
    return bounds


def _mosaics(crops: Tensor, side: int) -> Tensor:
    """Lay side x side crops out as one canvas: (N * side^2, C, H, W) -> (N, C, side * H, side * W).

    A strip has no border, but every pixel of a 192 px crop sees one: the net sees 169 px far. Trained on
    single crops it lost 7 points of mIoU from single images to the same images in a roll (val, measured).
    """
    n, channels, height, width = crops.shape
    grid = crops.reshape(n // side**2, side, side, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, side * height, side * width)


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 1 % (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, recipe.steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _parameter_groups(net: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Convolutions decay; biases and norms do not."""
    decayed = [p for p in net.parameters() if p.ndim > 1]
    plain = [p for p in net.parameters() if p.ndim <= 1]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]


def _autocast(
    device: torch.device, wanted: bool | None
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if wanted is None:
        # Without AMX, bf16 on a CPU is emulated and slower than fp32.
        wanted = device.type == "cuda" or bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=wanted)


def _state(net: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {f"net.{name}": t for name, t in net.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in average.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(t) for name, t in values.items()}
    return tensors


def _save(
    path: Path, identity: str, step: int, net: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> None:
    """All that a resumed run needs, in one file put in place by rename."""
    tensors = {
        name: t.detach().cpu().contiguous().clone() for name, t in _state(net, average, optimiser).items()
    }
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, metadata={"identity": identity, "step": str(step)})
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _resume(
    path: Path, identity: str, net: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> int:
    """Fill net, average and optimiser from a checkpoint; the step to go on with, 0 without one."""
    if not path.is_file():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path}: not a checkpoint ({error}): remove it and train from the start") from None
    if metadata.get("identity") != identity:
        raise UserError(
            f"{path}: made with another recipe or other data: choose another folder, or remove it", USAGE
        )
    parts: dict[str, dict[str, Tensor]] = {"net": {}, "average": {}, "optimiser": {}}
    for name, t in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = t
    net.load_state_dict(parts["net"])
    average.load_state_dict(parts["average"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, t in parts["optimiser"].items():
        index, _, field = name.partition(".")
        state.setdefault(int(index), {})[field] = t
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(metadata["step"])


def _add_to_curve(path: Path, step: int, figures: dict[str, float]) -> None:
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *figures])
        writer.writerow([step, *(f"{value:.5f}" for value in figures.values())])
