"""Any order of patch, adapters put on, switched, merged, taken off, copies and unpatch leaves a model with stock's
numbers."""

import copy
import random

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from torch import nn

import fastft
from fastft.swapping.swap import Fast, slot_of
from tests.linear.lora_models import ALL, HIDDEN, drawn, judge, llama, run, tokens

N_SEQUENCES, LENGTH = 12, 8


def config(targets=tuple(ALL), r=4, **more):
    return LoraConfig(r=r, lora_alpha=8, target_modules=list(targets), task_type="CAUSAL_LM", **more)


def step(model):
    """Loss, logits and every gradient that there is."""
    model.zero_grad(set_to_none=True)
    ids = tokens()
    out = model(input_ids=ids, labels=ids)
    if out.loss.requires_grad:
        out.loss.backward()
    return {
        "loss": out.loss.detach(),
        "logits": out.logits.detach(),
        **{f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None},
    }


class Twins:
    """A stock model, the same in float64, and ours: what is done to one is done to all, but for patch and unpatch."""

    def __init__(self):
        self.models = {"stock": llama(layers=1), "reference": llama(layers=1).double(), "ours": llama(layers=1)}
        self.names: list[str] = []

    @property
    def wrapped(self) -> bool:
        return isinstance(self.models["ours"], PeftModel)

    def each(self, what):
        for k, m in self.models.items():
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(3)
                if (new := what(m)) is not None:
                    self.models[k] = new

    def put_on(self, name, **more):
        if self.wrapped:
            self.each(lambda m: m.add_adapter(name, config(**more)))
        else:
            self.each(lambda m: get_peft_model(m, config(**more), adapter_name=name, autocast_adapter_dtype=False))
        self.names.append(name)
        self.each(self.settle)

    @staticmethod
    def settle(model):
        """The same numbers in all of the adapters, in float64 too."""
        drawn(model)
        model.train()

    def check(self):
        results = {k: run(m, step, reference=k == "reference") for k, m in self.models.items()}
        judge(results["ours"], results["reference"], results["stock"])


def fresh(twins):
    return next(n for n in "abcdefgh" if n not in twins.names)


def act_patch(t):
    fastft.patch(t.models["ours"])


def act_unpatch(t):
    fastft.unpatch(t.models["ours"])
    assert not any(isinstance(m, Fast) or "_fastft" in vars(m) for m in t.models["ours"].modules())


def act_all(t):
    t.put_on(fresh(t))


def act_some(t):
    t.put_on(fresh(t), targets=("q_proj", "v_proj", "down_proj"), r=2)


def act_switch(t):
    name = random.choice(t.names)
    t.each(lambda m: m.set_adapter(name))


def act_delete(t):
    if len(t.names) > 1:
        name = t.names.pop(0)
        t.each(lambda m: m.set_adapter(t.names[-1]))
        t.each(lambda m: m.delete_adapter(name))


def act_merge(t):
    t.each(lambda m: m.base_model.merge_adapter())


def act_unmerge(t):
    t.each(lambda m: m.base_model.unmerge_adapter())


def act_weighted(t):
    name, known = fresh(t), list(t.names)
    ranks = {t.models["ours"].peft_config[n].r for n in known}
    if len(ranks) == 1:
        t.each(lambda m: m.add_weighted_adapter(known, [0.5] * len(known), name, combination_type="linear"))
        t.each(lambda m: m.set_adapter(name))
        t.names.append(name)


def act_off(t):
    t.each(lambda m: m.unload())
    t.names.clear()
    t.each(lambda m: m.train())


def act_into_base(t):
    t.each(lambda m: m.merge_and_unload())
    t.names.clear()
    t.each(lambda m: m.train())


def act_copy(t):
    t.each(copy.deepcopy)


def act_replace(t):
    """Another layer in the place of one that is not adapted."""

    def replaced(m):
        attention = next(x for x in m.modules() if hasattr(x, "k_proj"))
        if type(attention.k_proj) is nn.Linear or (
            slot_of(attention.k_proj) and slot_of(attention.k_proj).stock is nn.Linear
        ):
            new = nn.Linear(attention.k_proj.in_features, attention.k_proj.out_features, bias=False)
            weight = torch.randn(new.weight.shape, generator=torch.Generator().manual_seed(5)) * 0.2
            new.weight.data = weight.to(attention.k_proj.weight.dtype)
            new.weight.requires_grad_(attention.k_proj.weight.requires_grad)
            attention.k_proj = new

    t.each(replaced)


ALWAYS = [act_patch, act_patch, act_unpatch, act_all, act_some, act_copy, act_replace]
WRAPPED = [act_switch, act_delete, act_merge, act_unmerge, act_weighted, act_off, act_into_base]


@pytest.mark.parametrize("seed", range(N_SEQUENCES))
@pytest.mark.filterwarnings("ignore::UserWarning:peft")
def test_any_order(seed):
    random.seed(seed)
    t, done = Twins(), []
    for i in range(LENGTH):
        action = random.choice(ALWAYS + (WRAPPED if t.wrapped else []))
        done.append(action.__name__)
        try:
            action(t)
            if random.random() < 0.5 or i == LENGTH - 1:
                done.append("step")
                t.check()
        except Exception as e:
            raise AssertionError(" ".join(done)) from e
    act_patch(t)
    t.check()
    report = fastft.report(t.models["ours"])
    assert sum(r.count for r in report.swapped if r.kind == "linear group") == 7, report


def test_prompt_tuning():
    prompt = PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM")
    t = Twins()
    act_patch(t)
    t.each(lambda m: get_peft_model(m, prompt, autocast_adapter_dtype=False))
    values = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(1)) * 0.1
    t.models["reference"].double()
    for m in t.models.values():
        m.prompt_encoder["default"].embedding.weight.data.copy_(values)
    act_patch(t)
    t.check()
    act_unpatch(t)
    t.check()


def test_what_left_the_model_is_stock_after_unpatch():
    """A member that was replaced is nobody's module any more; the user who kept it finds it as it was."""
    model = fastft.patch(llama(layers=1))
    attention = model.model.layers[0].self_attn
    old = attention.k_proj
    attention.k_proj = copy.deepcopy(old)
    assert isinstance(old, Fast)
    fastft.unpatch(model)
    assert type(old) is nn.Linear and "_fastft" not in vars(old) and type(attention.k_proj) is nn.Linear
