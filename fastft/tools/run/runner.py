"""`fastft run`: an unmodified training script, with the models that it trains patched at their first training step.

The script runs in this process as `python SCRIPT` would run it; fastft/tools/run/first_step.py finds the models. Each
one's report is printed when it is patched; at the end, what went the stock way since, and every model that trained and
was not patched. The script's own classes and the libraries' stay as they are."""

from __future__ import annotations

import runpy
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from fastft.compat.trl_private import accelerate_arguments
from fastft.errors import FastftError
from fastft.tools.run.first_step import PatchOnFirstStep, UnpatchedModel


class ScriptNotFoundError(FastftError):
    """The script, module or program that `fastft run` was given is not there."""


class Narrator:
    """What the first process of all prints: every model's report when it is patched, and at the end what went the stock
    way since."""

    def __init__(self):
        self._fallbacks: list[
            tuple[weakref.ref, Callable[[], dict[str, int]]]
        ] = []  # the innermost model, its counters

    def show(self, model: nn.Module) -> None:
        from rich.console import Console
        from tqdm import tqdm

        from fastft.api import report
        from fastft.patching.patcher import fallbacks_of, innermost

        base = innermost(model)  # patched again as an adapter came: its counters count what they counted before
        self._fallbacks = [(ref, calls) for ref, calls in self._fallbacks if ref() is not base]
        self._fallbacks.append((weakref.ref(base), fallbacks_of(model)))
        if _is_first_process():
            with tqdm.external_write_mode():  # the trainer's bar gives up its line, and is drawn again below
                Console().print(report(model))

    def conclude(self, left: list[UnpatchedModel]) -> None:
        if not _is_first_process():
            return
        for _, calls in self._fallbacks:
            for reason, n in calls().items():
                print(f"fastft: went the stock way in {n} calls: {reason}")
        for model in left:
            print(f"fastft: {model.name} was trained with stock's code, not patched: {model.reason}")


def _is_first_process() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _complain(line: str) -> None:
    print(f"fastft: {line}", file=sys.stderr)


class Patcher:
    """Patches with `activation_policy="auto"`; a model that the script has patched itself stays as the script wanted
    it."""

    def __init__(self):
        # innermost models patched here
        self._bases: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()

    def __call__(self, model: nn.Module) -> None:
        from fastft.api import patch, unpatch
        from fastft.patching.patcher import innermost, record_of

        base, is_new = innermost(model), record_of(model) is None
        if not is_new and id(base) not in self._bases:
            return
        try:
            # again, where an adapter has come around a model that was patched bare
            patch(model, activation_policy="auto")
        except Exception:
            if is_new:
                unpatch(model)
            raise
        self._bases[id(base)] = base


def run_patched(body: Callable[[], object]) -> int:
    """Run `body` with its models patched; the exit code that the interpreter would give. Exceptions pass through. What
    `body` returns lives until the end is told: a script's variables, and so its models."""
    import fastft.api  # noqa: F401 (a fault of its import is ours to raise, before anything runs)

    narrator = Narrator()
    with PatchOnFirstStep(Patcher(), narrator.show, _complain) as watch:
        try:
            kept = body()
            code, left = 0, watch.left()
            del kept
        except SystemExit as e:
            left = watch.left()
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
    if not watch.seen and not left and not code:
        print(
            "fastft: no transformers or PEFT model was trained in this process, so nothing was patched", file=sys.stderr
        )
    narrator.conclude(left)
    return code


def without_our_frames(traceback: TracebackType | None) -> TracebackType | None:
    """A traceback from where the script's own code begins: without the frames of `fastft run` and of runpy above it."""
    ours = (__file__, str(Path(__file__).parents[2] / "cli.py"), "<frozen runpy>")
    while traceback is not None and traceback.tb_frame.f_code.co_filename in ours:
        traceback = traceback.tb_next
    return traceback


def run_script(script: str, args: list[str]) -> int:
    """As `python SCRIPT ARGS`. ScriptNotFoundError if there is no such file."""
    if not Path(script).is_file():
        raise ScriptNotFoundError(
            f"run: want a Python script, got {script!r}, which is no file; for a module use `fastft run -m MODULE`"
        )
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).resolve().parent))
    return run_patched(lambda: runpy.run_path(script, run_name="__main__"))


def run_module(module: str, args: list[str]) -> int:
    """As `python -m MODULE ARGS`."""
    sys.argv = [module, *args]
    sys.path.insert(0, str(Path.cwd()))
    return run_patched(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def run_program(program: str, args: list[str]) -> int:
    """As the installed command PROGRAM with ARGS: `trl sft ...` through accelerate as TRL launches it, others in this
    process."""
    if program == "trl" and args and (script := _trl_script(args[0])):
        return _launch_trl(args[0], script, args[1:])
    found = [e for e in entry_points(group="console_scripts") if e.name == program]
    if not found:
        raise ScriptNotFoundError(
            f"run: want the name of an installed Python command after --, got {program!r}; for a script leave -- out"
        )
    sys.argv = [program, *args]
    return run_patched(lambda: sys.exit(found[0].load()()))


def _trl_script(name: str) -> Path | None:
    import trl

    script = Path(trl.__file__).parent / "scripts" / f"{name}.py"
    return script if script.is_file() and "make_parser" in script.read_text() else None


def _launch_trl(name: str, script: Path, args: list[str]) -> int:
    """TRL's command starts its script with `accelerate launch`; so does this, with `fastft run` in between."""
    import importlib

    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    parser = importlib.import_module(f"trl.scripts.{name}").make_parser(prog=f"trl {name}")
    *_, from_config, from_command = parser.parse_args_and_config(
        args, return_remaining_strings=True, separate_remaining_strings=True
    )
    rest = list(from_command)
    own = [a for a in args if not (rest and a == rest[0] and rest.pop(0) is not None)]
    launch = accelerate_arguments([*from_config, *from_command])
    try:
        launch_command(launch_command_parser().parse_args([*launch, "--module", "fastft", "run", str(script), *own]))
    except subprocess.CalledProcessError as e:  # one process
        return e.returncode
    except ChildFailedError as e:  # several: the first that failed
        return e.get_first_failure()[1].exitcode
    return 0
