"""Swap on the instance, reversibly.

`install(module, mixin, state)` sets `module.__class__` to a dynamic subclass (mixins..., stock class): parameters,
names, state_dict, isinstance, hooks stay as they are, and so do the class's name and every attribute that can be seen
on the instance (libraries match layers by class name, wrappers forward the attributes of what they wrap). What a mixin
needs to know lies in one plain entry of the instance's __dict__ (`KEY`), a `Slot`, which deepcopy carries along and
pickling drops (a pickled model is a stock model: patch it again after loading), as does copy.copy, whose result shares
its parts with the original."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import functools
import inspect
import sys
import types
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from fastft.compat.accelerate_private import OLD_FORWARD
from fastft.swapping.walk import modules_of

KEY = "_fastft"

if TYPE_CHECKING:  # a mixin's methods run on an instance of the stock class, a module
    Replacement = nn.Module
else:
    Replacement = object

# Facts about a mixin, kept beside it: on the class they would be attributes of every swapped module, and of every
# wrapper around one.
_ORDERS: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()
_FUNCTIONS: weakref.WeakKeyDictionary[type, tuple[Callable, ...]] = weakref.WeakKeyDictionary()


def order(n: int) -> Callable[[type], type]:
    """Decorator of a mixin: where it stands among those of one module. Lower runs outermost; 0 where nothing is
    said."""

    def mark(mixin: type) -> type:
        _ORDERS[mixin] = n
        return mixin

    return mark


def order_of(mixin: type) -> int:
    """A mixin's place among those of one instance: lower ones run first."""
    return next((_ORDERS[c] for c in mixin.__mro__ if c in _ORDERS), 0)


def counts_itself(mixin: type, functions: tuple[Callable, ...]) -> None:
    """The free functions that `mixin`'s forward calls in the place of stock's, each of which counts in `.fallbacks`."""
    _FUNCTIONS[mixin] = functions


def functions_of(mixin: type) -> tuple[Callable, ...]:
    """The rebound free functions of a mixin, which count their fallbacks themselves."""
    return _FUNCTIONS.get(mixin, ())


@dataclass
class Slot:
    """What one instance carries while swapped: its stock class, and per kind of swap the mixin and its state. cls: the
    class that was set last; somebody may have derived another from it since (FSDP2 does). owner: the instance; a copy
    of its __dict__ (a DataParallel replica's) holds the same slot."""

    stock: type
    parts: dict[str, tuple[type, object]] = field(default_factory=dict)
    fallbacks: Counter = field(default_factory=Counter)
    old_forward: object = None  # Accelerate's device-map hook keeps the bound stock forward here
    cls: type | None = None
    owner: Callable[[], nn.Module | None] = lambda: None

    def state(self, kind: str) -> Any:
        return self.parts[kind][1]


class _New:
    """Makes the instance of a copy: of the swapped class in a deepcopy, of the stock class where a pickle is read, by
    the standard library."""

    def __init__(self, cls: type):
        self.cls = cls

    def __call__(self) -> nn.Module:
        return object.__new__(self.cls)

    def __reduce__(self):
        return functools.partial, (copyreg.__dict__["_reconstructor"], _behind_fast(self.cls), object, None)


class _State(dict):
    """An instance's attributes on the way into a copy; a pickle holds them without the slot."""

    def __deepcopy__(self, memo):
        return {k: copy.deepcopy(v, memo) for k, v in self.items()}

    def __reduce__(self):
        return dict, (), None, None, iter([(k, v) for k, v in self.items() if k != KEY])


def _behind_fast(cls: type) -> type:
    return cls.__mro__[cls.__mro__.index(Fast) + 1]


class Fast:
    """Root of all mixins. Lowest in the dynamic class, directly in front of the stock class. It defines what every
    nn.Module defines, and nothing else: a wrapper's __getattr__ would hand on a __deepcopy__, and copy the module
    instead of the wrapper."""

    def __reduce_ex__(self, protocol):
        get = getattr(self, "__getstate__", None)
        state = self.__dict__ if get is None else get()
        return _New(type(self)), (), _State(state) if isinstance(state, dict) else state

    def __setstate__(self, state):
        slot = state.get(KEY) if isinstance(state, dict) and not isinstance(state, _State) else None
        if slot is not None:
            slot.owner = weakref.ref(self)
            behind: Any = super()
            behind.__setstate__(state)
            return
        self.__class__ = _behind_fast(type(self))
        self.__setstate__({k: v for k, v in state.items() if k != KEY} if isinstance(state, dict) else state)


# Weak: a class lives as long as an instance of it does. A mixin made for one call (the observation's) may hold the
# whole model.
_CLASSES: weakref.WeakValueDictionary[tuple[type, ...], type] = weakref.WeakValueDictionary()


def _signed(forward: types.FunctionType, stock: type) -> types.FunctionType:
    """A mixin's forward, which takes anything, under the signature of the stock forward in whose place it runs."""
    new = types.FunctionType(
        forward.__code__, forward.__globals__, forward.__name__, forward.__defaults__, forward.__closure__
    )
    new.__kwdefaults__, new.__doc__, new.__qualname__ = (
        forward.__kwdefaults__,
        stock.forward.__doc__,
        forward.__qualname__,
    )
    new.__signature__ = inspect.signature(stock.forward)
    return new


