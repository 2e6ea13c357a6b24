"""What is verified, and what each process is started with: nothing that takes long to import."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

NAMES = ("ddp", "fsdp2")  # of strategies


@dataclass(frozen=True)
class Job:
    """rows: of each process. folder: where all of them may write."""

    model: str
    strategy: str
    dtype: str
    four_bit: bool
    lora: bool
    rows: int
    seq: int
    steps: int
    folder: str


@dataclass(frozen=True)
class Line:
    """One comparison. error, stock_error: relative to the largest true value, where the judge decides; detail: what
    holds, or what differs."""

    name: str
    ok: bool
    detail: str = ""
    error: float = float("nan")
    stock_error: float = float("nan")


def main(job: Job) -> dict[str, Any]:
    """One process: its lines and notes."""
    from fastft.tools.verify.ranks.worker import main as run

    return run(job)
