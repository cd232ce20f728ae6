"""State that is the same however it was made: under inference mode, autocast, another default dtype or device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


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
