"""Every kernel at the widths of an 8B decoder and 8192 tokens: time with cold caches, percent of the measured roof,
error against eager's.

Eager is what transformers, PEFT and TRL compute, written out in plain torch; in float64 it is the reference. The judge
looks at every output and every gradient first, and at the bits of a second run; what is red prints no time."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from benchmarks.sheet import Figures, Red, Sheet
from fastft.proving.float64 import float64_reference
from fastft.tools.bench.timing import ColdTimer, Roof, Times
from fastft_kernels.lm_head.linear_cross_entropy import linear_cross_entropy
from fastft_kernels.lm_head.linear_logprob import linear_logprob
from fastft_kernels.lora.lora_linear import Adapter, Projection, lora_linear
from fastft_kernels.mlp.activation import activation
from fastft_kernels.mlp.glu import glu
from fastft_kernels.norm.gated_rms_norm import gated_rms_norm
from fastft_kernels.norm.layer_norm import layer_norm
from fastft_kernels.norm.rms_norm import rms_norm
from fastft_kernels.numerics import compare
from fastft_kernels.quant.nf4 import dequantize_4bit, dequantize_4bit_ref
from fastft_kernels.rotary.rope import rope

Tensors = dict[str, torch.Tensor]


class Size(NamedTuple):
    """Of the decoder that the inputs are shaped for."""

    tokens: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    rank: int


FULL = Size(8192, 4096, 14336, 32, 8, 128, 128256, 16)
TINY = Size(24, 64, 96, 4, 2, 16, 160, 4)


@dataclass(frozen=True)
class Case:
    """inputs: names and shapes; those in `trained` get gradients. work: (flops, bytes) of the forward and of the
    backward, where an element has `b` bytes."""

    name: str
    shapes: Callable[[Size], dict[str, tuple[int, ...]]]
    trained: tuple[str, ...]
    ours: Callable[[Tensors], tuple[torch.Tensor, ...]]
    eager: Callable[[Tensors], tuple[torch.Tensor, ...]]
    work: Callable[[Size, int], tuple[tuple[float, float], tuple[float, float]]]


def _rms_eager(t: Tensors):
    x = t["x"].float()
    return (t["w"] * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(t["x"].dtype),)


def _gated_eager(t: Tensors):
    x = t["x"].float() * F.silu(t["gate"].float())
    return (t["w"] * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)).to(t["x"].dtype),)


def _half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def _rope_eager(t: Tensors):
    cos, sin = t["cos"][:, None], t["sin"][:, None]
    return tuple(x * cos + _half(x) * sin for x in (t["q"], t["k"]))


def _adapted(x, t: Tensors, name: str) -> torch.Tensor:
    return x @ t[f"W{name}"].t() + (x @ t[f"A{name}"].t()) @ t[f"B{name}"].t() * 2.0


def _projection(t: Tensors, name: str) -> Projection:
    return Projection(t[f"W{name}"], adapters=(Adapter(t[f"A{name}"], t[f"B{name}"], 2.0),))


def _logprob_eager(t: Tensors):
    z = (t["h"] @ t["head"].t()).float()
    return (z.gather(-1, t["target"][:, None])[:, 0] - z.logsumexp(-1),)


def _cross_entropy_eager(t: Tensors):
    return (F.cross_entropy((t["h"] @ t["head"].t()).float(), t["target"]),)


def _lora_shapes(s: Size, sizes: dict[str, tuple[int, int]], tokens: int) -> dict[str, tuple[int, ...]]:
    """sizes: name -> (in, out)."""
    found: dict[str, tuple[int, ...]] = {"x": (tokens, next(iter(sizes.values()))[0])}
    for n, (i, o) in sizes.items():
        found |= {f"W{n}": (o, i), f"A{n}": (s.rank, i), f"B{n}": (o, s.rank)}
    return found


def _lora_work(s: Size, b: int, sizes: dict[str, tuple[int, int]]):
    flops = sum(2.0 * s.tokens * (i * o + s.rank * (i + o)) for i, o in sizes.values())
    extra = sum(2.0 * s.tokens * s.rank * (i + o) for i, o in sizes.values())
    weights = sum(i * o for i, o in sizes.values())
    moved = b * (weights + s.tokens * (next(iter(sizes.values()))[0] + sum(o for _, o in sizes.values())))
    return (flops, moved), (flops + extra, moved)


def _qkv(s: Size) -> dict[str, tuple[int, int]]:
    return {
        "q": (s.hidden, s.heads * s.head_dim),
        "k": (s.hidden, s.kv_heads * s.head_dim),
        "v": (s.hidden, s.kv_heads * s.head_dim),
    }


def _rope_shapes(s: Size) -> dict[str, tuple[int, ...]]:
    rows, n = 4, s.tokens // 4
    table = (1, n, s.head_dim)
    return {"q": (rows, s.heads, n, s.head_dim), "k": (rows, s.kv_heads, n, s.head_dim), "cos": table, "sin": table}


def _rows_work(forward: float, backward: float, width: Callable[[Size], int]):
    """Elementwise work: so many tensors [tokens, width] read or written."""
    return lambda s, b: ((0.0, forward * s.tokens * width(s) * b), (0.0, backward * s.tokens * width(s) * b))


def _head_work(products: tuple[int, int]):
    unit = lambda s: 2.0 * s.tokens * s.hidden * s.vocab
    moved = lambda s, b: float(b) * (s.hidden * s.vocab + s.tokens * s.hidden)
    return lambda s, b: tuple((n * unit(s), moved(s, b)) for n in products)


_hidden = lambda s: s.hidden
_HEAD = lambda s: {"h": (s.tokens, s.hidden), "head": (s.vocab, s.hidden), "target": (s.tokens,)}

CASES = (
    Case(
        "rms_norm",
        lambda s: {"x": (s.tokens, s.hidden), "w": (s.hidden,)},
        ("x",),
        lambda t: (rms_norm(t["x"], t["w"]),),
        _rms_eager,
        _rows_work(2, 3, _hidden),
    ),
    Case(
        "rope, q and k",
        _rope_shapes,
        ("q", "k"),
        lambda t: rope(t["q"], t["k"], t["cos"], t["sin"]),
        _rope_eager,
        _rows_work(2, 2, lambda s: (s.heads + s.kv_heads) * s.head_dim),
    ),
    Case(
        "glu, silu",
        lambda s: {"gate": (s.tokens, s.intermediate), "up": (s.tokens, s.intermediate)},
        ("gate", "up"),
        lambda t: (glu(t["gate"], t["up"]),),
        lambda t: (F.silu(t["gate"]) * t["up"],),
        _rows_work(3, 5, lambda s: s.intermediate),
    ),
    Case(
        "lora_linear, q k v",
        lambda s: _lora_shapes(s, _qkv(s), s.tokens),
        ("x", *(f"{m}{n}" for n in "qkv" for m in "AB")),
        lambda t: lora_linear(t["x"], [_projection(t, n) for n in "qkv"]),
        lambda t: tuple(_adapted(t["x"], t, n) for n in "qkv"),
        lambda s, b: _lora_work(s, b, _qkv(s)),
    ),
    Case(
        "linear_logprob, frozen head",
        _HEAD,
        ("h",),
        lambda t: (linear_logprob(t["h"], t["head"], t["target"]).log_probs,),
        _logprob_eager,
        _head_work((2, 0)),
    ),
    Case(
        "linear_cross_entropy, frozen head",
        _HEAD,
        ("h",),
        lambda t: (linear_cross_entropy(t["h"], t["head"], t["target"]),),
        _cross_entropy_eager,
        _head_work((2, 0)),
    ),
    Case(
        "linear_cross_entropy, trained head",
        _HEAD,
        ("h", "head"),
        lambda t: (linear_cross_entropy(t["h"], t["head"], t["target"]),),
        _cross_entropy_eager,
        _head_work((3, 0)),
    ),
    Case(
        "layer_norm",
        lambda s: {"x": (s.tokens, s.hidden), "w": (s.hidden,), "b": (s.hidden,)},
        ("x",),
        lambda t: (layer_norm(t["x"], t["w"], t["b"]),),
        lambda t: (F.layer_norm(t["x"], t["w"].shape, t["w"], t["b"]),),
        _rows_work(2, 3, _hidden),
    ),
    Case(
        "activation, gelu_tanh",
        lambda s: {"x": (s.tokens, s.intermediate)},
        ("x",),
        lambda t: (activation(t["x"], "gelu_tanh"),),
        lambda t: (F.gelu(t["x"], approximate="tanh"),),
        _rows_work(2, 3, lambda s: s.intermediate),
    ),
    Case(
        "gated_rms_norm",
        lambda s: {"x": (s.tokens, s.hidden), "gate": (s.tokens, s.hidden), "w": (s.hidden,)},
        ("x", "gate"),
        lambda t: (gated_rms_norm(t["x"], t["gate"], t["w"], gate_first=True),),
        _gated_eager,
        _rows_work(3, 5, _hidden),
    ),
)


def draw(case: Case, size: Size, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Tensors:
    """Inputs as training has them: activations N(0, 1), weights N(0, 0.02^2) but norms' around 1, cosines and sines of
    angles."""
    g = torch.Generator(device=device).manual_seed(seed)
    found: Tensors = {}
    for name, shape in case.shapes(size).items():
        if name == "target":
            found[name] = torch.randint(0, size.vocab, shape, generator=g, device=device)
            continue
        x = torch.randn(shape, generator=g, device=device)
        if name in ("cos", "sin"):
            angle = torch.arange(shape[1], device=device)[None, :, None] / 10_000 ** (
                torch.arange(shape[2] // 2, device=device).repeat(2) / (shape[2] // 2)
            )
            x = angle.cos() if name == "cos" else angle.sin()
        elif name in ("w", "b"):
            x = x * 0.1 + (1.0 if name == "w" else 0.0)
        elif name == "head" or name[0] in "WAB":
            x = x * 0.02
        found[name] = x.to(dtype)
    return found


def run(case: Case, fn: Callable, inputs: Tensors, *, reference: bool = False) -> dict[str, torch.Tensor]:
    """Outputs and gradients for one random upstream gradient; in float64 throughout where `reference`."""
    t = {n: (x.double() if reference and x.is_floating_point() else x).detach() for n, x in inputs.items()}
    for n in case.trained:
        t[n].requires_grad_()
    if reference:
        with float64_reference():
            ys = fn(t)
    else:
        ys = fn(t)
    g = torch.Generator(device=ys[0].device).manual_seed(5)
    ups = [
        torch.randn(y.shape, generator=g, device=y.device).to(next(iter(inputs.values())).dtype).to(y.dtype) for y in ys
    ]
    grads = torch.autograd.grad(ys, [t[n] for n in case.trained], ups)
    return {f"y{i}": y.detach() for i, y in enumerate(ys)} | {f"d{n}": d for n, d in zip(case.trained, grads)}


def _timed(case: Case, fn: Callable, inputs: Tensors, timer: ColdTimer) -> tuple[Times, Times, float]:
    """(forward, backward, peak MiB of both above the inputs; 0 on a CPU)."""
    t = {n: x.detach() for n, x in inputs.items()}
    for n in case.trained:
        t[n].requires_grad_()
    cuda = timer.device.type == "cuda"
    base = torch.cuda.memory_allocated() if cuda else 0
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    ys = fn(t)
    ups = [torch.randn_like(y) for y in ys]
    leaves = [t[n] for n in case.trained]
    torch.autograd.grad(ys, leaves, ups, retain_graph=True)
    peak = (torch.cuda.max_memory_allocated() - base) / 2**20 if cuda else 0.0
    forward = timer(lambda: fn(t))
    backward = timer(lambda: torch.autograd.grad(ys, leaves, ups, retain_graph=True))
    return forward, backward, peak


def measure(case: Case, size: Size, device: torch.device, dtype: torch.dtype, roof: Roof, timer: ColdTimer) -> Figures:
    """One row. Raises Red with the verdict."""
    inputs = draw(case, size, device, dtype)
    ours = run(case, case.ours, inputs)
    again = run(case, case.ours, inputs)
    verdict = compare(ours, run(case, case.eager, inputs, reference=True), run(case, case.eager, inputs))
    if not verdict:
        raise Red(str(verdict))
    same = all(torch.equal(ours[k], again[k]) for k in ours)
    del ours, again
    figures: Figures = {
        "dtype": str(dtype).removeprefix("torch."),
        "error": verdict.error,
        "stock error": verdict.eager_error,
        "same bits twice": same,
    }
    works = case.work(size, dtype.itemsize)
    whole = roof.seconds(*(a + b for a, b in zip(*works)))
    forward, backward, peak = _timed(case, case.ours, inputs, timer)
    f0, b0, p0 = _timed(case, case.eager, inputs, timer)
    for part, mine, theirs in (("fwd", forward, f0), ("bwd", backward, b0)):
        figures |= {
            f"{part} us": mine.median * 1e6,
            f"{part} p20-p80": f"{mine.p20 * 1e6:.4g}-{mine.p80 * 1e6:.4g}",
            f"{part} stock us": theirs.median * 1e6,
        }
    figures["% of roof"] = 100 * whole / (forward.median + backward.median)
    figures["stock % of roof"] = 100 * whole / (f0.median + b0.median)
    if device.type == "cuda":
        figures |= {"peak MiB": peak, "stock peak MiB": p0}
    return figures


def compiled(case: Case, size: Size, device: torch.device, dtype: torch.dtype, roof: Roof, timer: ColdTimer) -> Figures:
    """torch.compile of the eager formula: the baseline that costs a user one line."""
    inputs = draw(case, size, device, dtype)
    forward, backward, peak = _timed(case, torch.compile(case.eager, dynamic=False), inputs, timer)
    whole = roof.seconds(*(a + b for a, b in zip(*case.work(size, dtype.itemsize))))
    figures: Figures = {
        "fwd stock us": forward.median * 1e6,
        "bwd stock us": backward.median * 1e6,
        "stock % of roof": 100 * whole / (forward.median + backward.median),
    }
    return figures | ({"stock peak MiB": peak} if device.type == "cuda" else {})


def dequantize(size: Size, device: torch.device, dtype: torch.dtype, roof: Roof, timer: ColdTimer) -> Figures:
    """NF4 -> 16 bits of one MLP weight, the bits of the reference; bitsandbytes' own is stock where it is installed."""
    rows, columns = size.intermediate, size.hidden
    g = torch.Generator(device=device).manual_seed(0)
    packed = torch.randint(0, 256, (rows * columns // 2, 1), generator=g, device=device, dtype=torch.uint8)
    absmax = torch.rand(rows * columns // 64, generator=g, device=device) * 0.1
    code = torch.linspace(-1, 1, 16, device=device)
    ours = lambda: dequantize_4bit(packed, absmax, code, 64, (rows, columns), dtype)
    if not torch.equal(
        ours().flatten(), dequantize_4bit_ref(packed, absmax, code, 64, rows * columns, dtype).flatten()
    ):
        raise Red("dequantize_4bit: other bits than the reference's")
    times = timer(ours)
    figures: Figures = {
        "dtype": str(dtype).removeprefix("torch."),
        "fwd us": times.median * 1e6,
        "fwd p20-p80": f"{times.p20 * 1e6:.4g}-{times.p80 * 1e6:.4g}",
    }
    figures["% of roof"] = 100 * roof.seconds(0.0, rows * columns * (0.5 + 4 / 64 + dtype.itemsize)) / times.median
    if importlib.util.find_spec("bitsandbytes") is not None:
        from bitsandbytes import functional as bnb

        state = bnb.QuantState(
            absmax, shape=torch.Size((rows, columns)), code=code, blocksize=64, quant_type="nf4", dtype=dtype
        )
        figures["fwd stock us"] = timer(lambda: bnb.dequantize_4bit(packed, state)).median * 1e6
    return figures


def section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    size, dtype = (TINY if tiny else FULL), torch.bfloat16
    timer = ColdTimer(device, seconds=0.02 if tiny else 0.15, least=3 if tiny else 5)
    for case in CASES:
        sheet.run(
            case.name, lambda case=case: measure(case, size, device, dtype, roof, timer), least=0.0 if tiny else 6.0
        )
    sheet.run("nf4 to 16 bits", lambda: dequantize(size, device, dtype, roof, timer))
    if not tiny:  # last, as compiling takes its time
        for case in (
            c
            for c in CASES
            if c.name in ("rms_norm", "glu, silu", "rope, q and k", "linear_cross_entropy, frozen head")
        ):
            sheet.run(
                f"{case.name}: torch.compile of stock",
                lambda case=case: compiled(case, size, device, dtype, roof, timer),
                least=15.0,
            )
