"""The fields of a GRADIEND recipe, and its data: pairs to learn from, choose an edit on and report; neutral texts."""

from __future__ import annotations

import functools
import itertools
import os
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, get_args

from datasets import Dataset

from hf_erasure.adapters import GradiendConfig
from hf_erasure.adapters.common.config import short
from hf_erasure.adapters.common.files import read_table, read_text
from hf_erasure.fitting.gradiend.pairs import read_rows
from hf_erasure.fitting.gradiend.selection import FEATURE_FACTORS, LEARNING_RATES, check_search, goal_by_name
from hf_erasure.fitting.gradiend.sentences import PAIR_COLUMNS, pairs_from_sentences, pairs_from_templates
from hf_erasure.fitting.gradiend.training import GradiendTrainingArguments
from hf_erasure.models.heads import HEADS, Task
from hf_erasure.models.word_tokens import SLOT, PairError, shortened, whole_words

from .run import load_rows, names_on_hub
from .schema import check_section, fields_of, one_of, read

# Task → the Auto class that loads a model for it.
TASKS = {task: next(head.auto_class for head in HEADS if head.task == task) for task in get_args(Task)}
PARTS = ("train", "choice", "test")
NEUTRAL_PARTS = ("choice", "test")
# The most neutral texts that are taken from the sentences; the grid of edits is scored on half of them.
_MOST_NEUTRAL = 400


@dataclass
class PairsRecipe:
    """One set of pairs, from a file, from templates, or from sentences and a table of counterpart words.

    Attributes:
        file: A file or Hub id with the columns `text`, `factual`, `counterfactual`, `label` (and, for more than two
            classes, `counterfactual_label`).
        split: The split of the file or of the sentences; when None, their only split.
        templates: Sentences with `{name}` and `[FEATURE]`.
        fillers: What replaces `{name}` in the templates: class → names.
        sentences: Plain sentences: a list, a text file (one a line), or another file or Hub id with the column `text`.
        words: The words of templates and sentences: class → words, a list of tuples in the order of the classes, or a
            YAML or JSON file with either; words at one index are counterparts.
        words_key: The key of the table within that file.
        single: Leave out sentences with more than one word of the table: the other words would tell the class.
    """

    file: str | None = None
    split: str | None = None
    templates: list[str] | None = None
    fillers: dict[str, list[str]] | None = None
    sentences: str | list[str] | None = None
    words: str | dict[str, list[str]] | list[list[str]] | None = None
    words_key: str | None = None
    single: bool = True


@dataclass
class TextsRecipe:
    """Plain texts.

    Attributes:
        texts: A list, a text file, or another file or Hub id with the column `text`.
        split: The split of a data set.
        separator: A regular expression that separates the texts of a text file; by default its lines are the texts.
        rows: The first row and the row after the last, counted after empty and repeated texts were left out.
    """

    short_for: ClassVar[str] = "texts"

    texts: str | list[str]
    split: str | None = None
    separator: str = r"\n"
    rows: list[int] | None = None

    def __post_init__(self) -> None:
        if self.rows is not None and len(self.rows) != 2:
            raise ValueError(f"rows={self.rows} of texts in a recipe: write two numbers, such as [0, 100].")
        try:
            re.compile(self.separator)
        except re.error as error:
            raise ValueError(f"separator={self.separator!r} is not a regular expression: {error}.") from error


@dataclass
class NeutralRecipe:
    """Texts without the feature.

    Attributes:
        choice: Texts on which the choice of an edit scores language modelling.
        test: Texts on which the report scores language modelling.
        whole: Texts in place of `choice` and `test`: each gets a half of them.
    """

    short_for: ClassVar[str] = "whole"

    choice: TextsRecipe | None = None
    test: TextsRecipe | None = None
    whole: TextsRecipe | None = None


