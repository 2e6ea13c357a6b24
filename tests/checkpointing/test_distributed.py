"""Under DistributedDataParallel and FSDP2, one process: the same gradients under every policy."""

import pytest
import torch
from torch import distributed

import fastft
from tests.checkpointing.test_activation import checkpointed, last, model_of
from tests.linear.lora_models import run, same_bits, tokens, train_step


@pytest.fixture
def group(tmp_path):
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def plain():
    return {k: v for k, v in run(fastft.patch(model_of()), train_step).items() if k != "logits"}


@pytest.mark.parametrize("find_unused", [False, True])
@pytest.mark.parametrize("policy", ["auto", "lean", "offload", 2])
def test_ddp(group, policy, find_unused):
    model = checkpointed(fastft.patch(model_of(), activation_policy=policy))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=find_unused)

    def step(_):
        loss = wrapped(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        return {"loss": loss, **{f"d {n}": p.grad for n, p in model.named_parameters() if p.grad is not None}}

    want = plain()
    for _ in range(2):  # the first step is guarded
        model.zero_grad(set_to_none=True)
        same_bits(want, run(model, step))
    assert "layers" in last(model)


@pytest.mark.parametrize("policy", ["auto", "lean", "none"])
def test_fsdp2(group, policy):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = checkpointed(fastft.patch(model_of(), activation_policy=policy))
    for layer in model.get_base_model().model.layers:
        fully_shard(layer)
    fully_shard(model)

    def step(m):
        loss = m(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        full = lambda g: g.full_tensor() if isinstance(g, DTensor) else g
        return {"loss": loss, **{f"d {n}": full(p.grad) for n, p in m.named_parameters() if p.grad is not None}}

    want = plain()
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        same_bits(want, run(model, step))
