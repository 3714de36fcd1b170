"""Combinations in PEFT from the first call to a new process: what trains, what is saved, and what is rejected."""

from __future__ import annotations

import copy
import json
import pathlib
import shutil
import warnings
from collections.abc import Mapping
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pal_adapters as pa
from pal_adapters import fold
from pal_adapters.fusion.peft.tuner import regularization_loss
from tests.hosts.peft import cases
from tests.processes import python

from . import sources

Paths = Mapping[str, Mapping[str, str]]
HERE = str(pathlib.Path(__file__).parent)
LABELS = torch.tensor([0, 1, 2, 0])
VARIANTS = ("scalearn", "scalearn_uniform", "scalearn_pp", "scalearn_uniform_pp")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("sources")
    found: dict[str, dict[str, str]] = {kind: sources.save_all(folder, kind) for kind in sources.KINDS}
    found["fusable"] = {
        f"s{m}": sources.save(folder / f"s{m}", pa.HoulsbyPeftConfig(hidden_size=m, train_layernorm=False), seed=m)
        for m in (4, 6)
    }
    return found


def configs(saved: Paths) -> dict[str, Any]:
    """One of every method and kind of source, and every variant."""
    cls = {"task_type": "SEQ_CLS"}
    found = {f"{v} lora": pa.ScaLearnPeftConfig(adapters=dict(saved["lora"]), variant=v, **cls) for v in VARIANTS}
    for kind in ("houlsby", "pal"):
        for v in ("scalearn", "scalearn_pp"):
            found[f"{v} {kind}"] = pa.ScaLearnPeftConfig(adapters=dict(saved[kind]), variant=v, **cls)
    for kind in ("lora", "fusable", "pal"):
        found[f"fusion {kind}"] = pa.AdapterFusionPeftConfig(adapters=dict(saved[kind]), temperature=True, **cls)
    found["fixed"] = pa.FixedCombinationPeftConfig(adapters=dict(saved["lora"]), **cls)
    return found


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**cases.inputs()).logits


def one(saved: Paths, name: str = "scalearn lora", adapter: str = "default") -> Any:
    return get_peft_model(cases.bert(), configs(saved)[name], adapter_name=adapter)


LOAD = """
import json, sys, torch
import pal_adapters
from peft import PeftModel
from tests.hosts.peft import cases
from tests.fusion.peft.test_combination_life_cycle import logits
out = {}
for name, folder in json.loads(sys.argv[1]).items():
    model = PeftModel.from_pretrained(cases.bert(), folder).eval()
    out[name] = logits(model).tolist()
print("RESULT" + json.dumps(out))
"""


def in_a_new_process(folders: Mapping[str, str]) -> dict[str, Tensor]:
    done = python("-c", LOAD, json.dumps(folders))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.rpartition("RESULT")[2])
    return {name: torch.tensor(values) for name, values in found.items()}


def test_save_and_load_in_a_new_process(saved: Paths, tmp_path: pathlib.Path) -> None:
    """Every method and variant; a file holds coefficients and a head, and no source."""
    folders, expected = {}, {}
    for name, config in configs(saved).items():
        model = get_peft_model(cases.bert(), config)
        sources.randomise(model, seed=3, scale=0.1)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        expected[name] = logits(model.eval())
        folders[name] = str(tmp_path / name.replace(" ", "_"))
        model.save_pretrained(folders[name])
        file = load_file(pathlib.Path(folders[name]) / "adapter_model.safetensors")
        assert len([key for key in file if not key.endswith("tau")]) == len(trained)
        assert sorted(p.name for p in pathlib.Path(folders[name]).iterdir() if p.is_dir()) == []
        stored = json.loads((pathlib.Path(folders[name]) / "adapter_config.json").read_text())
        assert set(stored["adapters"].values()) <= set(saved[name.split()[-1] if " " in name else "lora"].values())
        assert set(stored["fingerprints"]) == set(stored["adapters"])
    for name, got in in_a_new_process(folders).items():
        torch.testing.assert_close(got, expected[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("bundle", [False, True])
def test_rows_stay_with_their_sources(saved: Paths, bundle: bool, tmp_path: pathlib.Path) -> None:
    """In an order that is not that of the names, and with a target that is named as one of its sources is."""
    paths = {name: saved["lora"][name] for name in ("rte", "mnli", "qqp")}
    config = pa.ScaLearnPeftConfig(adapters=paths, bundle=bundle, task_type="SEQ_CLS")
    model = get_peft_model(cases.bert(), config, adapter_name="rte")
    sources.set_all(model, {"rte": 0.2, "mnli": 1.5, "qqp": -0.7})
    model.save_pretrained(str(tmp_path))
    assert "rte" in json.loads((tmp_path / "rte" / "adapter_config.json").read_text())["adapters"]
    loaded = PeftModel.from_pretrained(cases.bert(), str(tmp_path / "rte")).eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), atol=0, rtol=0)
    assert list(loaded.peft_config["default"].adapters) == ["rte", "mnli", "qqp"]
    other = get_peft_model(cases.bert(), pa.ScaLearnPeftConfig(adapters=paths, task_type="SEQ_CLS")).eval()
    other.load_adapter(str(tmp_path / "rte"), "second")
    other.set_adapter("second")
    torch.testing.assert_close(logits(other.eval()), logits(model), atol=0, rtol=0)


