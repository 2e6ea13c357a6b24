"""What answers in the place of a module while a model is observed on the meta device: adapter and quantised layers,
modules that the meta device cannot follow, layers that are like one that has run."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from fastft.proving.tensors import floats_in
from fastft.swapping.swap import Fast, Replacement, install, obstacle, order, state_of, uninstall
from fastft.swapping.walk import modules_of


@order(-100)
class _Empty(Replacement):
    """Mixin of an adapter or quantised layer during a meta run: an empty tensor of the output's shape, nothing inside
    is called."""

    def forward(self, x, *args, **kwargs):
        weight = getattr(getattr(self, "base_layer", self), "weight", None)
        dtype = (
            weight.dtype
            if isinstance(weight, torch.Tensor) and weight.is_floating_point() and weight.dtype.itemsize > 1
            else x.dtype
        )
        return x.new_empty((*x.shape[:-1], self.out_features), dtype=dtype)


@order(-100)
class _LikeInput(Replacement):
    """Mixin of a module that the meta device cannot follow: it is taken to return something like its first floating
    input."""

    def forward(self, *args, **kwargs):
        given = floats_in((*args, *kwargs.values()))
        if not given:
            raise RuntimeError(f"a {type(self).__name__} without a floating-point input")
        return torch.empty_like(given[0])


class _OtherCall(Exception):
    """A twin is called otherwise than the layer that it is like."""


@order(-100)
class AsFirst(Replacement):
    """Mixin of a twin: it returns what the layer that it is like returned when it was called so. Where that one handed
    on what it was given, this one does."""

    def forward(self, *args, **kwargs):
        seen, first = state_of(self, "stand-in")
        mine = seen.calls[self]
        like = seen.calls.get(first, ())[len(mine) - 1 : len(mine)]
        if not like or not _called_alike(mine[-1], like[0]):
            raise _OtherCall(f"a {type(self).__name__} is called otherwise than the first of its kind")
        places = {id(t): i for i, t in enumerate(like[0].inputs)}
        return _fresh(like[0].output, places, mine[-1].inputs)


def _called_alike(a: Any, b: Any) -> bool:
    if a.n_args != b.n_args or a.kwargs != b.kwargs or len(a.inputs) != len(b.inputs) or a.parent is not b.parent:
        return False
    return all(t.shape == u.shape and t.dtype == u.dtype for t, u in zip(a.inputs, b.inputs))


def _fresh(output, places: dict[int, int], inputs: list[torch.Tensor]):
    """`output` with other tensors; its inputs stand in for the first one's. Raises _OtherCall for what it does not
    know."""
    if isinstance(output, torch.Tensor):
        return inputs[places[id(output)]] if id(output) in places else torch.empty_like(output)
    if type(output) in (tuple, list):
        return type(output)(_fresh(v, places, inputs) for v in output)
    if output is None or isinstance(output, (bool, int, float, str)):
        return output
    raise _OtherCall(f"a layer returns a {type(output).__name__}")


def _is_opaque(module: nn.Module) -> bool:
    """A linear layer that is more than its product: an adapter around one, or one with a quantised weight."""
    if not (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return False
    weight = module._parameters.get("weight")
    if hasattr(module, "base_layer") or weight is None:
        return hasattr(module, "base_layer")
    return type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.element_size() == 1


def stand_in(model: nn.Module, failing: set[type], stack: ExitStack) -> set[nn.Module]:
    """Opaque linears and modules of the failing classes answer for themselves; returned: the modules inside them."""
    inside: set[nn.Module] = set()
    for module in modules_of(model):
        if module in inside or obstacle(module):
            continue
        mixin = _LikeInput if observed_class(module) in failing else _Empty if _is_opaque(module) else None
        if mixin is not None:
            inside.update(modules_of(module)[1:])
            install(module, "stand-in", mixin, None)
            stack.callback(uninstall, module, "stand-in")
    return inside


def observed_class(module: nn.Module) -> type:
    """A module's stock class, whatever stands in for it."""
    return next(
        c for c in type(module).__mro__ if not issubclass(c, (Fast, _LikeInput, _Empty)) and issubclass(c, nn.Module)
    )
