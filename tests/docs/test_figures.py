"""Figures that pages take from the results of recipes are equal to those in the results files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, BertForMaskedLM

from hf_erasure.cli.recipes import _table_text
from hf_erasure.recipes.erasure import load_data, read_recipe
from hf_erasure.recipes.run import table_of
from recipes.gradiend_demo import train

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes"


def rows(study: str) -> list[list[str]]:
    """The cells of every row of every table in a study's results, without the intervals behind the figures."""
    text = (RECIPES / study / "results.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[re.sub(r" [\[(].*", "", cell.strip()) for cell in line.strip("|").split("|")] for line in lines]


def row(study: str, *begins: str, nth: int = 0) -> list[str]:
    """The cells of the nth row that begins with `begins`, without these."""
    return [cells for cells in rows(study) if cells[: len(begins)] == list(begins)][nth][len(begins) :]


def table_row(page: str, *begins: str) -> list[str]:
    """The cells of the row of a page that begins with `begins`, without these."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return next(cells for cells in lines if cells[: len(begins)] == list(begins))[len(begins) :]


@pytest.mark.parametrize("model", ["original", "biased", "GRADIEND", "difference of two models"])
def test_a_model_that_was_made_biased(model: str) -> None:
    text = (RECIPES / "gradiend_balance" / "results.md").read_text(encoding="utf-8")
    found = next(line for line in text.splitlines() if line.startswith(f"| {model} |")).strip("|").split("|")[1:]
    cells = [cell.strip() for cell in found]
    rose = "" if model in ("original", "biased") else cells[6]
    assert table_row("studies.md", model) == [*cells[:3], rose]


PAPERS = "ours-beside-the-papers.md"


def test_biographies_beside_the_paper() -> None:
    found = [row("biographies", *key) for key in (("none", "–"), ("last norm", "same"), ("last norm", "refitted"))]
    names = ("accuracy for the profession", "TPR gap between genders, RMS", "correlation of gap and share of women")
    for name, column in zip(names, (0, 3, 5), strict=True):
        assert table_row(PAPERS, name)[3:] == [cells[column] for cells in found]
    text = (ROOT / "docs" / PAPERS).read_text(encoding="utf-8")
    assert f"Of the {found[1][3]} that is left here {found[1][4]} is chance" in text


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("nothing", "none"),
        ("a random subspace", "random subspace"),
        ("the tags, LEACE in sequence", "sequential LEACE"),
        ("the tags, SAL; ours `orth` in sequence", "sequential orth"),
    ],
)
def test_parts_of_speech_beside_the_paper(ours: str, theirs: str) -> None:
    assert table_row(PAPERS, ours)[1:] == row("pos_scrubbing", theirs)[:2]


@pytest.mark.parametrize("model", ["stories260k", "story-mlm"])
@pytest.mark.parametrize("fit", ["closed form, factual", "trained, factual"])
def test_gradiend_beside_the_paper(model: str, fit: str) -> None:
    assert table_row(PAPERS, model, fit) == row("gradiend_gender", model, fit)[:2]


def results_of(recipe: str) -> dict[str, Any]:
    """The results file of a recipe."""
    found: dict[str, Any] = json.loads((RECIPES / recipe / "results.json").read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("recipe", "of", "index"),
    [
        ("minilm-gender", None, "layer"),
        ("gradiend_demo", "encoding", "encoder"),
        ("gradiend_demo", "edits", "edit for"),
    ],
)
def test_what_the_demo_prints_as_the_tour_has_it(recipe: str, of: str | None, index: str) -> None:
    found = results_of(recipe) if of is None else results_of(recipe)[of]
    printed = "\n".join(line.rstrip() for line in _table_text(table_of(found, index)).splitlines())
    assert f"\n{printed}\n" in (ROOT / "docs" / "tour.md").read_text(encoding="utf-8")


def test_what_the_tour_says_of_the_demo() -> None:
    text = " ".join((ROOT / "docs" / "tour.md").read_text(encoding="utf-8").split())
    found = results_of("minilm-gender")["last_hidden_state"]
    refitted, control, by_group = (
        percent(found[f"gender {what}"]) for what in ("refitted", "control", "refitted by group")
    )
    assert f"reads gender from {refitted} of other embeddings" in text
    assert f"is read in {control} (*control*)" in text and f"the probe reads {by_group} (*by group*)" in text
    recipe = read_recipe(RECIPES / "minilm-gender" / "recipe.yaml")
    rows = load_data(recipe.data)[recipe.data.test]
    assert f"fits on {recipe.data.fit_rows:,} sentences" in text and f"measures on {len(rows):,} others" in text
    model = BertForMaskedLM(BertConfig(**train.SIZES, vocab_size=len(train.make_tokenizer())))
    assert f"a masked language model of {model.num_parameters():,} weights" in text


def said(job: str) -> str:
    """The text under a heading of the page `what-for.md`, in one line."""
    text = (ROOT / "docs" / "what-for.md").read_text(encoding="utf-8")
    return " ".join(re.split(r"^## ", text.split(f"\n## {job}\n")[1], flags=re.MULTILINE)[0].split())


def percent(figure: str | float) -> str:
    """The share as a percentage without decimals."""
    return f"{100 * float(figure):.0f} %"


def test_embeddings_that_do_not_tell_a_group() -> None:
    found = results_of("minilm-gender")["last_hidden_state"]
    gender, field = ([percent(found[f"{name} {when}"]) for when in ("before", "after")] for name in ("gender", "field"))
    text = said("Embeddings that do not tell a group")
    assert (
        f"right in {gender[0]} before, {gender[1]} after, and {percent(found['gender refitted by group'])} if" in text
    )
    assert f"judged on the same templates it is right in {percent(found['gender refitted'])}" in text
    assert f"for the field of work: {', '.join(field)}" in text


def test_few_texts() -> None:
    before, leace, counterfactuals = (
        percent(row("carries_over", erased)[1]) for erased in ("nothing", "LEACE", "counterfactuals")
    )
    text = said("The same of few texts, or of none that are labelled")
    assert f"with {before} before, {leace} after LEACE, {counterfactuals} with counterfactuals" in text


def test_a_language_model_that_goes_on_speaking() -> None:
    cells = [cell.replace("%", " %") for cell in row("gender_scrubbing", "background, shrinkage")]
    text = said("A language model without a concept that goes on speaking")
    assert f"fell by {cells[4]} (he) and {cells[5]} (she), the loss rose by {cells[7]}" in text
    whole = (RECIPES / "gender_scrubbing" / "results.md").read_text(encoding="utf-8")
    line = next(line for line in whole.splitlines() if line.startswith("| background, shrinkage |"))
    ends = [f"{low}–{high} %" for low, high in re.findall(r"% \(([\d.]+)%–([\d.]+)%\)", line)]
    assert f"these are {ends[0]}, {ends[1]} and {ends[2]}" in text


def test_what_a_model_uses_a_concept_for() -> None:
    fits = ("none", "sequential LEACE", "random subspace")
    before, after, control = (f"{float(row('pos_scrubbing', fit)[0]):.2f}" for fit in fits)
    text = said("To know what a model uses a concept for")
    assert f"{before} bits per byte become {after}" in text and f"of the same rank {control}" in text


def test_a_feature_that_fine_tuning_does_not_pick_up() -> None:
    text = (RECIPES / "guarded_finetuning" / "results.md").read_text(encoding="utf-8")
    guard, erasure = (
        [int(share) for share in re.findall(rf"the {what} kept out(?: of the LoRA)? (\d+)%", text)[:2]]
        for what in ("guard", "erasure")
    )
    task = [
        100 * (float(row("guarded_finetuning", "LoRA", nth=n)[4]) - float(row("guarded_finetuning", LORA, nth=n)[4]))
        for n in (0, 1)
    ]
    found = said("A feature that fine-tuning does not pick up")
    kept = [float(row("guarded_finetuning", "guard", nth=n)[4]) for n in (0, 1)]
    cost = sum(float(row("guarded_finetuning", "no guard", nth=n)[4]) - kept[n] for n in (0, 1)) / 2
    assert f"kept out about {round(sum(guard) / 2, -1):.0f} % of the skew, for about {100 * cost:.0f} points" in found
    assert f"{min(erasure)} to {max(erasure)} %, for {min(task):.0f} to {max(task):.0f} points of the task" in found


def test_what_a_monitor_reads() -> None:
    page = (ROOT / "docs" / "how-to" / "watch-fine-tuning.md").read_text(encoding="utf-8")
    page = " ".join(page.split())
    he, she = (row("guarded_finetuning", f"all {word}", nth=0)[:2] for word in ("he", "she"))
    assert f"*she* ({she[0]}) from data that are all *he* ({he[0].replace('-', '−')})" in page
    assert f"later logs do not ({she[1]} and {he[1]} in the mean)" in page


LORA = "LoRA, erased meanwhile"


def test_search_as_its_own_page_has_it() -> None:
    page = (ROOT / "docs" / "how-to" / "sentence-transformers.md").read_text(encoding="utf-8")
    before, erased, pairs = (
        percent(re.findall(rf"recall@1   {what} +(\S+)", page)[-1]) for what in ("before", "source erased", "and pairs")
    )
    text = said("Search that finds the same thing in two styles")
    assert f"in {before} of the searches before, in {erased} once the source is erased, in {pairs}" in text
    cases = [percent(of_cases(what, 1)[0]) for what in ("before", "source erased", "and pairs", UNIT_PAIRS)]
    assert "summarise: {}, {}, {}, and {} behind the encoder".format(*cases) in text


UNIT_PAIRS = "and pairs, unit vectors"
CASES = {
    "nothing": "before", "source erased": "source erased", "and pairs": "and pairs",
    "unit vectors, source erased": "source erased, unit vectors", "unit vectors, and pairs": UNIT_PAIRS,
}  # fmt: skip


def of_cases(what: str, k: int) -> list[float]:
    """Means over the splits of a recall on court cases, and of both ends of its interval."""
    splits = json.loads((RECIPES / "two_sources" / "results.json").read_text(encoding="utf-8"))
    found = [split["recall"][what][f"recall@{k}"] for split in splits]
    return [sum(figures) / len(splits) for figures in zip(*found, strict=True)]


@pytest.mark.parametrize("shown", CASES)
def test_search_among_court_cases(shown: str) -> None:
    expected = ["{:.3f} [{:.3f}, {:.3f}]".format(*of_cases(CASES[shown], k)) for k in (1, 10)]
    assert table_row("how-to/sentence-transformers.md", shown) == expected


def test_one_word_more_often() -> None:
    text = said("One word more often than another")
    for word, goal, column in (("she", "fpi", 3), ("he", "mpi", 4)):
        cells = row("gradiend_gender", "stories260k", "closed form, factual", goal)
        assert re.search(
            rf"\*{word}\* (?:its probability goes )?{cells[column]}, for {cells[5]}".replace("%", " %"), text
        )
