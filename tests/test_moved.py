"""Every import path that README, docs and recipes of the last release named still works, and warns with the new one."""

from __future__ import annotations

import importlib
import pickle
import sys
import warnings

import pytest

import hf_erasure
from hf_erasure import moved

# Module → the names in it that were documented.
# fmt: off
DOCUMENTED = {
    "hf_erasure.adapters": ["edited", "erasure_layers", "set_features"],
    "hf_erasure.adapters.config": ["ConceptErasureConfig"],
    "hf_erasure.adapters.gradiend_config": ["GradiendConfig"],
    "hf_erasure.adapters.lora_export": ["LoraExport", "export_to_lora"],
    "hf_erasure.adapters.verification": ["Verification", "verify_adapter"],
    "hf_erasure.callbacks.concept_erasure": ["ConceptErasureCallback"],
    "hf_erasure.callbacks.gradiend": ["GradiendCallback"],
    "hf_erasure.erasers": ["ConceptMoments", "Eraser", "OracleEraser", "QuadraticEraser", "apply_erasure"],
    "hf_erasure.erasers.eraser": ["Eraser"],
    "hf_erasure.erasers.inlp": ["fit_inlp"],
    "hf_erasure.erasers.moments": ["ConceptMoments"],
    "hf_erasure.erasers.oracle": ["OracleEraser"],
    "hf_erasure.erasers.quadratic": ["QuadraticEraser"],
    "hf_erasure.erasers.rlace": ["fit_rlace"],
    "hf_erasure.evaluation.treebank": ["Sentence", "read_treebank"],
    "hf_erasure.fitting.combining": ["combine_adapters"],
    "hf_erasure.fitting.data": ["concept_dataloader"],
    "hf_erasure.fitting.erasure": ["fit_concept_erasure"],
    "hf_erasure.fitting.gradiend": [
        "EncodedValues",
        "GradiendTrainer",
        "GradiendTrainingArguments",
        "GradientReader",
        "PairBatch",
        "PairSet",
        "SLOT",
        "neutral_batches",
        "pair_batches",
        "pairs_from_sentences",
        "pairs_from_templates",
    ],
    "hf_erasure.fitting.gradiend.adapter": ["GradiendAdapter"],
    "hf_erasure.fitting.gradiend.arguments": ["GradiendTrainingArguments"],
    "hf_erasure.fitting.gradiend.evaluation": ["encoded"],
    "hf_erasure.fitting.gradiend.language": ["LanguageModelling"],
    "hf_erasure.fitting.gradiend.pairs": ["pair_batches"],
    "hf_erasure.fitting.gradiend.selection": ["Point", "Scorer", "Selection"],
    "hf_erasure.fitting.gradiend.templates": ["pairs_from_templates"],
    "hf_erasure.fitting.gradiend.trainer": ["GradiendTrainer"],
    "hf_erasure.fitting.gradiend.words": ["pairs_from_sentences"],
    "hf_erasure.fitting.occupations": ["occupation_sentences"],
    "hf_erasure.fitting.probing": ["majority", "probe_accuracy"],
    "hf_erasure.fitting.recipe": ["EMBEDDED", "embedded_model"],
    "hf_erasure.fitting.recipe_file": ["check_section", "read_content"],
    "hf_erasure.fitting.report": ["ErasureReport", "SiteReport"],
    "hf_erasure.fitting.scrubbing": ["Scrubber"],
    "hf_erasure.gradiend": ["ClosedFormEstimator", "FeatureDecoder", "FeatureNeuron"],
    "hf_erasure.hub": ["describe", "push_adapter"],
    "hf_erasure.hub.cards": ["Card", "WrittenCard", "config_in", "rendered", "write_card"],
    "hf_erasure.hub.describing": ["describe", "describe_folder"],
    "hf_erasure.hub.facts": ["CardFacts", "facts_of"],
    "hf_erasure.hub.failures": ["PushError"],
    "hf_erasure.hub.pushing": ["push_adapter", "push_model"],
    "hf_erasure.metrics": [
        "StereoSet",
        "WEAT",
        "benchmarks",
        "linear_leakage",
        "metric_path",
        "prediction_balance",
        "pronoun_gap",
        "tpr_gap",
        "weat",
    ],
    "hf_erasure.metrics.base": ["Facts"],
    "hf_erasure.metrics.benchmarks": ["crows_pairs", "seat", "stereoset", "text_perplexity", "winobias"],
    "hf_erasure.metrics.crows_pairs": ["score"],
    "hf_erasure.metrics.encoder_correlation": ["score"],
    "hf_erasure.metrics.linear_leakage": ["score"],
    "hf_erasure.metrics.minimum_description_length": ["score"],
    "hf_erasure.metrics.perplexity": ["score"],
    "hf_erasure.metrics.prediction_balance": ["score"],
    "hf_erasure.metrics.probe": ["held_out_answers"],
    "hf_erasure.metrics.pronoun_gap": ["score"],
    "hf_erasure.metrics.readers": ["read_seat"],
    "hf_erasure.metrics.scoring": ["LanguageScorer", "pooled_embeddings"],
    "hf_erasure.metrics.stereoset": ["score"],
    "hf_erasure.metrics.tpr_gap": ["score"],
    "hf_erasure.metrics.weat": ["score"],
}


def before(module: str, name: str) -> object:
    """Import a name as a program written for the last release does."""
    sys.modules.pop(module, None) if module.partition(".")[2] in moved.MOVED else None
    return getattr(importlib.import_module(module), name)


@pytest.mark.parametrize("module", DOCUMENTED)
def test_a_documented_path_works(module: str):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [before(module, name) for name in DOCUMENTED[module]]
    told = [str(warning.message) for warning in said if issubclass(warning.category, DeprecationWarning)]
    told = [text for text in told if "has moved" in text]
    if module.partition(".")[2] not in moved.MOVED:
        assert not told
        return
    assert len(told) == len(found)
    for name, text, value in zip(DOCUMENTED[module], told, found, strict=True):
        assert text.startswith(f"{module}.{name} has moved: from hf_erasure.")
        advice: dict[str, object] = {}
        exec(text.partition("moved: ")[2].partition(". The old path")[0], advice)
        assert advice[name] is value


def test_every_module_that_moved_was_documented():
    assert {f"hf_erasure.{module}" for module in moved.MOVED} <= set(DOCUMENTED)


def test_the_warning_is_about_the_line_that_imports():
    with pytest.warns(DeprecationWarning, match="from hf_erasure.recipes import embedded_model") as said:
        exec(compile("from hf_erasure.fitting.recipe import embedded_model", "theirs.py", "exec"), {})
    assert said[0].filename == "theirs.py"


def test_what_was_pickled_by_a_path_of_before_is_read():
    with pytest.warns(DeprecationWarning, match="has moved"):
        config = pickle.loads(b"chf_erasure.adapters.config\nConceptErasureConfig\n.")
    assert config is hf_erasure.ConceptErasureConfig


def test_what_was_never_there_is_not_found():
    with pytest.raises(ImportError, match="no_such"):
        exec("from hf_erasure.fitting.recipe import no_such", {})
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("hf_erasure.fitting.no_such")


def test_installing_again_adds_nothing():
    before = len(sys.meta_path)
    moved.install()
    assert len(sys.meta_path) == before


def test_every_place_that_is_named_is_there():
    for place in {place for places in moved.MOVED.values() for place in places}:
        importlib.import_module(f"hf_erasure.{place}")
