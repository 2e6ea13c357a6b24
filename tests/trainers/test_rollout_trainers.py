"""GRPO and RLOO: generation inside the loop, a reward in Python; judged against stock, on fastft's head, and no logits
are made."""

import pytest
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

import fastft
from fastft.lm_head import trl_head
from tests.trainers import harness as h
from tests.trainers.rollouts import PROMPTS, Rollouts, Wide, reward

STEPS = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return h.checkpoint(tmp_path_factory.mktemp("model"))


KL = (GRPOConfig, GRPOTrainer, dict(beta=0.1, num_iterations=2, steps_per_generation=1, temperature=0.9))
RLOO = (
    RLOOConfig,
    RLOOTrainer,
    dict(num_iterations=2, per_device_train_batch_size=2, gradient_accumulation_steps=4, normalize_advantages=True),
)


def online(folder, tmp_path, config, trainer, settings, rollouts, steps=STEPS, four_bit=False):
    def make(way):
        more = dict(dict(per_device_train_batch_size=8, num_generations=4, max_completion_length=8), **settings)
        args = h.arguments(config, tmp_path, steps, **more)
        model = h.load(folder, way, four_bit=four_bit)
        made = trainer(
            model=model, reward_funcs=reward, args=args, train_dataset=PROMPTS, processing_class=h.tokenizer()
        )
        return rollouts.follow(made, "_generate_single_turn", way) if rollouts else made

    return make


@pytest.mark.parametrize(
    ("config", "trainer", "settings", "four_bit"),
    [(GRPOConfig, GRPOTrainer, {}, False), (*KL, False), (*KL, True), (*RLOO, False), (*RLOO, True)],
    ids=["grpo", "grpo-kl", "grpo-kl-nf4", "rloo", "rloo-nf4"],
)
def test_rewarded(folder, tmp_path, config, trainer, settings, four_bit):
    rollouts = Rollouts()
    verdict = h.judged(online(folder, tmp_path, config, trainer, settings, rollouts, four_bit=four_bit))
    rollouts.check()
    assert verdict, str(verdict)


@pytest.mark.parametrize(("config", "trainer", "settings"), [KL, RLOO], ids=["grpo-kl", "rloo"])
def test_on_fastfts_head_without_logits(tmp_path, monkeypatch, config, trainer, settings):
    from fastft_kernels.lm_head import tiles as head_tiles

    widths, real = [], trl_head.linear_logprob
    monkeypatch.setattr(
        trl_head, "linear_logprob", lambda hidden, *a, **k: (widths.append(hidden.shape[-1]), real(hidden, *a, **k))[1]
    )
    monkeypatch.setattr(head_tiles, "VOCAB_TILE", 128)
    prove = trl_head.prove

    def uncounted(*args):
        """A proof's calls are no pass of the training's; whether there is one depends on the tests before."""
        before = len(widths)
        proof = prove(*args)
        del widths[before:]
        return proof

    monkeypatch.setattr(trl_head, "prove", uncounted)
    folder = h.checkpoint(tmp_path / "wide", vocab=515)
    rows, steps = {}, 4
    for way in ("stock", "fastft"):
        made = online(folder, tmp_path, config, trainer, settings, None, steps=steps)(way)
        with Wide(made.model) as seen:
            made.train()
        rows[way] = seen.rows
    report = fastft.report(made.model)
    assert {r.kind: r.kernel for r in report.swapped}["fused head"] == "linear_logprob" and not report.fallbacks, report
    passes = steps * made.args.gradient_accumulation_steps
    rollouts = steps // settings.get("num_iterations", 1) * made.args.gradient_accumulation_steps
    scored = (made.beta != 0) + (made.num_iterations > 1)  # by the reference, and by the policy that drew them
    assert widths.count(h.SIZES["hidden_size"]) == passes + scored * rollouts
    assert rows["fastft"] <= 8 < rows["stock"], (
        f"8 sequences make the logits of one position each as they are drawn, training none: {rows}"
    )
