"""One fine-tuning run through TRL's SFTTrainer, with stock or fastft, from the same seed: its losses, time and memory.

A run is what a user writes: load, `SFTTrainer(model=model, args=SFTConfig(...), train_dataset=...)`, `.train()`. The
trainer is only watched: each step's loss is noted to its last bit as training_step returns it (the log holds float32),
times in a callback. Stock loads with transformers and PEFT alone."""

from __future__ import annotations

import gc
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastft.proving.float64 import float64_reference
from fastft.tools.tokenizer import load_tokenizer


@dataclass(frozen=True)
class DemoSettings:
    """What all runs of one demo share. `small` is the demo's own model: float32 throughout, no checkpointing."""

    model: str
    train: Any
    held_out: Any
    out: Path
    steps: int = 60
    seed: int = 0
    four_bit: bool = False
    small: bool = True

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def autocast(self) -> torch.dtype | None:
        """What TRL trains in on this machine: its own default where there is a GPU; nothing for the demo's own
        model."""
        if self.small or self.device.type != "cuda":
            return None
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@dataclass
class TrainingRun:
    """Outcome of one run. `tokens`: of each step, padding left out; `saved_bytes` is what autograd keeps for the
    backward pass of one step, parameters excluded; `peak_bytes` is the CUDA allocator's peak during training (0 without
    a GPU)."""

    name: str
    losses: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int = 0
    saved_bytes: int = 0
    held_out_loss: float = float("nan")

    @property
    def median_step(self) -> float:
        return statistics.median(self.step_seconds) if self.step_seconds else float("nan")

    @property
    def tokens_per_second(self) -> float:
        """Of the median step."""
        rates = [n / s for n, s in zip(self.tokens, self.step_seconds) if s > 0]
        return statistics.median(rates) if rates else float("nan")

    def to_dict(self) -> dict:
        return {
            "losses": self.losses,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens_per_second,
            "seconds": self.seconds,
            "median_step_seconds": self.median_step,
            "saved_bytes_one_step": self.saved_bytes,
            "peak_cuda_bytes": self.peak_bytes,
            "held_out_loss": self.held_out_loss,
        }


def load_fast(job: DemoSettings):
    """The demo's model through `FastModel`."""
    from fastft import FastModel

    torch.manual_seed(job.seed)
    return FastModel.from_pretrained(job.model, load_in_4bit=job.four_bit)


def load_stock(job: DemoSettings, *, exact: bool = False):
    """The same model without a line of fastft, from the same seed, as a stock script loads it. `exact`: the same
    weights, bit for bit, in the dtype of `truth_dtype`."""
    import transformers
    from peft import LoraConfig, get_peft_model

    config = transformers.AutoConfig.from_pretrained(job.model)
    loader = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
    kwargs: dict[str, Any] = {"dtype": "auto"}
    if job.device.type == "cuda":
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    if job.four_bit:
        bf16 = job.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if exact else torch.bfloat16 if bf16 else torch.float16,
        )
        if exact:
            kwargs["dtype"] = torch.float32
    torch.manual_seed(job.seed)
    model = loader.from_pretrained(job.model, **kwargs)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    return model.to(truth_dtype(job)) if exact and not job.four_bit else model


def truth_dtype(job: DemoSettings) -> torch.dtype:
    """float64 for a run that is float32 throughout, else float32: against 16 bit it is as good as exact, and fits."""
    from transformers import AutoConfig

    stored = AutoConfig.from_pretrained(job.model).dtype
    whole = job.autocast is None and not job.four_bit and stored in (None, torch.float32, "float32")
    return torch.float64 if whole else torch.float32


