"""Combine several fitted adapters into one, and add fits of several shards."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import nn

from hf_erasure._version import __version__
from hf_erasure.adapters import ConceptErasureConfig, ErasureLayer, erasure_layers, site_layers
from hf_erasure.adapters.common.acting import (
    auxiliary_wrappers,
    undone_on_failure,
    warn_of_inactive,
    warn_of_switched_off,
)
from hf_erasure.adapters.common.config import ACTIVE, RECIPE, Provenance
from hf_erasure.adapters.common.files import WEIGHTS
from hf_erasure.adapters.common.layer import adapter_children
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.adapters.common.tuner import exact_targets
from hf_erasure.adapters.erasure.config import CONCEPT_ERASURE
from hf_erasure.adapters.erasure.layer import CHILD
from hf_erasure.adapters.loading.fingerprint import record_without
from hf_erasure.adapters.saving import staged_save
from hf_erasure.erasers import Eraser, combine_erasers
from hf_erasure.models.model import as_attribute, base_of, on_cpu

from .checkpoint import FitCheckpoint
from .fit import finish_fit, solve_sites
from .labels import SiteStatistics, Source
from .report import rows_in_words
from .sites import SiteFit, known_readings, solve_site, task_for

# The folder of the checkpoint of a fit, in the adapter's folder.
FIT_FOLDER = "fit"
# Stands for what identifies the batches of a fit, in moments that were added up.
_MERGED = "merged"


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

    This differs from activating several erasures, as in `model.set_adapter(["gender", "pos"])`. Active erasures act one
    after the other in the order of activation: the concept of the first is erased exactly, and a part of each of the
    others comes back, unless each was fitted while those before it were active.

    Without `batches` the new eraser of every site projects away the joint span of what the others subtract. On the
    activations that an eraser was fitted on, no covariance with its concept is left after the new one. If all were
    fitted in one pass on the same rows, or with the same background, it is the eraser of the joint concept (LEACE,
    arXiv 2306.03819). But deeper sites receive other activations, since more erasers act before them: there it is an
    approximation, and a warning is given.

    With `batches` the new adapter is fitted anew, as `fit_concept_erasure` does, on moments of all concepts. Each
    concept is labelled on its own batches, which may be the same texts or others. That is exact at every site.

    The mean that is kept is that of the adapters, weighted by the rows that each has seen, or that of all batches. It
    moves all activations alike and has no influence on what can be read from them.

    Args:
        model: A model with fitted erasures, or a module that contains it.
        names: The names of the adapters, at least two, in any order. The adapters are not changed.
        into: The name of the new adapter.
        batches: Name of an adapter → batches with the labels of its concept, as `fit_concept_erasure` takes them; each
            process gives its own share.
        background: As in `fit_concept_erasure`. It is used only with `batches`, and so are the next three.
        sequential: Fit each site on activations that are already erased upstream.
        pool: As in `fit_concept_erasure`.
        resident_batches: How many batches keep their activations in memory.
        sticky: Whether the new adapter stays active when another is activated.
        progress: Show progress bars.

    Returns:
        The configuration of the new adapter. Active adapters are those that `add_adapter` of this model leaves active:
        on a bare model only the new one, and on a `PeftModel` those from before; call `model.set_adapter(into)` there.

    Raises:
        ValueError: If fewer than two adapters are named, one is unknown, not a concept erasure, not fitted or merged,
            if they differ in side, width or `affine`, if `into` is taken, or the batches do not fit. The model is left
            as it was.
    """
    if batches is not None:
        if set(batches) != set(names):
            raise ValueError(
                f"batches are given for {sorted(batches)}, but names={list(names)}: give them for each name."
            )
    elif background is not None or resident_batches is not None:
        raise ValueError("background and resident_batches are for fitting anew: give batches={name: …} with them.")
    concepts, holder = _check_combinable(model, names, into)
    if batches is None:
        config = _add_adapter(holder, concepts, into, sticky)
        if len(config.fitted_sites or ()) > 1:
            warnings.warn(
                f"{into!r} was combined from erasers that were fitted while the other concepts were not erased "
                "upstream. It is exact at the sites whose input the other adapters do not change, such as the first "
                "one; all of them change the input of deeper sites. To erase the concepts from the whole network, "
                "fit anew: give batches={name: …} with the labels of each.",
                stacklevel=2,
            )
        return config
    with undone_on_failure(holder, into, is_ours=True):
        _add_adapter(holder, concepts, into, sticky)
        task, first = task_for(model, into, batches[names[0]], pool, concept=concepts[names[0]], progress=progress)
        task.config.rank = sum(concept.max_rank for concept in concepts.values())
        labelled = {**batches, names[0]: first}
        sources = [Source(c, labelled[name], f"batches[{name!r}]", batches[name]) for name, c in concepts.items()]
        warn_of_inactive(model, into, expected=names)
        combined_from = task.config.provenance["combined_from"]
        # The concepts must not be erased while they are fitted: their own adapters are off, sticky or not.
        with ExitStack() as stack:
            for name in names:
                for child in adapter_children(model, name):
                    stack.enter_context(child.suspend(name))
            fits = solve_sites(task, sources, background, sequential, resident_batches)
            finish_fit(task, sources, fits)
        task.config.provenance["combined_from"] = combined_from
        task.config.provenance[ACTIVE] = record_without(task.config.provenance[ACTIVE], names)
    return task.config


