"""The run of a GRADIEND recipe: learn a feature, choose an edit, measure and write; and later uses of its adapter."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import transformers
from transformers import AutoConfig

from hf_erasure.adapters import edited
from hf_erasure.adapters.common.config import RECIPE
from hf_erasure.fitting.gradiend.adapter import GradiendAdapter
from hf_erasure.fitting.gradiend.gradients import EncodedValues, joint_metrics
from hf_erasure.fitting.gradiend.pairs import PairSet, usable_rows
from hf_erasure.fitting.gradiend.selection import Point, Selection, goal_by_name
from hf_erasure.fitting.gradiend.trainer import GradiendTrainer
from hf_erasure.fitting.gradiend.training import GradiendTrainingArguments
from hf_erasure.fitting.processes import Processes
from hf_erasure.fitting.report import figures
from hf_erasure.models.heads import head_named
from hf_erasure.models.neutral import neutral_batches
from hf_erasure.models.slots import collate
from hf_erasure.models.word_tokens import SLOT

from .gradiend_recipe import TASKS, GradiendRecipe, load_materials, read_gradiend_recipe
from .run import (
    check_start,
    difference,
    finished_run,
    load_base,
    load_rows,
    naming_the_model,
    refuse_empty,
    table_of,
    write_run,
)

ADAPTER_NAME = "feature"
EDITS_FILE, GRID_FILE = "results.csv", "grid.csv"
HISTOGRAM_FILE, SURFACE_FILE = "encoded.png", "surface.png"
NO_EDIT = "none"
# Colours of the figures: for the first class, the second, and neutral texts.
_COLOURS = ("#b3541e", "#1f5f8b", "#7a7a7a")
_DOTS_PER_INCH = 120


class GradiendRun:
    """A recipe's model, data and trainer, the edits chosen on the choice data, and the measures on the test data.

    Args:
        recipe: The recipe to run.
        progress: Show progress bars.
        adapter: The folder of a fitted adapter to load; a new one is added when None.
    """

    selection: Selection  # all edits that were tried

    def __init__(self, recipe: GradiendRecipe, progress: bool = True, adapter: str | Path | None = None) -> None:
        self.recipe = recipe
        arguments: dict[str, Any] = {
            "output_dir": str(Path(recipe.output) / "training"), "save_strategy": "no", "disable_tqdm": not progress,
        } | recipe.arguments  # fmt: skip
        self.args = GradiendTrainingArguments(**arguments)  # checked before the slow steps
        self.model, self.tokenizer, self.task = load_model(recipe)
        if adapter is None:
            self.model.add_adapter(recipe.adapter(), adapter_name=ADAPTER_NAME)
        else:
            self.model.load_adapter(str(adapter), adapter_name=ADAPTER_NAME)
        self.data = load_materials(
            recipe.data,
            recipe.classes,
            lambda rows: usable_rows(rows, recipe.classes, self.tokenizer, self.task, self.model.config),
            self.task,
        )
        self.model.to(self.args.device)
        self.trainer = self.new_trainer()
        self.trainer.pairs_to_read(self.data.test)  # raises an error where a row cannot be used
        self.chosen: dict[str, Point] = {}  # goal → the edit for it
        self.tested: dict[str, Point] = {}  # goal → measures of its edit on the test data; first without an edit
        # Correlation and accuracy of the adapter's encoder by pair of classes, means first; empty without an encoder.
        self.encoding = table_of({}, "encoder")
        left_out = {f"{name} left out": count for name, count in self.data.skipped.items()}
        self.counts = self.data.counts() | left_out  # the sizes of the sets

    def new_trainer(self) -> GradiendTrainer:
        """A new trainer of the adapter in its present state."""
        return GradiendTrainer(
            self.model, self.args, train_dataset=self.data.train, eval_dataset=self.data.choice,
            neutral_dataset=self.data.neutral["choice"], processing_class=self.tokenizer, adapter_name=ADAPTER_NAME,
        )  # fmt: skip

    def select(self, goals: Sequence[str], budget: float) -> None:
        """Choose an edit for every goal on the choice data, with one scan, and steer to the edit of the first goal."""
        select = self.recipe.select
        self.selection = self.trainer.select(
            goals[0],
            budget=budget,
            feature_factors=[float(x) for x in select.feature_factors],
            learning_rates=[float(x) for x in select.learning_rates],
        )
        chosen = {goals[0]: self.selection.best} | {goal: self.selection.choose(goal).best for goal in goals[1:]}
        self.chosen = chosen | self.chosen | chosen  # the new ones first

    def encode(self) -> list[EncodedValues]:
        """Measure how the adapter's encoder reads the test data; return nothing if the adapter has no encoder."""
        if not self.trainer.config.keep_encoder:
            return []
        values = self.trainer.encode(self.data.test, self.data.neutral["test"])
        figures = joint_metrics(values)
        names = [name for name in ("cor", "acc", "cor_enc", "acc_enc") if name in figures]
        rows = {"mean of pairs": figures} if len(values) > 1 else {}
        rows |= {"/".join(part.pair): part.metrics() for part in values}
        found = {row: {name: own[name] for name in names} for row, own in rows.items()}
        self.encoding = table_of(found, "encoder")
        return values

    def test(self) -> None:
        """Measure what each chosen edit does to the test data."""
        scorer = self.trainer.scorer(self.data.test, self.data.neutral["test"])
        edits = {NO_EDIT: (self.trainer.pairs[0], 0.0, 0.0)}
        edits |= {goal: (point.pair, point.feature_factor, point.learning_rate) for goal, point in self.chosen.items()}
        self.tested = {}
        for name, (pair, factor, rate) in edits.items():
            with edited(self.model, ADAPTER_NAME, feature_factor=factor, learning_rate=rate, pair=pair):
                self.tested[name] = scorer.score(pair, factor, rate, self.tested.get(NO_EDIT))

    @property
    def edits(self) -> pd.DataFrame:
        """One row for each edit, the first without an edit: class probabilities, goals, language modelling."""
        return table_of({name: _edit_row(point) for name, point in self.tested.items()}, "edit for")

    @property
    def steered(self) -> str:
        """What the adapter is steered for, in words; it is not steered if no edit within the budget was better."""
        goal, edit = next(iter(self.chosen.items()))
        return f"steered for {goal!r}" if edit.learning_rate else f"not steered, since no edit was better for {goal!r}"

    def in_plain_words(self) -> str:
        """What the first of the chosen edits does, in a sentence."""
        goal = next(iter(self.chosen))
        before, after = self.tested[NO_EDIT], self.tested[goal]
        if not after.learning_rate:
            return f"No edit within the budget was better for {goal!r}, so the adapter has learning_rate 0: no effect."
        moved = ", ".join(f"{n} {p:.3f} → {after.probabilities[n]:.3f}" for n, p in before.probabilities.items())
        return (
            f"With the edit for {goal!r}, the mean probability of the words in test sentences goes from {moved}; "
            f"language modelling on neutral texts loses {after.cost:.1%}."
        )

    def save(self, folder: str | Path, saved: str) -> None:
        """Write the adapter, the recipe, the results, the edits and the grid; the adapter is steered for `saved`."""
        output = Path(folder)
        edit = {"goal": saved, "base": asdict(self.tested[NO_EDIT]), "best": asdict(self.tested[saved])}
        self.trainer.config.provenance[RECIPE] = self.recipe.data.origin() | {"edit": edit}
        results = {
            "encoding": self.encoding.to_dict("index"),
            "edits": self.edits.to_dict("index"),
            "chosen": {goal: asdict(point) for goal, point in self.chosen.items()},
            "saved": saved,
            "rows": self.counts,
        }
        recipe = asdict(self.recipe) | {"output": str(folder)}
        write_run(output, self.model, recipe, GradiendRecipe, results)
        self.edits.to_csv(output / EDITS_FILE)
        self.selection.to_pandas().to_csv(output / GRID_FILE, index=False)


