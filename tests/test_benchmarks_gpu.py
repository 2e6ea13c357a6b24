"""The GPU benchmark, on small shapes on a CPU: it runs to the end, what is wrong prints no speed, and what dies costs
one row."""

import functools
import io
import json
import subprocess
import sys
import time
import types
from dataclasses import asdict

import pytest
import torch

from benchmarks import (
    gpu,
    gpu_experts,
    gpu_fp8,
    gpu_host,
    gpu_kernels,
    gpu_models,
    gpu_profile,
    gpu_repeat,
    gpu_steps,
    gpu_worker,
)
from benchmarks.sheet import Missing, Red, Row, Sheet, markdown, read
from fastft.linear.float8_linear import float8_layers
from fastft.tools.bench.timing import ColdTimer, Roof
from fastft_kernels.quant import scaled_product

CPU = torch.device("cpu")
ROOF = Roof(1e10, 1e10, "bfloat16")
SPEEDS = {"fwd us", "bwd us", "% of roof", "tokens/s", "step ms", "% of limit"}


@pytest.fixture
def sheet(tmp_path):
    return Sheet(tmp_path / "rows.jsonl", "s", time.time() + 600)


def test_the_command_runs_to_its_end(tmp_path, capsys):
    assert gpu.main(["--tiny", "--only", "roof", "--out", str(tmp_path)]) == 0
    assert "roof: bf16 product and copy: ok" in capsys.readouterr().err
    (path,) = tmp_path.glob("gpu-*.json")
    found = json.loads(path.read_text())
    assert [r["section"] for r in found["rows"]] == ["roof"] and found["rows"][0]["state"] == "ok"
    assert {"device", "commit", "torch", "transformers", "command"} <= set(found["header"])
    text = path.with_suffix(".md").read_text()
    assert "## roof" in text and found["header"]["command"] in text


def test_every_kernel_is_judged_and_timed(sheet):
    gpu_kernels.section(sheet, True, CPU, ROOF)
    rows, begun = read(sheet.path)
    assert begun is None and len(rows) == len(gpu_kernels.CASES) + 1
    assert [r for r in rows if r.state != "ok"] == []
    assert all(r.figures["fwd us"] > 0 and r.figures["% of roof"] > 0 for r in rows)


def test_a_kernel_that_is_off_prints_no_time(sheet, monkeypatch):
    case = next(c for c in gpu_kernels.CASES if c.name.startswith("glu"))
    planted = gpu_kernels.Case(
        case.name, case.shapes, case.trained, lambda t: (case.ours(t)[0] * 1.01,), case.eager, case.work
    )
    monkeypatch.setattr(gpu_kernels, "CASES", (planted,))
    gpu_kernels.section(sheet, True, CPU, ROOF)
    row = read(sheet.path)[0][0]
    assert row.state == "red" and "FAIL" in row.note and not SPEEDS & set(row.figures)


@pytest.mark.parametrize("trl", [True, False])
def test_steps_of_all_stacks(sheet, monkeypatch, trl):
    for module in (gpu_models, gpu_steps):
        monkeypatch.setattr(module, "HAS_TRL", trl)
    monkeypatch.setattr(gpu_steps, "cells", lambda tiny: {"rows": (gpu_steps.sft_loss, [10, 6])})
    monkeypatch.setattr(
        gpu_steps,
        "preference_cells",
        lambda tiny: {"pairs": (gpu_steps.dpo_loss, [8] * 4), "group": (gpu_steps.grpo_loss, [8] * 4)},
    )
    gpu_steps.section(sheet, True, CPU, ROOF)
    gpu_steps.section(sheet, True, CPU, ROOF, preference=True)
    patch, *rows = read(sheet.path)[0]
    assert patch.state == "ok" and patch.figures["first patch s"] > 0
    assert [(r.name, r.state, r.note) for r in rows if r.state != "ok"] == []
    assert len(rows) == 9 and all(
        r.figures["tokens/s"] > 0 and r.figures["head"] == ("TRL's" if trl else "the model's") for r in rows
    )
    stock, best, fast = (r.figures for r in rows[:3])
    assert stock["checkpointing"] and not best["checkpointing"] and fast["checkpointing"]
    assert "policy auto" in fast["policy"] and "policy" not in stock
    assert stock["first loss"] == pytest.approx(fast["first loss"], rel=1e-2)


