"""Activation policies: the same bits under each, what each really keeps, and a model that stands as the trainer left
it."""

import contextlib
import copy
import functools
import pickle
from dataclasses import dataclass

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import fastft
from fastft.checkpointing.controller import controller_of
from fastft.checkpointing.memory_meter import Meter, keeping
from fastft.errors import PolicyError
from tests.linear.lora_models import BASES, HIDDEN, SMALL, VOCAB, llama, run, same_bits, tokens, train_step

N = 4
POLICIES = ["trainer", "none", "lean", "full", "offload", 1, 3, "1GiB"]


def model_of(base="dense", sizes=None, **more):
    return BASES[base](config={"layers": N, **(sizes or {})}, dropout=0.2, **more)


def checkpointed(model, **how):
    model.gradient_checkpointing_enable({"use_reentrant": False} | how)
    model.enable_input_require_grads()
    return model


def layers_of(model):
    return model.get_submodule("base_model.model.model.layers")


def held(model):
    """Bytes that autograd keeps for a batch of 2 x 16, parameters apart."""
    ids = tokens(2, 16)
    with keeping([*model.parameters(), *model.buffers(), ids]) as kept:
        loss = model(ids, labels=ids).loss
    loss.backward()
    model.zero_grad(set_to_none=True)
    return kept.bytes


@dataclass
class Free:
    """A meter that shows what the test says."""

    bytes: int | None

    def available(self):
        return self.bytes


def with_free(model, nbytes):
    controller = controller_of(model.get_base_model())
    controller.meter, controller.untouched = Free(nbytes), -1  # an optimizer has stepped: no moments are still to come
    return controller


def notes(model):
    """The report's lines on the policy."""
    return [n for n in fastft.report(model).notes if "activation policy" in n or "last forward" in n]


def last(model):
    return notes(model)[1].split(": ", 1)[1]


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("trainer", [True, False])
def test_the_same_bits_under_every_policy(trainer, policy, base):
    plain = run(fastft.patch(model_of(base)), train_step)
    model = fastft.patch(model_of(base), activation_policy=policy)
    same_bits(plain, run(checkpointed(model) if trainer else model, train_step))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("base", BASES)
def test_the_same_bits_where_layers_without_adapters_are_among_them(base, dtype):
    """They are stock's where they are kept."""
    for adapted in (["q_proj", "v_proj"], ["gate_proj"]):
        make = lambda: BASES[base](dtype, config={"layers": N, "attention_bias": True}, target_modules=adapted)  # noqa: B023
        same_bits(
            run(fastft.patch(make()), train_step), run(fastft.patch(make(), activation_policy="lean"), train_step)
        )


@pytest.mark.parametrize("policy", ["lean", "offload", 2])
def test_the_same_bits_under_autocast_and_in_full_fine_tuning(policy):
    def step(model):
        with torch.autocast("cpu", torch.bfloat16):
            return train_step(model)

    plain = run(fastft.patch(model_of()), step)
    same_bits(plain, run(fastft.patch(model_of(), activation_policy=policy), step))
    full = run(fastft.patch(llama(layers=N)), train_step)
    same_bits(full, run(fastft.patch(llama(layers=N), activation_policy=policy), train_step))


