"""Run a model over batches, for looking at its activations only."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from transformers.utils.generic import ModelOutput

from .model import bare_model, callee_of, input_device, is_encoder_decoder

# Inputs that belong to a loss, not to the activations.
_LOSS_INPUTS = ("concept_labels", "labels", "label", "label_ids")

# Model types that are made like RoBERTa: their first position is the one after that of the padding token.
_SHIFTED = {
    "altclip_text_model", "bridgetower_text_model", "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt",
    "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
}  # fmt: skip


class Runner:
    """Calls the part of a model that produces the activations of `sites`.

    A language-model head is left out where no site needs it: its logits can cost more than the blocks.

    Args:
        model: A bare model, or whatever it is inside of.
        sites: Layers of an adapter; `host` of each is the module whose activations are wanted.

    Attributes:
        model: The bare model, with its head if it has one.
        backbone: The part of it that returns the last hidden state.
        is_sharded: Whether FSDP keeps a part of every weight in every process.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Any] = ()) -> None:
        self.model: Any = bare_model(model)
        backbone = self.backbone = _backbone(self.model)
        within = {id(module) for module in backbone.modules()} if isinstance(backbone, nn.Module) else set()
        needs_all = any(id(site.host) not in within for site in sites)
        self.is_sharded = any(isinstance(m, (FSDPModule, FullyShardedDataParallel)) for m in model.modules())
        # A sharded model gathers its weights at its root, so it is called there.
        self.callee: nn.Module = callee_of(model, self.model) if self.is_sharded or needs_all else backbone
        self.device = input_device(self.model)

    def __call__(self, batch: dict[str, Any]) -> Any:
        """One forward pass over a batch, labels taken off."""
        # A classifier makes the decoder's inputs from those of the encoder, which its base model need not do.
        given = any(name in batch for name in ("decoder_input_ids", "decoder_inputs_embeds", "labels"))
        makes = is_encoder_decoder(self.model) and not given and self.model.get_output_embeddings() is None
        return self.call(self.model if makes and self.callee is self.backbone else self.callee, batch)

    def call(self, callee: nn.Module, batch: dict[str, Any]) -> Any:
        """The same of another part of the model."""
        parameters = inspect.signature(callee.forward).parameters
        inputs = {name: value for name, value in batch.items() if name not in _LOSS_INPUTS}
        if "labels" in batch and is_encoder_decoder(self.model) and "decoder_input_ids" not in batch:
            inputs["decoder_input_ids"] = self.model.prepare_decoder_input_ids_from_labels(batch["labels"])
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            inputs = {name: value for name, value in inputs.items() if name in parameters}
        placed = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        try:
            return callee(**placed, **({"use_cache": False} if "use_cache" in parameters else {}))
        except (IndexError, RuntimeError) as error:
            _explain_length(self.model, inputs, error)
            raise

    def final_states(self) -> dict[str, nn.Module]:
        """The modules that return a last hidden state, by the name it has in transformers' outputs."""
        if is_encoder_decoder(self.model):
            return {
                "encoder_last_hidden_state": self.model.get_encoder(),
                "last_hidden_state": self.model.get_decoder(),
            }
        return {"last_hidden_state": self.backbone}

    def side_of(self, name: str) -> str:
        """A final state's name for aligning labels: the decoder's says so."""
        return f"decoder.{name}" if name == "last_hidden_state" and is_encoder_decoder(self.model) else name


class TextTooLong(ValueError):
    """A model has no position for a token; the message says how long its texts may be."""


def positions_of(config: Any) -> int | None:
    """For how many tokens a model has positions, as far as its configuration says."""
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    return most - (config.pad_token_id or 0) - 1 if str(getattr(config, "model_type", "")) in _SHIFTED else most


def _explain_length(model: Any, inputs: dict[str, Any], error: Exception) -> None:
    """Raise `TextTooLong` where torch refused a batch that is longer than the model's positions."""
    config = getattr(model, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    most, ids = positions_of(config), inputs.get("input_ids")
    # Errors of other packages, such as those that stop a forward pass, are not about positions.
    from_torch = type(error).__module__.split(".")[0] in ("builtins", "torch")
    if from_torch and most is not None and isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] > most:
        raise TextTooLong(
            f"A batch is {ids.shape[1]} tokens wide, and {type(model).__name__} has {most} positions: cut the texts, "
            f"as with concept_dataloader(…, max_length={most})."
        ) from error


def last_hidden_state(output: Any) -> Tensor:
    """The last hidden state among what a backbone returned: a tensor that is all it returned, or the first of several.

    Raises:
        ValueError: If there is none.
    """
    found = output
    if isinstance(output, (dict, ModelOutput)):
        found = output.get("last_hidden_state")
    elif isinstance(output, (tuple, list)):
        found = output[0] if output else None
    if not isinstance(found, Tensor) or not found.dim():
        raise ValueError(
            f"The model returns a {type(output).__name__} without a last_hidden_state to be measured: let its forward "
            "return a tensor, a tuple with it in front, or a dict with that key."
        )
    return found


def text_encoder(model: nn.Module) -> nn.Module:
    """What reads a text: of an encoder-decoder its encoder, else the model; adapters inside act as ever.

    Args:
        model: A bare model, or whatever it is inside of.
    """
    bare = bare_model(model)
    return bare.get_encoder() if is_encoder_decoder(bare) else model


def _backbone(model: Any) -> Any:
    """The base model, unless it is a part that takes other inputs than the model does, as DINOv3's encoder."""
    found, name = getattr(model, "base_model", model), getattr(model, "main_input_name", "input_ids")
    if not isinstance(found, nn.Module) or name not in inspect.signature(model.forward).parameters:
        return found
    return found if name in inspect.signature(found.forward).parameters else model
