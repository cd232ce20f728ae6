"""The parts of the part-of-speech study, and the study itself on a few sentences."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PreTrainedTokenizerFast,
)

from hf_erasure.evaluation.data import read_sentence
from recipes.pos_scrubbing import study

FOLDER = Path(study.__file__).parent

CONLLU = """\
# sent_id = 1
# text = Don't go, im sure!
1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_
1\tDo\tdo\tAUX\t_\t_\t_\t_\t_\t_
2\tn't\tnot\tPART\t_\t_\t_\t_\t_\t_
3\tgo\tgo\tVERB\t_\t_\t_\t_\t_\tSpaceAfter=No
4\t,\t,\tPUNCT\t_\t_\t_\t_\t_\t_
4.1\tthat\tthat\tSCONJ\t_\t_\t_\t_\t_\t_
5-6\tim\t_\t_\t_\t_\t_\t_\t_\t_
5\tI\tI\tPRON\t_\t_\t_\t_\t_\t_
6\tam\tbe\tAUX\t_\t_\t_\t_\t_\t_
7\tsure\tsure\tADJ\t_\t_\t_\t_\t_\tSpaceAfter=No
8\t!\t!\tPUNCT\t_\t_\t_\t_\t_\t_
"""


@pytest.fixture(scope="module")
def model_path(assets: Path) -> str:
    return str(assets / "models" / "stories260k")


@pytest.fixture(scope="module")
def tokenizer(model_path: str):
    return AutoTokenizer.from_pretrained(model_path)


def test_words_of_a_contraction_have_their_own_characters_where_they_spell_it() -> None:
    sentence = read_sentence(CONLLU.splitlines())
    assert [(sentence.text[a:b], tag) for a, b, tag in sentence.spans] == [
        ("Do", "AUX"), ("n't", "PART"), ("go", "VERB"), (",", "PUNCT"), ("sure", "ADJ"), ("!", "PUNCT"),
    ]  # fmt: skip


def test_a_subword_has_the_tag_of_the_word_its_last_letter_is_in() -> None:
    sentence = read_sentence(CONLLU.splitlines())
    pieces = {(0, 1): "AUX", (1, 3): "PART", (3, 5): "PART", (5, 8): "VERB", (5, 6): None, (9, 12): None}
    found = study.tag_of_tokens(sentence, list(pieces))
    assert [None if label == study.IGNORED else study.TAGS[label] for label in found] == list(pieces.values())


def test_every_word_of_the_treebank_stands_in_its_sentence(assets: Path) -> None:
    sentences = study.read_treebank(assets / "data" / "ud-ewt" / "en_ewt-ud-dev.conllu")
    assert len(sentences) == 2001
    assert {tag for sentence in sentences for _, _, tag in sentence.spans} == set(study.TAGS)
    assert sum(len(sentence.spans) for sentence in sentences) > 25_000


def test_bits_are_those_of_the_models_own_loss_with_every_token_predicted(model_path: str, tokenizer) -> None:
    sentence = read_sentence(CONLLU.splitlines())
    rows = study.tokenised([sentence, study.Sentence("The cat sat.", [(0, 3, "DET")])], tokenizer, 64)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    expected = 0.0
    for ids in rows["input_ids"]:
        assert ids[0] == tokenizer.bos_token_id
        inputs = torch.tensor([ids])
        with torch.no_grad():
            expected += float(model(inputs, labels=inputs).loss) * (len(ids) - 1) / math.log(2)
    batch = study.batches_of(rows, tokenizer, 2)[0]
    assert study.bits(model, batch) == pytest.approx(expected, rel=1e-5)
    assert rows["bytes"] == [18, 12]


def test_a_sentence_that_is_too_long_is_left_out(tokenizer) -> None:
    rows = study.tokenised([study.Sentence("a b", [(0, 1, "X")]), study.Sentence("a " * 50, [])], tokenizer, 8)
    assert len(rows) == 1


def test_unigram_bits_of_two_equally_frequent_tokens_are_one_a_token() -> None:
    from datasets import Dataset

    assert study.unigram_bits(Dataset.from_list([{"input_ids": [9, 1, 2, 2, 1]}])) == pytest.approx(4.0)


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match="modle is not known in a recipe; it has model, …"):
        study.read_settings(FOLDER / "study.yaml", ["modle=x"])


def test_the_settings_start_with_the_command_that_runs_them() -> None:
    command = "# python recipes/pos_scrubbing/study.py recipes/pos_scrubbing/study.yaml\n"
    assert (FOLDER / "study.yaml").read_text().startswith(command)


@pytest.mark.filterwarnings("ignore")
def test_the_study_runs_on_a_model_of_the_hubs_kind(assets: Path, tmp_path: Path) -> None:
    """The model has parallel residuals, norms with a bias, and a byte-level tokenizer without a start token."""
    other = tmp_path / "other.txt"
    other.write_text("Once upon a time.\n\nThe end.\n")
    common = {"model": str(tmp_path), "output": str(tmp_path), "max_tokens": 64, "probe_tokens": 300}
    settings = study.Settings(**common, fit="", test="", other=str(other))
    for part in ("fit", "test"):
        blocks = (assets / "data" / "ud-ewt" / "en_ewt-ud-dev.conllu").read_text().split("\n\n")
        (tmp_path / part).write_text("\n\n".join(blocks[:200] if part == "fit" else blocks[200:260]))
        setattr(settings, part, str(tmp_path / part))
    text = [sentence.text for sentence in study.read_treebank(settings.fit)]
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    bytewise.train_from_iterator(text, trainer)
    special = "<|endoftext|>"
    PreTrainedTokenizerFast(tokenizer_object=bytewise, bos_token=special, eos_token=special).save_pretrained(tmp_path)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = GPTNeoXConfig(vocab_size=400, max_position_embeddings=64, **sizes)
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    outcome = study.run(settings)
    assert outcome.rank == 16
    assert len([place for place in outcome.probes if "norm" in place]) == 5
    assert outcome.bits["none"][0] == pytest.approx(outcome.bits["random subspace"][0], rel=0.2)
    assert outcome.sizes[1] == len("Once upon a time.The end.")


@pytest.mark.slow
def test_the_study_orders_the_erasures_as_the_paper_does(assets: Path, tmp_path: Path) -> None:
    settings = study.read_settings(FOLDER / "study.yaml", ["probe_tokens=1500"])
    settings.model = str(assets / "models" / "stories260k")
    settings.fit, settings.test = (
        str(assets / "data" / "ud-ewt" / f"en_ewt-ud-{part}.conllu") for part in ("dev", "test")
    )
    settings.other = str(assets / "data" / "tinystories-sample" / "tinystories.txt")
    outcome = study.run(settings)
    for text in (0, 1):
        least = outcome.bits["none"][text]
        assert least < min(values[text] for name, values in outcome.bits.items() if name != "none")
    for erasure in ("sequential LEACE", "sequential orth"):
        assert outcome.probes[study.FINAL][erasure] < outcome.majority + 0.03
    assert outcome.probes[study.FINAL]["none"] > outcome.majority + 0.1
    study.figure(outcome, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000
    assert "| unigram entropy |" in study.report(outcome)