@dataclass
class GradiendDataRecipe:
    """Three sets of pairs that share no text: one to learn from, one to choose an edit on, and one to report on.

    Attributes:
        train: Pairs to learn the feature from.
        choice: Pairs on which the best start of a trained neuron and an edit are chosen.
        test: Pairs for the report; nothing is chosen on them.
        whole: One source in place of the three sets: each set gets a share of its sentences.
        shares: The shares of `whole` for train, choice and test.
        seed: Decides the order in which `whole` is divided.
        defaults: Entries, such as `words`, for each set that does not have its own.
        skip_unusable: Leave out rows whose words the model's tokenizer does not know or, for a masked model, whose
            words have different numbers of tokens. When False, such rows raise an error.
        neutral: `choice` and `test` texts without the feature, or `whole`, of which each gets a half. When left out and
            `data.whole` has `sentences`: up to 400 of the sentences that have none of the words.
    """

    train: PairsRecipe | None = None
    choice: PairsRecipe | None = None
    test: PairsRecipe | None = None
    whole: PairsRecipe | None = None
    shares: list[float] = field(default_factory=lambda: [0.7, 0.15, 0.15])
    seed: int = 0
    defaults: dict[str, Any] = field(default_factory=dict, metadata=fields_of(PairsRecipe))
    skip_unusable: bool = False
    neutral: NeutralRecipe = field(default_factory=NeutralRecipe)

    def __post_init__(self) -> None:
        missing = [] if self.whole else [f"data.{name}" for name in PARTS if getattr(self, name) is None]
        if self.neutral.whole is None and not self.finds_neutral:
            missing += [f"data.neutral.{name}" for name in NEUTRAL_PARTS if getattr(self.neutral, name) is None]
        if missing:
            raise ValueError(
                f"The recipe lacks {', '.join(missing)}: an edit is not reported on the texts it was chosen on."
            )

    @property
    def finds_neutral(self) -> bool:
        """Whether the neutral texts are sentences of `whole` without its words."""
        return self.neutral == NeutralRecipe() and self.whole is not None and self.whole.sentences is not None

    def origin(self) -> dict[str, Any]:
        """Where the pairs come from, in the words of a card. The pairs must have been loaded."""
        parts = [part for part in (self.whole, self.train, self.choice, self.test) if part is not None]
        labels_from = "a file of pairs with the columns factual, counterfactual and label"
        if parts[0].templates is not None:
            labels_from = f"{len(parts[0].templates)} sentence templates of the recipe, filled with words of each class"
        elif parts[0].sentences is not None:
            labels_from = "sentences with one of the recipe's words, whose counterpart a table of the recipe names"
        sources = [source for part in parts for source in (part.file, part.sentences)]
        return {"datasets": names_on_hub(sources), "labels_from": labels_from}

    @staticmethod
    def spelled_out(content: dict[str, Any]) -> dict[str, Any]:
        """Return the section with the `defaults` in each set that does not have an entry of its own."""
        defaults = check_section(content.get("defaults") or {}, PairsRecipe, "data.defaults")
        sets = {name: content.get(name) for name in (*PARTS, "whole")}
        return content | {name: {**defaults, **part} for name, part in sets.items() if isinstance(part, dict)}


@dataclass
class SelectRecipe:
    """What an edit is chosen for.

    Attributes:
        goal: A goal that `GradiendTrainer.select` knows, or a list: the adapter is saved with the edit for the first
            goal, and all edits are reported.
        budget: The share by which language modelling may get worse.
        feature_factors: The grid's values of h.
        learning_rates: The grid's values of α.
    """

    goal: str | list[str] = "balance"
    budget: float = 0.02
    feature_factors: list[float] = field(default_factory=lambda: list(FEATURE_FACTORS))
    learning_rates: list[float] = field(default_factory=lambda: list(LEARNING_RATES))

    def __post_init__(self) -> None:
        if not self.goals:
            raise ValueError("select.goal names no goal: write one, or leave it out for 'balance'.")
        check_search(self.budget, self.feature_factors, self.learning_rates, "select.")

    @property
    def goals(self) -> list[str]:
        """The goals, each once."""
        return list(dict.fromkeys([self.goal] if isinstance(self.goal, str) else self.goal))


