"""Steps of a small model through TRL's `SFTTrainer`, stock and fastft: what the trainer itself costs is in both."""

from __future__ import annotations

import statistics
import tempfile
import time

import torch

import fastft
from benchmarks.gpu_models import HAS_TRL, batch, build, config_small
from benchmarks.sheet import Figures, Missing
from fastft.tools.bench.timing import synchronize


def trainer_step(stack: str, tiny: bool, device: torch.device, lengths: list[int], steps: int = 24) -> Figures:
    """The median of the steps after the first eight. TRL's defaults but for what is written here; checkpointing is off,
    as a model of this size needs none. Raises Missing without TRL."""
    if not HAS_TRL:
        raise Missing("the trainer's steps need trl, which is not installed")
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            synchronize(device)
            self.begun = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs) -> None:
            synchronize(device)
            self.seconds.append(time.perf_counter() - self.begun)

    model = build(config_small(tiny), device)
    ids = batch(lengths * steps, model.config.vocab_size, torch.device("cpu"))["input_ids"].tolist()
    clock = Clock()
    if stack == "fastft":
        fastft.patch(model, activation_policy="none")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=len(lengths),
            gradient_checkpointing=False,
            bf16=True,
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_steps=4,
            max_length=None,
            disable_tqdm=True,
        )
        trainer = SFTTrainer(
            model=model,
            args=args,
            train_dataset=Dataset.from_dict({"input_ids": ids}),
            processing_class=_tokenizer(),
            callbacks=[clock],
        )
        trainer.train()
    found: Figures = {"step ms": statistics.median(clock.seconds[8:]) * 1e3, "first step ms": clock.seconds[0] * 1e3}
    if stack == "fastft":
        found["notes"] = "; ".join(n for n in fastft.report(model).notes if "CUDA graphs" in n)
    return found


def _tokenizer():
    """Nothing is encoded with it: the rows are tokens already."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {w: i for i, w in enumerate(("<pad>", "<eos>", "<unk>"))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
