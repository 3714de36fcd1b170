"""Common uses of a PEFT method, for each method of this package, on one tiny model."""

from __future__ import annotations

import copy
import json
import pathlib

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

peft = pytest.importorskip("peft")

import pal_adapters as pa  # noqa: E402
from tests.methods import RECORDS, names  # noqa: E402
from tests.processes import python  # noqa: E402

CONFIGS = {name: (RECORDS[name].config_class("peft"), dict(RECORDS[name].options)) for name in names("peft")}
CONFIGS["pal untied"] = (pa.PALPeftConfig, {"hidden_size": 12, "tie_projections": False})
WITH_IDENTITY = [name for name, (cls, _) in CONFIGS.items() if cls.method.identity]
TINY = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40, vocab_size=60)


def base(**changes: object) -> BertModel:
    torch.manual_seed(1)
    return BertModel(BertConfig(**{**TINY, **changes})).eval()


def batch(rows: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 60, (rows, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def config(name: str, **changes: object) -> object:
    cls, arguments = CONFIGS[name]
    return cls(**{"init_weights": False, **arguments, **changes})


def shake(model: torch.nn.Module) -> None:
    """Random values for every trainable parameter."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)


def run(model: torch.nn.Module, rows: int = 4, **kwargs: object) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**batch(rows), **kwargs).last_hidden_state


@pytest.mark.parametrize("name", WITH_IDENTITY)
def test_a_fresh_adapter_changes_nothing(name: str) -> None:
    model = base()
    before = run(model)
    tuned = peft.get_peft_model(model, config(name, init_weights=True))
    assert torch.equal(run(tuned), before)


@pytest.mark.parametrize("name", CONFIGS)
def test_trained_adapter_can_be_disabled_and_unloaded(name: str) -> None:
    model = base()
    before = run(model)
    names = set(model.state_dict())
    tuned = peft.get_peft_model(model, config(name))
    shake(tuned)
    assert (run(tuned) - before).abs().max() > 1e-2
    with tuned.disable_adapter():
        assert torch.equal(run(tuned), before)
    plain = tuned.unload()
    assert torch.equal(run(plain), before)
    assert set(plain.state_dict()) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in plain.modules())


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_adapter_gives_the_same_outputs_in_a_new_process(name: str, tmp_path: pathlib.Path) -> None:
    model = base()
    model.save_pretrained(tmp_path / "base")
    tuned = peft.get_peft_model(model, config(name))
    shake(tuned)
    expected = run(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    torch.save({"batch": batch(), "expected": expected}, tmp_path / "expected.pt")
    code = f"""
import importlib, torch, pal_adapters, peft
importlib.import_module({type(config(name)).__module__!r})  # registers a method of another package
from transformers import BertModel
root = {str(tmp_path)!r}
stored = torch.load(root + "/expected.pt")
model = peft.PeftModel.from_pretrained(BertModel.from_pretrained(root + "/base"), root + "/adapter").eval()
print((model(**stored["batch"]).last_hidden_state - stored["expected"]).abs().max().item())
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) <= 1e-6


@pytest.mark.usefixtures("transformers_takes_this_peft")
@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_own_integration(name: str, tmp_path: pathlib.Path) -> None:
    model = base()
    before = run(model)
    model.add_adapter(config(name), adapter_name="a")
    shake(model)
    changed = run(model)
    model.save_pretrained(tmp_path)
    model.disable_adapters()
    assert torch.equal(run(model), before)
    other = base()
    other.load_adapter(str(tmp_path), adapter_name="b")
    assert torch.allclose(run(other), changed, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_one_adapter_a_row_equals_one_forward_per_adapter(name: str) -> None:
    tuned = peft.get_peft_model(base(), config(name), adapter_name="rte")
    for other in ("sst", "qqp"):
        tuned.add_adapter(other, config(name))
    tuned.set_requires_grad(["rte", "sst", "qqp"])
    shake(tuned)
    names = ["sst", "__base__", "rte", "sst"]
    mixed = run(tuned, adapter_names=names)
    for row, adapter in enumerate(names):
        if adapter == "__base__":
            with tuned.disable_adapter():
                expected = run(tuned)
        else:
            tuned.set_adapter(adapter)
            expected = run(tuned)
        assert torch.allclose(mixed[row], expected[row], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("checkpointing", [None, True, False])
def test_gradients_of_a_mixed_batch(name: str, checkpointing: bool | None) -> None:
    """Equal to separate batches, with activation checkpointing too; absent adapters get none."""

    def gradients(separate: bool) -> dict[str, torch.Tensor]:
        model = base(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        arguments = {"dropout": 0.0} if "dropout" in CONFIGS[name][0].__dataclass_fields__ else {}
        tuned = peft.get_peft_model(model, config(name, **arguments), adapter_name="rte")
        for other in ("sst", "qqp"):
            tuned.add_adapter(other, config(name, **arguments))
        tuned.set_requires_grad(["rte", "sst", "qqp"])
        shake(tuned)
        names = ["sst", "rte", "rte", "sst"]
        if checkpointing is not None and not separate:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        tuned.train()
        inputs = batch()
        if separate:
            for adapter in ("rte", "sst"):
                rows = [i for i, n in enumerate(names) if n == adapter]
                part = {k: v[rows] for k, v in inputs.items()}
                tuned(**part, adapter_names=[adapter] * 2).last_hidden_state.square().sum().backward()
        else:
            tuned(**inputs, adapter_names=names).last_hidden_state.square().sum().backward()
        return {n: p.grad for n, p in tuned.named_parameters() if p.requires_grad}

    mixed, apart = gradients(separate=False), gradients(separate=True)
    for key, value in apart.items():
        if ".qqp." in key or key.endswith(".qqp"):
            assert mixed[key] is None or not mixed[key].any()
        else:
            assert value is not None, key
            assert torch.allclose(mixed[key], value, atol=1e-4, rtol=1e-4), key


def test_rows_are_forgotten_when_the_model_raises() -> None:
    tuned = peft.get_peft_model(base(), config("pal"), adapter_name="rte")
    shake(tuned)
    before = run(tuned)
    with pytest.raises(ValueError, match=r"'nope'.*use 'rte'"):
        run(tuned, adapter_names=["rte", "nope", "rte", "rte"])
    with pytest.raises(ValueError, match="one name per example"):
        run(tuned, adapter_names=["rte", "rte", "rte"])
    with pytest.raises(ValueError, match="list"):
        run(tuned, adapter_names="rte")
    assert torch.equal(run(tuned), before)


def test_shared_projections_are_one_object_counted_and_saved_once(tmp_path: pathlib.Path) -> None:
    from safetensors import safe_open

    tuned = peft.get_peft_model(base(), config("pal"))
    trainable, _ = tuned.get_nb_trainable_parameters()
    d, r, depth = 24, 12, 2
    assert trainable == 2 * d * r + r + d + 3 * depth * (r * r + r)
    tuned.save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sum(file.get_tensor(k).numel() for k in list(file.keys())) == trainable
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "PAL"


def test_joint_training_saves_the_base(tmp_path: pathlib.Path) -> None:
    model = base()
    before = copy.deepcopy(model.state_dict())
    tuned = peft.get_peft_model(model, config("pal", train_base=True))
    shake(tuned)
    expected = run(tuned)
    assert any(not torch.equal(v, dict(model.named_parameters())[k]) for k, v in before.items() if "query" in k)
    tuned.save_pretrained(tmp_path)
    fresh = base()
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    assert torch.allclose(run(peft.PeftModel.from_pretrained(fresh, tmp_path)), expected, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_merging_is_refused_and_changes_nothing(name: str) -> None:
    tuned = peft.get_peft_model(base(), config(name))
    shake(tuned)
    before = run(tuned)
    for call in (tuned.merge_and_unload, tuned.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            call()
    assert torch.equal(run(tuned), before)


def test_blocks_can_be_chosen() -> None:
    def adapted(**arguments: object) -> list[int]:
        tuned = peft.get_peft_model(base(num_hidden_layers=4), config("pal", **arguments))
        return [i for i, block in enumerate(tuned.base_model.model.encoder.layer) if hasattr(block, "pal")]

    assert adapted() == [0, 1, 2, 3]
    assert adapted(layers_to_transform=[1, 3]) == [1, 3]
    assert adapted(layers_to_transform=2, layers_pattern="layer") == [2]
    assert adapted(target_modules=["encoder.layer.0", "encoder.layer.2"]) == [0, 2]
    assert adapted(target_modules=r".*layer\.[13]") == [1, 3]
    assert adapted(target_modules=["encoder.layer"], exclude_modules=["layer.1"]) == [0, 2, 3]


@pytest.mark.parametrize(
    ("cls", "arguments", "words"),
    [
        (pa.PALPeftConfig, {"hidden_size": 20}, "hidden_size=20.*num_heads=6.*18 or 24"),
        (pa.PALPeftConfig, {"hidden_size": -6}, "hidden_size=-6.*at least 1"),
        (pa.PALPeftConfig, {"dropout": 1.0}, "dropout=1.0"),
        (pa.PALPeftConfig, {"activation_site": "end"}, "activation_site='end'.*'output', 'middle', 'none'"),
        (pa.PALPeftConfig, {"init_weights": "yes"}, "init_weights='yes'.*True or False"),
        (pa.LowRankPeftConfig, {"hidden_size": 0}, "hidden_size=0"),
        (pa.LHUCPeftConfig, {"lhuc_site": "x"}, "lhuc_site='x'"),
        (pa.ParallelHoulsbyPeftConfig, {"lhuc": True}, "lhuc=True.*first task"),
        (pa.HoulsbyPALPeftConfig, {"lhuc": True}, "lhuc=True"),
        (pa.TopAttentionPeftConfig, {"init_weights": True}, "init_weights=True"),
        (pa.HoulsbyPeftConfig, {"activation": "softplus"}, "activation='softplus'.*'gelu_new'"),
        (pa.HoulsbyPeftConfig, {"init_std": 0.0}, "init_std=0.0"),
        (pa.PALPeftConfig, {"layers_pattern": "layer"}, "layers_pattern='layer'.*layers_to_transform"),
    ],
)
def test_bad_values_are_named(cls: type, arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        cls(**arguments)


@pytest.mark.parametrize("arguments", [{"layers_to_transform": [9]}, {"target_modules": ["nothing"]}])
def test_blocks_that_are_not_there_leave_the_model_as_it_was(arguments: dict[str, object]) -> None:
    model = base()
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=r"0 to 1|names no block"):
        peft.get_peft_model(model, config("pal", **arguments))
    assert set(model.state_dict()) == names


def test_a_model_without_known_blocks_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match="register_block"):
        peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), config("pal"))


@pytest.mark.usefixtures("transformers_takes_this_peft")
def test_beside_lora() -> None:
    model = base()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False), adapter_name="lora")
    only_lora = run(model)
    model.add_adapter(config("low_rank"), adapter_name="ours")
    shake(model)
    model.set_adapter(["lora", "ours"])
    both = run(model)
    model.set_adapter("lora")
    assert torch.allclose(run(model), only_lora, atol=1e-6)
    assert (both - only_lora).abs().max() > 1e-2


def test_a_head_saved_with_the_adapter(tmp_path: pathlib.Path) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification(BertConfig(**TINY)).eval()
    tuned = peft.get_peft_model(model, config("pal", task_type="SEQ_CLS"), adapter_name="rte")
    tuned.add_adapter("sst", config("pal", task_type="SEQ_CLS"))
    tuned.set_requires_grad(["rte", "sst"])
    shake(tuned)
    names = ["rte", "sst", "sst", "rte"]
    mixed = tuned.eval()(**batch(), adapter_names=names).logits
    for row, adapter in enumerate(names):
        tuned.set_adapter(adapter)
        assert torch.allclose(mixed[row], tuned(**batch()).logits[row], atol=1e-5)
    tuned.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = peft.PeftModel.from_pretrained(
        BertForSequenceClassification(BertConfig(**TINY)), tmp_path / "sst", adapter_name="sst"
    ).eval()
    tuned.set_adapter("sst")
    assert torch.allclose(again(**batch()).logits, tuned(**batch()).logits, atol=1e-6)
