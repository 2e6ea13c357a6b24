"""What the demo shows: progress, the table of both runs, the sample, the checks; and its silence about other libraries'
business."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastft.patching.report import PatchReport
from fastft.tools.demo.checks import DemoCheck
from fastft.tools.demo.training import TrainingRun

TRAININGS = (
    "four trainings follow, from one seed: stock and fastft are compared; stock with its batches reordered, and stock "
    "in {}, say how far rounding alone takes two runs apart"
)
LOUD = ("bitsandbytes", "transformers", "trl", "datasets")  # loggers
LONGEST = 160  # characters of a sample


@dataclass(frozen=True)
class Sample:
    """One held-out prompt, and what the model makes of it before and after."""

    prompt: str
    before: str
    after: str


@contextmanager
def bar(console: Console, what: str, total: int) -> Iterator[Any]:
    """A progress bar; what it yields is called after each step with the loss, or None."""
    columns = (
        TextColumn("{task.description:<34}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(what, total=total, note="")
        yield lambda loss: progress.update(task, advance=1, note="" if loss is None else f"loss {loss:.3f}")


@contextmanager
def quiet() -> Iterator[None]:
    """The libraries' own progress bars, deprecation notices and hints off, for the demo shows its own bars; as they
    were afterwards."""
    import datasets
    from huggingface_hub import utils as hub
    from transformers.utils import logging as transformers_logging

    bars = (
        (datasets.are_progress_bars_disabled(), datasets.enable_progress_bars, datasets.disable_progress_bars),
        (
            not transformers_logging.is_progress_bar_enabled(),
            transformers_logging.enable_progress_bar,
            transformers_logging.disable_progress_bar,
        ),
        (hub.are_progress_bars_disabled(), hub.enable_progress_bars, hub.disable_progress_bars),
    )
    levels = {name: logging.getLogger(name).level for name in LOUD}
    for _, _, disable in bars:
        disable()
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        for were_off, enable, disable in bars:
            (disable if were_off else enable)()


def rows(before: float, stock: TrainingRun, fast: TrainingRun) -> list[tuple[str, str, str]]:
    """(what, stock's, fastft's) of the table. Tokens a second and peak memory where there is a GPU."""
    mib = lambda n: f"{n / 2**20:,.1f} MiB"
    both = lambda what, text: (what, text(stock), text(fast))
    found = [
        both("held-out loss before", lambda r: f"{before:.4f}"),
        both("held-out loss after", lambda r: f"{r.held_out_loss:.4f}"),
        both("last training loss", lambda r: f"{r.losses[-1]:.6f}"),
        both("median step", lambda r: f"{1e3 * r.median_step:.1f} ms"),
        both("training", lambda r: f"{r.seconds:.1f} s"),
        both("saved for backward, one step", lambda r: mib(r.saved_bytes)),
    ]
    if stock.peak_bytes and fast.peak_bytes:
        found += [
            both("tokens/s, padding left out", lambda r: f"{r.tokens_per_second:,.0f}"),
            both("peak GPU memory", lambda r: mib(r.peak_bytes)),
        ]
    return found


def show(
    console: Console,
    before: float,
    stock: TrainingRun,
    fast: TrainingRun,
    found: list[DemoCheck],
    sample: Sample,
    final: PatchReport,
) -> None:
    """The end of the demo. final: the report after the training."""
    table = Table(title="stock against fastft", title_justify="left")
    for name in ("", "stock", "fastft"):
        table.add_column(name, justify="left" if not name else "right")
    for row in rows(before, stock, fast):
        table.add_row(*row)
    console.print(table)
    if fast.seconds > stock.seconds and fast.median_step < stock.median_step:
        console.print(
            f"training counts the first step, in which what joins the training is proven: {fast.step_seconds[0]:.1f} s "
            f"of fastft's {fast.seconds:.1f} s, once a run",
            highlight=False,
        )
    for reason, n in final.fallbacks.items():
        console.print(f"went the stock way in {n} calls: {reason}", markup=False)
    for note in final.notes:
        console.print(note, markup=False, highlight=False)
    console.print(f"prompt, held out: {one_line(sample.prompt)}", markup=False, highlight=False)
    console.print(f"before: {one_line(sample.before)}", markup=False, highlight=False)
    console.print(f"after:  {one_line(sample.after)}", markup=False, highlight=False)
    for c in found:
        console.print(f"{'[green]held[/]' if c.ok else '[red]FAILED[/]'}  {c.name}: ", end="")
        console.print(c.evidence, markup=False, highlight=False)


def one_line(text: str) -> str:
    """A sample on one line, cut where it is long."""
    flat = " ".join(text.split())
    return flat if len(flat) <= LONGEST else flat[: LONGEST - 4] + " ..."


def finite(value: Any) -> Any:
    """What strict JSON can hold: NaN and infinities become None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
