"""The `fastft` command.

Every command but `run` owns its process: it quiets other libraries' warnings there, and with `--json` prints JSON alone
on stdout."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Hugging Face models fine-tune faster and in less GPU memory, proven on your machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


LIBRARIES = ("torch", "triton", "transformers", "trl", "peft")
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON alone on stdout instead of the table.")]


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version

        def line(name: str) -> str:
            try:
                return f"{name} {version(name)}"
            except PackageNotFoundError:
                return f"{name} is not installed"

        print(f"{line('fastft')} ({', '.join(map(line, LIBRARIES))})")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the versions and exit.")
    ] = False,
) -> None:
    pass


@contextlib.contextmanager
def _quiet(as_json: bool = False) -> Iterator[None]:
    """Other libraries' warnings, hints and bars stay out of what the command prints; with `as_json` what is printed
    inside goes to stderr, so that stdout is JSON alone."""
    from transformers.utils import logging as libraries

    for name in ("bitsandbytes", "transformers", "accelerate", "peft", "trl", "datasets"):
        logging.getLogger(name).setLevel(logging.ERROR)
    said = contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
    with contextlib.ExitStack() as undo, warnings.catch_warnings(), said:
        if libraries.is_progress_bar_enabled():
            libraries.disable_progress_bar()
            undo.callback(libraries.enable_progress_bar)
        for category in (FutureWarning, DeprecationWarning, UserWarning):
            warnings.filterwarnings("ignore", category=category, module=r"(?!fastft)")
        yield


def _show(result: Any, as_json: bool, **more: Any) -> None:
    """Print `result` as a table, or its dictionary and `more` as JSON."""
    from rich.console import Console

    print(json.dumps(result.to_dict() | more, indent=1, allow_nan=False)) if as_json else Console().print(result)


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Option(help="A checkpoint (name or folder); by default a small one is made here.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A file or a data set's name; by default Python's own docstrings.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where plot, figures and adapter go.")] = Path("fastft-demo"),
    steps: Annotated[int, typer.Option(min=2, help="Fine-tuning steps of each run.")] = 80,
    seed: Annotated[int, typer.Option(help="Seed of the data order and of the adapter.")] = 0,
    four_bit: Annotated[bool, typer.Option("--4bit", help="Load the base in NF4 (QLoRA).")] = False,
) -> None:
    """Fine-tune with stock and with fastft from the same seed, compare, save, reload, undo. Exit code 0 if all of it
    held."""
    from fastft.tools.demo.runner import DemoOptions
    from fastft.tools.demo.runner import demo as run

    raise typer.Exit(run(DemoOptions(model=model, dataset=dataset, out=out, steps=steps, seed=seed, four_bit=four_bit)))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
)
def run(
    target: Annotated[str, typer.Argument(help="A Python script; with -m a module; after -- an installed command.")],
    args: Annotated[list[str] | None, typer.Argument(help="What the script is given, unchanged.")] = None,
    module: Annotated[bool, typer.Option("-m", help="TARGET is a module, as in `python -m`.")] = False,
) -> None:
    """Run a training script unchanged, its models patched: `fastft run train.py --lr 1e-4`, `fastft run -m
    package.train`, or an installed command after two dashes: `fastft run -- trl sft --model_name_or_path ...`. The exit
    code is the script's."""
    from fastft.errors import FastftError
    from fastft.tools.run.runner import run_module, run_program, run_script, without_our_frames

    start = run_module if module else run_program if sys.argv[1:3] == ["run", "--"] else run_script
    try:
        code = start(target, args or [])
    except FastftError:
        raise
    except Exception as e:  # as the interpreter ends with an exception that nobody catches
        e.__traceback__ = without_our_frames(e.__traceback__)
        sys.excepthook(type(e), e, e.__traceback__)
        code = 1
    raise typer.Exit(code)


