"""Tables fit the terminal and break no word that fits."""

import math

from fastft.patching.report import PatchReport, Row
from fastft.tables import as_text, table
from fastft.tools.bench.runner import BenchOptions, BenchResult, BenchRow
from fastft.tools.plan.gpus import find
from fastft.tools.plan.predict import StepPeakMemory
from fastft.tools.plan.result import Plan, PlanLine
from fastft.tools.verify.runner import Verification, VerificationLine

LONG = "Qwen3VLMoeTextSparseMoeBlock"


def lines_of(shown, width=80):
    text = as_text(shown, width)
    assert max(len(line.rstrip()) for line in text.splitlines()) <= width
    return text


def test_columns_share_the_width():
    rows = [["x", "a reason of several words that has to be folded somewhere", "y" * 12]]
    text = lines_of(table("title", ["one", "two", "number#"], rows, [""], 40), 40)
    assert "y" * 12 in text and "number" in text
    wide = lines_of(table("title", ["one", "two", "number#"], rows, [""], 100), 100)
    assert rows[0][1] in wide


def test_a_word_longer_than_the_table_is_folded():
    assert "".join(lines_of(table("", ["a"], [["z" * 50]], [""], 20), 20).split()).count("z") == 50


def test_report():
    kernel = "linear_cross_entropy, linear_logprob on lazy logits"
    shown = PatchReport(
        "LlamaForCausalLM",
        (
            Row("head", LONG, 1, kernel, 1.25e-7, 1e-7, "bfloat16", sizes="(2, 8, 64)"),
            Row("experts", LONG, 48, "", math.nan, math.nan, "", reason="a gate of its own"),
        ),
    )
    text = lines_of(shown)
    for word in (LONG, "linear_cross_entropy,", "1.2e-07", "bf16", "stays stock: a gate of its own"):
        assert word in " ".join(text.split()), word
    assert "(2, 8, 64)" not in text and "(2, 8, 64)" in lines_of(shown, 130)


def test_verification():
    shown = Verification(
        "M", "bfloat16", (VerificationLine("module", f"mlp: {LONG}", "x.mlp", "glu(silu)", False, 1.0, 1e-7, "d w"),)
    )
    text = " ".join(lines_of(shown).split())
    assert LONG in text and "FAIL" in text and f"failed: module mlp: {LONG}, run by glu(silu): d w" in text


def test_plan():
    peak = StepPeakMemory({"weights": 2**34, "activations": 2**33}, "backward")
    line = lambda stack, policy: PlanLine(stack, policy, 3, 0, peak, True, 1_234, 123_456, "A100-40GB")
    ways = [("fastft", "auto"), ("fastft", "none"), ("fastft", "lean"), ("fastft", "offload")]
    ways += [("stock", "every layer checkpointed (TRL's default)"), ("stock", "no checkpointing")]
    for gpu in (find("T4"), None):
        text = lines_of(Plan("m", "what", 4, 2048, 32, gpu, tuple(line(*w) for w in ways)))
        for word in ("activations", "6: stock, no checkpointing", "24.00", *(["123,456"] if gpu else ["A100-40GB"])):
            assert word in text, word


def test_bench_and_a_busy_machine():
    row = lambda stack, p20, p80: BenchRow(
        stack, "packed", "ok", "", 10_000.0, p20, p80, 0.5, 1.0, 2**34, 2**35, 50.0, True, [1.5]
    )
    result = BenchResult(
        BenchOptions("m"), {"device": "NVIDIA H100"}, [], [row("stock", 9e3, 11e3), row("unsloth", 6e3, 13e3)], []
    )
    text = lines_of(result)
    for word in ("10,000", "20%", "70%", "unsloth", "1.5000"):
        assert word in text, word
    assert "reserved" not in text and "reserved" in lines_of(result, 140)
