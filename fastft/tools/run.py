"""`fastft run`: an unmodified training script, with the models that it trains patched at their first training step.

The script runs in this process as `python SCRIPT` would run it. One official global hook of torch (`register_module_forward_pre_hook`)
watches for the first call, in training mode with gradients, of a transformers or PEFT model; that model is patched, the report printed,
and the hook taken off, so that the run pays nothing for it. When that model is gone the hook comes back, for the next one. The script's
own classes and the libraries' stay as they are.
"""

from __future__ import annotations

import functools
import runpy
import subprocess
import sys
import weakref
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import torch
from torch import nn

from fastft.errors import FastftError


class ScriptNotFoundError(FastftError):
    """The script, module or program that `fastft run` was given is not there."""


class PatchOnFirstStep:
    """Context in which the first model that trains is patched. `seen` counts the models that were."""

    def __init__(self, patch: Callable[[nn.Module], object], show: Callable[[nn.Module], None]):
        self.patch, self.show, self.seen, self._handle, self._over = patch, show, 0, None, False

    def __enter__(self) -> PatchOnFirstStep:
        self._over = False
        self._arm()
        return self

    def __exit__(self, *_) -> None:
        self._over = True
        self._disarm()

    def _arm(self) -> None:
        if self._handle is None and not self._over:  # a model may outlive the script
            self._handle = nn.modules.module.register_module_forward_pre_hook(self._before)

    def _disarm(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _before(self, module: nn.Module, args) -> None:
        if not (module.training and torch.is_grad_enabled()) or not _is_root(module):
            return
        self._disarm()  # first of all: the patch itself calls modules
        self.seen += 1
        self.patch(module)
        self.show(module)
        weakref.finalize(module, self._arm)


def _is_root(module: nn.Module) -> bool:
    from peft import PeftMixedModel, PeftModel
    from transformers import PreTrainedModel

    return isinstance(module, (PreTrainedModel, PeftModel, PeftMixedModel)) and any(p.requires_grad for p in module.parameters())


class Narrator:
    """What the first process of all prints: every model's report when it is patched, and at the end what went the stock way since."""

    def __init__(self):
        self._fallbacks: list[Callable[[], dict[str, int]]] = []

    def show(self, model: nn.Module) -> None:
        from rich.console import Console

        from fastft.api import report
        from fastft.patching.patcher import fallbacks_of

        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return
        console = Console()
        (console if console.is_terminal else Console(width=130)).print(report(model))  # a log file folds no columns
        self._fallbacks.append(fallbacks_of(model))

    def conclude(self) -> None:
        for calls in self._fallbacks:
            for reason, n in calls().items():
                print(f"fastft: went the stock way in {n} calls: {reason}")


def run_patched(body: Callable[[], None]) -> int:
    """Run `body` with its models patched; the exit code that the interpreter would give. Exceptions pass through."""
    from fastft.api import patch

    narrator = Narrator()
    with PatchOnFirstStep(functools.partial(patch, activation_policy="auto"), narrator.show) as watch:
        try:
            body()
            code = 0
        except SystemExit as e:
            code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
            if isinstance(e.code, str):
                print(e.code, file=sys.stderr)
    if not watch.seen:
        print("fastft: no transformers or PEFT model was trained in this process, so nothing was patched", file=sys.stderr)
    narrator.conclude()
    return code


def run_script(script: str, args: list[str]) -> int:
    """As `python SCRIPT ARGS`. ScriptNotFoundError if there is no such file."""
    if not Path(script).is_file():
        raise ScriptNotFoundError(f"run: want a Python script, got {script!r}, which is no file; for a module use `fastft run -m MODULE`")
    sys.argv = [script, *args]
    sys.path.insert(0, str(Path(script).resolve().parent))
    return run_patched(lambda: runpy.run_path(script, run_name="__main__"))


def run_module(module: str, args: list[str]) -> int:
    """As `python -m MODULE ARGS`."""
    sys.argv = [module, *args]
    sys.path.insert(0, str(Path.cwd()))
    return run_patched(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))


def run_program(program: str, args: list[str]) -> int:
    """As the installed command PROGRAM with ARGS: `trl sft ...` through accelerate as TRL launches it, others in this process."""
    if program == "trl" and args and (script := _trl_script(args[0])):
        return _launch_trl(args[0], script, args[1:])
    found = [e for e in entry_points(group="console_scripts") if e.name == program]
    if not found:
        raise ScriptNotFoundError(f"run: want the name of an installed Python command after --, got {program!r}; for a script leave -- out")
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
    from trl.cli.accelerate_config import resolve_accelerate_config_argument

    parser = importlib.import_module(f"trl.scripts.{name}").make_parser(prog=f"trl {name}")
    *_, from_config, from_command = parser.parse_args_and_config(args, return_remaining_strings=True, separate_remaining_strings=True)
    rest = list(from_command)
    own = [a for a in args if not (rest and a == rest[0] and rest.pop(0) is not None)]
    launch = resolve_accelerate_config_argument([*from_config, *from_command])
    try:
        launch_command(launch_command_parser().parse_args([*launch, "--module", "fastft", "run", str(script), *own]))
    except subprocess.CalledProcessError as e:  # one process
        return e.returncode
    except ChildFailedError as e:  # several: the first that failed
        return e.get_first_failure()[1].exitcode
    return 0
