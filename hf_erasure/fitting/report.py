"""The report of a fit, site by site; and functions that tell what a figure is about and whether it became better."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from hf_erasure.adapters.common.config import number_of
from hf_erasure.erasers import expected_accuracy
from hf_erasure.models.model import LazyModule, pandas
from hf_erasure.models.pooling import IN_WORDS

if TYPE_CHECKING:
    from matplotlib import figure as figures
else:
    figures = LazyModule("matplotlib.figure", "plot")

# What an eraser leaves at a visit counts as rounding up to this share of |x| |z|: float32 activations that went through
# several blocks differ by about this share of their size.
SETTLED = 1e-5
# Colours of the lines and bars of pictures.
BEFORE, AFTER = "#b3541e", "#1f5f8b"
_COLUMNS = ("site", "rank", "rows", "before", "after", "moved", "moved elsewhere")
GENDER, POS, STEREOTYPES = "gender", "part of speech", "stereotypes"

FEMALE = {"female", "f", "fem", "feminine", "woman", "women", "girl", "girls", "she"}
MALE = {"male", "m", "masc", "masculine", "man", "men", "boy", "boys", "he"}
_OTHERS = {"neutral", "nonbinary", "non-binary", "diverse", "other", "unknown", "they"}
# The universal parts of speech.
_UPOS = {"adj", "adp", "adv", "aux", "cconj", "det", "intj", "noun", "num", "part", "pron", "propn", "punct", "sconj"}
_UPOS |= {"sym", "verb", "x"}
_NAMES = {
    GENDER: {"gender", "genders", "sex", "pronoun", "pronouns"},
    POS: {"pos", "upos", "part of speech", "parts of speech", "word class", "word classes"},
    STEREOTYPES: {"stereotype", "stereotypes"},
}


@dataclass(frozen=True)
class SiteReport:
    """One line of the report.

    Attributes:
        site: The module's name, or `last_hidden_state` (`encoder_last_hidden_state`), where nothing is erased but
            which everything downstream reads.
        visit: The call of the module in one forward pass that this line is about, from 1; None for all calls. Where
            layers share a module, its eraser is fitted on all visits; leakage is measured over all and at each.
        width: The number of features.
        rank: The number of directions erased; None without an eraser.
        visits: How often the module was called in one forward pass of the fit. Its eraser removes what the concept
            adds to any of these calls, up to `visits` times as many directions. A fit in one pass (`sequential=False`)
            guarantees nothing at later visits, whose activations are changed by erasers.
        residual: Where the module was called several times, the largest cross-covariance with the concept that is left
            at a visit, as a share of `|x| |z|`. An eraser changes what arrives at later visits, so it is fitted again
            until only rounding is left. Where more is left, the guarantee does not hold.
        rows: The number of labelled rows that the eraser was fitted on.
        correlation_before: Leakage without the adapter: the correlation with the concept on `eval_batches`, a magnitude
            between 0 and 1, of what the fit guards: tokens, or with `pool="mean"` the mean over each sequence.
        correlation_after: The same with the adapter.
        interval_before: The 95 % interval of `correlation_before`, by Fisher's z over distinct labelled sequences,
            or over their environments where batches name these. Then each half of the rows has whole environments.
        interval_after: The same for `correlation_after`.
        change_labelled: `sqrt(E|r(x) − x|² / E|x − E x|²)` over labelled rows, held out where `eval_batches` were
            given. For a last hidden state: how far the whole adapter moves it.
        change_ignored: The same over positions without a label that are not padding; needs `eval_batches`.
    """

    site: str
    visit: int | None = None
    width: int | None = None
    rank: int | None = None
    visits: int = 1
    residual: float | None = None
    rows: int | None = None
    correlation_before: float | None = None
    correlation_after: float | None = None
    interval_before: tuple[float, float] | None = None
    interval_after: tuple[float, float] | None = None
    change_labelled: float | None = None
    change_ignored: float | None = None

    @property
    def name(self) -> str:
        """The name of the site, with the visit where the line is about one."""
        return self.site if self.visit is None else f"{self.site}, visit {self.visit}"


@dataclass(frozen=True)
class ErasureReport:
    """The result of `fit_concept_erasure`.

    Attributes:
        concept: What was erased.
        adapter_name: The name of the adapter.
        method: The method in the adapter's configuration.
        pool: Which rows a sequence label counted for. These rows are guarded, and the figures are about them.
        reader: What the model's head reads, in words.
        examples: The number of sequences that were fitted on.
        tokens: The number of positions that were fitted on, without padding.
        eval_examples: The number of sequences of `eval_batches`; 0 without them.
        eval_fitted: How many of the `eval_examples` were fitted on, too.
        sites: One `SiteReport` for each site in the model's order, the last hidden states at the end. With
            `eval_batches`, lines for each visit follow a module that is called several times in one forward pass.
        reach: Which hidden states stay un-erased, in a sentence.
        classes: How many classes the concept has; None for values.
        counterfactuals: How many counterfactuals of the texts were fitted on.
        environments: In how many environments, such as templates, the concept was erased; None without them.
        eval_environments: In how many environments the rows of `eval_batches` are, from which halves and intervals are
            made; None where the batches name none.
    """

    concept: str
    adapter_name: str
    method: str
    pool: str
    reader: str
    examples: int
    tokens: int
    eval_examples: int
    eval_fitted: int
    sites: list[SiteReport] = field(default_factory=list)
    reach: str = ""
    classes: int | None = None
    counterfactuals: int = 0
    environments: int | None = None
    eval_environments: int | None = None

    def to_pandas(self) -> pandas.DataFrame:
        """The lines as rows, indexed by site; columns are attributes of `SiteReport`; `attrs` has pool and rows.

        The column `visit` has no value in the row of all visits together.
        """
        frame = pandas.DataFrame([asdict(site) for site in self.sites]).set_index("site")
        frame.attrs |= {"pool": self.pool, "reader": self.reader, "measured_on": self.measured_on}
        return frame.astype({"visit": "Int64"})

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain data, and `measured_on`, `leakage` and `shortfall`."""
        return asdict(self) | {name: getattr(self, name) for name in ("measured_on", "leakage", "shortfall")}

    def to_json(self, path: str | Path | None = None) -> str:
        """The content of `to_dict` as JSON; where a path is given, it is also written to that file."""
        text = json.dumps(self.to_dict(), indent=1, ensure_ascii=False)
        if path is not None:
            Path(path).write_text(text + "\n", encoding="utf-8")
        return text

    def to_markdown(self) -> str:
        """The table of sites in Markdown."""
        lines = ["| " + " | ".join(row) + " |" for row in self._table()]
        return "\n".join([lines[0], "|---" + "|---:" * (len(_COLUMNS) - 1) + "|", *lines[1:]])

    def to_latex(self) -> str:
        """The table of sites as a LaTeX `tabular`, for the package `booktabs`."""
        rows = [" & ".join(re.sub(r"([_%&#$])", r"\\\1", cell) for cell in row) + r" \\" for row in self._table()]
        body = [r"\toprule", rows[0], r"\midrule", *rows[1:], r"\bottomrule"]
        return "\n".join([rf"\begin{{tabular}}{{l{'r' * (len(_COLUMNS) - 1)}}}", *body, r"\end{tabular}"])

    def _table(self) -> list[Sequence[str]]:
        def number(value: Any, form: str) -> str:
            return "-" if value is None else format(value, form)

        def leakage(value: float | None, ends: tuple[float, float] | None) -> str:
            return number(value, ".3f") + ("" if ends is None else f" [{ends[0]:.2f}, {ends[1]:.2f}]")

        rows: list[Sequence[str]] = [_COLUMNS]
        for line in self.sites:
            before = leakage(line.correlation_before, line.interval_before)
            after = leakage(line.correlation_after, line.interval_after)
            changes = number(line.change_labelled, ".1%"), number(line.change_ignored, ".1%")
            rows.append((line.name, number(line.rank, "d"), number(line.rows, "d"), before, after, *changes))
        return rows

    def __getitem__(self, site: str) -> SiteReport:
        """The line of one site, all its visits together.

        Raises:
            KeyError: The report does not have this site; the message names its sites.
        """
        for line in self.sites:
            if line.site == site:
                return line
        raise KeyError(f"{site!r} is not in this report; it has {[line.site for line in self.sites]}")

    @property
    def leakage(self) -> dict[str, list[float]]:
        """Correlation before and after by site, all visits together; empty without `eval_batches`."""
        return {
            line.site: [line.correlation_before, line.correlation_after]
            for line in self.sites
            if line.visit is None and line.correlation_before is not None and line.correlation_after is not None
        }

    @property
    def leakage_intervals(self) -> dict[str, list[float]]:
        """The two ends of the interval before and the two of the interval after, for each site of `leakage`."""
        return {
            line.site: [*line.interval_before, *line.interval_after]
            for line in self.sites
            if line.visit is None and line.interval_before is not None and line.interval_after is not None
        }

    @property
    def residuals(self) -> dict[str, float]:
        """Site → its residual, for sites where it is more than rounding: the guarantee does not hold there."""
        known = {line.site: line.residual for line in self.sites if line.residual is not None}
        return {site: left for site, left in known.items() if left > SETTLED}

    @property
    def unsettled(self) -> list[str]:
        """The sites that are called several times and were fitted in one pass: later calls have no guarantee."""
        return [line.site for line in self.sites if line.visits > 1 and line.residual is None]

    @property
    def shortfall(self) -> str:
        """Where the guarantee does not hold, in words; empty where it holds."""
        residuals = self.residuals
        if self.unsettled:
            return (
                f"{self.unsettled[0]!r} is called several times in one forward pass, and erasers change what arrives "
                "at later calls: a fit in one pass promises nothing there. Fit with sequential=True."
            )
        if not residuals:
            return ""
        worst = max(residuals, key=lambda site: residuals[site])
        others = f", and less at other sites ({len(residuals) - 1})" if len(residuals) > 1 else ""
        return (
            f"{worst!r} is called several times in one forward pass, and no eraser was found that leaves nothing at "
            f"each: {residuals[worst]:.1g} of |x| |z| is left there{others}. The guarantee does not hold: name other "
            "target_modules, or give more rows."
        )

    @property
    def expected_reading(self) -> float | None:
        """The accuracy that a linear probe is expected to reach on other texts, if it is fitted anew on them.

        The formula is that of `hf_erasure.erasers.expected_accuracy`, for the last site that was measured and its
        correlation without the adapter. None for concepts other than two classes, for methods other than LEACE, without
        `eval_batches`, and with counterfactuals or within environments, which leave less than the formula says.
        """
        other = self.classes != 2 or self.counterfactuals or self.environments or self.method != "leace"
        if other or not self.eval_examples:
            return None
        line = self._last_measured
        if line is None:
            return None
        return expected_accuracy(_accuracy(line.correlation_before or 0.0), line.width or 1, self.examples)

    @property
    def _last_measured(self) -> SiteReport | None:
        measured = [line for line in self.sites if line.correlation_before is not None and line.width is not None]
        return measured[-1] if measured else None

    @property
    def outlook(self) -> str:
        """What a linear probe is expected to read on other texts, in words; empty if `expected_reading` is None."""
        reads = self.expected_reading
        if reads is None or (line := self._last_measured) is None:
            return ""
        found = _accuracy((line.interval_after or (0.0,))[0])
        if found > reads and not self.eval_fitted:
            return (
                f"On these held-out texts a linear probe reads {found:.0%} or more, where the formula for "
                f"{self.examples} texts\nof one kind expects {reads:.0%}: they differ from those fitted on, as in "
                "templates or names. Name\nsuch kinds (concept_dataloader(…, environment_column=…)) and erase within "
                "each (environment_rank)."
            )
        return (
            f"A linear probe that is fitted anew on other texts is expected to read about {reads:.0%}, by the formula\n"
            f"for {number_of(self.examples, 'text')} fitted on. More texts leave less, and so do counterfactuals\n"
            "(concept_dataloader(…, counterfactual_words=…))."
        )

    @property
    def measured_on(self) -> str:
        """The rows that the figures are on, in words: held out or fitted, and in how many environments, if named."""
        if not self.eval_examples:
            return rows_in_words(self.examples, self.examples)
        return rows_in_words(self.eval_examples, self.eval_fitted, self.eval_environments)

    def __repr__(self) -> str:
        table = self._table()
        first, *widths = (max(map(len, column)) for column in zip(*table, strict=True))
        lines = ["  ".join([row[0].ljust(first), *map(str.rjust, row[1:], widths)]) for row in table]
        title = (
            f"{self.method} erasure of {self.concept!r} as adapter {self.adapter_name!r}: "
            f"{number_of(self.examples, 'example')}, {number_of(self.tokens, 'token')}, pool={self.pool!r}"
            + (f" ({self.reader})" if self.reader else "")
            + (f", {number_of(self.counterfactuals, 'counterfactual')}" if self.counterfactuals else "")
            + (f", {number_of(self.environments, 'environment')}" if self.environments else "")
        )
        note = (
            f"All figures are on {self.measured_on}. Leakage was not measured: pass eval_batches.\n"
            "moved: sqrt(E|r(x) - x|^2 / Var x)."
        )
        if self.eval_examples:
            groups = "environments" if self.eval_environments else "sequences"
            note = (
                f"before, after: correlation of {IN_WORDS[self.pool]} with the concept on {self.measured_on},\n"
                f"direction of one half judged on the other, [95 % by Fisher's z over {groups}].\n"
                "moved: sqrt(E|r(x) - x|^2 / Var x) of labelled positions; elsewhere: of unlabelled ones.\n"
                f"{self.reach}"
            )
            note += f"\n{self.outlook}" if self.outlook else ""
        return "\n".join([title, "", *lines, "", *filter(None, [self.shortfall, note])])

    def plot(self, path: str | None = None) -> figures.Figure:
        """Leakage by depth, before and after.

        Args:
            path: A file to which the figure is also written, or None.

        Raises:
            ImportError: If matplotlib is not installed.
            ValueError: If leakage was not measured.
        """
        if not self.leakage:
            raise ValueError("Leakage was not measured, so it cannot be plotted: fit with eval_batches=….")
        figure = figures.Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        measured = [line for line in self.sites if line.correlation_before is not None]
        sites = [
            {
                "before": line.correlation_before,
                "after": line.correlation_after,
                "before_interval": line.interval_before,
                "after_interval": line.interval_after,
            }
            for line in measured
        ]
        draw_leakage(axes, sites, f"{self.concept}: {self.method}, pool={self.pool!r}, on {self.measured_on}")
        # Names without the parts that all modules begin with.
        names = [line.name for line in measured]
        around = [name.split(".")[:-1] for name in names if "last_hidden_state" not in name]
        common = sum(1 for _ in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*around, strict=False)))
        short = [name if "last_hidden_state" in name else ".".join(name.split(".")[common:]) for name in names]
        axes.set_xticks(range(len(measured)), short, rotation=90, fontsize=7)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure


