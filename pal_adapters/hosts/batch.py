"""Runs units on a batch, or on one row of a batch each. Knows no host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..units import TaskUnit, UnitInputs, stack_weights
from .attach import BlockMask


def run_unit(unit: TaskUnit, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
    """One unit for all rows."""
    return unit(site, value, inputs, unit.weights())


def select_rows(inputs: UnitInputs, rows: Tensor) -> UnitInputs:
    """The inputs of some rows of a batch."""
    mask = inputs.mask.select(rows) if isinstance(inputs.mask, BlockMask) else inputs.mask
    return inputs.map(lambda t: t.index_select(0, rows))._replace(mask=mask, rows=rows)


def run_rows(
    units: Mapping[str, TaskUnit], names: Sequence[str], site: str, value: Tensor, inputs: UnitInputs
) -> Tensor:
    """Each row through its own unit, all rows of one kind in one call.

    Args:
        units: the units by adapter name; a row whose name is missing keeps its value.
        names: one name a row of `value`.

    Returns:
        The new value, `[b, n, d]`; equal to calling each unit on its rows.
    """
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, name in enumerate(names):
        unit = units.get(name)
        if unit is not None and site in unit.sites:
            groups.setdefault(unit.signature(), []).append(row)
    for rows in groups.values():
        members = [names[row] for row in rows]
        distinct = list(dict.fromkeys(members))
        batch = [units[name] for name in distinct]
        index = None
        if len(distinct) > 1 and distinct != members:
            index = torch.tensor([distinct.index(name) for name in members], device=value.device)
        weights = stack_weights(batch, index)
        if len(rows) == value.shape[0]:
            value = batch[0](site, value, inputs, weights)
            continue
        chosen = torch.tensor(rows, device=value.device)
        part = batch[0](site, value.index_select(0, chosen), select_rows(inputs, chosen), weights)
        value = value.index_copy(0, chosen, part)
    return value
