"""Describes a method for the tests: one record, from which every test matrix is built.

The record of a method is `RECORDS` in `tests/methods/<name>/record.py`, which is discovered automatically
(`tests.methods`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import pal_adapters  # noqa: F401  (registers methods with each host that is installed)
from pal_adapters.blocks.sites import Block, BlockSites
from pal_adapters.hosts.method import REGISTERED, Method, Options, filled
from pal_adapters.nn.unit import TaskUnit

from .plain import Weights


class Values(NamedTuple):
    """What a reference may read in one block.

    Attributes:
        x: `[b, n, d]`, what self-attention reads: the block's input, normalised in pre-LN blocks.
        raw: `[b, n, d]`, the block's input.
        h: `[b, n, d]`, the feed-forward input.
        keep: `[b or 1, 1, n, n]`, True where a token (second to last dimension) sees another (last dimension).
        post: whether the block is post-LN.
    """

    x: Tensor
    raw: Tensor
    h: Tensor
    keep: Tensor
    post: bool


class Reference:
    """What a method computes at each site of a block, in plain torch. Override the sites where it acts.

    Args:
        options: the method's options, defaults included.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        self.options = options

    def attention(self, w: Weights, o1: Tensor, values: Values | None = None) -> Tensor:
        """The attention output before the residual sum."""
        return o1

    def ffn(self, w: Weights, o2: Tensor, values: Values) -> Tensor:
        """The feed-forward output before the residual sum."""
        return o2

    def term(self, w: Weights, values: Values) -> Tensor | float:
        """What is added to the sum that ends the block."""
        return 0.0

    def output(self, w: Weights, y: Tensor, values: Values) -> Tensor:
        """The block's output."""
        return y

    def top(self, w: Weights, y: Tensor, keep: Tensor) -> Tensor:
        """The output of the stack."""
        return y

    @classmethod
    def changes(cls, place: str) -> bool:
        """Whether the method does anything there."""
        return getattr(cls, place) is not getattr(Reference, place)


def _build(options: Options, block: Block) -> TaskUnit:
    """The unit of a block as a host would build it, with what it shares."""
    options = filled(options, options.method.prepare(options, [block], 10_000))
    unit = options.method.build(options, block)
    assert unit is not None
    shared = options.method.build_shared(options, block)
    if shared is not None:
        unit.share(shared)
    unit.source = () if shared is None else (shared,)  # keeps it alive and shows its gradients
    return unit


@dataclass(frozen=True)
class Record:
    """One method.

    Attributes:
        options_class: the dataclass of its options.
        reference: the method in plain torch.
        options: small values, for blocks of width 12 and more.
        wider: changes of `options` that give weights of other shapes; empty where there are none.
        variants: changes of `options` that compute something else with other weights or without.
        changes: values other than the defaults, which a saved config must keep.
        counts: parameters of one task on BERT-base and BERT-large, by hand from the formula, for options.
        together: changes with which two adapters can be active together.
        parts: how many modules PEFT adds to a model, given its number of blocks.
        at_top: whether it acts on the output of a stack alone.
        attends: whether it mixes tokens, so that it needs the mask and, in generation, a cache.
        shares: whether blocks share weights.
        build: makes the unit of a block.
    """

    options_class: type[Options]
    reference: type[Reference]
    options: Mapping[str, Any] = field(default_factory=dict)
    wider: Mapping[str, Any] = field(default_factory=dict)
    variants: Sequence[Mapping[str, Any]] = ()
    changes: Mapping[str, Any] = field(default_factory=dict)
    counts: Sequence[tuple[Mapping[str, Any], int, int]] = ()
    together: Mapping[str, Any] = field(default_factory=dict)
    parts: Callable[[int], int] = field(default=lambda depth: depth)
    at_top: bool = False
    attends: bool = False
    shares: bool = False
    build: Callable[[Any, Block], TaskUnit] = _build

    @property
    def method(self) -> Method:
        return self.options_class.method

    @property
    def name(self) -> str:
        return self.method.name

    @property
    def has_dropout(self) -> bool:
        return any(f.name == "dropout" for f in fields(self.options_class))  # type: ignore[arg-type]

    def config_class(self, host: str) -> Any:
        """The config class of a host; None where the method is not for that host."""
        return REGISTERED[host].get(self.name)

    def config(self, host: str, **changes: Any) -> Any:
        """A small config of a host."""
        return self.config_class(host)(**{**self.options, **changes})

    def make_reference(self, **changes: Any) -> Reference:
        """The reference with these options, `options` and the defaults elsewhere."""
        made = self.options_class(**{**self.options, **changes})
        return self.reference({f.name: getattr(made, f.name) for f in fields(made)})  # type: ignore[arg-type]

    def unit(self, width: int, **changes: Any) -> TaskUnit:
        """The unit of the last block of a pre-LN stack, in evaluation mode and not initialised."""
        sites = BlockSites("pre", "attention", "attention", "ffn", "ffn", input_norm="norm")
        block = Block("layers.1", nn.Module(), sites, index=1, depth=2, stack=0, width=width)
        return self.build(self.options_class(**{**self.options, **changes}), block).eval()


def reset(unit: TaskUnit, *, identity: bool, seed: int | None = None) -> None:
    """Initialise a unit of `Record.unit` with what it shares."""
    for module in (unit, *unit.source):  # type: ignore[misc]
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        module.reset_parameters(identity=identity, generator=generator)
