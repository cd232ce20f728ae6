"""What an adapter was made from and what was measured of it: the `provenance` of its configuration, read with types.

Fitting, merging, callbacks and `hf_erasure.hub.describe` write it as plain JSON under the names of the fields below. It
may come from a file of a stranger, so it is read by `Provenance.of`, which leaves out what is not of its type.
"""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Any

from .files import fits, hints, short

# Parts that are written by other code than what fits the adapter.
RECORD, TRAINING, RECIPE, TOLD = "active_adapters", "training", "recipe", "card"
# Fields that decide what is done with an adapter: one of another type is refused when the configuration is read.
_REFUSED = (
    "base_class", "fingerprint", "leakage", "examples", "tokens", "pool", RECORD, "reader", "leakage_intervals",
    "measured_on",
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Where the data come from.

    Attributes:
        datasets: Names on the Hub.
        labels_from: Who or what labelled them, in words.
    """

    datasets: list[str] = field(default_factory=list)
    labels_from: str = ""


@dataclass(frozen=True)
class Told(Data):
    """What only its maker knows of an adapter, and what was measured of it afterwards.

    Attributes:
        license: As the Hub writes it.
        language: Codes.
        results: Rows of `hf-erasure evaluate`, as the card shows them.
        results_of: The state of the adapter that they are of.
    """

    license: str = ""
    language: list[str] = field(default_factory=list)
    results: list[Any] = field(default_factory=list)
    results_of: str = ""


@dataclass(frozen=True)
class Training:
    """What a callback measured last while the model under the adapter was trained.

    Attributes:
        step: Of the Trainer.
        figures: By the names that are logged.
        measured_on: What the figures are on, in words.
    """

    step: int | None = None
    figures: dict[str, Any] = field(default_factory=dict)
    measured_on: str = ""


@dataclass(frozen=True)
class ChosenEdit:
    """How the strength of a GRADIEND was chosen.

    Attributes:
        goal: What it was chosen for.
        budget: How much worse language modelling may get, as a share of itself.
        base: What was measured of the model without the edit.
        best: The same with the chosen one.
        kept_share: How much of the edit is left after rounding to the dtype of the weights, from 0 to 1.
        measured_on: What it was measured on, in words.
    """

    goal: str = ""
    budget: float | None = None
    base: dict[str, Any] = field(default_factory=dict)
    best: dict[str, Any] = field(default_factory=dict)
    kept_share: float | None = None
    measured_on: str = ""


@dataclass(frozen=True)
class Provenance:
    """What is known of how an adapter was made.

    Attributes:
        hf_erasure_version: The version of this package that fitted it.
        base_class: The class of the base model.
        fingerprint: Weight → a sample of its values.
        examples: How many sequences or pairs it was fitted on.
        tokens: How many positions.
        pool: What of a sequence is guarded.
        reader: What reads that, in words.
        leakage: Site → correlation with the concept before and after, magnitudes.
        leakage_intervals: Site → the two ends of the interval before, and the two after.
        measured_on: What the leakage was measured on, in words.
        active_adapters: The other adapters that acted at fitting; None where an older release did not write it.
        combined_from: Name → what is known of the adapters that this one was combined from.
        data: Where the data come from.
        estimator: Of a GRADIEND: how its neuron was estimated.
        task: Of a GRADIEND: the kind of language modelling.
        correlation: Of a GRADIEND: pair → correlation of the neuron with the class.
        selection: Of a GRADIEND: how its strength was chosen.
        training: What was measured while the model was trained.
        recipe: The digest of the results of the recipe that made it.
        card: What its maker told.
    """

    hf_erasure_version: str = ""
    base_class: str = ""
    fingerprint: dict[str, Any] = field(default_factory=dict)
    examples: int | None = None
    tokens: int | None = None
    pool: str = ""
    reader: str = ""
    leakage: dict[str, tuple[float, float]] = field(default_factory=dict)
    leakage_intervals: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
    measured_on: str = ""
    active_adapters: list[dict[str, Any]] | None = None
    combined_from: dict[str, Any] = field(default_factory=dict)
    data: Data = field(default_factory=Data)
    estimator: str = ""
    task: str = ""
    correlation: dict[str, float] = field(default_factory=dict)
    selection: ChosenEdit = field(default_factory=ChosenEdit)
    training: Training = field(default_factory=Training)
    recipe: str = ""
    card: Told = field(default_factory=Told)

    @classmethod
    def of(cls, config: Any) -> Provenance:
        """What a configuration says; nothing where it is one of another method."""
        made: Provenance = _read(cls, getattr(config, "provenance", None))
        return made


def _read(kind: Any, values: Any) -> Any:
    """A dataclass of those values that are of the declared types."""
    known = values if isinstance(values, dict) else {}
    found: dict[str, Any] = {}
    for name, hint in hints(kind).items():
        value = known.get(name)
        if is_dataclass(hint):
            found[name] = _read(hint, value)
        elif value is not None and fits(value, hint):
            # One text may stand for a list of one.
            found[name] = [value] if isinstance(value, str) and hint == list[str] else value
    return kind(**found)


def refuse_wrong(values: dict[str, Any]) -> None:
    """Refuse a provenance that code would trip over.

    Raises:
        TypeError: Names the entry and its value.
    """
    for name in _REFUSED:
        if values.get(name) is not None and not fits(values[name], hints(Provenance)[name]):
            raise TypeError(f"provenance[{name!r}]={short(values[name])} is not what fitting writes there.")
