"""The member that is added to PEFT's closed enum behaves like the original members."""

from __future__ import annotations

import copy
import importlib
import json
import pickle
import shutil
import warnings
from importlib.metadata import version
from pathlib import Path

import numpy as np
import peft
import pytest
from packaging.version import Version
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils.peft_types import PeftType

import hf_erasure
from hf_erasure import ConceptErasureConfig, patches
from hf_erasure.adapters import ConceptErasureModel, internals
from hf_erasure.adapters.common import acting
from hf_erasure.adapters.internals import INTERNALS, check_internals, check_versions
from tests.adapters.lifecycle import NAME, Cell, Lifecycle
from tests.prepared import TRANSFORMERS, Ended, run, run_code
from tests.small_models import LABELS, outputs_of, same, small_batch

MEMBER = PeftType("CONCEPT_ERASURE")
CELL = Cell("bert", "norms", "output")


def test_it_is_a_member_in_every_way_an_enum_can_be_asked():
    assert isinstance(MEMBER, PeftType) and isinstance(MEMBER, str)
    assert MEMBER == MEMBER.value == MEMBER.name == "CONCEPT_ERASURE"
    assert PeftType.CONCEPT_ERASURE is PeftType["CONCEPT_ERASURE"] is MEMBER
    assert MEMBER in PeftType and list(PeftType).count(MEMBER) == 1
    assert {MEMBER: 1}[PeftType("CONCEPT_ERASURE")] == 1


def test_peft_knows_the_type():
    assert PEFT_TYPE_TO_CONFIG_MAPPING[MEMBER] is ConceptErasureConfig
    assert PEFT_TYPE_TO_TUNER_MAPPING[MEMBER] is ConceptErasureModel
    assert PEFT_TYPE_TO_PREFIX_MAPPING[MEMBER] == ConceptErasureModel.prefix == "concept_erasure_"


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_the_member_are_the_member(way):
    assert way(MEMBER) is MEMBER
    assert way({"type": [MEMBER]})["type"][0] is MEMBER


def full_config() -> ConceptErasureConfig:
    return ConceptErasureConfig(
        concept="gender",
        labels=LABELS,
        target_modules=["b", "a"],
        exclude_modules=["c"],
        layers_to_transform=[0, 1],
        layers_pattern="layer",
        site="input",
        method="orth",
        affine=False,
        rank=1,
        sticky=True,
        fitted=True,
        fitted_sites={"layer.0.a": {"width": 4, "rank": 1}},
        provenance={"leakage": {"layer.0.a": [0.5, 0.0]}},
    )


@pytest.mark.parametrize("way", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_of_a_config_are_equal(way):
    copied = way(full_config())
    assert copied == full_config() and copied.peft_type is MEMBER


def test_names_whose_order_counts_are_not_a_set():
    with pytest.raises(TypeError, match="is a set, but the order counts: write a list"):
        ConceptErasureConfig(labels={"female", "male"})
    assert ConceptErasureConfig(labels=("b", "a"), target_modules={"x"}, layers_to_transform=range(2)).labels == [
        "b",
        "a",
    ]


def test_values_that_are_not_of_json_become_such(tmp_path):
    config = ConceptErasureConfig(
        labels=("a", "b"), rank=np.int64(1), strength=np.float32(0.5), layers_to_transform=[np.int64(0)]
    )
    config.target = (np.float32(0.25), 0.75)
    config.__post_init__()
    with pytest.warns(UserWarning, match="never fitted"):
        config.save_pretrained(tmp_path)
    assert ConceptErasureConfig.from_pretrained(tmp_path) == config


def test_a_config_goes_through_json(tmp_path):
    full_config().save_pretrained(tmp_path)
    for loader in (ConceptErasureConfig, peft.PeftConfig):
        loaded = loader.from_pretrained(tmp_path)
        assert loaded == full_config() and loaded.peft_type is MEMBER
    written = (tmp_path / "adapter_config.json").read_text()
    assert json.loads(written)["peft_type"] == "CONCEPT_ERASURE"
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "adapter_config.json").read_text() == written


