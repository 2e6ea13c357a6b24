"""Report: for every group of modules the kernel it runs, with the proof's error beside the stock error, or why it is
stock."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fastft.tables import WIDE, as_text, table

WORDS = {  # in a kernel's name -> what the table's foot says of it
    "": "error: the largest of the proof, divided by the largest true value; beside it stock's own, in the same dtype.",
    "(group of": "group of n: the n linear layers of one input run as one function.",
    "lazy logits": "lazy logits: made only where something reads them; the loss needs none.",
}


@dataclass(frozen=True)
class Row:
    """One group: modules of one class with one outcome. error and stock_error are relative to the largest true value,
    in `dtype`."""

    kind: str
    group: str  # the stock class
    count: int
    kernel: str = ""  # empty: stock
    error: float = math.nan
    stock_error: float = math.nan
    dtype: str = ""
    reason: str = ""
    example: str = ""  # the name of one module of the group
    device: str = ""  # where the proof ran
    sizes: str = ""  # the shapes of what it ran on

    @property
    def is_swapped(self) -> bool:
        """Does a kernel run in the place of these modules' own code?"""
        return bool(self.kernel)


@dataclass(frozen=True)
class PatchReport:
    """`print(report)` shows the table; `.swapped` and `.stock` are its rows; `.fallbacks` counts calls that went the
    stock way later, with the reason; `.notes` are lines about the whole model; `.to_dict()` is JSON-ready."""

    model: str
    rows: tuple[Row, ...]
    fallbacks: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def swapped(self) -> tuple[Row, ...]:
        """The rows of what was swapped."""
        return tuple(r for r in self.rows if r.is_swapped)

    @property
    def stock(self) -> tuple[Row, ...]:
        """The rows of what stays stock."""
        return tuple(r for r in self.rows if not r.is_swapped)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def to_dict(self) -> dict:
        """Rows, fallbacks and notes as `json.dumps` takes them; a number that is not finite is None."""

        def finite(row: Row) -> dict:
            d = asdict(row)
            return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in d.items()}

        return {
            "model": self.model,
            "swapped": [finite(r) for r in self.swapped],
            "stock": [finite(r) for r in self.stock],
            "fallbacks": dict(self.fallbacks),
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        count = lambda rows: sum(r.count for r in rows)
        title = f"fastft: {self.model}: {count(self.swapped)} modules swapped, {count(self.stock)} stock"
        if devices := sorted({r.device for r in self.rows if r.device}):
            title += f"; proven on {', '.join(devices)}"
        number = lambda x: f"{x:.1e}" if math.isfinite(x) else ""
        columns, sizes = ["n#", "modules", "run by", "error#", "stock's#", "dtype"], options.max_width >= WIDE
        rows = [
            [str(r.count), f"{r.kind}: {r.group}", r.kernel or "stock", number(r.error), number(r.stock_error)]
            + [_short(r.dtype), *([r.sizes] if sizes else [])]
            for r in self.rows
        ]
        styles = ["" if r.is_swapped else "dim" for r in self.rows]
        yield table(title, [*columns, *(["proven at"] if sizes else [])], rows, styles, options.max_width)
        if self.swapped:
            yield Text(
                " ".join(t for word, t in WORDS.items() if any(word in r.kernel for r in self.rows)), style="dim"
            )
        for r in self.rows:
            if r.reason:
                what = f"({r.kernel})" if r.is_swapped else "stays stock"
                yield Text(f"{r.kind}: {r.group} x {r.count} {what}: {r.reason}")
        for reason, n in self.fallbacks.items():
            yield Text(f"went the stock way in {n} calls: {reason}")
        for note in self.notes:
            yield Text(note)

    def __str__(self) -> str:
        return as_text(self, max(80, Console().width))


def _short(dtype: str) -> str:
    """As people write it: bf16, fp32."""
    return {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}.get(dtype, dtype)
