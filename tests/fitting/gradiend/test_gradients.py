"""Gradients at feature words against plain backward passes over full logits, one unpadded row at a time."""

from __future__ import annotations

import math
import weakref

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from hf_erasure.fitting.gradiend import GradientReader, PairBatch, pair_batches, task_of
from hf_erasure.gradiend import ClosedFormEstimator
from tests.fitting.gradiend.language_models import CLASSES, NAMES, model_of, pairs, task_name, tokenizer_of

# Rounding of float32 sums in another order, relative to the norm of the whole gradient: up to 7e-7 was measured.
TOLERANCE = 1e-5

KINDS = ("factual", "counterfactual", "difference")
LANGUAGE_MODELS = tuple(name for name in NAMES if task_name(name) != "classification")


def batches_of(name: str, model: nn.Module, *words: str, side: str = "right") -> list[PairBatch]:
    """One batch for each class, with all rows of the class."""
    tokenizer = tokenizer_of(name, side)
    return pair_batches(pairs(name, *words), tokenizer, task_name(name), CLASSES, batch_size=3, config=model.config)


def targets(model: nn.Module) -> dict[str, nn.Parameter]:
    return dict(model.named_parameters())


def tokens_after(tokenizer: hf.PreTrainedTokenizerBase, prefix: str, word: str) -> list[int]:
    """The word's tokens, by hand: the tokens after those of the prefix."""
    known = tokenizer(prefix.strip(), add_special_tokens=False)["input_ids"]
    whole = tokenizer(f"{prefix}{word}", add_special_tokens=False)["input_ids"]
    assert whole[: len(known)] == known
    return whole[len(known) :]


def plain_loss(name: str, model: nn.Module, text: str, word: str) -> Tensor:
    """The loss of one row without padding, from full logits, written out for each task."""
    tokenizer, task = tokenizer_of(name), task_name(name)
    if task == "classification":
        logits = model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits
        return F.cross_entropy(logits, torch.tensor([model.config.label2id[word]]))
    prefix, suffix = text.split("[FEATURE]")
    ids = tokens_after(tokenizer, prefix, word)
    goal = torch.tensor(ids)
    if task == "causal":
        framed = tokenizer(f"{prefix}{word}")["input_ids"]
        logits = model(input_ids=torch.tensor([framed])).logits[0]
        return F.cross_entropy(logits[-len(ids) - 1 : -1], goal)
    whole = tokenizer(f"{prefix}{word}{suffix}")["input_ids"]
    at = next(i for i in range(len(whole)) if whole[i : i + len(ids)] == ids)
    if task == "masked":
        masked = [*whole[:at], *[tokenizer.mask_token_id] * len(ids), *whole[at + len(ids) :]]
        return F.cross_entropy(model(input_ids=torch.tensor([masked])).logits[0, at : at + len(ids)], goal)
    hole = tokenizer.convert_tokens_to_ids("<extra_id_0>") if name == "t5" else tokenizer.mask_token_id
    source = torch.tensor([[*whole[:at], hole, *whole[at + len(ids) :]]])
    labels = torch.tensor([[hole, *ids]]) if name == "t5" else torch.tensor([whole])
    first = 1 if name == "t5" else at
    logits = model(input_ids=source, labels=labels).logits[0]
    return F.cross_entropy(logits[first : first + len(ids)], goal)


def plain_gradients(name: str, model: nn.Module, label: int, *words: str) -> dict[str, dict[str, Tensor]]:
    """Both gradients and their difference, from the mean of `plain_loss` over the class's rows."""
    model.eval()
    rows = [row for row in pairs(name, *words) if row["label"] == CLASSES[label]]
    found = {}
    for kind in ("factual", "counterfactual"):
        model.zero_grad()
        for row in rows:
            (plain_loss(name, model, row["text"], row[kind]) / len(rows)).backward()
        found[kind] = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()
        }
    model.zero_grad()
    model.train()
    right, wrong = found["factual"], found["counterfactual"]
    return {**found, "difference": {n: right[n] - wrong[n] for n in right}}


