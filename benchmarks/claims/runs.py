"""Runs the pieces of a claim: sources first, learning rates with the first seed, then the other seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .options import ClaimsOptions
from .pieces import Pieces, Result, key_of
from .plans import Group, Line
from .recipes import RECIPES, host_for

Run = Callable[[dict[str, Any], Sequence[dict[str, Any]]], Result]


class Runs:
    """The runs of all groups.

    A learning rate is chosen for each group by the score on the held-out part of its training set, with the same
    number of tries for every recipe. The chosen try is the run with the first seed.

    Args:
        args: The options.
        pieces: The pieces.
        base: What the settings say of the base model.
        digest: What the settings say of the examples of a task.
        run: Trains a piece with given settings and those of its sources.
    """

    def __init__(
        self, args: ClaimsOptions, pieces: Pieces, base: dict[str, Any], digest: Callable[[str], str], run: Run
    ) -> None:
        self.args = args
        self.pieces = pieces
        self._base = base
        self._digest = digest
        self._run = run

    def settings(self, group: Group, rate: float, seed: int) -> dict[str, Any]:
        """The settings of one piece."""
        recipe = RECIPES[group.recipe]
        found = {
            "recipe": group.recipe,
            "tasks": list(group.tasks),
            "data": {name: self._digest(name) for name in group.tasks},
            "shots": group.shots,
            "learning_rate": rate,
            "seed": seed,
            "host": host_for(group.recipe, self.args.host),
            "training": recipe.training,
            "base": self._base,
            **self.args.settings(),
        }
        if recipe.combination is not None:
            found["sources"] = {one["tasks"][0]: key_of(one) for one in self.sources(group)}
        return found

    def sources(self, group: Group) -> list[dict[str, Any]]:
        """The settings of a combination's sources. With few examples, the target itself is not a source."""
        if RECIPES[group.recipe].combination is None:
            return []
        names = [name for name in self.args.sources if group.shots is None or name not in group.tasks]
        return [self.settings(Group("source", (name,)), RECIPES["source"].rates[0], 0) for name in names]

    def get(self, group: Group, rate: float, seed: int) -> Result | None:
        """The result of one piece, run if need be; `None` if the budget is spent."""
        sources = self.sources(group)
        for source in sources:
            if self.pieces.get(source, lambda source=source: self._run(source, [])) is None:
                return None
        settings = self.settings(group, rate, seed)
        return self.pieces.get(settings, lambda: self._run(settings, sources))

    def tries(self, group: Group) -> dict[float, Result]:
        """The results with the first seed, by learning rate; fewer than planned if the budget is spent."""
        found = {rate: self.get(group, rate, 0) for rate in RECIPES[group.recipe].rates[: self.args.tries]}
        return {rate: result for rate, result in found.items() if result is not None}

    def rate(self, group: Group) -> float | None:
        """The learning rate with the best held-out score; `None` if not all were tried."""
        tried = self.tries(group)
        if len(tried) < min(self.args.tries, len(RECIPES[group.recipe].rates)):
            return None
        return max(tried, key=lambda rate: tried[rate]["dev"])

    def seeds(self, group: Group, count: int) -> list[Result]:
        """The results with the chosen learning rate for the first seeds, up to the first that is missing."""
        rate, found = self.rate(group), []
        for seed in range(count if rate is not None else 0):
            result = self.get(group, rate, seed)
            if result is None:
                break
            found.append(result)
        return found

    def work(self, lines: Sequence[Line]) -> None:
        """Runs the lines in their order with one seed, then with two, and so on."""
        for count in range(1, self.args.seeds + 1):
            for line in lines:
                for _, *pair in line.cells():
                    for group in pair:
                        self.seeds(group, count)

    def planned(self, group: Group) -> list[dict[str, Any]]:
        """The settings of all pieces of a group. Before the rate is chosen, the first one stands for it."""
        rates = RECIPES[group.recipe].rates[: self.args.tries]
        rate = self.rate(group) or rates[0]
        later = [self.settings(group, rate, seed) for seed in range(1, self.args.seeds)]
        return [*self.sources(group), *(self.settings(group, one, 0) for one in rates), *later]
