"""`fastft bench MODEL`: this model on this machine, stock at its defaults and at its best flags, the peers, fastft.
Judged first, then timed.

A high-precision run draws the adapter and the gradients that judge everybody; then each stack has a process of its own
that loads the same weights and the same adapter and sees the same tokens. A stack that fails the judge prints no speed;
one that is not installed, crashes or runs out of memory is a row that says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from fastft.tables import WIDE, table
from fastft.tools.bench.limits import ModelShape, limit_seconds
from fastft.tools.bench.spec import CELLS, STACKS, Spec
from fastft.tools.bench.timing import Roof, Times

FAILED = ("red", "error")
BUSY = 0.2  # a spread of the steps' rates, as a share of their median, that an idle machine does not show


@dataclass(frozen=True)
class BenchOptions:
    """seq, batch, lengths: None chooses by the machine (2048, 4 and up to 8 x 2048 tokens on a GPU; 64, 2 and 256
    without). ValueError for stacks and cells that do not exist."""

    model: str
    stacks: tuple[str, ...] = STACKS
    cells: tuple[str, ...] = CELLS
    four_bit: bool = False
    steps: int = 6
    seq: int | None = None
    batch: int | None = None
    lengths: tuple[int, ...] | None = None
    out: Path = Path("fastft-bench")
    seed: int = 0
    seconds: float = 3600.0  # of one stack's process

    def __post_init__(self) -> None:
        for given, known, what in ((self.stacks, STACKS, "stacks"), (self.cells, CELLS, "cells")):
            if not given or set(given) - set(known):
                raise ValueError(f"{what}: want some of {', '.join(known)}, got {', '.join(given) or 'none'}")


@dataclass
class BenchRow:
    """One stack in one cell. state: ok, red, missing, out of memory, error. Rates are non-padding tokens/s; memory in
    bytes."""

    stack: str
    cell: str
    state: str
    note: str = ""
    rate: float | None = None
    p20: float | None = None
    p80: float | None = None
    step: float | None = None
    first: float | None = None
    peak: float | None = None
    reserved: float | None = None
    limit: float | None = None  # percent of the physical limit
    checkpointing: bool | None = None
    losses: list[float] = field(default_factory=list)
    by_length: list[dict] = field(default_factory=list)
    tokens: int | None = None  # of the row, in "long"

    @property
    def spread(self) -> float | None:
        """From the 20th to the 80th percentile of its steps' rates, as a share of the median."""
        if self.rate is None or self.p20 is None or self.p80 is None:
            return None
        return (self.p80 - self.p20) / self.rate


@dataclass
class BenchResult:
    """`ok`: nothing was red and nothing failed; to_dict() is JSON-ready; printing it shows the table."""

    options: BenchOptions
    about: dict[str, Any]
    gates: list[dict]
    rows: list[BenchRow]
    notes: list[str]

    @property
    def ok(self) -> bool:
        return not any(r.state in FAILED for r in self.rows) and any(r.state == "ok" for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(self.options).items()}
        return {
            "options": asked,
            **self.about,
            "gates": self.gates,
            "rows": [vars(r) for r in self.rows],
            "notes": self.notes,
            "ok": self.ok,
        }

    def __rich_console__(self, console: Console, options: Any):
        wide = options.max_width >= WIDE
        columns = ["cell", "stack", "tokens/s#", "spread#", "x stock#", "step ms#", "peak GiB#", "last loss#"]
        columns += ["first ms#", "reserved GiB#", "% of limit#"] if wide else []
        base = {r.cell: r.rate for r in self.rows if r.stack == "stock" and r.rate is not None}
        shown = [r for r in self.rows if r.state != "missing"]
        missing = {r.stack: r.note for r in self.rows if r.state == "missing"}
        rows = [_cells(r, base.get(r.cell), wide) for r in shown]
        rows += [["every cell", stack, "missing", *[""] * (len(columns) - 3)] for stack in missing]
        styles = ["bold red" if r.state in FAILED else "" for r in shown] + [""] * len(missing)
        title = f"fastft bench: {self.options.model}, {self.about.get('device', 'no device')}"
        yield table(title, columns, rows, styles, options.max_width)
        for note in (
            *(f"{stack}: missing: {why}" for stack, why in missing.items()),
            *(_why(r) for r in shown if r.state != "ok"),
            *self.notes,
        ):
            yield Text(note)


