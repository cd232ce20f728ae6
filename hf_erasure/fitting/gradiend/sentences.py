"""Counterfactual pairs from plain sentences and from templates."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

from hf_erasure.models.model import datasets
from hf_erasure.models.word_tokens import SLOT, PairError, is_unspaced, shortened

from ..counterparts import Counterparts, CounterpartWords, read_counterparts

FILLER = "{name}"
PAIR_COLUMNS = ("text", "factual", "counterfactual", "label", "counterfactual_label")


def pairs_from_sentences(
    sentences: Iterable[str], counterparts: Counterparts, classes: Sequence[str], *, single: bool = False
) -> datasets.Dataset:
    """Make counterfactual pairs from plain sentences and a table of counterpart words.

    Every occurrence of a word of the table becomes one row, or ``k - 1`` rows for ``k`` classes. Words are found and
    counterparts are spelled as `CounterpartWords` does it. Chinese, Japanese, Thai and other scripts that put no space
    between words have no such boundaries: there a word is found wherever its characters stand, and a warning is given.

    A word with more than one counterpart in a class ("her" is "him" or "his") makes no row of that class: the table
    does not tell which one fits.

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
        PairError: The table does not fit the classes or has a word in two classes, a sentence already has a slot, or
            the sentences have no words of the table, or words of one class only.
    """
    if isinstance(sentences, str):
        raise TypeError("sentences is one string; pass a list of sentences")
    table = CounterpartWords(counterparts, classes)
    unspaced = [word for word in table.table if is_unspaced(word)]
    if unspaced:
        warnings.warn(
            f"The script of {unspaced[0]!r} puts no space between words, so it is found wherever its characters stand, "
            "within longer words too: leave sentences with such words out, or put these words in the table.",
            stacklevel=2,
        )
    rows: list[tuple[str, ...]] = []
    for number, sentence in enumerate(sentences):
        if not isinstance(sentence, str):
            raise PairError(f"sentence {number} is {sentence!r}, which is not a text; leave it out")
        if SLOT in sentence:
            raise PairError(f"sentence {number} ({shortened(sentence)}) has a slot already; pass it as a row of pairs")
        found = table.found_in(sentence)
        for word in found if not single or len(found) == 1 else ():
            text = sentence[: word.start] + SLOT + sentence[word.end :]
            only = {other: spelled[0] for other, spelled in word.others.items() if len(spelled) == 1}
            factual = sentence[word.start : word.end]
            rows += [(text, factual, counterpart, word.label, other) for other, counterpart in only.items()]
    present = {label for *_, label, _ in rows}
    if len(present) < 2:
        missing = next(name for name in classes if name not in present)
        raise PairError(
            f"the sentences make pairs of {sorted(present) or 'no class'} only; add sentences with words of "
            f"{missing!r} that have one counterpart in the table"
        )
    return _as_dataset(rows)


def _as_dataset(rows: Iterable[tuple[str, ...]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict(dict(zip(PAIR_COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))


def pairs_from_templates(
    templates: Sequence[str],
    fillers: Mapping[str, Sequence[str]],
    words: Mapping[str, Sequence[str]],
    classes: Sequence[str],
) -> datasets.Dataset:
    """Fill every template with every filler, and pair the word of its class with that of every other class.

    Args:
        templates: Texts with `{name}`, where the filler goes, and `[FEATURE]`, where the word goes, as in
            "Tom saw a {name}. He liked the [FEATURE]".
        fillers: Class → fillers that tell the class, as in `{"female": ["Lily", "Anna"], "male": ["Tom", "Ben"]}`.
        words: Class → its words; words at one index are counterparts.
        classes: Names of the classes.

    Returns:
        A data set with `text`, `factual`, `counterfactual`, `label` and `counterfactual_label`: one row for each
        template, filler, index of words and other class.

    Raises:
        PairError: A template lacks its slots, a class lacks fillers or words, or the classes have unequally many words.
    """
    for what, table in (("fillers", fillers), ("words", words)):
        if not isinstance(table, Mapping) or set(table) != set(classes):
            named = sorted(map(str, table)) if isinstance(table, Mapping) else table
            raise PairError(f"{what} must have a list for each of {list(classes)}; got {named}")
        for label, entries in table.items():
            if isinstance(entries, str) or not entries or not all(isinstance(e, str) and e for e in entries):
                raise PairError(f"{what} of {label!r} are {entries!r}; write a list of words")
    counterparts = read_counterparts(words, classes)
    rows: dict[tuple[str, ...], None] = {}
    if isinstance(templates, str) or not templates:
        raise PairError(f"templates are {templates!r}; write a list of texts with {FILLER} and {SLOT}")
    for template in templates:
        if template.count(SLOT) != 1 or template.count(FILLER) != 1:
            raise PairError(f"the template {shortened(template)} needs {FILLER} and {SLOT}, each once")
        for place, label in enumerate(classes):
            for filler in fillers[label]:
                text = template.replace(FILLER, filler)
                for row in counterparts:
                    for other, counterpart in zip(classes, row, strict=True):
                        if other != label:
                            rows[text, row[place], counterpart, label, other] = None
    return _as_dataset(rows)
