"""What the adapter layers of both kinds have in common.

Replacing a module would lose LoRA targets inside it, change the keys of other adapters and bypass
`output_hidden_states`. So the module (the *host*) stays what it is: a child of it holds the state of all adapters as
buffers, and hooks on the host let them act.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features
from torch import Tensor, nn

from .config import ChildConfig


class StateDict(BufferDict):
    """Tensors by the name of their adapter, which accelerate leaves where they are.

    It asks a module for its buffers when it attaches hooks, and those would move them to the meta device
    (`offload_buffers=True`), where no forward of this module brings them back, and put the values of then in the place
    of later ones when the hooks are removed. A model that is asked for all its buffers has these among them.
    """

    def __setitem__(self, key: str, value: Tensor) -> None:
        """Keep a tensor that can be trained with, whatever mode it was made in."""
        super().__setitem__(key, ordinary(value))

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """None that are this module's alone."""
        return iter(())


# PEFT's status functions know the containers whose devices they report by the name of the class.
StateDict.__name__ = BufferDict.__name__


class AdapterChild(nn.Module, BaseTunerLayer):
    """The state of every adapter of one kind at one module.

    Attributes:
        child_name: What the child is called on its host.
        noun: What messages call an adapter of this kind.
        path: The host's name in the model.
        rows: Which adapter each row of the batch has while `adapter_names` are given; see `mixed_batches.Rows`.
    """

    child_name: ClassVar[str]
    noun: ClassVar[str]

    def __init__(self, host: nn.Module, path: str) -> None:
        super().__init__()
        self.path = path
        # In a tuple, so that the host does not become a submodule of its own child.
        self._host = (host,)
        self._awaits_values: set[str] = set()
        self.rows: Any = None
        self.merged_adapters = []
        # PEFT has it on the class until it is first set; compiled code notices the difference, and is compiled again.
        self._disable_adapters = False

    @property
    def host(self) -> nn.Module:
        """The module that this is a child of."""
        return self._host[0]

    @property
    def adapters(self) -> list[str]:
        """The adapters present here, in the order in which they were added."""
        raise NotImplementedError

    # BaseTunerLayer reads these from the module it wraps; this one wraps none.
    @property
    def weight(self) -> Tensor:
        """There is none, and PEFT takes that for an answer."""
        raise AttributeError(f"the {self.noun} has no weight of its own")

    @property
    def bias(self) -> Tensor:
        """There is none, and PEFT takes that for an answer."""
        raise AttributeError(f"the {self.noun} has no bias of its own")

    @property
    def in_features(self) -> int:
        """What the host takes, as a LoRA in its place would say."""
        return self._features()[0]

    @property
    def out_features(self) -> int:
        """What the host gives, as a LoRA in its place would say."""
        return self._features()[1]

    def _features(self) -> tuple[int, int]:
        host: Any = self.host
        while isinstance(host, BaseTunerLayer):
            host = host.get_base_layer()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a host that no LoRA goes on
            features, given = _get_in_out_features(host)
        if features is None or given is None:
            raise AttributeError(f"{type(host).__name__} at {self.path!r} has no in_features and out_features")
        return features, given

    # ---- adapters come and go ---------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: Any) -> None:
        """Make room for an adapter: values that are missing until loaded if its config says it was fitted."""
        raise NotImplementedError

    def await_values(self, name: str) -> None:
        """Fill an adapter with what is no value: one that never arrives must not pass for an adapter."""
        raise NotImplementedError

    def check_values(self, name: str) -> None:
        """Raise a `ValueError` that names the module and the adapter, if a value is missing or not finite."""
        raise NotImplementedError

    def state_of(self, name: str) -> tuple[Tensor, ...]:
        """An adapter's tensors as they are, for `restore_state`."""
        raise NotImplementedError

    def restore_state(self, name: str, state: tuple[Tensor, ...]) -> None:
        """Put back what `state_of` gave."""
        raise NotImplementedError

    def settle(self, name: str) -> None:
        """Take values that were just loaded into memory of their own.

        Loading leaves views into the mapped file: unaligned, so that sums round differently than before saving, and
        gone when the file is written anew.
        """
        raise NotImplementedError

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter that is not merged."""
        self.refuse_if_merged(adapter_name)
        super().delete_adapter(adapter_name)
        self._awaits_values.discard(adapter_name)

    def refuse_if_merged(self, adapter_name: str) -> None:
        """Raise a `ValueError` if an adapter is in the weights, since nothing could take it out of them afterwards."""
        if adapter_name in self.merged_adapters:
            raise ValueError(f"Adapter {adapter_name!r} is merged into the weights: call unmerge_adapter() first.")

    def detach(self) -> None:
        """Take this child and its hooks off the host."""
        self._unhook()
        self.host._modules.pop(self.child_name, None)

    def rehome(self, host: nn.Module) -> None:
        """Move this child and its hooks to another host, as when PEFT wraps the old one."""
        self.detach()
        self._host = (host,)
        host.add_module(self.child_name, self)
        self._hook()

    def _stay_real(self, converted: Tensor) -> Tensor:
        """Refuse to let state go where accelerate does not bring it back from."""
        sharding = PartialState._shared_state.get("distributed_type") == DistributedType.FSDP
        if converted.device.type == "meta" and sharding:
            raise ValueError(
                f"The {self.noun} at {self.path!r} would be lost: with cpu_ram_efficient_loading accelerate moves the "
                "model to the meta device to shard it, and brings parameters back, but no buffers. Set "
                "cpu_ram_efficient_loading=False (fsdp_cpu_ram_efficient_loading: false in its file), or attach the "
                "adapter after accelerator.prepare(…)."
            )
        return converted

    def _hook(self) -> None:
        raise NotImplementedError

    def _unhook(self) -> None:
        raise NotImplementedError

    def _get_available_adapters(self) -> set[str]:
        """What PEFT reports as available; it looks for parameters, and there are none here."""
        return set(self.adapters)

    # ---- which adapters act -----------------------------------------------------------------------------------------

    def switched_on(self) -> list[str]:
        """The adapters here that are meant to act, in order: sticky ones that are not active, then the active."""
        if self._disable_adapters:
            return []
        active = self.active_adapters if self.rows is None else self.rows.adapters
        on = [name for name, sticky in self.sticky_adapters.items() if sticky and name not in active]
        return on + [name for name in active if name in self.adapters]

    @property
    def sticky_adapters(self) -> dict[str, bool]:
        """Adapter name → whether it stays active beside others."""
        raise NotImplementedError

    def acting_adapters(self) -> list[str]:
        """The adapters that act unmerged on a forward pass."""
        raise NotImplementedError

    def without(self, name: str) -> AbstractContextManager[None]:
        """Let an adapter not act for a while, and all others as they do."""
        raise NotImplementedError

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off; off means that the weights are the base model's too."""
        if not enabled and self.merged:
            self.unmerge()
        super().enable_adapters(enabled)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """PEFT's `convert_to_lora` names what it writes after the adapter's own modules, which are not the hosts."""
        warnings.warn(
            f"PEFT cannot convert the {self.noun} to a LoRA, but hf_erasure can: call "
            f"hf_erasure.export_to_lora(model, {adapter_name!r}, folder).",
            stacklevel=3,
        )
        return False

    def forget_originals(self) -> None:
        """Drop the copies that `unmerge` needs: what is merged stays merged."""
        raise NotImplementedError


