"""Which parameters FSDP2 and DeepSpeed ZeRO-3 shard, and when these are whole; and whether rows are."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

LEFT_BY_DEEPSPEED = frozenset(  # what ZeRO-3 leaves on a module, changing at every call
    {
        "ds_id",
        "ds_grads_remaining",
        "ds_external_parameters",
        "ds_recompute_parameters",
        "ds_inflight_param_registry",
        "applied_pre_backward_ref_cnt",
        "all_parameters",
        "pre_bwd_fn",
        "post_bwd_fn",
        "_external_params",
        "_original_parameters",
    }
)
_REGISTERED = "FSDPParamGroup._register_state_dict_hooks.<locals>.to_sharded_hook"
_LEAF = "_z3_leaf"  # what DeepSpeed's `set_z3_leaf_module` leaves on a module


class ShardedParameter(NamedTuple):
    """One parameter of one module, as it is while it is gathered. unit: what is gathered and let go together, as an
    object to compare; modules: those between whose begin and end that is. whole: the gathered parameter is a plain
    tensor (it is none where tensor parallelism shards it too)."""

    module: nn.Module
    name: str
    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    unit: object
    modules: tuple[nn.Module, ...]
    whole: bool


def fsdp_module() -> Any:
    """FSDP2's class, from which it derives those of the modules that it wraps; () where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def _dtensor() -> Any:
    """Torch's class of sharded tensors; () where nobody has imported it."""
    return getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())


def has_shards(types: Sequence[type]) -> bool:
    """Is one of these, of an operator's arguments, torch's class of sharded tensors? (Its own dispatch then runs the
    operator on what this rank has.)"""
    return _dtensor() in types


def local_part(t: torch.Tensor) -> torch.Tensor:
    """What this rank has of a sharded tensor; any other tensor itself. Outside autograd."""
    return getattr(t, "_local_tensor", t)


def forget_fsdp(module: nn.Module) -> None:
    """Torch remembers of each module, beside the module, that FSDP2 has wrapped it: no longer."""
    from torch.distributed._composable_state import _module_state_mapping

    _module_state_mapping.pop(module, None)


