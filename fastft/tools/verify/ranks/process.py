"""What a new process is started with: quick to import, for the process that starts it and waits."""

from __future__ import annotations

from typing import Any

from fastft.tools.verify.ranks.job import RankJob


def main(job: RankJob) -> dict[str, Any]:
    """One process: its lines and notes."""
    from fastft.tools.verify.ranks.worker import main as run

    return run(job)
