"""FastModel.from_pretrained against the stock script it stands for: the same classes, the same bits, the same random
stream; and every error in one line that says what to do."""

import importlib.util
import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, PeftModelForCausalLM, PeftModelForSequenceClassification, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    Gemma3Config,
    LlamaConfig,
)

import fastft
from fastft import FastModel, errors
from fastft.loading import checkpoint, precision

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("causal")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(**TEXT)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def adapter(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(1)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    model.save_pretrained(path)
    return str(path)


def stock(folder, config=None, auto=AutoModelForCausalLM, **kwargs):
    torch.manual_seed(7)
    model = auto.from_pretrained(folder, dtype="auto", **kwargs)
    return get_peft_model(
        model, config or LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def fast(folder, **kwargs):
    torch.manual_seed(7)
    return FastModel.from_pretrained(folder, **kwargs)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for key in b:
        assert a[key].dtype == b[key].dtype, key
        assert torch.equal(a[key], b[key]), key


def ids():
    return torch.arange(20).view(2, 10)


@pytest.mark.oldest
def test_default_is_stock_lora_bit_for_bit_and_patched(folder, capsys):
    theirs = stock(folder)
    after_stock = torch.rand(4)
    ours = fast(folder)
    assert torch.equal(torch.rand(4), after_stock)  # the random stream stands where stock leaves it
    assert type(ours) is PeftModelForCausalLM
    assert ours.training == theirs.training
    same_state(ours, theirs)
    trainable = lambda m: [n for n, p in m.named_parameters() if p.requires_grad]
    assert trainable(ours) == trainable(theirs) != []
    assert fastft.report(ours).swapped
    printed = capsys.readouterr().out
    assert printed.count("modules swapped") == 1
    out = ours(input_ids=ids(), labels=ids())
    out.loss.backward()
    torch.testing.assert_close(out.loss, theirs(input_ids=ids(), labels=ids()).loss)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, target_modules=["q_proj", "down_proj"], use_rslora=True),
        LoraConfig(r=4, target_modules=r".*layers\.1\..*v_proj", init_lora_weights="pissa_niter_2", lora_dropout=0.1),
        LoraConfig(r=2, target_modules=["up_proj"], modules_to_save=["norm"], use_dora=True, task_type="CAUSAL_LM"),
    ],
    ids=["rslora", "pissa", "dora"],
)
def test_a_config_is_taken_as_it_is(folder, config):
    absent = config.task_type is None
    ours = fast(folder, peft_config=config)
    assert (config.task_type is None) == absent  # the user's object keeps what it was
    config.task_type = "CAUSAL_LM"
    config.base_model_name_or_path = None
    same_state(ours, stock(folder, config))
    assert isinstance(ours, PeftModelForCausalLM)


def test_bare_model(folder):
    ours = fast(folder, peft_config=None)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    same_state(ours, theirs)
    assert isinstance(ours, type(theirs))
    assert not isinstance(ours, PeftModel)
    assert all(p.requires_grad for p in ours.parameters())
    assert fastft.report(ours).swapped


def test_keywords_pass_through(folder):
    model = fast(folder, dtype=torch.bfloat16, attn_implementation="eager", output_loading_info=False, use_cache=False)
    base = model.get_base_model()
    assert base.config._attn_implementation == "eager"
    assert base.config.use_cache is False
    assert base.dtype == torch.bfloat16
    assert fast(folder, dtype="float16").get_base_model().dtype == torch.float16
    assert fast(folder, device_map={"": "cpu"}).device == torch.device("cpu")


@pytest.mark.parametrize("trainable", [True, False])
def test_an_adapters_folder(folder, adapter, trainable):
    ours = fast(adapter, is_trainable=trainable)
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter, is_trainable=trainable)
    same_state(ours, theirs)
    assert type(ours) is type(theirs)
    assert ours.training == theirs.training
    assert any(p.requires_grad for p in ours.parameters()) == trainable
    assert fastft.report(ours).swapped
    torch.testing.assert_close(ours(input_ids=ids()).logits, theirs(input_ids=ids()).logits)


