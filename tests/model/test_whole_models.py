"""What a whole model is given and how it is built: masks, positions, attention implementations, classification heads,
generation. Patched against stock: loss, logits and every gradient, judged."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification

import fastft
from tests.linear.lora_models import (
    ALL,
    BASES,
    adapted,
    both,
    dense,
    drawn,
    gradients,
    groups_of,
    llama,
    run,
    tokens,
    train_step,
)

ROWS, N = 3, 10


def batch():
    return tokens(ROWS, N)


def stepped(**inputs):
    """One step on a batch of three rows, with what `inputs` add."""
    return lambda model: train_step(model, batch(), **inputs)


CONFIGS = {
    "head_dim of its own": dict(head_dim=16),
    "scaled rotary": dict(
        rope_parameters={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
            "rope_theta": 1e4,
        }
    ),
    "yarn": dict(
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "rope_theta": 1e4}
    ),
    "dynamic": dict(
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, max_position_embeddings=8
    ),
    "tied": dict(tie_word_embeddings=True),
    "biases": dict(attention_bias=True, mlp_bias=True),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_settings_of_the_model(name):
    both(lambda: dense(config=CONFIGS[name]), stepped())


def test_eager_attention_with_dropout():
    """Its dropout is stock's, between q, k, v and o that are not: the same masks, and the random stream stands where
    stock leaves it."""
    make = lambda: dense(config=dict(attn_implementation="eager", attention_dropout=0.3))
    ours = both(make, stepped())
    drawn_next = lambda model: {"loss": stepped()(model)["loss"], "after": torch.rand(3)}
    assert torch.equal(run(ours, drawn_next)["after"], run(make(), drawn_next)["after"])
    logits = lambda model: {"logits": model(batch()).logits.detach()}
    assert not torch.equal(run(ours, logits)["logits"], run(ours.eval(), logits)["logits"])


@pytest.mark.parametrize(("start", "to"), [("sdpa", "eager"), ("eager", "sdpa")], ids="-".join)
def test_attention_switched_later(start, to):
    model = both(
        lambda: dense(config=dict(attn_implementation=start)),
        stepped(),
        after=lambda m: m.get_base_model().set_attn_implementation(to),
    )
    assert model.get_base_model().config._attn_implementation == to


def causal(rows, n):
    return torch.ones(n, n, dtype=torch.bool).tril()[None, None].expand(rows, 1, n, n)


LEFT = torch.tensor([[0] * 4 + [1] * 6, [1] * 10, [0] * 1 + [1] * 9])
DOCUMENTS = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2]]).repeat(ROWS, 1)
INPUTS = {
    "padded on the left": dict(attention_mask=LEFT),
    "padded on the right": dict(attention_mask=LEFT.flip(1)),
    "4-D boolean mask": dict(
        attention_mask=causal(ROWS, N) & LEFT.bool()[:, None, None, :] | torch.eye(N, dtype=torch.bool)
    ),
    "4-D additive mask": dict(
        attention_mask=torch.zeros(ROWS, 1, N, N).masked_fill(~causal(ROWS, N), torch.finfo(torch.float32).min)
    ),
    "explicit positions": dict(position_ids=(torch.arange(N) * 3 + 1).repeat(ROWS, 1)),
    "packed positions": dict(position_ids=DOCUMENTS),
    "one row of positions for all": dict(position_ids=torch.arange(5, 5 + N)[None]),
    "logits_to_keep and shifted labels": dict(shift_labels=tokens(ROWS, N).roll(-1, 1)),
    "items in the batch": dict(num_items_in_batch=17),
    "embeddings given": None,
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", INPUTS)
def test_inputs_of_the_model(name, base):
    def embedded(model):
        rows = model.get_input_embeddings().weight.detach()[batch()].clone().requires_grad_()
        out = model(inputs_embeds=rows, labels=batch())
        out.loss.backward()
        return {"loss": out.loss.detach(), "logits": out.logits.detach(), "d rows": rows.grad, **gradients(model)}

    both(BASES[base], embedded if INPUTS[name] is None else stepped(**INPUTS[name]))


def classifier():
    config = llama().config
    config.num_labels = 3
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(config)
    for p in model.parameters():
        if p.dim() == 2:
            torch.nn.init.normal_(p, std=0.15)
    return drawn(get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=ALL, task_type="SEQ_CLS"))).train()


def test_sequence_classification():
    """The score head is a copy that learns (PEFT saves it whole); padding decides which token is read."""

    def step(model):
        out = model(
            input_ids=batch().masked_fill(LEFT.flip(1) == 0, 0),
            attention_mask=LEFT.flip(1),
            labels=torch.tensor([0, 2, 1]),
        )
        out.loss.backward()
        return {"loss": out.loss.detach(), "logits": out.logits.detach(), **gradients(model)}

    model = both(classifier, step)
    assert any("score.modules_to_save.default" in n for n in gradients(model)) and len(groups_of(model)) >= 8


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cache", [True, False], ids=["cached", "without-cache"])
def test_generation_of_left_padded_rows(cache, base):
    """The tokens of stock, for a batch as for each of its rows alone."""
    settings = dict(max_new_tokens=6, do_sample=False, use_cache=cache, pad_token_id=0)
    stock, ours = BASES[base]().eval(), fastft.patch(BASES[base]().eval())
    ids = batch().masked_fill(LEFT == 0, 0)
    with torch.no_grad():
        expected = stock.generate(input_ids=ids, attention_mask=LEFT, **settings)
        assert torch.equal(ours.generate(input_ids=ids, attention_mask=LEFT, **settings), expected)
        for i, row in enumerate(LEFT.bool()):
            alone = ours.generate(input_ids=ids[i : i + 1, row], **settings)
            new = alone[0, row.sum() :]
            # alone it may end earlier
            assert torch.equal(new, expected[i, N : N + len(new)]) and not expected[i, N + len(new) :].any()


def test_sampling_draws_stocks_tokens():
    stock, ours = dense().eval(), fastft.patch(dense().eval())
    found = []
    for model in (stock, ours):
        torch.manual_seed(3)
        found.append(
            model.generate(
                input_ids=batch(), max_new_tokens=8, do_sample=True, temperature=1.3, top_k=7, pad_token_id=0
            )
        )
    assert torch.equal(*found)


def test_a_model_adapted_in_evaluation_mode_is_patched_alike():
    assert [r.kernel for r in fastft.report(fastft.patch(adapted(llama()).eval()))] == [
        r.kernel for r in fastft.report(fastft.patch(adapted(llama())))
    ]
