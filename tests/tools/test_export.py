"""fastft export: for each family, adapters of every kind, as llama.cpp and transformers run the result."""

import io
import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastft.cli import main
from fastft.errors import ExportError, ProofError
from fastft.tools.export import hub, merged, ollama, vllm_lora
from fastft.tools.export.export import export
from fastft.tools.gguf import families, llama_cpp, rope, vocabulary
from fastft.tools.gguf.pre_tokenizers import pre_tokenizer_name
from fastft.tools.merge.adapter_parts import Delta
from tests.tools.export_models import texts, tokenizer

if not llama_cpp.is_installed():
    pytest.skip("pip install -e '.[gguf]'", allow_module_level=True)

FAMILIES = ["llama", "qwen3", "gemma3_text", "mistral", "phi3"]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(json.dumps(t) for t in texts()[1]))
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf(trained, prompts, tmp_path, family):
    """F16 within 1% of the logits' deviation; Q8_0 chooses the same tokens wherever errors cannot turn them round."""
    _, adapter = trained(family)
    found = export(adapter, tmp_path / "out", to="gguf", prompts=prompts).figures
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["export.json", f"{family}-adapter-q8_0.gguf"]
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == json.loads(json.dumps(found))
    proof = found["proof"]
    f16, q8 = proof["f16"], proof["q8_0"]
    print(family, f16["largest_error"] / f16["std"], q8["clear"], q8["positions"], q8["top1_clear"], q8["kl_mean"])
    assert f16["largest_error"] <= 1e-2 * f16["std"]
    assert q8["positions"] >= 500 and q8["clear"] >= 0.8 * q8["positions"] and q8["top1_clear"] >= 0.99
    assert proof["strings"] == {"compared": 200, "equal": 200} and proof["conversations"]["equal"] >= 2
    assert len(proof["answers"]) == 3


@pytest.mark.parametrize("family", FAMILIES)
def test_merged(trained, prompts, tmp_path, family):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    _, adapter = trained(family)
    console = Console(width=200, file=io.StringIO())
    found = export(adapter, tmp_path / "out", to="merged", prompts=prompts, console=console).figures["proof"]
    told = console.file.getvalue()
    assert told.index("greedy answers, to be read and not judged") < told.index("served:")
    logits = found["logits"]
    assert "precisions" not in found  # trained in 16 bits or more
    assert logits["largest_error"] <= 1.5 * logits["explained"] and logits["top1_clear"] == 1.0
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(AutoTokenizer.from_pretrained(tmp_path / "out"))


def test_k_quants(trained, prompts, tmp_path):
    _, adapter = trained("wide")
    found = export(adapter, tmp_path / "out", to="gguf", quant="q4_k_m", prompts=prompts).figures
    proof = found["proof"]
    q4 = proof["q4_k_m"]
    print(q4["kl_mean"], q4["clear"], q4["top1"])
    assert [n for n in found["notes"] if "256" in n] == []
    assert q4["top1_clear"] >= 0.99 and q4["largest_error"] <= 3 * q4["explained"] + proof["f16"]["largest_error"]


def test_ollama_folder(trained, prompts, tmp_path):
    """The system text goes where the template has it: into the first user's turn."""
    _, adapter = trained("gemma3_text")
    found = export(adapter, tmp_path / "out", to="ollama", prompts=prompts).figures
    file = "gemma3_text-adapter-q8_0.gguf"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["Modelfile", "export.json", file]
    text = (tmp_path / "out" / "Modelfile").read_text()
    assert text.startswith(f'FROM ./{file}\nTEMPLATE """') and "{{ $first }}" in text and 'stop "<eos>"' in text
    assert found["proof"]["modelfile"] == {"compared": 4, "equal": 4}


@pytest.mark.parametrize("family", FAMILIES)
def test_modelfiles(tmp_path, family):
    tok = tokenizer(family)
    notes, found = ollama.write_modelfile(tmp_path, "x.gguf", tok, {"temperature": 0.5}, [tok.eos_token_id], 512)
    assert notes == [] and found["compared"] >= 2
    text = (tmp_path / "Modelfile").read_text()
    assert "PARAMETER temperature 0.5\nPARAMETER num_ctx 512\n" in text and f'stop "{tok.eos_token}"' in text


