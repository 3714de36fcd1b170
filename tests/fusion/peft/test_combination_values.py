"""ScaLearn and fixed combinations in PEFT compute what their formulas say, for every kind of source."""

from __future__ import annotations

import pathlib
import types
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import pal_adapters as pa
from pal_adapters.fusion.layer import SourceAttention
from pal_adapters.fusion.peft.tuner import combinations
from tests.hosts.peft import cases

from . import sources

VARIANTS = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp")
Paths = Mapping[str, Mapping[str, str]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("sources")
    return {kind: sources.save_all(folder, kind) for kind in sources.KINDS}


def target(paths: Mapping[str, str], *, seed: int | None = 3, **changes: Any) -> Any:
    config = pa.ScaLearnPeftConfig(adapters=dict(paths), task_type="SEQ_CLS", **changes)
    model = get_peft_model(cases.bert(), config)
    if seed is not None:
        sources.randomise(model, seed=seed)
    return model.eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**cases.inputs()).logits


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", list(sources.KINDS))
def test_equals_the_formula(saved: Paths, kind: str, variant: str) -> None:
    model = target(saved[kind], variant=variant)
    expected = sources.combined_logits(
        cases.bert(), saved[kind], sources.learned(model), cases.inputs(), sources.head_of(model)
    )
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    assert (logits(model) - logits(target(saved[kind], variant=variant, seed=4))).abs().max() > 1e-2


@pytest.mark.parametrize("ablation", ["mean", "softmax"])
@pytest.mark.parametrize("kind", ["lora", "houlsby"])
def test_ablations(saved: Paths, kind: str, ablation: str) -> None:
    model = target(saved[kind], ablation=ablation)
    omega = sources.learned(model, ablation=ablation)
    expected = sources.combined_logits(cases.bert(), saved[kind], omega, cases.inputs(), sources.head_of(model))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


def test_sources_of_several_kinds_do_not_see_each_other(saved: Paths, tmp_path: pathlib.Path) -> None:
    """Also two kinds at one module."""
    lora = LoraConfig(target_modules=["output.dense"], r=3)
    houlsby = pa.HoulsbyPeftConfig(target_modules=["output.dense"], hidden_size=5)
    paths = {
        "a": sources.save(tmp_path / "a", lora, seed=1),
        "b": sources.save(tmp_path / "b", houlsby, seed=2),
        "c": saved["pal"]["mnli"],
    }
    model = target(paths)
    place = sources.units(model)["bert.encoder.layer.0.output.dense"]
    assert [type(group).__name__ for group in place.groups] == ["StackedSources", "StackedSources"]
    expected = sources.combined_logits(
        cases.bert(), paths, sources.learned(model), cases.inputs(), sources.head_of(model)
    )
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("variant", ["scalearn", "scalearn_uniform_pp"])
@pytest.mark.parametrize("kind", list(sources.KINDS))
def test_one_hot_is_the_single_adapter_and_zero_the_plain_model(saved: Paths, kind: str, variant: str) -> None:
    model = target(saved[kind], variant=variant, seed=None)
    sources.set_all(model, {})
    assert torch.equal(logits(model), logits(cases.bert()))
    for source, path in saved[kind].items():
        sources.set_all(model, {source: 1.0})
        single = PeftModel.from_pretrained(cases.bert(), path).eval()
        wrapper = single.base_model.model.classifier
        single.base_model.model.classifier = wrapper.original_module  # heads of sources are not used
        torch.testing.assert_close(logits(model), logits(single), atol=2e-6, rtol=2e-6)
        assert (logits(single) - logits(cases.bert())).abs().max() > 1e-2


@pytest.mark.parametrize("method", cases.METHODS)
def test_every_method_may_be_a_source(method: str, tmp_path: pathlib.Path) -> None:
    """With one coefficient of 1 the combination equals its source, with 0 the plain model."""
    options = [
        cases.config(method, task_type="SEQ_CLS"),
        cases.config(method, task_type="SEQ_CLS", **cases.WIDER.get(method, {})),
    ]
    paths = {
        name: sources.save(tmp_path / name, o, seed=i) for i, (name, o) in enumerate(zip("ab", options, strict=True))
    }
    model = target(paths, variant="scalearn_uniform_pp", seed=None)
    sources.set_all(model, {})
    assert torch.equal(logits(model), logits(cases.bert()))
    for source, path in paths.items():
        sources.set_all(model, {source: 1.0})
        single = PeftModel.from_pretrained(cases.bert(), path).eval()
        single.base_model.model.classifier = single.base_model.model.classifier.original_module
        torch.testing.assert_close(logits(model), logits(single), atol=2e-6, rtol=2e-6)
        assert (logits(single) - logits(cases.bert())).abs().max() > 1e-2


