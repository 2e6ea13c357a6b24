"""Which kernel attends within documents.

`choose` goes from the fastest to the plainest: torch's variable-length flash attention; flash-attn, if installed, for
soft-caps and dropout; compiled FlexAttention for windows, soft-caps and sinks; one document length at a time. What
device, dtype and shape allow is known beforehand (`why_not`); what is allowed is proven on the device before it is
used, beside the plain way in the same dtype, with all gradients.
A sink s is one more column of the softmax: out sigma(lse - s), where out and lse are those without it.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastft.packing.attention import AttentionSettings, by_document
from fastft.packing.documents import Documents
from fastft.proving.prove import undisturbed
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft_kernels.numerics import compare

Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Documents, AttentionSettings], torch.Tensor]
_HALF = (torch.bfloat16, torch.float16)
_PROVEN: dict[Hashable, tuple[str, str]] = {}
_TRIAL = (3, 70, 1, 33)  # documents of the proof


@dataclass(frozen=True)
class AttentionInputs:
    """What a choice depends on. capability: (0, 0) where there is no CUDA."""

    device: str
    capability: tuple[int, int]
    dtype: torch.dtype
    head_dim: int
    value_dim: int


def varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, form: AttentionSettings
) -> torch.Tensor:
    """torch's variable-length attention."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    longest, ends = max(documents.lengths), documents.offsets
    settings: dict = {"window_size": (-1 if form.window is None else form.window - 1, 0), "scale": form.scaling}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        settings["enable_gqa"] = q.shape[1] != k.shape[1]
    out: Any = varlen_attn(q, k, v, ends, ends, longest, longest, **settings)
    return out.unsqueeze(0)


def flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, form: AttentionSettings
) -> torch.Tensor:
    """The flash-attention package's variable-length attention."""
    q, k, v = (t[0].transpose(0, 1) for t in (q, k, v))
    longest, ends = max(documents.lengths), documents.offsets
    window = (-1 if form.window is None else form.window - 1, 0)
    more = {} if form.softcap is None else {"softcap": form.softcap}
    out = importlib.import_module("flash_attn").flash_attn_varlen_func(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        dropout_p=form.dropout,
        softmax_scale=form.scaling,
        causal=True,
        window_size=window,
        **more,
    )
    return out.unsqueeze(0)


def flex(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, form: AttentionSettings
) -> torch.Tensor:
    """torch's FlexAttention, compiled, under a document mask."""
    return flex_with(_compiled(), q, k, v, documents, form)


def flex_with(
    attention: Callable,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    documents: Documents,
    form: AttentionSettings,
) -> torch.Tensor:
    """attention: `flex_attention`, compiled or not."""
    mask = documents.kept.get(("flex", form.window))
    if mask is None:
        mask = documents.kept["flex", form.window] = _block_mask(documents, form.window)
    score = None if form.softcap is None else _capped(form.softcap)
    settings = {"score_mod": score, "block_mask": mask, "scale": form.scaling, "enable_gqa": q.shape[1] != k.shape[1]}
    if form.sinks is None:
        return attention(q, k, v, **settings).transpose(1, 2).contiguous()
    out, lse = attention(q, k, v, return_lse=True, **settings)
    share = torch.sigmoid(lse - form.sinks.to(lse.dtype).view(1, -1, 1))
    return (out * share.unsqueeze(-1).to(out.dtype)).transpose(1, 2).contiguous()


def _capped(softcap: float) -> Callable:
    return lambda score, b, h, i, j: softcap * torch.tanh(score / softcap)


def _block_mask(documents: Documents, window: int | None):
    from torch.nn.attention.flex_attention import create_block_mask

    document = documents.document

    def seen(b, h, i, j):
        near = (document[i] == document[j]) & (i >= j)
        return near if window is None else near & (i - j < window)

    n, device = documents.tokens, documents.device
    return create_block_mask(seen, None, None, n, n, device=str(device), _compile=device.type == "cuda")


@functools.cache
def _compiled() -> Callable:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True)


KERNELS: dict[str, Kernel] = {"varlen_attn": varlen, "flash-attn": flash, "FlexAttention": flex}
PLAIN = "by document"


@functools.cache
def _has_varlen() -> bool:
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return False
    from torch.nn.attention.varlen import varlen_attn

    return "window_size" in inspect.signature(varlen_attn).parameters


