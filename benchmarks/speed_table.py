"""The README's table of speed and memory, and its picture, from the result file of a GPU run: python -m
benchmarks.speed_table benchmarks/results/FILE.json [--plot FILE.svg]

One row for each weight format and batch; a cell is tokens/s without padding (the median step after the warm-up) and the
peak of allocated memory in GiB. A stack that the file does not hold has an empty cell."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

STACKS = ("stock", "liger", "unsloth", "fastft")
WEIGHTS = {"bf16": "bf16", "nf4": "NF4"}
COLOURS = ("#b3b3b3", "#7fa7d0", "#c9a66b", "#2f6f4f")
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


def plot(found: dict, path: str | os.PathLike) -> None:
    """Bars of tokens/s for each row of the table, as an SVG whose words are text. found: the result file."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    rows = {(r["weights"], r["cell"], r["stack"]): r for r in found["rows"]}
    groups = [(w, c) for w in WEIGHTS for c in CELLS if any((w, c, s) in rows for s in STACKS)]
    figure = Figure(figsize=(8, 0.5 + 0.85 * len(groups)), layout="constrained")
    axes = figure.add_subplot()
    for i, stack in enumerate(STACKS):
        places = [(g, rows[(*key, stack)]) for g, key in enumerate(groups) if (*key, stack) in rows]
        at = [g + (i - 1.5) * 0.2 for g, _ in places]
        rates = [r["tokens_per_s"] for _, r in places]
        axes.barh(at, rates, height=0.19, label=stack, color=COLOURS[i])
        for y, rate in zip(at, rates):
            axes.text(rate, y, f" {rate:,}", va="center", fontsize=8)
    named = lambda key: next(r for r in found["rows"] if (r["weights"], r["cell"]) == key)
    labels = [f"{WEIGHTS[w]}, {CELLS[c].format(batch=named((w, c))['batch'])}" for w, c in groups]
    axes.set_yticks(range(len(groups)), labels)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set_xlabel(f"tokens/s on one {found['header']['device'].split(' (')[0]}, 8B, LoRA r=16, TRL's SFTTrainer")
    axes.legend(fontsize=8, ncols=len(STACKS), loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastft"}):
        FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def main(argv: list[str]) -> None:
    if argv[1:2] == ["--plot"]:
        plot(json.loads(Path(argv[0]).read_text()), argv[2])
    print("| tokens/s / peak GiB | stock TRL | Liger | Unsloth | fastft |\n|---|--:|--:|--:|--:|")
    print("\n".join(table(json.loads(Path(argv[0]).read_text())["rows"])))


if __name__ == "__main__":
    main(sys.argv[1:])
