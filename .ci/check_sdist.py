#!/usr/bin/env python3
"""Checks that a source distribution has every tracked file that it should: `check_sdist.py dist/*.tar.gz`."""

from __future__ import annotations

import subprocess
import sys
import tarfile

FOLDERS = ["pal_adapters", "tests", "examples", "benchmarks", "docs"]
FILES = ["README.md", "CHANGELOG.md", "LICENSE", "CITATION.cff", "mkdocs.yml", "pyproject.toml", "constraints*.txt"]


def main(sdist: str) -> int:
    tracked = subprocess.run(["git", "ls-files", *FOLDERS, *FILES], capture_output=True, text=True, check=True)
    with tarfile.open(sdist) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    missing = sorted(set(tracked.stdout.splitlines()) - found)
    for name in missing:
        print(f"missing from the source distribution: {name}")
    return int(bool(missing))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
