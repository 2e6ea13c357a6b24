"""FastModel.from_pretrained: transformers' loader, bitsandbytes' quantisation, PEFT's adapter, then `patch`.

The steps are those of a stock script, in the same order, so that the random stream is consumed in the same way and the adapter
starts from the same bits for the same seed. What is added is defaults, checks that fail in one line before gigabytes are read,
and the report.
"""

from __future__ import annotations

import copy
import importlib.util
import os
import warnings
from typing import Any

import torch
from torch import nn

from fastft.errors import (
    AdapterError,
    DtypeError,
    ModelNotFoundError,
    QuantizationError,
    SequenceLengthError,
    TargetModulesError,
)
from fastft.memory.policy import parse
from fastft.model.api import patch, report

# where to look: as good for an adapter as for its base
HUB_KEYS = ("token", "cache_dir", "force_download", "local_files_only", "proxies")
TASK_OF_CLASS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
AUTO_OF_TASK = {
    "CAUSAL_LM": None,  # a causal or an image-text model: the checkpoint says which
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}


class FastModel:
    """The one door: `FastModel.from_pretrained(...)` returns a standard PEFT (or transformers) model, patched."""

    def __init__(self) -> None:
        raise TypeError("FastModel is not a model: call FastModel.from_pretrained(name_or_path), which returns a PeftModel")

    @staticmethod
    def from_pretrained(
        name_or_path: str | os.PathLike,
        *,
        peft_config: Any = "lora",
        load_in_4bit: bool = False,
        load_in_8bit: bool = False,
        dtype: torch.dtype | str = "auto",
        max_seq_length: int | None = None,
        attn_implementation: str | None = None,
        device_map: Any = "current",
        auto_class: Any = None,
        is_trainable: bool = True,
        activation_policy: str | int = "auto",
        **kwargs: Any,
    ) -> Any:
        """Load a model, attach an adapter, patch, print the report once. Other keywords go to transformers' `from_pretrained`.

        name_or_path: a repository on the Hub or a folder: of a model, or of an adapter (its base is loaded, then it).
        peft_config: any PEFT config, taken as it is, but for a `task_type` that is absent (filled in on a copy, from the model's
            class). "lora", the default: LoRA on all linear layers, r=16, alpha=32. None: the bare model, for full fine-tuning.
        load_in_4bit: bitsandbytes NF4 with double quantisation; the compute dtype is `dtype` if it is a dtype, else bfloat16
            where the device has it, else float16. load_in_8bit: bitsandbytes LLM.int8. Anything else: `quantization_config`. The
            model is returned as PEFT makes it: no module is cast. TRL's trainers do the casts of QLoRA themselves; a loop of
            your own with reentrant gradient checkpointing calls `model.enable_input_require_grads()`, as with stock.
        dtype: a torch dtype, its name, or "auto" (the checkpoint's). bfloat16 on a GPU without it: an error when asked for by
            name; where it is only what the checkpoint says, float16 is taken and a warning says so.
        max_seq_length: the longest sequence you will train on, checked against the model's positions; truncation is your
            trainer's business (`SFTConfig(max_length=...)`).
        attn_implementation: passed through when given.
        device_map: "current", the default: the process's own GPU (the local rank's under a launcher), else no map at all (CPU,
            and where FSDP or DeepSpeed ZeRO-3 place the parameters). Anything else is transformers' own.
        auto_class: the class whose `from_pretrained` loads the model, such as AutoModelForSequenceClassification for a new reward
            model. By default the class that the checkpoint names.
        is_trainable: whether an adapter found at `name_or_path` is loaded for training.
        activation_policy: what is kept for the backward and what is computed again. "auto", the default, is about the layers that
            the trainer checkpoints (TRL does by default): of these it recomputes as few as the free memory asks for. The others:
            see `fastft.patch`. Gradients are the same bits under all of them.

        Returns a PeftModel (a PreTrainedModel with peft_config=None), in the mode (train or eval) in which stock returns it. The
        tokenizer is stock: AutoTokenizer.from_pretrained(name_or_path).
        Raises FastftError (a ValueError): ModelNotFoundError, QuantizationError, DtypeError, TargetModulesError, AdapterError,
        SequenceLengthError, PolicyError. Errors of transformers beyond these pass through unchanged.
        """
        policy = parse(activation_policy)
        name = os.fspath(name_or_path)
        if _is_path(name) and not os.path.exists(name):
            raise ModelNotFoundError(f"there is no folder {name!r}: give a model's or adapter's folder, or a name on the Hub")
        default_lora = isinstance(peft_config, str)
        if default_lora and peft_config != "lora":
            raise AdapterError(
                f"peft_config={peft_config!r}: pass a PEFT config such as LoraConfig(...), or None for the bare model, or nothing"
            )
        where = _placement(device_map)
        device = _first_device(where)
        adapter = _adapter_config(name, kwargs)
        if adapter is not None and peft_config is not None and not default_lora:
            raise AdapterError(
                f"{name} is an adapter already, and peft_config was given too: leave peft_config out to go on training it, "
                f"or load its base, {adapter.base_model_name_or_path!r}, with your peft_config"
            )

        base_name, base_kwargs = (name, kwargs) if adapter is None else _base_of(adapter, name, kwargs)
        config = _load_config(base_name, base_kwargs, adapter_at=name if adapter is not None else None)
        _check_length(max_seq_length, config)
        dtype = _resolve_dtype(base_kwargs.pop("torch_dtype", dtype), config, device)
        loader = auto_class if auto_class is not None else _class_for(config, getattr(adapter, "task_type", None), base_kwargs)
        load = dict(base_kwargs, dtype=dtype)
        if where is not None:
            load["device_map"] = where
        if attn_implementation is not None:
            load["attn_implementation"] = attn_implementation
        quantization = _quantization(load_in_4bit, load_in_8bit, dtype, config, device, base_kwargs)
        if quantization is not None:
            load["quantization_config"] = quantization

        model = loader.from_pretrained(base_name, **load)
        if adapter is not None:
            model = _load_adapter(model, name, kwargs, is_trainable)
        elif peft_config is not None:
            model = _attach(model, default_lora_config() if default_lora else peft_config, kwargs.get("revision"))

        patch(model, activation_policy=policy)
        if int(os.environ.get("RANK", "0")) == 0:
            from rich.console import Console

            Console().print(report(model))
        return model


