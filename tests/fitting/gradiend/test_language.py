"""Language-modelling scores against losses and hits that are counted by hand, one unpadded text at a time."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from datasets import Dataset
from torch.nn import functional as F

from hf_erasure.fitting.gradiend import LanguageModelling, PairError, SlotReader, word_tokens
from hf_erasure.models import neutral as neutral_texts
from hf_erasure.models.slots import SlotInputs
from tests.fitting.gradiend.language_models import NAMES, model_of, neutral, task_name, tokenizer_of

TEXTS = Dataset.from_dict(
    {"text": [*neutral()["text"], "it ate", "the dog and the king went over the hill to the queen"]}
)


def language(
    name: str, model: torch.nn.Module, side: str = "right", texts: Dataset = TEXTS, **options: Any
) -> LanguageModelling:
    tokenizer = tokenizer_of(name, side)
    return LanguageModelling(SlotReader(model), texts, tokenizer, feature_words=["dog"], batch_size=2, **options)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_causal_loss_is_transformers_own_over_all_tokens(name: str, side: str) -> None:
    model = model_of(name)
    got = language(name, model, side).score()
    assert model.training
    loss, count = 0.0, 0
    with torch.no_grad():
        for text in TEXTS["text"]:
            ids = torch.tensor([tokenizer_of(name)(text)["input_ids"]])
            # A text's first token is not scored, not even if the tokenizer puts a start token before it.
            first = 1 if name == "llama" else 0
            logits = model.eval()(input_ids=ids).logits[0, first:-1]
            loss += float(F.cross_entropy(logits, ids[0, first + 1 :], reduction="sum"))
            count += ids.shape[1] - 1 - first
    assert got["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert got["lms"] == pytest.approx(1 / (1 + loss / count), rel=1e-5)


@pytest.mark.parametrize("name", ["bert", "roberta", "distilbert"])
def test_masked_accuracy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutral_texts, "_MASK_SHARE", 0.4)
    model, tokenizer = model_of(name), tokenizer_of(name)
    scored = language(name, model)
    got = scored.score()
    hits, loss, count, masked = 0, 0.0, 0, []
    model.eval()
    dog = word_tokens(tokenizer, ["dog"])[0][0]
    for filled in scored.batches:
        for row in range(len(filled.inputs["input_ids"])):
            real = filled.inputs["attention_mask"][row].bool()
            ids = filled.inputs["input_ids"][row][real]
            places = filled.positions[filled.rows == row]
            tokens = filled.tokens[filled.rows == row]
            assert (ids[places] == tokenizer.mask_token_id).all()
            assert int((ids == tokenizer.mask_token_id).sum()) == len(places), "nothing is masked that is not scored"
            assert dog not in tokens and not set(tokens.tolist()) & set(tokenizer.all_special_ids)
            with torch.no_grad():
                logits = model(input_ids=ids[None]).logits[0, places]
            hits += int((logits.argmax(1) == tokens).sum())
            loss += float(F.cross_entropy(logits, tokens, reduction="sum"))
            count += len(places)
            ids = ids.clone()
            ids[places] = tokens
            masked.append(ids.tolist())
    assert sorted(masked) == sorted(tokenizer(list(TEXTS["text"]))["input_ids"]), "every text, with its own tokens"
    assert got == {"loss": pytest.approx(loss / count, rel=1e-5), "lms": hits / count}


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_seq2seq_spans(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the labels are those that the models are trained with; only the tokens that were cut out count."""
    monkeypatch.setattr(neutral_texts, "_MASK_SHARE", 0.3)
    model, tokenizer = model_of(name).eval(), tokenizer_of(name)
    scored = language(name, model)
    got = scored.score()
    holes = [f"<extra_id_{i}>" for i in range(5)] if name == "t5" else [tokenizer.mask_token] * 9
    loss, count, texts = 0.0, 0, []
    for filled in scored.batches:
        for row in range(len(filled.inputs["input_ids"])):
            ids = filled.inputs["input_ids"][row][filled.inputs["attention_mask"][row].bool()]
            tokens = filled.tokens[filled.rows == row].tolist()
            names = tokenizer.convert_ids_to_tokens(ids)
            at = [names.index(hole) if name == "t5" else [i for i, x in enumerate(names) if x == hole][k]
                  for k, hole in enumerate(holes[: len(tokens)])]  # fmt: skip
            whole = ids.tolist()
            for place, token in zip(at, tokens, strict=True):
                whole[place] = token
            texts.append(whole)
            labels, counted = whole, at
            if name == "t5":
                labels = [x for hole, token in zip(holes, tokens, strict=False)
                          for x in (tokenizer.convert_tokens_to_ids(hole), token)]  # fmt: skip
                counted = list(range(1, len(labels), 2))
            with torch.no_grad():
                logits = model(input_ids=ids[None], labels=torch.tensor([labels])).logits[0, counted]
            loss += float(F.cross_entropy(logits, torch.tensor(labels)[counted], reduction="sum"))
            count += len(counted)
    assert sorted(texts) == sorted(tokenizer(list(TEXTS["text"]))["input_ids"])
    assert got["loss"] == pytest.approx(loss / count, rel=1e-5)
    assert got["lms"] == pytest.approx(1 / (1 + loss / count), rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scores_follow_the_weights_and_repeat(name: str) -> None:
    model = model_of(name)
    scored = language(name, model)
    first = scored.score()
    assert scored.score() == first == language(name, model).score()
    if task_name(name) == "classification":
        assert first["lms"] == 1.0
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    assert scored.score()["loss"] != first["loss"]
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["bert", "t5", "bart"])
def test_further_draws_take_other_tokens_of_every_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neutral_texts, "_MASK_SHARE", 0.3)
    model = model_of(name)
    once, often = language(name, model), language(name, model, mask_draws=3)
    first, more = ([b for filled in scored.batches for b in hidden(filled)] for scored in (once, often))
    assert len(more) == 3 * len(first) == 3 * len(TEXTS)
    assert not Counter(first) - Counter(more), "the first draw is the one there is without further ones"
    assert len(set(more)) > len(set(first))
    assert language(name, model, mask_draws=3).score() == often.score() != once.score()


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_where_nothing_is_masked_draws_make_no_difference(name: str) -> None:
    model = model_of(name)
    assert len(language(name, model, mask_draws=3).batches) == len(language(name, model).batches)
    assert language(name, model, mask_draws=3).score() == language(name, model).score()


