"""Labelled data in, a net out: AdamW, warm-up and cosine, EMA, checkpoints that resume bit by bit.

Every random choice of step n is drawn from (seed, n), so a run that was killed goes on as if it had
not been, without storing any generator's state.
"""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rollsight.inspect.allocator import keep_freed_memory
from rollsight.inspect.checkpoints import (
    BEST,
    CHECKPOINT,
    CONFIG,
    CURVE,
    Progress,
    add_to_curve,
    forget_after,
    load_weights,
    resume,
    save_checkpoint,
    save_weights,
)
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.labels import LabelledData
from rollsight.inspect.nets import NETS
from rollsight.inspect.nets.widths import take_widths
from rollsight.inspect.objective import objective
from rollsight.inspect.recipe import Recipe, check_recipe
from rollsight.inspect.sampling import Sampler, share_bounds
from rollsight.inspect.training_data import check_enough, model_classes, read_sources
from rollsight.inspect.validation import mean_iou, read_held
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

__all__ = ["Recipe", "begin_from", "model_classes", "train"]

Known = tuple[nn.Module, Sequence[str]]  # a net and its classes


def train(
    data: Sequence[LabelledData],
    run: Path,
    recipe: Recipe,
    *,
    shares: Sequence[float] = (),
    exhaustive: Sequence[bool] = (),
    until: Sequence[float] = (),
    val: Sequence[LabelledData] = (),
    on_step: Callable[[int, dict[str, float]], None] | None = None,
    stop_after: int | None = None,
    autocast: bool | None = None,
    init: Known | None = None,
    teacher: Known | None = None,
) -> nn.Module:
    """Train on `data` (each already of one split) and return the averaged net, with patience the best one.

    `run` is the folder of checkpoints, the curve and the configuration: a run found there with the same
    recipe and data goes on where it stopped, another is refused. `shares` weighs the sources in each batch,
    equal by default. `exhaustive` says for each source whether its background is free of the classes that
    it does not label too; by default it is not, and they count as background there
    (`losses.merge_unlabelled`). `until` is the share of the steps after which each source is drawn no
    more, 1 by default: synthetic data ends before the last steps, which are on real data. `val` is what
    `recipe.patience` judges by. `stop_after` ends the run at a step, as a kill would, with its checkpoint.
    `autocast` None means where it was found faster: CUDA, and CPUs with bf16. `init` is a net to begin
    from, `teacher` one to learn from as well, each with its classes. Raises UserError for data that cannot
    be trained on.
    """
    _check(data, recipe, shares, until, val)
    classes = model_classes(data)
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net = _begin(recipe, classes, init).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    lesson = _Lesson(teacher, classes, device) if teacher is not None else None
    sources = read_sources(data, classes, recipe, shares, exhaustive)
    if init is None:
        check_enough(sources, classes, recipe.fewest)
    sampler = Sampler(sources, recipe, until)
    held = read_held(val, classes) if recipe.patience else []
    average = AveragedModel(
        net,
        multi_avg_fn=get_ema_multi_avg_fn(0.5 ** (1 / recipe.ema_half_life)),  # type: ignore[no-untyped-call]
        use_buffers=True,
    )
    # What a model to begin from had, a net has learned; only what it did not begins from nothing.
    groups = _parameter_groups(net, recipe, ("",) if init is not None else net.pretrained)
    optimiser = torch.optim.AdamW(groups, lr=recipe.learning_rate)
    identity = _identity(data, recipe, shares, exhaustive, val)
    if until:  # a training without it stays the one it was
        identity["until"] = list(until)
    run.mkdir(parents=True, exist_ok=True)
    progress = resume(run / CHECKPOINT, json.dumps(identity), net, average, optimiser)
    forget_after(run, progress.step)
    (run / CONFIG).write_text(json.dumps(identity, indent=1) + "\n", encoding="utf-8")
    mixed = _autocast(device, autocast)
    last = recipe.steps if stop_after is None else min(stop_after, recipe.steps)
    rows: list[dict[str, float]] = []  # of the steps since the curve's last row
    for step in range(progress.step, last):
        if recipe.patience and progress.waited >= recipe.patience:
            break
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * group["rate"] * _schedule(step, recipe)
        batch = sampler.batch(step).to(device)
        _train_mode(net, recipe)
        with mixed():
            outputs = net.auxiliary(batch.images) if recipe.deep_supervision else [net(batch.images)]
            taught = lesson(batch.images) if lesson is not None else None
        loss, terms = objective(outputs, batch, recipe, step, sampler.bounds_at(step), taught)
        _descend(loss, net, optimiser, run, step)
        average.update_parameters(net)
        rows.append({"loss": loss.item(), **{name: term.item() for name, term in terms.items()}})
        if on_step is not None:
            on_step(step + 1, rows[-1])
        progress = replace(progress, step=step + 1)
        due = (step + 1) % recipe.evaluate_every == 0 or step + 1 == recipe.steps
        if due or step + 1 == last:
            figures = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
            if held:
                miou = mean_iou(average.module, held, mixed) if due else math.nan
                progress = _judged(progress, miou, run / BEST, average.module)
                figures["val_miou"] = miou
            # The curve first: what it has beyond the checkpoint after a kill, `forget_after` takes away.
            add_to_curve(run / CURVE, step + 1, figures)
            save_checkpoint(run / CHECKPOINT, json.dumps(identity), progress, net, average, optimiser)
            rows = []
    if progress.best >= 0:
        load_weights(run / BEST, average.module)
    # Laid out as a net read from a file is.
    plain: nn.Module = average.module.cpu().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return plain.eval()


