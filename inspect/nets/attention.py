"""Attention that a tiled scan can use: pooled over cells of the strip, never over the whole tile.

A cell couples every pixel in it, and cells chained along one path add up: CBAM at all levels of a U-Net
reaches over 512 px (measured). So a net has one, at its decoder's entry: `at_entry`.
"""

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Attention = Literal["none", "se", "eca", "cbam"]


def at_entry(attention: Attention, channels: int, cell: int) -> nn.Module:
    """The attention at a decoder's entry, pooled over `cell` x `cell` features: (N, C, H, W) as it came.

    Raises ValueError for a name nobody wrote.
    """
    if attention not in get_args(Attention):
        raise ValueError(f"attention is {attention!r}: it must be one of {', '.join(get_args(Attention))}")
    if attention == "se":
        return CellSqueezeExcite(channels, cell)
    if attention == "eca":
        return CellECA(channels, cell)
    return CBAM(channels, cell) if attention == "cbam" else nn.Identity()


class CellSqueezeExcite(nn.Module):
    """Weight each channel by its mean over the cell: (N, C, H, W) -> (N, C, H, W).

    Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507, eq. 2 to 4), pooled over cells of `cell` x
    `cell` features on the canonical
    grid in place of the whole tile: H and W must be multiples of `cell`.
    """

    def __init__(self, channels: int, cell: int, reduction: int = 8) -> None:
        super().__init__()
        self.mean = nn.AvgPool2d(cell)
        self.spread = nn.Upsample(scale_factor=float(cell))
        hidden = max(channels // reduction, 8)
        self.squeeze = nn.Conv2d(channels, hidden, kernel_size=1)
        self.excite = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.excite(F.relu(self.squeeze(self.mean(x))))  # (N, C, H / cell, W / cell)
        return x * self.spread(torch.sigmoid(weight))  # type: ignore[no-any-return]


class CellChannelAttention(CellSqueezeExcite):
    """Weight each channel by its mean and its peak in the cell: (N, C, H, W) -> (N, C, H, W).

    CBAM's channel attention (Woo et al. 2018, arXiv:1807.06521, eq. 2) pools over the whole tile, so the
    same strip cut otherwise gets other weights; here over cells, as above.
    """

    def __init__(self, channels: int, cell: int, reduction: int = 8) -> None:
        super().__init__(channels, cell, reduction)
        self.peak = nn.MaxPool2d(cell)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.excite(F.relu(self.squeeze(self.mean(x))))  # (N, C, H / cell, W / cell)
        peak = self.excite(F.relu(self.squeeze(self.peak(x))))
        return x * self.spread(torch.sigmoid(mean + peak))  # type: ignore[no-any-return]


class ChannelConv(nn.Conv1d):
    """A one-dimensional convolution along the channels, the same at every place: (N, C, H, W) as it came.

    Its weight has three axes, which channels-last leaves alone, and the graph holds no sizes.
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__(1, 1, kernel_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight[..., None, None]  # (1, 1, k, 1, 1)
        return F.conv3d(x.unsqueeze(1), weight, padding=(self.kernel_size[0] // 2, 0, 0)).squeeze(1)


class CellECA(nn.Module):
    """Weight each channel by its and its neighbours' mean over the cell: (N, C, H, W) -> (N, C, H, W).

    Efficient channel attention (Wang et al. 2020, arXiv:1910.03151, eq. 9; kernel size from eq. 12 with
    gamma 2 and b 1), pooled over cells of `cell` x `cell` features in place of the whole tile.
    """

    def __init__(self, channels: int, cell: int) -> None:
        super().__init__()
        size = int((math.log2(channels) + 1) / 2)
        self.mean = nn.AvgPool2d(cell)
        self.conv = ChannelConv(size + 1 - size % 2)
        self.spread = nn.Upsample(scale_factor=float(cell))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.spread(torch.sigmoid(self.conv(self.mean(x))))  # type: ignore[no-any-return]


class SpatialAttention(nn.Module):
    """Weight each place by its strongest and its mean channel: (N, C, H, W) -> (N, C, H, W).

    Woo et al. 2018, arXiv:1807.06521, eq. 3. amax and mean rather than adaptive pooling layers, which
    ONNX exporters translate wrongly (pytorch issue 98189).
    """

    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        planes = torch.cat([x.amax(dim=1, keepdim=True), x.mean(dim=1, keepdim=True)], dim=1)
        return x * torch.sigmoid(self.conv(planes))


class CBAM(nn.Module):
    """Channel, then spatial attention (the paper's best order): (N, C, H, W) -> (N, C, H, W)."""

    def __init__(self, channels: int, cell: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.channel = CellChannelAttention(channels, cell)
        self.spatial = SpatialAttention(kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.spatial(self.channel(x))  # type: ignore[no-any-return]