def default_lora_config() -> Any:
    """LoRA on every linear layer but the head, r=16, alpha=32 (TRL's own defaults for both), no dropout."""
    from peft import LoraConfig

    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


# --- where


def _placement(device_map: Any) -> Any:
    if not (isinstance(device_map, str) and device_map == "current"):
        return device_map
    if not torch.cuda.is_available():
        return None
    from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

    if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
        return None
    return {"": int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))}


def _first_device(where: Any) -> torch.device:
    """The device that decides which dtypes exist: the first of the map, or the one a trainer will move the model to."""
    if isinstance(where, dict):
        where = next((d for d in where.values() if d not in ("cpu", "disk")), "cpu")
    if isinstance(where, int):
        return torch.device("cuda", where)
    if isinstance(where, torch.device):
        return where
    if isinstance(where, str) and where.split(":")[0] in ("cpu", "cuda", "mps", "xpu", "meta", "disk"):
        return torch.device("cpu" if where == "disk" else where)
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


# --- what


def _is_path(name: str) -> bool:
    """Whether the text can only be a path: the Hub's names have at most one slash and begin with a letter or digit."""
    return name.count("/") > 1 or name.startswith((".", "/", "~", "\\"))


def _adapter_config(name: str, kwargs: dict) -> Any:
    """The PEFT config at `name` if an adapter lies there, else None."""
    from peft import PeftConfig
    from transformers.utils.peft_utils import find_adapter_config_file

    hub = {k: kwargs[k] for k in HUB_KEYS if k in kwargs}
    places = {**hub, "revision": kwargs.get("revision"), "subfolder": kwargs.get("subfolder", "")}
    try:
        if find_adapter_config_file(name, **places) is None:
            return None
        return PeftConfig.from_pretrained(name, **{k: v for k, v in places.items() if v})
    except OSError as e:
        raise _not_found(name, e) from e