def test_reward_model(folder, tmp_path):
    """A new one by auto_class; a saved one, and a saved adapter of one, by what they say themselves."""
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="SEQ_CLS")
    auto = AutoModelForSequenceClassification
    ours = fast(folder, auto_class=auto, num_labels=1)
    theirs = stock(folder, config, auto, num_labels=1)
    assert type(ours) is PeftModelForSequenceClassification
    same_state(ours, theirs)
    assert next(p for n, p in ours.named_parameters() if "score.modules_to_save" in n).requires_grad

    ours.save_pretrained(tmp_path / "adapter")
    again = fast(str(tmp_path / "adapter"), num_labels=1)
    assert type(again) is PeftModelForSequenceClassification
    assert torch.equal(
        again.state_dict()["base_model.model.score.modules_to_save.default.weight"],
        ours.state_dict()["base_model.model.score.modules_to_save.default.weight"],
    )
    with pytest.raises(errors.AdapterError, match="num_labels") as e:
        fast(str(tmp_path / "adapter"), num_labels=3)
    one_line(e)

    auto.from_pretrained(folder, num_labels=1).save_pretrained(tmp_path / "whole")
    assert type(fast(str(tmp_path / "whole")).get_base_model()).__name__ == "LlamaForSequenceClassification"


def test_image_text_model(tmp_path):
    vision = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Gemma3Config(
        text_config={**TEXT, "sliding_window": 8}, vision_config=vision, mm_tokens_per_image=1, image_token_index=100
    )
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    ours, theirs = fast(str(tmp_path)), stock(str(tmp_path), auto=AutoModelForImageTextToText)
    assert type(ours) is PeftModelForCausalLM
    assert (
        type(ours.get_base_model()).__name__
        == type(theirs.get_base_model()).__name__
        == "Gemma3ForConditionalGeneration"
    )
    same_state(ours, theirs)


@pytest.mark.oldest
def test_four_bit_is_stock_qlora_and_trains(folder):
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    theirs = stock(folder, quantization_config=quantization)
    ours = fast(folder, load_in_4bit=True)
    same_state(ours, theirs)
    assert ours.get_base_model().config.quantization_config.to_dict() == quantization.to_dict()
    loss = ours(input_ids=ids(), labels=ids()).loss
    loss.backward()
    grads = [p.grad for p in ours.parameters() if p.requires_grad]
    assert grads
    assert all(g is not None and torch.isfinite(g).all() for g in grads)
    assert sum(g.abs().sum() for g in grads) > 0
    explicit = fast(folder, load_in_4bit=True, dtype=torch.float32)
    assert explicit.get_base_model().config.quantization_config.bnb_4bit_compute_dtype == torch.float32


