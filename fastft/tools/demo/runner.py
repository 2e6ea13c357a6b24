"""`fastft demo`: the main job on real input, offline, on any machine, and the proof that it held.

1  build a training set from the standard library (or take the user's)
2  build, briefly pre-train and save a small decoder (or take the user's checkpoint)
3  FastModel.from_pretrained + trl.SFTTrainer; the same run with stock; the references that judge the two curves
4  save the adapter, reload it in plain transformers + PEFT, undo the patch
5  write loss.png, demo.json and the adapter's folder; exit code 0 only if every check held
"""

from __future__ import annotations

import gc
import json
import platform
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fastft.tools.demo import checks, corpus
from fastft.tools.demo import training as runs
from fastft.tools.demo.checks import DemoCheck
from fastft.tools.demo.model import DecoderSize, pretrain
from fastft.tools.demo.plot import plot
from fastft.tools.demo.training import DemoSettings, TrainingRun
from fastft.tools.tokenizer import load_tokenizer


@dataclass(frozen=True)
class DemoOptions:
    """The command line's options, and the sizes that a test makes smaller."""

    model: str | None = None
    dataset: str | None = None
    out: Path = Path("fastft-demo")
    steps: int = 80
    seed: int = 0
    four_bit: bool = False
    size: DecoderSize = field(default_factory=DecoderSize)
    held_out: int = 128
    pairs: int | None = None  # the first so many only; None: all
    least_drop: float | None = None  # None: 20% for the demo's own model and data, any drop at all for the user's


def demo(options: DemoOptions, console: Console | None = None) -> int:
    """Run it all; returns the exit code. Figures go to `options.out`: demo.json, loss.png, adapter/, and model/ for the
    demo's own."""
    console = console or Console()
    begun = time.perf_counter()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    with _quiet():
        job = _prepare(options, console)
        figures = _compare(job, options, console)
    figures["seconds"] = time.perf_counter() - begun
    (out / "demo.json").write_text(json.dumps(figures, indent=1) + "\n")
    ok = all(c["ok"] for c in figures["checks"])
    console.print(
        f"{'all of it held' if ok else 'NOT all of it held'}; {figures['seconds']:.0f} s; figures, plot, adapter: "
        f"{out}/"
    )
    return 0 if ok else 1


# --- parts


def _prepare(options: DemoOptions, console: Console) -> DemoSettings:
    from datasets import load_from_disk

    out = options.out
    pairs = corpus.stdlib_pairs()[: options.pairs]
    train_pairs, held_pairs = corpus.split(pairs, options.held_out, options.seed)
    if options.dataset is None:
        console.print(
            f"training set: {len(train_pairs)} signatures with docstrings of the standard library, {len(held_pairs)} "
            "held out"
        )
        parts = corpus.as_dataset(train_pairs), corpus.as_dataset(held_pairs)
    else:
        parts = corpus.user_dataset(options.dataset, options.held_out, options.seed)
        console.print(f"training set: {len(parts[0])} rows of {options.dataset}, {len(parts[1])} held out")
    folders = [out / "data" / name for name in ("train", "held_out")]
    for part, folder in zip(parts, folders):
        part.save_to_disk(folder)  # so that the runs share one tokenised copy
    train, held_out = (load_from_disk(str(folder)) for folder in folders)

    model = options.model
    if model is None:
        model = str(out / "model")
        with _bar(console, "pre-training a small decoder", options.size.steps) as step:
            loss = pretrain(train_pairs, Path(model), options.size, options.seed, lambda i, loss: step(loss))
        console.print(f"small decoder: pre-training loss {loss:.2f}, saved to {model}")
    small = options.model is None
    return DemoSettings(model, train, held_out, out, options.steps, options.seed, options.four_bit, small)


def _compare(job: DemoSettings, options: DemoOptions, console: Console) -> dict[str, Any]:
    from fastft import report, unpatch

    tokenizer = load_tokenizer(job.model)
    prompt = runs.prompt_of(job.held_out[0], tokenizer)
    # with its adapter, which changes nothing yet: trainers refuse a quantised model without one
    bare = runs.load_stock(job)
    before = runs.held_out_loss(job, bare)
    said_before = runs.complete(bare, tokenizer, prompt)
    del bare
    gc.collect()

    model = runs.load_stock(job)
    start = checks.trainable(model)
    stock = _train(job, model, "stock", console)
    del model
    gc.collect()
    fast_model = runs.load_fast(job)
    begin = checks.check_start(checks.trainable(fast_model), start)
    fast = _train(job, fast_model, "fastft", console)
    final = report(fast_model)
    reordered, reference = _references(job, console)

    said_after = runs.complete(fast_model, tokenizer, prompt)
    adapter = job.out / "adapter"
    fast_model.save_pretrained(adapter)
    tokenizer.save_pretrained(adapter)
    ids = _probe(job, tokenizer)
    live = checks.logits(fast_model, ids)
    trained = checks.trainable(fast_model)
    reload = checks.check_reload(job, adapter, live, ids)
    unpatch(fast_model)
    least = options.least_drop
    if least is None:
        least = checks.LEAST_DROP if job.small and options.dataset is None else 0.0
    found = [
        DemoCheck("modules were swapped", len(final.swapped) > 0, f"{sum(r.count for r in final.swapped)} modules"),
        begin,
        checks.check_curves(fast, stock, reordered, reference),
        checks.check_drop(before, fast.held_out_loss, least),
        reload,
        checks.check_undo(job, fast_model, trained, ids),
    ]
    title = f"{Path(job.model).name}: {job.steps} steps of LoRA through TRL, {job.device.type}"
    plot(job.out / "loss.png", fast, stock, reordered, reference, title)
    _show(console, before, stock, fast, found, prompt, said_before, said_after, final.fallbacks)
    return {
        "model": job.model,
        "dataset": options.dataset or "docstrings of the standard library",
        "steps": job.steps,
        "seed": job.seed,
        "four_bit": job.four_bit,
        "machine": _machine(job),
        "held_out_loss_before": before,
        "runs": {r.name: r.to_dict() for r in (stock, fast, reordered, reference) if r is not None},
        "report": final.to_dict(),
        "sample": {"prompt": prompt, "before": said_before, "after": said_after},
        "checks": [c.to_dict() for c in found],
    }


