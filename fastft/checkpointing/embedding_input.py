"""The first layer's input, by what it is a row of.

The first checkpoint of a decoder is what the input embedding returned. A frozen embedding gives it again, bit for bit,
from the token ids, which cost 8 bytes a token instead of a hidden state."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable

import torch
from torch import nn

from fastft.checkpointing.foreign_hooks import has_foreign_hooks
from fastft.compat.torch_private import FakeTensor


class Embedded:
    """A forward hook of an embedding module: remembers its last output, weakly, and the ids that it was made from."""

    def __init__(self) -> None:
        # .last: (the output and the module, weakly; ids; tensors and their versions), of this thread
        self.mine = threading.local()

    def __call__(self, module: nn.Module, args: tuple, output) -> None:
        self.mine.last = None
        if (
            torch.compiler.is_compiling()
            or not torch.is_grad_enabled()
            or len(args) != 1
            or not isinstance(output, torch.Tensor)
        ):
            return
        ids = args[0]
        held = [*module.parameters(), *module.buffers()]
        if has_foreign_hooks(module):
            return  # somebody else looks at the output, and may want its gradient
        plain = all(type(t) in (torch.Tensor, nn.Parameter, FakeTensor) and not hasattr(t, "ds_id") for t in held)
        if (
            not plain
            or any(t.requires_grad for t in held)
            or not isinstance(ids, torch.Tensor)
            or ids.is_inference()
            or ids.is_floating_point()
        ):
            return
        self.mine.last = weakref.ref(output), weakref.ref(module), ids, [(t, t._version) for t in (*held, ids)]

    def of(self, x: torch.Tensor) -> Callable[[], torch.Tensor] | None:
        """How to compute x again, if it is the last output, unchanged."""
        last = getattr(self.mine, "last", None)
        if last is None or last[0]() is not x or x._version or x._backward_hooks:
            return None
        _, module, ids, versions = last
        return None if (embedding := module()) is None else _Again(embedding, ids, versions)

    def __deepcopy__(self, memo) -> Embedded:
        new = memo[id(self)] = Embedded()
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back does nothing, and needs the standard library alone."""
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Again:
    def __init__(self, module: nn.Module, ids: torch.Tensor, versions: list[tuple[torch.Tensor, int]]):
        self.module, self.ids, self.versions = module, ids, versions

    def __call__(self) -> torch.Tensor:
        if any(t._version != version for t, version in self.versions):
            raise RuntimeError(
                "fastft: the token ids or the frozen embedding were changed in place between forward and backward, "
                "and the first layer's input is computed from them again: change them after the backward"
            )
        with torch.no_grad():
            return type(self.module).forward(self.module, self.ids)
