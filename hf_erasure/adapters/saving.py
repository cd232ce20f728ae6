"""Saving an adapter so that a folder holds all of one save or all of another, whenever the process is killed.

A save is written into a hidden folder inside the target (*staging*), synced to disk, and renamed to
`.hf-erasure-commit`: with this rename it is committed. Then its files are moved to their places, `adapter_config.json`
first, and the empty folder is removed. If a killed process has left a folder of that name, loading and the next save
finish the move. Renaming onto a folder that is not empty fails, so that saves at the same time commit one after the
other and their files are never mixed. The staging of a killed save is removed by the next save.

The functions in `ON_STAGED` write files that belong to an adapter, such as its card. Each is called with the staged
folder of an adapter, the model that is saved, a `PeftModel` or a transformers model, and the adapter's name: once for
each adapter of this package that a save writes, on the process that writes, when `adapter_config.json` and
`adapter_model.safetensors` are complete there and nothing has been committed. Its files are committed with them; an
error that it raises stops the save and leaves the target as it was. A `README.md` in the target is copied into the
staged folder first, so that it can be updated. In a save of a `PeftModel`, an adapter that is not called "default" has
a folder inside the staged folder of the whole save, which is `root_of(folder)`; `target_of(folder)` is the final place.
The functions write only directly in the adapter's staged folder and in `root_of(folder)`: a push uploads one level.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils import cached_file

from hf_erasure.models.model import as_attribute, base_of

from .common.acting import active_adapters, warn_user
from .common.config import ChildConfig, find_fault, read_config
from .common.files import CARD, COMMIT, CONFIG, PICKLE, PREFIX, STAGING, WEIGHTS
from .common.layer import AdapterChild, child_configs, is_child
from .common.lookup import adapters_in

# The folder of a staging with the files to commit; and the end of the name of a file that its live writer locks.
_CONTENT, _LOCK = "content", ".lock"

ON_STAGED: list[Callable[[Path, Any, str], None]] = []
# The target folder of a save that also pushes, while it pushes: the uploaded files lie in another folder.
PUSHED_FROM: ContextVar[Path | None] = ContextVar("pushed_from", default=None)
# The types of tensors that adapters have, by the names that safetensors has for them.
_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.int32: "I32"}
# Parts in the names of modules that were compiled, sharded or checkpointed by themselves.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


@contextmanager
def staged_save(folder: str | Path) -> Iterator[Path]:
    """Yield a hidden folder to write a save into; when the block ends, all its files go into `folder` at once."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    finish_save(folder)
    for lock_file in folder.glob(f"{STAGING}*{_LOCK}"):  # saves that were killed before their commit have left these
        # A link may lead to another person's file, and locking a file empties it.
        if lock_file.is_file() and not lock_file.is_symlink():
            former_lock = FileLock(lock_file, timeout=0)
            with suppress(Timeout, NotImplementedError):  # its writer is running, or the file system has no locks
                former_lock.acquire()
                _remove_staging(lock_file.with_suffix(""), former_lock)
    while True:  # this process locks a file beside the staging while it saves
        staging = folder / f"{STAGING}{secrets.token_hex(8)}"
        lock_file = staging.with_suffix(_LOCK)
        lock: BaseFileLock = FileLock(lock_file)
        try:
            lock.acquire()
        except NotImplementedError:  # in file systems without locks, the file only exists
            lock_file.unlink(missing_ok=True)
            lock = SoftFileLock(lock_file)
            lock.acquire()
        if lock_file.exists():
            break
        lock.release()  # another save has removed the file, as if this process had been killed
    try:
        content = staging / _CONTENT
        content.mkdir(parents=True)
        yield content
        _commit(content, folder)
    finally:
        _remove_staging(staging, lock)


