"""PEFT's names beside its documented interface. A linear layer's call reads the first two where nn.Module keeps them:
PEFT's public properties for them (`disable_adapters`, `active_adapter`) cost the host a call each."""

from __future__ import annotations

from typing import Any

DISABLED = "_disable_adapters"  # bool attribute of a tuner's layer
ACTIVE = "_active_adapter"  # the active adapter's name, or a list of names
MADE_WITH = "kwargs"  # what a tuner's layer was made with, its own name in the model among it; nothing reads it again


def enable_adapters(layer: Any) -> None:
    """Set a layer's flag alone, without what PEFT's method does to the requires_grad of its parameters."""
    layer._disable_adapters = False


def swaps_in_and_out(wrapper: Any) -> bool:
    """Did PEFT's wrapper of a 3-D parameter take [experts, out, in] for [experts, in, out], and exchange the two?"""
    return wrapper._did_swap_in_out_features
