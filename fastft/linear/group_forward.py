"""One linear group at work: who is called first computes for those that follow, and each of them takes its own.

A result is taken where the member would have computed the same itself: by the same thread, in the same call of the
module that holds the members, of the same tensor at the same version, in the same grad mode, autocast, hooks on saved
tensors and adapters. Anything else, and the member computes for itself."""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from fastft.linear.projection import (
    Inexpressible,
    Layer,
    base_of,
    compute_dtype_4bit,
    describe,
    is_dense,
    never_repacked,
    trains,
    would_repack,
)
from fastft.swapping.stock_only import stands_aside
from fastft.swapping.swap import KEY, Replacement, is_fast, order
from fastft_kernels.lora.lora_linear import Projection, lora_linear
from fastft_kernels.quant.weights import as_weight
from fastft_kernels.recompute.recomputation import recomputation_of
from fastft_kernels.runtime.dispatch import wider

KIND = "linear group"
PATIENCE = 3  # results in a row that nobody could take, after which members compute for themselves
OTHER_MODE = (
    "a member was called in another grad mode, autocast or saved-tensor hook than the first: it computed for itself"
)
OTHER_ADAPTERS = "adapters were switched between a group's members: one computed for itself"
_hooks_on_saved = getattr(torch._C, "_autograd")._top_saved_tensors_default_hooks  # noqa: B009


class Mode(NamedTuple):
    """What a result was computed in, beside its input and its parameters: it is nobody else's where any of this
    differs."""

    grad: bool
    inference: bool
    autocast: torch.dtype | None
    anywhere: bool  # autocast as PEFT asks for it
    hooks: object  # on saved tensors, the innermost
    dispatch: int  # how many dispatch modes listen

    @classmethod
    def now(cls, device: str) -> Mode:
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        inference, anywhere = torch.is_inference_mode_enabled(), torch.is_autocast_enabled()
        return cls(
            torch.is_grad_enabled(),
            inference,
            autocast,
            anywhere,
            _hooks_on_saved(True),
            torch._C._len_torch_dispatch_stack(),
        )


def _adapters_are(module: Layer) -> tuple:
    """Which adapters of a member are on, and whether they drop out."""
    d = module.__dict__
    return d["training"], d.get("_disable_adapters"), d.get("_active_adapter"), bool(d.get("merged_adapters"))


@dataclass
class HolderCall:
    """One call of a holder, as one group of its sees it: the results that wait for a member, and the tensor object they
    belong to."""

    left: dict[int, tuple[torch.Tensor, tuple]] = field(default_factory=dict)
    x: torch.Tensor | None = None
    version: int = 0
    mode: Mode | None = None

    def clear(self) -> None:
        self.left.clear()
        self.x = None

    def take(self, module: Layer, x: torch.Tensor) -> tuple[torch.Tensor | None, str]:
        """(what was left for this call, or why what was left is none)."""
        if self.x is not x or self.version != _version(x):
            self.clear()
            return None, ""
        found = self.left.pop(id(module), None)
        mode = self.mode
        if not self.left:
            self.clear()
        if found is None:
            return None, ""
        if mode != Mode.now(x.device.type):
            return None, OTHER_MODE
        return (found[0], "") if found[1] == _adapters_are(module) else (None, OTHER_ADAPTERS)


@dataclass
class LinearGroup:
    """refs: the members, in the order of their calls; weak, as each member refers to the group. now.call: this thread's
    innermost call of the holder. A member that is called outside one computes for itself, as nobody would clear away
    what it left."""

    refs: list[Callable[[], Layer | None]]
    now: threading.local = field(default_factory=threading.local)
    wasted: int = 0  # results in a row that their member could not take

    @classmethod
    def of(cls, members: Sequence[Layer]) -> LinearGroup:
        return cls([weakref.ref(m) for m in members])

    @property
    def members(self) -> list[Layer]:
        return [m for r in self.refs if (m := r()) is not None]

    @property
    def call(self) -> HolderCall | None:
        return getattr(self.now, "call", None)

    def take(self, module: Layer, x: torch.Tensor) -> tuple[torch.Tensor | None, str]:
        if (call := self.call) is None or call.x is None:
            return None, ""
        y, why = call.take(module, x)
        if y is not None:
            self.wasted = 0
        elif why:
            self.wasted += 1
        return y, why

    def compute(self, module: Layer, x: torch.Tensor) -> torch.Tensor | None:
        """The module's own result; the later members' are left. None where stock is as good. Raises Inexpressible."""
        own = describe(module)
        if elsewhere(own, x):
            # stock's error is the answer
            raise Inexpressible(f"a weight or an adapter is not on its input's device, {x.device}")
        if not trains(own) and not would_repack(module, x):
            return None
        run, settled = [(module, own)], dtypes(module, x, own)
        compiling = torch.compiler.is_compiling()  # the compiler sees each product and schedules for itself
        call = None if compiling or self.wasted >= PATIENCE else self.call
        for later in () if call is None else self._after(module):
            try:
                p = describe(later)
                alike = dtypes(later, x, p).items() <= settled.items()
            except Inexpressible:
                continue  # it says so itself when it is called
            if alike and not elsewhere(p, x) and p.weight.shape[1] == x.shape[-1] and not _instance_hooks(later):
                run.append((later, p))
        ys = lora_linear(x, [p for _, p in run], recomputation=recomputation_of(x), **settled)
        if call is not None and len(run) > 1:
            call.left = {id(m): (y, _adapters_are(m)) for (m, _), y in zip(run[1:], ys[1:])}
            call.x, call.version, call.mode = x, _version(x), Mode.now(x.device.type)
        return ys[0]

    def _after(self, module: Layer) -> list[Layer]:
        """The members that will be called after `module` and run here: not those that stay stock, and none for a copy
        of a member."""
        members = self.members
        at = next((i for i, m in enumerate(members) if m is module), len(members))
        return [m for m in members[at + 1 :] if is_fast(m, KIND)]

    def __deepcopy__(self, memo):
        """Where the copies of the members are, the copied holder knows, by their names below it: it finds them at its
        next call."""
        new = memo[id(self)] = LinearGroup([_nobody for _ in self.refs])
        return new


