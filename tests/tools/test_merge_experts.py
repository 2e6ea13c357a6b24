"""fastft merge of adapters on experts (PEFT's target_parameters): PEFT's own merge rounded to 16 bits, whether a base
stores its experts as stacks or one by one."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks import tiny
from fastft.errors import AdapterError
from fastft.tools.merge import expert_parts
from fastft.tools.merge import merge as m
from tests.experts.moe_models import drawn, stacks


def saved(family, tmp_path, only=""):
    """(folder of the base, folder of an adapter on its stacks that end in `only`, and on an attention's layer)"""
    model = tiny.build(family)
    model.save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    names = [n for n in stacks(model) if n.endswith(only)]
    config = LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["o_proj"], target_parameters=names)
    drawn(get_peft_model(model, config)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "base", tmp_path / "adapter"


@pytest.mark.parametrize(("family", "only"), [("qwen3_moe", ""), ("qwen3_moe", "down_proj"), ("gpt_oss", "")])
def test_every_tensor_is_peft_s_own(tmp_path, family, only):
    base, adapter = saved(family, tmp_path, only)
    result = m.merge(adapter, tmp_path / "merged", base=str(base))
    assert result is not None and result.ok and result.adapter > 2 * result.rounding
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16).state_dict()
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter)).merge_and_unload()
    theirs = theirs.state_dict()
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        near = (ours[name].float() - t.float()).abs().max() <= 2**-8 * t.abs().max()
        assert near, name


def test_a_pair_on_the_wrong_expert_is_caught(tmp_path, monkeypatch):
    base, adapter = saved("gpt_oss", tmp_path)
    right = expert_parts.ExpertsDelta.of
    monkeypatch.setattr(expert_parts.ExpertsDelta, "of", lambda self, e: right(self, (e + 1) % len(self.A)))
    with pytest.raises(m.MergeError):
        m.merge(adapter, tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


def test_experts_under_other_names_are_named(tmp_path):
    base, adapter = saved("mixtral", tmp_path)
    with pytest.raises(AdapterError, match=r"under other names.*merge_and_unload"):
        m.merge(adapter, tmp_path / "merged", base=str(base))
