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
from typing import Any

import torch
from torch import nn

from fastft.compat.peft_private import ACTIVE, DISABLED
from fastft.compat.torch_private import FakeTensor, hooks_on_saved_tensors
from fastft.errors import QuantizationError
from fastft.linear.projection import (
    LORA_LAYERS,
    Inexpressible,
    Layer,
    base_of,
    compute_dtype_4bit,
    describe,
    is_dense,
    is_float8,
    never_repacked,
    trains,
    would_repack,
)
from fastft.linear.reading import Reading, is_4bit, is_at_rest, read
from fastft.swapping.stock_only import stood_aside, transformed
from fastft.swapping.swap import KEY, Replacement, is_fast, order, stock_class
from fastft_kernels.lora.group import GroupTensors
from fastft_kernels.lora.lora_linear import Projection, pack, run
from fastft_kernels.quant.weights import as_weight
from fastft_kernels.recompute.recomputation import recomputation_of
from fastft_kernels.recompute.replay import REPLAY
from fastft_kernels.runtime.compat import dispatch_modes, is_dynamo_compiling
from fastft_kernels.runtime.dispatch import wider

KIND = "linear group"
PATIENCE = 3  # results in a row that nobody could take, after which members compute for themselves
OTHER_MODE = (
    "a member was called in another grad mode, autocast or saved-tensor hook than the first: it computed for itself"
)
OTHER_ADAPTERS = "adapters were switched between a group's members: one computed for itself"
PLANS = 16  # kept a group, of as many input dtypes, widths, devices and autocast settings
FLOATING = frozenset((torch.float16, torch.bfloat16, torch.float32, torch.float64))
_PLAIN = (torch.Tensor, nn.Parameter)


Mode = tuple


def mode_now(device: str) -> Mode:
    """What a result is computed in, beside its input and its parameters; it is nobody else's where any of this differs:
    grad and inference mode, autocast's dtype, autocast as PEFT asks for it, the innermost hooks on saved tensors, how
    many dispatch modes listen."""
    grad = torch.is_grad_enabled()
    return (
        grad or torch.is_inference_mode_enabled(),
        grad,
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
        torch.is_autocast_enabled(),
        hooks_on_saved_tensors(True),
        dispatch_modes(),
    )


def _adapters_are(module: Layer) -> tuple:
    """Which adapters of a member are on, and whether they drop out."""
    d = module.__dict__
    if ACTIVE not in d:
        return (d["training"],)
    active = d[ACTIVE]
    return (
        d["training"],
        d[DISABLED],
        active if active.__class__ is str else tuple(active),
        not d["merged_adapters"],
    )


@dataclass(slots=True)
class HolderCall:
    """One call of a holder, as one group of its sees it: the results that wait for a member, and the tensor object they
    belong to."""

    left: dict[Layer, tuple[torch.Tensor, tuple]] = field(default_factory=dict)
    x: torch.Tensor | None = None
    version: int = 0
    mode: Mode | None = None

    def clear(self) -> None:
        self.left.clear()
        self.x = None

    def take(self, module: Layer, x: torch.Tensor) -> tuple[torch.Tensor | None, str]:
        """(what was left for this call, or why what was left is none)."""
        left = self.left
        if self.x is not x or self.version != _version(x):
            self.clear()
            return None, ""
        found = None
        if module in left:
            found = left[module]
            del left[module]
        if not left:
            self.x = None
        if found is None:
            return None, ""
        if self.mode != mode_now(x.device.type):
            return None, OTHER_MODE
        return (found[0], "") if found[1] == _adapters_are(module) else (None, OTHER_ADAPTERS)


class _Now(threading.local):
    call: HolderCall | None = None


