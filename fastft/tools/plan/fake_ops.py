"""Operators on fake tensors, remembered: what an operator returned for arguments of the same shapes, strides and dtypes
is made again without asking torch.

torch remembers too, but looks at everything a tensor may be, at a few hundred microseconds an operator; a plan runs
tens of thousands of operators, on plain dense tensors alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager

Operator = Callable[..., Any]
_PLAIN = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_NAMESPACES = ("aten", "prims", "bitsandbytes")  # operators whose result depends on their arguments' shapes alone


class _Result(NamedTuple):
    """One tensor that an operator returned. same: the argument that it is; of: the argument whose storage it shares;
    both None: a tensor of its own."""

    same: int | None
    of: int | None
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device


class FakeOperators:
    """The operators of one FakeTensorMode."""

    def __init__(self, fake: FakeTensorMode) -> None:
        self.fake = fake
        self._known: dict[Hashable, tuple[bool, list[_Result]] | None] = {}

    def __call__(self, run: Callable[[], Any], func: Operator, args: tuple, kwargs: dict) -> Any:
        """What `func(*args, **kwargs)` returns; `run()` asks torch, where that is not known."""
        tensors: list[FakeTensor] = []
        key = self._key(func, args, kwargs, tensors)
        if key is None:
            return run()
        if key in self._known:
            known = self._known[key]
            if known is None:
                return run()
            single, results = known
            made = [self._make(r, tensors) for r in results]
            return made[0] if single else tuple(made)
        before = [_facts(t) for t in tensors]
        out = run()
        self._known[key] = _described(out, tensors) if before == [_facts(t) for t in tensors] else None
        return out

    def _key(self, func: Any, args: tuple, kwargs: dict, tensors: list[FakeTensor]) -> Hashable | None:
        """None where the result is not to be remembered. Appends the arguments that are tensors to `tensors`."""
        if func.namespace not in _NAMESPACES or torch.Tag.nondeterministic_seeded in func.tags:
            return None
        parts: list[Hashable] = [func]
        for name, value in (*enumerate(args), *kwargs.items()):
            items = value if isinstance(value, (list, tuple)) else (value,)
            parts += [name, len(items) if items is value else -1]
            for x in items:
                if type(x) is FakeTensor or (type(x) is torch.nn.Parameter and isinstance(x, FakeTensor)):
                    tensors.append(x)
                    parts.append(_facts(x))
                elif isinstance(x, _PLAIN):
                    parts += [type(x), x]
                else:
                    return None
        # arguments that are one storage are not as those of several
        storages = [t.untyped_storage()._cdata for t in tensors] if len(tensors) > 1 else []
        parts.append(tuple(storages.index(s) for s in storages))
        return tuple(parts)

    def _make(self, result: _Result, tensors: list[FakeTensor]) -> torch.Tensor:
        if result.same is not None:
            return tensors[result.same]
        with in_kernel_invocation_manager(self.fake):
            made = torch.empty_strided(result.shape, result.stride, dtype=result.dtype, device="meta")
            if result.of is not None:
                storage = tensors[result.of].untyped_storage()
                made.set_(storage, result.offset, result.shape, result.stride)
        return FakeTensor(self.fake, made, result.device)


def _facts(t: FakeTensor) -> Hashable:
    return t.dtype, tuple(t.shape), t.stride(), t.storage_offset(), t.fake_device


def _described(out: Any, tensors: list[FakeTensor]) -> tuple[bool, list[_Result]] | None:
    """(whether one tensor was returned, the tensors); None for what cannot be made again from that."""
    outs = [out] if isinstance(out, torch.Tensor) else list(out) if isinstance(out, (tuple, list)) else None
    if not outs or any(type(t) is not FakeTensor for t in outs):
        return None
    own = [t.untyped_storage()._cdata for t in outs]
    given = [t.untyped_storage()._cdata for t in tensors]
    if len({s for s in own if s not in given}) < sum(s not in given for s in own):
        return None  # new tensors that share a storage
    results = []
    for t, storage in zip(outs, own):
        same = next((i for i, x in enumerate(tensors) if x is t), None)
        of = given.index(storage) if same is None and storage in given else None
        if of is None and same is None and t.storage_offset():
            return None
        results.append(_Result(same, of, tuple(t.shape), t.stride(), t.storage_offset(), t.dtype, t.fake_device))
    return isinstance(out, torch.Tensor), results
