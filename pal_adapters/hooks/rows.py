"""Runs units on a whole batch, or each on its own examples of a mixed batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pal_adapters.errors import UnsupportedError
from pal_adapters.nn.functional import batches_tasks
from pal_adapters.nn.unit import TaskUnit, UnitInputs, stack_weights


class Group(NamedTuple):
    """The examples of a mixed batch that one call serves, and the order in which it gets them.

    Attributes:
        names: their adapters, each once.
        member: `[m]`, the position in `names` of each example that the call gets.
        counts: how many examples of each adapter the call gets, one adapter after another; None where each example
            needs its own copy of the weights.
        rows: `[m]`, the examples that the call gets; None for the whole batch in its own order.
        own: `[k]`, the group's examples in the order of the batch; None for the whole batch.
        back: `[k]`, where these are among what the call returns; None if it returns just these.
    """

    names: tuple[str, ...]
    member: Tensor
    counts: tuple[int, ...] | None = None
    rows: Tensor | None = None
    own: Tensor | None = None
    back: Tensor | None = None


class RowPlan:
    """Which adapter each example of a batch goes through, during one forward pass.

    The plan makes every index tensor, once for all blocks.

    Args:
        names: one adapter name per example.
        keep: whether weights shared by the blocks may be gathered once for all of them. Not under activation
            checkpointing, where a block that runs again has to repeat everything.
        numbers: `[b]`, for a graph whose tasks are an input: the position in `names` of each example's adapter.
            `names` are all adapters then.
    """

    def __init__(self, names: Sequence[str], *, keep: bool, numbers: Tensor | None = None) -> None:
        self.names = tuple(dict.fromkeys(names))
        self.input = numbers
        place = {name: at for at, name in enumerate(self.names)}
        self.members = () if numbers is not None else tuple(place[name] for name in names)
        self.kept: dict[object, dict[str, Any]] | None = {} if keep else None
        # Whether generation may repeat each example (beams, several returned sequences).
        self.repeated = False
        # The plan that this one repeats, if any.
        self.origin: RowPlan | None = None
        self._repeated: dict[int, RowPlan] = {}
        self._made: dict[object, Any] = {}

    def for_batch(self, batch: int) -> RowPlan:
        """The plan of a batch in which each example is repeated, as beam search and several returned sequences do.

        Raises:
            UnsupportedError: if `batch` is no multiple of the number of names.
        """
        if self.input is not None or batch == len(self.members):
            return self
        if batch not in self._repeated:
            if batch % len(self.members):
                raise UnsupportedError(
                    f"{len(self.members)} adapter names were passed for a batch of {batch} examples: pass one name "
                    "per example."
                )
            times = batch // len(self.members)
            names = [self.names[member] for member in self.members for _ in range(times)]
            self._repeated[batch] = RowPlan(names, keep=self.kept is not None)
            self._repeated[batch].origin = self
        return self._repeated[batch]

    def numbers(self, device: torch.device) -> Tensor:
        """`[b]`, the position in `names` of each example's adapter."""
        if self.input is not None:
            return self.input.to(device)
        return self._once(("numbers", device.type, device.index), lambda: torch.tensor(self.members, device=device))

    def rows_of(self, names: Sequence[str], device: torch.device) -> Tensor:
        """The examples of these adapters, in the order of the batch.

        Raises:
            UnsupportedError: for a graph whose tasks are an input: it does not know them.
        """
        if self.input is not None:
            raise UnsupportedError(
                "a module of this model runs each task's examples apart, which a graph whose tasks are an input "
                "cannot do: export one task at a time."
            )
        chosen = [row for row, member in enumerate(self.members) if self.names[member] in names]
        return self._once((tuple(names), device.type, device.index), lambda: torch.tensor(chosen, device=device))

    def groups(self, kinds: Mapping[str, object], device: torch.device, *, by_task: bool) -> list[Group]:
        """The examples of these adapters in groups that one call serves.

        Args:
            kinds: what has to be equal for two adapters to share a call, by name.
            device: of the index tensors.
            by_task: whether a call may get the examples ordered by task.
        """
        key = (tuple(kinds.items()), by_task, device.type, device.index)
        return self._once(key, lambda: self._groups(kinds, device, by_task))

    def _once(self, key: object, make: Callable[[], Any]) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def _groups(self, kinds: Mapping[str, object], device: torch.device, by_task: bool) -> list[Group]:
        rows_of: dict[object, list[int]] = {}
        for row, member in enumerate(self.members):
            if (name := self.names[member]) in kinds:
                rows_of.setdefault(kinds[name], []).append(row)
        return [self._group(rows, device, by_task) for rows in rows_of.values()]

    def _group(self, own: list[int], device: torch.device, by_task: bool) -> Group:
        members = list(dict.fromkeys(self.members[row] for row in own))
        by_member = [[row for row in own if self.members[row] == member] for member in members]
        counts = [len(rows) for rows in by_member]
        layout = "examples"
        if by_task and len(members) > 1:
            layout = layout_of(counts, launches_cost=batches_tasks(device))
        if layout == "padded":  # padded with a task's last example, whose result is dropped
            by_member = [rows + rows[-1:] * (max(counts) - len(rows)) for rows in by_member]
            counts = [max(counts)] * len(counts)
        given = own if layout == "examples" else [row for rows in by_member for row in rows]
        whole = len(own) == len(self.members)

        def tensor(values: list[int]) -> Tensor:
            return torch.tensor(values, device=device)

        return Group(
            tuple(self.names[member] for member in members),
            tensor([members.index(self.members[row]) for row in given]),
            None if layout == "examples" else tuple(counts),
            None if whole and given == own else tensor(given),
            None if whole else tensor(own),
            None if given == own else tensor([given.index(row) for row in own]),
        )


