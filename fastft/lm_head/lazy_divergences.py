"""Divergences between distributions over the vocabulary (distillation), some tokens at a time.

A generalised Jensen-Shannon loss is a dozen operations on tensors of tokens x vocabulary that treat every token alike:
softmaxes, sums, products, `kl_div` without reduction, a logsumexp over two stacked distributions, a selection of
tokens, and a sum at the end. They are recorded; the sum replays stock's own operations on a few tokens at a time, with
their gradients.

With y_i the sum over the vocabulary at token i, y_i depends on row i of each head's input alone: the forward keeps J_i
= dy_i/dh_i, and the backward is g_i J_i. Where a head's weight is trained as well, the backward replays the operations
instead."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from fastft.compat.torch_private import tree_leaves, tree_map_only
from fastft.lm_head.lazy_tensor import LazyTensor, Node, answered, argument
from fastft.lm_head.product import Product, autocast_as

T = torch.Tensor
ELEMENTS = 1 << 24  # of one replayed tensor: about a dozen of them are alive at a time


@dataclass(frozen=True, eq=False, repr=False)
class DivergenceTerms:
    """rows: the shape in front of the vocabulary. stacked: dimensions in front of the rows. mask: the tokens that were
    selected, in the shape that the rows had before. constants: plain tensors among the operands, with their
    versions."""

    rows: tuple[int, ...]
    stacked: int = 0
    mask: torch.Tensor | None = None
    constants: tuple[tuple[torch.Tensor, int], ...] = ()


class LazyDivergence(LazyTensor):
    """(*stacked, *rows, V), made of lazy logits by operations that treat every token alike."""


def _version(t: torch.Tensor) -> int:
    return 0 if t.is_inference() else t._version


def _described(x) -> DivergenceTerms | None:
    """What an operand stands for, where it has a value for every token and vocabulary entry."""
    if isinstance(x, LazyDivergence):
        return x.node.meaning
    if isinstance(x, LazyTensor) and x.node.big:
        return DivergenceTerms(tuple(x.shape[:-1]))
    return None


def _meaning(operands: list, shape: tuple[int, ...]) -> DivergenceTerms | None:
    """Of an elementwise function of these operands with a result of this shape; None where an operand is something
    else."""
    found = [m for x in operands if (m := _described(x)) is not None]
    first, constants = found[0], []
    for m in found:
        if m.rows != first.rows or m.stacked != first.stacked or m.mask is not first.mask:
            return None
    for x in operands:
        if isinstance(x, T) and _described(x) is None:
            whole = tuple(x.shape) == shape and not first.stacked and first.mask is None
            if type(x) is not T or x.requires_grad or not (whole or x.dim() == 0):
                return None
            constants.append((x, _version(x)))
    return replace(first, constants=tuple(constants))


def _record(meaning: DivergenceTerms, shape: tuple[int, ...], dtype: torch.dtype, call: tuple) -> LazyDivergence:
    sources = [x for x in tree_leaves(call[1:]) if isinstance(x, LazyTensor)]
    node = Node(call[0], call[1], call[2], sources[0].node.family, meaning, None, True)
    products = _products(node)
    node.wait_with(p.family for p in products)
    return LazyDivergence.make(node, shape, dtype, call)


def _leaves(node: Node) -> Iterator[Node]:
    """The logits that a value is made from, once each."""
    seen: dict[int, Node] = {}
    stack = [node]
    while stack:
        n = stack.pop()
        if isinstance(n.meaning, tuple) and n.meaning[1] == "logits":
            seen.setdefault(id(n), n)
        else:
            stack += n.before
    yield from seen.values()


def _products(node: Node) -> list[Product]:
    return [n.meaning[0] for n in _leaves(node)]


def elementwise(func: Callable, operands: int = 2) -> Callable:
    """func(x, y) or func(x), the same at every element. Divergences begin with a logarithm of probabilities."""

    def record(args, kwargs):
        if kwargs or len(args) != operands or not all(isinstance(x, (T, int, float)) for x in args):
            return NotImplemented
        if not any(
            isinstance(x, LazyDivergence) or (isinstance(x, LazyTensor) and x.node.big and x.node.meaning[1] == "log_p")
            for x in args
        ):
            return NotImplemented
        return _elementwise(func, args, kwargs, list(args))

    return record


def kl_div(func: Callable) -> Callable:
    """torch's `kl_div` without a reduction."""

    def record(args, kwargs):
        names = ("input", "target", "size_average", "reduce", "reduction", "log_target")
        given = {n: argument(args, kwargs, i, n) for i, n in enumerate(names)}
        if (
            given["reduction"] != "none"
            or given["size_average"] is not None
            or given["reduce"] is not None
            or set(kwargs) - set(names)
        ):
            return NotImplemented
        return _elementwise(func, args, kwargs, [given["input"], given["target"]])

    return record


