"""A call that is rejected leaves the model as it was, and the next correct call works."""

from __future__ import annotations

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

import pal_adapters as pa

from . import cases
from .unchanged import rejected

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _edit_weights(folder: pathlib.Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(edit(load_file(folder / WEIGHTS)), folder / WEIGHTS)


def _last(tensors: dict[str, Tensor]) -> str:
    """The adapter's tensor that a loader reaches last."""
    return [name for name in sorted(tensors) if "_units" in name or "_shared" in name][-1]


def _half(folder: pathlib.Path) -> None:
    _edit_weights(folder, lambda t: {name: t[name] for name in sorted(t)[::2]})


def _one_missing(folder: pathlib.Path) -> None:
    _edit_weights(folder, lambda t: {name: value for name, value in t.items() if name != _last(t)})


def _one_more(folder: pathlib.Path) -> None:
    _edit_weights(folder, lambda t: {**t, _last(t) + "_more": t[_last(t)].clone()})


def _wrong_shape(folder: pathlib.Path) -> None:
    _edit_weights(folder, lambda t: {**t, _last(t): torch.cat([t[_last(t)], t[_last(t)][:1]])})


def _integers(folder: pathlib.Path) -> None:
    _edit_weights(folder, lambda t: {**t, _last(t): t[_last(t)].to(torch.int8)})


def _not_finite(folder: pathlib.Path) -> None:
    _edit_weights(folder, lambda t: {**t, _last(t): torch.full_like(t[_last(t)], float("nan"))})


def _too_large(folder: pathlib.Path) -> None:
    """Finite in the file, and infinite in the precision of the model."""
    _edit_weights(folder, lambda t: {**t, _last(t): torch.full_like(t[_last(t)], 1e300, dtype=torch.float64)})


def _cut(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def _empty(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def _no_weights(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).unlink()


def _fewer_blocks(folder: pathlib.Path) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "layers_to_transform": [0, 1]}))


DAMAGES = [_half, _one_missing, _one_more, _wrong_shape, _integers, _not_finite, _too_large, _cut, _empty, _no_weights]


def _saved(method: str, folder: pathlib.Path, **changes: Any) -> pathlib.Path:
    cases.peft_model(method, adapters=("new",), **changes).save_pretrained(folder)
    return folder / "new"


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
@pytest.mark.parametrize("method", ["pal", "houlsby"])
@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_a_damaged_folder(
    method: str, joint: bool, damage: Callable[[pathlib.Path], None], tmp_path: pathlib.Path
) -> None:
    _check_damage(method, damage, tmp_path, train_base=joint)


def test_damage_for_every_method(method: str, tmp_path: pathlib.Path) -> None:
    if not method.startswith("top"):
        _check_damage(method, _fewer_blocks, tmp_path / "blocks")
    _check_damage(method, _one_missing, tmp_path / "missing")
    _check_damage(method, _wrong_shape, tmp_path / "shape")


def _check_damage(method: str, damage: Callable[[pathlib.Path], None], tmp_path: pathlib.Path, **changes: Any) -> None:
    given = cases.inputs()
    whole = _saved(method, tmp_path, **changes)
    expected = cases.run(cases.peft_model(method, adapters=("new",), **changes), "new", given)
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    damage(folder)
    # Onto a plain model.
    base = cases.bert().train()
    with rejected(base):
        PeftModel.from_pretrained(base, folder, adapter_name="new")
    assert torch.equal(cases.run(PeftModel.from_pretrained(base, whole, adapter_name="new"), "new", given), expected)
    # Beside another adapter, and over one of the same name.
    for name in ("old", "new"):
        for trainable in (False, True):
            model = cases.peft_model(method, adapters=(name,), **(changes if name == "new" else {}))
            model.train()
            model.get_base_model().bert.embeddings.eval()
            with rejected(model):
                model.load_adapter(folder, "new", is_trainable=trainable)
            assert list(model.peft_config) == [name]
        if name == "new" or not changes.get("train_base"):
            model.load_adapter(whole, "new")
            assert torch.equal(cases.run(model, "new", given), expected)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