def draw_leakage(axes: Any, sites: Sequence[Mapping[str, Any]], title: str) -> None:
    """Draw the correlation of sites with the concept, `before` and `after`, with intervals where all have them."""
    where = range(len(sites))
    for when, color, marker, style in (("before", BEFORE, "o", "-"), ("after", AFTER, "s", "--")):
        axes.plot(where, [site[when] for site in sites], marker=marker, color=color, linestyle=style, label=when)
        ends = [site.get(f"{when}_interval") for site in sites]
        if all(ends):
            axes.fill_between(where, *zip(*ends, strict=True), color=color, alpha=0.15)
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_ylabel("correlation with the concept, 95 %")
    axes.set_title(title, fontsize=9)
    axes.legend()


def _accuracy(correlation: float) -> float:
    """The accuracy of a linear probe of two balanced classes: at a distance m the correlation is m / √(m² + 4)."""
    correlation = min(correlation, 1 - 1e-9)
    return NormalDist().cdf(correlation / (1 - correlation**2) ** 0.5)


def rows_in_words(examples: int, fitted: int, environments: int | None = None) -> str:
    """The rows that figures are on, to follow "on": how many, how many were fitted on, and in how many environments."""
    of = f" in {number_of(environments, 'environment')}" if environments else ""
    if not fitted:
        return f"{number_of(examples, 'held-out example')}{of}"
    return f"fitted rows ({'all' if fitted == examples else fitted} of {examples}){of}"


