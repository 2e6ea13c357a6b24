"""The planner's error: a step's peak memory as `fastft plan` predicts it, and as a real step takes it on this device.

    python -m benchmarks.plan_error [--device cuda] [--tiny]

On CUDA the measure is torch.cuda.max_memory_allocated; on a CPU the running sum of the allocator's events, which
torch's profiler records."""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3MoeConfig

import fastft
from fastft.patching.patcher import innermost
from fastft.tools.plan import fake as plan_fake
from fastft.tools.plan.gpus import CUBLAS, CUBLAS_HOPPER
from fastft.tools.plan.optimizers import BITSANDBYTES, TORCH
from fastft.tools.plan.predict import TrainingSetup, subject
from fastft.tools.plan.step import finish, forward, trains_through_base, with_trl_head

PHASES = ("forward", "backward", "optimizer")
BF16, F32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One configuration. layers: (recomputed, kept)."""

    name: str
    config: PretrainedConfig
    setting: TrainingSetup
    rows: int
    tokens: int
    layers: tuple[int, int]


@dataclass(frozen=True)
class Outcome:
    """Bytes by phase."""

    predicted: dict[str, float]
    measured: dict[str, float]

    @property
    def error(self) -> float:
        """Of the step's peak, relative: positive where too much was predicted."""
        return max(self.predicted.values()) / max(self.measured.values()) - 1


def predicted(case: Case) -> dict[str, float]:
    found = subject(case.config, case.setting)
    whole = found.whole(case.layers, case.rows, case.tokens)
    static = sum(whole.static.values())
    if case.setting.for_cuda:
        static += CUBLAS_HOPPER if torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9 else CUBLAS
    return {p.name: p.peak + static for p in whole.phases}


def real_model(case: Case, device: torch.device) -> nn.Module:
    """The model that was planned for, with random weights, as FastModel and TRL make it."""
    s = case.setting
    torch.manual_seed(0)
    with torch.device("cpu" if s.four_bit else device):
        model = AutoModelForCausalLM.from_config(case.config, dtype=s.dtype)
    if s.four_bit:
        model = _quantised(model, s.dtype, device, s.storage)
    if s.loss == "trl":
        with_trl_head(model)
    if s.adapters is not None:
        model = get_peft_model(model, s.adapters, autocast_adapter_dtype=False)
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.to(s.adapter_dtype)
    model.train()
    trains_through_base(model)
    recomputed, kept = case.layers
    if s.patched:
        fastft.patch(model, activation_policy="none" if not recomputed else recomputed if kept else "lean")
    elif recomputed:
        innermost(model).gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def _quantised(model: nn.Module, dtype: torch.dtype, device: torch.device, storage: torch.dtype) -> nn.Module:
    from transformers import BitsAndBytesConfig

    how = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_quant_storage=storage,
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=how, dtype=dtype, device_map={"": str(device)}
        )


def optimizer_for(model: nn.Module, optim: str) -> torch.optim.Optimizer:
    """The class and arguments that a Trainer takes for this name."""
    learning = [p for p in model.parameters() if p.requires_grad]
    if optim in TORCH:
        return torch.optim.AdamW(learning, lr=1e-5, fused=TORCH[optim]["fused"] or None)
    import bitsandbytes

    bits, paged = BITSANDBYTES[optim]
    return bitsandbytes.optim.AdamW(learning, lr=1e-5, optim_bits=bits, is_paged=paged)


def measured(case: Case, device: torch.device) -> dict[str, float]:
    """The third of three real steps, by phase."""
    model = real_model(case, device)
    optimizer = optimizer_for(model, case.setting.optim)
    batch = {k: v.to(device) for k, v in plan_fake.batch(case.config, case.rows, case.tokens).items()}

    def phases() -> list[tuple[str, Callable[[], None]]]:
        loss: list[torch.Tensor] = []
        return [
            ("forward", lambda: loss.append(forward(model, batch, case.setting.loss, case.setting.autocast))),
            ("backward", lambda: loss[0].backward()),
            ("optimizer", lambda: finish(model, optimizer.step)),
        ]

    def step(around: Callable[[str, Callable[[], None]], None]) -> None:
        for name, run in phases():
            around(name, run)
        if not case.setting.accumulate:
            optimizer.zero_grad(set_to_none=True)

    for _ in range(2):
        step(lambda name, run: run())
    if device.type == "cuda":
        return _on_cuda(step)
    states = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    alive = (
        *model.parameters(),
        *model.buffers(),
        *plan_fake.quantisation_tensors(model),
        *batch.values(),
        *states,
        *grads,
    )
    return by_events(step, {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in alive})


def _on_cuda(step: Callable) -> dict[str, float]:
    found = {}

    def around(name: str, run: Callable[[], None]) -> None:
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        found[name] = float(torch.cuda.max_memory_allocated())

    step(around)
    return found


def by_events(step: Callable, alive: dict[int, int]) -> dict[str, float]:
    """The running sum of the allocator's events, from what is alive."""

    def around(name: str, run: Callable[[], None]) -> None:
        with record_function(f"plan:{name}"):
            run()

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step(around)
    events = profiler.profiler.kineto_results.events()
    spans = {e.name().removeprefix("plan:"): (e.start_ns(), e.end_ns()) for e in events if e.name().startswith("plan:")}
    now, found = sum(alive.values()), dict.fromkeys(PHASES, 0.0)
    for at, change in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += change
        for name, (start, end) in spans.items():
            if start <= at <= end:
                found[name] = max(found[name], float(now))
    return found


