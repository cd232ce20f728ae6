"""The life of an erasure on a model of any type: attached, fitted, measured, saved, loaded, disabled, deleted."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from hf_erasure import ConceptErasureConfig, ErasureReport, fit_concept_erasure
from hf_erasure.adapters import erasure_layers
from tests.breadth import examples, sites, truth
from tests.breadth.examples import Batch, by_token
from tests.breadth.life import Life
from tests.breadth.outcomes import DoesNotApplyError, Outcomes, ToldError, WrongError, different, same

# The largest cross-covariance with the concept at a site, as a share of that of a perfect correlation. float32 rounding
# leaves some 1e-6; before erasure the share is 0.05 and more.
RESIDUAL = 1e-4
# Merging rounds weights and erasing rounds activations: both by some 1e-7 in float32, which layers multiply.
MERGED = 1e-4
# Column of the table → the steps whose outcomes it shows.
COLUMNS = {
    "default sites": ("attach", "sites"),
    "fit": ("one pass", "fit"),
    "save, load, disable, delete": ("acts", "reload", "disable", "PEFT", "delete"),
    "labels of tokens": ("tokens",),
    "text alone": ("text alone",),
    "whole blocks": ("blocks",),
    "merges with readers": ("readers",),
    "merges with writers": ("writers",),
}
# The columns that every run checks; the others take longer.
FEW = list(COLUMNS)[:3]
NAME = "erasure"


def config(**fields: Any) -> ConceptErasureConfig:
    return ConceptErasureConfig(concept="gender", labels=["female", "male"], **fields)


class Erasure(Life):
    """The steps of an erasure's life on one model.

    Attributes:
        targets: The default sites.
    """

    name = NAME

    def __init__(self, base: PreTrainedModel, folder: Path) -> None:
        super().__init__(base, folder, 77)
        self.targets: list[str] = []
        self._batches = [examples.batch_of(base, seed) for seed in (1, 2, 3)]

    def live(self, everything: bool) -> Outcomes:
        """Run all steps, or only those that take little time."""
        step = self.outcomes.step
        step("attach", self._attach)
        step("sites", self._look_at_sites, "attach")
        if everything:
            step("one pass", self._fit_in_one_pass, "attach")
        step("fit", self._fit, "attach")
        step("acts", self._act, "fit")
        step("reload", self._reload, "fit")
        step("disable", self._disable, "fit")
        if everything:
            step("PEFT", self._wrap, "reload")
        step("delete", self._delete, "fit")
        if everything:
            step("tokens", self._fit_on_tokens, "attach")
            step("text alone", self._fit_on_text_alone, "attach")
            step("blocks", self._fit_blocks)
            step("readers", lambda: self.merge("readers"))
            step("writers", lambda: self.merge("writers"))
        return self.outcomes

    # ---- default sites -----------------------------------------------------------------------------------------------

    def _attach(self) -> None:
        self._model.add_adapter(config(), adapter_name=NAME)
        self.targets = list(erasure_layers(self._model, NAME))
        same(self._outputs(self._model), self._before, "unfitted")

    def _look_at_sites(self) -> None:
        odd = sites.odd_of(self.base, self._test, self.targets)
        if odd:
            raise WrongError("; ".join(f"{what}: {', '.join(names)}" for what, names in odd.items()))

    def _fit_in_one_pass(self) -> None:
        model = copy.deepcopy(self._model)
        fit_concept_erasure(model, self._batches, NAME, sequential=False, progress=False)
        different(self._outputs(model), self._before, "fitted in one pass")

    def _fit(self) -> None:
        try:
            fitted(self.base, self._model, self._batches)
        finally:
            self._after = self._outputs(self._model)

    def _act(self) -> None:
        different(self._after, self._before, "fitted")

    def _wrap(self) -> None:
        get_peft_model(copy.deepcopy(self.base), config())
        wrapped = PeftModel.from_pretrained(copy.deepcopy(self.base), self.folder).eval()
        same(self._outputs(wrapped.get_base_model()), self._after, "as a PeftModel")

    # ---- other data, other targets -----------------------------------------------------------------------------------

    def _attached(self, **fields: Any) -> PreTrainedModel:
        model = copy.deepcopy(self.base)
        model.add_adapter(config(**fields), adapter_name=NAME)
        return model

    def _fit_on_tokens(self) -> None:
        if "input_ids" not in self._batches[0]:
            raise DoesNotApplyError
        # Token labels of one side do not apply to the other.
        sides = other_sides(self.base)
        is_there = any(re.fullmatch(sides, name) for name, _ in self.base.named_modules())
        model = self._attached(exclude_modules=sides if is_there else None)
        fitted(self.base, model, [by_token(batch) for batch in self._batches])

    def _fit_on_text_alone(self) -> None:
        batches = [{k: v for k, v in batch.items() if k not in _OF_OTHER_KINDS} for batch in self._batches]
        if len(batches[0]) == len(self._batches[0]) or "input_ids" not in batches[0]:
            raise DoesNotApplyError
        for batch in batches:
            batch["input_ids"] = batch["input_ids"].where(batch["input_ids"] != examples.IMAGE_TOKEN, 9)
        try:
            self._outputs(self.base, batches[0])
        except Exception as error:
            raise DoesNotApplyError from error
        fitted(self.base, self._attached(), batches)

    def _fit_blocks(self) -> None:
        pattern = blocks_of(self.base, self._test)
        if pattern is None:
            raise DoesNotApplyError
        model = self._attached(target_modules=pattern)
        fitted(self.base, model, self._batches)
        different(self._outputs(model), self._before, "fitted on blocks")

    def merge(self, targets: str | None) -> None:
        """Merge in float32, or in float64 if the network enlarges rounding too much."""
        try:
            self._merge_in(torch.float32, targets)
        except WrongError as error:
            if not str(error).startswith("merged:"):
                raise
            self._merge_in(torch.float64, targets)

    def _merge_in(self, dtype: torch.dtype, targets: str | None) -> None:
        """Merge through a `PeftModel`, unmerge, and merge and unload; tied tables are untied."""
        base = copy.deepcopy(self.base).to(dtype)
        test, *batches = (
            {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
            for batch in (self._test, *self._batches)
        )
        before, model, folder = self._outputs(base, test), copy.deepcopy(base), self.folder / (targets or "norms")
        model.add_adapter(config(target_modules=targets), adapter_name=NAME)
        fit_concept_erasure(model, batches, NAME, sequential=False, progress=False)
        erased = self._outputs(model, test)
        different(erased, before, f"fitted on {folder.name}")
        model.save_pretrained(folder)
        wrapped = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
        inner = wrapped.get_base_model()
        plain = {key: value.clone() for key, value in inner.state_dict().items()}
        wrapped.merge_adapter(untie=True)
        same(self._outputs(inner, test), erased, "merged", MERGED)
        wrapped.unmerge_adapter()
        same(self._outputs(inner, test), erased, "merged and taken back")
        if any(not torch.equal(value, plain[key]) for key, value in inner.state_dict().items()):
            raise WrongError("merged and taken back: the weights are others")
        same(self._outputs(wrapped.merge_and_unload(untie=True), test), erased, "merged for good", MERGED)


_OF_OTHER_KINDS = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "input_features", "input_values")


def other_sides(base: PreTrainedModel) -> str:
    """A pattern for the modules that do not see tokens of `input_ids`: decoders, and towers for images and sounds."""
    if base.config.is_encoder_decoder:
        return r".*decoder.*"
    return r"(.*\.)?(vision|visual|image|audio|speech)_?(model|tower|encoder|embed_tokens_extend)?\..*"


def fitted(base: PreTrainedModel, model: PreTrainedModel, batches: list[Batch]) -> None:
    """Fit the erasure, and measure how much of the concept is left at each call of its sites.

    Raises:
        WrongError: If too much is left, and the report does not say so.
        ToldError: If too much is left, and the report says so.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = fit_concept_erasure(model, batches, NAME, progress=False)
    targets = [name for name, size in model.peft_config[NAME].fitted_sites.items() if size["rank"]]
    found = truth.residuals(model, targets, batches, truth.feature_axes(base, targets, batches[0]), report.pool)
    if not found:
        raise WrongError("no site was reached")
    where, most = truth.worst(found)
    if most > RESIDUAL:
        told = "; ".join(str(warning.message) for warning in caught)
        error = ToldError if is_told(report, found, told) else WrongError
        raise error(f"the cross-covariance with the concept at {where} is {most:.2g} of what it may be")


def is_told(report: ErasureReport, found: dict[truth.Visit, float], warned: str) -> bool:
    """Whether the report shows a residual for every site where one above the tolerance was measured."""
    bad = {site for (site, _), share in found.items() if share > RESIDUAL}
    return all((report[site].residual or 0.0) > RESIDUAL / 10 for site in bad)


def blocks_of(model: nn.Module, batch: Batch) -> str | None:
    """A pattern for the blocks in the outermost lists that the batch reaches; None if there are no such blocks."""
    reached: set[nn.Module] = set()
    handles = [module.register_forward_pre_hook(lambda module, _: reached.add(module)) for module in model.modules()]
    examples.call(model, batch)
    for handle in handles:
        handle.remove()
    lists = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and module[0] in reached
        if any(True for _ in module[0].children()) and any(value.dim() > 1 for value in module[0].parameters())
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    blocks = [f"{name}.{i}" for name in outer for i, m in enumerate(model.get_submodule(name)) if m in reached]
    return "|".join(map(re.escape, blocks)) or None