def finish_save(folder: str | Path) -> None:
    """Finish a save that was killed after its commit; do nothing if the folder has no such save."""
    folder = Path(folder)
    commit = folder / COMMIT
    while os.path.lexists(commit):
        try:
            if not stat.S_ISDIR(commit.lstat().st_mode):
                raise ValueError(f"{str(commit)!r} is not a folder that a save has left: delete it.")
            # The configuration is first: with it the folder counts as an adapter, whose loading moves the other files.
            for file in sorted(commit.iterdir(), key=lambda path: (path.name != CONFIG, path.name)):
                if not stat.S_ISREG(file.lstat().st_mode):
                    raise ValueError(f"{str(file)!r} is not a file that a save has left: delete {str(commit)!r}.")
                os.replace(file, folder / file.name)  # a link in its place is replaced, not written to
            commit.rmdir()
        except FileNotFoundError:
            continue  # another process is finishing it too
        except OSError as error:
            if not _is_concurrent_save(error):
                raise OSError(
                    f"Move the files in {str(commit)!r} one folder up: a save was killed ({error})."
                ) from error
        _sync(folder)


def _commit(content: Path, folder: Path) -> None:
    """Sync all files to disk, then commit one folder after the other."""
    paths = list(content.rglob("*"))
    places = {path: folder / path.relative_to(content) for path in paths if path.is_dir()}
    for target in places.values():
        if target.is_symlink():
            raise ValueError(f"{str(target)!r} is a link to another place: delete it, or save into another folder.")
    for file in (path for path in paths if path.is_file()):
        _sync(file)
    # The deepest folders are first, and the root is last: it has the card of all adapters.
    for place in [*sorted(places, key=lambda path: -len(path.parts)), content]:
        _sync(place)
        if not any(place.iterdir()):
            continue
        target = places.get(place, folder)
        target.mkdir(parents=True, exist_ok=True)
        while True:
            finish_save(target)
            try:
                os.rename(place, target / COMMIT)  # this commits the folder
                break
            except OSError as error:
                if not _is_concurrent_save(error):
                    raise
        _sync(target)
        finish_save(target)


def _is_concurrent_save(error: OSError) -> bool:
    """Whether a folder could not be renamed or removed because another save is being committed there."""
    return error.errno in (errno.ENOTEMPTY, errno.EEXIST) or (os.name == "nt" and isinstance(error, PermissionError))