def test_a_bundle_needs_no_sources(saved: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {}
    for kind in ("lora", "pal"):
        for name, path in saved[kind].items():
            paths[f"{kind}_{name}"] = str(tmp_path / "sources" / f"{kind}_{name}")
            shutil.copytree(path, paths[f"{kind}_{name}"])
    config = pa.ScaLearnPeftConfig(adapters=paths, task_type="SEQ_CLS", bundle=True)
    model = get_peft_model(cases.bert(), config).eval()
    sources.randomise(model, seed=3)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "sources")
    shutil.move(tmp_path / "out", tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    loaded = PeftModel.from_pretrained(cases.bert(), "moved").eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=1e-6)
    plain = cases.bert()
    plain.load_adapter(str(tmp_path / "moved"))
    torch.testing.assert_close(logits(plain.eval()), expected, atol=1e-6, rtol=1e-6)
    # What lies in a bundle are ordinary adapters, and what was loaded from one can be saved again.
    single = PeftModel.from_pretrained(cases.bert(), str(tmp_path / "moved" / "sources" / "lora_mnli"))
    assert isinstance(single.peft_config["default"], LoraConfig)
    again = PeftModel.from_pretrained(cases.bert(), str(tmp_path / "moved"))
    again.save_pretrained(str(tmp_path / "again"))
    last = PeftModel.from_pretrained(cases.bert(), str(tmp_path / "again")).eval()
    torch.testing.assert_close(logits(last), expected, atol=1e-6, rtol=1e-6)


def test_changed_sources_are_refused(saved: Paths, tmp_path: pathlib.Path) -> None:
    paths = {name: str(tmp_path / name) for name in saved["lora"]}
    for name, path in saved["lora"].items():
        shutil.copytree(path, paths[name])
    model = get_peft_model(cases.bert(), pa.ScaLearnPeftConfig(adapters=dict(paths)))
    model.save_pretrained(str(tmp_path / "out"))
    file = tmp_path / "qqp" / "adapter_model.safetensors"
    save_file({key: value + 1e-3 for key, value in load_file(file).items()}, file)
    with pytest.raises(pa.ConfigError, match=r"'qqp'.*is not the one that was combined"):
        PeftModel.from_pretrained(cases.bert(), str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "mnli")
    with pytest.raises(pa.ConfigError, match="'mnli' could not be read from"):
        PeftModel.from_pretrained(cases.bert(), str(tmp_path / "out"))


@pytest.mark.parametrize("name", ["scalearn lora", "scalearn_pp houlsby", "scalearn pal", "fusion pal"])
def test_training_moves_coefficients_and_head_and_nothing_else(saved: Paths, name: str) -> None:
    model = one(saved, name).train()
    files = {path: pathlib.Path(path, "adapter_model.safetensors").read_bytes() for path in saved["lora"].values()}
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("scalearn_" in n or "adapter_fusion_" in n or "modules_to_save" in n for n in trained)
    before = {n: t.detach().clone() for n, t in [*model.named_parameters(), *model.named_buffers()]}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(**cases.inputs(), labels=LABELS).loss.backward()
        assert all(p.grad is not None for n, p in model.named_parameters() if n in trained)
        optimizer.step()
    for n, t in [*model.named_parameters(), *model.named_buffers()]:
        moved = not torch.equal(t, before[n])
        assert moved is (n in trained) or n.endswith("tau"), n
    assert files == {path: pathlib.Path(path, "adapter_model.safetensors").read_bytes() for path in files}
    model.print_trainable_parameters()


def test_shared_coefficients_sum_the_gradients_of_all_places(saved: Paths) -> None:
    """With an equal tensor per place, the gradient of the shared tensor is the sum of theirs."""
    shared, own = one(saved, "scalearn_pp lora").eval(), one(saved).eval()
    mixers = {place: unit.mixer("value") for place, unit in sources.units(shared).items()}
    query = [place for place in mixers if place.endswith("query")]
    assert len({id(mixers[place]) for place in query}) == 1
    units = sources.units(own)
    with torch.no_grad():
        for place, unit in sources.units(shared).items():
            units[place].mixer("value").omega.copy_(unit.select("value", unit.mixer("value").omega))
        own.base_model.model.classifier.modules_to_save["default"].load_state_dict(sources.head_of(shared))
    for model in (shared, own):
        model(**cases.inputs(), labels=LABELS).loss.backward()
    got = mixers[query[0]].omega.grad
    total = torch.zeros_like(got)
    for place in query:
        rows = sources.units(shared)[place]._rows["value"] or [0, 1, 2]
        total[rows] += units[place].mixer("value").omega.grad
    torch.testing.assert_close(got, total, atol=1e-6, rtol=1e-5)