# ---- from the erasers of adapters ------------------------------------------------------------------------------------


def _add_adapter(model: Any, configs: dict[str, ConceptErasureConfig], into: str, sticky: bool) -> ConceptErasureConfig:
    """Add an adapter to the model that holds the others, with erasers combined from theirs; return its configuration.

    It is added in the way of this model. A warning that the combined adapters are switched off is not needed.
    """
    parts = {name: site_layers(model, name) for name in configs}
    sites = _combined_sites(model, configs, parts)
    config = _combined_config(configs, sites, sticky)
    if isinstance(model, PeftModel) and model.peft_type != CONCEPT_ERASURE:
        raise ValueError(
            f"This PeftModel takes {getattr(model.peft_type, 'value', model.peft_type)} adapters only: call "
            "combine_adapters(model.get_base_model(), …)."
        )
    base = base_of(model) if isinstance(model, PeftModel) else model
    config.target_modules = exact_targets(list(config.fitted_modules), base)
    with warnings.catch_warnings(), warn_of_switched_off(model, into, expected=list(configs)):
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        if isinstance(model, PeftModel):
            model.add_adapter(into, config)
        elif hasattr(model, "add_adapter"):
            model.add_adapter(config, adapter_name=into)
        else:
            inject_adapter_in_model(config, model, adapter_name=into)
    for place, wrapper in auxiliary_wrappers(base).items():
        copies: Any = wrapper._modules.get("modules_to_save") or {}
        for name in [name for name in configs if name in copies]:
            pairs = zip(copies[name].parameters(), wrapper.original_module.parameters(), strict=True)
            if any(not torch.equal(one, other) for one, other in pairs if not other.is_meta):
                warnings.warn(f"{into!r} is combined without the trained {place!r} of {name!r}.", stacklevel=3)
    for path, layer in site_layers(model, into).items():
        kept = {parts[name][path].eraser_state(name)[0].dtype for name in configs if path in parts[name]}
        dtype = torch.float64 if torch.float64 in kept else torch.float32
        axes = layer.erasures[into].axis, layer.erasures[into].examples
        layer.set_eraser(into, sites[path], dtype, *axes)
    attached: ConceptErasureConfig = model.peft_config[into]
    return attached


