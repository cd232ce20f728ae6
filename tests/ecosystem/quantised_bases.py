"""Small models loaded through six quantisers on a CPU, and the float models that they are copies of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from tests.fitting.gradiend.language_models import tokenizer_of
from tests.small_models import roughen

# 4-bit kernels need rows of a multiple of 64 weights.
WIDTH = 64
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 2 * WIDTH}
_SIZES |= {"max_position_embeddings": 64}
_LLAMA = {"num_key_value_heads": 2, "head_dim": 16, "bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}


def _bitsandbytes(**fields: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="the quantiser of these bases is not installed")
    return hf.BitsAndBytesConfig(**fields)


def _quanto(weights: str) -> Any:
    pytest.importorskip("optimum.quanto", reason="the quantiser of these bases is not installed")
    return hf.QuantoConfig(weights=weights)


def _torchao_int8() -> Any:
    quantization = pytest.importorskip("torchao.quantization", reason="the quantiser of these bases is not installed")
    return hf.TorchAoConfig(quantization.Int8WeightOnlyConfig())


def _torchao_int4() -> Any:
    # torchao's own packing of 4 bits needs a GPU; `IntxWeightOnlyConfig` works on any device.
    quantization = pytest.importorskip("torchao.quantization", reason="the quantiser of these bases is not installed")
    granularity = quantization.PerGroup(32)
    return hf.TorchAoConfig(quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=granularity))


_NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
KINDS: dict[str, Callable[[], Any]] = {
    "bitsandbytes int8": lambda: _bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: _bitsandbytes(**_NF4),
    "quanto int8": lambda: _quanto("int8"),
    "quanto int4": lambda: _quanto("int4"),
    "torchao int8": _torchao_int8,
    "torchao int4": _torchao_int4,
}
ARCHITECTURES = ("bert", "llama")


@functools.cache
def _float_model(architecture: str, seed: int) -> PreTrainedModel:
    if architecture == "bert":
        model: PreTrainedModel = hf.BertModel(hf.BertConfig(vocab_size=64, **_SIZES))
    else:
        size = len(tokenizer_of("llama"))
        model = hf.LlamaForCausalLM(hf.LlamaConfig(vocab_size=size, **_SIZES, **_LLAMA))
    return roughen(model, torch.Generator().manual_seed(seed)).eval()


class Bases:
    """Folders with float models, and the models loaded from them, as they are or through a quantiser."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, architecture: str, seed: int = 0) -> Path:
        """A folder with a float model; another `seed` gives other weights of the same shapes."""
        folder = self.root / f"{architecture}-{seed}"
        if not folder.exists():
            _float_model(architecture, seed).save_pretrained(folder)
        return folder

    def load(self, architecture: str, kind: str | None = None, *, seed: int = 0, **kwargs: Any) -> PreTrainedModel:
        """The model, with float weights where `kind` is None."""
        return load(self.folder(architecture, seed), architecture, kind, **kwargs)


def load(folder: Path, architecture: str, kind: str | None, **kwargs: Any) -> PreTrainedModel:
    """A model from any folder, with float weights where `kind` is None."""
    auto = hf.AutoModel if architecture == "bert" else hf.AutoModelForCausalLM
    if kind is not None:
        kwargs |= {"quantization_config": KINDS[kind](), "device_map": "cpu"}
    return auto.from_pretrained(folder, **{"dtype": torch.float32, **kwargs}).eval()
