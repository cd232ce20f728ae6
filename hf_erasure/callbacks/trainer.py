"""Trainer with a model that has adapters of ours: what it checks, warns of, logs, saves and loads.

Two methods of Trainer, `train` and `_save`, are wrapped for every program, because callbacks have no event there. When
one of them is called on a trainer whose model has adapters of ours, a few other methods of this trainer are replaced;
see `OWN_METHODS`.

Trainer saves one adapter of a model with adapters. The model's own weights that are fine-tuned, and an erasure that
was refitted beside a LoRA, would be lost without a warning. Two active adapters make its save fail. Into a model that
is not a `PeftModel` it cannot load a checkpoint. With one of our callbacks, and with several active adapters on a
model that is not a `PeftModel`, a checkpoint therefore holds

- in the folder itself the trained adapter, as always; or, where the model's own weights are trained, the model without
  adapters, for `from_pretrained`;
- in a folder of its own name every other adapter, for `load_adapter`.
"""

from __future__ import annotations

import copy
import functools
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate.state import AcceleratorState, DistributedType
from peft import PeftConfig, PeftModel, PeftType, set_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerState, TrainingArguments

from hf_erasure.adapters import ConceptErasureConfig, gradiend_layers, site_layers, steer
from hf_erasure.adapters.common.acting import active_adapters, adapters_now, warn_user
from hf_erasure.adapters.common.config import TRAINING, ChildConfig
from hf_erasure.adapters.common.files import CONFIG, PREFIX, WEIGHTS
from hf_erasure.adapters.common.layer import adapter_children, child_configs, configs_of, is_child
from hf_erasure.adapters.saving import ON_STAGED, refuse_lost_adapters, staged_save
from hf_erasure.hub import cards
from hf_erasure.hub.pushing import create_model_card
from hf_erasure.models.model import forked_rng, on_cpu, unwrapped

# Parts of a weight's name that are modules which PEFT puts around it.
_WRAPPERS = ("base_layer", "original_module", "token_adapter")
_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)


class LoggingCallback(TrainerCallback):
    """A callback with figures for the log, and a memory that checkpoints keep."""

    measured_on = ""  # the rows that the figures are measured on, in words; empty for training's own rows

    def __init__(self, adapter_name: str, memory: dict[str, Any]) -> None:
        self.adapter_name = adapter_name  # the adapter that is measured
        self.memory = memory  # what a resumed training must know, in JSON's types
        self._empty = copy.deepcopy(memory)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Check how the model is trained, take over the `memory` of a checkpoint, and let the Trainer keep it."""
        check_training(model, args)
        # `ExportableState` would build the callback anew from JSON, which cannot hold its batches.
        key = f"{type(self).__name__} {self.adapter_name}"
        # Without a checkpoint, what an earlier training with this callback has left does not count.
        self.memory = copy.deepcopy(self._empty) | state.stateful_callbacks.get(key, {})
        state.stateful_callbacks[key] = self.memory

    def figures(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """What to add to the log that is about to be written, measured on the unwrapped model."""
        raise NotImplementedError

    def logged(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """Measure the figures, and keep them for the adapter's card too."""
        with forked_rng(model):
            found = self.figures(state, model)
        config = child_configs(model).get(self.adapter_name)
        if found and config is not None:
            entry = {"step": state.global_step, "figures": found, "measured_on": self.measured_on}
            config.provenance = config.provenance | {TRAINING: entry}
        return found


