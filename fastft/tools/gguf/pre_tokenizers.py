"""The patterns by which llama.cpp cuts a text before byte-level BPE, by the names that it has for them: tokenizer.json
says a pattern, GGUF a name. A table of the file format's own; what is chosen from it is proven on strings."""

from __future__ import annotations

from typing import Any

from fastft.errors import ExportError

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
BEFORE = r"[^\r\n\p{L}\p{N}]?"
CASED = rf"{BEFORE}{UPPER}*{LOWER}+%s|{BEFORE}{UPPER}+{LOWER}*%s|"
SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# patterns in their order -> (name where merges are always applied, name where a word in the vocabulary goes first)
NAMES: dict[tuple[str, ...], tuple[str | None, str | None]] = {
    (GPT2,): ("gpt-2", None),
    (r"\p{N}", GPT2): ("smollm", None),
    (rf"{ENGLISH}|{BEFORE}\p{{L}}+|\p{{N}}{{1,3}}|{REST}",): ("smaug-bpe", "llama-bpe"),
    (rf"{ENGLISH}|{BEFORE}\p{{L}}+|\p{{N}}|{REST}",): ("qwen2", None),
    (rf"{ENGLISH}|{BEFORE}[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",): (
        "qwen35",
        None,
    ),
    (CASED % ("", "") + r"\p{N}" + SLASH,): (None, "tekken"),
    (CASED % (f"{ENGLISH}?", f"{ENGLISH}?") + r"\p{N}{1,3}" + SLASH,): ("gpt-4o", None),
}


def pre_tokenizer_name(pre: dict[str, Any] | None, words_first: bool) -> str:
    """Args:
        pre: tokenizer.json's pre_tokenizer.
        words_first: its model's ignore_merges.
    Returns:
        llama.cpp's name for it.
    Raises:
        ExportError: no pattern that llama.cpp knows."""
    patterns = tuple(p for part in _parts(pre) for p in _patterns(part))
    always, first = NAMES.get(patterns, (None, None))
    # where all words of the vocabulary can be merged the two agree; the proof on strings says whether they do
    name = (first or always) if words_first else (always or first)
    if name is None:
        shown = " then ".join(patterns) or "none at all"
        raise ExportError(
            f"export: the tokenizer cuts text by a pattern that llama.cpp has no name for ({shown}): use --to merged"
        )
    return name


def _parts(pre: dict[str, Any] | None) -> list[dict[str, Any]]:
    if pre is None:
        return []
    return [q for p in pre["pretokenizers"] for q in _parts(p)] if pre["type"] == "Sequence" else [pre]


def _patterns(part: dict[str, Any]) -> list[str]:
    kind = part["type"]
    if kind == "Split" and part.get("behavior") == "Isolated" and not part.get("invert") and "Regex" in part["pattern"]:
        return [part["pattern"]["Regex"]]
    if kind == "Digits" and part.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "ByteLevel" and not part.get("add_prefix_space"):
        return [GPT2] if part.get("use_regex", True) else []
    return [f"a {kind} of { ({k: v for k, v in part.items() if k != 'type'}) }"]
