"""What lazy logits stand for, and what is computed from it without them.

    z = b tanh(a x)  or  z = a x,      x = hidden W^T + bias

`Product` holds hidden (*rows, H) after the slices of positions that were applied to the logits, the head's own
parameters (not copies), and the scalars a and b. Its methods answer by token: cross-entropy, log p(target),
log-sum-exp, entropy, mean, argmax; all but the last through `fastft_kernels`. Products run in the dtype in which
stock's would: autocast's where it was on, else hidden's; logits are never rounded."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F

from fastft.swapping.release_memory import with_room
from fastft_kernels.lm_head.linear_cross_entropy import linear_cross_entropy
from fastft_kernels.lm_head.linear_logprob import linear_logprob
from fastft_kernels.lm_head.linear_logsumexp import linear_logsumexp
from fastft_kernels.lm_head.tiles import TOKEN_TILE, VOCAB_TILE, even_tile, no_autocast, operand, project, spans

NO_INDEX_IGNORED = -(1 << 62)


def autocast_state(device: torch.device) -> tuple[str, bool, torch.dtype]:
    """(device type, is autocast on, its dtype) where a tensor on `device` would be computed now."""
    return device.type, torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def autocast_as(state: tuple[str, bool, torch.dtype]):
    """The autocast state that was noted, where it is another one now."""
    now = torch.is_autocast_enabled(state[0]), torch.get_autocast_dtype(state[0])
    return contextlib.nullcontext() if now == state[1:] else torch.autocast(state[0], dtype=state[2], enabled=state[1])


@dataclass(eq=False, repr=False)
class Family:
    """What all logits of one call of the head share. waiting: weak references to the nodes of its lazy tensors.
    autocast: as it was at the call: it is the head's, whatever is on where a value is made. gathered(): the context in
    which a sharded weight is whole. before_backward: FSDP2's hooks on the logits, which gather it for a backward."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    fallbacks: Counter
    versions: tuple[int, ...] = ()
    waiting: list = field(default_factory=list)
    counted: bool = False
    autocast: tuple[str, bool, torch.dtype] = ("cpu", False, torch.bfloat16)
    gathered: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    before_backward: list = field(default_factory=list)

    def __post_init__(self):
        self.versions, self.autocast = self._now(), autocast_state(self.hidden.device)

    @property
    def trained(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.weight, self.bias))

    def gathers_before_backward(self, hook: Callable) -> None:
        """A result that is computed without the logits has its backward where theirs would be: this comes before it."""
        if hook not in self.before_backward:
            self.before_backward.append(hook)

    def alive(self) -> list:
        return [node for r in self.waiting if (node := r()) is not None]

    def _now(self) -> tuple[int, ...]:
        return tuple(t._version for t in (self.hidden, self.weight, self.bias) if t is not None)

    def unchanged(self) -> bool:
        return self._now() == self.versions

    def check(self) -> None:
        if not self.unchanged():
            raise RuntimeError(
                "lazy logits: the head's weight or its input was modified in place since the forward; read `logits` "
                "before the optimizer's step"
            )

    def count(self, why: str) -> None:
        """Once per call of the head: the first operation for which the logits had to exist."""
        if not self.counted:
            self.counted = True
            self.fallbacks[f"head: the logits were made for {why}"] += 1


def _while_gathered(method: Callable) -> Callable:
    """A method of a product for which the head's weight must be whole."""

    @functools.wraps(method)
    def gathered(self, *args, **kwargs):
        with self.family.gathered():
            return method(self, *args, **kwargs)

    return gathered


