"""Make a recipe from a model, a table and a label; `hf-erasure fit MODEL DATA` runs and writes it.

Columns, labels and splits are read and checked here, before a model is loaded.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers.utils import cached_file

from hf_erasure.adapters.common.config import number_of
from hf_erasure.adapters.common.files import read_text
from hf_erasure.fitting.counterparts import CounterpartWords
from hf_erasure.models.pooling import SENTENCE_POOLS

from .erasure import EMBEDDED, Recipe, embedded_model, label_text, load_data
from .gradiend_recipe import GradiendRecipe
from .run import load_source, refuse_empty, require_columns
from .schema import overridden, section_of

# The share that is set aside to measure on, where the data have no split for it.
TEST_SHARE = 0.2
# How older releases of sentence-transformers write the pooling that an erasure can follow.
_POOLS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls", "pooling_mode_lasttoken": "last"}


def erasure_recipe(
    model: str, source: str, label: str, overrides: Sequence[str] = (), *, text: str | None = None,
    keep: str | None = None, test: str | None = None, group: str | None = None, pool: str | None = None,
    targets: str | None = None, counterfactual_words: str | None = None, pair_rank: int | None = None,
    name: str | None = None, out: str | None = None,
) -> tuple[Recipe, list[str]]:  # fmt: skip
    """The recipe, and a few lines about its data. The options are those of `hf-erasure fit`, whose help explains them.

    Raises `ValueError` if the data cannot be fitted on.
    """
    splits = load_source(source, name)
    train = "train" if "train" in splits else next(iter(splits))
    if "train" not in splits and len(splits) > 1:
        raise ValueError(f"{source} has the splits {', '.join(splits)}, none of them train: name it in a recipe.")
    rows = splits[train]
    require_columns(rows, source, *filter(None, (label, text, keep, group)))
    text = text or _text_column(rows, {label, keep, group}, source)
    refuse_empty(rows, source, text, label)
    labels = _class_names(rows, label, source)
    place = str(Path(source).resolve()) if Path(source).exists() else source
    data: dict[str, Any] = {"source": place, "name": name, "train": train, "text_column": text}
    data |= {"label_column": label, "keep_column": keep, "group_column": group}
    test = test or ("test" if "test" in splits and group is None else str(TEST_SHARE))
    is_share = test.replace(".", "", 1).isdigit()
    data |= {"test_share": float(test)} if is_share else {"test": test}
    pool = pool or _checkpoint_pool(model)
    adapter: dict[str, Any] = {"pair_rank": pair_rank} if pair_rank else {}
    if counterfactual_words is not None:
        CounterpartWords.load(counterfactual_words, labels)  # raises an error where words and labels do not fit
        data["counterfactual_words"] = counterfactual_words
    elif pair_rank:
        raise ValueError("--pair-rank is for pairs of texts and counterfactuals: write --counterfactual-words, too.")
    targets = None if targets == "norms" else targets  # norms are the default
    adapter |= {"target_modules": targets.split(",") if "," in targets else targets} if targets else {}
    content = {
        "model": model, "concept": label, "labels": labels, "output": out or f"out/no-{label}",
        "data": data, "fit": {"pool": pool}, "adapter": adapter,
    }  # fmt: skip
    recipe = section_of(overridden(content, overrides), Recipe)
    parts = load_data(replace(recipe.data, streaming=False), recipe.labels)
    fitted, measured = (parts[name] for name in (recipe.data.train, recipe.data.test))
    unknown = {label_text(value) for value in _label_values(measured, label)} - set(recipe.labels)
    if unknown:
        raise ValueError(f"The split {recipe.data.test!r} has labels that {train!r} lacks: {sorted(unknown)[:5]}.")
    count = Counter(label_text(value) for value in _label_values(rows, label))
    lines = [f"{source}: {label!r} of {text!r}, " + ", ".join(f"{name} {count[name]}" for name in labels)]
    apart = f"no {group!r} in both" if group else "no text in both"
    how = f"set aside at random, {apart}" if is_share else f"the split {recipe.data.test!r}"
    # A split of its own may hold texts that are fitted on.
    count_measured = number_of(len(measured), "other" if is_share else "row")
    count_fitted = number_of(min(len(fitted), recipe.data.fit_rows or len(fitted)), "row")
    lines.append(f"fitted on {count_fitted}, measured on {count_measured} ({how})")
    lines.append(f"pool: {pool or 'all tokens alike; --pool mean, cls or last if your task reads one vector a text'}")
    return recipe, lines


def feature_recipe(
    model: str, sentences: str, words: Sequence[str], classes: str | None = None, out: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[GradiendRecipe, list[str]]:  # fmt: skip
    """The recipe for a feature whose classes are words, such as `he,she`, and for sentences with these words.

    Raises:
        ValueError: If there are fewer than two classes, or an entry of `words` does not have one word for each class.
    """
    groups = [[word.strip() for word in entry.split(",") if word.strip()] for entry in words]
    names = [name.strip() for name in classes.split(",")] if classes else groups[0]
    if len(names) < 2 or any(len(group) != len(names) for group in groups):
        raise ValueError(
            f"--words {' --words '.join(words)}: write one word for each class, and two classes or more, in each "
            "--words, as in --words he,she --words his,her."
        )
    whole = {"sentences": str(Path(sentences).resolve()) if Path(sentences).exists() else sentences}
    table = {name: [group[place] for group in groups] for place, name in enumerate(names)}
    feature = "-".join(names)
    content: dict[str, Any] = {
        "model": model, "feature": feature, "classes": names, "output": out or f"out/{feature}",
        "data": {"whole": whole | {"words": table}, "skip_unusable": True},
    }  # fmt: skip
    return section_of(overridden(content, overrides), GradiendRecipe), [f"{feature}: the words {table}"]


def _text_column(rows: Dataset, others: set[str | None], source: str) -> str:
    """Return `text`, or the only column of texts that is not among `others`."""
    kinds = {name: getattr(kind, "dtype", "") for name, kind in rows.features.items() if name not in others}
    found = [name for name, kind in kinds.items() if "string" in kind]
    if "text" in found or len(found) == 1:
        return "text" if "text" in found else found[0]
    raise ValueError(f"{source}: which column holds the texts? Write --text {' or --text '.join(found) or 'COLUMN'}.")


def _label_values(rows: Dataset, column: str) -> list[Any]:
    """The labels of all rows; class ids are replaced by their names."""
    names = getattr(rows.features[column], "names", None)
    return [names[value] if names and isinstance(value, int) and value >= 0 else value for value in rows[column]]


def _class_names(rows: Dataset, column: str, source: str) -> list[str]:
    """The classes of a column, in the order of their ids, numbers or names."""
    values = _label_values(rows, column)
    kinds = sorted({type(value).__name__ for value in values})
    if kinds not in (["str"], ["int"], ["bool"]):
        raise ValueError(
            f"{source}: {column!r} holds {' and '.join(kinds)} values, not one class a row: this command takes classes "
            "that are all texts or all whole numbers; fit other concepts with fit_concept_erasure."
        )
    names, found = getattr(rows.features[column], "names", None), set(values)
    if len(found) < 2:
        raise ValueError(f"{source}: {column!r} is {values[0]!r} in all rows: a concept needs at least two labels.")
    return [name for name in names if name in found] if names else [label_text(value) for value in sorted(found)]


def _checkpoint_pool(model: str) -> str | None:
    """The pool of a sentence-transformers checkpoint; None if the model is of another kind or pools in another way."""
    folder = embedded_model() if model == EMBEDDED else model
    options: Any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        path = cached_file(folder, "1_Pooling/config.json", **options)
    except (OSError, ValueError):
        return None  # the model does not exist: loading it raises the error
    pooling = json.loads(read_text(Path(path))) if path else {}
    modes = [name for key, name in _POOLS.items() if pooling.get(key) is True]
    return SENTENCE_POOLS.get(str(pooling.get("pooling_mode"))) or (modes[0] if len(modes) == 1 else None)
