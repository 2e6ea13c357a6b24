"""Exchange a free function that a forward calls, for one class of instances only.

A forward that calls `apply_rotary_pos_emb(q, k, cos, sin)` finds it in its module's globals. `rebind` makes the same
code object over a copied globals dict in which that one name means something else. No source text is read, the original
function and module are untouched. Decorated forwards (`functools.wraps`, so `__wrapped__`) are rebuilt around the
rebound inner function."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import torch


def innermost(fn: Any) -> Callable:
    """The function inside decorators that keep it as `__wrapped__`."""
    while hasattr(fn, "__wrapped__"):
        fn = fn.__wrapped__
    return fn


def global_calls(fn: Callable) -> dict[str, Callable]:
    """The plain Python functions that fn's code (inside all decorators) can reach by a global name."""
    inner = innermost(fn)
    if not isinstance(inner, types.FunctionType):
        return {}
    found = {n: inner.__globals__.get(n) for n in inner.__code__.co_names}
    return {n: f for n, f in found.items() if isinstance(f, types.FunctionType)}


def _copy(fn: types.FunctionType, globals_: dict, closure) -> types.FunctionType:
    new = types.FunctionType(fn.__code__, globals_, fn.__name__, fn.__defaults__, closure)
    new.__kwdefaults__ = fn.__kwdefaults__
    new.__dict__.update(fn.__dict__)
    new.__qualname__, new.__module__, new.__doc__ = fn.__qualname__, fn.__module__, fn.__doc__
    new.__annotations__ = fn.__annotations__
    return new


def _globals(fn: types.FunctionType, names: Mapping[str, Any]) -> dict:
    """Without `__name__`: by that, torch.compile would guard (and fail on) what the module itself has under these
    names."""
    return {k: v for k, v in fn.__globals__.items() if k != "__name__"} | dict(names)


def over_globals(fn: types.FunctionType, names: Mapping[str, Any]) -> types.FunctionType:
    """A copy of fn itself, whatever it claims to wrap, in which the global names given mean the objects given."""
    return _copy(fn, _globals(fn, names), fn.__closure__)


def rebind(fn: Callable, names: Mapping[str, Any]) -> Callable:
    """A copy of fn in which the global names given mean the objects given. Raises TypeError for what is no Python
    function, or is wrapped by a decorator that does not keep the inner function in its closure."""
    if not isinstance(fn, types.FunctionType):
        raise TypeError(f"rebind: want a Python function, got {type(fn).__name__}")
    inner = fn.__dict__.get("__wrapped__")
    if inner is None:
        return _copy(fn, _globals(fn, names), fn.__closure__)
    new_inner = rebind(inner, names)
    cells = fn.__closure__ or ()
    closure = tuple(types.CellType(new_inner) if _holds(c, inner) else c for c in cells)
    if not any(_holds(c, inner) for c in cells):
        raise TypeError(f"rebind: a decorator of {fn.__qualname__} hides the function it wraps")
    new: Any = _copy(fn, fn.__globals__, closure)
    new.__wrapped__ = new_inner
    return new


def kept_current(forward: Callable, stock: Callable, names: Mapping[str, Any]) -> Callable:
    """`forward`, which is `rebind(stock, names)`, taking over at every call what somebody has put into the globals of
    stock's module since: under one of `names` too, whose object then counts the call in its `fallbacks`."""
    theirs = innermost(stock).__globals__
    was = {n: theirs[n] for n in _names_in(innermost(stock).__code__) if n in theirs}
    moved: set[str] = set()

    @functools.wraps(forward)
    def current(*args, **kwargs):
        if not torch.compiler.is_compiling():
            for n, before in was.items():
                now = theirs.get(n)
                if now is not before:
                    moved.add(n)
                    if n in names:
                        names[n].fallbacks += 1
                if n in moved:  # asked here: this may have been rebound itself, by another swap
                    innermost(forward).__globals__[n] = names.get(n, now) if now is before else now
        return forward(*args, **kwargs)

    return current


def _names_in(code: types.CodeType) -> set[str]:
    """The names that a function's code, and what is defined inside it, may look up among the globals."""
    inside = (c for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inside))


def _holds(cell: types.CellType, value: object) -> bool:
    try:
        return cell.cell_contents is value
    except ValueError:  # an empty cell
        return False
