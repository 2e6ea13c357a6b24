"""What one process of `fastft bench` is told, as JSON, and the data that all of them make from it. Imports nothing
heavy: a peer that must be imported before transformers comes first."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

STACKS = ("stock", "best", "liger", "unsloth", "fastft")
CELLS = ("sft", "packed", "long", "dpo", "grpo")
NEEDS = {"liger": "liger_kernel", "unsloth": "unsloth"}  # stack -> the package that it is
DRAWS = 3  # batches that the gate judges as one


@dataclass(frozen=True)
class Spec:
    """model: name or folder. stack: of STACKS, or "reference" for the high-precision run that judges them. folder:
    where adapter and the gate's gradients lie. seq, batch: tokens and rows. lengths: of the one row of the cell "long",
    in turn. steps: measured ones; two go before. only_gate: nothing is timed."""

    model: str
    stack: str
    cells: tuple[str, ...]
    folder: str
    seq: int
    batch: int
    lengths: tuple[int, ...]
    steps: int = 6
    four_bit: bool = False
    seed: int = 0
    rank: int = 16
    only_gate: bool = False

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(asdict(self)))
        return path

    @classmethod
    def read(cls, path: Path) -> Spec:
        found: dict[str, Any] = json.loads(path.read_text())
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
        return cls(**given)

    @property
    def gated(self) -> tuple[str, ...]:
        """The cells that have a gate of their own: "long" trains as "sft" does."""
        return tuple(dict.fromkeys("sft" if c == "long" else c for c in self.cells))


def row_lengths(spec: Spec, cell: str, rows: int, seq: int | None = None) -> list[int]:
    """Tokens of each row: log-normal with median 120, as Alpaca's (below seq); all of it in a long row."""
    seq = seq or spec.seq
    if cell == "long":
        return [seq] * rows
    g = random.Random(spec.seed)
    centre = min(4.787, math.log(seq) - 1)
    return [min(seq, max(4, int(g.lognormvariate(centre, 0.6)))) for _ in range(rows)]


def tokens(n: int, vocab: int, g: random.Random) -> list[int]:
    """Learnable: a noisy chain of order one over the first 2000 of the vocabulary."""
    size = min(2000, vocab)
    x, out = g.randrange(size), []
    for _ in range(n):
        out.append(x)
        x = (x * 31 + 7) % size if g.random() < 0.7 else g.randrange(size)
    return out
