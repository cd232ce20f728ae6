"""Small language models with tokenizers of three kinds that know a few words; nothing is downloaded."""

from __future__ import annotations

import functools

import torch
import transformers as hf
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.small_models import roughen

WORDS = (  # noqa: SIM905
    "he she said that went home was happy because too Tom and ate bread Lily the doctor late nurse here grand to king "
    "queen a dog ran over green hill it fast"
).split()
# "grandpa" and "grandma" have two tokens, as rarer words have in a trained vocabulary.
PIECES = ["pa", "ma"]
LETTERS = sorted(set("".join(WORDS + PIECES)) | set(",."))

FEMALE, MALE = "female", "male"
CLASSES = [FEMALE, MALE]


def _wordpiece() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    known = [*special, *LETTERS, *(f"##{piece}" for piece in [*LETTERS, *PIECES]), *WORDS]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(known))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def _bpe(special: list[str], letters: list[str], space: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary and merges that build each word from left to right after a space, and merges for the pieces."""
    merges = [(piece[0], piece[1]) for piece in PIECES]
    for word in WORDS:
        left = space
        for letter in word:
            merges.append((left, letter))
            left += letter
    merges = list(dict.fromkeys(merges))
    known = dict.fromkeys([*special, *letters, space, *(left + right for left, right in merges)])
    return {token: index for index, token in enumerate(known)}, merges


def _byte_level(*, framed: bool) -> PreTrainedTokenizerFast:
    special = ["<s>", "<pad>", "</s>", "<mask>"] if framed else ["<|endoftext|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(*_bpe(special, alphabet, "Ġ")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    if not framed:
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", unk_token=None)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        mask_token="<mask>",
        model_input_names=["input_ids", "attention_mask"],
    )


def _metaspace(*, sentinels: bool) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<unk>", "</s>", *[f"<extra_id_{i}>" for i in range(5)]] if sentinels else ["<unk>", "<s>"]
    tokenizer = Tokenizer(models.BPE(*_bpe(special, LETTERS, "▁"), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(special)
    frame = ("$A </s>", [("</s>", 2)]) if sentinels else ("<s> $A", [("<s>", 1)])
    tokenizer.post_processor = processors.TemplateProcessing(frame[0], None, frame[1])
    ends = {"pad_token": "<pad>", "eos_token": "</s>"} if sentinels else {"bos_token": "<s>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", model_input_names=["input_ids", "attention_mask"], **ends
    )


_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
_LENGTH = {"max_position_embeddings": 64}


def _t5(size: int) -> PreTrainedModel:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=size, **sizes, **tokens))


def _bart(size: int) -> PreTrainedModel:
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in
             (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}  # fmt: skip
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    return hf.BartForConditionalGeneration(hf.BartConfig(vocab_size=size, d_model=32, **sizes, **tokens, **_LENGTH))


def _distilbert(size: int) -> PreTrainedModel:
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48}
    return hf.DistilBertForMaskedLM(hf.DistilBertConfig(vocab_size=size, pad_token_id=0, **sizes, **_LENGTH))


def _gpt2(size: int) -> PreTrainedModel:
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, n_positions=64, **tokens))


def _roberta(size: int) -> PreTrainedModel:
    tokens = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    return hf.RobertaForMaskedLM(hf.RobertaConfig(vocab_size=size, **_SIZES, **tokens, **_LENGTH))


def _llama(kind: type, size: int, **extra: object) -> PreTrainedModel:
    tokens = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": None}
    sizes = {**_SIZES, **_LENGTH, "num_key_value_heads": 2, "head_dim": 8}
    return kind(hf.LlamaConfig(vocab_size=size, **sizes, **{**tokens, **extra}))


_LABELS = {"num_labels": 2, "id2label": {0: "woman", 1: "man"}, "label2id": {"woman": 0, "man": 1}}

_BUILD = {
    "bert": ("masked", _wordpiece, lambda n: hf.BertForMaskedLM(hf.BertConfig(vocab_size=n, **_SIZES, **_LENGTH))),
    "distilbert": ("masked", _wordpiece, _distilbert),
    "roberta": ("masked", lambda: _byte_level(framed=True), _roberta),
    "gpt2": ("causal", lambda: _byte_level(framed=False), _gpt2),
    "gpt_neox": (
        "causal",
        lambda: _byte_level(framed=False),
        lambda n: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(vocab_size=n, **_SIZES, **_LENGTH)),
    ),
    "llama": ("causal", lambda: _metaspace(sentinels=False), lambda n: _llama(hf.LlamaForCausalLM, n)),
    "t5": ("seq2seq", lambda: _metaspace(sentinels=True), _t5),
    "bart": ("seq2seq", lambda: _byte_level(framed=True), _bart),
    "bert_classifier": (
        "classification",
        _wordpiece,
        lambda n: hf.BertForSequenceClassification(hf.BertConfig(vocab_size=n, **_SIZES, **_LENGTH, **_LABELS)),
    ),
    "llama_classifier": (
        "classification",
        lambda: _metaspace(sentinels=True),
        lambda n: _llama(hf.LlamaForSequenceClassification, n, pad_token_id=0, **_LABELS),
    ),
}

NAMES = tuple(_BUILD)


def task_name(name: str) -> str:
    return _BUILD[name][0]


@functools.cache
def tokenizer_of(name: str, padding_side: str = "right") -> PreTrainedTokenizerFast:
    tokenizer = _BUILD[name][1]()
    tokenizer.padding_side = padding_side
    return tokenizer


def model_of(name: str) -> PreTrainedModel:
    """A new model, with the same weights at every call, in training mode with dropout where it has any."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    model: nn.Module = roughen(_BUILD[name][2](len(tokenizer_of(name))), generator)
    return model.train()


# The texts differ in the number of tokens before the slot, and in all.
TEXTS = [
    "Tom went home to a dog, and [FEATURE] ate",
    "the king said [FEATURE] was late",
    "because [FEATURE] was fast, a dog ran over it",
]


def pairs(name: str, factual: str = "he", counterfactual: str = "she") -> Dataset:
    """Each text with either word as the factual one; for a classifier, texts have the word, and labels are classes."""
    ways = [(factual, counterfactual, MALE), (counterfactual, factual, FEMALE)]
    rows = [(text, *way) for way in ways for text in TEXTS]
    if task_name(name) == "classification":
        label = {MALE: "man", FEMALE: "woman"}
        other = {MALE: "woman", FEMALE: "man"}
        rows = [(text.replace("[FEATURE]", right), label[c], other[c], c) for text, right, _, c in rows]
    return Dataset.from_dict(
        dict(zip(("text", "factual", "counterfactual", "label"), zip(*rows, strict=True), strict=True))
    )


def neutral() -> Dataset:
    return Dataset.from_dict(
        {
            "text": [
                "a dog ran over the green hill because it was fast",
                "bread was late, and a dog ate bread",
                "it was happy because it ran",
            ]
        }
    )
