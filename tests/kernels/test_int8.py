"""Scaled 8-bit weights: int8 against bitsandbytes, e4m3 against torch's own conversion; bit for bit."""

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft_kernels.quant.int8 import dequantize_e4m3, dequantize_int8
from fastft_kernels.runtime.dispatch import INTERPRETED

PROPERTY = settings(
    max_examples=15 if INTERPRETED else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def same(a, b) -> bool:
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@PROPERTY
@given(shape=st.tuples(st.integers(0, 40), st.integers(0, 70)))
def test_int8_bits_of_bitsandbytes(shape, dtype, device):
    CB = torch.randint(-128, 128, shape, dtype=torch.int8, device=device)
    SCB = torch.rand(shape[0], device=device) * 3
    assert same(dequantize_int8(CB, SCB, dtype), bnb.int8_vectorwise_dequant(CB, SCB).to(dtype))


def test_int8_round_trip(dtype, device):
    w = torch.randn(32, 2100, device=device, dtype=torch.float16)
    CB, SCB, _ = bnb.int8_vectorwise_quant(w)
    got = dequantize_int8(CB, SCB, dtype)
    assert same(got, bnb.int8_vectorwise_dequant(CB, SCB).to(dtype))
    half_step = SCB[:, None] / 127 / 2
    assert ((dequantize_int8(CB, SCB, torch.float32) - w).abs() <= half_step * 1.001).all()


def scales(kind, m, n, block, device):
    if kind == "tensor":
        return torch.rand((), device=device), None
    if kind == "rows":
        return torch.rand(m, device=device), None
    return torch.rand(-(-m // block[0]), -(-n // block[1]), device=device), block


@PROPERTY
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    kind=st.sampled_from(["tensor", "rows", "blocks"]),
    block=st.sampled_from([(1, 16), (4, 4), (128, 128), (7, 33)]),
)
def test_e4m3(shape, kind, block, dtype, device):
    (m, n), bits = shape, torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    q = bits.view(torch.float8_e4m3fn)
    scale, b = scales(kind, m, n, block, device)
    full = scale.reshape(-1, 1) if kind == "rows" else scale
    if b is not None:
        full = scale.repeat_interleave(b[0], 0)[:m].repeat_interleave(b[1], 1)[:, :n]
    assert same(dequantize_e4m3(q, scale, dtype, b), (q.float() * full).to(dtype))


def test_every_e4m3_value(dtype, device):
    q = torch.arange(256, dtype=torch.uint8, device=device).view(8, 32).view(torch.float8_e4m3fn)
    assert same(dequantize_e4m3(q, torch.ones(1, device=device), dtype), q.to(dtype))


def test_fakes(device):
    CB, SCB = torch.randint(-128, 128, (8, 16), dtype=torch.int8, device=device), torch.rand(8, 1, device=device)
    op = torch.ops.fastft.dequantize_8bit.default
    torch.library.opcheck(op, (CB, SCB, 1, 16, 0.5, torch.bfloat16), test_utils=("test_schema", "test_faketensor"))
    q = CB.view(torch.float8_e4m3fn)  # the schema test multiplies, which e4m3 cannot
    torch.library.opcheck(op, (q, SCB, 1, 16, 1.0, torch.float32), test_utils="test_faketensor")


def test_errors(device):
    CB, SCB = torch.zeros(8, 16, dtype=torch.int8, device=device), torch.rand(8, device=device)
    q = torch.zeros(8, 16, device=device).to(torch.float8_e4m3fn)
    for bad in ((CB.float(), SCB), (CB, SCB[1:]), (CB.t(), SCB)):
        with pytest.raises(ValueError, match="dequantize_int8: want"):
            dequantize_int8(*bad, torch.float32)
    with pytest.raises(ValueError, match="want dtype"):
        dequantize_int8(CB, SCB, torch.float64)
    for bad, block in (((CB, SCB), None), ((q, SCB[1:]), None), ((q, SCB), (4, 4)), ((q.t(), SCB), None)):
        with pytest.raises(ValueError, match="dequantize_e4m3: want"):
            dequantize_e4m3(*bad, torch.float32, block)
