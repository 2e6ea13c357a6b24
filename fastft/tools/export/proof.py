"""llama.cpp's answers beside base + adapter's: ids, chat template, every layer's activations, logits. What differs by
more than the file's rounding explains is named, the first of it.

    unquantised   the largest error of a logit: at most 1% of the logits' standard deviation, or 3 x what rounding alone
                  makes of the reference
    quantised     the same 3 x, and the same likeliest token at 99% of the positions whose two likeliest differ by more
                  than twice the unquantised file's error and the quantisation's own
    activations   of a layer: 3 x what rounding alone makes, by root mean square, and 0.2% for orders of summation
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from fastft.errors import ProofError
from fastft.tools.export import prompts
from fastft.tools.export.reference import Answers, spoken
from fastft.tools.gguf.llama_cpp import LlamaCppAnswer

FACTOR, OF_STD, OF_STAGE, AGREE = 3.0, 0.01, 2e-3, 0.99


@dataclass(frozen=True)
class Questions:
    """texts and conversations with the tokenizer's own answers; rows of ids; prompts to be continued."""

    texts: list[str]
    ids: list[list[list[int]]]
    conversations: list[Any]
    rendered: list[str]
    rows: list[list[int]]
    prompts: list[list[int]]
    stops: list[int]
    new_tokens: int = 24