def test_a_template_that_ollama_cannot_hold_is_refused(tmp_path):
    tok = tokenizer("qwen3")
    tok.chat_template = "{% for m in messages %}{{ m['content'] }}|{{ m['content'] }}{% endfor %}"
    with pytest.raises(ExportError, match="each message once, in order: use --to gguf"):
        ollama.write_modelfile(tmp_path, "x.gguf", tok, {}, [], 512)
    turn = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    tok.chat_template = turn + "{% if messages | length > 1 %}>{% endif %}"
    with pytest.raises(ExportError, match="by what comes later"):
        ollama.write_modelfile(tmp_path, "x.gguf", tok, {}, [], 512)
    tok.chat_template = turn.replace("m['role']", "loop.index")  # is misread, and caught when it is read back
    with pytest.raises(ProofError, match="the chat template: 4 messages"):
        ollama.write_modelfile(tmp_path, "x.gguf", tok, {}, [], 512)


def test_a_system_text_of_its_own(tmp_path):
    """A template with a system text for conversations that have none."""
    tok = tokenizer("qwen3")
    tok.chat_template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
        + tok.chat_template
    )
    _, found = ollama.write_modelfile(tmp_path, "x.gguf", tok, {}, [], 512)
    assert "{{ if not .System }}<|im_start|>system\nBe kind." in (tmp_path / "Modelfile").read_text()
    assert found == {"compared": 4, "equal": 4}