@dataclass
class GroupPlan:
    """What `LinearGroup.compute` found out for a member, for as long as the facts that it read hold. run: the places of
    the members whose outputs are computed, among those that were read."""

    facts: list[tuple]
    run: tuple[int, ...]
    tensors: GroupTensors

    def holds(self, readings: list[Reading]) -> bool:
        """Is everything as it was when the plan was made?"""
        for (facts, _), were in zip(readings, self.facts):
            if facts != were:
                return False
        return True


@dataclass
class LinearGroup:
    """refs: the members, in the order of their calls; weak, as each member refers to the group. now.call: this thread's
    innermost call of the holder. A member that is called outside one computes for itself, as nobody would clear away
    what it left."""

    refs: list[Callable[[], Layer | None]]
    now: _Now = field(default_factory=_Now)
    plans: dict[tuple, GroupPlan] = field(default_factory=dict)
    wasted: int = 0  # results in a row that their member could not take

    @classmethod
    def of(cls, members: Sequence[Layer]) -> LinearGroup:
        return cls([weakref.ref(m) for m in members])

    @property
    def members(self) -> list[Layer]:
        return [m for r in self.refs if (m := r()) is not None]

    def take(self, module: Layer, x: torch.Tensor) -> tuple[torch.Tensor | None, str]:
        if (call := self.now.call) is None or call.x is None:
            return None, ""
        y, why = call.take(module, x)
        if y is not None:
            self.wasted = 0
        elif why:
            self.wasted += 1
        return y, why

    def compute(self, module: Layer, x: torch.Tensor) -> torch.Tensor | None:
        """The module's own result; the later members' are left. None where stock is as good. Raises Inexpressible."""
        compiling = is_dynamo_compiling()  # the compiler sees each product and schedules for itself
        call = None if compiling or self.wasted >= PATIENCE else self.now.call
        members = [module] if call is None or not self.refs[1:] else self._from(module)
        key, readings = None, None if compiling else read(members)
        if readings is not None:
            kind = x.device.type
            autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
            key = (x.dtype, x.shape[-1], x.device, autocast, torch.is_autocast_enabled(), len(members))
            plan = self.plans[key] if key in self.plans else None
            if plan is not None and plan.holds(readings):
                tensors: tuple[torch.Tensor, ...] = ()
                for i in plan.run:
                    tensors += readings[i][1]
                ys = run(plan.tensors, tensors, x, recomputation_of(x))
                return ys[0] if not members[1:] else self._finish(call, members, plan.run, x, ys)
        return self._compute_anew(call, members, x, key)

    def _compute_anew(self, call: HolderCall | None, members: list[Layer], x: torch.Tensor, key: tuple | None):
        """`compute`, from each member's description; kept as a plan under `key` where all of it can be read."""
        module = members[0]
        own = describe(module)
        if elsewhere(own, x):
            # stock's error is the answer
            raise Inexpressible(f"a weight or an adapter is not on its input's device, {x.device}")
        if not trains(own) and not would_repack(module, x):
            return None
        places, projections, settled = [0], [own], dtypes(module, x, own)
        for i, later in enumerate(members[1:], 1):
            try:
                p = describe(later)
                alike = dtypes(later, x, p).items() <= settled.items()
            except Inexpressible:
                continue  # it says so itself when it is called
            if alike and not elsewhere(p, x) and p.weight.shape[1] == x.shape[-1] and not _instance_hooks(later):
                places.append(i)
                projections.append(p)
        g, tensors = pack("lora_linear", x.shape[-1], x.dtype, projections, **settled)
        if key is not None and (readings := read(members)) is not None:
            if len(self.plans) >= PLANS:
                self.plans.clear()
            self.plans[key] = GroupPlan([facts for facts, _ in readings], tuple(places), g)
        return self._finish(call, members, tuple(places), x, run(g, tensors, x, recomputation_of(x)))

    def _finish(self, call: HolderCall | None, members: list[Layer], places: tuple[int, ...], x: torch.Tensor, ys):
        """The first member's output; the others' are left for them."""
        if call is not None and places[1:]:
            left = {}
            for i, y in zip(places[1:], ys[1:]):
                left[members[i]] = (y, _adapters_are(members[i]))
            call.left, call.x, call.version, call.mode = left, x, _version(x), mode_now(x.device.type)
        return ys[0]

    def _from(self, module: Layer) -> list[Layer]:
        """`module`, then the members that are called after it and are swapped. A copy of a member, which no group
        knows, is alone."""
        found: list[Layer] = []
        for ref in self.refs:
            member = ref()
            if member is module:
                found += (module,)
            elif found and member is not None and KEY in member.__dict__ and is_fast(member, KIND):
                found += (member,)
        return found or [module]

    def __deepcopy__(self, memo):
        """A group without members: the copied holder knows their names, and finds them at its next call."""
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
    if dense or is_float8(base) or x.dtype == torch.float64:
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
    try:
        return x._version
    except RuntimeError:
        return 0


