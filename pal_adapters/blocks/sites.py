"""Where task modules attach in a Hugging Face model: found from the structure of its blocks, or named by the user.

A *block* is one transformer layer; a *stack* is the `nn.ModuleList` or `nn.Sequential` that holds blocks. Paths are
attribute paths inside a block, with indices for lists (`"layer.-1.dropout"`); `""` is the block. The structures that
are found are listed in `structures/`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from pal_adapters.errors import ConfigError, SiteError

from .block_sites import BlockSites as BlockSites
from .block_sites import Structure
from .origin import class_keys, foreign_forward
from .structures import REFUSED, REPEATED, STRUCTURES
from .walk import named_modules

_REGISTERED: dict[str, BlockSites] = {}
_ADDED: set[type] = set()
_KNOWN = frozenset[str]().union(*(structure.known for structure in STRUCTURES))


def register_block(class_name: str, sites: BlockSites) -> None:
    """Teach every method about a block class that is not recognised automatically.

    Args:
        class_name: name of the block's class (or of a base class of it), such as `"MyTransformerLayer"`.
        sites: the modules inside it.

    Raises:
        ConfigError: if the class is already registered with other sites.

    Example:
        ```python
        register_block("MyLayer", BlockSites("pre", "attn", "attn", "mlp", "mlp", input_norm="norm1"))
        ```
    """
    if _REGISTERED.get(class_name, sites) != sites:
        raise ConfigError(
            f"class_name={class_name!r} is registered already with other sites: {_REGISTERED[class_name]}."
        )
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


def mark_added(*bases: type) -> None:
    """Tell which modules a host adds to a model or wraps around its modules: those that derive from `bases`."""
    _ADDED.update(bases)


def is_added(module: nn.Module) -> bool:
    """Whether a host added a module: it derives from a class that was passed to `mark_added`.

    A module of the model into which a host mixes such a class, as adapters does, is the model's own.
    """
    added = tuple(_ADDED)
    mixed = (cls for cls in type(module).__mro__ if issubclass(cls, nn.Module) and not issubclass(cls, added))
    return isinstance(module, added) and set(mixed) <= {nn.Module}


def _children(block: nn.Module) -> set[str]:
    inside = {name: child for name, child in block._modules.items() if child is not None}
    return {name for name, child in inside.items() if name in _KNOWN or not is_added(child)}


def _unexplained(block: nn.Module, structure: Structure) -> list[str]:
    """The tensors and numbers of a block itself, outside its children, that could take part in its sums."""
    own = [name for name, tensor in (*block._parameters.items(), *block._buffers.items()) if tensor is not None]
    own += [name for name, value in vars(block).items() if isinstance(value, float)]
    return [name for name in own if name not in structure.scales]


def _fits(block: nn.Module, structure: Structure, bases: list[str], children: set[str]) -> bool:
    if not structure.required <= children <= structure.known:
        return False
    if structure.classes and not set(structure.classes) & set(bases):
        return False
    own = {name: getattr(block, name, None) for name in structure.flags}
    if any(own[name] != value and type(own[name]) is not value for name, value in structure.flags.items()):
        return False
    if _unexplained(block, structure):
        return False
    if any(resolve(block, path) is None for path in (*structure.inner.split(), *structure.sites.paths())):
        return False
    # By default, its first dimension is the tokens, not the batch.
    return not isinstance(resolve(block, structure.sites.attention), nn.MultiheadAttention)


def _find_sites(block: nn.Module, named: Mapping[str, str] | None = None) -> BlockSites | str | None:
    """The sites of a module, or why it is a block but refused, or None if it is not a block."""
    bases = class_keys(block)
    if named is not None:
        if named.get("block") not in bases:
            return None
        sites = parse_sites(named)
        missing = [p for p in sites.paths() if resolve(block, p) is None]
        if missing:
            raise SiteError(f"sites={dict(named)}: {type(block).__name__} has no module {missing[0]!r}.")
        return sites
    for name in bases:
        if name in _REGISTERED:
            missing = [p for p in _REGISTERED[name].paths() if resolve(block, p) is None]
            if missing:
                raise SiteError(
                    f"the sites registered for {name}: {type(block).__name__} has no module {missing[0]!r}."
                )
            return _REGISTERED[name]
    children = _children(block)
    for structure in STRUCTURES:
        if _fits(block, structure, bases, children):
            refused = next((REFUSED[name] for name in bases if name in REFUSED), None)
            return refused or _not_read(block, structure) or structure.sites
    # Swin fits no row of the table, but its reason says more than "no known structure".
    return next((REFUSED[name] for name in bases if name in REFUSED), None)


def _not_read(block: nn.Module, structure: Structure) -> str | None:
    """Why the sums of a block that looks like those of a row are not known, or None."""
    foreign = foreign_forward(block)
    if foreign is None:
        return None
    sites = {"block": type(block).__name__, **structure.sites.to_dict()}
    return (
        f"{foreign} may add up the branches differently from the blocks of transformers with the same module names. "
        f"If it adds them up as they do, pass sites={sites}"
    )


def refusal_of(block: nn.Module) -> str | None:
    """Why a module that looks like a block is rejected, or None if it is a known block or does not look like one."""
    found = _find_sites(block)
    return found if isinstance(found, str) else None


def sites_of(block: nn.Module, named: Mapping[str, str] | None = None) -> BlockSites | None:
    """The sites of a module if it is a block, else None.

    Args:
        named: sites that the user passed in a config (see `parse_sites`), for the block class that they name.
    """
    found = _find_sites(block, named)
    return found if isinstance(found, BlockSites) else None


def parse_sites(named: Mapping[str, str]) -> BlockSites:
    """`BlockSites` from the `sites` argument of a config: the fields of `BlockSites` plus `"block"`, a class name."""
    fields = dict(named)
    if "block" not in fields:
        raise ConfigError(
            f"sites={dict(named)} is not allowed: it needs 'block', the class name of the model's blocks."
        )
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
        repeated: whether the model runs it at several depths, so that its modules take part several times in a call.
        last: whether it is the last block of its stack.
    """

    name: str
    module: nn.Module
    sites: BlockSites
    index: int
    depth: int
    stack: int
    width: int
    repeated: bool = False

    @property
    def last(self) -> bool:
        return self.index == self.depth - 1