def wrapped_depth(function) -> int:
    depth = 0
    while hasattr(function, "__wrapped__"):
        function, depth = function.__wrapped__, depth + 1
    return depth


def test_registering_and_installing_again_changes_nothing(lifecycle: Lifecycle):
    before = (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING))
    depth = wrapped_depth(peft.PeftModel.load_adapter)
    for _ in range(3):
        assert internals.extend_peft_type("CONCEPT_ERASURE") is MEMBER
        internals.register("concept_erasure", ConceptErasureConfig, ConceptErasureModel)
        patches.install()
    assert (list(PeftType), dict(PEFT_TYPE_TO_TUNER_MAPPING), dict(PEFT_TYPE_TO_CONFIG_MAPPING)) == before
    assert wrapped_depth(peft.PeftModel.load_adapter) == depth


def test_a_name_of_pefts_own_is_refused():
    with pytest.raises(ImportError, match=r"already has a PeftType\.LORA"):
        internals.extend_peft_type("LORA")


@pytest.mark.parametrize(
    "module", [hf_erasure, hf_erasure.adapters, internals, acting, patches], ids=lambda m: m.__name__
)
def test_a_module_can_be_reloaded(module, lifecycle: Lifecycle):
    importlib.reload(module)
    assert PeftType("CONCEPT_ERASURE") is MEMBER and list(PeftType).count(MEMBER) == 1
    model = lifecycle.base("bert")
    model.load_adapter(lifecycle.folder(CELL), adapter_name=NAME)
    assert same(outputs_of(model, small_batch("bert")), outputs_of(lifecycle.fitted(CELL), small_batch("bert")))


def where_it_is_not_imported(program: str, folder: Path) -> Ended:
    return run(run_code, program, folder=folder, kind=TRANSFORMERS)


