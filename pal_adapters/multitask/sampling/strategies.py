"""Which task is trained next, and on which of its examples.

A *strategy* determines how often each task is drawn in an epoch, from the sizes of the tasks, the epoch and the number
of epochs. `MultiTaskBatchSampler` draws tasks accordingly and hands out their examples. Its batches depend only on its
seed and the epoch, so every process of a distributed run sees the same sequence, and a run can resume anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Sampler

from pal_adapters.checks import number, require_bool, require_int, require_one_of, shown
from pal_adapters.errors import ConfigError


class Strategy(Protocol):
    """How often each task is drawn.

    Any function with these arguments will do, as long as it is deterministic.
    """

    def __call__(self, sizes: Sequence[int], epoch: int, epochs: int) -> Sequence[float] | np.ndarray:
        """Weights `[t]` of the tasks, which need not add up to 1.

        Args:
            sizes: `N_i`, the number of training examples of each task.
            epoch: `e`, counted from 1.
            epochs: `E`.
        """
        ...


def annealed_alpha(epoch: int, epochs: int) -> float:
    r"""Exponent of annealed sampling: from 1 in the first epoch down to 0.2 in the last.

    $$\alpha = 1 - 0.8 \frac{e - 1}{E - 1}$$

    From Stickland and Murray, "BERT and PALs", ICML 2019. A run of a single epoch stays at 1.

    Args:
        epoch: `e`, counted from 1.
        epochs: `E`.

    Examples:
        >>> annealed_alpha(13, 25)
        0.6
    """
    require_int("epochs", epochs, minimum=1)
    require_int("epoch", epoch, minimum=1, maximum=epochs)
    return 1.0 if epochs == 1 else 1.0 - 0.8 * (epoch - 1) / (epochs - 1)


def task_probabilities(sizes: Sequence[int], alpha: float) -> np.ndarray:
    r"""Probability of each task, $p_i \propto N_i^\alpha$.

    Args:
        sizes: `N_i`, the number of training examples of each task.
        alpha: 1 is proportional, 0 is uniform.

    Returns:
        Probabilities `[t]`.
    """
    if not isinstance(sizes, (Sequence, np.ndarray)) or not len(sizes) or min(sizes) < 1:
        raise ConfigError(f"sizes={shown(sizes)} is not allowed: use a list of positive numbers, one for each task.")
    number()("alpha", alpha)
    # Relative sizes first: the power of a large count may overflow.
    weights = (np.asarray(sizes, dtype=np.float64) / sum(sizes)) ** alpha
    return weights / weights.sum()


def uniform(sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
    r"""All tasks equally often, $p_i = 1/T$."""
    return task_probabilities(sizes, 0.0)


def proportional(sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
    r"""Proportionally to size, $p_i \propto N_i$."""
    return task_probabilities(sizes, 1.0)


def square_root(sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
    r"""Proportionally to the square root of the size, $p_i \propto \sqrt{N_i}$ ("BERT and PALs", ICML 2019)."""
    return task_probabilities(sizes, 0.5)


def annealed(sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
    r"""Proportionally to size at first, more evenly every epoch: $p_i \propto N_i^\alpha$, see `annealed_alpha`."""
    return task_probabilities(sizes, annealed_alpha(epoch, epochs))


@dataclass(frozen=True)
class Temperature:
    r"""A power of the relative size, $p_i \propto (N_i / \sum_j N_j)^{1/\tau}$, as in the released code of ScaLearn.

    Args:
        temperature: `τ`: 1 is proportional, 2 is `square_root`, large is nearly uniform.
    """

    temperature: float

    def __post_init__(self) -> None:
        value = self.temperature
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ConfigError(f"temperature={value!r} is not allowed: use a number above 0.")

    def __call__(self, sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
        return task_probabilities(sizes, 1.0 / self.temperature)


def round_robin(sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
    """One task after another, deterministically, continuing where the previous epoch ended.

    The option of this name in the released code of PALs never leaves the first task.
    """
    return task_probabilities(sizes, 0.0)


def uncertainty_candidates(sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
    """Candidates of every task in each batch, of which a selector keeps the most uncertain ones (CA-MTL).

    The sampler yields `T` times `batch_size` examples; the `batch_selector` of `MultiTaskTrainer` chooses among them.
    """
    return task_probabilities(sizes, 0.0)


STRATEGIES: dict[str, Strategy] = {
    "uniform": uniform,
    "proportional": proportional,
    "sqrt": square_root,
    "annealed": annealed,
    "round_robin": round_robin,
    "uncertainty": uncertainty_candidates,
}
"""The strategies without arguments, by name. `"temperature"` is `Temperature(...)`."""


def get_strategy(strategy: str | Strategy, *, temperature: float | None = None) -> Strategy:
    """The strategy of that name, or the strategy itself if one is given.

    Args:
        strategy: A name in `STRATEGIES`, `"temperature"`, or a function with the signature of `Strategy`.
        temperature: `τ` of `"temperature"`.

    Raises:
        ConfigError: For an unknown name, for a temperature that has no effect, and for a missing one.
    """
    if strategy == "temperature":
        if temperature is None:
            raise ConfigError("strategy='temperature' needs temperature=..., a number above 0.")
        return Temperature(temperature)
    if temperature is not None:
        raise ConfigError(f"temperature={temperature!r} has no effect for strategy={strategy!r}: leave it out.")
    if callable(strategy):
        return strategy
    require_one_of("strategy", strategy, (*STRATEGIES, "temperature"))
    return STRATEGIES[strategy]


def probabilities(strategy: Strategy, sizes: Sequence[int], epoch: int, epochs: int) -> np.ndarray:
    """The weights of a strategy, checked and normalised to a sum of 1: `[t]`.

    Raises:
        ConfigError: If there is not one weight for each task, if one is negative or not finite, or if all are 0.
    """
    given = strategy(sizes, epoch, epochs)
    weights = np.asarray(given, dtype=np.float64)
    name = getattr(strategy, "__name__", type(strategy).__name__)
    if weights.shape != (len(sizes),):
        raise ConfigError(
            f"strategy {name} returned weights of shape {weights.shape} for {len(sizes)} tasks: return one per task."
        )
    if not np.isfinite(weights).all() or (weights < 0).any() or not weights.sum() > 0:
        raise ConfigError(
            f"strategy {name} returned the weights {weights.tolist()}: none may be negative, and not all 0."
        )
    return weights / weights.sum()


_STRETCH = 16
"""Steps within which examples are sorted by length."""


class MultiTaskBatchSampler(Sampler[list[int]]):
    """Batches of examples of many tasks, for `DataLoader(ConcatDataset([...]), batch_sampler=...)`.

    Examples are numbered consecutively: task 0 has the numbers `0 .. N_0 - 1`, task 1 the next `N_1`, and so on. The
    examples of a task are drawn in random order, reshuffled once every example has been used, also across epochs: even
    a rarely drawn task eventually gets through all of its examples. Every batch is full, so a task with fewer examples
    than a batch repeats some of them in it.

    In a distributed run, give each process the same arguments, let `accelerate` distribute the batches in turn, and
    multiply `group_size` by the number of processes: then all processes train the same task in a step.

    Args:
        sizes: `N_i`, the number of training examples of each task, in order or by name.
        batch_size: Examples in a batch.
        strategy: A name in `STRATEGIES`, or a function with the signature of `Strategy`.
        mixed: Whether each *example* draws its task, rather than each group of batches.
        epochs: `E`, for strategies that change over the run.
        steps_per_epoch: Groups in an epoch. By default enough for all examples.
        group_size: Batches in an optimizer step (gradient accumulation). They have the same task.
        seed: Seed of the draws and of the order of the examples.
        lengths: For each task the lengths of its examples, in the form of `sizes`. Then the examples of a step have
            similar lengths: the random order of a task is sorted by length within stretches of 16 steps, and these
            steps are shuffled again. That saves most of the padding, and all processes of a distributed run take
            equally long.

    Raises:
        ConfigError: If a size is below 1, and for other invalid arguments.

    Examples:
        >>> sampler = MultiTaskBatchSampler({"rte": 3, "mrpc": 5}, 2, strategy="round_robin", steps_per_epoch=4)
        >>> [sorted({sampler.task_of(row) for row in batch}) for batch in sampler]
        [[0], [1], [0], [1]]
    """

    def __init__(
        self,
        sizes: Sequence[int] | Mapping[str, int],
        batch_size: int,
        *,
        strategy: str | Strategy = "proportional",
        mixed: bool = False,
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        group_size: int = 1,
        seed: int = 0,
        lengths: Sequence[Sequence[int] | np.ndarray] | Mapping[str, Sequence[int] | np.ndarray] | None = None,
    ) -> None:
        for argument, value in (("sizes", sizes), ("lengths", lengths or ())):
            if isinstance(value, (str, bytes)) or not isinstance(value, (Mapping, Sequence, np.ndarray)):
                raise ConfigError(f"{argument}={shown(value)} is not allowed: use a list, or a dict by task.")
        named = dict(sizes) if isinstance(sizes, Mapping) else {str(i): size for i, size in enumerate(sizes)}
        if not named:
            raise ConfigError("sizes is empty: give the number of examples of at least one task.")
        for name, size in named.items():
            require_int(f"sizes[{name}]", size, minimum=1)
        require_int("batch_size", batch_size, minimum=1)
        require_int("epochs", epochs, minimum=1)
        require_int("group_size", group_size, minimum=1)
        require_int("seed", seed, minimum=0)
        require_bool("mixed", mixed)
        if steps_per_epoch is not None:
            require_int("steps_per_epoch", steps_per_epoch, minimum=1)
        self.names = tuple(named)
        self.sizes = tuple(named.values())
        self.strategy = get_strategy(strategy)
        if self.strategy is uncertainty_candidates and mixed:
            raise ConfigError(
                "mixed=True has no effect for strategy='uncertainty', whose batches are always mixed: leave it out."
            )
        if lengths is not None and (mixed or self.strategy is uncertainty_candidates):
            raise ConfigError("lengths has no effect on batches that mix tasks: leave it out.")
        self.mixed = mixed
        self.batch_size = batch_size * (len(named) if self.strategy is uncertainty_candidates else 1)
        self.rows = batch_size
        self.epochs = epochs
        self.group_size = group_size
        self.steps_per_epoch = steps_per_epoch or self._steps()
        self.seed = seed
        self.drop_last = False
        self.epoch = 0
        self._offsets = np.cumsum([0, *self.sizes])
        self._first = 0
        self._at = 0
        # Examples of each task that earlier epochs used: one entry for each epoch, computed when first needed.
        self._taken = [np.zeros(len(named), dtype=np.int64)]
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._lengths = None if lengths is None else self._checked(lengths)

    @property
    def groups_by_length(self) -> bool:
        """Whether the examples of a step have similar lengths."""
        return self._lengths is not None

    def _checked(self, lengths: Any) -> list[np.ndarray]:
        given = [lengths.get(n, ()) for n in self.names] if isinstance(lengths, Mapping) else list(lengths)
        arrays = [np.asarray(row) for row in given]
        if tuple(map(len, arrays)) != self.sizes:
            raise ConfigError(f"lengths has {[*map(len, arrays)]} entries for tasks of {[*self.sizes]} examples.")
        return arrays

    def _steps(self) -> int:
        step = self.rows * self.group_size
        if self.strategy is uncertainty_candidates:
            # CA-MTL: the batches of the largest task, times the number of tasks
            return max(math.ceil(size / step) for size in self.sizes) * len(self.sizes)
        return math.ceil(sum(self.sizes) / step)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.steps_per_epoch * self.group_size

    def set_epoch(self, epoch: int) -> None:
        """Moves to the start of an epoch, counted from 0 as in `Trainer` and `accelerate`."""
        require_int("epoch", epoch, minimum=0)
        self.epoch = epoch
        self._first = self._at = 0

    def state_dict(self) -> dict[str, int]:
        """The position in the sequence: the epoch, and how many of its batches were yielded."""
        return {"epoch": self.epoch, "batch": self._at}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continues from the `state_dict` of a sampler with the same arguments."""
        self.set_epoch(state["epoch"])
        self._first = self._at = state["batch"]

    def task_of(self, row: int) -> int:
        """Number of the task that an example belongs to."""
        return int(np.searchsorted(self._offsets, row, side="right")) - 1

    def probabilities(self, epoch: int | None = None) -> np.ndarray:
        """Probability of each task in an epoch, counted from 0: `[t]`."""
        number = (self.epoch if epoch is None else epoch) + 1
        # A run that continues beyond its epochs stays at the end of the schedule.
        return probabilities(self.strategy, self.sizes, min(number, self.epochs), self.epochs)

    def draws(self, epoch: int | None = None) -> np.ndarray:
        """Tasks in the order of the draws: one for each step `[steps]`, or for each example if mixed `[steps, b]`."""
        epoch = self.epoch if epoch is None else epoch
        tasks = len(self.sizes)
        shape: tuple[int, ...] = (self.steps_per_epoch,)
        if self.strategy is uncertainty_candidates:
            row = np.repeat(np.arange(tasks), self.rows)
            return np.tile(np.tile(row, self.group_size), (self.steps_per_epoch, 1))
        if self.mixed:
            shape = (self.steps_per_epoch, self.rows * self.group_size)
        count = math.prod(shape)
        if self.strategy is round_robin:
            return ((epoch * count + np.arange(count)) % tasks).reshape(shape)
        generator = np.random.default_rng([self.seed, 0, epoch])
        return generator.choice(tasks, size=shape, p=self.probabilities(epoch))

    def __iter__(self) -> Iterator[list[int]]:
        draws = self.draws()
        position = self._taken_before(self.epoch).copy()
        first, self._first = self._first, 0
        rows = self.rows * self.group_size
        for step, drawn in enumerate(draws):
            tasks = np.full(rows, drawn) if draws.ndim == 1 else drawn
            numbers = np.empty(len(tasks), dtype=np.int64)
            for task in np.unique(tasks):
                at = tasks == task
                numbers[at] = self._offsets[task] + self._take(int(task), int(position[task]), int(at.sum()))
                position[task] += at.sum()
            for place, batch in enumerate(numbers.reshape(self.group_size, -1).tolist()):
                number = step * self.group_size + place
                if number >= first:
                    self._at = number + 1
                    yield batch

    def _taken_before(self, epoch: int) -> np.ndarray:
        """Examples of each task that earlier epochs used `[t]`."""
        while len(self._taken) <= epoch:
            draws = self.draws(len(self._taken) - 1)
            counts = np.bincount(draws.ravel(), minlength=len(self.sizes))
            if draws.ndim == 1:
                counts = counts * self.rows * self.group_size
            self._taken.append(self._taken[-1] + counts)
        return self._taken[epoch]

    def _take(self, task: int, position: int, count: int) -> np.ndarray:
        """The next examples of a task, from its endless sequence of random orders."""
        parts = []
        while count:
            number, start = divmod(position, self.sizes[task])
            part = self._order(task, number)[start : start + count]
            parts.append(part)
            position, count = position + len(part), count - len(part)
        return np.concatenate(parts)

    def _order(self, task: int, number: int) -> np.ndarray:
        known = self._orders.get(task)
        if known is None or known[0] != number:
            generator = np.random.default_rng([self.seed, 1, task, number])
            order = generator.permutation(self.sizes[task])
            if self._lengths is not None:
                order = self._grouped(task, number, order, generator)
            known = self._orders[task] = (number, order)
        return known[1]

    def _grouped(self, task: int, number: int, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Brings examples of similar length together in the steps that this pass over the task is cut into."""
        assert self._lengths is not None
        step = self.rows * self.group_size
        # A pass may begin inside a step; its first and last steps are shared with the neighbouring passes.
        begin = -number * len(order) % step
        inner = order[begin : begin + max(len(order) - begin, 0) // step * step]
        for start in range(0, len(inner), _STRETCH * step):
            part = inner[start : start + _STRETCH * step]  # a view: sorts `order`
            part[:] = part[np.argsort(self._lengths[task][part], kind="stable")]
        inner[:] = generator.permutation(inner.reshape(-1, step)).ravel()
        return order
