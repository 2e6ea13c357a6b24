"""Models whose parameters FSDP2 or DeepSpeed ZeRO-3 shard.

A swap computes with a parameter that its module has while it is gathered, and while it is gathered only. So what is
recognised and proven is the model as its forwards see it: for the length of a patch each shard stands there as a
parameter of the whole shape, of the dtype in which mixed precision gathers it, on the device that computes. It has no
memory, and needs no collective: proofs draw values of their own. What is gathered together is a unit; what reads
parameters of several units at once, or later than its unit is whole, is not swapped so. All processes swap the same
modules: one on which a proof fails anywhere is stock everywhere."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from fastft.compat.sharding_private import (
    ShardedParameter,
    fsdp_module,
    is_distributed,
    only_gathers,
    sharded_parameters,
)
from fastft.compat.torch_private import call_hooks
from fastft.patching.observe import Observation
from fastft.swapping.walk import modules_of

ELSEWHERE = "its proof fails on another process, and all processes run the same: "


class Sharding:
    """Which parameters are sharded, and by which unit."""

    def __init__(self, parameters: Iterable[ShardedParameter] = ()):
        self.parameters = list(parameters)
        self._of: dict[nn.Module, list[ShardedParameter]] = {}
        self._units: dict[nn.Module, tuple[object, ...]] = {}
        for p in self.parameters:
            self._of.setdefault(p.module, []).append(p)

    def __bool__(self) -> bool:
        return bool(self.parameters)

    @property
    def is_known(self) -> bool:
        """Is it known of every shard who gathers it?"""
        return all(p.whole for p in self.parameters)

    def units(self, module: nn.Module) -> tuple[object, ...]:
        """The units that gather what is inside `module`; none where nothing of it is sharded."""
        if not self.parameters:
            return ()
        if module not in self._units:
            found = {id(p.unit): p.unit for m in module.modules() for p in self._of.get(m, ())}
            self._units[module] = tuple(found.values())
        return self._units[module]

    def is_apart(self, module: nn.Module) -> str:
        """Why a function of all parameters of `module` cannot be: empty where one unit, or none, has them."""
        if not self:
            return ""
        if len(self.units(module)) > 1:
            return "its parameters are gathered in parts, one after another"
        if any(not p.whole for m in module.modules() for p in self._of.get(m, ())):
            return "its parameters are sharded by tensor parallelism, or by who has not run yet"
        return ""

    def left_out(self, model: nn.Module) -> list[str]:
        """A line where FSDP2 shards a model and parameters train that it does not know."""
        known = {(p.module, p.name) for p in self.parameters}
        if not any(isinstance(m, fsdp_module()) for p in self.parameters for m in p.modules):
            return []
        lost = [
            f"{prefix}.{name}"
            for prefix, m in model.named_modules()
            for name, p in m._parameters.items()
            if p is not None and p.requires_grad and (m, name) not in known
        ]
        return lost and [
            f"{len(lost)} parameters that train are in no unit of FSDP2, such as {lost[0]}: each process trains its "
            "own unless you average their gradients; add an adapter before the model is sharded"
        ]

    def is_let_go(self, module: nn.Module) -> str:
        """Why what `module` returns cannot stand for a product that is computed later: empty where its parameters can
        be gathered for that."""
        if any(p.modules == (module,) and not isinstance(module, fsdp_module()) for p in self._of.get(module, ())):
            return "ZeRO-3 gathers its weight for its own call alone, and a loss would read it later"
        return self.is_apart(module)

    def gathered(self, module: nn.Module) -> Callable[[], AbstractContextManager]:
        """The context in which the parameters of `module` are whole, whether its unit has let them go or not."""
        wrapped = [m for p in self._of.get(module, ()) for m in p.modules if isinstance(m, fsdp_module())]
        return functools.partial(_unsharded, weakref.ref(wrapped[0]), weakref.ref(module)) if wrapped else nullcontext

    def outlives(self, module: nn.Module, seen: Observation) -> bool:
        """May what `module` returns be used by a module outside its unit, whose backward runs while this one's
        parameters are not gathered?"""
        units = self.units(module) if self else ()
        if not units:
            return False
        if len(units) > 1 or not (calls := seen.of(module)):
            return True
        inside = {m for p in self._of.get(module, ()) for u in p.modules for m in u.modules()}
        given = {id(c.output) for c in calls}
        return any(
            id(t) in given
            for other, theirs in seen.calls.items()
            if other not in inside
            for c in theirs
            for t in c.inputs
        )


@contextmanager
def _unsharded(unit: weakref.ref, owner: weakref.ref) -> Iterator[None]:
    """By FSDP2's own `unshard`. Every process comes here alike: where a loss is computed, or logits are made."""
    wrapped, module = unit(), owner()
    if wrapped is None or module is None or not any(map(is_distributed, module._parameters.values())):
        yield
        return
    wrapped.unshard()
    try:
        yield
    finally:
        wrapped.reshard()


@contextmanager
def as_if_whole(model: nn.Module, around: nn.Module | None = None) -> Iterator[Sharding]:
    """Every shard stands there as a parameter without memory of the gathered one's shape, dtype and device. around: a
    module that holds `model`, and may be the one that FSDP2 has wrapped."""
    sharding = Sharding(sharded_parameters(modules_of(around or model)))
    kept: list[tuple[nn.Module, Any]] = []
    hooks: list[tuple[dict, dict]] = []
    made: dict[int, nn.Parameter] = {}
    try:
        for table in [t for m in modules_of(model) for t in call_hooks(m) if t] if sharding else []:
            hooks.append((table, dict(table)))  # a copy on which a proof runs has nothing to gather
            for key in [k for k, hook in table.items() if only_gathers(hook)]:
                del table[key]
        for module in {p.module for p in sharding.parameters}:
            kept.append((module, module._parameters))
            module.__dict__["_parameters"] = dict(module._parameters.items())  # ZeRO-3's own kind of dictionary gathers
        for p in sharding.parameters:
            was = p.module._parameters.get(p.name)
            if was is None or not p.whole:
                continue
            if id(was) not in made:
                made[id(was)] = _stand_in(p, was)
            p.module._parameters[p.name] = made[id(was)]
        yield sharding
    finally:
        for module, was in kept:
            module.__dict__["_parameters"] = was
        for table, before in hooks:
            table.clear()
            table.update(before)


def _stand_in(p: ShardedParameter, was: torch.Tensor) -> nn.Parameter:
    data = torch.empty((), dtype=p.dtype, device=p.device).expand(p.shape)
    state = getattr(p.module, "quant_state", None)
    if state is None or p.name != "weight":
        return nn.Parameter(data, requires_grad=was.requires_grad)
    import bitsandbytes.nn.modules as bnb

    make: Any = bnb.Params4bit
    return make(
        data,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
        quant_storage=p.dtype,
        bnb_quantized=True,
    )


def exchanged(mine: Any) -> list[Any]:
    """What every process has to say; mine alone where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    found: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, mine)
    return found
