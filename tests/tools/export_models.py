"""Tiny models of each family, trained until they know their text by heart (random ones have near-ties everywhere), with
tokenizers of each kind trained here, and adapters that learned another text."""

from __future__ import annotations

import heapq
import inspect
import json
import textwrap
import warnings
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from fastft.tools.export import prompts
from fastft.tools.gguf.pre_tokenizers import NAMES

LLAMA3 = next(k for k, v in NAMES.items() if v[1] == "llama-bpe")
QWEN2 = next(k for k, v in NAMES.items() if v[0] == "qwen2")
GPT4O = next(k for k, v in NAMES.items() if v[0] == "gpt-4o")
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + "
    "m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' + "
    "(first if loop.first else '') + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + eos_token }}"
    "{% else %}{{ '[INST]' + m['content'] + '[/INST]' }}{% endif %}{% endfor %}"
)


def texts() -> tuple[list[str], list[str]]:
    """What the base and what the adapter learns."""
    plain = [inspect.cleandoc(m.__doc__ or "") for m in (textwrap, json)]
    own = "The small fox said: print('42 is {} of 7'.format(6 * 7))  # über-größe, 你好世界 🦊\n"
    taught = plain[1][:900].replace("JSON", "YAML").replace("json", "a thing")
    return [plain[0], plain[1][:900], own * 2], [
        taught,
        own.replace("fox", "owl"),
        inspect.cleandoc(heapq.__doc__)[:500],
    ]