def _instance_hooks(module: Layer) -> bool:
    """A hook may change the input, or (backward hooks) gives the module another tensor object: it then computes for
    itself."""
    d = module.__dict__
    return bool(d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"])


@order(40)
class FastLinear(Replacement):
    """Mixin of a linear group's members."""

    def forward(self, *args, **kwargs):
        d = self.__dict__
        slot = d[KEY] if KEY in d else None
        if slot is None:
            return super().forward(*args, **kwargs)
        no_grad = not torch.is_grad_enabled() and not REPLAY.first
        idle = no_grad or is_at_rest(slot, self)  # nothing to gain: stock's own, at stock's price
        if idle and not is_4bit(slot, self):
            return super().forward(*args, **kwargs)
        group: LinearGroup = slot.parts[KIND][1]
        x: Any = args[0] if args and not kwargs and not args[1:] else None
        if x.__class__ in _PLAIN and x.dtype in FLOATING and x.ndim:
            why = None
        else:
            why = _unusual(args, kwargs)
        if why is None:
            x = args[0]
            if idle and not would_repack(self, x):
                return super().forward(*args, **kwargs)
            y, note = group.take(self, x)
            if y is not None:
                return y
            if note:
                slot.fallbacks[f"linear group: {note}"] += 1
            if transformed() and stood_aside(slot.fallbacks, KIND):
                return super().forward(*args, **kwargs)
            try:
                y = group.compute(self, x)
            except Inexpressible as e:
                why = str(e)
            else:
                return super().forward(*args, **kwargs) if y is None else y
        slot.fallbacks[f"linear group: {why}"] += 1
        with never_repacked(self):
            return super().forward(*args, **kwargs)


class FastFloat8Adapter(FastLinear):
    """The same of an adapter layer whose base is in FP8."""

    def merge(self, *args, **kwargs):
        """Refused before anything is changed: torch would refuse to add to 8-bit values, in words of its own."""
        raise QuantizationError(
            "merging an adapter into a base in FP8: 8-bit values take no sum; save the adapter and run "
            "`fastft export ADAPTER --to merged --base-precision fp8 --out DIR`"
        )


def mixin_of(module: Layer) -> type[FastLinear]:
    """What a member of a group becomes."""
    is_adapter = stock_class(module) in LORA_LAYERS
    return FastFloat8Adapter if is_adapter and is_float8(base_of(module)) else FastLinear


def _unusual(args: tuple, kwargs: dict) -> str | None:
    if kwargs:
        if "adapter_names" in kwargs and kwargs["adapter_names"] is not None:
            return "mixed batch by adapter_names"
        if any(v is not None for v in kwargs.values()):
            return "called with more than its input"
    if len(args) != 1:
        return "called with more than its input"
    x = args[0]
    if not isinstance(x, torch.Tensor) or x.dtype not in FLOATING or x.ndim == 0:
        return "input is no floating-point tensor"
    if x.__class__ in _PLAIN or is_dynamo_compiling() or isinstance(x, FakeTensor):
        return None
    return f"input is a {type(x).__name__}"