@dataclass(frozen=True, eq=False, repr=False)
class Product:
    """hidden (*rows, H); weight (V, H); bias (V,) or None; a, b, tanh: see above. part: (whole, first, last) rows of
    another Product.
    steps: the scalar operations in stock's order, to apply to the product itself."""

    family: Family
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    compute: torch.dtype
    a: float = 1.0
    tanh: bool = False
    b: float = 1.0
    part: tuple[Product, int, int] | None = None
    steps: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
    cache: dict = field(default_factory=dict)

    @property
    def rows(self) -> torch.Size:
        return self.hidden.shape[:-1]

    @property
    def vocab(self) -> int:
        return self.weight.shape[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.rows, self.vocab)

    @property
    def requires_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.hidden, self.weight, self.bias))

    # what is applied to the logits

    def scaled(self, s: float, step: Callable) -> Product:
        changes = {"b": self.b * s} if self.tanh else {"a": self.a * s}
        return replace(self, **changes, part=None, steps=(*self.steps, step), cache={})

    def capped(self, step: Callable) -> Product:
        return replace(self, tanh=True, b=1.0, part=None, steps=(*self.steps, step), cache={})

    def cast(self, step: Callable) -> Product:
        """The same values: a cast is remembered for stock's way only, so that nothing is rounded here."""
        return replace(self, steps=(*self.steps, step), cache=self.cache)

    def at(self, hidden: torch.Tensor, part: tuple[int, int] | None = None) -> Product:
        """The logits of other positions. part: these are such rows of this product, in order."""
        return replace(self, hidden=hidden, part=None if part is None else (self, *part), cache={})

    def reshaped(self, hidden: torch.Tensor) -> Product:
        """All positions in their order, in another shape: what is known of them stays known."""
        return replace(self, hidden=hidden)

    def detached(self) -> Product:
        if not self.requires_grad:
            return self
        bias = None if self.bias is None else self.bias.detach()
        # by whoever shares this product's cache, in whatever shape and dtype
        known = self.cache.setdefault("detached", {})
        return replace(
            self, hidden=self.hidden.detach(), weight=self.weight.detach(), bias=bias, part=None, cache=known
        )

    def same(self, other: Product) -> bool:
        """Do both stand for the same values (they may differ in casts)?"""
        return self.cache is other.cache

    def logits(self) -> torch.Tensor:
        """The logits themselves of these rows alone, by stock's operations."""
        self.family.check()
        return self.logits_unchecked()

    @_while_gathered
    def logits_unchecked(self) -> torch.Tensor:
        with autocast_as(self.family.autocast):
            z = F.linear(self.hidden, self.weight, self.bias)
        for step in self.steps:
            z = step(z)
        return z

    # what is computed from them

    def _operands(self) -> tuple[torch.Tensor, torch.Tensor, dict]:
        self.family.check()
        hidden = self.hidden.reshape(-1, self.hidden.shape[-1]).to(self.compute)
        settings = {"softcap": abs(self.b), "scale": self.a * self.b} if self.tanh else {"scale": self.a}
        return hidden, self.weight, {"bias": self.bias, **settings}

    @_while_gathered
    def cross_entropy(
        self, target: torch.Tensor, reduction: str, ignore_index: int, label_smoothing: float
    ) -> torch.Tensor:
        hidden, weight, settings = self._operands()
        target = target.reshape(-1)
        settings |= {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        loss = with_room(linear_cross_entropy, hidden, weight, target, **settings)
        return loss.reshape(self.rows) if reduction == "none" else loss

    @_while_gathered
    def log_probs(self, index: Any, entropy: bool = False) -> tuple[Any, Any]:
        """(log p(index), entropy or None), flat."""
        hidden, weight, settings = self._operands()
        outputs = ("log_probs", "entropy") if entropy else ("log_probs",)
        got = with_room(
            linear_logprob,
            hidden,
            weight,
            index.reshape(-1),
            ignore_index=NO_INDEX_IGNORED,
            outputs=outputs,
            compact=False,
            **settings,
        )
        return got.log_probs, got.entropy

    @_while_gathered
    def entropy(self) -> Any:
        hidden, weight, settings = self._operands()
        zeros = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        return with_room(linear_logprob, hidden, weight, zeros, outputs=("entropy",), compact=False, **settings).entropy

    @_while_gathered
    def selected(self, index: torch.Tensor) -> torch.Tensor:
        """z[index] by row."""
        hidden, weight, _ = self._operands()
        index = index.reshape(-1)
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        x = (hidden.to(wide) * F.embedding(index, weight).to(wide)).sum(-1)
        if self.bias is not None:
            x = x + self.bias[index].to(wide)
        x = x * self.a
        return torch.tanh(x) * self.b if self.tanh else x

    @_while_gathered
    def log_sum_exp(self) -> torch.Tensor:
        hidden, weight, settings = self._operands()
        return with_room(linear_logsumexp, hidden, weight, **settings)

    @_while_gathered
    def mean(self) -> Any:
        """Mean of z over the vocabulary by row; without a cap it is one product with the mean of the weight's rows."""
        hidden, weight, settings = self._operands()
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        if not self.tanh:
            with no_autocast(hidden.device):
                x = hidden.to(wide) @ weight.mean(0, dtype=wide)
            return (x if self.bias is None else x + self.bias.mean(dtype=wide)) * self.a
        zeros = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
        return with_room(
            linear_logprob, hidden, weight, zeros, outputs=("mean_logits",), compact=False, **settings
        ).mean_logits

    @_while_gathered
    @torch.no_grad()
    def argmax(self) -> torch.Tensor:
        """Index of the first largest logit by row."""
        hidden, weight, _ = self._operands()
        flip = self.a * self.b < 0
        found = []
        with no_autocast(hidden.device):
            for c, d in spans(hidden.shape[0], even_tile(hidden.shape[0], TOKEN_TILE, 128)):
                h = operand(hidden[c:d], hidden.dtype)
                best: Any = None
                at: Any = None
                for lo, hi in spans(weight.shape[0], VOCAB_TILE):
                    x, _ = project(h, weight, (lo, hi), hidden.dtype)
                    x = x if self.bias is None else x + self.bias[lo:hi]
                    top, i = (-x if flip else x).max(-1)
                    if best is None:
                        best, at = top, i + lo
                    else:
                        at = torch.where(top > best, i + lo, at)
                        best = torch.maximum(best, top)
                found.append(at)
        flat = torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=hidden.device)
        return flat.reshape(self.rows)
