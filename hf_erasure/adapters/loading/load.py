"""Loading an adapter into a transformers model, into a `PeftModel`, or by `PeftModel.from_pretrained`.

Three functions here replace those of transformers and PEFT, and call them for adapters of other methods. An adapter of
this package is read and checked before PEFT attaches it, and a load that fails is undone.

The files of an adapter may come from a stranger. The configuration must describe the same adapter as the names, types
and shapes in the header of the safetensors file, so that loading allocates only what the file has. Values are checked
after they are loaded. A pickle is never read, and a link to a file outside of the folder is not followed.
"""

from __future__ import annotations

import copy
import inspect
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers.utils.loading_report import LoadStateDictInfo

from hf_erasure.models.model import base_of

from ..common import acting
from ..common.config import ChildConfig, Provenance, find_fault, read_config, short
from ..common.files import COMMIT, CONFIG, PICKLE, PREFIX, UNCHECKED, WEIGHTS
from ..common.layer import adapter_children
from ..saving import finish_save
from .fingerprint import check_base, differences_since_fit, prefix_of

T = TypeVar("T")
# In bytes. A smaller file cannot fill the memory, so it is not checked how much of the file is really on disk.
_SMALL_FILE = 2**28


@dataclass(frozen=True)
class Source:
    """The place from which an adapter is read."""

    name: str  # a folder, or the id of a repository on the Hub
    subfolder: str  # the adapter's folder inside it; may be empty
    options: dict[str, Any]  # other arguments of `hf_hub_download`
    folder: Path  # the folder with the adapter's files
    is_folder: bool  # whether `name` is a folder on this machine

    @classmethod
    def of(cls, name: Any, *options: Any) -> Source:
        """Read the options of a call that loads an adapter; where an option is given twice, the last value counts."""
        arguments = {key: value for part in options for key, value in (part or {}).items() if value is not None}
        known = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "subfolder", "local_dir"}
        download_options = {key: value for key, value in arguments.items() if key in known}
        name, subfolder = os.fspath(name), arguments.get("subfolder") or ""
        return cls(name, subfolder, download_options, Path(name, subfolder), os.path.isdir(name))

    def file(self, name: str) -> Path | None:
        """A file of the adapter, which is downloaded if needed; None if the adapter has no file of that name.

        A link must lead into the folder or, in a cache of the Hub, to the repository's own blobs.
        """
        if not self.is_folder:
            try:
                return Path(hf_hub_download(self.name, name, subfolder=self.subfolder or None, **self.options))
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
        path = self.folder / name
        if not path.is_symlink():
            return path if path.exists() else None
        folder, target = Path(os.path.realpath(self.name)), Path(os.path.realpath(path))
        inside = [folder]
        for place in (folder, *folder.parents):
            if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
                inside.append(place.parent.parent / "blobs")
        if not any(target.is_relative_to(place) for place in inside):
            raise ValueError(f"{str(path)!r} is a link to a place outside of its folder: put the file itself there.")
        return path


@dataclass(frozen=True)
class AdapterFiles:
    """The parts of an adapter that were read."""

    config: ChildConfig | None = None  # its configuration; None where it is not an adapter of this package
    # Its tensors by their names without PEFT's prefix; they do not share memory with the file.
    tensors: dict[str, Tensor] = field(default_factory=dict)


# The adapter that `from_pretrained` has read before it calls `load_adapter`.
_READ_FILES: ContextVar[AdapterFiles | None] = ContextVar("read", default=None)


@contextmanager
def undo_or_warn(model: nn.Module, newcomer: str) -> Iterator[None]:
    """Undo a load that fails. After a load, warn of adapters that went off or act beside others than at fitting."""
    is_part = acting.ADDING.get()  # it is a part of a load that warns
    with acting.undone_on_failure(model, newcomer), acting.warn_of_switched_off(model, newcomer):
        known = () if is_part else acting.adapters_now(model).configs
        before = {name: differences_since_fit(model, name) for name in known}
        yield
        now = acting.adapters_now(model)
        for name in () if is_part else now.configs:
            differences = differences_since_fit(model, name) if name in now.acting or name == newcomer else ""
            if differences and differences != before.get(name):
                acting.warn_user(differences)


