"""Counterfactuals, environments and kept concepts: from the data to the erasers of every site."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset
from torch import Tensor, nn
from transformers import AutoTokenizer

from hf_erasure import ConceptErasureConfig, concept_dataloader, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from hf_erasure.fitting.counterparts import words_of_tokens
from tests.small_models import LABELS, inputs_of, paired_batches, shared_layers_model, small_model

Batch = dict[str, Tensor]
HERS = "Mary lost her hat, and Tom saw her in Washington."


def double(batches: list[Batch]) -> list[Batch]:
    return [{k: v.double() if v.is_floating_point() else v for k, v in batch.items()} for batch in batches]


def with_adapter(name: str, **config: Any) -> Any:
    model: Any = shared_layers_model() if name == "albert" else copy.deepcopy(small_model(name))
    model.double().add_adapter(ConceptErasureConfig(labels=LABELS, affine=True, **config))
    return model


def fit(model: Any, batches: Any, **options: Any) -> Any:
    return fit_concept_erasure(model, batches, progress=False, **options)


def maps(model: nn.Module) -> dict[str, Tensor]:
    states = {site: layer.eraser_state("default") for site, layer in erasure_layers(model).items()}
    return {site: left @ right for site, (left, right, _) in states.items()}


def activations(model: nn.Module, batches: list[Batch]) -> dict[str, list[Tensor]]:
    """The outputs of each site, erased, batch by batch."""
    found: dict[str, list[Tensor]] = {site: [] for site in erasure_layers(model)}
    hooks = [
        model.get_submodule(site).register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        for site, seen in found.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**inputs_of(batch))
    for hook in hooks:
        hook.remove()
    return found


def differences(seen: list[Tensor], batches: list[Batch], pool: str) -> tuple[Tensor, Tensor]:
    """The class difference of the texts, and the mean difference within pairs, at the same positions."""
    rows, labels, within = [], [], []
    for hidden, batch in zip(seen, batches, strict=True):
        mask, texts = batch["attention_mask"].bool(), batch["concept_pairs"] < 0
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        if pool == "mean":
            rows.append(means[texts])
            labels.append(batch["concept_labels"][texts])
        else:
            rows.append(hidden[texts][mask[texts]])
            labels.append(batch["concept_labels"][texts][:, None].expand(-1, mask.shape[1])[mask[texts]])
        for place, text in enumerate(batch["concept_pairs"].tolist()):
            if text >= 0:
                apart = hidden[text] - hidden[place]
                apart = apart[mask[place]] if pool == "tokens" else (means[text] - means[place])[None]
                within.append(apart * (1 - 2 * batch["concept_pair_labels"][text]))
    x, z = torch.cat(rows), torch.cat(labels)
    return x[z == 0].mean(0) - x[z == 1].mean(0), torch.cat(within).mean(0)


@pytest.mark.parametrize("pool", ["tokens", "mean"])
@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_the_difference_of_classes_and_that_within_pairs_are_gone_at_every_site(name: str, pool: str) -> None:
    batches = double(paired_batches(name, 3))
    model = with_adapter(name)
    before = activations(model, batches)
    report = fit(model, batches, pool=pool)
    after = activations(model, batches)
    # The input of T5's decoder is the same for a text and its counterfactual, until it attends to the encoder.
    ranks = {line.rank for line in report.sites if line.rank is not None}
    assert ranks == {2} or (name == "t5" and ranks == {1, 2})
    assert report.examples == sum(int((batch["concept_pairs"] < 0).sum()) for batch in batches)
    for site, seen in after.items():
        for left, was in zip(differences(seen, batches, pool), differences(before[site], batches, pool), strict=True):
            # Everything is float64: what is left is 1e-16 of the activations times the condition number of the
            # covariance, about 1e3 here, relative to the difference before erasure.
            assert left.norm() <= 1e-9 * was.norm().clamp_min(1e-3), site


def test_pairs_need_no_labels() -> None:
    """Without labels for the texts, the classes of texts and counterfactuals are the labels, with as many rows each."""
    batches = double(paired_batches("bert", 3))
    alone = [batch | {"concept_labels": batch["concept_pair_labels"]} for batch in batches]
    model = with_adapter("bert")
    report = fit(model, alone, pool="mean", eval_batches=alone)
    assert {line.rank for line in report.sites if line.rank is not None} == {1}
    assert report.examples == report.eval_examples == 3 * 16
    for site, seen in activations(model, alone).items():
        assert differences(seen, batches, "mean")[1].norm() <= 1e-9, site


def test_more_directions_of_pairs_and_environments() -> None:
    batches = double(paired_batches("bert", 3))
    model = with_adapter("bert", environments=["a", "b", "c"])
    report = fit(model, batches, pool="mean", pair_rank=3, environment_rank=2, sequential=False)
    assert {line.rank for line in report.sites if line.rank is not None} == {1 + 1 + 1 + 3}
    config = model.peft_config["default"]
    assert (config.pair_rank, config.environment_rank) == (3, 2)
    # Four directions: the class differences of three environments and of all rows. None is left in any environment.
    model = with_adapter("bert", environments=["a", "b", "c"], environment_rank=4)
    fit(model, batches, pool="mean")
    for site, seen in activations(model, batches).items():
        for number in range(3):
            own = [
                batch | {"concept_labels": batch["concept_labels"].masked_fill(environment != number, -100)}
                for batch in batches
                if (environment := batch["concept_environments"]) is not None
            ]
            assert differences(seen, own, "mean")[0].norm() <= 1e-9, (site, number)


def test_what_is_kept_stays() -> None:
    batches = double(paired_batches("bert", 3))
    model = with_adapter("bert", kept=["x", "y"])
    fit(model, batches, pool="mean", sequential=False)
    plain = activations(with_adapter("bert"), batches)
    other = [
        batch | {"concept_labels": batch["concept_kept"].masked_fill(batch["concept_pairs"] >= 0, -100)}
        for batch in batches
    ]
    for site, erased in maps(model).items():
        kept, _ = differences(plain[site], other, "mean")
        assert (erased @ kept).norm() <= 1e-9 * kept.norm(), site


@pytest.mark.parametrize("sequential", [True, False])
def test_a_fit_that_was_killed_continues(sequential: bool, tmp_path: Path) -> None:
    options: Any = {"pool": "tokens", "pair_rank": 1, "environment_rank": 2, "sequential": sequential}
    batches = double(paired_batches("bert", 3))
    whole = with_adapter("bert", environments=["a", "b", "c"])
    fit(whole, batches, **options)
    stopped, seen = with_adapter("bert", environments=["a", "b", "c"]), []

    def stop(*_: object) -> None:
        seen.append(1)
        if len(seen) == 6:  # After the passes that find the axes.
            raise KeyboardInterrupt

    handle = stopped.encoder.layer[1].attention.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fit(stopped, batches, checkpoint_dir=tmp_path, **options)
    handle.remove()
    # A fit that failed has not changed the configuration.
    assert (stopped.peft_config["default"].pair_rank, stopped.peft_config["default"].environment_rank) == (0, None)
    fit(stopped, batches, checkpoint_dir=tmp_path, **options)
    assert all(torch.equal(value, maps(stopped)[site]) for site, value in maps(whole).items())
    with pytest.raises(ValueError, match="pair_rank"):
        fit(
            with_adapter("bert", environments=["a", "b", "c"]),
            batches,
            checkpoint_dir=tmp_path,
            **options | {"pair_rank": 2},
        )


def test_environments_of_one_class_each_are_refused() -> None:
    """Nothing differs between the classes within such an environment, as where the label is given as environment."""
    given = paired_batches("bert", 2)
    batches = [batch | {"concept_environments": batch["concept_labels"].clamp_min(0)} for batch in given]
    with pytest.raises(ValueError, match="Every environment has rows of one class only"):
        fit(with_adapter("bert", environments=LABELS), batches, pool="mean", environment_rank=2)


def test_held_out_halves_share_no_environment() -> None:
    """If environments show the concept in different ways, random halves find it, but halves of environments do not."""
    draw = torch.Generator().manual_seed(0)
    batches = []
    for number in range(40):
        ids = torch.randint(4, 50, (16, 6), generator=draw)
        labels = torch.arange(16) % 2
        # In each environment, the classes have its two tokens, in an order that depends on the environment.
        ids[:, 1] = torch.where((labels == 1) ^ bool(number // 2 % 2), 4 + number, 5 + number)
        named = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels}
        batches.append(named | {"concept_environments": torch.full((16,), number)})
    read = {}
    for by_environment in (False, True):
        given = [b if by_environment else {k: v for k, v in b.items() if k != "concept_environments"} for b in batches]
        model = with_adapter("bert")
        report = fit(model, paired_batches("bert", 3), pool="mean", eval_batches=given)
        read[by_environment] = report.sites[0]
        assert report.eval_environments == (40 if by_environment else None)
        assert report.measured_on == f"640 held-out examples{' in 40 environments' if by_environment else ''}"
        assert f"by Fisher's z over {'environments' if by_environment else 'sequences'}]" in repr(report)
    one = [batch | {"concept_environments": torch.zeros(16, dtype=torch.int64)} for batch in batches]
    with pytest.raises(ValueError, match="640 sequences in 1 environment are split into halves at random, by whole"):
        fit(with_adapter("bert"), paired_batches("bert", 3), pool="mean", eval_batches=one)
    assert read[True].correlation_before < read[False].correlation_before
    assert read[True].interval_before[1] - read[True].interval_before[0] > 0.3  # of 40 environments, not of 640 rows
    assert read[False].interval_before[1] - read[False].interval_before[0] < 0.2


def test_a_module_that_is_called_several_times() -> None:
    batches = double(paired_batches("bert", 3))
    model = with_adapter("albert", environments=["a", "b", "c"])
    report = fit(model, batches)
    lines = [line for line in report.sites if line.visits > 1]
    assert lines
    assert all(line.rank == 2 * line.visits and line.residual is not None for line in lines)


# ---- from the data -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(assets: Path) -> Any:
    return AutoTokenizer.from_pretrained(assets / "models" / "story-mlm")


def table(**columns: list[Any]) -> Dataset:
    return Dataset.from_dict(columns)


def test_words_make_counterfactuals(tokenizer: Any) -> None:
    data = table(text=[HERS, "The sun was hot.", "He ran."], label=["female", "male", "male"], place=["b", "a", "b"])
    loader = concept_dataloader(
        data, tokenizer, batch_size=3, counterfactual_words="english_gender", environment_column="place"
    )
    batch = next(iter(loader))
    assert batch["concept_labels"].tolist() == [0, 1, 1, -100, -100]
    assert batch["concept_pairs"].tolist() == [-1, -1, -1, 0, 2]  # The second text has no word with a counterpart.
    assert batch["concept_pair_labels"].tolist() == [0, -100, 1, 1, 0]
    assert batch["concept_environments"].tolist() == [1, 0, 1, 1, 1]
    assert loader.collate_fn.id_columns["concept_environments"].names == ("a", "b")
    assert "his hat" in tokenizer.decode(batch["input_ids"][3])
    unlabelled = concept_dataloader(
        data, tokenizer, label_column=None, labels=LABELS, counterfactual_words="english_gender"
    )
    # "Mary … her … Tom … her" has the class of most of its words.
    assert next(iter(unlabelled))["concept_labels"].tolist() == [0, -100, 1, 1, 0]


def test_a_column_of_counterfactuals(tokenizer: Any) -> None:
    data = table(text=["she ran", "he sat"], label=[0, 1], other=["he ran", None])
    batch = next(iter(concept_dataloader(data, tokenizer, counterfactual_column="other")))
    assert batch["concept_pairs"].tolist() == [-1, -1, 0]
    assert batch["concept_pair_labels"].tolist() == [0, -100, 1]
    batch = next(iter(concept_dataloader(data, tokenizer, label_column=None, counterfactual_column="other")))
    assert batch["concept_labels"].tolist() == [0, -100, 1]


def test_images_have_counterfactuals_too() -> None:
    draw = torch.Generator().manual_seed(0)
    plain, other = (torch.randn(8, 3, 16, 16, generator=draw) for _ in range(2))
    rows = [
        {"pixel_values": a.numpy(), "other": b.numpy(), "label": i % 2}
        for i, (a, b) in enumerate(zip(plain, other, strict=True))
    ]
    loader = concept_dataloader(Dataset.from_list(rows), None, batch_size=4, counterfactual_column="other")
    assert next(iter(loader))["pixel_values"].shape[0] == 8
    model: Any = copy.deepcopy(small_model("vit"))
    size = model.config.image_size
    loader = [
        {**batch, "pixel_values": torch.nn.functional.interpolate(batch["pixel_values"], size)} for batch in loader
    ]
    model.add_adapter(ConceptErasureConfig(labels=LABELS))
    report = fit(model, loader)
    assert report.counterfactuals == report.examples == 8
    assert max(line.rank or 0 for line in report.sites) == 2


def test_several_classes_have_several_counterfactuals(tokenizer: Any) -> None:
    words = {"a": ["church"], "b": ["mosque"], "c": ["temple"]}
    data = table(text=["the church is old"], label=["a"])
    loader = concept_dataloader(data, tokenizer, labels=["a", "b", "c"], counterfactual_words=words)
    batch = next(iter(loader))
    assert batch["concept_pairs"].tolist() == [-1, 0, 0]
    assert batch["concept_pair_labels"].tolist() == [0, 1, 2]


def test_tokens_are_matched_by_word(tokenizer: Any) -> None:
    texts = ["Alexandra saw the dog.", "Al saw the dog.", "Al and Bo saw the old dog."]
    encoding = tokenizer(texts, padding=True)
    text, same_length, longer = words_of_tokens(encoding, texts, [-1, 0, 0]).tolist()
    words = tokenizer.convert_ids_to_tokens

    def parts(row: int, numbers: list[int]) -> dict[int, str]:
        found: dict[int, str] = {}
        for token, number in zip(words(encoding["input_ids"][row]), numbers, strict=True):
            found[number] = found.get(number, "") + token.removeprefix("##")
        return found

    own = parts(0, text)
    assert [own[number] for number in range(7)] == ["[CLS]", "alexandra", "saw", "the", "dog", ".", "[SEP]"]
    assert parts(1, same_length)[1] == "al"
    assert parts(1, same_length)[4] == "dog"
    # The third text differs by three words for one name, and by an added "old".
    other = parts(2, longer)
    assert [other[number] for number in (2, 3, 4)] == ["saw", "the", "dog"]
    assert 1 not in other


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        ({"label": [0, 1]}, {"counterfactual_words": "english_gender"}, "name these, labels="),
        ({"label": ["a", "b"]}, {"counterfactual_words": "english_gender"}, r"for each of \['a', 'b'\]"),
        ({"label": ["female", "male"]}, {"counterfactual_words": "nowhere.yaml"}, "neither a file nor a table"),
        ({"label": [0, 1]}, {"counterfactual_column": "none"}, "not a column of dataset"),
        (
            {"label": ["a", "b"], "other": ["x", "y"]},
            {"counterfactual_column": "other", "labels": ["a", "b", "c"]},
            "two classes",
        ),
        ({"label": [0.5, 1.0]}, {"counterfactual_column": "text"}, "holds values"),
        ({"label": [0, 1]}, {"environment_column": "nowhere"}, "not a column of dataset"),
        ({"label": [0, 1], "e": [0.5, 1.5]}, {"environment_column": "e"}, "a string or an int"),
        ({"label": [0, 1], "e": [["a"], ["b"]]}, {"environment_column": "e"}, "a string or an int"),
        ({"label": [0, 1], "e": [{"a": 1}, {"a": 2}]}, {"environment_column": "e"}, "a string or an int"),
    ],
)
def test_bad_data_are_refused(tokenizer: Any, columns: Any, options: Any, message: str) -> None:
    data = table(text=["she ran", "he sat"], **columns)
    with pytest.raises(ValueError, match=message):
        concept_dataloader(data, tokenizer, **options)


def test_a_stream_needs_the_names_of_environments(tokenizer: Any) -> None:
    data = table(text=["she ran", "he sat"], label=[0, 1], place=["a", "b"])
    with pytest.raises(ValueError, match="ClassLabel"):
        concept_dataloader(data.to_iterable_dataset(), tokenizer, environment_column="place")
    named = data.cast_column("place", ClassLabel(names=["b", "a"])).to_iterable_dataset()
    batch = next(iter(concept_dataloader(named, tokenizer, environment_column="place")))
    assert batch["concept_environments"].tolist() == [1, 0]


@pytest.mark.parametrize("missing", [None, -1])
def test_a_row_without_an_environment_is_refused(tokenizer: Any, missing: int | None) -> None:
    data = table(text=["she ran", "he sat"], label=[0, 1], place=["a", "b"])
    data = data.cast_column("place", ClassLabel(names=["a", "b"])).map(
        lambda row, at: {"place": missing if at else 0}, with_indices=True
    )
    with pytest.raises(ValueError, match=f"column 'place' holds {missing}"):
        list(concept_dataloader(data, tokenizer, environment_column="place"))


@pytest.mark.parametrize(
    ("change", "config", "options", "message"),
    [
        ({}, {}, {"environment_rank": 2}, "the batches name no environments"),
        ({}, {}, {"pair_rank": -1}, "numbers of directions"),
        ({}, {"environments": ["a", "b"]}, {"environment_rank": 2}, "ids from 0 to 2"),
        (
            {"concept_environments": None},
            {"environments": ["a", "b", "c"]},
            {"environment_rank": 2},
            "environment_column=",
        ),
        (
            {"concept_kept": None},
            {"kept": ["a", "b"]},
            {},
            r"no 'concept_kept', .*concept_dataloader\(…, keep=…\), or add the adapter anew",
        ),
        ({"concept_pairs": None}, {}, {"pair_rank": 1}, "has a counterfactual"),
        ({"concept_pairs": torch.arange(32)}, {}, {}, "a row of the same batch that is a text"),
        ({"concept_pair_labels": torch.zeros(32).long()}, {}, {}, "two of the 2 classes"),
        ({"concept_pair_labels": None}, {}, {}, "got nothing"),
        ({}, {"method": "inlp"}, {"pair_rank": 1}, "'inlp'"),
    ],
)
def test_bad_batches_are_refused(change: Any, config: Any, options: Any, message: str) -> None:
    batches = [
        {name: value for name, value in (batch | change).items() if value is not None}
        for batch in paired_batches("bert", 2)
    ]
    model = copy.deepcopy(small_model("bert"))
    model.add_adapter(ConceptErasureConfig(labels=LABELS, **config))
    before = model.peft_config["default"].to_dict()
    with pytest.raises(ValueError, match=message):
        fit(model, batches, **options)
    assert model.peft_config["default"].to_dict() == before
