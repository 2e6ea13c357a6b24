"""The tensors that a call is given or returns, whatever holds them."""

from __future__ import annotations

import torch


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in `value`, in order: itself, or those in its tuples, lists and dicts (a model's output is one)."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_in(v)]
    return [t for v in value for t in tensors_in(v)] if isinstance(value, (tuple, list)) else []


def floats_in(value: object) -> list[torch.Tensor]:
    """The floating-point tensors in `value`, in order."""
    return [t for t in tensors_in(value) if t.is_floating_point()]
