"""What can be measured honestly without a GPU: python -m benchmarks.cpu [--quick] [--out FOLDER]

layer    one Llama-3.1-8B decoder layer under LoRA at 4 x 2048 tokens, on fake tensors: bytes kept for the backward,
         launches, FLOPs, bytes read and written, and which of these adapters add
experts  one layer of experts with LoRA on all of them, at 4 x 2048 tokens, on fake tensors: the same
head     matrix products of the LM head, in units of 2 tokens hidden vocabulary, and its temporary bytes, on fake
         tensors
kernels  registers, spills and shared memory of every kernel on every architecture, from the compilers
host     time that an adapted attention layer costs the interpreter, on a model too small for its arithmetic to matter

Writes cpu-DATE.json and cpu-DATE.md. Exit code 1 when a figure is above its ceiling, which says that something got
worse."""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from trl.trainer import utils as trl_utils

import fastft
from benchmarks import expert_costs, host_calls
from benchmarks.fake import FORMULAS, Live, layer_cost
from fastft.linear.groups import HOLDER
from fastft.linear.projection import describe
from fastft.swapping.swap import slot_of
from fastft_kernels.lm_head.linear_cross_entropy import linear_cross_entropy
from fastft_kernels.lm_head.linear_logprob import linear_logprob
from fastft_kernels.lora.lora_linear import pack
from fastft_kernels.runtime import aot
from fastft_kernels.runtime.language import HAS_TRITON

BATCH = (4, 2048)
ARCHS = aot.ARCHS
QUICK_ARCHS = ("sm_90",)
RESULTS = Path(__file__).parent / "results"


@dataclass
class Figure:
    """One measurement. stock: the same without fastft, where there is one. ceiling, floor: beyond them, the run
    fails."""

    section: str
    name: str
    unit: str
    value: float
    stock: float | None = None
    ceiling: float | None = None
    floor: float | None = None

    @property
    def ok(self) -> bool:
        below = self.ceiling is None or self.value <= self.ceiling
        return below and (self.floor is None or self.value >= self.floor)


def llama_8b(layers: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )


# ceilings: kept bytes per token and layer, launches per layer, GFLOP per token and layer (stock's own: nothing is
# computed twice; checkpointed, all but the last product), bytes read and written per token and layer, and of these
# the adapters' part
LAYERS = {
    "fp32 adapters, bf16 autocast": (dict(), 105_000, 76, 0.9395, 1_655_000, 682_000),
    "bf16 adapters": (dict(autocast=False), 105_000, 68, 0.9395, 1_655_000, 682_000),
    "autocast, dropout 0.05": (dict(dropout=0.05), 105_000, 120, 0.9395, 2_415_000, 1_442_000),
    "autocast, every layer checkpointed": (dict(checkpointing=True), 8_192, 102, 1.31, 2_216_000, 893_000),
}
# An FP8 base, bf16 adapters, on a GPU that multiplies in it: kept bytes, no more than bf16's; launches (beside bf16's,
# seven weights transposed, seven gradients and one input quantised, seven scales of one, three sums of input
# gradients); bytes read and written
FP8 = (105_000, 93, 1_790_000)

# With adapters, the input gradients of the products of one input (q, k, v; gate, up) are summed within the products.
# Without, autograd sums them: for each of the three sums of [tokens, 4096] two passes more, which no adapter spares.
_SUMS = 3 * 2 * 4096 * 2


@functools.cache
def _without_adapters(patched: bool, checkpointing: bool) -> float:
    """Bytes read and written per token by a layer in which nothing learns, with those sums within the products."""
    cost = layer_cost(
        llama_8b, BATCH, patch=fastft.patch if patched else None, autocast=False, checkpointing=checkpointing, rank=0
    )
    return cost.traffic / (BATCH[0] * BATCH[1]) - (_SUMS if patched else 0)


