"""A net with fewer channels: structured pruning. What it lost is trained back by `train`, as any net is."""

import copy

import numpy as np
import torch
import torch_pruning
from numpy.typing import NDArray
from rollsight.inspect.nets.attention import CellECA, SpatialAttention
from rollsight.inspect.nets.encoders import SameConv
from rollsight.inspect.nets.segmenter import Conv
from rollsight.inspect.tiles import CELL
from torch import nn
from torch.optim.swa_utils import update_bn
from torch_pruning.utils import op_counter

ROUND_TO = 8  # channels: what a vector instruction takes at once
BATCH = 16  # windows of one estimate of the norms
# Gates that work on any number of channels. They pool over the channels, which the dependency graph reads as
# a convolution that needs as many as it has weights.
ANY_WIDTH = (SpatialAttention, CellECA)


def prune(net: nn.Module, share: float) -> nn.Module:
    """A copy of the net without `share` of the channels of each layer, rounded to eights; the head stays.

    The channels that go are those whose weights, over all layers that share them, have the smallest L2 norm:
    Fang et al. 2023, arXiv:2301.12900. `take_widths` builds the net again from its weights.
    """
    narrow = copy.deepcopy(net).eval()
    gates = [(name, module) for name, module in narrow.named_modules() if isinstance(module, ANY_WIDTH)]
    for name, _ in gates:
        narrow.set_submodule(name, nn.Identity())
    torch_pruning.pruner.BasePruner(
        narrow,
        torch.rand(1, 1, CELL, CELL),
        torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=share,
        ignored_layers=[narrow.head],
        round_to=ROUND_TO,
        # The depths that training judges have layers of their own.
        forward_fn=(lambda net, x: net.auxiliary(x)) if hasattr(narrow, "auxiliary") else None,
    ).step()
    for name, gate in gates:
        narrow.set_submodule(name, gate)
    return narrow


def renew_norms(net: nn.Module, windows: NDArray[np.float32]) -> None:
    """Estimate the statistics of the net's norms on windows (N, M, H, W), in place.

    Without some of its channels a net's features have another mean and spread.
    """
    update_bn(torch.split(torch.from_numpy(windows), BATCH), net)
    net.eval()


def multiplications(net: nn.Module) -> float:
    """Multiplications per pixel of a window, of the net as it is run: fused where it can be."""
    run = net.fused() if hasattr(net, "fused") else net  # type: ignore[operator]
    # The library looks a module up by its very type, and would leave ours out.
    op_counter.MODULES_MAPPING.update(dict.fromkeys((Conv, SameConv), op_counter.MODULES_MAPPING[nn.Conv2d]))
    macs, _ = torch_pruning.utils.count_ops_and_params(run, torch.rand(1, 1, CELL, CELL))
    return float(macs) / CELL**2
