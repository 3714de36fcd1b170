"""Sources and combinations in one model; the script tests train them."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.multitask import (
    COMBINATIONS,
    BatchMaker,
    TaskData,
    TrainingConfig,
    TransferModel,
    encode_rows,
    fit,
    load_toy_task,
    predict,
    train_dev_split,
)

pytestmark = pytest.mark.skipif("adapters" not in sys.modules and find_spec("adapters") is None, reason="adapters")


class Setup:
    """A tiny model with random sources for two made-up tasks, and the data of a third."""

    def __init__(self, folder: str) -> None:
        torch.manual_seed(0)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = TransferModel(AutoModel.from_pretrained(folder), reduction_factor=4)
        self.batches = BatchMaker(tokenizer, self.model.device)
        self.tasks = {}
        for name in ("sentiment", "acceptability", "entailment"):
            spec, splits = load_toy_task(name, train_size=40, test_size=10)
            train, dev = train_dev_split(splits["train"])
            parts = [encode_rows(spec, rows, tokenizer, 48) for rows in (train, dev, splits["validation"])]
            self.tasks[name] = TaskData(spec, parts[0], parts[1], {"validation": parts[2]})
        for name in ("sentiment", "acceptability"):
            self.model.add_task(self.tasks[name].spec)
        for name, parameter in self.model.named_parameters():
            if ".adapters." in name:
                torch.nn.init.normal_(parameter, std=0.3)

    def logits(self, name: str) -> np.ndarray:
        task = self.tasks[name]
        return predict(self.model, task.spec, task.test["validation"], self.batches)


@pytest.mark.parametrize("method", COMBINATIONS)
@pytest.mark.parametrize("target", ["entailment", "sentiment"])
def test_a_target_trains_its_combination_and_head_alone(method: str, target: str, tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder)
    spec = setup.tasks[target].spec
    setup.model.combine(spec, ["sentiment", "acceptability"], method)
    before = {name: p.detach().clone() for name, p in setup.model.state_dict().items()}
    config = TrainingConfig(epochs=1, progress=False, batch_size=8)
    fit(setup.model, [setup.tasks[target]], config, setup.batches)
    changed = {name for name, p in setup.model.state_dict().items() if not torch.equal(p, before[name])}
    assert {n for n in changed if "adapter_fusion_layer" not in n} == {
        f"heads.{target}.weight",
        f"heads.{target}.bias",
    }
    assert any("adapter_fusion_layer" in n for n in changed) is (method != "average")
    logits = setup.logits(target)
    if method == "fusion":
        with pytest.raises(UnsupportedError, match="no exact fold"):
            setup.model.fold(target)
        assert setup.model.penalty(target) is not None
    else:
        assert setup.model.penalty(target) is None
        setup.model.fold(target)
        np.testing.assert_allclose(setup.logits(target), logits, atol=1e-5)


def test_average_is_the_mean_of_the_sources(tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder)
    setup.model.combine(setup.tasks["entailment"].spec, ["sentiment", "acceptability"], "average")
    assert setup.model.table("entailment").values == [[0.5, 0.5]]
    assert setup.model.count("entailment")["adapter"] == 0


@pytest.mark.parametrize(
    ("sources", "method", "message"),
    [
        ([], "scalearn", "sources=.*sentiment"),
        (["entailment"], "scalearn", "sources=.*sentiment"),
        (["sentiment"], "pal", "method='pal'"),
        (["sentiment", "sentiment"], "scalearn", "named twice"),
    ],
)
def test_sources_that_are_not_there(sources: list[str], method: str, message: str, tiny_encoder: str) -> None:
    setup = Setup(tiny_encoder)
    with pytest.raises(ConfigError, match=message):
        setup.model.combine(setup.tasks["entailment"].spec, sources, method)
    assert "entailment" not in setup.model.heads


@pytest.mark.parametrize("options", [{"host": "x"}, {"pooling": "max"}, {"reduction_factor": 0}])
def test_values_that_are_not_allowed(options: dict[str, Any], tiny_encoder: str) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        TransferModel(AutoModel.from_pretrained(tiny_encoder), **options)


def test_sources_come_back_from_disk(tiny_encoder: str, tmp_path: Path) -> None:
    setup = Setup(tiny_encoder)
    expected = setup.logits("sentiment")
    setup.model.save_task("sentiment", tmp_path)
    again = TransferModel(AutoModel.from_pretrained(tiny_encoder), reduction_factor=4)
    again.load_task(setup.tasks["sentiment"].spec, tmp_path)
    setup.model = again
    np.testing.assert_allclose(setup.logits("sentiment"), expected, atol=1e-6)
