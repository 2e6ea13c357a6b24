"""What one linear layer is now, read in one go: cheap enough for every call.

`read` answers (facts, tensors). Equal facts mean that the layer computes the same function of its tensors, so what was
found out about it before (`describe`, the dtypes of its products, its place in a group) holds; the tensors are always
those of now. Only
the ordinary case is read: no hooks inside, adapters on and unmerged, parameters that are plain tensors. For anything
else it answers None, and the layer is described from scratch."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from fastft.compat.peft_private import ACTIVE, DISABLED
from fastft.linear.float8_linear import SCALE, Float8Linear
from fastft.linear.projection import BASES, LORA_LAYERS, Layer, bitsandbytes_class
from fastft.swapping.swap import KEY, Slot

_BASES, _LORA_LAYERS = frozenset(BASES), frozenset(LORA_LAYERS)
_4BIT = bitsandbytes_class("Linear4bit")
_LINEAR, _PARAMETER, _DROPOUT, _IDENTITY = nn.Linear, nn.Parameter, nn.Dropout, nn.Identity
Reading = tuple[tuple, tuple[torch.Tensor, ...]]


def is_at_rest(slot: Slot, module: Layer) -> bool:
    """A plain layer whose weight does not learn: nothing to gain, unless stock's forward would rewrite a 4-bit
    weight."""
    if slot.stock not in _BASES:
        return False
    parameters = module._parameters
    weight = parameters["weight"] if "weight" in parameters else None
    return weight is not None and not weight.requires_grad


def is_4bit(slot: Slot, module: Layer) -> bool:
    """Is this layer, or the one that it adapts, of bitsandbytes' 4-bit class?"""
    if _4BIT is None:
        return False
    if slot.stock is _4BIT:
        return True
    base = module._modules["base_layer"] if "base_layer" in module._modules else None
    return base is not None and base.__class__ is _4BIT


def read(members: list[Layer]) -> list[Reading] | None:
    """For each member (facts, tensors in the order in which `pack` places them); None where one of them, or a hook on a
    later one, is out of the ordinary."""
    found = []
    try:
        for member in members:
            reading = _read(member)
            if reading is None or (found and _calls_hooks(member.__dict__)):
                return None
            found += (reading,)
    except (AttributeError, KeyError, TypeError):
        return None
    return found


def _calls_hooks(d: dict) -> bool:
    """Hooks before a module's forward, or around its backward."""
    return bool(d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"])


def _read(module: Layer) -> Reading | None:
    d = module.__dict__
    stock = d[KEY].stock
    if stock in _BASES:
        return _read_base(module, d, stock)
    if stock not in _LORA_LAYERS:
        return None
    children = d["_modules"]
    base = children["base_layer"]
    bd, cls = base.__dict__, base.__class__
    if cls not in _BASES or KEY in bd or d["merged_adapters"] or d[DISABLED]:
        return None
    found = _read_base(base, bd, cls)
    if found is None or not module.cast_input_dtype_enabled or module.fan_in_fan_out:
        return None
    As, Bs, drops = children["lora_A"]._modules, children["lora_B"]._modules, children["lora_dropout"]._modules
    active, scalings, variants = d[ACTIVE], module.scaling, module.lora_variant
    facts, tensors = found
    inside = (bd,)
    for name in (active,) if active.__class__ is str else active:
        if name not in As:
            continue
        a, b, drop = As[name], Bs[name], drops[name]
        if name in variants or a.__class__ is not _LINEAR or b.__class__ is not _LINEAR:
            return None
        ad, dd = a.__dict__, drop.__dict__
        inside += (ad, b.__dict__, dd)
        of_b = b._parameters
        A, B, bias = ad["_parameters"]["weight"], of_b["weight"], of_b["bias"]
        if A.__class__ is not _PARAMETER or B.__class__ is not _PARAMETER or ad["_parameters"]["bias"] is not None:
            return None
        scaling, p = scalings[name], 0.0
        if scaling.__class__ is not float:
            return None
        if drop.__class__ is _DROPOUT:
            p = drop.p if dd["training"] else 0.0
        elif drop.__class__ is not _IDENTITY:
            return None
        facts += (scaling, p, A.dtype, A.device, A.shape, A.requires_grad, B.dtype, B.device, B.shape, B.requires_grad)
        tensors += (A, B)
        if bias is not None:
            if bias.__class__ is not _PARAMETER:
                return None
            facts += (bias.dtype, bias.device, bias.shape, bias.requires_grad)
            tensors += (bias,)
    return None if _is_interposed(inside) else ((stock, *facts), tensors)


def _is_interposed(inside: tuple[dict, ...]) -> bool:
    """Has one of these modules, by their attributes, a hook, or a forward of the instance's own?"""
    for d in inside:
        if d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"]:
            return True
        if "forward" in d:
            return True
    return False


def _read_base(base: Layer, d: dict, cls: type) -> Reading | None:
    parameters = d["_parameters"]
    weight, bias = parameters["weight"], parameters["bias"]
    facts: tuple = (cls, weight.dtype, weight.device, weight.shape, weight.requires_grad)
    if cls is _4BIT:
        found = _read_4bit(base, weight)
        if found is None:
            return None
        more, tensors = found
        facts += more
    elif cls is Float8Linear:
        scale = parameters[SCALE]
        if weight.__class__ is not _PARAMETER or scale.__class__ is not _PARAMETER:
            return None
        if weight.requires_grad or scale.requires_grad:
            return None
        facts += (scale.dtype, scale.device, scale.shape, d["block"], d["products"], d["underflow"])
        tensors = (weight, scale)
    elif weight.__class__ is _PARAMETER:
        facts += (d["out_features"], d["in_features"]) if cls is _LINEAR else (d["nx"], d["nf"])
        tensors = (weight if cls is _LINEAR else weight.t(),)
    else:
        return None
    if bias is not None:
        if bias.__class__ is not _PARAMETER:
            return None
        facts += (bias.dtype, bias.device, bias.shape, bias.requires_grad)
        tensors += (bias,)
    return facts, tensors


def _read_4bit(base: Layer, weight: Any) -> Reading | None:
    state = base.quant_state if weight.__class__ is _PARAMETER else weight.quant_state  # FSDP2 gathers plain tensors
    if not base.compute_type_is_set or getattr(state, "packing_format_for_cpu", False):
        return None
    facts = (base.compute_dtype, state.quant_type, state.blocksize, state.shape, state.absmax.device, state.nested)
    tensors = (weight.data, state.absmax, state.code)
    if state.nested:
        nested = state.state2
        facts += (nested.blocksize,)
        tensors += (nested.absmax, nested.code, state.offset)
    return facts, tensors
