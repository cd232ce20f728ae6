"""The adapters of the fixture: how each is made, and what is computed with a saved one."""

from __future__ import annotations

import json
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_erasure import (
    ConceptErasureConfig,
    GradiendAdapter,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
    fit_concept_erasure,
)

from .bases import BASES, base_of, batch_of, pairs, tokenizer_of

HERE = Path(__file__).parent
ADAPTERS, EXPECTED, BASE_DIGESTS = "adapters", "expected", "bases.json"
NAME = "saved"
FILES = ("adapter_config.json", "adapter_model.safetensors")
# Fields of PEFT that are saved as they were set. The others are its version, `inference_mode`, which loading sets, and
# fields that another release of PEFT may add.
KEPT_OF_PEFT = {"peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision"}
LEFT_OUT = {known.name for known in fields(peft.PeftConfig)} - KEPT_OF_PEFT
TWO = {"female": "she", "male": "he"}
THREE = {**TWO, "neutral": "they"}


@dataclass(frozen=True)
class Case:
    """One adapter.

    Attributes:
        base: The base model.
        kind: Its kind in the table, and in the name of its folder.
        config: Makes its configuration.
        words: For a GRADIEND, the word of each class; for an erasure None.
    """

    base: str
    kind: str
    config: Callable[[], Any] = field(repr=False)
    words: dict[str, str] | None = field(default=None, hash=False)

    def __str__(self) -> str:
        return f"{self.base}-{self.kind}"

    @property
    def is_erasure(self) -> bool:
        return self.words is None


def _erasure(base: str, kind: str, **settings: Any) -> Case:
    shared = {"concept": "gender", "labels": ["female", "male"]}
    return Case(base, f"erasure-{kind}", lambda: ConceptErasureConfig(**{**shared, **settings}))


def _gradiend(base: str, kind: str, words: dict[str, str] = TWO, **settings: Any) -> Case:
    shared = {"feature": "gender", "classes": list(words)}
    return Case(base, f"gradiend-{kind}", lambda: GradiendConfig(**{**shared, **settings}), words)


def _cases() -> list[Case]:
    cases = []
    for name, base in BASES.items():
        at = {"target_modules": base.linear}
        cases.append(_erasure(name, "output", **at))
        # A layer without a bias takes a linear erasure of its input, and refuses an affine one.
        cases.append(_erasure(name, "input", **at, site="input", affine=base.has_biases))
        if name != "vit":  # It has no words to learn a feature from.
            cases.append(_gradiend(name, "dense", **at, density=1.0))
            both = f"({base.linear}|{base.other})"
            cases.append(_gradiend(name, "sparse", target_modules=both, density=0.1, keep_encoder=True))
    norms = {"gpt_neox": "orth", "llama": "mean_projection", "vit": "inlp"}
    cases += [_erasure(name, "norms", method=method) for name, method in norms.items()]
    cases.append(
        _erasure("llama", "head", target_modules=BASES["llama"].linear, site="input", modules_to_save=["lm_head"])
    )
    cases.append(_gradiend("gpt2", "three", THREE, target_modules=BASES["gpt2"].linear, density=0.2))
    return cases


CASES = _cases()


def save(case: Case, folder: Path) -> None:
    """Fit the adapter and save it, without a model card, which loading does not read."""
    model = base_of(case.base)
    model.add_adapter(case.config(), adapter_name=NAME)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"modules_to_save.{NAME}" in key:
                parameter.mul_(1.5)  # Changes it as a training would.
    if case.words is None:
        batches = [batch_of(case.base, seed) for seed in range(3)]
        fit_concept_erasure(model, batches, NAME, sequential=False, progress=False)
    else:
        _train(model, case)
    model.save_pretrained(folder)
    for path in folder.iterdir():
        if path.name not in FILES:
            path.unlink()


def _train(model: PreTrainedModel, case: Case) -> None:
    with tempfile.TemporaryDirectory() as output:
        settings = {"output_dir": output, "disable_tqdm": True, "save_strategy": "no", "per_device_train_batch_size": 1}
        GradiendTrainer(
            model,
            GradiendTrainingArguments(**settings, use_cpu=True),
            train_dataset=pairs(case.words or {}),
            processing_class=tokenizer_of(case.base),
            adapter_name=NAME,
        ).train()
    # Far enough to change the outputs by several per cent; the rate is exact in float32.
    GradiendAdapter.of(model, NAME).steer(feature_factor=-1.0, learning_rate=0.25)


@dataclass
class Seen:
    """What is computed with a saved adapter.

    Attributes:
        base: The output of the base model.
        peft: The output with the adapter loaded by `PeftModel`.
        tensors: `output`, the output with the adapter loaded by `load_adapter`. If it can be merged, also `merged`, the
            output after the merge, and `merged.` + the name of each weight that the merge has changed or added.
        refusal: The type of the error that refuses the merge; empty where the merge works.
        held: The tensors that the loaded adapter holds, by the names they have in the file.
        config: The fields of the loaded adapter's configuration, as they are saved again.
    """

    base: Tensor
    peft: Tensor
    tensors: dict[str, Tensor]
    refusal: str
    held: dict[str, Tensor]
    config: dict[str, Any]


def seen(case: Case, folder: Path) -> Seen:
    """Load an adapter in both ways, run it, save it again and merge it."""
    model, batch = base_of(case.base), batch_of(case.base, seed=100, rows=2, length=4)
    base = _output(model, batch)
    model.load_adapter(str(folder), adapter_name=NAME)
    tensors = {"output": _output(model, batch)}
    with tempfile.TemporaryDirectory() as again:
        model.save_pretrained(again)
        held, config = load_file(Path(again) / FILES[1]), read_config(Path(again))
    merging = base_of(case.base)
    before = {key: value.clone() for key, value in merging.state_dict().items()}
    wrapped = peft.PeftModel.from_pretrained(merging, str(folder), NAME).eval()
    found = Seen(base, _output(wrapped, batch), tensors, "", held, config)
    try:
        merged = wrapped.merge_and_unload()
    except (ValueError, TypeError, NotImplementedError, RuntimeError) as error:
        found.refusal = type(error).__name__
        return found
    tensors["merged"] = _output(merged, batch)
    for key, value in merged.state_dict().items():
        if key not in before or not torch.equal(value, before[key]):
            tensors[f"merged.{key}"] = value.clone()
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """The fields of an `adapter_config.json`, without those that depend on the release of PEFT."""
    config = json.loads((folder / FILES[0]).read_text(encoding="utf-8"))
    return {name: value for name, value in config.items() if name not in LEFT_OUT}


def _output(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    inputs = {key: value for key, value in batch.items() if key != "concept_labels"}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model(**inputs)[0].clone()
