"""Every architecture: is the patched model the stock model, and what of it is swapped?

    python -m benchmarks.models --write docs/MODELS.md            the table, from tiny models of this file's own making
    python -m benchmarks.models --builder FILE --jobs 2 --log L   the same over another set (FILE: MODEL_TYPES,
        build, batch, loss_of)

One architecture is a tiny random model in float32. For full fine-tuning and again with LoRA on all its linears: the
loss and every gradient of the patched copy against the stock copy, judged by `fastft_kernels.numerics.compare` beside a
float64 run of stock; where it has experts, LoRA on these too, and both in bfloat16 (`model_experts`); greedy generation
with a cache, token by token; and after `unpatch` classes, __dict__ keys, state_dict and loss as before, bit for bit.
Results are appended to the log as JSON lines, one per architecture, as they come in. The table keeps the rows of the
one that is there for architectures that the log lacks."""

from __future__ import annotations

import argparse
import contextlib
import copy
import importlib.util
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter, defaultdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from torch import nn

from benchmarks import model_experts
from fastft.proving.float64 import float64_reference
from fastft_kernels.numerics import compare

KINDS = ("norm", "rotary", "mlp", "linear group", "head")
JUDGED = ("full", "lora", "image", *model_experts.WAYS)
NEW_TOKENS = 8
RANK = 16  # up to 8 the CPU's narrow product has half the error of any wider one, and of the stacked product of a group
DRAWS, FEW_DRAWS, LARGE = 8, 3, 1 << 22  # over which errors are pooled, for models of fewer and of more parameters
MANY_DRAWS, MANY = 24, 512  # of a model with so many gradients one would meet, by chance, an unlucky eighth of a pool
MOVE = 1e-4


def load_builder(path: str | None):
    if path is None:
        from benchmarks import tiny

        return tiny
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


Results = tuple[dict[str, torch.Tensor], dict[str, "torch.Tensor | None"]]


