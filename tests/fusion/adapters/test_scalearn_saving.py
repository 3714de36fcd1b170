"""Files of ScaLearn in `adapters`: fusions, setups and whole models, the trainer's checkpoints, and bad files."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import adapters
import pytest
import torch
from adapters import AutoAdapterModel
from adapters.composition import Fuse, Stack
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertForSequenceClassification, BertModel

from pal_adapters import ConfigError, ScaLearnConfig, StorageError
from tests.hosts.adapters.test_training import trainer_for
from tests.hosts.adapters.tiny import fresh, output, tiny_config

from .test_scalearn import FUSE, NAMES, VARIANTS, layers_of, omegas, randomise_omegas, with_sources

SAFE = pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "pickle"])
ALL = {
    **{name: name for name in VARIANTS},
    "options": ScaLearnConfig(
        variant="scalearn++", omega_dropout=0.2, ablation="softmax", regularization=0.1, regularization_form="code"
    ),
    "fixed": ScaLearnConfig(fixed={"a": 0.5, "b": -1.0, "c": 2.0}),
}


def trained(model: nn.Module, config: Any, kind: str = "seq_bn", fuse: Fuse = FUSE) -> nn.Module:
    if "a" not in model.adapters_config:
        with_sources(model, kind)
    model.add_adapter_fusion(fuse, config=config)
    randomise_omegas(model, fuse.name)
    return model


@SAFE
@pytest.mark.parametrize("config", ALL)
@pytest.mark.parametrize("kind", ["double_seq_bn", "mixture"])
def test_save_and_load(
    kind: str, config: str, safe: bool, bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor],
    tmp_path: pathlib.Path,
) -> None:  # fmt: skip
    trained(bert, ALL[config], kind)
    expected = output(bert, batch, FUSE)
    bert.save_adapter_setup(str(tmp_path / "setup"), FUSE, use_safetensors=safe)
    folder = tmp_path / "setup" / "a,b,c"
    file = next(folder.glob("*.safetensors" if safe else "*.bin"))
    saved = load_file(file) if safe else torch.load(file, weights_only=True)
    wanted = {k: v for k, v in bert.state_dict().items() if "adapter_fusion_layer" in k}
    assert saved.keys() == wanted.keys()
    assert len(saved) == (1 if "pp" in config or config in ("options", "fixed") else len(list(layers_of(bert))))
    other = fresh(base_path)
    other.load_adapter_setup(str(tmp_path / "setup"), set_active=True, use_safetensors=safe)
    assert other.active_adapters == FUSE
    assert torch.equal(output(other, batch), expected)
    found, names = other.adapters_config.get_fusion("a,b,c")
    assert found == bert.adapters_config.get_fusion("a,b,c")[0]
    assert (type(found), names) == (ScaLearnConfig, list(NAMES))
    other.load_adapter_fusion(str(folder), load_as="x", use_safetensors=safe)
    assert torch.equal(output(other, batch, Fuse(*NAMES, name="x")), expected)
    assert len({id(layer.get_omega()) for layer in layers_of(other, "x")}) == len(saved)


def test_in_a_new_process(
    bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path,
    python: Callable[[str], str],
) -> None:  # fmt: skip
    with_sources(bert, "seq_bn")
    for name in VARIANTS:
        fuse = Fuse(*NAMES, name=name)
        trained(bert, name, fuse=fuse)
        torch.save(output(bert, batch, fuse), tmp_path / f"{name}.pt")
    bert.save_all_adapters(str(tmp_path / "all"), use_safetensors=True)
    bert.save_all_adapter_fusions(str(tmp_path / "all"), use_safetensors=True)
    torch.save(batch, tmp_path / "batch.pt")
    done = python(
        f"""
        import adapters, pal_adapters, torch
        from adapters.composition import Fuse
        from transformers import BertModel
        model = BertModel.from_pretrained({str(base_path)!r}).eval()
        adapters.init(model)
        for name in "abc":
            model.load_adapter("all/" + name, use_safetensors=True)
        for name in {VARIANTS!r}:
            model.load_adapter_fusion("all/" + name, use_safetensors=True)
            model.set_active_adapters(Fuse("a", "b", "c", name=name))
            with torch.no_grad():
                output = model(**torch.load("batch.pt")).last_hidden_state
            assert torch.equal(output, torch.load(name + ".pt")), name
        print("equal")
        """
    )
    assert done == "equal\n"


def test_names_that_begin_alike(
    bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    pair = Fuse("a", "b")
    trained(bert, "scalearn", fuse=pair)
    trained(bert, "scalearn_pp")
    expected = output(bert, batch, pair)
    bert.save_adapter_setup(str(tmp_path), pair, use_safetensors=True)
    assert len(load_file(next((tmp_path / "a,b").glob("*.safetensors")))) == 3
    other = with_sources(fresh(base_path), "seq_bn")
    trained(other, "scalearn_pp")
    kept = [o.clone() for o in omegas(other)]
    other.load_adapter_setup(str(tmp_path), use_safetensors=True)
    assert torch.equal(output(other, batch, pair), expected)
    assert all(torch.equal(a, b) for a, b in zip(omegas(other), kept, strict=True))


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("model_class", ["auto", BertForSequenceClassification])
def test_a_whole_model(
    model_class: Any, named: bool, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    from adapters.wrappers import load_model

    config = "scalearn_pp" if named else ScaLearnConfig(variant="scalearn_pp", omega_dropout=0.1, regularization=0.2)
    if model_class == "auto":
        model = AutoAdapterModel.from_pretrained(base_path).eval()
        model.add_classification_head("h", num_labels=2)
    else:
        model = fresh(base_path, model_class)
    trained(model, config, "double_seq_bn")
    model.set_active_adapters(FUSE)
    with torch.no_grad():
        expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    if named:  # as earlier releases wrote it
        written = json.loads((tmp_path / "config.json").read_text())
        known = written["adapters"]
        assert [known["fusion_config_map"].pop(key)["variant"] for key in known["fusions"].values()] == ["scalearn_pp"]
        known["fusions"] = dict.fromkeys(known["fusions"], "scalearn_pp")
        (tmp_path / "config.json").write_text(json.dumps(written))
    if model_class == "auto":
        again = AutoAdapterModel.from_pretrained(tmp_path).eval()
        again.active_head = "h"
    else:
        again = load_model(str(tmp_path), model_class).eval()
    again.set_active_adapters(FUSE)
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, expected)
    assert len({id(layer.get_omega()) for layer in layers_of(again)}) == 1
    if not named:  # the loss is watched again, by the outermost model alone
        again.train_adapter_fusion(FUSE)
        labels = torch.tensor([0, 1, 1, 0])
        for module in again.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0
        for layer in layers_of(again):
            layer.dropout = 0.0
        loss = again(**batch, labels=labels).loss
        again.eval()
        (omega,) = omegas(again)
        penalty = 0.2 * ((1 - omega.mean(1)) ** 2).sum() / 3
        torch.testing.assert_close(loss - again(**batch, labels=labels).loss, penalty, atol=1e-5, rtol=1e-4)


# The trainer


def for_target(base_path: pathlib.Path, variant: str, fuse: Fuse = FUSE) -> nn.Module:
    torch.manual_seed(2)
    model = AutoAdapterModel.from_pretrained(base_path)
    with_sources(model, "double_seq_bn")
    model.add_classification_head("target", num_labels=2)
    model.add_adapter_fusion(fuse, config=variant)
    model.train_adapter_fusion(fuse)
    return model


@pytest.mark.parametrize("variant", ["scalearn", "scalearn_pp", "scalearn_uniform_pp"])
def test_trainer_restores_the_best(variant: str, base_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    model = for_target(base_path, variant)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    trainer, remember = trainer_for(model, tmp_path, scores=[0.1, 0.9, 0.3, 0.2])
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    best, last = remember.states[1], remember.states[3]
    ours = [k for k in start if "adapter_fusion_layer.a,b,c." in k]
    assert len(ours) == (6 if variant == "scalearn" else 1)
    for key, value in model.state_dict().items():
        if key in ours or key.startswith("heads."):
            assert torch.equal(value, best[key]), key
            assert not torch.equal(best[key], last[key]), key
        else:
            assert torch.equal(value, start[key]), key
    (first, *others) = {id(layer.get_omega()) for layer in layers_of(model)}
    assert bool(others) is (variant == "scalearn"), first


@pytest.mark.parametrize("fuse", [FUSE, Fuse(*NAMES, name="rte")], ids=["a,b,c", "rte"])
def test_a_resumed_run_is_the_same_run(fuse: Fuse, base_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    whole = for_target(base_path, "scalearn_pp", fuse)
    trainer_for(whole, tmp_path)[0].train()
    again = for_target(base_path, "scalearn_pp", fuse)
    trainer_for(again, tmp_path)[0].train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected = whole.state_dict()
    for key, value in again.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert len({id(layer.get_omega()) for layer in layers_of(again, fuse.name)}) == 1


# Bad files


def saved_fusion(model: nn.Module, folder: pathlib.Path, config: Any = "scalearn") -> pathlib.Path:
    trained(model, config)
    model.save_adapter_fusion(str(folder), FUSE, use_safetensors=True)
    return next(folder.glob("*.safetensors"))


def change(file: pathlib.Path, how: str) -> None:
    if how == "corrupted":
        file.write_bytes(b"\x00" * 40)
    elif how == "cut":
        file.write_bytes(file.read_bytes()[:-20])
    elif how == "no config":
        (file.parent / "adapter_fusion_config.json").unlink()
    elif how == "broken config":
        (file.parent / "adapter_fusion_config.json").write_text("{")
    elif how == "no weights":
        file.unlink()
    elif how == "narrow":
        save_file({k: v[..., :7].contiguous() for k, v in load_file(file).items()}, file)
    elif how == "missing":
        tensors = load_file(file)
        tensors.popitem()
        save_file(tensors, file)


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "how", ["corrupted", "cut", "no config", "broken config", "no weights", "narrow", "missing", "nowhere"]
)
def test_bad_files_leave_the_model_as_it_was(
    how: str, known: bool, bert: nn.Module, base_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    file = saved_fusion(bert, tmp_path / "fusion")
    if how == "nowhere":
        shutil.rmtree(tmp_path / "fusion")
    else:
        change(file, how)
    model = with_sources(fresh(base_path), "seq_bn")
    if known:
        trained(model, "scalearn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    fusions = dict(model.adapters_config.fusions)
    with pytest.raises((StorageError, ValueError)) as error:
        model.load_adapter_fusion(str(tmp_path / "fusion"), use_safetensors=True, set_active=True)
    assert "fusion" in str(error.value).lower()
    assert model.adapters_config.fusions == fusions
    assert model.active_adapters is None
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize("config", ["scalearn_pp", "dynamic"])
def test_another_fusion_of_that_name(
    config: str, bert: nn.Module, base_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    saved_fusion(bert, tmp_path / "fusion")
    model = with_sources(fresh(base_path), "seq_bn")
    model.add_adapter_fusion(FUSE, config=config)
    with pytest.raises(ConfigError, match="another fusion with the name 'a,b,c'"):
        model.load_adapter_fusion(str(tmp_path / "fusion"), use_safetensors=True)


def test_sources_that_are_not_on_the_model(bert: nn.Module, base_path: pathlib.Path, tmp_path: pathlib.Path) -> None:
    saved_fusion(bert, tmp_path / "fusion")
    model = fresh(base_path)
    model.add_adapter("a", config=adapters.SeqBnConfig())
    with pytest.raises(ValueError, match="the model has no adapter 'b'"):
        model.load_adapter_fusion(str(tmp_path / "fusion"), use_safetensors=True)
    assert not model.adapters_config.fusions


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("what", ["b", "a,b,c"])
@pytest.mark.parametrize("how", ["corrupted", "no weights", "narrow"])
def test_a_setup_is_loaded_as_a_whole_or_not_at_all(
    how: str, what: str, known: bool, bert: nn.Module, base_path: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    trained(bert, "scalearn")
    bert.save_adapter_setup(str(tmp_path), FUSE, use_safetensors=True)
    change(next((tmp_path / what).glob("*.safetensors")), how)
    other = fresh(base_path)
    if known:
        with_sources(other, "seq_bn")
    before, names = {k: v.clone() for k, v in other.state_dict().items()}, list(other.adapters_config)
    with pytest.raises(StorageError, match=str(tmp_path if known else tmp_path / what)):
        other.load_adapter_setup(str(tmp_path), set_active=True, use_safetensors=True)
    after = other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert (list(other.adapters_config), other.adapters_config.fusions) == (names, {})
    assert other.active_adapters is None


@pytest.mark.parametrize("config", ["scalearn_pp", "dynamic"])
def test_a_setup_knows_the_name_of_its_fusion(
    config: str, bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    fuse = Fuse(*NAMES, name="rte")
    trained(bert, config, fuse=fuse)
    expected = output(bert, batch, fuse)
    bert.save_adapter_setup(str(tmp_path), fuse, use_safetensors=True)
    other = fresh(base_path)
    other.load_adapter_setup(str(tmp_path), set_active=True, use_safetensors=True)
    assert other.active_adapters.name == "rte"
    assert torch.equal(output(other, batch), expected)


def test_stack_with_a_fusion_is_saved_as_a_setup(
    bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    trained(bert, "scalearn_pp")
    bert.add_adapter("language", config=adapters.SeqBnConfig(reduction_factor=4))
    setup = Stack("language", FUSE)
    expected = output(bert, batch, setup)
    bert.save_adapter_setup(str(tmp_path), setup, use_safetensors=True)
    other = fresh(base_path)
    other.load_adapter_setup(str(tmp_path), set_active=True, use_safetensors=True)
    assert torch.equal(output(other, batch), expected)


@pytest.mark.parametrize("how", ["wide", "corrupted", "missing"])
def test_a_source_that_cannot_be_loaded_is_not_half_added(how: str, bert: nn.Module, tmp_path: pathlib.Path) -> None:
    other = BertModel(tiny_config(hidden_size=32))
    adapters.init(other)
    other.add_adapter("a", config=adapters.SeqBnConfig(reduction_factor=4))
    other.save_adapter(str(tmp_path / "a"), "a", use_safetensors=True)
    file = next((tmp_path / "a").glob("*.safetensors"))
    if how == "corrupted":
        file.write_bytes(b"no tensors")
    elif how == "missing":
        file.unlink()
    before = list(bert.state_dict())
    expected = StorageError if how == "wide" else (OSError, ValueError)
    with pytest.raises(expected) as error:
        bert.load_adapter(str(tmp_path / "a"), use_safetensors=True, set_active=True)
    if how == "wide":
        assert "of another size: size mismatch for" in str(error.value)
    assert list(bert.state_dict()) == before
    assert not list(bert.adapters_config)
    assert bert.active_adapters is None


def test_a_host_without_this_package_raises(
    bert: nn.Module, base_path: pathlib.Path, tmp_path: pathlib.Path, python: Callable[[str], str]
) -> None:
    """It would build its own kind of fusion and compute something else."""
    with_sources(bert, "seq_bn")
    trained(bert, "scalearn_pp")
    bert.save_adapter_setup(str(tmp_path / "setup"), FUSE)
    bert.save_pretrained(str(tmp_path / "whole"))
    bert.delete_adapter_fusion(FUSE)
    trained(bert, ScaLearnConfig(init_scale=1.0))
    bert.save_pretrained(str(tmp_path / "whole with options"))
    printed = python(
        f"""
        import adapters
        from adapters import BertAdapterModel
        from transformers import BertModel

        def attempt(call, *arguments, **options):
            try:
                call(*arguments, **options)
            except Exception as error:
                print(type(error).__name__)
            else:
                print("no error")

        def model():
            model = BertModel.from_pretrained({str(base_path)!r})
            adapters.init(model)
            for name in "abc":
                model.add_adapter(name, config="seq_bn[reduction_factor=4]")
            return model

        attempt(model().load_adapter_setup, "setup", set_active=True)
        attempt(model().load_adapter_fusion, "setup/a,b,c")
        attempt(BertAdapterModel.from_pretrained, "whole")
        attempt(BertAdapterModel.from_pretrained, "whole with options")
        """
    )
    assert printed.split() == ["TypeError", "TypeError", "AttributeError", "AttributeError"]


@pytest.mark.parametrize("config", ["scalearn", "scalearn_uniform_pp"])
def test_files_with_the_options_of_the_host(
    config: str, bert: nn.Module, base_path: pathlib.Path, batch: dict[str, Tensor], tmp_path: pathlib.Path
) -> None:
    """Version 0.1 wrote them into its files."""
    trained(bert, config)
    expected = output(bert, batch, FUSE)
    bert.save_adapter_setup(str(tmp_path / "setup"), FUSE)
    path = tmp_path / "setup" / "a,b,c" / "adapter_fusion_config.json"
    saved = json.loads(path.read_text())
    saved["config"] |= {
        "key": False, "query": False, "value": False, "query_before_ln": False, "residual_before": False,
        "temperature": False, "value_before_softmax": False, "value_initialized": "", "dropout_prob": None,
    }  # fmt: skip
    path.write_text(json.dumps(saved))
    other = fresh(base_path)
    other.load_adapter_setup(str(tmp_path / "setup"), set_active=True)
    assert torch.equal(output(other, batch), expected)
