"""What the notebooks need to run here: a tiny model with its tokenizer and small data sets in folders, and one kernel
for all of them.

A notebook runs as a reader runs it, from its first cell to its last, but for three things: the cell tagged `install` is
left out, a cell with other parameters comes after the one tagged `parameters`, and one that prints some of its
variables comes last.

`python -m tests.notebook_support` runs all of them and commits what they print and draw to the files."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import torch
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import start_new_kernel
from PIL import Image

FOLDER = Path(__file__).parent.parent / "notebooks"
# of each notebook in CI: its data set's folder, and parameters beside SMALL
SMALL = dict(SPLIT="train", STEPS=6, BATCH=2, MAX_LENGTH=96)
RUNS = {
    "01_quickstart_sft": ("chat", dict(MAX_LENGTH=48)),
    "02_qlora_t4": ("chat", dict(MAX_LENGTH=48)),
    "03_dpo": ("preferences", dict(MAX_LENGTH=200)),
    "04_grpo": ("prompts", dict(ANSWERS=4, NEW_TOKENS=8, TARGET=12)),
    "05_prove_it_on_your_gpu": ("chat", dict(LENGTHS=[24, 48])),
    "06_export_and_chat": ("chat", dict(MAX_LENGTH=48)),
}
PICTURE_BYTES = 40_000
CHAT = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STORY = (
    "a quick brown fox jumps over the lazy dog while seven wise owls watch from their old oak tree near a river bend"
)
WORDS = STORY.split()
SENTENCES = [" ".join(WORDS[(i * 7 + j * 3) % len(WORDS)] for j in range(24 + i % 5)) for i in range(32)]


def material(folder: Path) -> Path:
    """`folder` with model/ (Qwen3, tiny, random), chat/, preferences/ and prompts/ (each a data set that `load_dataset`
    takes). Widths are multiples of 64, bitsandbytes' block: then 4 bits are right on every CPU."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    from fastft.tools.demo.model import train_tokenizer

    tokenizer = train_tokenizer(SENTENCES, 480)
    tokenizer.chat_template = CHAT
    config = Qwen3Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=256,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")

    said = lambda role, text: {"role": role, "content": text}
    pairs = [(s, SENTENCES[(i + 5) % 32], SENTENCES[(i + 11) % 32]) for i, s in enumerate(SENTENCES)]
    _write(folder / "chat", [{"messages": [said("user", q), said("assistant", a)]} for q, a, _ in pairs])
    _write(
        folder / "preferences",
        [
            {"chosen": [said("user", q), said("assistant", a)], "rejected": [said("user", q), said("assistant", b)]}
            for q, a, b in pairs
        ],
    )
    _write(folder / "prompts", [{"prompt": q[:24]} for q, _, _ in pairs])
    return folder


def _write(folder: Path, rows: list[dict]) -> None:
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def tagged(notebook: nbformat.NotebookNode, tag: str) -> list[nbformat.NotebookNode]:
    return [c for c in notebook.cells if tag in c.metadata.get("tags", [])]


@contextmanager
def kernel(folder: Path) -> Iterator[BlockingKernelClient]:
    """A running kernel; what Jupyter and the libraries write goes into `folder`. One for all notebooks: the libraries
    take longest to import."""
    where = {
        k: str(folder / k.lower())
        for k in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "HF_HOME", "MPLCONFIGDIR")
    }
    quiet = {"PYDEVD_DISABLE_FILE_VALIDATION": "1", "PYTHONWARNINGS": "ignore"}
    manager, client = start_new_kernel(cwd=str(folder), env={**os.environ, **where, **quiet})
    try:
        yield client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(
    name: str, client: BlockingKernelClient, material: Path, ask: str = "None"
) -> tuple[nbformat.NotebookNode, dict]:
    """The executed notebook, which ran in a folder of its own beside the material, and the value of `ask`, an
    expression of its variables that JSON can hold."""
    notebook, folder, (data, own) = read(name), material / name, RUNS[name]
    parameters = {**SMALL, "MODEL": "../model", "DATASET": f"../{data}", **own}
    folder.mkdir(parents=True, exist_ok=True)
    run(client, f"%reset -f\nimport os, torch\nos.chdir({str(folder)!r})\ntorch.set_num_threads(1)")
    for cell in (c for c in notebook.cells if c.cell_type == "code"):
        tags = cell.metadata.get("tags", [])
        if "install" not in tags:
            cell.outputs = run(client, cell.source)
        if "parameters" in tags:
            run(client, "\n".join(f"{k} = {v!r}" for k, v in parameters.items()))
    (answer,) = run(client, f"import json\nprint(json.dumps({ask}))")
    return notebook, json.loads(answer.text)


