"""What Trainer writes for a model with adapters of ours, and reads back: all that training has changed.

Trainer saves one adapter of a model with adapters. The model's own weights, fine-tuned under it, and an erasure that
was refitted beside a LoRA would be lost without a word; two active adapters stop it; and into a model that is not a
`PeftModel` it can load no checkpoint at all. Where one of our callbacks takes part, and where several adapters of a
model that is not a `PeftModel` are active, a checkpoint holds instead

- in the folder itself the trained adapter, as always; or, where the model's own weights are trained, the model without
  adapters, for `from_pretrained`;
- in a folder of its own name every other adapter, for `load_adapter`.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_erasure.adapters import ConceptErasureConfig, site_layers
from hf_erasure.adapters.common.config import ChildConfig
from hf_erasure.adapters.common.files import CONFIG, PREFIX, WEIGHTS
from hf_erasure.adapters.common.layer import configs_of, is_child
from hf_erasure.adapters.saving import ON_STAGED, staged
from hf_erasure.models.model import on_cpu, unwrapped


def own_trained(model: nn.Module) -> list[str]:
    """The names of the model's own weights that are trained, without those of adapters."""
    trained = [name for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad]
    return list(_plain_names(model, trained))


def is_lost(model: nn.Module) -> bool:
    """Whether Trainer by itself would save less of a model than training changes, or could not load what it saves."""
    return bool(configs_of(model)) and (not isinstance(model, PeftModel) or bool(own_trained(model)))


@contextmanager
def saving_all(model: Any) -> Iterator[None]:
    """Let `model.save_pretrained(folder)` write the model's own weights, where trained, and every adapter."""

    def save_pretrained(folder: str | Path, *, is_main_process: bool = True, **ignored: Any) -> None:
        if not is_main_process:
            return
        others = [name for name, config in configs_of(model).items() if not isinstance(config, ChildConfig)]
        top = others[0] if len(others) == 1 else None
        if own_trained(model):
            base: Any = unwrapped(model)
            tensors, loaded, top = base.state_dict(), base._hf_peft_config_loaded, None
            state = {plain: tensors[key] for key, plain in _plain_names(model, tensors).items()}
            base._hf_peft_config_loaded = False
            try:
                # The method of the class: the instance's own may be the one that led here.
                type(base).save_pretrained(base, Path(folder), state_dict=state)
            finally:
                base._hf_peft_config_loaded = loaded
        save_adapters(model, Path(folder), top)

    model.save_pretrained = save_pretrained
    try:
        yield
    finally:
        del model.save_pretrained


def save_adapters(model: nn.Module, folder: Path, top: str | None = None, only: Collection[str] | None = None) -> None:
    """Write every adapter, or `only` some, into a folder of its own name, but `top` into the folder itself."""
    chosen = {name: config for name, config in configs_of(model).items() if only is None or name in only}
    states = {name: _adapter_state(model, name) for name in chosen}  # all of them, before one is written
    for name, config in chosen.items():
        with staged(folder if name == top else folder / name) as content:
            config.save_pretrained(str(content))
            save_file(states[name], content / WEIGHTS, metadata={"format": "pt"})
            for write in ON_STAGED if isinstance(config, ChildConfig) else ():
                write(content, model, name)


def _adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by the keys of its file."""
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    return {f"{PREFIX}{key.removeprefix(PREFIX)}": value.detach().clone().contiguous() for key, value in state.items()}


@on_cpu  # older releases of safetensors read to the default device
def load_trained(model: nn.Module, folder: Path) -> None:
    """Put back in place what `saving_all`, or PEFT for a `PeftModel`, has written; refused where a part is missing."""
    told = "it was saved without a callback of hf_erasure, or for another model."
    own = own_trained(model)
    if own:
        base, found = unwrapped(model), ChainMap(*map(load_file, folder.glob("model*.safetensors")))
        values = {key: found[plain] for key, plain in _plain_names(model, base.state_dict()).items() if plain in found}
        missing = [name for name in own if name not in values]
        if missing:
            raise ValueError(
                f"{str(folder)!r} has no values for {missing[0]!r} and {len(missing) - 1} other weights that are "
                f"trained: {told}"
            )
        base.load_state_dict(values, strict=False)
    for name, config in configs_of(model).items():
        places = [place for place in (folder / name, folder) if (place / CONFIG).is_file()]
        known = {place: PeftConfig.from_pretrained(str(place)) for place in places}
        place = next((place for place in places if known[place].peft_type == config.peft_type), None)
        if place is None:
            raise ValueError(f"{str(folder)!r} does not have the adapter {name!r}: {told}")
        saved: Any = known[place]
        tensors = load_file(place / WEIGHTS)
        if isinstance(config, ConceptErasureConfig):
            for path, layer in site_layers(model, name).items():
                stem, device = f"{PREFIX}{path}.{layer.child_name}", layer.state_of(name)[0].device
                kept, none = (f"{stem}.{part}" for part, _ in layer.named_children()), torch.zeros(0, 0)
                layer.restore_state(name, tuple(tensors.get(key, none).to(device) for key in kept))
                layer.set_dial(name, saved.dial)
            for field in ("fitted", "fitted_sites", "weights", "readings", "strength", "target", "provenance"):
                setattr(config, field, getattr(saved, field))
        elif isinstance(config, ChildConfig):
            # Training never changes a GRADIEND adapter, so the model must have the one that the checkpoint has.
            present = _adapter_state(model, name)
            if tensors.keys() != present.keys() or any(not torch.equal(tensors[k], present[k].cpu()) for k in present):
                raise ValueError(
                    f"The adapter {name!r} of the model is not the one that the checkpoint was trained with: load that "
                    f"one, model.load_adapter({str(place)!r}, adapter_name={name!r}), before training goes on."
                )
            config.provenance = saved.provenance
        else:
            missing = sorted(_adapter_state(model, name).keys() - tensors.keys())
            if missing:
                raise ValueError(f"{str(place)!r} lacks {missing[0]!r}, a tensor of the adapter {name!r}.")
            strip = "" if isinstance(model, PeftModel) else PREFIX
            set_peft_model_state_dict(model, {k.removeprefix(strip): v for k, v in tensors.items()}, adapter_name=name)


def _plain_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """What tensors are called in the model without adapters; those of adapters are left out."""
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING[PeftType(config.peft_type)] for config in configs_of(model).values())
    found = {}
    for key in keys:
        parts = key.split(".")
        if not (is_child(key) or "modules_to_save" in parts or any(part.startswith(prefixes) for part in parts)):
            found[key] = ".".join(part for part in parts if part not in ("base_layer", "original_module"))
    return found
