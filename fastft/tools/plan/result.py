"""What `plan` returns: its lines, as a table, as JSON and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.table import Table
from rich.text import Text

from fastft.tables import as_text, table
from fastft.tools.plan.gpus import Gpu
from fastft.tools.plan.predict import StepPeakMemory

GIB = 2**30
COLUMNS = {  # a column and the parts that it adds up
    "weights": ("weights", "quantisation", "buffers"),
    "adapters": ("adapters",),
    "optimizer": ("optimizer",),
    "gradients": ("gradients",),
    "activations": ("activations",),
    "temporary": ("temporary",),
    "gathered": ("gathered",),
    "buffers": ("communication",),
}
RANKS_ONLY = ("gathered", "buffers")
COLOURS = ("#4c6a92", "#7fa7d0", "#b0c4de", "#c9a66b", "#d9804f", "#b3b3b3", "#7d9a6a", "#b9cca8")


UNMEASURED = "predicted on fake tensors; the prediction was not measured on a GPU"


@dataclass(frozen=True)
class PlanLine:
    """One way to train. recomputed, offloaded: how many of the model's layers. fits: None without a GPU. largest_batch:
    rows of `seq` tokens; longest: tokens of a single row; None without a GPU. smallest_gpu: of those with a name, the
    smallest that it fits. Of several GPUs only: moved: bytes that each rank sends in a step, by collective, in rings;
    gpus_needed: of such GPUs, the fewest on which it fits, None where no number helps."""

    stack: str
    policy: str
    recomputed: int
    offloaded: int
    peak: StepPeakMemory
    fits: bool | None
    largest_batch: int | None
    longest: int | None
    smallest_gpu: str | None
    moved: dict[str, int] | None = None
    gpus_needed: int | None = None

    def to_dict(self) -> dict:
        """The line as `json.dumps` takes it."""
        return asdict(self) | {"total": self.peak.total}


@dataclass(frozen=True)
class Plan:
    """What `plan` found. Printing shows a table; `.to_dict()` is JSON-ready; `.plot(path)` draws it. chosen: the line
    of the policy that was asked for. gpus, strategy: how many share the work, and how; all bytes are then one
    rank's."""

    model: str
    what: str
    batch: int
    seq: int
    layers: int
    gpu: Gpu | None
    lines: tuple[PlanLine, ...]
    notes: tuple[str, ...] = (UNMEASURED,)
    gpus: int = 1
    strategy: str | None = None

    @property
    def chosen(self) -> PlanLine:
        """The line of the policy that was asked for."""
        return self.lines[0]

    def to_dict(self) -> dict:
        """The plan as `json.dumps` takes it."""
        gpu = None if self.gpu is None else asdict(self.gpu) | {"usable": self.gpu.usable}
        return {**asdict(self), "gpu": gpu, "lines": [x.to_dict() for x in self.lines]}

    def plot(self, path: str | os.PathLike) -> None:
        """Draw the lines as bars, into the image file `path`."""
        plot(self, path)

    def __rich_console__(self, console, options):
        yield from render(self, min(options.max_width, 100))

    def __str__(self) -> str:
        return as_text(self, 100)


def columns(plan: Plan) -> list[str]:
    """The columns that a plan has: a single process gathers nothing."""
    return [c for c in COLUMNS if plan.strategy is not None or c not in RANKS_ONLY]


def parts(line: PlanLine) -> dict[str, float]:
    """The GiB of each column."""
    return {c: sum(line.peak.parts.get(p, 0) for p in of) / GIB for c, of in COLUMNS.items()}


def label(line: PlanLine, layers: int) -> str:
    """How a line of the plan is called in full."""
    how = line.policy
    if how.startswith("auto"):
        did = f"{line.recomputed} of {layers} layers recomputed" if line.recomputed else "nothing recomputed"
        how += f": {did}" + (f", {line.offloaded} offloaded" if line.offloaded else "")
    return f"{line.stack}, {how}"


def render(plan: Plan, width: int) -> Iterator[Table | Text]:
    """The plan as a table of at most `width` characters, one column for each way to train, and lines of text."""
    yield _table(plan, width)
    for i, x in enumerate(plan.lines, 1):
        if x.policy not in ("none", "lean", "offload"):
            yield Text(f"{i}: {label(x, plan.layers)}")
    for note in plan.notes:
        yield Text(note)


def _table(plan: Plan, width: int) -> Table:
    gpu = plan.gpu
    where = "" if gpu is None else f" on {gpu.name} ({gpu.usable / GIB:.1f} of {gpu.total / GIB:.1f} GiB usable)"
    if plan.strategy is not None and gpu is not None:
        where = f" on each of {plan.gpus} x{where[3:]}, {plan.strategy}"
    title = f"fastft plan: {plan.model}, {plan.what}, {plan.batch} x {plan.seq}{where}"
    number = lambda v: "" if v is None else f"{v:,}"
    unit, size = ("GiB", GIB) if max(x.peak.total for x in plan.lines) >= GIB else ("MiB", 2**20)
    used, moved = columns(plan), list(dict.fromkeys(k for x in plan.lines for k in x.moved or ()))
    cells = [
        [
            *(f"{parts(x)[c] * GIB / size:.2f}" for c in used),
            f"{x.peak.total / size:.2f}",
            *(["yes" if x.fits else "NO", number(x.largest_batch), number(x.longest)] if gpu is not None else []),
            *([x.smallest_gpu or "none"] if gpu is None else []),
            *([number(x.gpus_needed) or "none"] if plan.strategy is not None else []),
            *(f"{(x.moved or {}).get(k, 0) / size:.2f}" for k in moved),
        ]
        for x in plan.lines
    ]
    last = ["fits", "largest batch", "longest row"] if gpu is not None else ["smallest GPU"]
    last += ["GPUs needed", *(f"sent: {k}" for k in moved)] if plan.strategy is not None else []
    names = [*used, "total", *last]
    short = lambda x: x.policy.split(" (")[0] if x.stack == "fastft" else ""
    headings = [f"{i} {x.stack} {short(x)}#" for i, x in enumerate(plan.lines, 1)]
    rows = [[name, *(c[i] for c in cells)] for i, name in enumerate(names)]
    styles = ["bold" if name in ("total", "fits") else "" for name in names]
    return table(title, [f"{unit} at the peak", *headings], rows, styles, width)


def plot(plan: Plan, path: str | os.PathLike) -> None:
    """One bar for each line, by what the memory is for; the GPU's usable memory as a line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = plan.lines[::-1]
    figure = Figure(figsize=(10, 1.6 + 0.5 * len(lines)), layout="constrained")
    axes = figure.add_subplot()
    left = [0.0] * len(lines)
    for column, colour in [(c, k) for c, k in zip(COLUMNS, COLOURS) if c in columns(plan)]:
        widths = [parts(x)[column] for x in lines]
        axes.barh(range(len(lines)), widths, left=left, label=column, color=colour)
        left = [a + b for a, b in zip(left, widths)]
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.1f}", va="center")
    axes.set_yticks(range(len(lines)), [label(x, plan.layers) for x in lines])
    axes.set_xlabel("GiB at the peak of a step (predicted)")
    axes.set_title(f"{plan.model}: {plan.what}, {plan.batch} x {plan.seq}", fontsize=10)
    axes.set_xlim(0, 1.1 * max(left))
    if plan.gpu is not None:
        axes.axvline(
            plan.gpu.usable / GIB, color="black", linestyle="--", linewidth=1, label=f"{plan.gpu.name}: usable"
        )
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.4, -0.18))
    FigureCanvasAgg(figure).print_figure(path, dpi=120)
