"""Adding, training, averaging, listing, freezing, moving and deleting adapters, as with the host's own methods."""

from __future__ import annotations

import copy
from dataclasses import FrozenInstanceError
from typing import Any

import adapters
import pytest
import torch
import transformers
from adapters.composition import Stack
from adapters.configuration import AdapterConfig
from torch import Tensor, nn

import pal_adapters
from pal_adapters import (
    ConfigError,
    LHUCConfig,
    LowRankConfig,
    PALConfig,
    SiteError,
    TopAttentionConfig,
    TopBertLayerConfig,
    UnsupportedError,
)
from tests.methods import RECORDS

from . import reference as ref
from .tiny import SMALL, add, output, parameters_of, randomise

STRINGS = tuple(SMALL)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())


# Adding


@pytest.mark.parametrize("method", STRINGS)
def test_string_object_and_dict_give_the_same(method: str, bert: nn.Module) -> None:
    config = AdapterConfig.load(method)
    spellings = [config, config.to_dict(), method]
    counts = []
    for index, spelling in enumerate(spellings):
        bert.add_adapter(f"n{index}", config=spelling)
        counts.append(bert.adapter_summary(as_dict=True)[index]["#param"])
        assert bert.adapters_config.get(f"n{index}") == bert.adapters_config.get("n0")
    assert len(set(counts)) == 1
    assert counts[0] > 0


