"""Static tensors: what a captured graph reads and writes, always at the same addresses.

A call's tensors are copied into them before a replay. Those that all layers of a stack are given (position embeddings,
masks) are copied once a forward: a `SharedBuffer` knows the tensor that it holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import torch

from fastft.graphs.arguments import Unsupported

Token = Callable[[], object]  # a weak reference that lives as long as a call waits for its backward


def _unique(t: torch.Tensor) -> torch.Tensor:
    """t without the dimensions along which it repeats itself (of stride 0)."""
    for d, (size, stride) in enumerate(zip(t.shape, t.stride())):
        if stride == 0 and size > 1:
            t = t.narrow(d, 0, 1)
    return t


def is_dense(t: torch.Tensor) -> bool:
    """Has every element an address of its own, without gaps between them?"""
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def static_like(t: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor of t's shape, strides, dtype and device, to be filled by `copy_into`. Raises Unsupported
    where elements overlap otherwise than along a stride of 0."""
    end = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1 and s != 0):
        if stride < end:
            raise Unsupported("an argument's elements overlap in memory")
        end = stride * size
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)


def copy_into(static: torch.Tensor, source: torch.Tensor) -> None:
    """The values of `source` (same shape and strides) into a static tensor."""
    static, source = static.detach(), source.detach()
    if 0 in source.stride():
        static, source = _unique(static), _unique(source)
    static.copy_(source)


def key_of(t: torch.Tensor) -> tuple[Hashable, ...]:
    """Equal for tensors that can share one static tensor."""
    return t.shape, t.stride(), t.dtype, t.device


class SharedBuffer:
    """One static tensor for an argument that several layers are given. turn: the forward that filled it last."""

    def __init__(self, like: torch.Tensor):
        self.static = static_like(like)
        self.source: weakref.ref[torch.Tensor] | None = None
        self.version, self.turn = -1, -1
        self.users: list[Token] = []  # calls that read it and whose backward may still come

    def holds(self, source: torch.Tensor, turn: int) -> bool:
        """Was it filled from this tensor, as it is now, in this forward?"""
        return (
            self.turn == turn
            and self.source is not None
            and self.source() is source
            and self.version == source._version
        )

    def is_read(self) -> bool:
        """May a backward still read what it holds?"""
        self.users = [t for t in self.users if t() is not None]
        return bool(self.users)

    def can_take(self, source: torch.Tensor, turn: int) -> bool:
        return self.holds(source, turn) or not self.is_read()

    def fill(self, source: torch.Tensor, turn: int) -> None:
        """Copy, where it does not hold these values already. The caller has asked `can_take`."""
        if not self.holds(source, turn):
            copy_into(self.static, source)
            self.source, self.version, self.turn = weakref.ref(source), source._version, turn


class SharedBuffers:
    """The shared buffers of one stack of layers."""

    def __init__(self) -> None:
        self.by_key: dict[Hashable, list[SharedBuffer]] = {}

    def for_capture(self, source: torch.Tensor, turn: int) -> SharedBuffer:
        """The buffer that a new capture reads this argument from, filled: the one that holds it, else one that nobody
        has filled in this forward, else a new one."""
        there = self.by_key.setdefault(key_of(source), [])
        found = next((b for b in there if b.holds(source, turn)), None)
        if found is None:
            found = next((b for b in there if b.turn != turn and not b.is_read()), None)
        if found is None:
            found = SharedBuffer(source)
            there.append(found)
        found.fill(source, turn)
        return found


class Scratch:
    """Static tensors that are read or written within one replay alone, and so serve all graphs of a stack."""

    def __init__(self) -> None:
        self.by_key: dict[Hashable, torch.Tensor] = {}

    def like(self, role: Hashable, t: torch.Tensor) -> torch.Tensor:
        """The one for `role`: t's shape, dtype, device, and strides where t is dense."""
        key = (role, *key_of(t))
        if key not in self.by_key:
            self.by_key[key] = torch.empty_like(t.detach())
        return self.by_key[key]
