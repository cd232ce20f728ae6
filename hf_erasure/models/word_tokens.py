"""The tokens of words in running text."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

SLOT = "[FEATURE]"
# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_STARTS_UNSPACED, _ENDS_UNSPACED = re.compile(f"[{_UNSPACED}]"), re.compile(f".*[{_UNSPACED}]\\Z", re.DOTALL)
# A vowel or tone sign belongs to the letter before it.
_SIGNS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b6-\u17d3"


class PairError(ValueError):
    """Raised if a data set of pairs or of neutral texts cannot be used; the message names the row."""


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of every text, without special tokens."""
    if not texts:
        return []
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    bare = encode(tokenizer, ["a"])[0]
    whole = tokenizer("a")["input_ids"]
    for start in range(len(whole) - len(bare) + 1):
        if whole[start : start + len(bare)] == bare:
            return whole[:start], whole[start + len(bare) :]
    return [], []


@dataclass(frozen=True)
class Placed:
    """A text cut at a word: the tokens before the word, of the word, and after it, without special tokens."""

    head: list[int]
    word: list[int]
    tail: list[int]


def place_words(
    tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[str], words: Sequence[str], suffixes: Sequence[str]
) -> list[Placed | None]:
    """Tokenise ``prefix + word + suffix`` as running text, and cut the tokens where the words are.

    Most tokenizers mark a word by the space before it (byte-level BPE, sentencepiece), so a word is never tokenised
    alone: its tokens are the tokens behind those of the prefix when both are tokenised together. A prefix ends with the
    space between it and its word; a suffix may be empty if it does not matter. If a token reaches over the start or the
    end of a word, the result for the word is ``None``.
    """
    bare = encode(tokenizer, [prefix[:-1] if prefix.endswith(" ") else prefix for prefix in prefixes])
    spaced = encode(tokenizer, prefixes)
    upto = encode(tokenizer, [prefix + word for prefix, word in zip(prefixes, words, strict=True)])
    whole = encode(tokenizer, [p + w + s for p, w, s in zip(prefixes, words, suffixes, strict=True)])
    found: list[Placed | None] = []
    for *heads, end, text in zip(bare, spaced, upto, whole, strict=True):
        fitting = [head for head in heads if len(head) < len(end) and end[: len(head)] == head]
        if fitting and text[: len(end)] == end:
            found.append(Placed(fitting[0], end[len(fitting[0]) :], text[len(end) :]))
        else:
            found.append(None)
    return found


def word_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], prefix: str = "a ") -> list[list[int]]:
    """The tokens of each word in running text, after ``prefix``, which includes the space at its end.

    The prefix is empty for words that begin a text. Words of scripts without spaces follow the prefix without its
    space. Raises a `PairError` if a token reaches over the start of a word.
    """
    prefixes = [prefix.rstrip(" ") if _STARTS_UNSPACED.match(word) else prefix for word in words]
    placed = place_words(tokenizer, prefixes, words, [""] * len(words))
    for word, place in zip(words, placed, strict=True):
        if place is None:
            raise PairError(f"the tokens of {word!r} cannot be told from those of {prefix!r} before it")
    return [place.word for place in placed if place is not None]


def word_forms(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> set[tuple[int, ...]]:
    """The token sequences under which words may occur in a text: capitalised or not, after a space or without one."""
    spelled = sorted({form for word in words for form in (word, word.lower(), capitalised(word), word.upper())})
    forms = {tuple(tokens) for tokens in encode(tokenizer, spelled)}
    before = ["a" if _STARTS_UNSPACED.match(word) else "a " for word in spelled]
    within = place_words(tokenizer, before, spelled, [""] * len(spelled))
    forms |= {tuple(place.word) for place in within if place is not None}
    return {form for form in forms if form and tokenizer.unk_token_id not in form}


def occurrences(tokens: Sequence[int], forms: set[tuple[int, ...]]) -> set[int]:
    """The positions in ``tokens`` that belong to one of the sequences ``forms``."""
    found: set[int] = set()
    for size in {len(form) for form in forms}:
        for start in range(len(tokens) - size + 1):
            if tuple(tokens[start : start + size]) in forms:
                found.update(range(start, start + size))
    return found


def whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """A pattern for whole words, the longest first; in scripts without spaces it finds the characters of a word."""
    letter = rf"[^\W{_UNSPACED}]"  # an English word next to Chinese characters is still the same word

    def bounds(word: str) -> tuple[str, str]:
        before = "" if _STARTS_UNSPACED.match(word) else rf"(?<!{letter})(?<!-)"
        return before, f"(?![{_SIGNS}])" if _ENDS_UNSPACED.match(word) else rf"(?!{letter})(?!-)"

    found = []
    for (before, after), own in itertools.groupby(sorted(words, key=len, reverse=True), bounds):
        found.append(f"{before}(?:{'|'.join(map(re.escape, own))}){after}")
    return re.compile("|".join(found), re.IGNORECASE)


def is_unspaced(word: str) -> bool:
    """Whether a word begins or ends in a script that puts no space between words."""
    return bool(_STARTS_UNSPACED.match(word) or _ENDS_UNSPACED.match(word))


def capitalised(word: str) -> str:
    """A word as it is written at the beginning of a sentence."""
    return word[:1].upper() + word[1:]


def shortened(text: str, limit: int = 80) -> str:
    """A text for an error message: in quotes, and cut if it is longer than `limit` characters."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
