"""Rotary embedding: the free function that an attention's forward calls to rotate q and k, exchanged by rebinding.

Any global function with parameters named cos and sin is looked at. What it computes (which halves, which sign, how wide
the tables are) is read off its answers on the shapes that the observation saw; then it is proven, gradients included,
on random, unstructured tables."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastft.patching.kind import Candidate, Context, device_of
from fastft.patching.observe import FunctionCall
from fastft.proving.fingerprint import IdentityKey
from fastft.proving.float64 import float64_reference
from fastft.proving.prove import Proof, prove
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.rebind import global_calls, kept_current, rebind
from fastft.swapping.stock_only import gains_nothing, transformed
from fastft.swapping.swap import Replacement, counts_itself, install, order, stock_class
from fastft_kernels.rotary.rope import rope, rope_single
from fastft_kernels.rotary.rope_kernels import LAYOUTS
from fastft_kernels.runtime.dispatch import wider

KIND = "rotary"
TABLES = ("cos", "sin")
COMPLEX = ("freqs_cis", "freqs_ci")
GUESSES = (
    ((1, 2, 3, 8), (1, 1, 3, 8), (1, 3, 8)),
    ((3, 2, 8), (3, 2, 8), (3, 8)),
)  # q, k, tables: where no call was observed


@dataclass(frozen=True)
class Variant:
    """layout, sign: as in `fastft_kernels.rotary.rope`. rotated: names of the parameters that are rotated. axis: of the
    heads, where the function has no `unsqueeze_dim` of its own. single: one tensor comes back, not a tuple. tables: the
    names of cos and sin, or of one complex table. promotes: wider tables give a wider result."""

    layout: str
    sign: int
    rotated: tuple[str, ...]
    axis: int | None
    single: bool
    tables: tuple[str, ...] = TABLES
    promotes: bool = False

    @property
    def kernel(self) -> str:
        return f"rope({self.layout}{', reversed' if self.sign < 0 else ''}{', single' if self.single else ''})"


def is_rotary(fn: Callable) -> bool:
    """Does a free function look like one that rotates queries and keys (by its parameters' names)?"""
    try:
        names = inspect.signature(fn).parameters
    except (TypeError, ValueError):
        return False
    return (len(names) >= 3 and all(t in names for t in TABLES)) or (
        len(names) >= 2 and any(t in names for t in COMPLEX)
    )


def make_fast(stock: Callable, variant: Variant, always: bool = False) -> Any:
    """The function that takes stock's place: same signature, one launch; hands back to stock what the kernel does not
    take, and, unless `always`, what asks for no gradients on a device without kernels."""
    parameters = inspect.signature(stock).parameters
    names = tuple(parameters)
    known = {*variant.rotated, *variant.tables, "unsqueeze_dim"}
    default_axis = parameters["unsqueeze_dim"].default if "unsqueeze_dim" in parameters else variant.axis

    ordinary = (*variant.rotated, *TABLES)
    in_order = names[:4] == ordinary and all(n in known for n in names)

    def run(*args, **kwargs):
        if not always and not torch.is_grad_enabled() and gains_nothing(args):
            return stock(*args, **kwargs)
        xs: Any
        cos: Any
        sin: Any
        given: dict[str, Any]
        if in_order and len(args) == 4 and (not kwargs or tuple(kwargs) == ("unsqueeze_dim",)):
            xs, cos, sin, extra, given = args[:2], args[2], args[3], False, kwargs
        else:
            given = dict(zip(names, args))
            given.update(kwargs)
            xs = [given.get(n) for n in variant.rotated]
            cos, sin = _cos_sin([given.get(n) for n in variant.tables])
            extra = any(v is not None for k, v in given.items() if k not in known)
        if not extra and not transformed() and _are_tensors(*xs, cos, sin):
            out = wider(xs[0].dtype, cos.dtype) if variant.promotes else None
            axis = given.get("unsqueeze_dim", default_axis)
            missing = xs[0].dim() - cos.dim() - (axis is not None)
            if missing > 0 and (axis is None or axis >= 0):  # tables without the leading dims: they broadcast
                cos, sin = (t[(None,) * missing] for t in (cos, sin))
                axis = axis if axis is None else axis + missing
            settings: dict[str, Any] = dict(layout=variant.layout, sign=variant.sign, unsqueeze_dim=axis, out_dtype=out)
            try:
                if len(xs) == 2:
                    return rope(xs[0], xs[1], cos, sin, **settings)
                y = rope_single(xs[0], cos, sin, **settings)
                return y if variant.single else (y,)
            except ValueError:  # shapes that the kernel does not take, or tables that learn
                pass
        fast.fallbacks += 1
        return stock(*args, **kwargs)

    fast: Any = run  # counts its own fallbacks, as one serves all modules of a class
    fast.fallbacks = 0
    fast.__wrapped__ = stock
    fast.__name__, fast.__qualname__, fast.__doc__ = stock.__name__, stock.__qualname__, stock.__doc__
    return fast


def _cos_sin(tables: list[Any]) -> tuple[Any, Any]:
    """(cos, sin) of two tables, or of one complex table that holds both."""
    if len(tables) == 2:
        return tables[0], tables[1]
    t = tables[0]
    return (t.real, t.imag) if isinstance(t, torch.Tensor) and t.is_complex() else (None, None)


def _are_tensors(*values: Any) -> bool:
    for v in values:
        if not isinstance(v, torch.Tensor) or not v.dtype.is_floating_point:
            return False
    return True


def _is_input(value: object) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _tabled(drawn: torch.Tensor, observed: torch.Tensor) -> torch.Tensor:
    """What was drawn, as the complex numbers that the function wants there."""
    return (
        torch.view_as_complex(drawn.contiguous() if drawn.dtype == torch.float64 else drawn.float())
        if observed.is_complex()
        else drawn
    )


class _Function(nn.Module):
    """A free function as a module, so that the proof can run it: tensors by position, the rest as the observation saw
    them."""

    def __init__(self, fn: Callable, call: FunctionCall):
        super().__init__()
        self.fn, self.args, self.kwargs = fn, call.args, call.kwargs

    def forward(self, *tensors: torch.Tensor):
        rest = iter(tensors)
        take = lambda v: _tabled(next(rest), v) if _is_input(v) else v
        args = [take(v) for v in self.args]
        return self.fn(*args, **{k: take(v) for k, v in self.kwargs.items()})

    def __deepcopy__(self, memo):
        return _Function(self.fn, FunctionCall(self.args, self.kwargs, None))


@order(90)
class RotaryMixin(Replacement):
    """Root of the per-class mixins whose forward is the stock forward over other globals."""


class Rotary:
    """Recognises the free function by which an attention rotates queries and keys."""

    name = KIND
    wants = staticmethod(is_rotary)

    def __init__(self):
        self._mixins: dict = {}
        self._variants: dict = {}
        self._elsewhere: dict | None = None
        self._guesses: dict[Callable, FunctionCall | None] = {}

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        forward = stock_class(module).forward
        functions = {n: f for n, f in global_calls(forward).items() if is_rotary(f)}
        if not functions:
            return None
        found: dict[str, tuple[Callable, Variant, FunctionCall]] = {}
        reasons = []
        for name, fn in functions.items():
            call, note = self._call(module, name, fn, context)
            if call is None:
                reasons.append(f"{name} was not reached by the observation")
                continue
            variant = self._variant(fn, call)
            if isinstance(variant, str):
                reasons.append(f"{name}: {variant}")
                continue
            found[name] = (fn, variant, call)
            if note:
                reasons.append(f"{name}: {note}")
        if not found:
            return "; ".join(reasons)
        key = (stock_class(module), tuple((n, IdentityKey(f), v, _signature(c)) for n, (f, v, c) in found.items()))

        def apply(m: nn.Module) -> None:
            if key not in self._mixins:
                names = {n: make_fast(f, v) for n, (f, v, _) in found.items()}
                self._mixins[key] = type(
                    "FastRotary", (RotaryMixin,), {"forward": kept_current(rebind(forward, names), forward, names)}
                )
                counts_itself(self._mixins[key], tuple(names.values()))
            install(m, KIND, self._mixins[key], None)

        device = device_of(module)

        def proof() -> Proof:
            worst: Proof | None = None
            for fn, variant, call in found.values():
                p = _prove(fn, variant, call, device)
                if not p.ok:
                    return p
                worst = p if worst is None or p.error > worst.error else worst
            assert worst is not None
            return worst

        try:
            rebind(forward, {})
        except TypeError as e:
            return str(e)
        return Candidate(
            ", ".join(v.kernel for _, v, _ in found.values()), key, proof, apply, "; ".join(reasons), device
        )

    def _call(self, module: nn.Module, name: str, fn: Callable, context: Context) -> tuple[FunctionCall | None, str]:
        """The module's own call; else one of another module of its class; else one that was made up, and a note that
        says so."""
        if calls := context.seen.functions.get((module, name)):
            return calls[0], ""
        if self._elsewhere is None:
            self._elsewhere = {(stock_class(m), n): c[0] for (m, n), c in reversed(context.seen.functions.items())}
        if call := self._elsewhere.get((stock_class(module), name)):
            return call, ""
        if fn not in self._guesses:
            self._guesses[fn] = _guess(fn)
        return self._guesses[fn], "proven on shapes of its own, as the observation did not reach it"

    def _variant(self, fn: Callable, call: FunctionCall) -> Variant | str:
        key = (IdentityKey(fn), _signature(call))
        if key not in self._variants:
            self._variants[key] = _recognise(fn, call)
        return self._variants[key]


def _guess(fn: Callable) -> FunctionCall | None:
    """A call with the shapes of an attention's q and k, if the function takes it and gives q and k back in their
    shapes."""
    parameters = inspect.signature(fn).parameters
    required = [
        n
        for n, p in parameters.items()
        if p.default is p.empty and p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)
    ]
    if not all(t in parameters for t in TABLES) or len(required) > 4:
        return None
    rotated = [n for n in required if n not in TABLES] or [n for n in list(parameters)[:2] if n not in TABLES]
    for *xs, table in GUESSES:
        shapes = {**dict(zip(rotated, xs)), **dict.fromkeys(TABLES, table)}
        kwargs = {n: torch.randn(s, generator=torch.Generator().manual_seed(1)) for n, s in shapes.items()}
        try:
            out = fn(**kwargs)
        except Exception as e:  # it wants other shapes: nothing is learned from which error it raises
            not_for_want_of_memory(e)
            continue
        outs = [out] if isinstance(out, torch.Tensor) else list(out)
        if [o.shape for o in outs] == [kwargs[n].shape for n in rotated]:
            return FunctionCall((), kwargs, None)
    return None


