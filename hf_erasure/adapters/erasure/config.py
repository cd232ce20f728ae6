"""The configuration of an erasure adapter: the fields that a user writes, and those that fitting fills in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from hf_erasure.erasers.eraser import METHODS
from hf_erasure.erasers.least_squares import ROUNDS

from ..common.config import BY_FITTING, FLOATS, ChildConfig, Layout, field_error, is_a, short
from ..internals import extend_peft_type

CONCEPT_ERASURE = extend_peft_type("CONCEPT_ERASURE")

SITES = ("output", "input")
# Word for `target_modules` → the side of the modules at which it erases.
WORDS = {"readers": "input", "writers": "output"}
# Torch allows 64 axes, so an index of an axis is below this.
_MOST_AXES = 64
# The default strength. It is another object than a caller's own 1.0, since a caller's strength overrides a saved one.
_DEFAULT_STRENGTH = float("1")
# Later fields and their defaults. Older releases do not know these fields and would warn of them.
_NEW_FIELDS = {
    **{"weights": None, "strength": 1.0, "target": None, "readings": None},
    **{"pair_rank": 0, "environment_rank": None, "environments": None, "kept": None},
}
_MOST_STRENGTH = 2.0  # this strength mirrors activations at the mean
# The most strata (class × environment × kept class). The statistics of a site have a square matrix of them: 8 MB.
_MOST_STRATA = 1000
# The sum of the shares of classes may differ from 1 by this, since users round the shares.
_SUM_TOLERANCE = 1e-6
# The name of the first row of `readings` for a concept with values; a row for each of its columns follows.
_ORIGIN = "0"
_NOT_A_WEIGHT = "which does not name the weights at a site, as [module, parameter, axis], the site's own first"
_ADDING = "Adding with target_modules='readers' or 'writers'"


EraserParts = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Dial:
    """The map `x ↦ x − strength · left · (right · (x − bias) − t)`, where `t` is the reading of the target.

    With the mean of a class as the target it is affine concept editing (arXiv 2411.09003).
    """

    strength: float = 1.0  # 0 leaves activations as they are, 1 moves them to the target, 2 as far beyond it
    weights: tuple[float, ...] = ()  # how much each row of `readings` counts in the target; empty for the mean

    def apply_to(self, parts: EraserParts, readings: Tensor) -> EraserParts:
        """Make the map's `left`, `right` and `bias` from those of an eraser and from its readings `(rows, rank)`."""
        left, right, bias = parts
        if len(readings) and self.weights:
            target = readings.double().T @ torch.tensor(self.weights, dtype=torch.float64, device=readings.device)
            bias = (bias.double() + left.double() @ target).to(bias.dtype)
        return (left if self.strength == 1 else left * self.strength), right, bias


