"""Is the merged model the unmerged one, up to rounding?

How far rounding moves the output of a deep model cannot be said from the dtype alone. So it is measured: each merged
weight is moved by one step of its dtype, up or down at random, and the output is looked at again. Rounding a weight
moves it by half a step at most, 0.29 steps in the root mean square, and rounding the activation by as much again; so
the effect of full steps is an upper estimate of both, and four times that leaves room for the luck of the draw.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .probing import Probe, distance

ROOM = 4


def check_drift(probe: Probe, before: list[Tensor], modules: list[nn.Module], names: list[str]) -> None:
    """Compare the model's outputs after a merge with those before.

    Args:
        probe: What is run.
        before: Its outputs before the merge.
        modules: The layers whose weights were merged.
        names: The adapters, for the message.

    Raises:
        ValueError: If the outputs differ by more than rounding.
    """
    after = probe.run()
    drift = distance(after, before)
    if drift == 0:
        return
    rounding = ROOM * distance(_run_with_other_rounding(probe, modules), after)
    if not drift <= rounding:
        raise ValueError(
            f"Merging {names} changed the model's output by {drift:.1e} of its norm, where rounding explains "
            f"{rounding:.1e}: the merge was taken back. Use the adapter unmerged, and please report the architecture."
        )


def _run_with_other_rounding(probe: Probe, modules: list[nn.Module]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    kept = [(p, p.data) for module in modules for p in module.parameters(recurse=False)]
    try:
        for parameter, value in kept:
            signs = 2 * torch.randint(0, 2, value.shape, generator=generator, dtype=torch.int8, device="cpu") - 1
            steps = torch.finfo(value.dtype).eps * signs.to(value.device, torch.float64)
            parameter.data = (value.double() * (1 + steps)).to(value.dtype)
        return probe.run()
    finally:
        for parameter, value in kept:
            parameter.data = value
