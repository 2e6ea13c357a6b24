"""Kernel tests run three times over their life: on a GPU the Triton kernels in every dtype; on a CPU the torch
references in every dtype; and, by tests/test_interpreted.py, under TRITON_INTERPRET=1 the Triton kernels in the dtypes
where the interpreter is exact."""

import pytest
import torch

from fastft_kernels.runtime.dispatch import INTERPRETED
from tests.kernels.interpreter import quicken

if INTERPRETED:
    quicken()
DTYPES = [torch.float32, torch.float16] if INTERPRETED else [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param
