"""Rows and blocks in e4m3: the bits of the torch reference, which is itself held to torch's own cast."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft_kernels.quant.fp8 import (
    E4M3,
    SMALLEST_SCALE,
    quantize_blocks_ref,
    quantize_e4m3_blocks,
    quantize_e4m3_rows,
    quantize_rows_ref,
)
from fastft_kernels.quant.int8 import dequantize_e4m3
from fastft_kernels.runtime.dispatch import INTERPRETED

PROPERTY = settings(
    max_examples=12 if INTERPRETED else 40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)


def same(found, wanted) -> bool:
    """Bits of q and of the scales, dtypes and shapes."""
    (q, scale), (q_ref, scale_ref) = found, wanted
    assert q.dtype == E4M3 and scale.dtype == torch.float32 and q.is_contiguous() and scale.is_contiguous()
    return torch.equal(q.view(torch.uint8), q_ref.view(torch.uint8)) and torch.equal(scale, scale_ref)


def spread(m, n, dtype, device):
    """Numbers over all of e4m3's range and beyond it, both signs, zeros among them."""
    x = torch.randn(m, n, device=device) * torch.exp2(torch.randint(-14, 4, (m, n), device=device).float())
    return torch.where(torch.rand(m, n, device=device) < 0.05, 0.0, x).to(dtype)


@PROPERTY
@given(m=st.integers(0, 40), n=st.integers(0, 70), scaled=st.booleans(), layout=st.sampled_from(["", "t", "sliced"]))
def test_rows(m, n, scaled, layout, dtype, device):
    x = {
        "": lambda: spread(m, n, dtype, device),
        "t": lambda: spread(n, m, dtype, device).t(),
        "sliced": lambda: spread(m, 2 * n + 1, dtype, device)[:, 1::2],
    }[layout]()
    columns = torch.rand(n, device=device) * 3 if scaled else None
    assert same(quantize_e4m3_rows(x, columns), quantize_rows_ref(x, columns))


@pytest.mark.parametrize("n", [8192, 16385, 20000])
def test_wide_rows(n, dtype, device):
    x, columns = spread(3, n, dtype, device), torch.rand(n, device=device)
    assert same(quantize_e4m3_rows(x, columns), quantize_rows_ref(x, columns))
    assert same(quantize_e4m3_rows(x), quantize_rows_ref(x))


@PROPERTY
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 70)),
    block=st.sampled_from([(128, 128), (16, 32), (8, 16)]),
    transposed=st.booleans(),
)
def test_blocks(shape, block, transposed, dtype, device):
    x = spread(*shape, dtype, device)
    x = x.t() if transposed else x
    q, scale = quantize_e4m3_blocks(x, block)
    assert same((q, scale), quantize_blocks_ref(x, block))
    if x.numel():
        step = dequantize_e4m3(q, scale, torch.float32, block) - x.float()
        bound = dequantize_e4m3(torch.full_like(q.float(), 16.0).to(E4M3), scale, torch.float32, block)
        assert (step.abs() <= bound * 1.001).all()  # half of the step between 256 and 448, in units of the scale


def test_every_rounding(device):
    """Each e4m3 number, its neighbours' midpoint and the floats on either side: as torch itself casts."""
    positive = torch.arange(0x7F, dtype=torch.uint8, device=device).view(E4M3).float()
    middle = (positive[1:] + positive[:-1]) / 2
    v = torch.cat([positive, middle, torch.nextafter(middle, middle * 2), torch.nextafter(middle, middle * 0)])
    v = torch.cat([v, -v])[None]
    q, scale = quantize_e4m3_rows(v)
    assert scale.item() == 1.0
    assert torch.equal(q.view(torch.uint8), v.to(E4M3).view(torch.uint8))


def test_rows_are_accurate(dtype, device):
    """Half a step of 3 bits of mantissa, or of a subnormal."""
    x = spread(16, 500, dtype, device)
    q, scale = quantize_e4m3_rows(x)
    error = (q.float() * scale - x.float()).abs()
    assert (error <= torch.maximum(x.float().abs() / 16, scale * 2.0**-10) * 1.001).all()
    assert torch.equal(q.float().abs().amax(1), torch.full((16,), 448.0, device=device))


@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply:RuntimeWarning")  # the interpreter's
def test_zeros_infinities_and_nans(dtype, device):
    inf, nan = float("inf"), float("nan")
    made = [[0.0, -0.0, 0.0], [1.0, -inf, 2.0], [1.0, nan, -2.0], [nan, nan, nan], [1e-7, 0, 0]]
    x = torch.tensor(made, dtype=dtype, device=device)
    q, scale = quantize_e4m3_rows(x)
    assert same((q, scale), quantize_rows_ref(x))
    assert q[0].view(torch.uint8).tolist() == [0, 0x80, 0] and scale[0] == SMALLEST_SCALE
    assert q[1].view(torch.uint8).tolist() == [0, 0x7F, 0] and scale[1] == inf
    assert q[2].view(torch.uint8)[1] == 0x7F and scale[2] == 2.0 / 448
    assert (q[3].view(torch.uint8) == 0x7F).all()
    assert same(quantize_e4m3_blocks(x, (2, 2)), quantize_blocks_ref(x, (2, 2)))
    tiny = torch.full((2, 8), 1e-39, device=device)  # below the smallest scale: nothing overflows
    assert same(quantize_e4m3_rows(tiny), quantize_rows_ref(tiny))


@pytest.mark.skipif(INTERPRETED, reason="no kernel")
def test_fakes(device):
    x = torch.randn(8, 16, device=device)
    torch.library.opcheck(torch.ops.fastft.quantize_e4m3_rows.default, (x, x[0]), test_utils="test_faketensor")
    torch.library.opcheck(torch.ops.fastft.quantize_e4m3_blocks.default, (x, 4, 8), test_utils="test_faketensor")


def test_errors(device):
    x = torch.zeros(8, 16, device=device)
    for bad in (x[0], x.long(), x.to(E4M3)):
        with pytest.raises(ValueError, match="quantize_e4m3_rows: want floating"):
            quantize_e4m3_rows(bad)
        with pytest.raises(ValueError, match="quantize_e4m3_blocks: want floating"):
            quantize_e4m3_blocks(bad)
    for columns in (x[0, 1:], x[0].double()):
        with pytest.raises(ValueError, match=r"want float32 columns \[16\]"):
            quantize_e4m3_rows(x, columns)
    for block in ((3, 4), (256, 1), (1, 1)):
        with pytest.raises(ValueError, match="powers of two"):
            quantize_e4m3_blocks(x, block)
