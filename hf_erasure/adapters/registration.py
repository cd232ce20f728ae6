"""Teach PEFT two new adapter types.

`PeftType` is a closed enum, and PEFT looks every type up in it by name, so a mere string in its tables would break
`load_adapter`. The member is therefore added to the enum itself, in the way the `enum` module builds its own members.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType, register_peft_method

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner


# On a member that we added, so that it is known again after this module was reloaded.
_MARK = "_added_by_hf_erasure"


def extend_peft_type(name: str) -> PeftType:
    """Add `name` to `PeftType` and return the member; a second call returns the same member.

    Args:
        name: The new type, in upper case, e.g. `"CONCEPT_ERASURE"`.

    Raises:
        ImportError: If this PEFT release ships a type of that name itself, or its enum can no longer be extended.
    """
    if hasattr(PeftType.__members__.get(name), _MARK):
        return PeftType(name)
    if name in PeftType.__members__:
        raise ImportError(
            f"peft {peft.__version__} already has a PeftType.{name}, which hf_erasure meant to add. Install a release "
            "of hf-erasure made for this peft, or an older peft."
        )
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    member.__objclass__ = PeftType  # type: ignore[attr-defined]
    # `EnumMeta` keeps the definition order of members for comparisons made by newer Pythons.
    member._sort_order_ = len(PeftType.__members__)  # type: ignore[attr-defined]
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    # EnumMeta forbids rebinding members through normal attribute access, hence `type.__setattr__`.
    type.__setattr__(PeftType, name, member)
    if PeftType(name) is not member or getattr(PeftType, name) is not member:
        raise ImportError(
            f"PeftType of peft {peft.__version__} could not be extended by {name!r}: hf_erasure does not support this "
            "combination of Python and peft."
        )
    setattr(member, _MARK, True)
    return member


def register(name: str, config_cls: type[PeftConfig], tuner_cls: type[BaseTuner]) -> None:
    """Enter a configuration and its tuner in PEFT's tables under `name` (lower case).

    Idempotent; the classes of a reloaded module take the places of their former selves.
    """
    peft_type = PeftType(name.upper())
    if peft_type in PEFT_TYPE_TO_TUNER_MAPPING and hasattr(peft_type, _MARK):
        PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
        PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = tuner_cls
        return
    register_peft_method(name=name, config_cls=config_cls, model_cls=tuner_cls)