def run_gradiend_recipe(recipe: GradiendRecipe, progress: bool = True) -> GradiendRun | None:
    """Learn the feature, choose edits on the choice data, measure on the test data, and write all to `recipe.output`.

    Several processes share the gradients. Only the main process writes and returns the run; the others return None.
    Raises `ValueError` if model, feature and data do not fit together, and `ImportError` without matplotlib.
    """
    check_start(recipe.output, recipe.adapter(), "matplotlib")
    run, output = GradiendRun(recipe, progress), Path(recipe.output)
    run.trainer.train()
    # From here on the encoder is the one in the adapter, which a user will load.
    run.trainer = run.new_trainer()
    values = run.encode()
    if not Processes().is_main:
        return None
    run.select(recipe.select.goals, recipe.select.budget)
    run.test()
    run.save(recipe.output, recipe.select.goals[0])
    if values:
        _draw_histograms(values, output / HISTOGRAM_FILE)
    _draw_grid(run.selection.to_pandas(), list(run.chosen), output / SURFACE_FILE)
    return run


def check_gradiend_output(folder: str | Path, progress: bool = True) -> tuple[GradiendRun, float]:
    """Load a finished run's adapter folder afresh and measure again.

    Returns the new run, and the largest difference of its measures from the written ones: of the encoder, of every
    edit, and of the adapter as it is loaded. Raises `ValueError` if the folder holds no finished run.
    """
    run, results = _load_finished(folder, progress)
    run.encode()
    run.test()
    # The adapter is active, not merged. Float32 weights are the same either way; half precision rounds the same sum.
    config, scorer = run.trainer.config, run.trainer.scorer(run.data.test, run.data.neutral["test"])
    pair = (config.pair[0], config.pair[1]) if config.pair else run.trainer.pairs[0]
    loaded = _edit_row(scorer.score(pair, config.feature_factor, config.learning_rate, None))
    written = results["edits"][results["saved"]] | {"cost": loaded["cost"]}  # here it is relative to itself
    drifts = [difference(run.encoding, results["encoding"]), difference(run.edits, results["edits"])]
    return run, max(*drifts, difference(table_of({"loaded": loaded}, "edit for"), {"loaded": written}))


