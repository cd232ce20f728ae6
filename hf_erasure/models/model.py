"""Finds the bare model inside wrappers, runs it over batches, and reads what it returns."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields, is_dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils.generic import ModelOutput

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel, FullyShardedDataParallel)
_SHARDED = (FSDPModule, FullyShardedDataParallel)
# Inputs that belong to a loss, not to the activations.
_LOSS_INPUTS = ("labels", "label", "label_ids")
# The prefix of the names in a batch that hold the concept of its rows, such as `concept_labels`.
_CONCEPT_PREFIX = "concept_"
# The inputs of towers → the methods that run one tower with the layers around it.
TEXTS = {"input_ids": "get_text_features", "inputs_embeds": "get_text_features"}
MEDIA = {
    "pixel_values": "get_image_features",
    "pixel_values_videos": "get_video_features",
    "input_features": "get_audio_features",
    "input_values": "get_audio_features",
}
# Model types that are made like RoBERTa: their first position is the one after that of the padding token.
_OFFSET_BY_PAD = {
    "altclip_text_model", "bridgetower_text_model", "camembert", "data2vec-text", "esm", "ibert", "layoutlmv3", "lilt",
    "longformer", "luke", "markuplm", "mpnet", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl",
    "xmod",
}  # fmt: skip
# On which axis modules of torch have their features, by definition. Some models derive norms and convolutions that turn
# the axes around (Parakeet's head), so norms and convolutions are recognised by their `forward`.
_FEATURES_LAST = (nn.Linear, nn.Embedding, Conv1D)
_NORMS_LAST = (nn.LayerNorm.forward, nn.RMSNorm.forward)
_NORMS_SECOND = (nn.BatchNorm2d.forward, nn.InstanceNorm2d.forward, nn.GroupNorm.forward)
_CONVOLUTIONS = (
    nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward,
    nn.ConvTranspose1d.forward, nn.ConvTranspose2d.forward, nn.ConvTranspose3d.forward,
)  # fmt: skip


class LazyModule(ModuleType):
    """A stand-in for a module that is imported when one of its names is first used, as by `typing.get_type_hints`.

    If the module is not installed, the error names the `extra` of this package that installs it.
    """

    def __init__(self, name: str, extra: str = "") -> None:
        super().__init__(name)
        self._extra = extra

    def __getattr__(self, name: str) -> Any:
        """Import the module, and return and keep what it has under this name."""
        try:
            found = vars(self)[name] = getattr(importlib.import_module(self.__name__), name)
        except ImportError as error:
            if not self._extra:
                raise
            needed = f"This needs {self.__name__.partition('.')[0]}: pip install 'hf-erasure[{self._extra}]'"
            raise ImportError(needed) from error
        return found


# Importing them takes longer than importing this package, and most programs that load an adapter do not need them.
if TYPE_CHECKING:
    import datasets as datasets
    import pandas as pandas
else:
    datasets, pandas = LazyModule("datasets"), LazyModule("pandas")


@contextmanager
def on_cpu() -> Iterator[None]:
    """Make a function's own small tensors on the CPU, even if the caller has set another default device."""
    with nullcontext() if torch.empty(0).device.type == "cpu" else torch.device("cpu"):  # a device slows all of torch
        yield


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Turn gradients and dropout off; afterwards every module has its former training flag."""
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, flag in training:
            module.training = flag


def forked_rng(model: nn.Module) -> AbstractContextManager[None]:
    """Restore the state of the random numbers afterwards, on the CPU and on all devices of the model."""
    return torch.random.fork_rng({p.device for p in model.parameters() if p.device.type == "cuda"})


# ---- the bare model --------------------------------------------------------------------------------------------------


def bare_model(model: Any) -> Any:
    """The model inside a `PeftModel` and other wrappers: the outermost transformers model, if there is one.

    If a module holds several transformers models side by side, or none, the module itself is the model.
    """
    if isinstance(model, PreTrainedModel):
        return model
    while (inner := unwrapped(model)) is not model:
        model = inner
    modules = model.named_modules()
    within = {path: m for path, m in modules if isinstance(m, PreTrainedModel) or configs_on(m) is not None}
    outermost = next(iter(within), "")
    is_around = all(path.startswith(f"{outermost}.") for path in within if path != outermost)
    return within[outermost] if outermost and is_around else model


def class_name(model: nn.Module) -> str:
    """The name of a model's class in transformers, without the prefix that FSDP2 adds."""
    name = type(model).__name__
    return name.removeprefix("FSDP") if isinstance(model, FSDPModule) else name


