"""fastft run: a script that knows nothing of fastft trains patched, keeps its arguments and exit code; TRL's own scripts run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl

from fastft.tools.run import PatchOnFirstStep, ScriptNotFoundError, run_program, run_script
from tests.trainers import harness as h

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(8)[None]
m.eval()(input_ids=ids)
assert not type(m.model.norm).__name__.startswith("Fast"), "a model that does not train was patched"
m.train()(input_ids=ids, labels=ids).loss.backward()
assert type(m.model.norm).__name__.startswith("Fast")
assert not torch.nn.modules.module._global_forward_pre_hooks, "the run pays for the hook"
sys.exit(7)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


def fastft(*args, cwd):
    return subprocess.run([sys.executable, "-m", "fastft", "run", *args], capture_output=True, text=True, cwd=cwd)


def test_a_script_keeps_its_arguments_and_exit_code(folder, tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    run = fastft("train.py", str(folder), cwd=tmp_path)
    assert run.returncode == 7, run.stderr[-2000:]
    assert "rms_norm" in run.stdout and "lora_linear" in run.stdout


def test_trls_own_sft_script(folder, tmp_path):
    import trl.scripts.sft

    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in h.TEXTS))
    arguments = ["--model_name_or_path", folder, "--dataset_name", data, "--output_dir", tmp_path / "out", "--max_steps", 2]
    arguments += ["--use_peft", "--lora_target_modules", "all-linear", "--report_to", "none", "--per_device_train_batch_size", 2]
    arguments += ["--bf16", "False", "--use_cpu", str(not torch.cuda.is_available())]
    run = fastft(trl.scripts.sft.__file__, *map(str, arguments), cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    assert "modules swapped" in run.stdout
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


ROWS = {
    "dpo": ("prompt", "chosen", "rejected"),
    "kto": ("prompt", "completion", "label"),
    "reward": ("chosen", "rejected"),
    "grpo": ("prompt",),
    "rloo": ("prompt",),
}
GENERATES = ["--num_generations", 2, "--max_completion_length", 6, "--reward_funcs", "my_rewards.length"]
EXTRA = {"grpo": GENERATES, "rloo": GENERATES, "reward": ["--lora_task_type", "SEQ_CLS"]}


def row(i):
    answers = " " + h.TEXTS[(i + 5) % 24], " " + h.TEXTS[(i + 11) % 24]
    return {"prompt": h.TEXTS[i], "chosen": answers[0], "rejected": answers[1], "completion": answers[0], "label": i % 2 == 0}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ROWS)
def test_trls_other_scripts(folder, tmp_path, monkeypatch, capsys, name):
    """In this process, as `fastft run` calls it: what costs time in the subprocess is importing."""
    script = Path(trl.__file__).parent / "scripts" / f"{name}.py"
    if name == "reward":
        folder = h.checkpoint(tmp_path / "classifier", classifier=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({k: row(i)[k] for k in ROWS[name]}) for i in range(24)))
    (tmp_path / "my_rewards.py").write_text("def length(completion_ids, **kwargs): return [float(len(set(c))) for c in completion_ids]\n")
    arguments = ["--model_name_or_path", folder, "--dataset_name", tmp_path / "data", "--output_dir", tmp_path / "out", "--max_steps", 2]
    arguments += ["--use_peft", "--lora_target_modules", "all-linear", "--report_to", "none", "--per_device_train_batch_size", 2]
    arguments += ["--bf16", "False", "--use_cpu", not torch.cuda.is_available(), *EXTRA.get(name, [])]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    assert run_script(str(script), list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert "modules swapped" in printed and "lora_linear" in printed and ("head" in printed or name == "reward")
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_only_what_trains_is_patched_and_the_hook_goes(folder):
    seen = []
    model = h.load(folder, "stock")
    ids = torch.arange(6)[None]
    with PatchOnFirstStep(seen.append, lambda m: None) as watch:
        with torch.no_grad():
            model(input_ids=ids)
        assert not seen
        model.train()(input_ids=ids)
        model(input_ids=ids)
        assert seen == [model] and watch.seen == 1
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_what_is_not_there_is_said():
    with pytest.raises(ScriptNotFoundError, match="fastft run -m"):
        run_script("nowhere.py", [])
    with pytest.raises(ScriptNotFoundError, match="installed Python command"):
        run_program("no-such-command", [])
