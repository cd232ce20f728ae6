"""A save happens whole or not at all: killed processes, processes that save at once, folders with other content."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
from safetensors.torch import load_file, save_file

from hf_erasure import ConceptErasureConfig
from hf_erasure.adapters import saving
from hf_erasure.adapters.common.files import root_of, target_of
from hf_erasure.adapters.saving import ON_STAGED, finish_save, staged_save
from tests.adapters import saving_processes
from tests.adapters.gradiend import lifecycle as gradiend
from tests.adapters.lifecycle import Cell, Lifecycle
from tests.prepared import run
from tests.small_models import LABELS, outputs_of, same, small_batch

CELL = Cell("bert", "norms", "output")
FILES = {"adapter_config.json", "adapter_model.safetensors"}
NEW_WHILE_LOADED = "was saved anew while it was being loaded"


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of the processes of `saving_processes`."""
    ran = run(saving_processes.find_all, folder=tmp_path_factory.mktemp("killed"))
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.fixture
def hooks() -> Iterator[list]:
    """The functions that write files beside an adapter; those that a test adds are removed after it."""
    before = ON_STAGED[:]
    yield ON_STAGED
    ON_STAGED[:] = before


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


# ---- killed ----------------------------------------------------------------------------------------------------------


def test_a_killed_save_leaves_the_old_adapter_or_the_new_one(killed: dict[str, Any]):
    found = [place for (place,) in killed["model_saves"]["found"]]
    turn = found.index("new")
    assert found == ["old"] * turn + ["new"] * (len(found) - turn)
    # Some kills came before the new adapter was committed, and some between the commit and the end.
    assert turn > 10 and len(found) - turn > 5


def test_a_killed_save_of_a_peft_model_leaves_each_adapter_whole(killed: dict[str, Any]):
    found = Counter(map(tuple, killed["peft_model_saves"]["found"]))
    assert found.keys() == {("old", "old"), ("old", "new"), ("new", "new")}


def test_a_killed_first_save_leaves_nothing_or_all(killed: dict[str, Any]):
    assert Counter(killed["first_save"]["found"]).keys() == {"nothing", "new"}


def test_the_next_save_removes_what_a_killed_one_left(killed: dict[str, Any]):
    assert killed["model_saves"]["left"] == killed["peft_model_saves"]["left"] == []


def test_without_staging_the_same_kills_leave_a_mix(killed: dict[str, Any]):
    """The control: the tests above would show a mix if there were one."""
    assert any("are missing" in place for (place,) in killed["model_saves_unstaged"]["found"])


def test_processes_that_save_at_once_do_not_mix(killed: dict[str, Any]):
    found = killed["at_once"]
    assert {what for what in found["found"] if NEW_WHILE_LOADED not in what} <= {"old", "new"}
    assert found["ended"] == [0, 0] and found["last"] in ("old", "new")
    assert set(found["left"]) - {"README.md"} == FILES


# ---- one process -----------------------------------------------------------------------------------------------------


def test_nothing_but_the_adapter_is_left(lifecycle: Lifecycle, tmp_path: Path):
    """Another save into the same folder may begin and end in the middle of one; the last to commit wins."""
    first, second = lifecycle.fitted(CELL), lifecycle.fitted(CELL, seed=200)
    with staged_save(tmp_path) as content:
        (content / "adapter_config.json").write_text("{}")
        second.save_pretrained(tmp_path)
        assert content.exists()
    assert (tmp_path / "adapter_config.json").read_text() == "{}"
    (tmp_path / "adapter_config.json").unlink()
    first.save_pretrained(tmp_path)
    assert names(tmp_path) - {"README.md"} == FILES
    again = lifecycle.base("bert")
    again.load_adapter(str(tmp_path))
    assert same(outputs_of(again, small_batch("bert")), outputs_of(first, small_batch("bert")))


