"""`GradiendTrainer` and `GradiendAdapter` on small models of every task: from pairs to a chosen edit."""

from __future__ import annotations

import copy
import json
import math
import shutil
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from tokenizers import normalizers
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainerCallback

from hf_erasure import GradiendAdapter, GradiendConfig, GradiendTrainer, GradiendTrainingArguments
from hf_erasure.adapters import features_of, targeted_parameters
from hf_erasure.fitting.gradiend import PairBatch, PairSet
from hf_erasure.fitting.gradiend.gradients import reading_the_base
from hf_erasure.fitting.gradiend.selection import class_probabilities
from hf_erasure.models.slots import SlotReader
from tests.adapters.test_ordinary import MODES, state_of
from tests.fitting.gradiend.language_models import CLASSES, model_of, neutral, pairs, task_name, tokenizer_of

NAME = "gender"
EVERY_TASK = ["llama", "bert", "t5", "bert_classifier"]


def adapted(name: str, **fields: Any) -> PreTrainedModel:
    model = model_of(name).eval()
    config = GradiendConfig(feature="gender", classes=CLASSES, **{"density": 1.0, **fields})
    model.add_adapter(config, adapter_name=NAME)
    return model


def trainer_of(model: PreTrainedModel, name: str, folder: Path, callbacks=None, **arguments: Any) -> GradiendTrainer:
    settings: dict[str, Any] = {"disable_tqdm": True, "per_device_train_batch_size": 1, "save_strategy": "no"}
    return GradiendTrainer(
        model,
        args=GradiendTrainingArguments(output_dir=str(folder), **{**settings, **arguments}),
        train_dataset=pairs(name),
        eval_dataset=_other_texts(name),
        neutral_dataset=neutral(),
        tokenizer=tokenizer_of(name),
        callbacks=callbacks,
    )


def _other_texts(name: str) -> Dataset:
    """The pairs with other words around the slot, which the trainer does not learn from."""
    swapped = {"Tom": "Lily", "king": "nurse", "fast": "late", "happy": "fast", "dog": "doctor"}

    def swap(row: dict[str, str]) -> dict[str, str]:
        return {**row, "text": " ".join(swapped.get(word, word) for word in row["text"].split(" "))}

    return pairs(name).map(swap)


def logits_of(model: PreTrainedModel, name: str) -> torch.Tensor:
    ids = torch.arange(8, 16)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if task_name(name) == "seq2seq":
        inputs["decoder_input_ids"] = ids
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", EVERY_TASK)
def test_closed_form_reads_the_class_of_texts_it_has_not_seen(name: str, tmp_path: Path):
    model = adapted(name)
    before = {key: value.clone() for key, value in model.named_parameters()}
    unadapted = logits_of(model, name)
    trainer = trainer_of(model, name, tmp_path)
    output = trainer.train()
    found = trainer.evaluate()

    assert output.global_step == len(pairs(name))
    assert found["acc"] == 1.0
    assert found["cor"] > 0.9  # The words differ and little else, so that anything much lower means mixed-up signs.
    assert found["eval_cor"] == found["cor"]
    assert {"cor_enc", "acc_enc"} <= set(found)
    assert output.metrics["cor_female_male"] == pytest.approx(found["cor"])
    # Gradients were read, but the model was not trained; without a learning rate the adapter does nothing.
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert torch.equal(logits_of(model, name), unadapted)
    GradiendAdapter.of(model, NAME).steer(feature_factor=1.0, learning_rate=1e-2)
    assert not torch.equal(logits_of(model, name), unadapted)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("estimator", ["closed_form", "trained"])
def test_a_feature_that_is_trained_in_another_mode_is_the_same(estimator: str, tmp_path: Path):
    found = []
    for mode in ("plain", "inference", "float64", "bfloat16"):
        model = adapted("bert")
        trainer = trainer_of(model, "bert", tmp_path, estimator=estimator)
        with nullcontext() if mode == "plain" else MODES[mode]():
            trainer.train()
            figures = trainer.evaluate()
        assert figures and not any(parameter.is_inference() for parameter in model.parameters())
        found.append(state_of(model))
    for other in found[1:]:
        assert all(torch.allclose(value, other[key], atol=1e-6, rtol=1e-5) for key, value in found[0].items())
        assert all(not value.is_inference() and value.dtype == found[0][key].dtype for key, value in other.items())


