"""What a user gets wrong, said in one line that is stock's where stock says it; the model is whole afterwards."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fastft
from fastft import FastModel
from fastft.errors import AdapterError
from tests.trainers import harness as h


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


TRAINERS = {"sft": (SFTConfig, SFTTrainer, h.pairs), "dpo": (DPOConfig, DPOTrainer, h.preferences)}


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")
@pytest.mark.parametrize("name", TRAINERS)
def test_lora_on_the_head(folder, tmp_path, name):
    """TRL multiplies the head's weight itself and refuses an adapter there: in the same words, patched or not. The
    report has said so before."""
    config, trainer, data = TRAINERS[name]
    said = []
    for way in ("stock", "fastft"):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(folder),
            LoraConfig(target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM"),
        )
        if way == "fastft":
            row = next(r for r in fastft.report(fastft.patch(model)) if r.kind == "head")
            assert not row.is_swapped and "adapter" in row.reason
        with pytest.raises(ValueError, match="lm_head") as e:
            trainer(
                model=model, args=h.arguments(config, tmp_path, 1), train_dataset=data(), processing_class=h.tokenizer()
            )
        said.append(str(e.value))
        fastft.unpatch(model).save_pretrained(tmp_path / way)
    assert said[0] == said[1] and "PEFT adapter" in said[0]
    assert (tmp_path / "stock" / "adapter_config.json").read_text() == (
        tmp_path / "fastft" / "adapter_config.json"
    ).read_text()


def test_an_adapter_of_another_base(folder, tmp_path):
    """Of another width: which weight does not fit, and that its own base is wanted."""
    from transformers import LlamaConfig

    torch.manual_seed(0)
    other = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=len(h.tokenizer()), **{**h.SIZES, "hidden_size": 48})
    )
    adapter = get_peft_model(other, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    adapter.peft_config["default"].base_model_name_or_path = str(folder)
    adapter.save_pretrained(tmp_path)
    with pytest.raises(
        AdapterError, match=r"does not fit its base .* \(size mismatch .* load the base it was trained on"
    ) as e:
        FastModel.from_pretrained(tmp_path)
    assert "\n" not in str(e.value)
