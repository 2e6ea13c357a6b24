"""The transpose of 8-bit values, into the caller's buffer."""

import pytest
import torch

from fastft_kernels.quant.transpose import transpose_8bit

SHAPES = [(0, 5), (5, 0), (1, 1), (3, 200), (129, 65), (256, 128), (300, 17), (132, 260)]


def bits(m, n, device, dtype=torch.float8_e4m3fn):
    return torch.randint(0, 256, (m, n), dtype=torch.uint8, device=device).view(dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.uint8, torch.int8], ids=str)
def test_bits(shape, kind, device):
    q = bits(*shape, device, kind)
    out = transpose_8bit(q)
    assert out.dtype == kind and out.is_contiguous()
    assert torch.equal(out.view(torch.uint8), q.view(torch.uint8).t())


def test_strides(device):
    whole = bits(140, 300, device)
    for q in (whole.t(), whole[:, 3:171], whole[:, 4:172], whole[::2, ::3]):
        assert torch.equal(transpose_8bit(q).view(torch.uint8), q.view(torch.uint8).t())


def test_a_used_buffer_is_overwritten_and_nothing_beside_it(device):
    q = bits(130, 70, device)
    memory = torch.full((130 * 70 + 64,), 0x5A, dtype=torch.uint8, device=device)
    out = memory[32 : 32 + 130 * 70].view(70, 130).view(q.dtype)
    assert transpose_8bit(q, out) is out
    assert torch.equal(out.view(torch.uint8), q.view(torch.uint8).t())
    assert (memory[:32] == 0x5A).all() and (memory[-32:] == 0x5A).all()


def test_errors(device):
    q = bits(4, 6, device)
    for bad in (q[0], q.float()):
        with pytest.raises(ValueError, match="want an 8-bit matrix"):
            transpose_8bit(bad)
    for out in (bits(4, 6, device), bits(6, 4, device, torch.uint8), bits(4, 6, device).t()):
        with pytest.raises(ValueError, match="want a contiguous"):
            transpose_8bit(q, out)
