"""`fastft verify`: on the user's machine, model and data, stock against patched, judged against float64.

Two levels. Per group of the patch report one module is taken with its real weights, fed what it really received in the stock forward,
and run three times: stock, patched, and stock in float64 (`float64_truth`). Then the whole model: loss and the gradient of every trainable
parameter, the same three ways, where a float64 copy fits in memory; a larger model is verified decoder layer by decoder layer instead.
Dropout is off meanwhile. The verdict is the judge's; whatever fails is named by its group.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text
from torch import nn

from fastft.model.api import patch, report, unpatch
from fastft.patching.clone import clone
from fastft.patching.patcher import innermost, record_of
from fastft.patching.prove import cast_parameters
from fastft.patching.truth import float64_truth
from fastft.swaps.lora_proof import dense_in_float64
from fastft_kernels.numerics import Verdict, compare

WHOLE_MODEL_BYTES = 4 << 30  # of a float64 copy


@dataclass(frozen=True)
class Line:
    """One comparison: max error relative to the largest true value, ours and stock's; `worst` names the output or gradient."""

    level: str  # "module", "layer" or "model"
    group: str
    module: str
    kernel: str
    ok: bool
    error: float
    stock_error: float
    worst: str

    @classmethod
    def of(cls, level: str, group: str, module: str, kernel: str, v: Verdict) -> Line:
        return cls(level, group, module, kernel, v.ok, v.error, v.eager_error, f"{v.name} {v.reason}".strip())


@dataclass(frozen=True)
class Verification:
    """`bool()` is the verdict; printing shows the table; `.to_dict()` is JSON-ready."""

    model: str
    dtype: str
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lines) and all(line.ok for line in self.lines)

    @property
    def failed(self) -> tuple[Line, ...]:
        return tuple(line for line in self.lines if not line.ok)

    def to_dict(self) -> dict:
        clean = lambda d: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in d.items()}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "ok": bool(self),
            "lines": [clean(asdict(x)) for x in self.lines],
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        table = Table(title=f"fastft verify: {self.model}, {self.dtype}: {'PASS' if self else 'FAIL'}", title_justify="left")
        for column in ("level", "group", "kernel", "error", "stock error", "verdict", "worst"):
            table.add_column(column, overflow="fold")
        for x in self.lines:
            numbers = [f"{v:.2e}" if math.isfinite(v) else "" for v in (x.error, x.stock_error)]
            table.add_row(x.level, x.group, x.kernel, *numbers, "pass" if x.ok else "FAIL", Text(x.worst), style="" if x.ok else "bold red")
        yield table
        for note in self.notes:
            yield Text(note)

    def __str__(self) -> str:
        console = Console(width=150, no_color=True, highlight=False)
        with console.capture() as capture:
            console.print(self)
        return capture.get()


def verify(model: nn.Module, batch: dict | None = None, *, seq: int = 64, size: int = 2, seed: int = 0) -> Verification:
    """Judge `model` (patched or not; afterwards as it was) on `batch`, keyword arguments of one training forward with labels.

    batch None draws random tokens [size, seq] and uses them as labels. Raises ValueError where the model returns no loss for them.
    """
    was_patched = record_of(model) is not None
    base = innermost(model)
    batch = dict(batch) if batch is not None else _random_batch(base, size, seq, seed)
    batch.setdefault("use_cache", False)  # a cache would be filled twice
    modes = [(m, m.training) for m in model.modules()]
    drops = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    random = torch.random.get_rng_state()
    try:
        model.train()
        for m, _ in drops:
            m.p = 0.0
        patch(model)
        rows = report(model).swapped
        layers, whole = [], _float64_bytes(base) <= WHOLE_MODEL_BYTES
        unpatch(model)
        names = dict(base.named_modules())
        if not whole:
            layers = _layers(base)
        examples = [(r.kind, r.group, r.example, r.kernel) for r in rows]
        calls = _capture(model, batch, {names[n]: n for _, _, n, _ in examples} | {m: n for n, m in layers})
        targets = [("module", *e) for e in examples] + [("layer", "decoder layer", type(m).__name__, n, "all of its swaps") for n, m in layers]
        notes = [f"{kind}: {group} ({name}) was not reached by this batch" for _, kind, group, name, _ in targets if name not in calls]
        targets = [t for t in targets if t[3] in calls]
        stock = [(_truth(names[n], *calls[n]), _results(names[n], *calls[n])) for _, _, _, n, _ in targets]
        stock_step = stock_steps(model, batch) if whole else None
        patch(model)
        lines = [
            Line.of(level, f"{kind}: {group}", name, kernel, compare(_results(names[name], *calls[name]), truth, eager))
            for (level, kind, group, name, kernel), (truth, eager) in zip(targets, stock)
        ]
        if stock_step is not None:
            lines.append(Line.of("model", "loss and every gradient", "", "all swaps", compare(_step(model, batch), *stock_step)))
    finally:
        for m, mode in modes:
            m.training = mode
        for m, p in drops:
            m.p = p
        if was_patched and record_of(model) is None:
            patch(model)
        elif not was_patched and record_of(model) is not None:
            unpatch(model)
        torch.random.set_rng_state(random)
    dtype = next((str(p.dtype).removeprefix("torch.") for p in base.parameters() if p.is_floating_point()), "")
    return Verification(type(base).__name__, dtype, tuple(lines), tuple(notes))