@pytest.mark.parametrize("policy", ["lean", "offload", 2])
def test_two_forwards_then_two_backwards_in_reverse_and_a_graph_used_twice(policy):
    def step(model):
        a, b = (model(tokens(seed=s), labels=tokens(seed=s)).loss for s in (1, 2))
        b.backward(retain_graph=True)
        a.backward()
        b.backward()
        return {"a": a, "b": b, **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    same_bits(run(fastft.patch(model_of()), step), run(fastft.patch(model_of(), activation_policy=policy), step))


def test_each_keeps_what_it_says():
    """Per layer a checkpoint is one hidden state; the first is an embedding's rows, and costs nothing beside the
    ids."""
    state = 2 * 16 * HIDDEN * 4
    bytes_of = {
        p: held(fastft.patch(model_of(), activation_policy=p)) for p in ("none", "lean", "full", "offload", 1, 3)
    }
    layer = (bytes_of["none"] - bytes_of[3] + 2 * state) // 3
    assert layer > 5 * state
    assert bytes_of["full"] == bytes_of["lean"]
    assert bytes_of["lean"] - bytes_of["offload"] == (N - 1) * state
    once = bytes_of[1] - bytes_of["lean"] - (N - 1) * (layer - state)  # cosines and sines, which all layers share
    assert 0 < once < state
    wide = {"vocab_size": 4 * VOCAB}  # stock keeps logits
    lean = held(fastft.patch(model_of(sizes=wide), activation_policy="lean"))
    assert lean <= held(checkpointed(model_of(sizes=wide))) - state


@pytest.mark.parametrize("base", BASES)
def test_lean_leaves_out_the_last_product(base):
    """(A last layer without an adapter saves first in stock already.)"""

    def flops(policy):
        model, ids = fastft.patch(BASES[base](config={"layers": N}), activation_policy=policy), tokens(2, 16)
        loss = model(ids, labels=ids).loss
        with FlopCounterMode(display=False) as counted:
            loss.backward()
        return counted.get_total_flops()

    full, lean = flops("full"), flops("lean")
    inner = SMALL["intermediate_size"]
    # the down projection (its adapter's product, in place, is not counted)
    assert full - lean == N * 2 * (2 * 16) * HIDDEN * inner


def test_auto_recomputes_as_few_layers_as_the_memory_asks_for():
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"))
    plain = run(fastft.patch(model_of()), train_step)
    controller = with_free(model, 2**40)
    same_bits(plain, run(model, train_step))
    assert last(model).startswith(f"{N} kept")
    ((per_token, length),) = controller.stacks[0].measured.values()
    ids = tokens()
    layer, state = int(per_token * ids.numel()), ids.numel() * HIDDEN * 4
    assert length == ids.shape[-1]
    fixed = 2**29 + 8 * ids.numel() * HIDDEN + layer + sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    for n in range(N):
        model.zero_grad(set_to_none=True)
        controller.meter.bytes = fixed + n * state + (N - n) * layer
        same_bits(plain, run(model, train_step))
        assert last(model).startswith(f"{N - n} kept" + (f", {n} recomputed" if n else "")), (n, last(model))
    model.zero_grad(set_to_none=True)
    controller.meter.bytes = 0
    same_bits(plain, run(model, train_step))
    assert last(model).startswith(f"{N} offloaded")


def test_auto_measures_what_a_layer_keeps():
    """The prediction for a layer is what autograd really keeps for it."""
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"))
    controller = with_free(model, 2**40)
    ids = tokens(2, 16)
    model(ids, labels=ids).loss.backward()
    ((per_token, _),) = controller.stacks[0].measured.values()
    counted = held(fastft.patch(model_of(), activation_policy="none")) - held(
        fastft.patch(model_of(), activation_policy=3)
    )
    state = ids.numel() * HIDDEN * 4
    # cosines and sines are kept once for all layers
    assert 3 * per_token * ids.numel() == pytest.approx(counted + 2 * state, rel=0.03)


def test_auto_is_about_the_layers_that_the_trainer_checkpoints():
    model = fastft.patch(model_of(), activation_policy="auto")
    run(model, train_step)
    assert len(notes(model)) == 1  # the trainer asked for nothing
    checkpointed(model)
    for i, layer in enumerate(layers_of(model)):
        layer.gradient_checkpointing = i % 2 == 1
    with_free(model, 0)
    model.get_base_model().model.layers[0].mlp.register_forward_hook(lambda *_: None)
    run(model, train_step)
    run(model, train_step)
    assert last(model).startswith("2 offloaded")


@pytest.mark.parametrize("how", ["reentrant", "own"])
def test_a_checkpoint_function_that_was_asked_for_is_used(how):
    calls = []

    def own(function, *args):
        calls.append(1)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=True)

    plain = run(fastft.patch(model_of()), train_step)
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"), use_reentrant=how == "reentrant")
    if how == "own":
        for layer in layers_of(model):
            layer._gradient_checkpointing_func = own
    with_free(model, 0)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        same_bits(plain, run(model, train_step))
    assert last(model).startswith(f"{N} recomputed") and len(calls) == (2 * N - 1 if how == "own" else 0)


def test_saved_tensor_hooks_of_others_see_every_tensor():
    """TRL's activation offloading: what is measured or moved here would pass it by."""
    model = checkpointed(fastft.patch(model_of(), activation_policy="auto"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        run(model, train_step)
    assert last(model).startswith(f"{N} recomputed") and "hook" in last(model)


def test_on_a_device_that_does_not_say_the_trainer_decides():
    plain, model = (
        run(fastft.patch(model_of()), train_step),
        checkpointed(fastft.patch(model_of(), activation_policy="auto")),
    )
    with_free(model, None)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        same_bits(plain, run(model, train_step))
    assert last(model).startswith(
        f"{N} recomputed layers (as the trainer says: the free memory of a cpu device is not known)"
    )
    assert Meter(torch.device("hpu")).available() is None


@pytest.mark.parametrize("policy", ["lean", "none", 2, "auto"])
def test_the_layers_stand_as_the_trainer_left_them(policy):
    model = checkpointed(fastft.patch(model_of(), activation_policy=policy))
    function = functools.partial(checkpoint, use_reentrant=False)
    before = []
    for i, layer in enumerate(layers_of(model)):
        layer.gradient_checkpointing, layer._gradient_checkpointing_func = i > 0, function
        before.append(dict(layer.__dict__))
    run(model, train_step)
    assert all(dict(m.__dict__) == d for m, d in zip(layers_of(model), before))

    broken = layers_of(model)[2].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, train_step)
    broken.remove()
    for m, d in zip(layers_of(model), before):
        assert {k: v for k, v in m.__dict__.items() if "checkpointing" in k} == {
            k: v for k, v in d.items() if "checkpointing" in k
        }
    run(model, train_step)


def test_it_survives_a_trainer_that_switches_off_and_on():
    plain, model = fastft.patch(model_of()), checkpointed(fastft.patch(model_of(), activation_policy=2))
    for _ in range(2):
        model.gradient_checkpointing_disable()
        with torch.no_grad(), contextlib.redirect_stderr(None):
            model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False)
        checkpointed(model)
        for m in (plain, model):
            m.zero_grad(set_to_none=True)
        same_bits(run(plain, train_step), run(model, train_step))
        assert last(model) == "2 kept, 2 recomputed layers"