def layout_of(counts: Sequence[int], *, launches_cost: bool = True) -> Literal["tasks", "padded", "calls", "examples"]:
    """How a map with one weight per task runs on a batch with this many examples of each task.

    * `"calls"` where a call costs little, as on a CPU: one product per task, which copies no weights;
    * `"tasks"`, equal counts: one batched product over the tasks;
    * `"examples"`, fewer than two examples per task on average: the weights are copied for each example, and one
      batched product runs over the examples;
    * `"padded"`, if filling up every task to the largest count adds at most a quarter: as `"tasks"`;
    * `"calls"`, otherwise.

    Args:
        counts: the number of examples of each task.
        launches_cost: whether a call has a fixed cost beside its arithmetic, as on an accelerator.
    """
    if not launches_cost:
        return "calls"
    total, filled = sum(counts), max(counts) * len(counts)
    if filled == total:
        return "tasks"
    if total < 2 * len(counts):
        return "examples"
    return "padded" if filled <= 1.25 * total else "calls"


def _require_weights(unit: TaskUnit, value: Tensor) -> None:
    """Raise `UnsupportedError` if accelerate has taken the weights of a unit away, and would not bring them back."""
    weight = next(unit.parameters(), None)
    if weight is not None and weight.is_meta and not value.is_meta:
        raise UnsupportedError(
            f"the weights of {type(unit).__name__} are offloaded, and task modules read them without calling the "
            "modules that would load them: offload the model first (device_map, accelerate.cpu_offload), and add the "
            "adapters after that."
        )


def run_unit(unit: TaskUnit, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
    """One unit for all examples."""
    _require_weights(unit, value)
    return unit(site, value, inputs, unit.weights())


def select_rows(inputs: UnitInputs, rows: Tensor) -> UnitInputs:
    """The inputs of some examples. `inputs` may themselves hold examples of a larger batch."""
    whole = rows if inputs.rows is None else inputs.rows[rows]
    return inputs.map(lambda t: t.index_select(0, rows))._replace(mask=inputs.mask.select(whole), rows=whole)


def run_rows(units: Mapping[str, TaskUnit], plan: RowPlan, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
    """Send each example through its own unit, with one call for all examples of the same kind.

    Args:
        units: the units by adapter name; an example whose name is missing keeps its value.
        plan: the adapter of each example of `value`, or of the tokens of `value` `[b n, d]`.

    Returns:
        The new value, `[b, n, d]`; equal to calling each unit on its examples.
    """
    if value.dim() == 2:  # OPT runs its feed-forward part on the tokens of all examples in one dimension
        plan = plan.origin or plan
        batch = plan.numbers(value.device).shape[0]
        return run_rows(units, plan, site, value.view(batch, -1, value.shape[-1]), inputs).view(value.shape)
    acting = {name: units[name] for name in plan.names if name in units and site in units[name].sites}
    for unit in list(acting.values())[:1]:  # accelerate offloads all of a block or none
        _require_weights(unit, value)
    kinds = {name: unit.signature() for name, unit in acting.items()}
    if plan.input is not None:
        return _run_all(acting, kinds, plan, site, value, inputs)
    # The earlier tokens in a generation cache are in the order of the batch.
    by_task = inputs.cache is None and all(unit.groups_tasks for unit in acting.values())
    for group in plan.groups(kinds, value.device, by_task=by_task):
        # Units of different shapes, and different examples, need slots of their own in the generation cache.
        slot = (*inputs.slot, plan.names, plan.members, kinds[group.names[0]])
        own = inputs._replace(slot=slot)
        members = [acting[name] for name in group.names]
        weights = stack_weights(members, group.member, plan.kept, group.counts)
        if group.rows is None:
            value = members[0](site, value, own, weights)
            continue
        part = members[0](site, value.index_select(0, group.rows), select_rows(own, group.rows), weights)
        part = part if group.back is None else part.index_select(0, group.back)
        value = part if group.own is None else value.index_copy(0, group.own, part)
    return value


def _run_all(
    units: Mapping[str, TaskUnit],
    kinds: Mapping[str, object],
    plan: RowPlan,
    site: str,
    value: Tensor,
    inputs: UnitInputs,
) -> Tensor:
    """Run all examples through each kind of unit, and keep the results of that kind's own examples.

    The shapes of a graph do not depend on which tasks a batch has.
    """
    numbers = plan.numbers(value.device)
    for kind in dict.fromkeys(kinds.values()):
        names = [name for name in units if kinds[name] == kind]
        place = torch.tensor([names.index(name) if name in names else -1 for name in plan.names], device=value.device)
        index = place.index_select(0, numbers)
        weights = stack_weights([units[name] for name in names], index.clamp(min=0), plan.kept)
        new = units[names[0]](site, value, inputs, weights)
        own = len(names) == len(plan.names)
        value = new if own else torch.where((index >= 0)[:, None, None], new, value)
    return value
