"""A model and a benchmark's file in, figures out.

Each function reads the file, scores what can be scored, and computes the metric of the same name. What cannot be scored
(too long for the model, a decisive word that the tokenizer does not know) is left out, counted by reason under
`left_out`, and `coverage` says what share of the items asked for was scored (`asked`: how many `bias_types` and `limit`
leave of the file). What is left out depends on the tokenizer and the longest input alone, so a model with and without
an adapter is judged on the same items. Rows of the file that could not be read are no items; they are warned of, and
`bad_rows` names them for each file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from torch import nn
from transformers import PreTrainedTokenizerBase

from hf_erasure.models.scorer import LanguageScorer, pooled_embeddings, strided_losses

from . import crows_pairs as crows_pairs_metric
from . import perplexity as perplexity_metric
from . import pronoun_gap as pronoun_gap_metric
from . import stereoset as stereoset_metric
from . import weat as weat_metric
from .items import (
    CAUSAL_CONVENTIONS,
    UNKNOWN,
    LeftOut,
    crows_queries,
    pronoun_queries,
    stereoset_queries,
    stereoset_score,
)
from .readers import read_crows_pairs, read_seat, read_stereoset, read_winobias, spread
from .rows import Rows, Source


def stereoset(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Source,
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
        tokenizer: Of the model.
        path: Of dev.json or test.json.
        bias_types: Some of `gender`, `profession`, `race`, `religion`; by default all.
        limit: At most so many items, from everywhere in the file.
        batch_size: Rows a forward.
        convention: Of causal models: `"sentence"` or `"authors"`.
        **statistics: As for `hf_erasure.metrics.stereoset.score`.

    Returns:
        What `score` returns, `by_bias_type`, `convention` (`"blank"` of a masked model), `task`, `coverage`,
        `asked`, `left_out`, `bad_rows`.

    Raises:
        ValueError: If no item can be scored, the file is another, or the convention is not known or needs a start token
            that the tokenizer does not have.
    """
    if convention not in CAUSAL_CONVENTIONS:
        raise ValueError(f"convention={convention!r}: write one of {', '.join(map(repr, CAUSAL_CONVENTIONS))}.")
    read = read_stereoset(path)
    items = _of_types(read, bias_types, limit)
    scorer = LanguageScorer(model, tokenizer, batch_size=batch_size)
    kept, queries, left_out = _prepared(items, lambda item: stereoset_queries(scorer, item, convention))
    parts = iter(scorer.log_probabilities([query for three in queries for rows in three for query in rows]))
    scores = [[stereoset_score(scorer, [next(parts) for _ in rows]) for rows in three] for three in queries]

    def measured(chosen: list[int]) -> dict[str, Any]:
        return stereoset_metric.score([scores[i] for i in chosen], [kept[i].term for i in chosen], **statistics)

    # One term only leaves nothing to draw from.
    by_type = _each(
        [item.bias_type for item in kept], lambda c: measured(c) if len({kept[i].term for i in c}) > 1 else None
    )
    return {
        **measured(list(range(len(kept)))),
        "by_bias_type": by_type,
        "convention": "blank" if scorer.task == "masked" else convention,
        **_account(scorer, read, items, kept, left_out),
    }


def crows_pairs(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    path: Source,
    *,
    bias_types: Sequence[str] | None = None,
    limit: int | None = None,
    batch_size: int = 32,
    **statistics: Any,
) -> dict[str, Any]:
    """CrowS-Pairs: pseudo-log-likelihood of the shared tokens (masked), or log-likelihood of the sentence (causal).

    Args:
        model: A masked or causal language model, adapters included.
        tokenizer: Of the model.
        path: Of crows_pairs_anonymized.csv.
        bias_types: Some of the file's; by default all.
        limit: At most so many pairs, from everywhere in the file.
        batch_size: Rows a forward.
        **statistics: As for `hf_erasure.metrics.crows_pairs.score`.

    Returns:
        What `score` returns, `by_bias_type`, `task`, `coverage`, `asked`, `left_out`, `bad_rows`.

    Raises:
        ValueError: If no pair can be scored, or the file is another.
    """
    read = read_crows_pairs(path)
    items = _of_types(read, bias_types, limit)
    scorer = LanguageScorer(model, tokenizer, batch_size=batch_size)
    kept, queries, left_out = _prepared(items, lambda item: crows_queries(scorer, item))
    sums = scorer.sums([rows for two in queries for rows in two])
    scores = np.array(sums).reshape(-1, 2)

    def measured(chosen: list[int]) -> dict[str, Any]:
        return crows_pairs_metric.score(scores[chosen], [kept[i].direction for i in chosen], **statistics)

    by_type = _each([item.bias_type for item in kept], measured)
    return {
        **measured(list(range(len(kept)))),
        "by_bias_type": by_type,
        **_account(scorer, read, items, kept, left_out),
    }


