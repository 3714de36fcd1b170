"""A head for each kind of task: from hidden states to logits and a loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pal_adapters.checks import LARGEST, require_int, require_one_of, require_probability, shown
from pal_adapters.errors import ConfigError

Kind = Literal[
    "single_label",
    "multi_label",
    "regression",
    "token_tagging",
    "span_qa",
    "multiple_choice",
    "language_modeling",
]
KINDS: tuple[str, ...] = get_args(Kind)

TOKEN_KINDS = ("token_tagging", "span_qa", "language_modeling")
"""Kinds whose heads read every token, so that there is nothing to pool."""

Pooling = Literal["mean", "first", "last", "pooler"]
POOLINGS: tuple[str, ...] = get_args(Pooling)

Loss = Callable[[Tensor, Tensor], Tensor]
"""A custom loss: the mean over a batch, from the logits and labels of one task."""

IGNORED = -100
"""The label of tokens that the loss ignores."""

_MOST_LABELS = 10_000_000


@dataclass(frozen=True)
class HeadConfig:
    """The configuration of a head. Shapes are for `b` examples of `n` tokens.

    | `kind` | logits | labels | loss |
    |---|---|---|---|
    | `single_label` | `[b, c]` | class `[b]` | cross-entropy |
    | `multi_label` | `[b, c]` | 0 or 1 `[b, c]` | binary cross-entropy, mean over classes |
    | `regression` | `[b]`, or `[b, c]` for `c > 1` | float, of the same shape | squared error |
    | `token_tagging` | `[b, n, c]` | class `[b, n]`, -100 is ignored | cross-entropy of the tokens |
    | `span_qa` | `[b, n, 2]` | first and last token `[b, 2]` | mean of the two cross-entropies |
    | `multiple_choice` | `[b, choices]` | index of the choice `[b]` | cross-entropy |
    | `language_modeling` | `[b, n, v]` | token `[b, n]`, -100 is ignored | cross-entropy of the next token |

    Args:
        kind: One of the above.
        num_labels: `c`; not allowed for the last three kinds.
        num_choices: Encoder inputs per example of `multiple_choice`. They are next to each other in the batch.
        pooling: How a head gets one vector per example: the mean over the tokens, the first token, the last
            token that is not padding (for decoders), or the output of the base model's own pooler. Not allowed for
            kinds whose heads read every token.
        dropout: Dropout probability before the linear layer.
        label_names: Names of the classes, numbers or choices, for model cards and predictions; not allowed for
            `span_qa` and `language_modeling`.
    """

    kind: Kind = "single_label"
    num_labels: int | None = None
    num_choices: int = 1
    pooling: Pooling = "mean"
    dropout: float = 0.1
    label_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_one_of("kind", self.kind, KINDS)
        require_one_of("pooling", self.pooling, POOLINGS)
        require_probability("dropout", self.dropout)
        if not isinstance(self.label_names, (list, tuple)) or not all(isinstance(n, str) for n in self.label_names):
            raise ConfigError(
                f"label_names={shown(self.label_names)} is not allowed: use a list of strings; in YAML, put them in "
                "quotes."
            )
        object.__setattr__(self, "label_names", tuple(self.label_names))
        twice = [name for number, name in enumerate(self.label_names) if name in self.label_names[:number]]
        if twice:
            raise ConfigError(f"label_names has {twice[0]!r} twice: give each class its own name.")
        if self.kind in ("span_qa", "multiple_choice", "language_modeling"):
            if self.num_labels is not None:
                raise _without_effect("num_labels", self.num_labels, self.kind)
        else:
            default = len(self.label_names) or (1 if self.kind == "regression" else None)
            object.__setattr__(self, "num_labels", default if self.num_labels is None else self.num_labels)
            minimum = 2 if self.kind in ("single_label", "token_tagging") else 1
            require_int("num_labels", self.num_labels, minimum=minimum, maximum=_MOST_LABELS)
        if self.kind == "multiple_choice":
            require_int("num_choices", self.num_choices, minimum=2, maximum=LARGEST)
        elif self.num_choices != 1 or isinstance(self.num_choices, bool):
            raise _without_effect("num_choices", self.num_choices, self.kind)
        if self.reads_tokens and self.pooling != "mean":
            raise _without_effect("pooling", self.pooling, self.kind)
        if self.label_names and self.kind in ("span_qa", "language_modeling"):
            raise _without_effect("label_names", self.label_names, self.kind)
        count = "num_choices" if self.kind == "multiple_choice" else "num_labels"
        if self.label_names and len(self.label_names) != getattr(self, count):
            raise ConfigError(f"label_names has {len(self.label_names)} names for {count}={getattr(self, count)}.")

    @property
    def outputs(self) -> int:
        """Outputs of the linear layer; 0 for a language model, which uses the base model's output layer."""
        return {"span_qa": 2, "multiple_choice": 1, "language_modeling": 0}.get(self.kind, self.num_labels or 0)

    @property
    def reads_tokens(self) -> bool:
        """Whether the head reads every token, rather than one vector per example."""
        return self.kind in TOKEN_KINDS


