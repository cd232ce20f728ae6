"""One forward pass as a graph: which activation was computed from which, by which operation and with which weight.

Operations are watched at torch's dispatcher. An activation that is rearranged, cut or multiplied by a number stays the
same node, and the graph keeps the new places of its entries. This shows that two modules take views of one tensor, and
over which axis of an activation, and of a weight, a product sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary
from transformers.pytorch_utils import Conv1D

from .model import axis_of_kind, floats_of, is_norm

# Operations whose result holds entries of their input, in other places or fewer of them.
REARRANGING = {
    "_to_copy", "_unsafe_view", "_reshape_alias", "alias", "as_strided", "cat", "chunk", "clone", "constant_pad_nd",
    "copy_", "detach", "expand", "flatten", "flip", "gather", "im2col", "index", "index_put_", "index_put",
    "index_select", "lift_fresh", "masked_fill", "masked_fill_", "masked_scatter", "masked_scatter_", "masked_select",
    "mean", "native_dropout", "neg", "permute", "pixel_shuffle", "pixel_unshuffle", "reflection_pad1d", "repeat",
    "repeat_interleave", "reshape", "roll", "scatter", "scatter_", "select", "slice", "slice_scatter", "split",
    "split_with_sizes", "squeeze", "squeeze_", "stack", "sum", "t", "take_along_dim", "transpose", "unbind", "unfold",
    "unsafe_split", "unsqueeze", "unsqueeze_", "view", "where", "zero_", "fill_",
}  # fmt: skip
_SUMS = {"add", "add_", "sub", "sub_", "rsub"}
_ROUTED_SUMS = {"index_add", "index_add_", "scatter_add", "scatter_add_"}
_SCALINGS = {"mul", "mul_", "div", "div_"}
_NORMS = {"native_layer_norm", "_fused_rms_norm", "native_batch_norm", "native_group_norm", "rms_norm", "layer_norm"}
_POINTWISE = {
    "relu", "relu_", "gelu", "silu", "silu_", "tanh", "sigmoid", "hardtanh", "hardswish", "hardswish_", "clamp",
    "clamp_min", "clamp_max", "leaky_relu", "elu", "avg_pool2d", "avg_pool1d", "_adaptive_avg_pool2d",
    "max_pool2d_with_indices", "upsample_bilinear2d", "upsample_nearest2d", "nan_to_num",
}  # fmt: skip
_SHAPE_ONLY = {"empty_like", "zeros_like", "ones_like", "full_like", "new_empty", "new_zeros", "new_ones", "new_full"}
# Kinds of nodes whose features lie on the same axis as the features of their parents.
_SAME_FEATURES = {"sum", "join", "scaled", "featurewise", "pointwise"}
_VIEWS = {"_unsafe_view", "_reshape_alias", "detach", "lift_fresh", "alias"}  # views that torch does not declare
# Product → the places of its two factors, the axis of the second that it sums over, and the axis that its result keeps.
_PRODUCTS = {
    "mm": (0, 1, 0, 1), "addmm": (1, 2, 0, 1), "bmm": (0, 1, 1, 2), "baddbmm": (1, 2, 1, 2), "linear": (0, 1, 1, 0),
    "_grouped_mm": (0, 1, 1, 2), "grouped_mm_fallback": (0, 1, 1, 2),
}  # fmt: skip
LINEAR = (nn.Linear.forward, Conv1D.forward)


@dataclass(frozen=True)
class WeightView:
    """A parameter, or a tensor that was cut out of it."""

    parameter: nn.Parameter
    # For each axis of the tensor the axis of the parameter, None if there is none; None if the axes are not known.
    axes: tuple[int | None, ...] | None


@dataclass(eq=False)
class Call:
    """One call of a module."""

    index: int  # Its number.
    name: str  # The name of the module.
    module: nn.Module
    outer_calls: tuple[int, ...] = ()  # The numbers of the calls that it was made in, from the outermost.
    inputs: tuple[Node, ...] = ()  # The nodes of the activations that it was called with.
    # The address, the shape and the strides of the first activation that it was called with.
    input_memory: tuple[Any, ...] = ()
    output: Node | None = None  # The node of the first activation that it returned.
    # `"input"` and `"output"`: the first activations taken and returned, with the places of their entries.
    values: dict[str, _Value] = field(default_factory=dict)
    # The linear layer that the module is, or that it wraps for another adapter; it may be quantised.
    linear: nn.Module | None = None
    is_atomic: bool = False  # Whether the module is such a layer or a norm, whose inner operations are not recorded.


@dataclass(frozen=True)
class Product:
    """A product of an activation with a weight."""

    owner: str  # The name of the module that has the weight and ran; empty if that module was not called.
    call: int  # The number of the call of the owner; -1 if it was not called.
    parameter: str  # The name of the weight in its module; its full name in the model if the module was not called.
    in_axis: int | None  # The axis of the weight that the product sums over.
    out_axis: int | None  # The axis of the weight along which the results lie.
    # Where the factors lie in the node: their axis (-1: several), the place of the first on it, and how many entries
    # behind the first each lies; None if the rows differ in this.
    pattern: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Weight:
    """A parameter that multiplies the input of its module, or that makes its output."""

    module: str  # The name of the module that takes the activation, or returns it.
    parameter: str  # The name of the parameter in the module.
    axis: int  # The axis of the parameter along which the features of the hidden state lie.


@dataclass(eq=False)
class Node:
    """An activation, with all tensors that show its entries."""

    index: int  # Its number, in the order in which nodes were made.
    # `"sum"`, `"join"` (cat and the like), `"scaled"` (by one number for each row), `"featurewise"` (linear in each
    # feature by itself), `"mixed"` (rows of the first parent, by computed weights), `"pointwise"`, `"norm"`, `"map"`,
    # `"parameter"`, `"constant"`, or `"opaque"`.
    kind: str
    operation: str  # The name of the dispatcher's operation, or of the module, that made it.
    parents: tuple[Node, ...]  # The nodes that it was made of.
    calls: tuple[int, ...]  # The numbers of the calls that ran, from the outermost.
    product: Product | None  # The weight of a map or a parameter.
    shape: tuple[int, ...]  # The shape of the tensor that was made.
    ancestors: int = 0  # The nodes that it was computed from: bit `i` stands for the node with index `i`.
    behind_weights: int = 0  # The nodes that it was computed from by way of a weight, as bits.
    is_zero: bool = False  # Whether it is a constant and zero.
    width: int = 0  # The number of features of a norm; 0 if not known.
    # The axes of the features, derived from its parents; several if it mixes along several.
    features: frozenset[int] = frozenset()


class Use(NamedTuple):
    """An operation on an activation that is not a plain view: it moved entries, or made another activation of them."""

    input: Node  # The node that it was called with.
    output: Node | None  # The node of its result; None if the result is not floating-point.
    operation: str  # The name of the dispatcher's operation, or of the module.
    calls: tuple[int, ...]  # The numbers of the calls that ran, from the outermost.


@dataclass(frozen=True)
class _Value:
    node: Node
    # The place of each entry in the node's tensor, from 1; 0 for an entry of another origin. None: all are in place.
    entries: Tensor | None
    time: int

    @property
    def shape(self) -> tuple[int, ...]:
        return self.node.shape if self.entries is None else tuple(self.entries.shape)

    def is_same(self, other: _Value) -> bool:
        """Whether both show the same entries in the same places."""
        same = self.node is other.node and self.shape == other.shape
        return same and (self.entries is other.entries or torch.equal(_places(self).cpu(), _places(other).cpu()))


class Graph(TorchDispatchMode):
    """Watches one forward pass of a model.

    Args:
        model: The model; its adapters do not take part.
        call: Makes the pass.

    Attributes:
        nodes: All activations, in the order in which they were made.
        calls: All calls of modules.
        uses: All operations on activations and parameters, in order.
        returned: The nodes that the model returns.
    """

    def __init__(self, model: nn.Module, call: Callable[[], Any]) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.calls: list[Call] = []
        self.uses: list[Use] = []
        self.returned: set[Node] = set()
        self._values = WeakTensorKeyDictionary()
        self._weight_views = WeakTensorKeyDictionary()
        self._owners = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
        # The last write into each storage; the tensor is kept, so that its memory is not used for another.
        self._last_writes: dict[int, tuple[int, Node, Tensor]] = {}
        self._stack: list[Call] = []
        self._atomic_depth = 0
        self._time = 0
        with ExitStack() as hooks:
            for name, module in model.named_modules():
                if isinstance(module, BaseTunerLayer) and "host" in module.__dict__:
                    # Adapters of this package are children of their modules; they are turned off.
                    hooks.callback(setattr, module, "_disable_adapters", module._disable_adapters)
                    module._disable_adapters = True
                if not hasattr(module, "host"):
                    enter, leave = partial(self._before_call, name), partial(self._after_call, name)
                    hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                    hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            with self:
                output = call()
        self.returned = {value.node for tensor in floats_of(output) if (value := self._values.get(tensor)) is not None}

    @cached_property
    def called(self) -> dict[str, list[Call]]:
        """Path → the calls of the module there and of the modules below it; a list has only the calls below it."""
        found: dict[str, list[Call]] = {}
        for call in self.calls:
            for end in accumulate(call.name.split("."), "{}.{}".format):
                found.setdefault(end, []).append(call)
        return found

    def features_at(self, host: nn.Module, side: str) -> set[int]:
        """The axes of the features at a side of a module, from the modules that take the activation, or from itself.

        Args:
            host: The module; the result is empty if it was not called.
            side: `"input"` or `"output"`.
        """
        own = next((call for call in self.calls if call.module is host), None)
        if own is None or side not in own.values:
            return set()
        value = own.values[side]
        takers = [call for call in self.calls if "input" in call.values and call.values["input"].is_same(value)]
        if side == "input" and value.node.kind == "constant":  # an input of the model gets a new node each time
            takers += [call for call in self.calls if call.input_memory == own.input_memory]
        kinds = {axis_of_kind(call.module, len(value.shape)) for call in takers} - {None}
        found = {axis for axis in kinds if axis is not None} or self._features_in(value)
        # The vector of a model's own kind of norm (such as one for each head) is as long as the axis that it scales.
        width = value.node.width if side == "output" and is_norm(host) else 0
        return found or {axis for axis, size in enumerate(value.shape) if size == width}

    def _features_in(self, value: _Value) -> set[int]:
        """The axes of a tensor along which all features of its node lie, in the order of the node."""
        if value.entries is None:
            return set(value.node.features)
        node, sizes = value.node, {value.node.shape[axis] for axis in value.node.features}
        axes = [axis for axis, size in enumerate(value.shape) if size in sizes]
        return {axis for axis in axes if whole_axis(_pattern(value, axis), node) in node.features}

    def _passed_features(self, name: str, args: tuple, tensor: Tensor, value: _Value, result: Tensor) -> set[int]:
        """The axes of a tensor's features in a result that is made of it, and of others, entry by entry."""
        axes = self._features_in(value)
        if name == "stack":
            at = (args[1] if len(args) > 1 else 0) % result.dim()
            return {axis + (axis >= at) for axis in axes}
        kept = {axis for axis in axes if name == "cat" or result.shape[axis - tensor.dim()] == tensor.shape[axis]}
        return {axis + result.dim() - tensor.dim() for axis in kept}

    # ---- modules -----------------------------------------------------------------------------------------------------

    def _before_call(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        call = Call(len(self.calls), name, module, tuple(outer.index for outer in self._stack))
        self.calls.append(call)
        self._stack.append(call)
        given = [] if self._atomic_depth else list(floats_of((args, kwargs)))
        call.inputs = tuple(self._value(t).node for t in given)
        if given:
            call.values["input"] = self._value(given[0])
            call.input_memory = given[0].data_ptr(), tuple(given[0].shape), given[0].stride()
        inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
        weight = inner._parameters.get("weight")
        is_float = weight is not None and weight.is_floating_point()
        is_quantised = not is_float and hasattr(inner, "in_features") and hasattr(inner, "out_features")
        call.linear = inner if type(inner).forward in LINEAR or is_quantised else None
        call.is_atomic = is_norm(module) or call.linear is not None
        self._atomic_depth += call.is_atomic

    def _after_call(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        call, state = self._stack[-1], output.get("last_hidden_state") if isinstance(output, dict) else None
        found = state if isinstance(state, Tensor) else next(floats_of(output), None)
        self._atomic_depth -= call.is_atomic
        if not self._atomic_depth and found is not None:
            if call.is_atomic:
                inputs = list(floats_of((args, kwargs)))
                nodes = dict(zip(map(id, inputs), call.inputs, strict=False)).values()
                if call.linear is None:
                    kind = "norm" if sum(node.kind != "constant" for node in nodes) == 1 else "opaque"
                    node = self._node(kind, name, nodes, found.shape)
                    sizes = {p.numel() for p in module.parameters() if p.numel() > 1}
                    node.width = sizes.pop() if len(sizes) == 1 else 0
                    axis = axis_of_kind(module, found.dim())
                    features = self._features_in(call.values["input"]) if axis is None and inputs else {axis}
                    node.features = frozenset(axis for axis in features if axis is not None)
                else:
                    pattern = _pattern(self._value(inputs[0]), inputs[0].dim() - 1, inputs[0])
                    in_axis = 0 if isinstance(call.linear, Conv1D) else 1
                    product = Product(name, call.index, "weight", in_axis, 1 - in_axis, pattern)
                    node = self._node("map", name, call.inputs[:1], found.shape, product, {found.dim() - 1})
                for tensor in floats_of(output):
                    self._values[tensor] = _Value(node, None, self._time)
                self.uses += [Use(taken, node, node.operation, node.calls) for taken in call.inputs]
            call.values["output"] = value = self._value(found)
            call.output = value.node
        self._stack.pop()

    # ---- values ------------------------------------------------------------------------------------------------------

    def _node(
        self,
        kind: str,
        operation: str,
        parents: Iterable[Node],
        shape: Sequence[int],
        product: Product | None = None,
        features: Iterable[int] = (),
    ) -> Node:
        parents = tuple(dict.fromkeys(parents))
        ancestors = behind_weights = 0
        for parent in parents:
            ancestors |= parent.ancestors | 1 << parent.index
            behind_weights |= parent.behind_weights
        behind_weights = ancestors if kind == "map" else behind_weights
        calls = tuple(call.index for call in self._stack)
        node = Node(len(self.nodes), kind, operation, parents, calls, product, tuple(shape), ancestors, behind_weights)
        node.features = frozenset(features)
        self.nodes.append(node)
        return node

    def _value(self, tensor: Tensor) -> _Value:
        """The value of a tensor; if nothing is known about it, it is a new parameter or constant."""
        value, written = self._values.get(tensor), self._last_writes.get(_storage(tensor))
        if written is not None and (value is None or value.time < written[0]):
            value = _Value(written[1], None, written[0])
            self._values[tensor] = value
        if value is None:
            view = self._weight_view(tensor)
            node = self._node("constant" if view is None else "parameter", "", (), tensor.shape)
            node.is_zero = view is None and not bool(tensor.any())
            if view is not None:
                last = view.axes[-1] if view.axes else None
                node.product = self._product(view, None, last)
                node.operation = self._owners.get(id(view.parameter), node.product.parameter)
            value = _Value(node, None, self._time)
            if view is not None:
                self._values[tensor] = value
        return value

    def _weight_view(self, tensor: Tensor) -> WeightView | None:
        if isinstance(tensor, nn.Parameter):
            return WeightView(tensor, tuple(range(tensor.dim())))
        return self._weight_views.get(tensor)

    def _product(self, view: WeightView, in_axis: int | None, out_axis: int | None, pattern: Any = None) -> Product:
        for call in reversed(self._stack):
            for name, own in call.module._parameters.items():
                if own is view.parameter:
                    return Product(call.name, call.index, name, in_axis, out_axis, pattern)
        return Product("", -1, self._owners.get(id(view.parameter), "a weight"), in_axis, out_axis, pattern)

    # ---- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [] if self._atomic_depth else list(floats_of((args, kwargs)))
        name = func.overloadpacket.__name__
        views = [self._weight_view(t) for t in inputs]
        is_weight = bool(inputs) and None not in views
        is_followed = any(views) or any(t in self._values or _storage(t) in self._last_writes for t in inputs)
        # They are taken before the operation, which may write over its input.
        values = {id(t): self._value(t) for t in inputs if is_followed and not is_weight and name not in _SHAPE_ONLY}
        output = func(*args, **kwargs)
        if inputs and name not in _SHAPE_ONLY and any(True for _ in floats_of(output)):
            self._time += 1
            weight: Any = next((h for h in views if h is not None), None)
            if is_weight and name != "embedding":
                for made in floats_of(output):
                    has_axes = weight.axes is not None and len(inputs) == 1
                    axes = _axes_after(func, args, weight.axes, made) if has_axes else None
                    self._weight_views[made] = WeightView(weight.parameter, axes)
            elif is_weight:
                product = self._product(weight, None, weight.axes[-1] if weight.axes else None)
                node = self._node("map", name, (), output.shape, product, {output.dim() - 1})
                self._values[output] = _Value(node, None, self._time)
            elif values:
                made, count = next(floats_of(output)), len(self.nodes)
                node, entries = self._result_node(func, name, args, kwargs, inputs, values, made)
                if node.index >= count and not node.features and (node.kind in _SAME_FEATURES or name in _SCALINGS):
                    passed = (self._passed_features(name, args, tensor, values[id(tensor)], made) for tensor in inputs)
                    node.features = frozenset().union(*passed)
                shown = list(floats_of(entries))
                for number, tensor in enumerate(floats_of(output)):
                    self._values[tensor] = _Value(node, shown[number] if shown else None, self._time)
                if any(out is t for out in floats_of(output) for t in inputs) or "out" in kwargs:
                    self._last_writes[_storage(made)] = (self._time, node, made)
        if not (func.is_view or name in _VIEWS):
            result = next((self._value(t).node for t in floats_of(output)), None) if values else None
            calls = tuple(call.index for call in self._stack)
            self.uses += [Use(value.node, result, name, calls) for value in values.values()]
        return output

    def _result_node(
        self, func: Any, name: str, args: tuple, kwargs: dict, inputs: list[Tensor], values: dict, result: Tensor
    ) -> tuple[Node, Any]:
        nodes = [values[id(t)].node for t in inputs]
        terms = [node for node in dict.fromkeys(nodes) if not node.is_zero]
        if name in _PRODUCTS or name == "convolution":
            if (product := self._product_node(name, args, values, result)) is not None:
                return product, None
            if name == "convolution":  # its weight is computed, such as a standardised one
                return self._node("opaque", name, terms, result.shape, features={1}), None
            if name == "bmm" and self._weight_view(args[0]) is None and self._weight_view(args[1]) is None:
                return self._node("mixed", name, nodes[::-1], result.shape), None
        if name in _NORMS and nodes[0].kind != "constant":
            axis = 1 if name in ("native_batch_norm", "native_group_norm") else result.dim() - 1
            return self._node("norm", name, nodes[:1], result.shape, features={axis}), None
        adds_nothing = name in _SUMS and len(inputs) == 1 and isinstance(args[1], (int, float)) and not args[1]
        if adds_nothing and result.shape == inputs[0].shape:
            return terms[0], values[id(inputs[0])].entries
        if name in _SUMS and len(inputs) > 1:
            if len(terms) == 1 and nodes.count(terms[0]) == 1 and result.shape == inputs[nodes.index(terms[0])].shape:
                return terms[0], values[id(inputs[nodes.index(terms[0])])].entries
            return self._node("sum", name, nodes, result.shape), None
        if name in _ROUTED_SUMS:
            return self._node("sum", name, terms, result.shape), None
        if name in _SCALINGS:
            return self._scaled_node(name, inputs, values, result)
        if name in REARRANGING:
            return self._rearranged_node(func, name, args, kwargs, terms, values, result)
        activations = [node for node in terms if node.kind not in ("constant", "parameter")]
        is_pointwise = name in _POINTWISE and len(activations) == 1
        return self._node("pointwise" if is_pointwise else "opaque", name, terms, result.shape), None

    def _product_node(self, name: str, args: tuple, values: dict, result: Tensor) -> Node | None:
        """The node of a product with a weight, or of a convolution of each channel by itself; None for others."""
        if name == "convolution":
            factor, view, axis, out = args[0], self._weight_view(args[1]), 1, 1
            if args[8] > 1:
                is_featurewise = args[8] == args[0].shape[1] == args[1].shape[0]
                nodes = [value.node for value in values.values()]
                return self._node("featurewise", name, nodes, result.shape) if is_featurewise else None
            in_axis, out_axis = (0, 1) if args[6] else (1, 0)
        else:
            first, second, in_axis, out_axis = _PRODUCTS[name]
            factor, view = args[first], self._weight_view(args[second])
            axis, out = factor.dim() - 1, result.dim() - 1
            if view is None:  # the weight comes first
                factor, view = args[second], self._weight_view(args[first])
                axis, out, in_axis, out_axis = factor.dim() - 2, out - 1, args[first].dim() - 1, args[first].dim() - 2
        if view is None or view.axes is None or id(factor) not in values:
            return None
        ends: list[int | None] = []
        for end, size in ((in_axis, factor.shape[axis]), (out_axis, result.shape[out])):
            at = view.axes[end]  # counts if the whole axis is there
            ends.append(at if at is not None and view.parameter.shape[at] == size else None)
        product = self._product(view, ends[0], ends[1], _pattern(values[id(factor)], axis, factor))
        return self._node("map", name, [values[id(factor)].node], result.shape, product, {out})

    def _scaled_node(self, name: str, inputs: list[Tensor], values: dict, result: Tensor) -> tuple[Node, Any]:
        if len(inputs) == 1:
            return values[id(inputs[0])].node, values[id(inputs[0])].entries
        if inputs[0] is inputs[1]:
            return self._node("opaque", name, [values[id(inputs[0])].node], result.shape), None
        for tensor, other in (inputs, inputs[::-1]):
            value, by = values[id(tensor)], values[id(other)].node
            if tensor.shape == result.shape and other.numel() == 1:
                return value.node, value.entries
            sizes = (*[1] * (result.dim() - other.dim()), *other.shape)
            is_fixed = by.kind in ("constant", "parameter")
            # A parameter may have a number for each feature, on any axis.
            is_row = tensor.shape[-1:] == result.shape[-1:] and sizes[-1] == 1 and by.kind != "parameter"
            is_pixel = result.dim() == 4 and tensor.shape == result.shape and sizes[1] == 1 and not is_fixed
            kind = "scaled" if is_row or is_pixel else "featurewise" if is_fixed else ""
            if kind and value.node.kind not in ("constant", "parameter"):
                return self._node(kind, name, [value.node, by], result.shape), None
        return self._node("opaque", name, [values[id(t)].node for t in inputs], result.shape), None

    def _rearranged_node(
        self, func: Any, name: str, args: tuple, kwargs: dict, terms: list[Node], values: dict, result: Tensor
    ) -> tuple[Node, Any]:
        if name == "copy_":  # the former content does not count
            value = values[id(args[1])] if isinstance(args[1], Tensor) and id(args[1]) in values else None
            if value is not None and args[1].shape == result.shape:
                return value.node, value.entries
        if name in ("zero_", "fill_"):
            node = self._node("constant", name, (), result.shape)
            node.is_zero = name == "zero_" or not args[1]
            return node, None
        if len(terms) != 1:
            return self._node("join", name, terms, result.shape), None
        if name.startswith(("masked_fill", "neg")):
            return terms[0], next(v.entries for v in values.values() if v.node is terms[0])

        places = {}
        for part in floats_of((args, kwargs)):
            if (value := values.get(id(part))) is not None:
                nothing = torch.zeros_like(part, dtype=torch.float64)
                places[id(part)] = _places(value, part).clone() if value.node is terms[0] else nothing
        try:
            if name in ("sum", "mean"):
                return terms[0], _places(values[id(args[0])], args[0]).amax(*args[1:2] or ((),), *args[2:3])
            other = {key: value for key, value in kwargs.items() if key != "dtype"} if name == "_to_copy" else kwargs
            moved = tree_map(lambda part: places.get(id(part), part), (args, other))
            return terms[0], func(*moved[0], **moved[1])
        except (RuntimeError, TypeError, NotImplementedError):
            return self._node("join", name, terms, result.shape), None


# ---- where entries are -----------------------------------------------------------------------------------------------


def _places(value: _Value, tensor: Tensor | None = None) -> Tensor:
    """The place in the node of each entry of a tensor, from 1; float64, with the strides of the tensor if it is given.

    With other strides, an operation that views the tensor may fail on the places.
    """
    if value.entries is not None and (tensor is None or value.entries.shape == tensor.shape):
        return value.entries
    tensor = torch.empty(value.node.shape, device="cpu") if tensor is None else tensor
    places = torch.arange(1, tensor.numel() + 1, dtype=torch.float64, device=tensor.device)
    return torch.empty_like(tensor, dtype=torch.float64).copy_(places.view(tensor.shape))


def _pattern(value: _Value, axis: int, tensor: Tensor | None = None) -> tuple[int, ...] | None:
    """Where the entries along an axis lie in the node; see `Product.pattern`."""
    node = value.node
    behind = [math.prod(node.shape[n + 1 :]) for n in range(len(node.shape))]
    is_whole = value.entries is None and 0 not in node.shape and (tensor is None or tensor.shape == node.shape)
    if is_whole and node.shape[axis] > 1:  # a short way to the result of the lines below
        return (axis % len(node.shape), 0, *range(0, node.shape[axis] * behind[axis], behind[axis]))
    shown = _places(value, tensor)
    if not shown.numel():
        return None
    rows = shown.movedim(axis, -1).reshape(-1, shown.shape[axis])
    rows = rows[(rows > 0).all(dim=1)]
    steps = rows - rows[:, :1]
    if not len(rows) or not bool((steps == steps[0]).all()):
        return None
    found = steps[0].long().tolist()
    along = [n for n, size in enumerate(node.shape) if size > 1 and behind[n] == found[-1] / max(len(found) - 1, 1)]
    if not along:
        return (-1, 0, *found)  # several axes in one
    first = (rows[:, 0].long() - 1) // behind[along[0]] % node.shape[along[0]]
    return (along[0], int(first[0]), *found) if bool((first == first[0]).all()) else None


def whole_axis(pattern: tuple[int, ...] | None, node: Node) -> int | None:
    """The axis of a node if a pattern has all entries along it, in their order; None if there is no such axis."""
    if pattern is None or pattern[0] < 0 or pattern[1] != 0:
        return None
    return pattern[0] if len(pattern) - 2 == node.shape[pattern[0]] else None


def _axes_after(func: Any, args: tuple, axes: tuple[int | None, ...], result: Tensor) -> tuple[int | None, ...] | None:
    """For each axis of a tensor after an operation its axis of the parameter; None if that cannot be told."""
    tensor, name = args[0], func.overloadpacket.__name__
    if name in ("clone", "_to_copy", "index_select"):
        return axes
    if name == "index" and result.dim() >= len(axes) - 1 and all(i is None for i in args[1][1:]):
        return (*[None] * (result.dim() - len(axes) + 1), *axes[1:])
    if not (func.is_view or name in _VIEWS):
        return None
    # An axis of a view is known by its stride and its length; one that is cut keeps the stride alone.
    is_cut = name in ("slice", "split", "split_with_sizes", "chunk")
    old, new = (
        [(n, 0 if is_cut else size) for n, size in zip(t.stride(), t.shape, strict=True)] for t in (tensor, result)
    )
    known = {place: axis for place, size, axis in zip(old, tensor.shape, axes, strict=True) if size > 1}
    return tuple(known.get(place) for place in new)


def _storage(tensor: Tensor) -> int:
    if tensor.device.type == "meta" or tensor.layout != torch.strided:
        return -1
    return tensor.untyped_storage().data_ptr() or -1


# ---- experts that a pass has not run ---------------------------------------------------------------------------------


def sibling_experts(model: nn.Module, graph: Graph, weights: Iterable[Weight]) -> Iterator[Weight]:
    """The weights of the experts beside those of `weights` that no token of the pass has chosen."""
    for weight in weights:
        for child, rest in siblings(model, weight.module):
            if child in graph.called:
                continue
            inside = dict(model.get_submodule(child).named_modules(remove_duplicate=False))
            found = inside.get(".".join(rest))
            if found is not None and weight.parameter in found._parameters:
                yield replace(weight, module=".".join([child, *rest]))


def siblings(model: nn.Module, module: str) -> Iterator[tuple[str, list[str]]]:
    """The other modules in the lists that hold a module, each with the rest of the module's path."""
    path = module.split(".")
    for depth in range(1, len(path)):
        container = model.get_submodule(".".join(path[:depth]))
        for name in container._modules if isinstance(container, (nn.ModuleList, nn.ModuleDict)) else ():
            if name != path[depth]:
                yield ".".join([*path[:depth], name]), path[depth + 1 :]
