"""Saving or pushing an adapter writes this package's card and keeps what a user wrote; other models' cards stay."""

from __future__ import annotations

import shutil
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import transformers as hf
import transformers.utils.hub
from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError
from transformers.utils.hub import PushToHubMixin

from hf_erasure import GradiendCallback, patches
from hf_erasure.hub import cards, pushing
from tests.adapters.gradiend.lifecycle import Gradiends
from tests.adapters.lifecycle import Cell, Lifecycle, config_of, fit
from tests.small_models import LABELS, small_batch

CELL = Cell("llama", "norms", "output")
TEMPLATE = "[More Information Needed]"
KINDS = ("erasure", "gradiend")
MINE = "---\nlicense: mit\ntags:\n- mine\n---\n\n# By hand\n\nDo not lose me.\n"
# Texts that Trainer, PEFT and transformers write into cards by themselves.
BY_LIBRARIES = (TEMPLATE, "More information needed", "Framework versions", "automatically generated")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """`made("erasure" or "gradiend")`: a Llama with a fitted adapter, a new one each time."""
    folder = tmp_path_factory.mktemp("made")
    erasures, gradiends = Lifecycle(folder / "e"), Gradiends(folder / "g")
    return lambda kind: erasures.fitted(CELL) if kind == "erasure" else gradiends.fitted("llama")


@pytest.fixture
def wrapped(made: Callable[[str], Any], tmp_path: Path) -> Callable[..., peft.PeftModel]:
    """`wrapped(kind, name)`: the same adapter as a `PeftModel`."""

    def build(kind: str, name: str = "default") -> peft.PeftModel:
        model = made(kind)
        folder = tmp_path / "to-wrap"
        model.save_pretrained(folder)
        model.delete_adapter(next(iter(model.peft_config)))
        return peft.PeftModel.from_pretrained(model, folder, adapter_name=name)

    return build


@pytest.fixture
def pushed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Path]:
    """`pushed(model, present=None)`: the files that `model.push_to_hub` uploads, if `present` is the card there."""

    def push(model: Any, present: str | None = None, **kwargs: Any) -> Path:
        where, read = tmp_path / "pushed", ModelCard.load

        def load(repo_id: Any, **kwargs: Any) -> ModelCard:
            if Path(repo_id).is_file():
                return read(repo_id, **kwargs)
            if present is None:
                raise EntryNotFoundError("no README.md")
            return ModelCard(present)

        def upload(_: Any, working_dir: str, *args: Any, **kwargs: Any) -> None:
            shutil.rmtree(where, ignore_errors=True)
            shutil.copytree(working_dir, where)

        repository = types.SimpleNamespace(repo_id="alice/adapter")
        api = types.SimpleNamespace(create_repo=lambda *args, **kwargs: repository)
        for module in (transformers.utils.hub, transformers.modeling_utils):
            monkeypatch.setattr(module, "hf_api", lambda: api)
        monkeypatch.setattr(ModelCard, "load", load)
        monkeypatch.setattr(pushing, "_download_card", lambda *_: present)
        monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*card of the adapter.*|.*README.md was left.*")
            if "folder" in kwargs:
                model.save_pretrained(kwargs["folder"], push_to_hub=True, repo_id="alice/adapter")
            else:
                model.push_to_hub("alice/adapter", **kwargs)
        return where

    return push


