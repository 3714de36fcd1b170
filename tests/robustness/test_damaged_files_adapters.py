"""Damaged, incomplete and foreign folders: each ends in a clear error with the model unchanged, or in what it says.

`PAL_ADAPTERS_EXAMPLES=5000` tries more of them.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

adapters = pytest.importorskip("adapters")

from adapters import utils as host_files  # noqa: E402
from transformers import BertConfig, BertModel  # noqa: E402

import pal_adapters as pa  # noqa: E402
from tests.robustness.model_state import changes, state  # noqa: E402

EXAMPLES = int(os.environ.get("PAL_ADAPTERS_EXAMPLES", "200"))
ADAPTER_FILES = (host_files.CONFIG_NAME, host_files.SAFE_WEIGHTS_NAME, host_files.WEIGHTS_NAME)
FUSION_FILES = (
    host_files.ADAPTERFUSION_CONFIG_NAME,
    host_files.SAFE_ADAPTERFUSION_WEIGHTS_NAME,
    host_files.ADAPTERFUSION_WEIGHTS_NAME,
)
IDS = torch.arange(3, 31).reshape(4, 7)
CONFIGS: dict[str, Callable[[], Any]] = {
    "pal": lambda: pa.PALConfig(num_heads=2, init_weights="bert"),
    "pal and base": lambda: pa.PALConfig(hidden_size=12, num_heads=2, train_base=True),
    "low_rank": lambda: pa.LowRankConfig(hidden_size=3),
    "lhuc": lambda: pa.LHUCConfig(),
    "top_attention": lambda: pa.TopAttentionConfig(hidden_size=12, num_layers=2, num_heads=2),
    "parallel_houlsby": lambda: pa.ParallelHoulsbyConfig(hidden_size=4),
    "ca_mtl": lambda: pa.CAMTLConfig(tasks=2, max_length=8),
    "union": lambda: adapters.ConfigUnion(pa.PALConfig(hidden_size=12, num_heads=2), adapters.LoRAConfig(r=2)),
}


def _base(**changed: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(**{**sizes, "intermediate_size": 32, **changed})).eval()
    adapters.init(model)
    return model


@functools.cache
def _model() -> nn.Module:
    """The model that all examples load into: what is rejected leaves it as it was, and what is loaded is deleted."""
    model = _base()
    for name in ("a", "b"):
        model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
    model.add_adapter("other", config=pa.PALConfig(hidden_size=6, num_heads=2, init_weights="bert"))
    model.set_active_adapters("other")
    return model


@functools.cache
def _saved(kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A whole file: its config and its tensors."""
    model = _base()
    with tempfile.TemporaryDirectory() as folder:
        if kind == "scalearn":
            for name in ("a", "b"):
                model.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
            model.add_adapter_fusion(adapters.composition.Fuse("a", "b"), config="scalearn")
            model.save_adapter_fusion(folder, "a,b", use_safetensors=True)
        else:
            model.add_adapter("t", config=CONFIGS[kind]())
            model.save_adapter(folder, "t", use_safetensors=True)
        (config,) = pathlib.Path(folder).glob("*.json")
        (weights,) = pathlib.Path(folder).glob("*.safetensors")
        return json.loads(config.read_text()), load_file(weights)


def _write(folder: pathlib.Path, kind: str, config: Any, tensors: dict[str, Any], safe: bool) -> None:
    names = FUSION_FILES if kind == "scalearn" else ADAPTER_FILES
    (folder / names[0]).write_text(config if isinstance(config, str) else json.dumps(config))
    if safe:
        save_file({k: v.clone() for k, v in tensors.items()}, folder / names[1])
    else:
        torch.save(tensors, folder / names[2])