def _nobody() -> None:
    return None


def dtypes(module: Layer, x: torch.Tensor, own: Projection) -> dict[str, torch.dtype | None]:
    """The dtypes in which stock would compute this: autocast's where it is on; a 4-bit base in its compute dtype,
    returned in the input's; adapters without autocast in their own, the widest of several. What is not named makes no
    difference to this module."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    base = base_of(module)
    dense = is_dense(base)
    if (
        dense
        and not autocast
        and any(t is not None and t.dtype != x.dtype for t in (*as_weight(own.weight).tensors(), own.bias))
    ):
        # stock's error is the answer
        raise Inexpressible(f"a {base.weight.dtype} base weight or its bias and a {x.dtype} input")
    if dense or x.dtype == torch.float64:
        return {"compute_dtype": autocast if x.dtype != torch.float64 else None, "out_dtype": None}
    compute = compute_dtype_4bit(base, x)
    found: dict[str, torch.dtype | None] = {"compute_dtype": autocast or compute, "out_dtype": x.dtype}
    if own.adapters:
        found["adapter_dtype"] = None if autocast else functools.reduce(wider, (a.A.dtype for a in own.adapters))
        # PEFT asks about CUDA's, and then casts neither the adapters' input nor their output
        if torch.is_autocast_enabled():
            found["dropout_dtype"] = x.dtype
            if autocast and wider(autocast, x.dtype) != x.dtype:
                raise Inexpressible(f"autocast to {autocast} and a {x.dtype} input")  # the sum is wider than either
    return found


def elsewhere(p: Projection, x: torch.Tensor) -> bool:
    """Does anything that this multiplies x by lie on another device?"""
    device = x.device
    return as_weight(p.weight).tensors()[0].device != device or any(a.A.device != device for a in p.adapters)


def _version(x: torch.Tensor) -> int:
    """Counts in-place changes; a tensor of inference mode has no counter, and is then trusted for the length of its
    holder's call."""
    return 0 if x.is_inference() else x._version


def _instance_hooks(module: Layer) -> bool:
    """A hook may change the input, or (backward hooks) gives the module another tensor object: it then computes for
    itself."""
    return any(module.__dict__.get(h) for h in ("_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"))


@order(40)
class FastLinear(Replacement):
    """Mixin of a group's members."""

    def forward(self, *args, **kwargs):
        slot = self.__dict__.get(KEY)
        if slot is None or stands_aside(slot.fallbacks, KIND):
            return super().forward(*args, **kwargs)
        group: LinearGroup = slot.state(KIND)
        why = _unusual(args, kwargs)
        if why is None:
            x = args[0]
            y, note = group.take(self, x)
            if y is not None:
                return y
            if note:
                slot.fallbacks[f"linear group: {note}"] += 1
            try:
                y = group.compute(self, x)
            except Inexpressible as e:
                why = str(e)
            else:
                return super().forward(*args, **kwargs) if y is None else y
        slot.fallbacks[f"linear group: {why}"] += 1
        with never_repacked(self):
            return super().forward(*args, **kwargs)


def _unusual(args: tuple, kwargs: dict) -> str | None:
    if kwargs and kwargs.get("adapter_names") is not None:
        return "mixed batch by adapter_names"
    if len(args) != 1 or any(v is not None for v in kwargs.values()):
        return "called with more than its input"
    x = args[0]
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() == 0:
        return "input is no floating-point tensor"
    if (
        type(x) in (torch.Tensor, nn.Parameter)
        or torch.compiler.is_compiling()
        or isinstance(x, torch._subclasses.FakeTensor)
    ):
        return None
    return f"input is a {type(x).__name__}"
