"""Tasks that are added to a predictor and removed again, also while it answers."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from answers import REQUESTS, made, plain_logits
from backbones import HOSTS, network
from safetensors.torch import load_file, save_file
from tiny_tasks import make_tasks
from transformers import AutoTokenizer

from pal_adapters.errors import ConfigError, PalAdaptersError, StorageError, UnknownAdapterError, UnsupportedError
from pal_adapters.multitask import Predictor, RequestError, TaskHeads


def folder_of(encoder: str, host: str, place: Path, *names: str) -> Path:
    model, tasks = made(encoder, host, names)
    described = [task.describe(max_length=64) for task in tasks]
    model.save_pretrained(place, processing_class=AutoTokenizer.from_pretrained(encoder), tasks=described)
    return place


def state(predictor: Predictor) -> dict[str, Any]:
    model = predictor._engine.model
    found: dict[str, Any] = {name: value.clone() for name, value in model.state_dict().items()}
    found |= {f"{name} trains": parameter.requires_grad for name, parameter in model.named_parameters()}
    return found | {f"{name} mode": module.training for name, module in model.named_modules()}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name]
        for name, value in one.items()
    )


@pytest.mark.parametrize("host", HOSTS)
def test_values_of_an_added_task(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    predictor = Predictor.from_pretrained(folder_of(tiny_encoder, host, tmp_path / "two", "rte", "stsb"))
    other = folder_of(tiny_encoder, host, tmp_path / "others", "copa", "ner")
    before, expected = state(predictor), predictor(REQUESTS[0])
    predictor.add_task("ner", other)
    assert list(predictor.tasks) == ["rte", "stsb", "ner"]
    model, _ = made(tiny_encoder, host, ("copa", "ner"))
    shares = plain_logits(model, AutoTokenizer.from_pretrained(tiny_encoder), REQUESTS[1])[1:-1].softmax(-1)
    mixed: Any = predictor([REQUESTS[0], REQUESTS[1]], arrays=True)
    assert mixed[1].array.max(-1).tolist() == pytest.approx(
        [float(shares[n].max()) for n in first_pieces(tiny_encoder)], abs=1e-5
    )
    assert mixed[0].scores == pytest.approx(expected.scores)
    assert same({name: value for name, value in state(predictor).items() if name in before}, before)
    with pytest.raises(ConfigError, match="'ner' is there already"):
        predictor.add_task("ner", other)
    predictor.remove_task("ner")
    assert same(state(predictor), before)
    with pytest.raises(RequestError, match="there is no task 'ner'"):
        predictor(REQUESTS[1])
    with pytest.raises(UnknownAdapterError, match="task 'ner' is not there"):
        predictor.remove_task("ner")


def first_pieces(encoder: str) -> list[int]:
    words = AutoTokenizer.from_pretrained(encoder)(REQUESTS[1]["tokens"], is_split_into_words=True).word_ids()
    return [words.index(number) - 1 for number in range(len(REQUESTS[1]["tokens"]))]


@pytest.mark.parametrize("host", HOSTS)
def test_a_task_under_another_name(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    predictor = Predictor.from_pretrained(folder_of(tiny_encoder, host, tmp_path / "a", "rte", "stsb"))
    predictor.add_task("rte_2", folder_of(tiny_encoder, host, tmp_path / "b", "rte"))
    alone = Predictor.from_pretrained(tmp_path / "b")
    row = {name: value for name, value in REQUESTS[0].items() if name != "task"}
    found: Any = predictor(row, task=["rte", "rte_2"])
    wanted: Any = alone(row, task="rte")
    assert found[1].scores == pytest.approx(wanted.scores, abs=1e-6)
    predictor.remove_task("rte")
    predictor.add_task("rte", tmp_path / "a")
    again: Any = predictor(row, task="rte")
    assert again.scores == pytest.approx(found[0].scores, abs=1e-6)


def damage(folder: Path, what: str) -> None:
    if what == "heads":
        (folder / "heads.safetensors").write_bytes(b"x")
    elif what == "another head":
        tensors = load_file(folder / "heads.safetensors")
        save_file({name: value[..., :1].clone() for name, value in tensors.items()}, folder / "heads.safetensors")
    elif what == "no tasks.json":
        (folder / "tasks.json").unlink()
    elif what == "tasks.json":
        (folder / "tasks.json").write_text("{}")
    elif what == "the adapter":
        path = next((folder / "copa").glob("*adapter*.safetensors"))
        tensors = load_file(path)
        save_file({name: value[..., :1].clone() for name, value in tensors.items()}, path, metadata={"format": "pt"})
    elif what == "another base":
        stored = json.loads((folder / "task_heads.json").read_text())
        stored["base"]["name_or_path"] = "another"
        (folder / "task_heads.json").write_text(json.dumps(stored))
    elif what == "the vocabulary":
        text = (folder / "tokenizer.json").read_text().replace('"the":', '"thee":')
        (folder / "tokenizer.json").write_text(text)
    else:
        shutil.rmtree(folder)


@pytest.mark.parametrize("host", HOSTS)
def test_folders_that_do_not_fit_change_nothing(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    predictor = Predictor.from_pretrained(folder_of(tiny_encoder, host, tmp_path / "two", "rte", "stsb"))
    before, expected = state(predictor), predictor(REQUESTS[0])
    whole = folder_of(tiny_encoder, host, tmp_path / "whole", "copa")
    errors = {
        "heads": StorageError, "another head": StorageError, "no tasks.json": ConfigError, "tasks.json": StorageError,
        "the adapter": PalAdaptersError, "another base": UnsupportedError, "the vocabulary": UnsupportedError,
        "nothing": StorageError,
    }  # fmt: skip
    for what, error in errors.items():
        if what == "the adapter" and host == "none":
            continue
        shutil.copytree(whole, tmp_path / what)
        damage(tmp_path / what, what)
        with pytest.raises(error):
            predictor.add_task("copa", tmp_path / what)
        assert same(state(predictor), before), what
        assert list(predictor.tasks) == ["rte", "stsb"]
    with pytest.raises(ConfigError, match="'ner' is not a task of"):
        predictor.add_task("ner", tmp_path / "two")
    with pytest.raises(ConfigError, match=r"'\.\./x' is not allowed"):
        predictor.add_task("../x", whole)
    assert predictor(REQUESTS[0]) == expected


@pytest.mark.skipif(len(HOSTS) < 2, reason="needs a host")
def test_folders_of_another_host_or_with_a_trained_base(tiny_encoder: str, tmp_path: Path) -> None:
    predictor = Predictor.from_pretrained(folder_of(tiny_encoder, HOSTS[-1], tmp_path / "a", "rte"))
    model, tasks = made(tiny_encoder, HOSTS[-1], ("copa",))
    model.prepare_training(base=True)
    described = [task.describe(max_length=64) for task in tasks]
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    model.save_pretrained(tmp_path / "trained", processing_class=tokenizer, tasks=described)
    with pytest.raises(UnsupportedError, match="base weights of its own"):
        predictor.add_task("copa", tmp_path / "trained")
    plain = Predictor.from_pretrained(folder_of(tiny_encoder, "none", tmp_path / "b", "rte"))
    with pytest.raises(UnsupportedError, match="but the model has none"):
        plain.add_task("copa", folder_of(tiny_encoder, HOSTS[-1], tmp_path / "c", "copa"))
    predictor.add_task("stsb", folder_of(tiny_encoder, "none", tmp_path / "d", "stsb"))  # heads alone fit any host


@pytest.mark.parametrize("host", HOSTS)
def test_tasks_come_and_go_while_others_are_answered(tiny_encoder: str, host: str, tmp_path: Path) -> None:
    predictor = Predictor.from_pretrained(folder_of(tiny_encoder, host, tmp_path / "two", "rte", "stsb"))
    other = folder_of(tiny_encoder, host, tmp_path / "other", "copa")
    asked = [REQUESTS[0], REQUESTS[2], REQUESTS[5]]
    expected = predictor(asked, arrays=True)
    faults: list[BaseException] = []
    stop = threading.Event()

    def ask() -> None:
        try:
            while not stop.is_set():
                for one, wanted in zip(predictor(asked, arrays=True), expected, strict=True):
                    torch.testing.assert_close(torch.tensor(one.array), torch.tensor(wanted.array))
        except BaseException as fault:
            faults.append(fault)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        predictor.add_task("copa", other)
        assert predictor(REQUESTS[3]).task == "copa"
        predictor.remove_task("copa")
    stop.set()
    for thread in threads:
        thread.join()
    assert not faults


@pytest.mark.parametrize("host", [host for host in HOSTS if host != "none"])
def test_base_weights_that_train_in_place_are_for_one_model_alone(
    tiny_encoder: str, host: str, tmp_path: Path
) -> None:
    names = ("rte", "stsb")
    base = network(tiny_encoder, host, tasks=list(names), base_weights="in_place", top_block_init="scratch")
    model, tasks = TaskHeads(base), make_tasks(*names)
    for task in tasks:
        model.add(task.name, task.head_config(), adapter="net")
    model.prepare_training()
    described = [task.describe(max_length=64) for task in tasks]
    tokenizer = AutoTokenizer.from_pretrained(tiny_encoder)
    model.save_pretrained(tmp_path / "net", processing_class=tokenizer, tasks=described)
    predictor = Predictor.from_pretrained(tmp_path / "net")
    assert predictor(REQUESTS[0]) is not None
    other = folder_of(tiny_encoder, host, tmp_path / "other", "copa")
    before = state(predictor)
    with pytest.raises(UnsupportedError, match="the model has base weights of its own"):
        predictor.add_task("copa", other)
    assert same(state(predictor), before)
    plain = Predictor.from_pretrained(other)
    before = state(plain)
    # PEFT has adapters of one method at a time, whatever they train.
    message = "Cannot combine adapters" if host == "peft" else "trains base weights in place, which other tasks"
    with pytest.raises(PalAdaptersError, match=message):
        plain.add_task("rte", tmp_path / "net")
    assert same(state(plain), before)
