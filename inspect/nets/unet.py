"""U-Nets for strip: encoder, decoder with skips, attention where a tiled scan can carry it."""

from itertools import pairwise

from rollsight.inspect.nets.attention import Attention, at_entry
from rollsight.inspect.nets.encoders import Lite0, lite0_stem, load_lite0_imagenet
from rollsight.inspect.nets.segmenter import Segmenter, Up, conv_norm_relu, he_init
from rollsight.inspect.tiles import CELL
from torch import Tensor, nn

DECODER = (64, 48, 32)  # channels of unet_lite's decoder at strides 8, 4, 2
WIDTHS = (16, 32, 64, 128, 256)  # channels of unet at strides 1, 2, 4, 8, 16: a quarter of the paper's


class UNetLite(Segmenter):
    """U-Net on EfficientNet-Lite0 with attention at the decoder's entry.

    (N, M, H, W) gray in [0, 1] of M lighting modes -> logits (N, classes + 1, H, W). CBAM's 5x5 spatial
    attention and two convolutions at strides 8 and 4 keep the decoder's reach within one cell: the halo is
    256 px, with a 7x7 it would be 320.
    """

    def __init__(self, classes: int, attention: Attention = "cbam") -> None:
        super().__init__()
        self.stem = lite0_stem()
        self.encoder = Lite0()
        at_2, at_4, at_8, at_16 = self.encoder.channels
        self.attention = at_entry(attention, at_16, CELL // 16)
        self.up_8 = Up(at_16, at_8, DECODER[0], convs=2)
        self.up_4 = Up(DECODER[0], at_4, DECODER[1], convs=2)
        self.up_2 = Up(DECODER[1], at_2, DECODER[2], convs=1)
        self.head = nn.Conv2d(DECODER[2], 4 * (classes + 1), kernel_size=1)
        self.to_pixels = nn.PixelShuffle(2)  # each feature at stride 2 decides its own 2x2 pixels

    def from_stem(self, features: Tensor) -> Tensor:
        at_2, at_4, at_8, at_16 = self.encoder(features)
        x = self.up_8(self.attention(at_16), at_8)
        x = self.up_4(x, at_4)
        x = self.up_2(x, at_2)
        return self.to_pixels(self.head(x))  # type: ignore[no-any-return]


class UNet(Segmenter):
    """The classic U-Net of dense 3x3 convolutions, with BatchNorm: Ronneberger et al. 2015, arXiv:1505.04597.

    (N, M, H, W) gray in [0, 1] of M lighting modes -> logits (N, classes + 1, H, W), decided at full
    resolution. Padded convolutions and nearest up-sampling in place of valid ones and of up-convolutions.
    `auxiliary` gives the logits of the coarser depths for deep supervision (Lee et al. 2015,
    arXiv:1409.5185): each depth is brought to the head's width and judged by the same head.
    """

    def __init__(self, classes: int, attention: Attention = "cbam") -> None:
        super().__init__()
        self.stem = _twice(1, WIDTHS[0])
        self.encoder = nn.ModuleList(
            nn.Sequential(nn.MaxPool2d(2), _twice(channels, out)) for channels, out in pairwise(WIDTHS)
        )
        self.attention = at_entry(attention, WIDTHS[-1], CELL // 16)
        self.decoder = nn.ModuleList(Up(below, skip, skip, convs=2) for skip, below in pairwise(WIDTHS))
        self.depths = nn.ModuleList(nn.Conv2d(width, WIDTHS[0], kernel_size=1) for width in WIDTHS[1:-1])
        self.spread = nn.ModuleList(nn.Upsample(scale_factor=2.0**i) for i in range(1, len(WIDTHS) - 1))
        self.head = nn.Conv2d(WIDTHS[0], classes + 1, kernel_size=1)
        he_init(self)

    def from_stem(self, features: Tensor) -> Tensor:
        return self.head(self._decoded(features)[0])  # type: ignore[no-any-return]

    def auxiliary(self, x: Tensor) -> list[Tensor]:
        """Logits (N, K + 1, H, W) of each supervised depth, strides 1, 2, 4, 8: the net's own come first."""
        finest, *coarser = self._decoded(self.mean_stem(x))
        depths = zip(coarser, self.depths, self.spread, strict=True)
        return [self.head(finest), *(spread(self.head(project(y))) for y, project, spread in depths)]

    def _decoded(self, features: Tensor) -> list[Tensor]:
        """The decoder's features at strides 1, 2, 4, 8."""
        skips = [features]
        for stage in self.encoder:
            skips.append(stage(skips[-1]))
        x = self.attention(skips.pop())
        decoded: list[Tensor] = []
        for up in reversed(self.decoder):
            x = up(x, skips.pop())
            decoded.insert(0, x)
        return decoded


def unet_lite(classes: int, attention: Attention = "cbam", pretrained: bool = False) -> UNetLite:
    """The default segmenter, `classes` defect classes; `pretrained` fills the encoder from ImageNet."""
    net = UNetLite(classes, attention)
    if pretrained:
        load_lite0_imagenet(net)
    return net


def unet(classes: int, attention: Attention = "cbam", pretrained: bool = False) -> UNet:
    """The classic U-Net, `classes` defect classes; no pretrained weights exist, so it begins from nothing."""
    return UNet(classes, attention)


def _twice(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(*conv_norm_relu(channels, out), *conv_norm_relu(out, out))
