"""The device on which a model is loaded, and the dtype and quantisation that this device allows."""

from __future__ import annotations

import importlib.util
import os
import warnings
from typing import Any

import torch

from fastft.errors import DtypeError, QuantizationError
from fastft.parsing import parse_dtype


def placement(device_map: Any) -> Any:
    """The device map to load with: the user's, or one accelerator where there is one."""
    if not (isinstance(device_map, str) and device_map == "current"):
        return device_map
    if not torch.cuda.is_available():
        return None
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_enabled

    if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
        return None
    return {"": int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))}


def first_device(where: Any) -> torch.device:
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


def has_dtype(dtype: torch.dtype, device: torch.device) -> bool:
    """Can `device` compute in `dtype`?"""
    if dtype == torch.float64:
        return device.type != "mps"
    if dtype == torch.bfloat16 and device.type == "cuda" and torch.cuda.is_available():
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def resolve_dtype(dtype: Any, config: Any, device: torch.device) -> Any:
    """A torch dtype, or "auto" as given where the device has the checkpoint's own."""
    asked = dtype
    if isinstance(dtype, str) and dtype != "auto":
        asked = parse_dtype(dtype)
    if asked != "auto" and not (isinstance(asked, torch.dtype) and asked.is_floating_point):
        raise DtypeError(f'dtype={dtype!r} is no floating-point dtype: pass torch.bfloat16, float16, float32 or "auto"')
    if asked != "auto":
        if not has_dtype(asked, device):
            other = "float16" if asked == torch.bfloat16 else "float32"
            raise DtypeError(
                f"{_describe(device)} has no {str(asked).removeprefix('torch.')}: pass dtype=torch.{other}"
            )
        return asked
    stored = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stored, str):
        stored = parse_dtype(stored)
    if stored == torch.bfloat16 and not has_dtype(torch.bfloat16, device):
        warnings.warn(
            f"{_describe(device)} has no bfloat16, in which this checkpoint is stored: loading it in float16. "
            "Train with fp16=True, bf16=False; pass dtype to choose another.",
            stacklevel=3,
        )
        return torch.float16
    return "auto"


def _bitsandbytes_knows_cuda() -> bool:
    from bitsandbytes.cextension import lib

    return bool(getattr(lib, "compiled_with_cuda", False))


def _describe(device: torch.device) -> str:
    if device.type == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(device)
        return f"this {torch.cuda.get_device_name(device)} (sm_{major}{minor})"
    return f"this {device.type} device"


def quantization_config(
    in_4bit: bool, in_8bit: bool, dtype: Any, config: Any, device: torch.device, kwargs: dict
) -> Any:
    """bitsandbytes' configuration for the precision asked for; None for none."""
    if not (in_4bit or in_8bit):
        return None
    flag = "load_in_4bit=True" if in_4bit else "load_in_8bit=True"
    if in_4bit and in_8bit:
        raise QuantizationError("load_in_4bit and load_in_8bit were both given: choose one")
    if kwargs.get("quantization_config") is not None:
        raise QuantizationError(
            f"{flag} and quantization_config were both given: leave the flag out, the config says it all"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise QuantizationError(f"{flag} needs bitsandbytes, which is not installed: pip install bitsandbytes")
    if device.type == "cuda" and not _bitsandbytes_knows_cuda():
        raise QuantizationError(
            f"{flag} on a GPU needs bitsandbytes with its CUDA library, which is not there for CUDA "
            f"{torch.version.cuda or 'of this torch'}: pip install -U bitsandbytes (python -m bitsandbytes says more)"
        )
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
    best = torch.bfloat16 if has_dtype(torch.bfloat16, device) else torch.float16
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype if isinstance(dtype, torch.dtype) else best,
    )
