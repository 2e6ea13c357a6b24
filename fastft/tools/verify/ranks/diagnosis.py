"""What is wrong where losses or gradients differ from one process's: by the faults that training in several processes
is known for."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import nn

from fastft.tools.verify.ranks.strategies import Strategy, plain
from fastft.tools.verify.ranks.training import Results, loss_of

ROUNDING = 0.02  # of a fit, in 16 bits


def of_average(gradients: Results, parts: Sequence[Results], tokens: Sequence[int]) -> str:
    """How many times the rows of each process count in the gradients of the first step; empty where once, or where the
    gradients are no such sum.

    gradients: by parameter. parts: in float64, of each process's rows, over the tokens of all. tokens: of each."""
    names = [n for n in gradients if all(n in p for p in parts)]
    ours = {n: gradients[n].double().to(parts[0][n].device) for n in names}
    dot = lambda a, b: sum(float((a[n] * b[n]).sum()) for n in names)
    gram = torch.tensor([[dot(a, b) for b in parts] for a in parts], dtype=torch.float64)
    with_ours = torch.tensor([dot(a, ours) for a in parts], dtype=torch.float64)
    times = torch.linalg.lstsq(gram, with_ours[:, None]).solution[:, 0]
    norm = dot(ours, ours)
    if not norm or norm - float(times @ with_ours) > ROUNDING**2 * norm or bool(((times - 1).abs() < ROUNDING).all()):
        return ""
    of_means = torch.tensor([sum(tokens) / (n * len(tokens)) for n in tokens], dtype=torch.float64)
    counts = ", ".join(f"rank {r}'s rows count {t:.2f} times" for r, t in enumerate(times.tolist()))
    if len(parts) > 1 and bool(((times - of_means).abs() < ROUNDING).all()):
        return f"an unscaled average, of the ranks' means instead of the tokens: {counts}"
    if float(times.max() - times.min()) < ROUNDING:
        return f"every gradient is {float(times.mean()):.3g} times what it should be: the sum over tokens is not scaled"
    return f"the ranks are not averaged by tokens: {counts}"


def stale_weights(strategy: Strategy) -> list[str]:
    """The parameters that a forward of this process sees with other values than they have, by name. Every process comes
    here alike."""
    wanted, found = strategy.weights(), []
    inside = {id(m): m for m in strategy.units()}
    named = [(n, m) for n, m in strategy.wrapped.named_modules() if id(m) in inside]

    def look(prefix: str, module: nn.Module) -> None:
        for n, p in module.named_parameters(prefix):
            want = wanted.get(plain(n))
            if (
                want is not None
                and not hasattr(p, "full_tensor")
                and p.shape == want.shape
                and not torch.equal(p, want)
            ):
                found.append(plain(n))

    with ExitStack() as hooks, torch.no_grad():
        for prefix, module in named:
            hook = module.register_forward_pre_hook(lambda m, args, prefix=prefix: look(prefix, m))
            hooks.callback(hook.remove)
        batch, tokens = strategy.rows(0)
        loss_of(strategy.wrapped, batch, tokens, strategy.recipe.counts)
    return found


def named(stale: Sequence[Sequence[str]]) -> str:
    """Of all processes; empty where none is stale."""
    for rank, names in enumerate(stale):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f"rank {rank} computes with a stale weight, not with what the optimizer wrote: {names[0]}{more}"
    return ""
