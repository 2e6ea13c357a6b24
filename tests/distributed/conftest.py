"""Launches of two processes, each read by all tests of a file. The rest of the matrix takes minutes: it runs where it
is asked for."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "slow" in config.option.markexpr:
        return
    for item in items:
        if item.path.parent.name == "distributed" and item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.skip(reason="the rest of the matrix: run with -m slow"))


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """(launch, its jobs, who runs them) -> what it found, by job."""
    found: dict[str, dict[str, Any]] = {}

    def of(launch: str, jobs: list[str], module: str = "worker") -> dict[str, Any]:
        if launch not in found:
            out = tmp_path_factory.mktemp(launch) / "results.json"
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
            command += ["-m", f"tests.distributed.{module}", str(out), *jobs]
            settings = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
            run = subprocess.run(
                command, capture_output=True, text=True, cwd=ROOT, env=os.environ | settings, timeout=900
            )
            assert run.returncode == 0, run.stderr[-4000:]
            found[launch] = json.loads(out.read_text())
        return found[launch]

    return of
