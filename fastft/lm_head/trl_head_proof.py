"""The proof of TRL's fused head: its autograd function and ours on the same random cases, on the device and at the
tiles of a training step.

The reference is TRL's function in float64 on the CPU. Results and gradients are judged in float32 and in the head's
dtype, with a frozen and with a trained head, with and without soft-cap, bias and the optional results."""

from __future__ import annotations

from typing import NamedTuple

import torch

from fastft.proving.float64 import float64_reference
from fastft.proving.prove import Proof, agree, formula_is_enough
from fastft.swapping.out_of_memory import not_for_want_of_memory
from fastft_kernels.numerics import compare

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
TOKENS, CHUNK = 11, 8192  # CHUNK: the columns of one of TRL's own tiles


class _Case(NamedTuple):
    softcap: float | None
    scale: float
    temperature: float
    outputs: tuple[str, ...]
    bias: bool
    trained: bool


CASES = (
    _Case(None, 1.0, 1.0, (), False, False),
    _Case(None, 1.0, 1.0, ("entropy", "is_top1"), False, False),
    _Case(None, 0.5, 0.7, OUTPUTS, True, True),
    _Case(5.0, 1.0, 1.3, OUTPUTS, True, False),
)


def _same(theirs: torch.Tensor | None, ours: torch.Tensor | None) -> bool:
    return theirs is None or (ours is not None and torch.equal(theirs, ours))


def prove(theirs: type, ours: type, width: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Proof:
    """theirs, ours: classes with TRL's nine-argument `apply`. width, vocab: of the head that is drawn; dtype: of the
    model's head."""
    worst = None
    for d in dict.fromkeys((torch.float32, dtype)):
        named = str(d).removeprefix("torch.")
        for n, case in enumerate(CASES):
            proof = _judge(theirs, ours, case, n, width, vocab, d, device)
            if not proof.ok:
                return proof
            if worst is None or named != worst.dtype or proof.error > worst.error:
                worst = proof
    assert worst is not None
    return worst


def _judge(
    theirs: type, ours: type, case: _Case, seed: int, width: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> Proof:
    g = torch.Generator().manual_seed(seed)
    h, w, b = (torch.randn(s, generator=g) for s in ((TOKENS, width), (vocab, width), (vocab,)))
    h, w = h.to(dtype), (w * min(1.0, (24 / width) ** 0.5)).to(dtype)
    t = torch.randint(0, vocab, (TOKENS,), generator=g)
    up = torch.randn(TOKENS, generator=g)
    named = str(dtype).removeprefix("torch.")

    def run(
        function: type, dtype: torch.dtype, device: torch.device
    ) -> tuple[list[torch.Tensor], list[bool], torch.Tensor | None]:
        leaf = lambda x, learns: x.to(device, dtype).requires_grad_(learns)
        hidden, weight, bias = leaf(h, True), leaf(w, case.trained), leaf(b, case.trained) if case.bias else None
        settings = (case.temperature, CHUNK, case.softcap, case.scale, case.outputs)
        out = function.apply(hidden, weight, bias, t.to(device), *settings)
        leaves = [x for x in (hidden, weight, bias) if x is not None and x.requires_grad]
        grads = torch.autograd.grad((out[0] * up.to(device, out[0].dtype)).sum(), leaves)
        top1 = None if out[4] is None else out[4].cpu()
        return (
            [*(o.detach().cpu() for o in out[:4] if o is not None), *(g.cpu() for g in grads)],
            [o is None for o in out],
            top1,
        )

    try:
        with float64_reference():
            reference, *_ = run(theirs, torch.float64, torch.device("cpu"))
            if formula_is_enough():
                mine, *_ = run(ours, torch.float64, torch.device("cpu"))
                numbered = [{str(i): t for i, t in enumerate(found)} for found in (mine, reference)]
                reason = agree(*numbered)
                return Proof(not reason, dtype="float64", reason=reason)
        eager, gone, top1 = run(theirs, dtype, device)
        found, our_gone, our_top1 = run(ours, dtype, device)
    except Exception as e:
        not_for_want_of_memory(e)
        return Proof(
            False, dtype=named, reason=f"the two functions cannot be run on the same arguments: {type(e).__name__}: {e}"
        )
    if gone != our_gone or (dtype == torch.float32 and not _same(top1, our_top1)):
        return Proof(False, dtype=named, reason="the two functions return different fields")
    if [x.dtype for x in found] != [x.dtype for x in eager]:
        return Proof(False, dtype=named, reason="the two functions return different dtypes")
    verdict = compare(found, [x.double() for x in reference], eager)
    return Proof(
        verdict.ok,
        verdict.error,
        verdict.eager_error,
        named,
        "" if verdict else str(verdict),
        sizes=f"{(TOKENS, width)} {(vocab, width)}",
    )
