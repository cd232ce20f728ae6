"""Check at import the internals of PEFT, transformers, accelerate and torch that are used, and add types to PEFT.

`hf_erasure.patches` lists the functions that are wrapped. If a release lacked an internal, a user's call would fail
halfway or give wrong results; so the import fails instead, and its error names what is missing where. The import warns
of a release of transformers that demands a newer PEFT than the installed one, since every `add_adapter` would fail.

`PeftType` is a closed enum, and PEFT looks every type up in it by name, so a mere string in its tables would break
`load_adapter`. A new member is therefore added to the enum itself, in the way the `enum` module builds its own.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pkgutil import resolve_name
from typing import TYPE_CHECKING

from packaging.version import Version
from peft import mapping
from peft.utils import peft_types
from transformers.integrations import peft as integration

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils.peft_types import PeftType


@dataclass(frozen=True)
class Internal:
    """A module, class, function or attribute that must exist."""

    module: str  # where it is imported from
    name: str  # its name there; with a dot for an attribute of a class
    parameters: tuple[str, ...] = ()  # names of parameters that it must accept

    @property
    def package(self) -> str:
        """The package that has it, by the name under which pip installs it."""
        return self.module.partition(".")[0]

    def why_missing(self) -> str | None:
        """Say which part of it is missing; None if all parts are there."""
        try:
            found = resolve_name(f"{self.module}:{self.name}")
        except ImportError:
            return f"the module {self.module}"
        except AttributeError:
            return f"{self.module}.{self.name}"
        if self.parameters:
            parameters = inspect.signature(found).parameters
            lacking = [name for name in self.parameters if name not in parameters]
            if lacking:
                return f"the parameter {lacking[0]!r} of {self.module}.{self.name}"
        return None


# An attribute of the enum members that this package adds, so that they are recognised after this module is reloaded.
_MARK = "_added_by_hf_erasure"
_TUNERS = "peft.tuners.tuners_utils"
_MIXIN = "transformers.integrations.peft"

INTERNALS = (
    # the new types
    Internal("peft.utils.peft_types", "register_peft_method", ("name", "config_cls", "model_cls")),
    Internal("peft.utils.peft_types", "PeftType._member_map_"),
    Internal("peft.utils.peft_types", "PeftType._value2member_map_"),
    Internal("peft.utils.peft_types", "PeftType._member_names_"),
    Internal("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
    Internal("peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING"),
    Internal("peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING"),
    # what the two tuners override or call
    Internal(_TUNERS, "BaseTuner._check_target_module_exists", ("peft_config", "key")),
    Internal(_TUNERS, "BaseTuner._prepare_adapter_config", ("peft_config", "model_config")),
    Internal(_TUNERS, "BaseTuner._create_and_replace", ("peft_config", "adapter_name", "target", "current_key")),
    Internal(_TUNERS, "BaseTuner._unload_and_optionally_merge", ("merge", "safe_merge", "adapter_names")),
    Internal(_TUNERS, "BaseTuner._check_merge_allowed"),
    Internal(_TUNERS, "BaseTuner._check_tied_modules", ("model", "peft_config")),
    Internal(_TUNERS, "BaseTuner.delete_adapter", ("adapter_name",)),
    Internal(_TUNERS, "BaseTuner.set_adapter", ("adapter_name",)),
    Internal("peft", "PeftModel._enable_peft_forward_hooks"),
    # what the children are
    Internal(_TUNERS, "BaseTunerLayer._get_available_adapters"),
    Internal(_TUNERS, "BaseTunerLayer._active_adapter"),
    Internal(_TUNERS, "BaseTunerLayer._disable_adapters"),
    Internal(_TUNERS, "BaseTunerLayer.get_base_layer"),
    Internal("peft.tuners._buffer_dict", "BufferDict"),
    Internal("peft.utils", "AuxiliaryTrainingWrapper.unload_and_optionally_merge_module"),
    Internal("peft.utils", "ModulesToSaveWrapper.check_set_adapter", ("adapter_name",)),
    Internal("peft.utils", "ModulesToSaveWrapper.delete_adapter", ("adapter_name", "new_active_adapters")),
    Internal("peft.utils", "TrainableTokensWrapper.delete_adapter", ("adapter_name", "new_active_adapters")),
    Internal(_MIXIN, "PeftAdapterMixin._hf_peft_config_loaded"),
    Internal("transformers.pytorch_utils", "Conv1D"),
    Internal("transformers.utils.loading_report", "LoadStateDictInfo"),
    # offloaded weights
    Internal("accelerate.hooks", "AlignDevicesHook", ("execution_device", "offload", "weights_map")),
    # how a sequential fit leaves a forward pass in the middle, and keeps its tensors on disk
    *(
        Internal(module, name)
        for module, kind in (("torch.utils._python_dispatch", "dispatch"), ("torch.overrides", "function"))
        for name in (f"_get_current_{kind}_mode_stack", "_pop_mode", "_push_mode")
    ),
    Internal("torch", "_C._is_fwd_grad_enabled"),
    Internal("torch", "_C._set_fwd_grad_enabled"),
    Internal("torch", "UntypedStorage._new_with_weak_ptr"),
    Internal("torch.multiprocessing.reductions", "StorageWeakRef"),
    Internal("torch.utils._pytree", "tree_leaves"),
)


def check_internals(internals: tuple[Internal, ...] = INTERNALS) -> None:
    """Raise an `ImportError` if an internal is missing."""
    for internal in internals:
        missing = internal.why_missing()
        if missing is not None:
            raise ImportError(
                f"hf_erasure relies on {missing}, which {internal.package} {version(internal.package)} does not have. "
                f"Install releases that go together, pip install hf-erasure, or a release of hf-erasure made for this "
                f"{internal.package}."
            )


def check_versions(demanded: str | None = getattr(integration, "MIN_PEFT_VERSION", None)) -> None:
    """Warn if transformers states a lowest PEFT release and the installed PEFT is older."""
    if demanded is None or Version(version("peft")) >= Version(demanded):
        return
    transformers = version("transformers")
    warnings.warn(
        f"transformers {transformers} demands peft>={demanded}, and peft {version('peft')} is installed: "
        "model.add_adapter and model.load_adapter will raise for every adapter, LoRA's too. Install releases that go "
        f"together: pip install 'peft>={demanded}', or, while that is not released, pip install "
        f"'transformers<{transformers}'.",
        stacklevel=2,
    )


def extend_peft_type(name: str) -> PeftType:
    """Add a type such as `"CONCEPT_ERASURE"` to `PeftType` and return the member; a second call returns the same."""
    enum_type = peft_types.PeftType
    if hasattr(enum_type.__members__.get(name), _MARK):
        return enum_type(name)
    if name in enum_type.__members__:
        raise ImportError(
            f"peft {version('peft')} already has a PeftType.{name}, which hf_erasure would add. Install a release of "
            "hf-erasure made for this peft, or an older peft."
        )
    member = str.__new__(enum_type, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = enum_type  # type: ignore[attr-defined]
    # `EnumMeta` keeps the order in which members are defined, and newer Pythons compare it.
    member._sort_order_ = len(enum_type.__members__)  # type: ignore[attr-defined]
    enum_type._member_map_[name] = member
    enum_type._value2member_map_[name] = member
    enum_type._member_names_.append(name)
    # EnumMeta does not allow members to be set by a normal assignment, so `type.__setattr__` is used.
    type.__setattr__(enum_type, name, member)
    if enum_type(name) is not member or getattr(enum_type, name) is not member:
        raise ImportError(
            f"PeftType of peft {version('peft')} could not be extended by {name!r}: hf_erasure does not support this "
            "combination of Python and peft."
        )
    setattr(member, _MARK, True)
    return member


def register(name: str, config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Add a configuration and its tuner to PEFT's tables under `name` (lower case), also after a reload."""
    peft_type = peft_types.PeftType(name.upper())
    if peft_type in mapping.PEFT_TYPE_TO_TUNER_MAPPING and hasattr(peft_type, _MARK):
        mapping.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_cls
        return
    peft_types.register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls)


check_internals()
check_versions()
