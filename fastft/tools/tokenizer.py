"""The tokenizer of a checkpoint, as every command loads it."""

from __future__ import annotations

from typing import Any


def load_tokenizer(name_or_path: str) -> Any:
    """AutoTokenizer's; where it has no padding token, the end-of-sequence token pads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
