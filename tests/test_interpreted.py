"""Every kernel test once more in the Triton interpreter: the Triton code itself, on a CPU, in float32 and float16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILES = sorted(p.name for p in (Path(__file__).parent / "kernels").glob("test_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run on this machine")
@pytest.mark.parametrize("name", FILES)
def test_interpreted(name):
    pytest.importorskip("triton")
    path = Path(__file__).parent / "kernels" / name
    if "INTERPRET = False" in path.read_text():
        pytest.skip("compiles ahead of time")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", str(path)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
