"""The replacements: a module of experts, and PEFT's wrappers around one of its parameters.

Everything is read at the call: parameters, active adapters, scalings, merged and disabled state, hooks inside. PEFT
adapts a parameter by exchanging it for W + BA during the call; the outermost wrapper's replacement describes all
adapters of the chain at once and exchanges nothing. Whatever cannot be described runs stock's code, and is counted."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from fastft.compat.peft_private import swaps_in_and_out
from fastft.compat.torch_private import FakeTensor
from fastft.experts.structure import ExpertsStructure, arguments
from fastft.linear.projection import Inexpressible, is_hooked, parameter, plain_parameter
from fastft.swapping.stock_only import stood_aside, transformed
from fastft.swapping.swap import KEY, Replacement, install, order, stock_class
from fastft.swapping.unchanged import ModuleSnapshot
from fastft_kernels.experts.grouped_experts import grouped_experts
from fastft_kernels.experts.projection import ExpertsAdapter, ExpertsProjection

KIND = "experts"
Module = Any


class ExpertsState(NamedTuple):
    """What was read at the patch. arguments: names of the stock forward's parameters."""

    structure: ExpertsStructure
    snapshot: ModuleSnapshot
    arguments: tuple[str, ...]

    @classmethod
    def of(cls, module: nn.Module, structure: ExpertsStructure) -> ExpertsState:
        """module: the experts themselves, or the outermost of their wrappers."""
        experts = chain(module)[1]
        return cls(structure, ModuleSnapshot(experts, list(experts._modules)), tuple(arguments(experts)))


@order(30)
class FastExperts(Replacement):
    """Mixin of the experts, and of the outermost wrapper around them."""

    def forward(self, *args, **kwargs):
        slot = self.__dict__.get(KEY)
        if slot is None or (transformed() and stood_aside(slot.fallbacks, KIND)):
            return super().forward(*args, **kwargs)
        if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or self.training):
            return super().forward(*args, **kwargs)
        state: ExpertsState = slot.state(KIND)
        try:
            found = _inputs(state, args, kwargs)
            projections = described(self, state, found[0])
        except Inexpressible as e:
            slot.fallbacks[f"experts: {e}"] += 1
            return super().forward(*args, **kwargs)
        return grouped_experts(*found, *projections)


def install_experts(module: nn.Module, structure: ExpertsStructure) -> None:
    """Swap the experts themselves, or the outermost wrapper around them."""
    install(module, KIND, FastExperts, ExpertsState.of(module, structure))


def chain(module: Module) -> tuple[list[Module], Module]:
    """(PEFT's wrappers from this one inwards, what they stand around)."""
    wrappers = []
    while is_wrapper(module):
        wrappers.append(module)
        module = module._modules["base_layer"]
    return wrappers, module


def is_wrapper(module: Module) -> bool:
    """PEFT's wrapper around a parameter of what it stands around."""
    return stock_class(module) is ParamWrapper


