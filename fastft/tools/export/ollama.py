"""--to ollama: the GGUF and a Modelfile. Ollama does not run a Jinja chat template: its own language is Go's, so the
template is rewritten. What stands before and after each role's text is read off rendered conversations, and the
Modelfile's text, read back, has to render every conversation as the Jinja template does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastft.errors import ExportError, ProofError
from fastft.tools.export import prompts
from fastft.tools.export.source import ExportSource
from fastft.tools.export.stages import Stages
from fastft.tools.gguf.families import context_length, family_of

PARAMETERS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}  # transformers' names -> Ollama's
USUAL_CONTEXT = 4096  # Ollama's
SYSTEM, USER, ASSISTANT, LAST = "Qsystemq", "Quserq", "Qassistantq", "Qlastq"
ELSEWHERE = "use --to gguf, whose chat template llama.cpp runs as it is"


@dataclass(frozen=True)
class ChatParts:
    """What stands around each role's text. head: before a conversation without a system text; system, or None where
    the template takes none; joiner: after a system text that is put into the first user's turn; answer: after the
    last turn."""

    head: str
    user: tuple[str, str]
    assistant: tuple[str, str]
    system: tuple[str, str] | None
    joiner: str | None
    answer: str


def add_modelfile(source: ExportSource, folder: Path, figures: dict[str, Any], stages: Stages) -> dict[str, Any]:
    """The Modelfile beside the GGUF that `figures` name; its notes are added there. Returns its part of the proof."""
    tokenizer, config = source.tokenizer(), source.config
    context = context_length(family_of(config), config)
    with stages.stage("writing the Modelfile and reading it back"):
        notes, found = write_modelfile(
            folder, figures["file"], tokenizer, source.generation(), source.stops(tokenizer), context
        )
    for note in notes:
        stages.say(f"note: {note}")
    figures["notes"] += notes
    return {"modelfile": found} if found else {}


def write_modelfile(
    folder: Path, file: str, tokenizer: Any, generation: dict[str, Any], stops: list[int], context: int
) -> tuple[list[str], dict[str, Any]]:
    """Write folder/Modelfile for the GGUF `file`, and hold it against the tokenizer's template.

    Returns:
        what a user should know, one line each; figures for export.json.
    Raises:
        ExportError: a chat template that Ollama's language does not hold.
        ProofError: the Modelfile renders a conversation in another way."""
    lines, notes, figures = [f"FROM ./{file}"], [], {}
    if tokenizer.chat_template:
        template, notes = go_template(tokenizer)
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(s)}"' for s in stops]
    lines += [f"PARAMETER {name} {generation[key]}" for key, name in PARAMETERS.items() if generation.get(key)]
    if context < USUAL_CONTEXT:
        lines.append(f"PARAMETER num_ctx {context}")
    (folder / "Modelfile").write_text("\n".join(lines) + "\n")
    if tokenizer.chat_template:
        figures = check_modelfile(folder / "Modelfile", tokenizer)
    return notes, figures


def go_template(tokenizer: Any) -> tuple[str, list[str]]:
    """The chat template in Ollama's language, and notes. ExportError where it has no such form."""
    parts, notes = _parts(tokenizer)
    turns = []
    begin = ""
    if parts.head:
        begin = "{{ if not .System }}" + _plain(parts.head) + "{{ end }}"
    into_user = ""
    if parts.joiner is not None:
        begin += '{{ $first := "" }}'
        turns.append(("system", "{{ $first = .Content }}"))
        into_user = "{{ if $first }}{{ $first }}" + _plain(parts.joiner) + '{{ $first = "" }}{{ end }}'
    elif parts.system is not None:
        turns.append(("system", "{{ .Content }}".join(map(_plain, parts.system))))
    turns.append(("user", f"{_plain(parts.user[0])}{into_user}{{{{ .Content }}}}{_plain(parts.user[1])}"))
    turns.append(("assistant", "{{ .Content }}".join(map(_plain, parts.assistant))))
    told = "{{ else".join(f' if eq .Role "{role}" }}}}{text}' for role, text in turns)
    return f"{begin}{{{{ range .Messages }}}}{{{{{told}{{{{ end }}}}{{{{ end }}}}{_plain(parts.answer)}", notes


def _plain(text: str) -> str:
    if "{{" in text or "}}" in text or '"""' in text or text.endswith('"'):
        raise ExportError(f"export: a Modelfile cannot hold {text[:40]!r} of the chat template: {ELSEWHERE}")
    return text


