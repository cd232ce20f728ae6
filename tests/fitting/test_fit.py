"""Fitting an adapter in one pass: what it guarantees, which rows count, and what it refuses."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2Model,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from hf_erasure import ConceptErasureConfig, ErasureReport, concept_dataloader, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers
from hf_erasure.erasers import ConceptMoments
from hf_erasure.erasers.statistics import PackedGram
from hf_erasure.recipes.erasure import pooled_states
from tests.small_models import LABELS, VOCABULARY, inputs_of, outputs_of, same, small_batch, small_batches, small_model


def with_adapter(name: str = "bert", **config: Any) -> PreTrainedModel:
    model = copy.deepcopy(small_model(name))
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS, **config), adapter_name="no_gender")
    return model


def fit(model: PreTrainedModel, batches: Any, **options: Any) -> ErasureReport:
    return fit_concept_erasure(model, batches, "no_gender", sequential=False, progress=False, **options)


def erasers(model: PreTrainedModel) -> dict[str, tuple[Tensor, ...]]:
    layers = erasure_layers(model, "no_gender")
    return {site: tuple(part.clone() for part in layer.eraser_state("no_gender")) for site, layer in layers.items()}


def erased_rows(model: PreTrainedModel, site: str, batches: list[dict[str, Tensor]]) -> tuple[Tensor, Tensor]:
    """Activations at the real positions of a site with the adapter on, and their labels."""
    rows, labels = [], []

    def keep(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        rows.append(output)

    handle = model.get_submodule(site).register_forward_hook(keep)
    with torch.no_grad():
        for batch in batches:
            model(**inputs_of(batch))
            labels.append(batch["concept_labels"][:, None].expand_as(batch["attention_mask"]))
    handle.remove()
    real = torch.cat([batch["attention_mask"] for batch in batches]).bool()
    return torch.cat(rows)[real].double(), torch.cat(labels)[real]


FIRST = "encoder.layer.0.attention.output.LayerNorm"


def test_no_logistic_probe_beats_the_best_constant_at_a_fitted_site() -> None:
    model, batches = with_adapter(), small_batches("bert", 6)
    fit(model, batches)
    x, z = erased_rows(model, FIRST, batches)
    x = (x - x.mean(0)) / x.std(0)
    share = z.double().mean()
    constant = -(share * share.log() + (1 - share) * (1 - share).log())
    probe = LogisticRegression(C=float("inf"), tol=1e-10, max_iter=1000).fit(x.numpy(), z.numpy())
    chance = torch.from_numpy(probe.predict_proba(x.numpy()))
    loss = -chance[torch.arange(len(z)), z].log().mean()
    # The erasers are float32 and leave correlations of about 1e-6. A probe gains about their square over the smallest
    # eigenvalue of the correlations (about 1e-3 here).
    assert float(constant - loss) <= 1e-6


def test_every_site_is_fitted_and_the_report_has_a_line_for_each() -> None:
    model = with_adapter()
    report = fit(model, small_batches("bert"), eval_batches=small_batches("bert", seed=500))
    assert [line.site for line in report.sites] == [*erasure_layers(model), "last_hidden_state"]
    assert all(line.rank == 1 for line in report.sites[:-1])
    assert verify_adapter(model, "no_gender")


def test_padding_does_not_count() -> None:
    batches = small_batches("bert")
    fitted = []
    for garbage in (0, 33):
        model = with_adapter()
        padded = [{**b, "input_ids": b["input_ids"] + garbage * (1 - b["attention_mask"])} for b in batches]
        fit(model, padded)
        fitted.append(erasers(model))
    for left, right in zip(fitted[0].values(), fitted[1].values(), strict=True):
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other)


def test_a_batch_without_a_mask_and_with_a_list_of_labels_counts_all_its_tokens() -> None:
    plain = [{**one, "attention_mask": torch.ones_like(one["input_ids"])} for one in small_batches("bert")]
    bare = [{**one, "attention_mask": None, "concept_labels": one["concept_labels"].tolist()} for one in plain]
    model, other = with_adapter(), with_adapter()
    assert fit(model, plain).sites[0].rows == fit(other, bare).sites[0].rows
    assert same(outputs_of(model, plain[0]), outputs_of(other, plain[0]))


def test_rows_labelled_ignore_do_not_count() -> None:
    batches = small_batches("bert")
    silent = [
        {**b, "concept_labels": torch.full_like(b["concept_labels"], -100)} for b in small_batches("bert", seed=7)
    ]
    alone, beside = with_adapter(), with_adapter()
    fit(alone, batches)
    report = fit(beside, [*batches, *silent])
    assert report[FIRST].rows == sum(int(b["attention_mask"].sum()) for b in batches)
    for left, right in zip(erasers(alone).values(), erasers(beside).values(), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_pool_mean_guards_the_mean_pooled_embedding_and_tokens_do_not() -> None:
    gaps = {}
    batches = small_batches("bert", 8)
    z = torch.cat([b["concept_labels"] for b in batches])
    for pool in ("mean", "tokens"):
        model = with_adapter(target_modules=[FIRST])
        fit(model, batches, pool=pool)
        states = pooled_states(model, batches, "no_gender", erased=True, progress=False)[FIRST].double()
        states = (states - states.mean(0)) / states.std(0)
        gaps[pool] = float((states[z == 0].mean(0) - states[z == 1].mean(0)).abs().max())
    # Except for the rounding of float32 erasers and states, the gap is zero, in standard deviations. With
    # pool="tokens", long sequences weigh more, which leaves a gap that is not rounding.
    assert gaps["mean"] <= 1e-5 < 1e-3 < gaps["tokens"]


@pytest.mark.parametrize("pool", ["cls", "last"])
def test_one_position_a_sequence(pool: str) -> None:
    report = fit(with_adapter(), small_batches("bert", 4), pool=pool)
    assert report[FIRST].rows == 4 * 16


def test_ignored_positions_are_reported_beside_the_labelled() -> None:
    held_out = small_batches("bert", seed=500)
    line = fit(with_adapter(), small_batches("bert", 4), pool="cls", eval_batches=held_out)[FIRST]
    assert line.change_labelled is not None and line.change_ignored is not None
    assert 0 < line.change_ignored != line.change_labelled


def test_leakage_of_labels_that_mean_nothing_reads_zero() -> None:
    def shuffled(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        batches = small_batches("bert", 8, seed)
        return [{**b, "concept_labels": torch.randint(0, 2, (16,), generator=generator)} for b in batches]

    report = fit(with_adapter(), shuffled(1), eval_batches=shuffled(900))
    before = report["last_hidden_state"].correlation_before
    # About 700 tokens of 128 sequences: on the fitted rows the canonical correlation of width 32 would be at least
    # sqrt(32/700) = 0.21. On other sequences it scatters around 0 by at most 1/sqrt(128), of which three are allowed.
    assert before is not None and abs(before) < 3 / 128**0.5


def test_another_active_adapter_stays_active_while_fitting() -> None:
    model = with_adapter()
    fit(model, small_batches("bert"))
    model.add_adapter(
        ConceptErasureConfig(concept="other", labels=["a", "b"], target_modules=[FIRST]), adapter_name="other"
    )
    batches = [{**b, "concept_labels": (b["input_ids"][:, 0] % 2)} for b in small_batches("bert")]
    model.set_adapter(["other"])
    fit_concept_erasure(model, batches, "other", sequential=False, progress=False)
    alone = erasure_layers(model)[FIRST].eraser_state("other")[0].clone()
    model.set_adapter(["no_gender", "other"])
    fit_concept_erasure(model, batches, "other", sequential=False, progress=False)
    after_gender = erasure_layers(model)[FIRST].eraser_state("other")[0]
    gender = erasure_layers(model)[FIRST].eraser_state("no_gender")
    # The second erasure is fitted after the first, so that nothing is left in the first's direction: right · left is 0.
    assert float((gender[1] @ after_gender).norm() / after_gender.norm()) < 1e-4 * float(gender[1].norm())
    assert not torch.allclose(alone, after_gender)


def test_a_second_fit_replaces_the_first_and_does_not_build_on_it() -> None:
    twice, once = with_adapter(), with_adapter()
    fit(twice, small_batches("bert", seed=300))
    fit(twice, small_batches("bert"))
    fit(once, small_batches("bert"))
    for left, right in zip(erasers(twice).values(), erasers(once).values(), strict=True):
        assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))


def test_background_gives_mean_and_covariance_and_keeps_the_guarantee() -> None:
    batches = small_batches("bert", 6)
    background = [inputs_of(b) for b in small_batches("bert", 6, seed=800)]
    plain, beside = with_adapter(target_modules=[FIRST]), with_adapter(target_modules=[FIRST])
    fit(plain, batches)
    fit(beside, batches, background=background)
    assert not torch.allclose(erasers(plain)[FIRST][1], erasers(beside)[FIRST][1], rtol=1e-3)
    x, z = erased_rows(beside, FIRST, batches)
    standardised = (x - x.mean(0)) / x.std(0)
    # The erasers are float32, as above.
    assert float((standardised[z == 0].mean(0) - standardised[z == 1].mean(0)).abs().max()) <= 1e-5


def test_gradients_modes_and_training_flags_are_left_as_they_were() -> None:
    model = with_adapter().train()
    model.encoder.layer[0].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    fit(model, small_batches("bert"))
    assert {name: module.training for name, module in model.named_modules()} == flags
    assert torch.is_grad_enabled()
    assert not any(layer.observers for layer in erasure_layers(model).values())


def test_dropout_is_off_while_fitting() -> None:
    fitted = []
    for _ in range(2):
        model = with_adapter().train()
        fit(model, small_batches("bert"))
        fitted.append(erasers(model)[FIRST])
    assert all(torch.equal(one, other) for one, other in zip(*fitted, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision_models_are_fitted_in_full_precision(autocast: bool) -> None:
    model = with_adapter()
    if not autocast:
        model.to(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fit(model, small_batches("bert", 6))
    left, right, bias = erasers(model)[FIRST]
    assert left.dtype == right.dtype == bias.dtype == torch.float32
    # The eraser is a projection, so that reading its own direction gives 1, up to float32 rounding.
    torch.testing.assert_close(right @ left, torch.eye(1), rtol=0, atol=1e-5)


def test_a_float64_model_gets_float64_erasers() -> None:
    model = with_adapter().double()
    fit(model, small_batches("bert"))
    assert erasers(model)[FIRST][0].dtype == torch.float64


def test_encoder_decoder_with_sequence_labels_is_erased_and_measured_on_both_sides() -> None:
    model = with_adapter("t5")
    report = fit(model, small_batches("t5"), eval_batches=small_batches("t5", seed=500))
    assert {line.site for line in report.sites} >= {"encoder_last_hidden_state", "last_hidden_state"}
    assert any("decoder" in line.site for line in report.sites)


def test_encoder_decoder_with_token_labels_takes_the_side_that_is_labelled() -> None:
    def by_token(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        decoder = {"decoder_input_ids": batch["decoder_input_ids"][:, :3], "decoder_attention_mask": torch.ones(16, 3)}
        return {**batch, **decoder, "concept_labels": (batch["input_ids"] > 40).long()}

    batches = [by_token(b) for b in small_batches("t5")]
    model = with_adapter("t5", exclude_modules=r"decoder.*")
    report = fit(model, batches, eval_batches=batches)
    assert report.sites[-1].site == "encoder_last_hidden_state"
    named = with_adapter("t5", target_modules=r".*layer_norm")
    with pytest.raises(ValueError, match="target the side whose tokens are labelled"):
        fit(named, batches)
    model = with_adapter("t5")
    with pytest.warns(UserWarning, match=r"label tokens, which are not the rows of \['decoder"):
        fit(model, batches)
    assert all(site.startswith("encoder") for site in erasers(model))


def test_images_have_no_mask_and_a_constant_cls_site_gets_rank_zero() -> None:
    model = with_adapter("vit")
    report = fit(model, small_batches("vit", 4), pool="cls")
    assert report["layers.0.layernorm_before"].rank == 0
    assert report["layernorm"].rank == 1


def test_a_continuous_concept() -> None:
    model = copy.deepcopy(small_model("bert"))
    model.add_adapter(ConceptErasureConfig(concept="length", concept_dim=2), adapter_name="no_gender")
    generator = torch.Generator().manual_seed(0)
    batches = [{**b, "concept_labels": torch.randn(16, 2, generator=generator)} for b in small_batches("bert")]
    assert fit(model, batches)[FIRST].rank == 2


def test_three_classes_take_two_directions_and_rank_caps_them() -> None:
    def three(batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "concept_labels": torch.arange(16) % 3}

    for rank, expected in ((None, 2), (1, 1)):
        model = copy.deepcopy(small_model("bert"))
        model.add_adapter(ConceptErasureConfig(labels=["a", "b", "c"], rank=rank), adapter_name="no_gender")
        assert fit(model, [three(b) for b in small_batches("bert")])[FIRST].rank == expected


def test_a_class_without_rows_is_named() -> None:
    model = copy.deepcopy(small_model("bert"))
    model.add_adapter(ConceptErasureConfig(labels=["a", "b", "unseen"]), adapter_name="no_gender")
    with pytest.warns(UserWarning, match=r"\['unseen'\].*not guarded"):
        fit(model, small_batches("bert"))


@pytest.mark.parametrize("sequential", [True, False], ids=["in sequence", "in one pass"])
@pytest.mark.parametrize("targets", [["rel_embeddings"], ["rel_embeddings", "output.LayerNorm"]], ids=["alone", "both"])
def test_a_site_whose_weight_is_read_past_its_module_is_refused(targets: list[str], sequential: bool) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = DebertaV2Model(
        DebertaV2Config(vocab_size=VOCABULARY, **sizes, relative_attention=True, pos_att_type=["c2p"])
    )
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=targets), adapter_name="no_gender")
    with pytest.raises(
        ValueError, match=r"'encoder.rel_embeddings'.*reads its weight itself|weight another module reads"
    ):
        fit_concept_erasure(model, small_batches("bert"), "no_gender", sequential=sequential, progress=False)


def _refused() -> dict[str, tuple[Any, dict[str, Any], str]]:
    batches = small_batches("bert")
    broken = {**batches[0], "concept_labels": torch.zeros(16, dtype=torch.long)}
    return {
        "empty": ([], {}, "batches is empty"),
        "used-up iterator": (iter(()), {}, "An iterator that was used up"),
        "no labels": ([inputs_of(batches[0])], {}, "has no 'concept_labels'"),
        "all ignored": (
            [{**batches[0], "concept_labels": torch.full((16,), -100)}],
            {},
            "concept_labels are -100, which stands for no label, at every row of batches: (?!.*exclude_modules)",
        ),
        "one class": ([broken], {}, "class"),
        "class id out of range": ([{**batches[0], "concept_labels": torch.full((16,), 5)}], {}, "class id 5"),
        "unknown pool": (batches, {"pool": "max"}, "pool='max'"),
        "empty held-out": (batches, {"eval_batches": []}, "eval_batches is empty"),
        "empty background": (batches, {"background": []}, "background is empty"),
    }


@pytest.mark.parametrize("case", _refused())
def test_bad_data_is_refused_and_the_adapter_stays_as_it_was(case: str) -> None:
    batches, options, message = _refused()[case]
    model = with_adapter()
    fit(model, small_batches("bert", seed=300))
    before, outputs = erasers(model), outputs_of(model, small_batch("bert", seed=3))
    config = copy.deepcopy(model.peft_config["no_gender"])
    with pytest.raises(ValueError, match=message):
        fit(model, batches, **options)
    assert model.peft_config["no_gender"] == config
    assert same(outputs_of(model, small_batch("bert", seed=3)), outputs)
    for site, parts in erasers(model).items():
        assert all(torch.equal(one, other) for one, other in zip(parts, before[site], strict=True))


@pytest.mark.parametrize("sequential", [True, False], ids=["in sequence", "in one pass"])
@pytest.mark.parametrize("config", [{}, {"target_modules": [FIRST]}], ids=["default sites", "a named site"])
def test_labels_that_stand_for_none_name_the_labels_and_not_the_sites(config: dict, sequential: bool) -> None:
    ignored = [{**one, "concept_labels": torch.full((16,), -100)} for one in small_batches("bert")]
    with pytest.raises(ValueError, match="at every row of batches: look at where they are made") as refusal:
        fit_concept_erasure(with_adapter(**config), ignored, "no_gender", sequential=sequential, progress=False)
    assert "exclude_modules" not in str(refusal.value)
    labelled = [*ignored, *small_batches("bert")]  # one batch with labels is enough
    assert fit_concept_erasure(with_adapter(**config), labelled, "no_gender", sequential=sequential, progress=False)


@pytest.mark.parametrize("sequential", [True, False], ids=["in sequence", "in one pass"])
def test_named_sites_of_an_image_take_a_label_for_each_patch(sequential: bool) -> None:
    model = with_adapter("vit", target_modules=["layernorm"])
    patches = model(small_batch("vit")["pixel_values"]).last_hidden_state.shape[1]
    batches = [{**one, "concept_labels": torch.arange(patches).expand(16, -1) % 2} for one in small_batches("vit")]
    report = fit_concept_erasure(model, batches, "no_gender", sequential=sequential, progress=False)
    assert report["layernorm"].rows == 3 * 16 * patches


def test_labels_of_tokens_on_another_side_name_the_side() -> None:
    images = [{**one, "concept_labels": torch.ones(16, 3, dtype=torch.long)} for one in small_batches("vit")]
    with pytest.raises(ValueError, match="In all of the batches concept_labels label tokens that are not the rows at"):
        fit(with_adapter("vit"), images)
    texts = [{**one, "decoder_input_ids": one["decoder_input_ids"][:, :3]} for one in small_batches("t5")]
    sides = zip(texts, ("input_ids", "decoder_input_ids", "input_ids"), strict=True)
    mixed = [{**one, "concept_labels": (one[side] > 40).long()} for one, side in sides]
    with pytest.raises(ValueError, match="In some of the batches concept_labels label tokens"):
        fit(with_adapter("t5"), [{k: v for k, v in one.items() if k != "decoder_attention_mask"} for one in mixed])


def test_a_nan_in_the_activations_names_the_site() -> None:
    model = with_adapter()
    with torch.no_grad():
        model.encoder.layer[1].output.LayerNorm.weight[3] = torch.nan
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.LayerNorm"):
        fit(model, small_batches("bert"))
    assert not model.peft_config["no_gender"].fitted


def test_an_exception_in_the_data_leaves_no_observer_behind() -> None:
    def interrupted() -> Any:
        yield from small_batches("bert", 1)
        raise KeyboardInterrupt

    model = with_adapter()
    with pytest.raises(KeyboardInterrupt):
        fit(model, interrupted())
    assert not any(layer.observers for layer in erasure_layers(model).values())


def test_an_unknown_adapter_names_those_there_are() -> None:
    with pytest.raises(ValueError, match=r"adapter_name='missing'.*\['no_gender'\]"):
        fit_concept_erasure(with_adapter(), small_batches("bert"), "missing", sequential=False)


def test_a_module_outside_the_forward_pass_is_named() -> None:
    model = copy.deepcopy(small_model("bert"))
    model.unused = torch.nn.Linear(4, 4)
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["unused"]), adapter_name="no_gender")
    with pytest.raises(ValueError, match=r"never reached.*the forward pass does not call"):
        fit(model, small_batches("bert"))


def test_label_order_of_loader_and_adapter_must_agree(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "story-mlm")
    rows = Dataset.from_dict({"text": ["she ran", "he ran"], "gender": ["female", "male"]})
    loader = concept_dataloader(rows, tokenizer, label_column="gender", labels=["male", "female"])
    with pytest.raises(ValueError, match=r"number their classes \['male', 'female'\]"):
        fit(with_adapter(), loader)


def test_a_class_that_the_adapter_does_not_have_is_named(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models/story-mlm")
    rows = Dataset.from_dict({"text": ["a dog", "a cat", "a hen"], "label": ["female", "male", "other"]})
    with pytest.raises(ValueError, match=r"\['female', 'male', 'other'\], the adapter \['female', 'male'\]. Name"):
        fit(with_adapter(), concept_dataloader(rows, tokenizer))
    many = Dataset.from_dict({"text": [f"a dog {number}" for number in range(99)]})
    with pytest.raises(ValueError, match=r"number their classes .{78}, the adapter"):
        fit(with_adapter(), concept_dataloader(many, tokenizer, label_column="text"))


@pytest.mark.parametrize("options", [{"sequential": True, "pool": "mean"}, {"sequential": False}])
def test_texts_longer_than_the_model_are_named_with_what_to_write(options: dict[str, Any]) -> None:
    model = with_adapter()
    most = model.config.max_position_embeddings
    ids = torch.ones(4, most + 3, dtype=torch.long)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(ValueError, match=rf"is {most + 3} tokens wide.* has {most} positions.*max_length={most}"):
        fit_concept_erasure(model, [batch], "no_gender", progress=False, **options)


@pytest.mark.parametrize("kind", [(RobertaConfig, RobertaModel), (MPNetConfig, MPNetModel)])
def test_positions_that_begin_after_the_padding_token_are_counted(kind: tuple[Any, Any]) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = kind[1](kind[0](**sizes, vocab_size=30, max_position_embeddings=12, pad_token_id=1))
    model.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name="no_gender")
    ids = torch.full((4, 11), 5)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": torch.tensor([0, 1, 0, 1])}
    with pytest.raises(ValueError, match=r"is 11 tokens wide.* has 10 positions.*max_length=10"):
        fit_concept_erasure(model, [batch], "no_gender", progress=False)


def test_report_as_table_frame_and_plot(tmp_path: Path) -> None:
    report = fit(with_adapter(), small_batches("bert"), eval_batches=small_batches("bert", seed=500))
    frame = report.to_pandas()
    assert list(frame.index) == [line.site for line in report.sites]
    assert "last_hidden_state" in repr(report) and "pre-LN" in repr(report)
    report.plot(str(tmp_path / "leakage.png"))
    assert (tmp_path / "leakage.png").stat().st_size > 0
    with pytest.raises(ValueError, match="Leakage was not measured, so it cannot be plotted"):
        fit(with_adapter(), small_batches("bert")).plot()
    with pytest.raises(KeyError, match="not in this report"):
        report["nowhere"]


NAMES = {"male": ["Tom", "Tim", "Ben", "Max", "Jack", "Sam"], "female": ["Lily", "Sue", "Amy", "Mia", "Anna", "Lucy"]}
PROMPTS = [
    "{} was happy because", "One day, {} went to the park and", "{} saw a big dog. Then", "{} had a red ball and",
    "Once upon a time, {} was sad because", "{} likes to play. One day",
]  # fmt: skip


def _stories(assets: Path, names: slice, prompts: slice) -> tuple[PreTrainedModel, list[dict[str, Tensor]]]:
    folder = assets / "models" / "stories260k"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    batches = []
    for prompt, position in itertools.product(PROMPTS[prompts], range(*names.indices(6))):
        texts = [prompt.format(NAMES[label][position]) for label in ("female", "male")]
        batches.append({**tokenizer(texts, return_tensors="pt", padding=True), "concept_labels": torch.tensor([0, 1])})
    return AutoModelForCausalLM.from_pretrained(folder), batches


def test_a_pre_ln_model_leaks_at_last_hidden_state_unless_the_final_norm_is_erased(assets: Path) -> None:
    """The blocks' norms do not change the residual stream; only the final norm is before everything downstream."""
    leaks = {}
    for name, targets in (("blocks", r".*layers\.\d+\..*layernorm"), ("final", ["model.norm"])):
        model, batches = _stories(assets, slice(0, 6), slice(0, 6))
        model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=targets), adapter_name="no_gender")
        line = fit(model, batches, pool="last", eval_batches=batches)["last_hidden_state"]
        assert line.correlation_before is not None and line.correlation_after is not None
        leaks[name] = line.correlation_before, line.correlation_after
    assert leaks["blocks"][1] > 0.5 * leaks["blocks"][0]
    # On fitted rows the covariances of the two halves are opposite, so the leakage is at most 0.
    assert leaks["final"][1] < 0.05 < leaks["final"][0]