def test_experts_are_judged_and_timed(sheet, monkeypatch):
    monkeypatch.setattr(gpu_experts, "config_experts", functools.partial(gpu_experts.config_experts, layers=1))
    gpu_experts.section(sheet, True, CPU, ROOF)
    rows = read(sheet.path)[0]
    assert [(r.state, r.note) for r in rows] == [("ok", "")] * 3 and rows[2].figures["times stock"] > 0
    sheet.path.unlink()
    monkeypatch.setattr(gpu_experts.Gate, "__init__", lambda self, *a: setattr(self, "verdict", ""))
    gpu_experts.section(sheet, True, CPU, ROOF)
    assert [r.state for r in read(sheet.path)[0]] == ["ok", "ok", "red"]


def _event(name="", shapes=(), kernels=(), device=torch.autograd.DeviceType.CPU, us=0.0):
    kernels = [types.SimpleNamespace(name=n, duration=d) for n, d in kernels]
    return types.SimpleNamespace(
        name=name, input_shapes=shapes, kernels=kernels, device_type=device, device_time=us, cpu_time=us
    )


def test_kernels_are_sorted_by_the_work_that_they_do():
    on_device = functools.partial(_event, device=torch.autograd.DeviceType.CUDA)
    events = [
        _event("aten::mm", [[8192, 4096], [4096, 4096]], [("gemm", 300.0)]),
        _event("aten::addmm", [[4096], [8192, 16], [16, 4096]], [("gemm", 50.0)]),
        _event("aten::_scaled_dot_product_cudnn_attention", [[4, 8, 2048, 128]], [("cudnn_sdpa", 90.0)]),
        on_device("gemm", us=300.0),
        on_device("gemm", us=50.0),
        on_device("cudnn_sdpa", us=90.0),
        on_device("_glu_fwd_kernel", us=20.0),
        on_device("void at::native::vectorized_elementwise_kernel<4>", us=7.0),
    ]
    work = gpu_profile.work_of(events)
    assert work.ms == {
        "large products": 0.3,
        "small products": 0.05,
        "attention": 0.09,
        "Triton": 0.02,
        "other": 0.007,
    }
    replayed = gpu_profile.work_of([on_device("gemm", us=400.0)], work)
    assert replayed.ms["large products"] == 0.4 and replayed.launches["large products"] == 1


def test_a_stack_that_is_off_prints_no_speed(sheet, monkeypatch):
    from fastft.norm import norms

    real = norms.rms_norm_with_rstd
    monkeypatch.setattr(
        norms, "rms_norm_with_rstd", lambda x, *a, **k: (real(x, *a, **k)[0] * 1.05, real(x, *a, **k)[1])
    )
    monkeypatch.setattr("fastft.proving.proof_cache.CACHE", _Believed())
    monkeypatch.setattr(gpu_steps, "cells", lambda tiny: {"rows": (gpu_steps.sft_loss, [10, 6])})
    gpu_steps.section(sheet, True, CPU, ROOF)
    states = {r.name.rsplit(": ", 1)[1]: r for r in read(sheet.path)[0] if r.name.count(": ") == 1}
    assert [states[s].state for s in ("stock", "best", "fastft")] == ["ok", "ok", "red"]
    assert not SPEEDS & set(states["fastft"].figures)


class _Believed(dict):
    """Proofs that always hold: for a planted error that the patch itself would have refused."""

    def __contains__(self, key):
        return True

    def __getitem__(self, key):
        from fastft.proving.prove import Proof

        return Proof(True, 0.0, 0.0, "bfloat16")


def test_memory_that_runs_out_falls_back_to_checkpointing_and_then_is_a_row(sheet, monkeypatch):
    tried = []

    def train(model, loss, b, device, *, checkpointing, seconds, **more):
        tried.append(checkpointing)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. More")

    monkeypatch.setattr(gpu_steps, "train", train)
    row = sheet.run("x", lambda: gpu_steps.fitting(torch.nn.Linear(2, 2), "best", gpu_steps.sft_loss, {}, CPU, 0.0))
    assert tried == [False, True] and row.state == "out of memory" and row.note == "CUDA out of memory"


def test_two_runs_give_the_same_bits(sheet):
    gpu_host.determinism_section(sheet, True, CPU, ROOF)
    assert [(r.state, r.figures["same bits"]) for r in read(sheet.path)[0]] == [("ok", True)]


