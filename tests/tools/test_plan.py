"""fastft plan: what it answers, and that the answer holds."""

import json
import time

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import fastft
from benchmarks import plan_error
from benchmarks.plan_error import optimizer_for
from fastft.cli import app
from fastft.errors import DtypeError, ModelNotFoundError, PlanError, PolicyError
from fastft.tools.plan import fake, fake_ops
from fastft.tools.plan.fake import FakeRun
from fastft.tools.plan.gpus import GIB, find
from fastft.tools.plan.measure import AllocationLedger
from fastft.tools.plan.optimizers import NAMES, states
from fastft.tools.plan.planner import _Work
from fastft.tools.plan.predict import TrainingSetup, subject
from fastft_kernels.lm_head.tiles import addmm32
from fastft_kernels.runtime.dispatch import planned_for_cuda

SMALL = LlamaConfig(
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=1024,
)


@pytest.fixture(scope="module")
def small():
    """On a card of 1 GiB."""
    return fastft.plan(SMALL, gpu="1GiB", seq=512, batch=8)


@pytest.fixture(scope="module")
def ours():
    """What a plan of the same asks, whose runs are remembered."""
    lora = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    half = torch.bfloat16
    return subject(
        SMALL, TrainingSetup(half, half, lora, torch.float32, False, "adamw_torch_fused", False, "trl", True)
    )


def test_parts_add_up_and_weights_are_the_models(small):
    weights = sum(p.numel() * 2 for p in AutoModelForCausalLM.from_config(SMALL).parameters())
    for line in small.lines:
        assert line.peak.total == sum(line.peak.parts.values())
        assert line.peak.parts["weights"] == pytest.approx(weights, rel=0.01)
        # and counts of steps
        assert line.peak.parts["optimizer"] == pytest.approx(2 * line.peak.parts["adapters"], rel=0.05)
    assert "not measured on a GPU" in str(small)


def test_less_recomputed_takes_more_and_stock_takes_more(small):
    of = {x.policy: x.peak.total for x in small.lines}
    assert of["offload"] < of["lean"] < of["none"] < of["no checkpointing"]
    assert of["lean"] < of["every layer checkpointed (TRL's default)"]


def test_the_largest_batch_fits_and_a_little_more_does_not(small, ours):
    room = small.gpu.usable - small.gpu.cublas
    line = next(x for x in small.lines if x.policy == "none")
    at = lambda batch, seq: ours.peak((0, 8), batch, seq).total
    assert at(line.largest_batch, 512) <= room * 1.001
    # the head's tiles are even: up to a row's worth less than at a multiple of 4096 tokens
    assert at(line.largest_batch + 2, 512) > room
    assert 0.95 * room < at(1, line.longest) <= room


def test_auto_recomputes_no_more_than_it_must(ours):
    chosen = [_Work(ours, 8, 512, find(f"{mib}MiB"), False).fastft("auto")[0] for mib in range(1080, 1320, 30)]
    counts = [x.recomputed for x in chosen]
    assert counts == sorted(counts, reverse=True) and counts[0] == 8 and counts[-1] == 0 and len(set(counts)) > 3
    assert all(x.fits for x in chosen if not x.offloaded)


def test_a_number_of_layers_lies_between(ours):
    a, b, c = (_Work(ours, 8, 512, None, False).fastft(n)[0].peak.total for n in (0, 4, "8"))
    assert a > b > c
    assert a - b == pytest.approx(b - c, rel=0.25)


def test_a_mask_grows_with_the_square_of_a_row():
    """Sliding attention of stock makes a mask of rows x length x length: a row twice as long takes more than two
    rows."""
    from transformers import MistralConfig

    config = MistralConfig(**{**SMALL.to_diff_dict(), "sliding_window": 64, "head_dim": 32, "model_type": "mistral"})
    lora = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    masked = subject(
        config,
        TrainingSetup(
            torch.float16, torch.float16, lora, torch.float32, False, "adamw_8bit", False, "model", True, patched=False
        ),
    )
    of = lambda rows, tokens: masked.shallow((8, 0), rows, tokens)[0].parts["activations"]
    assert of(1, 2048) - of(2, 1024) > 2048**2 - 2 * 1024**2 - 10_000


