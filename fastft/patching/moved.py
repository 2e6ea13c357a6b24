"""A patched model that is moved to another device, or cast to another dtype, is proven again before its next forward.

For each proof that swapped something, one module's parameters stand for all that it serves. A forward pre-hook where
forwards enter the model compares their devices and dtypes with those of the patch: some attribute reads a call. Where
one differs, every swap is taken off, and the modules are recognised and proven as they are now; what fails stays stock.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from fastft.patching.kind import Kind
from fastft.patching.patcher import Record, apply_kinds, devices_note, innermost, record_of
from fastft.proving.prove import undisturbed
from fastft.swapping.out_of_memory import PatchMemoryError
from fastft.swapping.stock_only import transformed
from fastft.swapping.swap import is_fast, uninstall

MOST = 8  # times that a model is proven again: more are somebody's who casts it at every step
Standing = tuple[weakref.ref, str, torch.device, torch.dtype]


def standing_of(base: nn.Module, record: Record) -> list[Standing]:
    """(module, its parameter's name, device, dtype) of one module for each proof."""
    modules, first = dict(base.named_modules()), {}
    for outcome in record.outcomes.values():
        if outcome.proof is not None and outcome.kernel and outcome.name in modules:
            first.setdefault(id(outcome.proof), modules[outcome.name])
    found = {}
    for module in first.values():
        for owner in module.modules():
            for name, p in owner._parameters.items():
                if p is not None and p.device.type != "meta":
                    found[id(owner), name] = (weakref.ref(owner), name, p.device, p.dtype)
    return list(found.values())


def is_managed(base: nn.Module) -> bool:
    """Do parameters change their dtype and place within a step, under FSDP2's or DeepSpeed's hands?"""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    sharded = getattr(fsdp, "FSDPModule", ())
    return any(isinstance(m, sharded) for m in base.modules()) or any(hasattr(p, "ds_id") for p in base.parameters())


class Moved:
    """The pre-hook. kinds: makes fresh recognisers."""

    def __init__(self, base: nn.Module, kinds: Callable[[], Sequence[Kind]]):
        self.base, self.kinds = weakref.ref(base), kinds
        self.left = MOST
        self.remember()

    def remember(self) -> None:
        base = self.base()
        record = None if base is None else record_of(base)
        self.standing = [] if base is None or record is None else standing_of(base, record)

    def has_moved(self) -> bool:
        for ref, name, device, dtype in self.standing:
            owner = ref()
            p = None if owner is None else owner._parameters.get(name)
            if p is not None and (p.dtype != dtype or p.device != device) and p.device.type != "meta":
                return not isinstance(p, FakeTensor)
        return False

    def __call__(self, module: nn.Module, args) -> None:
        if not self.left or torch.compiler.is_compiling() or "_is_replica" in module.__dict__ or not self.has_moved():
            return
        base = self.base()
        if base is None or transformed() or is_managed(base):
            return
        self.left -= 1
        try:
            prove_again(base, self.kinds())
        finally:
            self.remember()

    def __deepcopy__(self, memo) -> Moved:
        base = self.base()
        new = memo[id(self)] = Moved.__new__(Moved)
        new.base = self.base if base is None else weakref.ref(copy.deepcopy(base, memo))
        new.kinds, new.left, new.standing = self.kinds, self.left, []
        for ref, *rest in self.standing:
            if (owner := ref()) is not None:
                new.standing.append((weakref.ref(copy.deepcopy(owner, memo)), *rest))
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back returns its arguments, and needs the standard library
        alone."""
        return getattr, ({}, "get")


def prove_again(base: nn.Module, kinds: Sequence[Kind]) -> None:
    """Swaps of `kinds` come off, and go on again where they are proven now. Without memory for the proofs the modules
    stay stock, and the record says so."""
    record = record_of(base)
    if record is None:
        return
    parts = {part for kind in kinds for part in getattr(kind, "parts", (kind.name,))}
    for module in list(base.modules()):
        for part in parts:
            if is_fast(module, part):
                uninstall(module, part)
    record.outcomes.clear()
    try:
        with undisturbed():
            apply_kinds(base, kinds)
    except PatchMemoryError:
        record.notes = [
            *devices_note(base),
            "the model was moved, and no memory was left to prove its modules there: they run as in stock until it is "
            "patched again",
        ]


def watch_moves(model: nn.Module, kinds: Callable[[], Sequence[Kind]]) -> None:
    """One hook where forwards enter: on the model given and the innermost one. A second patch renews what it knows."""
    base = innermost(model)
    for module in dict.fromkeys((model, base)):
        known = [h for h in module._forward_pre_hooks.values() if isinstance(h, Moved)]
        for hook in known:
            hook.remember()
        if not known:
            module.register_forward_pre_hook(Moved(base, kinds))


def unwatch_moves(model: nn.Module) -> None:
    """The exact undo."""
    for root in dict.fromkeys((model, innermost(model))):
        for module in root.modules():
            for key in [k for k, h in module._forward_pre_hooks.items() if isinstance(h, Moved)]:
                del module._forward_pre_hooks[key]
