"""Fitting names adapters that are off and records those that are on; loading and verifying compare with the record."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from hf_erasure import combine_adapters, fit_concept_erasure, verify_adapter
from hf_erasure.adapters import steer
from tests.fitting.gradiend.test_trainer import adapted, trainer_of
from tests.lifecycle.verbs import OF, base
from tests.small_models import small_batches

pytestmark = pytest.mark.filterwarnings("ignore:(Already found a `peft_config`|Adding .* switched|Fitted on rows)")
BATCHES = small_batches("bert", count=1)
OTHER = "Other adapters act here than when 'ours' was fitted: "


def said_by(call: Callable[[], Any], start: str) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    found = [w for w in caught if start in str(w.message)]
    assert all(w.filename == __file__ for w in found)
    return [str(w.message) for w in found]


def with_both(*active: str, seed: int = 0) -> Any:
    model = base("bert")
    OF["LoRA"].add(model, "bert", "lora", seed, target_modules=["value"])
    model.add_adapter(OF["erasure"].config(target_modules=["output.dense"]), "ours")
    model.set_adapter(list(active))
    return model.eval()


def fit(model: Any, **options: Any) -> None:
    fit_concept_erasure(model, BATCHES, "ours", progress=False, **options)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An erasure that was fitted beside a LoRA, the LoRA, and another one of the same shape."""
    root = tmp_path_factory.mktemp("beside")
    model = with_both("lora", "ours")
    fit(model)
    for name in ("ours", "lora"):
        model.set_adapter(name)
        model.save_pretrained(root / name)
    another = base("bert")
    OF["LoRA"].add(another, "bert", "lora", 5, target_modules=["value"])
    another.save_pretrained(root / "another")
    return {name: root / name for name in ("ours", "lora", "another")}


@pytest.mark.parametrize("sequential", [True, False])
def test_an_adapter_that_is_off_while_fitting_is_named(sequential: bool):
    model = with_both("ours")
    (said,) = said_by(lambda: fit(model, sequential=sequential), "is being fitted")
    assert "'ours' is being fitted while the LORA adapter 'lora' is off" in said
    assert "set_adapter(['lora', 'ours'])" in said
    assert model.peft_config["ours"].provenance["active_adapters"] == []
    assert "Other adapters" not in str(verify_adapter(model, "ours"))
    model.set_adapter(["lora", "ours"])  # as the warning says
    assert OTHER + "the LORA adapter 'lora' is on and was not" in str(verify_adapter(model, "ours"))
    assert said_by(lambda: fit(model, sequential=sequential), "is being fitted") == []
    (entry,) = model.peft_config["ours"].provenance["active_adapters"]
    assert (entry["name"], entry["kind"]) == ("lora", "LORA adapter") and entry["sample"]
    assert "Other adapters" not in str(verify_adapter(model, "ours"))
    model.set_adapter("ours")
    verdict = verify_adapter(model, "ours")
    assert verdict and OTHER + "the LORA adapter 'lora' was on and is off now" in str(verdict)


def test_prompts_that_a_fit_leaves_out_are_named():
    """They are inputs that a `PeftModel` puts before those of the batch, and a fit runs the model inside."""
    prompts = peft.PromptTuningConfig(task_type="FEATURE_EXTRACTION", num_virtual_tokens=2)
    model = peft.get_peft_model(base("bert"), prompts, "prompted")
    model.get_base_model().add_adapter(OF["erasure"].config(target_modules=["output.dense"]), "ours")
    (said,) = said_by(lambda: fit(model, sequential=False), "is being fitted")
    assert said == "'ours' is being fitted without the prompts ['prompted']: the result is for the model alone."
    assert said_by(lambda: fit(model.get_base_model(), sequential=False), "is being fitted") == []


def test_the_record_is_in_the_file(folders: dict[str, Path]):
    saved = json.loads((folders["ours"] / "adapter_config.json").read_text())
    assert [entry["name"] for entry in saved["provenance"]["active_adapters"]] == ["lora"]


