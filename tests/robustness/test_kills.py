"""A run that is killed anywhere and started again ends with the numbers of a run that was not killed.

`PAL_ADAPTERS_KILLS` sets how many places are tried; they are drawn from all optimizer steps and changes of files.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.examples.conftest import load_script
from tests.examples.data import write_tasks
from tests.processes import python

ROOT = Path(__file__).resolve().parents[2]
KILLS = int(os.environ.get("PAL_ADAPTERS_KILLS", "3"))


class Job:
    """Runs of `examples/glue.py` that differ in their output folder alone."""

    def __init__(self, root: Path, glue: ModuleType) -> None:
        write_tasks(root / "data", train_size=40, test_size=8)
        helper = load_script(ROOT / "tests" / "multitask" / "tiny_encoder.py")
        self.encoder = helper.save_tiny_encoder(root / "encoder")
        self.root = root
        self.glue = glue

    def arguments(self, output: Path) -> list[str]:
        given = ["--data_dir", str(self.root / "data"), "--model", self.encoder, "--output_dir", str(output)]
        given += ["--preset", "pals", "--hidden_size", "12", "--tasks", "rte", "stsb", "--max_length", "32"]
        return [*given, "--max_steps", "6", "--batch_size", "4", "--evaluations", "3"]

    def killed(self, output: Path, event: int) -> subprocess.CompletedProcess[str]:
        return python(Path(__file__).with_name("killed_glue.py"), str(event), *self.arguments(output))

    def finished(self, output: Path) -> dict[str, Any]:
        assert self.glue.main(self.arguments(output)) == 0
        return json.loads((output / "results.json").read_text(encoding="utf-8"))


def table_of(printed: str) -> str:
    return printed[printed.index("task ") : printed.index("written:")]


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield Job(tmp_path_factory.mktemp("kills"), load_script(ROOT / "examples" / "glue.py"))


def test_a_killed_run_ends_like_one_that_was_not(job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = job.killed(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr[-2000:]
    table, rest = table_of(whole.stdout), whole.stdout
    expected = json.loads((tmp_path / "whole" / "results.json").read_text(encoding="utf-8"))
    found = re.search(r"events: (\d+)", rest)
    assert found is not None
    count = int(found[1])
    assert count > 30, "steps, checkpoints, reports"
    for event in random.Random(0).sample(range(1, count + 1), min(KILLS, count)):
        output = tmp_path / str(event)
        killed = job.killed(output, event)
        assert killed.returncode == -signal.SIGKILL, (event, killed.stderr[-2000:])
        capsys.readouterr()
        assert job.finished(output) == expected, event
        assert table_of(capsys.readouterr().out) == table, event
        left = [path.name for path in output.rglob("*") if path.name.endswith(".tmp")]
        assert not left, (event, left)
