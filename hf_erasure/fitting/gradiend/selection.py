"""Choose the feature factor and the learning rate of an edit: a grid, scored with forward passes only.

An edit is chosen for a goal, a function of how likely the words of each class are. At every point of the grid the edit
is written into the weights, in the model's own dtype, and taken out again to the bit. So the scored model is the model
that a merge gives.
"""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.adapters import edited
from hf_erasure.models.model import pandas
from hf_erasure.models.neutral import LanguageModelling
from hf_erasure.models.slots import SlotReader
from hf_erasure.models.word_tokens import PairError, word_tokens

from ..report import female_and_male
from .pairs import PairSet, Reading

# ---- goals ----------------------------------------------------------------------------------------------------------

Goal = Callable[[Tensor], Tensor]  # (texts, classes) probabilities → (texts,)


def goals_of(classes: Sequence[str]) -> dict[str, Goal]:
    """The goals that are defined for these classes, which are the columns of `p`; some need exactly two classes."""
    goals: dict[str, Goal] = {"balance": lambda p: (1 - (p.amax(1) - p.amin(1))) * p.amin(1)}
    goals |= {name: _goal_of_class(index) for index, name in enumerate(classes)}
    if len(classes) == 2:
        goals.setdefault("bpi", lambda p: (1 - (p[:, 0] - p[:, 1]).abs()) * p.sum(1))
    for name, index in zip(("fpi", "mpi"), female_and_male(classes) or (), strict=False):
        goals.setdefault(name, _goal_of_class(index))
    return goals


def goal_by_name(name: str, classes: Sequence[str]) -> Goal:
    """The goal of that name; a `ValueError` that lists the goals if it is not defined for these classes."""
    goals = goals_of(classes)
    if name not in goals:
        raise ValueError(
            f"goal={name!r} is not defined for the classes {list(classes)}: write one of the class names, 'balance'"
            + (", 'bpi', or 'fpi' and 'mpi' for a female and a male class." if len(classes) == 2 else ".")
        )
    return goals[name]


def _goal_of_class(index: int) -> Goal:
    return lambda p: (1 - p.index_fill(1, torch.tensor(index, device=p.device), 0.0).amax(1)) * p[:, index]


def all_words(words: dict[str, list[str]]) -> list[str]:
    """The words of all classes, each once."""
    return list(dict.fromkeys(itertools.chain(*words.values())))


