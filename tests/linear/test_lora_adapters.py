"""What PEFT can do with adapters, patched against stock: judged by the float64 reference, on dense and 4-bit bases."""

import copy
import warnings
from collections import Counter

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import nn

import fastft
from fastft_kernels.numerics import compare
from tests.linear.lora_models import (
    ALL,
    BASES,
    HIDDEN,
    adapted,
    both,
    dense,
    drawn,
    fallbacks,
    gradients,
    in_float64,
    judge,
    llama,
    nf4,
    run,
    same_bits,
    tokens,
    train_step,
)

ATTENTION_BIAS = {"attention_bias": True, "mlp_bias": True}
SETTINGS = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "gate_proj": 7},
        "alpha_pattern": {"v_proj": 3, "layers.1.self_attn.k_proj": 16},
    },
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "up only": {"target_modules": ["up_proj"]},
    "lora_bias": {"lora_bias": True, "config": ATTENTION_BIAS},
    "base bias": {"config": ATTENTION_BIAS},
    "dropout": {"dropout": 0.3},
    "replicated": {"layer_replication": [(0, 2), (1, 2)]},
    "modules_to_save": {"modules_to_save": ["input_layernorm", "lm_head", "embed_tokens"]},
    "embedding": {"target_modules": [*ALL, "embed_tokens"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [3, 5, 11]}},
    "tied tokens": {"trainable_token_indices": [3, 5, 11], "config": {"tie_word_embeddings": True}},
    "head": {"target_modules": [*ALL, "lm_head"]},
}


def groups(report) -> Counter:
    """Linears in groups of each size; rows of 4-bit layers differ by the sizes of their proofs too."""
    return sum((Counter({r.kernel: r.count}) for r in report if r.kind == "linear group"), Counter())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(name, base):
    both(lambda: BASES[base](**SETTINGS[name]))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("bias", ["lora_only", "all"])
def test_base_bias_that_learns(bias, base):
    model = both(lambda: BASES[base](bias=bias, config=ATTENTION_BIAS))
    assert sum(n.endswith("base_layer.bias") for n, p in model.named_parameters() if p.grad is not None) == 14


@pytest.mark.parametrize("init", ["gaussian", "orthogonal", "pissa", "olora", "eva", False])
def test_initialisations(init):
    def factory():
        torch.manual_seed(5)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # EVA's: it wants data first
            config = LoraConfig(r=4, lora_alpha=8, target_modules=ALL, init_lora_weights=init, task_type="CAUSAL_LM")
            return (
                drawn(get_peft_model(llama(), config)).train()
                if init == "eva"
                else get_peft_model(llama(), config).train()
            )

    both(factory)


def test_dropout_is_stocks_stream_and_off_in_eval():
    """The same masks in the same order: what is drawn afterwards is what stock draws afterwards."""

    def step(model):
        out = train_step(model)
        out["next draw"] = torch.rand(4)
        with torch.no_grad():
            model.eval()
            out["eval"] = model(tokens()).logits
            out["again"] = model(tokens()).logits
        return out

    stock, ours = dense(dropout=0.3), fastft.patch(dense(dropout=0.3))
    a, b = run(stock, step), run(ours, step)
    judge(b, run(in_float64(dense(dropout=0.3)), step, reference=True) | {"next draw": a["next draw"].double()}, a)
    assert torch.equal(a["next draw"], b["next draw"]) and torch.equal(b["eval"], b["again"])


def two(base, **more):
    model = BASES[base](dropout=0.1)
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "o_proj", "up_proj"], **more))
    return drawn(model)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("active", [["default", "second"], ["second", "default"], ["second"]], ids="-".join)
def test_active_adapters(active, base):
    """Several at once, in either order; one that some layers do not have."""

    def activate(model):
        model.base_model.set_adapter(active)

    both(lambda: two(base), after=activate)


def test_no_adapter_active():
    def step(model):
        with torch.no_grad():
            return {"logits": model(tokens()).logits}

    both(lambda: dense(), step, after=lambda m: m.base_model.set_adapter([]))


