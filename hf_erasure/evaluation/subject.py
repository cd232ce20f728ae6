"""A model under examination: what its layers hold for texts and at labelled tokens, which several measures read."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.metrics.linear_leakage import held_out_answers
from hf_erasure.metrics.readers import spread
from hf_erasure.models import pooled
from hf_erasure.models.heads import check_next_word, known_task
from hf_erasure.models.model import Runner, evaluating, last_hidden_state, text_encoder
from hf_erasure.models.slots import longest_input, padded_inputs

from .data import Biographies, DataFolder, Sentence

FINAL = "last_hidden_state"
_LONGEST = 256  # tokens of a text; the rest of a longer one is cut off
_TAGGED = 2000  # labelled tokens that are probed


class NotForThisModel(ValueError):
    """A measure cannot be asked of a model; the message says why."""


# ---- states ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenStates:
    """States at labelled tokens, layer → `(tokens, width)`, with the tag of each token and its sentence's number."""

    layers: dict[str, Tensor]
    tags: list[str]
    sentences: list[int]


class StateReader:
    """Hidden states by layer, the embeddings first and the last hidden state at the end.

    Of an encoder-decoder the encoder is read, which sees the text as it is.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int = 32) -> None:
        self.runner, self.tokenizer, self.batch_size = Runner(text_encoder(model), []), tokenizer, batch_size
        self.longest = min(longest_input(tokenizer, self.runner.model.config) or _LONGEST, _LONGEST)

    def pooled(self, texts: Sequence[str], pool: str = "mean") -> dict[str, Tensor]:
        """Layer → `(texts, width)`: the mean over the tokens of each text, its first or its last (`pool`)."""
        parts: dict[str, list[Tensor]] = {}
        for _, states, mask in self._batches(texts):
            for name, state in states.items():
                parts.setdefault(name, []).append(pooled(state, mask, pool))
        return {name: torch.cat(found) for name, found in parts.items()}

    def final(self, texts: Sequence[str]) -> list[Tensor]:
        """The last hidden states of each text, `(tokens, width)`."""
        batches = self._batches(texts, every=False)
        return [row[real] for _, states, mask in batches for row, real in zip(states[FINAL], mask, strict=True)]

    def tagged(self, sentences: Sequence[Sentence], most: int) -> TokenStates:
        """States at tokens that have a tag, at most so many, evenly spread."""
        if not self.tokenizer.is_fast:
            raise ValueError("The tokenizer does not say where in a text its tokens stand, so words cannot be matched.")
        parts: dict[str, list[Tensor]] = {}
        tags: list[str] = []
        owners: list[int] = []
        texts = [sentence.text for sentence in sentences]
        offsets = self._encoded(texts, offsets=True)["offset_mapping"]
        for start, states, mask in self._batches(texts):
            for row, sentence in enumerate(sentences[start : start + len(mask)]):
                found = sentence.tags([(int(a), int(b)) for a, b in offsets[start + row]])
                places = [place for place, tag in enumerate(found) if tag is not None]
                tags += [tag for tag in found if tag is not None]
                owners += [start + row] * len(places)
                for name, state in states.items():
                    parts.setdefault(name, []).append(state[row][mask[row]][places])
        keep = spread(range(len(tags)), most)
        layers = {name: torch.cat(rows)[keep] for name, rows in parts.items()}
        return TokenStates(layers, [tags[i] for i in keep], [owners[i] for i in keep])

    def _encoded(self, texts: Sequence[str], *, offsets: bool = False) -> Any:
        return self.tokenizer(
            list(texts), truncation=True, max_length=self.longest, return_offsets_mapping=offsets, verbose=False
        )

    def _batches(self, texts: Sequence[str], every: bool = True) -> Iterator[tuple[int, dict[str, Tensor], Tensor]]:
        """The first text's number, states by layer `(batch, seq, width)` in float32, and which positions are real."""
        rows = self._encoded(texts)["input_ids"]
        if empty := [number for number, row in enumerate(rows) if not row]:
            raise ValueError(f"Text {empty[0]} has no tokens: leave it out.")
        padding = self.tokenizer.pad_token_id or 0
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            inputs = padded_inputs(chosen, padding)
            with evaluating(self.runner.model):
                output = self.runner({**inputs, "output_hidden_states": every})
            # The last of the hidden states is last_hidden_state, in most architectures and with these names.
            states = {f"layer {i}": state for i, state in enumerate(output.hidden_states[:-1])} if every else {}
            states[FINAL] = last_hidden_state(output)
            yield start, {name: state.float().cpu() for name, state in states.items()}, inputs["attention_mask"].bool()


