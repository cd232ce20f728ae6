"""The contents of cards; names in them that could break Markdown; and the commands that write cards."""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import tomllib
import transformers as hf
from huggingface_hub import ModelCard
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from hf_erasure import ConceptErasureConfig, GradiendConfig, combine_adapters, fit_concept_erasure
from hf_erasure.adapters.common.config import RECIPE, TESTED_ON
from hf_erasure.adapters.saving import digest_of
from hf_erasure.cli import app
from hf_erasure.hub import describe, describe_folder, export_to_lora, write_card
from hf_erasure.hub.cards import config_in, merged_metadata, updated_readme
from hf_erasure.hub.facts import CardFacts, facts_of
from hf_erasure.hub.rendering import draw, rendered
from tests.adapters.gradiend.lifecycle import Gradiends
from tests.adapters.lifecycle import NAME, Cell, Lifecycle
from tests.small_models import LABELS, small_batches

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted((ROOT / "model_cards/examples").iterdir())
CELL = Cell("llama", "norms", "output", affine=False)
ENCODER = {"scale": 1.0, "bias": 0.0, "activation": "tanh", "unit_norm": True}
LEAKAGE = {"layers.0.norm": [0.9, 0.01], "layers.1.norm": [0.8, 0.25], "last_hidden_state": [0.95, 0.3]}


@pytest.fixture(scope="module")
def lifecycle(tmp_path_factory: pytest.TempPathFactory) -> Lifecycle:
    return Lifecycle(tmp_path_factory.mktemp("cards"))


@pytest.fixture(scope="module")
def gradiends(tmp_path_factory: pytest.TempPathFactory) -> Gradiends:
    return Gradiends(tmp_path_factory.mktemp("gradiend-cards"))


@pytest.fixture
def folder(lifecycle: Lifecycle, tmp_path: Path) -> Path:
    """A saved erasure."""
    return Path(shutil.copytree(lifecycle.folder(CELL), tmp_path / "no-gender"))


def erasure(**fields: Any) -> ConceptErasureConfig:
    """A fitted configuration, without tensors."""
    sites = {site: {"width": 8, "rank": 1} for site in LEAKAGE if "norm" in site}
    config = ConceptErasureConfig(
        **{"concept": "gender", "labels": LABELS, "fitted": True, "fitted_sites": sites} | fields
    )
    config.provenance = config.provenance or {
        "base_class": "LlamaForCausalLM", "examples": 1200, "tokens": 34567, "pool": "mean", "leakage": LEAKAGE,
        "hf_erasure_version": "0.1.0", "fingerprint": {"weight": {"values": [0.5]}},
    }  # fmt: skip
    return config


def gradiend(**fields: Any) -> GradiendConfig:
    point = {"loss": 0.9, "lms": 0.6, "probabilities": {"she": 0.2, "he": 0.7}, "goals": {"bpi": 0.3, "she": 0.1}}
    best = {"loss": 0.91, "lms": 0.59, "probabilities": {"she": 0.4, "he": 0.5}, "goals": {"bpi": 0.5, "she": 0.2}}
    fixed = {
        "fitted": True, "pairs": [["she", "he"]], "encoders": [ENCODER], "learning_rate": 0.01,
        "fitted_parameters": {"a.weight": {"shape": [8, 4], "count": 5}, "b.bias": {"shape": [3], "count": None}},
    }  # fmt: skip
    config = GradiendConfig(**{"feature": "gender", "classes": ["she", "he"]} | fixed | fields)
    config.provenance = config.provenance or {
        "base_class": "BertForMaskedLM", "estimator": "closed_form", "task": "masked", "examples": 48,
        "correlation": {"she/he": 0.987},
        "selection": {"goal": "bpi", "budget": 0.02, "base": point, "best": best, "kept_share": 1.0},
    }  # fmt: skip
    return config


def card_of(config: Any, **facts: Any) -> ModelCard:
    """The card as huggingface_hub reads it."""
    return ModelCard(str(rendered(replace(facts_of(config), **facts))))


def results_of(card: ModelCard) -> dict[tuple[str, str], float]:
    return {(r.metric_type, r.metric_args["model"]): r.metric_value for r in card.data.eval_results}