def load_adapter(original: Callable, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`load_adapter` of a transformers model."""
    call = inspect.signature(original).bind(*args, **kwargs)
    arguments, extra = call.arguments, call.arguments.get("kwargs", {})
    config, tensors = arguments.get("peft_config"), arguments.get("adapter_state_dict")
    name, load_config = arguments.get("adapter_name") or "default", arguments.get("load_config")
    place = arguments.get("peft_model_id") or getattr(load_config, "pretrained_model_name_or_path", None)
    with undo_or_warn(model, name):
        if place is None or tensors is not None:
            read = AdapterFiles()
            if tensors is not None and isinstance(config, ChildConfig):
                tensors = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
                read = AdapterFiles(copy.deepcopy(config), tensors)
        else:
            downloads = (getattr(load_config, "download_kwargs", None), extra.get("download_kwargs"))
            source = Source.of(place, *downloads, arguments.get("adapter_kwargs"), extra, arguments)
            pickled = extra.get("use_safetensors", getattr(load_config, "use_safetensors", None)) is False
            read = read_adapter(model, source, config, pickled=pickled)
        if read.config is None:
            return _load_by_original(original, call)
        if arguments.get("hotswap") is True:
            raise ValueError(f"hotswap=True is for a LoRA: leave it out to load the {read.config.described}.")
        if model._hf_peft_config_loaded and name in model.peft_config:
            raise ValueError(f"Adapter with name {name} already exists. Please use a different name.")
        read.config.inference_mode = not arguments.get("is_trainable", False)
        inject_adapter_in_model(read.config, model, name)
        model._hf_peft_config_loaded = True
        _load_values(model, name, read)
        if model.peft_config[name].inference_mode:
            model.eval()
            layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
            for layer in layers:
                layer.requires_grad_(False)
    # All fields are empty, since no tensor is missing or unexpected; the fields differ between releases.
    hints = get_type_hints(LoadStateDictInfo)
    return LoadStateDictInfo(**{field: (get_origin(hint) or hint)() for field, hint in hints.items()})


def load_into_peft_model(original: Callable, model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.load_adapter`, which may also load new values into an adapter that is already there."""
    call = inspect.signature(original).bind(*args, **kwargs)
    adapter_name, is_trainable = call.arguments["adapter_name"], call.arguments.get("is_trainable", False)
    present = model.peft_config.get(adapter_name)
    with undo_or_warn(model, adapter_name):
        source = Source.of(call.arguments["model_id"], kwargs)
        read = _READ_FILES.get() or read_adapter(model, source, present, is_given=False)
        if read.config is None:
            return _load_by_original(original, call)
        if present is None:
            read.config.inference_mode = not is_trainable
            model.add_adapter(adapter_name, read.config)
            if is_trainable:
                model.set_requires_grad(adapter_name)
        _load_values(model, adapter_name, read)
        if not is_trainable:
            model.eval()
    return _IncompatibleKeys([], [])


def peft_model_from_pretrained(original: Callable, cls: type, model: Any, *args: Any, **kwargs: Any) -> Any:
    """`PeftModel.from_pretrained`, which injects an adapter, freezes the model and then loads the weights."""
    call = inspect.signature(original).bind(model, *args, **kwargs)
    arguments = call.arguments
    with undo_or_warn(model, arguments.get("adapter_name", "default")), ExitStack() as stack:
        read = read_adapter(model, Source.of(arguments["model_id"], kwargs), arguments.get("config"))
        stack.callback(_READ_FILES.reset, _READ_FILES.set(read))
        if read.config is None:
            return _load_by_original(original, call)
        arguments["config"] = read.config
        # If PEFT saw the device map of an offloaded model, it would dispatch the model anew and load offloaded weights.
        base = base_of(model) if isinstance(model, PeftModel) else model
        if "hf_device_map" in vars(base):
            stack.callback(setattr, base, "hf_device_map", vars(base).pop("hf_device_map"))
        return original(*call.args, **call.kwargs)


def _load_by_original(original: Callable, call: inspect.BoundArguments) -> Any:
    """Let PEFT or transformers load an adapter that is not of this package, or whose files could not be checked."""
    token = UNCHECKED.set(True)
    try:
        return original(*call.args, **call.kwargs)
    finally:
        UNCHECKED.reset(token)


def _load_values(model: Any, name: str, read: AdapterFiles) -> None:
    """Store a file's values in an adapter; a head that was not saved is copied from a LoRA, or else from the model."""
    base = base_of(model) if isinstance(model, PeftModel) else model
    named = rename_tensors(read.tensors, model.peft_config[name], prefix_of(base))
    with torch.inference_mode(False), torch.no_grad():
        for child in adapter_children(base, name):
            stem = f"{child.path}.{child.child_name}"
            child.load_values(name, {part: named.get(f"{stem}.{part}") for part in child.stores(name)})
        configs = acting.adapters_now(model).configs
        for path, wrapper in acting.auxiliary_wrappers(base).items():
            if name not in wrapper._adapters:
                continue
            copies: Any = wrapper.modules_to_save
            trained = [copies[other] for other in copies if not isinstance(configs.get(other), ChildConfig)]
            present: dict[str, Tensor] = [*trained, wrapper.original_module][0].state_dict()
            found = {key: named.get(f"{path}.{key}", value) for key, value in present.items()}
            found = {key: value for key, value in found.items() if not value.is_meta}
            if any(value.is_floating_point() and not bool(torch.isfinite(value).all()) for value in found.values()):
                raise ValueError(
                    f"The modules_to_save={model.peft_config[name].modules_to_save} of adapter {name!r} are not "
                    f"finite: {WEIGHTS} holds NaN. Copy or download it again."
                )
            is_elsewhere = any(value.is_meta for value in copies[name].parameters())
            copies[name].load_state_dict(found, strict=False, assign=is_elsewhere)


# ---- reading files that may come from a stranger ---------------------------------------------------------------------


def read_adapter(
    model: Any, source: Source, config: PeftConfig | None = None, *, is_given: bool = True, pickled: bool = False
) -> AdapterFiles:
    """Read an adapter and check it before it is attached to a model; a save that was killed is finished first.

    If `is_given`, the caller gave `config` for this load: it takes over what fitting wrote into the saved one, so that
    a configuration from before the fit is enough. Otherwise `config` is that of an adapter which is overwritten.
    """
    if os.path.lexists(source.folder / COMMIT):
        finish_save(source.folder)
    try:
        file = source.file(CONFIG)
    except Exception:
        if isinstance(config, ChildConfig) or source.is_folder:
            raise
        return AdapterFiles()  # PEFT's own error is clearer
    stamps = _stamps(file)
    saved = config if file is None else _config_of(file)
    if is_given and isinstance(config, ChildConfig):
        config = copy.deepcopy(config)  # the caller's own stays as it is
        if saved is not None and type(saved) is type(config):
            config.adopt_fit(saved)
    config = config or saved
    if isinstance(saved, ChildConfig) and type(config) is not type(saved):
        raise ValueError(
            f"{str(source.folder)!r} holds the {saved.described}, but the given configuration is a "
            f"{type(config).__name__}: leave it out, or give one of the same kind."
        )
    if not is_given and isinstance(config, ChildConfig) and isinstance(saved, ChildConfig) and saved is not config:
        _check_same_meaning(config, saved, base_of(model), source)
    if not isinstance(config, ChildConfig):
        return AdapterFiles()
    if pickled:
        raise ValueError(f"use_safetensors=False would load a pickle as the {config.described}: leave it out.")
    weights = _weights_of(source, file)
    stamps += _stamps(weights)
    failed: Exception | None = None
    try:
        base = base_of(model) if isinstance(model, PeftModel) else model
        check_tensors(weights, config, base, getattr(saved, "modules_to_save", None))
        with torch.device("cpu"):  # older releases of safetensors read onto the default device
            tensors = {name.removeprefix(PREFIX): value.clone() for name, value in load_file(weights).items()}
    except Exception as error:
        failed = error
    if _stamps(file, weights) != stamps:
        raise ValueError(f"{str(source.folder)!r} was saved anew while it was being loaded: load it again.") from failed
    if failed is not None:
        raise failed
    return AdapterFiles(config, tensors)


def _check_same_meaning(present: ChildConfig, saved: ChildConfig, base: nn.Module, source: Source) -> None:
    """Refuse values for an adapter that is there and whose configuration, which stays, gives them another meaning."""
    for name in present.read_with:
        own, other = getattr(present, name), getattr(saved, name)
        if own != other:
            raise ValueError(
                f"{str(source.folder)!r} holds the {saved.described} with {name}={short(other)}, and the adapter that "
                f"is there, whose configuration stays, has {name}={short(own)}. Load it under another adapter_name, or "
                "call delete_adapter with this one first."
            )
    if Provenance.of(saved).fingerprint != Provenance.of(present).fingerprint:
        check_base(base, saved)


def _config_of(file: Path) -> PeftConfig:
    """The configuration in a file if it is of this package; an empty `PeftConfig` if it is of another method."""
    content = read_config(file)
    kind = content.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{str(file)!r} has peft_type={short(kind)}, which this PEFT does not know: the file is damaged, or "
            "made for a newer release."
        )
    if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], ChildConfig):  # type: ignore[index]
        return PeftConfig()
    return PeftConfig.from_pretrained(str(file.parent))


