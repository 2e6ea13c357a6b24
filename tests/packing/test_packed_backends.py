"""Which kernel attends within documents: chosen from the device, proven before it is used; FlexAttention's form is the
formula's."""

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from fastft.packing import backends
from fastft.packing.attention import AttentionSettings, by_document
from fastft.packing.backends import PLAIN, AttentionInputs, choose, flex_with, run
from fastft.packing.documents import Documents

SINKS = torch.tensor([0.3, -1.0, 2.0, 0.1])
PROVEN = lambda name: ""


def place(capability=(8, 0), dtype=torch.bfloat16, d=64, dv=64, device="cuda"):
    return AttentionInputs(device, capability, dtype, d, dv)


@pytest.mark.parametrize(
    ("where", "form", "name"),
    [
        (place(), AttentionSettings(1.0), "varlen_attn"),
        (place((9, 0), torch.float16), AttentionSettings(1.0, window=100), "varlen_attn"),
        (place(), AttentionSettings(1.0, softcap=30.0), "FlexAttention"),
        (place(), AttentionSettings(1.0, sinks=SINKS), "FlexAttention"),
        (place(dtype=torch.float32), AttentionSettings(1.0), "FlexAttention"),
        (place(d=128, dv=64), AttentionSettings(1.0), "FlexAttention"),
        (place(d=192, dv=128), AttentionSettings(1.0), PLAIN),
        (place(), AttentionSettings(1.0, dropout=0.1), PLAIN),
        (place((7, 5), torch.float16), AttentionSettings(1.0), PLAIN),
        (place((0, 0), device="cpu"), AttentionSettings(1.0), PLAIN),
    ],
)
def test_the_choice(monkeypatch, where, form, name):
    monkeypatch.setattr(backends, "_has_flash", lambda: False)
    monkeypatch.setattr(backends, "_has_varlen", lambda: True)
    chosen, why = choose(where, form, PROVEN)
    assert chosen == name and bool(why) == (chosen != "varlen_attn")


def test_flash_attn_serves_soft_caps_and_dropout_where_it_is_installed(monkeypatch):
    monkeypatch.setattr(backends, "_has_flash", lambda: True)
    assert (
        choose(place(), AttentionSettings(1.0, softcap=30.0), PROVEN)[0]
        == choose(place(), AttentionSettings(1.0, dropout=0.1), PROVEN)[0]
        == "flash-attn"
    )


def test_what_is_not_proven_is_not_used(monkeypatch):
    monkeypatch.setattr(backends, "_has_varlen", lambda: True)
    monkeypatch.setattr(backends, "_has_flash", lambda: False)
    name, why = choose(place(), AttentionSettings(1.0), lambda n: "is wrong here" if n == "varlen_attn" else "")
    assert name == "FlexAttention" and "varlen_attn is wrong here" in why


def tensors(lengths=(4, 7, 1, 4, 9), dtype=torch.float64, dims=(16, 16)):
    g = torch.Generator().manual_seed(1)
    n = sum(lengths)
    q, k, v = (torch.randn(1, h, n, d, generator=g, dtype=dtype) for h, d in ((4, dims[0]), (2, dims[0]), (2, dims[1])))
    return q, k, v, Documents(lengths, torch.device("cpu"))


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize(
    "form",
    [
        AttentionSettings(0.3),
        AttentionSettings(0.3, window=3),
        AttentionSettings(0.3, softcap=1.5),
        AttentionSettings(0.3, window=5, sinks=SINKS),
    ],
)
def test_flex_attention_s_form_is_the_formula(form):
    """Not compiled, which on a CPU computes no gradient: the mask, the cap, the sinks' share."""
    q, k, v, documents = tensors()
    ours, reference = flex_with(flex_attention, q, k, v, documents, form), by_document(q, k, v, documents, form)
    assert ours.shape == reference.shape
    assert (ours - reference).abs().max() < 1e-6 * reference.abs().max()  # the log-sum-exp is float32


@pytest.mark.parametrize("planted", ["", "window", "error"])
def test_a_kernel_is_judged_on_the_device(monkeypatch, planted):
    def kernel(q, k, v, documents, form):
        if planted == "error":
            raise NotImplementedError("no")
        return by_document(q, k, v, documents, form if planted == "" else AttentionSettings(form.scaling, 10))

    monkeypatch.setattr(backends, "_PROVEN", {})
    monkeypatch.setattr(backends, "KERNELS", {"kernel": kernel})
    monkeypatch.setattr(backends, "why_not", lambda *a: "")
    q, k, v, documents = tensors(dtype=torch.float32)
    out = run(q, k, v, documents, AttentionSettings(0.3))
    assert list(documents.used) == ["kernel" if planted == "" else PLAIN], documents.used
    assert torch.equal(out, by_document(q, k, v, documents, AttentionSettings(0.3)))
