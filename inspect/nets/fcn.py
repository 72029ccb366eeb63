"""The fully convolutional net: what each scale says of a pixel, summed."""

from rollsight.inspect.nets.attention import Attention, at_entry
from rollsight.inspect.nets.encoders import Lite0, lite0_stem, load_lite0_imagenet
from rollsight.inspect.nets.segmenter import Segmenter, Upsample, conv_norm_relu
from rollsight.inspect.tiles import CELL
from torch import Tensor, nn

WIDTH = 32  # channels that each scale's scores are summed in, at stride 2
DEEPEST = 128  # channels of the convolution at stride 16, the paper's fc6


class FCN(Segmenter):
    """FCN with skips down to stride 2 on EfficientNet-Lite0: Long et al. 2015, arXiv:1411.4038, fig. 3.

    (N, M, H, W) gray in [0, 1] of M lighting modes -> logits (N, classes + 1, H, W). The paper sums the
    scores of a 1x1 head for each scale. Nearest up-sampling, 1x1 convolutions and sums are linear, so the
    heads share their last factor here: each scale is brought to `WIDTH` channels, and one head reads the
    sum.
    """

    def __init__(self, classes: int, attention: Attention = "cbam") -> None:
        super().__init__()
        self.stem = lite0_stem()
        self.encoder = Lite0()
        at_2, at_4, at_8, at_16 = self.encoder.channels
        self.deepest = nn.Sequential(*conv_norm_relu(at_16, DEEPEST))
        self.attention = at_entry(attention, DEEPEST, CELL // 16)
        self.score_16 = nn.Conv2d(DEEPEST, WIDTH, kernel_size=1)
        self.score_8 = nn.Conv2d(at_8, WIDTH, kernel_size=1)
        self.score_4 = nn.Conv2d(at_4, WIDTH, kernel_size=1)
        self.score_2 = nn.Conv2d(at_2, WIDTH, kernel_size=1)
        self.upsample = Upsample(2)
        self.head = nn.Conv2d(WIDTH, 4 * (classes + 1), kernel_size=1)
        self.to_pixels = nn.PixelShuffle(2)

    def from_stem(self, features: Tensor) -> Tensor:
        at_2, at_4, at_8, at_16 = self.encoder(features)
        x = self.score_16(self.attention(self.deepest(at_16)))
        x = self.upsample(x) + self.score_8(at_8)
        x = self.upsample(x) + self.score_4(at_4)
        x = self.upsample(x) + self.score_2(at_2)
        return self.to_pixels(self.head(x))  # type: ignore[no-any-return]


def fcn(classes: int, attention: Attention = "cbam", pretrained: bool = False) -> FCN:
    """The FCN, `classes` defect classes; `pretrained` fills the encoder from ImageNet."""
    net = FCN(classes, attention)
    if pretrained:
        load_lite0_imagenet(net)
    return net