def _weights_of(source: Source, config: Path | None) -> Path:
    """The file with the tensors; from a repository, it is that of the same commit as the configuration."""
    if config is not None and not source.is_folder:
        revision = config.parents[len(Path(source.subfolder).parts)].name
        source = replace(source, options={**source.options, "revision": revision})
    weights = source.file(WEIGHTS)
    if weights is None:
        pickled = " It has a pickle, which could run any code and is never loaded." if source.file(PICKLE) else ""
        raise ValueError(f"{str(source.folder)!r} has no {WEIGHTS}.{pickled} Copy or download the complete adapter.")
    return weights


def _stamps(*files: Path | None) -> list[tuple[int, ...]]:
    """Numbers that change when files are replaced, written to or deleted."""
    found: list[tuple[int, ...]] = []
    for file in files:
        if file is not None:
            with suppress(OSError):
                state = file.stat()
                found.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return found


# ---- comparing the tensors in a file with its configuration ----------------------------------------------------------


def check_tensors(file: Path, config: ChildConfig, model: nn.Module, saved: list[str] | None) -> None:
    """Compare the header of a safetensors file with a configuration; `saved` are the modules that it must hold."""
    state, where = file.stat(), f"in {str(file)!r}"
    if not stat.S_ISREG(state.st_mode):  # reading a pipe might never end
        raise ValueError(f"{str(file)!r} is not an ordinary file.")
    size, on_disk = state.st_size, getattr(state, "st_blocks", None)
    if on_disk is not None and size > _SMALL_FILE and on_disk * 512 < size // 8:
        raise ValueError(f"{str(file)!r} has {size} bytes, of which most are not on disk: copy or download it again.")
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118  it is not a mapping
            header = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in tensors.items()}
    except (SafetensorError, RuntimeError) as error:  # RuntimeError if it cannot be mapped into memory
        raise ValueError(
            f"{str(file)!r} is damaged, or is not a safetensors file ({error}): copy or download it again."
        ) from error
    found = {name.removeprefix(PREFIX): entry for name, entry in header.items()}
    if len(found) < len(header):
        raise ValueError(f"{str(file)!r} is damaged: it has a tensor twice, with and without {PREFIX!r}.")
    found = rename_tensors(found, config, prefix_of(model))
    kind = (config.peft_type or "").lower()
    own = {name: entry for name, entry in found.items() if f".{kind}.{kind}_" in name}
    if config.modules_to_save or len(own) < len(found):
        others = {name: shape for name, (_, shape) in found.items() if name not in own}
        _check_saved_modules(others, config, model, saved, where)
    if not config.fitted:
        filled = next((name for name, (_, shape) in own.items() if any(shape)), None)
        if filled is not None:
            raise ValueError(f"The {config.described} was never fitted, but {filled!r} {where} has values.")
        return
    fault = find_fault(own, config, where)
    if fault is not None:
        raise ValueError(f"{fault}. Load the complete folder, or fit the adapter again.")


