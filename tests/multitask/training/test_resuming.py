"""A run resumes exactly, or an error says which file or argument is in the way, before anything changes."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_tasks import losses, make_task, make_trainer

from pal_adapters.errors import ConfigError, StorageError

SAVING: dict[str, Any] = {"names": ("rte", "stsb"), "max_steps": 4, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(scope="module")
def written(tiny_encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("written")
    make_trainer(tiny_encoder, place, **SAVING).train()
    return place / "checkpoint-2"


def refused(encoder: str, checkpoint: Path, error: type[Exception], message: str, **changes: Any) -> None:
    """Resuming raises this error and leaves the weights as they were."""
    made = make_trainer(encoder, checkpoint.parent / "again", **{**SAVING, **changes})
    before = {name: value.clone() for name, value in made.model.state_dict().items()}
    with pytest.raises(error, match=message):
        made.train(resume_from_checkpoint=str(checkpoint))
    for name, value in made.model.state_dict().items():
        assert torch.equal(value, before[name]), name


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeros": lambda data: b"\0" * len(data),
}


@pytest.mark.parametrize("damage", [*DAMAGE, "missing"])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"])
def test_damaged_states_of_a_run(tiny_encoder: str, tmp_path: Path, written: Path, name: str, damage: str) -> None:
    file = Path(shutil.copytree(written, tmp_path / "checkpoint-2")) / name
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(DAMAGE[damage](file.read_bytes()))
    refused(tiny_encoder, file.parent, StorageError, rf"{name}\b.* (is damaged|is not there)")


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_description_of_the_sampling(tiny_encoder: str, tmp_path: Path, written: Path, damage: str) -> None:
    file = Path(shutil.copytree(written, tmp_path / "checkpoint-2")) / "sampling.json"
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    refused(tiny_encoder, file.parent, StorageError, r"sampling\.json is damaged")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_whole_states_of_something_else(tiny_encoder: str, tmp_path: Path, written: Path, name: str) -> None:
    file = Path(shutil.copytree(written, tmp_path / "checkpoint-2")) / name
    torch.save({"something": 1}, file)
    made = make_trainer(tiny_encoder, tmp_path / "again", **SAVING)
    with pytest.raises(StorageError, match=rf"checkpoint-2: .*{file.stem}.* cannot be loaded into this run"):
        made.train(resume_from_checkpoint=str(file.parent))


NUMBERS = (True, "1", [], {}, math.nan, math.inf, -1.5)
STATE: dict[str, tuple[Any, ...]] = {
    "global_step": (None, *NUMBERS, -1, 1.5),
    "epoch": ("1", [], {}, math.nan, math.inf),
    "log_history": (None, 1, "a", {}, [1], [None]),
    "best_metric": ("1", [], math.nan),
    "best_global_step": ("1", 1.5, -1),
    "best_model_checkpoint": (1, [], True),
    "train_batch_size": (0, -1, "4", 1.5),
    "stateful_callbacks": (1, "a", []),
    "num_input_tokens_seen": (None, "1", math.nan),
}


@pytest.mark.parametrize("field", STATE)
def test_fields_of_the_state_of_a_run(tiny_encoder: str, tmp_path: Path, written: Path, field: str) -> None:
    file = Path(shutil.copytree(written, tmp_path / "checkpoint-2")) / "trainer_state.json"
    state = json.loads(file.read_text())
    for value in STATE[field]:
        file.write_text(json.dumps({**state, field: value}))
        refused(tiny_encoder, file.parent, StorageError, rf"trainer_state\.json is damaged.*{field}")


def test_other_fields_of_the_state_of_a_run(tiny_encoder: str, tmp_path: Path, written: Path) -> None:
    file = Path(shutil.copytree(written, tmp_path / "checkpoint-2")) / "trainer_state.json"
    state = json.loads(file.read_text())
    del state["global_step"]
    file.write_text(json.dumps(state))
    refused(tiny_encoder, file.parent, StorageError, r"trainer_state\.json is damaged: it has no global_step")
    file.write_text(json.dumps({**state, "global_step": 2, "of_a_newer_release": 1}))
    refused(tiny_encoder, file.parent, StorageError, r"trainer_state\.json has 'of_a_newer_release'")


def test_checkpoint_without_states(tiny_encoder: str, tmp_path: Path) -> None:
    make_trainer(tiny_encoder, tmp_path, save_only_model=True, **SAVING).train()
    refused(tiny_encoder, tmp_path / "checkpoint-2", StorageError, r"optimizer\.pt is not there.*save_only_model=True")
    refused(tiny_encoder, tmp_path / "nothing", StorageError, r"nothing/task_heads\.json is not there")


TASKS = {
    "sizes": [make_task("single_label", "rte", (11, 5)), make_task("regression", "stsb", (13, 5))],
    "order": [make_task("regression", "stsb", (13, 5)), make_task("single_label", "rte", (10, 5))],
    "names": [make_task("single_label", "rte", (10, 5)), make_task("regression", "mrpc", (13, 5))],
    "kind": [make_task("single_label", "rte", (10, 5)), make_task("multiple_choice", "stsb", (13, 5))],
}
SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"seed": 2}, "seed=1, this run 2"),
    ({"data_seed": 3}, "seed=1, this run 3"),
    ({"per_device_train_batch_size": 2}, "batch_size=4, this run 2"),
    ({"gradient_accumulation_steps": 2}, "batches_per_step=1, this run 2"),
    ({"steps_per_epoch": 3}, "steps_per_epoch=4, this run 3"),
    ({"sampling": "sqrt"}, "strategy='proportional', this run 'sqrt'"),
    ({"sampling": "temperature", "sampling_temperature": 3.0}, "this run 'temperature 3'"),
    ({"mixed_batches": True}, "mixed_batches=False, this run True"),
    ({"group_by_length": True}, "group_by_length=False, this run True"),
    ({"tasks": TASKS["sizes"]}, "tasks={'rte': 10, 'stsb': 13}, this run {'rte': 11, 'stsb': 13}"),
]


@pytest.mark.parametrize(("changes", "message"), SAMPLING, ids=[message for _, message in SAMPLING])
def test_other_batches(
    tiny_encoder: str, tmp_path: Path, written: Path, changes: dict[str, Any], message: str
) -> None:
    checkpoint = Path(shutil.copytree(written, tmp_path / "checkpoint-2"))
    refused(tiny_encoder, checkpoint, ConfigError, rf"sampling\.json: .*{message}.*ignore_data_skip=True", **changes)
    made = make_trainer(tiny_encoder, tmp_path / "again", **{**SAVING, **changes}, ignore_data_skip=True)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert [entry["step"] for entry in losses(made)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ("order", "has the tasks rte, stsb, the model stsb, rte"),
        ("names", "has the tasks rte, stsb, the model rte, mrpc"),
        ("kind", "task 'stsb' has kind='regression' there and 'multiple_choice' on the model"),
    ],
)
@pytest.mark.parametrize("skip", [False, True])
def test_other_tasks(tiny_encoder: str, tmp_path: Path, written: Path, tasks: str, message: str, skip: bool) -> None:
    checkpoint = Path(shutil.copytree(written, tmp_path / "checkpoint-2"))
    refused(tiny_encoder, checkpoint, ConfigError, message, tasks=TASKS[tasks], ignore_data_skip=skip)


def test_more_steps_are_the_same_batches_unless_the_sampling_changes_over_the_run(
    tiny_encoder: str, tmp_path: Path
) -> None:
    common = {**SAVING, "lr_scheduler_type": "constant", "steps_per_epoch": 2}
    whole = make_trainer(tiny_encoder, tmp_path / "whole", **{**common, "max_steps": 8})
    whole.train()
    make_trainer(tiny_encoder, tmp_path, **common).train()
    more = make_trainer(tiny_encoder, tmp_path, **{**common, "max_steps": 8})
    more.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(more) == losses(whole)
    common["sampling"] = "annealed"
    make_trainer(tiny_encoder, tmp_path / "annealed", **common).train()
    made = make_trainer(tiny_encoder, tmp_path / "annealed", **{**common, "max_steps": 8})
    with pytest.raises(ConfigError, match=r"sampling\.json: the checkpoint has epochs=2, this run 4"):
        made.train(resume_from_checkpoint=True)


def test_checkpoints_of_earlier_releases_say_nothing_of_the_sampling(
    tiny_encoder: str, tmp_path: Path, written: Path
) -> None:
    checkpoint = Path(shutil.copytree(written, tmp_path / "checkpoint-2"))
    (checkpoint / "sampling.json").unlink()
    made = make_trainer(tiny_encoder, tmp_path / "again", **SAVING)
    made.train(resume_from_checkpoint=str(checkpoint))
    assert made.state.global_step == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"sampling": "uniform"},
        {"sampling": "sqrt", "group_by_length": True, "gradient_accumulation_steps": 2},
        {"sampling": "temperature", "sampling_temperature": 2.0, "mixed_batches": True},
        {"sampling": "round_robin", "gradient_accumulation_steps": 3, "dataloader_num_workers": 1},
        {"sampling": "annealed", "mixed_batches": True, "gradient_accumulation_steps": 2},
    ],
    ids=lambda changes: changes["sampling"],
)
def test_every_sampling_resumes_within_an_epoch(tiny_encoder: str, tmp_path: Path, changes: dict[str, Any]) -> None:
    common = {**SAVING, **changes, "steps_per_epoch": 3, "max_steps": 5}
    whole, again = (make_trainer(tiny_encoder, tmp_path / name, **common) for name in "ab")
    whole.train()
    torch.manual_seed(99)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(again) == losses(whole)
    for (name, value), other in zip(whole.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(value, other), name
