"""`fastft verify --nproc N`: the processes are started, and what they found is shown."""

from __future__ import annotations

import importlib.util
import math
import tempfile
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from fastft.errors import ProcessesError
from fastft.tables import as_text, table
from fastft.tools.verify.ranks.job import NAMES, Line, RankJob
from fastft.tools.verify.ranks.launch import launched
from fastft.tools.verify.ranks.process import main

STEPS = 3  # two, what they save, and one more that a resumed run repeats


@dataclass(frozen=True)
class RankVerification:
    """`bool()` is the verdict; printing shows the table; `.to_dict()` is JSON-ready."""

    model: str
    dtype: str
    strategy: str
    nproc: int
    lines: tuple[Line, ...]
    notes: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.lines) and all(line.ok for line in self.lines)

    @property
    def failed(self) -> tuple[Line, ...]:
        """The lines that did not pass."""
        return tuple(line for line in self.lines if not line.ok)

    def to_dict(self) -> dict[str, Any]:
        """The verification as `json.dumps` takes it."""
        clean = lambda d: {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in d.items()}
        return {
            "model": self.model,
            "dtype": self.dtype,
            "strategy": self.strategy,
            "nproc": self.nproc,
            "ok": bool(self),
            "lines": [clean(asdict(x)) for x in self.lines],
            "notes": list(self.notes),
        }

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        verdict = "PASS" if self else "FAIL"
        title = f"fastft verify: {self.model}, {self.dtype}, {self.strategy} on {self.nproc} processes: {verdict}"
        number = lambda v: f"{v:.1e}" if math.isfinite(v) else ""
        rows = [
            ["pass" if x.ok else "FAIL", x.name, number(x.error), number(x.stock_error), x.detail] for x in self.lines
        ]
        styles = ["" if x.ok else "bold red" for x in self.lines]
        yield table(title, ["", "compared", "error#", "stock's#", "what"], rows, styles, options.max_width)
        for x in self.failed:
            yield Text(f"failed: {x.name}: {x.detail}", style="bold red")
        for note in self.notes:
            yield Text(note)

    def __str__(self) -> str:
        return as_text(self, 150)


def verify_ranks(
    model: str,
    *,
    nproc: int,
    strategy: str = "ddp",
    dtype: str = "auto",
    four_bit: bool = False,
    lora: bool = True,
    rows: int = 2,
    seq: int = 64,
) -> RankVerification:
    """Train a patched checkpoint some steps in several processes, and compare with one process on the whole batch.

    Args:
        model: a model's or adapter's name or folder.
        nproc: processes, each with a device of its own where there are GPUs (NCCL), else on the CPU (gloo).
        strategy: one of NAMES.
        dtype, four_bit, lora: as `fastft verify` loads it.
        rows, seq: of each process's part of the batch.

    Returns:
        A line for each comparison.

    Raises:
        ProcessesError: no such strategy, or fewer GPUs than processes.
        FastftError: the model cannot be loaded, or a process ended with an exception.
    """
    _check(nproc, strategy)
    with tempfile.TemporaryDirectory(prefix="fastft-verify-") as folder:
        job = RankJob(model, strategy, dtype, four_bit, lora, rows, seq, STEPS, folder)
        found = launched(main, nproc, job)
    for rank in found:
        if "error" in rank:
            raise rank["error"]
    first = found[0]
    return RankVerification(
        first["model"], first["dtype"], strategy, nproc, tuple(first["lines"]), tuple(first["notes"])
    )


def _check(nproc: int, strategy: str) -> None:
    import torch

    if strategy not in NAMES:
        raise ProcessesError(f"verify: --strategy {strategy}: want one of {', '.join(NAMES)}")
    if strategy.startswith("zero") and importlib.util.find_spec("deepspeed") is None:
        how = "pip install wheel setuptools && pip install --no-build-isolation deepspeed"
        raise ProcessesError(f"verify: --strategy {strategy} needs DeepSpeed, which is not installed: {how}")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else nproc
    if gpus < nproc:
        raise ProcessesError(f"verify: --nproc {nproc} wants as many GPUs, this machine has {gpus}: --nproc {gpus}")