def run(model: nn.Module, inputs: dict, loss_of, seed: int = 1) -> Results:
    """({"loss": loss}, gradients by parameter name), from the same random state every time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed)
    loss = loss_of(model(**inputs))
    loss.backward()
    grads = {
        n: None if p.grad is None else p.grad.detach().clone() for n, p in model.named_parameters() if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return {"loss": loss.detach().clone()}, grads


@contextlib.contextmanager
def moved(model: nn.Module, draw: int):
    """Every parameter moved by a ten-thousandth of itself, the same way in every copy of the model, and back again bit
    for bit."""
    generator = torch.Generator().manual_seed(draw)
    kept = [(p, p.detach().clone()) for _, p in model.named_parameters() if p.is_floating_point()]
    try:
        with torch.no_grad():
            for p, value in kept if draw else ():
                by = max(MOVE, torch.finfo(value.dtype).eps)  # in 16 bits a smaller move is none
                p.copy_(value * (1 + by * torch.randn(value.shape, generator=generator)))
        yield model
    finally:
        with torch.no_grad():
            for p, value in kept:
                p.copy_(value)


def draws_of(model: nn.Module) -> int:
    if sum(p.numel() for p in model.parameters()) >= LARGE:
        draws = FEW_DRAWS
    else:
        draws = DRAWS if sum(p.requires_grad for p in model.parameters()) < MANY else MANY_DRAWS
    narrow = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
    return min(3 * draws, MANY_DRAWS) if narrow else draws  # the loss is one number, in 16 bits of much noise


def run_all(
    model: nn.Module, inputs: dict, loss_of, reference: bool = False, choices: model_experts.Choices | None = None
) -> Results:
    """`run` on several neighbours of the model, each result beside the same result of the others: (draws, ...).
    choices: noted by the float64 run, taken by the others."""
    runs, twin = [], doubled(model) if reference else model
    for draw in range(draws_of(model)):
        with moved(model, draw), choices.run(draw, reference) if choices else contextlib.nullcontext():
            if not reference:
                runs.append(run(model, inputs, loss_of))
                continue
            with torch.no_grad():
                for wide, p in zip(twin.parameters(), model.parameters(), strict=True):
                    wide.copy_(p)
            with float64_reference():
                runs.append(run(twin, in_float64(inputs), loss_of))

    def pooled(values: list[torch.Tensor | None]) -> torch.Tensor | None:
        some = next((v for v in values if v is not None), None)  # an expert that no token of a draw reaches: zero there
        return some if some is None else torch.stack([torch.zeros_like(some) if v is None else v for v in values])

    return tuple({k: pooled([r[i][k] for r in runs]) for k in runs[0][i]} for i in (0, 1))


def in_float64(inputs: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}


def doubled(model: nn.Module) -> nn.Module:
    """A float64 copy, buffers and plain tensor attributes included; experts one by one, as the grouped product has no
    float64."""
    model = copy.deepcopy(model).double()
    if hasattr(
        base := model.get_base_model() if hasattr(model, "peft_config") else model, "set_experts_implementation"
    ):
        base.set_experts_implementation("eager")
    for m in model.modules():
        for k, v in list(m.__dict__.items()):
            if isinstance(v, torch.Tensor) and v.is_floating_point():
                m.__dict__[k] = v.double()
    return model


def judge(
    stock: nn.Module, ours: Results, eager: Results, inputs: dict, loss_of, reference: Results | None = None
) -> dict:
    """Worst verdict over the loss and all gradients, each pooled over the draws of both sides. The rounding error of a
    scalar, or of the worst-conditioned entry of a gradient, is one throw of a die, and may be zero on one side:
    neighbours of the model keep the condition and throw again, so that the pooled errors say which of two computations
    is the more exact. Where float64 does not run there is no reference, and nothing passes."""
    try:
        reference = reference or run_all(stock, inputs, loss_of, reference=True)
    except Exception as e:
        return {
            "reference": "none",
            "checked": 0,
            "worst": None,
            "bad": [f"no float64 reference: {type(e).__name__}: {str(e)[:150]}"],
        }
    if low := [k for d in reference for k, t in d.items() if t is not None and t.dtype != torch.float64]:
        why = f"no float64 reference: {low[0]} is no float64"
        return {"reference": "none", "checked": 0, "worst": None, "bad": [why]}
    bad, worst, checked = [], 0.0, 0
    for i in (0, 1):
        if set(ours[i]) != set(reference[i]):
            bad.append(f"keys differ: {sorted(set(ours[i]) ^ set(reference[i]))[:3]}")
            continue
        for name, t in reference[i].items():
            o, e = ours[i][name], eager[i][name]
            if o is None or e is None:
                if (o is None) != (e is None):
                    bad.append(f"{name}: a gradient is missing on one side")
                continue
            checked += 1
            verdict = compare(o, torch.zeros_like(e, dtype=torch.float64) if t is None else t, e, name)
            if not verdict:
                bad.append(str(verdict))
            elif verdict.ulp:
                worst = max(worst, verdict.error / (2 * verdict.eager_error + verdict.ulp))
    return {"reference": "float64", "checked": checked, "worst": worst, "bad": bad}


def snapshot(model: nn.Module) -> dict:
    return {n: (type(m), tuple(sorted(m.__dict__)), tuple(m._buffers), m.training) for n, m in model.named_modules()}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) or bool((torch.isnan(a[k]) & torch.isnan(b[k])).any()) for k in a
    )


def one_way(stock: nn.Module, inputs: dict, loss_of, choices: model_experts.Choices | None = None) -> dict:
    """Patch, judge, unpatch on copies of `stock`; what the report said. choices: where all runs are to make the float64
    run's."""
    import fastft

    reference = run_all(stock, inputs, loss_of, True, choices) if choices else None
    once = lambda: choices.run(0) if choices else contextlib.nullcontext()
    eager = run_all(stock, inputs, loss_of, choices=choices)
    with once():
        again = run(stock, inputs, loss_of)
    deterministic = torch.equal(eager[0]["loss"][0], again[0]["loss"])
    model = copy.deepcopy(stock)
    before, bits = snapshot(model), {k: v.clone() for k, v in model.state_dict().items()}
    rng = torch.get_rng_state()
    start = time.perf_counter()
    fastft.patch(model)
    seconds = time.perf_counter() - start
    out: dict = {"seconds": round(seconds, 2), "deterministic": deterministic, "problems": []}
    if not torch.equal(rng, torch.get_rng_state()):
        out["problems"].append("patch moved the random state")
    ours = run_all(model, inputs, loss_of, choices=choices)
    out |= judge(stock, ours, eager, inputs, loss_of, reference)
    report = fastft.report(model)
    out["report"] = report.to_dict()
    if mute := [r for r in report if not r.is_swapped and not r.reason]:
        out["problems"].append(f"{mute[0].kind} {mute[0].group} stays stock without a reason")
    fastft.unpatch(model)
    after = snapshot(model)
    odd = [n for n in before if before[n] != after.get(n)]
    if odd:
        out["problems"].append(f"unpatch left {odd[:3]}: {before[odd[0]]} -> {after.get(odd[0])}")
    if not same_bits(bits, model.state_dict()):
        out["problems"].append("unpatch: state_dict differs")
    with once():
        last = run(model, inputs, loss_of)
    if deterministic and not same_bits(again[0], last[0]):
        out["problems"].append("unpatch: the loss differs in its bits")
    return out


