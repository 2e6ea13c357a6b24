"""Which modules are MLPs: by what a copy of them computes, with linear layers that take notes."""

from __future__ import annotations

import copy
import inspect
import itertools
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fastft.compat.accelerate_private import LEFT_BY_HOOKS
from fastft.mlp.activations import FastActivation, activation_of, is_leaf, prove_activation
from fastft.mlp.mlp import ACTIVATIONS, KIND, Shape, _install
from fastft.patching.kind import Candidate, Context, device_of
from fastft.proving.fingerprint import fingerprint
from fastft.proving.float64 import float64_reference
from fastft.proving.proof_sizes import elementwise_rows
from fastft.proving.prove import FORMULA_EPS, Proof, prove
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.swap import KEY, install, is_fast, new_instance, stock_class
from fastft.swapping.unchanged import ModuleSnapshot
from fastft_kernels.mlp.activation import activation
from fastft_kernels.quant.fp8 import quantize_e4m3_rows
from fastft_kernels.recompute.recomputation import recomputation_of


class RecordingLinear(nn.Module):
    """A linear map of the full width and rank 8, which notes what it was given and what it returned."""

    def __init__(self, n_in: int, n_out: int, generator: torch.Generator, log: list, name: str):
        super().__init__()
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))
        self.A, self.B, self.bias = draw(n_in, 8), draw(8, n_out), draw(n_out)
        self.log, self.name, self.in_features, self.out_features = log, name, n_in, n_out
        self.weight_read = False

    @property
    def weight(self) -> torch.Tensor:
        """For forwards that look at a weight's dtype."""
        self.weight_read = True
        return self.A

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        recomputation = recomputation_of(x)
        if recomputation is not None and not torch.equal(
            recomputation.recompute(*(t.detach() for t in recomputation.tensors)), x
        ):
            raise ValueError("the input of its last product has other bits when it is computed again")
        y = (x @ self.A) @ self.B * (self.in_features * 8) ** -0.5 + self.bias * 0.1
        self.log.append((self.name, x, y))
        return y

    def __deepcopy__(self, memo):
        new = RecordingLinear.__new__(RecordingLinear)
        memo[id(self)] = new
        new.__dict__.update({k: v if k == "log" else copy.deepcopy(v, memo) for k, v in self.__dict__.items()})
        return new


def linear_shape(module: Any) -> tuple[int, int] | None:
    """(in, out) of whatever behaves as a linear layer: torch's, quantised ones, adapters around them, transposed
    ones."""
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        if hasattr(module, "base_layer") and linear_shape(module.base_layer) is None:
            return None  # an adapter around something else, such as a parameter of experts
        return module.in_features, module.out_features
    weight = module._parameters.get("weight")
    if hasattr(module, "nx") and hasattr(module, "nf") and weight is not None and weight.dim() == 2:
        return module.nx, module.nf
    return None


def _linears(module: nn.Module) -> dict[str, tuple[int, int]] | str | None:
    """The linear children, if there are two or three of them and no other child or own parameter matters; why not,
    where they go out and come back as an MLP's do."""
    linears = _linear_children(module)
    if len(linears) not in (2, 3):
        return None
    own = next((n for n, p in module._parameters.items() if p is not None), None)
    if own is not None:
        return f"it has a parameter of its own ({own})" if _there_and_back(linears) else None
    others = [c for n, c in module._modules.items() if c is not None and n not in linears]
    other = next((c for c in others if any(True for _ in c.parameters())), None)
    if other is not None:
        return (
            f"beside its linear layers it has a {stock_class(other).__name__} with parameters"
            if _there_and_back(linears)
            else None
        )
    return linears


def _linear_children(module: nn.Module) -> dict[str, tuple[int, int]]:
    return {n: s for n, c in module._modules.items() if c is not None and (s := linear_shape(c))}


