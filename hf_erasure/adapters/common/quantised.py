"""Weights that a quantiser has packed: how to tell them, and the numbers they stand for.

bitsandbytes keeps integers and their scales in a parameter of its own class, quanto and torchao in a tensor that passes
for a float one, and 8-bit floats have their scales in another parameter. None of them can take an edit exactly.
"""

from __future__ import annotations

from torch import Tensor, nn

FLOAT_FIRST = "load the float weights, merge the adapter there, and quantise the merged model"


def is_quantised(weight: Tensor) -> bool:
    """Whether a weight is packed by a quantiser; a sharded one is not."""
    kind = type(weight.data)
    # Numbers of 8 bits have a scale somewhere else.
    is_plain = weight.is_floating_point() and weight.dtype.itemsize > 1
    return not is_plain or not (kind is Tensor or kind.__name__ == "DTensor")


def has_quantised(module: nn.Module) -> bool:
    """Whether a module itself, not one inside it, owns a quantised weight."""
    return any(is_quantised(parameter) for parameter in module.parameters(recurse=False))


def quantised_modules(model: nn.Module) -> list[str]:
    """Names of the modules that own quantised weights, shortened where that stands for no others."""
    names = [name for name, _ in model.named_modules()]
    found = [name for name, module in model.named_modules() if has_quantised(module)]
    short = {name.rpartition(".")[2] for name in found}
    stands_for = [name for name in names if name.rpartition(".")[2] in short]
    return sorted(short) if stands_for == found else found


def dequantised(module: nn.Module, name: str) -> Tensor | None:
    """The numbers that a quantised parameter stands for; None where its quantiser gives no way to them."""
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
    # What is laid out anew for the CPU's kernels can no longer be unpacked.
    if kind == "Params4bit" and state is not None and not getattr(state, "packing_format_for_cpu", False):
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.detach(), state)
    return None
