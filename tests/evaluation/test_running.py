"""One run measures the base, every adapter and all adapters together, and reports what it could not measure."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    BertForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
)
from typer.testing import CliRunner, Result

from hf_erasure import ConceptErasureConfig, fit_concept_erasure
from hf_erasure.adapters import steer
from hf_erasure.cli import app
from hf_erasure.evaluation import (
    DataFolder,
    Evaluation,
    evaluate,
    pictures,
    report,
    running,
)
from hf_erasure.evaluation.data import Sentence, read_sentence, read_treebank
from hf_erasure.evaluation.loading import Entry, Loader, entries_of, fingerprints, read_adapters
from hf_erasure.evaluation.measures import measures_of
from hf_erasure.evaluation.results import Results
from hf_erasure.evaluation.subject import FINAL, Subject
from hf_erasure.metrics import linear_leakage
from tests import prepared
from tests.evaluation.material import PAIR, erasure_folder, gradiend_folder, run, saved, small_data

# ---- end to end -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(
    assets: Path, story: str, adapters: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Results, str, Path]:
    """The results, the output and the folder of the command, with little data."""
    folder = tmp_path_factory.mktemp("whole")
    parts = ("bias-in-bios", "crows-pairs", "seat", "stereoset", "winobias", "tinystories-sample")
    data = small_data(assets, folder / "data", parts)
    out = folder / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "_NEURON_TEXTS", 6)  # for each class; their gradients are taken one by one
        result = run(story, *adapters, "--data", data, "--output", out, "--limit", 15, "--resamples", 10)
    assert result.exit_code == 0, result.output
    return saved(out), result.stdout, out


def test_every_entry_has_every_measure(whole: tuple[Results, str, Path]) -> None:
    results, _, _ = whole
    assert results.names == ["base", "erasure", "steered", "together"]
    keys = [measure["key"] for measure in results.measures]
    assert keys == [
        "gender_linear", "gender_mlp", "gender_rbf", "gender_mdl", "tpr_gap", "seat_gender", "winobias",
        "crows_pairs_gender", "stereoset_ss_gender", "stereoset_lms_gender", "perplexity_tinystories-sample",
        "profession", "distortion",
    ]  # fmt: skip
    assert [list(results.values[name]) for name in results.names] == [keys] * 4
    without = {key for key in keys if results.values["base"][key]["interval"] is None}
    assert without == set()
    for name in results.names:
        for key in keys:
            cell = results.values[name][key]
            if cell["interval"] is not None and key not in ("tpr_gap", "stereoset_ss_gender"):
                # Resamples of a root mean square and of a mean over terms are biased; the other values lie within.
                assert cell["interval"][0] <= cell["value"] + 1e-9 and cell["value"] - 1e-9 <= cell["interval"][1], key


def test_adapters_change_what_they_change(whole: tuple[Results, str, Path]) -> None:
    values = whole[0].values
    assert values["base"]["distortion"]["value"] == 0
    for name in ("erasure", "steered", "together"):
        assert values[name]["distortion"]["value"] > 0.01
        perplexity = "perplexity_tinystories-sample"
        assert values[name][perplexity]["value"] != values["base"][perplexity]["value"]
    # All adapters together differ from each alone.
    distortions = [values[name]["distortion"]["value"] for name in ("erasure", "steered", "together")]
    assert len({round(value, 6) for value in distortions}) == 3


def card(folder: Path, results: Path) -> Result:
    return CliRunner().invoke(app, ["card", str(folder), "--results", str(results)])


def test_a_card_takes_results_of_its_own_adapter_only(
    whole: tuple[Results, str, Path], adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    results, _, out = whole
    prints = results.fingerprints
    assert len(prints["base"]) == 16 and set(prints["adapters"]) == {"erasure", "steered"}
    for name, folder in zip(prints["adapters"], adapters, strict=True):
        copied = Path(shutil.copytree(folder, tmp_path / f"a-copy-of-{name}"))
        done = card(copied, out)
        assert done.exit_code == 0, done.output
        value = results.values[name]["distortion"]["value"]
        line = next(x for x in (copied / "README.md").read_text().splitlines() if x.startswith("| Distortion"))
        assert f"| {value:.3f} [" in line and line.endswith("| lower | worse |")
    config = json.loads((copied / "adapter_config.json").read_text())
    (copied / "adapter_config.json").write_text(json.dumps(config | {"learning_rate": 0.03}))
    refused = card(copied, out)
    assert refused.exit_code == 2 and "is not among them" in " ".join(refused.output.split())


def test_results_on_another_base_are_refused(
    assets: Path, story: str, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    trained = AutoModelForMaskedLM.from_pretrained(story)
    with torch.no_grad():
        for weight in trained.parameters():
            weight.add_(1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    trained.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(story).save_pretrained(tmp_path / "trained")
    data = small_data(assets, tmp_path / "data", ("crows-pairs",))
    plan = Evaluation(str(tmp_path / "trained"), data, [str(adapters[0])], suite="stereotypes", limit=4, resamples=20)
    with pytest.warns(UserWarning, match="has been trained further"):
        results = evaluate(plan)
    (tmp_path / "results.json").write_text(results.to_json())
    folder = Path(shutil.copytree(adapters[0], tmp_path / "erasure"))
    refused = card(folder, tmp_path / "results.json")
    assert refused.exit_code == 2
    assert "was measured on another base than the erasure of 'gender' was fitted on" in " ".join(refused.output.split())


def test_the_figures_have_their_data(whole: tuple[Results, str, Path]) -> None:
    results = whole[0]
    assert list(results.depth["gender"]) == list(results.embedding) == list(results.shifts) == results.names
    assert [row["layer"] for row in results.depth["gender"]["base"]] == [f"layer {i}" for i in range(2)] + [FINAL]
    neuron = results.neurons["steered"]
    assert set(neuron["values"]) == {"female", "male", "neutral"} and all(neuron["values"].values())
    assert all(0 < row["she"] < 1 for row in results.shifts["base"]["occupations"])
    last = results.depth["gender"]["erasure"][-1]["leakage"]
    assert last == pytest.approx(results.values["erasure"]["gender_linear"]["value"])


def test_what_is_printed(whole: tuple[Results, str, Path]) -> None:
    results, printed, out = whole
    assert results.table() in printed
    head = next(line for line in printed.splitlines() if "base" in line)
    assert head.split() == results.names
    row = next(line for line in printed.splitlines() if "Gender, linear probe" in line)
    assert "↓" in row and len(re.findall(r"\[-?\d\.\d{3}, -?\d\.\d{3}\]", row)) == 4
    assert "→50" in next(line for line in printed.splitlines() if "CrowS-Pairs" in line)
    assert "Nonlinear probes may still read the concept" in printed
    assert str(out / "report.html") in printed and (out / "report.html").is_file()
    verified = {entry["name"]: entry["verified"] for entry in results.entries}
    assert "erases 'gender'" in verified["together"]["erasure"] and "steers" in verified["together"]["steered"]


@pytest.mark.slow
def test_one_seed_gives_one_file(assets: Path, story: str, adapters: tuple[Path, Path], tmp_path: Path) -> None:
    data = small_data(assets, tmp_path / "data", ("bias-in-bios", "winobias", "seat"))
    plan = {"model": story, "data": data, "adapters": [str(adapters[1])], "limit": 18, "resamples": 20}
    first, again, other = (evaluate(Evaluation(**plan, seed=seed)).to_json() for seed in (0, 0, 1))
    assert first == again
    assert first != other
    json.loads(first)


# ---- adapters that do not act ---------------------------------------------------------------------------------------


@pytest.fixture
def idle(story: str, tmp_path: Path) -> Path:
    """A GRADIEND adapter that is not steered."""
    return gradiend_folder(story, tmp_path / "idle", rate=0.0)


def test_an_adapter_that_does_not_act_stops_the_run(assets: Path, story: str, idle: Path, tmp_path: Path) -> None:
    result = run(story, idle, "--data", assets / "data", "--output", tmp_path / "out")
    assert result.exit_code == 2
    assert "'idle' does not act" in result.stderr and "learning_rate is 0" in result.stderr
    assert "--allow-inactive" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_it_can_be_allowed(
    assets: Path, story: str, idle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_data(assets, tmp_path / "data", ("bias-in-bios",))
    monkeypatch.setattr(running, "measures_of", lambda *_: measures_of("gender", DataFolder(data))[:1])
    results = evaluate(Evaluation(story, data, [str(idle)], limit=18, resamples=10, allow_inactive=True))
    assert "does not act" in results.entries[1]["verified"]["idle"]
    same = [results.values[name]["gender_linear"]["value"] for name in ("base", "idle")]
    assert same[0] == same[1]


def test_two_loras_that_train_the_same_module_are_refused_in_a_sentence(story: str, tmp_path: Path) -> None:
    for name in ("first", "second"):
        config = peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["cls"])
        peft.get_peft_model(AutoModelForMaskedLM.from_pretrained(story), config).save_pretrained(tmp_path / name)
    entries = entries_of(read_adapters([str(tmp_path / "first"), str(tmp_path / "second")]))
    loader = Loader(story, [])
    loader.load(entries[2])
    with pytest.raises(ValueError, match=r"\['first', 'second'\] cannot all be active: .*copy of 'cls'"):
        loader.load(entries[3])


def test_a_stock_lora_is_checked_too(story: str, tmp_path: Path) -> None:
    folders = {}
    for name, starts, target in (("zero", True, "query"), ("random", False, "query"), ("head", False, "decoder")):
        model = AutoModelForMaskedLM.from_pretrained(story)
        model.add_adapter(peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=starts), adapter_name=name)
        model.save_pretrained(tmp_path / name)
        folders[name] = str(tmp_path / name)
    entries = entries_of(read_adapters(list(folders.values())))
    loader = Loader(story, [])
    acts, text = entries[1].adapters[0].acts(loader.load(entries[1]))
    assert not acts and "does not change the outputs" in text
    model = loader.load(entries[2])
    acts, text = entries[2].adapters[0].acts(model)
    assert acts and "'random' (LORA) changes the outputs" in text
    assert list(model.active_adapters()) == ["random"]  # as before the check
    assert entries[3].adapters[0].acts(loader.load(entries[3]))[0]


# ---- loading --------------------------------------------------------------------------------------------------------


def test_names_and_strengths(adapters: tuple[Path, Path], tmp_path: Path) -> None:
    found = read_adapters([str(adapters[0]), str(adapters[1]), str(adapters[0])])
    assert [adapter.name for adapter in found] == ["erasure", "steered", "erasure-2"]
    names = [entry.name for entry in entries_of(found[:2], [0, 0.5, 1, 2, 0.5])]
    assert names == ["base", "erasure", "steered", "steered ×0.5", "steered ×2", "together"]
    awkward = tmp_path / "gradiend"
    shutil.copytree(adapters[1], awkward)
    assert read_adapters([str(awkward)])[0].name == "gradiend-adapter"  # PEFT's keys do not allow the name `gradiend`
    with pytest.raises(ValueError, match="none here"):
        entries_of(found[:1], [2.0])


def test_strength_multiplies_the_learning_rate(story: str, adapters: tuple[Path, Path]) -> None:
    found = read_adapters([str(adapters[1])])
    twice = Loader(story, found).load(Entry("twice", tuple(found), 2.0))
    by_hand = AutoModelForMaskedLM.from_pretrained(story)
    by_hand.load_adapter(str(adapters[1]), adapter_name="steered")
    steer(by_hand, "steered", learning_rate=0.04)
    inputs = AutoTokenizer.from_pretrained(story)("tom went home.", return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(twice(**inputs).logits, by_hand.eval()(**inputs).logits)


def test_a_checkpoint_that_names_no_class_lacks_nothing(
    story: str, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(story, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    del config["architectures"]
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    loader = Loader(str(tmp_path / "model"), read_adapters([str(adapters[0])]))
    assert (loader.kind, loader.note) == (BertForMaskedLM, "")


def test_an_adapter_of_another_model_type_is_refused_by_name(assets: Path, adapters: tuple[Path, Path]) -> None:
    found = read_adapters([str(adapters[0])])
    loader = Loader(str(assets / "models" / "stories260k"), found)
    with pytest.raises(ValueError, match="which this LlamaForCausalLM does not have"):
        loader.load(entries_of(found)[-1])


def test_an_adapter_of_the_backbone_works_beside_one_of_the_whole_model(
    story: str, adapters: tuple[Path, Path], tmp_path: Path
) -> None:
    """`hf-erasure fit` uses the bare encoder, `gradiend fit` the model with its head; here both act in the latter."""
    backbone = AutoModel.from_pretrained(story)
    backbone.add_adapter(ConceptErasureConfig(concept="gender", labels=list(PAIR)), adapter_name="bare")
    generator = torch.Generator().manual_seed(0)
    batch = {
        "input_ids": torch.randint(5, 500, (32, 8), generator=generator),
        "attention_mask": torch.ones(32, 8, dtype=torch.long), "concept_labels": torch.arange(32) % 2,
    }  # fmt: skip
    fit_concept_erasure(backbone, [batch], "bare", sequential=False, progress=False)
    backbone.save_pretrained(tmp_path / "bare")
    found = read_adapters([str(tmp_path / "bare"), str(adapters[1])])
    loader = Loader(story, found)
    assert loader.kind.__name__ == "BertForMaskedLM" and not loader.note
    together = entries_of(found)[-1]
    model = loader.load(together)
    assert all(adapter.acts(model)[0] for adapter in together.adapters)
    assert all(own["base"] for own in fingerprints(model, found)["adapters"].values())
    inputs = {name: value for name, value in batch.items() if name != "concept_labels"}
    with torch.no_grad():
        outputs = [loader.load(entry)(**inputs).logits for entry in entries_of(found)]
    for i, one in enumerate(outputs):
        assert all(not torch.equal(one, other) for other in outputs[i + 1 :])


def test_a_folder_without_an_adapter(tmp_path: Path, story: str, assets: Path) -> None:
    result = run(story, tmp_path, "--data", assets / "data")
    assert result.exit_code == 2 and "holds no adapter" in result.stderr


# ---- parts ----------------------------------------------------------------------------------------------------------


def test_part_of_speech_suite(story: str, assets: Path, tmp_path: Path) -> None:
    data = small_data(assets, tmp_path / "data", ("ud-ewt", "bias-in-bios"))
    results = evaluate(Evaluation(story, data, suite="pos", limit=40, resamples=10))
    found = results.values["base"]["pos_linear"]
    # The letters of a word give away half of all words; a probe without labels would stay below 0.1.
    assert found["value"] > 0.15
    assert found["details"]["rows"] > 300 and "SYM" in found["details"]["rare"]
    assert [row["layer"] for row in results.depth["pos"]["base"]][-1] == FINAL
    assert "profession" in results.values["base"]


_NO_RUN: Any = None, None  # the plan and the data, which the states of texts do not need


def test_states_are_the_models_own(story: str) -> None:
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(story).eval(), AutoTokenizer.from_pretrained(story)
    texts = ["tom went home.", "the big dog ran to the park and sat down."]
    subject = Subject(model, tokenizer, *_NO_RUN)
    pooled, final = subject.pooled(texts), subject.final_states(texts)
    for number, text in enumerate(texts):
        with torch.no_grad():
            alone = model.bert(**tokenizer(text, return_tensors="pt"), output_hidden_states=True)
        # Padding changes the sums only by rounding.
        torch.testing.assert_close(final[number], alone.last_hidden_state[0], rtol=0, atol=1e-5)
        for layer in range(2):
            expected = alone.hidden_states[layer][0].mean(0)
            torch.testing.assert_close(pooled[f"layer {layer}"][number], expected, rtol=0, atol=1e-5)


def test_of_an_encoder_decoder_the_encoder_is_read(story: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(story)
    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    model = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **sizes)).eval()
    texts = ["tom went home.", "the big dog ran to the park and sat down."]
    pooled = Subject(model, tokenizer, *_NO_RUN).pooled(texts)
    assert list(pooled) == ["layer 0", "layer 1", FINAL]
    for number, text in enumerate(texts):
        with torch.no_grad():
            alone = model.encoder(**_ids_and_mask(tokenizer(text, return_tensors="pt")), output_hidden_states=True)
        # Padding changes the sums only by rounding.
        torch.testing.assert_close(pooled["layer 1"][number], alone.hidden_states[1][0].mean(0), rtol=0, atol=1e-5)
        torch.testing.assert_close(pooled[FINAL][number], alone.last_hidden_state[0].mean(0), rtol=0, atol=1e-5)


def _ids_and_mask(encoded: Any) -> dict[str, torch.Tensor]:
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


def test_probes_read_what_they_can() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 2, generator=generator)
    straight = ["a" if value > 0 else "b" for value in x[:, 0].tolist()]
    crossed = ["a" if value > 0 else "b" for value in (x[:, 0] * x[:, 1]).tolist()]
    statistics: dict[str, Any] = {"resamples": 10}
    for labels, probe, low, high in (
        (straight, "linear", 0.9, 1.0),
        (crossed, "linear", 0.3, 0.65),  # a linear probe cannot read a product of signs
        (crossed, "mlp", 0.85, 1.0),
    ):
        found = linear_leakage.accuracy(
            linear_leakage.held_out_answers(x, labels, probe=probe, seed=0), labels, **statistics
        )
        assert low <= found["accuracy"] <= high


def test_a_sentence_of_the_treebank() -> None:
    lines = ["# text = I don't, im", "1\tI\t_\tPRON", "2-3\tdon't\t_\t_", "2\tdo\t_\tAUX", "3\tn't\t_\tPART",
             "4\t,\t_\tPUNCT", "5-6\tim\t_\t_", "5\tI\t_\tPRON", "6\tam\t_\tAUX"]  # fmt: skip
    sentence = read_sentence(lines)
    assert sentence.spans == [(0, 1, "PRON"), (2, 4, "AUX"), (4, 7, "PART"), (7, 8, "PUNCT")]
    assert sentence.tags([(0, 1), (1, 4), (4, 7), (7, 8), (8, 11), (0, 0)]) == [
        "PRON", "AUX", "PART", "PUNCT", None, None,
    ]  # fmt: skip


def test_a_mark_before_the_first_word_has_no_tag(assets: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(assets / "models" / "stories260k")
    sentence = Sentence("Xylophones sing", [(0, 10, "NOUN"), (11, 15, "VERB")])
    for special in (True, False):
        found = tokenizer(sentence.text, return_offsets_mapping=True, add_special_tokens=special)
        tokens = tokenizer.convert_ids_to_tokens(found["input_ids"])
        tags = dict(zip(tokens, sentence.tags(found["offset_mapping"]), strict=True))
        assert (tags["▁"], tags["X"], tags["es"], tags["ing"]) == (None, "NOUN", "NOUN", "VERB")


def test_treebanks_as_people_have_them(tmp_path: Path) -> None:
    good = "# text = He ran .\n1\tHe\the\tPRON\n2\tran\trun\tVERB\n3\t.\t.\tPUNCT\n\n"
    path = tmp_path / "t.conllu"
    taken = [
        good.replace("text = ", "text ="), good.replace("# text", "#text"), good + "# end\n", good + "\n \n" + good,
        "\ufeff" + good, good.replace("\n", "\r\n"),
    ]  # fmt: skip
    for content in taken:
        path.write_bytes(content.encode())
        found = read_treebank(path)
        assert [sentence.text for sentence in found] == ["He ran ."] * content.count("ran .")
        assert found[0].spans == [(0, 2, "PRON"), (3, 6, "VERB"), (7, 8, "PUNCT")] and not found.left_out
    for bad, reason in (
        (good.replace("2\tran\trun\tVERB", "2\tran"), "line 6 cannot be read (IndexError: "),
        (good.replace("# text", "# words"), "line 6 has no line '# text = …'"),
        (good.replace("\tran", "\tran\u00a0off"), "line 6 has the word 'ran\\xa0off', which is not in its text"),
        (good.replace("3\t.", "3-4\t."), "line 6 cannot be read (KeyError: 3)"),
    ):
        path.write_text(good + bad + good, encoding="utf-8")
        with pytest.warns(UserWarning, match=re.escape(f"1 row is left out: {reason}")):
            assert len(read_treebank(path)) == 2
        path.write_text(bad, encoding="utf-8")
        with pytest.raises(ValueError, match=r"t.conllu has no good row"):
            read_treebank(path)


def test_biographies_keep_their_kinds_when_few_are_taken(assets: Path) -> None:
    found = DataFolder(assets / "data", 12).biographies()
    kinds = list(zip(found.professions, found.genders, strict=True))
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(kinds, 2) and len(set(kinds)) == 6


# ---- the harness ----------------------------------------------------------------------------------------------------

TASK = """
task: small_choice
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: ["he was happy.", "zq xv jk."]
doc_to_target: 0
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def _subject(assets: Path) -> Subject:
    path = assets / "models" / "stories260k"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    data = assets / "data"
    return Subject(model, tokenizer, Evaluation(str(path), data), DataFolder(data, 8))