def _sync(path: Path) -> None:
    """Wait until a file or a folder is on disk, if the file system supports this."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot sync folders
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _remove_staging(staging: Path, lock: BaseFileLock) -> None:
    """Remove a staging, and its lock last."""
    if not staging.is_symlink():
        shutil.rmtree(staging, ignore_errors=True)
    lock.release()
    Path(lock.lock_file).unlink(missing_ok=True)


# The arguments for a push that transformers takes with `push_to_hub=True`.
_PUSH = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


def save_pretrained(original: Callable, model: Any, *args: Any, **kwargs: Any) -> None:
    """`save_pretrained` of a `PeftModel` or a transformers model; a save of an adapter of this package is staged."""
    call = inspect.signature(original).bind(*args, **kwargs)
    arguments, extra, is_peft = call.arguments, call.arguments.get("kwargs", {}), isinstance(model, PeftModel)
    folder, configs = Path(arguments["save_directory"]), child_configs(model)
    refuse_lost_adapters(model, None if is_peft else arguments.get("state_dict"))
    names: list[str] | None = arguments.get("selected_adapters") if is_peft else []
    if names is None:
        names = list(model.peft_config)
    elif not is_peft and getattr(model, "_hf_peft_config_loaded", False):
        names = model.active_adapters() if configs else ["default"]  # for other methods any name will do
        if not names:  # PEFT asks the first layer, in which the adapter that was deleted may have been the only one
            raise ValueError(
                f"None of the adapters {[*model.peft_config]} is active: call model.set_adapter(name) first."
            )
        others = [name for name in model.peft_config if name not in names] if configs else []
        on = active_adapters(model) if others else []
        unsaved = [name for name in others if name in on or getattr(configs.get(name), "sticky", False)]
        if unsaved:
            warn_user(
                f"The adapters {unsaved} act beside {names} and are not saved in {str(folder)!r}: save each into a "
                "folder of its own, after model.set_adapter(name)."
            )
    places = {name: name if is_peft and name != "default" else "" for name in names}
    ours = {name: place for name, place in places.items() if name in configs}
    decide = bool if is_peft else getattr(model, "should_save_on_this_rank", bool)
    writes = decide(arguments.get("is_main_process", True))
    for place in {*places.values()} - {*ours.values()} if writes else ():
        kind, _ = _read_kind(folder / place)
        if issubclass(PEFT_TYPE_TO_CONFIG_MAPPING.get(kind, PeftConfig), ChildConfig):
            warn_user(
                f"{str(folder / place)!r} held a {kind} adapter, and what is saved there now replaces it. Save each "
                "adapter into a folder of its own."
            )
    if not ours or not writes or folder.is_file():
        return original(*args, **kwargs)
    push, options = False, {}
    if not is_peft:
        push, options = arguments.pop("push_to_hub", False), {name: extra.pop(name) for name in _PUSH if name in extra}
        arguments["max_shard_size"] = sys.maxsize  # PEFT reads one file
    with _stage_adapters(model, ours, arguments):
        original(*call.args, **call.kwargs)
    if push:
        if arguments.get("token") is not None:
            options["token"] = arguments["token"]
        token = PUSHED_FROM.set(folder)
        try:
            model.push_to_hub(options.pop("repo_id", folder.resolve().name), **options)
        finally:
            PUSHED_FROM.reset(token)


@contextmanager
def _stage_adapters(model: Any, places: dict[str, str], arguments: dict[str, Any]) -> Iterator[None]:
    """Stage a save of our adapters, each at its place below the folder; the save's `arguments` are changed to that."""
    extra = arguments.get("kwargs", {})
    if not arguments.get("safe_serialization", extra.get("safe_serialization", True)):
        raise ValueError("safe_serialization=False would write a pickle, which is never loaded again: leave it out.")
    if arguments.get("distributed_checkpoint"):
        raise ValueError("distributed_checkpoint=True would write what no adapter is loaded from: leave it out.")
    folder, state_dict = Path(arguments["save_directory"]), arguments.get("state_dict", extra.get("state_dict"))
    for name, place in places.items():
        finish_save(folder / place)
        refuse_other_adapter(folder / place, model.peft_config[name])
        own_tensors(model, name, state_dict)  # an incomplete adapter raises here, before anything is written
    with staged_save(folder) as content:
        arguments["save_directory"] = str(content)
        yield
        for place in {"", *places.values()}:
            # The card that PEFT has just written is replaced by the existing card, which will be updated.
            card, staged_card = folder / place / CARD, content / place / CARD
            staged_card.unlink(missing_ok=True)
            if card.is_file() and not card.is_symlink():
                shutil.copyfile(card, staged_card)
        for name, place in places.items():
            for write in ON_STAGED:
                write(content / place, model, name)


def refuse_other_adapter(place: Path, config: PeftConfig) -> None:
    """Raise a `ValueError` if a folder holds an adapter of another kind, which a save would overwrite."""
    kind, why = _read_kind(place)
    if why or kind not in (None, config.peft_type):
        which = f"an adapter already, of a kind that cannot be told ({why})" if why else f"a {kind} adapter"
        raise ValueError(
            f"{str(place)!r} holds {which}, which the {getattr(config, 'described', 'LoRA')} would overwrite. Save it "
            "into another folder, or delete that one first."
        )


def _read_kind(place: Path) -> tuple[Any, str]:
    """The kind of the adapter in a folder, None without an adapter; and the reason if the kind cannot be read."""
    try:
        return (str(read_config(place / CONFIG).get("peft_type")) if os.path.lexists(place / CONFIG) else None), ""
    except (OSError, ValueError) as error:
        return None, str(error)


# ---- the tensors in the file of an adapter ---------------------------------------------------------------------------


