"""What TRL's own tests of SFT and DPO put a trainer through, in the same outcomes with a patched model: the parameters
that learn are the same ones, what is logged has the same names, what raises raises the same. (How near the numbers are
is judged in the other files here.)"""

import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, set_seed
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import fastft
from fastft.patching.patcher import record_of
from fastft.tools.run.first_step import PatchOnFirstStep
from fastft.tools.run.runner import Patcher
from tests.trainers import harness as h

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: "
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m['content'] }}{% endif %}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
SIZES = dict(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
)
EXPERTS = dict(
    moe_intermediate_size=16,
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
)
FAMILIES = {
    "qwen2": {},
    "cohere2": {},
    "olmo3": {},
    "lfm2": dict(layer_types=["conv", "full_attention"]),
    "qwen3_moe": EXPERTS,
    "gpt_oss": dict(head_dim=8, **EXPERTS),
    "glm4_moe": dict(first_k_dense_replace=1, head_dim=8, **EXPERTS),
}


def tokenizer():
    t = h.tokenizer().__class__(
        tokenizer_object=h.tokenizer().backend_tokenizer,
        unk_token="<unk>",
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
    )
    t.chat_template = TEMPLATE
    return t


def folder(tmp, family="qwen2"):
    where = tmp / family
    if not (where / "config.json").exists():
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, vocab_size=320, pad_token_id=1, bos_token_id=2, eos_token_id=3, **{**SIZES, **FAMILIES[family]}
        )
        AutoModelForCausalLM.from_config(config).save_pretrained(where)
        tokenizer().save_pretrained(where)
    return str(where)


def chat(*texts):
    return [{"role": role, "content": t} for role, t in zip(["user", "assistant"] * 4, texts)]


def rows(kind, n=9):
    a, b, c = (
        (lambda i: h.TEXTS[i % 24]),
        (lambda i: " " + h.TEXTS[(i * 5 + 3) % 24]),
        (lambda i: " " + h.TEXTS[(i * 7 + 2) % 24]),
    )
    make = {
        "text": lambda i: {"text": a(i)},
        "messages": lambda i: {"messages": chat(a(i), b(i))},
        "pairs": lambda i: {"prompt": a(i), "completion": b(i)},
        "chat pairs": lambda i: {"prompt": chat(a(i)), "completion": [{"role": "assistant", "content": b(i)}]},
        "ids": lambda i: {"input_ids": [4 + (i + j) % 200 for j in range(5 + i)]},
        "preference": lambda i: {"prompt": a(i), "chosen": b(i), "rejected": c(i)},
        "implicit": lambda i: {"chosen": a(i) + b(i), "rejected": a(i) + c(i)},
        "chat preference": lambda i: {
            "prompt": chat(a(i)),
            "chosen": [{"role": "assistant", "content": b(i)}],
            "rejected": [{"role": "assistant", "content": c(i)}],
        },
    }[kind]
    return Dataset.from_list([make(i) for i in range(n)])


@dataclass
class Case:
    """trainer: sft or dpo; data: a kind of rows; the rest as TRL's tests give it."""

    trainer: str
    data: str = ""
    settings: dict | None = None
    peft: Callable | None = None
    family: str = "qwen2"
    model: Callable | None = None  # folder -> what the trainer gets; by default the folder's name
    keywords: Callable | None = None  # folder -> more keywords of the trainer
    act: Callable = lambda trainer: trainer.train()
    streaming: bool = False


LORA = LoraConfig
EVAL = dict(eval_strategy="steps", eval_steps=2)
NF4 = lambda dtype: BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_use_double_quant=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
)
load = lambda where, **settings: AutoModelForCausalLM.from_pretrained(where, **{"dtype": "float32", **settings})
held_out = lambda kind: lambda where: {"eval_dataset": rows(kind, 3)}
two_held_out = lambda kind: lambda where: {"eval_dataset": {"a": rows(kind, 3), "b": rows(kind, 3)}}
experts = lambda: LoraConfig(target_parameters=["mlp.experts.down_proj", "mlp.experts.gate_up_proj"])
virtual = dict(task_type="CAUSAL_LM", num_virtual_tokens=4)