def layer(quick: bool) -> list[Figure]:
    found = []
    tokens = BATCH[0] * BATCH[1]
    for name, (settings, kept, launches, gflop, traffic, of_adapters) in list(LAYERS.items())[: 1 if quick else None]:
        stock, ours = (layer_cost(llama_8b, BATCH, patch=patch, **settings) for patch in (None, fastft.patch))
        found += [
            Figure(
                "layer",
                f"{name}: kept for the backward",
                "B/token/layer",
                ours.saved / tokens,
                stock.saved / tokens,
                kept,
            ),
            Figure("layer", f"{name}: launches", "per layer", ours.launches, stock.launches, launches),
            Figure(
                "layer",
                f"{name}: arithmetic",
                "GFLOP/token/layer",
                ours.flops / tokens / 1e9,
                stock.flops / tokens / 1e9,
                gflop,
            ),
            *_traffic(name, ours.traffic / tokens, stock.traffic / tokens, settings, traffic, of_adapters),
        ]
    return found if quick else [*found, *_in_fp8(tokens)]


def _in_fp8(tokens: int) -> list[Figure]:
    cost = layer_cost(llama_8b, BATCH, patch=fastft.patch, autocast=False, fp8=True)
    kept, launches, traffic = FP8
    unit = "B/token/layer"
    return [
        Figure("layer", "FP8 base: kept for the backward", unit, cost.saved / tokens, None, kept),
        Figure("layer", "FP8 base: launches", "per layer", cost.launches, None, launches),
        Figure("layer", "FP8 base: read and written", unit, cost.traffic / tokens, None, traffic),
    ]


def _traffic(name: str, ours: float, stock: float, settings: dict, most: float, of_adapters: float) -> list[Figure]:
    """What a layer reads and writes, and how much of it would not be there without adapters: the small products,
    their outputs added to the large ones' and to input gradients, casts, what is computed again for dA."""
    mine, theirs = (_without_adapters(patched, settings.get("checkpointing", False)) for patched in (True, False))
    unit = "B/token/layer"
    return [
        Figure("layer", f"{name}: read and written", unit, ours, stock, most),
        Figure("layer", f"{name}: of it, the adapters' part", unit, ours - mine, stock - theirs, of_adapters),
    ]


def experts(quick: bool) -> list[Figure]:
    found = []
    tokens = BATCH[0] * BATCH[1]
    for name, size in list(expert_costs.sizes().items())[: 1 if quick else None]:
        stock, ours = (expert_costs.experts_cost(size, tokens, patch) for patch in (None, fastft.patch))
        least = size.factored(tokens) / tokens / 1e9
        unit = "GFLOP/token/layer"
        kept = (ours.saved / tokens, stock.saved / tokens, stock.saved / tokens / 3)
        work = (ours.flops / tokens / 1e9, stock.flops / tokens / 1e9)
        found += [
            Figure("experts", f"{name}: kept for the backward", "B/token/layer", *kept),
            Figure("experts", f"{name}: arithmetic", unit, *work, 1.03 * least, least),
        ]
    return found


def _trl_head(hidden, weight, target):
    return trl_utils._ChunkedLogProbFunction.apply(hidden, weight, None, target, 1.0, 256)[0].sum()


HEADS: dict[str, tuple[bool, Callable, Callable | None, float]] = {  # trained, ours, stock, ceiling of products
    "log-probabilities, frozen head": (False, lambda h, w, t: linear_logprob(h, w, t).log_probs.sum(), _trl_head, 2),
    "log-probabilities, trained head": (True, lambda h, w, t: linear_logprob(h, w, t).log_probs.sum(), _trl_head, 4),
    "mean cross-entropy, frozen head": (False, linear_cross_entropy, None, 2),
    "mean cross-entropy, trained head": (True, linear_cross_entropy, None, 3),
}


def _products(step: Callable, trained: bool, tokens=512, hidden=64, vocab=2000) -> float:
    h, w = torch.randn(tokens, hidden, requires_grad=True), torch.randn(vocab, hidden, requires_grad=trained)
    target = torch.arange(tokens) % vocab
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flops:
        step(h, w, target).backward()
    return flops.get_total_flops() / (2 * tokens * hidden * vocab)