@pytest.mark.parametrize("mode", ["plain", "inference", "no_grad"])
@pytest.mark.parametrize("estimator", ["closed_form", "trained"])
def test_a_callback_may_compute_gradients_at_every_event(estimator: str, mode: str, tmp_path: Path):
    events, probe = [], torch.nn.Linear(1, 1)

    class Probing(TrainerCallback):
        def _train(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            probe(torch.ones(1)).sum().backward()
            events.append(float(probe.weight.grad))

        on_train_begin = on_step_end = on_log = on_evaluate = on_save = on_train_end = _train

    options = {"estimator": estimator, "save_strategy": "steps", "save_steps": 2, "max_steps": 4, "logging_steps": 1}
    trainer = trainer_of(adapted("llama"), "llama", tmp_path, [Probing()], **options)
    with nullcontext() if mode == "plain" else MODES[mode]():
        trainer.train()
    assert len(events) > 8 and events == [1.0 + i for i in range(len(events))]


def test_a_saved_configuration_is_json_where_nothing_was_evaluated(tmp_path: Path):
    model = adapted("bert")
    args = GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, save_strategy="no")
    GradiendTrainer(model, args, pairs("bert"), tokenizer=tokenizer_of("bert")).train()
    assert model.peft_config[NAME].provenance["correlation"] == {}
    model.save_pretrained(tmp_path / "saved")
    text = (tmp_path / "saved" / "adapter_config.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


@pytest.mark.parametrize("source", ["counterfactual", "difference"])
def test_the_other_sources(source: str, tmp_path: Path):
    trainer = trainer_of(adapted("bert", source=source), "bert", tmp_path)
    trainer.train()
    found = trainer.evaluate()
    assert found["acc"] == 1.0
    assert found["cor"] > 0.9


@pytest.mark.parametrize("activation", ["tanh", "identity"])
def test_trained_estimator_turns_class_0_to_plus_1(activation: str, tmp_path: Path):
    model = adapted("llama")
    options = {"estimator": "trained", "learning_rate": 1e-3, "max_steps": 60, "eval_steps": 20, "seeds": 2}
    trainer = trainer_of(model, "llama", tmp_path, activation=activation, **options)
    output = trainer.train()
    assert output.global_step == 120
    assert math.isfinite(output.training_loss)
    values = trainer.encode()[0].to_pandas().groupby("class")["value"].mean()
    assert values["female"] > values["male"]
    assert trainer.evaluate()["cor"] == pytest.approx(output.metrics["cor_female_male"])


def test_the_trained_neuron_that_is_kept_is_the_best_that_was_evaluated(tmp_path: Path):
    seen: list[float] = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            seen.append(abs(state.log_history[-1]["eval_cor"]))

    options = {"estimator": "trained", "learning_rate": 3e-2, "max_steps": 50, "eval_steps": 10}
    trainer = trainer_of(adapted("bert"), "bert", tmp_path, callbacks=[Watch()], **options)
    trainer.train()
    assert len(seen) == 5
    assert trainer.evaluate()["cor"] == pytest.approx(max(seen))


def without_evaluation_data(folder: Path, callbacks=None, **arguments: Any) -> GradiendTrainer:
    options = {"estimator": "trained", "learning_rate": 1e-2, "max_steps": 40, "eval_steps": 20, "convergence": 0}
    trainer = trainer_of(adapted("llama"), "llama", folder, callbacks, **options, **arguments)
    trainer.eval_dataset = None
    return trainer


@pytest.mark.parametrize(("seed", "is_turned"), [(0, True), (1, False)])
def test_the_correlation_of_the_latest_steps_is_that_of_the_neuron_as_it_is_turned(
    seed: int, is_turned: bool, tmp_path: Path
):
    logged: list[dict[str, float]] = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            logged.append(logs)

    without_evaluation_data(tmp_path, [Watch()], seed=seed, logging_steps=1).train()
    at = next(place for place, figures in enumerate(logged) if "eval_cor" in figures)
    before, after = logged[at]["cor"], logged[at + 1]["cor"]  # of 20 steps, and one step later of 21
    assert (before < 0) == is_turned
    assert after == pytest.approx(abs(before), abs=0.2) and after > 0.2


def test_resumed_training_without_evaluation_data_ends_with_the_same_figures(tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    whole = without_evaluation_data(tmp_path / "whole", **saving).train()
    with pytest.raises(InterruptedError):
        without_evaluation_data(tmp_path / "broken", [Stop(15)], **saving).train()
    again = without_evaluation_data(tmp_path / "broken", **saving).train(resume_from_checkpoint=True)
    assert again == whole


def test_no_convergence_is_warned_of(tmp_path: Path):
    options = {"estimator": "trained", "learning_rate": 0.0, "max_steps": 2, "convergence": 1.0}
    with pytest.warns(UserWarning, match=r"None of 1 starts for female/male converged.*estimator='closed_form'"):
        trainer_of(adapted("bert"), "bert", tmp_path, **options).train()


class Stop(TrainerCallback):
    """Stops the training after some steps, as a kill would, but what is due at that step is still written."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_begin(self, args, state, control, **kwargs):
        self._stop(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._stop(state)

    def _stop(self, state) -> None:
        if state.global_step > self.after:
            raise InterruptedError


@pytest.mark.parametrize(
    "options",
    [{}, {"estimator": "trained", "learning_rate": 1e-2, "max_steps": 12, "eval_steps": 3, "seeds": 2}],
    ids=["closed_form", "trained"],
)
@pytest.mark.parametrize("after", [2, 5])
def test_resumed_training_ends_with_the_same_adapter(options: dict[str, Any], after: int, tmp_path: Path):
    whole, broken = adapted("llama"), adapted("llama")
    saving = {**options, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    trainer_of(whole, "llama", tmp_path / "whole", **saving).train()
    with pytest.raises(InterruptedError):
        trainer_of(broken, "llama", tmp_path / "broken", callbacks=[Stop(after)], **saving).train()
    assert not broken.peft_config[NAME].fitted
    assert len(list((tmp_path / "broken").glob("checkpoint-*"))) <= 2
    again = adapted("llama")
    output = trainer_of(again, "llama", tmp_path / "broken", **saving).train(resume_from_checkpoint=True)
    assert output.global_step == (6 if not options else 24)
    one, other = features_of(whole, NAME)[0].decoder, features_of(again, NAME)[0].decoder
    for name in one.weight:
        assert torch.equal(one.weight[name], other.weight[name]), name
        assert torch.equal(one.bias[name], other.bias[name]), name


def test_a_checkpoint_of_another_training_is_refused(tmp_path: Path):
    saving = {"save_strategy": "steps", "save_steps": 1}
    with pytest.raises(InterruptedError):
        trainer_of(adapted("llama"), "llama", tmp_path, callbacks=[Stop(3)], **saving).train()
    with pytest.raises(ValueError, match="another training"):
        trainer_of(adapted("llama"), "llama", tmp_path, estimator="trained", max_steps=5, **saving).train(True)
    with pytest.raises(ValueError, match="has no checkpoint"):
        trainer_of(adapted("llama"), "llama", tmp_path / "none", **saving).train(True)


def test_select_steers_within_the_budget_and_leaves_the_weights(tmp_path: Path):
    model = adapted("llama", density=0.05)
    before = {key: value.clone() for key, value in model.named_parameters()}
    trainer = trainer_of(model, "llama", tmp_path)
    trainer.train()
    grid = {"feature_factors": (-1.0, 0.0, 1.0), "learning_rates": (1e-3, -1e-3, 1e-1, -1e-1, 1.0)}
    chosen = trainer.select("fpi", budget=0.5, **grid)
    assert all(torch.equal(value, before[key]) for key, value in model.named_parameters())
    assert chosen.best.goals["fpi"] > chosen.base.goals["fpi"]
    assert chosen.best.cost <= 0.5
    config = model.peft_config[NAME]
    assert (config.feature_factor, config.learning_rate) == (chosen.best.feature_factor, chosen.best.learning_rate)
    # The scores with the edit in the weights are those of the steered adapter.
    steered = trainer.scorer().score(("female", "male"), 0, 0, None)
    # float32 sums in another order: W + delta is computed at each forward pass, or only once.
    assert steered.goals["fpi"] == pytest.approx(chosen.best.goals["fpi"], rel=1e-4)
    table = chosen.to_pandas()
    assert len(table) == len(chosen.points) + 1
    assert str(chosen).startswith("fpi: ")


def test_select_says_what_is_missing(tmp_path: Path):
    trainer = trainer_of(adapted("bert"), "bert", tmp_path)
    with pytest.raises(ValueError, match="was never fitted"):
        trainer.select("bpi")
    trainer.train()
    with pytest.raises(ValueError, match="goal='nurse' is not defined"):
        trainer.select("nurse")
    trainer.neutral_dataset = None
    with pytest.raises(ValueError, match="neutral_dataset is missing"):
        trainer.select("bpi")


def three_classes() -> Dataset:
    words = {"royal": "king", "learned": "doctor", "caring": "nurse"}
    texts = ["Tom said that the [FEATURE] was late", "the [FEATURE] ate bread", "a dog ran to the [FEATURE]"]
    rows = [
        {"text": t, "factual": words[a], "counterfactual": words[b], "label": a, "counterfactual_label": b}
        for t in texts
        for a in words
        for b in words
        if a != b
    ]
    return Dataset.from_list(rows)


def test_three_classes_have_three_neurons_and_are_balanced_by_the_formula_of_k(tmp_path: Path):
    model = model_of("llama").eval()
    classes = ["royal", "learned", "caring"]
    model.add_adapter(GradiendConfig(feature="post", classes=classes, density=0.1), adapter_name=NAME)
    arguments = GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, save_strategy="no")
    trainer = GradiendTrainer(
        model, arguments, three_classes(), three_classes(), neutral(), processing_class=tokenizer_of("llama")
    )
    trainer.train()
    assert [tuple(pair) for pair in model.peft_config[NAME].pairs] == trainer.pairs
    assert len(trainer.pairs) == 3
    found = trainer.evaluate()
    assert {f"cor_{a}_{b}" for a, b in trainer.pairs} <= set(found)
    assert found["acc"] == 1.0
    grid = {"feature_factors": (-1.0, 1.0), "learning_rates": (1e-2, 1e-1), "budget": 5.0}
    chosen = trainer.select("caring", **grid)
    assert chosen.best.probabilities["caring"] > chosen.base.probabilities["caring"]
    assert tuple(model.peft_config[NAME].pair) == chosen.best.pair
    assert trainer.select("balance", **grid).best.goals["balance"] >= chosen.base.goals["balance"]


def scored(name: str, classes: list[str], rows: list[tuple[str, ...]], folder: Path):
    """A model's class probabilities for `(text, factual, counterfactual, label, other)` rows, and the trainer."""
    columns = ("text", "factual", "counterfactual", "label", "counterfactual_label")
    data = Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])
    model = model_of(name).eval()
    model.add_adapter(GradiendConfig(feature="post", classes=classes), adapter_name=NAME)
    arguments = GradiendTrainingArguments(output_dir=str(folder), disable_tqdm=True)
    trainer = GradiendTrainer(model, arguments, data, data, neutral(), processing_class=tokenizer_of(name))
    return trainer.scorer().score((classes[0], classes[1]), 0, 0, None), trainer


