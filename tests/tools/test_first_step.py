"""fastft run: every live model of a script is patched at its own first training step, or named at the end with the
reason; and no step pays for that. Most situations are judged with a patch that only notes which model it was given."""

import copy
import gc
import io
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.modules import module as hooks
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from fastft.patching.patcher import record_of
from fastft.swapping.swap import is_fast
from fastft.tools.run.first_step import OwnHook, PatchOnFirstStep
from fastft.tools.run.runner import run_patched
from tests.trainers import harness as h

IDS = torch.arange(8)[None] + 4


def tiny(seed=0, auto=AutoModelForCausalLM, **settings):
    torch.manual_seed(seed)
    return auto.from_config(LlamaConfig(vocab_size=64, pad_token_id=1, **{**h.SIZES, **settings}))


def adapted(model, **settings):
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    )


def step(model, ids=IDS):
    model(input_ids=ids, labels=ids).loss.backward()


def free():
    """No step after this one pays: no hook that runs at every module's call."""
    return not hooks._global_forward_pre_hooks


@pytest.fixture
def watch():
    patched = []
    with PatchOnFirstStep(patched.append, lambda m: None) as watch:
        watch.patched = patched
        yield watch
    assert free() and not hooks._global_module_registration_hooks
    from torch.optim.optimizer import _global_optimizer_pre_hooks

    assert not _global_optimizer_pre_hooks
    gc.collect()


def own_hooks(model):
    return [hook for m in model.modules() for hook in m._forward_pre_hooks.values() if isinstance(hook, OwnHook)]


# Real patches


def test_two_models_in_one_loop(capsys):
    a, b = tiny(0).train(), tiny(1).train()

    def script():
        for _ in range(2):
            (a(input_ids=IDS, labels=IDS).loss + b(input_ids=IDS, labels=IDS).loss).backward()
            assert free()

    assert run_patched(script) == 0
    for model in (a, b):
        assert record_of(model) is not None and is_fast(model.model.norm, "norm") and not own_hooks(model)
    assert capsys.readouterr().out.count("modules swapped") == 2


def test_what_the_script_patched_keeps_its_settings():
    import fastft

    model = fastft.patch(tiny().train(), activation_policy="none", unpad=False)

    def script():
        step(model)
        assert "activation policy none" in " ".join(fastft.report(model).notes)

    assert run_patched(script) == 0


def test_a_patch_that_fails_costs_nothing_but_the_speed(capsys, monkeypatch):
    model = tiny().train()
    before = model(input_ids=IDS, labels=IDS).loss

    def broken(*_, **__):
        raise RuntimeError("a fault of ours\nwith a second line")

    monkeypatch.setattr("fastft.api.attach", broken)
    assert run_patched(lambda: [step(model) for _ in range(2)]) == 0
    said = capsys.readouterr()
    assert (
        said.err.splitlines().count(
            "fastft: LlamaForCausalLM trains on as it is: its patch raised RuntimeError: a fault of ours"
        )
        == 1
    )
    assert "LlamaForCausalLM was trained with stock's code, not patched: its patch raised RuntimeError" in said.out
    assert record_of(model) is None and not is_fast(model.model.norm, "norm")
    assert torch.equal(model(input_ids=IDS, labels=IDS).loss, before)


@pytest.mark.parametrize("path", ["function", "exit"])
def test_a_model_that_trained_unseen_is_named_at_the_end(capsys, path):
    def script():
        model = tiny()  # in eval mode, as from_pretrained gives it, and without an optimizer
        step(model)
        if path == "exit":
            raise SystemExit(3)
        return model

    model = tiny().eval()
    assert run_patched(lambda: (step(model), script())) == (3 if path == "exit" else 0)
    assert (
        "LlamaForCausalLM was trained with stock's code, not patched: it was trained in eval mode"
        in capsys.readouterr().out
    )


# Which models


def test_one_after_another_while_the_first_lives(watch):
    first = tiny().train()
    step(first)
    second = tiny(1).train()
    step(second)
    step(first)
    assert watch.patched == [first, second] and free()


def test_a_teacher_is_left_alone_without_a_word(watch):
    teacher, student = tiny().eval(), tiny(1).train()
    for _ in range(2):
        with torch.no_grad():
            teacher(input_ids=IDS)
        teacher(input_ids=IDS)  # eval mode is enough
        step(student)
    assert watch.patched == [student] and free() and not watch.left()
    step(teacher.train())
    assert watch.patched == [student, teacher] and not own_hooks(teacher)


def test_a_frozen_reward_model_in_train_mode(watch):
    policy, reward = (
        tiny().train(),
        tiny(1, AutoModelForSequenceClassification, num_labels=1).train().requires_grad_(False),
    )
    for _ in range(2):
        reward(input_ids=IDS)
        step(policy)
    assert watch.patched == [policy] and free() and not watch.left()


def test_first_evaluated_then_trained(watch):
    model = tiny().eval()
    with torch.no_grad():
        model(input_ids=IDS)
    assert free() and not watch.patched
    step(model.train())
    assert watch.patched == [model] and not own_hooks(model)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.policy, self.value = tiny(0), tiny(1, AutoModelForSequenceClassification, num_labels=1)
        self.head = nn.Linear(64, 1)

    def forward(self, ids):
        return (
            self.policy(input_ids=ids, labels=ids).loss
            + self.head(self.value.model(input_ids=ids).last_hidden_state).mean()
        )


