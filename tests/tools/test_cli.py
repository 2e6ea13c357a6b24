"""The commands' own manners: versions, help, JSON alone on stdout, a script's traceback, mistakes in one line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

import fastft
from fastft.cli import app
from fastft.errors import ModelNotFoundError, PlanError
from fastft.tools.report import report_from_config

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=64,
    num_attention_heads=2,
    num_key_value_heads=2,
    vocab_size=128,
    num_hidden_layers=2,
    max_position_embeddings=128,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(CONFIG).save_pretrained(place)
    return place


def command(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "fastft", *map(str, args)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80", **env},
    )


def in_process(*args):
    """The same without a process of its own."""
    found = CliRunner().invoke(app, [str(a) for a in args], env={"COLUMNS": "80"})
    assert found.exit_code == 0, found.output
    return found


def test_version():
    run = command("--version")
    assert run.returncode == 0
    assert run.stdout.startswith("fastft 0.") and f"torch {torch.__version__}" in run.stdout and "peft " in run.stdout


def test_run_shows_what_it_takes():
    shown = command("run", "--help").stdout
    assert "target" in shown.lower() and "A Python script; with -m a module; after --" in " ".join(shown.split())


@pytest.mark.parametrize("name", ["verify", "plan", "report"])
def test_json_is_alone_on_stdout(folder, name):
    more = {"verify": ["--seq", "8"], "plan": ["--seq", "32", "--gpu", "1GiB"], "report": []}[name]
    run = in_process(name, folder, "--json", *more)

    def no_constant(text):
        raise AssertionError(f"{text} is not JSON")

    found = json.loads(run.stdout, parse_constant=no_constant)
    if name == "plan":
        assert found["cpu_seconds"]["imports"] > 0 and found["cpu_seconds"]["plan"] > 0
    for noise in ("Warning", "pip install kernels", "Loading weights"):
        assert noise not in run.stderr


def test_tables_fit_80_columns(folder):
    for args in (["verify", folder, "--seq", "8"], ["report", folder], ["plan", folder, "--seq", "32"]):
        run = in_process(*args)
        assert max(len(x.rstrip()) for x in run.stdout.splitlines()) <= 80
        assert ("lora_linear(group" in run.stdout) or args[0] == "plan"


def test_a_script_s_traceback_is_its_own(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("def inner():\n    raise KeyError('mine')\n\ninner()\n")
    run = command("run", script)
    plain = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == plain.returncode == 1
    assert run.stderr.endswith(plain.stderr) and "fastft/" not in run.stderr.split("Traceback")[1]


def test_a_script_s_own_hook_for_exceptions_is_called(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys\nsys.excepthook = lambda *a: print('hook', a[0].__name__)\nraise KeyError('mine')\n")
    run = command("run", script)
    assert run.returncode == 1 and run.stdout.strip() == "hook KeyError"


def test_arguments_reach_the_script_unchanged(tmp_path):
    script = tmp_path / "train.py"
    script.write_text("import sys\nprint(sys.argv[1:])\n")
    assert command("run", script, "--help", "--", "-m", "x").stdout.strip() == "['--help', '--', '-m', 'x']"


# --- the plan's answers


def test_an_adapter_is_planned_with_its_base(folder, tmp_path):
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path)
    found = fastft.plan(tmp_path, seq=32, stock=False)
    wanted = sum(p.numel() * 4 for p in adapted.parameters() if p.requires_grad)
    assert found.chosen.peak.parts["adapters"] == pytest.approx(wanted, abs=512 * 4)
    assert f"planned for {folder}, the base of the adapter in {tmp_path}" in found.notes and "LoRA r=4" in found.what


def test_absurd_sizes_are_one_line():
    with pytest.raises(PlanError, match="at most 67,108,864") as e:
        fastft.plan(CONFIG, seq=10**9)
    assert "\n" not in str(e.value)


def test_rows_beyond_the_positions_are_noted():
    assert any("longer than the 128 positions" in n for n in fastft.plan(CONFIG, seq=256, batch=1, stock=False).notes)


def test_every_policy_is_planned():
    peaks = {
        policy: fastft.plan(CONFIG, seq=64, batch=8, policy=policy, stock=False).chosen
        for policy in ("auto", "trainer", "none", "lean", "full", "offload", 1, "1GiB")
    }
    assert peaks["trainer"].peak == peaks["lean"].peak and peaks["trainer"].policy.startswith("trainer")
    assert peaks["lean"].peak.total <= peaks["full"].peak.total <= peaks["none"].peak.total
    assert peaks["full"].policy == "full" and peaks["full"].recomputed == 2


def test_progress_tells_what_is_run():
    said = []
    fastft.plan(CONFIG, seq=32, batch=1, progress=said.append)
    assert said[0] == "building the model" and any(x.startswith("stock: 1 x 32 tokens") for x in said)


def test_an_adapter_is_reported_and_verified_with_its_base(folder, tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)
    with torch.no_grad():
        for n, p in adapted.named_parameters():
            if "lora_B" in n:
                p.normal_(std=0.02)
    adapted.save_pretrained(tmp_path)
    told = " ".join(in_process("report", tmp_path).stdout.split())
    assert "lora_linear(group of 1)" in told and "group of n: the n linear layers of one input" in told
    assert "error: the largest of the proof" in told and "lazy logits: made only where" in told
    assert f"theadapter{tmp_path}onitsbase{folder}" in told.replace(" ", "")
    run = in_process("verify", tmp_path, "--seq", "8")
    assert "PASS" in run.stdout and "modules swapped" not in run.stdout  # one table


def test_a_report_of_what_is_not_there(tmp_path):
    for name, said in ((tmp_path / "gone", "there is no folder"), ("gone", "'gone' is neither a folder here nor")):
        with pytest.raises(ModelNotFoundError, match=said) as e:
            report_from_config(str(name))
        assert "\n" not in str(e.value)


def test_verify_says_the_same_each_time(folder):
    """In bfloat16, where the loss of one batch is one throw of a die."""
    shown = {in_process("verify", folder, "--seq", "8", "--dtype", "bf16", "--json").stdout for _ in range(2)}
    assert len(shown) == 1


def test_a_card_that_is_nearly_named():
    for text, meant in (("16", "16GiB"), ("H1000", "H100")):
        with pytest.raises(PlanError, match=f"did you mean '{meant}'"):
            fastft.plan(CONFIG, gpu=text)


def test_a_card_without_bfloat16_is_noted():
    config = LlamaConfig(**{**CONFIG.to_diff_dict(), "dtype": "bfloat16"})
    assert "in float16: a T4 has no bfloat16" in fastft.plan(config, gpu="T4", seq=32, stock=False, limits=False).notes
