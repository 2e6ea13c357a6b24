"""The loss of one LoRA fine-tuning on a base in bf16, FP8, NF4 and int8: curves over 300 steps and several seeds.

    python -m benchmarks.fp8_loss --out benchmarks/results/fp8-loss-DATE.json
    python -m benchmarks.fp8_loss --show benchmarks/results/fp8-loss-DATE.json

Offline, on a CPU or a GPU. A small decoder is pre-trained on docstrings of Python's standard library (`fastft demo`'s
corpus and model) and saved in bf16: the one checkpoint from which every run loads, through `FastModel` alone. It is
then fine-tuned to write a docstring for a signature. A seed draws the adapter and the order of the rows, and is shared
by all precisions: run i of FP8 begins with the adapter of run i of bf16 and sees its batches. What is held out was seen
in neither training. Adapters and optimizer are float32 everywhere, so that precisions differ in the frozen base alone.

What is compared, and why:

    held-out loss before training   what rounding the base costs, as no adapter has learnt anything
    held-out loss after 300 steps   the bar: FP8's mean within bf16's lowest and highest seed
    difference seed by seed         the same adapter, the same batches: what the precision alone does, without the seeds

`rounded` is bf16 training on the matrices that FP8's weights stand for: the difference between it and `fp8` is what
the products in FP8 add to the rounding of the weights. On a CPU without units for bfloat16, bf16 products go through
float32 (`benchmarks.bf16_products`), as a tensor core computes them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.bf16_products import through_float32
from benchmarks.header import header

MODES = ("bf16", "fp8", "nf4", "int8", "rounded")
LOAD: dict[str, dict[str, Any]] = {
    "bf16": {},
    "rounded": {},
    "fp8": {"load_in_fp8": True},
    "nf4": {"load_in_4bit": True},
    "int8": {"load_in_8bit": True},
}
IGNORED = -100
SET_ASIDE = 512  # pairs that no training sees; what is held out is the first of them that are short enough


@dataclass(frozen=True)
class Experiment:
    """What all runs share. pretraining: steps of 16 rows of 64 tokens; tokens: of the longest row, longer ones are left
    out; held_out: rows; measured: steps between two measurements of the held-out loss."""

    hidden: int = 128
    intermediate: int = 384
    layers: int = 4
    heads: int = 2
    pretraining: int = 500
    steps: int = 300
    batch: int = 4
    tokens: int = 96
    held_out: int = 128
    measured: int = 150
    learning_rate: float = 2e-3
    warmup: int = 30
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)


@dataclass
class Run:
    """One fine-tuning. train: the loss of each step; held_out: (step, mean loss of a held-out token).
    seconds: of CPU time."""

    mode: str
    seed: int
    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def before(self) -> float:
        return self.held_out[0][1]

    @property
    def after(self) -> float:
        return self.held_out[-1][1]


Row = tuple[list[int], list[int]]  # token ids and labels


class Subject:
    """The pre-trained checkpoint, and the rows to train on and to hold out."""

    def __init__(self, experiment: Experiment, folder: Path, say: Callable[[str], None]) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from fastft.tools.demo.corpus import split, stdlib_pairs
        from fastft.tools.demo.model import DecoderSize, pretrain

        e = experiment
        train, held_out = split(stdlib_pairs(), SET_ASIDE, 0)
        self.experiment, self.folder = e, folder / "bf16"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if not (self.folder / "config.json").is_file():
            size = DecoderSize(2048, e.hidden, e.intermediate, e.layers, e.heads, 1, steps=e.pretraining)
            told = lambda i, loss: say(f"pre-training: step {i + 1}, loss {loss:.2f}") if i % 100 == 99 else None
            pretrain(train, folder / "float32", size, 0, told)
            AutoModelForCausalLM.from_pretrained(folder / "float32", dtype=torch.bfloat16).save_pretrained(self.folder)
            AutoTokenizer.from_pretrained(folder / "float32").save_pretrained(self.folder)
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)
        self.train = self._rows(train)
        self.held_out = sorted(self._rows(held_out)[: e.held_out], key=lambda r: len(r[0]))

    def _rows(self, pairs: list) -> list[Row]:
        rows = []
        for p in pairs:
            prompt, answer = self.tokenizer(p.prompt).input_ids, self.tokenizer(p.summary).input_ids
            ids = [*prompt, *answer, self.tokenizer.eos_token_id]
            if len(ids) <= self.experiment.tokens:
                rows.append((ids, [IGNORED] * len(prompt) + ids[len(prompt) :]))
        return rows

    def batch(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Rows padded at their end, [rows, longest]."""
        longest = max(len(ids) for ids, _ in rows)
        fill = lambda values, with_: torch.tensor([v + [with_] * (longest - len(v)) for v in values]).to(self.device)
        ids, labels = fill([r[0] for r in rows], self.tokenizer.pad_token_id), fill([r[1] for r in rows], IGNORED)
        return {"input_ids": ids, "attention_mask": (fill([[1] * len(r[0]) for r in rows], 0)), "labels": labels}

    def load(self, mode: str, seed: int) -> Any:
        """The model in `mode` with a new adapter, patched."""
        from fastft import FastModel

        torch.manual_seed(seed)
        with contextlib.redirect_stdout(io.StringIO()):  # the report, each time
            model = FastModel.from_pretrained(self.folder, attn_implementation="eager", **LOAD[mode])
        if mode == "rounded":
            round_weights(model)
        return model

    @torch.no_grad()
    def held_out_loss(self, model: Any) -> float:
        """Mean over all held-out tokens."""
        model.eval()
        total, count = 0.0, 0
        for at in range(0, len(self.held_out), 32):
            batch = self.batch(self.held_out[at : at + 32])
            n = int((batch["labels"][:, 1:] != IGNORED).sum())
            total, count = total + n * model(**batch, use_cache=False).loss.double().item(), count + n
        model.train()
        return total / count