def check_training(model: nn.Module, args: TrainingArguments) -> None:
    """Raise an error if training with a callback of ours cannot work, and warn if a checkpoint would lack weights."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            "No parameter is trainable, so training would fail in its first backward pass: adding an adapter has "
            "frozen the model. Call model.requires_grad_(True) to fine-tune it whole, or add a LoRA: "
            "model.add_adapter(LoraConfig(…)) and model.set_adapter([…]) with both names."
        )
    if not is_sharded() or not loses_weights(model):
        return  # all that is trained is saved and loaded, see below
    if args.load_best_model_at_end:
        raise ValueError(
            "load_best_model_at_end cannot load the trained weights back while they are sharded (FSDP, DeepSpeed): "
            "leave it out, and load the checkpoint yourself."
        )
    _warn_of_own_weights(
        model,
        "Save the weights yourself after training: merge or delete the adapter first.",
        "while weights are sharded (FSDP, DeepSpeed) ",
    )


def check_losses(trainer: Any) -> None:
    """Refuse a trainer of TRL whose loss passes over what acts on the head; warn if its reference model lacks more."""
    model, kind = trainer.model, type(trainer).__name__
    acting = {name: noun for name, noun in adapters_now(model).acting.items() if name in child_configs(model)}
    base: Any = unwrapped(model) if acting else None
    if acting and "fused_lm_head" in getattr(getattr(base.forward, "__code__", None), "co_varnames", ()):
        head = base.get_output_embeddings()
        changed = [child for child in adapter_children(base) if child.host is head]
        changed += [c for c in gradiend_layers(base).values() if c.owner._parameters.get("weight") is head.weight]
        for path, name in ((child.path, name) for child in changed for name in child.acting_adapters()):
            raise ValueError(
                f"{kind} multiplies by the weight of {path!r} itself, so what the {acting[name]} {name!r} does there "
                f"would have no effect on its loss. Merge the adapter first, or fit it with exclude_modules=[{path!r}]."
            )
    reference = getattr(trainer, "ref_model", None)
    if reference is not None:
        acting = {name: noun for name, noun in acting.items() if name not in adapters_now(reference).acting}
    elif not (hasattr(trainer, "ref_model") and isinstance(model, PeftModel)) or "ref" in model.peft_config:
        return  # without adapters, or with a copy "ref" of the trained one, this model is its own reference
    if acting and getattr(trainer, "beta", 1.0) != 0:
        warn_user(
            f"{kind} compares with a reference model in which {list(acting)} would not act, so training may undo what "
            "they do. Merge them first, or give a ref_model that has them; or write sticky=True in their config, "
            "and give the model from peft.get_peft_model(model, LoraConfig(…)) in place of peft_config."
        )


def is_sharded() -> bool:
    """Whether this training keeps a part of each weight on every process."""
    # The shared state is read directly: a new `AcceleratorState` would reset the kind of distribution.
    return AcceleratorState._shared_state.get("distributed_type") in _SHARDING


def _warn_of_own_weights(model: nn.Module, remedy: str, when: str = "") -> None:
    own = own_trained_weights(model)
    if own:
        warn_user(
            f"{len(own)} weights of the model itself are trained, but {when}Trainer saves only the adapter of a model "
            f"that has one. {remedy}"
        )


def _warn_of_unsaved_adapters(model: nn.Module) -> None:
    """Warn of adapters that checkpoints will lack, or of a save that will fail, without a callback of ours."""
    holder = _saved_by_trainer(model)
    if holder is None:
        return
    ours, active = list(child_configs(holder)), _active_adapters(holder)
    if len(active) > 1:  # where `_saves_all`, all of them are saved
        acting = [name for name in active if name in ours]
        others = [name for name in active if name not in ours]
        warn_user(
            f"Several adapters are active, {active}, and Trainer cannot save them here: its first save would fail. "
            f"Write sticky=True in the configuration of {acting}, so that they act without being active, switch on "
            f"{others or acting[:1]} alone, and save {acting} yourself."
        )
        return
    if holder is not model and ours:
        _warn_of_own_weights(holder, f"After training save the adapter {active}, delete it, and save the model.")
    names = [name for name in ours if active and name not in active]
    if names:
        now = adapters_now(holder)
        acts = {True: "acts while it is trained", False: "does not act"}
        unsaved = ", ".join(f"the {now.loaded[name]} {name!r}, which {acts[name in now.acting]}" for name in names)
        if holder is model:
            together = (
                f"Call model.set_adapter({[*names, *active]}) before training to train with them on; checkpoints then "
                "hold every adapter, each in a folder of its name. Or save"
            )
        else:
            off = not now.acting.keys() >= {*names}
            together = "To train with them on, write sticky=True in their configuration. Save" if off else "Save"
        warn_user(
            f"Trainer will save {active} without {unsaved}. {together} {names} yourself: "
            f"model.set_adapter({names[0]!r}) and model.save_pretrained(folder)."
        )


def _saved_by_trainer(model: nn.Module) -> Any:
    """The model of which Trainer saves an adapter in place of the weights; None where Trainer saves all of `model`.

    It may be inside a model of another library. Trainer writes all tensors of a module that has no `save_pretrained`.
    """
    if isinstance(model, (PreTrainedModel, PeftModel)):
        return model
    inside = (module for module in model.modules() if isinstance(module, PreTrainedModel) and child_configs(module))
    return next(inside, None) if hasattr(model, "save_pretrained") else None


def _active_adapters(model: Any) -> list[str]:
    """The active adapters of a model with an adapter of ours that transformers saves; it cannot save several."""
    if isinstance(model, PeftModel) or not getattr(model, "_hf_peft_config_loaded", False) or not child_configs(model):
        return []
    return active_adapters(model)


# ---- the wrapped methods ---------------------------------------------------------------------------------------------


def train(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """`Trainer.train`: warn first of what its saves would lose, then train and log what our callbacks measure."""
    if trainer.model is None:  # in a search by Ray, whose trials make their models themselves
        trainer.model = trainer.call_model_init(kwargs.get("trial"))
    if not _saves_all(trainer):
        if trainer.args.save_strategy != "no" and isinstance(trainer.model, (PreTrainedModel, PeftModel)):
            refuse_lost_adapters(trainer.model)  # its first save would
        _warn_of_unsaved_adapters(trainer.model)
    check_losses(trainer)
    _replace_methods(trainer)
    return original(*args, **kwargs)


def save(original: Callable, trainer: Any, *args: Any, **kwargs: Any) -> None:
    """`Trainer._save`, which saves the active adapter alone: save all that training changes instead."""
    _replace_methods(trainer)
    if _saves_all(trainer):
        if loses_weights(trainer.model):
            with saving_all(trainer.model):
                return original(*args, **kwargs)
    elif child_configs(trainer.model):
        _warn_of_own_weights(
            trainer.model,
            "Give Trainer a ConceptErasureCallback or a GradiendCallback, with which it saves both, or delete the "
            "adapter before you save.",
        )
    return original(*args, **kwargs)


def _callbacks(trainer: Any) -> list[LoggingCallback]:
    return [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, LoggingCallback)]


def _saves_all(trainer: Any) -> bool:
    """Whether checkpoints hold all that training changes: with a callback of ours, and where several are active."""
    model = trainer.model
    is_whole = isinstance(model, (PreTrainedModel, PeftModel)) and not is_sharded()
    return is_whole and bool(child_configs(model)) and (bool(_callbacks(trainer)) or len(_active_adapters(model)) > 1)


def _log_figures(original: Callable, trainer: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
    """Add what our callbacks measure to a log before it is written; not to an evaluation's, which has no `loss`."""
    for callback in _callbacks(trainer) if "loss" in logs else ():
        logs.update(callback.logged(trainer.state, trainer.callback_handler.model))
    original(logs, *args, **kwargs)


