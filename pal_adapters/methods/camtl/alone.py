"""Training the embeddings of some tasks of a network while everything else stays frozen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

HELD = "task_vectors"
"""Where a unit keeps these embeddings, by task number. In the state dict they are rows of the table instead."""


def train_alone(units: Sequence[nn.Module], table: nn.Parameter, numbers: Iterable[int]) -> list[nn.Parameter]:
    """Make the embeddings of some tasks separate parameters and freeze the table.

    The optimizer then cannot change the other embeddings, not even by weight decay. The table keeps its shape and its
    place in the state dict, where the embeddings are written back to it.

    Args:
        units: the network's units, the first of which holds the embeddings.
        table: the task embeddings `[t, d]`.
        numbers: the numbers of the tasks.
    """
    join_table(units, table)
    table.requires_grad_(False)
    first: Any = units[0]
    first.table = (table,)
    vectors = {str(number): nn.Parameter(table.detach()[number].clone()) for number in numbers}
    getattr(first, HELD).update(vectors)
    for unit in units:
        unit.alone = (getattr(first, HELD),)  # type: ignore[assignment]
    if _write_back not in first._state_dict_pre_hooks.values():
        first.register_state_dict_pre_hook(_write_back)
        first.register_state_dict_post_hook(_leave_out)
    return list(vectors.values())


def join_table(units: Sequence[nn.Module], table: nn.Parameter) -> None:
    """Undo `train_alone`; the table keeps what was learned."""
    first: Any = units[0]
    write_rows(table, getattr(first, HELD))
    getattr(first, HELD).clear()
    for unit in units:
        unit.alone = ()  # type: ignore[assignment]
    first.table = ()


def task_table(table: Tensor, alone: Iterable[nn.ParameterDict]) -> Tensor:
    """The embeddings of all tasks, `[t, d]`, including those that train alone."""
    for vectors in alone:
        for number, vector in ((int(name), vector) for name, vector in vectors.items()):
            table = torch.cat([table[:number], vector.unsqueeze(0), table[number + 1 :]])
    return table


def write_rows(table: Tensor, vectors: nn.ParameterDict) -> None:
    """Copy embeddings to their rows of the table."""
    with torch.no_grad():
        for number, vector in vectors.items():
            table[int(number)] = vector


def _write_back(unit: Any, *_: Any) -> None:
    for table in unit.table:
        write_rows(table, getattr(unit, HELD))


def _leave_out(unit: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}{HELD}.")]:
        del state[name]