def _train(job: DemoSettings, model: Any, name: str, console: Console, **how: Any) -> TrainingRun:
    with _bar(console, f"fine-tuning: {name}", job.steps) as step:
        return runs.train(job, model, name, on_step=lambda _: step(None), **how)


def _references(job: DemoSettings, console: Console) -> tuple[TrainingRun, TrainingRun | None]:
    """Stock in another order of summation, and stock in a higher precision (None where that does not fit into the
    GPU)."""
    reordered = _train(job, runs.load_stock(job), "stock, reordered", console, reordered=True, measure=False)
    precision = str(runs.reference_dtype(job)).removeprefix("torch.")
    try:
        return reordered, _train(
            job, runs.load_stock(job, exact=True), f"stock in {precision}", console, exact=True, measure=False
        )
    except torch.OutOfMemoryError:
        console.print(
            f"stock in {precision} does not fit: the curves are judged by the distance of two stock runs instead"
        )
        return reordered, None


def _probe(job: DemoSettings, tokenizer: Any) -> torch.Tensor:
    """A few held-out rows as token ids of one length, [rows, tokens]: no padding, so that every logit counts."""
    texts = [runs.prompt_of(row, tokenizer) for row in job.held_out.select(range(min(4, len(job.held_out))))]
    rows = [tokenizer(t).input_ids[:64] for t in texts]
    length = max(1, min(map(len, rows)))
    return torch.tensor([r[:length] for r in rows if len(r) >= length])


# --- looks


@contextmanager
def _bar(console: Console, what: str, total: int) -> Iterator[Any]:
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
def _quiet() -> Iterator[None]:
    """The libraries' own progress bars and deprecation notices off, for the demo shows its own bars; as they were
    afterwards."""
    import datasets
    from transformers.utils import logging

    bars = datasets.are_progress_bars_disabled(), logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if not bars[0]:
            datasets.enable_progress_bars()
        if bars[1]:
            logging.enable_progress_bar()


def _show(
    console: Console,
    before: float,
    stock: TrainingRun,
    fast: TrainingRun,
    found: list[DemoCheck],
    prompt: str,
    said_before: str,
    said_after: str,
    slow: dict,
) -> None:
    table = Table(title="stock against fastft", title_justify="left")
    for name in ("", "stock", "fastft"):
        table.add_column(name, justify="left" if not name else "right")
    mib = lambda n: f"{n / 2**20:.1f} MiB"
    table.add_row("held-out loss before", f"{before:.4f}", f"{before:.4f}")
    table.add_row("held-out loss after", f"{stock.held_out_loss:.4f}", f"{fast.held_out_loss:.4f}")
    table.add_row("last training loss", f"{stock.losses[-1]:.6f}", f"{fast.losses[-1]:.6f}")
    table.add_row("median step", f"{1e3 * stock.median_step:.1f} ms", f"{1e3 * fast.median_step:.1f} ms")
    table.add_row("training", f"{stock.seconds:.1f} s", f"{fast.seconds:.1f} s")
    table.add_row("saved for backward, one step", mib(stock.saved_bytes), mib(fast.saved_bytes))
    if stock.peak_bytes:
        table.add_row("peak CUDA memory", mib(stock.peak_bytes), mib(fast.peak_bytes))
    console.print(table)
    for reason, n in slow.items():
        console.print(f"went the stock way in {n} calls: {reason}", markup=False)
    console.print(
        f"prompt: {prompt.strip()}\nbefore: {said_before}\nafter:  {said_after}", markup=False, highlight=False
    )
    for c in found:
        console.print(f"{'[green]held[/]' if c.ok else '[red]FAILED[/]'}  {c.name}: ", end="")
        console.print(c.evidence, markup=False, highlight=False)


def _machine(job: DemoSettings) -> dict[str, Any]:
    import peft
    import transformers
    import trl

    import fastft

    return {
        "device": torch.cuda.get_device_name() if job.device.type == "cuda" else platform.machine() + " CPU",
        "threads": torch.get_num_threads(),
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft, trl, fastft)}
        | {"python": platform.python_version()},
    }