def test_eight_bit(folder):
    theirs = stock(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    same_state(fast(folder, load_in_8bit=True), theirs)


def test_not_a_model():
    with pytest.raises(TypeError, match="from_pretrained"):
        FastModel()


# --- errors


def test_names_that_do_not_exist(folder, tmp_path):
    with pytest.raises(errors.ModelNotFoundError, match="check the name or the network") as e:
        FastModel.from_pretrained("nobody/such-a-model")
    one_line(e)
    with pytest.raises(errors.ModelNotFoundError, match="there is no folder") as e:
        FastModel.from_pretrained(tmp_path / "nowhere")
    one_line(e)
    with pytest.raises(errors.ModelNotFoundError, match=r"no config\.json") as e:
        FastModel.from_pretrained(tmp_path)
    one_line(e)
    assert isinstance(e.value, errors.FastftError)
    assert isinstance(e.value, ValueError)


def test_hub_answers_are_told_apart():
    """What the Hub says when it is reached: gated, no such revision, no such repository."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    for kind, said in (
        (GatedRepoError, "hf auth login"),
        (RevisionNotFoundError, "no such revision"),
        (RepositoryNotFoundError, "check the spelling"),
    ):
        outer = OSError("long text\nof several lines")
        outer.__cause__ = kind.__new__(kind, "no")
        text = str(checkpoint.not_found("some/name", outer))
        assert said in text
        assert "\n" not in text


def test_the_base_of_an_adapter_is_gone(adapter, tmp_path):
    import json
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    config = json.loads((moved / "adapter_config.json").read_text())
    for base, said in (("nobody/such-a-base", "the base of the adapter"), (None, "names no base")):
        (moved / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
        with pytest.raises(errors.FastftError, match=said) as e:
            FastModel.from_pretrained(moved)
        one_line(e)


def test_adapter_and_peft_config(adapter, folder):
    with pytest.raises(errors.AdapterError, match="an adapter already") as e:
        FastModel.from_pretrained(adapter, peft_config=LoraConfig())
    one_line(e)
    with pytest.raises(errors.AdapterError, match="peft_config='ia3'") as e:
        FastModel.from_pretrained(folder, peft_config="ia3")
    one_line(e)


def test_four_bit_without_bitsandbytes(folder, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(errors.QuantizationError, match="pip install bitsandbytes") as e:
        FastModel.from_pretrained(folder, load_in_4bit=True)
    one_line(e)


def test_quantised_twice(folder, tmp_path):
    config = BitsAndBytesConfig(load_in_4bit=True)
    for kwargs, said in (
        ({"load_in_4bit": True, "load_in_8bit": True}, "choose one"),
        ({"load_in_4bit": True, "quantization_config": config}, "leave the flag out"),
    ):
        with pytest.raises(errors.QuantizationError, match=said) as e:
            FastModel.from_pretrained(folder, **kwargs)
        one_line(e)
    AutoModelForCausalLM.from_pretrained(folder, quantization_config=config).save_pretrained(tmp_path)
    with pytest.raises(errors.QuantizationError, match="quantised already") as e:
        FastModel.from_pretrained(tmp_path, load_in_8bit=True)
    one_line(e)
    again = FastModel.from_pretrained(tmp_path, load_in_4bit=True)  # 4-bit on disk, 4-bit asked for: no contradiction
    assert again.get_base_model().is_loaded_in_4bit


def test_targets_that_match_nothing(folder):
    with pytest.raises(errors.TargetModulesError, match="query_key_value") as e:
        FastModel.from_pretrained(folder, peft_config=LoraConfig(target_modules=["query_key_value"]))
    text = one_line(e)
    assert "q_proj" in text
    assert "lm_head" not in text
    with pytest.raises(errors.TargetModulesError, match="nothing"):
        FastModel.from_pretrained(folder, peft_config=LoraConfig(target_modules=r"nothing\d"))
    # an error of PEFT that is not about names that match nothing stays PEFT's
    with pytest.raises(ValueError, match="RMSNorm") as e:
        FastModel.from_pretrained(folder, peft_config=LoraConfig(target_modules=["norm"]))
    assert not isinstance(e.value, errors.FastftError)


def test_dtype_that_is_none(folder):
    for dtype in ("bf17", torch.int8, "int32"):
        with pytest.raises(errors.DtypeError, match="no floating-point dtype") as e:
            FastModel.from_pretrained(folder, dtype=dtype)
        one_line(e)


def test_dtype_that_the_device_lacks(folder, tmp_path, monkeypatch):
    """A T4 has no bfloat16; stood for here by a device that says so."""
    monkeypatch.setattr(precision, "has_dtype", lambda dtype, device: dtype != torch.bfloat16)
    with pytest.raises(errors.DtypeError, match=r"dtype=torch\.float16") as e:
        FastModel.from_pretrained(folder, dtype="bfloat16")
    one_line(e)
    AutoModelForCausalLM.from_pretrained(folder).to(torch.bfloat16).save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = FastModel.from_pretrained(tmp_path)
    (said,) = [str(w.message) for w in caught if "float16" in str(w.message)]
    assert "loading it in float16" in said
    assert "\n" not in said
    assert model.get_base_model().dtype == torch.float16
    quantization = precision.quantization_config(
        True, False, "auto", AutoConfig.from_pretrained(folder), torch.device("cpu"), {}
    )
    assert quantization.bnb_4bit_compute_dtype == torch.float16


def test_max_seq_length(folder):
    for wanted, said in ((65, "64 positions"), (0, "positive"), ("long", "positive")):
        with pytest.raises(errors.SequenceLengthError, match=said) as e:
            FastModel.from_pretrained(folder, max_seq_length=wanted)
        one_line(e)
    assert FastModel.from_pretrained(folder, max_seq_length=64, peft_config=None)
    longer = FastModel.from_pretrained(folder, max_seq_length=65, peft_config=None, max_position_embeddings=65)
    assert longer.config.max_position_embeddings == 65


@pytest.mark.parametrize(
    ("given", "device"),
    [
        ({"": 1}, "cuda:1"),
        ({"a": "cpu", "b": 2}, "cuda:2"),
        ({"a": "disk"}, "cpu"),
        ("cpu", "cpu"),
        (torch.device("cpu"), "cpu"),
        (3, "cuda:3"),
    ],
)
def test_first_device(given, device):
    assert precision.first_device(given) == torch.device(device)


def test_current_device_is_the_local_ranks(monkeypatch):
    if not torch.cuda.is_available():
        assert precision.placement("current") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert precision.placement("current") == {"": 0}
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert precision.placement("current") == {"": 3}
    assert precision.placement("auto") == "auto"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    assert precision.placement(None) is None