def _elementwise(func, args, kwargs, operands):
    shapes = {tuple(x.shape) for x in operands if _described(x) is not None}
    if len(shapes) != 1:
        return NotImplemented
    shape = shapes.pop()
    meaning = _meaning(operands, shape)
    if meaning is None:
        return NotImplemented
    with torch.no_grad():  # what dtype comes of it, asked of single numbers
        one = lambda x: torch.zeros((1,) * x.dim(), dtype=x.dtype, device=x.device)
        asked, named = tree_map_only(T, one, (tuple(args), kwargs))
        dtype = func(*asked, **named).dtype
    return _record(meaning, shape, dtype, (func, args, kwargs)) if dtype.is_floating_point else NotImplemented


def stack(func: Callable) -> Callable:
    """Two distributions side by side, for the logsumexp over both that a mixture needs."""

    def record(args, kwargs):
        parts, dim = argument(args, kwargs, 0, "tensors"), argument(args, kwargs, 1, "dim", 0)
        if dim != 0 or set(kwargs) - {"tensors", "dim"} or not isinstance(parts, (list, tuple)):
            return NotImplemented
        if len({(tuple(x.shape), x.dtype) for x in parts if isinstance(x, T)}) != 1 or not all(
            isinstance(x, T) for x in parts
        ):
            return NotImplemented
        meaning = _meaning(list(parts), tuple(parts[0].shape))
        if meaning is None or meaning.stacked:
            return NotImplemented
        return _record(replace(meaning, stacked=1), (len(parts), *parts[0].shape), parts[0].dtype, (func, args, kwargs))

    return record


def logsumexp(func: Callable) -> Callable:
    """logsumexp over the distributions that `stack` put side by side."""

    def record(args, kwargs):
        x, dim = args[0], argument(args, kwargs, 1, "dim")
        if (
            not isinstance(x, LazyDivergence)
            or not x.node.meaning.stacked
            or dim != 0
            or len(args) > 2
            or set(kwargs) - {"dim"}
        ):
            return NotImplemented
        return _record(
            replace(x.node.meaning, stacked=0, constants=()), tuple(x.shape[1:]), x.dtype, (func, args, kwargs)
        )

    return record


def select(args, kwargs):
    """x[mask] of one reference value by token."""
    x, mask = args
    m = x.node.meaning if isinstance(x, LazyDivergence) else None
    if (
        m is None
        or m.stacked
        or m.mask is not None
        or type(mask) is not T
        or mask.dtype != torch.bool
        or tuple(mask.shape) != m.rows
    ):
        return NotImplemented
    n = int(mask.sum())
    kept = DivergenceTerms((n,), mask=mask, constants=((mask, _version(mask)),))
    return _record(kept, (n, x.shape[-1]), x.dtype, (T.__getitem__, args, kwargs))


def total(func: Callable) -> Callable:
    """The sum of everything, or over the vocabulary."""

    def compute(args, kwargs):
        x, dim, keep = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "keepdim", False)
        if not isinstance(x, LazyDivergence) or x.node.meaning.stacked or keep or set(kwargs) - {"dim", "keepdim"}:
            return NotImplemented
        if dim is not None and (not isinstance(dim, int) or dim not in (-1, x.dim() - 1)):
            return NotImplemented
        y = by_token(x)
        out = (y.sum() if dim is None else y.reshape(x.shape[:-1])).to(x.dtype)
        return answered(out, x.node.family, (func, args, kwargs))

    return compute


