"""Published claims of memory, met or not as far as the planner can tell: python -m benchmarks.claims [--out FOLDER]

Each claim's model and batch is planned (fastft.plan: the real code on fake tensors), for PEFT at its defaults, for
TRL's, and for fastft under the policy that takes the least. These are predictions, none of which a GPU has measured
yet; speed is not predicted at all.

    memory    peak of a training step, against the claim's ratio
    context   the longest row that fits a card, QLoRA, batch 1

Writes claims-DATE.json and claims-DATE.md.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from transformers import LlamaConfig

from benchmarks.cpu import RESULTS, environment
from fastft.tools.plan.planner import plan
from fastft.tools.plan.result import UNMEASURED, Plan, PlanLine

GIB = 2**30


def llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        vocab_size=vocab,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )


SHAPES = {
    "Llama-2-7B": llama(4096, 11008, 32, 32, 32, 32_000),
    "Llama-2-13B": llama(5120, 13824, 40, 40, 40, 32_000),
    "Llama-3.1-8B": llama(4096, 14336, 32, 32, 8, 128_256),
}


@dataclass(frozen=True)
class Memory:
    """claim: as published, with the peer's GB; ratio: its memory over PEFT's."""

    name: str
    shape: str
    batch: int
    seq: int
    load_in_4bit: bool
    claim: str
    ratio: float
    loss: str = "model"


@dataclass(frozen=True)
class Context:
    gpu: str
    claim: str
    tokens: int


MEMORY = (
    Memory("LoRA r=16, 4 x 512", "Llama-2-7B", 4, 512, False, "19.2 to 5.0 GB (-74%), length not given", 0.26),
    Memory("QLoRA r=16, 4 x 512", "Llama-2-13B", 4, 512, True, "12.8 to 6.9 GB, length not given", 0.54),
    Memory("QLoRA r=16, 2 x 2048", "Llama-3.1-8B", 2, 2048, True, "over 70% less", 0.30),
    Memory(
        "QLoRA r=16, 1 x 20000, full logits as in GRPO before TRL 1.x",
        "Llama-3.1-8B",
        1,
        20_000,
        True,
        "510.8 to 54.3 GB (-89%)",
        0.11,
    ),
)
CONTEXTS = (
    Context("8GiB", "2 972", 2_972),
    Context("16GiB", "40 724", 40_724),
    Context("24GiB", "78 475", 78_475),
    Context("80GiB", "342 733", 342_733),
)


@dataclass
class Row:
    """peft, trl, fastft: GiB, or tokens for a context; met: by the prediction."""

    what: str
    claim: str
    peft: float
    trl: float
    fastft: float
    policy: str
    ratio: float
    wanted: float
    met: bool


def _line(found: Plan, stack: str, policy: str) -> PlanLine:
    return next(x for x in found.lines if x.stack == stack and x.policy.startswith(policy))


def memory(case: Memory) -> Row:
    config = SHAPES[case.shape]
    planned = {
        loss: plan(
            config,
            batch=case.batch,
            seq=case.seq,
            load_in_4bit=case.load_in_4bit,
            loss=loss,
            policy="lean",
            limits=False,
        )
        for loss in ("model", "trl")
    }
    peft = _line(planned["model"], "stock", "no checkpointing").peak.total / GIB
    trl = _line(planned["trl"], "stock", "every layer").peak.total / GIB
    ours = min((x for x in planned["trl"].lines if x.stack == "fastft"), key=lambda x: x.peak.total)
    total = ours.peak.total / GIB
    return Row(
        f"{case.shape}, {case.name}, GiB",
        case.claim,
        peft,
        trl,
        total,
        ours.policy,
        total / peft,
        case.ratio,
        total / peft <= case.ratio,
    )


def context(case: Context, shape: str = "Llama-3.1-8B") -> Row:
    by_loss = {
        loss: plan(SHAPES[shape], batch=1, seq=2048, load_in_4bit=True, loss=loss, policy="lean", gpu=case.gpu)
        for loss in ("model", "trl")
    }
    peft = _line(by_loss["model"], "stock", "no checkpointing").longest or 0
    trl = _line(by_loss["trl"], "stock", "every layer").longest or 0
    ours = max((x for x in by_loss["trl"].lines if x.stack == "fastft"), key=lambda x: x.longest or 0)
    tokens = ours.longest or 0
    return Row(
        f"{shape}, QLoRA r=16, longest row on {case.gpu}",
        case.claim,
        peft,
        trl,
        tokens,
        ours.policy,
        tokens / case.tokens,
        1.0,
        tokens >= case.tokens,
    )


def shown(x: float) -> str:
    return f"{x:,.1f}" if x < 1000 else f"{x:,.0f}"


def markdown(r: Row) -> str:
    """The row as a line of a Markdown table: the README's consists of such lines."""
    return (
        f"| {r.what} | {shown(r.peft)} | {shown(r.trl)} | {shown(r.fastft)} ({r.policy}) | {r.claim} | {r.ratio:.2f} | "
        f"{'yes' if r.met else 'no'} |"
    )


HEADER = [
    "| what | PEFT's defaults | TRL's defaults | fastft | published by a peer | ratio | met |",
    "|---|--:|--:|--:|---|--:|---|",
]


def write(rows: list[Row], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"claims-{datetime.date.today().isoformat()}.json"
    versions, command = environment(), "python -m benchmarks.claims"
    path.write_text(
        json.dumps(
            {"command": command, "note": UNMEASURED, "environment": versions, "rows": [asdict(r) for r in rows]},
            indent=1,
        )
        + "\n"
    )
    lines = [
        f"`{command}`: {UNMEASURED}. " + ", ".join(f"{k} {v}" for k, v in versions.items()),
        "",
        *HEADER,
        *map(markdown, rows),
    ]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    rows = []
    for measure, cases in ((memory, MEMORY), (context, CONTEXTS)):
        for case in cases:
            rows.append(measure(case))
            print(markdown(rows[-1]), flush=True)
    print(write(rows, options.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
