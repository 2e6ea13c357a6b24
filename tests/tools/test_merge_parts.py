"""fastft merge, part by part: what an adapter may hold is merged as PEFT runs it, or named in one line before anything
is written."""

import json

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from fastft.errors import AdapterError
from fastft.tools.merge import merge as m
from fastft_kernels.numerics import compare

SIZES = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT's, of tied weights and of embeddings it saves


def build(family, tied):
    torch.manual_seed(0)
    extra = dict(n_embd=32, n_layer=2, n_head=2, n_positions=32, n_inner=48) if family == "gpt2" else SIZES
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(family, tie_word_embeddings=tied, **{"vocab_size": 96, **extra})
    )


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    found = {}

    def base(family="qwen2", tied=False):
        if (family, tied) not in found:
            model = build(family, tied)
            for n, p in model.named_parameters():  # biases begin at zero
                if n.endswith("bias"):
                    torch.nn.init.normal_(p, std=0.2)
            found[family, tied] = tmp_path_factory.mktemp("base")
            model.save_pretrained(found[family, tied], max_shard_size="20KB")
        return found[family, tied]

    return base


def trained(base, folder, settings, save=None):
    """An adapter of which everything that learns has moved."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = (
        settings
        if not isinstance(settings, dict)
        else LoraConfig(**{**dict(r=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"), **settings})
    )
    model = get_peft_model(model, config)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn_like(p)
    model.save_pretrained(folder, **(save or {}))
    return folder


MERGED = {
    "plain": {},
    "biases of all": dict(bias="all"),
    "biases of the adapted": dict(bias="lora_only"),
    "lora_bias": dict(target_modules=["q_proj"], lora_bias=True),
    "dora": dict(use_dora=True),
    "dora with rsLoRA": dict(
        use_dora=True, use_rslora=True, alpha_pattern={"q_proj": 5}, rank_pattern={"down_proj": 2}
    ),
    "patterns": dict(alpha_pattern={"layers.1.self_attn.q_proj": 3}, rank_pattern={"q_proj": 2}),
    "some layers": dict(layers_to_transform=[1]),
    "orthogonal": dict(init_lora_weights="orthogonal", r=4),
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "saved head": dict(modules_to_save=["lm_head"]),
    "saved norms": dict(modules_to_save=["norm", "input_layernorm"]),
    "saved embedding and head": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": dict(trainable_token_indices=[1, 90]),
    "tokens of both": dict(trainable_token_indices={"embed_tokens": [2, 5], "lm_head": [7]}),
    "all at once": dict(use_dora=True, bias="all", modules_to_save=["lm_head"], trainable_token_indices=[4]),
}
TIED = {  # what base + adapter computes: PEFT's own merge puts an adapter of one into both
    "plain": {},
    "embedding": dict(target_modules=["q_proj", "embed_tokens"]),
    "head": dict(target_modules=["q_proj", "lm_head"]),
    "saved head": dict(modules_to_save=["lm_head"]),
    "saved embedding": dict(modules_to_save=["embed_tokens"]),
    "saved embedding and head": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "adapted embedding and saved head": dict(target_modules=["embed_tokens"], modules_to_save=["lm_head"]),
    "tokens": dict(trainable_token_indices=[1, 90]),
}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(96).view(3, 32)).logits


def with_adapter(base, adapter, dtype=torch.float32):
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), adapter)


@pytest.mark.parametrize("name", MERGED)
def test_every_tensor_is_peft_s_own(bases, tmp_path, name):
    """Bit for bit merge_and_unload's in float32, rounded; and the folder computes what base + adapter computes."""
    base = bases()
    adapter = trained(base, tmp_path / "adapter", MERGED[name])
    check = m.merge(adapter, tmp_path / "out")
    assert check.ok and check.adapter > 5 * check.error
    exact, ours = with_adapter(base, adapter).merge_and_unload(), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {n for n, _ in exact.named_parameters()} == {n for n, _ in ours.named_parameters()}
    high = with_adapter(base, adapter, torch.float64).merge_and_unload()
    for n, p in exact.named_parameters():
        mine = ours.get_parameter(n)
        assert torch.equal(p.bfloat16(), mine) or compare(mine, high.get_parameter(n), p.bfloat16(), n), n
    ids = torch.arange(6)[None]
    rounded = exact.bfloat16().generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(rounded, ours.generate(ids, max_new_tokens=6, do_sample=False))