@pytest.mark.parametrize("kind", list(sources.KINDS))
def test_what_a_place_adds_is_linear_in_the_coefficients(saved: Paths, kind: str) -> None:
    """On the last place of the model, where nothing non-linear follows."""
    model = target(saved[kind], seed=None)
    kept: list[Tensor] = []
    last = model.base_model.model.bert.encoder.layer[-1].output.LayerNorm
    last.register_forward_pre_hook(lambda m, args: kept.append(args[0].detach()))
    keep = "bert.encoder.layer.2" if kind == "pal" else "bert.encoder.layer.2.output."
    parts = {}
    for values in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (2.0, -3.0)):
        sources.set_all(model, dict(zip(("mnli", "qqp"), values, strict=True)))
        with torch.no_grad():
            for place, unit in sources.units(model).items():
                if not place.startswith(keep) or place.endswith("LayerNorm"):
                    for site in unit.sites:
                        unit.mixer(site).omega.zero_()
        kept.clear()
        logits(model)
        parts[values] = kept[0]
    zero = parts[0.0, 0.0]
    expected = zero + 2 * (parts[1.0, 0.0] - zero) - 3 * (parts[0.0, 1.0] - zero)
    torch.testing.assert_close(parts[2.0, -3.0], expected, atol=2e-5, rtol=1e-5)
    assert (parts[2.0, -3.0] - zero).abs().max() > 1e-2


@pytest.mark.parametrize("kind", list(sources.KINDS))
def test_the_order_of_sources_does_not_matter(saved: Paths, kind: str) -> None:
    values = {"mnli": 0.7, "qqp": -0.4, "rte": 1.1}
    found = []
    for names in (["mnli", "qqp", "rte"], ["rte", "mnli", "qqp"]):
        model = target({name: saved[kind][name] for name in names}, seed=None)
        sources.set_all(model, values)
        found.append(logits(model))
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=2e-6)


def test_fixed_coefficients(saved: Paths) -> None:
    paths = saved["lora"]
    for given, expected in (("mean", dict.fromkeys(paths, 1 / 3)), ({"mnli": 0.3, "qqp": 0.9, "rte": 0.0},) * 2):
        model = get_peft_model(cases.bert(), pa.FixedCombinationPeftConfig(adapters=dict(paths), coefficients=given))
        assert not [p for p in model.parameters() if p.requires_grad]
        plain = sources.combined_logits(cases.bert(), paths, lambda place, s, e=expected: e[s], cases.inputs())
        torch.testing.assert_close(logits(model.eval()), plain, atol=1e-5, rtol=1e-5)


def test_a_fixed_sum_is_peft_s_own_weighted_adapter(tmp_path: pathlib.Path) -> None:
    paths = {
        name: sources.save(tmp_path / name, LoraConfig(r=r, target_modules=["query", "value"]), seed=r)
        for name, r in (("a", 2), ("b", 3))
    }
    own = get_peft_model(
        cases.bert(), pa.FixedCombinationPeftConfig(adapters=dict(paths), coefficients={"a": 0.3, "b": 0.8})
    )
    host = PeftModel.from_pretrained(cases.bert(), paths["a"], adapter_name="a")
    host.load_adapter(paths["b"], "b")
    host.add_weighted_adapter(["a", "b"], [0.3, 0.8], "sum", combination_type="cat")
    host.set_adapter("sum")
    torch.testing.assert_close(logits(own.eval()), logits(host.eval()), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "roberta"])
@pytest.mark.parametrize("kind", ["lora", "houlsby"])
def test_one_hot_in_other_models(name: str, kind: str, tmp_path: pathlib.Path) -> None:
    """Pre-LN, RMS norms, transposed linears, encoder and decoder."""
    modules = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "wte"], "t5": ["q", "wo"], "roberta": ["key"]}
    task = cases.TASK_TYPES[name] if name != "roberta" else None
    configs: list[Any] = [LoraConfig(r=r, target_modules=modules[name], task_type=task) for r in (2, 3)]
    if kind == "houlsby":
        configs = [pa.HoulsbyPeftConfig(hidden_size=m, task_type=task) for m in (4, 5)]
    build = cases.BUILDERS[name]
    paths = {f"s{i}": sources.save(tmp_path / f"s{i}", c, seed=i, build=build) for i, c in enumerate(configs)}
    given = cases.inputs(name)
    for variant in ("scalearn", "scalearn_pp"):
        model = get_peft_model(build(), pa.ScaLearnPeftConfig(adapters=dict(paths), variant=variant)).eval()
        for source, path in paths.items():
            sources.set_all(model, {source: 1.0})
            single = PeftModel.from_pretrained(build(), path).eval()
            with torch.no_grad():
                got, expected = model(**given).logits, single(**given).logits
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_dropout_is_on_the_coefficients_and_nowhere_else(saved: Paths) -> None:
    """One mask a place and call, scaled; none in evaluation; the dropout of sources is off."""
    for kind in sources.KINDS:
        model = target(saved[kind])
        before = logits(model)
        cases.no_dropout(model.base_model.model)
        model.train()
        for unit in sources.units(model).values():
            for site in unit.sites:
                unit.mixer(site).dropout = 0.0
        torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=1e-6)
        for unit in sources.units(model).values():
            unit.mixer(unit.sites[0]).dropout = 0.3
        assert (logits(model) - before).abs().max() > 1e-3
        torch.testing.assert_close(logits(model.eval()), before, atol=0, rtol=0)