def test_two_runs_that_differ_are_red(sheet, monkeypatch):
    real, calls = gpu_host._step, []

    def step(model, b, device):
        calls.append(1)
        return real(model, b, device) + (1e-6 if len(calls) == 5 else 0.0)

    monkeypatch.setattr(gpu_host, "_step", step)
    gpu_host.determinism_section(sheet, True, CPU, ROOF)
    assert [(r.state, "1 of " in r.note) for r in read(sheet.path)[0]] == [("red", True)]


@pytest.fixture
def planted():
    """Two operators that never repeat, one of them as if it were ours."""
    libraries, calls = [], []
    for namespace in ("fastft", "elsewhere"):
        library = torch.library.Library(namespace, "FRAGMENT")
        library.define("planted_for_a_test(Tensor x) -> Tensor")
        library.impl(
            "planted_for_a_test", lambda x: calls.append(1) or x + 1e-3 * len(calls), "CompositeExplicitAutograd"
        )
        libraries.append(library)
    yield
    for library in libraries:
        library._destroy()


@pytest.mark.parametrize(("namespace", "state"), [("fastft", "red"), ("elsewhere", "ok")])
def test_what_does_not_repeat_is_named(sheet, monkeypatch, planted, namespace, state):
    """Ours is red; another library's is a row that says whose it is."""
    real = gpu_host._step

    def step(model, b, device):
        loss = real(model, b, device)
        for p in model.parameters():
            if p.grad is not None:
                p.grad = getattr(torch.ops, namespace).planted_for_a_test(p.grad)
        return loss

    monkeypatch.setattr(gpu_host, "_step", step)
    gpu_host.determinism_section(sheet, True, CPU, ROOF)
    (row,) = read(sheet.path)[0]
    said = row.note if state == "red" else f"{row.figures['first that differs']} {row.figures['whose']}"
    assert row.state == state and f"{namespace}.planted_for_a_test" in said


def test_only_what_differs_for_the_same_inputs_is_a_culprit(planted):
    x = torch.arange(5.0)
    found = gpu_repeat.culprits(lambda: torch.ops.elsewhere.planted_for_a_test(x * 2).exp().sum())
    assert found.first == "elsewhere.planted_for_a_test.default" and found.all == {found.first: 1}
    assert gpu_repeat.culprits(lambda: (x @ x).exp()).first == ""


def test_a_difference_in_the_backward_is_found(planted):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return torch.ops.fastft.planted_for_a_test(g)

    found = gpu_repeat.culprits(lambda: Function.apply(torch.ones(3, requires_grad=True)).sum().backward())
    assert found.ours == ["fastft.planted_for_a_test.default"]


@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("aten._scaled_dot_product_cudnn_attention_backward.default", "cuDNN's attention"),
        ("aten._scaled_dot_product_flash_attention_backward.default", "FlashAttention (torch)"),
        ("aten.mm.dtype", "cuBLAS"),
        ("aten.embedding_dense_backward.default", "torch's atomic additions"),
        ("aten.exp.default", "torch"),
        ("fastft.rms_norm_fwd.default", "fastft"),
        ("bitsandbytes.gemm_4bit.default", "bitsandbytes"),
    ],
)
def test_owners(name, who):
    assert gpu_repeat.owner(name) == who


def test_checksums_see_places_and_bits():
    x = torch.tensor([1.0, 2.0, 3.0])
    assert gpu_repeat.checksum(x) == gpu_repeat.checksum(x.clone())
    others = [x.flip(0), x * (1 + 2**-23), x[:2], torch.tensor([1.0, 2.0, -3.0])]
    assert all(gpu_repeat.checksum(y) != gpu_repeat.checksum(x) for y in others)
    assert gpu_repeat.checksum(torch.ones(3, 2, dtype=torch.bfloat16).t()) == gpu_repeat.checksum(
        torch.ones(2, 3, dtype=torch.bfloat16)
    )


def test_the_planner_is_measured_or_said_to_be_missing(sheet, monkeypatch):
    Outcome = types.SimpleNamespace
    found = Outcome(
        predicted={"forward": 2.0**20, "backward": 3 * 2.0**20},
        measured={"forward": 2 * 2.0**20, "backward": 2.0**20},
        error=0.5,
    )
    module = types.SimpleNamespace(
        cases=lambda device, tiny: [types.SimpleNamespace(name=n) for n in "abcd"], outcome=lambda case, device: found
    )
    monkeypatch.setitem(sys.modules, "benchmarks.plan_error", module)
    gpu_host.planner_section(sheet, True, CPU, ROOF)
    monkeypatch.setitem(sys.modules, "benchmarks.plan_error", None)
    gpu_host.planner_section(sheet, True, CPU, ROOF)
    *rows, last = read(sheet.path)[0]
    assert [r.name for r in rows] == ["a", "b", "c"] and rows[0].figures == {
        "predicted MiB": 3.0,
        "measured MiB": 2.0,
        "error %": 50.0,
        "forward, predicted - measured MiB": -1.0,
        "backward, predicted - measured MiB": 2.0,
    }
    assert last.state == "missing" and "plan_error" in last.note


