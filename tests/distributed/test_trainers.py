"""TRL's trainers in two gloo processes, as TRL's own distributed tests run them: patched beside stock, both judged
against float64. Accelerate takes FSDP2 for GPUs alone: there the model is sharded by its own `DistributedConfig`, and
no adapter can be added to it."""

import pytest

from tests.distributed.test_strategies import needs_deepspeed

NAMES = ("sft", "sft-full", "dpo", "kto", "grpo", "rloo")
LAUNCHES = {
    "ddp": [f"ddp {n}" for n in NAMES],
    "fsdp2": [f"fsdp2 {n}-full" for n in ("sft", "dpo", "kto", "grpo", "rloo")],
    "zero": [f"zero{stage} {n}" for stage in (2, 3) for n in NAMES],
}
pytestmark = pytest.mark.slow
ALL = [
    pytest.param(launch, job, id=job, marks=[needs_deepspeed, pytest.mark.zero] if launch == "zero" else [])
    for launch, jobs in LAUNCHES.items()
    for job in jobs
]


@pytest.mark.parametrize(("launch", "job"), ALL)
def test_as_stock(results, launch, job):
    """Losses and trained weights by the judge; equal on both processes; saved by the trainer as trained; generation
    draws stock's tokens."""
    found = results(launch, LAUNCHES[launch], "trainers")[job]
    assert "raised" not in found, found["raised"]
    assert found["ok"] and found["stock_error"] < 0.05, found["worst"]
    assert found["equal"] and found["saved"] and not found["differ"]
    assert len(set(found["losses"])) > 1
    assert found["sharded"] == job.startswith(("fsdp2", "zero3"))
    heads = set() if job.startswith("zero3") else {"head", "fused head"}
    assert heads | {"norm", "rotary", "mlp", "linear group"} <= set(found["swapped"])
