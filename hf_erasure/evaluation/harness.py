"""lm-evaluation-harness on a causal model with its adapters: the model itself is handed over, nothing is copied."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from .measures import Subject


def require_harness() -> None:
    """Raise where the harness is not installed.

    Raises:
        ImportError: Says what to install.
    """
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

    Args:
        subject: A causal language model.
        tasks: Names of tasks.
        task_folder: Where further task definitions are.
        batch_size: Rows a forward.

    Raises:
        ValueError: If the model is not causal, a task is not known, or its data cannot be had.
    """
    if subject.head != "causal":
        raise ValueError(f"{type(subject.model).__name__} is no causal language model, which the harness needs")
    manager = import_module("lm_eval.tasks").TaskManager(include_path=task_folder)
    if unknown := [task for task in tasks if task not in manager.all_tasks]:
        raise ValueError(f"--harness {unknown[0]}: lm-evaluation-harness has no such task.")
    seed = subject.shared.seed
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