@dataclass
class GradiendRecipe:
    """Everything a run needs.

    Attributes:
        model: A Hub id or a local folder.
        feature: What is learned.
        classes: The classes of the feature, in order.
        output: The folder the adapter is written to.
        task: `"masked"`, `"causal"`, `"seq2seq"`, `"classification"`, or `"auto"`: the checkpoint names it.
        config: Further fields of `GradiendConfig`; here `keep_encoder` is true unless it is given.
        data: Where pairs and texts are.
        arguments: Fields of `GradiendTrainingArguments`.
        select: What an edit is chosen for.
    """

    model: str
    feature: str
    classes: list[str]
    output: str
    data: GradiendDataRecipe
    task: str = field(default="auto", metadata=one_of(("auto", *TASKS)))
    config: dict[str, Any] = field(default_factory=dict, metadata=fields_of(GradiendConfig, "feature", "classes"))
    arguments: dict[str, Any] = field(default_factory=dict, metadata=fields_of(GradiendTrainingArguments))
    select: SelectRecipe = field(default_factory=SelectRecipe)

    def __post_init__(self) -> None:
        self.adapter()
        for goal in self.select.goals:
            goal_by_name(goal, self.classes)

    def adapter(self) -> GradiendConfig:
        """The configuration of the adapter."""
        return GradiendConfig(feature=self.feature, classes=self.classes, **{"keep_encoder": True} | self.config)


read_gradiend_recipe = functools.partial(read, kind=GradiendRecipe)


@dataclass(frozen=True)
class Materials:
    """The data of a run."""

    train: Dataset  # pairs, as in `choice` and `test`
    choice: Dataset
    test: Dataset
    neutral: dict[str, Dataset]  # `choice` and `test` → texts
    skipped: dict[str, int]  # part → how many of its rows were left out as unusable

    def counts(self) -> dict[str, int]:
        """How many rows each set has, and how many different texts."""
        found = {name: len(getattr(self, name)) for name in PARTS}
        found |= {f"{name} texts": len(set(getattr(self, name)["text"])) for name in PARTS}
        return found | {f"neutral {name}": len(rows) for name, rows in self.neutral.items()}

    def words(self) -> list[str]:
        """The words of all pairs."""
        columns = [getattr(self, part)[name] for part in PARTS for name in ("factual", "counterfactual")]
        return sorted({word.strip() for column in columns for word in column})

    def completed(self, rows: Dataset, classes: Sequence[str]) -> Dataset:
        """Rows with all columns of pairs: where only `factual` is given, its class and counterpart are looked up.

        A word that no pair spells the same way is looked up without regard to capitals. Raises `PairError` if the word
        of a row is missing, or no pair has that word.
        """
        needed = PAIR_COLUMNS[: 4 + (len(classes) > 2)]
        if set(needed) <= set(rows.column_names):
            return rows
        if "factual" not in rows.column_names:
            raise PairError(
                f"the texts have {SLOT} slots, so they need a column 'factual' with the words that stand there"
            )
        as_spelled, known = dict[str, dict[str, str]](), dict[str, dict[str, str]]()
        for pair in (pair for part in PARTS for pair in read_rows(getattr(self, part), list(classes))):
            entry = {"label": classes[pair.label], "counterfactual_label": classes[pair.other]}
            entry["counterfactual"] = pair.counterfactual
            as_spelled.setdefault(pair.factual, entry)
            known.setdefault(pair.factual.lower(), entry)
        known |= as_spelled
        given = [str(word).strip() for word in rows["factual"]]
        words = [word if word in known else word.lower() for word in given]
        if unknown := [word for word in words if word not in known]:
            there = f"{unknown[0]!r} is not a word of the recipe ({', '.join(sorted(known)[:8])} …)"
            raise PairError(f"{there}: give it the columns {', '.join(needed[2:])} too")
        texts = [{"text": row["text"], "factual": row["factual"]} for row in rows]
        return Dataset.from_list([row | known[word] for row, word in zip(texts, words, strict=True)])