def head(quick: bool) -> list[Figure]:
    found = [
        Figure(
            "head",
            f"{name}: matrix products",
            "forward + backward",
            _products(ours, trained),
            stock and _products(stock, trained),
            most,
        )
        for name, (trained, ours, stock, most) in HEADS.items()
    ]
    for name, (trained, ours, *_) in HEADS.items():
        if trained:
            # on a CPU the weight's tiles are cast to float32, which no GPU does: those bytes would mean nothing
            continue
        with FakeTensorMode():
            h = torch.empty(8192, 4096, dtype=torch.bfloat16, requires_grad=True)
            w, target = torch.empty(151_936, 4096, dtype=torch.bfloat16), torch.zeros(8192, dtype=torch.long)
            with Live() as live:
                ours(h, w, target).backward()
        gib = (live.peak - live.now) / 2**30
        found.append(Figure("head", f"{name}: temporary memory, 8192 x 4096 x 151936", "GiB", gib, None, 0.7))
    return found


def kernels(quick: bool) -> list[Figure]:
    if not HAS_TRITON:
        return []
    found = []
    for arch in QUICK_ARCHS if quick else ARCHS:
        reports = {}
        for module in aot.kernel_modules():
            for case in aot.cases_of(module, arch):
                reports[f"{case.kernel.__name__}, {case.note}"] = aot.compile_case(case, arch)
        worst = max(reports, key=lambda n: reports[n].regs)
        shared = max(r.shared / r.shared_limit for r in reports.values())
        found += [
            Figure(
                "kernels",
                f"{arch}: spilled by {len(reports)} kernels",
                "B/thread",
                sum(r.spill_bytes for r in reports.values()),
                None,
                0,
            ),
            Figure(
                "kernels",
                f"{arch}: most registers ({worst})",
                "per thread",
                reports[worst].regs,
                None,
                255 if arch.startswith("sm") else 512,
            ),
            Figure("kernels", f"{arch}: most shared memory", "of the limit", shared, None, 1.0),
        ]
    return found


def _attention_ns(model: torch.nn.Module, repeats: int) -> tuple[float, float]:
    """Medians over `repeats`: (forward, backward) of one attention layer with four adapted projections."""
    base = model.get_base_model().model
    x = torch.randn(1, 4, 64, requires_grad=True)
    position = base.rotary_emb(x, torch.arange(4)[None])
    times = []
    for _ in range(repeats):
        start = time.perf_counter_ns()
        y = base.layers[0].self_attn(hidden_states=x, position_embeddings=position, attention_mask=None)[0]
        middle = time.perf_counter_ns()
        y.backward(torch.ones_like(y))
        times.append((middle - start, time.perf_counter_ns() - middle))
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


def _group_ns(model: torch.nn.Module, repeats: int) -> tuple[float, float]:
    """Medians over `repeats`: (the three projections of one input, forward; of that, reading and packing what they are
    now, 0 for stock)."""
    attention = model.get_base_model().model.layers[0].self_attn
    members, x = (attention.q_proj, attention.k_proj, attention.v_proj), torch.randn(1, 4, 64, requires_grad=True)
    slot = slot_of(attention)
    times = []
    for _ in range(repeats):
        before = slot.state(HOLDER).begin() if slot is not None else []
        start = time.perf_counter_ns()
        for m in members:
            m(x)
        end = time.perf_counter_ns()
        if slot is not None:
            slot.state(HOLDER).end(before)
            pack("benchmark", x.shape[-1], x.dtype, [describe(m) for m in members], None, None, None)
        times.append((end - start, time.perf_counter_ns() - end if slot is not None else 0))
    return statistics.median(t[0] for t in times), statistics.median(t[1] for t in times)


# ceilings of the forward with gradients, of the backward, and of the forward without gradients
CALLS = {"LoRA on all linears": (600, 450, 560), "LoRA on q and v": (465, 240, 325)}


def _calls() -> list[Figure]:
    """Calls of the interpreter a decoder layer; they do not depend on the machine."""
    found = []
    for targets, (forward, backward, without) in CALLS.items():
        stock, ours = (host_calls.calls(targets, patched, True) for patched in (False, True))
        plain, quick = (host_calls.calls(targets, patched, False)[0] for patched in (False, True))
        name = lambda part, targets=targets: f"Python and C calls, {targets}, {part}"
        found += [
            Figure("host", name("forward"), "a layer", ours[0], stock[0], forward),
            Figure("host", name("backward"), "a layer", ours[1], stock[1], backward),
            Figure("host", name("forward without gradients"), "a layer", quick, plain, without),
        ]
    return found


