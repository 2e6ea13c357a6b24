"""Mistakes, planted one at a time. Each is seen: by the proof at the capture, which then leaves the eager path, or by a
comparison of bits with eager training. The same steps without the mistake agree."""

import types

import pytest
import torch
from peft import LoraConfig

import fastft
from fastft.graphs import captured, layer, proof
from fastft.graphs.buffers import SharedBuffer, copy_into
from fastft.graphs.captured import Captured
from fastft.graphs.signature import LayerState
from fastft.graphs.stack import StackGraphs
from tests.graphs.graph_models import differing, eager, layers_of, loss_of, patched, replays, train, with_graphs
from tests.graphs.tape import TapeRecorder
from tests.linear.lora_models import ALL, dense, drawn, gradients


def unproven(monkeypatch):
    """The proof accepts whatever comes: what it would have caught must show in training."""
    judge = proof.judge

    def accepting(*args):
        judge(*args)
        return proof.Findings()

    monkeypatch.setattr(proof, "judge", accepting)
    monkeypatch.setattr(proof, "_aliases", lambda *_: False)


def not_loaded(monkeypatch):
    def load(self, tensors, turn):
        for i, (static, t) in enumerate(zip(self.statics, tensors)):
            if i != 0 or not hasattr(self, "loaded"):
                copy_into(static, t)
        self.loaded = True

    monkeypatch.setattr(Captured, "load", load)


def shared_not_filled(monkeypatch):
    fill = SharedBuffer.fill
    monkeypatch.setattr(SharedBuffer, "fill", lambda self, t, turn: None if self.version >= 0 else fill(self, t, turn))


def upstream_not_copied(monkeypatch):
    def backward(self, upstream):
        self.backward_replay()
        found = iter([t.clone() for t in self.gradients])
        return [next(found) if used else None for used in self.used]

    monkeypatch.setattr(Captured, "backward", backward)


def gradients_alias(monkeypatch):
    def backward(self, upstream):
        for static, g in zip(self.upstream, upstream):
            static.copy_(g)
        self.backward_replay()
        found = iter([t.detach() for t in self.gradients])
        return [next(found) if used else None for used in self.used]

    monkeypatch.setattr(Captured, "backward", backward)


def outputs_alias(monkeypatch):
    def forward(self):
        self.forward_replay()
        return [t.detach() for t in self.outputs]

    monkeypatch.setattr(Captured, "forward", forward)


def wrong_scaling_in_the_replay(monkeypatch):
    capture = TapeRecorder.capture

    def scaled(self, run):
        sound = capture(self, run)

        def replay():
            sound()
            for t in run.__self__.gradients[-1:] if run.__name__ == "_run_backward" else []:
                t.mul_(1 + 2**-20)

        return replay

    monkeypatch.setattr(TapeRecorder, "capture", scaled)


def varied(model, i):
    """Two micro-batches, of other mask and positions each step, and the model's last hidden state kept."""
    found = {}
    for j in range(2):
        out = model.base_model.model.model(inputs_embeds=inputs(i, j), position_ids=torch.arange(8)[None] + i)
        found[f"hidden {j}"] = out.last_hidden_state
        (out.last_hidden_state * (1 + j + i)).square().sum().backward()
    return found


def inputs(i, j):
    return torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(100 * i + j))


PLANTED = [
    not_loaded,
    shared_not_filled,
    upstream_not_copied,
    gradients_alias,
    outputs_alias,
    wrong_scaling_in_the_replay,
]


@pytest.mark.parametrize("plant", PLANTED)
def test_the_proof_catches(plant, monkeypatch):
    plain = train(patched(False), varied, 5)
    plant(monkeypatch)
    model = patched()
    assert not differing(plain, train(model, varied, 5))
    assert not replays(model), "it was proven"
    assert any("bits" in why or "static memory" in why for why in eager(model)), eager(model)


@pytest.mark.parametrize("repeats", [False, True])
def test_eager_runs_that_agree_by_chance_are_asked_again(repeats, monkeypatch):
    """A gradient that has other bits in every second replay, and in the third eager run of a capture (or in none)."""
    eager_run, backward, runs = Captured.eager, Captured.backward, []

    def noisy(found, amount):
        return [None if g is None else g + amount * (i == 0) for i, g in enumerate(found)]

    def eager_with_noise(self, tensors, upstream):
        outputs, found = eager_run(self, tensors, upstream)
        runs.append(self)
        return outputs, noisy(found, 1e-6 * (not repeats and runs.count(self) == 3))

    monkeypatch.setattr(Captured, "eager", eager_with_noise)
    monkeypatch.setattr(Captured, "backward", lambda self, upstream: noisy(backward(self, upstream), 1e-6))
    model = patched()
    train(model, steps=4)
    assert bool(replays(model)) is not repeats
    assert max(runs.count(c) for c in runs) == (proof.MOST_RUNS if repeats else 3)
    if repeats:
        assert any("has other bits in the replay" in why for why in eager(model)), eager(model)
    else:
        assert any("does not repeat itself" in note for note in fastft.report(model).notes)


@pytest.mark.parametrize("plant", [p for p in PLANTED if p is not outputs_alias])
def test_training_would_show_it(plant, monkeypatch):
    plain = train(patched(False), varied, 5)
    unproven(monkeypatch)
    sound = patched()
    assert not differing(plain, train(sound, varied, 5))
    plant(monkeypatch)
    model = patched()
    assert differing(plain, train(model, varied, 5))
    assert replays(model)


