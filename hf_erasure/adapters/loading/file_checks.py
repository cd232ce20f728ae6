"""An adapter's folder or repository, looked at before anything in it touches a model: anybody may have written it.

What is looked at is the configuration, and of the tensors their names, types and shapes, which stand in the first bytes
of a safetensors file. Both must describe the same adapter, so that what loading allocates is what the file has. Values
are checked when they have arrived. Never read is a pickle, nor what a link outside of the folder leads to.
"""

from __future__ import annotations

import inspect
import json
import os
import stat
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..common.config import ChildConfig, Provenance, short
from ..common.files import CONFIG, PICKLE, PREFIX, WEIGHTS

Rename = Callable[[str], str]
T = TypeVar("T")

# Bytes. A configuration that names ten thousand weights, each with samples of its values, has a few million.
MAX_CONFIG_BYTES = 16 * 2**20
# The types of tensors that adapters have, by the names that safetensors has for them.
TYPES = {torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
# Bytes. How much of a smaller file is on disk does not matter: it cannot fill the memory.
_SMALL = 2**28


@dataclass(frozen=True)
class Source:
    """Where an adapter is read from.

    Attributes:
        name: A folder, or the id of a repository on the Hub.
        subfolder: Where in it.
        options: What `hf_hub_download` takes besides.
        is_folder: Whether it is a folder on this machine.
    """

    name: str
    subfolder: str
    options: dict[str, Any]
    is_folder: bool

    @classmethod
    def of(cls, name: Any, *options: Any) -> Source:
        """Read the options of a call that loads an adapter; of those that come twice the last one counts."""
        given = {key: value for part in options for key, value in (part or {}).items() if value is not None}
        known = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "subfolder", "local_dir"}
        taken = {key: value for key, value in given.items() if key in known}
        return cls(os.fspath(name), given.get("subfolder") or "", taken, os.path.isdir(name))

    @property
    def folder(self) -> Path:
        """The folder with the adapter's files."""
        return Path(self.name, self.subfolder)

    def file(self, name: str) -> Path | None:
        """A file of the adapter, downloaded if need be; None where it has none of that name."""
        if self.is_folder:
            path = self.folder / name
            return path if os.path.lexists(path) else None
        try:
            return Path(hf_hub_download(self.name, name, subfolder=self.subfolder or None, **self.options))
        except LocalEntryNotFoundError:
            raise
        except EntryNotFoundError:
            return None


@dataclass(frozen=True)
class Read:
    """What was read of an adapter.

    Attributes:
        config: Its configuration; None where it is not an adapter of this package.
        tensors: Its tensors by their names without PEFT's prefix, in memory of their own.
        unseen: Why its files could not be looked at.
    """

    config: ChildConfig | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    unseen: str | None = None


def read_adapter(
    model: nn.Module, source: Source, config: PeftConfig | None = None, *, is_given: bool = True, pickled: bool = False
) -> Read:
    """Read an adapter and check all that can be before it is in a model.

    Args:
        model: What it is to be loaded into, without a `PeftModel` around it.
        source: Where from.
        config: Its configuration, where the caller has one already.
        is_given: Whether the caller gave it for this load; otherwise it is that of an adapter which is overwritten.
            What fitting wrote into the saved one it takes over, so that the one that an adapter was made with will do.
        pickled: Whether the caller asked for a pickle.

    Raises:
        ValueError: Says what is wrong with which file.
        TypeError: If a value in the configuration is of another type than it should be.
    """
    try:
        file = source.file(CONFIG)
    except Exception as error:
        if isinstance(config, ChildConfig):
            raise
        return Read(unseen=f"{type(error).__name__}: {error}")  # PEFT says better what went wrong
    seen = _stamps(file)
    stated = config if file is None else _config_of(file, source)
    if is_given and isinstance(config, ChildConfig):
        config = config.copied()
        if stated is not None and type(stated) is type(config):
            config.take_fitted(stated)
    config = config or stated
    if isinstance(stated, ChildConfig) and type(config) is not type(stated):
        raise ValueError(
            f"{str(source.folder)!r} holds the {stated.described}, and the configuration that is given is a "
            f"{type(config).__name__}: leave it out, or give one of the same kind."
        )
    if not isinstance(config, ChildConfig):
        return Read(unseen=None if isinstance(config, PeftConfig) else f"there is no {CONFIG}")
    if pickled:
        raise ValueError(f"use_safetensors=False would load a pickle as the {config.described}: leave it out.")
    weights = _weights_of(source, file)
    seen += _stamps(weights)
    failed: Exception | None = None
    try:
        check_tensors(weights, config, model, getattr(stated, "modules_to_save", None))
        with torch.device("cpu"):  # older releases of safetensors read to the default device
            tensors = {name.removeprefix(PREFIX): value.clone() for name, value in load_file(weights).items()}
    except Exception as error:
        failed = error
    if _stamps(file, weights) != seen:
        raise ValueError(f"{str(source.folder)!r} was saved anew while it was being loaded: load it again.") from failed
    if failed is not None:
        raise failed
    return Read(config, tensors)


