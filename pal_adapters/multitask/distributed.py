"""Processes that share one run: what can be run, and parameters of which each process holds a part."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pal_adapters.errors import ConfigError

if TYPE_CHECKING:
    from .arguments import MultiTaskTrainingArguments


def check_processes(args: MultiTaskTrainingArguments, *, mixed: bool) -> None:
    """Raises `ConfigError` unless the processes can train what `TaskHeads` saves and restores by name.

    Args:
        args: The arguments of the run.
        mixed: Whether a batch may have several tasks, so that processes differ in the tasks of a step.
    """
    if args.n_gpu > 1:
        raise ConfigError(f"{args.n_gpu} GPUs in one process are not supported: start one process each, by torchrun.")
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        _check_fsdp(args, mixed)
    plugin: Any = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and int(plugin.zero_stage or 0) >= 3:
        raise ConfigError(
            "deepspeed with zero_optimization.stage=3 is not supported: each process has only parts of the tensors, "
            "which adapters and heads are saved from by name. Use stage 1 or 2, or FSDP 2."
        )


def _check_fsdp(args: MultiTaskTrainingArguments, mixed: bool) -> None:
    from accelerate.utils import DistributedType

    state = args.distributed_state
    if state is not None and state.distributed_type is DistributedType.MULTI_CPU:
        raise ConfigError(
            "fsdp has no effect on CPU, where accelerate trains with DDP instead and does not say so: leave it out."
        )
    chosen = getattr(args, "fsdp_plugin_args", None) or {}
    if int(chosen.get("fsdp_version", os.environ.get("FSDP_VERSION", "1"))) != 2:
        raise ConfigError(
            "FSDP 1 is not supported: it makes one flat tensor of many, but adapters and heads are saved by name. Use "
            "version 2: `accelerate launch --fsdp_version 2`, or FSDP_VERSION=2 in the environment; with transformers "
            "5 also fsdp_config={'version': 2}."
        )
    if mixed:
        raise ConfigError(
            "mixed batches are not possible with FSDP, where all processes need gradients of the same parameters in a "
            "step: use mixed_batches=False, or DDP (torchrun)."
        )


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """In the context all parameters are whole tensors in each process. To be entered by all processes at once."""
    rest(model)
    whole: dict[int, nn.Parameter] = {}
    parts: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_part(parameter):
                parts.append((module, name, parameter))
                if id(parameter) not in whole:  # shared ones stay shared
                    gathered: Any = parameter
                    value = gathered.full_tensor().detach()
                    whole[id(parameter)] = nn.Parameter(value, requires_grad=parameter.requires_grad)
    try:
        for module, name, parameter in parts:
            module._parameters[name] = whole[id(parameter)]
        yield
    finally:
        for module, name, parameter in parts:
            module._parameters[name] = parameter


def rest(model: nn.Module) -> None:
    """Makes each process drop the parts of others, which FSDP may have kept since the last forward pass."""
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()


def is_part(tensor: Tensor) -> bool:
    """Whether the process has only a part of the tensor."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def copy(tensor: Tensor, value: Tensor) -> None:
    """Copies a whole value into a tensor, or the process's part of it into its part."""
    if torch.distributed.is_available() and is_part(tensor):
        from torch.distributed.tensor import distribute_tensor

        there: Any = tensor
        value = distribute_tensor(value.to(tensor.device, tensor.dtype), there.device_mesh, there.placements)
    tensor.copy_(value)