def off_by(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest error of an entry, relative to the largest entry of all gradients."""
    assert got.keys() == expected.keys()
    size = max(float(block.abs().max()) for block in expected.values())
    assert size > 1e-3
    return max(float((got[name] - expected[name]).abs().max()) for name in got) / size


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_a_plain_loss_over_full_logits(name: str) -> None:
    model = model_of(name)
    for batch in batches_of(name, model):
        got = GradientReader(model, targets(model)).gradients(batch, KINDS)
        expected = plain_gradients(name, model, batch.label)
        for kind in KINDS:
            assert off_by(got[kind], expected[kind]) < TOLERANCE, kind


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if task_name(name) == "causal"])
@pytest.mark.parametrize("words", [("he", "she"), ("grandpa", "grandma")], ids=["single", "multi"])
def test_a_tokenizer_that_pads_at_the_left_changes_nothing(name: str, words: tuple[str, str]) -> None:
    model = model_of(name)
    for batch in batches_of(name, model, *words, side="left"):
        got = GradientReader(model, targets(model)).gradients(batch, KINDS)
        expected = plain_gradients(name, model, batch.label, *words)
        assert max(off_by(got[kind], expected[kind]) for kind in KINDS) < TOLERANCE


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_words_of_several_tokens(name: str) -> None:
    model = model_of(name)
    for batch in batches_of(name, model, "grandpa", "grandma"):
        assert len(batch.factual) == 2 * len(batch)
        got = GradientReader(model, targets(model)).gradients(batch, KINDS)
        expected = plain_gradients(name, model, batch.label, "grandpa", "grandma")
        assert max(off_by(got[kind], expected[kind]) for kind in KINDS) < TOLERANCE


@pytest.mark.parametrize("name", [name for name in LANGUAGE_MODELS if task_name(name) != "masked"])
def test_words_with_different_numbers_of_tokens(name: str) -> None:
    """Each word has a forward pass of its own, and a mean over its own tokens."""
    model = model_of(name)
    for batch in batches_of(name, model, "grandpa", "she"):
        assert batch.apart is not None
        got = GradientReader(model, targets(model)).gradients(batch, KINDS)
        expected = plain_gradients(name, model, batch.label, "grandpa", "she")
        assert max(off_by(got[kind], expected[kind]) for kind in KINDS) < TOLERANCE
        for kind in KINDS:
            alone = GradientReader(model, targets(model)).gradients(batch, (kind,))[kind]
            assert off_by(alone, expected[kind]) < TOLERANCE


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_head_sees_only_predicted_positions(name: str) -> None:
    model = model_of(name)
    seen: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, args, output: seen.append(output.numel() // output.shape[-1]))
    batch = batches_of(name, model)[0]
    GradientReader(model, targets(model)).gradients(batch, KINDS)
    handle.remove()
    assert seen == [len(batch)], "one forward, and one row of logits a predicted token"


def test_a_tied_weight_is_one_block_with_the_gradient_of_both_uses() -> None:
    model = model_of("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    batch = batches_of("gpt2", model)[0]
    got = GradientReader(model, {"wte": model.transformer.wte.weight}).gradients(batch, ("factual",))["factual"]["wte"]
    expected = plain_gradients("gpt2", model, batch.label)["factual"]["transformer.wte.weight"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


# ---- what a reading does not change ----------------------------------------------------------------------------------


def state_of(model: nn.Module) -> list[object]:
    return [*(m.training for m in model.modules()), *((p.requires_grad, id(p.grad)) for p in model.parameters())]


def prepared(name: str = "bert") -> nn.Module:
    """A model with some frozen parameters, some gradients already set, and mixed training flags."""
    model = model_of(name)
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 != 0)
        if index % 2:
            parameter.grad = torch.full_like(parameter, 3.0)
    next(iter(model.children())).eval()
    return model


class Recorder:
    """Replaces the closed-form estimator, and keeps what it is given."""

    def __init__(self, fail_at: str = "") -> None:
        self.source: dict[str, Tensor] = {}
        self.target: dict[str, Tensor] = {}
        self.calls: list[str] = []
        self.fail_at = fail_at

    def _note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fail_at:
            raise RuntimeError("no")

    def add(self, kind: str, name: str, gradient: Tensor, sign: int, norm: float = 1.0) -> None:
        held = self.source if kind == "source" else self.target
        assert name not in held
        held[name] = sign * gradient.clone()
        self._note(kind)


def test_flags_and_gradients_are_as_before() -> None:
    model = prepared()
    before = state_of(model)
    batch = batches_of("bert", model)[0]
    reader = GradientReader(model, targets(model))
    reader.gradients(batch, KINDS)
    reader.accumulate(batch, "factual", Recorder(), 1)
    reader.word_log_probabilities(batch, [[5], [6, 7]])
    assert state_of(model) == before
    assert all(bool((p.grad == 3).all()) for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("fail_at", ["source", "target"])
def test_flags_and_gradients_are_as_before_after_an_exception(fail_at: str) -> None:
    model = prepared()
    before = state_of(model)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    batch = batches_of("bert", model)[0]
    reader = GradientReader(model, targets(model))
    with pytest.raises(RuntimeError, match="no"):
        reader.accumulate(batch, "factual", Recorder(fail_at), 1)
    assert state_of(model) == before
    broken = PairBatch(
        {"input_ids": torch.tensor([[10**6]])}, batch.rows, batch.positions, batch.factual, batch.factual
    )
    with pytest.raises(IndexError):
        reader.gradients(broken)
    assert state_of(model) == before
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    again = Recorder()
    reader.accumulate(batch, "factual", again, 1)
    assert again.calls.count("target") == len(again.target), "hooks of the failed call are gone"


def test_dropout_is_off_and_the_callers_modes_do_not_matter() -> None:
    model = model_of("bert")
    assert model.training and model.config.hidden_dropout_prob > 0
    batch = batches_of("bert", model)[0]
    reader = GradientReader(model, targets(model))
    first = reader.gradients(batch, ("factual",))["factual"]
    with torch.no_grad():
        second = reader.gradients(batch, ("factual",))["factual"]
    with torch.inference_mode():
        third = reader.gradients(batch, ("factual",))["factual"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(first[name], third[name]) for name in first)
    assert not any(block.requires_grad for block in first.values())


# ---- models as they are used -----------------------------------------------------------------------------------------


def test_only_targeted_parameters_get_a_gradient() -> None:
    model = model_of("llama")
    chosen = {n: p for n, p in model.named_parameters() if "layers.1.mlp" in n}
    frozen = model.model.layers[0].mlp.up_proj.weight
    seen: list[bool] = []
    forward = nn.Linear.forward

    def noting(self: nn.Linear, x: Tensor) -> Tensor:
        if self.weight is frozen:
            seen.append(self.weight.requires_grad or x.requires_grad)
        return forward(self, x)

    model.model.layers[0].mlp.up_proj.forward = noting.__get__(model.model.layers[0].mlp.up_proj)
    batch = batches_of("llama", model)[0]
    got = GradientReader(model, chosen).gradients(batch)
    assert seen == [False], "the graph does not reach below the first target"
    expected = plain_gradients("llama", model, batch.label)
    for kind in ("factual", "difference"):
        assert got[kind].keys() == chosen.keys()
        assert off_by(got[kind], {name: expected[kind][name] for name in chosen}) < TOLERANCE


def test_a_base_that_peft_froze_with_an_active_adapter() -> None:
    model = get_peft_model(model_of("llama"), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    base = model.get_base_model()
    chosen = {n: p for n, p in base.named_parameters() if "lora" not in n}
    assert not any(p.requires_grad for p in chosen.values())
    batch = batches_of("llama", base)[0]
    got = GradientReader(model, chosen).gradients(batch, KINDS)
    assert task_of(model) == "causal"
    assert not any(p.requires_grad for p in chosen.values())
    assert any(p.requires_grad for p in base.parameters()), "the LoRA is trainable as before"
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    expected = plain_gradients("llama", base, batch.label)
    for kind in KINDS:
        assert off_by(got[kind], {name: expected[kind][name] for name in chosen}) < TOLERANCE
    with model.disable_adapter():
        without = GradientReader(model, chosen).gradients(batch, ("factual",))["factual"]
    assert off_by(without, got["factual"]) > 1e-2, "the adapter takes part while it is active"


@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_bf16_models_give_float32_gradients(name: str) -> None:
    model = model_of(name)
    batch = batches_of(name, model)[0]
    expected = plain_gradients(name, model, batch.label)
    model.to(torch.bfloat16)
    got = GradientReader(model, targets(model)).gradients(batch, KINDS)
    for kind in KINDS:
        flat = torch.cat([block.flatten() for block in got[kind].values()])
        goal = torch.cat([expected[kind][block].flatten() for block in got[kind]])
        assert flat.dtype == torch.float32
        # Activations and weights have 8 bits of mantissa, and pass two layers with large weights.
        assert float(F.cosine_similarity(flat, goal, dim=0)) > 0.95


def test_gradient_checkpointing() -> None:
    model = model_of("llama")
    batch = batches_of("llama", model)[0]
    expected = plain_gradients("llama", model, batch.label)
    model.gradient_checkpointing_enable()
    got = GradientReader(model, targets(model)).gradients(batch, KINDS)
    assert max(off_by(got[kind], expected[kind]) for kind in KINDS) < TOLERANCE


def test_parameters_that_the_loss_does_not_reach_have_zeros() -> None:
    model = model_of("bert")
    unused = nn.Parameter(torch.ones(3))
    model.register_parameter("unused", unused)
    batch = batches_of("bert", model)[0]
    got = GradientReader(model, targets(model)).gradients(batch)
    assert all(torch.equal(got[kind]["unused"], torch.zeros(3)) for kind in got)
    with pytest.raises(ValueError, match=r"does not depend on any of the 1 targeted parameters \(unused"):
        GradientReader(model, {"unused": unused}).gradients(batch)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model = model_of("bert")
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = float("nan")
    recorder = Recorder()
    with pytest.raises(ValueError, match="loss is nan"):
        GradientReader(model, targets(model)).accumulate(batches_of("bert", model)[0], "factual", recorder, 1)
    assert recorder.calls == []


# ---- streaming -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize(
    ("name", "words"), [("gpt2", ("he", "she")), ("t5", ("grandpa", "she")), ("bert", ("he", "she"))]
)
def test_streamed_blocks_are_the_whole_gradients(name: str, words: tuple[str, str], source: str) -> None:
    model = model_of(name)
    batch = batches_of(name, model, *words)[0]
    reader, recorder = GradientReader(model, targets(model)), Recorder()
    runs: list[int] = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    reader.accumulate(batch, source, recorder, -1)
    handle.remove()
    assert len(runs) == (1 if batch.apart is None else 2)
    assert recorder.calls[0] == "source" and recorder.calls[-1] == "target"
    expected = reader.gradients(batch, (source, "difference"))
    assert off_by({n: -block for n, block in recorder.source.items()}, expected[source]) < TOLERANCE
    assert off_by({n: -block for n, block in recorder.target.items()}, expected["difference"]) < TOLERANCE


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("low_memory", [False, True], ids=["whole source", "low memory"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_closed_form_is_filled_as_by_whole_gradients(source: str, dtype: torch.dtype, low_memory: bool) -> None:
    model = model_of("bert")
    model.register_parameter("unused", nn.Parameter(torch.ones(3)))
    model.to(dtype)
    reader = GradientReader(model, targets(model))
    shapes = {name: parameter.shape for name, parameter in targets(model).items()}
    streamed, whole = ClosedFormEstimator(shapes), ClosedFormEstimator(shapes)
    for batch, sign in zip(batches_of("bert", model), (1, -1), strict=True):
        reader.accumulate(batch, source, streamed, sign, low_memory=low_memory)
        gradients = reader.gradients(batch, (source, "difference"))
        norm = math.sqrt(sum(float(block.double().square().sum()) for block in gradients[source].values()))
        for name, block in gradients[source].items():
            whole.add("source", name, block, sign, norm)
        for name, block in gradients["difference"].items():
            whole.add("target", name, block, sign)
    got, goal = streamed.feature(), whole.feature()
    assert off_by(got.decoder.weight, goal.decoder.weight) < TOLERANCE
    assert off_by(got.encoder.weight, goal.encoder.weight) < TOLERANCE


def test_streaming_never_holds_two_gradients() -> None:
    """When a block of the target arrives, no block of the source and no other block of the target is in memory."""
    model = model_of("llama")
    held: list[int] = []

    class Watching(Recorder):
        def __init__(self) -> None:
            super().__init__()
            self.watched: list[weakref.ref[Tensor]] = []

        def add(self, kind: str, name: str, gradient: Tensor, sign: int, norm: float = 1.0) -> None:
            if kind == "source":
                self.watched.append(weakref.ref(gradient))
            else:
                alive = sum(block() is not None for block in self.watched)
                held.append(alive + sum(p.grad is not None for p in model.parameters()))

    GradientReader(model, targets(model)).accumulate(batches_of("llama", model)[0], "factual", Watching(), 1)
    assert len(held) == len(targets(model)) and max(held) == 0


def test_low_memory_holds_one_block_at_a_time() -> None:
    model = model_of("llama")
    order: list[str] = []

    class Watching(ClosedFormEstimator):
        def add(self, kind: str, name: str, gradient: Tensor, sign: int, norm: float = 1.0) -> None:
            assert not any(p.grad is not None for p in model.parameters())
            order.append(kind)
            super().add(kind, name, gradient, sign, norm)

    parameters = targets(model)
    estimator = Watching({name: parameter.shape for name, parameter in parameters.items()})
    batch = batches_of("llama", model)[0]
    GradientReader(model, parameters).accumulate(batch, "factual", estimator, 1, low_memory=True)
    assert order == ["source"] * len(parameters) + ["target"] * len(parameters)
    state = estimator.state_dict()
    assert bool((state["source+count"] == 1).all()) and not bool(state["source-count"].any())


# ---- probabilities ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_word_log_probabilities(name: str) -> None:
    model = model_of(name)
    batch = batches_of(name, model)[0]
    reader = GradientReader(model, targets(model))
    tokenizer = tokenizer_of(name)
    words = ["woman", "man"] if task_name(name) == "classification" else ["he", "grandpa", "she", "grandma", "queen"]
    if task_name(name) == "classification":
        ids = [[0], [1]]
    else:
        ids = [tokens_after(tokenizer, "a ", word) for word in words]
        assert {len(word) for word in ids} == {1, 2}
    got = reader.word_log_probabilities(batch, ids)
    assert got.shape == (len(batch), len(words)) and got.dtype == torch.float32
    texts = [row["text"] for row in pairs(name) if row["label"] == CLASSES[batch.label]]
    model.eval()
    with torch.no_grad():
        goal = [
            [-float(plain_loss(name, model, text, word)) * len(tokens) for word, tokens in zip(words, ids, strict=True)]
            for text in texts
        ]
    torch.testing.assert_close(got, torch.tensor(goal), rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        at_slot = reader.logits(batch).log_softmax(-1)
    torch.testing.assert_close(at_slot[:, ids[0][0]], got[:, 0], rtol=1e-4, atol=1e-5)


def test_forwards_are_shared() -> None:
    model = model_of("llama")
    batch = batches_of("llama", model)[0]
    runs: list[int] = []
    model.register_forward_hook(lambda *_: runs.append(1))
    reader = GradientReader(model, targets(model))
    reader.word_log_probabilities(batch, [[9], [10], [11], [12]])
    assert len(runs) == 1
    reader.word_log_probabilities(batch, [[9], [10, 11], [10, 12], [13]])
    assert len(runs) == 3, "one for single tokens, one for the words that begin with token 10"


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_task_of(name: str) -> None:
    assert task_of(model_of(name)) == task_name(name)


def test_a_base_without_the_right_head() -> None:
    bare = hf.BertModel(hf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match=r"BertModel has no head .* AutoModelForMaskedLM"):
        task_of(bare)
    config = hf.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, num_labels=1)
    with pytest.raises(ValueError, match="1 label"):
        task_of(hf.BertForSequenceClassification(config))
    with pytest.raises(ValueError, match="has no head"):
        task_of(hf.T5EncoderModel(hf.T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)))


def test_a_model_without_gradients_in_evaluation_mode():
    sizes = {"attn_layers": ["local"], "axial_pos_embds": False, "local_attn_chunk_length": 4, "is_decoder": True}
    heads = {"hidden_size": 16, "attention_head_size": 8, "num_attention_heads": 2, "feed_forward_size": 16}
    model = hf.ReformerModelWithLMHead(hf.ReformerConfig(vocab_size=60, max_position_embeddings=16, **sizes, **heads))
    ids = torch.full((1, 8), 5)
    batch = PairBatch({"input_ids": ids}, *map(torch.tensor, ([0], [7], [3], [4])))
    reader = GradientReader(model, {"table": model.get_input_embeddings().weight})
    with pytest.raises(ValueError, match="gives no gradients in evaluation mode"):
        reader.gradient(batch, "factual")
