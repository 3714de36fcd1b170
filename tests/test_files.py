"""Files are written whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pal_adapters import StorageError, TransferTable, export_onnx, plot_transfer
from pal_adapters.files import replacing


class Stop(BaseException):
    """Like KeyboardInterrupt: no `Exception`."""


@pytest.mark.parametrize("error", [RuntimeError("disk full"), OSError(28, "No space left"), Stop()])
def test_half_a_file_does_not_stay(tmp_path: Path, error: BaseException) -> None:
    place = tmp_path / "there" / "file.txt"
    with replacing(place) as file:
        file.write_text("whole")

    def write_half() -> None:
        with replacing(place) as file:
            file.write_text("ha")
            file.with_name("beside").write_text("more")
            raise error

    with pytest.raises(StorageError if isinstance(error, Exception) else Stop):
        write_half()
    assert [path.name for path in place.parent.iterdir()] == ["file.txt"]
    assert place.read_text() == "whole"


def test_what_belongs_to_a_file_is_moved_with_it(tmp_path: Path) -> None:
    with replacing(tmp_path / "file") as file:
        file.write_text("whole")
        file.with_name("file.data").write_text("more")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "whole", "file.data": "more"}


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(StorageError, match="inside cannot be written"), replacing(tmp_path / "file" / "inside"):
        raise AssertionError("not reached")


def test_a_figure_that_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure = pytest.importorskip("matplotlib.figure").Figure
    table = TransferTable(["a", "b"], ["0"], [[0.5, 0.5]], "mean", None)
    plot_transfer(table, tmp_path / "plot.png")
    before = (tmp_path / "plot.png").read_bytes()

    def half(self: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(StorageError, match=r"plot.png cannot be written .*No space left"):
        plot_transfer(table, tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes() == before


def test_a_graph_that_cannot_be_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    model = torch.nn.ReLU().train()
    kind = type(export_onnx(model, tmp_path / "model.onnx", {"input": torch.ones(3, 2)}))
    names = sorted(path.name for path in tmp_path.iterdir())
    before = {name: (tmp_path / name).read_bytes() for name in names}

    def half(self: object, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kind, "save", half)
    with pytest.raises(StorageError, match=r"model.onnx cannot be written .*No space left"):
        export_onnx(model, tmp_path / "model.onnx", {"input": torch.ones(3, 2)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert model.training
