"""What must hold at the end of a demo, each as a `DemoCheck` with its evidence.

Loss curves. Training amplifies rounding, so two correct runs part slowly; how far is measured, not assumed. The
reference is the same stock run (same adapter bits, same batches) in float64, or in float32 where the runs are in 16
bit. The eager error is stock's: at each step the larger of the errors of stock and of stock with the rows of every
batch reversed and padded further, which is the same mathematics in another order of summation. The judge then asks of
fastft what it asks of a kernel: max and RMS error over the curve at most twice that, plus a unit in the last place.
Where the reference does not fit into the GPU, the distance of fastft from stock is judged by the distance of reordered
stock from stock."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fastft.tools.demo.training import DemoSettings, TrainingRun, load_stock, reference_dtype
from fastft_kernels.numerics import Verdict, compare

LEAST_DROP = 0.20


@dataclass(frozen=True)
class DemoCheck:
    """One thing that was promised. `evidence` is the figure that decided."""

    name: str
    ok: bool
    evidence: str

    def to_dict(self) -> dict:
        return asdict(self)


def judge_curves(
    fast: TrainingRun, stock: TrainingRun, reordered: TrainingRun, reference: TrainingRun | None
) -> Verdict:
    """The judge's verdict on two loss curves (see the module docstring). Curves that are empty or of different length
    fail."""
    nan = float("nan")
    ours, a, b = (torch.tensor(r.losses, dtype=torch.float32) for r in (fast, stock, reordered))
    if not len(ours) == len(a) == len(b) == len(reference.losses if reference else a) or not len(ours):
        return Verdict(False, "losses", nan, nan, nan, nan, nan, "the curves have different lengths or none")
    if reference is None:
        return compare(ours, a.double(), b, "losses")
    t = torch.tensor(reference.losses, dtype=torch.float64)
    eager = torch.where((a.double() - t).abs() >= (b.double() - t).abs(), a, b)
    return compare(ours, t, eager, "losses")


def check_curves(
    fast: TrainingRun, stock: TrainingRun, reordered: TrainingRun, reference: TrainingRun | None
) -> DemoCheck:
    """Both runs' losses, step by step, judged against the float64 run."""
    verdict = judge_curves(fast, stock, reordered, reference)
    against = reference.name.removeprefix("stock in ") if reference is not None else "stock"
    noise = "stock's" if reference is not None else "reordered stock's"
    return DemoCheck(
        "loss curves agree",
        verdict.ok,
        f"largest error against {against} {verdict.error:.1e}, {noise} {verdict.eager_error:.1e} "
        f"{verdict.reason}".strip(),
    )


def check_drop(before: float, after: float, least: float) -> DemoCheck:
    """Did the held-out loss fall by at least `least`?"""
    drop = 1 - after / before
    return DemoCheck(
        "held-out loss drops",
        drop >= least and after < before,
        f"{before:.3f} -> {after:.3f} ({drop:.0%}, want {least:.0%})",
    )


def trainable(model) -> dict[str, torch.Tensor]:
    """The parameters that train, by name."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def check_start(fast: dict[str, torch.Tensor], stock: dict[str, torch.Tensor]) -> DemoCheck:
    """Do both runs start from the same bits?"""
    same = fast.keys() == stock.keys() and all(torch.equal(fast[k], stock[k]) for k in stock)
    return DemoCheck("adapter starts from stock's bits", bool(same) and len(stock) > 0, f"{len(stock)} tensors")


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits of `ids` [rows, tokens] in eval mode, in the model's own dtype, on the CPU."""
    was_training = model.training
    model.eval()
    out = model(input_ids=ids.to(next(model.parameters()).device)).logits.cpu()
    model.train(was_training)
    return out


# Plain transformers + PEFT, in a process that never imports fastft: the logits in the checkpoint's own dtype, and in a
# higher one.
RELOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
folder, ids_file, out_file, threads, high, four_bit = sys.argv[1:7]
torch.set_num_threads(int(threads))
import transformers
from peft import PeftConfig, PeftModel
transformers.utils.logging.disable_progress_bar()
base = PeftConfig.from_pretrained(folder).base_model_name_or_path
config = transformers.AutoConfig.from_pretrained(base)
loader = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModelForCausalLM)
ids, results = load_file(ids_file)["ids"], {}
for name, dtype in (("plain", "auto"), ("high", getattr(torch, high))):
    kwargs = {"dtype": dtype}
    if torch.cuda.is_available():
        kwargs["device_map"] = {"": 0}
    if four_bit == "1":
        compute = torch.bfloat16 if name == "plain" and (
            not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)) else torch.float16
        kwargs["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32 if name == "high" else compute)
    model = PeftModel.from_pretrained(loader.from_pretrained(base, **kwargs), folder).eval()
    if name == "high" and four_bit != "1":
        model = model.to(dtype)
    with torch.no_grad():
        results[name] = model(input_ids=ids.to(next(model.parameters()).device)).logits.cpu().contiguous()
    del model
assert "fastft" not in sys.modules and "fastft_kernels" not in sys.modules
save_file(results, out_file)
"""


def check_reload(job: DemoSettings, adapter: Path, live: torch.Tensor, ids: torch.Tensor) -> DemoCheck:
    """Logits of the patched, trained model against those of the saved adapter on its base in plain transformers +
    PEFT."""
    from safetensors.torch import load_file, save_file

    ids_file, out_file = job.out / "trainer" / "ids.safetensors", job.out / "trainer" / "logits.safetensors"
    ids_file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"ids": ids}, ids_file)
    high = str(reference_dtype(job)).removeprefix("torch.")
    arguments = [str(adapter), str(ids_file), str(out_file), str(torch.get_num_threads()), high, str(int(job.four_bit))]
    name = "adapter reloads in plain transformers + PEFT"
    run = subprocess.run([sys.executable, "-c", RELOAD, *arguments], capture_output=True, text=True)
    if run.returncode != 0:
        return DemoCheck(
            name,
            False,
            f"the reload failed: {run.stderr.strip().splitlines()[-1] if run.stderr.strip() else run.returncode}",
        )
    there = load_file(out_file)
    verdict = compare(live.float(), there["high"].double(), there["plain"].float(), "logits")
    return DemoCheck(
        name,
        verdict.ok,
        f"largest error of logits {verdict.error:.1e}, plain's {verdict.eager_error:.1e} {verdict.reason}".strip(),
    )


def check_undo(job: DemoSettings, unpatched, trained: dict[str, torch.Tensor], ids: torch.Tensor) -> DemoCheck:
    """A model that was patched, trained and unpatched against one that was never patched and given the same adapter:
    the same bits, the same classes."""
    fresh = load_stock(job)
    own = dict(fresh.named_parameters())
    for key, value in trained.items():
        own[key].data = value.to(own[key].device)
    classes = {n: type(m) for n, m in fresh.named_modules()} == {n: type(m) for n, m in unpatched.named_modules()}
    a, b = logits(unpatched, ids), logits(fresh, ids)
    same = torch.equal(a, b)
    what = "logits bit-identical" if same else f"logits differ by {float((a.double() - b.double()).abs().max()):.1e}"
    return DemoCheck(
        "unpatched model is stock again", same and classes, f"{what}, classes {'the same' if classes else 'differ'}"
    )
