"""Several fitted adapters made into one, and fits of several shards added."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peft import PeftConfig
from safetensors.torch import load_file, save_file

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.common.acting import warn_of_what_is_off, without
from hf_erasure.adapters.common.files import WEIGHTS
from hf_erasure.adapters.common.layer import adapter_children
from hf_erasure.adapters.common.lookup import adapter_of, adapters_in
from hf_erasure.adapters.common.model_state import undone_on_failure
from hf_erasure.adapters.common.provenance import RECORD, Provenance
from hf_erasure.adapters.erasure.layer import CHILD
from hf_erasure.adapters.merging.combine import combine_fitted
from hf_erasure.adapters.saving import staged
from hf_erasure.models import check_pool

from .checkpoint import FitCheckpoint
from .fit import conclude, solved
from .labels import labelled_by
from .sites import SiteStatistics, solve_site, task_for

# In an adapter's folder: the checkpoint of its fit.
FIT_FOLDER = "fit"


def combine_adapters(
    model: Any,
    names: Sequence[str],
    into: str,
    *,
    batches: Mapping[str, Iterable[Any]] | None = None,
    background: Iterable[Any] | None = None,
    sequential: bool = True,
    pool: str | None = None,
    resident_batches: int | None = None,
    sticky: bool = False,
    progress: bool = True,
) -> ConceptErasureConfig:
    """Make one erasure adapter that removes the concepts of several fitted ones.

    To switch several erasures on, as in `model.set_adapter(["gender", "pos"])`, is not the same. They act one after
    the other in the order in which they are switched on; the concept of the first is erased exactly, and of the others
    a part comes back, unless each was fitted while those before it were switched on.

    Without `batches` the new eraser of every site projects away the joint span of what the others subtract. Whatever
    had covariance with one of the concepts in the activations that its eraser was fitted on has none after it. Where
    all were fitted in one pass on the same rows, or with the same background, it is the eraser of the joint concept
    (LEACE, arXiv 2306.03819). But deeper sites receive other activations beside more erasers in front of them: there
    it is an approximation, and a warning says so.

    With `batches` the new adapter is fitted anew, as `fit_concept_erasure` does, on moments of all concepts. Each is
    labelled on batches of its own, which may be the same texts or others. That is exact at every site.

    The mean that is kept is that of the adapters, weighted by the rows that each has seen, or that of all batches. It
    moves all activations alike and has no influence on what can be read from them.

    Args:
        model: A model with fitted erasures, or whatever it is inside of.
        names: The adapters, at least two. Their order does not matter, and they stay as they are.
        into: The name of the new adapter.
        batches: Adapter → batches with the labels of its concept, as `fit_concept_erasure` takes them; in each
            process its own share.
        background: As in `fit_concept_erasure`; only with `batches`, as are the next three.
        sequential: Fit each site on activations that are already erased upstream.
        pool: As in `fit_concept_erasure`.
        resident_batches: How many batches keep their activations in memory.
        sticky: Whether the new adapter stays active when another is activated.
        progress: Show progress bars.

    Returns:
        The configuration of the new adapter. It is active afterwards as after `add_adapter` of this model: on a bare
        model it alone, and on a `PeftModel` those that were before; call `model.set_adapter(into)` there.

    Raises:
        ValueError: If there are not two adapters, one is unknown, not a concept erasure, not fitted or merged, if they
            differ in side, width or `affine`, if `into` is taken, or the batches do not fit; the model is as it was
            then.
    """
    if batches is None:
        if background is not None or resident_batches is not None:
            raise ValueError("background and resident_batches are for fitting anew: give batches={name: …} with them.")
        return combine_fitted(model, names, into, sticky=sticky)
    if set(batches) != set(names):
        raise ValueError(f"batches are given for {sorted(batches)}, but names={list(names)}: give them for each name.")
    check_pool(pool)
    places = adapters_in(model, ConceptErasureConfig)
    holder = next((place.holder for place in places if place.name in names), model)
    with undone_on_failure(holder, into, is_ours=True):
        combine_fitted(model, names, into, sticky=sticky, fitted_anew=True)
        concepts = {name: adapter_of(model, name, ConceptErasureConfig).config for name in names}
        task, first = task_for(model, into, batches[names[0]], pool, concept=concepts[names[0]], progress=progress)
        task.config.rank = sum(concept.max_rank for concept in concepts.values())
        given = {**batches, names[0]: first}
        sources = [labelled_by(concept, given[name], name, f"batches[{name!r}]") for name, concept in concepts.items()]
        warn_of_what_is_off(model, into, expected=names)
        made_of = task.config.provenance["combined_from"]
        # The concepts must be there to be fitted: their own adapters do not act meanwhile, sticky or not.
        with ExitStack() as stack:
            for name in names:
                for child in adapter_children(model, name):
                    stack.enter_context(child.without(name))
            fits, seen = solved(task, sources, background, sequential=sequential, resident_batches=resident_batches)
            conclude(task, fits, seen)
        task.config.provenance["combined_from"] = made_of
        task.config.provenance[RECORD] = without(task.config.provenance[RECORD], names)
    return task.config


# ---- fits of several shards ------------------------------------------------------------------------------------------


def merge_fits(one: str | Path, other: str | Path, output: str | Path) -> ConceptErasureConfig:
    """Solve for the erasers of two one-pass fits together, from their moments; no model and no data are needed.

    Args:
        one: An adapter folder with its moments in `fit/`, as `hf-erasure fit … fit.sequential=false
            fit.checkpoint=true` writes it.
        other: Another, fitted on other data of the same base with the same configuration.
        output: The adapter folder to write; its moments go along, so that a third can be added.

    Returns:
        The configuration of the new adapter.

    Raises:
        ValueError: If a folder has no moments, or the two fits are not of the same adapter and base.
    """
    config, added = _fitted_in_one_pass(one), _fitted_in_one_pass(other)
    _check_same(config, added)
    sites = list(config.fitted_sites or {})
    stores = [
        FitCheckpoint(
            Path(folder) / FIT_FOLDER,
            config,
            sites,
            pool=Provenance.of(config).pool,
            sequential=False,
            active=Provenance.of(config).active_adapters or (),
        )
        for folder in (one, other, output)
    ]
    labelled, background = _sum(stores, "labelled", config.z_dim), _sum(stores, "background", 0)
    if not labelled.moments:
        raise ValueError(f"{one} and {other} hold no moments: fit with fit.sequential=false fit.checkpoint=true.")
    seen = [labelled, background] if background.moments else [labelled]
    weights = load_file(Path(one) / WEIGHTS)
    config.fitted_sites = {}
    for site in sites:
        # A name ends like this, whatever the model that the adapter was saved from is called in front of it.
        keys = {part: f".{site}.{CHILD}.{CHILD}_{part}" for part in ("left", "right", "bias")}
        keys = {part: next(key for key in weights if f".{key}".endswith(end)) for part, end in keys.items()}
        fit, kept = solve_site(site, seen, config), weights[keys["left"]]
        for key, value in zip(keys.values(), fit.eraser.parts(kept.device, fit.dtype), strict=True):
            weights[key] = value.contiguous()
        config.fitted_sites[site] = {"width": fit.eraser.x_dim, "rank": fit.eraser.rank}
    for count in ("examples", "tokens"):
        config.provenance[count] += added.provenance[count]
    # What was measured of the first alone says nothing of the sum.
    config.provenance["leakage"] = {}
    with staged(Path(output)) as content:
        config.save_pretrained(str(content))
        save_file(weights, content / WEIGHTS, metadata={"format": "pt"})
    return config


def _fitted_in_one_pass(folder: str | Path) -> ConceptErasureConfig:
    config = PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, ConceptErasureConfig) or not config.fitted:
        raise ValueError(f"{folder} holds no fitted erasure.")
    if not (Path(folder) / FIT_FOLDER).is_dir():
        raise ValueError(
            f"{folder} has no moments in {FIT_FOLDER!r}: fit with fit.sequential=false fit.checkpoint=true. "
            "Sequential fits cannot be added, since each site depends on the erasers before it."
        )
    return config


def _check_same(one: ConceptErasureConfig, other: ConceptErasureConfig) -> None:
    """The moments' own folder checks the rest: sites, labels, method, pool."""
    known, others = Provenance.of(one), Provenance.of(other)
    if known.fingerprint != others.fingerprint:
        raise ValueError("The two erasures were fitted on different base models: their activations cannot be added.")
    if (known.active_adapters or []) != (others.active_adapters or []):
        raise ValueError(
            "The two erasures were fitted beside different active adapters: their activations cannot be added. Fit "
            "both with the same adapters on."
        )


def _sum(stores: list[FitCheckpoint], name: str, z_dim: int) -> SiteStatistics:
    """The moments of the first two stores, also written to the third."""
    found = SiteStatistics(z_dim), SiteStatistics(z_dim)
    batches = sum(store.load_moments(name, part)[0] for store, part in zip(stores, found, strict=False))
    whole, other = found
    if whole.moments.keys() != other.moments.keys():
        raise ValueError(f"Only one of the two fits has {name} moments: fit both with the same kind of data.")
    for site, moments in other.moments.items():
        whole.moments[site].merge(moments)
    whole.examples, whole.tokens = whole.examples + other.examples, whole.tokens + other.tokens
    if whole.moments:
        stores[-1].save_moments(name, whole, batches, "merged", final=True)
    return whole
