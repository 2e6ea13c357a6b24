"""The CPU benchmark runs, holds its ceilings, and fails when one is passed."""

import json

import pytest
import torch
from transformers import LlamaConfig, Qwen3MoeConfig

import fastft
from benchmarks import cpu, expert_costs, fake
from fastft_kernels.lora import group


def test_layer_and_head_hold_their_ceilings(tmp_path, capsys):
    assert cpu.main(["--quick", "--only", "layer", "head", "host", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("cpu-*.json")
    found = json.loads(path.read_text())
    figures = {f["name"]: f for f in found["figures"]}
    assert {"torch", "transformers", "peft"} <= set(found["environment"]) and "benchmarks.cpu" in found["command"]
    kept = figures["fp32 adapters, bf16 autocast: kept for the backward"]
    assert kept["stock"] == 217_768  # PEFT's own, known from elsewhere: the counting is right
    launches = figures["fp32 adapters, bf16 autocast: launches"]
    assert launches["stock"] == 224
    assert figures["log-probabilities, frozen head: matrix products"]["stock"] == 3
    assert path.with_suffix(".md").read_text().count("| layer: ") == 5
    adapters = figures["fp32 adapters, bf16 autocast: of it, the adapters' part"]
    assert 0 < adapters["value"] < adapters["stock"]


def test_bytes_read_and_written():
    x, out = torch.empty(8, 4), torch.empty(8, 6)
    for what, expected in (
        (lambda: torch.mm(x, torch.empty(4, 6)), 4 * (32 + 24 + 48)),
        (lambda: out.addmm_(x, torch.empty(4, 6)), 4 * (48 + 32 + 24 + 48)),  # what was there is read
        (lambda: out.addmm_(x, torch.empty(4, 6), beta=0), 4 * (32 + 24 + 48)),  # and here it is not
        (lambda: out[:, :3].copy_(torch.empty(8, 3)), 4 * (24 + 24)),  # of a view, what it shows
        (lambda: x.mul(x), 4 * (32 + 32)),  # an operand twice is read once
        (lambda: x.mul(torch.empty(1).expand(8, 4)), 4 * (32 + 1 + 32)),
        (lambda: out.zero_(), 4 * 48),
        (lambda: x.view(4, 8).t()[:2], 0),
        (lambda: torch._foreach_copy_([x, out], [torch.empty(8, 4), torch.empty(8, 6)]), 4 * 2 * (32 + 48)),
    ):
        with fake.Traffic() as traffic:
            what()
        assert sum(traffic.bytes.values()) == expected


def test_a_figure_above_its_ceiling_fails(tmp_path, monkeypatch, capsys):
    for value, code in ((1.0, 0), (1.001, 1)):
        monkeypatch.setitem(
            cpu.SECTIONS, "host", lambda quick, v=value: [cpu.Figure("host", "planted", "us", v, None, 1.0)]
        )
        assert cpu.main(["--only", "host", "--out", str(tmp_path)]) == code


def test_an_unknown_section_is_refused(capsys):
    with pytest.raises(SystemExit):
        cpu.main(["--only", "gpu"])


@pytest.fixture
def small_experts():
    config = Qwen3MoeConfig(
        hidden_size=512, moe_intermediate_size=256, num_experts=4, num_experts_per_tok=2, num_hidden_layers=1
    )
    return expert_costs.Size(config, 4, 512, 256, 2)


def test_a_layer_of_experts_does_the_factored_arithmetic(small_experts):
    ours, stock = (expert_costs.experts_cost(small_experts, 64, patch) for patch in (fastft.patch, None))
    least = small_experts.factored(64)
    assert least <= ours.flops <= 1.03 * least
    assert stock.flops > ours.flops and stock.saved > ours.saved > 0


@pytest.mark.parametrize(
    ("patch", "lacking"),
    [(None, torch.ops.aten._grouped_mm), (fastft.patch, torch.ops.fastft.grouped_mm)],
    ids=["stock", "ours"],
)
def test_experts_that_count_nothing_fail(small_experts, monkeypatch, patch, lacking):
    monkeypatch.delitem(fake.FORMULAS, lacking)
    with pytest.raises(RuntimeError, match="no formula"):
        expert_costs.experts_cost(small_experts, 64, patch)


def test_an_fp8_layer_keeps_what_a_bf16_layer_does(monkeypatch):
    """And what makes an input rounds it: of four inputs three need no launch and no reading of their own."""

    def make(layers):
        return LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=64,
        )

    cost = lambda **more: fake.layer_cost(make, (2, 8), patch=fastft.patch, autocast=False, **more)
    dense, fp8 = cost(), cost(fp8=True)
    monkeypatch.setattr(group, "take_rounded", lambda source: None)
    apart = cost(fp8=True)
    assert fp8.saved <= dense.saved
    assert apart.launches - fp8.launches == 3 and apart.traffic - fp8.traffic == 16 * 2 * (64 + 64 + 128)
