"""The program of each process under DeepSpeed or tensor parallelism; `test_engines` starts two processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from hf_erasure import ConceptErasureConfig, GradiendConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers

NAME = "gender"
SIZES: dict[str, Any] = {"vocab_size": 100, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def batches() -> list[dict[str, Tensor]]:
    """Six batches of eight rows."""
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(6):
        labels = torch.arange(8) % 2
        ids = torch.randint(5, 90, (8, 9), generator=generator)
        ids[:, 1] = 90 + labels
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels})
    return found


def encoder() -> BertModel:
    """A model with an unfitted adapter."""
    torch.manual_seed(0)
    model = BertModel(BertConfig(**SIZES, intermediate_size=48, hidden_dropout_prob=0, attention_probs_dropout_prob=0))
    model.add_adapter(ConceptErasureConfig(labels=["a", "b"]), adapter_name=NAME)
    return model.eval()


def erased(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The last hidden state."""
    return model(**{key: value for key, value in batch.items() if key != "concept_labels"}).last_hidden_state


def zero(stage: int, folder: Path, rank: int) -> dict[str, Any]:
    """Fit with a DeepSpeed engine and without one, compare, train a step and save."""
    import deepspeed

    deepspeed.init_distributed("gloo", verbose=False)
    own, found = batches()[rank::2], {}
    plain, model = encoder(), encoder().requires_grad_(True)
    settings = {
        "train_micro_batch_size_per_gpu": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=settings
    )
    for sequential in (False, True):
        for each in (plain, engine):
            fit_concept_erasure(each, own, NAME, pool="mean", sequential=sequential, progress=False)
        pairs = zip(erasure_layers(plain, NAME).values(), erasure_layers(model, NAME).values(), strict=True)
        same = [
            torch.equal(a, b) for p, q in pairs for a, b in zip(p.eraser_state(NAME), q.eraser_state(NAME), strict=True)
        ]
        found[f"erasers, sequential={sequential}"] = bool(same) and all(same)
    engine.eval()
    with torch.no_grad():
        found["outputs"] = torch.equal(erased(engine, own[0]), erased(plain, own[0]))
    engine.train()
    engine.backward(erased(engine, own[0]).square().mean())
    engine.step()
    if rank == 0:
        model.save_pretrained(folder / "saved")
        found["saved"] = (folder / "saved" / "adapter_model.safetensors").is_file()
    return found


def tensor_parallel(folder: Path, rank: int) -> dict[str, Any]:
    """Try to attach both kinds of adapter to a model that is split by tensor parallelism."""
    torch.distributed.init_process_group("gloo")
    if rank == 0:
        LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, intermediate_size=64)).save_pretrained(
            folder / "llama"
        )
    torch.distributed.barrier()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "llama", tp_plan="auto")
    found = {}
    for config in (ConceptErasureConfig(labels=["a", "b"]), GradiendConfig(feature="f", classes=["a", "b"])):
        try:
            model.add_adapter(config, adapter_name=NAME)
        except ValueError as error:
            found[type(config).__name__] = str(error)
    return found | {"attached": list(getattr(model, "peft_config", {}))}


def main(way: str, folder: Path, rank: int) -> None:
    """Write the results to a file that is named by the rank of the process."""
    found = tensor_parallel(folder, rank) if way == "tensor parallel" else zero(int(way), folder, rank)
    (folder / f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    import os

    main(sys.argv[1], Path(sys.argv[2]), int(os.environ["RANK"]))
