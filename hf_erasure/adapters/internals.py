"""What this package relies on in PEFT, transformers and accelerate beyond their documented surface, checked at import.

What of it is wrapped stands in `hf_erasure.patches`, and is checked there. A release that lacks one of these would fail
later, in the middle of a user's call, or not at all and give wrong results; so the import fails, and says what is
missing where. A release of transformers that demands a newer PEFT than the installed one still imports, and fails in
every `add_adapter`: the import warns of it.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version
from transformers.integrations import peft as integration


@dataclass(frozen=True)
class Internal:
    """Something that must be there.

    Attributes:
        package: Whose it is, under the name it is installed by.
        module: Where it is imported from.
        name: Its name there; with a dot for an attribute of a class.
        parameters: Names of parameters that it must take.
    """

    package: str
    module: str
    name: str
    parameters: tuple[str, ...] = ()

    def why_missing(self) -> str | None:
        """What is not as expected; None when all is."""
        try:
            found = importlib.import_module(self.module)
        except ImportError:
            return f"the module {self.module}"
        for part in self.name.split("."):
            if not hasattr(found, part):
                return f"{self.module}.{self.name}"
            found = getattr(found, part)
        if self.parameters:
            taken = inspect.signature(found).parameters  # type: ignore[arg-type]
            lacking = [name for name in self.parameters if name not in taken]
            if lacking:
                return f"the parameter {lacking[0]!r} of {self.module}.{self.name}"
        return None


_TUNERS = "peft.tuners.tuners_utils"
_MIXIN = "transformers.integrations.peft"

INTERNALS = (
    # the new types
    Internal("peft", "peft.utils.peft_types", "register_peft_method", ("name", "config_cls", "model_cls")),
    Internal("peft", "peft.utils.peft_types", "PeftType._member_map_"),
    Internal("peft", "peft.utils.peft_types", "PeftType._value2member_map_"),
    Internal("peft", "peft.utils.peft_types", "PeftType._member_names_"),
    Internal("peft", "peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
    Internal("peft", "peft.mapping", "PEFT_TYPE_TO_TUNER_MAPPING"),
    Internal("peft", "peft.mapping", "PEFT_TYPE_TO_PREFIX_MAPPING"),
    # what the two tuners override or call
    Internal("peft", _TUNERS, "BaseTuner._check_target_module_exists", ("peft_config", "key")),
    Internal("peft", _TUNERS, "BaseTuner._prepare_adapter_config", ("peft_config", "model_config")),
    Internal(
        "peft", _TUNERS, "BaseTuner._create_and_replace", ("peft_config", "adapter_name", "target", "current_key")
    ),
    Internal("peft", _TUNERS, "BaseTuner._unload_and_optionally_merge", ("merge", "safe_merge", "adapter_names")),
    Internal("peft", _TUNERS, "BaseTuner._check_merge_allowed"),
    Internal("peft", _TUNERS, "BaseTuner._check_tied_modules", ("model", "peft_config")),
    Internal("peft", _TUNERS, "BaseTuner.delete_adapter", ("adapter_name",)),
    Internal("peft", "peft", "PeftModel._enable_peft_forward_hooks"),
    # what the children are
    Internal("peft", _TUNERS, "BaseTunerLayer._get_available_adapters"),
    Internal("peft", _TUNERS, "BaseTunerLayer._active_adapter"),
    Internal("peft", _TUNERS, "BaseTunerLayer._disable_adapters"),
    Internal("peft", _TUNERS, "BaseTunerLayer.get_base_layer"),
    Internal("peft", "peft.tuners._buffer_dict", "BufferDict"),
    Internal("peft", "peft.utils", "AuxiliaryTrainingWrapper.unload_and_optionally_merge_module"),
    Internal("transformers", _MIXIN, "PeftAdapterMixin._hf_peft_config_loaded"),
    Internal("transformers", "transformers.pytorch_utils", "Conv1D"),
    # offloaded weights
    Internal("accelerate", "accelerate.hooks", "ModelHook"),
    Internal("accelerate", "accelerate.hooks", "AlignDevicesHook", ("execution_device", "offload", "weights_map")),
)


def check_internals(internals: tuple[Internal, ...] = INTERNALS) -> None:
    """Check everything that is relied on.

    Raises:
        ImportError: Names what is missing, the release that lacks it, and the releases that have it.
    """
    for internal in internals:
        missing = internal.why_missing()
        if missing is not None:
            raise ImportError(
                f"hf_erasure relies on {missing}, which {internal.package} {installed(internal.package)} does not "
                f"have. It supports {internal.package}{_supported(internal.package)}: pip install "
                f"'{internal.package}{_supported(internal.package)}', or install a release of hf-erasure made for this "
                f"{internal.package}."
            )


def check_pair(demanded: str | None = getattr(integration, "MIN_PEFT_VERSION", None)) -> None:
    """Warn where the installed transformers demands a newer PEFT than the installed one.

    Args:
        demanded: The oldest PEFT that transformers accepts; None when it does not say.
    """
    if demanded is None or Version(installed("peft")) >= Version(demanded):
        return
    transformers = installed("transformers")
    warnings.warn(
        f"transformers {transformers} demands peft>={demanded}, and peft {installed('peft')} is installed: "
        "model.add_adapter and model.load_adapter will raise for every adapter, LoRA's too. Install releases that go "
        f"together: pip install 'peft>={demanded}', or, while that is not released, pip install "
        f"'transformers<{transformers}'.",
        stacklevel=2,
    )


def installed(package: str) -> str:
    """The release of a package that is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _supported(package: str) -> str:
    """The releases of a package that this package asks for, as pip writes them."""
    try:
        wanted = [Requirement(text) for text in requires("hf-erasure") or ()]
    except PackageNotFoundError:  # run from a folder of sources
        return ""
    return next((str(found.specifier) for found in wanted if found.name == package and found.marker is None), "")


check_internals()
check_pair()
