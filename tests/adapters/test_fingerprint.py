"""An adapter recognises the base that it was fitted on, in other dtypes too; for another base it says how far it is."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import targeted_parameters
from hf_erasure.adapters.common import placement
from hf_erasure.adapters.common.layer import adapter_children
from hf_erasure.adapters.loading import fingerprint
from tests.adapters.gradiend import lifecycle as gradiend
from tests.ecosystem.quantised_bases import Bases
from tests.in_turn import in_turn
from tests.small_models import (
    LABELS,
    VOCABULARY,
    WIDTH,
    outputs_of,
    roughen,
    same,
    small_batch,
    small_batches,
    small_model,
)

ABOUT_THE_BASE = re.compile("fitted on|trained further|could not be checked|in part")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
INT8 = ("bitsandbytes int8", "quanto int8", "torchao int8")
KINDS = ("erasure", "gradiend")


def said(act: Callable[[], Any]) -> list[str]:
    """The warnings about the base while an adapter is loaded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        act()
    return [str(warning.message) for warning in caught if ABOUT_THE_BASE.search(str(warning.message))]


def saved(model: PreTrainedModel, kind: str, folder: Path, **fields: Any) -> Path:
    """Fit an adapter to a model, save it, and delete it from the model."""
    if kind == "erasure":
        model.add_adapter(ConceptErasureConfig(concept="gender", labels=LABELS, **fields), adapter_name="x")
        vocabulary = model.config.vocab_size
        batches = [{k: v % vocabulary if k == "input_ids" else v for k, v in b.items()} for b in small_batches("llama")]
        fit_concept_erasure(model, batches, "x", sequential=False, progress=False)
    else:
        model.add_adapter(gradiend.config_of(**fields), adapter_name="x")
        gradiend.fit(model, "x")
    model.save_pretrained(folder)
    model.delete_adapter("x")
    return folder


def llama(seed: int = 0, **fields: Any) -> PreTrainedModel:
    """The small Llama; another `seed` gives other weights."""
    model = copy.deepcopy(small_model("llama"))
    return model if not seed else roughen(model, torch.Generator().manual_seed(seed)).eval()


