"""`fastft demo`: the main job on real input, offline, on any machine, and the proof that it held.

1  build a training set from the standard library (or take the user's)
2  build, briefly pre-train and save a small decoder (or take the user's checkpoint)
3  FastModel.from_pretrained + trl.SFTTrainer; the same run with stock; the references that judge the two curves
4  save the adapter, reload it in plain transformers + PEFT, undo the patch
5  write loss.png, demo.json and the adapter's folder; exit code 0 only if every check held

The adapter's configuration names its base by an absolute path, so that the adapter loads from any folder."""

from __future__ import annotations

import gc
import json
import platform
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastft.tools.demo import checks, corpus
from fastft.tools.demo import training as runs
from fastft.tools.demo.checks import DemoCheck
from fastft.tools.demo.model import DecoderSize, pretrain
from fastft.tools.demo.plot import plot
from fastft.tools.demo.show import TRAININGS, Sample, bar, finite, quiet, show
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
    least_drop: float | None = None  # None: 20% in 80 steps for the demo's own model and data, any for the user's


def demo(options: DemoOptions, console: Console | None = None) -> int:
    """Run it all; returns the exit code. Figures go to `options.out`: demo.json, loss.png, adapter/, and model/ for the
    demo's own."""
    console = console or Console()
    begun = time.perf_counter()
    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    if options.model is None and options.steps == DemoOptions.steps:
        console.print("about a minute and a half on 2 cores", highlight=False)
    with quiet():
        job = _prepare(options, console)
        figures = _compare(job, options, console)
    figures["seconds"] = time.perf_counter() - begun
    (out / "demo.json").write_text(json.dumps(finite(figures), indent=1, allow_nan=False) + "\n")
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
        with bar(console, "pre-training a small decoder", options.size.steps) as step:
            loss = pretrain(train_pairs, Path(model), options.size, options.seed, lambda i, loss: step(loss))
        console.print(f"small decoder: pre-training loss {loss:.2f}, saved to {model}")
    small = options.model is None
    if Path(model).is_dir():
        model = str(Path(model).resolve())
    return DemoSettings(model, train, held_out, out, options.steps, options.seed, options.four_bit, small)


def _compare(job: DemoSettings, options: DemoOptions, console: Console) -> dict[str, Any]:
    from fastft import report, unpatch

    tokenizer = load_tokenizer(job.model)
    prompt = runs.sample_prompt(job, job.held_out[0], tokenizer)
    # with its adapter, which changes nothing yet: trainers refuse a quantised model without one
    bare = runs.load_stock(job)
    before = runs.held_out_loss(job, bare)
    said_before = runs.complete(bare, tokenizer, prompt)
    del bare
    gc.collect()

    console.print(TRAININGS.format(str(runs.reference_dtype(job)).removeprefix("torch.")), highlight=False)
    model = runs.load_stock(job)
    start = checks.trainable(model)
    stock = _train(job, model, "stock", console)
    del model
    gc.collect()
    fast_model = runs.load_fast(job)
    patched = report(fast_model)
    begin = checks.check_start(checks.trainable(fast_model), start)
    fast = _train(job, fast_model, "fastft", console)
    final = report(fast_model)
    reordered, reference = _references(job, console)

    sample = Sample(prompt, said_before, runs.complete(fast_model, tokenizer, prompt))
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
        own = job.small and options.dataset is None
        least = checks.LEAST_DROP * min(1.0, options.steps / 80) if own else 0.0  # fewer steps teach less
    found = [
        DemoCheck("modules were swapped", len(patched.swapped) > 0, f"{sum(r.count for r in patched.swapped)} modules"),
        begin,
        checks.check_curves(fast, stock, reordered, reference),
        checks.check_drop(before, fast.held_out_loss, least),
        reload,
        checks.check_undo(job, fast_model, trained, ids),
    ]
    title = f"{Path(job.model).name}: {job.steps} steps of LoRA through TRL, {job.device.type}"
    plot(job.out / "loss.png", fast, stock, reordered, reference, title)
    show(console, before, stock, fast, found, sample, final)
    return {
        "model": job.model,
        "dataset": options.dataset or "docstrings of the standard library",
        "steps": job.steps,
        "seed": job.seed,
        "four_bit": job.four_bit,
        "machine": _machine(job),
        "held_out_loss_before": before,
        "runs": {r.name: r.to_dict() for r in (stock, fast, reordered, reference) if r is not None},
        # modules as they were loaded: what joined in training (TRL's head, attention by document) is beside them
        "report": replace(patched, fallbacks=final.fallbacks, notes=final.notes).to_dict(),
        "joined_in_training": [r for r in final.to_dict()["swapped"] if r not in patched.to_dict()["swapped"]],
        "sample": asdict(sample),
        "checks": [c.to_dict() for c in found],
    }


def _train(job: DemoSettings, model: Any, name: str, console: Console, **how: Any) -> TrainingRun:
    with bar(console, f"fine-tuning: {name}", job.steps) as step:
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


# --- the machine


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
