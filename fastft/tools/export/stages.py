"""One line a stage, and a bar while it lasts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Stages:
    """Prints to a rich console; to nothing without one."""

    def __init__(self, console: Any = None):
        self.console = console

    def say(self, line: str) -> None:
        """One line."""
        if self.console is not None:
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """with stages.stage("writing", total) as step: step(n) moves the bar; at the end the line with its time."""
        if self.console is None:
            yield lambda n: None
            return
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        begun = time.perf_counter()
        columns = TextColumn("{task.description:<40}"), BarColumn(), TimeElapsedColumn()
        shown = self.console.is_terminal
        with Progress(*columns, console=self.console, transient=True, disable=not shown) as progress:
            task = progress.add_task(what, total=total)
            yield lambda n: progress.advance(task, n)
        self.say(f"{what}: {time.perf_counter() - begun:.1f} s")
