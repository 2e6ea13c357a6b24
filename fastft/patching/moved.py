"""A patched model that is moved to another device, cast to another dtype, or sharded, is proven again before its next
forward.

For each proof that swapped something, one module's parameters stand for all that it serves. A forward pre-hook where
forwards enter the model compares their devices and dtypes with those of the patch: some attribute reads a call. Where
one differs, every swap is taken off, and the modules are recognised and proven as they are now; what fails stays stock.
Nothing is raised in the caller's forward: where the proofs cannot be made, all of it stays stock, and the report says
why. A compiled forward proves nothing: who moves a model and then compiles it patches it again in between."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import nn

from fastft.compat.sharding_private import is_distributed, is_managed, sharded_parameters
from fastft.compat.torch_private import REPLICA, FakeTensor
from fastft.patching.entrances import entrances
from fastft.patching.kind import Kind
from fastft.patching.patcher import Record, apply_kinds, devices_note, innermost, record_of
from fastft.proving.prove import undisturbed
from fastft.swapping.out_of_memory import PatchMemoryError
from fastft.swapping.stock_only import transformed
from fastft.swapping.swap import is_fast, swapped_in, uninstall
from fastft.swapping.walk import modules_of, names_of

MOST = 8  # times that a model is proven again: more are somebody's who casts it at every step
NO_MEMORY = "the model was moved, and no memory was left for the proofs there: stock until it is patched again"
TOO_OFTEN = f"the model was moved or cast {MOST} times since its patch: stock until it is patched again"
NOT_YET = "the model was moved or cast: it is proven again at its next forward"
Standing = tuple[weakref.ref, str, torch.device, torch.dtype]
_LOCK = threading.RLock()  # one thread proves; others that enter meanwhile wait for it


def standing_of(base: nn.Module, record: Record) -> list[Standing]:
    """(module, its parameter's name, device, dtype) of one module for each proof, and of the model's first parameter:
    what is swapped may have none of its own."""
    modules, first = {n: m for m, n in names_of(base).items()}, {}
    for outcome in record.outcomes.values():
        if outcome.proof is not None and outcome.kernel and outcome.name in modules:
            first.setdefault(id(outcome.proof), modules[outcome.name])
    if not first:
        return []
    found = {}
    with_parameters = next((m for m in modules.values() if any(p is not None for p in m._parameters.values())), None)
    owners = [owner for module in first.values() for owner in modules_of(module)]
    for owner in [*owners, *([] if with_parameters is None else [with_parameters])]:
        for name, p in owner._parameters.items():
            if p is not None:
                found[id(owner), name] = (weakref.ref(owner), name, p.device, p.dtype)
    return list(found.values())


class Moved:
    """The pre-hook, one for all entrances of a model. kinds: makes fresh recognisers. renew: what else stands over the
    swaps, done again over those that are there now.

    proving: the thread that proves the model now, whose modules meanwhile are not what they are: others wait."""

    stays_while_observed = True

    def __init__(self, base: nn.Module, kinds: Callable[[], Sequence[Kind]], renew: Callable[[nn.Module], None]):
        self.base, self.kinds, self.renew, self.met = weakref.ref(base), kinds, renew, False
        self.proving: int | None = None
        self.remember(MOST)

    def remember(self, left: int) -> None:
        """The model as it is now; `left` times it may be proven again."""
        base = self.base()
        record = None if base is None else record_of(base)
        self.standing = [] if base is None or record is None else standing_of(base, record)
        self.left = left
        # who gathers a parameter may be known in its first forward alone: then it is asked again
        modules = [] if base is None else modules_of(base)
        self.sharded = is_managed(modules) and (self.met or all(p.whole for p in sharded_parameters(modules)))

    def has_moved(self) -> bool:
        """Is there a parameter for whose device and dtype nothing is proven? (Every proof has run in float64 too.) One
        that is sharded by now is gathered in a dtype, on a device and together with others that were not asked about;
        once that has been proven, they change within a step, and nothing moves any more."""
        if self.sharded:
            return False
        for ref, name, device, dtype in self.standing:
            owner = ref()
            p = None if owner is None else owner._parameters.get(name)
            if p is not None and is_distributed(p):
                return True
            if (
                p is not None
                and (p.dtype not in (dtype, torch.float64) or p.device != device)
                and p.device.type != "meta"
            ):
                return not isinstance(p, FakeTensor)
        return False

    def __call__(self, module: nn.Module, args) -> None:
        if torch.compiler.is_compiling() or REPLICA in module.__dict__:
            return
        if self.proving is not None:
            if self.proving != threading.get_ident():
                with _LOCK:
                    return
            return
        if not self.has_moved():
            return
        base = self.base()
        if base is not None and not transformed():
            self.follow(base)

    def follow(self, base: nn.Module) -> None:
        """Prove the model as it is now, if it has moved."""
        with _LOCK:
            if not self.has_moved():  # another thread may have been here
                return
            self.proving = threading.get_ident()
            try:
                if self.left:
                    prove_again(base, self.kinds())
                else:
                    all_stock(base, self.kinds(), TOO_OFTEN)
            finally:
                self.met = True
                self.renew(base)
                self.remember(max(0, self.left - 1))
                self.proving = None

    def __deepcopy__(self, memo) -> Moved:
        base = self.base()
        new = memo[id(self)] = Moved.__new__(Moved)
        new.base = self.base if base is None else weakref.ref(copy.deepcopy(base, memo))
        new.kinds, new.renew, new.left, new.standing = self.kinds, self.renew, self.left, []
        new.sharded, new.met, new.proving = self.sharded, self.met, None
        for ref, *rest in self.standing:
            if (owner := ref()) is not None:
                new.standing.append((weakref.ref(copy.deepcopy(owner, memo)), *rest))
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back returns its arguments, and needs the standard library
        alone."""
        return getattr, ({}, "get")


def prove_again(base: nn.Module, kinds: Sequence[Kind]) -> None:
    """Swaps of `kinds` come off, and go on again where they are proven now. What a proof or a recogniser raises leaves
    all of them stock, and the record says so."""
    record = record_of(base)
    if record is None:
        return
    before = dict(record.outcomes)
    _take_off(base, kinds)
    record.outcomes.clear()
    try:
        with undisturbed():
            apply_kinds(base, kinds)
    except Exception as e:
        record.outcomes = before
        why = (
            NO_MEMORY if isinstance(e, PatchMemoryError) else f"when it was to be proven again: {type(e).__name__}: {e}"
        )
        all_stock(base, kinds, why)


def all_stock(base: nn.Module, kinds: Sequence[Kind], why: str) -> None:
    """Swaps of `kinds` come off; the record gives `why` for each."""
    _take_off(base, kinds)
    if (record := record_of(base)) is not None:
        for key, outcome in record.outcomes.items():
            if outcome.kernel:
                record.outcomes[key] = replace(outcome, kernel="", proof=None, reason=why)
        record.notes = devices_note(base)


def _take_off(base: nn.Module, kinds: Sequence[Kind]) -> None:
    parts = {part for kind in kinds for part in getattr(kind, "parts", (kind.name,))}
    for module in swapped_in(base):
        for part in parts:
            if is_fast(module, part):
                uninstall(module, part)


def watch_moves(
    model: nn.Module, kinds: Callable[[], Sequence[Kind]], renew: Callable[[nn.Module], None] = lambda base: None
) -> None:
    """The hook where forwards enter. A second patch renews what it knows."""
    base = innermost(model)
    places = entrances(model, base)
    hook = _hook_of(places)
    if hook is None:
        hook = Moved(base, kinds, renew)
    else:
        hook.remember(MOST)
    for module in places:
        if hook not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(hook)


def _hook_of(modules: Iterable[nn.Module]) -> Moved | None:
    return next((h for m in modules for h in m._forward_pre_hooks.values() if isinstance(h, Moved)), None)


def follow_moves(model: nn.Module) -> None:
    """Prove the swaps of an earlier patch where the model is now: they were proven where it stood then."""
    base = innermost(model)
    hook = _hook_of(entrances(model, base))
    if hook is not None:
        hook.left = MOST
        hook.follow(base)


def moved_lines(model: nn.Module) -> list[str]:
    """For the report: was the model moved since it was proven?"""
    hook = _hook_of([innermost(model)])
    return [NOT_YET] if hook is not None and hook.has_moved() else []


def unwatch_moves(model: nn.Module) -> None:
    """Undo `watch_moves` exactly."""
    for root in dict.fromkeys((model, innermost(model))):
        for module in modules_of(root):
            for key in [k for k, h in module._forward_pre_hooks.items() if isinstance(h, Moved)]:
                del module._forward_pre_hooks[key]
