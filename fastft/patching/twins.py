"""Layers of a list that are alike: one is observed, recognised and proven for all of them.

Two layers are twins where all that a recogniser or a proof looks at is equal: classes, names of children, every
attribute but the layer's number, shapes, dtypes, devices and `requires_grad` of parameters and buffers, how a quantised
weight is read. What a forward does with the number of its layer shows in how it is called, and is checked while a model
is observed. (A member of a linear group that is given another input than its siblings computes for itself, a rotation
of another form goes stock's way and is counted: nobody's results depend on it.)"""

from __future__ import annotations

import functools
import types
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fastft.compat.peft_private import MADE_WITH
from fastft.compat.torch_private import FakeTensor
from fastft.swapping.swap import KEY
from fastft.swapping.walk import modules_of, parameters_of

KINDS = 8  # of layers in one list: a list of more is no stack of layers
_PLAIN = frozenset((int, float, bool, str, bytes, type(None), torch.dtype, torch.device))
_CONTAINERS = frozenset((dict, OrderedDict, list, tuple, set, frozenset))
_NOT_COMPARED = frozenset(("_modules", "layer_idx", MADE_WITH))


@dataclass
class Twins:
    """first: by the root of each twin, the layer that it is like. of: by each module of such a layer, itself included,
    its counterparts in the twins. inside: all modules of twins."""

    first: dict[nn.Module, nn.Module] = field(default_factory=dict)
    of: dict[nn.Module, list[nn.Module]] = field(default_factory=dict)
    inside: set[nn.Module] = field(default_factory=set)

    def forget(self) -> None:
        self.first.clear()
        self.of.clear()
        self.inside.clear()


def find_twins(model: nn.Module) -> Twins:
    """The twins in all lists of layers of `model`; in a list inside a layer, of the layers that are no twins."""
    found = Twins()
    for module in modules_of(model):
        if module not in found.inside and isinstance(module, nn.ModuleList):
            firsts: list[nn.Module] = []
            for layer in module._modules.values():
                if layer is None or not layer._modules or hasattr(layer, "in_features") or layer in found.inside:
                    continue
                if not any(_joins(found, first, layer) for first in firsts) and len(firsts) < KINDS:
                    firsts += (layer,)
    return found


def _joins(found: Twins, first: nn.Module, layer: nn.Module) -> bool:
    """Note `layer` as a twin of `first`, if it is one."""
    pairs = _counterparts(first, layer)
    if pairs is None:
        return False
    found.first[layer] = first
    for a, b in pairs.items():
        if a not in found.of:
            found.of[a] = []
        # (b may be in a layer that has twins of its own: what is in their places is like a too)
        found.of[a] += (b, *(found.of[b] if b in found.of else ()))
    found.inside |= set(pairs.values())
    return True


def _counterparts(first: nn.Module, layer: nn.Module) -> dict[nn.Module, nn.Module] | None:
    """For each module of `first` the one in its place in `layer`, but for modules without parameters that they share;
    None where they are not alike."""
    found: dict[nn.Module, nn.Module] = {}
    todo: list[tuple[nn.Module | None, nn.Module | None]] = [(first, layer)]
    while todo:
        a, b = todo.pop()
        if a is None or b is None or a is b:
            if a is not b or (a is not None and parameters_of(a)):
                return None
            continue
        if a in found:
            if found[a] is not b:
                return None
            continue
        if not _alike(a, b):
            return None
        found[a] = b
        x, y = a._modules, b._modules
        if x or y:
            if list(x) != list(y):
                return None
            todo += zip(x.values(), y.values())
    return found if len(set(found.values())) == len(found) else None


def _alike(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.__dict__, b.__dict__
    if type(a) is not type(b) or set(x) != set(y) or KEY in x:
        return False
    for name, v in x.items():
        w = y[name]
        if v is w or name in _NOT_COMPARED:
            continue
        if name == "_parameters" or name == "_buffers":
            if (v or w) and not _same_tensors(v, w):
                return False
        elif type(v) is not type(w):
            return False
        elif type(v) in _PLAIN:
            if v != w:
                return False
        elif type(v) in _CONTAINERS:
            if (v or w) and not _same_values(v, w):
                return False
        elif type(v) is functools.partial:
            if v.func is not w.func or not _same_values((v.args, v.keywords), (w.args, w.keywords)):
                return False
        elif type(v) is types.MethodType:
            if v.__func__ is not w.__func__ or v.__self__ is not a or w.__self__ is not b:
                return False
        elif "absmax" not in getattr(v, "__dict__", ()) or not _read_alike(v, w):  # the state of a quantisation
            return False
    return True


def _same_values(v: Any, w: Any) -> bool:
    """Are two containers equal? (Where they hold tensors or arrays, whose comparison has no one answer, it is no.)"""
    try:
        return (v == w) is True
    except (RuntimeError, ValueError):
        return False


def _same_tensors(v: dict[str, torch.Tensor | None], w: dict[str, torch.Tensor | None]) -> bool:
    if list(v) != list(w):
        return False
    for name, t in v.items():
        u = w[name]
        if t is u:
            continue
        if t is None or u is None or not _same_form(t, u) or t.requires_grad != u.requires_grad:
            return False
        if type(t) is not nn.Parameter and type(t) is not torch.Tensor and not _read_alike(t, u):
            return False
    return True


def _same_form(t: torch.Tensor, u: torch.Tensor) -> bool:
    return type(t) is type(u) and t.shape == u.shape and t.dtype == u.dtype and t.device == u.device


def _read_alike(t: Any, u: Any) -> bool:
    """Are two quantised weights, or the states of their quantisation, read in the same way? Their tensors may hold
    other numbers, but for the code, the table of what each number stands for."""
    x, y = vars(t), vars(u)
    if x.keys() != y.keys():
        return False
    for name, v in x.items():
        w = y[name]
        if v is w or isinstance(v, nn.Module):
            continue
        if isinstance(v, torch.Tensor) and isinstance(w, torch.Tensor):
            if not _same_form(v, w) or (name == "code" and not _same_table(v, w)):
                return False
        elif type(v) is not type(w):
            return False
        elif type(v) in _PLAIN or isinstance(v, (tuple, list)):
            if not _same_values(v, w):
                return False
        elif not hasattr(v, "__dict__") or not _read_alike(v, w):
            return False
    return True


def _same_table(v: torch.Tensor, w: torch.Tensor) -> bool:
    return v.is_meta or isinstance(v, FakeTensor) or torch.equal(v, w)


@contextmanager
def hollow(twins: Twins) -> Iterator[None]:
    """Within it twins have no modules inside: whatever walks the model passes over them, and nothing in them can be
    called."""
    kept = [(layer, layer._modules) for layer in twins.first]
    try:
        for layer, _ in kept:
            layer.__dict__["_modules"] = {}
        yield
    finally:
        for layer, modules in kept:
            layer.__dict__["_modules"] = modules