def _random_batch(base: nn.Module, size: int, seq: int, seed: int) -> dict:
    config = base.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (size, seq), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(next(base.parameters()).device)
    return {"input_ids": ids, "labels": ids.clone()}


def _float64_bytes(base: nn.Module) -> int:
    """Of a float64 copy with gradients; a quantised weight expands to more elements than it stores."""
    return 16 * sum(getattr(getattr(p, "quant_state", None), "shape", p.shape).numel() for p in base.parameters())


def _layers(base: nn.Module) -> list[tuple[str, nn.Module]]:
    """First, middle and last of the longest list of modules: the decoder layers."""
    lists = [(n, m) for n, m in base.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        return []
    name, layers = max(lists, key=lambda nm: len(nm[1]))
    return [(f"{name}.{i}", layers[i]) for i in sorted({0, len(layers) // 2, len(layers) - 1})]


def _capture(model: nn.Module, batch: dict, wanted: dict[nn.Module, str]) -> dict[str, tuple[tuple, dict]]:
    """What each wanted module received first in the stock forward."""
    calls: dict[str, tuple[tuple, dict]] = {}
    keep = lambda v: v.detach().clone() if isinstance(v, torch.Tensor) else type(v)(map(keep, v)) if type(v) in (tuple, list) else v

    def note(module, args, kwargs):
        calls.setdefault(wanted[module], (keep(args), {k: keep(v) for k, v in kwargs.items()}))

    with contextlib.ExitStack() as stack:
        for m in wanted:
            stack.callback(m.register_forward_pre_hook(note, with_kwargs=True).remove)
        with torch.no_grad():
            model(**batch)
    return calls


def _results(module: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype | None = None, truth: bool = False) -> dict[str, torch.Tensor]:
    """Floating outputs, gradients of floating inputs and of the parameters that train, for one random upstream gradient."""
    leaves: dict[str, torch.Tensor] = {}

    def lift(v, name):
        if isinstance(v, torch.Tensor) and v.is_floating_point():
            v = v.to(dtype or v.dtype)
            if not name.startswith(("attention_mask", "position_embeddings", "cos", "sin")):
                v = v.detach().requires_grad_()
                leaves[f"d {name}"] = v
            return v
        if type(v) in (tuple, list):
            return type(v)(lift(x, f"{name}.{i}") for i, x in enumerate(v))
        return v

    args = tuple(lift(v, f"input {i}") for i, v in enumerate(args))
    kwargs = {k: lift(v, k) for k, v in kwargs.items()}
    leaves |= {f"d {n}": p for n, p in module.named_parameters() if p.requires_grad}
    with float64_truth() if truth else contextlib.nullcontext():
        outs = [t for t in _tensors(module(*args, **kwargs)) if t.is_floating_point()]
        g = torch.Generator().manual_seed(11)
        ups = [torch.randn(o.shape, generator=g, dtype=torch.float64).float().to(o.device, o.dtype) for o in outs]
        pairs = [(o, u) for o, u in zip(outs, ups) if o.requires_grad]
        grads = torch.autograd.grad([o for o, _ in pairs], list(leaves.values()), [u for _, u in pairs], allow_unused=True) if pairs else ()
    found = {f"output {i}": o.detach() for i, o in enumerate(outs)}
    return found | {k: v for k, v in zip(leaves, grads) if v is not None}


def _tensors(out) -> Iterator[torch.Tensor]:
    if isinstance(out, torch.Tensor):
        yield out
    elif isinstance(out, dict):
        yield from _tensors(tuple(out.values()))
    elif isinstance(out, (tuple, list)):
        for o in out:
            yield from _tensors(o)


def _truth(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, torch.Tensor]:
    return {k: v.double() for k, v in _results(in_float64(module), args, kwargs, torch.float64, True).items()}


def in_float64(module: nn.Module) -> nn.Module:
    """A stock copy in float64 (a quantised weight as the matrix that it stands for), with the same parameters training."""
    quantised = any(hasattr(getattr(m, "weight", None), "quant_state") for m in module.modules())
    copy = dense_in_float64(module, torch.float64) if quantised else cast_parameters(clone(module), torch.float64)
    for (_, p), (_, q) in zip(copy.named_parameters(), module.named_parameters()):
        p.requires_grad_(q.requires_grad and p.is_floating_point())
    return copy


def _step(model: nn.Module, batch: dict, truth: bool = False) -> dict[str, torch.Tensor]:
    """Loss and the gradient of every trainable parameter."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with float64_truth() if truth else contextlib.nullcontext():
        loss = model(**batch).loss
        if loss is None:
            raise ValueError("verify: want a batch for which the model returns a loss (with labels)")
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {"loss": loss.detach()} | {n: g for n, g in zip(parameters, grads) if g is not None}
    return {k: v.double() for k, v in found.items()} if truth else found


def judge(stock: nn.Module, patched: nn.Module, batch: dict) -> Verdict:
    """Loss and every gradient of two models with the same weights, against a float64 copy of the stock one."""
    return compare(_step(patched, batch), *stock_steps(stock, batch))


def stock_steps(stock: nn.Module, batch: dict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(truth, eager) of a whole step, for `compare`.

    Through many layers rounding errors add up like a random walk, and one stock run is one sample of it: a gradient that nearly cancels
    may come out better than twice as good by luck. So stock runs three times, once as it is and twice with its float32 weights off by
    half a unit in the last place (what any implementation's first rounding does), and each result is taken from the run that is furthest from
    the truth. The comparison of single modules knows no such allowance.
    """
    truth = _step(in_float64(stock), batch, True)
    runs = [_step(stock, batch)]
    for seed in (1, 2):
        moved, g = clone(stock), torch.Generator().manual_seed(seed)
        for p in moved.parameters():
            if p.is_floating_point():
                noise = (torch.rand(p.shape, generator=g) - 0.5).to(p.device) * torch.finfo(p.dtype).eps
                p.data = (p.data.double() * (1 + noise.double())).to(p.dtype) if p.dtype == torch.float32 else p.data
        runs.append(_step(moved, batch))
    error = lambda run, k: float((run[k].double() - truth[k]).abs().max())
    return truth, {k: max(runs, key=lambda r, k=k: error(r, k))[k] for k in truth}


def verify_checkpoint(name: str, *, dtype: str = "auto", four_bit: bool = False, lora: bool = True, seq: int = 64, size: int = 2) -> Verification:
    """`verify` of a checkpoint as FastModel loads it, with B of the adapter drawn (at its initial zero no gradient would reach A)."""
    from peft import LoraConfig

    from fastft.model.loading import FastModel

    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if lora else None
    model = FastModel.from_pretrained(name, peft_config=config, load_in_4bit=four_bit, dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    for n, p in model.named_parameters():
        if "lora_B" in n:
            p.data.copy_(torch.randn(p.shape, generator=generator) * 0.02)
    return verify(model, seq=seq, size=size)
