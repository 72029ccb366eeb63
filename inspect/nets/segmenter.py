"""What all segmenters share: any number of lighting modes in, logits of every pixel out."""

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIDDLE, SPREAD = 0.498, 0.502  # of gray in [0, 1]; Lite0 was trained on (x - 127) / 128 of 0 to 255


class Segmenter(nn.Module, ABC):
    """A net for strip: (N, M, H, W) gray in [0, 1] of M lighting modes -> logits (N, classes + 1, H, W).

    Background comes first; H and W are multiples of the cell (64 px). The stem is shared by the modes and
    averaged over them, so one model takes any number. A net's last convolution is its `head`, with as many
    channels for each class, so that training can begin from a model of other classes.
    """

    stem: nn.Module
    head: nn.Conv2d
    pretrained: tuple[str, ...] = ()  # its modules that do not begin from nothing

    def forward(self, x: Tensor) -> Tensor:
        return self.from_stem(self.mean_stem(x))

    def mean_stem(self, x: Tensor) -> Tensor:
        """The stem's features averaged over modes: (N, M, H, W) in [0, 1] -> (N, C, H / s, W / s)."""
        modes = x.shape[1]
        # The mean of one took 56 ms of a step. A graph is for any number: where one is traced it is no int.
        if self.training and isinstance(modes, int) and modes == 1:
            return self.stem_of(x)
        planes = self.stem_of(x.flatten(0, 1).unsqueeze(1))  # (N * M, C, H / s, W / s)
        return planes.unflatten(0, (-1, modes)).mean(dim=1)  # type: ignore[no-untyped-call, no-any-return]

    def stem_of(self, plane: Tensor) -> Tensor:
        """The stem's features of gray planes: (M, 1, H, W) in [0, 1] -> (M, C, H / s, W / s)."""
        return self.stem((plane - MIDDLE) / SPREAD)  # type: ignore[no-any-return]

    @abstractmethod
    def from_stem(self, features: Tensor) -> Tensor:
        """Logits from the stem's features averaged over modes: (N, C, H / s, W / s) -> (N, K + 1, H, W)."""


class Conv(nn.Conv2d):
    """A convolution that trains fast on a CPU in bf16, too: (N, C, H, W) -> (N, out, H', W').

    oneDNN's bf16 gradients of depthwise convolutions with a 5x5 kernel or stride 2 took 2 to 6 times as
    long as fp32's (4 x 144 x 99^2, 5x5, stride 2: 158 and 28 ms on a core with AVX-512 bf16, torch 2.13;
    measured 2026-11-24), a third of a step of unet_lite. These are computed in fp32 under autocast.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (x.device.type == "cpu" and torch.is_autocast_enabled("cpu") and self._slow_in_bf16()):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.get_autocast_dtype("cpu"))

    def _slow_in_bf16(self) -> bool:
        return self.training and self.groups > 1 and (self.kernel_size[0] > 3 or self.stride[0] > 1)


class _Repeated(torch.autograd.Function):
    """Nearest up-sampling by a whole factor, whose gradient is a pooling."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: int) -> Tensor:
        ctx.factor = factor
        return F.interpolate(x, scale_factor=float(factor))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return F.avg_pool2d(grad, ctx.factor, divisor_override=1), None


class Upsample(nn.Upsample):
    """Nearest up-sampling that trains fast on a CPU: (N, C, H, W) -> (N, C, factor * H, factor * W).

    torch's own gradient takes a part of a channels-last concatenation pixel by pixel: 84 ms for 48 of 64
    channels of 4 x 192^2 in bf16, as a pooling 31 (measured 2026-11-29). Nearest, since bilinear differs by
    1e-6 between window shapes (measured).
    """

    def __init__(self, factor: int) -> None:
        super().__init__(scale_factor=float(factor))
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.device.type == "cpu":
            return _Repeated.apply(x, self.factor)  # type: ignore[no-any-return, no-untyped-call]
        return super().forward(x)


def conv_norm(
    channels: int, out: int, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution and its BatchNorm: (N, C, H, W) -> (N, out, H / stride, W / stride)."""
    padding = dilation * (kernel // 2)
    conv = Conv(channels, out, kernel, stride, padding, dilation, groups, bias=False)
    return [conv, nn.BatchNorm2d(out)]


def conv_norm_relu(
    channels: int, out: int, kernel: int = 3, stride: int = 1, dilation: int = 1, groups: int = 1
) -> list[nn.Module]:
    """The same and a ReLU: one step of a dense net."""
    return [*conv_norm(channels, out, kernel, stride, dilation, groups), nn.ReLU()]


class Up(nn.Module):
    """Double the resolution, fuse the skip: (N, C, H, W), (N, S, 2H, 2W) -> (N, out, 2H, 2W)."""

    def __init__(self, channels: int, skip: int, out: int, convs: int) -> None:
        super().__init__()
        self.upsample = Upsample(2)
        layers: list[nn.Module] = []
        for i in range(convs):
            layers += conv_norm_relu(channels + skip if i == 0 else out, out)
        self.fuse = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.fuse(torch.cat([self.upsample(x), skip], dim=1))  # type: ignore[no-any-return]


def he_init(net: nn.Module) -> None:
    """Fill the convolutions for a net of rectifiers that begins from nothing.

    He et al. 2015, arXiv:1502.01852, eq. 14 (the backward case). Convolutions with a bias, the head and the
    gates of attention, keep torch's own smaller start.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
