"""Tensors that stand for a value which is computed when something needs it: the machinery under deferred logits.

A `Deferred` is a wrapper tensor without memory. Its `Node` records the call that stock would have made (function, arguments, autocast, grad
mode), so that `value()` is stock's own result: the same operations in the same order with the same graph. What the value *means*, the
subclasses know, and answer some calls without it (`answers`). Everything else happens to the value.

Python code reaches `__torch_function__`. C++ code that walks through a module's outputs (DDP's search for used parameters) finds a wrapper
with a grad_fn that leads to the head's input and parameters; a gradient that arrives there is passed on through the value.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable

import torch
from torch.utils._pytree import tree_map_only

from fastft.swaps.head_product import Family, Product, autocast_as, autocast_state

T = torch.Tensor
_PROPERTIES = (
    "shape", "dtype", "device", "requires_grad", "ndim", "is_leaf", "layout", "grad_fn", "grad", "is_cuda", "is_cpu", "is_xpu", "is_mps",
    "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn", "is_xla", "names", "output_nr", "itemsize", "nbytes", "_version",
)  # fmt: skip
_METHODS = (
    "size", "dim", "ndimension", "numel", "nelement", "element_size", "is_floating_point", "is_complex", "__len__", "get_device", "__hash__",
    "stride", "is_contiguous", "is_inference",
)  # fmt: skip
ASKS = {getattr(T, n).__get__ for n in _PROPERTIES if hasattr(T, n)} | {getattr(T, n) for n in _METHODS if hasattr(T, n)}
ASKS |= {torch.numel, torch.is_floating_point, torch.is_complex}

_SETTERS = {"__setitem__", "__set__", "__iadd__", "__isub__", "__imul__", "__idiv__", "__itruediv__", "__ipow__", "__delete__"}


def _writes(func: Callable, kwargs: dict) -> bool:
    name = getattr(func, "__name__", "")
    return name in _SETTERS or (name.endswith("_") and not name.endswith("__")) or kwargs.get("out") is not None


class Node:
    """One recorded call. meaning: what the subclass knows of it. `alone`: how to get the value without the nodes it was made from.
    big: it is of the logits' size. view: a result by token in another shape. apart: cloned without a graph (see `_adopt`)."""

    def __init__(self, func: Callable, args: tuple, kwargs: dict, family: Family, meaning, alone: Callable[[], torch.Tensor] | None, big: bool):
        strip = lambda d: d.node
        self.func, self.family, self.meaning, self.alone, self.big = func, family, meaning, alone, big
        self.args, self.kwargs = tree_map_only(Deferred, strip, args), tree_map_only(Deferred, strip, kwargs)
        self.before = list(_nodes(self.args))
        self.grad = torch.is_grad_enabled()
        self.autocast = autocast_state(family.hidden.device)
        self.cached: torch.Tensor | None = None
        self.apart = self.view = False
        self.token: torch.Tensor | None = None
        self.wait_with([family])

    def wait_with(self, families: Iterable[Family]) -> None:
        """Whoever writes to logits of these families has this value made first."""
        for family in families:
            family.waiting = [r for r in family.waiting if (n := r()) is not None and n.cached is None and n is not self]
            family.waiting.append(weakref.ref(self))

    def root(self) -> Node:
        """The result by token whose memory this is a view of."""
        return self.before[0].root() if self.view else self

    def descends_from(self, other: Node) -> bool:
        return self is other or any(n.descends_from(other) for n in self.before)

    def settled(self) -> bool:
        """Does the value exist, or that of a node it is made from (which may have been written to since)?"""
        return self.cached is not None or any(n.settled() for n in self.before)

    def value(self, why: str = "", in_place: bool = False) -> torch.Tensor:
        """in_place: someone is about to write, so views must be stock's views."""
        if self.cached is None:
            settled = self.settled()
            if self.big and not settled:
                self.family.check()
                self.family.count(why)
            with torch.set_grad_enabled(self.grad), autocast_as(self.autocast):
                if self.alone is not None and not settled and not (in_place and (self.big or self.view)):
                    self.cached = self.alone()
                else:
                    args, kwargs = tree_map_only(Node, lambda n: n.value(why, in_place), (self.args, self.kwargs))
                    self.cached = self.func(*args, **kwargs)
            if self.token is not None:
                self.cached = Tie.apply(self.cached.detach(), self.token, True)
        return self.cached


def _nodes(x) -> list[Node]:
    if isinstance(x, Node):
        return [x]
    return [n for v in x for n in _nodes(v)] if isinstance(x, (tuple, list)) else []


