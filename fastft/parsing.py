"""What a user writes as text, parsed in one place: amounts of memory and dtypes."""

from __future__ import annotations

import re

import torch

_UNITS = {"MIB": 2**20, "GIB": 2**30, "MB": 10**6, "GB": 10**9}
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def parse_bytes(text: str) -> int | None:
    """Bytes of "16GiB", "500 MB", "1.5gb"; None for anything else, and for nothing at all."""
    found = re.fullmatch(r"(\d+(?:\.\d*)?)\s*(MiB|GiB|MB|GB)", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _UNITS[found[2].upper()]) if found else 0
    return size or None


def parse_dtype(name: str) -> torch.dtype | None:
    """The floating-point dtype of "bfloat16", "torch.float32", "bf16", ...; None for what is none."""
    name = name.removeprefix("torch.")
    found = getattr(torch, _SHORT.get(name, name), None)
    return found if isinstance(found, torch.dtype) and found.is_floating_point else None
