"""Prove: a stock module and its candidate on the same random inputs.

Two questions, both must be answered yes.
  formula   in float64 (`float64_reference`) outputs and all gradients agree to float64 rounding: it is the same
            function.
  numerics  in float32 and in the training dtype the candidate's error against the float64 reference passes the judge
            beside the stock module's own error (`fastft_kernels.numerics.compare`).
Every input is drawn at several scales: an activation that clamps, or a gelu beside its tanh form, look alike on small
inputs only. Kernels take other branches where some gradients are not wanted (a frozen weight, an input that needs
none), and a consumer may compute an output again in its backward: these runs are compared too. All of it happens on the
device and at the dtypes of the inputs given."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from fastft.compat.torch_private import without_modes
from fastft.proving.clone import clone
from fastft.proving.float64 import float64_reference
from fastft.proving.tensors import floats_in
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft_kernels.numerics import compare
from fastft_kernels.recompute.recomputation import recomputation_of

FORMULA_EPS = (
    1e-9  # relative, float64: sums of some thousands of terms stay below 1e-12, another formula is at 1e-7 and above
)


@dataclass(frozen=True)
class Proof:
    """error, stock_error: max error relative to max|reference| in `dtype`, the candidate's and the stock module's own.
    device: where it ran; sizes: the shapes of its inputs."""

    ok: bool
    error: float = math.nan
    stock_error: float = math.nan
    dtype: str = ""
    reason: str = ""
    device: str = ""
    sizes: str = ""

    def to_dict(self) -> dict:
        """The proof as `json.dumps` takes it."""
        return asdict(self)


_FORMULA_ALONE: ContextVar[bool] = ContextVar("formula_alone", default=False)


@contextlib.contextmanager
def formula_alone() -> Iterator[None]:
    """Within it proofs answer the first question only. For a model that is planned for and will run elsewhere: which
    formula it has decides what is swapped, the numerics are another device's."""
    token = _FORMULA_ALONE.set(True)
    try:
        yield
    finally:
        _FORMULA_ALONE.reset(token)


def formula_is_enough() -> bool:
    """Does this run under `formula_alone`?"""
    return _FORMULA_ALONE.get()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Inside somebody's forward (autocast, no_grad, inference mode, a checkpoint's or an offloader's hooks on saved
    tensors, fake tensors) a proof runs as it would outside, and leaves the random stream where it stood."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(without_modes())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
        for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
            stack.enter_context(torch.autocast(device, enabled=False))
        stack.enter_context(torch.random.fork_rng())
        stack.enter_context(drawn_on_the_cpu())
        yield


def drawn_on_the_cpu() -> contextlib.AbstractContextManager:
    """Where somebody has set another default device, proofs draw their numbers on the CPU all the same."""
    return contextlib.nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")


def outputs_and_gradients(
    run: Callable[..., object],
    inputs: Sequence,
    parameters: Iterable[tuple[str, torch.Tensor]],
    upstream_seed: int,
    reference: bool = False,
) -> dict[str, torch.Tensor]:
    """All floating outputs of run(*inputs), and the gradients of the inputs and parameters that require them, for one
    random upstream gradient. The upstream is drawn in float64 and rounded to the outputs' dtype."""
    with float64_reference() if reference else contextlib.nullcontext():
        outs = floats_in(run(*inputs))
        generator = torch.Generator().manual_seed(upstream_seed)
        ups = [
            torch.randn(o.shape, dtype=torch.float64, generator=generator).to(torch.float32).to(o.device, o.dtype)
            for o in outs
        ]
        leaves = {f"d input {i}": t for i, t in enumerate(inputs) if isinstance(t, torch.Tensor) and t.requires_grad}
        leaves |= {f"d {n}": p for n, p in parameters if p.requires_grad}
        result = {f"output {i}": o.detach() for i, o in enumerate(outs)}
        with_graph = [(o, u) for o, u in zip(outs, ups) if o.requires_grad]
        if leaves and with_graph:
            grads = torch.autograd.grad(
                [o for o, _ in with_graph], list(leaves.values()), [u for _, u in with_graph], allow_unused=True
            )
            result |= {k: g for k, g in zip(leaves, grads) if g is not None}
    return result


