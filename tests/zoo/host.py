"""One kind of model: how a tiny random one is built, what it is called with and what its blocks see."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

# Warnings of the hosts that no test of ours can help, for `pytestmark`.
HOST_WARNINGS = [
    # peft 0.21 asks transformers 5 for the old name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    # transformers 4.57, DeBERTa, torch 2.13
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning"),
    # transformers 4.57, ModernBERT, torch 2.13
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning"),
]
_NAMES = frozenset(dir(transformers))
V5 = int(transformers.__version__.partition(".")[0]) >= 5
# What models call their generation cache, as an argument and in their outputs.
CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(transformers.LlamaForCausalLM.forward).parameters
)


@dataclass(frozen=True)
class Spec:
    """Where the sums of a block are.

    Attributes:
        norm: post-LN: the last norm, whose input is `h1 + o2`; pre-LN: the norm in front of attention ("" for none).
        o1: the module whose output is the attention branch.
        ffn: the module whose input is the feed-forward input.
        o2: a linear (or mixture) behind which the feed-forward output is only scaled or dropped out.
        pre: whether the block is pre-LN: its output is then `h1 + o2`.
    """

    norm: str
    o1: str
    ffn: str
    o2: str
    pre: bool = True


@dataclass(frozen=True)
class Stack:
    """One stack of blocks: its path, how its blocks are built and what its self-attention sees."""

    path: str
    spec: Spec
    causal: bool = False
    windows: tuple[int | None, ...] = (None,)  # of the blocks in turn
    part: str = "text"  # "text", "decoder", "vision", "audio", "encoder"


@dataclass(frozen=True)
class Host:
    """One kind of model."""

    name: str
    model: str
    config: dict[str, Any]
    stacks: tuple[Stack, ...]
    sub: dict[str, dict[str, Any]] = field(default_factory=dict)  # configs inside the config
    final_norm: bool = True  # last_hidden_state is behind the final norm (pre-LN)
    length: int = 9

    def __str__(self) -> str:
        return self.name

    @property
    def available(self) -> bool:
        return self.model in _NAMES  # without importing it

    def build_config(self, **changes: Any) -> Any:
        cls = getattr(transformers, self.model)
        values = {**self.config, **changes}
        for name, part in self.sub.items():
            values[name] = {**part}
        config_class = cls.config_class
        return config_class(**values)

    @functools.cached_property
    def _built(self) -> nn.Module:
        torch.manual_seed(1)
        model = getattr(transformers, self.model)(self.build_config()).eval()
        randomise(model)
        return model

    def build(self, **changes: Any) -> Any:
        """An own copy of the model, in eval mode; with `changes` to its config, a new one."""
        if not changes:
            return copy.deepcopy(self._built)
        torch.manual_seed(1)
        model = getattr(transformers, self.model)(self.build_config(**changes)).eval()
        randomise(model)
        return model

    @property
    def decodes(self) -> bool:
        """Whether the model is a decoder without an encoder."""
        return len(self.stacks) == 1 and self.stacks[0].causal and self.stacks[0].part == "text"

    @property
    def padded(self) -> bool:
        return self.stacks[0].part in ("text", "encoder")

    def inputs(self, *, padding: bool = True, batch: int = 3) -> dict[str, Tensor]:
        """Inputs of the model; decoders are padded on the left, encoders on the right."""
        generator = torch.Generator().manual_seed(7)
        n = self.length
        ids = torch.randint(4, 40, (batch, n), generator=generator)
        mask = torch.ones(batch, n, dtype=torch.long)
        if padding and self.padded:
            for row in range(1, batch):
                pads = min(2 * row, n - 2)
                where = slice(0, pads) if self.decodes else slice(n - pads, n)
                mask[row, where] = 0
                ids[row, where] = 1
        parts = {stack.part for stack in self.stacks}
        inputs: dict[str, Tensor] = {}
        if "vision" in parts:
            inputs["pixel_values"] = torch.randn(batch, 3, 8, 8, generator=generator)
        if "audio" in parts:
            if "whisper" in self.name:
                inputs["input_features"] = torch.randn(batch, 8, 20, generator=generator)
            else:
                inputs["input_values"] = torch.randn(batch, 400, generator=generator)
        if parts & {"text", "encoder"}:
            inputs["input_ids"] = ids
            inputs["attention_mask"] = mask
        if "decoder" in parts:
            inputs["decoder_input_ids"] = torch.randint(4, 40, (batch, 6), generator=generator)
        return inputs

    def keep(self, stack: Stack, index: int, inputs: dict[str, Tensor], length: int) -> Tensor:
        """`[b, 1, q, k]`: which keys a query of block `index` sees, built from what the user passed."""
        batch = next(iter(inputs.values())).shape[0]
        keep = torch.ones(batch, 1, length, length, dtype=torch.bool)
        mask = None
        if stack.part in ("text", "encoder"):
            mask = inputs.get("attention_mask")
        elif stack.part == "decoder":
            mask = inputs.get("decoder_attention_mask")
        if mask is not None:
            keep &= mask.bool()[:, None, None, :]
        i, j = torch.arange(length)[:, None], torch.arange(length)[None, :]
        window = stack.windows[index % len(stack.windows)]
        if stack.causal:
            keep &= j <= i
            if window is not None:
                keep &= j > i - window
        elif window is not None:
            keep &= (i - j).abs() <= window
        return keep

    def real(self, inputs: dict[str, Tensor], output: str = "") -> Tensor | None:
        """`[b, n]`: where an output means something, None for everywhere."""
        if "attention_mask" in inputs and (len(self.stacks) == 1 or output.startswith("encoder")):
            return inputs["attention_mask"].bool()
        return None


def randomise(module: nn.Module, std: float = 0.6, seed: int = 3) -> None:
    """Weights and biases that make every part of a model matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                fan = parameter.shape[-1] if parameter.dim() == 3 else parameter[0].numel()  # experts come in threes
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std / math.sqrt(fan))
            else:
                # Weights of norms start near 1, biases and RMS weights of Gemma near 0.
                centre = parameter.float().mean().round().clamp(0, 1)
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))


def resolve(module: nn.Module, path: str) -> nn.Module:
    for part in path.split(".") if path else ():
        module = module[int(part)] if part.lstrip("-").isdigit() else getattr(module, part)  # type: ignore[index]
    return module


def outputs_of(output: Any) -> dict[str, Tensor]:
    """The hidden states (or logits) that a model returns."""
    names = ("last_hidden_state", "logits", "encoder_last_hidden_state", "text_embeds", "image_embeds")
    return {name: output[name] for name in names if isinstance(output.get(name), Tensor)}


def difference(a: Tensor, b: Tensor, real: Tensor | None = None) -> float:
    if real is not None and a.shape[:2] == real.shape:
        a, b = a[real], b[real]
    return float((a.detach().float() - b.detach().float()).abs().max())
