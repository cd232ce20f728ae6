"""One run: the base, each adapter and all together, on the same data with the same seeds, and the harness on each."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from hf_erasure._version import __version__
from hf_erasure.adapters import GradiendConfig
from hf_erasure.fitting.report import concept_of_config
from hf_erasure.metrics.benchmarks import CAUSAL_CONVENTIONS

from .data import DataFolder, MissingData
from .loading import BASE, Entry, Loader, entries_of, fingerprints, pools_of, read_adapters, verified
from .measures import Measure, leakage_by_depth, measures_of
from .pictures import Plane, embedding, neuron_values, pronoun_shares
from .results import Results, reason_of
from .subject import Evaluation, Shared, Subject

Progress = Callable[[str], None]
T = TypeVar("T")


def evaluate(plan: Evaluation, progress: Progress = lambda _: None, output: str | Path | None = None) -> Results:
    """Measure the base, each adapter, and all adapters together.

    Every entry is a model loaded anew, so that nothing of one is left in another. Every measure and every picture
    stands alone: whatever one raises, it is "not measured", with the reason, and the others go on.

    Args:
        plan: What to evaluate.
        progress: Is told what is measured next.
        output: A folder where `results.json` is written whenever something was measured, so that a run that is killed
            leaves what it had; its `about` then has `finished` false.

    Raises:
        AdapterDoesNotAct: If an adapter leaves the model as it is.
        MissingData: If there is no folder of data, or nothing of the suite can be measured with it.
        ValueError: If a folder holds no adapter, or an adapter does not fit the model.
        ImportError: If the harness is asked for and not installed.
    """
    if plan.limit is not None and plan.limit < 1:
        raise ValueError(f"--limit {plan.limit}: write at least 1.")
    if plan.stereoset not in CAUSAL_CONVENTIONS:
        raise ValueError(f"--stereoset {plan.stereoset}: write {' or '.join(CAUSAL_CONVENTIONS)}.")
    data = DataFolder(plan.data, plan.limit)
    if plan.harness:
        require_harness()
    return _Run(plan, data, progress, None if output is None else Path(output)).run()


class _Run:
    def __init__(self, plan: Evaluation, data: DataFolder, progress: Progress, output: Path | None) -> None:
        self.plan, self.progress, self.output = plan, progress, output
        self.adapters = read_adapters([str(folder) for folder in plan.adapters])
        self.entries = entries_of(self.adapters, plan.strengths)
        self.pools = pools_of(self.adapters)
        self.measures = measures_of(plan.suite, data, self.pools)
        self.loader = Loader(plan.model, self.adapters)
        self.shared = Shared(plan, data)
        self.plane: Plane | None = None
        self.results = Results(self._about())
        self.harness_measures: dict[str, dict[str, Any]] = {}
        self.reasons: dict[str, dict[str, str]] = {}
        self.too_few = False

    def run(self) -> Results:
        self._verify()
        if self.output is not None:
            self.output.mkdir(parents=True, exist_ok=True)
        for entry in self.entries:
            self.results.values[entry.name] = {}
            subject = self._load(entry)
            if subject is not None:
                for measure in self.measures:
                    self.progress(f"{entry.name}: {measure.title}")
                    self._try(measure.title, entry, functools.partial(self._take, measure, entry, subject))
                self._draw(entry, subject)
                if self.plan.harness:
                    self.progress(f"{entry.name}: lm-evaluation-harness")
                    self._try("lm-evaluation-harness", entry, functools.partial(self._take_harness, entry, subject))
        own = {measure.key for measure in self.measures if measure.purpose == "bias"}
        tried = self.plan.limit is not None and self.too_few  # a first look at a few items, and some measures need more
        if not tried and not any(own & set(values) for values in self.results.values.values()):
            lines = "; ".join(self.results.notes())
            raise MissingData(f"Nothing of the suite {self.plan.suite!r} can be measured: {lines}.")
        self.results.about["finished"] = True
        self._keep()
        return self.results

    def _about(self) -> dict[str, Any]:
        plan = self.plan
        return {
            "hf_erasure": __version__, "model": plan.model, "data": str(plan.data), "suite": plan.suite,
            "limit": plan.limit, "seed": plan.seed, "resamples": plan.resamples, "confidence": plan.confidence,
            "note": self.loader.note, "pools": list(self.pools), "class": "", "predicts": None, "finished": False,
        }  # fmt: skip

    def _verify(self) -> None:
        """First of all, since what does not act needs no measuring."""
        for entry in self.entries:
            said: dict[str, str] = {}
            if entry.adapters:
                self.progress(f"verify {entry.name}")
                said = verified(self.loader.load(entry), entry, allow_inactive=self.plan.allow_inactive)
            kinds = ", ".join(adapter.kind for adapter in entry.adapters)
            names = [adapter.name for adapter in entry.adapters]
            concepts = [concept_of_config(adapter.config) for adapter in entry.adapters]
            self.results.entries.append(
                {"name": entry.name, "adapters": names, "concepts": concepts, "kind": kinds,
                 "strength": entry.strength, "of_tokens": [a.name for a in entry.adapters if "tokens" in a.pools],
                 "verified": said}
            )  # fmt: skip

    def _load(self, entry: Entry) -> Subject | None:
        """The model of an entry; None where it cannot be loaded, and then nothing of the entry is measured."""
        model = self._try("Every measure", entry, functools.partial(self.loader.load, entry))
        if model is None:
            return None
        subject = Subject(model, self.loader.tokenizer, self.shared, entry.name == BASE, self.pools[0])
        if subject.is_base:
            self.results.about |= {"class": type(model).__name__, "predicts": subject.head}
            found = self._try("Fingerprints", entry, functools.partial(fingerprints, model, self.adapters))
            self.results.fingerprints = found or {}
        return subject

    def _take(self, measure: Measure, entry: Entry, subject: Subject) -> None:
        if measure.needs_head:
            subject.require_head()
        found = measure.take(subject.at(measure.pool))
        value = found[measure.figure]
        if value is None or not math.isfinite(value):
            raise ValueError(f"{measure.figure} has no value on these items")
        interval = found.get("intervals", {}).get(measure.figure)
        self.results.values[entry.name][measure.key] = {"value": float(value), "interval": interval, "details": found}

    def _draw(self, entry: Entry, subject: Subject) -> None:
        name, results = entry.name, self.results

        def embed() -> None:
            if self.plane is None and not subject.is_base:
                raise ValueError("the plane is that of the base, whose biographies could not be drawn")
            self.plane, results.embedding[name] = embedding(subject, self.plane)

        def depth(concept: str) -> None:
            results.depth.setdefault(concept, {})[name] = leakage_by_depth(subject, concept)

        for concept in ("gender", "pos"):
            if self.plan.suite in (concept, "all"):
                self.progress(f"{name}: leakage of {concept} by depth")
                self._try(f"Leakage of {concept} by depth", entry, functools.partial(depth, concept))
        if self.plan.suite in ("gender", "all"):
            self._try("Embeddings in two dimensions", entry, embed)
            self._try("Probability shifts", entry, lambda: results.shifts.update({name: pronoun_shares(subject)}))
        if len(entry.adapters) == 1 and entry.strength == 1 and isinstance(entry.adapters[0].config, GradiendConfig):
            self.progress(f"{name}: feature neuron")
            read = functools.partial(neuron_values, subject, entry.adapters[0])
            self._try("Feature neuron", entry, lambda: results.neurons.update({name: read()}))

    def _take_harness(self, entry: Entry, subject: Subject) -> None:
        found = run_harness(subject, list(self.plan.harness), task_folder=self.plan.harness_tasks)
        for name, cell in found.items():
            key, better = f"harness.{name}", cell["better"]
            self.harness_measures.setdefault(key, {
                "key": key, "title": f"harness: {name}", "purpose": "capability", "figure": name, "better": better,
                "says": "as lm-evaluation-harness reports it", "source": "",
                "ideal": 0.0 if better == "lower" else None,
            })  # fmt: skip
            figures = {"value": cell["value"], "interval": cell["interval"], "details": {}}
            self.results.values[entry.name][key] = figures

    def _try(self, what: str, entry: Entry, take: Callable[[], T]) -> T | None:
        """Take one cell; whatever it raises is its reason for not being there, and no other cell's concern."""
        found = None
        try:
            found = take()
        except Exception as error:
            reason, refused = reason_of(error), type(error) is ValueError
            if refused and self.plan.limit is not None and "raise --limit" not in reason:
                reason = f"{reason.rstrip('.')}. With --limit {self.plan.limit} there may be too few items: raise it"
            self.reasons.setdefault(what, {})[entry.name] = reason
            self.too_few |= refused
        self._keep()
        return found

    def _keep(self) -> None:
        """Bring the lists of the results up to date, and write them."""
        results = self.results
        cells = [cell for values in results.values.values() for cell in values.values()]
        taken = {key for values in results.values.values() for key in values}
        results.measures = [m.described() for m in self.measures if m.key in taken] + [*self.harness_measures.values()]
        left_out = {name: asdict(rows) for name, rows in self.shared.data.left_out.items()}
        for cell in cells:
            left_out |= {rows["file"]: rows for rows in cell["details"].get("bad_rows", [])}
        results.left_out = list(left_out.values())
        results.not_measured = []
        for what, by_entry in self.reasons.items():
            # One line for a reason that all entries share.
            same = len(set(by_entry.values())) == 1 and len(by_entry) == len(self.entries)
            for name, reason in list(by_entry.items())[: 1 if same else None]:
                results.not_measured.append({"measure": what, "entry": None if same else name, "reason": reason})
        if self.output is not None:
            results.save(self.output)


# ---- lm-evaluation-harness -------------------------------------------------------------------------------------------


def require_harness() -> None:
    """Raise an `ImportError` that says what to install, where the harness is not."""
    try:
        import_module("lm_eval.models.huggingface")
    except ImportError as error:
        raise ImportError(
            f"--harness needs lm-evaluation-harness ({error}): pip install 'hf-erasure[harness]'"
        ) from error


def run_harness(
    subject: Subject, tasks: list[str], *, task_folder: str | None = None, batch_size: int = 8
) -> dict[str, dict[str, Any]]:
    """The harness's figures of some tasks, `"task.metric"` → value, interval and direction.

    The model itself is handed over, adapters and all; nothing is copied. Further tasks are defined in `task_folder`.

    Raises:
        ValueError: If the model is not causal, a task is not known, or its data cannot be had.
    """
    if subject.head != "causal":
        raise ValueError(f"{type(subject.model).__name__} is not a causal language model, which the harness needs")
    manager = import_module("lm_eval.tasks").TaskManager(include_path=task_folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"--harness {unknown[0]}: lm-evaluation-harness has no such task.")
    seed = subject.shared.plan.seed
    model = import_module("lm_eval.models.huggingface").HFLM(
        pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=batch_size
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
