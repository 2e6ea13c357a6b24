"""The notebooks run from top to bottom with a tiny model, are committed with the outputs of such a run, and differ from
stock TRL in three lines at most."""

import base64
import difflib
import json
import re
import shlex
import tomllib
from importlib.metadata import version

import nbformat
import pytest
import torch
from packaging.requirements import Requirement

from fastft.tools.gguf import llama_cpp
from tests import notebook_support as support

NAMES = sorted(p.stem for p in support.FOLDER.glob("*.ipynb"))
BESIDE_STOCK = [n for n in NAMES if n != "06_export_and_chat"]  # train with both
SMALL = support.SMALL
PROJECT = tomllib.loads((support.FOLDER.parent / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Homepage"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return support.material(tmp_path_factory.mktemp("notebooks"))


@pytest.fixture(scope="module")
def kernel(folder):
    with support.kernel(folder) as running:
        yield running


@pytest.fixture
def execute(folder, kernel):
    """Runs a notebook; what is committed with it are the outputs of such a run."""

    def run(name, ask):
        notebook, found = support.execute(name, kernel, folder, ask)
        committed = support.read(name)
        cells = support.printing(committed)
        assert support.kinds(notebook, cells) == support.kinds(committed, cells), (
            f"run `python -m tests.notebook_support`; now it is:\n{support.shown(notebook)[:2000]}"
        )
        return notebook, found

    return run


def curves_agree(found) -> None:
    """Float32 on a CPU: what a few steps make of rounding, and no more (the judge follows 20 steps in
    tests/trainers)."""
    stock, fast = (torch.tensor(found[k], dtype=torch.float64) for k in ("stock", "fast"))
    assert len(stock) == len(fast) == SMALL["STEPS"] and len(stock.unique()) > 1
    assert float((fast - stock).abs().max() / stock.abs().max()) < 64 * torch.finfo(torch.float32).eps, found


def memory_is_less_than_stocks(found) -> None:
    """And where the plan is for the very rows that were trained on (exact), near to what was predicted."""
    assert 0 < found["measured"][1] < found["measured"][0], found
    if "predicted" in found:
        for measured, predicted in zip(found["measured"], found["predicted"]):
            assert abs(measured - predicted) < 0.05 * measured, found


def holds(notebook, *words) -> None:
    text = support.shown(notebook)
    for word in ("modules swapped", "fastft verify: Qwen3ForCausalLM, float32: PASS", "fastft plan:", *words):
        assert word in text, word
    assert support.pictures(notebook) == 1


def test_01_quickstart(execute, folder):
    ask = """dict(stock=stock_losses, fast=fast_losses, measured=[stock_memory.bytes, fast_memory.bytes],
    predicted=[next(x for x in plan.lines if x.stack == 'stock').peak.total, plan.chosen.peak.total])"""
    notebook, found = execute("01_quickstart_sft", ask)
    curves_agree(found)
    memory_is_less_than_stocks(found)
    holds(notebook)
    assert (folder / "01_quickstart_sft" / "adapter" / "adapter_model.safetensors").exists()


def test_02_qlora(execute):
    ask = """dict(stock=stock_losses, fast=fast_losses,
    measured=[stock_memory.bytes, fast_memory.bytes], predicted=[*predicted.values()],
    difference=difference.item(),
    four_bit=model.is_loaded_in_4bit if 'model' in globals() else plain.is_loaded_in_4bit)"""
    notebook, found = execute("02_qlora_t4", ask)
    curves_agree(found)
    memory_is_less_than_stocks(found)
    holds(notebook, "on T4")
    assert found["four_bit"] and found["difference"] == 0


def test_03_dpo(execute):
    ask = """dict(stock=[e['loss'] for e in stock_log], fast=[e['loss'] for e in fast_log],
    measured=[stock_memory.bytes, fast_memory.bytes])"""
    notebook, found = execute("03_dpo", ask)
    curves_agree(found)
    memory_is_less_than_stocks(found)
    holds(notebook, "fused head")


def test_04_grpo(execute):
    ask = """dict(stock=[e['reward'] for e in stock_log], fast=[e['reward'] for e in fast_log],
    measured=[stock_memory.bytes, fast_memory.bytes],
    losses=[e['loss'] for e in stock_log])"""
    notebook, found = execute("04_grpo", ask)
    curves_agree(found)
    memory_is_less_than_stocks(found)
    assert len(set(found["losses"])) > 1
    holds(notebook, "fused head")


def test_05_prove_it(execute):
    ask = """dict(stock=stock_losses, fast=fast_losses,
    planted=sorted({line.group.split(':')[0] for line in planted.failed if line.level == 'module'}),
    pairs=[(m.bytes, x.peak.total) for ms, xs in ((stock_memory, [p.lines[-1] for p in predicted]),
                               (fast_memory, [p.chosen for p in predicted]))
           for m, x in zip(ms, xs)])"""
    notebook, found = execute("05_prove_it_on_your_gpu", ask)
    curves_agree(found)
    text = support.shown(notebook)
    assert "stock again, bit for bit" in text and "the same bits in plain transformers" in text
    assert "norm" in found["planted"]
    assert len(found["pairs"]) == 4
    for measured, predicted in found["pairs"]:
        assert abs(measured - predicted) < 0.05 * measured, found
    assert support.pictures(notebook) == 1


@pytest.mark.skipif(not llama_cpp.is_installed(), reason="pip install -e '.[gguf]'")
def test_06_export(kernel, folder):
    """llama.cpp in the notebook's own process answers as base + adapter does."""
    ask = """dict(answer=answer, agree=proof[QUANT]['top1_clear'], file=result.figures['file'],
    loss=trainer.state.log_history[0]['loss'])"""
    notebook, found = support.execute("06_export_and_chat", kernel, folder, ask)
    assert found["answer"] and found["agree"] >= 0.99 and found["file"] == "adapter-q8_0.gguf" and found["loss"] > 0
    assert (folder / "06_export_and_chat" / "gguf" / "export.json").exists()
    text = support.shown(notebook)
    assert "written and proven" in text and "200 of 200 strings have equal ids" in text


# --- as they are committed


@pytest.mark.parametrize("name", BESIDE_STOCK)
def test_committed_with_the_outputs_of_a_run(name):
    """Labelled as what they are, small, and without a path of the machine that ran them."""
    notebook = support.read(name)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert not code[0].outputs and [c.execution_count for c in code] == [None, *range(1, len(code))]
    assert support.pictures(notebook) == 1
    for output in (o for c in code for o in c.outputs):
        assert output.output_type in ("stream", "execute_result", "display_data") and output.get("name") != "stderr"
        picture = output.get("data", {}).get("image/png", "")
        assert len(base64.b64decode(picture)) < support.PICTURE_BYTES
    label, t4 = (support.tagged(notebook, tag)[0].source for tag in ("outputs", "t4"))
    assert "CPU run" in label and "random model" in label
    assert "`fastft plan` predicts" in t4 and "not measured" in t4 and re.search(r"\d GiB", t4)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert notebook.metadata.kernelspec.name == "python3"
    text = "".join(c.source for c in notebook.cells) + support.shown(notebook)
    assert not re.search(r"/(?:work|home|root|tmp|Users|content)/", text)


def test_the_export_is_committed_clean():
    """Without outputs, and with an install cell of its own: the extra that compiles llama.cpp."""
    notebook = support.read("06_export_and_chat")
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    (install,), (parameters,) = (support.tagged(notebook, tag) for tag in ("install", "parameters"))
    assert code[:2] == [install, parameters] and f"fastft[gguf] @ git+{REPOSITORY}" in install.source
    assert "/blob/main/notebooks/06_export_and_chat.ipynb" in notebook.cells[0].source


# --- the install cell


@pytest.mark.parametrize("name", BESIDE_STOCK)
def test_one_cell_installs_it_and_parameters_come_first(name):
    """The same cell in all, once; a badge that opens this notebook."""
    notebook = support.read(name)
    (install,) = support.tagged(notebook, "install")
    assert install.source == support.tagged(support.read(NAMES[0]), "install")[0].source
    assert sum(c.source.count("%pip") for c in notebook.cells) == install.source.count("%pip") == 2
    (parameters,) = support.tagged(notebook, "parameters")
    before = [c for c in notebook.cells[: notebook.cells.index(parameters)] if c.cell_type == "code"]
    assert before == [install]
    for line in parameters.source.splitlines():
        assert re.fullmatch(r"[A-Z_, ]+ = .+", line), line
    place = f"{REPOSITORY.removeprefix('https://github.com/')}/blob/main/notebooks/{name}.ipynb"
    assert f"](https://colab.research.google.com/github/{place})" in notebook.cells[0].source


def test_what_the_install_cell_asks_of_pip(kernel):
    """Run as written, with a pip that writes down what it is asked: fastft from its repository, the torch that is here
    as it is, torchao gone."""
    (install,) = support.tagged(support.read(NAMES[0]), "install")
    support.run(kernel, "asked = []\nget_ipython().register_magic_function(asked.append, magic_name='pip')")
    support.run(kernel, install.source)
    (answer,) = support.run(kernel, "import json\nprint(json.dumps(asked))")
    support.run(kernel, "get_ipython().magics_manager.magics['line'].pop('pip')")
    installs, uninstalls = (shlex.split(line) for line in json.loads(answer.text))
    assert installs[0] == "install" and uninstalls[0] == "uninstall"
    first, second = (Requirement(x) for x in installs[1:] if not x.startswith("-"))
    assert first.name == "fastft" and first.url == f"git+{REPOSITORY}"
    assert second.name == "torch" and str(second.specifier) == f"=={version('torch')}"
    assert "-y" in uninstalls and uninstalls[-1] == "torchao"


def test_the_torch_of_hosted_notebooks_is_taken():
    """Colab's is 2.11, Kaggle's 2.10.0: the install cell keeps both, and the text says so."""
    (bound,) = (Requirement(r) for r in PROJECT["dependencies"] if Requirement(r).name == "torch")
    assert "2.10.0" in bound.specifier and "2.11.0" in bound.specifier
    for name in BESIDE_STOCK:
        text = "".join(c.source for c in support.read(name).cells)
        assert "Colab's own torch is kept, and Kaggle's too" in text


# --- what the text promises


@pytest.mark.parametrize("name", ["01_quickstart_sft", "02_qlora_t4", "04_grpo"])
def test_every_data_set_that_the_text_promises(name):
    """The cell that reads a row, given one of each kind."""
    (cell,) = support.tagged(support.read(name), "columns")

    class Tokenizer:
        def apply_chat_template(self, messages, **settings):
            return " / ".join(m["content"] for m in messages)

    said = lambda role, text: {"role": role, "content": text}
    head = cell.source[cell.source.index("def text_of") :].split("\n\n\n")[0]
    names: dict = {"tokenizer": Tokenizer()}
    exec(head, names)
    if name == "04_grpo":
        kinds = ["why?", [said("user", "why?")]]
        assert [names["text_of"](prompt) for prompt in kinds] == ["why?", "why?"]
        return
    user, assistant = [said("user", "why?")], [said("assistant", "so")]
    rows = [
        {"source": "somewhere", "text": "why? so"},
        {"num_turns": 2, "messages": user + assistant},
        {"prompt": "why?", "completion": " so"},
        {"prompt": user, "completion": assistant},
    ]
    assert [names["text_of"](row) for row in rows] == ["why? so", "why? / so", "why? so", "why? / so"]


@pytest.mark.parametrize("name", BESIDE_STOCK)
def test_three_lines_at_most_differ_from_stock(name):
    """Of the two cells that load and train; whatever else names fastft shows something of it, or reads the memory."""
    notebook = support.read(name)
    (stock,), (fast,) = support.tagged(notebook, "stock"), support.tagged(notebook, "fastft")
    named = lambda text: [
        line.replace("stock_", "x_").replace("fast_", "x_") for line in text.splitlines() if line.strip()
    ]
    added = [d for d in difflib.ndiff(named(stock.source), named(fast.source)) if d.startswith("+ ")]
    assert 0 < len(added) <= 3, added
    assert all("fastft" in line or "FastModel" in line for line in added), added
    trains = next(c.source for c in notebook.cells if c.cell_type == "code" and "def train(model" in c.source)
    assert "fastft" not in trains and "FastModel" not in trains
    assert "fastft" not in stock.source and "FastModel" not in stock.source