def _base_of(adapter: Any, name: str, kwargs: dict) -> tuple[str, dict]:
    if not adapter.base_model_name_or_path:
        raise AdapterError(f"the adapter at {name} names no base: set base_model_name_or_path in its adapter_config.json")
    base = {k: v for k, v in kwargs.items() if k not in ("revision", "subfolder")}
    return adapter.base_model_name_or_path, {**base, **({"revision": adapter.revision} if adapter.revision else {})}


def _load_config(name: str, kwargs: dict, adapter_at: str | None) -> Any:
    from transformers import AutoConfig, PreTrainedConfig

    if isinstance(kwargs.get("config"), PreTrainedConfig):
        return kwargs["config"]
    missing = not os.path.exists(os.path.join(name, kwargs.get("subfolder", ""), "config.json"))
    if os.path.isdir(name) and missing and not kwargs.get("gguf_file"):
        raise _not_found(name, OSError(), adapter_at)
    skip = ("config", "quantization_config", "torch_dtype")
    try:
        config, _ = AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, **{k: v for k, v in kwargs.items() if k not in skip}
        )
        return config
    except OSError as e:
        raise _not_found(name, e, adapter_at) from e


def _not_found(name: str, cause: OSError, adapter_at: str | None = None) -> ModelNotFoundError:
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, OfflineModeIsEnabled, RevisionNotFoundError

    chain, seen = [], cause
    while seen is not None and seen not in chain:
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    who = f"{name!r}" if adapter_at is None else f"{name!r}, the base of the adapter at {adapter_at},"
    has = lambda kind: any(isinstance(e, kind) for e in chain)
    if os.path.isdir(name):
        return ModelNotFoundError(f"the folder {who} has no config.json: give the folder that save_pretrained wrote")
    if has(GatedRepoError):
        return ModelNotFoundError(f"{who} is gated: accept its terms on its page on the Hub, then run `hf auth login`")
    if has(RevisionNotFoundError):
        return ModelNotFoundError(f"{who} has no such revision: leave revision out, or take one from its page on the Hub")
    if has((LocalEntryNotFoundError, OfflineModeIsEnabled)):
        return ModelNotFoundError(
            f"{who} is neither a folder here nor in the local cache, and the Hub was not reached: check the name or the network"
        )
    return ModelNotFoundError(
        f"{who} is neither a folder here nor a repository on the Hub that you can read: check the spelling; "
        "for a private one run `hf auth login`"
    )