def make_trainer(
    job: DemoSettings,
    model,
    tokenizer,
    *,
    exact: bool = False,
    on_step: Callable[[int], None] | None = None,
    timings: list[float] | None = None,
):
    """TRL's SFTTrainer with the demo's settings."""
    from transformers import PrinterCallback, TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            if job.device.type == "cuda":
                torch.cuda.synchronize()
            if timings is not None:
                timings.append(time.perf_counter() - self.begun)
            if on_step is not None:
                on_step(state.global_step)

    ours = {}
    if job.small:  # float32, every step's loss to its last bit
        ours = {
            "bf16": False,
            "gradient_checkpointing": False,
            "learning_rate": 5e-3,
            # Adam's first step alone would turn rounding of tiny gradients into moves
            "warmup_steps": max(1, job.steps // 10),
            "max_length": 192,
            "completion_only_loss": False,
        }
    else:
        auto = None if exact else job.autocast
        ours = {
            "bf16": auto == torch.bfloat16,
            "fp16": auto == torch.float16,
            "learning_rate": 2e-4,
            "max_length": 1024,
        }
    args = SFTConfig(
        output_dir=str(job.out / "trainer"),
        max_steps=job.steps,
        per_device_train_batch_size=8 if job.small else 2,
        per_device_eval_batch_size=8 if job.small else 2,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=job.seed,
        use_cpu=job.device.type == "cpu",
        dataloader_pin_memory=job.device.type == "cuda",
        **ours,
    )
    trainer = SFTTrainer(
        model=model,
        args=args,
        train_dataset=job.train,
        eval_dataset=job.held_out,
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    trainer.remove_callback(PrinterCallback)  # the progress bar is the demo's
    return trainer


def train(
    job: DemoSettings,
    model,
    name: str,
    *,
    reordered: bool = False,
    exact: bool = False,
    measure: bool = True,
    on_step: Callable[[int], None] | None = None,
) -> TrainingRun:
    """Train `model` for job.steps steps. `reordered`: the rows of every batch reversed and padded further, which is the
    same mathematics in another order of summation; `exact`: in the dtype of `truth_dtype` throughout, for a model
    loaded so; `measure` adds held-out loss and bytes saved for backward."""
    run = TrainingRun(name)
    trainer = make_trainer(
        job, model, load_tokenizer(job.model), exact=exact, on_step=on_step, timings=run.step_seconds
    )
    if reordered:
        collate: Any = trainer.data_collator
        if hasattr(collate, "pad_to_multiple_of"):
            collate.pad_to_multiple_of = 64
        trainer.data_collator = lambda batch: collate(batch[::-1])
    # TRL has rounded the adapter as QLoRA does; from these same bits it is trained in full here
    if exact and job.four_bit:
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()
    step = trainer.training_step

    def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        mask = inputs.get("attention_mask")
        run.tokens.append(int(mask.sum()) if mask is not None else inputs["input_ids"].numel())
        loss = step(model, inputs, *args, **kwargs)
        run.losses.append(loss.item())
        return loss

    trainer.training_step = watched
    if job.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with float64_reference() if exact and truth_dtype(job) == torch.float64 else nullcontext():
        trainer.train()
    run.seconds = time.perf_counter() - start
    if job.device.type == "cuda":
        run.peak_bytes = torch.cuda.max_memory_allocated()
    if measure:
        run.saved_bytes = saved_bytes(trainer)
        run.held_out_loss = trainer.evaluate()["eval_loss"]
    del trainer
    gc.collect()
    return run


def held_out_loss(job: DemoSettings, model) -> float:
    """Mean loss over the held-out set."""
    return make_trainer(job, model, load_tokenizer(job.model)).evaluate()["eval_loss"]


def saved_bytes(trainer) -> int:
    """Bytes of distinct storages that autograd packs for the backward of one step's loss, the model's own tensors
    excluded."""
    model = trainer.model.train()
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}  # held until the end, so that no address is used twice

    def pack(t: torch.Tensor) -> torch.Tensor:
        if isinstance(t, torch.Tensor) and t.device.type != "meta" and t.untyped_storage().data_ptr() not in own:
            kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = trainer.compute_loss(model, batch)
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    loss.backward()
    model.zero_grad(set_to_none=True)
    return total


def sample_prompt(job: DemoSettings, row: dict, tokenizer) -> str:
    """What is asked before and after. Of the demo's own rows the prompt up to its signature: the model has to know what
    comes next, the heading and then a docstring. Of a user's rows `prompt_of`."""
    prompt = prompt_of(row, tokenizer)
    return prompt.removesuffix("### Docstring\n") if job.small else prompt


def prompt_of(row: dict, tokenizer) -> str:
    """The part of a held-out row that a model is asked with: its prompt, its messages but the last, or the first half
    of its text."""
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    messages = row.get("prompt") or (row["messages"][:-1] if "messages" in row else None)
    if messages:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return row["text"][: max(1, len(row["text"]) // 2)]


def complete(model, tokenizer, prompt: str, tokens: int = 48) -> str:
    """Greedy completion of `prompt`."""
    device = next(model.parameters()).device
    ids = tokenizer(prompt, return_tensors="pt").to(device)
    was_training = model.training
    model.eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = model.generate(
            input_ids=ids.input_ids,
            attention_mask=ids.attention_mask,
            max_new_tokens=tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    model.train(was_training)
    return tokenizer.decode(out[0, ids.input_ids.shape[1] :], skip_special_tokens=True).strip()
