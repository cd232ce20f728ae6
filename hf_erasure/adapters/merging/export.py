"""Export an adapter for programs without this package: a plain checkpoint, a LoRA, or a module behind a pooling.

Erasing a linear layer's input or output adds a product of two thin matrices to its weight, which a LoRA can do: `B A`
with `A = R, B = −W L` at the input and `A = R W, B = −L` at the output. The affine part's change of the bias is the
bias of `B`. The change of a GRADIEND adapter has a high rank, so only its largest singular values are kept.

A mean of tokens, or a single token, commutes with an affine map. So if an erasure acts only on the last hidden state,
erasing after the pooling gives the same embedding as erasing before it. Then the eraser is exported as a `Dense` module
behind the pooling, which needs only sentence-transformers.
"""

from __future__ import annotations

import copy
import importlib
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoProcessor, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_erasure.models.dummy import dummy_batch
from hf_erasure.models.model import last_hidden_state

from ..common.acting import adapters_now, auxiliary_wrappers, kind_of, remove_wrappers, warn_user
from ..common.config import ChildConfig, Provenance, adapter_config, number_of, short
from ..common.files import CONFIG, PREFIX, WEIGHTS
from ..common.layer import adapter_children, innermost
from ..common.lookup import FoundAdapter, adapter_of
from ..common.placement import owns_offloaded, shared_weights
from ..common.tuner import exact_targets
from ..erasure.config import ConceptErasureConfig
from ..erasure.layer import ErasureLayer, erasure_layers, hidden_of_output, site_layers
from ..gradiend.config import GradiendConfig
from ..gradiend.forward import edited_tensor
from ..gradiend.layer import gradiend_layers
from ..gradiend.model import base_modules
from ..gradiend.state import targeted_parameters
from ..loading.fingerprint import find_renaming
from ..loading.load import is_saved
from ..saving import refuse_other_adapter
from . import record
from .plan import plan_merge, refuse_sharded
from .probe import Probe

# The rank of a GRADIEND adapter's LoRA, unless the caller says otherwise.
DEFAULT_RANK = 16
# Tasks for which PEFT expects a trained head in an adapter's file, and the names of such heads.
_HEAD_TASKS, _HEADS = ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"), ("classifier", "score", "qa_outputs")
_ADAPTER = "default"
# Poolings whose weights of tokens add up to one: means, and single tokens.
_AFFINE_POOLINGS = ("mean", "cls", "lasttoken", "weightedmean")
# Poolings whose weights of tokens do not add up to one.
_LINEAR_POOLINGS = ("mean_sqrt_len_tokens",)


@dataclass(frozen=True)
class LoraExport:
    """The result of `export_to_lora`.

    Attributes:
        folder: The folder with the LoRA.
        modules: The modules that the LoRA acts on.
        unmergeable: Module → why PEFT's `merge_and_unload` cannot, or must not, merge the LoRA there.
        text: A summary in a few sentences.
        kept: The share of the squared norm of all changes of weights that is in the LoRA.
        left_out: Parameters that the adapter changes and that a LoRA cannot change.
    """

    folder: Path
    modules: list[str]
    unmergeable: dict[str, str]
    text: str
    kept: float = 1.0
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class _ModuleLora:
    """The LoRA of one module: `a` is `(rank, in)`, `b` is `(out, rank)`, and `shift` `(out,)` is added to its bias.

    Where PEFT puts a LoRA on a named parameter, usually a stack of experts, one matrix holds the parts of all experts.
    """

    module: nn.Module
    rank: int
    a: Tensor
    b: Tensor
    shift: Tensor | None = None
    parameter: str | None = None


def export_to_lora(model: nn.Module, adapter_name: str, folder: str | Path, *, rank: int | None = None) -> LoraExport:
    """Export a LoRA as `hf_erasure.export_to_lora` does, which calls this function, without writing the card."""
    found = adapter_of(model, adapter_name, ChildConfig)
    _refuse_idle(found.config)
    if isinstance(found.config, GradiendConfig):
        chosen = DEFAULT_RANK if rank is None else rank
        return _export_gradiend(found.owner, found.config, adapter_name, Path(folder), chosen)
    if rank is not None:
        raise ValueError(f"rank={rank} is for GRADIEND adapters; an erasure is exported exactly, with its own rank.")
    return _export_erasure(found.owner, found.config, adapter_name, Path(folder))


