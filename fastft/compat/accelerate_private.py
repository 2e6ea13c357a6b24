"""Accelerate's names beside its documented interface: what it leaves in a module's __dict__ (a device map's hooks), and
on a model that a trainer has prepared. Accelerate is not imported here."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOK = "_hf_hook"  # the hook that brings inputs to the module's device, and fetches weights that are offloaded
OLD_FORWARD = "_old_forward"  # the bound forward that stood there; `forward` on the instance calls it after the hook
LEFT_BY_HOOKS = (HOOK, OLD_FORWARD)
ORIGINAL_FORWARD = "_original_forward"  # of a prepared model, the bound forward inside the wrapper of mixed precision
CALLED = "model_forward"  # of that wrapper (ConvertOutputsToFp32): the function that it calls


def is_hooked(module: nn.Module) -> bool:
    """Does one of Accelerate's hooks stand on this module?"""
    return HOOK in module.__dict__


def execution_device(module: nn.Module) -> Any:
    """Where Accelerate's hook runs this module: an index, a name or a device; None without one."""
    return getattr(module.__dict__.get(HOOK), "execution_device", None)


def drops_mask(hook: Any) -> bool:
    """Is this the hook that Accelerate puts on attentions under context parallelism? It takes their mask away, and says
    `is_causal`."""
    return getattr(hook, "__qualname__", "").startswith("_attach_context_parallel_hooks.<locals>.")
