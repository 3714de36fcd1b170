#!/usr/bin/env python3
"""Checks that a wheel holds exactly the tracked files of the package: `check_wheel.py dist/*.whl`."""

from __future__ import annotations

import subprocess
import sys
import zipfile


def main(wheel: str) -> int:
    tracked = subprocess.run(["git", "ls-files", "pal_adapters"], capture_output=True, text=True, check=True)
    expected = set(tracked.stdout.splitlines())
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    for name in sorted(expected - found):
        print(f"missing from the wheel: {name}")
    for name in sorted(found - expected):
        print(f"not part of the package: {name}")
    return int(found != expected)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
