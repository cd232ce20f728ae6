"""Malicious adapters: their code is not run, nothing is written, and the model stays as it was."""

from __future__ import annotations

import copy
import json
import pickle
import resource
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from hf_erasure import ConceptErasureConfig
from hf_erasure.adapters.common import tuner as patterns
from hf_erasure.adapters.loading import load
from hf_erasure.cli import app
from hf_erasure.fitting.checkpoint import FitCheckpoint
from hf_erasure.recipes.schema import read_content
from tests.adapters.hostile import (
    CONFIG,
    EVIL,
    SITE,
    WAYS,
    WEIGHTS,
    Bomb,
    at,
    fifo,
    folder_with,
    header,
    link,
    pickled,
    refused,
    retensor,
    rewrite,
    samples,
    set_,
    sites,
    sparse,
)
from tests.adapters.lifecycle import Cell, Lifecycle, config_of, fit
from tests.prepared import run, run_code
from tests.small_models import outputs_of, same, small_batch

CELL = Cell("bert", "norms", "output")
every_way = pytest.mark.parametrize("way", WAYS)

ERASURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    # tensors
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-5]), "is damaged"),
    "bytes behind the end": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"more"), "is damaged"),
    "empty file": (lambda f: (f / WEIGHTS).write_bytes(b""), "is damaged, or is not a safetensors file"),
    "endless header": (lambda f: header(f, 2**63, b"{}"), "is damaged, or is not a safetensors file"),
    "header of nonsense": (lambda f: header(f, 100, b"x" * 200), "is damaged"),
    "deep header": (lambda f: header(f, 200_000, b"[" * 200_000), "is damaged"),
    "4 TiB that are not there": (sparse, "of which most are not on disk"),
    "NaN": (lambda f: set_(f, "_left", torch.full((32, 1), torch.nan)), "not finite"),
    "infinity": (lambda f: set_(f, "_bias", torch.full((32,), torch.inf)), "not finite"),
    "beyond float32": (lambda f: set_(f, "_bias", torch.full((32,), 1e300, dtype=torch.float64)), "not finite"),
    "half precision": (lambda f: set_(f, "_left", torch.zeros(32, 1, dtype=torch.float16)), "has shape .* type F16"),
    "integers": (lambda f: set_(f, "_left", torch.zeros(32, 1, dtype=torch.int64)), "has shape .* type I64"),
    "transposed": (lambda f: set_(f, "_left", torch.zeros(1, 32)), r"has shape \[1, 32\]"),
    "no dimension": (lambda f: set_(f, "_left", torch.zeros(())), r"has shape \[\]"),
    "missing": (lambda f: retensor(f, lambda t: t.pop(at(f, "_right"))), "are missing in"),
    "nothing": (lambda f: retensor(f, dict.clear), "are missing in"),
    "another site": (
        lambda f: retensor(
            f, lambda t: t.update({"base_model.model.x.concept_erasure.concept_erasure_left": torch.zeros(1)})
        ),
        "do not belong to the erasure of 'gender'",
    ),
    "a weight of the base": (
        lambda f: retensor(f, lambda t: t.update({"base_model.model.pooler.dense.bias": torch.zeros(32)})),
        "'pooler.dense.bias' .* would change the model itself",
    ),
    "one twice": (
        lambda f: retensor(
            f, lambda t: t.update({at(f, "_left").removeprefix("base_model.model."): torch.zeros(32, 1)})
        ),
        "it has a tensor twice",
    ),
    # sizes
    "rank 10^9": (lambda f: sites(f, rank=10**9), "not a width with a rank of at most that"),
    "width and rank 10^9": (lambda f: sites(f, width=10**9, rank=10**9), "the two are not of the same adapter"),
    "negative rank": (lambda f: sites(f, rank=-1), "not a width with a rank"),
    "rank of text": (lambda f: sites(f, rank="1"), "fitted_sites=.* must be"),
    "rank that is true": (lambda f: sites(f, rank=True), "fitted_sites=.* must be"),
    "axis 10^9": (lambda f: sites(f, axis=10**9), "not a width with a rank"),
    "axis that is true": (lambda f: sites(f, axis=True), "fitted_sites=.* must be"),
    "one axis for the features and the examples": (lambda f: sites(f, axis=1, examples=1), "not a width with a rank"),
    "no rank": (lambda f: rewrite(f, fitted_sites={SITE: {}}), "not a width with a rank"),
    "10^4 sites": (
        lambda f: rewrite(f, fitted_sites={f"layer.{n}": {"width": 32, "rank": 1} for n in range(10**4)}),
        "are missing in",
    ),
    "10^5 targets": (
        lambda f: rewrite(f, target_modules=[f"{n}" for n in range(10**5)]),
        "target_modules names 100000",
    ),
    "a site that is not a module": (
        lambda f: rewrite(f, fitted_sites={"../../x": {"width": 1, "rank": 1}}),
        "are missing in",
    ),
    "a long configuration": (
        lambda f: (f / CONFIG).write_text(json.dumps({"peft_type": "x" * 2**25})),
        "no configuration is that long",
    ),
    # patterns
    "endless target": (
        lambda f: rewrite(f, target_modules=EVIL, fitted=False, fitted_sites=None),
        "never fitted, but",
    ),
    "endless exclusion": (lambda f: rewrite(f, exclude_modules=EVIL), "exclude_modules=.* takes longer than"),
    "endless layers": (
        lambda f: rewrite(f, layers_pattern=EVIL, layers_to_transform=[0]),
        "layers_pattern=.* is not a name of a module",
    ),
    "endless module to save": (
        lambda f: rewrite(f, modules_to_save=[EVIL]),
        "modules_to_save=.* is not a name of a module",
    ),
    "no pattern": (lambda f: rewrite(f, exclude_modules="("), "is not a regular expression"),
    "every module saved": (lambda f: rewrite(f, modules_to_save=[""]), "modules_to_save=.* is not a name of a module"),
    "a module saved that is not there": (lambda f: rewrite(f, modules_to_save=["pooler"]), "are missing in"),
    # configurations
    "no JSON": (lambda f: (f / CONFIG).write_text("{"), "is damaged"),
    "a list": (lambda f: (f / CONFIG).write_text("[]"), "which is not a configuration"),
    "a number": (lambda f: (f / CONFIG).write_text("3"), "which is not a configuration"),
    "NaN in JSON": (lambda f: (f / CONFIG).write_text('{"peft_type": NaN}'), "peft_type=nan, which this PEFT"),
    "no Unicode": (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe\x00"), "is damaged"),
    "deep JSON": (lambda f: (f / CONFIG).write_text("[" * 200_000 + "]" * 200_000), "nested too deeply"),
    "a number of a million digits": (
        lambda f: (f / CONFIG).write_text('{"peft_type": "CONCEPT_ERASURE", "rank": %s}' % ("9" * 10**6)),
        "is damaged",
    ),
    "unknown type": (
        lambda f: rewrite(f, peft_type="NO_SUCH"),
        "peft_type='NO_SUCH', which this PEFT does not know",
    ),
    "type that is a list": (lambda f: rewrite(f, peft_type=[1]), r"peft_type=\[1\], which this PEFT"),
    "no type": (lambda f: rewrite(f, peft_type=None), "peft_type=None, which this PEFT"),
    "unknown task": (lambda f: rewrite(f, task_type="NO_SUCH"), "Invalid task type"),
    "labels of numbers": (lambda f: rewrite(f, labels=[1, 2]), "labels=.* must be"),
    "a concept that is an object": (lambda f: rewrite(f, concept={"a": 1}), "concept=.* must be str"),
    "targets that are objects": (lambda f: rewrite(f, target_modules=[{}]), "target_modules=.* must be"),
    "provenance that is text": (lambda f: rewrite(f, provenance="x"), "provenance=.* must be"),
    "a fingerprint that is text": (
        lambda f: rewrite(f, provenance={"fingerprint": "x"}),
        "is not what fitting writes there",
    ),
    "samples outside": (lambda f: samples(f, positions=[10**12], values=[0.0]), "is not a sample"),
    "negative positions": (lambda f: samples(f, positions=[-1], values=[0.0]), "is not a sample"),
    "samples of text": (lambda f: samples(f, values=["x"]), "is not a sample"),
    "samples of another length": (lambda f: samples(f, values=[0.0]), "is not a sample"),
    "samples of a dtype": (lambda f: samples(f, dtype="__class__"), "is not a sample"),
    # files
    "a pickle": (lambda f: pickled(f, "adapter_model.bin"), "pickle, which could run any code and is never loaded"),
    "a pickle in disguise": (lambda f: pickled(f, WEIGHTS), "is damaged, or is not a safetensors file"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), "has no adapter_model.safetensors"),
    "weights elsewhere": (lambda f: link(f, WEIGHTS), "is a link to a place outside of its folder"),
    "a configuration elsewhere": (lambda f: link(f, CONFIG), "is a link to a place outside of its folder"),
    "a link to nothing": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("nothing")),
        "nothing|No such file",
    ),
    "weights that are a device": (
        lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).symlink_to("/dev/zero")),
        "is a link to a place outside of its folder",
    ),
    "weights that are a pipe": (lambda f: fifo(f, WEIGHTS), "is not an ordinary file"),
    "weights that are a folder": (lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir()), "is not an ordinary file"),
}


