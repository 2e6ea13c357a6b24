"""fastft bench: judged before it is timed; peers that are missing, crashes and memory that runs out are rows; what it
counts is right."""

import gc
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from fastft.cli import app
from fastft.tools.bench import cells as bench_cells
from fastft.tools.bench import runner as bench
from fastft.tools.bench import stacks as bench_stacks
from fastft.tools.bench import steps as bench_steps
from fastft.tools.bench.limits import ModelShape, limit_seconds, step_bytes, step_flops
from fastft.tools.bench.spec import Spec, row_lengths
from fastft.tools.bench.timing import ColdTimer, Roof, Times, measure_roof
from fastft.tools.bench.worker import Worker
from fastft.tools.demo.model import train_tokenizer
from fastft.tools.gate import gate

pytestmark = [pytest.mark.filterwarnings("ignore::UserWarning"), pytest.mark.filterwarnings("ignore::FutureWarning")]
STEPS = dict(steps=1, seq=16, batch=2, lengths=(16, 24))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(["the capital of france is paris"] * 4, 280)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(monkeypatch):
    """Every stack in this process, which need not import everything again; crashes are tested with a process of its
    own."""

    def run(spec, folder, seconds, env):
        rows = folder / f"{spec.stack}.jsonl"
        rows.unlink(missing_ok=True)
        Worker(Spec.read(spec.write(folder / "spec.json")), rows).run()
        return [json.loads(x) for x in rows.read_text().splitlines()]

    monkeypatch.setattr(bench, "_run", run)
    # a third of a second each in a process that has imported everything
    monkeypatch.setattr(gc, "collect", lambda *args: 0)


def test_every_cell_of_stock_and_fastft(checkpoint, tmp_path, here):
    run = CliRunner().invoke(
        app,
        [
            "bench",
            checkpoint,
            "--steps",
            "1",
            "--seq",
            "16",
            "--batch",
            "2",
            "--stacks",
            "stock,fastft,liger,unsloth",
            "--out",
            str(tmp_path),
        ],
        env={"COLUMNS": "140"},
    )
    assert run.exit_code == 0, run.output
    found = json.loads((tmp_path / "bench.json").read_text())
    rows = {(r["stack"], r["cell"]): r for r in found["rows"]}
    assert len(rows) == 20 and found["ok"]
    for (stack, cell), r in rows.items():
        if stack in ("liger", "unsloth"):
            assert r["state"] == "missing" and "not installed" in r["note"] and r["rate"] is None
            continue
        assert r["state"] == "ok", r
        assert r["rate"] > 0 and r["p20"] <= r["rate"] <= r["p80"] and r["first"] > 0 and 0 < r["limit"] < 100
        assert r["peak"] > 4 * 32 * 280 and r["reserved"] is None and r["checkpointing"]
        assert r["losses"] == pytest.approx(rows["stock", cell]["losses"], rel=1e-5)
    assert [p["tokens"] for p in rows["fastft", "long"]["by_length"]] == [16, 32, 64]
    assert {(g["gate"], g["state"]) for g in found["gates"] if g["stack"] == "fastft"} == {
        (c, "ok") for c in ("sft", "packed", "dpo", "grpo")
    }
    assert "liger: missing: liger_kernel is not installed" in run.output and "long, 64 tokens" in run.output
    assert all((tmp_path / f"{n}.png").stat().st_size > 1000 for n in ("speed", "memory", "length"))


def test_a_stack_that_is_off_prints_no_speed(checkpoint, tmp_path, here, monkeypatch):
    real = bench_stacks.load

    def planted(spec):
        model = real(spec)
        if spec.stack == "best":
            norm = model.get_base_model().model.norm
            norm.weight.data.mul_(1.0001)
        return model

    monkeypatch.setattr(bench_stacks, "load", planted)
    result = bench.bench(bench.BenchOptions(checkpoint, ("best",), ("sft", "long"), out=tmp_path, **STEPS))
    assert not result.ok and [(r.cell, r.state, r.rate) for r in result.rows] == [
        ("sft", "red", None),
        ("long", "red", None),
    ]
    assert "FAIL" in result.rows[0].note
    assert not (tmp_path / "speed.png").exists()


def test_nf4(checkpoint, tmp_path, here):
    result = bench.bench(
        bench.BenchOptions(checkpoint, ("stock", "fastft"), ("sft",), four_bit=True, out=tmp_path, **STEPS)
    )
    assert result.ok, [(r.stack, r.note) for r in result.rows]
    assert result.about["reference"] == "float32"


def test_memory_that_runs_out_is_a_row_and_ends_the_lengths(checkpoint, tmp_path, here, monkeypatch):
    real, tried = bench_steps._measure, []

    def measure(spec, cell, model, tokenizer, seq, steps, checkpointing):
        tried.append((cell, seq, checkpointing))
        if cell == "sft" or seq > 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return real(spec, cell, model, tokenizer, seq, steps, checkpointing)

    monkeypatch.setattr(bench_steps, "_measure", measure)
    result = bench.bench(bench.BenchOptions(checkpoint, ("best",), ("sft", "long"), out=tmp_path, **STEPS))
    sft, long = result.rows
    assert (sft.state, sft.note, sft.rate) == ("out of memory", "CUDA out of memory", None)
    assert long.state == "ok" and long.tokens == 16 and [p["tokens"] for p in long.by_length] == [16]
    assert tried == [
        ("sft", 16, False),
        ("sft", 16, True),
        ("long", 16, False),
        ("long", 24, False),
        ("long", 24, True),
    ]