def _signature(call: FunctionCall) -> tuple:
    describe = lambda v: (tuple(v.shape), v.dtype) if isinstance(v, torch.Tensor) else repr(v)
    return tuple(map(describe, call.args)), tuple((k, describe(v)) for k, v in call.kwargs.items())


def _inputs(call: FunctionCall, names: tuple[str, ...]) -> list[tuple[str, torch.Tensor]]:
    """The tensors that are drawn anew for another call, in order, with the parameters that they are given as."""
    return [(n, v) for n, v in [*zip(names, call.args), *call.kwargs.items()] if _is_input(v)]


def _tables(call: FunctionCall, names: tuple[str, ...]) -> frozenset[int]:
    """Which of `_inputs` are tables (cos, sin; or both as complex numbers), which take no gradient."""
    return frozenset(i for i, (n, v) in enumerate(_inputs(call, names)) if n in TABLES or v.is_complex())


def _draw(
    call: FunctionCall,
    generator: torch.Generator,
    scale: float,
    names: tuple[str, ...],
    device: torch.device | None = None,
    heads_last: bool = False,
) -> list[torch.Tensor]:
    """Random float64 tensors of the observed shapes, on `device` (None: the CPU); tables (cos, sin) are not scaled.
    heads_last: what has four dimensions lies in memory as an attention's projections do, [rows, tokens, heads,
    channels]."""
    out = []
    tables = _tables(call, names)
    for i, v in enumerate(v for _, v in _inputs(call, names)):
        shape = (*v.shape, 2) if v.is_complex() else v.shape
        t = torch.randn(shape, generator=generator, dtype=torch.float64)
        if heads_last and t.dim() == 4 and not v.is_complex():
            t = t.transpose(1, 2).contiguous().transpose(1, 2)
        t = t.to(device)
        out.append(t if i in tables else t * scale)
    return out