@functools.cache
def _has_flash() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def why_not(name: str, place: AttentionInputs, form: AttentionSettings) -> str:
    """Empty where the kernel may be tried."""
    if place.device != "cuda" or place.capability < (8, 0):
        return "needs a CUDA device of compute capability 8.0 or higher"
    if name == "FlexAttention":
        if form.dropout:
            return "drops nothing"
        sizes = (place.head_dim, place.value_dim)
        return (
            ""
            if all(16 <= d <= 256 and d & (d - 1) == 0 for d in sizes)
            else "wants head dims that are powers of two from 16 to 256"
        )
    if place.dtype not in _HALF:
        return "knows 16-bit dtypes alone"
    if place.head_dim != place.value_dim or place.head_dim > 256 or place.head_dim % 8:
        return "wants one head dim for q, k and v, a multiple of 8 up to 256"
    if form.sinks is not None:
        return "knows no sinks"
    if name == "flash-attn":
        return "" if _has_flash() else "is not installed"
    if form.softcap is not None or form.dropout:
        return "knows neither soft-cap nor dropout"
    return "" if _has_varlen() else "this torch has none with windows"


def place_of(q: torch.Tensor, v: torch.Tensor) -> AttentionInputs:
    """What the choice of a backend depends on, of these queries and values."""
    capability = torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (0, 0)
    return AttentionInputs(q.device.type, capability, q.dtype, q.shape[-1], v.shape[-1])


def choose(place: AttentionInputs, form: AttentionSettings, prove: Callable[[str], str]) -> tuple[str, str]:
    """(the kernel's name, why no faster one). prove(name): empty when the kernel is right here."""
    reasons = []
    for name in KERNELS:
        why = why_not(name, place, form) or prove(name)
        if not why:
            return name, "; ".join(reasons)
        reasons.append(f"{name} {why}")
    return PLAIN, reasons[0] if len({r.split(" ", 1)[1] for r in reasons}) == 1 else "; ".join(reasons)


def run(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, form: AttentionSettings
) -> torch.Tensor:
    """q [1, H, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] -> [1, T, H, Dv], contiguous, by the best kernel that is
    proven here."""
    place = place_of(q, v)
    key = (
        place,
        q.device,
        q.shape[1],
        k.shape[1],
        form.scaling,
        form.window is None,
        form.softcap,
        form.sinks is None,
        form.dropout > 0,
    )
    if key not in _PROVEN:
        _PROVEN[key] = choose(place, form, functools.partial(_disproof, q=q, k=k, v=v, form=form))
    name, why = _PROVEN[key]
    documents.used[name] = why
    return KERNELS.get(name, by_document)(q, k, v, documents, form)


def _disproof(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: AttentionSettings) -> str:
    """Why the kernel is not used, from a trial on random tensors of this kind; empty when it is right."""
    with undisturbed():
        documents = Documents(_TRIAL, q.device)
        form = replace(form, window=None if form.window is None else 9, dropout=0.0)
        g = torch.Generator().manual_seed(3)
        draw = lambda t: torch.randn(1, t.shape[1], documents.tokens, t.shape[3], generator=g).to(q.device, q.dtype)
        tensors = [draw(q), draw(k), draw(v)]
        up = torch.randn(1, documents.tokens, q.shape[1], v.shape[3], generator=g).to(q.device, q.dtype)

        def results(kernel: Kernel, dtype: torch.dtype) -> list[torch.Tensor]:
            leaves = [t.detach().to(dtype).requires_grad_() for t in tensors]
            sinks = None if form.sinks is None else form.sinks.detach().to(dtype).requires_grad_()
            out = kernel(leaves[0], leaves[1], leaves[2], documents, replace(form, sinks=sinks))
            return [out.detach(), *torch.autograd.grad(out, leaves + ([] if sinks is None else [sinks]), up.to(dtype))]

        try:
            ours = results(KERNELS[name], q.dtype)
        except Exception as e:
            not_for_want_of_memory(e)
            return f"raised {type(e).__name__}: {str(e).splitlines()[0][:160] if str(e) else ''}"
        verdict = compare(ours, results(by_document, torch.float64), results(by_document, q.dtype))
        return "" if verdict else f"is less precise here: {verdict}"
