"""Which modules are norms, and of which formula: by what a copy of them computes."""

from __future__ import annotations

import copy
import inspect
import warnings
from dataclasses import replace

import torch
from torch import nn

from fastft.norm.gated_norms import install_gated, prove_gated, recognise_gated, two_inputs
from fastft.norm.norms import KIND, MAX_WIDTH, Formula, _install
from fastft.patching.kind import Candidate, Context, device_of
from fastft.proving.fingerprint import fingerprint
from fastft.proving.float64 import float64_reference
from fastft.proving.proof_sizes import FEW, norm_rows
from fastft.proving.prove import FORMULA_EPS, Proof, prove
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.swap import KEY, new_instance, stock_class
from fastft_kernels.norm.rms_norm import run, run_rounded
from fastft_kernels.numerics import compare
from fastft_kernels.quant.fp8 import quantize_e4m3_rows


def _vectors(module: nn.Module) -> list[tuple[str, nn.Parameter]] | None:
    """The parameters, if all are vectors of one width; None if the module cannot be a norm."""
    if any(c is not None for c in module._modules.values()) or any(b is not None for b in module._buffers.values()):
        return None
    ps = [(n, p) for n, p in module._parameters.items() if p is not None]
    if (
        len(ps) > 2
        or any(p.dim() != 1 or not p.is_floating_point() for _, p in ps)
        or len({p.shape for _, p in ps}) > 1
    ):
        return None
    return ps if not ps or 0 < ps[0][1].numel() <= MAX_WIDTH else None


