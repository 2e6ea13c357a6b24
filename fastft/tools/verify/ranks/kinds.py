"""The strategies by name."""

from __future__ import annotations

from fastft.tools.verify.ranks.strategies import DDP, FSDP2, Strategy
from fastft.tools.verify.ranks.zero import Zero2, Zero3

STRATEGIES: dict[str, type[Strategy]] = {"ddp": DDP, "fsdp2": FSDP2, "zero2": Zero2, "zero3": Zero3}  # job.py: NAMES