class _Connect(torch.autograd.Function):
    """The wrapper, as a function of what its value is computed from."""

    @staticmethod
    def forward(ctx, make: Callable[[], torch.Tensor], node: Node, *inputs):
        ctx.set_materialize_grads(False)
        ctx.node, ctx.inputs = node, inputs
        return make()

    @staticmethod
    def backward(ctx, g):
        if g is None:
            return (None,) * (2 + len(ctx.inputs))
        wanted = [t for t, need in zip(ctx.inputs, ctx.needs_input_grad[2:]) if need]
        value = ctx.node.value("a gradient from outside")
        found = iter(torch.autograd.grad(value, wanted, g, retain_graph=True, allow_unused=True))
        return None, None, *(next(found) if need else None for need in ctx.needs_input_grad[2:])


class Token(torch.autograd.Function):
    """A tensor of the wrapper's shape without memory, and an edge to the wrapper's graph."""

    @staticmethod
    def forward(ctx, wrapper):
        ctx.set_materialize_grads(False)
        return torch.zeros((), dtype=wrapper.dtype, device=wrapper.device).expand(wrapper.shape)

    @staticmethod
    def backward(ctx, g):
        return g


class Tie(torch.autograd.Function):
    """x, with a second edge, to a token: no gradient flows there, but the functions behind it run. whole: all of it flows there."""

    @staticmethod
    def forward(ctx, x, token, whole: bool):
        ctx.whole = whole
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        return None if ctx.whole else g, g if ctx.whole else None, None


def _tie(x: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    return Tie.apply(x, token, False)


def _adopt(d: Deferred) -> None:
    """An autograd function (DDP's sink, through which all outputs pass) cloned deferred logits, and so has its place in their graph: it
    must run when a result of the clone is differentiated, and be given the gradient of what is made of the clone."""
    node, node.apart = d.node, False
    product, *rest = node.meaning
    with torch._C.DisableTorchFunctionSubclass():
        if not d.requires_grad:
            product = product.detached()
        else:
            with torch.enable_grad():
                node.token = Token.apply(d)
            product = product.tied_to(functools.partial(_tie, token=node.token))
    node.meaning = (product, *rest)


class Deferred(torch.Tensor):
    """Root of the two kinds of deferred tensors. `node`: its `Node`. A subclass's `answers` maps functions to handlers
    (args, kwargs) -> result or NotImplemented."""

    answers: dict[Callable, Callable] = {}
    node: Node

    @classmethod
    def make(cls, node: Node, shape: tuple[int, ...], dtype: torch.dtype, *products: Product) -> Deferred:
        def wrapper() -> Deferred:
            # strides of 0: there is no memory to give to a kernel
            return torch.Tensor._make_wrapper_subclass(
                cls, tuple(shape), strides=(0,) * len(shape), dtype=dtype, device=products[0].hidden.device, requires_grad=False
            )

        if torch.is_grad_enabled() and any(p.requires_grad for p in products):
            inputs = [t for p in products for t in (p.hidden, p.weight, p.bias) if t is not None]
            out = _Connect.apply(wrapper, node, *inputs)
        else:
            out = wrapper()
        out.node = node
        return out

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        deferred = _deferred(args) or _deferred(tuple(kwargs.values()))
        settled = any(d.node.settled() for d in deferred)
        for d in deferred:
            if d.node.apart and func not in ASKS:
                _adopt(d)
        if not settled:
            if func in ASKS:
                with torch._C.DisableTorchFunctionSubclass():
                    return func(*args, **kwargs)
            for kind in {type(d) for d in deferred}:
                if func in kind.answers and (out := kind.answers[func](args, kwargs)) is not NotImplemented:
                    return out
        name = getattr(func, "__name__", str(func))
        if _writes(func, kwargs):
            _before_writing([x for x in (*args[:1], kwargs.get("out")) if isinstance(x, Deferred)], name)
        args, kwargs = tree_map_only(Deferred, lambda d: d.node.value(name), (tuple(args), kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Below autograd: what did not come through Python."""
        value = lambda d: d.node.value(func.__name__).detach()
        args, kwargs = tree_map_only(Deferred, value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _before_writing(targets: list[Deferred], name: str) -> None:
    """Values that do not exist yet and are not views of the target must be those from before."""
    for target in targets:
        root = target.node.root()
        for node in [r() for r in root.family.waiting]:
            if node is not None and (root.big or node.descends_from(root)):
                node.value(name, in_place=True)


def _deferred(x) -> list[Deferred]:
    if isinstance(x, Deferred):
        return [x]
    return [d for v in x for d in _deferred(v)] if isinstance(x, (tuple, list)) else []


def is_last(dim: int, x: torch.Tensor) -> bool:
    return dim in (-1, x.dim() - 1)


def argument(args: tuple, kwargs: dict, i: int, name: str, default=None):
    return args[i] if len(args) > i else kwargs.get(name, default)
