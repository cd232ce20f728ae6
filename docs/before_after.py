"""python docs/before_after.py [RUN] [FIGURE]

Draw README's figure: what a linear probe reads at each layer before and after, of the results of `hf-erasure fit`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
# Read on white and on dark pages alike.
GREY, BEFORE, AFTER, KEPT = "#808080", "#c0561f", "#2f7fb8", "#6a9a3c"


def draw(results: Path, path: Path) -> None:
    """Draw the results of a run with `gender` erased and `field` kept."""
    table = json.loads(results.read_text(encoding="utf-8"))
    rows = list(table.values())[:-1]  # without last_hidden_state, which is the last norm
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    for key, label, colour, style in (
        ("gender before", "gender, before", BEFORE, "o-"),
        ("gender after", "gender, after", AFTER, "s-"),
        ("gender refitted", "gender, after, by a new probe\non the same templates", AFTER, "v:"),
        ("gender refitted by group", "gender, after, by a new probe\non other templates", AFTER, "^:"),
        ("field before", "occupation's field, before", KEPT, "o:"),
        ("field after", "occupation's field, after", KEPT, "s-"),
    ):
        if key not in rows[0]:
            continue  # a run without groups
        axes.plot(range(1, len(rows) + 1), [row[key] for row in rows], style, color=colour, label=label, markersize=4)
    axes.axhline(rows[0]["gender majority"], color=GREY, linewidth=0.8, linestyle="--")
    axes.set(ylim=(0, 1.02), xlabel="norm, in the order of the layers", ylabel="accuracy of a probe")
    axes.xaxis.label.set_color(GREY)
    axes.yaxis.label.set_color(GREY)
    axes.tick_params(colors=GREY)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    axes.legend(frameon=False, labelcolor=GREY, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    run = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "recipes" / "minilm-gender"
    draw(run / "results.json", Path(sys.argv[2]) if len(sys.argv) > 2 else ROOT / "docs" / "before-after.svg")
