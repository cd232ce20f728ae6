"""What a linear probe reads from each layer, with the adapter and without it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_erasure.adapters import ConceptErasureConfig, erasure_layers
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.erasers import apply_erasure
from hf_erasure.fitting.labels import BatchLabels, Source
from hf_erasure.fitting.processes import Processes
from hf_erasure.fitting.sites import bar, observed, observed_final
from hf_erasure.models import pooled
from hf_erasure.models.model import Runner, evaluating

if TYPE_CHECKING:
    import pandas as pd


def pooled_states(
    model: nn.Module,
    batches: Iterable[Any],
    adapter_name: str,
    *,
    erased: bool,
    pool: str = "mean",
    progress: bool = True,
) -> dict[str, Tensor]:
    """One vector a sequence from every site of an adapter and from the last hidden states.

    Args:
        model: A model with the adapter.
        batches: Dicts of model inputs.
        adapter_name: The adapter whose sites are looked at.
        erased: With the adapter, or without it.
        pool: `"mean"` over real positions, `"cls"` or `"last"`.
        progress: Show a progress bar.

    Returns:
        Site → `(sequences, width)`, float32.

    Raises:
        ValueError: If there are no batches.
    """
    layers = erasure_layers(adapter_of(model, adapter_name, ConceptErasureConfig).owner, adapter_name)
    runner = Runner(model, layers.values())
    found: dict[str, list[Tensor]] = {}
    current: list[BatchLabels] = []

    def keep(site: str, activation: Tensor, where: str) -> None:
        aligned, selection = current[0].select(activation, where)
        found.setdefault(site, []).append(pooled(aligned.float(), selection.real, pool).cpu())

    def at_site(site: str, hidden: Tensor) -> Tensor:
        if erased:
            hidden = apply_erasure(hidden, *layers[site].parts_on(adapter_name, hidden.device))
        keep(site, hidden, site)
        return hidden

    def at_end(name: str, state: Tensor) -> Tensor:
        keep(name, state, runner.side_of(name))
        return state

    examples = 0
    what = f"reading {'with' if erased else 'without'} {adapter_name}"
    looking = observed(layers, adapter_name, at_site), observed_final(runner.final_states(), at_end)
    with evaluating(runner.model), looking[0], looking[1], bar(what, progress, Processes()) as shown:
        for labels in Source("states", "batches", batches).read("tokens"):
            current[:] = [labels]
            runner(labels.batch)
            shown.update(labels.rows)
            examples += labels.rows
    if not examples:
        raise ValueError("There are no batches to read states from.")
    return {site: torch.cat(parts) for site, parts in found.items()}


def probe_accuracy(train_x: Tensor, train_y: list[str], test_x: Tensor, test_y: list[str]) -> float:
    """Accuracy on the test rows of a logistic regression fitted on the training rows, standardised.

    Raises:
        ImportError: Without scikit-learn.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise ImportError("Probing needs scikit-learn: pip install 'hf-erasure[demo]'") from error
    probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, tol=1e-3))
    probe.fit(train_x.double().numpy(), train_y)
    return float(probe.score(test_x.double().numpy(), test_y))


def refitted_accuracy(x: Tensor, y: list[str]) -> float:
    """Accuracy of probes fitted on one half of the rows and judged on the other, mean of both ways."""
    half = torch.randperm(len(y), generator=torch.Generator().manual_seed(0)) % 2 == 0
    scores = []
    for chosen in (half, ~half):
        fitted, judged = chosen.nonzero().flatten().tolist(), (~chosen).nonzero().flatten().tolist()
        scores.append(probe_accuracy(x[fitted], [y[i] for i in fitted], x[judged], [y[i] for i in judged]))
    return sum(scores) / 2


def majority(labels: list[str]) -> float:
    """The accuracy of always answering with the most frequent label."""
    return max(labels.count(label) for label in set(labels)) / len(labels)


def probe_table(
    states: dict[tuple[str, bool], dict[str, Tensor]],
    labels: dict[str, dict[str, list[str]]],
    concept: str,
    kept: str | None,
) -> pd.DataFrame:
    """Probe accuracy by layer, before and after, on the test split.

    A probe is fitted anew on the erased training states. Where those are what the erasure was fitted on, the theorem
    says that it learns nothing. The column "refitted" asks more: how well a probe does that is fitted on one half of
    the erased test rows, whose cues the erasure has not seen, and judged on the other.

    Args:
        states: (`"train"` or `"test"`, with the adapter) → site → `(rows, width)`.
        labels: `"train"` or `"test"` → column → labels.
        concept: The column that was erased.
        kept: A column that should stay readable, if any.

    Returns:
        One row a site; accuracies, majorities, and the mean cosine between test states without and with the adapter.
    """
    import pandas as pd

    rows = []
    for site in states["train", False]:
        row: dict[str, Any] = {"layer": site}
        for column in (concept, kept) if kept else (concept,):
            for erased, when in ((False, "before"), (True, "after")):
                row[f"{column} {when}"] = probe_accuracy(
                    states["train", erased][site], labels["train"][column],
                    states["test", erased][site], labels["test"][column],
                )  # fmt: skip
            row[f"{column} majority"] = majority(labels["test"][column])
        row[f"{concept} refitted"] = refitted_accuracy(states["test", True][site], labels["test"][concept])
        old, new = states["test", False][site], states["test", True][site]
        row["cosine"] = float(nn.functional.cosine_similarity(old, new, dim=-1).mean())
        rows.append(row)
    return pd.DataFrame(rows).set_index("layer")
