"""The demo end to end at a tenth of its size; its judge on curves with a planted defect; its corpus and data sets."""

import contextlib
import io
import json
import logging
import warnings
from dataclasses import replace
from pathlib import Path

import datasets
import pytest
import torch
from datasets import Dataset
from huggingface_hub import utils as hub
from peft import PeftConfig, PeftModel
from rich.console import Console
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from fastft import errors
from fastft.cli import app, main
from fastft.patching.report import PatchReport
from fastft.tools.demo import checks as demo_checks
from fastft.tools.demo import corpus as demo_corpus
from fastft.tools.demo import runner as demo_module
from fastft.tools.demo import show as demo_show
from fastft.tools.demo import training as demo_run
from fastft.tools.demo.model import DecoderSize
from fastft.tools.demo.plot import plot as demo_plot
from fastft.tools.demo.runner import DemoOptions, demo
from fastft.tools.demo.training import TrainingRun

SMALL = DecoderSize(vocab=400, hidden=32, intermediate=64, layers=2, heads=2, kv_heads=1, steps=8, batch=4, tokens=32)


def strict(text):
    """JSON without NaN."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@pytest.fixture(scope="module")
def pairs():
    return demo_corpus.stdlib_pairs()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """One small demo, in a folder given by a relative path: exit code, folder, what its console and what the process
    printed."""
    out = tmp_path_factory.mktemp("demo")
    console, printed = Console(width=120, record=True, quiet=False), io.StringIO()
    options = DemoOptions(out=Path(out.name), steps=6, size=SMALL, held_out=16, pairs=300, least_drop=0.01)
    with pytest.MonkeyPatch.context() as here, contextlib.redirect_stdout(printed):
        here.chdir(out.parent)
        code = demo(options, console)
    return code, out, console.export_text(), printed.getvalue()


@pytest.mark.oldest
def test_demo_holds_and_leaves_its_evidence(done):
    code, out, text, printed = done
    figures = strict((out / "demo.json").read_text())
    assert code == 0, [c for c in figures["checks"] if not c["ok"]]
    assert {c["name"] for c in figures["checks"]} == {
        "modules were swapped",
        "adapter starts from stock's bits",
        "loss curves agree",
        "held-out loss drops",
        "adapter reloads in plain transformers + PEFT",
        "unpatched model is stock again",
    }
    assert figures["runs"]["stock, reordered"]["held_out_loss"] is None
    # one number of modules, wherever it is said
    count = sum(row["count"] for row in figures["report"]["swapped"])
    assert count and figures["checks"][0]["evidence"] == f"{count} modules"
    assert f": {count} modules swapped" in printed
    assert {row["kind"] for row in figures["joined_in_training"]} >= {"fused head"}
    stock, fast = figures["runs"]["stock"], figures["runs"]["fastft"]
    assert len(stock["losses"]) == len(fast["losses"]) == 6
    assert 0 < fast["saved_bytes_one_step"] < stock["saved_bytes_one_step"]
    assert fast["held_out_loss"] < figures["held_out_loss_before"]
    assert figures["sample"]["prompt"].startswith("### Instruction")
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "adapter" / "adapter_model.safetensors").exists()
    for shown in (
        "held-out loss before",
        "median step",
        "saved for backward",
        "before:",
        "after:",
        "pre-training",
        "four trainings follow, from one seed",
        "padded batches ran unpadded",
    ):
        assert shown in text
    assert "tokens/s" not in text and "GPU" not in text  # there is none


def test_adapter_loads_from_any_folder(done, tmp_path, monkeypatch):
    _, out, _, _ = done
    monkeypatch.chdir(tmp_path)
    base = PeftConfig.from_pretrained(out / "adapter").base_model_name_or_path
    assert PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), out / "adapter")


def test_the_sample_asks_what_was_taught(done):
    """Up to the signature: what comes next is the heading and a docstring."""
    _, out, _, _ = done
    job = demo_run.DemoSettings(str(out / "model"), None, None, out)
    row = {"prompt": demo_corpus.Pair("f", "(x)", "Return x.", "Return x.").prompt, "completion": "Return x."}
    assert demo_run.sample_prompt(job, row, None).endswith("### Signature\nf(x)\n\n")
    assert demo_run.sample_prompt(replace(job, small=False), row, None) == row["prompt"]
    assert demo_show.one_line("a\n\n b ") == "a b"
    assert len(demo_show.one_line("word " * 99)) == demo_show.LONGEST


def a_run(name, seconds, peak):
    return TrainingRun(name, [2.0, 1.0], [seconds] * 2, [300, 500], 2 * seconds, peak, 2**20, 1.5)


def test_tokens_and_memory_of_both_where_there_is_a_gpu():
    rows = {name: rest for name, *rest in demo_show.rows(3.0, a_run("stock", 0.5, 3 * 2**30), a_run("x", 0.1, 2**30))}
    assert rows["tokens/s, padding left out"] == ["800", "4,000"]
    assert rows["peak GPU memory"] == ["3,072.0 MiB", "1,024.0 MiB"]
    assert "peak GPU memory" not in {name for name, *_ in demo_show.rows(3.0, a_run("a", 1, 0), a_run("b", 1, 0))}


def test_a_slower_training_of_faster_steps_is_explained():
    def shown(first):
        fast = TrainingRun("fastft", [2.0, 1.0], [first, 0.1, 0.1], [300, 500], first + 1, 0, 2**20, 1.5)
        console, sample = Console(width=200, record=True, file=io.StringIO()), demo_show.Sample("p", "b", "a")
        demo_show.show(console, 3.0, a_run("stock", 0.5, 0), fast, [], sample, PatchReport("m", ()))
        return console.export_text()

    assert "8.0 s of fastft's 9.0 s, once a run" in shown(8.0)
    assert "once a run" not in shown(-0.5)


def test_how_long_it_takes_is_said_first(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_module, "_prepare", lambda *a: None)
    monkeypatch.setattr(demo_module, "_compare", lambda *a: {"checks": []})
    for steps, first in ((80, "about a minute and a half on 2 cores"), (2, "all of it held; 0 s; figures,")):
        console = Console(width=200, record=True, file=io.StringIO())
        assert demo(DemoOptions(out=tmp_path, steps=steps), console) == 0
        assert console.export_text().startswith(first)


def test_labels_fit_the_picture(tmp_path):
    """No text reaches out of the figure, and none is longer than the axes that it runs along."""
    title = "a-name-of-a-model-that-goes-on-and-on-" * 3 + ": 80 steps of LoRA through TRL, cpu"
    runs = [TrainingRun(n, [3.0, 2.0, 1.0], [0.1] * 3) for n in ("fastft", "stock", "stock, reordered")]
    for reference in (TrainingRun("stock in float64", [3.1, 2.1, 1.1]), None):
        figure = demo_plot(tmp_path / "loss.png", *runs, reference, title)
        renderer = figure.canvas.get_renderer()
        whole = figure.bbox
        for axes in figure.axes:
            box = axes.get_window_extent(renderer)
            for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
                extent = text.get_window_extent(renderer)
                assert whole.x0 <= extent.x0 and extent.x1 <= whole.x1, text
                assert whole.y0 <= extent.y0 and extent.y1 <= whole.y1, text
            label = axes.yaxis.label.get_window_extent(renderer)
            assert box.y0 - 2 <= label.y0 and label.y1 <= box.y1 + 2, axes.yaxis.label


def test_other_libraries_are_quiet_for_the_time_and_no_longer(capfd):
    def state():
        levels = {name: logging.getLogger(name).level for name in demo_show.LOUD}
        bars = (datasets.are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled())
        return levels, bars, hub.are_progress_bars_disabled(), list(warnings.filters)

    def noise():
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("please install kernels")
        logging.getLogger("transformers.anything").warning("a hint")
        warnings.warn("it goes away", FutureWarning)
        for _ in datasets.utils.tqdm(range(2)):
            pass

    before = state()
    with demo_show.quiet():
        noise()
        assert state() != before
    assert state() == before
    said = capfd.readouterr()
    assert not said.err and not said.out
    with pytest.raises(ZeroDivisionError), demo_show.quiet():
        _ = 1 / 0
    assert state() == before


def test_json_holds_no_nan():
    nan = float("nan")
    assert demo_show.finite({"a": [1.0, nan], "b": (float("inf"),), "c": "nan"}) == {
        "a": [1.0, None],
        "b": [None],
        "c": "nan",
    }


def test_exit_code_is_one_when_a_promise_is_broken(done, tmp_path, monkeypatch):
    _, first, _, _ = done
    figures = json.loads((first / "demo.json").read_text())
    monkeypatch.setattr(demo_module, "_compare", lambda *a: figures)
    options = DemoOptions(model=str(first / "model"), out=tmp_path, steps=2, held_out=8, pairs=40)
    console = Console(width=120, record=True)
    assert demo(options, console) == 0
    figures["checks"][2]["ok"] = False
    assert demo(options, console) == 1
    assert "NOT all of it held" in console.export_text()


def test_the_drop_that_is_asked_for():
    assert demo_checks.check_drop(5.0, 3.9, 0.2).ok
    assert not demo_checks.check_drop(5.0, 4.1, 0.2).ok
    assert not demo_checks.check_drop(5.0, 5.0, 0.0).ok
    assert not demo_checks.check_drop(5.0, float("nan"), 0.0).ok


def curve(*losses):
    return TrainingRun("x", list(losses))


def test_judge_of_curves():
    reference = curve(*torch.linspace(6, 4, 30, dtype=torch.float64).tolist())
    noisy = lambda seed, size: curve(
        *(
            x + size * float(e)
            for x, e in zip(reference.losses, torch.randn(30, generator=torch.Generator().manual_seed(seed)))
        )
    )
    stock, reordered = noisy(0, 2e-6), noisy(1, 2e-6)
    assert demo_checks.judge_curves(noisy(2, 2e-6), stock, reordered, reference)
    assert not demo_checks.judge_curves(noisy(2, 2e-5), stock, reordered, reference)
    slower = curve(*(x * (1 + 1e-5) for x in reference.losses))  # a learning rate that is off by a little
    assert not demo_checks.judge_curves(slower, stock, reordered, reference)
    assert demo_checks.judge_curves(noisy(2, 2e-6), stock, reordered, None)
    assert not demo_checks.judge_curves(noisy(2, 2e-5), stock, reordered, None)
    assert not demo_checks.judge_curves(curve(*reference.losses[:-1]), stock, reordered, reference)
    assert not demo_checks.judge_curves(curve(*reference.losses[:-1], float("nan")), stock, reordered, reference)
    assert not demo_checks.judge_curves(curve(), curve(), curve(), curve())


def test_checks_see_a_wrong_model(done):
    """A trained adapter that is off by one part in a thousand fails the reload, the start and the undo."""
    from fastft import FastModel, unpatch

    _, out, _, _ = done
    rows = [{"prompt": "def f(x)", "completion": "Return x."}]
    job = demo_run.DemoSettings(str(out / "model"), Dataset.from_list(rows), Dataset.from_list(rows), out, steps=2)
    model = FastModel.from_pretrained(out / "adapter")
    ids = torch.arange(24).view(2, 12)
    trained = demo_checks.trainable(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.mul_(1.001)
    assert not demo_checks.check_reload(job, out / "adapter", demo_checks.logits(model, ids), ids).ok
    assert not demo_checks.check_start(demo_checks.trainable(model), trained).ok
    assert not demo_checks.check_undo(job, model, trained, ids).ok  # still patched, and another adapter
    unpatch(model)
    assert not demo_checks.check_undo(job, model, trained, ids).ok
    assert demo_checks.check_undo(job, model, demo_checks.trainable(model), ids).ok


def test_saved_bytes_counts_storages_once():
    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.ones(4))

    class Trainer:
        model = Two()

        def get_train_dataloader(self):
            return [torch.ones(8)]

        def _prepare_inputs(self, x):
            return x

        def compute_loss(self, model, x):
            y = x.view(2, 4) * model.w  # keeps x: 32 bytes; w is the model's own
            return (y.exp() + y.view(8).exp().view(2, 4)).sum()  # keeps two results: 2 x 32 bytes

    assert demo_run.saved_bytes(Trainer()) == 96


# --- data


def test_corpus_is_thousands_of_real_pairs(pairs):
    assert len(pairs) > 3000
    assert len({p.doc for p in pairs}) == len(pairs)
    dumps = next(p for p in pairs if p.name == "json.dumps")
    assert "sort_keys" in dumps.signature
    assert dumps.summary.startswith("Serialize")
    assert not any(" at 0x" in p.signature for p in pairs)
    train, held_out = demo_corpus.split(pairs, 100, seed=3)
    assert len(held_out) == 100
    assert not {p.doc for p in train} & {p.doc for p in held_out}
    assert demo_corpus.split(pairs, 100, seed=3) == (train, held_out)
    assert demo_corpus.split(pairs, 100, seed=4) != (train, held_out)


@pytest.mark.parametrize(
    ("row", "columns"),
    [
        ({"text": "some text"}, {"text"}),
        ({"prompt": "a", "completion": "b"}, {"prompt", "completion"}),
        ({"instruction": "add", "input": "1 2", "output": "3"}, {"prompt", "completion"}),
        ({"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}, {"messages"}),
    ],
    ids=lambda x: "-".join(sorted(x)),
)
def test_a_users_file(row, columns, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for _ in range(12)))
    train, held_out = demo_corpus.user_dataset(str(path), 5, 0)
    assert len(train) == 9
    assert len(held_out) == 3
    assert set(train.column_names) == columns
    if "instruction" in row:
        assert train[0]["prompt"] == "### Instruction\nadd\n1 2\n### Response\n"


def test_a_file_that_is_no_data_set(tmp_path):
    bad = {
        "data.xyz": ("hello", "ending in"),
        "columns.jsonl": ('{"a": 1}\n' * 9, r"has the columns \['a'\]"),
        "short.jsonl": ('{"text": "x"}\n', "1 rows"),
    }
    for name, (text, said) in bad.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(errors.DatasetError, match=said):
            demo_corpus.user_dataset(str(tmp_path / name), 2, 0)
    with pytest.raises(errors.DatasetError, match="neither a file here"):
        demo_corpus.user_dataset("nobody/such-data", 2, 0)


# --- the command


def test_command_line(capsys, monkeypatch, tmp_path):
    shown = CliRunner().invoke(app, ["demo", "--help"])
    assert shown.exit_code == 0
    for option in ("--model", "--dataset", "--out", "--steps", "--seed", "--4bit"):
        assert option in shown.output
    monkeypatch.setattr("sys.argv", ["fastft", "demo", "--dataset", str(tmp_path / "no.jsonl"), "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as e:
        main()
    assert e.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("fastft: --dataset")
    assert said.count("\n") == 1
