"""Two gloo processes beside one that sees the whole batch: loss, gradients, what each rank swaps and saves.

Each launch runs several strategies and all models, as most of its time is its start (`worker.py`). What a launch found
is read by all tests of this file. The rest of the matrix is marked slow."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

import pytest

from tests.distributed.models import CASES

CORE = {
    "ddp": ["ddp"],
    "fsdp2": ["fsdp2-before-reshard", "fsdp2-after"],
    "zero": ["zero2", "zero3"],
}
REST = {
    "ddp-rest": ["ddp-unused"],
    "fsdp2-rest": [
        "fsdp2-before",
        "fsdp2-after-reshard",
        "fsdp2-no-reshard",
        "fsdp2-tail",
        "fsdp2-head",
        "fsdp2-head-before",
        "fsdp2-checkpoint",
        "fsdp2-offload",
        "fsdp2-outside",
        "fsdp2-outside-head",
        "fsdp2-outside-tail",
        "fsdp2-linears",
    ],
    "fsdp2-low": ["fsdp2-bf16", "fsdp2-bf16-before", "fsdp2-qlora", "fsdp2-qlora-before", "fsdp2-qlora-bf16"],
    "zero-rest": ["zero3-after"],
}
UNITS = [f"fsdp2-{u} llama-lora" for u in ("head-before", "outside", "linears", "norms")]
EXTRA = {"fsdp2": [*UNITS, "fsdp2-planted llama-lora"]}
LAUNCHES = CORE | REST
VERIFIED = {  # `fastft verify --nproc 2`, and with faults planted, each with the line that fails and what it says
    "ddp": ["verify-ddp llama-lora", "verify-ddp+unscaled llama-lora"],
    "verify": [
        *(f"verify-{s} {c}" for s in ("ddp", "fsdp2") for c in CASES if (s, c) != ("ddp", "llama-lora")),
        *(f"verify-{x} llama-lora" for x in ("ddp+another_seed", "ddp+another_seed_later")),
        *(f"verify-{x} llama-lora" for x in ("fsdp2+another_seed", "fsdp2+unscaled", "fsdp2+slice_saved")),
        *(f"verify-{x} llama-lora" for x in ("fsdp2+stale", "fsdp2+copy_kept")),
    ],
}
VERIFIED["zero-verify"] = [f"verify-zero{n} llama-{w}" for n in (2, 3) for w in ("lora", "nf4", "full")]
NAMED = {
    "another_seed": [("loaded on all ranks", "rank 1 begins with other values than rank 0: base_model.*lora_A")],
    "another_seed_later": [
        ("wrapped as loaded", "rank 1: the wrapped model has other values of .*lora_A"),
        ("trained on all ranks", "rank 1 ends with other values than rank 0: base_model.*lora_A"),
    ],
    "slice_saved": [("saved as trained", r"its file has a slice of .*lora_A.weight: \[8, 64\] instead of \[16, 64\]")],
    "stale": [(x, "computes with a stale weight, .*0.mlp.down_proj.lora_B") for x in ("loss", "gradients")],
    "copy_kept": [(x, "right in the first step, wrong after it") for x in ("loss", "gradients")],
    "unscaled": [(x, "an unscaled average, .*rank 0's rows count 0.86 times") for x in ("loss", "gradients")],
}
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed (.ci/run installs it)"
)
SHARDED = "its parameters are sharded: logits that are read would be a second forward"


def marks(launch: str) -> list:
    found = [needs_deepspeed, pytest.mark.zero] if launch.startswith("zero") else []
    return found + ([] if launch in CORE else [pytest.mark.slow])


def jobs(launch: str) -> list[str]:
    """What one launch runs: "STRATEGY MODEL-WEIGHTS"."""
    chosen = [f"{s} {c}" for s in LAUNCHES.get(launch, []) for c in CASES if takes(s, c)] + VERIFIED.get(launch, [])
    return chosen + EXTRA.get(launch, []) + (["costs llama-lora", "costs llama-nf4"] if launch == "fsdp2" else [])


def takes(strategy: str, case: str) -> bool:
    """Is this model trained under this strategy? (FSDP2 casts the bytes of a 4-bit weight as well: they are kept in
    the dtype of mixed precision, which is "qlora".)"""
    if "qlora" in strategy or "nf4" in case:
        return "nf4" in case and ("qlora" in strategy or "bf16" not in strategy) and "linears" not in strategy
    return "linears" not in strategy or "lora" in case


ALL = [pytest.param(launch, job, id=job, marks=marks(launch)) for launch in LAUNCHES for job in jobs(launch)]
STEPS = [p for p in ALL if not p.id.startswith(("costs", "fsdp2-planted", "verify"))]
VERIFY = [pytest.param(launch, job, id=job, marks=marks(launch)) for launch, found in VERIFIED.items() for job in found]


@pytest.mark.parametrize(("launch", "job"), STEPS)
def test_as_one_process(results, launch, job):
    """Loss and gradients are those of one process on the whole batch; trained weights are equal on all ranks, and are
    what is saved; every rank swaps the same."""
    found = results(launch, jobs(launch))[job]
    assert "raised" not in found, found["raised"]
    assert found["ok"], found["worst"]
    assert found["adapters_equal"] and found.get("saved_equal", True)
    first, second = found["ranks"]
    assert first["swapped"] == second["swapped"] and first["stock"] == second["stock"]
    strategy, case = job.split(" ")
    expected = {"norm": 9 if "qwen3" in case else 5, "rotary": 2, "mlp": 2, "linear group": 14, "head": 1}
    if strategy.startswith("zero3"):
        _zero3(first, expected, case)
        return
    if strategy.startswith(("ddp", "zero2")):
        expected["packed attention"] = 2
    assert first["swapped"] == expected and not first["stock"], first
    _fallbacks(strategy, case, first["fallbacks"])


def _fallbacks(strategy: str, case: str, fallbacks: dict[str, int]) -> None:
    """Nothing goes the stock way but what must."""
    left = [f for f in fallbacks if SHARDED not in f]
    if "outside" in strategy:
        left = [f for f in left if not f.startswith("a padded batch: no labels")]
        if "full" in case:  # the caller holds the logits when the head is about to learn
            left = [f for f in left if "keeps the output of a trained head" not in f]
    assert not left, left
    assert strategy.startswith("fsdp2") or not fallbacks


def _zero3(report: dict[str, Any], expected: dict[str, int], case: str) -> None:
    """What reads one module's parameters in its own call is swapped; the rest is stock, with the reason."""
    alone = {k: n for k, n in expected.items() if k != "head" and (k != "linear group" or "full" in case)}
    assert report["swapped"] == alone
    reasons = {kind: reason for kind, _, _, reason in report["stock"]}
    assert "gathers its weight for its own call alone" in reasons.pop("head")
    if "full" not in case:
        assert "gathered in parts" in reasons.pop("linear group")
    assert not reasons and all(SHARDED in f for f in report["fallbacks"])


