"""What a section of a benchmark writes: rows of figures, each flushed to a file as it comes, so that whatever ends the
process loses one row."""

from __future__ import annotations

import gc
import json
import math
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

Figures = dict[str, "float | str | bool | None"]
STATES = ("ok", "red", "missing", "out of memory", "error", "not run")


@dataclass
class Row:
    """One measurement. state "red": the numerics failed the judge, so no speed is among its figures; note: why it is
    not ok."""

    section: str
    name: str
    state: str = "ok"
    figures: Figures = field(default_factory=dict)
    note: str = ""


class Red(Exception):
    """The numerics gate failed; the text is the verdict."""


class Missing(Exception):
    """A package or a device that this measurement needs is not here; the text names it."""


class Sheet:
    """Rows of one section. path: JSON lines, appended to. until: time.time() after which nothing new begins. done:
    names to leave out."""

    def __init__(self, path: Path, section: str, until: float, done: tuple[str, ...] = ()):
        self.path, self.section, self.until, self.done = path, section, until, done

    @property
    def left(self) -> float:
        return self.until - time.time()

    def run(self, name: str, measure: Callable[[], Figures], least: float = 0.0) -> Row | None:
        """Measure and write one row; None if it was left out as done. least: seconds below which it is not begun."""
        if name in self.done:
            return None
        row = Row(self.section, name)
        if self.left < least:
            row.state, row.note = (
                "not run",
                f"{max(0.0, self.left):.0f} s were left of the section's time, {least:.0f} s wanted",
            )
            return self.write(row)
        self._append({"begun": name})
        try:
            row.figures = {
                k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in measure().items()
            }
        except Red as e:
            row.state, row.note = "red", str(e)
        except (Missing, ImportError) as e:
            row.state, row.note = "missing", str(e)
        except torch.OutOfMemoryError as e:
            row.state, row.note = "out of memory", str(e).split(". ")[0]
        except Exception as e:
            row.state, row.note = "error", f"{type(e).__name__}: {str(e)[:300]} | {traceback.format_exc()[-600:]}"
        self.write(row)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return row

    def write(self, row: Row) -> Row:
        self._append({"row": asdict(row)})
        return row

    def _append(self, line: dict) -> None:
        with self.path.open("a") as f:
            f.write(json.dumps(line) + "\n")
            f.flush()
            os.fsync(f.fileno())


def read(path: Path) -> tuple[list[Row], str | None]:
    """(the rows written so far, the name of one that was begun and never written)."""
    rows, begun = [], None
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found = json.loads(line)
        except json.JSONDecodeError:  # the last line of a process that was killed while it wrote
            break
        if "begun" in found:
            begun = found["begun"]
        else:
            rows.append(Row(**found["row"]))
            begun = None
    return rows, begun


def markdown(rows: list[Row]) -> list[str]:
    """A table for each section: its figures' names are the columns."""
    lines: list[str] = []
    for section in dict.fromkeys(r.section for r in rows):
        mine = [r for r in rows if r.section == section]
        columns = list(dict.fromkeys(k for r in mine for k in r.figures))
        lines += [
            "",
            f"## {section}",
            "",
            "| what | state | " + " | ".join([*columns, "note"]) + " |",
            "|---|---|" + "--:|" * len(columns) + "---|",
        ]
        for r in mine:
            cells = [shown(r.figures.get(c)) for c in columns]
            lines.append(
                "| " + " | ".join([r.name, r.state, *cells, r.note.replace("|", "/").replace("\n", " ")[:300]]) + " |"
            )
    return lines


def shown(value: float | str | bool | None) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.3g}"
