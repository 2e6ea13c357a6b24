"""The README's table of speed and memory, from the result file of a GPU run: python -m benchmarks.speed_table
benchmarks/results/FILE.json

One row for each weight format and batch; a cell is tokens/s without padding (the median step after the warm-up) and the
peak of allocated memory in GiB. A stack that the file does not hold has an empty cell."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

STACKS = ("stock", "liger", "unsloth", "fastft")
WEIGHTS = {"bf16": "bf16", "nf4": "NF4"}
CELLS = {"fixed2048": "{batch} x 2048", "alpaca": "{batch} Alpaca-like rows, padded", "long8k": "{batch} x 8192"}


def table(rows: Iterable[dict]) -> list[str]:
    """The rows of the Markdown table, without its head. rows: the result file's."""
    found = {(r["weights"], r["cell"], r["stack"]): r for r in rows}
    lines = []
    for weights, shown in WEIGHTS.items():
        for cell, words in CELLS.items():
            by_stack = {s: found[weights, cell, s] for s in STACKS if (weights, cell, s) in found}
            if not by_stack:
                continue
            batch = next(iter(by_stack.values()))["batch"]
            figure = lambda r: f"{r['tokens_per_s']:,} / {r['peak_alloc_gib']:.1f}"
            cells = [figure(by_stack[s]) if s in by_stack else "" for s in STACKS]
            lines.append(f"| {shown}, {words.format(batch=batch)} | " + " | ".join(cells) + " |")
    return lines


def main(argv: list[str]) -> None:
    print("| tokens/s / peak GiB | stock TRL | Liger | Unsloth | fastft |\n|---|--:|--:|--:|--:|")
    print("\n".join(table(json.loads(Path(argv[0]).read_text())["rows"])))


if __name__ == "__main__":
    main(sys.argv[1:])
