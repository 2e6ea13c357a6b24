"""TRL's trainers in two processes: stock, patched, and in float64 (the truth, which DDP computes for every strategy).

    torchrun --standalone --nproc_per_node 2 -m tests.distributed.trainers OUT "STRATEGY TRAINER" ...

OUT (JSON, by the first process): for each job {"ok", "error", "stock_error", "worst", "saved", "equal", "swapped",
"losses"}, or {"raised"}. Their own distributed tests train the same trainers on GPUs and see that they end."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from datasets import Dataset
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, set_seed
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTConfig,
    SFTTrainer,
)

import fastft
from fastft.compat.sharding_private import is_distributed
from fastft.proving.float64 import float64_reference
from fastft.tools.verify.ranks.checks import equal_on_all
from fastft.tools.verify.ranks.strategies import gathered, mean_of
from fastft_kernels.numerics import compare
from tests.distributed.jobs import run_jobs
from tests.distributed.loaded import shared_folder
from tests.trainers import harness as h
from tests.trainers.rollouts import PROMPTS, Rollouts, reward

STEPS = 3


def unpaired() -> Dataset:
    return Dataset.from_list(
        [{"prompt": h.TEXTS[i], "completion": " " + h.TEXTS[(i + 5) % 24], "label": i % 2 == 0} for i in range(24)]
    )


ROLLED = dict(
    num_generations=4, max_completion_length=6, per_device_train_batch_size=4, num_iterations=2, steps_per_generation=1
)
TRAINERS: dict[str, tuple[type, type, Any, dict]] = {
    "sft": (SFTConfig, SFTTrainer, h.pairs, {}),
    "dpo": (DPOConfig, DPOTrainer, h.preferences, {}),
    "kto": (KTOConfig, KTOTrainer, unpaired, dict(per_device_train_batch_size=4)),
    "grpo": (GRPOConfig, GRPOTrainer, lambda: PROMPTS, dict(ROLLED, beta=0.1, temperature=0.9)),
    "rloo": (RLOOConfig, RLOOTrainer, lambda: PROMPTS, dict(ROLLED)),
}


def deepspeed_config(stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "train_batch_size": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}
        | ({"stage3_gather_16bit_weights_on_model_save": True} if stage == 3 else {}),
    }


def trained(strategy: str, name: str, way: str, folder: Path, out: Path, rollouts: Rollouts) -> tuple[dict, Any]:
    """(losses, the mean of both processes, and weights that trained; the trainer)."""
    config, cls, rows, settings = TRAINERS[name.removesuffix("-full")]
    AcceleratorState._reset_state(True)
    more = {"deepspeed": deepspeed_config(int(strategy[-1]))} if strategy.startswith("zero") else {}
    set_seed(0)
    args = h.arguments(config, out, STEPS, **settings, **more)
    if strategy == "fsdp2" and way != "reference":
        from transformers.distributed import DistributedConfig

        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, distributed_config=DistributedConfig(fsdp_size=2)
        )
        model = fastft.patch(model) if way == "fastft" else model
    else:
        model = h.load(folder, way, lora=not name.endswith("full"))
    given = dict(reward_funcs=reward) if cls in (GRPOTrainer, RLOOTrainer) else {}
    trainer = cls(model=model, args=args, train_dataset=rows(), processing_class=h.tokenizer(), **given)
    if given:
        rollouts.follow(trainer, "_generate_single_turn", way)
    losses, step = [], trainer.training_step

    def watched(*a, **k):
        losses.append(mean_of(step(*a, **k)))
        return losses[-1]

    trainer.training_step = watched
    if way == "reference":
        with float64_reference():
            trainer.train()
    else:
        trainer.train()
    found = {"losses": torch.stack(losses)}
    for n, p in trainer.model.named_parameters():
        if p.requires_grad:
            found[n] = whole(p)
    return {k: v.double() if way == "reference" else v.float() for k, v in found.items()}, trainer


def whole(p: torch.Tensor) -> torch.Tensor:
    if hasattr(p, "ds_id") or hasattr(p, "_hp_mapping"):
        from deepspeed.utils import safe_get_full_fp32_param

        full: Any = safe_get_full_fp32_param(p)
        return full.detach().clone().reshape(getattr(p, "ds_shape", p.shape))
    return gathered(p)


def saved_as_trained(trainer: Any, weights: dict, out: Path) -> bool:
    """What the trainer's own `save_model` wrote."""
    trainer.save_model(str(out))
    dist.barrier()
    files = list(out.glob("*model.safetensors"))
    saved = {k: v for f in files for k, v in load_file(f).items()}
    names = {n: n.replace(".default", "") for n in weights if n != "losses"}
    return bool(files) and all(n in saved and torch.equal(saved[n], weights[w]) for w, n in names.items())


def job(strategy: str, name: str, folder: Path, out: Path) -> dict[str, Any]:
    rollouts = Rollouts()
    stock, made = trained(strategy, name, "stock", folder, out, rollouts)
    del made
    ours, trainer = trained(strategy, name, "fastft", folder, out, rollouts)
    report = fastft.report(trainer.model)
    found = {
        "saved": saved_as_trained(trainer, ours, out / name),
        "equal": equal_on_all("", {k: v for k, v in ours.items() if k != "losses"}, "ends with").ok,
        "swapped": sorted({r.kind for r in report.swapped}),
        "losses": ours["losses"].tolist(),
        "differ": rollouts.differ,
        "sharded": any(map(is_distributed, trainer.model.parameters())),
    }
    del trainer
    truth, _ = trained("ddp", name, "reference", folder, out, rollouts)
    verdict = compare(ours, truth, stock)
    return found | {
        "ok": bool(verdict),
        "error": verdict.error,
        "stock_error": verdict.eager_error,
        "worst": str(verdict)[:300],
    }


def main(out: str, *jobs: str) -> None:
    """Every job, on one checkpoint."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    with shared_folder() as folder:
        if dist.get_rank() == 0:
            h.checkpoint(folder / "model")
        dist.barrier()
        run_jobs(out, jobs, lambda strategy, trainer: job(strategy, trainer, folder / "model", folder / "out"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
