"""Tables of counterpart words, the texts in which they are exchanged, and which of their tokens are counterparts.

A counterfactual of a text is the same text with the words that carry a concept exchanged for their counterparts. What
two such texts share cancels in the difference of their activations, so a few pairs say as much about the concept as
many labelled texts.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import BatchEncoding

from hf_erasure.adapters.common.files import read_table
from hf_erasure.models.word_tokens import PairError, capitalised, whole_words

Counterparts = Mapping[str, str] | Mapping[str, Sequence[str]]
# Tables that come with the package: name → file.
TABLES = {"english_gender": Path(__file__).parent / "words" / "english_gender.yaml"}
# English writes some pronouns alike before a noun ("her hat", "his hat") and elsewhere ("saw her", "it is his"). The
# two counterparts of such a pronoun → the one before a noun, and the one elsewhere.
_BEFORE_A_NOUN = {frozenset(("his", "him")): ("his", "him"), frozenset(("her", "hers")): ("her", "hers")}
# Words that do not begin a noun with its adjectives: "her" before one of these words is not a possessive.
_OPEN_NO_NOUN = """
    a about across after again against all along alone also although am an and any anymore are around as at away back
    be because been before behind being beside between but by can could did do does down during each either every for
    from had has have he here how i if in into is it just like may me might must near neither next nor not now of off
    on once or out outside over per shall she should since so some soon than that the their them then there these they
    this those though through till to today together tomorrow tonight too toward towards under unless until up upon us
    was we well were what when where whether which while who whom why will with within without would yesterday you
    your my our its his