@pytest.fixture(scope="module")
def present(lifecycle: Lifecycle) -> peft.PeftModel:
    """A `PeftModel` with an adapter; tests must not change it."""
    return peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL, seed=200))


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The time limit for matching is a tenth of the usual one."""
    monkeypatch.setattr("hf_erasure.adapters.common.tuner._SECONDS_A_MATCH", 0.05)


@pytest.mark.filterwarnings("ignore:Unexpected keyword arguments")
@pytest.mark.parametrize("harm", ERASURES)
def test_erasures(harm: str, present: peft.PeftModel, lifecycle: Lifecycle, tmp_path: Path):
    """Each harm is tried in the three ways in which an adapter can be loaded."""
    make, words = ERASURES[harm]
    folder = folder_with(make, lifecycle.folder(CELL), tmp_path / "evil")
    model = lifecycle.base("bert")
    for way in WAYS[:2]:  # on one model in turn, since each way leaves it as it was
        refused(way, model, folder, words)
    refused(WAYS[2], copy.deepcopy(present), folder, words)


# ---- what must go on working -----------------------------------------------------------------------------------------


def cached(folder: Path, cache: Path) -> Path:
    """Put the files of a folder into a cache of the Hub as the repository `user/name`; return the snapshot."""
    repository = cache / "models--user--name"
    snapshot, blobs = repository / "snapshots" / ("0" * 40), repository / "blobs"
    for place in (snapshot, blobs, repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    for number, file in enumerate(sorted(folder.iterdir())):
        shutil.copyfile(file, blobs / f"{number}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number}")
    return snapshot


@pytest.mark.parametrize("by", ["path", "id"])
@every_way
def test_a_repository_in_a_cache_of_the_hub_is_made_of_links(way: str, by: str, lifecycle: Lifecycle, tmp_path: Path):
    """It loads as a folder, and by its name without a request to the Hub."""
    snapshot = cached(lifecycle.folder(CELL), tmp_path)
    name, where = (str(snapshot), {}) if by == "path" else ("user/name", {"cache_dir": str(tmp_path)})
    model = lifecycle.base("bert")
    if way == "from_pretrained":
        model = peft.PeftModel.from_pretrained(model, name, "newcomer", **where)
    elif way == "load_adapter":
        model.load_adapter(name, "newcomer", adapter_kwargs=where)
    else:
        model = peft.PeftModel.from_pretrained(model, lifecycle.folder(CELL, seed=200))
        model.load_adapter(name, "newcomer", **where)
    model.set_adapter("newcomer")
    assert same(outputs_of(model, small_batch("bert")), outputs_of(lifecycle.fitted(CELL), small_batch("bert")))


@pytest.mark.parametrize("way", WAYS[:2])
def test_a_repository_with_nothing_but_a_pickle(way: str, lifecycle: Lifecycle, tmp_path: Path):
    folder = folder_with(lambda f: pickled(f, "adapter_model.bin"), lifecycle.folder(CELL), tmp_path / "evil")
    cached(folder, tmp_path / "cache")
    model = lifecycle.base("bert")
    with pytest.raises((ValueError, OSError)):
        if way == "load_adapter":
            model.load_adapter("user/name", adapter_kwargs={"cache_dir": str(tmp_path / "cache")})
        else:
            peft.PeftModel.from_pretrained(model, "user/name", cache_dir=str(tmp_path / "cache"))
    assert not (folder / "executed").exists() and not hasattr(model, "peft_config")


def test_an_unfitted_adapter_with_an_endless_pattern(lifecycle: Lifecycle, tmp_path: Path):
    """Only an unfitted adapter's pattern is matched, to find its targets; harmless ones match as with PEFT."""
    evil, good = tmp_path / "evil", tmp_path / "good"
    with pytest.warns(UserWarning, match="never fitted"):
        ConceptErasureConfig(labels=["a", "b"], target_modules=EVIL).save_pretrained(evil)
        ConceptErasureConfig(labels=["a", "b"], target_modules=r"encoder\.layer\.\d\.output\.dense").save_pretrained(
            good
        )
    for folder in (evil, good):
        save_file({}, folder / WEIGHTS, metadata={"format": "pt"})
    refused("load_adapter", lifecycle.base("bert"), evil, "target_modules=.* takes longer than .* a list of names")
    model = lifecycle.base("bert")
    model.load_adapter(str(good))
    assert [m.path for m in model.modules() if hasattr(m, "path")] == [
        f"encoder.layer.{n}.output.dense" for n in (0, 1)
    ]


