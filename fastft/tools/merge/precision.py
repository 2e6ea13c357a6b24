"""What an adapter was trained on: the base in 4 bits, or as it is stored. PEFT keeps it in the README.md that it writes
beside an adapter; else a base that is stored in 4 bits says it."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import torch

from fastft.errors import AdapterError
from fastft.tools.merge.base import found_already, packed, read_json
from fastft.tools.merge.merge_plan import MergePlan

CHOICES = ("trained", "original", "nf4", "fp4", "fp8")


def trained_in(adapter: Path, base: str | None, revision: str | None) -> tuple[str, bool] | None:
    """(4-bit type, double quantisation), or None: in 16 bits or more, or nothing says it."""
    card = adapter / "README.md"
    said = dict(re.findall(r"^- (\w+): (\S+)$", card.read_text(errors="replace"), flags=re.M)) if card.is_file() else {}
    if said.get("load_in_4bit") == "True":
        return said.get("bnb_4bit_quant_type", "fp4"), said.get("bnb_4bit_use_double_quant") == "True"
    named = found_already(base, revision)
    if named is None or not (named / "config.json").is_file():
        return None
    stored = read_json(named / "config.json").get("quantization_config") or {}
    if stored.get("load_in_4bit"):
        return stored.get("bnb_4bit_quant_type", "fp4"), bool(stored.get("bnb_4bit_use_double_quant"))
    return None


def take_precision(plan: MergePlan, base: Path, choice: str, trained: tuple[str, bool] | None) -> MergePlan:
    """The plan on the base in the precision that `choice` asks for.

    Args:
        choice: "trained": as `trained` says; "original": as the base is stored, in 16 bits; "nf4", "fp4";
            "fp8": as `load_in_fp8=True` quantises it, which nothing in an adapter's folder says.
    Raises:
        AdapterError: no such choice, or a base that is in 4 bits itself."""
    if choice not in CHOICES:
        raise AdapterError(f"export: --base-precision: want one of {', '.join(CHOICES)}, got {choice!r}")
    if stored_in_four_bits(plan):
        if choice != "trained":
            raise AdapterError(
                f"export: the base {str(base)!r} is stored in 4 bits: for --base-precision {choice} give the 16-bit "
                "one with --base"
            )
        return plan
    if choice == "original" or (choice == "trained" and trained is None):
        return plan
    kind, double = (choice, True) if choice != "trained" or trained is None else trained
    return replace(plan, rounded=(quantised_weights(base, plan), kind, double))


def stored_in_four_bits(plan: MergePlan) -> bool:
    """Whether the base's own files are."""
    from safetensors import safe_open

    for path in plan.files:
        with safe_open(path, "pt") as f:
            if packed(list(f.keys())):
                return True
    return False


def quantised_weights(base: Path, plan: MergePlan) -> frozenset[str]:
    """Names of the weights that are in 4 bits, or in FP8, in training: those of all linear layers but the head."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    head = model.get_output_embeddings()
    return frozenset(
        f"{n}.weight"
        for n, m in model.named_modules()
        if type(m) is torch.nn.Linear and m is not head and f"{n}.weight" in plan.values
    )