# ---- the model under examination -------------------------------------------------------------------------------------


@dataclass
class Evaluation:
    """What to evaluate.

    Attributes:
        model: A folder, a name on the Hub, or `"embedded"`.
        data: The folder of data; see `hf_erasure.evaluation.LAYOUT`.
        adapters: Folders of adapters.
        suite: `"gender"`, `"pos"`, `"stereotypes"` or `"all"`.
        limit: At most so many items of each data set; all when None.
        seed: Of folds, resamples and permutations.
        resamples: Of every bootstrap.
        confidence: Of every interval.
        strengths: Factors of the learning rate at which GRADIEND adapters are measured besides.
        harness: Tasks of lm-evaluation-harness.
        harness_tasks: A folder of further task definitions.
        allow_inactive: Go on where an adapter does not act.
        stereoset: How a causal model scores a sentence of StereoSet: `"sentence"`, after its start token, or
            `"authors"`, as the authors' code does; see `hf_erasure.metrics.benchmarks.stereoset`.
    """

    model: str
    data: str | Path
    adapters: Sequence[str] = ()
    suite: str = "gender"
    limit: int | None = None
    seed: int = 0
    resamples: int = 1000
    confidence: float = 0.95
    strengths: Sequence[float] = ()
    harness: Sequence[str] = ()
    harness_tasks: str | None = None
    allow_inactive: bool = False
    stereoset: str = "sentence"


@dataclass
class Shared:
    """What the entries of one run have in common."""

    plan: Evaluation
    data: DataFolder
    # The base's last hidden states by text, which distortion is relative to.
    base_states: list[Tensor] | None = None


@dataclass
class Subject:
    """A model under examination, with the adapters of its entry; what several measures need of it is computed once."""

    model: nn.Module
    tokenizer: Any
    shared: Shared
    is_base: bool = True
    pool: str = "mean"  # how the states of a text become one vector
    kept: dict[str, dict[str, Any]] = field(default_factory=dict)  # results that several measures read
    others: dict[str, Subject] = field(default_factory=dict)  # the same model with other pools

    def at(self, pool: str | None) -> Subject:
        """The same model, whose texts are pooled in another way; itself where no pool is asked for."""
        if pool is None or pool == self.pool:
            return self
        return self.others.setdefault(pool, replace(self, pool=pool, kept={}, others={}))

    @functools.cached_property
    def head(self) -> str | None:
        """`"masked"`, `"causal"` or None."""
        task = known_task(self.model)
        if task == "causal":
            try:
                check_next_word(self.model)
            except ValueError:
                return None
        return task if task in ("masked", "causal") else None

    def require_head(self) -> str:
        """The head of a model that predicts words; a `NotForThisModel` is raised where there is none."""
        if self.head is None:
            raise NotForThisModel(f"{type(self.model).__name__} has no head that predicts words")
        return self.head

    @property
    def data(self) -> DataFolder:
        """The folder of data."""
        return self.shared.data

    @property
    def statistics(self) -> dict[str, Any]:
        """Keywords of every metric."""
        return {name: getattr(self.shared.plan, name) for name in ("confidence", "resamples", "seed")}

    @functools.cached_property
    def reader(self) -> StateReader:
        """Of the hidden states."""
        return StateReader(self.model, self.tokenizer)

    @functools.cached_property
    def biographies(self) -> Biographies:
        """The biographies of the data."""
        return self.data.biographies()

    @functools.cached_property
    def states(self) -> dict[str, Tensor]:
        """The pooled states of the biographies by layer."""
        return self.reader.pooled(self.biographies.texts, self.pool)

    @functools.cached_property
    def tokens(self) -> TokenStates:
        """States of tagged tokens by layer."""
        return self.reader.tagged(self.data.sentences(), _TAGGED)

    @functools.cached_property
    def professions(self) -> list[str]:
        """The profession that a linear probe fitted on the others gives to each biography."""
        return held_out_answers(self.states[FINAL], self.biographies.professions, seed=self.shared.plan.seed)
