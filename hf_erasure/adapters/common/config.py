"""The configurations of both kinds, their record of how an adapter was made, and checks of values read from files.

Fitting, merging, callbacks and `hf_erasure.hub.describe` write the `provenance` of a configuration as plain JSON, under
the names of the fields of `Provenance`. The file may come from a stranger, so `Provenance.of` reads it, which leaves
out values of a wrong type.
"""

from __future__ import annotations

import functools
import json
import re
import stat
import types
import typing
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar

from peft import PeftConfig
from peft.utils.peft_types import PeftType

from .files import CONFIG, target_of

# Tensor name → its shape, and the names that safetensors has for the types that it may have.
Layout = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]

# The names that safetensors has for float32 and float64, and for int32.
FLOATS, INDICES = ("F32", "F64"), ("I32",)
# In bytes. A configuration that names ten thousand weights, each with samples of its values, has a few million bytes.
MAX_CONFIG_BYTES = 16 * 2**20
# The name of a module. PEFT puts it into a regular expression, where these characters stand for themselves.
_MODULE_NAME = re.compile(r"[\w.\-]+")
# The fields that may be a regular expression.
PATTERN_FIELDS = ("target_modules", "exclude_modules")
# The fields in which names may come in any order.
_UNORDERED_FIELDS = (*PATTERN_FIELDS, "layers_to_transform", "layers_pattern", "modules_to_save")
# The parts of the provenance that are not written by the code that fits the adapter.
ACTIVE, TRAINING, RECIPE, CARD_FACTS = "active_adapters", "training", "recipe", "card"
# The data that the figures of a recipe's run were measured on, in words.
TESTED_ON = "the recipe's test split"
# This mark is on the fields that fitting writes.
BY_FITTING = {"by": "fitting"}