def class_probabilities(
    reader: SlotReader, words: dict[str, list[str]], pairs: PairSet, tokenizer: Any, batch_size: int
) -> Callable[[], Tensor]:
    """Return a function that gives `(texts, classes)`: the probability that a text's slot holds a word of the class.

    It scores the model as it is when it is called. A word counts once, however it is spelled, and a word whose
    tokens go on from those of another word counts for its own class alone. If a word belongs to several classes, sums
    over the words of a class do not tell these classes apart: each text is then scored by the words that its own rows
    give to each class.

    Raises:
        PairError: If a word belongs to several classes, and the rows of a text give no word for some class.
    """
    distinct_words, is_label = all_words(words), pairs.layout.task == "classification"
    of_label = ([reader.model.config.label2id[word]] for word in distinct_words)
    tokens = of_label if is_label else word_tokens(tokenizer, distinct_words)
    tokens_of = {word: tuple(own) for word, own in zip(distinct_words, tokens, strict=True)}
    of_class = [{tokens_of[word] for word in own} for own in words.values()]
    shared = next((word for word in distinct_words if sum(tokens_of[word] in own for own in of_class) > 1), None)
    batches = pairs.slots(batch_size)
    if shared is not None:
        names = [name for name, own in zip(pairs.classes, of_class, strict=True) if tokens_of[shared] in own]
        reason = f"{shared!r} is a word of {' and '.join(map(repr, names))}"
        warnings.warn(f"{reason}: each text is scored by the words that its rows give to each class.", stacklevel=4)
        readings = pairs.readings()
        _check_readings(readings, pairs.classes, reason)
        texts, by_text = torch.tensor([text for text, _ in readings]), [each for _, each in readings]
    else:
        placed = [tokens_of] if is_label else pairs.words_in_slots(tokenizer, tokens_of)
        by_text = [[{there[word] for word in own} for own in words.values()] for there in placed]
        texts = torch.arange(sum(map(len, batches)))
    known = sorted({word for each in by_text for own in each for word in own})
    position = {word: index for index, word in enumerate(known)}
    chosen = torch.zeros(len(by_text), len(of_class), len(known), dtype=torch.double)
    for row, each in enumerate(by_text):
        for column, own in enumerate(each):
            chosen[row, column, [position[word] for word in own]] = 1
        # The probability of "host" contains that of "hostess", which counts for the class of "hostess" alone.
        for word in set().union(*each) if pairs.layout.task in ("causal", "seq2seq") else ():
            starts = [[word[:end] in own for own in each] for end in range(len(word) - 1, 0, -1)]
            chosen[row, next(filter(any, starts), []), position[word]] -= 1
    counts = chosen.flatten(0, 1).any(0)
    known, chosen = [word for word, is_used in zip(known, counts, strict=True) if is_used], chosen[..., counts]

    def probabilities() -> Tensor:
        found = [reader.word_log_probabilities(batch, known).double().exp().cpu() for batch in batches]
        return (torch.cat(found)[texts, None] * chosen).sum(2).clamp_min(0)  # a difference may round to below 0

    return probabilities


def _check_readings(readings: list[Reading], classes: Sequence[str], reason: str) -> None:
    for text, words in readings:
        for name, own in zip(classes, words, strict=True):
            if not own or any(own & other for other in words if other is not own):
                lacks = f"give {'two classes the same word' if own else f'no word of {name!r}'}"
                raise PairError(
                    f"{reason}, so each text is scored by the words that its own rows give to each class, and those of "
                    f"text {text} {lacks}; add rows with its other words, or use words of one class only"
                )


# ---- the grid -------------------------------------------------------------------------------------------------------

# Edits that are tried by default: in both directions, from steps that hardly change a word to steps that break the
# model, after which `COST_LIMIT` ends a direction.
FEATURE_FACTORS = (0.0, *(sign * x for x in (0.2, 0.4, 0.6, 0.8, 1.0, 2.0, 10.0) for sign in (1, -1)))
_RATES = (1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5)
LEARNING_RATES = tuple(sign * x for sign in (1, -1) for x in _RATES)
# If language modelling has lost this many times the budget, larger steps in the same direction are not tried.
COST_LIMIT = 5
# Standard errors from an estimate to the end of its one-sided 95 % interval.
_ONE_SIDED = 1.645


def check_search(
    budget: float, feature_factors: Sequence[float], learning_rates: Sequence[float], where: str = ""
) -> None:
    """Raise a `ValueError` for a budget or a grid that cannot be used; warn of a budget that looks like a percentage.

    `where` stands before the names in the messages.
    """
    for name, values in (("feature_factors", feature_factors), ("learning_rates", learning_rates)):
        is_list = isinstance(values, Sequence) and bool(values)
        if not is_list or any(isinstance(value, str) or not math.isfinite(value) for value in values):
            raise ValueError(f"{where}{name}={values!r}: give a list of finite numbers, at least one.")
    if not any(learning_rates):
        raise ValueError(f"{where}learning_rates has zeros only, which change nothing: give steps, as [1e-3, -1e-3].")
    if isinstance(budget, str) or not 0 <= budget < math.inf:
        raise ValueError(f"{where}budget={budget!r}: give the share that language modelling may lose, such as 0.02.")
    if budget > 1:
        warnings.warn(
            f"{where}budget={budget:g} is a share: it lets language modelling get worse by {budget:.0%}. For "
            f"{budget:g} % write {budget / 100:g}.",
            stacklevel=3,
        )


