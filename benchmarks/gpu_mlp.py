"""The MLP of an 8B decoder with adapters: in one function (`adapted_mlp`) beside the three that it stands for
(`lora_linear`, `glu`, `lora_linear`), whole, then its elementwise passes alone, these by the tiles of a launch.

In the rows of passes, "stock" is the same work in separate launches: an addmm for each adapter's output, `glu`, h
computed again for dA of down, a product for each gradient. python -m benchmarks.gpu --only roof mlp"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu_kernels import FULL, TINY, Case, Size, Tensors, measure
from benchmarks.sheet import Figures, Red, Sheet
from fastft.tools.bench.timing import ColdTimer, Roof
from fastft_kernels.lora.lora_linear import Adapter, Projection, lora_linear
from fastft_kernels.lora.plain_group import product
from fastft_kernels.mlp import adapted_glu
from fastft_kernels.mlp.adapted_glu import AdaptedGluLaunch, adapted_glu_bwd, adapted_glu_fwd, adapted_glu_sums
from fastft_kernels.mlp.adapted_mlp import adapted_mlp
from fastft_kernels.mlp.glu import glu, glu_recompute, glu_settings
from fastft_kernels.numerics import compare
from fastft_kernels.recompute.recomputation import Recomputation

SCALE = 2.0
FORM = glu_settings("silu", None, None, 0.0)
# tiles of the backward, then of the forward, that a launch table may hold
BACKWARD = ((16, 128, 8, 2), (16, 64, 4, 2), (16, 64, 4, 3), (16, 128, 8, 3), (16, 32, 4, 2), (32, 64, 8, 2))
FORWARD = ((32, 128, 8, 1), (16, 128, 4, 1), (32, 64, 4, 1), (64, 128, 8, 1), (16, 256, 8, 1))


def _shapes(s: Size) -> dict[str, tuple[int, ...]]:
    sizes = {"g": (s.hidden, s.intermediate), "u": (s.hidden, s.intermediate), "d": (s.intermediate, s.hidden)}
    found: dict[str, tuple[int, ...]] = {"x": (s.tokens, s.hidden)}
    for n, (i, o) in sizes.items():
        found |= {f"W{n}": (o, i), f"A{n}": (s.rank, i), f"B{n}": (o, s.rank)}
    return found


def _projections(t: Tensors) -> list[Projection]:
    return [Projection(t[f"W{n}"], adapters=(Adapter(t[f"A{n}"], t[f"B{n}"], SCALE),)) for n in "gud"]


def _together(t: Tensors):
    return (adapted_mlp(t["x"], *_projections(t)),)


def _apart(t: Tensors):
    gate, up, down = _projections(t)
    g, u = lora_linear(t["x"], [gate, up])
    h = glu(g, u)
    return lora_linear(h, [down], recomputation=Recomputation((g, u), glu_recompute))


def _eager(t: Tensors):
    linear = lambda x, n: x @ t[f"W{n}"].t() + (x @ t[f"A{n}"].t()) @ t[f"B{n}"].t() * SCALE
    return (linear(torch.nn.functional.silu(linear(t["x"], "g")) * linear(t["x"], "u"), "d"),)


def _work(s: Size, b: int):
    """The large products, and the least that is read and written between them."""
    flops = 6.0 * s.tokens * s.hidden * s.intermediate
    weights, wide = 3.0 * b * s.hidden * s.intermediate, float(b) * s.tokens * s.intermediate
    return (flops, weights + 7 * wide), (flops, weights + 11 * wide)


TRAINED = ("x", *(f"{m}{n}" for n in "gud" for m in "AB"))
CASES = (
    Case("MLP with adapters, in one function", _shapes, TRAINED, _together, _eager, _work),
    Case("MLP with adapters, as three functions", _shapes, TRAINED, _apart, _eager, _work),
)


@contextmanager
def _launched(table: str, launch: AdaptedGluLaunch | None) -> Iterator[None]:
    """The kernel of `table` in these tiles."""
    before = getattr(adapted_glu, table)
    if launch is not None:
        setattr(adapted_glu, table, launch if table == "FWD" else dict.fromkeys(before, launch))
    try:
        yield
    finally:
        setattr(adapted_glu, table, before)


def _forward(t: Tensors) -> Tensors:
    return {"h": adapted_glu_fwd(t["gate"], t["up"], t["xA"], t["Bg"], t["Bu"], SCALE, SCALE, *FORM)}


def _forward_apart(t: Tensors) -> Tensors:
    r = t["Bg"].shape[1]
    g = torch.addmm(t["gate"], t["xA"][:, :r], t["Bg"].t(), alpha=SCALE)
    return {"h": glu_recompute(g, torch.addmm(t["up"], t["xA"][:, r:], t["Bu"].t(), alpha=SCALE))}


def _backward(t: Tensors) -> Tensors:
    names = ("dh0", "dhA", "gate", "up", "xA", "Bg", "Bu", "Ad")
    dgate, dup, parts = adapted_glu_bwd(*(t[n] for n in names), SCALE, SCALE, *FORM)
    sums = adapted_glu_sums(parts, dgate.dtype).split([t[n].numel() for n in names[-3:]])
    return {"dgate": dgate, "dup": dup} | {f"d{n}": d.view(t[n].shape) for n, d in zip(names[-3:], sums)}


def _backward_apart(t: Tensors) -> Tensors:
    """g, u: with their adapters, as the forward of separate functions leaves them."""
    r = t["Bg"].shape[1]
    dh = torch.addmm(t["dh0"], t["dhA"], t["Ad"])
    dAd = torch.mm(t["dhA"].t(), glu_recompute(t["g"], t["u"]))
    dgate, dup = torch.ops.fastft.glu_bwd(dh, t["g"], t["u"], *FORM, True, True)
    dBg, dBu = product(dgate.t(), t["xA"][:, :r], SCALE), product(dup.t(), t["xA"][:, r:], SCALE)
    return {"dgate": dgate, "dup": dup, "dBg": dBg, "dBu": dBu, "dAd": dAd}


def _inputs(size: Size, device: torch.device, dtype: torch.dtype) -> Tensors:
    g = torch.Generator(device=device).manual_seed(0)
    T, N, r = size.tokens, size.intermediate, size.rank
    shapes = {"gate": (T, N), "up": (T, N), "dh0": (T, N), "xA": (T, 2 * r), "dhA": (T, r)}
    shapes |= {"Bg": (N, r), "Bu": (N, r), "Ad": (r, N)}
    t = {n: torch.randn(s, generator=g, device=device) for n, s in shapes.items()}
    return {n: (x * 0.1 if n in ("Bg", "Bu", "Ad") else x).to(dtype) for n, x in t.items()}


def _with_adapters(t: Tensors) -> Tensors:
    """Beside the inputs g and u."""
    r = t["Bg"].shape[1]
    g = torch.addmm(t["gate"], t["xA"][:, :r], t["Bg"].t(), alpha=SCALE)
    return t | {"g": g, "u": torch.addmm(t["up"], t["xA"][:, r:], t["Bu"].t(), alpha=SCALE)}


def passes(
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    roof: Roof,
    timer: ColdTimer,
    backward: bool,
    launch: AdaptedGluLaunch | None = None,
) -> Figures:
    """Figures of one pass, in the tiles of `launch` where it is given. Raises Red where it is wrong."""
    t = _with_adapters(_inputs(size, device, dtype))
    reference = _with_adapters({n: t[n].double() for n in t if n not in ("g", "u")})
    ours, apart = (_backward, _backward_apart) if backward else (_forward, _forward_apart)
    wide = adapted_glu.capability_of(t["gate"]) in (9, 10)
    with _launched("FWD" if not backward else "BWD_WIDE" if wide else "BWD", launch):
        verdict = compare(ours(t), apart(reference), apart(t))
        if not verdict:
            raise Red(str(verdict))
        mine = timer(lambda: ours(t))
    del reference
    theirs = timer(lambda: apart(t))
    bytes_ = dtype.itemsize * t["gate"].numel() * (5 if backward else 3)
    part = "bwd" if backward else "fwd"
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "error": verdict.error,
        "stock error": verdict.eager_error,
        f"{part} us": mine.median * 1e6,
        f"{part} p20-p80": f"{mine.p20 * 1e6:.4g}-{mine.p80 * 1e6:.4g}",
        f"{part} stock us": theirs.median * 1e6,
        "% of roof": 100 * roof.seconds(0.0, bytes_) / mine.median,
        "stock % of roof": 100 * roof.seconds(0.0, bytes_) / theirs.median,
    }


def section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    size, dtype = (TINY if tiny else FULL), torch.bfloat16
    timer = ColdTimer(device, seconds=0.02 if tiny else 0.15, least=3 if tiny else 5)
    row = lambda name, make: sheet.run(name, make, least=0.0 if tiny else 5.0)
    for case in CASES:
        row(case.name, lambda case=case: measure(case, size, device, dtype, roof, timer))
    for backward in (False, True):
        part = "backward" if backward else "forward"
        name = f"passes between the products, {part}"
        row(name, lambda b=backward: passes(size, device, dtype, roof, timer, b))
        for tiles in () if tiny else (BACKWARD if backward else FORWARD):
            launch = AdaptedGluLaunch(*tiles)
            row(
                f"{name}, {tiles[0]} x {tiles[1]}, {tiles[2]} warps, {tiles[3]} stages",
                lambda b=backward, launch=launch: passes(size, device, dtype, roof, timer, b, launch),
            )
