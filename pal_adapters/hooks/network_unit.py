"""What the hooks of a network need from a method's unit and from a host's layer."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from pal_adapters.nn.unit import BatchTasks

from .in_place import InPlace
from .weight_copies import Slots


class NetworkUnit(Protocol):
    """What a network does in one block."""

    base: nn.ParameterDict
    outer: nn.ParameterDict
    slots: tuple[Slots, Slots]
    in_place: InPlace | None
    acts_at_top: bool
    acts_in_stream: bool

    @property
    def norm_paths(self) -> tuple[str, ...]: ...

    @property
    def has_attention(self) -> bool: ...

    @property
    def has_final_norm(self) -> bool: ...

    def align(self, x: Tensor, batch: BatchTasks) -> Tensor: ...

    def attention_bias(self, batch: BatchTasks, queries: Tensor, keys: Tensor, total: int) -> Tensor: ...

    def norm(
        self, path: str, y: Tensor, x_hat: Tensor, weight: Tensor, bias: Tensor | None, batch: BatchTasks
    ) -> Tensor: ...

    def final_norm(
        self, y: Tensor, x_hat: Tensor, weight: Tensor, bias: Tensor | None, batch: BatchTasks
    ) -> Tensor: ...

    def top(self, y: Tensor, h: Tensor, eps: float, batch: BatchTasks) -> Tensor: ...

    def stream(self, outputs: list[Tensor], batch: BatchTasks) -> Tensor: ...


class NetworkRunner(Protocol):
    """What a host's layer offers to `NetworkHooks`."""

    def network(self) -> NetworkUnit | None:
        """The network's part in this block that acts in this call, if any."""

    def batch_tasks(self, batch: int, device: torch.device) -> BatchTasks:
        """The task of each example."""