def _check_combinable(model: Any, names: Sequence[str], into: str) -> tuple[dict[str, ConceptErasureConfig], Any]:
    """Check that adapters can be combined, and return their configurations and the model that holds them."""
    if isinstance(names, str) or len(set(names)) < max(2, len(names)):
        raise ValueError(f"names={names!r}: give the names of at least two adapters, each once, as ['gender', 'pos'].")
    adapters = [adapter_of(model, name, ConceptErasureConfig) for name in names]
    holder = adapters[0].holder
    if any(entry.owner is not adapters[0].owner for entry in adapters):
        places = {entry.name: as_attribute(entry.path) for entry in adapters}
        raise ValueError(f"The adapters are on different models, {places}: combine those of one.")
    if into in holder.peft_config:
        raise ValueError(f"into={into!r} is the name of an adapter that is there already: choose another name.")
    for entry in adapters:
        if not entry.config.fitted:
            raise ValueError(f"Adapter {entry.name!r} was never fitted. {entry.config.remedy}")
        if entry.config.dial is not None:
            raise ValueError(
                f"Adapter {entry.name!r} has strength={entry.config.strength:g} and target={entry.config.target!r}: "
                "what is combined has strength=1 and no target. Call set_strength of the combined one afterwards."
            )
    configs = {entry.name: entry.config for entry in adapters}
    for field, remedy in (
        ("site", "only erasers at the same side of a module act on the same activations"),
        ("affine", "fit all of them with the same"),
    ):
        values = {name: getattr(config, field) for name, config in configs.items()}
        if len({*values.values()} - {None}) > 1:
            raise ValueError(f"The adapters differ in {field}, {values}: {remedy}.")
    return configs, holder


def _combined_sites(
    model: nn.Module, configs: dict[str, ConceptErasureConfig], parts: dict[str, dict[str, ErasureLayer]]
) -> dict[str, Eraser]:
    """The eraser of every site that one of the adapters acts on, in the model's order."""
    for name, layers in parts.items():
        for layer in layers.values():
            layer.refuse_if_merged(name)
            layer.check_values(name)
    sites = {}
    for path in erasure_layers(model):
        # In alphabetical order, so that the same adapters give the same eraser to the bit.
        names = [name for name in sorted(configs) if path in parts[name]]
        if not names:
            continue
        erasers = []
        for name in names:
            left, right, bias = (part.cpu() for part in parts[name][path].eraser_state(name))
            # If fitting chose the map (`affine` is None), the bias of a site tells which it has.
            is_affine = bool(bias.any()) if configs[name].affine is None else configs[name].affine
            erasers.append(Eraser(left, right, bias if is_affine else None))
        # A linear eraser that the user did not ask for keeps the mean of an affine one at the same site.
        mean = next((eraser.bias for eraser in erasers if eraser.bias is not None), None)
        for place, (name, eraser) in enumerate(zip(names, erasers, strict=True)):
            if configs[name].affine is None and eraser.bias is None:
                erasers[place] = Eraser(eraser.left, eraser.right, mean)
        if len({parts[name][path].erasures[name].axis for name in names}) > 1:
            raise ValueError(f"At {path!r} {names} cannot be combined: they erase along different axes.")
        rows = [float(Provenance.of(configs[name]).examples or 0) for name in names]
        try:
            sites[path] = combine_erasers(erasers, rows if all(rows) else None)
        except ValueError as error:
            raise ValueError(f"At {path!r} {names} cannot be combined: {error}") from error
    return sites


def _combined_weights(configs: dict[str, ConceptErasureConfig]) -> dict[str, list[list]] | None:
    """The weights at the sites of all adapters; modules that share an eraser in one must share it in the others."""
    combined: dict[str, list[list]] = {}
    groups: dict[str, str] = {}
    has_names = any(config.weights is None for config in configs.values())
    for config in configs.values():
        for site, weights in (config.weights or {}).items():
            same = all(groups.setdefault(module, site) == site for module, *_ in weights)
            if has_names or not same or combined.setdefault(site, weights) != weights:
                raise ValueError(
                    f"The adapters share the eraser at {site!r} among different modules: fit all of them with the same "
                    "target_modules ('readers', 'writers', or names) and exclude_modules."
                )
    return combined or None