@pytest.mark.parametrize("joint", [False, True], ids=["frozen", "joint"])
def test_a_damaged_folder_in_transformers(
    joint: bool, damage: Callable[[pathlib.Path], None], tmp_path: pathlib.Path
) -> None:
    """The same through transformers' own `load_adapter`."""
    given = cases.inputs()
    whole = _saved("pal", tmp_path, task_type=None, train_base=joint)
    expected = cases.run(cases.peft_model("pal", adapters=("new",), task_type=None, train_base=joint), "new", given)
    folder = tmp_path / "damaged"
    shutil.copytree(whole, folder)
    damage(folder)
    base = cases.bert().train()
    with rejected(base):
        base.load_adapter(str(folder), "new")
    base.load_adapter(str(whole), "new")
    with torch.no_grad():
        assert torch.equal(base.eval()(**given).logits, expected)


def _deep(folder: pathlib.Path) -> None:
    (folder / CONFIG).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)


def _folder_for_weights(folder: pathlib.Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def _called_lora(folder: pathlib.Path) -> None:
    """Config values with which PEFT would load a LoRA with random weights."""
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), "peft_type": "LORA", "target_modules": ["query"]}))


@pytest.mark.parametrize("door", ["from_pretrained", "beside ours", "beside LoRA", "transformers"])
@pytest.mark.parametrize("damage", [_deep, _no_weights, _folder_for_weights, _called_lora], ids=lambda d: d.__name__)
def test_files_that_do_not_make_an_adapter(
    damage: Callable[[pathlib.Path], None], door: str, tmp_path: pathlib.Path
) -> None:
    folder = _saved("pal", tmp_path)
    damage(folder)
    beside = {
        "beside ours": lambda: cases.peft_model("pal", adapters=("old",)),
        "beside LoRA": lambda: get_peft_model(cases.bert(), LoraConfig(target_modules=["query"])),
    }
    model: Any = beside.get(door, cases.bert)()
    with rejected(model, error=pa.StorageError, match=r"adapter_(config|model)"):
        if door == "from_pretrained":
            PeftModel.from_pretrained(model, folder, adapter_name="new")
        else:
            model.load_adapter(str(folder), "new")


def _base_weights(folder: pathlib.Path) -> None:
    """Which transformers 5 would load into the base model."""
    name = "base_model.model.bert.encoder.layer.0.output.dense.weight"
    _edit_weights(folder, lambda t: {**t, name: torch.ones_like(cases.bert().state_dict()[name[17:]])})


