"""A small forward pass that shows whether a merged model is the unmerged one, up to rounding."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.models.model import distance, dummy_batch, evaluating, tensors_of


class Probe:
    """A model's own dummy input, run the same way each time.

    Attributes:
        failure: Why the model cannot be run on it; None when it can.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.failure: str | None = None
        self.inputs: dict[str, Tensor] = {}
        try:
            self.inputs = dummy_batch(model)
            self.run()
        except Exception as error:  # whatever a model may raise at an input it was not made for
            self.failure = f"{type(error).__name__}: {error}"

    def run(self) -> list[Tensor]:
        """The tensors the model returns, without dropout, gradients or autocast; draws of its own are not used up."""
        device = next(self.model.parameters()).device.type
        cuda = {p.device.index for p in self.model.parameters() if p.device.type == "cuda"}
        autocast = torch.amp.is_autocast_available(device)
        with (
            torch.inference_mode(False),
            evaluating(self.model),
            torch.autocast(device if autocast else "cpu", enabled=False),
            torch.random.fork_rng(devices=sorted(cuda)),
        ):
            output: Any = self.model(**self.inputs)
        return tensors_of(output)


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