@dataclass(frozen=True)
class Point:
    """One edit and its scores.

    Attributes:
        pair: The classes whose feature neuron is used.
        feature_factor: `h` of `W + α (h Wd + bd)`.
        learning_rate: `α`.
        goals: Goal → score.
        probabilities: Class → its mean probability at the slot.
        loss: Mean negative log-likelihood, in nats per token.
        lms: The language-modelling score: accuracy of a masked model or a classifier, 1 / (1 + loss) otherwise.
        cost: By how much language modelling got worse, as a share: of that accuracy, or of the loss.
        cost_upper: The upper end of the cost's one-sided 95 % interval, for texts like these.
    """

    pair: tuple[str, str]
    feature_factor: float
    learning_rate: float
    goals: dict[str, float]
    probabilities: dict[str, float]
    loss: float
    lms: float
    cost: float
    cost_upper: float


@dataclass(frozen=True)
class Selection:
    """The best edit for a goal within a budget, and everything that was tried.

    Attributes:
        goal: The goal that was asked for.
        budget: The share by which language modelling may get worse.
        best: The chosen point.
        base: The scores of the model without an edit.
        points: All edits that were scored.
    """

    goal: str
    budget: float
    best: Point
    base: Point
    points: tuple[Point, ...]

    def choose(self, goal: str, budget: float | None = None) -> Selection:
        """Choose among the same points for another goal; the model's adapter stays as it is.

        Args:
            goal: Any goal that the points were scored by.
            budget: By default this selection's budget. For a larger one, remember that the scan left out edits that
                lost many times its own budget.

        Raises:
            ValueError: If the points were not scored by this goal.
        """
        if goal not in self.base.goals:
            raise ValueError(f"goal={goal!r} was not scored: write one of {', '.join(self.base.goals)}.")
        budget = self.budget if budget is None else budget
        return Selection(goal, budget, choose(self.base, self.points, goal, budget), self.base, self.points)

    def to_pandas(self) -> pandas.DataFrame:
        """One row for the model without an edit, and one for each point."""
        return pandas.DataFrame(
            [
                {"pair": "/".join(p.pair), "feature_factor": p.feature_factor, "learning_rate": p.learning_rate}
                | p.goals
                | {f"P({name})": value for name, value in p.probabilities.items()}
                | {"loss": p.loss, "lms": p.lms, "cost": p.cost, "cost_upper": p.cost_upper}
                for p in (self.base, *self.points)
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """The selection as plain values, for JSON, without the points."""
        return {"goal": self.goal, "budget": self.budget, "best": asdict(self.best), "base": asdict(self.base)}

    def __str__(self) -> str:
        best, base = self.best, self.base
        shares = ", ".join(
            f"P({name}) {base.probabilities[name]:.3f} → {value:.3f}" for name, value in best.probabilities.items()
        )
        return (
            f"{self.goal}: {base.goals[self.goal]:.3f} → {best.goals[self.goal]:.3f} at feature_factor="
            f"{best.feature_factor:g}, learning_rate={best.learning_rate:g} of {'/'.join(best.pair)}; {shares}; "
            f"cost in language modelling {best.cost:+.2%}, at most {best.cost_upper:+.2%} (95 %)"
        )


@dataclass(frozen=True)
class Scorer:
    """Scores the model with the edit that is in its weights when `score` is called."""

    classes: Sequence[str]  # The feature's classes.
    # Returns `(texts, classes)`, the probability of each class at the slot of each text.
    class_probabilities: Callable[[], Tensor]
    language: LanguageModelling  # Measures how well the model models neutral texts.
    _base_by_text: list[Tensor] = field(default_factory=list, init=False)  # `by_text` of the model without an edit.

    def score(self, pair: tuple[str, str], feature_factor: float, learning_rate: float, base: Point | None) -> Point:
        """Score the model as it is now, with the given edit.

        Cost is relative to `base`, which this scorer scored last with None (the model is the base itself). It is
        measured in accuracy for masked models and classifiers, unless that is 0, and in loss for others.
        """
        p, by_text = self.class_probabilities().double(), self.language.by_text()
        loss, lms = (self.language.figures_of(by_text)[name] for name in ("loss", "lms"))
        cost = upper = 0.0
        if base is None:
            self._base_by_text[:] = [by_text]
        else:
            by_hits = self.language.by_hits and base.lms > 0
            cost = 1 - lms / base.lms if by_hits else loss / base.loss - 1
            upper = cost + _margin(by_text[:, int(by_hits)], self._base_by_text[0][:, int(by_hits)])
        return Point(
            pair,
            feature_factor,
            learning_rate,
            {name: float(lms * goal(p).mean()) for name, goal in goals_of(self.classes).items()},
            {name: float(p[:, i].mean()) for i, name in enumerate(self.classes)},
            loss,
            lms,
            cost if math.isfinite(cost) else math.inf,
            upper if math.isfinite(upper) else math.inf,
        )


def _margin(now: Tensor, base: Tensor) -> float:
    """The distance from the ratio of two sums over the same texts to the end of its one-sided 95 % interval.

    Texts are a random sample, and the ratio is a smooth function of two means (the delta method): Cochran, "Sampling
    Techniques" (1977), section 6.4.
    """
    texts = len(now)
    left = (now - base * (now.sum() / base.sum())) / base.mean()
    return _ONE_SIDED * float((left.square().sum() / (texts * (texts - 1))).sqrt()) if texts > 1 else math.inf


def scan(
    model: nn.Module,
    adapter_name: str,
    scorer: Scorer,
    pairs: Sequence[tuple[str, str]],
    budget: float,
    feature_factors: Sequence[float] = FEATURE_FACTORS,
    learning_rates: Sequence[float] = LEARNING_RATES,
) -> Iterator[Point]:
    """Yield the score of the unedited model, then that of every point of the grid.

    For each feature factor the steps grow. If language modelling has lost `COST_LIMIT` times the budget, larger steps
    in that direction are left out.
    """
    with edited(model, adapter_name, feature_factor=0.0, learning_rate=0.0, pair=pairs[0]):
        base = scorer.score(pairs[0], 0.0, 0.0, None)
    yield base
    for pair in pairs:
        for factor in dict.fromkeys(feature_factors):  # each value once, however often it is given
            for sign in (1, -1):
                for rate in sorted({rate for rate in learning_rates if rate * sign > 0}, key=abs):
                    with edited(model, adapter_name, feature_factor=factor, learning_rate=rate, pair=pair):
                        point = scorer.score(pair, factor, rate, base)
                    yield point
                    if point.cost > COST_LIMIT * budget:
                        break


def choose(base: Point, points: Sequence[Point], goal: str, budget: float) -> Point:
    """The best point within the budget; if none is better than the unedited model, that model, with a warning."""
    affordable = [point for point in points if point.cost_upper <= budget and math.isfinite(point.goals[goal])]
    best = max(affordable, key=lambda point: point.goals[goal], default=base)
    if best.goals[goal] > base.goals[goal]:
        return best
    cheapest = min(points, key=lambda point: point.cost_upper)
    warnings.warn(
        f"None of {len(points)} edits raises {goal} above the {base.goals[goal]:.3f} of the model itself while "
        f"language modelling gets worse by {budget:.1%} at most, so the model stays as it is (learning_rate=0). The "
        f"cheapest edit, feature_factor={cheapest.feature_factor:g} and learning_rate={cheapest.learning_rate:g}, "
        f"costs {cheapest.cost:.1%}, and up to {cheapest.cost_upper:.1%} on texts like these: give other "
        "learning_rates, more neutral texts or a larger budget.",
        stacklevel=3,
    )
    return base
