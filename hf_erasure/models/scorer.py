"""Scores of texts by a language model: log-likelihoods of tokens, losses on running text, pooled embeddings.

* masked: the score of a token is its log-probability with only it masked (pseudo-log-likelihood, Salazar et al. 2020);
* causal: the score is the log-probability given the tokens before it, read at the position *before* it. A text begins
  with the tokenizer's start token, or its end token if it has no start token, so that the first token is scored too.

Rows are padded at the right. Log-probabilities are taken in float32 for any dtype of the model; sums are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from .heads import check_next_word
from .model import Runner, evaluating, last_hidden_state, on_cpu, text_encoder
from .pooling import pooled
from .slots import Layout, Row, SlotReader, in_float32, longest_input, padded_inputs, padding_of

T = TypeVar("T")
FINAL = "last_hidden_state"
_LONGEST = 512  # tokens of a window if neither the tokenizer nor the model has a limit


def whole(name: str, value: int, least: int = 1) -> int:
    """Check that a value is a whole number of at least `least`, and return it as an int."""
    if value != int(value) or value < least:
        raise ValueError(f"{name}={value}: write a whole number of at least {least}.")
    return int(value)


def check_texts(texts: Sequence[Any]) -> None:
    """Raise a `ValueError` that names the first entry that is not a text."""
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"Text {number} is {text!r}, which is not a text: leave it out.")


@dataclass(frozen=True)
class Encoding:
    """A text as tokens, special tokens included."""

    text: str  # The text.
    ids: list[int]  # Its tokens.
    spans: list[tuple[int, int]]  # For each token the start and end of its characters in the text.
    places: list[int]  # The positions of the tokens that are scored: text, not special tokens.
    unknown: frozenset[int]  # Positions among `places` of the tokenizer's unknown token.

    def within(self, start: int, end: int) -> list[int]:
        """The positions of the tokens with a character in `text[start:end]`."""
        return [p for p in self.places if self.spans[p][0] < end and self.spans[p][1] > start]


@dataclass(frozen=True)
class Window:
    """The loss of a model on a part of a text."""

    loss: float  # The summed negative log-likelihood in nats.
    tokens: int  # The number of scored tokens.
    bytes: int  # The UTF-8 bytes of the text of these tokens, with the white space before them.


class LanguageScorer:
    """Scores tokens with a masked or a causal language model.

    Args:
        model: The model, bare or wrapped in a `PeftModel`; active adapters take part.
        tokenizer: The fast tokenizer of the model.
        batch_size: Rows in each forward pass.
        max_length: The longest row in tokens; by default the model's limit.

    Raises:
        ValueError: If the model is not a masked or causal language model, or the tokenizer is not a fast one.

    Attributes:
        task: `"masked"` or `"causal"`.
        longest: The longest row in tokens; None if there is no limit.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 32,
        max_length: int | None = None,
    ) -> None:
        self.reader = SlotReader(model)
        if self.reader.task not in ("masked", "causal"):
            raise ValueError(
                f"{type(self.reader.model).__name__} is a {self.reader.task} model: load it with AutoModelForMaskedLM "
                "or AutoModelForCausalLM to score sentences."
            )
        if not tokenizer.is_fast:
            raise ValueError(f"{type(tokenizer).__name__} knows no character offsets: load the fast tokenizer.")
        self.task: Literal["masked", "causal"] = self.reader.task
        if self.task == "causal":
            check_next_word(model)
        self.tokenizer = tokenizer
        self.layout = Layout.of(tokenizer, self.task, self.reader.model.config)
        self.batch_size = whole("batch_size", batch_size)
        self.longest = longest_input(tokenizer, self.reader.model.config, max_length)
        starts = (tokenizer.bos_token_id, tokenizer.eos_token_id)
        self.start = next((token for token in starts if token is not None), None) if self.task == "causal" else None

    def encode(self, text: str) -> Encoding:
        """The tokens of a text as the model reads them; the text is never cut."""
        found = self.tokenizer(text, return_offsets_mapping=True, return_special_tokens_mask=True, verbose=False)
        ids, spans = list(found["input_ids"]), [tuple(span) for span in found["offset_mapping"]]
        added = list(found["special_tokens_mask"])
        if self.start is not None and not (added and added[0]):
            ids, spans, added = [self.start, *ids], [(0, 0), *spans], [1, *added]
        first = 1 if self.task == "causal" else 0  # a causal model does not predict the first token of a row
        places = [p for p in range(first, len(ids)) if not added[p]]
        unknown = frozenset(p for p in places if ids[p] == self.tokenizer.unk_token_id)
        return Encoding(text, ids, spans, places, unknown)

    def fits(self, encoding: Encoding) -> bool:
        """Whether the model can take the text as one row."""
        return self.longest is None or len(encoding.ids) <= self.longest

    def queries(self, encoding: Encoding, places: Sequence[int] | None = None) -> list[Row]:
        """The rows that give the scores of some tokens of a text, by default of all `encoding.places`.

        A causal model needs one row, a masked model needs one row for each token.
        """
        return self.rows_at(encoding.ids, encoding.places if places is None else list(places))

    def rows_at(self, ids: list[int], places: list[int]) -> list[Row]:
        """The rows that give the scores of the tokens at some places of a row."""
        together = [places] if self.task == "causal" else [[place] for place in places]
        return [self.layout.prediction_row(ids, chosen) for chosen in together]

    @on_cpu()
    def log_probabilities(self, rows: Sequence[Row]) -> list[Tensor]:
        """For every row the log-probabilities of its tokens, `(tokens,)` float32 on the CPU.

        Raises:
            ValueError: If a row is longer than the model's limit, or asks a causal model for its first token.
        """
        for row in rows:
            if self.longest is not None and len(row.ids) > self.longest:
                raise ValueError(f"A row has {len(row.ids)} tokens, more than {self.longest}: leave it out.")
            if min(row.positions, default=0) < 0:
                raise ValueError("A causal model does not predict the first token: put a start token before it.")
        found: list[Tensor] = [torch.empty(0)] * len(rows)
        order = sorted((i for i, row in enumerate(rows) if row.tokens), key=lambda i: len(rows[i].ids))
        with evaluating(self.reader.model):
            for start in range(0, len(order), self.batch_size):
                chosen = order[start : start + self.batch_size]
                filled = self.layout.padded([rows[i] for i in chosen])
                logits = self.reader.logits(filled)
                parts = in_float32(logits, filled.tokens.to(logits.device)[:, None])
                scores = torch.cat([part.log_softmax(-1).gather(1, goal)[:, 0] for part, goal in parts]).cpu()
                for i, own in zip(chosen, scores.split([len(rows[i].tokens) for i in chosen]), strict=True):
                    found[i] = own
        return found

    def sums(self, texts: Sequence[Sequence[Row]]) -> list[float]:
        """For each text the summed log-probability of the tokens that its rows predict."""
        parts = iter(self.log_probabilities([row for rows in texts for row in rows]))
        return [sum(float(next(parts).double().sum()) for _ in rows) for rows in texts]

    def losses(self, texts: str | Sequence[str], stride: int | None = None) -> list[Window]:
        """Losses on running text, every token scored once, window after window; windows never span two texts.

        Windows as long as the longest row (512 tokens if there is no limit) move on by `stride` tokens, by default half
        a window. Each window scores the tokens that earlier windows have not, so the context of a token is at least the
        rest of a window, unless the text is shorter. Raises a `ValueError` if a text has no token to score, or `stride`
        does not fit the window.
        """
        parts = []
        texts = [texts] if isinstance(texts, str) else list(texts)
        check_texts(texts)
        for number, text in enumerate(texts):
            encoding = self.encode(text)
            if not encoding.places:
                raise ValueError(f"Text {number} has no token to score: leave it out.")
            parts += [(encoding, *window) for window in self._windows(encoding, stride)]
        sums = self.sums([self.rows_at(ids, places) for _, ids, places, _ in parts])
        found = []
        for (encoding, _, _, scored), total in zip(parts, sums, strict=True):
            loss = 0.0 if total > 0 else -total  # a sum above 0 is due to rounding; NaN stays NaN
            found.append(Window(loss, len(scored), _bytes_of(encoding, scored)))
        return found

    def _windows(self, encoding: Encoding, stride: int | None) -> Iterator[tuple[list[int], list[int], list[int]]]:
        """Each window's tokens, the positions in the window that it scores, and their positions in the text."""
        first, last, longest = encoding.places[0], encoding.places[-1] + 1, self.longest or _LONGEST
        # A masked model sees its special tokens around every window, a causal model sees its start token once.
        lead, trail = (encoding.ids[:first], encoding.ids[last:]) if self.task == "masked" else ([], [])
        begin, room = (first, longest - len(lead) - len(trail)) if self.task == "masked" else (0, longest)
        most = room if self.task == "masked" else room - 1
        step = max(1, room // 2) if stride is None else whole("stride", stride)
        if room < 1 or step > most:
            raise ValueError(f"stride={step} in a window of {longest} tokens: write at most {most}.")
        scored_end = first
        while True:
            end = min(begin + room, last)
            scored = list(range(scored_end, end))
            shift = len(lead) - begin
            yield [*lead, *encoding.ids[begin:end], *trail], [p + shift for p in scored], scored
            if end == last:
                return
            scored_end, begin = end, begin + step


def _bytes_of(encoding: Encoding, scored: Sequence[int]) -> int:
    """The UTF-8 bytes from the end of the token before the first scored token to the end of the last scored token."""
    before = scored[0] - 1
    start = encoding.spans[before][1] if before >= 0 else 0
    is_last = scored[-1] == encoding.places[-1]
    end = len(encoding.text) if is_last else encoding.spans[scored[-1]][1]
    return len(encoding.text[start:end].encode())


@on_cpu()
def text_states(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    keep: Callable[[int, dict[str, Tensor]], T],
    *,
    all_layers: bool = False,
    batch_size: int = 64,
    max_length: int | None = None,
    truncate: bool = False,
) -> list[T]:
    """Return for each text what `keep` returns for its states.

    `keep` is called with the number of a text and its states, layer → `(tokens, width)` float32 on the CPU: the last
    state alone, or with `all_layers` all states, embeddings first. For an encoder-decoder these are the states of the
    encoder; active adapters take part. A text that is longer than the model's limit or `max_length` tokens is refused,
    or cut if `truncate` is True. Raises `ValueError` if there are no texts, or one is too long or has no token.
    """
    runner = Runner(text_encoder(model), [])
    longest = longest_input(tokenizer, runner.model.config, max_length)
    if isinstance(texts, str) or not len(texts):
        raise ValueError("There are no texts: give a list of at least one.")
    check_texts(texts)
    cut = {"truncation": True, "max_length": longest} if truncate and longest else {}
    rows = [list(tokenizer(text, verbose=False, **cut)["input_ids"]) for text in texts]
    if long := sum(longest is not None and len(row) > longest for row in rows):
        raise ValueError(f"{long} of {len(rows)} texts have more than {longest} tokens: write truncate=True to cut.")
    if not all(rows):
        raise ValueError(f"Text {[len(row) for row in rows].index(0)} has no tokens: leave it out.")
    pad = padding_of(tokenizer, runner.model.config)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    found: dict[int, T] = {}
    with evaluating(runner.model):
        runner.follow_head(padded_inputs([rows[i] for i in {order[0], order[-1]}], pad))
        for start in range(0, len(order), whole("batch_size", batch_size)):
            chosen = order[start : start + batch_size]
            inputs = padded_inputs([rows[i] for i in chosen], pad)
            output = runner.backbone_output({**inputs, "output_hidden_states": True} if all_layers else inputs)
            # In most architectures the last of the hidden states is last_hidden_state, which gets that name here.
            layers = {f"layer {i}": state for i, state in enumerate(output.hidden_states[:-1])} if all_layers else {}
            layers[FINAL] = last_hidden_state(output)
            layers = {name: state.float().cpu() for name, state in layers.items()}
            for row, i in enumerate(chosen):
                found[i] = keep(i, {name: state[row, : len(rows[i])] for name, state in layers.items()})
    return [found[i] for i in range(len(rows))]


def pooled_embeddings(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, pool: str = "mean", **options: Any
) -> Tensor:
    """One vector for each text, `(texts, width)` float32 on the CPU, from the last hidden states.

    `pool` is `"mean"` over all real positions, `"cls"` for the first of them or `"last"` for the last; another word
    raises a `ValueError`. The options and the other errors are those of `text_states`.
    """
    if pool not in ("mean", "cls", "last"):
        raise ValueError(f"pool={pool!r}: write 'mean', 'cls' or 'last'.")
    vectors = text_states(model, tokenizer, texts, lambda _, states: pooled_text(states[FINAL], pool), **options)
    return torch.stack(vectors)


def pooled_text(states: Tensor, pool: str) -> Tensor:
    """Pool the states of one text, `(tokens, width)`, into one vector `(width,)`; see `pooled`."""
    return pooled(states[None], torch.ones(1, len(states), dtype=torch.bool), pool)[0]