def _load_checkpoint(original: Callable, trainer: Any, folder: str | None = None, model: Any = None) -> None:
    """Load the checkpoint in a folder, from which training continues; without a folder the best model, at the end."""
    if _saves_all(trainer):
        load_trained(trainer.model if model is None else model, Path(folder or trainer.state.best_model_checkpoint))
    else:
        original(*(given for given in (folder, model) if given is not None))


def _push_from_checkpoint(original: Callable, trainer: Any, folder: str) -> None:
    """Add adapters and card to what Trainer pushes: it copies only the files that it knows from a checkpoint."""
    if trainer.is_world_process_zero():
        target, config = Path(trainer.args.output_dir), cards.config_in(Path(folder))
        if _saves_all(trainer):
            places = [name for name in child_configs(trainer.model) if (Path(folder) / name).is_dir()]
            save_adapters(trainer.model, target, only=places)
        if config is not None:
            repo_id = getattr(trainer, "hub_model_id", None)
            cards.write_or_warn(target, cards.write_card, config, repo_id=repo_id, **cards.model_facts(trainer.model))
    original(folder)


# Method of a trainer whose model has adapters of ours → the function in its place; its first argument is the method.
OWN_METHODS: dict[str, Callable[..., Any]] = {
    "log": _log_figures,
    "_load_from_checkpoint": _load_checkpoint,
    "_load_best_model": _load_checkpoint,
    "_push_from_checkpoint": _push_from_checkpoint,
    "create_model_card": create_model_card,
}