def select_gradiend_output(
    folder: str | Path, goal: str, budget: float | None = None, progress: bool = True
) -> GradiendRun:
    """Steer a finished run's adapter to another goal, and save it.

    Raises `ValueError` if the folder holds no finished run, or the goal is not defined for its classes.
    """
    run, results = _load_finished(folder, progress, goal)
    run.encoding = table_of(results["encoding"], "encoder")
    run.select([goal], run.recipe.select.budget if budget is None else budget)
    run.test()
    run.save(folder, goal)
    return run


def encode_texts(
    folder: str | Path, source: str, split: str | None = None, progress: bool = True
) -> tuple[pd.DataFrame, int]:
    """Values of the feature neurons for the texts of a file or Hub id.

    A row with a `[FEATURE]` slot needs `factual`, the word of the slot; its counterpart and label are taken from the
    columns of pairs, or else from the recipe's words. A row without a slot is read at one of its tokens.

    Returns one row per text with a column for each pair of classes, and how many texts were read without a slot. Raises
    `ValueError` if the folder holds no finished run or no encoder, or a text cannot be read.
    """
    run, _ = _load_finished(folder, progress)
    classes = run.recipe.classes
    adapter = GradiendAdapter.of(run.model, ADAPTER_NAME)
    adapter.encoders()  # raises an error where the adapter has none
    rows = load_rows(source, split, with_texts=True)
    refuse_empty(rows, source, "text")
    has_slot = [run.task == "classification" or SLOT in text for text in rows["text"]]
    slotted, plain = ([i for i, has in enumerate(has_slot) if has == wanted] for wanted in (True, False))
    batches: dict[int, Any] = {}
    config = run.model.config
    if slotted:
        completed = run.data.completed(rows.select(slotted), classes)
        pairs = PairSet(completed, run.tokenizer, run.task, classes, config)
        batches |= {i: collate(pairs.layout, [row]) for i, row in zip(slotted, pairs.rows, strict=True)}
    if plain:
        words = run.data.words()
        made = neutral_batches(rows.select(plain), run.tokenizer, run.task, words, batch_size=1, config=config)
        batches |= dict(zip(plain, made, strict=True))
    columns: dict[str, list[Any]] = {"text": list(rows["text"])}
    columns |= {name: list(rows[name]) for name in ("factual", "label") if name in rows.column_names}
    for pair in run.trainer.pairs:
        values = [float(adapter.encode(batches[i], pair)[0]) for i in range(len(rows))]
        columns[f"{pair[0]}/{pair[1]}"] = values
    return pd.DataFrame(columns), len(plain)


