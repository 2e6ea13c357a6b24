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
from rich.table import Table
from rich.text import Text

from fastft.tools.bench.limits import ModelShape, limit_seconds
from fastft.tools.bench.spec import CELLS, STACKS, Spec
from fastft.tools.bench.timing import Roof, Times

FAILED = ("red", "error")


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
        """Was nothing red, and did nothing fail?"""
        return not any(r.state in FAILED for r in self.rows) and any(r.state == "ok" for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """The result as `json.dumps` takes it."""
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
        table = Table(
            title=f"fastft bench: {self.options.model}, {self.about.get('device', 'no device')}", title_justify="left"
        )
        for name in (
            "cell",
            "stack",
            "tokens/s",
            "p20-p80",
            "x stock",
            "step ms",
            "first ms",
            "peak",
            "reserved",
            "% of limit",
            "last loss",
        ):
            table.add_column(name, justify="left" if name in ("cell", "stack") else "right", no_wrap=True)
        base = {r.cell: r.rate for r in self.rows if r.stack == "stock" and r.rate is not None}
        gib = lambda b: "" if b is None else f"{b / 2**30:.2f} GiB" if b >= 2**30 else f"{b / 2**20:.1f} MiB"
        shown = [r for r in self.rows if r.state != "missing"]
        for before, r in zip([None, *shown], shown):
            if before is not None and before.cell != r.cell:
                table.add_section()
            figures = [r.state, *[""] * 8]
            if (
                r.rate is not None
                and r.p20 is not None
                and r.p80 is not None
                and r.step is not None
                and r.first is not None
            ):
                versus = f"{r.rate / base[r.cell]:.2f}" if base.get(r.cell) else ""
                limit = "" if r.limit is None else f"{r.limit:.1f}"
                speed = [
                    f"{r.rate:,.0f}",
                    f"{r.p20:,.0f}-{r.p80:,.0f}",
                    versus,
                    f"{1e3 * r.step:.1f}",
                    f"{1e3 * r.first:.1f}",
                ]
                figures = [*speed, gib(r.peak), gib(r.reserved), limit, f"{r.losses[-1]:.4f}"]
            table.add_row(
                f"{r.cell}, {r.tokens} tokens" if r.tokens else r.cell,
                r.stack,
                *figures,
                style="bold red" if r.state in FAILED else "",
            )
        table.add_section()
        missing = {r.stack: r.note for r in self.rows if r.state == "missing"}
        for stack in missing:
            table.add_row("every cell", stack, "missing")
        yield table
        for note in (
            *(f"{stack}: missing: {why}" for stack, why in missing.items()),
            *(_why(r) for r in shown if r.state != "ok"),
            *self.notes,
        ):
            yield Text(note)


def _why(row: BenchRow) -> str:
    return f"{row.cell}, {row.stack}: {row.state}: {row.note.split(' | ')[0]}"


def bench(options: BenchOptions, console: Console | None = None) -> BenchResult:
    """Run it all; writes bench.json, speed.png, memory.png and, with the cell "long", length.png to options.out."""
    console = console or Console(stderr=True)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fastft-bench-") as folder:
        lines = {s: _process(options, s, Path(folder), console) for s in ("reference", *_in_order(options.stacks))}
    result = _result(options, lines)
    (options.out / "bench.json").write_text(json.dumps(result.to_dict(), indent=1) + "\n")
    from fastft.tools.bench.plot import plot

    plot(result, options.out)
    return result


def _in_order(stacks: Sequence[str]) -> list[str]:
    """Stock's gradients stand beside the reference for everybody, so it comes first, asked for or not."""
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
    """The lines of one stack's process; the reference once more on the CPU where it does not fit on the GPU."""
    spec = _spec(options, stack, folder)
    console.print(f"{stack} ...", highlight=False)
    lines = _run(spec, folder, options.seconds, {})
    if stack == "reference" and any(x.get("state") == "out of memory" or "crash" in x for x in lines):
        console.print("reference ... once more on the CPU: it did not fit", highlight=False)
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
    for stack in ("reference", "stock"):  # what stock says of the device stands: the reference may have run on another
        about |= next((x["about"] for x in lines[stack] if "about" in x), {})
    gates = [x for s in lines for x in lines[s] if "gate" in x]
    rows = []
    for cell in (c for c in CELLS if c in options.cells):
        rows += [_row(s, cell, lines[s], about, options) for s in STACKS if s in options.stacks]
    notes = [
        f"the high-precision run that judges: {x['crash'] if 'crash' in x else x['note']}"
        for x in lines["reference"]
        if "crash" in x or x.get("note")
    ]
    if about.get("reference"):
        notes.append(f"judged by losses and gradients against stock in {about['reference']}")
    if about["device"].endswith("threads"):
        notes.append(
            "peak: parameters, buffers, optimizer states, and what the CPU allocator's events add up to in one step; "
            "reserved memory is a GPU's"
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
