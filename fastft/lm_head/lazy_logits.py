"""Lazy logits: a tensor that stands for `hidden @ weight.T (+ bias)` and is never made where nobody needs it whole.

Recorded, and folded into what it stands for: products and quotients with scalars, a tanh cap, casts, slices of
positions, reshapes that keep the vocabulary last. Answered without the logits: cross-entropy, log_softmax with
gather or nll_loss, logsumexp, gather of one column by token, argmax, mean, entropies written as -(exp(logp) *
logp).sum(-1) or logsumexp - (softmax * logits).sum(-1); divergences from other distributions some tokens at a time
(`lazy_divergences`). Any other operation makes the logits once, exactly as stock (`lazy_tensor`), and is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F

from fastft.lm_head.lazy_autograd import answers as autograd_answers
from fastft.lm_head.lazy_divergences import answers as rowwise_answers
from fastft.lm_head.lazy_logits_type import (
    SUMS,
    LazyLogits,
    _cast,
    _detach,
    _is,
    _logits,
    _over,
    _reshape,
    _tanh,
    _times,
    clone,
    contiguous,
    dtype_of,
    getitem,
    parts,
)
from fastft.lm_head.lazy_rows import rows
from fastft.lm_head.lazy_tensor import LazyTensor, answered, argument, is_last
from fastft.lm_head.product import Family, Product, autocast_state

T = torch.Tensor


def defer(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    fallbacks: Counter,
    gathered: Callable[[], AbstractContextManager] = nullcontext,
) -> LazyLogits:
    """Logits (*rows, V) of hidden (*rows, H), in the dtype and under the autocast state in which F.linear would run
    now.

    hidden and weight of one floating dtype, or any under autocast. fallbacks: counts the calls whose logits had to be
    made. gathered(): the context in which weight and bias, where they are sharded, are whole."""
    _, on, low = autocast_state(hidden.device)
    compute = low if on and hidden.dtype != torch.float64 else hidden.dtype
    family = Family(hidden, weight, bias, fallbacks, gathered=gathered)
    product = Product(family, hidden, weight, bias, compute)
    if not torch.is_grad_enabled():
        product = product.detached()
    return _logits(product, "logits", compute, (F.linear, (hidden, weight, bias), {}))


# answered without the logits (what is recorded stands in `lazy_logits_type`)


def _softmax(func, form: str):
    def softmax(args, kwargs):
        x, dim = args[0], argument(args, kwargs, 1, "dim")
        dtype = kwargs.get("dtype")
        if (
            not _is(x)
            or dim is None
            or not is_last(dim, x)
            or len(args) > 2
            or set(kwargs) - {"dim", "dtype", "_stacklevel"}
        ):
            return NotImplemented
        if dtype is not None and (
            not dtype.is_floating_point or (dtype == torch.float64) != (x.product.compute == torch.float64)
        ):
            return NotImplemented
        out = dtype or dtype_of(func, x, dim=-1)
        return _logits(x.product, form, out, (func, args, kwargs))

    return softmax


def _exp(func):
    def exp(args, kwargs):
        if kwargs or not _is(args[0], "log_p"):
            return NotImplemented
        return _logits(args[0].product, "p", dtype_of(func, args[0]), (func, args, kwargs))

    return exp


def _negative(func):
    def negative(args, kwargs):
        if not _is(args[0], "log_p"):
            return NotImplemented
        return _logits(args[0].product, "-log_p", args[0].dtype, (func, args, kwargs))

    return negative


def _logsumexp(func):
    def logsumexp(args, kwargs):
        x, dim, keep = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "keepdim", False)
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if not _is(x) or not isinstance(dim, int) or not is_last(dim, x):
            return NotImplemented
        shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
        return rows(x.product, "lse", shape, dtype_of(func, x, dim=-1), (func, args, kwargs))

    return logsumexp


def _sum(func):
    def total(args, kwargs):
        x, dim, keep, dtype = (argument(args, kwargs, i, n) for i, n in enumerate(("input", "dim", "keepdim", "dtype")))
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if (
            not isinstance(x, LazyLogits)
            or not isinstance(dim, int)
            or not is_last(dim, x)
            or set(kwargs) - {"dim", "keepdim", "dtype"}
        ):
            return NotImplemented
        kind, negative = SUMS.get(x.form, ("", False))
        if (
            not kind
            or (kind == "sum of log_p" and x.product.tanh and x.requires_grad)
            or (dtype is not None and not dtype.is_floating_point)
        ):
            return NotImplemented
        shape = (*x.shape[:-1], 1) if keep else x.shape[:-1]
        return rows(x.product, kind, shape, dtype or dtype_of(func, x, dim=-1), (func, args, kwargs), negative=negative)

    return total


def _mean(func):
    def mean(args, kwargs):
        x, dim, keep = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "keepdim", False)
        dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
        if (
            not _is(x)
            or set(kwargs) - {"dim", "keepdim"}
            or not (dim is None or (isinstance(dim, int) and is_last(dim, x)))
        ):
            return NotImplemented
        if x.product.tanh and x.product.requires_grad and torch.is_grad_enabled():
            return NotImplemented
        by_row = x.product.mean()
        out = by_row.mean() if dim is None else by_row.reshape((*x.shape[:-1], 1) if keep else x.shape[:-1])
        return answered(out.to(dtype_of(func, x)), x.product.family, (func, args, kwargs))

    return mean


def _argmax(func):
    def argmax(args, kwargs):
        x, dim, keep = args[0], argument(args, kwargs, 1, "dim"), argument(args, kwargs, 2, "keepdim", False)
        if (
            not isinstance(x, LazyLogits)
            or x.form not in ("logits", "log_p", "p")
            or not isinstance(dim, int)
            or not is_last(dim, x)
        ):
            return NotImplemented
        found = x.product.argmax()
        return found.unsqueeze(-1) if keep else found

    return argmax


def _gather(func, names: tuple[str, str] = ("dim", "index")):
    """torch.gather(input, dim, index), and torch.take_along_dim(input, indices, dim) where it is the same."""

    def gather(args, kwargs):
        x, given = args[0], dict(zip(names, args[1:])) | kwargs
        dim, index = given.get("dim"), given.get(names[names[0] == "dim"])
        kind = {"logits": "selected", "log_p": "log_prob", "-log_p": "log_prob"}.get(getattr(x, "form", ""))
        if (
            kind is None
            or not isinstance(x, LazyLogits)
            or dim is None
            or not is_last(dim, x)
            or set(given) != set(names)
            or len(args) > 3
        ):
            return NotImplemented
        if (
            type(index) is not T
            or index.dtype != torch.int64
            or index.shape != (*x.shape[:-1], 1)
            or index.device != x.device
        ):
            return NotImplemented
        return rows(x.product, kind, index.shape, x.dtype, (func, args, kwargs), index.reshape(-1), x.form == "-log_p")

    return gather


def _loss(func, form: str):
    """F.cross_entropy(input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing);
    F.nll_loss without the last."""

    def loss(args, kwargs):
        names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
        given = dict(zip(names, args)) | kwargs
        x, target = given.get("input"), given.get("target")
        if (
            not _is(x, form)
            or x.dim() > 2
            or any(given.get(n) is not None for n in ("weight", "size_average", "reduce"))
        ):
            return NotImplemented
        if (
            type(target) is not T
            or target.dtype != torch.int64
            or target.shape != x.shape[:-1]
            or target.device != x.device
        ):
            return NotImplemented
        reduction, smoothing = given.get("reduction", "mean"), given.get("label_smoothing", 0.0)
        if reduction not in ("mean", "sum", "none"):
            return NotImplemented
        out = x.product.cross_entropy(target, reduction, given.get("ignore_index", -100), smoothing)
        zeros = torch.zeros(1, dtype=torch.int64, device=x.device)
        return answered(out.to(dtype_of(func, x, zeros)), x.product.family, (func, args, kwargs))

    return loss


def _table() -> dict:
    n = torch.nn.functional
    table = {T.__getitem__: getitem, T.contiguous: contiguous, T.clone: clone, torch.clone: clone}
    table |= {f: _times(f) for f in (T.mul, T.__mul__, T.__rmul__, torch.mul, torch.multiply, T.multiply)}
    table |= {
        f: _over(f) for f in (T.div, T.__truediv__, torch.div, torch.true_divide, T.true_divide, T.divide, torch.divide)
    }
    table |= {f: _tanh(f) for f in (T.tanh, torch.tanh, n.tanh)}
    table |= {
        T.float: _cast(T.float, torch.float32),
        T.half: _cast(T.half, torch.float16),
        T.bfloat16: _cast(T.bfloat16, torch.bfloat16),
    }
    table |= {f: _cast(f) for f in (T.to, T.type, T.type_as)} | {T.double: _cast(T.double, torch.float64)}
    table |= {f: _detach(f) for f in (T.detach, torch.detach)}
    table |= {f: _reshape(f) for f in (T.view, T.reshape, torch.reshape, T.flatten, torch.flatten)}
    table |= {f: _reshape(f) for f in (T.squeeze, torch.squeeze, T.unsqueeze, torch.unsqueeze)}
    table |= {f: parts(f) for f in (T.split, torch.split, T.chunk, torch.chunk, T.unbind, torch.unbind)}
    table |= {f: _softmax(f, "log_p") for f in (n.log_softmax, torch.log_softmax, T.log_softmax)}
    table |= {f: _softmax(f, "p") for f in (n.softmax, torch.softmax, T.softmax)}
    table |= {f: _negative(f) for f in (T.neg, T.__neg__, torch.neg)}
    table |= {f: _exp(f) for f in (T.exp, torch.exp)}
    table |= {f: _logsumexp(f) for f in (T.logsumexp, torch.logsumexp)}
    table |= {f: _sum(f) for f in (T.sum, torch.sum)}
    table |= {f: _mean(f) for f in (T.mean, torch.mean)}
    table |= {f: _argmax(f) for f in (T.argmax, torch.argmax)}
    table |= {f: _gather(f) for f in (T.gather, torch.gather)}
    table |= {f: _gather(f, ("indices", "dim")) for f in (T.take_along_dim, torch.take_along_dim)}
    table |= {n.cross_entropy: _loss(n.cross_entropy, "logits"), n.nll_loss: _loss(n.nll_loss, "log_p")}
    return table | {f: _first(table[f], record) if f in table else record for f, record in rowwise_answers().items()}


def _first(known, otherwise):
    def answer(args, kwargs):
        out = known(args, kwargs)
        return otherwise(args, kwargs) if out is NotImplemented else out

    return answer


LazyLogits.answers = _table()
LazyTensor.on_the_graph = autograd_answers()