def _weights_file(folder: pathlib.Path) -> pathlib.Path:
    (found,) = [path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin")]
    return found


# Damages of the tensors: each gives the tensors, and whether they may still be loaded.

Damage = Callable[[dict[str, Tensor], list[str], float], tuple[dict[str, Any], bool]]


def _each(change: Callable[[Tensor], Any], allowed: bool = False) -> Damage:
    def damage(tensors: dict[str, Tensor], names: list[str], _: float) -> tuple[dict[str, Any], bool]:
        return {k: change(v) if k in names else v for k, v in tensors.items()}, allowed

    return damage


def _one_value(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[-1] = value
        return tensor

    return change


TENSORS: dict[str, Damage] = {
    "none": lambda tensors, names, part: (dict(tensors), True),
    "missing": lambda tensors, names, part: ({k: v for k, v in tensors.items() if k not in names}, False),
    "extra": lambda tensors, names, part: ({**tensors, f"{names[0]}.more": torch.zeros(2)}, False),
    "foreign": lambda tensors, names, part: ({**tensors, "encoder.layer.0.bias_of_nothing": torch.zeros(2)}, False),
    "another block": lambda tensors, names, part: (
        {**tensors, **{k.replace("layer.1.", "layer.7."): v for k, v in tensors.items() if "layer.1." in k}},
        not any("layer.1." in k for k in tensors),
    ),
    "renamed": lambda tensors, names, part: (
        {(f"x{k}" if k in names else k): v for k, v in tensors.items()}, False,
    ),
    "none at all": lambda tensors, names, part: ({}, False),
    "longer": _each(lambda t: torch.cat([t, t[:1]])),
    "one more dimension": _each(lambda t: t[None]),
    "empty": _each(lambda t: t[:0]),
    "integers": _each(lambda t: t.long()),
    "booleans": _each(lambda t: t.bool()),
    "complex": _each(lambda t: t.to(torch.complex64)),
    "half precision": _each(lambda t: t.to(torch.bfloat16), allowed=True),
    "double precision": _each(lambda t: t.double(), allowed=True),
    "too large for the model": _each(lambda t: t.double().clone().fill_(1e300)),
    "nan": _each(_one_value(math.nan)),
    "inf": _each(_one_value(-math.inf)),
}  # fmt: skip

FILES: dict[str, Callable[[bytes, float], bytes]] = {
    "cut": lambda data, part: data[: int(part * (len(data) - 1))],
    "no tensors": lambda data, part: b"no tensors",
    "empty file": lambda data, part: b"",
}

JSON: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cut": lambda c: json.dumps(c)[:-7],
    "empty": lambda c: "",
    "a list": lambda c: [c],
    "no config": lambda c: {k: v for k, v in c.items() if k != "config"},
    "config is a number": lambda c: {**c, "config": 3},
    "config is null": lambda c: {**c, "config": None},
    "config is empty": lambda c: {**c, "config": {}},
    "config is no preset": lambda c: {**c, "config": ""},
    "version of another type": lambda c: {**c, "version": None},
    "no name": lambda c: {k: v for k, v in c.items() if k != "name"},
    "name of a path": lambda c: {**c, "name": "../evil"},
    "empty name": lambda c: {**c, "name": ""},
    "name of another type": lambda c: {**c, "name": ["t"]},
    "another model": lambda c: {**c, "model_type": "roberta"},
    "another width": lambda c: {**c, "hidden_size": 32},
    "unknown method": lambda c: {**c, "config": {**c["config"], "architecture": "no such method"}},
    "another method": lambda c: {**c, "config": {"architecture": "low_rank", "hidden_size": 5}},
    "an option of another method": lambda c: {**c, "config": {**c["config"], "reduction_factor": 4}},
    "unknown option": lambda c: {**c, "config": {**c["config"], "hiden_size": 4}},
    "option of a wrong type": lambda c: {**c, "config": {**c["config"], "leave_out": "1", "variant": 7}},
    "chosen of a wrong type": lambda c: {**c, "config": {**c["config"], "chosen": 3, "init_scale": "many"}},
    "chosen that is not open": lambda c: {**c, "config": {**c["config"], "chosen": {"leave_out": [0]}, "fixed": 3}},
    "all blocks left out": lambda c: {**c, "config": {**c["config"], "leave_out": [0, 1], "variant": "none"}},
}
SAME_FOR_A_UNION = {  # a union has no options of its own, and the host ignores what it does not know there
    "an option of another method", "unknown option", "option of a wrong type", "chosen of a wrong type",
    "chosen that is not open", "all blocks left out",
}  # fmt: skip


def _load(folder: pathlib.Path, kind: str, safe: bool) -> str:
    if kind == "scalearn":
        _model().load_adapter_fusion(str(folder), use_safetensors=safe, set_active=True)
        return "a,b"
    return str(_model().load_adapter(str(folder), use_safetensors=safe, set_active=True))


def _remove(kind: str) -> None:
    model = _model()
    model.delete_adapter_fusion("a,b") if kind == "scalearn" else model.delete_adapter("t")
    model.set_active_adapters("other")


def _rejected(folder: pathlib.Path, kind: str, safe: bool) -> bool:
    """Whether a folder is rejected; checks that nothing changed then, and that the file is in the model otherwise."""
    model = _model()
    before = state(model)
    with torch.no_grad():
        output = model(IDS).last_hidden_state
    rejection = _error_of(lambda: _load(folder, kind, safe))
    if rejection is None:
        return False
    assert len(str(rejection)) > 20
    assert not changes(before, state(model))
    with torch.no_grad():
        assert torch.equal(model(IDS).last_hidden_state, output)
    return True


def _error_of(call: Callable[[], Any]) -> pa.PalAdaptersError | None:
    try:
        call()
    except pa.PalAdaptersError as error:
        return error
    return None


def _check_loaded(tensors: dict[str, Tensor], kind: str) -> None:
    own = _model().state_dict()
    for name, value in tensors.items():
        assert torch.equal(own[name], value.to(own[name].dtype)), name
    with torch.no_grad():
        arguments = {"task_ids": [0, 1, 0, 1]} if kind == "ca_mtl" else {}
        assert _model()(IDS, **arguments).last_hidden_state.isfinite().all()


KINDS = st.sampled_from([*CONFIGS, "scalearn"])
PROFILE = settings(
    max_examples=EXAMPLES, deadline=None, derandomize=EXAMPLES <= 1000, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip


@PROFILE
@given(KINDS, st.sampled_from(sorted(TENSORS)), st.booleans(), st.data())
def test_tensors(kind: str, damage: str, safe: bool, data: st.DataObject) -> None:
    config, whole = _saved(kind)
    names = data.draw(st.lists(st.sampled_from(sorted(whole)), min_size=1, max_size=3, unique=True))
    tensors, allowed = TENSORS[damage](whole, names, 0.5)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        _write(path, kind, config, tensors, safe)
        rejected = _rejected(path, kind, safe)
        if damage == "missing" and set(names) == {name for name in whole if name.startswith("pooler.")}:
            allowed = True  # classes of a model may lack the pooler
        assert rejected is not allowed
        if not rejected:
            _check_loaded(tensors, kind)
            _remove(kind)


@PROFILE
@given(KINDS, st.sampled_from(sorted(FILES)), st.booleans(), st.floats(0, 1))
def test_files(kind: str, damage: str, safe: bool, part: float) -> None:
    config, tensors = _saved(kind)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder)
        _write(path, kind, config, tensors, safe)
        file = _weights_file(path)
        file.write_bytes(FILES[damage](file.read_bytes(), part))
        assert _rejected(path, kind, safe)


@pytest.mark.parametrize("damage", sorted(JSON))
@pytest.mark.parametrize("kind", [*CONFIGS, "scalearn"])
def test_configs(kind: str, damage: str, tmp_path: pathlib.Path) -> None:
    config, tensors = _saved(kind)
    _write(tmp_path, kind, JSON[damage](copy.deepcopy(config)), tensors, True)
    rejected = _rejected(tmp_path, kind, True)
    if not rejected:
        _remove(kind)
    assert rejected or (kind == "union" and damage in SAME_FOR_A_UNION)


@pytest.mark.parametrize("known", [False, True], ids=["new", "over another"])
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_another_method_under_the_name(kind: str, known: bool, tmp_path: pathlib.Path) -> None:
    """A file is never loaded over an adapter that computes something else."""
    config, tensors = _saved(kind)
    _write(tmp_path, kind, config, tensors, True)
    model = _model()
    other = pa.LowRankConfig(hidden_size=2) if known else adapters.SeqBnConfig()
    model.add_adapter("t", config=other)
    try:
        assert _rejected(tmp_path, kind, True)
    finally:
        _remove(kind)


@pytest.mark.parametrize("changed", [{"num_hidden_layers": 1}, {"num_hidden_layers": 3}, {"hidden_size": 32}], ids=str)
@pytest.mark.parametrize("kind", list(CONFIGS))
def test_another_base(kind: str, changed: dict[str, int], tmp_path: pathlib.Path) -> None:
    config, tensors = _saved(kind)
    _write(tmp_path, kind, config, tensors, True)
    model = _base(**changed)
    before = state(model)
    with pytest.raises(pa.PalAdaptersError):
        model.load_adapter(str(tmp_path), use_safetensors=True)
    assert not changes(before, state(model))


SETUPS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "cut": lambda s: json.dumps(s)[:-9],
    "empty": lambda s: "",
    "a list": lambda s: [s],
    "no setup": lambda s: {},
    "another class": lambda s: {**s, "adapter_setup": {**s["adapter_setup"], "type": "ABC"}},
    "a function": lambda s: {**s, "adapter_setup": {**s["adapter_setup"], "type": "parse_composition"}},
    "a class inside": lambda s: {**s, "adapter_setup": {"type": "Stack", "children": [{"type": "sys"}]}},
    "a number as a name": lambda s: {
        **s, "adapter_setup": {"type": "Stack", "children": [{"type": "single", "children": [3]}]},
    },
    "a path": lambda s: {
        **s, "adapter_setup": {"type": "Stack", "children": [{"type": "single", "children": ["../a"]}]},
    },
    "a path of a fusion": lambda s: {**s, "adapter_setup": {**s["adapter_setup"], "kwargs": {"name": "/tmp"}}},
    "a path of a head": lambda s: {**s, "head_setup": ["../../a"]},
    "an option that does not exist": lambda s: {**s, "adapter_setup": {**s["adapter_setup"], "kwargs": {"x": 1}}},
    "an adapter that is not there": lambda s: {
        **s, "adapter_setup": {"type": "Stack", "children": [{"type": "single", "children": ["nothing"]}]},
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", SETUPS)
def test_setups(damage: str, tmp_path: pathlib.Path) -> None:
    source = _base()
    for name in ("c", "d"):
        source.add_adapter(name, config=pa.PALConfig(hidden_size=6, num_heads=2))
    fuse = adapters.composition.Fuse("c", "d")
    source.add_adapter_fusion(fuse, config="scalearn")
    source.save_adapter_setup(str(tmp_path), fuse)
    path = tmp_path / host_files.SETUP_CONFIG_NAME
    whole = path.read_text()
    damaged = SETUPS[damage](json.loads(whole))
    path.write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
    model = _base()
    before = state(model)
    with pytest.raises(pa.PalAdaptersError, match=str(tmp_path)):
        model.load_adapter_setup(str(tmp_path), set_active=True)
    assert not changes(before, state(model))
    path.write_text(whole)
    model.load_adapter_setup(str(tmp_path), set_active=True)
    assert model.active_adapters == fuse


@pytest.mark.parametrize("safe", [True, False])
def test_sources_of_a_setup(safe: bool, tmp_path: pathlib.Path) -> None:
    """The host alone would leave what a source lacks at random values."""
    fuse = adapters.composition.Fuse("a", "b")
    source = _base()
    for name in ("a", "b"):
        source.add_adapter(name, config=adapters.SeqBnConfig(reduction_factor=4))
    source.add_adapter_fusion(fuse, config="scalearn")
    source.save_adapter_setup(str(tmp_path), fuse, use_safetensors=safe)
    (file,) = [path for path in (tmp_path / "b").iterdir() if path.suffix in (".safetensors", ".bin")]
    whole = load_file(file) if safe else torch.load(file, weights_only=True)
    half = dict(sorted(whole.items())[::2])
    save_file(half, file) if safe else torch.save(half, file)
    model = _base()
    before = state(model)
    with pytest.raises(pa.StorageError, match=f"{tmp_path}/b cannot be loaded: .* missing"):
        model.load_adapter_setup(str(tmp_path), use_safetensors=safe)
    assert not changes(before, state(model))


@pytest.mark.parametrize("kind", [*CONFIGS, "scalearn"])
def test_every_tensor_is_needed(kind: str, tmp_path: pathlib.Path) -> None:
    config, tensors = _saved(kind)
    pooler = {name for name in tensors if name.startswith("pooler.")}  # which classes of a model may lack
    for name in tensors.keys() - pooler:
        _write(tmp_path, kind, config, {k: v for k, v in tensors.items() if k != name}, True)
        with pytest.raises(pa.PalAdaptersError, match=f"{name} is missing"):
            _load(tmp_path, kind, True)


def test_what_was_rejected_can_be_loaded_afterwards(tmp_path: pathlib.Path) -> None:
    for kind in [*CONFIGS, "scalearn"]:
        config, tensors = _saved(kind)
        folder = tmp_path / kind
        folder.mkdir()
        _write(folder, kind, config, dict(list(tensors.items())[1:]), True)
        assert _rejected(folder, kind, True)
        _write(folder, kind, config, tensors, True)
        _load(folder, kind, True)
        _check_loaded(tensors, kind)
        _remove(kind)
