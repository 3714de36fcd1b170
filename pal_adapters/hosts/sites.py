"""Where task modules attach in a Hugging Face model: found from the structure of its blocks, or named by the user.

Knows no method and neither host. A *block* is one transformer layer; a *stack* is the `nn.ModuleList` that holds
blocks. Paths are attribute paths inside a block, with indices for lists (`"layer.-1.dropout"`); `""` is the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import nn

from ..errors import ConfigError, SiteError


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
        residual: where a term is added to the sum `h1 + o2`. By default the output of `ffn_output`; a model with
            functional dropout needs another place, else the term would be dropped out.
        residual_at: whether `residual` names a module whose `"output"` or whose `"input"` is changed.
        input_norm: pre-LN: the norm in front of attention.
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

    def __post_init__(self) -> None:
        if self.norm not in ("pre", "post"):
            raise ConfigError(f"norm={self.norm!r} is not allowed: use 'pre' or 'post'.")
        if self.residual_at not in ("output", "input"):
            raise ConfigError(f"residual_at={self.residual_at!r} is not allowed: use 'output' or 'input'.")
        if self.norm == "pre" and self.input_norm is None:
            raise ConfigError("input_norm=None is not allowed with norm='pre': name the norm in front of attention.")

    @property
    def residual_path(self) -> str:
        return self.ffn_output if self.residual is None else self.residual

    def paths(self) -> list[str]:
        """Every path that has to exist in a block."""
        paths = [self.attention, self.attention_output, self.ffn, self.ffn_output, self.output, self.residual_path]
        return paths + ([self.input_norm] if self.input_norm else [])

    def to_dict(self) -> dict[str, str]:
        return {k: v for k, v in asdict(self).items() if v is not None}


_FUNCTIONAL_DROPOUT = dict(attention="self_attn", attention_output="self_attn", ffn="fc1", ffn_output="fc2")

# A block has these sites when it has these attributes; the first row that fits is taken. BART and mBART have equal
# attributes but other norms, hence the class names.
_STRUCTURES: tuple[tuple[tuple[str, ...], BlockSites, tuple[str, ...]], ...] = (
    (  # bert, roberta, xlm-roberta, electra, deberta, deberta-v2, camembert, ...
        ("attention.output.LayerNorm", "attention.output.dropout", "intermediate", "output.LayerNorm", "output.dropout"),
        BlockSites(
            "post", "attention", "attention.output.dropout", "intermediate", "output.dropout", output="output"
        ),
        (),
    ),
    (  # mpnet
        ("attention.LayerNorm", "attention.dropout", "intermediate", "output.LayerNorm", "output.dropout"),
        BlockSites("post", "attention", "attention.dropout", "intermediate", "output.dropout", output="output"),
        (),
    ),
    (  # distilbert
        ("attention", "sa_layer_norm", "ffn", "output_layer_norm"),
        BlockSites("post", "attention", "attention", "ffn", "ffn", output="output_layer_norm"),
        (),
    ),
    (  # albert
        ("attention.output_dropout", "attention.LayerNorm", "ffn", "ffn_output", "full_layer_layer_norm"),
        BlockSites(
            "post", "attention", "attention.output_dropout", "ffn", "ffn_output", output="full_layer_layer_norm"
        ),
        (),
    ),
    (  # modernbert
        ("attn_norm", "attn", "mlp_norm", "mlp"),
        BlockSites("pre", "attn", "attn", "mlp", "mlp", input_norm="attn_norm"),
        (),
    ),
    (  # t5 and its relatives
        ("layer.0.SelfAttention", "layer.0.layer_norm", "layer.0.dropout", "layer.-1.DenseReluDense", "layer.-1.dropout"),
        BlockSites(
            "pre",
            "layer.0.SelfAttention",
            "layer.0.dropout",
            "layer.-1.DenseReluDense",
            "layer.-1.dropout",
            input_norm="layer.0.layer_norm",
        ),
        (),
    ),
    (  # gpt2
        ("ln_1", "attn", "ln_2", "mlp"),
        BlockSites("pre", "attn", "attn", "mlp", "mlp", input_norm="ln_1"),
        (),
    ),
    (  # gemma2, gemma3: a norm stands behind each branch
        ("input_layernorm", "self_attn", "pre_feedforward_layernorm", "mlp", "post_feedforward_layernorm"),
        BlockSites(
            "pre",
            "self_attn",
            "post_attention_layernorm",
            "mlp",
            "post_feedforward_layernorm",
            input_norm="input_layernorm",
        ),
        (),
    ),
    (  # llama, mistral, qwen2, qwen3, ...
        ("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", input_norm="input_layernorm"),
        (),
    ),
    (  # vit, transformers 4.57
        ("layernorm_before", "attention", "layernorm_after", "intermediate", "output.dropout"),
        BlockSites("pre", "attention", "attention", "intermediate", "output.dropout", input_norm="layernorm_before"),
        (),
    ),
    (  # vit, transformers 5: one dropout module serves both branches
        ("layernorm_before", "attention", "layernorm_after", "mlp"),
        BlockSites("pre", "attention", "attention", "mlp", "mlp", residual="", input_norm="layernorm_before"),
        (),
    ),
    (  # clip
        ("layer_norm1", "self_attn", "layer_norm2", "mlp"),
        BlockSites("pre", "self_attn", "self_attn", "mlp", "mlp", input_norm="layer_norm1"),
        (),
    ),
    (  # bart, plbart, marian
        ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
        BlockSites(
            "post",
            **_FUNCTIONAL_DROPOUT,
            output="final_layer_norm",
            residual="final_layer_norm",
            residual_at="input",
        ),
        ("BartEncoderLayer", "BartDecoderLayer", "PLBartEncoderLayer", "PLBartDecoderLayer", "MarianEncoderLayer",
         "MarianDecoderLayer"),
    ),
    (  # mbart, whisper
        ("self_attn", "self_attn_layer_norm", "fc1", "fc2", "final_layer_norm"),
        BlockSites("pre", **_FUNCTIONAL_DROPOUT, residual="", input_norm="self_attn_layer_norm"),
        ("MBartEncoderLayer", "MBartDecoderLayer", "WhisperEncoderLayer", "WhisperDecoderLayer"),
    ),
)  # fmt: skip

_REGISTERED: dict[str, BlockSites] = {}


def register_block(class_name: str, sites: BlockSites) -> None:
    """Teach every method about a block class that is not found by itself.

    Args:
        class_name: name of the block's class (or of a base class of it), such as `"MyTransformerLayer"`.
        sites: the modules inside it.

    Raises:
        ConfigError: if the class is known already with other sites.

    Example:
        ```python
        register_block("MyLayer", BlockSites("pre", "attn", "attn", "mlp", "mlp", input_norm="norm1"))
        ```
    """
    if _REGISTERED.get(class_name, sites) != sites:
        raise ConfigError(f"class_name={class_name!r} is registered already with other sites: {_REGISTERED[class_name]}.")
    _REGISTERED[class_name] = sites


def resolve(block: nn.Module, path: str) -> nn.Module | None:
    """The module at `path` inside `block`, or None."""
    module: object = block
    for part in path.split(".") if path else ():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and part.lstrip("-").isdigit():
            module = module[int(part)] if -len(module) <= int(part) < len(module) else None
        else:
            module = getattr(module, part, None)
        if not isinstance(module, nn.Module):
            return None
    return module if isinstance(module, nn.Module) else None


def _bases(block: nn.Module) -> list[str]:
    return [cls.__name__ for cls in type(block).__mro__]


def sites_of(block: nn.Module, named: Mapping[str, str] | None = None) -> BlockSites | None:
    """The sites of a module if it is a block, else None.

    Args:
        named: sites that the user passed in a config (see `parse_sites`), for the block class that they name.
    """
    bases = _bases(block)
    if named is not None:
        sites = parse_sites(named)
        if named["block"] in bases:
            missing = [p for p in sites.paths() if resolve(block, p) is None]
            if missing:
                raise SiteError(f"sites={dict(named)}: {type(block).__name__} has no module {missing[0]!r}.")
            return sites
        return None
    for name in bases:
        if name in _REGISTERED:
            return _REGISTERED[name]
    for attributes, sites, classes in _STRUCTURES:
        if classes and not set(classes) & set(bases):
            continue
        if all(resolve(block, a) is not None for a in attributes):
            return sites
    return None


def parse_sites(named: Mapping[str, str]) -> BlockSites:
    """`BlockSites` from the `sites` argument of a config: the fields of `BlockSites` plus `"block"`, a class name."""
    fields = dict(named)
    if "block" not in fields:
        raise ConfigError(f"sites={dict(named)} is not allowed: it needs 'block', the class name of the model's blocks.")
    del fields["block"]
    try:
        return BlockSites(**fields)  # type: ignore[arg-type]
    except TypeError as error:
        allowed = ", ".join(["block", *BlockSites.__dataclass_fields__])
        raise ConfigError(f"sites={dict(named)} is not allowed ({error}): the keys are {allowed}.") from None


@dataclass(frozen=True)
class Block:
    """One block of a model.

    Attributes:
        name: its path in the model, such as `"bert.encoder.layer.3"`.
        module: the block itself.
        sites: its sites.
        index: its position in its stack, from 0.
        depth: how many blocks the stack has.
        stack: number of the stack in the model, from 0 (encoder before decoder, vision and text apart).
        width: `d`, the width of the residual stream.
        last: whether it is the last block of its stack.
    """

    name: str
    module: nn.Module
    sites: BlockSites
    index: int
    depth: int
    stack: int
    width: int

    @property
    def last(self) -> bool:
        return self.index == self.depth - 1


def _width(block: nn.Module, sites: BlockSites) -> int:
    paths = [p for p in (sites.input_norm, sites.output, "output.LayerNorm", "mlp_norm", "ln_1") if p]
    for path in paths:
        module = resolve(block, path)
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1:
            return int(weight.shape[0])
    raise SiteError(f"the width of {type(block).__name__} could not be read from its norms ({', '.join(paths)}).")


def iter_blocks(model: nn.Module, named: Mapping[str, str] | None = None) -> Iterator[Block]:
    """All blocks of a model in module order."""
    stack = -1
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or id(module) in seen or len(module) == 0:
            continue
        seen.add(id(module))
        found = [sites_of(child, named) for child in module]
        if not any(found):
            continue
        stack += 1
        for index, (child, sites) in enumerate(zip(module, found)):
            if sites is not None:
                child_name = f"{name}.{index}" if name else str(index)
                yield Block(child_name, child, sites, index, len(module), stack, _width(child, sites))


def find_blocks(model: nn.Module, named: Mapping[str, str] | None = None) -> list[Block]:
    """The blocks of a model.

    Raises:
        SiteError: if there are none; the message says what to pass.
    """
    blocks = list(iter_blocks(model, named))
    if not blocks:
        what = f"no block of class {named['block']!r}" if named else "no transformer blocks of a known structure"
        raise SiteError(
            f"{type(model).__name__} has {what}. Name the sites: pass sites={{'block': '<class name>', 'norm': "
            "'pre'|'post', 'attention': ..., 'attention_output': ..., 'ffn': ..., 'ffn_output': ..., 'output': ..., "
            "'input_norm': ...} in the config, or call pal_adapters.register_block('<class name>', BlockSites(...))."
        )
    return blocks