def _without_effect(name: str, value: object, kind: str) -> ConfigError:
    return ConfigError(f"{name}={shown(value)} has no effect for kind={kind!r}: leave it out.")


class Head(nn.Module):
    r"""Dropout and one linear layer, $W\,\mathrm{drop}(h) + b$ with `W: [outputs, d]`; see `HeadConfig`.

    The head of a language model has no weights of its own: it uses the base model's output layer or, if there is none,
    its input embeddings.

    Args:
        config: Its configuration.
        width: `d` of the base model.
        loss: A custom loss that replaces the kind's, see `Loss`. It is not saved.
    """

    def __init__(self, config: HeadConfig, width: int, *, loss: Loss | None = None) -> None:
        super().__init__()
        self.config = config
        self.own_loss = loss
        self.dropout = nn.Dropout(config.dropout)
        self.linear: nn.Linear | None = None
        if config.outputs:
            self.linear = nn.Linear(width, config.outputs)
            nn.init.normal_(self.linear.weight, std=0.02)
            nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor, vocabulary: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Logits, see `HeadConfig`.

        Args:
            hidden: `[r, d]` or, for heads that read every token, `[r, n, d]`; `r` is `b` times the number of choices.
            vocabulary: For a language model, maps hidden states to logits over the vocabulary `[r, n, v]`.
        """
        hidden = self.dropout(hidden)
        if self.linear is None:
            assert vocabulary is not None
            return vocabulary(hidden)
        logits = self.linear(hidden)
        if self.config.kind == "multiple_choice":
            return logits.view(-1, self.config.num_choices)
        if self.config.kind == "regression" and self.config.num_labels == 1:
            return logits.squeeze(-1)
        return logits

    def loss(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The summed loss and the number of items in it, see `count_items`: two scalars, in float32 or wider."""
        count = count_items(self.config.kind, labels)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        kind = self.config.kind
        if self.own_loss is not None:
            if (
                kind in ("token_tagging", "language_modeling") and not count
            ):  # the mean of an empty selection would be NaN
                return logits.flatten()[:0].sum(), count
            return self._mean(logits, labels) * count, count
        if kind == "regression":
            total = F.mse_loss(logits, labels.to(logits.dtype), reduction="sum")
            return total / (self.config.num_labels or 1), count
        if kind == "multi_label":
            total = F.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype), reduction="sum")
            return total / logits.shape[-1], count
        if kind == "span_qa":  # [b, n, 2] -> [b, 2, n]
            total = F.cross_entropy(logits.transpose(1, 2).flatten(0, 1), labels.flatten(), reduction="sum")
            return total / 2, count
        if kind == "language_modeling":
            logits, labels = logits[:, :-1], labels[:, 1:]
        if kind in ("token_tagging", "language_modeling"):
            logits, labels = logits.flatten(0, 1), labels.flatten()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum"), count

    def _mean(self, logits: Tensor, labels: Tensor) -> Tensor:
        """What the custom loss returns: a scalar that depends on the logits."""
        assert self.own_loss is not None
        loss = self.own_loss(logits, labels)
        if not isinstance(loss, Tensor) or loss.dim():
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
            raise ConfigError(f"loss returns {got}: return the mean over the batch, as a tensor without dimensions.")
        if logits.requires_grad and not loss.requires_grad:
            raise ConfigError("loss returns a value without gradient: compute it from the logits, without detach().")
        return loss


def count_items(kind: str, labels: Tensor) -> Tensor:
    """The number of items that a kind's loss averages over: examples, or tokens not ignored. A float32 scalar."""
    if kind == "token_tagging":
        return (labels != IGNORED).sum().float()
    if kind == "language_modeling":
        return (labels[:, 1:] != IGNORED).sum().float()
    return torch.full((), float(labels.shape[0]), device=labels.device)


def pool(hidden: Tensor, mask: Tensor | None, pooling: str, pooled: Tensor | None = None) -> Tensor:
    """One vector per encoder input, `[r, d]`, from the last hidden states `[r, n, d]`.

    Args:
        hidden: Last hidden states.
        mask: 1 for tokens, 0 for padding `[r, n]`; `None` is all ones.
        pooling: See `HeadConfig`.
        pooled: Output of the base model's pooler `[r, d]`.
    """
    if pooling == "pooler":
        if pooled is None:
            raise ConfigError("pooling='pooler' is not allowed: the base model has no pooler. Use 'mean' or 'first'.")
        return pooled
    if mask is None:
        mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)  # [r, n, 1]
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1)
    # Padding may be on either side.
    numbers = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    if pooling == "first":
        position = torch.where(mask > 0, numbers, mask.shape[1] - 1).amin(1)
    else:
        position = torch.where(mask > 0, numbers, 0).amax(1)
    return hidden[torch.arange(hidden.shape[0], device=hidden.device), position]
