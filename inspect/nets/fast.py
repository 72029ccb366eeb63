"""The net for whole strips on a CPU: dense 3x3 convolutions of few channels, which a core does best."""

import torch.nn.functional as F
from rollsight.inspect.nets.attention import Attention, at_entry
from rollsight.inspect.nets.segmenter import MIDDLE, Segmenter, Upsample, conv_norm, conv_norm_relu, he_init
from rollsight.inspect.tiles import CELL
from torch import Tensor, nn

# Six times unet_lite in ONNX Runtime on one thread decided these: a further bottleneck at stride 16 takes
# 4 % of the time, one at stride 8 takes 6 %, CBAM's spatial half at stride 8 takes 6 % (measured).
WIDTHS = (16, 32, 64, 128)  # channels at strides 2, 4, 8, 16
DEPTH = 3  # bottlenecks at stride 16; with a fourth CBAM's halo would be 192 px, not 128


class Bottleneck(nn.Module):
    """A residual 3x3 convolution on half the channels: (N, C, H, W) as it came.

    He et al. 2016, arXiv:1512.03385, fig. 5 right: 2.8 times fewer multiplications than a 3x3 on all of them.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.layers = nn.Sequential(
            *conv_norm_relu(channels, half, 1), *conv_norm_relu(half, half), *conv_norm(half, channels, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


class Fast(Segmenter):
    """A dense net that decides at stride 4: (N, M, H, W) in [0, 1] -> logits (N, classes + 1, H, W).

    The stem ends at stride 4, where a defect of 5 px is one or two features wide; each feature there decides
    its own 4x4 pixels. Sums, not concatenations, join the scales, which is half the work. ReLU throughout,
    which quantises well. Modes are averaged at stride 4, where that takes half the time.
    No branches to re-parameterise (Ding et al. 2021, arXiv:2101.03697): they made a step of training a third
    longer and the loss no lower (0.69 with, 0.65 without, at 220 to 260 steps of neu_clean, two seeds).
    """

    def __init__(self, classes: int, attention: Attention = "cbam") -> None:
        super().__init__()
        at_2, at_4, at_8, at_16 = WIDTHS
        self.stem = nn.Sequential(*conv_norm_relu(1, at_2, stride=2), *conv_norm_relu(at_2, at_4, stride=2))
        self.to_8 = nn.Sequential(*conv_norm_relu(at_4, at_8, stride=2))
        deep = [Bottleneck(at_16) for _ in range(DEPTH)]
        self.to_16 = nn.Sequential(*conv_norm_relu(at_8, at_16, stride=2), *deep)
        self.attention = at_entry(attention, at_16, CELL // 16)
        self.upsample = Upsample(2)
        self.narrow_16 = nn.Sequential(*conv_norm(at_16, at_8, 1))
        self.fuse_8 = Bottleneck(at_8)
        self.narrow_8 = nn.Sequential(*conv_norm(at_8, at_4, 1))
        self.fuse_4 = Bottleneck(at_4)
        self.head = nn.Conv2d(at_4, 16 * (classes + 1), kernel_size=1)
        self.to_pixels = nn.PixelShuffle(4)
        he_init(self)

    def stem_of(self, plane: Tensor) -> Tensor:
        return self.stem(plane - MIDDLE)  # type: ignore[no-any-return]  # the norms see to the spread

    def from_stem(self, features: Tensor) -> Tensor:
        at_8 = self.to_8(features)
        at_16 = self.attention(self.to_16(at_8))
        x = self.fuse_8(F.relu(self.upsample(self.narrow_16(at_16)) + at_8))
        x = self.fuse_4(F.relu(self.upsample(self.narrow_8(x)) + features))
        return self.to_pixels(self.head(x))  # type: ignore[no-any-return]


def fast(classes: int, attention: Attention = "cbam", pretrained: bool = False) -> Fast:
    """The net for speed, `classes` defect classes; no pretrained weights exist, so it begins from nothing."""
    return Fast(classes, attention)
