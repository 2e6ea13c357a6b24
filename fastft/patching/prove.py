"""Prove: a stock module and its candidate on the same random inputs.

Two questions, both must be answered yes.
  formula   in float64 (`float64_truth`) outputs and all gradients agree to float64 rounding: it is the same function.
  numerics  in float32 and in the training dtype the candidate's error against the float64 truth passes the judge beside the stock
            module's own error (`fastft_kernels.numerics.compare`).
Every input is drawn at several scales: an activation that clamps, or a gelu beside its tanh form, look alike on small inputs only.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from fastft.patching.clone import clone
from fastft.patching.oom import not_for_want_of_memory
from fastft.patching.truth import float64_truth
from fastft_kernels.numerics import compare

FORMULA_EPS = 1e-9  # relative, float64: sums of some thousands of terms stay below 1e-12, another formula is at 1e-7 and above


@dataclass(frozen=True)
class Proof:
    """error, stock_error: max error relative to max|truth| in `dtype`, the candidate's and the stock module's own."""

    ok: bool
    error: float = math.nan
    stock_error: float = math.nan
    dtype: str = ""
    reason: str = ""

    def to_dict(self) -> dict:
        return asdict(self)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside somebody's forward (autocast, no_grad, inference mode, a checkpoint's or an offloader's hooks on saved tensors, fake
    tensors) a proof runs as it would outside, and leaves the random stream where it stood."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.random.fork_rng())
        yield


def _flatten(out) -> list[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        return [out] if out.is_floating_point() else []
    if isinstance(out, dict):
        out = list(out.values())
    if isinstance(out, (tuple, list)):
        return [t for o in out for t in _flatten(o)]
    return []


def outputs_and_gradients(
    run: Callable[..., object], inputs: Sequence, parameters: Iterable[tuple[str, torch.Tensor]], upstream_seed: int, truth: bool = False
) -> dict[str, torch.Tensor]:
    """All floating outputs of run(*inputs), and the gradients of the inputs and parameters that require them, for one random
    upstream gradient. The upstream is drawn in float64 and rounded to the outputs' dtype."""
    with float64_truth() if truth else contextlib.nullcontext():
        outs = _flatten(run(*inputs))
        generator = torch.Generator().manual_seed(upstream_seed)
        ups = [torch.randn(o.shape, dtype=torch.float64, generator=generator).to(torch.float32).to(o.device, o.dtype) for o in outs]
        leaves = {f"d input {i}": t for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.requires_grad}
        leaves |= {f"d {n}": p for n, p in parameters if p.requires_grad}
        result = {f"output {i}": o.detach() for i, o in enumerate(outs)}
        with_graph = [(o, u) for o, u in zip(outs, ups) if o.requires_grad]
        if leaves and with_graph:
            grads = torch.autograd.grad([o for o, _ in with_graph], list(leaves.values()), [u for _, u in with_graph], allow_unused=True)
            result |= {k: g for k, g in zip(leaves, grads) if g is not None}
    return result


def agree(a: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> str:
    """Empty when equal to float64 rounding, else which result differs and by how much."""
    if a.keys() != truth.keys():
        return f"results differ: {sorted(a.keys() ^ truth.keys())}"
    for name, t in truth.items():
        if a[name].shape != t.shape:
            return f"{name}: shape {tuple(a[name].shape)} instead of {tuple(t.shape)}"
        if t.numel() == 0:
            continue
        scale = float(t.abs().max()) or 1.0
        error = float((a[name].double() - t).abs().max()) / scale
        if not error <= FORMULA_EPS:
            return f"another formula: {name} differs by {error:.1e} in float64"
    return ""


def cast_parameters(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy with every floating parameter in `dtype`; buffers change only to float64."""
    module = clone(module)
    for p in module.parameters():
        if p.is_floating_point():
            p.data = p.data.to(dtype)
    for sub in module.modules():
        for name, b in sub._buffers.items():
            if b is not None and b.is_floating_point() and dtype == torch.float64:
                sub._buffers[name] = b.to(dtype)
    return module


def _inputs(make: Callable[[torch.Generator, float], Sequence], seed: int, scale: float, dtype, up) -> list:
    """Inputs rounded to `dtype`, then held in `up`; floating tensors become leaves that require gradients unless made with none."""
    out = []
    for t in make(torch.Generator().manual_seed(seed), scale):
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            constant = getattr(t, "constant", False)
            t = t.to(dtype).to(up)
            t = t if constant else t.detach().requires_grad_()
        out.append(t)
    return out


def prove(
    stock: nn.Module,
    swap: Callable[[nn.Module], object],
    make_inputs: Callable[[torch.Generator, float], Sequence],
    *,
    dtype: torch.dtype,
    scales: Sequence[float] = (1.0,),
    reset: Callable[[nn.Module], None] | None = None,
    dtypes: Sequence[torch.dtype] | None = None,
    cast: Callable[[nn.Module, torch.dtype], nn.Module] | None = None,
) -> Proof:
    """Compare `stock` with a copy to which `swap` was applied.

    stock: a module small enough to run on `make_inputs(generator, scale)` (float tensors in float64 on the module's device; mark one
    with `.constant = True` to take no gradient for it). Never modified. dtype: the training dtype. reset: run on the copy that all others are made of.
    dtypes: instead of (float32, dtype). cast(module, dtype): a copy in that dtype, where casting all parameters is not what that means.
    Whatever the candidate raises on inputs that stock accepts is a failed proof, with its text as the reason; but for out of memory.
    """
    worst: Proof | None = None
    cast = cast or cast_parameters
    base = clone(stock)
    for p in base.parameters():
        p.requires_grad_(p.is_floating_point())
    if reset is not None:
        reset(base)
    for d in dtypes or dict.fromkeys((torch.float32, dtype)):
        rounded = cast(base, d)
        plain, fast = rounded, clone(rounded)
        plain64, fast64 = cast(rounded, torch.float64), cast(rounded, torch.float64)
        swap(fast)
        swap(fast64)
        for i, scale in enumerate(scales):
            draw = lambda up, d=d, i=i, scale=scale: _inputs(make_inputs, 17 + i, scale, d, up)
            run = lambda m, up, truth=False, i=i, draw=draw: outputs_and_gradients(m, draw(up), m.named_parameters(), 91 + i, truth)
            truth = run(plain64, torch.float64, True)
            eager = run(plain, d)
            try:
                if reason := agree(run(fast64, torch.float64, True), truth):
                    return Proof(False, dtype=str(d).removeprefix("torch."), reason=reason)
                ours = run(fast, d)
            except Exception as e:
                not_for_want_of_memory(e)
                return Proof(False, dtype=str(d).removeprefix("torch."), reason=f"candidate raised {type(e).__name__}: {e}")
            verdict = compare(ours, truth, eager)
            proof = Proof(verdict.ok, verdict.error, verdict.eager_error, str(d).removeprefix("torch."), "" if verdict else str(verdict))
            if not proof.ok:
                return proof
            if worst is None or proof.dtype != worst.dtype or proof.error > worst.error:
                worst = proof
    assert worst is not None
    return worst
