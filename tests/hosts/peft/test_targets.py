"""Which blocks and modules get an adapter."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import nn

import pal_adapters as pa
from pal_adapters import ConfigError, PalAdaptersError
from tests.methods import RECORDS

from . import cases


def places(model: Any) -> set[str]:
    """The modules that hold adapters, relative to the base model."""
    return {
        name.removeprefix("base_model.model.").rpartition(".")[0] if ".base_layer" not in name else name
        for name, module in model.named_modules()
        if hasattr(module, "adapter_layer_names")
        and type(module).__name__ not in ("ModulesToSaveWrapper", "HoulsbyNorm")
    }


def blocks(model: Any) -> set[int]:
    """The indices of the adapted blocks."""
    return {int(index) for place in places(model) for index in re.findall(r"\.(\d+)(?:\.|$)", place)[:1]}


ALL = {0, 1, 2}
CHOICES: list[tuple[dict[str, Any], set[int]]] = [
    ({"target_modules": None}, ALL),
    ({"target_modules": ["bert.encoder.layer.1"]}, {1}),
    ({"target_modules": ["encoder.layer.1", "layer.2"]}, {1, 2}),
    ({"target_modules": ["encoder.layer"]}, ALL),
    ({"target_modules": ["layer"]}, ALL),
    ({"target_modules": r".*\.layer\.[02]"}, {0, 2}),
    ({"target_modules": r"bert\.encoder\.layer\.2"}, {2}),
    ({"exclude_modules": ["layer.0"]}, {1, 2}),
    ({"exclude_modules": r".*\.(0|1)"}, {2}),
    ({"target_modules": ["layer"], "exclude_modules": ["encoder.layer.1"]}, {0, 2}),
    ({"layers_to_transform": 2}, {2}),
    ({"layers_to_transform": [0, 2]}, {0, 2}),
    ({"layers_to_transform": [1, 2], "layers_pattern": "layer"}, {1, 2}),
    ({"layers_to_transform": [1, 2], "layers_pattern": ["layers", "layer"], "exclude_modules": ["layer.1"]}, {2}),
    ({"target_modules": ["encoder.layer"], "layers_to_transform": [0]}, {0}),
    ({"layers_to_transform": [0, 1], "modules_to_save": ["encoder.layer.0"]}, {1}),
]


@pytest.mark.parametrize(("choice", "expected"), CHOICES, ids=[str(c) for c, _ in CHOICES])
def test_choice_of_blocks(method: str, choice: dict[str, Any], expected: set[int]) -> None:
    if RECORDS[method].at_top:
        if 2 not in expected:
            with pytest.raises(ConfigError, match="is the last of its stack"):
                get_peft_model(cases.bert(), cases.config(method, **choice))
            return
        expected = {2}
    model = get_peft_model(cases.bert(), cases.config(method, **choice))
    assert blocks(model) == expected


@pytest.mark.parametrize("task_type", [None, "SEQ_CLS"])
def test_modules_to_save_must_be_on_the_model(method: str, task_type: str | None) -> None:
    """PEFT ignores a misspelt name, and the head stays as it is."""
    model = cases.bert()
    before = set(model.state_dict())
    with pytest.raises(ConfigError, match=r"modules_to_save has 'clasifier'.*'bert'"):
        get_peft_model(model, cases.config(method, modules_to_save=["clasifier"], task_type=task_type))
    assert set(model.state_dict()) == before
    get_peft_model(model, cases.config(method, modules_to_save=["classifier"], task_type=task_type))


def test_a_subset_computes_as_if_the_others_had_nothing(method: str) -> None:
    """Equal to an adapter in all blocks whose modules in the other blocks do nothing."""
    given = cases.inputs()
    index = 2 if RECORDS[method].at_top else 1
    subset = get_peft_model(cases.bert(), cases.config(method, layers_to_transform=index), "rte").eval()
    cases.randomise(subset, "rte", seed=0)
    full = get_peft_model(cases.bert(), cases.config(method), "rte").eval()
    own = dict(cases.adapter_parameters(subset, "rte"))
    for name, parameter in cases.adapter_parameters(full, "rte"):
        # What the blocks of a stack share is registered in the first adapted block.
        key = name.replace("layer.0.", f"layer.{index}.") if "_shared." in name else name
        if key in own:
            parameter.data.copy_(own[key].data)
        elif "_norms" not in name and "rho" not in name and "_shared." not in name:
            parameter.data.zero_()
    if RECORDS[method].shares:  # its share of the projections makes a term even of zeros
        for name, module in full.named_modules():
            if name.endswith(("layer.0", "layer.2")):
                getattr(module, method).attachment.remove()
    torch.testing.assert_close(cases.run(subset, "rte", given), cases.run(full, "rte", given), atol=1e-6, rtol=1e-6)


def test_adapters_with_other_blocks_side_by_side(method: str) -> None:
    first, second = ([2], [2]) if RECORDS[method].at_top else ([0], [1, 2])
    given = cases.inputs()
    model = get_peft_model(cases.bert(), cases.config(method, layers_to_transform=first), "rte").eval()
    model.add_adapter("sst", cases.config(method, layers_to_transform=second))
    for seed, name in enumerate(("rte", "sst")):
        cases.randomise(model, name, seed=seed)
        alone = get_peft_model(
            cases.bert(), cases.config(method, layers_to_transform=first if name == "rte" else second), name
        ).eval()
        own = dict(cases.adapter_parameters(model, name))
        for key, parameter in cases.adapter_parameters(alone, name):
            parameter.data.copy_(own[key].data)
        assert set(own) == {key for key, _ in cases.adapter_parameters(alone, name)}
        assert torch.equal(cases.run(model, name, given), cases.run(alone, name, given))


def test_encoder_and_decoder_count_for_themselves() -> None:
    model = get_peft_model(cases.t5(), cases.config("low_rank", layers_to_transform=[1]))
    assert places(model) == {"encoder.block.1", "decoder.block.1"}
    model = get_peft_model(cases.t5(), cases.config("low_rank", target_modules=["decoder.block"]))
    assert places(model) == {"decoder.block.0", "decoder.block.1"}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"target_modules": ["nothing"]}, "target_modules"),
    ({"target_modules": ["layer.0", "layer.9"]}, "target_modules"),
    ({"target_modules": "nothing"}, "target_modules='nothing'"),
    ({"exclude_modules": ["layer.7"]}, "exclude_modules has 'layer.7'"),
    ({"exclude_modules": ["layer"]}, "exclude_modules={'layer'}"),
    ({"layers_to_transform": 3}, "layers_to_transform=3 is not allowed: there is no block 3, the blocks are 0 to 2"),
    ({"layers_to_transform": [0, -1]}, "layers_to_transform"),
    ({"layers_to_transform": [True]}, "layers_to_transform"),
    ({"layers_to_transform": []}, "layers_to_transform"),
    ({"layers_to_transform": [0], "layers_pattern": "h"}, "layers_pattern='h'"),
]


@pytest.mark.parametrize(("choice", "message"), WRONG, ids=[str(c) for c, _ in WRONG])
def test_choices_that_match_nothing(method: str, choice: dict[str, Any], message: str) -> None:
    base = cases.bert()
    before, hooks, given = cases.state(base), cases.hooks(base), cases.inputs()
    plain = cases.run(base, None, given)
    with pytest.raises(ConfigError, match=re.escape(message)):
        get_peft_model(base, cases.config(method, **choice))
    cases.assert_same_state(base, before)
    assert cases.hooks(base) == hooks
    assert all(p.requires_grad for p in base.parameters())
    assert not hasattr(base, "peft_config")
    assert torch.equal(cases.run(base, None, given), plain)
    # And a second adapter that fails leaves the first one as it was.
    model = cases.peft_model(method)
    before, expected = cases.state(model), cases.run(model, "rte", given)
    grads = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ConfigError):
        model.add_adapter("sst", cases.config(method, task_type="SEQ_CLS", **choice))
    cases.assert_same_state(model, before)
    assert list(model.peft_config) == ["rte"]
    assert model.active_adapters == ["rte"]
    assert [p.requires_grad for p in model.parameters()] == grads
    with torch.no_grad():
        assert torch.equal(model(**given).logits, expected)


class MLP(nn.Module):
    """The plain model of PEFT's own tests."""

    def __init__(self) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20)
        self.norm = nn.LayerNorm(20)
        self.lin1 = nn.Linear(20, 2)
        self.last = nn.Sequential(nn.Linear(2, 2), nn.Tanh())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.lin1(torch.relu(self.norm(self.lin0(x)))))