@contextmanager
def imagined_group(count: int) -> Iterator[None]:
    """The first of `count` processes that are not there: collectives return at once, and move nothing."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def is_distributed(p: Any) -> bool:
    """Is this parameter, as it stands there now, a shard: a DTensor, or what ZeRO-3 has taken the values of?"""
    return isinstance(p, _dtensor()) or hasattr(p, "ds_id")


def is_managed(modules: Sequence[nn.Module]) -> bool:
    """Are parameters of these modules sharded by somebody: do they change their dtype and place within a step?"""
    return bool(_kinds(modules, fsdp_module()) or _shards(modules))


def _kinds(things: Sequence[Any], wanted: Any) -> set[type]:
    """Those of their types that are `wanted`. (One question for each type, as this is asked of all modules.)"""
    return {t for t in set(map(type, things)) if issubclass(t, wanted)}


def _shards(modules: Sequence[nn.Module]) -> list[tuple[nn.Module, str, Any]]:
    """(module, name, shard) of every parameter that `is_distributed`."""
    tables = [(m, m._parameters) for m in modules if m._parameters]
    held = [(m, n, table[n]) for m, table in tables if type(table) is dict for n in table if table[n] is not None]
    # ZeRO-3's own kind of dictionary gathers what it is asked for by name
    held += [(m, n, p) for m, t in tables if type(t) is not dict for n, p in t.items() if p is not None]
    kinds = _kinds([p for _, _, p in held], _dtensor())
    return [(m, n, p) for m, n, p in held if type(p) in kinds or "ds_id" in p.__dict__]


def sharded_parameters(modules: Sequence[nn.Module]) -> Iterator[ShardedParameter]:
    """Every parameter that FSDP2 or ZeRO-3 shards, once for each of the modules (a model's, all of them) that has it.
    One that is sharded by nobody who is known here is none of FSDP2's, or its FSDP2 module lies outside of the model
    and has not run yet."""
    groups = {id(g): g for g in _groups(modules)}
    known = set()
    for p in (p for g in groups.values() for p in _of_fsdp(g)):
        known.add((p.module, p.name))
        yield p
    shards = _shards(modules)
    for module, name, p in shards:
        if (module, name) not in known and not hasattr(p, "ds_id"):
            yield ShardedParameter(module, name, p.shape, p.dtype, p.device, None, (), False)
    if any(hasattr(p, "ds_id") for _, _, p in shards):
        yield from _of_zero3(modules)


def _groups(modules: Sequence[nn.Module]) -> Iterator[Any]:
    """FSDP2's groups of parameters that were made of these modules, or have one of their own: told by the hook that
    each group, once it has run, puts on the modules of its parameters, for the module that was wrapped may lie outside
    of the model that is asked about (PEFT's, around it)."""
    wrapped = _kinds(modules, fsdp_module())
    for module in modules:
        if type(module) in wrapped:
            fsdp: Any = module
            state = fsdp._get_fsdp_state()
            groups = getattr(state, "_fsdp_param_groups", None)  # one before torch 2.13
            yield from (g for g in ([state._fsdp_param_group] if groups is None else groups) if g is not None)
        if module._state_dict_pre_hooks:
            for hook in module._state_dict_pre_hooks.values():
                if getattr(hook, "__qualname__", "").endswith(_REGISTERED):
                    yield inspect.getclosurevars(hook).nonlocals["self"]


def _of_fsdp(group: Any) -> Iterator[ShardedParameter]:
    for p in group.fsdp_params:
        wanted, own = group.mp_policy.param_dtype, p.sharded_param.dtype
        dtype = wanted if wanted is not None and own.is_floating_point else own
        info = p._module_info
        for module, name in ((info.module, info.param_name), *zip(info.shared_modules, info.shared_param_names)):
            yield ShardedParameter(
                module, name, p._orig_size, dtype, group.device, group, tuple(group.modules), not p.is_dtensor
            )


def _of_zero3(modules: Sequence[nn.Module]) -> Iterator[ShardedParameter]:
    above: dict[nn.Module, nn.Module] = {}
    for module in modules:
        if module not in above and is_zero3_leaf(module):
            above.update(dict.fromkeys(module.modules(), module))
    device = torch.device(sys.modules["deepspeed"].accelerator.get_accelerator().current_device_name())
    for module in modules:
        unit = above.get(module, module)
        for name, p in list(module._parameters.items()):
            if hasattr(p, "ds_id"):
                found: Any = p
                yield ShardedParameter(
                    module, name, torch.Size(found.ds_shape), found.dtype, device, unit, (unit,), True
                )


def is_zero3_leaf(module: nn.Module) -> bool:
    """Does ZeRO-3 gather all that lies inside this module when it is called?"""
    return bool(module.__dict__.get(_LEAF))


def only_gathers(hook: Any) -> bool:
    """Is this one of the hooks on modules by which FSDP2 and DeepSpeed gather parameters and count calls? They treat
    all rows alike."""
    while isinstance(hook, functools.partial):
        hook = hook.func
    where = getattr(hook, "__module__", None) or type(hook).__module__
    return where.startswith(("torch.distributed.fsdp.", "deepspeed."))


def is_fsdp_pre_backward(hook: Any) -> bool:
    """Is this the hook by which FSDP2 fetches parameters before a backward? It returns what it is given, and needs no
    gradient."""
    fsdp = sys.modules.get("torch.distributed.fsdp._fully_shard._fsdp_state")
    return fsdp is not None and getattr(hook, "__func__", None) is fsdp.FSDPState._pre_backward


def is_engine_hook(hook: Any) -> bool:
    """Is this the hook that DeepSpeed's engine puts on every tensor which a model returns? It notes that a backward
    begins, and divides the gradient that arrives there by the steps of accumulation, unless the engine's own backward,
    which has done that, runs."""
    return getattr(hook, "__module__", "") == "deepspeed.runtime.utils" and "OutputBackwardHookManager" in getattr(
        hook, "__qualname__", ""
    )


def context_parallel_mesh() -> Any:
    """The mesh of processes each of which has a part of every row now (torch's `context_parallel`, which stands in the
    place of `scaled_dot_product_attention` for its length); None where rows are whole."""
    cp = sys.modules.get("torch.distributed.tensor.experimental._context_parallel._attention")
    attention = torch.nn.functional.scaled_dot_product_attention
    if cp is None or attention not in cp._replaced_functions:
        return None
    return inspect.getclosurevars(attention).nonlocals["device_mesh"]
