"""fastft export: for each family, adapters of every kind, as llama.cpp and transformers run the result."""

import json

import pytest

pytest.importorskip("llama_cpp", reason="pip install -e '.[gguf]'")

from fastft.tools.export.export import export

FAMILIES = ["llama", "qwen3", "gemma3_text", "mistral", "phi3"]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory):
    from tests.tools.export_models import texts

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
    found = export(adapter, tmp_path / "out", to="merged", prompts=prompts).figures["proof"]
    logits = found["logits"]
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