def test_training_would_show_a_hidden_state_kept_over_two_steps(monkeypatch):
    def states(model):
        kept = []
        for i in range(5):
            out = model.base_model.model.model(inputs_embeds=inputs(i, 0))
            hook = out.last_hidden_state
            hook.sum().backward()
        seen = []
        layers_of(model)[-1].register_forward_hook(lambda m, a, y: seen.append(y.detach()))
        for i in range(2):
            model.base_model.model.model(inputs_embeds=inputs(i, 1)).last_hidden_state.sum().backward()
            kept.append(seen[i].clone())
        return {f"{i}": seen[i] for i in range(2)}, {f"{i}": kept[i] for i in range(2)}

    now, then = states(patched())
    assert not differing(now, then)
    unproven(monkeypatch)
    outputs_alias(monkeypatch)
    model = patched()
    now, then = states(model)
    assert replays(model) and differing(now, then) == ["0"]


CHANGES = {
    "stale adapter": lambda m, i: m.set_adapter("other" if i >= 4 else "default"),
    "adapter switched off": lambda m, i: (
        m.base_model.disable_adapter_layers() if i == 4 else m.base_model.enable_adapter_layers()
    ),
    "changed scaling": lambda m, i: [
        layer.self_attn.q_proj.scaling.__setitem__("default", 5.0) for layer in layers_of(m) if i >= 4
    ],
    "replaced parameter": lambda m, i: i == 4 and _replace(m),
    "moved parameter": lambda m, i: i == 4 and _move(m),
    "parameter that learns from now on": lambda m, i: [
        p.requires_grad_(i >= 4) for n, p in layers_of(m)[0].mlp.named_parameters() if "default" in n
    ],
    "attribute": lambda m, i: [setattr(layer.self_attn, "scaling", 0.1) for layer in layers_of(m) if i >= 4],
    "merged": lambda m, i: m.merge_adapter() if i == 4 else m.unmerge_adapter() if i == 5 else None,
}


def _replace(model):
    for layer_ in layers_of(model):
        lora = layer_.mlp.down_proj.lora_A["default"]
        lora.weight = torch.nn.Parameter(lora.weight.detach() * 2)


def _move(model):
    for layer_ in layers_of(model):
        p = layer_.mlp.down_proj.base_layer.weight
        p.data = p.data * 2


def adapted_twice(graphs):
    model = dense(config={"layers": 3})
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=ALL, task_type="CAUSAL_LM"))
    drawn(model)
    fastft.patch(model)
    return with_graphs(model) if graphs else model


def run_changed(model, change):
    found = {}
    for i in range(8):
        change(model, i)
        loss = loss_of(model, i)
        if loss.requires_grad:
            loss.backward()
        found |= {f"{i} {k}": v for k, v in ({"loss": loss.detach()} | gradients(model)).items()}
        model.zero_grad(set_to_none=True)
    return found


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_between_steps_is_seen(name, monkeypatch):
    change = CHANGES[name]
    plain = run_changed(adapted_twice(False), change)
    model = adapted_twice(True)
    assert not differing(plain, run_changed(model, change))
    assert replays(model)
    monkeypatch.setattr(LayerState, "matches", lambda self, layer: True)  # nobody looks
    stale = adapted_twice(True)
    found = run_changed(stale, change)
    assert plain.keys() != found.keys() or differing(plain, found), name


@pytest.mark.parametrize("name", ["autocast", "deterministic"])
def test_torchs_settings_are_seen(name, monkeypatch):
    def run(model):
        found = {}
        for i in range(6):
            on = i >= 4
            with torch.autocast("cpu", torch.bfloat16, enabled=on and name == "autocast"):
                if name == "deterministic":
                    torch.use_deterministic_algorithms(on)
                try:
                    loss = loss_of(model, i)
                finally:
                    torch.use_deterministic_algorithms(False)
            loss.backward()
            found |= {f"{i} {k}": v for k, v in ({"loss": loss.detach()} | gradients(model)).items()}
            model.zero_grad()
        return found

    plain, model = run(patched(False)), patched()
    assert not differing(plain, run(model)) and replays(model) == 2 * 3
    monkeypatch.setattr(layer, "environment", lambda kind: None)
    stale = patched()
    found = run(stale)
    assert replays(stale) == 4 * 3
    assert differing(plain, found) or name == "deterministic"


def test_a_forward_between_a_forward_and_its_backward_is_seen(monkeypatch):
    """Of the same signature, and of another."""

    def run(model):
        found = {}
        for i in range(6):
            a, b = loss_of(model, i), loss_of(model, 10 + i, n=8 - 2 * (i % 2))
            b.backward()
            a.backward()
            found |= {f"{i} {k}": v for k, v in gradients(model).items()}
            model.zero_grad()
        return found

    def once_each(model):
        for i in range(3):
            for n in (8, 6):
                loss_of(model, i, n=n).backward()
        model.zero_grad()
        return run(model)

    plain, model = once_each(patched(False)), patched()
    assert not differing(plain, once_each(model)) and replays(model)
    monkeypatch.setattr(StackGraphs, "conflict", lambda self, index, sequence: "")
    monkeypatch.setattr(SharedBuffer, "is_read", lambda self: False)
    assert differing(plain, once_each(patched()))


def test_a_call_that_is_over_is_known_by_what_autograd_holds(monkeypatch):
    """A call that waits for ever would leave everything eager; one that never waits, the wrong gradients."""
    monkeypatch.setattr(captured, "weakref", types.SimpleNamespace(ref=lambda t: lambda: t))
    model = patched()
    train(model, steps=5)
    assert replays(model) <= 3