def test_an_unknown_field_is_left_out_as_by_peft(lifecycle: Lifecycle, tmp_path: Path):
    """Newer releases of PEFT add fields; a damaged or mistyped name shows in the warning."""
    folder = folder_with(lambda f: rewrite(f, brand_new=1), lifecycle.folder(CELL), tmp_path / "new")
    model = lifecycle.base("bert")
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['brand_new'\]"):
        model.load_adapter(str(folder))
    assert same(outputs_of(model, small_batch("bert")), outputs_of(lifecycle.fitted(CELL), small_batch("bert")))


def test_use_safetensors_false_is_refused(lifecycle: Lifecycle, tmp_path: Path):
    """With `use_safetensors=False` transformers prefers a pickle to the safetensors file beside it."""
    folder = tmp_path / "both"
    shutil.copytree(lifecycle.folder(CELL), folder)
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(folder / "executed")))
    model = lifecycle.base("bert")
    with pytest.raises(ValueError, match="use_safetensors=False would load a pickle"):
        model.load_adapter(str(folder), use_safetensors=False)
    assert not (folder / "executed").exists()
    model.load_adapter(str(folder))


@pytest.mark.parametrize("name", ["../evil", "a/b", "a\\b", "..", ".", "", "a\0b", "a.b"])
def test_names_of_adapters_that_lead_elsewhere(name: str, lifecycle: Lifecycle):
    model = lifecycle.base("bert")
    with pytest.raises(ValueError, match=r"adapter_name=.* cannot be used"):
        peft.get_peft_model(model, ConceptErasureConfig(labels=["a", "b"]), adapter_name=name)
    assert not hasattr(model, "peft_config")