def winobias(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Source,
    *,
    splits: Iterable[str] = ("dev",),
    types: Iterable[int] = (1, 2),
    limit: int | None = None,
    batch_size: int = 32,
    **statistics: Any,
) -> dict[str, Any]:
    """The pronoun gap on WinoBias.

    A masked model is asked for the pronouns with all that differ masked at once, a causal one for the whole sentence.

    Args:
        model: A masked or causal language model, adapters included.
        tokenizer: Of the model.
        folder: With `pro_stereotyped_type1.txt.dev` and its like.
        splits: `"dev"`, `"test"` or both.
        types: Types of sentences; those of type 2 can be resolved by syntax alone.
        limit: At most so many pairs, from everywhere in the files.
        batch_size: Rows a forward.
        **statistics: As for `hf_erasure.metrics.pronoun_gap.score`.

    Returns:
        What `score` returns, `by_type`, `task`, `coverage`, `asked`, `left_out`, `bad_rows`.

    Raises:
        ValueError: If no pair can be scored, or a file is not there.
    """
    read = read_winobias(folder, splits, types)
    items = spread(read, limit)
    scorer = LanguageScorer(model, tokenizer, batch_size=batch_size)
    kept, queries, left_out = _prepared(items, lambda item: pronoun_queries(scorer, item))
    sums = scorer.sums([rows for two in queries for rows in two])
    scores, genders = np.array(sums).reshape(-1, 2), [str(item.stereotype) for item in kept]

    def measured(chosen: list[int]) -> dict[str, Any]:
        return pronoun_gap_metric.score(scores[chosen], [genders[i] for i in chosen], **statistics)

    both = _each([str(item.kind) for item in kept], lambda c: measured(c) if len({genders[i] for i in c}) > 1 else None)
    return {**measured(list(range(len(kept)))), "by_type": both, **_account(scorer, read, items, kept, left_out)}