def alone(trainer: GradiendTrainer, text: str, words: list[str]) -> list[float]:
    """The expected probabilities: a softmax at the slot of one text."""
    tokenizer = trainer.processing_class
    before = tokenizer(text.partition(" [FEATURE]")[0], return_tensors="pt")
    with torch.no_grad():
        p = trainer.model(**before).logits[0, -1].softmax(-1)
    return [float(p[tokenizer(f"a {word}")["input_ids"][-1]]) for word in words]


def test_a_word_of_two_classes_counts_where_its_row_says(tmp_path: Path):
    one, two = "Tom said that the [FEATURE]", "a dog ran to the [FEATURE]"
    rows = [(one, "king", "nurse", "a", "b"), (one, "doctor", "king", "a", "b"), (two, "nurse", "king", "b", "a")]
    with pytest.warns(UserWarning, match="'king' is a word of 'a' and 'b': each text is scored by the words that its"):
        point, trainer = scored("llama", ["a", "b"], rows, tmp_path)
    king, nurse, doctor = alone(trainer, one, ["king", "nurse", "doctor"])
    second = alone(trainer, two, ["king", "nurse"])
    expected = {"a": [king, doctor, second[0]], "b": [nurse, king, second[1]]}
    for name, values in expected.items():
        assert point.probabilities[name] == pytest.approx(sum(values) / 3, rel=1e-5)


def test_a_word_of_two_of_three_classes_needs_the_words_of_all_in_a_text(tmp_path: Path):
    one, two = "Tom said that the [FEATURE]", "a dog ran to the [FEATURE]"
    rows = [(one, "king", "nurse", "a", "b"), (one, "king", "doctor", "a", "c"),
            (two, "doctor", "king", "b", "a"), (two, "doctor", "nurse", "b", "c")]  # fmt: skip
    with pytest.warns(UserWarning, match="is a word of"):
        point, trainer = scored("llama", ["a", "b", "c"], rows, tmp_path)
    king, nurse, doctor = alone(trainer, one, ["king", "nurse", "doctor"])
    second = alone(trainer, two, ["king", "doctor", "nurse"])
    for name, values in {"a": [king, second[0]], "b": [nurse, second[1]], "c": [doctor, second[2]]}.items():
        assert point.probabilities[name] == pytest.approx(sum(values) / 2, rel=1e-5)
    with pytest.warns(UserWarning, match="is a word of"), pytest.raises(ValueError, match="text 1 give no word of 'c'"):
        scored("llama", ["a", "b", "c"], [*rows[:3], (one, "nurse", "doctor", "c", "b")], tmp_path)
    twice = [(one, "king", "nurse", "a", "b"), (one, "king", "nurse", "a", "c"), (two, "doctor", "king", "b", "a")]
    with pytest.warns(UserWarning), pytest.raises(ValueError, match="text 0 give two classes the same word"):
        scored("llama", ["a", "b", "c"], twice, tmp_path)