def test_a_failed_save_changes_nothing(lifecycle: Lifecycle, tmp_path: Path, hooks: list):
    folder = tmp_path / "adapter"
    shutil.copytree(lifecycle.folder(CELL), folder)
    before = {name: (folder / name).read_bytes() for name in names(folder)}

    def fail(*_: Any) -> None:
        raise OSError("no space left")

    hooks.append(fail)
    with pytest.raises(OSError, match="no space left"):
        lifecycle.fitted(CELL, seed=200).save_pretrained(folder)
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before


def test_what_a_hook_writes_is_saved_with_the_adapter(lifecycle: Lifecycle, tmp_path: Path, hooks: list):
    told, kept = [], [lifecycle.folder(CELL), lifecycle.folder(CELL, seed=200)]

    def write(folder: Path, model: Any, name: str) -> None:
        assert names(folder) >= FILES and load_file(folder / "adapter_model.safetensors")
        card = (folder / "README.md").read_text() if (folder / "README.md").exists() else None
        told.append((model, name, target_of(folder), target_of(root_of(folder)), card))
        (folder / "plot.svg").write_text(name)

    hooks[:] = [write]
    model = lifecycle.fitted(CELL, "default")
    (tmp_path / "README.md").write_text("written by hand")
    model.save_pretrained(tmp_path)
    assert told == [(model, "default", tmp_path, tmp_path, "written by hand")]
    assert (tmp_path / "plot.svg").read_text() == "default"
    told.clear()
    wrapped = peft.PeftModel.from_pretrained(lifecycle.base("bert"), kept[0])
    wrapped.load_adapter(kept[1], "other")
    (tmp_path / "both" / "other").mkdir(parents=True)
    (tmp_path / "both" / "other" / "README.md").write_text("also by hand")
    wrapped.save_pretrained(tmp_path / "both")
    both = tmp_path / "both"
    assert [row[1:4] for row in told] == [("default", both, both), ("other", both / "other", both)]
    assert told[1][4] == "also by hand" and (both / "other" / "plot.svg").read_text() == "other"


def test_a_pushed_folder_is_complete_before_it_is_uploaded(
    lifecycle: Lifecycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, pushed = lifecycle.fitted(CELL), []

    def push(repo_id: str, **options: Any) -> None:
        pushed.append((repo_id, options, names(tmp_path / "mine") >= FILES))

    monkeypatch.setattr(model, "push_to_hub", push)
    model.save_pretrained(tmp_path / "mine", push_to_hub=True, token="t", commit_message="m", private=True)
    assert pushed == [("mine", {"token": "t", "commit_message": "m", "private": True}, True)]


def test_an_adapter_is_one_file_however_small_the_shards(lifecycle: Lifecycle, tmp_path: Path):
    lifecycle.fitted(CELL).save_pretrained(tmp_path, max_shard_size="1KB")
    assert names(tmp_path) - {"README.md"} == FILES


def test_the_models_own_embeddings_are_not_saved(lifecycle: Lifecycle, tmp_path: Path):
    """PEFT would add them after the vocabulary was resized, and loading would overwrite those of the base."""
    model = lifecycle.fitted(CELL)
    model.resize_token_embeddings(80)
    model.save_pretrained(tmp_path / "added")
    wrapped = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL))
    wrapped.get_base_model().resize_token_embeddings(80)
    wrapped.save_pretrained(tmp_path / "wrapped")
    for place in ("added", "wrapped"):
        assert all("concept_erasure" in key for key in load_file(tmp_path / place / "adapter_model.safetensors"))
    with pytest.raises(ValueError, match="save_embedding_layers=True would put the model's own embeddings"):
        wrapped.save_pretrained(tmp_path / "more", save_embedding_layers=True)


def test_a_pickle_is_not_written(lifecycle: Lifecycle, tmp_path: Path):
    wrapped = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL))
    with pytest.raises(ValueError, match="safe_serialization=False would write a pickle"):
        wrapped.save_pretrained(tmp_path, safe_serialization=False)
    assert not names(tmp_path)


