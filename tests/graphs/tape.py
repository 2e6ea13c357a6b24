"""A CUDA graph's likeness on a CPU: the operators of a run are written down with the tensors that they were given and
gave, and a replay executes the same operators on the same tensors, writing into the same memory. Python does not run
again, so that whatever a capture has read (scalings, adapters, settings) is frozen in it, as on a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastft.graphs.recorder import RerunRecorder


def _tensors(value) -> list[torch.Tensor]:
    return [t for t in tree_leaves(value) if isinstance(t, torch.Tensor)]


class _Writing(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.lines = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        fresh = [t.untyped_storage()._cdata not in given for t in _tensors(out)]
        self.lines.append((func, args, kwargs, _tensors(out), fresh))
        return out


class TapeRecorder(RerunRecorder):
    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        with _Writing() as tape:
            run()

        def replay() -> None:
            with torch.no_grad():
                for func, args, kwargs, outs, fresh in tape.lines:
                    new = _tensors(func(*args, **kwargs))
                    for old, t, is_fresh in zip(outs, new, fresh):
                        if is_fresh:
                            old.detach().copy_(t)

        return replay
