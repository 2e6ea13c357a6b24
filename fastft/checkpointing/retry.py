"""Out of memory in a first step: the policy is lowered, and the step's forward is run again with the same random state.

Until one backward has passed, the forward of the module that calls the layers is one node of the autograd graph, with
the trainable parameters as its inputs: it runs the module in a graph of its own, and its backward differentiates that
graph. So both can be tried again with more recomputation when they run out of memory: nothing has been added to a
gradient yet, the random streams are set back, and what comes out is, bit for bit, what a larger device would have
given. The LM head, which comes after, may ask for the graph's memory (`swapping/release_memory.py`). After that
backward the node is gone, and the policy stays."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastft.checkpointing.foreign_hooks import has_foreign_hooks
from fastft.checkpointing.layer_stack import Stack
from fastft.checkpointing.stack_forward import Forward
from fastft.compat.torch_private import tree_flatten, tree_leaves, tree_unflatten
from fastft.swapping.release_memory import GIVERS
from fastft.swapping.stock_only import transformed


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, attempt: Attempt, *learning: torch.Tensor):
        ctx.attempt = attempt
        with torch.enable_grad():
            attempt.forward()
        return tuple(t.detach() for t in attempt.results())

    @staticmethod
    def backward(ctx, *grads):
        return None, *ctx.attempt.backward(grads)


class Attempt:
    """One guarded call of a stack's owner. call() is its own forward; learning: its trainable parameters. is_shared: a
    hook may have handed on tensors of the inner graph, from which a second loss is computed."""

    def __init__(
        self, controller: Any, stack: Stack, owner: nn.Module, call: Callable[[], Any], learning: list[nn.Parameter]
    ):
        self.controller, self.stack, self.call, self.learning = controller, stack, call, learning
        self.state = _Randomness(p.device for p in learning)
        self.autocast = _autocast(p.device.type for p in learning)
        self.is_shared = has_foreign_hooks(owner)
        self.leaves: list | None = None  # of the output
        self.spec: Any = None
        GIVERS.add(self)

    def results(self) -> list[torch.Tensor]:
        """The output's tensors that have a gradient."""
        assert self.leaves is not None
        return [t for t in self.leaves if isinstance(t, torch.Tensor) and t.requires_grad]

    def output(self, results: tuple[torch.Tensor, ...]):
        """The owner's output, with `results` in the place of its tensors that have a gradient."""
        assert self.leaves is not None
        new = iter(results)
        return tree_unflatten(
            [next(new) if isinstance(t, torch.Tensor) and t.requires_grad else t for t in self.leaves], self.spec
        )

    def _once(self) -> None:
        forward = Forward(self.controller, self.stack)
        forward.begin()
        try:
            self.leaves, self.spec = tree_flatten(self.call())
        finally:
            forward.end()

    def _lower(self, error: torch.OutOfMemoryError) -> bool:
        lowered = self.controller.lower()
        if lowered is None:
            return False
        self.leaves = None
        warnings.warn(
            f"fastft: out of memory in the first step ({str(error).splitlines()[0] if str(error) else 'no details'}); "
            "the activation policy is "
            f"lowered to {lowered!r}, for later steps too, and the step is run again from its start with the same "
            "random state",
            stacklevel=3,
        )
        return True

    def give(self, error: torch.OutOfMemoryError) -> bool:
        """Free the inner graph, as something after it is out of memory; the backward runs the forward again."""
        return self.leaves is not None and not self.controller.passed and self._lower(error)

    def _until_it_fits(self, body: Callable[[], Any]) -> Any:
        """body(), again with a lower policy when it is out of memory, as long as there is one."""
        while True:
            try:
                return body()
            except torch.OutOfMemoryError as e:
                if not self._lower(e):
                    raise
            if torch.accelerator.is_available():
                torch.accelerator.empty_cache()

    def forward(self) -> None:
        def body() -> None:
            self.state.set()
            self._once()

        self._until_it_fits(body)

    def backward(self, grads: tuple[torch.Tensor | None, ...]) -> list[torch.Tensor | None]:
        """The gradients of `learning`."""

        def body() -> list[torch.Tensor | None]:
            if self.leaves is None:  # given up to make room, or used by a backward before this one
                with self.state.for_a_while(), torch.enable_grad(), self.autocast():
                    self._once()
            wanted = [(t, g) for t, g in zip(self.results(), grads) if g is not None]
            if not wanted:
                return [None] * len(self.learning)
            outputs, upstream = [t for t, _ in wanted], [g for _, g in wanted]
            self.leaves = None
            # gradients that are to be differentiated: the inner graph stands on the same parameters
            twice = torch.is_grad_enabled()
            keep = self.is_shared or twice
            return list(
                torch.autograd.grad(
                    outputs, self.learning, upstream, allow_unused=True, retain_graph=keep, create_graph=twice
                )
            )

        try:
            found = self._until_it_fits(body)
        except RuntimeError as e:
            if not self.is_shared or "a second time" not in str(e):
                raise
            found = self._until_it_fits(body)  # the other loss has been through the inner graph, and has used it up
        self.controller.passed = True
        return found

    def __call__(self):
        """The owner's output, by way of the node."""
        return self.output(_Step.apply(self, *self.learning))


class _Randomness:
    """The random states of the CPU and of the accelerators at hand, as they were when this was made."""

    def __init__(self, devices) -> None:
        self.devices = sorted({d for d in devices if d.type in ("cuda", "xpu")}, key=str)
        self.states = self._now()

    def _now(self) -> list[torch.Tensor]:
        return [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self.devices)]

    def _set(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        for d, s in zip(self.devices, states[1:]):
            torch.get_device_module(d).set_rng_state(s, d)

    def set(self) -> None:
        self._set(self.states)

    @contextlib.contextmanager
    def for_a_while(self):
        """Set the states that were noted, inside; afterwards the present ones again."""
        now = self._now()
        self.set()
        try:
            yield
        finally:
            self._set(now)


def _autocast(kinds) -> Callable[[], contextlib.AbstractContextManager]:
    """Makes the context of autocast that is in force now, for another thread."""
    cached = torch.is_autocast_cache_enabled()
    settings = [(k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in sorted({"cpu", *kinds})]

    def context() -> contextlib.ExitStack:
        stack = contextlib.ExitStack()
        for kind, enabled, dtype in settings:
            stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
        return stack

    return context


def can_be_guarded(owner: nn.Module, learning: list[nn.Parameter], args: tuple, kwargs: dict) -> bool:
    """A training forward of one process, from data that want no gradient, with parameters whose gradients nobody
    changes on the way."""
    if torch.compiler.is_compiling() or transformed() or not (owner.training and torch.is_grad_enabled() and learning):
        return False
    if (
        torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    ):
        return False
    if any(isinstance(t, torch.Tensor) and t.requires_grad for t in tree_leaves((args, kwargs))):
        return False
    return all(
        type(p) in (torch.Tensor, nn.Parameter) and not hasattr(p, "ds_id") and not p._backward_hooks for p in learning
    )
