"""What processes that share a run refuse, and parameters of which each process holds a part."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from accelerate.utils import DistributedType
from backbones import HOSTS, backbone
from torch import distributed

from pal_adapters.errors import ConfigError
from pal_adapters.multitask import HeadConfig, StorageError, TaskHeads
from pal_adapters.multitask.model.parts import whole_parameters
from pal_adapters.multitask.training.distributed import check_processes, load_whole_state, whole_state


class Processes(SimpleNamespace):
    """The training arguments as in a run with two processes on GPUs."""

    def __init__(self, **changes: Any) -> None:
        state = SimpleNamespace(distributed_type=DistributedType.MULTI_GPU)
        given = {
            "n_gpu": 1,
            "world_size": 2,
            "fsdp": False,
            "device": torch.device("cuda"),
            "distributed_state": state,
        }
        super().__init__(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "mixed", "message"),
    [
        ({"n_gpu": 2}, False, "2 GPUs in one process are not supported"),
        ({"fsdp": True}, False, "FSDP 1 is not supported.*`accelerate launch --fsdp_version 2`"),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}, True, "not supported with FSDP"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, False, "stage=3 is not supported.*Use stage 1 or 2"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, True, "not supported with DeepSpeed"),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2)}, False, None),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=2), "world_size": 1}, True, None),
        ({"fsdp": True, "fsdp_plugin_args": {"fsdp_version": 2}}, False, None),
        ({}, True, None),
    ],
)
def test_processes_that_cannot_share_a_run(
    tiny_encoder: str, changes: dict[str, Any], mixed: bool, message: str | None
) -> None:
    model = TaskHeads(backbone(tiny_encoder, "none"))
    with pytest.raises(ConfigError, match=message) if message else nullcontext():
        check_processes(cast("Any", Processes(**changes)), model, mixed=mixed)


@pytest.mark.skipif("peft" not in HOSTS, reason="needs PEFT")
def test_blocks_that_share_weights_are_one_piece(tiny_encoder: str) -> None:
    model = TaskHeads(backbone(tiny_encoder, "peft", ("rte",)))
    layers = {"fsdp_version": 2, "transformer_cls_names_to_wrap": "BertLayer"}
    with pytest.raises(ConfigError, match="FSDP cannot shard block by block here: in PEFT, the first block holds"):
        check_processes(cast("Any", Processes(fsdp=True, fsdp_plugin_args=layers)), model, mixed=False)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("host", HOSTS)
def test_parts_are_saved_whole_and_restored_in_place(tiny_encoder: str, tmp_path: Path, host: str) -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    model = TaskHeads(backbone(tiny_encoder, host, ("rte",)))
    model.add("rte", HeadConfig("single_label", 2))
    model.prepare_training(base=True)
    expected = {name: value.detach().clone() for name, value in model.named_parameters()}
    fully_shard(model)
    parts = list(model.parameters())
    assert all(isinstance(part, DTensor) for part in parts)
    with pytest.raises(StorageError, match="each process holds only parts of the parameters"):
        model.save_pretrained(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()

    batch: dict[str, Any] = {"task_ids": "rte", "input_ids": torch.ones(2, 5, dtype=torch.long)}
    before = model.eval()(**batch).logits["rte"]
    with whole_parameters(model):
        assert not any(isinstance(value, DTensor) for value in model.parameters())
        model.save_pretrained(tmp_path / "whole", checkpoint=True)
    assert all(part is now for part, now in zip(parts, model.parameters(), strict=True))
    read = TaskHeads.from_pretrained(tmp_path / "whole")
    values = dict(read.named_parameters())
    assert values.keys() == expected.keys()
    assert all(torch.equal(value, values[name]) for name, value in expected.items())
    with torch.no_grad():
        for part in parts:
            part.add_(1.0)
    assert not torch.equal(model(**batch).logits["rte"], before)
    model.restore(tmp_path / "whole")
    assert all(part is now for part, now in zip(parts, model.parameters(), strict=True))
    assert torch.equal(model(**batch).logits["rte"], before)


@pytest.mark.usefixtures("one_process")
def test_state_of_an_optimiser() -> None:
    from torch.distributed.fsdp import fully_shard

    def run(sharded: bool) -> tuple[list[torch.Tensor], Any, dict[str, Any]]:
        torch.manual_seed(0)
        layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))
        if sharded:
            fully_shard(layers[0])
            fully_shard(layers[1])
        optimizer = torch.optim.AdamW(layers.parameters(), lr=0.1)
        for _ in range(2):  # the second layer is of a task that was not drawn yet
            optimizer.zero_grad()
            layers[0](torch.ones(2, 3)).square().sum().backward()
            optimizer.step()
        return list(layers.parameters()), optimizer, whole_state(optimizer)

    _, _, expected = run(False)
    parameters, optimizer, found = run(True)
    assert found["state"].keys() == expected["state"].keys() == {0, 1}
    for number, values in expected["state"].items():
        for name, value in values.items():
            torch.testing.assert_close(found["state"][number][name], value)
    fresh = torch.optim.AdamW(parameters, lr=0.5)
    load_whole_state(fresh, found)
    assert fresh.param_groups[0]["lr"] == 0.1
    for parameter in parameters[:2]:
        for name, value in optimizer.state[parameter].items():
            assert type(fresh.state[parameter][name]) is type(value)
            assert torch.equal(fresh.state[parameter][name], value)
    assert parameters[2] not in fresh.state