def test_dropout_draws_a_mask_for_each_place(saved: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    from pal_adapters.fusion import layer

    drawn: list[tuple[Tensor, float]] = []

    def dropout(omega: Tensor, p: float, training: bool) -> Tensor:
        drawn.append((omega, p))
        return omega

    monkeypatch.setattr(layer, "F", types.SimpleNamespace(dropout=dropout))
    for variant, p in (("scalearn", 0.3), ("scalearn_pp", 0.3), ("scalearn_uniform_pp", 0.0)):
        model = target(saved["lora"], variant=variant)
        drawn.clear()
        with torch.no_grad():
            hidden = torch.zeros(1, 2, 24)
            unit = sources.units(model)["bert.encoder.layer.0.attention.self.query"]
            model.base_model.model.bert.encoder.layer[0].attention.self.query(hidden)
            model.base_model.model.bert.encoder.layer[1].attention.self.query(hidden)
        assert [entry[1] for entry in drawn] == [p, p]
        assert drawn[0][0].shape[0] == len(unit.mixer("value").omega)


@pytest.mark.parametrize("kind", list(sources.KINDS))
def test_counts(saved: Paths, kind: str) -> None:
    def trained(**changes: Any) -> int:
        config = pa.ScaLearnPeftConfig(adapters=dict(saved[kind]), **changes)
        model = get_peft_model(cases.bert(), config)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    d, blocks = 24, 3
    if kind == "lora":  # query: two sources, three in block 1; value, key and both outputs: one each
        rows = 2 * 3 + 1 + 3 + 1 + 2 * 3
        kinds = 3 + 1 + 1 + 2
    elif kind == "houlsby":  # mnli and rte have copies of the norms, rte only in block 1
        rows = 2 * (2 * 3 + 1) + (2 * 3 + 1) + 2
        kinds = 3
    else:
        rows, kinds = 3 * blocks, 3
    assert trained() == rows * d
    assert trained(variant="scalearn_uniform") == rows
    assert trained(variant="scalearn++") == kinds * d
    assert trained(variant="scalearn_uniform++") == 3


def test_counts_of_the_paper(tmp_path: pathlib.Path) -> None:
    """Eight sources at 12 x 768, one bottleneck a block: 73,728, 96, 6,144 and 8; AdapterFusion 21,252,096."""
    settings = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 8}
    base = transformers.BertModel(transformers.BertConfig(vocab_size=40, **settings), add_pooling_layer=False)
    names = r".*layer\.\d+\.output\.dense"
    model = get_peft_model(base, pa.HoulsbyPeftConfig(target_modules=names, hidden_size=2, train_layernorm=False))
    paths = {f"s{i}": str(tmp_path / f"s{i}") for i in range(8)}
    for path in paths.values():
        model.save_pretrained(path)
    base = model.unload()
    found = []
    for variant in VARIANTS:
        model = get_peft_model(base, pa.ScaLearnPeftConfig(adapters=dict(paths), variant=variant))
        found.append(model.get_nb_trainable_parameters()[0])
        base = model.unload()
    assert found == [73_728, 96, 6_144, 8]
    model = get_peft_model(base, pa.AdapterFusionPeftConfig(adapters=dict(paths)))
    assert model.get_nb_trainable_parameters()[0] == 21_252_096


def test_start(saved: Paths) -> None:
    """`N(2 / S, 1e-3)` with all sources in `S`, also where only some of them act."""
    model = target(saved["lora"], seed=None)
    values = torch.cat([unit.mixer("value").omega.flatten() for unit in sources.units(model).values()])
    assert abs(values.mean() - 2 / 3) < 2e-4
    assert abs(values.std() - 1e-3) < 2e-4
    model = target(saved["lora"], seed=None, init_scale=1.0, init_std=0.0)
    assert all((unit.mixer("value").omega == 1 / 3).all() for unit in sources.units(model).values())


