"""What to do about an erasure that does not merge, in the words of a message."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from hf_erasure.models.model import is_norm
from hf_erasure.models.streams import readers_of, writers_of

from ..common.layer import innermost
from ..common.placement import tied_to
from ..erasure.layer import ErasureLayer
from .record import why_not_mergeable
from .untying import why_not_untied


def preset(model: nn.Module, layers: Iterable[ErasureLayer]) -> str:
    """The remedy of an erasure at norms that does not merge: the word for sites that do; empty where none does."""
    if not all(is_norm(innermost(layer.host)) for layer in layers):
        return ""
    for word in ("readers", "writers"):
        try:
            groups = readers_of(model) if word == "readers" else [writers_of(model)]
        except ValueError:
            continue
        side, weights = "input" if word == "readers" else "output", [weight for group in groups for weight in group]
        modules = {weight.module: innermost(model.get_submodule(weight.module)) for weight in weights}
        if all(why_not_mergeable(modules[w.module], side, w.parameter) is None for w in weights):
            tied = [name for name in modules if tied_to(model, name)]
            untie = f", with untie=True for {tied}" if tied else ""
            told = "the documentation has how much the figures differ, under 'Where to erase'"
            return f"Fit it again with target_modules={word!r}, which merges in this model{untie} ({told}). "
    return ""


def tied_words(model: nn.Module, path: str, names: list[str]) -> str:
    """What shares a weight, and whether a merge may untie it, in words that follow "its weight"."""
    reason = why_not_untied(model, path)
    way = "A merge with untie=True (on the command line --untie) gives it a table of its own"
    return (
        f"is shared by {names}, which would change too. {way if reason is None else f'It cannot be untied: {reason}'}"
    )


def is_head(model: nn.Module, path: str) -> bool:
    """Whether a module is the head of a model that predicts words."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    return head is not None and model.get_submodule(path) is head
