"""Counterfactual pairs from templates: text that says the class before the slot, and the words of every class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from datasets import Dataset

from .words import SLOT, PairError, shortened

FILLER = "{name}"
PAIR_COLUMNS = ("text", "factual", "counterfactual", "label", "counterfactual_label")


def pairs_from_templates(
    templates: Sequence[str],
    fillers: Mapping[str, Sequence[str]],
    words: Mapping[str, Sequence[str]],
    classes: Sequence[str],
) -> Dataset:
    """Fill every template with every filler, and pair the word of its class with that of every other class.

    Args:
        templates: With `{name}`, where the filler goes, and `[FEATURE]`, where the word goes, as in
            "Tom saw a {name}. He liked the [FEATURE]".
        fillers: Class → what tells it, as in `{"female": ["Lily", "Anna"], "male": ["Tom", "Ben"]}`.
        words: Class → its words; those at one index are counterparts.
        classes: Names of the classes.

    Returns:
        A data set with `text`, `factual`, `counterfactual`, `label` and `counterfactual_label`: one row a template,
        filler, index of words and other class.

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
    if len({len(words[label]) for label in classes}) != 1:
        counts = {label: len(words[label]) for label in classes}
        raise PairError(f"words at one index are counterparts, so the classes need equally many; they have {counts}")
    rows: dict[tuple[str, ...], None] = {}
    for template in templates:
        if template.count(SLOT) != 1 or template.count(FILLER) != 1:
            raise PairError(f"the template {shortened(template)} needs {FILLER} and {SLOT}, each once")
        for label in classes:
            for filler in fillers[label]:
                text = template.replace(FILLER, filler)
                for index, word in enumerate(words[label]):
                    for other in classes:
                        if other != label:
                            rows[text, word, words[other][index], label, other] = None
    return Dataset.from_dict(dict(zip(PAIR_COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))