def test_one_word_in_two_spellings_counts_once():
    uncased = copy.deepcopy(tokenizer_of("bert"))
    uncased.backend_tokenizer.normalizer = normalizers.Lowercase()
    row = {"text": "Tom said [FEATURE] was late", "factual": "he", "counterfactual": "she", "label": CLASSES[0]}
    spelled = {"factual": "SHE", "counterfactual": "He", "label": CLASSES[1]}
    once = Dataset.from_list([row, {**row, "factual": "she", "counterfactual": "he", "label": CLASSES[1]}])
    twice = Dataset.from_list([row, {**row, **spelled}])
    found = []
    for data in (once, twice):
        read, reader = PairSet(data, uncased, "masked", CLASSES), SlotReader(model_of("bert").eval())
        words = dict(zip(CLASSES, map(list, read.words), strict=True))
        found.append(class_probabilities(reader, words, read, uncased, 4)())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_word_that_goes_on_from_another_one_counts_once(name: str):
    # A model that reads from left to right gives "king" all texts that go on with "s", and a masked one does not.
    text, tokenizer = "Tom said that the [FEATURE] was late", tokenizer_of(name)
    rows = [(text, *turn) for turn in (("king", "she", *CLASSES), ("she", "king", *CLASSES[::-1]))]
    columns = ("text", "factual", "counterfactual", "label", "counter_label")
    data = Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])
    reader, found = SlotReader(model_of(name).eval()), []
    read = PairSet(data, tokenizer, task_name(name), CLASSES, reader.model.config)
    for first in (["king"], ["king", "kings"], ["kings"]):
        words = {CLASSES[0]: first, CLASSES[1]: ["she"]}
        found.append(class_probabilities(reader, words, read, tokenizer, 4)())
    both = found[0] + found[2] if name == "bert" else found[0]
    assert torch.equal(found[1][:, 0], both[:, 0]) and torch.equal(found[1][:, 1], found[0][:, 1])
    assert (found[2][:, 0] > 0).all()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_word_that_goes_on_from_one_of_another_class_counts_for_its_own_class_alone(name: str):
    text, tokenizer = "Tom said that the [FEATURE] was late", tokenizer_of(name)
    rows = [(text, *turn) for turn in (("king", "she", *CLASSES), ("she", "king", *CLASSES[::-1]))]
    columns = ("text", "factual", "counterfactual", "label", "counter_label")
    data = Dataset.from_list([dict(zip(columns, row, strict=True)) for row in rows])
    reader, found = SlotReader(model_of(name).eval()), {}
    read = PairSet(data, tokenizer, task_name(name), CLASSES, reader.model.config)
    tables = (("king", ["she"]), ("kings", ["she"]), ("kingss", ["she"]), ("king kingss", ["kings"]))
    for first, second in tables:
        words = dict(zip(CLASSES, (first.split(), second), strict=True))
        found[first] = class_probabilities(reader, words, read, tokenizer, 4)()
    king, kings, kingss = (found[word][:, 0] for word in ("king", "kings", "kingss"))
    one, other = found["king kingss"].T
    torch.testing.assert_close(one, king - kings + kingss, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(other, kings - kingss, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(("name", "text"), [("roberta", "[FEATURE] was late"), ("gpt2", "Tom said,[FEATURE]")])
def test_a_word_is_scored_as_it_is_spelled_in_its_slot(name: str, text: str, tmp_path: Path):
    # Where no space is before a word, byte-level tokens are other ones: here the letters of both words.
    texts = text, "a dog and " + text.replace(",", " that ")
    turns = (("he", "to", "a", "b"), ("to", "he", "b", "a"))
    _, trainer = scored(name, ["a", "b"], [(own, *turn) for own in texts for turn in turns], tmp_path)
    tokenizer, mask = trainer.processing_class, trainer.processing_class.mask_token_id
    found = trainer.scorer().class_probabilities()
    for row, count in enumerate((2, 1)):
        for column, word in enumerate(("he", "to")):
            ids, other = (tokenizer(texts[row].replace("[FEATURE]", w))["input_ids"] for w in (word, ".."))
            start = next(place for place, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b)
            given, places = torch.tensor(ids), torch.arange(start, start + count)
            masked = given if mask is None else given.index_fill(0, places, mask)
            with torch.no_grad():
                p = trainer.model(masked[None]).logits[0].softmax(-1)
            expected = p[places - int(mask is None), given[places]].prod()
            assert float(found[row, column]) == pytest.approx(float(expected), rel=1e-4)


def test_a_set_that_a_call_is_given_is_scored_by_its_own_words_too(tmp_path: Path):
    text = "Tom said that the [FEATURE]"
    _, trainer = scored(
        "llama", ["a", "b"], [(text, "king", "nurse", "a", "b"), (text, "nurse", "king", "b", "a")], tmp_path
    )
    rows = [("he", "she", "a"), ("she", "he", "b")]
    columns = ("factual", "counterfactual", "label")
    other = Dataset.from_list([{"text": text} | dict(zip(columns, row, strict=True)) for row in rows])
    king, nurse, he, she = alone(trainer, text, ["king", "nurse", "he", "she"])
    (found,) = trainer.scorer(other).class_probabilities().tolist()
    assert found == pytest.approx([king + he, nurse + she], rel=1e-5)


# ---- the adapter -----------------------------------------------------------------------------------------------------


# Whether a feature is sparse does not depend on the task, so each density is tried with two of the tasks.
@pytest.mark.parametrize(("name", "density"), [*zip(EVERY_TASK, [1.0, 0.05, 1.0, 0.05], strict=True)])
def test_a_loaded_adapter_encodes_as_the_one_that_was_saved(name: str, density: float, tmp_path: Path):
    model = adapted(name, density=density, keep_encoder=True)
    trainer = trainer_of(model, name, tmp_path / "training")
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    (batch,) = (b for b in _batches(name, 3) if b.label == 0)
    values = GradiendAdapter.of(model, NAME).encode(batch)
    assert values.shape == (3,)
    # Class 0 is at +1. A sparse encoder is scaled to read as the dense one: its mean is then within 0.06 of the dense
    # one's, and without the scaling 0.05 to 0.2 below it.
    with reading_the_base(model, NAME) as reader:
        encode = trainer.fitted[0].feature.encoder.encode
        rows = [batch.some_rows([row]) for row in range(len(batch))]
        dense = [encode(reader.gradients(row, wanted=("factual",))["factual"]) for row in rows]
    assert min(dense) > 0.3
    assert float(values.mean()) == pytest.approx(sum(dense) / 3, abs=0 if density == 1.0 else 0.06, rel=1e-5)

    fresh = model_of(name).eval()
    fresh.load_adapter(str(tmp_path / "adapter"), adapter_name="downloaded")
    adapter = GradiendAdapter.of(fresh, "downloaded")
    assert torch.equal(adapter.encode(batch), values)
    adapter.steer(feature_factor=-1.0, learning_rate=1e-2)
    assert torch.equal(adapter.encode(batch), values)  # of the base model, however it is steered
    assert fresh.peft_config["downloaded"].learning_rate == 1e-2


@pytest.mark.parametrize("name", EVERY_TASK)
def test_a_batch_with_labels_encodes_as_the_pairs_do(name: str, tmp_path: Path):
    model = adapted(name, keep_encoder=True)
    trainer_of(model, name, tmp_path).train()
    adapter = GradiendAdapter.of(model, NAME)
    for batch in _batches(name, 3):
        plain = _with_labels(batch, name)
        # The graph is the same, the padding differs: float32 rounding.
        assert adapter.encode(plain).tolist() == pytest.approx(adapter.encode(batch).tolist(), abs=1e-4)
        at_the_left = {key: _padded_at_the_left(value, plain) for key, value in plain.items()}
        assert adapter.encode(at_the_left).tolist() == adapter.encode(plain).tolist()


def _padded_at_the_left(value: torch.Tensor, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    mask = batch["attention_mask"]
    if value.shape != mask.shape or ("decoder_input_ids" in batch and value is batch["labels"]):
        return value
    counts = mask.sum(1).tolist()
    return torch.stack([row.roll(len(row) - count) for row, count in zip(value, counts, strict=True)])


def _with_labels(batch: PairBatch, name: str) -> dict[str, torch.Tensor]:
    task = task_name(name)
    inputs = dict(batch.inputs)
    if task == "classification":
        return {**inputs, "labels": batch.factual}
    if task == "causal":  # The word itself is in the input, as in running text.
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        ids, mask = torch.nn.functional.pad(ids, (0, 1)), torch.nn.functional.pad(mask, (0, 1))
        labels = torch.full_like(ids, -100)
        for row, position, token in zip(batch.rows, batch.positions, batch.factual, strict=True):
            ids[row, position + 1] = labels[row, position + 1] = token
            mask[row, position + 1] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    labels = torch.full_like(inputs["decoder_input_ids" if task == "seq2seq" else "input_ids"], -100)
    labels[batch.rows, batch.positions] = batch.factual
    return {**inputs, "labels": labels}


def _batches(name: str, size: int) -> list[PairBatch]:
    config = model_of(name).config
    return PairSet(_other_texts(name), tokenizer_of(name), task_name(name), CLASSES, config).batches(size)


def test_an_adapter_without_encoder_says_how_to_get_one(tmp_path: Path):
    model = adapted("bert")
    trainer = trainer_of(model, "bert", tmp_path)
    adapter = GradiendAdapter.of(model, NAME)
    with pytest.raises(ValueError, match="was never fitted"):
        adapter.encode(_batches("bert", 1)[0])
    trainer.train()
    with pytest.raises(ValueError, match=r"keep_encoder=True"):
        adapter.encode(_batches("bert", 1)[0])


def test_encode_refuses_what_does_not_say_enough(tmp_path: Path):
    model = adapted("bert", keep_encoder=True, source="difference")
    trainer_of(model, "bert", tmp_path).train()
    adapter = GradiendAdapter.of(model, NAME)
    with pytest.raises(ValueError, match="reads the 'difference' gradient"):
        adapter.encode(_with_labels(_batches("bert", 1)[0], "bert"))
    with pytest.raises(ValueError, match="was not fitted; there is"):
        adapter.encode(_batches("bert", 1)[0], pair=("male", "nurse"))
    with pytest.raises(ValueError, match="is not a GRADIEND adapter of this model"):
        GradiendAdapter.of(model, "other")


def test_importance_adds_up(tmp_path: Path):
    model = adapted("bert", density=0.05)
    trainer_of(model, "bert", tmp_path).train()
    adapter = GradiendAdapter.of(model, NAME)
    table = adapter.importance()
    assert table["share"].sum() == pytest.approx(1.0)
    assert table["share"].is_monotonic_decreasing
    total = sum(p.numel() for n, p in model.named_parameters() if n in set(table["parameter"]))
    assert table["kept"].sum() == math.ceil(0.05 * total)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_the_adapter_must_be_there_and_be_the_only_one_or_named(tmp_path: Path):
    arguments = GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True)
    with pytest.raises(ValueError, match=r"has no GRADIEND adapter.*add_adapter"):
        GradiendTrainer(model_of("bert"), arguments, pairs("bert"), tokenizer=tokenizer_of("bert"))
    model = adapted("bert")
    model.add_adapter(GradiendConfig(feature="other"), adapter_name="other")
    with pytest.raises(ValueError, match=r"several GRADIEND adapters.*adapter_name="):
        GradiendTrainer(model, arguments, pairs("bert"), tokenizer=tokenizer_of("bert"))
    with pytest.raises(ValueError, match="two names of one argument"):
        GradiendTrainer(
            model, arguments, pairs("bert"), tokenizer=1, processing_class=tokenizer_of("bert"), adapter_name=NAME
        )


def test_classes_are_read_off_the_data_where_the_config_has_none(tmp_path: Path):
    model = model_of("bert").eval()
    model.add_adapter(GradiendConfig(feature="gender"), adapter_name=NAME)
    trainer = trainer_of(model, "bert", tmp_path)
    assert trainer.classes == ["female", "male"]
    assert model.peft_config[NAME].classes == ["female", "male"]


def test_a_merged_adapter_is_not_trained_on(tmp_path: Path):
    import peft

    model = peft.get_peft_model(model_of("bert").eval(), GradiendConfig(feature="gender", classes=CLASSES))
    trainer = trainer_of(model, "bert", tmp_path)
    trainer.train()
    GradiendAdapter.of(model, "default").steer(1.0, 1e-2)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"is merged into the weights"):
        trainer.train()
    model.unmerge_adapter()
    trainer.train()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("estimator", "newton", "estimator='newton' is not known"),
        ("activation", "relu", "activation='relu' is not known"),
        ("seeds", 0, "at least one start"),
        ("convergence", 2.0, "is a correlation"),
    ],
)
def test_arguments_are_checked(field: str, value: Any, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        GradiendTrainingArguments(output_dir=str(tmp_path), **{field: value})


def test_non_finite_weights_are_refused_and_nothing_is_left_behind(tmp_path: Path):
    model = adapted("bert")
    trainer = trainer_of(model, "bert", tmp_path)
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="loss is nan"):
        trainer.train()
    assert not model.peft_config[NAME].fitted
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_size_is_said_before_fitting(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = adapted("llama", density=0.1)
    with caplog.at_level("INFO", logger="hf_erasure"):
        trainer_of(model, "llama", tmp_path).train()
    (said,) = [record.getMessage() for record in caplog.records if "MiB" in record.getMessage()]
    n = sum(p.numel() for p in targeted_parameters(model, NAME).values())
    # Wd, bd and positions of a tenth of the weights take four bytes each.
    assert f"10.00% of {n:,} weights" in said
    assert f"{12 * math.ceil(n / 10) / 2**20:.2f} MiB, 0.30 times" in said
    # A weight of which at least half is kept has no positions; it is stored whole.
    held = sum(value.nbytes for key, value in model.get_adapter_state_dict(NAME).items())
    assert GradiendAdapter.of(model, NAME).nbytes == held != 12 * math.ceil(n / 10)


def test_an_edit_that_vanishes_in_bfloat16_is_said_so(tmp_path: Path):
    model = adapted("llama").to(torch.bfloat16)
    trainer = trainer_of(model, "llama", tmp_path)
    trainer.train()
    kept = {}
    for rate in (1e-6, 1.0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = trainer.select("female", budget=100.0, feature_factors=(1.0, -1.0), learning_rates=(rate, -rate))
        kept[rate] = model.peft_config[NAME].provenance["selection"]["kept_share"]
        assert any("of the chosen edit is left" in str(w.message) for w in caught) == (kept[rate] < 0.9)
        assert chosen.base.lms > 0
    assert kept[1.0] > 0.9


@pytest.mark.parametrize("size", [1, 3])
def test_values_are_on_one_scale_whatever_the_size_of_a_batch(size: int, tmp_path: Path):
    trainer = trainer_of(adapted("llama"), "llama", tmp_path, per_device_train_batch_size=size)
    trainer.train()
    found = trainer.encode(pairs("llama"))[0].to_pandas()
    preactivations = found["value"].map(math.atanh).groupby(found["class"]).mean()
    # Fitted on batches of three without centring on single texts, the first value would be 0.66.
    assert math.tanh(preactivations["female"]) == pytest.approx(0.9, abs=1e-3)
    assert math.tanh(preactivations["male"]) == pytest.approx(-0.9, abs=1e-3)


# ---- checkpoints are whole, and of one training ----------------------------------------------------------------------

TRAINED: dict[str, Any] = {
    "estimator": "trained", "learning_rate": 1e-2, "max_steps": 8, "eval_steps": 2, "save_strategy": "steps",
    "save_steps": 4,
}  # fmt: skip


def decoder_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return features_of(model, NAME)[0].decoder.weight


def test_what_another_run_left_in_the_folder_is_not_taken_for_this_one(tmp_path: Path):
    first = adapted("llama")
    trainer_of(first, "llama", tmp_path / "out", **TRAINED).train()
    # Another run in the same folder is killed after it saved a feature and before it wrote a checkpoint.
    other = {**TRAINED, "learning_rate": 5e-2, "save_steps": 100, "eval_steps": 1}
    with pytest.raises(InterruptedError):
        trainer_of(adapted("llama"), "llama", tmp_path / "out", callbacks=[Stop(2)], **other).train()
    again = adapted("llama")
    trainer_of(again, "llama", tmp_path / "out", **TRAINED).train(resume_from_checkpoint=True)
    for name, value in decoder_of(first).items():
        assert torch.equal(decoder_of(again)[name], value), name


class Ends(TrainerCallback):
    """Asks for the end of training after some steps of each start, and keeps the events that it sees."""

    def __init__(self, after: float) -> None:
        self.after, self.seen = after, dict[str, list[tuple[int, float]]]()

    def on_step_end(self, args, state, control, **kwargs):
        self._keep("step", state)
        control.should_training_stop = len(self.seen["step"]) % self.after == 0

    def on_epoch_end(self, args, state, control, **kwargs):
        self._keep("epoch", state)

    def on_evaluate(self, args, state, control, **kwargs):
        self._keep("evaluate", state)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self._keep("log", state)

    def on_save(self, args, state, control, **kwargs):
        self._keep("save", state)

    def _keep(self, event: str, state: Any) -> None:
        self.seen.setdefault(event, []).append((state.global_step, state.epoch))


def test_what_is_due_after_every_epoch_is_done_then(tmp_path: Path):
    due = {f"{what}_strategy": "epoch" for what in ("eval", "logging", "save")}
    ends = Ends(math.inf)
    # Six rows, in batches of one.
    trainer_of(adapted("llama"), "llama", tmp_path, [ends], estimator="trained", num_train_epochs=2, **due).train()
    assert len(ends.seen.pop("step")) == 12
    assert ends.seen.pop("save") == [(6, 1.0)]  # the second is the end
    assert ends.seen == {event: [(6, 1.0), (12, 2.0)] for event in ("epoch", "evaluate", "log")}


def test_a_start_ends_early_when_its_correlation_does_not_rise(tmp_path: Path):
    """`EarlyStoppingCallback` asks for the end at an evaluation, and compares with the best one of the same start."""
    ends, stop = Ends(math.inf), EarlyStoppingCallback(early_stopping_patience=2)
    options = {"estimator": "trained", "seeds": 2, "max_steps": 20, "eval_strategy": "steps", "eval_steps": 1}
    frozen = {"learning_rate": 0.0, "metric_for_best_model": "eval_cor", "load_best_model_at_end": False}
    trainer_of(adapted("llama"), "llama", tmp_path, [ends, stop], **options, **frozen).train()
    # Nothing is learned: the first evaluation of a start is its best, or the second where the first turns its sign.
    # Two more do not exceed it.
    epochs = [epoch for _, epoch in ends.seen["evaluate"]]
    assert epochs.count(epochs[0]) == 2 and len(epochs) in (6, 7, 8)


def test_a_callback_ends_a_start_and_the_next_one_begins(tmp_path: Path):
    ends = Ends(3)
    options = {"estimator": "trained", "seeds": 2, "max_steps": 8, "eval_strategy": "no", "learning_rate": 1e-2}
    trainer = trainer_of(adapted("llama"), "llama", tmp_path, [ends], **options)
    assert trainer.train().global_step == 6
    assert [step for step, _ in ends.seen["evaluate"]] == [3, 6]
    assert trainer.config.fitted and len(trainer.starts) == 2


def test_no_steps_a_pair_in_another_order_and_pairs_without_evaluation_rows_are_refused(tmp_path: Path):
    with pytest.raises(ValueError, match=r"num_train_epochs=0: give a number above 0, or max_steps"):
        GradiendTrainingArguments(output_dir=str(tmp_path), num_train_epochs=0)
    with pytest.raises(ValueError, match=r"pair=\['male', 'female'\] .* write one of \['female', 'male'\]"):
        trainer_of(adapted("llama", pair=["male", "female"]), "llama", tmp_path)
    classes, rows, ends = ["royal", "learned", "caring"], three_classes(), Ends(math.inf)
    model = model_of("llama").eval()
    model.add_adapter(GradiendConfig(feature="post", classes=classes), adapter_name=NAME)
    few = rows.filter(lambda row: {row["label"], row["counterfactual_label"]} != {"learned", "caring"})
    args = GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, save_strategy="no")
    trainer = GradiendTrainer(model, args, rows, few, tokenizer=tokenizer_of("llama"), callbacks=[ends])
    with pytest.raises(ValueError, match="no row has the label 'learned'"):
        trainer.train()
    assert not ends.seen


def test_a_checkpoint_of_more_processes_is_refused(tmp_path: Path):
    """Each of their steps has taken several batches, and this process would take some of these again."""
    with pytest.raises(InterruptedError):
        options = {"save_strategy": "steps", "save_steps": 1}
        trainer_of(adapted("llama"), "llama", tmp_path, callbacks=[Stop(2)], **options).train()
    trainer = trainer_of(adapted("llama"), "llama", tmp_path, **options)
    trainer._processes.count = 2
    with pytest.raises(ValueError, match="its number of processes is 1, here it is 2"):
        trainer.train(resume_from_checkpoint=True)


def test_a_checkpoint_can_be_moved(tmp_path: Path):
    whole = adapted("llama")
    trainer_of(whole, "llama", tmp_path / "out", **TRAINED).train()
    shutil.copytree(tmp_path / "out" / "checkpoint-4", tmp_path / "moved" / "checkpoint-4")
    again = adapted("llama")
    trainer_of(again, "llama", tmp_path / "moved", **TRAINED).train(resume_from_checkpoint=True)
    for name, value in decoder_of(whole).items():
        assert torch.equal(decoder_of(again)[name], value), name


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"learning_rate": 1e-1}, "learning_rate"), ({"seed": 11}, "seed"), ({"max_steps": 6}, "max_steps"),
     ({"activation": "identity"}, "activation"), ({"per_device_train_batch_size": 3}, "batch_size"),
     ({"train_dataset": None}, "train_dataset")],
)  # fmt: skip
def test_resuming_with_other_settings_names_the_one_that_differs(changed: dict[str, Any], named: str, tmp_path: Path):
    with pytest.raises(InterruptedError):
        trainer_of(adapted("llama"), "llama", tmp_path, callbacks=[Stop(5)], **TRAINED).train()
    other_data = "train_dataset" in changed
    trainer = trainer_of(adapted("llama"), "llama", tmp_path, **{**TRAINED, **({} if other_data else changed)})
    if other_data:
        trainer.train_dataset = _other_texts("llama")
    with pytest.raises(ValueError, match=f"is of another training: its .*{named}"):
        trainer.train(resume_from_checkpoint=True)
    assert not trainer.config.fitted


