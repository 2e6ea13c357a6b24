"""The type of lazy logits, and the calls that keep them lazy: scaling, caps, casts, positions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch

from fastft.compat.torch_private import without_overrides
from fastft.lm_head.lazy_tensor import LazyTensor, Node, argument, is_last
from fastft.lm_head.product import Product, autocast_state

SUMS = {
    "p log_p": ("entropy", True),
    "p z": ("expected", False),
    "log_p": ("sum of log_p", False),
    "-log_p": ("sum of log_p", True),
}

T = torch.Tensor
DTYPES: dict = {}


class LazyLogits(LazyTensor):
    """(*rows, V). `node.meaning` is (product, form): form "logits" z, "log_p" log_softmax(z), "-log_p", "p" softmax(z),
    "p log_p", "p z"."""

    @property
    def product(self) -> Product:
        return self.node.meaning[0]

    @property
    def form(self) -> str:
        return self.node.meaning[1]


def _logits(product: Product, form: str, dtype: torch.dtype, call: tuple, view: bool = False) -> LazyLogits:
    """view: the result may share the memory of what it is made from."""
    product = product if torch.is_grad_enabled() else product.detached()
    # without a graph, slices are taken before the product; with one, stock's order keeps what its views and writes mean
    alone = product.logits if form == "logits" and not product.requires_grad else None
    node = Node(call[0], call[1], call[2], product.family, (product, form), alone, True)
    node.view = view
    return LazyLogits.make(node, product.shape, dtype, call)


def dtype_of(func, x: torch.Tensor, *args, **kwargs) -> torch.dtype:
    """The dtype of func(x, ...) under the present autocast state, asked of two numbers once."""
    key = (func, x.dtype, *autocast_state(x.device), tuple(kwargs.items()))
    if key not in DTYPES:
        with torch.no_grad():
            DTYPES[key] = func(torch.zeros((1, 2), dtype=x.dtype, device=x.device), *args, **kwargs).dtype
    return DTYPES[key]


def _is(x, form: str = "logits") -> bool:
    return isinstance(x, LazyLogits) and x.form == form


def _number(s) -> float | None:
    """A finite factor other than 0 that is known on the host and has no gradient."""
    if isinstance(s, T):
        if s.dim() or s.requires_grad or type(s) is not T or s.device.type != "cpu" or not s.is_floating_point():
            return None
        s = s.item()
    if isinstance(s, bool) or not isinstance(s, (int, float)) or s == 0 or not math.isfinite(s):
        return None
    return float(s)


def _times(func):
    def times(args, kwargs):
        if kwargs or len(args) != 2:
            return NotImplemented
        x, s = args if isinstance(args[0], LazyLogits) else args[::-1]
        if isinstance(s, LazyLogits):
            return _weighted(func, args)
        s = _number(s)
        if s is None or not _is(x):
            return NotImplemented
        return _logits(x.product.scaled(s, lambda z, s=s: func(z, s)), "logits", x.dtype, (func, args, kwargs))

    return times


def _weighted(func, args):
    """p log p and p z, on the way to an entropy."""
    x, y = args if args[0].form == "p" else args[::-1]
    form = {"log_p": "p log_p", "logits": "p z"}.get(y.form)
    if x.form != "p" or form is None or not x.product.same(y.product):
        return NotImplemented
    return _logits(x.product, form, torch.promote_types(x.dtype, y.dtype), (func, args, {}))


def _over(func):
    def over(args, kwargs):
        s = _number(args[1]) if len(args) == 2 and not kwargs else None
        if s is None or not _is(args[0]):
            return NotImplemented
        return _logits(
            args[0].product.scaled(1 / s, lambda z: func(z, s)), "logits", args[0].dtype, (func, args, kwargs)
        )

    return over


def _tanh(func):
    def tanh(args, kwargs):
        x = args[0]
        if kwargs or not _is(x) or x.product.tanh:
            return NotImplemented
        return _logits(x.product.capped(func), "logits", x.dtype, (func, args, kwargs))

    return tanh


def _cast(func, fixed: torch.dtype | None = None):
    def cast(args, kwargs):
        x, dtype = args[0], fixed
        if not isinstance(x, LazyLogits):
            return NotImplemented
        for a in [*args[1:], *kwargs.values()]:
            if isinstance(a, torch.dtype):
                dtype = a
            elif isinstance(a, T):
                if a.device != x.device:
                    return NotImplemented
                dtype = a.dtype
            elif isinstance(a, (str, torch.device)):
                if torch.device(a) != x.device and torch.device(a).type + ":0" != str(x.device):
                    return NotImplemented
            elif not isinstance(a, bool) and a is not None and a is not torch.preserve_format:
                return NotImplemented
        dtype = dtype or x.dtype
        if not dtype.is_floating_point or (dtype == torch.float64) != (x.product.compute == torch.float64):
            return NotImplemented
        if dtype == x.dtype and not kwargs.get("copy"):
            return x
        rest = tuple(a for a in args[1:])
        return _logits(x.product.cast(lambda z: func(z, *rest, **kwargs)), x.form, dtype, (func, args, kwargs))

    return cast


def _detach(func):
    def detach(args, kwargs):
        with torch.no_grad():
            return _logits(args[0].product, args[0].form, args[0].dtype, (func, args, kwargs), view=True)

    return detach


def clone(args, kwargs):
    """A copy of lazy logits is as lazy as they are."""
    x = args[0]
    if not isinstance(x, LazyLogits):
        return NotImplemented
    call = (T.clone, args, kwargs)
    if torch.is_grad_enabled() or not x.requires_grad:
        return _logits(x.product, x.form, x.dtype, call)
    node = Node(call[0], call[1], call[2], x.product.family, (x.product, x.form), None, True)
    node.apart = True
    return LazyLogits.make(node, x.shape, x.dtype, call)


def _at(x: LazyLogits, hidden: torch.Tensor, call: tuple, part: tuple[int, int] | None = None) -> LazyLogits:
    return _logits(x.product.at(hidden, part), x.form, x.dtype, call, view=True)


def _same_rows(x: LazyLogits, hidden: torch.Tensor, call: tuple) -> LazyLogits:
    """All rows in their order, in another shape: what is known of the product stays known."""
    return _logits(x.product.reshaped(hidden), x.form, x.dtype, call, view=True)


def getitem(args, kwargs):
    """A selection of positions keeps the logits lazy; one of vocabulary entries does not."""
    x, index = args
    if not isinstance(x, LazyLogits):
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    used = [
        i.dim() if isinstance(i, T) and i.dtype == torch.bool else 0 if i is None or i is Ellipsis else 1 for i in index
    ]
    if (
        any(isinstance(i, (bool, LazyLogits, list)) for i in index)
        or sum(i is Ellipsis for i in index) > 1
        or sum(used) > x.dim()
    ):
        return NotImplemented
    ellipsis = next((n for n, i in enumerate(index) if i is Ellipsis), None)
    takes_last = sum(used) == x.dim() or (ellipsis is not None and sum(used[ellipsis + 1 :]) > 0)
    if takes_last:
        last = index[-1]
        if not isinstance(last, slice) or last.indices(x.shape[-1]) != (0, x.shape[-1], 1):
            return NotImplemented
        index = (*index[:-1], slice(None))
    if index and index[-1] is None and not takes_last and (ellipsis is not None or sum(used) == x.dim()):
        return NotImplemented  # a new last dimension
    hidden = x.product.hidden[index]
    if hidden.shape[-1:] != x.product.hidden.shape[-1:] or hidden.dim() < 1:
        return NotImplemented
    part = None
    if isinstance(args[1], (int, slice)) and x.dim() > 1:
        n, each = x.shape[0], x.product.rows[1:].numel()
        start, stop, step = args[1].indices(n) if isinstance(args[1], slice) else (args[1] % n, args[1] % n + 1, 1)
        part = (start * each, max(start, stop) * each) if step == 1 else None
    return _at(x, hidden, (T.__getitem__, args, kwargs), part)


def _reshape(func):
    def reshape(args, kwargs):
        x = args[0]
        if not isinstance(x, LazyLogits):
            return NotImplemented
        with without_overrides():
            probe = torch.empty(x.shape, dtype=torch.float32, device="meta")
            probe = func(probe, *args[1:], **kwargs)
        if (
            not isinstance(probe, T)
            or probe.dtype != torch.float32
            or probe.dim() == 0
            or probe.shape[-1] != x.shape[-1]
            or not x.numel()
        ):
            return NotImplemented
        return _same_rows(
            x, x.product.hidden.reshape(*probe.shape[:-1], x.product.hidden.shape[-1]), (func, args, kwargs)
        )

    return reshape


def contiguous(args, kwargs):
    """What was computed lies in one piece: it is returned itself. A view may not, and what stock makes of it is
    recorded, as a later call may ask for memory in one piece."""
    x = args[0]
    if not isinstance(x, LazyLogits):
        return NotImplemented
    return _logits(x.product, x.form, x.dtype, (T.contiguous, args, kwargs), view=True) if x.node.view else x


def parts(func):
    """split, chunk, unbind along a dimension of positions."""

    def split(args, kwargs):
        x = args[0]
        dim: Any = argument(args, kwargs, 1 if func in (T.unbind, torch.unbind) else 2, "dim", 0)
        if not isinstance(x, LazyLogits) or is_last(dim, x):
            return NotImplemented
        hiddens = func(x.product.hidden, *args[1:], **kwargs)
        each = x.product.rows[1:].numel()
        sizes = [h.shape[0] * each if h.dim() == x.dim() else each for h in hiddens]
        ends = list(itertools.accumulate(sizes))
        pick = lambda z, *rest, i, **kw: func(z, *rest, **kw)[i]
        return tuple(
            _at(x, h, (pick, args, {**kwargs, "i": i}), (end - size, end) if dim in (0, -x.dim()) else None)
            for i, (h, size, end) in enumerate(zip(hiddens, sizes, ends))
        )

    return split