def test_a_layer_sharded_by_itself_computes_alone_and_says_so(results):
    found = results("fsdp2", jobs("fsdp2"))["fsdp2-linears llama-lora"]
    assert "raised" not in found, found["raised"]
    for rank in found["ranks"]:
        assert rank["apart"] and all("it is sharded apart" in reason for reason in rank["apart"])


def test_a_proof_that_fails_on_one_rank_leaves_the_module_stock_on_all(results):
    """The second process alone finds its norms' proofs bad."""
    found = results("fsdp2", jobs("fsdp2"))["fsdp2-planted llama-lora"]
    assert "raised" not in found, found["raised"]
    assert found["ok"], found["worst"]
    first, second = found["ranks"]
    assert first["swapped"] == second["swapped"] == {"rotary": 2, "mlp": 2, "linear group": 14, "head": 1}
    (kind, _, count, reason), (_, _, _, other) = *first["stock"], *second["stock"]
    assert (kind, count) == ("norm", 5) and other == "planted" and reason.endswith("the same: planted")


@pytest.mark.parametrize("case", ["llama-lora", "llama-nf4"])
def test_costs_no_more_than_one_process(results, case):
    """Bytes that are kept for the backward, by token, and operators of a step: within 5%."""
    found = results("fsdp2", jobs("fsdp2"))[f"costs {case}"]
    assert "raised" not in found, found["raised"]
    for what in ("kept", "launches"):
        one, fsdp2 = found[what]
        assert 0 < fsdp2 <= 1.05 * one, (what, one, fsdp2)


@pytest.mark.parametrize(("launch", "job"), VERIFY)
def test_verify(results, launch, job):
    """Every comparison holds; a fault that is planted fails the lines that are about it, and these name it."""
    found = results(launch, jobs(launch))[job]
    assert "raised" not in found, found["raised"]
    lines, plant = {x["name"]: x for x in found["lines"]}, job.split(" ")[0].partition("+")[2]
    failed = [x for x in found["lines"] if not x["ok"]]
    assert len(lines) == 9 and bool(failed) == bool(plant), failed
    for name, says in NAMED[plant] if plant else ():
        assert not lines[name]["ok"] and re.search(says, lines[name]["detail"]), lines[name]
    if plant == "slice_saved":
        assert {x["name"] for x in failed} == {"saved as trained", "resumed"}
