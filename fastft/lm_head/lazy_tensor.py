"""Tensors that stand for a value which is computed when something needs it: the machinery under lazy logits.

A `LazyTensor` is a wrapper tensor without memory. Its `Node` records the call that stock would have made (function,
arguments, autocast, grad mode), so that `value()` is stock's own result: the same operations in the same order. What
the value *means*, the subclasses know, and answer some calls without it (`answers`). Everything else happens to the
value; so does what is made of a lazy tensor that an autograd function returned, which has a backward of its own.

Python code reaches `__torch_function__`. C++ code that walks through a module's outputs (DDP's search for used
parameters) finds a wrapper with a grad_fn that leads to the head's input and parameters (`lazy_graph`)."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge

from fastft.compat.torch_private import (
    TENSOR_METHODS,
    TENSOR_PROPERTIES,
    is_ddp_sink,
    tree_leaves,
    tree_map_only,
    without_memory,
    without_overrides,
)
from fastft.lm_head.lazy_graph import Connect, RecordedCalls, RecordedValue, alias, shortcut, through
from fastft.lm_head.product import Family, autocast_as, autocast_state

T = torch.Tensor
_SIZES = ("shape", "dtype", "device", "ndim", "layout", "names", "itemsize", "nbytes")
_KINDS = ("is_cuda", "is_cpu", "is_xpu", "is_mps", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn")
_PROPERTIES = (*_SIZES, *_KINDS, "is_xla", *TENSOR_PROPERTIES)
_METHODS = ("size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex")
_METHODS += ("__len__", "get_device", "stride", "is_contiguous", "is_inference", *TENSOR_METHODS)
ASKS = {getattr(T, n).__get__ for n in _PROPERTIES if hasattr(T, n)} | {
    getattr(T, n) for n in _METHODS if hasattr(T, n)
}
ASKS |= {torch.numel, torch.is_floating_point, torch.is_complex}

_SETTERS = {
    "__setitem__",
    "__set__",
    "__iadd__",
    "__isub__",
    "__imul__",
    "__idiv__",
    "__itruediv__",
    "__ipow__",
    "__delete__",
}


def _writes(func: Callable, kwargs: dict) -> bool:
    name = getattr(func, "__name__", "")
    return name in _SETTERS or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None


class Node:
    """One recorded call. meaning: what its value stands for, in the terms of the subclass.
    alone    computes the value without the nodes that it was made from; None: only the recorded call does
    big      the value is as large as the logits
    view     the value may share its input's memory
    apart    a clone made inside an autograd function: its place in the graph is known later (`settle_apart`)
    made     the value was computed
    spare    it was, and nobody has asked for it yet: it is there for when the head's weight has changed
    behind   of an unpadded forward: who reads its logits gets a second forward's (`packing/padded_rerun.py`)"""

    def __init__(
        self,
        func: Callable,
        args: tuple,
        kwargs: dict,
        family: Family,
        meaning,
        alone: Callable[[], torch.Tensor] | None,
        big: bool,
    ):
        strip = lambda d: d.node
        self.func, self.family, self.meaning, self.alone, self.big = func, family, meaning, alone, big
        self.args, self.kwargs = tree_map_only(LazyTensor, strip, args), tree_map_only(LazyTensor, strip, kwargs)
        self.before = [x for x in tree_leaves((self.args, self.kwargs)) if isinstance(x, Node)]
        self.grad = torch.is_grad_enabled()
        self.autocast = autocast_state(family.hidden.device)
        self.made = self.apart = self.view = self.spare = self.behind = False
        self.kept: torch.Tensor | None = None
        self.own_local: RecordedValue | None = None
        self.wrapper: Callable[[], LazyTensor | None] = lambda: None
        self.connect: Callable[[], Any] = lambda: None
        self.hooks: dict | None = None
        self.wanted = 0
        self.wait_with([family])

    def wait_with(self, families: Iterable[Family]) -> None:
        """Whoever writes to logits of these families has this value made first."""
        for family in families:
            family.waiting = [r for r in family.waiting if (n := r()) is not None and n is not self]
            family.waiting.append(weakref.ref(self))

    def root(self) -> Node:
        """The result by token whose memory this is a view of."""
        return self.before[0].root() if self.view and not self.big else self

    def descends_from(self, other: Node) -> bool:
        return self is other or any(n.descends_from(other) for n in self.before)

    def settled(self) -> bool:
        """Does the value exist, or that of a node it is made from (which may have been written to since)?"""
        return (self.made and not (self.spare and self.family.unchanged())) or any(n.settled() for n in self.before)

    def watched(self) -> bool:
        """Does somebody watch the gradient of this lazy tensor, or of one that it is made from?"""
        with without_overrides():
            return any(n.watched_itself() for n in self.line())

    def line(self) -> Iterator[Node]:
        yield self
        for n in self.before:
            yield from n.line()

    def watched_itself(self) -> bool:
        if self.hooks or self.wanted:
            return True
        lazy = self.wrapper()
        return lazy is not None and (lazy.retains_grad or self._foreign_itself(lazy))

    def foreign(self) -> bool:
        """Was this lazy tensor, or one that it is made from, returned by an autograd function, or made a leaf?"""
        with without_overrides():
            return any((lazy := n.wrapper()) is not None and n._foreign_itself(lazy) for n in self.line())

    def _foreign_itself(self, lazy: LazyTensor) -> bool:
        own = self.connect()
        return lazy.grad_fn is not own or (own is None and lazy.requires_grad)

    def anchor(self) -> None:
        """The graph keeps what is recorded: a gradient may come when no lazy tensor is left."""
        for n in self.line():
            if (own := n.connect()) is not None and not n.apart and own.local is None:
                own.keep = n

    def before_the_head_learns(self) -> None:
        """What a caller still holds is the state before the step: with a trained head it is made now, at stock's
        cost."""
        for family in {id(n.family): n.family for n in self.line()}.values():
            if family.trained:
                new = [node for node in family.alive() if not node.made and not node.behind]
                for node in new:
                    if node.wrapper() is not None:
                        node.value("a caller who keeps the output of a trained head")
                for node in new:
                    # a checkpoint that runs its part again in this backward finds what it found before
                    node.spare = node.made

    def value(self, why: str = "", in_place: bool = False) -> torch.Tensor:
        """The value, by stock's own operations; computed once. in_place: it is about to be written to, so views must be
        stock's views."""
        lazy, self.spare = self.wrapper(), False
        known = self.kept if lazy is None else lazy.made
        if known is None:
            known = self._make(lazy, why, in_place)
            if lazy is not None:
                lazy.made = known
            if lazy is None or not known.requires_grad:
                self.kept = known
        return known

    def _make(self, lazy: LazyTensor | None, why: str, in_place: bool) -> torch.Tensor:
        settled = self.settled()
        self._check(settled, why)
        self.made = True
        if self.alone is not None and not settled and not (in_place and (self.big or self.view)) and not self.foreign():
            with torch.set_grad_enabled(self.grad), autocast_as(self.autocast):
                value = self.alone()
            return lazy.hang(shortcut(value, self, lazy)) if lazy is not None and value.requires_grad else value
        watched = lazy is not None and self.watched()
        if in_place and self.view and not watched:
            self.anchor()
            with torch.set_grad_enabled(self.grad), autocast_as(self.autocast):
                return self._call(lambda n: n.value(why, in_place))
        value = self.local(why).raw
        if lazy is None or not lazy.has_grad:
            return value
        self.anchor()
        return lazy.hang(through(value, lazy))

    def local(self, why: str) -> RecordedValue:
        """The value, and how to differentiate it by what this call was given."""
        if self.own_local is None:
            self._check(self.settled(), why)
            edges, root = [], not self.before

            def fill(x):
                x = x.value(why) if isinstance(x, Node) else x
                own = self.grad and x.requires_grad
                x = alias(x) if own else x
                edges.append(get_gradient_edge(x) if own else None)
                return x

            with self.family.gathered(), torch.set_grad_enabled(self.grad), autocast_as(self.autocast):
                local = RecordedValue(self._call(fill, T if root else Node), edges)
            if not self.grad:
                return local
            self.own_local = local
            if (own := self.connect()) is not None and not self.apart:
                own.local, own.keep = local, None
        return self.own_local

    def _call(self, fill: Callable, kind: type | None = None) -> torch.Tensor:
        args, kwargs = tree_map_only(kind or Node, fill, (self.args, self.kwargs))
        return self.func(*args, **kwargs)

    def _check(self, settled: bool, why: str) -> None:
        if self.big and not settled:
            self.family.check()
            self.family.count(why)

    def become_a_view(self) -> None:
        """Its memory is its input's, which is about to be written to: what is made of it from now on must know of
        that."""
        lazy = self.wrapper()
        if lazy is not None and self.view and lazy.hangs and not self.watched():
            with torch.set_grad_enabled(self.grad), autocast_as(self.autocast):
                lazy.made, lazy.stands = self._call(lambda n: n.value()), None


