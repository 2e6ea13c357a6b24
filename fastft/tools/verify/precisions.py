"""What FP8 changes in a training step: loss and gradients of one checkpoint in FP8 beside bf16 and NF4, on the same
batch and with the same adapter, against float64 where that fits.

    loss          and how far it is from bf16's
    cosine        of all gradients of the adapters, as one vector, with bf16's
    error         of that vector, |g - g64| / |g64|; against bf16's where there is no room for float64
    worst         the kind of layer (q_proj, ...) whose gradients have the smallest cosine, and that

Each precision is loaded, run and dropped in turn. FP8 passes when its error is no larger than NF4's: the precision in
which people train already. Without bitsandbytes there is no NF4, and FP8 is only shown."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import io
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import nn

from fastft.tables import table

Step = dict[str, torch.Tensor]  # the loss, and gradients by parameter, on the CPU

LOAD: dict[str, dict[str, Any]] = {"bf16": {}, "FP8": {"load_in_fp8": True}, "NF4": {"load_in_4bit": True}}


@dataclass(frozen=True)
class PrecisionLine:
    """One precision's step. error: of the gradients; cosine: with bf16's; worst: (kind of layer, its cosine)."""

    precision: str
    loss: float
    cosine: float
    error: float
    worst: tuple[str, float]


@dataclass(frozen=True)
class PrecisionComparison:
    """The step in each precision. reference: what errors are against, "float64" or "bf16". `bool()`: is FP8 finite,
    and no further from the reference than NF4?"""

    lines: tuple[PrecisionLine, ...]
    reference: str

    def __bool__(self) -> bool:
        of = {x.precision: x for x in self.lines}
        fp8, nf4 = of["FP8"], of.get("NF4")
        return math.isfinite(fp8.loss) and math.isfinite(fp8.error) and (nf4 is None or fp8.error <= nf4.error)

    def render(self, width: int) -> Iterator[Table | Text]:
        """The table, and the verdict where it is against FP8."""
        base = self.lines[0].loss
        rows = [
            [x.precision, f"{x.loss:.4f}", f"{x.loss - base:+.4f}", f"{x.cosine:.6f}", f"{x.error:.1e}"]
            + [f"{x.worst[0]} {x.worst[1]:.4f}"]
            for x in self.lines
        ]
        columns = ["base", "loss#", "from bf16#", "gradients' cosine with bf16's#", f"error against {self.reference}#"]
        yield table("FP8 beside bf16 and NF4", [*columns, "smallest cosine"], rows, [""] * len(rows), width)
        if not self:
            yield Text("failed: FP8's gradients are further from the reference than NF4's", style="bold red")


def compare_precisions(
    load: Callable[..., nn.Module],
    step: Callable[[nn.Module], Step],
    exact: Callable[[nn.Module], Step | None],
) -> PrecisionComparison:
    """load(**keywords of FastModel): the patched model with its adapter; step(model): its loss and gradients; exact:
    the same in float64, or None where there is no room for it."""
    steps: dict[str, Step] = {}
    truth: Step | None = None
    for name, how in LOAD.items():
        if name == "NF4" and importlib.util.find_spec("bitsandbytes") is None:
            continue
        with contextlib.redirect_stdout(io.StringIO()):
            model = load(**how)
        steps[name] = {k: v.detach().double().cpu() for k, v in step(model).items()}
        if name == "bf16":
            truth = exact(model)
        del model
        gc.collect()
    base = steps["bf16"]
    truth = base if truth is None else {k: v.double().cpu() for k, v in truth.items()}
    lines = tuple(_line(name, found, base, truth) for name, found in steps.items())
    return PrecisionComparison(lines, "bf16" if truth is base else "float64")


def _line(name: str, step: Step, base: Step, truth: Step) -> PrecisionLine:
    kinds: dict[str, list[str]] = {}
    for key in step.keys() - {"loss"}:
        kinds.setdefault(_kind(key), []).append(key)
    worst = min((_cosine(step, base, keys), kind) for kind, keys in sorted(kinds.items()))
    every = sorted(step.keys() - {"loss"})
    far = sum(float((step[k] - truth[k]).square().sum()) for k in every) ** 0.5
    size = sum(float(truth[k].square().sum()) for k in every) ** 0.5
    loss = float(step["loss"].flatten()[0])
    return PrecisionLine(name, loss, _cosine(step, base, every), far / size if size else math.nan, (worst[1], worst[0]))


def _cosine(a: Step, b: Step, keys: list[str]) -> float:
    dot, aa, bb = (sum(float((x[k] * y[k]).sum()) for k in keys) for x, y in ((a, b), (a, a), (b, b)))
    return dot / math.sqrt(aa * bb) if aa and bb else math.nan


def _kind(name: str) -> str:
    """Of `...layers.3.mlp.down_proj.lora_A.default.weight`: "down_proj"."""
    return name.split(".lora_")[0].rpartition(".")[2]
