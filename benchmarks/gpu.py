"""Everything that needs a GPU in one call of under 9 minutes: python -m benchmarks.gpu [--tiny] [--only SECTION ...]
[--out FOLDER]

roof         what this device does: bf16 products and copies
tests        tests/kernels on this device, in float32, float16 and bfloat16, and the tests of CUDA graphs
kernels      each kernel at an 8B decoder's widths: time with cold caches, percent of the roof, error against eager's
mlp          an adapted MLP in one function and in three, and its passes between the products
lora, nf4    LoRA steps of an 8B shape (random weights, made here), bf16 and NF4: 4x2048, Alpaca-like lengths, 1x8k,
             1x32k
preference   DPO and GRPO log-probability steps of the same
fp8          an FP8 base: products of the 8B shapes beside bf16's, then the 4x2048 step beside our bf16 one
experts      LoRA steps of four layers of a 30B-A3B shape, adapters on every expert
profile      eight layers of the 8B shape: where the time of a step goes, by kind of work
host         a 0.6B shape at 2x512: the host's time and launches, in a plain loop and through SFTTrainer
determinism  two runs, the same bits; where not, the first operation that does not repeat, and whose it is
planner      predicted against measured memory

Each section is a process of its own with its share of the time; what one leaves is the next ones'. While one measures,
the next imports. Rows are written as they come: gpu-DEVICE-DATE.json and .md in benchmarks/results (with --tiny: in a
temporary folder, and all of it on small shapes, on a CPU as well). What ran out of time, memory or luck is a row that
says so. Exit code 1 where a row is red or failed."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.header import header
from benchmarks.sheet import Row, markdown, read, shown

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parent.parent
SECONDS = 520.0


class Section(NamedTuple):
    """seconds: its share. attempts: processes that it may cost, when one dies in the middle of a row."""

    seconds: float
    attempts: int = 3


SECTIONS = {
    "roof": Section(15, 1),
    "tests": Section(110, 1),
    "kernels": Section(80),
    "mlp": Section(45),
    "lora": Section(90),
    "nf4": Section(80),
    "preference": Section(50),
    "fp8": Section(60),
    "experts": Section(40),
    "profile": Section(40),
    "host": Section(40),
    "determinism": Section(40),
    "planner": Section(60),
}


class Worker:
    """One section's process: it imports at once and measures when it is told to."""

    def __init__(self, section: str, tiny: bool, rows: Path, log: Path):
        self.section, self.rows, self.log = section, rows, log.open("a")
        command = [sys.executable, "-m", "benchmarks.gpu_worker", section, str(rows), *(["--tiny"] if tiny else [])]
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=self.log,
            stderr=self.log,
            text=True,
            start_new_session=True,
        )

    def go(self, until: float, done: list[str], roof: dict) -> None:
        self.told = {path: path.stat().st_size for path in (self.rows, Path(self.log.name)) if path.exists()}
        try:
            self.process.stdin.write(json.dumps({"until": until, "done": done, "roof": roof}) + "\n")
            self.process.stdin.close()
        except BrokenPipeError:  # it died importing: wait() says so
            return

    def wait(self, until: float) -> int | None:
        """Its exit code; None where it was still running at `until` and was ended."""
        while True:
            try:
                code = self.process.wait(min(0.5, max(0.1, until - time.time())))
            except subprocess.TimeoutExpired:
                self._tell()
                if time.time() < until:
                    continue
                self.end()
                code = None
            self._tell()
            return code

    def _tell(self) -> None:
        """Prints what is new: rows, and tests that failed, with their errors."""
        for path in (Path(self.log.name), self.rows):
            text = path.read_bytes()[self.told.get(path, 0) :] if path.exists() else b""
            text = text[: text.rfind(b"\n") + 1]
            self.told[path] = self.told.get(path, 0) + len(text)
            for line in text.decode(errors="replace").splitlines():
                if "FAILED NOW" in line:
                    print(f"{self.section}: {line}", file=sys.stderr, flush=True)
                elif path == self.rows and '"row"' in line:
                    row = json.loads(line)["row"]
                    known = ", ".join(f"{k} {shown(v)}" for k, v in row["figures"].items())
                    print(
                        f"{row['section']}: {row['name']}: {row['state']} {known} {row['note']}".rstrip(),
                        file=sys.stderr,
                        flush=True,
                    )

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: only what it started
            self.process.wait()
        with contextlib.suppress(BrokenPipeError):  # what was never sent to one that died
            self.process.stdin.close()
        self.log.close()


