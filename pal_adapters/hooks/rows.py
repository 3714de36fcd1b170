"""Runs units on a whole batch, or each on its own rows of a mixed batch. Knows no host."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pal_adapters.errors import UnsupportedError
from pal_adapters.nn.unit import TaskUnit, UnitInputs, stack_weights


class RowPlan:
    """Which adapter each row of a batch goes through, during one forward pass.

    Args:
        names: one adapter name per example.
        keep: whether weights shared by the blocks may be gathered once for all of them. Not under activation
            checkpointing, where a block that runs again has to repeat everything.
    """

    def __init__(self, names: Sequence[str], *, keep: bool) -> None:
        self.names = tuple(names)
        self.kept: dict[object, dict[str, Tensor]] | None = {} if keep else None
        # Whether generation may repeat each row (beams, several returned sequences).
        self.repeated = False
        # The plan that this one repeats, if any.
        self.origin: RowPlan | None = None
        self._repeated: dict[int, RowPlan] = {}

    def for_batch(self, batch: int) -> RowPlan:
        """The plan of a batch in which each row is repeated, as beam search and several returned sequences do.

        Raises:
            UnsupportedError: if `batch` is no multiple of the number of names.
        """
        if batch == len(self.names):
            return self
        if batch not in self._repeated:
            if batch % len(self.names):
                raise UnsupportedError(
                    f"{len(self.names)} adapter names were passed for a batch of {batch} examples: pass one name per "
                    "example."
                )
            times = batch // len(self.names)
            names = [name for name in self.names for _ in range(times)]
            self._repeated[batch] = RowPlan(names, keep=self.kept is not None)
            self._repeated[batch].origin = self
        return self._repeated[batch]


def run_unit(unit: TaskUnit, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
    """One unit for all rows."""
    return unit(site, value, inputs, unit.weights())


def select_rows(inputs: UnitInputs, rows: Tensor) -> UnitInputs:
    """The inputs of some rows. `inputs` may themselves hold rows of a larger batch."""
    whole = rows if inputs.rows is None else inputs.rows[rows]
    return inputs.map(lambda t: t.index_select(0, rows))._replace(mask=inputs.mask.select(whole), rows=whole)


def run_rows(units: Mapping[str, TaskUnit], plan: RowPlan, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
    """Send each row through its own unit, with one call for all rows of the same kind.

    Args:
        units: the units by adapter name; an example whose name is missing keeps its value.
        plan: one name a row of `value`, or of the tokens of `value` `[b n, d]`.

    Returns:
        The new value, `[b, n, d]`; equal to calling each unit on its rows.
    """
    if value.dim() == 2:  # OPT runs its feed-forward part on the tokens of all rows in one dimension
        plan = plan.origin or plan
        tokens = value.view(len(plan.names), -1, value.shape[-1])
        return run_rows(units, plan, site, tokens, inputs).view(value.shape)
    names = plan.names
    groups: dict[tuple[object, ...], list[int]] = {}
    for row, name in enumerate(names):
        if name in units and site in units[name].sites:
            groups.setdefault(units[name].signature(), []).append(row)
    for signature, rows in groups.items():
        # Units of different shapes, and different rows, need slots of their own in the generation cache.
        own = inputs._replace(slot=(*inputs.slot, names, signature))
        members = [names[row] for row in rows]
        distinct = list(dict.fromkeys(members))
        batch = [units[name] for name in distinct]
        index = None
        if len(distinct) > 1 and distinct != members:
            index = torch.tensor([distinct.index(name) for name in members], device=value.device)
        weights = stack_weights(batch, index, plan.kept)
        if len(rows) == value.shape[0]:
            value = batch[0](site, value, own, weights)
            continue
        chosen = torch.tensor(rows, device=value.device)
        part = batch[0](site, value.index_select(0, chosen), select_rows(own, chosen), weights)
        value = value.index_copy(0, chosen, part)
    return value
