"""The modules through which a forward may enter a model."""

from __future__ import annotations

from torch import nn


def entrances(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    """The model that was given, PEFT's tuner, the innermost model, and its backbone (which a trainer with a loss of its
    own calls alone)."""
    tuner = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
    backbone = getattr(base, "base_model", None)
    return [m for m in dict.fromkeys((model, tuner, base, backbone)) if isinstance(m, nn.Module)]
