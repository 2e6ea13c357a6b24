"""FP8 bases: every product of an 8B decoder's layers alone, then a whole LoRA step beside our own in bf16.

What is multiplied is held to its specification first, at the shape that is timed: the bits of what is quantised and
transposed, and the products' errors against float64 beside those of the same roundings in plain torch. A step's losses
are shown beside bf16's, whose model it is: its linear layers are quantised in place after its own step was timed."""

from __future__ import annotations

import gc
from typing import Any

import torch
from torch import nn

import fastft
from benchmarks.gpu_kernels import FULL, TINY, Size
from benchmarks.gpu_models import batch, build, config_8b
from benchmarks.gpu_steps import STACKS, figures, fitting, sft_loss, shape_of
from benchmarks.sheet import Figures, Missing, Red, Sheet
from fastft.linear.float8_linear import Float8Linear, float8_layers
from fastft.tools.bench.fp8 import ShapeOperands
from fastft.tools.bench.timing import ColdTimer, Roof
from fastft_kernels.quant import scaled_product
from fastft_kernels.quant.transpose import transpose_8bit


def shapes(size: Size) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer of a decoder layer."""
    heads, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    return {
        "q_proj, o_proj": (heads, size.hidden),
        "k_proj, v_proj": (kv, size.hidden),
        "gate_proj, up_proj": (size.intermediate, size.hidden),
        "down_proj": (size.hidden, size.intermediate),
    }


def rows_of_fp8(
    out: int, width: int, tokens: int, device: torch.device, roof: Roof, timer: ColdTimer, dtype=torch.bfloat16
) -> Figures:
    """One shape: bf16's product, FP8's forward with its quantisation, its backward with the transposition; and their
    parts. Raises Red with the verdict, Missing where the device does not multiply in FP8."""
    operands = ShapeOperands(out, width, tokens, device, dtype)
    w, x, dy, weight = operands.w, operands.x, operands.dy, operands.weight
    if why := scaled_product.why_dense(weight.layout(), dtype, device):
        raise Missing(f"FP8 products do not run here: {why}")
    if why := operands.wrong():
        raise Red(why)
    q, scale = weight.q, weight.scale
    rounded, of_dy = scaled_product.quantized(x), scaled_product.quantized(dy, scale)
    turned, one = transpose_8bit(q), scale.new_ones((width, 1))
    us = lambda fn: timer(fn).median * 1e6
    found: dict[str, float] = {
        "bf16 fwd us": us(lambda: torch.mm(x, w.t())),
        "bf16 bwd us": us(lambda: torch.mm(dy, w)),
        "fwd us": us(lambda: operands.forward(x)),
        "bwd us": us(lambda: operands.backward(dy)),
        "quantise x us": us(lambda: scaled_product.quantized(x)),
        "quantise dy us": us(lambda: scaled_product.quantized(dy, scale)),
        "transpose us": us(lambda: transpose_8bit(q, turned)),
        "fwd product us": us(lambda: scaled_product.product(rounded, q, scale, dtype)),
        "bwd product us": us(lambda: scaled_product.scaled(of_dy, scaled_product.Quantized(turned, one), dtype)),
    }
    found["fwd speedup"] = found["bf16 fwd us"] / found["fwd us"]
    found["bwd speedup"] = found["bf16 bwd us"] / found["bwd us"]
    found["% of bf16 roof"] = 100 * roof.seconds(4.0 * tokens * out * width) * 1e6 / (found["fwd us"] + found["bwd us"])
    lost = (of_dy.q.float() == 0) & (dy != 0)
    found["dy that underflows %"] = 100 * float(lost.float().mean())
    return {**found}


def quantise(model: Any, products: str) -> None:
    """Every frozen linear layer but the head in FP8, in place; those that are already multiply as `products` says."""
    for layer in float8_layers(model):
        layer.products = products
    head = model.get_output_embeddings()
    for m in list(model.modules()):
        if type(m) is nn.Linear and m is not head and not m.weight.requires_grad:
            Float8Linear.of(m, None, products)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def step(model: Any, lengths: list[int], tiny: bool, device: torch.device, roof: Roof) -> Figures:
    """A step of training on fastft. Raises Red where a linear layer stays stock."""
    b = batch(lengths, model.config.vocab_size, device)
    with STACKS["fastft"][0](model, device):
        left = [r for r in fastft.report(model) if r.kind == "linear group" and not r.is_swapped]
        if left:
            raise Red(f"{left[0].count} linear layers stay stock: {left[0].reason}")
    found = figures(
        fitting(model, "fastft", sft_loss, b, device, seconds=0.0 if tiny else 3.0),
        lengths,
        shape_of(tiny),
        roof,
        sft_loss,
        False,
    )
    return {"weights GiB": sum(p.nbytes for p in model.parameters()) / 2**30, **found}


def section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    size = TINY if tiny else FULL
    timer = ColdTimer(device, seconds=0.02 if tiny else 0.1, least=3 if tiny else 5)
    for name, (out, width) in shapes(size).items():
        sheet.run(
            f"{name}: [{size.tokens}, {width}] x [{out}, {width}]",
            lambda out=out, width=width: rows_of_fp8(out, width, size.tokens, device, roof, timer),
        )
    lengths = [24 if tiny else 2048] * 4
    made: dict[str, nn.Module] = {}

    def measure(products: str | None) -> Figures:
        if "model" not in made:
            made["model"] = build(config_8b(tiny), device)
        if products is not None:
            quantise(made["model"], products)
        return step(made["model"], lengths, tiny, device, roof)

    for name, products in (("bf16", None), ("FP8", "both"), ("FP8, bf16 backward", "forward")):
        sheet.run(f"8B shape, {name}, 4x{lengths[0]}: fastft", lambda p=products: measure(p), 0.0 if tiny else 12.0)