class Worker(gpu.Worker):
    """A section whose process runs `code` after the line on its input."""

    def __init__(self, code, rows, log):
        self.section, self.rows, self.log = "s", rows, log.open("a")
        start = "import sys, json, os, time; sys.path.insert(0, '.'); go = json.loads(sys.stdin.readline())\n"
        start += f"rows = open({str(rows)!r}, 'a')\n"
        write = "def write(line): rows.write(json.dumps(line) + '\\n'); rows.flush()\n"
        self.process = subprocess.Popen(
            [sys.executable, "-c", start + write + code],
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )


def _row(name):
    return json.dumps({"row": asdict(Row("kernels", name))})


DIES = f"""
for name, row in (("a", {_row("a")!r}), ("b", None), ("c", {_row("c")!r})):
    if name in go["done"]:
        continue
    write({{"begun": name}})
    if row is None:
        sys.stderr.write("an illegal access\\n")
        os._exit(7)
    write(json.loads(row))
"""
HANGS = f"""
write(json.loads({_row("a")!r}))
write({{"begun": "b"}})
time.sleep(60)
"""


def test_what_comes_is_told_at_once(tmp_path, capsys):
    rows, log = tmp_path / "kernels.jsonl", tmp_path / "kernels.log"
    code = f"write(json.loads({_row('a')!r})); print('FAILED NOW x: E', flush=True); time.sleep(60)"
    gpu._section("kernels", Worker(code, rows, log), None, time.time() + 1, {})
    told = capsys.readouterr().err
    assert "kernels: a: ok" in told and "FAILED NOW x: E" in told


def test_a_process_that_dies_costs_one_row(tmp_path):
    rows, log = tmp_path / "kernels.jsonl", tmp_path / "kernels.log"
    found = gpu._section("kernels", Worker(DIES, rows, log), lambda name: Worker(DIES, rows, log), time.time() + 30, {})
    assert [(r.name, r.state) for r in found] == [("a", "ok"), ("b", "error"), ("c", "ok")]
    assert "ended with 7" in found[1].note and "illegal access" in found[1].note


def test_a_process_that_hangs_is_ended_with_its_rows_kept(tmp_path):
    rows, log = tmp_path / "kernels.jsonl", tmp_path / "kernels.log"
    begun = time.time()
    found = gpu._section("kernels", Worker(HANGS, rows, log), None, time.time() - 2, {})
    assert [(r.name, r.state) for r in found] == [("a", "ok"), ("b", "not run")] and time.time() - begun < 20


def test_what_has_no_time_left_is_listed(tmp_path):
    sheet = Sheet(tmp_path / "rows", "s", time.time() + 1)
    row = sheet.run("long", lambda: {}, least=30)
    assert row.state == "not run" and "30 s wanted" in row.note
    result = gpu.Result(tmp_path / "gpu-x.json", {"command": "c"})
    gpu.run(["roof", "kernels"], True, result, 0.0, tmp_path)
    assert [(r.section, r.state) for r in result.rows] == [("roof", "not run"), ("kernels", "not run")]
    assert "| all of it | not run |" in "\n".join(markdown(result.rows))


def test_a_figure_that_is_no_number_is_left_out(sheet):
    sheet.run("a", lambda: {"x": float("nan"), "y": float("inf"), "z": 2.0, "s": "text", "b": True})
    rows = read(sheet.path)[0]
    assert rows[0].figures == {"x": None, "y": None, "z": 2.0, "s": "text", "b": True}
    assert "| a | ok |  |  | 2 | text | yes |  |" in markdown(rows)


XDIST = (
    "[gw0] [ 50%] PASSED tests/kernels/test_a.py::test_x[bf16] \n"
    "[gw1] [100%] FAILED tests/kernels/test_a.py::test_y[bf16] \n"
    "FAILED tests/kernels/test_a.py::test_y[bf16] - x\n"
)
PLAIN = "tests/kernels/test_a.py::test_x[bf16] PASSED [ 50%]\ntests/kernels/test_a.py::test_y SKIPPED (no) [100%]\n"