@dataclass
class ChildConfig(PeftConfig):
    """The configuration of an adapter that is a child of modules; each kind documents the fields in its own class."""

    noun: ClassVar[str] = "hf_erasure adapter"  # what messages call an adapter of this kind
    places: ClassVar[str] = "modules"  # what messages call the modules where the adapter acts
    example: ClassVar[str] = "ConceptErasureConfig(labels=[…])"  # a configuration to write in a message
    remedy: ClassVar[str]  # a sentence that says what to call so that the adapter is fitted
    own_type: ClassVar[PeftType]  # PEFT's type for the kind
    # The words that `target_modules` may be, in addition to names, a pattern and "all-linear".
    words: ClassVar[tuple[str, ...]] = ()
    # Whether the user named no modules: `target_modules` was `None` or a word when this process added the adapter.
    has_default_targets = False
    # The fields that say what the values of a file mean, besides the layout of these.
    read_with: ClassVar[tuple[str, ...]]

    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    sticky: bool = False
    modules_to_save: list[str] | None = None
    fitted: bool = field(default=False, metadata=BY_FITTING)
    provenance: dict[str, Any] = field(default_factory=dict, metadata=BY_FITTING)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = self.own_type
        kind: Any = type(self)
        declared = field_types(kind)
        for entry in fields(self):
            value, hint = getattr(self, entry.name), declared[entry.name]
            # A text passes where a list of texts is declared: the checks below have a better message for it.
            if not is_a(value, hint):
                raise TypeError(f"{entry.name}={short(value)} of a {kind.__name__} must be {type_text(hint)}.")
            if isinstance(value, (set, frozenset)) and entry.name not in _UNORDERED_FIELDS:
                raise TypeError(f"{entry.name}={short(value)} is a set, but the order counts: write a list.")
            # As in a file: lists in place of tuples, and Python's numbers in place of numpy's, which have `item`.
            if isinstance(value, (list, tuple, range)):
                value = [item.item() if hasattr(item, "item") else item for item in value]
            setattr(self, entry.name, value.item() if hasattr(value, "item") else value)
        for name, hint in field_types(Provenance).items():
            value = self.provenance.get(name)
            # The parts that makers and callbacks write are left out where they are of a wrong type.
            is_part = isinstance(hint, type) and issubclass(hint, Part)
            if value is not None and not is_part and not is_a(value, hint):
                raise TypeError(f"provenance[{name!r}]={short(value)} is not what fitting writes there.")
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save={self.modules_to_save!r} must be a list: [{self.modules_to_save!r}].")
        for key in ("modules_to_save", "layers_pattern"):
            value = getattr(self, key)
            for name in [value] if isinstance(value, str) else value or []:
                if not _MODULE_NAME.fullmatch(name):
                    raise ValueError(f"{key}={short(value)}: {short(name)} is not a name of a module.")
        for name in PATTERN_FIELDS:
            value = getattr(self, name)
            setattr(self, name, set(value) if isinstance(value, (list, tuple, set)) else value)
        self._check()
        target: Any = getattr(self, "target_modules", None)
        has_layers = self.layers_to_transform is not None or self.layers_pattern is not None
        if isinstance(target, str) and target.lower() not in self.words and has_layers:
            remedy = "write the layers into the expression"
            if target.lower() == "all-linear":
                remedy = "name the linear layers, as in target_modules=['q_proj', 'v_proj']"
            raise ValueError(
                "layers_to_transform and layers_pattern go with a list of target_modules or None, not with "
                f"target_modules={target!r}, which they would not narrow: {remedy}."
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where to find layers_to_transform, which is missing.")

    def _check(self) -> None:
        """Refuse values, as a `ValueError`, that an adapter of this kind cannot have."""

    @property
    def described(self) -> str:
        """The adapter in the words of a message, to follow "The"."""
        raise NotImplementedError

    @property
    def fitted_modules(self) -> Mapping[str, str]:
        """The modules where it acts, each → the module that has its tensors; empty until the adapter is fitted."""
        raise NotImplementedError

    @property
    def why_idle(self) -> str:
        """The reason why the adapter changes nothing, and what to do about it; empty where it has an effect."""
        return "" if self.fitted else f"it was never fitted. {self.remedy}"

    @property
    def strengths(self) -> tuple[float, ...]:
        """The numbers of the configuration that say how strongly the adapter acts."""
        return ()

    def tensors(self) -> Layout:
        """The shapes and types of a fitted adapter's tensors, by the names that a file has for them."""
        raise NotImplementedError

    def has_size_of(self, name: str, shape: list[int]) -> bool:
        """Whether a weight, of this shape at fitting, decides a size of the tensors: another shape does not fit."""
        raise NotImplementedError

    def adopt_fit(self, saved: ChildConfig) -> None:
        """If this configuration was never fitted, take over what fitting wrote into a saved one."""
        if saved.fitted and not self.fitted:
            for entry in fields(self):
                if entry.metadata == BY_FITTING:
                    setattr(self, entry.name, getattr(saved, entry.name))
            self.__post_init__()

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values; sets become sorted lists, so that equal configurations make equal files."""
        plain = super().to_dict()
        # Granite Speech writes the folder that it was given into the configuration, and this may be a `Path`.
        plain = {name: str(value) if isinstance(value, Path) else value for name, value in plain.items()}
        return {name: sorted(value) if isinstance(value, set) else value for name, value in plain.items()}

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write `adapter_config.json`; an adapter that was never fitted gives a warning."""
        if not self.fitted:
            warnings.warn(
                f"The {self.described} saved to {target_of(save_directory)} was never fitted: loaded again it changes "
                f"nothing. {self.remedy}",
                stacklevel=2,
            )
        super().save_pretrained(save_directory, **kwargs)


def find_fault(found: Mapping[str, tuple[str, tuple[int, ...]]], config: ChildConfig, where: str) -> str | None:
    """Say what is wrong with tensors that were found `where`, by name → type and shape; None if all are right."""
    expected = config.tensors()
    missing, foreign = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing:
        return f"{missing[0]!r} and {len(missing) - 1} other tensors of the {config.described} are missing {where}"
    if foreign:
        return f"{foreign[0]!r} and {len(foreign) - 1} other tensors {where} do not belong to the {config.described}"
    for name, (shape, kinds) in expected.items():
        dtype, present = found[name]
        if present != shape or dtype not in kinds:
            return (
                f"{name!r} {where} has shape {list(present)} and type {dtype}, where {CONFIG} says shape "
                f"{list(shape)} and type {' or '.join(kinds)}: the two are not of the same adapter"
            )
    return None


# ---- values that any file may hold -----------------------------------------------------------------------------------


def adapter_config(place: str | Path) -> PeftConfig:
    """The configuration of an adapter of any method, in a folder or on the Hub. Raises `ValueError` without one."""
    try:
        return PeftConfig.from_pretrained(str(place))
    except (ValueError, OSError, KeyError, TypeError, RecursionError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        reason = f"PEFT does not know the type of adapter {reason}" if isinstance(error, KeyError) else reason
        raise ValueError(f"{place} holds no adapter with a configuration that can be read: {reason}") from error


def read_config(file: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`."""
    state = file.stat()
    if not stat.S_ISREG(state.st_mode):  # reading a pipe might never end
        raise ValueError(f"{str(file)!r} is not an ordinary file.")
    if state.st_size > MAX_CONFIG_BYTES:
        raise ValueError(f"{str(file)!r} has {state.st_size} bytes, and no configuration is that long: it is damaged.")
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))  # NaN is allowed: a figure may be NaN
    except RecursionError as error:
        raise ValueError(f"{str(file)!r} is nested too deeply to be a configuration: it is damaged.") from error
    except ValueError as error:  # wrong JSON, wrong Unicode, or a number with thousands of digits
        raise ValueError(f"{str(file)!r} is damaged: {error}. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds {short(content)}, which is not a configuration: it is damaged.")
    return content


def is_a(value: Any, hint: Any) -> bool:
    """Whether a value that could come from JSON is of a declared type; tuples and sets pass for lists."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(is_a(value, part) for part in parts)
    if origin is list:
        if isinstance(value, str):
            return parts == (str,)
        return isinstance(value, (list, tuple, set, frozenset, range)) and all(is_a(item, parts[0]) for item in value)
    if origin is tuple:
        is_list = isinstance(value, (list, tuple)) and len(value) == len(parts)
        return is_list and all(map(is_a, value, parts))
    if origin is dict:
        return isinstance(value, dict) and all(is_a(k, parts[0]) and is_a(v, parts[1]) for k, v in value.items())
    if hint is Any or not isinstance(hint, type):
        return True
    if hint in (int, float):  # True is not a number here
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    return isinstance(value, str) if issubclass(hint, str) else isinstance(value, hint)


def field_error(message: str, writer: str = "Fitting") -> ValueError:
    """The error for a field that users do not write, with a value that its writer never writes."""
    return ValueError(f"{message}. {writer} writes that; in a loaded {CONFIG} it means that the file is damaged.")


def short(value: Any) -> str:
    """A value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def number_of(number: int, noun: str) -> str:
    """A number with its noun, as in "1 row" and "2 rows"; the plural of the noun ends in s."""
    return f"{number} {noun}" + ("" if number == 1 else "s")


def type_text(hint: Any) -> str:
    """A declared type as a message shows it."""
    text = str(hint) if typing.get_origin(hint) else getattr(hint, "__name__", str(hint))
    return re.sub(r"\b(typing|peft\.utils\.peft_types)\.|<enum '|<class '|'>", "", text)


@functools.cache
def field_types(kind: Any) -> dict[str, Any]:
    """The declared types of a dataclass's fields."""
    return typing.get_type_hints(kind)


# ---- how an adapter was made, and what was measured of it ------------------------------------------------------------


class Part:
    """Facts that are read from the configuration of an adapter, or from a value in it."""

    @classmethod
    def of(cls, source: Any) -> Any:
        """Read the facts that are of their declared types; a configuration of another method has none."""
        values = getattr(source, "provenance", source)
        known = values if isinstance(values, dict) else {}
        found: dict[str, Any] = {}
        kind: Any = cls
        for name, hint in field_types(kind).items():
            value = known.get(name)
            if isinstance(hint, type) and issubclass(hint, Part):
                found[name] = hint.of(value)
            elif value is not None and is_a(value, hint):
                # A single text stands for a list with one item.
                found[name] = [value] if isinstance(value, str) and hint == list[str] else value
        return cls(**found)


@dataclass(frozen=True)
class Data(Part):
    """The source of the data."""

    datasets: list[str] = field(default_factory=list)  # names on the Hub
    labels_from: str = ""  # who or what labelled them, in words


@dataclass(frozen=True)
class MakerFacts(Data):
    """Facts that only the maker of an adapter knows, and figures that were measured afterwards."""

    license: str = ""  # its identifier on the Hub
    language: list[str] = field(default_factory=list)  # language codes
    results: list[dict[str, Any]] = field(default_factory=list)  # rows of `hf-erasure evaluate`, as the card shows them
    results_of: str = ""  # the state of the adapter when `results` were measured


@dataclass(frozen=True)
class Training(Part):
    """What a callback measured last while the model under the adapter was trained."""

    step: int | None = None  # the step of the Trainer
    figures: dict[str, Any] = field(default_factory=dict)  # by the names under which they are logged
    measured_on: str = ""  # the data that the figures were measured on, in words


@dataclass(frozen=True)
class ChosenEdit(Part):
    """How the strength of a GRADIEND was chosen."""

    goal: str = ""  # what the strength was chosen for
    budget: float | None = None  # how much worse language modelling may get, as a share of itself
    base: dict[str, Any] = field(default_factory=dict)  # what was measured of the model without the edit
    best: dict[str, Any] = field(default_factory=dict)  # the same with the chosen edit
    # How much of the edit is left after rounding to the dtype of the weights, from 0 to 1.
    kept_share: float | None = None
    measured_on: str = ""  # the data that `base` and `best` were measured on, in words


@dataclass(frozen=True)
class RecipeRun(Data):
    """What the recipe that made an adapter says of its data, and what its run measured on the test split."""

    results: list[dict[str, Any]] = field(default_factory=list)  # erasure only: rows, as the card shows them
    edit: ChosenEdit = field(default_factory=ChosenEdit)  # GRADIEND only: the edit that it was saved with


@dataclass(frozen=True)
class Provenance(Part):
    """What is known of how an adapter was made."""

    hf_erasure_version: str = ""  # the version of this package that fitted it
    base_class: str = ""  # the class of the base model
    fingerprint: dict[str, Any] = field(default_factory=dict)  # weight → a sample of its values
    examples: int | None = None  # how many sequences or pairs it was fitted on
    tokens: int | None = None  # how many positions it was fitted on
    counterfactuals: int = 0  # how many counterfactuals of the texts were fitted on, too
    pool: str = ""  # which part of a sequence is guarded
    reader: str = ""  # what the model's head reads, in words
    # Site → magnitude of the correlation with the concept, before and after.
    leakage: dict[str, tuple[float, float]] = field(default_factory=dict)
    # Site → the two ends of the confidence interval before, and the two ends after.
    leakage_intervals: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
    measured_on: str = ""  # the data that the leakage was measured on, in words
    # Site → what its eraser leaves at a visit, as a share of `|x| |z|`. Only modules that are called several times are
    # here, and only where more than rounding is left, so that the guarantee does not hold.
    residuals: dict[str, float] = field(default_factory=dict)
    # The sites that are called several times and were fitted in one pass, which promises nothing at later calls.
    unsettled: list[str] = field(default_factory=list)
    # The other adapters that acted at fitting; None where an older release did not write it.
    active_adapters: list[dict[str, Any]] | None = None
    # The adapters that this one was combined from: name → what is known of the adapter.
    combined_from: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)  # where the data come from
    estimator: str = ""  # GRADIEND only: how its neuron was estimated
    task: str = ""  # GRADIEND only: the kind of language modelling
    # GRADIEND only: pair → correlation of the neuron with the class.
    correlation: dict[str, float] = field(default_factory=dict)
    selection: ChosenEdit = field(default_factory=ChosenEdit)  # GRADIEND only: how its strength was chosen
    training: Training = field(default_factory=Training)  # what was measured while the model was trained
    recipe: RecipeRun = field(default_factory=RecipeRun)  # what a run of a recipe says of its data, and has measured
    card: MakerFacts = field(default_factory=MakerFacts)  # what its maker wrote for the card
