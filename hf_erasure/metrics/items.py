"""What a benchmark's item asks of a model, and why some items cannot be asked."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

import numpy as np
import torch
from torch import Tensor

from hf_erasure.models.scorer import Encoding, LanguageScorer, Query

from .readers import CrowSPair, PronounPair, StereoSetItem

# How a causal model scores a sentence of StereoSet.
CAUSAL_CONVENTIONS = ("sentence", "authors")
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


def stereoset_queries(
    scorer: LanguageScorer, item: StereoSetItem, convention: str = CAUSAL_CONVENTIONS[0]
) -> list[list[Query]]:
    """For each of the three sentences: its tokens (causal), or one row for each token in the blank (masked).

    Args:
        scorer: Of the model.
        item: What to ask.
        convention: Of causal models, one of `CAUSAL_CONVENTIONS`.

    Raises:
        LeftOut: If a sentence is empty, too long, does not fit the context, or fills the blank with an unknown word.
    """
    rows = []
    for sentence in item.sentences:
        encoding, blank = _encoded(scorer, sentence), item.blank(sentence)
        if scorer.task == "causal":
            _check_known(encoding, encoding.places if blank is None else encoding.within(*blank))
            rows.append(scorer.queries(encoding) if convention == "sentence" else _as_the_authors(scorer, encoding))
            continue
        if blank is None:
            raise LeftOut(NO_BLANK)
        places = encoding.within(*blank)
        _check_known(encoding, places)
        rows.append([_left_to_right(scorer, encoding.ids, places, place) for place in places])
    return rows


def _as_the_authors(scorer: LanguageScorer, encoding: Encoding) -> list[Query]:
    """The first token after a start token, the others in a row without one, as in the code of StereoSet's authors.

    Raises:
        ValueError: If the tokenizer has no start token.
    """
    if scorer.start is None:
        raise ValueError(f"{type(scorer.tokenizer).__name__} has no start token: write convention='sentence'.")
    ids = [encoding.ids[place] for place in encoding.places]
    rest = scorer.asked(ids, list(range(1, len(ids)))) if len(ids) > 1 else []
    return [*scorer.asked([scorer.start, ids[0]], [1]), *rest]


def _left_to_right(scorer: LanguageScorer, ids: list[int], places: list[int], place: int) -> Query:
    """One token of a word, its later tokens taken out."""
    return scorer.masked([*ids[: place + 1], *ids[places[-1] + 1 :]], [place])


def stereoset_score(scorer: LanguageScorer, parts: list[Tensor]) -> float:
    """A sentence's score from what its queries found: mean log-likelihood (causal) or mean probability (masked)."""
    if scorer.task == "causal":
        return float(torch.cat(parts).double().mean())
    return float(np.mean([float(part.double().exp()[0]) for part in parts]))


def crows_queries(scorer: LanguageScorer, item: CrowSPair) -> list[list[Query]]:
    """For either sentence: all its tokens (causal), or one row for each token that both share (masked).

    Raises:
        LeftOut: If a sentence is empty or too long, or what differs is unknown to the tokenizer or lost in it.
    """
    both = [_encoded(scorer, sentence) for sentence in (item.more, item.less)]
    tokens = [[encoding.ids[p] for p in encoding.places] for encoding in both]
    if tokens[0] == tokens[1]:
        # Where the only difference is a word that the tokenizer does not know, the sentences look alike.
        raise LeftOut(UNKNOWN if any(encoding.unknown for encoding in both) else ALIKE)
    blocks = SequenceMatcher(None, tokens[0], tokens[1], autojunk=False).get_matching_blocks()
    shared = [{block[side] + step for block in blocks for step in range(block[2])} for side in (0, 1)]
    for encoding, own in zip(both, shared, strict=True):
        _check_known(encoding, [p for i, p in enumerate(encoding.places) if i not in own])
    if scorer.task == "causal":
        return [scorer.queries(encoding) for encoding in both]
    if not shared[0]:
        raise LeftOut(NOTHING_SHARED)
    return [
        scorer.queries(encoding, [encoding.places[i] for i in sorted(own)])
        for encoding, own in zip(both, shared, strict=True)
    ]


def pronoun_queries(scorer: LanguageScorer, item: PronounPair) -> list[list[Query]]:
    """For either version: all its tokens (causal), or one row with every pronoun that differs masked (masked).

    Raises:
        LeftOut: If the versions are no pair, one is too long, or their pronouns cannot be compared.
    """
    if item.stereotype is None:
        raise LeftOut(NOT_A_PAIR)
    rows, sizes = [], []
    for sentence, slots in zip((item.pro, item.anti), item.slots, strict=True):
        encoding = _encoded(scorer, sentence)
        places = [place for slot in slots for place in encoding.within(*slot)]
        _check_known(encoding, places)
        sizes.append(len(places))
        masked = scorer.task == "masked"
        rows.append([scorer.masked(encoding.ids, places)] if masked else scorer.queries(encoding))
    if scorer.task == "masked" and sizes[0] != sizes[1]:
        raise LeftOut(UNEQUAL)
    return rows


def _encoded(scorer: LanguageScorer, sentence: str) -> Encoding:
    encoding = scorer.encode(sentence)
    # A sum over no tokens is 0, which every other sentence would lose to.
    if not sentence.strip() or not encoding.places:
        raise LeftOut(EMPTY)
    if not scorer.fits(encoding):
        raise LeftOut(TOO_LONG)
    return encoding


def _check_known(encoding: Encoding, places: Iterable[int]) -> None:
    if encoding.unknown & set(places):
        raise LeftOut(UNKNOWN)
