"""The table of a combination and its heat map, without a model."""

from __future__ import annotations

import pathlib
import sys
from typing import Any

import pytest
from matplotlib.figure import Figure

from pal_adapters import ConfigError, TransferTable, plot_transfer
from pal_adapters.fusion.report import table_of_rows

TABLE = TransferTable(["mnli", "qqp"], ["0", "1", "2"], [[0.5, 1.0], [0.25, 2.0], [0.0, 3.0]])


def test_table_as_text_and_as_json() -> None:
    lines = str(TABLE).splitlines()
    assert lines[0] == "mean |coefficient|"
    assert lines[1].split() == ["mnli", "qqp"]
    assert lines[2].split() == ["0", "0.500", "1.000"]
    assert lines[-1].split() == ["mean", "0.250", "2.000"]
    assert len({len(line) for line in lines[1:]}) == 1
    assert TransferTable(**TABLE.to_dict()) == TABLE
    assert TABLE.totals() == {"mnli": 0.25, "qqp": 2.0}


def test_table_of_rows() -> None:
    rows = [("query", 0, "a", 1.0), ("query", 0, "b", 2.0), ("value", 0, "a", 3.0), ("query", 1, "b", 4.0)]
    table = table_of_rows([*rows, ("pooler", None, "b", 5.0)], "mean attention")
    assert list(table.sources) == ["a", "b"]
    assert list(table.places) == ["0.query", "0.value", "1.query", "pooler"]
    assert table.values == [[1.0, 2.0], [3.0, None], [None, 4.0], [None, 5.0]]
    assert table.totals() == {"a": 2.0, "b": 11 / 3}
    assert str(table).splitlines()[3].split() == ["0.value", "3.000"]
    drawn = plot_transfer(table).axes[0]
    assert [text.get_text() for text in drawn.texts] == ["1.00", "3.00", "2.00", "4.00", "5.00"]
    assert table.measure == "mean attention"
    assert list(table_of_rows(rows[:2], "x").places) == ["0"]


def test_a_table_that_is_none() -> None:
    with pytest.raises(ConfigError, match="3 rows of 2 numbers"):
        TransferTable(["a", "b"], ["0", "1", "2"], [[1.0, 2.0]])


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_heat_map_is_saved(kind: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "new" / f"map.{kind}"
    figure = plot_transfer(TABLE, path, title="rte")
    start = path.read_bytes()[:200]
    assert start.startswith(b"\x89PNG") if kind == "png" else b"<svg" in path.read_bytes()[:2000]
    (axes, bar) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["mnli", "qqp"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]
    assert axes.get_title() == "rte"
    assert bar.get_ylabel() == "mean |coefficient|"
    drawn = axes.images[0].get_array()
    assert drawn.tolist() == [[0.5, 0.25, 0.0], [1.0, 2.0, 3.0]]  # sources by blocks
    assert [text.get_text() for text in axes.texts] == ["0.50", "0.25", "0.00", "1.00", "2.00", "3.00"]


def test_heat_map_into_given_axes() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    assert plot_transfer(TABLE, ax=axes) is figure
    assert axes.images
    plot_transfer(TransferTable(["a"], ["all"], [[0.0]]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "map.pdf"}, r"path='map\.pdf'.*\.svg"),
        ({"path": "map.png", "ax": object()}, "together with ax"),
        ({"data": []}, "data has no effect"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plot_transfer(TABLE, **arguments)


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install 'matplotlib"):
        plot_transfer(TABLE)


def test_colours_are_centred_on_the_start() -> None:
    """A coefficient that moved by a hundredth differs in colour and in its number."""
    table = TransferTable(["a", "b", "c"], ["0", "1"], [[1.0, 0.99, None], [1.004, 1.0, None]], start=1.0)
    (axes, bar) = plot_transfer(table).axes
    assert axes.images[0].get_clim() == pytest.approx((0.99, 1.01))
    assert [text.get_text() for text in axes.texts] == ["1.000", "1.004", "0.990", "1.000"]
    assert bar.get_ylabel() == "mean |coefficient|, 1 before training"
    assert table.totals() == {"a": pytest.approx(1.002), "b": pytest.approx(0.995), "c": None}
    assert str(table).splitlines()[-1].split() == ["mean", "1.002", "0.995"]