def _patch_calls() -> list[Figure]:
    """What a patch costs a deep model beside a shallow one."""
    (few, few_proofs), (many, proofs) = (host_calls.of_patch(layers) for layers in (2, 32))
    name = "fastft.patch of 32 layers beside 2 (LoRA on all linears): "
    return [
        Figure("host", name + "Python and C calls", "calls", many, few, round(1.2 * few)),
        Figure("host", name + "proofs", "proofs", proofs, few_proofs, few_proofs),
    ]


def host(quick: bool) -> list[Figure]:
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=64,
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        make = lambda: get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear")).train()
        stock, ours = make(), fastft.patch(make())
        count = 4 if quick else 20
        rounds = [(_attention_ns(stock, 50), _attention_ns(ours, 50)) for _ in range(count)][
            1:
        ]  # alternating: shared load
        groups = [(_group_ns(stock, 50), _group_ns(ours, 50)) for _ in range(count)][1:]
    finally:
        torch.set_num_threads(threads)
    found = []
    for i, part in enumerate(("forward", "backward")):
        theirs, mine = (statistics.median(r[who][i] for r in rounds) / 1e3 for who in (0, 1))
        found.append(Figure("host", f"an attention layer with four adapted projections, {part}", "us", mine, theirs))
    theirs, mine, reading = (statistics.median(r[who][i] for r in groups) for who, i in ((0, 0), (1, 0), (1, 1)))
    return [
        *found,
        *_calls(),
        *_patch_calls(),
        Figure("host", "one group call (three adapted projections of one input), forward", "ns", mine, theirs),
        Figure("host", "of it, reading and packing the three layers as they are now", "ns", reading),
    ]


SECTIONS = {"layer": layer, "experts": experts, "head": head, "kernels": kernels, "host": host}


def environment() -> dict[str, str]:
    names = ("torch", "triton", "transformers", "peft", "trl", "fastft")
    found = {}
    for n in names:
        try:
            found[n] = importlib.metadata.version(n)
        except importlib.metadata.PackageNotFoundError:
            found[n] = "not installed"
    return {"python": platform.python_version(), "machine": platform.machine(), **found}


def shown(v: float | None) -> str:
    return "" if v is None else f"{v:,.4g}" if v < 1000 else f"{v:,.0f}"


def row(f: Figure) -> str:
    """The figure as a line of a Markdown table: the README's tables consist of such lines."""
    return f"| {f.section}: {f.name} | {f.unit} | {shown(f.stock)} | {shown(f.value)} | {shown(f.ceiling)} |"


def write(figures: list[Figure], folder: Path, command: str) -> Path:
    """cpu-DATE.json and .md; the path of the JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"cpu-{datetime.date.today().isoformat()}.json"
    versions = environment()
    path.write_text(
        json.dumps({"command": command, "environment": versions, "figures": [asdict(f) for f in figures]}, indent=1)
        + "\n"
    )
    lines = [
        f"`{command}`, " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        "| what | unit | stock | fastft | ceiling |",
        "|---|---|--:|--:|--:|",
    ]
    path.with_suffix(".md").write_text("\n".join([*lines, *map(row, figures)]) + "\n")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.cpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one setting of the layer, one architecture")
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    figures: list[Figure] = []
    for name in options.only:
        start = time.perf_counter()
        figures += SECTIONS[name](options.quick)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    table = Table("what", "unit", "stock", "fastft", "ceiling")
    for f in figures:
        table.add_row(
            f"{f.section}: {f.name}",
            f.unit,
            *map(shown, (f.stock, f.value, f.ceiling)),
            style="" if f.ok else "bold red",
        )
    Console().print(table)
    words = " ".join(["python -m benchmarks.cpu", *(argv if argv is not None else sys.argv[1:])])
    print(write(figures, options.out, words))
    return 0 if all(f.ok for f in figures) else 1


if __name__ == "__main__":
    sys.exit(main())
