"""dequantize_4bit against the 4-bit format, bit for bit: one of 16 numbers times its block's absmax, in float32."""

import pytest
import torch
from bitsandbytes import functional as bnb
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastft_kernels.quant.nf4 import dequantize_4bit
from fastft_kernels.quant.weights import NF4
from fastft_kernels.runtime.dispatch import INTERPRETED

BLOCKSIZES = (64, 128, 256, 512, 1024, 2048, 4096)


def reference(packed, state, dtype):
    """By hand: on some CPUs bitsandbytes is wrong where a row is no multiple of the block."""
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    pairs = packed.contiguous().view(torch.uint8).reshape(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).reshape(-1)[: state.shape.numel()]
    scales = absmax.float().repeat_interleave(state.blocksize)[: codes.numel()]
    return (bnb.get_4bit_type(state.quant_type, device=packed.device)[codes.int()] * scales).to(dtype).view(state.shape)


def same(shape, blocksize, quant_type, nested, dtype, device, storage=torch.uint8):
    w = torch.randn(shape, device=device) * torch.rand(shape[0], *[1] * (len(shape) - 1), device=device).exp()
    packed, state = bnb.quantize_4bit(
        w, blocksize=blocksize, compress_statistics=nested, quant_type=quant_type, quant_storage=storage
    )
    ours = NF4.from_quant_state(packed, state).dense(dtype)
    want = reference(packed, state, dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours, want), (shape, blocksize, quant_type, nested, (ours != want).sum())


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_bit_exact(blocksize, quant_type, nested, dtype, device):
    for shape in ((64, 130), (33, 31), (5, 64)):
        same(shape, blocksize, quant_type, nested, dtype, device)


@settings(
    max_examples=15 if INTERPRETED else 60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.differing_executors],
)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    blocksize=st.sampled_from((32, *BLOCKSIZES)),
    quant_type=st.sampled_from(["nf4", "fp4"]),
    nested=st.booleans(),
)
def test_property(shape, blocksize, quant_type, nested, dtype, device):
    same(shape, blocksize, quant_type, nested, dtype, device)


def test_many_nested_blocks(dtype, device):
    """More blocks than one nested block holds, so that absmax2 has several entries."""
    same((96, 512) if not INTERPRETED else (40, 512), 32, "nf4", True, dtype, device)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
def test_other_storage(storage, dtype, device):
    same((16, 64), 64, "nf4", True, dtype, device, storage)


def test_more_dimensions_and_none(dtype, device):
    same((3, 5, 64), 64, "nf4", False, dtype, device)
    code = torch.zeros(16, device=device)
    empty = dequantize_4bit(torch.empty(0, 1, dtype=torch.uint8, device=device), code[:0], code, 64, (0, 8), dtype)
    assert empty.shape == (0, 8)


def test_half_absmax(device):
    w = torch.randn(8, 64, device=device)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    half = state.absmax.half()
    got = dequantize_4bit(packed, half, state.code, 64, (8, 64), torch.float32)
    want = dequantize_4bit(packed, half.float(), state.code, 64, (8, 64), torch.float32)
    assert torch.equal(got, want)


def test_compiles_and_fakes(device):
    packed, state = bnb.quantize_4bit(
        torch.randn(8, 64, device=device), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    weight = NF4.from_quant_state(packed, state)
    x = torch.randn(3, 64, device=device)
    got = torch.compile(lambda x: x @ weight.dense(torch.float32).t(), fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, x @ weight.dense(torch.float32).t())
    nested = (state.state2.absmax, state.state2.code, state.state2.blocksize, state.offset)
    args = (packed, state.absmax, state.code, 64, [8, 64], torch.bfloat16, nested[0], nested[1], nested[2], nested[3])
    torch.library.opcheck(torch.ops.fastft.dequantize_4bit.default, args, test_utils=("test_schema", "test_faketensor"))


def test_errors(device):
    packed, state = bnb.quantize_4bit(torch.randn(8, 64, device=device), blocksize=64, quant_type="nf4")
    good = (packed, state.absmax, state.code, 64, (8, 64), torch.float32)

    def with_(i, value, **kwargs):
        return dequantize_4bit(*good[:i], value, *good[i + 1 :], **kwargs)

    for i, bad in (
        (0, packed[1:]),
        (1, state.absmax[1:]),
        (2, state.code[1:]),
        (3, 96),
        (3, 16),
        (4, (8, 65)),
        (5, torch.float64),
    ):
        with pytest.raises(ValueError, match="dequantize_4bit: want"):
            with_(i, bad)
    with pytest.raises(ValueError, match="quant_type"):
        dequantize_4bit(*good, quant_type="int4")


@pytest.mark.slow
@pytest.mark.gpu
def test_beyond_int32(device):
    if device.type != "cuda":
        pytest.skip("needs a GPU")
    rows, columns = 2**16 + 1, 2**15
    packed = torch.randint(0, 256, (rows * columns // 2, 1), dtype=torch.uint8, device=device)
    absmax, code = torch.rand(rows * columns // 64, device=device), torch.linspace(-1, 1, 16, device=device)
    w = dequantize_4bit(packed, absmax, code, 64, (rows, columns), torch.bfloat16)
    last = dequantize_4bit(packed[-columns // 2 :], absmax[-columns // 64 :], code, 64, (1, columns), torch.bfloat16)
    assert torch.equal(w[-1:], last)
