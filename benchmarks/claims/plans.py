"""The claims as comparisons: what each says, what the paper reports, and which runs decide it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .options import ClaimsOptions


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but their learning rate and their seed.

    Args:
        recipe: See `recipes.RECIPES`.
        tasks: The tasks that are trained together.
        shots: Training examples of each class; `None` for all.
    """

    recipe: str
    tasks: tuple[str, ...]
    shots: int | None = None


@dataclass(frozen=True)
class Line:
    """A line of the table: the scores of `left` minus those of `right` are at least `least` points.

    Args:
        name: Its name in commands and files.
        says: The claim.
        paper: What the paper reports, with its setting.
        least: The least difference, in points, with which the claim holds.
        left: The runs of the recipe that the claim is about.
        right: The runs that it is compared with.
        task: The only task that counts; by default all.
    """

    name: str
    says: str
    paper: str
    least: float
    left: tuple[Group, ...]
    right: tuple[Group, ...]
    task: str | None = None

    def cells(self) -> list[tuple[str, Group, Group]]:
        """Each task with the two groups that have it."""
        found = []
        for left in self.left:
            for task in left.tasks:
                if self.task in (None, task):
                    (right,) = (one for one in self.right if task in one.tasks and one.shots == left.shots)
                    found.append((task, left, right))
        return found


def houlsby(args: ClaimsOptions) -> list[Line]:
    copies, ours = (_single(recipe, args.houlsby_tasks) for recipe in ("full", "houlsby"))
    return [
        Line(
            "houlsby",
            "Houlsby bottlenecks with 3.6 % of the parameters are within 0.4 points of full fine-tuning",
            "-0.4 (80.0, 80.4; GLUE test, BERT-large)",
            -0.4, ours, copies,
        )
    ]  # fmt: skip


def pals(args: ClaimsOptions) -> list[Line]:
    copies, tasks = _single("full", args.joint_tasks), tuple(args.joint_tasks)
    annealed, proportional = (Group("pals", tasks),), (Group("pals_proportional", tasks),)
    lines = [
        Line(
            "pals",
            "PALs trained jointly with the base are level with a fine-tuned copy per task",
            "+0.8 (80.4, 79.6; GLUE test, BERT-base, eight tasks, a seventh of the parameters)",
            0.0, annealed, copies,
        ),
        Line(
            "pals_sampling",
            "annealed sampling is at least as good as proportional sampling",
            "annealed is the best of its samplings (GLUE dev, BERT-base)",
            0.0, annealed, proportional,
        ),
    ]  # fmt: skip
    if "rte" in tasks:
        says = "PALs trained jointly improve RTE over a fine-tuned copy"
        lines.insert(1, Line("pals_rte", says, "up (GLUE, BERT-base)", 0.0, annealed, copies, "rte"))
    return lines


def scalearn(args: ClaimsOptions) -> list[Line]:
    def groups(recipe: str, shots: int | None) -> tuple[Group, ...]:
        return tuple(Group(recipe, (target,), shots) for target in args.targets)

    few, whole = [], []
    for shots in () if args.whole_only else args.shots:
        few.append(
            Line(
                f"scalearn_{shots}",
                f"ScaLearn is at or above AdapterFusion with {shots} examples of each class",
                "at or above (its few-shot figures are not at hand)",
                0.0, groups("scalearn", shots), groups("fusion", shots),
            )
        )  # fmt: skip
        few.append(
            Line(
                f"uniform_pp_{shots}",
                f"ScaLearnUniform++ is within a point of ScaLearn with {shots} examples of each class",
                "close (its few-shot figures are not at hand)",
                -1.0, groups("scalearn_uniform_pp", shots), groups("scalearn", shots),
            )
        )  # fmt: skip
    if not args.few_shot_only:
        ours, fusion, smallest = (groups(name, None) for name in ("scalearn", "fusion", "scalearn_uniform_pp"))
        whole = [
            Line(
                "scalearn",
                "ScaLearn is at or above AdapterFusion with 0.35 % of its parameters",
                "+0.35 (GLUE), +1.95 (SuperGLUE; RoBERTa-base)",
                0.0, ours, fusion,
            ),
            Line(
                "uniform_pp",
                "ScaLearnUniform++, with one number per source, is within a point of ScaLearn",
                "-0.22 (GLUE), -0.62 (SuperGLUE; RoBERTa-base)",
                -1.0, smallest, ours,
            ),
        ]  # fmt: skip
    return whole + few


def ca_mtl(args: ClaimsOptions) -> list[Line]:
    copies, tasks = _single("full", args.joint_tasks), tuple(args.joint_tasks)
    plain, uncertain = (Group("ca_mtl", tasks),), (Group("ca_mtl_uncertainty", tasks),)
    return [
        Line(
            "ca_mtl",
            "CA-MTL is above a fine-tuned copy per task",
            "+1.3 (80.9, 79.6; GLUE test, BERT-base, with MT-uncertainty)",
            0.0, plain, copies,
        ),
        Line(
            "mt_uncertainty",
            "MT-uncertainty improves CA-MTL",
            "+0.91 with 66.3 % of the data (84.03, 83.12; GLUE dev, BERT-base)",
            0.0, uncertain, plain,
        ),
    ]  # fmt: skip


PLANS: dict[str, Callable[[ClaimsOptions], list[Line]]] = {
    "houlsby": houlsby, "pals": pals, "scalearn": scalearn, "ca_mtl": ca_mtl,
}  # fmt: skip
"""The lines of each claim, in the order in which they run."""


def _single(recipe: str, tasks: list[str]) -> tuple[Group, ...]:
    return tuple(Group(recipe, (task,)) for task in tasks)
