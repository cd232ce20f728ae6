"""One run: the base, each adapter and all together, on the same data with the same seeds, and the harness for each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from hf_erasure._version import __version__
from hf_erasure.adapters import GradiendConfig
from hf_erasure.fitting.report import concept_of_config
from hf_erasure.metrics.benchmarks import CAUSAL_CONVENTIONS
from hf_erasure.models.scorer import FINAL
from hf_erasure.recipes.run import refuse_unwritable, require

from .data import DataFolder, MissingData
from .loading import BASE, AdapterDoesNotAct, Entry, Loader, entries_of, fingerprints, read_adapters
from .measures import Measure, leakage_by_depth, measures_of
from .pictures import neuron_values, plane_of, pronoun_shares
from .results import Results, reason_of
from .subject import Evaluation, Subject

Progress = Callable[[str], None]
T = TypeVar("T")
# Rows in a batch of lm-evaluation-harness.
_HARNESS_ROWS = 8


def evaluate(plan: Evaluation, progress: Progress = lambda _: None, output: str | Path | None = None) -> Results:
    """Measure the base, each adapter, and all adapters together.

    Every entry is a model loaded anew, so that no state of one entry is left in another. If a measure or a picture
    raises an error, it is "not measured", with the reason, and the evaluation continues with the next.

    Args:
        plan: What to evaluate.
        progress: A function that is called with what is measured next.
        output: A folder where `results.json` is written after each measure, so that a run that is killed keeps its
            results; their `about` then has `finished` false.

    Raises:
        AdapterDoesNotAct: If an adapter does not change the model.
        MissingData: If the folder of data does not exist, or no bias of the suite can be measured with it.
        ValueError: If a folder holds no adapter, or an adapter does not fit the model.
        ImportError: If the harness is asked for and not installed.
    """
    for option, value, least in (("limit", plan.limit, 1), ("resamples", plan.resamples, 2)):
        if value is not None and value < least:
            raise ValueError(f"--{option} {value}: write at least {least}.")
    if output is not None:
        refuse_unwritable(output)
    if plan.stereoset not in CAUSAL_CONVENTIONS:
        raise ValueError(f"--stereoset {plan.stereoset}: write {' or '.join(CAUSAL_CONVENTIONS)}.")
    data = DataFolder(plan.data, plan.limit)
    if plan.harness:
        require("lm_eval")
    return _Run(plan, data, progress, None if output is None else Path(output)).run()


class _Run:
    def __init__(self, plan: Evaluation, data: DataFolder, progress: Progress, output: Path | None) -> None:
        self.plan, self.progress, self.output = plan, progress, output
        self.adapters = read_adapters([str(folder) for folder in plan.adapters])
        self.entries = entries_of(self.adapters, plan.strengths)
        # Texts are probed by the pools that erasures were fitted for. For the pool "tokens", and without an erasure,
        # it is the mean, since a text needs one vector.
        fitted = ("mean" if pool == "tokens" else pool for adapter in self.adapters for pool in adapter.pools)
        self.pools = tuple(dict.fromkeys(fitted)) or ("mean",)
        self.measures = measures_of(plan.suite, data, self.pools)
        self.loader = Loader(plan.model, self.adapters)
        self.data, self.base_states = data, list[Tensor]()
        self.points: Callable[[Tensor], list[dict[str, Any]]] | None = None  # states → points in the base's plane
        self.results = Results({
            "hf_erasure": __version__, "model": plan.model, "data": str(plan.data), "suite": plan.suite,
            "limit": plan.limit, "seed": plan.seed, "resamples": plan.resamples, "confidence": plan.confidence,
            "note": self.loader.note, "pools": list(self.pools), "class": "", "predicts": None, "finished": False,
        })  # fmt: skip
        self.harness_measures: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, dict[str, str]] = {}
        self.too_few = False

    def run(self) -> Results:
        for entry in self.entries:  # all of them first, because an adapter that does not act need not be measured
            self._verify(entry)
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
        for entry in self.entries:
            self.results.values[entry.name] = {}
            model = self._run_or_record("Every measure", entry, functools.partial(self.loader.load, entry))
            if model is None:
                continue
            given = self.plan, self.data, self.base_states
            subject = Subject(model, self.loader.tokenizer, *given, entry.name == BASE, self.pools[0])
            if subject.is_base:
                self.results.about |= {"class": type(model).__name__, "predicts": subject.head}
                found = self._run_or_record(
                    "Fingerprints", entry, functools.partial(fingerprints, model, self.adapters)
                )
                self.results.fingerprints = found or {}
            for title, compute in self._steps(entry, subject):
                self.progress(f"{entry.name}: {title}")
                self._run_or_record(title, entry, compute)
        own = {measure.key for measure in self.measures if measure.purpose == "bias"}
        tried = self.plan.limit is not None and self.too_few  # a first look at a few items; some measures need more
        if not tried and not any(own & set(values) for values in self.results.values.values()):
            lines = "; ".join(self.results.notes())
            raise MissingData(f"Nothing of the suite {self.plan.suite!r} can be measured: {lines}.")
        self.results.about["finished"] = True
        self._update_results()
        return self.results

    def _verify(self, entry: Entry) -> None:
        """Check that the adapters of an entry act, and describe the entry in the results."""
        said: dict[str, str] = {}
        if entry.adapters:
            self.progress(f"verify {entry.name}")
            model = self.loader.load(entry)
            for adapter in entry.adapters:
                acts, said[adapter.name] = adapter.acts(model)
                if not acts and not self.plan.allow_inactive:
                    raise AdapterDoesNotAct(
                        f"{said[adapter.name]} Its numbers would be those of the base. (--allow-inactive measures it "
                        "nevertheless.)"
                    )
        kinds = ", ".join(adapter.kind for adapter in entry.adapters)
        names = [adapter.name for adapter in entry.adapters]
        concepts = [concept_of_config(adapter.config) for adapter in entry.adapters]
        self.results.entries.append(
            {"name": entry.name, "adapters": names, "concepts": concepts, "kind": kinds, "strength": entry.strength,
             "verified": said}
        )  # fmt: skip

    def _steps(self, entry: Entry, subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
        """For an entry the name of each result and a function that takes it: measures, drawings, and the harness."""
        name, suite = entry.name, self.plan.suite
        for measure in self.measures:
            yield measure.title, functools.partial(self._add_measure, measure, name, subject)
        for concept in ("gender", "pos"):
            if suite in (concept, "all"):
                yield f"Leakage of {concept} by depth", functools.partial(self._add_depth, concept, name, subject)
        if suite in ("gender", "all"):
            yield "Embeddings in two dimensions", functools.partial(self._add_embedding, name, subject)
            yield "Probability shifts", lambda: self.results.shifts.update({name: pronoun_shares(subject)})
        if len(entry.adapters) == 1 and entry.strength == 1 and isinstance(entry.adapters[0].config, GradiendConfig):
            read = functools.partial(neuron_values, subject, entry.adapters[0])
            yield "Feature neuron", lambda: self.results.neurons.update({name: read()})
        if self.plan.harness:
            yield "lm-evaluation-harness", functools.partial(self._add_harness, name, subject)

    def _add_measure(self, measure: Measure, name: str, subject: Subject) -> None:
        if measure.needs_head:
            subject.require_head()
        subject = subject.with_pool(measure.pool)
        if measure.compute not in subject.results:
            subject.results[measure.compute] = measure.compute(subject)
        found = subject.results[measure.compute]
        value = found[measure.figure]
        if value is None or not math.isfinite(value):
            raise ValueError(f"{measure.figure} has no value on these items")
        interval = found.get("intervals", {}).get(measure.figure)
        self.results.values[name][measure.key] = {"value": float(value), "interval": interval, "details": found}

    def _add_depth(self, concept: str, name: str, subject: Subject) -> None:
        self.results.depth.setdefault(concept, {})[name] = leakage_by_depth(subject, concept)

    def _add_embedding(self, name: str, subject: Subject) -> None:
        if self.points is None and not subject.is_base:
            raise ValueError("the plane is fitted on the base, whose biographies could not be drawn")
        self.points = self.points or plane_of(subject.states[FINAL], subject.biographies.genders)
        self.results.embedding[name] = self.points(subject.states[FINAL])

    def _add_harness(self, name: str, subject: Subject) -> None:
        for figure, cell in run_harness(subject, list(self.plan.harness), self.plan.harness_tasks).items():
            key, better = f"harness.{figure}", cell.pop("better")
            self.harness_measures.setdefault(key, {
                "key": key, "title": f"harness: {figure}", "purpose": "capability", "figure": figure, "better": better,
                "says": "as lm-evaluation-harness reports it", "source": "",
                "ideal": 0.0 if better == "lower" else None,
            })  # fmt: skip
            self.results.values[name][key] = cell | {"details": {}}

    def _run_or_record(self, title: str, entry: Entry, compute: Callable[[], T]) -> T | None:
        """Take one cell; an error becomes the reason why the cell is missing, and the other cells are still taken."""
        found = None
        try:
            found = compute()
        except Exception as error:
            reason, refused = reason_of(error), type(error) is ValueError
            if refused and self.plan.limit is not None and "raise --limit" not in reason:
                reason = f"{reason.rstrip('.')}. With --limit {self.plan.limit} there may be too few items: raise it"
            self.reasons.setdefault(title, {})[entry.name] = reason
            self.too_few |= refused
        self._update_results()
        return found

    def _update_results(self) -> None:
        """Bring the lists of the results up to date, and write them."""
        results = self.results
        cells = [cell for values in results.values.values() for cell in values.values()]
        keys = {key for values in results.values.values() for key in values}
        results.measures = [m.described() for m in self.measures if m.key in keys] + [*self.harness_measures.values()]
        left_out = {name: asdict(rows) for name, rows in self.data.left_out.items()}
        for cell in cells:
            left_out |= {rows["file"]: rows for rows in cell["details"].get("bad_rows", [])}
        results.left_out = list(left_out.values())
        results.not_measured = []
        for title, by_entry in self.reasons.items():
            # One line for a reason that all entries share.
            same = len(set(by_entry.values())) == 1 and len(by_entry) == len(self.entries)
            for name, reason in list(by_entry.items())[: 1 if same else None]:
                results.not_measured.append({"measure": title, "entry": None if same else name, "reason": reason})
        if self.output is not None:
            results.save(self.output)


def run_harness(subject: Subject, tasks: list[str], task_folder: str | None = None) -> dict[str, dict[str, Any]]:
    """The harness's figures of some tasks, `"task.metric"` → value, interval and direction.

    The model itself is passed on with its adapters; nothing is copied. Further tasks are defined in `task_folder`.
    Raises `ValueError` if the model is not causal, a task is not known, or its data cannot be loaded.
    """
    if subject.head != "causal":
        raise ValueError(f"{type(subject.model).__name__} is not a causal language model, which the harness needs")
    manager = import_module("lm_eval.tasks").TaskManager(include_path=task_folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"--harness {unknown[0]}: lm-evaluation-harness has no such task.")
    seed = subject.plan.seed
    model = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=_HARNESS_ROWS
    )
    found = import_module("lm_eval").simple_evaluate(
        model=model, tasks=tasks, task_manager=manager, limit=subject.data.limit, bootstrap_iters=0,
        random_seed=seed, numpy_random_seed=seed, torch_random_seed=seed, fewshot_random_seed=seed,
    )  # fmt: skip
    figures = {}
    for task, scores in found["results"].items():
        higher = found.get("higher_is_better", {}).get(task, {})
        for name, value in scores.items():
            metric, _, _ = name.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = scores.get(name.replace(metric, f"{metric}_stderr", 1))
            # The harness gives a standard error; 1.96 of them are 95 % of a normal distribution.
            spread = [value - 1.96 * error, value + 1.96 * error] if isinstance(error, float) else None
            better = "lower" if higher.get(metric) is False else "higher"
            figures[f"{task}.{metric}"] = {"value": value, "interval": spread, "better": better}
    return figures
