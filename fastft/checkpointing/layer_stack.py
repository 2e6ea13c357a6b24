"""The layers of a model that can be recomputed, in the order of their calls, by the module whose forward calls them."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from fastft.swapping.swap import slot_of, stock_class
from fastft.swapping.walk import parameters_of

GRAPHS = "CUDA graphs"  # the kind of swap under which a layer's calls are replayed (fastft/graphs)
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass
class Stack:
    """Layers, in order, that `owner` calls. share: of all such layers of the model, by parameters. measured: for a kind
    of layer, the bytes per token that a kept one holds, and the longest row for which that was seen. last: what the
    last training forward did."""

    owner: weakref.ref[nn.Module]
    layers: list[weakref.ref[nn.Module]]
    share: float = 1.0
    measured: dict[Hashable, tuple[float, int]] = field(default_factory=dict)
    last: str = ""

    def alive(self) -> list[nn.Module]:
        return [m for r in self.layers if (m := r()) is not None]

    def __deepcopy__(self, memo) -> Stack:
        new = memo[id(self)] = Stack(self.owner, [], self.share, dict(self.measured))
        if (owner := self.owner()) is not None:
            new.owner = weakref.ref(copy.deepcopy(owner, memo))
        new.layers = [weakref.ref(copy.deepcopy(m, memo)) for m in self.alive()]
        return new


def stacks(model: nn.Module) -> list[Stack]:
    """Every module of `model` that holds layers which transformers can checkpoint, with them. (A layer inside another
    is that one's.)"""
    found: dict[nn.Module, list[nn.Module]] = {}
    for owner, layer in _walk(model, model):
        found.setdefault(owner, []).append(layer)
    sizes = [sum([p.numel() for m in layers for p in parameters_of(m)]) for layers in found.values()]
    total = max(1, sum(sizes))
    return [
        Stack(weakref.ref(o), [weakref.ref(m) for m in layers], n / total)
        for (o, layers), n in zip(found.items(), sizes)
    ]


def _walk(module: nn.Module, owner: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    for child in module.children():
        if isinstance(child, GradientCheckpointingLayer):
            yield owner, child
        else:
            yield from _walk(child, owner if isinstance(child, _CONTAINERS) else child)


def kind_of(layer: nn.Module) -> Hashable:
    """Layers of one kind keep the same bytes for the same batch."""
    return stock_class(layer), tuple((tuple(p.shape), p.dtype, p.requires_grad) for p in parameters_of(layer))


def graphs_of(layer: nn.Module) -> Any:
    """What replays this layer's calls as CUDA graphs; None where nothing does."""
    slot = slot_of(layer)
    return slot.state(GRAPHS) if slot is not None and GRAPHS in slot.parts else None