@pytest.mark.parametrize("save", [None, {"save_embedding_layers": True}], ids=["", "embeddings saved along"])
@pytest.mark.parametrize("name", TIED)
def test_tied_embeddings(bases, tmp_path, name, save):
    """The result is untied where the adapter changed one of the two, and stays tied where it changed neither, or what
    both share."""
    base = bases(tied=True)
    adapter = trained(base, tmp_path / "adapter", TIED[name], save)
    check = m.merge(adapter, tmp_path / "out")
    assert check.ok and check.adapter > 5 * check.error
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (name in ("plain", "tokens"))
    reference, ours = (
        logits(with_adapter(base, adapter, torch.float64)),
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64),
    )
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == config["tie_word_embeddings"]
    assert float((logits(ours) - reference).abs().max() / reference.abs().max()) < 2 * 2**-8


@pytest.mark.parametrize("settings", [{}, dict(use_dora=True)], ids=["lora", "dora"])
def test_weights_that_lie_transposed(bases, tmp_path, settings):
    base = bases("gpt2", True)
    adapter = trained(
        base, tmp_path / "adapter", dict(target_modules=["c_attn", "c_fc"], fan_in_fan_out=True, **settings)
    )
    check = m.merge(adapter, tmp_path / "out")
    assert check.ok and check.adapter > 5 * check.error
    exact, ours = with_adapter(base, adapter).merge_and_unload(), AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    high = with_adapter(base, adapter, torch.float64).merge_and_unload()
    for n, p in exact.named_parameters():
        assert compare(ours.get_parameter(n), high.get_parameter(n), p.bfloat16(), n), n


def test_blocks_of_rows_give_the_same_sum(monkeypatch):
    g = torch.Generator().manual_seed(0)
    A, B, W, size = (
        torch.randn(3, 20, generator=g),
        torch.randn(31, 3, generator=g),
        torch.randn(31, 20, generator=g),
        m.read_adapter.__globals__,
    )
    for magnitude in (None, torch.rand(31, generator=g)):
        for transposed in (False, True):
            delta = size["Delta"](A, B, 0.5, None, magnitude, transposed)
            w = W.t().contiguous() if transposed else W
            true = W.double() + 0.5 * B.double() @ A.double()
            if magnitude is not None:
                true = true * (magnitude.double() / true.norm(dim=1))[:, None]
            true = true.t() if transposed else true
            whole = delta.add_to(w, torch.float32)
            monkeypatch.setitem(size, "BLOCK_BYTES", 4 * 20 * 7)
            assert compare(delta.add_to(w, torch.float32), true, whole, "blocks") and delta.shape == w.shape
            monkeypatch.undo()


