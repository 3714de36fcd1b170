"""What CA-MTL adds to one Transformer block. Plain torch; the host bindings attach it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pal_adapters.nn.unit import BatchTasks, TaskUnit, UnitInputs, Weights, key_of

from .alone import task_table
from .attention import ConditionalAttentionBias
from .bottleneck import ConditionalBottleneck, side_stream
from .film import Condition
from .norm import ConditionalLayerNorm, ConditionalNorm
from .task import align, transformed


class ConditionalBlock(TaskUnit):
    """The conditional modules of one block; the weights that all blocks share are in `TaskConditions` (see `share`).

    Args:
        size: `d`.
        max_length: `n_max` of the attention term; None for a block without one.
        attention_modulation: see `ConditionalAttentionBias`.
        freeze_attention_film: do not train the attention term's FiLM, an oversight of the released code.
        norms: names of the block's norms that become conditional.
        modulate_bias: see `ConditionalNorm`.
        bottlenecks: how many bottlenecks this block holds: one at the top, as many as blocks at the end of a side
            stream (in the last block), none elsewhere.
        bottleneck_size: see `ConditionalBottleneck`.
        closing_norm: the norm after a bottleneck at the top: its own (`"own"`), the host's final norm made
            conditional (`"final"`), or none.
    """

    is_network = True

    def __init__(
        self,
        size: int,
        *,
        max_length: int | None = None,
        attention_modulation: Literal["columns", "matrix"] = "columns",
        freeze_attention_film: bool = False,
        norms: Iterable[str] = (),
        modulate_bias: bool = False,
        bottlenecks: int = 0,
        bottleneck_size: int | None = None,
        closing_norm: Literal["own", "final", "none"] = "none",
    ) -> None:
        super().__init__()
        norms = tuple(norms)
        self.attention: ConditionalAttentionBias | None = None
        if max_length is not None:
            self.attention = ConditionalAttentionBias(size, max_length, modulation=attention_modulation)
        self.freeze_attention_film = freeze_attention_film
        self.norms = nn.ModuleDict(
            {key_of(path): ConditionalNorm(size, modulate_bias=modulate_bias) for path in norms}
        )
        self.bottlenecks = nn.ModuleList(ConditionalBottleneck(size, bottleneck_size) for _ in range(bottlenecks))
        self.closing_norm: ConditionalNorm | None = None
        if closing_norm != "none":
            kind = ConditionalLayerNorm if closing_norm == "own" else ConditionalNorm
            self.closing_norm = kind(size, modulate_bias=modulate_bias)
        self.norm_paths = norms
        self.acts_at_top = bottlenecks == 1 and closing_norm != "none"
        self.acts_in_stream = bottlenecks > 0 and closing_norm == "none"
        # The adapter's trained copies of pretrained weights, in this block and outside all blocks, and where the
        # originals are. The host binding fills them.
        self.base = nn.ParameterDict()
        self.outer = nn.ParameterDict()
        self.slots: tuple[Any, Any] = ({}, {})
        # What it trains of the pretrained weights themselves, instead of copies (`hooks.in_place`).
        self.in_place: Any = None
        # Embeddings of tasks that train alone, see `train_alone`: registered in the network's first unit, read by all.
        self.task_vectors = nn.ParameterDict()
        self.alone: tuple[nn.ParameterDict, ...] = ()
        self.table: tuple[nn.Parameter, ...] = ()

    def reset_parameters(self, *, identity: bool, generator: torch.Generator | None = None) -> None:
        """Initialise each module; `identity` leaves the base model unchanged, except for bottlenecks."""
        modules = [self.attention, *self.norms.values(), *self.bottlenecks, self.closing_norm]
        for module in modules:
            if module is not None:
                module.reset_parameters(identity=identity, generator=generator)

    @property
    def has_attention(self) -> bool:
        """Whether there is a term in the attention scores."""
        return self.attention is not None

    @property
    def has_final_norm(self) -> bool:
        """Whether the host's final norm is conditional."""
        return self.closing_norm is not None and not isinstance(self.closing_norm, ConditionalLayerNorm)

    def mark_frozen(self) -> None:
        """Freeze what does not train even while its adapter does."""
        if self.freeze_attention_film and self.attention is not None:
            self.attention.film.requires_grad_(False)

    def condition(self, batch: BatchTasks) -> Condition:
        """`z'` of a batch."""
        return transformed(self._task_weights(), batch)

    def align(self, x: Tensor, batch: BatchTasks) -> Tensor:
        """The aligned input of the first block, `[b, n, d]`."""
        return align(self._task_weights(), x, batch)

    def _task_weights(self) -> dict[str, Tensor]:
        weights = self.shared_weights()
        if self.alone:
            weights["task_embedding"] = task_table(weights["task_embedding"], self.alone)
        return weights

    def attention_bias(self, batch: BatchTasks, queries: Tensor, keys: Tensor, total: int) -> Tensor:
        """The term in the attention scores, `[b, 1, q, k]` or `[1, 1, q, k]`; see `ConditionalAttentionBias`."""
        assert self.attention is not None
        condition = self.condition(batch)
        term: Tensor = self.attention(condition, queries, keys, total)
        return (condition.rows(term) if queries.shape[0] == 1 else term).unsqueeze(1)

    def norm(
        self, path: str, y: Tensor, x_hat: Tensor, weight: Tensor, bias: Tensor | None, batch: BatchTasks
    ) -> Tensor:
        """The conditional form of the block's norm `path`; see `ConditionalNorm`."""
        return self.norms[key_of(path)](y, x_hat, weight, bias, self.condition(batch))

    def top(self, y: Tensor, h: Tensor, eps: float, batch: BatchTasks) -> Tensor:
        """`CB(z', y) + h` after the top block's output `y`, and the bottleneck's own norm if it has one."""
        condition = self.condition(batch)
        value = self.bottlenecks[0](y, condition) + h
        if isinstance(self.closing_norm, ConditionalLayerNorm):
            value = self.closing_norm.norm(value, eps, condition)
        return value

    def final_norm(self, y: Tensor, x_hat: Tensor, weight: Tensor, bias: Tensor | None, batch: BatchTasks) -> Tensor:
        """The host's final norm in its conditional form; see `ConditionalNorm`."""
        assert self.closing_norm is not None
        return self.closing_norm(y, x_hat, weight, bias, self.condition(batch))

    def stream(self, outputs: list[Tensor], batch: BatchTasks) -> Tensor:
        """The final value of the side stream over the outputs of all blocks."""
        return side_stream(list(self.bottlenecks), outputs, self.condition(batch))  # type: ignore[arg-type]

    def forward(self, site: str, value: Tensor, inputs: UnitInputs, weights: Weights) -> Tensor:
        raise NotImplementedError("a conditional block acts at more places than a task module; see its methods.")
