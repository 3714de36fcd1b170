"""Finds the subcommand, and reports its errors in one line."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence

from pal_adapters import __version__
from pal_adapters.errors import PalAdaptersError, how_to_install

COMMANDS = {
    "train": "train an adapter per task on one base model, or one network for all tasks",
    "predict": "answer requests with a trained folder",
    "serve": "answer requests over HTTP",
    "info": "show the tasks of a trained folder: methods, sizes and scores",
    "transfer": "learn how to combine adapters for a new task",
    "fold": "turn learned combinations into plain adapters",
    "run": "start another tool with this package imported",
}
TRACEBACK = "--traceback"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Args:
        argv: The arguments; those of the process by default.

    Returns:
        The exit status: 0, or 2 after an error, which is printed in one line.
    """
    name, *rest = list(sys.argv[1:] if argv is None else argv) or [""]
    if name not in COMMANDS:
        return _usage(name)
    module = importlib.import_module(f"{__package__}.{name}")  # only what the subcommand needs
    if name != "run":
        return reported(f"pal-adapters {name}", lambda: int(module.main(rest)), traceback=TRACEBACK in rest)
    return int(module.main(rest))


def _usage(name: str) -> int:
    if name == "--version":
        print(f"pal-adapters {__version__}")
        return 0
    if name in ("-h", "--help"):
        width = max(map(len, COMMANDS))
        lines = [f"  {command:<{width}}  {text}" for command, text in COMMANDS.items()]
        end = "pal-adapters COMMAND --help: its options; pal-adapters --version: the version"
        print("\n".join(("usage: pal-adapters COMMAND ...", "", *lines, "", end)))
        return 0
    given = f"unknown command {name!r}" if name else "no command"
    print(f"pal-adapters: error: {given}; allowed: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


def reported(command: str, work: Callable[[], int], *, traceback: bool = False) -> int:
    """The exit status of `work`. An error that the user can fix is printed in one line, with status 2.

    Args:
        command: Name of the command in messages.
        work: Does the work and returns the exit status.
        traceback: Whether to raise such errors instead.
    """
    try:
        return work()
    except (PalAdaptersError, ModuleNotFoundError) as error:
        if traceback:
            raise
        missing = isinstance(error, ModuleNotFoundError) and not isinstance(error, PalAdaptersError)
        hint = f"; {how_to_install('all')}" if missing else ""
        print(f"{command}: error: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2
