"""Folders of `TaskHeads` in which something is damaged: an error that names the place, or the right result.

`PAL_ADAPTERS_FUZZ=1000` runs that many random damages per host and way of reading instead of the default.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import pal_adapters
from pal_adapters.multitask import HeadConfig, StorageError, TaskHeads

HOSTS = ["none"]
HOSTS += [h for h, config in (("adapters", "PALConfig"), ("peft", "PALPeftConfig")) if config in pal_adapters.__all__]
EXAMPLES = int(os.environ.get("PAL_ADAPTERS_FUZZ", "25"))
IDS = torch.arange(3, 31).reshape(4, 7)


def base() -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertModel(BertConfig(**sizes, intermediate_size=16, max_position_embeddings=16)).eval()


def heads_of(host: str, *, trained: bool = False) -> TaskHeads:
    model = base()
    adapter: Any = "a"
    if host == "adapters":
        import adapters
        from adapters.composition import Fuse, Stack

        adapters.init(model)
        model.add_adapter("a", config=pal_adapters.PALConfig(hidden_size=6, num_heads=2))
        for name in ("b", "c"):
            model.add_adapter(name, config="seq_bn[reduction_factor=4]")
        model.add_adapter_fusion(Fuse("b", "c", name="f"))
        adapter = Stack("a", "b")
    elif host == "peft":
        import peft

        config = pal_adapters.PALPeftConfig(hidden_size=6, num_heads=2)
        model = peft.get_peft_model(model, config, adapter_name="a")
        model.add_adapter("default", pal_adapters.PALPeftConfig(hidden_size=6, num_heads=2))
    else:
        adapter = None
    heads = TaskHeads(model)
    heads.add("t", HeadConfig("single_label", 2, label_names=("no", "yes")), adapter=adapter)
    heads.add("u", HeadConfig("regression"), adapter=Fuse("b", "c", name="f") if host == "adapters" else adapter)
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    heads.prepare_training(base=trained)
    return heads.eval()


def logits(model: TaskHeads) -> dict[str, Tensor]:
    with torch.no_grad():
        return {task: model(task_ids=task, input_ids=IDS).logits[task] for task in model.tasks}


@pytest.fixture(scope="module", params=HOSTS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    place = tmp_path_factory.mktemp(f"saved_{request.param}")
    heads_of(request.param).save_pretrained(place / "frozen", checkpoint=True)
    heads_of(request.param, trained=True).save_pretrained(place / "trained", checkpoint=True)
    return request.param, place


class State:
    """What a rejected folder may not change."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.before = self.take()
        self.values = {name: value.clone() for name, value in model.state_dict().items()}

    def take(self) -> list[Any]:
        return [
            [(name, type(module), module.training) for name, module in self.model.named_modules()],
            [(name, id(tensor), tensor.requires_grad) for name, tensor in self.model.named_parameters()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in self.model.modules()],
            sorted(getattr(getattr(self.model, "config", None), "__dict__", {})),
        ]

    def check(self) -> None:
        assert self.take() == self.before
        assert all(torch.equal(value, self.values[name]) for name, value in self.model.state_dict().items())


# Damages of a file


def cut(draw: Any, path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: draw(st.integers(0, max(len(data) - 1, 0)))])


def flip(draw: Any, path: Path) -> None:
    data = bytearray(path.read_bytes())
    for _ in range(draw(st.integers(1, 4))):
        # Near the beginning, where the headers are, as often as anywhere.
        place = draw(st.one_of(st.integers(0, min(len(data), 200) - 1), st.integers(0, len(data) - 1)))
        data[place] = draw(st.integers(0, 255))
    path.write_bytes(bytes(data))


def remove(draw: Any, path: Path) -> None:
    path.unlink()