def its_own_outputs(outputs, labels, num_items_in_batch=None):
    assert outputs.logits.shape[-1] == 320
    return outputs.loss


def whole_rows(prediction):
    assert prediction.predictions.shape[-1] == 320
    return {"mine": 0.5}


def twice(trainer):
    trainer.train()
    trainer.evaluate()


def precomputed_too_late(trainer):
    trainer.train()
    trainer.evaluate(eval_dataset=rows("preference", 3))


SFT = {
    **{f"train {f}": Case("sft", "text", family=f) for f in FAMILIES},
    **{f"data {d}": Case("sft", d) for d in ("messages", "pairs", "chat pairs", "ids")},
    "a model": Case("sft", "text", model=load),
    "dft": Case("sft", "text", dict(loss_type="dft", learning_rate=0.1, **EVAL), keywords=held_out("text")),
    "formatting": Case(
        "sft", "implicit", keywords=lambda w: {"formatting_func": lambda e: f"{e['chosen']} {e['rejected']}"}
    ),
    "fp16": Case("sft", "text", dict(model_init_kwargs={"dtype": torch.float16}, learning_rate=0.1)),
    "bf16 weights": Case("sft", "text", dict(model_init_kwargs={"dtype": torch.bfloat16}, learning_rate=0.1)),
    "lora": Case("sft", "text", peft=LORA),
    "lora, a peft model": Case("sft", "text", model=lambda w: get_peft_model(load(w), LoraConfig())),
    "lora, all layers, dropout": Case(
        "sft", "text", peft=lambda: LoraConfig(target_modules="all-linear", lora_dropout=0.1)
    ),
    "lora on experts": Case("sft", "text", family="gpt_oss", peft=experts),
    "lora on the head": Case("sft", "text", peft=lambda: LoraConfig(target_modules=["q_proj", "lm_head"])),
    "prompt tuning": Case(
        "sft", "text", dict(gradient_checkpointing=False), peft=lambda: PromptTuningConfig(**virtual)
    ),
    "prefix tuning": Case(
        "sft", "text", dict(gradient_checkpointing=False), peft=lambda: PrefixTuningConfig(**virtual)
    ),
    "prompt encoder": Case(
        "sft",
        "text",
        dict(gradient_checkpointing=False),
        peft=lambda: PromptEncoderConfig(encoder_hidden_size=16, **virtual),
    ),
    "prompt encoder, checkpointed": Case("sft", "text", peft=lambda: PromptEncoderConfig(**virtual)),
    "prompt encoder, a peft model": Case(
        "sft", "text", model=lambda w: get_peft_model(load(w), PromptEncoderConfig(**virtual))
    ),
    "reentrant": Case("sft", "text", dict(gradient_checkpointing_kwargs={"use_reentrant": True})),
    "reentrant lora": Case("sft", "text", dict(gradient_checkpointing_kwargs={"use_reentrant": True}), peft=LORA),
    "not checkpointed": Case("sft", "text", dict(gradient_checkpointing=False)),
    "streaming": Case("sft", "text", streaming=True),
    "packing bfd": Case("sft", "text", dict(packing=True, packing_strategy="bfd", max_length=10)),
    "packing wrapped": Case("sft", "text", dict(packing=True, packing_strategy="wrapped", max_length=10)),
    "padding-free": Case("sft", "text", dict(padding_free=True, max_length=None)),
    "assistant only": Case("sft", "messages", dict(assistant_only_loss=True)),
    "assistant only, streaming": Case("sft", "messages", dict(assistant_only_loss=True), streaming=True),
    "completion only": Case("sft", "chat pairs", dict(completion_only_loss=True)),
    "both only": Case("sft", "chat pairs", dict(completion_only_loss=True, assistant_only_loss=True)),
    "evaluated": Case("sft", "text", EVAL, keywords=held_out("text")),
    "two evaluations": Case("sft", "text", EVAL, keywords=two_held_out("text")),
    "evaluate alone": Case("sft", "text", act=lambda t: t.evaluate(eval_dataset=rows("text", 3))),
    "best model": Case(
        "sft", "text", dict(metric_for_best_model="eval_mean_token_accuracy", **EVAL), keywords=held_out("text")
    ),
    "metrics": Case("sft", "text", EVAL, keywords=lambda w: {**held_out("text")(w), "compute_metrics": whole_rows}),
    "a loss of the user's": Case("sft", "text", keywords=lambda w: {"compute_loss_func": its_own_outputs}),
    "label smoothing": Case("sft", "text", dict(label_smoothing_factor=0.1)),
    "predict": Case("sft", "text", act=lambda t: t.predict(t.train_dataset)),
    "quantised": Case(
        "sft",
        "text",
        dict(learning_rate=0.1),
        peft=LORA,
        keywords=lambda w: {"quantization_config": NF4(torch.bfloat16)},
    ),
    "no data": Case("sft"),
    "eos token": Case("sft", "text", dict(eos_token="<s>")),
    "neftune": Case("sft", "text", dict(neftune_noise_alpha=5.0)),
    "offloaded activations": Case("sft", "text", dict(activation_offloading=True, gradient_checkpointing=False)),
    "accumulated": Case("sft", "text", dict(gradient_accumulation_steps=2)),
    "in bf16": Case("sft", "text", dict(bf16=True), peft=LORA),
}
LOSSES = [
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]
DPO = {
    **{f"train {f}": Case("dpo", "preference", family=f) for f in FAMILIES},
    **{f"data {d}": Case("dpo", d) for d in ("implicit", "chat preference")},
    **{
        f"loss {x}": Case(
            "dpo",
            "preference",
            dict(loss_type=x, label_smoothing=1e-3 if x == "exo_pair" else 0.0, **EVAL),
            keywords=held_out("preference"),
        )
        for x in LOSSES
    },
    "three losses": Case("dpo", "preference", dict(loss_type=["sigmoid", "bco_pair", "sft"])),
    "a model": Case("dpo", "preference", model=load),
    "wpo": Case("dpo", "preference", dict(use_weighting=True)),
    "ld": Case("dpo", "preference", dict(ld_alpha=0.5)),
    **{
        f"divergence {x}": Case("dpo", "preference", dict(f_divergence_type=x))
        for x in ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
    },
    "a reference": Case("dpo", "preference", keywords=lambda w: {"ref_model": load(w)}),
    "a reference that follows": Case("dpo", "preference", dict(sync_ref_model=True, ref_model_sync_steps=2)),
    "precomputed": Case(
        "dpo", "preference", dict(precompute_ref_log_probs=True), keywords=held_out("preference"), act=twice
    ),
    "precomputed too late": Case("dpo", "preference", dict(precompute_ref_log_probs=True), act=precomputed_too_late),
    "fp16": Case("dpo", "preference", dict(model_init_kwargs={"dtype": torch.float16})),
    "lora": Case("dpo", "preference", dict(learning_rate=1.0), peft=LORA),
    "lora, a peft model": Case(
        "dpo", "preference", dict(learning_rate=1.0), model=lambda w: get_peft_model(load(w), LoraConfig())
    ),
    "lora on experts": Case("dpo", "preference", family="gpt_oss", peft=experts),
    "lora on experts, a peft model": Case(
        "dpo", "preference", family="gpt_oss", model=lambda w: get_peft_model(load(w), experts())
    ),
    "lora on the head": Case("dpo", "preference", peft=lambda: LoraConfig(target_modules=["q_proj", "lm_head"])),
    "not checkpointed": Case("dpo", "preference", dict(gradient_checkpointing=False)),
    "streaming": Case("dpo", "preference", streaming=True),
    "padding-free": Case("dpo", "preference", dict(padding_free=True)),
    "evaluate alone": Case("dpo", "preference", act=lambda t: t.evaluate(eval_dataset=rows("preference", 3))),
    "two evaluations": Case("dpo", "preference", EVAL, keywords=two_held_out("preference")),
    "metrics": Case(
        "dpo",
        "preference",
        EVAL,
        keywords=lambda w: {**held_out("preference")(w), "compute_metrics": lambda p: {"mine": 0.5}},
    ),
    "quantised": Case("dpo", "preference", peft=LORA, model=lambda w: load(w, quantization_config=NF4(torch.float16))),
}
CASES = {**{f"sft: {k}": c for k, c in SFT.items()}, **{f"dpo: {k}": c for k, c in DPO.items()}}