def is_container(module: nn.Module) -> bool:
    """Whether a module is a list of others, which a model goes through: a child in it would be one of them."""
    lists = (nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    return isinstance(module, lists) or type(module).forward is nn.Module.forward


def refuse_another_owner(child: AdapterChild, path: str) -> None:
    """Raise where a module has an adapter already that was added to a part of this model, or to one around it."""
    if child.path != path:
        raise ValueError(
            f"{path!r} has an adapter already, {child.adapters}, of a model in which it is called "
            f"{child.path!r}: one of the two models is a part of the other. Load both adapters into the same one: save "
            "the one that is there, delete it, and load it into this model."
        )


def refuse_container(path: str, module: nn.Module) -> None:
    """Raise a `ValueError` if a target is a list of modules."""
    if is_container(module):
        raise ValueError(
            f"{path!r} is a {type(module).__name__}, whose modules the model goes through, and no adapter can be put "
            rf"on it: name the modules in it, as in target_modules=r'{path}\.\d+'."
        )


def adapter_children(model: nn.Module, adapter_name: str | None = None) -> list[AdapterChild]:
    """The children of either kind in a model, in its order.

    Args:
        model: Any model, bare or wrapped in a `PeftModel`.
        adapter_name: Only those that hold this adapter.
    """
    children = [module for module in model.modules() if isinstance(module, AdapterChild)]
    return [child for child in children if adapter_name is None or adapter_name in child.adapters]


def child_configs(model: Any) -> dict[str, ChildConfig]:
    """The configurations of the adapters of either kind, by name."""
    configs = getattr(model, "peft_config", None) or {}
    return {name: config for name, config in configs.items() if isinstance(config, ChildConfig)}


def ordinary(tensor: Tensor) -> Tensor:
    """A tensor that can be trained with; what inference mode has made cannot, and is copied."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


@contextmanager
def outside_inference_mode() -> Iterator[None]:
    """Leave inference mode for a while; gradients stay off."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(False), torch.no_grad():
        yield


def ordinarily(original: Callable, _owner: Any, *args: Any, **kwargs: Any) -> Any:
    """Call a method of PEFT or transformers that makes parameters, which are to be trained later on."""
    with outside_inference_mode():
        return original(*args, **kwargs)
