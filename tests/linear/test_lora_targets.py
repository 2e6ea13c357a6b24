"""What an adapter may stand on beside a plain linear, patched against stock: replicated layers, experts' parameters,
embedding, head, whole modules, single tokens; and parameters in stock's order under stock's names."""

import itertools
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

import fastft
from tests.linear.lora_models import (
    ALL,
    BASES,
    VOCAB,
    adapted,
    both,
    drawn,
    fallbacks,
    gradients,
    in_float64,
    judge,
    llama,
    quantised,
    run,
    tokens,
    train_step,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


def grad_names(model):
    return {n.removeprefix("d base_model.model.") for n in gradients(model)}


def moe(cls, config_cls, base, **settings):
    torch.manual_seed(0)
    config = config_cls(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        use_cache=False,
        head_dim=16,
        **settings,
    )
    model = cls(config)
    model.set_experts_implementation("eager")  # grouped products know no float64
    for p in model.parameters():
        if p.dim() > 1:
            nn.init.normal_(p, std=0.15)
    return (quantised(model) if base == "nf4" else model).train()


def mixtral(base):
    return moe(MixtralForCausalLM, MixtralConfig, base, num_local_experts=4)


def qwen3_moe(base):
    return moe(
        Qwen3MoeForCausalLM,
        Qwen3MoeConfig,
        base,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        decoder_sparse_step=1,
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("make", [mixtral, qwen3_moe])
@pytest.mark.parametrize("targets", [["gate_up_proj"], ["gate_up_proj", "down_proj"]], ids="-".join)
def test_experts_parameters(targets, make, base):
    """The adapter of a 3-D parameter stays stock beside groups in attention."""

    def factory():
        torch.manual_seed(1)
        parameters = [f"mlp.experts.{t}" for t in targets]
        config = LoraConfig(
            r=4, lora_alpha=8, target_modules=ATTENTION, target_parameters=parameters, task_type="CAUSAL_LM"
        )
        return drawn(get_peft_model(make(base), config)).train()

    model = both(factory, fast=None)
    assert sum("experts" in n for n in grad_names(model)) == 2 * len(targets)
    rows = [r for r in fastft.report(model) if r.kind == "linear group"]
    assert {r.kernel for r in rows if r.is_swapped} == {"lora_linear(group of 3)", "lora_linear(group of 1)"}


def unfreeze(model):
    for n, p in model.named_parameters():
        p.requires_grad_(p.requires_grad or "q_proj.base" in n or "down_proj.base" in n or "norm" in n)


@pytest.mark.parametrize("base", BASES)
def test_layer_replication(base):
    """Layers that share their base: an adapter each, and where the base learns one gradient for all its uses."""
    replicate = {"layer_replication": [(0, 2), (0, 2)]}
    model = both(lambda: BASES[base](**replicate), after=unfreeze if base == "dense" else None)
    first, third = (model.get_submodule(f"base_model.model.model.layers.{i}.mlp.down_proj") for i in (0, 2))
    assert (
        first.base_layer.weight is third.base_layer.weight
        and first.lora_A["default"].weight is not third.lora_A["default"].weight
    )
    assert base == "nf4" or first.base_layer.weight.grad is not None


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("where", ["embed_tokens", "lm_head", "both"])
def test_embedding_and_head(where, tied, base):
    targets = [*ALL, *(["embed_tokens", "lm_head"] if where == "both" else [where])]

    def factory():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT's, of tied weights
            return BASES[base](target_modules=targets, config={"tie_word_embeddings": tied})

    model = both(factory)
    expected = {"embed_tokens": "lora_embedding_A", "lm_head": "lm_head.lora_A"}
    assert all(any(e in n for n in grad_names(model)) for w, e in expected.items() if where in (w, "both"))


def another(model, **config):
    torch.manual_seed(4)
    model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"], **config))
    return drawn(model)


SAVED = ["input_layernorm", "norm", "lm_head", "embed_tokens"]


@pytest.mark.parametrize(
    ("saved", "base"), [*itertools.product([*SAVED, "q_proj", "mlp"], ["dense"]), *itertools.product(SAVED, ["nf4"])]
)
def test_modules_to_save(saved, base):
    """A copy that learns, in the place of a norm, the head, the embedding, one of a group's linears, a whole MLP. (One
    of a 4-bit weight does not learn in stock.)"""
    targets = [t for t in ATTENTION if t != saved]
    model = both(lambda: BASES[base](target_modules=targets, modules_to_save=[saved]))
    assert any(f"{saved}.modules_to_save.default" in n for n in grad_names(model))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("saved", ["input_layernorm", "lm_head", "embed_tokens"])
def test_modules_to_save_of_another_adapter(saved, base):
    """Switched, disabled, switched back: each adapter learns in its own copy."""

    def step(model):
        out = {f"first {k}": v for k, v in train_step(model).items()}
        model.zero_grad(set_to_none=True)
        model.set_adapter("second")
        for n, p in model.named_parameters():
            if "modules_to_save.second" in n:
                p.data = p.data * 1.5
        out |= {f"d second {k}": v for k, v in train_step(model).items()}
        model.zero_grad(set_to_none=True)
        with torch.no_grad(), model.disable_adapter():
            out["disabled"] = model(tokens()).logits
        model.set_adapter("default")
        return out | {f"d last {k}": v for k, v in train_step(model).items()}

    both(lambda: another(BASES[base](modules_to_save=[saved]), modules_to_save=[saved]), step)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("tied", [False, True])
def test_trainable_tokens(tied, base):
    """Rows of the embedding that learn, and where it is tied the same rows of the head."""

    def step(model):
        out = {}
        for i in range(2):
            out |= {f"{k} ({i})": v for k, v in train_step(model, tokens(seed=i)).items()}
            with torch.no_grad():
                for p in model.parameters():
                    if p.grad is not None:
                        p.sub_(0.3 * p.grad)
            model.zero_grad(set_to_none=True)
        return out | train_step(model)

    indices = [3, 5, 11] if tied else {"embed_tokens": [3, 5, 11]}
    model = both(lambda: BASES[base](trainable_token_indices=indices, config={"tie_word_embeddings": tied}), step)
    assert sum("trainable_tokens_delta" in n for n in grad_names(model)) == 1


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": [*ALL, "lm_head", "embed_tokens"]},
        {"modules_to_save": ["lm_head", "embed_tokens", "input_layernorm"]},
        {"trainable_token_indices": [3, 5], "config": {"tie_word_embeddings": True}},
        {"target_modules": ["v_proj"], "target_parameters": ["self_attn.q_proj.weight"]},
        {"layer_replication": [(0, 2), (1, 2)]},
    ],
    ids=["embedding and head", "modules_to_save", "tokens", "parameters", "replicated"],
)
def test_put_on_after_the_patch(config):
    """What a trainer's peft_config puts on a model that was patched bare."""
    settings = dict(config)
    model = settings.pop("config", {})
    make = lambda: llama(**model)
    ours, stock = adapted(fastft.patch(make()), **settings), adapted(make(), **settings)
    reference = run(in_float64(stock), train_step, reference=True)
    judge(run(ours, train_step), reference, run(stock, train_step))
    assert outline(ours) == outline(stock) and not fallbacks(ours)