@app.command()
def verify(
    model: Annotated[str, typer.Argument(help="A checkpoint: name or folder.")],
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    four_bit: Annotated[bool, typer.Option("--4bit", help="Load the base in NF4.")] = False,
    fp8: Annotated[
        bool,
        typer.Option("--fp8", help="Load the base in FP8; also loss and gradients beside bf16's and NF4's."),
    ] = False,
    lora: Annotated[
        bool, typer.Option(help="With a LoRA adapter on all linear layers; --no-lora verifies full fine-tuning.")
    ] = True,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 2,
    layers: Annotated[
        bool | None,
        typer.Option(
            "--layers/--whole",
            help="Layer by layer, or all at once; by default by the model's size and the free memory.",
        ),
    ] = None,
    nproc: Annotated[
        int | None,
        typer.Option(min=1, help="Train in so many processes instead, and compare with one on the whole batch."),
    ] = None,
    strategy: Annotated[str, typer.Option(help="Of these processes: ddp, fsdp2, zero2, zero3 or tp.")] = "ddp",
    as_json: AsJson = False,
) -> None:
    """Judge stock against patched on this machine, per group of modules and end to end; with --nproc several processes
    against one. Exit code 1 when anything fails."""
    with _quiet(as_json):
        result: Any
        if nproc is None:
            from fastft.tools.verify.checkpoint import verify_checkpoint

            how = {"four_bit": four_bit, "fp8": fp8, "lora": lora, "layers": layers}
            result = verify_checkpoint(model, dtype=dtype, seq=seq, size=batch, **how)
        else:
            from fastft.tools.verify.ranks.runner import verify_ranks

            if fp8:
                raise typer.BadParameter("--fp8 and --nproc were both given: choose one")
            result = verify_ranks(
                model, nproc=nproc, strategy=strategy, dtype=dtype, four_bit=four_bit, lora=lora, rows=batch, seq=seq
            )
    _show(result, as_json)
    raise typer.Exit(0 if result else 1)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A checkpoint with its tokenizer: name or folder.")],
    stacks: Annotated[
        str, typer.Option(help="Some of stock, best, liger, unsloth, fastft, with commas between.")
    ] = "stock,best,liger,unsloth,fastft",
    cells: Annotated[
        str, typer.Option(help="Some of sft, packed, long, dpo, grpo, with commas between.")
    ] = "sft,packed,long,dpo,grpo",
    four_bit: Annotated[bool, typer.Option("--4bit", help="Load the base in NF4 (QLoRA).")] = False,
    of_fp8: Annotated[bool, typer.Option("--fp8", help="Not steps: each shape's products in FP8, a table.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each cell.")] = 6,
    seq: Annotated[int | None, typer.Option(min=8, help="Longest row; by default 2048 on a GPU, 64 without.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Rows; by default 4 on a GPU, 2 without.")] = None,
    out: Annotated[Path, typer.Option(help="Where bench.json and the plots go.")] = Path("fastft-bench"),
    as_json: AsJson = False,
) -> None:
    """Speed and memory of stock, its best flags, the peers and fastft on this machine; what fails the judge prints no
    speed. Exit code 1 when anything is red or fails."""
    with _quiet(as_json):
        from fastft.tools.bench import fp8, runner

        split = lambda text: tuple(x.strip() for x in text.split(",") if x.strip())
        try:
            options = runner.BenchOptions(model, split(stacks), split(cells), four_bit, steps, seq, batch, out=out)
        except ValueError as e:
            raise typer.BadParameter(str(e)) from e
        tokens = (batch or 4) * (seq or 2048)
        result: Any = fp8.bench(model, tokens, out) if of_fp8 else runner.bench(options)
    _show(result, as_json)
    raise typer.Exit(0 if result.ok else 1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A checkpoint or configuration: a name or a folder.")],
    gpu: Annotated[str | None, typer.Option(help="A card (T4, 4090, H100), a size (16GiB), or `this`.")] = None,
    gpus: Annotated[str | None, typer.Option(help="Several, with a process each: 4x24GiB, 8xH100.")] = None,
    strategy: Annotated[str | None, typer.Option(help="With --gpus: fsdp2 (the default) or ddp.")] = None,
    seq: Annotated[int, typer.Option(min=1, help="Tokens of a row.")] = 2048,
    batch: Annotated[int, typer.Option(min=1, help="Rows on the device, on each of several.")] = 4,
    r: Annotated[int, typer.Option("--r", min=1, help="LoRA's rank, on all linear layers.")] = 16,
    four_bit: Annotated[bool, typer.Option("--4bit", help="The base in NF4 (QLoRA).")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="The base in FP8, and its products.")] = False,
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning instead of LoRA.")] = False,
    targets: Annotated[
        str | None, typer.Option(help="LoRA's target_modules instead of all linear layers: q_proj,v_proj,...")
    ] = None,
    target_parameters: Annotated[
        str | None, typer.Option(help="LoRA's target_parameters: mlp.experts.gate_up_proj,mlp.experts.down_proj")
    ] = None,
    adapter_dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16; by default as TRL has them.")] = None,
    optim: Annotated[
        str,
        typer.Option(help="As in TrainingArguments: adamw_torch, adamw_torch_fused, adamw_8bit, paged_adamw_8bit, ..."),
    ] = "adamw_torch_fused",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto")] = "auto",
    accumulate: Annotated[int, typer.Option(min=1, help="Gradient accumulation steps.")] = 1,
    policy: Annotated[
        str,
        typer.Option(help="auto, trainer, none, lean, full, offload, a number of layers, or a budget such as 20GiB."),
    ] = "auto",
    loss: Annotated[str | None, typer.Option(help="trl or model")] = None,
    as_json: AsJson = False,
    plot: Annotated[Path | None, typer.Option(help="Also draw the bars to this file (.png, .svg, .pdf).")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model code that the repository brings.")] = False,
) -> None:
    """Predict the memory that training takes, the largest batch and the longest sequence that fit, and the policy that
    would be chosen: from the configuration alone, without a GPU or weights."""
    with _quiet(as_json):
        import peft  # noqa: F401  (what the plan imports, so that its time is its own)
        import torch
        from rich.console import Console

        from fastft.tools.plan.planner import lora
        from fastft.tools.plan.planner import plan as run

        if loss != "model":
            with contextlib.suppress(ImportError):  # the plan says what it lacks
                import trl.trainer.utils  # noqa: F401

        split = lambda text, otherwise: otherwise if text is None else text.split(",")
        given = targets is not None or target_parameters is not None
        adapters = lora(r, split(targets, "all-linear"), split(target_parameters, None)) if given else None
        torch.set_num_threads(1)  # of this process: nothing here is large enough for several
        imports, start = time.process_time(), time.process_time()
        with Console(stderr=True).status("fastft plan") as status:
            result = run(
                model,
                gpu=gpu,
                gpus=gpus,
                strategy=strategy,
                seq=seq,
                batch=batch,
                r=r,
                peft_config=adapters,
                adapter_dtype=adapter_dtype,
                load_in_4bit=four_bit,
                load_in_fp8=fp8,
                full=full,
                optim=optim,
                dtype=dtype,
                accumulate=accumulate,
                policy=policy,
                loss=loss,
                trust_remote_code=trust_remote_code,
                progress=lambda what: status.update(f"fastft plan: {what}"),
            )
        if plot is not None:
            result.plot(plot)
    seconds = {"imports": round(imports, 2), "plan": round(time.process_time() - start, 2)}
    _show(result, as_json, cpu_seconds=seconds)


