"""Fourteen families: the patched model's loss and gradients are stock's, trained in full and with LoRA, and `unpatch`
restores every bit."""

import copy

import pytest
import torch

import fastft
from benchmarks import tiny
from benchmarks.models import doubled, generates, in_float64, judge, one_way, run, run_all, with_lora
from fastft.proving.float64 import float64_reference
from fastft_kernels.numerics import compare

FAMILIES = tiny.MODEL_TYPES[:14]


@pytest.mark.parametrize("way", ["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_float32_and_undo(family: str, way: str) -> None:
    stock = tiny.build(family)
    inputs = tiny.batch(stock)
    found = one_way(with_lora(stock) if way == "lora" else stock, inputs, tiny.loss_of)
    assert found["reference"] == "float64"
    assert found["bad"] == []
    assert found["problems"] == []
    swapped = {row["kind"] for row in found["report"]["swapped"]}
    assert swapped >= {"norm", "rotary", "linear group"}
    assert "mlp" in swapped or family == "gpt_oss"  # whose MLP is experts alone


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_no_worse_than_stock(family: str) -> None:
    """All gradients as one vector, beside a float64 run: what is summed in bfloat16 is a draw, tensor by tensor."""
    stock = tiny.build(family, dtype=torch.bfloat16)
    inputs = tiny.batch(stock)
    with float64_reference():
        reference = run(doubled(stock), in_float64(inputs), tiny.loss_of)
    eager = run(stock, inputs, tiny.loss_of)
    ours = run(fastft.patch(copy.deepcopy(stock)), inputs, tiny.loss_of)

    def whole(result: tuple[dict, dict]) -> torch.Tensor:
        return torch.cat([g.double().flatten() for g in result[1].values()])

    assert ours[1].keys() == eager[1].keys()
    assert compare(whole(ours), whole(reference), whole(eager))


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_the_same_tokens(family: str) -> None:
    stock = tiny.build(family)
    assert generates(stock, tiny.batch(stock)) == ""


def test_the_judge_sees_a_small_defect() -> None:
    stock = tiny.build("llama")
    inputs = tiny.batch(stock)
    eager = run_all(stock, inputs, tiny.loss_of)
    ours = (eager[0], {n: g * (1 + 1e-4) if "q_proj" in n else g for n, g in eager[1].items()})
    assert len(judge(stock, ours, eager, inputs, tiny.loss_of)["bad"]) == 2


def test_the_judge_sees_a_small_defect_of_the_loss() -> None:
    stock = tiny.build("llama")
    inputs = tiny.batch(stock)
    eager = run_all(stock, inputs, tiny.loss_of)
    ours = ({"loss": eager[0]["loss"] * (1 + 2e-6)}, eager[1])
    assert len(judge(stock, ours, eager, inputs, tiny.loss_of)["bad"]) == 1


def test_a_zero_gradient_is_not_a_missing_one() -> None:
    assert not compare([None], [torch.zeros(1, dtype=torch.float64)], [torch.zeros(1)])