def make_questions(
    tokenizer: Any, given: list[str], stops: list[int], longest: int, of: Questions | None = None
) -> Questions:
    """Args:
    tokenizer: the reference's.
    given: texts whose positions are compared.
    stops: ids that end an answer.
    longest: positions that the result has.
    of: those of another tokenizer, whose texts are taken."""
    texts = of.texts if of is not None else prompts.strings(tokenizer)
    ids = [[tokenizer(t, add_special_tokens=s).input_ids for s in (True, False)] for t in texts]
    talks, rendered = [], []
    if tokenizer.chat_template:
        for talk in prompts.conversations():
            try:
                rendered.append(tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True))
            except Exception:  # a template may refuse a shape; the file's copy of it need not be asked
                continue
            talks.append(talk)
    rows = prompts.rows(tokenizer, given, rendered, longest)
    begun = [row[: max(1, min(24, len(row) // 2))] for row in rows[1:3] or rows]
    chats = [tokenizer(t, add_special_tokens=False).input_ids for t in rendered[:1]]
    return Questions(texts, ids, talks, rendered, rows, [*chats, *begun], stops)


@dataclass
class Figures:
    """Of one file. Errors are of logits, against base + adapter in float32; `explained`: what its rounding alone makes;
    clear: positions whose two likeliest tokens differ by more than both errors can turn round; kl in nats a token."""

    quant: str
    positions: int
    std: float
    largest_error: float
    explained: float
    kl_mean: float
    kl_largest: float
    top1: float
    clear: int
    top1_clear: float
    stages: dict[str, list[float]] = field(default_factory=dict)

    def __str__(self) -> str:
        return (
            f"{self.quant}: largest error of a logit {self.largest_error / self.std:.2e} of their deviation (rounding "
            f"alone {self.explained / self.std:.2e}); KL {self.kl_mean:.2e} a token, at most {self.kl_largest:.2e}; "
            f"the likeliest token agrees at {100 * self.top1:.1f}% of {self.positions} positions, at "
            f"{100 * self.top1_clear:.1f}% of the {self.clear} clear ones"
        )


def check_text(questions: Questions, told: LlamaCppAnswer | Questions, where: str = "llama.cpp") -> None:
    """ProofError where ids or a rendered conversation differ from those of `where`."""
    if len(questions.rendered) != len(told.rendered) or len(questions.ids) != len(told.ids):
        raise ProofError(
            f"export: the first stage that differs is the chat template: {len(questions.rendered)} conversations are "
            f"rendered in transformers, {len(told.rendered)} in {where}; nothing is published"
        )
    for text, ours, theirs in zip(questions.texts, questions.ids, told.ids):
        if ours != theirs:
            a, b = next((x, y) for x, y in zip(ours, theirs) if x != y)
            at = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
            raise ProofError(
                f"export: the first stage that differs is the tokenizer: {text[:60]!r} has the ids {a[at : at + 6]} "
                f"from place {at} on in transformers and {b[at : at + 6]} in {where}; nothing is published"
            )
    for talk, ours, theirs in zip(questions.conversations, questions.rendered, told.rendered):
        if ours != theirs:
            raise ProofError(
                f"export: the first stage that differs is the chat template: {len(talk)} messages are {ours[:80]!r} in "
                f"transformers and {theirs[:80]!r} in {where}; nothing is published"
            )


def check_numbers(
    quant: str, reference: Answers, explained: Answers, told: LlamaCppAnswer, other_error: float | None = None
) -> Figures:
    """Args:
        quant: the file's.
        reference: base + adapter.
        explained: the reference under the file's rounding.
        told: llama.cpp's.
        other_error: the unquantised file's largest error, for a quantised one.
    Raises:
        ProofError: with the first layer or stage that differs."""
    stages = {}
    for name, theirs in told.stages.items():
        unit = float(reference.stages[name].norm()) or 1.0
        far = lambda t, name=name, unit=unit: float((t - reference.stages[name]).norm()) / unit
        stages[name] = [far(theirs), far(explained.stages[name])]
    for name in reference.stages:  # in the order in which they are computed
        if name in stages and not stages[name][0] <= FACTOR * stages[name][1] + OF_STAGE:
            raise ProofError(
                f"export: the {quant} file is not base + adapter in llama.cpp: the first that differs is "
                f"{spoken(name)} (by {stages[name][0]:.2g} of its size; rounding explains {stages[name][1]:.2g}); "
                "nothing is published"
            )
    figures = measure(quant, reference.logits, explained.logits, told.logits, other_error)
    figures.stages = stages
    bound = FACTOR * figures.explained + (OF_STD * figures.std if other_error is None else other_error)
    if other_error is None:
        bound = max(OF_STD * figures.std, FACTOR * figures.explained)
    if not figures.largest_error <= bound:
        raise ProofError(f"export: the {quant} file is not base + adapter in llama.cpp: the logits differ ({figures}); "
                         "nothing is published")  # fmt: skip
    if figures.clear and figures.top1_clear < AGREE:
        raise ProofError(
            f"export: the {quant} file chooses other tokens in llama.cpp ({figures}); nothing is published"
        )
    return figures


def measure(
    quant: str, reference: torch.Tensor, explained: torch.Tensor, told: torch.Tensor, other_error: float | None = None
) -> Figures:
    """Figures of logits, [positions, vocabulary] each."""
    error, alone = float((told - reference).abs().max()), float((explained - reference).abs().max())
    if not math.isfinite(error):
        error = math.inf
    p = reference.double().log_softmax(-1)
    kl = (p.exp() * (p - told.double().log_softmax(-1))).sum(-1).clamp(min=0)
    top = reference.topk(2, -1).values
    clear = (top[:, 0] - top[:, 1]) > 2 * ((error if other_error is None else other_error) + alone)
    same = told.argmax(-1) == reference.argmax(-1)
    return Figures(
        quant,
        len(reference),
        float(reference.std()),
        error,
        alone,
        float(kl.mean()),
        float(kl.max()),
        float(same.float().mean()),
        int(clear.sum()),
        float(same[clear].float().mean()) if clear.any() else 1.0,
    )


def counts(questions: Questions) -> dict[str, dict[str, int]]:
    """Of what `check_text` found equal."""
    return {
        name: {"compared": n, "equal": n}
        for name, n in (("strings", len(questions.texts)), ("conversations", len(questions.rendered)))
    }


def side_by_side(tokenizer: Any, questions: Questions, ours: list[list[int]], theirs: list[list[int]]) -> list[dict]:
    """Greedy answers of both, as text."""
    return [
        {"prompt": tokenizer.decode(p), "base + adapter": tokenizer.decode(a), "served": tokenizer.decode(b)}
        for p, a, b in zip(questions.prompts, ours, theirs)
    ]
