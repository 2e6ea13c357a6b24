"""The loop over jobs of a worker: every process runs each, the first writes down what they found."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist


def run_jobs(out: str, jobs: Sequence[str], job_of: Callable[..., dict[str, Any]]) -> None:
    """job_of is given the words of a job; what one process raises, all raise. out: JSON by job, with the seconds that
    it took; {"raised": the traceback} of one that failed. Inside a process group, which it leaves as it is."""
    results: dict[str, Any] = {}
    for job in jobs:
        begin = time.monotonic()
        try:
            found = job_of(*job.split(" "))
        except Exception:  # the test shows it
            found = {"raised": traceback.format_exc()[-3000:]}
        results[job] = found | {"seconds": round(time.monotonic() - begin, 1)}
        dist.barrier()
    if dist.get_rank() == 0:
        Path(out).write_text(json.dumps(results))
    dist.barrier()