class _Stream(IterableDataset):
    """A stream that makes its batches when they are read."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.sizes, self.passes = list(sizes), 0

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        self.passes += 1
        yield from small_batches("bert", self.sizes[min(self.passes, len(self.sizes)) - 1])


class _WithoutLength(_Stream):
    """A stream whose `__len__` raises an error other than TypeError."""

    def __len__(self) -> int:
        raise NotImplementedError("endless as far as is known")


def test_a_stream_may_refuse_to_say_its_length() -> None:
    model, again = with_adapter(), with_adapter()
    fit(model, small_batches("bert", 4))
    report = fit(again, _WithoutLength(4), eval_batches=_WithoutLength(4))
    assert report.measured_on is not None
    for site, layer in erasure_layers(again).items():
        one, other = layer.eraser_state("no_gender"), erasure_layers(model)[site].eraser_state("no_gender")
        assert all(map(torch.equal, one, other)), site


def test_sums_that_take_too_much_are_held_in_groups_of_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, grouped, data = with_adapter(), with_adapter(), _Stream(4)
    background = [{k: v for k, v in b.items() if k != "concept_labels"} for b in small_batches("bert", 2, seed=9)]
    report = fit(whole, small_batches("bert", 4), background=background)
    # For 3 sites at once, two kinds of sums of 32 x 32 float64 numbers each.
    monkeypatch.setattr("hf_erasure.fitting.fit.MOST_BYTES", 3 * 2 * 8 * 32 * 32)
    gc.freeze()  # Objects that exist already are not counted.
    held: list[int] = []
    add = ConceptMoments.update

    def update(self: ConceptMoments, *args: Any, **options: Any) -> ConceptMoments:
        held.append(sum(isinstance(one, PackedGram) for one in gc.get_objects()))
        return add(self, *args, **options)

    monkeypatch.setattr(ConceptMoments, "update", update)
    again = fit(grouped, DataLoader(data, batch_size=None), background=background)
    sites = erasure_layers(whole)
    assert data.passes == -(-len(sites) // 3) > 1 and max(held) <= 3 * 2
    assert (again.examples, again.tokens) == (report.examples, report.tokens)
    for site, layer in erasure_layers(grouped).items():
        one, other = layer.eraser_state("no_gender"), sites[site].eraser_state("no_gender")
        assert all(map(torch.equal, one, other)), site


def test_groups_of_sites_need_batches_that_can_be_read_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hf_erasure.fitting.fit.MOST_BYTES", 1)
    fit(with_adapter(), iter(small_batches("bert", 4)))
    assert "give a list or a DataLoader instead of an iterator" in caplog.text
    with pytest.raises(ValueError, match="gave 64 examples in one pass over them and 48 in the next"):
        fit(with_adapter(), DataLoader(_Stream(4, 3), batch_size=None))


@pytest.mark.parametrize("sequential", [True, False])
def test_every_site_is_solved_once(sequential: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    solved: list[int] = []
    cholesky = torch.linalg.cholesky_ex

    def count(matrix: Tensor, **options: Any) -> Any:
        solved.append(len(matrix))
        return cholesky(matrix, **options)

    monkeypatch.setattr(torch.linalg, "cholesky_ex", count)
    model, batches = with_adapter(affine=True), small_batches("bert", 4)
    fit_concept_erasure(model, batches, "no_gender", sequential=sequential, progress=False)
    assert len(solved) == len(erasure_layers(model))


@pytest.mark.parametrize("sequential", [False, True])
def test_a_bar_says_how_much_there_is_where_that_is_known(sequential: bool, capsys: pytest.CaptureFixture[str]):
    options: dict[str, Any] = {"sequential": sequential, "progress": True}
    fit_concept_erasure(
        with_adapter(), small_batches("bert"), "no_gender", eval_batches=small_batches("bert"), **options
    )
    said, batches = capsys.readouterr().err, len(small_batches("bert"))
    assert f"{batches}/{batches} [" in said.split("measuring no_gender:")[-1]
    total = len(erasure_layers(with_adapter(), "no_gender")) if sequential else batches
    assert f"{total}/{total} [" in said.split("measuring")[0], said
    fit_concept_erasure(with_adapter(), iter(small_batches("bert")), "no_gender", sequential=False, progress=True)
    assert f"fitting no_gender: {batches} batches [" in capsys.readouterr().err