def _combined_config(
    configs: dict[str, ConceptErasureConfig], sites: dict[str, Eraser], sticky: bool
) -> ConceptErasureConfig:
    """The configuration of the new adapter. Its provenance has the figures of its parts, since it was not measured."""
    first, sources = next(iter(configs.values())), [Provenance.of(config) for config in configs.values()]
    methods = {config.method for config in configs.values()}
    combined, sizes = {}, dict[str, Any]()
    for name, config in configs.items():
        settings = {field: getattr(config, field) for field in ("concept", "labels", "concept_dim", "method", "rank")}
        provenance = {key: value for key, value in config.provenance.items() if key not in ("fingerprint", ACTIVE)}
        combined[name] = settings | provenance
        sizes = (config.fitted_sites or {}) | sizes
    return ConceptErasureConfig(
        task_type=first.task_type,
        concept="+".join(dict.fromkeys(config.concept for config in configs.values())),
        concept_dim=sum(config.z_dim for config in configs.values()),
        target_modules=list(sites),
        site=first.site,
        # Orthogonal projections combine into an orthogonal one, unless an oblique one is among them.
        method="leace" if "leace" in methods else "inlp" if methods == {"inlp"} else "orth",
        affine=first.affine if len({config.affine for config in configs.values()}) == 1 else None,
        rank=max(eraser.rank for eraser in sites.values()) or None,
        sticky=sticky,
        weights=_combined_weights(configs),
        fitted=True,
        fitted_sites={
            path: sizes[path] | {"width": eraser.x_dim, "rank": eraser.rank} for path, eraser in sites.items()
        },
        provenance={
            "hf_erasure_version": __version__,
            "base_class": sources[0].base_class or None,
            "examples": sum(source.examples or 0 for source in sources),
            "tokens": sum(source.tokens or 0 for source in sources),
            "pool": "+".join(dict.fromkeys(source.pool for source in sources if source.pool)),
            "leakage": {},
            "combined_from": combined,
            ACTIVE: record_without((entry for source in sources for entry in source.active_adapters or ()), configs),
            "fingerprint": {key: value for source in sources for key, value in source.fingerprint.items()},
        },
    )


# ---- fits of several shards ------------------------------------------------------------------------------------------


