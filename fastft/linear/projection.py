"""What one linear layer computes right now, as a `Projection`, or why the group function cannot express it.

Everything is read at the call: parameters, active adapters, scalings, dropout, merged and disabled state. So what PEFT,
a trainer or the user changes after patching (adapters added, switched, deleted, cast; weights replaced; requires_grad)
is honoured without being told.
Only exactly known classes are known: a subclass of nn.Linear may compute anything.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import nn
from transformers.pytorch_utils import Conv1D

from fastft.compat.bitsandbytes_private import REPACKS
from fastft.compat.torch_private import FakeTensor
from fastft.linear.float8_linear import SCALE, Float8Linear, float8_weight
from fastft.swapping.swap import stock_class
from fastft_kernels.lora.lora_linear import Adapter, Projection
from fastft_kernels.quant.weights import FrozenWeight, as_weight

Layer = Any  # a linear layer of torch, bitsandbytes or PEFT: its attributes depend on its class


class Inexpressible(Exception):
    """The reason why a call goes the stock way."""


def _bnb_classes() -> dict[str, type]:
    """bitsandbytes' and PEFT's classes for it, where they are installed."""
    try:
        import bitsandbytes.nn.modules as bnb
        from peft.tuners.lora import bnb as peft_bnb
    except ImportError:
        return {}
    found = {"Linear4bit": bnb.Linear4bit, "Linear8bitLt": bnb.Linear8bitLt}
    found |= {f"lora.{n}": getattr(peft_bnb, n) for n in ("Linear4bit", "Linear8bitLt") if hasattr(peft_bnb, n)}
    return found


_BNB = _bnb_classes()
DENSE = (nn.Linear, Conv1D)  # a Conv1D is a linear layer whose weight is [in, out]
BASES = (*DENSE, Float8Linear, *(c for n, c in _BNB.items() if "." not in n))
LORA_LAYERS = (peft_layer.Linear, *(c for n, c in _BNB.items() if "." in n))


def bitsandbytes_class(name: str) -> type | None:
    """bitsandbytes' layer class of this name, where it is installed."""
    return _BNB.get(name)


def is_unit(module: Layer) -> bool:
    """Could this module, by its class, be a member of a group?"""
    cls = stock_class(module)
    return cls in BASES or cls in LORA_LAYERS


def is_quantised_otherwise(module: Layer) -> bool:
    """An nn.Linear of 8-bit values (FP8) that is no class known here: what its forward does with its input is its
    own."""
    weight = module._parameters.get("weight") if isinstance(module, nn.Linear) else None
    return weight is not None and weight.element_size() == 1 and not is_unit(module)


def base_of(module: Layer) -> Layer:
    """The layer inside a LoRA layer, or the module itself."""
    return module._modules["base_layer"] if stock_class(module) in LORA_LAYERS else module


def is_dense(module: Layer) -> bool:
    """A base layer whose weight is a matrix of numbers, by its class."""
    return stock_class(module) in DENSE


def is_float8(module: Layer) -> bool:
    """A base layer in FP8, of fastft's own class."""
    return stock_class(module) is Float8Linear


def _is_4bit(module: Layer) -> bool:
    return stock_class(module) is _BNB.get("Linear4bit")


def plain_parameter(p: torch.Tensor | None, what: str, dim: int = 2) -> None:
    """A parameter whose values are all here and are what they seem: no DTensor, no torchao subclass, no shard, no meta
    tensor."""
    if p is None or (type(p) is nn.Parameter and not p.is_meta and p.dim() == dim):
        return
    if p.device.type == "meta" or not (type(p) in (torch.Tensor, nn.Parameter) or isinstance(p, FakeTensor)):
        raise Inexpressible(f"{what} is a {type(p).__name__} on {p.device.type}")
    if p.dim() != dim:
        raise Inexpressible(f"{what} is sharded or gathered elsewhere")


def parameter(module: Layer, name: str) -> torch.Tensor | None:
    """module.name, a parameter, quicker than nn.Module finds it."""
    parameters = module._parameters
    return parameters[name] if name in parameters else getattr(module, name)


