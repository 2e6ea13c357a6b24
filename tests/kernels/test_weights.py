"""The forms of a frozen weight: the matrix, no copies, and the split into tensors and layout."""

import pytest
import torch
from bitsandbytes import functional as bnb

from fastft_kernels.quant.weights import NF4, Dense, Float8, FrozenWeight, Int8, as_weight, expand


def forms(device) -> dict[str, tuple[FrozenWeight, torch.Tensor]]:
    """name: (weight, its matrix in float32)."""
    w = torch.randn(24, 64, device=device)
    found = {"dense": (Dense(w), w)}
    for nested in (False, True):
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
        found[f"nf4-{nested}"] = (NF4.from_quant_state(packed, state), bnb.dequantize_4bit(packed, state))
    CB, SCB, _ = bnb.int8_vectorwise_quant(w.half())
    found["int8"] = (Int8(CB, SCB), bnb.int8_vectorwise_dequant(CB, SCB))
    q, scale = w.to(torch.float8_e4m3fn), torch.rand(3, 4, device=device)
    full = scale.repeat_interleave(8, 0).repeat_interleave(16, 1)
    found["float8"] = (Float8(q, scale, (8, 16)), q.float() * full)
    return found


@pytest.mark.parametrize("name", ["dense", "nf4-False", "nf4-True", "int8", "float8"])
def test_form(name, dtype, device):
    weight, matrix = forms(device)[name]
    assert weight.shape == (24, 64)
    assert torch.equal(weight.dense(dtype), matrix.to(dtype))
    assert torch.equal(weight.dense(torch.float64), matrix.double())
    hash(weight.layout())
    assert not any(isinstance(x, torch.Tensor) for x in (*weight.layout(), *weight.layout().options))
    copies = [t.clone() for t in weight.tensors()]
    assert torch.equal(expand(weight.layout(), copies, dtype), matrix.to(dtype))


def test_dense_is_not_copied(dtype, device):
    w = torch.randn(3, 4, device=device, dtype=dtype)
    assert Dense(w).dense(dtype) is w
    assert as_weight(w).tensors()[0] is w
    form = Dense(w)
    assert as_weight(form) is form


def test_nothing_quantised_is_copied(device):
    w = torch.randn(24, 64, device=device)
    packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    held = {t.data_ptr() for t in NF4.from_quant_state(packed, state).tensors()}
    want = (packed, state.absmax, state.code, state.state2.absmax, state.state2.code, state.offset)
    assert held == {t.data_ptr() for t in want}


def test_repacked_for_a_cpu_is_refused(device):
    packed, state = bnb.quantize_4bit(torch.randn(24, 64, device=device), blocksize=64, quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="repacked"):
        NF4.from_quant_state(packed, state)