def readme(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def assert_ours(text: str, repo_id: str | None = None) -> ModelCard:
    """Check that the card is this package's, that huggingface_hub reads it unchanged, and that no template is in it."""
    card = ModelCard(text)
    assert card.data.library_name == "peft"
    assert "hf-erasure" in card.data.tags
    assert "import hf_erasure" in card.text
    assert not [words for words in BY_LIBRARIES if words in card.text]
    assert card.data.base_model is None, "the base was loaded from a folder"
    assert "/tmp" not in text
    assert (f'"{repo_id}"' if repo_id else '"path/to/this/folder"') in card.text
    return card


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_saving_leaves_our_card(kind: str, made: Callable, wrapped: Callable, tmp_path: Path) -> None:
    made(kind).save_pretrained(tmp_path / "added")
    card = assert_ours(readme(tmp_path / "added"))
    assert card.data.pipeline_tag == "text-generation"
    wrapped(kind).save_pretrained(tmp_path / "peft")
    assert readme(tmp_path / "peft") == readme(tmp_path / "added")
    modes = {(tmp_path / "added" / name).stat().st_mode for name in ("README.md", "adapter_config.json")}
    assert len(modes) == 1, "who may read the one may read the other"


def test_a_named_adapter_of_a_peft_model_has_its_card_in_its_folder_and_one_above(
    wrapped: Callable, tmp_path: Path
) -> None:
    model = wrapped("erasure", "gender")
    config = config_of(CELL)
    model.add_adapter("other", config)
    fit(model, CELL.architecture, "other", seed=3)
    model.save_pretrained(tmp_path / "out")
    assert_ours(readme(tmp_path / "out/gender"))
    above = assert_ours(readme(tmp_path / "out"))
    assert 'adapter_kwargs={"subfolder": "gender"}' in above.text
    assert "- `other`: erasure of 'gender'" in above.text


@pytest.mark.parametrize("kind", KINDS)
def test_saving_again_makes_our_card_anew_and_keeps_what_was_written_around_it(
    kind: str, made: Callable, wrapped: Callable, tmp_path: Path
) -> None:
    made(kind).save_pretrained(tmp_path)
    ours = readme(tmp_path)
    (tmp_path / "README.md").write_text(ours.replace("tags:", "license: mit\ntags:", 1) + "\nDo not lose me.\n")
    before = ModelCard.load(tmp_path / "README.md")
    again = wrapped(kind)
    config = again.peft_config["default"]
    config.provenance = config.provenance | {"examples": 4321}
    again.save_pretrained(tmp_path)
    after = ModelCard.load(tmp_path / "README.md")
    assert after.text.rstrip().endswith("Do not lose me.")
    assert "| examples | 4,321 |" in after.text
    assert after.text.count("hf-erasure end") == 1
    assert after.data.to_dict() == before.data.to_dict()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["added", "wrapped"])
def test_a_card_by_hand_is_kept_and_its_metadata_brought_up_to_date(
    kind: str, way: str, made: Callable, wrapped: Callable, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "README.md").write_text(MINE)
    (made if way == "added" else wrapped)(kind).save_pretrained(out)
    card = ModelCard.load(out / "README.md")
    assert card.text == ModelCard(MINE).text
    assert card.data.license == "mit"
    assert card.data.library_name == "peft"
    assert {"mine", "hf-erasure"} <= set(card.data.tags)


def test_text_of_ours_that_somebody_changed_is_kept(made: Callable, tmp_path: Path) -> None:
    made("erasure").save_pretrained(tmp_path)
    changed = readme(tmp_path).replace("## Limits", "## Limits as I see them")
    (tmp_path / "README.md").write_text(changed)
    made("erasure").save_pretrained(tmp_path)
    assert readme(tmp_path) == changed


def test_a_template_is_replaced(made: Callable, tmp_path: Path) -> None:
    card = ModelCard.from_template(hf.utils.hub.ModelCardData(tags=["extra"]), model_description="")
    card.text += "\n### Framework versions\n\n- PEFT 0.1\n"
    card.save(tmp_path / "README.md")
    assert TEMPLATE in readme(tmp_path)
    made("erasure").save_pretrained(tmp_path)
    assert "extra" in assert_ours(readme(tmp_path)).data.tags


