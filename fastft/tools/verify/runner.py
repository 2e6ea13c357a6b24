"""`fastft verify`: on the user's machine, model and data, stock against patched, judged against float64.

Two levels. Per group of the patch report one module is taken with its real weights, fed what it really received in the
stock forward, and run three times: stock, patched, and stock in float64 (`float64_reference`). Then the whole model:
loss and the gradient of every trainable parameter, the same three ways, where float64 copies fit in memory; a larger
model is verified decoder layer by decoder layer instead, all of them, and then from the last one's output to the loss.
Dropout is off meanwhile. The verdict is the judge's; whatever fails is named by its group."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from fastft.api import patch, report, unpatch
from fastft.patching.patcher import innermost, record_of
from fastft.proving.clone import clone
from fastft.proving.float64 import float64_reference
from fastft.proving.tensors import tensors_in
from fastft.swapping.swap import as_stock
from fastft.tables import WIDE, as_text, table
from fastft.tools.gate import gate
from fastft.tools.verify.layers import Tail, decoder_layers, tail_of
from fastft.tools.verify.modules import in_float64, reference, results
from fastft.tools.verify.precisions import PrecisionComparison
from fastft_kernels.numerics import Verdict, compare

PARTS, IGNORED = 4, -100  # of a batch's labels; the label that no loss counts
WHOLE_MODEL_BYTES = 4 << 30  # of a float64 copy: above it the whole model takes too long, where it fits


@dataclass(frozen=True)
class VerificationLine:
    """One comparison: max error relative to the largest true value, ours and stock's; `worst` names the output or
    gradient."""

    level: str  # "module", "layer", "tail" or "model"
    group: str
    module: str
    kernel: str
    ok: bool
    error: float
    stock_error: float
    worst: str

    @classmethod
    def of(cls, level: str, group: str, module: str, kernel: str, v: Verdict) -> VerificationLine:
        return cls(level, group, module, kernel, v.ok, v.error, v.eager_error, f"{v.name} {v.reason}".strip())


@dataclass(frozen=True)
class Verification:
    """`bool()` is the verdict; printing shows the table; `.to_dict()` is JSON-ready."""

    model: str
    dtype: str
    lines: tuple[VerificationLine, ...]
    notes: tuple[str, ...] = ()
    precisions: PrecisionComparison | None = None  # of a base in FP8

    def __bool__(self) -> bool:
        told_apart = self.precisions is None or bool(self.precisions)
        return bool(self.lines) and all(line.ok for line in self.lines) and told_apart

    @property
    def failed(self) -> tuple[VerificationLine, ...]:
        """The lines that did not pass."""
        return tuple(line for line in self.lines if not line.ok)

    def to_dict(self) -> dict:
        """The verification as `json.dumps` takes it."""
        clean = lambda d: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in d.items()}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "ok": bool(self),
            "lines": [clean(asdict(x)) for x in self.lines],
            "notes": list(self.notes),
            "precisions": None if self.precisions is None else asdict(self.precisions) | {"ok": bool(self.precisions)},
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"fastft verify: {self.model}, {self.dtype}: {'PASS' if self else 'FAIL'}"
        number = lambda v: f"{v:.1e}" if math.isfinite(v) else ""
        rows = [
            ["pass" if x.ok else "FAIL", x.level, x.group, x.kernel, number(x.error), number(x.stock_error)]
            + ([x.worst] if options.max_width >= WIDE else [])
            for x in self.lines
        ]
        columns = ["", "level", "modules", "run by", "error#", "stock's#"]
        columns += ["worst"] if options.max_width >= WIDE else []
        styles = ["" if x.ok else "bold red" for x in self.lines]
        yield table(title, columns, rows, styles, options.max_width)
        for x in self.failed:
            yield Text(f"failed: {x.level} {x.group}, run by {x.kernel}: {x.worst}", style="bold red")
        for note in self.notes:
            yield Text(note)
        if self.precisions is not None:
            yield from self.precisions.render(options.max_width)

    def __str__(self) -> str:
        return as_text(self, 150)


def verify(
    model: nn.Module,
    batch: dict | None = None,
    *,
    seq: int = 64,
    size: int = 2,
    seed: int = 0,
    layers: bool | None = None,
) -> Verification:
    """Judge a model, stock against patched, on one batch.

    Args:
        model: patched or not; afterwards as it was.
        batch: keyword arguments of one training forward with labels; None draws random tokens [size, seq] and uses them
            as labels.
        seq, size, seed: tokens and rows of what is drawn, and the seed of it.
        layers: True verifies decoder layer by decoder layer, with one of them in float64 at a time; False the whole
            model at once; None by its size and the memory that is free.

    Returns:
        The verification: a line for each kind of module, and for the loss and its gradients; `print` shows its table.

    Raises:
        ValueError: the model returns no loss for the batch.
    """
    was_patched = record_of(model) is not None
    base = innermost(model)
    batch = dict(batch) if batch is not None else random_batch(base, size, seq, seed)
    batch.setdefault("use_cache", False)  # a cache would be filled twice
    layers = not whole_fits(base) if layers is None else layers
    modes = [(m, m.training) for m in model.modules()]
    drops = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    random = torch.random.get_rng_state()
    try:
        model.train()
        for m, _ in drops:
            m.p = 0.0
        patch(model)
        targets = [("module", r.kind, r.group, r.example, r.kernel) for r in report(model).swapped if r.example]
        unpatch(model)
        names = dict(base.named_modules())
        tail: tuple[Tail, Tail] | None = None
        notes: list[str] = []
        where, stack = decoder_layers(base) if layers else ("", [])
        if layers:
            targets += [
                ("layer", "decoder layer", f"{i}", f"{where}.{i}", "all of its swaps") for i in range(len(stack))
            ]
        calls, hidden = _capture(
            model, batch, {names[n]: n for _, _, _, n, _ in targets}, last=stack[-1] if stack else None
        )
        notes += [
            f"{kind}: {group} ({name}) was not reached by this batch"
            for _, kind, group, name, _ in targets
            if name not in calls
        ]
        stock_step = None if layers else stock_steps(model, batch)
        if hidden is not None:
            tail = _stock_tail(base, batch, hidden, notes)
        patch(model)
        lines = []
        for level, kind, group, name, kernel in targets:
            if name in calls:
                lines.append(
                    VerificationLine.of(
                        level, f"{kind}: {group}", name, kernel, _verdict(level, names[name], *calls[name])
                    )
                )
        if tail is not None and hidden is not None:
            lines.append(
                VerificationLine.of(
                    "tail",
                    "from the last layer to the loss",
                    "",
                    "all swaps",
                    gate(tail_of(base, batch, hidden), *tail),
                )
            )
        if stock_step is not None:
            lines.append(
                VerificationLine.of(
                    "model", "loss and every gradient", "", "all swaps", compare(step(model, batch), *stock_step)
                )
            )
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


def _verdict(level: str, module: nn.Module, args: tuple, kwargs: dict) -> Verdict:
    """A patched module against itself as stock, on one call; a layer's gradients are judged together."""
    with as_stock(module):
        true, eager = reference(module, args, kwargs), results(module, args, kwargs)
    ours = results(module, args, kwargs)
    return (
        gate(ours, true, eager, lambda name: name.startswith("output"))
        if level == "layer"
        else compare(ours, true, eager)
    )


