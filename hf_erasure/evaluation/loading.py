"""Load a model anew with no adapter, one or several, and check that the adapters act."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer

from hf_erasure.adapters import ConceptErasureConfig, GradiendConfig, steer, verify_adapter
from hf_erasure.adapters.common.acting import auxiliary_wrappers, check_single_copy
from hf_erasure.adapters.common.config import ChildConfig, Provenance, adapter_config
from hf_erasure.adapters.loading.fingerprint import fingerprint, resample
from hf_erasure.adapters.merging.export import class_for
from hf_erasure.adapters.saving import digest_of, digest_of_data
from hf_erasure.fitting.processes import Processes
from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import Runner, distance, evaluating, floats_of, forked_rng
from hf_erasure.models.pooling import POOLS
from hf_erasure.recipes.erasure import EMBEDDED, embedded_model
from hf_erasure.recipes.run import naming_the_model

BASE, TOGETHER = "base", "together"


class AdapterDoesNotAct(ValueError):
    """An adapter to measure does not change the model; the message says why."""


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder, and its name in tables and in the model."""

    name: str
    folder: str
    config: Any

    @property
    def kind(self) -> str:
        """The kind of adapter, in a word or two."""
        return str(self.config.described) if isinstance(self.config, ChildConfig) else str(self.config.peft_type.value)

    @property
    def pools(self) -> list[str]:
        """The pools that an erasure was fitted for; empty for other kinds, and if the erasure does not name any."""
        kept = Provenance.of(self.config).pool if isinstance(self.config, ConceptErasureConfig) else ""
        return [name for name in kept.split("+") if name in POOLS]

    def acts(self, model: nn.Module) -> tuple[bool, str]:
        """Whether the adapter acts, in words too: by `verify_adapter`, or for other kinds by the outputs without it."""
        if isinstance(self.config, ChildConfig):
            found = verify_adapter(model, self.name)
            return found.ok, found.text
        switched: Any = model
        active = list(switched.active_adapters())
        batch, runner = dummy_batch(model), Runner(model, [])

        def outputs() -> list[torch.Tensor]:
            with forked_rng(model):
                return list(floats_of(runner(batch, runner.model)))

        with evaluating(model):
            now = outputs()
            others = [name for name in active if name != self.name]
            switched.set_adapter(others) if others else switched.disable_adapters()
            without = outputs()
            switched.enable_adapters()
            for wrapper in auxiliary_wrappers(model).values():  # `enable_adapters` leaves these out
                wrapper.enable_adapters(True)
            switched.set_adapter(active)
        change = distance(now, without)
        verb = "changes" if change else "does not act: it does not change"
        return change > 0, f"Adapter {self.name!r} ({self.kind}) {verb} the outputs ({change:.2%})."


@dataclass(frozen=True)
class Entry:
    """A column of the tables: the base, an adapter, or all adapters; GRADIEND's learning rates are times `strength`."""

    name: str
    adapters: tuple[Adapter, ...] = ()
    strength: float = 1.0


def read_adapters(folders: Sequence[str]) -> list[Adapter]:
    """The adapters in some folders, each with a name of its own. Raises `ValueError` if a folder holds no adapter."""
    found: list[Adapter] = []
    for folder in folders:
        # Dots and the prefixes "gradiend_" and "concept_erasure_" have a meaning in keys of a state dict; hyphens not.
        plain = re.sub(r"[\W_]+", "-", Path(folder).resolve().name).strip("-") or "adapter"
        plain = "gradiend-adapter" if plain == "gradiend" else plain
        taken, number, name = {BASE, TOGETHER, *(adapter.name for adapter in found)}, 2, plain
        while name in taken:
            name, number = f"{plain}-{number}", number + 1
        found.append(Adapter(name, str(folder), adapter_config(folder)))
    return found


def entries_of(adapters: Sequence[Adapter], strengths: Sequence[float] = ()) -> list[Entry]:
    """The base, each adapter, GRADIEND adapters at other strengths (0 is the base), and several adapters together.

    Raises `ValueError` if strengths are given without a GRADIEND adapter.
    """
    steered = [adapter for adapter in adapters if isinstance(adapter.config, GradiendConfig)]
    if strengths and not steered:
        raise ValueError("--strengths multiply the learning rate of GRADIEND adapters, and there is none here.")
    entries = [Entry(BASE)]
    for adapter in adapters:
        entries.append(Entry(adapter.name, (adapter,)))
        if adapter in steered:
            entries += [
                Entry(f"{adapter.name} ×{s:g}", (adapter,), s) for s in dict.fromkeys(strengths) if s not in (0, 1)
            ]
    return [*entries, Entry(TOGETHER, tuple(adapters))] if len(adapters) > 1 else entries


class Loader:
    """Loads a model in one class for all entries, the one that `class_for` finds for all adapters.

    `note` is for a reader of the results: why the class is not that of the checkpoint, if it differs, and which side of
    an encoder-decoder is read. Raises `OSError` if the model cannot be loaded.
    """

    def __init__(self, model: str, adapters: Sequence[Adapter]) -> None:
        self.path = embedded_model() if model == EMBEDDED else os.path.expandvars(model)
        with naming_the_model(self.path):
            config = AutoConfig.from_pretrained(self.path)
            self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        # The class in which the model is loaded.
        self.kind = class_for(config, [a.config for a in adapters if isinstance(a.config, ChildConfig)])
        own, notes = class_for(config, []), []
        if getattr(config, "is_encoder_decoder", False):
            notes.append("its encoder reads the texts, and hidden states are the encoder's")
        if self.kind is not own and config.architectures:
            notes.append(
                f"loaded as {self.kind.__name__} and not as {own.__name__}, which lacks modules of the adapters"
            )
        self.note = "; ".join(notes)

    def load(self, entry: Entry) -> nn.Module:
        """The model with the adapters of an entry, all of them active, in evaluation mode.

        Raises `ValueError` if an adapter does not fit the model.
        """
        model: Any = self.kind.from_pretrained(self.path).to(Processes().device).eval()
        with warnings.catch_warnings():
            # Warnings when a second adapter is loaded; all adapters are made active below.
            warnings.filterwarnings("ignore", message="(Adding .* switched |Other adapters act here)")
            warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
            for adapter in entry.adapters:
                model.load_adapter(adapter.folder, adapter_name=adapter.name)
        names = [adapter.name for adapter in entry.adapters]
        if names:
            model.set_adapter(check_single_copy(model, names))
        for adapter in entry.adapters:
            if entry.strength != 1 and isinstance(adapter.config, GradiendConfig):
                rate = adapter.config.learning_rate * entry.strength
                steer(model, adapter.name, learning_rate=rate)
        return model.eval()


def fingerprints(model: nn.Module, adapters: Sequence[Adapter]) -> dict[str, Any]:
    """Digests by which the base and the adapters of an evaluation can be recognised later.

    `base` is a digest of a sample of all weights. `adapters` has for each name `adapter`, a digest of its values, and
    `base`, the weights of this model at the sample that the adapter keeps of its own base, if it keeps one.
    """
    found: dict[str, Any] = {}
    for adapter in adapters:
        base = resample(model, adapter.config) if isinstance(adapter.config, ChildConfig) else {}
        found[adapter.name] = {"adapter": digest_of(adapter.folder, adapter.config), "base": base}
    with_weights = [name for name, m in model.named_modules() if next(m.parameters(recurse=False), None) is not None]
    return {"base": digest_of_data(fingerprint(model, with_weights)), "adapters": found}
