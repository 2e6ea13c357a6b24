"""Packing on one model: hooks where a batch enters and where the layers are called, and their exact undo."""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import ModelOutput

from fastft.checkpointing.layer_stack import stacks
from fastft.compat.torch_private import is_under_fake_tensors
from fastft.compat.transformers_private import attention_implementation, supports_sdpa
from fastft.packing.batch import Unpadded
from fastft.packing.entrance import ForwardFrame, named, random_state
from fastft.packing.interface import KIND, attentions, teach
from fastft.packing.packing import Packing
from fastft.swapping.swap import uninstall
from fastft.swapping.walk import modules_of


class _Hook:
    """What all hooks share: a copy serves the copy of the model; a pickled model is a stock model, and needs the
    standard library."""

    def __init__(self, packing: Packing):
        self.packing = packing

    def __deepcopy__(self, memo):
        new = memo[id(self)] = type(self)(copy.deepcopy(self.packing, memo))
        return new

    def __reduce__(self):
        return getattr, (contextlib.nullcontext(), "__exit__")


class OwnerPreHook(_Hook):
    """Forward pre-hook of the owner: packs or unpads the batch where that is possible."""

    def __init__(self, packing: Packing):
        super().__init__(packing)
        self.here = threading.local()

    @property
    def running(self) -> list[Unpadded | None]:
        """How the batch of each of this thread's running forwards was unpadded, innermost last."""
        if not hasattr(self.here, "rows"):
            self.here.rows = []
        return self.here.rows

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict | None = None):
        if kwargs is None:  # taken off while torch was calling the hooks: by a patch inside another one
            return None
        if torch.compiler.is_compiling() or module is not self.packing.owner():  # a replica of DataParallel
            return None
        self.running.append(None)
        if is_under_fake_tensors():
            return None  # how rows are padded or packed is a question to values
        given = named(module, args, kwargs)
        plan = None if given is None else self.packing.plan(module, given)
        if plan is None or given is None:
            return None
        if isinstance(plan, Unpadded):
            self.running[-1] = plan
            plan = plan.arguments(given)
        return (), plan


class OwnerPostHook(_Hook):
    """Forward hook of the owner, called after an exception too: puts the padding back."""

    def __init__(self, packing: Packing, look: OwnerPreHook | None = None):
        super().__init__(packing)
        self.look = look

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        if (
            torch.compiler.is_compiling()
            or self.look is None
            or not self.look.running
            or module is not self.packing.owner()
        ):
            return None
        rows = self.look.running.pop()
        if rows is not None and isinstance(output, ModelOutput):
            output["last_hidden_state"] = rows.pad(output["last_hidden_state"])
        return None

    def __deepcopy__(self, memo):
        new = memo[id(self)] = OwnerPostHook(copy.deepcopy(self.packing, memo), copy.deepcopy(self.look, memo))
        return new


class EntrancePreHook(_Hook):
    """Forward pre-hook of a module through which a forward enters."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict | None = None) -> None:
        if kwargs is None or torch.compiler.is_compiling() or (base := self.packing.base()) is None:
            return
        random = [] if self.packing.padded_now or not base.training else random_state(_device(base))
        self.packing.underway.frames.append(
            ForwardFrame(weakref.ref(module), args, kwargs, named(module, args, kwargs, base), random)
        )


class EntrancePostHook(_Hook):
    """Forward hook of such a module, called after an exception too."""

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict, output):
        frames = self.packing.underway.frames
        if torch.compiler.is_compiling() or not frames or frames[-1].module() is not module:
            return None
        frame = frames.pop()
        return None if output is None else self.packing.leave(frame, output)


def _device(base: nn.Module) -> torch.device:
    return next((p.device for p in base.parameters()), torch.device("cpu"))


def attach(model: nn.Module, base: nn.Module, unpad: bool | None = None) -> Packing | None:
    """Put the hooks on `base` (the innermost transformers model) and on the ways into it, in place of those that stand
    there; None for a model without layers."""
    before = packing_of(base)
    release(model, base)
    found = stacks(base)
    owner: Any = max(found, key=lambda s: s.share).owner() if found else None
    if owner is None or not hasattr(owner, "config"):
        return None
    packing = Packing(weakref.ref(base), weakref.ref(owner), unpad)
    if before is not None:
        packing.unpad = before.unpad if unpad is None else unpad
        packing.counts, packing.used, packing.proofs = before.counts, before.used, before.proofs
    packing.implementation = attention_implementation(owner.config) or ""
    packing.why_not = _prepare(packing, owner)
    look = OwnerPreHook(packing)
    owner.register_forward_pre_hook(look, with_kwargs=True)
    owner.register_forward_hook(OwnerPostHook(packing, look), with_kwargs=True, always_call=True)
    for module in _entrances(model, base):
        if module is owner:
            continue
        module.register_forward_pre_hook(EntrancePreHook(packing), with_kwargs=True)
        module.register_forward_hook(EntrancePostHook(packing), with_kwargs=True, always_call=True)
    return packing


def teach_again(base: nn.Module) -> None:
    """Swap the attentions of a patched model once more, over the swaps that are there now."""
    packing = packing_of(base)
    owner = None if packing is None else packing.owner()
    if packing is not None and owner is not None:
        packing.why_not = _prepare(packing, owner)


def _prepare(packing: Packing, owner: nn.Module) -> str:
    """Swap the attentions for those that know documents; the reason where that cannot be."""
    name, cls = packing.implementation, type(owner)
    if name != "sdpa" and not (name == "eager" and not supports_sdpa(cls)):
        return f"the attention implementation is {name or 'unknown'}, which was chosen and stays"
    found = list(attentions(owner))
    if not found:
        return "its attention is not on transformers' attention interface"
    for module in found:
        uninstall(module, KIND)  # of a patch before: it goes over the swaps that are there now
        if why := teach(module):
            return why
    packing.attentions = [weakref.ref(m) for m in found]
    return ""


def _entrances(model: nn.Module, base: nn.Module) -> list[nn.Module]:
    tuner = getattr(model, "base_model", None) if hasattr(model, "peft_config") else None
    return [m for m in dict.fromkeys((model, tuner, base)) if isinstance(m, nn.Module)]


def packing_of(base: nn.Module) -> Packing | None:
    """The packing of a patched model; None where it has none."""
    return next((hook.packing for _, _, hook in _hooks(base) if isinstance(hook, OwnerPreHook)), None)


def release(model: nn.Module, base: nn.Module) -> None:
    """The exact undo of `attach`, but for the attentions' classes, which `undo` restores with all others."""
    for root in {id(model): model, id(base): base}.values():
        for module, key, _ in list(_hooks(root)):
            for table in (
                module._forward_pre_hooks,
                module._forward_pre_hooks_with_kwargs,
                module._forward_hooks,
                module._forward_hooks_with_kwargs,
                module._forward_hooks_always_called,
            ):
                table.pop(key, None)


def _hooks(root: nn.Module) -> Iterator[tuple[nn.Module, int, _Hook]]:
    for module in modules_of(root):
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()) if table else ():
                if isinstance(hook, _Hook):
                    yield module, key, hook