def callee_of(model: nn.Module, bare: nn.Module) -> Any:
    """The module to call to run the bare model inside `model`: FSDP gathers weights at its outermost wrapper."""
    # Accelerate's compiled regions are not around the bare model.
    path = next((path for path, module in model.named_modules() if module is bare), "")
    return next((m for m in modules_along(model, path) if isinstance(m, _SHARDED)), bare)


def as_attribute(path: str) -> str:
    """How a message writes the submodule of `model` at a path."""
    if not path:
        return "the model itself"
    if all(part.isidentifier() for part in path.split(".")):
        return f"model.{path}"
    return f"model.get_submodule({path!r})"


def configs_on(module: nn.Module) -> dict[str, PeftConfig] | None:
    """The configurations that PEFT has set on a bare model; None for other modules, a `PeftModel` and its tuner too."""
    configs = None if isinstance(module, BaseTuner) else module.__dict__.get("peft_config")
    return configs if isinstance(configs, dict) else None


def unwrapped(model: Any) -> Any:
    """The module inside one wrapper of accelerate, torch or PEFT; a module that is not a wrapper is returned itself."""
    # Older releases of accelerate fail at a module that has compiled modules inside, so its function is not used.
    inner = model._modules.get("_orig_mod", model.__dict__.get("_orig_mod", model))
    while isinstance(inner, _PARALLEL) or type(inner).__name__ == "DeepSpeedEngine":
        inner = inner.module
    return base_of(inner) if hasattr(inner, "get_base_model") else inner


def base_of(peft_model: Any) -> Any:
    """The model inside a `PeftModel`, whose own method fails where no adapter is left."""
    inner = peft_model.base_model
    return inner.model if isinstance(inner, BaseTuner) else inner


