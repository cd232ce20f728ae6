"""Fits that are killed and started again."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from tests.prepared import Process, start
from tests.small_models import LABELS, inputs_of, shared_layers_model, small_batches, small_model


def with_adapter(**config: Any) -> Any:
    model = copy.deepcopy(small_model("bert"))
    model.add_adapter(ConceptErasureConfig(**{"labels": LABELS, **config}), adapter_name="no_gender")
    return model


def fit(model: Any, batches: Any, folder: Path | None = None, **options: Any) -> Any:
    return fit_concept_erasure(model, batches, "no_gender", checkpoint_dir=folder, progress=False, **options)


def parts(model: Any) -> list[Tensor]:
    return [part for layer in erasure_layers(model).values() for part in layer.eraser_state("no_gender")]


def same(one: Any, other: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(parts(one), parts(other), strict=True))


# Forward passes before the first batch counts. They find the axes of the activations, and the layers whose bias can
# take the mean in a merge.
PROBES = 4


class Stopped(Exception):
    """Raised in the place of the end of a process."""


def interrupted(model: Any, batches: Any, folder: Path, calls: int, **options: Any) -> None:
    """Fit until a module in the middle of the model has been called `calls` times, then interrupt the fit."""
    seen: list[int] = []

    def stop(*_: object) -> None:
        seen.append(1)
        if len(seen) == calls:
            raise KeyboardInterrupt

    handle = model.encoder.layer[1].attention.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        fit(model, batches, folder, **options)
    handle.remove()


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("background", [True, False])
def test_an_interrupted_fit_continues_and_ends_with_the_same_erasers(
    sequential: bool, background: bool, tmp_path: Path
) -> None:
    batches = small_batches("bert", 4)
    options: dict[str, Any] = {"sequential": sequential}
    if background:
        options["background"] = [inputs_of(b) for b in small_batches("bert", 3, seed=800)]
    whole, resumed = with_adapter(), with_adapter()
    fit(whole, batches, **options)
    interrupted(resumed, batches, tmp_path, calls=PROBES + 3, **options)
    kept = {path.name for path in tmp_path.iterdir()}
    assert any(name.startswith("site-" if sequential else "moments-") for name in kept)
    fit(resumed, batches, tmp_path, **options)
    assert same(whole, resumed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wherever_a_fit_ended_the_rest_is_the_same_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    batches, whole = small_batches("bert", 2), with_adapter().to(dtype)
    fit(whole, batches, tmp_path)
    kept = sorted(tmp_path.glob("site-*.safetensors"))
    for ended in range(len(kept)):
        for path in kept[ended:]:
            path.unlink()
        resumed = with_adapter().to(dtype)
        fit(resumed, batches, tmp_path)
        assert same(whole, resumed), f"of {len(kept)} sites {ended} were kept"


def test_finished_sites_are_not_fitted_again(tmp_path: Path) -> None:
    batches = small_batches("bert", 4)
    fit(with_adapter(), batches, tmp_path)
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    fit(with_adapter(), batches, tmp_path)
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_one_pass_does_not_run_batches_again_that_its_moments_hold(tmp_path: Path) -> None:
    batches, calls = small_batches("bert", 4), []
    fit(with_adapter(), batches, tmp_path, sequential=False)
    model = with_adapter()
    model.encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    fit(model, batches, tmp_path, sequential=False)
    assert len(calls) == PROBES


def test_shared_layers_continue_one_site_a_pass(tmp_path: Path) -> None:
    plain = shared_layers_model()

    def model() -> Any:
        copied = copy.deepcopy(plain)
        copied.add_adapter(ConceptErasureConfig(labels=LABELS), adapter_name="no_gender")
        return copied

    batches = small_batches("bert", 2)
    whole, first, second = model(), model(), model()
    fit(whole, batches)
    fit(first, batches, tmp_path)
    # The first file is of the site that comes first in the model, whose norm is called last.
    (tmp_path / "site-0000.safetensors").unlink()
    fit(second, batches, tmp_path)
    assert same(whole, first) and same(whole, second)


@pytest.mark.parametrize("sequential", [True, False])
def test_other_data_are_refused(sequential: bool, tmp_path: Path) -> None:
    fit(with_adapter(), small_batches("bert", 2), tmp_path, sequential=sequential)
    with pytest.raises(ValueError, match="begun on other data"):
        fit(with_adapter(), small_batches("bert", 2, seed=5), tmp_path, sequential=sequential)


def test_labels_in_a_tuple_are_those_of_a_list(tmp_path: Path) -> None:
    batches = small_batches("bert", 2)
    fit(with_adapter(labels=tuple(LABELS)), batches, tmp_path)
    fit(with_adapter(), batches, tmp_path)
    fit(with_adapter(labels=tuple(LABELS)), batches, tmp_path)


def test_another_fit_is_refused_by_what_differs(tmp_path: Path) -> None:
    batches = small_batches("bert", 2)
    fit(with_adapter(), batches, tmp_path)
    with pytest.raises(ValueError, match="method='leace', this one has 'orth'"):
        fit(with_adapter(method="orth"), batches, tmp_path)
    with pytest.raises(ValueError, match="pool='tokens', this one has 'mean'"):
        fit(with_adapter(), batches, tmp_path, pool="mean")


@pytest.mark.parametrize("sequential", [True, False])
def test_another_model_is_refused_by_a_weight_that_differs(sequential: bool, tmp_path: Path) -> None:
    """The other model has other activations, so the erasers of the first fit must not be put into it."""
    batches, trained = small_batches("bert", 2), with_adapter()
    fit(with_adapter(), batches, tmp_path, sequential=sequential)
    with torch.no_grad():
        trained.encoder.layer[1].output.LayerNorm.weight.mul_(2)
    with pytest.raises(ValueError, match=r"of a model with another 'encoder\.layer\.1\.output\.LayerNorm\.weight'"):
        fit(trained, batches, tmp_path, sequential=sequential)


def fit_slowly(sequential: bool, folder: Path, result: Path) -> None:
    """Fit in a process of its own, slowly enough to be killed."""
    model = with_adapter()
    for layer in model.encoder.layer:
        layer.register_forward_pre_hook(lambda *_: time.sleep(0.02))
    fit(model, small_batches("bert", 6), folder, sequential=sequential)
    torch.save([p for n, p in sorted(model.state_dict().items()) if "concept_erasure" in n], result)


@pytest.mark.filterwarnings("ignore:(Already found|Adding .* switched|.*being fitted while)")
def test_a_fit_beside_other_adapters_is_another_one(tmp_path: Path) -> None:
    model, batches = with_adapter(), small_batches("bert", count=1)
    model.add_adapter(LoraConfig(target_modules=["value"], init_lora_weights=False), adapter_name="lora")
    model.set_adapter(["lora", "no_gender"])
    fit(model, batches, tmp_path)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.encoder.layer[0].attention.self.value.lora_B["lora"].weight.mul_(2)
    with pytest.raises(ValueError, match="of a model with another 'lora'"):
        fit(trained, batches, tmp_path)
    model.set_adapter("no_gender")
    with pytest.raises(ValueError, match=r"a fit with active_adapters=\['LORA adapter lora'\], this one has \[\]"):
        fit(model, batches, tmp_path)


@pytest.mark.parametrize("sequential", [True, False])
def test_killed_at_several_points_it_ends_with_the_same_erasers(sequential: bool, tmp_path: Path) -> None:
    def begin(folder: Path, result: Path) -> Process:
        return start(fit_slowly, sequential, folder, result, folder=tmp_path)

    whole, resumed, folder = tmp_path / "whole.pt", tmp_path / "resumed.pt", tmp_path / "killed"
    assert begin(tmp_path / "uninterrupted", whole).wait().returncode == 0
    kills = 0
    # Kill once as soon as a file is written, and once a moment later: at any time, the files are whole.
    for delay in (0.0, 0.05):
        process = begin(folder, resumed)
        pattern = "site-*.safetensors" if sequential else "moments-*.safetensors"
        seen = len(list(folder.glob(pattern)))
        while process.poll() is None and len(list(folder.glob(pattern))) <= (seen if sequential else 0):
            time.sleep(0.002)
        time.sleep(delay)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
    assert kills, "the fit ended before it could be killed"
    assert begin(folder, resumed).wait().returncode == 0
    assert all(torch.equal(a, b) for a, b in zip(torch.load(whole), torch.load(resumed), strict=True))