def link(draw: Any, path: Path) -> None:
    outside = path.parents[1] / "outside"
    shutil.copy(path, outside)
    path.unlink()
    path.symlink_to(outside)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["a", "b", "../evil", "a/../../evil", "os", "system", "x" * 300, "rte\0", "Stack", "Parallel"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def places_in(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for key in value if isinstance(value, dict) else range(len(value)):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            found += places_in(value[key])
    return found


def edit(draw: Any, path: Path) -> None:
    whole = json.loads(path.read_text())
    holder, key = draw(st.sampled_from(places_in(whole)))
    what = draw(st.sampled_from(["value", "remove", "rename", "more"]))
    if what == "value":
        holder[key] = draw(JSON)
    elif what == "remove":
        del holder[key]
    elif isinstance(holder, list):
        holder.append(draw(JSON))
    elif what == "rename":
        holder[draw(st.text(max_size=5))] = holder.pop(key)
    else:
        holder[draw(st.text(max_size=5))] = draw(JSON)
    path.write_text(json.dumps(whole))


def edit_tensors(draw: Any, path: Path) -> None:
    tensors = load_file(path)
    if not tensors:
        tensors["new"] = torch.zeros(1)
        save_file(tensors, path)
        return
    name = draw(st.sampled_from(sorted(tensors)))
    what = draw(st.sampled_from(["nan", "inf", "drop", "rename", "shape", "kind", "more", "wider"]))
    value = tensors[name]
    if what in ("nan", "inf") and value.is_floating_point():
        value.flatten()[draw(st.integers(0, value.numel() - 1))] = float(what)
    elif what == "drop":
        del tensors[name]
    elif what == "rename":
        tensors[f"{name}x"] = tensors.pop(name)
    elif what == "shape":
        tensors[name] = value.flatten()[:-1].clone() if value.numel() > 1 else torch.zeros(3)
    elif what == "kind":
        tensors[name] = torch.zeros(value.shape, dtype=torch.bool)
    elif what == "more":
        tensors["new"] = torch.zeros(2)
    else:
        tensors[name] = value.double() if value.is_floating_point() else value
    save_file(tensors, path)


DAMAGES: dict[str, list[Callable[[Any, Path], None]]] = {
    ".json": [cut, flip, remove, link, edit, edit, edit],
    ".safetensors": [cut, flip, remove, link, edit_tensors, edit_tensors, edit_tensors],
}


def damage(draw: Any, folder: Path) -> Path:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.suffix in DAMAGES)
    description = folder / "task_heads.json"  # it decides what happens with all the others
    path = draw(st.one_of(st.just(description), st.sampled_from(files)))
    draw(st.sampled_from(DAMAGES[path.suffix]))(draw, path)
    return path


def attempt(read: Callable[[], TaskHeads], folder: Path, states: list[State], *, runs: bool = True) -> None:
    """An error that names the folder and changes nothing, or a model that works."""
    rejected: StorageError | None = None
    try:
        model = read()
    except StorageError as error:
        rejected = error
    if rejected is not None:
        assert str(folder) in str(rejected)
        for state in states:
            state.check()
    elif runs:
        assert all(torch.isfinite(value).all() for value in logits(model).values())


FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize="PAL_ADAPTERS_FUZZ" not in os.environ,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.filterwarnings("ignore")  # what the hosts say about damaged files
@FUZZ
@given(data=st.data())
def test_reading_onto_a_base_model(saved: tuple[str, Path], tmp_path_factory: Any, data: st.DataObject) -> None:
    _, place = saved
    folder = tmp_path_factory.mktemp("folder") / "in"
    shutil.copytree(place / data.draw(st.sampled_from(["frozen", "trained"])), folder)
    good = TaskHeads.from_pretrained(folder, base())
    damage(data.draw, folder)
    backbone = base()
    state = State(backbone)
    attempt(lambda: TaskHeads.from_pretrained(folder, backbone), folder, [state])
    if state.take() == state.before:  # rejected: the next correct call works
        again = TaskHeads.from_pretrained(place / ("trained" if good.base_trained else "frozen"), backbone)
        expected = logits(good)
        assert all(torch.equal(value, expected[task]) for task, value in logits(again).items())
    shutil.rmtree(folder.parent)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
def test_reading_a_folder_alone(saved: tuple[str, Path], tmp_path_factory: Any, data: st.DataObject) -> None:
    _, place = saved
    folder = tmp_path_factory.mktemp("folder") / "in"
    shutil.copytree(place / "trained", folder)
    damaged = damage(data.draw, folder)
    # transformers builds a base model from any config, also one that no forward pass can be run with.
    runs = damaged.name != "config.json"
    attempt(lambda: TaskHeads.from_pretrained(folder), folder, [], runs=runs)
    shutil.rmtree(folder.parent)


@pytest.mark.filterwarnings("ignore")
@FUZZ
@given(data=st.data())
def test_going_back_to_a_checkpoint(saved: tuple[str, Path], tmp_path_factory: Any, data: st.DataObject) -> None:
    host, place = saved
    folder = tmp_path_factory.mktemp("folder") / "in"
    shutil.copytree(place / data.draw(st.sampled_from(["frozen", "trained"])), folder)
    damage(data.draw, folder)
    model = heads_of(host)

    def read() -> TaskHeads:
        model.restore(folder)
        return model

    attempt(read, folder, [State(model)])
    shutil.rmtree(folder.parent)


@pytest.mark.skipif("adapters" not in HOSTS, reason="needs adapters")
@pytest.mark.parametrize("children", [["b"], ["c", "b"], ["a", "b"]])
def test_a_fusion_with_other_sources_than_its_own(tmp_path: Path, children: list[str]) -> None:
    heads_of("adapters").save_pretrained(tmp_path)
    file = tmp_path / "task_heads.json"
    whole = json.loads(file.read_text())
    whole["tasks"]["u"]["adapter"]["Fuse"] = children
    file.write_text(json.dumps(whole))
    backbone = base()
    state = State(backbone)
    with pytest.raises(StorageError, match=r"task_heads.json .*the fusion 'f' has the sources \['b', 'c'\]"):
        TaskHeads.from_pretrained(tmp_path, backbone)
    state.check()
