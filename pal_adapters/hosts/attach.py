"""Hooks that carry a block's values to a task module and back. Knows no method and neither host.

What a module reads is taken from calls *inside* the block (self-attention is called with the block's input and the
mask), and what it writes goes to modules inside the block. Both therefore happen again when activation checkpointing
re-runs the block, in transformers 4.57 (which re-runs the block's hooks too) and in 5 (which does not), and recorded
`hidden_states` contain the result.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import SiteError, UnsupportedError
from ..units import UnitInputs
from .kv_cache import TaskCache, task_cache
from .masks import normalise_mask
from .sites import Block, resolve

_HIDDEN = ("hidden_states", "query", "x")
_MASK = ("attention_mask", "mask", "attn_mask")
_CAUSAL_MASK = ("causal_attention_mask",)
_CACHE = ("past_key_values", "past_key_value", "layer_past")
_FINAL_NORMS = ("final_layer_norm", "final_norm", "ln_f", "norm", "layernorm", "layer_norm")


@dataclass(frozen=True)
class BlockMask:
    """The mask of one call of a block, brought to the form of `functional.attend` when asked."""

    mask: Any
    extra: Any
    causal: bool
    device: torch.device
    rows: Tensor | None = None
    tokens: tuple[int, int, int] | None = None

    def select(self, rows: Tensor) -> BlockMask:
        """The mask of these rows (counted over a batch that may be a repetition of the mask's)."""
        return replace(self, rows=rows)

    def slice_tokens(self, start: int, end: int, length: int) -> BlockMask:
        """The mask among the tokens `start:end` of `length`."""
        if self.tokens is not None:  # a part of a part
            offset, _, length = self.tokens
            start, end = start + offset, end + offset
        return replace(self, tokens=(start, end, length))

    def __call__(self, q_len: int, kv_len: int) -> tuple[Tensor | None, bool]:
        if self.tokens is None:
            mask, is_causal = self._whole(q_len, kv_len)
        else:
            start, end, length = self.tokens
            mask, is_causal = self._whole(length, length)
            if mask is not None:
                mask = mask[..., start:end]
                mask = mask[..., start:end, :] if mask.shape[-2] > 1 else mask
        if mask is not None and self.rows is not None and mask.shape[0] > 1:
            mask = mask.index_select(0, self.rows % mask.shape[0])
        return mask, is_causal

    def _whole(self, q_len: int, kv_len: int) -> tuple[Tensor | None, bool]:
        first = normalise_mask(self.mask, q_len=q_len, kv_len=kv_len, causal=self.causal, device=self.device)
        if self.extra is None:
            return first
        # CLIP's text blocks (transformers 4.57) get padding and causality as two masks.
        second = normalise_mask(self.extra, q_len=q_len, kv_len=kv_len, causal=False, device=self.device)[0]
        assert second is not None
        if first[0] is None:
            return second, False
        if first[0].dtype == torch.bool:
            first = (torch.zeros_like(first[0], dtype=second.dtype).masked_fill(~first[0], -torch.inf), False)
            return first[0].clamp(min=torch.finfo(second.dtype).min) + second, False
        return first[0] + second, False


class Runner(Protocol):
    """What a host's layer offers to `Attachment`."""

    def is_active(self, site: str) -> bool:
        """Whether a unit acts at `site` in this call."""

    def keeps_inputs(self) -> bool:
        """Whether the runner fetches the inputs itself, later in this block, by `Attachment.take_inputs`."""

    def run(self, site: str, value: Tensor, inputs: UnitInputs) -> Tensor:
        """The new value at `site`."""


def _parameters(module: nn.Module) -> list[str]:
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _argument(names: tuple[str, ...], order: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    for name in names:
        if name in kwargs:
            return kwargs[name]
        if name in order and order.index(name) < len(args):
            return args[order.index(name)]
    return None


def _is_causal(attention: nn.Module) -> bool:
    for module in (attention, getattr(attention, "self", None)):
        if getattr(module, "is_causal", False) is True or getattr(module, "is_decoder", False) is True:
            return True
    return False


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, value: Tensor) -> Any:
    return (value, *output[1:]) if isinstance(output, tuple) else value


def final_norm(model: nn.Module, block: Block) -> nn.Module | None:
    """The norm behind a pre-LN stack, or None where the stack's output is not normalised (CLIP's vision tower)."""
    path = block.name.split(".")[:-2]
    for length in (len(path), len(path) - 1):
        if length < 0:
            break
        parent = model.get_submodule(".".join(path[:length]))
        for name in _FINAL_NORMS:
            module = getattr(parent, name, None)
            if isinstance(module, nn.Module) and getattr(module, "weight", None) is not None:
                return module
    return None


class Attachment:
    """The hooks of one runner on one block.

    Args:
        model: the model that holds the block.
        block: where to attach.
        runner: is asked at every site and does the work.
    """

    def __init__(self, model: nn.Module, block: Block, runner: Runner) -> None:
        self.block = block
        self.runner = runner
        self._handles: list[Any] = []
        self._sites: set[str] = set()
        self._needs: set[str] = set()
        self._clear()
        attention = resolve(block.module, block.sites.attention)
        if attention is None:
            raise SiteError(f"{block.name} has no module {block.sites.attention!r}.")
        self._attention_order = _parameters(attention)
        self._block_order = _parameters(block.module)
        self._causal = _is_causal(attention)
        # A pre-LN host's output is normalised behind the stack.
        norm = final_norm(model, block) if block.sites.norm == "pre" and block.last else None
        self._stack_norm = (norm,)

    def _clear(self) -> None:
        self._x: Tensor | None = None
        self._raw: Tensor | None = None
        self._h: Tensor | None = None
        self._mask: Any = None
        self._extra_mask: Any = None
        self._cache: Any = None

    @property
    def _outside(self) -> bool:
        """Whether the term is added behind the block, where only what the block itself got is at hand."""
        return self.block.sites.residual_path == ""

    def require(self, sites: Iterable[str], needs: Iterable[str]) -> None:
        """Install the hooks that these sites and needs ask for; those in place stay.

        """
        sites, needs = set(sites), set(needs)
        for need in sorted(needs - self._needs):
            self._capture(need)
        for site in sorted(sites - self._sites):
            self._write(site)
        self._needs |= needs
        self._sites |= sites

    def remove(self) -> None:
        """Take all hooks off the block."""
        while self._handles:
            self._handles.pop().remove()
        self._sites.clear()
        self._needs.clear()
        self._clear()

    def _module(self, path: str) -> nn.Module:
        module = resolve(self.block.module, path)
        if module is None:
            raise SiteError(f"{self.block.name} has no module {path!r}.")
        return module

    def _capture(self, need: str) -> None:
        sites = self.block.sites
        if need == "h":
            self._before(sites.ffn, self._on_ffn)
        elif need == "raw" and sites.norm == "pre" and not self._outside:
            self._before(sites.input_norm or "", self._on_input_norm)
        elif not self._needs & {"x", "raw", "mask"}:  # one hook captures all three
            self._before("" if self._outside else sites.attention, self._on_block if self._outside else self._on_attention)
        self._needs.add(need)

    def _before(self, path: str, hook: Any) -> None:
        self._handles.append(self._module(path).register_forward_pre_hook(hook, with_kwargs=True))

    def _write(self, site: str) -> None:
        sites = self.block.sites
        if site == "attention":
            self._on_output(sites.attention_output, self._at_attention)
        elif site == "ffn":
            self._on_output(sites.ffn_output, self._at_ffn)
        elif site == "output":
            self._on_output(sites.output, self._at_output)
        elif site == "residual" and sites.residual_at == "input":
            self._before(sites.residual_path, self._at_residual_input)
        elif site == "residual":
            self._on_output(sites.residual_path, self._at_residual)
        elif self.block.last:
            norm = self._stack_norm[0]
            if norm is None:
                self._on_output(sites.output, self._at_stack_output)
            else:
                self._handles.append(norm.register_forward_hook(self._at_stack_output, prepend=True))

    def _on_output(self, path: str, hook: Any) -> None:
        # In front of other hooks: transformers 5 records hidden states in a hook of its own.
        self._handles.append(self._module(path).register_forward_hook(hook, prepend=True))

    def _on_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._remember(self._block_order, args, kwargs)

    def _on_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._remember(self._attention_order, args, kwargs)

    def _on_input_norm(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._raw = args[0] if args else next(iter(kwargs.values()))

    def _on_ffn(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._h = args[0] if args else next(iter(kwargs.values()))

    def _remember(self, order: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = _argument(_HIDDEN, order, args, kwargs)
        self._x = args[0] if x is None else x
        self._mask = _argument(_MASK, order, args, kwargs)
        self._extra_mask = _argument(_CAUSAL_MASK, order, args, kwargs)
        self._cache = _argument(_CACHE, order, args, kwargs)

    def _inputs(self, value: Tensor) -> UnitInputs:
        x = self._x
        if x is not None and x.dim() != 3:
            raise UnsupportedError(
                f"{self.block.name} got hidden states of shape {list(x.shape)}: task modules need [batch, tokens, "
                "width]. Load the model with attn_implementation='sdpa' or 'eager' (flash attention removes padding)."
            )
        raw = x if self._raw is None else self._raw
        if x is not None and self._outside and "x" in self._needs:
            x = self._module(self.block.sites.input_norm or "")(x)
        cache: TaskCache | None = task_cache(self._cache, self.block.name, self.block.depth)
        mask = BlockMask(self._mask, self._extra_mask, self._causal, value.device)
        return UnitInputs(x=x, raw=raw, h=self._h, mask=mask, cache=cache, batch=value.shape[0])

    def take_inputs(self, value: Tensor) -> UnitInputs:
        """What the block was called with, for a runner that `keeps_inputs`; forgets it."""
        inputs = self._inputs(value)
        self._forget()
        return inputs

    def _run(self, site: str, value: Tensor) -> Tensor:
        return self.runner.run(site, value, self._inputs(value))

    def _at(self, site: str, output: Any) -> Any:
        if not self.runner.is_active(site):
            return None
        return _with_first(output, self._run(site, _first(output)))

    def _at_attention(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._at("attention", output)

    def _at_ffn(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._at("ffn", output)

    def _at_residual(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._done(self._at("residual", output))

    def _at_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        return self._at("output", output)

    def _at_stack_output(self, module: nn.Module, args: Any, output: Any) -> Any:
        result = self._at("stack_output", output)
        self._clear()
        return result

    def _at_residual_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.runner.is_active("residual"):
            return self._done(None)
        if args:
            return self._done(((self._run("residual", args[0]), *args[1:]), kwargs))
        name = next(iter(kwargs))
        return self._done((args, {**kwargs, name: self._run("residual", kwargs[name])}))

    def _done(self, result: Any) -> Any:
        if self.runner.keeps_inputs():
            return result
        self._forget()
        return result

    def _forget(self) -> None:
        """Drop what was captured, but for the mask where the stack's output is still to come and needs it."""
        self._x = self._raw = self._h = None
        if "stack_output" not in self._sites:
            self._clear()


def with_sites(block: Block, **changes: Any) -> Block:
    """The same block with other sites."""
    return replace(block, sites=replace(block.sites, **changes))
