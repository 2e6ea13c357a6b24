"""How each stack of `fastft bench` loads: the same checkpoint, the same adapter, as that stack's own documentation
says.

stock      transformers + PEFT + TRL, everything at its default
best       the same with cuDNN's attention first on a GPU, and no checkpointing where it fits
liger      stock with use_liger_kernel=True
unsloth    its own loader and checkpointing, this adapter copied in by name
fastft     FastModel.from_pretrained and the trainer's defaults, nothing else; cuDNN's attention first, as for best
reference  stock in high precision: what the others are judged by
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastft.tools.bench.spec import NEEDS, Spec

FLOAT64_BYTES = 6 << 30  # a model that takes more in float64 is judged in float32, if it is stored in 16 bits


class MissingPeer(Exception):
    """The package that this stack is, is not installed; the text names it."""


@dataclass(frozen=True)
class StackSettings:
    """How a stack is run. tries: checkpointing on or off, in turn until one fits; trainer: more arguments for TRL's
    configuration."""

    tries: tuple[bool, ...] = (True,)
    tuned: bool = False
    trainer: tuple[tuple[str, Any], ...] = ()


STACK_SETTINGS = {
    "stock": StackSettings(),
    "best": StackSettings(tries=(False, True), tuned=True),
    "liger": StackSettings(trainer=(("use_liger_kernel", True),)),
    "unsloth": StackSettings(),
    "fastft": StackSettings(tuned=True),
    "reference": StackSettings(tries=(True,)),
}


def check_peer(stack: str) -> None:
    """Raises MissingPeer where the library of `stack` is not installed."""
    package = NEEDS.get(stack)
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingPeer(f"{package} is not installed")


def device() -> torch.device:
    """The device that is measured."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.dtype | None:
    """What a trainer runs in on this machine: TRL's default where there is a GPU; nothing on a CPU."""
    if device().type != "cuda":
        return None
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@contextlib.contextmanager
def attention(tuned: bool):
    """cuDNN's attention before flash attention, on a GPU and for a stack that is tuned."""
    if not tuned or device().type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    with sdpa_kernel(order, set_priority=True):
        yield


def load(spec: Spec) -> Any:
    """The PEFT model of a stack. Raises MissingPeer."""
    check_peer(spec.stack)
    torch.manual_seed(spec.seed)
    adapter = str(Path(spec.folder) / "adapter")
    if spec.stack == "reference":
        return _load_reference(spec, adapter)
    if spec.stack == "fastft":
        from fastft import FastModel

        return FastModel.from_pretrained(adapter, load_in_4bit=spec.four_bit)
    if spec.stack == "unsloth":
        return _load_unsloth(spec, adapter)
    from peft import PeftModel

    return PeftModel.from_pretrained(_load_base(spec), adapter, is_trainable=True)


def _load_base(spec: Spec, exact: torch.dtype | None = None) -> Any:
    """exact: the dtype of a high-precision run; a quantised weight then stands for the matrix that it is, multiplied in
    that dtype."""
    import transformers

    kwargs: dict[str, Any] = {"dtype": "auto" if exact is None else exact}
    if device().type == "cuda":
        kwargs["device_map"] = {"": torch.cuda.current_device()}
    if spec.four_bit:
        compute = exact or autocast() or torch.bfloat16
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
        )
    return transformers.AutoModelForCausalLM.from_pretrained(spec.model, **kwargs)


def reference_dtype(spec: Spec) -> torch.dtype:
    """float64 where it is small enough or where 32 bits are stored; float32 judges 16 bits as well, and a 4-bit base
    has no float64."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(spec.model)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(config).parameters())
    low = config.dtype in (torch.bfloat16, torch.float16)
    return torch.float32 if spec.four_bit or (low and 8 * parameters > FLOAT64_BYTES) else torch.float64


def _load_reference(spec: Spec, adapter: str) -> Any:
    """Also draws the adapter that all stacks load: PEFT's initialisation, and B small and random, for at zero no
    gradient reaches A and no error there would be seen."""
    from peft import LoraConfig, get_peft_model

    dtype = reference_dtype(spec)
    base = _load_base(spec, dtype if spec.four_bit else None)
    base = base if spec.four_bit else base.to(dtype)
    config = LoraConfig(r=spec.rank, lora_alpha=2 * spec.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(spec.seed)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    for name, p in model.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            g = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            drawn = p.detach().float() if "lora_A" in name else torch.randn(p.shape, generator=g).to(p.device) * 0.02
            p.data = drawn.to(torch.bfloat16).to(dtype)  # values that every dtype holds exactly
    model.peft_config["default"].base_model_name_or_path = spec.model
    model.save_pretrained(adapter)
    return model


def _load_unsloth(spec: Spec, adapter: str) -> Any:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    unsloth = importlib.import_module("unsloth")  # its worker imported it first
    longest = max(spec.seq, *spec.lengths)
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        spec.model, max_seq_length=longest, dtype=autocast(), load_in_4bit=spec.four_bit
    )
    saved = load_file(str(Path(adapter) / "adapter_model.safetensors"))
    targets = sorted({k.split(".lora_")[0].rsplit(".", 1)[-1] for k in saved})
    model = unsloth.FastLanguageModel.get_peft_model(
        model,
        r=spec.rank,
        lora_alpha=2 * spec.rank,
        lora_dropout=0,
        bias="none",
        target_modules=targets,
        random_state=spec.seed,
        use_gradient_checkpointing="unsloth",
    )
    set_peft_model_state_dict(model, saved)
    return model