@pytest.mark.parametrize("base", BASES)
def test_disable_adapter_is_the_base_model(base):
    bare = BASES[base]().unload()
    ours = fastft.patch(BASES[base]())
    with torch.no_grad(), ours.disable_adapter():
        a = ours(tokens()).logits
    with torch.no_grad():
        stock = bare(tokens()).logits
        reference = in_float64(bare)(tokens()).logits
    assert compare(a, reference, stock)
    judge(
        run(ours, train_step),
        run(in_float64(BASES[base]()), train_step, reference=True),
        run(BASES[base](), train_step),
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("between", ["disable", "switch", "scale", "delete"])
def test_adapters_change_between_forward_and_backward(between, base):
    """DPO and GRPO ask the reference model in between: the graph that is waiting keeps what it was built with."""

    def step(model):
        ids = tokens()
        out = model(ids, labels=ids)
        if between == "disable":
            with torch.no_grad(), model.disable_adapter():
                model(ids)
        elif between == "switch":
            model.set_adapter("second")
            with torch.no_grad():
                model(ids)
            model.set_adapter("default")
        elif between == "scale":
            for m in model.modules():
                if hasattr(m, "scale_layer"):
                    m.scale_layer(3.0)
        else:
            model.delete_adapter("second")
        out.loss.backward()
        return {"loss": out.loss, **gradients(model)}

    both(lambda: two(base), step)


@pytest.mark.parametrize("base", BASES)
def test_adapters_come_and_go_after_patching(base, tmp_path):
    other = BASES[base](seed=9, r=6)
    drawn(other, seed=21).save_pretrained(tmp_path)
    extra = lambda: LoraConfig(r=5, lora_alpha=4, target_modules=["k_proj", "down_proj"], use_rslora=True)

    def step(model):
        out = {f"plain {k}": v for k, v in train_step(model).items()}
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        model.add_adapter("new", extra())
        model.load_adapter(tmp_path, "loaded", is_trainable=True)
        drawn(model, seed=22)
        for name in ("new", "loaded"):
            model.set_adapter(name)
            model(tokens(), labels=tokens()).loss.backward()
            out |= {f"d {name} {k}": v for k, v in gradients(model).items()}
            model.zero_grad(set_to_none=True)
        model.delete_adapter("new")
        model.set_adapter("default")
        return out | {f"d last {k}": v for k, v in train_step(model).items()}

    def reference(model):
        return step(model)

    stock, ours = BASES[base](), fastft.patch(BASES[base]())
    true = in_float64(BASES[base]())
    eager, mine = run(stock, step), run(ours, step)
    exact = {k: v.double() for k, v in run(true, lambda m: _in_double(m, reference)).items()}
    judge(mine, exact, eager)
    assert not fallbacks(ours)


def _in_double(model, step):
    """`step` in float64, where adapters that join are float32 at first."""
    from fastft.proving.float64 import float64_reference

    def widen(module, args):
        for p in model.parameters():
            if p.is_floating_point() and p.dtype != torch.float64:
                p.data = p.data.double()

    handle = model.register_forward_pre_hook(widen)
    with float64_reference():
        out = step(model)
    handle.remove()
    return out


@pytest.mark.parametrize("base", BASES)
def test_merge_and_unmerge(base):
    """Merged layers are stock's business, call by call; unmerged they are ours again."""
    ours, stock = fastft.patch(BASES[base]()), BASES[base]()
    for m in (ours, stock):
        m.eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 4 bits: merging rounds
            m.merge_adapter()
    with torch.no_grad():
        same_bits({"logits": stock.model.model(tokens())[0]}, {"logits": stock.model.model(tokens())[0]})
        merged = ours(tokens()).logits, stock(tokens()).logits
    assert compare(merged[0], in_float64(stock)(tokens()).logits, merged[1])
    ours(tokens())  # with gradients: without them nothing is counted, as everything is stock's
    assert fastft.report(ours).fallbacks["linear group: adapters are merged"] == 14
    for m in (ours, stock):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            m.unmerge_adapter()
        m.train()
    before = fallbacks(ours)
    judge(run(ours, train_step), run(in_float64(stock), train_step, reference=True), run(stock, train_step))
    assert fallbacks(ours) == before


def test_merged_then_disabled():
    ours, stock = fastft.patch(dense()).eval(), dense().eval()
    with torch.no_grad():
        for m in (ours, stock):
            m.merge_adapter()
        with ours.disable_adapter(), stock.disable_adapter():
            a, b = ours(tokens()).logits, stock(tokens()).logits
        reference = in_float64(stock)
        with reference.disable_adapter():
            assert compare(a, reference(tokens()).logits, b)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("how", ["merge_and_unload", "unload"])
def test_the_adapter_is_taken_off(how, base):
    def take_off(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(model, how)()

    stock, ours = take_off(BASES[base]()), take_off(fastft.patch(BASES[base]()))
    assert list(stock.state_dict()) == list(ours.state_dict())
    with torch.no_grad():
        a, b = ours(tokens()).logits, stock(tokens()).logits
        assert compare(a, in_float64(stock)(tokens()).logits, b)
    assert all(r.is_swapped for r in fastft.report(ours))
    fastft.unpatch(ours)
    assert not any("Fast" in type(m).__name__ for m in ours.modules())
    # and put on again: new modules, the same groups
    again, plain = adapted(fastft.patch(ours)), adapted(stock)
    judge(run(again, train_step), run(in_float64(plain), train_step, reference=True), run(plain, train_step))
    assert not fallbacks(again)


@pytest.mark.parametrize("base", BASES)
def test_patched_bare_then_wrapped(base):
    """What a trainer's peft_config does: the groups join by the first forward, proven, and the report says so at every
    moment."""
    make = {"dense": llama, "nf4": lambda: fresh_nf4()}[base]
    ours = fastft.patch(make())
    assert all(r.is_swapped for r in fastft.report(ours))
    ours, stock = adapted(ours), adapted(make())
    waiting = [r for r in fastft.report(ours).stock if r.kind == "linear group"]
    assert sum(r.count for r in waiting) == 14 and "next forward" in waiting[0].reason
    a, b = run(ours, train_step), run(stock, train_step)
    judge(a, run(in_float64(adapted(make())), train_step, reference=True), b)
    report = fastft.report(ours)
    assert groups(report) == {"lora_linear(group of 3)": 6, "lora_linear(group of 2)": 4, "lora_linear(group of 1)": 4}
    assert not report.stock and not fallbacks(ours)
    assert all(r.error == r.error for r in report.swapped if r.kind == "linear group"), "a proof without its error"
    stock_again = fastft.unpatch(ours)
    assert not any("Fast" in type(m).__name__ for m in stock_again.modules())
    ours.zero_grad(set_to_none=True)
    stock.zero_grad(set_to_none=True)
    same_bits(run(ours, train_step), run(stock, train_step))


def fresh_nf4():
    from tests.linear.lora_models import quantised

    return quantised(llama())


def test_the_first_forward_after_wrapping_may_be_anybodys():
    """Without gradients, under autocast, in inference mode, under a checkpoint: the proof runs apart, the random stream
    stays."""
    make = lambda: adapted(llama(), dropout=0.2)
    for around in (torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)):
        ours = adapted(fastft.patch(llama()), dropout=0.2)

        def forward(model, around=around):
            with around():
                return {"logits": model(tokens()).logits.clone(), "next draw": torch.rand(4)}

        stock = run(make(), forward)
        reference = run(in_float64(make()), lambda m: {"logits": m(tokens()).logits}, reference=True)
        judge(run(ours, forward), reference | {"next draw": stock["next draw"].double()}, stock)
        assert not fastft.report(ours).stock
    ours, stock = adapted(fastft.patch(llama()), dropout=0.2), adapted(llama(), dropout=0.2)
    for m in (ours, stock):
        m.gradient_checkpointing_enable({"use_reentrant": False})
    judge(run(ours, train_step), run(in_float64(stock), train_step, reference=True), run(stock, train_step))


@pytest.mark.parametrize("base", BASES)
def test_mixed_batch_by_adapter_names(base):
    """Handed back: through forward pre-hooks on the LoRA layers."""

    def step(model):
        model.eval()
        return {"logits": model(tokens(3), adapter_names=["default", "second", "__base__"]).logits.detach()}

    both(lambda: two(base), step, fast=False)


@pytest.mark.parametrize("base", BASES)
def test_scaling_changes(base):
    def rescale(model):
        for m in model.modules():
            if hasattr(m, "scale_layer"):
                m.scale_layer(1.7)
                m.scaling = dict(m.scaling)  # swapped for another dict

    both(BASES[base], after=rescale)

    def unscale(model):
        for m in model.modules():
            if hasattr(m, "unscale_layer"):
                m.set_scale("default", 0.25)

    both(BASES[base], after=unscale)


def test_input_dtype_casting_disabled():
    from peft.helpers import disable_input_dtype_casting

    def step(model):
        with disable_input_dtype_casting(model):
            return train_step(model)

    both(dense, step, fast=False)


@pytest.mark.parametrize("base", BASES)
def test_frozen_A(base):
    def freeze(model):
        for n, p in model.named_parameters():
            if "lora_A" in n:
                p.requires_grad_(False)

    model = both(BASES[base], after=freeze)
    assert not any("lora_A" in n for n in gradients(model))

    def step(model):  # disable_adapter goes through set_adapter, which makes A trainable again: so it does in stock
        with torch.no_grad(), model.disable_adapter():
            model(tokens())
        return train_step(model)

    again = both(BASES[base], step, after=freeze)
    assert any("lora_A" in n for n in gradients(again))


@pytest.mark.parametrize("base", BASES)
def test_variants_stay_stock(base):
    model = both(lambda: BASES[base](use_dora=True, target_modules=["q_proj", "v_proj"]), fast=None)
    why = [r for r in fastft.report(model).stock if r.kind == "linear group"]
    assert sum(r.count for r in why) == 4 and all("variant of LoRA" in r.reason for r in why)


def test_a_variant_beside_plain_adapters():
    """One sibling of three gets a second, DoRA adapter after patching: it alone goes the stock way, call by call."""

    def mix(model):
        torch.manual_seed(4)
        model.add_adapter("dora", LoraConfig(r=2, use_dora=True, target_modules=["k_proj"]))
        drawn(model, seed=6)
        model.base_model.set_adapter(["default", "dora"])

    model = both(dense, after=mix, fast=False)
    assert fallbacks(model) == {"linear group: DoraLinearVariant: a variant of LoRA": 2}


def test_other_tuners_stay_stock():
    from peft import IA3Config, LoHaConfig

    for config in (
        LoHaConfig(r=2, target_modules=["q_proj"]),
        IA3Config(target_modules=["k_proj"], feedforward_modules=[]),
    ):

        def factory(config=config):
            torch.manual_seed(1)
            return get_peft_model(llama(), copy.deepcopy(config)).train()

        model = both(factory, fast=None)
        assert any(r.kind == "linear group" and not r.is_swapped for r in fastft.report(model))


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_prompt_tuning(config):
    def factory():
        torch.manual_seed(1)
        return get_peft_model(llama(), config(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()

    def step(model):
        out = model(tokens(), labels=tokens())
        out.loss.backward()
        return {"loss": out.loss, **gradients(model)}

    both(factory, step, fast=None)


def test_alora_offsets_are_handed_back():
    def factory():
        return dense(alora_invocation_tokens=[5, 6])

    ids = tokens()
    ids[0, 4:6] = torch.tensor([5, 6])
    both(factory, lambda m: train_step(m, ids), fast=None)


def test_target_parameters_of_a_linear():
    model = both(lambda: dense(target_modules=["v_proj"], target_parameters=["self_attn.q_proj.weight"]), fast=None)
    assert any("lora_A" in n and "q_proj" in n for n in gradients(model))


@pytest.mark.parametrize("base", BASES)
def test_save_and_load_round_trip(base, tmp_path):
    ours, stock = fastft.patch(BASES[base]()), BASES[base]()
    names = lambda m: [(n, tuple(p.shape), p.requires_grad) for n, p in m.named_parameters()]
    assert names(ours) == names(stock) and list(ours.state_dict()) == list(stock.state_dict())
    train_step(ours)
    with torch.no_grad():
        for p in ours.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    ours.save_pretrained(tmp_path)
    bare = llama() if base == "dense" else fresh_nf4()
    loaded = PeftModel.from_pretrained(bare, tmp_path, is_trainable=True).train()
    fastft.patch(loaded)
    ours.zero_grad(set_to_none=True)
    same_bits(run(ours, train_step), run(loaded, train_step))


def test_modules_keep_their_hooks():
    """Hooks on a member, on its base layer, on lora_A: they fire, and what they change is used."""
    for where in ("", ".base_layer", ".lora_A.default", ".lora_dropout.default"):

        def hook(model, where=where):
            target = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj" + where)
            target.register_forward_hook(lambda m, args, out: out * 1.5)

        both(dense, after=hook, fast=None)


def test_a_pre_hook_gives_one_sibling_another_input():
    def hook(model):
        target = model.get_submodule("base_model.model.model.layers.0.self_attn.k_proj")
        target.register_forward_pre_hook(lambda m, args: (args[0] * 2,))

    both(dense, after=hook)


def test_a_member_is_exchanged_for_another_module():
    """By setattr, for a subclass that computes something else: it is called, and nothing is computed in its place."""

    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def exchange(model):
        torch.manual_seed(8)
        attention = model.base_model.model.model.layers[0].self_attn
        attention.k_proj = Twice(HIDDEN, 32, bias=False).to(next(model.parameters()).dtype)

    # fast=None: the foreign module stays stock, and the report says so; its siblings go on
    model = both(lambda: dense(target_modules=["q_proj", "v_proj"]), after=exchange, fast=None)
    assert any("Twice" in r.reason for r in fastft.report(model).stock)


def test_nf4_groups_are_groups():
    """The report of a 4-bit model names the same groups as that of a dense one."""
    assert groups(fastft.report(fastft.patch(nf4()))) == groups(fastft.report(fastft.patch(dense())))