def test_string_with_overrides(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    bert.add_adapter("a", config="pal[hidden_size=12,num_heads=3,tie_projections=False,activation_site='none']")
    config = bert.adapters_config.get("a")
    assert isinstance(config, PALConfig)
    assert (config.hidden_size, config.num_heads, config.tie_projections) == (12, 3, False)
    randomise(bert, "a")

    def term(block: ref.Block, value: Tensor) -> Tensor:
        own = {k: v.detach() for k, v in bert.get_adapter("a")[block.index]["task_layer"]["pal"].named_parameters()}
        inner = ref.attention(ref.linear(block.x, own, "encoder"), own, 3, block.mask)
        return value + ref.linear(inner, own, "decoder")

    expected = ref.bert(bert, batch["input_ids"], batch["attention_mask"], o2=term).detach()
    torch.testing.assert_close(output(bert, batch, "a"), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [m for m in STRINGS if RECORDS[m].method.identity])
def test_identity_at_start_is_exact(method: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    before = output(bert, batch)
    bert.add_adapter("a", config=SMALL[method])
    assert torch.equal(output(bert, batch, "a"), before)
    randomise(bert, "a")
    assert (output(bert, batch) - before).abs().max() > 1e-3
    assert torch.equal(output(bert, batch, None), before)


def test_union_of_two_of_ours_and_built_in_ones(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    union = adapters.ConfigUnion(
        PALConfig(hidden_size=12, num_heads=3),
        LowRankConfig(hidden_size=5),
        adapters.SeqBnConfig(),
        adapters.LoRAConfig(),
    )
    bert.add_adapter("u", config=union)
    bert.add_adapter("prefix", config="prefix_tuning|pal[hidden_size=12]")
    randomise(bert, "u")
    pal, low = ref.weights_of(bert, "u", "pal"), ref.weights_of(bert, "u", "low_rank")
    merged = copy.deepcopy(bert)  # LoRA changes weights: fold it into the base by hand
    for layer in merged.encoder.layer:
        for linear in (layer.attention.self.query, layer.attention.self.value):
            lora = linear.loras["u"]
            linear.weight.data += lora.lora_B @ lora.lora_A * lora.scaling

    def terms(block: ref.Block, value: Tensor) -> Tensor:
        value = value + ref.pal(block.x, pal[block.index], 3, block.mask) + ref.low_rank(block.x, low[block.index])
        adapter = bert.get_adapter("u")[block.index]["output_adapter"]
        return value + ref.bottleneck(block.norm(value + block.h1), adapter)

    expected = ref.bert(merged, batch["input_ids"], batch["attention_mask"], o2=terms).detach()
    torch.testing.assert_close(output(bert, batch, "u"), expected, atol=2e-5, rtol=1e-5)


def test_a_pal_beside_prefix_tuning_adds_its_own_term(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    """Prefixes lengthen the keys of the host's attention but not those of the PAL."""
    bert.add_adapter(
        "u", config=adapters.ConfigUnion(PALConfig(hidden_size=12), adapters.PrefixTuningConfig(prefix_length=3))
    )
    bert.add_adapter("p", config=PALConfig(hidden_size=12))
    alone = output(bert, batch, "u")  # PAL is the identity at start
    for modules in bert.get_adapter("u").values():
        for key, module in modules.items():
            if key in ("task_layer", "shared"):
                for parameter in module.parameters():
                    nn.init.normal_(parameter, std=0.2)
    for key, value in list(bert.state_dict().items()):
        if "pal_adapters.u." in key or "shared_parameters.u." in key:
            bert.state_dict()[key.replace(".u.", ".p.")].copy_(value)
    seen: list[Tensor] = []
    unit = bert.encoder.layer[0].task_layer.pal_adapters["u"]["pal"]
    unit.register_forward_hook(lambda module, args, result: seen.append(result - args[1]))
    assert (output(bert, batch, "u") - alone).abs().max() > 1e-3
    bert.encoder.layer[0].task_layer.pal_adapters["p"]["pal"].register_forward_hook(
        lambda module, args, result: seen.append(result - args[1])
    )
    output(bert, batch, "p")
    torch.testing.assert_close(seen[0], seen[1], atol=1e-6, rtol=1e-6)  # both read the embeddings


def test_the_chosen_width_is_kept_beside_what_the_user_gave(bert: nn.Module) -> None:
    bert.add_adapter("a", config=PALConfig())
    config = bert.adapters_config.get("a")
    assert config == PALConfig()
    assert config.hidden_size is None
    width = config.chosen["hidden_size"]
    assert width % 6 == 0
    assert bert.encoder.layer[0].task_layer.pal_adapters["a"]["pal"].query.weight.shape[0] == width
    assert len(bert.adapters_config.config_map) == 1


def test_width_does_not_depend_on_what_is_on_the_model(bert: nn.Module) -> None:
    for name in ("a", "b", "c"):
        bert.add_adapter(name, config="pal")
        bert.add_adapter(f"{name}_bn", config="seq_bn")
    assert len({bert.adapters_config.get(name).chosen["hidden_size"] for name in ("a", "b", "c")}) == 1


def test_overwrite_ok(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    add(bert, "a", "pal")
    with pytest.raises(ValueError, match="already been added"):
        bert.add_adapter("a", config="pal")
    bert.add_adapter("a", config=LowRankConfig(hidden_size=3), overwrite_ok=True, set_active=True)
    assert bert.active_adapters == Stack("a")
    assert not [key for key in bert.state_dict() if "shared_parameters.a" in key]
    randomise(bert, "a")
    low = ref.weights_of(bert, "a", "low_rank")
    expected = ref.bert(bert, batch["input_ids"], batch["attention_mask"],
                        o2=lambda block, value: value + ref.low_rank(block.x, low[block.index])).detach()  # fmt: skip
    torch.testing.assert_close(output(bert, batch), expected, atol=2e-5, rtol=1e-5)


def test_seed_gives_equal_weights_in_two_adapters_and_different_blocks(bert: nn.Module) -> None:
    for name in ("a", "b"):
        bert.add_adapter(name, config=PALConfig(hidden_size=12, init_weights="bert", init_weights_seed=5))
    a, b = ref.weights_of(bert, "a", "pal"), ref.weights_of(bert, "b", "pal")
    for index in range(3):
        assert a[index].keys() == b[index].keys()
        assert all(torch.equal(a[index][key], b[index][key]) for key in a[index])
    assert not torch.equal(a[0]["query.weight"], a[1]["query.weight"])


# Active setups


def test_adapter_setup_overrides_and_ends(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    for name, method in (("a", "pal"), ("b", "low_rank")):
        add(bert, name, method)
    a, b, ab = (output(bert, batch, setup) for setup in ("a", "b", Stack("a", "b")))
    bert.set_active_adapters("a")
    with adapters.AdapterSetup("b"):
        assert torch.equal(output(bert, batch), b)
        with adapters.AdapterSetup(Stack("a", "b")):
            assert torch.equal(output(bert, batch), ab)
        assert torch.equal(output(bert, batch), b)
    assert torch.equal(output(bert, batch), a)


def test_skip_layers(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    add(bert, "a", "low_rank")
    low = ref.weights_of(bert, "a", "low_rank")
    bert.set_active_adapters("a", skip_layers=[0, 2])
    expected = ref.bert(
        bert, batch["input_ids"], batch["attention_mask"],
        o2=lambda block, value: value + (ref.low_rank(block.x, low[1]) if block.index == 1 else 0),
    ).detach()  # fmt: skip
    torch.testing.assert_close(output(bert, batch), expected, atol=2e-5, rtol=1e-5)


def test_leave_out(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    bert.add_adapter("a", config=PALConfig(hidden_size=12, num_heads=3, leave_out=[1]))
    randomise(bert, "a")
    assert sorted(bert.get_adapter("a")) == [-1, 0, 2]
    pal = ref.weights_of(bert, "a", "pal")

    def term(block: ref.Block, value: Tensor) -> Tensor:
        return value if block.index == 1 else value + ref.pal(block.x, pal[block.index], 3, block.mask)

    expected = ref.bert(bert, batch["input_ids"], batch["attention_mask"], o2=term).detach()
    torch.testing.assert_close(output(bert, batch, "a"), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("first", ["ours", "theirs"])
def test_leave_out_beside_a_bottleneck(first: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    """A block without our adapter still runs the host's bottleneck on its examples, and vice versa."""
    bert.add_adapter("a", config=LowRankConfig(hidden_size=4, leave_out=[0]))
    bert.add_adapter("b", config=adapters.SeqBnConfig(leave_out=[2]))
    randomise(bert, "a", "b")
    a, b = output(bert, batch, "a"), output(bert, batch, "b")
    names, wanted = (("a", "b"), (a, b)) if first == "ours" else (("b", "a"), (b, a))
    mixed = output(bert, batch, adapters.BatchSplit(*names, batch_sizes=[1, 3]))
    torch.testing.assert_close(mixed, torch.cat([wanted[0][:1], wanted[1][1:]]), atol=2e-5, rtol=1e-5)


# Training


@pytest.mark.parametrize("method", STRINGS)
def test_only_the_trained_adapter_gets_gradients_and_all_of_it(
    method: str, bert: nn.Module, batch: dict[str, Tensor]
) -> None:
    add(bert, "a", method)
    add(bert, "ab", method)
    bert.train_adapter("a")
    assert bert.active_adapters == Stack("a")
    assert bert.training
    wanted = parameters_of(bert, "a").keys()
    assert {n for n, p in bert.named_parameters() if p.requires_grad} == wanted
    weight = torch.randn(24, generator=torch.Generator().manual_seed(1))
    (bert(**batch).last_hidden_state * weight).pow(2).sum().backward()
    grads = {n: p.grad for n, p in bert.named_parameters() if p.grad is not None}
    assert grads.keys() == wanted
    for name, grad in grads.items():
        if not name.endswith("key.bias"):  # adds the same to every score of a query
            assert grad.abs().max() > 0, name


def test_gradients_of_tied_projections_sum_over_the_blocks(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    bert.add_adapter("tied", config=PALConfig(hidden_size=12, num_heads=3, dropout=0.0))
    bert.add_adapter("own", config=PALConfig(hidden_size=12, num_heads=3, dropout=0.0, tie_projections=False))
    randomise(bert, "tied")
    tied, own = ref.weights_of(bert, "tied", "pal"), ref.weights_of(bert, "own", "pal")
    for index in range(3):
        for key, value in own[index].items():
            value.copy_(tied[index][key])
    for name in ("tied", "own"):
        bert.train_adapter(name)
        bert.eval()
        bert(**batch).last_hidden_state.pow(2).sum().backward()
    table = bert.shared_parameters["tied"]
    for which in ("encoder", "decoder"):
        units = [layer.task_layer.pal_adapters["own"]["pal"] for layer in bert.encoder.layer]
        total = sum(getattr(unit, which).weight.grad for unit in units)
        torch.testing.assert_close(table[f"pal_stack0_{which}_weight"].grad, total, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("block", [Stack, adapters.Parallel, adapters.MultiTask])
def test_training_a_composition_trains_each_projection_in_it(block: Any, bert: nn.Module) -> None:
    for name in ("a", "b", "c"):
        add(bert, name, "pal")
    bert.train_adapter(block("a", "c"))
    shared = {
        n.split(".")[1]: p.requires_grad for n, p in bert.named_parameters() if n.startswith("shared_parameters")
    }
    assert shared == {"a": True, "b": False, "c": True}


def test_freeze_adapter(bert: nn.Module) -> None:
    add(bert, "a", "pal")
    bert.train_adapter("a")
    parameters = parameters_of(bert, "a").values()
    for freeze in (True, False):
        bert.apply_to_adapter_layers(lambda i, layer, freeze=freeze: layer.freeze_adapter("a", freeze=freeze))
        assert {p.requires_grad for p in parameters} == {not freeze}
        assert bert.encoder.layer[0].task_layer.pal_adapters["a"].training is not freeze


# Averaging


@pytest.mark.parametrize("method", STRINGS)
def test_average_is_linear(method: str, bert: nn.Module) -> None:
    weights = {"a": -0.2, "b": 0.9, "c": 0.3}
    for name in weights:
        add(bert, name, method)
    before = state(bert)
    bert.average_adapter("mean", list(weights), weights=list(weights.values()))
    for key, value in bert.state_dict().items():
        if ".mean." in key:
            expected = sum(w * before[key.replace(".mean.", f".{name}.")] for name, w in weights.items())
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(value, before[key]), key
    assert any(".mean." in key for key in bert.state_dict())
    assert ("shared_parameters.mean" in "".join(bert.state_dict())) == RECORDS[method].shares


def test_average_of_a_union_with_lora_and_a_bottleneck(bert: nn.Module) -> None:
    union = adapters.ConfigUnion(SMALL["pal"], adapters.LoRAConfig(), adapters.SeqBnConfig())
    for name in ("a", "b"):
        bert.add_adapter(name, config=union)
        randomise(bert, name)
    bert.average_adapter("mean", ["a", "b"], weights=[1.0, 3.0])
    keys = [key for key in bert.state_dict() if ".mean." in key]
    for part in (".pal_adapters.", "shared_parameters.", ".loras.", ".adapters."):
        assert any(part in key for key in keys), part
    for key in keys:
        a, b = (bert.state_dict()[key.replace(".mean.", f".{name}.")] for name in "ab")
        torch.testing.assert_close(bert.state_dict()[key], 0.25 * a + 0.75 * b)


def test_average_rejects_other_strategies_and_other_configs(bert: nn.Module) -> None:
    add(bert, "a", "pal")
    add(bert, "b", "pal")
    add(bert, "c", "low_rank")
    before = state(bert)
    with pytest.raises(ValueError, match="lora_delta_w_svd"):
        bert.average_adapter("mean", ["a", "b"], combine_strategy="lora_delta_w_svd")
    with pytest.raises(ValueError, match="different configurations"):
        bert.average_adapter("mean", ["a", "c"])
    assert "mean" not in bert.adapters_config
    assert_untouched(bert, before)


# Looking, moving, deleting


def test_get_adapter_and_summary_count_shared_tensors_once(bert: nn.Module) -> None:
    d, r, depth = 24, 12, 3
    bert.add_adapter("pal", config=SMALL["pal"])
    bert.add_adapter("low", config=SMALL["low_rank"])
    bert.add_adapter("par", config=SMALL["parallel_houlsby"])
    bert.add_adapter("lhuc", config=SMALL["lhuc"])
    bert.add_adapter("top", config=SMALL["top_attention"])
    found = bert.get_adapter("pal")
    assert sorted(found) == [-1, 0, 1, 2]
    shapes = {key: tuple(value.shape) for key, value in found[-1]["shared"].items()}
    assert shapes == {
        "pal_stack0_encoder_weight": (r, d), "pal_stack0_encoder_bias": (r,),
        "pal_stack0_decoder_weight": (d, r), "pal_stack0_decoder_bias": (d,),
    }  # fmt: skip
    rows = {row["name"]: row for row in bert.adapter_summary(as_dict=True)}
    assert rows["pal"]["#param"] == 2 * d * r + r + d + 3 * depth * (r * r + r)
    assert rows["low"]["#param"] == depth * (2 * d * 6 + 6 + d)
    assert rows["par"]["#param"] == 2 * depth * (2 * d * 6 + 6 + d)
    assert rows["lhuc"]["#param"] == depth * d
    assert rows["top"]["#param"] == 2 * d * r + r + d + 2 * (4 * (r * r + r) + 2 * r)
    assert rows["pal"]["architecture"] == "pal"
    added = sum(rows[name]["#param"] for name in ("pal", "low", "par", "lhuc", "top"))
    assert rows["Full model"]["#param"] == sum(p.numel() for p in bert.parameters()) - added
    assert "pal" in bert.adapter_summary()


def test_published_parameter_counts() -> None:
    """The paper's parameter counts for BERT-base, without allocating its weights."""
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = BertModel(BertConfig())
        adapters.init(model)
        for name in STRINGS:
            model.add_adapter(name, config=name)
    counts = {row["name"]: row["#param"] for row in model.adapter_summary(as_dict=True)}
    assert counts["Full model"] == 109_482_240
    published = {name: base for name in STRINGS for options, base, _ in RECORDS[name].counts if not options}
    assert len(published) >= 7
    assert {name: counts[name] for name in published} == published


def test_adapter_to(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    add(bert, "a", "pal")
    before = output(bert, batch, "a")
    bert.adapter_to("a", dtype=torch.float64)
    ours = parameters_of(bert, "a")
    for name, parameter in bert.named_parameters():
        assert parameter.dtype == (torch.float64 if name in ours else torch.float32), name
    torch.testing.assert_close(output(bert, batch), before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", STRINGS)
def test_delete_leaves_nothing(method: str, bert: nn.Module, batch: dict[str, Tensor]) -> None:
    before, base = state(bert), output(bert, batch)
    names = [n for n, _ in bert.named_parameters()]
    add(bert, "a", method)
    bert.set_active_adapters("a")
    bert.delete_adapter("a")
    assert_untouched(bert, before)
    assert [n for n, _ in bert.named_parameters()] == names
    assert bert.active_adapters is None
    assert bert.get_adapter("a") == {}
    assert torch.equal(output(bert, batch), base)
    add(bert, "a", method)  # the name is free again
    assert (output(bert, batch, "a") - base).abs().max() > 1e-3


def test_delete_one_of_two(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    add(bert, "a", "pal")
    add(bert, "ab", "pal")
    kept = output(bert, batch, "ab")
    bert.delete_adapter("a")
    assert torch.equal(output(bert, batch, "ab"), kept)
    assert not [key for key in bert.state_dict() if ".a." in key]


# Merging


@pytest.mark.parametrize("method", STRINGS)
def test_merge_is_rejected(method: str, bert: nn.Module) -> None:
    add(bert, "a", method)
    bert.add_adapter("u", config=adapters.ConfigUnion(SMALL[method], adapters.LoRAConfig()))
    before = state(bert)
    for name in ("a", "u"):
        with pytest.raises(UnsupportedError, match=f"'{name}' cannot be merged into the base weights: .{{20}}"):
            bert.merge_adapter(name)
    assert_untouched(bert, before)


def test_merging_lora_beside_ours_still_works(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    add(bert, "a", "pal")
    bert.add_adapter("lora", config=adapters.LoRAConfig(init_weights="bert"))
    wanted = output(bert, batch, Stack("lora", "a"))
    bert.set_active_adapters("a")
    bert.merge_adapter("lora")
    torch.testing.assert_close(output(bert, batch), wanted, atol=2e-5, rtol=1e-5)
    bert.reset_adapter()


# Errors


BAD: list[tuple[str, Any, str]] = [
    ("pal", {"hidden_size": 13}, "hidden_size=13.*num_heads=6.*12 or 18"),
    ("pal", {"hidden_size": -6}, "hidden_size=-6.*at least 1"),
    ("pal", {"hidden_size": "12"}, "hidden_size='12'.*integer"),
    ("pal", {"hidden_size": 12.0}, "hidden_size=12.0.*integer"),
    ("pal", {"hidden_size": True}, "hidden_size=True.*integer"),
    ("pal", {"num_heads": 0}, "num_heads=0.*at least 1"),
    ("pal", {"dropout": 1.0}, "dropout=1.0.*0 <= p < 1"),
    ("pal", {"dropout": "0.1"}, "dropout='0.1'.*probability"),
    ("pal", {"activation_site": "end"}, "activation_site='end'.*'output', 'middle', 'none'"),
    ("pal", {"pal_input": "both"}, "pal_input='both'.*'norm', 'raw'"),
    ("pal", {"init_weights": "xavier"}, "init_weights='xavier'.*'zero_decoder', 'bert'"),
    ("pal", {"init_weights_seed": -1}, "init_weights_seed=-1.*at least 0"),
    ("pal", {"train_base": "yes"}, "train_base='yes'.*True or False"),
    ("pal", {"tie_projections": 1}, "tie_projections=1.*True or False"),
    ("pal", {"leave_out": 1}, "leave_out=1 .*list of block indices"),
    ("pal", {"leave_out": "01"}, "leave_out='01'.*list of block indices"),
    ("pal", {"leave_out": [-1]}, r"leave_out=\[-1\].*list of block indices"),
    ("pal", {"leave_out": [True]}, r"leave_out=\[True\].*list of block indices"),
    ("pal", {"leave_out": None}, "leave_out=None.*list of block indices"),
    ("pal", {"leave_out": {0}}, "leave_out={0}.*list of block indices"),
    ("pal", {"sites": "BertLayer"}, "sites='BertLayer'.*dict"),
    ("pal", {"sites": {"norm": "post"}}, "sites=.*'block'"),
    ("low_rank", {"hidden_size": 0}, "hidden_size=0.*at least 1"),
    ("lhuc", {"lhuc_site": "input"}, "lhuc_site='input'.*'auto', 'output', 'ffn'"),
    ("top_attention", {"num_heads": 5}, "hidden_size=204.*num_heads=5"),
    ("top_attention", {"init_weights": "zero_decoder"}, "init_weights='zero_decoder'.*'bert'"),
    ("top_attention", {"num_layers": 0}, "num_layers=0.*at least 1"),
    ("top_bert_layer", {"intermediate_size": -4}, "intermediate_size=-4.*at least 1"),
    ("parallel_houlsby", {"lhuc": True}, "lhuc=True is not supported"),
    ("houlsby_pal", {"bottleneck_size": 0}, "bottleneck_size=0.*at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "changes", "message"), BAD, ids=lambda v: str(v)[:30])
def test_bad_values_name_argument_value_and_what_is_allowed(
    method: str, changes: dict[str, Any], message: str, bert: nn.Module
) -> None:
    before = state(bert)
    good = AdapterConfig.load(method)
    with pytest.raises(ValueError, match=message):
        type(good)(**changes)
    with pytest.raises(ValueError, match=message):
        bert.add_adapter("a", config={**good.to_dict(), **changes})
    assert "a" not in bert.adapters_config
    assert_untouched(bert, before)


# What only the model can tell.
BAD_FOR_THE_MODEL: list[tuple[Any, type[Exception], str]] = [
    (PALConfig(leave_out=[0, 3]), ConfigError, r"leave_out=\[0, 3\].*0 to 2"),
    (PALConfig(leave_out=[0, 1, 2]), ConfigError, r"leave_out=\[0, 1, 2\].*no block for pal"),
    (TopAttentionConfig(leave_out=[2]), ConfigError, r"leave_out=\[2\].*no block for top_attention"),
    (TopBertLayerConfig(num_heads=5), ConfigError, "24.*num_heads=5"),
    (PALConfig(pal_input="raw"), ConfigError, "pal_input='raw'.*post-LN"),
    (PALConfig(sites={"block": "GPT2Block", "norm": "post", "attention": "attention", "attention_output": "attention",
                      "ffn": "intermediate", "ffn_output": "output"}), SiteError, "GPT2Block"),
    (PALConfig(sites={"block": "BertLayer", "norm": "post", "attention": "attention", "attention_output": "attention",
                      "ffn": "nowhere", "ffn_output": "output"}), SiteError, "nowhere"),
    (adapters.ConfigUnion(PALConfig(), adapters.CompacterConfig()), UnsupportedError, "Compacter and pal"),
    (adapters.ConfigUnion(adapters.VeraConfig(), PALConfig()), UnsupportedError, "VeRA and pal"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "error", "message"), BAD_FOR_THE_MODEL, ids=lambda v: str(v)[:40])
def test_what_does_not_fit_the_model_leaves_it_as_it_was(
    config: Any, error: type[Exception], message: str, bert: nn.Module, batch: dict[str, Tensor]
) -> None:
    before, base = state(bert), output(bert, batch)
    assert bert.supports_adapter(config) is ("no block for" in message)  # known when it is added
    with pytest.raises(error, match=message):
        bert.add_adapter("a", config=config)
    assert "a" not in bert.adapters_config
    assert_untouched(bert, before)
    assert torch.equal(output(bert, batch), base)
    add(bert, "a", "pal")
    assert (output(bert, batch, "a") - base).abs().max() > 1e-3


def test_what_a_model_supports(bert: nn.Module) -> None:
    t5 = transformers.T5Model(
        transformers.T5Config(vocab_size=9, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    adapters.init(t5)
    network = pal_adapters.CAMTLConfig(tasks=["rte", "mrpc"])
    asked = (network, network.replace(tasks=None), "ca_mtl_base", "pal", PALConfig(), "lora", adapters.LoRAConfig())
    assert [bert.supports_adapter(one) for one in asked] == [True, False, False, True, True, True, True]
    assert [t5.supports_adapter(one) for one in asked] == [False, False, False, True, True, True, True]
    before = state(t5)
    with pytest.raises(UnsupportedError, match="one stack"):
        t5.add_adapter("a", config=network)
    assert_untouched(t5, before)


def test_a_misspelt_argument_is_rejected(bert: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"hiden_size=12 is not an argument of PALConfig: use .*hidden_size"):
        bert.add_adapter("a", config={"architecture": "pal", "hiden_size": 12})
    with pytest.raises(ConfigError, match=r"hiden_size is not an argument of PALConfig: use .*hidden_size"):
        bert.add_adapter("a", config="pal[hiden_size=12]")
    assert "a" not in bert.adapters_config


def test_an_architecture_cannot_be_changed() -> None:
    with pytest.raises(ConfigError, match=r"architecture='lora'.*'pal'"):
        PALConfig(architecture="lora")


def test_configs_are_frozen_and_round_trip() -> None:
    config = PALConfig(hidden_size=12, leave_out=[1], dropout=0.0)
    with pytest.raises(FrozenInstanceError):
        config.hidden_size = 18
    assert AdapterConfig.load(config.to_dict()) == config
    changed = config.replace(hidden_size=18)
    assert (changed.hidden_size, changed.leave_out, config.hidden_size) == (18, [1], 12)


def test_a_model_whose_blocks_are_not_known() -> None:
    from transformers import BertConfig, BertModel

    class StrangeLayer(nn.Module):
        pass

    model = BertModel(
        BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    model.encoder.layer = nn.ModuleList([StrangeLayer()])
    adapters.init(model)
    before = state(model)
    with pytest.raises(SiteError, match="register_block"):
        model.add_adapter("a", config="pal")
    assert "a" not in model.adapters_config
    assert_untouched(model, before)


def test_two_adapters_cannot_name_different_sites(bert: nn.Module, batch: dict[str, Tensor]) -> None:
    sites = {
        "block": "BertLayer", "norm": "post", "attention": "attention", "attention_output": "attention.output.dropout",
        "ffn": "intermediate", "ffn_output": "output.dropout", "output": "output.LayerNorm",
    }  # fmt: skip
    add(bert, "a", "pal")
    a = output(bert, batch, "a")
    with pytest.raises(ConfigError, match=r"sites=.*a already use other sites of BertLayer"):
        bert.add_adapter("b", config=PALConfig(hidden_size=12, sites=sites))
    assert torch.equal(output(bert, batch, "a"), a)
    bert.delete_adapter("a")
    bert.add_adapter("b", config=LHUCConfig(sites=sites))
    randomise(bert, "b")
    rho = ref.weights_of(bert, "b", "lhuc")
    expected = ref.bert(
        bert, batch["input_ids"], batch["attention_mask"],
        y=lambda block, value: value * 2 * torch.sigmoid(rho[block.index]["rho"]),
    ).detach()  # fmt: skip
    torch.testing.assert_close(output(bert, batch, "b"), expected, atol=2e-5, rtol=1e-5)


def test_public_names_are_the_registered_classes() -> None:
    for name in STRINGS:
        if not RECORDS[name].options_class.__module__.startswith("pal_adapters."):
            continue
        assert type(AdapterConfig.load(name)) is getattr(pal_adapters, type(AdapterConfig.load(name)).__name__)
