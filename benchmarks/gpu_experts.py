"""LoRA steps of a mixture of experts: four layers of the shape of Qwen3-30B-A3B at 4 x 2048, adapters on every expert
(PEFT's `target_parameters`) and on attention; stock runs transformers' grouped products.

The gate comes first: loss and gradients of one layer at full width against float64. A token whose scores are nearly
equal goes to one expert or the other by rounding, and every gradient jumps: all three runs take the float64 run's
choices."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from benchmarks.gpu_models import RANK, Batch, batch
from benchmarks.gpu_steps import STACKS, fitting, losses_and_gradients, sft_loss
from benchmarks.model_experts import Choices, stacks
from benchmarks.sheet import Figures, Red, Sheet
from fastft.tools.bench.timing import Roof
from fastft.tools.gate import gate
from fastft.tools.verify.runner import in_float64


def config_experts(tiny: bool, layers: int | None = None) -> Qwen3MoeConfig:
    """The shape of Qwen3-30B-A3B."""
    wide = dict(hidden_size=2048, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
    wide |= dict(num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936)
    small = dict(hidden_size=64, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
    small |= dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, vocab_size=160)
    return Qwen3MoeConfig(**(small if tiny else wide), num_hidden_layers=layers or (2 if tiny else 4))


def build(config: Qwen3MoeConfig, device: torch.device, seed: int = 0) -> nn.Module:
    """bf16 base and adapters, both factors drawn, in training mode."""
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    model.set_experts_implementation("grouped_mm")
    lora = LoraConfig(
        r=RANK,
        lora_alpha=2 * RANK,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
        target_parameters=stacks(model),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.02)
    model.config.use_cache = False
    model.enable_input_require_grads()
    return model.train()


class Gate:
    """Judges fastft once; `check` raises Red. The model's own loss: its auxiliary part is stock's in all three."""

    def __init__(self, tiny: bool, device: torch.device):
        model = build(config_experts(tiny, layers=1), device, seed=1)
        batches = [batch([n, n // 2], model.config.vocab_size, device) for n in ((12,) if tiny else (96,))]
        choices = Choices()

        def run(model: nn.Module, *, note: bool = False) -> dict[str, torch.Tensor]:
            with choices.run(0, note):
                return losses_and_gradients(model, _model_loss, batches, device, reference=note)

        exact = in_float64(copy.deepcopy(model))
        exact.get_base_model().set_experts_implementation("eager")
        reference = run(exact, note=True)
        eager = run(model)
        with STACKS["fastft"][0](model, device):
            found = run(model)
        self.verdict = gate(found, reference, eager)

    def check(self) -> None:
        if not self.verdict:
            raise Red(str(self.verdict))


def _model_loss(model: nn.Module, b: Batch) -> torch.Tensor:
    return model(**b).loss


def section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Rows for each stack: tokens/s, the step's time, peak memory, and of ours how many times as fast as stock."""
    lengths = [24] * 4 if tiny else [2048] * 4
    made: dict[str, object] = {}
    stock_s: list[float] = []

    def once(name: str, make: Callable):
        if name not in made:
            made[name] = make()
        return made[name]

    def measure(stack: str) -> Figures:
        if stack == "fastft":
            once("gate", lambda: Gate(tiny, device)).check()
        model = once("model", lambda: build(config_experts(tiny), device))
        b = batch(lengths, model.config.vocab_size, device)
        step = fitting(model, stack, sft_loss, b, device, seconds=0.0 if tiny else 3.0)
        if stack == "stock":
            stock_s.append(step.times.median)
        found: Figures = {
            "tokens/s": sum(lengths) / step.times.median,
            "step ms": step.times.median * 1e3,
            "first step ms": step.first * 1e3,
            "checkpointing": step.checkpointing,
            "first loss": step.losses[0],
        }
        if step.allocated:
            found |= {"peak GiB": step.allocated / 2**30, "reserved GiB": step.reserved / 2**30}
        if stack != "stock" and stock_s:
            found["times stock"] = stock_s[0] / step.times.median
        return found | ({"policy": step.policy} if step.policy else {})

    for stack in STACKS:
        layers = config_experts(tiny).num_hidden_layers
        sheet.run(
            f"{layers} layers of a 30B-A3B shape, {len(lengths)}x{lengths[0]}: {stack}",
            lambda stack=stack: measure(stack),
            least=0.0 if tiny else 6.0,
        )