@pytest.mark.parametrize("damage", [_base_weights, _one_missing], ids=lambda d: d.__name__)
def test_a_repository_in_transformers(
    damage: Callable[[pathlib.Path], None], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub is the local cache here."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("transformers.utils.hub.is_offline_mode", lambda: True)
    whole = _saved("pal", tmp_path, task_type=None)
    repository = tmp_path / "hub" / "models--user--adapters"
    for commit, damaged in (("a" * 40, True), ("b" * 40, False)):
        shutil.copytree(whole, repository / "snapshots" / commit)
        if damaged:
            damage(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    base = cases.bert()
    with rejected(base, error=pa.StorageError):
        base.load_adapter("user/adapters", "new", adapter_kwargs={"cache_dir": str(tmp_path / "hub")})
    (repository / "refs" / "main").write_text("b" * 40)
    base.load_adapter("user/adapters", "new", adapter_kwargs={"cache_dir": str(tmp_path / "hub")})
    expected = cases.run(cases.peft_model("pal", adapters=("new",), task_type=None), "new", cases.inputs())
    with torch.no_grad():
        assert torch.equal(base.eval()(**cases.inputs()).logits, expected)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_a_base_of_another_depth(method: str, layers: int, tmp_path: pathlib.Path) -> None:
    folder = _saved(method, tmp_path)
    base = cases.bert(num_hidden_layers=layers)
    with rejected(base, error=pa.StorageError, match="do not fit adapter 'new'"):
        PeftModel.from_pretrained(base, folder, adapter_name="new")


def test_a_base_of_another_width(method: str, tmp_path: pathlib.Path) -> None:
    folder = _saved(method, tmp_path)
    base = cases.bert(hidden_size=36)
    with rejected(base, error=pa.PalAdaptersError):
        PeftModel.from_pretrained(base, folder, adapter_name="new")


@pytest.mark.parametrize("door", ["from_pretrained", "load_adapter"])
def test_a_base_of_another_type(method: str, door: str, tmp_path: pathlib.Path) -> None:
    """Its tensors have the same names and shapes."""
    sizes = {
        key: getattr(cases.bert_config(), key) for key in ("hidden_size", "num_hidden_layers", "intermediate_size")
    }
    settings = transformers.ElectraConfig(vocab_size=40, num_attention_heads=4, embedding_size=24, **sizes)
    base = transformers.ElectraModel(settings)
    one = cases.bert().bert
    get_peft_model(one, cases.config(method), adapter_name="new").save_pretrained(tmp_path / "bare")
    folder = tmp_path / "bare" / "new"
    with rejected(base, error=pa.ConfigError, match="for a base model of type 'bert', and this one is of type"):
        if door == "from_pretrained":
            PeftModel.from_pretrained(base, folder, adapter_name="new")
        else:
            base.load_adapter(str(folder), "new")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_type": None}))
    PeftModel.from_pretrained(base, folder, adapter_name="new")


def test_one_config_for_two_types_of_models(method: str) -> None:
    config = cases.config(method)
    get_peft_model(cases.bert().bert, config)
    assert config.base_model_type == "bert"
    get_peft_model(cases.roberta().roberta, config)
    assert config.base_model_type == "roberta"


def _not_a_language_model(method: str) -> tuple[Any, Any]:
    return cases.bert().bert, cases.config(method, task_type="SEQ_2_SEQ_LM")


def _no_block(method: str) -> tuple[Any, Any]:
    return cases.bert(), cases.config(method, task_type="SEQ_CLS", exclude_modules=r".*")


def _no_module_of_that_name(method: str) -> tuple[Any, Any]:
    return cases.bert(), cases.config(method, task_type="SEQ_CLS", layers_to_transform=[17])


@pytest.mark.parametrize("wrong", [_not_a_language_model, _no_block, _no_module_of_that_name])
def test_a_wrong_config(method: str, wrong: Callable[[str], tuple[Any, Any]]) -> None:
    base, config = wrong(method)
    base.train()
    with rejected(base):
        get_peft_model(base, config)
    if wrong is not _not_a_language_model:
        model = cases.peft_model(method, adapters=("old",))
        config = wrong(method)[1]
        with rejected(model, config, run=lambda: cases.run(model, "old", cases.inputs())):
            model.add_adapter("new", config)


@pytest.mark.parametrize("name", ["__base__", "a.b", "", "keys", "pop"])
@pytest.mark.filterwarnings("ignore:Adapter name .* should not be contained:UserWarning")
def test_names_that_are_taken(method: str, name: Any, tmp_path: pathlib.Path) -> None:
    base = cases.bert()
    with rejected(base, error=pa.ConfigError, match="is not allowed"):
        get_peft_model(base, cases.config(method, task_type="SEQ_CLS"), adapter_name=name)
    model = cases.peft_model(method, adapters=("old",))
    with rejected(model, error=pa.ConfigError, match="is not allowed"):
        model.add_adapter(name, cases.config(method, task_type="SEQ_CLS"))
    folder = _saved(method, tmp_path)
    with rejected(model, error=pa.ConfigError, match="is not allowed"):
        model.load_adapter(folder, name)
    with rejected(base, error=pa.ConfigError, match="is not allowed"):
        PeftModel.from_pretrained(base, folder, adapter_name=name)


def test_activating_what_is_not_there(method: str) -> None:
    model = cases.peft_model(method, adapters=("old",))
    for activate in (model.set_adapter, model.base_model.set_adapter):
        for names in ("new", ["old", "new"]):
            with rejected(model, run=lambda: model(**cases.inputs()).logits.detach()):
                activate(names)


def test_a_peft_that_transformers_rejects(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers 5.24's own `add_adapter` asks for a peft that is not released: its error, nothing changed."""
    base, config = cases.bert(), cases.config("pal")
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    with rejected(base, config, error=ValueError, match=r"PEFT.*99\.0"):
        base.add_adapter(config, "new")


def test_an_interrupted_load(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _saved("pal", tmp_path)
    model = cases.peft_model("pal", adapters=("old",))

    def interrupt(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, rejected(model, error=KeyboardInterrupt):
        patch.setattr(type(model), "load_state_dict", interrupt)
        model.load_adapter(folder, "new")
    model.load_adapter(folder, "new")
    assert model.peft_config["new"].inference_mode
