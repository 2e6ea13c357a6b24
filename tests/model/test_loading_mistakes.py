"""What callers get wrong most often is answered in one line that says what to write instead."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from fastft import FastModel, errors
from fastft.loading import precision
from fastft.loading.checkpoint import check_name
from tests.model.test_loading import one_line

TINY = dict(hidden_size=64, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2, vocab_size=128)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("model")
    AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **TINY)).save_pretrained(place)
    return place


@pytest.fixture
def copied(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "copy")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_seq_len": 64}, "did you mean max_seq_length=64"),
        ({"load_in_4_bit": True}, "did you mean load_in_4bit=True"),
        ({"r": 8}, r"peft_config=LoraConfig\(r=8"),
        ({"target_modules": ["q_proj"]}, r"peft_config=LoraConfig\(target_modules=\['q_proj'\]"),
        ({"use_gradient_checkpointing": "auto"}, "leave it out"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_keywords_that_do_not_exist(folder, given, said):
    with pytest.raises(errors.ArgumentError, match=said) as e:
        FastModel.from_pretrained(folder, **given)
    one_line(e)
    assert isinstance(e.value, TypeError)


def test_a_mistyped_name_while_the_hub_is_out_of_reach(folder, monkeypatch):
    """Answered at once, after one question; a model that is kept here, or a Hub that answers, is transformers' to
    find."""
    asked, here = [], []

    class Session:
        def head(self, url, timeout):
            asked.append(url)
            if not here:
                raise ConnectionError("no route to it")

    monkeypatch.setattr("huggingface_hub.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_session", Session)
    for name in ("tinny", "nobody/tinny"):
        with pytest.raises(errors.ModelNotFoundError, match=f"'{name}' is neither a folder .* was not reached") as e:
            FastModel.from_pretrained(name)
        one_line(e)
    assert len(asked) == 2
    check_name(str(folder), {})
    with monkeypatch.context() as kept:
        kept.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file, **where: f"/cache/{name}/{file}")
        check_name("tinny", {})
    assert len(asked) == 2
    here.append(True)
    check_name("tinny", {})
    assert len(asked) == 3


def test_settings_of_the_model_pass(folder):
    """`max_position_embeddings` is the configuration's, whatever it resembles."""
    model = FastModel.from_pretrained(folder, max_position_embeddings=99, peft_config=None)
    assert model.config.max_position_embeddings == 99


def test_a_dictionary_is_lora_s_settings(folder):
    given = {"r": 4, "target_modules": ["q_proj"]}
    for more in ({}, {"peft_type": "LORA"}):
        model = FastModel.from_pretrained(folder, peft_config={**given, **more})
        assert (model.peft_config["default"].r, model.peft_config["default"].target_modules) == (4, {"q_proj"})


@pytest.mark.parametrize("given", [{"rank": 4}, LoraConfig, 16, {"peft_type": "NONE"}], ids=str)
def test_no_peft_config(folder, given):
    with pytest.raises(errors.AdapterError, match="LoraConfig") as e:
        FastModel.from_pretrained(folder, peft_config=given)
    one_line(e)


def test_short_names_of_dtypes(folder):
    assert FastModel.from_pretrained(folder, dtype="bf16", peft_config=None).dtype == torch.bfloat16
    assert FastModel.from_pretrained(folder, dtype="fp32", peft_config=None).dtype == torch.float32


@pytest.mark.parametrize("size", [0, 5000])
def test_weights_that_are_cut_off(copied, size):
    with open(copied / "model.safetensors", "r+b") as f:
        f.truncate(size)
    with pytest.raises(
        errors.CheckpointError, match=rf"model\.safetensors' is damaged or cut off at {size:,} bytes"
    ) as e:
        FastModel.from_pretrained(copied)
    one_line(e)


def test_weights_that_are_missing(copied, tmp_path):
    (copied / "model.safetensors").unlink()
    with pytest.raises(errors.CheckpointError, match=r"has no weights \(no model\.safetensors\)") as e:
        FastModel.from_pretrained(copied)
    one_line(e)
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=2, **TINY))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    next((tmp_path / "sharded").glob("model-00002-of-*.safetensors")).unlink()
    with pytest.raises(
        errors.CheckpointError, match=r"model-00002-of-.*, which .*index\.json' names, is not there"
    ) as e:
        FastModel.from_pretrained(tmp_path / "sharded")
    one_line(e)


def test_settings_that_are_no_json(copied):
    (copied / "config.json").write_text("{")
    with pytest.raises(errors.CheckpointError, match=r"config\.json' is no JSON") as e:
        FastModel.from_pretrained(copied)
    one_line(e)


def test_adapters_that_are_damaged(folder, tmp_path):
    get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig()).save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 8
    with open(tmp_path / "adapter/adapter_model.safetensors", "r+b") as f:
        f.truncate(300)
    with pytest.raises(errors.CheckpointError, match=r"adapter_model\.safetensors' is damaged") as e:
        FastModel.from_pretrained(tmp_path / "adapter")
    one_line(e)
    (tmp_path / "adapter/adapter_model.safetensors").unlink()
    with pytest.raises(errors.CheckpointError, match=r"no adapter_model\.safetensors") as e:
        FastModel.from_pretrained(tmp_path / "adapter")
    one_line(e)
    (tmp_path / "adapter/adapter_config.json").write_text("r=8")
    with pytest.raises(errors.CheckpointError, match=r"adapter_config\.json' is no JSON") as e:
        FastModel.from_pretrained(tmp_path / "adapter")
    one_line(e)


def test_a_torchao_that_peft_refuses(folder, monkeypatch):
    def refused(*args, **kwargs):
        raise ImportError("Found an incompatible version of torchao. Found version 0.10.0\nmore")

    monkeypatch.setattr("peft.get_peft_model", refused)
    with pytest.raises(errors.AdapterError, match="pip install -U torchao, or pip uninstall torchao") as e:
        FastModel.from_pretrained(folder)
    one_line(e)


def test_bitsandbytes_without_cuda(folder, monkeypatch):
    monkeypatch.setattr(precision, "first_device", lambda where: torch.device("cuda"))
    monkeypatch.setattr(precision, "_bitsandbytes_knows_cuda", lambda: False)
    with pytest.raises(errors.QuantizationError, match="pip install -U bitsandbytes") as e:
        precision.quantization_config(True, False, torch.bfloat16, LlamaConfig(), torch.device("cuda"), {})
    one_line(e)