def seat(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Source,
    *,
    tests: Sequence[str] | None = None,
    pool: str = "mean",
    batch_size: int = 64,
    **statistics: Any,
) -> dict[str, Any]:
    """WEAT and SEAT on pooled last hidden states; the model needs no head.

    Sentences count one by one, as in the authors' test. Those that differ in their template only are much alike, so p
    values and intervals of SEAT are more certain than its few words warrant.

    Args:
        model: Any model, adapters included; of an encoder-decoder its encoder embeds.
        tokenizer: Of the model.
        folder: With `sent-weat6.jsonl` and the like.
        tests: Which of them; by default all.
        pool: As in `pooled_embeddings`.
        batch_size: Texts a forward.
        **statistics: As for `hf_erasure.metrics.weat.score`.

    Returns:
        `tests`, name → what `score` returns, with its own `coverage`; `mean_absolute_effect_size` over them, with its
        `intervals` over the texts that they share; `skipped`, name → why, for tests that have too few texts left
        or whose file cannot be used; `coverage` over all texts of all tests, `asked`, `left_out` and `bad_rows`.

    Raises:
        ValueError: If no test can be computed, or a file is not there.
    """
    sets = read_seat(folder, tests)
    texts = list(dict.fromkeys(text for parts in sets.values() for part in parts.values() for text in part))
    known = [text for text in texts if tokenizer.unk_token_id not in _token_ids(tokenizer, text)]
    if not known:
        raise ValueError(f"{folder}: the tokenizer knows no text completely, so nothing can be embedded.")
    vectors = pooled_embeddings(model, tokenizer, known, pool=pool, batch_size=batch_size).double().numpy()
    row = {text: i for i, text in enumerate(known)}
    found, taken, skipped, total, used = {}, [], dict(sets.skipped), 0, 0
    for name, parts in sets.items():
        rows = {key: [row[text] for text in part if text in row] for key, part in parts.items()}
        size, kept = sum(map(len, parts.values())), sum(map(len, rows.values()))
        total, used = total + size, used + kept
        if min(len(rows["X"]), len(rows["Y"])) < 2 or not rows["A"] or not rows["B"]:
            skipped[name] = "too few texts whose words the tokenizer knows"
            continue
        arrays = (vectors[rows[key]] for key in weat_metric.SETS)
        found[name] = {**weat_metric.score(*arrays, **statistics), "coverage": kept / size}
        taken.append(rows)
    if not found:
        raise ValueError(f"{folder}: the tokenizer knows too few words for any of {', '.join(sets)}.")
    drawing = {key: value for key, value in statistics.items() if key != "permutations"}
    mean = weat_metric.mean_absolute_effect(taken, vectors, **drawing)
    counts = {"coverage": used / total, "asked": total, "left_out": {UNKNOWN: total - used} if used < total else {}}
    counts["bad_rows"] = [rows.as_dict() for rows in sets.left_out]
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
    """Perplexity and bits per byte of running text; for a masked model those of the pseudo-likelihood.

    Args:
        model: A masked or causal language model, adapters included.
        tokenizer: Of the model.
        texts: One text or several.
        stride: As in `strided_losses`.
        max_length: As in `strided_losses`.
        batch_size: Rows a forward.
        **statistics: As for `hf_erasure.metrics.perplexity.score`.

    Returns:
        What `score` returns, `unknown_share` of the tokens (of what they stand for the loss says little), `pseudo`,
        whether it is a pseudo-likelihood, `task`.

    Raises:
        ValueError: If a text has no token to score, or `stride` does not fit the window.
    """
    windows = strided_losses(model, tokenizer, texts, stride=stride, max_length=max_length, batch_size=batch_size)
    columns = ([getattr(w, name) for w in windows] for name in ("loss", "tokens", "bytes"))
    found = perplexity_metric.score(*columns, **statistics)
    task = LanguageScorer(model, tokenizer).task
    unknown = sum(window.unknown for window in windows) / found["tokens"]
    return {**found, "unknown_share": unknown, "pseudo": task == "masked", "task": task}


def _prepared(items: Sequence[Any], prepare: Callable[[Any], Any]) -> tuple[list[Any], list[Any], dict[str, int]]:
    """The items that can be scored, their queries, and how many cannot be for which reason."""
    kept, queries, reasons = [], [], Counter[str]()
    for item in items:
        try:
            queries.append(prepare(item))
        except LeftOut as reason:
            reasons[str(reason)] += 1
        else:
            kept.append(item)
    if not kept:
        raise ValueError(f"None of {len(items)} items can be scored: {dict(reasons)}.")
    return kept, queries, dict(reasons)


def _account(
    scorer: LanguageScorer, read: Rows[Any], items: Sequence[Any], kept: Sequence[Any], left_out: dict[str, int]
) -> dict[str, Any]:
    counts = {"task": scorer.task, "coverage": len(kept) / len(items), "asked": len(items), "left_out": left_out}
    return {**counts, "bad_rows": [rows.as_dict() for rows in read.left_out]}


def _of_types(items: Sequence[Any], bias_types: Sequence[str] | None, limit: int | None) -> list[Any]:
    there = sorted({item.bias_type for item in items})
    if unknown := [name for name in bias_types or () if name not in there]:
        raise ValueError(f"bias_types: the file has no {unknown[0]!r}; write some of {', '.join(there)}.")
    return spread([item for item in items if bias_types is None or item.bias_type in bias_types], limit)


def _each(keys: Sequence[str], measured: Callable[[list[int]], dict[str, Any] | None]) -> dict[str, Any]:
    """The figures of every kind of item; None where a kind has too few items for them."""
    return {key: measured([i for i, own in enumerate(keys) if own == key]) for key in sorted(set(keys))}


def _token_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
