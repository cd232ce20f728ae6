"""The tuner that PEFT calls to attach, merge and remove erasures, and the default modules on which erasures act.

Concept scrubbing (arXiv 2306.03819, section 5) erases at every normalization layer. The final norm is included: on a
pre-LN model the norms inside the blocks feed only the sublayers and leave the residual stream as it was. The words
`"readers"` and `"writers"` stand for the linear maps that read the hidden state and for those that write it. Readers
that take the same tensor share an eraser.
"""

from __future__ import annotations

import copy
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from hf_erasure.models.flow import norms_of_hidden_state, wrapper_finder
from hf_erasure.models.streams import readers_of, writers_of

from ..common.config import short
from ..common.layer import RowAdapters
from ..common.lookup import adapter_of
from ..common.tuner import ChildTuner, keep_layers, resolve_patterns
from ..merging.plan import merge
from .config import ConceptErasureConfig
from .layer import ErasureLayer, erasure_layers, site_layers


def weights_of_word(model: nn.Module, config: ConceptErasureConfig) -> dict[str, list[list]]:
    """Site → the weights that read or make its activation, for `target_modules="readers"` or `"writers"`."""
    found = readers_of(model) if config.word == "readers" else [[weight] for weight in writers_of(model)]
    place = wrapper_finder(model)
    groups = [
        [(place(w.module), w.parameter, w.axis) for w in group if _is_own(w.module, place(w.module))] for group in found
    ]
    all_names = list(dict.fromkeys(name for group in groups for name, *_ in group))
    names = keep_layers(all_names, config)
    plain = resolve_patterns(config, *names)
    plain.target_modules = set(names)
    chosen = {name for name in names if BaseTuner._check_target_module_exists(plain, name)}
    if not chosen:
        raise ValueError(
            f"exclude_modules and layers_to_transform leave none of the {config.word} of {type(model).__name__}: "
            f"without them there are {short(all_names)}."
        )
    weights: dict[str, list[list]] = {}
    for group in groups:
        for entry in (left := [entry for entry in group if entry[0] in chosen]):
            weights.setdefault(left[0][0], []).append(list(entry))
    return weights


def _is_own(name: str, wrapper: str) -> bool:
    """Whether a module belongs to the model, and not to the adapter that has wrapped it."""
    inside = name.removeprefix(wrapper).strip(".").split(".")
    return set(inside) <= {"", "base_layer"} or inside[0] in ("original_module", "modules_to_save")


class ConceptErasureModel(ChildTuner):
    """The tuner that attaches one `ErasureLayer` to every targeted module; the modules themselves stay in place."""

    prefix: str = "concept_erasure_"
    tuner_layer_cls = ErasureLayer
    find_default = staticmethod(norms_of_hidden_state)

    def _find_word(self, config: Any) -> list[str]:
        config.weights = weights_of_word(self.model, config)
        return list(config.fitted_modules)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False, *, untie: bool = False
    ) -> None:
        """Write erasers into the weights, at every site or, if one site cannot take them, at none.

        An erasure at a norm goes into the linear layers that take the norm's output. The model's output stays the same,
        but `output_hidden_states`, and any other code that reads a norm's output, then gets states without the erasures
        at norms.

        Args:
            adapter_names: The adapters, in the order in which they act; those that are active by default.
            safe_merge: Refuse weights that are not finite.
            untie: Where an eraser goes into a table that several modules share, such as the embedding and the head,
                give each module its own table. The model gets larger by one table, and its configuration gets
                `tie_word_embeddings=False`. `unmerge_adapter` ties them again.

        Raises:
            ValueError: If a site cannot be merged exactly; the message names it and says what to do instead.
        """
        self._check_merge_allowed()
        merge(self.model, self._adapters_to_merge(adapter_names), safe_merge=safe_merge, untie=untie)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        untie: bool = False,
    ) -> nn.Module:
        """Do as `merge_adapter` does, and return the plain model."""
        plain: nn.Module = self._unload_and_optionally_merge(True, progressbar, safe_merge, adapter_names, untie=untie)
        return plain

    def _check_mixed_batch(self, rows: RowAdapters) -> None:
        if self.training:
            raise ValueError(
                f"adapter_names={[*rows.names]} is for inference, and the model is in training mode: call eval() first."
            )


def set_strength(model: nn.Module, adapter_name: str, strength: float) -> None:
    """Change in place how far an erasure moves activations, without fitting it again.

    Args:
        model: A model with a fitted erasure, or a module that contains this model.
        adapter_name: The adapter. A later save, merge or export uses the new strength.
        strength: 0 leaves activations as they are, 1 erases, 2 mirrors them at the mean, or at the `target`.

    Raises:
        ValueError: If the adapter is not found, not fitted or merged, or the strength is out of range.
    """
    _set_dial_field(model, adapter_name, "strength", strength)


def set_target(model: nn.Module, adapter_name: str, target: str | list[float] | None) -> None:
    """Change in place where an erasure moves activations to, without fitting it again.

    Args:
        model: A model with a fitted erasure, or a module that contains this model.
        adapter_name: The adapter. A later save, merge or export uses the new target.
        target: The label of a class, shares of the classes, or values of a concept without classes, as in the
            configuration; None for the common mean.

    Raises:
        ValueError: If the adapter is not found, not fitted or merged, or the fit has no readings of the target.
    """
    _set_dial_field(model, adapter_name, "target", target)


def _set_dial_field(model: nn.Module, adapter_name: str, name: str, value: Any) -> None:
    """Change a field of a fitted erasure's configuration from which dials are made, and make the dials anew."""
    found = adapter_of(model, adapter_name, ConceptErasureConfig)
    if not found.config.fitted:
        raise ValueError(f"Adapter {adapter_name!r} was never fitted. {found.config.remedy}")
    for layer in erasure_layers(found.owner, adapter_name).values():
        layer.refuse_if_merged(adapter_name)
    dialled = copy.copy(found.config)
    setattr(dialled, name, value)
    dialled.__post_init__()
    setattr(found.config, name, getattr(dialled, name))
    for layer in site_layers(found.owner, adapter_name).values():
        layer.erasures[adapter_name].dial = dialled.dial