@dataclass
class ConceptErasureConfig(ChildConfig):
    """An erasure of one concept from the activations of a model's modules.

    Give either `labels` (a concept with named classes) or `concept_dim` (a continuous or multi-label concept): it says
    how the concept is coded in the data.

    Args:
        concept: A word for what is erased; reports, cards and messages show it.
        labels: The names of the classes, in the order of their ids. At least two.
        concept_dim: The number of columns of a continuous or multi-label concept. Leave out when `labels` is given.
        target_modules: As everywhere in PEFT: module-name suffixes, a regular expression, or `"all-linear"`. `None`
            takes the output of every norm that reads or writes the hidden state of the blocks, and of the final norms;
            one small forward pass finds them. `"readers"` takes the inputs of the linear maps that read the hidden
            state, and `"writers"` the outputs of those that add to it.
        exclude_modules: Suffixes or a regular expression of modules to leave alone.
        layers_to_transform: Indices of the blocks to act on; all when `None`.
        layers_pattern: The name of the list of blocks, where it cannot be told from the module's name.
        site: Erase the `"output"` of each target or its `"input"`. The default is the input for `"readers"`, and the
            output otherwise.
        method: `"leace"` (least-squares optimal, arXiv 2306.03819); `"orth"` (the same guarantee by an orthogonal
            projection, which disturbs more; known as SAL, arXiv 2203.07893); `"mean_projection"` (the same map as
            `"orth"` where the rank is not capped; needs `labels`); or `"inlp"` (iterative null-space projection,
            arXiv 2004.07667, with a least-squares probe; it removes more directions and guarantees less). R-LACE and
            INLP with logistic regression need rows, which fitting does not keep: see `hf_erasure.erasers.Eraser.fit`.
        affine: Keep the mean of the activations by an affine part, which is merged into a bias. `False` keeps the mean
            by the choice of the linear map: of the maps that keep it, the one of least change. By default fitting takes
            the affine map where a merge can write it, or where the adapter cannot be merged, and else the linear one.
        rank: The largest number of directions that are erased at a site. `None` means k − 1 for named classes and
            `concept_dim` otherwise, which the guarantee needs, and for `"inlp"` ten times as many, in ten rounds.
        pair_rank: How many more directions are erased: those in which texts and their counterfactuals differ most,
            apart from the mean difference, which is always erased. Needs batches with counterfactuals.
        environment_rank: How many directions of the class differences within environments, such as templates or
            sources, are erased. They include the differences over all environments, k − 1 for k classes. Needs batches
            with environments.
        environments: The names of the environments, in the order of their ids; fitting takes them from its batches.
        kept: The names of the classes of a second label whose covariance with the activations stays as it is (SPLINCE,
            arXiv 2506.10703), in the order of their ids; fitting takes them from its batches.
        strength: How far activations are moved: 0 leaves them as they are, 1 erases, 2 mirrors them at the mean. It can
            be changed without fitting again, with `set_strength` or when an adapter is loaded.
        target: Where all activations are moved, instead of to the common mean: to the mean of a class, given by its
            label; to that of a mixture of the classes, given by their shares; or, with `concept_dim`, to where the
            concept has these values. It can be changed like `strength`, with `set_target`. A merge of it needs a bias.
        sticky: Stay active when another adapter is activated, until disabled or deleted.
        modules_to_save: Names of modules, such as a classifier, that are trained and saved with the adapter.
        fitted: Written by fitting. Whether the erasers exist.
        fitted_sites: Written by fitting. Module name → `{"width": …, "rank": …}`, with the `"axis"` of the features
            where it is not the last, as for channels of images, and the axis `"examples"` where it is not the first.
        weights: Written by adding with `"readers"` or `"writers"`. Site → the weights that read or make its activation,
            each as `[module, parameter, axis]`, where the features of the hidden state lie along this axis of the
            parameter. The modules of one site share one eraser, and the site is the first of them.
        readings: Written by fitting. The names of the rows of readings in the file, of which a `target` may be made:
            the labels that occurred, or the origin and the columns of a concept with values.
        provenance: Written by fitting. What the erasers were estimated from: the plugin's version, the class of the
            base model, the fingerprint of its weights, examples and tokens seen, and the leakage measured.
    """

    noun: ClassVar[str] = "concept erasure"
    places: ClassVar[str] = "sites"
    remedy: ClassVar[str] = "Call fit_concept_erasure(model, batches, adapter_name=…)."
    own_type = CONCEPT_ERASURE
    read_with = ("fitted", "site", "strength", "target", "labels", "readings")
    words = tuple(WORDS)
    # `weights` when `fitted_modules` was last read, and its result for them.
    _groups = cast("tuple[Any, dict[str, str]]", (None, {}))

    concept: str = "concept"
    labels: list[str] | None = None
    concept_dim: int | None = None
    target_modules: list[str] | str | None = None
    site: str = ""
    method: str = "leace"
    affine: bool | None = None
    rank: int | None = None
    pair_rank: int = 0
    environment_rank: int | None = None
    environments: list[str] | None = None
    kept: list[str] | None = None
    strength: float = _DEFAULT_STRENGTH
    target: str | list[float] | None = None
    fitted_sites: dict[str, dict[str, int]] | None = field(default=None, metadata=BY_FITTING)
    weights: dict[str, list[list]] | None = field(default=None, metadata=BY_FITTING)
    readings: list[str] | None = field(default=None, metadata=BY_FITTING)

    def _check(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method={self.method!r} is not known; choose one of {', '.join(map(repr, METHODS))}.")
        self.site = self.site or WORDS.get(self.word, "output")
        if self.site not in SITES:
            raise ValueError(f"site={self.site!r} is not known; choose 'output' or 'input'.")
        if self.word and self.site != WORDS[self.word]:
            other = next(word for word, site in WORDS.items() if site == self.site)
            raise ValueError(
                f"target_modules={self.word!r} erases at the {WORDS[self.word]} of the modules, and site={self.site!r} "
                f"was given: leave site out, or choose target_modules={other!r}."
            )
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"rank={self.rank} erases nothing; give a positive number, or None for all directions.")
        self._check_concept()
        self.check_extras()
        self._check_dial()
        if self.fitted and not self.fitted_sites:
            raise field_error(
                "fitted=True needs fitted_sites, the width and rank of each site. Leave both out of a new config"
            )
        for name, size in (self.fitted_sites or {}).items():
            width, rank = size.get("width", -1), size.get("rank", -1)
            axes = [size[key] for key in ("axis", "examples") if key in size]
            is_sound = size.keys() - {"axis", "examples"} == {"width", "rank"} and 0 <= rank <= width
            if not is_sound or not all(-1 <= axis < _MOST_AXES for axis in axes) or len(set(axes)) < len(axes):
                message = f"fitted_sites has {short(size)} at {name!r}"
                raise field_error(f"{message}, which is not a width with a rank of at most that")
        if self.weights is not None:
            self._check_weights(self.weights)
        elif self.fitted and self.word:
            raise field_error(f"target_modules={self.target_modules!r} of a fitted adapter needs weights", "Adding")

    @property
    def word(self) -> str:
        """The word in `target_modules`, "readers" or "writers"; empty where it has another value."""
        target = self.target_modules.lower() if isinstance(self.target_modules, str) else ""
        return target if target in WORDS else ""

    def _check_weights(self, weights: dict[str, list[list]]) -> None:
        """Refuse `weights` that adding never writes: a stranger's file may hold any text."""
        seen: dict[str, str] = {}
        for site, group in weights.items():
            for entry in group:
                if not is_a(entry, tuple[str, str, int]) or not all(entry[:2]) or not 0 <= entry[2] < _MOST_AXES:
                    raise field_error(f"weights has {short(entry)} at {short(site)}, {_NOT_A_WEIGHT}", _ADDING)
                if seen.setdefault(entry[0], site) != site:
                    other = short(seen[entry[0]])
                    raise field_error(f"weights has {short(entry[0])} at two sites, {other} and {short(site)}", _ADDING)
            if not group or group[0][0] != site or len({tuple(entry) for entry in group}) != len(group):
                raise field_error(f"weights has {short(group)} at {short(site)}, {_NOT_A_WEIGHT}", _ADDING)
        fitted = weights.keys() if self.fitted_sites is None else self.fitted_sites.keys()
        if not weights or fitted != weights.keys():
            message = f"weights has the sites {short(sorted(weights))}, and fitted_sites {short(sorted(fitted))}"
            raise field_error(f"{message}, which must be the same", _ADDING)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without later fields that have their defaults."""
        return {name: v for name, v in super().to_dict().items() if name not in _NEW_FIELDS or _NEW_FIELDS[name] != v}

    def adopt_fit(self, saved: Any) -> None:
        """If this configuration was never fitted, take over what fitting wrote into a saved one, and its strength."""
        if saved.fitted and not self.fitted:
            self.strength = saved.strength if self.strength is _DEFAULT_STRENGTH else self.strength
            self.target = saved.target if self.target is None else self.target
        super().adopt_fit(saved)
        if saved.fitted and saved.site != self.site:
            raise ValueError(f"The {self.described} was fitted with site={saved.site!r}, not {self.site!r}.")

    def _check_concept(self) -> None:
        if self.labels is not None:
            if isinstance(self.labels, str) or len(self.labels) < 2:
                raise ValueError(
                    f"labels={self.labels!r}: a concept needs at least two classes, as in labels=['female', 'male']. "
                    "A continuous concept takes concept_dim instead."
                )
            if len(set(self.labels)) != len(self.labels):
                raise ValueError(f"labels={self.labels!r} names a class twice.")
            if self.concept_dim not in (None, len(self.labels)):
                raise ValueError(
                    f"labels names {len(self.labels)} classes but concept_dim={self.concept_dim}: leave concept_dim "
                    "out."
                )
        elif self.concept_dim is not None and self.concept_dim < 1:
            raise ValueError(f"concept_dim={self.concept_dim} must be at least 1.")
        # A fitted adapter may be combined from several, and then has their concepts as columns side by side.
        if self.method == "mean_projection" and self.concept_dim is not None and not (self.labels or self.fitted):
            raise ValueError(
                f"method='mean_projection' projects away the differences of class means, and concept_dim="
                f"{self.concept_dim} has no classes: give labels, or take method='orth', which erases values as well."
            )

    def check_extras(self) -> None:
        """Refuse pairs, environments and kept classes that cannot be combined with the concept or the method."""
        options = {name: getattr(self, name) for name in ("pair_rank", "environment_rank", "environments", "kept")}
        options = {name: value for name, value in options.items() if value}
        if self.pair_rank < 0 or (self.environment_rank is not None and self.environment_rank < 1):
            raise ValueError(
                f"pair_rank={self.pair_rank}, environment_rank={self.environment_rank}: give numbers of directions."
            )
        if options and self.labels is None and not self.fitted:
            raise ValueError(f"{next(iter(options))} needs classes, and this concept has none: give labels.")
        if options and self.method == "inlp":
            raise ValueError(
                f"method='inlp' erases only what its probes read, not what {next(iter(options))} asks for: use 'leace'."
            )
        for name in ("environments", "kept"):
            names = options.get(name, ["", "-"])
            if isinstance(names, str) or len(names) < 2 or len(set(names)) != len(names):
                raise ValueError(f"{name}={names!r} must be a list of at least two names, each once.")
        strata = self.z_dim * len(self.environments or "-") * len(self.kept or "-") if options else 0
        if strata > _MOST_STRATA:
            raise ValueError(
                f"{len(self.labels or ())} classes in {len(self.environments or '-')} environments, with "
                f"{len(self.kept or '-')} classes to keep, are {strata} groups of rows, and at most {_MOST_STRATA} are "
                "possible: group environments, such as authors by source."
            )
        if self.environment_rank is not None and self.labels and self.environment_rank < len(self.labels) - 1:
            raise ValueError(
                f"environment_rank={self.environment_rank} is too few: the difference of {len(self.labels)} classes, "
                f"which is always erased, has {len(self.labels) - 1} directions. Give at least that, or None."
            )

    def _check_dial(self) -> None:
        if not 0 <= self.strength <= _MOST_STRENGTH:
            raise ValueError(
                f"strength={self.strength!r} must lie between 0, which erases nothing, and {_MOST_STRENGTH:g}, which "
                "mirrors activations at the mean."
            )
        if self.readings is not None:
            known = set(self.readings)
            rows = self.value_rows if self.labels is None else [label for label in self.labels if label in known]
            if self.readings != rows:
                raise field_error(f"readings={short(self.readings)} differ from {short(rows)}")
        if self.target is None:
            return
        if isinstance(self.target, str):
            if self.target not in (self.labels or ()):
                raise ValueError(f"target={self.target!r} is not one of labels={self.labels}; write values as a list.")
        elif len(self.target) != self.z_dim or not all(math.isfinite(value) for value in self.target):
            raise ValueError(f"target={short(self.target)} must have {self.z_dim} numbers, like the concept.")
        elif self.labels is not None and abs(sum(self.target) - 1) > _SUM_TOLERANCE:
            raise ValueError(
                f"target={short(self.target)} must be shares of the classes {self.labels}, whose sum is 1."
            )
        if self.fitted:
            self.check_target(self.readings)

    def check_target(self, readings: list[str] | None) -> None:
        """Refuse a target whose readings the fit does not have."""
        if self.target is None:
            return
        if readings is None:
            raise ValueError(
                f"target={short(self.target)}: what the classes read is not known of this {self.described}, which was "
                "fitted by an older release, or combined of several. Fit it again on one concept, or leave target out."
            )
        missing = [label for label, share in self._shares().items() if share and label not in (readings or ())]
        if missing:
            raise ValueError(f"target={short(self.target)}: no row was labelled {missing} when it was fitted.")

    @property
    def value_rows(self) -> list[str]:
        """The names of the rows of `readings` of a concept without classes: the origin, and the columns of values."""
        return [_ORIGIN, *map(str, range(1, self.z_dim + 1))]

    def _shares(self) -> dict[str, float]:
        """Row of `readings` → its share in the target."""
        if isinstance(self.target, str):
            return {self.target: 1.0}
        values = [float(value) for value in self.target or ()]
        if self.labels is None:
            values = [1 - sum(values), *values]
        return dict(zip(self.labels or self.value_rows, values, strict=True))

    @property
    def dial(self) -> Dial | None:
        """The change of the erasers by strength and target; None where they are used as they were fitted."""
        shares = self._shares() if self.target is not None else {}
        weights = tuple(shares.get(row, 0.0) for row in self.readings or ()) if shares else ()
        dial = Dial(float(self.strength), weights)
        return None if dial == Dial() else dial

    @property
    def why_idle(self) -> str:
        """The reason why the adapter changes nothing, and what to do about it; empty where it has an effect."""
        idle = "its strength is 0, which leaves activations as they are. Call hf_erasure.set_strength(model, …, 1)."
        return super().why_idle or ("" if self.strength else idle)

    @property
    def strengths(self) -> tuple[float, ...]:
        """The `strength`, then the shares that make up the target; empty without a dial."""
        return () if self.dial is None else (self.dial.strength, *self.dial.weights)

    @property
    def described(self) -> str:
        """The adapter in the words of a message."""
        return f"erasure of {self.concept!r}"

    @property
    def fitted_modules(self) -> Mapping[str, str]:
        """Module → the site whose eraser it uses, which is another module where it was added with a word."""
        if self.weights is None:
            return {site: site for site in (self.fitted and self.fitted_sites) or ()}
        known, found = self._groups
        if known is not self.weights:  # this property is read for every module of a model, which may have ten thousand
            found = {entry[0]: site for site, group in self.weights.items() for entry in group}
            self._groups = self.weights, found
        return found

    @property
    def reach(self) -> str:
        """A sentence that says which hidden states stay un-erased."""
        if self.weights is None:
            return "On pre-LN models the intermediate hidden_states stay un-erased unless whole blocks are targeted."
        if self.site == "input":
            return "The modules that read hidden_states are guarded; the states stay un-erased, the last one too."
        return (
            "The hidden_states between the blocks are guarded at every depth; the outputs of norms on them nearly so."
        )

    def tensors(self) -> Layout:
        """The shapes and types of a fitted adapter's tensors, by the names that a file has for them."""
        found: Layout = {}
        for site, size in (self.fitted_sites or {}).items():
            width, rank = size["width"], size["rank"]
            shapes: dict[str, tuple[int, ...]] = {"left": (width, rank), "right": (rank, width), "bias": (width,)}
            shapes |= {} if self.readings is None else {"readings": (len(self.readings), rank)}
            found |= {f"{site}.concept_erasure.concept_erasure_{part}": (s, FLOATS) for part, s in shapes.items()}
        return found

    def has_size_of(self, name: str, shape: list[int]) -> bool:
        """Whether the adapter erases the output of a head that has a column for each row of this weight."""
        size = (self.fitted_sites or {}).get(name.rpartition(".")[0])
        return size is not None and self.site == "output" and [size["width"]] == shape[:1] != shape[-1:]

    @property
    def z_dim(self) -> int:
        """The number of columns in which the concept is coded: one for each class, or `concept_dim`."""
        if self.labels is not None:
            return len(self.labels)
        if self.concept_dim is None:
            raise ValueError(
                "The concept has neither labels nor concept_dim: write ConceptErasureConfig(labels=['female', 'male']) "
                "for classes or concept_dim=1 for a continuous concept."
            )
        return self.concept_dim

    @property
    def max_rank(self) -> int:
        """The number of directions that the guarantee needs: k − 1 for classes, `concept_dim` otherwise.

        For INLP, which guarantees nothing, it is the number that its rounds remove, or the given `rank`.
        """
        needed = self.z_dim - 1 if self.labels is not None else self.z_dim
        if self.method == "inlp":
            return needed * ROUNDS if self.rank is None else self.rank
        return needed if self.rank is None else min(self.rank, needed)
