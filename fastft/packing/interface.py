"""A model's attention modules, taught to read a `DocumentMask`.

An attention finds its function in its module's global `ALL_ATTENTION_FUNCTIONS`, by the name in the configuration. A
new name would be registered for the whole process, would be in every saved or pickled configuration, and changes the
loss of families that read it. So the name stays. The attention's forward is rebound on the instance
(swapping/rebind.py) over globals in which that registry hands out stock's function behind one question: is the mask a
`DocumentMask`? Where it is not, stock's function is called with what it was given."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers.utils.generic import GeneralInterface

from fastft.packing.attention import settings_of
from fastft.packing.backends import run
from fastft.packing.documents import DocumentMask
from fastft.swapping.rebind import innermost, rebind
from fastft.swapping.swap import install, is_fast, obstacle, order, order_of, slot_of, stock_class
from fastft.swapping.walk import modules_of

KIND = "packed attention"
REGISTRY = "ALL_ATTENTION_FUNCTIONS"


def attend(
    stock: Callable,
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask=None,
    *args,
    **kwargs,
):
    """Attention within documents where the mask is a DocumentMask, else `stock` as it was called."""
    if isinstance(attention_mask, DocumentMask):
        form = settings_of(module, *args, head_dim=query.shape[-1], **kwargs)
        return run(query, key, value, attention_mask.documents, form), None
    return stock(module, query, key, value, attention_mask, *args, **kwargs)


class Registry:
    """What `ALL_ATTENTION_FUNCTIONS` means in a rebound forward."""

    def __init__(self, stock: GeneralInterface):
        self.stock = stock

    def get_interface(self, name: str, default: Callable) -> Callable:
        stock: Any = self.stock
        return functools.partial(attend, stock.get_interface(name, default))

    def __getitem__(self, name: str) -> Callable:
        return functools.partial(attend, self.stock[name])

    def __contains__(self, name: object) -> bool:
        return name in self.stock


@order(89)
class PackedAttention:
    """Root of the mixins whose forward is the one that stood there, over other globals. It stands in front of what else
    rebinds the whole forward (the rotary embedding), behind what calls the next one."""


_MIXINS: weakref.WeakKeyDictionary[Callable, type] = weakref.WeakKeyDictionary()


def _mixin(module: nn.Module) -> type:
    slot = slot_of(module)
    behind = (
        []
        if slot is None
        else [mixin for mixin, _ in slot.parts.values() if order_of(mixin) > order_of(PackedAttention)]
    )
    forward = min(behind, key=order_of, default=stock_class(module)).forward
    if forward not in _MIXINS:
        names = {REGISTRY: Registry(innermost(forward).__globals__[REGISTRY])}
        _MIXINS[forward] = type("FastPackedAttention", (PackedAttention,), {"forward": rebind(forward, names)})
    return _MIXINS[forward]


def attentions(owner: nn.Module) -> Iterator[nn.Module]:
    """Modules below `owner` whose forward looks into the attention interface."""
    classes: dict[type, bool] = {}
    for module in modules_of(owner):
        cls = type(module)
        if cls not in classes:
            classes[cls] = _looks_into_it(stock_class(module).forward)
        if classes[cls]:
            yield module


def _looks_into_it(forward: Callable) -> bool:
    inner: Any = innermost(forward)
    code = getattr(inner, "__code__", None)
    return (
        code is not None and REGISTRY in code.co_names and isinstance(inner.__globals__.get(REGISTRY), GeneralInterface)
    )


def teach(module: nn.Module) -> str:
    """Swap one attention for `PackedAttention`. Empty, or why its class cannot be swapped; its other swaps stay."""
    if is_fast(module, KIND):
        return ""
    why = obstacle(module)
    if not why:
        try:
            install(module, KIND, _mixin(module), None)
        except TypeError as e:  # a decorator hides the forward
            return str(e)
    return why