def modules_along(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules from `model` down to the module at a path, including both."""
    found = [model]
    for part in path.split(".") if path else ():
        found.append(found[-1]._modules[part])  # type: ignore[arg-type]
    return found


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises: its class name contains "norm", and its parameters are all vectors."""
    if "norm" not in type(module).__name__.lower():
        return False
    # An adapter may be a child of a norm, and its matrices do not count.
    own = [p for m in module.modules() if not hasattr(m, "adapters") for p in m.parameters(recurse=False)]
    return all(p.dim() <= 1 for p in own) and not any(isinstance(m, nn.Linear) for m in module.modules())


def axis_of_kind(module: nn.Module | None, axes: int) -> int | None:
    """The axis of the features in the input and output of torch's own modules; None for other modules."""
    module = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    forward = getattr(type(module), "forward", None)
    if isinstance(module, _FEATURES_LAST) or forward in _NORMS_LAST:
        return axes - 1
    return 1 if axes > 1 and forward in (*_CONVOLUTIONS, *_NORMS_SECOND) else None


# ---- how it is run ---------------------------------------------------------------------------------------------------


def is_encoder_decoder(model: Any) -> bool:
    """Whether a bare model has an encoder and a decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def inputs_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """A batch without the entries that hold the concept of its rows.

    Texts come first: their number is that of the examples, and the images of all texts may lie in one list.
    """
    named = {name: batch[name] for name in TEXTS if name in batch} | dict(batch)
    return {name: value for name, value in named.items() if not name.startswith(_CONCEPT_PREFIX)}


def decoder_ids_from(labels: Tensor, model: Any) -> Tensor:
    """The token ids `(batch, seq)` that the decoder of a bare model reads when it learns these labels."""
    if (own := getattr(model, "prepare_decoder_input_ids_from_labels", None)) is not None:
        made: Tensor = own(labels=labels)
        return made
    config = model.config
    start: Any = getattr(config, "decoder_start_token_id", None)
    if start is None or config.pad_token_id is None:
        raise ValueError(
            f"{type(model).__name__} has no decoder_start_token_id or no pad_token_id, so that what its decoder reads "
            "cannot be made from labels: give decoder_input_ids."
        )
    shifted = torch.cat([torch.full_like(labels[:, :1], start), labels[:, :-1]], 1)
    return shifted.masked_fill(shifted < 0, config.pad_token_id)


def input_device(model: nn.Module) -> torch.device:
    """The device for inputs: that of the first parameter that is not meta; accelerate moves them to offloaded parts."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def text_encoder(model: nn.Module) -> nn.Module:
    """The part that reads a text: the encoder of an encoder-decoder, else the model; active adapters inside it act."""
    bare = bare_model(model)
    return bare.get_encoder() if is_encoder_decoder(bare) else model


class TextTooLong(ValueError):
    """Raised if a model has no position for a token; the message says how long its texts may be."""


class Runner:
    """Calls the part of a model that produces the activations of `sites`.

    A language-model head is left out if no site needs it: its logits can cost more than the blocks.

    Args:
        model: A bare model, or a wrapper around one.
        sites: Layers of an adapter; the `host` of each is the module whose activations are needed.

    Attributes:
        model: The bare model, with its head if it has one.
        backbone: The part of it that returns the last hidden state.
        is_sharded: Whether FSDP keeps a part of every weight in every process.
    """

    def __init__(self, model: nn.Module, sites: Iterable[Any] = ()) -> None:
        self.model: Any = bare_model(model)
        backbone = getattr(self.model, "base_model", self.model)
        main = getattr(self.model, "main_input_name", "input_ids")
        if isinstance(backbone, nn.Module) and main in inspect.signature(self.model.forward).parameters:
            # The base model may be a part that takes other inputs than the model, such as DINOv3's encoder.
            backbone = backbone if main in inspect.signature(backbone.forward).parameters else self.model
        self.backbone: Any = backbone
        within = {id(module) for module in backbone.modules()} if isinstance(backbone, nn.Module) else set()
        sites = list(sites)
        needs_all = any(id(site.host) not in within for site in sites)
        self._towers_by_input: dict[str, dict[str, nn.Module]] = {}
        self._hosts = {id(site.host) for site in sites}
        self.is_sharded = any(isinstance(m, _SHARDED) for m in model.modules())
        # A sharded model gathers its weights at its root, so it is called there.
        self.callee: nn.Module = callee_of(model, self.model) if self.is_sharded or needs_all else backbone

    def __call__(self, batch: dict[str, Any], callee: Callable[..., Any] | None = None) -> Any:
        """Run one forward pass over a batch without its labels; of `callee`, if that part of the model is given.

        If a batch has inputs for only one of the model's towers, that tower is run.
        """
        labels: Any = batch.get("labels")
        labels = labels if getattr(labels, "ndim", 0) == 2 else None  # those of classes and of boxes are no texts
        if callee is None:
            # A classifier makes the decoder's inputs from the encoder's inputs; its base model may not.
            given = labels is not None or "decoder_input_ids" in batch or "decoder_inputs_embeds" in batch
            makes = is_encoder_decoder(self.model) and not given and self.model.get_output_embeddings() is None
            callee = self.model if makes and self.callee is self.backbone else self.callee
            callee = callee if self.is_sharded else self._tower_for(batch) or callee
        parameters = inspect.signature(getattr(callee, "forward", callee)).parameters
        inputs = {name: value for name, value in inputs_of(batch).items() if name not in _LOSS_INPUTS}
        if labels is not None and is_encoder_decoder(self.model) and "decoder_input_ids" not in batch:
            inputs["decoder_input_ids"] = decoder_ids_from(labels, self.model)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            inputs = {name: value for name, value in inputs.items() if name in parameters}
        device = input_device(self.model)
        placed = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in inputs.items()}
        try:
            return callee(**placed | ({"use_cache": False} if "use_cache" in parameters else {}))
        except (IndexError, RuntimeError) as error:
            _raise_if_too_long(self.model, inputs, error)
            raise

    def backbone_output(self, batch: dict[str, Any]) -> Any:
        """Run one forward pass over a batch; returns what the backbone, or a tower that is run alone, returned."""
        outputs: list[Any] = []
        handle = self.backbone.register_forward_hook(lambda module, args, output: outputs.append(output))
        try:
            returned = self(batch)
        finally:
            handle.remove()
        return outputs[-1] if outputs else returned

    def follow_head(self, batch: dict[str, Any]) -> None:
        """Run the whole model from now on if its head passes inputs to the backbone that a batch does not have.

        Longformer's classifier lets the first token attend to all others; TimesFM makes all inputs of its backbone.
        Heads of language models only read states. A head that does not accept the batch stays left out.
        """
        is_left_out = self.callee is self.backbone and self.callee is not self.model
        if not is_left_out or getattr(self.model, "get_output_embeddings", lambda: None)() is not None:
            return
        states: dict[nn.Module, Tensor] = {}
        with evaluating(self.model):
            for callee in (self.backbone, self.model):
                self.callee = callee
                with suppress(Exception), forked_rng(self.model):
                    states[callee] = last_hidden_state(self.backbone_output(batch))
        found, alone = states.get(self.model), states.get(self.backbone)
        is_needed = found is not None and (alone is None or not torch.equal(alone, found))
        self.callee = self.model if is_needed else self.backbone

    def _tower_for(self, batch: dict[str, Any]) -> Callable[..., Any] | None:
        """The callable for the only tower that a batch has inputs for; None where the whole model is run."""
        takes = inspect.signature(self.model.forward).parameters
        texts, media = ([name for name in names if name in batch] for names in (TEXTS, MEDIA))
        # A language model runs without images; a model whose towers both encode does not.
        needs_media = hasattr(self.model, "get_text_features") and any(name in takes for name in MEDIA)
        if bool(texts) == bool(media) or "input_ids" not in takes or (texts and not needs_media):
            return None
        for name in texts or media:
            if (method := getattr(self.model, {**TEXTS, **MEDIA}[name], None)) is not None:
                return method
        found = [tower for name in media for tower in self._towers(name).values()]
        reached = [tower for tower in found if self._hosts & {id(module) for module in tower.modules()}]
        return reached[0] if reached else None

    def _towers(self, name: str) -> dict[str, nn.Module]:
        """The modules in the model whose first input has this name: path → module, the outermost first."""
        if name not in self._towers_by_input:
            inside = {path: module for path, module in self.model.named_modules() if path}
            first = {path: next(iter(inspect.signature(m.forward).parameters), "") for path, m in inside.items()}
            self._towers_by_input[name] = {path: module for path, module in inside.items() if first[path] == name}
        return self._towers_by_input[name]

    def final_states(self) -> dict[str, nn.Module]:
        """The modules that return a last hidden state: its name in transformers' outputs → the module."""
        if is_encoder_decoder(self.model):
            encoder, decoder = self.model.get_encoder(), self.model.get_decoder()
            return {"encoder_last_hidden_state": encoder, "last_hidden_state": decoder}
        if hasattr(self.model, "get_text_features") and any(hasattr(self.model, name) for name in MEDIA.values()):
            towers = [next(iter(self._towers(name).items()), None) for name in ("input_ids", *MEDIA)]
            return {f"{tower[0]}.last_hidden_state": tower[1] for tower in towers if tower is not None}
        return {"last_hidden_state": self.backbone}

    def poolers(self, batch: dict[str, Any]) -> dict[str, Callable[..., Any]]:
        """The methods that pool the towers with sites, or all towers if none has sites, by their last hidden states.

        Only towers that a batch has inputs for count. Empty where the towers do not encode by themselves.
        """
        finals = self.final_states()
        found: dict[str, Callable[..., Any]] = {}
        for given, method in {**TEXTS, **MEDIA}.items() if hasattr(self.model, "get_text_features") else ():
            tower = next(iter(self._towers(given).values()), None) if given in batch else None
            name = next((name for name, module in finals.items() if module is tower), None)
            if name is not None and hasattr(self.model, method):
                found[name] = getattr(self.model, method)
        reached = [name for name in found if self._hosts & {id(module) for module in finals[name].modules()}]
        return {name: found[name] for name in reached or found}


