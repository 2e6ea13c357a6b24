"""The notebooks run from top to bottom with a tiny model, are committed clean, and differ from stock TRL in three lines
at most."""

import difflib
import re

import nbformat
import pytest
import torch

from fastft.tools.gguf import llama_cpp
from tests import notebook_support as support

NAMES = sorted(p.stem for p in support.FOLDER.glob("*.ipynb"))
BESIDE_STOCK = [n for n in NAMES if n != "06_export_and_chat"]  # train with both
SMALL = dict(SPLIT="train", STEPS=6, BATCH=2, MAX_LENGTH=96)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return support.material(tmp_path_factory.mktemp("notebooks"))


@pytest.fixture(scope="module")
def kernel(folder):
    with support.kernel(folder) as running:
        yield running


@pytest.fixture
def execute(folder, kernel):
    def run(name, data, ask, **parameters):
        given = dict(SMALL, MODEL=str(folder / "model"), DATASET=str(folder / data), **parameters)
        return support.execute(name, kernel, folder / name, given, ask)

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
    notebook, found = execute("01_quickstart_sft", "chat", ask, MAX_LENGTH=48)
    curves_agree(found)
    memory_is_less_than_stocks(found)
    holds(notebook)
    assert (folder / "01_quickstart_sft" / "adapter" / "adapter_model.safetensors").exists()


def test_02_qlora(execute):
    ask = """dict(stock=stock_losses, fast=fast_losses,
    measured=[stock_memory.bytes, fast_memory.bytes], predicted=[*predicted.values()],
    difference=difference.item(),
    four_bit=model.is_loaded_in_4bit if 'model' in globals() else plain.is_loaded_in_4bit)"""
    notebook, found = execute("02_qlora_t4", "chat", ask, MAX_LENGTH=48)
    curves_agree(found)
    memory_is_less_than_stocks(found)
    holds(notebook, "on T4")
    assert found["four_bit"] and found["difference"] == 0


def test_03_dpo(execute):
    ask = """dict(stock=[e['loss'] for e in stock_log], fast=[e['loss'] for e in fast_log],
    measured=[stock_memory.bytes, fast_memory.bytes])"""
    notebook, found = execute("03_dpo", "preferences", ask, MAX_LENGTH=200)
    curves_agree(found)
    memory_is_less_than_stocks(found)
    holds(notebook, "fused head")


def test_04_grpo(execute):
    ask = """dict(stock=[e['reward'] for e in stock_log], fast=[e['reward'] for e in fast_log],
    measured=[stock_memory.bytes, fast_memory.bytes],
    losses=[e['loss'] for e in stock_log])"""
    notebook, found = execute("04_grpo", "prompts", ask, ANSWERS=4, NEW_TOKENS=8, TARGET=12)
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
    notebook, found = execute("05_prove_it_on_your_gpu", "chat", ask, LENGTHS=[24, 48])
    curves_agree(found)
    text = support.shown(notebook)
    assert "stock again, bit for bit" in text and "the same bits in plain transformers" in text
    assert "norm" in found["planted"]
    assert len(found["pairs"]) == 4
    for measured, predicted in found["pairs"]:
        assert abs(measured - predicted) < 0.05 * measured, found
    assert support.pictures(notebook) == 1


@pytest.mark.skipif(not llama_cpp.is_installed(), reason="pip install -e '.[gguf]'")
def test_06_export(execute, folder):
    """llama.cpp in the notebook's own process answers as base + adapter does."""
    ask = """dict(answer=answer, agree=proof[QUANT]['top1_clear'], file=result.figures['file'],
    loss=trainer.state.log_history[0]['loss'])"""
    notebook, found = execute("06_export_and_chat", "chat", ask, MAX_LENGTH=48)
    assert found["answer"] and found["agree"] >= 0.99 and found["file"] == "adapter-q8_0.gguf" and found["loss"] > 0
    assert (folder / "06_export_and_chat" / "gguf" / "export.json").exists()
    text = support.shown(notebook)
    assert "written and proven" in text and "200 of 200 strings have equal ids" in text


# --- as they are committed


@pytest.mark.parametrize("name", NAMES)
def test_committed_clean(name):
    notebook = support.read(name)
    nbformat.validate(notebook)
    code = [c for c in notebook.cells if c.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in code)
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith("# ")
    assert notebook.metadata.kernelspec.name == "python3"
    assert not re.search(r"/(?:work|home|root|tmp|Users|content)/", "".join(c.source for c in notebook.cells))


@pytest.mark.parametrize("name", NAMES)
def test_one_line_installs_it_and_parameters_come_first(name):
    notebook = support.read(name)
    (install,) = support.tagged(notebook, "install")
    assert (
        install.source.startswith("%pip install ")
        and "\n" not in install.source
        and not re.search(r"[=<>~]=", install.source)
    )
    assert sum(c.source.count("pip install") for c in notebook.cells) == 1
    (parameters,) = support.tagged(notebook, "parameters")
    before = [c for c in notebook.cells[: notebook.cells.index(parameters)] if c.cell_type == "code"]
    assert before == [install]
    for line in parameters.source.splitlines():
        assert re.fullmatch(r"[A-Z_, ]+ = .+", line), line


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
    trains = next(c.source for c in notebook.cells if c.cell_type == "code" and "def train(model):" in c.source)
    assert "fastft" not in trains and "FastModel" not in trains
    assert "fastft" not in stock.source and "FastModel" not in stock.source