def _recognise(fn: Callable, call: FunctionCall) -> Variant | str:
    parameters = inspect.signature(fn).parameters
    names = tuple(parameters)
    given = {**dict(zip(names, call.args)), **call.kwargs}
    tables = tuple(n for n, v in given.items() if isinstance(v, torch.Tensor) and v.is_complex()) or TABLES
    rotated = tuple(
        n for n, v in given.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and n not in tables
    )
    if (len(tables) > 1 and tables != TABLES) or any(t not in given for t in tables):
        return f"its tables are {', '.join(tables)}"
    if len(rotated) not in (1, 2):
        return f"rotates {len(rotated)} tensors"
    axis = given.get("unsqueeze_dim", parameters["unsqueeze_dim"].default if "unsqueeze_dim" in parameters else None)
    module = _Function(fn, call)
    tensors = _draw(call, torch.Generator().manual_seed(3), 1.0, names)
    with torch.no_grad(), float64_reference():
        reference = module(*tensors)
    single = isinstance(reference, torch.Tensor)
    references = [reference] if single else list(reference)
    for layout in LAYOUTS:
        for sign in (1, -1):
            for a in (1, 2, -2, None) if axis is None else (axis,):
                variant = Variant(layout, sign, rotated, a, single, tables)
                fast = make_fast(fn, variant, always=True)
                try:
                    with torch.no_grad():
                        ours = _Function(fast, call)(*tensors)
                except (ValueError, RuntimeError):
                    continue
                if fast.fallbacks:
                    continue
                ours = [ours] if isinstance(ours, torch.Tensor) else list(ours)
                equal = lambda o, t: o.shape == t.shape and (o - t).abs().max() <= 1e-12 * t.abs().max()
                if len(ours) == len(references) and all(map(equal, ours, references)):
                    return replace(variant, promotes=_promotes(module, tensors, _tables(call, names)))
    return "no rotation known here gives its result"


def _promotes(module: nn.Module, tensors: list[torch.Tensor], tables: frozenset[int]) -> bool:
    """Does stock return float32 for bfloat16 q with float32 tables?"""
    mixed = [t.float() if i in tables else t.bfloat16() for i, t in enumerate(tensors)]
    with torch.no_grad():
        out = module(*mixed)
    return (out if isinstance(out, torch.Tensor) else out[0]).dtype == torch.float32


def _prove(fn: Callable, variant: Variant, call: FunctionCall, device: torch.device) -> Proof:
    names = tuple(inspect.signature(fn).parameters)
    given = {**dict(zip(names, call.args)), **call.kwargs}
    first = given[variant.rotated[0]]

    def swap(m: Any) -> None:
        m.fn = make_fast(fn, variant)

    inputs = lambda g, scale: _draw(call, g, scale, names, device, heads_last=scale != 1.0)
    return prove(
        _Function(fn, call), swap, inputs, dtype=first.dtype, scales=(1.0, 3.0), constants=_tables(call, names)
    )