def agree(a: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> str:
    """Empty when equal to float64 rounding, else which result differs and by how much."""
    if a.keys() != reference.keys():
        return f"results differ: {sorted(a.keys() ^ reference.keys())}"
    for name, t in reference.items():
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


def _inputs(
    make: Callable[[torch.Generator, float], Sequence], seed: int, scale: float, dtype, up, constants: Collection[int]
) -> list:
    """Inputs rounded to `dtype`, then held in `up`; floating tensors become leaves that require gradients, but for
    those at the places `constants`."""
    out = []
    for i, t in enumerate(make(torch.Generator().manual_seed(seed), scale)):
        if isinstance(t, torch.Tensor) and t.is_floating_point():
            t = t.to(dtype).to(up)
            t = t if i in constants else t.detach().requires_grad_()
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
    constants: Collection[int] = (),
    draws: int = 1,
    formula: Sequence[Callable[[torch.Generator, float], Sequence]] = (),
) -> Proof:
    """Compare `stock` with a copy to which `swap` was applied.

    Args:
        stock: a module small enough to run on the inputs. Never modified.
        swap: applied to a copy, makes it the candidate.
        make_inputs: (generator, scale) -> the arguments of a call; its floating tensors in float64, on the module's
            device.
        dtype: the training dtype.
        scales: how large the inputs are drawn, in turn.
        reset: run on the copy that all others are made of.
        dtypes: instead of (float32, dtype); `dtype` alone under `formula_alone`.
        cast: (module, dtype) -> a copy in that dtype, where casting all parameters is not what that means.
        constants: places of the inputs for which no gradient is taken.
        draws: inputs of each scale whose errors are judged as one; where two computations round in other places, the
            worst entry of a single draw is chance.
        formula: makers of further inputs, for the first question alone.

    Returns:
        The proof with the largest error, or the first that failed. Whatever the candidate raises on inputs that stock
        accepts is a failed proof, with its text as the reason; but for out of memory."""
    worst: Proof | None = None
    sizes: dict[str, None] = {}
    cast = cast or cast_parameters
    base = clone(stock)
    for p in base.parameters():
        p.requires_grad_(p.is_floating_point())
    if reset is not None:
        reset(base)
    short = formula_is_enough()
    for d in (dtype,) if short else dtypes or dict.fromkeys((torch.float32, dtype)):
        named = str(d).removeprefix("torch.")
        rounded = cast(base, d)
        plain, fast = rounded, clone(rounded)
        plain64, fast64 = cast(rounded, torch.float64), cast(rounded, torch.float64)
        swap(fast)
        swap(fast64)
        for i, make in enumerate(formula):
            draw = lambda up, d=d, i=i, make=make: _inputs(make, 57 + i, 1.0, d, up, constants)
            if reason := _another_formula(plain64, fast64, draw, 191 + i):
                return Proof(False, dtype=named, reason=reason)
        for i, scale in enumerate(scales):
            results: list[tuple[dict, dict, dict]] = []
            for j in range(1 if short else draws):
                seed = 1000 * j + i
                draw = lambda up, d=d, seed=17 + seed, scale=scale: _inputs(make_inputs, seed, scale, d, up, constants)
                run = lambda m, inputs, reference=False, seed=91 + seed: outputs_and_gradients(
                    m, inputs, m.named_parameters(), seed, reference
                )
                reference = run(plain64, draw(torch.float64), True)
                inputs = draw(d)
                sizes[" ".join(str(tuple(t.shape)) for t in inputs if isinstance(t, torch.Tensor))] = None
                eager = {} if short else run(plain, inputs)
                try:
                    if not j and (reason := agree(run(fast64, draw(torch.float64), True), reference)):
                        return Proof(False, dtype=named, reason=reason)
                    if short:
                        continue
                    ours = run(fast, draw(d))
                    if not j and (reason := _partly(fast, draw, d, ours, eager, run)):
                        return Proof(False, dtype=named, reason=reason)
                except Exception as e:
                    not_for_want_of_memory(e)
                    return Proof(False, dtype=named, reason=f"candidate raised {type(e).__name__}: {e}")
                results.append((ours, reference, eager))
            if short:
                worst = Proof(True, dtype="float64")
                continue
            ours, reference, eager = (_pooled([r[k] for r in results]) for k in range(3))
            verdict = compare(ours, reference, eager)
            proof = Proof(verdict.ok, verdict.error, verdict.eager_error, named, "" if verdict else str(verdict))
            if not proof.ok:
                return proof
            if worst is None or proof.dtype != worst.dtype or proof.error > worst.error:
                worst = proof
    assert worst is not None
    return replace(worst, sizes=", ".join(sizes))


