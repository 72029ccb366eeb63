"""The files of a training under way: a checkpoint that it goes on from, bit by bit, and its curve."""

import csv
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rollsight.inspect.errors import USAGE, UserError
from rollsight.inspect.tensor_errors import tensor_errors
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CHECKPOINT = "checkpoint.safetensors"
BEST = "best.safetensors"
CURVE = "curve.csv"
CONFIG = "config.json"


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a training is."""

    step: int = 0  # done
    best: float = -1.0  # the highest mIoU on val; below 0: never evaluated
    waited: int = 0  # evaluations since


def save_checkpoint(
    path: Path,
    identity: str,
    progress: Progress,
    net: nn.Module,
    average: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    """All that a resumed run needs, in one file put in place by rename."""
    tensors = {f"net.{name}": t for name, t in net.state_dict().items()}
    tensors |= {f"average.{name}": t for name, t in average.state_dict().items()}
    for index, values in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{name}": torch.as_tensor(t) for name, t in values.items()}
    save_tensors(path, tensors, {"identity": identity, "progress": json.dumps(asdict(progress))})


def save_weights(path: Path, net: nn.Module) -> None:
    """The weights of a net, put in place by rename."""
    save_tensors(path, net.state_dict(), {})


def load_weights(path: Path, net: nn.Module) -> None:
    """Fill a net from what `save_weights` wrote."""
    net.load_state_dict(load_file(path))


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file, durable and put in place by rename."""
    temporary = path.with_suffix(".tmp")
    whole = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    with tensor_errors(path):
        save_file(whole, temporary, metadata=metadata)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)


def resume(
    path: Path, identity: str, net: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer
) -> Progress:
    """Fill net, average and optimiser from a checkpoint and tell how far it was; nothing done without one.

    UserError where the checkpoint is damaged or of another recipe or other data.
    """
    if not path.is_file():
        return Progress()
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise UserError(f"{path}: not a checkpoint ({error}): remove it and train from the start") from None
    if metadata.get("identity") != identity:
        raise UserError(
            f"{path}: made with another recipe or other data: choose another name, or remove the folder "
            f"{path.parent}",
            USAGE,
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
    return Progress(**json.loads(metadata["progress"]))


def add_to_curve(path: Path, step: int, figures: Mapping[str, float]) -> None:
    """Append a row to the curve, with its header before the first."""
    new = not path.exists() or path.stat().st_size == 0
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["step", *figures])
        writer.writerow([step, *(f"{value:.5f}" for value in figures.values())])


def forget_after(run: Path, step: int) -> None:
    """Leave nothing in a training's folder that comes after `step`, where its checkpoint is.

    At step 0 what is found there is of a training whose checkpoint was taken away: its curve may have other
    columns, its best weights another net.
    """
    curve = run / CURVE
    if step == 0:
        for path in (curve, run / BEST):
            path.unlink(missing_ok=True)
    elif curve.is_file():
        with curve.open(newline="", encoding="utf-8") as file:
            rows = list(csv.reader(file))
        # A row that was cut off by a kill is left out too.
        whole = [row for row in rows if len(row) == len(rows[0]) and row[0].isdecimal()]
        temporary = curve.with_suffix(".tmp")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([*rows[:1], *(row for row in whole if int(row[0]) <= step)])
        temporary.replace(curve)
