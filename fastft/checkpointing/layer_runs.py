"""How one layer of a forward is run: kept, recomputed without the last matrix product, recomputed by the
trainer's own function, recomputed from the host.

Each is called as transformers calls a checkpoint function, `run(function, *args)`. All give the same values and
gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from fastft.checkpointing.embedding_input import Embedded
from fastft.checkpointing.offload import HostTensor, Offloader
from fastft.compat.torch_private import storage_id
from fastft_kernels.recompute.replay import again, first_run

CheckpointFunction = Callable[..., object]
_PLAIN: dict[str, Any] = {"use_reentrant": False}


class CountedForward:
    """A layer's forward that knows when it is run again."""

    def __init__(self, function: Callable):
        self.function, self.done = function, False

    def __call__(self, *args):
        if self.done:
            with again():
                return self.function(*args)
        out = self.function(*args)
        self.done = True
        return out


class RestoredInputs(torch.autograd.graph.saved_tensors_hooks):
    """Hooks on the tensors that a checkpoint saves: its inputs, as what the layer itself saves is caught further
    inside. `x` is not kept but made again by `rows()`; with an offloader, floating-point tensors wait on the host."""

    def __init__(self, x: torch.Tensor | None, rows: Callable[[], torch.Tensor] | None, offloader: Offloader | None):
        where = None if x is None else storage_id(x.untyped_storage())

        def pack(t: torch.Tensor):
            if rows is not None and storage_id(t.untyped_storage()) == where:
                return rows
            return offloader.park(t) if offloader is not None and t.is_floating_point() else t

        def unpack(kept) -> torch.Tensor:
            if isinstance(kept, HostTensor):
                assert offloader is not None
                return offloader.fetch(kept)
            return kept if isinstance(kept, torch.Tensor) else kept()

        super().__init__(pack, unpack)


def checkpointed(
    function: Callable,
    args: tuple,
    embedded: Embedded | None = None,
    offloader: Offloader | None = None,
    again_in_full: bool = False,
    preserve_rng_state: bool = True,
):
    """torch's non-reentrant checkpoint of function(*args). Unless `again_in_full`, the recomputation stops before the
    last matrix product (see `replay.py`), whose result no gradient needs.
    embedded: args[0] may be the rows of a frozen embedding, and is then not kept; nor is its gradient computed, as
    nobody can ask for it. preserve_rng_state: False for a function that draws nothing."""
    if not again_in_full:
        function = CountedForward(function)
    settings: dict[str, Any] = _PLAIN if preserve_rng_state else _PLAIN | {"preserve_rng_state": False}
    rows = None if embedded is None else embedded.of(args[0])
    if rows is None and offloader is None:
        return checkpoint(function, *args, **settings)
    x = args[0].detach() if rows is not None else None
    with RestoredInputs(x, rows, offloader):
        return checkpoint(function, *(args if x is None else (x, *args[1:])), **settings)


def as_asked(theirs: CheckpointFunction, function: Callable, *args):
    """theirs(function, *args). A reentrant checkpoint's first run is without gradients; what is swapped inside must not
    take that for evaluation, as the second run has to repeat its bits."""
    with first_run():
        return theirs(function, *args)


def is_plain(function: CheckpointFunction) -> bool:
    """Is it torch's non-reentrant checkpoint without further settings? (Anything else was asked for, and is used.)"""
    if not isinstance(function, functools.partial):
        return False
    return function.func is checkpoint and not function.args and function.keywords == _PLAIN
