"""New Python processes that start in no time: each is forked from one that has imported the libraries and no more.

That server is a new interpreter that imports torch, transformers and the hosts, and never this package, so a process
made here knows of a test's objects only what it reads from files, and imports the package itself. Tests about imports
start an interpreter of their own.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = ["torch", "transformers.trainer", "datasets", "peft", "adapters"]
LIBRARIES += [f"transformers.models.{name}.modeling_{name}" for name in ("auto", "bert", "llama")]
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(LIBRARIES)  # a host that is missing is left out


def python(
    *command: str | Path, cwd: Path | None = None, environment: Mapping[str, str] | None = None, timeout: float = 300
) -> subprocess.CompletedProcess[str]:
    """Runs `python -W ignore COMMAND`, such as `-c CODE`, `-m MODULE` or `FILE`, each with its arguments.

    Args:
        command: What follows `python` on a command line.
        cwd: The folder in which it runs.
        environment: Variables to change.
        timeout: Seconds after which it is killed, an error.
    """
    given = [str(part) for part in command]
    variables = {**os.environ, **(environment or {})}
    with tempfile.TemporaryDirectory() as folder:
        process = _SERVER.Process(target=_run, args=(given, str(cwd or Path.cwd()), variables, folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(given, timeout)
        printed = [Path(folder, name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(given, process.exitcode, *printed)


def _run(command: list[str], cwd: str, variables: dict[str, str], folder: str) -> None:
    """In the new process."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(folder, name), os.O_WRONLY | os.O_CREAT, 0o600), number)
    known = [name for name in sys.modules if name.partition(".")[0] == "pal_adapters"]
    assert not known, f"the server has imported {known}"
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    warnings.simplefilter("ignore")
    kind, *arguments = command
    if kind == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path[:0] = ["", str(ROOT)]
        exec(compile(arguments[0], "<string>", "exec"), {"__name__": "__main__"})
    elif kind == "-m":
        sys.argv = arguments
        sys.path[:0] = ["", str(ROOT)]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        sys.path[:0] = [os.path.dirname(kind), str(ROOT)]
        runpy.run_path(kind, run_name="__main__")
