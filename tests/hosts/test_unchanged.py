"""A change of a model that raises half way leaves the model as it was."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pal_adapters.hooks.stored import Stored
from pal_adapters.hosts.unchanged import all_or_nothing, keep_on_disk, keep_values, when_settled


class _Owner:
    """An object outside the module tree that keeps account of its hooks."""

    def __init__(self) -> None:
        self.installed: set[str] = set()
        self.places: dict[str, list[int]] = {"here": [1]}
        self.inner = _Inner()


class _Inner:
    def __init__(self) -> None:
        self.count = 0


class _Failure(Exception):
    pass


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model.names = {"order": ["a"]}  # type: ignore[assignment]
    return model


def _description(model: nn.Module, owner: _Owner) -> Any:
    return (
        [(name, id(module), module.training) for name, module in model.named_modules()],
        [(name, id(p), p.requires_grad, p.tolist()) for name, p in model.named_parameters()],
        [(name, id(b), b.tolist()) for name, b in model.named_buffers()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        sorted(model.__dict__),
        repr(model.names),
        (sorted(owner.installed), repr(owner.places), owner.inner.count),
    )


def _change(model: Any, owner: _Owner) -> None:
    model.add_module("new", nn.Linear(2, 2))
    model[0] = nn.Linear(3, 3)
    model[1].running_mean = torch.ones(3)
    keep_values([model[2].weight])
    with torch.no_grad():
        model[2].weight.fill_(7.0)
    model[2].weight.requires_grad_(False)
    model[2].bias = nn.Parameter(torch.zeros(2))
    model[2].register_forward_hook(lambda *_: None)
    model[2].forward = lambda x: x
    model.names["order"].append("b")
    model.names["more"] = []
    model.extra = 1
    model.eval()
    owner.installed.add("forward")
    owner.places["here"].append(2)
    owner.inner.count += 1


def _failing(model: Any, *beside: Any, change: Callable[[], None], error: type[BaseException] = _Failure) -> None:
    with all_or_nothing(model, *beside):
        change()
        raise error


@pytest.mark.parametrize("error", [_Failure, KeyboardInterrupt])
def test_everything_is_put_back(error: type[BaseException]) -> None:
    model, owner = _model(), _Owner()
    before, seen = _description(model, owner), []

    def change() -> None:
        _change(model, owner)
        seen.append(_description(model, owner))

    with pytest.raises(error):
        _failing(model, owner, change=change, error=error)
    assert seen != [before]
    assert _description(model, owner) == before


def test_what_succeeds_stays() -> None:
    model, owner = _model(), _Owner()
    with all_or_nothing(model, owner):
        _change(model, owner)
    assert model[2].weight.eq(7.0).all()
    assert owner.inner.count == 1


def test_an_outer_change_undoes_an_inner_one_that_succeeded() -> None:
    model, owner = _model(), _Owner()
    before = _description(model, owner)

    def change() -> None:
        with all_or_nothing(model, owner):
            _change(model, owner)

    with pytest.raises(_Failure):
        _failing(model, owner, change=change)
    assert _description(model, owner) == before


def test_an_inner_failure_that_is_caught_undoes_the_inner_change_alone() -> None:
    model, owner = _model(), _Owner()
    with all_or_nothing(model, owner):
        owner.inner.count = 5
        with pytest.raises(_Failure):
            _failing(model, owner, change=lambda: _change(model, owner))
    assert owner.inner.count == 5
    assert "new" not in dict(model.named_children())


def test_values_are_restored_where_the_data_were_replaced() -> None:
    model = _model()
    weight, before = model[0].weight, model[0].weight.detach().clone()

    def change() -> None:
        keep_values([weight])
        weight.data = torch.zeros(5, 5)

    with pytest.raises(_Failure):
        _failing(model, change=change)
    assert model[0].weight is weight
    assert torch.equal(weight, before)


def _double(tensors: dict[str, nn.Parameter]) -> None:
    with torch.no_grad():
        for tensor in tensors.values():
            tensor.mul_(2.0)


def test_values_on_disk_are_restored_by_the_change_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = _model()
    tensors = dict(model[0].named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def change() -> None:
        keep_on_disk(tensors)
        keep_on_disk(tensors)  # has them already
        assert len(list(tmp_path.iterdir())) == 1
        _double(tensors)

    with pytest.raises(_Failure):
        _failing(model, change=change)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert list(tmp_path.iterdir()) == []
    with all_or_nothing(model):
        with all_or_nothing(model):
            change()
        assert len(list(tmp_path.iterdir())) == 1  # the outer one may still fail
        with pytest.raises(_Failure):
            _failing(model, change=lambda: _double(tensors))
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(tensors[name], value * 4) for name, value in before.items())
    keep_on_disk(tensors)  # no change is running
    assert list(tmp_path.iterdir()) == []


def test_a_lasting_file_stands_for_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = _model()
    tensors = dict(model[0].named_parameters())
    before = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    stored = Stored(tensors)

    def change() -> None:
        keep_on_disk(tensors, stored)
        _double(tensors)

    with pytest.raises(_Failure):
        _failing(model, change=change)
    assert all(torch.equal(tensors[name], value) for name, value in before.items())
    assert len(list(tmp_path.iterdir())) == 1


def test_what_follows_a_change_waits_for_the_outermost() -> None:
    model, seen = _model(), []

    def note() -> None:
        when_settled(lambda: seen.append("final"), lambda: seen.append("undone"))

    note()
    assert seen == ["final"]
    seen.clear()
    with all_or_nothing(model):
        with all_or_nothing(model):
            note()
        with pytest.raises(_Failure):
            _failing(model, change=note)
        assert seen == []
    assert seen == ["final", "undone"]
    seen.clear()

    def nested() -> None:
        with all_or_nothing(model):
            note()

    with pytest.raises(_Failure):
        _failing(model, change=nested)
    assert seen == ["undone"]
