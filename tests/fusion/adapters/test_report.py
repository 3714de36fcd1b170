"""Transfer reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from adapters import SeqBnConfig
from adapters.composition import Fuse, Stack
from torch import Tensor, nn

from pal_adapters import (
    ConfigError,
    ScaLearnConfig,
    TransferTable,
    UnknownAdapterError,
    UnsupportedError,
    plot_transfer,
    transfer_report,
)
from tests.hosts.adapters import test_model_classes as classes

from .test_scalearn import FUSE, NAMES, omegas, randomise_omegas, with_sources


@pytest.mark.parametrize("kind", ["seq_bn", "double_seq_bn"])
def test_coefficients(kind: str, bert: nn.Module) -> None:
    with_sources(bert, kind)
    bert.add_adapter_fusion(FUSE, config="scalearn")
    randomise_omegas(bert)
    bert.train_adapter_fusion(Stack(FUSE))  # dropout must not show
    table = transfer_report(bert)
    assert list(table.sources) == list(NAMES)
    if kind == "seq_bn":
        assert list(table.places) == ["0", "1", "2"]
    else:
        assert list(table.places)[:3] == ["0 attention", "0 output", "1 attention"]
    expected = torch.stack([o.abs().mean(1) for o in omegas(bert)])
    torch.testing.assert_close(torch.tensor(table.values), expected)
    assert all(place.training for place in bert.modules() if hasattr(place, "omega"))
    assert plot_transfer(bert).axes[0].images


def test_shared_and_normalised_coefficients(bert: nn.Module) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config=ScaLearnConfig(variant="scalearn_pp", ablation="softmax"))
    randomise_omegas(bert)
    table = transfer_report(bert, FUSE)
    assert list(table.places) == ["all"]
    (omega,) = omegas(bert)
    torch.testing.assert_close(torch.tensor(table.values[0]), omega.softmax(0).mean(1))


@pytest.mark.parametrize(("config", "start"), [({}, 1.0), ({"init_scale": 3.0}, 1.5), ({"ablation": "softmax"}, 0.5)])
def test_start_and_modes(config: dict[str, Any], start: float, bert: nn.Module) -> None:
    for name in ("a", "b"):
        bert.add_adapter(name, config=SeqBnConfig())
    fuse = Fuse("a", "b")
    bert.add_adapter_fusion(fuse, config=ScaLearnConfig(**config))
    bert.train()
    bert.encoder.layer[1].eval()
    modes = [module.training for module in bert.modules()]
    table = transfer_report(bert, fuse)
    assert [module.training for module in bert.modules()] == modes
    assert table.start == start
    assert all(value == pytest.approx(start, abs=0.01) for row in table.values for value in row)
    fixed = Fuse("b", "a", name="fixed")
    bert.add_adapter_fusion(fixed, config=ScaLearnConfig(fixed=[0.5, 0.25]))
    assert transfer_report(bert, fixed).start is None


@pytest.mark.parametrize("config", ["scalearn", "scalearn_pp", "dynamic"])
def test_a_block_without_a_source_has_no_number_for_it(config: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    bert.add_adapter("a", config=SeqBnConfig(leave_out=[1]))
    bert.add_adapter("b", config=SeqBnConfig())
    fuse = Fuse("a", "b")
    bert.add_adapter_fusion(fuse, config=config)
    table = transfer_report(bert, fuse, data=[batch] if config == "dynamic" else None)
    blank = [[value is None for value in row] for row in table.values]
    assert blank == ([[False, False]] if config == "scalearn_pp" else [[False, False], [True, False], [False, False]])
    assert "None" not in str(table)


def test_attention_is_averaged_over_real_tokens(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="dynamic")
    for omega in omegas(bert):
        nn.init.normal_(omega, std=0.3)
    bert.set_active_adapters("a")
    bert.train()
    parts = [{k: v[:1] for k, v in batch.items()}, {k: v[1:] for k, v in batch.items()}]
    table = transfer_report(bert, FUSE, data=[{**part, "labels": torch.zeros(1)} for part in parts])
    assert bert.training
    assert bert.active_adapters == Stack("a")
    assert table.measure == "mean attention"
    bert.eval()
    bert.set_active_adapters(FUSE)
    with torch.no_grad():
        found = bert(**batch, output_adapter_fusion_attentions=True).adapter_fusion_attentions["a,b,c"]
    real = batch["attention_mask"].bool()
    for index in range(3):
        expected = torch.from_numpy(found[index]["output_adapter"])[real].mean(0)
        torch.testing.assert_close(torch.tensor(table.values[index]), expected)
        assert sum(table.values[index]) == pytest.approx(1)


def test_attention_over_a_mixture(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    with_sources(bert, "mixture")
    bert.add_adapter_fusion(FUSE, config="dynamic")
    table = transfer_report(bert, FUSE, data=[batch])
    assert isinstance(table, TransferTable)
    assert all(sum(row) == pytest.approx(1) for row in table.values)


def test_encoder_and_decoder() -> None:
    model = classes.plain("encoder-decoder")
    classes.init(model)
    with_sources(model, "seq_bn")
    model.add_adapter_fusion(FUSE, config="scalearn_uniform")
    table = transfer_report(model, FUSE)
    assert list(table.places) == ["encoder 0", "encoder 1", "decoder 0", "decoder 1"]
    model.add_adapter_fusion(Fuse("a", "b"), config="dynamic")
    with pytest.raises(UnsupportedError, match="encoder-decoder"):
        transfer_report(model, Fuse("a", "b"), data=[classes.inputs("encoder-decoder")])


BAD: dict[str, tuple[Any, dict[str, Any], type[Exception], str]] = {
    "unknown": ("x", {}, UnknownAdapterError, "no fusion 'x'"),
    "none active": (None, {}, UnsupportedError, "0 fusions are active"),
    "useless data": (FUSE, {"data": []}, ConfigError, "data has no effect"),
    "no data": (Fuse("a", "b"), {}, ConfigError, "data=None"),
    "empty data": (Fuse("a", "b"), {"data": []}, ConfigError, "data is empty"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments(case: str, bert: nn.Module) -> None:
    with_sources(bert, "seq_bn")
    bert.add_adapter_fusion(FUSE, config="scalearn")
    bert.add_adapter_fusion(Fuse("a", "b"), config="dynamic")
    fusion, options, error, message = BAD[case]
    with pytest.raises(error, match=message):
        transfer_report(bert, fusion, **options)
