"""PEFT's adapters on the parameters of experts, patched against stock: what PEFT may switch, add, merge or take away
after the patch, and what is saved."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

import fastft
from benchmarks import tiny
from fastft.experts import layer
from fastft.swapping.swap import is_fast
from fastft.testing import assert_parity

from .moe_models import build, drawn, fallbacks, patched, rows, stacks, with_adapters


def both(family="qwen3_moe", **settings):
    """(stock, patched, a batch)"""
    stock = with_adapters(build(family), **settings)
    return stock, patched(stock), tiny.batch(build(family))


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("settings", [dict(r=1), dict(r=5), dict(use_rslora=True)], ids=str)
def test_ranks_and_scalings(family, settings):
    stock, fast, batch = both(family, **settings)
    assert_parity(stock, fast, batch)
    assert fallbacks(fast) == {}


@pytest.mark.parametrize("which", ["gate_up_proj", "down_proj"])
def test_one_parameter_alone(which):
    stock = build("qwen3_moe")
    names = [n for n in stacks(stock) if n.endswith(which)]
    model = drawn(get_peft_model(stock, LoraConfig(r=4, target_modules=[], target_parameters=names)))
    fast = patched(model)
    assert_parity(model, fast, tiny.batch(build("qwen3_moe")))
    assert any(r.kernel.endswith(f"with adapters on {which}") for r in rows(fast)[0])


def test_base_trains_too():
    stock, _, batch = both()
    for n, p in stock.named_parameters():
        p.requires_grad_(p.requires_grad or "experts" in n)
    assert_parity(stock, patched(stock), batch)


def test_several_adapters():
    def second(model):
        names = stacks(build("qwen3_moe"))
        model.add_adapter("other", LoraConfig(r=3, lora_alpha=5, target_modules=[], target_parameters=names))
        drawn(model, 5)
        model.base_model.set_adapter(["default", "other"])
        return model

    stock, fast, batch = both()
    assert_parity(second(stock), second(fast), batch)
    assert fallbacks(fast) == {}
    for m in (stock, fast):
        m.base_model.set_adapter("other")
    assert_parity(stock, fast, batch)


def test_disabled_merged_and_unmerged():
    stock, fast, batch = both()
    with stock.disable_adapter(), fast.disable_adapter():
        a, b = stock(**batch).loss, fast(**batch).loss
        assert abs(a - b) <= 1e-5
        assert fallbacks(fast) == {}
    stock.merge_adapter()
    fast.merge_adapter()
    assert all(torch.equal(a, b) for a, b in zip(stock.parameters(), fast.parameters()))
    assert abs(stock(**batch).loss - fast(**batch).loss) <= 1e-5
    stock.unmerge_adapter()
    fast.unmerge_adapter()
    assert_parity(stock, fast, batch)
    assert fallbacks(fast) == {}


def test_saved_bytes_are_stocks():
    stock, fast, _ = both()
    a, b = get_peft_model_state_dict(stock), get_peft_model_state_dict(fast)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert [n for n, _ in stock.named_parameters()] == [n for n, _ in fast.named_parameters()]


def test_adapters_put_on_after_the_patch_run_stock_until_patched_again():
    stock = build("qwen3_moe")
    fast, batch = patched(stock), tiny.batch(stock)
    fast, stock = with_adapters(fast), with_adapters(stock)
    assert_parity(stock, fast, batch)
    fastft.patch(fast)
    assert sum(is_fast(m, layer.KIND) for m in fast.modules()) == 4
    before = fallbacks(fast)
    assert_parity(stock, fast, batch)
    assert fallbacks(fast) == before


def test_unload_leaves_the_experts_swapped():
    stock, fast, batch = both()
    fast, stock = fast.unload().requires_grad_(), stock.unload().requires_grad_()
    assert sum(is_fast(m, layer.KIND) for m in fast.modules()) == 2
    assert_parity(stock, fast, batch)


def test_a_hook_inside_goes_stock_and_is_counted():
    stock, fast, batch = both()
    calls = []
    for n, m in fast.named_modules():
        if n.endswith("0.mlp.experts.base_layer"):
            m.register_forward_hook(lambda *a: calls.append(1))
    assert_parity(stock, fast, batch)
    assert calls and any("a hook inside" in k for k in fallbacks(fast))


def test_mixed_precision_adapters():
    """float32 adapters on bfloat16 experts, as PEFT makes them: gradients stay float32."""
    model = with_adapters(build("qwen3_moe", torch.bfloat16))
    fast = patched(model)
    fast(**tiny.batch(model.get_base_model())).loss.backward()
    grads = {n: p.grad for n, p in fast.named_parameters() if "lora_" in n}
    assert grads and all(g.dtype == torch.float32 and bool(g.isfinite().all()) for g in grads.values())
    assert fallbacks(fast) == {}


def test_checkpointing_gives_the_same_bits():
    _, fast, batch = both()
    plain = copy.deepcopy(fast)
    fast.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    runs = []
    for m in (fast, plain):
        m(**batch).loss.backward()
        runs.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[1])
