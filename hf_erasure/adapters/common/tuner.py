"""What the tuners of both kinds share: attaching children to modules without leaving a trace of a failure."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..loading.file_checks import refuse_unseen
from ..loading.fingerprint import check_base
from ..loading.key_renaming import rename_fitted, renaming
from .auxiliary import ActiveCopies
from .config import ChildConfig
from .field_checks import check_patterns
from .layer import AdapterChild, adapter_children
from .mixed_batches import Rows, check_names, keep_from_ignoring
from .placement import _enter_in_device_map, keep_from_broadcast

# So many names more than a model has modules may be in a list, as of a model with more layers.
_SPARE_NAMES = 10_000


class ChildTuner(BaseTuner):
    """A tuner that hangs a child on every targeted module; the modules themselves stay in place."""

    tuner_layer_cls: type[AdapterChild]
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  as in every tuner of PEFT

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if adapter_children(model, adapter_name):
            raise ValueError(
                f"adapter_name={adapter_name!r} is the name of an adapter that is there already. Choose another name, "
                "or delete that adapter first."
            )
        super().__init__(model, peft_config, adapter_name, *args, **kwargs)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Attach an adapter; a failure leaves the model as it was.

        Raises:
            ValueError: If the name, the targets or the base model do not fit the adapter.
        """
        # A configuration of its own: fitting writes into it, and the caller may use one for several models.
        config: Any = self.peft_config[adapter_name]
        config = self.peft_config[adapter_name] = config.copied()
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        copies = ActiveCopies(model)
        active = [(child, child._active_adapter) for child in adapter_children(model)]
        try:
            _check_name(adapter_name, model)
            refuse_unseen()
            _check_lists(config, model)
            check_patterns(config, (path for path, _ in model.named_modules()))
            if config.fitted:
                rename = renaming(model, config.fitted_modules)
                if rename not in (None, str):
                    rename_fitted(config, rename)
                _check_base(model, config)
                if config.target_modules is None:  # PEFT takes that for a default of its own
                    config.target_modules = exactly(list(config.fitted_modules), model)
            elif config.revision is None:
                # Of the base, like its name: what was downloaded.
                config.revision = getattr(getattr(model, "config", None), "_commit_hash", None)
            self._check_config(config)
            if kwargs.get("state_dict") is not None:
                kwargs["state_dict"] = self._keys_of_hosts(kwargs["state_dict"])
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            kin = [name for name, other in self.peft_config.items() if other.peft_type == config.peft_type]
            copies.hand_on(adapter_name, but=kin)
            refuse_copies(model, adapter_name)
            self._complete(model, adapter_name)
            if kwargs.get("state_dict") is None:  # which would be a wish for some of the modules
                _check_complete(model, adapter_name, config)
            _enter_in_device_map(model, adapter_name)
            note_adapters(model)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            remove_adapter(model, adapter_name)
            for child, names in active:
                child._active_adapter = names
            copies.restore()
            for parameter, required in trainable:
                parameter.requires_grad_(required)
            raise

    def _check_config(self, config: Any) -> None:
        """Refuse a configuration that cannot be attached to any model."""

    def _complete(self, model: nn.Module, adapter_name: str) -> None:
        """What is left to do when every child is in its place."""

    def delete_adapter(self, adapter_name: str) -> None:
        """Delete an adapter, and the children that held no other."""
        for child in self._children():  # before PEFT forgets its configuration
            child.refuse_if_merged(adapter_name)
        super().delete_adapter(adapter_name)
        remove_empty_layers(self.model)

    def unmerge_adapter(self) -> None:
        """Take back the merges of this kind; PEFT would take back those of all adapters, whoever merged them."""
        for child in self._children():
            child.unmerge()

    def _keys_of_hosts(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """PEFT takes what stands before the prefix in a key for the module to put an adapter on; that is the child."""
        child = self.tuner_layer_cls.child_name
        return {key.replace(f".{child}.{self.prefix}", f".{self.prefix}"): value for key, value in state_dict.items()}

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Called by `PeftModel` around `forward` and `generate`, with their arguments."""
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        check_names(self._children(), names)
        with self._mixed_batch(Rows(tuple(names), int(kwargs.get("num_beams") or 1))):
            yield

    def _mixed_batch(self, rows: Rows) -> AbstractContextManager[None]:
        """Let each row of the batches that are run now have an adapter of its own.

        Raises:
            ValueError: If that is impossible, as what to do instead.
        """
        raise NotImplementedError

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """PEFT's way to make one LoRA of several.

        Raises:
            ValueError: Says what there is instead.
        """
        raise NotImplementedError

    def _left_to_merge(self, names: list[str]) -> list[str]:
        """The adapters that are not merged yet; warns like PEFT when there are none, and of those that are."""
        merged = {name for child in self._children() for name in child.merged_adapters}
        left = [name for name in names if name not in merged]
        if merged and not left:
            warnings.warn("All adapters are already merged, nothing to do.", stacklevel=4)
        return left

    def _children(self) -> list[Any]:
        return [module for module in self.model.modules() if isinstance(module, self.tuner_layer_cls)]

    def _acting_adapters(self) -> list[str]:
        """The active adapters, and before them the sticky ones that act all the same."""
        sticky = {name for child in self._children() for name, on in child.sticky_adapters.items() if on}
        known = dict.fromkeys([*self.peft_config, *sorted(sticky)])
        return [*(name for name in known if name in sticky - set(self.active_adapters)), *self.active_adapters]

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        children = self._children()
        own = {name for child in children for name in child.adapters}
        if merge:
            self.merge_adapter(adapter_names, safe_merge=safe_merge)
        for child in children:
            if not merge and child.merged:
                child.unmerge()
            child.forget_originals()
            child.detach()
        for parent, name, wrapper in _saved_modules(self.model):
            if wrapper._adapters <= own and not adapter_children(wrapper):
                setattr(parent, name, wrapper.unload_and_optionally_merge_module(merge, safe_merge, adapter_names))
            for adapter in wrapper._adapters & own if wrapper._adapters - own else ():
                wrapper.delete_adapter(adapter, [])
        note_adapters(self.model)
        configs: dict[str, Any] = self.peft_config
        # Adapters of the other kind, and those of other methods, which stay.
        left = {
            name: config
            for name, config in configs.items()
            if name not in own and (adapter_children(self.model, name) or not isinstance(config, ChildConfig))
        }
        if left:
            self.model.peft_config = left
        elif hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def note_adapters(model: nn.Module) -> None:
    """What the model itself is told when adapters were added or removed; without any, it is as it was."""
    keep_from_broadcast(model)
    keep_from_ignoring(model)


def remove_adapter(model: nn.Module, adapter_name: str) -> None:
    """Take an adapter off all its modules, and the children that are empty then."""
    for child in adapter_children(model, adapter_name):
        child.merged_adapters = [name for name in child.merged_adapters if name != adapter_name]
        if child.adapters == [adapter_name]:
            child.detach()
        else:
            # So that PEFT does not choose another one to switch on, and say so: callers put back what was on.
            child._active_adapter = [name for name in child.active_adapters if name != adapter_name]
            child.delete_adapter(adapter_name)
    for _, _, wrapper in _saved_modules(model):
        if adapter_name in wrapper._adapters:  # some wrappers would switch off what acts in them all the same
            wrapper.delete_adapter(adapter_name, [])
    _unwrap_saved(model)
    note_adapters(model)


def remove_empty_layers(model: nn.Module) -> None:
    """Take off the children whose last adapter was deleted, so that the model is as it was before the first."""
    for child in adapter_children(model):
        if not child.adapters:
            child.detach()
    _unwrap_saved(model)
    note_adapters(model)


def _saved_modules(model: nn.Module) -> list[tuple[nn.Module, str, AuxiliaryTrainingWrapper]]:
    """The wrappers of `modules_to_save`, with where they are."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    return [(model.get_submodule(n.rpartition(".")[0]), n.rpartition(".")[2], wrapper) for n, wrapper in found]


def _unwrap_saved(model: nn.Module) -> None:
    """Put the modules back that no adapter has a copy of any more."""
    for parent, name, wrapper in _saved_modules(model):
        if not wrapper._adapters:
            setattr(parent, name, wrapper.original_module)


def refuse_copies(model: nn.Module, adapter_name: str, modules_to_save: Iterable[str] = ()) -> None:
    """PEFT's `modules_to_save` copies a module with all that hangs on it, and saves no adapter from inside the copy.

    Args:
        model: The base model.
        adapter_name: The adapter that is being added.
        modules_to_save: Those of that adapter, before they are copied.

    Raises:
        ValueError: Names the module that has an adapter of ours and is copied.
    """
    copied = [n for n, m in model.named_modules() if isinstance(m, AuxiliaryTrainingWrapper)]
    copied += [n for n, _ in model.named_modules() if n and any(n.endswith(end) for end in modules_to_save)]
    for child in adapter_children(model):
        inside = next((n for n in copied if f"{child.path}.".startswith(f"{n}.")), None)
        if inside is not None and not is_child(inside):
            raise ValueError(
                f"{adapter_name!r} cannot be added: {inside!r} is one of modules_to_save, and a copy of it would have "
                f"the {child.noun} at {child.path!r} too, which is not saved from there. Leave {inside!r} out of the "
                f"targets of the {child.noun}: PEFT does so where modules_to_save=[{inside!r}] is in the same "
                "configuration."
            )


def rehome_layers(model: nn.Module) -> None:
    """Move the children of modules that another adapter has wrapped out to the wrapper.

    An erasure then sees what the wrapped module and the other adapter give together, whichever came first, and the
    keys in the state dict stay as they are.
    """
    modules = dict(model.named_modules())
    for child in adapter_children(model):
        outermost = modules.get(child.path)
        if outermost is not None and outermost is not child.host:
            child.rehome(outermost)


@contextmanager
def out_of_sight(model: nn.Module) -> Iterator[None]:
    """Take the children out of the tree of modules for a while; their hooks stay, so that they act as they do.

    Another method that walks the tree to merge or unmerge its layers would merge them too.
    """
    hosts = {id(child.host): child.host for child in adapter_children(model)}
    kept = [(host, dict(host._modules)) for host in hosts.values()]
    try:
        for host, _ in kept:
            for kind in _kinds():
                host._modules.pop(kind.child_name, None)
        yield
    finally:
        for host, modules in kept:
            host._modules.clear()
            host._modules.update(modules)


def move_inside_wrappers(model: nn.Module) -> None:
    """The way back from `rehome_layers`, for when the wrappers are about to be taken away."""
    for child in adapter_children(model):
        if isinstance(child.host, BaseTunerLayer):
            child.rehome(child.host.get_base_layer())


def exactly(names: list[str], model: nn.Module) -> Any:
    """`target_modules` that mean these modules and no others.

    PEFT takes a name in a list for a suffix too, so that the final norm `norm` would stand for every `….norm`.
    """
    suffixes = tuple(f".{name}" for name in names)
    if any(name.endswith(suffixes) and name not in names for name, _ in model.named_modules()):
        return "|".join(re.escape(name) for name in names)
    return set(names)


def is_child(key: str) -> bool:
    """Whether a module's name is that of a child, or of something inside one."""
    return any(kind.child_name in key.split(".") for kind in _kinds())


def _kinds(kind: type[AdapterChild] = AdapterChild) -> list[type[AdapterChild]]:
    return [known for child in kind.__subclasses__() for known in (child, *_kinds(child))]


def _check_base(model: nn.Module, config: Any) -> None:
    """`check_base`, and what to do where weights differ because something is merged into them."""
    try:
        check_base(model, config)
    except ValueError as error:
        merged = {n for m in model.modules() if isinstance(m, BaseTunerLayer) for n in m.merged_adapters}
        if not merged:
            raise
        raise ValueError(
            f"{error} But {sorted(merged)} are merged into the weights here: call unmerge_adapter() before other "
            "adapters are loaded, and merge again afterwards."
        ) from error


def _check_lists(config: Any, model: nn.Module) -> None:
    """PEFT compares every name with every module, which takes forever for lists that no model is as long as."""
    modules = sum(1 for _ in model.modules())
    for field in ("target_modules", "exclude_modules", "modules_to_save"):
        names = getattr(config, field, None) or ()
        if not isinstance(names, str) and len(names) > modules + _SPARE_NAMES:
            raise ValueError(
                f"{field} names {len(names)} modules, and this {type(model).__name__} has {modules} in all: the "
                "configuration is damaged, or for another model."
            )


def _check_complete(model: nn.Module, adapter_name: str, config: Any) -> None:
    """A fitted adapter acts wherever it was fitted; a part of it that got no child would be missing in silence."""
    if config.fitted:
        places = {child.path for child in adapter_children(model, adapter_name)}
        left_out = [name for name in config.fitted_modules if name not in places]
        if left_out:
            raise ValueError(
                f"The {config.described} acts at {left_out[0]!r} and {len(left_out) - 1} other modules that no adapter "
                f"can be put on in this {type(model).__name__}."
            )


def _check_name(name: str, model: nn.Module) -> None:
    for kind in _kinds():
        prefix = f"{kind.child_name}_"
        if "." in name or prefix in name or name in ("", kind.child_name):
            raise ValueError(
                f"adapter_name={name!r} cannot be used: it becomes part of state-dict keys, so it must not be empty, "
                f"contain a dot, be {kind.child_name!r} or contain {prefix!r}."
            )
    if set(name) & set("/\\\0"):
        raise ValueError(f"adapter_name={name!r} cannot be used: a folder is called so when it is saved.")
    if any(name in path.split(".") for path, _ in model.named_modules()):
        raise ValueError(
            f"adapter_name={name!r} cannot be used: {type(model).__name__} has modules of that name, and PEFT would "
            "leave their tensors out when it saves any other adapter. Choose another name."
        )
