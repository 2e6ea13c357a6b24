"""fastft merge: the folder is base + adapter to 16-bit rounding, loads in plain transformers, and nothing half-written
is left."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from fastft.errors import AdapterError, ModelNotFoundError
from fastft.tools.merge import merge as m
from fastft.tools.merge.adapter_parts import Delta
from fastft.tools.merge.base import shards
from fastft.tools.shard_writer import ShardWriter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,  # of whole blocks of a 4-bit weight
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="60KB")
    return folder


def trained(base, folder, **settings):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **settings))
    for n, p in model.named_parameters():
        if "lora_B" in n:
            torch.nn.init.normal_(p, std=0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
        {"modules_to_save": ["lm_head"]},
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_is_base_plus_adapter(base, tmp_path, settings, dtype):
    adapter = trained(base, tmp_path / "adapter", **settings)
    check = m.merge(adapter, tmp_path / "out", dtype=dtype)
    assert check.ok and check.error <= check.rounding * 1.01 + 1e-6 and check.adapter > 10 * check.error
    assert len(shards(tmp_path / "out")) == len(shards(base)) > 1 and not (tmp_path / "out.partial").exists()
    ids = torch.arange(8)[None]
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter
    ).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert merged.dtype == dtype
    for n, p in exact.named_parameters():
        assert torch.equal(p.to(dtype), merged.get_parameter(n)), n
    assert merged(input_ids=ids).logits.shape == (1, 8, 128)


def test_a_4bit_base_is_expanded(base, tmp_path):
    nf4 = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    quantised = AutoModelForCausalLM.from_pretrained(base, quantization_config=nf4, dtype=torch.float32)
    quantised.save_pretrained(tmp_path / "base4")
    adapter = trained(base, tmp_path / "adapter")
    check = m.merge(adapter, tmp_path / "out", base=str(tmp_path / "base4"))
    assert check.ok and check.adapter > 10 * check.error
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


PEAK = """
import sys, threading, peft, psutil, torch
from pathlib import Path
from fastft.tools.merge import merge
torch.set_num_threads(1)
process, folder, done = psutil.Process(), Path(sys.argv[1]), threading.Event()
before = peak = process.memory_full_info().uss
def watch():
    global peak
    while not done.wait(0.02):
        peak = max(peak, process.memory_full_info().uss)
thread = threading.Thread(target=watch)
thread.start()
merge.merge(folder / "adapter", folder / "out", check=False)
done.set()
thread.join()
print(peak - before)
"""


def test_memory_is_that_of_a_shard_at_most(tmp_path):
    """Less than 1.3 of the largest shard, and the adapter: of the process that merges, mapped files included."""
    base, adapter, layers = tmp_path / "base", tmp_path / "adapter", 48
    base.mkdir()
    name = lambda i: f"model.layers.{i}.self_attn.q_proj"
    save_file(
        {f"{name(i)}.weight": torch.randn(2048, 1024).bfloat16() for i in range(layers)}, base / "model.safetensors"
    )
    (base / "config.json").write_text("{}")
    LoraConfig(r=8, base_model_name_or_path=str(base)).save_pretrained(adapter)
    parts = {
        f"base_model.model.{name(i)}.lora_{x}.weight": torch.randn(size)
        for i in range(layers)
        for x, size in (("A", (8, 1024)), ("B", (2048, 8)))
    }
    save_file(parts, adapter / "adapter_model.safetensors")
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PEAK, str(tmp_path)], capture_output=True, text=True, check=True
    )
    size = lambda folder: max(f.stat().st_size for f in folder.glob("*.safetensors"))
    assert int(run.stdout) < 1.3 * size(base) + size(adapter)
    merged, w, delta = (
        load_file(f)
        for f in (
            tmp_path / "out" / "model.safetensors",
            base / "model.safetensors",
            adapter / "adapter_model.safetensors",
        )
    )
    assert list(merged) == list(w)
    for i in (0, layers - 1):
        a, b = (delta[f"base_model.model.{name(i)}.lora_{x}.weight"] for x in "AB")
        assert torch.equal(merged[f"{name(i)}.weight"], (w[f"{name(i)}.weight"].float() + b @ a * 1.0).bfloat16())


def test_a_shard_written_tensor_by_tensor(tmp_path):
    tensors = {
        "a": torch.randn(3, 5),
        "empty": torch.zeros(0, 4),
        "é": torch.tensor(7),
        "t": torch.randn(4, 6).t().half(),
        "b": torch.tensor([True]),
    }
    with ShardWriter(tmp_path / "x.safetensors", [*tensors, "never"]) as shard:
        for n, t in tensors.items():
            shard.add(n, t)
        with pytest.raises(ValueError, match="announced and is new, got 'a'"):
            shard.add("a", tensors["a"])
    back = load_file(tmp_path / "x.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in tensors.items())


def test_a_lost_adapter_fails_and_leaves_nothing(base, tmp_path, monkeypatch):
    adapter = trained(base, tmp_path / "adapter")
    monkeypatch.setattr(Delta, "add_to", lambda self, weight, dtype: weight.to(dtype))
    with pytest.raises(m.MergeError, match="not base \\+ adapter"):
        m.merge(adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter"]


def test_an_interrupt_leaves_nothing_that_looks_complete(base, tmp_path, monkeypatch):
    adapter = trained(base, tmp_path / "adapter")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(m, "check_merge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        m.merge(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_says_what_was_wanted(base, tmp_path):
    adapter = trained(base, tmp_path / "adapter")
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        m.merge(tmp_path, tmp_path / "out")
    with pytest.raises(FileExistsError, match="give a new folder"):
        m.merge(adapter, adapter)
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        m.merge(adapter, tmp_path / "out", base=str(tmp_path))
    other = LlamaForCausalLM(
        LlamaConfig(vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4)
    )
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(AdapterError, match="another base"):
        m.merge(adapter, tmp_path / "out", base=str(tmp_path / "other"), check=False)
    with pytest.raises(AdapterError, match="merge_and_unload"):
        m.merge(trained(base, tmp_path / "pissa", init_lora_weights="pissa"), tmp_path / "out")
