"""transformers' own `add_adapter`, `load_adapter`, ... on both versions."""

from __future__ import annotations

import pathlib
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict

from pal_adapters import ConfigError, UnsupportedError

from . import cases
from .unchanged import rejected

pytestmark = pytest.mark.usefixtures("transformers_takes_this_peft")


def with_adapters(method: str, name: str, *adapters: str, **changes: Any) -> Any:
    model = cases.BUILDERS[name]()
    for seed, adapter in enumerate(adapters):
        model.add_adapter(cases.config(method, **changes), adapter)
        cases.randomise(model, adapter, seed=seed)
    return model.eval()


@torch.no_grad()
def run(model: Any, adapters: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    if adapters is not None:
        model.set_adapter(adapters)
    return model(**given).logits


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_life_cycle(method: str, name: str) -> None:
    given = cases.inputs(name)
    plain = cases.run(cases.BUILDERS[name](), None, given)
    model = with_adapters(method, name, "rte", "sst")
    outputs = {adapter: run(model, adapter, given) for adapter in ("rte", "sst")}
    for seed, adapter in enumerate(("rte", "sst")):
        alone = cases.peft_model(method, name, adapters=(adapter,), randomised=False, task_type=None)
        weights = {n.removeprefix("base_model.model."): p for n, p in cases.adapter_parameters(alone, adapter)}
        own = dict(cases.adapter_parameters(model, adapter))
        assert set(own) == set(weights)
        for key, parameter in weights.items():
            parameter.data.copy_(own[key].data)
        assert torch.equal(cases.run(alone, adapter, given), outputs[adapter]), seed
    assert run(model, "sst", given).sub(outputs["rte"]).abs().max() > 1e-3
    assert model.active_adapters() == ["sst"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in cases.adapter_parameters(model, "sst")}
    model.disable_adapters()
    assert torch.equal(run(model, None, given), plain)
    model.enable_adapters()
    assert torch.equal(run(model, None, given), outputs["sst"])
    saved = model.get_adapter_state_dict("rte")
    assert set(saved) == {n.replace(".rte.", ".") for n, _ in cases.adapter_parameters(model, "rte")}
    model.delete_adapter("sst")
    assert torch.equal(run(model, "rte", given), outputs["rte"])
    assert not any(".sst." in n for n in model.state_dict())
    model.delete_adapter("rte")
    assert torch.equal(run(model, None, given), plain)
    assert not any(".rte." in n for n in model.state_dict())
    model.add_adapter(cases.config(method), "new")
    if method in cases.WITH_IDENTITY:
        assert torch.equal(run(model.eval(), "new", given), plain)


def test_training(method: str) -> None:
    model = with_adapters(method, "bert", "rte", "sst")
    model.set_adapter("rte")
    before = cases.state(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()(**cases.inputs(), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
    optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(v, before[n])}
    assert changed
    assert all(".rte." in n for n in changed)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_save_and_load(method: str, name: str, tmp_path: pathlib.Path) -> None:
    """Between transformers' own methods, `PeftModel`, files and state dicts, in every direction."""
    base = cases.BUILDERS[name]()
    base.save_pretrained(tmp_path / "base")
    fresh = lambda: type(base).from_pretrained(tmp_path / "base").eval()  # noqa: E731
    given = cases.inputs(name)
    model = fresh()
    for seed, adapter in enumerate(("rte", "sst")):
        model.add_adapter(cases.config(method), adapter)
        cases.randomise(model, adapter, seed=seed)
    outputs = {adapter: run(model, adapter, given) for adapter in ("rte", "sst")}
    for adapter in outputs:
        model.set_adapter(adapter)
        model.save_pretrained(tmp_path / adapter)
    assert not (tmp_path / "rte" / "config.json").exists()

    loaded = fresh()
    loaded.load_adapter(str(tmp_path / "rte"), "one")
    loaded.load_adapter(str(tmp_path / "sst"), "two")
    assert torch.equal(run(loaded, "one", given), outputs["rte"])
    assert torch.equal(run(loaded, "two", given), outputs["sst"])
    loaded = fresh()
    loaded.load_adapter(str(tmp_path / "rte"), is_trainable=True)
    trained = {n for n, p in loaded.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in cases.adapter_parameters(loaded, "default")}
    loaded = fresh()
    loaded.load_adapter(str(tmp_path / "rte"))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if ".default." in n)
    loaded = fresh()
    state = {n: v.clone() for n, v in model.get_adapter_state_dict("sst").items()}
    loaded.load_adapter(peft_config=model.peft_config["sst"], adapter_state_dict=state, adapter_name="x")
    assert torch.equal(run(loaded, "x", given), outputs["sst"])
    loaded = type(base).from_pretrained(tmp_path / "rte").eval()  # an adapter's folder as if it were a model's
    assert torch.equal(run(loaded, None, given), outputs["rte"])

    wrapped = PeftModel.from_pretrained(fresh(), tmp_path / "sst")
    assert torch.equal(cases.run(wrapped, "default", given), outputs["sst"])
    wrapped.save_pretrained(tmp_path / "again")
    wrapped.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    for folder in ("again", "pickled"):
        loaded = fresh()
        # transformers 5 looks for safetensors in a folder unless told otherwise.
        pickled = {"use_safetensors": False} if folder == "pickled" and cases.TRANSFORMERS_5 else {}
        loaded.load_adapter(str(tmp_path / folder), "x", **pickled)
        assert torch.equal(run(loaded, "x", given), outputs["sst"])
        for key, value in fresh().state_dict().items():  # nothing of the base model was touched
            key = key if key in loaded.state_dict() else ".base_layer.".join(key.rsplit(".", 1))
            assert torch.equal(loaded.state_dict()[key], value)


LORA = {"bert": ["query", "output.dense"], "llama": ["q_proj", "down_proj"]}


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_beside_lora(method: str, name: str) -> None:
    """Either first: the same outputs, and files that load without the other one."""
    given = cases.inputs(name)
    lora = lambda: LoraConfig(target_modules=LORA[name], r=2, init_lora_weights=False)  # noqa: E731
    results = []
    for ours_first in (True, False):
        model = cases.BUILDERS[name]()
        for adapter in ("ours", "lora") if ours_first else ("lora", "ours"):
            model.add_adapter(cases.config(method) if adapter == "ours" else lora(), adapter)
        generator = torch.Generator().manual_seed(0)
        parameters = [(n.replace(".base_layer", ""), p) for n, p in model.named_parameters()]
        for key, parameter in sorted(parameters, key=lambda pair: pair[0]):
            if ".ours." in key or ".lora." in key:
                drawn = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.data.copy_(drawn + (1.0 if "norms" in key and key.endswith("weight") else 0.0))
        model.eval()
        outputs = [run(model, adapters, given) for adapters in ("ours", "lora", ["lora", "ours"])]
        for adapter, config, expected in (("ours", cases.config(method), outputs[0]), ("lora", lora(), outputs[1])):
            alone = cases.BUILDERS[name]()
            saved = model.get_adapter_state_dict(adapter)
            assert not any("base_layer" in key for key in saved)
            alone.load_adapter(peft_config=config, adapter_state_dict=saved, adapter_name=adapter)
            assert torch.equal(run(alone.eval(), None, given), expected)
        results.append(outputs)
        model.delete_adapter("lora")
        assert torch.equal(run(model, "ours", given), outputs[0])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, atol=2e-6, rtol=1e-5)
    ours, low_rank, both = results[0]
    assert all((both - single).abs().max() > 1e-3 for single in (ours, low_rank))


