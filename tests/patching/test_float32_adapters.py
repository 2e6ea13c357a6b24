"""Adapters of a 4-bit model in TRL's trainer with fp16=True: float32 at the first step, as a card without bfloat16
needs.

fp16 wants a GPU: stood for here by the CPU's own autocast and gradient scaler, put where Accelerate keeps those of a
GPU. The CPU's scaler takes bfloat16 gradients, a GPU's does not: so the dtype of every gradient is looked at when the
scaler gets it."""

import copy
import pickle

import pytest
import torch
from accelerate.state import AcceleratorState
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

import fastft
from fastft.patching import float32_adapters
from fastft.patching.float32_adapters import Float32Adapters
from fastft.tools.run.runner import run_patched
from tests.trainers import harness as h


class ByHand(TrainerCallback):
    """What a stock script writes."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        for p in model.parameters():
            if p.requires_grad:
                p.data = p.data.float()


class Scaler(torch.amp.GradScaler):
    """Takes no bfloat16, as a GPU's."""

    def unscale_(self, optimizer):
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p.grad is not None and p.grad.dtype != torch.float32:
                raise ValueError(f"a gradient in {p.grad.dtype}")
        super().unscale_(optimizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def forget():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def trainer_of(model, out, steps=4, callbacks=(), fp16=True, **settings):
    """An SFTTrainer of a model that TRL has rounded, as with fp16=True on a GPU."""
    args = h.arguments(SFTConfig, out, steps, max_length=32, optim="adamw_torch", learning_rate=1e-2, **settings)
    trainer = SFTTrainer(
        model=model, args=args, train_dataset=h.pairs(), processing_class=h.tokenizer(), callbacks=list(callbacks)
    )
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.bfloat16}, "TRL rounds no more"
    if fp16:
        trainer.accelerator.scaler = Scaler("cpu", init_scale=2.0**8)
        trainer.accelerator.native_amp = True
        AcceleratorState()._mixed_precision = "fp16"
    return trainer


def losses(trainer):
    return torch.tensor([e["loss"] for e in trainer.state.log_history if "loss" in e], dtype=torch.float64)


def close(ours, stock):
    """Within what float16 rounds; and something was learnt."""
    a, b = losses(ours), losses(stock)
    return len(b.unique()) == 4 and float((a - b).abs().max()) < 8 * torch.finfo(torch.float16).eps * float(b.max())


def dtypes(model):
    return {p.dtype for p in model.parameters() if p.requires_grad}


def notes(model):
    return [line for line in fastft.report(model).notes if "gradient scaler" in line]


def test_stock_fails_and_fastft_trains_as_stock_by_hand(folder, tmp_path):
    with pytest.raises(ValueError, match="bfloat16"):
        trainer_of(h.load(folder, "stock", four_bit=True), tmp_path).train()
    stock = trainer_of(h.load(folder, "stock", four_bit=True), tmp_path, callbacks=[ByHand()])
    stock.train()
    model = h.load(folder, "fastft", four_bit=True)
    proven = {id(o.proof) for o in model.get_base_model()._fastft_record.outcomes.values()}
    assert not notes(model)
    ours = trainer_of(model, tmp_path)
    ours.train()
    assert dtypes(model) == {torch.float32}
    assert len(notes(model)) == 1 and notes(model)[0].startswith(f"{sum(p.requires_grad for p in model.parameters())} ")
    assert {id(o.proof) for o in model.get_base_model()._fastft_record.outcomes.values()} == proven, "proven again"
    assert close(ours, stock)
    again = trainer_of(model, tmp_path, steps=1)  # a second training, rounded a second time
    again.train()
    assert dtypes(model) == {torch.float32}


def test_a_run_that_is_resumed(folder, tmp_path):
    whole = trainer_of(h.load(folder, "fastft", four_bit=True), tmp_path, save_strategy="steps", save_steps=2)
    whole.train()
    AcceleratorState._reset_state(reset_partial_state=True)
    rest = trainer_of(h.load(folder, "fastft", four_bit=True), tmp_path)
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    kept = [v for s in rest.optimizer.optimizer.state.values() for v in s.values() if v.dim()]
    assert kept and {v.dtype for v in kept} == {torch.float32}
    assert dtypes(rest.model) == {torch.float32}
    AcceleratorState._reset_state(reset_partial_state=True)
    stock = trainer_of(h.load(folder, "stock", four_bit=True), tmp_path, callbacks=[ByHand()])
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert close(rest, stock)


def test_fastft_run(folder, tmp_path, capsys):
    kept = []

    def script():
        kept.append(h.load(folder, "stock", four_bit=True))
        trainer_of(kept[0], tmp_path, steps=2).train()

    assert run_patched(script) == 0
    assert dtypes(kept[0]) == {torch.float32}
    assert "gradient scaler" in " ".join(capsys.readouterr().out.split())
    assert notes(kept[0])


@pytest.mark.parametrize("how", ["no scaler", "a bfloat16 loop", "evaluation"])
def test_others_are_left_alone(folder, tmp_path, how):
    model = h.load(folder, "fastft", four_bit=True)
    if how == "no scaler":
        trainer_of(model, tmp_path, steps=1, fp16=False).train()
    else:
        for p in model.parameters():
            p.data = p.data.bfloat16() if p.requires_grad else p.data
        ids = torch.arange(5, 17)[None]
        model.train(how != "evaluation")
        with torch.autocast("cpu", torch.bfloat16 if how == "a bfloat16 loop" else torch.float16):
            model(input_ids=ids, labels=ids)
    assert dtypes(model) == {torch.bfloat16} and not notes(model)


def test_a_loop_of_ones_own(folder):
    """And a model that is not quantised is not watched; copies and pickles are; unpatch takes the hook off."""
    model = h.load(folder, "fastft", four_bit=True).train()
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.requires_grad else p.data
    other = copy.deepcopy(model)
    ids = torch.arange(5, 17)[None]
    with torch.autocast("cpu", torch.float16):
        model(input_ids=ids, labels=ids).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert dtypes(other) == {torch.bfloat16}
    with torch.autocast("cpu", torch.float16):
        other(input_ids=ids, labels=ids)
    assert dtypes(other) == {torch.float32}
    hooks = lambda m: [k for x in m.modules() for k in x._forward_pre_hooks.values() if isinstance(k, Float32Adapters)]
    assert hooks(model) and pickle.loads(pickle.dumps(hooks(model)[0]))(model, (1,)) == (1,)
    assert not hooks(fastft.unpatch(model))
    assert not hooks(h.load(folder, "fastft"))


def test_under_ddp_a_line_says_what_to_write(folder, monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    model = h.load(folder, "stock", four_bit=True).train()
    for p in model.parameters():
        p.data = p.data.bfloat16() if p.requires_grad else p.data
    hook = Float32Adapters(model.get_base_model())
    with torch.autocast("cpu", torch.float16):
        with pytest.warns(UserWarning, match=r"before train\(\), write"):
            hook(model)
        hook(model)  # once: a second warning would be an error
    assert dtypes(model) == {torch.bfloat16}
    assert float32_adapters.TOO_LATE.count("\n") == 0