# ---- figures of any kind ---------------------------------------------------------------------------------------------


def badness(value: float, better: str, ideal: float | None) -> float:
    """How far a value falls short of the ideal: 0 at the ideal, and beyond it too unless `better` is `"closer"`.

    Args:
        value: The value.
        better: `"lower"`, `"higher"` or `"closer"`.
        ideal: The best value. None for a measure without one: then only the order of two results has a meaning.
    """
    if ideal is None:
        return value if better == "lower" else -value
    if better == "closer":
        return abs(value - ideal)
    return max(0.0, value - ideal if better == "lower" else ideal - value)


def verdict(
    base: float, value: float, interval: Sequence[float] | None, better: str, ideal: float | None = None
) -> str:
    """Whether an adapter made a measure `"better"` or `"worse"`; `base` is the value without the adapter.

    An empty string without an interval, or where the interval contains `base`. Other arguments are as in `badness`.
    """
    if interval is None or interval[0] <= base <= interval[1]:
        return ""
    change = badness(value, better, ideal) - badness(base, better, ideal)
    return "better" if change < 0 else "worse" if change > 0 else ""


def concept_of_config(config: Any) -> str | None:
    """The concept of an adapter: `GENDER`, `POS`, `STEREOTYPES` or its own name; None for other libraries' adapters."""
    name = getattr(config, "feature", None) or getattr(config, "concept", None)
    apart = re.sub(r"([a-z])([A-Z])", r"\1 \2", str(name)).lower()
    words = " ".join(["", *re.findall(r"[^\W_]+", apart), ""])
    for concept, names in _NAMES.items():
        if any(f" {one} " in words for one in names):
            return concept
    classes = getattr(config, "classes", None) or getattr(config, "labels", None) or []
    labels = [str(label).strip().lower() for label in classes]
    if FEMALE.intersection(labels) and MALE.intersection(labels) and (FEMALE | MALE | _OTHERS).issuperset(labels):
        return GENDER
    if len(labels) > 1 and _UPOS.issuperset(labels):
        return POS
    return None if name is None else str(name)


def female_and_male(classes: Sequence[str]) -> tuple[int, int] | None:
    """The indices of the female and of the male class, if the classes are these two."""
    labels = [label.strip().lower() for label in classes]
    female, male = ([i for i, label in enumerate(labels) if label in names] for names in (FEMALE, MALE))
    return (female[0], male[0]) if len(labels) == 2 and female and male else None
