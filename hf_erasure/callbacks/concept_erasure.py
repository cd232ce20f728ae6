"""Keep an erasure up to date while the model under it is fine-tuned."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import TrainerState

from hf_erasure.adapters import ConceptErasureConfig
from hf_erasure.adapters.common.lookup import adapter_of
from hf_erasure.fitting import fit_concept_erasure
from hf_erasure.fitting.heldout import hashes_of, measured_leakage
from hf_erasure.models.model import forked_rng

from .trainer import LoggingCallback

_LOGGER = logging.getLogger(__name__)


class ConceptErasureCallback(LoggingCallback):
    """Refits an erasure on a schedule, or when too much of the concept has come back, and logs what leaks.

    Fine-tuning moves the representation away from the one the erasure was fitted on, and may learn the concept anew
    in other directions. A refit is exact for the model at that step. An adapter that was not fitted is fitted when
    training begins.

    Args:
        batches: Labelled batches for `fit_concept_erasure`; with several processes, each gives its own share. Every
            refit reads them again, so an iterator that can be read only once is refused.
        adapter_name: The erasure.
        refit_steps: Refit after this many steps each time, or `"epoch"`: after every epoch.
        refit_leakage: Refit when the leakage of a site, measured at each log and at the end, is above this
            correlation.
        eval_batches: Held-out batches: with them leakage is logged, as `leakage/<site>` and `leakage_max`. If they
            share rows with `batches`, a warning and the card of the checkpoint name the number.
        sequential: As in `fit_concept_erasure`.
        pool: As in `fit_concept_erasure`; by default what the model's head reads.
        background: As in `fit_concept_erasure`.
        delete_at_end: Delete the erasure after training. Weights that are trained with it, such as a LoRA, cannot use
            the concept, and learn less about it (concept ablation fine-tuning, arXiv 2507.16795). The model itself
            keeps what it knew. Checkpoints still have the erasure.

    Raises:
        ValueError: If `refit_leakage` is given without `eval_batches`, or a number is out of its range.
    """

    def __init__(
        self,
        batches: Iterable[Any],
        adapter_name: str = "default",
        *,
        refit_steps: int | str | None = None,
        refit_leakage: float | None = None,
        eval_batches: Iterable[Any] | None = None,
        sequential: bool = True,
        pool: str | None = None,
        background: Iterable[Any] | None = None,
        delete_at_end: bool = False,
    ) -> None:
        if refit_steps not in (None, "epoch") and not (isinstance(refit_steps, int) and refit_steps >= 1):
            raise ValueError(
                f"refit_steps={refit_steps!r} is not known: give a positive number of steps as an int, 'epoch' or None."
            )
        if refit_leakage is not None and not 0 < refit_leakage < 1:
            raise ValueError(f"refit_leakage={refit_leakage} is a correlation: give a number between 0 and 1.")
        if refit_leakage is not None and eval_batches is None:
            raise ValueError("refit_leakage needs eval_batches to measure leakage on: give held-out labelled batches.")
        for name, given in {"batches": batches, "eval_batches": eval_batches, "background": background}.items():
            if given is not None and iter(given) is given:
                raise ValueError(f"{name} is an iterator that can be read only once: give a list or a DataLoader.")
        super().__init__(adapter_name, {"refits": 0, "is_due": False, "last_step": -1})
        self.batches = batches
        self.refit_steps, self.refit_leakage, self.eval_batches = refit_steps, refit_leakage, eval_batches
        self._options: dict[str, Any] = {"sequential": sequential, "background": background}
        self.pool, self.delete_at_end = pool, delete_at_end
        self._fitted_on: set[int] = set()  # Hashes of the rows of `batches`; empty before the first measurement.

    @property
    def refits(self) -> int:
        """How often the erasure was fitted so far; fits before a resumed checkpoint count too."""
        return int(self.memory["refits"])

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Check how the model is trained, and fit an erasure that is not fitted yet."""
        super().on_train_begin(args, state, control, model=model)
        if not adapter_of(model, self.adapter_name, ConceptErasureConfig).config.fitted:
            self._refit(model, state)

    def on_step_end(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Refit by `refit_steps`, at the last step of an epoch too: logs, evaluations and saves of the step follow."""
        if self.refit_steps == "epoch":
            is_due = state.global_step >= state.max_steps or state.epoch == round(state.epoch or 0)
        else:
            is_due = self.refit_steps is not None and state.global_step % int(self.refit_steps) == 0
        if is_due:
            self._refit(model, state)

    def on_epoch_end(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Refit after an epoch whose last step was not known as such: the data have no length, or training stops."""
        if self.refit_steps == "epoch" and self.memory["last_step"] != state.global_step:
            self._refit(model, state)

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Refit if the latest log has found too much leakage."""
        if self.memory["is_due"]:
            self._refit(model, state)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Delete the erasure, or refit it if it leaks in the final model, which may be the best one, loaded now."""
        if self.delete_at_end:
            adapter_of(model, self.adapter_name, ConceptErasureConfig).holder.delete_adapter(self.adapter_name)
            return
        if self.refit_leakage is not None:
            self.logged(state, model)
        if self.memory["is_due"]:
            self._refit(model, state)

    def figures(self, state: TrainerState, model: nn.Module) -> dict[str, float]:
        """Leakage per site, and how often the erasure was refitted."""
        found: dict[str, float] = {"erasure_refits": self.refits}
        if self.eval_batches is not None:
            if not self._fitted_on:
                self._fitted_on.update(row for batch in self.batches for row in hashes_of(batch))
            leakage, self.measured_on = measured_leakage(
                model, self.eval_batches, self.adapter_name, pool=self.pool, fitted_on=self._fitted_on
            )
            found |= {f"leakage/{site}": value for site, value in leakage.items()}
            found["leakage_max"] = max(leakage.values())
            self.memory["is_due"] = self.refit_leakage is not None and found["leakage_max"] > self.refit_leakage
        return found

    def _refit(self, model: nn.Module, state: TrainerState) -> None:
        with forked_rng(model):  # batches may be shuffled
            fit_concept_erasure(model, self.batches, self.adapter_name, pool=self.pool, progress=False, **self._options)
        self.memory.update(refits=self.refits + 1, is_due=False, last_step=state.global_step)
        _LOGGER.info("Erasure %r fitted at step %d.", self.adapter_name, state.global_step)