def begin_from(
    net: nn.Module, classes: Sequence[str], known: nn.Module, known_classes: Sequence[str]
) -> None:
    """Give `net` the weights of `known`, a net of the same build, and its widths where that was pruned.

    Of the head, which has as many channels for each class, the background and the classes that both know
    are taken over; classes that are new begin as they are.
    """
    weights = known.state_dict()
    take_widths(net, weights)
    for name in ("head.weight", "head.bias"):
        rows = net.state_dict()[name].unflatten(0, (len(classes) + 1, -1)).clone()
        known_rows = weights[name].unflatten(0, (len(known_classes) + 1, -1))
        rows[0] = known_rows[0]
        for index, defect_class in enumerate(classes, start=1):
            if defect_class in known_classes:
                rows[index] = known_rows[known_classes.index(defect_class) + 1]
        weights[name] = rows.flatten(0, 1)
    net.load_state_dict(weights)


class _Lesson:
    """A teacher's logits of the background and of the classes that the net has too, and their channels."""

    def __init__(self, teacher: Known, classes: Sequence[str], device: torch.device) -> None:
        net, known = teacher
        shared = [name for name in classes if name in known]
        if not shared:
            raise UserError(
                f"the teacher knows {', '.join(known)}, the data labels {', '.join(classes)}: "
                "they share no class",
                USAGE,
            )
        self._net = net.to(device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self._theirs = [0, *(known.index(name) + 1 for name in shared)]
        self._ours = [0, *(classes.index(name) + 1 for name in shared)]

    def __call__(self, images: Tensor) -> tuple[Tensor, list[int]]:
        with torch.no_grad():
            return self._net(images)[:, self._theirs], self._ours


def _check(
    data: Sequence[LabelledData],
    recipe: Recipe,
    shares: Sequence[float],
    until: Sequence[float],
    val: Sequence[LabelledData],
) -> None:
    """Refuse what needs no look at the images."""
    check_recipe(recipe, len(data))
    if shares and (len(shares) != len(data) or not all(0 < share < math.inf for share in shares)):
        raise UserError(
            f"{len(shares)} shares for {len(data)} sources: give one positive share for each", USAGE
        )
    share_bounds(shares or [1.0] * len(data), recipe)
    if until and (len(until) != len(data) or not all(0 < share <= 1 for share in until) or max(until) < 1):
        raise UserError(
            f"until {', '.join(f'{share:g}' for share in until)} for {len(data)} sources: give each the "
            "share of the steps that it is drawn in, above 0, and at least one of them 1",
            USAGE,
        )
    if recipe.patience and not val:
        raise UserError(
            f"patience is {recipe.patience}, but no source has a val split to judge by: set it to 0", USAGE
        )


def _begin(recipe: Recipe, classes: Sequence[str], init: Known | None) -> nn.Module:
    """The net as training finds it."""
    torch.manual_seed(recipe.seed)
    build: Any = NETS[recipe.net]
    try:
        net: nn.Module = build(len(classes), attention=recipe.attention, pretrained=True)
    except ValueError as error:
        raise UserError(f"recipe: {recipe.net}: {error}", USAGE) from None
    if recipe.deep_supervision and not hasattr(net, "auxiliary"):
        raise UserError(
            f"recipe: {recipe.net} gives no logits of coarser depths: it goes without deep_supervision", USAGE
        )
    if init is not None:
        begin_from(net, classes, *init)
    return net


def _identity(
    data: Sequence[LabelledData],
    recipe: Recipe,
    shares: Sequence[float],
    exhaustive: Sequence[bool],
    val: Sequence[LabelledData],
) -> dict[str, Any]:
    """What makes a training the one it is: it is written beside the checkpoint, and compared."""
    return {
        "recipe": asdict(recipe),
        "data": [source.digest() for source in data],
        "shares": list(shares),
        "exhaustive": list(exhaustive),
        "val": [source.digest() for source in val] if recipe.patience else [],
    }


def _train_mode(net: nn.Module, recipe: Recipe) -> None:
    net.train()
    if recipe.frozen_norms:
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def _descend(loss: Tensor, net: nn.Module, optimiser: torch.optim.Optimizer, run: Path, step: int) -> None:
    """One step down the gradient; UserError where the loss, or its gradient, is not finite."""

    def check(what: str, value: Tensor) -> None:
        if not value.isfinite():
            raise UserError(
                f"step {step + 1}: the {what} is {value.item()}: try a lower learning rate; "
                f"the last checkpoint is in {run}"
            )

    check("loss", loss)
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    check("gradient", nn.utils.clip_grad_norm_(net.parameters(), 5.0))
    optimiser.step()


def _judged(progress: Progress, miou: float, best: Path, net: nn.Module) -> Progress:
    """The progress after an evaluation (nan: there was none); the weights of the best one are kept."""
    if miou > progress.best:
        save_weights(best, net)
        return replace(progress, best=miou, waited=0)
    return progress if math.isnan(miou) else replace(progress, waited=progress.waited + 1)


def _schedule(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to 1 % (Loshchilov & Hutter 2017, arXiv:1608.03983)."""
    warm = max(1, round(recipe.warmup * recipe.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, recipe.steps - warm)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress))


def _parameter_groups(net: nn.Module, recipe: Recipe, learned: Sequence[str]) -> list[dict[str, Any]]:
    """Convolutions decay, biases and norms do not; what begins from nothing learns faster.

    `learned` names the modules that do not begin from nothing, "" all. One rate for all was wrong for a
    part: at 0.001 a decoder took 150 steps to leave the background, at 0.003 the pretrained encoder forgot
    (val of neu_clean, 560 steps: mIoU 0.699 and 0.705, at 0.001 and 0.005 ENC_DEC; measured 2026-11-24).
    Howard & Ruder 2018, arXiv:1801.06146, section 3.2 (discriminative fine-tuning).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in net.named_parameters():
        rate = 1.0 if any(name.startswith(module) for module in learned) else recipe.fresh_rate
        groups.setdefault((rate, recipe.weight_decay if parameter.ndim > 1 else 0.0), []).append(parameter)
    return [
        {"params": parameters, "rate": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]


def _autocast(
    device: torch.device, wanted: bool | None
) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    if wanted is None:
        # Where a CPU has no bf16 of its own it is emulated, and slower than fp32. With AVX-512's a step took
        # 0.5 to 0.8 of the time (measured 2026-11-24; `mobile` 1.2).
        known = torch.cpu.get_capabilities()
        wanted = device.type == "cuda" or bool(known.get("amx_bf16") or known.get("avx512_bf16"))
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=wanted)