def test_several_targets_on_one_base(saved: Paths) -> None:
    model = one(saved, adapter="first")
    second = pa.ScaLearnPeftConfig(adapters=["mnli", "rte"], variant="scalearn_pp", task_type="SEQ_CLS")
    model.add_adapter("second", second)
    assert second.adapters == {name: saved["lora"][name] for name in ("mnli", "rte")}
    for seed, name in enumerate(("first", "second")):
        cases.randomise(model, name, seed=seed)
    model.eval()
    outputs = {name: cases.run(model, name, cases.inputs()) for name in ("first", "second", None)}
    assert torch.equal(outputs[None], logits(cases.bert()))
    assert (outputs["first"] - outputs["second"]).abs().max() > 1e-2
    for name in ("first", "second"):
        paths = {source: saved["lora"][source] for source in model.peft_config[name].adapters}
        expected = sources.combined_logits(
            cases.bert(), paths, sources.learned(model, name), cases.inputs(), sources.head_of(model, name)
        )
        torch.testing.assert_close(outputs[name], expected, atol=1e-5, rtol=1e-5)
    # Rows of both in one batch.
    mixed = ["first", "second", "__base__", "first"]
    with torch.no_grad():
        got = model(**cases.inputs(), adapter_names=mixed).logits
    torch.testing.assert_close(got, cases.row_by_row(model, mixed, cases.inputs()), atol=2e-5, rtol=1e-4)
    # Deleting one leaves the other, deleting both leaves nothing.
    model.set_adapter("first")
    model.delete_adapter("first")
    torch.testing.assert_close(cases.run(model, "second", cases.inputs()), outputs["second"], atol=0, rtol=0)
    assert not [n for n, _ in [*model.named_parameters(), *model.named_buffers()] if ".first" in n]
    model.delete_adapter("second")
    assert not model.base_model.model._forward_hooks
    assert list(model.base_model.model.bert.state_dict()) == list(cases.bert().bert.state_dict())


def test_rows_of_houlsby_and_pal_targets(saved: Paths) -> None:
    paths = {"a": saved["houlsby"]["mnli"], "b": saved["pal"]["qqp"], "c": saved["lora"]["qqp"]}
    model = get_peft_model(cases.bert(), pa.ScaLearnPeftConfig(adapters=dict(paths)), adapter_name="first")
    model.add_adapter("second", pa.ScaLearnPeftConfig(adapters=["b", "a"], variant="scalearn_uniform_pp"))
    for seed, name in enumerate(("first", "second")):
        cases.randomise(model, name, seed=seed)
    mixed = ["second", "__base__", "first", "second"]
    with torch.no_grad():
        got = model.eval()(**cases.inputs(), adapter_names=mixed).logits
    torch.testing.assert_close(got, cases.row_by_row(model, mixed, cases.inputs()), atol=2e-5, rtol=1e-4)


def test_targets_with_the_same_sources_hold_them_once(saved: Paths) -> None:
    model = one(saved, adapter="first")
    size = sum(b.numel() for b in model.buffers())
    model.add_adapter("second", pa.ScaLearnPeftConfig(adapters=list(saved["lora"]), task_type="SEQ_CLS"))
    assert sum(b.numel() for b in model.buffers()) == size
    model.add_adapter("third", pa.ScaLearnPeftConfig(adapters=["qqp"], task_type="SEQ_CLS"))
    assert sum(b.numel() for b in model.buffers()) > size


@pytest.mark.parametrize("kind", ["lora", "houlsby", "pal"])
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time:UserWarning")
def test_sources_that_are_on_the_model(saved: Paths, kind: str, tmp_path: pathlib.Path) -> None:
    paths = saved[kind]
    host = PeftModel.from_pretrained(cases.bert(), paths["mnli"], adapter_name="mnli")
    host.load_adapter(paths["qqp"], "qqp")
    with pytest.raises(pa.UnsupportedError, match="get_base_model"):
        get_peft_model(host, pa.ScaLearnPeftConfig(adapters=["mnli", "qqp"]))
    single = host.eval()
    expected_mnli = logits(single)
    config = pa.ScaLearnPeftConfig(adapters=["mnli", "qqp"])
    model = get_peft_model(host.get_base_model(), config, adapter_name="target").eval()
    sources.randomise(model, seed=3)
    loaded = {name: paths[name] for name in ("mnli", "qqp")}
    head = single.base_model.model.classifier.original_module.state_dict()
    expected = sources.combined_logits(cases.bert(), loaded, sources.learned(model, "target"), cases.inputs(), head)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    frozen = [n for n, p in model.named_parameters() if p.requires_grad and ".target." not in n]
    assert not frozen
    model.save_pretrained(str(tmp_path), selected_adapters=["target"])
    stored = json.loads((tmp_path / "target" / "adapter_config.json").read_text())
    assert stored["adapters"] == {"mnli": None, "qqp": None}
    with pytest.raises(pa.UnknownAdapterError, match="'mnli' is not on the model"):
        PeftModel.from_pretrained(cases.bert(), str(tmp_path / "target"))
    model.set_adapter("mnli")
    torch.testing.assert_close(logits(model), expected_mnli, atol=1e-6, rtol=1e-6)
    twin = copy.deepcopy(model)
    twin.delete_adapter("target")
    twin.set_adapter("mnli")
    torch.testing.assert_close(logits(twin), expected_mnli, atol=1e-6, rtol=1e-6)
    assert not [n for n, m in twin.named_modules() if "scalearn" in n or type(m).__name__.startswith("Fusion")]
    # The target has what it needs of them: they can be deleted, and the rest folded.
    model.set_adapter("target")
    for name in ("mnli", "qqp"):
        model.delete_adapter(name)
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=1e-5)
    if kind != "pal":
        torch.testing.assert_close(logits(fold(model)), expected, atol=1e-5, rtol=1e-5)


