"""--to merged: a plain 16-bit checkpoint, loaded again in plain transformers. Every tensor is held against base +
adapter merged by PEFT, then the logits; an adapter that was trained in 4 bits is compared on the other base too."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastft.errors import ProofError
from fastft.tools.export import prompts, proof
from fastft.tools.export.reference import greedy, logits_of
from fastft.tools.export.source import ExportSource
from fastft.tools.export.stages import Stages
from fastft.tools.merge.merge import write_configs, write_merged
from fastft.tools.merge.precision import quantised_weights, stored_in_four_bits
from fastft.tools.merge.reference import load_reference
from fastft.tools.new_folder import check_room

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
OF_ROUNDING = 1.5  # errors of logits, beside those that rounding the weights alone makes


def export_merged(
    source: ExportSource, folder: Path, out: Path, quant: str, given: Path | None, stages: Stages
) -> dict[str, Any]:
    """Write the checkpoint into `folder` and prove it.

    Args:
        source: base and adapter.
        folder: where it is written; `out`: its name to be, for messages.
        quant: one of DTYPES.
        given: a file of prompts, or None for the built-in texts.
    Returns:
        figures for export.json.
    Raises:
        ProofError: it was written and is not base + adapter."""
    dtype, tokenizer = DTYPES[quant], source.tokenizer()
    size = source.plan.bytes_in(dtype)
    check_room(out, size, "export")
    with stages.stage("writing the merged checkpoint", size) as step:
        write_merged(folder, source.plan, dtype, step)
        write_configs(source.base, source.adapter, folder, dtype, source.plan)
    with stages.stage("loaded again in transformers, beside base + adapter in PEFT"):
        found = _prove(source, folder, quant, tokenizer, given)
    stages.say(f"merged onto {source.precision}")
    stages.say(found["logits"].pop("said"))
    for line in found.get("precisions", {}).values():
        stages.say(line["said"])
    return {"proof": found}


def _prove(source: ExportSource, folder: Path, quant: str, tokenizer: Any, given: Path | None) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None) or prompts.ROW
    questions = proof.make_questions(tokenizer, prompts.texts(given), source.stops(tokenizer), longest)
    again = proof.make_questions(
        AutoTokenizer.from_pretrained(folder), prompts.texts(given), questions.stops, longest, of=questions
    )
    proof.check_text(questions, again, "the merged folder")
    model = load_reference(source.base, source.adapter, source.plan)
    reference = logits_of(model, questions.rows)
    said = [greedy(model, p, questions.new_tokens, questions.stops) for p in questions.prompts]
    model = model.merge_and_unload() if source.adapter is not None else model
    reloaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    _compare_tensors(model, reloaded, DTYPES[quant])
    for p in model.parameters():
        p.data = p.data.to(DTYPES[quant]).float()
    figures = proof.measure(quant, reference, logits_of(model, questions.rows), logits_of(reloaded, questions.rows))
    if not figures.largest_error <= OF_ROUNDING * figures.explained + 1e-6 * float(reference.abs().max()):
        raise ProofError(
            f"export: the merged folder is not base + adapter: its tensors are, its configuration is not ({figures}); "
            "nothing is published"
        )
    del model
    theirs = [greedy(reloaded, p, questions.new_tokens, questions.stops) for p in questions.prompts]
    found = {"logits": {**asdict(figures), "said": str(figures)}, **proof.counts(questions)}
    found["answers"] = proof.side_by_side(tokenizer, questions, said, theirs)
    if precisions := _precisions(source, questions.rows, logits_of(reloaded, questions.rows), reference):
        found["precisions"] = precisions
    return found


@torch.no_grad()
def _compare_tensors(model: Any, reloaded: Any, dtype: torch.dtype) -> None:
    """ProofError with the first parameter that differs by more than its rounding."""
    theirs = dict(reloaded.named_parameters(remove_duplicate=False))
    for name, p in model.named_parameters(remove_duplicate=False):
        other, unit = theirs.get(name), float(p.norm()) or 1.0
        if other is None or other.shape != p.shape:
            raise ProofError(f"export: {name} is missing from the merged folder; nothing is published")
        far, alone = (float((t.float() - p).norm()) / unit for t in (other, p.to(dtype)))
        if not far <= 2 * alone + 1e-6:
            raise ProofError(
                f"export: the merged folder is not base + adapter: the first tensor that differs is {name} (by "
                f"{far:.2g} of its size; rounding explains {alone:.2g}); nothing is published"
            )


def _precisions(
    source: ExportSource, rows: list[list[int]], merged: torch.Tensor, reference: torch.Tensor
) -> dict[str, Any]:
    """Of an adapter that was trained in 4 bits: how far from base + adapter as trained the result is, and how far it
    would be on the other base. Empty where one of the two is not there."""
    if source.adapter is None or source.trained is None or stored_in_four_bits(source.plan):
        return {}
    kind, double = source.trained
    weights = quantised_weights(source.base, source.plan)
    on = {"trained": (weights, kind, double), "original": None}
    logits = {
        name: reference
        if rounded == source.plan.rounded
        else logits_of(load_reference(source.base, source.adapter, replace(source.plan, rounded=rounded)), rows)
        for name, rounded in on.items()
    }
    taken = "original" if source.plan.rounded is None else "trained"
    found = {}
    for name in on:
        t = merged if name == taken else logits[name]
        figures = proof.measure(name, logits["trained"], logits["trained"], t)
        where = f"the base in {kind} that was trained on" if name == "trained" else "the original 16-bit base"
        is_it = "this export" if name == taken else "not chosen, unrounded"
        found[name] = {
            "error_of_deviation": figures.largest_error / figures.std,
            "kl_mean": figures.kl_mean,
            "top1": figures.top1,
            "said": f"against base + adapter as trained, merged onto {where} ({is_it}): largest error of a logit "
            f"{figures.largest_error / figures.std:.2e} of their deviation, KL {figures.kl_mean:.2e} a token, the "
            f"likeliest token agrees at {100 * figures.top1:.1f}%",
        }
    return found