def test_evaluation_and_inference_are_left_alone():
    model = checkpointed(fastft.patch(model_of(), activation_policy="lean"))
    with torch.no_grad():
        model(tokens())
    model.eval()
    assert model(tokens(), use_cache=True).past_key_values is not None
    assert len(notes(model)) == 1


def test_undo_copy_and_pickle():
    model = fastft.patch(model_of(), activation_policy=2)
    plain = run(fastft.patch(model_of()), train_step)
    twin = copy.deepcopy(model)
    run(model, train_step)
    assert len(notes(twin)) == 1
    same_bits(plain, run(twin, train_step))
    assert last(twin) == last(model) == "2 kept, 2 recomputed layers"
    assert controller_of(twin.get_base_model()) is not controller_of(model.get_base_model())
    back = pickle.loads(pickle.dumps(model))
    assert controller_of(back.get_base_model()) is None
    run(back, train_step)
    fastft.patch(model)
    assert notes(model)[0].endswith("2 layers")  # patching again without saying so changes nothing
    fastft.patch(model, activation_policy="lean")
    assert notes(model)[0].endswith("lean")
    fastft.unpatch(model)
    for m in model.modules():
        assert not m._forward_pre_hooks and not m._forward_hooks and not m._forward_hooks_always_called


def test_the_first_checkpoint_is_given_up():
    """Not only unsaved: nobody holds the embedding's rows after the forward, and the ids give them again."""
    model = checkpointed(fastft.patch(model_of(), activation_policy="lean"))
    embedding, rows = model.get_input_embeddings(), controller_of(model.get_base_model()).embedded
    plain = run(fastft.patch(model_of()), train_step)
    loss = model(tokens(), labels=tokens()).loss
    assert rows.mine.last is not None and rows.mine.last[0]() is None
    loss.backward()
    model.zero_grad(set_to_none=True)
    same_bits(plain, run(model, train_step))

    ids = tokens().clone()
    loss = model(ids, labels=ids).loss
    ids[0, 0] += 1
    with pytest.raises(RuntimeError, match="token ids or the frozen embedding were changed in place"):
        loss.backward()
    assert not embedding.weight.requires_grad


@pytest.mark.parametrize("who", ["hook on the embedding", "hook on its output", "hook within the layer", "trained"])
def test_the_first_input_is_kept_for_whoever_wants_its_gradient(who):
    model = checkpointed(fastft.patch(model_of(), activation_policy="lean"))
    seen, embedding = [], model.get_input_embeddings()
    if who == "hook on the embedding":
        embedding.register_forward_hook(lambda m, args, out: seen.append(out))
    elif who.startswith("hook"):
        layer = model.get_base_model().model.layers[0]
        (layer if "output" in who else layer.input_layernorm).register_forward_pre_hook(
            lambda m, args: args[0].register_hook(seen.append) and None
        )
    else:
        embedding.weight.requires_grad_()
    run(model, train_step)
    found = embedding.weight.grad if who == "trained" else seen[0].grad if who == "hook on the embedding" else seen[-1]
    assert found is not None and found.abs().sum() > 0


def test_several_stacks_share_the_memory():
    from transformers import T5Config, T5ForConditionalGeneration

    def make():
        torch.manual_seed(0)
        config = T5Config(
            vocab_size=48,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=3,
            num_heads=4,
            dropout_rate=0.1,
            decoder_start_token_id=0,
        )
        return T5ForConditionalGeneration(config).train()

    plain = run(fastft.patch(make()), train_step)
    for policy in ("lean", "offload", 1, "auto"):
        model = fastft.patch(make(), activation_policy=policy)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        controller = controller_of(model)
        assert len(controller.stacks) == 2 and sum(s.share for s in controller.stacks) == pytest.approx(1)
        same_bits(plain, run(model, train_step))
        assert all(s.last for s in controller.stacks)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler looks at it
def test_compiled_training_keeps_its_own_checkpointing():
    torch._dynamo.reset()
    make = lambda: BASES["dense"](config={"layers": 1}, dropout=0.2, r=4)
    plain = run(fastft.patch(make()), train_step)
    model = checkpointed(fastft.patch(make(), activation_policy="lean"))
    compiled = torch.compile(model, backend="aot_eager")
    ids = tokens()
    compiled(input_ids=ids, labels=ids).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        k[2:] for k in plain if k.startswith("d ")
    }


def test_fast_model_takes_a_policy(tmp_path):
    llama(layers=N).save_pretrained(tmp_path)
    load = functools.partial(fastft.FastModel.from_pretrained, tmp_path)
    assert notes(load())[0] == "activation policy auto"
    assert notes(load(activation_policy="8GiB"))[0] == "activation policy auto within 8 GiB"
    with pytest.raises(PolicyError, match="want one of"):
        load(activation_policy="quick")
