"""U-Nets for strip: encoder, decoder with skips, attention where a tiled scan can carry it."""

from typing import Literal, get_args

import torch
from rollsight.inspect.nets.attention import CBAM
from rollsight.inspect.nets.encoders import Lite0, lite0_stem, load_lite0_imagenet
from rollsight.inspect.tiles import CELL
from torch import Tensor, nn

Attention = Literal["none", "cbam"]
DECODER = (64, 48, 32)  # channels at strides 8, 4, 2


class Up(nn.Module):
    """Double the resolution, fuse the skip: (N, C, H, W), (N, S, 2H, 2W) -> (N, out, 2H, 2W)."""

    def __init__(self, channels: int, skip: int, out: int, convs: int) -> None:
        super().__init__()
        # Nearest: bilinear differs by 1e-6 between window shapes (measured).
        self.upsample = nn.Upsample(scale_factor=2.0)
        layers: list[nn.Module] = []
        for i in range(convs):
            inputs = channels + skip if i == 0 else out
            layers += [nn.Conv2d(inputs, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        self.fuse = nn.Sequential(*layers)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        return self.fuse(torch.cat([self.upsample(x), skip], dim=1))  # type: ignore[no-any-return]


class UNetLite(nn.Module):
    """U-Net on EfficientNet-Lite0 with CBAM at the decoder's entry.

    (N, M, H, W) gray in [0, 1] of M lighting modes -> logits (N, classes + 1, H, W), background first.
    H and W are multiples of the cell (64 px). The stem is shared by the modes and averaged over them, so
    one model takes any number. The 5x5 spatial attention and two convolutions at strides 8 and 4 keep the
    decoder's reach within one cell: the halo is 256 px, with a 7x7 it would be 320.
    """

    def __init__(self, classes: int, attention: Attention = "cbam") -> None:
        super().__init__()
        if attention not in get_args(Attention):
            raise ValueError(
                f"attention is {attention!r}: it must be one of {', '.join(get_args(Attention))}"
            )
        self.stem = lite0_stem()
        self.encoder = Lite0()
        at_2, at_4, at_8, at_16 = self.encoder.channels
        self.attention = CBAM(at_16, CELL // 16) if attention == "cbam" else nn.Identity()
        self.up_8 = Up(at_16, at_8, DECODER[0], convs=2)
        self.up_4 = Up(DECODER[0], at_4, DECODER[1], convs=2)
        self.up_2 = Up(DECODER[1], at_2, DECODER[2], convs=1)
        self.head = nn.Conv2d(DECODER[2], 4 * (classes + 1), kernel_size=1)
        self.to_pixels = nn.PixelShuffle(2)  # each feature at stride 2 decides its own 2x2 pixels

    def forward(self, x: Tensor) -> Tensor:
        modes = x.shape[1]
        planes = self.stem_of(x.flatten(0, 1).unsqueeze(1))  # (N * M, 32, H / 2, W / 2)
        features = planes.unflatten(0, (-1, modes)).mean(dim=1)  # type: ignore[no-untyped-call]
        return self.from_stem(features)

    def stem_of(self, plane: Tensor) -> Tensor:
        """The stem's features of gray planes: (M, 1, H, W) in [0, 1] -> (M, 32, H / 2, W / 2)."""
        return self.stem((plane - 0.498) / 0.502)  # type: ignore[no-any-return]  # Lite's (x - 127) / 128

    def from_stem(self, features: Tensor) -> Tensor:
        """Logits from the stem's features averaged over modes: (N, 32, H / 2, W / 2) -> (N, K + 1, H, W)."""
        at_2, at_4, at_8, at_16 = self.encoder(features)
        x = self.up_8(self.attention(at_16), at_8)
        x = self.up_4(x, at_4)
        x = self.up_2(x, at_2)
        return self.to_pixels(self.head(x))  # type: ignore[no-any-return]


def unet_lite(classes: int, attention: Attention = "cbam", pretrained: bool = False) -> UNetLite:
    """The default segmenter, `classes` defect classes; `pretrained` fills the encoder from ImageNet."""
    net = UNetLite(classes, attention)
    if pretrained:
        load_lite0_imagenet(net.stem, net.encoder)
    return net