def by_token(x: LazyDivergence) -> torch.Tensor:
    """Sums over the vocabulary, flat, in float32 (float64 of float64); differentiable in every head's input and
    parameters."""
    node, leaves = x.node, list(_leaves(x.node))
    for leaf in leaves:
        leaf.meaning[0].family.check()
    _check_constants(node)
    tensors = [t for n in leaves for t in _parts(n.meaning[0], n.grad)]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with ExitStack() as whole:
        for leaf in leaves:
            whole.enter_context(leaf.family.gathered())
        return _ByToken.apply(node, leaves, x.shape[-1], dtype, *tensors)


def _parts(p: Product, grad: bool) -> tuple[torch.Tensor | None, ...]:
    """(flat hidden, weight, bias), without gradients where the logits were made without."""
    parts = p.hidden.reshape(-1, p.hidden.shape[-1]), p.weight, p.bias
    return parts if grad else tuple(t if t is None else t.detach() for t in parts)


def _check_constants(node: Node) -> None:
    if isinstance(node.meaning, DivergenceTerms):
        for t, version in node.meaning.constants:
            if _version(t) != version:
                raise RuntimeError(
                    f"lazy logits: a tensor of shape {tuple(t.shape)} was modified in place after {node.func.__name__} "
                    "was called with it; "
                    "clone it first, or use the result before"
                )
        for n in node.before:
            _check_constants(n)


def _tokens(node: Node) -> torch.Tensor | None:
    """Flat indices of the tokens that were selected; None: all of them."""
    while isinstance(node.meaning, DivergenceTerms):
        if node.meaning.mask is not None:
            return node.meaning.mask.reshape(-1).nonzero().squeeze(-1)
        node = node.before[0]
    return None


def _replay(
    node: Node, leaves: dict[int, torch.Tensor], at: torch.Tensor, known: dict[int, torch.Tensor]
) -> torch.Tensor:
    """The value of `node` for the tokens `at`, by stock's operations. leaves: the logits, by node. Dimensions in front
    are kept, as 1."""
    if id(node) in known:
        return known[id(node)]
    with torch.set_grad_enabled(torch.is_grad_enabled() and node.grad), autocast_as(node.autocast):
        if id(node) in leaves:
            out = leaves[id(node)]
        # the tokens that were not selected are not here
        elif isinstance(node.meaning, DivergenceTerms) and node.func is T.__getitem__:
            x = _replay(node.before[0], leaves, at, known)
            out = x.reshape(-1, x.shape[-1])
        else:
            few = lambda t: (
                t if t.dim() == 0 else t.reshape(-1, t.shape[-1])[at].reshape(*(1,) * (t.dim() - 2), -1, t.shape[-1])
            )
            args, kwargs = tree_map_only(
                (Node, T),
                lambda v: _replay(v, leaves, at, known) if isinstance(v, Node) else few(v),
                (node.args, node.kwargs),
            )
            out = node.func(*args, **kwargs)
    known[id(node)] = out
    return out