NAMED = {
    "pissa": (dict(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
    "pissa, approximate": (dict(init_lora_weights="pissa_niter_2"), "init_lora_weights='pissa_niter_2'"),
    "olora": (dict(init_lora_weights="olora"), "init_lora_weights='olora'"),
    "experts": (dict(target_modules=[], target_parameters=["q_proj.weight"]), "target_parameters="),
    "replication": (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication="),
    "activated": (dict(alora_invocation_tokens=[1, 2]), "alora_invocation_tokens="),
    "ia3": (IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]), "type IA3"),
    "loha": (LoHaConfig(task_type="CAUSAL_LM", target_modules=["k_proj"]), "type LOHA"),
    "tokens alone": (
        TrainableTokensConfig(token_indices=[1], target_modules=["embed_tokens"]),
        "type TRAINABLE_TOKENS",
    ),
}


def refused(adapter, tmp_path, base=None):
    """The one line; nothing is computed and nothing written before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "ShardWriter", lambda *_: pytest.fail("written before the adapter was known"))
        with pytest.raises(AdapterError) as e:
            m.merge(adapter, tmp_path / "out", base=base and str(base))
    assert "\n" not in str(e.value) and not list(tmp_path.glob("out*"))
    return str(e.value)


@pytest.mark.parametrize("name", NAMED)
def test_what_is_not_known_is_named(bases, tmp_path, name):
    settings, said = NAMED[name]
    line = refused(trained(bases(), tmp_path / "adapter", settings), tmp_path)
    assert said in line and "merge_and_unload" in line


@pytest.mark.parametrize(
    ("field", "value"),
    [("kasa_config", {"beta": 1}), ("corda_config", {"x": 1}), ("a_part_of_next_year", True), ("use_qalora", True)],
)
def test_a_field_that_is_not_known_is_named(bases, tmp_path, field, value):
    """Also one that this version of PEFT does not have."""
    adapter = trained(bases(), tmp_path / "adapter", {})
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), field: value}))
    assert f"{field}=" in refused(adapter, tmp_path)


def edited(adapter, change):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return adapter


PREFIX = "base_model.model.model.layers.0.self_attn.q_proj"
EDITS = {
    "a part of another kind": (lambda t: t.update({f"{PREFIX}.lora_C.weight": torch.ones(1)}), "lora_C"),
    "one half": (lambda t: t.pop(f"{PREFIX}.lora_B.weight"), "lora_A.weight (3, 32)"),
    "a convolution": (
        lambda t: t.update({f"{PREFIX}.lora_{x}.weight": torch.ones(3, 3, 1, 1) for x in "AB"}),
        "(3, 3, 1, 1)",
    ),
    "a module that the base lacks": (
        lambda t: t.update({"base_model.model.score.weight": torch.ones(1, 32)}),
        "'score.weight'",
    ),
    "an embedding of another size": (
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(99, 32)}),
        "(96, 32), the adapter's (99, 32)",
    ),
    "a bias that the base lacks": (
        lambda t: t.update({"base_model.model.lm_head.bias": torch.ones(96)}),
        "'lm_head.bias'",
    ),
    "two of one name": (
        lambda t: t.update({f"{PREFIX}.base_layer.bias": torch.ones(32), f"{PREFIX}.bias": torch.zeros(32)}),
        "two that differ",
    ),
    "a fused module": (
        lambda t: t.update(
            {
                f"base_model.model.model.layers.0.mlp.fused.lora_{x}.weight": s
                for x, s in (("A", torch.ones(3, 32)), ("B", torch.ones(32, 3)))
            }
        ),
        "mlp.fused",
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_what_the_base_cannot_take_is_named(bases, tmp_path, name):
    change, said = EDITS[name]
    assert said in refused(edited(trained(bases(), tmp_path / "adapter", {}), change), tmp_path)


def test_tokens_and_a_changed_head_of_tied_embeddings(bases, tmp_path):
    adapter = trained(
        bases(tied=True), tmp_path / "adapter", dict(trainable_token_indices=[1], modules_to_save=["lm_head"])
    )
    assert "apart from each other" in refused(adapter, tmp_path)


def test_embeddings_that_peft_ties(bases, tmp_path):
    adapter = trained(
        bases(tied=True), tmp_path / "adapter", dict(modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    )
    assert "ensure_weight_tying=True" in refused(adapter, tmp_path)


def test_a_classifier_that_was_saved_whole(bases, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(bases(), num_labels=1)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS")).save_pretrained(
        tmp_path / "adapter"
    )
    assert "'score.weight'" in refused(tmp_path / "adapter", tmp_path)


def test_several_adapters(bases, tmp_path):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases()), LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="a"
    )
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "adapters")
    assert "2 adapters in it (a, b): give the folder of one" in refused(tmp_path / "adapters", tmp_path)
    assert m.merge(tmp_path / "adapters" / "b", tmp_path / "out").ok


@pytest.mark.parametrize("method", ["gptq", "fp8"])
def test_a_base_in_another_precision(bases, tmp_path, method):
    base = tmp_path / "base"
    build("qwen2", False).save_pretrained(base)
    config = base / "config.json"
    adapter = trained(base, tmp_path / "adapter", {})
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"quant_method": method}}))
    assert method in refused(adapter, tmp_path)
