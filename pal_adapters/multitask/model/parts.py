"""Parameters that FSDP has split over processes: gathering them, and writing values into them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the block, every process sees each parameter as a whole tensor. All processes must enter it together."""
    reshard(model)
    whole: dict[int, nn.Parameter] = {}
    parts: list[tuple[nn.Module, str, nn.Parameter]] = []
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and is_part(parameter):
                parts.append((module, name, parameter))
                if id(parameter) not in whole:  # shared parameters stay shared
                    whole[id(parameter)] = nn.Parameter(gather(parameter), requires_grad=parameter.requires_grad)
    try:
        for module, name, parameter in parts:
            module._parameters[name] = whole[id(parameter)]
        yield
    finally:
        for module, name, parameter in parts:
            module._parameters[name] = parameter


def reshard(model: nn.Module) -> None:
    """Frees the parts of other processes, which FSDP may have kept since the last forward pass."""
    if torch.distributed.is_available():
        from torch.distributed.fsdp import FSDPModule  # not in builds of torch without distributed

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def is_part(tensor: Tensor) -> bool:
    """Whether this process holds only a part of the tensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor  # not in builds of torch without distributed

    return isinstance(tensor, DTensor)


def gather(tensor: Tensor) -> Tensor:
    """The whole tensor. If it is split, all processes must call this."""
    if not is_part(tensor):
        return tensor
    split: Any = tensor
    return split.full_tensor().detach()


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of `value`, split in the way `like` is. If it is split, all processes must call this."""
    if not is_part(like):
        return value
    from torch.distributed.tensor import distribute_tensor  # not in builds of torch without distributed

    split: Any = like
    return distribute_tensor(value.to(like.device), split.device_mesh, split.placements)