def mlp() -> MLP:
    torch.manual_seed(0)
    return MLP()


def houlsby(model: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    w = model.get_submodule(f"{path}.houlsby.houlsby_units.default")
    return x + w.up(nn.functional.gelu(w.down(x), approximate="tanh"))


@pytest.mark.parametrize("target", [["lin0", "lin1"], r"lin\d", "all-linear"])
def test_houlsby_on_a_plain_model(target: Any) -> None:
    config = pa.HoulsbyPeftConfig(target_modules=target, hidden_size=3, exclude_modules=None)
    model = get_peft_model(mlp(), config)
    expected = {"lin0", "lin1", "last.0"} if target == "all-linear" else {"lin0", "lin1"}
    assert places(model) == expected
    x = torch.randn(5, 10)
    assert torch.equal(model(x), mlp()(x))
    cases.randomise(model, "default", seed=0)
    plain, adapted = mlp(), model.base_model.model
    norm = adapted.norm.houlsby_norms["default"]
    y = houlsby(adapted, "lin0", plain.lin0(x))
    y = nn.functional.layer_norm(y, (20,), norm.weight, norm.bias)
    y = houlsby(adapted, "lin1", plain.lin1(torch.relu(y)))
    y = torch.tanh(houlsby(adapted, "last.0", plain.last[0](y))) if target == "all-linear" else plain.last(y)
    torch.testing.assert_close(model(x), y)
    with model.disable_adapter():
        assert torch.equal(model(x), plain(x))
    assert torch.equal(model.unload()(x), plain(x))


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (["attention.output.dense", "output.dense"],
         {f"bert.encoder.layer.{i}.{m}" for i in range(3) for m in ("attention.output.dense", "output.dense")}),
        ([".*"], set()),
        (r".*layer\.[01]\.output\.dense", {f"bert.encoder.layer.{i}.output.dense" for i in range(2)}),
        (["pooler.dense"], {"bert.pooler.dense"}),
        (["encoder.layer.1.attention"], {"bert.encoder.layer.1.attention"}),
    ],
)  # fmt: skip
def test_houlsby_at_named_modules(target: Any, expected: set[str]) -> None:
    config = pa.HoulsbyPeftConfig(target_modules=target, hidden_size=6)
    if not expected:
        with pytest.raises(ConfigError, match="names neither a block nor a module"):
            get_peft_model(cases.bert(), config)
        return
    model = get_peft_model(cases.bert(), config)
    assert places(model) == expected
    given = cases.inputs()
    assert torch.equal(cases.run(model.eval(), "default", given), cases.run(cases.bert(), None, given))


