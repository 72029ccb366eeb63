"""How far a net sees, computed from its graph: the halo that a tile needs so that its core is exact."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rollsight.inspect.nets.attention import ChannelConv
from rollsight.inspect.nets.encoders import SameConv
from rollsight.inspect.nets.segmenter import Conv, Upsample
from rollsight.inspect.tiles import CELL, up_to_cell
from torch import fx, nn

# Operations whose output pixel depends on the input pixel at the same place only.
POINTWISE_MODULES = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Hardswish, nn.Identity, ChannelConv)
LEAVES = (Conv, ChannelConv, Upsample)  # of our own: seen as single operations
POINTWISE_FUNCTIONS = {torch.sigmoid, F.relu, operator.add, operator.mul, operator.sub, operator.truediv}
OVER_CHANNELS = {torch.cat, "mean", "amax"}  # the same where they work on axis 1: channels or modes
LEADING_AXES = {"flatten": (0, 1), "unflatten": (0,), "unsqueeze": (1,)}  # the axes that leave pixels alone


@dataclass(frozen=True, slots=True)
class _Span:
    """A half-open interval of positions along one axis of one tensor."""

    start: int
    stop: int

    def join(self, other: "_Span") -> "_Span":
        return _Span(min(self.start, other.start), max(self.stop, other.stop))

    def shifted(self, by: int) -> "_Span":
        return _Span(self.start + by, self.stop + by)


class _LeafTracer(fx.Tracer):
    """Sees the convolutions as single operations, our own too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LEAVES) or super().is_leaf_module(m, module_qualified_name)


def halo_px(net: nn.Module, cell: int = CELL) -> int:
    """The halo that makes a cell-aligned core independent of its surroundings, in px, a multiple of `cell`.

    `radius_px`, up to the cell; raises what that does.
    """
    return up_to_cell(radius_px(net, cell), cell)


def radius_px(net: nn.Module, cell: int = CELL) -> int:
    """How far beyond a cell-aligned core the net looks, in px: the radius of its receptive field.

    Walks the graph from the output back to the input with the interval of positions each operation
    needs. Cell-wise pooling widens the interval to whole cells, so the figure is exact for cores and
    windows on the cell grid, which is all the scan uses. Perturbing a pixel gives only a lower bound;
    this is the bound that holds for all inputs. Raises ValueError for an operation whose reach it does
    not know (GroupNorm, global pooling, ...) and for a grid of its own that is coarser than the cell:
    such a net cannot be scanned in tiles.
    """
    graph = _LeafTracer().trace(net)
    modules = dict(net.named_modules())
    core = _Span(0, 64 * cell)
    radius = 0
    for axis in (0, 1):
        span = _input_span(graph, modules, core, axis)
        if _input_span(graph, modules, core.shifted(cell), axis) != span.shifted(cell):
            raise ValueError(
                f"this net pools or strides over more than the {cell} px cell: it cannot be scanned in tiles"
            )
        radius = max(radius, -span.start, span.stop - core.stop)
    return radius


def _input_span(graph: fx.Graph, modules: dict[str, nn.Module], core: _Span, axis: int) -> _Span:
    """What the net needs of its input for the pixels `core` of its output, along lines (0) or across (1)."""
    needs: dict[fx.Node, _Span] = {}
    seen = core
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            needs |= dict.fromkeys(node.all_input_nodes, core)
        elif node in needs and node.op == "placeholder":
            seen = seen.join(needs[node])
        elif node in needs:
            source_span = _before(node, modules, axis)(needs[node])
            for source in node.all_input_nodes:
                if not _is_shape(source):
                    needs[source] = needs.get(source, source_span).join(source_span)
    return seen


def _is_shape(node: fx.Node) -> bool:
    """Whether the node holds a size, not pixels."""
    if node.op != "call_function":
        return False
    if node.target is getattr:
        return node.args[1] == "shape"
    return node.target is operator.getitem and _is_shape(node.all_input_nodes[0])


def _before(node: fx.Node, modules: dict[str, nn.Module], axis: int) -> Callable[[_Span], _Span]:
    """What the operation needs of its input for a span of its output."""
    if node.op == "call_module":
        return _before_module(modules[str(node.target)], str(node.target), axis)
    if node.target in POINTWISE_FUNCTIONS or (node.target in OVER_CHANNELS and node.kwargs.get("dim") == 1):
        return _same
    axes = LEADING_AXES.get(str(node.target), ())
    if axes and node.args[1 : 1 + len(axes)] == axes:
        return _same
    raise ValueError(
        f"the reach of {node.op} {node.target} is not known: this net cannot be scanned in tiles"
    )


def _before_module(module: nn.Module, name: str, axis: int) -> Callable[[_Span], _Span]:
    if isinstance(module, nn.Conv2d) and not isinstance(module.padding, str):
        padding = module.same[0] if isinstance(module, SameConv) else module.padding[axis]
        return _convolved(module.kernel_size[axis], module.stride[axis], padding, module.dilation[axis])
    if isinstance(module, nn.PixelShuffle):
        return _upsampled(module.upscale_factor)
    if isinstance(module, nn.Upsample) and module.mode == "nearest" and module.scale_factor in (2, 4, 8, 16):
        return _upsampled(int(module.scale_factor))
    if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)):
        size = module.kernel_size
        if isinstance(size, int) and module.stride == size and module.padding == 0:
            return _pooled(size)
    if isinstance(module, POINTWISE_MODULES) and getattr(module, "track_running_stats", True):
        return _same
    raise ValueError(
        f"the reach of {type(module).__name__} ({name}) is not known: this net cannot be scanned in tiles"
    )


def _same(span: _Span) -> _Span:
    return span


def _convolved(kernel: int, stride: int, padding: int, dilation: int) -> Callable[[_Span], _Span]:
    def before(span: _Span) -> _Span:
        first = span.start * stride - padding
        return _Span(first, (span.stop - 1) * stride - padding + (kernel - 1) * dilation + 1)

    return before


def _upsampled(factor: int) -> Callable[[_Span], _Span]:
    return lambda span: _Span(span.start // factor, (span.stop - 1) // factor + 1)


def _pooled(size: int) -> Callable[[_Span], _Span]:
    return lambda span: _Span(span.start * size, span.stop * size)
