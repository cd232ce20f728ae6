"""Finds the linear maps at the ends of a model's sublayers: those that read the hidden state, and those that write it.

The residual stream is found by its sums: a branch is added to the tensor from which it was computed by way of weights.
A map reads the stream if its input is the stream or a norm of it, without another map in between. A map writes the
stream if its output is added to it, at most rearranged or scaled. Erasing before all readers, or behind all writers,
removes a concept from the inputs of the sublayers and the head, and can be merged into the weights of linear maps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Set
from typing import Any

from torch import nn

from .dummy import dummy_batch
from .graph import Graph, Node, Product, Weight, sibling_experts, siblings
from .model import MEDIA, bare_model

# Kinds of nodes that change each feature, or each row, by itself.
_PER_FEATURE = {"norm", "scaled", "featurewise", "pointwise"}
_SUMS = {"sum", "join"}


def readers_of(model: nn.Module) -> list[list[Weight]]:
    """The linear maps that read the hidden state, grouped by the tensor that they read, in the order of their calls.

    The maps of a group share one eraser. Views of a tensor in other shapes, such as flat rows and sequences, are other
    groups, since the place of an example's rows depends on the shape. Experts that take some rows each are one group,
    with the experts that the pass did not call. If a module is called several times, the tensors that it reads are one
    group, since a module has one eraser at its input. A map is left out with a warning if its module takes the tensor
    in other ways too (torch's attention, which is called with it three times) or is not called. Parts that the pass
    does not run, such as towers for images beside a text, are not seen.

    Raises:
        ValueError: If no linear map reads the hidden state.
    """
    groups = _Streams(model).readers()
    if not groups:
        raise ValueError(
            f"No linear map of {type(model).__name__} reads a hidden state that others add to, so there is nothing for "
            "target_modules='readers'. Name the modules instead, or leave target_modules out to erase at the norms."
        )
    return groups


def writers_of(model: nn.Module) -> list[Weight]:
    """The linear maps whose outputs are added to the residual stream, embeddings included.

    The weights of one module share one eraser, at its output. The bias of experts is a parameter with a name of its
    own, and is returned too.

    Raises:
        ValueError: If there are no such maps, or if a tensor from elsewhere is added to the stream or begins it: then
            erasing at the maps does not guard the stream.
    """
    return _Streams(model).writers()


class _Streams:
    """What the graph of one pass shows about the hidden state."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        graphs: list[Graph] = []
        batch = dummy_batch(model, lambda call: graphs.append(Graph(model, call)))
        self._graph = graphs[0]
        base = bare_model(model)
        media = [name for name, method in MEDIA.items() if hasattr(base, method)]
        # An input that a text may have, such as images, and that the pass did not have.
        self._unfed_input = next((name for name in media if "input_ids" in batch and not batch.keys() & {*media}), None)
        nodes = self._graph.nodes
        self._results_of: dict[Node, list[Node]] = {node: [] for node in nodes}
        for node in nodes:
            for parent in node.parents:
                self._results_of[parent].append(node)
        self._stream = {
            node
            for total in nodes
            if total.kind == "sum"
            for end in total.parents
            for branch in total.parents
            if end is not branch and branch.behind_weights >> _unscaled(end).index & 1
            # A branch ends in a map, as all writers do; the sums inside a mixer have no map at their ends.
            if any(term.kind == "map" for term in _terms([branch], _PER_FEATURE))
            for node in (total, end, _unscaled(end))
        }
        for node in nodes:
            first = node.parents[:1] if node.kind == "scaled" else node.parents
            if node.kind in {*_SUMS, "scaled"} and any(parent in self._stream for parent in first):
                self._stream.add(node)
        # The nodes of the stream, and the nodes that are made of it feature by feature.
        self._readable: set[Node] = set(self._stream)
        for node in nodes:
            is_made = node.kind in _PER_FEATURE and node.parents[0] in self._readable
            given = [parent for parent in node.parents if parent.kind not in ("constant", "parameter")]
            if is_made or (node.kind in _SUMS and given and all(parent in self._readable for parent in given)):
                self._readable.add(node)

    # ---- readers -----------------------------------------------------------------------------------------------------

    def readers(self) -> list[list[Weight]]:
        """The groups of maps that read a tensor, joined where they share a module; warns if a map is not guarded."""
        found: dict[Any, dict[Weight, int]] = {}
        unguarded: list[str] = []
        for node in self._graph.nodes:
            for source in node.parents if node.kind not in _PER_FEATURE | _SUMS else ():
                product = node.product
                if source not in self._readable or product is None or not _takes_features(product, source):
                    continue
                if reason := self._why_not_read(source, node, product):
                    unguarded.append(reason)
                else:
                    weight = Weight(product.owner, product.parameter, int(product.in_axis or 0))
                    sizes = self._graph.calls[product.call].input_memory[1]
                    if math.prod(sizes) != math.prod(source.shape) and self._is_expert(product.owner, source):
                        sizes = next((key[2] for key in found if key[:2] == (source, product.pattern)), ())
                    found.setdefault((source, product.pattern, sizes), {}).setdefault(weight, product.call)
        groups: list[dict[Weight, int]] = []
        for weights in found.values():
            names = {weight.module for weight in weights}
            joined = [group for group in groups if any(weight.module in names for weight in group)]
            groups = [group for group in groups if group not in joined]
            groups.append(weights | {weight: at for group in joined for weight, at in group.items()})
        groups.sort(key=lambda group: min(group.values()))
        result = []
        for weights in groups:
            group = sorted(weights, key=weights.__getitem__)
            group += dict.fromkeys(o for o in sibling_experts(self._model, self._graph, group) if o not in group)
            result.append(group)
        unguarded += self._blocks_not_run(weight for group in result for weight in group)
        if unguarded:
            more = "" if len(unguarded) == 1 else f" (and {len(unguarded) - 1} more)"
            warnings.warn(
                f"target_modules='readers' does not guard all that {type(self._model).__name__} reads: {unguarded[0]}"
                f"{more}, so nothing is erased there.",
                stacklevel=3,
            )
        return result

    def _why_not_read(self, source: Node, node: Node, product: Product) -> str | None:
        """Why a map is not a reader of a tensor; None if its module takes the tensor first, and only for the map."""
        if product.call < 0:
            return f"the weight {product.parameter!r} takes it, and its module is not called"
        first = self._graph.calls[product.call].inputs
        inside = [other for other in self._results_of[source] if product.call in other.calls]
        own = all(other.product is not None and other.product.owner == product.owner for other in inside)
        if first[:1] == (source,) and source not in first[1:] and own:
            return None
        return f"the module {product.owner!r}, whose {product.parameter!r} takes it, takes it in other ways too"

    def _blocks_not_run(self, found: Iterable[Weight]) -> Iterator[str]:
        """The reasons for blocks that are not seen: the pass calls others in their list, but does not call them."""
        chosen = [f"{weight.module}." for weight in found]
        for path, module in self._model.named_modules():
            children = [f"{path}.{name}".strip(".") for name in module._modules]
            if not isinstance(module, nn.ModuleList) or not any(child in self._graph.called for child in children):
                continue
            for child in children:
                is_seen = child in self._graph.called or any(name.startswith(f"{child}.") for name in chosen)
                if not is_seen and any(p.dim() > 1 for p in self._model.get_submodule(child).parameters()):
                    yield f"the small pass that finds it does not run {child!r}"

    def _is_expert(self, module: str, source: Node) -> bool:
        """Whether a module is in a list whose other modules take rows of the same tensor, or are not called at all."""
        return any(
            child not in self._graph.called or any(call.inputs[:1] == (source,) for call in self._graph.called[child])
            for child, _ in siblings(self._model, module)
        )

    # ---- writers -----------------------------------------------------------------------------------------------------

    def writers(self) -> list[Weight]:
        """The maps whose outputs are added to the stream; raises an error if anything else is added."""
        found: dict[Weight, None] = {}
        refusals: list[str] = []
        if self._unfed_input is not None:
            refusals.append(f"the small pass that finds what is added to it has none of its {self._unfed_input}")
        ends = _terms(node for node in self._graph.nodes if node in self._stream)
        for node in ends:
            reason = self._why_not_written(node, ends)
            if reason is not None:
                refusals.append(reason)
            elif node.product is not None:
                found[Weight(node.product.owner, node.product.parameter, int(node.product.out_axis or 0))] = None
        found |= dict.fromkeys(sibling_experts(self._model, self._graph, [*found]))
        refusals += self._blocks_not_run(found)
        name = type(self._model).__name__
        if refusals:
            raise ValueError(
                f"target_modules='writers' does not guard the residual stream of {name}: {refusals[0]}. Use "
                "target_modules='readers', which guards what its sublayers read."
            )
        if not found:
            raise ValueError(
                f"No linear map of {name} adds to a residual stream, so there is nothing for target_modules='writers'. "
                "Name the modules instead, or leave target_modules out to erase at the norms."
            )
        return list(found)

    def _why_not_written(self, node: Node, ends: list[Node]) -> str | None:
        product, operation = node.product, node.operation
        if node.kind == "constant":
            return None if node.is_zero else "something that no weight makes is added to it, such as fixed positions"
        if node.kind == "norm":
            return f"the output of the norm {operation!r} is the stream or is added to it"
        owners = {end.product.owner for end in ends if end.kind == "map" and end.product is not None} - {""}
        if node.kind == "parameter" and (product is None or product.owner not in owners):  # not the bias of a map
            return f"the parameter {operation!r} is added to it"
        if product is None:
            return f"what `{operation}` gives is added to it, which is not a linear map"
        if product.out_axis is None:
            return f"a part of the weight {product.parameter!r} makes what is added to it"
        if product.call < 0:
            return f"the weight {product.parameter!r} makes what is added to it, and its module is not called"
        given = self._graph.calls[product.call].output
        if given is None or any(
            end.product is None or end.product.owner != product.owner for end in _terms([given]) if not end.is_zero
        ):
            return f"the module {product.owner!r}, whose weight makes what is added to it, returns something else"
        return None


def _takes_features(product: Product, source: Node) -> bool:
    """Whether a product takes the features of each row of a tensor as they are, not such as its positions."""
    if product.pattern is None or product.in_axis is None:
        return False
    along = product.pattern[0]
    return not source.width or along < 0 or source.shape[along] == source.width


def _unscaled(node: Node) -> Node:
    """The node before scales and biases, as of Zaya, which scales and shifts the stream before each sum."""
    while True:
        given = [parent for parent in node.parents if parent.kind != "parameter"]
        if node.kind in ("scaled", "featurewise", "mixed"):
            node = node.parents[0]
        elif node.kind == "sum" and len(given) == 1 < len(node.parents):
            node = given[0]
        else:
            return node


def _terms(nodes: Iterable[Node], through: Set[str] = frozenset({"scaled"})) -> list[Node]:
    """The terms that nodes are sums of, in the order of making; nodes of the kinds `through` stand for a parent."""
    found, pending = set(), list(nodes)
    seen = set(pending)
    while pending:
        node = pending.pop()
        parts = node.parents if node.kind in _SUMS else node.parents[:1] if node.kind in through else None
        if parts is None:
            found.add(node)
            continue
        pending += [part for part in parts if part not in seen]
        seen.update(parts)
    return sorted(found, key=lambda node: node.index)
