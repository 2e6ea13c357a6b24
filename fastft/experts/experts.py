"""Recognises experts in the 3-D layout, and PEFT's adapters on them.

A module whose own parameters are two or three stacks [experts, ., .] that go from one width to another and back holds
the MLPs of all its experts. Where PEFT adapts such parameters, the outermost of its wrappers is swapped as well, with a
proof of its own; the inner ones are only called where that goes the stock way."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastft.compat.transformers_private import experts_implementation
from fastft.experts.layer import KIND, chain, install_experts, is_wrapper
from fastft.experts.proof import prove_experts, runs, small_experts
from fastft.experts.structure import ExpertsStructure, experts_of, structure_of, with_gating
from fastft.linear.projection import is_hooked
from fastft.patching.kind import Candidate, Context, device_of
from fastft.proving.fingerprint import fingerprint
from fastft.swapping.swap import stock_class


class Experts:
    """Recognises experts in 3-D parameters; those that stay stock say why."""

    name = KIND

    def __init__(self):
        self._known: dict = {}

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        if is_wrapper(module):
            return self._wrapper(module, context)
        if not (count := experts_of(module)):
            return None
        found = self._structure(module)
        if isinstance(found, ExpertsStructure):
            return self._candidate(module, found)
        how = experts_implementation(getattr(module, "config", None)) or "own"
        return f"{count} experts in 3-D parameters: stock's {how} implementation is kept ({found})"

    def _wrapper(self, module: Any, context: Context) -> Candidate | str | None:
        """None for an inner wrapper."""
        inner = context.shared.setdefault("wrappers inside", set())
        wrappers, experts = chain(module)
        inner.update(wrappers[1:])
        if module in inner:
            return None
        if not experts_of(experts):
            return (
                None if module.get_param().dim() != 3 else "adapters on a 3-D parameter of something else than experts"
            )
        found = self._structure(experts)
        if isinstance(found, str):
            return f"adapters on experts that stay stock ({found})"
        if any(is_hooked(m) for m in (*wrappers[1:], experts)):
            return "a hook inside the adapters' wrappers"
        for wrapper in wrappers:
            if wrapper.num_experts != found.experts:
                return "an adapter of another number of experts"
            if wrapper.parameter_name not in (found.up, found.down):
                return f"an adapter on {wrapper.parameter_name}"
        return self._candidate(module, found)

    def _candidate(self, module: nn.Module, s: ExpertsStructure) -> Candidate:
        wrappers = chain(module)[0]
        adapted = sorted(w.parameter_name for w in wrappers)
        kernel = s.kernel + (f" with adapters on {', '.join(adapted)}" if wrappers else "")
        return Candidate(
            kernel,
            (fingerprint(module), s, *(_adapters_key(w) for w in wrappers)),
            lambda: prove_experts(module, s),
            lambda m: install_experts(m, s),
            device=device_of(module),
        )

    def _structure(self, module: nn.Module) -> ExpertsStructure | str:
        key = fingerprint(module)
        if key not in self._known:
            self._known[key] = _recognise(module)
        return self._known[key]


def _adapters_key(wrapper) -> tuple:
    """What a proof depends on beside a wrapper's shapes: what is on, and by how much."""
    return (
        wrapper.parameter_name,
        tuple(wrapper.scaling.items()),
        tuple(wrapper.active_adapters),
        wrapper.disable_adapters,
        tuple(wrapper.merged_adapters),
    )


def _recognise(module: nn.Module) -> ExpertsStructure | str:
    found = structure_of(module)
    if isinstance(found, str):
        return found
    if any(type(p) is not nn.Parameter for p in module._parameters.values() if p is not None):
        return f"a parameter of {stock_class(module).__name__} is no plain tensor"
    small = small_experts(module, found)
    return runs(small, found) or with_gating(found, small)
