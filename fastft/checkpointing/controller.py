"""The policy at work: at each training forward of a stack of layers it says how each of them is run.

It stands in two hooks on the module that calls the layers. The first puts, for the length of that forward, a function
of its own in the place where transformers looks for the layers' checkpoint function; the second puts back what stood
there. So whatever a trainer does to the layers' switches and functions between two forwards (TRL turns them off and on
around generation) holds, is read afresh each time, and is there again afterwards; and a recomputation, which runs in
the backward, is not concerned."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from fastft.checkpointing.embedding_input import Embedded
from fastft.checkpointing.layer_runs import is_plain
from fastft.checkpointing.layer_stack import Stack, stacks
from fastft.checkpointing.policy import Policy
from fastft.checkpointing.policy_state import Controller
from fastft.checkpointing.retry import Attempt, can_be_guarded
from fastft.checkpointing.stack_forward import Forward, asked_for
from fastft.swapping.stock_only import transformed
from fastft.swapping.walk import modules_of


class BeginForward:
    """Forward pre-hook of a stack's owner: begins a forward under the policy. What a policy writes stands on the
    layers, where every thread sees it. So one thread at a time has its forwards under the policy; another one runs
    meanwhile under the trainer's own checkpointing, to the same bits."""

    def __init__(self, controller: Controller, stack: Stack):
        self.controller, self.stack = controller, stack
        self.lock = threading.Lock()
        self.running: dict[int, list[Forward | None]] = {}  # by thread
        self.held: list[Forward] = []  # ended, but other threads are still among the layers

    def __call__(self, module: nn.Module, args) -> None:
        if torch.compiler.is_compiling():
            return
        if module is not self.stack.owner():  # a replica that DataParallel made
            return
        training = module.training and torch.is_grad_enabled() and not _is_sharded(module) and not transformed()
        forward = Forward(self.controller, self.stack) if training else None
        me = threading.get_ident()
        with self.lock:
            if self.is_shared(me):
                forward = None
            self.running.setdefault(me, []).append(forward)
            if forward is not None:
                forward.begin()

    def is_shared(self, me: int) -> bool:
        """Is another thread inside the owner's forward?"""
        return bool(self.held) or any(thread != me for thread in self.running)

    def end(self) -> None:
        me = threading.get_ident()
        with self.lock:
            mine = self.running.get(me)
            if not mine:
                return
            if (forward := mine.pop()) is not None:
                forward.over()
                self.held.append(forward)
            if not mine:
                del self.running[me]
            if not any(thread != me for thread in self.running):
                for forward in reversed(self.held):
                    forward.end()
                self.held.clear()

    def __deepcopy__(self, memo) -> BeginForward:
        new = memo[id(self)] = BeginForward(copy.deepcopy(self.controller, memo), copy.deepcopy(self.stack, memo))
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back does nothing, and needs the standard library alone."""
        return getattr, (contextlib.nullcontext(), "__exit__")


class EndForward:
    """Forward hook of a stack's owner: ends the forward, after an exception too."""

    def __init__(self, begin: BeginForward):
        self.begin = begin

    def __call__(self, module: nn.Module, args, output) -> None:
        if not torch.compiler.is_compiling() and module is self.begin.stack.owner():
            self.begin.end()

    def __deepcopy__(self, memo) -> EndForward:
        new = memo[id(self)] = EndForward(copy.deepcopy(self.begin, memo))
        return new

    __reduce__ = BeginForward.__reduce__


def _is_sharded(module: nn.Module) -> bool:
    """Are the parameters sharded by DeepSpeed? It gathers them by hooks that all ranks must reach alike, so the
    trainer's own checkpointing stays. It shards all parameters of a model or none: the first one is asked."""
    first = next(module.parameters(), None)
    return first is not None and hasattr(first, "ds_id")


def _input_embeddings(base: Any) -> nn.Module | None:
    """The model's input embedding; None where it has none, or does not say (transformers' own method then raises)."""
    try:
        return base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    except NotImplementedError:
        return None


def control(base: nn.Module, policy: Policy) -> Controller:
    """Put the model's layers under the policy, in place of an earlier one."""
    release(base)
    controller = Controller(weakref.ref(base), policy, stacks(base))
    if not controller.stacks:
        return controller
    if isinstance(embeddings := _input_embeddings(base), nn.Module):
        controller.embedded = Embedded()
        embeddings.register_forward_hook(controller.embedded, prepend=True)
    for stack in controller.stacks:
        owner, begin = stack.owner(), BeginForward(controller, stack)
        assert owner is not None
        owner.register_forward_pre_hook(begin)
        owner.register_forward_hook(EndForward(begin), always_call=True)
    main = max(controller.stacks, key=lambda s: s.share).owner()
    if policy.mode == "auto" and main is not None and "forward" not in main.__dict__ and torch.cuda.device_count() <= 1:
        main.__dict__["forward"] = RetryingForward(main)  # several devices: DataParallel would share it
    return controller


class RetryingForward:
    """The forward of an instance until one backward has passed: of a stack's owner, which it knows weakly."""

    def __init__(self, owner: nn.Module):
        self.owner, self.__signature__ = weakref.ref(owner), inspect.signature(owner.forward)

    def __call__(self, *args, **kwargs):
        owner = self.owner()
        assert owner is not None
        if torch.compiler.is_compiling():
            return type(owner).forward(owner, *args, **kwargs)
        call = functools.partial(type(owner).forward, owner, *args, **kwargs)
        begin = next((h for h in owner._forward_pre_hooks.values() if isinstance(h, BeginForward)), None)
        if begin is None or begin.controller.passed:
            _unguard(owner)
            return call()
        learning = [p for p in owner.parameters() if p.requires_grad]
        theirs = [f for layer in begin.stack.alive() if (f := asked_for(layer)) is not None]
        # a reentrant one runs backwards of its own
        if not can_be_guarded(owner, learning, args, kwargs) or not all(map(is_plain, theirs)):
            return call()
        if begin.is_shared(threading.get_ident()):
            return call()
        return Attempt(begin.controller, begin.stack, owner, call, learning)()

    def __deepcopy__(self, memo) -> RetryingForward:
        new = memo[id(self)] = RetryingForward.__new__(RetryingForward)
        new.owner, new.__signature__ = weakref.ref(copy.deepcopy(self.owner(), memo)), self.__signature__
        return new

    def __reduce__(self):
        """A pickled model is a stock model: what comes back is the class's own forward."""
        return getattr, (self.owner(), "forward")


def _unguard(owner: nn.Module) -> None:
    if isinstance(owner.__dict__.get("forward"), RetryingForward):
        del owner.__dict__["forward"]


def controller_of(base: nn.Module) -> Controller | None:
    """The controller of a patched model; None where it has none."""
    return next((hook.controller for _, _, hook in _hooks(base) if isinstance(hook, BeginForward)), None)


def release(base: nn.Module) -> None:
    """Undo `control` exactly."""
    for module in modules_of(base):
        if "forward" in module.__dict__:
            _unguard(module)
    for hooks, key, _ in list(_hooks(base)):
        owner, table = hooks
        del table[key]
        owner._forward_hooks_always_called.pop(key, None)


def _hooks(base: nn.Module) -> Iterator[tuple[tuple[nn.Module, dict], int, object]]:
    for module in modules_of(base):
        for table in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(table.items()) if table else ():
                if isinstance(hook, (BeginForward, EndForward, Embedded)):
                    yield (module, table), key, hook
