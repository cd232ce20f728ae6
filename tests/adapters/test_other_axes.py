"""All verbs on adapters whose features are not the last axis, or whose examples are not the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from torch import Tensor

from hf_erasure import ConceptErasureConfig, combine_adapters, export_to_lora, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers

LABELS = ["a", "b"]
# The difference of float32 sums in another order.
ROUNDING = 1e-5


def _pictures() -> tuple[hf.PreTrainedModel, dict[str, Tensor], str]:
    sizes = {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2, "image_size": 32}
    labels, noise = torch.arange(32) % 2, torch.Generator().manual_seed(0)
    pixels = torch.randn(32, 3, 32, 32, generator=noise) + labels.view(-1, 1, 1, 1)
    return hf.ConvNextModel(hf.ConvNextConfig(**sizes)), {"pixel_values": pixels, "concept_labels": labels}, "axis"


def _texts() -> tuple[hf.PreTrainedModel, dict[str, Tensor], str]:
    labels, noise = torch.arange(32) % 2, torch.Generator().manual_seed(0)
    ids = torch.randint(4, 30, (32, 8), generator=noise) + 30 * labels[:, None]
    model = hf.XLNetModel(hf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=64))
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "concept_labels": labels}, "examples"


SITES = {
    "channels first": (_pictures, r"encoder\.stages\.\d\.layers\.0"),
    "positions first": (_texts, r"layer\.0\.ff\.layer_2"),
}


@pytest.fixture(params=SITES)
def fitted(request: pytest.FixtureRequest) -> tuple[PeftModel, dict[str, Tensor], str]:
    make, sites = SITES[request.param]
    torch.manual_seed(0)
    base, batch, axis = make()
    configs = {name: ConceptErasureConfig(concept=name, labels=LABELS, target_modules=sites) for name in ("e", "other")}
    model = get_peft_model(base, configs["e"], "e").eval()
    fit_concept_erasure(model, [batch], "e", progress=False)
    model.add_adapter("other", configs["other"])
    other = {**batch, "concept_labels": torch.arange(32) // 2 % 2}
    fit_concept_erasure(model, [other], "other", progress=False)
    assert all(axis in size for size in model.peft_config["e"].fitted_sites.values())
    return model, {name: value for name, value in batch.items() if name != "concept_labels"}, axis


def _states(model: torch.nn.Module, batch: dict[str, Tensor], **options: object) -> Tensor:
    with torch.no_grad():
        return model(**batch, **options).last_hidden_state


def test_they_are_verified_combined_and_described(fitted: tuple, tmp_path: Path) -> None:
    model, batch, axis = fitted
    assert verify_adapter(model, "e", batch).ok
    combine_adapters(model, ["e", "other"], "both")
    sizes, own = (model.peft_config[name].fitted_sites for name in ("both", "e"))
    assert {site: size[axis] for site, size in sizes.items()} == {site: size[axis] for site, size in own.items()}
    for site, layer in erasure_layers(model, "both").items():
        hidden = torch.randn(3, 8, sizes[site]["width"], generator=torch.Generator().manual_seed(0))
        both = layer.apply_eraser("both", hidden.movedim(-1, sizes[site].get("axis", -1)))
        # After the joint erasure, each of the two has nothing left to erase.
        assert torch.allclose(layer.apply_eraser("e", both), both, atol=ROUNDING)
    model.save_pretrained(tmp_path)
    card = (tmp_path / "e" / "README.md").read_text(encoding="utf-8")
    assert all(site in card for site in own)


def test_a_lora_of_them_does_the_same_or_is_refused(fitted: tuple, tmp_path: Path) -> None:
    model, batch, axis = fitted
    erased = _states(model, batch)
    if axis == "axis":
        with pytest.raises(ValueError, match=r"cannot be (exported|merged)"):
            export_to_lora(model, "e", tmp_path)
        return
    export_to_lora(model, "e", tmp_path)
    alone = PeftModel.from_pretrained(model.unload(), tmp_path)
    assert torch.allclose(_states(alone, batch), erased, atol=ROUNDING)


def test_merging_does_the_same_or_is_refused(fitted: tuple) -> None:
    model, batch, axis = fitted
    erased = _states(model, batch)
    if axis == "axis":
        with pytest.raises(ValueError, match="cannot be merged"):
            model.merge_and_unload()
        return
    assert torch.allclose(_states(model.merge_and_unload(), batch), erased, atol=ROUNDING)


def test_rows_with_adapters_of_their_own(fitted: tuple) -> None:
    model, batch, _ = fitted
    erased, rows = _states(model, batch), len(next(iter(batch.values())))
    with model.disable_adapter():
        plain = _states(model, batch)
    mixed = _states(model, batch, adapter_names=["e", "__base__"] * (rows // 2))
    assert torch.allclose(mixed[::2], erased[::2], atol=ROUNDING)
    assert torch.allclose(mixed[1::2], plain[1::2], atol=ROUNDING)