def test_files_that_cannot_be_looked_at_are_not_loaded(lifecycle: Lifecycle, monkeypatch: pytest.MonkeyPatch):
    """A server may answer the first request with an error, and the second one with an adapter."""

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("503 Service Unavailable")

    of = load.Source.of
    monkeypatch.setattr(load.Source, "of", lambda *given: replace(of(*given), is_folder=False))
    monkeypatch.setattr(load, "hf_hub_download", fail)
    for way in WAYS[:2]:
        refused(way, lifecycle.base("bert"), lifecycle.folder(CELL), "could not be checked before they are loaded")


def test_patterns_match_as_those_of_re():
    config = ConceptErasureConfig(labels=["a", "b"], target_modules=r".*\.(query|value)", exclude_modules=r".*\.0\..*")
    plain = patterns.resolve_patterns(config, "layer.0.query", "layer.1.query", "layer.1.query_", "layer.1.key")
    assert plain.target_modules == {"layer.0.query", "layer.1.query"} and plain.exclude_modules == {"layer.0.query"}
    assert config.target_modules == r".*\.(query|value)"


SAVED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "NaN": (
        lambda f: retensor(f, lambda t: t[at(f, "pooler.dense.bias")].fill_(torch.nan)),
        "modules_to_save.* not finite",
    ),
    "wrong shape": (
        lambda f: set_(f, "pooler.dense.bias", torch.zeros(3)),
        r"has shape \[3\]; in this model it has \[32\]",
    ),
    "missing": (lambda f: retensor(f, lambda t: t.pop(at(f, "pooler.dense.bias"))), "modules_to_save.* are missing in"),
    "another module": (
        lambda f: retensor(f, lambda t: t.update({"base_model.model.encoder.x": torch.zeros(1)})),
        "nor to .*modules_to_save=.*: they would change the model itself",
    ),
}