def _export_erasure(base: nn.Module, config: ChildConfig, name: str, folder: Path) -> LoraExport:
    if merged := sorted({name for child in adapter_children(base) for name in child.merged_adapters}):
        raise ValueError(f"{merged} are merged into the weights: call unmerge_adapter() before exporting an erasure.")
    layers = erasure_layers(base).values()
    refuse_sharded(base)
    before = record.Snapshot(layers, [])
    try:  # while only this erasure acts
        for layer in layers:
            layer._active_adapter, layer._disable_adapters = [name], False
            layer.sticky_adapters = dict.fromkeys(layer.adapters, False)
        plan = plan_merge(base, [name], Probe(base))
    finally:
        before.restore()
    loras: dict[str, _ModuleLora] = {}
    for path, module in plan.modules.items():
        if plan.erasers[path]:
            if owns_offloaded(module):
                raise ValueError(f"The weight of {path!r} is offloaded: load the model on one device to export it.")
            loras[path] = _lora_of(path, module, plan.erasers[path])
    if not loras:
        raise ValueError(f"The erasure {name!r} has rank 0 at every site: it has no change to export.")
    without_bias = [path for path, lora in loras.items() if lora.parameter or isinstance(lora.module, nn.Embedding)]
    if _has_bias_shifts(loras) and without_bias:
        raise ValueError(
            f"The erasure {name!r} cannot be exported: it changes biases, which needs lora_bias=True, and PEFT does "
            f"not support this for {without_bias[0]!r}. Fit it again with exclude_modules={without_bias}, or with "
            "site='input' or target_modules='readers' and affine=False, where no bias changes, or merge it instead."
        )
    return _write_lora(base, config, name, folder, loras)


def _lora_of(path: str, module: nn.Module, edits: list[record.EraserInWeight]) -> _ModuleLora:
    """Make the LoRA that changes a module as erasers do; raise an error where PEFT has no such LoRA."""
    if len({edit.parameter for edit in edits}) > 1:
        raise _export_error(path, f"several of its parameters change, {[edit.parameter for edit in edits]}")
    parameter, side = edits[0].parameter, edits[0].side
    weight, own_bias = module.get_parameter(parameter).detach(), record.bias_of(module, parameter)
    if not record.is_weight_layer(module):
        if any(bool((edit.right @ edit.bias).any()) for edit in edits):
            raise _export_error(
                path, f"it keeps the mean, for which a LoRA of its {parameter} has no bias (use affine=False)"
            )
        if own_bias is not None and side == "output":
            raise _export_error(path, f"its {own_bias} changes, too")
        return _lora_of_parameter(path, module, edits)
    bias = None if own_bias is None else module.get_parameter(own_bias).detach()
    if isinstance(module, record.CONVOLUTIONS) and side == "input" and weight[0, 0].numel() > 1:
        raise _export_error(path, "each position of this convolution's kernel changes in another way")
    change = record.weight_change(weight, bias, edits, record.scale_of(module))
    a, b = change.a, change.b
    if isinstance(module, record.CONVOLUTIONS):
        a, b = a.reshape(len(a), -1, *weight.shape[2:]), b.reshape(*b.shape, *[1] * (weight.dim() - 2))
    shift = None if record.scale_of(module) is not None else change.offset - (0 if bias is None else bias.double())
    return _ModuleLora(module, len(change.a), a, b, shift)


def _lora_of_parameter(path: str, module: nn.Module, edits: list[record.EraserInWeight]) -> _ModuleLora:
    """Make the LoRA of a matrix, or of a stack of experts' matrices, which PEFT usually has as `(experts, out, in)`."""
    parameter, side = edits[0].parameter, edits[0].side
    weight = module.get_parameter(parameter).detach()
    if weight.dim() != 2 and not (record.is_expert_stack(module, parameter, edits) and len(weight) > 1):
        raise _export_error(path, f"PEFT has no LoRA for its {parameter} of shape {tuple(weight.shape)}")
    matrices = [(weight, None, edits)] if weight.dim() == 2 else list(record.by_expert(weight, None, edits))
    a_parts, b_parts = [], []
    for matrix, _, here in matrices:
        change = record.weight_change(matrix, None, here)
        # The change of the matrix as it is stored is `rows @ columns`.
        is_turned = here[0].axis == (0 if side == "input" else 1)
        rows, columns = (change.a.T, change.b.T) if is_turned else (change.b, change.a)
        takes_rows = weight.dim() == 3 and getattr(module, "is_transposed", False)
        a_parts.append(rows.T if takes_rows else columns)
        b_parts.append(columns.T if takes_rows else rows)
    return _ModuleLora(
        module, len(a_parts[0]), torch.cat(a_parts), torch.stack(b_parts, dim=-1).flatten(1), parameter=parameter
    )