def _render(tokenizer: Any, talk: list[dict[str, str]]) -> str | None:
    """A conversation without the beginning of text that Ollama puts there; None where the template refuses it."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError):  # `raise_exception`, and expressions that do not hold
        return None
    bos = tokenizer.bos_token
    return text.removeprefix(bos) if bos and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] else text


def _parts(tokenizer: Any) -> tuple[ChatParts, list[str]]:
    say = lambda role, text: {"role": role, "content": text}
    one = _render(tokenizer, [say("user", USER)])
    three = _render(tokenizer, [say("user", USER), say("assistant", ASSISTANT), say("user", LAST)])
    told = _render(tokenizer, [say("system", SYSTEM), say("user", USER)])
    first, whole = _cut(one, USER), _cut(three, USER, ASSISTANT, LAST)
    if first is None or whole is None:
        raise ExportError(f"export: the chat template does not hold each message once, in order: {ELSEWHERE}")
    (before, after), (again, turn, back, end) = first, whole
    if before != again or after != end:
        raise ExportError(f"export: the chat template changes a turn by what comes later: {ELSEWHERE}")
    opening = before if back.endswith(before) else _alike(before[::-1], back[::-1])[::-1]
    closing = _alike(turn, after)
    system, joiner, notes = None, None, []
    head = before[: len(before) - len(opening)]
    if (parts := _cut(told, SYSTEM, USER)) is None:
        notes.append("the chat template has no place for a system text; Ollama drops it")
    elif parts[1].endswith(opening):
        system = parts[0], parts[1][: len(parts[1]) - len(opening)]
    elif parts[0] == before:
        joiner = parts[1]
    else:
        raise ExportError(f"export: the chat template puts a system text where Ollama cannot: {ELSEWHERE}")
    found = ChatParts(
        head,
        (opening, closing),
        (turn[len(closing) :], back[: len(back) - len(opening)]),
        system,
        joiner,
        after[len(closing) :],
    )
    return found, notes


def _cut(text: str | None, *words: str) -> list[str] | None:
    """What stands before, between and after the words, each of which is there once and in this order."""
    found = []
    for word in words:
        if text is None or text.count(word) != 1:
            return None
        before, text = text.split(word)
        found.append(before)
    return [*found, text or ""]


def _alike(a: str, b: str) -> str:
    """What they begin with alike."""
    return a[: next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))]


def check_modelfile(path: Path, tokenizer: Any) -> dict[str, Any]:
    """ProofError where the Modelfile's template, as the subset of Go's language that is written here reads, renders a
    conversation in another way than the tokenizer's. Texts come without spaces at their ends, which Ollama cannot
    trim."""
    found = re.search(r'^TEMPLATE """(.*?)"""$', path.read_text(), flags=re.M | re.S)
    if found is None:
        raise ProofError("export: the Modelfile has no template; nothing is published")
    count = 0
    for talk in prompts.conversations():
        talk = [{**m, "content": m["content"].strip()} for m in talk]
        ours = _render(tokenizer, talk)
        if ours is None:
            continue
        theirs = render_go(found[1], talk)
        if theirs != ours:
            raise ProofError(
                f"export: the first stage that differs is the chat template: {len(talk)} messages are {ours[:80]!r} in "
                f"transformers and {theirs[:80]!r} by the Modelfile; nothing is published"
            )
        count += 1
    return {"compared": count, "equal": count}


def render_go(template: str, messages: list[dict[str, str]]) -> str:
    """A template of the form that `go_template` writes, rendered as Go's text/template does."""
    pieces = re.split(r"\{\{(.*?)\}\}", template)
    variables = {"$first": "", ".System": "".join(m["content"] for m in messages if m["role"] == "system")}
    out: list[str] = []

    def holds(condition: str, message: dict[str, str]) -> bool:
        if condition.startswith("eq .Role "):
            return message["role"] == condition.removeprefix("eq .Role ").strip('"')
        return not variables[condition.removeprefix("not ")] if condition.startswith("not ") else bool(
            variables[condition]
        )  # fmt: skip

    def walk(at: int, message: dict[str, str], run: bool) -> int:
        """From the piece after an action to the `else` or `end` that closes it."""
        while at < len(pieces):
            if run:
                out.append(pieces[at])
            if at + 1 == len(pieces):
                return at + 1
            action, at = pieces[at + 1].strip(), at + 2
            if action == "end" or action.startswith("else"):
                return at - 1
            if action.startswith("range"):
                start, stop = at, walk(at, message, False)
                for m in messages if run else ():
                    walk(start, m, True)
                at = stop + 1
            elif action.startswith("if "):
                at = branch(action.removeprefix("if "), at, message, run)
            elif ":=" in action or " = " in action:
                name, value = re.split(r" :?= ", action)
                if run:
                    variables[name] = message["content"] if value == ".Content" else value.strip('"')
            elif run:
                out.append(message["content"] if action == ".Content" else variables[action])
        return at

    def branch(condition: str, at: int, message: dict[str, str], run: bool) -> int:
        done = False
        while True:
            takes = run and not done and (condition == "" or holds(condition, message))
            closing = walk(at, message, takes)
            done, at = done or takes, closing + 1
            action = pieces[closing].strip()
            if action == "end":
                return at
            condition = action.removeprefix("else").strip().removeprefix("if ").strip()

    walk(0, {"role": "", "content": ""}, True)
    return "".join(out)
