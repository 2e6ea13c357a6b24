"""Padded batches run without their padding: the same loss and gradients as stock's padded run, for the work of the real
tokens."""

import contextlib
import warnings

import pytest
import torch
from datasets import Dataset
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    SFTConfig,
    SFTTrainer,
)

import fastft
from benchmarks.fake import FORMULAS
from fastft.packing.batch import Labels, unpadded
from tests.linear.lora_models import gradients, in_float64, judge, nf4, run, same_bits
from tests.packing import packing_models as pm
from tests.trainers import harness as h


def unpad_notes(model):
    return [n for n in fastft.report(model).notes if "unpadded" in n]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("family", list(pm.FAMILIES))
def test_unpadded_training_is_stock_s_padded_training(family, left):
    batch = pm.step(pm.padded_batch(pm.documents(), left))
    stock, ours = pm.build(family, lora=True), fastft.patch(pm.build(family, lora=True), activation_policy="lean")
    judge(run(ours, batch), run(in_float64(stock), batch, reference=True), run(stock, batch))
    assert unpad_notes(ours) == ["1 padded batches ran unpadded: 36 of 60 tokens (60%)"]


def test_whole_model_and_first_step_guard():
    batch = pm.step(pm.padded_batch(pm.documents()))
    stock, ours = pm.build("full"), fastft.patch(pm.build("full"), activation_policy="auto")
    judge(run(ours, batch), run(in_float64(stock), batch, reference=True), run(stock, batch))
    assert unpad_notes(ours)


def test_four_bits_under_autocast():
    """The adapters' gradients are as near to the padded run in float64 as stock's, over four batches."""

    def results(model):
        out = {}
        for i in range(4):
            batch = pm.padded_batch([d % 48 for d in pm.documents(seed=i)])
            with torch.autocast("cpu", torch.bfloat16) if not model_is_true(model) else contextlib.nullcontext():
                loss = model(**batch).loss
            loss.backward()
            out |= {f"loss ({i})" if i else "loss": loss.detach().float()}
        return out | {f"d {n}": p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model_is_true = lambda m: next(p for p in m.parameters() if p.requires_grad).dtype == torch.float64
    stock = nf4()
    ours = fastft.patch(nf4())
    judge(run(ours, results), run(in_float64(stock), results, reference=True), run(stock, results))
    assert unpad_notes(ours)


def test_without_labels_the_padding_is_stock_s_too():
    batch = pm.padded_batch(pm.documents())
    model, plain = fastft.patch(pm.build("full")), fastft.patch(pm.build("full"), unpad=False)
    del batch["labels"]
    assert torch.equal(model(**batch).logits + 0, plain(**batch).logits + 0)
    assert torch.equal(model.model(**batch).last_hidden_state, plain.model(**batch).last_hidden_state)
    assert not unpad_notes(model) and len(fastft.report(model).fallbacks) >= 2


@pytest.mark.parametrize(
    "way", ["label", "left label", "holes", "floats", "dropout", "hidden", "cache", "embedding", "token types"]
)
def test_what_must_stay_padded_is_stock_s_and_counted(way):
    batch = pm.padded_batch(pm.documents(), left=way == "left label")
    model, plain = fastft.patch(pm.build("full", lora=True)), fastft.patch(pm.build("full", lora=True), unpad=False)
    for m in (model, plain):
        if way == "dropout":
            for d in m.modules():
                if isinstance(d, nn.ModuleDict) and "default" in d and isinstance(d["default"], nn.Identity):
                    d["default"] = nn.Dropout(0.1)
        if way == "embedding":
            m.get_input_embeddings().register_forward_hook(lambda mod, args, out: out / out.shape[1])
    if way == "label":
        batch["labels"][0, 10] = 5
    if way == "left label":
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    if way == "holes":
        batch["attention_mask"][1, 3] = 0
        batch["labels"][1, 3:5] = -100
    if way == "floats":
        batch["attention_mask"] = batch["attention_mask"] * 3
    if way == "hidden":
        batch["output_hidden_states"] = True
    if way == "cache":
        batch["use_cache"] = True
    if way == "token types":
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    same_bits(run(model, pm.step(batch)), run(plain, pm.step(batch)))
    assert not unpad_notes(model) and any(k.startswith("a padded batch: ") for k in fastft.report(model).fallbacks), (
        fastft.report(model).fallbacks
    )
    if way == "dropout":
        allowed = fastft.patch(model, unpad=True)
        run(allowed, pm.step(batch))
        assert unpad_notes(allowed)


def test_no_padding_and_evaluation_are_stock_bit_for_bit():
    ours, plain = fastft.patch(pm.build("full")), fastft.patch(pm.build("full"), unpad=False)
    full = pm.padded_batch(pm.documents((7, 7, 7)))
    same_bits(run(ours, pm.step(full)), run(plain, pm.step(full)))
    for m in (ours, plain):
        m.eval()
    batch = pm.padded_batch(pm.documents())
    with torch.no_grad():
        assert torch.equal(ours(**batch).logits, plain(**batch).logits)
    assert not unpad_notes(ours) and not fastft.report(ours).fallbacks


def test_a_forward_whose_labels_are_not_seen_stays_padded():
    model, plain = fastft.patch(pm.build("full")), fastft.patch(pm.build("full"), unpad=False)
    batch = pm.padded_batch(pm.documents())
    for m in (model, plain):  # past the hooks of the module
        m.forward(**batch).loss.backward()
    same_bits(gradients(model), gradients(plain))
    (reason,) = fastft.report(model).fallbacks
    assert "past its hooks" in reason


def test_rows_read_one_tensor():
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1], [1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 0]])
    rows = unpadded(mask, Labels(), None, None)
    assert rows.documents.lengths == (1, 2, 2, 4)
    assert rows.index.tolist() == [8, 6, 7, 13, 14, 0, 1, 2, 3]
    x = torch.randn(5, 4, 3)
    assert torch.equal(rows.pad(rows.gather(x)), x * mask[..., None])
    assert unpadded(mask[:1], Labels(), None, None) is None


