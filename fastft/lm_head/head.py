"""The LM head: in training it returns lazy logits (`lazy_logits`) in place of the product with the vocabulary.

The head is whatever `get_output_embeddings()` answers with, when that is an nn.Linear. What happens to its output is
not asked beforehand: scalars, casts and slices are recorded as they come, a loss or a log-probability is computed
without the logits, everything else makes them as stock does, and is counted. Weight and bias are read at the call.
Outside of training (and for the single positions of generation) the head is stock's."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastft.compat.torch_private import FakeTensor
from fastft.lm_head.lazy_logits import defer
from fastft.lm_head.trl_head import bind as bind_trl_head
from fastft.patching.kind import Candidate, Context, device_of
from fastft.proving.proof_sizes import head_sizes
from fastft.proving.prove import Proof, prove
from fastft.swapping.stock_only import transformed
from fastft.swapping.swap import KEY, Replacement, install, order, stock_class
from fastft_kernels.lm_head import tiles as head_tiles
from fastft_kernels.lm_head.linear_cross_entropy import linear_cross_entropy
from fastft_kernels.lm_head.linear_logprob import linear_logprob
from fastft_kernels.lm_head.tiles import even_tile

KIND = "head"
PROOF_TOKENS = 8
_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass
class HeadState:
    """model: the innermost model whose head this is; None in a copy of the head alone. gathered(): the context in
    which its parameters are whole, wherever a loss reads them."""

    model: weakref.ref | None
    gathered: Callable[[], AbstractContextManager] = nullcontext

    def __deepcopy__(self, memo):
        model = self.model and self.model()
        copied = memo.get(id(model)) if model is not None else None
        return HeadState(weakref.ref(copied) if copied is not None else None)


@order(30)
class FastHead(Replacement):
    """Mixin of the output embedding. In front of whatever else a module carries: the one that runs is the one that the
    report names."""

    def train(self, mode: bool = True):
        """A trainer says this before every step: the moment to see a forward that TRL has bound on the model since."""
        state: HeadState = self.__dict__[KEY].state(KIND)
        model = state.model and state.model()
        if model is not None:
            bind_trl_head(model)
        return super().train(mode)

    def forward(self, *args, **kwargs):
        slot = self.__dict__[KEY]
        if not self.training or torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or transformed():
            return super().forward(*args, **kwargs)
        why = _unusual(self, args, kwargs)
        if why is None:
            x = args[0]
            if torch.is_grad_enabled() or (x.dim() > 1 and x.shape[-2] > 1):
                head: Any = self
                return defer(x, head.weight, head.bias, slot.fallbacks, slot.state(KIND).gathered)
        else:
            slot.fallbacks[f"head: {why}"] += 1
        return super().forward(*args, **kwargs)


def _unusual(head: Any, args: tuple, kwargs: dict) -> str | None:
    if len(args) != 1 or kwargs:
        return "called with more than its input"
    x, weight, bias = args[0], head._parameters.get("weight"), head._parameters.get("bias")
    given: list[tuple[Any, str]] = [(x, "input"), (weight, "weight"), (bias, "bias")]
    for t, what in given:
        if t is None:
            if what == "bias":
                continue
            return f"its {what} is missing"
        if type(t) not in (torch.Tensor, nn.Parameter) and not isinstance(t, FakeTensor):
            return f"its {what} is a {type(t).__name__}"
        if t.dtype not in _DTYPES or t.device.type == "meta":
            return f"its {what} is {t.dtype} on {t.device.type}"
        if hasattr(t, "ds_id"):
            return f"its {what} is sharded by ZeRO-3"
        if t.device != x.device:
            return f"its {what} is on another device than its input"
    if weight.dim() != 2 or x.dim() < 2 or x.shape[-1] != weight.shape[1]:
        return "its weight is sharded, or of another width than its input"
    if (
        not torch.is_autocast_enabled(x.device.type)
        and not x.dtype == weight.dtype == (weight if bias is None else bias).dtype
    ):
        return f"its input is {x.dtype}, its weight {weight.dtype}"
    if any(head.__dict__.get(h) for h in _HOOKS):
        return "it carries a backward hook"
    return None


class _Losses(nn.Module):
    """A small head under each of the operations that are recorded, and what is asked of the logits in training. tiled:
    a few tokens at a time by the functions that answer, as many tokens are."""

    head: Any

    def __init__(self, head: nn.Module):
        super().__init__()
        self.head, self.tiled = head, False

    def forward(self, hidden: torch.Tensor, target: torch.Tensor) -> list[torch.Tensor]:
        if hidden.dtype != self.head.weight.dtype:
            hidden = hidden.to(self.head.weight.dtype)
        flat = self.head(hidden).float()[:, :-1, :].contiguous()
        capped = torch.tanh(self.head(hidden) * 0.75 / 5.0) * 5.0 / 0.9
        mean = F.cross_entropy(flat.view(-1, flat.shape[-1]), target[:, 1:].reshape(-1))
        total = F.cross_entropy(
            capped.float().view(-1, flat.shape[-1]), target.reshape(-1), reduction="sum", label_smoothing=0.1
        )
        log_p = F.log_softmax(capped.float(), -1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        all_log_p = F.log_softmax(self.head(hidden).float(), -1)
        entropy = -(all_log_p.exp() * all_log_p).sum(-1)
        tiled, tiled_log_p = self._by_tokens(hidden, target)
        return [torch.stack([mean, total, tiled]), *(x * 1.0 for x in (log_p, entropy, tiled_log_p))]

    def _by_tokens(self, hidden: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """(mean loss, log-probabilities) over more than one tile of tokens."""
        weight, bias = self.head.weight, self.head.bias
        if self.tiled:
            vocab, limit = weight.shape[0], head_tiles.VOCAB_TILE
            # two tiles of them, the second partial
            columns = even_tile(vocab, limit, 128) if vocab > limit else -(-3 * vocab // 5)
            tile = (PROOF_TOKENS - 2, columns)
            loss = linear_cross_entropy(hidden, weight, target, bias, tile=tile)
            return loss, linear_logprob(hidden, weight, target.clamp(min=0), bias, tile=tile).log_probs
        logits = F.linear(hidden, weight, bias).float()
        loss = F.cross_entropy(logits.flatten(0, -2), target.reshape(-1))
        return loss, F.log_softmax(logits, -1).gather(-1, target.clamp(min=0).unsqueeze(-1)).squeeze(-1)


class Heads:
    """Recognises the output embedding."""

    name = KIND

    def recognise(self, module: Any, context: Context) -> Candidate | str | None:
        top, found = context.shared.get(KIND) or context.shared.setdefault(KIND, _find(context))
        if module is top and top not in found:
            return _why_not(module)
        if module not in found:
            return None
        if stock_class(module) is not nn.Linear:
            return _why_not(module)
        if why_not := context.sharding.is_let_go(module):
            return why_not
        model = weakref.ref(context.model)
        device, gathered = device_of(module), context.sharding.gathered(module)
        key = (
            head_sizes(module.in_features, module.out_features, device),
            module.bias is not None,
            module.weight.dtype,
        )
        return Candidate(
            "linear_cross_entropy, linear_logprob on lazy logits",
            key,
            lambda: _prove(module),
            lambda m: install(m, KIND, FastHead, HeadState(model, gathered)),
            device=device,
        )


def _find(context: Context) -> tuple[nn.Module | None, set[Any]]:
    """(the output embedding, the linear layers that may compute it: itself, or the copies inside PEFT's
    modules_to_save)."""
    get = getattr(context.model, "get_output_embeddings", None)
    top: Any = get() if get is not None else None
    if not isinstance(top, nn.Module):
        return None, set()
    saved = getattr(top, "modules_to_save", None)
    if isinstance(saved, nn.ModuleDict) and hasattr(top, "original_module"):
        return top, {top.original_module, *saved.values()}
    return top, {top} if stock_class(top) is nn.Linear else set()


def _why_not(module: Any) -> str:
    if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
        return "an adapter on the head"
    return f"the output embedding is a {stock_class(module).__name__}"


def _prove(module: Any) -> Proof:
    device = device_of(module)
    width, vocab = head_sizes(module.in_features, module.out_features, device)
    g = torch.Generator().manual_seed(5)
    small = nn.Linear(width, vocab, bias=module.bias is not None)
    small.weight.data = torch.randn(small.weight.shape, generator=g) * width**-0.5
    target = torch.randint(0, vocab, (2, PROOF_TOKENS), generator=g)
    target[0, 2] = target[1, 5] = -100
    target = target.to(device)
    inputs = lambda g, scale: [
        (torch.randn(2, PROOF_TOKENS, width, generator=g, dtype=torch.float64) * scale).to(device),
        target,
    ]

    def swap(m: Any) -> None:
        install(m.head, KIND, FastHead, HeadState(None))
        m.tiled = True

    return prove(_Losses(small).to(device), swap, inputs, dtype=module.weight.dtype, scales=(1.0, 10.0))
