"""A call's arguments: its tensors in order, and all else (structure, shapes, plain values) as one hashable key."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastft.packing.documents import DocumentMask

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
UNREAD = frozenset({"num_items_in_batch"})  # of the loss: transformers hands it on to the layers, which do not read it


class Unsupported(Exception):
    """Why a call cannot be captured."""


class Place(NamedTuple):
    """Stands for the tensor of this number in a template."""

    number: int


@dataclass(frozen=True)
class Arguments:
    """tensors: in the order of the call. template: the call's structure with a `Place` for each tensor. key: equal for
    two calls that differ in nothing but the tensors' values."""

    tensors: tuple[torch.Tensor, ...]
    template: Any
    key: Hashable


def flatten(value: Any) -> Arguments:
    """`value` (tuples, lists and dicts of tensors and plain values) in parts. Raises Unsupported for anything else, and
    for tensors that cannot be copied into a buffer of their layout."""
    tensors: list[torch.Tensor] = []
    template, key = _walk(value, tensors)
    return Arguments(tuple(tensors), template, key)


def _walk(value: Any, tensors: list[torch.Tensor]) -> tuple[Any, Hashable]:
    kind = type(value)
    if kind is torch.Tensor:
        if value.is_inference():
            raise Unsupported("an argument is a tensor of inference mode")
        tensors.append(value)
        # what autograd is to differentiate is part of the call as well
        key = (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        return Place(len(tensors) - 1), key
    if kind in _PLAIN:
        return value, (kind, value)
    if kind in (tuple, list):
        parts = [_walk(v, tensors) for v in value]
        return kind(t for t, _ in parts), (kind, *(k for _, k in parts))
    if kind is dict:
        parts = {k: _walk(v, tensors) for k, v in value.items() if k not in UNREAD}
        return {k: t for k, (t, _) in parts.items()}, (kind, *((k, key) for k, (_, key) in parts.items()))
    if kind is DocumentMask:  # its tensors are the lengths', which are in the key
        return value, (kind, value.documents.lengths, value.documents.device)
    raise Unsupported(f"an argument is a {kind.__name__}")


def rebuild(template: Any, tensors: tuple[torch.Tensor, ...] | list[torch.Tensor]) -> Any:
    """The structure of `template` with these tensors in the places."""
    kind = type(template)
    if kind is Place:
        return tensors[template.number]
    if kind in (tuple, list):
        return kind(rebuild(v, tensors) for v in template)
    if kind is dict:
        return {k: rebuild(v, tensors) for k, v in template.items()}
    return template