def _chunks(node: Node, n: int, vocab: int, device: torch.device) -> Iterator[torch.Tensor]:
    at = _tokens(node)
    at = torch.arange(n, device=device) if at is None else at
    return iter(at.split(max(1, ELEMENTS // vocab))) if len(at) else iter(())


def _values(node: Node, leaves: list[Node], tensors: list, at: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sums over the vocabulary of the tokens `at`. tensors: (hidden of these tokens, weight, bias) of one leaf after
    the other."""
    logits = {}
    for i, leaf in enumerate(leaves):
        hidden, weight, bias = tensors[3 * i : 3 * i + 3]
        p = leaf.meaning[0]
        hidden = (
            hidden.reshape(*(1,) * (len(p.rows) - 1), *hidden.shape) if p.rows else hidden.reshape(hidden.shape[-1])
        )
        with torch.set_grad_enabled(torch.is_grad_enabled() and leaf.grad), autocast_as(leaf.autocast):
            logits[id(leaf)] = replace(
                p, hidden=hidden, weight=weight, bias=bias, part=None, cache={}
            ).logits_unchecked()
    return _replay(node, logits, at, {}).sum(-1, dtype=dtype).reshape(-1)


def _parts_at(tensors, at: torch.Tensor, learn: Container[int]) -> list[Any]:
    """New leaves: of each hidden its tokens `at`, weights and biases whole; those whose number is in `learn` take a
    gradient."""
    return [
        None if t is None else (t if i % 3 else t[at]).detach().requires_grad_(i in learn)
        for i, t in enumerate(tensors)
    ]


class _ByToken(torch.autograd.Function):
    """y (tokens,) of (hidden, weight, bias) of each leaf."""

    @staticmethod
    def forward(ctx, node, leaves, vocab, dtype, *tensors):
        needs = ctx.needs_input_grad[4:]
        ctx.plan, ctx.trained = (node, leaves, vocab, dtype), any(need for i, need in enumerate(needs) if i % 3)
        jacobians = {i: [] for i, need in enumerate(needs) if need and not ctx.trained}
        found = []
        for at in _chunks(node, len(tensors[0]), vocab, tensors[0].device):
            parts = _parts_at(tensors, at, jacobians)
            with torch.set_grad_enabled(bool(jacobians)):
                y = _values(node, leaves, parts, at, dtype)
            if jacobians:
                for i, j in zip(jacobians, torch.autograd.grad(y, [parts[i] for i in jacobians], torch.ones_like(y))):
                    jacobians[i].append(j)
            found.append(y.detach())
        ctx.kept = tuple(jacobians)
        join = lambda parts, like: torch.cat(parts) if parts else like.new_empty(0, like.shape[-1])
        ctx.save_for_backward(*(join(j, tensors[i]) for i, j in jacobians.items()), *(tensors if ctx.trained else ()))
        ctx.sizes = [None if t is None else t.shape[0] for t in tensors]
        return torch.cat(found) if found else tensors[0].new_zeros(0, dtype=dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]  (torch's decorator is untyped)
        (g,) = upstream
        node, leaves, vocab, dtype = ctx.plan
        needs = ctx.needs_input_grad[4:]
        grads: list[Any] = [None] * len(needs)
        if not ctx.trained:
            at = _tokens(node)
            for i, j in zip(ctx.kept, ctx.saved_tensors):
                rows = (j * g.unsqueeze(-1)).to(j.dtype)
                grads[i] = rows if at is None else j.new_zeros(ctx.sizes[i], j.shape[-1]).index_copy_(0, at, rows)
            return None, None, None, None, *grads
        tensors, first = ctx.saved_tensors, 0
        wide = lambda t: torch.promote_types(t.dtype, torch.float32)
        for i, need in enumerate(needs):
            if need:
                grads[i] = (
                    torch.zeros_like(tensors[i]) if i % 3 == 0 else torch.zeros_like(tensors[i], dtype=wide(tensors[i]))
                )
        wanted = [i for i, need in enumerate(needs) if need]
        for at in _chunks(node, len(tensors[0]), vocab, g.device):
            parts = _parts_at(tensors, at, wanted)
            with torch.enable_grad():
                y = _values(node, leaves, parts, at, dtype)
            got = torch.autograd.grad(y, [parts[i] for i in wanted], g[first : first + len(at)])
            first += len(at)
            for i, d in zip(wanted, got):
                if i % 3:
                    grads[i] += d
                else:
                    grads[i][at] = d
        return None, None, None, None, *(None if d is None else d.to(t.dtype) for d, t in zip(grads, tensors))


def answers() -> dict[Callable, Callable]:
    """A table of handlers, by the function that they record or compute."""
    n = torch.nn.functional
    two = (T.add, T.__add__, T.__radd__, torch.add, T.sub, T.__sub__, T.__rsub__, torch.sub)
    two += (T.mul, T.__mul__, T.__rmul__, torch.mul, T.div, T.__truediv__, torch.div)
    one = (T.exp, torch.exp, T.neg, T.__neg__, torch.neg)
    table = {f: elementwise(f) for f in two} | {f: elementwise(f, 1) for f in one}
    table |= {n.kl_div: kl_div(n.kl_div), torch.stack: stack(torch.stack), T.__getitem__: select}
    table |= {f: logsumexp(f) for f in (torch.logsumexp, T.logsumexp)}
    return table | {f: total(f) for f in (T.sum, torch.sum)}


LazyDivergence.answers = answers()
