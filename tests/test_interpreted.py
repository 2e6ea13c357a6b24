"""Every kernel test once more in the Triton interpreter: the Triton code itself, on a CPU, in float32 and float16."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "kernels"
FILES = [p for p in sorted(FOLDER.glob("test_*.py")) if "INTERPRET = False" not in p.read_text()]  # else compiled ahead
PARTS = 4  # processes that import torch, PEFT and transformers


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run on this machine")
@pytest.mark.parametrize("part", range(PARTS))
def test_interpreted(part):
    pytest.importorskip("triton")
    files = FILES[part::PARTS]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", *map(str, files)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
