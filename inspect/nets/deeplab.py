"""DeepLab heads for strip: context at several reaches, its image pooling by cells, and a skip for detail."""

from collections.abc import Sequence

import torch
from rollsight.inspect.nets.attention import Attention, at_entry
from rollsight.inspect.nets.encoders import Lite0, MobileV3, lite0_stem, load_lite0_imagenet
from rollsight.inspect.nets.segmenter import Segmenter, Upsample, conv_norm, conv_norm_relu, he_init
from rollsight.inspect.tiles import CELL
from torch import Tensor, nn

RATES = (1, 2, 4)  # of ASPP at stride 16: 16, 32, 64 px; the paper's 6 to 18 would need a halo of 640 px
WIDTH, SKIP = 64, 32  # channels of ASPP's branches and the decoder, of the skip at stride 4
MOBILE_SKIP = 16


class ASPP(nn.Module):
    """Context at several reaches, side by side: (N, C, H, W) at stride 16 -> (N, out, H, W).

    Atrous spatial pyramid pooling (Chen et al. 2018, arXiv:1802.02611, section 3): a 1x1 convolution, a 3x3
    for each dilation in `rates`, and the image pooling, here over the cell. Without rates it is the R-ASPP of
    MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381, section 6.3).
    """

    def __init__(self, channels: int, out: int, rates: Sequence[int]) -> None:
        super().__init__()
        self.point = nn.Sequential(*conv_norm_relu(channels, out, 1))
        self.dilated = nn.ModuleList(
            nn.Sequential(*conv_norm_relu(channels, out, dilation=rate)) for rate in rates
        )
        cell = CELL // 16
        self.pooled = nn.Sequential(
            nn.AvgPool2d(cell), *conv_norm_relu(channels, out, 1), nn.Upsample(scale_factor=float(cell))
        )
        self.fuse = nn.Sequential(*conv_norm_relu((2 + len(rates)) * out, out, 1))

    def forward(self, x: Tensor) -> Tensor:
        branches = [self.point(x), *(branch(x) for branch in self.dilated), self.pooled(x)]
        return self.fuse(torch.cat(branches, dim=1))  # type: ignore[no-any-return]


class DeepLab(Segmenter):
    """DeepLabV3+ at stride 16: encoder, ASPP, attention, a skip at stride 4 (Chen et al. 2018, fig. 2).

    (N, M, H, W) gray in [0, 1] of M lighting modes -> logits (N, classes + 1, H, W). `fuse` makes the
    features that decide, at stride 4, of ASPP's and the skip's.
    """

    def __init__(
        self,
        classes: int,
        attention: Attention,
        stem: nn.Module,
        encoder: Lite0 | MobileV3,
        rates: Sequence[int],
        skip: int,
        fuse: nn.Module,
    ) -> None:
        super().__init__()
        self.stem = stem
        self.encoder = encoder
        _, at_4, _, at_16 = encoder.channels
        self.context = ASPP(at_16, WIDTH, rates)
        self.attention = at_entry(attention, WIDTH, CELL // 16)
        self.upsample = Upsample(4)
        self.skip = nn.Sequential(*conv_norm_relu(at_4, skip, 1))
        self.fuse = fuse
        self.head = nn.Conv2d(WIDTH, 16 * (classes + 1), kernel_size=1)
        self.to_pixels = nn.PixelShuffle(4)  # in place of bilinear: sharper, and the same in every window

    def from_stem(self, features: Tensor) -> Tensor:
        _, at_4, _, at_16 = self.encoder(features)
        x = self.upsample(self.attention(self.context(at_16)))
        x = self.fuse(torch.cat([x, self.skip(at_4)], dim=1))
        return self.to_pixels(self.head(x))  # type: ignore[no-any-return]


def deeplabv3plus(classes: int, attention: Attention = "cbam", pretrained: bool = False) -> DeepLab:
    """DeepLabV3+ on EfficientNet-Lite0, `classes` defect classes; `pretrained` fills it from ImageNet."""
    fuse = nn.Sequential(*conv_norm_relu(WIDTH + SKIP, WIDTH), *conv_norm_relu(WIDTH, WIDTH))
    net = DeepLab(classes, attention, lite0_stem(), Lite0(), RATES, SKIP, fuse)
    if pretrained:
        load_lite0_imagenet(net)
    return net


def mobile(classes: int, attention: Attention = "cbam", pretrained: bool = False) -> DeepLab:
    """MobileNetV3-Small with a light DeepLab head, `classes` defect classes: the real-time one.

    R-ASPP and depthwise convolutions; attention "se" is the encoder's squeeze-excite, once and by cells. No
    pretrained weights exist, so it begins from nothing.
    """
    stem = nn.Sequential(*conv_norm(1, MobileV3.channels[0], stride=2), nn.Hardswish())
    wide = WIDTH + MOBILE_SKIP
    fuse = nn.Sequential(*conv_norm_relu(wide, wide, groups=wide), *conv_norm_relu(wide, WIDTH, 1))
    net = DeepLab(classes, attention, stem, MobileV3(), (), MOBILE_SKIP, fuse)
    he_init(net)
    return net