def test_named_modules_beside_lora_on_the_same_modules() -> None:
    """A bottleneck after linear layers that LoRA wraps, added before or after it."""
    given = cases.inputs()
    for ours_first in (True, False):
        model = cases.bert()
        changes = {"target_modules": ["output.dense"], "train_layernorm": False}
        for adapter in ("ours", "lora") if ours_first else ("lora", "ours"):
            lora = LoraConfig(target_modules=["output.dense"], r=2, init_lora_weights=False)
            model.add_adapter(cases.config("houlsby", **changes) if adapter == "ours" else lora, adapter)
        cases.randomise(model.eval(), "ours", seed=0)
        expected = run(model, "ours", given)
        saved = model.get_adapter_state_dict("ours")
        alone = cases.bert()
        alone.load_adapter(peft_config=cases.config("houlsby", **changes), adapter_state_dict=saved, adapter_name="x")
        assert torch.equal(run(alone.eval(), "x", given), expected)


def test_two_of_ours_together() -> None:
    given = cases.inputs()
    model = cases.bert()
    for seed, method in enumerate(("pal", "lhuc", "houlsby", "top_attention")):
        model.add_adapter(cases.config(method), method)
        cases.randomise(model, method, seed=seed)
    model.eval()
    outputs = {}
    for method in ("pal", "lhuc", "houlsby", "top_attention"):
        outputs[method] = run(model, method, given)
        alone = cases.bert()
        saved = model.get_adapter_state_dict(method)
        alone.load_adapter(peft_config=cases.config(method), adapter_state_dict=saved, adapter_name="x")
        assert torch.equal(run(alone.eval(), "x", given), outputs[method]), method
    together = run(model, list(outputs), given)
    assert all((together - single).abs().max() > 1e-3 for single in outputs.values())