class Result:
    """The rows so far, and the two files."""

    def __init__(self, path: Path, head: dict[str, str]):
        self.path, self.head, self.rows = path, head, []
        self.seconds: dict[str, float] = {}

    def add(self, rows: list[Row]) -> None:
        self.rows += rows
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"header": self.head, "seconds": self.seconds, "rows": [asdict(r) for r in self.rows]}
        for path, text in (
            (self.path, json.dumps(found, indent=1) + "\n"),
            (self.path.with_suffix(".md"), self.markdown()),
        ):
            new = path.with_suffix(path.suffix + ".new")
            new.write_text(text)
            new.replace(path)

    def markdown(self) -> str:
        lines = [", ".join(f"{k} {v}" for k, v in self.head.items() if k != "command"), "", f"`{self.head['command']}`"]
        return "\n".join([*lines, *markdown(self.rows)]) + "\n"


def run(names: list[str], tiny: bool, result: Result, total: float, scratch: Path) -> None:
    """Every section in its order, within `total` seconds."""
    end = time.time() + total
    start = lambda name: Worker(name, tiny, scratch / f"{name}.jsonl", scratch / f"{name}.log")
    waiting: dict[str, Worker] = {}
    roof: dict = {}
    spare = total - sum(SECTIONS[n].seconds for n in names)
    try:
        for i, name in enumerate(names):
            begun = time.time()
            until = min(end, begun + SECTIONS[name].seconds + max(0.0, spare))
            if until - begun < 5:
                result.add([Row(name, "all of it", "not run", note="no time was left")])
                continue
            worker = waiting.pop(name, None) or start(name)
            if i + 1 < len(names):
                waiting[names[i + 1]] = start(names[i + 1])
            rows = _section(name, worker, start, until, roof)
            roof = next((r.figures for r in rows if r.section == "roof" and r.state == "ok"), roof)
            result.seconds[name] = round(time.time() - begun, 1)
            spare += SECTIONS[name].seconds - result.seconds[name]
            result.add(rows)
            print(f"{name}: {result.seconds[name]:.0f} s, {len(rows)} rows", file=sys.stderr, flush=True)
    finally:
        for worker in waiting.values():
            worker.end()


def _section(name: str, worker: Worker, start, until: float, roof: dict) -> list[Row]:
    """The section's rows. A process that dies in the middle of a row costs that row: another goes on after it."""
    path = worker.rows
    for attempt in range(SECTIONS[name].attempts):
        done = [r.name for r in read(path)[0]]
        worker.go(until, done, roof)
        code = worker.wait(until + 3)
        worker.end()
        rows, begun = read(path)
        why = (
            "it was ended when the section's time was over"
            if code is None
            else f"the process ended with {code}: {_tail(path.with_suffix('.log'))}"
        )
        if begun is not None:
            with path.open("a") as f:
                f.write(
                    json.dumps({"row": asdict(Row(name, begun, "not run" if code is None else "error", note=why))})
                    + "\n"
                )
        if code == 0 or code is None or begun is None or attempt + 1 == SECTIONS[name].attempts:
            break
        worker = start(name)
    rows, _ = read(path)
    return rows if rows else [Row(name, "all of it", "error", note=why)]


def _tail(log: Path) -> str:
    lines = [x for x in log.read_text(errors="replace").splitlines() if x.strip()] if log.exists() else []
    return lines[-1][-300:] if lines else ""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, on a CPU as well; nothing is written to benchmarks/results"
    )
    parser.add_argument("--only", choices=SECTIONS, nargs="+", default=list(SECTIONS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all sections together")
    options = parser.parse_args(argv)
    if not torch.cuda.is_available() and not options.tiny:
        print("benchmarks.gpu: this machine has no GPU; --tiny runs the same code on small shapes", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    words = " ".join(["python -m benchmarks.gpu", *(argv if argv is not None else sys.argv[1:])])
    head = header(device, words)
    scratch = Path(tempfile.mkdtemp(prefix="fastft-bench-"))
    out = options.out or (scratch if options.tiny else RESULTS)
    short = re.sub(r"[^a-z0-9]+", "-", head["device"].split("(")[0].split(",")[0].lower().replace("nvidia", "")).strip(
        "-"
    )
    result = Result(out / f"gpu-{short}-{datetime.date.today().isoformat()}.json", head)
    run([n for n in SECTIONS if n in options.only], options.tiny, result, options.seconds, scratch)
    print(result.markdown())
    print(result.path)
    return 1 if any(r.state in ("red", "error") for r in result.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
