"""A folder appears whole or not at all: after any error, after SIGKILL at any moment, beside another writer; and every
mistake that `fastft merge` can meet is one line and exit code 2."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fastft.errors import FolderExistsError, WriteError
from fastft.tools.merge.merge import merge
from fastft.tools.new_folder import check_room, new_folder


def model(folder, seed, **changes):
    sizes = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(torch.bfloat16).save_pretrained(
        folder, max_shard_size="20KB"
    )
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return model(tmp_path_factory.mktemp("base"), 0)


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    peft = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    for n, p in peft.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    peft.save_pretrained(folder)
    return folder


def copy(adapter, to, change=None, **config):
    to.mkdir()
    tensors = load_file(adapter / "adapter_model.safetensors")
    if change is not None:
        change(tensors)
    save_file(tensors, to / "adapter_model.safetensors")
    (to / "adapter_config.json").write_text(
        json.dumps({**json.loads((adapter / "adapter_config.json").read_text()), **config})
    )
    return to


@contextmanager
def child(work):
    """`work()` in a process of its own, which is killed at the end if it is still there."""
    pid = os.fork()
    if pid == 0:
        try:
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            work()
        finally:
            os._exit(0)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def damaged(adapter, to, name):
    copy(adapter, to)
    (to / name).write_bytes((to / name).read_bytes()[:-40])
    return to


def not_a_number(tensors):
    next(t for n, t in tensors.items() if n.endswith("layers.1.self_attn.v_proj.lora_B.weight"))[0, 0] = float("nan")


def shard_cut(base, to):
    to.mkdir()
    for f in base.iterdir():
        (to / f.name).write_bytes(f.read_bytes()[: -40 if f.name.startswith("model-00002") else None])
    return to


MISTAKES = {
    "the folder exists": (lambda b, a, t: ([a, "--out", t], "exists; give a new folder")),
    "a damaged adapter": (
        lambda b, a, t: (
            [damaged(a, t / "x", "adapter_model.safetensors"), "--out", t / "out"],
            f"'{t / 'x' / 'adapter_model.safetensors'}' is damaged",
        )
    ),
    "a damaged configuration": (
        lambda b, a, t: (
            [damaged(a, t / "x", "adapter_config.json"), "--out", t / "out"],
            f"'{t / 'x' / 'adapter_config.json'}' is damaged",
        )
    ),
    "no such adapter": (lambda b, a, t: ([t / "none", "--out", t / "out"], "want an adapter's folder")),
    "a missing base": (
        lambda b, a, t: (
            [copy(a, t / "x", base_model_name_or_path=str(t / "gone")), "--out", t / "out"],
            "gone' is no folder here: give the base's with --base",
        )
    ),
    "a base that is nowhere": (
        lambda b, a, t: (
            [copy(a, t / "x", base_model_name_or_path="nobody/nothing"), "--out", t / "out"],
            "'nobody/nothing' is neither a folder here nor",
        )
    ),
    "a damaged base": (lambda b, a, t: ([a, "--base", shard_cut(b, t / "x"), "--out", t / "out"], "model-00002-of-")),
    "NaN in the adapter": (
        lambda b, a, t: (
            [copy(a, t / "x", not_a_number), "--out", t / "out"],
            "layers.1.self_attn.v_proj.lora_B.weight' of the adapter",
        )
    ),
    "another model of the same shapes": (
        lambda b, a, t: ([a, "--base", model(t / "x", 1), "--out", t / "out"], "is another model than")
    ),
    "values that float16 lacks": (
        lambda b, a, t: (
            [copy(a, t / "x", lambda ts: [v.mul_(3e4) for v in ts.values()]), "--out", t / "out", "--dtype", "float16"],
            "use bfloat16",
        )
    ),
    "no permission": (lambda b, a, t: ([a, "--out", "/proc/nothing/out"], "cannot write '/proc/nothing/out'")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(base, adapter, tmp_path, command, name):
    args, said = MISTAKES[name](base, adapter, tmp_path)
    before = sorted(p for p in tmp_path.rglob("*"))
    code, lines = command("merge", *args)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("fastft: merge: "), lines
    assert said in lines[0]
    assert sorted(p for p in tmp_path.rglob("*")) == before  # nothing lost, nothing left


def test_a_full_disk_is_one_line_and_leaves_nothing(adapter, tmp_path):
    """In a process of its own: what the system says when a file may not grow."""
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fastft", "merge", adapter, "--out", tmp_path / "a" / "out"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000)),
    )
    assert run.returncode == 2 and run.stderr.count("\n") == 1 and "no room for" in run.stderr, run.stderr
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(WriteError, match="free are"):
        check_room(tmp_path / "b", 1 << 60, "merge")


def test_another_base_can_be_meant(adapter, tmp_path, command):
    model(tmp_path / "x", 1)
    assert command("merge", adapter, "--base", tmp_path / "x", "--out", tmp_path / "out", "--other-base")[0] == 0


WRITE = """
import os, sys
from pathlib import Path
from fastft.tools.new_folder import new_folder
with new_folder(Path(sys.argv[1]), "merge") as folder:
    for i in range(8):
        (folder / f"{i}").write_bytes(b"x" * 4096)
        (folder / "sub").mkdir(exist_ok=True)
        (folder / "sub" / f"{i}").write_bytes(b"y")
        print(i, flush=True)
        sys.stdin.readline()
"""


@pytest.mark.parametrize("after", [0, 3, 7])
def test_killed_at_any_moment_the_next_run_succeeds(tmp_path, after):
    start = lambda: subprocess.Popen(
        [sys.executable, "-c", WRITE, str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    first = start()
    for i in range(after + 1):
        assert first.stdout.readline() == f"{i}\n"
        if i < after:
            first.stdin.write("\n")
            first.stdin.flush()
    with pytest.raises(FolderExistsError, match="another process is writing"), new_folder(tmp_path / "out", "merge"):
        pass
    assert not (tmp_path / "out").exists()
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert [p.name for p in tmp_path.iterdir()] == [".out.fastft-partial"]
    run = start()
    run.communicate("\n" * 9, timeout=60)
    assert run.returncode == 0 and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == 16


def test_a_merge_killed_at_any_moment(adapter, tmp_path):
    """At several moments of a real merge, whatever it is doing then."""
    (tmp_path / "out.partial").mkdir()  # a user's own, or an older version's
    (tmp_path / "out.partial" / "mine").write_text("mine")
    partial = tmp_path / ".out.fastft-partial"
    seen = []
    for files in (0, 1, 2, 3, 5):
        with child(lambda: merge(adapter, tmp_path / "out")):
            end = time.monotonic() + 60
            while not (partial.is_dir() and len(list(partial.iterdir())) >= files) and time.monotonic() < end:
                pass
        seen.append(len(list(partial.iterdir())))
        assert not (tmp_path / "out").exists()
    assert seen[-1] >= 5
    assert merge(adapter, tmp_path / "out").ok
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.partial"]
    assert (tmp_path / "out.partial" / "mine").read_text() == "mine"


def test_what_appears_meanwhile_is_not_overwritten(tmp_path):
    def write():
        with new_folder(tmp_path / "out", "merge") as folder:
            (folder / "a").write_text("ours")
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "b").write_text("theirs")

    with pytest.raises(FolderExistsError, match="appeared"):
        write()
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["b", "out"]