def test_resuming_with_other_counterfactual_classes_is_refused(tmp_path: Path):
    """The batches of a pair of three classes are those of other rows then, while all words and labels are the same."""
    classes, rows = ["royal", "learned", "caring"], three_classes()
    others = [next(c for c in classes if c not in (row["label"], row["counterfactual_label"])) for row in rows]
    args = GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True, save_strategy="steps", save_steps=1)

    def trainer(data: Dataset, *callbacks: TrainerCallback) -> GradiendTrainer:
        model = model_of("llama").eval()
        model.add_adapter(GradiendConfig(feature="post", classes=classes), adapter_name=NAME)
        return GradiendTrainer(model, args, data, tokenizer=tokenizer_of("llama"), callbacks=list(callbacks))

    with pytest.raises(InterruptedError):
        trainer(rows, Stop(1)).train()
    changed = rows.remove_columns("counterfactual_label").add_column("counterfactual_label", others)
    with pytest.raises(ValueError, match="is of another training: its train_dataset"):
        trainer(changed).train(resume_from_checkpoint=True)
    trainer(rows).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("estimator", ["closed_form", "trained"])
def test_resuming_with_another_model_of_the_same_shapes_is_refused(estimator: str, tmp_path: Path):
    """What was learned from the gradients of the first model would become a feature of the second model."""
    options = {**TRAINED, "estimator": estimator}
    with pytest.raises(InterruptedError):
        trainer_of(adapted("llama"), "llama", tmp_path, callbacks=[Stop(5)], **options).train()
    other = adapted("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(2)
    with pytest.raises(ValueError, match="is of another training: its values of the targeted weights"):
        trainer_of(other, "llama", tmp_path, **options).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("damage", ["truncated", "missing", "feature"])
def test_a_damaged_checkpoint_is_named(damage: str, tmp_path: Path):
    with pytest.raises(InterruptedError):
        trainer_of(adapted("llama"), "llama", tmp_path, callbacks=[Stop(5)], **TRAINED).train()
    state = tmp_path / "checkpoint-4" / "gradiend_state.safetensors"
    if damage == "feature":
        (state,) = (tmp_path / "checkpoint-4" / "features").iterdir()
    if damage != "missing":
        state.write_bytes(state.read_bytes()[:100])
    else:
        (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(
        ValueError, match=r"checkpoint-4' is not a whole checkpoint of a GradiendTrainer \(.+\): resume"
    ):
        trainer_of(adapted("llama"), "llama", tmp_path, **TRAINED).train(resume_from_checkpoint=True)


# ---- what a stranger might do ----------------------------------------------------------------------------------------


def test_an_adapter_that_is_trained_again_waits_to_be_steered(tmp_path: Path):
    model = adapted("llama")
    unadapted = logits_of(model, "llama")
    trainer = trainer_of(model, "llama", tmp_path)
    trainer.train()
    GradiendAdapter.of(model, NAME).steer(1.0, -0.01)
    assert not torch.equal(logits_of(model, "llama"), unadapted)
    config = model.peft_config[NAME]
    known = {"selection", "card", "recipe"}
    config.provenance |= {key: {"goal": "female"} for key in known}
    trainer.train()
    assert not known & config.provenance.keys(), "these were said of the feature of before"
    assert config.learning_rate == 0.0
    assert torch.equal(logits_of(model, "llama"), unadapted)


def test_evaluate_measures_the_neuron_that_is_kept(tmp_path: Path):
    model = adapted("llama", density=1e-2, keep_encoder=True)
    trainer = trainer_of(model, "llama", tmp_path)
    trainer.train()
    found = trainer.evaluate()
    trainer.save_model(str(tmp_path / "adapter"))
    fresh = model_of("llama").eval()
    fresh.load_adapter(str(tmp_path / "adapter"), adapter_name=NAME)
    assert trainer_of(fresh, "llama", tmp_path).evaluate() == found


@pytest.mark.parametrize("strength", [(1.0, 1e39), (1e30, 1e30), (float("nan"), 0.1)])
def test_steering_beyond_float32_changes_nothing(strength: tuple[float, float], tmp_path: Path):
    model = adapted("llama")
    trainer_of(model, "llama", tmp_path).train()
    adapter = GradiendAdapter.of(model, NAME)
    adapter.steer(1.0, 0.01)
    before = logits_of(model, "llama")
    with pytest.raises(ValueError, match="what float32 can hold"):
        adapter.steer(*strength)
    assert (adapter.config.feature_factor, adapter.config.learning_rate) == (1.0, 0.01)
    assert torch.equal(logits_of(model, "llama"), before)


def test_labels_may_be_class_ids_with_names(tmp_path: Path):
    named = pairs("llama").cast_column("label", ClassLabel(names=["male", "female"]))
    model = model_of("llama").eval()
    model.add_adapter(GradiendConfig(feature="gender"), adapter_name=NAME)
    arguments = GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True)
    trainer = GradiendTrainer(model, arguments, named, tokenizer=tokenizer_of("llama"))
    assert trainer.classes == ["male", "female"]
    trainer.train()
    assert model.peft_config[NAME].pairs == [["male", "female"]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rates": []}, "learning_rates=.*finite numbers"),
        ({"learning_rates": [math.nan]}, "learning_rates=.*finite numbers"),
        ({"learning_rates": 0.1}, "learning_rates=0.1: give a list"),
        ({"learning_rates": [0.0]}, "zeros only"),
        ({"feature_factors": []}, "feature_factors"),
        ({"budget": math.nan}, "budget=nan"),
        ({"budget": math.inf}, "budget=inf"),
        ({"feature_factors": ["1.0"]}, "feature_factors=.*finite numbers"),
        ({"budget": -1.0}, "budget=-1.0"),
        ({"budget": "0.02"}, "budget='0.02'"),
    ],
)
def test_a_grid_that_means_nothing_is_refused(options: dict[str, Any], message: str, tmp_path: Path):
    model = adapted("llama")
    trainer = trainer_of(model, "llama", tmp_path)
    trainer.train()
    with pytest.raises(ValueError, match=message):
        trainer.select("female", **options)


