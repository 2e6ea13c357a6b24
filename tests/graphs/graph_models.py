"""A patched tiny Llama whose layers are replayed by a recorder for tests (tape.py), and `train`, which
runs the same steps with and without it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fastft
from fastft.checkpointing.layer_stack import GRAPHS, stacks
from fastft.graphs.attach import attach
from fastft.graphs.layer import LayerGraphs
from fastft.graphs.recorder import Recorder
from fastft.patching.patcher import innermost
from fastft.swapping.swap import state_of
from tests.graphs.tape import TapeRecorder
from tests.linear.lora_models import BASES, gradients, tokens

LAYERS = 3
Step = Callable[[nn.Module, int], dict[str, torch.Tensor]]


def patched(graphs: bool = True, base: str = "dense", config: dict | None = None, policy=None, **lora) -> nn.Module:
    """A patched model with adapters; graphs: its layers under the recorder for tests."""
    model = fastft.patch(BASES[base](config={"layers": LAYERS} | (config or {}), **lora), activation_policy=policy)
    return with_graphs(model) if graphs else model


def with_graphs(model: nn.Module, recorder: Recorder | None = None) -> nn.Module:
    attach(innermost(model), True, recorder or TapeRecorder())
    return model


def layers_of(model: nn.Module) -> list[nn.Module]:
    return stacks(innermost(model))[0].alive()


def graphs_of(model: nn.Module, index: int = 0) -> LayerGraphs:
    return state_of(layers_of(model)[index], GRAPHS)


def replays(model: nn.Module) -> int:
    return graphs_of(model).stack.replays


def eager(model: nn.Module) -> dict[str, int]:
    """Calls that ran eagerly, by reason, but for those of a call that had not come often enough."""
    return {k: n for k, n in graphs_of(model).stack.eager.items() if "often enough" not in k}


def loss_of(model: nn.Module, seed: int, rows: int = 2, n: int = 8) -> torch.Tensor:
    ids = tokens(rows, n, seed=seed)
    return model(input_ids=ids, labels=ids).loss


def one_batch(model: nn.Module, i: int) -> dict[str, torch.Tensor]:
    loss = loss_of(model, i)
    loss.backward()
    return {"loss": loss}


def train(
    model: nn.Module,
    step: Step = one_batch,
    steps: int = 20,
    before: Callable[[nn.Module, int], object] = lambda m, i: None,
):
    """Losses, gradients, and the parameters after each step. before: what happens to the model before a step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    found: dict[str, torch.Tensor] = {}
    for i in range(steps):
        before(model, i)
        results = {**step(model, i), **gradients(model)}
        found |= {f"{i} {k}": v.detach().clone() for k, v in results.items()}
        optimizer.step()
        optimizer.zero_grad(set_to_none=i % 2 == 0)
    return found | {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def differing(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [k for k in a if not torch.equal(a[k], b[k])]
