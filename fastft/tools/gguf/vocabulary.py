"""Tokenizer and chat template as GGUF's metadata, from tokenizer.json alone.

Two kinds: byte-level BPE ("gpt2" there), whose pre-tokenizer needs a name; and SentencePiece's BPE with byte fallback
("llama" there), whose scores follow from the order of the merges."""

from __future__ import annotations

import json
import re
from typing import Any

from fastft.errors import ExportError
from fastft.tools.gguf.pre_tokenizers import pre_tokenizer_name

STRIPPING = re.compile("phi-?3", re.IGNORECASE)
SPACE = "\u2581"  # SentencePiece's
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # GGUF's token types


def add_vocabulary(writer: Any, tokenizer: Any, rows: int, stops: list[int]) -> list[str]:
    """Write it; returns what a user should know of it, one line each.

    Args:
        writer: gguf's GGUFWriter.
        tokenizer: a fast tokenizer of transformers.
        rows: of the embedding; names are made up for those without a token.
        stops: ids that end an answer.
    Raises:
        ExportError: a tokenizer that llama.cpp cannot run, with the reason."""
    whole = description(tokenizer)
    model = whole["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"export: llama.cpp's tokenizers here are BPE, got {model.get('type') or type(tokenizer).__name__}: use "
            "--to merged"
        )
    notes = []
    by_id = {i: t for t, i in model["vocab"].items()}
    added = {a["id"]: a for a in whole.get("added_tokens", ())}
    if (most := max([*by_id, *added])) >= rows:
        raise ExportError(
            f"export: the tokenizer has ids up to {most}, the embedding {rows} rows: resize the embeddings before "
            "training, or take the tokenizer that was trained with"
        )
    if model.get("byte_fallback"):
        types, scores = _sentencepiece(writer, whole, by_id, rows)
        writer.add_token_scores(scores)
    else:
        notes += _byte_level(writer, whole)
        types = [NORMAL if i in by_id else UNUSED for i in range(rows)]
        writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(rows)]
    for i, a in added.items():
        tokens[i] = a["content"]
        types[i] = CONTROL if a["special"] else USER_DEFINED
    unknown = model.get("unk_token")
    if unknown is not None and unknown in model["vocab"]:
        types[model["vocab"][unknown]] = UNKNOWN
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_specials(writer, tokenizer, stops)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        writer.add_chat_template(
            template if isinstance(template, str) else [{"name": n, "template": t} for n, t in template.items()]
        )
    return notes


def model_name(name: str, tokenizer: Any) -> str:
    """`name` as the file may say it: by a certain name llama.cpp knows tokenizers whose special tokens swallow the
    space after them, and wants four tokens of theirs; others must not have it."""
    added = tokenizer.added_tokens_decoder.values()
    theirs = {"<unk>", "<s>", "</s>", "<|endoftext|>"} <= tokenizer.get_vocab().keys()
    if any(t.rstrip for t in added) and theirs:
        return name if STRIPPING.search(name) else f"phi-3 {name}"
    return STRIPPING.sub("phi 3", name)


def description(tokenizer: Any) -> dict[str, Any]:
    """tokenizer.json as the tokenizer runs now."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ExportError(
            f"export: want a tokenizer with tokenizer.json, got {type(tokenizer).__name__}: load it with "
            "AutoTokenizer(use_fast=True) and save it"
        )
    return json.loads(backend.to_str())


def _steps(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    if part is None:
        return []
    return [q for p in part[inside] for q in _steps(p, inside)] if part["type"] == "Sequence" else [part]


def _byte_level(writer: Any, whole: dict[str, Any]) -> list[str]:
    notes, model = [], whole["model"]
    for step in _steps(whole.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise ExportError(f"export: llama.cpp does not normalise text by {step['type']}: use --to merged")
        notes.append("text that is not in Unicode's NFC is normalised by transformers, and not by llama.cpp")
    for trait in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(trait):
            raise ExportError(f"export: llama.cpp has no {trait} in BPE, this tokenizer has {model[trait]!r}")
    if not any(p["type"] == "ByteLevel" for p in _steps(whole.get("pre_tokenizer"), "pretokenizers")):
        raise ExportError("export: llama.cpp's BPE is byte-level or has byte fallback, this tokenizer has neither")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_name(whole.get("pre_tokenizer"), bool(model.get("ignore_merges"))))
    return notes


def _sentencepiece(writer: Any, whole: dict[str, Any], by_id: dict[int, str], rows: int) -> tuple[list, list]:
    prefix = False
    for step in [
        *_steps(whole.get("normalizer"), "normalizers"),
        *_steps(whole.get("pre_tokenizer"), "pretokenizers"),
    ]:
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            prefix = True
        elif step["type"] == "Metaspace" and step["replacement"] == SPACE:
            prefix = step.get("prepend_scheme", "always") != "never"
        elif step["type"] == "Split" and step["pattern"] == {"String": " "}:
            pass  # no space is left to split at
        elif step["type"] != "Replace" or step["pattern"] != {"String": " "} or step["content"] != SPACE:
            raise ExportError(f"export: llama.cpp's SentencePiece tokenizer has no {step['type']}: use --to merged")
    rank: dict[str, int] = {}
    for i, merge in enumerate(whole["model"]["merges"]):
        a, b = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(a + b, i)
    is_byte = lambda t: len(t) == 6 and t.startswith("<0x") and t.endswith(">")
    types = [UNUSED if i not in by_id else BYTE if is_byte(by_id[i]) else NORMAL for i in range(rows)]
    last = len(rank) + 1
    scores = [-float(rank.get(by_id.get(i, ""), last)) for i in range(rows)]
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_add_space_prefix(prefix)
    return types, scores


def _add_specials(writer: Any, tokenizer: Any, stops: list[int]) -> None:
    """Ids of special tokens, and which of them an encoding begins and ends with."""
    plain, dressed = tokenizer("a", add_special_tokens=False).input_ids, tokenizer("a").input_ids
    at = next((i for i in range(len(dressed)) if dressed[i : i + len(plain)] == plain), None)
    before, after = (None, None) if at is None else (dressed[:at], dressed[at + len(plain) :])
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise ExportError(
            f"export: llama.cpp adds a beginning and an end of text at most, this tokenizer makes {dressed} of {plain}"
        )
    writer.add_add_bos_token(bool(before))
    writer.add_add_eos_token(bool(after))
    for name in ("bos", "eos", "pad", "unk"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    others = [s for s in stops if s != tokenizer.eos_token_id]
    for token, add in zip(others, (writer.add_eot_token_id, writer.add_eom_token_id)):
        add(token)
