"""Attention that a tiled scan can use: pooled over cells of the strip, never over the whole tile."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CellChannelAttention(nn.Module):
    """Weight each channel by what its cell holds: (N, C, H, W) -> (N, C, H, W).

    CBAM's channel attention (Woo et al. 2018, arXiv:1807.06521, eq. 2) pools over the whole tile, so the
    same strip cut otherwise gets other weights. Here the pooling is over cells of `cell` x `cell`
    features on the canonical grid: H and W must be multiples of `cell`.
    """

    def __init__(self, channels: int, cell: int, reduction: int = 8) -> None:
        super().__init__()
        self.mean = nn.AvgPool2d(cell)
        self.peak = nn.MaxPool2d(cell)
        self.spread = nn.Upsample(scale_factor=float(cell))
        hidden = max(channels // reduction, 8)
        self.squeeze = nn.Conv2d(channels, hidden, kernel_size=1)
        self.excite = nn.Conv2d(hidden, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        mean = self.excite(F.relu(self.squeeze(self.mean(x))))  # (N, C, H / cell, W / cell)
        peak = self.excite(F.relu(self.squeeze(self.peak(x))))
        return x * self.spread(torch.sigmoid(mean + peak))  # type: ignore[no-any-return]


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