def test_unload_gives_the_base_back_and_merging_is_refused(saved: Paths) -> None:
    for name in ("scalearn lora", "scalearn houlsby", "scalearn pal"):
        model = one(saved, name)
        sources.randomise(model, seed=1)
        before = cases.state(model)
        with pytest.raises(pa.UnsupportedError, match="fold"):
            model.merge_and_unload()
        with pytest.raises(pa.UnsupportedError, match="fold"):
            model.merge_adapter()
        cases.assert_same_state(model, before)
        base = model.unload()
        plain = cases.bert()
        assert list(base.state_dict()) == list(plain.state_dict())
        assert cases.hooks(base) == cases.hooks(plain)
        given = cases.inputs()
        assert torch.equal(base.bert.eval()(**given)[0], plain.bert(**given)[0])


def test_deepcopy(saved: Paths) -> None:
    for name in ("scalearn_pp lora", "scalearn houlsby", "scalearn_pp pal"):
        model = one(saved, name).eval()
        twin = copy.deepcopy(model)
        expected = logits(model)
        sources.randomise(model, seed=1)
        assert torch.equal(logits(twin), expected)
        assert (logits(model) - expected).abs().max() > 1e-3
        shared = [unit.mixer(unit.sites[0]) for unit in sources.units(twin).values()]
        assert all(any(mixer is m for m in twin.modules()) for mixer in shared)


def test_half_precision_bases(saved: Paths) -> None:
    """Sources and coefficients stay in single precision, as PEFT's own adapters do."""
    for kind in ("lora", "houlsby", "pal"):
        model = get_peft_model(cases.bert().bfloat16(), pa.ScaLearnPeftConfig(adapters=dict(saved[kind])))
        omegas = [p for n, p in model.named_parameters() if p.requires_grad]
        assert {p.dtype for p in omegas} == {torch.float32}
        groups = [b for unit in sources.units(model).values() for b in unit.groups.buffers() if b.is_floating_point()]
        assert {b.dtype for b in groups} == {torch.float32}
        got = logits(model.eval())
        exact = logits(get_peft_model(cases.bert(), pa.ScaLearnPeftConfig(adapters=dict(saved[kind]))).eval())
        assert got.dtype == torch.bfloat16
        assert (got - exact).abs().max() < 0.1 * exact.abs().max()


def test_what_is_no_parameter_stays_in_single_precision(saved: Paths) -> None:
    given = {"mnli": 0.3, "qqp": 0.7, "rte": -0.1}
    config = pa.FixedCombinationPeftConfig(adapters=dict(saved["lora"]), coefficients=given)
    model = get_peft_model(cases.bert().bfloat16(), config)
    (omega,) = {
        u.mixer("value").omega for p, u in sources.units(model).items() if p.endswith("layer.1.attention.self.key")
    }
    assert torch.equal(omega, torch.tensor([[-0.1]]))
    config = pa.AdapterFusionPeftConfig(adapters=dict(saved["pal"]), temperature=True, regularization=0.0)
    model = get_peft_model(cases.bert().bfloat16(), config).train()
    for _ in range(2):
        model(**cases.inputs())
    taus = [unit.mixer("residual").tau for unit in sources.units(model).values()]
    torch.testing.assert_close(torch.stack(taus), torch.full((3,), 49.9))