def generates(stock: nn.Module, inputs: dict) -> str:
    """Empty when the patched model generates stock's tokens, a reason where stock itself does not generate, else what
    differs."""
    import fastft

    if not hasattr(stock, "generate") or "input_ids" not in inputs:
        return "stock does not generate"
    keep = {k: v for k, v in inputs.items() if k not in ("labels", "use_cache")}
    settings = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, use_cache=True)

    def tokens(model):
        torch.manual_seed(0)
        with torch.no_grad():
            return model.eval().generate(**keep, **settings)

    try:
        expected = tokens(copy.deepcopy(stock))
    except Exception as e:
        return f"stock does not generate: {type(e).__name__}"
    model = fastft.patch(copy.deepcopy(stock))
    got = tokens(model)
    if isinstance(expected, torch.Tensor) and torch.equal(expected, got):
        return ""
    return "other tokens than stock" if isinstance(expected, torch.Tensor) else ""


def with_lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, config)


def with_images(model: nn.Module, builder) -> dict:
    """As full fine-tuning, with one image per row; {"stock": why} for models, or builders, that know no such input."""
    try:
        inputs = builder.image_batch(model)
        run(model, inputs, builder.loss_of)
    except Exception as e:
        return {"stock": f"{type(e).__name__}: {str(e)[:150]}"}
    try:
        return one_way(copy.deepcopy(model), inputs, builder.loss_of)
    except Exception:
        return {"exception": traceback.format_exc()[-1500:]}


def check(key: str, builder) -> dict:
    """All checks of one architecture. Exceptions are results, with their last frames."""
    row: dict = {"key": key}
    try:
        model = builder.build(key, 0)
        inputs = builder.batch(model)
        run(model, inputs, builder.loss_of)
    except Exception as e:
        return row | {"skipped": f"{type(e).__name__}: {str(e)[:200]}"}
    row["class"] = type(model).__name__
    for way in ("full", "lora"):
        try:
            stock = copy.deepcopy(model)
            if way == "lora":
                try:
                    stock = with_lora(stock)
                    run(stock, inputs, builder.loss_of)
                except Exception as e:
                    row[way] = {"stock": f"stock PEFT: {type(e).__name__}: {str(e)[:150]}"}
                    continue
            row[way] = one_way(stock, inputs, builder.loss_of)
        except Exception:
            row[way] = {"exception": traceback.format_exc()[-1500:]}
    row["image"] = with_images(model, builder)
    row |= model_experts.check_experts(model, inputs, builder.loss_of, run, one_way)
    try:
        row["generate"] = generates(model, inputs)
    except Exception:
        row["generate"] = "exception: " + traceback.format_exc()[-1500:]
    row["present"] = present(model)
    return row


def present(model: nn.Module) -> dict[str, int]:
    """How many modules have what each kind looks for, by other means than the recognisers': names, as this is a
    table."""
    from fastft.rotary.rotary import is_rotary
    from fastft.swapping.rebind import global_calls

    count: dict[str, int] = defaultdict(int)
    for module in model.modules():
        name = type(module).__name__.lower()
        leaf = not any(True for _ in module.children())
        count["norm"] += leaf and "norm" in name and "batchnorm" not in name
        count["rotary"] += any(
            "rotary" in n or "rope" in n
            for n, f in global_calls(type(module).forward).items()
            if is_rotary(f) or "apply" in n
        )
        linears = sum(type(c) is nn.Linear for c in module.children())
        count["mlp"] += (
            linears in (2, 3) and any(s in name for s in ("mlp", "feedforward", "ffn")) and "attention" not in name
        )
    count["linear group"] = int(any(type(m) is nn.Linear for m in model.modules()))
    count["head"] = int(getattr(model, "get_output_embeddings", lambda: None)() is not None)
    return dict(count)


