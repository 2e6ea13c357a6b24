"""The proof of experts: a small stand-in of the module, with the adapters around it, stock beside the candidate.

A stand-in has the module's class, attributes and children, and fewer and narrower experts: a whole stack does not fit
on a device several times over. Every number among its attributes that is one of the sizes becomes the stand-in's.
Adapters keep their ranks, scalings and PEFT's layout. Tokens go to all experts but one, which stays empty. In float64
stock runs its plain loop, as torch's grouped products know no float64; in the training dtype it runs as it is set.

With adapters, stock rounds W + BA once and we round xW and (xA)B apart: over many draws the errors are alike (root mean
squares within 0.8 and 1.3 of stock's, measured on three gates in three dtypes), but the worst entry of one draw is
twice stock's now and then, more so of few tokens, and of large numbers, where a value crosses a clamp in one of the two
and its gradient jumps. So their numerics are judged over DRAWS draws together, at scale 1; that it is the same function
is proven in float64 for few tokens and large numbers too."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastft.compat.accelerate_private import LEFT_BY_HOOKS
from fastft.compat.transformers_private import experts_implementation, set_experts_implementation
from fastft.experts.layer import chain, install_experts
from fastft.experts.structure import ExpertsStructure, arguments
from fastft.patching.kind import device_of
from fastft.proving.clone import clone
from fastft.proving.prove import Proof, cast_parameters, prove
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.swap import KEY, new_instance

TOKENS, TOP_K, EXPERTS = 131, 3, 6
FEW, DRAWS, LARGE_SCALE = (1, 7, 37), 8, 30.0
HIDDEN, INNER = 40, 24
DELTA = 0.25  # an adapter's output beside its experts', before its scaling
LARGE_HIDDEN, LARGE_INNER = 328, 168  # where grouped kernels run: two tiles and a partial one
Module = Any


def small_sizes(s: ExpertsStructure, large: bool) -> tuple[int, int, int]:
    """(experts, hidden, inner) of the stand-in, those of the module up to a limit; sizes that are equal, or double,
    stay so."""
    if s.experts in (s.hidden, s.inner, 2 * s.inner):
        return s.experts, s.hidden, s.inner
    most_hidden, most_inner = (LARGE_HIDDEN, LARGE_INNER) if large else (HIDDEN, INNER)
    inner = min(s.inner, most_inner)
    if s.hidden in (s.inner, 2 * s.inner):
        hidden = s.hidden // s.inner * inner
    else:
        hidden = min(s.hidden, most_hidden)
    return min(s.experts, EXPERTS), hidden, inner


def small_experts(module: nn.Module, s: ExpertsStructure) -> nn.Module:
    """The stand-in; for a wrapper of PEFT's, the whole chain."""
    device = device_of(module)
    e, hidden, inner = small_sizes(s, device.type != "cpu")
    sizes = {s.experts: e, s.hidden: hidden, s.inner: inner, 2 * s.inner: 2 * inner}
    generator = torch.Generator().manual_seed(7)
    wrappers, experts = chain(module)
    new = _bare(experts, sizes)
    new._modules = {n: None if c is None else clone(c) for n, c in experts._modules.items()}
    new._parameters = {
        n: None if p is None else _drawn(p, [e, *(sizes.get(int(d), int(d)) for d in p.shape[1:])], generator, device)
        for n, p in experts._parameters.items()
    }
    for wrapper in reversed(wrappers):
        new = _small_wrapper(wrapper, new, sizes, generator, device)
    return new


def _bare(module: nn.Module, sizes: dict[int, int]) -> Module:
    new = new_instance(module)
    new.__dict__.update({k: v for k, v in module.__dict__.items() if k not in (KEY, *LEFT_BY_HOOKS)})
    for name, value in module.__dict__.items():
        if type(value) is int and value in sizes:
            new.__dict__[name] = sizes[value]
        elif name.endswith("_hooks") and isinstance(value, dict):
            new.__dict__[name] = type(value)()
    new._buffers = {}
    return new


def _drawn(
    p: torch.Tensor, shape: list[int], generator: torch.Generator, device: torch.device, size: float = 1.0
) -> nn.Parameter:
    """Random values in the dtype of p, scaled so that outputs are of order `size`."""
    values = torch.randn(shape, dtype=torch.float64, generator=generator) * (size * max(shape[1:]) ** -0.5)
    return nn.Parameter(values.to(device, p.dtype), requires_grad=p.requires_grad)