def test_generation_uses_the_cache(tmp_path: pathlib.Path) -> None:
    settings = [pa.PALPeftConfig(hidden_size=r, num_heads=3, task_type="CAUSAL_LM") for r in (12, 18)]
    paths = {f"s{i}": sources.save(tmp_path / f"s{i}", c, seed=i, build=cases.llama) for i, c in enumerate(settings)}
    paths["lora"] = sources.save(tmp_path / "l", LoraConfig(target_modules=["v_proj"]), seed=2, build=cases.llama)
    model = get_peft_model(cases.llama(), pa.ScaLearnPeftConfig(adapters=paths, task_type="CAUSAL_LM")).eval()
    given = cases.rows_of(cases.inputs("llama"), 0, 2)
    arguments = {"max_new_tokens": 6, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    cached, whole = (model.generate(**given, **arguments, use_cache=use) for use in (True, False))
    assert torch.equal(cached.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(cached.scores), torch.stack(whole.scores), atol=1e-4, rtol=1e-4)


def test_checkpointing_is_exact(saved: Paths) -> None:
    for name in ("scalearn lora", "scalearn_pp houlsby", "scalearn pal"):
        found = []
        for checkpointed in (False, True):
            model = one(saved, name).train()
            cases.no_dropout(model)
            if checkpointed:
                model.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(0)
            model(**cases.inputs(), labels=LABELS).loss.backward()
            found.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# The regulariser


def expected_regularization(model: Any, weight: float) -> Tensor:
    seen = {id(u.mixer("value")): u.mixer("value").omega for u in sources.units(model).values()}
    return weight * sum((1 - omega.mean(1)).square().mean() for omega in seen.values())  # type: ignore[return-value]


@pytest.mark.parametrize("variant", ["scalearn", "scalearn_uniform_pp"])
def test_the_regulariser_is_in_the_loss(saved: Paths, variant: str) -> None:
    losses = []
    for weight in (0.0, 0.1):
        config = pa.ScaLearnPeftConfig(
            adapters=dict(saved["lora"]), variant=variant, omega_dropout=0.0, regularization=weight
        )
        model = get_peft_model(cases.bert(), config).train()
        cases.no_dropout(model)
        sources.set_all(model, {"mnli": 0.3, "qqp": 1.4, "rte": 0.0})
        out = model(**cases.inputs(), labels=LABELS)
        losses.append(out.loss)
        scale = 65536.0  # as gradients are under a scaler
        (out.loss * scale).backward()
        with torch.no_grad():
            evaluated = model.eval()(**cases.inputs(), labels=LABELS).loss
        assert torch.isclose(evaluated, losses[0])
    expected = expected_regularization(model, 0.1)
    torch.testing.assert_close(losses[1] - losses[0], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(regularization_loss(model), expected)
    # Its gradient is scaled as the loss is.
    plain = get_peft_model(
        cases.bert(), pa.ScaLearnPeftConfig(adapters=dict(saved["lora"]), variant=variant, omega_dropout=0.0)
    ).train()
    cases.no_dropout(plain)
    sources.set_all(plain, {"mnli": 0.3, "qqp": 1.4, "rte": 0.0})
    (plain(**cases.inputs(), labels=LABELS).loss * 65536.0).backward()
    omega = next(p for p in model.parameters() if p.requires_grad)
    other = next(p for p in plain.parameters() if p.requires_grad)
    (own,) = torch.autograd.grad(expected_regularization(model, 0.1), omega)
    torch.testing.assert_close((omega.grad - other.grad) / 65536.0, own, atol=1e-5, rtol=1e-3)


def test_a_regulariser_without_a_loss_warns(saved: Paths) -> None:
    model = one(saved, "fusion lora").train()
    with pytest.warns(UserWarning, match="fusion_regularization"):
        model(**cases.inputs())
    without = one(saved).train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        without(**cases.inputs())
        model.eval()(**cases.inputs())
    d = 24
    noise = 1e-6
    expected = 0.01 * len(sources.units(model)) * d * (d - 1) * noise**2
    torch.testing.assert_close(regularization_loss(model).item(), expected, rtol=1e-3, atol=0)
    assert regularization_loss(one(saved)) is None


def test_the_regulariser_with_accumulated_gradients(tmp_path: pathlib.Path) -> None:
    """Losses summed over the batches of a step contain it once, for any batch sizes."""
    path = sources.save(tmp_path, LoraConfig(target_modules=["q_proj"]), seed=0, build=cases.llama)
    config = pa.ScaLearnPeftConfig(adapters={"a": path}, omega_dropout=0.0, regularization=0.5)
    model = get_peft_model(cases.llama(), config)
    given = cases.inputs("llama")
    labels = given["input_ids"].masked_fill(given["attention_mask"] == 0, -100)
    items = (labels != -100).sum()
    whole = 0.0
    for rows in ((0,), (1, 2, 3)):
        part = {**cases.rows_of(given, *rows), "labels": labels[list(rows)], "num_items_in_batch": items}
        whole += model.train()(**part).loss.item() - model.eval()(**part).loss.item()
    expected = regularization_loss(model)
    assert expected is not None
    assert abs(whole - expected.item()) < 1e-4 * expected.item()


class TakesItems(transformers.BertForSequenceClassification):
    """Takes the number of items and returns a mean all the same, as many models of transformers 5 do."""

    def forward(self, *args: Any, num_items_in_batch: Any = None, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_the_regulariser_beside_a_mean(saved: Paths) -> None:
    """A loss that is not divided by the number of items contains the whole penalty in each batch."""
    config = pa.ScaLearnPeftConfig(adapters=dict(saved["lora"]), omega_dropout=0.0, regularization=0.5)
    model = get_peft_model(TakesItems(cases.bert_config()), config)
    cases.no_dropout(model)
    given = {**cases.inputs(), "labels": LABELS, "num_items_in_batch": torch.tensor(16)}
    with_it, without = model.train()(**given).loss, model.eval()(**given).loss
    torch.testing.assert_close(with_it - without, regularization_loss(model), atol=1e-5, rtol=1e-5)


def test_trainer(saved: Paths, tmp_path: pathlib.Path) -> None:
    model = one(saved, "scalearn_pp lora")
    rows = [{k: v[i] for k, v in cases.inputs().items()} | {"labels": LABELS[i]} for i in range(4)] * 2
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, per_device_train_batch_size=4, learning_rate=0.1, report_to=[],
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2, load_best_model_at_end=True,
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    loaded = PeftModel.from_pretrained(cases.bert(), best).eval()
    torch.testing.assert_close(logits(loaded), logits(model.eval()), atol=1e-6, rtol=1e-6)


def test_sources_on_the_hub(saved: Paths, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The saved config names the commit, and loading asks for it; the hub is the local cache here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "hub" / "models--user--adapters"
    commits = ["a" * 40, "b" * 40]
    for commit, source in zip(commits, ("mnli", "qqp"), strict=True):
        shutil.copytree(saved["lora"][source], repository / "snapshots" / commit)
        shutil.copytree(saved["lora"]["rte"], repository / "snapshots" / commit / "inside" / "rte")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commits[0])
    adapters = {"first": "user/adapters", "second": "user/adapters/inside/rte"}
    model = get_peft_model(cases.bert(), pa.ScaLearnPeftConfig(adapters=adapters)).eval()
    assert model.peft_config["default"].revisions == dict.fromkeys(adapters, commits[0])
    sources.set_all(model, {"first": 1.0})
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "out"))
    (repository / "refs" / "main").write_text(commits[1])
    loaded = PeftModel.from_pretrained(cases.bert(), str(tmp_path / "out")).eval()
    torch.testing.assert_close(logits(loaded), expected, atol=1e-6, rtol=1e-6)
    other = pa.ScaLearnPeftConfig(adapters=adapters, revisions={"first": commits[1]})
    model = get_peft_model(cases.bert(), other).eval()
    assert other.revisions == dict.fromkeys(adapters, commits[1])
    sources.set_all(model, {"first": 1.0})
    assert (logits(model) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_a_loaded_target_trains_on(saved: Paths, tmp_path: pathlib.Path, low_cpu_mem_usage: bool) -> None:
    model = one(saved, "scalearn_pp lora").eval()
    sources.randomise(model, seed=3)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(
        cases.bert(), str(tmp_path), is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage
    )
    torch.testing.assert_close(logits(loaded.eval()), logits(model), atol=0, rtol=0)
    names = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, loaded)]
    assert names[0] == names[1]
    frozen = PeftModel.from_pretrained(cases.bert(), str(tmp_path), low_cpu_mem_usage=low_cpu_mem_usage)
    assert not [n for n, p in frozen.named_parameters() if p.requires_grad]


