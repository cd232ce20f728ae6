"""Erasures that are merged into a table shared by the embedding and the head: `untie=True`."""

from __future__ import annotations

import copy
import functools
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
from hf_erasure.adapters.erasure.layer import erasure_layers
from hf_erasure.adapters.merging.probe import advise_targets
from tests.adapters.lifecycle import MERGE_TOLERANCE, State
from tests.small_models import _TEXT, LABELS, distance, outputs_of, roughen, same, small_batch, small_model

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "gpt2": lambda: small_model("gpt2"),
    "gemma": lambda: small_model("gemma"),
    "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**_TEXT)),
    "bart": lambda: hf.BartForConditionalGeneration(hf.BartConfig(**BART)),
    "umt5": lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)),
}
BART = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 48,
    "forced_eos_token_id": None,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 4}
INPUTS = {"bert": "bert", "bart": "t5", "umt5": "t5"}


@functools.cache
def _base(name: str) -> PreTrainedModel:
    return roughen(MODELS[name](), torch.Generator().manual_seed(3)).eval()


def batch_of(name: str, **more: Any) -> dict[str, torch.Tensor]:
    return small_batch(INPUTS.get(name, name), **{"seed": 5, **more})


def fitted(name: str, folder: Path, targets: Any, site: str, affine: bool = False) -> peft.PeftModel:
    model = copy.deepcopy(_base(name))
    config = ConceptErasureConfig(labels=LABELS, target_modules=targets, site=site, affine=affine)
    model.add_adapter(config, adapter_name="gender")
    fit_concept_erasure(model, [batch_of(name, rows=48, seed=100)], "gender", sequential=False, progress=False)
    model.save_pretrained(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(_base(name)), folder)


def tables(model: Any) -> int:
    """How many different parameters the model has; a tied table counts once."""
    return len({p.data_ptr() for p in model.parameters()})


CASES = [
    ("gpt2", ["lm_head"], "input", False),
    ("gpt2", ["wte"], "output", True),
    ("gpt2", r"transformer\.ln_f", "output", False),
    ("gemma", ["embed_tokens"], "output", True),
    ("gemma", ["lm_head"], "input", False),
    ("bert", ["word_embeddings"], "output", True),
    ("bart", ["lm_head"], "input", False),
]


@pytest.mark.parametrize(("name", "targets", "site", "affine"), CASES, ids=str)
def test_a_tied_table_gets_values_of_its_own_on_request_and_is_tied_again(
    name: str, targets: Any, site: str, affine: bool, tmp_path: Path
) -> None:
    wrapper, batch = fitted(name, tmp_path / "adapter", targets, site, affine), batch_of(name)
    base: Any = wrapper.get_base_model()
    before, plain, keys = State(wrapper, batch), tables(base), dict(base.all_tied_weights_keys)
    erased = outputs_of(wrapper, batch)
    with pytest.raises(ValueError, match=r"shared by \[.*untie=True"):
        wrapper.merge_adapter()
    before.assert_same(State(wrapper, batch))

    with pytest.warns(UserWarning, match=r"bytes larger, and its configuration has tie_word_embeddings=False"):
        wrapper.merge_adapter(untie=True)
    assert distance(outputs_of(wrapper, batch), erased) < MERGE_TOLERANCE[torch.float32]
    assert not base.config.tie_word_embeddings and not base.all_tied_weights_keys
    assert tables(base) > plain
    wrapper.unmerge_adapter()
    before.assert_same(State(wrapper, batch))
    assert (tables(base), base.config.tie_word_embeddings, base.all_tied_weights_keys) == (plain, True, keys)

    with pytest.warns(UserWarning, match=r"bytes larger"):
        merged = wrapper.merge_and_unload(untie=True)
    after = outputs_of(merged, batch)
    assert distance(after, erased) < MERGE_TOLERANCE[torch.float32]
    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged")
    assert not reloaded.config.tie_word_embeddings
    assert same(outputs_of(reloaded, batch), after)


def test_no_targets_are_advised_where_a_tied_weight_stays_tied() -> None:
    model: Any = copy.deepcopy(small_model("gpt2"))
    model.add_adapter(ConceptErasureConfig(labels=LABELS, target_modules=r"transformer\.ln_f"), "a")
    layers = list(erasure_layers(model).values())
    assert "untie=True for ['lm_head']" in advise_targets(model, layers)
    model.all_tied_weights_keys = {}
    assert advise_targets(model, layers) == ""


class _TwoHeads(hf.GPT2LMHeadModel):
    """A second head has the weight of the first, and takes an activation from elsewhere."""

    def forward(self, **inputs: Any) -> dict[str, torch.Tensor]:  # type: ignore[override]
        states = self.transformer(**inputs).last_hidden_state
        return {"logits": self.lm_head(states) + self.other(self.transformer.wpe.weight[: states.shape[1]])}


def test_a_weight_behind_a_norm_that_another_head_shares_is_refused_with_the_tie() -> None:
    model: Any = _TwoHeads(hf.GPT2Config(**{**small_model("gpt2").config.to_dict(), "tie_word_embeddings": False}))
    model.other = torch.nn.Linear(model.config.n_embd, model.config.vocab_size, bias=False)
    model.other.weight = model.lm_head.weight
    wrapper = peft.get_peft_model(model, ConceptErasureConfig(labels=LABELS, target_modules=["ln_f"]))
    fit_concept_erasure(wrapper, [batch_of("gpt2", rows=48)], sequential=False, progress=False)
    with pytest.raises(ValueError, match=r"used elsewhere too \(.*shared by \['lm_head.weight', 'other.weight'\]"):
        wrapper.merge_adapter()


def test_a_model_that_computes_something_else_untied_is_refused_as_it_was(tmp_path: Path) -> None:
    """UMT5 divides the input of its head where the table is tied, and does not where it is not."""
    wrapper, batch = fitted("umt5", tmp_path, ["lm_head"], "input"), batch_of("umt5")
    before = State(wrapper, batch)
    with pytest.raises(ValueError, match="computes other outputs with the same weights"):
        wrapper.merge_adapter(untie=True)
    before.assert_same(State(wrapper, batch))
    assert wrapper.get_base_model().config.tie_word_embeddings


def test_both_of_a_table_that_was_tied_are_merged_one_after_the_other(tmp_path: Path) -> None:
    wrapper, batch = fitted("gpt2", tmp_path, ["lm_head"], "input"), batch_of("gpt2")
    config = ConceptErasureConfig(labels=LABELS, target_modules=["wte"], sticky=True)
    wrapper.add_adapter("table", config)
    fit_concept_erasure(wrapper, [batch_of("gpt2", rows=48, seed=101)], "table", sequential=False, progress=False)
    before, erased = State(wrapper, batch), outputs_of(wrapper, batch)
    for adapter in ("table", "default"):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            wrapper.merge_adapter([adapter], untie=True)
        assert any("bytes larger" in str(warning.message) for warning in told) == (adapter == "table")
    assert distance(outputs_of(wrapper, batch), erased) < MERGE_TOLERANCE[torch.float32]
    wrapper.unmerge_adapter()
    before.assert_same(State(wrapper, batch))
