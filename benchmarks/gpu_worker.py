"""The process of one section of `benchmarks.gpu`: imports first, measures after one line of JSON on its standard input."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS needs to promise the same bits twice; read when CUDA starts

import torch

from benchmarks.sheet import Figures, Missing, Red, Sheet
from fastft.tools.bench.timing import Roof, measure_roof

ROOT = Path(__file__).parent.parent
TINY_ROOF = {"n": 128, "copy_bytes": 8 << 20, "seconds": 0.02}
TINY_TESTS = ("tests/kernels/test_weights.py",)


def roof_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    def measure() -> Figures:
        found = measure_roof(device, torch.bfloat16, **TINY_ROOF if tiny else {})
        return {"bf16 TFLOP/s": found.flops / 1e12, "copy GB/s": found.bandwidth / 1e9}

    sheet.run("bf16 product and copy", measure)


def tests_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Told from pytest's own lines as they come: what ends it loses what was not run. Large tensors go alone, after the rest."""
    files = TINY_TESTS if tiny else tuple(str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests" / "kernels").glob("test_*.py")))
    sheet.run("tests/kernels", lambda: _pytest(files, "not slow", sheet.left - (5 if tiny else 25)))
    if not tiny:
        sheet.run("tests/kernels, more than 2^31 elements", lambda: _pytest(files, "slow", sheet.left - 5), least=10)


def _pytest(files: tuple[str, ...], marked: str, seconds: float) -> Figures:
    has = lambda package: importlib.util.find_spec(package) is not None
    if not has("pytest"):
        raise Missing("the tests need pytest, which is not installed")
    left_out = [] if has("hypothesis") else [f for f in files if re.search(r"^(from|import) hypothesis", (ROOT / f).read_text(), flags=re.M)]
    parallel = ["-n", "8"] if has("xdist") and torch.cuda.is_available() and marked == "not slow" else []
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-W", "default", "-m", marked, *parallel, *(f for f in files if f not in left_out)]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, over = run.communicate(timeout=max(5.0, seconds))[0], False
    except subprocess.TimeoutExpired:
        run.kill()
        text, over = run.communicate()[0], True
    found = summary(text, over, run.returncode)
    return found | ({"left out, for want of hypothesis": ", ".join(Path(f).stem for f in left_out)} if left_out else {})


def summary(text: str, over: bool, code: int) -> Figures:
    """Of pytest's verbose output, with or without xdist. Raises Red, naming the tests that failed, where any did or none ran."""
    outcome: dict[str, str] = {}
    for line in text.splitlines():
        test, word = re.search(r"\S+\.py::\S+", line), re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if test and word and outcome.get(test[0]) not in ("FAILED", "ERROR"):
            outcome[test[0]] = word[0]
    count = lambda *words: sum(w in words for w in outcome.values())
    failed = [t for t, w in outcome.items() if w in ("FAILED", "ERROR")]
    found: Figures = {"passed": count("PASSED"), "failed": len(failed), "skipped": count("SKIPPED"), "all ran": not over}
    if failed or not found["passed"]:
        raise Red(f"{found}; exit code {code}; {', '.join(failed[:12]) or text[-300:]}")
    return found


SECTIONS: dict[str, tuple[str, str, dict]] = {  # module, function, what it is given beside the sheet
    "roof": ("gpu_worker", "roof_section", {}),
    "tests": ("gpu_worker", "tests_section", {}),
    "kernels": ("gpu_kernels", "section", {}),
    "lora": ("gpu_steps", "section", {}),
    "nf4": ("gpu_steps", "section", {"four_bit": True}),
    "preference": ("gpu_steps", "section", {"preference": True}),
    "host": ("gpu_host", "host_section", {}),
    "planner": ("gpu_host", "planner_section", {}),
    "determinism": ("gpu_host", "determinism_section", {}),
}


def main(argv: list[str]) -> int:
    name, path, tiny = argv[0], Path(argv[1]), "--tiny" in argv
    module, function, more = SECTIONS[name]
    section = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    line = sys.stdin.readline()
    if not line:
        return 0  # the sections before it took all the time
    go = json.loads(line)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)
    if known := go["roof"]:
        roof = Roof(known["bf16 TFLOP/s"] * 1e12, known["copy GB/s"] * 1e9, "bfloat16")
    else:  # its section failed, was not asked for, or is this one
        roof = measure_roof(device, torch.bfloat16, **TINY_ROOF if tiny else {})
    section(Sheet(path, name, go["until"], tuple(go["done"])), tiny, device, roof, **more)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
