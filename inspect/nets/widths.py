"""A net with fewer channels than its function gives it: how many is what its weights say."""

from collections.abc import Mapping

import torch
from rollsight.inspect.tiles import CELL
from torch import Tensor, nn


def take_widths(net: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the layers of `net` as few channels as `weights`, a state_dict, has for them; in place.

    So a pruned net is built again from its function and its file, and trained on as any other. The head
    keeps its channels, which are the classes. A layer is left as it is where the weights have more for it
    than the function gives: `load_state_dict` says so then. Raises RuntimeError, as that does, where layers
    of such widths do not fit together.
    """
    narrowed = False
    for name, module in net.named_modules():
        weight = weights.get(f"{name}.weight")
        if isinstance(module, nn.Conv2d) and weight is not None:
            narrowed |= _narrow_conv(module, weight, keep_out=name == "head")
        elif isinstance(module, nn.BatchNorm2d) and weight is not None:
            narrowed |= _narrow_norm(module, weight)
    if narrowed:
        training = net.training
        with torch.inference_mode():
            net.eval()(torch.zeros(1, 1, CELL, CELL))
        net.train(training)


def _narrow_conv(conv: nn.Conv2d, weight: Tensor, keep_out: bool) -> bool:
    """Whether channels were taken off; of a depthwise convolution both sides, which are one."""
    if weight.ndim != 4:
        return False
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    out = conv.out_channels if keep_out else weight.shape[0]
    shape = (out, *weight.shape[1:])
    if shape == conv.weight.shape or any(
        not 1 <= n <= built for n, built in zip(shape, conv.weight.shape, strict=True)
    ):
        return False
    if shape[2:] != conv.weight.shape[2:] or (conv.groups > 1 and not depthwise):
        return False
    conv.weight = nn.Parameter(conv.weight.detach()[:out, : shape[1]].clone())
    if conv.bias is not None:
        conv.bias = nn.Parameter(conv.bias.detach()[:out].clone())
    conv.out_channels = out
    conv.in_channels = out if depthwise else shape[1]
    conv.groups = out if depthwise else 1
    return True


def _narrow_norm(norm: nn.BatchNorm2d, weight: Tensor) -> bool:
    channels = weight.numel()
    if not 1 <= channels < norm.num_features:
        return False
    norm.weight, norm.bias = (nn.Parameter(t.detach()[:channels].clone()) for t in (norm.weight, norm.bias))
    for name in ("running_mean", "running_var"):
        norm.register_buffer(name, getattr(norm, name)[:channels].clone())
    norm.num_features = channels
    return True
