"""Attention within the documents of a packed row.

    scores = scaling q k^T,  softcap tanh(scores / softcap),  j <= i and i - j < window within a document,
    out = softmax(scores, with the sink as one more column that is dropped) v

q [1, H, T, D], k [1, Hkv, T, D], v [1, Hkv, T, Dv] -> [1, T, H, Dv], as an attention on transformers' interface returns
it. `by_document` is the definition, and what runs where nothing faster does: torch's scaled-dot-product attention, one
call for all documents of one length, no mask of the row. Soft-caps and sinks are written out, in float32 from the
scores on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from fastft.packing.documents import Documents


class UnsupportedError(ValueError):
    """An attention was asked for something that is not documented here; such a model stays stock."""


@dataclass(frozen=True)
class AttentionSettings:
    """What an attention computes beside softmax(q k^T) v. window: tokens that a token sees, itself included. sinks:
    [H]."""

    scaling: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    dropout: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Nothing but a causal softmax, perhaps within a window."""
        return self.softcap is None and self.sinks is None


# what transformers and TRL send along to every attention, and no attention on the interface computes with
_HARMLESS = frozenset(
    {
        "position_ids",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "seq_idx",
        "cache_position",
        "num_items_in_batch",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "logits_to_keep",
        "cache",
        "past_key_values",
        "position_embeddings",
        "attention_dropout",
        "shift_labels",
    }
)


def settings_of(
    module,
    dropout=0.0,
    scaling=None,
    sliding_window=None,
    softcap=None,
    s_aux=None,
    is_causal=None,
    *,
    head_dim: int,
    **rest,
) -> AttentionSettings:
    """Read from the arguments of a call on the attention interface. Raises UnsupportedError for what is not known
    here."""
    unknown = sorted(k for k, v in rest.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise UnsupportedError(f"its attention is given {', '.join(unknown)}")
    if not (is_causal if is_causal is not None else getattr(module, "is_causal", True)):
        raise UnsupportedError("its attention is not causal")
    if sliding_window is not None and not isinstance(sliding_window, int):
        raise UnsupportedError(f"its sliding window is a {type(sliding_window).__name__}")
    return AttentionSettings(
        head_dim**-0.5 if scaling is None else scaling, sliding_window or None, softcap, s_aux, float(dropout or 0.0)
    )


def by_document(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, documents: Documents, form: AttentionSettings
) -> torch.Tensor:
    """Attention of each token within its document. q, k, v: [1, heads, tokens, head_dim]; returns [1, tokens, heads,
    head_dim]."""
    order = documents.order
    q, k, v = (t[0] if order is None else t[0].index_select(1, order[0]) for t in (q, k, v))
    parts, at = [], 0
    for length, count in documents.groups:
        n = length * count
        rows = [t[:, at : at + n].unflatten(1, (count, length)).transpose(0, 1) for t in (q, k, v)]
        out = _documents(*rows, form)  # [count, H, length, Dv]
        parts.append(out.transpose(1, 2).flatten(0, 1))
        at += n
    out = torch.cat(parts)
    return (out if order is None else out.index_select(0, order[1])).unsqueeze(0)


def _documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, form: AttentionSettings) -> torch.Tensor:
    """Documents of one length: [n, H, L, .]."""
    length, repeats = q.shape[2], q.shape[1] // k.shape[1]
    seen = _window(length, form.window, q.device)
    if not form.is_plain:
        return _written_out(q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1), seen, form)
    gqa = {}
    if repeats > 1:
        if seen is None and q.shape[-1] == v.shape[-1] <= 256:  # else torch would leave its fast kernels
            gqa = {"enable_gqa": True}
        else:
            k, v = (t.repeat_interleave(repeats, 1) for t in (k, v))
    causal = seen is None and length > 1
    return F.scaled_dot_product_attention(q, k, v, seen, form.dropout, is_causal=causal, scale=form.scaling, **gqa)


def _window(length: int, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[L, L], true where a token is seen; None where that is all before."""
    if window is None or length <= window:
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().triu(1 - window)


def _written_out(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, form: AttentionSettings
) -> torch.Tensor:
    length = q.shape[2]
    scores = (q @ k.transpose(2, 3)).float() if q.dtype.itemsize < 4 else q @ k.transpose(2, 3)
    scores = scores * form.scaling
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    if seen is None:
        seen = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~seen, float("-inf"))
    if form.sinks is not None:
        sinks = form.sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        weights = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return F.dropout(weights, form.dropout).to(v.dtype) @ v
