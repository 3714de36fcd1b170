"""Starts another tool with this package imported, so that it knows the methods of this package.

    pal-adapters run lm_eval --model hf --model_args pretrained=BASE,peft=FOLDER --tasks arc_easy

A tool that loads adapters by itself, such as `lm_eval`, would otherwise not know their type. Everything after the name
of the module goes to the tool.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Sequence
from importlib.util import find_spec

import pal_adapters  # noqa: F401  registers the methods with the hosts

USAGE = "usage: pal-adapters run MODULE ...\n\n"


def main(argv: Sequence[str]) -> int:
    """Runs the command: `python -m MODULE ...` in this process."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + (__doc__ or ""), file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    module, *rest = argv
    try:
        found = find_spec(module) is not None
    except (ModuleNotFoundError, ValueError):
        found = False
    if not found:
        print(f"pal-adapters run: error: no module named {module!r} is installed", file=sys.stderr)
        return 2
    sys.argv = [module, *rest]
    sys.path.insert(0, "")  # as `python -m` does
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    return 0