def test_everything_can_be_reloaded_at_once(lifecycle: Lifecycle, tmp_path: Path):
    """A notebook with autoreload does this. It runs in its own process, since a reload replaces the classes."""
    program = f"""
import importlib, sys, hf_erasure, transformers
for name in [n for n in sys.modules if n.startswith("hf_erasure.adapters.")] + ["hf_erasure.adapters", "hf_erasure"]:
    importlib.reload(sys.modules[name])
model = transformers.AutoModel.from_pretrained({str(lifecycle.folder(CELL))!r})
assert type(model.peft_config["default"]) is hf_erasure.ConceptErasureConfig
assert hf_erasure.verify_adapter(model), str(hf_erasure.verify_adapter(model))
model.add_adapter(hf_erasure.ConceptErasureConfig(labels=["a", "b"]), adapter_name="second")
model.delete_adapter(["default", "second"])
"""
    done = where_it_is_not_imported(program, tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_process_that_knows_only_peft_loads_after_one_import(lifecycle: Lifecycle, tmp_path: Path):
    program = f"""
import hf_erasure, peft, transformers
base = transformers.AutoModel.from_pretrained({str(lifecycle.base_folder("bert"))!r})
model = peft.PeftModel.from_pretrained(base, {str(lifecycle.folder(CELL))!r})
print(model.peft_type.value, len(model.targeted_module_names))
"""
    done = where_it_is_not_imported(program, tmp_path)
    assert done.stdout.split() == ["CONCEPT_ERASURE", str(len(CELL.parts.norms))], done.stderr


WITHOUT_THE_IMPORT = """
import json, pathlib, peft, sys, transformers

folder, base = pathlib.Path({folder!r}), {base!r}
config = json.loads((folder / "adapter_config.json").read_text())
changes = {{
    "as it is": {{}},
    "auto_mapping": {{"auto_mapping": {{"base_model_class": "ConceptErasureConfig", "parent_library": "hf_erasure"}}}},
    "auto_map": {{"auto_map": {{"AutoModel": "hf_erasure.ConceptErasureConfig"}}}},
    "no peft_type": {{"peft_type": None}},
}}
ways = [
    lambda: peft.PeftModel.from_pretrained(transformers.AutoModel.from_pretrained(base), folder),
    lambda: peft.AutoPeftModel.from_pretrained(str(folder)),
    lambda: transformers.AutoModel.from_pretrained(base).load_adapter(str(folder)),
    lambda: transformers.AutoModel.from_pretrained(str(folder), trust_remote_code=True),
]
for name, change in changes.items():
    changed = {{key: value for key, value in (config | change).items() if (key, value) != ("peft_type", None)}}
    (folder / "adapter_config.json").write_text(json.dumps(changed))
    for way in ways:
        try:
            way()
        except (KeyError, TypeError) as error:
            print(name, type(error).__name__, "peft_type" in str(error), "hf_erasure" in sys.modules, sep=" | ")
        else:
            print(name, "loaded", sep=" | ")
"""


@pytest.mark.skipif(Version(version("peft")) < Version("0.21"), reason="the page says what PEFT 0.21 does")
def test_nothing_in_a_folder_makes_peft_import_the_package(lifecycle: Lifecycle, tmp_path: Path):
    """`docs/how-to/troubleshooting.md` says this was tried; where it fails, a release of PEFT can do more now."""
    folder = Path(shutil.copytree(lifecycle.folder(CELL), tmp_path / "adapter"))
    program = WITHOUT_THE_IMPORT.format(folder=str(folder), base=str(lifecycle.base_folder("bert")))
    done = where_it_is_not_imported(program, tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split(" | ") for line in done.stdout.splitlines() if " | " in line]
    assert len(found) == 16
    for change, error, names_the_type, imported in found:
        assert imported == "False"
        if change == "no peft_type":
            assert names_the_type == "True"
        else:
            assert error == "KeyError" and names_the_type == "False"


# How a release could differ → a change that imitates it, and what the message says is missing.
DIFFERENT = {
    "a method is gone": (
        "from peft.tuners.tuners_utils import BaseTuner; del BaseTuner._check_merge_allowed",
        "peft.tuners.tuners_utils.BaseTuner._check_merge_allowed, which peft VERSION does not have",
    ),
    "a module is gone": (
        "import sys, peft; sys.modules['peft.tuners._buffer_dict'] = None",
        "the module peft.tuners._buffer_dict, which peft VERSION does not have",
    ),
    "a parameter is gone": (
        "import peft; peft.PeftModel.load_adapter = lambda self, model_id: None",
        "the parameter 'adapter_name' of peft.peft_model.PeftModel.load_adapter, which peft VERSION does not have",
    ),
    "a method of transformers is gone": (
        "from transformers.integrations.peft import PeftAdapterMixin; del PeftAdapterMixin.set_adapter",
        "transformers.integrations.peft.PeftAdapterMixin.set_adapter, which transformers VERSION does not have",
    ),
    "a function of torch is gone": (
        "import peft, torch.utils._python_dispatch as dispatch; del dispatch._push_mode",
        "torch.utils._python_dispatch._push_mode, which torch VERSION does not have",
    ),
}


# Each runs in its own process; one of them is enough outside of the slow tests.
@pytest.mark.parametrize(
    "difference",
    [name if name == "a method is gone" else pytest.param(name, marks=pytest.mark.slow) for name in DIFFERENT],
)
def test_a_release_without_what_is_relied_on_fails_at_import(difference: str, tmp_path: Path):
    """The error names what is missing, the release that lacks it, and what to install."""
    change, message = DIFFERENT[difference]
    done = where_it_is_not_imported(f"{change}\nimport hf_erasure", tmp_path)
    package = message.split("VERSION")[0].split()[-1]
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: hf_erasure relies on {message.replace('VERSION', version(package))}"), last
    assert f"pip install hf-erasure, or a release of hf-erasure made for this {package}." in last


def test_every_internal_is_there_and_named_once():
    check_internals()
    names = [(internal.module, internal.name) for internal in INTERNALS]
    assert len(set(names)) == len(names)


def test_a_transformers_that_demands_a_newer_peft_is_named_at_import():
    with pytest.warns(
        UserWarning, match=r"demands peft>=99\.0, and peft .* pip install 'peft>=99\.0', or.*'transformers<"
    ):
        check_versions("99.0")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_versions("0.1")
        check_versions(None)  # a release without a demand
        check_versions()  # the pair that is installed
