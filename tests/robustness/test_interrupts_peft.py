"""PEFT: a change of a model that is stopped at any point leaves the model as it was, and works the next time."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BertConfig, BertForSequenceClassification, BertModel

import pal_adapters as pa
from tests import zoo
from tests.hosts.peft.unchanged import differences, picture

from .interrupts import stopped

pytestmark = zoo.HOST_WARNINGS
POINTS = int(os.environ.get("PAL_ADAPTERS_INTERRUPTS", "6"))
IDS = torch.arange(3, 31).reshape(4, 7)
CONFIGS: dict[str, Callable[[], Any]] = {
    "pal": lambda: pa.PALPeftConfig(hidden_size=12, num_heads=2),
    "pal and base": lambda: pa.PALPeftConfig(hidden_size=12, num_heads=2, train_base=True),
    "houlsby": lambda: pa.HoulsbyPeftConfig(hidden_size=4),
    "ca_mtl": lambda: pa.CAMTLPeftConfig(tasks=["rte", "sst"], max_length=16),
    "in place": lambda: pa.CAMTLPeftConfig(
        tasks=["rte", "sst"], max_length=16, base_weights="in_place", top_block_init="scratch"
    ),
}


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, intermediate_size=32)).eval()


def adapted(method: str, *names: str) -> PeftModel:
    model = get_peft_model(base(), CONFIGS[method](), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, CONFIGS[method]())
    zoo.randomise(model.base_model, seed=1)
    return model.eval()


def states(model: Any) -> torch.Tensor:
    ca_mtl = any(isinstance(config, pa.CAMTLPeftConfig) for config in getattr(model, "peft_config", {}).values())
    with torch.no_grad():
        return model(input_ids=IDS, **({"task_ids": [0, 1, 0, 1]} if ca_mtl else {}))[0]


def check(make: Callable[[], Any], change: Callable[[Any], Any]) -> None:
    model = make()
    before, expected = picture(model), states(model)
    for _ in stopped(change, model, make(), POINTS):
        assert differences(before, picture(model)) == []
        assert torch.equal(states(model), expected)
    change(model)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    place = tmp_path_factory.mktemp("saved")
    found = {name: str(place / name.replace(" ", "_") / "new") for name in CONFIGS}
    for name, folder in found.items():
        adapted(name, "new").save_pretrained(str(Path(folder).parent))
    return found


@pytest.mark.parametrize("method", CONFIGS)
def test_adding_and_loading(method: str, folders: dict[str, str]) -> None:
    check(base, lambda model: get_peft_model(model, CONFIGS[method]()))
    check(base, lambda model: PeftModel.from_pretrained(model, folders[method]))
    check(base, lambda model: model.load_adapter(folders[method], "new"))
    if method not in ("pal and base", "in place"):  # which have the base to themselves
        check(lambda: adapted(method, "old"), lambda model: model.load_adapter(folders[method], "new"))
    if method != "pal and base":
        check(lambda: adapted(method, "old"), lambda model: model.load_adapter(folders[method], "old"))


@pytest.mark.parametrize("method", ["pal", "houlsby", "ca_mtl"])
def test_choosing_and_removing(method: str) -> None:
    changes: list[Callable[[Any], Any]] = [
        lambda model: model.set_adapter("two"),
        lambda model: model.delete_adapter("two"),
        lambda model: model.unload(),
    ]
    for change in changes:
        check(lambda: adapted(method, "one", "two"), change)


def test_weights_in_place_are_put_back_or_kept() -> None:
    changes: list[Callable[[Any], Any]] = [
        lambda model: model.set_adapter("one"),
        lambda model: model.delete_adapter("one"),
        lambda model: model.unload(),
    ]
    for change in changes:
        check(lambda: adapted("in place", "one"), change)


def test_tasks_of_a_network() -> None:
    changes: list[Callable[[Any], Any]] = [
        lambda model: pa.add_task(model, "new", "net"),
        lambda model: pa.train_tasks(model, ["rte"], "net"),
    ]
    for change in changes:
        check(lambda: adapted("ca_mtl", "net"), change)


def test_folding(tmp_path: Path) -> None:
    paths = {name: str(tmp_path / name) for name in ("a", "b")}
    for path in paths.values():
        config = LoraConfig(target_modules=["query"], r=2, init_lora_weights=False)
        get_peft_model(base(), config).save_pretrained(path)
    check(lambda: get_peft_model(base(), pa.ScaLearnPeftConfig(adapters=paths)).eval(), pa.fold)


@pytest.mark.parametrize(
    "options", [{}, {"truncate": 3, "name": "other"}, {"truncate": 3, "data": [{"input_ids": IDS}]}]
)
def test_folding_with_a_head(options: dict[str, Any], tmp_path: Path) -> None:
    def classifier() -> Any:
        torch.manual_seed(1)
        return BertForSequenceClassification(base().config).eval()

    paths = {name: str(tmp_path / name) for name in ("a", "b")}
    for path in paths.values():
        get_peft_model(classifier(), pa.HoulsbyPeftConfig(hidden_size=2, init_weights=False)).save_pretrained(path)
    config = {"adapters": paths, "task_type": "SEQ_CLS"}
    check(
        lambda: get_peft_model(classifier(), pa.ScaLearnPeftConfig(**config)).eval(),
        lambda model: pa.fold(model, **options),
    )