def moved(model: PreTrainedModel, step: float) -> PreTrainedModel:
    """The model with noise added; `step` is its size as a share of each weight's spread."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * step * (parameter.std() if parameter.numel() > 1 else 1))
    return model


# ---- the same base ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_in_another_dtype_is_the_same_base(kind: str, tmp_path: Path):
    """An adapter is fitted on a copy in one dtype and loaded into another; the check allows for both roundings."""
    for name in ("float32", "bfloat16"):
        folder = saved(llama().to(DTYPES[name]), kind, tmp_path / name)
        for dtype in DTYPES.values():
            assert said(lambda f=folder, d=dtype: llama().to(d).load_adapter(str(f))) == []


@pytest.mark.parametrize("kind", INT8)
def test_an_int8_copy_is_the_same_base_and_another_one_is_not(kind: str, tmp_path: Path):
    """Adapters are fitted on either copy and loaded into either. Half of the sites are at quantised weights."""
    bases, fields = Bases(tmp_path), {"target_modules": ["q_proj", "down_proj", "input_layernorm", "embed_tokens"]}
    of_float = saved(bases.load("llama"), "erasure", tmp_path / "float", **fields)
    of_int8 = saved(bases.load("llama", kind), "erasure", tmp_path / "int8", **fields)
    for folder in (of_float, of_int8):
        for loaded in (None, kind):
            assert said(lambda f=folder, k=loaded: bases.load("llama", k).load_adapter(str(f))) == []
        for loaded in (None, kind):
            with pytest.raises(ValueError, match="and this is another model"):
                bases.load("llama", loaded, seed=1).load_adapter(str(folder))
    sampled = json.loads((of_int8 / "adapter_config.json").read_text())["provenance"]["fingerprint"]
    assert {sample["dtype"] for sample in sampled.values()} == {"quantised", "float32"}


# ---- how far from it -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("step", "words"), [(1e-4, "0.0%"), (0.1, "trained further .* correlate by 0.99"), (3.0, None)]
)
def test_the_warning_says_how_far_the_weights_have_moved(kind: str, step: float, words: str | None, tmp_path: Path):
    folder = saved(llama(), kind, tmp_path / "adapter")
    model = moved(llama(), step)
    if words is None:
        with pytest.raises(ValueError, match=r"and this is another model \(.*Load the adapter into its own base"):
            model.load_adapter(str(folder))
        return
    (told,) = said(lambda: model.load_adapter(str(folder)))
    assert re.search(words, told) and "fit the adapter again" in told
    # The sampled values have moved by the share `step`, up to the sampling error of some hundred values.
    drift = float(re.search(r"moved by ([\d.]+)% of their spread", told)[1]) / 100
    assert abs(drift - step) < 0.2 * step + 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_another_model_of_the_same_kind_is_refused_before_anything_is_put_on_it(kind: str, tmp_path: Path):
    folder, model = saved(llama(), kind, tmp_path / "adapter"), llama(seed=7)
    with pytest.raises(ValueError, match=r"another model.*set the environment variable HF_ERASURE_ANY_BASE=1"):
        model.load_adapter(str(folder))
    assert not adapter_children(model) and not hasattr(model, "peft_config")


@pytest.mark.parametrize("kind", KINDS)
def test_it_can_be_loaded_all_the_same(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, model, batch = saved(llama(), kind, tmp_path / "adapter"), llama(seed=7), small_batch("llama")
    plain = outputs_of(model, batch)
    for value in ("0", ""):
        monkeypatch.setenv(fingerprint.ANY_BASE, value)
        with pytest.raises(ValueError, match="another model"):
            model.load_adapter(str(folder))
    monkeypatch.setenv(fingerprint.ANY_BASE, "1")
    (told,) = said(lambda: model.load_adapter(str(folder)))
    assert "loaded anyway, since HF_ERASURE_ANY_BASE is set" in told
    assert adapter_children(model)
    if kind == "erasure":  # a GRADIEND acts only after it is given a strength
        assert not same(outputs_of(model, batch), plain)


def test_norms_of_ones_do_not_make_models_alike(tmp_path: Path):
    """Erasers are at norms, whose weights are one in every new model, so matrices next to them are sampled too."""
    models = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(hf.LlamaForCausalLM(small_model("llama").config).eval())
    assert all(
        bool((m.weight == 1).all()) for model in models for m in model.modules() if hasattr(m, "variance_epsilon")
    )
    folder = saved(models[0], "erasure", tmp_path / "adapter")
    with pytest.raises(ValueError, match="another model"):
        models[1].load_adapter(str(folder))
    assert said(lambda: models[0].load_adapter(str(folder))) == []


def test_norms_near_one_do_not_make_matrices_near_zero_correlate(tmp_path: Path):
    """Pooled values of norms and matrices would correlate, since their means differ; within a weight they do not."""
    models = [llama(seed) for seed in (1, 2)]
    with torch.no_grad():
        for model in models:
            for name, parameter in model.named_parameters():
                parameter.mul_(0.02 / parameter.std()).add_("norm" in name)
    known = [fingerprint.fingerprint(model, [n for n, _ in model.named_modules() if n]) for model in models]
    values = [torch.tensor([v for sample in found.values() for v in sample["values"]]) for found in known]
    assert float(torch.corrcoef(torch.stack(values))[0, 1]) > 0.9
    folder = saved(models[0], "gradiend", tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"another model \(sampled weights correlate by -?0\.0"):
        models[1].load_adapter(str(folder))


def test_one_matrix_that_was_made_anew_is_told_by_its_name(tmp_path: Path):
    folder, model = saved(llama(), "gradiend", tmp_path / "adapter"), llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.normal_(generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=r"another model .*most at 'model\.layers\.1\.mlp\.up_proj\.weight'"):
        model.load_adapter(str(folder))


# ---- another vocabulary ----------------------------------------------------------------------------------------------


def resized(tokens: int, base: PreTrainedModel | None = None, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """The small Llama with tokens added or removed; the new rows are random, as in any program that resizes."""
    model = llama() if base is None else base
    torch.manual_seed(seed)
    model.resize_token_embeddings(tokens, **fields)
    return model.eval()


# New rows are not compared, so it does not matter how they are drawn: each pair has one way, in turn.
@in_turn(
    "vocabularies, mean_resizing",
    [(64, 65), (65, 64), (65, 65), (64, 128), (128, 128), (80, 72), (64, 40)],
    [True, False],
)
def test_an_erasure_loads_where_tokens_were_added_or_removed(
    vocabularies: tuple[int, int], mean_resizing: bool, tmp_path: Path
):
    """It may act on the embeddings; rows that one of the models lacks, or that are new in both, are not compared."""
    there, here = vocabularies
    fields = {"target_modules": ["embed_tokens", "input_layernorm", "norm"]}
    folder = saved(resized(there, mean_resizing=mean_resizing), "erasure", tmp_path / "adapter", **fields)
    for dtype in (torch.float32, torch.bfloat16):
        model = resized(here, seed=1, mean_resizing=mean_resizing).to(dtype)
        assert said(lambda m=model: m.load_adapter(str(folder))) == []
    with pytest.raises(ValueError, match="and this is another model"):
        resized(here, llama(seed=7), seed=1).load_adapter(str(folder))
    (told,) = said(lambda: resized(here, moved(llama(), 0.1), seed=1).load_adapter(str(folder)))
    assert "trained further" in told


def test_a_head_with_a_column_for_each_token_keeps_its_width(tmp_path: Path):
    folder = saved(llama(), "erasure", tmp_path / "adapter", target_modules=["lm_head"])
    model = resized(65)
    with pytest.raises(ValueError, match=r"has 64 tokens; here it has 65 tokens\. .* rows of 'lm_head\.weight'"):
        model.load_adapter(str(folder))
    assert not adapter_children(model)


@pytest.mark.parametrize("tied", [False, True])
def test_a_gradiend_of_another_vocabulary_is_refused_with_that_reason(
    tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def base() -> PreTrainedModel:
        return copy.deepcopy(gradiend._tied_llama()) if tied else llama()

    monkeypatch.setenv(fingerprint.ANY_BASE, "1")  # it allows another base, but the tensors fit no other shape
    for there, here in ((64, 66), (66, 64)):
        folder = saved(resized(there, base()), "gradiend", tmp_path / f"{there}")
        model = resized(here, base())
        with pytest.raises(
            ValueError,
            match=rf"has {there} tokens; here it has {here} tokens\. .* rows of 'model\.embed_tokens\.weight'.*"
            rf"model\.resize_token_embeddings\({there}\)",
        ):
            model.load_adapter(str(folder))
        assert not adapter_children(model)
    elsewhere = saved(base(), "gradiend", tmp_path / "elsewhere", exclude_modules=["embed_tokens", "lm_head"])
    assert said(lambda: resized(66, base()).load_adapter(str(elsewhere))) == []


def test_a_gradiend_that_changes_rows_of_added_tokens_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rows of added tokens differ in every run; a GRADIEND that changes none of them loads."""
    of_all = saved(resized(72), "gradiend", tmp_path / "all", density=1.0, target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(ValueError, match=r"changes rows of added tokens: .* from row \d+ .* Save the resized model"):
        resized(72, seed=1).load_adapter(str(of_all))
    assert said(lambda: resized(72).load_adapter(str(of_all))) == []  # the same seed, as in the run that made the rows
    monkeypatch.setenv(fingerprint.ANY_BASE, "1")
    (told,) = said(lambda: resized(72, seed=1).load_adapter(str(of_all)))
    assert "changes rows of added tokens" in told and "loaded anyway" in told
    monkeypatch.delenv(fingerprint.ANY_BASE)
    of_few = saved(resized(72), "gradiend", tmp_path / "few", density=5e-4, target_modules=["embed_tokens", "q_proj"])
    sample = json.loads((of_few / "adapter_config.json").read_text())["provenance"]["fingerprint"]
    assert 0 < sample["model.embed_tokens.weight"]["last"] < 64 * WIDTH
    assert said(lambda: resized(72, seed=1).load_adapter(str(of_few))) == []


def test_a_model_that_is_resized_under_a_gradiend_adapter_says_so(tmp_path: Path):
    model = llama()
    model.add_adapter(gradiend.config_of(1.0, target_modules=["embed_tokens"]), adapter_name="a")
    gradiend.fit(model, "a")
    model.resize_token_embeddings(66)
    with pytest.raises(
        ValueError, match=r"has shape \[66, 32\] now: it was resized after the adapter.*Resize the model"
    ):
        model(torch.tensor([[4, 5]]))


def test_a_model_of_another_shape_takes_what_fits_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An erasure at norms needs only their width to fit; a GRADIEND needs the shape of every weight it changes."""
    config = copy.deepcopy(small_model("llama").config)
    config.intermediate_size = 48
    folders = {kind: saved(llama(), kind, tmp_path / kind) for kind in KINDS}
    linear = saved(llama(), "erasure", tmp_path / "linear", target_modules=["up_proj"])
    for folder in (*folders.values(), linear):
        with pytest.raises(ValueError, match=r"another model|has shape .*64.*; here it has .*48"):
            hf.LlamaForCausalLM(config).load_adapter(str(folder))
    monkeypatch.setenv(fingerprint.ANY_BASE, "1")
    model = hf.LlamaForCausalLM(config).eval()
    assert any("loaded anyway" in words for words in said(lambda: model.load_adapter(str(folders["erasure"]))))
    assert adapter_children(model) and outputs_of(model, small_batch("llama"))
    for folder in (folders["gradiend"], linear):
        with pytest.raises(ValueError, match=r"has shape .*64.*; here it has .*48"):
            hf.LlamaForCausalLM(config).load_adapter(str(folder))


# ---- what is sampled -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_targeted_weight_is_sampled(kind: str):
    model = llama()
    if kind == "erasure":
        model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=["q_proj", "norm"]), adapter_name="x")
        fit_concept_erasure(model, small_batches("llama"), "x", sequential=False, progress=False)
        targeted = {f"{child.path}.{n}" for child in adapter_children(model) for n, _ in child.host.named_parameters()}
    else:
        model.add_adapter(gradiend.config_of(), adapter_name="x")
        gradiend.fit(model, "x")
        targeted = set(targeted_parameters(model, "x"))
    sampled = model.peft_config["x"].provenance["fingerprint"]
    assert targeted <= sampled.keys() and len(targeted) > 2
    weights = dict(model.named_parameters())
    for name, sample in sampled.items():
        flat = weights[name].detach().flatten()
        assert [float(flat[position]) for position in sample["positions"]] == sample["values"]


def test_hundreds_of_weights_stay_a_small_file_and_are_told_apart(tmp_path: Path):
    config = hf.BertConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=24, num_attention_heads=2, intermediate_size=32
    )
    models = [roughen(hf.BertModel(config), torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    owners = [name for name, module in models[0].named_modules() if module._parameters]
    found = fingerprint.fingerprint(models[0], owners)
    assert len(found) == len(list(models[0].parameters())) > 380
    assert all(len(sample["values"]) >= 4 for sample in found.values())
    assert len(json.dumps(found, indent=2)) < 200_000
    folder = saved(models[0], "gradiend", tmp_path / "adapter")
    assert said(lambda: models[0].load_adapter(str(folder))) == []
    with pytest.raises(ValueError, match=r"another model \(sampled weights correlate by -?0\.0"):
        models[1].load_adapter(str(folder))


def test_where_the_base_came_from_is_kept(tmp_path: Path):
    """The adapter keeps the id and the commit of the downloaded base, and its class."""
    model = llama()
    model.config._commit_hash, model.name_or_path = "c0ffee", "user/base"
    folder = saved(model, "erasure", tmp_path / "adapter")
    written = json.loads((folder / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["revision"]) == ("user/base", "c0ffee")
    assert written["provenance"]["base_class"] == "LlamaForCausalLM"
    with pytest.raises(
        ValueError, match=r"was fitted on user/base at c0ffee \(LlamaForCausalLM\), and this is another"
    ):
        llama(seed=7).load_adapter(str(folder))


# ---- what cannot be read ---------------------------------------------------------------------------------------------


def test_weights_that_are_out_of_reach_are_left_out_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A model may be sharded, or accelerate may keep its weights where they cannot be read."""
    folder = saved(llama(), "gradiend", tmp_path / "adapter")
    original = placement.is_sharded

    def sharded(parameter: torch.Tensor) -> bool:
        return parameter.dim() > 1 or original(parameter)

    monkeypatch.setattr(placement, "is_sharded", sharded)
    (told,) = said(lambda: llama().load_adapter(str(folder)))
    assert re.search(r"was checked in part: 15 of the \d+ weights .* cannot be read here", told)
    with pytest.raises(ValueError, match="another model"):  # the weights that can be read show it
        llama(seed=7).load_adapter(str(folder))


def test_a_copy_that_is_trained_is_not_taken_for_the_weight():
    config = peft.LoraConfig(target_modules=["query"], modules_to_save=["pooler.dense"])
    model = peft.get_peft_model(copy.deepcopy(small_model("bert")), config).get_base_model()
    assert placement.values_and_dtype(model, "pooler.dense.weight") == (None, "")
    assert placement.values_and_dtype(model, "pooler.dense.original_module.weight")[1] == "float32"


def test_an_adapter_without_a_fingerprint_says_so(tmp_path: Path):
    folder = saved(llama(), "erasure", tmp_path / "adapter")
    written = json.loads((folder / "adapter_config.json").read_text())
    del written["provenance"]["fingerprint"]
    (folder / "adapter_config.json").write_text(json.dumps(written))
    (told,) = said(lambda: llama().load_adapter(str(folder)))
    assert "does not say what weights it was fitted on" in told


# ---- real models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_stories_its_further_training_and_a_new_start(kind: str, assets: Path, tmp_path: Path):
    """Copies in other dtypes pass, 20 steps of training give a warning, an untrained model is refused."""
    place = assets / "models" / "stories260k"

    def base(**kwargs: Any) -> PreTrainedModel:
        model: PreTrainedModel = hf.AutoModelForCausalLM.from_pretrained(place, **{"dtype": torch.float32, **kwargs})
        return model.eval()

    folder = saved(base(), kind, tmp_path / "adapter")
    for dtype in ("float32", "bfloat16", "float16"):
        assert said(lambda d=dtype: base(dtype=DTYPES[d]).load_adapter(str(folder))) == []
    model, tokenizer = base(), hf.AutoTokenizer.from_pretrained(place)
    text = (assets / "data" / "tinystories-sample" / "tinystories.txt").read_text()[:20_000]
    ids = torch.tensor(tokenizer(text)["input_ids"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(20):
        rows = ids[step * 200 :][: 4 * 48].view(4, 48)
        model(input_ids=rows, labels=rows).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (told,) = said(lambda: model.load_adapter(str(folder)))
    assert re.search(r"trained further .* correlate by 0\.9\d+ and have moved by \d+\.\d%", told)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"another model \(sampled weights correlate by -?0\.[0-4]"):
        hf.LlamaForCausalLM(base().config).load_adapter(str(folder))