def _there_and_back(linears: dict[str, tuple[int, int]]) -> bool:
    """One goes from a width to another, one comes back from there (or from half of it: gate and up in one product)."""
    both = itertools.permutations(linears.values(), 2)
    return any(a != b and d == a and (c == b or a != c == b // 2) for (a, b), (c, d) in both)


def _in_a_row(linears: dict[str, tuple[int, int]]) -> bool:
    """One can take what another gives (or half of it): something may stand between them."""
    return any(c in (b, b // 2) for (_, b), (c, _) in itertools.permutations(linears.values(), 2))


def _with_stand_ins(module: nn.Module, linears: dict[str, tuple[int, int]]) -> tuple[nn.Module, list]:
    log: list = []
    g = torch.Generator().manual_seed(3)
    new = new_instance(module)
    new.__dict__.update({k: v for k, v in module.__dict__.items() if k not in (KEY, "forward", *LEFT_BY_HOOKS)})
    children = {
        n: RecordingLinear(*linears[n], g, log, n) if n in linears else copy.deepcopy(c)
        for n, c in module._modules.items()
    }
    new._modules = children
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    return new.eval(), log


def _shapes(module: nn.Module, calls: list) -> list[Shape]:
    """Every structure that these calls could be, plain ones first."""
    names = tuple(n for n, _, _ in calls)
    *before, (_, h, _) = calls
    others = tuple(n for n, c in module._modules.items() if c is not None and n not in names)
    floats = [v for v in module.__dict__.values() if isinstance(v, float) and v > 0]
    out = []
    for act in ACTIVATIONS:
        if len(before) == 2:
            out += [Shape(names, act, True, swapped=s, others=others) for s in (False, True)]
        elif before[0][2].shape[-1] == 2 * h.shape[-1]:
            out += [
                Shape(names, act, True, split, s, others=others)
                for split in ("chunk", "interleaved")
                for s in (False, True)
            ]
        else:
            out.append(Shape(names, act, False, others=others))
    gated = [s for s in out if s.gated and s.activation == "silu"]
    clamped = [replace(s, limit=v) for s, v in itertools.product(gated, floats)]
    scaled = [
        replace(s, limit=v, alpha=a, up_offset=o)
        for s, v, a, o in itertools.product(gated, [None, *floats], floats, (0.0, 1.0))
    ]
    return out + clamped + scaled


class MLPs:
    """Recognises MLPs, and activations inside other modules."""

    name = KIND

    def __init__(self):
        self._known: dict = {}

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        if is_leaf(module):
            return self._leaf(module, context)
        found = self._module(module, context)
        if isinstance(found, str) and any(
            c is not None and activation_of(c, ACTIVATIONS) for c in module._modules.values()
        ):
            return None  # its activation is swapped alone
        return found

    def _leaf(self, module: nn.Module, context: Context) -> Candidate | None:
        """An activation between two linear layers of a module that is no MLP as a whole."""
        parents = context.shared.setdefault("mlp parents", {})
        if not parents:
            parents.update({child: m for m in context.looked_at for child in m._modules.values() if child is not None})
        parent = parents.get(module)
        if parent is None or is_fast(parent, KIND) or not _in_a_row(_linear_children(parent)):
            return None
        key = ("leaf", fingerprint(module))
        if key not in self._known:
            self._known[key] = activation_of(module, ACTIVATIONS)
        if (act := self._known[key]) is None:
            return None
        weight = next((p for p in parent.parameters() if p.is_floating_point() and p.dtype.itemsize > 1), None)
        dtype = weight.dtype if weight is not None else torch.float32
        device = device_of(parent)
        prove = lambda: prove_activation(module, act, dtype, device)
        return Candidate(
            f"activation({act})",
            (*key, dtype),
            prove,
            lambda m: install(m, KIND, FastActivation, (act, ModuleSnapshot(m))),
            device=device,
        )

    def _module(self, module: nn.Module, context: Context) -> Candidate | str | None:
        linears = _linears(module)
        if linears is None or isinstance(linears, str):
            return linears
        dtype = next(
            (p.dtype for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)), torch.float32
        )
        others = tuple((n, fingerprint(c)) for n, c in module._modules.items() if c is not None and n not in linears)
        attributes = fingerprint(_bare(module))
        key = (stock_class(module), tuple(linears.items()), others, attributes, dtype)
        if key not in self._known:
            self._known[key] = self._recognise(
                module, linears, max((len(c.inputs) for c in context.seen.of(module)), default=1)
            )
        found = self._known[key]
        if found is None or isinstance(found, str):
            return found
        rounds = context.has_fp8 and found.gated
        prove = lambda: self._prove(module, linears, found, dtype, rounds)
        apply = lambda m: _install(m, found, rounds)
        return Candidate(found.kernel, (*key, rounds), prove, apply, device=device_of(module))

    @staticmethod
    def _recognise(module: nn.Module, linears: dict[str, tuple[int, int]], given: int) -> Shape | str | None:
        """given: how many tensors the model gives it."""
        probe, log = _with_stand_ins(module, linears)
        width = _outward(linears)
        if width is None:
            return None
        x = torch.randn(6, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        x = torch.cat([x, 30 * x]).unsqueeze(0)
        try:
            with torch.no_grad(), float64_reference():
                y = probe(x)
        except Exception as e:  # attention with fused projections looks like an MLP until it runs
            not_for_want_of_memory(e)
            if not _there_and_back(linears) or (given > 1 and not _needs_more(module)):
                return None
            return (
                "it takes more than one tensor"
                if _needs_more(module)
                else f"cannot be run on one tensor: {type(e).__name__}"
            )
        if sorted(n for n, _, _ in log) != sorted(linears) or not isinstance(y, torch.Tensor):
            return None
        *before, (_, h, last) = log
        if all(inp is x for _, inp, _ in log):  # nothing comes back down: the product itself is returned
            return (
                _first_match([replace(f, down=False) for f in _shapes(module, [*log, ("", y, y)])], log, y) or _ODD_END
            )
        if any(inp is not x for _, inp, _ in before):
            return None if not torch.equal(before[0][1], x) else "its linear children are given different inputs"
        read = any(m.weight_read for m in probe.modules() if isinstance(m, RecordingLinear))
        final = _final(last, y)
        if final is None:
            return _ODD_END
        if found := _first_match(_shapes(module, log), before, h):
            return replace(found, final=final, same_dtype=read)
        return "no activation known here gives the input of its last product"

    @staticmethod
    def _prove(
        module: nn.Module, linears: dict[str, tuple[int, int]], shape: Shape, dtype: torch.dtype, rounds: bool
    ) -> Proof:
        device = device_of(module)
        probe, log = _with_stand_ins(module, linears)
        width = _outward(linears)
        assert width is not None
        rows = elementwise_rows(min(out for _, out in linears.values()), device)
        inputs = lambda g, scale: [(torch.randn(1, rows, width, generator=g, dtype=torch.float64) * scale).to(device)]
        proof = prove(probe.to(device), lambda m: _install(m, shape), inputs, dtype=dtype, scales=(1.0, 30.0))
        if proof.ok and rounds and (why := _rounds_otherwise(shape, linears, rows, dtype, device)):
            return Proof(False, dtype="e4m3", reason=why)
        log.clear()
        return proof


def _rounds_otherwise(shape: Shape, linears: dict, rows: int, dtype: torch.dtype, device: torch.device) -> str:
    """What an FP8 product down is given, on `device`: the bits of the middle and of the quantisation one after the
    other. Empty when fine."""
    g = torch.Generator().manual_seed(13)
    first = shape.calls[:-1] if shape.down else shape.calls
    products = [torch.randn(1, rows, linears[n][1], generator=g).to(device, dtype) for n in first]
    with torch.no_grad():
        h, q, scale = shape.middle_rounded(*products)
        wanted = (shape.middle(*products), *quantize_e4m3_rows(h.flatten(0, -2)))
    bits = lambda t: t.view(torch.uint8)
    return "" if all(map(torch.equal, map(bits, (h, q, scale)), map(bits, wanted))) else "rounds to other bits"


_ODD_END = "it does not return its last product as it is"


def _final(last: torch.Tensor, y: torch.Tensor) -> str | None:
    """The activation between the last product and what is returned: none (""), one that is known, or None."""
    if y.shape != last.shape:
        return None
    if torch.equal(y, last):
        return ""
    fits = lambda act: bool((activation(last, act) - y).abs().max() <= FORMULA_EPS * y.abs().max())
    return next((act for act in ACTIVATIONS if fits(act)), None)


def _first_match(shapes: list[Shape], before: list, h: torch.Tensor) -> Shape | None:
    """The first structure that makes h of what the linear children returned."""
    for shape in shapes:
        with torch.no_grad():
            ours = shape.middle(*(p for _, _, p in before))
            if ours.shape == h.shape and (ours - h).abs().max() <= FORMULA_EPS * h.abs().max():
                return replace(shape, calls=tuple(n for n in shape.calls if n))
    return None


def _outward(linears: dict[str, tuple[int, int]]) -> int | None:
    """The width that goes in, when one linear comes back to it."""
    first = next(iter(linears.values()))[0]
    ins = sorted((i for i, _ in linears.values()), key=lambda i: i != first)
    for width in dict.fromkeys(ins):
        back = [n for n, (i, o) in linears.items() if i != width or o == width]
        if len(back) == 1 or len(linears) == 2:
            return width
    return first


def _bare(module: nn.Module) -> nn.Module:
    bare = new_instance(module)
    bare.__dict__.update({k: v for k, v in module.__dict__.items() if k != KEY})
    bare._modules = {}
    return bare


def _needs_more(module: nn.Module) -> bool:
    ps = list(inspect.signature(stock_class(module).forward).parameters.values())[1:]
    return sum(p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD for p in ps) != 1
