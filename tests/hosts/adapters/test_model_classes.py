"""Every model class of `adapters`: identity, values equal to PEFT's, mixed batches, files."""

from __future__ import annotations

import copy
import functools
import pathlib
from typing import Any

import adapters
import pytest
import torch
from adapters.composition import BatchSplit, Fuse, Parallel
from torch import Tensor, nn

from pal_adapters import (
    SiteError,
    UnsupportedError,
)
from pal_adapters.hosts.adapters.layer import TaskLayer
from tests import zoo
from tests.methods import RECORDS, names

from .model_classes import NAMES, init, inputs, plain, seeded

pytestmark = [
    *zoo.HOST_WARNINGS,
    # adapters 1.3 passes T5's blocks an argument name that transformers 4.57 deprecates.
    pytest.mark.filterwarnings("ignore:`past_key_value` is deprecated:FutureWarning"),
]

# `adapters` builds X-MOD without its language adapters, which is another model.
ELSEWHERE = [name for name in NAMES if not name.startswith("xmod")]
CONFIGS: dict[str, Any] = {name: RECORDS[name].config("adapters") for name in names("adapters")}
models = pytest.mark.parametrize("name", NAMES)


@functools.cache
def _adapted(name: str) -> nn.Module:
    model = plain(name)
    init(model)
    for method, config in CONFIGS.items():
        if not (name == "albert" and RECORDS[method].at_top):
            model.add_adapter(method, config=config)
            units(model, method, seed=len(method))
    return model.eval()


def adapted(name: str) -> nn.Module:
    return copy.deepcopy(_adapted(name))


def units(model: nn.Module, method: str, *, seed: int | None = None) -> list[Any]:
    """The units of an adapter in module order, with random weights if a seed is given."""
    found = [m.pal_adapters[method][method] for m in model.modules() if isinstance(m, TaskLayer) and m.methods(method)]
    if seed is not None:
        for index, unit in enumerate(found):
            zoo.randomise(nn.ParameterList(unit.weights().values()), seed=seed + index)
    return found


def run(model: nn.Module, name: str, setup: Any = "none", **more: Any) -> dict[str, Tensor]:
    """Logits or hidden states, without those of padded tokens."""
    if setup != "none":
        model.set_active_adapters(setup)
    batch = inputs(name) | more
    with torch.no_grad():
        found = zoo.outputs_of(model(**batch))
    assert found
    mask = batch.get("attention_mask")
    of_inputs = ("encoder_last_hidden_state",) if "decoder_input_ids" in batch else found
    for key, value in found.items():
        assert value.isfinite().all()
        if mask is not None and value.dim() == 3 and value.shape[1] == mask.shape[1] and key in of_inputs:
            found[key] = value * mask.repeat(value.shape[0] // mask.shape[0], 1)[..., None]
    return found


def difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)


@models
def test_identity_at_start_is_exact(name: str) -> None:
    model = plain(name)
    unchanged = run(model, name) if name in ELSEWHERE else None
    init(model)
    before = run(model, name)
    assert unchanged is None or difference(before, unchanged) < 1e-5
    for method, config in CONFIGS.items():
        if RECORDS[method].method.identity:
            model.add_adapter(method, config=config)
            assert difference(run(model, name, method), before) == 0.0, method
            units(model, method, seed=3)
            assert difference(run(model, name), before) > 1e-3, method
            model.set_active_adapters(None)
            assert difference(run(model, name), before) == 0.0, method


@pytest.mark.parametrize("name", ELSEWHERE)
def test_same_values_as_in_peft(name: str) -> None:
    peft = pytest.importorskip("peft")

    configs = {name: RECORDS[name].config("peft") for name in CONFIGS}
    model = adapted(name)
    for method, config in configs.items():
        if name == "albert" and RECORDS[method].at_top:
            continue
        other = peft.get_peft_model(plain(name), config).eval()
        theirs = [getattr(m, method).units["default"] for m in other.modules()
                  if "default" in getattr(getattr(m, method, None), "units", ())]  # fmt: skip
        for mine, its in zip(units(model, method), theirs, strict=True):
            assert mine.weights().keys() == its.weights().keys()
            for key, value in mine.weights().items():
                its.weights()[key].data.copy_(value)
        expected = run(other, name)
        actual = run(model, name, method)
        scale = max(float(value.abs().max()) for value in expected.values())
        assert difference(actual, expected) < 2e-5 * max(1.0, scale), method


def close(actual: Tensor, expected: Tensor) -> None:
    """Up to rounding relative to the largest value: batches are summed in another order than single examples."""
    torch.testing.assert_close(actual, expected, atol=5e-5 * max(1.0, float(expected.abs().max())), rtol=1e-4)


SETUPS = (("pal", "seq"), ("seq", "low_rank"), ("parallel_houlsby", "both"), ("pal", "lhuc"), ("houlsby_pal", "side"))


