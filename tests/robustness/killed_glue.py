"""Runs `examples/glue.py` and ends it by SIGKILL at one of its events: `python killed_glue.py EVENT ARGUMENTS...`.

An event is an optimizer step, or a change in the output folder: a file opened for writing, renamed or removed, or a
folder made. At a file that is opened for writing, the kill leaves half a file behind. Event 0 does not occur: such a
run prints how many events there are.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

CHANGES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "shutil.copyfile"}


class Events:
    """Counts the events of a run, and kills the process at one of them."""

    def __init__(self, last: int, folder: str) -> None:
        self.last = last
        self.folder = folder
        self.count = 0
        self.torn = False

    def changed(self, name: str, args: tuple[Any, ...]) -> None:
        opens = name == "open" and isinstance(args[1], str) and bool(set(args[1]) & set("wax+"))
        if (opens or name in CHANGES) and not self.torn and str(args[0]).startswith(self.folder):
            self.happened(str(args[0]) if opens else None)

    def happened(self, opened: str | None = None) -> None:
        self.count += 1
        if self.count != self.last:
            return
        self.torn = True
        if opened is not None:
            with open(opened, "wb") as file:
                file.write(b'{"half": ')
        os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    last, *arguments = sys.argv[1:]
    events = Events(int(last), arguments[arguments.index("--output_dir") + 1])
    sys.addaudithook(events.changed)
    register_optimizer_step_post_hook(lambda *_: events.happened())
    import glue

    status = glue.main(arguments)
    print(f"events: {events.count}")
    sys.exit(status)


if __name__ == "__main__":
    main()