def outcome(case: Case, device: torch.device) -> Outcome:
    return Outcome(predicted(case), measured(case, device))


# --- the configurations


def llama(layers: int, **sizes: int) -> LlamaConfig:
    shape = {
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 4096,
    }
    return LlamaConfig(num_hidden_layers=layers, **{**shape, **sizes})


def mixture(layers: int, **sizes: int) -> Qwen3MoeConfig:
    shape = {
        "hidden_size": 128,
        "moe_intermediate_size": 96,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 1024,
    }
    return Qwen3MoeConfig(num_hidden_layers=layers, **{**shape, **sizes})


def on_attention(experts: bool, r: int = 16) -> LoraConfig:
    """LoRA on the attention's projections, and on the experts."""
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"] if experts else None
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"]
    return LoraConfig(
        r=r, lora_alpha=2 * r, target_modules=modules, target_parameters=parameters, task_type="CAUSAL_LM"
    )


def _setting(device: torch.device, **changes) -> TrainingSetup:
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    cuda = device.type == "cuda"
    return replace(TrainingSetup(F32, None, lora, F32, False, "adamw_torch_fused", False, "trl", cuda), **changes)


def cases(device: torch.device, tiny: bool = True) -> list[Case]:
    """Fourteen. tiny: seconds on a CPU core, mostly in float32, which a CPU multiplies fast; else a GPU's sizes, in
    bfloat16."""
    of = lambda **changes: _setting(device, **changes)
    half = {"dtype": BF16, "autocast": BF16}
    usual = {} if tiny else half
    large = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    config, shallow = (llama(4), llama(2)) if tiny else (llama(8, **large), llama(8, **large))
    wide = {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936}
    sparse = mixture(2) if tiny else mixture(4, **wide, **heads)
    few = sparse.num_hidden_layers
    depth, less = config.num_hidden_layers, shallow.num_hidden_layers
    batch, small, long = ((2, 128), (1, 128), (1, 2048)) if tiny else ((4, 2048), (4, 2048), (1, 32768))
    every, none = (depth, 0), (0, depth)
    nf4 = {"four_bit": True, "adapter_dtype": BF16}
    return [
        Case("LoRA, nothing recomputed, the model's loss", config, of(**usual, loss="model"), *batch, none),
        Case("LoRA, bfloat16 under autocast, float32 adapters", shallow, of(**half), *small, (0, less)),
        Case("QLoRA: NF4, double quantisation", shallow, of(**half, **nf4), *small, (0, less)),
        Case("LoRA, every layer lean", config, of(**usual), *batch, every),
        Case("LoRA, half of the layers lean", config, of(**usual), *batch, (depth // 2, depth - depth // 2)),
        Case(
            "full fine-tuning, AdamW",
            config,
            of(**usual, adapters=None, optim="adamw_torch", loss="model"),
            *batch,
            none,
        ),
        Case("full fine-tuning, accumulated", config, of(**usual, adapters=None, accumulate=True), *batch, every),
        Case("LoRA, one long row", config, of(**usual), *long, every),
        Case("LoRA, 8-bit AdamW", config, of(**usual, optim="adamw_8bit"), *batch, every),
        Case("stock, LoRA, nothing recomputed", config, of(**usual, patched=False), *batch, none),
        Case("stock, LoRA, every layer checkpointed", config, of(**usual, patched=False), *batch, every),
        Case("stock, full fine-tuning", config, of(**usual, patched=False, adapters=None), *batch, every),
        Case("experts, LoRA on attention", sparse, of(**usual, adapters=on_attention(False)), *small, (0, few)),
        Case(
            "experts, LoRA on them and on attention, bfloat16 adapters, 8-bit AdamW",
            sparse,
            of(**usual, adapters=on_attention(True, 8), adapter_dtype=BF16, optim="adamw_8bit"),
            *small,
            (few, 0),
        ),
    ]


def planner_error(device: torch.device | str = "cpu", tiny: bool = True) -> dict[str, float | str]:
    """Of every configuration (tiny: of three): predicted and measured MiB and the relative error; and the largest
    error, without its sign. For `python -m benchmarks.gpu`."""
    device = torch.device(device)
    found: dict[str, float | str] = {}
    worst = 0.0
    for case in cases(device, tiny)[: 3 if tiny else None]:
        result = outcome(case, device)
        most = lambda d: max(d.values()) / 2**20
        found |= {
            f"{case.name}: predicted MiB": most(result.predicted),
            f"{case.name}: measured MiB": most(result.measured),
            f"{case.name}: error": result.error,
        }
        worst = max(worst, abs(result.error))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found | {"largest error": worst}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan_error",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    worst = 0.0
    for case in cases(device, options.tiny or device.type == "cpu"):
        result = outcome(case, device)
        worst = max(worst, abs(result.error))
        most = lambda d: max(d.values()) / 2**20
        print(
            f"| {case.name} | {most(result.predicted):,.1f} | {most(result.measured):,.1f} | {result.error:+.2%} |",
            flush=True,
        )
    return 0 if worst <= 0.05 else 1


if __name__ == "__main__":
    raise SystemExit(main())
