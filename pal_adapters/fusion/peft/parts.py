"""The weights of a source at each module, read from its tensors (PEFT)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from torch import Tensor, nn

from pal_adapters.blocks.sites import Block, find_blocks
from pal_adapters.errors import ConfigError, UnsupportedError
from pal_adapters.fusion.units import Pair
from pal_adapters.hosts.method import Method
from pal_adapters.hosts.peft.saved import lora_extras, lora_scaling
from pal_adapters.nn.unit import TaskUnit

_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<part>A|B|embedding_A|embedding_B)(?:\.(?P<kind>weight|bias))?$")
_HALF = (torch.float16, torch.bfloat16)


class NormPart(NamedTuple):
    """A source's own copy of a layer norm: its weights by name."""

    weights: dict[str, Tensor]


class UnitPart(NamedTuple):
    """A task module in one block: the module without weights, its weights, and their expected shapes."""

    block: Block
    unit: TaskUnit
    own: dict[str, Tensor]
    shared: dict[str, Tensor]
    shapes: dict[str, list[int]]


Part = Pair | NormPart | UnitPart


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in _HALF else tensor


def lora_parts(name: str, config: LoraConfig, tensors: Mapping[str, Tensor]) -> tuple[dict[str, Part], set[str]]:
    """The LoRA weights at each module, and the names of the tensors used."""
    extras = lora_extras(config)
    if extras:
        raise UnsupportedError(
            f"source {name!r} is a LoRA adapter with {', '.join(extras)}: only plain LoRA, scaling * B A x on an "
            "unchanged base model, can be combined. Convert it to plain LoRA first: load it on the base model with "
            "PeftModel.from_pretrained, call peft.save_as_lora(folder, model, rank=...) with a rank large enough for "
            "your accuracy, and use that folder as the source."
        )
    found: dict[str, dict[str, Tensor]] = {}
    used = set()
    for key, tensor in tensors.items():
        match = _LORA.match(key)
        if match is None:
            continue
        used.add(key)
        part = match["part"] + (".bias" if match["kind"] == "bias" else "")
        found.setdefault(match["module"], {})[part] = _wide(tensor)
    parts: dict[str, Part] = {}
    for module, given in found.items():
        embedding = "embedding_A" in given
        down, up = (given.get(f"embedding_{p}" if embedding else p) for p in "AB")
        if down is None or up is None or down.dim() != 2:
            raise UnsupportedError(
                f"source {name!r} adapts {module!r} in a way that cannot be combined: only LoRA on linear modules and "
                "embeddings can."
            )
        scaling = lora_scaling(config, module, down.shape[0])
        bias = given.get("B.bias")
        parts[module] = Pair(down, up * scaling, up_bias=None if bias is None else bias * scaling, embedding=embedding)
    return parts, used


def houlsby_parts(config: Any, tensors: Mapping[str, Tensor], method: Method) -> tuple[dict[str, Part], set[str]]:
    """The bottleneck or layer norm at each module, and the names of the tensors used."""
    parts: dict[str, Part] = {}
    used = set()
    for key, tensor in tensors.items():
        unit = re.match(rf"(.+)\.{method.name}\.{method.name}_units\.down\.weight$", key)
        norm = re.match(rf"(.+)\.{method.name}_norms\.(\w+)$", key)
        if unit is not None:
            prefix = key.removesuffix("down.weight")
            keys = [prefix + name for name in ("down.weight", "up.weight", "down.bias", "up.bias")]
            down, up, down_bias, up_bias = (_wide(tensors[k]) for k in keys)
            parts[unit[1]] = Pair(down, up, down_bias, up_bias, config.activation)
            used |= set(keys)
        elif norm is not None:
            copy = parts.setdefault(norm[1], NormPart({}))
            assert isinstance(copy, NormPart)
            copy.weights[norm[2]] = _wide(tensor)
            used.add(key)
    return parts, used


def unit_parts(
    config: Any, tensors: Mapping[str, Tensor], method: Method, model: nn.Module
) -> tuple[dict[str, Part], set[str]]:
    """The task module in each block, and the names of the tensors used."""
    blocks = {block.name: block for block in find_blocks(model, config.sites)}
    own: dict[str, dict[str, Tensor]] = {}
    shared: dict[int, dict[str, Tensor]] = {}
    used = set()
    for key, tensor in tensors.items():
        match = re.match(rf"(.+)\.{method.name}\.{method.name}_(units|shared)\.(.+)$", key)
        if match is None:
            continue
        used.add(key)
        block = blocks.get(match[1])
        if block is None:
            raise ConfigError(
                f"{type(model).__name__} has no block {match[1]!r}: the adapter may belong to another base model."
            )
        into = own.setdefault(match[1], {}) if match[2] == "units" else shared.setdefault(block.stack, {})
        into[match[3]] = _wide(tensor)
    if not own and shared:  # an adapter that shares all weights across blocks
        own = {name: {} for name in blocks}
    parts: dict[str, Part] = {}
    for name, weights in own.items():
        block = blocks[name]
        unit, expected = _empty_unit(config, method, block)
        parts[name] = UnitPart(block, unit, weights, shared.get(block.stack, {}), expected)
    return parts, used


def _empty_unit(config: Any, method: Method, block: Block) -> tuple[TaskUnit, dict[str, list[int]]]:
    """A unit without weights, and the shapes of the weights it needs."""
    with torch.device("meta"):
        unit = method.build(config, block)
        shared = method.build_shared(config, block)
    assert unit is not None
    shapes = {name: list(weight.shape) for name, weight in unit.own_weights().items()}
    shapes |= {} if shared is None else {name: list(weight.shape) for name, weight in shared.named_parameters()}
    return unit.eval().requires_grad_(False), shapes