def _replace_methods(trainer: Any) -> None:
    if not adapter_children(trainer.model):
        return
    for name, method in OWN_METHODS.items():
        replaced = getattr(type(trainer), name, None)
        if replaced is not None and name not in vars(trainer):
            setattr(trainer, name, functools.partial(method, replaced.__get__(trainer), trainer))


# ---- what a checkpoint holds -----------------------------------------------------------------------------------------


def own_trained_weights(model: nn.Module) -> list[str]:
    """The names of the model's own weights that are trained, without those of adapters."""
    trained = [name for name, parameter in unwrapped(model).named_parameters() if parameter.requires_grad]
    return list(_plain_names(model, trained))


def loses_weights(model: nn.Module) -> bool:
    """Whether Trainer by itself would save less of a model than training changes, or could not load what it saves."""
    return bool(configs_of(model)) and (not isinstance(model, PeftModel) or bool(own_trained_weights(model)))


@contextmanager
def saving_all(model: Any) -> Iterator[None]:
    """Let `model.save_pretrained(folder)` write the model's own weights, where trained, and every adapter."""

    def save_pretrained(folder: str | Path, *, is_main_process: bool = True, **ignored: Any) -> None:
        if not is_main_process:
            return
        others = [name for name, config in configs_of(model).items() if not isinstance(config, ChildConfig)]
        top = others[0] if len(others) == 1 else None
        if own_trained_weights(model):
            base: Any = unwrapped(model)
            tensors, loaded, top = base.state_dict(), base._hf_peft_config_loaded, None
            state = {plain: tensors[key] for key, plain in _plain_names(model, tensors).items()}
            base._hf_peft_config_loaded = False
            try:
                # The method of the class: the instance's own may be the one that called this.
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
    """Write every adapter, or `only` some, into a folder of its own name, and `top` into the folder itself."""
    chosen = {name: config for name, config in configs_of(model).items() if only is None or name in only}
    states = {name: _adapter_state(model, name) for name in chosen}  # all states, before one is written
    for name, config in chosen.items():
        with staged_save(folder if name == top else folder / name) as content:
            config.save_pretrained(str(content))
            save_file(states[name], content / WEIGHTS, metadata={"format": "pt"})
            for write in ON_STAGED if isinstance(config, ChildConfig) else ():
                write(content, model, name)


def _adapter_state(model: nn.Module, name: str) -> dict[str, Tensor]:
    """An adapter's tensors by the keys of its file."""
    state = peft.get_peft_model_state_dict(model, adapter_name=name)
    return {f"{PREFIX}{key.removeprefix(PREFIX)}": value.detach().clone().contiguous() for key, value in state.items()}


