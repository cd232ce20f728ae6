"""What the configurations of both kinds of adapter have in common, for the code that serves either."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from peft import PeftConfig

from .field_checks import check_names, check_types, fits, short

# The names that safetensors has for float32 and float64, and for int32.
FLOATS, INDICES = ("F32", "F64"), ("I32",)
# What this package reads of `provenance`; cards show the rest.
_PROVENANCE: dict[str, Any] = {
    "base_class": str,
    "fingerprint": dict[str, Any],
    "leakage": dict[str, list[float]],
    "examples": float,
    "tokens": float,
    "pool": str,
    "active_adapters": list[dict[str, Any]],
    "reader": str,
    "leakage_intervals": dict[str, list[float]],
    "measured_on": str,
}


@dataclass
class ChildConfig(PeftConfig):
    """The configuration of an adapter that hangs on its modules as a child.

    Args:
        sticky: Stay active when another adapter is activated, until disabled or deleted.
        modules_to_save: Names of modules, such as a classifier, that are trained and saved with the adapter.
        fitted: Written by fitting. Whether there are values to load.
        provenance: Written by fitting. What the adapter was made from: the plugin's version, the class of the base
            model, the fingerprint of its weights, the other adapters that acted, and what was measured.

    Attributes:
        noun: What messages call an adapter of this kind.
        example: A configuration to write in a message.
    """

    noun: ClassVar[str] = "hf_erasure adapter"
    example: ClassVar[str] = "ConceptErasureConfig(labels=[…])"

    sticky: bool = field(default=False, metadata={"help": "Stay active when another adapter is activated."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Modules that are trained and saved with the adapter."}
    )
    fitted: bool = field(default=False, metadata={"help": "Written by fitting."})
    provenance: dict[str, Any] = field(default_factory=dict, metadata={"help": "Written by fitting."})

    @property
    def described(self) -> str:
        """The adapter in the words of a message, to follow "The"."""
        raise NotImplementedError

    @property
    def remedy(self) -> str:
        """What to call so that the adapter is fitted."""
        raise NotImplementedError

    @property
    def fitted_modules(self) -> Iterable[str]:
        """Names of the modules that a fitted adapter acts on."""
        raise NotImplementedError

    def tensors(self) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
        """The tensors of a fitted adapter, by name: the shape, and the types by which safetensors knows them."""
        raise NotImplementedError

    def has_size_of(self, name: str, shape: list[int]) -> bool:
        """Whether tensors of a fitted adapter have a size that is one of a weight's.

        Args:
            name: The weight.
            shape: Its shape where the adapter was fitted.
        """
        raise NotImplementedError

    def _check_types(self) -> None:
        """What may be in the fields at all; any file may be the source of them.

        Raises:
            TypeError: If a value is of another type than the field's.
            ValueError: If a name is none.
        """
        check_types(self)
        if isinstance(self.modules_to_save, str):
            raise TypeError(f"modules_to_save={self.modules_to_save!r} must be a list: [{self.modules_to_save!r}].")
        check_names("modules_to_save", self.modules_to_save)
        check_names("layers_pattern", getattr(self, "layers_pattern", None))
        for key, kind in _PROVENANCE.items():
            if self.provenance.get(key) is not None and not fits(self.provenance[key], kind):
                raise TypeError(f"provenance[{key!r}]={short(self.provenance[key])} is not what fitting writes there.")

    def copied(self, more_to_save: Iterable[str] = ()) -> ChildConfig:
        """A copy with a list `modules_to_save` of its own, which names `more_to_save` too."""
        config = copy.copy(self)
        names = [*(self.modules_to_save or ()), *more_to_save]
        config.modules_to_save = list(dict.fromkeys(names)) or self.modules_to_save
        return config

    def take_fitted(self, saved: ChildConfig) -> None:
        """Take over what fitting wrote into a saved configuration, where this one was never fitted.

        Raises:
            ValueError: If the two do not go together.
        """
        if saved.fitted and not self.fitted:
            for known in fields(self):
                if known.metadata.get("help") == "Written by fitting.":
                    setattr(self, known.name, getattr(saved, known.name))
            self.__post_init__()

    def _as_sets(self) -> None:
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple, set)):
                setattr(self, name, set(value))

    def _check_layers(self) -> None:
        target: Any = getattr(self, "target_modules", None)
        layers: Any = getattr(self, "layers_to_transform", None)
        pattern: Any = getattr(self, "layers_pattern", None)
        if isinstance(target, str) and (layers is not None or pattern is not None):
            remedy = "write the layers into the expression"
            if target.lower() == "all-linear":
                remedy = "name the linear layers, as in target_modules=['q_proj', 'v_proj']"
            raise ValueError(
                "layers_to_transform and layers_pattern go with a list of target_modules or None, not with "
                f"target_modules={target!r}, which they would not narrow: {remedy}."
            )
        if pattern and layers is None:
            raise ValueError("layers_pattern says where to find layers_to_transform, which is missing.")

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON knows them, with sets as sorted lists so that equal configs make equal files."""
        plain = super().to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in plain.items()}
