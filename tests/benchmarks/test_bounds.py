"""`benchmarks/bench.py`: every kind of bound runs at tiny sizes, and verdicts and tables say what was measured."""

from __future__ import annotations

import importlib
import pathlib
from itertools import chain
from typing import Any

import pytest

pytest.importorskip("adapters")
pytest.importorskip("peft")

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def speed(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(FOLDER)
    for part in ("mixed", "small", "bases", "report", "measure"):
        importlib.import_module(f"speed.{part}")
    return importlib.import_module("speed")


def test_every_kind_of_bound_runs(speed: Any) -> None:
    bounds = list(chain(speed.mixed.bounds(), speed.small.bounds(), speed.bases.bounds()))
    assert {bound.section for bound in bounds} == {1, 2, 3}
    assert len({(bound.what, bound.of) for bound in bounds}) == len(bounds)
    kinds = {getattr(bound.measure, "func", bound.measure): bound for bound in reversed(bounds)}
    del kinds[speed.bases.saving]  # starts a process of its own
    for bound in kinds.values():
        assert bound.measure(speed.measure.Setting(quick=True), 0.0).value > 0, bound


def test_table(speed: Any, tmp_path: pathlib.Path) -> None:
    measure, report = speed.measure, speed.report
    bound = measure.Bound(1, "a step / another", "peft pal", 1.1, lambda setting, seconds: None, floor=1.0)
    found = measure.Measured(1.12, 1.11, 1.13, 9)
    rows = [
        report.row_of(bound, found, "eager"),
        report.row_of(bound, measure.Measured(1.1), "compiled"),
        report.row_of(bound, "no time left", "eager"),
    ]
    assert [row["verdict"] for row in rows] == ["not reached", "reached", "not measured: no time left"]
    page = tmp_path / "speed.md"
    page.write_text(f"before\n{report.START}\nold\n{report.END}\nafter\n")
    result = {"versions": {"torch": "2"}, "machine": {"threads": 2}, "bounds": rows}
    report.write_docs(page, result)
    written = page.read_text()
    assert "| peft pal | 1.10 | 1.00 | 1.120 (1.110 to 1.130) | not reached |" in written
    assert "old" not in written
    assert written.startswith("before\n")
    assert written.endswith("after\n")
    report.write_docs(page, result)
    assert page.read_text() == written


def test_some_bounds_measured_again_keep_the_others(speed: Any, tmp_path: pathlib.Path) -> None:
    def row(of: str, value: float, mode: str = "eager") -> dict[str, Any]:
        return {"what": "a step", "of": of, "mode": mode, "value": value}

    measure, report = speed.measure, speed.report
    bounds = [measure.Bound(1, "a step", of, None, lambda setting, seconds: None) for of in ("a", "c", "b")]
    path = tmp_path / "bounds.json"
    about = {"versions": {"torch": "2"}, "machine": {"threads": 2}}
    report.write_json(path, {**about, "bounds": [row("a", 1.0), row("gone", 3.0), row("b", 2.0)]})
    earlier = report.earlier_rows(path, about, bounds)
    assert earlier == [row("a", 1.0), row("b", 2.0)]
    found = report.merged(earlier, [row("c", 6.0, "compiled"), row("c", 5.0), row("a", 4.0)], bounds)
    assert found == [row("a", 4.0), row("c", 5.0), row("c", 6.0, "compiled"), row("b", 2.0)]
    with pytest.raises(SystemExit, match="measure all bounds again"):
        report.earlier_rows(path, {**about, "machine": {"threads": 16}}, bounds)


def test_what_a_step_keeps_is_counted_once(speed: Any) -> None:
    import torch

    layer = torch.nn.Linear(4, 4)
    x = torch.randn(8, 4, requires_grad=True)
    kept = speed.measure.kept_bytes(layer, lambda: (layer(x).exp(), layer(x).exp()))
    assert kept == 4 * (8 * 4) * 3  # `x` once and both results, without the weight