def test_a_budget_that_is_written_in_percent_is_said_so(tmp_path: Path):
    trainer = trainer_of(adapted("llama"), "llama", tmp_path)
    trainer.train()
    with pytest.warns(UserWarning, match=r"budget=5 is a share: it lets .* worse by 500%. For 5 % write 0.05"):
        trainer.select("female", budget=5, feature_factors=[1.0], learning_rates=[0.01])


def test_data_of_other_types_and_a_missing_tokenizer_are_named(tmp_path: Path):
    model, rows = adapted("llama"), pairs("llama").to_list()
    arguments = GradiendTrainingArguments(output_dir=str(tmp_path), disable_tqdm=True)
    with pytest.raises(TypeError, match=r"train_dataset is a list.*Dataset.from_list"):
        GradiendTrainer(model, arguments, rows, tokenizer=tokenizer_of("llama"))
    with pytest.raises(TypeError, match=r"neutral_dataset is a list"):
        GradiendTrainer(model, arguments, neutral_dataset=["a"], tokenizer=tokenizer_of("llama"))
    with pytest.raises(ValueError, match="needs the model's tokenizer"):
        GradiendTrainer(model, arguments, pairs("llama"))
    with pytest.raises(ValueError, match="'nope' is not a GRADIEND adapter"):
        GradiendTrainer(model, arguments, pairs("llama"), tokenizer=tokenizer_of("llama"), adapter_name="nope")


