"""`hf-erasure show`: the contents of the page for both kinds of adapters, and the page in a browser."""

from __future__ import annotations

import csv
import importlib
import shutil
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForMaskedLM, AutoTokenizer
from typer.testing import CliRunner

from hf_erasure import (
    ConceptErasureConfig,
    GradiendConfig,
    GradiendTrainer,
    GradiendTrainingArguments,
    concept_dataloader,
    fit_concept_erasure,
)
from hf_erasure.cli import app
from hf_erasure.recipes import occupation_sentences
from tests.fitting.gradiend.language_models import CLASSES, model_of, pairs, tokenizer_of

# Imported by its path, since the attribute `show` of the package `hf_erasure.cli` is the command.
show = importlib.import_module("hf_erasure.cli.show")
BOTH = ["she was a nurse .", "he was a nurse ."]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("people") / "people.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "gender"])
        rows = occupation_sentences()["train"].shuffle(seed=0).select(range(160))
        writer.writerows([row["text"], row["gender"]] for row in rows)
    return path


@pytest.fixture(scope="module")
def erased(assets: Path, people: Path) -> tuple[str, str]:
    base, out = str(assets / "models" / "story-mlm"), str(people.parent / "no-gender")
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=["female", "male"]), adapter_name="no_gender")
    rows = occupation_sentences()["train"].shuffle(seed=1).select(range(200))
    batches = concept_dataloader(rows, tokenizer, label_column="gender")
    fit_concept_erasure(model, batches, "no_gender", pool="mean", progress=False)
    model.save_pretrained(out)
    return base, out


