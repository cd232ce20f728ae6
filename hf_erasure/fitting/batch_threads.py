"""Run many batches through a model side by side, all stopping at the same module.

Every batch has a forward pass of its own, in a thread of its own, and only one thread runs at a time. A hook stops the
batch where the caller wants to look; once all batches wait, the caller decides what goes on and lets them run to the
next stop. So a decision at one depth can rest on all batches, no module runs twice, and nothing needs to be known about
the architecture: what a block hands to the next stays in the frames of its forward pass.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .activation_offload import LiveTensors, Shelf


class _Abandoned(BaseException):
    """Unwinds a forward pass that will not be continued."""


class Lane:
    """One batch on its way through the model.

    Attributes:
        index: The position of the batch.
        site: Where it waits; None before the start and after the end.
        hidden: The activation there.
        finished: Whether the forward pass has ended.
        visited: The sites where it has stopped so far.
    """

    def __init__(self, index: int, forward: Callable[[], Any], modes: Callable[[], ExitStack]) -> None:
        self.index = index
        self.site: str | None = None
        self.hidden: Tensor | None = None
        self.live: LiveTensors | None = None
        self.finished = False
        self.visited: list[str] = []
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(
            target=contextvars.copy_context().run,
            args=(self._run, forward, modes),
            name=f"hf-erasure-batch-{index}",
            daemon=True,
        )

    def _run(self, forward: Callable[[], Any], modes: Callable[[], ExitStack]) -> None:
        try:
            with modes(), self.live or nullcontext():
                forward()
        except _Abandoned:
            pass
        except BaseException as error:  # carried to the thread that waits
            self._error = error
        finally:
            self.finished, self.site, self.hidden = True, None, None
            self._stopped.release()

    def advance(self) -> None:
        """Let the batch run to its next stop, or to the end.

        Raises:
            BaseException: What the forward pass raised.
        """
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def stop(self, site: str, hidden: Tensor) -> None:
        """Called in the batch's own thread: show the activation, and wait until the caller lets it go on."""
        self.site, self.hidden = site, hidden
        del hidden
        self.visited.append(site)
        self._stopped.release()
        self._go.acquire()
        self.site, self.hidden = None, None
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the forward pass where it stands, and its thread."""
        if self._thread.ident is not None:
            self._abandoned = True
            self._go.release()
            self._thread.join()


@contextmanager
def lanes(forwards: Sequence[Callable[[], Any]], shelf: Shelf | None = None) -> Iterator[list[Lane]]:
    """One lane a forward pass, in the modes of the caller; no thread outlives the block, however it is left.

    Args:
        forwards: What to run.
        shelf: Where the tensors of waiting batches go, if they are not all to stay in memory.
    """
    modes = callers_modes()
    opened = [Lane(index, forward, modes) for index, forward in enumerate(forwards)]
    try:
        if shelf is not None:
            for lane in opened:
                lane.live = shelf.batch(lane.index)
        yield opened
    finally:
        for lane in opened:
            lane.abandon()
        if shelf is not None:
            shelf.close()


def callers_modes() -> Callable[[], ExitStack]:
    """What a new thread does not inherit: grad mode, inference mode, autocast and the default device."""
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    device = torch.get_default_device()
    autocasts = [
        (kind, torch.get_autocast_dtype(kind))
        for kind in {"cpu", device.type, *(["cuda"] if torch.cuda.is_available() else [])}
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    ]
    cached = torch.is_autocast_cache_enabled()

    def enter() -> ExitStack:
        stack = ExitStack()
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(gradients))
        # Setting a default device costs a check at every call, so it is left alone where it is the usual one.
        if device.type != "cpu":
            stack.enter_context(torch.device(device))
        for kind, dtype in autocasts:
            stack.enter_context(torch.autocast(kind, dtype=dtype, cache_enabled=cached))
        return stack

    return enter
