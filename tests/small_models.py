"""Small models of ten architectures, built from configs, and data that really contain the concept.

With the initialisation of transformers, many tests would pass by symmetry: norm weights are all one, biases are all
zero, attention is nearly uniform. So every parameter is drawn anew, far from these values.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers as hf
from torch import Tensor, nn
from transformers import PreTrainedModel

VOCABULARY = 64
WIDTH = 32
LABELS = ["female", "male"]

_SIZES = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_SIZES, **_TOKENS, "max_position_embeddings": 48}
_GROUPED = {**_TEXT, "num_key_value_heads": 2, "head_dim": 8}


@dataclass(frozen=True)
class Architecture:
    """How to build a small model, and the names of its parts.

    Attributes:
        build: Makes the model, initialised by transformers.
        auto: The Auto class that loads it.
        task_type: PEFT's name for the task of that class; None where PEFT has none.
        blocks, attention, embeddings: The `target_modules` that mean these parts.
        norms: The modules that `target_modules=None` must choose.
        bias_free: Whether some of its linear layers have no bias.
        tied: Whether its embedding shares its weight with the head.
    """

    build: Callable[[], PreTrainedModel]
    auto: type
    task_type: str | None
    blocks: str
    attention: str | list[str]
    embeddings: str | list[str]
    norms: list[str]
    bias_free: bool = False
    tied: bool = False

    def target(self, name: str) -> str | list[str] | None:
        """The `target_modules` that `name`, one of `TARGETS`, stands for."""
        return {"norms": None, "all-linear": "all-linear"}.get(name, getattr(self, name, None))

    @property
    def is_text(self) -> bool:
        return self.auto is not hf.AutoModel or self.task_type is not None

    @property
    def generates(self) -> bool:
        return self.auto in (hf.AutoModelForCausalLM, hf.AutoModelForSeq2SeqLM)


TARGETS = ("norms", "blocks", "attention", "all-linear", "embeddings")
SITES = ("output", "input")


def _per_layer(prefix: str, *names: str, layers: int = 2) -> list[str]:
    return [f"{prefix}.{layer}.{name}" for layer in range(layers) for name in names]


_BERT_LIKE = {
    "auto": hf.AutoModel,
    "task_type": "FEATURE_EXTRACTION",
    "blocks": r"encoder\.layer\.\d+",
    "attention": ["attention"],
    "embeddings": ["word_embeddings"],
    "norms": _per_layer("encoder.layer", "attention.output.LayerNorm", "output.LayerNorm"),
}
_LLAMA_LIKE = {
    "auto": hf.AutoModelForCausalLM,
    "task_type": "CAUSAL_LM",
    "blocks": r"model\.layers\.\d+",
    "attention": ["self_attn"],
    "embeddings": ["embed_tokens"],
    "norms": [*_per_layer("model.layers", "input_layernorm", "post_attention_layernorm"), "model.norm"],
    "bias_free": True,
}


def _vit() -> PreTrainedModel:
    return hf.ViTModel(hf.ViTConfig(**_SIZES, image_size=16, patch_size=4))


# Its blocks have moved from one release of transformers to another.
_VIT_BLOCKS = "layers" if hasattr(_vit(), "layers") else "encoder.layer"

ARCHITECTURES: dict[str, Architecture] = {
    "bert": Architecture(build=lambda: hf.BertModel(hf.BertConfig(**_TEXT)), **_BERT_LIKE),
    "distilbert": Architecture(
        build=lambda: hf.DistilBertModel(
            hf.DistilBertConfig(**_TOKENS, dim=WIDTH, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=48)
        ),
        auto=hf.AutoModel,
        task_type="FEATURE_EXTRACTION",
        blocks=r"transformer\.layer\.\d+",
        attention=["attention"],
        embeddings=["word_embeddings"],
        norms=_per_layer("transformer.layer", "sa_layer_norm", "output_layer_norm"),
    ),
    "roberta": Architecture(build=lambda: hf.RobertaModel(hf.RobertaConfig(**_TEXT)), **_BERT_LIKE),
    "gpt2": Architecture(
        build=lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(**_TOKENS, n_embd=WIDTH, n_layer=2, n_head=4, n_inner=64, n_positions=48)
        ),
        auto=hf.AutoModelForCausalLM,
        task_type="CAUSAL_LM",
        blocks=r"transformer\.h\.\d+",
        attention=["attn"],
        embeddings=["wte"],
        norms=[*_per_layer("transformer.h", "ln_1", "ln_2"), "transformer.ln_f"],
        tied=True,
    ),
    "gpt_neox": Architecture(
        build=lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**_TEXT)),
        auto=hf.AutoModelForCausalLM,
        task_type="CAUSAL_LM",
        blocks=r"gpt_neox\.layers\.\d+",
        attention=["attention"],
        embeddings=["embed_in"],
        norms=[
            *_per_layer("gpt_neox.layers", "input_layernorm", "post_attention_layernorm"),
            "gpt_neox.final_layer_norm",
        ],
    ),
    "llama": Architecture(build=lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**_GROUPED)), **_LLAMA_LIKE),
    "qwen3": Architecture(build=lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**_GROUPED)), **_LLAMA_LIKE),
    "gemma": Architecture(build=lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**_GROUPED)), **_LLAMA_LIKE, tied=True),
    "t5": Architecture(
        build=lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(
                vocab_size=VOCABULARY,
                d_model=WIDTH,
                d_kv=8,
                d_ff=64,
                num_layers=2,
                num_heads=4,
                pad_token_id=0,
                eos_token_id=2,
                decoder_start_token_id=0,
            )
        ),
        auto=hf.AutoModelForSeq2SeqLM,
        task_type="SEQ_2_SEQ_LM",
        blocks=r"(encoder|decoder)\.block\.\d+",
        attention=["SelfAttention", "EncDecAttention"],
        embeddings=["embed_tokens"],
        norms=[
            *_per_layer("encoder.block", "layer.0.layer_norm", "layer.1.layer_norm"),
            "encoder.final_layer_norm",
            *_per_layer("decoder.block", "layer.0.layer_norm", "layer.1.layer_norm", "layer.2.layer_norm"),
            "decoder.final_layer_norm",
        ],
        bias_free=True,
        tied=True,
    ),
    "vit": Architecture(
        build=_vit,
        auto=hf.AutoModel,
        task_type=None,
        blocks=rf"{re.escape(_VIT_BLOCKS)}\.\d+",
        attention=["attention"] if _VIT_BLOCKS == "layers" else r"encoder\.layer\.\d+\.attention",
        # Its embeddings take pixels, floating-point numbers in rows, so erasing is possible at their input and output.
        embeddings=["embeddings"],
        norms=[*_per_layer(_VIT_BLOCKS, "layernorm_before", "layernorm_after"), "layernorm"],
    ),
}


@functools.cache
def _built(name: str) -> PreTrainedModel:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model = ARCHITECTURES[name].build()
    return roughen(model, generator).eval()


def small_model(name: str) -> PreTrainedModel:
    """A model with the same weights at every call; callers must not change it."""
    return _built(name)


def shortened(model: Path, folder: Path) -> Path:
    """Save the first two layers of a stored language model and its tokenizer in a subfolder with the model's name."""
    kind = getattr(hf, hf.AutoConfig.from_pretrained(model).architectures[0])
    kind.from_pretrained(model, num_hidden_layers=2).save_pretrained(folder / model.name)
    hf.AutoTokenizer.from_pretrained(model).save_pretrained(folder / model.name)
    return folder / model.name