@pytest.fixture(scope="module")
def feature(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("feature")
    base, out = str(folder / "base"), str(folder / "adapter")
    model, tokenizer = model_of("bert"), tokenizer_of("bert")
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    model.add_adapter(GradiendConfig(feature="gender", classes=CLASSES, density=1.0), adapter_name="gender")
    arguments = GradiendTrainingArguments(output_dir=out, disable_tqdm=True, per_device_train_batch_size=1)
    GradiendTrainer(model, args=arguments, train_dataset=pairs("bert"), tokenizer=tokenizer).train()
    show.state.steer(model, "gender", feature_factor=1.0, learning_rate=0.1)
    model.save_pretrained(out)
    return base, out


def test_two_sentences_are_nearer_without_what_tells_them_apart(erased: tuple[str, str], people: Path):
    found = show.Comparison(*erased, data=str(people), label="gender")
    (_, before), (_, after) = found.similarity(BOTH)
    assert before < after <= 1
    words = found.next_words([f"{sentence} [MASK] was happy ." for sentence in BOTH])
    assert len(words) == 2 * show.WORDS and all(len(row) == len(show.NEXT) for row in words)
    assert found.next_words(BOTH)[0][0] == f"{BOTH[0]} [MASK]"
    assert [row[2] for row in words[: show.WORDS]] == sorted((row[2] for row in words[: show.WORDS]), reverse=True)
    probed = found.class_shares(BOTH)
    assert [row[:2] for row in probed] == [[text, name] for text in BOTH for name in ("female", "male")]
    gaps = [abs(probed[0][place] - probed[2][place]) for place in (2, 3)]
    assert gaps[1] < gaps[0], probed
    assert "80 other rows" in found.accuracy()
    found.steer(3.0)
    assert found.similarity(BOTH)[1][1] == after, "an erasure has no learning rate"


def test_a_model_without_a_head_has_no_next_words_and_a_page_without_a_table_no_probe(assets: Path, tmp_path: Path):
    from transformers import AutoModel

    base = str(assets / "models" / "story-mlm")
    model, tokenizer = AutoModel.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model.add_adapter(ConceptErasureConfig(concept="gender", labels=["female", "male"]))
    rows = occupation_sentences()["train"].shuffle(seed=1).select(range(60))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The few rows give warnings.
        fit_concept_erasure(model, concept_dataloader(rows, tokenizer, label_column="gender"), progress=False)
    model.save_pretrained(tmp_path / "adapter")
    found = show.Comparison(str(tmp_path / "base"), str(tmp_path / "adapter"))
    assert found.next_words(BOTH) == [] == found.class_shares(BOTH) and found.accuracy() == ""
    assert found.similarity(BOTH)[0] != found.similarity(BOTH)[1]


def test_a_sentence_that_the_model_cannot_read_whole_is_refused(erased: tuple[str, str]):
    found = show.Comparison(*erased)
    most = found.model.config.max_position_embeddings
    long = " ".join(["she"] * most)
    fits = " ".join(["she"] * (most - 2))  # with the two special tokens; the mask would be one more
    for call, text in ((found.similarity, long), (found.next_words, long), (found.next_words, fits)):
        with pytest.raises(ValueError, match=f"tokens, and the model reads {most}: write a shorter text"):
            call([text, "he"])
    assert found.similarity([fits, "he"])


def test_a_gradiend_is_steered(feature: tuple[str, str], people: Path):
    found = show.Comparison(*feature, data=str(people), label="gender")
    assert found.learning_rate == pytest.approx(0.1)
    seen = {}
    for rate in (0.0, 0.1, 0.5):
        found.steer(rate)
        seen[rate] = found.similarity(BOTH), found.next_words(BOTH), found.class_shares(BOTH)
    assert len({str(tables[0][0]) for tables in seen.values()}) == 1, "without the adapter nothing changes"
    assert seen[0.0][0][0][1] == seen[0.0][0][1][1]
    assert all(row[1:3] == row[3:] for row in seen[0.0][1])
    assert seen[0.1][1] != seen[0.5][1] and seen[0.1][2] != seen[0.5][2]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["show", *map(str, words)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stderr


def test_what_is_missing_is_named(erased: tuple[str, str], people: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(show, "find_spec", lambda name: None)
    code, said = run(*erased)
    assert code == 2 and "pip install 'hf-erasure[show]'" in said
    monkeypatch.setattr(show, "find_spec", lambda name: name)
    code, said = run(*erased, "--label", "gender")
    assert code == 2 and "--data TABLE and --label COLUMN" in said
    code, said = run(*erased, "--data", people, "--label", "sex")
    assert code == 2 and "no column 'sex'; it has text, gender" in said


# ---- in a browser ----------------------------------------------------------------------------------------------------

_DRIVER = shutil.which("chromedriver")
_LACKING = [name for name in ("gradio", "selenium") if find_spec(name) is None] + ([] if _DRIVER else ["chromedriver"])


@pytest.mark.slow
@pytest.mark.skipif(bool(_LACKING), reason=f"not installed: {', '.join(_LACKING)}")
@pytest.mark.parametrize("kind", ["erased", "feature"])
def test_the_page_in_a_browser(kind: str, request: pytest.FixtureRequest, people: Path, tmp_path: Path):
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    found = show.Comparison(*request.getfixturevalue(kind), data=str(people), label="gender")
    _, address, _ = (blocks := show.page(found, "a test")).launch(prevent_thread_lock=True, quiet=True)
    options = webdriver.ChromeOptions()
    for option in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,1500"):
        options.add_argument(option)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(_DRIVER))
    try:
        for theme in ("light", "dark"):
            driver.get(f"{address}?__theme={theme}")
            wait = WebDriverWait(driver, 120)
            shown: Any = wait.until(lambda _: driver.find_elements(By.TAG_NAME, "textarea"))
            assert len(shown) == 2
            assert any(
                slider.is_displayed() for slider in driver.find_elements(By.CSS_SELECTOR, "input[type=range]")
            ) is (kind == "feature")
            for area, sentence in zip(shown, BOTH, strict=True):
                area.clear()
                area.send_keys(sentence)
            next(b for b in driver.find_elements(By.TAG_NAME, "button") if b.text == "Compare").click()
            wait.until(lambda _: "On 80 other rows" in driver.find_element(By.TAG_NAME, "body").text)
            text = driver.find_element(By.TAG_NAME, "body").text
            assert "Similarity" in text and "Next words" in text and str(found.similarity(BOTH)[0][1]) in text
            driver.save_screenshot(str(tmp_path / f"{kind}-{theme}.png"))
    finally:
        driver.quit()
        blocks.close()