def _dynamic(stock: type, mixins: tuple[type, ...]) -> type:
    key = (stock, *mixins)
    cls = _CLASSES.get(key)
    if cls is None:
        forward = next((m.__dict__["forward"] for m in mixins if "forward" in m.__dict__), None)
        body = {"__module__": stock.__module__, "__qualname__": stock.__qualname__, "__doc__": stock.__doc__}
        if isinstance(forward, types.FunctionType) and not hasattr(forward, "__wrapped__"):
            body["forward"] = _signed(forward, stock)
        cls = _CLASSES[key] = type(stock.__name__, (*mixins, Fast, stock), body)
    return cls


def slot_of(module: nn.Module) -> Slot | None:
    """What an instance carries while it is swapped; None for a stock one."""
    return module.__dict__.get(KEY)


def state_of(module: nn.Module, kind: str) -> Any:
    """What the swap of this kind keeps on the instance. The instance must be swapped under `kind`."""
    slot = slot_of(module)
    assert slot is not None
    return slot.state(kind)


def swapped_in(root: nn.Module) -> list[nn.Module]:
    """The modules of `root` that are swapped under any kind."""
    return [m for m in modules_of(root) if KEY in m.__dict__]


def is_fast(module: nn.Module, kind: str) -> bool:
    """Is this instance swapped under `kind`?"""
    slot = slot_of(module)
    return slot is not None and kind in slot.parts


def stock_class(module: nn.Module) -> type:
    """The class that the instance has without swaps, and without what FSDP2 derives from it where it wraps a module:
    what that computes is the same."""
    slot = module.__dict__.get(KEY)
    cls = slot.stock if slot is not None else type(module)
    if not cls.__name__.startswith("FSDP"):
        return cls
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return cls if fsdp is None else next(c for c in cls.__mro__ if not issubclass(c, fsdp))


def new_instance(module: nn.Module) -> nn.Module:
    """An empty instance of the module's stock class."""
    return object.__new__(stock_class(module))


def obstacle(module: nn.Module) -> str:
    """Why this instance's class cannot be swapped: empty when it can."""
    forward = module.__dict__.get("forward")
    if forward is not None and OLD_FORWARD not in module.__dict__:
        return f"its forward is bound on the instance ({getattr(forward, '__qualname__', type(forward).__name__)})"
    cls = stock_class(module)
    if "__slots__" in cls.__dict__:
        return f"{cls.__name__} has __slots__"
    return ""


def _rederived(now: type, old: type, new: type) -> type:
    """What somebody made of `old` by deriving from it, made of `new`."""
    if now is old:
        return new
    bases = tuple(_rederived(b, old, new) if issubclass(b, old) else b for b in now.__bases__)
    return type(now)(now.__name__, bases, {k: v for k, v in vars(now).items() if k not in ("__dict__", "__weakref__")})


def _set_class(module: nn.Module, slot: Slot) -> None:
    parts = list(slot.parts.values())
    if len(parts) > 1:
        parts.sort(key=lambda part: order_of(part[0]))
    mixins = tuple([mixin for mixin, _ in parts])
    cls = _dynamic(slot.stock, mixins) if mixins else slot.stock
    old = module.__dict__.get(OLD_FORWARD)
    module.__class__ = _rederived(type(module), slot.cls or slot.stock, cls)
    slot.cls = cls
    if old is not None and getattr(old, "__self__", None) is module:
        if slot.old_forward is None:
            slot.old_forward = old
        module.__dict__[OLD_FORWARD] = types.MethodType(cls.forward, module) if mixins else slot.old_forward


def install(module: nn.Module, kind: str, mixin: type, state: object) -> None:
    """Give the instance `mixin` under the name `kind`, beside what it has already (`order` says which runs
    outermost)."""
    if hasattr(mixin, "ORDER"):
        raise TypeError(
            f"install: want the order of {mixin.__name__} by the decorator `order`: an attribute would be every "
            "swapped module's"
        )
    slot = slot_of(module)
    if slot is None:
        slot = module.__dict__[KEY] = Slot(type(module), owner=weakref.ref(module))
    slot.parts[kind] = (mixin, state)
    _set_class(module, slot)


def uninstall(module: nn.Module, kind: str | None = None) -> None:
    """Take one kind of swap, or all, off the instance; the last one restores class and __dict__ exactly. A state with a
    method `dissolve` is told."""
    slot = slot_of(module)
    if slot is None:
        return
    removed = list(slot.parts) if kind is None else [kind]
    states: list[Any] = [slot.parts.pop(k)[1] for k in removed if k in slot.parts]
    if not isinstance(module, Fast):
        raise RuntimeError(
            f"unpatch: the class of a {type(module).__name__} was changed by someone else after patching"
        )
    _set_class(module, slot)
    if not slot.parts:
        del module.__dict__[KEY]
    for state in states:
        if hasattr(state, "dissolve"):
            state.dissolve()


@contextlib.contextmanager
def as_stock(model: nn.Module) -> Iterator[None]:
    """Every module of `model` is of its stock class, without its slot, until the end."""
    swapped = [(m, type(m), m.__dict__[KEY], m.__dict__.get(OLD_FORWARD)) for m in swapped_in(model)]
    for module, _, slot, old in swapped:
        module.__class__ = slot.stock
        del module.__dict__[KEY]
        if old is not None and slot.old_forward is not None:
            module.__dict__[OLD_FORWARD] = slot.old_forward
    try:
        yield
    finally:
        for module, cls, slot, old in swapped:
            module.__class__ = cls
            module.__dict__[KEY] = slot
            if old is not None:
                module.__dict__[OLD_FORWARD] = old
