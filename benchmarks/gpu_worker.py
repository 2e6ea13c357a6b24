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

import torch

from benchmarks.sheet import Figures, Missing, Red, Sheet
from fastft.tools.bench_timing import Roof, measure_roof

ROOT = Path(__file__).parent.parent
TINY_ROOF = {"n": 128, "copy_bytes": 8 << 20, "seconds": 0.02}
TINY_TESTS = ("tests/kernels/test_weights.py",)


def roof_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    def measure() -> Figures:
        found = measure_roof(device, torch.bfloat16, **TINY_ROOF if tiny else {})
        return {"bf16 TFLOP/s": found.flops / 1e12, "copy GB/s": found.bandwidth / 1e9}

    sheet.run("bf16 product and copy", measure)


def tests_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """Each file's tests are one row, told from pytest's own lines as they come: what ended it loses what was not run."""
    files = TINY_TESTS if tiny else tuple(str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests" / "kernels").glob("test_*.py")))
    sheet.run("tests/kernels", lambda: _pytest(files, sheet.left - 5))


def _pytest(files: tuple[str, ...], seconds: float) -> Figures:
    for needed in ("pytest", "hypothesis"):
        if importlib.util.find_spec(needed) is None:
            raise Missing(f"the tests need {needed}, which is not installed")
    parallel = importlib.util.find_spec("xdist") is not None and torch.cuda.is_available()
    command = [sys.executable, "-m", "pytest", "-v", "-o", "addopts=", "-W", "default", *(["-n", "8"] if parallel else []), *files]
    run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        text, over = run.communicate(timeout=seconds)[0], False
    except subprocess.TimeoutExpired:
        run.kill()
        text, over = run.communicate()[0], True
    return summary(text, over, run.returncode)


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