def is_hooked(module: Layer) -> bool:
    """Would a call of this module do more than its class's forward?"""
    d = module.__dict__
    hooks = (
        d.get("_forward_hooks")
        or d.get("_forward_pre_hooks")
        or d.get("_backward_hooks")
        or d.get("_backward_pre_hooks")
    )
    return bool(hooks) or "forward" in d


def base_weight(base: Layer) -> FrozenWeight:
    """The weight [out, in] of a linear layer, a Conv1D (a view) or a bitsandbytes layer, uncopied."""
    weight: Any = parameter(base, "weight")
    if stock_class(base) is Conv1D:
        plain_parameter(weight, "the base weight")
        if weight.shape != (base.nx, base.nf):
            raise Inexpressible("the base weight is sharded or gathered elsewhere")
        return as_weight(weight.t())
    if stock_class(base) is nn.Linear:
        plain_parameter(weight, "the base weight")
        if weight.shape != (base.out_features, base.in_features):
            raise Inexpressible("the base weight is sharded or gathered elsewhere")
        return as_weight(weight)
    if is_float8(base):
        return _weight_float8(base, weight)
    if _is_4bit(base):
        return _weight_4bit(base, weight)
    return _weight_8bit(base, weight)


def _weight_float8(base: Layer, weight: torch.Tensor) -> FrozenWeight:
    plain_parameter(weight, "the base weight")
    plain_parameter(parameter(base, SCALE), "the scales of the base weight")
    if weight.shape != (base.out_features, base.in_features):
        raise Inexpressible("the base weight is sharded or gathered elsewhere")
    try:
        return float8_weight(base)
    except RuntimeError as e:
        raise Inexpressible(str(e)) from e


def _weight_4bit(base: Layer, weight) -> FrozenWeight:
    from fastft_kernels.quant.weights import NF4

    state = getattr(weight, "quant_state", None) or getattr(base, "quant_state", None)
    if state is None:
        raise Inexpressible("the 4-bit weight is not quantised yet")
    if getattr(state, "packing_format_for_cpu", False):
        raise Inexpressible("the 4-bit weight was repacked for CPU inference")
    return NF4.from_quant_state(weight.data, state)


def _weight_8bit(base: Layer, weight) -> FrozenWeight:
    raise Inexpressible("8-bit base: its products quantise the input")


@functools.cache
def _bias_follows_input() -> bool:
    """A 4-bit layer's forward casts its bias for good: to the compute dtype, or, in older bitsandbytes, to the input's.
    Asked of a small one."""
    import bitsandbytes.nn.modules as bnb

    layer: Any = bnb.Linear4bit(64, 1, compute_dtype=torch.bfloat16)
    make: Any = bnb.Params4bit
    layer.weight = make(torch.zeros(1, 64), requires_grad=False, module=layer).to("cpu")
    layer(torch.zeros(1, 64, requires_grad=True))
    return layer.bias.dtype == torch.float32


def compute_dtype_4bit(base: Layer, x: torch.Tensor) -> torch.dtype:
    """The dtype of a 4-bit layer's product of x, and what stock's forward leaves behind in finding it: an unset compute
    dtype is that of the first input from then on, and the bias is cast for good."""
    if not base.compute_type_is_set:
        base.set_compute_type(x)
        base.compute_type_is_set = True
    compute = base.compute_dtype or x.dtype
    if (
        base.bias is not None
        and base.bias.dtype != compute
        and not (base.bias.dtype == x.dtype and _bias_follows_input())
    ):
        base.bias.data = base.bias.data.to(x.dtype if _bias_follows_input() else compute)
    return compute


