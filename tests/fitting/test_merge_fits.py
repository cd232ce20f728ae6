"""Two fits on halves of the data, added by `merge_fits`, are the fit on all data."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file
from torch import nn

from hf_erasure import ConceptErasureConfig, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import erasure_layers
from hf_erasure.fitting import combine
from hf_erasure.fitting.combine import merge_fits
from tests.small_models import LABELS, inputs_of, paired_batches, small_batches, small_model


def fitted(folder: Path, batches: Any, config: dict[str, Any] | None = None, **options: Any) -> Any:
    model = copy.deepcopy(small_model("bert"))
    model.add_adapter(ConceptErasureConfig(labels=LABELS, **config or {}))
    fit_concept_erasure(model, batches, sequential=False, checkpoint_dir=folder / "fit", progress=False, **options)
    model.save_pretrained(folder)
    return model


def loaded(folder: Path) -> Any:
    model = copy.deepcopy(small_model("bert"))
    model.load_adapter(str(folder))
    return model


def test_pairs_and_environments_add_up(tmp_path: Path) -> None:
    batches = paired_batches("bert", 4)
    options = {"pair_rank": 1, "environment_rank": 2}
    extras = {"environments": ["a", "b", "c"], "kept": ["x", "y"]}
    whole = fitted(tmp_path / "whole", batches, extras, **options)
    fitted(tmp_path / "a", batches[:2], extras, **options)
    fitted(tmp_path / "b", batches[2:], extras, **options)
    config = merge_fits(tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    assert config.provenance["counterfactuals"] == 4 * 16
    summed = loaded(tmp_path / "ab")
    for site, layer in erasure_layers(whole).items():
        (left, right, _), (other_left, other_right, _) = (
            held.eraser_state("default") for held in (layer, erasure_layers(summed)[site])
        )
        assert left.shape == (32, 1 + 1 + 1 + 1)
        # As in the test below; the weakest of the four directions is known less exactly.
        torch.testing.assert_close(left @ right, other_left @ other_right, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("background", [False, True])
def test_two_halves_add_up_to_the_whole(background: bool, tmp_path: Path) -> None:
    batches, other = small_batches("bert", 6), [inputs_of(b) for b in small_batches("bert", 4, seed=700)]

    def extra(part: slice) -> dict[str, Any]:
        return {"background": other[part]} if background else {}

    whole = fitted(tmp_path / "whole", batches, **extra(slice(None)))
    fitted(tmp_path / "a", batches[:2], eval_batches=small_batches("bert", 2, seed=500), **extra(slice(0, 1)))
    fitted(tmp_path / "b", batches[2:4], **extra(slice(1, 2)))
    fitted(tmp_path / "c", batches[4:], **extra(slice(2, None)))
    merge_fits(tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    with torch.device("meta"):  # Files are read to the CPU, whatever the default device is.
        config = merge_fits(tmp_path / "ab", tmp_path / "c", tmp_path / "abc")
    assert config.provenance["examples"] == 6 * 16
    # What was measured for one part is not reported for the whole.
    assert config.provenance["leakage"] == config.provenance["leakage_intervals"] == {}
    assert config.provenance["measured_on"] == "fitted rows (all of 96)"
    summed = loaded(tmp_path / "abc")
    assert verify_adapter(summed)
    for site, layer in erasure_layers(whole).items():
        (left, right, bias), (other_left, other_right, other_bias) = (
            held.eraser_state("default") for held in (layer, erasure_layers(summed)[site])
        )
        # float64 sums in another order, then float32 erasers: a few times their rounding, 6e-8.
        torch.testing.assert_close(left @ right, other_left @ other_right, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bias, other_bias, rtol=1e-5, atol=1e-6)


def test_what_both_fits_have_read_counts_once(tmp_path: Path) -> None:
    batches, other = small_batches("bert", 3), [inputs_of(b) for b in small_batches("bert", 2, seed=700)]
    whole = fitted(tmp_path / "whole", batches, background=other)
    for number, batch in enumerate(batches):
        fitted(tmp_path / str(number), [batch], background=other)
    merge_fits(tmp_path / "0", tmp_path / "1", tmp_path / "01")
    merge_fits(tmp_path / "01", tmp_path / "2", tmp_path / "012")
    summed = erasure_layers(loaded(tmp_path / "012"))
    for site, layer in erasure_layers(whole).items():
        (left, right, _), (other_left, other_right, _) = (
            held.eraser_state("default") for held in (layer, summed[site])
        )
        torch.testing.assert_close(left @ right, other_left @ other_right, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="Both fits are of the same batches"):
        merge_fits(tmp_path / "0", tmp_path / "0", tmp_path / "00")


class _Blocks(nn.Module):
    """A model in which the name of one norm, `norm`, is the end of the names of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(8)}) for _ in range(2))
        self.norm = nn.LayerNorm(8)

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            vectors = vectors + torch.tanh(2 * block["norm"](vectors))
        return self.norm(vectors)