@pytest.mark.usefixtures("transformers_takes_this_peft")
def test_transformers_own_api(saved: Paths, tmp_path: pathlib.Path) -> None:
    config = pa.ScaLearnPeftConfig(adapters=dict(saved["lora"]), variant="scalearn_pp")
    model = get_peft_model(cases.bert(), config).eval()
    sources.randomise(model, seed=3)
    model.save_pretrained(str(tmp_path))
    base = cases.bert()
    base.load_adapter(str(tmp_path))
    torch.testing.assert_close(logits(base.eval()), logits(model), atol=0, rtol=0)
    base = cases.bert()
    base.add_adapter(pa.ScaLearnPeftConfig(adapters=dict(saved["houlsby"]), regularization=0.1))
    base(**cases.inputs(), labels=LABELS).loss.backward()
    assert pa.fusion_regularization(base) == regularization_loss(base) > 0


# What is refused


def refuses(error: type[Exception], match: str, config: Any, build: Any = cases.bert) -> None:
    """On a new base, and on a model with an adapter, which does not change."""
    base = build()
    before, hooked = cases.state(base), cases.hooks(base)
    with pytest.raises(error, match=match):
        get_peft_model(base, config)
    cases.assert_same_state(base, before)
    assert cases.hooks(base) == hooked
    assert all(p.requires_grad for p in base.parameters())


def test_a_config_without_sources_is_for_no_model() -> None:
    for kind in (pa.ScaLearnPeftConfig, pa.AdapterFusionPeftConfig, pa.FixedCombinationPeftConfig):
        config = PeftConfig.from_peft_type(peft_type=kind.method.name.upper())
        assert type(config) is kind
        assert kind(**config.to_dict()) == config
        refuses(pa.ConfigError, "adapters=None is not allowed: name at least one source", config)
    with pytest.raises(pa.ConfigError, match="revisions names 'a', which is not one of the sources"):
        pa.ScaLearnPeftConfig(revisions={"a": "main"})
    with pytest.raises(pa.ConfigError, match="order="):
        pa.ScaLearnPeftConfig(order=["a"])
    with pytest.raises(pa.ConfigError, match="coefficients="):
        pa.FixedCombinationPeftConfig(coefficients={"a": 1.0})


def test_bad_names() -> None:
    for adapters in ({}, []):
        with pytest.raises(pa.ConfigError, match="at least one source"):
            pa.ScaLearnPeftConfig(adapters=adapters)
    with pytest.raises(pa.ConfigError, match="names 'rte' twice"):
        pa.ScaLearnPeftConfig(adapters=["rte", "mnli", "rte"])
    for again in (HERE, f"{HERE}/", f"{HERE}/../peft"):
        with pytest.raises(pa.ConfigError, match="'rte' and as 'again'"):
            pa.ScaLearnPeftConfig(adapters={"rte": HERE, "again": again})
    with pytest.raises(pa.ConfigError, match="order="):
        pa.ScaLearnPeftConfig(adapters={"rte": "path"}, order=["mnli"])
    for adapters in ({"a.b": "path"}, {"": "path"}, {1: "path"}):
        with pytest.raises(pa.ConfigError, match="adapters has the name"):
            pa.ScaLearnPeftConfig(adapters=adapters)
    with pytest.raises(pa.ConfigError, match=r"adapters\['a'\]=3"):
        pa.ScaLearnPeftConfig(adapters={"a": 3})