def load_model(recipe: GradiendRecipe) -> tuple[Any, Any, str]:
    """The model with its head, its tokenizer, and the task.

    Raises `ValueError` if the checkpoint does not name its head, and `OSError` if it cannot be loaded.
    """
    path, task = os.path.expandvars(recipe.model), recipe.task
    loader = TASKS.get(task, "")
    if task == "auto":
        with naming_the_model(path):
            config = AutoConfig.from_pretrained(path)
        names = config.architectures or []
        # A checkpoint of pre-training has the masked head and another head.
        heads = [name.replace("ForPreTraining", "ForMaskedLM") for name in names]
        head = head_named(heads, encoder_decoder=config.is_encoder_decoder)
        if head is not None and head.task is not None:
            task, loader = head.task, head.auto_class
        else:
            raise ValueError(
                f"The checkpoint of {path} is a {' / '.join(names) or 'model of no named class'}, which does not say "
                f"what it predicts: write task: {', '.join(TASKS)}."
            )
    model, tokenizer = load_base(getattr(transformers, loader), path)
    return model.eval(), tokenizer, task


def _edit_row(point: Point) -> dict[str, Any]:
    return (
        {"pair": "/".join(point.pair), "h": point.feature_factor, "α": point.learning_rate}
        | {f"P({name})": value for name, value in point.probabilities.items()}
        | point.goals
        | {"loss": point.loss, "lms": point.lms, "cost": point.cost}
    )


def _load_finished(folder: str | Path, progress: bool, *goals: str) -> tuple[GradiendRun, dict[str, Any]]:
    """A finished run with the adapter that it has written, and its results; the goals are checked first."""
    recipe, results = finished_run(folder, read_gradiend_recipe, "hf-erasure gradiend fit")
    for goal in goals:
        goal_by_name(goal, recipe.classes)
    run = GradiendRun(recipe, progress, adapter=folder)
    run.chosen = {goal: Point(**entry | {"pair": tuple(entry["pair"])}) for goal, entry in results["chosen"].items()}
    return run, results


def _draw_histograms(parts: Sequence[EncodedValues], path: Path) -> None:
    """Encoded values as a histogram per class, neutral texts among them; one panel for each pair of classes."""
    figure = figures.Figure(layout="constrained", figsize=(4.2 * len(parts), 3.2))
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    for panel, part in zip(panels, parts, strict=True):
        limit = max(1.0, float(part.values.abs().max()))
        edges = [limit * (i / 20 - 1) for i in range(41)]
        for label, name, colour in zip((1, -1, 0), (*part.pair, "neutral"), _COLOURS, strict=True):
            values = part.values[part.labels == label].tolist()
            if values:
                panel.hist(values, bins=edges, label=f"{name} ({len(values)})", color=colour, alpha=0.6)
        found = part.metrics()
        title = ", ".join(f"{key} {found[key]:.3f}" for key in ("cor", "cor_enc") if key in found)
        # The legend is above the panel: values are at both ends of the panel.
        panel.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
        panel.set_xlabel(f"encoded value, {part.pair[0]} +1, {part.pair[1]} −1")
    panels[0].set_ylabel("texts")
    figure.savefig(path, dpi=_DOTS_PER_INCH)


def _draw_grid(grid: pd.DataFrame, goals: Sequence[str], path: Path) -> None:
    """Goals and language modelling over feature factor and learning rate; a row of panels for each pair of classes."""
    points = grid.iloc[1:]  # the first row is the model without an edit
    pairs = list(dict.fromkeys(points["pair"]))
    columns = [*dict.fromkeys(goals), "cost"]
    figure = figures.Figure(layout="constrained", figsize=(4.2 * len(columns), 0.6 + 3.4 * len(pairs)))
    panels = figure.subplots(len(pairs), len(columns), squeeze=False)
    for row, pair in zip(panels, pairs, strict=True):
        for panel, column in zip(row, columns, strict=True):
            # Above a cost of 0.1, language modelling is lost; a wider scale would hide the smaller costs.
            limits = {"vmin": -0.1, "vmax": 0.1, "cmap": "RdBu_r"} if column == "cost" else {"cmap": "viridis"}
            table = points[points["pair"] == pair].pivot(index="feature_factor", columns="learning_rate", values=column)
            image = panel.imshow(table.to_numpy(), aspect="auto", origin="lower", **limits)
            for axis, labels in ((panel.xaxis, table.columns), (panel.yaxis, table.index)):
                axis.set_ticks(range(len(labels)), [f"{label:g}" for label in labels], fontsize=6)
            panel.tick_params("x", rotation=90)
            panel.set_title(f"{column}, neuron {pair}", fontsize=9)
            figure.colorbar(image, ax=panel)
        row[0].set_ylabel("feature factor h")
    for panel in panels[-1]:
        panel.set_xlabel("learning rate α")
    figure.savefig(path, dpi=_DOTS_PER_INCH)