@app.command()
def report(
    model: Annotated[str, typer.Argument(help="A checkpoint or configuration: a name or a folder.")],
    full: Annotated[bool, typer.Option("--full", help="Full fine-tuning instead of LoRA on all linears.")] = False,
    fp8: Annotated[bool, typer.Option("--fp8", help="The base in FP8, and its error.")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the model code that the repository brings.")] = False,
    as_json: AsJson = False,
) -> None:
    """What would be swapped in a model, and why the rest stays stock: from its configuration alone, without its
    weights."""
    with _quiet(as_json):
        from fastft.tools.report import report_from_config

        result = report_from_config(model, lora=not full, fp8=fp8, trust_remote_code=trust_remote_code)
    _show(result, as_json)


@app.command()
def merge(
    adapter: Annotated[Path, typer.Argument(help="An adapter's folder, as save_pretrained writes it.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16")] = "bfloat16",
    check: Annotated[bool, typer.Option(help="Reload the result and compare its logits with base + adapter.")] = True,
    other_base: Annotated[
        bool, typer.Option("--other-base", help="BASE is meant to be another model than the one trained on.")
    ] = False,
) -> None:
    """Write base + adapter as a plain 16-bit checkpoint, shard by shard, and check it."""
    import torch

    from fastft.parsing import parse_dtype
    from fastft.tools.merge.merge import merge as run

    form = parse_dtype(dtype)
    if form is None or form not in (torch.bfloat16, torch.float16):
        raise typer.BadParameter(f"--dtype: want bfloat16 or float16, got {dtype}")
    with _quiet():
        result = run(adapter, out, base=base, dtype=form, check=check, other_base=other_base)
    print(f"{out}: {result or 'not checked'}")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="An adapter's folder, or a model's folder or name.")],
    to: Annotated[str, typer.Option(help="merged, gguf, ollama or vllm-lora.")],
    out: Annotated[Path, typer.Option(help="The new folder.")],
    quant: Annotated[
        str | None,
        typer.Option(
            help="merged: bf16 (default), f16. gguf and ollama: q8_0 (default), f16, bf16, f32; by llama-cpp-python "
            "q4_k_m and other K-quants."
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, if not the one that the adapter names.")] = None,
    base_precision: Annotated[
        str,
        typer.Option(
            help="What the adapter is merged onto: trained (in 4 bits where it was so), original, nf4, fp4 or fp8."
        ),
    ] = "trained",
    other_base: Annotated[
        bool, typer.Option("--other-base", help="BASE is meant to be another model than the one trained on.")
    ] = False,
    prompts: Annotated[
        Path | None, typer.Option(help="Texts to compare on, one a line; by default built-in ones.")
    ] = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="USER/NAME of a repository on the Hub for the proven folder, with a model card.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="The repository is private if it is made now.")] = False,
    as_json: AsJson = False,
) -> None:
    """Write an adapter or a model as servers read it, load it with the other side, and compare it with base + adapter.
    Exit code 1, and nothing written, when it is not what was trained."""
    with _quiet(as_json):
        from rich.console import Console

        from fastft.tools.export.export import export as run

        result = run(
            source,
            out,
            to=to,
            quant=quant,
            base=base,
            base_precision=base_precision,
            other_base=other_base,
            prompts=prompts,
            push_to_hub=push_to_hub,
            private=private,
            console=Console(),
        )
    if as_json:
        _show(result, True)


def main() -> None:
    """Entry point: an error that fastft raises on purpose is one line, not a traceback; the exit code is 2, or 1 for a
    proof that does not hold."""
    from fastft.errors import FastftError

    try:
        app()
    except FastftError as e:
        print(f"fastft: {e}", file=sys.stderr)
        sys.exit(e.exit_code)


if __name__ == "__main__":
    main()