def test_a_process_that_dies_is_a_row(tmp_path):
    spec = Spec(str(tmp_path / "nothing"), "stock", ("sft",), str(tmp_path), 16, 2, (16,), steps=1)
    lines = bench._run(spec, tmp_path, 60, {})
    row = bench._row("stock", "sft", lines, {}, bench.BenchOptions("m"))
    assert row.state == "error" and "the process ended with 1" in row.note and "nothing" in row.note


def test_unknown_stacks_and_cells_are_refused():
    for option, value in (("--stacks", "stock,fast"), ("--cells", "sft,ppo")):
        run = CliRunner().invoke(app, ["bench", "m", option, value])
        assert run.exit_code == 2 and "want some of" in run.output


# --- what it counts


def test_row_lengths_of_what_trainers_see():
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    ids = torch.zeros(2, 3, dtype=torch.long)
    assert bench_cells.lengths_in({"input_ids": ids, "attention_mask": mask}) == [2, 3]
    assert bench_cells.lengths_in({"input_ids": ids}) == [3, 3]
    assert bench_cells.lengths_in({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0], [0, 1, 2]])}) == [2, 1, 3]
    assert bench_cells.lengths_in({"prompt_mask": mask, "completion_mask": mask}) == [4, 6]
    spec = Spec("m", "stock", (), "", 2048, 4, (8,))
    drawn = row_lengths(spec, "sft", 2000)
    assert (
        sorted(drawn)[1000] == pytest.approx(120, rel=0.1)
        and max(drawn) <= 2048
        and row_lengths(spec, "long", 2, 64) == [64, 64]
    )


def llama_8b() -> ModelShape:
    config = LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )
    with torch.device("meta"):
        return ModelShape.of(AutoModelForCausalLM.from_config(config))


def test_the_limit_of_a_known_shape():
    """Llama-3.1-8B, LoRA r=16, 4 x 2048, on 790 TFLOP/s and 4.3 TB/s: known from elsewhere as 22 688 tokens/s, with NF4
    22 186."""
    shape, rows, roof = llama_8b(), [2048] * 4, Roof(790e12, 4.3e12, "bfloat16")
    assert 8192 / limit_seconds(shape, rows, 16, roof) == pytest.approx(22_688, rel=2e-3)
    assert 8192 / limit_seconds(shape, rows, 16, roof, four_bit=True) == pytest.approx(22_186, rel=2e-3)
    assert step_flops(shape, rows, 16) < step_flops(shape, [8192], 16) and step_bytes(shape, rows) == step_bytes(
        shape, [8192]
    )
    assert step_flops(shape, rows, 16, forwards=1) / step_flops(shape, rows, 16) == pytest.approx(1.5, abs=0.02)
    with pytest.raises(ValueError, match="dense decoder"):
        ModelShape.of(torch.nn.ParameterList([torch.zeros(2, 3, 4)]))


def test_times_and_roof():
    assert Times.of([3.0, 1.0, 2.0, 4.0, 100.0]) == Times(3.0, 2.0, 100.0, 5)
    with pytest.raises(ValueError, match="want one duration"):
        Times.of([])
    calls = []
    times = ColdTimer(torch.device("cpu"), seconds=0.0, least=3, flush_bytes=16)(lambda: calls.append(1))
    assert times.n == 3 and len(calls) == 4
    roof = measure_roof(torch.device("cpu"), torch.float32, n=64, copy_bytes=1 << 16, seconds=0.01)
    assert 1e6 < roof.flops < 1e14 and 1e6 < roof.bandwidth < 1e14
    assert Roof(10.0, 2.0, "").seconds(20.0, 6.0) == 3.0


def test_the_gate_sees_one_small_adapter_and_missing_gradients():
    g = torch.Generator().manual_seed(0)
    reference = {
        f"{i}:{n}": torch.randn(40, generator=g, dtype=torch.float64) * s
        for i in (0, 1)
        for n, s in (("a", 1.0), ("b", 1e-4))
    }
    reference |= {
        "0:loss": torch.tensor([5.0], dtype=torch.float64),
        "1:loss": torch.tensor([6.0], dtype=torch.float64),
    }
    eager = {
        k: (v + 1e-6 * v.abs().max() * torch.randn(v.shape, generator=g, dtype=torch.float64)).float()
        for k, v in reference.items()
    }
    ours = {k: v.float() for k, v in reference.items()}
    assert gate(ours, reference, eager)
    assert not gate(ours | {"1:b": ours["1:b"] * 1.0001}, reference, eager)
    assert not gate(ours | {"1:loss": ours["1:loss"] + 1e-3}, reference, eager)
    assert not gate(ours | {"0:a": ours["0:a"] * math.nan}, reference, eager)
    assert "other parameters" in gate({k: v for k, v in ours.items() if k != "0:b"}, reference, eager).reason