@pytest.mark.parametrize("harm", SAVED)
def test_modules_to_save(harm: str, lifecycle: Lifecycle, tmp_path: Path):
    """The last load is over an adapter of the same name, whose copies of modules must stay."""
    model = lifecycle.base("bert")
    model.add_adapter(config_of(CELL, modules_to_save=["pooler"]), adapter_name="default")
    fit(model, "bert", "default")
    model.save_pretrained(tmp_path / "good")
    make, words = SAVED[harm]
    folder = folder_with(make, tmp_path / "good", tmp_path / "evil")
    for way in WAYS[:2]:
        refused(way, lifecycle.base("bert"), folder, words)
    present = peft.PeftModel.from_pretrained(lifecycle.base("bert"), tmp_path / "good")
    refused("PeftModel.load_adapter", present, folder, words, "default")


# ---- other files that are read ---------------------------------------------------------------------------------------


def test_a_recipe_runs_nothing(tmp_path: Path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: !!python/object/apply:os.mkdir [{str(tmp_path / 'executed')!r}]\n")
    with pytest.raises(ValueError, match="is not YAML"):
        read_content(recipe, [], "model")
    with pytest.raises((ValueError, yaml.YAMLError)):
        read_content(
            _recipe(tmp_path), [f"model=!!python/object/apply:os.mkdir [{str(tmp_path / 'executed')!r}]"], "model"
        )
    assert not (tmp_path / "executed").exists()


def _recipe(folder: Path) -> Path:
    (folder / "plain.yaml").write_text("model: bert\n")
    return folder / "plain.yaml"


def test_a_checkpoint_of_a_fit_runs_nothing(tmp_path: Path):
    config = ConceptErasureConfig(labels=["a", "b"])
    kept = FitCheckpoint(tmp_path, config, ["site"], pool="tokens", sequential=True)
    (tmp_path / "site-0000.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    (tmp_path / "moments-labelled.safetensors").write_bytes(pickle.dumps(Bomb(tmp_path / "executed")))
    with pytest.raises(SafetensorError):
        kept.load_sites("data")
    with pytest.raises(SafetensorError):
        kept.load_moments("labelled", 2)
    (tmp_path / "fit.json").write_text("[" * 10)
    with pytest.raises(ValueError, match="Expecting value"):
        FitCheckpoint(tmp_path, config, ["site"], pool="tokens", sequential=True)
    assert not (tmp_path / "executed").exists()


def test_the_command_line_refuses_a_pickle(lifecycle: Lifecycle, tmp_path: Path):
    folder = folder_with(lambda f: pickled(f, "adapter_model.bin"), lifecycle.folder(CELL), tmp_path / "evil")
    arguments = ["merge", str(lifecycle.base_folder("bert")), str(folder), str(tmp_path / "merged")]
    ran = CliRunner().invoke(app, arguments)
    assert ran.exit_code and "is never loaded" in f"{ran.output}{ran.exception}"
    assert not (folder / "executed").exists() and not (tmp_path / "merged").exists()


# ---- memory ----------------------------------------------------------------------------------------------------------

BOUNDED = ("rank 10^9", "width and rank 10^9", "4 TiB that are not there", "10^4 sites", "deep JSON", "endless header")


def test_memory_is_bounded(lifecycle: Lifecycle, tmp_path: Path):
    """The process may use one GiB more than before it loads, and no load fails for lack of memory."""
    for harm in BOUNDED:
        folder_with(ERASURES[harm][0], lifecycle.folder(CELL), tmp_path / harm)
    script = f"""
import resource, transformers, torch, hf_erasure
from pathlib import Path
model = transformers.AutoModel.from_pretrained({str(lifecycle.base_folder("bert"))!r})
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
for harm in {BOUNDED!r}:
    try:
        model.load_adapter({str(tmp_path)!r} + "/" + harm)
    except (ValueError, TypeError, OSError) as error:
        print(harm, "|", type(error).__name__, "|", error)
model.load_adapter({str(lifecycle.folder(CELL))!r})
print("loaded")
"""
    assert resource.getrlimit(resource.RLIMIT_AS)[1] == resource.RLIM_INFINITY
    ran = run(run_code, script, folder=tmp_path)
    assert ran.returncode == 0, ran.stderr[-2000:]
    *lines, last = ran.stdout.splitlines()
    assert [line.split(" | ")[0] for line in lines] == list(BOUNDED) and last == "loaded"
    assert not [line for line in lines if "allocat" in line]