def test_pytests_output_is_read():
    assert gpu_worker.summary(PLAIN, True, 0) == {"passed": 1, "failed": 0, "skipped": 1, "all ran": False}
    with pytest.raises(Red, match=r"'passed': 1, 'failed': 1.*test_y\[bf16\]"):
        gpu_worker.summary(XDIST, False, 1)
    with pytest.raises(Red, match="exit code 4"):
        gpu_worker.summary("no tests ran", False, 4)


def test_without_hypothesis_its_files_are_named(monkeypatch):
    commands = []

    class Popen:
        pid = 0

        def __init__(self, command, **kwargs):
            commands.append(command)
            self.stdout = io.StringIO(PLAIN)

        def wait(self):
            return 0

    monkeypatch.setattr(gpu_worker.subprocess, "Popen", Popen)
    monkeypatch.setattr(
        gpu_worker.importlib.util, "find_spec", lambda name: None if name in ("hypothesis", "xdist") else object()
    )
    found = gpu_worker.run_tests(("tests/kernels/test_weights.py", "tests/kernels/test_glu.py"), "not slow", 9)
    assert found["left out, for want of hypothesis"] == "test_glu"
    assert commands[0][-1] == "tests/kernels/test_weights.py" and "-n" not in commands[0]
    monkeypatch.setattr(gpu_worker.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(Missing, match="need pytest"):
        gpu_worker.run_tests((), "slow", 9)


FAILS = """
import time
def test_good(): pass
def test_bad(): assert 1 == 2, "the two\\nnumbers differ"
def test_hangs(): time.sleep(60)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_failure_is_told_when_it_happens(tmp_path, monkeypatch, capfd, workers):
    """With its error, though the run is cut off in the test after it."""
    path = tmp_path / "test_planted.py"
    path.write_text(FAILS)
    if workers:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(gpu_worker, "WORKERS", workers)
    begun = time.time()
    with pytest.raises(Red, match=r"'failed': 1.*'all ran': False.*test_bad \[call.*the two numbers differ"):
        gpu_worker.run_tests((str(path),), "not slow", 20.0 if workers else 12.0)  # two more processes import
    assert time.time() - begun < 40
    assert "FAILED NOW" in capfd.readouterr().err


def test_large_tensors_are_kept_apart():
    """By their marker: they take tens of GiB each, so they run alone."""
    assert "-n" not in gpu_worker.tests_command(("x",), "slow")
    command = gpu_worker.tests_command(("x",), "not slow")
    assert command[command.index("-m", 4) + 1] == "not slow"


def test_fp8_products_are_judged_and_timed(sheet, monkeypatch):
    monkeypatch.setattr(gpu_fp8, "step", lambda model, *rest: {"layers": float(len(float8_layers(model)))})
    gpu_fp8.section(sheet, True, CPU, ROOF)
    rows = read(sheet.path)[0]
    assert [(r.name, r.state, r.note) for r in rows if r.state != "ok"] == []
    assert len(rows) == 7 and all(r.figures["fwd us"] > 0 and r.figures["bwd speedup"] > 0 for r in rows[:4])
    assert [r.figures["layers"] for r in rows[4:]] == [0, 14, 14]


@pytest.mark.parametrize("what", ["transpose_8bit", "quantize_e4m3_rows"])
def test_an_fp8_product_that_is_off_prints_no_time(sheet, monkeypatch, what):
    real = getattr(scaled_product, what)
    wrong = {
        "transpose_8bit": lambda q, out=None: real(q, out).roll(1, 0),
        "quantize_e4m3_rows": lambda x, columns=None: real(x),
    }[what]
    monkeypatch.setattr(scaled_product, what, wrong)
    row = sheet.run("x", lambda: gpu_fp8.rows_of_fp8(32, 64, 24, CPU, ROOF, ColdTimer(CPU, 0.01, 1)))
    assert row.state == "red" and "FAIL" in row.note and not row.figures


def test_an_fp8_step_says_what_it_weighs(sheet):
    model = gpu_models.build(gpu_models.config_8b(True, layers=1), CPU)
    before = sum(p.nbytes for p in model.parameters())
    gpu_fp8.quantise(model, "both")
    row = sheet.run("x", lambda: gpu_fp8.step(model, [12] * 2, True, CPU, ROOF))
    assert row.state == "ok" and row.figures["tokens/s"] > 0, row.note
    assert row.figures["weights GiB"] * 2**30 < before
    assert {m.products for m in float8_layers(model)} == {"both"}
