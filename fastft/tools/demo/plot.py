"""The demo's one picture: both loss curves above, how far each is from the reference below."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from fastft.tools.demo.training import TrainingRun


def plot(
    path: Path, fast: TrainingRun, stock: TrainingRun, reordered: TrainingRun, reference: TrainingRun | None, title: str
) -> Any:
    """Write a PNG, and return the figure. Below, on a logarithmic scale, the distance of each run from the float64 run
    (from stock where there is none)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    steps = range(1, len(stock.losses) + 1)
    above.plot(
        steps, stock.losses, color="#999999", linewidth=4, label=f"stock ({1e3 * stock.median_step:.0f} ms a step)"
    )
    above.plot(
        steps, fast.losses, color="#0b6e4f", linewidth=1.5, label=f"fastft ({1e3 * fast.median_step:.0f} ms a step)"
    )
    above.set_ylabel("training loss")
    above.set_title("\n".join(textwrap.wrap(title, 80)))
    above.legend(frameon=False)
    base, of = (reference, reference.name) if reference is not None else (stock, "stock")
    others = [(reordered, "#999999", reordered.name, "--"), (fast, "#0b6e4f", "fastft", "-")]
    if reference is not None:
        others.insert(0, (stock, "#999999", "stock", "-"))
    for run, color, label, style in others:
        distance = [max(abs(x - y), 1e-10) for x, y in zip(run.losses, base.losses)]
        below.semilogy(range(1, len(distance) + 1), distance, color=color, label=label, linestyle=style, linewidth=1)
    below.set_ylabel("distance from\n" + of)
    below.set_xlabel("step")
    below.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)
    return figure