def _width(block: nn.Module, sites: BlockSites) -> int:
    output = f"{sites.output}." if sites.output else ""
    paths = (sites.input_norm, sites.output, f"{output}LayerNorm", f"{output}layer_norm", f"{output}layernorm")
    for norm in [*(resolve(block, path) for path in paths if path), *block.children()]:
        weight = getattr(norm, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() == 1:
            return int(weight.shape[0])
        shape = getattr(norm, "normalized_shape", None)  # a norm without a weight
        if shape is not None and len(shape) == 1:
            return int(shape[0])
    ffn = resolve(block, sites.ffn)
    for module in ffn.modules() if ffn is not None else ():
        if isinstance(module, nn.Linear):
            return module.in_features
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise SiteError(
        f"the width of {type(block).__name__} could not be read from its norms or the layers of {sites.ffn!r}."
    )


def _stacks(model: nn.Module) -> Iterator[tuple[str, nn.ModuleList | nn.Sequential]]:
    for name, module in named_modules(model, units=False).items():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 0:
            yield name, module


def iter_blocks(model: nn.Module, named: Mapping[str, str] | None = None) -> Iterator[Block]:
    """All blocks of a model in module order."""
    stack = -1
    for name, module in _stacks(model):
        # By name, so that a block that stands at several depths is one block.
        found = {child_name: (child, sites_of(child, named)) for child_name, child in module.named_children()}
        if not any(sites for _, sites in found.values()):
            continue
        stack += 1
        for index, (child_name, (child, sites)) in enumerate(found.items()):
            if sites is not None:
                full_name = f"{name}.{child_name}" if name else child_name
                repeated = sum(other is child for other in module) > 1 or not REPEATED.isdisjoint(class_keys(child))
                yield Block(full_name, child, sites, index, len(found), stack, _width(child, sites), repeated)


def _reason(model: nn.Module, named: Mapping[str, str] | None) -> str:
    if named:
        return f"has no block of class {named['block']!r}"
    for _, module in _stacks(model):
        for child in module:
            why = _find_sites(child)
            if isinstance(why, str):
                return f"cannot be adapted by itself: {type(child).__name__} is refused because {why}"
    return "has no transformer blocks of a known structure"


def find_blocks(model: nn.Module, named: Mapping[str, str] | None = None) -> list[Block]:
    """The blocks of a model.

    Raises:
        SiteError: if there are none; the message says what to pass.
    """
    if named is not None:
        parse_sites(named)
    blocks = list(iter_blocks(model, named))
    if not blocks:
        raise SiteError(
            f"{type(model).__name__} {_reason(model, named)}. Name the sites: pass sites={{'block': '<class name>', "
            "'norm': 'pre'|'post', 'attention': ..., 'attention_output': ..., 'ffn': ..., 'ffn_output': ..., "
            "'output': "
            "..., 'input_norm': ...}} in the config, or call pal_adapters.register_block('<class name>', "
            "BlockSites(...))."
        )
    return blocks
