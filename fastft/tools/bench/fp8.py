"""`fastft bench MODEL --fp8`: both products of each shape of linear layer in FP8 and with the weight made dense, on
this device, as a table that `FastModel.from_pretrained(..., load_in_fp8=True, fp8_table=FILE)` decides by.

Each shape is judged first, at the size at which it is timed: bits of what is quantised and transposed, and errors
against float64 beside those of the same roundings in plain torch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastft.errors import QuantizationError
from fastft.linear.float8_table import Float8Table, ProductTimes, chosen
from fastft.loading.fp8 import linears_of
from fastft.tables import table
from fastft.tools.bench.timing import ColdTimer
from fastft_kernels.numerics import compare
from fastft_kernels.quant import scaled_product
from fastft_kernels.quant.fp8 import quantize_e4m3_rows, quantize_rows_ref
from fastft_kernels.quant.transpose import transpose_8bit
from fastft_kernels.quant.weights import Float8

CHECKED = 256  # tokens of a product that are judged


class ShapeOperands:
    """Random operands of one shape [tokens, in] x [out, in]."""

    def __init__(self, out: int, width: int, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        g = torch.Generator(device=device).manual_seed(0)
        draw = lambda *shape: torch.randn(*shape, generator=g, device=device)
        self.dtype, self.w = dtype, (draw(out, width) * 0.02).to(dtype)
        self.x, self.dy = draw(tokens, width).to(dtype), (draw(tokens, out) * 1e-3).to(dtype)
        self.weight = Float8(*quantize_e4m3_rows(self.w), None, "both")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """y of rows of x, by FP8 matrices."""
        return scaled_product.product(scaled_product.quantized(x), self.weight.q, self.weight.scale, self.dtype)

    def backward(self, dy: torch.Tensor) -> torch.Tensor:
        """dx of rows of dy, by FP8 matrices."""
        return scaled_product.input_gradient(dy, self.weight.q, self.weight.scale, self.dtype)

    def wrong(self) -> str:
        """Why these products may not be timed: other bits than the reference's, or a larger error than that of the same
        roundings; empty if they may."""
        q, scale = self.weight.q, self.weight.scale
        x, dy = self.x[:CHECKED], self.dy[:CHECKED]
        for name, rows, columns in (("x", x, None), ("dy", dy, scale.view(-1))):
            for mine, theirs in zip(quantize_e4m3_rows(rows, columns), quantize_rows_ref(rows, columns)):
                if not _same_bits(mine, theirs):
                    return f"{name} is quantised to other bits than the reference's"
        if not _same_bits(transpose_8bit(q), q.t().contiguous()):
            return "the transpose has other bits than torch's"

        def results(up: torch.dtype) -> dict[str, torch.Tensor]:
            given = x.to(up).requires_grad_()
            with torch.enable_grad():
                y = scaled_product.specified(given, self.weight.layout(), q, scale)
            return {"y": y.detach(), "dx": torch.autograd.grad(y, given, dy.to(up))[0]}

        verdict = compare({"y": self.forward(x), "dx": self.backward(dy)}, results(torch.float64), results(self.dtype))
        return "" if verdict else str(verdict)

    def times(self, timer: ColdTimer) -> ProductTimes:
        """Microseconds of each product; a dense one makes its matrix first."""
        us = lambda fn: timer(fn).median * 1e6
        return ProductTimes(
            us(lambda: self.forward(self.x)),
            us(lambda: self.backward(self.dy)),
            us(lambda: torch.mm(self.x, self.weight.dense(self.dtype).t())),
            us(lambda: torch.mm(self.dy, self.weight.dense(self.dtype))),
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@dataclass
class Float8Bench:
    """The table, where it was written, and the shapes that were red with their verdicts."""

    table: Float8Table
    path: Path
    red: dict[tuple[int, int], str]

    @property
    def ok(self) -> bool:
        return not self.red

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**self.table.to_dict(), "path": str(self.path), "red": {str(list(s)): v for s, v in self.red.items()}}

    def __rich_console__(self, console: Console, options: Any):
        names = ["out x in", "FP8 fwd us#", "FP8 bwd us#", "dense fwd us#", "dense bwd us#", "used"]
        rows = []
        for shape, times in self.table.rows.items():
            best = chosen("both", shape, self.table)[0] or "dense"
            rows.append([f"{shape[0]} x {shape[1]}", *(f"{t:.0f}" for t in times), best])
        rows += [[f"{s[0]} x {s[1]}", "red", "", "", "", verdict] for s, verdict in self.red.items()]
        title = f"FP8 on {self.table.device}, {self.table.tokens} tokens"
        styles = ["green"] * len(self.table.rows) + ["red"] * len(self.red)
        yield table(title, names, rows, styles, options.max_width)
        yield f"{self.path}: give it to FastModel.from_pretrained(..., load_in_fp8=True, fp8_table=...)"


def shapes_of(model: str) -> list[tuple[int, int]]:
    """(out, in) of each distinct shape among the linear layers that load_in_fp8 quantises."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    return list(dict.fromkeys((m.out_features, m.in_features) for m in linears_of(made)))


def measure(
    shapes: list[tuple[int, int]], tokens: int, device: torch.device, path: Path, timer: ColdTimer | None = None
) -> Float8Bench:
    """The table of `shapes`, written to `path`."""
    timer = timer or ColdTimer(device, seconds=0.1)
    cuda = device.type == "cuda"
    rows, red = {}, {}
    for out, width in shapes:
        operands = ShapeOperands(out, width, tokens, device, torch.bfloat16)
        if why := scaled_product.why_dense(operands.weight.layout(), torch.bfloat16, device) or operands.wrong():
            red[out, width] = why
        else:
            rows[out, width] = operands.times(timer)
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    capability = torch.cuda.get_device_capability(device) if cuda else (0, 0)
    found = Float8Bench(Float8Table(name, capability, tokens, rows), path, red)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found.table.to_dict(), indent=1) + "\n")
    return found


def bench(model: str, tokens: int, folder: Path) -> Float8Bench:
    """Raises QuantizationError on a device without FP8 units."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not scaled_product.has_units(device):
        raise QuantizationError(
            f"fastft bench --fp8: want a GPU with FP8 units (compute capability 8.9 or more), got {device.type}; "
            "leave --fp8 out for whole steps"
        )
    return measure(shapes_of(model), tokens, device, folder / "fp8.json")
