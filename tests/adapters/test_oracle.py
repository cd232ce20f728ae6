"""The same calls on a LoRA and on an erasure give the same observations."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file

from hf_erasure import ConceptErasureConfig
from tests.adapters.lifecycle import Lifecycle
from tests.small_models import ARCHITECTURES, LABELS

pytestmark = pytest.mark.lifecycle
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def lora() -> peft.LoraConfig:
    return peft.LoraConfig(target_modules="all-linear", r=2)


def erasure() -> ConceptErasureConfig:
    return ConceptErasureConfig(concept="gender", labels=LABELS, target_modules="all-linear")


def raised(call: Any, *args: Any) -> str:
    """The type of the exception that a call raises, or a text where it raises none."""
    try:
        call(*args)
    except Exception as error:
        return type(error).__name__
    return "nothing"


def saved_in(folder: Path) -> dict[str, Any]:
    """The content of a folder: files, the modules that have tensors, and the fields every adapter's config has.

    Cards are left out: for a LoRA only a `PeftModel` writes one.
    """
    written = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    files = sorted(str(path.relative_to(folder)) for path in written)
    found: dict[str, Any] = {"files": files}
    for file in files:
        if file.endswith("adapter_model.safetensors"):
            found[file] = {_module_of(key) for key in load_file(folder / file)}
        elif file.endswith("adapter_config.json"):
            config = json.loads((folder / file).read_text())
            common = ("base_model_name_or_path", "task_type", "inference_mode", "auto_mapping", "revision")
            found[file] = {field: config[field] for field in common}
    return found


def _module_of(key: str) -> str:
    return key.partition(".lora_")[0].partition(".concept_erasure.")[0]


def trace_of_model(model: Any, config: Any, folder: Path) -> list[Any]:
    """What each of the calls on a transformers model gives."""
    seen: list[Any] = []

    def look(what: str) -> None:
        seen.append((what, model.active_adapters(), list(model.peft_config), model._hf_peft_config_loaded))

    model.add_adapter(config(), adapter_name="a")
    look("added a")
    model.add_adapter(config(), adapter_name="b")
    look("added b")
    model.set_adapter("a")
    look("set a")
    model.set_adapter(["b", "a"])
    look("set b, a")
    seen.append(("save two", raised(model.save_pretrained, folder / "two")))
    seen.append(("set unknown", raised(model.set_adapter, "nobody")))
    seen.append(("delete unknown", raised(model.delete_adapter, "nobody")))
    seen.append(("add a again", raised(model.add_adapter, config(), "a")))
    look("after refusals")
    model.disable_adapters()
    look("disabled")
    model.enable_adapters()
    look("enabled")
    model.set_adapter("b")
    model.save_pretrained(folder / "b")
    seen.append(("saved", saved_in(folder / "b")))
    seen.append(("state dict", {_module_of(f"base_model.model.{key}") for key in model.get_adapter_state_dict("a")}))
    model.delete_adapter("b")
    look("deleted b")
    model.load_adapter(folder / "b", adapter_name="c")
    look("loaded c")
    seen.append(("load c again", raised(model.load_adapter, folder / "b", "c")))
    model.delete_adapter(["a", "c"])
    seen.append(("deleted all", hasattr(model, "peft_config"), model._hf_peft_config_loaded))
    seen.append(("disable nothing", raised(model.disable_adapters)))
    model.add_adapter(config(), adapter_name="a")
    look("added a again")
    return seen


def trace_of_peft_model(base: Any, config: Any, folder: Path) -> list[Any]:
    """What each of the calls on a `PeftModel` gives."""
    seen: list[Any] = []
    model = peft.get_peft_model(base, config(), adapter_name="a")

    def look(what: str) -> None:
        status = model.get_model_status()
        fields = ("enabled", "active_adapters", "merged_adapters", "available_adapters")
        seen.append((what, model.active_adapters, model.active_adapter, list(model.peft_config)))
        seen.append({field: getattr(status, field) for field in fields})

    look("made")
    seen.append(type(model).__name__)
    model.add_adapter("b", config())
    look("added b")
    seen.append(("add b again", raised(model.add_adapter, "b", config())))
    model.set_adapter("b")
    look("set b")
    model.base_model.set_adapter(["a", "b"])
    look("set a, b")
    with model.disable_adapter():
        look("within disable_adapter")
    look("after disable_adapter")
    model.save_pretrained(folder)
    seen.append(("saved", saved_in(folder)))
    model.set_adapter("b")
    model.merge_adapter(["b"])
    look("merged b")
    seen.append(("delete a merged adapter", raised(model.delete_adapter, "b")))
    model.unmerge_adapter()
    look("unmerged")
    model.delete_adapter("b")
    look("deleted b")
    seen.append(("delete unknown", raised(model.delete_adapter, "nobody")))
    model.load_adapter(folder / "b", "c")
    look("loaded c")
    model.set_adapter("c")
    look("set c")
    plain = model.unload()
    seen.append(("unloaded", plain is base, hasattr(plain, "peft_config"), list(plain.state_dict())))
    return seen


@pytest.mark.parametrize("trace", [trace_of_model, trace_of_peft_model], ids=["transformers", "peft"])
@every_architecture
def test_verbs_do_what_they_do_for_lora(architecture: str, trace: Any, lifecycle: Lifecycle, tmp_path: Path):
    traces = {}
    for config in (lora, erasure):
        with warnings.catch_warnings():
            # Saving an erasure that was never fitted warns, on purpose; see test_verification.
            warnings.filterwarnings("ignore", message=".*was never fitted")
            traces[config.__name__] = trace(lifecycle.base(architecture), config, tmp_path / config.__name__)
    for expected, found in zip(traces["lora"], traces["erasure"], strict=True):
        assert found == expected
