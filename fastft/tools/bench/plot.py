"""The pictures of `fastft bench`: speed and memory of each stack in each cell, and memory against the length of a
row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

COLORS = {"stock": "#999999", "best": "#555555", "liger": "#c08a2e", "unsloth": "#7a5195", "fastft": "#0b6e4f"}
GIB = 2.0**30


def plot(result: Any, folder: Path) -> list[Path]:
    """speed.png, memory.png, length.png: each only where there is something to show. result: a `bench.BenchResult`."""
    written = []
    for name, label, value in (
        ("speed", "non-padding tokens/s", lambda r: r.rate),
        ("memory", "peak memory, GiB", lambda r: r.peak and r.peak / GIB),
    ):
        if any(value(r) for r in result.rows):
            written.append(_bars(result, folder / f"{name}.png", label, value))
    lines = [(r.stack, [p for p in r.by_length if p["peak"]]) for r in result.rows]
    if any(points for _, points in lines):
        figure, axes = _figure(f"{result.options.model}, {result.about['device']}")
        for stack, points in lines:
            if points:
                axes.plot(
                    [p["tokens"] for p in points],
                    [p["peak"] / GIB for p in points],
                    marker="o",
                    color=COLORS[stack],
                    label=stack,
                )
        axes.set_xlabel("tokens of one row")
        axes.set_ylabel("peak memory, GiB")
        axes.legend(frameon=False)
        figure.savefig(folder / "length.png", dpi=130)
        written.append(folder / "length.png")
    return written


def _figure(title: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_title(title, fontsize="medium")
    return figure, axes


def _bars(result: Any, path: Path, label: str, value: Callable[[Any], float | None]) -> Path:
    figure, axes = _figure(f"{result.options.model}, {result.about['device']}")
    cells, stacks = list(dict.fromkeys(r.cell for r in result.rows)), list(dict.fromkeys(r.stack for r in result.rows))
    found = {(r.cell, r.stack): value(r) for r in result.rows}
    width = 0.8 / len(stacks)
    for i, stack in enumerate(stacks):
        have = [(n + i * width, y) for n, c in enumerate(cells) if (y := found.get((c, stack)))]
        axes.bar(
            [x for x, _ in have],
            [y for _, y in have],
            width=0.9 * width,
            color=COLORS[stack],
            label=stack if have else f"{stack} (no figure)",
        )
    axes.set_xticks([n + 0.4 - width / 2 for n in range(len(cells))], cells)
    axes.set_ylabel(label)
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    return path