def test_a_process_that_is_not_the_main_one_writes_nothing(lifecycle: Lifecycle, tmp_path: Path):
    model = lifecycle.fitted(CELL)
    model.save_pretrained(tmp_path, is_main_process=False)
    wrapped = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL))
    wrapped.save_pretrained(tmp_path, is_main_process=False)
    assert not names(tmp_path)


def test_a_file_system_without_locks(lifecycle: Lifecycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Some network file systems are such: a save still happens whole or not at all, and leaves no other files."""

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock; use SoftFileLock instead")

    monkeypatch.setattr(saving.FileLock, "acquire", refuse)
    (tmp_path / f"{saving.STAGING}1.lock").write_text("")  # its writer may still run
    lifecycle.fitted(CELL).save_pretrained(tmp_path)
    assert names(tmp_path) - {"README.md"} == {*FILES, f"{saving.STAGING}1.lock"}


# ---- folders with other content --------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", ["LORA", "GRADIEND", "damaged"])
@pytest.mark.parametrize("way", ["add_adapter", "PeftModel", "PeftModel, below"])
def test_another_adapter_is_not_overwritten(there: str, way: str, lifecycle: Lifecycle, tmp_path: Path):
    place = tmp_path / "other" if way == "PeftModel, below" else tmp_path
    if there == "damaged":
        place.mkdir(exist_ok=True)
        (place / "adapter_config.json").write_text("{")
        words = "holds an adapter already, of a kind that cannot be told"
    else:
        other = lifecycle.base("bert")
        config = peft.LoraConfig(target_modules=["query"]) if there == "LORA" else gradiend.config_of()
        other.add_adapter(config)
        if there == "GRADIEND":
            gradiend.fit(other, "default")
        other.save_pretrained(place)
        words = f"holds a {there} adapter, which the erasure of 'gender' would overwrite. Save it into another folder"
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path) if (tmp_path / name).is_file()}
    if way == "add_adapter":
        model = lifecycle.fitted(CELL)
    else:
        model = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL))
        if way == "PeftModel, below":
            model.load_adapter(lifecycle.folder(CELL), "other")
    with pytest.raises(ValueError, match=words):
        model.save_pretrained(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert names(tmp_path) - {"other"} == before.keys() - {"other"}


def test_links_are_replaced_and_not_written_through(lifecycle: Lifecycle, tmp_path: Path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    shutil.copytree(lifecycle.folder(CELL, seed=200), outside)
    folder.mkdir()
    for name in names(outside):
        (folder / name).symlink_to(outside / name)
    before = {name: (outside / name).read_bytes() for name in names(outside)}
    lifecycle.fitted(CELL).save_pretrained(folder)
    assert {name: (outside / name).read_bytes() for name in names(outside)} == before
    assert not any((folder / name).is_symlink() for name in FILES)
    wrapped = peft.PeftModel.from_pretrained(lifecycle.base("bert"), lifecycle.folder(CELL))
    wrapped.load_adapter(lifecycle.folder(CELL), "other")
    (folder / "other").symlink_to(outside)
    with pytest.raises(ValueError, match="is a link to another place"):
        wrapped.save_pretrained(folder)
    assert {name: (outside / name).read_bytes() for name in names(outside)} == before


def test_what_a_folder_pretends_to_be_left_by_a_save_does_no_harm(lifecycle: Lifecycle, tmp_path: Path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "secret").write_text("kept")
    shutil.copytree(lifecycle.folder(CELL), folder)
    (folder / f"{saving.STAGING}1.lock").symlink_to(outside / "secret")
    (folder / f"{saving.STAGING}2.lock").write_text("")
    (folder / f"{saving.STAGING}2").symlink_to(outside)
    lifecycle.fitted(CELL).save_pretrained(folder)
    assert (outside / "secret").read_text() == "kept"
    (folder / saving.COMMIT).symlink_to(outside)
    for act in (lambda: lifecycle.fitted(CELL).save_pretrained(folder), lambda: finish_save(folder)):
        with pytest.raises(ValueError, match="is not a folder that a save has left"):
            act()
    with pytest.raises(ValueError, match="is not a folder that a save has left"):
        lifecycle.base("bert").load_adapter(str(folder))
    (folder / saving.COMMIT).unlink()
    (folder / saving.COMMIT).mkdir()
    (folder / saving.COMMIT / "adapter_config.json").symlink_to(outside / "secret")
    with pytest.raises(ValueError, match="is not a file that a save has left"):
        lifecycle.base("bert").load_adapter(str(folder))
    assert names(outside) == {"secret"}


def test_a_committed_save_that_cannot_be_finished_says_so(
    lifecycle: Lifecycle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The folder may be read-only, for example."""
    folder = tmp_path / "adapter"
    shutil.copytree(lifecycle.folder(CELL), folder / saving.COMMIT)
    with monkeypatch.context() as patch:

        def refuse(*_: Any) -> None:
            raise PermissionError(13, "Permission denied")

        patch.setattr(saving.os, "replace", refuse)
        with pytest.raises(OSError, match=r"Move .* one folder up: a save was killed \(.*Permission denied\)"):
            lifecycle.base("bert").load_adapter(str(folder))
    model = lifecycle.base("bert")
    model.load_adapter(str(folder))
    assert same(outputs_of(model, small_batch("bert")), outputs_of(lifecycle.fitted(CELL), small_batch("bert")))
    assert not (folder / saving.COMMIT).exists()


def test_a_lora_is_saved_as_ever(lifecycle: Lifecycle, tmp_path: Path, hooks: list):
    called = []
    hooks.append(lambda *given: called.append(given))
    model = lifecycle.base("bert")
    model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2))
    model.save_pretrained(tmp_path)
    save_file({"x": load_file(tmp_path / "adapter_model.safetensors").popitem()[1]}, tmp_path / "x.safetensors")
    model.save_pretrained(tmp_path)
    assert names(tmp_path) - {"README.md"} == {*FILES, "x.safetensors"} and not called
    plain = copy.deepcopy(lifecycle.base("bert"))
    plain.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_sticky_adapter_that_is_not_saved_is_named(lifecycle: Lifecycle, tmp_path: Path):
    model, name = lifecycle.base("bert"), "no_gender"
    model.load_adapter(lifecycle.folder(CELL), name, peft_config=ConceptErasureConfig(labels=LABELS, sticky=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are not saved")
        model.save_pretrained(tmp_path / "alone")
        model.add_adapter(peft.LoraConfig(target_modules=["query"], r=2), adapter_name="lora")
    with pytest.warns(UserWarning, match=rf"\['{name}'\] act beside \['lora'\] and are not saved in '.*lora'"):
        model.save_pretrained(tmp_path / "lora")
    model.set_adapter(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*are not saved")
        model.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize("where", ["attention", "embeddings"])
def test_an_adapter_that_acts_and_is_not_saved_is_named(where: str, lifecycle: Lifecycle, tmp_path: Path):
    """transformers saves the adapter that is active in the first layer; loading leaves both on."""
    model, cell = lifecycle.base("bert"), Cell("bert", where, "output")
    lora = lifecycle.base("bert")
    lora.add_adapter(peft.LoraConfig(target_modules=["query"], r=2, init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    model.load_adapter(lifecycle.folder(cell), "erasure")
    model.load_adapter(tmp_path / "lora", "lora")
    (saved,) = model.active_adapters()
    left = "lora" if saved == "erasure" else "erasure"
    with pytest.warns(UserWarning, match=rf"\['{left}'\] act beside \['{saved}'\] and are not saved in '.*model'"):
        model.save_pretrained(tmp_path / "model")