def hidden(filled: SlotInputs) -> list[tuple[tuple[int, ...], ...]]:
    """For each text, the unpadded input and the tokens to predict."""
    ids, mask = filled.inputs["input_ids"], filled.inputs["attention_mask"].bool()
    return [
        (tuple(ids[row][mask[row]].tolist()), tuple(filled.tokens[filled.rows == row].tolist()))
        for row in range(len(ids))
    ]


def test_longer_texts_are_cut_into_pieces() -> None:
    model = model_of("gpt2")
    text = "the king said that he was late because a dog ran over the hill and"
    tokens = len(tokenizer_of("gpt2")(text)["input_ids"])
    model.config.max_position_embeddings = 7
    scored = language("gpt2", model, texts=Dataset.from_dict({"text": [text]}))
    assert sum(len(filled.tokens) for filled in scored.batches) == tokens - -(-tokens // 7)
    assert max(filled.inputs["input_ids"].shape[1] for filled in scored.batches) == 7


def test_faults() -> None:
    model = model_of("bert")
    with pytest.raises(PairError, match="no neutral text has a token that could be scored"):
        language("bert", model, texts=Dataset.from_dict({"text": ["dog", "dog dog"]}))
    with pytest.raises(PairError, match="mask_draws 0"):
        language("bert", model, mask_draws=0)
    with pytest.raises(ValueError, match="has no head"):
        SlotReader(model.bert)


@pytest.mark.parametrize("name", ["stories260k", "story-mlm"])
def test_models_of_stories(name: str, assets: Path) -> None:
    folder = assets / "models" / name
    kind = hf.AutoModelForMaskedLM if name == "story-mlm" else hf.AutoModelForCausalLM
    model, tokenizer = kind.from_pretrained(folder), hf.AutoTokenizer.from_pretrained(folder)
    text = (assets / "data" / "tinystories-sample" / "tinystories.txt").read_text()[:20_000]
    scored = LanguageModelling(SlotReader(model), Dataset.from_dict({"text": [text]}), tokenizer)
    score = scored.score()
    if name == "stories260k":
        assert 1.3 < score["loss"] < 1.6, "the assets' README says 1.46"
    else:
        assert score["lms"] > 0.2