def _inputs(state: ExpertsState, args: tuple, kwargs: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(hidden states [T, H], experts [T, k], their weights [T, k]) of a call."""
    given = dict(zip(state.arguments, args)) | kwargs
    if len(args) > 3 or given.keys() != set(state.arguments):
        raise Inexpressible("called with something else than hidden states, experts and their weights")
    x, a, b = (given[n] for n in state.arguments)
    for t in (x, a, b):
        plain = type(t) in (torch.Tensor, nn.Parameter) or isinstance(t, FakeTensor)
        if not plain or t.dim() != 2:
            raise Inexpressible("an input is no plain matrix")
    index, weights = (b, a) if a.is_floating_point() else (a, b)
    if not (x.is_floating_point() and weights.is_floating_point()) or index.is_floating_point():
        raise Inexpressible("its inputs are of other dtypes")
    if index.shape != weights.shape or len(index) != len(x) or x.shape[1] != state.structure.hidden:
        raise Inexpressible("its inputs are of other shapes")
    return x, index, weights


def described(module: Module, state: ExpertsState, x: torch.Tensor):
    """(up, down, gating) as they are now. Raises Inexpressible."""
    s = state.structure
    wrappers, experts = chain(module)
    if any(is_hooked(m) for m in (*wrappers, experts) if m is not module):
        raise Inexpressible("a hook inside the adapters' wrappers")
    if "parametrizations" in experts._modules:
        raise Inexpressible("a parameter is parametrised")
    if why := state.snapshot.changed(experts):
        raise Inexpressible(why)
    adapters: dict[str, list[ExpertsAdapter]] = {s.up: [], s.down: []}
    for wrapper in reversed(wrappers):
        if wrapper.parameter_name not in adapters:
            raise Inexpressible(f"an adapter on {wrapper.parameter_name}")
        adapters[wrapper.parameter_name] += _adapters(wrapper, s)
    up, down = (
        ExpertsProjection(
            _parameter(experts, name, 3), s.transposed, _parameter(experts, bias, 2), tuple(adapters[name])
        )
        for name, bias in ((s.up, s.up_bias), (s.down, s.down_bias))
    )
    weight = up.weight
    _check(s, up, down)
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        raise Inexpressible(f"{weight.dtype} experts and a {x.dtype} input")  # stock's error, or cast, is the answer
    if any(t.device != x.device for p in (up, down) for t in p.tensors()):
        raise Inexpressible(f"a parameter or an adapter is not on its input's device, {x.device}")
    return up, down, s.gating_of(experts)


def _check(s: ExpertsStructure, up: ExpertsProjection, down: ExpertsProjection) -> None:
    width = 2 * s.inner if s.gated else s.inner
    whole = up.widths == (s.hidden, width) and down.widths == (s.inner, s.hidden)
    if not whole or len(up.weight) != s.experts or len(down.weight) != s.experts:
        raise Inexpressible("a parameter is sharded or gathered elsewhere")
    if up.weight.dtype != down.weight.dtype:
        raise Inexpressible("parameters of several dtypes")


def _parameter(module: Module, name: str, dim: int) -> Any:
    if not name:
        return None
    p = parameter(module, name)
    plain_parameter(p, name, dim)
    return p


def _adapters(wrapper: Module, s: ExpertsStructure) -> list[ExpertsAdapter]:
    """The adapters in force on one parameter, in stock's order."""
    if wrapper.merged:
        if wrapper.disable_adapters:
            raise Inexpressible("merged adapters are being disabled")
        return []
    if wrapper.disable_adapters:
        return []
    if wrapper.num_experts != s.experts:
        raise Inexpressible("an adapter of another number of experts")
    return [adapter(wrapper, name, s.transposed) for name in wrapper.active_adapters if name in wrapper.lora_A._modules]


def adapter(wrapper: Module, name: str, transposed: bool) -> ExpertsAdapter:
    """One adapter as the two factors of x W: views of PEFT's parameters. PEFT stacks lora_A by expert, then rank, and
    lora_B by rank, then expert; which of them the input meets first depends on how W is stored and on how PEFT took
    it."""
    a, b = wrapper.lora_A._modules[name], wrapper.lora_B._modules[name]
    if type(a) is not nn.Linear or type(b) is not nn.Linear or is_hooked(a) or is_hooked(b) or b.bias is not None:
        raise Inexpressible("lora_A or lora_B is no plain module or carries a hook")
    A, B, experts = _parameter(a, "weight", 2), _parameter(b, "weight", 2), wrapper.num_experts
    scaling = wrapper.scaling[name]
    if isinstance(scaling, torch.Tensor):
        raise Inexpressible("the scaling is a tensor")
    stacked_a = A.view(experts, -1, A.shape[1])  # [E, r, a]
    stacked_b = B.view(B.shape[0], -1, experts).permute(2, 0, 1)  # [E, b, r]
    # stored [E, b, a] where PEFT swapped the two, else [E, a, b]
    if swaps_in_and_out(wrapper) != transposed:
        return ExpertsAdapter(stacked_a.transpose(1, 2), stacked_b.transpose(1, 2), float(scaling))
    return ExpertsAdapter(stacked_b, stacked_a, float(scaling))