@pytest.mark.parametrize(
    ("text", "gib"),
    [("16GiB", 16), ("24576MiB", 24), ("T4", 14.5), ("rtx 4090", 23.6), ("NVIDIA H100", 79.1), ("a100-40gb", 39.3)],
)
def test_cards(text, gib):
    assert find(text).total == pytest.approx(gib * GIB, rel=1e-6)
    assert find(text).usable < find(text).total


def test_a_card_without_bfloat16_plans_float16():
    config = LlamaConfig(**{**SMALL.to_diff_dict(), "dtype": "bfloat16", "num_hidden_layers": 2})
    assert "float16, LoRA" in fastft.plan(config, gpu="T4", seq=32, stock=False, limits=False).what.replace(
        "bfloat16", "?"
    )


def test_the_title_names_the_adapters_dtype_and_the_optimizer(tmp_path):
    config = LlamaConfig(**{**SMALL.to_diff_dict(), "num_hidden_layers": 2})
    config.save_pretrained(tmp_path)
    line = ["plan", str(tmp_path), "--seq", "32", "--json", "--targets", "q_proj,v_proj", "--adapter-dtype", "bfloat16"]
    found = json.loads(CliRunner().invoke(app, [*line, "--optim", "adamw_8bit"]).stdout)
    assert "LoRA r=16 in bfloat16, adamw_8bit" in found["what"]
    adapted = 2 * 16 * (2 * 128 + 128 + 64)  # q and v of two layers
    assert found["lines"][0]["peak"]["parts"]["adapters"] == pytest.approx(2 * adapted, rel=0.02)


def test_experts_that_4_bits_leave_wide_are_named():
    how = {"peft_config": plan_error.on_attention(False), "stock": False, "limits": False}
    found = fastft.plan(plan_error.mixture(2), seq=32, batch=1, load_in_4bit=True, dtype="bfloat16", **how)
    assert any("Qwen3MoeExperts stays in bfloat16" in n for n in found.notes), found.notes
    stacks = 2 * 8 * 3 * 128 * 96 * 2  # bytes of two layers
    assert found.chosen.peak.parts["weights"] > stacks
    assert not any("stays in" in n for n in fastft.plan(SMALL, seq=32, batch=1, load_in_4bit=True, **how).notes)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"gpu": "RTX 9000"}, PlanError, "T4"),
        ({"optim": "lion"}, PlanError, "adamw_8bit"),
        ({"policy": "half"}, PolicyError, "lean"),
        ({"dtype": "int7"}, DtypeError, "bfloat16"),
        ({"loss": "dpo"}, PlanError, "trl"),
        ({"full": True, "load_in_4bit": True}, PlanError, "4 bits"),
        ({"seq": 0}, PlanError, "from 1"),
    ],
)
def test_errors_say_what_is_wanted(arguments, error, says):
    with pytest.raises(error, match=says):
        fastft.plan(SMALL, stock=False, **arguments)


def test_no_configuration():
    with pytest.raises(ModelNotFoundError, match="no configuration"):
        fastft.plan("/nowhere/at/all/model")


def test_the_command(tmp_path):
    SMALL.save_pretrained(tmp_path)
    picture = tmp_path / "plan.png"
    run = CliRunner().invoke(
        app, ["plan", str(tmp_path), "--seq", "64", "--batch", "2", "--4bit", "--json", "--plot", str(picture)]
    )
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout[run.stdout.index("{") :])
    assert [x["stack"] for x in found["lines"]].count("stock") == 2
    assert found["lines"][0]["policy"] == "auto (no limit)" and found["lines"][0]["peak"]["parts"]["quantisation"] > 0
    assert picture.stat().st_size > 10_000


def test_an_8b_model_takes_under_30_s_of_a_core(tmp_path):
    """CPU time: two cores of an idle machine take less of the clock. NF4, with all limits searched."""
    LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    start = time.process_time()
    found = fastft.plan(tmp_path, gpu="16GiB", load_in_4bit=True, batch=2, seq=2048)
    assert time.process_time() - start < 30
    assert found.layers == 32 and found.chosen.fits and 0 < found.chosen.recomputed < 32
    # 6.98e9 / 2, and two 16-bit matrices
    assert 5.2 < (found.chosen.peak.parts["weights"] + found.chosen.peak.parts["quantisation"]) / GIB < 5.4


# --- the optimizer's state


