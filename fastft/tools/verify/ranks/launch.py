"""N processes on this machine, by the launcher that torchrun is made of, and what they return.

What they print goes to files: the last lines are shown where a process fails."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastft.errors import FastftError

LAST_LINES = 3
_SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")
_LOGGERS = ("torch.distributed.elastic", "torch.multiprocessing.spawn", "torchelastic-events-null")
_KEY = "TORCHELASTIC_SIGNALS_TO_HANDLE"


class ProcessFailedError(FastftError):
    """One of the processes ended with an exception that nobody caught."""

    exit_code = 1


def launched(function: Callable[..., Any], nproc: int, *args: Any) -> list[Any]:
    """What `function(*args)` returns in each of `nproc` new processes, by rank.

    Args:
        function: importable by its name from a new process; its arguments and result can be pickled.
        nproc: processes, each with its rank in the variables that torchrun sets.

    Raises:
        ProcessFailedError: one ended with an exception; the message has its rank and its last lines.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    with tempfile.TemporaryDirectory(prefix="fastft-") as logs, _as_it_was():
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id="fastft",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=logs, redirects=Std.ALL),
        )
        try:
            found = elastic_launch(config, function)(*args)
        except ChildFailedError as e:
            rank, failure = e.get_first_failure()
            raise ProcessFailedError(f"verify: rank {rank} of {nproc} ended with {_said(failure, Path(logs))}") from e
    return [found[rank] for rank in range(nproc)]


def _said(failure: Any, logs: Path) -> str:
    """The exception's first line, else the last lines that the process wrote."""
    written = failure.error_file_data.get("message", "") if isinstance(failure.error_file_data, dict) else ""
    message = written.get("message", "") if isinstance(written, dict) else ""
    if message.strip():
        return message.strip().splitlines()[0]
    found = [p.read_text(errors="replace").splitlines() for p in logs.glob(f"**/{failure.local_rank}/stderr.log")]
    tail = " / ".join(x.strip() for x in (found[0] if found else [])[-LAST_LINES:] if x.strip())
    return f"exit code {failure.exitcode}: {tail or 'it wrote nothing'}"


@contextlib.contextmanager
def _as_it_was() -> Iterator[None]:
    """The launcher's own handlers of signals, its variable and its log lines go with it."""
    before = {}
    with contextlib.suppress(ValueError):  # outside the main thread the launcher sets none
        before = {getattr(signal, n): signal.getsignal(getattr(signal, n)) for n in _SIGNALS if hasattr(signal, n)}
    variable = {k: v for k, v in os.environ.items() if k == _KEY}
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [x.level for x in loggers]
    for x in loggers:
        x.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for x, level in zip(loggers, levels):
            x.setLevel(level)
        for number, handler in before.items():
            with contextlib.suppress(ValueError, TypeError):
                signal.signal(number, handler)
        os.environ.pop(_KEY, None)
        os.environ.update(variable)