def _cells(row: BenchRow, stock: float | None, wide: bool) -> list[str]:
    """Of one row of the table; stock: tokens/s of stock in that cell."""
    cell = f"{row.cell}, {row.tokens} tokens" if row.tokens else row.cell
    if row.rate is None or row.step is None or row.first is None:
        return [cell, row.stack, row.state, *[""] * (8 if wide else 5)]
    gib = lambda b: "" if b is None else f"{b / 2**30:.3g}"
    found = [
        *(cell, row.stack, f"{row.rate:,.0f}", "" if row.spread is None else f"{100 * row.spread:.0f}%"),
        *(f"{row.rate / stock:.2f}" if stock else "", f"{1e3 * row.step:.1f}", gib(row.peak), f"{row.losses[-1]:.4f}"),
    ]
    limit = "" if row.limit is None else f"{row.limit:.1f}"
    return found + ([f"{1e3 * row.first:.1f}", gib(row.reserved), limit] if wide else [])


def _why(row: BenchRow) -> str:
    return f"{row.cell}, {row.stack}: {row.state}: {row.note.split(' | ')[0]}"


def bench(options: BenchOptions, console: Console | None = None) -> BenchResult:
    """Run it all; writes bench.json, speed.png, memory.png and, with the cell "long", length.png to options.out."""
    console = console or Console(stderr=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
        lines = {s: _process(options, s, Path(folder), console) for s in ("truth", *_in_order(options.stacks))}
    result = _result(options, lines)
    (options.out / "bench.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    from fastft.tools.bench.plot import plot

    plot(result, options.out)
    return result


def _in_order(stacks: Sequence[str]) -> list[str]:
    """Stock's gradients stand beside the truth for everybody, so it comes first, asked for or not."""
    return ["stock", *(s for s in STACKS if s in stacks and s != "stock")]


def _spec(options: BenchOptions, stack: str, folder: Path) -> Spec:
    import torch

    cuda = torch.cuda.is_available()
    seq = options.seq or (2048 if cuda else 64)
    lengths = options.lengths or tuple(seq * k for k in ((1, 2, 4, 8) if cuda else (1, 2, 4)))
    return Spec(
        options.model,
        stack,
        tuple(c for c in CELLS if c in options.cells),
        str(folder),
        seq,
        options.batch or (4 if cuda else 2),
        lengths,
        options.steps,
        options.four_bit,
        options.seed,
        only_gate=stack not in options.stacks,
    )


def _process(options: BenchOptions, stack: str, folder: Path, console: Console) -> list[dict]:
    """The lines of one stack's process; the truth once more on the CPU where it does not fit on the GPU."""
    spec = _spec(options, stack, folder)
    console.print(f"{stack} ...", highlight=False)
    lines = _run(spec, folder, options.seconds, {})
    if stack == "truth" and any(x.get("state") == "out of memory" or "crash" in x for x in lines):
        console.print("truth ... once more on the CPU: it did not fit", highlight=False)
        lines = _run(spec, folder, options.seconds, {"CUDA_VISIBLE_DEVICES": ""})
    return lines


def _run(spec: Spec, folder: Path, seconds: float, env: dict[str, str]) -> list[dict]:
    rows, log = folder / f"{spec.stack}.jsonl", folder / f"{spec.stack}.log"
    rows.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "fastft.tools.bench.worker",
        str(spec.write(folder / f"{spec.stack}.json")),
        str(rows),
    ]
    why = ""
    with log.open("w") as out:
        try:
            code = subprocess.run(
                command, stdout=out, stderr=out, timeout=seconds, env={**os.environ, **env}, check=False
            ).returncode
            why = f"the process ended with {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"ended after {seconds:.0f} s"
    lines = [json.loads(x) for x in rows.read_text().splitlines()] if rows.exists() else []
    if why:
        tail = [x for x in log.read_text(errors="replace").splitlines() if x.strip()][-1:]
        lines.append({"stack": spec.stack, "crash": f"{why}: {' '.join(tail)[-300:]}"})
    return lines


def _result(options: BenchOptions, lines: dict[str, list[dict]]) -> BenchResult:
    about: dict[str, Any] = {"device": "unknown", "versions": {}}
    for stack in ("truth", "stock"):  # the truth may have run on another device: where both speak, stock is right
        about |= next((x["about"] for x in lines[stack] if "about" in x), {})
    gates = [x for s in lines for x in lines[s] if "gate" in x]
    rows = []
    for cell in (c for c in CELLS if c in options.cells):
        rows += [_row(s, cell, lines[s], about, options) for s in STACKS if s in options.stacks]
    notes = [
        f"the high-precision run that judges: {x['crash'] if 'crash' in x else x['note']}"
        for x in lines["truth"]
        if "crash" in x or x.get("note")
    ]
    if about.get("truth"):
        notes.append(f"judged by losses and gradients against stock in {about['truth']}")
    if about["device"].endswith("threads"):
        notes.append(
            "peak: parameters, buffers, optimizer states, and what the CPU allocator's events add up to in one step; "
            "reserved memory is a GPU's"
        )
    if busy := [f"{r.cell} {r.stack} {100 * r.spread:.0f}%" for r in rows if (r.spread or 0.0) > BUSY]:
        notes.append(
            "the machine was busy or throttled: rates of one cell's steps differ by more than "
            f"{100 * BUSY:.0f}% of their median ({', '.join(busy)}); run again on an idle machine before comparing"
        )
    if "no limit" in about:
        notes.append(f"% of limit: {about['no limit']}")
    return BenchResult(options, about, gates, rows, notes)


def _row(stack: str, cell: str, lines: list[dict], about: dict, options: BenchOptions) -> BenchRow:
    for x in lines:
        if "missing" in x:
            return BenchRow(stack, cell, "missing", x["missing"])
    found = [x for x in lines if x.get("cell") == cell]
    if not found:
        failed = [x for x in lines if str(x.get("cell", "")).startswith(f"{cell},")] + [
            x for x in lines if "crash" in x
        ]
        state = failed[0].get("state", "error") if failed else "error"
        return BenchRow(
            stack,
            cell,
            state,
            (failed[0].get("crash") or failed[0].get("note", "")) if failed else "its process said nothing about it",
        )
    x = found[-1]
    if x["state"] != "ok":
        return BenchRow(stack, cell, x["state"], x.get("note", ""))
    tokens = [sum(n) for n in x["lengths"]]
    rates, steps = Times.of([n / s for n, s in zip(tokens, x["seconds"])]), Times.of(x["seconds"])
    return BenchRow(
        stack,
        cell,
        "ok",
        "",
        rates.median,
        rates.p20,
        rates.p80,
        steps.median,
        x["first"],
        x["peak"],
        x["reserved"],
        _percent(x, cell, about, options),
        x["checkpointing"],
        x["losses"],
        x.get("by_length", []),
        x.get("tokens"),
    )


def _percent(x: dict, cell: str, about: dict, options: BenchOptions) -> float | None:
    """Of the physical limit, over all timed steps together; None where there is none."""
    if not about.get("shape") or not about.get("roof"):
        return None
    shape, roof = ModelShape(**about["shape"]), Roof(**about["roof"])
    forwards = 1 if cell == "dpo" else 0
    least = sum(
        limit_seconds(shape, n, Spec.rank, roof, four_bit=options.four_bit, forwards=forwards) for n in x["lengths"]
    )
    return 100 * least / sum(x["seconds"])