def _class_for(config: Any, task: str | None, kwargs: dict) -> Any:
    """The class that the checkpoint names (as TRL chooses); for an adapter on a classification task that task's auto class."""
    import transformers

    if task is not None and AUTO_OF_TASK.get(str(getattr(task, "value", task))):
        return getattr(transformers, AUTO_OF_TASK[str(getattr(task, "value", task))])
    named = (config.architectures or [None])[0]
    found = getattr(transformers, named, None) if named else None
    if found is not None:
        return found
    remote = getattr(config, "auto_map", None) or {}
    for auto in ("AutoModelForImageTextToText", "AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        if auto in remote and kwargs.get("trust_remote_code"):
            return getattr(transformers, auto)
    return transformers.AutoModelForCausalLM


def _check_length(wanted: int | None, config: Any) -> None:
    if wanted is None:
        return
    if not isinstance(wanted, int) or wanted < 1:
        raise SequenceLengthError(f"max_seq_length={wanted!r}: want a positive number of tokens")
    has = getattr(config.get_text_config(), "max_position_embeddings", None)
    if isinstance(has, int) and wanted > has:
        raise SequenceLengthError(
            f"max_seq_length={wanted}, but this model has {has} positions: train on at most {has} tokens, or extend it knowingly "
            f"(pass max_position_embeddings={wanted}, with rope_parameters that scale where the model needs them)"
        )


# --- in which numbers


def _has_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.float64:
        return device.type != "mps"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def _resolve_dtype(dtype: Any, config: Any, device: torch.device) -> Any:
    """A torch dtype, or "auto" as given where the device has the checkpoint's own."""
    asked = dtype
    if isinstance(dtype, str) and dtype != "auto":
        asked = getattr(torch, dtype.removeprefix("torch."), None)
    if asked != "auto" and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise DtypeError(f'dtype={dtype!r} is no floating-point dtype: pass torch.bfloat16, float16, float32 or "auto"')
    if asked != "auto":
        if not _has_dtype(asked, device):
            other = "float16" if asked == torch.bfloat16 else "float32"
            raise DtypeError(f"{_describe(device)} has no {str(asked).removeprefix('torch.')}: pass dtype=torch.{other}")
        return asked
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if stored == torch.bfloat16 and not _has_dtype(torch.bfloat16, device):
        warnings.warn(
            f"{_describe(device)} has no bfloat16, in which this checkpoint is stored: loading it in float16. "
            "Train with fp16=True, bf16=False; pass dtype to choose another.",
            stacklevel=3,
        )
        return torch.float16
    return "auto"


def _describe(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"this {torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return f"this {device.type} device"


def _quantization(in_4bit: bool, in_8bit: bool, dtype: Any, config: Any, device: torch.device, kwargs: dict) -> Any:
    if not (in_4bit or in_8bit):
        return None
    flag = "load_in_4bit=True" if in_4bit else "load_in_8bit=True"
    if in_4bit and in_8bit:
        raise QuantizationError("load_in_4bit and load_in_8bit were both given: choose one")
    if kwargs.get("quantization_config") is not None:
        raise QuantizationError(f"{flag} and quantization_config were both given: leave the flag out, the config says it all")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise QuantizationError(f"{flag} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    stored = getattr(config, "quantization_config", None)
    if stored is not None:
        get = stored.get if isinstance(stored, dict) else lambda key, default=None: getattr(stored, key, default)
        if get(flag.split("=")[0], False):
            return None  # quantised so on disk: the checkpoint's own config holds
        how = get("quant_method", "by an unnamed method")
        raise QuantizationError(f"this checkpoint is quantised already ({how}): leave {flag} out")
    from transformers import BitsAndBytesConfig

    if in_8bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    best = torch.bfloat16 if _has_dtype(torch.bfloat16, device) else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else best,
    )


# --- the adapter


def _task_of(model: nn.Module) -> str | None:
    for ending, task in TASK_OF_CLASS.items():
        if type(model).__name__.endswith(ending):
            return task
    if model.can_generate():
        return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return None


def _attach(model: nn.Module, peft_config: Any, revision: str | None) -> nn.Module:
    from peft import get_peft_model

    if getattr(peft_config, "task_type", None) is None:
        peft_config = copy.deepcopy(peft_config)
        peft_config.task_type = _task_of(model)
    try:
        return get_peft_model(model, peft_config, **({"revision": revision} if revision else {}))
    except ValueError as e:
        targets = getattr(peft_config, "target_modules", None)
        if targets and not _matches(model, targets):
            raise TargetModulesError(
                f"target_modules={_shown(targets)} match nothing in this {type(model).__name__}: "
                f'its linear layers are named {", ".join(_linear_names(model))}; or pass target_modules="all-linear"'
            ) from e
        raise


def _matches(model: nn.Module, targets: Any) -> bool:
    """Whether any module's name would be a target, by PEFT's rule: a full match of a pattern, or an ending of the dotted name."""
    import re

    names = [n for n, _ in model.named_modules()]
    if isinstance(targets, str):
        return targets == "all-linear" or any(re.fullmatch(targets, n) for n in names)
    return any(n == t or n.endswith(f".{t}") for t in targets for n in names)


def _linear_names(model: nn.Module) -> list[str]:
    head = model.get_output_embeddings()
    return sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head})


def _shown(targets: Any) -> str:
    return repr(targets) if isinstance(targets, str) else repr(sorted(targets))


def _load_adapter(base: nn.Module, name: str, kwargs: dict, is_trainable: bool) -> nn.Module:
    from peft import PeftModel

    places = {k: kwargs[k] for k in (*HUB_KEYS, "revision", "subfolder") if k in kwargs}
    try:
        return PeftModel.from_pretrained(base, name, is_trainable=is_trainable, **places)
    except RuntimeError as e:
        if "size mismatch" not in str(e):
            raise
        first = next(line.strip() for line in str(e).splitlines() if "size mismatch" in line)
        raise AdapterError(
            f"the adapter at {name} does not fit its base {base.name_or_path!r} ({first}): "
            "load the base it was trained on (for a classifier, with its num_labels)"
        ) from e
