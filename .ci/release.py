#!/usr/bin/env python3
"""Prepares a release in a checkout: `release.py v0.1.0 NOTES.md`.

Writes the version of the tag to `pal_adapters/__init__.py`, and its section of the changelog to a file.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main(tag: str, notes: str) -> int:
    found = re.fullmatch(r"v(\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)", tag)
    if found is None:
        print(f"{tag!r} is not the tag of a release, such as v0.1.0 or v0.2.0rc1")
        return 1
    version = found[1]
    text = section((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.sub(r"(a|b|rc)\d+$", "", version))
    if not text:
        print(f"CHANGELOG.md has no section [{version}]")
        return 1
    path = ROOT / "pal_adapters" / "__init__.py"
    source, count = re.subn(
        r'^__version__ = ".*"$', f'__version__ = "{version}"', path.read_text(encoding="utf-8"), flags=re.M
    )
    if count != 1:
        print(f"{path} has {count} lines with __version__, not one")
        return 1
    path.write_text(source, encoding="utf-8")
    Path(notes).write_text(text + "\n", encoding="utf-8")
    return 0


def section(changelog: str, version: str) -> str:
    """What stands below the heading of a version."""
    parts = re.split(r"^## ", changelog, flags=re.M)
    bodies = [part.partition("\n")[2] for part in parts if part.startswith(f"[{version}]")]
    return bodies[0].strip() if bodies else ""


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
