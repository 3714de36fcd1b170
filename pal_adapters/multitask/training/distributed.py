"""Distributed runs: which setups are supported, and optimizer states that are sharded over processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from torch import Tensor

from pal_adapters.errors import ConfigError
from pal_adapters.hosts.which import host_of
from pal_adapters.multitask.model.parts import gather, part_of
from pal_adapters.multitask.model.task_heads import TaskHeads
from pal_adapters.nn.unit import TaskUnit

from .arguments import MultiTaskTrainingArguments


def check_processes(args: MultiTaskTrainingArguments, model: TaskHeads, *, mixed: bool) -> None:
    """Raises `ConfigError` unless the processes can train the model, and save and restore it by parameter name.

    Args:
        args: The arguments of the run.
        model: The model.
        mixed: Whether a batch may mix tasks, so that processes may train different tasks in a step.
    """
    if args.n_gpu > 1:
        raise ConfigError(
            f"{args.n_gpu} GPUs in one process are not supported: start one process per GPU with torchrun."
        )
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    deepspeed: Any = getattr(args, "deepspeed_plugin", None)
    if fsdp:
        _check_fsdp(args, model)
    if deepspeed is not None and int(deepspeed.zero_stage or 0) >= 3:
        raise ConfigError(
            "deepspeed with zero_optimization.stage=3 is not supported: each process holds only parts of the tensors, "
            "but adapters and heads are saved whole, by name. Use stage 1 or 2, or FSDP 2."
        )
    if mixed and args.world_size > 1 and (fsdp or deepspeed is not None):
        raise ConfigError(
            f"mixed batches are not supported with {'FSDP' if fsdp else 'DeepSpeed'}, where all processes need the "
            "gradients of the same parameters in a step: use batches of one task, or DDP (torchrun)."
        )


def _check_fsdp(args: MultiTaskTrainingArguments, model: TaskHeads) -> None:
    state = args.distributed_state
    kind = None if state is None else state.distributed_type
    if args.device.type == "cpu" and kind in (DistributedType.NO, DistributedType.MULTI_CPU):
        raise ConfigError(
            "fsdp has no effect on CPU, where accelerate silently trains with DDP instead: leave it out."
        )
    # transformers 4 leaves this to environment variables.
    chosen = {name.removeprefix("FSDP_").lower(): v for name, v in os.environ.items() if name.startswith("FSDP_")}
    chosen |= {name.removeprefix("fsdp_"): v for name, v in (getattr(args, "fsdp_plugin_args", None) or {}).items()}
    if int(chosen.get("version", 1)) != 2:
        raise ConfigError(
            "FSDP 1 is not supported: it flattens tensors into one, but adapters and heads are saved by name. Use "
            "version 2: `accelerate launch --fsdp_version 2`, or FSDP_VERSION=2 in the environment; with transformers "
            "5 also fsdp_config={'version': 2}."
        )
    layers = chosen.get("transformer_cls_to_wrap") or chosen.get("transformer_cls_names_to_wrap")
    shared = [m for m in model.modules() if isinstance(m, TaskUnit) and m.shares]
    if shared and host_of(model.backbone) == "peft" and (layers or int(chosen.get("min_num_params", 0)) > 0):
        raise ConfigError(
            "FSDP cannot shard block by block here: in PEFT, the first block holds the weights that all blocks of an "
            "adapter share. Leave out transformer_layer_cls_to_wrap and min_num_params, or use adapters."
        )


def whole_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimizer state, unsharded. torch's own function rejects parameters that have had no gradient yet."""
    state = optimizer.state_dict()
    whole = {
        number: {name: gather(value).cpu() if isinstance(value, Tensor) else value for name, value in values.items()}
        for number, values in state["state"].items()
    }
    return {**state, "state": whole}


def load_whole_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads what `whole_state` returned into an optimizer."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        like = parameters[number]
        parts[number] = {
            name: part_of(value, like) if isinstance(value, Tensor) and value.shape == like.shape else value
            for name, value in values.items()
        }
    optimizer.load_state_dict({**state, "state": parts})


def save_whole_states(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any, writes: bool) -> None:
    """Writes the states of an optimizer with sharded parameters and of its schedule; all processes must call it."""
    state = whole_state(optimizer)
    if writes:
        torch.save(state, folder / "optimizer.pt")
        torch.save(scheduler.state_dict(), folder / "scheduler.pt")


def load_whole_states(folder: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
    """Reads what `save_whole_states` wrote."""
    load_whole_state(optimizer, torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True))
    scheduler.load_state_dict(torch.load(folder / "scheduler.pt", weights_only=True))