"""
_NO_NOUN = frozenset(_OPEN_NO_NOUN.split())
_NEXT_WORD = re.compile(r"\s+([^\W\d_][\w'-]*)")
_WORD = re.compile(r"\w+|[^\w\s]")


def read_counterparts(counterparts: Counterparts, classes: Sequence[str]) -> list[tuple[str, ...]]:
    """Read a table, in either form that `CounterpartWords` takes, as tuples of words in the order of the classes.

    Raises:
        PairError: The table is empty, or does not fit the classes.
    """
    if len(classes) < 2 or len(set(classes)) != len(classes):
        raise PairError(f"classes must name two classes or more, each once; got {list(classes)}")
    if not counterparts:
        raise PairError('the table of counterparts is empty; write for example {"he": "she"}')
    table: dict[str, Any] = dict(counterparts)
    if all(isinstance(value, str) for value in table.values()):
        if len(classes) != 2:
            raise PairError(f"{{word: word}} is for two classes; for {len(classes)} write {{class: [words]}}")
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


@dataclass(frozen=True)
class Occurrence:
    """A word of a table in a text."""

    start: int  # Where it begins.
    end: int  # Where it ends.
    label: str  # Its class.
    others: dict[str, list[str]]  # Class → its counterparts there, spelled as the word is.


class CounterpartWords:
    """Exchanges the words of classes for their counterparts.

    Words are found whole ("he" is not in "there" nor in "she-wolf"), as the table spells them, capitalised, or in
    capitals, and the counterpart is spelled the same way. Longer words of the table win over shorter ones. Where a word
    has several counterparts in a class the first of the table is taken, except for the English pronouns: *her* becomes
    *his* before a noun and *him* elsewhere, *his* becomes *her* or *hers*.

    Args:
        counterparts: `{word of classes[0]: word of classes[1]}`, or `{class: [words]}` where the words at one index are
            counterparts.
        classes: Names of the classes.

    Attributes:
        table: Word → its class, and class → its counterparts there, in the order they were given.

    Raises:
        PairError: The table does not fit the classes, or has a word in two of them.
    """

    def __init__(self, counterparts: Counterparts, classes: Sequence[str]) -> None:
        # Word → its class, and its counterparts in every other class, in the order of the table.
        table: dict[str, tuple[str, dict[str, list[str]]]] = {}
        for words in read_counterparts(counterparts, classes):
            for label, word in zip(classes, words, strict=True):
                owner, others = table.setdefault(word, (label, {}))
                if owner != label:
                    raise PairError(
                        f"the table has {word!r} in two classes, {owner!r} and {label!r}; leave it out of one"
                    )
                for other, counterpart in zip(classes, words, strict=True):
                    if other != label and counterpart not in others.setdefault(other, []):
                        others[other].append(counterpart)
        # Form of a word in a text → its class, its counterparts, and what spells these in this form.
        self._forms: dict[str, tuple[str, dict[str, list[str]], Callable[[str], str]]] = {
            word: (label, others, str) for word, (label, others) in table.items()
        }
        for word, (label, others) in table.items():
            for spell in (capitalised, str.upper) if len(word) > 1 else (capitalised,):
                self._forms.setdefault(spell(word), (label, others, spell))
        self.table, self._pattern = table, whole_words(table)

    @classmethod
    def load(cls, source: str | Path | Counterparts, classes: Sequence[str]) -> CounterpartWords:
        """Load a table, a table that comes with the package by its name, or a YAML or JSON file.

        Args:
            source: The table, `"english_gender"`, or the path of a file with `{class: [words]}`.
            classes: Names of the classes, as in the file; capital letters do not matter.

        Raises:
            PairError: The table does not fit the classes.
            ValueError: The file or table does not exist, or cannot be read.
        """
        if isinstance(source, Mapping):
            return cls(source, classes)
        path = TABLES.get(str(source), Path(source))
        if not path.is_file():
            raise ValueError(
                f"counterfactual_words={str(source)!r} is neither a file nor a table of the package: write one of "
                f"{sorted(TABLES)}, the path of a YAML or JSON file, or {{class: [words]}}."
            )
        read = read_table(path)
        # Data may write "Female" where a table has "female".
        table = {str(name).casefold(): words for name, words in read.items()} if isinstance(read, dict) else {}
        if isinstance(read, dict) and len(table) < len(read):
            raise PairError(f"{path} has classes that differ in capitals only, {list(read)}: leave one out.")
        own = [str(label).casefold() for label in classes]
        if not set(own) <= set(table):
            raise PairError(
                f"{path} must have a list of words for each of {list(classes)}: it has {sorted(table)}. Rename the "
                "classes, or give your own table."
            )
        return cls({label: list(table[name]) for label, name in zip(classes, own, strict=True)}, classes)

    def found_in(self, text: str) -> list[Occurrence]:
        """Where words of the table stand in a text, in their order."""
        found = []
        for match in self._pattern.finditer(text):
            if match.group() in self._forms:
                label, others, spell = self._forms[match.group()]
                spelled = {other: [spell(word) for word in words] for other, words in others.items()}
                found.append(Occurrence(match.start(), match.end(), label, spelled))
        return found

    def exchanged(self, text: str, one: str, other: str) -> str | None:
        """A text with the words of two classes exchanged for each other, or None where it has none of them."""
        toward, parts, end = {one: other, other: one}, [], 0
        for word in self.found_in(text):
            if word.label in toward:
                choices = word.others[toward[word.label]]
                chosen, pronouns = choices[0], _BEFORE_A_NOUN.get(frozenset(choice.lower() for choice in choices))
                if pronouns is not None:
                    following = _NEXT_WORD.match(text, word.end)
                    before_a_noun = following is not None and following.group(1).lower() not in _NO_NOUN
                    wanted = pronouns[0] if before_a_noun else pronouns[1]
                    chosen = next(choice for choice in choices if choice.lower() == wanted)
                parts += [text[end : word.start], chosen]
                end = word.end
        return "".join([*parts, text[end:]]) if parts else None


# ---- a text and its counterfactuals ----------------------------------------------------------------------------------


@dataclass
class Counterfactuals:
    """Reads or makes the counterfactuals of a text."""

    text_column: str  # Column of the text.
    column: str | None = None  # Column of its counterfactual, where the data have one.
    words: CounterpartWords | None = None  # Makes it by exchanging words, where the data have none.
    classes: tuple[str, ...] | None = None  # Names of the classes; None where they are bare ids.

    def of(self, row: Mapping[str, Any], label: int | None) -> list[tuple[Any, int, int]]:
        """Each counterfactual of a row, with the class of the text and that of the counterfactual.

        A text without any of the words has none, nor has a text without a label whose words are equally of two classes.

        Args:
            row: The row with the text.
            label: Class id of the row; None without a label. Then most of its words tell the class of the text; with a
                column of counterfactuals the text is of the first of two classes, the counterfactual of the second.
        """
        if self.words is None:
            own, text, other = label or 0, row[self.text_column], row[str(self.column)]
            is_same = isinstance(text, str | list) and isinstance(other, str | list) and other == text  # not of images
            return [] if other is None or is_same else [(other, own, 1 - own)]
        original = row[self.text_column]
        text, classes = original if isinstance(original, str) else " ".join(original), self.classes or ()
        if label is None:
            most = Counter(word.label for word in self.words.found_in(text)).most_common(2)
            if not most or (len(most) > 1 and most[0][1] == most[1][1]):
                return []
            label = classes.index(most[0][0])
        made = []
        for toward, name in enumerate(classes):
            other = self.words.exchanged(text, classes[label], name) if toward != label else None
            if other is not None and other != text:
                made.append((other if isinstance(original, str) else other.split(" "), label, toward))
        return made


def words_of_tokens(encoding: BatchEncoding, texts: Sequence[Any], pairs: Sequence[int]) -> Tensor:
    """The number of the word of each token; words of a counterfactual have the numbers of their counterparts.

    Special tokens are words of their own. Two texts with equally many words are matched in their order, other texts by
    a diff of their words.

    Args:
        encoding: The rows as a fast tokenizer encodes them.
        texts: Strings, or lists of words.
        pairs: For each row, the row that it is the counterfactual of, −1 for a text.

    Returns:
        `(rows, seq)` int64, −1 for padding and for words of a counterfactual without a counterpart.
    """
    numbered = [_words_of(encoding, row, text) for row, text in enumerate(texts)]
    numbers = []
    for (places, words), pair in zip(numbered, pairs, strict=True):
        number = {place: place for place in range(len(words))}
        if pair >= 0 and words != (others := numbered[pair][1]):
            spans = [(0, len(words), 0, len(others))]
            if len(words) != len(others):
                blocks = SequenceMatcher(None, words, others, autojunk=False).get_opcodes()
                spans = [block[1:] for block in blocks]
            number = {
                first: second
                for start, stop, other, end in spans
                if stop - start == end - other
                for first, second in zip(range(start, stop), range(other, end), strict=True)
            }
        numbers.append([number.get(place, -1) for place in places])
    return torch.tensor(numbers)


def _words_of(encoding: BatchEncoding, row: int, text: Any) -> tuple[list[int], list[str]]:
    """The number of the word of each position, −1 for padding; and the words."""
    tokens = (encoding.encodings or [])[row]
    if isinstance(text, str):
        spans = [match.span() for match in _WORD.finditer(text)]
        starts = [start for start, _ in spans]
        owners = [
            None if special or end <= start else bisect_left(starts, end) - 1
            for (start, end), special in zip(tokens.offsets, tokens.special_tokens_mask, strict=True)
        ]
        names = [text[start:stop] for start, stop in spans]
    else:
        owners, names = list(tokens.word_ids), list(text)
    places: list[int] = []
    words: list[str] = []
    before: Any = object()
    for token, owner, is_real in zip(tokens.tokens, owners, tokens.attention_mask, strict=True):
        if is_real and (owner is None or owner < 0 or owner != before):
            words.append(token if owner is None or owner < 0 else names[owner])
        before = owner
        places.append(len(words) - 1 if is_real else -1)
    return places, words
