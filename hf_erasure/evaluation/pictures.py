"""What the report draws beside the measures: embeddings in two dimensions, probability shifts, the feature neuron."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from hf_erasure.fitting.gradiend.adapter import GradiendAdapter
from hf_erasure.fitting.gradiend.pairs import PairSet, usable_rows
from hf_erasure.fitting.gradiend.sentences import pairs_from_sentences
from hf_erasure.fitting.report import FEMALE, MALE
from hf_erasure.metrics import encoder_correlation
from hf_erasure.metrics.readers import spread
from hf_erasure.models.neutral import neutral_batches
from hf_erasure.models.scorer import LanguageScorer
from hf_erasure.models.word_tokens import encode, occurrences, word_forms
from hf_erasure.recipes.gradiend_recipe import read_gradiend_recipe, word_table
from hf_erasure.recipes.run import RECIPE_FILE

from .data import DataFolder
from .loading import Adapter
from .subject import Subject

# Texts of each class that a neuron reads; each needs a gradient, so they are fewer than for other measures.
_NEURON_TEXTS = 40
# The most points of a picture, so that single points can be told apart.
_POINTS = 120
_SENTENCE_END = re.compile(r"(?<=[.?])\s+|(?<=[。！？])")
_PREFIX = "The {} said that "


def plane_of(states: Tensor, labels: list[str]) -> Callable[[Tensor], list[dict[str, Any]]]:
    """Fit a fixed plane in which states are drawn: along the difference of the genders' means, and across it.

    The directions come from one half of the base's states `(rows, width)`, whose labels have two values. Only the other
    half is drawn, for the base and for every adapter. Raises `ValueError` if a label has too few rows.

    Returns:
        A function: states → `x`, `y` and `label` of the rows that are drawn.
    """
    kinds = sorted(set(labels))
    fitted = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)) % 2 == 0
    shown = spread((~fitted).nonzero().flatten().tolist(), _POINTS)
    x = states.double()[fitted]
    fitted_labels = [label for label, chosen in zip(labels, fitted.tolist(), strict=True) if chosen]
    if len(kinds) < 2 or not {*kinds[:2]} <= {*fitted_labels} or not shown:
        raise ValueError(
            f"{len(labels)} biographies of the genders {kinds} are too few for a plane: its directions come from one "
            "half of them and its points from the other: raise --limit."
        )
    mean = x.mean(0)
    means = [x[[i for i, label in enumerate(fitted_labels) if label == kind]].mean(0) for kind in kinds[:2]]
    along = means[1] - means[0]
    along = along / along.norm()
    rest = x - mean
    rest = rest - (rest @ along)[:, None] * along
    # The sign of a singular vector is arbitrary: the largest entry is made positive.
    across = torch.linalg.svd(rest, full_matrices=False).Vh[0]
    across = across * across[across.abs().argmax()].sign()

    def points(states: Tensor) -> list[dict[str, Any]]:
        rows = states.double()[shown] - mean
        places = zip((rows @ along).tolist(), (rows @ across).tolist(), shown, strict=True)
        return [{"x": x, "y": y, "label": labels[i]} for x, y, i in places]

    return points


def pronoun_shares(subject: Subject) -> dict[str, Any]:
    """For each occupation the share of "she" in the probability of "she" and "he", after "The … said that".

    Raises `ValueError` if the model has no head that predicts words, or its tokenizer does not know the pronouns.
    """
    head, occupations = subject.require_head(), subject.data.occupations()
    scorer, ending = LanguageScorer(subject.model, subject.tokenizer), " was tired." if head == "masked" else ""
    known, queries = list[tuple[str, str]](), list[Any]()
    for occupation in occupations:
        beginning = _PREFIX.format(occupation[0])
        both = [scorer.encode(beginning + word + ending) for word in ("she", "he")]
        if not any(text.unknown for text in both):
            known.append(occupation)
            places = [text.within(len(beginning), len(text.text) - len(ending)) for text in both]
            queries += map(scorer.queries, both, places)
    if not known:
        raise ValueError("The tokenizer knows none of the occupations, or does not know the pronouns.")
    scores = torch.tensor(scorer.sums(queries), dtype=torch.float64).view(-1, 2)
    shares = (scores[:, 0] - scores[:, 1]).sigmoid().tolist()
    jobs = [{"occupation": n, "stereotype": of, "she": s} for (n, of), s in zip(known, shares, strict=True)]
    return {"occupations": jobs, "left_out": len(occupations) - len(known)}


def neuron_values(subject: Subject, adapter: Adapter) -> dict[str, Any]:
    """The values of a GRADIEND adapter's feature neuron on texts of each class, and on neutral texts.

    Texts are sentences of the data folder with a word of one class. The words are those of the recipe beside the
    adapter, or "she" and "he" for classes with such names. Raises `ValueError` if the adapter has no encoder, or if
    its classes have no words, or the words no sentences.
    """
    head, tokenizer = subject.require_head(), subject.tokenizer
    handle = GradiendAdapter.of(subject.model, adapter.name)
    handle.encoders()  # raises an error if there are none
    pair = list(handle.config.pair or (handle.config.pairs or [])[0])
    table = _class_words(adapter, list(handle.config.classes or []))
    texts = _short_sentences(subject.data)
    config = getattr(subject.model, "config", None)
    rows = pairs_from_sentences(texts, {name: table[name] for name in pair}, pair, single=True)
    rows = rows.select(usable_rows(rows, pair, tokenizer, head, config))
    chosen: list[int] = []
    for name in pair:
        own = [i for i, label in enumerate(rows["label"]) if label == name]
        if not own:
            raise ValueError(f"no sentence of {subject.data.path} has a word of {name!r} alone")
        chosen += spread(own, _NEURON_TEXTS)
    feature_words = [word for words in table.values() for word in words]
    forms = word_forms(tokenizer, feature_words)
    plain = [t for t, ids in zip(texts, encode(tokenizer, texts), strict=True) if not occurrences(ids, forms)]
    neutral = Dataset.from_list([{"text": text} for text in spread(plain, _NEURON_TEXTS)])
    values: dict[str, list[float]] = {name: [] for name in (*pair, "neutral")}
    for batch in PairSet(rows.select(chosen), tokenizer, head, pair, config).batches(16):
        values[pair[int(batch.label or 0)]] += handle.encode(batch, pair).tolist()
    for batch in neutral_batches(neutral, tokenizer, head, feature_words, batch_size=16, config=config):
        values["neutral"] += handle.encode(batch, pair).tolist()
    labels = [sign for name, sign in zip(values, (1, -1, 0), strict=True) for _ in values[name]]
    all_values = [value for own in values.values() for value in own]
    figures = encoder_correlation.score(all_values, labels, **subject.statistics)
    return {"feature": handle.config.feature, "pair": pair, "values": values, **figures}


def _class_words(adapter: Adapter, classes: list[str]) -> dict[str, list[str]]:
    """Counterpart words of each class."""
    recipe = Path(adapter.folder) / RECIPE_FILE
    if recipe.is_file():
        data = read_gradiend_recipe(recipe).data
        for source in (data.test, data.whole, data.train):
            if source is not None and source.words:
                return word_table(source, classes, "data")
    found = {}
    for name in classes:
        key = name.lower()
        if key in FEMALE | MALE:
            found[name] = ["she", "herself"] if key in FEMALE else ["he", "himself"]
    if len(found) < len(classes) or len({tuple(words) for words in found.values()}) < 2:
        raise ValueError(f"no words are known for its classes {classes}: put the adapter's recipe.yaml beside it")
    return found


def _short_sentences(data: DataFolder) -> list[str]:
    """Short sentences of the data folder's texts, the simplest kind of text first."""
    texts = DataFolder(data.path).texts()
    paragraphs = [text for name in sorted(texts) for text in spread(texts[name], 1500)]
    cut = [part.strip().rstrip(".?") for text in paragraphs for part in _SENTENCE_END.split(text)]
    # The least length is in bytes: a Chinese sentence has as many bytes, but a third of the characters.
    return [part if part[-1] in "。！？" else f"{part}." for part in cut if len(part.encode()) > 20 and len(part) < 160]