def _export_error(path: str, reason: str) -> ValueError:
    return ValueError(
        f"The erasure at {path!r} cannot be exported as a LoRA: {reason}. Merge it instead, with merge_and_unload() or "
        f"hf-erasure merge, or fit it again with exclude_modules=[{path!r}]."
    )


def _has_bias_shifts(loras: dict[str, _ModuleLora]) -> bool:
    return any(lora.shift is not None and bool(lora.shift.any()) for lora in loras.values())


def _refuse_idle(config: ChildConfig) -> None:
    if config.why_idle:
        raise ValueError(f"The {config.described} changes nothing: {config.why_idle}")


def _export_gradiend(base: nn.Module, config: GradiendConfig, name: str, folder: Path, rank: int) -> LoraExport:
    if rank < 1:
        raise ValueError(f"rank={rank} cannot be the rank of a LoRA: write a positive number.")
    loras: dict[str, _ModuleLora] = {}
    kept = lost = 0.0
    left_out: dict[str, float] = {}
    names = {id(innermost(module)): path for path, module in base_modules(base)}
    changes = ((own, *change) for own in gradiend_layers(base, name).values() for change in own.edits_of(name))
    for layer, parameter, edit in changes:
        layer.refuse_if_merged(name)
        shape, carriers = layer.parameter(parameter).shape, layer.owners[parameter]
        delta = edited_tensor(torch.zeros(shape, device=edit.values.device, dtype=torch.float32), [edit])
        energy = float(delta.double().square().sum())
        if not energy:
            continue
        if delta.dim() != 2 or not all(own == "weight" and record.is_weight_layer(m) for m, own in carriers):
            left_out[f"{layer.path}.{parameter}"] = energy
            continue
        # A tied weight is changed at each of its modules; Conv1D and Embedding store the transpose.
        stored_by_output = isinstance(carriers[0][0], nn.Linear)
        a, b, share = low_rank(delta if stored_by_output else delta.T, min(rank, *delta.shape))
        kept, lost = kept + share * energy, lost + (1 - share) * energy
        for module, _ in carriers:
            is_turned = isinstance(module, nn.Linear) != stored_by_output
            loras[names[id(module)]] = _ModuleLora(module, len(a), *((b.T, a.T) if is_turned else (a, b)))
    if not loras:
        raise ValueError(
            f"The GRADIEND adapter {name!r} changes no linear layer and no embedding, and a LoRA cannot change other "
            "weights. Merge it instead."
        )
    total = kept + lost + sum(left_out.values())
    text = f" It holds {kept / total:.1%} of the squared norm of the edit"
    text += f"; {lost / total:.1%} would need a higher rank" if lost / total > 5e-4 else ""
    if left_out:
        text += (
            f"; {sum(left_out.values()) / total:.1%} is in {len(left_out)} parameters that a LoRA cannot carry (norm "
            f"weights, biases and the like; the first is {next(iter(left_out))!r})"
        )
    written = _write_lora(base, config, name, folder, loras)
    return replace(written, text=f"{written.text}{text}.", kept=kept / total, left_out=list(left_out))


