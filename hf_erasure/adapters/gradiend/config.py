"""The configuration of a GRADIEND adapter: the fields that a user writes, and those of fitting (arXiv 2502.01406)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_erasure.gradiend.features import ACTIVATIONS

from ..common.config import BY_FITTING, FLOATS, INDICES, ChildConfig, Layout, field_error, is_a, short
from ..internals import extend_peft_type

GRADIEND = extend_peft_type("GRADIEND")

SOURCES = ("factual", "counterfactual", "difference")
# The kinds of tensors that are kept for a parameter. None of them contains an underscore, so that keys can be parsed.
FEATURE, OFFSET, INDEX, ENCODER, ENCODER_INDEX = "feature", "offset", "index", "encoder", "encoderindex"
# The largest float32.
_MOST_FLOAT = (2 - 2**-23) * 2.0**127


@dataclass
class GradiendConfig(ChildConfig):
    """A feature that was learned from gradients, and the change of weights that strengthens or weakens it.

    With a feature factor `h` and a learning rate `α` the adapted weights are `W + α (h Wd + bd)`.

    Args:
        feature: A word for the feature; reports, cards and messages show it.
        classes: The names of its classes; the first one of a pair encodes to +1, the second to −1.
        target_modules: As everywhere in PEFT: module-name suffixes, a regular expression, or `"all-linear"`; all
            parameters that these modules own themselves may change. `None` takes every weight of the base model,
            with embeddings, norms and biases, without prediction heads and poolers. Of a language model with towers
            for images or sounds, only the language side is taken.
        exclude_modules: Suffixes or a regular expression of modules to leave alone.
        layers_to_transform: Indices of the blocks to act on; all when `None`.
        layers_pattern: The name of the list of blocks, where it cannot be told from the module's name.
        density: The share of the weights that is changed, those with the largest |Wd|. 1 changes all weights, and then
            the adapter takes eight bytes a weight.
        keep_encoder: Save the encoder, which reads the feature from a gradient, too.
        feature_factor: `h`; +1 and −1 are the classes as the encoder sees them.
        learning_rate: `α`, the strength of the change. 0 means that it was not chosen yet: the adapter does nothing.
        source: The gradient that the encoder reads: that of the `"factual"` label, that of the `"counterfactual"`
            label, or their `"difference"`.
        pair: The pair of classes that acts; the first pair when `None`.
        sticky: Stay active when another adapter is activated, until disabled or deleted.
        modules_to_save: Names of modules, such as a classifier, that are trained and saved with the adapter.
        fitted: Written by fitting. Whether a feature was learned.
        pairs: Written by fitting. The pairs of classes for which features were learned.
        fitted_parameters: Written by fitting. Parameter name → `{"shape", "count", "encoder_count"}`; the counts are
            the numbers of entries that are kept, and None means all entries in order.
        encoders: Written by fitting. For each pair `{"scale", "bias", "activation", "unit_norm"}` of its encoder.
        provenance: Written by fitting. The data and the base model from which the feature was learned.
    """

    noun: ClassVar[str] = "GRADIEND adapter"
    example: ClassVar[str] = "GradiendConfig(feature=…, classes=[…])"
    remedy: ClassVar[str] = "Call GradiendTrainer(model, …, train_dataset=pairs).train()."
    own_type = GRADIEND
    read_with = ("fitted", "pairs", "pair", "encoders", "feature_factor", "learning_rate")

    feature: str = "feature"
    classes: list[str] | None = None
    target_modules: list[str] | str | None = None
    density: float = 0.01
    keep_encoder: bool = False
    feature_factor: float = 1.0
    learning_rate: float = 0.0
    source: str = "factual"
    pair: list[str] | None = None
    pairs: list[list[str]] | None = field(default=None, metadata=BY_FITTING)
    fitted_parameters: dict[str, dict[str, Any]] | None = field(default=None, metadata=BY_FITTING)
    encoders: list[dict[str, Any]] | None = field(default=None, metadata=BY_FITTING)

    def _check(self) -> None:
        classes = self.classes
        if classes is not None and (isinstance(classes, str) or len(classes) < 2 or len(set(classes)) < len(classes)):
            raise ValueError(
                f"classes={classes!r}: a feature needs at least two different classes, as in "
                "classes=['female', 'male']."
            )
        self.check_pairs()
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} is not a share of the weights: write a number in (0, 1].")
        self.check_strength()
        if self.source not in SOURCES:
            raise ValueError(f"source={self.source!r} is not known; choose one of {', '.join(map(repr, SOURCES))}.")
        if self.fitted and not (self.fitted_parameters and self.pairs and self.encoders):
            message = "fitted=True needs pairs, encoders and fitted_parameters, the shape of each weight's change"
            raise field_error(f"{message}. Leave all of them out of a new config")
        self._check_fitted()

    def adopt_fit(self, saved: Any) -> None:
        """If this configuration was never fitted, take over what fitting wrote, and the strength if none was chosen."""
        if saved.fitted and not self.fitted and self.learning_rate == 0:
            self.learning_rate, self.pair = saved.learning_rate, self.pair or saved.pair
            self.feature_factor = saved.feature_factor if self.feature_factor == 1 else self.feature_factor
        super().adopt_fit(saved)

    def check_pairs(self) -> None:
        """Raise a `ValueError` unless the pair that acts and the fitted pairs are pairs of the classes."""
        for pair in [*([self.pair] if self.pair is not None else []), *(self.pairs or [])]:
            if isinstance(pair, str) or len(pair) != 2:
                raise ValueError(f"{pair!r} is not a pair of classes: write two names, as in ['female', 'male'].")
            unknown = [name for name in pair if self.classes is not None and name not in self.classes]
            if unknown:
                raise ValueError(
                    f"pair {list(pair)!r} has {unknown[0]!r}, which is not among classes={self.classes!r}."
                )
        if self.pairs:
            self.pair_index(self.pair)

    def _check_fitted(self) -> None:
        """Check the values that fitting writes, since a file may hold any value."""
        for name, size in (self.fitted_parameters or {}).items():
            shape, counts = size.get("shape"), [size.get("count", 0), size.get("encoder_count", 0)]
            is_shape = not isinstance(shape, str) and is_a(shape, list[int]) and min(shape or [0]) >= 0
            is_size = is_shape and size.keys() <= {"shape", "count", "encoder_count"} and is_a(counts, list[int | None])
            if not is_size or not all(count is None or 0 <= count <= math.prod(shape or ()) for count in counts):
                message = f"fitted_parameters has {short(size)} at {name!r}"
                raise field_error(f"{message}, which is not a shape with the number of entries kept")
        for encoder in self.encoders or []:
            values: Any = tuple(encoder.get(key) for key in ("scale", "bias", "activation", "unit_norm"))
            is_encoder = len(encoder) == len(values) and is_a(values, tuple[float, float, str, bool])
            if not is_encoder or values[2] not in ACTIVATIONS or not all(map(math.isfinite, values[:2])):
                raise field_error(f"encoders has {short(encoder)}, which is not an encoder")
        if self.fitted and len(self.encoders or []) != len(self.pairs or []):
            raise field_error(f"There are {len(self.encoders or [])} encoders for pairs={short(self.pairs)}")

    def check_strength(self) -> None:
        """Raise a `ValueError` for a strength that is not finite or too large for float32."""
        factors = self.feature_factor * self.learning_rate, self.learning_rate
        if not all(abs(factor) <= _MOST_FLOAT for factor in factors):  # also if one is NaN
            raise ValueError(
                f"feature_factor={self.feature_factor:g} and learning_rate={self.learning_rate:g} are beyond what "
                "float32 can hold: write finite numbers."
            )

    def pair_index(self, pair: Iterable[str] | None) -> int:
        """The position of a pair of classes among the fitted pairs; None stands for the first."""
        if pair is None:
            return 0
        known = [tuple(p) for p in self.pairs or []]
        if tuple(pair) not in known:
            raise ValueError(f"pair={list(pair)} was not fitted; there is {', '.join(str(list(p)) for p in known)}.")
        return known.index(tuple(pair))

    def expected_pairs(self) -> int:
        """How many pairs are fitted, or will be when the feature is fitted."""
        return len(self.pairs) if self.pairs else math.comb(len(self.classes or ("one", "other")), 2)

    @property
    def described(self) -> str:
        """The adapter in the words of a message."""
        return f"GRADIEND of {self.feature!r}"

    @property
    def fitted_modules(self) -> Mapping[str, str]:
        """The modules that own the changed parameters, each → itself."""
        owners = (name.rpartition(".")[0] for name in (self.fitted and self.fitted_parameters) or ())
        return {owner: owner for owner in owners}

    @property
    def why_idle(self) -> str:
        """The reason why the adapter changes nothing, and what to do about it; empty where it has an effect."""
        idle = (
            "its learning_rate is 0, which leaves the weights as they are. Call GradiendAdapter.of(model, …).steer("
            "learning_rate=…), or let trainer.select(…) choose."
        )
        return super().why_idle or ("" if self.learning_rate else idle)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The numbers of the configuration that say how strongly the adapter acts."""
        return self.feature_factor, self.learning_rate

    def tensors(self) -> Layout:
        """The shapes and types of a fitted adapter's tensors, by the names that a file has for them."""
        found = {}
        for name in self.fitted_parameters or {}:
            module, _, own = name.rpartition(".")
            for kind, (shape, types) in self.parts(name).items():
                found[f"{module}.gradiend.gradiend_{kind}_{own}"] = shape, types
        return found

    def has_size_of(self, name: str, shape: list[int]) -> bool:
        """Whether the adapter changes or reads entries of the weight."""
        size = (self.fitted_parameters or {}).get(name)
        return size is not None and (size.get("count", 0) != 0 or size.get("encoder_count", 0) != 0)

    def parts(self, name: str) -> Layout:
        """The shapes and types of the tensors that a fitted adapter keeps for one parameter, by kind."""
        size, pairs = (self.fitted_parameters or {})[name], self.expected_pairs()
        parts: Layout = {}
        for kinds, key in (((FEATURE, OFFSET, INDEX), "count"), ((ENCODER, ENCODER_INDEX), "encoder_count")):
            count = size.get(key, 0)
            if count == 0:
                continue
            for kind in kinds[:-1]:
                parts[kind] = (pairs, math.prod(size["shape"]) if count is None else count), FLOATS
            if count is not None:
                parts[kinds[-1]] = (count,), INDICES
        return parts