@on_cpu()  # older releases of safetensors read to the default device
def load_trained(model: nn.Module, folder: Path) -> None:
    """Load what `saving_all`, or PEFT for a `PeftModel`, has written. Raises `ValueError` if a part is missing."""
    reason = "it was saved without a callback of hf_erasure or for another model, or its save was killed."
    _load_own_weights(model, folder, reason)
    for name, config in configs_of(model).items():
        places = [place for place in (folder / name, folder) if (place / CONFIG).is_file()]
        known = {place: PeftConfig.from_pretrained(str(place)) for place in places}
        place = next((place for place in places if known[place].peft_type == config.peft_type), None)
        if place is None:
            raise ValueError(f"{str(folder)!r} does not have the adapter {name!r}: {reason}")
        saved: Any = known[place]
        tensors = load_file(place / WEIGHTS)
        if isinstance(config, ConceptErasureConfig):
            for path, layer in site_layers(model, name).items():
                stem, device = f"{PREFIX}{path}.{layer.child_name}", layer.state_of(name)[0].device
                kept, none = (f"{stem}.{part}" for part, _ in layer.named_children()), torch.zeros(0, 0)
                layer.restore_state(name, tuple(tensors.get(key, none).to(device) for key in kept))
                layer.erasures[name].dial = saved.dial
            for field in ("fitted", "fitted_sites", "weights", "readings", "strength", "target", "provenance"):
                setattr(config, field, getattr(saved, field))
        elif isinstance(config, ChildConfig):
            # Training never changes a GRADIEND adapter, so the model must have the adapter of the checkpoint.
            present = _adapter_state(model, name)
            if tensors.keys() != present.keys() or any(not torch.equal(tensors[k], present[k].cpu()) for k in present):
                raise ValueError(
                    f"The adapter {name!r} of the model is not the one that the checkpoint was trained with: call "
                    f"model.load_adapter({str(place)!r}, adapter_name={name!r}) before training continues."
                )
            config.provenance = saved.provenance
            steer(model, name, **{key: getattr(saved, key) for key in ("feature_factor", "learning_rate", "pair")})
        else:
            missing = sorted(_adapter_state(model, name).keys() - tensors.keys())
            if missing:
                raise ValueError(f"{str(place)!r} lacks {missing[0]!r}, a tensor of the adapter {name!r}.")
            strip = "" if isinstance(model, PeftModel) else PREFIX
            set_peft_model_state_dict(model, {k.removeprefix(strip): v for k, v in tensors.items()}, adapter_name=name)


def _load_own_weights(model: nn.Module, folder: Path, reason: str) -> None:
    """Load the model's own weights if some are trained. Raises `ValueError` with the reason if values are missing."""
    own, base = own_trained_weights(model), unwrapped(model)
    if not own:
        return
    state, found = base.state_dict(), ChainMap(*map(load_file, folder.glob("model*.safetensors")))
    plain = _plain_names(model, state)
    if found and any(plain[key] not in found or found[plain[key]].shape != state[key].shape for key in own):
        # Some architectures have other names and shapes in a file, which `from_pretrained` knows.
        dtype = functools.reduce(torch.promote_types, (p.dtype for p in base.parameters() if p.is_floating_point()))
        loaded, report = type(base).from_pretrained(folder, dtype=dtype, output_loading_info=True)
        found = ChainMap({k: v for k, v in loaded.state_dict().items() if k not in report["missing_keys"]})
    values = {key: found[name] for key, name in plain.items() if name in found}
    missing = [name for name in own if name not in values]
    if missing:
        raise ValueError(
            f"{str(folder)!r} has no values for {missing[0]!r} and {len(missing) - 1} other weights that are "
            f"trained: {reason}"
        )
    base.load_state_dict(values, strict=False)


def _plain_names(model: nn.Module, keys: Iterable[str]) -> dict[str, str]:
    """The key of each tensor → its name in the model without adapters; tensors of adapters are left out."""
    kinds = {PeftType.TRAINABLE_TOKENS, *(PeftType(config.peft_type) for config in configs_of(model).values())}
    prefixes = tuple(PEFT_TYPE_TO_PREFIX_MAPPING[kind] for kind in kinds)  # any adapter may train rows of an embedding
    found = {}
    for key in keys:
        parts = key.split(".")
        if not (is_child(key) or "modules_to_save" in parts or any(part.startswith(prefixes) for part in parts)):
            found[key] = ".".join(part for part in parts if part not in _WRAPPERS)
    return found