def run(client: BlockingKernelClient, code: str) -> list[nbformat.NotebookNode]:
    """The outputs of one cell. Raises AssertionError with the cell and the traceback that a reader would see."""
    outputs: list[nbformat.NotebookNode] = []

    def collect(message: dict) -> None:
        if message["msg_type"] in ("stream", "display_data", "execute_result", "error"):
            outputs.append(nbformat.v4.output_from_msg(message))

    reply = client.execute_interactive(code, store_history=False, allow_stdin=False, timeout=240, output_hook=collect)[
        "content"
    ]
    if reply["status"] != "ok":
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(reply.get("traceback", [])))
        raise AssertionError(f"this cell failed:\n{code}\n\n{traceback}")
    return outputs


def kept(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Of a cell's outputs what a reader wants: text printed on stdout, values, pictures."""
    found: list[nbformat.NotebookNode] = []
    for output in outputs:
        if output.output_type == "stream" and output.name == "stdout" and found and found[-1].output_type == "stream":
            found[-1].text += output.text
        elif output.output_type == "stream" and output.name == "stdout":
            found.append(nbformat.from_dict(output))
        elif output.output_type == "execute_result" or "image/png" in output.get("data", {}):
            data = {k: v for k, v in output.data.items() if k in ("text/plain", "image/png")}
            found.append(nbformat.from_dict({**output, "data": data}))
    return found


def slim(output: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """An output as it is committed: no terminal colours, no blanks at the ends of lines, pictures in 64 colours."""
    if output.output_type == "stream":
        plain = re.sub(r"\x1b\[[0-9;]*m", "", output.text)
        output.text = "\n".join(line.rstrip() for line in plain.split("\n"))
    elif "image/png" in output.data:
        picture, small = Image.open(io.BytesIO(base64.b64decode(output.data["image/png"]))), io.BytesIO()
        picture.convert("RGB").quantize(64).save(small, "PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(small.getvalue()).decode()
    return output


def kinds(notebook: nbformat.NotebookNode, printing: set[str]) -> list[tuple[str, list[str]]]:
    """(cell, the kinds of its outputs). printing: the cells whose printed text counts; what a library prints of its
    progress in others, in one environment and not in the next, does not."""
    counts = lambda cell, output: output.output_type != "stream" or cell.id in printing
    code = [c for c in notebook.cells if c.cell_type == "code"]
    return [(c.id, [o.output_type for o in kept(c.outputs) if counts(c, o)]) for c in code]


def printing(notebook: nbformat.NotebookNode) -> set[str]:
    """The cells that are committed with printed text."""
    code = (c for c in notebook.cells if c.cell_type == "code")
    return {c.id for c in code if any(o.output_type == "stream" for o in c.outputs)}


def commit(name: str, executed: nbformat.NotebookNode) -> None:
    """Write the outputs of a run to the notebook."""
    notebook, count = read(name), 0
    for cell, ran in zip(notebook.cells, executed.cells):
        if cell.cell_type == "code" and "install" not in cell.metadata.get("tags", []):
            count += 1
            cell.outputs, cell.execution_count = [slim(o) for o in kept(ran.outputs)], count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
    nbformat.write(notebook, FOLDER / f"{name}.ipynb")


def main() -> None:
    """Run all notebooks and commit their outputs."""
    with tempfile.TemporaryDirectory() as name:
        folder = material(Path(name))
        with kernel(folder) as client:
            for stem in (n for n in RUNS if n != "06_export_and_chat"):  # which is committed without
                commit(stem, execute(stem, client, folder)[0])
                print(stem)


def shown(notebook: nbformat.NotebookNode) -> str:
    """What the cells printed or displayed, as text."""
    texts = []
    for output in (o for c in notebook.cells if c.cell_type == "code" for o in c.outputs):
        texts.append(output.text if output.output_type == "stream" else output.get("data", {}).get("text/plain", ""))
    return "\n".join(texts)


def pictures(notebook: nbformat.NotebookNode) -> int:
    return sum("image/png" in o.get("data", {}) for c in notebook.cells if c.cell_type == "code" for o in c.outputs)


if __name__ == "__main__":
    main()
