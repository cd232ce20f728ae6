"""Twelve tiny base models that are the same to the bit on every machine, their tokenizer, and data for them.

Weights come from `torch.rand`: it turns integers of the generator into floats, in the same way on every processor.
With `torch.randn`, a processor with vector units draws other numbers than one without.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ["[PAD]", "<s>", "</s>", "[UNK]"]
WORDS = "he she they Tom went home and a dog saw the king was happy because it ran late".split()  # noqa: SIM905
VOCABULARY = len(SPECIAL) + 1 + len(WORDS)  # with the mask, or the sentinel of T5
WIDTH = 16

_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SIZES = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_TEXT = {**_SIZES, **_TOKENS, "max_position_embeddings": 24}
_GROUPED = {**_TEXT, "num_key_value_heads": 1, "head_dim": 8}
_BART = {
    f"{side}_{name}": value
    for side in ("encoder", "decoder")
    for name, value in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 24))
}
_T5 = {"d_model": WIDTH, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}


@dataclass(frozen=True)
class Base:
    """How to build a base model, and which modules adapters change in it.

    Attributes:
        build: Makes the model, initialised by transformers.
        linear: A regular expression of two linear layers that lie side by side.
        other: A regular expression of an embedding or a norm, which a sparse GRADIEND has in addition.
        has_biases: Whether these linear layers have biases.
    """

    build: Callable[[], PreTrainedModel]
    linear: str
    other: str
    has_biases: bool = True


def _of(kind: str, config: str, **sizes: object) -> Callable[[], PreTrainedModel]:
    return lambda: getattr(hf, kind)(getattr(hf, config)(**sizes))


BASES: dict[str, Base] = {
    "bert": Base(
        _of("BertForMaskedLM", "BertConfig", **_TEXT),
        r"bert\.encoder\.layer\.0\.attention\.self\.(key|value)",
        r"bert\.embeddings\.word_embeddings",
    ),
    "distilbert": Base(
        _of(
            "DistilBertForMaskedLM",
            "DistilBertConfig",
            **_TOKENS,
            dim=WIDTH,
            n_layers=2,
            n_heads=2,
            hidden_dim=24,
            max_position_embeddings=24,
        ),
        r"distilbert\.transformer\.layer\.1\.(attention\.v_lin|ffn\.lin1)",
        r"distilbert\.transformer\.layer\.1\.output_layer_norm",
    ),
    "roberta": Base(
        _of("RobertaForMaskedLM", "RobertaConfig", **{**_TEXT, "pad_token_id": 0}),
        r"roberta\.encoder\.layer\.1\.(attention\.self\.query|intermediate\.dense)",
        r"roberta\.encoder\.layer\.0\.output\.LayerNorm",
    ),
    "gpt2": Base(
        _of("GPT2LMHeadModel", "GPT2Config", **_TOKENS, n_embd=WIDTH, n_layer=2, n_head=2, n_inner=24, n_positions=24),
        r"transformer\.h\.0\.(attn\.c_attn|mlp\.c_fc)",
        r"transformer\.wte",
    ),
    "gpt_neox": Base(
        _of("GPTNeoXForCausalLM", "GPTNeoXConfig", **_TEXT),
        r"gpt_neox\.layers\.0\.(attention\.query_key_value|mlp\.dense_h_to_4h)",
        r"gpt_neox\.final_layer_norm",
    ),
    "llama": Base(
        _of("LlamaForCausalLM", "LlamaConfig", **_GROUPED),
        r"model\.layers\.0\.self_attn\.(q_proj|v_proj)",
        r"model\.norm",
        has_biases=False,
    ),
    "qwen3": Base(
        _of("Qwen3ForCausalLM", "Qwen3Config", **_GROUPED),
        r"model\.layers\.1\.(self_attn\.v_proj|mlp\.up_proj)",
        r"model\.layers\.1\.post_attention_layernorm",
        has_biases=False,
    ),
    "gemma": Base(
        _of("GemmaForCausalLM", "GemmaConfig", **_GROUPED),
        r"model\.layers\.0\.self_attn\.(k_proj|v_proj)",
        r"model\.embed_tokens",
        has_biases=False,
    ),
    "opt": Base(
        _of(
            "OPTForCausalLM",
            "OPTConfig",
            **_TOKENS,
            hidden_size=WIDTH,
            word_embed_proj_dim=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            ffn_dim=24,
            max_position_embeddings=24,
        ),
        r"model\.decoder\.layers\.1\.(self_attn\.v_proj|fc1)",
        r"model\.decoder\.layers\.1\.final_layer_norm",
    ),
    "t5": Base(
        _of("T5ForConditionalGeneration", "T5Config", **_TOKENS, **_T5, decoder_start_token_id=0),
        r"(encoder|decoder)\.block\.0\.layer\.0\.SelfAttention\.v",
        r"encoder\.final_layer_norm",
        has_biases=False,
    ),
    "bart": Base(
        _of(
            "BartForConditionalGeneration",
            "BartConfig",
            **_TOKENS,
            **_BART,
            d_model=WIDTH,
            max_position_embeddings=24,
            decoder_start_token_id=2,
        ),
        r"model\.(encoder|decoder)\.layers\.0\.fc1",
        r"model\.encoder\.layernorm_embedding",
    ),
    "vit": Base(
        lambda: hf.ViTModel(hf.ViTConfig(**_SIZES, image_size=8, patch_size=4), add_pooling_layer=False),
        r".*\.1\.(attention\.(attention\.value|v_proj)|(intermediate\.dense|mlp\.fc1))",
        r"layernorm",
    ),
}


def base_of(name: str) -> PreTrainedModel:
    """A new model, with the same weights at every call and on every processor."""
    model = BASES[name].build()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = 2 * torch.rand(parameter.shape, generator=_generator(key)) - 1
            # Matrices get a standard deviation of 0.2. Norm weights are near one and biases near zero, but not equal to
            # it, so that a test does not pass by symmetry.
            parameter.copy_(0.35 * noise if parameter.dim() > 1 else parameter + 0.5 * noise)
    return model.eval()


def digest_of(model: PreTrainedModel) -> str:
    """The SHA-256 of all parameters and their names."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    hole = "<extra_id_0>" if name == "t5" else "[MASK]"
    words = {word: index for index, word in enumerate([*SPECIAL, hole, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([*SPECIAL, hole])
    special = {"pad_token": "[PAD]", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "[UNK]"}
    if name != "t5":
        special["mask_token"] = hole
    inputs = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **special)


def pairs(words: dict[str, str]) -> Dataset:
    """Pairs for every two of the classes, with their words."""
    texts = ["Tom went home and [FEATURE] saw the king", "because [FEATURE] was late a dog ran"]
    rows = [
        {
            "text": text,
            "factual": words[one],
            "counterfactual": words[other],
            "label": one,
            "counterfactual_label": other,
        }
        for one in words
        for other in words
        if one != other
        for text in texts
    ]
    return Dataset.from_list(rows)


def batch_of(name: str, seed: int, rows: int = 8, length: int = 6) -> dict[str, Tensor]:
    """Inputs with padding, and `concept_labels` that can be told from the inputs."""
    generator = _generator(str(seed))
    labels = torch.arange(rows) % 2
    if name == "vit":
        stripes = torch.linspace(-1, 1, 8).repeat(3, 8, 1)
        pixels = 4 * torch.rand(rows, 3, 8, 8, generator=generator) - 2 + labels.view(-1, 1, 1, 1) * stripes
        return {"pixel_values": pixels, "concept_labels": labels}
    first, half = len(SPECIAL) + 1, len(WORDS) // 2
    # Each class uses half of the words; half of those are used by both classes.
    ids = first + torch.randint(0, half, (rows, length), generator=generator) + half // 2 * labels[:, None]
    mask = (torch.arange(length) < length - torch.arange(rows)[:, None] % 3).long()
    batch = {"input_ids": ids * mask, "attention_mask": mask, "concept_labels": labels}
    if name in ("t5", "bart"):
        batch |= {"decoder_input_ids": ids.roll(1, 1) * mask, "decoder_attention_mask": mask}
    return batch


def _generator(text: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))
