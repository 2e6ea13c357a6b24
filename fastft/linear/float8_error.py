"""What a group of FP8 layers loses: how it multiplies, and its error against float64 beside bf16's and NF4's.

On numbers drawn at random (normal, a layer as wide as the group's, 64 tokens), as the weights that were rounded are no
longer there: one layer's output and its input's gradient, root mean square relative to the true values'. (An adapter's
gradients are of the input as it is, which nothing rounds.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from fastft.linear.float8_linear import Float8Linear, float8_layers, float8_weight
from fastft.linear.projection import Layer, base_of, bitsandbytes_class, is_float8
from fastft_kernels.quant.scaled_product import why_dense

TOKENS, OUTPUTS, BLOCKSIZE = 64, 64, 64


def float8_note(members: Sequence[Layer], known: dict) -> str:
    """A line for the report; empty where no member is in FP8. known: what has been measured, by what it depends on."""
    bases = [base_of(m) for m in members if is_float8(base_of(m))]
    if not bases:
        return ""
    ways = {}
    for base in bases:
        layout = float8_weight(base).layout()
        why = why_dense(layout, base.compute_dtype, base.weight.device)
        way = f"made dense for its products ({why})" if why and not base.choice else _PRODUCTS[base.products]
        way += f" ({base.choice})" if base.choice else ""
        ways.setdefault(way, base)
    base = next(iter(ways.values()))
    layout = float8_weight(base).layout()
    is_dense = bool(why_dense(layout, base.compute_dtype, base.weight.device))
    key = (base.in_features, base.block, "" if is_dense else base.products)
    if key not in known:
        known[key] = _errors(*key)
    errors = ", ".join(f"{name} {y:.1e} {dx:.1e}" for name, (y, dx) in known[key].items())
    return f"{'; '.join(ways)}; rms error of output and input gradient on random numbers: {errors}"


_PRODUCTS = {
    "": "FP8 weight made dense for its products",
    "forward": "FP8 forward, bf16 backward",
    "both": "FP8 forward and backward",
}


def underflow_lines(model: nn.Module) -> list[str]:
    """Lines about the gradients that were rounded to zero in the first backwards, once there were any."""
    meters = {id(m.underflow): m.underflow for m in float8_layers(model) if m.underflow is not None}
    shares = {shape: share for meter in meters.values() for shape, share in meter.shares().items()}
    if not shares:
        return []
    worst = max(shares, key=lambda shape: shares[shape])
    return [
        f"FP8 backward: of the gradients of layers' outputs that were not zero, {min(shares.values()):.2%} to "
        f"{shares[worst]:.2%} (layers of {worst[1]} to {worst[0]}) were rounded to zero, in the first backwards"
    ]


def _errors(width: int, block: tuple[int, int] | None, products: str) -> dict[str, tuple[float, float]]:
    """{form: (of the output, of the input's gradient)}"""
    generator = torch.Generator().manual_seed(11)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).float()
    outputs = OUTPUTS if block is None else max(OUTPUTS, block[0])
    x, w, dy = draw(TOKENS, width).bfloat16(), draw(outputs, width) * width**-0.5, draw(TOKENS, outputs).bfloat16()
    w = w.bfloat16()
    exact = x.double() @ w.double().t(), dy.double() @ w.double()
    layer = nn.Linear(width, outputs, bias=False, dtype=torch.bfloat16, device="cpu")
    layer.weight.data.copy_(w)
    float8 = Float8Linear.of(layer, block, products)
    float8.is_specification = True
    given = x.clone().requires_grad_()
    with torch.enable_grad():
        y = float8(given)
    found = {"FP8": (y.detach(), *torch.autograd.grad(y, given, dy)), "bf16": (x @ w.t(), dy @ w)}
    if bitsandbytes_class("Linear4bit") is not None:
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit

        packed, state = quantize_4bit(w, blocksize=BLOCKSIZE, quant_type="nf4", compress_statistics=True)
        nf4 = dequantize_4bit(packed, state).to(w.dtype)
        found["NF4"] = (x @ nf4.t(), dy @ nf4)
    off = lambda a, b: float((a.double() - b).norm() / b.norm())
    return {name: (off(y, exact[0]), off(dx, exact[1])) for name, (y, dx) in found.items()}