def roughen(model: nn.Module, generator: torch.Generator) -> nn.Module:
    """Draw matrices anew with a scale of 0.2; noise of scale 0.3 is added to vectors (norm weights, biases)."""
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(0.2 * noise)
            else:
                parameter.add_(0.3 * noise)
    return model


def shared_layers_model(blocks: int = 2) -> nn.Module:
    """An ALBERT, whose blocks are one module, called several times; three calls take three times as long as two."""
    config = hf.AlbertConfig(**{**_TEXT, "num_hidden_layers": blocks, "intermediate_size": 48}, embedding_size=16)
    return roughen(hf.AlbertModel(config), torch.Generator().manual_seed(0)).eval()


def small_batch(name: str, *, seed: int = 0, rows: int = 16, length: int = 8) -> dict[str, Tensor]:
    """Inputs with padding, and `concept_labels` that can be told from the inputs.

    Args:
        name: The architecture.
        seed: The seed of the draw.
        rows: The number of sequences or images.
        length: Tokens in the longest sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) % 2
    if not ARCHITECTURES[name].is_text:
        stripes = torch.linspace(-1, 1, 16).repeat(3, 16, 1)
        pixels = torch.randn(rows, 3, 16, 16, generator=generator) + labels.view(-1, 1, 1, 1) * stripes
        return {"pixel_values": pixels, "concept_labels": labels}
    # Each class has token ids of its own, and ids that the other class has too.
    ids = torch.randint(4, 40, (rows, length), generator=generator) + 24 * labels[:, None]
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "concept_labels": labels}
    if ARCHITECTURES[name].auto is hf.AutoModelForSeq2SeqLM:
        batch["decoder_input_ids"] = ids.roll(1, 1) * mask
        batch["decoder_attention_mask"] = mask
    return batch


def small_batches(name: str, count: int = 3, seed: int = 100) -> list[dict[str, Tensor]]:
    """Several batches to fit on."""
    return [small_batch(name, seed=seed + index) for index in range(count)]


def paired_batches(name: str, count: int = 3, seed: int = 100) -> list[dict[str, Tensor]]:
    """The same with counterfactuals, in which some tokens differ, and with environments and a label to keep."""
    return [_paired(batch) for batch in small_batches(name, count, seed)]


def _paired(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    labels = batch["concept_labels"]
    rows = len(labels)
    other = {key: value.clone() for key, value in batch.items()}
    # The third and the fifth token of each row are moved, depending on the class and on the row.
    moved = torch.arange(rows) % 5 + 1 + 7 * labels
    other["input_ids"][:, 2:5:2] = 4 + (other["input_ids"][:, 2:5:2] + moved[:, None]) % 50
    own, ignored = torch.arange(rows), torch.full((rows,), -100)
    halves = {
        "concept_labels": (labels, ignored),
        "concept_pairs": (ignored.clamp_min(-1), own),
        "concept_pair_labels": (labels, 1 - labels),
        "concept_environments": (own % 3,) * 2,
        "concept_kept": (own // 2 % 2,) * 2,
    }
    inputs = {key: (value, other[key]) for key, value in batch.items() if key != "concept_labels"}
    return {key: torch.cat(pair) for key, pair in (inputs | halves).items()}


def inputs_of(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs of the model in a batch, without the keys about the concept."""
    return {key: value for key, value in batch.items() if not key.startswith("concept_")}


def outputs_of(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every floating-point tensor a model returns for a batch."""
    dtype = next(p.dtype for p in model.parameters())
    inputs = {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs_of(batch).items()}
    with torch.no_grad():
        output = model(**inputs)
    return {k: v for k, v in output.items() if isinstance(v, Tensor) and v.is_floating_point()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two sets of outputs are equal to the bit."""
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """The largest difference between two sets of outputs, relative to the largest value in its tensor."""
    assert left.keys() == right.keys()
    return max(float((left[key] - right[key]).abs().max() / right[key].abs().max()) for key in left)