def test_modules_to_save(method: str) -> None:
    given = cases.inputs()
    model = with_adapters(method, "bert", "rte", "sst", modules_to_save=["classifier"])
    outputs = {adapter: run(model, adapter, given) for adapter in ("rte", "sst")}
    saved = model.get_adapter_state_dict("rte")
    assert torch.equal(saved["classifier.weight"], model.classifier.modules_to_save["rte"].weight)
    loaded = cases.bert()
    loaded.load_adapter(
        peft_config=cases.config(method, modules_to_save=["classifier"]), adapter_state_dict=saved, adapter_name="x"
    )
    assert torch.equal(run(loaded.eval(), "x", given), outputs["rte"])
    assert not torch.equal(outputs["rte"], outputs["sst"])


def test_a_failed_add_leaves_the_model_as_it_was(method: str) -> None:
    given = cases.inputs()
    model = cases.bert()
    before, hooks = cases.state(model), cases.hooks(model)
    for _ in range(2):
        with pytest.raises(ConfigError):
            model.add_adapter(cases.config(method, layers_to_transform=[17]), "rte")
        cases.assert_same_state(model, before)
        assert cases.hooks(model) == hooks
        assert all(p.requires_grad for p in model.parameters())
        with pytest.raises(ValueError, match="No adapter loaded"):
            model.set_adapter("rte")
    model.add_adapter(cases.config(method), "rte")
    cases.randomise(model.eval(), "rte", seed=0)
    expected, before = run(model, "rte", given), cases.state(model)
    with pytest.raises(ConfigError):
        model.add_adapter(cases.config(method, layers_to_transform=[17]), "sst")
    assert list(model.peft_config) == ["rte"]
    cases.assert_same_state(model, before)
    assert torch.equal(run(model, "rte", given), expected)


def test_hotswap_is_refused(method: str, tmp_path: pathlib.Path) -> None:
    from peft.utils.hotswap import hotswap_adapter

    wrapped = cases.peft_model(method, task_type=None)
    wrapped.save_pretrained(tmp_path)
    given = cases.inputs()
    expected = cases.run(wrapped, "rte", given)
    with pytest.raises(ValueError, match="Hotswapping only supports LORA"):
        hotswap_adapter(wrapped, tmp_path / "rte", adapter_name="rte")
    assert torch.equal(cases.run(wrapped, "rte", given), expected)
    if cases.TRANSFORMERS_5:
        model = with_adapters(method, "bert", "rte")
        with pytest.raises(ValueError, match="only supported for LoRA"):
            model.load_adapter(str(tmp_path / "rte"), "rte", hotswap=True)


def test_joint(method: str, tmp_path: pathlib.Path) -> None:
    """`train_base` follows transformers' own `set_adapter`."""
    given = cases.inputs()
    model = cases.bert()
    model.add_adapter(cases.config(method, train_base=True), "joint")
    base = {n for n, _ in model.named_parameters() if ".joint." not in n}
    assert all(p.requires_grad for p in model.parameters())
    model.add_adapter(cases.config(method), "frozen")
    assert {n for n, p in model.named_parameters() if p.requires_grad}.isdisjoint(base)
    model.set_adapter("joint")
    assert {n for n, p in model.named_parameters() if p.requires_grad} >= base
    with rejected(model, error=UnsupportedError, match=r"'joint' trains the pretrained weights in place"):
        model.disable_adapters()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".frozen." not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    expected = run(model.eval(), "joint", given)
    model.save_pretrained(tmp_path)
    loaded = cases.bert()
    loaded.load_adapter(str(tmp_path), "x")
    assert torch.equal(run(loaded.eval(), "x", given), expected)
    wrapped = PeftModel.from_pretrained(cases.bert(), tmp_path)
    assert torch.equal(cases.run(wrapped, "default", given), expected)


def test_joint_with_tied_embeddings() -> None:
    """transformers 5 would load one of the two and leave the other: refused there, right elsewhere."""
    model = cases.llama(tie_word_embeddings=True)
    if cases.TRANSFORMERS_5:
        with pytest.raises(UnsupportedError, match=r"embed_tokens\.weight and lm_head\.weight are tied"):
            model.add_adapter(cases.config("pal", train_base=True), "x")
        assert model.lm_head.weight is model.model.embed_tokens.weight
    else:
        model.add_adapter(cases.config("pal", train_base=True), "x")
        saved = get_peft_model_state_dict(model, adapter_name="x")
        assert "model.embed_tokens.weight" in saved
        assert "lm_head.weight" not in saved