@pytest.mark.parametrize("background", [False, True])
def test_a_sum_written_over_one_of_its_parts_may_be_killed_and_made_again(
    background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, other = small_batches("bert", 4), [inputs_of(b) for b in small_batches("bert", 4, seed=700)]
    for name, part in (("a", slice(2)), ("b", slice(2, 4))):
        fitted(tmp_path / name, batches[part], **({"background": other[part]} if background else {}))
    merge_fits(tmp_path / "a", tmp_path / "b", tmp_path / "ab")

    def killed(*given: Any, **options: Any) -> None:
        raise InterruptedError

    for name in ("solve_site", "save_file"):
        with monkeypatch.context() as patch, pytest.raises(InterruptedError):
            patch.setattr(combine, name, killed)
            merge_fits(tmp_path / "a", tmp_path / "b", tmp_path / "a")
    merge_fits(tmp_path / "a", tmp_path / "b", tmp_path / "a")
    assert_same_folders(tmp_path / "a", tmp_path / "ab")


def assert_same_folders(one: Path, other: Path) -> None:
    """Check that two folders of adapters have the same tensors, those of the moments included."""
    for file in sorted(one.rglob("*.safetensors")):
        mine, theirs = load_file(file), load_file(other / file.relative_to(one))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine), file


def test_the_tensors_of_each_site_are_found_by_its_whole_name(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(32, 3, 8, generator=generator) for _ in range(2)]
    batches = [{"vectors": x, "concept_labels": torch.arange(32) % 2} for x in rows]
    for name, part in {"a": batches[:1], "b": batches[1:], "whole": batches}.items():
        model = get_peft_model(_Blocks(), ConceptErasureConfig(labels=LABELS, target_modules=["norm"]))
        options = {"sequential": False, "checkpoint_dir": tmp_path / name / "fit", "progress": False}
        fit_concept_erasure(model, part, pool="tokens", **options)
        model.save_pretrained(tmp_path / name)
    merge_fits(tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    summed, whole = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ab", "whole"))
    assert len({tensor.sum().item() for name, tensor in whole.items() if name.endswith("left")}) == 3
    torch.testing.assert_close(summed, whole, rtol=1e-4, atol=1e-5)


def test_fits_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    fitted(tmp_path / "a", small_batches("bert", 2))
    fitted(tmp_path / "mean", small_batches("bert", 2, seed=9), pool="mean")
    with pytest.raises(ValueError, match="pool='mean', this one has 'tokens'"):
        merge_fits(tmp_path / "a", tmp_path / "mean", tmp_path / "out")
    weak = fitted(tmp_path / "weak", small_batches("bert", 2, seed=9))
    weak.peft_config["default"].strength = 0.5
    weak.save_pretrained(tmp_path / "weak")
    with pytest.raises(ValueError, match=r"differ in their strength: .* can be changed in adapter_config\.json"):
        merge_fits(tmp_path / "a", tmp_path / "weak", tmp_path / "out1")
    background = [inputs_of(b) for b in small_batches("bert", 2, seed=700)]
    fitted(tmp_path / "background", small_batches("bert", 2, seed=9), background=background)
    with pytest.raises(ValueError, match="Only one of the two fits has background moments"):
        merge_fits(tmp_path / "a", tmp_path / "background", tmp_path / "out2")


def test_a_folder_without_moments_says_how_to_get_them(tmp_path: Path) -> None:
    model = fitted(tmp_path / "a", small_batches("bert", 2))
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"fit\.checkpoint=true"):
        merge_fits(tmp_path / "a", tmp_path / "bare", tmp_path / "out")


def test_another_base_is_refused(tmp_path: Path) -> None:
    fitted(tmp_path / "a", small_batches("bert", 2))
    model = copy.deepcopy(small_model("bert"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.add_adapter(ConceptErasureConfig(labels=LABELS))
    options = {"sequential": False, "checkpoint_dir": tmp_path / "b" / "fit", "progress": False}
    fit_concept_erasure(model, small_batches("bert", 2), **options)
    model.save_pretrained(tmp_path / "b")
    with pytest.raises(ValueError, match="differ in their base model"):
        merge_fits(tmp_path / "a", tmp_path / "b", tmp_path / "out")