# ---- examples and templates ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_the_examples_are_what_their_facts_and_the_templates_make(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("make_examples", ROOT / "model_cards/make_examples.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert {path.name for path in EXAMPLES} == set(script.DEMOS)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert text == script.example(script.read(folder)), "run `python model_cards/make_examples.py --render`"
    card = ModelCard(text)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    assert card.data.library_name == "peft"
    shown = re.findall(r"!\[[^]]*\]\(([^)]+)\)", card.text)
    assert shown and all((folder / name).is_file() for name in shown)
    for words in ("import hf_erasure", "## Limits", "## Ethics", "@", "fingerprint of its weights", script.COMMAND):
        assert words in text
    assert "More Information Needed" not in text and str(ROOT) not in text


def test_every_template_is_shipped_with_the_package() -> None:
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    included = content["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    shipped = {source: target for source, target in included.items() if source.endswith(".j2")}
    templates = {path.name for path in (ROOT / "model_cards").glob("*.j2")}
    assert {Path(path).name for path in shipped} == templates
    assert all(target == f"hf_erasure/{source}" for source, target in shipped.items())


# ---- what cards contain ----------------------------------------------------------------------------------------------


def test_data_that_are_known_are_named() -> None:
    data = {"datasets": ["someone/people", "../no/name"], "labels_from": "the column 'gender' of someone/people"}
    card = card_of(erasure(provenance={"base_class": "BertModel", "data": data}))
    assert card.data.datasets == ["someone/people"]
    assert "the column 'gender' of someone/people" in card.text


def test_an_erasure_says_what_was_made_and_what_leaks() -> None:
    card = card_of(erasure())
    assert card.data.pipeline_tag == "text-generation"
    assert {"hf-erasure", "concept-erasure", "leace"} <= set(card.data.tags)
    rows = [(r.metric_type, r.metric_args["model"], r.metric_value) for r in card.data.eval_results]
    assert rows == [
        ("linear_leakage", "base", 0.95), ("linear_leakage", "with the adapter", 0.3),
        ("linear_leakage", "base", 0.8), ("linear_leakage", "with the adapter", 0.25),
    ]  # fmt: skip
    for words in (
        "| correlation with gender: last\\_hidden\\_state | 0.950 | 0.300 | lower |",
        "the site that leaks most, layers.1.norm",
        "| examples | 1,200 |",
        "| tokens | 34,567 |",
        "| `layers.0.norm` | 8 | 1 | 0.900 | 0.010 |",
        "no linear predictor trained with a convex loss does better than the best constant",
        "**`last_hidden_state`**, which everything downstream reads, correlated with the concept by 0.950 before",
        "pre-LN",
    ):
        assert words in card.text, words


def test_nothing_is_guaranteed_where_the_theorem_does_not_hold() -> None:
    guarantee = "no linear predictor trained with a convex loss"
    assert guarantee in card_of(erasure()).text
    assert guarantee not in card_of(erasure(method="inlp")).text
    assert "its own probes fail" in card_of(erasure(method="inlp")).text
    assert "rank was capped" in card_of(erasure(labels=["a", "b", "c"], rank=1)).text
    half = card_of(erasure(strength=0.5)).text
    assert "**No guarantee.** It acts at strength 0.5 and not at 1, so" in half and guarantee not in half


def test_a_gradiend_says_how_it_is_steered_and_what_was_chosen() -> None:
    card = card_of(gradiend())
    assert card.data.pipeline_tag == "fill-mask"
    results = results_of(card)
    assert (results["bpi", "base"], results["bpi", "with the adapter"]) == (0.3, 0.5)
    assert (results["loss", "base"], results["loss", "with the adapter"]) == (0.9, 0.91)
    for words in (
        "h = 1 and learning rate α = 0.01, of the pair `she`, `he`",
        "8 of the 35 entries of 2 parameters",
        "mean probability P(she) | 0.200 | 0.400",
        "BPI, which the edit was chosen for | 0.300 | 0.500 | higher",
        "Correlation of the neuron with the class, she/he: 0.987",
        "An edit, not an erasure.",
    ):
        assert words in card.text, words


def test_an_adapter_that_was_never_fitted_says_so() -> None:
    for config in (ConceptErasureConfig(labels=LABELS), GradiendConfig()):
        card = card_of(config)
        assert "**This adapter was never fitted: loaded, it changes nothing.**" in card.text
        assert card.data.eval_results is None


def test_a_combined_adapter_says_what_of(lifecycle: Lifecycle, tmp_path: Path) -> None:
    model = lifecycle.fitted(CELL)
    model.add_adapter(copy.deepcopy(model.peft_config[NAME]).__class__(labels=["a", "b"], affine=False), "other")
    fit_concept_erasure(model, small_batches("llama", seed=3), "other", sequential=False, progress=False)
    with pytest.warns(UserWarning, match="was combined from erasers"):
        combine_adapters(model, [NAME, "other"], "both")
    model.set_adapter("both")
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert f"It was combined from the fitted adapters `{NAME}`, `other`." in text
    assert "Nothing was measured of the combination itself." in text


def test_the_base_is_a_name_on_the_hub_or_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named = card_of(erasure(base_model_name_or_path="meta/base", revision="a" * 40))
    assert named.data.base_model == "meta/base"
    assert named.data["base_model_relation"] == "adapter"
    assert f'from_pretrained("meta/base", revision="{"a" * 40}")' in named.text
    (tmp_path / "out/base").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in ("/models/base", "./base", "../base", "out/base", "a/b/c", "C:\\models\\base", ""):
        local = card_of(erasure(base_model_name_or_path=path))
        assert local.data.base_model is None
        assert "base_model_relation" not in local.data
        assert "`LlamaForCausalLM`" in local.text


def test_what_its_maker_tells_is_in_every_card_until_it_is_fitted_anew(lifecycle: Lifecycle, tmp_path: Path) -> None:
    model = lifecycle.fitted(CELL)
    describe(
        model, NAME, datasets="alice/people", labels_from="two annotators", base_model="meta/base", license="mit",
        language="en",
    )  # fmt: skip
    model.save_pretrained(tmp_path / "one")
    again = lifecycle.base("llama")
    again.load_adapter(tmp_path / "one", NAME)
    again.save_pretrained(tmp_path / "two")
    card = ModelCard.load(tmp_path / "two/README.md")
    assert (card.data.datasets, card.data.license, card.data.language) == (["alice/people"], "mit", ["en"])
    assert card.data.base_model == "meta/base"
    assert "| labels | two annotators |" in card.text
    fit_concept_erasure(again, small_batches("llama", seed=9), NAME, sequential=False, progress=False)
    again.save_pretrained(tmp_path / "three")
    assert "two annotators" not in (tmp_path / "three/README.md").read_text()
    with pytest.raises(ValueError, match="is not a name on the Hub"):
        describe(model, NAME, datasets=[str(tmp_path)])
    with pytest.raises(ValueError, match="'absent' is not an hf_erasure adapter"):
        describe(model, "absent")


def test_the_picture_is_drawn_where_there_is_something_to_draw(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_card(folder)
    assert not list(folder.glob("*.png"))
    for config, name in ((erasure(), "leakage.png"), (gradiend(), "effect.png")):
        place = tmp_path / config.peft_type.lower()
        place.mkdir()
        write_card(place, config)
        assert (place / name).read_bytes().startswith(b"\x89PNG")
        assert f"]({name})" in (place / "README.md").read_text()
    bare = tmp_path / "bare"
    bare.mkdir()
    monkeypatch.setattr("hf_erasure.hub.rendering.find_spec", lambda name: None)
    write_card(bare, erasure())
    assert not list(bare.glob("*.png")) and "![" not in (bare / "README.md").read_text()


def test_pictures_of_an_earlier_adapter_are_not_shown(tmp_path: Path) -> None:
    for config, recipe in ((erasure(), False), (gradiend(), True)):
        place = tmp_path / config.peft_type.lower()
        place.mkdir()
        for name in ("leakage.png", "effect.png", "encoded.png"):
            (place / name).write_bytes(b"")
        config.provenance |= {RECIPE: {"edit": {}}} if recipe else {}
        write_card(place, config)
        shown = re.findall(r"!\[[^\]]*\]\((.*?)\)", (place / "README.md").read_text(encoding="utf-8"))
        assert shown == (["effect.png", "encoded.png"] if recipe else ["leakage.png"])
        config.provenance = {}
        write_card(place, config)
        assert "![" not in (place / "README.md").read_text(encoding="utf-8")


# ---- names of strangers ----------------------------------------------------------------------------------------------

NASTY = [
    "x\n---\nbase_model: evil/evil\nlicense: other\n---\n",
    'a"\nbase_model: evil/evil\n"',
    "| a | b |\n| --- | --- |\n| c | d |",
    "<script>alert(1)</script>",
    "<!-- hf-erasure end -->",
    "--> <b>",
    "![x](https://evil.example/x.png)[y](https://evil.example)",
    "```\n# heading\n```",
    "`code` **bold** _it_ $x$ ~~s~~",
    "{{ 7 * 7 }}{% include 'x' %}",
    "\u202egnp.exe\u0000\ud800\x1b[31m",
    "\\",
    "\\|",
    "`",
    "# x",
    "x" * 10_000,
    "<details>",
    "&lt;b&gt; &#124;",
]


def shape(card: str) -> tuple[list[str], list[str]]:
    """The structure of a card's Markdown: its blocks, and the inline elements that are not text."""
    blocks, inline = [], []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(card):
        blocks.append(token.type + (token.content.split("\n")[0] if token.type == "html_block" else ""))
        inline += [
            part.type for part in token.children or [] if part.type not in ("text", "code_inline", "text_special")
        ]
    return [re.sub("hf-erasure [0-9a-f]+", "", block) for block in blocks], inline


def nasty_erasure(name: str) -> ConceptErasureConfig:
    sites = {f"{name}.{i}": {"width": 8, "rank": 1} for i in range(2)}
    config = erasure(concept=name, labels=[name, f"{name} 2"], fitted_sites=sites, base_model_name_or_path=name)
    leakage = {site: [0.9, 0.1] for site in sites} | {"last_hidden_state": [0.9, 0.2]}
    config.provenance = config.provenance | {
        "leakage": leakage, "pool": name, "base_class": name, "combined_from": {name: {}},
        "card": {"labels_from": name, "license": name, "language": [name]},
    }  # fmt: skip
    return config


PRINTABLE = st.characters(exclude_categories=("C", "Z"), include_characters=" ")


def nasty_gradiend(name: str) -> GradiendConfig:
    config = gradiend(feature=name, classes=[name, f"{name} 2"], pairs=[[name, f"{name} 2"]])
    point = {"loss": 0.9, "lms": 0.6, "probabilities": {name: 0.2}, "goals": {"bpi": 0.3, name: 0.1}}
    selection = {"goal": name, "budget": 0.02, "base": point, "best": point, "kept_share": 0.5}
    config.provenance = config.provenance | {"selection": selection, "estimator": name, "correlation": {name: 0.5}}
    return config


@pytest.mark.parametrize("make", [nasty_erasure, nasty_gradiend])
def test_names_of_strangers_change_nothing_but_text(make: Callable[[str], Any]) -> None:
    def text(name: str) -> str:
        facts = replace(facts_of(make(name)), repo_id="alice/adapter")
        facts.base_id = None  # names on the Hub are tested elsewhere
        return str(rendered(facts))

    plain = text("harmless")
    blocks, keys = shape(ModelCard(plain).text), ModelCard(plain).data.to_dict().keys()

    @settings(max_examples=10, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
    @given(st.text(PRINTABLE, min_size=1, max_size=30).filter(str.strip))
    def check(name: str) -> None:
        made = text(name)
        made.encode("utf-8")
        card = ModelCard(made)
        assert shape(card.text) == blocks
        assert card.data.base_model is None
        assert card.data.to_dict().keys() == keys

    for name in NASTY:
        check = example(name)(check)
    check()


@pytest.mark.parametrize("make", [nasty_erasure, nasty_gradiend])
def test_a_name_like_our_marks_does_not_hide_what_is_ours(make: Callable[[str], Any]) -> None:
    card = rendered(facts_of(make("<!-- hf-erasure end -->")))
    text, outcome, _ = updated_readme(f"{card}\nBy hand.\n", card)
    assert outcome == "made anew"
    assert ModelCard(text).text.count("<!-- hf-erasure end -->") == 1
    assert text.endswith("By hand.\n")


def test_provenance_that_makes_no_sense_is_left_out() -> None:
    keys = (
        "leakage",
        "selection",
        "correlation",
        "examples",
        "tokens",
        "pool",
        "card",
        "combined_from",
        "estimator",
        RECIPE,
    )
    for value in (3, "text", [1], {"a": "b"}, {"a": [1]}, {"a": [float("nan"), 1]}, {"a": [True, False]}, None):
        for config in (erasure(), gradiend()):
            config.provenance = config.provenance | dict.fromkeys(keys, value)
            card = card_of(config)
            assert "## Limits" in card.text
            assert card.data.eval_results is None


# ---- cards that others wrote -----------------------------------------------------------------------------------------


def test_metadata_of_others_stays_and_paths_go() -> None:
    text = str(rendered(facts_of(erasure())))
    theirs = ModelCard(
        "---\nlicense: mit\nthumbnail: x.png\npipeline_tag: fill-mask\nbase_model: /home/alice/base\n"
        "tags:\n- base_model:adapter:/home/alice/base\n- mine\n"
        "model-index:\n- name: mine\n  results:\n  - task:\n      type: other\n"
        "    dataset:\n      type: d\n      name: d\n"
        "    metrics:\n    - type: accuracy\n      value: 0.5\n---\n"
    )
    found = merged_metadata(theirs.data, ModelCard(text).data)
    assert (found.license, found["thumbnail"], found.pipeline_tag) == ("mit", "x.png", "fill-mask")
    assert found.base_model is None
    assert found.tags[0] == "mine" and "hf-erasure" in found.tags
    assert not [tag for tag in found.tags if "/home" in tag]
    assert [r.metric_type for r in found.eval_results] == ["accuracy", *["linear_leakage"] * 4]
    again = merged_metadata(found, ModelCard(text).data)
    assert len(again.eval_results) == len(found.eval_results)


# ---- the commands ----------------------------------------------------------------------------------------------------


def evaluation(tmp_path: Path, folder: Path, *names: str, of: tuple[str, ...] | None = None) -> Path:
    """The results of `hf-erasure evaluate`, with measures for a card; columns not in `of` are of another adapter."""
    measures = [
        {"key": "weat", "title": "WEAT", "purpose": "bias", "better": "closer", "ideal": 0.0, "concept": "gender"},
        {"key": "perplexity", "title": "Perplexity", "purpose": "capability", "better": "lower", "ideal": None},
        {"key": "gone", "title": "Not of this adapter", "purpose": "bias", "better": "lower", "ideal": 0.0},
        {"key": "all", "title": "StereoSet, all kinds", "purpose": "bias", "better": "closer", "ideal": 50.0,
         "concept": "stereotypes"},
    ]  # fmt: skip
    values = {
        "base": {"weat": {"value": 1.5, "interval": [1.0, 2.0]}, "perplexity": {"value": 20.25, "interval": None},
                 "all": {"value": 60.0, "interval": [50.0, 70.0]}}
    }  # fmt: skip
    entries = [{"name": "base", "adapters": [], "kind": "", "strength": 1.0, "verified": {}}]
    config = config_in(folder)
    prints: dict[str, Any] = {"base": "0" * 16, "adapters": {}}
    for number, name in enumerate(names):
        entries.append({"name": name, "adapters": [name], "kind": "", "strength": 1.0, "verified": {}})
        values[name] = {
            "weat": {"value": 0.5 + number, "interval": [0.25, 0.75]}, "perplexity": {"value": 21.0, "interval": None},
            "all": {"value": 58.0, "interval": [53.0, 63.0]},
        }  # fmt: skip
        digest = digest_of(folder, config) if of is None or name in of else "f" * 16
        prints["adapters"][name] = {"adapter": digest, "base": config.provenance.get("fingerprint", {})}
    about = {"suite": "gender", "limit": None, "model": "/models/base"}
    path = tmp_path / "results.json"
    content = {"format": 1, "about": about, "entries": entries, "measures": measures, "values": values}
    path.write_text(json.dumps(content | {"fingerprints": prints}))
    return path


def invoke(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_command_makes_a_card_with_results_that_later_saves_keep(
    folder: Path, lifecycle: Lifecycle, tmp_path: Path
) -> None:
    results = evaluation(tmp_path, folder, "other", "no-gender", of=("no-gender",))
    done = invoke("card", folder, "--results", results, "--base-model", "meta/base", "--dataset", "alice/people",
                  "--license", "mit", "--language", "en")  # fmt: skip
    assert done.exit_code == 0, done.output
    assert "anew" in done.output and "3 measures" in done.output
    row = "| WEAT | 1.500 [1.000, 2.000] | 1.500 [0.250, 0.750] | closer to 0 |"
    text = (folder / "README.md").read_text()
    assert row in text
    ours, _, others = text.partition("## What was measured")[2].partition("Other measures, which are not about gender:")
    assert "| WEAT |" in ours and "| Perplexity |" in ours and "StereoSet" not in ours
    assert "| 60.000 [50.000, 70.000] | 58.000 [53.000, 63.000] | closer to 50 | no change |" in others
    assert "suite gender" in text and "/models/base" not in text
    card = ModelCard(text)
    assert results_of(card)["weat", "with the adapter"] == 1.5
    assert (card.data.base_model, card.data.datasets) == ("meta/base", ["alice/people"])

    model = lifecycle.base("llama")
    model.load_adapter(folder, NAME)
    model.save_pretrained(tmp_path / "again")
    assert row in (tmp_path / "again/README.md").read_text()
    fit_concept_erasure(model, small_batches("llama", seed=9), NAME, sequential=False, progress=False)
    model.save_pretrained(tmp_path / "fitted-again")
    assert "WEAT" not in (tmp_path / "fitted-again/README.md").read_text()


def test_the_command_keeps_what_another_version_wrote_into_the_configuration(folder: Path) -> None:
    path = folder / "adapter_config.json"
    before = json.loads(path.read_text()) | {"of_a_newer_version": 1}
    path.write_text(json.dumps(before))
    assert invoke("card", folder, "--license", "mit").exit_code == 0
    after = json.loads(path.read_text())
    assert after["provenance"].pop("card") == {"license": "mit"}
    assert after == before


def test_results_of_a_gradiend_are_forgotten_when_it_is_steered(gradiends: Gradiends, tmp_path: Path) -> None:
    from hf_erasure.adapters import steer

    folder = Path(shutil.copytree(gradiends.folder("llama"), tmp_path / "adapter"))
    done = invoke("card", folder, "--results", evaluation(tmp_path, folder, "feature"))
    assert done.exit_code == 0, done.output
    model = gradiends.base("llama")
    model.load_adapter(folder, "gender")
    model.save_pretrained(tmp_path / "same")
    assert "WEAT" in (tmp_path / "same/README.md").read_text()
    steer(model, "gender", feature_factor=-1.0)
    model.save_pretrained(tmp_path / "steered")
    assert "WEAT" not in (tmp_path / "steered/README.md").read_text()


def test_the_command_refuses_what_is_not_of_this_adapter(folder: Path, lifecycle: Lifecycle, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def refused(results: Path) -> str:
        done = invoke("card", folder, "--results", results)
        assert done.exit_code == 2
        return " ".join(done.output.split())

    said = refused(evaluation(tmp_path, folder, "no-gender", of=()))
    assert "the erasure of 'gender' in" in said and "is not among them: it is another one, or was fitted" in said
    chosen = evaluation(tmp_path, folder, "one", "two", of=("two",))
    old = json.loads(chosen.read_text())
    for change, words in (
        (lambda content: content.update(fingerprints={}), "has fingerprints of the adapters [], and the erasure of"),
        (lambda content: content.update(format=0), "holds no results"),
        (lambda content: other_weights(content["fingerprints"]["adapters"]["two"]["base"]), "on another base than"),
    ):
        content = copy.deepcopy(old)
        change(content)
        chosen.write_text(json.dumps(content))
        assert words in refused(chosen)
    assert "not a name on the Hub" in invoke("card", folder, "--base-model", "./base").output
    assert "there is one in ['no-gender']" in invoke("card", tmp_path).output
    with pytest.raises(TypeError, match="unexpected keyword argument 'licence'"):
        describe_folder(folder, licence="mit")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before

    # A copy saved by a model is the same adapter; an adapter that is fitted anew is another one.
    chosen.write_text(json.dumps(old))
    model = lifecycle.base("llama")
    model.load_adapter(folder, NAME)
    model.save_pretrained(tmp_path / "again")
    assert invoke("card", tmp_path / "again", "--results", chosen).exit_code == 0
    fit_concept_erasure(model, small_batches("llama", seed=9), NAME, sequential=False, progress=False)
    model.save_pretrained(tmp_path / "anew")
    with pytest.raises(ValueError, match="is not among them"):
        describe_folder(tmp_path / "anew", results=chosen)


def other_weights(samples: dict[str, Any]) -> None:
    for sample in samples.values():
        sample["values"] = [1.0 - value for value in sample["values"]]


def test_results_of_a_recipe_stay_with_the_adapter_that_it_made(lifecycle: Lifecycle, tmp_path: Path) -> None:
    model = lifecycle.fitted(CELL)
    row = {"key": "probe_accuracy", "title": "a probe", "before": 0.9, "after": 0.5, "better": "lower"}
    refitted = {"key": "refitted_probe_accuracy", "title": "a refitted probe", "after": 0.75, "better": "lower"}
    rows = [known | {"data": TESTED_ON} for known in (row, refitted)]
    model.peft_config[NAME].provenance[RECIPE] = {"labels_from": "two annotators", "results": rows}
    for folder, is_its_own in ((tmp_path / "own", True), (tmp_path / "anew", False)):
        model.save_pretrained(folder)
        text = (folder / "README.md").read_text()
        for words in ("| a probe | 0.900 | 0.500 |", "| a refitted probe | – | 0.750 |", "| labels | two annotators |"):
            assert (words in text) == is_its_own
        fit_concept_erasure(model, small_batches("llama", seed=9), NAME, sequential=False, progress=False)


@pytest.mark.parametrize("part", ["recipe", "selection"])
def test_what_an_edit_did_is_said_where_the_adapter_is_steered_so(part: str) -> None:
    steered = {"feature_factor": 1.0, "learning_rate": 0.01, "pair": ["she", "he"]}
    base: dict[str, Any] = {"loss": 0.5, "probabilities": {"he": 0.5, "she": 0.25}}
    base["goals"] = {"bpi": 0.25, "balance": 0.125}
    edit = {"goal": "bpi", "base": base, "best": base | steered | {"goals": {"bpi": 0.75, "balance": 0.5}}}

    def titles(**fields: Any) -> list[str]:
        config = gradiend(**steered | fields)
        config.provenance = config.provenance | {"selection": {}} | {part: {"edit": edit} if part == RECIPE else edit}
        facts = facts_of(config)
        assert facts.method["goal"] == ("bpi" if part == "selection" and facts.measured else None)
        return [row["title"] for row in facts.measured]

    shares = ["mean probability P(she)", "mean probability P(he)"]
    goals = ["score of 'balance'", "BPI, which the edit was chosen for"]
    assert titles() == [*shares, *goals, "language modelling, loss"]
    assert titles(learning_rate=0.02) == titles(feature_factor=-1.0) == []
    other = {"classes": ["she", "he", "they"], "pairs": [["she", "he"], ["she", "they"]], "encoders": [ENCODER] * 2}
    assert titles(**other) and not titles(**other, pair=["she", "they"])


def test_results_on_a_base_that_nobody_knows_are_taken_with_a_warning(folder: Path, tmp_path: Path) -> None:
    chosen = evaluation(tmp_path, folder, "no-gender")
    content = json.loads(chosen.read_text())
    content["fingerprints"]["adapters"]["no-gender"]["base"] = {}
    chosen.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match="cannot be checked: its weights could not be read there"):
        assert len(describe_folder(folder, results=chosen)) == 3


def test_the_command_keeps_a_card_by_hand_unless_it_is_told_not_to(folder: Path) -> None:
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nBy hand.\n")
    assert "has text of its own" in invoke("card", folder).output
    assert "By hand." in (folder / "README.md").read_text()
    assert invoke("card", folder, "--overwrite").exit_code == 0
    card = ModelCard.load(folder / "README.md")
    assert "By hand." not in card.text and card.data.license == "mit"
    (folder / "README.md").write_bytes(b"\xff\xfe not text")
    left = invoke("card", folder)
    assert left.exit_code == 1 and "was left as it is" in left.output


def test_a_merged_model_says_what_was_merged_and_loads_alone(lifecycle: Lifecycle, tmp_path: Path) -> None:
    out, adapter = tmp_path / "merged", shutil.copytree(lifecycle.folder(CELL), tmp_path / "adapter")
    (adapter / "leakage.png").write_bytes(b"")
    done = invoke("merge", lifecycle.base_folder("llama"), adapter, out, "--max-shard-size", "20KB")
    assert done.exit_code == 0, done.output
    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.base_model is None and card.data.pipeline_tag == "text-generation"
    assert "Merged the erasure of 'gender' at 5 sites" in card.text
    assert "hf_erasure" not in card.text and "/tmp" not in card.text and "![" not in card.text
    assert len(list(out.glob("model-*.safetensors"))) > 1
    assert type(hf.AutoModelForCausalLM.from_pretrained(out)).__name__ == "LlamaForCausalLM"


def test_an_exported_lora_says_what_it_is(lifecycle: Lifecycle, gradiends: Gradiends, tmp_path: Path) -> None:
    exported = export_to_lora(lifecycle.fitted(CELL), NAME, tmp_path / "erasure")
    card = ModelCard.load(tmp_path / "erasure/README.md")
    assert card.data.library_name == "peft" and {"lora", "hf-erasure"} <= set(card.data.tags)
    assert f"a stock LoRA on {len(exported.modules)} modules" in card.text
    assert "import hf_erasure" not in card.text and "/tmp" not in card.text
    with_lora = peft.PeftModel.from_pretrained(lifecycle.base("llama"), tmp_path / "erasure")
    with_lora.save_pretrained(tmp_path / "again")
    edit = export_to_lora(gradiends.fitted("llama"), "gender", tmp_path / "edit", rank=2)
    text = (tmp_path / "edit/README.md").read_text()
    assert f"{edit.kept:.1%} of its squared norm" in text
    assert f"{len(edit.left_out)} parameters that a LoRA cannot carry" in text


def test_facts_are_plain_data() -> None:
    for config in (erasure(), gradiend()):
        facts = facts_of(config)
        assert CardFacts(**json.loads(json.dumps(vars(facts)))) == facts


def test_a_card_says_what_is_guarded_what_was_measured_on_and_how_sure_it_is(tmp_path: Path) -> None:
    told = {
        "base_class": "BertForSequenceClassification", "examples": 40, "tokens": 400, "pool": "cls",
        "reader": "BertForSequenceClassification reads the first token",
        "leakage": {"layers.0.norm": [0.9, -0.2], "last_hidden_state": [0.8, 0.1]},
        "leakage_intervals": {"layers.0.norm": [0.8, 0.95, 0.0, 0.1], "last_hidden_state": [0.7, 0.9, 0.0, 0.3]},
        "measured_on": "fitted rows (all of 40)",
    }  # fmt: skip
    facts = facts_of(erasure(provenance=told))
    text = str(rendered(facts))
    for words in (
        "What is guarded (`pool`): `cls`; BertForSequenceClassification reads the first token.",
        "On fitted rows (all of 40), of the first token, when it was fitted:",
        "0.800 [0.700, 0.900] | 0.100 [0.000, 0.300] | lower",
        "| `layers.0.norm` | 8 | 1 | 0.900 [0.800, 0.950] | 0.000 [0.000, 0.100] |",
        "how much other text of the same kind leaks was not measured",
        "by Fisher's z over sequences",
    ):
        assert words in text, words
    assert "held-out" not in text
    assert draw(facts, tmp_path) == "leakage.png"