def low_rank(delta: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Factors `(rank, in)`, `(out, rank)` of the product nearest to `(out, in)`, and the share of the square kept."""
    if not 1 <= rank <= min(delta.shape):
        raise ValueError(f"rank={rank} is not between 1 and {min(delta.shape)}, the smaller side of the change.")
    u, s, v = torch.linalg.svd(delta.double(), full_matrices=False)
    energy, total = s.square(), float(s.square().sum())
    kept = float(energy[:rank].sum()) / total if total else 1.0
    return v[:rank].to(delta.dtype), (u[:, :rank] * s[:rank]).to(delta.dtype), kept


def _write_lora(
    base: nn.Module, config: ChildConfig, adapter_name: str, folder: Path, loras: dict[str, _ModuleLora]
) -> LoraExport:
    """Write a LoRA with the modules that were trained with the adapter; find the modules where PEFT cannot merge it."""
    wrappers: dict[str, Any] = auxiliary_wrappers(base)
    trained = {name: w.modules_to_save[adapter_name] for name, w in wrappers.items() if adapter_name in w._adapters}
    has_head = any(name.endswith(_HEADS) for name in trained)
    has_shifts, tied = _has_bias_shifts(loras), {name.rpartition(".")[0] for name in shared_weights(base)}
    parameters = {name: f"{name}.{lora.parameter}" for name, lora in loras.items() if lora.parameter is not None}
    ranks = {parameters.get(name, name): lora.rank for name, lora in loras.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    # PEFT matches these regular expressions with the end of a name; `^` makes them match the whole name.
    other = {f"^{name.replace('.', chr(92) + '.')}": rank for name, rank in ranks.items() if rank != usual}
    lora_config = LoraConfig(
        r=usual,
        lora_alpha=usual,  # equal to the rank everywhere: the scaling is 1
        rank_pattern=other,
        alpha_pattern=dict(other),
        target_modules=exact_targets([name for name in loras if name not in parameters], base),
        target_parameters=list(parameters.values()) or None,
        lora_bias=has_shifts,
        # PEFT corrects this for each module.
        fan_in_fan_out=all(isinstance(lora.module, Conv1D) for lora in loras.values()),
        modules_to_save=list(config.modules_to_save or ()) or None,
        task_type=config.task_type if has_head or config.task_type not in _HEAD_TASKS else None,
        # Without a task type, AutoPeftModel finds the class of the base here.
        auto_mapping={"base_model_class": type(base).__name__, "parent_library": type(base).__module__},
        base_model_name_or_path=config.base_model_name_or_path,
        inference_mode=True,
    )
    copies = {f"{path}.{key}": value for path, own in trained.items() for key, value in own.state_dict().items()}
    tensors = {f"{PREFIX}{name}": value.to("cpu", copy=True) for name, value in copies.items()}
    unmergeable: dict[str, str] = {}
    for name, lora in loras.items():
        weight = lora.module.get_parameter(lora.parameter or "weight")
        is_embedding = isinstance(lora.module, nn.Embedding)
        a, b = ("lora_embedding_A", "lora_embedding_B") if is_embedding else ("lora_A.weight", "lora_B.weight")
        parts = {a: lora.a, b: lora.b}
        if has_shifts and lora.shift is not None:
            parts["lora_B.bias"] = lora.shift
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        tensors |= {f"{PREFIX}{name}.{part}": t.to("cpu", dtype).contiguous() for part, t in parts.items()}
        if "lora_B.bias" in parts and lora.module._parameters.get("bias") is None:
            unmergeable[name] = "the affine part is a lora_bias, and the layer has no bias to merge it into"
        elif name in tied:
            unmergeable[name] = "its weight is shared with another module, which would change too"
    refuse_other_adapter(folder, lora_config)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    lora_config.save_pretrained(str(folder))
    more = ", with lora_bias" if has_shifts else ""
    more += f", and the adapter's {', '.join(trained)}," if trained else ""
    text = f"Wrote a LoRA of rank {usual} on {number_of(len(loras), 'module')}{more} to {folder}."
    for reason in dict.fromkeys(unmergeable.values()):
        at = [name for name, why in unmergeable.items() if why == reason]
        rest = f" and {number_of(len(at) - 1, 'other')}" if len(at) > 1 else ""
        text += f" PEFT applies it but cannot merge it at {at[0]!r}{rest}: {reason}."
    return LoraExport(folder, list(loras), unmergeable, text)


def load_with_erasure(model: str, adapter: str | Path) -> PeftModel:
    """Load a model with an adapter, in the class that `class_for` finds; warn of parameters that neither has."""
    config = adapter_config(adapter)
    if not isinstance(config, ChildConfig):
        raise ValueError(
            f"{str(adapter)!r} holds a {kind_of(config)} adapter, which is not one of hf_erasure: load and merge it "
            "with PEFT, PeftModel.from_pretrained(model, folder).merge_and_unload()."
        )
    chosen = class_for(AutoConfig.from_pretrained(model), [config])
    base, report = chosen.from_pretrained(model, output_loading_info=True)
    absent = sorted(n for n in report["missing_keys"] if not is_saved(n.rpartition(".")[0], config.modules_to_save))
    if absent:
        warn_user(
            f"{model!r} has no values for {len(absent)} parameters of {type(base).__name__}, nor has the adapter: "
            f"{short(absent)} are new and random here, and would be in a merged model. Name a checkpoint that has them."
        )
    with warnings.catch_warnings():  # PEFT reads a property that transformers has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        wrapped: PeftModel = PeftModel.from_pretrained(base, str(adapter), adapter_name=_ADAPTER)
    return wrapped


def save_merged(
    model: str, adapter: str | Path, folder: str | Path, *, max_shard_size: str | None = None, untie: bool = False
) -> str:
    """Merge an adapter and save the model with its tokenizer or processor; return a sentence on what was merged.

    Raises `ValueError` if the weights cannot take the adapter, or the folder holds an adapter, which `from_pretrained`
    would load onto the merged weights.
    """
    if (Path(folder) / CONFIG).exists():
        raise ValueError(f"{str(folder)!r} holds an adapter: write the merged model into another folder.")
    wrapped = load_with_erasure(model, adapter)
    config: Any = wrapped.peft_config[_ADAPTER]
    _refuse_idle(config)
    if isinstance(config, GradiendConfig):
        where, options = f"into {number_of(len(targeted_parameters(wrapped, _ADAPTER)), 'weight')}", {}
    else:
        where, options = (
            f"at {number_of(len(site_layers(wrapped, _ADAPTER)), 'site')} into the weights",
            {"untie": untie},
        )
    plain = wrapped.merge_and_unload(**options)
    plain.save_pretrained(folder, **({} if max_shard_size is None else {"max_shard_size": max_shard_size}))
    try:
        processor = AutoProcessor.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        warn_user(f"{folder} holds only the model, without tokenizer or processor: {reason}")
    else:
        processor.save_pretrained(folder)
    return f"Merged the {config.described} {where} of {type(plain).__name__}."


def class_for(config: PretrainedConfig, adapters: Sequence[ChildConfig]) -> Any:
    """The class in which to load a checkpoint: its own, or one of an adapter if its own lacks what adapters need."""
    names = [*(config.architectures or []), *(Provenance.of(adapter).base_class for adapter in adapters)]
    # The names come from files, so only classes of models in transformers are allowed, and only for this configuration.
    found: list[Any] = [kind for name in names if isinstance(kind := getattr(transformers, name, None), type)]
    known = [kind for kind in found if issubclass(kind, PreTrainedModel)]
    known = [kind for kind in known if isinstance(config, kind.config_class or ())]
    for candidate in known:
        with torch.device("meta"):
            model = candidate(config)
        if all(_has_modules(model, adapter) for adapter in adapters):
            return candidate
    return known[0] if known else AutoModel


def _has_modules(model: nn.Module, adapter: ChildConfig) -> bool:
    """Whether a model has the modules at which an adapter acts, and a module of those that were trained with it."""
    trained = tuple(adapter.modules_to_save or ())
    has_trained = not trained or any(name.endswith(trained) for name, _ in model.named_modules())
    return has_trained and find_renaming(model, adapter.fitted_modules) is not None


# ---- for sentence-transformers ---------------------------------------------------------------------------------------


def export_to_sentence_transformers(model: nn.Module, adapter_name: str, folder: str | Path) -> Path:
    """Write an erasure of the last hidden state as an ordinary SentenceTransformer, which loads without this package.

    Its modules are the plain transformer, the pooling, a `Dense` module that erases, and the modules after the pooling.

    Args:
        model: The SentenceTransformer whose transformer has the adapter. It is not changed.
        adapter_name: The adapter; other adapters must not act.
        folder: Where the SentenceTransformer is written.

    Returns:
        The folder.

    Raises:
        ValueError: If the adapter also acts before the last hidden state, the pooling does not commute with it, or the
            model has other modules; the message says what to do instead.
        ImportError: If sentence-transformers is not installed.
    """
    try:
        library: Any = importlib.import_module("sentence_transformers")
        modules: Any = importlib.import_module("sentence_transformers.sentence_transformer.modules")
    except ImportError as error:
        raise ImportError(
            "This needs sentence-transformers 5.4 or later: pip install -U sentence-transformers"
        ) from error
    found = adapter_of(model, adapter_name, ConceptErasureConfig)
    layer = _only_site(found)
    left, right, mean = (part.detach().double().cpu() for part in layer.eraser_state(adapter_name))
    if not isinstance(model, library.SentenceTransformer):
        raise ValueError(
            f"A {type(model).__name__} has no pooling after which to erase: pass a SentenceTransformer, with modules=["
            "models.Transformer(folder), models.Pooling(width, 'mean')] and the adapter on its transformer."
        )
    whole = copy.deepcopy(model)
    owner: Any = whole.get_submodule(found.path)
    for child in adapter_children(owner):
        child.detach()
    remove_wrappers(owner)
    owner.__dict__.pop("peft_config", None)
    owner._hf_peft_config_loaded = False
    parts = list(whole)
    if len(parts) < 2 or not isinstance(parts[0], modules.Transformer) or not isinstance(parts[1], modules.Pooling):
        raise ValueError(
            f"The first two modules of this SentenceTransformer are {[type(part).__name__ for part in parts[:2]]}, and "
            "the erasure must come directly after a Transformer and a Pooling: share the adapter instead."
        )
    # A model may pool in one way, or in several ways whose results are concatenated.
    modes = [parts[1].pooling_mode] if isinstance(parts[1].pooling_mode, str) else list(parts[1].pooling_mode)
    offset = left @ (right @ mean)
    for mode in modes:
        if mode not in (*_AFFINE_POOLINGS, *(_LINEAR_POOLINGS if not bool(offset.any()) else ())):
            remedy = "fit it with affine=False, or " if mode in _LINEAR_POOLINGS else ""
            raise ValueError(
                f"pooling by {mode!r} does not commute with the erasure {adapter_name!r}, so a module after it cannot "
                f"erase the same: {remedy}share the adapter instead."
            )
    erased = torch.block_diag(*[torch.eye(len(left), dtype=left.dtype) - left @ right] * len(modes))
    weight = next(p for p in found.owner.parameters() if p.is_floating_point())
    if not bool(erased.to(weight.dtype).isfinite().all()):
        raise ValueError(f"The map of {adapter_name!r} overflows {weight.dtype}: call float() of the model first.")
    dense = modules.Dense(
        len(erased),
        len(erased),
        bias=bool(offset.any()),
        activation_function=nn.Identity(),
        init_weight=erased.to(weight.dtype),
        init_bias=offset.repeat(len(modes)).to(weight.dtype) if bool(offset.any()) else None,
    )
    options = {key: getattr(whole, key) for key in ("prompts", "default_prompt_name", "similarity_fn_name")}
    result = library.SentenceTransformer(modules=[*parts[:2], dense, *parts[2:]], device=str(weight.device), **options)
    result.save_pretrained(str(folder))
    return Path(folder)


def _only_site(found: FoundAdapter[ConceptErasureConfig]) -> ErasureLayer:
    """The layer that erases the last hidden state; raise an error if the adapter acts elsewhere or others act, too."""
    name, owner = found.name, found.owner
    _refuse_idle(found.config)
    others = [other for other in adapters_now(owner).acting if other != name]
    merged = [child.path for child in adapter_children(owner) if child.merged]
    if others or merged:
        raise ValueError(
            f"The erasure {name!r} is exported alone, with the weights of the base model, but {others or merged} "
            "changes the model, too: unmerge merged adapters, and merge the others for good or delete them, first."
        )
    acting = [layer for layer in erasure_layers(owner, name).values() if layer.eraser_state(name)[0].shape[-1]]
    if len(acting) != 1 or not _is_last_hidden(owner, acting[0], name):
        raise ValueError(
            f"The erasure {name!r} does not only erase the last hidden state of {type(owner).__name__}: it acts at "
            f"{len(acting)} modules, {short([layer.path for layer in acting])}. A module after the pooling cannot do "
            "this: fit one with target_modules=[…] that names only the module which returns the last hidden state, or "
            "share the adapter instead."
        )
    return acting[0]


def _is_last_hidden(owner: nn.Module, layer: ErasureLayer, name: str) -> bool:
    """Whether the output of a site is the same tensor that the model returns as its last hidden state."""
    if layer.erasures[name].side != "output":
        return False
    states: list[Tensor] = []
    returned: list[Tensor] = []
    handle = layer.host.register_forward_hook(lambda *call: states.append(hidden_of_output(call[2], layer.path)))

    def watch(call: Any) -> None:
        states.clear()
        returned[:] = [last_hidden_state(call())]

    try:
        dummy_batch(owner, watch)
    finally:
        handle.remove()
    return len(states) == 1 and states[0].data_ptr() == returned[0].data_ptr() and states[0].shape == returned[0].shape