def test_models_inside_a_module_of_the_script(watch):
    """Both; the second through its backbone, which the module calls without the model around it, as PPO's critic is."""
    pair = Pair().train()
    for _ in range(2):
        pair(IDS).backward()
        assert free()
    assert watch.patched == [pair.policy, pair.value]


def test_a_backbone_that_is_called_alone_stands_for_its_model(watch):
    model = adapted(tiny().train())
    model.get_base_model().model(input_ids=IDS).last_hidden_state.mean().backward()
    step(model)
    assert watch.patched == [model]


class ValueHead(nn.Module):
    """As TRL's: the model stands in it under another name, and a scalar of every token's last hidden state is what it
    adds."""

    def __init__(self, model):
        super().__init__()
        self.pretrained_model, self.v_head = model, nn.Linear(64, 1)

    def forward(self, **batch):
        out = self.pretrained_model(**batch, output_hidden_states=True)
        return out.logits, self.v_head(out.hidden_states[-1]).squeeze(-1)


def test_a_value_head_around_an_adapted_model(watch):
    model = ValueHead(adapted(tiny())).train()
    for _ in range(2):
        sum(x.mean() for x in model(input_ids=IDS)).backward()
        assert free()
    assert watch.patched == [model.pretrained_model]


def test_an_adapter_around_a_model_seen_bare(watch):
    bare = tiny().eval()
    with torch.no_grad():
        bare(input_ids=IDS)
    model = adapted(bare).train()
    step(model)
    other = model.unload()
    again = adapted(other).train()
    step(again)
    assert watch.patched == [model, again] and free()


def test_a_sweep_of_models(watch):
    for i in range(3):
        model = tiny(i).train()
        for _ in range(2):
            step(model)
            assert free()
        del model
        watch.patched.clear()
        gc.collect()
    assert watch.seen == 3 and not watch.left()


def test_copies_and_pickled_models(watch):
    """A deep copy carries its original's hook; a model out of a pickle is found at the first step of its optimizer."""
    resting = tiny().eval()
    with torch.no_grad():
        resting(input_ids=IDS)
    copied, file = copy.deepcopy(resting).train(), io.BytesIO()
    torch.save(resting, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False).train()
    step(copied)
    assert watch.patched == [copied] and free()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.1)
    for _ in range(3):
        step(loaded)
        optimizer.step()
    assert watch.patched == [copied, loaded] and free()


def test_a_pickle_of_a_resting_model_needs_nothing_of_ours(watch):
    model = tiny().eval()
    with torch.no_grad():
        model(input_ids=IDS)
    assert own_hooks(model) and b"fastft" not in pickle.dumps(model)
    copied = pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        assert torch.equal(copied(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_trained_in_eval_mode_by_an_optimizer(watch):
    """It is known to train once its optimizer has made a step."""
    model, teacher = tiny().eval(), tiny(1).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for i in range(3):
        teacher(input_ids=IDS)
        step(model)
        optimizer.step()
        optimizer.zero_grad()
        assert watch.patched == ([model] if i else [])
    assert free() and not watch.left()


def test_a_compiled_model(watch, recwarn):
    model = tiny().train()
    compiled = torch.compile(model, backend="eager")
    step(compiled)
    assert watch.patched == [model] and free() and not own_hooks(model) and not compiled._forward_pre_hooks
    assert not [w for w in recwarn if "global hooks" in str(w.message)]


def test_a_compiled_teacher(watch):
    teacher, student = tiny().eval(), tiny(1).train()
    compiled = torch.compile(teacher, backend="eager", fullgraph=True)
    for _ in range(2):
        step(student)
        with torch.no_grad():
            compiled(input_ids=IDS)
        compiled(input_ids=IDS)
    assert watch.patched == [student]


def test_inside_a_transform_it_is_left_and_named(watch):
    model, other = tiny().train(), tiny(1).train()
    params = {n: p.detach() for n, p in model.named_parameters()}
    loss = lambda p: torch.func.functional_call(model, p, kwargs=dict(input_ids=IDS, labels=IDS)).loss
    for _ in range(2):
        torch.func.grad(loss)(params)
    step(other)
    assert watch.patched == [other] and ["torch.func" in left.reason for left in watch.left()] == [True]
    step(model)
    assert watch.patched == [other, model] and not watch.left()


def test_replicas_are_not_models(watch):
    model = tiny().train()
    wrapped = nn.DataParallel(model)
    replica = model._replicate_for_data_parallel()
    replica._is_replica = True
    watch.called(replica, ())
    assert not watch.patched
    step(wrapped)
    assert watch.patched == [model] and not wrapped._forward_pre_hooks


def test_the_scripts_own_modules_do_not_arm(watch):
    """Modules that are built while a model trains cost no search for new models."""
    model = tiny().train()
    step(model)
    nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    assert free()
    tiny(1)
    assert not free()


def test_what_is_left_behind_is_nothing():
    trained, teacher = tiny().train(), tiny(1).eval()
    with PatchOnFirstStep(lambda m: None, lambda m: None):
        with torch.no_grad():
            teacher(input_ids=IDS)
        assert own_hooks(teacher)
        step(trained)
    assert not own_hooks(teacher) and not own_hooks(trained) and free()


def test_a_resting_models_hook_costs_under_ten_microseconds(watch):
    import timeit

    teacher = tiny().eval()
    with torch.no_grad():
        teacher(input_ids=IDS)
        (hook,) = teacher._forward_pre_hooks.values()
        assert min(timeit.repeat(lambda: hook(teacher, ()), number=1000, repeat=5)) / 1000 < 10e-6