def adapters(layer: Layer) -> tuple[Adapter, ...]:
    """The active adapters of a LoRA layer, in stock's order. Raises Inexpressible for variants and merged state.

    Runs at every call of every layer, so children and parameters are looked up where nn.Module keeps them: its
    attributes cost the host more."""
    if layer.merged:
        raise Inexpressible("adapters are merged")
    if layer.disable_adapters:
        return ()
    children, out = layer._modules, []
    As, Bs, drops = children["lora_A"]._modules, children["lora_B"]._modules, children["lora_dropout"]._modules
    for name in layer.active_adapters:
        a = As.get(name)
        if a is None:
            continue
        if name in layer.lora_variant:
            raise Inexpressible(f"{type(layer.lora_variant[name]).__name__}: a variant of LoRA")
        b, drop = Bs[name], drops[name]
        if (
            type(a) is not nn.Linear
            or type(b) is not nn.Linear
            or is_hooked(a)
            or is_hooked(b)
            or is_hooked(drop)
            or parameter(a, "bias") is not None
        ):
            raise Inexpressible("lora_A, lora_B or the dropout is no plain module or carries a hook")
        A: Any = parameter(a, "weight")
        B: Any = parameter(b, "weight")
        bias = parameter(b, "bias")
        plain_parameter(A, "lora_A")
        plain_parameter(B, "lora_B")
        plain_parameter(bias, "the bias of lora_B", 1)
        scaling, p = layer.scaling[name], 0.0
        if isinstance(scaling, torch.Tensor):
            raise Inexpressible("the scaling is a tensor")
        if type(drop) is nn.Dropout:
            p = drop.p if drop.training else 0.0
        elif type(drop) is not nn.Identity:
            raise Inexpressible(f"dropout is a {type(drop).__name__}")
        out.append(Adapter(A, B, float(scaling), bias, p))
    return tuple(out)


def describe(module: Layer) -> Projection:
    """The projection that `module` computes now. Raises Inexpressible."""
    if stock_class(module) in LORA_LAYERS:
        base = module._modules["base_layer"]
        if stock_class(base) not in BASES:
            raise Inexpressible(f"its base layer is a {type(base).__name__}")
        if is_hooked(base):
            raise Inexpressible("its base layer carries a hook")
        if getattr(module, "fan_in_fan_out", False) and stock_class(base) is not Conv1D:
            raise Inexpressible("fan_in_fan_out")
        found = adapters(module)
        if found and not getattr(module, "cast_input_dtype_enabled", True):
            raise Inexpressible("input casting is disabled")
        return Projection(base_weight(base), _bias(base), found)
    return Projection(base_weight(module), _bias(module), ())


def _bias(base: Layer) -> torch.Tensor | None:
    bias = parameter(base, "bias")
    plain_parameter(bias, "the bias", 1)
    return bias


def refusal(module: Layer) -> str:
    """Why this module, as it is built, is never a member: what a switch of adapters or a removed hook does not change.
    Empty if it may be."""
    if not is_unit(module):
        return f"a {stock_class(module).__name__} is no linear layer known here"
    layer, base = stock_class(module) in LORA_LAYERS, base_of(module)
    if stock_class(base) not in BASES:
        return f"its base layer is a {stock_class(base).__name__}"
    if stock_class(base) is _BNB.get("Linear8bitLt"):
        return "8-bit base: its products quantise the input"
    if layer and getattr(module, "fan_in_fan_out", False) and stock_class(base) is not Conv1D:
        return "fan_in_fan_out"
    names = [n for n in module.active_adapters if n in module.lora_variant] if layer else []
    return f"{type(module.lora_variant[names[0]]).__name__}: a variant of LoRA" if names else ""


def _repacks(base: Layer) -> bool:
    """May stock's forward rewrite this 4-bit weight for CPU inference? Training after that has no input gradient."""
    return _is_4bit(base) and bool(getattr(base, REPACKS, False))


def would_repack(module: Layer, x: torch.Tensor) -> bool:
    """Would stock's forward of x rewrite the weight? Then compute it here."""
    base = base_of(module)
    return _repacks(base) and x.device.type == "cpu" and not base.training and not x.requires_grad


@contextlib.contextmanager
def never_repacked(module: Layer) -> Iterator[None]:
    """For a call that goes the stock way: the 4-bit weight stays as it is."""
    base = base_of(module)
    repacks = _repacks(base)
    if repacks:
        setattr(base, REPACKS, False)
    try:
        yield
    finally:
        if repacks:
            setattr(base, REPACKS, True)


def trains(p: Projection) -> bool:
    """Does the layer have an adapter, or a base weight that learns? Otherwise nothing is gained over stock."""
    return bool(p.adapters) or any(t.requires_grad for t in as_weight(p.weight).tensors())
