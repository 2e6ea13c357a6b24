"""Masks from torch's own stream, drawn again without disturbing it."""

import pytest
import torch
import torch.nn.functional as F

from fastft_kernels.lora.dropout import capture, draw_mask, factor

SHAPES = [(7, 13), (64, 1024), (1, 1), (3, 5, 100), (17,)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_masks_of_torch(shape, p, dtype, device):
    x = torch.ones(shape, device=device, dtype=dtype)
    torch.manual_seed(3)
    want, after = F.dropout(x, p) != 0, torch.rand(2, device=device)
    torch.manual_seed(3)
    got = draw_mask(torch.empty(shape, device=device), dtype, p)
    assert got.dtype == torch.bool
    assert torch.equal(got, want)
    assert torch.equal(torch.rand(2, device=device), after)


def test_transposed(dtype, device):
    x = torch.ones(9, 5, device=device, dtype=dtype).t()
    torch.manual_seed(3)
    want = F.dropout(x, 0.5) != 0
    torch.manual_seed(3)
    assert torch.equal(draw_mask(x, dtype, 0.5), want)


def test_drawn_again_anywhere_and_twice(dtype, device):
    like = torch.empty(33, 65, device=device)
    torch.rand(5, device=device)
    state = capture(device)
    mask = draw_mask(like, dtype, 0.3)
    torch.rand(7, device=device)
    torch.manual_seed(99)
    for _ in range(2):
        assert torch.equal(draw_mask(like, dtype, 0.3, state), mask)
    here = torch.rand(3, device=device)
    torch.manual_seed(99)
    assert torch.equal(torch.rand(3, device=device), here)


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_edges(p, dtype, device):
    x = torch.ones(4, 6, device=device, dtype=dtype)
    if p:
        torch.manual_seed(1)
        want, after = F.dropout(x, p), torch.rand(1, device=device)
        torch.manual_seed(1)
        torch.testing.assert_close(x * draw_mask(x, dtype, p) * factor(p), want)
        assert torch.equal(torch.rand(1, device=device), after)
    assert factor(p) == {0.0: 1.0, 0.25: 4 / 3, 1.0: 0.0}[p]
    torch.manual_seed(1)
    assert draw_mask(x[:0], dtype, 0.5).shape == (0, 6)
    first = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), first)


def test_no_state_while_compiling(device):
    def f(x):
        return x + (1 if capture(x.device) is None else 0)

    x = torch.randn(3, device=device)
    assert torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(x), x + 1)
