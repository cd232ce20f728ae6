"""What a small forward pass tells: where the output of a site goes, and whether a merge has kept the model's outputs.

The output is followed through the operations of the pass. The inputs of modules do not tell: a residual connection adds
a tensor that no module was called with, and a router of experts multiplies by a parameter of its own.

What a probe batch does not run (an expert that no token chose, a branch that depends on values) is not seen; therefore
only architectures are folded in which every use is plain, and the outputs are compared afterwards.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.graph import REARRANGING, Graph, Node, Product, Use
from hf_erasure.models.model import distance, evaluating, tensors_of, without_drawing
from hf_erasure.models.streams import Weight, experts_beside

from ..common.placement import has_quantised, tied_to
from ..erasure.layer import ErasureLayer, erasure_layers
from .record import why_not_mergeable
from .remedies import tied_words

# A merge may take the outputs so many times as far as another rounding of the weights does: that is one sample of what
# rounding does, and others are larger.
_TIMES_ROUNDING = 4
# What hands entries of an activation on as they are, and changes no tensor that is there.
_MOVES = {name for name in REARRANGING if not name.endswith("_")} - {"neg", "masked_fill", "sum", "mean"}


class Probe:
    """A model's own dummy input, run the same way each time: without dropout, gradients or autocast.

    Args:
        model: The bare model.
        watch: Is given the call of a first pass, and makes it; left out, what the model gives is the same each time.

    Attributes:
        failure: Why the model cannot be run on it; None when it can.
    """

    def __init__(self, model: nn.Module, watch: Callable[[Callable[[], Any]], object] | None = None) -> None:
        self.model = model
        self.failure: str | None = None
        self.inputs: dict[str, Tensor] = {}
        device = next((p.device.type for p in model.parameters()), "cpu")
        self._device = device if torch.amp.is_autocast_available(device) else "cpu"
        try:
            with torch.inference_mode(False), torch.autocast(self._device, enabled=False):
                self.inputs = dummy_batch(model, watch)
            if watch is None:
                self.run()
        except Exception as error:  # whatever a model may raise at an input it was not made for
            self.failure = f"{type(error).__name__}: {error}"

    def run(self) -> list[Tensor]:
        """The tensors the model returns; draws of its own are not used up."""
        with (
            torch.inference_mode(False),
            evaluating(self.model),
            torch.autocast(self._device, enabled=False),
            without_drawing(self.model),
        ):
            return tensors_of(self.model(**self.inputs))


def check_drift(probe: Probe, before: list[Tensor], modules: list[nn.Module], names: list[str]) -> None:
    """Compare the outputs of a probe after adapters were merged into modules with those before.

    Raises:
        ValueError: If the outputs differ by more than rounding.
    """
    after = probe.run()
    drift = distance(after, before)
    if drift == 0:
        return
    rounding = _TIMES_ROUNDING * distance(_run_with_other_rounding(probe, modules), after)
    # The outputs are rounded too: of few numbers that differ in their last bit a sample of weights may have none.
    rounding += max(torch.finfo(value.dtype).eps / 2 for value in after if value.is_floating_point())
    if not drift <= rounding:
        raise ValueError(
            f"Merging {names} changed the model's output by {drift:.1e} of its norm, where rounding explains "
            f"{rounding:.1e}: the merge was taken back. Use the adapter unmerged, and please report the architecture."
        )
    if rounding >= 1:
        warnings.warn(
            f"The outputs after merging {names} could not be compared with those before: other rounding of weights "
            "changes them by as much as they are. Compare them yourself, in float64.",
            stacklevel=5,
        )


def _run_with_other_rounding(probe: Probe, modules: list[nn.Module]) -> list[Tensor]:
    """The outputs with every weight of the modules one rounding step up or down."""
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
    try:
        for parameter, value in kept:
            signs = 2 * torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8, device="cpu") - 1
            steps = torch.finfo(value.dtype).eps * signs.to(value.device, torch.float64)
            parameter.data = (value.double() * (1 + steps)).to(value.dtype)
        return probe.run()
    finally:
        for parameter, value in kept:
            parameter.data = value


# ---- what takes the output of a site ---------------------------------------------------------------------------------


@dataclass
class Uses:
    """What a forward pass does with the activation of one site.

    Attributes:
        weights: The weights that multiply it, in the order of the calls.
        obstacles: Names of the other operations it goes into.
        quantised: Names of the modules with quantised weights that it goes into.
        returned: Whether it is part of what the model returns.
        runs: How many times the site was reached.
    """

    weights: list[Weight] = field(default_factory=list)
    obstacles: list[str] = field(default_factory=list)
    quantised: list[str] = field(default_factory=list)
    returned: bool = False
    runs: int = 0


def trace_uses(
    model: nn.Module, run: Callable[[], Any], sites: dict[str, ErasureLayer], names: list[str]
) -> tuple[dict[str, Uses], dict[Weight, set[str]]]:
    """Run the model on a small input and see where the activations of `sites` go, whose erasers are to be folded.

    An erasure of another adapter than `names` stays in force and stands in the way.

    Returns:
        The uses of each site by path, and what each of these weights is used for: paths of sites, or what else takes
        it.
    """
    graph, uses = Graph(model, run), {path: Uses() for path in sites}
    erased = [
        (f"erasure at {path!r}" if path in sites else f"erasure of {name!r} at {path!r}", path, call, node, name)
        for path, layer in erasure_layers(model).items()
        for name in layer.adapters
        if name in layer.acting_adapters() or (name in names and name not in layer.merged_adapters)
        if path in sites or name not in names
        for site in [layer.concept_erasure_site[name]]
        for call in graph.calls
        if call.name == path
        for node in ([call.given] if site == "output" else call.taken[:1])
        if node is not None
    ]
    made: dict[Node | None, str] = {}
    for _, path, call, node, name in erased:
        if path not in sites:
            continue
        here, site = uses[path], sites[path].concept_erasure_site[name]
        axis = sites[path].concept_erasure_axis.get(name, -1)
        here.runs += 1
        here.returned |= node in graph.returned and (site == "output" or node is call.given)
        # An eraser at an input acts inside of the call, one at an output behind it.
        is_inside = site == "input"
        here.obstacles += [
            told
            for told, other, at, shown, _ in erased
            if other != path and shown is node and (call.index in at.around) == is_inside
        ]
        if node.kind == "constant":
            here.obstacles.append("operations on what the model is given, which are not followed")
        for use in graph.uses:
            if use.taken is node and (call.index in use.calls) == is_inside:
                made[use.made] = path
                _note(graph, use, axis, here)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    fed: dict[int, set[str]] = {}
    # A weight is taken by the products of which it is a factor, too.
    elsewhere = {use.taken for use in graph.uses if not _is_factor(use)}
    for node in graph.nodes:
        if node.product is not None and (node.kind != "parameter" or node in elsewhere):
            weight = parameters.get(f"{node.product.owner}.{node.product.parameter}".lstrip("."))
            is_named = node.kind != "parameter" and node.operation != node.product.owner
            told = f"<{node.operation}>" if is_named else "another use"
            fed.setdefault(id(weight), set()).add(made.get(node, told))
    for here in uses.values():
        here.weights += [other for other in experts_beside(model, graph, here.weights) if other not in here.weights]
    known = {weight for here in uses.values() for weight in here.weights}
    return uses, {w: fed.get(id(parameters[f"{w.module}.{w.parameter}"]), set()) for w in known}


def _note(graph: Graph, use: Use, axis: int, uses: Uses) -> None:
    """Note what takes an activation: a weight that multiplies its features, or what stands in the way."""
    if use.made is use.taken and use.operation in _MOVES:  # other uses take what was moved
        return
    calls = [graph.calls[number] for number in use.calls]
    quantised = next((call.name for call in reversed(calls) if has_quantised(call.module)), None)
    wrapper = next((call.name for call in calls if isinstance(call.module, BaseTunerLayer)), None)
    product = use.made.product if use.made is not None and use.made.kind == "map" else None
    if quantised is not None:
        uses.quantised.append(quantised)
    elif wrapper is not None:
        uses.obstacles.append(f"the adapter around {wrapper!r}")
    elif product is None or not product.owner:
        is_call = bool(calls) and use.operation == calls[-1].name
        uses.obstacles.append(type(calls[-1].module).__name__ if is_call else use.operation)
    elif (
        product.reads is None
        or not _takes_features(product, use.taken, axis)
        or why_not_mergeable(graph.calls[product.call].module, "input", product.parameter) is not None
    ):
        uses.obstacles.append(type(graph.calls[product.call].module).__name__)
    else:
        weight = Weight(product.owner, product.parameter, product.reads)
        uses.weights += [weight] * (weight not in uses.weights)


def _is_factor(use: Use) -> bool:
    """Whether a product takes a weight as that."""
    own, made = use.taken.product, None if use.made is None or use.made.kind != "map" else use.made.product
    return own is not None and made is not None and (own.owner, own.parameter) == (made.owner, made.parameter)


def _takes_features(product: Product, taken: Node, axis: int) -> bool:
    """Whether a product sums over the features of an activation, all of them in their order."""
    count = len(taken.shape)
    if product.pattern is None or not count or product.pattern[:2] != (axis % count, 0):
        return False
    return len(product.pattern) - 2 == taken.shape[axis % count]


def why_not_foldable(
    model: nn.Module, path: str, uses: Uses, fed: dict[Weight, set[str]], *, allow_tied: bool
) -> str | None:
    """What stands in the way of folding a site into the layers that take its activation; None when nothing does."""
    if not uses.runs:
        return "it was not reached when the model ran on a dummy input"
    if uses.returned:
        return f"its activation is part of what {type(model).__name__} returns, and would be returned un-erased"
    if uses.obstacles:
        obstacles = ", ".join(f"`{name}`" for name in dict.fromkeys(uses.obstacles))
        return (
            f"its activation goes into {obstacles}, and only linear maps of its features can take the projection into "
            "their weights"
        )
    if uses.quantised:
        return f"it goes into {uses.quantised[0]!r}, whose weight is quantised and would not be exact after it"
    if not uses.weights:
        return "no layer of the model takes its activation"
    for weight in uses.weights:
        target = weight.module
        names = tied_to(model, target)
        if names and not allow_tied:
            return f"it goes into {target!r}, whose weight {tied_words(model, target, names)}"
        others = sorted(fed[weight] - {path, *(["<embedding>"] if allow_tied else [])})
        if others:
            return f"it goes into {target!r}, whose weight is used elsewhere too ({', '.join(others)})"
    return None