@on_cpu()  # older releases of safetensors read to the default device
def merge_fits(one: str | Path, other: str | Path, output: str | Path) -> ConceptErasureConfig:
    """Solve for the erasers of two one-pass fits together, from their moments, without a model or data.

    Args:
        one: An adapter folder with its moments in `fit/`, as `hf-erasure fit … fit.sequential=false
            fit.checkpoint=true` writes it.
        other: Another such folder, fitted on other data with the same base model and configuration. A background that
            both fits have read counts once.
        output: The adapter folder to write. The moments are written too, so that a third fit can be added.

    Returns:
        The configuration of the new adapter.

    Raises:
        ValueError: If a folder has no moments, or the two fits are not of the same adapter and base, or are of the same
            batches.
    """
    config, other_config = _fitted_in_one_pass(one), _fitted_in_one_pass(other)
    _check_same(config, other_config)
    known = Provenance.of(config)
    sites = list(config.fitted_sites or {})
    checkpoints = [
        FitCheckpoint(
            Path(folder) / FIT_FOLDER,
            config,
            sites,
            pool=known.pool,
            sequential=False,
            active=known.active_adapters or (),
        )
        for folder in (one, other, output)
    ]
    labelled, background = Source(config), Source(None, key="background")
    facts = [_add_up(checkpoints, source) for source in (labelled, background)]
    if not labelled.moments:
        raise ValueError(
            f"{one} and {other} hold no moments of one process: fit with fit.sequential=false fit.checkpoint=true, and "
            "without several processes."
        )
    sources = [labelled, background] if background.moments else [labelled]
    weights = load_file(Path(one) / WEIGHTS)
    old_sites, config.fitted_sites = config.fitted_sites or {}, {}
    fits: dict[str, SiteFit] = {}
    for site in sites:
        # A name ends like this, and begins with the path of the model that the adapter was saved from. The name of
        # another site may end like this one too, and is longer.
        ends = {part: f".{site}.{CHILD}.{CHILD}_{part}" for part in ("left", "right", "bias")}
        keys = {part: min((k for k in weights if f".{k}".endswith(end)), key=len) for part, end in ends.items()}
        kept, had_mean = weights[keys["left"]], bool(weights[keys["bias"]].any())
        is_affine = had_mean if config.affine is None else config.affine
        fits[keys["left"]] = fit = solve_site(site, sources, config, is_linear=not is_affine)
        for key, value in zip(keys.values(), fit.eraser.parts(kept.device, fit.dtype), strict=True):
            weights[key] = value.contiguous()
        config.fitted_sites[site] = old_sites[site] | {"width": fit.eraser.x_dim, "rank": fit.eraser.rank}
    config.readings, rows = known_readings(config, fits.values())
    for left, fit in fits.items():
        if fit.readings is not None:
            known = fit.readings[rows].to(weights[left])
            weights[f"{left.removesuffix('left')}readings"] = known.contiguous()
    for count in ("examples", "tokens", "counterfactuals"):
        if seen := config.provenance.get(count, 0) + other_config.provenance.get(count, 0):
            config.provenance[count] = seen
    # The figures of the first fit alone are not figures of the sum.
    examples = config.provenance["examples"]
    config.provenance |= {"leakage": {}, "leakage_intervals": {}, "measured_on": rows_in_words(examples, examples)}
    config.provenance.pop(RECIPE, None)
    with staged_save(Path(output)) as content:
        config.save_pretrained(str(content))
        save_file(weights, content / WEIGHTS, metadata={"format": "pt"})
    # They come last: a call that ends before this and is made again adds the same moments, also if `output` is `one`.
    for source, (batches, data) in zip(sources, facts, strict=False):
        checkpoints[-1].save_moments(source.key, source, batches, data)
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
    """Check what `FitCheckpoint` does not; it checks sites, labels, method and pool."""
    known, others = Provenance.of(one), Provenance.of(other)
    compared: dict[str, tuple[Any, Any]] = {
        "strength": (one.strength, other.strength),
        "target": (one.target, other.target),
        "base model": (known.fingerprint, others.fingerprint),
        "other active adapters": (known.active_adapters or [], others.active_adapters or []),
    }
    for site, size in (one.fitted_sites or {}).items():
        there = (other.fitted_sites or {}).get(site, size)
        first, second = ((at.get("axis"), at.get("examples")) for at in (size, there))
        compared[f"axes at {site!r}"] = first, second
    if different := [what for what, (first, second) in compared.items() if first != second]:
        raise ValueError(
            f"The two erasures differ in their {different[0]}: both need the same. Strength and target can be changed "
            "in adapter_config.json; the rest needs a new fit."
        )


def _add_up(checkpoints: list[FitCheckpoint], source: Source) -> tuple[int, str]:
    """Add the moments of the first two checkpoints to a source; return how many batches these are of, and which."""
    batches, data, parts = 0, list[str](), [source, SiteStatistics(source.concept)]
    for checkpoint, part in zip(checkpoints, parts, strict=False):
        facts = checkpoint.load_moments(source.key, part)
        data.append(facts.get("data", _MERGED))
        batches += facts.get("batches", 0)
        source.examples += facts.get("examples", 0)
        source.tokens += facts.get("tokens", 0)
    is_same = data[0] == data[1] != _MERGED
    if is_same and source.concept:
        raise ValueError("Both fits are of the same batches, which would count twice: give fits on different data.")
    if source.moments.keys() != parts[1].moments.keys():
        raise ValueError(f"Only one of the two fits has {source.key} moments: fit both with the same kind of data.")
    for site, moments in parts[1].moments.items() if not is_same else ():  # the same background counts once
        source.moments[site].merge(moments)
    return batches, data[0] if is_same else _MERGED
