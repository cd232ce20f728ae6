"""What a model's layers hold for some texts: pooled over each text, or at labelled tokens; computed once an entry."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.models import pooled
from hf_erasure.models.model import Runner, evaluating, last_hidden_state, text_encoder
from hf_erasure.models.slots import longest_input

from .treebank import Sentence

_LONGEST = 256  # tokens of a text; the rest of a longer one is cut off
FINAL = "last_hidden_state"


@dataclass(frozen=True)
class TokenStates:
    """States at labelled tokens.

    Attributes:
        layers: Layer → `(tokens, width)`.
        tags: One a token.
        sentences: The sentence of each token.
    """

    layers: dict[str, Tensor]
    tags: list[str]
    sentences: list[int]


class StateReader:
    """Hidden states by layer, the embeddings first and the last hidden state at the end.

    Args:
        model: With its adapters. Of an encoder-decoder the encoder is read, which sees the text as it is.
        tokenizer: Of the model.
        batch_size: Texts a forward.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int = 32) -> None:
        self.runner, self.tokenizer, self.batch_size = Runner(text_encoder(model), []), tokenizer, batch_size
        longest = longest_input(tokenizer, self.runner.model.config)
        self.longest = min(longest, _LONGEST) if longest else _LONGEST

    def pooled(self, texts: Sequence[str], pool: str = "mean") -> dict[str, Tensor]:
        """Layer → `(texts, width)`: the mean over the tokens of each text, its first or its last (`pool`)."""
        parts: dict[str, list[Tensor]] = {}
        for _, states, mask in self._batches(texts):
            for name, state in states.items():
                parts.setdefault(name, []).append(pooled(state, mask, pool))
        return {name: torch.cat(found) for name, found in parts.items()}

    def final(self, texts: Sequence[str]) -> list[Tensor]:
        """The last hidden states of each text, `(tokens, width)`."""
        found = []
        for _, states, mask in self._batches(texts, every=False):
            found += [state[real] for state, real in zip(states[FINAL], mask, strict=True)]
        return found

    def tagged(self, sentences: Sequence[Sentence], most: int) -> TokenStates:
        """States at tokens that have a tag, at most so many, evenly spread.

        Raises:
            ValueError: If the tokenizer cannot say where its tokens stand.
        """
        if not self.tokenizer.is_fast:
            raise ValueError("The tokenizer does not say where in a text its tokens stand, so words cannot be matched.")
        parts: dict[str, list[Tensor]] = {}
        tags: list[str] = []
        owners: list[int] = []
        for numbers, states, mask in self._batches([sentence.text for sentence in sentences]):
            for row, number in enumerate(numbers):
                encoded = self._encoded([sentences[number].text], offsets=True)
                found = sentences[number].tags([(int(a), int(b)) for a, b in encoded["offset_mapping"][0]])
                places = [place for place, tag in enumerate(found) if tag is not None]
                tags += [tag for tag in found if tag is not None]
                owners += [number] * len(places)
                for name, state in states.items():
                    parts.setdefault(name, []).append(state[row][mask[row]][places])
        keep = [index * len(tags) // most for index in range(most)] if len(tags) > most else list(range(len(tags)))
        layers = {name: torch.cat(rows)[keep] for name, rows in parts.items()}
        return TokenStates(layers, [tags[i] for i in keep], [owners[i] for i in keep])

    def _encoded(self, texts: Sequence[str], *, offsets: bool = False) -> Any:
        return self.tokenizer(
            list(texts), truncation=True, max_length=self.longest, return_offsets_mapping=offsets, verbose=False
        )

    def _batches(
        self, texts: Sequence[str], every: bool = True
    ) -> Iterator[tuple[list[int], dict[str, Tensor], Tensor]]:
        """Which texts, their states by layer `(batch, seq, width)` in float32, and which positions are real."""
        rows = self._encoded(texts)["input_ids"]
        if empty := [number for number, row in enumerate(rows) if not row]:
            raise ValueError(f"Text {empty[0]} has no tokens: leave it out.")
        padding = self.tokenizer.pad_token_id or 0
        for start in range(0, len(rows), self.batch_size):
            chosen = rows[start : start + self.batch_size]
            width = max(map(len, chosen))
            ids = torch.tensor([[*row, *[padding] * (width - len(row))] for row in chosen])
            mask = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in chosen])
            batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long()}
            with evaluating(self.runner.model):
                output = self.runner({**batch, "output_hidden_states": every})
            states = {}
            if every:
                # The last of these is last_hidden_state, in most architectures and with these names.
                states = {f"layer {depth}": state for depth, state in enumerate(output.hidden_states[:-1])}
            states[FINAL] = last_hidden_state(output)
            numbers = list(range(start, start + len(chosen)))
            yield numbers, {name: state.float().cpu() for name, state in states.items()}, mask