@pytest.mark.parametrize("road", ["load_adapter", "PeftModel"])
def test_loading_says_what_was_on_and_is_not(road: str, folders: dict[str, Path]):
    def load(model: Any) -> Any:
        if road == "load_adapter":
            model.load_adapter(folders["ours"], adapter_name="ours")
            return model
        return peft.PeftModel.from_pretrained(model, folders["ours"], adapter_name="ours")

    missing = OTHER + "the LORA adapter 'lora' was on and is not loaded here"
    model = base("bert")
    (said,) = said_by(lambda: load(model), "Other adapters")
    assert said.startswith(missing)
    # The erasure was loaded first. The LoRA is loaded now, under another name.
    assert missing in str(verify_adapter(model, "ours"))
    assert said_by(lambda: model.load_adapter(folders["lora"], adapter_name="renamed"), "Other adapters") == []
    assert "Other adapters" not in str(verify_adapter(model, "ours"))
    model = base("bert").to(torch.bfloat16)
    model.load_adapter(folders["lora"], adapter_name="renamed")
    assert said_by(lambda: load(model), "Other adapters") == []
    # Another LoRA of the same name.
    model = base("bert")
    model.load_adapter(folders["another"], adapter_name="lora")
    (said,) = said_by(lambda: load(model), "Other adapters")
    assert said.startswith(OTHER + "the LORA adapter 'lora' has other values than it had")


def test_loading_another_beside_what_was_fitted_alone_says_so(folders: dict[str, Path], tmp_path: Path):
    for kind in ("erasure", "GRADIEND"):
        OF[kind].added("bert", "ours", target_modules=["output.dense"]).save_pretrained(tmp_path / kind)
    model = base("bert")
    assert said_by(lambda: model.load_adapter(tmp_path / "erasure", adapter_name="ours"), "Other adapters") == []
    (said,) = said_by(lambda: model.load_adapter(folders["lora"], adapter_name="lora"), "Other adapters")
    assert said.startswith(OTHER + "the LORA adapter 'lora' is on and was not")
    (said,) = said_by(lambda: model.load_adapter(tmp_path / "GRADIEND", adapter_name="steering"), "Other adapters")
    assert "the LORA adapter 'lora' is on and was not; the GRADIEND adapter 'steering' is on and was not" in said


def test_a_steered_adapter_is_another_one():
    model = base("bert")
    OF["GRADIEND"].add(model, "bert", "steering", target_modules=["value"])
    model.add_adapter(OF["erasure"].config(target_modules=["output.dense"]), "ours")
    model.set_adapter(["steering", "ours"])
    fit(model)
    assert "Other adapters" not in str(verify_adapter(model, "ours"))
    steer(model, "steering", feature_factor=-1.0)
    assert "the GRADIEND adapter 'steering' has other values than it had" in str(verify_adapter(model, "ours"))


def test_combined_adapters_are_fitted_beside_what_is_on_as_well():
    model = with_both("lora", "ours")
    fit(model)
    model.add_adapter(OF["erasure"].config(target_modules=["output.dense"], concept="other"), "second")
    model.set_adapter(["lora", "ours", "second"])
    fit_concept_erasure(model, BATCHES, "second", progress=False)
    assert [e["name"] for e in model.peft_config["second"].provenance["active_adapters"]] == ["lora", "ours"]
    combined = combine_adapters(model, ["ours", "second"], "both")
    assert [entry["name"] for entry in combined.provenance["active_adapters"]] == ["lora"]
    batches = {"ours": BATCHES, "second": small_batches("bert", count=1, seed=9)}
    said = said_by(
        lambda: combine_adapters(model, ["ours", "second"], "anew", batches=batches, progress=False), "being fitted"
    )
    assert len(said) == 1 and "the erasure 'both', the LORA adapter 'lora' are off" in said[0]
    assert model.peft_config["anew"].provenance["active_adapters"] == []


def test_a_gradiend_trainer_names_and_records_them_too(tmp_path: Path):
    model = adapted("llama", density=0.2)
    (name,) = model.peft_config
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "lora")
    model.set_adapter(name)
    (said,) = said_by(lambda: trainer_of(model, "llama", tmp_path).train(), "is being fitted")
    assert f"{name!r} is being fitted while the LORA adapter 'lora' is off" in said
    model.set_adapter(["lora", name])
    assert said_by(lambda: trainer_of(model, "llama", tmp_path).train(), "is being fitted") == []
    assert [entry["name"] for entry in model.peft_config[name].provenance["active_adapters"]] == ["lora"]
