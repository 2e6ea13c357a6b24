"""fastft run: a script that knows nothing of fastft trains patched, keeps its arguments and exit code; TRL's own
scripts run."""

import gc
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from tqdm import tqdm

from fastft.tools.run.runner import (
    Narrator,
    PatchOnFirstStep,
    ScriptNotFoundError,
    run_patched,
    run_program,
    run_script,
)
from tests.trainers import harness as h

SCRIPT = """
import sys, torch
from transformers import AutoModelForCausalLM
m = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.arange(8)[None]
m.eval()(input_ids=ids)
assert "_fastft" not in vars(m.model.norm), "a model that does not train was patched"
m.train()(input_ids=ids, labels=ids).loss.backward()
assert "_fastft" in vars(m.model.norm)
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
    arguments = [
        "--model_name_or_path",
        folder,
        "--dataset_name",
        data,
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        2,
    ]
    arguments += [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--report_to",
        "none",
        "--per_device_train_batch_size",
        2,
    ]
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
    return {
        "prompt": h.TEXTS[i],
        "chosen": answers[0],
        "rejected": answers[1],
        "completion": answers[0],
        "label": i % 2 == 0,
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ROWS)
def test_trls_other_scripts(folder, tmp_path, monkeypatch, capsys, name):
    """In this process, as `fastft run` calls it: what costs time in the subprocess is importing."""
    script = Path(trl.__file__).parent / "scripts" / f"{name}.py"
    if name == "reward":
        folder = h.checkpoint(tmp_path / "classifier", classifier=True)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(
        "\n".join(json.dumps({k: row(i)[k] for k in ROWS[name]}) for i in range(24))
    )
    (tmp_path / "my_rewards.py").write_text(
        "def length(completion_ids, **kwargs): return [float(len(set(c))) for c in completion_ids]\n"
    )
    arguments = [
        "--model_name_or_path",
        folder,
        "--dataset_name",
        tmp_path / "data",
        "--output_dir",
        tmp_path / "out",
        "--max_steps",
        2,
    ]
    arguments += [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--report_to",
        "none",
        "--per_device_train_batch_size",
        2,
    ]
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


def test_a_report_begins_a_line_beside_a_bar(folder, monkeypatch):
    """The trainer's bar stands on the line that is written next: it is wiped first, and drawn again below."""
    screen = io.StringIO()
    model = h.load(folder, "fastft")
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    with tqdm(total=2, file=screen):
        Narrator().show(model)
    before, found, after = screen.getvalue().partition("fastft: ")
    assert found and "0/2" in before and before.endswith("\r") and "0/2" in after


def test_what_is_not_there_is_said():
    with pytest.raises(ScriptNotFoundError, match="fastft run -m"):
        run_script("nowhere.py", [])
    with pytest.raises(ScriptNotFoundError, match="installed Python command"):
        run_program("no-such-command", [])


LAUNCHED = """
import sys, torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM
accelerator = Accelerator(cpu=True)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
ids = torch.arange(8)[None] + accelerator.process_index
accelerator.backward(model.train()(input_ids=ids, labels=ids).loss)
optimizer.step()
norm = accelerator.unwrap_model(model).model.norm
assert "_fastft" in vars(norm)
same = accelerator.gather(norm.weight.detach()[None])
assert (same == same[0]).all(), "the processes' gradients were not averaged"
sys.stdout.write("trained by %d\\n" % len(same))  # one write: the processes share the stream
sys.exit(7)
"""
LAUNCHERS = {
    "accelerate": (["accelerate.commands.launch", "--cpu", "--num_processes", "1"], 1, "exit status 7"),
    "torchrun": (["torch.distributed.run", "--nproc_per_node", "2"], 2, "(exitcode: 7)"),
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_under_a_launcher(folder, tmp_path, launcher):
    """`accelerate launch ... -m fastft run train.py`: every process patches its model, the first prints, and the
    launcher is told the code."""
    command, processes, told = LAUNCHERS[launcher]
    (tmp_path / "train.py").write_text(LAUNCHED)
    whole = [sys.executable, "-m", *command, "-m", "fastft", "run", "train.py", str(folder)]
    run = subprocess.run(whole, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 1 and told in run.stderr, run.stderr[
        -2000:
    ]  # both launchers answer 1 for any failure, and say which
    assert run.stdout.count("modules swapped") == 1 and run.stdout.count(f"trained by {processes}") == processes


def test_trls_command(folder, tmp_path, monkeypatch, capfd):
    """`fastft run -- trl sft ...` from a process that stays unpatched: accelerate starts another one, which is the one
    that trains."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in h.TEXTS))
    monkeypatch.chdir(tmp_path)
    arguments = [
        "sft",
        "--num_processes",
        1,
        "--model_name_or_path",
        folder,
        "--dataset_name",
        "data",
        "--output_dir",
        "out",
        "--max_steps",
        1,
    ]
    arguments += [
        "--use_peft",
        "--lora_target_modules",
        "all-linear",
        "--report_to",
        "none",
        "--per_device_train_batch_size",
        2,
    ]
    arguments += ["--bf16", "False", "--use_cpu", not torch.cuda.is_available()]
    code = run_program("trl", list(map(str, arguments)))
    said = capfd.readouterr()
    assert code == 0, said.err[-3000:]
    assert said.out.count("modules swapped") == 1 and (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("failure", "code"), [(subprocess.CalledProcessError(7, "python"), 7), (None, 0)], ids=["fails", "ends"]
)
def test_trls_command_gives_the_scripts_code(monkeypatch, failure, code):
    def launch(args):
        assert args.module and args.training_script == "fastft" and args.training_script_args[0] == "run"
        if failure is not None:
            raise failure

    monkeypatch.setattr("accelerate.commands.launch.launch_command", launch)
    assert (
        run_program(
            "trl",
            [
                "sft",
                "--model_name_or_path",
                "m",
                "--dataset_name",
                "d",
                "--output_dir",
                "o",
                "--bf16",
                "False",
                "--use_cpu",
                "True",
            ],
        )
        == code
    )


def test_a_model_that_cannot_be_patched_is_said(capsys):
    layer = torch.nn.Linear(2, 2)
    assert run_patched(lambda: layer(torch.ones(1, 2)).sum().backward()) == 0
    assert "no transformers or PEFT model was trained in this process" in capsys.readouterr().err


def test_what_goes_the_stock_way_is_said_at_the_end(folder, capsys):
    """The model is gone by then."""

    def train():
        model = h.load(folder, "stock").train()
        ids = torch.arange(6)[None]
        model(input_ids=ids, labels=ids).loss.backward()
        model.eval()(input_ids=ids, adapter_names=["default"])

    assert run_patched(train) == 0
    report, _, since = capsys.readouterr().out.partition("modules swapped")
    assert "went the stock way" not in report and "calls: linear group: mixed batch by adapter_names" in since


def test_a_model_that_outlives_the_script_leaves_no_global_hook(folder):
    """The hook comes back when a patched model is gone, for the next one; not once the script is over."""
    hooks, ids = torch.nn.modules.module._global_forward_pre_hooks, torch.arange(6)[None]
    with PatchOnFirstStep(lambda m: None, lambda m: None) as watch:
        first, second = (h.load(folder, "stock").train() for _ in range(2))
        first(input_ids=ids)
        assert not hooks
        del first
        gc.collect()
        assert len(hooks) == 1
        second(input_ids=ids)
    del second
    gc.collect()
    assert watch.seen == 2 and not hooks
