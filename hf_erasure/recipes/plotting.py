"""Figures of a feature neuron and of the choice of an edit; they need matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_erasure.fitting.gradiend.adapter import EncodedValues

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


_COLOURS = ("#b3541e", "#1f5f8b", "#7a7a7a")


def histogram(parts: Sequence[EncodedValues], path: str | Path | None = None) -> Figure:
    """Encoded values as a histogram per class, neutral texts among them; one panel a pair of classes.

    Args:
        parts: Of `GradiendTrainer.encode`.
        path: Where to write the figure as well.

    Raises:
        ImportError: Without matplotlib.
    """
    figure = _figure(figsize=(4.2 * len(parts), 3.2))
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
        # Above the panel: values stand at both of its ends.
        panel.legend(title=title, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
        panel.set_xlabel(f"encoded value, {part.pair[0]} +1, {part.pair[1]} −1")
    panels[0].set_ylabel("texts")
    return _written(figure, path)


def surface(grid: pd.DataFrame, goals: Sequence[str], path: str | Path | None = None) -> Figure:
    """Goals over feature factor and learning rate; one row of panels a pair of classes, one column a goal.

    Args:
        grid: `Selection.to_pandas()`; its first row is the model without an edit.
        goals: Which goals; language modelling is drawn beside them.
        path: Where to write the figure as well.

    Raises:
        ImportError: Without matplotlib.
    """
    points = grid.iloc[1:]
    pairs = list(dict.fromkeys(points["pair"]))
    columns = [*dict.fromkeys(goals), "cost"]
    figure = _figure(figsize=(4.2 * len(columns), 0.6 + 3.4 * len(pairs)))
    panels = figure.subplots(len(pairs), len(columns), squeeze=False)
    for row, pair in zip(panels, pairs, strict=True):
        for panel, column in zip(row, columns, strict=True):
            # Above a tenth, language modelling is lost, and only how far would be seen.
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
    return _written(figure, path)


def require_plotting() -> None:
    """Raise where figures cannot be drawn.

    Raises:
        ImportError: Without matplotlib; names the extra that brings it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("The figures need matplotlib: pip install 'hf-erasure[plot]'") from error


def _figure(**options: Any) -> Figure:
    require_plotting()
    from matplotlib.figure import Figure

    return Figure(layout="constrained", **options)


def _written(figure: Figure, path: str | Path | None) -> Figure:
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
