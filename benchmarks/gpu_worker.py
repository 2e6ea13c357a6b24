"""The process of one section of `benchmarks.gpu`: imports first, measures after one line of JSON on its standard
input."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# what cuBLAS needs to promise the same bits twice; read when CUDA starts
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import torch

from benchmarks.sheet import Figures, Missing, Red, Sheet
from fastft.tools.bench.timing import Roof, measure_roof

ROOT = Path(__file__).parent.parent
TINY_ROOF = {"n": 128, "copy_bytes": 8 << 20, "seconds": 0.02}
TINY_TESTS = ("tests/kernels/test_weights.py",)
TESTS_SECONDS, WORKERS = 75.0, 12


def roof_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    def measure() -> Figures:
        found = measure_roof(device, torch.bfloat16, **TINY_ROOF if tiny else {})
        return {"bf16 TFLOP/s": found.flops / 1e12, "copy GB/s": found.bandwidth / 1e9}

    sheet.run("bf16 product and copy", measure)


def tests_section(sheet: Sheet, tiny: bool, device: torch.device, roof: Roof) -> None:
    """tests/kernels, a minute on 12 workers; the tests of CUDA graphs; then what has more than 2^31 elements, alone and
    one at a time, with what time is left. Each failure is printed with its error when it happens, and read from
    pytest's own lines as they come: what ends it loses what was not run."""
    files = (
        TINY_TESTS
        if tiny
        else tuple(str(p.relative_to(ROOT)) for p in sorted((ROOT / "tests" / "kernels").glob("test_*.py")))
    )
    sheet.run("tests/kernels", lambda: run_tests(files, "not slow", min(sheet.left - 2, TESTS_SECONDS)))
    if not tiny:
        graphs = ("tests/graphs/test_cuda.py",)
        sheet.run(
            "tests/graphs/test_cuda.py", lambda: run_tests(graphs, "not slow", min(sheet.left - 2, TESTS_SECONDS))
        )
        sheet.run("tests/kernels, more than 2^31 elements", lambda: run_tests(files, "slow", sheet.left - 2), least=10)


def tests_command(files: tuple[str, ...], marked: str) -> list[str]:
    """What runs tests/kernels on a GPU. A file stays with one worker only as long as others are busy (worksteal): its
    kernels are compiled by whoever needs them first, and found in Triton's cache on disk by the others."""
    parallel = importlib.util.find_spec("xdist") is not None and torch.cuda.is_available() and marked == "not slow"
    spread = ["-n", str(min(WORKERS, os.cpu_count() or 1)), "--dist", "worksteal"] if parallel else []
    return [
        sys.executable,
        "-u",
        "-m",
        "pytest",
        "-v",
        "-p",
        "tests.live",
        "-o",
        "addopts=",
        "-W",
        "default",
        "--tb=no",
        "--durations=8",
        "-m",
        marked,
        *spread,
        *files,
    ]


def run_tests(files: tuple[str, ...], marked: str, seconds: float) -> Figures:
    """Raises Red, naming the tests that failed and their errors, where any did or none ran; Missing without pytest."""
    has = lambda package: importlib.util.find_spec(package) is not None
    if not has("pytest"):
        raise Missing("the tests need pytest, which is not installed")
    left_out = (
        []
        if has("hypothesis")
        else [f for f in files if re.search(r"^(from|import) hypothesis", (ROOT / f).read_text(), flags=re.M)]
    )
    command = tests_command(tuple(f for f in files if f not in left_out), marked)
    begun, lines = time.time(), []
    run = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    # its own session: only what it started
    timer = threading.Timer(max(5.0, seconds), lambda: os.killpg(run.pid, signal.SIGKILL))
    timer.start()
    with run.stdout as output:
        for line in output:
            lines.append(line)
            if "FAILED NOW" in line:
                print(line, end="", file=sys.stderr, flush=True)
    code = run.wait()
    over = not timer.is_alive()
    timer.cancel()
    found = summary("".join(lines), over, code) | {"seconds": round(time.time() - begun, 1)}
    return found | ({"left out, for want of hypothesis": ", ".join(Path(f).stem for f in left_out)} if left_out else {})


def summary(text: str, over: bool, code: int) -> Figures:
    """Of pytest's verbose output, with or without xdist. Raises Red, naming the tests that failed, where any did or
    none ran."""
    outcome: dict[str, str] = {}
    errors: list[str] = []
    for line in text.splitlines():
        if "FAILED NOW" in line:
            errors.append(line[line.index("FAILED NOW") + 11 :])
            continue
        test, word = re.search(r"\S+\.py::\S+", line), re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        if test and word and outcome.get(test[0]) not in ("FAILED", "ERROR"):
            outcome[test[0]] = word[0]
    count = lambda *words: sum(w in words for w in outcome.values())
    failed = [t for t, w in outcome.items() if w in ("FAILED", "ERROR")]
    found: Figures = {
        "passed": count("PASSED"),
        "failed": len(failed),
        "skipped": count("SKIPPED"),
        "all ran": not over,
    }
    if failed or not found["passed"]:
        raise Red(f"{found}; exit code {code}; {'; '.join(errors[:40]) or ', '.join(failed[:12]) or text[-300:]}")
    return found


SECTIONS: dict[str, tuple[str, str, dict]] = {  # module, function, what it is given beside the sheet
    "roof": ("gpu_worker", "roof_section", {}),
    "tests": ("gpu_worker", "tests_section", {}),
    "kernels": ("gpu_kernels", "section", {}),
    "mlp": ("gpu_mlp", "section", {}),
    "lora": ("gpu_steps", "section", {}),
    "nf4": ("gpu_steps", "section", {"four_bit": True}),
    "preference": ("gpu_steps", "section", {"preference": True}),
    "fp8": ("gpu_fp8", "section", {}),
    "experts": ("gpu_experts", "section", {}),
    "profile": ("gpu_profile", "section", {}),
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
