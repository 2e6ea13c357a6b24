"""Where lazy tensors stand in autograd's graph.

Every lazy tensor is the output of a `Connect` node: the call that stock would have made, with edges to what stock's
would lead to (the logits' to hidden, weight and bias; those of `logits.float()` to the logits). So hooks, retain_grad,
autograd.grad(loss, logits) and functions that somebody wraps around lazy tensors find the graph that stock has, and a
gradient that arrives there takes stock's way.

A value that is made of a lazy tensor (`through`) hangs on its Connect node, whatever happens to that node before or
afterwards. A result that is computed without the logits (`shortcut`) has two edges: one to the fused function, which
knows hidden, weight and bias, and one to a Connect node. Its backward takes the first; or, where somebody watches a
lazy tensor in between, the second: the logits are then made, and their gradient, by stock's operations. With a trained
head it also makes the lazy tensors that are still referenced, before the head learns.

Nothing here keeps the head's input alive: the nodes of the graph refer weakly to what was recorded (the lazy tensors
own it), until somebody watches, or a value was made."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.autograd.graph import GradientEdge

from fastft.compat.torch_private import will_run

Node = LazyTensor = Any  # those of `lazy_tensor`, which builds on this


class RecordedValue(NamedTuple):
    """The value of one recorded call, made by stock's function of copies without memory of its inputs. edges: of these
    copies, None where an input has no gradient."""

    raw: torch.Tensor
    edges: Sequence[GradientEdge | None]

    def gradients(self, g: torch.Tensor, wanted: Sequence[bool]) -> list[torch.Tensor | None]:
        edges = [e for e, want in zip(self.edges, wanted) if want and e is not None]
        if not edges or not self.raw.requires_grad:
            return [None] * len(wanted)
        second = torch.is_grad_enabled()
        found = iter(torch.autograd.grad(self.raw, edges, g, retain_graph=True, create_graph=second, allow_unused=True))
        return [next(found) if want and e is not None else None for e, want in zip(self.edges, wanted)]


class _Alias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.detach()

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        return g


def alias(x: torch.Tensor) -> torch.Tensor:
    """x, in x's memory, but no view of it to autograd: what is made of it keeps its history when x is written to."""
    return _Alias.apply(x)


class Connect(torch.autograd.Function):
    """A lazy tensor, as a function of what stock makes it of. On ctx, no tensors but through `keep` (the Node) and
    `local`."""

    @staticmethod
    def forward(ctx, make: Callable[[], torch.Tensor], node: Node, *inputs):
        ctx.set_materialize_grads(False)
        ctx.node, ctx.keep, ctx.local, ctx.counts = weakref.ref(node), None, None, None
        return make()

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        wanted = ctx.needs_input_grad[2:]
        if g is None or not any(wanted):
            return (None,) * (2 + len(wanted))
        g = g if ctx.counts is None else ctx.counts(g)
        node = ctx.node()
        local = ctx.local or node.local("a gradient of the logits")
        if node is not None:
            node.before_the_head_learns()
        return None, None, *local.gradients(g, wanted)


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, lazy):
        return value.detach()

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        return None, g


def through(value: torch.Tensor, lazy: LazyTensor) -> torch.Tensor:
    """value, without its own history: its gradient goes to `lazy`."""
    with torch.enable_grad():
        return _Through.apply(value.detach(), lazy)


class CallReference:
    """What a shortcut knows of the recorded call: weakly as long as nobody watches. `keep`: the same, strongly."""

    __slots__ = ("__weakref__", "keep", "node")

    def __init__(self, node: Node):
        self.node, self.keep = weakref.ref(node), None


class RecordedCalls:
    """The recorded calls of the results that were computed without the logits. Lazy tensors own it, and all that come
    of one call of the head share it; an entry lives as long as the result's graph does."""

    def __init__(self):
        self.nodes: weakref.WeakKeyDictionary[CallReference, Node] = weakref.WeakKeyDictionary()
        self.watched = False

    def add(self, ticket: CallReference, node: Node) -> None:
        self.nodes[ticket] = node
        if self.watched:
            self.hold(ticket, node)

    def hold(self, ticket: CallReference, node: Node) -> None:
        ticket.keep = node
        node.anchor()

    def watch(self) -> None:
        """From now on the graph itself keeps what was recorded: a hook stays when the lazy tensor that it was put on is
        gone."""
        self.watched = True
        for ticket, node in list(self.nodes.items()):
            self.hold(ticket, node)


class _Shortcut(torch.autograd.Function):
    @staticmethod
    def forward(ctx, fast, lazy, ticket: CallReference):
        ctx.set_materialize_grads(False)
        ctx.ticket = ticket
        return fast.detach()

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        node = ctx.ticket.node()
        if g is None or node is None:
            return g, None, None
        node.before_the_head_learns()
        fast, lazy = ctx.next_functions
        return (None, g, None) if node.watched() or (runs(lazy[0]) and not runs(fast[0])) else (g, None, None)


def runs(grad_fn) -> bool:
    """Will this backward (torch.autograd.grad asks for a part of the graph only) come to that node?"""
    try:
        return will_run(grad_fn)
    except RuntimeError:  # a leaf whose gradient is asked for
        return True


def shortcut(fast: torch.Tensor, node: Node, lazy: LazyTensor) -> torch.Tensor:
    """fast: the value of `lazy`, computed without the logits; connected to both."""
    ticket = CallReference(node)
    for uses in lazy.uses:
        uses.add(ticket, node)
    if fast.grad_fn is not None:
        for hook in node.family.before_backward:
            fast.grad_fn.register_prehook(functools.partial(_call, hook))
    with torch.enable_grad():
        return _Shortcut.apply(fast, lazy, ticket)


def _call(hook: Callable[[torch.Tensor | None], object], grads: tuple[torch.Tensor | None, ...]) -> None:
    hook(grads[0])