def test_vllm_lora(trained, prompts, tmp_path):
    """As it is; and with one rank and one scaling in the place of several."""
    from safetensors.torch import load_file

    _, adapter = trained("wide")
    found = export(adapter, tmp_path / "plain", to="vllm-lora", prompts=prompts).figures
    assert found["rank"] == 8 and found["notes"] == [] and found["proof"]["logits"]["largest_error"] == 0.0
    ours, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "plain", adapter))
    assert ours.keys() == theirs.keys() and all(t.equal(theirs[n]) for n, t in ours.items())
    _, adapter = trained("gemma3_text")
    found = export(adapter, tmp_path / "patterns", to="vllm-lora", prompts=prompts).figures
    config = json.loads((tmp_path / "patterns" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["use_rslora"]) == (8, 8, {}, False)
    logits = found["proof"]["logits"]
    assert logits["largest_error"] <= 1e-4 * logits["std"] and logits["without_the_adapter"] > logits["std"]
    tensors = load_file(tmp_path / "patterns" / "adapter_model.safetensors")
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {8}


@pytest.mark.parametrize(
    ("family", "said"),
    [("llama", "saves 'model.layers.0"), ("qwen3", "saves '"), ("mistral", "DoRA"), ("phi3", "saves 'lm_head.weight'")],
)
def test_what_vllm_would_ignore_is_refused(trained, tmp_path, family, said):
    with pytest.raises(ExportError, match=said) as e:
        export(trained(family)[1], tmp_path / "out", to="vllm-lora")
    assert "use --to merged" in str(e.value) and not (tmp_path / "out").exists()


# --- planted mistakes: the proof fails, says where, and nothing is published


def other_rows(monkeypatch):
    monkeypatch.setattr(families, "permute", lambda t, heads: t)


def no_offset(monkeypatch):
    monkeypatch.setattr(families, "norm_offset", lambda: 0.0)


def other_base(monkeypatch):
    plain = rope.rope_base
    monkeypatch.setattr(rope, "rope_base", lambda parameters: 20 * plain(parameters))


def not_scaled(monkeypatch):
    plain = Delta.add_to
    monkeypatch.setattr(Delta, "add_to", lambda self, w, dtype: plain(replace(self, scaling=1.0), w, dtype))


def other_template(monkeypatch):
    import gguf

    plain = gguf.GGUFWriter.add_chat_template
    monkeypatch.setattr(
        gguf.GGUFWriter,
        "add_chat_template",
        lambda self, t: plain(self, t.replace("<|im_end|>' + '\n'", "<|im_end|>'")),
    )


def other_words(monkeypatch):
    monkeypatch.setattr(vocabulary, "pre_tokenizer_name", lambda pre, first: "gpt-2")


PLANTED = {
    "permuted q and k": ("mistral", other_rows, "layer 0, attention"),
    "a dropped norm offset": ("gemma3_text", no_offset, "layer 0, the norm before attention"),
    "a wrong rope base": ("qwen3", other_base, "layer 0, attention"),
    "an unscaled adapter": ("llama", not_scaled, "layer 0, attention"),
    "a wrong chat template": ("qwen3", other_template, "the first stage that differs is the chat template"),
    "a wrong pre-tokenizer": ("qwen3", other_words, "the first stage that differs is the tokenizer"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_mistake_is_named(trained, prompts, tmp_path, monkeypatch, name):
    family, plant, said = PLANTED[name]
    _, adapter = trained(family)
    plant(monkeypatch)
    with pytest.raises(ProofError, match=said) as e:
        export(adapter, tmp_path / "out", to="gguf", quant="f16", prompts=prompts)
    print(e.value)
    assert e.value.exit_code == 1 and "\n" not in str(e.value) and list(tmp_path.iterdir()) == []


def test_a_planted_mistake_in_a_merged_folder(trained, prompts, tmp_path, monkeypatch):
    _, adapter = trained("phi3")
    with monkeypatch.context() as patched:
        not_scaled(patched)
        with pytest.raises(ProofError, match=r"first tensor that differs is model\.layers\.0\.self_attn\.\w+\.weight"):
            export(adapter, tmp_path / "out", to="merged", prompts=prompts)
    plain = merged.write_configs

    def other_config(source, adapter, to, *rest):
        plain(source, adapter, to, *rest)
        config = json.loads((to / "config.json").read_text())
        config["rope_parameters"]["rope_theta"] *= 20
        (to / "config.json").write_text(json.dumps(config))

    monkeypatch.setattr(merged, "write_configs", other_config)
    with pytest.raises(ProofError, match="its configuration is not"):
        export(adapter, tmp_path / "out", to="merged", prompts=prompts)
    assert list(tmp_path.iterdir()) == []


def test_a_planted_mistake_in_an_adapter_or_a_modelfile(trained, prompts, tmp_path, monkeypatch):
    _, adapter = trained("gemma3_text")
    monkeypatch.setattr(
        vllm_lora, "_padded", lambda delta, rank, plain=vllm_lora._padded: plain(replace(delta, scaling=1.0), rank)
    )
    with pytest.raises(ProofError, match="not the one that was trained"):
        export(adapter, tmp_path / "out", to="vllm-lora", prompts=prompts)
    plain = ollama.go_template
    monkeypatch.setattr(ollama, "go_template", lambda tok: (plain(tok)[0].replace("\n\n", "\n"), []))
    with pytest.raises(ProofError, match="the chat template: 2 messages"):
        ollama.write_modelfile(tmp_path, "x.gguf", tokenizer("gemma3_text"), {}, [], 512)


# --- what cannot be written, and ordinary mistakes


def test_families_and_tokenizers_that_cannot_be_written(tmp_path):
    from transformers import AutoConfig

    with pytest.raises(ExportError, match=r"'gpt2' cannot be written as GGUF here \(known are llama"):
        families.family_of(AutoConfig.for_model("gpt2"))
    gemma = AutoConfig.for_model("gemma3_text", num_hidden_layers=6, head_dim=32, query_pre_attn_scalar=64)
    with pytest.raises(ExportError, match="attention is scaled by 64"):
        families.family_of(gemma)
    with pytest.raises(ExportError, match="its activation is gelu"):
        families.family_of(AutoConfig.for_model("llama", hidden_act="gelu"))
    split = {"type": "Split", "pattern": {"Regex": r"\w+|\s+"}, "behavior": "Isolated", "invert": False}
    with pytest.raises(ExportError, match=r"llama\.cpp has no name for \(\\w\+"):
        pre_tokenizer_name(split, False)


def changed(adapter, to, **config):
    """A copy of an adapter with another configuration."""
    shutil.copytree(adapter, to)
    path = to / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return to


def without_tokenizer(base, to):
    to.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(base / name, to / name)
    return to


MISTAKES = {
    "the folder exists": lambda b, a, t: ([a, "--to", "gguf", "--out", t], "exists; give a new folder"),
    "no such form": lambda b, a, t: ([a, "--to", "onnx", "--out", t / "o"], "--to: want one of merged, gguf"),
    "no such type": lambda b, a, t: ([a, "--to", "gguf", "--quant", "q9", "--out", t / "o"], "--quant: want one of"),
    "no such adapter": lambda b, a, t: ([t / "none", "--to", "gguf", "--out", t / "o"], "there is no folder"),
    "no such name": lambda b, a, t: (["nothere", "--to", "gguf", "--out", t / "o"], "'nothere' is neither a folder"),
    "a model for vLLM": lambda b, a, t: ([b, "--to", "vllm-lora", "--out", t / "o"], "wants an adapter's folder, got"),
    "a missing base": lambda b, a, t: (
        [changed(a, t / "x", base_model_name_or_path=str(t / "gone")), "--to", "gguf", "--out", t / "o"],
        "gone' is no folder here: give the base's with --base",
    ),
    "no tokenizer": lambda b, a, t: (
        [a, "--base", without_tokenizer(b, t / "x"), "--to", "gguf", "--out", t / "o"],
        "want a tokenizer in",
    ),
    "a part that is not known": lambda b, a, t: (
        [changed(a, t / "x", target_parameters=["experts"]), "--to", "vllm-lora", "--out", t / "o"],
        "which vLLM ignores: use --to merged",
    ),
    "a base in 16 bits only": lambda b, a, t: (
        [a, "--to", "merged", "--base-precision", "int3", "--out", t / "o"],
        "--base-precision: want one of trained",
    ),
    "no repository's name": lambda b, a, t: (
        [a, "--to", "gguf", "--push-to-hub", "my model", "--out", t / "o"],
        "want USER/NAME",
    ),
    "no prompts": lambda b, a, t: ([a, "--to", "merged", "--prompts", t / "p", "--out", t / "o"], "cannot be read"),
    "no permission": lambda b, a, t: ([a, "--to", "merged", "--out", "/proc/nothing/out"], "cannot write"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(trained, tmp_path, command, name):
    args, said = MISTAKES[name](*trained("wide"), tmp_path)
    before = sorted(tmp_path.rglob("*"))
    code, lines = command("export", *args)
    assert code == 2 and len(lines) == 1 and lines[0].startswith("fastft: export: "), lines
    assert said in lines[0]
    assert sorted(tmp_path.rglob("*")) == before


def test_json_alone_on_stdout(trained, prompts, tmp_path, monkeypatch, capfd):
    line = ["export", trained("wide")[1], "--to", "vllm-lora", "--out", tmp_path / "o", "--prompts", prompts, "--json"]
    monkeypatch.setattr(sys, "argv", ["fastft", *map(str, line)])
    capfd.readouterr()  # what training the model said
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert not ended.value.code and json.loads(said.out)["form"] == "vllm-lora" and "written and proven" in said.err


def test_a_proof_that_fails_ends_with_exit_code_1(trained, prompts, tmp_path, command, monkeypatch):
    not_scaled(monkeypatch)
    code, lines = command("export", trained("wide")[1], "--to", "merged", "--prompts", prompts, "--out", tmp_path / "o")
    assert code == 1 and len(lines) == 1 and "nothing is published" in lines[0] and list(tmp_path.iterdir()) == []


def start(line, said, limit=None):
    """The command in a process of its own, forked; what it says on stderr goes into the file `said`."""
    pid = os.fork()
    if pid == 0:
        code = 9
        try:
            os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
            sys.argv = ["fastft", *map(str, line)]
            if limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            main()
        except SystemExit as e:
            code = int(e.code or 0)
        finally:
            os._exit(code)
    return pid


def test_a_full_disk_and_a_killed_run(trained, prompts, tmp_path):
    """The system refuses to let a file grow; then runs are killed while they write; the next one succeeds."""
    _, adapter = trained("llama")
    there, said = tmp_path / "there", tmp_path / "said"
    there.mkdir()
    partial = there / ".o.fastft-partial"
    line = ["export", adapter, "--to", "gguf", "--out", there / "o", "--prompts", prompts]
    _, status = os.waitpid(start(line, said, 100000), 0)
    told = [x for x in said.read_text().splitlines() if x and "Loading weights" not in x]
    assert os.waitstatus_to_exitcode(status) == 2 and len(told) == 1 and "no room for" in told[0], told
    assert list(there.iterdir()) == []
    for files in (1, 2):
        pid, end = start(line, said), time.monotonic() + 60
        while not (partial.is_dir() and len(list(partial.iterdir())) >= files) and time.monotonic() < end:
            pass
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        assert [p.name for p in there.iterdir()] == [partial.name] and any(partial.iterdir())
    export(adapter, there / "o", to="gguf", quant="f16", prompts=prompts)
    assert [p.name for p in there.iterdir()] == ["o"]


# --- 4 bits


def test_an_adapter_that_was_trained_in_4_bits(trained, prompts, tmp_path):
    """PEFT's card says it; the merge is onto the expanded base by default, and both are compared."""
    _, adapter = trained("llama")
    four = changed(adapter, tmp_path / "four")
    (four / "README.md").write_text(
        "- load_in_4bit: True\n- bnb_4bit_quant_type: nf4\n- bnb_4bit_use_double_quant: True\n"
    )
    found = export(four, tmp_path / "a", to="merged", prompts=prompts).figures
    other = export(four, tmp_path / "b", to="merged", base_precision="original", prompts=prompts).figures
    assert (found["merged_onto"], other["merged_onto"]) == ("the base in nf4", "the base as it is stored")
    far = [f["proof"]["precisions"] for f in (found, other)]
    assert far[0]["trained"]["error_of_deviation"] < 0.3 * far[0]["original"]["error_of_deviation"]
    assert far[1]["original"]["error_of_deviation"] > 3 * far[0]["trained"]["error_of_deviation"]
    assert far[1]["trained"]["error_of_deviation"] == 0.0


# --- the Hub


class Hub:
    """Stands for HfApi."""

    made, sent = [], []

    def create_repo(self, name, **settings):
        self.made.append((name, settings))

    def upload_folder(self, repo_id, folder_path, commit_message):
        if repo_id == "me/closed":
            raise OSError("403 Forbidden\nfor url: https://example.org")
        self.sent.append((repo_id, sorted(p.name for p in Path(folder_path).iterdir())))
        return f"https://example.org/{repo_id}"


def test_upload_with_a_card(trained, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    _, adapter = trained("wide")
    give = dict(to="gguf", quant="f16", prompts=prompts, private=True)
    figures = export(adapter, tmp_path / "out", push_to_hub="me/it", **give).figures
    assert Hub.made == [("me/it", {"private": True, "exist_ok": True})]
    assert Hub.sent == [("me/it", ["README.md", "export.json", "wide-adapter-f16.gguf"])]
    card = (tmp_path / "out" / "README.md").read_text()
    f16 = figures["proof"]["f16"]
    assert card.startswith("---\nlibrary_name: gguf\n") and f"| f16 | {f16['largest_error'] / f16['std']:.3g} |" in card
    assert "- strings: 200 of 200 equal" in card and str(tmp_path) not in card
    with pytest.raises(
        ExportError, match=r"is written and proven, and could not be uploaded \(403 Forbidden\): hf upload"
    ):
        hub.upload(tmp_path / "out", "me/closed", False)