def test_several_sets_are_refused_where_one_is_read(tmp_path: Path):
    trainer = trainer_of(adapted("llama"), "llama", tmp_path)
    trainer.train()
    several = {"a": pairs("llama"), "b": pairs("llama")}
    for call in (trainer.encode, trainer.scorer):
        with pytest.raises(TypeError, match="data set of pairs is a dict"):
            call(several, neutral_dataset=neutral())


def test_figures_on_the_pairs_that_were_learned_from_are_called_that(tmp_path: Path):
    trainer = trainer_of(adapted("bert"), "bert", tmp_path)
    trainer.train()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fitted rows")
        trainer.evaluate()
    learned = trainer.train_dataset
    with pytest.warns(UserWarning, match=rf"{len(learned)} of the {len(learned)} pairs .* on fitted rows"):
        trainer.evaluate(learned.select(reversed(range(len(learned)))))
    with pytest.warns(UserWarning, match="on fitted rows"):
        trainer.select("fpi", budget=0.5, eval_dataset=learned, feature_factors=[1.0], learning_rates=[0.01])
    assert trainer.config.provenance["selection"]["measured_on"] == f"fitted rows (all of {len(learned)})"


def test_a_causal_model_has_learned_from_a_pair_with_the_same_beginning(tmp_path: Path):
    trainer = trainer_of(adapted("llama"), "llama", tmp_path)
    trainer.train()
    longer = trainer.train_dataset.map(lambda row: {"text": row["text"].partition(" ate")[0] + " and ran home"})
    with pytest.warns(UserWarning, match="6 of the 6 pairs measured on are pairs of train_dataset"):
        trainer.evaluate(longer)