@pytest.mark.parametrize("optim", NAMES)
def test_optimizer_states_are_those_of_the_real_class(optim):
    """Byte by byte, on a CPU (which has no paged memory, so that paged states count)."""
    # beyond and below 4096 elements
    make = lambda: torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.Linear(128, 40))
    with FakeRun()():
        _, kept = states(make(), optim, for_cuda=False)
        planned = sum(t.numel() * t.element_size() for t in kept)
    model = make()
    optimizer = optimizer_for(model, optim)
    model(torch.randn(3, 96)).sum().backward()
    if "paged" in optim:
        with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU"):
            optimizer.step()
    else:
        optimizer.step()
    held = {
        t.data_ptr(): t.numel() * t.element_size()
        for s in optimizer.state.values()
        for t in s.values()
        if isinstance(t, torch.Tensor)
    }
    assert planned == sum(held.values())


def test_paged_states_are_not_on_the_card():
    make = lambda: torch.nn.Linear(1000, 1000)
    size = {}
    for optim in NAMES:
        with FakeRun()():
            size[optim] = sum(t.numel() * t.element_size() for t in states(make(), optim, for_cuda=True)[1])
    assert size["paged_adamw_32bit"] == 2 * 4 * 1000  # the bias, below 100 000 elements
    assert size["paged_adamw_8bit"] < size["adamw_8bit"] / 20
    assert size["adamw_8bit"] < size["adamw_torch"] / 3.8


# --- operators that a plan for CUDA meets


def test_no_operator_that_old_torch_cannot_fake(monkeypatch):
    """torch 2.11 decomposes addmm with out_dtype as if that were beta, and raises TypeError. A plan with two vocabulary
    tiles, a frozen and a trained head, meets it nowhere."""
    seen = set()
    real = fake.RealIntegers.__torch_dispatch__

    def dispatch(self, func, types, args=(), kwargs=None):
        seen.add(str(func))
        if func in (torch.ops.aten.addmm.dtype, torch.ops.aten.addmm.dtype_out):
            raise TypeError("unsupported operand type(s) for *: 'torch.dtype' and 'FakeTensor'")
        return real(self, func, types, args, kwargs)

    monkeypatch.setattr(fake.RealIntegers, "__torch_dispatch__", dispatch)
    config = LlamaConfig(**{**SMALL.to_diff_dict(), "vocab_size": 20_000, "num_hidden_layers": 2})
    for full in (False, True):
        assert fastft.plan(config, seq=64, batch=1, full=full, stock=False, limits=False).chosen.peak.total > 0
    assert "aten.mm.dtype" in seen


def test_operators_that_are_remembered_change_nothing(monkeypatch):
    """Masks, views, in-place operators, 4-bit weights, an optimizer: as if torch were asked about each one."""
    config = LlamaConfig(**{**SMALL.to_diff_dict(), "num_hidden_layers": 5})
    again, asked = [], []
    real = fake_ops.FakeOperators.__call__

    def counted(self, run, func, args, kwargs):
        return real(self, lambda: asked.append(func) or run(), func, args, kwargs)

    for answer in (counted, lambda self, run, func, args, kwargs: again.append(func) or run()):
        monkeypatch.setattr(fake_ops.FakeOperators, "__call__", answer)
        found = fastft.plan(config, seq=128, batch=3, load_in_4bit=True).to_dict()
        if answer is counted:
            first = found
    assert first == found
    assert len(asked) < len(again) / 3


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_products_of_fake_tensors(device):
    """On CUDA too, whose fake tensors need no driver."""
    half = dict(dtype=torch.bfloat16, device=device)
    with torch._subclasses.fake_tensor.FakeTensorMode(), planned_for_cuda():
        a, b, acc = torch.empty(8, 16, **half), torch.empty(16, 4, **half), torch.empty(8, 4, device=device)
        assert addmm32(acc, a, b) is acc
        new = addmm32(None, a, b)
        assert new.dtype == torch.float32 and new.shape == (8, 4) and new.device.type == device


def test_the_plan_counts_no_second_accumulator():
    """A product added in place takes no memory of its own."""
    with FakeRun()(), planned_for_cuda():
        a, b, acc = (
            torch.empty(80, 160, dtype=torch.bfloat16),
            torch.empty(160, 40, dtype=torch.bfloat16),
            torch.empty(80, 40),
        )
        ledger = AllocationLedger()
        with ledger:
            ledger.phase("forward")
            addmm32(acc, a, b)
        assert not len(ledger.phases()[0].sizes)
