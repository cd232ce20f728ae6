"""How weights are kept: offloaded, sharded, shared by modules, or packed by a quantiser.

bitsandbytes keeps integers and their scales in a parameter of its own class. quanto and torchao use a tensor that looks
like a float tensor, and 8-bit floats have their scales in another parameter. None of them can take an edit exactly.
"""

from __future__ import annotations

from collections import ChainMap
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FlatParameter

from .layer import ordinary

# This text is given instead of a dtype where a quantiser has packed the numbers.
QUANTISED = "quantised"
OUT_OF_REACH = "is offloaded where it cannot be reached. Load the model on one device"
# Messages tell users to do this where weights are quantised.
FLOAT_FIRST = "load the float weights, merge the adapter there, and quantise the merged model"


# ---- devices, and weights that accelerate has offloaded --------------------------------------------------------------


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights of any module of a model are offloaded."""
    return any(map(owns_offloaded, model.modules()))


def owns_offloaded(module: nn.Module) -> bool:
    """Whether weights of a module itself are offloaded, or will be after its next forward pass."""
    return hook_of(module) is not None or any(p.device.type == "meta" for p in module.parameters(recurse=False))


def value_of(module: nn.Module, name: str) -> Tensor | None:
    """The values of a module's own parameter, wherever they are; None where it has no such parameter."""
    parameter, hook = module._parameters.get(name), hook_of(module)
    if parameter is None:
        return None
    if hook is not None:  # also after a failed forward pass, which leaves the weights in the module
        found: Tensor = hook.weights_map[name]
        return found.detach()
    if parameter.device.type == "meta":
        raise ValueError(f"The parameter {name!r} of a {type(module).__name__} {OUT_OF_REACH}.")
    return parameter.detach()


def values_and_dtype(model: nn.Module, name: str) -> tuple[Tensor | None, str]:
    """The numbers of a model's parameter, wherever they are, and the name of their dtype or `QUANTISED`.

    The parameter is found also where a LoRA has wrapped its module since. The numbers are None where this process
    cannot read all of them. The numbers of a quantised parameter are unpacked.
    """
    path, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(path)
    except AttributeError:
        return None, ""
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    parameter = module._parameters.get(own)  # not of the copy that PEFT trains of a module
    if parameter is None:
        return None, ""
    hook, is_elsewhere = hook_of(module), parameter.device.type == "meta"
    if is_quantised(parameter):
        return None if is_elsewhere else dequantised(module, own), QUANTISED
    if is_sharded(parameter) or (is_elsewhere and hook is None):
        return None, ""
    values: Tensor = parameter if hook is None else hook.weights_map[own]
    return values.detach(), str(parameter.dtype).removeprefix("torch.")


def value_on_execution_device(module: nn.Module, name: str) -> Tensor | None:
    """The values of an offloaded parameter on the device where accelerate runs its module; None without its hook."""
    hook = hook_of(module)
    value = None if hook is None else value_of(module, name)
    return None if value is None else value.to(hook.execution_device)


def values_of(module: nn.Module) -> dict[str, Tensor]:
    """The values of all of a module's own parameters, wherever they are."""
    found = {name: value_of(module, name) for name in module._parameters}
    return {name: value for name, value in found.items() if value is not None}


def write_value(module: nn.Module, name: str, value: Tensor) -> None:
    """Store a new value of an offloaded parameter; where it equals the original value, the change is dropped."""
    hook = hook_of(module)
    if hook is None:
        raise ValueError(f"The parameter {name!r} of a {type(module).__name__} {OUT_OF_REACH}.")
    if not isinstance(hook.weights_map, _ChangedWeights):
        hook.weights_map = _ChangedWeights(hook)
    changed = hook.weights_map
    value = value.detach().to("cpu", module.get_parameter(name).dtype)
    original = changed.maps[1].get(name)
    if original is not None and torch.equal(original.cpu(), value):
        changed.maps[0].pop(name, None)
        hook.original_devices[name] = changed.devices[name]
    else:
        changed.maps[0][name] = value
        # When hooks are removed and the weight came straight from disk, this is the only copy of the value.
        hook.original_devices[name] = value.device


