"""What is known about one kind of transformer block: where task modules read and write, and how to recognise it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Literal

from pal_adapters.errors import ConfigError

_CHOICES = {
    "norm": ("pre", "post"),
    "residual_at": ("output", "input"),
    "mixing": ("attention", "recurrent", "local", "other"),
    "mask": ("kept", "hidden", "signed", "mapping"),
    "layout": ("tokens", "tokens_first", "channels_first", "packed", "grid", "streams"),
}


@dataclass(frozen=True)
class BlockSites:
    """Names the modules inside one kind of block that task modules read and write.

    With `h1` the residual stream after attention, `o1`, `o2` the outputs of attention and feed-forward:
    post-LN blocks compute `h1 = LN1(x + o1)`, `y = LN2(h1 + o2)`; pre-LN blocks `h1 = x + o1`, `y = h1 + o2`.

    Args:
        norm: `"post"` or `"pre"`, where the block's norms stand.
        attention: self-attention, called with the block's input (post-LN) or its normalised input (pre-LN); its call
            also shows the attention mask and the generation cache.
        attention_output: the module whose output is `o1`.
        ffn: the module whose input is the feed-forward input, `h1` or the norm of it.
        ffn_output: the module whose output is `o2`.
        output: the module whose output is `y`.
        residual: where a term is added to the sum `h1 + o2`. By default the output of `ffn_output`; a model that drops
            out or scales behind that module needs another place, or the term would be dropped out or scaled too.
        residual_at: whether `residual` names a module whose `"output"` or whose `"input"` is changed.
        input_norm: pre-LN: the norm in front of attention; `""` if attention reads the residual stream as it is.
        ffn_norm: pre-LN: the norm whose input is `h1`; `""` if the feed-forward part reads `h1` as it is. Only a
            bottleneck at the top of a network needs it, and where the block has one norm behind its attention, it is
            that one.
        mixing: how the module `attention` mixes tokens: `"attention"`; `"recurrent"` for a module without attention
            that reads earlier tokens only (a state space model, a gated delta rule, a causal convolution), beside
            which a module that attends sees the earlier tokens without padding; `"local"` for attention within parts
            of a text or an image (windows, pooled queries) that no mask shows; or `"other"` (a convolution, a state
            outside the generation cache). Beside the last two, a module that attends is rejected.
        mask: what the mask that `attention` gets says: `"kept"`, the usual forms (non-zero or True for tokens that are
            seen, or a term in the scores); `"hidden"`, True for tokens that are not seen; `"signed"`, negative for
            tokens that are not seen; or `"mapping"`, a mapping with the usual form under `"causal"`.
        layout: the form of the hidden states that the blocks pass on: `"tokens"`, `[b, n, d]`; `"tokens_first"`,
            `[n, b, d]`; `"channels_first"`, `[b, d, n]` or `[b, d, h, w]`; `"packed"`, the tokens of several sequences
            as `[n, d]`; `"grid"`, the tokens of an image in two dimensions; or `"streams"`, several residual streams
            or orders of the tokens. A network that steers the blocks needs tokens.
    """

    norm: Literal["pre", "post"]
    attention: str
    attention_output: str
    ffn: str
    ffn_output: str
    output: str = ""
    residual: str | None = None
    residual_at: Literal["output", "input"] = "output"
    input_norm: str | None = None
    ffn_norm: str | None = None
    mixing: Literal["attention", "recurrent", "local", "other"] = "attention"
    mask: Literal["kept", "hidden", "signed", "mapping"] = "kept"
    layout: Literal["tokens", "tokens_first", "channels_first", "packed", "grid", "streams"] = "tokens"

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                choices = " or ".join(filter(None, (", ".join(map(repr, allowed[:-1])), repr(allowed[-1]))))
                raise ConfigError(f"{name}={value!r} is not allowed: use {choices}.")
        if self.norm == "pre" and self.input_norm is None:
            raise ConfigError(
                "input_norm=None is not allowed with norm='pre': name the norm in front of attention, or '' if "
                "there is none."
            )

    @property
    def shows_tokens(self) -> bool:
        """Whether a module that attends can know which tokens the block sees."""
        return self.mixing in ("attention", "recurrent")

    @property
    def residual_path(self) -> str:
        return self.ffn_output if self.residual is None else self.residual

    def paths(self) -> list[str]:
        """Every path that has to exist in a block."""
        paths = [self.attention, self.attention_output, self.ffn, self.ffn_output, self.output, self.residual_path]
        return paths + [path for path in (self.input_norm, self.ffn_norm) if path]

    def to_dict(self) -> dict[str, str]:
        return {k: v for k, v in asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Structure:
    """One row of the table.

    Attributes:
        models: the models with such blocks.
        children: names of all direct children; those in brackets may be missing.
        sites: where the sites are in such a block.
        inner: paths below the children that must exist too.
        classes: names of the block classes, if other classes have the same children and compute something else.
        flags: attributes of the block with their value or a child's class, if one class computes two things.
        scales: parameters and numbers of the block that `sites` accounts for.
    """

    models: str
    children: str
    sites: BlockSites
    inner: str = ""
    classes: tuple[str, ...] = ()
    flags: dict[str, object] = field(default_factory=dict)
    scales: tuple[str, ...] = ()

    @cached_property
    def required(self) -> frozenset[str]:
        return frozenset(name for name in self.children.split() if not name.startswith("["))

    @cached_property
    def known(self) -> frozenset[str]:
        return frozenset(name.strip("[]") for name in self.children.split())