def _refuse_tensors(names: Iterable[str], message: str) -> None:
    if found := sorted(names):
        raise ValueError(f"{found[0]!r} and {len(found) - 1} other tensors {message}")


def _check_saved_modules(
    found: dict[str, tuple[int, ...]], config: ChildConfig, model: nn.Module, saved: list[str] | None, where: str
) -> None:
    """Check tensors that are not the adapter's: only those of `modules_to_save` are allowed, `saved` ones must exist.

    A task class of PEFT adds its head to the `config`; if the adapter was saved without one, the model's head stays.
    """
    wanted: dict[str, tuple[int, ...]] = {}  # name → shape, for the modules that PEFT matches with `modules_to_save`
    modules: dict[str, Any] = dict(model.named_modules()) if config.modules_to_save else {}
    for path, module in modules.items():
        plain = ".".join(part for part in path.split(".") if part not in ("original_module", "base_layer"))
        if "modules_to_save" not in path.split(".") and is_saved(plain, config.modules_to_save):
            tensors = module.state_dict(keep_vars=True)
            kept = {*module._parameters, *module._buffers} & tensors.keys()
            wanted |= {f"{plain}.{name}": tuple(tensors[name].shape) for name in kept}
    setting, extra = f"modules_to_save={short(config.modules_to_save)}", sorted(found.keys() - wanted.keys())
    base = Provenance.of(config).base_class or "model of the class"
    _refuse_tensors(
        extra,
        f"{where} belong neither to the {config.described} nor to modules of this {type(model).__name__} that "
        f"{setting} names: they would change the model itself. Load the adapter into a {base} that it was fitted on.",
    )
    required = {name for name in wanted if is_saved(name, saved)}
    _refuse_tensors(required - found.keys(), f"of {setting} are missing {where}. Load the complete folder.")
    for name, shape in found.items():
        if shape != wanted[name]:
            raise ValueError(
                f"{name!r} {where} has shape {list(shape)}; in this model it has {list(wanted[name])}. Load the "
                "adapter into the model it was fitted on."
            )


def is_saved(name: str, modules_to_save: Iterable[str] | None) -> bool:
    """Whether a module is one of `modules_to_save`, or inside one; PEFT matches the ends of names."""
    ends, parts = tuple(modules_to_save or ()), name.split(".")
    return any(".".join(parts[: depth + 1]).endswith(ends) for depth in range(len(parts)))


def rename_tensors(tensors: dict[str, T], config: ChildConfig, prefix: str) -> dict[str, T]:
    """The tensors of a file under the names that the adapter's modules have in the model it is loaded into."""
    expected, named = config.tensors() if config.fitted else {}, {}
    for name, value in tensors.items():
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        named[next((known for known in names if known in expected), name)] = value
    return named if len(named) == len(tensors) else tensors