def worker(keys: list[str], builder_path: str | None, log: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    commit = git.stdout.strip() or "no repository"
    builder = load_builder(builder_path)
    for key in keys:
        start = time.perf_counter()
        row = check(key, builder) | {"wall": round(time.perf_counter() - start, 1), "commit": commit}
        with open(log, "a") as f:
            f.write(json.dumps(row) + "\n")


def verdict(row: dict) -> str:
    """One word or the first thing that is wrong."""
    if "skipped" in row:
        return f"not built: {row['skipped']}"
    for way in JUDGED:
        r = row.get(way, {})
        if "exception" in r:
            return f"{way}: EXCEPTION {r['exception'].strip().splitlines()[-1]}"
        if r.get("problems"):
            return f"{way}: {r['problems'][0]}"
        if r.get("bad") and r["deterministic"]:
            return f"{way}: WRONG ({len(r['bad'])}) {r['bad'][0]}"
    if row["generate"] and not row["generate"].startswith("stock"):
        return f"generate: {row['generate'].strip().splitlines()[-1]}"
    return "ok"


def rows_of(row: dict, way: str) -> list[dict]:
    report = row.get(way, {}).get("report", {})
    return [r | {"swapped": True} for r in report.get("swapped", ())] + [
        r | {"swapped": False} for r in report.get("stock", ())
    ]


def coverage(results: list[dict]) -> dict[str, tuple[int, int, int, list[str]]]:
    """Per kind: (models that have it, models in which something of it is swapped, models in which all of it is, models
    without)."""
    out = {}
    for kind in KINDS:
        have = some = every = 0
        missing = []
        for row in results:
            if "skipped" in row:
                continue
            mine = [r for way in ("full", "lora") for r in rows_of(row, way) if r["kind"] == kind]
            if not mine and not row.get("present", {}).get(kind):
                continue
            have += 1
            some += any(r["swapped"] for r in mine)
            every += bool(mine) and all(r["swapped"] for r in mine)
            if not any(r["swapped"] for r in mine):
                missing.append(row["key"])
        out[kind] = (have, some, every, missing)
    return out


def summary(results: list[dict]) -> str:
    lines = []
    verdicts = {r["key"]: verdict(r) for r in results}
    good = sum(v == "ok" for v in verdicts.values())
    built = sum(not v.startswith("not built") for v in verdicts.values())
    lines.append(f"{good} of {built} built models right ({len(results) - built} not built)")
    lines += [f"  {k}: {v[:220]}" for k, v in verdicts.items() if v != "ok"]
    for kind, (have, some, every, missing) in coverage(results).items():
        share = f"{100 * some / have:.1f}%" if have else "-"
        lines.append(f"{kind}: in {have}, swapped in {some} ({share}), wholly in {every}; without: {' '.join(missing)}")
    return "\n".join(lines)


def images_of(row: dict) -> str:
    """The table's cell: whether images were trained on, too."""
    way = row.get("image", {})
    return (
        ""
        if "stock" in way or not way
        else "no"
        if "exception" in way or way.get("bad") or way.get("problems")
        else "yes"
    )


def experts_of(row: dict) -> str:
    """The table's cell: how many modules of experts are swapped, of how many; and of PEFT's wrappers around them, where
    some are not."""
    full, lora = (
        [(r["count"], r["swapped"]) for r in rows_of(row, way) if r["kind"] == "experts"] for way in ("full", "experts")
    )
    share = lambda rows: f"{sum(n for n, done in rows if done)}/{sum(n for n, _ in rows)}"
    adapters = "" if all(done for _, done in lora) else f" (with adapters {share(lora)})"
    return share(full) + adapters if full else ""


def absent(results: list[dict], keys: list[str], older: str = "") -> list[str]:
    """Lines about the architectures that have no row; those that did not run keep the line of the older table."""
    ran = {r["key"]: r for r in results}
    was = {line[2:].partition(":")[0]: line for line in older.splitlines() if line.startswith("- ")}
    was |= {":".join(line[2:].split(":")[:2]): line for line in older.splitlines() if line.startswith("- ")}
    rows = kept_rows(older, ["architecture"])
    lines = []
    for k in keys:
        if k in ran and "skipped" in ran[k]:
            lines.append(f"- {k}: {' '.join(ran[k]['skipped'].split())[:160]}")
        elif k not in ran and k not in rows:
            lines.append(was.get(k, f"- {k}: not run"))
    return (
        ["", "Without a row, and why (what stock or its builder raises on this machine):", "", *lines] if lines else []
    )


def kept_rows(text: str, columns: list[str]) -> dict[str, str]:
    """Rows of an older table by architecture, with an empty cell for each column that it does not have."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    if not rows:
        return {}
    split = lambda line: [c.strip() for c in line.strip("|").split(" | ")]
    names, kept = split(rows[0]), {}
    for line in rows[1:]:
        cells = dict(zip(names, split(line)))
        kept[cells["architecture"]] = "| " + " | ".join(cells.get(c, "") for c in columns) + " |"
    return kept


def table(results: list[dict], keys: list[str], builder: str | None, older: str = "") -> str:
    """docs/MODELS.md. keys: of the architectures that the builder names. older: the table that was there."""
    import peft
    import transformers

    columns = ["architecture", "right", "images", *KINDS, "experts", "stays stock, and why"]
    ran = {r["key"] for r in results}
    lines = {k: line for k, line in kept_rows(older, columns).items() if k not in ran}
    commits = Counter(r.get("commit", "a commit not noted") for r in results)
    commits["an earlier table, without this column of experts where it is empty"] += len(lines)
    right = sum(line.split(" | ")[1] == "yes" for line in lines.values()) + sum(verdict(r) == "ok" for r in results)
    for row in results:
        if "skipped" in row:
            continue
        way = "lora" if rows_of(row, "lora") else "full"
        cells, why = [], []
        for kind in KINDS:
            mine = [r for r in rows_of(row, way) if r["kind"] == kind]
            total, done = sum(r["count"] for r in mine), sum(r["count"] for r in mine if r["swapped"])
            there = total or row.get("present", {}).get(kind, 0)
            cells.append(f"{done}/{there}" if there else "")
        for r in rows_of(row, way):
            if not r["swapped"]:
                why.append(f"{r['kind']} {r['group']}: {r['reason']}")
        said, reasons = verdict(row), "; ".join(dict.fromkeys(why))[:300].replace("|", "/")
        cells = ["yes" if said == "ok" else said[:80], images_of(row), *cells, experts_of(row), reasons]
        lines[row["key"]] = f"| {row['key']} | {' | '.join(cells)} |"
    missing = absent(results, keys, older)
    command = f"python -m benchmarks.models{' --builder FILE' if builder else ''} --write docs/MODELS.md"
    head = [
        "# Architectures",
        "",
        f"{len(lines) + sum(not x.endswith(': not run') for x in missing[3:])} of {len(keys)} architectures ran; "
        f"{len(lines)} of them build as tiny models on this machine, {right} of these are right.",
        "",
        f"Generated by `{command}` with transformers {transformers.__version__}, "
        f"peft {peft.__version__}, torch {torch.__version__.partition('+')[0]}: tiny random models in float32, with "
        "LoRA on all linears.",
        "A number is how many modules are swapped, of how many were looked at (0/n: of how many are there by their "
        "names).",
        "`right`: loss and every gradient pass the judge, for full fine-tuning and with LoRA; greedy generation gives "
        "stock's tokens; `unpatch` restores every bit.",
        "`experts`: of modules with experts in 3-D parameters; there `right` also means LoRA on every stack of them "
        "(`target_parameters`) in float32, and that and full fine-tuning in bfloat16.",
        f"Rows ran at: {', '.join(f'{c} ({n})' for c, n in commits.most_common() if n)}.",
        "`images`: so they do with one image per row, the vision tower trained as well.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    return "\n".join(head + [lines[k] for k in sorted(lines)] + missing) + "\n"


def read(log: str) -> list[dict]:
    latest = {}
    for line in Path(log).read_text().splitlines():
        row = json.loads(line)
        latest[row["key"]] = row
    return list(latest.values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--builder", help="a Python file with MODEL_TYPES, build(key, seed), batch(model), loss_of(output)"
    )
    parser.add_argument("--only", "--keys", nargs="*", help="these architectures")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument(
        "--log", default="models.jsonl", help="JSON lines, appended to; the latest line of an architecture counts"
    )
    parser.add_argument("--summary", action="store_true", help="only sum up what the log holds")
    parser.add_argument("--write", help="write the table here")
    args = parser.parse_args()
    if not args.summary:
        keys = args.only or list(load_builder(args.builder).MODEL_TYPES)
        if args.jobs == 1:
            worker(keys, args.builder, args.log)
        else:
            import multiprocessing

            context = multiprocessing.get_context("spawn")
            workers = [
                context.Process(target=worker, args=(keys[i :: args.jobs], args.builder, args.log))
                for i in range(args.jobs)
            ]
            for w in workers:
                w.start()
            for w in workers:
                w.join()
    results = read(args.log)
    print(summary(results))
    if args.write:
        Path(args.write).parent.mkdir(parents=True, exist_ok=True)
        older = Path(args.write).read_text() if Path(args.write).exists() else ""
        Path(args.write).write_text(table(results, list(load_builder(args.builder).MODEL_TYPES), args.builder, older))


if __name__ == "__main__":
    main()
