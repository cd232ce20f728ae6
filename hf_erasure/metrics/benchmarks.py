"""Run a model on a benchmark's file and return figures.

Each function reads the file, scores its items, and computes the metric of the same name. Items that cannot be scored
(too long for the model, a decisive word that the tokenizer does not know) are left out and counted by reason under
`left_out`. `coverage` is the share of the items that was scored, of `asked`, the number that `bias_types` and `limit`
leave of the file. Which items are left out depends only on the tokenizer and the longest input, so a model with and
without an adapter is judged on the same items. Rows of the file that could not be read are not items: they give a
warning, and `bad_rows` names them for each file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from difflib import SequenceMatcher
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from hf_erasure.models.scorer import Encoding, LanguageScorer, pooled_embeddings
from hf_erasure.models.slots import Row

from . import crows_pairs as crows_pairs_metric
from . import perplexity as perplexity_metric
from . import pronoun_gap as pronoun_gap_metric
from . import readers
from . import stereoset as stereoset_metric
from . import weat as weat_metric
from .base import Floats

Item = TypeVar("Item")

# How a causal model scores a sentence of StereoSet.
CAUSAL_CONVENTIONS = ("sentence", "authors")
# The reasons why a model cannot score an item.
EMPTY = "a sentence has no token that can be scored"
TOO_LONG = "too long for the model"
UNKNOWN = "a decisive word is unknown to the tokenizer"
ALIKE = "both sentences have the same tokens"
NOTHING_SHARED = "the sentences share no token"
NO_BLANK = "the sentences do not fit the context"
NOT_A_PAIR = "the sentences differ in more than the pronoun"
UNEQUAL = "the pronouns have different numbers of tokens"


class LeftOut(Exception):
    """An item cannot be scored; the message is the reason, one of the constants above."""


def stereoset(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: readers.Source,
    *,
    bias_types: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    convention: str = "sentence",
    **statistics: Any,
) -> dict[str, Any]:
    """StereoSet's intrasentence items.

    A masked model scores a sentence by the mean probability of the blank's tokens, each predicted from the context and
    the word's earlier tokens, as the authors' code does. A causal model scores it by the mean log-likelihood of all its
    tokens. By default they stand after the start token (`"sentence"`), as the model was trained to read a text. In the
    authors' code (`"authors"`) only the first token does; the others are scored in a row without a start token.

    Args:
        model: A masked or causal language model, adapters included.
        tokenizer: The tokenizer of the model.
        path: The path of dev.json or test.json.
        bias_types: Some of `gender`, `profession`, `race`, `religion`; by default all.
        limit: The most items, from everywhere in the file.
        batch_size: Rows in a forward pass.
        convention: How a causal model scores a sentence: `"sentence"` or `"authors"`.
        **statistics: As for `hf_erasure.metrics.stereoset.score`.

    Returns:
        What `score` returns, `by_bias_type`, `convention` (`"blank"` for a masked model), `task`, `coverage`,
        `asked`, `left_out`, `bad_rows`.

    Raises:
        ValueError: If no item can be scored, the file is not one of StereoSet, or the convention is not known or needs
            a start token that the tokenizer does not have.
    """
    if convention not in CAUSAL_CONVENTIONS:
        raise ValueError(f"convention={convention!r}: write one of {', '.join(map(repr, CAUSAL_CONVENTIONS))}.")
    read, scorer = readers.read_stereoset(path), LanguageScorer(model, tokenizer, batch_size=batch_size)
    found = _figures(
        scorer, read, lambda item: stereoset_queries(scorer, item, convention),
        lambda scores, items: stereoset_metric.score(scores, [item.term for item in items], **statistics),
        kind="bias_type", kinds=bias_types, limit=limit, varying="term", score=stereoset_score,
    )  # fmt: skip
    return {**found, "convention": "blank" if scorer.task == "masked" else convention}


def crows_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: readers.Source,
    *,
    bias_types: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    **statistics: Any,
) -> dict[str, Any]:
    """CrowS-Pairs: pseudo-log-likelihood of the shared tokens (masked), or log-likelihood of the sentence (causal).

    The file is crows_pairs_anonymized.csv. Arguments and errors are those of `stereoset`, and `statistics` are those of
    `hf_erasure.metrics.crows_pairs.score`. The result is what `score` returns, with `by_bias_type`, `task`, `coverage`,
    `asked`, `left_out` and `bad_rows`.
    """
    read, scorer = readers.read_crows_pairs(path), LanguageScorer(model, tokenizer, batch_size=batch_size)
    return _figures(
        scorer, read, lambda item: crows_queries(scorer, item),
        lambda scores, items: crows_pairs_metric.score(scores, [item.direction for item in items], **statistics),
        kind="bias_type", kinds=bias_types, limit=limit,
    )  # fmt: skip


def winobias(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: readers.Source,
    *,
    splits: Iterable[str] = ("dev",),
    types: Iterable[int] = (1, 2),
    limit: int | None = None,
    batch_size: int = 32,
    **statistics: Any,
) -> dict[str, Any]:
    """The pronoun gap on WinoBias.

    A masked model scores the pronouns that differ, all masked at once; a causal model scores the whole sentence.

    Args:
        model: A masked or causal language model, adapters included.
        tokenizer: The tokenizer of the model.
        folder: The folder with `pro_stereotyped_type1.txt.dev` and similar files.
        splits: `"dev"`, `"test"` or both.
        types: Types of sentences; sentences of type 2 can be resolved by syntax alone.
        limit: The most pairs, from everywhere in the files.
        batch_size: Rows in a forward pass.
        **statistics: As for `hf_erasure.metrics.pronoun_gap.score`.

    Returns and raises the same as `crows_pairs`, with `by_type` in place of `by_bias_type`.
    """
    read, scorer = readers.read_winobias(folder, splits, types), LanguageScorer(model, tokenizer, batch_size=batch_size)
    return _figures(
        scorer, read, lambda item: pronoun_queries(scorer, item),
        lambda scores, items: pronoun_gap_metric.score(scores, [item.stereotype for item in items], **statistics),
        kind="type", limit=limit, varying="stereotype",
    )  # fmt: skip


def seat(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: readers.Source,
    *,
    tests: Sequence[str] | None = None,
    pool: str = "mean",
    batch_size: int = 64,
    **statistics: Any,
) -> dict[str, Any]:
    """WEAT and SEAT on pooled last hidden states; the model needs no head.

    Each sentence counts by itself, as in the authors' test. Sentences that differ only in their template are very
    similar, so p values and intervals of SEAT look more certain than its few words justify.

    Args:
        model: Any model, adapters included; the encoder of an encoder-decoder.
        tokenizer: The tokenizer of the model.
        folder: The folder with `sent-weat6.jsonl` and similar files.
        tests: The names of the tests; by default all.
        pool: As in `pooled_embeddings`.
        batch_size: Texts in a forward pass.
        **statistics: As for `hf_erasure.metrics.weat.score`.

    Returns:
        `tests`, name → what `score` returns, with its own `coverage`; `mean_absolute_effect_size` over the tests, with
        its `intervals` over the texts that they share; `skipped`, name → the reason, for tests that have too few texts
        left; `coverage` over all texts of all tests, `asked`, `left_out` and `bad_rows`.

    Raises:
        ValueError: If no test can be computed, or a file is missing or cannot be used.
    """
    sets, bad_rows = readers.read_seat(folder, tests)
    texts = list(dict.fromkeys(text for parts in sets.values() for part in parts.values() for text in part))
    tokens = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    known = [text for text, own in zip(texts, tokens, strict=True) if tokenizer.unk_token_id not in own]
    if not known:
        raise ValueError(f"{folder}: the tokenizer knows no text completely, so nothing can be embedded.")
    vectors = pooled_embeddings(model, tokenizer, known, pool=pool, batch_size=batch_size).double().numpy()
    row = {text: i for i, text in enumerate(known)}
    found, usable_tests, skipped, total, used = {}, [], dict[str, str](), 0, 0
    for name, parts in sets.items():
        rows = {key: [row[text] for text in part if text in row] for key, part in parts.items()}
        size, kept = sum(map(len, parts.values())), sum(map(len, rows.values()))
        total, used = total + size, used + kept
        if min(len(rows["X"]), len(rows["Y"])) < 2 or not rows["A"] or not rows["B"]:
            skipped[name] = "too few texts whose words the tokenizer knows"
            continue
        arrays = (vectors[rows[key]] for key in weat_metric.SETS)
        found[name] = {**weat_metric.score(*arrays, **statistics), "coverage": kept / size}
        usable_tests.append(rows)
    if not found:
        raise ValueError(f"{folder}: the tokenizer knows too few words for any of {', '.join(sets)}.")
    drawing = {key: value for key, value in statistics.items() if key != "permutations"}
    mean = weat_metric.mean_absolute_effect(usable_tests, vectors, **drawing)
    counts = {"coverage": used / total, "asked": total, "left_out": {UNKNOWN: total - used} if used < total else {}}
    counts["bad_rows"] = [asdict(rows) for rows in bad_rows]
    return {"tests": found, **mean, "skipped": skipped, "pool": pool, **counts}


def text_perplexity(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: str | Sequence[str],
    *,
    stride: int | None = None,
    max_length: int | None = None,
    batch_size: int = 8,
    **statistics: Any,
) -> dict[str, Any]:
    """Perplexity and bits per byte of running text; for a masked model, those of its pseudo-likelihood.

    Args:
        model: A masked or causal language model, adapters included.
        tokenizer: The tokenizer of the model.
        texts: One text or several.
        stride: The step between windows, in tokens; by default half a window. Every token is scored once.
        max_length: The tokens of a window, with special tokens; by default the model's limit, or 512 without a limit.
        batch_size: Rows in a forward pass.
        **statistics: As for `hf_erasure.metrics.perplexity.score`.

    Returns:
        What `score` returns; `pseudo`, whether it is a pseudo-likelihood; `task`.

    Raises:
        ValueError: If a text has no token to score, or `stride` does not fit the window.
    """
    scorer = LanguageScorer(model, tokenizer, batch_size=batch_size, max_length=max_length)
    windows = scorer.losses(texts, stride)
    columns = ([getattr(w, name) for w in windows] for name in ("loss", "tokens", "bytes"))
    found = perplexity_metric.score(*columns, **statistics)
    return {**found, "pseudo": scorer.task == "masked", "task": scorer.task}


def _figures(
    scorer: LanguageScorer,
    read: readers.Rows[Item],
    queries_of: Callable[[Item], list[list[Row]]],
    measure: Callable[[Floats, list[Item]], dict[str, Any]],
    *,
    kind: str,
    kinds: Sequence[str] | None = None,
    limit: int | None = None,
    varying: str | None = None,
    score: Callable[[LanguageScorer, list[Tensor]], float] | None = None,
) -> dict[str, Any]:
    """The figures of all items that can be scored, the figures of each kind of item, and what was left out.

    `queries_of` returns for each sentence of an item the rows for the model, and `measure` computes figures from scores
    `(items, sentences)`. A kind whose items all have the same value of the attribute `varying` has no figures. The
    score of a sentence is the sum of its log-probabilities, or what `score` computes from them.
    """
    kinds_in_file = sorted({str(getattr(item, kind)) for item in read})
    if unknown := [name for name in kinds or () if name not in kinds_in_file]:
        raise ValueError(f"{kind}s: the file has no {unknown[0]!r}; write some of {', '.join(kinds_in_file)}.")
    items = readers.spread([item for item in read if kinds is None or getattr(item, kind) in kinds], limit)
    kept, queries, reasons = [], [], Counter[str]()
    for item in items:
        try:
            queries.append(queries_of(item))
            kept.append(item)
        except LeftOut as reason:
            reasons[str(reason)] += 1
    if not kept:
        raise ValueError(f"None of {len(items)} items can be scored: {dict(reasons)}.")
    sentences = [asked for sentences in queries for asked in sentences]
    if score is None:
        found = scorer.sums(sentences)
    else:
        parts = iter(scorer.log_probabilities([query for asked in sentences for query in asked]))
        found = [score(scorer, [next(parts) for _ in asked]) for asked in sentences]
    scores = np.array(found).reshape(len(kept), -1)
    by_kind: dict[str, list[int]] = {}
    for place, item in enumerate(kept):
        by_kind.setdefault(str(getattr(item, kind)), []).append(place)
    each: dict[str, Any] = dict.fromkeys(sorted(by_kind))
    for name, places in by_kind.items():
        own = [kept[place] for place in places]
        if varying is None or len({getattr(item, varying) for item in own}) > 1:
            each[name] = measure(scores[places], own)
    return {
        **measure(scores, kept), f"by_{kind}": each, "task": scorer.task, "coverage": len(kept) / len(items),
        "asked": len(items), "left_out": dict(reasons), "bad_rows": [asdict(rows) for rows in read.left_out],
    }  # fmt: skip


def stereoset_queries(
    scorer: LanguageScorer, item: readers.StereoSetItem, convention: str = CAUSAL_CONVENTIONS[0]
) -> list[list[Row]]:
    """For each of the three sentences: its tokens (causal), or one row for each token in the blank (masked).

    Raises:
        LeftOut: If a sentence is empty, too long, does not fit the context, or fills the blank with an unknown word.
    """
    rows = []
    for sentence in item.sentences:
        encoding, blank = _encode(scorer, sentence), item.blank(sentence)
        if scorer.task == "causal":
            _check_known(encoding, encoding.places if blank is None else encoding.within(*blank))
            if convention == "sentence":
                rows.append(scorer.queries(encoding))
                continue
            # As in the authors' code: the first token after a start token, the others in a row without a start token.
            if scorer.start is None:
                raise ValueError(f"{type(scorer.tokenizer).__name__} has no start token: write convention='sentence'.")
            ids = [encoding.ids[place] for place in encoding.places]
            rest = scorer.rows_at(ids, list(range(1, len(ids)))) if len(ids) > 1 else []
            rows.append([*scorer.rows_at([scorer.start, ids[0]], [1]), *rest])
            continue
        if blank is None:
            raise LeftOut(NO_BLANK)
        places, ids = encoding.within(*blank), encoding.ids
        _check_known(encoding, places)
        # A token of the word is predicted from a row without the word's later tokens.
        rows.append(
            [scorer.layout.prediction_row([*ids[: place + 1], *ids[places[-1] + 1 :]], [place]) for place in places]
        )
    return rows


def stereoset_score(scorer: LanguageScorer, parts: list[Tensor]) -> float:
    """The score of a sentence from its queries: the mean log-likelihood (causal) or the mean probability (masked)."""
    if scorer.task == "causal":
        return float(torch.cat(parts).double().mean())
    return float(np.mean([float(part.double().exp()[0]) for part in parts]))


def crows_queries(scorer: LanguageScorer, item: readers.CrowSPair) -> list[list[Row]]:
    """For each of the two sentences: all its tokens (causal), or one row for each token that both share (masked).

    Raises:
        LeftOut: If a sentence is empty or too long, or the tokenizer does not know, or does not keep, the difference.
    """
    both = [_encode(scorer, sentence) for sentence in (item.more, item.less)]
    tokens = [[encoding.ids[p] for p in encoding.places] for encoding in both]
    if tokens[0] == tokens[1]:
        # If the only difference is a word that the tokenizer does not know, both sentences have the same tokens.
        raise LeftOut(UNKNOWN if any(encoding.unknown for encoding in both) else ALIKE)
    blocks = SequenceMatcher(None, tokens[0], tokens[1], autojunk=False).get_matching_blocks()
    shared = [{block[side] + step for block in blocks for step in range(block[2])} for side in (0, 1)]
    shared_places = []
    for encoding, own in zip(both, shared, strict=True):
        _check_known(encoding, [p for i, p in enumerate(encoding.places) if i not in own])
        shared_places.append([encoding.places[i] for i in sorted(own)])
    if scorer.task == "causal":
        return [scorer.queries(encoding) for encoding in both]
    if not shared_places[0]:
        raise LeftOut(NOTHING_SHARED)
    return [scorer.queries(encoding, places) for encoding, places in zip(both, shared_places, strict=True)]


def pronoun_queries(scorer: LanguageScorer, item: readers.PronounPair) -> list[list[Row]]:
    """For each version: all its tokens (causal), or one row in which every pronoun that differs is masked (masked).

    Raises:
        LeftOut: If the versions are not a pair, one is too long, or their pronouns cannot be compared.
    """
    if item.stereotype is None:
        raise LeftOut(NOT_A_PAIR)
    rows, sizes, is_masked = [], [], scorer.task == "masked"
    for sentence, slots in zip((item.pro, item.anti), item.slots, strict=True):
        encoding = _encode(scorer, sentence)
        places = [place for slot in slots for place in encoding.within(*slot)]
        _check_known(encoding, places)
        sizes.append(len(places))
        rows.append([scorer.layout.prediction_row(encoding.ids, places)] if is_masked else scorer.queries(encoding))
    if is_masked and sizes[0] != sizes[1]:
        raise LeftOut(UNEQUAL)
    return rows


def _encode(scorer: LanguageScorer, sentence: str) -> Encoding:
    encoding = scorer.encode(sentence)
    # A sum over no tokens is 0, which is greater than the sum of any other sentence.
    if not sentence.strip() or not encoding.places:
        raise LeftOut(EMPTY)
    if not scorer.fits(encoding):
        raise LeftOut(TOO_LONG)
    return encoding


def _check_known(encoding: Encoding, places: Iterable[int]) -> None:
    if encoding.unknown & set(places):
        raise LeftOut(UNKNOWN)