def outcome(case: Case, tmp, way: str) -> dict:
    """What TRL's tests look at, of one run. way: stock; patch: the trainer's model is patched when the trainer is
    there; run: as `fastft run`."""
    config, trainer_class = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[case.trainer]
    set_seed(0)
    where = folder(tmp, case.family)
    common = dict(
        output_dir=str(tmp / "out"),
        report_to="none",
        max_steps=3,
        per_device_train_batch_size=3,
        save_strategy="no",
        logging_steps=1,
    )
    common |= dict(disable_tqdm=True, bf16=False, use_cpu=True, learning_rate=0.1)
    data = rows(case.data) if case.data else None
    found: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            settings = {**common, **(case.settings or {})}
            if settings.get("metric_for_best_model"):
                settings.pop("save_strategy")
                settings |= dict(save_strategy="steps", save_steps=2, load_best_model_at_end=True)
            trainer = trainer_class(
                model=case.model(where) if case.model else where,
                args=config(**settings),
                processing_class=tokenizer(),
                train_dataset=data.to_iterable_dataset() if case.streaming else data,
                **({"peft_config": case.peft()} if case.peft else {}),
                **(case.keywords(where) if case.keywords else {}),
            )
            if way == "patch":
                fastft.patch(trainer.model)
            before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
            complaints: list[str] = []
            with PatchOnFirstStep(
                Patcher() if way == "run" else lambda m: None, lambda m: None, complaints.append
            ) as watch:
                case.act(trainer)
            assert not complaints and not watch.left(), (complaints, watch.left())
            if way == "run" and trainer.state.global_step:
                assert record_of(trainer.model) is not None
        except Exception as e:
            if isinstance(e, AssertionError):
                raise
            found["raised"] = f"{type(e).__name__}: {re.sub('0x[0-9a-f]+', '', str(e))[:200]}"
            return found
    found["learnt"] = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    found["kept"] = set(before) - found["learnt"]
    found["dtypes"] = {n: p.dtype for n, p in trainer.model.named_parameters()}
    found["logged"] = [
        sorted(k for k in line if "time" not in k and "per_second" not in k and "runtime" not in k)
        for line in trainer.state.log_history
    ]
    found["finite"] = [math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line]
    found["tags"] = sorted(getattr(trainer.model, "model_tags", None) or [])
    return found


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    return cache(lambda name: outcome(CASES[name], tmp_path_factory.mktemp("stock"), "stock"))


def ways():
    """Every case once, one way and the other in turn; the rest takes minutes."""
    for i, name in enumerate(CASES):
        for way in ("patch", "run"):
            marks = [] if way == ("patch", "run")[i % 2] else [pytest.mark.slow]
            yield pytest.param(name, way, marks=marks, id=f"{name} [{way}]")


@pytest.mark.parametrize(("name", "way"), list(ways()))
def test_the_outcome_is_stocks(stock, tmp_path, name, way):
    theirs, ours = stock(name), outcome(CASES[name], tmp_path, way)
    differs = {
        what: (theirs.get(what), ours.get(what))
        for what in sorted(set(theirs) | set(ours))
        if ours.get(what) != theirs.get(what)
    }
    assert not differs, sorted(differs)
