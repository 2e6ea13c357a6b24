"""Which implementation runs: by device, by dtype, and by whether the device has bfloat16."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastft_kernels import activation, gated_rms_norm, glu, layer_norm, linear_cross_entropy, linear_logprob, rms_norm
from fastft_kernels.quant.int8 import dequantize_e4m3, dequantize_int8
from fastft_kernels.rotary.rope import rope
from fastft_kernels.runtime import dispatch
from fastft_kernels.runtime.dispatch import HAS_TRITON, INTERPRETED, InterpretedFunction, has_bfloat16, use_triton

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="no triton here: nothing to choose")


@pytest.fixture
def card(monkeypatch):
    """card((7, 5)): torch sees one CUDA device of that compute capability."""

    def of(capability):
        monkeypatch.setattr(dispatch, "_BFLOAT16", {})
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return of


@needs_triton
@pytest.mark.parametrize(("capability", "has"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bfloat16_kernels_are_for_compute_capability_8_and_above(card, capability, has):
    card(capability)
    with FakeTensorMode():
        low, half, full = (torch.empty(2, dtype=d, device="cuda:0") for d in (torch.bfloat16, torch.half, torch.float))
    assert has_bfloat16("cuda", 0) is has
    assert use_triton(low) is has
    assert use_triton(half) and use_triton(full) and use_triton(full, torch.float16)
    assert use_triton(full, torch.bfloat16) is has  # a float32 input, a bfloat16 weight
    assert not use_triton(full, torch.float64) and not use_triton(full.double())


def test_a_device_that_is_not_here_is_planned_for_with_kernels(monkeypatch):
    monkeypatch.setattr(dispatch, "_BFLOAT16", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert has_bfloat16("cuda", 0) and not dispatch._BFLOAT16
    assert has_bfloat16("cpu", None)


@pytest.mark.skipif(not INTERPRETED, reason="no kernel can run on a CPU: TRITON_INTERPRET is not set")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_no_kernel_is_launched_for_bfloat16_where_there_is_none(monkeypatch, dtype):
    """No launch of a public function, forward or backward, is given a bfloat16 tensor; the same calls do launch in
    float16."""
    launches, run = [], InterpretedFunction.run

    def watched(self, *args, **settings):
        flat = [t for a in args for t in (a if isinstance(a, tuple) else (a,)) if isinstance(t, torch.Tensor)]
        launches.extend((self.fn.__name__, t.dtype) for t in flat if t.dtype == dtype)
        return run(self, *args, **settings)

    monkeypatch.setattr(InterpretedFunction, "run", watched)
    monkeypatch.setattr(dispatch, "has_bfloat16", lambda device_type, index: False)
    draw = lambda *shape, of=dtype: torch.randn(*shape).to(of).requires_grad_()
    x, w, full = draw(4, 64), draw(64), draw(4, 64, of=torch.float32)
    q, k, angle = draw(1, 2, 4, 16), draw(1, 2, 4, 16), torch.rand(1, 4, 8).repeat(1, 1, 2)
    target = torch.tensor([1, 2, 3, -100])
    calls = {
        "rms": lambda: rms_norm(x, w),
        "rms, float32 rows": lambda: rms_norm(full, w),
        "layer": lambda: layer_norm(x, w, w),
        "gated": lambda: gated_rms_norm(x, draw(4, 64), w, gate_first=True),
        "glu": lambda: glu(x, draw(4, 64)),
        "activation": lambda: activation(x, "gelu"),
        "rope": lambda: sum(rope(q, k, angle.cos().to(dtype), angle.sin().to(dtype))),
        "cross-entropy": lambda: linear_cross_entropy(x, draw(30, 64), target),
        "log-probability": lambda: linear_logprob(x, draw(30, 64), target).log_probs,
    }
    for name, call in calls.items():
        launches.clear()
        call().float().sum().backward()
        assert bool(launches) is (dtype == torch.float16), (name, launches)
    launches.clear()
    dequantize_int8(torch.ones(4, 8, dtype=torch.int8), torch.ones(4), dtype)
    dequantize_e4m3(torch.ones(4, 8).to(torch.float8_e4m3fn), torch.ones(1), dtype)
    assert bool(launches) is (dtype == torch.float16), launches