def load_materials(
    recipe: GradiendDataRecipe, classes: Sequence[str], usable: Callable[[Dataset], list[int]], task: str = "auto"
) -> Materials:
    """Load all sets, and check that they share no text.

    `usable` returns the rows of a set that the model can use; it is called with `skip_unusable` only. A `"causal"`
    model reads the text before a slot alone: rows of `choice` and `test` that begin as one of an earlier set does are
    left out. Raises `ValueError` if two sets share a text; the message quotes one.
    """
    if recipe.whole is not None:
        parts = _split_whole(recipe.whole, classes, recipe.shares, recipe.seed)
    else:
        parts = {name: _load_pairs(getattr(recipe, name), classes, f"data.{name}") for name in PARTS}
    skipped = {}
    if recipe.skip_unusable:
        for name, rows in parts.items():
            try:
                kept = usable(rows)
            except PairError as error:
                raise PairError(f"data.{name}: {error}") from error
            skipped[name] = len(rows) - len(kept)
            parts[name] = rows.select(kept)
    if recipe.neutral.whole is not None or recipe.finds_neutral:
        texts = _load_texts(recipe.neutral.whole) if recipe.neutral.whole else _neutral_sentences(recipe, classes)
        neutral_texts = {"choice": texts[: len(texts) // 2], "test": texts[len(texts) // 2 :]}
    else:
        neutral_texts = {name: _load_texts(getattr(recipe.neutral, name)) for name in NEUTRAL_PARTS}
    for name, texts in neutral_texts.items():
        if not texts:
            raise ValueError(f"data.neutral: there is no text for {name}.")
    neutral = {name: Dataset.from_dict({"text": texts}) for name, texts in neutral_texts.items()}
    _check_disjoint({f"data.{name}": rows for name, rows in parts.items()})
    _check_disjoint({f"data.neutral.{name}": rows for name, rows in neutral.items()})
    known: set[str] = set()
    for name, rows in parts.items() if task == "causal" else ():
        starts = [text.partition(SLOT)[0] for text in rows["text"]]
        kept = [number for number, start in enumerate(starts) if start not in known]
        if not kept:
            raise ValueError(
                f"data.{name}: up to {SLOT}, which is all that a causal model reads, each of its texts is also in an "
                f"earlier set, such as {shortened(starts[0])}: write other texts."
            )
        if len(kept) < len(rows):
            skipped[name] = skipped.get(name, 0) + len(rows) - len(kept)
            parts[name] = rows.select(kept)
        known.update(starts)
    return Materials(**parts, neutral=neutral, skipped=skipped)


def word_table(recipe: PairsRecipe, classes: Sequence[str], where: str) -> dict[str, list[str]]:
    """Class → words. Raises `ValueError` if the table is missing, or it does not fit the classes."""
    words: Any = recipe.words
    if isinstance(words, str):
        path = Path(os.path.expandvars(words))
        try:
            words = read_table(path)
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}.words: {error}") from error
        if recipe.words_key is not None:
            if not isinstance(words, dict) or recipe.words_key not in words:
                known = ", ".join(words) if isinstance(words, dict) else "no keys"
                raise ValueError(f"{where}.words_key: {path} has no {recipe.words_key!r}; it has {known}.")
            words = words[recipe.words_key]
    if isinstance(words, list):
        bad = [entry for entry in words if not isinstance(entry, list) or len(entry) != len(classes)]
        if bad:
            raise ValueError(f"{where}.words: {bad[0]!r} is not a list of one word for each of {list(classes)}.")
        words = {label: [str(entry[i]) for entry in words] for i, label in enumerate(classes)}
    if not isinstance(words, Mapping) or not all(isinstance(entries, (str, list)) for entries in words.values()):
        found = "is missing" if words is None else f"has {short(words)}"
        raise ValueError(
            f"{where}.words {found}: write class → list of words, a list of tuples, or a YAML or JSON file."
        )
    return {str(label): [entries] if isinstance(entries, str) else entries for label, entries in words.items()}


def _source(recipe: PairsRecipe, classes: Sequence[str], where: str) -> tuple[Dataset | None, dict[str, list[str]]]:
    """The rows of a set of pairs that is a file, or else the words of its templates or sentences."""
    kinds = [name for name in ("file", "templates", "sentences") if getattr(recipe, name) is not None]
    if len(kinds) != 1:
        raise ValueError(f"{where} has {' and '.join(kinds) or 'no source'}: write one of file, templates, sentences.")
    if recipe.file is not None:
        return load_rows(recipe.file, recipe.split, with_texts=True), {}
    return None, word_table(recipe, classes, where)


def _load_pairs(recipe: PairsRecipe, classes: Sequence[str], where: str) -> Dataset:
    rows, words = _source(recipe, classes, where)
    if rows is not None:
        return rows
    if recipe.templates is not None:
        return pairs_from_templates(recipe.templates, recipe.fillers or {}, words, classes)
    return pairs_from_sentences(_load_sentences(recipe), words, classes, single=recipe.single)


def _neutral_sentences(recipe: GradiendDataRecipe, classes: Sequence[str]) -> list[str]:
    """Sentences of `whole` that have none of its words, in a random order, at most as many as are needed."""
    whole = recipe.whole or PairsRecipe()
    words = {word for entries in word_table(whole, classes, "data.whole").values() for word in entries}
    found = [text for text in _load_sentences(whole) if not whole_words(words).search(text)]
    if len(found) < 2:
        raise ValueError(
            f"data.whole: only {len(found)} of its sentences have none of {', '.join(sorted(words))}, and language "
            "modelling is measured on such sentences: write data.neutral, texts without the feature."
        )
    random.Random(recipe.seed).shuffle(found)
    return found[:_MOST_NEUTRAL]


def _load_sentences(recipe: PairsRecipe) -> list[str]:
    return _load_texts(TextsRecipe(recipe.sentences or [], recipe.split))


def _split_whole(recipe: PairsRecipe, classes: Sequence[str], shares: Sequence[float], seed: int) -> dict[str, Dataset]:
    """Divide one source into three parts that share no sentence."""
    if len(shares) != 3 or min(shares) <= 0 or sum(shares) > 1 + 1e-9:
        raise ValueError(f"data.shares is {list(shares)}: write three numbers above 0, for train, choice, test.")
    if recipe.templates is not None:
        raise ValueError("data.whole has templates: write data.train, data.choice and data.test, each with its own.")
    rows, words = _source(recipe, classes, "data.whole")
    texts = list(dict.fromkeys(_load_sentences(recipe) if rows is None else rows["text"]))
    # Sentences that differ only in words of the table have the same text once a slot replaces these words.
    all_words = {word for entries in words.values() for word in entries}
    by_masked_text: dict[str, list[str]] = {}
    for text in texts:
        by_masked_text.setdefault(whole_words(all_words).sub(SLOT, text) if all_words else text, []).append(text)
    groups = list(by_masked_text.values())
    random.Random(seed).shuffle(groups)
    ends = [0, *(round(len(groups) * end) for end in itertools.accumulate(shares))]
    parts = {}
    for name, first, stop in zip(PARTS, ends, ends[1:], strict=False):
        own = [text for group in groups[first:stop] for text in group]
        if rows is not None:
            chosen = set(own)
            parts[name] = rows.select([number for number, text in enumerate(rows["text"]) if text in chosen])
            continue
        try:
            parts[name] = pairs_from_sentences(own, words, classes, single=recipe.single)
        except PairError as error:
            raise PairError(f"data.whole, the {len(own)} sentences for {name}: {error}") from error
    return parts


def _check_disjoint(parts: Mapping[str, Dataset]) -> None:
    for (one, rows), (other, more) in itertools.combinations(parts.items(), 2):
        shared = sorted({text for text in rows["text"] if text} & set(more["text"]))
        if shared:
            raise ValueError(
                f"{one} and {other} share {len(shared)} texts, such as {shortened(shared[0])}: nothing can be "
                "measured on texts that it was learned or chosen on. Leave them out of one set."
            )


def _load_texts(recipe: TextsRecipe) -> list[str]:
    """The texts, each once, without empty texts."""
    source = recipe.texts
    if isinstance(source, str):
        path = Path(os.path.expandvars(source))
        if path.suffix == ".txt" and path.is_file():
            pattern = re.compile(recipe.separator)
            found = pattern.split(read_text(path))[:: pattern.groups + 1]  # between the texts are those of its groups
        else:
            found = list(load_rows(source, recipe.split, with_texts=True)["text"])
    else:
        found = list(source)
    texts = list(dict.fromkeys(re.sub(r"\s*\n\s*", "\n", text.strip()) for text in found))
    texts = [text for text in texts if text]
    return texts if recipe.rows is None else texts[recipe.rows[0] : recipe.rows[1]]