def adapter_state_dict(original: Callable, model: Any, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
    """`get_peft_model_state_dict`; for an adapter of this package it returns `own_tensors`."""
    arguments = inspect.signature(original).bind(model, *args, **kwargs).arguments
    whole, adapter_name = getattr(model, "_orig_mod", model), arguments.get("adapter_name", "default")
    if not isinstance(whole.peft_config.get(adapter_name), ChildConfig):
        return original(model, *args, **kwargs)
    embeddings, state_dict = arguments.get("save_embedding_layers", "auto"), arguments.get("state_dict")
    if embeddings not in ("auto", False):
        raise ValueError(
            f"save_embedding_layers={embeddings!r} would put the model's own embeddings into the adapter, where no "
            "model loads them from: save the model itself, without adapters."
        )
    prefix = PREFIX if hasattr(whole, "get_base_model") else ""
    found = own_tensors(whole, adapter_name, whole.state_dict() if state_dict is None else state_dict)
    return {f"{prefix}{name}": tensor.detach() for name, tensor in found.items()}


def own_tensors(model: Any, adapter_name: str, state_dict: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Key in the file → tensor, for an adapter of either kind and for its `modules_to_save`.

    Values in a `state_dict`, such as gathered shards, are used before the model's own. Keys have no prefix of PEFT's.
    """
    config: ChildConfig = model.peft_config[adapter_name]
    is_wrapped = hasattr(model, "get_base_model")
    base: nn.Module = base_of(model) if is_wrapped else model
    overrides, root = state_dict or {}, PREFIX if is_wrapped else ""
    own: dict[str, Tensor] = {}
    copies: dict[str, Tensor] = {}
    for path, module in base.named_modules():
        kept: dict[str, tuple[str, Tensor]] = {}  # key below the module → the key in a file, and the value
        if isinstance(module, AdapterChild) and adapter_name in module.sticky_adapters:
            module.check_values(adapter_name)
            stores = module.stores(adapter_name)
            kept = {f"{part}.{adapter_name}": (part, store[adapter_name]) for part, store in stores.items()}
        elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            copied = module.modules_to_save[adapter_name].state_dict(keep_vars=True)
            kept = {f"modules_to_save.{adapter_name}.{name}": (name, tensor) for name, tensor in copied.items()}
        place = ".".join(part for part in path.split(".") if part not in _WRAPPERS)
        for key, (name, tensor) in kept.items():
            value = overrides.get(f"{root}{path}.{key}", overrides.get(f"{root}{place}.{key}", tensor))
            (own if isinstance(module, AdapterChild) else copies)[f"{place}.{name}"] = value
    found = {name: (_DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)) for name, tensor in own.items()}
    fault = find_fault(found, config, f"in this {type(base).__name__}") if config.fitted and own else None
    if not own:
        fault = f"no module of this {type(base).__name__} has adapter {adapter_name!r} any more"
    if fault is not None:
        raise ValueError(
            f"The {config.described} cannot be saved: {fault}. Nothing was written. Modules were taken out of the "
            "model or moved in it, as by merge_and_unload() or unload(), or fields that fitting writes were changed: "
            "save the adapter before that, or load it into the model that it was fitted on. To save a merged model, "
            "call save_pretrained of the model that merge_and_unload() returned, with another folder."
        )
    for end in config.modules_to_save or ():  # a name that matches no module is ignored
        named = [path for path, _ in base.named_modules() if path.endswith(end) and "modules_to_save" not in path]
        if named and not any(name.startswith(f"{path}.") for path in named for name in copies):
            raise ValueError(
                f"The {config.described} cannot be saved: {named[0]!r} is one of its modules_to_save="
                f"{config.modules_to_save}, and the adapter has no copy of it any more. Nothing was written. Load the "
                "adapter again, with PeftModel.from_pretrained(model, folder)."
            )
    for name, tensor in (own | copies).items():
        if tensor.device.type == "meta" or (tensor.is_floating_point() and not bool(tensor.isfinite().all())):
            raise ValueError(
                f"The {config.described} cannot be saved: {name!r} is on the meta device or has values that are not "
                "finite, and could not be loaded again. Nothing was written. Load the adapter again, into a model that "
                "has its weights, or look at the state_dict that was given."
            )
    return own | copies


# The fields of a configuration on which an adapter's effect depends, apart from its tensors.
_HASHED_FIELDS = (
    "peft_type",
    "site",
    "feature_factor",
    "learning_rate",
    "pair",
    "lora_alpha",
    "alpha_pattern",
    "use_rslora",
)


def digest_of(folder: str | Path, config: Any) -> str | None:
    """A hash in 16 hexadecimal digits of an adapter's effect; None where its weights are missing.

    It is the same for every copy, whether it was saved from a bare encoder or from a model with a head.
    """
    named = (cached_file(str(folder), name, _raise_exceptions_for_missing_entries=False) for name in (WEIGHTS, PICKLE))
    file = next(filter(None, named), None)
    if file is None:
        return None
    hashed = hashlib.sha256()
    settings: dict[str, Any] = {name: getattr(config, name, None) for name in _HASHED_FIELDS}
    dial = getattr(config, "dial", None)
    if dial is not None:
        settings["dial"] = [dial.strength, *dial.weights]
    hashed.update(json.dumps(settings, sort_keys=True, default=str).encode())
    if file.endswith(PICKLE):  # it is hashed, but never unpickled
        hashed.update(Path(file).read_bytes())
        return hashed.hexdigest()[:16]
    with torch.device("cpu"), safe_open(file, framework="pt") as content:
        names = sorted(content.keys())
        # Names are hashed without their common beginning, since a model with a head adds a prefix to all of them.
        first, last = (names[0].split("."), names[-1].split(".")) if names else ([], [])
        shared = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first) - 1)
        for name in names:
            value = content.get_tensor(name)
            value = value.float() if value.is_floating_point() else value
            hashed.update(f"{'.'.join(name.split('.')[shared:])} {list(value.shape)} {value.dtype}".encode())
            hashed.update(value.contiguous().flatten().view(torch.uint8).numpy())
    return hashed.hexdigest()[:16]


def digest_of_data(value: Any) -> str | None:
    """A hash of plain data in 16 hexadecimal digits; None for empty data."""
    if not value:
        return None
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def refuse_lost_adapters(model: Any, state_dict: Mapping[str, Any] | None = None) -> None:
    """Refuse a save of a model's tensors or `state_dict` that would lose adapters in it; warn where it may be meant."""
    saved: Any = model if getattr(model, "_hf_peft_config_loaded", False) else None
    if isinstance(model, PeftModel):
        saved = base_of(model)
    if all(m is saved or isinstance(m, BaseTuner) or "peft_config" not in vars(m) for m in model.modules()):
        return
    lost = [place for place in adapters_in(model, ChildConfig) if place.owner is not saved]
    if not lost or (state_dict is not None and not any(is_child(key) for key in state_dict)):
        return
    first = lost[0]
    phrase, name = f"the {first.config.described}, {first.name!r}, on {as_attribute(first.path)}", type(model).__name__
    if first.owner is model:
        raise ValueError(
            f"Saving this {name} would lose {phrase}, which PEFT added to it. Save the PeftModel, peft_model."
            "save_pretrained(folder), or merge it first; or add adapters by model.add_adapter and model.load_adapter."
        )
    part, own = as_attribute(first.path), list(getattr(model, "peft_config", None) or ())
    keep = f"{phrase}: {part}.save_pretrained(folder) saves it in a folder of its own"
    # transformers would look for the configuration of an acting adapter in this model, even if a part has it.
    acting = saved.active_adapters() if saved is model else []
    if not own or not set(acting) <= set(own):
        without = f"model.set_adapter({own})" if own else f"{part}.delete_adapter({first.name!r})"
        raise ValueError(f"Saving this {name} would lose {keep}. Call {without} before you save the model without it.")
    warn_user(f"Saving this {name} leaves out {keep}.")
