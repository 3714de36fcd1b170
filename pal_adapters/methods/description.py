"""What each method would do to a model, without adding anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from pal_adapters.blocks import signatures
from pal_adapters.blocks.norms import full_norms
from pal_adapters.blocks.sites import Block, resolve
from pal_adapters.blocks.survey import missed, survey
from pal_adapters.checks import MODEL
from pal_adapters.errors import SiteError
from pal_adapters.hooks.attention_bias import refusal
from pal_adapters.hosts.method import REGISTERED

_SCORED = ("attention", "local")  # blocks with attention scores


@dataclass(frozen=True)
class StackSites:
    """What is known about the blocks of one class in one list of a model.

    Attributes:
        path: the path of the list, such as `"model.layers"`.
        block: the class of the blocks.
        names: the paths of the blocks.
        kind: `"pre-LN"`, `"post-LN"`, or `"unknown"`; methods skip blocks of unknown kind.
        width: `d`, or 0 if the kind is unknown.
        methods: what each method would do there: `"adapts"`, or the reason why not.
    """

    path: str
    block: str
    names: tuple[str, ...]
    kind: str
    width: int
    methods: dict[str, str]


@dataclass(frozen=True)
class SitesTable:
    """The stacks of a model; iterate over it, or print it."""

    model: str
    stacks: tuple[StackSites, ...]

    def __iter__(self) -> Iterator[StackSites]:
        return iter(self.stacks)

    def __len__(self) -> int:
        return len(self.stacks)

    def __str__(self) -> str:
        rows = [("stack", "block", "blocks", "kind", "width")]
        rows += [(s.path, s.block, str(len(s.names)), s.kind, str(s.width or "-")) for s in self.stacks]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        for stack in self.stacks:
            verdicts: dict[str, list[str]] = {}
            for method, verdict in stack.methods.items():
                verdicts.setdefault(verdict, []).append(method)
            lines.append(f"\n{stack.path} ({stack.block})")
            lines += [f"  {', '.join(methods)}: {verdict}" for verdict, methods in verdicts.items()]
        return "\n".join([self.model, *lines])


def describe_sites(model: nn.Module) -> SitesTable:
    """List the blocks of a model and what each method would do with them. Changes nothing.

    Args:
        model: a model of transformers, with or without adapters.

    Returns:
        A table with one `StackSites` for each class of blocks in each list.

    Example:
        ```python
        print(pal_adapters.describe_sites(model))
        ```
    """
    MODEL("model", model)
    stacks = survey(model)
    known = [stack for stack in stacks if stack.blocks]
    lists = {block.stack for stack in known for block in stack.blocks}
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    entries = []
    for stack in known:
        first = stack.blocks[0]
        together = [block for other in known if other.path == stack.path for block in other.blocks]
        network = _network(together, implementation, several=len(lists) > 1)
        windows = "rejected: a module that attends cannot be added to these blocks"
        methods = _methods("adapts", network, "adapts" if first.sites.shows_tokens else windows)
        names = tuple(block.name for block in stack.blocks)
        kind = f"{first.sites.norm}-LN"
        entries.append(StackSites(stack.path, stack.block, names, kind, first.width, methods))
    for stack in missed(stacks):
        why = "not reached: the structure of the blocks is not known, name their sites"
        entries.append(StackSites(stack.path, stack.block, stack.names, "unknown", 0, _methods(why, why, why)))
    return SitesTable(type(model).__name__, tuple(entries))


def _methods(single: str, network: str, attending: str) -> dict[str, str]:
    """What each registered method would do: those for one task, networks for many, and those that attend."""
    classes = {name: config.method for host in REGISTERED.values() for name, config in host.items()}
    return {
        name: network if method.network else attending if method.attends else single
        for name, method in sorted(classes.items())
    }


def _network(blocks: list[Block], implementation: str | None, *, several: bool) -> str:
    """The verdict on a network in the blocks of one list."""
    if several:
        return "rejected: the model has several stacks of blocks; a network steers one, in PEFT that of target_modules"
    first = blocks[0]
    if len(blocks) != first.depth:
        return "rejected: a network steers all blocks of a stack, and the structure of some is not known"
    if first.sites.layout != "tokens":
        return "rejected: its blocks do not pass on hidden states of [batch, tokens, width]"
    for block in blocks:
        attention = resolve(block.module, block.sites.attention)
        if block.sites.mixing not in _SCORED or attention is None:
            continue
        reason = refusal(attention, block.sites, signatures.positions_of(attention), implementation)
        if reason is not None:
            return f"rejected: {reason}; adapts with attention_layers=[]"
    try:
        full_norms(blocks[-1])
    except SiteError as error:
        return f"rejected: {error}"
    return "adapts"
