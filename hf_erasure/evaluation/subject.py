"""A model that is measured: the states of its layers for texts and at labelled tokens, which several measures read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_erasure.metrics.linear_leakage import held_out_answers
from hf_erasure.metrics.readers import spread
from hf_erasure.models.heads import check_next_word, known_task
from hf_erasure.models.model import text_encoder
from hf_erasure.models.scorer import FINAL, pooled_text, text_states
from hf_erasure.models.slots import longest_input

from .data import Biographies, DataFolder

T = TypeVar("T")
_BATCH_ROWS = 32  # texts of a forward pass
_LONGEST = 256  # the most tokens of a text; the rest of a longer text is cut off
_MOST_TAGGED = 2000  # the most labelled tokens that are probed


class NotForThisModel(ValueError):
    """A measure cannot be computed for a model; the message says why."""


@dataclass(frozen=True)
class TokenStates:
    """States at labelled tokens, layer → `(tokens, width)`, with the tag of each token and its sentence's number."""

    layers: dict[str, Tensor]
    tags: list[str]
    sentences: list[int]


@dataclass
class Evaluation:
    """What to evaluate."""

    model: str  # a folder, a name on the Hub, or `"embedded"`
    data: str | Path  # the folder of data; see `hf_erasure.evaluation.LAYOUT`
    adapters: Sequence[str] = ()  # folders of adapters
    suite: str = "gender"  # or `"pos"`, `"stereotypes"`, `"all"`
    limit: int | None = None  # the most items of each data set; all when None
    seed: int = 0  # the seed of folds, resamples and permutations
    resamples: int = 1000  # how many resamples a bootstrap draws
    confidence: float = 0.95  # the confidence of every interval
    strengths: Sequence[float] = ()  # further factors of the learning rate at which GRADIEND adapters are measured
    harness: Sequence[str] = ()  # tasks of lm-evaluation-harness
    harness_tasks: str | None = None  # a folder of further task definitions
    allow_inactive: bool = False  # continue if an adapter does not act
    # How a causal model scores a sentence of StereoSet: `"sentence"`, after its start token, or `"authors"`, as the
    # authors' code does; see `hf_erasure.metrics.benchmarks.stereoset`.
    stereoset: str = "sentence"


@dataclass
class Subject:
    """A model that is measured, with the adapters of its entry; what several measures need is computed once."""

    model: nn.Module
    tokenizer: Any
    plan: Evaluation
    data: DataFolder
    # The base's last hidden states by text, for the distortion: one list in a run, filled by the base.
    base_states: list[Tensor] = field(default_factory=list)
    is_base: bool = True
    pool: str = "mean"  # how the states of a text become one vector
    # The result of each function that computes measures: several of them may be figures of one result.
    results: dict[Callable[..., Any], dict[str, Any]] = field(default_factory=dict)
    other_pools: dict[str, Subject] = field(default_factory=dict)  # the same model with other pools

    def with_pool(self, pool: str | None) -> Subject:
        """The same model with another pool for texts; this subject if `pool` is None or the same."""
        if pool is None or pool == self.pool:
            return self
        return self.other_pools.setdefault(pool, replace(self, pool=pool, results={}, other_pools={}))

    @functools.cached_property
    def head(self) -> str | None:
        """The kind of head: `"masked"`, `"causal"`, or None without a head that predicts words."""
        task = known_task(self.model)
        if task == "causal":
            try:
                check_next_word(self.model)
            except ValueError:
                return None
        return task if task in ("masked", "causal") else None

    def require_head(self) -> str:
        """The head of a model that predicts words. Raises `NotForThisModel` if it has no such head."""
        if self.head is None:
            raise NotForThisModel(f"{type(self.model).__name__} has no head that predicts words")
        return self.head

    @property
    def statistics(self) -> dict[str, Any]:
        """The keyword arguments of every metric."""
        return {name: getattr(self.plan, name) for name in ("confidence", "resamples", "seed")}

    # ---- hidden states by layer, the embeddings first; for an encoder-decoder the states of its encoder --------------

    @functools.cached_property
    def longest(self) -> int:
        """How many tokens of a text are read."""
        return min(longest_input(self.tokenizer, text_encoder(self.model).config) or _LONGEST, _LONGEST)

    def pooled(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Layer → `(texts, width)`, one vector per text by the subject's pool."""
        rows = self._read(texts, lambda _, states: {n: pooled_text(state, self.pool) for n, state in states.items()})
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def final_states(self, texts: Sequence[str]) -> list[Tensor]:
        """The last hidden states of each text, `(tokens, width)`."""
        return self._read(texts, lambda _, states: states[FINAL], all_layers=False)

    def _read(
        self, texts: Sequence[str], keep: Callable[[int, dict[str, Tensor]], T], all_layers: bool = True
    ) -> list[T]:
        options: dict[str, Any] = {"batch_size": _BATCH_ROWS, "max_length": self.longest, "truncate": True}
        return text_states(self.model, self.tokenizer, texts, keep, all_layers=all_layers, **options)

    @functools.cached_property
    def biographies(self) -> Biographies:
        """The biographies of the data."""
        return self.data.biographies()

    @functools.cached_property
    def states(self) -> dict[str, Tensor]:
        """The pooled states of the biographies by layer."""
        return self.pooled(self.biographies.texts)

    @functools.cached_property
    def tokens(self) -> TokenStates:
        """States at the tokens of the data's sentences that have a tag, at most `_MOST_TAGGED`, evenly spread."""
        if not self.tokenizer.is_fast:
            raise ValueError("The tokenizer does not give the places of tokens in a text, so words cannot be matched.")
        sentences = self.data.sentences()
        texts = [sentence.text for sentence in sentences]
        cut = {"truncation": True, "max_length": self.longest, "verbose": False}
        offsets = self.tokenizer(texts, return_offsets_mapping=True, **cut)["offset_mapping"]

        def at_tags(number: int, states: dict[str, Tensor]) -> tuple[list[str], dict[str, Tensor]]:
            found = dict(enumerate(sentences[number].tags([(int(a), int(b)) for a, b in offsets[number]])))
            known = {place: tag for place, tag in found.items() if tag is not None}
            return list(known.values()), {name: state[list(known)] for name, state in states.items()}

        rows = self._read(texts, at_tags)
        tags = [tag for own, _ in rows for tag in own]
        owners = [number for number, (own, _) in enumerate(rows) for _ in own]
        keep = spread(range(len(tags)), _MOST_TAGGED)
        layers = {name: torch.cat([states[name] for _, states in rows])[keep] for name in rows[0][1]}
        return TokenStates(layers, [tags[i] for i in keep], [owners[i] for i in keep])

    @functools.cached_property
    def professions(self) -> list[str]:
        """The profession that a linear probe predicts for each biography; it is fitted on other biographies."""
        return held_out_answers(self.states[FINAL], self.biographies.professions, seed=self.plan.seed)