def test_houlsby_at_named_modules_with_layers() -> None:
    config = pa.HoulsbyPeftConfig(
        target_modules=["output.dense"], layers_to_transform=[0, 2], exclude_modules=["attention.output.dense"]
    )
    model = get_peft_model(cases.bert(), config)
    assert places(model) == {f"bert.encoder.layer.{i}.output.dense" for i in (0, 2)}


@pytest.mark.parametrize(
    ("base", "target", "message"),
    [
        (mlp, None, "MLP has no transformer blocks"),
        (mlp, ["lin7"], "target_modules={'lin7'} names neither a block nor a module of MLP"),
        (mlp, ["last"], "the output width of 'last', a Sequential, is not known"),
        (cases.bert, ["intermediate"], "the output width of 'bert.encoder.layer.0.intermediate', a BertIntermediate"),
        (cases.bert, ["output.dense", "layer.1"], "target_modules has 'output.dense', which names no block"),
    ],
)
def test_houlsby_at_modules_that_do_not_work(base: Any, target: Any, message: str) -> None:
    model = base()
    before = cases.state(model)
    with pytest.raises(PalAdaptersError, match=re.escape(message)):
        get_peft_model(model, pa.HoulsbyPeftConfig(target_modules=target))
    cases.assert_same_state(model, before)


def test_other_methods_need_blocks(method: str) -> None:
    if method != "houlsby":
        with pytest.raises(pa.SiteError, match="MLP has no transformer blocks of a known structure"):
            get_peft_model(mlp(), cases.config(method))
        with pytest.raises(ConfigError, match="all-linear"):
            get_peft_model(cases.bert(), cases.config(method, target_modules="all-linear"))
        with pytest.raises(ConfigError, match="names no block"):
            get_peft_model(cases.bert(), cases.config(method, target_modules=["output.dense"]))
    else:
        with pytest.raises(pa.SiteError, match=r"Or name modules as for LoRA: target_modules=\["):
            get_peft_model(mlp(), cases.config(method))


def test_named_sites_reach_every_method(method: str) -> None:
    """The `sites` of a config, for blocks that are not known by themselves."""

    class Mine(type(cases.llama().model.layers[0])):  # type: ignore[misc]
        def __getattr__(self, name: str) -> Any:
            hidden = {"norm1": "input_layernorm", "attn": "self_attn", "ff": "mlp"}
            return super().__getattr__(hidden.get(name, name))

    sites = {"block": "Mine", "norm": "pre", "attention": "attn", "attention_output": "attn", "ffn": "ff",
             "ffn_output": "ff", "input_norm": "norm1"}  # fmt: skip
    given = cases.inputs("llama")
    models = []
    for own in (False, True):
        base = cases.llama()
        if own:
            for layer in base.model.layers:
                layer.__class__ = Mine
        model = get_peft_model(base, cases.config(method, sites=sites if own else None), "rte").eval()
        cases.randomise(model, "rte", seed=0)
        models.append(model)
    weights = dict(models[0].named_parameters())
    for name, parameter in models[1].named_parameters():
        parameter.data.copy_(weights[name].data)
    assert torch.equal(cases.run(models[0], "rte", given), cases.run(models[1], "rte", given))