def set_parameter(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Give a parameter a value on its own device or where it is offloaded; None removes the parameter."""
    present, hook = module._parameters.get(name), hook_of(module)
    if value is None:
        module._parameters[name] = None
        if hook is not None and isinstance(hook.weights_map, _ChangedWeights):
            hook.weights_map.maps[0].pop(name, None)
            hook.original_devices.pop(name, None)
        return
    offloaded = owns_offloaded(module)
    if present is None:
        made = torch.empty_like(value, device="meta") if offloaded else ordinary(value)
        module.register_parameter(name, nn.Parameter(made, module.get_parameter("weight").requires_grad))
    elif not offloaded:
        present.data = ordinary(value.to(present.device, present.dtype))
    if offloaded:
        write_value(module, name, value)


class _ChangedWeights(ChainMap[str, Tensor]):
    """New values over a hook's map of weights, and the devices to which a removed hook returns the original ones."""

    def __init__(self, hook: Any) -> None:
        super().__init__({}, hook.weights_map)
        self.devices = dict(hook.original_devices)


def hook_of(module: nn.Module) -> Any:
    """The hook that loads a module's own offloaded parameters; None if it has no such hook, or an outer module has."""
    hook: Any = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", [hook])
    return next((h for h in hooks if isinstance(h, AlignDevicesHook) and h.offload and h.weights_map is not None), None)


def is_sharded(parameter: Tensor) -> bool:
    """Whether FSDP keeps only a part of a parameter in this process."""
    by_fsdp1 = isinstance(parameter, FlatParameter) or getattr(parameter, "_fsdp_flattened", False)
    return by_fsdp1 or type(parameter.data).__name__ == "DTensor"


def shared_weights(model: nn.Module) -> dict[str, list[str]]:
    """Parameter name → all names of its tensor, for tensors with several names (tied embeddings)."""
    # In an offloaded model, each name of a tied weight has a placeholder of its own.
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    if ties and not is_offloaded(model):
        ties = {}
    tied = {*ties, *ties.values()}
    names: dict[int | str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.replace(".base_layer.", ".")  # the name without a LoRA around the module
        names.setdefault(ties.get(plain, plain) if plain in tied else id(parameter), []).append(name)
    return {name: group for group in names.values() if len(group) > 1 for name in group}


def tied_to(model: nn.Module, owner: str) -> list[str] | None:
    """All names of a parameter that a module shares with others; None where it shares none."""
    return next((names for name, names in shared_weights(model).items() if name.rpartition(".")[0] == owner), None)


# ---- weights that a quantiser has packed -----------------------------------------------------------------------------


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is packed by a quantiser; a sharded weight does not count."""
    kind = type(weight.data)
    # Numbers of 8 bits have a scale in another parameter.
    is_plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    return not is_plain or not (kind is Tensor or kind.__name__ == "DTensor")


def has_quantised(module: nn.Module) -> bool:
    """Whether a module itself, not one inside it, owns a quantised weight."""
    return any(is_quantised(parameter) for parameter in module.parameters(recurse=False))


def quantised_modules(model: nn.Module) -> list[str]:
    """Names of the modules that own quantised weights; only last parts where these match no other modules."""
    names = [name for name, _ in model.named_modules()]
    found = [name for name, module in model.named_modules() if has_quantised(module)]
    short = {name.rpartition(".")[2] for name in found}
    stands_for = [name for name in names if name.rpartition(".")[2] in short]
    return sorted(short) if stands_for == found else found


def dequantised(module: nn.Module, name: str) -> Tensor | None:
    """The unpacked numbers of a quantised parameter; None where its quantiser cannot unpack them."""
    weight = module._parameters[name]
    if weight is None:
        return None
    if type(weight.data) is not Tensor:  # quanto and torchao
        unpack = getattr(weight.detach(), "dequantize", None)
        return None if unpack is None else unpack()
    kind = type(weight).__name__
    if kind == "Int8Params":  # the scales move from the parameter to the module with the first forward pass
        scales = [getattr(holder, "SCB", None) for holder in (weight, getattr(module, "state", None))]
        scale = next((scale for scale in scales if scale is not None), None)
        return None if scale is None else weight.detach().float() * scale.float().view(-1, 1) / 127
    state = getattr(weight, "quant_state", None)
    # Weights that were rearranged for the CPU's kernels can no longer be unpacked.
    if kind == "Params4bit" and state is not None and not getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.detach(), state)
    return None