class LazyTensor(torch.Tensor):
    """Root of the kinds of lazy tensors. `node`: its `Node`; `made`: its value, once there is one. A subclass's
    `answers` maps functions to handlers (args, kwargs) -> result or NotImplemented; `on_the_graph` does for what
    concerns autograd alone."""

    answers: dict[Callable, Callable] = {}
    on_the_graph: dict[Callable, Callable] = {}  # those of `lazy_autograd`
    node: Node
    made: torch.Tensor | None = None
    stands: object = None  # the graph's node by which `made` hangs on this wrapper
    uses: tuple[RecordedCalls, ...] = ()

    @classmethod
    def make(cls, node: Node, shape: Iterable[int], dtype: torch.dtype, call: tuple) -> Any:
        """call: (func, args, kwargs), with the lazy tensors themselves."""
        leaves = tree_leaves(call[1:])
        before = [x for x in leaves if isinstance(x, LazyTensor)]
        inputs = before or [x for x in leaves if isinstance(x, T)]
        shape, device = tuple(shape), node.family.hidden.device

        def wrapper() -> LazyTensor:
            return without_memory(cls, shape, dtype, device)

        with without_overrides():
            if torch.is_grad_enabled() and any(t.requires_grad for t in inputs):
                out = Connect.apply(wrapper, node, *inputs)
                node.connect = weakref.ref(out.grad_fn)
            else:
                out = wrapper()
        out.node, node.wrapper = node, weakref.ref(out)
        out.uses = tuple({id(u): u for d in before for u in d.uses}.values()) or (RecordedCalls(),)
        return out

    @property
    def has_grad(self) -> bool:
        with without_overrides():
            return self.requires_grad

    def hang(self, value: torch.Tensor) -> torch.Tensor:
        self.stands = value.grad_fn
        return value

    @property
    def hangs(self) -> bool:
        """Is the value the one that hangs on this wrapper (it was not written to since)? Or is there none yet?"""
        return self.made is None or (self.stands is not None and self.made.grad_fn is self.stands)

    def settle_apart(self) -> None:
        """Decide the meaning of a clone that was made, without a graph, inside an autograd function: its grad_fn names
        the function once that has ended. DDP's hands on every gradient, absent ones too, so such a clone keeps its
        meaning and its place in the graph."""
        node = self.node
        with without_overrides():
            grad_fn = self.grad_fn
        if grad_fn is not None and is_ddp_sink(grad_fn):
            node.connect = weakref.ref(grad_fn)
        else:
            node.apart = False
            product, *rest = node.meaning
            node.meaning = (product.detached(), *rest)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is T.__hash__:
            return id(args[0])
        if func in cls.on_the_graph and (out := cls.on_the_graph[func](args, kwargs)) is not NotImplemented:
            return out
        lazy = _lazy(args) or _lazy(tuple(kwargs.values()))
        if func in ASKS:
            known = args[0].made if isinstance(args[0], LazyTensor) else None
            with without_overrides():
                return func(*args, **kwargs) if known is None else func(known, *args[1:], **kwargs)
        for d in lazy:
            if d.node.apart and d.node.connect() is None:
                d.settle_apart()
            # perhaps inside an autograd function, whose backward gives d its gradient
            if not torch.is_grad_enabled() and d.has_grad:
                d.node.anchor()
        if not any(d.node.settled() or d.node.foreign() for d in lazy):
            for kind in {type(d) for d in lazy}:
                if func in kind.answers and (out := kind.answers[func](args, kwargs)) is not NotImplemented:
                    return out
        name = getattr(func, "__name__", str(func))
        if _writes(func, kwargs):
            _before_writing([x for x in (*args[:1], kwargs.get("out")) if isinstance(x, LazyTensor)], name)
        args, kwargs = tree_map_only(LazyTensor, lambda d: d.node.value(name), (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Below autograd: what did not come through Python. The value is made above it, with its graph."""

        def value(d: LazyTensor) -> torch.Tensor:
            with torch.overrides.enable_reentrant_dispatch():
                return d.node.value(func.__name__).detach()

        args, kwargs = tree_map_only(LazyTensor, value, (args, kwargs or {}))
        return func(*args, **kwargs)


class GraphPlaceholder(LazyTensor):
    """The place in the graph of a result that was computed without the logits; nobody holds it."""


def answered(fast: torch.Tensor, family: Family, call: tuple) -> torch.Tensor:
    """fast: the result of call = (func, args, kwargs), computed without the logits."""
    if not fast.requires_grad:
        return fast
    node = Node(call[0], call[1], call[2], family, None, None, False)
    node.made = True
    return shortcut(fast, node, GraphPlaceholder.make(node, fast.shape, fast.dtype, call))


def _before_writing(targets: list[LazyTensor], name: str) -> None:
    """Values that do not exist yet and are not views of the target must be those from before."""
    for target in targets:
        if target.node.watched():  # the gradients of earlier results will ask for the logits as they were
            for uses in target.uses:
                for node in list(uses.nodes.values()):
                    node.local(name)
        root = target.node.root()
        for node in root.family.alive():
            if root.big or node.descends_from(root):
                if node.made:
                    node.spare = False
                    node.become_a_view()
                else:
                    node.value(name, in_place=True)


def _lazy(x) -> list[LazyTensor]:
    if isinstance(x, LazyTensor):
        return [x]
    return [d for v in x for d in _lazy(v)] if isinstance(x, (tuple, list)) else []


def is_last(dim: int, x: torch.Tensor) -> bool:
    """Does `dim` name the last dimension of x?"""
    return dim in (-1, x.dim() - 1)


def argument(args: tuple, kwargs: dict, i: int, name: str, default: Any = None) -> Any:
    """The argument at position i, or by its name, of a call."""
    return args[i] if len(args) > i else kwargs.get(name, default)
