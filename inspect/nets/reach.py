"""How far a net sees, computed from its graph: the halo that a tile needs so that its core is exact."""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import fx, nn

from rollsight.inspect.nets.encoders import SameConv
from rollsight.inspect.tiles import CELL, up_to_cell

# Operations whose output pixel depends on the input pixel at the same place only.
POINTWISE_MODULES = (nn.BatchNorm2d, nn.ReLU, nn.ReLU6, nn.Identity)
POINTWISE_FUNCTIONS = {torch.cat, torch.sigmoid, F.relu, operator.add, operator.mul, operator.sub, operator.truediv}
POINTWISE_METHODS = {"mean", "amax"}  # over channels or modes: checked below
SHAPE_FUNCTIONS = {getattr, operator.getitem}
SHAPE_METHODS = {"flatten", "unflatten", "unsqueeze"}  # of the leading axes


@dataclass(frozen=True, slots=True)
class _Span:
    """A half-open interval of positions along one axis of one tensor."""

    start: int
    stop: int

    def join(self, other: "_Span") -> "_Span":
        return _Span(min(self.start, other.start), max(self.stop, other.stop))


class _LeafTracer(fx.Tracer):
    """Sees the convolutions as single operations, our own with their asymmetric padding too."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, SameConv) or super().is_leaf_module(m, module_qualified_name)


def halo_px(net: nn.Module, cell: int = CELL) -> int:
    """The halo that makes a cell-aligned core independent of its surroundings, in px, a multiple of `cell`.

    Walks the graph from the output back to the input with the interval of positions each operation
    needs. Cell-wise pooling widens the interval to whole cells, so the figure is exact for cores and
    windows on the cell grid, which is all the scan uses. Perturbing a pixel gives only a lower bound;
    this is the bound that holds for all inputs. Raises ValueError for an operation whose reach it does
    not know (GroupNorm, global pooling, ...): such a net cannot be scanned in tiles.
    """
    core = 64 * cell
    graph = _LeafTracer().trace(net)
    modules = dict(net.named_modules())
    needs: dict[fx.Node, _Span] = {}
    halo = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            (source,) = node.all_input_nodes
            needs[source] = _Span(0, core)
            continue
        if node not in needs or _is_shape(node):
            continue
        span = needs[node]
        if node.op == "placeholder":
            halo = max(halo, -span.start, span.stop - core)
            continue
        source_span = _before(node, modules)(span)
        for source in node.all_input_nodes:
            if not _is_shape(source):
                needs[source] = needs.get(source, source_span).join(source_span)
    return up_to_cell(halo, cell)


def _is_shape(node: fx.Node) -> bool:
    """Whether the node holds a size, not pixels."""
    if node.op == "call_function" and node.target is getattr:
        return True
    return node.op == "call_function" and node.target is operator.getitem and _is_shape(node.all_input_nodes[0])


def _before(node: fx.Node, modules: dict[str, nn.Module]) -> Callable[[_Span], _Span]:
    """What the operation needs of its input for a span of its output."""
    if node.op == "call_module":
        return _before_module(modules[str(node.target)], str(node.target))
    if node.op == "call_method" and node.target in SHAPE_METHODS:
        return _same
    if node.op == "call_method" and node.target in POINTWISE_METHODS and node.kwargs.get("dim") == 1:
        return _same
    if node.op == "call_function" and node.target in POINTWISE_FUNCTIONS | SHAPE_FUNCTIONS:
        return _same
    raise ValueError(f"the reach of {node.op} {node.target} is not known: this net cannot be scanned in tiles")


def _before_module(module: nn.Module, name: str) -> Callable[[_Span], _Span]:
    if isinstance(module, SameConv):
        return _convolved(module.kernel_size[0], module.stride[0], module.same[0], module.dilation[0])
    if isinstance(module, nn.Conv2d):
        return _convolved(module.kernel_size[0], module.stride[0], int(module.padding[0]), module.dilation[0])
    if isinstance(module, nn.PixelShuffle):
        return _upsampled(module.upscale_factor)
    if isinstance(module, nn.Upsample) and module.mode == "nearest":
        return _upsampled(int(module.scale_factor))  # type: ignore[arg-type]
    if isinstance(module, (nn.AvgPool2d, nn.MaxPool2d)) and module.padding == 0:
        return _pooled(int(module.kernel_size))  # type: ignore[arg-type]
    if isinstance(module, POINTWISE_MODULES):
        return _same
    raise ValueError(f"the reach of {type(module).__name__} ({name}) is not known: this net cannot be scanned in tiles")


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
