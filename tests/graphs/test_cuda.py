"""The same on a GPU, with CUDA graphs themselves. (Without one nothing here runs.)"""

import contextlib

import pytest
import torch

import fastft
from fastft.graphs.recorder import cuda_obstacle
from tests.graphs.graph_models import differing, eager, gradients, graphs_of, replays, train
from tests.linear.lora_models import BASES, llama, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or bool(cuda_obstacle(torch.device("cuda"))), reason="no device with CUDA graphs"
    ),
]
STEPS, N = 20, 3
CONFIG = {"layers": N, "hidden_size": 256, "intermediate_size": 512}


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def model_of(graphs, base="dense", dtype=torch.bfloat16, policy=None):
    return fastft.patch(BASES[base](dtype, config=CONFIG).cuda(), cuda_graphs=graphs, activation_policy=policy)


def batch(i, n=64):
    return tokens(2, n, seed=i).cuda()


def step(model, i):
    found = []
    for j in range(2):
        loss = model(input_ids=batch(2 * i + j), labels=batch(2 * i + j)).loss
        (loss / 2).backward()
        found.append(loss.detach())
    return {"loss": torch.stack(found)}


@pytest.mark.parametrize("policy", [None, "lean", "full", 1], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_bits(base, policy):
    with deterministic():
        plain = train(model_of(False, base, policy=policy), step)
        model = model_of(True, base, policy=policy)
        found = train(model, step)
    assert not differing(plain, found)
    assert replays(model) == (2 * STEPS - 2) * N, fastft.report(model).notes


def test_bits_under_autocast_and_in_full_fine_tuning():
    def cast(model, i):
        with torch.autocast("cuda", torch.bfloat16):
            return step(model, i)

    with deterministic():
        plain, model = model_of(False, dtype=torch.float32), model_of(True, dtype=torch.float32)
        assert not differing(train(plain, cast), train(model, cast))
        full = [fastft.patch(llama(torch.bfloat16, **CONFIG).cuda(), cuda_graphs=on) for on in (False, True)]
        assert not differing(*(train(m, step) for m in full))
    assert replays(model) and replays(full[1]), fastft.report(model).notes


def test_two_forwards_and_a_retained_graph():
    def twice(model):
        for i in range(2):
            step(model, i)
        model.zero_grad()
        a, b = (model(input_ids=batch(i), labels=batch(i)).loss for i in (5, 6))
        b.backward(retain_graph=True)
        a.backward()
        b.backward()
        return {"a": a.detach(), "b": b.detach()} | gradients(model)

    with deterministic():
        model = model_of(True)
        assert not differing(twice(model_of(False)), twice(model))
    assert replays(model) and eager(model)


def test_auto_is_on_and_the_memory_does_not_grow():
    model = model_of(None)
    assert graphs_of(model)
    for i in range(6):
        step(model, i)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for i in range(6):
        step(model, i)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() <= before + 2**20
