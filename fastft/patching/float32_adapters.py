"""Adapters of a quantised model that trains in float16 with a gradient scaler: float32, as the scaler needs them.

TRL's trainers round the adapters of a quantised model to bfloat16 when they are made, whatever they then train in. On a
card without bfloat16 they train with `fp16=True`, and float16's gradient scaler takes no bfloat16 gradient: the first
step fails. So when a forward that trains in float16 enters a quantised model, trainable parameters in bfloat16 become
float32, before anything has read them. TRL's classes stay as they are; a run in bfloat16 or without a scaler is not
touched. (Of a run that is resumed PEFT makes them float32 as it loads the checkpoint.)

Under DistributedDataParallel it is too late by then, as its buckets have been made: a warning says what to write."""

from __future__ import annotations

import copy
import warnings
import weakref

import torch
from accelerate.state import AcceleratorState
from accelerate.state import is_initialized as accelerate_is_there
from torch import nn

from fastft.compat.accelerate_private import ORIGINAL_FORWARD
from fastft.compat.torch_private import REPLICA
from fastft.patching.entrances import entrances
from fastft.swapping.stock_only import transformed

TOO_LATE = (
    "this 4- or 8-bit model trains in float16 under DistributedDataParallel with adapters in bfloat16, whose gradients "
    "float16's scaler does not take; after the trainer is made, and before train(), write: "
    "for p in trainer.model.parameters(): p.data = p.data.float() if p.requires_grad else p.data"
)


def trains_in_float16(module: nn.Module, device: str) -> bool:
    """Is float16's autocast on, or about to be: in the forward that Accelerate has prepared of this module?"""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device) == torch.float16
    prepared = ORIGINAL_FORWARD in module.__dict__ and accelerate_is_there()
    return prepared and AcceleratorState().mixed_precision == "fp16"


def is_quantised(base: nn.Module) -> bool:
    """By TRL's own question: bitsandbytes' 4 or 8 bits."""
    return bool(getattr(base, "is_loaded_in_4bit", False) or getattr(base, "is_loaded_in_8bit", False))


class Float32Adapters:
    """The forward pre-hook, one for all entrances of a quantised model. `count`: tensors that it made float32."""

    def __init__(self, base: nn.Module):
        self.base, self.count, self.warned = weakref.ref(base), 0, False

    def __call__(self, module: nn.Module, args: tuple = ()) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or REPLICA in module.__dict__:
            return
        base = self.base()
        if base is None or not base.training:
            return
        first = next((p for p in base.parameters() if p.requires_grad), None)
        if first is None or first.dtype != torch.bfloat16:
            return
        if trains_in_float16(module, first.device.type) and not transformed():
            self.cast(base)

    def cast(self, base: nn.Module) -> None:
        """Trainable bfloat16 parameters of `base`, and their gradients."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            if torch.distributed.get_world_size() > 1:
                if not self.warned:
                    self.warned = True
                    warnings.warn(TOO_LATE, stacklevel=2)
                return
        rounded = [p for p in base.parameters() if p.requires_grad and p.dtype == torch.bfloat16]
        for p in rounded:
            grad, p.grad = p.grad, None
            p.data = p.data.float()
            p.grad = None if grad is None else grad.float()
        self.count = len(rounded)

    def __deepcopy__(self, memo: dict) -> Float32Adapters:
        base = self.base()
        new = memo[id(self)] = Float32Adapters.__new__(Float32Adapters)
        new.base = self.base if base is None else weakref.ref(copy.deepcopy(base, memo))
        new.count, new.warned = self.count, self.warned
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back returns its arguments, and needs the standard library
        alone."""
        return getattr, ({}, "get")


def cast_adapters(model: nn.Module, base: nn.Module) -> Float32Adapters | None:
    """The hook of a quantised model, new or there already, which has looked at the forward under way: `fastft run`
    patches inside one. None for a model that is not quantised."""
    if not is_quantised(base):
        return None
    hook = _hook_of(base) or Float32Adapters(base)
    for module in entrances(model, base):
        hook(module)
    return hook


def watch_adapters(model: nn.Module, base: nn.Module, hook: Float32Adapters | None) -> None:
    """The hook where forwards enter."""
    if hook is None:
        return
    for module in entrances(model, base):
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)


def _hook_of(base: nn.Module) -> Float32Adapters | None:
    return next((h for h in base._forward_pre_hooks.values() if isinstance(h, Float32Adapters)), None)


def adapter_lines(base: nn.Module) -> list[str]:
    """For the report."""
    hook = _hook_of(base)
    if hook is None or not hook.count:
        return []
    return [
        f"{hook.count} trainable tensors that were bfloat16 are float32: the training is in float16, whose gradient "
        "scaler takes no bfloat16"
    ]


def unwatch_adapters(model: nn.Module, base: nn.Module) -> None:
    """The exact undo of `watch_adapters`: dtypes stay as they are, for the optimizer holds them."""
    for root in dict.fromkeys((model, base)):
        for module in root.modules():
            for key in [k for k, h in module._forward_pre_hooks.items() if isinstance(h, Float32Adapters)]:
                del module._forward_pre_hooks[key]