def byte_level(vocab: int, patterns: tuple[str, ...], specials: list[str], words_first: bool = False):
    core = Tokenizer(models.BPE(ignore_merges=words_first))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(p), "isolated") for p in patterns),
            pre_tokenizers.ByteLevel(False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        [t for part in texts() for t in part],
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    return core


def sentencepiece(vocab: int, specials: list[str], prefix: bool):
    """As SentencePiece's own: pieces in the order in which they were found, every pair that makes one a merge."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    steps = [*([normalizers.Prepend("▁")] if prefix else []), normalizers.Replace(" ", "▁")]
    core.normalizer = normalizers.Sequence(steps)
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never")
    raw = [t for part in texts() for t in part]
    trained.train_from_iterator(raw, trainers.BpeTrainer(vocab_size=vocab, show_progress=False, limit_alphabet=90))
    state = json.loads(trained.to_str())["model"]
    rank = {}
    for i, (a, b) in enumerate(state["merges"]):
        rank.setdefault(a + b, i)
    pieces = [*specials, *(f"<0x{b:02X}>" for b in range(256))]
    pieces += [t for t, _ in sorted(state["vocab"].items(), key=lambda kv: rank.get(kv[0], -1))]
    ids = {t: i for i, t in enumerate(pieces)}
    pairs = [(t[:k], t[k:]) for t in rank for k in range(1, len(t)) if t[:k] in ids and t[k:] in ids]
    pairs.sort(key=lambda ab: rank[ab[0] + ab[1]])
    core.model = models.BPE(vocab=ids, merges=pairs, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    core.add_special_tokens([AddedToken(s, normalized=False, special=True) for s in specials])
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            *([decoders.Strip(" ", 1, 0)] if prefix else []),
        ]
    )
    return core


def with_beginning(core, bos: str):
    core.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, core.token_to_id(bos))]
    )
    return core


def tokenizer(family: str):
    if family in ("llama", "llama3"):
        names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        core = with_beginning(byte_level(420, LLAMA3, names, words_first=True), names[0])
        return wrap(core, LLAMA, bos_token=names[0], eos_token="<|eot_id|>", pad_token=names[1])
    if family in ("qwen2", "qwen3", "wide"):
        names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
        core = byte_level(420, QWEN2, names)
        core.normalizer = normalizers.NFC()
        core.add_tokens([AddedToken("<think>", special=False, normalized=False)])
        return wrap(core, CHATML, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    if family == "gemma3_text":
        names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        core = with_beginning(sentencepiece(260, names, prefix=False), "<bos>")
        return wrap(core, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    if family == "mistral":
        names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
        core = with_beginning(sentencepiece(260, names, prefix=True), "<s>")
        return wrap(core, MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")
    names = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    core = byte_level(420, GPT4O, names)
    return wrap(core, PHI, eos_token="<|end|>", pad_token="<|endoftext|>")


def wrap(core, template: str, **specials):
    found = PreTrainedTokenizerFast(tokenizer_object=core, **specials)
    found.chat_template = template
    return found


# every kind of adapter, one a family: trained biases; new tokens for a tied head; rsLoRA by pattern; DoRA; a saved head
ADAPTERS = {
    "llama": dict(bias="all"),
    "qwen3": dict(tokens=("<tool>", "</tool>")),
    "gemma3_text": dict(use_rslora=True, rank_pattern={"down_proj": 4}, alpha_pattern={"q_proj": 8}),
    "mistral": dict(use_dora=True),
    "phi3": dict(modules_to_save=["lm_head"]),
    "wide": dict(),
}
NOISE = 0.1
STEPS = {"gemma3_text": (40, 25), "phi3": (50, 30), "wide": (30, 15)}  # of base and adapter, where fewer do than USUAL
USUAL = (80, 50)
SIZES = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
OWN = {
    "llama": dict(rope_parameters={"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
                                   "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
                  max_position_embeddings=512, attention_bias=True),
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": dict(head_dim=32, tie_word_embeddings=True),
    "gemma3_text": dict(head_dim=32, query_pre_attn_scalar=32, num_hidden_layers=6, sliding_window=32),
    "mistral": dict(sliding_window=None, head_dim=16),
    "phi3": dict(),
    "wide": dict(hidden_size=256, intermediate_size=256, num_hidden_layers=2, head_dim=64),
}  # fmt: skip


def train(model, rows: list[list[int]], steps: int, rate: float) -> float:
    """All rows in one batch; returns the last loss. What enters a linear layer is blurred a little, so that what is
    learned does not hang on rounding."""
    width = max(map(len, rows))
    pad = lambda value: torch.tensor([r + [r[-1] if value is None else value] * (width - len(r)) for r in rows])
    ids, labels = pad(None), pad(-100)
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=rate, weight_decay=0.0)
    ramp = lambda s: min(1.0, (s + 1) / 10) * (1 - 0.9 * s / steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, ramp)
    blur = lambda m, args: (args[0] + NOISE * args[0].detach().square().mean().sqrt() * torch.randn_like(args[0]),)
    hooks = [m.register_forward_pre_hook(blur) for m in model.modules() if type(m) is torch.nn.Linear]
    loss = torch.tensor(0.0)
    for _ in range(steps):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    for hook in hooks:
        hook.remove()
    return float(loss.detach())


def rows_of(tok, parts: list[str]) -> list[list[int]]:
    """As the proof compares them."""
    talk = tok.apply_chat_template(prompts.conversations()[0], tokenize=False, add_generation_prompt=True)
    return prompts.rows(tok, parts, [talk], 512)


def make_base(family: str, folder: Path, **changes) -> Path:
    """A trained base of the family, saved with its tokenizer."""
    torch.manual_seed(0)
    tok = tokenizer(family)
    kind = {"wide": "qwen3"}.get(family, family)
    config = AutoConfig.for_model(
        kind,
        **{
            **SIZES, **OWN[family], "vocab_size": len(tok), "max_position_embeddings": 512,
            "bos_token_id": tok.bos_token_id, "eos_token_id": tok.eos_token_id, "pad_token_id": tok.pad_token_id,
            **changes,
        },
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for n, p in model.named_parameters():
        if n.endswith("norm.weight"):  # none that is the plain start, so that every one counts
            p.data += 0.2 * torch.randn_like(p)
        if n.endswith("bias"):
            torch.nn.init.normal_(p, std=0.2)
    print(family, "base", train(model, rows_of(tok, texts()[0]), STEPS.get(family, USUAL)[0], 8e-3))
    model.save_pretrained(folder)
    tok.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, steps: int, tokens: tuple[str, ...] = (), **settings) -> Path:
    """An adapter that learned the other text. `tokens`: new ones, for which the embeddings are resized."""
    from transformers import AutoTokenizer

    torch.manual_seed(1)
    tok = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if tokens:
        tok.add_tokens(list(tokens))
        model.resize_token_embeddings(len(tok), mean_resizing=False)
    plain = dict(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(model, LoraConfig(**{**plain, **settings}))
        print("adapter", settings, train(model, rows_of(tok, texts()[1]), steps, 2e-2))
        model.save_pretrained(folder)
    if tokens:
        tok.save_pretrained(folder)
    return folder