@pytest.mark.parametrize("kind", list(sources.KINDS))
def test_adapter_fusion_equals_the_formula(saved: Paths, kind: str, tmp_path: pathlib.Path) -> None:
    paths = dict(saved[kind])
    if kind == "houlsby":
        paths = {
            f"s{m}": sources.save(
                tmp_path / f"s{m}", pa.HoulsbyPeftConfig(hidden_size=m, train_layernorm=False), seed=m
            )
            for m in (4, 4 + (kind == "houlsby"))
        }
    model = get_peft_model(cases.bert(), pa.AdapterFusionPeftConfig(adapters=paths))
    sources.randomise(model, seed=5, scale=0.1)
    model.eval()
    # The attention of each place, from outputs that single sources give there.
    contributions: dict[str, dict[str, Tensor]] = {}
    queries: dict[str, Tensor] = {}

    def record(place: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            contributions[place] = {"query": args[0], "outputs": args[1], "given": output[0]}

        return hook

    handles = [
        unit.mixer(site).register_forward_hook(record(place))
        for place, unit in sources.units(model).items()
        for site in unit.sites
    ]
    out = logits(model)
    for handle in handles:
        handle.remove()
    assert (out - logits(cases.bert())).abs().max() > 1e-3
    first = next(iter(sources.units(model)))
    for place, got in contributions.items():
        unit = sources.units(model)[place]
        mixer = unit.mixer(unit.sites[0])
        assert isinstance(mixer, SourceAttention)
        u, a = got["query"], got["outputs"]
        q = u @ mixer.query.weight.T + mixer.query.bias
        k = a @ mixer.key.weight.T + mixer.key.bias
        p = torch.einsum("bnd,bnsd->bns", q, k).softmax(-1)
        expected = torch.einsum("bns,bnsd->bnd", p, a @ mixer.value.weight.T)
        torch.testing.assert_close(got["given"], expected, atol=1e-5, rtol=1e-5)
    # At the first place, what each source adds and what is asked with.
    plain = cases.bert()
    x = plain.bert.embeddings(cases.inputs()["input_ids"])
    got = contributions[first]
    names = sources.units(model)[first].names[sources.units(model)[first].sites[0]]
    for row, source in enumerate(names):
        values = {name: 1.0 if name == source else 0.0 for name in names}
        fixed = get_peft_model(
            cases.bert(),
            pa.FixedCombinationPeftConfig(adapters=paths, coefficients={**dict.fromkeys(paths, 0.0), **values}),
        ).eval()
        seen: list[Tensor] = []
        module = fixed.base_model.model.get_submodule(first)
        target_module = module.output.dense if kind == "pal" else module
        handle = target_module.register_forward_hook(lambda m, a, o, seen=seen: seen.append(o))
        logits(fixed)
        with fixed.disable_adapter():
            logits(fixed)
        handle.remove()
        if kind != "pal":  # a PAL's term is added behind the dropout
            torch.testing.assert_close(got["outputs"][..., row, :], seen[0] - seen[1], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got["query"], seen[1], atol=1e-6, rtol=1e-6)
    if kind == "pal":
        torch.testing.assert_close(got["query"], x, atol=1e-6, rtol=1e-6)
    queries.clear()


def test_adapter_fusion_with_one_value_for_all_sources_is_their_mean(saved: Paths) -> None:
    config = pa.AdapterFusionPeftConfig(adapters=dict(saved["lora"]), value=False)
    model = get_peft_model(cases.bert(), config).eval()
    with torch.no_grad():
        for _, _, unit in combinations(model):
            mixer = unit.mixer("value")
            for linear in (mixer.query, mixer.key):
                linear.weight.zero_()
    # Where only some act, the mean is over those.
    counts = {place: len(unit.names["value"]) for place, unit in sources.units(model).items()}
    plain = sources.combined_logits(cases.bert(), saved["lora"], lambda p, s: 1 / counts[p], cases.inputs())
    torch.testing.assert_close(logits(model), plain, atol=1e-5, rtol=1e-5)


def test_adapter_fusion_refuses_norms_of_sources(saved: Paths) -> None:
    base = cases.bert()
    before = cases.state(base)
    with pytest.raises(pa.UnsupportedError, match="its own layer norms"):
        get_peft_model(base, pa.AdapterFusionPeftConfig(adapters=dict(saved["houlsby"])))
    cases.assert_same_state(base, before)