def _takes_one(module: nn.Module) -> bool:
    parameters = list(inspect.signature(stock_class(module).forward).parameters.values())[1:]
    required = [
        p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return len(required) == 1 or (not required and bool(parameters))


def _probe(module: nn.Module, width: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor] | None:
    """(float64 CPU copy with random parameters, x, y), or None where the module's output grows with its input."""
    probe = _copy_on_cpu(module)
    g = torch.Generator().manual_seed(3)
    for p in probe.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3 + 0.5
    x = torch.randn(5, width, generator=g, dtype=torch.float64)
    with torch.no_grad(), float64_reference():
        big, bigger = probe(x * 1e6), probe(x * 4e6)
        if not (isinstance(big, torch.Tensor) and big.shape == x.shape and torch.isfinite(big).all()):
            return None
        same = (big - bigger).abs().max() <= 1e-6 * big.abs().max()
        spread = max(float(side.max() - side.min()) for side in (big[x > 0], big[x < 0]))
        saturated = spread <= 1e-6 * big.abs().max()  # two values, by sign: a sigmoid, a soft cap, no norm
        if not same or big.abs().max() < 1e-3 or torch.equal(probe(x), x) or saturated:
            return None
        x = torch.cat([x, x * 1e-3])  # small inputs, so that eps shows
        return probe, x, probe(x)


def _copy_on_cpu(module: nn.Module) -> nn.Module:
    """A copy whose parameters are fresh CPU tensors (the model's may be fakes, or anywhere)."""
    new = new_instance(module)
    new.__dict__.update(
        {
            k: copy.copy(v) if k in ("_parameters", "_buffers", "_modules") else v
            for k, v in module.__dict__.items()
            if k != KEY
        }
    )
    new.__dict__.pop("forward", None)
    for n, p in module._parameters.items():
        new._parameters[n] = None if p is None else nn.Parameter(torch.zeros(p.shape, dtype=torch.float64))
    return new


def _formula(module: nn.Module, probe: nn.Module, x: torch.Tensor, y: torch.Tensor, names: list[str]) -> Formula | None:
    """The first formula that gives y to float64 rounding."""
    floats = [k for k, v in module.__dict__.items() if isinstance(v, float) and 0 <= v < 0.1]
    pairs = (
        [(None, None)]
        if not names
        else [(names[0], None)]
        if len(names) == 1
        else [tuple(names), tuple(reversed(names))]
    )
    for eps in [*floats, torch.finfo(torch.float32).eps, 1e-5, 1e-6, 1e-12, 1e-8, 0.0]:
        for weight, bias in pairs:
            for centred in (False, True):
                if bias and not centred:
                    continue
                for offset in (0.0, 1.0) if weight else (0.0,):
                    f = Formula(centred, weight, bias, eps, offset)
                    with torch.no_grad():
                        if (f(probe, x) - y).abs().max() <= FORMULA_EPS * y.abs().max():
                            return f
    return None


def _dtypes(module: nn.Module, f: Formula, width: int) -> Formula | str:
    """Cast and result dtype, read off the stock module's answers in mixed precision."""
    g = torch.Generator().manual_seed(5)
    low = torch.bfloat16
    x = torch.randn(16, width, generator=g).to(low)
    probe = _copy_on_cpu(module)
    values = {n: (torch.randn(p.shape, generator=g) * 0.3 + 0.5).to(low) for n, p in probe.named_parameters()}

    def answer(param_dtype, x):
        for n, p in probe.named_parameters():
            p.data = values[n].to(param_dtype)
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a mix of dtypes that is the question here, not the user's doing
            return probe(x)

    both = answer(low, x)
    try:
        mixed = answer(torch.float32, x) if f.weight else both
    except RuntimeError:
        mixed = answer(low, x)
    if both.dtype == low:
        out = "promote" if f.weight and mixed.dtype == torch.float32 else "x"
    elif both.dtype == torch.float32:
        out = torch.float32
    else:
        return f"returns {both.dtype} for bfloat16"
    f = replace(f, out=out)
    if f.centred or f.weight is None:
        return f

    def cast(expected: torch.Tensor) -> str:
        forms = [replace(f, cast=c, mixed=c) for c in ("before", "after")]
        with torch.no_grad():
            wrong = [float((c(probe, x).double() - expected.double()).abs().sum()) for c in forms]
        return "before" if wrong[0] < wrong[1] else "after"

    answer(low, x)
    f = replace(f, cast=(same := cast(both)), mixed=same)
    if mixed is both:
        return f
    answer(torch.float32, x)
    return replace(f, mixed=cast(mixed))


def _prove_mixed(module: nn.Module, f: Formula, device: torch.device) -> str:
    """bfloat16 input with float32 weight, as after PEFT's k-bit preparation: output judged as well, on `device`. Empty
    when fine."""
    if f.weight is None:
        return ""
    stock, g = _copy_on_cpu(module), torch.Generator().manual_seed(7)
    for p in stock.parameters():
        p.data = torch.randn(p.shape, generator=g).to(device)
    width = getattr(stock, f.weight).numel()
    x = torch.randn(norm_rows(width, device), width, generator=g).to(torch.bfloat16).to(device)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            eager = stock(x)
        except RuntimeError:
            return ""  # the stock module does not take this mix: nothing to keep
        ours = f(stock, x)
        for p in stock.parameters():
            p.data = p.data.double()
        with float64_reference():
            reference = stock(x.double())
    verdict = compare(ours, reference, eager, "bfloat16 input, float32 weight")
    return "" if verdict else str(verdict)


def _prove_rounded(f: Formula, width: int, dtype: torch.dtype, device: torch.device) -> str:
    """What an FP8 consumer is given of this norm, on `device`: the bits of the norm and of the quantisation one after
    the other. Empty when fine."""
    g = torch.Generator().manual_seed(13)
    x = torch.randn(norm_rows(width, device), width, generator=g).to(device, dtype)
    w = torch.randn(width, generator=g).to(device, dtype) if f.weight else None
    with torch.no_grad():
        form = (FORMULA_EPS, f.offset, f.cast_of(x, w) == "before", f.out_dtype(x, w))
        y, rstd, q, scale = run_rounded(x, w, *form)
        wanted = (*run(x, w, *form), *quantize_e4m3_rows(y))
    bits = lambda t: t.view(torch.uint8)
    return "" if all(map(torch.equal, map(bits, (y, rstd, q, scale)), map(bits, wanted))) else "rounds to other bits"


def _draw_parameters(module: nn.Module) -> None:
    g = torch.Generator().manual_seed(11)
    for p in module.parameters():
        p.data = (torch.randn(p.shape, generator=g, dtype=torch.float64) * 0.3 + 0.5).to(p.device)


class Norms:
    """Recognises RMSNorm in its variants, LayerNorm, and norms with a gate."""

    name = KIND

    def __init__(self):
        self._known: dict = {}

    def recognise(self, module: nn.Module, context: Context) -> Candidate | str | None:
        vectors = _vectors(module)
        if vectors is None:
            return None
        if len(vectors) == 1 and (given := two_inputs(module, vectors[0][1].numel(), context)):
            return self._gated(module, vectors[0], given)
        if not _takes_one(module):
            return None
        width = vectors[0][1].numel() if vectors else context.seen.last_dim(module)
        if width is None:
            return None
        dtype = vectors[0][1].dtype if vectors else context.seen.input_dtype(module) or torch.float32
        key = (fingerprint(module), width, dtype)
        if key not in self._known:
            self._known[key] = self._recognise(module, width, [n for n, _ in vectors])
        found = self._known[key]
        if found is None or isinstance(found, str):
            return found
        if why := context.sharding.is_apart(module):
            return why
        f = found
        rounds = context.has_fp8 and not f.centred
        prove = lambda: self._prove(module, f, width, dtype, rounds)
        spares = not context.sharding.outlives(module, context.seen)
        apply = lambda m: _install(m, f, spares, rounds)
        return Candidate(f.kernel, (*key, rounds), prove, apply, device=device_of(module))

    def _gated(
        self, module: nn.Module, vector: tuple[str, nn.Parameter], given: tuple[str, str, int]
    ) -> Candidate | str:
        dtype, key = vector[1].dtype, ("gated", fingerprint(module), given)
        if key not in self._known:
            self._known[key] = recognise_gated(_copy_on_cpu(module), vector[0], given)
        f = self._known[key]
        if isinstance(f, str):
            return f

        def proof() -> Proof:
            device = device_of(module)
            return prove_gated(_copy_on_cpu(module).to(device), f, given[2], dtype, device, _draw_parameters)

        return Candidate(f.kernel, key, proof, lambda m: install_gated(m, f), device=device_of(module))

    @staticmethod
    def _recognise(module: nn.Module, width: int, names: list[str]) -> Formula | str | None:
        try:
            probed = _probe(module, width)
        except Exception as e:  # foreign code on input it may not expect: not a norm that we know
            not_for_want_of_memory(e)
            return (
                f"cannot be run on one tensor of width {width}: {type(e).__name__}"
                if "norm" in type(module).__name__.lower()
                else None
            )
        if probed is None:
            return None
        formula = _formula(module, *probed, names)
        return "no norm formula known here gives its output" if formula is None else _dtypes(module, formula, width)

    @staticmethod
    def _prove(module: nn.Module, f: Formula, width: int, dtype: torch.dtype, rounds: bool) -> Proof:
        device = device_of(module)
        stock = _copy_on_cpu(module).to(device)
        rows = norm_rows(width, device)

        def inputs(g: torch.Generator, scale: float) -> list[torch.Tensor]:
            """Contiguous rows at the first scale; at the second a few, as a view [rows, heads, tokens, width] of
            heads."""
            if scale == 1.0:
                return [torch.randn(1, rows, width, generator=g, dtype=torch.float64).to(device)]
            return [
                (torch.randn(2, FEW, 3, width, generator=g, dtype=torch.float64) * scale).to(device).transpose(1, 2)
            ]

        proof = prove(stock, lambda m: _install(m, f), inputs, dtype=dtype, scales=(1.0, 30.0), reset=_draw_parameters)
        if proof.ok and (why := _prove_mixed(module, f, device)):
            return Proof(False, dtype="mixed", reason=why)
        if proof.ok and rounds and (why := _prove_rounded(f, width, dtype, device)):
            return Proof(False, dtype="e4m3", reason=why)
        return proof