def test_the_harness_gets_the_model(assets: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    rows = tmp_path / "rows.json"
    rows.write_text("\n".join(json.dumps({"text": f"{name} went to the park and"}) for name in ("Tom", "Ben", "Max")))
    (tmp_path / "small_choice.yaml").write_text(TASK.format(rows=rows))
    found = running.run_harness(_subject(assets), ["small_choice"], task_folder=str(tmp_path))
    # A model of stories would not say letters at random.
    assert found["small_choice.acc"]["value"] == 1.0 and found["small_choice.acc"]["better"] == "higher"


def test_a_task_that_is_not_there(assets: Path) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    with pytest.raises(ValueError, match="no such task"):
        running.run_harness(_subject(assets), ["no_such_task_at_all"])


def test_what_is_handed_to_the_harness(assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tested without the package: the harness gets the model as it is, with its adapters, the seed and the limit."""
    seen: dict[str, Any] = {}

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        seen.update(given)
        scores = {"acc,none": 0.5, "acc_stderr,none": 0.1, "ppl,none": 9.0, "ppl_stderr,none": "N/A", "alias": "t"}
        return {"results": {"t": scores}, "higher_is_better": {"t": {"acc": True, "ppl": False}}}

    manager = types.SimpleNamespace(all_tasks=["t"])
    for name, content in {
        "lm_eval": {"simple_evaluate": simple_evaluate},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": lambda **given: given},
        "lm_eval.tasks": {"TaskManager": lambda include_path: manager},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    subject = _subject(assets)
    found = running.run_harness(subject, ["t"])
    assert seen["model"]["pretrained"] is subject.model and seen["model"]["tokenizer"] is subject.tokenizer
    assert seen["limit"] == 8 and seen["random_seed"] == 0
    assert found["t.acc"]["interval"] == pytest.approx([0.304, 0.696])
    assert found["t.ppl"] == {"value": 9.0, "interval": None, "better": "lower"}


def test_without_the_harness_there_is_a_sentence(story: str, assets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run(story, "--data", assets / "data", "--harness", "hellaswag")
    assert result.exit_code == 2 and "pip install 'hf-erasure[harness]'" in result.stderr


# ---- packaging ------------------------------------------------------------------------------------------------------


def test_without_matplotlib_the_report_has_its_tables_and_names_the_extra(tmp_path: Path) -> None:
    # As if these modules and those that import them had never been imported.
    code = "import sys\nown = 'hf_erasure.evaluation', 'hf_erasure.metrics'\n"
    code += "for name in list(sys.modules):\n    if name.startswith((*own, 'matplotlib', 'mpl_toolkits', 'sklearn')):\n"
    code += "        del sys.modules[name]\nfor name in ('matplotlib', 'sklearn'): sys.modules[name] = None\n"
    code += "from hf_erasure.evaluation import report, measures\nfrom tests.evaluation.material import made_up\n"
    code += "print(report.html_page(made_up()))"
    done = prepared.run(prepared.run_code, code, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "pip install &#39;hf-erasure[plot]&#39;" in done.stdout and "<svg" not in done.stdout
    assert "CrowS-Pairs, % stereotype" in done.stdout


@pytest.mark.filterwarnings("ignore:pool=")
def test_probes_read_a_text_by_the_pool_of_each_adapter(
    story: str, few: Path, adapters: tuple[Path, Path], assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen(suite: str, data: DataFolder, pools: Any) -> list[Any]:
        return [m for m in measures_of(suite, data, pools) if m.key.startswith("gender_linear")]

    monkeypatch.setattr(running, "measures_of", chosen)
    first = erasure_folder(assets, story, tmp_path / "first", "cls")
    results = evaluate(Evaluation(story, few, [str(first), str(adapters[0])], limit=18, resamples=10))
    assert all(set(values) == {"gender_linear", "gender_linear_mean"} for values in results.values.values())
    assert [measure["pool"] for measure in results.measures] == ["cls", "mean"]
    titles = [f"Gender, linear probe − majority, {words}" for words in ("the first token", "the mean of the tokens")]
    assert [measure["title"] for measure in results.measures] == titles
    assert "biographies are drawn for cls" in report.html_page(results)
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(story).eval(), AutoTokenizer.from_pretrained(story)
    found = DataFolder(few, 18).biographies()
    rows = [tokenizer(text, truncation=True, max_length=256, return_tensors="pt") for text in found.texts]
    with torch.no_grad():
        states = torch.cat([model.base_model(**row).last_hidden_state[:, 0] for row in rows])
    given = linear_leakage.held_out_answers(states, found.genders, seed=0)
    expected = sum(a == b for a, b in zip(given, found.genders, strict=True)) / len(given)
    assert results.values["base"]["gender_linear"]["details"]["accuracy"] == pytest.approx(expected)
