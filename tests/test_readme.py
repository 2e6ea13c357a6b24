"""What the README shows is what runs: its Python blocks in order, its two commands, its diff."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import claims, cpu, speed_table

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PERFORMANCE = (ROOT / "docs" / "PERFORMANCE.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)


@pytest.fixture
def hub_model_in_a_folder(tmp_path, monkeypatch):
    """A tiny random model and tokenizer in the relative folder that the README's Hub name reads as; the test runs
    there."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from fastft.tools.demo.model import train_tokenizer

    monkeypatch.chdir(tmp_path)
    (name,) = re.findall(r'^name = "([^"]+)"', "".join(blocks("python")), flags=re.M)
    tokenizer = train_tokenizer(["The capital of France is Paris."], 300)
    config = Qwen3Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=len(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(name)
    tokenizer.save_pretrained(name)
    return tmp_path


def test_python_blocks_run(hub_model_in_a_folder):
    """All in one process, as a reader would paste them; only the training arguments are told that there may be no
    GPU."""
    code = "\n".join(blocks("python"))
    assert code.count("SFTConfig(") == 1
    if not torch.cuda.is_available():
        code = code.replace('SFTConfig("out"', 'SFTConfig("out", use_cpu=True, bf16=False')
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=hub_model_in_a_folder, env=dict(os.environ)
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "modules swapped" in run.stdout
    assert (hub_model_in_a_folder / "adapter" / "adapter_model.safetensors").exists()


def test_the_diffs_two_sides_train_alike(hub_model_in_a_folder):
    """The first five losses in float32 from one seed, to five digits."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    (diff,) = blocks("diff")
    (name,) = re.findall(r'^name = "([^"]+)"', "".join(blocks("python")), flags=re.M)
    texts = ["The capital of France is Paris.", "Paris is the capital.", "France is.", "The capital is France, Paris."]
    losses = {}
    for sign in "-+":
        torch.manual_seed(0)
        scope = {"name": name}
        exec("from peft import LoraConfig, get_peft_model\nfrom transformers import AutoModelForCausalLM", scope)
        exec("\n".join(x[1:] for x in diff.splitlines() if x.startswith(sign)), scope)
        args = dict(max_steps=5, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[])
        data = Dataset.from_list([{"text": t} for t in texts * 5])
        trainer = SFTTrainer(
            model=scope["model"], train_dataset=data, args=SFTConfig("out", use_cpu=True, bf16=False, seed=1, **args)
        )
        trainer.train()
        losses[sign] = [x["loss"] for x in trainer.state.log_history if "loss" in x]
    assert len(losses["-"]) == 5 and losses["-"][4] < losses["-"][0]
    assert losses["+"] == pytest.approx(losses["-"], rel=1e-5)


def test_diff_is_three_lines_at_most_and_its_code_exists():
    (diff,) = blocks("diff")
    added = [line[1:] for line in diff.splitlines() if line.startswith("+")]
    assert 0 < len(added) <= 3
    for line in added:
        compile(line, "README", "exec")
    assert any("FastModel.from_pretrained(" in line for line in added)


def test_two_commands_each_set_up_a_fresh_machine():
    run, test = (b.strip() for b in blocks("bash"))
    for command in (run, test):
        assert "\n" not in command
        assert command.startswith("pip install torch==")
        assert "pip install -e" in command
    assert run.endswith("&& fastft demo")
    assert test.endswith("&& python -m pytest -n 2")


def test_ci_runs_the_readmes_test_command_as_it_stands():
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script
    out = subprocess.run(
        ["bash", str(ROOT / ".ci" / "run"), "--show"], capture_output=True, text=True, check=True
    ).stdout
    assert out.strip() == blocks("bash")[1].strip()


def test_folders_that_are_named_exist():
    for name in re.findall(r"`((?:fastft|tests|benchmarks|docs|\.ci)[\w./-]*)`", README):
        if name.startswith("fastft-demo"):
            continue
        assert (ROOT / name).exists() or name in ("fastft.patch",), name


def test_the_speed_table_is_the_result_files():
    """Every row of the table, and no other, is what the file of the GPU run says."""
    pattern = r"`python -m benchmarks.speed_table (benchmarks/results/\S+\.json)`.*\n\n\|.*\n\|-.*\n((?:\|.*\n)+)"
    ((path, rows),) = re.findall(pattern, README)
    found = json.loads((ROOT / path).read_text())
    assert rows.splitlines() == speed_table.table(found["rows"])
    assert path in PERFORMANCE  # which says how it was measured
    ((picture,),) = [re.findall(r"!\[[^]]*\]\((docs/\S+\.svg)\)", README)]
    drawn = (ROOT / picture).read_text()
    assert all(f" {r['tokens_per_s']:,}<" in drawn for r in found["rows"] if r["cell"] in speed_table.CELLS)


def test_every_figure_comes_from_a_result_file():
    """A table of figures names its command and its file in the line above; each of its rows is a figure of that
    file."""
    tables = re.findall(
        r"^.*`(python -m benchmarks[^`]*)`.*\((?:\.\./)?(benchmarks/results/[^)]+)\).*\n\n\|.*\n\|-.*\n((?:\|.*\n)+)",
        README + PERFORMANCE,
        flags=re.M,
    )
    tables = [t for t in tables if "speed_table" not in t[0]]
    assert tables
    for command, path, rows in tables:
        found = json.loads((ROOT / path).read_text())
        assert found["command"] == command
        figures = {cpu.row(cpu.Figure(**f)) for f in found.get("figures", ())} | {
            claims.markdown(claims.Row(**r)) for r in found.get("rows", ())
        }
        assert set(rows.splitlines()) <= figures
    words = re.sub(r"^\|.*$|```.*?```", "", README, flags=re.M | re.S)
    assert not re.findall(r"\d(?:\.\d+)?\s*(?:x faster|% faster|% less|x less|tokens/s)", words)
