"""The steps that are the same for both kinds of adapter on any model: save, load, disable and delete."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin

from tests.breadth import examples
from tests.breadth.examples import Batch
from tests.breadth.outcomes import Outcomes, WrongError, same, tensors


class Life:
    """The steps of an adapter's life on one model.

    Attributes:
        name: The name of the adapter.
        outcomes: The outcome of each step.
    """

    name: str

    def __init__(self, base: PreTrainedModel, folder: Path, seed: int) -> None:
        self.base, self.folder, self.outcomes = base, folder, Outcomes()
        self._test = examples.batch_of(base, seed)
        self._before = examples.checked(base, self._test)
        self._model = copy.deepcopy(base)
        self._after: dict[str, Tensor] = {}

    def _outputs(self, model: nn.Module, batch: Batch | None = None) -> dict[str, Tensor]:
        return tensors(examples.call(model, batch or self._test))

    def _reload(self) -> None:
        self._model.save_pretrained(self.folder)
        other = copy.deepcopy(self.base)
        # Wav2Vec2 has another method of this name.
        PeftAdapterMixin.load_adapter(other, self.folder, adapter_name=self.name)
        same(self._outputs(other), self._after, "loaded")

    def _disable(self) -> None:
        self._model.disable_adapters()
        same(self._outputs(self._model), self._before, "disabled")
        self._model.enable_adapters()
        same(self._outputs(self._model), self._after, "enabled again")

    def _delete(self) -> None:
        self._model.delete_adapter(self.name)
        same(self._outputs(self._model), self._before, "deleted")
        if self._model.state_dict().keys() != self.base.state_dict().keys():
            raise WrongError("the state dict has other keys than before")
