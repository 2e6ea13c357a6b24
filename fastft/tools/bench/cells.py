"""The trainers of `fastft bench`: TRL's own, on made tokens, watched step by step.

sft     rows as short as instructions are, padded      long    one row, ever longer until memory ends
packed  the same rows, packed to the full length       dpo     pairs; the reference is a copy of the adapter
grpo    the log-probability step alone: generation is not this library's work, and completions are given
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch

from fastft.compat.transformers_private import set_prepare_inputs, use_sampler
from fastft.tools.bench.spec import Spec, row_lengths, tokens
from fastft.tools.bench.stacks import STACK_SETTINGS, autocast, device


def make_trainer(
    spec: Spec,
    cell: str,
    model: Any,
    tokenizer: Any,
    *,
    steps: int,
    checkpointing: bool,
    seq: int,
    rate: float,
    callbacks: list,
) -> Any:
    """TRL's trainer of `cell` for `steps` steps. rate: learning rate; 0 leaves the adapter as it is."""
    from transformers import PrinterCallback

    exact = spec.stack == "reference"
    low = None if exact else autocast()
    common = dict(
        output_dir=str(Path(spec.folder) / "trainer"),
        max_steps=steps,
        per_device_train_batch_size=1 if cell == "long" else spec.batch,
        logging_steps=10**6,
        report_to="none",
        save_strategy="no",
        learning_rate=rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        optim="adamw_torch",
        seed=spec.seed,
        bf16=low == torch.bfloat16,
        fp16=low == torch.float16,
        use_cpu=device().type == "cpu",
        gradient_checkpointing=checkpointing,
        disable_tqdm=True,
        dataloader_pin_memory=device().type == "cuda",
        **dict(STACK_SETTINGS[spec.stack].trainer),
    )
    if device().type == "cuda":
        common["optim"] = "adamw_torch_fused"
    make = {"dpo": _dpo, "grpo": _grpo}.get(cell, _sft)
    trainer = make(spec, cell, model, tokenizer, steps, seq, common)
    trainer.remove_callback(PrinterCallback)
    in_order = lambda *args, **kwargs: torch.utils.data.SequentialSampler(args[0] if args else trainer.train_dataset)
    use_sampler(trainer, in_order)
    for callback in callbacks:
        trainer.add_callback(callback)
    return trainer


def _sft(spec: Spec, cell: str, model: Any, tokenizer: Any, steps: int, seq: int, common: dict) -> Any:
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    g, packed = random.Random(spec.seed), cell == "packed"
    count = common["per_device_train_batch_size"] * steps
    lengths = row_lengths(spec, cell, count, seq)
    while packed and sum(lengths) < 1.5 * seq * count:
        lengths = lengths + lengths
    data = Dataset.from_dict({"input_ids": [tokens(n, len(tokenizer), g) for n in lengths]})
    args = SFTConfig(max_length=seq, packing=packed, **common)
    return SFTTrainer(model=model, args=args, train_dataset=data, processing_class=tokenizer)


def _dpo(spec: Spec, cell: str, model: Any, tokenizer: Any, steps: int, seq: int, common: dict) -> Any:
    from datasets import Dataset
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer

    g, n = random.Random(spec.seed), spec.batch * steps
    draw = lambda: [tokens(max(2, m // 2), len(tokenizer), g) for m in row_lengths(spec, cell, n, seq)]
    text = {k: [tokenizer.decode(x) for x in draw()] for k in ("prompt", "chosen", "rejected")}
    args = DPOConfig(max_length=seq, **common)
    trainer = DPOTrainer(
        model=model,
        args=args,
        train_dataset=Dataset.from_dict({k: v[:1] for k, v in text.items()}),
        processing_class=tokenizer,
    )
    # tokens, not what a tokenizer makes of their text
    trainer.train_dataset = Dataset.from_dict({"prompt_ids": draw(), "chosen_ids": draw(), "rejected_ids": draw()})
    return trainer


def _grpo(spec: Spec, cell: str, model: Any, tokenizer: Any, steps: int, seq: int, common: dict) -> Any:
    from datasets import Dataset
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    rows = spec.batch + spec.batch % 2
    prompt = max(1, seq // 4)
    data = Dataset.from_dict(
        {"prompt": [tokenizer.decode(tokens(4, len(tokenizer), random.Random(i))) for i in range(rows * steps)]}
    )
    common = common | {"per_device_train_batch_size": rows}
    args = GRPOConfig(num_generations=2, max_completion_length=seq - prompt, **common)
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=args,
        train_dataset=data,
        processing_class=tokenizer,
    )
    g, step = random.Random(spec.seed), iter(range(10**9))

    def given(inputs: Any) -> dict[str, torch.Tensor]:
        where = device()
        ids = torch.tensor([tokens(seq, len(tokenizer), g) for _ in range(rows)], device=where)
        advantages = torch.randn(rows, generator=torch.Generator().manual_seed(next(step))).to(where)
        one = torch.ones_like(ids)
        return {
            "prompt_ids": ids[:, :prompt],
            "prompt_mask": one[:, :prompt],
            "completion_ids": ids[:, prompt:],
            "completion_mask": one[:, prompt:],
            "advantages": advantages,
            "num_items_in_batch": torch.tensor(rows * (seq - prompt), device=where),
        }

    set_prepare_inputs(trainer, given)
    return trainer


def lengths_in(inputs: dict[str, Any]) -> list[int]:
    """Non-padding tokens of each row, or of each document of a packed one."""
    if "prompt_mask" in inputs:
        return (inputs["prompt_mask"].sum(-1) + inputs["completion_mask"].sum(-1)).tolist()
    if "attention_mask" in inputs:
        return inputs["attention_mask"].sum(-1).tolist()
    rows, n = inputs["input_ids"].shape
    if "position_ids" not in inputs:
        return [n] * rows
    starts = torch.cat([(p == 0).nonzero()[:, 0] + i * n for i, p in enumerate(inputs["position_ids"])]).tolist()
    return [b - a for a, b in zip(starts, [*starts[1:], rows * n])]
