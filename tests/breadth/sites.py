"""The default sites of every type: signs of wrong sites, and `sites.txt`, a list for people to read.

The signs come from names, and from the values at the end of the model. The package uses another method: it follows the
forward pass (`hf_erasure/models/flow.py`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn

from tests.breadth.examples import Batch, call
from tests.breadth.outcomes import tensors
from tests.breadth.truth import activations, is_norm

LISTED = Path(__file__).parent / "sites.txt"
_QUERIES_OR_KEYS = re.compile(r"(^|[._])(q|k|query|key|kv|qk)[a-z]?_?(layer)?_?(norm|ln)", re.IGNORECASE)
_BEFORE_BLOCKS = re.compile(r"embed|patch", re.IGNORECASE)
# Names of norms that are rightly left out. Downsampling between stages and convolutions for positions are in lists, but
# are not blocks. Inside blocks: norms of queries and keys and of their inputs (Mistral's indexer; PVT and SegFormer
# normalise the shortened sequence), of a convolution's state between its projections (Conformer), and of a mixer's
# state before its gate (MiniMax, xLSTM).
_OF_NO_BLOCK = re.compile(
    r"\b[qk]_?(layer)?norm|pos_conv|patch|embed|sub_norm|ffn_sub|downsampl|feature_extractor|router|projector"
    r"|attention\.(self\.)?(sequence_reduction\.)?layer_norm|indexer|conv(_module)?\.(depthwise_layer_)?norm"
    r"|self_attn\.norm|multihead_norm"
)
# Stages of image models, and EfficientNet's blocks, each have a width of their own.
_IN_STAGE = re.compile(r"stages|(layers|levels)\.\d+\.(blocks|downsample|layers|output_layer)|projection\.project_bn")
_TOWERS = re.compile(r"(vision|visual|image|audio|speech)", re.IGNORECASE)
# The fields of configurations that hold the width of the hidden state.
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "emb_dim", "dim_model")
_ODD = {
    "never called": "no forward pass calls it",
    "final": "the final norm is not among the sites",
    "heads": "a norm of queries or keys",
    "before": "a norm before the blocks",
    "width": "not as wide as a hidden state",
    "left out": "norms of blocks that are not among the sites",
}


def odd_of(model: nn.Module, batch: Batch, sites: Sequence[str]) -> dict[str, list[str]]:
    """Sign of wrong default sites → the modules that show it."""
    norms = [name for name, module in model.named_modules() if is_norm(module)]
    given = {name: value for (name, _), value in activations(model, {*norms, *sites}, batch).items()}
    final = _final(model, batch, given)
    found = {
        "never called": [name for name in sites if name not in given],
        "final": [name for name in _of_sides_with(sites, final) if name not in sites],
        "heads": [name for name in sites if _QUERIES_OR_KEYS.search(name)],
        "before": [
            name for name in sites if _BEFORE_BLOCKS.search(name) and name not in final and not _is_in_block(name)
        ],
        # A last projection, such as SAM's neck, may change the width.
        "width": [name for name in _of_other_widths(model, given, sites) if name not in final],
        "left out": _left_out(given, sites, len(batch["concept_labels"])),
    }
    return {_ODD[what]: names for what, names in found.items() if names}


def _is_in_block(name: str) -> bool:
    return re.search(r"\.\d+\.", name) is not None


def _of_sides_with(sites: Sequence[str], names: Iterable[str]) -> list[str]:
    """The names that are not in a tower, or all names if there are sites in towers; default sites are for the text."""
    has_towers = any(_TOWERS.search(name) for name in sites)
    return [name for name in names if has_towers or not _TOWERS.search(name)]


def _final(model: nn.Module, batch: Batch, given: dict[str, Tensor]) -> list[str]:
    """The modules whose output equals the model's last hidden state."""
    last = [value for path, value in tensors(call(model, batch)).items() if "last_hidden_state" in path]
    return [
        name
        for name, value in given.items()
        if any(value.numel() == end.numel() and torch.equal(value.flatten(), end.flatten()) for end in last)
    ]


def _of_other_widths(model: nn.Module, given: dict[str, Tensor], sites: Sequence[str]) -> list[str]:
    config = model.config
    parts = [config, *(part for part in vars(config).values() if hasattr(part, "model_type"))]
    values = [getattr(part, name, None) for part in parts for name in _WIDTHS]
    widths = {width * many for width in values if isinstance(width, int) for many in (1, 2)}
    if not widths or any(isinstance(width, (list, tuple)) for width in values):
        return []  # each stage has a width of its own
    return [
        name
        for name in sites
        if name in given and not set(given[name].shape[1:]) & widths and not _IN_STAGE.search(name)
    ]


def _left_out(given: dict[str, Tensor], sites: Sequence[str], rows: int) -> list[str]:
    """Norms in lists of blocks, on a side with sites, whose outputs have the shape of the sites' outputs."""
    forms = {given[name].shape for name in sites if name in given}
    return [
        name
        for name in _of_sides_with(sites, given)
        if name not in sites and given[name].shape in forms and given[name].dim() == 3 and given[name].shape[0] == rows
        if _is_in_block(name) and not _OF_NO_BLOCK.search(name)
    ]


# ---- the list --------------------------------------------------------------------------------------------------------


def collapsed(names: Iterable[str]) -> list[str]:
    """Write names that differ only in numbers as one, `layer.{0,1}.norm`, in the order of the first names."""
    numbers: dict[tuple[str, ...], list[tuple[str, ...]]] = defaultdict(list)
    for name in names:
        parts = re.split(r"(?<=\.)(\d+)(?=\.|$)", name)
        numbers[tuple(parts[::2])].append(tuple(parts[1::2]))
    return [line for between, found in numbers.items() for line in _lines(between, found)]


def _lines(between: tuple[str, ...], found: list[tuple[str, ...]]) -> list[str]:
    slots = [list(dict.fromkeys(slot)) for slot in zip(*found, strict=True)]
    if sorted(product(*slots)) != sorted(found):
        # Inner lists of different lengths get one line for each entry of the outer list.
        return [line for first in slots[0] for line in _lines(between, [one for one in found if one[0] == first])]
    told = [slot[0] if len(slot) == 1 else f"{{{','.join(slot)}}}" for slot in slots]
    return ["".join(part for pair in zip(between, [*told, ""], strict=True) for part in pair)]


def listed(path: Path = LISTED) -> dict[str, list[str]]:
    """Type → its lines in a list, which is that of the default sites unless another path is given."""
    found: dict[str, list[str]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("    "):
            found[next(reversed(found))].append(line.strip())
        elif line and not line.startswith("#"):
            found[line] = []
    return found


def write(found: dict[str, Iterable[str]]) -> None:
    """Write the list again; types that are not in `found` keep their lines."""
    lines = [
        "# The default sites of an erasure on small models of every type; {0,1} stands for both.",
        "# `make matrix` writes it, with tests/breadth.",
    ]
    for name, sites in sorted((listed() | found).items()):
        lines += ["", name, *(f"    {site}" for site in sites)]
    LISTED.write_text("\n".join(lines) + "\n", encoding="utf-8")
