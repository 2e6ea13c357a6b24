"""glu that also rounds to e4m3: the bits of glu and of the quantisation one after the other, and glu's gradients."""

import pytest
import torch

from fastft_kernels.mlp.glu import glu_settings, run
from fastft_kernels.mlp.rounded_glu import run_rounded
from fastft_kernels.quant.fp8 import quantize_rows_ref
from fastft_kernels.runtime.dispatch import INTERPRETED

LAYOUTS = {
    "rows": lambda draw: (draw(7, 24), draw(7, 24)),
    "one": lambda draw: (draw(5), draw(5)),
    "chunks": lambda draw: draw(2, 3, 66).chunk(2, dim=-1),
    "interleaved": lambda draw: (lambda both: (both[..., ::2], both[..., 1::2]))(draw(5, 70)),
    "wide": lambda draw: (draw(2, 17000), draw(2, 17000)),
    "empty": lambda draw: (draw(0, 8), draw(0, 8)),
    "no columns": lambda draw: (draw(3, 0), draw(3, 0)),
}
FORMS = [("silu", None, None, 0.0), ("swiglu_oai", None, 7.0, 1.0)]


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS, ids=["silu", "clamped"])
def test_bits(layout, form, dtype, device):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        x = 3 * torch.randn(*shape, generator=generator).to(device)
        if x.numel() > 40:
            x.view(-1)[3], x.view(-1)[-2] = float("nan"), float("inf")
        return x.to(dtype)

    gate, up = (t.detach().requires_grad_() for t in LAYOUTS[layout](draw))
    settings = glu_settings(*form)
    h, (mine, q, scale) = run(gate, up, settings), run_rounded(gate, up, settings)
    assert torch.equal(mine.nan_to_num(7), h.nan_to_num(7)) and mine.dtype == h.dtype and mine.is_contiguous()
    n = h.shape[-1]
    q_ref, scale_ref = quantize_rows_ref(h.detach().reshape(h.numel() // max(n, 1), n))
    assert torch.equal(q.view(torch.uint8), q_ref.view(torch.uint8)) and torch.equal(scale, scale_ref)
    assert not q.requires_grad and not scale.requires_grad
    for a, b in zip(*(torch.autograd.grad(y, (gate, up), torch.ones_like(y)) for y in (mine, h))):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def test_errors(device):
    a, b = torch.zeros(2, 4, device=device), torch.zeros(2, 3, device=device)
    with pytest.raises(ValueError, match="run_rounded: want gate and up of one shape"):
        run_rounded(a, b, glu_settings("silu", None, None, 0.0))


@pytest.mark.skipif(INTERPRETED, reason="no kernel")
def test_fakes(device):
    args = (torch.randn(3, 8, device=device), torch.randn(3, 8, device=device), "silu", 1.0, None, 0.0)
    torch.library.opcheck(torch.ops.fastft.glu_fwd_rounded.default, args, test_utils="test_faketensor")
    norm = (torch.randn(3, 8, device=device), None, 1e-5, 0.0, True, torch.float32)
    torch.library.opcheck(torch.ops.fastft.rms_norm_fwd_rounded.default, norm, test_utils="test_faketensor")
