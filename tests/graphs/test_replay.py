"""Replayed and eager training agree in every bit."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fastft
from fastft.graphs.recorder import RerunRecorder
from tests.graphs.graph_models import differing, eager, graphs_of, loss_of, patched, replays, train, with_graphs
from tests.linear.lora_models import ALL, BASES, drawn, llama, tokens
from tests.trainers import harness as h

STEPS = 20
N = 3


def same(step=None, before=None, least=0.7, **how):
    """Train with and without graphs; returns the model with."""
    more = {k: v for k, v in {"step": step, "before": before}.items() if v is not None}
    plain = train(patched(False, **how), **more)
    model = patched(True, **how)
    assert not differing(plain, train(model, **more))
    assert replays(model) >= least * graphs_of(model).stack.seen, (replays(model), graphs_of(model).stack.eager)
    return model


@pytest.mark.parametrize("policy", [None, "lean", "full", 2], ids=str)
@pytest.mark.parametrize("base", BASES)
def test_every_step(base, policy):
    model = same(base=base, policy=policy)
    assert replays(model) == (STEPS - 2) * N and not eager(model)


def test_a_policy_that_is_chosen_at_each_forward():
    """As on a GPU by default, where a trainer checkpoints: the split of a shape is decided, and then remembered."""

    def under(graphs):
        model = patched(graphs, policy="999GiB")
        model.gradient_checkpointing_enable({"use_reentrant": False})
        return model

    model = under(True)
    assert not differing(train(under(False), steps=6), train(model, steps=6))
    assert replays(model) >= 2 * N, graphs_of(model).stack.eager
    assert any("3 kept" in n for n in fastft.report(model).notes), fastft.report(model).notes


@pytest.mark.parametrize("policy", [None, "lean"])
def test_where_the_captured_code_runs_again(policy):
    plain, model = patched(False, policy=policy), with_graphs(patched(False, policy=policy), RerunRecorder())
    assert not differing(train(plain, steps=6), train(model, steps=6))
    assert replays(model) == 4 * N


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype):
    plain, model = (fastft.patch(BASES["dense"](dtype, config={"layers": N})) for _ in range(2))
    assert not differing(train(plain), train(with_graphs(model)))
    assert replays(model) == (STEPS - 2) * N


def test_under_autocast():
    def step(model, i):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, i)
        loss.backward()
        return {"loss": loss}

    assert not eager(same(step))


def test_full_fine_tuning():
    plain, model = (fastft.patch(llama(layers=N)) for _ in range(2))
    assert not differing(train(plain), train(with_graphs(model)))
    assert replays(model) == (STEPS - 2) * N


def test_accumulation():
    def step(model, i):
        losses = []
        for j in range(3):
            loss = loss_of(model, 10 * i + j)
            (loss / 3).backward()
            losses.append(loss)
        return {"loss": torch.stack([loss.detach() for loss in losses])}

    same(step, least=0.6)


def test_two_adapters_take_turns():
    def step(model, i):
        if "other" not in model.peft_config:
            model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules=ALL, task_type="CAUSAL_LM"))
            drawn(model)
        model.set_adapter("other" if i % 3 else "default")
        loss = loss_of(model, i)
        loss.backward()
        return {"loss": loss}

    model = same(step)
    assert len([s for s in graphs_of(model).seen if s.captured is not None]) == 2


def test_evaluation_and_generation_between_steps():
    def before(model, i):
        with torch.no_grad():
            model.eval()
            loss_of(model, i)
            model(input_ids=tokens(1, 5)).logits.sum()
            if i == 9:
                model.generate(input_ids=tokens(), max_new_tokens=3, do_sample=False)
            model.train()

    model = same(before=before, least=0.25)
    assert replays(model) == (STEPS - 2) * N


def test_masks_of_padded_rows_and_several_lengths():
    def step(model, i):
        ids = tokens(2, 8 + 2 * (i % 2), seed=i)
        mask = torch.ones_like(ids)
        mask[0, : 1 + i % 3] = 0
        loss = model(input_ids=ids, labels=ids, attention_mask=mask).loss
        loss.backward()
        return {"loss": loss}

    plain = train(fastft.patch(BASES["dense"](config={"layers": N}), unpad=False), step)
    model = with_graphs(fastft.patch(BASES["dense"](config={"layers": N}), unpad=False))
    assert not differing(plain, train(model, step))
    assert replays(model) == (STEPS - 4) * N


def test_rows_without_their_padding():
    def step(model, i):
        ids = tokens(2, 8, seed=i)
        mask = torch.ones_like(ids)
        mask[0, 5 + i % 2 :] = 0
        loss = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100), attention_mask=mask).loss
        loss.backward()
        return {"loss": loss}

    model = same(step)
    assert any("without padding" in n or "tokens" in n for n in fastft.report(model).notes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


def sentences(n=24):
    """Of one length, so that calls repeat."""
    words = [w for w in dict.fromkeys(h.WORDS) if len(h.tokenizer()(f" {w}")["input_ids"]) == 1]
    text = lambda i, k: " " + " ".join(words[(i * 3 + j * k) % len(words)] for j in range(6))
    return [{"prompt": text(i, 1), "chosen": text(i, 2), "rejected": text(i, 3)} for i in range(n)]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_dpo(folder, tmp_path, checkpointing):
    """Two rows a pair, and the reference by switching the adapter off."""
    made = []

    def make(way):
        model = h.load(folder, "fastft")
        made.append(with_graphs(model) if way == "graphs" else model)
        args = h.arguments(DPOConfig, tmp_path, STEPS, max_length=40, gradient_checkpointing=checkpointing)
        return DPOTrainer(
            model=model, args=args, train_dataset=Dataset.from_list(sentences()), processing_class=h.tokenizer()
        )

    plain = h.run(make, "fastft")
    assert not differing(plain, h.run(make, "graphs"))
    assert replays(made[-1]) >= (STEPS - 3) * 2, graphs_of(made[-1]).stack.eager


def test_sft(folder, tmp_path):
    made = []

    def make(way):
        model = h.load(folder, "fastft", four_bit=True)
        made.append(with_graphs(model) if way == "graphs" else model)
        args = h.arguments(SFTConfig, tmp_path, STEPS, max_length=32, gradient_checkpointing=True)
        rows = [{"text": r["prompt"] + r["chosen"]} for r in sentences()]
        return SFTTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=h.tokenizer())

    plain = h.run(make, "fastft")
    assert not differing(plain, h.run(make, "graphs"))
    assert replays(made[-1]) >= (STEPS - 3) * 2, graphs_of(made[-1]).stack.eager