def test_a_card_that_cannot_be_read_stays_and_is_named(made: Callable, tmp_path: Path) -> None:
    broken = "---\nlicense: [mit\n---\n\nMine.\n"
    (tmp_path / "README.md").write_text(broken)
    with pytest.warns(UserWarning, match=r"README\.md was left as it is: its metadata cannot be read"):
        made("erasure").save_pretrained(tmp_path)
    assert readme(tmp_path) == broken
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_a_card_that_fails_stops_no_save(made: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no more ink")

    monkeypatch.setattr(cards, "rendered", fails)
    with pytest.warns(UserWarning, match="could not be written: RuntimeError: no more ink"):
        made("erasure").save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


# ---- pushing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", ["added", "wrapped"])
def test_a_push_leaves_our_card_in_new_and_in_existing_repositories(
    kind: str, way: str, made: Callable, wrapped: Callable, pushed: Callable
) -> None:
    model = (made if way == "added" else wrapped)(kind)
    first = readme(pushed(model))
    assert_ours(first, "alice/adapter")
    assert readme(pushed(model, present=first)) == first
    generic = str(ModelCard.from_template(ModelCard("---\n---\n").data))
    assert_ours(readme(pushed(model, present=generic)), "alice/adapter")
    by_hand = ModelCard(readme(pushed(model, present=MINE)))
    assert by_hand.text == ModelCard(MINE).text
    assert by_hand.data.library_name == "peft"


def test_tags_of_a_push_are_in_the_card(made: Callable, pushed: Callable) -> None:
    card = assert_ours(readme(pushed(made("erasure"), tags=["of-the-push"])), "alice/adapter")
    assert "of-the-push" in card.data.tags


def test_a_named_adapter_of_a_peft_model_is_pushed_with_a_card_on_top(wrapped: Callable, pushed: Callable) -> None:
    folder = pushed(wrapped("erasure", "gender"))
    for place in (folder, folder / "gender"):
        card = assert_ours(readme(place), "alice/adapter")
        assert 'adapter_kwargs={"subfolder": "gender"}' in card.text


def test_installing_anew_leaves_cards_as_they_are(made: Callable, pushed: Callable, tmp_path: Path) -> None:
    patches.install()
    (tmp_path / "README.md").write_text(MINE)
    assert "Do not lose me." in readme(pushed(made("erasure"), folder=tmp_path))


def test_saving_and_pushing_at_once_keeps_what_was_written_in_the_folder(
    made: Callable, pushed: Callable, tmp_path: Path
) -> None:
    folder = tmp_path / "work"
    assert_ours(readme(pushed(made("erasure"), folder=folder)), "alice/adapter")
    (folder / "README.md").write_text(MINE)
    there = readme(pushed(made("erasure"), folder=folder))
    assert "Do not lose me." in there
    assert "Do not lose me." in readme(folder)


@pytest.mark.parametrize("fitted", [True, False], ids=["fitted", "new"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tags_of_peft_and_of_the_model_are_in_the_card_by_every_road(
    kind: str, fitted: bool, made: Callable, pushed: Callable, tmp_path: Path
) -> None:
    """The tags are those that PEFT writes for a LoRA, its guess of the pipeline, and those of `add_model_tags`."""
    expected = {"base_model:adapter:some-org/some-llama", "transformers", "of-the-model", "hf-erasure"}
    expected.add("concept-erasure" if kind == "erasure" else "gradiend")
    model = made(kind)
    name, config = next(iter(model.peft_config.items()))
    model.add_model_tags(["of-the-model"])
    model.config._name_or_path = model.name_or_path = config.base_model_name_or_path = "some-org/some-llama"
    if not fitted:
        fresh = {"labels": LABELS} if kind == "erasure" else {}
        model.delete_adapter(name)
        model.add_adapter(type(config)(**fresh, base_model_name_or_path="some-org/some-llama"), name)
    model.save_pretrained(tmp_path / "added")
    folders = [tmp_path / "added", pushed(model)]
    trainer = trainer_of(model, tmp_path / "trained")
    trainer.save_model()
    trainer.create_model_card()
    model.delete_adapter(name)
    around = peft.PeftModel.from_pretrained(model, tmp_path / "added", adapter_name=name)
    around.save_pretrained(tmp_path / "peft")
    for folder in [*folders, tmp_path / "trained", tmp_path / "peft" / ("" if name == "default" else name)]:
        data = ModelCard.load(folder / "README.md").data
        assert expected <= set(data.tags) and len(data.tags) == len(set(data.tags))
        assert (data.pipeline_tag, data.base_model) == ("text-generation", "some-org/some-llama")


# ---- Trainer ---------------------------------------------------------------------------------------------------------


def trainer_of(model: Any, folder: Path, kind: type[hf.Trainer] = hf.Trainer) -> hf.Trainer:
    ids = small_batch("llama")["input_ids"].tolist()
    arguments = hf.TrainingArguments(
        str(folder), max_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
    )
    return kind(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids])


@pytest.mark.parametrize("way", ["added", "wrapped"])
def test_the_card_of_trainer_becomes_a_part_of_ours(
    way: str, made: Callable, wrapped: Callable, tmp_path: Path
) -> None:
    model = (made if way == "added" else wrapped)("erasure")
    out = tmp_path / "out"
    trainer = trainer_of(model, out)
    trainer.save_model()
    for _ in range(2):
        trainer.create_model_card(license="mit", tags="of-training", language="en")
        card = ModelCard.load(out / "README.md")
        assert card.data.library_name == "peft"
        assert (card.data.license, card.data.language) == ("mit", ["en"])
        assert {"hf-erasure", "of-training"} <= set(card.data.tags)
        assert card.text.count("## Training procedure") == 1
        assert "- learning_rate: 5e-05" in card.text
        assert TEMPLATE not in card.text and "More information needed" not in card.text
    (out / "README.md").write_text(MINE)
    trainer.create_model_card(tags="of-training")
    card = ModelCard.load(out / "README.md")
    assert card.text == ModelCard(MINE).text
    assert {"mine", "hf-erasure", "of-training"} <= set(card.data.tags)
    assert {path.name for path in out.iterdir()} >= {"README.md", "adapter_config.json"}
    assert trainer.args.output_dir == str(out)


def test_a_trainer_with_a_card_of_its_own_leaves_ours_too(
    made: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(hf.Trainer):
        def create_model_card(self, model_name: str | None = None, **kwargs: Any) -> None:
            text = "---\nlibrary_name: other\n---\n\n# Model Card of Other\n"
            Path(self.args.output_dir, "README.md").write_text(text)

    uploaded: list[str] = []
    api = types.SimpleNamespace(upload_folder=lambda folder_path, **_: uploaded.append(readme(Path(folder_path))))
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: api)
    trainer = trainer_of(made("erasure"), tmp_path, Other)
    trainer.hub_model_id, trainer.push_in_progress = "alice/adapter", None
    trainer.push_to_hub()
    assert_ours(uploaded[0], "alice/adapter")
    Path(tmp_path, "README.md").unlink()
    trainer.create_model_card()
    assert_ours(readme(tmp_path), "alice/adapter")


def test_an_adapter_beside_trained_weights_has_its_card_in_its_folder(made: Callable, tmp_path: Path) -> None:
    model = made("gradiend")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    trainer = trainer_of(model, tmp_path / "out")
    trainer.add_callback(GradiendCallback("gender", mode="guard"))
    trainer.save_model()
    assert (tmp_path / "out/model.safetensors").is_file()
    assert_ours(readme(tmp_path / "out/gender"))
    trainer.create_model_card()
    assert "More information needed" in readme(tmp_path / "out"), "the folder itself holds the trained model"


def test_what_is_pushed_during_training_has_our_card(
    made: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: list[str] = []
    done = types.SimpleNamespace(is_done=lambda: True)

    def upload(folder_path: str, **_: Any) -> Any:
        uploaded.append(readme(Path(folder_path)))
        return done

    monkeypatch.setattr("transformers.trainer.hf_api", lambda: types.SimpleNamespace(upload_folder=upload))
    trainer = trainer_of(made("erasure"), tmp_path / "out")
    trainer.hub_model_id, trainer.push_in_progress = "alice/adapter", None
    trainer.save_model(str(tmp_path / "out/checkpoint-1"))
    (tmp_path / "out/README.md").unlink(missing_ok=True)
    trainer._push_from_checkpoint(str(tmp_path / "out/checkpoint-1"))
    assert_ours(uploaded[0], "alice/adapter")


# ---- models without an adapter of this package -----------------------------------------------------------------------


def test_loras_and_plain_models_keep_the_cards_of_their_libraries(
    tmp_path: Path, pushed: Callable, tmp_path_factory: pytest.TempPathFactory
) -> None:
    base = Lifecycle(tmp_path_factory.mktemp("bases")).base("llama")
    assert TEMPLATE in readme(pushed(base))
    lora = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    lora.save_pretrained(tmp_path / "lora")
    assert TEMPLATE in readme(tmp_path / "lora")
    assert "hf-erasure" not in readme(tmp_path / "lora")
    assert TEMPLATE in readme(pushed(lora))
    trainer = trainer_of(lora, tmp_path / "trained")
    trainer.save_model()
    trainer.create_model_card()
    assert "More information needed" in readme(tmp_path / "trained")


def test_a_lora_beside_an_erasure_is_saved_as_ever(made: Callable, tmp_path: Path) -> None:
    model = made("erasure")
    with pytest.warns(UserWarning, match="switched the erasure"):
        model.add_adapter(peft.LoraConfig(r=2, target_modules="all-linear"), adapter_name="lora")
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
