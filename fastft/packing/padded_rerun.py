"""What leaves an unpadded forward by position, and is seldom looked at: logits.

An unpadded batch has no logits at its padding; stock has. A `Reread` stands for stock's tensor: whoever looks at its
numbers gets those of a second, padded forward (`again`), made once. Its shape, its place in autograd's graph, casts and
clones need no second forward.

Gradients. A `Reread` stands behind the lazy logits of the unpadded forward, from which the loss was computed. The
gradient of what was read goes there whole, so that hooks see the sum that stock's see, and on through the graph of the
real positions. That of the padded positions goes, beside it, into the graph of the second forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from fastft.compat.torch_private import tree_leaves, tree_map_only, without_memory, without_overrides
from fastft.lm_head.lazy_graph import runs
from fastft.lm_head.lazy_tensor import LazyTensor

T = torch.Tensor


def _found(names: tuple[str, ...], getter: bool = False) -> set:
    return {getattr(T, n).__get__ if getter else getattr(T, n) for n in names if hasattr(T, n)}


_ASKS = _found(
    (
        "shape",
        "dtype",
        "device",
        "ndim",
        "layout",
        "is_cuda",
        "is_cpu",
        "is_meta",
        "is_sparse",
        "is_quantized",
        "is_nested",
        "itemsize",
        "nbytes",
    ),
    True,
)
_ASKS |= _found(
    (
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "is_floating_point",
        "is_complex",
        "__len__",
        "get_device",
    )
)
_ASKS |= {torch.numel, torch.is_floating_point, torch.is_complex}
_TENSOR: Any = T
_OF_THE_GRAPH = _found(
    ("requires_grad", "is_leaf", "grad", "retains_grad", "grad_fn", "output_nr", "_backward_hooks"), True
)
_OF_THE_GRAPH |= _found(("register_hook", "retain_grad", "requires_grad_")) | {
    _TENSOR.grad.__set__,
    _TENSOR.grad.__delete__,
}
_CASTS = {T.float: torch.float32, T.half: torch.float16, T.bfloat16: torch.bfloat16}
_RECORDED = {T.clone, torch.clone, *_CASTS, T.detach, torch.detach, T.contiguous}


class Source:
    """make() -> the tensor of the second forward, with its graph. padding [B, S]: where it is needed. has_bias: the
    head's bias learns, and would be given the padded positions' gradient twice. leaves: what the second forward's
    gradient goes to."""

    def __init__(self, make: Callable[[], T], padding: T, has_bias: bool = False, leaves: Sequence[T] = ()):
        self.make, self.padding, self.has_bias, self.leaves = make, padding, has_bias, leaves
        self.made: T | None = None
        self.inside_a_function = (
            False  # read without a graph: perhaps by an autograd function, whose backward gives the gradient
        )
        self.sent: list[T] = []  # of the gradient, what went into the second graph already

    def value(self) -> T:
        if self.made is None:
            found = self.make()
            found = found.node.value("a second, padded forward") if isinstance(found, LazyTensor) else found
            with torch.enable_grad():
                self.made = _Padding.apply(found, self) if found.requires_grad else found
        assert self.made is not None
        return self.made

    def only_padding(self, g: T) -> T:
        return _at(self.padding, g)

    def rest(self, g: T, wanted: Sequence[bool] | None) -> list[T | None]:
        """A gradient that came past `_Read`. wanted: the leaves that a partial backward asks for, whose gradients are
        returned for the graph to hand on; None: it is a whole backward, which writes to every leaf."""
        found: list[T | None] = [None] * len(self.leaves)
        rest = self.only_padding(g)
        for sent in self.sent:
            rest = rest - sent
        if wanted is not None and not any(wanted):
            return found
        value = self.value()
        if not value.requires_grad or not bool(rest.any()):
            return found
        if wanted is None:
            torch.autograd.backward(value, rest, retain_graph=True)
            return found
        places = [i for i, want in enumerate(wanted) if want]
        leaves = [self.leaves[i] for i in places]
        with _without_hooks(leaves):
            got = torch.autograd.grad(value, leaves, rest, retain_graph=True, allow_unused=True)
        for i, x in zip(places, got):
            found[i] = x
        return found


def _at(padding: T, g: T) -> T:
    return g * padding.to(g.device).reshape(*padding.shape, *(1,) * (g.dim() - 2))


def _but_at(padding: T, g: T) -> T:
    return g - _at(padding, g)


@contextmanager
def _without_hooks(leaves: Sequence[T]) -> Iterator[None]:
    """Hooks run once, on the gradient that the outer backward hands to the leaf."""
    hooks = [(x._backward_hooks, dict(x._backward_hooks)) for x in leaves if x._backward_hooks]
    try:
        for table, _ in hooks:
            table.clear()
        yield
    finally:
        for table, before in hooks:
            table.update(before)


class _Padding(torch.autograd.Function):
    """x; its gradient at the padding alone."""

    @staticmethod
    def forward(ctx, x, source: Source):
        ctx.source = source
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        g = ctx.source.only_padding(g)
        if ctx.source.inside_a_function:
            ctx.source.sent.append(g)
        return g, None


class _Stand(torch.autograd.Function):
    """A tensor without memory, behind the lazy logits. whole: a leaf of nobody's, which a whole backward comes to and a
    partial one (torch.autograd.grad, or backward with `inputs`) does not."""

    @staticmethod
    def forward(ctx, make: Callable[[], T], source: Source, lazy, whole: T, *leaves: T):
        ctx.set_materialize_grads(False)
        ctx.source = source
        return make()

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        source: Source = ctx.source
        given: list[T | None] = [None] * len(source.leaves)
        if g is not None and source.inside_a_function:
            _, (whole, _), *leaves = ctx.next_functions
            given = source.rest(g, None if runs(whole) else [runs(leaf) for leaf, _ in leaves])
        return None, None, g, None, *given


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx, value, lazy):
        return value.detach()

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        return g, g


class Reread(torch.Tensor):
    """A tensor without memory that a caller of an unpadded forward gets for its logits: reading it runs the padded
    forward. lazy: stock's tensor but for the padding, of the same shape; None where it stands in no graph."""

    lazy: T | None
    source: Source
    made: T | None = None
    of: Reread | None = None  # what it was cast or cloned from, by `step`
    step: tuple | None = None

    @classmethod
    def make(cls, lazy: T, source: Source, of: Reread | None = None, step: tuple | None = None) -> Reread:
        with without_overrides():
            shape, dtype, device, connected = tuple(lazy.shape), lazy.dtype, lazy.device, lazy.requires_grad
            make = lambda: without_memory(cls, shape, dtype, device)
            if connected:
                with torch.enable_grad():
                    whole = torch.zeros((), requires_grad=True)
                    out = _Stand.apply(make, source, lazy, whole, *source.leaves)
            else:
                out = make()
        if isinstance(lazy, LazyTensor):
            lazy.node.behind = True
            own: Any = lazy.node.connect()
            if source.has_bias and of is None and own is not None:
                own.counts = functools.partial(_but_at, source.padding)  # behind the hooks, which see it whole
        out.lazy, out.source, out.of, out.step = lazy if connected else None, source, of, step
        return out

    def second(self) -> T:
        """Of the padded forward; its gradient is taken at the padding alone."""
        if self.of is None:
            return self.source.value()
        assert self.step is not None
        func, kwargs, grad = self.step
        with torch.set_grad_enabled(grad):
            return func(self.of.second(), **kwargs)

    def value(self) -> T:
        if self.made is None:
            second = self.second()
            self._hold()
            with without_overrides(), torch.enable_grad():
                connected = self.requires_grad
                self.made = _Read.apply(second, self) if connected else second.detach()
        assert self.made is not None
        return self.made

    def _hold(self) -> None:
        """The graph keeps what the lazy logits recorded: a gradient may come when nobody holds them any more."""
        x: Reread | None = self
        with without_overrides():
            while x is not None:
                grad_fn: Any = x.grad_fn
                if x.lazy is not None and grad_fn is not None:
                    grad_fn.__dict__["keep"] = getattr(x.lazy, "node", None)
                x = x.of

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is T.__hash__:
            return id(args[0])
        first = args[0] if args else None
        if isinstance(first, Reread) and func in _ASKS:
            with without_overrides():
                return func(*args, **kwargs)
        if isinstance(first, Reread) and func in _OF_THE_GRAPH:
            if first.lazy is not None:
                return func(first.lazy, *args[1:], **kwargs)
            with without_overrides():
                return func(*args, **kwargs)
        if func is torch.autograd.grad:
            return _grad(args, kwargs)
        if func is torch.autograd.backward or func is T.backward:
            return _backward(func, args, kwargs)
        for x in _all((args, kwargs)):
            if not torch.is_grad_enabled():
                x.source.inside_a_function = True
        if isinstance(first, Reread) and first.made is None and func in _RECORDED and len(args) == 1:
            return first._recorded(func, kwargs)
        args, kwargs = tree_map_only(Reread, lambda x: x.value(), (tuple(args), kwargs))
        return func(*args, **kwargs)

    def _recorded(self, func, kwargs: dict) -> Reread:
        lazy = self.lazy
        if func is T.contiguous:
            return self
        if lazy is not None and torch.is_grad_enabled() and func not in (T.detach, torch.detach):
            like = func(lazy, **kwargs)
            if like is lazy:
                return self
        else:
            like = torch.empty((), dtype=_CASTS.get(func, self.dtype), device=self.device).expand(self.shape)
        return Reread.make(like, self.source, self, (func, kwargs, torch.is_grad_enabled()))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        """Below autograd: what did not come through Python."""

        def value(x: Reread) -> T:
            x.source.inside_a_function = True
            with torch.overrides.enable_reentrant_dispatch():
                return x.value().detach()

        args, kwargs = tree_map_only(Reread, value, (args, kwargs or {}))
        return func(*args, **kwargs)


def _all(x) -> list[Reread]:
    return [r for r in tree_leaves(x) if isinstance(r, Reread)]


def _value(x: Reread) -> T:
    return x.value()


def _behind(x: Reread) -> T:
    """What the loss was computed from."""
    return x if x.lazy is None else x.lazy


def _grad(args: tuple, kwargs: dict):
    """torch.autograd.grad: of what was read, or by the logits."""
    names = ("outputs", "inputs", "grad_outputs")
    given = dict(zip(names, args)) | kwargs
    given["inputs"] = tree_map_only(Reread, _behind, given["inputs"])
    for name in ("outputs", "grad_outputs"):
        given[name] = tree_map_only(Reread, _value, given.get(name))
    return torch.autograd.grad(
        **given, **dict(zip(("retain_graph", "create_graph", "only_inputs", "allow_unused"), args[3:]))
    )


def _backward(func, args: tuple, kwargs: dict):
    kwargs = dict(kwargs)
    if kwargs.get("inputs") is not None:
        kwargs["inputs"] = tree_map_only(Reread, _behind, kwargs["inputs"])
    args, kwargs = tree_map_only(Reread, _value, (tuple(args), kwargs))
    return func(*args, **kwargs)
