"""Swap on the instance, reversibly.

`install(module, mixin, state)` sets `module.__class__` to a dynamic subclass (mixins..., stock class): parameters, names, state_dict,
isinstance, hooks stay as they are. What a mixin needs to know lies in one plain entry of the instance's __dict__ (`KEY`), a `Slot`, which
deepcopy carries along and pickling drops (a pickled model is a stock model: patch it again after loading).
"""

from __future__ import annotations

import copy
import copyreg
import inspect
import types
import weakref
from collections import Counter
from dataclasses import dataclass, field

from torch import nn

KEY = "_fastft"


@dataclass
class Slot:
    """What one instance carries while swapped: its stock class, and per kind of swap the mixin and its state."""

    stock: type
    parts: dict[str, tuple[type, object]] = field(default_factory=dict)
    fallbacks: Counter = field(default_factory=Counter)
    old_forward: object = None  # Accelerate's device-map hook keeps the bound stock forward here

    def state(self, kind: str):
        return self.parts[kind][1]


class Fast:
    """Root of all mixins. Lowest in the dynamic class, directly in front of the stock class."""

    def __deepcopy__(self, memo):
        cls = type(self)
        new = cls.__new__(cls)
        memo[id(self)] = new
        for k, v in self.__dict__.items():
            new.__dict__[k] = copy.deepcopy(v, memo)
        return new

    def __reduce_ex__(self, protocol):
        slot: Slot = self.__dict__[KEY]
        state = {k: v for k, v in self.__dict__.items() if k != KEY}
        return copyreg._reconstructor, (slot.stock, object, None), state  # the standard library alone unpickles it


# Weak: a class lives as long as an instance of it does. A mixin made for one call (the observation's) may hold the whole model.
_CLASSES: weakref.WeakValueDictionary[tuple[type, ...], type] = weakref.WeakValueDictionary()


def _signed(forward: types.FunctionType, stock: type) -> types.FunctionType:
    """A mixin's forward, which takes anything, under the signature of the stock forward in whose place it runs."""
    new = types.FunctionType(forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__)
    new.__kwdefaults__, new.__doc__, new.__qualname__ = forward.__kwdefaults__, stock.forward.__doc__, forward.__qualname__
    new.__signature__ = inspect.signature(stock.forward)
    return new


def _dynamic(stock: type, mixins: tuple[type, ...]) -> type:
    key = (stock, *mixins)
    cls = _CLASSES.get(key)
    if cls is None:
        forward = next((m.__dict__["forward"] for m in mixins if "forward" in m.__dict__), None)
        body = {"__module__": stock.__module__, "__qualname__": f"Fast{stock.__qualname__}", "__doc__": stock.__doc__}
        if isinstance(forward, types.FunctionType) and not hasattr(forward, "__wrapped__"):
            body["forward"] = _signed(forward, stock)
        cls = _CLASSES[key] = type(f"Fast{stock.__name__}", (*mixins, Fast, stock), body)
    return cls


def slot_of(module: nn.Module) -> Slot | None:
    return module.__dict__.get(KEY)


def is_fast(module: nn.Module, kind: str) -> bool:
    slot = slot_of(module)
    return slot is not None and kind in slot.parts


def stock_class(module: nn.Module) -> type:
    slot = slot_of(module)
    return slot.stock if slot is not None else type(module)


def obstacle(module: nn.Module) -> str:
    """Why this instance's class cannot be swapped: empty when it can."""
    forward = module.__dict__.get("forward")
    if forward is not None and "_old_forward" not in module.__dict__:
        return f"its forward is bound on the instance ({getattr(forward, '__qualname__', type(forward).__name__)})"
    cls = stock_class(module)
    if "__slots__" in cls.__dict__:
        return f"{cls.__name__} has __slots__"
    return ""


def _set_class(module: nn.Module, slot: Slot) -> None:
    mixins = tuple(mixin for _, (mixin, _) in sorted(slot.parts.items(), key=lambda kv: getattr(kv[1][0], "ORDER", 0)))
    cls = _dynamic(slot.stock, mixins) if mixins else slot.stock
    old = module.__dict__.get("_old_forward")
    module.__class__ = cls
    if old is not None and getattr(old, "__self__", None) is module:
        if slot.old_forward is None:
            slot.old_forward = old
        module.__dict__["_old_forward"] = types.MethodType(cls.forward, module) if mixins else slot.old_forward


def install(module: nn.Module, kind: str, mixin: type, state: object) -> None:
    """Give the instance `mixin` under the name `kind`, beside what it has already. Lower `mixin.ORDER` runs outermost."""
    slot = slot_of(module)
    if slot is None:
        slot = module.__dict__[KEY] = Slot(type(module))
    slot.parts[kind] = (mixin, state)
    _set_class(module, slot)


def uninstall(module: nn.Module, kind: str | None = None) -> None:
    """Take one kind of swap, or all, off the instance; the last one restores class and __dict__ exactly."""
    slot = slot_of(module)
    if slot is None:
        return
    if kind is None:
        slot.parts.clear()
    else:
        slot.parts.pop(kind, None)
    if not isinstance(module, Fast):
        raise RuntimeError(f"unpatch: the class of a {type(module).__name__} was changed by someone else after patching")
    _set_class(module, slot)
    if not slot.parts:
        del module.__dict__[KEY]
