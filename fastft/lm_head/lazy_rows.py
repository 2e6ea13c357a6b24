"""Results by token that are still to be computed: log-sum-exp, a selected logit, log p, the entropy, E[z], each in
whatever shape it was given.

They wait because code asks for them in parts that are one product together: `gather(logits) - logsumexp(logits)` is log
p, `lse - E[z]` is the entropy, a loop over the rows of a batch followed by `stack` is one call for the batch, log p and
entropy of the same logits are one pass."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from fastft.compat.torch_private import without_overrides
from fastft.lm_head.lazy_tensor import LazyTensor, Node, argument
from fastft.lm_head.product import Product

T = torch.Tensor


@dataclass(frozen=True, eq=False, repr=False)
class Meaning:
    """kind: "lse", "selected", "log_prob", "entropy", "expected" (sum of p z), "sum of log_p". index: of "selected" and
    "log_prob", one by row."""

    product: Product
    kind: str
    index: Any = None
    negative: bool = False


class LazyRows(LazyTensor):
    """A lazy tensor of one number for each token."""


def rows(
    product: Product,
    kind: str,
    shape,
    dtype: torch.dtype,
    call: tuple,
    index: Any = None,
    negative: bool = False,
):
    """call: (func, args, kwargs) by which stock makes it."""
    product = product if torch.is_grad_enabled() else product.detached()
    meaning = Meaning(product, kind, index, negative)
    node = Node(call[0], call[1], call[2], product.family, meaning, None, False)
    node.alone = lambda: _compute(node, meaning, tuple(shape), dtype)
    return LazyRows.make(node, shape, dtype, call)


def _compute(node: Node, m: Meaning, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    with torch.set_grad_enabled(m.product.requires_grad):
        x = _flat(node, m)
        return (-x if m.negative else x).to(dtype).reshape(shape)


def _flat(node: Node, m: Meaning) -> torch.Tensor:
    p = m.product
    if m.kind == "selected":
        return p.selected(m.index)
    if m.kind == "lse":
        return p.log_sum_exp()
    if m.kind == "expected":
        return p.log_sum_exp().reshape(-1) - p.entropy()
    if m.kind == "sum of log_p":
        return (p.mean() - p.log_sum_exp().reshape(-1)) * p.vocab
    known = p.cache.pop((m.kind, None if m.index is None else id(m.index)), None)
    if known is not None:
        return known
    if m.kind == "entropy":
        return p.entropy()
    other = _waiting_entropy(node, p)
    log_p, entropy = p.log_probs(m.index, entropy=other is not None)
    if other is not None:
        other.cache["entropy", None] = entropy if other.requires_grad else entropy.detach()
    return log_p


def _waiting_entropy(node: Node, p: Product) -> Product | None:
    """The entropy of the same logits is wanted as well, perhaps without gradient."""
    for other in [r() for r in node.family.waiting]:
        if other is None or other is node or other.made or getattr(other.meaning, "kind", "") != "entropy":
            continue
        q = other.meaning.product
        if p.same(q) or p.detached().same(q):
            return q
    return None


# operations that keep the meaning: other shapes, dtypes and signs of the same rows


def _relabelled(func, args, kwargs, x: LazyRows, **changes):
    """The same rows in another shape, dtype or sign."""
    with without_overrides():
        probe = func(torch.empty(x.shape, dtype=x.dtype, device="meta"), *args[1:], **kwargs)
    if not isinstance(probe, T) or probe.numel() != x.numel() or not probe.is_floating_point():
        return NotImplemented
    m = replace(x.node.meaning, **changes)
    out = rows(m.product, m.kind, probe.shape, probe.dtype, (func, args, kwargs), m.index, m.negative)
    out.node.view = func in _SHAPES
    return out


def _shape_only(func):
    return lambda args, kwargs: (
        _relabelled(func, args, kwargs, args[0]) if isinstance(args[0], LazyRows) else NotImplemented
    )


def _cast(func):
    def cast(args, kwargs):
        x = args[0]
        rest = [a for a in args[1:] if not isinstance(a, bool)]
        if not isinstance(x, LazyRows) or any(not isinstance(a, torch.dtype) for a in rest) or set(kwargs) - {"dtype"}:
            return NotImplemented
        return _relabelled(func, args, kwargs, x)

    return cast


def _negative(func):
    return lambda args, kwargs: _relabelled(func, args, kwargs, args[0], negative=not args[0].node.meaning.negative)


def _detach(func):
    def detach(args, kwargs):
        with torch.no_grad():
            return _relabelled(func, args, kwargs, args[0])

    return detach


def _minus(func):
    def minus(args, kwargs):
        x, y = args[0], args[1]
        if kwargs or not (isinstance(x, LazyRows) and isinstance(y, LazyRows)) or x.shape != y.shape:
            return NotImplemented
        p, q = x.node.meaning, y.node.meaning
        if p.negative or q.negative or not p.product.same(q.product):
            return NotImplemented
        kind = {("selected", "lse"): "log_prob", ("lse", "expected"): "entropy"}.get((p.kind, q.kind))
        if kind is None:
            return NotImplemented
        index = p.index if kind == "log_prob" else None
        return rows(p.product, kind, x.shape, torch.promote_types(x.dtype, y.dtype), (func, args, kwargs), index)

    return minus


def _joined(func):
    """A handler for stack or cat of the parts of one batch, in order, along the first dimension."""

    def join(args, kwargs):
        xs = argument(args, kwargs, 0, "tensors")
        if (
            argument(args, kwargs, 1, "dim", 0) != 0
            or set(kwargs) - {"dim", "tensors"}
            or not xs
            or not all(type(x) is LazyRows for x in xs)
        ):
            return NotImplemented
        ms = [x.node.meaning for x in xs]
        first = ms[0]
        if any(m.product.part is None or m.kind != first.kind or m.negative != first.negative for m in ms):
            return NotImplemented
        whole, at, _ = first.product.part
        for m in ms:
            if not m.product.part[0].same(whole) or m.product.part[1] != at:
                return NotImplemented
            at = m.product.part[2]
        if first.product.part[1] != 0 or at != whole.rows.numel():
            return NotImplemented
        if not first.product.requires_grad:
            whole = whole.detached()
        with without_overrides():
            probe = func([torch.empty(x.shape, dtype=x.dtype, device="meta") for x in xs])
        index = None if first.index is None else torch.cat([m.index.reshape(-1) for m in ms])
        return rows(whole, first.kind, probe.shape, probe.dtype, (func, args, kwargs), index, first.negative)

    return join


_SHAPES = [
    T.view,
    T.reshape,
    T.unsqueeze,
    T.squeeze,
    T.flatten,
    T.contiguous,
    torch.reshape,
    torch.unsqueeze,
    torch.squeeze,
    torch.flatten,
]
LazyRows.answers = {
    **{f: _shape_only(f) for f in _SHAPES},
    **{f: _cast(f) for f in (T.float, T.double, T.to)},
    **{f: _negative(f) for f in (T.neg, T.__neg__, torch.neg)},
    **{f: _detach(f) for f in (T.detach, torch.detach)},
    **{f: _minus(f) for f in (T.sub, T.__sub__, torch.sub)},
    **{f: _joined(f) for f in (torch.stack, torch.cat)},
}
