"""Words in running text: their tokens where they stand, and counterfactual pairs from plain sentences."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

SLOT = "[FEATURE]"
# Scripts that put no space between words: Thai, Lao, Burmese, Khmer, Japanese and Chinese.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_STARTS_UNSPACED, _ENDS_UNSPACED = re.compile(f"[{_UNSPACED}]"), re.compile(f".*[{_UNSPACED}]\\Z", re.DOTALL)
# A vowel or tone sign belongs to the letter before it.
_SIGNS = "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u17b6-\u17d3"


class PairError(ValueError):
    """A data set of counterfactual pairs (or of neutral texts) that cannot be used; the message names the row."""


# --------------------------------------------------------------------------------------------------------------------
# Tokens
# --------------------------------------------------------------------------------------------------------------------


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
    """A text cut at a word: the tokens before it, its own, and those after it; special tokens are not among them."""

    head: list[int]
    word: list[int]
    tail: list[int]


def place_words(
    tokenizer: PreTrainedTokenizerBase, prefixes: Sequence[str], words: Sequence[str], suffixes: Sequence[str]
) -> list[Placed | None]:
    """Tokenise ``prefix + word + suffix`` as running text, and cut the tokens where the words are.

    Most tokenizers mark a word by the space before it (byte-level BPE, sentencepiece), so a word is never tokenised
    alone: its tokens are those that come after the prefix's when both are tokenised together.

    Args:
        tokenizer: Of the model.
        prefixes: The text before each word, with the space that parts them.
        words: The words.
        suffixes: The text after each word; empty where it does not matter.

    Returns:
        For every word its place, or ``None`` where a token reaches over an end of the word.
    """
    bare = encode(tokenizer, [prefix[:-1] if prefix.endswith(" ") else prefix for prefix in prefixes])
    spaced = encode(tokenizer, prefixes)
    upto = encode(tokenizer, [prefix + word for prefix, word in zip(prefixes, words, strict=True)])
    whole = encode(tokenizer, [p + w + s for p, w, s in zip(prefixes, words, suffixes, strict=True)])
    return [_cut((a, b), c, d) for a, b, c, d in zip(bare, spaced, upto, whole, strict=True)]


def _cut(heads: Iterable[list[int]], upto: list[int], whole: list[int]) -> Placed | None:
    if whole[: len(upto)] != upto:
        return None
    for head in heads:
        if len(head) < len(upto) and upto[: len(head)] == head:
            return Placed(head, upto[len(head) :], whole[len(upto) :])
    return None


def word_tokens(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], prefix: str = "a ") -> list[list[int]]:
    """The tokens of each word in running text, after ``prefix``.

    Args:
        tokenizer: Of the model.
        words: The words.
        prefix: What stands before them, a space at its end included; empty for words that open a text. Words of
            scripts without spaces stand right behind it.

    Raises:
        PairError: A token reaches over the start of a word.
    """
    prefixes = [prefix.rstrip(" ") if _STARTS_UNSPACED.match(word) else prefix for word in words]
    placed = place_words(tokenizer, prefixes, words, [""] * len(words))
    for word, place in zip(words, placed, strict=True):
        if place is None:
            raise PairError(f"the tokens of {word!r} cannot be told from those of {prefix!r} before it")
    return [place.word for place in placed if place is not None]


def word_forms(tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> set[tuple[int, ...]]:
    """The token sequences under which words may occur in a text: capitalised or not, after a space or without one."""
    spelled = sorted({form for word in words for form in (word, word.lower(), _capitalised(word), word.upper())})
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


# --------------------------------------------------------------------------------------------------------------------
# Pairs from plain sentences
# --------------------------------------------------------------------------------------------------------------------

Counterparts = Mapping[str, str] | Mapping[str, Sequence[str]]


def pairs_from_sentences(
    sentences: Iterable[str], counterparts: Counterparts, classes: Sequence[str], *, single: bool = False
) -> Dataset:
    """Make counterfactual pairs from plain sentences and a table of counterpart words.

    Every occurrence of a word of the table becomes one row, or ``k - 1`` rows for ``k`` classes. Words are found at
    word boundaries only ("he" is not in "there" nor in "she-wolf"), as the table spells them, capitalised, or in
    capitals, and the counterpart is spelled the same way. Longer words of the table win over shorter ones. Chinese,
    Japanese, Thai and other scripts that put no space between words have no such boundaries: there a word is found
    wherever its characters stand, which is warned of.

    A word with more than one counterpart in a class ("her" is "him" or "his") makes no row of that class: which one
    fits cannot be read off the table.

    Args:
        sentences: The texts.
        counterparts: Either ``{word of classes[0]: word of classes[1]}``, which is read in both directions, or for any
            number of classes ``{class: [words]}`` where the words at one index are counterparts.
        classes: Names of the classes.
        single: Leave out sentences in which more than one word of the table occurs. The others would tell the model
            the class ("he lost [FEATURE] hat").

    Returns:
        A data set with ``text``, ``factual``, ``counterfactual``, ``label`` and ``counterfactual_label``.

    Raises:
        TypeError: ``sentences`` is one string.
        PairError: The table does not fit the classes, has a word in two classes, a sentence has a slot already, or no
            sentence has a word of the table, or only words of one class.
    """
    if isinstance(sentences, str):
        raise TypeError("sentences is one string; pass a list of sentences")
    table = _table(counterparts, classes)
    pattern, spellings = _pattern(table), _spellings(table)
    rows: list[dict[str, str]] = []
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise PairError(f"sentence {number} is {sentence!r}, which is not a text; leave it out")
        if SLOT in sentence:
            raise PairError(f"sentence {number} ({shortened(sentence)}) has a slot already; pass it as a row of pairs")
        found = [match for match in pattern.finditer(sentence) if match.group() in spellings]
        if not single or len(found) == 1:
            rows += [row for match in found for row in _rows_at(sentence, match, *spellings[match.group()])]
    present = {row["label"] for row in rows}
    if len(present) < 2:
        missing = [name for name in classes if name not in present]
        raise PairError(
            f"the sentences make pairs of {sorted(present) or 'no class'} only; add sentences with words of "
            f"{missing[0]!r}, such as {_example(table, missing[0])}"
        )
    columns = ("text", "factual", "counterfactual", "label", "counterfactual_label")
    return Dataset.from_dict({name: [row[name] for row in rows] for name in columns})


@dataclass
class _Entry:
    """A word of the table: its class, and the word for it in every class where there is exactly one."""

    label: str
    counterparts: dict[str, str]


def _table(counterparts: Counterparts, classes: Sequence[str]) -> dict[str, _Entry]:
    tuples = _tuples(counterparts, classes)
    found: dict[str, tuple[str, dict[str, set[str]]]] = {}
    for words in tuples:
        for label, word in zip(classes, words, strict=True):
            owner, others = found.setdefault(word, (label, {}))
            if owner != label:
                raise PairError(f"the table has {word!r} in two classes, {owner!r} and {label!r}; leave it out of one")
            for other, counterpart in zip(classes, words, strict=True):
                if other != label:
                    others.setdefault(other, set()).add(counterpart)
    return {
        word: _Entry(label, {other: next(iter(choices)) for other, choices in others.items() if len(choices) == 1})
        for word, (label, others) in found.items()
    }


def _tuples(counterparts: Counterparts, classes: Sequence[str]) -> list[tuple[str, ...]]:
    """The table as tuples of words in the order of the classes."""
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise PairError(f"classes must name two classes or more, each once; got {list(classes)}")
    if not counterparts:
        raise PairError('the table of counterparts is empty; write for example {"he": "she"}')
    table: dict[str, Any] = dict(counterparts)
    if all(isinstance(value, str) for value in table.values()):
        if len(classes) != 2:
            raise PairError(f"{{word: word}} serves two classes; for {len(classes)} write {{class: [words]}}")
        rows: list[tuple[str, ...]] = [(word, str(other)) for word, other in table.items()]
    else:
        lengths = {name: len(words) for name, words in table.items() if not isinstance(words, str)}
        if set(lengths) != set(classes) or len(set(lengths.values())) != 1:
            raise PairError(
                f"the table must have one list for each of {list(classes)}, all of one length; "
                f"got {lengths or list(table)}"
            )
        rows = list(zip(*(table[name] for name in classes), strict=True))
    for row in rows:
        if not all(isinstance(word, str) and word.strip() == word and word for word in row):
            raise PairError(f"the table has {row}; every word must be text without spaces around it")
    return rows


def _pattern(table: Mapping[str, _Entry]) -> re.Pattern[str]:
    unspaced = [word for word in table if _STARTS_UNSPACED.match(word) or _ENDS_UNSPACED.match(word)]
    if unspaced:
        warnings.warn(
            f"The script of {unspaced[0]!r} puts no space between words, so it is found wherever its characters stand, "
            "within longer words too: leave sentences with such words out, or put these words in the table.",
            stacklevel=3,
        )
    return whole_words(table)


def whole_words(words: Iterable[str]) -> re.Pattern[str]:
    """Finds words that are not part of longer ones, the longest first; in scripts without spaces, their characters."""
    longest_first = sorted(words, key=len, reverse=True)
    return re.compile("|".join(map(_whole_word, longest_first)), re.IGNORECASE)


def _whole_word(word: str) -> str:
    letter = rf"[^\W{_UNSPACED}]"  # Chinese characters beside it do not make another word of an English one
    before = "" if _STARTS_UNSPACED.match(word) else rf"(?<!{letter})(?<!-)"
    after = f"(?![{_SIGNS}])" if _ENDS_UNSPACED.match(word) else rf"(?!{letter})(?!-)"
    return f"{before}{re.escape(word)}{after}"


def _spellings(table: Mapping[str, _Entry]) -> dict[str, tuple[_Entry, Callable[[str], str]]]:
    """What may stand in a sentence: the entry it belongs to, and how the counterpart is then spelled."""
    found: dict[str, tuple[_Entry, Callable[[str], str]]] = {word: (entry, str) for word, entry in table.items()}
    for word, entry in table.items():
        found.setdefault(_capitalised(word), (entry, _capitalised))
        if len(word) > 1:
            found.setdefault(word.upper(), (entry, str.upper))
    return found


def _rows_at(sentence: str, match: re.Match[str], entry: _Entry, spell: Callable[[str], str]) -> list[dict[str, str]]:
    text = sentence[: match.start()] + SLOT + sentence[match.end() :]
    return [
        {
            "text": text,
            "factual": match.group(),
            "counterfactual": spell(counterpart),
            "label": entry.label,
            "counterfactual_label": other,
        }
        for other, counterpart in entry.counterparts.items()
    ]


def _example(table: Mapping[str, _Entry], label: str) -> str:
    usable = [word for word, entry in table.items() if entry.label == label and entry.counterparts]
    return ", ".join(map(repr, usable[:3])) or "none: each of its words has several counterparts in the table"


def _capitalised(word: str) -> str:
    return word[:1].upper() + word[1:]


def shortened(text: str, limit: int = 80) -> str:
    """A text for an error message: quoted, its end cut off where it is long."""
    return repr(text if len(text) <= limit else text[: limit - 1] + "…")
