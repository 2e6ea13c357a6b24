"""The steps of a run, in one process: in float64 the truth, in the training dtype how far off stock is.

A step's loss is the sum over the batch's tokens divided by their number, as trainers scale it. The optimizer is SGD
with momentum: it has a state to resume, and unlike Adam it does not blow up the rounding of a gradient that is nearly
zero."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn

from fastft.patching.patcher import innermost
from fastft.proving.clone import clone
from fastft.proving.float64 import float64_reference
from fastft.tools.verify.modules import in_float64
from fastft.tools.verify.ranks.batches import Batch, draw, part, tokens_of

Results = dict[str, torch.Tensor]  # "STEP:loss", and "STEP:PARAMETER" its gradient
MOMENTUM = 0.9


@dataclass(frozen=True)
class Recipe:
    """What is trained. rows, seq: of the whole batch; counts: the model's loss takes `num_items_in_batch`; unused: a
    parameter that trains gets no gradient."""

    steps: int
    rows: int
    seq: int
    rate: float = 0.0
    counts: bool = False
    unused: bool = False


@dataclass(frozen=True)
class WholeRun:
    """results: losses and gradients; weights: the parameters that train, after the last step."""

    results: Results
    weights: Results


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def loss_of(model: nn.Module, batch: Batch, tokens: int, counts: bool) -> torch.Tensor:
    """The sum of the losses of the batch's tokens over `tokens`, those of all processes together."""
    if counts:
        return model(**batch, num_items_in_batch=tokens, use_cache=False).loss
    return model(**batch, use_cache=False).loss * (tokens_of(batch) / tokens)


def optimizer_of(model: nn.Module, rate: float) -> torch.optim.Optimizer:
    """Of the parameters that train."""
    return torch.optim.SGD(trained(model).values(), lr=rate, momentum=MOMENTUM)


def train(model: nn.Module, recipe: Recipe, parts: int = 1, exact: bool = False) -> WholeRun:
    """One process takes the whole batch, in as many parts, one after another. exact: the model is in float64."""
    optimizer, results = optimizer_of(model, recipe.rate), {}
    for step in range(recipe.steps):
        batch = draw(innermost(model), recipe.rows, recipe.seq, step)
        losses = []
        with float64_reference() if exact else contextlib.nullcontext():
            for i in range(parts):
                loss = loss_of(model, part(batch, i, parts), tokens_of(batch), recipe.counts)
                loss.backward()
                losses.append(loss.detach())
        results[f"{step}:loss"] = torch.stack(losses).sum()
        results |= {f"{step}:{n}": p.grad.clone() for n, p in trained(model).items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
    return WholeRun(results, {n: p.detach().clone() for n, p in trained(model).items()})


def planned(model: nn.Module, recipe: Recipe, shares: int) -> tuple[Recipe, list[Results]]:
    """(the recipe with what the model itself decides; in float64 the first step's gradients of each share of the rows).

    Decided are: whether its loss takes `num_items_in_batch`, whether each parameter that trains gets a gradient, and a
    learning rate at which a step is seen and yet small: to first order the loss falls by 2%, or the weights change by a
    tenth."""
    copied, parameters = in_float64(model), {}
    batch = draw(innermost(model), recipe.rows, recipe.seq, 0)
    counts = _counts(model, batch, tokens_of(batch))
    losses, parts = 0.0, []
    for i in range(shares):
        with float64_reference():
            loss = loss_of(copied, part(batch, i, shares), tokens_of(batch), counts)
            loss.backward()
        parameters = trained(copied)
        losses += float(loss.detach())
        parts.append({n: p.grad for n, p in parameters.items() if p.grad is not None})
        copied.zero_grad(set_to_none=True)
    whole = {n: torch.stack([p[n] for p in parts if n in p]).sum(0) for n in {n for p in parts for n in p}}
    gradients = sum(float(g.square().sum()) for g in whole.values())
    weights = sum(float(p.detach().square().sum()) for p in parameters.values())
    rate = min(0.1 * (weights / gradients) ** 0.5, 0.02 * losses / gradients) if gradients else 0.0
    unused = set(whole) != set(parameters)
    return Recipe(recipe.steps, recipe.rows, recipe.seq, rate, counts, unused), parts


def _counts(model: nn.Module, batch: Batch, tokens: int) -> bool:
    """Does the model's loss take the number of tokens: is it half as large for twice as many?"""
    try:
        with torch.no_grad():
            one, two = (float(loss_of(model, batch, n, True)) for n in (tokens, 2 * tokens))
    except TypeError:
        return False
    return abs(two - one / 2) < 0.01 * abs(one)


def one_process(model: nn.Module, recipe: Recipe, shares: int) -> tuple[WholeRun, list[WholeRun]]:
    """(the truth, stock's runs) of a stock model, which stays as it was.

    Stock runs the whole batch at once, and in as many parts as there are processes; in float32 a third time with its
    weights off by half a unit in the last place, as one run is one sample of how rounding adds up."""
    truth = train(in_float64(model), recipe, exact=True)
    runs = [train(clone(model), recipe), train(clone(model), recipe, shares)]
    if all(p.dtype == torch.float32 for p in model.parameters() if p.is_floating_point()):
        runs.append(train(_moved(model), recipe, shares))
    return truth, runs


def _moved(model: nn.Module) -> nn.Module:
    moved, g = clone(model), torch.Generator().manual_seed(1)
    for p in moved.parameters():
        if p.dtype == torch.float32 and getattr(p, "quant_state", None) is None:  # nor bytes that are kept as floats
            noise = (torch.rand(p.shape, generator=g) - 0.5).to(p.device) * torch.finfo(p.dtype).eps
            p.data = (p.data.double() * (1 + noise.double())).float()
    return moved


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """In training mode, every dropout at zero: processes would draw other masks than one process does."""
    dropouts = [(m, m.p) for m in model.modules() if isinstance(m, nn.Dropout)]
    model.train()
    for m, _ in dropouts:
        m.p = 0.0
    try:
        yield
    finally:
        for m, p in dropouts:
            m.p = p
