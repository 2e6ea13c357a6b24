"""Proof that what a whole model returns does not depend on the padding, where the module that calls the layers runs
without it.

The innermost model is run in float64 on a few tokens, its linear layers of rank 8 as in `layer_proof.small_copy`:
stock's padded batch against the same batch unpadded inside. "labels": the loss and all gradients (logits by token,
which are read again where somebody looks, are not compared). "pooled": everything that it returns, which shows that a
classifier takes its one position from the real ones."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from fastft.packing.batch import Unpadded
from fastft.packing.entrance import named
from fastft.packing.interface import KIND, attentions, teach
from fastft.packing.layer_proof import ROWS, padded_batch, small_copy
from fastft.proving.proof_cache import proof_of
from fastft.proving.prove import Proof, agree, cast_parameters, outputs_and_gradients, undisturbed
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft.swapping.swap import stock_class


class _Whole(nn.Module):
    def __init__(self, base: nn.Module, path: str, given: dict, padding: Unpadded, by_token: bool):
        super().__init__()
        self.base, self.path, self.given, self.padding, self.by_token, self.is_ours = (
            base,
            path,
            given,
            padding,
            by_token,
            False,
        )

    def forward(self) -> list[torch.Tensor]:
        owner, handles = self.base.get_submodule(self.path), []
        if self.is_ours:
            handles = [
                owner.register_forward_pre_hook(self._before, with_kwargs=True),
                owner.register_forward_hook(self._after),
            ]
        try:
            out = self.base(**self.given)
        finally:
            for handle in handles:
                handle.remove()
        tensors = [t for t in out.values() if isinstance(t, torch.Tensor)]
        shape = (self.padding.rows, self.padding.length)
        return [t for t in tensors if not (self.by_token and tuple(t.shape[:2]) == shape)]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict):
        given = named(module, args, kwargs)
        assert given is not None
        return (), self.padding.arguments(given)

    def _after(self, module: nn.Module, args: tuple, output):
        output["last_hidden_state"] = self.padding.pad(output["last_hidden_state"])


def model_proof(base: Any, owner: nn.Module, kind: str) -> Proof:
    """kind: "labels" or "pooled". One proof for each configuration, in the process."""
    path = next((n for n, m in base.named_modules() if m is owner), "")
    classes = tuple(stock_class(m) for m in base.modules() if not hasattr(m, "base_layer"))
    first = next(base.parameters())
    key = kind, path, classes, base.config.to_json_string(use_diff=False), first.dtype
    return proof_of(KIND, key, first.device, lambda: _prove(base, path, kind))


def _prove(base: nn.Module, path: str, kind: str) -> Proof:
    with undisturbed():
        new = small_copy(base, vocabulary=ROWS)
        if isinstance(new, str):
            return Proof(False, reason=new)
        device = next(new.parameters()).device
        (given,), padding, _ = padded_batch(0, device)
        ids, mask = given["input_ids"], given["attention_mask"] != 0
        ids[mask & (ids == 0)] = 1
        ids[0, 3] = 0  # the padding's id inside a row
        if kind == "labels":
            labels = ids.masked_fill(~mask, -100)
            labels[:, 1:].masked_fill_(~mask[:, :-1], -100)  # nothing is predicted from the padding
            given["labels"] = labels
        run = _Whole(new, path, given, padding, kind == "labels")
        try:
            with torch.no_grad():
                found = run()
        except Exception as e:
            return Proof(False, reason=f"stock raised {type(e).__name__} in the proof of the whole model: {e}")
        if not any(t.is_floating_point() for t in found):
            return Proof(False, reason="nothing is left to prove: it returns no loss and nothing pooled")
        for p in new.parameters():
            p.requires_grad_(p.is_floating_point())
        exact = cast_parameters(run, torch.float64)
        ours: Any = cast_parameters(run, torch.float64)
        reference = outputs_and_gradients(exact, [], exact.named_parameters(), 91, True)
        try:
            ours.is_ours = True
            for module in attentions(ours.base.get_submodule(path)):
                if why := teach(module):
                    return Proof(False, reason=why)
            found = outputs_and_gradients(ours, [], ours.named_parameters(), 91, True)
        except Exception as e:
            not_for_want_of_memory(e)
            return Proof(False, dtype="float64", reason=f"{type(e).__name__}: {e}")
        reason = agree(found, reference)
        error = (
            math.nan
            if reason
            else max(float((found[n] - t).abs().max() / t.abs().max().clamp_min(1e-300)) for n, t in reference.items())
        )
        return Proof(
            not reason, error, 0.0, "float64", f"what it returns depends on its padding: {reason}" if reason else ""
        )
