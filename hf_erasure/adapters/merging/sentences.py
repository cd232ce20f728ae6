"""An erasure of the last hidden state as a `Dense` module behind the pooling, for sentence-transformers alone.

A mean of tokens, or one of them, commutes with an affine map. So where the erasure acts on the last hidden state and on
nothing before it, the embedding that is pooled of plain states and then erased is the one of erased states.
"""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import last_hidden_state

from ..common.acting import adapters_now
from ..common.layer import adapter_children
from ..common.lookup import Found, adapter_of
from ..erasure.config import ConceptErasureConfig
from ..erasure.layer import ErasureLayer, erasure_layers, hidden_of_output

# Means of tokens whose weights add up to one, and single tokens.
_AFFINE = ("mean", "cls", "lasttoken", "weightedmean")
# Sums of tokens with weights that do not.
_LINEAR = ("mean_sqrt_len_tokens",)
_DEEPER = "fit one with target_modules=[…] that names the module which returns the last hidden state, and no other"


def export_to_sentence_transformers(model: nn.Module, adapter_name: str, folder: str | Path) -> Path:
    """Write an erasure of the last hidden state as an ordinary SentenceTransformer, which loads without this package.

    Its modules are the plain transformer, the pooling, a `Dense` module that erases, and what came behind the pooling.

    Args:
        model: The SentenceTransformer whose transformer has the adapter. It is not changed.
        adapter_name: The adapter; it is exported as it acts alone.
        folder: Where the SentenceTransformer is written.

    Returns:
        The folder.

    Raises:
        ValueError: If the adapter also acts before the last hidden state, or the pooling does not commute with it, or
            the model is another one; says what to do instead.
        ImportError: If sentence-transformers is not installed.
    """
    try:
        library: Any = importlib.import_module("sentence_transformers")
        modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError as error:
        raise ImportError(
            "This needs sentence-transformers 5.4 or later: pip install -U sentence-transformers"
        ) from error
    found = adapter_of(model, adapter_name, ConceptErasureConfig)
    layer = _only_site(found)
    left, right, mean = (part.detach().double().cpu() for part in layer.eraser_state(adapter_name))
    if not isinstance(model, library.SentenceTransformer):
        raise ValueError(
            f"A {type(model).__name__} has no pooling to stand behind: pass a SentenceTransformer, as of modules=["
            "models.Transformer(folder), models.Pooling(width, 'mean')], with the adapter on its transformer."
        )
    whole = copy.deepcopy(model)
    owner: Any = whole.get_submodule(found.path)
    for child in adapter_children(owner):
        child.detach()
    owner.__dict__.pop("peft_config", None)
    owner._hf_peft_config_loaded = False
    parts = list(whole)
    if len(parts) < 2 or not isinstance(parts[0], modules.Transformer) or not isinstance(parts[1], modules.Pooling):
        raise ValueError(
            f"The first two modules of this SentenceTransformer are {[type(part).__name__ for part in parts[:2]]}, and "
            "the erasure is to stand right behind a Transformer and a Pooling: share the adapter instead."
        )
    # It pools in one way, or in several side by side.
    modes = [parts[1].pooling_mode] if isinstance(parts[1].pooling_mode, str) else list(parts[1].pooling_mode)
    offset = left @ (right @ mean)
    for mode in modes:
        if mode not in (*_AFFINE, *(_LINEAR if not bool(offset.any()) else ())):
            remedy = "fit it with affine=False, or " if mode in _LINEAR else ""
            raise ValueError(
                f"pooling by {mode!r} does not commute with the erasure {adapter_name!r}, so that no module behind it "
                f"erases the same: {remedy}share the adapter instead."
            )
    erased = torch.block_diag(*[torch.eye(len(left), dtype=left.dtype) - left @ right] * len(modes))
    weight = next(p for p in found.owner.parameters() if p.is_floating_point())
    dense = modules.Dense(
        len(erased),
        len(erased),
        bias=bool(offset.any()),
        activation_function=nn.Identity(),
        init_weight=erased.to(weight.dtype),
        init_bias=offset.repeat(len(modes)).to(weight.dtype) if bool(offset.any()) else None,
    )
    options = {key: getattr(whole, key) for key in ("prompts", "default_prompt_name", "similarity_fn_name")}
    made = library.SentenceTransformer(modules=[*parts[:2], dense, *parts[2:]], device=str(weight.device), **options)
    made.save_pretrained(str(folder))
    return Path(folder)


def _only_site(found: Found[ConceptErasureConfig]) -> ErasureLayer:
    """The layer that erases the last hidden state; refused where there are others, or it is not that."""
    name, owner = found.name, found.owner
    if not found.config.fitted:
        raise ValueError(f"The erasure {name!r} was never fitted: call fit_concept_erasure(model, batches, {name!r}).")
    layers = erasure_layers(owner, name)
    others = [other for other in adapters_now(owner).acting if other != name]
    merged = [child.path for child in adapter_children(owner) if child.merged]
    if others or merged:
        raise ValueError(
            f"The erasure {name!r} is exported as it acts alone, with the weights as they are, and "
            f"{others or merged} changes them, too: merge or delete the others, and take back what is merged, first."
        )
    acting = [path for path, layer in layers.items() if layer.eraser_state(name)[0].shape[-1]]
    last = next((path for path in acting if _is_last(owner, layers[path], name)), None)
    deeper = [path for path in acting if path != last]
    if last is None or deeper:
        where = (
            f"it acts at {len(deeper)} modules before it, the first is {deeper[0]!r}" if deeper else "it does nothing"
        )
        raise ValueError(
            f"The erasure {name!r} does more than to erase the last hidden state of {type(owner).__name__}: {where}. "
            f"A module behind the pooling cannot do that: {_DEEPER}, or share the adapter instead."
        )
    return layers[last]


def _is_last(owner: nn.Module, layer: ErasureLayer, name: str) -> bool:
    """Whether what a site gives is the very tensor that the model returns as its last hidden state."""
    if layer.concept_erasure_site[name] != "output":
        return False
    given: list[Tensor] = []
    returned: list[Tensor] = []
    handle = layer.host.register_forward_hook(lambda *call: given.append(hidden_of_output(call[2], layer.path)))

    def watch(call: Any) -> None:
        given.clear()
        returned[:] = [last_hidden_state(call())]

    try:
        dummy_batch(owner, watch)
    finally:
        handle.remove()
    return len(given) == 1 and given[0].data_ptr() == returned[0].data_ptr() and given[0].shape == returned[0].shape
