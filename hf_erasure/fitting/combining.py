"""One erasure adapter for the concepts of several: from their erasers, or fitted anew on the data of all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.base_config import ChildConfig
from hf_erasure.adapters.beside import RECORD, warn_of_what_is_off, without
from hf_erasure.adapters.child import adapter_children
from hf_erasure.adapters.combining import combine_fitted
from hf_erasure.adapters.lookup import adapter_of, adapters_in
from hf_erasure.models import check_pool

from .erasure import adapter_to_fit, conclude, solved
from .pools import Peeked, pool_for
from .processes import Processes
from .rows_seen import RowsSeen
from .running import Runner
from .sources import Source, background_source
from .task import FitTask


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
        ValueError: If there are not two adapters, one is unknown, no concept erasure, not fitted or merged, if they
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
    with _undone_on_failure(model, into):
        combine_fitted(model, names, into, sticky=sticky, fitted_anew=True)
        config, layers = adapter_to_fit(model, into)
        concepts = {name: adapter_of(model, name, ConceptErasureConfig).config for name in names}
        config.rank = sum(concept.max_rank for concept in concepts.values())
        runner, processes = Runner(model, layers.values()), Processes()
        with processes.agreeing("reading its batches"):
            peeked = {name: Peeked(batches[name]) for name in names}
        guarded = pool_for(pool, model, runner, concepts[names[0]], peeked[names[0]].first, processes)
        task = FitTask(runner, layers, into, config, guarded, progress, resident_batches, None, processes)
        sources = [Source(name, f"batches[{name!r}]", peeked[name], concept) for name, concept in concepts.items()]
        warn_of_what_is_off(model, into, expected=names)
        made_of = config.provenance["combined_from"]
        with _without(model, names):
            fits, tally = solved(task, [*sources, *background_source(background)], sequential=sequential)
            conclude(task, fits, tally, None, RowsSeen())
        config.provenance["combined_from"] = made_of
        config.provenance[RECORD] = without(config.provenance[RECORD], names)
    return config


@contextmanager
def _without(model: Any, names: Sequence[str]) -> Iterator[None]:
    """The concepts must be there to be fitted: their own adapters do not act meanwhile, sticky or not."""
    with ExitStack() as stack:
        for name in names:
            for child in adapter_children(model, name):
                stack.enter_context(child.without(name))
        yield


@contextmanager
def _undone_on_failure(model: Any, into: str) -> Iterator[None]:
    """Take the new adapter off again if it could not be fitted."""
    known = {place.name for place in adapters_in(model, ChildConfig)}
    active = {id(child): (child, child.active_adapters) for child in adapter_children(model)}
    try:
        yield
    except BaseException:
        added = [] if into in known else list(adapters_in(model, ConceptErasureConfig, into))
        for place in added:
            place.holder.delete_adapter(into)
        if added:
            for child, names in active.values():
                child.set_adapter(names)
        raise
