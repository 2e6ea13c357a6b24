"""The same trainer run three ways from one seed: stock, fastft, and stock in float64 (the reference). What comes back:
the loss of every step as `training_step` returned it, one curve, and the final adapter."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    LlamaConfig,
    PreTrainedTokenizerFast,
    set_seed,
)

import fastft
from fastft.proving.float64 import float64_reference
from fastft_kernels.numerics import Verdict, compare

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wise",
    "owls",
    "watch",
    "from",
    "their",
    "old",
    "oak",
    "tree",
    "near",
    "the",
    "river",
    "bend",
]
TEXTS = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(6 + i % 5)) for i in range(24)]
SIZES = dict(
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=128,
)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    t = Tokenizer(models.BPE(unk_token="<unk>"))
    t.pre_tokenizer = pre_tokenizers.ByteLevel()
    t.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<unk>", "<pad>", "<s>", "</s>"], show_progress=False),
    )
    template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=t,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        chat_template=template,
    )


def checkpoint(folder: Path, classifier: bool = False, vocab: int = 0, seed: int = 0) -> Path:
    """A tiny model on disk, the same bits every time. vocab: of the model, where it is to be larger than the
    tokenizer's."""
    if not (folder / "config.json").exists():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab or len(tokenizer()),
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=3,
            **({"num_labels": 1} if classifier else {}),
            **SIZES,
        )
        (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(
            config
        ).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
    return folder


def load(
    folder: Path,
    way: str,
    *,
    classifier: bool = False,
    four_bit: bool = False,
    eight_bit: bool = False,
    lora: bool = True,
    **settings,
):
    """way: "stock", "fastft" or "reference"."""
    auto = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    quantised = {}
    if four_bit:
        quantised["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        )
    if eight_bit:
        quantised["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    set_seed(0)
    model = auto.from_pretrained(folder, dtype=torch.float32, **quantised)
    for (
        module
    ) in model.modules():  # bitsandbytes' inference in bfloat16, after which it cannot train: the same on every CPU
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if quantised and way == "reference":
        model = model.dequantize()
    if lora:
        task = "SEQ_CLS" if classifier else "CAUSAL_LM"
        set_seed(0)
        model = get_peft_model(
            model,
            LoraConfig(
                r=4,
                target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
                task_type=task,
                **settings,
            ),
        )
        g = torch.Generator().manual_seed(1)
        for n, p in sorted(model.named_parameters()):
            if "lora_B" in n:
                p.data.copy_(torch.randn(p.shape, generator=g) * 0.05)
    if quantised:  # TRL casts the adapters of a quantised model to bfloat16: all three ways start there
        for p in (p for p in model.parameters() if p.requires_grad):
            p.data = p.data.bfloat16().to(p.dtype)
    if way == "reference":
        model = model.double()
    return fastft.patch(model) if way == "fastft" else model


def pairs() -> Dataset:
    return Dataset.from_list([{"prompt": TEXTS[i], "completion": " " + TEXTS[(i + 5) % 24]} for i in range(24)])


def preferences() -> Dataset:
    return Dataset.from_list(
        [
            {"prompt": TEXTS[i], "chosen": " " + TEXTS[(i + 5) % 24], "rejected": " " + TEXTS[(i + 11) % 24]}
            for i in range(24)
        ]
    )


def arguments(config: type, out: Path, steps: int, **settings):
    """SGD: Adam divides by the gradient's own size, and so shows rounding where a gradient is nearly zero."""
    common = dict(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        bf16=False,
        fp16=False,
        use_cpu=not torch.cuda.is_available(),
        gradient_checkpointing=False,
        dataloader_num_workers=0,
        seed=0,
    )
    return config(**{**common, **settings})


def run(make: Callable[[str], object], way: str, *, as_trl_casts: bool = False) -> dict[str, torch.Tensor]:
    """make(way) -> a trainer. Returns every step's loss and the parameters that trained. as_trl_casts: the adapters of
    a 4-bit model train in bfloat16, as TRL makes them; otherwise in float32, where small defects show. (Only training
    runs as the reference: a 4-bit model quantised in float64 would be another.)"""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_seed(0)
        trainer = make(way)
        if way == "reference" or not as_trl_casts:
            for p in (p for p in trainer.model.parameters() if p.requires_grad and p.dtype == torch.bfloat16):
                p.data = p.data.double() if way == "reference" else p.data.float()
        losses, step = [], trainer.training_step

        def watched(*args, **kwargs):
            losses.append(step(*args, **kwargs).detach().clone())
            return losses[-1]

        trainer.training_step = watched
        with float64_reference() if way == "reference" else contextlib.nullcontext():
            trainer.train()
    found = {"losses": torch.stack(losses)}  # judged as a curve: a single number may be exact by luck
    found |= {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {k: v.double() if way == "reference" else v for k, v in found.items()}


def judged(make: Callable[[str], object], **settings) -> Verdict:
    stock, ours, reference = (run(make, way, **settings) for way in ("stock", "fastft", "reference"))
    assert len(ours["losses"].unique()) > 1, "nothing was learnt"
    verdict = compare(ours, reference, stock)
    assert verdict.eager_error < 0.05, f"stock is not where its own float64 run is, so nothing is judged: {verdict}"
    return verdict