@models
def test_rows_of_a_mixed_batch_equal_single_runs(name: str) -> None:
    model = adapted(name)
    kinds = {"seq": "seq_bn", "both": "double_seq_bn", "side": "par_bn"}
    for other, config in kinds.items():
        model.add_adapter(other, config=config)
        for parameter in (p for m in model.get_adapter(other).values() for x in m.values() for p in x.parameters()):
            nn.init.normal_(parameter, std=0.2)
    model.eval()
    for a, b in SETUPS:
        if "side" in (a, b) and name == "phi":
            continue  # the host gives parallel bottlenecks no input there
        first, second = run(model, name, a), run(model, name, b)
        mixed = run(model, name, BatchSplit(a, b, batch_sizes=[1, 2]))
        for key, value in mixed.items():
            close(value, torch.cat([first[key][:1], second[key][1:]]))


@models
def test_files(name: str, tmp_path: pathlib.Path) -> None:
    model = adapted(name)
    for method in ("pal", "parallel_houlsby", "lhuc"):
        model.save_adapter(str(tmp_path / method), method, use_safetensors=True)
        other = plain(name)
        init(other)
        info: dict[str, Any] = {}
        other.load_adapter(str(tmp_path / method), load_as="x", use_safetensors=True, loading_info=info)
        assert (info["missing_keys"], info["unexpected_keys"]) == ([], [])
        assert difference(run(other.eval(), name, "x"), run(model, name, method)) == 0.0, method


@models
def test_gradients_reach_every_tensor(name: str) -> None:
    model = adapted(name)
    for method in ("pal", "houlsby_pal"):
        model.train_adapter(method)
        model.eval()
        model.zero_grad()
        found = zoo.outputs_of(model(**inputs(name)))
        sum((value * torch.randn(value.shape, generator=seeded(5))).sum() for value in found.values()).backward()
        for unit in units(model, method):
            for key, value in unit.weights().items():
                assert value.grad is not None, key
                assert value.grad.abs().max() > 0 or key.endswith("key.bias"), key


def test_a_module_on_top_is_rejected_where_blocks_are_used_again() -> None:
    model = plain("albert")
    adapters.init(model)
    with pytest.raises(UnsupportedError, match="ALBERT"):
        model.add_adapter("top", config=CONFIGS["top_attention"])
    assert "top" not in model.adapters_config


def test_fusing_is_rejected_where_a_norm_stands_behind_the_hosts_bottleneck() -> None:
    model = adapted("gemma2")
    with pytest.raises(UnsupportedError, match=r"Fuse\(pal, low_rank\).*Gemma2DecoderLayer"):
        model.add_adapter_fusion(Fuse("pal", "low_rank"))
    assert not model.adapters_config.fusions


@pytest.mark.parametrize("name", ["qwen3", "modernbert", "t5", "bart", "vit", "distilbert", "gpt2"])
def test_fusion_with_one_value_matrix_of_ones_is_a_weighted_sum(name: str) -> None:
    """With zero queries all children weigh the same, and with `V = I` the fusion is their mean."""
    model = adapted(name)
    setup = Fuse("pal", "low_rank")
    model.add_adapter_fusion(setup)
    for key, parameter in model.named_parameters():
        if "adapter_fusion_layer" in key:
            nn.init.zeros_(parameter) if "value" not in key else nn.init.eye_(parameter)
    model.eval()
    fused = run(model, name, setup)
    for method in ("pal", "low_rank"):  # the mean, by halving what each adds
        for unit in units(model, method):
            unit.register_forward_hook(lambda module, args, result: args[1] + 0.5 * (result - args[1]))
    halves = run(model, name, adapters.Stack("pal", "low_rank"))
    assert difference(fused, halves) < 5e-4


@pytest.mark.parametrize(
    "name",
    ["bert-generation", "gpt2", "llama", "mistral", "t5", "vit", "deberta", "whisper", "xmod"],
)
def test_parallel_equals_single_runs(name: str) -> None:
    model = adapted(name)
    model.add_adapter("seq", config="seq_bn")
    model.eval()
    for setup in (("pal", "low_rank"), ("seq", "pal"), ("parallel_houlsby", "pal")):
        single = [run(model, name, part) for part in setup]
        for key, value in run(model, name, Parallel(*setup)).items():
            close(value, torch.cat([part[key] for part in single]))


def test_an_unknown_model_gets_a_site_error() -> None:
    """A block of unknown structure is rejected, with what to pass."""
    model = plain("gpt2")
    for block in model.transformer.h:
        block.add_module("another", nn.Linear(2, 2))
    adapters.init(model)
    before = model.state_dict().keys()
    with pytest.raises(SiteError, match="register_block"):
        model.add_adapter("a", config="pal")
    assert "a" not in model.adapters_config
    assert model.state_dict().keys() == before