@pytest.mark.parametrize(
    ("cls", "arguments"),
    [
        (pa.ScaLearnPeftConfig, {"variant": "scalearn_3"}),
        (pa.ScaLearnPeftConfig, {"omega_dropout": 1.0}),
        (pa.ScaLearnPeftConfig, {"ablation": "max"}),
        (pa.ScaLearnPeftConfig, {"regularization_form": "code"}),
        (pa.ScaLearnPeftConfig, {"bundle": 1}),
        (pa.ScaLearnPeftConfig, {"revisions": {"b": "main"}}),
        (pa.ScaLearnPeftConfig, {"modules_to_save": "classifier"}),
        (pa.AdapterFusionPeftConfig, {"score_dropout": -0.1}),
        (pa.AdapterFusionPeftConfig, {"value": False, "regularization": 0.1}),
        (pa.AdapterFusionPeftConfig, {"value": False, "value_init_noise": "random"}),
        (pa.AdapterFusionPeftConfig, {"score_scale": 0}),
        (pa.FixedCombinationPeftConfig, {"coefficients": {"b": 1.0}}),
        (pa.FixedCombinationPeftConfig, {"coefficients": {"a": "1"}}),
        (pa.FixedCombinationPeftConfig, {"coefficients": "sum"}),
    ],
)
def test_bad_values(cls: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(pa.ConfigError, match=next(reversed(arguments)) if len(arguments) == 1 else "value="):
        cls(adapters={"a": "path"}, **arguments)


def test_bad_sources(saved: Paths, tmp_path: pathlib.Path) -> None:
    good = saved["lora"]["mnli"]
    refuses(
        pa.UnknownAdapterError,
        "'sst' is not on the model",
        pa.ScaLearnPeftConfig(adapters={"mnli": good, "sst": None}),
    )
    refuses(
        pa.ConfigError, "'sst' could not be read", pa.ScaLearnPeftConfig(adapters={"mnli": good, "sst": "./nowhere"})
    )
    for name, damage in {
        "no_config": lambda folder: (folder / "adapter_config.json").unlink(),
        "no_weights": lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "corrupted": lambda folder: (folder / "adapter_model.safetensors").write_bytes(b"\x01" * 100),
        "cut": lambda folder: (folder / "adapter_model.safetensors").write_bytes(
            (folder / "adapter_model.safetensors").read_bytes()[:-40]
        ),
    }.items():
        folder = tmp_path / name
        shutil.copytree(good, folder)
        damage(folder)
        config = pa.ScaLearnPeftConfig(adapters={"mnli": good, "bad": str(folder)})
        refuses(pa.ConfigError, f"'bad' could not be read from .*{name}", config)


@pytest.mark.parametrize("kind", ["lora", "houlsby"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_sources_that_are_not_finite(saved: Paths, tmp_path: pathlib.Path, kind: str, value: float) -> None:
    good, folder = saved[kind]["mnli"], tmp_path / "diverged"
    shutil.copytree(good, folder)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in sorted(tensors) if ".encoder.layer.1." in name)  # a head is not used
    tensors[name].view(-1)[-1] = value
    save_file(tensors, file, metadata={"format": "pt"})
    config = pa.ScaLearnPeftConfig(adapters={"mnli": good, "bad": str(folder)})
    refuses(pa.ConfigError, "'bad' from .*diverged.* not finite: its training diverged", config)


@pytest.mark.parametrize("damage", [lambda whole: b"\x01" * 100, lambda whole: whole[:-8]], ids=["corrupted", "cut"])
def test_a_damaged_target_changes_nothing(saved: Paths, damage: Any, tmp_path: pathlib.Path) -> None:
    model = one(saved, adapter="first").eval()
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "first" / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    base = cases.bert()
    states = [(it, cases.state(it), cases.hooks(it)) for it in (base, model)]
    with pytest.raises(pa.ConfigError, match=f"{file} cannot be read"):
        PeftModel.from_pretrained(base, str(file.parent))
    with pytest.raises(pa.ConfigError, match=f"{file} cannot be read"):
        model.load_adapter(str(file.parent), "second")
    for it, before, hooked in states:
        cases.assert_same_state(it, before)
        assert cases.hooks(it) == hooked
    assert list(model.peft_config) == ["first"]


def test_a_target_without_its_file_changes_nothing(saved: Paths, tmp_path: pathlib.Path) -> None:
    model = one(saved, adapter="first").eval()
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "first" / "adapter_model.safetensors"
    file.unlink()
    before, hooked = cases.state(model), cases.hooks(model)
    with pytest.raises(pa.StorageError, match=f"{file}.*is missing"):
        model.load_adapter(str(file.parent), "second")
    cases.assert_same_state(model, before)
    assert cases.hooks(model) == hooked
    assert list(model.peft_config) == ["first"]


class QuantisedLinear(nn.Module):
    """Eight-bit weights as flat bytes, as in a quantised base."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = linear.in_features, linear.out_features, linear.bias
        self.scale = linear.weight.detach().abs().max() / 127
        packed = (linear.weight.detach() / self.scale).round().to(torch.int8).view(torch.uint8)
        self.weight = nn.Parameter(packed.reshape(-1, 1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.view(torch.int8).view(self.out_features, self.in_features) * self.scale
        return nn.functional.linear(x, weight, self.bias)


def quantised() -> Any:
    model = cases.bert()
    for layer in model.bert.encoder.layer:
        attention = layer.attention.self
        attention.query, attention.value = QuantisedLinear(attention.query), QuantisedLinear(attention.value)
    return model


@pytest.mark.parametrize("cls", [pa.ScaLearnPeftConfig, pa.AdapterFusionPeftConfig])
def test_a_quantised_base(saved: Paths, cls: Any, tmp_path: pathlib.Path) -> None:
    model = get_peft_model(quantised(), cls(adapters=dict(saved["lora"]), task_type="SEQ_CLS")).train()
    model(**cases.inputs(), labels=LABELS).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert all(p.dtype == torch.float32 and p.grad is not None and p.grad.isfinite().all() for p in trained)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(quantised(), str(tmp_path)).eval()
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_sources_that_do_not_fit(saved: Paths, tmp_path: pathlib.Path) -> None:
    good = saved["lora"]["mnli"]
    lora = LoraConfig(target_modules=["query"])
    wide = sources.save(tmp_path / "wide", lora, seed=0, build=lambda: cases.bert(hidden_size=32))
    refuses(pa.ConfigError, "has the widths", pa.ScaLearnPeftConfig(adapters={"a": good, "b": wide}))
    deep = sources.save(
        tmp_path / "deep", LoraConfig(target_modules=["query"]), seed=0, build=lambda: cases.bert(num_hidden_layers=4)
    )
    refuses(pa.ConfigError, "which the model does not have", pa.ScaLearnPeftConfig(adapters={"a": good, "b": deep}))
    other = sources.save(tmp_path / "other", LoraConfig(target_modules=["query"]), seed=0, name="some/other-base")
    mine = sources.save(tmp_path / "mine", LoraConfig(target_modules=["query"]), seed=0, name="some/base")
    refuses(pa.ConfigError, "different base models", pa.ScaLearnPeftConfig(adapters={"a": mine, "b": other}))
    get_peft_model(cases.bert(), pa.ScaLearnPeftConfig(adapters={"a": mine, "b": other}, check_base=False))
    electra = json.loads((pathlib.Path(saved["pal"]["qqp"]) / "adapter_config.json").read_text())
    shutil.copytree(saved["pal"]["qqp"], tmp_path / "electra")
    electra["base_model_type"] = "electra"
    (tmp_path / "electra" / "adapter_config.json").write_text(json.dumps(electra))
    of_types = {"a": saved["pal"]["mnli"], "b": str(tmp_path / "electra")}
    refuses(pa.ConfigError, "a base model of type 'electra'", pa.ScaLearnPeftConfig(adapters=of_types))
    get_peft_model(cases.bert(), pa.ScaLearnPeftConfig(adapters=of_types, check_base=False))
    for kind, config in (("houlsby", pa.HoulsbyPeftConfig()), ("pal", pa.PALPeftConfig(hidden_size=12))):
        path = sources.save(tmp_path / kind, config, seed=0, build=lambda: cases.bert(hidden_size=36))
        refuses(pa.ConfigError, "has the widths", pa.ScaLearnPeftConfig(adapters={"a": good, "b": path}))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
        ({"modules_to_save": ["pooler"]}, "has also trained 'bert.pooler"),
    ],
)
def test_sources_that_cannot_be_combined(tmp_path: pathlib.Path, settings: dict[str, Any], match: str) -> None:
    path = sources.save(tmp_path, LoraConfig(target_modules=["query"], **settings), seed=0)
    refuses(pa.UnsupportedError, match, pa.ScaLearnPeftConfig(adapters={"a": path}))


def test_lora_on_a_convolution_is_refused(tmp_path: pathlib.Path) -> None:
    def vit() -> Any:
        sizes = dict(hidden_size=24, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
        return transformers.ViTModel(transformers.ViTConfig(image_size=8, patch_size=4, **sizes))

    path = sources.save(tmp_path, LoraConfig(target_modules=["projection"]), seed=0, build=vit)
    config = pa.ScaLearnPeftConfig(adapters={"a": path})
    refuses(pa.UnsupportedError, r"'embeddings.patch_embeddings.projection'.*only LoRA on linear", config, vit)


def test_other_methods_are_no_sources(tmp_path: pathlib.Path) -> None:
    from peft import IA3Config

    settings = IA3Config(target_modules=["query"], feedforward_modules=[])
    path = sources.save(tmp_path / "ia3", settings, seed=0)
    refuses(pa.UnsupportedError, "has peft_type", pa.ScaLearnPeftConfig(adapters={"a": path}))
    joint = sources.save(tmp_path / "joint", pa.LowRankPeftConfig(hidden_size=3, train_base=True), seed=0)
    refuses(pa.UnsupportedError, "train_base=True", pa.ScaLearnPeftConfig(adapters={"a": joint}))


def test_a_refused_second_target_leaves_the_first(saved: Paths) -> None:
    model = one(saved, adapter="first").eval()
    before, expected = cases.state(model), logits(model)
    bad = pa.ScaLearnPeftConfig(adapters={"mnli": saved["lora"]["mnli"], "sst": "./nowhere"})
    with pytest.raises(pa.ConfigError, match="could not be read"):
        model.add_adapter("second", bad)
    cases.assert_same_state(model, before)
    assert list(model.peft_config) == ["first"]
    assert torch.equal(logits(model), expected)
