"""What is verified, and a line of what is found."""

from __future__ import annotations

from dataclasses import dataclass

NAMES = ("ddp", "fsdp2", "zero2", "zero3", "tp")  # of strategies


@dataclass(frozen=True)
class RankJob:
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