# ---- the configuration -----------------------------------------------------------------------------------------------


def read_config(file: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`.

    Raises:
        ValueError: If it is not JSON, not an object, or far larger than any configuration.
    """
    size = _size_of_regular(file)
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"{str(file)!r} has {size} bytes, and no configuration is that long: it is damaged.")
    try:
        content = json.loads(file.read_bytes().decode("utf-8"))  # NaN may be among what was measured
    except RecursionError as error:
        raise ValueError(f"{str(file)!r} is nested too deeply to be a configuration: it is damaged.") from error
    except ValueError as error:  # of JSON, of Unicode, and of numbers with thousands of digits
        raise ValueError(f"{str(file)!r} is damaged: {error}. Copy or download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{str(file)!r} holds {short(content)} and no configuration: it is damaged.")
    return content


def _config_of(file: Path, source: Source) -> PeftConfig:
    """The configuration in a file if it is one of ours; an empty one if it is one of PEFT's."""
    if source.is_folder:
        _check_link(file, source)
    content = read_config(file)
    kind = content.get("peft_type")
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(
            f"{str(file)!r} says peft_type={short(kind)}, which this PEFT does not know: the file is damaged, or "
            "made for a newer release."
        )
    if not issubclass(PEFT_TYPE_TO_CONFIG_MAPPING[kind], ChildConfig):  # type: ignore[index]
        return PeftConfig()
    return PeftConfig.from_pretrained(str(file.parent))


# ---- the tensors -----------------------------------------------------------------------------------------------------


def _weights_of(source: Source, config: Path | None) -> Path:
    """The file with the tensors, in a repository that of the commit that the configuration is of."""
    if config is not None and not source.is_folder:
        revision = config.parents[len(Path(source.subfolder).parts)].name
        source = replace(source, options={**source.options, "revision": revision})
    weights = source.file(WEIGHTS)
    if weights is None:
        pickled = " It has a pickle, which could run any code and is never loaded." if source.file(PICKLE) else ""
        raise ValueError(f"{str(source.folder)!r} has no {WEIGHTS}.{pickled} Copy or download the complete adapter.")
    if source.is_folder:
        _check_link(weights, source)
    return weights


def check_tensors(file: Path, config: ChildConfig, model: nn.Module, saved: list[str] | None) -> None:
    """Compare the names, types and shapes in a file with what its configuration says.

    Args:
        file: The tensors.
        config: The configuration.
        model: What the adapter is loaded into, without a `PeftModel` around it.
        saved: The `modules_to_save` that must be there. PEFT's class of a task adds the head to those of `config`, and
            where an adapter was saved without one, the model's own stays.

    Raises:
        ValueError: Names the first tensor that is missing, too many, or of another type or shape.
    """
    found = rename_tensors(read_header(file), config, prefix_of(model))
    where = f"in {str(file)!r}"
    kind = (config.peft_type or "").lower()
    own = {name: entry for name, entry in found.items() if f".{kind}.{kind}_" in name}
    if config.modules_to_save or len(own) < len(found):
        _check_saved(found.keys() - own.keys(), found, config, model, saved, where)
    if not config.fitted:
        filled = next((name for name, (_, shape) in own.items() if any(shape)), None)
        if filled is not None:
            raise ValueError(f"The {config.described} was never fitted, and yet {filled!r} {where} has values.")
        return
    expected = config.tensors()
    missing, extra = sorted(expected.keys() - own.keys()), sorted(own.keys() - expected.keys())
    if missing:
        raise ValueError(
            f"{missing[0]!r} and {len(missing) - 1} other tensors of the {config.described} are missing {where}. Load "
            "the complete folder, or fit the adapter again."
        )
    if extra:
        raise ValueError(
            f"{extra[0]!r} and {len(extra) - 1} other tensors {where} do not belong to the {config.described}."
        )
    for name, (shape, types) in expected.items():
        dtype, present = own[name]
        if present != shape or dtype not in types:
            raise ValueError(
                f"{name!r} {where} has shape {list(present)} and type {dtype}, where {CONFIG} says shape "
                f"{list(shape)} and type {' or '.join(types)}: the two files are not of the same adapter."
            )


def read_header(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The type and the shape of each tensor in a safetensors file, by its name without PEFT's prefix.

    Raises:
        ValueError: If it is not such a file, is not complete, or says that it is far larger than what is on disk.
    """
    size, on_disk = _size_of_regular(file), getattr(file.stat(), "st_blocks", None)
    if on_disk is not None and size > _SMALL and on_disk * 512 < size // 8:
        raise ValueError(f"{str(file)!r} has {size} bytes, of which most are not on disk: copy or download it again.")
    try:
        with safe_open(file, framework="pt") as content:
            tensors = {name: content.get_slice(name) for name in content.keys()}  # noqa: SIM118  it is not a mapping
            found = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in tensors.items()}
    except (SafetensorError, RuntimeError) as error:  # the latter where it cannot be mapped
        raise ValueError(
            f"{str(file)!r} is damaged, or is not a safetensors file ({error}): copy or download it again."
        ) from error
    named = {name.removeprefix(PREFIX): entry for name, entry in found.items()}
    if len(named) < len(found):
        raise ValueError(f"{str(file)!r} is damaged: it has a tensor twice, with and without {PREFIX!r}.")
    return named


def _check_saved(
    names: Any,
    found: dict[str, tuple[str, tuple[int, ...]]],
    config: ChildConfig,
    model: nn.Module,
    saved: list[str] | None,
    where: str,
) -> None:
    """Of tensors that are none of the adapter, only those of `modules_to_save` may come, and those of `saved` must."""
    wanted: dict[str, tuple[int, ...]] = {}  # name → shape, of what `modules_to_save` mean here, as PEFT reads it
    modules: dict[str, Any] = dict(model.named_modules()) if config.modules_to_save else {}
    for path, module in modules.items():
        plain = ".".join(part for part in path.split(".") if part not in ("original_module", "base_layer"))
        if "modules_to_save" not in path.split(".") and is_saved(plain, config.modules_to_save):
            tensors = module.state_dict(keep_vars=True)
            kept = {*module._parameters, *module._buffers} & tensors.keys()
            wanted |= {f"{plain}.{name}": tuple(tensors[name].shape) for name in kept}
    required = {name for name in wanted if is_saved(name, saved)}
    extra, missing = sorted(names - wanted.keys()), sorted(required - names)
    of_modules = [name for name in extra if is_saved(name.rpartition(".")[0], config.modules_to_save)]
    if of_modules:
        raise ValueError(
            f"{of_modules[0]!r} {where} is of a module that was trained with the {config.described}, one of its "
            f"modules_to_save={short(config.modules_to_save)}. This {type(model).__name__} has no module of that name: "
            f"load the adapter into a {Provenance.of(config).base_class or 'model like that'}, which it was fitted "
            "on."
        )
    if extra:
        raise ValueError(
            f"{extra[0]!r} and {len(extra) - 1} other tensors {where} belong neither to the {config.described} nor to "
            f"its modules_to_save={short(config.modules_to_save)}: it would change the model itself."
        )
    if missing:
        raise ValueError(
            f"{missing[0]!r} and {len(missing) - 1} other tensors of modules_to_save={short(config.modules_to_save)} "
            f"are missing {where}. Load the complete folder."
        )
    for name, shape in wanted.items():
        if name in found and found[name][1] != shape:
            raise ValueError(
                f"{name!r} {where} has shape {list(found[name][1])}; in this model it has {list(shape)}. Load the "
                "adapter into the model it was fitted on."
            )


def is_saved(name: str, modules_to_save: Iterable[str] | None) -> bool:
    """Whether a module is one of `modules_to_save`, which PEFT knows by the ends of their names, or inside of one."""
    ends, parts = tuple(modules_to_save or ()), name.split(".")
    return any(".".join(parts[: depth + 1]).endswith(ends) for depth in range(len(parts)))


# ---- names in the bare model, and in the same model with a head ------------------------------------------------------


def renaming(model: nn.Module, names: Iterable[str]) -> Rename | None:
    """What turns names of modules into those that the same modules have in a model.

    Returns:
        None where a module is in this model neither as it is called, nor with or without the `base_model_prefix`.
    """
    names, modules, prefix = list(names), {name for name, _ in model.named_modules()}, f"{prefix_of(model)}."
    ways: tuple[Rename, ...] = (str, lambda name: prefix + name, lambda name: name.removeprefix(prefix))
    return next((rename for rename in ways if all(rename(name) in modules for name in names)), None)


def absent(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Of the names of modules, those that are not in a model; those under none of its names, where some have one."""
    modules, prefix = {name for name, _ in model.named_modules()}, f"{prefix_of(model)}."
    missing = [name for name in names if name not in modules]
    return [name for name in missing if not {prefix + name, name.removeprefix(prefix)} & modules] or missing


def prefix_of(model: Any) -> str:
    """What stands before the names of the bare model's modules in the same model with a head; may be empty."""
    body = getattr(model, "base_model", None)
    if isinstance(body, nn.Module) and body is not model:
        return next(name for name, module in model.named_modules() if module is body)
    return getattr(model, "base_model_prefix", "")


def rename_fitted(config: ChildConfig, rename: Rename) -> None:
    """Let a fitted adapter act at the modules of other names, and say so in all that it has written down of them."""
    at = list(config.fitted_modules)
    config.provenance = dict(config.provenance)
    for key in ("fitted_sites", "fitted_parameters"):
        if getattr(config, key, None):
            setattr(config, key, {rename(name): value for name, value in getattr(config, key).items()})
    measured = {key: config.provenance[key] for key in ("leakage", "leakage_intervals") if config.provenance.get(key)}
    for key, figures in measured.items():
        config.provenance[key] = {rename(name) if name in at else name: value for name, value in figures.items()}
    kept = config.provenance.get("fingerprint") or {}
    config.provenance["fingerprint"] = {rename(name): sample for name, sample in kept.items()}
    # Patterns were made for the other names; where it acts is known.
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        setattr(config, key, None)


def rename_tensors(tensors: dict[str, T], config: ChildConfig, prefix: str) -> dict[str, T]:
    """The tensors of a file under the names that the adapter's modules have in the model it is loaded into.

    Args:
        tensors: By their names in the file, without PEFT's prefix.
        config: The adapter's, with the names of this model.
        prefix: See `prefix_of`.
    """
    expected, named = config.tensors() if config.fitted else {}, {}
    for name, value in tensors.items():
        names = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
        named[next((known for known in names if known in expected), name)] = value
    return named if len(named) == len(tensors) else tensors


# ---- files -----------------------------------------------------------------------------------------------------------


def _size_of_regular(file: Path) -> int:
    """The size of a file; a device or a pipe has none, and might never end."""
    found = file.stat()
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"{str(file)!r} is not an ordinary file.")
    return found.st_size


def _check_link(file: Path, source: Source) -> None:
    """A link may lead to a place in the folder, or, in a cache of the Hub, to that repository's own blobs."""
    if not file.is_symlink():
        return
    folder, target = Path(os.path.realpath(source.name)), Path(os.path.realpath(file))
    inside = [folder]
    for place in (folder, *folder.parents):
        if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
            inside.append(place.parent.parent / "blobs")
    if not any(target.is_relative_to(place) for place in inside):
        raise ValueError(f"{str(file)!r} is a link to a place outside of its folder: put the file itself there.")


def _stamps(*files: Path | None) -> list[tuple[int, ...]]:
    """What changes when files are replaced, written to, or gone."""
    found: list[tuple[int, ...]] = []
    for file in files:
        if file is not None:
            with suppress(OSError):
                state = file.stat()
                found.append((state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns))
    return found