def positions_of(config: Any) -> int | None:
    """The number of tokens for which a model has positions; None if its configuration does not say."""
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int):
        return None
    return most - (config.pad_token_id or 0) - 1 if str(getattr(config, "model_type", "")) in _OFFSET_BY_PAD else most


def _raise_if_too_long(model: Any, inputs: dict[str, Any], error: Exception) -> None:
    """Raise `TextTooLong` if torch refused a batch that is longer than the model's positions."""
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


# ---- inputs and outputs ----------------------------------------------------------------------------------------------


def floats_of(tree: Any) -> Iterator[Tensor]:
    """The floating-point tensors in a tensor, or in tuples, lists, dicts and dataclasses of tensors."""
    # There are thousands of operations, with plain arguments: `tree_leaves` would take several times as long.
    if isinstance(tree, Tensor):
        tree = (tree,)
    elif isinstance(tree, dict):
        tree = tuple(tree.values())
    elif is_dataclass(tree) and not isinstance(tree, (type, PretrainedConfig)):  # these hold none
        tree = tuple(getattr(tree, entry.name) for entry in fields(tree))
    for part in tree if type(tree) in (tuple, list) else tree_leaves(tree):
        if isinstance(part, Tensor):
            if part.is_floating_point():
                yield part
        elif part is not None and part is not tree and not isinstance(part, (int, float, str)):
            yield from floats_of(part)


def distance(left: list[Tensor], right: list[Tensor]) -> float:
    """The largest relative distance, by norm, of two sets of outputs; non-finite entries of `right` are left out.

    It is infinite if an entry is non-finite in `left` alone, or if the shapes differ.
    """
    if [t.shape for t in left] != [t.shape for t in right]:
        return float("inf")
    worst = 0.0
    for a, b in zip(left, right, strict=True):
        finite = torch.isfinite(b)
        a, b = a[finite].double(), b[finite].double()
        if not bool(torch.isfinite(a).all()):
            return float("inf")
        scale = float(b.norm())
        worst = max(worst, float((a - b).norm()) / scale if scale else float((a != b).any()))
    return worst


def last_hidden_state(output: Any) -> Tensor:
    """The last hidden state in the output of a backbone: the output itself if it is a tensor, or the first of several.

    Raises:
        ValueError: If the output has no last hidden state.
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
