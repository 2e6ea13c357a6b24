"""DPO's other references, and SFT on the assistant's words alone: twenty steps, judged against stock. No logits in SFT,
DPO and KTO."""

import pytest
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from fastft_kernels.lm_head import tiles as head_tiles
from tests.trainers import harness as h
from tests.trainers.rollouts import Wide

STEPS = 20
MARKED = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


def test_dpo_with_a_reference_model(folder, tmp_path, tmp_path_factory):
    """Another model than the one that trains, patched or not as the user left it: here it is stock."""
    other = h.checkpoint(tmp_path_factory.mktemp("reference"), seed=1)

    def make(way):
        reference = h.load(other, "reference" if way == "reference" else "stock", lora=False)
        args = h.arguments(DPOConfig, tmp_path, STEPS, max_length=40)
        return DPOTrainer(
            model=h.load(folder, way),
            ref_model=reference,
            args=args,
            train_dataset=h.preferences(),
            processing_class=h.tokenizer(),
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)


@pytest.mark.parametrize("four_bit", [False, True], ids=["dense", "nf4"])
def test_dpo_with_precomputed_reference_log_probabilities(folder, tmp_path, four_bit):
    def make(way):
        args = h.arguments(DPOConfig, tmp_path, STEPS, max_length=40, precompute_ref_log_probs=True)
        return DPOTrainer(
            model=h.load(folder, way, four_bit=four_bit),
            args=args,
            train_dataset=h.preferences(),
            processing_class=h.tokenizer(),
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)


def test_sft_on_the_assistant_alone(folder, tmp_path):
    say = lambda role, i: {"role": role, "content": h.TEXTS[i % 24]}
    rows = [
        {"messages": [say("user", i), say("assistant", i + 5), say("user", i + 9), say("assistant", i + 2)]}
        for i in range(24)
    ]

    def make(way):
        tokenizer = h.tokenizer().__class__.from_pretrained(folder)
        tokenizer.chat_template = MARKED
        args = h.arguments(SFTConfig, tmp_path, STEPS, max_length=64, assistant_only_loss=True)
        return SFTTrainer(
            model=h.load(folder, way), args=args, train_dataset=h.Dataset.from_list(rows), processing_class=tokenizer
        )

    verdict = h.judged(make)
    assert verdict, str(verdict)


def unpaired():
    return h.Dataset.from_list(
        [{"prompt": h.TEXTS[i], "completion": " " + h.TEXTS[(i + 5) % 24], "label": i % 2 == 0} for i in range(24)]
    )


@pytest.mark.parametrize(
    ("config", "trainer", "data"),
    [(SFTConfig, SFTTrainer, h.pairs), (DPOConfig, DPOTrainer, h.preferences), (KTOConfig, KTOTrainer, unpaired)],
)
def test_no_logits_of_many_tokens_exist(tmp_path, monkeypatch, config, trainer, data):
    monkeypatch.setattr(head_tiles, "VOCAB_TILE", 128)
    folder, rows = h.checkpoint(tmp_path / "wide", vocab=515), {}
    for way in ("stock", "fastft"):
        args = h.arguments(config, tmp_path, 2, max_length=40)
        made = trainer(model=h.load(folder, way), args=args, train_dataset=data(), processing_class=h.tokenizer())
        with Wide(made.model) as seen:
            made.train()
        rows[way] = seen.rows
    assert rows["fastft"] == 0 < rows["stock"], rows