def _small_wrapper(
    wrapper: Module, base: nn.Module, sizes: dict[int, int], generator: torch.Generator, device: torch.device
) -> Module:
    new = _bare(wrapper, sizes)
    new._parameters = {}
    new._modules = {n: None if c is None else clone(c) for n, c in wrapper._modules.items() if n != "base_layer"}
    new._modules = {"base_layer": base, **new._modules}
    experts = sizes[wrapper.num_experts]
    for name in wrapper.lora_A:
        for side in ("lora_A", "lora_B"):
            weight = getattr(wrapper, side)[name].weight
            rows, cols = weight.shape
            ranks = (rows if side == "lora_A" else cols) // wrapper.num_experts * experts
            width = cols if side == "lora_A" else rows
            width = sizes.get(width, width)
            shape = [ranks, width] if side == "lora_A" else [width, ranks]
            layer = nn.Linear(shape[1], shape[0], bias=False, device="meta")
            layer.weight = _drawn(weight, shape, generator, device, DELTA if side == "lora_B" else 1.0)
            new._modules[side]._modules[name] = layer
    return new


def runs(small: Module, s: ExpertsStructure) -> str:
    """Why the stand-in cannot be run on hidden states, experts and weights; empty where it can."""
    experts = chain(small)[1]
    e, hidden = experts._parameters[s.up].shape[0], _hidden(experts, s)
    dtype, device = experts._parameters[s.up].dtype, experts._parameters[s.up].device
    x, index, weights = _make(e, hidden, device)(torch.Generator().manual_seed(1), 1.0)
    try:
        with torch.no_grad():
            y = small(*_placed(experts, x.to(dtype), index, weights.to(dtype)))
    except Exception as error:
        not_for_want_of_memory(error)
        return f"cannot be run on hidden states, experts and weights: {type(error).__name__}"
    return "" if isinstance(y, torch.Tensor) and y.shape == x.shape else "it does not return hidden states"


def _hidden(experts: Module, s: ExpertsStructure) -> int:
    return experts._parameters[s.down].shape[2 if s.transposed else 1]


def _placed(experts: nn.Module, x: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> list[torch.Tensor]:
    """The three arguments in the order of the stock forward, read from its parameters' names."""
    second = arguments(experts)[1]
    first_weights = "weight" in second or "score" in second
    return [x, weights, index] if first_weights else [x, index, weights]


def _make(experts: int, hidden: int, device: torch.device, tokens: int | None = None):
    """Inputs of a proof: tokens go to TOP_K different experts, none to the second one where there are enough."""
    chosen = [i for i in range(experts) if i != 1 or experts <= 2]
    top_k, tokens = min(TOP_K, len(chosen)), tokens or TOKENS

    def make(g: torch.Generator, scale: float) -> list[torch.Tensor]:
        x = torch.randn(tokens, hidden, generator=g, dtype=torch.float64) * scale
        index = torch.stack([torch.randperm(len(chosen), generator=g)[:top_k] for _ in range(tokens)])
        weights = torch.rand(tokens, top_k, generator=g, dtype=torch.float64)
        return [x.to(device), torch.tensor(chosen)[index].to(device), weights.to(device)]

    return make


def prove_experts(module: nn.Module, s: ExpertsStructure) -> Proof:
    """Stand-in and candidate: outputs, gradients of hidden states, weights, and every parameter. Large numbers, on
    which clamps and gates show, go through the experts; adapters, which change no gate, are then proven around them."""
    small = small_experts(module, s)
    wrappers, experts = chain(small)
    proof = _prove(experts, s, (1.0, LARGE_SCALE))
    return _prove(small, s, (1.0,), DRAWS) if wrappers and proof.ok else proof


def _prove(small: Module, s: ExpertsStructure, scales: tuple[float, ...], draws: int = 1) -> Proof:
    experts = chain(small)[1]
    e, hidden = experts._parameters[s.up].shape[0], _hidden(experts, s)
    dtype, device = experts._parameters[s.up].dtype, experts._parameters[s.up].device
    make = lambda tokens: lambda g, scale: _placed(experts, *_make(e, hidden, device, tokens)(g, scale))
    inputs, *few = [make(n) for n in (TOKENS, *FEW)]
    large = lambda g, scale: inputs(g, LARGE_SCALE * scale)
    structure = _of_stand_in(s, experts)
    cast = lambda m, to: _cast(m, to, dtype)
    swap = lambda m: install_experts(m, structure)
    how = {"cast": cast, "draws": draws, "formula": (*few, large)}
    return prove(small, swap, inputs, dtype=dtype, scales=scales, **how)


def _of_stand_in(s: ExpertsStructure, experts: Module) -> ExpertsStructure:
    down = experts._parameters[s.down].shape
    inner, hidden = (down[1], down[2]) if s.transposed else (down[2], down[1])
    return replace(s, experts=down[0], hidden=hidden, inner=inner)


def _cast(module: nn.Module, to: torch.dtype, own: torch.dtype) -> nn.Module:
    """A copy in `to`; adapters stay in their own dtype beside experts in theirs. float64 runs stock's plain loop."""
    if to == own:
        return clone(module)
    module = cast_parameters(module, to)
    experts = chain(module)[1]
    config = experts.__dict__.get("config")
    if to == torch.float64 and experts_implementation(config) is not None:
        experts.__dict__["config"] = copy.copy(config)
        set_experts_implementation(experts.__dict__["config"], "eager")
    return module