def _stock_tail(base: nn.Module, batch: dict, hidden: torch.Tensor, notes: list[str]) -> tuple[Tail, Tail] | None:
    """(reference, eager) of what follows the last layer; None, and a note, where the model does not run without layers
    or float64 has no room."""
    try:
        return tail_of(base, batch, hidden, exact=True), tail_of(base, batch, hidden)
    except (torch.OutOfMemoryError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as e:
        notes.append(
            f"from the last layer to the loss: not verified ({type(e).__name__}: "
            f"{str(e).splitlines()[0] if str(e) else 'no details'})"
        )
        return None


def whole_fits(base: nn.Module) -> bool:
    """Whether the float64 copy with its gradients, and the copies of `stock_steps`, take at most half of what is
    free."""
    need, device = _float64_bytes(base), next(base.parameters()).device
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        import psutil

        free = psutil.virtual_memory().available
    return need <= WHOLE_MODEL_BYTES and 2 * need <= free


def random_batch(base: Any, size: int, seq: int, seed: int) -> dict:
    """Random tokens [size, seq] as input and labels."""
    config = base.config.get_text_config()
    ids = torch.randint(0, config.vocab_size, (size, seq), generator=torch.Generator().manual_seed(seed))
    ids = ids.to(next(base.parameters()).device)
    return {"input_ids": ids, "labels": ids.clone()}


def _float64_bytes(base: nn.Module) -> int:
    """Of a float64 copy with gradients; a quantised weight expands to more elements than it stores."""
    return 16 * sum(getattr(getattr(p, "quant_state", None), "shape", p.shape).numel() for p in base.parameters())


def _capture(
    model: nn.Module, batch: dict, wanted: dict[nn.Module, str], last: nn.Module | None
) -> tuple[dict[str, tuple[tuple, dict]], torch.Tensor | None]:
    """What each wanted module received first in the stock forward (a mask that all layers are given is kept once); and
    what `last` returned."""
    calls: dict[str, tuple[tuple, dict]] = {}
    copies, returned = WeakIdKeyDictionary(), []

    def note(module, args, kwargs):
        if wanted[module] not in calls:
            calls[wanted[module]] = _kept(args, copies), {k: _kept(v, copies) for k, v in kwargs.items()}

    with contextlib.ExitStack() as stack:
        for m in wanted:
            stack.callback(m.register_forward_pre_hook(note, with_kwargs=True).remove)
        if last is not None:
            stack.callback(
                last.register_forward_hook(lambda m, args, out: returned.append(tensors_in(out)[0].detach())).remove
            )
        with torch.no_grad():
            model(**batch)
    return calls, returned[0] if returned else None


def _kept(v, copies: WeakIdKeyDictionary):
    """v with its tensors copied, each of them once."""
    if isinstance(v, torch.Tensor):
        if v not in copies:
            copies[v] = v.detach().clone()
        return copies[v]
    return type(v)(_kept(x, copies) for x in v) if type(v) in (tuple, list) else v


def step(model: nn.Module, batch: dict, reference: bool = False) -> dict[str, torch.Tensor]:
    """Losses, of the batch and of parts of its labels, and the gradient of every trainable parameter."""
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with float64_reference() if reference else contextlib.nullcontext():
        loss = model(**batch).loss
        if loss is None:
            raise ValueError("verify: want a batch for which the model returns a loss (with labels)")
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        losses = [loss.detach(), *(model(**part).loss.detach() for part in _parts(batch))]
    found = {"loss": torch.stack(losses)} | {n: g for n, g in zip(parameters, grads) if g is not None}
    return {k: v.double() for k, v in found.items()} if reference else found


def _parts(batch: dict) -> list[dict]:
    """The batch with half of its labels, by chance, PARTS times. The rounding error of a single number is one throw of
    a die, and may come out as zero on one side: of several numbers the largest says which computation is the more
    exact."""
    labels = batch.get("labels")
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() < 2:
        return []
    g = torch.Generator().manual_seed(0)
    out = [torch.rand(labels.shape, generator=g).to(labels.device) < 0.5 for _ in range(PARTS)]
    found = [labels.masked_fill(mask, IGNORED) for mask in out]
    return [batch | {"labels": part} for part in found if (part[..., 1:] != IGNORED).any()]


def judge(stock: nn.Module, patched: nn.Module, batch: dict) -> Verdict:
    """Loss and every gradient of two models with the same weights, against a float64 copy of the stock one."""
    return compare(step(patched, batch), *stock_steps(stock, batch))


def stock_steps(stock: nn.Module, batch: dict) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(reference, eager) of a whole step, for `compare`.

    Through many layers rounding errors add up like a random walk, and one stock run is one sample of it: a gradient
    that nearly cancels may come out better than twice as good by luck. So stock runs three times, once as it is and
    twice with its float32 weights off by half a unit in the last place (what any implementation's first rounding does),
    and each result is taken from the run that is furthest from the reference. The comparison of single modules knows no
    such allowance."""
    reference = step(in_float64(stock), batch, True)
    runs = [step(stock, batch)]
    for seed in (1, 2):
        moved, g = clone(stock), torch.Generator().manual_seed(seed)
        for p in moved.parameters():
            if p.is_floating_point():
                noise = (torch.rand(p.shape, generator=g) - 0.5).to(p.device) * torch.finfo(p.dtype).eps
                p.data = (p.data.double() * (1 + noise.double())).to(p.dtype) if p.dtype == torch.float32 else p.data
        runs.append(step(moved, batch))
    error = lambda run, k: float((run[k].double() - reference[k]).abs().max())
    return reference, {k: max(runs, key=lambda r, k=k: error(r, k))[k] for k in reference}
