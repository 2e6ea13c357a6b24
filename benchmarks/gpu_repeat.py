"""Which operation gives other bits for the same inputs: a step is run twice with a checksum of what every operator is
given and returns.

The first (and every) operator whose inputs agree and whose results do not is a culprit; those after it merely inherit.
The checksum is a sum of integers, exact in any order. Memory that an operator leaves uninitialised must be filled, as
`torch.use_deterministic_algorithms` does. Backwards are seen too: autograd's threads inherit the mode."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CHUNK = 1 << 24
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_OWNERS = (  # the first part of a name that is found
    ("cudnn_attention", "cuDNN's attention"),
    ("flash_attention", "FlashAttention (torch)"),
    ("efficient_attention", "torch's memory-efficient attention"),
    ("addmm", "cuBLAS"),
    ("baddbmm", "cuBLAS"),
    ("bmm", "cuBLAS"),
    ("mm", "cuBLAS"),
    ("linear", "cuBLAS"),
    ("embedding", "torch's atomic additions"),
    ("index_add", "torch's atomic additions"),
    ("index_put", "torch's atomic additions"),
    ("scatter", "torch's atomic additions"),
)


class Call(NamedTuple):
    name: str
    given: tuple[int, ...]
    made: tuple[int, ...]


def checksum(t: torch.Tensor) -> int:
    """Of a tensor's bits, each weighted by its place."""
    if t.is_complex():
        t = torch.view_as_real(t)
    bits = t.detach().contiguous().reshape(-1).view(_INTEGERS[t.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=t.device)
    for at in range(0, bits.numel(), CHUNK):
        part = bits[at : at + CHUNK].to(torch.int64)
        total += (part * (torch.arange(at, at + len(part), device=t.device) * 0x9E3779B1 + 1)).sum()
    return int(total)


class Recorder(TorchDispatchMode):
    """Every operator that computes (views and allocations apart)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        returns, name = func._schema.returns, str(func)
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if is_view or "empty" in name or func.namespace == "prim":
            return func(*args, **kwargs)
        given = self._sums((args, kwargs))
        out = func(*args, **kwargs)
        written = [
            a for a, s in zip(args, func._schema.arguments) if s.alias_info is not None and s.alias_info.is_write
        ]
        self.calls.append(Call(name, given, self._sums((out, written))))
        return out

    @staticmethod
    def _sums(tree) -> tuple[int, ...]:
        plain = (t for t in tree_leaves(tree) if type(t) in (torch.Tensor, torch.nn.Parameter))
        return tuple(checksum(t) for t in plain if t.layout == torch.strided and t.device.type != "meta")


@dataclass(frozen=True)
class Culprits:
    """first: the first operator that does not repeat, or ""; all: how often each did not; ours: those of fastft's own.
    diverged: where the two runs called different operators, or ""."""

    first: str
    all: dict[str, int]
    diverged: str = ""

    @property
    def ours(self) -> list[str]:
        return [n for n in self.all if owner(n) == "fastft"]

    def __str__(self) -> str:
        if self.diverged:
            return f"the two runs called different operators: {self.diverged}"
        if not self.first:
            return "no operator gave other bits for the same inputs while it was watched"
        return f"first {self.first} ({owner(self.first)}); " + ", ".join(
            f"{n} x{k} ({owner(n)})" for n, k in self.all.items()
        )


def owner(name: str) -> str:
    """Whose an operator is: fastft, or the library that torch calls for it."""
    namespace, _, op = name.partition(".")
    if namespace != "aten":
        return namespace
    return next((who for part, who in _OWNERS if part in op), "torch")


def culprits(step: Callable[[], object]) -> Culprits:
    """step: builds all it needs from fixed seeds. It is run twice."""
    runs = []
    for _ in range(2):
        recorder = Recorder()
        with recorder:
            step()
        runs.append(recorder.calls)
    found: list[str] = []
    for a, b in zip(*runs):
        if a.name != b.name or len(a.given) != len(b.given):
            return Culprits(found[0] if found else "", dict(Counter(found)), f"{a.name} and {b.name}")
        if a.given == b.given and a.made != b.made:
            found.append(a.name)
    if len(runs[0]) != len(runs[1]):
        return Culprits(found[0] if found else "", dict(Counter(found)), f"{len(runs[0])} and {len(runs[1])} calls")
    return Culprits(found[0] if found else "", dict(Counter(found)))
