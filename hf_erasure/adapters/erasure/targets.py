"""Which modules an erasure acts on when the user names none: the norms of the blocks, and the final norm.

Concept scrubbing (arXiv 2306.03819, section 5) erases at every normalization layer. The final norm belongs to them: on
a pre-LN model the norms inside the blocks feed the sublayers only and leave the residual stream as it was.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

# Norms registered before the blocks are those of the embeddings, unless their name says that they come last.
_LAST = re.compile(r"final|last|post|(^|_)f$")
# Batch, group and instance norms act on channels of images, not on a hidden state.
_CHANNEL_NORMS = re.compile(r"(batch|group|instance)_?norm", re.IGNORECASE)
# Norms of single attention heads (q_norm, k_layernorm, kv_a_layernorm …) do not see the hidden state either.
_HEAD_NORM = re.compile(r"^(q|k|v|kv|query|key|value)(_[a-z])?_?(layer)?_?norm$")
_INDEX = re.compile(r"(?:^|\.)(?P<list>[^.]*)\.(?P<index>\d+)(?:\.|$)")


def default_targets(model: nn.Module) -> list[str]:
    """Names of the normalization layers inside the blocks, and of the final norms, in the model's order.

    Raises:
        ValueError: If the model has no list of blocks, or no normalization layer in them.
    """
    blocks = [name for name, module in model.named_modules() if _is_block_list(module)]
    # A list of experts or of convolutions inside a block is part of that block.
    outermost = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    inside = [name for name, module in model.named_modules() if _is_norm(name, module) and _is_within(name, outermost)]
    if not inside:
        raise ValueError(
            f"No normalization layer was found inside the blocks of {type(model).__name__}, so there is no default for "
            "target_modules. Name the modules whose output is to be erased, e.g. target_modules=['layer.0', 'layer.1']."
        )
    chosen = {*inside, *_final_norms(model, outermost)}
    return [name for name, _ in model.named_modules() if name in chosen]


def keep_layers(names: list[str], layers: int | list[int], pattern: str | list[str] | None) -> list[str]:
    """Keep the names whose first layer index is among `layers`, as PEFT reads `layers_to_transform`."""
    wanted = {layers} if isinstance(layers, int) else set(layers)
    patterns = [pattern] if isinstance(pattern, str) else list(pattern or [])
    return [name for name in names if _layer_index(name, patterns) in wanted]


def is_fitted_at(config: PeftConfig, name: str, places: Container[str]) -> Any:
    """Whether a fitted adapter acts at a module: where it was fitted, whatever else a pattern matches in this model.

    Of the rest it is only told what `exclude_modules` left out, or PEFT would warn that this left out nothing.
    """
    if name in places:
        return True
    found = BaseTuner._check_target_module_exists(config, name)
    return False if found else found


def _layer_index(name: str, patterns: list[str]) -> int | None:
    for match in _INDEX.finditer(name):
        if not patterns or match["list"] in patterns:
            return int(match["index"])
    return None


def _is_block_list(module: nn.Module) -> bool:
    """Blocks are a list of modules of several parts, with matrices among them; convolutions alone are no blocks."""
    if not isinstance(module, nn.ModuleList) or not len(module) or not any(True for _ in module[0].children()):
        return False
    return any(parameter.dim() == 2 for parameter in module[0].parameters())


def _is_norm(name: str, module: nn.Module) -> bool:
    kind = type(module).__name__
    if "norm" not in kind.lower() or _CHANNEL_NORMS.search(kind) or _HEAD_NORM.match(name.rpartition(".")[2]):
        return False
    # Adapters may hang below a norm, parts of a model may not.
    return not any(isinstance(child, nn.Linear) for child in module.modules())


def _is_within(name: str, containers: list[str]) -> bool:
    return any(name.startswith(f"{container}.") for container in containers)


def _final_norms(model: nn.Module, block_lists: list[str]) -> Iterator[str]:
    """The norm that follows a list of blocks: a sibling of the list, or of a module that contains it."""
    for block_list in block_lists:
        path = block_list.split(".")
        for depth in range(len(path) - 1, -1, -1):
            parent_name = ".".join(path[:depth])
            siblings = list(model.get_submodule(parent_name).named_children())
            position = [name for name, _ in siblings].index(path[depth])
            for index, (name, module) in enumerate(siblings):
                # OPT registers its final norm before its layers; BART that of its embeddings after them.
                follows = index > position or _LAST.search(name)
                if follows and _is_norm(name, module) and "embed" not in name:
                    yield f"{parent_name}.{name}" if parent_name else name