def _another_formula(stock64: nn.Module, fast64: nn.Module, draw: Callable, seed: int) -> str:
    """Empty where the two agree in float64 on what `draw` makes; whatever stock accepts, the candidate must."""
    run = lambda m: outputs_and_gradients(m, draw(torch.float64), m.named_parameters(), seed, True)
    reference = run(stock64)
    try:
        return agree(run(fast64), reference)
    except Exception as e:
        not_for_want_of_memory(e)
        return f"candidate raised {type(e).__name__}: {e}"


def _pooled(results: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Each result of several draws as one tensor; a key that a draw lacks makes the others' a mismatch."""
    if len(results) == 1:
        return results[0]
    keys = dict.fromkeys(k for r in results for k in r)
    return {k: torch.stack([r[k] for r in results]) for k in keys if all(k in r for r in results)}


def _partly(
    module: nn.Module,
    draw: Callable,
    dtype: torch.dtype,
    whole: dict[str, torch.Tensor],
    eager: dict[str, torch.Tensor],
    run: Callable,
) -> str:
    """The candidate where parameters are frozen, where inputs need no gradient, and where only one of several inputs
    needs one: what is still asked for must be what it was (to a few units in the last place: another branch may sum in
    another order). Without a graph it may be stock's own result, `eager`. Also, a tensor that its consumer may
    recompute must come out with the same bits. Empty, or what is wrong."""
    trained = [p for p in module.parameters() if p.requires_grad]
    wanted = [i for i, t in enumerate(draw(dtype)) if isinstance(t, torch.Tensor) and t.requires_grad]
    cases: list[tuple[str, bool | nn.Module, list[int]]] = []
    if trained and wanted:
        cases += [("frozen parameters", False, wanted), ("inputs without a gradient", True, [])]
    parts = [c for c in module.children() if any(p.requires_grad for p in c.parameters())]
    if len(parts) > 1 and len(parts) <= 3:
        cases += [(f"training in {type(c).__name__} {i} alone", c, []) for i, c in enumerate(parts)]
    if len(wanted) > 1:
        cases += [(f"a gradient for input {i} alone", False, [i]) for i in wanted]
    for what, training, kept in cases:
        chosen = set(training.parameters()) if isinstance(training, nn.Module) else set(trained) if training else set()
        for p in trained:
            p.requires_grad_(p in chosen)
        inputs = draw(dtype)
        for i in set(wanted) - set(kept):
            inputs[i].requires_grad_(False)
        try:
            found = run(module, inputs)
        finally:
            for p in trained:
                p.requires_grad_(True)
        expected = {n for n in whole if n.startswith("output")} | {
            f"d input {i}" for i in kept if f"d input {i}" in whole
        }
        expected |= {f"d {n}" for n, p in module.named_parameters() if p in chosen and f"d {n}" in whole}
        if missing := sorted(expected - found.keys()):
            return f"with {what}: no {missing[0]}"
        for name in sorted(expected):
            if not _close(found[name], whole[name]):
                return f"with {what}: {name} is another one"
    with torch.no_grad():
        for i, y in enumerate(floats_in(module(*draw(dtype)))):
            if not _close(y, whole[f"output {i}"]) and not _close(y, eager[f"output {i}"]):
                return f"without a graph: output {i} is another one"
    for y in floats_in(module(*draw(dtype))):
        recomputation = recomputation_of(y)
        if recomputation is not None and not torch.equal(
            recomputation.recompute(*(t.detach() for t in recomputation.tensors)), y
        ):
            return "its output has other bits when it is computed again"
    return ""


def _close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal but for the order of a sum: within eight units in the last place of the largest value."""
    if a.shape != b.shape or not a.numel():
        return a.shape == b.shape
    scale = float(b.abs().max()) or 1.0
    return float((a.double() - b.double()).abs().max()) <= 8 * torch.finfo(b.dtype).eps * scale