def outline(model):
    """All that optimizers, checkpoints and PEFT go by: names and order of parameters, buffers, modules, state."""
    parameters = [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    everything = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    saved = [
        (n, tuple(t.shape), t.dtype) for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()
    ]
    return (
        parameters,
        everything,
        [n for n, _ in model.named_buffers()],
        [n for n, _ in model.named_modules()],
        list(model.state_dict()),
        saved,
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "config",
    [
        {"bias": "all", "config": {"attention_bias": True, "mlp_bias": True}},
        {"target_modules": [*ALL, "lm_head", "embed_tokens"]},
        {"modules_to_save": ["lm_head", "norm"]},
        {"trainable_token_indices": [3, 5], "config": {"tie_word_embeddings": True}},
        {"layer_replication": [(0, 2), (1, 2)]},
    ],
    ids=["biases", "embedding and head", "modules_to_save", "tokens", "replicated"],
)
def test_parameters_in_stocks_order_under_stocks_names(config, base):
    """After the patch, after a step, and after the undo."""
    ours, stock = fastft.patch(BASES[base](**config)), BASES[base](**config)
    assert outline(ours) == outline(stock)
    for m in (ours, stock):
        train_step(m)
    assert outline(ours) == outline(stock) and list(gradients(ours)) == list(gradients(stock))
    fastft.unpatch(ours)
    assert outline(ours) == outline(stock)