@torch.no_grad()
def round_weights(model: Any) -> None:
    """Every base weight under an adapter becomes the matrix that its e4m3 values, with a scale a row, stand for."""
    for m in model.modules():
        if hasattr(m, "base_layer"):
            m.base_layer.weight.copy_(e4m3_by_row(m.base_layer.weight))


def e4m3_by_row(w: torch.Tensor) -> torch.Tensor:
    """w [out, in] rounded to e4m3 with a scale a row, in its own dtype."""
    scale = w.float().abs().amax(1, keepdim=True).clamp(min=1e-12) / torch.finfo(torch.float8_e4m3fn).max
    return ((w.float() / scale).to(torch.float8_e4m3fn).float() * scale).to(w.dtype)


def rounding() -> dict[str, float]:
    """Root mean square error of normally distributed weights [512, 4096], relative, in each precision."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from fastft_kernels.quant.fp8 import quantize_e4m3_blocks, quantize_e4m3_rows
    from fastft_kernels.quant.int8 import dequantize_e4m3

    w = torch.randn(512, 4096, generator=torch.Generator().manual_seed(0)) * 0.02
    step = w.abs().amax(1, keepdim=True) / 127
    packed, state = quantize_4bit(w, compress_statistics=True, quant_type="nf4")
    q, scale = quantize_e4m3_blocks(w)
    found = {
        "bf16": w.bfloat16().float(),
        "int8 by row": (w / step).round() * step,
        "e4m3 by row": dequantize_e4m3(*quantize_e4m3_rows(w), torch.float32),
        "e4m3 by block": dequantize_e4m3(q, scale, torch.float32, (128, 128)),
        "NF4": dequantize_4bit(packed, state),
    }
    return {name: float((t - w).norm() / w.norm()) for name, t in found.items()}


def train(subject: Subject, mode: str, seed: int) -> Run:
    """One fine-tuning: AdamW, gradients clipped to norm 1, the rate warmed up and then falling to zero."""
    e, run, start = subject.experiment, Run(mode, seed), time.process_time()
    model = subject.load(mode, seed).train()
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=e.learning_rate, weight_decay=0.0)
    ramp = lambda i: min((i + 1) / e.warmup, (e.steps - i) / max(e.steps - e.warmup, 1))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    order, rows = random.Random(seed), list(range(len(subject.train)))
    at = len(rows)
    run.held_out.append((0, subject.held_out_loss(model)))
    for step in range(e.steps):
        if at + e.batch > len(rows):
            order.shuffle(rows)
            at = 0
        batch = subject.batch([subject.train[i] for i in rows[at : at + e.batch]])
        at += e.batch
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        run.train.append(loss.item())
        if (step + 1) % e.measured == 0 or step + 1 == e.steps:
            run.held_out.append((step + 1, subject.held_out_loss(model)))
    run.seconds = time.process_time() - start
    return run


# what the runs say


def summary(runs: list[Run]) -> dict[str, dict[str, Any]]:
    """For each precision: held-out loss before, after (mean, lowest and highest seed), and of the seeds that bf16 ran
    too the differences from it (mean, lowest, highest). within: its mean lies between bf16's lowest and highest seed,
    or below; None while bf16 has one seed."""
    found = {}
    base = {r.seed: r for r in runs if r.mode == "bf16"}
    for mode in dict.fromkeys(r.mode for r in runs):
        own = [r for r in runs if r.mode == mode]
        after, last = [r.after for r in own], [statistics.fmean(r.train[-50:]) for r in own]
        pairs = [(r.after - base[r.seed].after, r.before - base[r.seed].before) for r in own if r.seed in base]
        found[mode] = {
            "seeds": len(own),
            "before": statistics.fmean(r.before for r in own),
            "after": statistics.fmean(after),
            "lowest": min(after),
            "highest": max(after),
            "train, last 50 steps": statistics.fmean(last),
            "difference before": statistics.fmean(b for _, b in pairs) if pairs else None,
            "difference": statistics.fmean(a for a, _ in pairs) if pairs else None,
            "differences": [a for a, _ in pairs],
            "within": statistics.fmean(after) <= max(r.after for r in base.values()) if len(base) > 1 else None,
        }
    return found


def table(result: dict[str, Any]) -> str:
    """The summary in Markdown."""
    rows = [
        "| base | seeds | held out, before | after | lowest to highest seed | from bf16, by seed | train, last 50 |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for mode, s in summary(runs_of(result)).items():
        d = s["differences"]
        by_seed = "" if mode == "bf16" or not d else f"{s['difference']:+.4f} ({min(d):+.4f} to {max(d):+.4f})"
        rows.append(
            f"| {mode} | {s['seeds']} | {s['before']:.4f} | {s['after']:.4f} | {s['lowest']:.4f} to {s['highest']:.4f} "
            f"| {by_seed} | {s['train, last 50 steps']:.4f} |"
        )
    return "\n".join(rows)


def runs_of(result: dict[str, Any]) -> list[Run]:
    """The runs of a result file."""
    return [Run(**(r | {"held_out": [tuple(x) for x in r["held_out"]]})) for r in result["runs"]]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fp8_loss")
    parser.add_argument("--out", type=Path, help="the result; runs that it holds are not run again")
    parser.add_argument("--show", type=Path, help="print the table of a result, run nothing")
    parser.add_argument("--rounding", action="store_true", help="print what each precision loses of normal weights")
    parser.add_argument("--model", type=Path, default=Path("fp8-loss-model"), help="folder of the pre-trained decoder")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seeds", nargs="+", type=int, default=Experiment.seeds)
    parser.add_argument("--steps", type=int, default=Experiment.steps)
    parser.add_argument("--learning-rate", type=float, default=Experiment.learning_rate)
    given = parser.parse_args(arguments)
    if given.rounding:
        print(", ".join(f"{name} {error:.2%}" for name, error in rounding().items()))
        return 0
    if given.show is not None:
        print(table(json.loads(given.show.read_text())))
        return 0
    if given.steps < 1:
        parser.error(f"--steps {given.steps}: want at least 1")
    if given.out is None:
        parser.error("--out FILE or --show FILE is wanted")
    experiment = Experiment(steps=given.steps, learning_rate=given.learning_rate, seeds=tuple(given.seeds))
    result = measure(experiment, given.modes, given.out, given.model)
    print(table(result))
    return 0


def _quiet() -> None:
    """Progress bars, and what other libraries say of every load and product."""
    from transformers.utils import logging as of_transformers

    of_transformers.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


def measure(experiment: Experiment, modes: tuple[str, ...], out: Path, folder: Path) -> dict[str, Any]:
    """All runs, written to `out` after each. Runs that `out` has are taken from it; ValueError where it is of another
    experiment."""
    say = lambda what: print(what, file=sys.stderr, flush=True)
    _quiet()
    if not torch.cuda.is_available():
        through_float32()
    subject = Subject(experiment, folder, say)
    shared = {k: v for k, v in asdict(experiment).items() if k != "seeds"}
    result: dict[str, Any] = {
        "header": header(subject.device, "python -m benchmarks.fp8_loss"),
        "experiment": shared,
        "rows": {"train": len(subject.train), "held out": len(subject.held_out)},
        "runs": [],
    }
    if out.is_file():
        there = json.loads(out.read_text())
        if there["experiment"] != shared or there["rows"] != result["rows"]:
            raise ValueError(f"fp8_loss: want a new file or one of this experiment, got {out}: of another; give --out")
        result["runs"] = there["runs"]
    done = {(r["mode"], r["seed"]) for r in result["runs"]}
    for seed in experiment.seeds:
        for mode in modes:
            if (mode, seed) in done:
                continue
            run = train(subject, mode, seed)
            say(f"{mode}, seed {seed}: {run.before:.4f} -> {run.after:.4f} in {run.seconds:.0f} s of CPU time")
            if out.is_file():  # another process may have added its own
                result["runs"] = json.loads(out.read_text())["runs"]
            result["runs"].append(asdict(run))
            result["summary"] = summary(runs_of(result))
            written = out.with_suffix(f".{os.getpid()}")
            written.write_text(json.dumps(result, indent=1) + "\n")
            written.replace(out)
    return result


if __name__ == "__main__":
    raise SystemExit(main())