# ---- bar 4: an unchanged TRL script on padded batches with the lengths of Alpaca ----


def alpaca_like(n, seed=0):
    """Log-normal lengths, median 120, 95th percentile 320."""
    g = torch.Generator().manual_seed(seed)
    sigma = torch.log(torch.tensor(320 / 120)) / 1.645
    lengths = (
        (torch.log(torch.tensor(120.0)) + sigma * torch.randn(n, generator=g))
        .exp()
        .round()
        .clamp(8, 500)
        .int()
        .tolist()
    )
    vocab = len(h.tokenizer())
    return Dataset.from_list(
        [{"input_ids": torch.randint(4, vocab, (m,), generator=g).tolist()} for m in lengths]
    ), lengths


def counted(model, way, tmp_path, data):
    """Forward FLOPs of the attentions and MLPs in a training step of TRL's SFT."""
    if way == "fastft":
        fastft.patch(model)
    args = h.arguments(SFTConfig, tmp_path, 1, per_device_train_batch_size=16, max_length=512)
    trainer = SFTTrainer(model=model, args=args, train_dataset=data, processing_class=h.tokenizer())
    inner = trainer.compute_loss
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)

    def compute(*a, **k):
        trainer.compute_loss = inner
        with torch.enable_grad():
            inner(*a, **k)  # the proof is made here, and not counted
        with counter:
            return inner(*a, **k)

    trainer.compute_loss = compute
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    counts = counter.get_flop_counts()
    return sum(sum(v.values()) for k, v in counts.items() if k.split(".")[-1] in ("self_attn", "mlp"))


def test_bar_the_flops_of_the_layers_are_those_of_the_real_tokens(tmp_path):
    folder = h.checkpoint(tmp_path / "model")
    data, lengths = alpaca_like(16)
    padded = counted(h.load(folder, "stock", lora=False), "stock", tmp_path, data)
    model = h.load(folder, "stock", lora=False)
    ours = counted(model, "fastft", tmp_path, data)
    assert unpad_notes(model)
    c = model.config
    d = c.hidden_size // c.num_attention_heads
    linear = (
        2 * c.hidden_size * (2 * c.hidden_size + 2 * c.num_key_value_heads * d + 3 * c.intermediate_size) * sum(lengths)
    )
    attention = sum(2 * c.hidden_size * n * n for n in lengths)  # the causal half of two products
    real = c.num_hidden_layers * (linear + attention)
    assert abs(ours / real - 1) < 0.05, (ours, real)
    assert padded > 1.5 * ours


# ---- the trainers ----


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "reward"])
def test_trainers_gain_unchanged(folder, tmp_path, kind):
    seen = []
    if kind == "reward":
        folder = h.checkpoint(tmp_path / "classifier", classifier=True)

    def make(way):
        model = h.load(folder, way, classifier=kind == "reward")
        if way == "fastft":
            seen.append(model)
        config, trainer, data = {
            "sft": (SFTConfig, SFTTrainer, h.pairs()),
            "dpo": (DPOConfig, DPOTrainer, h.preferences()),
            "kto": (KTOConfig, KTOTrainer, None),
            "reward": (RewardConfig, RewardTrainer, h.preferences()),
        }[kind]
        if data is None:
            data = Dataset.from_list([{**row, "label": i % 2 == 0} for i, row in enumerate(h.pairs())])
        args = h.arguments(config, tmp_path, 6, max_length=40, per_device_train_batch_size=4)
        return trainer(model=model, args=args, train_dataset=data, processing_class=h.tokenizer())

    verdict = h.judged(make)
    assert verdict, str(verdict)
    assert unpad_notes(seen[0]), fastft.report(seen[0]).fallbacks


@pytest.mark.parametrize("kind", ["trainer", "grpo"])
def test_other_steps_run_unpadded(folder, tmp_path, kind):
    model = h.load(folder, "fastft")
    if kind == "trainer":
        g = torch.Generator().manual_seed(0)
        rows = [
            {"input_ids": (ids := torch.randint(4, 60, (n,), generator=g).tolist()), "labels": ids}
            for n in (9, 30, 14, 22)
        ]
        args = h.arguments(TrainingArguments, tmp_path, 1, per_device_train_batch_size=4)
        trainer = Trainer(
            model,
            args,
            train_dataset=Dataset.from_list(rows),
            data_collator=DataCollatorForSeq2Seq(h.tokenizer(), padding=True),
        )
        h.tokenizer().padding_side = "right"
    else:
        data = Dataset.from_list([{"prompt": t} for t in h.TEXTS[:8]])
        args = h.arguments(
            GRPOConfig,
            tmp_path,
            1,
            per_device_train_batch_size=4,
            num_generations=2,
            max_completion_length=6,
            steps_per_generation=1,
        )
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
            args=args,
            train_dataset=data,
            processing_class=h.tokenizer(),
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    h.tokenizer().padding_side = "left"
    assert unpad_notes(model), fastft.report(model).fallbacks
