"""Every model that a script trains, patched at its own first training step, at no cost to the steps after it.

    armed     torch's global forward pre-hook waits for the first call of a transformers or PEFT model. It costs
              microseconds at every call of every module, so that call ends the state, whatever kind of call it was.
    resting   the model that was called is patched if the call was a training step; each other live model carries one
              pre-hook of its own, which runs once for a call of that model, and patches it when it trains.

What may have brought a new model arms again: a module that is put into a model which is not known (torch's hook on the
registration of modules, run only where modules are built), the first step of an optimizer that is not known (a model
that was unpickled registers nothing), the end of a patched model (its base may live on). Only torch's official hooks
are used, and all are gone at the end."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules import module as hooks
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastft.compat.torch_private import COMPILED_MODULE, REPLICA
from fastft.swapping.stock_only import transformed

WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": COMPILED_MODULE,
}  # class -> where its model is
MODEL = "model"
UNSEEN = "no training step of it went through the model's own call"
TRANSFORMED = "its training steps ran inside a transform of torch.func or a trace"
EVAL = "it was trained in eval mode; call model.train() first"


@dataclass(frozen=True)
class UnpatchedModel:
    """A model that trained and was not patched."""

    name: str
    reason: str


class OwnHook:
    """The pre-hook of one resting model. A deep copy of the model carries the same hook and is watched too; a pickled
    model carries a function that returns its second argument, which the standard library alone can load."""

    def __init__(self, called: Callable[[nn.Module, tuple], None]):
        self.called = called

    def __call__(self, module: nn.Module, args: tuple) -> None:
        if torch.is_grad_enabled():
            self.called(module, args)

    def __deepcopy__(self, memo) -> OwnHook:
        return self

    def __reduce__(self):
        return getattr, ({}, "get")


class PatchOnFirstStep:
    """Context in which every model that trains is patched. patch(model), then show(model); what one of them raises is
    told to `complain` in one line, and the model trains on. `seen` counts the models that were patched, `left()` names
    those that trained and were not."""

    def __init__(
        self,
        patch: Callable[[nn.Module], object],
        show: Callable[[nn.Module], None],
        complain: Callable[[str], None] = lambda line: None,
    ):
        self.patch, self.show, self.complain, self.seen = patch, show, complain, 0
        self._models: tuple[type, ...] = ()
        self._kinds: dict[type, str | None] = {}
        # roots whose patch was tried
        self._done: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
        self._wrappers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
        self._optimizers: weakref.WeakValueDictionary[int, torch.optim.Optimizer] = weakref.WeakValueDictionary()
        self._stepped: dict[int, weakref.ref] = {}  # id -> a parameter that an optimizer has stepped
        self._failed: list[UnpatchedModel] = []
        self._transformed: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
        # trained outside the context
        self._before: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()
        self._own = OwnHook(self.called)
        self._global, self._others, self._busy, self._over = None, [], False, False

    def __enter__(self) -> PatchOnFirstStep:
        from peft import PeftMixedModel, PeftModel
        from transformers import PreTrainedModel

        self._over, self._models = False, (PreTrainedModel, PeftModel, PeftMixedModel)
        self._others = [
            hooks.register_module_module_registration_hook(self._registered),
            register_optimizer_step_pre_hook(self._step),
        ]
        self._before.update((id(m), m) for m in self._live() if self._is_trained(m))
        self._arm()
        return self

    def __exit__(self, *_) -> None:
        self._over = True
        self._disarm()
        for handle in self._others:
            handle.remove()
        for model in [*self._live(), *self._wrappers.values()]:
            self._unhook(model)

    def left(self) -> list[UnpatchedModel]:
        """One entry for every model whose patch failed, and for every live one that trained unseen."""
        found, inside = list(self._failed), self._known()
        for model in outermost(self._live()):
            if id(model) in inside or id(model) in self._before:
                continue
            if id(model) in self._transformed:
                found.append(UnpatchedModel(type(model).__name__, TRANSFORMED))
            elif self._is_trained(model):
                found.append(UnpatchedModel(type(model).__name__, UNSEEN if model.training else EVAL))
        return found

    # What arms, and what ends it

    def _arm(self) -> None:
        if self._global is None and not self._over:  # a model may outlive the script
            self._global = hooks.register_module_forward_pre_hook(self.called)

    def _disarm(self) -> None:
        if self._global is not None:
            self._global.remove()
            self._global = None

    def _registered(self, parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if (kind := self._kind(type(parent))) is None or self._busy:
            return
        if kind == MODEL:
            if id(parent) not in self._done and not self._hooks_of(parent):
                self._arm()
        elif name == kind and child is not None and self._kind(type(child)) is not None:
            parent.register_forward_pre_hook(self._own)  # around the compiler and around replicas, not inside them
            self._wrappers[id(parent)] = parent
            if kind == COMPILED_MODULE:
                self._rest(self._live())  # torch warns of a global hook around a compiled model

    def _step(self, optimizer: torch.optim.Optimizer, args, kwargs) -> None:
        if self._optimizers.get(id(optimizer)) is not optimizer:
            self._optimizers[id(optimizer)] = optimizer
            self._stepped.update((id(p), weakref.ref(p)) for group in optimizer.param_groups for p in group["params"])
            self._arm()

    # A call

    def called(self, module: nn.Module, args: tuple) -> None:
        """The pre-hook, global or a model's own."""
        if (kind := self._kind(type(module))) is None or self._busy or self._over or torch.compiler.is_compiling():
            return
        model = module
        while kind not in (MODEL, None):
            model = getattr(model, kind)
            kind = self._kind(type(model))
        if kind is None or getattr(model, REPLICA, False):
            return
        self._busy = True
        try:
            if self._settle(model) and module is not model:
                self._unhook(module)
        finally:
            self._busy = False

    def _settle(self, model: nn.Module) -> bool:
        """Patch if this call is a training step. True where its model needs no more watching."""
        first = next((p for p in model.parameters() if p.requires_grad), None) if torch.is_grad_enabled() else None
        is_step = first is not None and (model.training or self._has_learnt(first))
        if is_step and transformed():
            self._transformed[id(model)], is_step = model, False
        if not is_step and self._global is None:
            return False
        live = self._live()  # a sweep over all objects: not at every call
        root = next((m for m in outermost(live) if any(x is model for x in m.modules())), model)
        if is_step and id(root) not in self._done:
            self._patch(root)
        self._rest(live)
        return id(root) in self._done

    def _patch(self, root: nn.Module) -> None:
        for model in root.modules():
            self._unhook(model)
            self._transformed.pop(id(model), None)
        self._done[id(root)] = root
        weakref.finalize(root, self._arm)
        self._disarm()  # the patch itself calls modules
        try:
            self.patch(root)
        except Exception as e:
            self._failed.append(
                UnpatchedModel(
                    type(root).__name__,
                    f"its patch raised {type(e).__name__}: {(str(e).splitlines() or [''])[0][:300]}",
                )
            )
            self.complain(f"{type(root).__name__} trains on as it is: {self._failed[-1].reason}")
            return
        self.seen += 1
        try:
            self.show(root)
        except Exception as e:
            self.complain(
                f"{type(root).__name__} is patched, but its report raised {type(e).__name__}: "
                f"{(str(e).splitlines() or [''])[0][:300]}"
            )

    def _rest(self, live: list[nn.Module]) -> None:
        """The global hook goes; every model that is not patched, nor part of one that is, watches itself."""
        inside = self._known()
        for model in live:
            if id(model) not in inside and not self._hooks_of(model):
                model.register_forward_pre_hook(self._own, prepend=True)
        self._disarm()

    # Which modules are models

    def _live(self) -> list[nn.Module]:
        """Every model that the interpreter holds. (By its type: isinstance would run the __class__ of any proxy.)"""
        found = [o for o in gc.get_objects() if issubclass(type(o), self._models)]
        return [m for m in found if "_forward_pre_hooks" in m.__dict__]  # not one that is being built

    def _known(self) -> set[int]:
        return {id(m) for root in self._done.values() for m in root.modules()}

    def _kind(self, cls: type) -> str | None:
        """MODEL; for a wrapper the attribute that holds its model; None for any other module. A look-up in a table for
        a class seen before."""
        if cls not in self._kinds:
            inner = next(
                (
                    WRAPPERS[c.__name__]
                    for c in cls.__mro__
                    if c.__name__ in WRAPPERS and c.__module__.startswith("torch.")
                ),
                None,
            )
            self._kinds[cls] = MODEL if issubclass(cls, self._models) else inner
        return self._kinds[cls]

    def _is_trained(self, model: nn.Module) -> bool:
        return any(p.requires_grad and self._has_learnt(p) for p in model.parameters())

    def _has_learnt(self, p: nn.Parameter) -> bool:
        return p.grad is not None or ((ref := self._stepped.get(id(p))) is not None and ref() is p)

    def _hooks_of(self, model: nn.Module) -> list[int]:
        return [key for key, hook in model._forward_pre_hooks.items() if hook is self._own]

    def _unhook(self, model: nn.Module) -> None:
        for key in self._hooks_of(model):
            del model._forward_pre_hooks[key]


def outermost(models: list[nn.Module]) -> list[nn.Module]:
    """Those that stand in no other of them."""
    within = {id(m) for model in models for m in model.modules() if m is not model}
    return [m for m in models if id(m) not in within]
